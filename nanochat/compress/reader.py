"""A model that reads compressed documents: the model, its chunk encoder and the policies trained for it."""

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.checkpoint import checkpoint_dir, load_checkpoint, load_model
from nanochat.compress.chunks import Mixed, Prompt, collate, make_prompt, mix
from nanochat.compress.encoder import ChunkEncoder, VectorCache, cache_folder
from nanochat.compress.policy import FEATURES, RULES, Policy, best, chunk_features, n_expanded, rule_scores
from nanochat.config import UserError
from nanochat.engine import Engine
from nanochat.gpt import GPT
from nanochat.ops import cap_logits
from nanochat.retrieval import KnowledgeBase
from nanochat.tokenizer import Tokenizer

LEARNED = ("supervised", "rl")
POLICIES = ("none", *RULES, *LEARNED, "all")


@dataclass
class Reader:
    """k: tokens of a chunk at most. cache: looked up before the encoder runs, outside of training."""

    model: GPT
    encoder: ChunkEncoder
    tokenizer: Tokenizer
    k: int
    policies: dict[str, Policy] = field(default_factory=dict)  # some of LEARNED
    cache: VectorCache | None = None

    @classmethod
    def new(cls, model: GPT, tokenizer: Tokenizer, k: int, encoder_layers: int, seed: int = 0) -> "Reader":
        """With a fresh encoder and policy. encoder_layers: 0 = a sixth of the model's, at least one."""
        encoder = ChunkEncoder.of(model, encoder_layers or max(1, model.config.n_layer // 6), seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            policy = Policy(model.config.d_model).to(model.device)
        return cls(model, encoder, tokenizer, k, {"supervised": policy, "rl": copy.deepcopy(policy)})

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the model's own weights."""
        return {
            "k": self.k,
            "encoder_layers": len(self.encoder.body.layers),
            "encoder": self.encoder.state_dict(),
            "policies": {name: policy.state_dict() for name, policy in self.policies.items()},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.encoder.load_state_dict(state["encoder"])
        for name, policy in self.policies.items():
            policy.load_state_dict(state["policies"][name])

    @property
    def chunk_id(self) -> int:
        return self.tokenizer.encode_special("<|chunk|>")

    def prompt(self, conversation: dict[str, Any]) -> Prompt:
        return make_prompt(self.tokenizer, conversation, self.k)

    def vectors(self, chunks: Sequence[Sequence[int]]) -> Tensor:
        """(N, D) float32, with gradients where they are enabled; else from the cache, if there is one."""
        if self.cache is None or torch.is_grad_enabled():
            return self.encoder.encode(chunks)
        return self.cache.vectors(chunks)

    def batch(self, prompts: Sequence[Prompt], expanded: Sequence[Collection[int]]) -> Mixed:
        return collate(prompts, expanded, self.chunk_id).to(self.model.device)

    def inject(self, batch: Mixed) -> tuple[Tensor, Tensor] | None:
        """What the model's forward takes; None without slots: that is plain RAG."""
        return (batch.slots, self.vectors(batch.chunks)[batch.index]) if len(batch.index) else None

    def logprobs(self, batch: Mixed) -> Tensor:
        """Mean log p of each row's targets, (B,) float32."""
        wanted = batch.y >= 0
        logp = at_targets(self.model, batch, self.inject(batch)).gather(1, batch.y[wanted][:, None])[:, 0]  # (n,)
        rows, counts = wanted.nonzero(as_tuple=True)[0], wanted.sum(1)
        return torch.zeros(len(batch.x), device=logp.device).index_add(0, rows, logp) / counts.clamp_min(1)

    # ---- choosing ----

    @torch.no_grad()
    def look(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What a policy sees: question (B, D), chunks (B, L, D), features (B, L, F), valid (B, L)."""
        device, L = self.model.device, max(1, max(len(p.chunks) for p in prompts))
        asked = self.encoder.encode([self.tokenizer.encode_ordinary(p.question)[: 4 * self.k] for p in prompts])
        flat = self.vectors([p.chunk_ids(i) for p in prompts for i in range(len(p.chunks))])
        chunks = torch.zeros(len(prompts), L, asked.size(1), device=device)
        features = torch.zeros(len(prompts), L, len(FEATURES))
        valid = torch.zeros(len(prompts), L, dtype=torch.bool, device=device)
        at = 0
        for b, prompt in enumerate(prompts):
            n = len(prompt.chunks)
            if n == 0:
                continue
            chunks[b, :n], valid[b, :n] = flat[at : at + n], True
            near = F.cosine_similarity(flat[at : at + n] - self.encoder.mark, asked[b] - self.encoder.mark, dim=-1)
            found = chunk_features(prompt, self.tokenizer, near.cpu().numpy(), self.k)
            features[b, :n] = torch.from_numpy(found)
            at += n
        return asked, chunks, features.to(device), valid

    @torch.no_grad()
    def choose(self, name: str, prompts: Sequence[Prompt], p: float, seed: int = 0) -> list[list[int]]:
        """The chunks that stay tokens, a share p of each prompt's, by one of POLICIES."""
        if name not in POLICIES or (name in LEARNED and name not in self.policies):
            raise UserError(f"policy {name!r}: expected one of {', '.join(POLICIES)}, trained where it is learned")
        if name in ("none", "all"):
            return [list(range(len(q.chunks))) if name == "all" else [] for q in prompts]
        counts = [n_expanded(len(q.chunks), p) for q in prompts]
        if not any(counts):
            return [[] for _ in prompts]
        seen = self.look(prompts)
        if name in LEARNED:
            picks = best(self.policies[name](*seen), torch.tensor(counts)).tolist()
            return [[i for i in row if i >= 0] for row in picks]
        features = seen[2].cpu().numpy()
        scores = [rule_scores(name, q, f[: len(q.chunks)], seed + b) for b, (q, f) in
                  enumerate(zip(prompts, features, strict=True))]  # fmt: skip
        return [np.argsort(-s, kind="stable")[:n].tolist() for s, n in zip(scores, counts, strict=True)]

    # ---- answering ----

    def answers(
        self, prompts: Sequence[Prompt], expanded: Sequence[Collection[int]], max_tokens: int = 32
    ) -> list[list[int]]:
        """Greedy answers, as ids, without the one that ended them."""
        rows = [mix(p, e, self.chunk_id) for p, e in zip(prompts, expanded, strict=True)]
        asked = [ids[: mask.index(1)] if 1 in mask else ids for ids, mask, _ in rows]
        chunks = [[p.chunk_ids(i) for i in slots] for p, (_, _, slots) in zip(prompts, rows, strict=True)]
        with torch.inference_mode():
            flat = self.vectors([c for own in chunks for c in own])
        vectors = list(flat.split([len(own) for own in chunks]))
        engine = Engine(self.model, self.tokenizer, tools=())
        written, _ = engine.generate_batch(asked, vectors=vectors, max_tokens=max_tokens, temperature=0.0)
        return [row[len(ids) :] for row, ids in zip(written, asked, strict=True)]


def at_targets(model: GPT, batch: Mixed, inject: tuple[Tensor, Tensor] | None) -> Tensor:
    """Log-probabilities of all words where there is a target, (n, V) float32; nowhere else are logits computed."""
    hidden = model.hidden(batch.x, inject=inject)[batch.y >= 0]  # (n, D)
    return cap_logits(model.head(hidden).float(), model.config.softcap).log_softmax(-1)


def load_reader(
    model_tag: str, device: Any, step: int | None = None, dtype: str = "auto", kernels: str = "auto"
) -> tuple[Reader, dict[str, Any]]:
    """The reader that a run of refrag_finetune --mode compress saved, in eval mode -> (reader, meta)."""
    model, tokenizer, meta = load_model("refrag", device, model_tag, step, dtype=dtype, kernels=kernels)
    folder = checkpoint_dir("refrag", model_tag)
    state = (load_checkpoint(folder, meta["step"], want=("state",)).state or {}).get("caller", {})
    if "encoder" not in state:
        raise UserError(f"{folder} was not trained by refrag_finetune --mode compress: choose another --model_tag")
    reader = Reader.new(model, tokenizer, state["k"], state["encoder_layers"])
    reader.load_state(state)
    reader.encoder.eval()
    return reader, meta


def document_prompt(reader: Reader, title: str, text: str) -> Prompt:
    """A document alone, cut into the chunks it has in any prompt."""
    docs = {"type": "docs", "documents": [{"title": title, "text": text}]}
    said = {"role": "assistant", "content": ""}
    return reader.prompt({"messages": [{"role": "user", "content": [docs]}, said], "answers": []})


def build_cache(reader: Reader, kb: KnowledgeBase) -> VectorCache:
    """The vectors of all texts of a knowledge base, written beside it (cache_folder) and used by the reader."""
    found = (kb.snapshot.reader()(i) for i in range(kb.n_chunks))  # a reader each, for it keeps what it has read
    prompts = (document_prompt(reader, document.title, chunk.text) for document, chunk in found)
    cache = VectorCache(cache_folder(kb.path), reader.encoder)
    cache.build(p.chunk_ids(i) for p in prompts for i in range(len(p.chunks)))
    reader.cache = cache
    return cache
