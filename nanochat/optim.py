"""Muon for matrices, AdamW for the rest; one process or sharded over ranks (each rank keeps 1/W of the moments).

Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon): the update of a matrix is its momentum, orthogonalised by
four quintic Newton-Schulz iterations (Jordan's five bought nothing here, docs/LOG.md). AdamW is torch's own, fed with
slices of the parameters.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from nanochat.config import UserError
from nanochat.device import Ranks

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan et al., chosen for slope at zero; singular values land in 0.7..1.2
NS_STEPS = 4  # LOG 2026-11-21: 5 costs 2 % more time for the same loss


def orthogonalize(g: Tensor, dtype: torch.dtype) -> Tensor:
    """Nearest semi-orthogonal matrix, roughly: g (n, R, C) -> (n, R, C), multiplied in dtype."""
    a, b, c = NS_COEFFICIENTS
    x = g / (g.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.size(-2) > x.size(-1)
    x = (x.mT if tall else x).to(dtype)
    for _ in range(NS_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(g.dtype)


@dataclass
class _Matrices:
    """The matrices of one shape; this rank updates `mine` and keeps their momentum (len(mine), R, C)."""

    names: list[str]
    params: list[nn.Parameter]
    mine: list[int]
    momentum: Tensor


class MuonAdamW:
    """The optimizer of every stage. Gradients are read from param.grad after the ranks have summed them.

    groups: role -> parameters (GPT.param_groups); lrs: role -> base learning rate. 'matrix' goes to Muon.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: dict[str, list[nn.Parameter]],
        lrs: dict[str, float],
        *,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.8, 0.95),
        dtype: torch.dtype = torch.float32,
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks, self.lrs, self.weight_decay, self.dtype = ranks or Ranks(), lrs, weight_decay, dtype
        self.params = [p for params in groups.values() for p in params]
        names = {id(p): n for n, p in model.named_parameters()}
        self.matrices = self._group_by_shape(groups["matrix"], names)
        self.shards: dict[str, Tensor] = {}  # name[lo:hi] -> the slice of a parameter this rank updates
        self._shard_of: list[tuple[nn.Parameter, Tensor, int, int]] = []
        adam_groups = []
        for role, params in groups.items():
            shards = [] if role == "matrix" else [self._shard(p, names[id(p)]) for p in params]
            if any(s.numel() for s in shards):
                adam_groups.append({"params": [s for s in shards if s.numel()], "lr": lrs[role], "role": role})
        self.adamw = torch.optim.AdamW(adam_groups, betas=betas, eps=1e-10, weight_decay=0.0, fused=True)

    def _group_by_shape(self, params: Iterable[nn.Parameter], names: dict[int, str]) -> list[_Matrices]:
        shapes: dict[torch.Size, list[nn.Parameter]] = {}
        for p in params:
            assert p.ndim == 2, f"{names[id(p)]} has shape {tuple(p.shape)}: Muon takes matrices only"
            shapes.setdefault(p.shape, []).append(p)
        groups = []
        for shape, same in shapes.items():
            mine = list(range(self.ranks.rank, len(same), self.ranks.world_size))
            momentum = torch.zeros(len(mine), *shape, device=same[0].device)
            groups.append(_Matrices([names[id(p)] for p in same], same, mine, momentum))
        return groups

    def _shard(self, param: nn.Parameter, name: str) -> Tensor:
        """The rows of param this rank updates, as a view: stepping it changes the parameter itself."""
        rows, world = param.size(0), self.ranks.world_size
        size = -(-rows // world)
        lo, hi = min(self.ranks.rank * size, rows), min((self.ranks.rank + 1) * size, rows)
        shard = param.detach()[lo:hi]
        if shard.numel():
            self.shards[f"{name}[{lo}:{hi}]"] = shard
        self._shard_of.append((param, shard, lo, hi))
        return shard

    @torch.no_grad()
    def step(self, lr_scale: float = 1.0, momentum: float = 0.95) -> None:
        """One update from param.grad, then the ranks exchange what each has updated."""
        for param, shard, lo, hi in self._shard_of:
            shard.grad = _grad(param)[lo:hi]
        for group in self.adamw.param_groups:
            group["lr"] = self.lrs[group["role"]] * lr_scale
        self.adamw.step()
        for m in self.matrices:
            self._muon_step(m, self.lrs["matrix"] * lr_scale, momentum)
        if self.ranks.world_size > 1:
            self._exchange()

    def _muon_step(self, m: _Matrices, lr: float, momentum: float) -> None:
        if not m.mine:
            return
        grads = torch.stack([_grad(m.params[i]) for i in m.mine]).float()  # (n, R, C)
        m.momentum.lerp_(grads, 1 - momentum)
        update = orthogonalize(grads.lerp_(m.momentum, momentum), self.dtype)  # Nesterov
        rows, cols = update.shape[1:]
        scale = lr * max(1.0, rows / cols) ** 0.5
        for i, u in zip(m.mine, update, strict=True):
            if self.weight_decay:
                m.params[i].mul_(1 - lr * self.weight_decay)
            m.params[i].add_(u, alpha=-scale)

    def _exchange(self) -> None:
        """Every rank sends what it owns: matrices one by one, sliced parameters slice by slice."""
        for m in self.matrices:
            for i, p in enumerate(m.params):
                dist.broadcast(p.detach(), src=i % self.ranks.world_size)
        for param, _, _, _ in self._shard_of:
            size = -(-param.size(0) // self.ranks.world_size)
            for r in range(self.ranks.world_size):
                part = param.detach()[r * size : (r + 1) * size]
                if part.numel():
                    dist.broadcast(part, src=r)

    def zero_grad(self) -> None:
        for p in self.params:
            p.grad = None

    def state_tensors(self) -> dict[str, Tensor]:
        """This rank's moments by parameter name, for a checkpoint."""
        out = {f"{m.names[i]}.momentum": m.momentum[j] for m in self.matrices for j, i in enumerate(m.mine)}
        for name, shard in self.shards.items():
            for key, value in self.adamw.state.get(shard, {}).items():
                out[f"{name}.{key}"] = value
        return out

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore state_tensors(). Raises UserError when they belong to another model or number of ranks."""
        expected = {f"{m.names[i]}.momentum" for m in self.matrices for i in m.mine}
        expected |= {f"{name}.{key}" for name in self.shards for key in ("step", "exp_avg", "exp_avg_sq")}
        if tensors and set(tensors) != expected:
            odd = sorted(set(tensors) ^ expected)[0]
            raise UserError(
                f"the optimizer state does not fit this model or number of ranks (first difference: {odd}): "
                f"resume with the ranks and the config it was saved with"
            )
        if not tensors:
            return
        for m in self.matrices:
            for j, i in enumerate(m.mine):
                m.momentum[j].copy_(tensors[f"{m.names[i]}.momentum"])
        for name, shard in self.shards.items():
            moments = {k: tensors[f"{name}.{k}"].to(shard.device, copy=True) for k in ("exp_avg", "exp_avg_sq")}
            self.adamw.state[shard] = {"step": tensors[f"{name}.step"].clone(), **moments}


def _grad(param: nn.Parameter) -> Tensor:
    assert param.grad is not None, "step() before every gradient is there"
    return param.grad


def lr_schedule(progress: float, warmup: float, warmdown: float, final: float) -> float:
    """Trapezoid on progress in [0, 1]: linear up over `warmup`, flat, linear down to `final` over `warmdown`."""
    if warmup and progress < warmup:
        return max(progress / warmup, 1e-3)
    if warmdown and progress > 1 - warmdown:
        left = max(0.0, (1 - progress) / warmdown)
        return left + (1 - left) * final
    return 1.0


def muon_momentum(step: int) -> float:
    """0.85 -> 0.95 over the first 300 steps (nanochat, Oct 2025)."""
    return 0.85 + 0.10 * min(step / 300, 1.0)
