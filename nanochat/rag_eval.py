"""How well questions are answered from documents: figures of one condition, and differences between two.

    prediction.values       {metric: number, or None where the question does not count for it}
    summary(predictions)    {metric: Figure}, each with a 95 % interval

What counts as what, for one prediction:

right           the question has an answer and the text holds it as whole words, without also holding one that the
                documents outdate or contradict (memory_answers, stale_answers). Milder than EM, so that a model which
                answers in sentences is not charged with hallucination
answered        it neither abstained (by the token, by saying that it does not know) nor stayed empty
accuracy, abstention, hallucination
                right; not answered; answered and not right, which any answer to an unanswerable question is. Over all
                questions, they add up to one (TruthRL, 2509.25760)
EM, F1          as SQuAD counts, over answerable questions; abstaining gets 0
reading EM      EM where the documents shown are sufficient: the gold ones, not cut before the answer
supported       a right answer, or else the whole text of a wrong one, stands in a document shown. Four shares of the
                answered questions add up to one: wrong and supported is a reading error, wrong and unsupported invented
citation precision, recall
                gold among the documents cited (a number without a document is wrong), cited among the gold ones shown
following       on questions whose documents were changed: what the documents say, or what the world said before
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from nanochat.config import UserError
from nanochat.rag import Answer
from nanochat.retrieval.document import Document, Hit
from nanochat.retrieval.metrics import (
    cover_match,
    exact_match,
    f1,
    mean_interval,
    mrr_at_k,
    normalize,
    paired_bootstrap,
)

DRAWS = 2_000  # of the bootstrap for a single figure; differences take 10,000
VERDICTS = {"yes", "no"}
DECLINES = ("i dont know", "i do not know")  # how a text begins that declines to answer, normalised


@dataclass(frozen=True)
class Question:
    """A RAG row. gold: for each piece of evidence the ids of documents that hold it, any of which is enough.

    outdated: answers that were right before the documents were changed. own: documents in place of those of the same
    id. form: the relation asked for, in the world. steps: what each step on the way finds.
    """

    id: str
    text: str
    answers: tuple[str, ...]
    answerable: bool = True
    kind: str = ""
    gold: tuple[tuple[str, ...], ...] = ()
    outdated: tuple[str, ...] = ()
    own: tuple[Document, ...] = ()
    form: str = ""
    steps: tuple[tuple[str, ...], ...] = ()

    @property
    def clues(self) -> tuple[str, ...]:
        """Texts by which the passage of a gold document is found."""
        return (*self.answers, *(clue for step in self.steps for clue in step))

    @property
    def gold_ids(self) -> frozenset[str]:
        return frozenset(id for group in self.gold for id in group)


def question_from(row: dict[str, Any], name: str) -> Question:
    """UserError for an answerable row without answers. name: its place, for rows without an id."""
    id, answers = str(row.get("id", name)), tuple(row.get("answers", ()))
    answerable = row.get("answerable", True)
    if answerable and not answers:
        raise UserError(f"question {id} has no answers: what is to be measured needs some, or answerable: false")
    hops = row.get("hops") or []
    groups = [hop.get("gold_ids") or [] for hop in hops] if answerable else []
    gold = groups if groups and all(groups) else [[id] for id in row.get("gold_ids", [])]
    steps = tuple((hop["answer"],) for hop in hops if hop.get("answer"))
    outdated = [*row.get("memory_answers", []), *row.get("stale_answers", [])] if answerable else []
    own = [
        Document(str(d.get("id", f"{id}#{n}")), d["text"], d.get("title", ""), d.get("metadata", {}))
        for n, d in enumerate(row.get("documents") or [])
    ]
    kind = str(row.get("kind") or ("answerable" if answerable else "unanswerable"))
    return Question(
        id, row["question"], answers, answerable, kind, tuple(map(tuple, gold)), tuple(outdated),
        tuple(own), str((row.get("relations") or [""])[-1]), steps,
    )  # fmt: skip


@dataclass(frozen=True)
class Prediction:
    """What a model made of a question. offered, shown: ids of the documents given, and of those that fitted.

    sufficient: whether the gold documents are shown and state the answer; None where the row names no gold document.
    supported: whether what was said stands in a document shown.
    """

    question: Question
    text: str
    abstained: bool = False
    citations: tuple[int, ...] = ()
    offered: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()
    sufficient: bool | None = None
    supported: bool = False
    well_formed: bool = True
    logprob: float | None = None
    prompt_tokens: int = 0

    @cached_property
    def answered(self) -> bool:
        return not (self.abstained or not normalize(self.text) or normalize(self.text).startswith(DECLINES))

    @property
    def said(self) -> bool:
        """Whether it wrote anything: an answer "A" is nothing once articles are taken off, and silence is no match."""
        return bool(self.text.strip()) and not self.abstained

    @cached_property
    def em(self) -> float | None:
        return _where(self.question.answerable, self.said and exact_match(self.text, self.question.answers))

    @cached_property
    def right(self) -> bool:
        q = self.question
        if not (self.answered and q.answerable and cover_match(self.text, q.answers)):
            return False
        other = [wrong for wrong in q.outdated if not any(cover_match(answer, [wrong]) for answer in q.answers)]
        return not (other and cover_match(self.text, other))

    @cached_property
    def values(self) -> dict[str, float | None]:
        return _values(self)

    def record(self) -> dict[str, Any]:
        """A line of the predictions' file."""
        q = self.question
        return {
            "id": q.id, "kind": q.kind, "question": q.text, "answers": q.answers, "answerable": q.answerable,
            "text": self.text, "abstained": self.abstained, "citations": self.citations, "right": self.right,
            "em": self.em, "supported": self.supported,
            "sufficient": self.sufficient, "documents": self.shown, "dropped": len(self.offered) - len(self.shown),
            "gold": q.gold, "logprob": self.logprob, "prompt_tokens": self.prompt_tokens,
            "well_formed": self.well_formed,
        }  # fmt: skip


def prediction_from(question: Question, reply: Answer, offered: Sequence[str]) -> Prediction:
    """reply.hits: the documents as they were shown, shortened."""
    shown = tuple(hit.document.id for hit in reply.hits)
    made = Prediction(
        question, reply.text, reply.abstained, reply.citations, tuple(offered), shown,
        is_sufficient(question, reply.hits), False, reply.well_formed, reply.logprob, reply.prompt_tokens,
    )  # fmt: skip
    return replace(made, supported=is_supported(made, list(map(passage_text, reply.hits))))


def passage_text(hit: Hit) -> str:
    return f"{hit.document.title}\n{hit.chunk.text}"


def is_sufficient(question: Question, shown: Sequence[Hit]) -> bool | None:
    """Every piece of evidence is shown, and of what the whole gold documents state nothing that is needed was cut off:
    an answer, and the result of each step."""
    if not question.gold:
        return None
    ids = {hit.document.id for hit in shown}
    gold = [hit for hit in shown if hit.document.id in question.gold_ids]
    whole = [f"{hit.document.title}\n{hit.document.text}" for hit in gold]
    left = list(map(passage_text, gold))
    cut = any(_states(whole, said) and not _states(left, said) for said in (question.answers, *question.steps))
    return question.answerable and all(ids & set(group) for group in question.gold) and not cut


def is_supported(p: Prediction, texts: Sequence[str]) -> bool:
    """Whether a document shown says it; "yes" and "no" stand nowhere: they count where the documents are sufficient."""
    if not p.answered:
        return False
    said = p.question.answers if p.right else (p.text,)
    return bool(texts and p.sufficient) if {normalize(s) for s in said} <= VERDICTS else _states(texts, said)


def _states(texts: Sequence[str], answers: Sequence[str]) -> bool:
    return any(cover_match(text, answers) for text in texts)


# ---- figures ----


def _values(p: Prediction) -> dict[str, float | None]:
    """Every metric of one prediction; the docstring of this module says what they mean."""
    q, ok = p.question, p.right
    em = p.em
    enough = q.answerable and p.sufficient is True
    return {
        "EM": em,
        "F1": _where(q.answerable, p.said and f1(p.text, q.answers)),
        "reading EM": em if enough else None,
        "documents sufficient": _where(q.answerable and p.sufficient is not None, bool(p.sufficient)),
        "accuracy": float(ok),
        "abstention": float(not p.answered),
        "hallucination": float(p.answered and not ok),
        "coverage": _where(q.answerable, p.answered),
        "wrong among answered": _where(p.answered, not ok),
        "abstained, unanswerable": _where(not q.answerable, not p.answered),
        "abstained, documents sufficient": _where(enough, not p.answered),
        "abstained, documents insufficient": _where(q.answerable and p.sufficient is False, not p.answered),
        "right, supported": _where(p.answered, ok and p.supported),
        "right, unsupported": _where(p.answered, ok and not p.supported),
        "wrong, supported (reading error)": _where(p.answered, not ok and p.supported),
        "wrong, unsupported": _where(p.answered, not ok and not p.supported),
        "citation precision": _citation_precision(p),
        "citation recall": _citation_recall(p),
        "context-following": _where(bool(q.outdated), ok),
        "memory-following": _where(bool(q.outdated), p.answered and not ok and bool(cover_match(p.text, q.outdated))),
        "well-formed": float(p.well_formed),
        "words": _where(p.answered, len(p.text.split())),
        "prompt tokens": float(p.prompt_tokens),
        "documents shown": float(len(p.shown)),
        "documents dropped": float(len(p.offered) - len(p.shown)),
    }


def _where(counts: bool, value: float) -> float | None:
    return float(value) if counts else None


def _citation_precision(p: Prediction) -> float | None:
    """None where nothing was cited, or where an answerable row does not say which documents are gold."""
    cited = dict.fromkeys(p.citations)
    if not cited or (p.question.answerable and not p.question.gold):
        return None
    gold = p.question.gold_ids if p.question.answerable else frozenset[str]()
    return sum(1 <= n <= len(p.shown) and p.shown[n - 1] in gold for n in cited) / len(cited)


def _citation_recall(p: Prediction) -> float | None:
    """None where it did not answer, or was shown no gold document."""
    shown = [group for group in p.question.gold if set(group) & set(p.shown)]
    if not (p.answered and p.question.answerable and shown):
        return None
    cited = {p.shown[n - 1] for n in p.citations if 1 <= n <= len(p.shown)}
    return sum(bool(cited & set(group)) for group in shown) / len(shown)


def retrieval_values(question: Question, ranked: Sequence[str]) -> dict[str, float | None]:
    """What a search found of a question's evidence. None for rows without any."""
    found = [bool(set(group) & set(ranked)) for group in question.gold]
    if not found or not question.answerable:
        return dict.fromkeys(("any gold", "all gold", "recall", "MRR"))
    mrr = mrr_at_k(ranked, question.gold_ids, max(1, len(ranked)))
    return {"any gold": float(any(found)), "all gold": float(all(found)), "recall": sum(found) / len(found), "MRR": mrr}


@dataclass(frozen=True)
class Figure:
    """A mean over n questions with its 95 % interval and standard error."""

    value: float
    low: float
    high: float
    stderr: float
    n: int

    def __str__(self) -> str:
        places = 3 if max(abs(self.value), abs(self.high)) < 10 else 1
        return f"{self.value:.{places}f} [{self.low:.{places}f}, {self.high:.{places}f}]"


def figure(numbers: Sequence[float], seed: int = 0) -> Figure:
    value, low, high = mean_interval(numbers, DRAWS, seed)
    return Figure(value, low, high, float(np.std(numbers)) / len(numbers) ** 0.5, len(numbers))


def figures(rows: Sequence[dict[str, float | None]]) -> dict[str, Figure]:
    """The mean of each metric over the questions that count for it; a metric without any is left out."""
    names = dict.fromkeys(name for row in rows for name in row)
    kept = {name: [v for row in rows if (v := row[name]) is not None] for name in names}
    return {name: figure(numbers) for name, numbers in kept.items() if numbers}


def summary(predictions: Sequence[Prediction]) -> dict[str, Figure]:
    return figures([p.values for p in predictions])


def difference(a: Sequence[Prediction], b: Sequence[Prediction], metric: str) -> Figure | None:
    """a - b over the questions that count for the metric in both, which are the same questions in the same order."""
    if [p.question.id for p in a] != [p.question.id for p in b]:
        raise UserError("two conditions answer other questions, or in another order: only the same can be compared")
    pairs = [
        (x, y)
        for p, q in zip(a, b, strict=True)
        if (x := p.values[metric]) is not None and (y := q.values[metric]) is not None
    ]
    if not pairs:
        return None
    left, right = zip(*pairs, strict=True)
    stderr = float(np.std(np.subtract(left, right))) / len(pairs) ** 0.5
    return Figure(*paired_bootstrap(left, right), stderr, len(pairs))


# ---- risk and coverage ----


def limited(predictions: Sequence[Prediction], n_answers: int) -> list[Prediction]:
    """The same with all but the n_answers surest answers (by mean log-probability) turned into abstentions."""
    order = sorted((i for i, p in enumerate(predictions) if p.answered), key=lambda i: -_surety(predictions[i]))
    kept = set(order[:n_answers])
    return [
        p if i in kept or not p.answered else replace(p, abstained=True, text="", citations=())
        for i, p in enumerate(predictions)
    ]


def risk_curve(predictions: Sequence[Prediction]) -> tuple[list[float], list[float]]:
    """-> (shares of all questions answered, shares of these that are wrong), as the surest answers come first."""
    answers = sorted((p for p in predictions if p.answered), key=lambda p: -_surety(p))
    wrong = np.cumsum([not p.right for p in answers])
    counts = np.arange(1, len(answers) + 1)
    return (counts / max(1, len(predictions))).tolist(), (wrong / counts).tolist()


def _surety(p: Prediction) -> float:
    return float("-inf") if p.logprob is None else p.logprob


def guessing(questions: Sequence[Question]) -> tuple[float, float]:
    """EM over answerable questions of one constant answer to each form of question -> (chosen on these very questions,
    an upper bound; chosen on the other half of them, what a guesser who knows the distribution reaches)."""
    asked = [q for q in questions if q.answerable]
    halves = asked[::2], asked[1::2]
    n = max(1, len(asked))
    return _guessed(asked, asked) / n, (_guessed(halves[0], halves[1]) + _guessed(halves[1], halves[0])) / n


def _guessed(asked: Sequence[Question], seen: Sequence[Question]) -> int:
    """How many are right if each gets the commonest answer that its form has among the seen ones."""
    counts: dict[str, Counter[str]] = {}
    for q in seen:
        counts.setdefault(q.form, Counter()).update({normalize(a) for a in q.answers})
    best = {form: counter.most_common(1)[0][0] for form, counter in counts.items()}
    return sum(best.get(q.form) in {normalize(a) for a in q.answers} for q in asked)
