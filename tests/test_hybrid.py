"""Fusion by hand and maximal marginal relevance against its definition."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.config import UserError
from nanochat.retrieval.contract import NO_HIT, Ranking
from nanochat.retrieval.hybrid import HybridRetriever
from nanochat.retrieval.mmr import mmr


class Fixed:
    """A retriever with one answer: {chunk: score}."""

    def __init__(self, scores: dict[int, float]) -> None:
        self.ranked = sorted(scores.items(), key=lambda p: (-p[1], p[0]))

    def search(self, queries, k, allowed=None) -> Ranking:
        hits = [(i, s) for i, s in self.ranked if allowed is None or allowed[i]][:k]
        ids, scores = np.full((len(queries), k), NO_HIT), np.full((len(queries), k), -np.inf, np.float32)
        for j, (i, s) in enumerate(hits):
            ids[:, j], scores[:, j] = i, s
        return Ranking(ids, scores)


class TwoRetrievers:
    n_chunks = 20

    def __init__(self, bm25: dict[int, float], dense: dict[int, float], encoder: str = "a-model") -> None:
        self.encoder = encoder
        self.by_name = {"bm25": Fixed(bm25), "dense": Fixed(dense)}

    def retriever(self, name: str) -> Fixed:
        return self.by_name[name]

    def options(self, index: str) -> dict[str, str]:
        return {"encoder": self.encoder}


BASE = TwoRetrievers({3: 10.0, 1: 6.0, 7: 2.0}, {1: 0.9, 4: 0.5, 3: 0.1})


def test_convex_adds_scores_scaled_to_one() -> None:
    found = HybridRetriever(BASE).search(["a", "b"], 5)
    # bm25: 3 -> 1, 1 -> .5, 7 -> 0; dense: 1 -> 1, 4 -> .5, 3 -> 0
    assert found.ids.tolist() == [[1, 3, 4, 7, NO_HIT]] * 2
    np.testing.assert_allclose(found.scores[0], [0.75, 0.5, 0.25, 0, -np.inf], rtol=1e-6)
    quarter = HybridRetriever(BASE, {"weight": 0.25}).search(["a"], 2)
    np.testing.assert_allclose(quarter.scores[0], [0.75, 0.625], rtol=1e-6)
    assert quarter.ids.tolist() == [[3, 1]]
    static = HybridRetriever(TwoRetrievers({3: 10.0, 1: 6.0}, {1: 0.9, 4: 0.5}, "static")).search(["a"], 2)
    np.testing.assert_allclose(static.scores[0], [0.7, 0.3], rtol=1e-6)


def test_reciprocal_ranks_add_up() -> None:
    found = HybridRetriever(BASE, {"fusion": "rrf"}).search(["a"], 4)
    assert found.ids.tolist() == [[1, 3, 4, 7]]
    np.testing.assert_allclose(found.scores[0], [1 / 62 + 1 / 61, 1 / 61 + 1 / 63, 1 / 62, 1 / 63], rtol=1e-6)
    assert HybridRetriever(BASE, {"fusion": "rrf", "rrf_k": 1}).search(["a"], 1).scores[0, 0] == pytest.approx(5 / 6)


@pytest.mark.parametrize(("weight", "first"), [(0.0, [3, 1]), (1.0, [1, 4])])
def test_the_ends_of_the_weight_are_the_retrievers_themselves(weight: float, first: list[int]) -> None:
    assert HybridRetriever(BASE, {"weight": weight}).search(["a"], 2).ids.tolist() == [first]


def test_one_side_may_find_nothing_and_filters_hold() -> None:
    found = HybridRetriever(TwoRetrievers({}, {4: 0.5})).search(["a"], 3)
    assert found.ids.tolist() == [[4, NO_HIT, NO_HIT]]
    assert (HybridRetriever(TwoRetrievers({}, {})).search(["a"], 3).ids == NO_HIT).all()
    allowed = np.ones(20, bool)
    allowed[[1, 3]] = False
    assert set(HybridRetriever(BASE).search(["a"], 3, allowed).ids[0]) == {4, 7, NO_HIT}
    assert HybridRetriever(BASE).search([], 3).ids.shape == (0, 3)


def test_equal_scores_come_in_order() -> None:
    base = TwoRetrievers(dict.fromkeys((9, 5, 2), 1.0), dict.fromkeys((9, 5, 2), 0.3))
    assert HybridRetriever(base).search(["a"], 3).ids.tolist() == [[2, 5, 9]]


def test_wrong_options_are_named() -> None:
    for options, message in (
        ({"weight": 1.5}, "weight=1.5"),
        ({"wieght": 0.5}, "did you mean 'weight'"),
        ({"fusion": "sum"}, "fusion = 'sum'"),
        ({"candidates": -1}, "cannot be negative"),
    ):
        with pytest.raises(UserError, match=message):
            HybridRetriever(BASE, options)


# ---- maximal marginal relevance ----


def plain_mmr(similarity: np.ndarray, scores: np.ndarray, weight: float, k: int) -> list[int]:
    span = scores.max() - scores.min()
    relevance = (scores - scores.min()) / span if span > 0 else np.ones(len(scores))
    chosen: list[int] = []
    while len(chosen) < min(k, len(scores)):
        left = [i for i in range(len(scores)) if i not in chosen]
        gain = [weight * relevance[i] - (1 - weight) * max([similarity[i, j] for j in chosen], default=0) for i in left]
        chosen.append(left[int(np.argmax(gain))])
    return chosen


@given(st.integers(1, 12), st.floats(0.05, 1), st.integers(0, 1000))
def test_mmr_follows_its_definition(n: int, weight: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((n, 5)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    scores = rng.standard_normal(n).astype(np.float32)
    assert mmr(vectors, scores, weight, 6) == plain_mmr(vectors @ vectors.T, scores, weight, 6)


def test_mmr_skips_what_repeats_a_chosen_hit() -> None:
    sets = [{"a", "b"}, {"a", "b"}, {"c"}]
    assert mmr(sets, [1.0, 0.9, 0.5], 1.0, 3) == [0, 1, 2]
    assert mmr(sets, [1.0, 0.9, 0.0], 0.5, 2) == [0, 2]
    assert mmr([], [], 0.5, 3) == []
    assert mmr([set(), set()], [1.0, 1.0], 0.5, 2) == [0, 1]
    with pytest.raises(UserError, match="mmr=2"):
        mmr(sets, [1.0, 0.9, 0.0], 2, 2)
