"""Bits per byte: the loss on text in a unit that does not depend on the tokenizer."""

import math

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.config import UserError


def evaluate_bpb(
    model: torch.nn.Module,
    x: Tensor,
    y: Tensor,
    token_bytes: np.ndarray | Tensor,
    batch_size: int,
    doc: Tensor | None = None,
) -> float:
    """Nats of the targets / (ln 2 * UTF-8 bytes of the targets).

    x, y: (N, T) windows, y = -1 for no target, the same on every rank, on the model's device; each rank takes its
    share and all get the same number. doc: (N, T) document index, where the model is to keep documents apart.
    token_bytes: (V,), 0 for special tokens, which count neither as nats nor as bytes.
    """
    distributed = dist.is_available() and dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    sums = sum_nats_and_bytes(model, x, y, token_bytes, batch_size, doc, rank, world_size)
    if distributed:
        sums = sums.to(x.device)
        dist.all_reduce(sums)
    nats, n_bytes = sums.tolist()
    if n_bytes == 0:
        raise UserError(f"no target among {y.numel()} tokens of validation has bytes: bits per byte needs text")
    return nats / (math.log(2) * n_bytes)


@torch.no_grad()
def sum_nats_and_bytes(
    model: torch.nn.Module,
    x: Tensor,
    y: Tensor,
    token_bytes: np.ndarray | Tensor,
    batch_size: int,
    doc: Tensor | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Tensor:
    """(nats, bytes), float64 on the CPU, over windows rank, rank + world_size, ...

    Every rank runs equally many batches of one shape (sharded models compute together, compiled ones know one shape):
    the last is filled up with windows whose targets are all -1.
    """
    assert batch_size >= 1
    bytes_of = torch.as_tensor(token_bytes).cpu()
    share = -(-len(x) // world_size)
    batch_size = min(batch_size, share)
    sums = torch.zeros(2, dtype=torch.float64)
    for start in range(0, share, batch_size or 1):
        rows = torch.arange(start, start + batch_size) * world_size + rank
        real = rows < len(x)
        rows = rows.clamp(max=len(x) - 1).to(x.device)
        targets = y[rows].masked_fill(~real.to(x.device)[:, None], -1)  # (B, T)
        extra = {} if doc is None else {"doc": doc[rows]}
        nats = model(x[rows], targets, loss_reduction="none", **extra).view_as(targets).cpu()  # (B, T)
        n_bytes = _bytes(targets.cpu(), bytes_of)
        sums[0] += nats[n_bytes > 0].sum(dtype=torch.float64)
        sums[1] += n_bytes.sum()
    return sums


def _bytes(targets: Tensor, bytes_of: Tensor) -> Tensor:
    """Bytes of each target, 0 where there is none."""
    return torch.where(targets >= 0, bytes_of[targets.clamp(min=0)], 0)
