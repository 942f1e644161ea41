"""Muon for matrices, AdamW for the rest; one process, or ranks that each keep 1/W of the moments (and, where the model
is sharded, of the parameters).

Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon): the update of a matrix is its momentum, orthogonalised by
four quintic Newton-Schulz iterations (Jordan's five bought nothing here, docs/LOG.md). AdamW is torch's own function,
fed with slices of the parameters; torch's class imports its compiler, a second and a half of every start. Which rank
keeps which moments is the same whether the model is sharded or not, and any number of ranks can go on from what another
has saved.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.optim.adamw import adamw

from nanochat.config import UserError
from nanochat.device import Ranks, all_reduce_sum, is_sharded, local, rows_of

NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan et al., chosen for slope at zero; singular values land in 0.7..1.2
NS_STEPS = 4  # LOG 2026-11-21: 5 costs 2 % more time for the same loss
RATES = ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr", "ssm_lr")  # keys of a configuration: <role>_lr
LEAST: dict[str, float] = {  # of keys that stages of training share
    **dict.fromkeys(RATES, 0), "policy_lr": 0, "init_lr_frac": 0, "final_lr_frac": 0, "encoder_lr_frac": 0,
    "rl_lr_frac": 0, "weight_decay": 0, "grad_clip": 0, "rl_grad_clip": 0, "keep_last": 1, "log_every": 1, "seed": 0,
}  # fmt: skip
SHARES = ("absent_share", "retrieved_share", "gold_share", "chat_share", "unanswerable_share")


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


ADAMW_STATE = ("step", "exp_avg", "exp_avg_sq")  # of torch's AdamW
ADAMW_EPS = 1e-10
SLICE = re.compile(r"(.+)\[(\d+):(\d+)\]\.step")
PIECE = re.compile(r"(\[\d+:\d+\])?\.\w+$")  # what state_tensors() appends to a parameter's name
NOTHING = torch.empty(0)


@dataclass
class _Matrices:
    """The matrices of one shape; this rank updates `mine` and keeps their momentum and gradients, (len(mine), R, C)."""

    names: list[str]
    params: list[nn.Parameter]
    mine: list[int]
    momentum: Tensor
    grads: Tensor


@dataclass
class _Slice:
    """The rows this rank updates of a parameter that Muon does not; `rows` is a view, `name` is parameter[lo:hi]."""

    name: str
    role: str
    param: nn.Parameter
    rows: Tensor
    state: dict[str, Tensor]
    grad: Tensor


class MuonAdamW:
    """The optimizer of every stage: after backward(), gather() sums param.grad over the ranks, then step() updates.

    A model that is sharded (device.shard_model) must be so before: each rank then steps the rows it holds.
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
        self.sharded = any(is_sharded(p) for p in self.params)
        names = {id(p): n for n, p in model.named_parameters()}
        self.matrices = self._group_by_shape(groups["matrix"], names)
        self.betas = betas
        others = [(role, p) for role, params in groups.items() if role != "matrix" for p in params]
        self._others = [p for _, p in others]
        self._sliced = {names[id(p)] for p in self._others}
        self.slices = [s for role, p in others if len((s := self._slice(role, p, names[id(p)])).rows)]

    def _group_by_shape(self, params: Iterable[nn.Parameter], names: dict[int, str]) -> list[_Matrices]:
        shapes: dict[torch.Size, list[nn.Parameter]] = {}
        for p in params:
            assert p.ndim == 2, f"{names[id(p)]} has shape {tuple(p.shape)}: Muon takes matrices only"
            shapes.setdefault(p.shape, []).append(p)
        groups = []
        for shape, same in shapes.items():
            mine = list(_owned(len(same), self.ranks.rank, self.ranks.world_size))
            momentum = torch.zeros(len(mine), *shape, device=same[0].device)
            groups.append(_Matrices([names[id(p)] for p in same], same, mine, momentum, NOTHING))
        return groups

    def _slice(self, role: str, param: nn.Parameter, name: str) -> _Slice:
        lo, hi = rows_of(param.size(0), self.ranks.rank, self.ranks.world_size)
        rows = local(param) if self.sharded else param.detach()[lo:hi]
        assert len(rows) == hi - lo
        moments = (rows.new_zeros((), dtype=torch.float32), torch.zeros_like(rows), torch.zeros_like(rows))
        state = dict(zip(ADAMW_STATE, moments, strict=True))
        return _Slice(f"{name}[{lo}:{hi}]", role, param, rows, state, NOTHING)

    @torch.no_grad()
    def gather(self, tokens: float = 1.0, clip: float = 0.0) -> float:
        """Sum param.grad over the ranks, each at the rank that steps it, divide by the tokens of the step and clip the
        norm of all -> that norm before it was clipped."""
        for p in self.params:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        if self.sharded:  # there backward() has summed the rows of a rank
            own = iter([local(_grad(s.param)) for s in self.slices])
            for m in self.matrices:
                m.grads = self._to_owners(m)
        else:
            own = iter(self._sum_at_owners())
            for m in (m for m in self.matrices if m.mine):
                m.grads = torch.stack([next(own) for _ in m.mine]).float()
        for s, grad in zip(self.slices, own, strict=True):
            s.grad = grad
        grads = [m.grads for m in self.matrices if m.mine] + [s.grad for s in self.slices]
        scale = 1.0 / max(tokens, 1.0)
        norm = torch.stack(torch._foreach_norm(grads)).norm()
        if self.ranks.world_size > 1:
            norm = all_reduce_sum(norm.square()).sqrt()
        norm = scale * float(norm)
        if clip and norm > clip:
            scale *= clip / norm
        torch._foreach_mul_(grads, scale)
        return norm

    @torch.no_grad()
    def step(self, lr_scale: float = 1.0, momentum: float = 0.95) -> None:
        """One update from what gather() left, then the ranks exchange what each has updated."""
        assert all(s.grad.shape == s.rows.shape for s in self.slices), "step() without gather()"  # adamw would crash
        for role in {s.role: None for s in self.slices}:
            self._adamw_step([s for s in self.slices if s.role == role], self.lrs[role] * lr_scale)
        for m in self.matrices:
            self._muon_step(m, self.lrs["matrix"] * lr_scale, momentum)
        if self.ranks.world_size > 1 and not self.sharded:
            self._exchange()

    def _adamw_step(self, slices: list[_Slice], lr: float) -> None:
        steps, means, squares = ([s.state[key] for s in slices] for key in ADAMW_STATE)
        adamw(
            [s.rows for s in slices], [s.grad for s in slices], means, squares, [], steps, fused=True, amsgrad=False,
            beta1=self.betas[0], beta2=self.betas[1], lr=lr, weight_decay=0.0, eps=ADAMW_EPS, maximize=False,
        )  # fmt: skip

    def _muon_step(self, m: _Matrices, lr: float, momentum: float) -> None:
        if not (m.mine or self.sharded):
            return
        m.momentum.lerp_(m.grads, 1 - momentum)
        update = orthogonalize(m.grads.lerp_(m.momentum, momentum), self.dtype)  # Nesterov, (n, R, C)
        rows, cols = update.shape[1:]
        scale = lr * max(1.0, rows / cols) ** 0.5
        own = [(m.params[i], u) for i, u in zip(m.mine, update, strict=True)]
        for p, u in self._to_rows(m, update) if self.sharded else own:
            if self.weight_decay:
                p.mul_(1 - lr * self.weight_decay)
            p.add_(u, alpha=-scale)

    def _pieces(self, rank: int, of: Callable[[nn.Parameter], Tensor]) -> list[Tensor]:
        """What a rank steps, of the parameters or their gradients: whole matrices, then its rows of all others."""
        world = self.ranks.world_size
        whole = [of(m.params[i]) for m in self.matrices for i in _owned(len(m.params), rank, world)]
        ends = [(param, *rows_of(param.size(0), rank, world)) for param in self._others]
        return whole + [of(param)[lo:hi] for param, lo, hi in ends if hi > lo]

    def _sum_at_owners(self) -> list[Tensor]:
        """This rank's pieces of the gradients, summed over the ranks, which send all that one of them steps at once."""
        pieces = [self._pieces(r, _grad) for r in range(self.ranks.world_size)]
        if len(pieces) == 1:
            return pieces[0]
        sums = [torch.cat([piece.flatten() for piece in of_rank]) for of_rank in pieces]
        _wait(dist.reduce(flat, dst=r, async_op=True) for r, flat in enumerate(sums))
        return _like(sums[self.ranks.rank], pieces[self.ranks.rank])

    def _exchange(self) -> None:
        """Every rank sends what it has stepped."""
        pieces = [self._pieces(r, torch.Tensor.detach) for r in range(self.ranks.world_size)]
        flats = [of_rank[0].new_empty(sum(piece.numel() for piece in of_rank)) for of_rank in pieces]
        torch.cat([piece.flatten() for piece in pieces[self.ranks.rank]], out=flats[self.ranks.rank])
        _wait(dist.broadcast(flat, src=r, async_op=True) for r, flat in enumerate(flats))
        for r, flat in enumerate(flats):
            if r != self.ranks.rank:
                torch._foreach_copy_(pieces[r], _like(flat, pieces[r]))

    def _to_owners(self, m: _Matrices) -> Tensor:
        """Every rank sends its rows of each gradient to the rank that updates it -> those of this rank, (n, R, C)."""
        n, (R, C), by_owner, rows = len(m.mine), m.params[0].shape, self._by_owner(m), self._rows(m)
        send = torch.cat([local(_grad(m.params[i])).flatten() for i in chain(*by_owner)])
        get, give = [n * k * C for k in rows], [len(owned) * rows[self.ranks.rank] * C for owned in by_owner]
        received = send.new_empty(n * R * C)
        dist.all_to_all_single(received, send, get, give)
        return torch.cat([part.view(n, k, C) for part, k in zip(received.split(get), rows, strict=True)], dim=1)

    def _to_rows(self, m: _Matrices, update: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The way back: update (n, R, C) -> (rows of a matrix that are here, their update) for every matrix."""
        n, C, by_owner, rows = len(m.mine), update.size(2), self._by_owner(m), self._rows(m)
        send = torch.cat([part.flatten() for part in update.split(rows, dim=1)])
        get, give = [len(owned) * rows[self.ranks.rank] * C for owned in by_owner], [n * k * C for k in rows]
        received = send.new_empty(sum(get))
        dist.all_to_all_single(received, send, get, give)
        updates = received.view(len(m.params), rows[self.ranks.rank], C)
        return [(local(m.params[i]), u) for i, u in zip(chain(*by_owner), updates, strict=True)]

    def _by_owner(self, m: _Matrices) -> list[range]:
        """The matrices each rank updates."""
        world = self.ranks.world_size
        return [_owned(len(m.params), r, world) for r in range(world)]

    def _rows(self, m: _Matrices) -> list[int]:
        """How many rows of a matrix each rank holds."""
        ends = [rows_of(m.params[0].size(0), r, self.ranks.world_size) for r in range(self.ranks.world_size)]
        return [hi - lo for lo, hi in ends]

    def zero_grad(self) -> None:
        """Free the gradients, and what gather() made of them."""
        for p in self.params:
            p.grad = None
        for s in self.slices:
            s.grad = NOTHING
        for m in self.matrices:
            m.grads = NOTHING

    def state_tensors(self) -> dict[str, Tensor]:
        """This rank's moments by parameter name, for a checkpoint."""
        out = {f"{m.names[i]}.momentum": m.momentum[j] for m in self.matrices for j, i in enumerate(m.mine)}
        return out | {f"{s.name}.{key}": value for s in self.slices for key, value in s.state.items()}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore state_tensors() of this rank, or those of all ranks, of any number, together.

        Raises UserError when they belong to another model, or lack what this rank needs."""
        if not tensors:
            return
        tensors = _cut_anew(tensors, [s.name for s in self.slices])
        expected = {f"{m.names[i]}.momentum" for m in self.matrices for i in m.mine}
        expected |= {f"{s.name}.{key}" for s in self.slices for key in ADAMW_STATE}
        known = {name for m in self.matrices for name in m.names} | self._sliced
        if odd := sorted((expected - set(tensors)) | {t for t in tensors if PIECE.sub("", t) not in known}):
            raise UserError(
                f"the optimizer state does not fit this model or number of ranks (first difference: {odd[0]}): "
                f"resume with the ranks and the config it was saved with"
            )
        for m in self.matrices:
            for j, i in enumerate(m.mine):
                m.momentum[j].copy_(tensors[f"{m.names[i]}.momentum"])
        for s in self.slices:
            for key, value in s.state.items():
                value.copy_(tensors[f"{s.name}.{key}"])


def _cut_anew(tensors: dict[str, Tensor], shards: Iterable[str]) -> dict[str, Tensor]:
    """State tensors, and among them those of `shards` (name[lo:hi]) made from slices that were cut elsewhere."""
    pieces: dict[str, list[tuple[int, int]]] = {}
    for found in (SLICE.fullmatch(t) for t in tensors if t.endswith(".step")):
        if found:
            pieces.setdefault(found[1], []).append((int(found[2]), int(found[3])))
    out = dict(tensors)
    for shard in (s for s in shards if f"{s}.step" not in tensors):
        name, lo, hi = SLICE.fullmatch(f"{shard}.step").groups()  # pyrefly: ignore
        lo, hi = int(lo), int(hi)
        parts = [(a, b) for a, b in sorted(pieces.get(name, [])) if a < hi and b > lo]
        if sum(min(b, hi) - max(a, lo) for a, b in parts) == hi - lo:
            out[f"{shard}.step"] = tensors[f"{name}[{parts[0][0]}:{parts[0][1]}].step"]
            for key in ("exp_avg", "exp_avg_sq"):
                rows = [tensors[f"{name}[{a}:{b}].{key}"][max(lo - a, 0) : hi - a] for a, b in parts]
                out[f"{shard}.{key}"] = torch.cat(rows)
    return out


def _owned(n: int, rank: int, world_size: int) -> range:
    """Those of n matrices of one shape that a rank steps."""
    return range(rank, n, world_size)


def _grad(param: nn.Parameter) -> Tensor:
    assert param.grad is not None
    return param.grad


def _like(flat: Tensor, pieces: list[Tensor]) -> list[Tensor]:
    """The parts of a flat tensor, in the shapes of those it was made of."""
    return [part.view_as(p) for part, p in zip(flat.split([p.numel() for p in pieces]), pieces, strict=True)]


def _wait(works: Iterable[Any]) -> None:
    """For what was begun together: all of it is under way before the first is waited for."""
    for work in list(works):
        work.wait()


def role_rates(cfg: Any, d_model: int, share: float = 1.0) -> dict[str, float]:
    """Role -> a share of its rate in cfg. Embedding and head: given for width 768, scaled by (d_model / 768)^-0.5."""
    scale = dict.fromkeys(("embedding_lr", "unembedding_lr"), (d_model / 768) ** -0.5)
    return {key.removesuffix("_lr"): share * getattr(cfg, key) * scale.get(key, 1.0) for key in RATES}


def lr_schedule(progress: float, warmup: float, warmdown: float, final: float) -> float:
    """Trapezoid on progress in [0, 1]: linear up over `warmup`, flat, linear down to `final` over `warmdown`."""
    if warmup and progress < warmup:
        return max(progress / warmup, 1e-3)
    if warmdown and progress > 1 - warmdown:
        left = max(0.0, (1 - progress) / warmdown)
        return left + (1 - left) * final
    return 1.0


def check_training(cfg: Any) -> None:
    """ValueError for keys that stages of training share, where cfg has them: rates, shares, what a loop needs."""
    given = {key: value for key, value in vars(cfg).items() if value is not None}
    for key, least in LEAST.items():
        if key in given and not given[key] >= least:
            raise ValueError(f"{key}={given[key]}: expected {least} or more")
    for key in SHARES:
        if key in given and not 0 <= given[key] <= 1:
            raise ValueError(f"{key}={given[key]}: expected a share, 0 to 1")
    if given["seed"] >= 2**32:
        raise ValueError(f"seed={given['seed']}: expected less than 2**32 = {2**32}")
    warmup, warmdown = given.get("warmup_ratio", 0), given.get("warmdown_ratio", 0)
    if warmup + warmdown > 1 or min(warmup, warmdown) < 0:
        raise ValueError(f"warmup_ratio={warmup} + warmdown_ratio={warmdown} must lie in 0..1")


def muon_momentum(step: int) -> float:
    """0.85 -> 0.95 over the first 300 steps (nanochat, Oct 2025)."""
    return 0.85 + 0.10 * min(step / 300, 1.0)
