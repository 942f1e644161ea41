"""BM25 over the chunks of a knowledge base. Indexing and ranking are the Rust crate's (rustbpe/src/bm25.rs).

Variants as Kamphuis et al. 2020 name them (doi 10.1007/978-3-030-45442-5_4), N chunks, df of them with the term:

    score(query, chunk) = sum over the query's words of idf * tf / (tf + k1 * (1 - b + b * length / mean length))

    lucene     idf = ln(1 + (N - df + .5) / (df + .5))
    robertson  idf = ln((N - df + .5) / (df + .5)), 0 where that is negative
    atire      idf = ln(N / df), times k1 + 1
    okapi      the package rank-bm25's: robertson's idf times k1 + 1, a quarter of the mean idf where it is negative

A word that stands twice in the query counts twice. N, df and mean length count deleted chunks until the base is
compacted, as Lucene's do. Only chunks with a score above 0 are hits.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import rustbpe

from nanochat.common import raise_disk_error
from nanochat.config import UserError
from nanochat.retrieval.contract import NO_HIT, Base, Ranking
from nanochat.retrieval.options import read_options

FILE = "bm25.index"
QUERIES = 4096  # searched at a time; between two such groups Ctrl-C is heard


@dataclass(frozen=True)
class Bm25Options:
    """A term is a lower-cased run of two or more alphanumeric characters (Unicode) and underscores."""

    variant: Literal["lucene", "robertson", "atire", "okapi"] = "lucene"
    k1: float = 1.5  # from 0 on: how fast repetition saturates
    b: float = 0.75  # 0 to 1: how much length counts
    stem: bool = True  # Snowball's English stemmer
    stop_words: bool = True  # leave out Lucene's 33 English ones
    threads: int = 0  # 0 = every core, 16 at most

    def __post_init__(self) -> None:
        if not 0 <= self.k1 <= 1e6:
            raise UserError(f"bm25: k1={self.k1}: expected a number from 0 on, usually 0.9 to 2")
        if not 0 <= self.b <= 1:
            raise UserError(f"bm25: b={self.b}: expected a number from 0 to 1")
        if self.threads < 0:
            raise UserError(f"bm25: threads={self.threads}: expected 0 (every core) or more")

    def n_threads(self) -> int:
        return self.threads or min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)


class Bm25Index:
    name: ClassVar[str] = "bm25"

    @staticmethod
    def prepare(texts: Iterable[str], shared: Path, options: dict[str, Any]) -> dict[str, Any]:
        """Nothing is shared: statistics are summed when a base is opened."""
        return asdict(read_options(Bm25Options, options, "bm25"))

    @staticmethod
    def build(texts: Iterable[str], folder: Path, shared: Path, options: dict[str, Any]) -> dict[str, Any]:
        """-> {"chunks", "terms" (different ones), "length" (of all chunks, in terms), "postings"}.

        Memory: a block of 65,536 chunks, the vocabulary and its directory. Any number of threads writes the same bytes.
        """
        o = read_options(Bm25Options, options, "bm25")
        path = folder / FILE
        try:
            counts = rustbpe.bm25_build(texts, path, o.stem, o.stop_words, o.n_threads())
        except OSError as e:
            raise_disk_error(e, path)
            raise
        return dict(zip(("chunks", "terms", "length", "postings"), counts, strict=True))


class Bm25Retriever:
    """options: any of Bm25Options; those of the base where not given. stem and stop_words cannot change."""

    name = "bm25"
    needs: ClassVar[tuple[str, ...]] = ("bm25",)

    def __init__(self, base: Base, options: dict[str, Any] | None = None) -> None:
        built = read_options(Bm25Options, base.options("bm25"), "bm25")
        self.options = o = read_options(Bm25Options, asdict(built) | (options or {}), "bm25")
        paths = [folder / FILE for folder in base.folders("bm25")]
        try:
            self.index = rustbpe.Bm25(paths, o.variant, o.k1, o.b)
        except ValueError as e:
            raise UserError(str(e)) from e
        asked, rules = (o.stem, o.stop_words), self.index.rules
        if rules is not None and rules != asked:
            raise UserError(
                f"bm25: stem={asked[0]}, stop_words={asked[1]}, but {paths[0]} was built with stem={rules[0]}, "
                f"stop_words={rules[1]}: build the base again, or leave these options out"
            )
        assert len(self.index) == base.n_chunks, "the bm25 index is of other chunks"

    def search(self, queries: Sequence[str], k: int, allowed: np.ndarray | None = None) -> Ranking:
        """A query without a term of the base has no hits. UserError for a damaged index or a lone surrogate."""
        ids, scores = np.full((len(queries), k), NO_HIT, np.int64), np.full((len(queries), k), -np.inf, np.float32)
        if allowed is not None:
            allowed = np.ascontiguousarray(allowed, bool)
        for start in range(0, len(queries), QUERIES):
            group = list(queries[start : start + QUERIES])
            try:
                found = self.index.search(group, k, allowed, self.options.n_threads())
            except ValueError as e:
                raise UserError(str(e)) from e
            width = found[0].shape[1]  # no wider than there are chunks
            ids[start : start + len(group), :width], scores[start : start + len(group), :width] = found
        return Ranking(ids, scores)
