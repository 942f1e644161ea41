"""What goes into a knowledge base and what comes out of a search."""

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
    """

    document: Document
    chunk: Chunk
    score: float
    rank: int
    source: str
    trace: tuple[str, ...] = ()
