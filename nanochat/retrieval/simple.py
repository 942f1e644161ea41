"""Ranking by shared words, without a library, an index file or an option. For small bases: it reads every text.

    score(q, c) = sum over the distinct words w of q that c holds of ln(1 + N / df(w))

N chunks, df(w) of which hold w (chunks of deleted documents count until the base is compacted). A word is a run of
letters, digits and underscores in lower case; how often it stands in c, and how long c is, make no difference.
"""

import re
from array import array
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from nanochat.config import UserError
from nanochat.retrieval.contract import NO_HIT, Base, Ranking

WORD = re.compile(r"\w+")
READ = 1024  # chunks read at a time


class SimpleRetriever:
    name: ClassVar[str] = "simple"
    needs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, base: Base, options: dict[str, Any] | None = None) -> None:
        if options:
            raise UserError(f"retriever 'simple' has no options, got {', '.join(options)}")
        self.n_chunks = base.n_chunks
        lists: dict[str, array] = {}  # word -> ids of the chunks that hold it, rising
        for first in range(0, self.n_chunks, READ):
            ids = range(first, min(first + READ, self.n_chunks))
            for i, text in zip(ids, base.texts(ids), strict=True):
                for word in set(words(text)):
                    lists.setdefault(word, array("q")).append(i)
        self.chunks_of = {word: np.array(ids, np.int64) for word, ids in lists.items()}

    def search(self, queries: Sequence[str], k: int, allowed: np.ndarray | None = None) -> Ranking:
        """allowed: (n_chunks,) bool -> ids (M, k), scores (M, k)."""
        ids = np.full((len(queries), k), NO_HIT, np.int64)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        for row, query in enumerate(queries):
            total = self._scores(query)
            if allowed is not None:
                total[~allowed] = 0.0
            best = np.argsort(-total, kind="stable")[:k]  # stable: equal scores stay in the order of chunk ids
            best = best[total[best] > 0]
            ids[row, : len(best)], scores[row, : len(best)] = best, total[best]
        return Ranking(ids, scores)

    def _scores(self, query: str) -> np.ndarray:
        total = np.zeros(self.n_chunks)
        for word in dict.fromkeys(words(query)):
            if (holding := self.chunks_of.get(word)) is not None:
                total[holding] += np.log(1 + self.n_chunks / len(holding))
        return total.astype(np.float32)


def words(text: str) -> list[str]:
    return WORD.findall(text.lower())
