"""What is claimed, and what ratios with intervals say of it. No measuring, no files: bench_claims.py measures.

A ratio is turned so that above 1 speaks for the claim. Its 95 % interval is Student's t over the logarithms of paired
seeds or repeats; over questions, a paired bootstrap. What follows from a formula alone (state, documents planned) has
none.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

# 97.5 % quantiles of Student's t with 1 .. 10 degrees of freedom; with more, the last is a little wide.
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
DRAWS = 2_000  # of the bootstrap
FIRST = "the first nanochat-turbo"
UNSTATED = "nobody with a number; it follows from a state that does not grow"


@dataclass(frozen=True)
class Claim:
    """What somebody stated. stated: so many times better at least; 1 = better at all.

    part, metric: where its values stand. kinds: the stacks it is about. against: the kind they are compared with.
    axis: what the values are a curve over. scale: what a value is divided by to be in its unit. computed: exact.
    """

    id: str
    text: str
    source: str
    part: str
    metric: str
    better: Literal["higher", "lower"]
    stated: float
    kinds: tuple[str, ...] = ("mamba", "mamba2", "hybrid")
    against: str = "attn"
    axis: str = "tokens"
    unit: str = ""
    scale: float = 1.0
    computed: bool = False


PURE, MIB = ("mamba", "mamba2"), 2.0**20
CLAIMS = (
    Claim("training_speed", "trains 3 to 5 times faster than a Transformer", f"{FIRST} (elsewhere +30 %, +10-20 %)",
          "length", "tokens_per_s", "higher", 3.0, unit="tokens/s"),
    Claim("training_speed_long", "trains faster than a Transformer at long contexts (slower at 2,048, faster at 8,192)",
          "Mamba's author, state-spaces/mamba issue 156", "length", "tokens_per_s", "higher", 1.0, unit="tokens/s"),
    Claim("training_memory", "halves the memory of training", f"{FIRST} (elsewhere -30-40 %)", "length", "peak_bytes",
          "lower", 2.0, unit="MiB over what was held before", scale=MIB),
    Claim("loss", "reaches a lower loss than a Transformer of its size", "arXiv 2312.00752 and 2406.07887 (hybrid)",
          "train", "bpb", "lower", 1.0, unit="bits per byte"),
    Claim("reading", "reads a prompt faster, its cost being linear in the length", "arXiv 2312.00752", "decode",
          "prefill_ms", "lower", 1.0, unit="ms"),
    Claim("decoding_one", "decodes a single conversation faster than a Transformer", UNSTATED, "decode", "decode_ms_1",
          "lower", 1.0, unit="ms a step"),
    Claim("decoding", "generates with 5 times the throughput of a Transformer", "arXiv 2312.00752", "decode",
          "decode_ms_8", "lower", 5.0, PURE, unit="ms a step of 8 rows"),
    Claim("decoding_hybrid", "generates up to 8 times faster than a Transformer", "arXiv 2406.07887 (predicted, 8B)",
          "decode", "decode_ms_8", "lower", 8.0, ("hybrid",), unit="ms a step of 8 rows"),
    Claim("state", "keeps a state 1,280 times smaller than a Transformer's cache", FIRST, "memory", "state_bytes",
          "lower", 1280.0, unit="MiB of a conversation", scale=MIB, computed=True),
    Claim("recall", "recalls fewer of many pairs than attention does", "Zoology, arXiv 2312.04927", "recall",
          "accuracy", "lower", 1.0, PURE, unit="accuracy"),
    Claim("recall_hybrid", "recalls more than the pure stack, thanks to its attention", "arXiv 2507.06457", "recall",
          "accuracy", "higher", 1.0, ("hybrid",), "mamba", unit="accuracy"),
    Claim("documents", "holds 3 times the documents of a Transformer (15-20 beside 3-5)", FIRST, "context", "fits",
          "higher", 3.0, PURE, axis="conversations", unit="documents", computed=True),
    Claim("documents_hybrid", "holds 1.6 times the documents of a Transformer (8-10 beside 3-5)", FIRST,
          "context", "fits", "higher", 1.6, ("hybrid",), axis="conversations", unit="documents", computed=True),
    Claim("documents_time", "gives the first token over many documents sooner", UNSTATED, "context", "ttft_ms", "lower",
          1.0, axis="documents", unit="ms"),
    Claim("documents_memory", "needs less memory to read many documents", f"{FIRST} (-50 %)", "context", "peak_bytes",
          "lower", 2.0, axis="documents", unit="MiB over the weights", scale=MIB),
    Claim("rag_accuracy", "with documents answers at least 20 % more questions right than without",
          f"{FIRST} (+20-25 %)", "rag", "accuracy", "higher", 1.2, ("rag",), "closed_book", "", "share of questions"),
    Claim("rag_hallucination", "with documents hallucinates at least 40 % less than without", f"{FIRST} (-40-50 %)",
          "rag", "hallucination", "lower", 1 / 0.6, ("rag",), "closed_book", "", "share of questions"),
    Claim("rag_hallucination_coverage", "hallucinates at least 40 % less where both answer equally many questions",
          f"{FIRST} (-40-50 %)", "rag", "hallucination_equal", "lower", 1 / 0.6, ("rag",), "closed_book", "",
          "share of questions"),
)  # fmt: skip


# ---- ratios ----


@dataclass(frozen=True)
class Ratio:
    """How many times better, with a 95 % interval; low and high are None where one pair was measured."""

    value: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        if self.low is None or self.low == self.high:
            return f"{number(self.value)}x"
        return f"{number(self.value)}x [{number(self.low)}, {number(self.high or 0.0)}]"


def number(x: float) -> str:
    """Three digits: 0.95, 1.96, 14.9, 1,638; four next to 1, where they tell."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.3f}" if 0.9 < x < 1.1 else f"{x:.2f}"


def paired_ratio(first: Sequence[float], other: Sequence[float], better: str) -> Ratio:
    """Geometric mean of how many times better `other` is, pair by pair. Values below 1e-9 count as that."""
    sign = 1 if better == "higher" else -1
    pairs = zip(first, other, strict=True)
    logs = [sign * (math.log(max(b, 1e-9)) - math.log(max(a, 1e-9))) for a, b in pairs]
    middle = statistics.fmean(logs)
    if len(logs) == 1:
        return Ratio(math.exp(middle), None, None)
    half = T975[min(len(logs) - 1, len(T975)) - 1] * statistics.stdev(logs) / math.sqrt(len(logs))
    return Ratio(math.exp(middle), math.exp(middle - half), math.exp(middle + half))


def question_ratio(first: Sequence[float], other: Sequence[float], better: str, seed: int = 0) -> Ratio:
    """The same of two shares over the same questions (0 or 1 each). Half a question is added to both counts, so that a
    share of none gives a number."""
    a, b = np.asarray(first, np.float64), np.asarray(other, np.float64)  # (M,)
    assert a.shape == b.shape and a.ndim == 1 and len(a), (a.shape, b.shape)
    if better == "lower":
        a, b = b, a
    rows = np.random.default_rng(seed).integers(0, len(a), (DRAWS, len(a)))
    low, high = np.percentile((b[rows].sum(1) + 0.5) / (a[rows].sum(1) + 0.5), [2.5, 97.5])
    return Ratio(float((b.sum() + 0.5) / (a.sum() + 0.5)), float(low), float(high))


# ---- verdicts ----


@dataclass(frozen=True)
class Point:
    """A ratio at a length (or a number of documents, or of conversations)."""

    at: float
    ratio: Ratio


@dataclass(frozen=True)
class Verdict:
    """word: one of WORDS, "one run" or "not measured". text: the same with the lengths it is true of."""

    word: str
    text: str


WORDS = ("does not hold", "no difference seen", "better, but less than stated", "holds")


def level(ratio: Ratio, stated: float) -> int:
    """Place in WORDS of one ratio with an interval."""
    assert stated >= 1 and ratio.low is not None and ratio.high is not None
    if ratio.low <= 1 <= ratio.high:
        return 1
    if ratio.high < 1:
        return 0
    return 3 if ratio.low >= stated else 2


def verdict(points: Sequence[Point], stated: float, axis: str) -> Verdict:
    """What the longest length says, and from which length on all say so. points: by rising length."""
    if not points:
        return Verdict("not measured", "not measured")
    if any(p.ratio.low is None for p in points):
        return Verdict("one run", "one run, which has no interval: not judged")
    levels = [level(p.ratio, stated) for p in points]
    last = levels[-1]
    fits = [at >= last if last >= 2 else at == last for at in levels]
    since = len(points) - next((i for i, fit in enumerate(reversed(fits)) if not fit), len(points))
    word = WORDS[last]
    if last == 2 and (points[-1].ratio.high or 0.0) >= stated:
        word = f"better, {number(stated)}x neither shown nor excluded"
    text = word + _where(points, since, axis)
    if earlier := [f"{p.at:,.0f}" for p, at in zip(points, levels, strict=True) if at > last and at >= 2]:
        text += f" (but better at {', '.join(earlier)})" if last < 2 else f" (as stated at {', '.join(earlier)})"
    return Verdict(WORDS[last], text)


def _where(points: Sequence[Point], since: int, axis: str) -> str:
    if not axis:
        return ""
    if len(points) == 1 or since == len(points) - 1:
        return f" at {points[-1].at:,.0f} {axis}"
    every = ", everywhere measured" if since == 0 else ""
    return f" from {points[since].at:,.0f} {axis} on{every}"
