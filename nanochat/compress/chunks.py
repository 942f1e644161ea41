"""A prompt as plain RAG renders it, cut into chunks, and the same prompt with vectors in place of some of them.

Question, titles and numbers of documents stay tokens: a citation copies a number, and names are what a vector loses
first. A chunk never crosses documents. It is as many whole sentences as fit k tokens; a longer sentence is cut at k.
With every chunk expanded the ids are those of plain RAG, so its logits are, too.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanochat.conversation import SENTENCE_END, frame, plain_text


class Chunk(NamedTuple):
    """ids[start:end] of a prompt; document: its number from 1; ids[title:body] are the document's number and title."""

    start: int
    end: int
    document: int = 0
    title: int = 0
    body: int = 0


@dataclass(frozen=True)
class Prompt:
    """mask: 1 where the model is trained to predict this id. gold: places in `chunks` of what the answer rests on."""

    ids: list[int]
    mask: list[int]
    chunks: list[Chunk]
    question: str = ""
    gold: tuple[int, ...] = ()
    conversation: dict[str, Any] | None = None

    def chunk_ids(self, i: int) -> list[int]:
        return self.ids[self.chunks[i].start : self.chunks[i].end]

    @property
    def n_prompt(self) -> int:
        """Ids before the first that is trained on: what a model is given to answer."""
        return self.mask.index(1) if 1 in self.mask else len(self.ids)


def cut(tokenizer: Any, ids: Sequence[int], k: int) -> list[Chunk]:
    """The chunks of all documents in a rendered prompt, also of those that searches brought in."""
    assert k >= 1, k
    doc, info_end = map(tokenizer.encode_special, ("<|doc|>", "<|info_end|>"))
    starts = [i for i, token in enumerate(ids) if token == doc]
    chunks: list[Chunk] = []
    for number, start in enumerate(starts, 1):
        stop = next((i for i in range(start + 1, len(ids)) if ids[i] in (doc, info_end)), len(ids))
        body, ends = _sentences(tokenizer, _without_number(tokenizer, list(ids[start + 1 : stop])))
        at = body
        for a, b in zip(ends, [*ends, None][1:], strict=True):  # a: end of a sentence, b: of the next one
            while a - at > k:
                chunks.append(Chunk(start + 1 + at, start + 1 + at + k, number, start + 1, start + 1 + body))
                at += k
            if a > at and (b is None or b - at > k):
                chunks.append(Chunk(start + 1 + at, start + 1 + a, number, start + 1, start + 1 + body))
                at = a
    return chunks


def _without_number(tokenizer: Any, ids: list[int]) -> list[int]:
    """Ids of a document without what its frame puts behind it, the number it begins with."""
    number = tokenizer.decode(ids, errors="replace").partition("]")[0].removeprefix("[")
    tail = tokenizer.encode_ordinary(frame(int(number), "")[1]) if number.isascii() and number.isdecimal() else []
    return ids[: -len(tail)] if tail and ids[-len(tail) :] == tail else ids


def _sentences(tokenizer: Any, ids: list[int]) -> tuple[int, list[int]]:
    """Ids of "[n] title", newline, text -> (how many are the first line, where the sentences of the rest end)."""
    text = tokenizer.decode(ids, errors="replace")
    head = text.find("\n") + 1
    places = sorted({head, *(m.end() for m in SENTENCE_END.finditer(text, head)), len(text)})
    sizes = [len(text[a:b].encode()) for a, b in zip([0, *places], places, strict=False)]
    reached = np.cumsum([len(tokenizer.decode_bytes([i])) for i in ids])  # bytes up to the end of each id
    borders = np.searchsorted(reached, np.cumsum(sizes)) + 1  # the first border of ids at or after each place
    body, *ends = (min(int(b), len(ids)) for b in borders) if head else (0, *(min(int(b), len(ids)) for b in borders))
    return body, sorted({*(e for e in ends if e > body), len(ids)} - {body})


def make_prompt(tokenizer: Any, conversation: dict[str, Any], k: int) -> Prompt:
    """A conversation of tasks/rag.py: {"messages", "answers", "gold", ...}, its last message the answer."""
    ids, mask = tokenizer.render_conversation(conversation)
    chunks = cut(tokenizer, ids, k)
    question = plain_text(conversation["messages"][-2]["content"])
    gold: list[int] = []
    for number in conversation.get("gold", ()):
        own = [i for i, chunk in enumerate(chunks) if chunk.document == number]
        texts = [tokenizer.decode(ids[chunks[i].start : chunks[i].end], errors="replace").lower() for i in own]
        holding = [i for i, t in zip(own, texts, strict=True) if any(a.lower() in t for a in conversation["answers"])]
        gold += holding or own
    return Prompt(ids, mask, chunks, question, tuple(gold), conversation)


def mix(prompt: Prompt, expanded: Collection[int], chunk_id: int) -> tuple[list[int], list[int], list[int]]:
    """-> (ids with chunk_id for each chunk that is not expanded, their mask, which chunks these are, in order)."""
    ids, mask, slots, at = list[int](), list[int](), list[int](), 0
    for i, chunk in enumerate(prompt.chunks):
        if i in expanded:
            continue
        ids += [*prompt.ids[at : chunk.start], chunk_id]
        mask += [*prompt.mask[at : chunk.start], 0]
        slots.append(i)
        at = chunk.end
    return ids + prompt.ids[at:], mask + prompt.mask[at:], slots


@dataclass(frozen=True)
class Mixed:
    """A batch of mixed prompts: x, y (B, T), y = -1 where nothing is trained; slots (B, T) bool: places of vectors.

    chunks: the different chunks behind them, index (n_slots,): which of them is whose, in the order of `slots`.
    """

    x: Tensor
    y: Tensor
    slots: Tensor
    chunks: list[list[int]]
    index: Tensor

    @property
    def targets(self) -> int:
        return int((self.y >= 0).sum())

    def to(self, device: torch.device) -> "Mixed":
        x, y, slots, index = (t.to(device) for t in (self.x, self.y, self.slots, self.index))
        return Mixed(x, y, slots, self.chunks, index)


def collate(prompts: Sequence[Prompt], expanded: Sequence[Collection[int]], chunk_id: int) -> Mixed:
    """One row for each prompt and the set of chunks that stay tokens in it."""
    rows = [mix(p, e, chunk_id) for p, e in zip(prompts, expanded, strict=True)]
    T = max(len(ids) for ids, _, _ in rows) - 1
    x, y = torch.zeros(len(rows), T, dtype=torch.long), torch.full((len(rows), T), -1)
    slots = torch.zeros(len(rows), T, dtype=torch.bool)
    known: dict[tuple[int, ...], int] = {}
    index: list[int] = []
    for r, (ids, mask, which) in enumerate(rows):
        row, trained = torch.tensor(ids), torch.tensor(mask, dtype=torch.bool)
        x[r, : len(ids) - 1] = row[:-1]
        y[r, : len(ids) - 1] = torch.where(trained[1:], row[1:], -1)
        slots[r, : len(ids) - 1] = row[:-1] == chunk_id
        index += [known.setdefault(tuple(prompts[r].chunk_ids(i)), len(known)) for i in which]
    return Mixed(x, y, slots, [list(c) for c in known], torch.tensor(index, dtype=torch.long))


def effective_rate(k: float, p: float) -> float:
    """Tokens for each place in a mixed context, a share p of its chunks of k tokens expanded (2509.01092, 2.3)."""
    return k / (1 - p + k * p)
