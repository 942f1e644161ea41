"""Two rankings made one: BM25 finds the words, dense vectors what is meant.

"convex": weight * dense + (1 - weight) * bm25, each scaled to 0..1 over its candidates of that query (Bruch et al.,
arXiv 2210.11934, section 3: a convex combination beats reciprocal ranks and hardly depends on its weight). A chunk that
only one side found counts 0 on the other.
"rrf": the sum of 1 / (rrf_k + rank) (Cormack et al. 2009), where scores cannot be trusted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from nanochat.config import UserError
from nanochat.retrieval.contract import NO_HIT, Base, Ranking
from nanochat.retrieval.mmr import scaled
from nanochat.retrieval.options import read_options

# Chosen by nDCG@10 on HotpotQA-500, 2Wiki, Vaswani and SQuAD themselves. Static: 0.3 gives a mean of .703 and beats
# BM25 (.686) on each; 0.5 gives .702 and loses on two. MiniLM (HotpotQA-500 alone): .818 at 0.3, .824 at 0.5.
STATIC_WEIGHT, WEIGHT = 0.3, 0.5


@dataclass(frozen=True)
class HybridOptions:
    weight: float | None = None  # of dense, 0..1; None = STATIC_WEIGHT with the static encoder, else WEIGHT
    fusion: Literal["convex", "rrf"] = "convex"
    rrf_k: float = 60.0
    candidates: int = 0  # taken from each side; 0 = max(4 k, 100)

    def __post_init__(self) -> None:
        if self.weight is not None and not 0 <= self.weight <= 1:
            raise UserError(f"hybrid: weight={self.weight}: expected 0 (only bm25) to 1 (only dense)")
        if self.rrf_k < 0 or self.candidates < 0:
            raise UserError(f"hybrid: rrf_k={self.rrf_k} and candidates={self.candidates} cannot be negative")


class HybridRetriever:
    name = "hybrid"
    needs: ClassVar[tuple[str, ...]] = ("bm25", "dense")

    def __init__(self, base: Base, options: dict[str, Any] | None = None) -> None:
        self.base, self.options = base, read_options(HybridOptions, options or {}, "hybrid")

    def search(self, queries: Sequence[str], k: int, allowed: np.ndarray | None = None) -> Ranking:
        """A chunk's score depends on which candidates it stands among, so on k (where 4 k > 100) and on `allowed`."""
        o, n = self.options, max(self.options.candidates or max(4 * k, 100), k)
        rankings = [self.base.retriever(name).search(queries, n, allowed) for name in self.needs]
        weight = self.weight()
        if o.fusion == "rrf":
            parts = [[(ids, 1 / (o.rrf_k + 1 + np.arange(len(ids)))) for ids, _ in hits(r)] for r in rankings]
        else:
            shares = zip(rankings, (1 - weight, weight), strict=True)
            parts = [[(ids, share * scaled(scores)) for ids, scores in hits(r)] for r, share in shares]
        return fuse(parts, k)

    def weight(self) -> float:
        if self.options.weight is not None:
            return self.options.weight
        return STATIC_WEIGHT if self.base.options("dense").get("encoder") == "static" else WEIGHT


def hits(ranking: Ranking) -> list[tuple[np.ndarray, np.ndarray]]:
    """-> ids and scores of each query, without the NO_HITs."""
    return [(i[i != NO_HIT], s[i != NO_HIT]) for i, s in zip(ranking.ids, ranking.scores, strict=True)]


def fuse(parts: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]], k: int) -> Ranking:
    """parts[side][query] = (ids, what the side adds to their scores) -> the k best sums of each query."""
    M = len(parts[0])
    ids, scores = np.full((M, k), NO_HIT, np.int64), np.full((M, k), -np.inf, np.float32)
    for m, sides in enumerate(zip(*parts, strict=True)):
        found, where = np.unique(np.concatenate([i for i, _ in sides]), return_inverse=True)
        total = np.bincount(where, np.concatenate([s for _, s in sides]), len(found)).astype(np.float32)
        best = np.lexsort((found, -total))[:k]
        ids[m, : len(best)], scores[m, : len(best)] = found[best], total[best]
    return Ranking(ids, scores)
