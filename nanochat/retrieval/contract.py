"""What an index and a retriever are. A knowledge base (kb.py) owns the files and knows no method by name.

An Index is files made from texts: one folder for each segment of the base (immutable once written), and one folder
`shared` for what all segments share (an encoder). A Retriever ranks chunks: some read an index, others combine
retrievers. Chunks are numbered 0 .. n - 1 through the segments in order; that number is called a chunk id.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np

NO_HIT = -1


class Ranking(NamedTuple):
    """Best first. Where a query has fewer than k hits, the rest of its row is NO_HIT with score -inf.

    Equal scores come in the order of chunk ids. trace: per query and hit, for retrievers that hop; None otherwise.
    """

    ids: np.ndarray  # (M, k) int64
    scores: np.ndarray  # (M, k) float32
    trace: list[list[tuple[str, ...]]] | None = None


class Base(Protocol):
    """What a retriever may ask of the knowledge base it serves."""

    n_chunks: int

    def folders(self, index: str) -> list[Path]:
        """The folder of this index in each segment, in order."""
        ...

    def shared(self, index: str) -> Path:
        """The folder this index shares between segments."""
        ...

    def options(self, index: str) -> dict[str, Any]:
        """As given when the base was built; the index adds what it decided itself."""
        ...

    def texts(self, ids: Sequence[int]) -> list[str]:
        """What was indexed for these chunks: document.indexed_text of title and text."""
        ...

    def titles(self, ids: Sequence[int]) -> list[str]: ...

    def retriever(self, name: str) -> "Retriever":
        """Another retriever over the same base, opened once."""
        ...


class Index(Protocol):
    """Building side of bm25 and dense. `options` is a plain dict from the manifest; unknown keys are a UserError."""

    name: ClassVar[str]

    @staticmethod
    def prepare(texts: Iterable[str], shared: Path, options: dict[str, Any]) -> dict[str, Any]:
        """Once per base, before the first segment: check the options, make what segments share -> options to keep."""
        ...

    @staticmethod
    def build(texts: Iterable[str], folder: Path, shared: Path, options: dict[str, Any]) -> dict[str, Any]:
        """Write one segment -> what the manifest keeps about it (counts, measured recall). The folder exists."""
        ...


class Retriever(Protocol):
    name: str

    def search(self, queries: Sequence[str], k: int, allowed: np.ndarray | None = None) -> Ranking:
        """allowed: (n_chunks,) bool; False = deleted or filtered out. k >= 1. The same answer for a query alone or
        among others."""
        ...
