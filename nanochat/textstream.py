"""One rank's share of the text shards as token arrays, epoch after epoch, from any position.

The epoch's document i goes to rank i % world_size. The first epoch keeps the order of the files, later ones shuffle
shards and the row groups in them, the same way on every rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from nanochat.config import UserError
from nanochat.shards import read_documents
from nanochat.tokenizer import Tokenizer

CHUNK_CHARS = 2**20  # text encoded at a time: bounds memory where a shard is one large row group


@dataclass(frozen=True)
class Position:
    """The next document of the stream. Shard and group count along the epoch's order."""

    epoch: int = 0
    shard: int = 0
    group: int = 0  # row group
    row: int = 0  # document within the row group
    document: int = 0  # documents passed in this epoch, all ranks
    tokens: int = 0  # tokens this rank got in this epoch


class TextStream:
    """This rank's documents, encoded, one epoch after the other."""

    def __init__(
        self,
        shards: Sequence[Path],
        tokenizer: Tokenizer,
        rank: int = 0,
        world_size: int = 1,
        threads: int = 1,
        position: Position | None = None,
    ):
        self.shards = [Path(s) for s in shards]
        if not self.shards:
            raise UserError("no text shards were given: download some with `python -m nanochat.dataset`")
        self.tokenizer = tokenizer
        self.rank, self.world_size, self.threads = rank, world_size, threads
        self.position = position or Position()
        self._key: tuple[int, int] | None = None  # (epoch, shard) that _groups belongs to
        self._groups: list[int] = []  # row groups of the current shard in the order they are read
        self._texts: list[str] | None = None  # documents of the current row group

    @property
    def at_end(self) -> bool:
        """Whether the next read begins another epoch."""
        return self.position.shard == len(self.shards)

    def read(self) -> list[np.ndarray]:
        """This rank's documents of the next CHUNK_CHARS or so of text, as ids without <|bos|>; perhaps none."""
        if self.at_end:
            self._next_epoch()
        texts = self._current_texts()
        at = self.position
        stop, chars = at.row, 0
        while stop < len(texts) and chars < CHUNK_CHARS:
            chars += len(texts[stop])
            stop += 1
        first = at.row + (self.rank - at.document) % self.world_size
        documents = _encode(self.tokenizer, texts[first : stop : self.world_size], self.threads)
        self._advance(stop, sum(map(len, documents)))
        return documents

    def _advance(self, stop: int, tokens: int) -> None:
        at = self.position
        at = replace(at, row=stop, document=at.document + stop - at.row, tokens=at.tokens + tokens)
        if self._texts is not None and at.row == len(self._texts):
            at, self._texts = replace(at, group=at.group + 1, row=0), None
            if at.group == len(self._groups):
                at = replace(at, shard=at.shard + 1, group=0)
        self.position = at

    def _next_epoch(self) -> None:
        if self.position.tokens == 0:
            raise UserError(
                f"rank {self.rank} of {self.world_size} got no text: {len(self.shards)} shards hold "
                f"{self.position.document} documents; use fewer processes or more data"
            )
        self.position = Position(epoch=self.position.epoch + 1)

    def _current_texts(self) -> list[str]:
        at = self.position
        path = self.shards[_order(len(self.shards), at.epoch)[at.shard]]
        if self._key != (at.epoch, at.shard):
            self._groups = _order(_group_count(path), at.epoch, at.shard)
            self._key = (at.epoch, at.shard)
        if self._texts is None:
            self._texts = next(read_documents(path, self._groups[at.group]))[1]
        return self._texts


def _order(n: int, epoch: int, *salt: int) -> list[int]:
    """0..n-1 in the order of this epoch: as they come in the first, shuffled in later ones."""
    return np.random.default_rng([epoch, *salt]).permutation(n).tolist() if epoch else list(range(n))


def _group_count(path: Path) -> int:
    if next(read_documents(path), None) is None:  # a damaged file stops here, with its name and the cure
        raise UserError(
            f"{path} holds no documents: delete it, or make the data again with `python -m nanochat.dataset`"
        )
    return pq.read_metadata(path).num_row_groups


def _encode(tokenizer: Tokenizer, texts: list[str], threads: int) -> list[np.ndarray]:
    if not texts:
        return []
    ids, offsets = tokenizer.encode_array(texts, threads)
    ends = offsets.tolist()
    return [ids[start:end] for start, end in pairwise(ends)]
