"""Questions with documents to answer them from, made of rows (scripts/prepare_rag_dataset.py) and a knowledge base.

    task = RAG(load_rows("rag_data/train.jsonl"), kb, top_k=5, tokenizer=tokenizer, max_doc_length=128)
    task[0]    # {"messages", "answers", "gold": [2], "answerable": True, "kind": "1hop", "case": "gold"}

What the documents of an answerable question are is drawn by `Shares`: its gold documents among distractors (answer,
citing them), distractors alone (abstain), or what was retrieved, as it is (answer where that suffices). A distractor is
retrieved for the question (it tells something else of what is asked about), or evidence for an alike question (it tells
the same of something else), or evidence for any question, and none states an answer. Without the second a model learns
to look for the relation alone, and reads it in whatever document has it (docs/LOG.md, 2026-11-22). Evidence, because
documents that tell much are asked about more often: among random ones the long one is the one to read. Unanswerable
questions come with what was retrieved. After RAFT (2403.10131), whose share of questions without gold is 0.2 too; gold
positions are uniform because models prefer the first and the last document (2307.03172).

With follow_ups, more questions about the documents shown are asked in the same conversation, at random from the rows
whose gold documents these are, and from the unanswerable rows whose search found one of them first: a document read
once then teaches several answers.

With invented words (of the world, dataset.json has them) every conversation exchanges them for each other: a name says
nothing from one conversation to the next, and no fact is worth remembering. Without this a model of seven million
parameters learns the thousand entities of a small world by heart instead of reading (docs/LOG.md, 2026-11-21).

A row that brings documents along has them in place of those with the same id: a counterfactual's altered one is its
gold. With "stale_answers" (two documents that disagree) all of them are always shown.

Evidence that max_doc_length cuts off is no evidence: where no shown gold document holds the answer that the whole ones
hold, or that of a step on the way, the right answer is to abstain. So it is where the gold documents alone need more
room than there is; they are then left out.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from nanochat.common import read_json
from nanochat.config import UserError
from nanochat.conversation import render_documents
from nanochat.rag import MAX_DOC_LENGTH, answer_parts, n_around, question_conversation, shorten
from nanochat.retrieval.chunking import chunk_spans
from nanochat.retrieval.metrics import exact_match
from nanochat.retrieval.readers.reading import checked_hops
from nanochat.world_names import Dice
from tasks.common import Kind, Task, check_split
from tasks.data import numbered_lines
from tasks.world_controls import Names, relabel

SEARCHED = 1024  # questions of one search
UNANSWERABLE = 0.25  # of the unanswerable rows that could be further questions: those that may be
DRAWS = 50  # of a random distractor, before there is one less
SOURCES = ("found", "alike", "any")  # of a distractor, each as likely
SEGMENTS = re.compile(r"<\|(search|info|python|output)_start\|>.*?(<\|\1_end\|>|\Z)", re.DOTALL)
CITATION = re.compile(r"<\|cite_start\|>.*?(<\|cite_end\|>|\Z)", re.DOTALL)
ABSTAIN = "<|abstain|>"

Row = dict[str, Any]


@dataclass(frozen=True)
class Shares:
    """Of answerable questions: how many come with gold documents, without, with what was retrieved."""

    gold: float = 0.6
    absent: float = 0.2
    retrieved: float = 0.2

    def __post_init__(self) -> None:
        shares = (self.gold, self.absent, self.retrieved)
        if min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise UserError(f"shares gold={shares[0]:g}, absent={shares[1]:g}, retrieved={shares[2]:g}: expected 0 or "
                            f"more, 1 in all")  # fmt: skip


@dataclass(frozen=True)
class Passage:
    """A chunk of a document, as retrieved; `start` is where it lies in the document."""

    id: str
    start: int
    title: str
    text: str

    def holds(self, answers: Sequence[str]) -> bool:
        """Whether one of the answers stands in it as whole words."""
        shown = f"{self.title}\n{self.text}"
        return any(answer.lower() in shown.lower() and bool(_words(answer).search(shown)) for answer in answers)


@lru_cache(4096)
def _words(answer: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(answer)}(?!\w)", re.IGNORECASE)


def dataset_folder(knowledge_base: str | Path) -> Path:
    """The folder made by prepare_rag_dataset, given itself or by the knowledge base in it. UserError for another."""
    path = Path(knowledge_base).expanduser()
    for folder in (path, path.parent):
        if (folder / "knowledge_base").is_dir() and (folder / "train.jsonl").is_file():
            return folder
    raise UserError(
        f"--knowledge_base={knowledge_base} holds no knowledge_base and train.jsonl: make them by "
        f"`python -m scripts.prepare_rag_dataset --mode ... --output {knowledge_base}`"
    )


def exchangeable(folder: Path) -> list[str]:
    """The words of a dataset that are to be exchanged for each other in training: the names of an invented world."""
    return read_json(folder / "dataset.json")["invented_words"]


def load_rows(path: str | Path) -> list[Row]:
    """The rows of a .jsonl file, each checked. UserError with file and line."""
    path = Path(path).expanduser()
    return [_checked(row, f"{path}:{n}") for n, row in numbered_lines(path)]


def _checked(row: Any, where: str) -> Row:
    expected = '{"question": str, "answers": [str], "gold_ids": [str], "answerable": bool}'
    if not isinstance(row, dict) or not isinstance(row.get("question"), str) or not row["question"].strip():
        raise UserError(f"{where}: {str(row)[:60]!r} is no question, expected {expected}")
    for key in ("answers", "gold_ids"):
        values = row.get(key)
        if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
            raise UserError(f"{where}: {key} is {str(values)[:60]!r}, expected a list of texts, as in {expected}")
    if not isinstance(row.get("answerable"), bool):
        raise UserError(f"{where}: answerable is {row.get('answerable')!r}, expected true or false, as in {expected}")
    if row["answerable"] and not (row["answers"] and row["gold_ids"]):
        raise UserError(f"{where}: answerable, but without answers or gold_ids, expected {expected}")
    for document in row.get("documents") or []:
        if not isinstance(document, dict) or not all(isinstance(document.get(k), str) for k in ("id", "text")):
            raise UserError(
                f'{where}: document {str(document)[:60]!r}, expected {{"id": str, "text": str, "title": str}}'
            )
    relations = row.get("relations") or []
    if not isinstance(relations, list) or not all(isinstance(r, str) for r in relations):
        raise UserError(f"{where}: relations is {str(relations)[:60]!r}, expected a list of texts")
    try:
        checked_hops(row.get("hops"))
    except UserError as e:
        raise UserError(f"{where}: {e}") from None
    return row


def hops(row: Row) -> list[list[str]]:
    """For each step of an answerable row the ids of documents of which one must be read."""
    steps = [hop.get("gold_ids") or [] for hop in row.get("hops") or []]
    return steps if steps and all(steps) else [[id] for id in row["gold_ids"]]


def clues(row: Row, gold: Sequence[Passage]) -> list[list[str]]:
    """What has to be read to answer, as far as the gold passages state it: of each step its answer, of the whole one of
    the row's."""
    every = [row["answers"], *([hop["answer"]] for hop in row.get("hops") or [] if hop.get("answer"))]
    return [clue for clue in every if any(p.holds(clue) for p in gold)]


def alike(row: Row) -> str:
    """Equal for questions that ask the same of different things: by their relations, else by their first two words."""
    return " ".join(row.get("relations") or re.findall(r"\w+", row["question"].lower())[:2])


def evidence_in(passages: Sequence[Passage], row: Row) -> list[Passage]:
    """The first passage for each step of an answerable row, each once; [] where a step has none."""
    reached = [next((p for p in passages if p.id in ids), None) for ids in hops(row)]
    found = [p for p in reached if p is not None]
    return list(dict.fromkeys(found)) if len(found) == len(reached) else []


def is_right(conversation: dict[str, Any], completion: str) -> bool:
    """Exact match with an answer, or abstention where the documents hold none. completion: as decoded, its special
    tokens spelled out."""
    text = CITATION.sub("", SEGMENTS.sub("", completion))
    if not conversation["answerable"]:
        return text.strip() == ABSTAIN
    return ABSTAIN not in text and exact_match(text, conversation["answers"]) == 1.0


class RAG(Task):
    """Conversation i is a function of i: of the row, and of what is drawn for it.

    Each row is asked `variants` times, with other documents. tokenizer: documents are shortened to max_doc_length ids,
    and as many distractors left out as it takes to keep prompt and answer within max_tokens. retriever: None is the
    knowledge base's own. follow_ups: further questions of a conversation, at most, as many as max_tokens has room for.
    invented: words that are exchanged for each other.
    """

    name = "RAG"
    kind: Kind = "generative"

    def __init__(
        self,
        rows: Sequence[Row],
        kb: Any,
        split: str = "train",
        top_k: int = 5,
        retriever: str | None = None,
        shares: Shares = Shares(),
        seed: int = 0,
        *,
        variants: int = 1,
        tokenizer: Any = None,
        max_doc_length: int = MAX_DOC_LENGTH,
        max_tokens: int | None = None,
        follow_ups: int = 0,
        invented: Sequence[str] = (),
        **span: Any,
    ):
        super().__init__(**span)
        check_split(self.name, split)
        if top_k < 1 or variants < 1:
            raise UserError(f"top_k={top_k}, variants={variants}: expected at least 1")
        there_are = len(kb) + max((len(row.get("documents") or []) for row in rows), default=0)
        self.top_k = min(top_k, max(1, there_are))
        self.rows, self.kb, self.split, self.shares = rows, kb, split, shares
        self.seed, self.variants, self.tokenizer = seed, variants, tokenizer
        self.max_doc_length, self.max_tokens = max_doc_length, max_tokens
        self.passages: dict[tuple[str, int], Passage] = {}  # each once, however often it was found
        self.found = self._search(retriever)
        self.pool = list(self.passages.values())
        self.short: dict[Passage, tuple[Passage, int]] = {}
        self.follow_ups = follow_ups
        self.names = Names(invented, seed)
        self.needed: dict[int, list[list[str]]] = {}
        self.about = self._rows_by_document() if follow_ups else {}
        self.shared = [row for row in self.rows if row["answerable"] and not row.get("documents")]
        self.alike: dict[str, list[Row]] = {}
        for row in self.shared:
            self.alike.setdefault(alike(row), []).append(row)

    def _rows_by_document(self) -> dict[str, list[int]]:
        """Document id -> the rows that can be asked about it without documents of their own."""
        about: dict[str, list[int]] = {}
        for i, row in enumerate(self.rows):
            if not row.get("documents"):
                ids = (
                    [id for hop in hops(row) for id in hop] if row["answerable"] else [p.id for p in self.found[i][:1]]
                )
                for id in ids:
                    about.setdefault(id, []).append(i)
        return about

    def _search(self, retriever: str | None) -> list[list[Passage]]:
        """What was found for each row; more than are shown, because some of it states the answer."""
        questions = [row["question"] for row in self.rows]
        found: list[list[Passage]] = []
        for first in range(0, len(questions), SEARCHED):
            batch = self.kb.search(questions[first : first + SEARCHED], k=2 * self.top_k + 4, retriever=retriever)
            for hits in batch:
                found.append(
                    [self._passage(h.document.id, h.chunk.start, h.document.title, h.chunk.text) for h in hits]
                )
        return found

    def _passage(self, id: str, start: int, title: str, text: str) -> Passage:
        return self.passages.setdefault((id, start), Passage(id, start, title, text))

    def size(self) -> int:
        return len(self.rows) * self.variants

    def recall(self) -> float:
        """Mean share of the steps of answerable questions for which the first top_k found hold a gold document."""
        shares = []
        for row, found in zip(self.rows, self.found, strict=True):
            if row["answerable"] and not row.get("documents"):
                ids = {p.id for p in found[: self.top_k]}
                shares.append(sum(not ids.isdisjoint(hop) for hop in hops(row)) / len(hops(row)))
        return sum(shares) / len(shares) if shares else float("nan")

    # ---- one conversation ----

    def example(self, i: int) -> dict[str, Any]:
        row, found = self.rows[i % len(self.rows)], self.found[i % len(self.rows)]
        dice = Dice("rag", self.split, self.seed, i)
        own = {d["id"]: Passage(d["id"], 0, d.get("title") or "", d["text"]) for d in row.get("documents") or []}
        found = [own.get(p.id, p) for p in found]
        if not row["answerable"]:
            case, documents, evidence = "unanswerable", found[: 1 + dice.below(self.top_k)], []
        else:
            case = "gold" if "stale_answers" in row else self._case(dice)
            documents, evidence = self._documents(dice, row, found, own, case)
        return self._conversation(dice, row, case, documents, evidence, own)

    def _case(self, dice: Dice) -> str:
        at = dice.random()
        return (
            "gold" if at < self.shares.gold else "absent" if at < self.shares.gold + self.shares.absent else "retrieved"
        )

    def _documents(
        self, dice: Dice, row: Row, found: list[Passage], own: dict[str, Passage], case: str
    ) -> tuple[list[Passage], list[Passage]]:
        """-> (what is shown, of it what the answer rests on, by steps; [] where it does not follow)."""
        gold = list(dict.fromkeys(self._gold(dice.pick(ids), row, own, i) for i, ids in enumerate(hops(row))))
        stated = row["answers"] if any(p.holds(row["answers"]) for p in gold) else []  # "yes" stands anywhere
        needed = clues(row, gold)
        known = {id for ids in hops(row) for id in ids}
        rival = [p for p in own.values() if p.id not in known] if "stale_answers" in row else []
        others = [p for p in dict.fromkeys([*own.values(), *found]) if p.id not in known and p not in rival]
        others = [p for p in others if not p.holds(stated)]
        if case == "retrieved":
            documents = [p for p in found if p.id in known or p in others][: 1 + dice.below(self.top_k)]
            evidence = evidence_in(documents, row)
            return documents, evidence if evidence and self._shown(evidence, needed) else []
        kept = [*gold, *rival] if case == "gold" else []
        n = max(len(kept), 1 + dice.below(self.top_k))
        if n > self.top_k:  # more steps than documents
            kept, n = [], self.top_k
        distractors = self._distractors(dice, n - len(kept), row, others, known | own.keys(), stated)
        evidence = gold if kept and self._shown(gold, needed) else []
        return dice.shuffled([*kept, *distractors]), evidence

    def _gold(self, id: str, row: Row, own: dict[str, Passage], step: int = -1) -> Passage:
        """Of this document the chunk that holds the answer of the step, or of the row, else the one that has most words
        of the question."""
        if id in own:
            return own[id]
        document = self.kb.get(id)
        if document is None:
            raise UserError(f"question {row['question']!r}: its gold document {id!r} is not in the knowledge base")
        chunking = self.kb.manifest["chunking"]
        spans = chunk_spans(document.text, chunking["chunk_tokens"], chunking["chunk_overlap"]) or [(0, 0)]
        chunks = [Passage(id, a, document.title, document.text[a:b]) for a, b in spans]
        asked = set(re.findall(r"\w+", row["question"].lower()))
        steps = row.get("hops") or []
        clue = steps[step].get("answer") if len(steps) == len(hops(row)) else None

        def rank(chunk: Passage) -> tuple[bool, bool, int]:
            overlap = len(asked & set(re.findall(r"\w+", chunk.text.lower())))
            return bool(clue) and chunk.holds([clue]), chunk.holds(row["answers"]), overlap

        return max(chunks, key=rank)

    def _distractors(
        self, dice: Dice, n: int, row: Row, found: list[Passage], known: set[str], stated: Sequence[str]
    ) -> list[Passage]:
        """n passages, of each of SOURCES some: of `found` the best. Where questions are few, anything retrieved."""
        sources = [dice.pick(SOURCES) for _ in range(n)]
        chosen = {p.id: p for p in found[: sources.count("found")]}
        rivals, enough = self.alike.get(alike(row), []), min(n, len(chosen) + sources.count("alike"))
        for draw in range(DRAWS * n if self.pool else 0):
            if len(chosen) >= n:
                break
            others = rivals if len(chosen) < enough else self.shared
            if others and draw < DRAWS * n // 2:
                other = dice.pick(others)
                passage = self._gold(dice.pick(hops(other)[-1]), other, {})
            else:
                passage = dice.pick(self.pool)
            if passage.id not in known and passage.id not in chosen and not passage.holds(stated):
                chosen[passage.id] = passage
        return list(chosen.values())

    def _shown(self, evidence: list[Passage], needed: list[list[str]]) -> bool:
        """Whether what is left of the evidence still states all that is needed."""
        return all(any(self._shortened(p)[0].holds(clue) for p in evidence) for clue in needed)

    def _shortened(self, passage: Passage) -> tuple[Passage, int]:
        """-> (what is shown of it, its ids in a prompt)."""
        if self.tokenizer is None:
            return passage, 0
        if passage not in self.short:
            document = shorten(self.tokenizer, passage.title, passage.text, self.max_doc_length)
            size = len(render_documents(self.tokenizer, [document], 99))
            self.short[passage] = Passage(passage.id, passage.start, document["title"], document["text"]), size
        return self.short[passage]

    def _conversation(
        self,
        dice: Dice,
        row: Row,
        case: str,
        documents: list[Passage],
        evidence: list[Passage],
        own: dict[str, Passage],
    ) -> dict[str, Any]:
        said = self._said(row, evidence)
        kept = self._fitting(row["question"], said, documents, evidence)
        if kept is None:
            rest = [p for p in documents if p not in evidence]
            evidence, said = [], ""
            kept = self._fitting(row["question"], said, rest, evidence) or []
        if case != "retrieved" and len(kept) < len(documents):
            kept = dice.shuffled(kept)  # what was left out stood last, and gold may stand anywhere
        documents = kept
        gold = [documents.index(p) + 1 for p in evidence]
        shown = [self._shortened(p)[0] for p in documents]
        messages = question_conversation(row["question"], [{"title": p.title, "text": p.text} for p in shown])[
            "messages"
        ]
        messages.append({"role": "assistant", "content": answer_parts(said, gold, abstain=not gold)})
        if self.follow_ups:
            messages += self._further(dice, row, messages, [p for p in documents if p.id not in own], documents)
        answers = row["answers"]
        if names := self.names.draw(dice):
            renamed = relabel(messages, names)
            if self._fits(renamed[:2] if self.follow_ups else renamed):  # of follow-ups the last one may be cut
                messages, answers = renamed, relabel(answers, names)
        return {
            "messages": messages,
            "answers": answers,
            "gold": gold,
            "answerable": bool(gold),
            "kind": row.get("kind", ""),
            "case": case,
        }

    def _further(
        self, dice: Dice, row: Row, messages: list[dict[str, Any]], known: list[Passage], documents: list[Passage]
    ) -> list[dict[str, Any]]:
        """More questions about the `known` ones of the documents shown, each with its answer."""
        further: list[dict[str, Any]] = []
        rows = {i for passage in known for i in self.about.get(passage.id, []) if self.rows[i] is not row}
        room = self.max_tokens - self._size(messages) if self.tokenizer and self.max_tokens else None
        rows = {i for i in sorted(rows) if self.rows[i]["answerable"] or dice.chance(UNANSWERABLE)}
        for i in dice.shuffled(sorted(rows))[: self.follow_ups]:
            other = self.rows[i]
            evidence = evidence_in(known, other) if other["answerable"] else []
            if other["answerable"] and not evidence:
                continue
            gold = [documents.index(p) + 1 for p in evidence] if self._shown(evidence, self._needed(i)) else []
            content = answer_parts(self._said(other, evidence), gold, abstain=not gold)
            turn = [{"role": "user", "content": other["question"]}, {"role": "assistant", "content": content}]
            if room is not None:
                room -= self._size(turn)
                if room < 0:
                    break
            further += turn
        return further

    def _needed(self, i: int) -> list[list[str]]:
        """The clues of row i that its documents state."""
        if i not in self.needed:
            row = self.rows[i]
            gold = [self._gold(id, row, {}, step) for step, ids in enumerate(hops(row)) for id in ids]
            self.needed[i] = clues(row, gold)
        return self.needed[i]

    def _fits(self, messages: list[dict[str, Any]]) -> bool:
        return self.tokenizer is None or self.max_tokens is None or self._size(messages) <= self.max_tokens

    def _size(self, messages: list[dict[str, Any]]) -> int:
        """Ids of a conversation."""
        return len(self.tokenizer.render_conversation({"messages": messages})[0])

    def _said(self, row: Row, evidence: list[Passage]) -> str:
        """The answer as the documents shown write it, those of the last step first."""
        for passage in reversed(evidence):
            for answer in row["answers"]:
                if self._shortened(passage)[0].holds([answer]):
                    return answer
        return row["answers"][0] if evidence else ""

    def _fitting(
        self, question: str, said: str, documents: list[Passage], evidence: list[Passage]
    ) -> list[Passage] | None:
        """Without as many distractors, from the last, as it takes; None where the evidence alone is too long."""
        if self.tokenizer is None or self.max_tokens is None:
            return documents
        content = answer_parts(said, [99] * len(evidence), abstain=not evidence)
        bare = {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": content}]}
        used = len(self.tokenizer.render_conversation(bare)[0]) + n_around(self.tokenizer, question)
        used += sum(self._shortened(p)[1] for p in documents)
        kept = list(documents)
        for passage in reversed(documents):
            if used > self.max_tokens and passage not in evidence:
                kept.remove(passage)
                used -= self._shortened(passage)[1]
        return kept if used <= self.max_tokens or not evidence else None

    def evaluate(self, conversation: dict[str, Any], completion: str) -> bool:
        return is_right(conversation, completion)
