"""Conversations -> packed batches, for ever and resumable; and fixed rows of conversations for validation.

    for batch in ConversationLoader(task, tokenizer, B, T, rank=rank, world_size=world_size, device=device):
        loss = model(batch.x, batch.y, doc=batch.doc)
    rows = fixed_rows(task, tokenizer, T, n_tokens=2**19)

An epoch is a seeded permutation of the conversations, dealt to the ranks in turn. A conversation is rendered into at
most T + 1 tokens (nanochat/conversation.py: documents and the oldest exchanges go first); one whose last exchange does
not fit, or without an answer, is left out. Both are counted. No conversation is cut, every row has a target, so a step
cannot divide by no target (the NaN of karpathy/nanochat issues 590 and 618).
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from nanochat.config import UserError
from nanochat.dataloader import Batch
from nanochat.packer import Packer, Piece, assemble, flatten, unflatten
from nanochat.prefetch import Ahead
from nanochat.tokenizer import Tokenizer

CURSOR_FORMAT = 1
BUFFER_ROWS = 8  # rows of conversations that wait to be packed; short ones wait longest
SURVEYED = 1024  # conversations rendered to tell how many rows an epoch has
COUNTS = ("read", "shortened", "left_out")


class Conversations(Protocol):
    """What is read of a task: conversation i, the same every time."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> dict[str, Any]: ...


class Reader:
    """Renders conversations into a packer, which it owns, and counts what did not fit whole."""

    def __init__(self, task: Conversations, tokenizer: Tokenizer, T: int):
        self.task, self.tokenizer, self.T = task, tokenizer, T
        self.packer = Packer(T, cut=False)
        self.counts = dict.fromkeys(COUNTS, 0)

    def read(self, i: int) -> None:
        """Queue conversation i, or count it as left out. UserError where it is malformed."""
        self.counts["read"] += 1
        conversation = self.task[i]
        try:
            ids, mask = self.tokenizer.render_conversation(conversation)
        except UserError as e:
            raise UserError(f"conversation {i}: {e}") from e
        if len(ids) > self.T + 1:
            try:
                ids, mask = self.tokenizer.render_conversation(conversation, self.T + 1)
                self.counts["shortened"] += 1
            except UserError:  # rendered whole a moment ago, so it is not malformed: its last exchange is too long
                mask = [0]
        if any(mask):
            self.packer.add(ids, mask)
        else:
            self.counts["left_out"] += 1

    def nothing_usable(self) -> UserError:
        return UserError(
            f"none of {self.counts['read']} conversations fits a row of {self.T + 1} tokens and has an answer: "
            f"raise --max_seq_len (now {self.T}), or choose other --tasks"
        )


class _Stream(Reader):
    """Rows without end: this rank's share of one permutation after the other."""

    def __init__(
        self, task: Conversations, tokenizer: Tokenizer, T: int, rank: int, world_size: int, seed: int, at: dict | None
    ):
        super().__init__(task, tokenizer, T)
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.epoch, self.next = (at["epoch"], at["next"]) if at else (0, 0)
        if at:
            self.counts = dict(at["counts"])
            self.packer.restore(unflatten(at["queue"]))
        self.order = self._permutation()
        if len(self.order) == 0:
            raise UserError(f"{len(task)} conversations for {world_size} ranks: each needs at least one")

    def _permutation(self) -> np.ndarray:
        """(n,) indices of this rank in this epoch."""
        everything = np.random.default_rng((self.seed, self.epoch)).permutation(len(self.task))
        return everything[self.rank :: self.world_size]

    def row(self) -> list[Piece]:
        while self._low():
            if self.next == len(self.order):
                if self.counts["left_out"] == self.counts["read"]:
                    raise self.nothing_usable()
                self.epoch, self.next = self.epoch + 1, 0
                self.order = self._permutation()
            self.read(int(self.order[self.next]))
            self.next += 1
        row = self.packer.row()
        assert row, "the queue is never empty here"
        return row

    def _low(self) -> bool:
        """A small set is not queued several times over: an epoch ends nearly before the next begins."""
        rows = self.packer.tokens / (self.T + 1)
        return rows < 2 or (rows < BUFFER_ROWS and 4 * len(self.packer) < len(self.order))

    def point(self, identity: dict[str, Any]) -> Callable[[], dict[str, Any]]:
        """Where to go on after the rows made so far, written out when it is asked for."""
        return partial(_cursor, identity, self.epoch, self.next, dict(self.counts), self.packer.pieces())


class ConversationLoader:
    """Iterator of Batch, for ever. Close it, use it in `with`, or drop it: its thread ends.

    cursor: the dict of an earlier batch.cursor(). Going on from it gives the batches that would have followed; only B
        may differ (UserError). Its "counts" say how many conversations were read, shortened and left out until there.
    """

    def __init__(
        self,
        task: Conversations,
        tokenizer: Tokenizer,
        B: int,
        T: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        device: str | torch.device = "cpu",
        seed: int = 42,
        cursor: dict[str, Any] | None = None,
    ):
        if B < 1:
            raise UserError(f"device_batch_size={B}: a batch needs at least 1 row")
        self.device = torch.empty(0, device=device).device  # with its index: the thread must mean the same one
        identity = {
            "format": CURSOR_FORMAT,
            "tokenizer": tokenizer.hash,
            "T": T,
            "rank": rank,
            "world_size": world_size,
            "seed": seed,
            "conversations": fingerprint(task),
        }
        if cursor is not None:
            _check_cursor(cursor, identity)
        self.place: Callable[[], dict[str, Any]] = lambda: cursor or {}  # cursor of the last batch handed out
        stream = _Stream(task, tokenizer, T, rank, world_size, seed, cursor)
        self._ahead = Ahead(_batches(stream, B, identity, pin=self.device.type == "cuda"), 2, self.device)

    def __iter__(self) -> "ConversationLoader":
        return self

    def __next__(self) -> Batch:
        batch = next(self._ahead)
        self.place = batch.cursor
        return batch.to(self.device)

    def close(self) -> None:
        """End the thread. A closed loader has no further batch."""
        self._ahead.close()

    def __enter__(self) -> "ConversationLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _batches(stream: _Stream, B: int, identity: dict[str, Any], pin: bool) -> Iterator[Batch]:
    while True:
        arrays = assemble([stream.row() for _ in range(B)], stream.T, stream.tokenizer.bos_id)
        x, y, doc = (torch.from_numpy(a).pin_memory() if pin else torch.from_numpy(a) for a in arrays)
        tokens = int(np.count_nonzero(arrays[1] >= 0))
        yield Batch(x, y, doc, tokens=tokens, epoch=stream.epoch, cursor=stream.point(identity))


def _cursor(
    identity: dict[str, Any], epoch: int, next_: int, counts: dict[str, int], pieces: list[Piece]
) -> dict[str, Any]:
    return {**identity, "epoch": epoch, "next": next_, "counts": counts, "queue": flatten(pieces)}


def _check_cursor(cursor: dict[str, Any], identity: dict[str, Any]) -> None:
    for key, now in identity.items():
        if cursor.get(key) != now:
            raise UserError(
                f"cannot resume the conversations exactly: {key} was {cursor.get(key)!r} and is {now!r}; "
                f"set it to that of the run, or start a new run"
            )


def fingerprint(task: Conversations) -> str:
    """Number of conversations and a hash of a few: enough to notice other tasks or other data."""
    n = len(task)
    some = [task[i] for i in sorted({0, n // 3, 2 * n // 3, n - 1})] if n else []
    return f"{n}, {hashlib.sha256(json.dumps(some, sort_keys=True, default=str).encode()).hexdigest()[:16]}"


@dataclass(frozen=True)
class Survey:
    """What rendering and packing evenly spread conversations showed; shares times len(task) tell of an epoch."""

    conversations: int  # looked at
    rows: int
    tokens: int
    targets: int
    shortened: int
    left_out: int

    def __str__(self) -> str:
        n = max(1, self.conversations)
        kept = max(1, self.conversations - self.left_out)
        return (
            f"{self.tokens / kept:.0f} tokens and {self.targets / kept:.0f} targets each; "
            f"{100 * self.shortened / n:.1f}% shortened, {100 * self.left_out / n:.1f}% too long and left out"
        )


def survey(task: Conversations, tokenizer: Tokenizer, T: int) -> Survey:
    """Look at SURVEYED conversations, or at all where there are fewer. UserError where none can be used."""
    n = min(len(task), SURVEYED)
    reader = Reader(task, tokenizer, T)
    for k in range(n):
        reader.read(k * len(task) // n)
    pieces, tokens = reader.packer.pieces(), reader.packer.tokens
    if not pieces:
        raise reader.nothing_usable()
    rows = sum(1 for _ in iter(reader.packer.row, None))
    targets = sum(int(np.count_nonzero(p.mask)) for p in pieces if p.mask is not None)
    return Survey(n, rows, tokens, targets, reader.counts["shortened"], reader.counts["left_out"])


def fixed_rows(task: Conversations, tokenizer: Tokenizer, T: int, n_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """-> x, y, doc (N, T), about n_tokens: the first conversations, packed; the same whatever B and the ranks.

    Fewer where the task has no more; none is a UserError.
    """
    wanted = max(1, n_tokens // T)
    reader = Reader(task, tokenizer, T)
    for i in range(len(task)):
        if reader.packer.tokens >= wanted * (T + 1):
            break
        reader.read(i)
    rows = list(iter(reader.packer.row, None))[:wanted]
    if not rows:
        raise reader.nothing_usable()
    x, y, doc = assemble(rows, T, tokenizer.bos_id)
    return torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(doc)
