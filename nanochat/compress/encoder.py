"""Chunk -> vector: the bottom blocks of the model, copied and then trained, a mean over the tokens, a two-layer map.

The model's own blocks and tokenizer start where its vectors mean something to it (arXiv 2509.01092 takes RoBERTa). They
stay causal, so that any backbone serves: a mean over all positions sees every token. The map is residual and starts at
zero: at first a chunk is the mean of what the bottom blocks say. Vectors have the scale of normed embeddings, rms 1.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from nanochat.common import atomic_write
from nanochat.config import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.layers import Linear, init_uniform, norm, set_compute_dtype
from nanochat.model_encoder import weights_hash

BATCH_TOKENS = 16384  # of a forward, padding included


class ChunkEncoder(nn.Module):
    """A GPT cut off after n_layer blocks; in place of its head stands the first matrix of the map."""

    def __init__(self, config: GPTConfig, n_layer: int) -> None:
        super().__init__()
        if not 1 <= n_layer <= config.n_layer:
            raise UserError(f"encoder_layers={n_layer}: expected 1 to {config.n_layer}, the layers of the model")
        self.body = GPT(config)
        self.body.blocks = self.body.blocks[:n_layer]
        self.body.head = Linear(config.d_model, config.d_model)
        self.out = Linear(config.d_model, config.d_model)
        self.mark = nn.Parameter(torch.empty(config.d_model))  # what all chunk vectors share

    @classmethod
    def of(cls, model: GPT, n_layer: int, seed: int = 0) -> "ChunkEncoder":
        """A new encoder from the model's weights."""
        with torch.device("meta"):
            encoder = cls(model.config, n_layer)
        encoder.to_empty(device=model.device)
        own = encoder.body.state_dict()
        encoder.body.load_state_dict({k: v for k, v in model.state_dict().items() if k in own and k != "head.weight"}
                                     | {"head.weight": own["head.weight"]})  # fmt: skip
        init_uniform(encoder.body.head.weight, torch.Generator().manual_seed(seed))
        nn.init.zeros_(encoder.out.weight)
        nn.init.zeros_(encoder.mark)
        encoder.set_compute(model)
        return encoder

    def set_compute(self, model: GPT) -> None:
        """Dtype and kernels of the model."""
        self.body.kernels = model.kernels
        set_compute_dtype(self, model.compute_dtype)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Chunks, right-padded, (N, k) of (N,) tokens -> (N, D) float32."""
        hidden = self.body.hidden(ids).float()  # (N, k, D); what stands right of a chunk changes nothing in it
        inside = torch.arange(ids.size(1), device=ids.device) < lengths[:, None]  # (N, k)
        mean = (hidden * inside[..., None]).sum(1) / lengths[:, None]
        return norm(mean + self.out(F.gelu(self.body.head(mean))).float()) + self.mark

    def encode(self, chunks: Sequence[Sequence[int]]) -> Tensor:
        """Any number of chunks -> (N, D) float32; with gradients where they are enabled."""
        device = self.mark.device
        if not chunks:
            return torch.zeros(0, len(self.mark), device=device)
        width = max(map(len, chunks))
        size = max(1, BATCH_TOKENS // width)
        parts = []
        for i in range(0, len(chunks), size):
            rows = chunks[i : i + size]
            ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
            parts.append(self(ids, torch.tensor([len(row) for row in rows], device=device)))
        return torch.cat(parts)

    def param_groups(self) -> dict[str, list[nn.Parameter]]:
        """Role -> parameters, as GPT has them; the map's two matrices are matrices."""
        groups = self.body.param_groups()
        groups["matrix"] += groups["unembedding"] + [*self.out.parameters()]
        groups["unembedding"] = []
        groups["scalar"] += [self.mark]
        return groups

    def fingerprint(self) -> str:
        """sha256 over all weights: vectors of one are those of another encoder only where these agree."""
        return weights_hash(self)  # pyrefly: ignore[bad-argument-type]


def chunk_key(chunk: Sequence[int]) -> int:
    """64 bits of a hash of a chunk's ids: where its vector is found whatever document it stands in."""
    return int.from_bytes(hashlib.blake2b(np.asarray(chunk, "<u4").tobytes(), digest_size=8).digest(), "little")


class VectorCache:
    """Vectors of chunks as float16, memory-mapped: DIR/<encoder's fingerprint>/keys.npy (sorted) and vectors.npy.

    `vectors` rounds what it computes to float16, too: what is cached and what is not is the same.
    """

    def __init__(self, folder: Path, encoder: ChunkEncoder) -> None:
        self.encoder, self.folder = encoder, Path(folder) / encoder.fingerprint()[:16]
        self.keys, self.table = np.empty(0, np.uint64), np.empty((0, len(encoder.mark)), np.float16)
        if (self.folder / "keys.npy").is_file():
            try:
                self.keys = np.load(self.folder / "keys.npy", mmap_mode="r")
                self.table = np.load(self.folder / "vectors.npy", mmap_mode="r")
            except (ValueError, EOFError, OSError) as e:
                raise UserError(f"{self.folder} is damaged ({e}): remove the folder") from e
            if self.table.shape != (len(self.keys), len(encoder.mark)):
                raise UserError(f"{self.folder}: {len(self.keys)} keys, vectors {self.table.shape}: remove the folder")

    @torch.inference_mode()
    def build(self, chunks: Iterable[Sequence[int]]) -> int:
        """Compute and write the vectors of all these chunks -> how many different ones. What was there is replaced."""
        different = {chunk_key(chunk): list(chunk) for chunk in chunks}
        keys = np.array(sorted(different), np.uint64)
        table = self.encoder.encode([different[int(key)] for key in keys]).cpu().numpy().astype(np.float16)
        for name, array in (("vectors.npy", table), ("keys.npy", keys)):  # keys last: without them there is no cache
            with atomic_write(self.folder / name) as f:
                np.save(f, array)
        self.__init__(self.folder.parent, self.encoder)
        return len(keys)

    @torch.inference_mode()
    def vectors(self, chunks: Sequence[Sequence[int]]) -> Tensor:
        """(N, D) float32: looked up, and computed where the cache does not have them."""
        keys = np.array([chunk_key(chunk) for chunk in chunks], np.uint64)
        at = np.searchsorted(self.keys, keys)
        there = np.zeros(len(keys), bool)
        there[at < len(self.keys)] = self.keys[at[at < len(self.keys)]] == keys[at < len(self.keys)]
        out = np.empty((len(keys), self.table.shape[1]), np.float16)
        out[there] = self.table[at[there]]
        missing = self.encoder.encode([chunks[int(i)] for i in np.flatnonzero(~there)])
        out[~there] = missing.cpu().numpy().astype(np.float16)
        return torch.from_numpy(out).float().to(self.encoder.mark.device)


def cache_folder(knowledge_base: Any) -> Path:
    """Where the vectors of a knowledge base lie: beside it, for it removes what its manifest does not name."""
    path = Path(knowledge_base)
    return path.with_name(path.name + ".vectors")
