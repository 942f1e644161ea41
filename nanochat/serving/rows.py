"""Rows under way: those whose prompt is being read, and those being written."""

from dataclasses import dataclass, field
from typing import Any

from nanochat.engine import Row
from nanochat.serving.reply import Reply
from nanochat.serving.request import Piece, Request, Sampling
from nanochat.serving.sampling import Uniforms

SMALLEST_ROOM = 128  # ids


@dataclass(kw_only=True, eq=False)
class ServedRow(Row):
    """A row of the engine that belongs to a request; its column is its number there."""

    request: Request
    reply: Reply
    n_prompt: int
    uniforms: Uniforms
    told: bool = False  # whether a piece of it was an event
    kept: list[Piece] = field(default_factory=list)  # that go with its end, where it is not streamed

    @property
    def sampling(self) -> Sampling:
        return self.request.sampling

    @property
    def logprobs(self) -> int | None:
        return self.request.logprobs

    @property
    def emitted(self) -> int:
        return len(self.ids) - self.n_prompt

    @property
    def live(self) -> bool:
        return self.left > 0 and not self.request.over

    def uniform(self) -> float:
        return self.uniforms.at(self.emitted)


@dataclass(eq=False)
class Reading:
    """Ids that rows with one state (all samples of a prompt, or one row after a tool) have yet to read."""

    rows: list[ServedRow]
    unread: list[int]
    room: int  # ids the state has room for
    state: Any  # of one row
    keep_at: int = 0  # after how many more ids the state is kept for others; 0 = nowhere

    def next(self, longest: int) -> int:
        """How many ids to read now."""
        n = min(len(self.unread), longest)
        return min(n, self.keep_at) if self.keep_at else n

    @property
    def live(self) -> bool:
        return any(row.live for row in self.rows)


def room_for(n: int, max_context: int) -> int:
    """A power of two that holds n ids, at most the context: rows of equal room are written in one batch."""
    room = SMALLEST_ROOM
    while room < n:
        room *= 2
    return min(room, max_context)


def make_rows(request: Request, tokenizer: Any, max_context: int) -> list[ServedRow]:
    left = min(request.max_tokens, max_context - len(request.prompt))
    seed = request.sampling.seed
    return [
        ServedRow(
            i, list(request.prompt), left, [], request=request, reply=Reply(tokenizer, request.stop),
            n_prompt=len(request.prompt), uniforms=Uniforms(seed, i),
        )
        for i in range(request.n)
    ]  # fmt: skip


@dataclass
class Counts:
    """What the scheduler has done since it began, and what it has under way."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    rows: int = 0  # under way: reading, waiting for a tool or being written
    waiting: int = 0  # requests
    ended: dict[str, int] = field(default_factory=dict)  # by reason
