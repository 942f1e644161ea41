"""Conversations that search step by step, to start a model that reinforcement learning then improves.

    task = ColdStart(rows, tool, tokenizer, max_hops=3, max_tokens=513)
    task[0]    # user: question; assistant: search, info, search, info, cite, cite, text (or abstain)

A row (tasks/world.py) names for each step what to search for and which documents hold the result. What comes back is
what the engine's own search tool answers (nanochat/tools.py), rendered alike. Where no document that was found and
shown holds the step's result, the query is put in other words once; where that fails too, and for questions without an
answer, the model abstains. Trained on are queries, citations and the answer; `tokenizer` gives documents mask 0.

Small models do not find this by reward alone: Qwen2.5-0.5B went from an EM of 0.006 to 0.329 with such a start (DGPO,
2508.20324). Every number of hops is seen equally often, because none is learnt from the others.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from nanochat.config import UserError
from nanochat.conversation import shown_text
from nanochat.multihop_rl import n_hops
from nanochat.rag import answer_parts, question_conversation
from nanochat.retrieval.document import Hit
from nanochat.retrieval.metrics import cover_match
from nanochat.tools import NO_MORE_SEARCHES, NOTHING_FOUND, Tool
from nanochat.world_names import Dice
from tasks.common import Kind, Task
from tasks.world_controls import Names, Shifted, relabel
from tasks.world_wording import WORDINGS

Row = dict[str, Any]
BATCH = 1024  # queries of one search


def usable(rows: Sequence[Row], max_hops: int) -> list[Row]:
    """The rows that tell their steps, at most so many, and rest on the knowledge base as it is. UserError for none."""
    told = {"query", "answer", "gold_ids"}
    kept = [row for row in rows if row.get("hops") and all(told <= hop.keys() for hop in row["hops"])]
    kept = [row for row in kept if len(row["hops"]) <= max_hops and not row.get("documents")]
    if not kept:
        raise UserError(
            f"none of {len(rows)} questions has 1 to {max_hops} hops with query, answer and gold_ids: make some by "
            f"`python -m scripts.prepare_rag_dataset --mode world --kinds=1hop,2hop,3hop,missing`"
        )
    return kept


def reworded(row: Row, h: int) -> str:
    """Another query for step h: as the world asks it, else the whole question with what the step before found."""
    hop, relations = row["hops"][h], row.get("relations") or []
    relation = relations[h] if h < len(relations) else relations[-1] if relations else ""
    if relation in WORDINGS:
        before, after = WORDINGS[relation].query.split("{s}")
        found = re.fullmatch(f"{re.escape(before)}(.+){re.escape(after)}", hop["query"])
        if found:
            return WORDINGS[relation].asks["train"][-1].format(s=found[1])
    known = row["hops"][h - 1]["answer"] if h else None
    return f"{known} {row['question']}" if known else row["question"]


@dataclass(frozen=True)
class Found:
    """What a search showed: documents as the tool renders them first in a row, their ids."""

    documents: list[dict[str, str]]
    ids: list[str]

    def place(self, hop: Row) -> int | None:
        """Of the first document (from 0) that holds the step's result, whole enough to state it."""
        for n, (id, document) in enumerate(zip(self.ids, self.documents, strict=True)):
            stated = f"{document['title']}\n{document['text']}"
            if id in hop["gold_ids"] and (hop["answer"] is None or cover_match(stated, [hop["answer"]])):
                return n
        return None


class Library:
    """What the tool answers, asked in batches before training."""

    def __init__(self, tool: Tool, tokenizer: Any):
        self.tool, self.tokenizer = tool, tokenizer
        self.doc = tokenizer.encode_special("<|doc|>")
        self.hits: dict[str, Any] = {}

    def ask(self, queries: Sequence[str]) -> None:
        new = [query for query in dict.fromkeys(queries) if query not in self.hits]
        for first in range(0, len(new), BATCH):
            batch = new[first : first + BATCH]
            self.hits.update(zip(batch, self.tool.handler(batch), strict=True))

    def found(self, query: str, n_before: int) -> Found:
        """What a row that holds n_before documents is shown."""
        assert self.tool.render is not None
        self.ask([query])
        ids, hits = self.tool.render(self.hits[query], [self.doc] * n_before)
        if isinstance(ids, str):
            return Found([], [])
        starts = [i for i, token in enumerate(ids) if token == self.doc]
        documents = []
        for n, (start, end, hit) in enumerate(zip(starts, [*starts[1:], len(ids)], hits, strict=True), n_before + 1):
            text = shown_text(self.tokenizer.decode(ids[start + 1 : end]), n, hit.document.title)
            documents.append({"title": hit.document.title, "text": text})
        return Found(documents, [hit.document.id for hit in hits])


class ColdStart(Task):
    """Conversation i: numbers of hops take turns; those of one number come in the order of the rows, again and again.

    max_tokens: trajectories that are longer are left out. invented: words that are exchanged for each other, in another
    way each time, as in tasks/rag.py: else the names of a small world are learnt by heart instead of read. counts: how
    many rows were answered, reworded, abstained, left out.
    """

    name = "ColdStart"
    kind: Kind = "conversation"

    def __init__(
        self, rows: Sequence[Row], tool: Tool, tokenizer: Any, max_hops: int, max_tokens: int | None = None,
        invented: Sequence[str] = (), **span: Any,
    ):  # fmt: skip
        super().__init__(**span)
        self.tokenizer, self.max_tokens, self.names = tokenizer, max_tokens, Names(invented)
        library, rows = Library(tool, tokenizer), usable(rows, max_hops)
        library.ask([hop["query"] for row in rows for hop in row["hops"]])
        missed = [
            reworded(row, h)
            for row in rows
            for h, hop in enumerate(row["hops"])
            if library.found(hop["query"], 0).place(hop) is None
        ]
        library.ask(missed)
        self.counts: Counter[str] = Counter()
        self.by_hops: dict[int, list[dict[str, Any]]] = {}
        for row in rows:
            conversation = self._trajectory(row, library, tool.max_calls)
            if not self._fits(conversation):
                self.counts["too long"] += 1
                continue
            self.by_hops.setdefault(n_hops(row), []).append(conversation)
        if not self.by_hops:
            raise UserError(
                f"no search of {len(rows)} questions fits {max_tokens} tokens: lower --top_k_per_hop or "
                f"--max_doc_length, or raise --max_seq_len"
            )
        self.groups = [self.by_hops[h] for h in sorted(self.by_hops)]

    def _trajectory(self, row: Row, library: Library, max_calls: int) -> dict[str, Any]:
        """Search for each step, in other words where that finds nothing; then cite one document a step and answer."""
        parts: list[dict[str, Any]] = []
        citations: list[int] = []
        calls = n_documents = 0
        for h, hop in enumerate(row["hops"]):
            place = None
            for query in (hop["query"], reworded(row, h)):
                calls += 1
                parts.append({"type": "search", "text": f" {query}"})  # as in answer_parts
                if calls > max_calls:
                    parts.append({"type": "info", "text": NO_MORE_SEARCHES})
                    break
                found = library.found(query, n_documents)
                shown = {"documents": found.documents} if found.documents else {"text": NOTHING_FOUND}
                parts.append({"type": "info", **shown})
                place = found.place(hop)
                citations += [n_documents + place + 1] if place is not None else []
                n_documents += len(found.documents)
                if place is not None:
                    break
                self.counts["reworded"] += query == hop["query"]
            if place is None:
                break
        abstains = len(citations) < len(row["hops"]) or not row["answerable"]
        self.counts["abstained" if abstains else "answered"] += 1
        said = "" if abstains else _said(row)
        parts += answer_parts(said, citations, abstain=abstains)
        messages = question_conversation(row["question"], [])["messages"]
        return {"messages": [*messages, {"role": "assistant", "content": parts}]}

    def size(self) -> int:
        return len(self.groups) * max(map(len, self.groups))

    def example(self, i: int) -> dict[str, Any]:
        group = self.groups[i % len(self.groups)]
        conversation = group[i // len(self.groups) % len(group)]
        if names := self.names.draw(Dice("cold start", i)):
            renamed = relabel(conversation, names)
            return renamed if self._fits(renamed) else conversation
        return conversation

    def _fits(self, conversation: dict[str, Any]) -> bool:
        return self.max_tokens is None or len(self.tokenizer.render_conversation(conversation)[0]) <= self.max_tokens

    def __str__(self) -> str:
        hops = ", ".join(f"{len(group)} of {h} hops" for h, group in sorted(self.by_hops.items()))
        return f"{hops}; " + ", ".join(f"{n} {what}" for what, n in sorted(self.counts.items()))


class Elsewhere(Sequence[Row]):
    """The questions and the knowledge base of a world whose names are exchanged, for a policy that searches there.

    A world's own names may be tokens of their own, from the tokenizer's text, and tokens that occur only in them are
    hardly learnt; names of other worlds are put together from pieces, and so are most exchanged ones.
    """

    def __init__(self, rows: Sequence[Row], kb: Any, names: Shifted) -> None:
        self._rows, self.kb, self.names = rows, kb, names

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: Any) -> Any:
        return relabel(self._rows[i], self.names)

    def search(self, queries: Sequence[str], **how: Any) -> list[list[Hit]]:
        """What KnowledgeBase.search finds for queries with the names exchanged back, in the exchanged names."""
        back = self.names.back
        found = self.kb.search([relabel(query, back) for query in queries], **how)
        return [[self._renamed(hit) for hit in hits] for hits in found]

    def _renamed(self, hit: Hit) -> Hit:
        chunk = replace(hit.chunk, text=relabel(hit.chunk.text, self.names))
        return replace(hit, document=relabel(hit.document, self.names), chunk=chunk)


def _said(row: Row) -> str:
    """The answer as the last step's document writes it; a comparison's is the one that is right."""
    last = row["hops"][-1]["answer"]
    return last if last in row["answers"] else row["answers"][0]
