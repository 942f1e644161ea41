"""What goes into a knowledge base and what comes out of a search."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from nanochat.config import UserError


@dataclass(frozen=True)
class Document:
    """id: unique in its knowledge base. metadata: JSON values by name; filters look at them."""

    id: str
    text: str
    title: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("id", "text", "title"):
            if not isinstance(getattr(self, name), str):
                raise UserError(f"document {self.id!r}: {name} is {type(getattr(self, name)).__name__}, expected text")
        if not self.id:
            raise UserError(f"a document without an id (text {self.text[:40]!r}): give every document its own")


@dataclass(frozen=True)
class Chunk:
    """document.text[start:end] == text: what was indexed, with the title before it."""

    start: int
    end: int
    text: str


@dataclass(frozen=True)
class Hit:
    """One answer of a search. rank counts from 1; score grows with relevance, its scale is the retriever's.

    source: name of the retriever. trace: how a multi-hop search came here, first hop first; empty otherwise.
    document and chunk of a hit that a search gave are read from the base when first asked for, and then kept: who wants
    ranks and scores of many queries pays for no text. The version searched stays mapped until they are.
    """

    document: Document
    chunk: Chunk
    score: float
    rank: int
    source: str
    trace: tuple[str, ...] = ()

    @staticmethod
    def unread(
        read: Callable[[int], tuple[Document, Chunk]],
        id: int,
        score: float,
        rank: int,
        source: str,
        trace: tuple[str, ...],
    ) -> "Hit":
        """A hit whose document and chunk are read(id)."""
        hit = object.__new__(Hit)
        hit.__dict__.update(score=score, rank=rank, source=source, trace=trace, _unread=(read, id))
        return hit

    def __getattr__(self, name: str) -> Any:  # asked for what is not there yet
        own = self.__dict__
        if name in ("document", "chunk"):
            if unread := own.get("_unread"):
                read, id = unread
                own["document"], own["chunk"] = read(id)
                own.pop("_unread", None)  # another thread may have been here
            if name in own:
                return own[name]
        raise AttributeError(f"a Hit has no {name!r}")

    def __reduce__(self) -> tuple[Any, ...]:
        return Hit, (self.document, self.chunk, self.score, self.rank, self.source, self.trace)


def indexed_text(title: str, text: str) -> str:
    """What is indexed of a chunk: the title as a sentence of its own, then the text. An encoder takes both joined by a
    line break for one sentence (MiniLM, HotpotQA: nDCG@10 .761 instead of .768)."""
    if not title or not text:
        return title or text
    return f"{title}{'' if title[-1] in '.!?:' else '.'} {text}"


def batches(documents: Iterable[Document], most: int, characters: int) -> Iterator[list[Document]]:
    """Lists of up to `most` documents, ended as soon as their texts hold `characters`. UserError for what is none."""
    batch: list[Document] = []
    held = 0
    for i, document in enumerate(documents):
        if not isinstance(document, Document):
            raise UserError(f"document {i} is a {type(document).__name__}, expected nanochat.retrieval.Document")
        batch.append(document)
        held += len(document.text)
        if len(batch) == most or held >= characters:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def metadata_json(document: Document) -> str:
    """UserError where the metadata is not JSON."""
    try:
        if not all(isinstance(key, str) for key in document.metadata):
            raise TypeError("keys must be text")
        return json.dumps(document.metadata, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as e:
        raise UserError(f"document {document.id!r}: its metadata is not JSON ({e})") from None
