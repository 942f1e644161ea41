"""Maximal marginal relevance: hits that are relevant and unlike those already chosen (Carbonell & Goldstein 1998).

Each step takes the hit with the largest  weight * relevance - (1 - weight) * similarity to the nearest chosen hit.
Relevance is the score scaled to 0..1 over the hits, so that it weighs as much as a similarity whatever retriever
scored. weight 1 keeps the order of the scores.
"""

from collections.abc import Sequence

import numpy as np

from nanochat.config import UserError


def mmr(
    items: np.ndarray | Sequence[set[str]], scores: Sequence[float] | np.ndarray, weight: float, k: int
) -> list[int]:
    """-> up to k positions in `items`, first choice first; of equals the earlier.

    items: (n, d) vectors of length 1 (similarity: their product), or n sets of terms (similarity: Jaccard's).
    """
    if not 0 <= weight <= 1:
        raise UserError(f"mmr={weight}: expected 0 (only unlike hits) to 1 (only the best hits)")
    relevance = scaled(np.asarray(scores, np.float32))
    assert len(items) == len(relevance), f"{len(items)} items, {len(relevance)} scores"
    left, chosen = np.ones(len(relevance), bool), []
    nearest = np.zeros(len(relevance), np.float32)  # similarity to the nearest chosen one
    for _ in range(min(k, len(relevance))):
        gain = np.where(left, weight * relevance - (1 - weight) * nearest, -np.inf)
        best = int(gain.argmax())
        chosen.append(best)
        left[best] = False
        similar = similarity_to(items, best)
        nearest = similar if len(chosen) == 1 else np.maximum(nearest, similar)
    return chosen


def similarity_to(items: np.ndarray | Sequence[set[str]], i: int) -> np.ndarray:
    """Of every item to item i -> (n,) float32."""
    if isinstance(items, np.ndarray):
        return (items * items[i]).sum(1, dtype=np.float32)
    own = items[i]
    return np.array([len(own & other) / max(1, len(own | other)) for other in items], np.float32)


def scaled(scores: np.ndarray) -> np.ndarray:
    """(n,) -> the same between 0 and 1; all 1 where they are equal."""
    if not len(scores):
        return scores
    low, high = scores.min(), scores.max()
    return (scores - low) / (high - low) if high > low else np.ones_like(scores)
