"""What is asked of the scheduler, and the events it answers with."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nanochat.config import UserError
from nanochat.serving.functions import FunctionCall, Functions
from nanochat.tools import Call


class Busy(Exception):
    """The queue is full, or the server is ending: try again later."""


@dataclass(frozen=True)
class Sampling:
    """How one request's ids are picked. Row r of a request draws the numbers that row r of Engine.generate draws.

    min_p: ids less likely than min_p times the likeliest are left out (arXiv 2407.01082). repetition_penalty: the
    logits of ids that the row holds are divided by it, or multiplied where negative (arXiv 1909.05858); 1 = off.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 42

    def __post_init__(self) -> None:
        limits = {"temperature": (0, 100), "min_p": (0, 1), "repetition_penalty": (0.01, 100), "seed": (0, 2**64)}
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise UserError(f"{name}={value}: expected {low} to {high}")
        if self.top_k is not None and not 0 <= self.top_k < 2**31:
            raise UserError(f"top_k={self.top_k}: expected how many ids to keep, or 0 for all")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}: expected a probability above 0 and up to 1")


@dataclass(frozen=True)
class Chosen:
    """A sampled id, its log-probability at temperature 1 before any option, and the likeliest ids at its place."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """What a row wrote since its last piece. The text waits where a stop string or a character may be half there."""

    choice: int
    text: str
    chosen: Chosen | None = None


@dataclass(frozen=True)
class End:
    """A row has ended: reason is "stop", "length" or "tool_calls"; text is what had waited."""

    choice: int
    reason: str
    text: str
    n_tokens: int
    call: FunctionCall | None = None
    citations: tuple[int, ...] = ()
    trace: tuple[Call, ...] = ()


@dataclass(frozen=True)
class Failed:
    """The request has ended without an answer. kind: "timeout", "invalid" or "internal"."""

    kind: str
    message: str


Event = Piece | End | Failed


@dataclass(eq=False)
class Request:
    """A prompt to be answered n times. The listener gets every event, in the scheduler's delivering thread."""

    prompt: list[int]
    max_tokens: int
    listener: Callable[[Event], Any]
    n: int = 1
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    logprobs: int | None = None  # None = none, else how many of the likeliest ids beside the chosen one
    functions: Functions | None = None
    begin: list[int] = field(default_factory=list)  # ids each answer starts with
    seconds: float = math.inf  # from its arrival to its end
    stream: bool = True  # False: after a row's first piece the others come with its end
    arrived: float = field(default_factory=time.monotonic)
    cached: int = 0  # prompt ids whose state was at hand
    open: int = 0  # rows yet to end
    over: bool = False  # ended, cancelled or failed: its rows are dropped

    def __post_init__(self) -> None:
        self.open = self.n

    @property
    def late(self) -> bool:
        return time.monotonic() - self.arrived > self.seconds
