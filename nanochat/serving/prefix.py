"""States of prompts read before, so that a shared system prompt, document or conversation is not read again.

A recurrent state cannot be cut, so it is known beforehand where one will be wanted: where a prompt stops being equal to
one of the last prompts, and where an answer ended (the next turn goes on there). A state has room for a number of ids
and serves only prompts that need the same.
"""

from collections import OrderedDict, deque
from typing import Any

import numpy as np
import torch

MIN_SHARED = 16  # ids; reading fewer costs less than keeping them
RECENT = 32  # prompts a new one is compared with
ONE = torch.tensor([0])


class PrefixCache:
    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.bytes = max_bytes, 0
        self.states: OrderedDict[tuple[int, tuple[int, ...]], Any] = OrderedDict()  # used last stands last
        self.recent: deque[np.ndarray] = deque(maxlen=RECENT)

    def find(self, room: int, ids: list[int]) -> tuple[int, Any]:
        """-> how many of the first ids a state at hand has read (never all of them), and a copy of it; 0 and None."""
        lengths = {len(key) for own, key in self.states if own == room and len(key) < len(ids)}
        for n in sorted(lengths, reverse=True):
            key = room, tuple(ids[:n])
            if key in self.states:
                self.states.move_to_end(key)
                return n, self.states[key].select(ONE)
        return 0, None

    def boundary(self, ids: list[int]) -> int:
        """How many first ids the prompt shares with one of the last prompts, 0 for few; it then is the last itself."""
        own, longest = np.array(ids), 0
        for other in self.recent:
            n = min(len(own) - 1, len(other))
            differ = np.flatnonzero(own[:n] != other[:n])
            longest = max(longest, int(differ[0]) if len(differ) else n)
        self.recent.append(own)
        return longest if longest >= MIN_SHARED else 0

    def put(self, room: int, ids: list[int], state: Any) -> None:
        """Keep a state of one row that has read these ids; those used longest ago make place."""
        key = room, tuple(ids)
        size = state.bytes()
        if size > self.max_bytes or len(ids) < MIN_SHARED or key in self.states:
            return
        self.states[key] = state
        self.bytes += size
        while self.bytes > self.max_bytes:
            _, old = self.states.popitem(last=False)
            self.bytes -= old.bytes()
