"""Our own checkpoints in retrieval, any backbone: as the encoder of a dense index, and as the judge that re-ranks.

    model, tokenizer, _ = load_model("base", device)
    base = KnowledgeBase.build(documents, path, retriever="dense", encoder=ModelEncoder(model, tokenizer))
    scores = LikelihoodScorer(model, tokenizer).score("who wrote it?", texts)

A text's vector is the mean over its tokens of model.hidden, at length 1. A document's score is how likely the model
finds the query after it, log p(query token | document, query so far) (query likelihood, Ponte & Croft 1998; with
language models arXiv 2204.07496). Computed in the model's own compute dtype on its own device.
"""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from nanochat.config import UserError
from nanochat.gpt import GPT
from nanochat.retrieval.encoders import Kind
from nanochat.tokenizer import Tokenizer


class ModelEncoder:
    """The Encoder of nanochat/retrieval/encoders.py. Texts longer than max_tokens are cut."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, max_tokens: int | None = None, batch_tokens: int = 16384):
        """max_tokens: with <|bos|>, default the model's context. batch_tokens: of a forward, padding included."""
        self.model, self.tokenizer = model, tokenizer
        self.max_tokens, self.batch_tokens = max_tokens or model.config.seq_len, batch_tokens
        if self.max_tokens < 2:
            raise UserError(f"max_tokens={self.max_tokens}: expected at least 2, <|bos|> and a token")
        self.dim: int = model.config.d_model
        self.fingerprint = hashlib.sha256(
            f"{tokenizer.hash} {weights_hash(model)} {self.max_tokens}".encode()
        ).hexdigest()

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], kind: Kind = "passage") -> np.ndarray:
        """-> (n, dim) float32. Queries go one by one: in a batch, padding would change their last bits."""
        out = np.zeros((len(texts), self.dim), np.float32)
        ids = self.tokenizer.encode(list(texts), prepend=self.tokenizer.bos_id)
        rows = {i: row[: self.max_tokens] for i, row in enumerate(ids) if texts[i].strip()}
        groups = [[i] for i in rows] if kind == "query" else by_length(rows, self.batch_tokens)
        for group in groups:
            out[group] = self.pool([rows[i] for i in group]).cpu().numpy()
        return out

    def pool(self, rows: list[list[int]]) -> Tensor:
        """Ids of texts, <|bos|> first -> (B, D) float32: mean hidden state after <|bos|>, length 1."""
        x, lengths = padded(rows, self.model.device)
        hidden = self.model.hidden(x).float()  # (B, T, D)
        at = torch.arange(x.size(1), device=x.device)
        mask = (at > 0) & (at < lengths[:, None])  # (B, T)
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return mean / mean.norm(dim=1, keepdim=True).clamp_min(1e-12)


def by_length(rows: dict[int, list[int]], budget: int) -> Iterator[list[int]]:
    """Keys of rows of like length together, the longest first; at most `budget` ids with padding, or one row."""
    group: list[int] = []
    for i in sorted(rows, key=lambda i: -len(rows[i])):
        if group and (len(group) + 1) * len(rows[group[0]]) > budget:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def weights_hash(model: GPT) -> str:
    """sha256 over names, dtypes and bytes of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class LikelihoodScorer:
    """score(query, texts) as re-ranking asks for it. A row is <|bos|> document, new line, query."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, batch_tokens: int = 16384) -> None:
        self.model, self.tokenizer, self.batch_tokens = model, tokenizer, batch_tokens

    @torch.inference_mode()
    def score(self, query: str, texts: Sequence[str]) -> np.ndarray:
        """-> (n,) float32: mean log-probability in nats of the query's tokens; the likeliest is the largest.

        A document that leaves no room for the query is cut at its end. UserError for a query without tokens, or one
        that alone fills the context.
        """
        asked, line = self.tokenizer.encode(query), self.tokenizer.encode("\n")
        room = self.model.config.seq_len - 1 - len(line) - len(asked)
        if not asked or room < 0:
            raise UserError(
                f"a query of {len(asked)} tokens: expected 1 to {room + len(asked)}, what the context holds"
            )
        bodies = self.tokenizer.encode(list(texts))
        rows = {i: [self.tokenizer.bos_id, *body[:room], *line, *asked] for i, body in enumerate(bodies)}
        out = np.zeros(len(texts), np.float32)
        for group in by_length(rows, self.batch_tokens):
            out[group] = -self.nats([rows[i] for i in group], len(asked)).cpu().numpy()
        if not np.isfinite(out).all():
            raise UserError("the model gives a loss that is no finite number: use an earlier step, or float32")
        return out

    def nats(self, rows: list[list[int]], n: int) -> Tensor:
        """Mean loss of the last n ids of each row -> (B,) float32."""
        x, lengths = padded(rows, self.model.device)
        last = lengths[:, None] - n + torch.arange(n, device=x.device)  # (B, n)
        hidden = self.model.hidden(x[:, :-1])  # (B, T - 1, D)
        before = hidden.gather(1, (last - 1)[..., None].expand(-1, -1, hidden.size(2)))  # (B, n, D)
        return self.model.loss(before, x.gather(1, last), "none").float().mean(1)


def padded(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """-> ids (B, T), right-padded with 0, and lengths (B,). What stands right of a row changes nothing in it."""
    width = max(map(len, rows))
    lengths = torch.tensor([len(r) for r in rows], device=device)
    return torch.tensor([r + [0] * (width - len(r)) for r in rows], device=device), lengths
