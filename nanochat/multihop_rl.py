"""Reinforcement learning of search: what a trajectory of searches is worth, and which questions are asked when.

    judge = make_judge(rows, tokenizer, tool, "em")
    actor = make_actor(model, tokenizer, tool, rows, judge, Sampling(num_samples=8))

REWARDS, by name (EM and F1 as SQuAD counts; abstaining is the right answer to a question without one):

em       1 for right, 0.8 where the format is bad, 0.2 for wrong in a good format, 0 otherwise (Search-R1, 2503.09516,
         qa_em_format.py)
f1       the same with F1 between
ternary  1 for right (0.8 where the format is bad), 0 for abstaining, -1 for wrong (TruthRL, 2509.25760)

A good format: every query closed by the policy within its budget, none blank, documents cited that were shown, then a
text or the token that abstains. A void trajectory, one that ends without either, is left out of the loss (SimpleTIR,
2509.02479). Of what was retrieved nothing is rewarded: 2505.15117 found no use in it.
"""

import math
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from nanochat.config import UserError
from nanochat.device import Ranks
from nanochat.engine import Engine
from nanochat.rag import parse, question_conversation
from nanochat.retrieval.metrics import exact_match, f1
from nanochat.rl import Actor, Judge, Order, Sampling, Trajectory, Verdict, well_formed
from nanochat.tools import Tool, search

Row = Mapping[str, Any]
FIGURES = ("searches", "hops", "abstained", "void")  # of Verdict.figures
QUERY_TOKENS = 64  # of one query
NO_ANSWER = 0  # stands for a number of hops: of questions without an answer
COST_FROM = 0.7  # share of right answers from which on needless searches cost (after AutoSearch)


@dataclass(frozen=True)
class Outcome:
    """What a trajectory comes to. searches: calls made, those past the limit included."""

    text: str
    citations: tuple[int, ...]
    abstained: bool
    valid: bool
    searches: int

    @property
    def void(self) -> bool:
        return not (self.text or self.abstained)

    def score(self, row: Row, metric: Callable[[str, Sequence[str]], float] = exact_match) -> float:
        """0 .. 1; of a question without an answer 1 for abstaining."""
        if not row["answerable"]:
            return float(self.abstained)
        return 0.0 if self.abstained or self.void else metric(self.text, row["answers"])


def outcome(trajectory: Trajectory, tokenizer: Any, tool: Tool) -> Outcome:
    """Read a trajectory of a model that has this search tool alone."""
    ids = trajectory.ids[trajectory.n_prompt : len(trajectory.ids) - trajectory.ended]
    text, citations, abstained, sound = parse(ids, tokenizer)
    shown = trajectory.ids.count(tokenizer.encode_special("<|doc|>"))
    asked = all(call.query.strip() for call in trajectory.trace)
    cited = all(n <= shown for n in citations)
    valid = sound and asked and cited and well_formed(trajectory, {tool.start: tool})
    return Outcome(text, citations, abstained, valid, len(trajectory.trace))


def _graded(score: float, valid: bool) -> float:
    return 0.2 * valid + 0.8 * score


REWARDS: dict[str, Callable[[Outcome, Row], float]] = {
    "em": lambda o, row: _graded(o.score(row), o.valid),
    "f1": lambda o, row: _graded(o.score(row, f1), o.valid),
    "ternary": lambda o, row: _graded(1.0, o.valid) if o.score(row) else -float(not o.abstained),
}


@dataclass
class Cost:
    """What a search beyond the steps of the question costs; nothing until `active`."""

    each: float = 0.0
    active: bool = False

    def of(self, o: Outcome, row: Row) -> float:
        return self.each * max(0, o.searches - n_hops(row)) if self.active else 0.0


def n_hops(row: Row) -> int:
    return max(1, len(row.get("hops") or ()))


def make_judge(
    rows: Sequence[Row], tokenizer: Any, tool: Tool, reward: str, truncated: str = "mask", cost: Cost | None = None
) -> Judge:
    """Trajectory i answers rows[i]. truncated: what was cut is left out ("mask"), or judged as invalid ("zero")."""
    worth, cost = REWARDS[reward], cost or Cost()

    def judge(trajectory: Trajectory) -> Verdict:
        row = rows[trajectory.example]
        o = (
            outcome(trajectory, tokenizer, tool)
            if trajectory.ended
            else Outcome("", (), False, False, len(trajectory.trace))
        )
        masked = o.void if trajectory.ended else truncated == "mask"
        figures = dict(
            zip(FIGURES, map(float, (o.searches, n_hops(row), o.abstained, trajectory.ended and o.void)), strict=True)
        )
        return Verdict(worth(o, row) - cost.of(o, row), o.score(row) == 1.0, o.valid, masked, figures)

    return judge


def make_actor(model: Any, tokenizer: Any, tool: Tool, rows: Sequence[Row], judge: Judge, sampling: Sampling) -> Actor:
    """The model answering these rows with the search tool and no other."""

    def prompt(i: int) -> list[int]:
        return tokenizer.render_for_completion(question_conversation(rows[i]["question"], []))

    return Actor(Engine(model, tokenizer, [tool]), prompt, judge, sampling)


# ---- what is searched ----


def make_tool(
    tokenizer: Any, kb: Any, top_k: int, max_doc_length: int, max_searches: int, retriever: str | None = None,
    corpus: float = 1.0, always: Collection[str] = (),
) -> Tool:  # fmt: skip
    """The search tool over a knowledge base. corpus: share of its documents that are found, by the checksum of their
    ids, beside those in `always`: a smaller corpus is an easier one."""

    def kept(id: str) -> bool:
        return id in always or zlib.crc32(id.encode()) < corpus * 2**32

    def retrieve(queries: list[str], k: int) -> list[list[Any]]:
        if corpus >= 1:
            return kb.search(queries, k=k, retriever=retriever)
        found = kb.search(queries, k=math.ceil(4 * k / corpus), retriever=retriever)
        return [[hit for hit in hits if kept(hit.document.id)][:k] for hits in found]

    return search(tokenizer, retrieve, top_k, top_k * max_doc_length, max_searches, QUERY_TOKENS)


def gold_ids(rows: Sequence[Row]) -> frozenset[str]:
    """The documents any step of these questions may rest on."""
    return frozenset(id for row in rows for hop in row.get("hops") or [row] for id in hop["gold_ids"])


# ---- which questions are asked when ----


@dataclass(frozen=True)
class Level:
    """Questions of so many hops make half of what is asked, documents of a search, share of the corpus searched."""

    hops: int
    top_k: int
    corpus: float = 1.0


def parse_levels(given: Sequence[Any] | None, max_hops: int, top_k: int) -> list[Level]:
    """Levels from "HOPS:DOCUMENTS:CORPUS", the last two optional; none given: by hops alone, from two. UserError."""
    if not given:
        return [Level(hops, top_k) for hops in range(min(2, max_hops), max_hops + 1)]
    levels = []
    for text in map(str, given):
        hops, k, corpus, *rest = [*text.split(":"), "", ""]
        try:
            level = Level(int(hops), int(k or top_k), float(corpus or 1))
        except ValueError:
            level = Level(0, 0)
        if any(rest) or not (1 <= level.hops <= max_hops and level.top_k >= 1 and 0 < level.corpus <= 1):
            raise UserError(
                f"curriculum level {text!r}: expected HOPS:DOCUMENTS:CORPUS, hops 1..{max_hops}, documents of a "
                f"search, share of the corpus up to 1, as 2:1:0.1"
            )
        levels.append(level)
    return levels


@dataclass
class Curriculum:
    """Goes on to the next level where enough answers are right, or when a level's share of the run is over."""

    levels: list[Level]
    advance_at: float = 0.8
    decay: float = 0.8
    warmup: int = 5
    state: dict[str, float] = field(default_factory=lambda: {"level": 0, "sum": 0.0, "weight": 0.0, "steps": 0})

    @property
    def level(self) -> Level:
        return self.levels[int(self.state["level"])]

    @property
    def right(self) -> float:
        """Share of right answers at this level, a mean that forgets; 0 while there are too few steps."""
        return self.state["sum"] / self.state["weight"] if self.state["steps"] >= self.warmup else 0.0

    def update(self, correct: float, progress: float) -> bool:
        """After a step -> whether another level begins."""
        s = self.state
        s["sum"], s["weight"] = self.decay * s["sum"] + correct, self.decay * s["weight"] + 1
        s["steps"] += 1
        done = self.right > self.advance_at or progress >= (s["level"] + 1) / len(self.levels)
        if not done or s["level"] + 1 >= len(self.levels):
            return False
        self.state = {"level": s["level"] + 1, "sum": 0.0, "weight": 0.0, "steps": 0}
        return True


class HopOrder:
    """Rows without end: a share without an answer; of the others half of `focus` hops, the rest of every other number
    alike, so that none is forgotten.

    Of one number of hops they come as Order gives them. position: for a checkpoint.
    """

    def __init__(
        self, rows: Sequence[Row], seed: int, ranks: Ranks | None = None, position: Sequence[int] | None = None,
        unanswerable: float = 0.1,
    ):  # fmt: skip
        self.by_hops: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            self.by_hops.setdefault(n_hops(row) if row["answerable"] else NO_ANSWER, []).append(i)
        self.hops = sorted(self.by_hops)
        self.drawn, *positions = position or [0] * (1 + len(self.hops))
        self.orders = {
            h: Order(len(self.by_hops[h]), seed + h, ranks, at) for h, at in zip(self.hops, positions, strict=True)
        }
        self.seed, self.focus, self.unanswerable = seed, self.hops[-1], unanswerable

    @property
    def position(self) -> list[int]:
        return [self.drawn, *(order.position for order in self.orders.values())]

    def shares(self) -> dict[int, float]:
        """Of each number of hops; 0: of questions without an answer."""
        hops = [h for h in self.hops if h != NO_ANSWER]
        if not hops:
            return {NO_ANSWER: 1.0}
        shares = {NO_ANSWER: self.unanswerable} if NO_ANSWER in self.hops else {}
        rest, focus, others = 1 - sum(shares.values()), min(self.focus, hops[-1]), len(hops) - 1
        if focus not in hops or not others:
            return shares | dict.fromkeys(hops, rest / len(hops))
        return shares | {h: rest * (0.5 if h == focus else 0.5 / others) for h in hops}

    def __next__(self) -> int:
        rng = np.random.default_rng([self.seed, self.drawn])
        self.drawn += 1
        shares = self.shares()
        hops = int(rng.choice(list(shares), p=list(shares.values())))
        return self.by_hops[hops][next(self.orders[hops])]


def describe(level: Level) -> str:
    return ", ".join(f"{k} {v}" for k, v in asdict(level).items())
