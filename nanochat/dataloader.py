"""Text shards -> packed batches, for ever and resumable; and fixed windows of text for validation.

    for batch in PackedLoader(shard_paths("train"), tokenizer, B, T, rank=rank, world_size=world_size, device=device):
        loss = model(batch.x, batch.y, doc=batch.doc)
    x, y = val_windows(shard_paths("val"), tokenizer, T, n_tokens=2**19)

Every document of an epoch goes to one rank, whole; long ones fill several rows. Rows do not depend on B, prefetch or
threads. A shard that cannot be read whole stops the run, naming the file. Order: nanochat/textstream.py, how rows are
filled: nanochat/packer.py.
"""

import hashlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from nanochat.config import UserError
from nanochat.packer import Packer, Piece, assemble, flatten, unflatten
from nanochat.prefetch import Ahead
from nanochat.textstream import Position, TextStream
from nanochat.tokenizer import Tokenizer

CURSOR_FORMAT = 1


@dataclass
class Batch:
    """What one step trains on. Targets are -1 at the end of a document, in padding and where masked."""

    x: Tensor  # (B, T) int64
    y: Tensor  # (B, T) int64, -1 = no target
    doc: Tensor  # (B, T) int32, document within the row: 0, 1, 2 ...
    tokens: int  # targets in this batch
    epoch: int  # the epoch being read; the queue may still hold some documents of the one before
    # cursor() -> where to go on after this batch: a dict of numbers and strings, and "queue", a dict of numpy arrays
    cursor: Callable[[], dict[str, Any]] = field(repr=False)

    def to(self, device: torch.device) -> "Batch":
        """Its tensors on the device; from pinned memory the copy goes on beside the computation."""
        x, y, doc = (t.to(device, non_blocking=True) for t in (self.x, self.y, self.doc))
        return replace(self, x=x, y=y, doc=doc)


class _Rows:
    """Rows without end from a stream through a packer, and the point to go on from."""

    def __init__(self, stream: TextStream, packer: Packer, buffer_tokens: int):
        self.stream, self.packer, self.buffer_tokens = stream, packer, buffer_tokens
        self._mark()

    def row(self) -> list[Piece]:
        self._fill()
        row = self.packer.row()
        assert row, "the queue is never empty after _fill"
        self._since += 1
        return row

    def _fill(self) -> None:
        """When the queue has run low, read until it is full or an epoch ends; what was read is queued shuffled.

        The seed of the shuffle is the place in the data, so it needs no place in the cursor.
        """
        if self.packer.tokens > self._low():
            return
        at, documents, tokens = self.stream.position, [], self.packer.tokens
        while tokens <= (self._low() if self.stream.at_end else max(self.buffer_tokens, self.packer.T)):
            more = self.stream.read()
            documents += more
            tokens += sum(map(len, more)) + len(more)
        self.packer.extend(documents, seed=(at.epoch, at.document))

    def _low(self) -> int:
        """Half the queue, but at the end of an epoch a quarter, of the queue or of the data where they are fewer.

        So a small data set is not queued several times over, and yet the next epoch begins among the rest of this one.
        """
        low = self.buffer_tokens // 2
        if self.stream.at_end:
            low = min(self.buffer_tokens, self.stream.position.tokens) // 4
        return max(low, self.packer.T)

    def _mark(self) -> None:
        self._snapshot = (self.stream.position, self.packer.pieces())
        self._since = 0

    def point(self) -> tuple[Position, list[Piece], int]:
        """(position, queue, rows made since). A new snapshot is taken seldom enough to cost a few references a row."""
        if self._since * 8 >= len(self._snapshot[1]):
            self._mark()
        return *self._snapshot, self._since


class PackedLoader:
    """Iterator of Batch, for ever. Close it, use it in `with`, or drop it: its thread ends.

    buffer_tokens: tokens of documents waiting to be packed. More mixes better and lets rows fit better.
    prefetch: batches made ahead in a thread, 0 = none, without a thread. threads: of the tokenizer.
    cursor: the dict of an earlier batch.cursor(). Going on from it gives the batches that would have followed; B,
        threads and prefetch may differ, everything else must be as it was (UserError).
    """

    def __init__(
        self,
        shards: Sequence[Path],
        tokenizer: Tokenizer,
        B: int,
        T: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        device: str | torch.device = "cpu",
        cursor: dict[str, Any] | None = None,
        buffer_tokens: int = 2**20,
        threads: int = 1,
        prefetch: int = 2,
    ):
        if B < 1:
            raise UserError(f"device_batch_size={B}: a batch needs at least 1 row")
        self.device = _indexed(torch.device(device))
        identity = {
            "format": CURSOR_FORMAT,
            "tokenizer": tokenizer.hash,
            "T": T,
            "rank": rank,
            "world_size": world_size,
            "buffer_tokens": buffer_tokens,
            "shards": _fingerprint(shards),
        }
        if cursor is not None:
            _check_cursor(cursor, identity)
        position = Position(**cursor["position"]) if cursor else None
        packer = Packer(T)
        packer.restore(unflatten(cursor["queue"]) if cursor else [])
        rows = _Rows(TextStream(shards, tokenizer, rank, world_size, threads, position), packer, buffer_tokens)
        for _ in range(cursor["skip_rows"] if cursor else 0):
            rows.row()
        self._batches = _batches(rows, B, T, tokenizer.bos_id, identity, pin=self.device.type == "cuda")
        self._ahead = Ahead(self._batches, prefetch, self.device) if prefetch else None

    def __iter__(self) -> "PackedLoader":
        return self

    def __next__(self) -> Batch:
        return next(self._ahead or self._batches).to(self.device)

    def close(self) -> None:
        """End the thread. A closed loader has no further batch."""
        if self._ahead:
            self._ahead.close()
        else:
            self._batches.close()

    def __enter__(self) -> "PackedLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _batches(
    rows: _Rows, B: int, T: int, bos_id: int, identity: dict[str, Any], pin: bool
) -> Generator[Batch, None, None]:
    while True:
        x, y, doc = assemble([rows.row() for _ in range(B)], T, bos_id)
        batch = Batch(
            torch.from_numpy(x),
            torch.from_numpy(y),
            torch.from_numpy(doc),
            tokens=int(np.count_nonzero(y >= 0)),
            epoch=rows.stream.position.epoch,
            cursor=partial(_cursor, identity, *rows.point()),
        )
        if pin:  # page-locked, so that the copy to the device runs beside the step
            batch = replace(batch, x=batch.x.pin_memory(), y=batch.y.pin_memory(), doc=batch.doc.pin_memory())
        yield batch


def _indexed(device: torch.device) -> torch.device:
    """cuda -> cuda:<current>, so that the thread means the same device."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _fingerprint(shards: Sequence[Path]) -> str:
    """Names and sizes of the shards, hashed: enough to notice that data were added, left out or made anew."""
    names = [(Path(s).name, Path(s).stat().st_size if Path(s).is_file() else -1) for s in shards]
    return f"{len(names)} shards, {hashlib.sha256(repr(names).encode()).hexdigest()[:16]}"


def _cursor(identity: dict[str, Any], position: Position, pieces: list[Piece], skip_rows: int) -> dict[str, Any]:
    """Where a stream goes on: stream and queue at a row boundary, and rows to make and drop from there."""
    return {**identity, "position": vars(position).copy(), "skip_rows": skip_rows, "queue": flatten(pieces)}


_CURES = {
    "format": "it was written by another version of nanochat",
    "tokenizer": "use the tokenizer of that run",
    "T": "set max_seq_len to that of the run",
    "rank": "give each rank its own cursor",
    "world_size": "start as many processes as the run had",
    "buffer_tokens": "set buffer_tokens to that of the run",
    "shards": "bring back the training shards of the run",
}


def _check_cursor(cursor: dict[str, Any], identity: dict[str, Any]) -> None:
    for key, now in identity.items():
        if cursor.get(key) != now:
            raise UserError(
                f"cannot resume the data exactly: {key} was {cursor.get(key)!r} and is {now!r}; "
                f"{_CURES[key]}, or start a new run"
            )


def val_windows(
    shards: Sequence[Path],
    tokenizer: Tokenizer,
    T: int,
    n_tokens: int,
    kind: Literal["stream", "head"] = "stream",
    threads: int = 1,
) -> tuple[Tensor, Tensor]:
    """-> x, y (N, T) int64: about n_tokens of text in fixed windows, spread evenly, the same whatever B and the ranks.

    "stream": windows of all documents joined, each behind a <|bos|>; "head": the first T + 1 tokens of documents that
    have as many. A packing loader is no yardstick: which text it shows depends on T and favours some lengths.
    y is -1 where the next token is a <|bos|>. Fewer windows than asked for are announced; none is a UserError.
    """
    if kind not in WINDOWS:
        raise ValueError(f"kind={kind!r}: expected one of {', '.join(WINDOWS)}")
    stream = TextStream(shards, tokenizer, threads=threads)
    documents: list[np.ndarray] = []
    while not stream.at_end:
        documents += stream.read()
    found = WINDOWS[kind](documents, T, np.full(1, tokenizer.bos_id))
    wanted = max(n_tokens // T, 1)
    if not found:
        raise UserError(
            f"no validation window: {shards[0]} has {len(documents)} documents, {stream.position.tokens} tokens, none "
            f"as long as T + 1 = {T + 1}: set a shorter max_seq_len or bring more validation text"
        )
    if len(found) < wanted:
        print(f"validation ({kind}): {len(found)} windows of {T} tokens are all there is, {wanted} were asked for")
        wanted = len(found)
    windows = torch.from_numpy(np.stack([found[i * len(found) // wanted] for i in range(wanted)])).long()
    x, y = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
    return x, y.masked_fill(y == tokenizer.bos_id, -1)


def _stream_windows(documents: list[np.ndarray], T: int, bos: np.ndarray) -> list[np.ndarray]:
    text = _join([a for d in documents if len(d) for a in (bos, d)])
    return [text[i : i + T + 1] for i in range(0, len(text) - T, T)]


def _head_windows(documents: list[np.ndarray], T: int, bos: np.ndarray) -> list[np.ndarray]:
    return [_join([bos, d[:T]]) for d in documents if len(d) >= T]


def _join(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays, dtype=np.int32, casting="unsafe") if arrays else np.zeros(0, np.int32)


WINDOWS = {"stream": _stream_windows, "head": _head_windows}


def document_index(x: Tensor, bos_id: int) -> Tensor:
    """x (B, T) -> (B, T) int32: the document within the row, counted at each <|bos|>; a head cut off before is 0."""
    starts = x == bos_id
    starts[:, 0] = False
    return starts.cumsum(1).to(torch.int32)
