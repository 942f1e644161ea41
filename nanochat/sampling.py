"""From logits to ids: temperature, top-k, top-p and seeds, vectorised over the rows of a batch."""

import numpy as np
import torch
from torch import Tensor

from nanochat.config import UserError

ENDED = -1  # in a column of generated ids: the row has ended; here: no id could be picked


class Sampler:
    """Picks one id per row: greedy at temperature 0, else one uniform number per row and step, through the CDF.

    Row r draws from its own stream, seeded by (seed, r): its choices do not change with the rows beside it, and
    global random state is neither read nor moved. The numbers are drawn on the CPU, the same for every device.
    """

    BLOCK = 64  # numbers drawn at a time

    def __init__(self, n_row: int, temperature: float, top_k: int | None, top_p: float | None, seed: int):
        if not temperature >= 0:
            raise UserError(f"temperature={temperature}: expected 0 (greedy) or more")
        if top_k is not None and top_k < 0:
            raise UserError(f"top_k={top_k}: expected how many ids to keep, or 0 for all")
        if top_p is not None and not 0 < top_p <= 1:
            raise UserError(f"top_p={top_p}: expected a probability above 0 and up to 1")
        if seed < 0:
            raise UserError(f"seed={seed}: expected 0 or more")
        self.temperature, self.top_k, self.top_p = temperature, top_k or None, top_p
        self.streams = [np.random.default_rng([seed, r]) for r in range(n_row)] if temperature > 0 else []
        self.block, self.step = np.empty((0, 0), np.float32), 0

    def __call__(self, logits: Tensor, rows: list[int]) -> list[int]:
        """logits (len(rows), V) -> one id per row. Raises UserError where a row's logits are NaN."""
        u = None
        if self.temperature > 0:
            if self.step % self.BLOCK == 0:
                self.block = np.stack([g.random(self.BLOCK, np.float32) for g in self.streams])  # (n_row, BLOCK)
            u = torch.from_numpy(self.block[rows, self.step % self.BLOCK]).to(logits.device)
            self.step += 1
        picked = sample(logits, u, self.temperature, self.top_k, self.top_p).tolist()
        if ENDED in picked:
            raise UserError("the model's logits are NaN: the checkpoint is damaged, or its training diverged")
        return picked


def sample(logits: Tensor, u: Tensor | None, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """logits (B, V), u (B,) uniform in [0, 1) -> ids (B,) int64, or -1 in a row with NaN. u None is greedy.

    top_k first, then top_p of what is left: the fewest ids whose probabilities add up to top_p (Holtzman et al.,
    arXiv 1904.09751). The id is where the cumulative probability of the kept ids passes u of their total.
    """
    if u is None or temperature == 0:
        if logits.device.type == "cpu":  # numpy looks for the largest of 8,192 numbers 13 times as fast
            index = torch.from_numpy(logits.detach().float().numpy().argmax(-1, keepdims=True))  # (B, 1); a NaN wins
        else:
            index = logits.argmax(-1, keepdim=True)
        best = logits.gather(-1, index)
    else:
        order = None
        if top_k is not None or top_p is not None:
            logits, order = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))  # both (B, k), falling
        best = logits.amax(dim=-1, keepdim=True) if order is None else logits[:, :1]  # topk puts NaN first
        # the maximum is taken off before dividing, so that no temperature overflows
        cdf = torch.softmax((logits - best) / temperature, dim=-1).cumsum(dim=-1)  # (B, k)
        last = torch.full_like(cdf[:, :1], cdf.size(-1) - 1, dtype=torch.long)  # the last id kept
        if top_p is not None:
            last = torch.minimum(last, (cdf < top_p).sum(dim=-1, keepdim=True))
        # u < 1 in steps of 2**-24, so u * total < total also after rounding: never past `last`, nor on a zero
        index = torch.searchsorted(cdf, u[:, None] * cdf.gather(-1, last), right=True)
        index = index.clamp(max=cdf.size(-1) - 1)  # only a NaN row needs it
        index = index if order is None else order.gather(-1, index)
    return torch.where(best.isnan(), ENDED, index).squeeze(-1)
