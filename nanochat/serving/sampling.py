"""One id for each row, every row with its own options; nanochat/sampling.py does the sampling itself."""

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from nanochat.sampling import Sampler, sample
from nanochat.serving.request import Chosen, Sampling


class Uniforms:
    """The stream of numbers that row `number` of Engine.generate draws from: one for each id emitted."""

    def __init__(self, seed: int, number: int) -> None:
        self.generator, self.block, self.first = np.random.default_rng([seed, number]), np.empty(0, np.float32), 0

    def at(self, step: int) -> float:
        """The number of this step; steps only grow."""
        while step >= self.first + len(self.block):
            self.first += len(self.block)
            self.block = self.generator.random(Sampler.BLOCK, np.float32)
        return float(self.block[step - self.first])


class Picked(Protocol):
    """What picking needs to know of a row."""

    @property
    def ids(self) -> list[int]: ...
    @property
    def sampling(self) -> Sampling: ...
    @property
    def logprobs(self) -> int | None: ...
    def uniform(self) -> float: ...


def pick(logits: Tensor, rows: Sequence[Picked]) -> list[int]:
    """logits (B, V) after each of the rows -> one id per row, or ENDED where a row's logits are NaN."""
    picked = [0] * len(rows)
    groups: dict[tuple, list[int]] = {}
    for i, row in enumerate(rows):
        s = row.sampling
        greedy = s.temperature == 0
        groups.setdefault((s.temperature, None if greedy else s.top_k or None, None if greedy else s.top_p), []).append(
            i
        )
    logits = adjusted(logits, rows)
    for (temperature, top_k, top_p), members in groups.items():
        own = logits if len(members) == len(rows) else logits[torch.tensor(members, device=logits.device)]
        u = None
        if temperature > 0:
            u = torch.tensor([rows[i].uniform() for i in members], dtype=torch.float32, device=logits.device)
        for i, token in zip(members, sample(own, u, temperature, top_k, top_p).tolist(), strict=True):
            picked[i] = token
    return picked


def adjusted(logits: Tensor, rows: Sequence[Picked]) -> Tensor:
    """The logits (B, V) after repetition penalties and min_p; the given ones where no row asks for either."""
    asks = [i for i, row in enumerate(rows) if row.sampling.repetition_penalty != 1 or row.sampling.min_p]
    if not asks:
        return logits
    logits = logits.clone()
    for i in asks:
        s, own = rows[i].sampling, logits[i]
        if s.repetition_penalty != 1:
            held = torch.tensor(sorted(set(rows[i].ids)), device=logits.device)
            values = own[held]
            own[held] = torch.where(values > 0, values / s.repetition_penalty, values * s.repetition_penalty)
        if s.min_p and s.temperature > 0:
            own[own < own.max() + s.temperature * math.log(s.min_p)] = -math.inf
    return logits


def chosen(logits: Tensor, rows: Sequence[Picked], picked: Sequence[int]) -> list[Chosen | None]:
    """Log-probabilities for the rows that ask for them, logits (B, V)."""
    asks = [i for i, row in enumerate(rows) if row.logprobs is not None]
    out: list[Chosen | None] = [None] * len(rows)
    if not asks:
        return out
    nats = torch.log_softmax(logits[torch.tensor(asks, device=logits.device)].float(), -1).cpu()  # (len(asks), V)
    for own, i in zip(nats, asks, strict=True):
        values, ids = own.topk(min(rows[i].logprobs or 0, len(own)))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        out[i] = Chosen(picked[i], float(own[picked[i]]), top)
    return out
