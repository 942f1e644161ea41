"""Rows of T + 1 tokens out of documents or conversations: the oldest piece first, then best fit.

A piece is a document, a part of one, or a conversation. It is kept without its <|bos|>; every piece in a row starts
with one. Two modes:

    cut=True   documents: long ones are split into parts that fill a row and the tail; where nothing fits into the rest
               of a row, a part is cut and what is left of it goes back to the queue. Every part starts with <|bos|>
               again, so every token but <|bos|> becomes a target exactly once.
    cut=False  conversations: a piece is never cut; where nothing fits, the row is padded.

Rows start with the oldest piece, so nothing waits for ever; best fit alone would keep serving short documents. Best fit
after that follows nanochat's BOS-aligned loader, which throws away what it crops.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from nanochat.config import UserError

PIECE_MIN = 16  # tokens: a cut leaves no part shorter than this (an eighth of a row where rows are short)


class Piece(NamedTuple):
    ids: np.ndarray  # (n,) without <|bos|>, n >= 1; never written to
    mask: np.ndarray | None = None  # (n,) nonzero = a target; None = every token is one


class Packer:
    """A queue of pieces that hands out rows. `tokens`: what it holds, each piece's <|bos|> counted."""

    def __init__(self, T: int, cut: bool = True):
        if T < 1:
            raise UserError(f"rows of T={T} tokens: T must be at least 1")
        self.T = T
        self.cut = cut
        self.tokens = 0
        self._min = max(2, min(PIECE_MIN, (T + 1) // 8))
        self._serial = 0
        self._pieces: dict[int, Piece] = {}  # serial -> piece
        self._age: deque[int] = deque()  # serials, oldest first, and those of pieces taken since
        self._by_length: dict[int, deque[int]] = {}  # length with <|bos|> -> serials, oldest first
        self._lengths = 0  # bit n is set where _by_length holds n: largest length <= room is one bit_length()

    def __len__(self) -> int:
        return len(self._pieces)

    def add(self, ids: Sequence[int], mask: Sequence[int] | None = None) -> None:
        """Queue one conversation, which begins with <|bos|>. mask as render_conversation gives it: 1 = a target.

        UserError, and nothing is queued, where it is longer than a row or has no target.
        """
        assert not self.cut, "a cut could leave a part without a target: conversations need cut=False"
        if len(ids) > self.T + 1:
            raise UserError(
                f"a conversation of {len(ids)} tokens does not fit a row of {self.T + 1}: "
                f"shorten it (render_conversation's max_tokens={self.T + 1}), raise max_seq_len or leave it out"
            )
        content = np.asarray(ids)[1:]
        trained = None if mask is None else np.asarray(mask)[1:]
        if len(content) == 0 or (trained is not None and not trained.any()):
            raise UserError("a conversation without a token to train on: leave it out")
        self._put(Piece(content, trained))

    def extend(self, documents: Iterable[np.ndarray], seed: Sequence[int] | None = None) -> None:
        """Queue documents given without <|bos|>, an empty one is none. With a seed, their parts are queued shuffled.

        In order, a batch would be one long document, and training would begin with the beginnings of documents.
        """
        assert self.cut, "documents may be longer than a row: they need cut=True"
        parts = [part for ids in documents for part in self._split(ids)]
        order = range(len(parts)) if seed is None else np.random.default_rng(seed).permutation(len(parts)).tolist()
        for i in order:
            self._put(Piece(parts[i]))

    def row(self) -> list[Piece] | None:
        """Pieces of the next row, at most T + 1 tokens with one <|bos|> each; None where the queue is empty."""
        if not self._pieces:
            return None
        room, row = self.T + 1, []
        length = self._oldest()
        while length:
            piece = self._take(length)
            if length > room:
                length = self._cut_at(length, room)
                self._put(Piece(piece.ids[length - 1 :]))
                piece = Piece(piece.ids[: length - 1])
            row.append(piece)
            room -= length
            length = self._best(room)
        return row

    def pieces(self) -> list[Piece]:
        """Everything queued, oldest first. A new Packer given these in this order goes on with the same rows."""
        return [self._pieces[serial] for serial in self._age if serial in self._pieces]

    def restore(self, pieces: Iterable[Piece]) -> None:
        for piece in pieces:
            self._put(piece)

    def _split(self, ids: np.ndarray) -> list[np.ndarray]:
        """Parts of T tokens and the tail, which takes tokens of the part before it where it would be a crumb."""
        if len(ids) <= self.T:
            return [ids] if len(ids) else []
        ends = [*range(self.T, len(ids), self.T), len(ids)]
        if ends[-1] - ends[-2] + 1 < self._min and 2 * self._min <= self.T + 1:
            ends[-2] -= self._min
        return [ids[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def _put(self, piece: Piece) -> None:
        length = len(piece.ids) + 1
        self._pieces[self._serial] = piece
        self._age.append(self._serial)
        self._by_length.setdefault(length, deque()).append(self._serial)
        self._lengths |= 1 << length
        self._serial += 1
        self.tokens += length

    def _take(self, length: int) -> Piece:
        """Remove the oldest piece of this length."""
        serials = self._by_length[length]
        piece = self._pieces.pop(serials.popleft())
        if not serials:
            del self._by_length[length]
            self._lengths ^= 1 << length
        self.tokens -= length
        return piece

    def _oldest(self) -> int:
        """Length of the oldest piece of all, which is also the oldest of its length."""
        while self._age[0] not in self._pieces:
            self._age.popleft()
        return len(self._pieces[self._age[0]].ids) + 1

    def _largest(self, room: int) -> int:
        """Largest queued length <= room, 0 for none."""
        return max((self._lengths & ((2 << max(room, 0)) - 1)).bit_length() - 1, 0)

    def _best(self, room: int) -> int:
        """Length of the piece to put into the room left, 0 to pad it; where it is longer, the piece is to be cut."""
        fit = self._largest(room)
        if fit == room or not self.cut or room < self._min:
            return fit
        # Leave nothing, or room enough for another piece. Failing that, cut the longest.
        return self._largest(room - self._min) or max(self._lengths.bit_length() - 1, 0)

    def _cut_at(self, length: int, room: int) -> int:
        """Tokens of a longer piece that go into the room: as many as fit, or fewer where the rest would be a crumb."""
        rest = length - room + 1
        return room - self._min if rest < self._min and room >= 2 * self._min else room


def assemble(rows: Sequence[Sequence[Piece]], T: int, bos_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of pieces -> x (B, T) int64, y (B, T) int64, doc (B, T) int32.

    y is the token after x, -1 where that is another piece's <|bos|>, padding or masked. doc counts the pieces of a row
    from 0; padding (<|bos|> ids) has the number after the last piece's.
    """
    bos, padding, nothing = np.full(1, bos_id), np.full(T + 1, bos_id), np.zeros(T + 1, bool)
    ids: list[np.ndarray] = []
    trained: list[np.ndarray] = []
    spans: list[int] = []
    docs: list[int] = []
    everything = np.ones(T + 1, bool)
    for row in rows:
        room = T + 1
        for k, piece in enumerate(row):
            n = len(piece.ids)
            ids += (bos, piece.ids)
            trained += (nothing[:1], everything[:n] if piece.mask is None else piece.mask)
            spans.append(n + 1)
            docs.append(k)
            room -= n + 1
        if room:
            ids.append(padding[:room])
            trained.append(nothing[:room])
            spans.append(room)
            docs.append(len(row))
    shape = (len(rows), T + 1)
    tokens = np.concatenate(ids, dtype=np.int64, casting="unsafe").reshape(shape)
    target = np.concatenate(trained).astype(bool).reshape(shape)
    doc = np.repeat(np.array(docs, np.int32), spans).reshape(shape)
    y = np.where(target[:, 1:], tokens[:, 1:], -1)
    return np.ascontiguousarray(tokens[:, :-1]), y, np.ascontiguousarray(doc[:, :-1])


def flatten(pieces: Sequence[Piece]) -> dict[str, np.ndarray]:
    """Pieces -> {"ids": (n,) int32, "lengths": (len(pieces),) int64} and, where any has one, "mask": (n,) int32."""
    flat = {
        "ids": np.concatenate([p.ids for p in pieces] or [np.zeros(0)], dtype=np.int32, casting="unsafe"),
        "lengths": np.array([len(p.ids) for p in pieces], np.int64),
    }
    if any(p.mask is not None for p in pieces):
        masks = [np.ones(len(p.ids)) if p.mask is None else p.mask for p in pieces]
        flat["mask"] = np.concatenate(masks, dtype=np.int32, casting="unsafe")
    return flat


def unflatten(flat: dict) -> list[Piece]:
    """The pieces of `flatten`'s dict; its values may have become tensors or lists in between."""
    ends = np.cumsum(np.asarray(flat["lengths"], np.int64))[:-1]
    if len(flat["lengths"]) == 0:
        return []
    ids = np.split(np.asarray(flat["ids"], np.int32), ends)
    if "mask" not in flat:
        return [Piece(i) for i in ids]
    return [Piece(i, m) for i, m in zip(ids, np.split(np.asarray(flat["mask"]), ends), strict=True)]
