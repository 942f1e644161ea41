"""How good an answer or a ranking is, and how sure we may be of the mean.

Answers: exact match and F1 with the normalisation of SQuAD (1606.05250, section 6.1), the best over all gold answers.
Rankings: `ranked` holds document ids, best first; what stands there twice counts once, at its first place. Every
measure of a ranking is None where no document is relevant: the caller leaves that question out of the mean, and says
how many there were.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence

import numpy as np

from nanochat.config import UserError

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_VERDICTS = frozenset({"yes", "no", "noanswer"})
_BATCH = 4_000_000  # draws of the bootstrap held at once: 32 MB


def normalize(text: str) -> str:
    """'The  Eiffel Tower!' -> 'eiffel tower': lower case, no ASCII punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Iterable[str]) -> float:
    """1.0 where the prediction equals one of the answers, both normalised. No answers: 1.0 for an empty prediction."""
    return float(normalize(prediction) in _golds(answers))


def cover_match(prediction: str, answers: Iterable[str]) -> float:
    """1.0 where one of the answers stands in the prediction as whole words. It favours long predictions: report their
    length beside it."""
    words = f" {normalize(prediction)} "
    return float(any(f" {gold} " in words if gold else not words.strip() for gold in _golds(answers)))


def f1(prediction: str, answers: Iterable[str]) -> float:
    """Harmonic mean of precision and recall over the words both have in common, 0 .. 1, the best over the answers.

    As in HotpotQA (1809.09600), "yes", "no" and "noanswer" share nothing with any other answer.
    """
    return max(_f1(normalize(prediction), gold) for gold in _golds(answers))


def _golds(answers: Iterable[str]) -> set[str]:
    """Without any (a question that has no answer) the empty one is gold, as in SQuAD 2.0."""
    if isinstance(answers, str):
        raise UserError(f"answers is the text {answers!r}, expected a list: pass [{answers!r}]")
    return {normalize(a) for a in answers} or {""}


def _f1(prediction: str, gold: str) -> float:
    if prediction == gold:
        return 1.0
    if prediction in _VERDICTS or gold in _VERDICTS:
        return 0.0
    words, gold_words = prediction.split(), gold.split()
    same = (Counter(words) & Counter(gold_words)).total()
    return 2 * same / (len(words) + len(gold_words))


def recall_at_k(ranked: Iterable[Hashable], gold: Collection[Hashable], k: int) -> float | None:
    """Share of the relevant documents among the first k."""
    return len(set(_top(ranked, k)) & set(gold)) / len(set(gold)) if gold else None


def all_recall_at_k(ranked: Iterable[Hashable], gold: Collection[Hashable], k: int) -> float | None:
    """1.0 where every relevant document is among the first k: what a multi-hop question needs."""
    return float(set(gold) <= set(_top(ranked, k))) if gold else None


def mrr_at_k(ranked: Iterable[Hashable], gold: Collection[Hashable], k: int) -> float | None:
    """1 / rank of the first relevant document, 0.0 where it is not among the first k."""
    if not gold:
        return None
    return next((1 / rank for rank, id in enumerate(_top(ranked, k), 1) if id in gold), 0.0)


def ndcg_at_k(
    ranked: Iterable[Hashable], relevance: Collection[Hashable] | Mapping[Hashable, float], k: int
) -> float | None:
    """Discounted gain over that of the best possible ranking. relevance: ids, or their grades (gain = grade, >= 0).

    Gain grade / log2(rank + 1) as in trec_eval and scikit-learn; papers that take 2^grade - 1 agree on grades 0 and 1.
    """
    grades = relevance if isinstance(relevance, Mapping) else dict.fromkeys(relevance, 1.0)
    best = _discounted(sorted(grades.values(), reverse=True)[:k])
    if best == 0:
        return None
    return _discounted([grades.get(id, 0.0) for id in _top(ranked, k)]) / best


def mean_interval(values: Sequence[float], n: int = 10_000, seed: int = 0) -> tuple[float, float, float]:
    """-> (mean, low, high): the 95 % percentile interval of the mean over n bootstrap samples (Efron 1979)."""
    x = np.asarray(values, dtype=np.float64)  # (M,)
    if x.ndim != 1 or len(x) == 0:
        raise UserError(f"values of shape {x.shape}: expected a list of one number per question, at least one")
    if not np.isfinite(x).all():
        raise UserError("a value is missing (NaN, None or infinite): leave such questions out first, and count them")
    rng = np.random.default_rng(seed)
    rows = max(1, _BATCH // len(x))
    means = [x[rng.integers(0, len(x), (min(rows, n - done), len(x)))].mean(1) for done in range(0, n, rows)]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(x.mean()), float(low), float(high)


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], n: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """-> (mean of a - b, low, high), a and b over the same questions in the same order. An interval without 0 says that
    a and b differ (95 %)."""
    if len(a) != len(b):
        raise UserError(f"{len(a)} values against {len(b)}: expected both systems on the same questions")
    return mean_interval(np.subtract(np.asarray(a, np.float64), np.asarray(b, np.float64)).tolist(), n, seed)


def _top(ranked: Iterable[Hashable], k: int) -> list[Hashable]:
    assert k >= 1, k
    return list(dict.fromkeys(ranked))[:k]


def _discounted(gains: Sequence[float]) -> float:
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, 1))
