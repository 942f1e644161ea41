"""Measures against hand-computed values, scikit-learn and the published definitions written out again."""

import collections
import math
import random
import re
import string

import numpy as np
import pytest

from nanochat.config import UserError
from nanochat.retrieval.metrics import (
    all_recall_at_k,
    cover_match,
    exact_match,
    f1,
    mean_interval,
    mrr_at_k,
    ndcg_at_k,
    normalize,
    paired_bootstrap,
    recall_at_k,
)


def slow_normalize(text: str) -> str:
    """SQuAD's definition, one step at a time and character by character."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def slow_f1(prediction: str, gold: str) -> float:
    """SQuAD's definition through precision and recall."""
    found, wanted = slow_normalize(prediction).split(), slow_normalize(gold).split()
    common = collections.Counter(found) & collections.Counter(wanted)
    if not found or not wanted:
        return float(found == wanted)
    if not common:
        return 0.0
    precision, recall = sum(common.values()) / len(found), sum(common.values()) / len(wanted)
    return 2 * precision * recall / (precision + recall)


def sentence(rng: random.Random) -> str:
    words = ["The", "a", "an", "cat", "Cat,", "sat", "U.S.", "theatre", "--", "42", "été", "", "!"]
    return rng.choice([" ", "  ", "\t"]).join(rng.choices(words, k=rng.randrange(6)))


def test_exact_match_and_f1_are_those_of_squad() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        prediction, golds = sentence(rng), [sentence(rng) for _ in range(rng.randrange(1, 4))]
        assert normalize(prediction) == slow_normalize(prediction)
        assert exact_match(prediction, golds) == max(slow_normalize(prediction) == slow_normalize(g) for g in golds)
        assert f1(prediction, golds) == pytest.approx(max(slow_f1(prediction, g) for g in golds), abs=1e-12)


@pytest.mark.parametrize(
    ("prediction", "answers", "em", "score"),
    [
        ("The Eiffel Tower!", ["eiffel tower"], 1, 1),
        ("in Paris, France", ["Paris"], 0, 2 * (1 / 3) * 1 / (1 / 3 + 1)),
        ("Paris Paris", ["Paris"], 0, 2 / 3),
        ("London", ["Paris", "London"], 1, 1),
        ("", ["Paris"], 0, 0),
        ("", [], 1, 1),
        ("Paris", [], 0, 0),
        ("yes it is", ["yes"], 0, 0),
        ("no", ["no man's land"], 0, 0),
        ("Yes.", ["yes"], 1, 1),
    ],
)
def test_answers_with_known_scores(prediction: str, answers: list[str], em: float, score: float) -> None:
    assert exact_match(prediction, answers) == em
    assert f1(prediction, answers) == pytest.approx(score)


def test_cover_match_wants_whole_words() -> None:
    assert cover_match("It is in Paris, the capital.", ["paris"]) == 1
    assert cover_match("Parisian", ["paris"]) == 0
    assert cover_match("anything", [""]) == 0
    assert cover_match("", []) == 1


def test_answers_given_as_one_text_are_refused() -> None:
    for measure in (exact_match, f1, cover_match):
        with pytest.raises(UserError, match=r"pass \['Paris'\]"):
            measure("Paris", "Paris")


def test_ranking_measures_by_hand() -> None:
    ranked, gold = ["a", "x", "b", "y", "c"], {"a", "b", "c", "missing"}
    assert [recall_at_k(ranked, gold, k) for k in (1, 3, 5, 9)] == [0.25, 0.5, 0.75, 0.75]
    assert [mrr_at_k(ranked, {"b", "c"}, k) for k in (2, 3)] == [0, 1 / 3]
    assert [all_recall_at_k(ranked, {"a", "b"}, k) for k in (2, 3)] == [0, 1]
    assert all_recall_at_k(ranked, gold, 9) == 0
    ideal = 1 + 1 / math.log2(3) + 1 / 2
    assert ndcg_at_k(ranked, {"a", "b", "c"}, 3) == pytest.approx((1 + 1 / 2) / ideal)
    assert ndcg_at_k(ranked, {"y": 2, "a": 1}, 5) == pytest.approx((1 + 2 / math.log2(5)) / (2 + 1 / math.log2(3)))


def test_ndcg_equals_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for _ in range(100):
        n, k = int(rng.integers(2, 30)), int(rng.integers(1, 35))
        grades = rng.integers(0, 4, n)
        grades[rng.integers(n)] = 3
        scores = rng.permutation(n)
        ranked = np.argsort(-scores).tolist()
        expected = metrics.ndcg_score(grades[None], scores[None], k=k)
        assert ndcg_at_k(ranked, dict(enumerate(grades.tolist())), k) == pytest.approx(expected)
        relevant = {i for i in range(n) if grades[i]}
        expected = metrics.ndcg_score((grades > 0)[None], scores[None], k=k)
        assert ndcg_at_k(ranked, relevant, k) == pytest.approx(expected)


def test_a_document_ranked_twice_counts_once() -> None:
    for measure in (recall_at_k, all_recall_at_k, mrr_at_k, ndcg_at_k):
        for k in (1, 2, 3):
            assert measure(["a", "a", "x", "a", "b"], {"a", "b"}, k) == measure(["a", "x", "b"], {"a", "b"}, k)


def test_without_relevant_documents_there_is_no_score() -> None:
    for measure in (recall_at_k, all_recall_at_k, mrr_at_k, ndcg_at_k):
        assert measure(["a"], set(), 5) is None
        assert measure([], {"a"}, 5) == 0
    assert ndcg_at_k(["a"], {"a": 0}, 5) is None


def test_interval_of_a_mean_is_that_of_the_normal_law() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, 2000)
    mean, low, high = mean_interval(values.tolist(), n=2000)
    half = 1.96 * values.std() / math.sqrt(2000)
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.1 * half)
    assert mean_interval([0.5] * 7) == (0.5, 0.5, 0.5)


def test_interval_does_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random(50).tolist()
    whole = mean_interval(values, n=1000)
    assert whole == mean_interval(values, n=1000)
    assert whole != mean_interval(values, n=1000, seed=1)
    monkeypatch.setattr("nanochat.retrieval.metrics._BATCH", 70)
    assert mean_interval(values, n=1000) == whole


def test_pairs_tell_systems_apart_where_single_means_cannot() -> None:
    rng = np.random.default_rng(0)
    hard = rng.random(300)  # difficulty of each question moves both systems
    a, b = hard + 0.02 + 0.01 * rng.standard_normal(300), hard
    mean, low, high = paired_bootstrap(a.tolist(), b.tolist(), n=2000)
    assert 0 < low < mean < high
    assert mean_interval(a.tolist(), n=2000)[1] < mean_interval(b.tolist(), n=2000)[2]
    assert paired_bootstrap(b.tolist(), a.tolist(), n=2000) == pytest.approx((-mean, -high, -low))


def test_values_that_give_no_mean_are_refused() -> None:
    with pytest.raises(UserError, match="at least one"):
        mean_interval([])
    with pytest.raises(UserError, match="is missing"):
        mean_interval([1.0, float("nan")])
    with pytest.raises(UserError, match="2 values against 1"):
        paired_bootstrap([1.0, 2.0], [1.0])
