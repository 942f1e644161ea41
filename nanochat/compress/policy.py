"""Which chunks of a prompt stay tokens: a network that scores them, and the rules it is compared with.

The network sees the question (the paper's does not, arXiv 2509.01092 section 2.3) and features of each chunk. A choice
of n is drawn without replacement from the softmax of the scores, which are not computed anew between picks: that is the
Plackett-Luce distribution, sampled by adding Gumbel noise and taking the n largest (Kool et al., arXiv 1903.06059).

Scores start as the BM25 feature's, so learning starts from the best rule that needs no training.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import rustbpe
import torch
import torch.nn as nn
from torch import Tensor

from nanochat.compress.chunks import Prompt

FEATURES = ("bm25", "bm25 without title", "cosine", "first of its document", "length")
RULES = ("random", "first", "bm25", "cosine", "oracle")
BM25_WEIGHT = 4.0  # of the feature, which is 1 for the best chunk of a context


class Policy(nn.Module):
    """A two-layer transformer over [question; chunks] -> a score for each chunk."""

    def __init__(self, d_model: int, width: int = 64, n_head: int = 4) -> None:
        super().__init__()
        self.question, self.chunk = nn.Linear(d_model, width), nn.Linear(d_model, width)
        self.features = nn.Linear(len(FEATURES), width)
        layer = nn.TransformerEncoderLayer(width, n_head, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.mixer = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.score = nn.Linear(width, 1)
        self.weights = nn.Parameter(torch.zeros(len(FEATURES)))
        with torch.no_grad():
            self.weights[FEATURES.index("bm25")] = BM25_WEIGHT
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def forward(self, question: Tensor, chunks: Tensor, features: Tensor, valid: Tensor) -> Tensor:
        """question (B, D), chunks (B, L, D), features (B, L, F), valid (B, L) -> (B, L), -inf where not valid."""
        q, c = self.question(question)[:, None], self.chunk(chunks)  # (B, 1, width), (B, L, width)
        x = torch.cat((q, c + c * q + self.features(features)), 1)  # (B, 1 + L, width)
        pads = ~torch.cat((torch.ones_like(valid[:, :1]), valid), 1)
        x = self.mixer(x, src_key_padding_mask=pads)[:, 1:]
        scores = self.score(x).squeeze(-1) + features @ self.weights
        return scores.masked_fill(~valid, -torch.inf)


def sample(scores: Tensor, counts: Tensor, n_sample: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw n_sample choices of counts (B,) chunks each from scores (B, L) -> (B, n_sample, max count), -1 = no pick."""
    B, L = scores.shape
    uniform = torch.rand(B, n_sample, L, generator=generator).to(scores.device).clamp_min(1e-12)
    return _largest(scores[:, None] - (-uniform.log()).log(), counts)


def best(scores: Tensor, counts: Tensor) -> Tensor:
    """The counts (B,) chunks of the highest scores (B, L) -> (B, max count), -1 = no pick."""
    return _largest(scores[:, None], counts)[:, 0]


def _largest(keys: Tensor, counts: Tensor) -> Tensor:
    """keys (B, G, L) -> the places of the counts (B,) largest, falling, (B, G, max count)."""
    counts = counts.to(keys.device)
    picks = keys.topk(int(counts.max()), -1).indices
    return picks.masked_fill(torch.arange(picks.size(-1), device=keys.device) >= counts[:, None, None], -1)


def log_prob(scores: Tensor, picks: Tensor) -> Tensor:
    """log p of choices in their order: scores (B, L), picks (B, G, n), -1 = no pick -> (B, G).

    sum_t [s_{l_t} - logsumexp of the scores not chosen before t].
    """
    left = scores[:, None].expand(-1, picks.size(1), -1)  # (B, G, L)
    total = torch.zeros(picks.shape[:2], device=scores.device)
    for t in range(picks.size(2)):
        pick = picks[:, :, t, None]  # (B, G, 1)
        there = pick.squeeze(-1) >= 0
        pick = pick.clamp_min(0)
        step = left.gather(-1, pick).squeeze(-1) - left.logsumexp(-1)
        total = total + torch.where(there, step, 0.0)
        left = torch.where(there[..., None], left.scatter(-1, pick, -torch.inf), left)
    return total


def entropy(scores: Tensor) -> Tensor:
    """Of the first pick, (B, L) -> (B,)."""
    logp = scores.log_softmax(-1)
    return -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0)).sum(-1)


def n_expanded(n_chunks: int, p: float) -> int:
    """How many of them a share p is: none or all where p says so, else at least one."""
    return 0 if p <= 0 else min(n_chunks, max(1, round(p * n_chunks)))


# ---- features and rules ----


def bm25(question: str, texts: Sequence[str], k1: float = 1.5, b: float = 0.75) -> np.ndarray:
    """Lucene's BM25 of the texts for the question, statistics over these texts -> (L,), the best 1 (or all 0)."""
    asked, *terms = rustbpe.terms([question, *texts], True, True)
    lengths = np.array([len(t) for t in terms], float)
    scores = np.zeros(len(texts))
    norm = k1 * (1 - b + b * lengths / max(1.0, lengths.mean()))
    for term in set(asked):
        tf = np.array([t.count(term) for t in terms], float)
        df = np.count_nonzero(tf)
        scores += np.log1p((len(texts) - df + 0.5) / (df + 0.5)) * tf / (tf + norm)
    return scores / (scores.max() or 1.0)


def chunk_features(prompt: Prompt, tokenizer: Any, cosine: np.ndarray, k: int) -> np.ndarray:
    """(L, len(FEATURES)) float32; cosine (L,): of question and chunk vectors."""
    titles = [tokenizer.decode(prompt.ids[c.title : c.body], errors="replace") for c in prompt.chunks]
    texts = [tokenizer.decode(prompt.chunk_ids(i), errors="replace") for i in range(len(titles))]
    titled = bm25(prompt.question, [f"{title} {text}" for title, text in zip(titles, texts, strict=True)])
    return np.stack(
        [
            titled,
            bm25(prompt.question, texts),
            cosine,
            [float(c.start == c.body) for c in prompt.chunks],
            [(c.end - c.start) / k for c in prompt.chunks],
        ],
        axis=1,
    ).astype(np.float32)


def rule_scores(name: str, prompt: Prompt, features: np.ndarray, seed: int) -> np.ndarray:
    """(L,) scores of one of RULES; equal ones keep the prompt's order. The oracle takes `gold`, then BM25's."""
    n = len(prompt.chunks)
    if name == "random":
        return np.random.default_rng(seed).random(n)
    if name == "first":
        return -np.arange(n, dtype=float)
    scores = features[:, FEATURES.index("cosine" if name == "cosine" else "bm25")].astype(float)
    if name == "oracle":
        scores[list(prompt.gold)] += 2.0
    return scores - 1e-6 * np.arange(n)
