"""Selective scan of Mamba-1 (arXiv 2312.00752, section 3.2), in plain torch.

    dt = softplus(delta + bias),  h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t,  y_t = C_t h_t + D u_t,  out = y silu(z)

The decay differs per channel and per state, so no product of matrices computes it. What a CPU does well is one fused
operation per step over a tile that stays in its cache: the scan walks over tiles of a few rows and steps, laid out
(t, b, N, E) with the channels innermost, keeps h at the borders of tiles only, and the backward computes a tile again
before it runs the gradient's recurrence from the tile's end. No (B, T, N, E) tensor is ever alive.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanochat.config import UserError
from nanochat.ops.conv import state_dtype, time_major
from nanochat.ops.rows import document_starts, valid_tokens

STEP_ELEMENTS = 16384  # of a step's (b, N, E): 64 KB, below which a call costs more than its arithmetic
TILE_ELEMENTS = 262144  # of a tile's (t, b, N, E): 1 MB; the backward works on three such
LOG2_E = math.log2(math.e)  # exp2 takes a third of torch.exp's time on a CPU, a thirtieth where it underflows


class _Inputs(NamedTuple):
    """What the scan reads, time-major."""

    u: Tensor  # (B, T, E)
    delta: Tensor  # (B, T, E)
    A: Tensor  # (N, E)
    B_t: Tensor  # (B, T, N), or (N, E) for all steps
    C_t: Tensor  # (B, T, N), or (N, E)
    D: Tensor | None  # (E,)
    z: Tensor | None  # (B, T, E)
    bias: Tensor | None  # (E,)
    h0: Tensor | None  # (B, N, E)
    reset: Tensor | None  # (B, T) of 0, or -inf where a document begins
    pad: Tensor | None  # (B, T) bool


At = tuple[slice, slice]  # rows, steps


class _Tile:
    """The inputs of some rows and steps, (t, b, ...) in the state's dtype; z only where it is asked for."""

    def __init__(self, inputs: _Inputs, at: At, softplus: bool) -> None:
        self.dtype = state_dtype(inputs.u)
        self.u, self.raw_dt = self.cut(inputs.u, at), self.cut(inputs.delta, at)
        self.B_t, self.C_t = self.cut(inputs.B_t, at), self.cut(inputs.C_t, at)
        self.softplus = softplus
        if inputs.bias is not None:
            self.raw_dt = self.raw_dt + inputs.bias
        self.dt = F.softplus(self.raw_dt) if softplus else self.raw_dt
        self.pad = None if inputs.pad is None else inputs.pad[at].t()[..., None]  # (t, b, 1)
        if self.pad is not None:
            self.dt = self.dt.masked_fill(self.pad, 0)  # exp(0) h + 0: the step changes nothing
        self.reset = None if inputs.reset is None else inputs.reset[at].t()[..., None, None]  # (t, b, 1, 1)
        self.dtu = self.dt * self.u

    def cut(self, x: Tensor, at: At) -> Tensor:
        """(B, T, X) -> (t, b, X); what is the same at all steps, (N, E), stays whole."""
        return (x if x.ndim == 2 else x[at].transpose(0, 1)).to(self.dtype)

    def grad_raw_dt(self, grad: Tensor) -> Tensor:
        """Gradient by dt -> by delta + bias, (t, b, E)."""
        if self.pad is not None:
            grad = grad.masked_fill(self.pad, 0)
        return torch.ops.aten.softplus_backward(grad, self.raw_dt, 1, 20) if self.softplus else grad


class _Buffers:
    """decay (t, b, N, E) and h (t + 1, b, N, E) of one tile after another: h[0] before the first step, h[s] after s."""

    def __init__(self, inputs: _Inputs, rows: int, steps: int) -> None:
        N, E = inputs.A.shape
        self.A_log2 = inputs.A * LOG2_E
        self.decay = inputs.A.new_empty(steps, rows, N, E)
        self.h = inputs.A.new_empty(steps + 1, rows, N, E)
        self.each_decay, self.each_h = self.decay.unbind(0), self.h.unbind(0)

    def run(self, tile: _Tile) -> tuple[Tensor, Tensor]:
        """The recurrence over a tile from h[0] -> decay (t, b, N, E), h (t, b, N, E), valid until the next run."""
        t = tile.u.size(0)
        decay, h = self.decay[:t], self.h[1 : t + 1]
        if tile.reset is None:
            torch.mul(tile.dt[:, :, None], self.A_log2, out=decay)
        else:
            torch.addcmul(tile.reset, tile.dt[:, :, None], self.A_log2, out=decay)
        torch.exp2(decay, out=decay)
        _spread(tile.B_t, tile.dtu, h)
        for s in range(t):
            self.each_h[s + 1].addcmul_(self.each_decay[s], self.each_h[s])
        return decay, h


def _spread(w: Tensor, v: Tensor, out: Tensor) -> None:
    """out (t, b, N, E) = w * v. w: (t, b, N) or (N, E), v: (t, b, E)."""
    torch.mul(w if w.ndim == 2 else w[..., None], v[:, :, None], out=out)


def _over_n(x: Tensor, w: Tensor) -> Tensor:
    """Sum over the states of x * w. x: (t, b, N, E), w: (t, b, N) or (N, E) -> (t, b, E)."""
    if w.ndim == 2:
        return (x * w).sum(2)
    t, b, N, E = x.shape
    return torch.bmm(w.reshape(t * b, 1, N), x.view(t * b, N, E)).view(t, b, E)


def _grad_w(x: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """Gradient by w of (_over_n(x, w) * v).sum(), in w's shape. v: (t, b, E)."""
    if w.ndim == 2:
        return (x * v[:, :, None]).sum((0, 1))
    t, b, N, E = x.shape
    return torch.bmm(v.reshape(t * b, 1, E), x.view(t * b, N, E).mT).view(t, b, N)


def _add(total: Tensor, at: At, part: Tensor) -> None:
    """Put a tile's part (t, b, X) into total (B, T, X), or add it where the parameter is the same at all steps."""
    if part.ndim == 3:
        total[at] = part.transpose(0, 1)
    else:
        total += part


def _gradient_of(x: Tensor | None) -> Tensor | None:
    """Room for x's gradient: parameters add up over tiles, the rest is written once."""
    if x is None:
        return None
    return torch.empty_like(x) if x.ndim == 3 else torch.zeros_like(x)


def _plan(inputs: _Inputs) -> list[list[At]]:
    """Cut (B, T) into tiles: one list per group of rows, in the order of time."""
    (B, T, E), N = inputs.u.shape, inputs.A.size(0)
    rows = min(B, max(1, STEP_ELEMENTS // (N * E)))
    steps = min(T, max(1, TILE_ELEMENTS // (rows * N * E)))
    return [
        [(slice(b, min(b + rows, B)), slice(lo, min(lo + steps, T))) for lo in range(0, T, steps)]
        for b in range(0, B, rows)
    ]


def _sizes(tiles: list[At]) -> tuple[int, int]:
    rows, steps = tiles[0]
    return rows.stop - rows.start, steps.stop - steps.start


class _SelectiveScan(torch.autograd.Function):
    """inputs -> out (B, T, E) in u's dtype and the last state (B, N, E)."""

    @staticmethod
    def forward(ctx, softplus: bool, keep: bool, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        inputs = _Inputs(*tensors)  # pyrefly: ignore[bad-argument-type]
        u, plan = inputs.u, _plan(inputs)
        N, E = inputs.A.shape
        out, last = torch.empty(u.shape, dtype=u.dtype, device=u.device), inputs.A.new_empty(u.size(0), N, E)
        ungated = torch.empty_like(out) if keep and inputs.z is not None else None  # y, for the gradient of z
        borders = inputs.A.new_empty(len(plan[0]) if keep else 0, u.size(0), N, E)
        for tiles in plan:
            buffers, rows = _Buffers(inputs, *_sizes(tiles)), tiles[0][0]
            state = torch.zeros_like(buffers.h[0]) if inputs.h0 is None else inputs.h0[rows]
            for i, at in enumerate(tiles):
                buffers.h[0] = state
                if keep:
                    borders[i, rows] = state
                tile = _Tile(inputs, at, softplus)
                h = buffers.run(tile)[1]
                state, y = h[-1], _over_n(h, tile.C_t)
                if inputs.D is not None:
                    y.addcmul_(tile.u, inputs.D)
                if ungated is not None:
                    _add(ungated, at, y)
                _add(out, at, y if inputs.z is None else y.mul_(F.silu(tile.cut(inputs.z, at))))
            last[rows] = state
        ctx.save_for_backward(*inputs, borders, ungated)
        ctx.softplus, ctx.plan = softplus, plan
        return out, last

    @staticmethod
    @once_differentiable
    def backward(ctx, g_out: Tensor, g_last: Tensor):  # pyrefly: ignore[bad-override]
        *tensors, borders, ungated = ctx.saved_tensors
        inputs = _Inputs(*tensors)
        grads = _Inputs(*map(_gradient_of, inputs))  # pyrefly: ignore[bad-argument-type]
        for tiles in ctx.plan:
            buffers, rows = _Buffers(inputs, *_sizes(tiles)), tiles[0][0]
            carry, dh = g_last[rows].clone(), torch.empty_like(buffers.decay)  # carry: by the state before later tiles
            for i, at in reversed(list(enumerate(tiles))):
                buffers.h[0] = borders[i, rows]
                tile = _Tile(inputs, at, ctx.softplus)
                g = tile.cut(g_out, at)
                if inputs.z is not None and grads.z is not None:
                    z = tile.cut(inputs.z, at)
                    _add(grads.z, at, torch.ops.aten.silu_backward(g * tile.cut(ungated, at), z))
                    g = g * F.silu(z)
                _backward_tile(tile, at, g, buffers, dh, carry, inputs, grads)
            if grads.h0 is not None:
                grads.h0[rows] = carry
        return None, None, *grads[:-2], None, None


def _backward_tile(
    tile: _Tile, at: At, g: Tensor, buffers: _Buffers, dh: Tensor, carry: Tensor, inputs: _Inputs, grads: _Inputs
) -> None:
    """Add a tile's gradients to `grads`. g: (t, b, E) by y; dh: a buffer like decay; carry: (b, N, E), updated."""
    t = g.size(0)
    decay, h = buffers.run(tile)
    dh = dh[:t]
    _spread(tile.C_t, g, dh)
    each_dh = dh.unbind(0)
    each_dh[-1].add_(carry)
    for s in range(t - 1, 0, -1):
        each_dh[s - 1].addcmul_(buffers.each_decay[s], each_dh[s])
    torch.mul(decay[0], dh[0], out=carry)
    _add(grads.C_t, at, _grad_w(h, g, tile.C_t))
    _add(grads.B_t, at, _grad_w(dh, tile.dtu, tile.B_t))
    d_dtu = _over_n(dh, tile.B_t)
    d_dtA = decay.mul_(dh).mul_(buffers.h[:t])
    d_dt = torch.mul(d_dtA, inputs.A, out=dh).sum(2)
    _add(grads.A, at, d_dtA.mul_(tile.dt[:, :, None]).sum((0, 1)))
    d_raw = tile.grad_raw_dt(d_dt.addcmul_(d_dtu, tile.u))
    _add(grads.delta, at, d_raw)
    du = d_dtu.mul_(tile.dt)
    if inputs.D is not None:
        du.addcmul_(g, inputs.D)
        grads.D.add_((g * tile.u).sum((0, 1)))  # pyrefly: ignore[missing-attribute]
    if inputs.bias is not None:
        grads.bias.add_(d_raw.sum((0, 1)))  # pyrefly: ignore[missing-attribute]
    _add(grads.u, at, du)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """u, delta, z: (B, E, T), A: (E, N) real, B, C: (B, N, T), (B, G, N, T) or (E, N), D, delta_bias: (E,)
    -> out (B, E, T) in u's dtype, or (out, last state (B, E, N) float32), as mamba_ssm's selective_scan_fn.

    initial_state: (B, E, N), the state before u, of the first token's document; None = zeros.
    seq_idx: (B, T) document of each token of a packed row; the state is exactly 0 before a document's first token.
    lengths: (B,) valid tokens of right-padded rows, 0 to T; the state stands still beyond, where outputs are finite.
    The state is float32 whatever the inputs are (float64 for float64). Memory is best time-major: (B, T, E) views.
    UserError for a complex A.
    """
    if A.is_complex():
        raise UserError(f"A is {A.dtype}: only real decays are supported, pass A of dtype float32")
    if max(B.ndim, C.ndim) == 4:
        optional = (D, z, delta_bias, initial_state)
        return _grouped(u, delta, A, B, C, optional, delta_softplus, return_last_state, seq_idx, lengths)
    dtype = state_dtype(u)
    valid = None if lengths is None else valid_tokens(u.transpose(1, 2), lengths)
    reset = None
    if seq_idx is not None:
        change = document_starts(seq_idx, valid)
        reset = torch.zeros(change.shape, dtype=dtype, device=u.device).masked_fill_(change, float("-inf"))
    inputs = _Inputs(
        u=time_major(u),
        delta=time_major(delta),
        A=A.t().to(dtype).contiguous(),
        B_t=B.t().to(dtype).contiguous() if B.ndim == 2 else time_major(B),
        C_t=C.t().to(dtype).contiguous() if C.ndim == 2 else time_major(C),
        D=None if D is None else D.to(dtype),
        z=None if z is None else time_major(z),
        bias=None if delta_bias is None else delta_bias.to(dtype),
        h0=None if initial_state is None else initial_state.transpose(1, 2).to(dtype),
        reset=reset,
        pad=None if valid is None else ~valid,
    )
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    out, last = _SelectiveScan.apply(delta_softplus, keep, *inputs)
    return (out.transpose(1, 2), last.transpose(1, 2)) if return_last_state else out.transpose(1, 2)


def _grouped(u, delta, A, B, C, optional, softplus, return_last_state, seq_idx, lengths):
    """selective_scan where B or C is (B, G, N, T): group g serves the g-th part of the channels, one scan each."""
    G = max(w.size(1) for w in (B, C) if w.ndim == 4)
    parts = []
    for g in range(G):
        e = slice(g * A.size(0) // G, (g + 1) * A.size(0) // G)

        def of(w: Tensor, e: slice = e, g: int = g) -> Tensor:
            return w[e] if w.ndim == 2 else w[:, g % w.size(1)] if w.ndim == 4 else w

        D, z, bias, h0 = optional
        D, bias = (None if x is None else x[e] for x in (D, bias))
        z, h0 = (None if x is None else x[:, e] for x in (z, h0))
        parts.append(
            selective_scan(
                u[:, e], delta[:, e], A[e], of(B), of(C), D, z, bias, softplus, True,
                initial_state=h0, seq_idx=seq_idx, lengths=lengths,
            )
        )  # fmt: skip
    out, last = (torch.cat(x, 1) for x in zip(*parts, strict=True))
    return (out, last) if return_last_state else out


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """One step of the scan, for decoding. state: (B, E, N) float32, changed in place; x, dt, z: (B, E), A: (E, N),
    B, C: (B, N), D, dt_bias: (E,) -> (B, E) in x's dtype.

    Quick where the channels of `state` and A lie next to each other in memory, as in the state selective_scan returns.
    """
    dtype, h = state.dtype, state.transpose(1, 2)  # (B, N, E)
    dt = dt.to(dtype) if dt_bias is None else dt + dt_bias.to(dtype)
    dt = F.softplus(dt) if dt_softplus else dt
    u = x.to(dtype)
    h.mul_(torch.exp2((dt * LOG2_E)[:, None] * A.t())).addcmul_((dt * u)[:, None], B.to(dtype)[..., None])
    y = torch.bmm(C.to(dtype)[:, None], h)[:, 0]
    if D is not None:
        y.addcmul_(u, D.to(dtype))
    return (y if z is None else y.mul_(F.silu(z.to(dtype)))).to(x.dtype)
