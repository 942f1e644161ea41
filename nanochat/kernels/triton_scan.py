"""Mamba-1 selective scan (arXiv 2312.00752, eq. 2 with the discretisation of 3.2 and Algorithm 2) in Triton.

Per channel e and state n, in float32: h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t,  y_t = <C_t, h_t> + D u_t, gated by
silu(z_t). One program owns a batch row and a block of channels, keeps their states in registers and walks the time;
the forward stores states at chunk borders only, the backward recomputes one chunk at a time from its border.

Checked under Triton's interpreter only, and compiled for sm_80 (tests/test_kernels_triton.py); not yet run on a GPU,
block sizes untuned.
"""

# Postponed annotations: the kernels below must still parse where triton is missing.
from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanochat.ops.rows import document_starts, valid_tokens


def _module(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:  # available() says so
        return None


triton, tl = _module("triton"), _module("triton.language")

CHUNK = 64  # steps between stored states: T / 64 borders and a scratch of 64 states, equal at 4,096 tokens
BLOCK_E_MAX = 32  # channels per program: one warp, so that sums over channels need no shared memory
CELLS = 512  # channels x states per program: 16 float32 registers per thread for each tile


def jit(kernel):
    """triton.jit, or the plain function where triton is missing."""
    return kernel if triton is None else triton.jit(kernel)


def available(device: torch.device) -> str | None:
    """Why our Triton kernels cannot run on this device; None = they can."""
    if triton is None:
        return "triton is not installed: pip install triton"
    if device.type != "cuda" and isinstance(_forward, triton.runtime.JITFunction):
        return f"Triton kernels need a cuda device, got {device.type} (TRITON_INTERPRET=1 runs them slowly, for tests)"
    return None


@jit
def _softplus(x):
    """log(1 + e^x). log(1 + e) alone loses the small steps dt near 1e-3; times e / ((1 + e) - 1) it keeps them."""
    e = tl.exp(tl.minimum(x, 20.0))
    w = 1.0 + e
    exact = tl.log(w) * (e / tl.where(w == 1.0, 1.0, w - 1.0))
    return tl.where(x > 20.0, x, tl.where(w == 1.0, e, exact))


@jit
def _read(u_at, delta_at, B_at, A_en, bias_e, mark, mark_at, e_in, n_in, SOFTPLUS: tl.constexpr):
    """One step's u, dt and d dt / d delta (BLOCK_E,), decay (BLOCK_E, BLOCK_N) and B (BLOCK_N,)."""
    x = tl.load(u_at, mask=e_in, other=0.0).to(tl.float32)
    dt = tl.load(delta_at, mask=e_in, other=0.0).to(tl.float32) + bias_e
    slope = tl.full(dt.shape, 1.0, tl.float32)
    if SOFTPLUS:
        slope = 1.0 / (1.0 + tl.exp(-dt))
        dt = _softplus(dt)
    if mark is not None:  # 1: a document begins, 2: a pad
        m = tl.load(mark + mark_at)
        dt = tl.where(m == 2, 0.0, dt)
        slope = tl.where(m == 2, 0.0, slope)
        decay = tl.where(m == 1, 0.0, tl.exp(dt[:, None] * A_en))
    else:
        decay = tl.exp(dt[:, None] * A_en)
    B_n = tl.load(B_at, mask=n_in, other=0.0).to(tl.float32)
    return x, dt, slope, decay, B_n


@jit
def _channels(pointer, e, e_in):
    """A per-channel parameter (BLOCK_E,) float32, or zeros where there is none."""
    if pointer is None:
        return tl.zeros(e.shape, tl.float32)
    else:  # noqa: RET505 - one return per branch, or Triton compiles both
        return tl.load(pointer + e, mask=e_in, other=0.0).to(tl.float32)


@jit
def _cells(pointer, offset, cell, cell_in):
    """A state (BLOCK_E, BLOCK_N) float32, or zeros where there is none."""
    if pointer is None:
        return tl.zeros(cell.shape, tl.float32)
    else:  # noqa: RET505
        return tl.load(pointer + offset + cell, mask=cell_in, other=0.0)


@jit
def _forward(
    u, delta, A, B, C, D, z, bias, mark, h0, out, last, borders,
    u_b, u_e, u_t, delta_b, delta_e, delta_t, B_b, B_n, B_t, C_b, C_n, C_t, z_b, z_e, z_t,
    E, T, N,
    SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (B, channel blocks). out: (B, T, E), last: (B, E, N), borders: (B, chunks, E, N) or None."""
    b = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    n = tl.arange(0, BLOCK_N)
    e_in, n_in = e < E, n < N
    cell, cell_in = e[:, None] * N + n[None, :], e_in[:, None] & n_in[None, :]
    A_en = _cells(A, 0, cell, cell_in)
    D_e, bias_e = _channels(D, e, e_in), _channels(bias, e, e_in)
    u_at, delta_at = u + b * u_b + e * u_e, delta + b * delta_b + e * delta_e
    B_at, C_at = B + b * B_b + n * B_n, C + b * C_b + n * C_n
    h = _cells(h0, b * E * N, cell, cell_in)
    n_chunks = tl.cdiv(T, CHUNK)
    for c in range(n_chunks):
        if borders is not None:
            tl.store(borders + (b * n_chunks + c) * E * N + cell, h, mask=cell_in)
        for t in range(c * CHUNK, tl.minimum(T, c * CHUNK + CHUNK)):
            x, dt, _, decay, B_t_n = _read(
                u_at + t * u_t, delta_at + t * delta_t, B_at + t * B_t, A_en, bias_e, mark, b * T + t,
                e_in, n_in, SOFTPLUS,
            )  # fmt: skip
            C_t_n = tl.load(C_at + t * C_t, mask=n_in, other=0.0).to(tl.float32)
            h = decay * h + (dt * x)[:, None] * B_t_n[None, :]
            y = tl.sum(h * C_t_n[None, :], 1) + D_e * x
            if z is not None:
                gate = tl.load(z + b * z_b + e * z_e + t * z_t, mask=e_in, other=0.0).to(tl.float32)
                y *= gate / (1.0 + tl.exp(-gate))
            tl.store(out + (b * T + t) * E + e, y, mask=e_in)
    tl.store(last + b * E * N + cell, h, mask=cell_in)


@jit
def _backward(
    u, delta, A, B, C, D, z, bias, mark, borders, scratch, dout, dlast,
    du, ddelta, dz, dA, dB, dC, dD, dbias, dh0,
    u_b, u_e, u_t, delta_b, delta_e, delta_t, B_b, B_n, B_t, C_b, C_n, C_t, z_b, z_e, z_t, dout_b, dout_e, dout_t,
    E, T, N,
    SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid as forward. scratch: (B, CHUNK, E, N); du, ddelta, dz: (B, T, E); dA, dh0: (B, E, N); dD, dbias: (B, E);
    dB, dC: (B, channel blocks, T, N), each block's own sum, so that the total does not depend on who comes first."""
    b = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    n = tl.arange(0, BLOCK_N)
    e_in, n_in = e < E, n < N
    cell, cell_in = e[:, None] * N + n[None, :], e_in[:, None] & n_in[None, :]
    A_en = _cells(A, 0, cell, cell_in)
    D_e, bias_e = _channels(D, e, e_in), _channels(bias, e, e_in)
    u_at, delta_at = u + b * u_b + e * u_e, delta + b * delta_b + e * delta_e
    B_at, C_at = B + b * B_b + n * B_n, C + b * C_b + n * C_n
    block_row = (b * tl.num_programs(1) + tl.program_id(1)) * T
    g = _cells(dlast, b * E * N, cell, cell_in)  # gradient of the state after step t
    dA_en = tl.zeros((BLOCK_E, BLOCK_N), tl.float32)
    dD_e, dbias_e = tl.zeros((BLOCK_E,), tl.float32), tl.zeros((BLOCK_E,), tl.float32)
    n_chunks = tl.cdiv(T, CHUNK)
    for i in range(n_chunks):
        lo = (n_chunks - 1 - i) * CHUNK
        size = tl.minimum(T - lo, CHUNK)
        h = _cells(borders, (b * n_chunks + n_chunks - 1 - i) * E * N, cell, cell_in)
        for k in range(size):  # the states before each step of this chunk
            tl.store(scratch + (b * CHUNK + k) * E * N + cell, h, mask=cell_in)
            t = lo + k
            x, dt, _, decay, B_t_n = _read(
                u_at + t * u_t, delta_at + t * delta_t, B_at + t * B_t, A_en, bias_e, mark, b * T + t,
                e_in, n_in, SOFTPLUS,
            )  # fmt: skip
            h = decay * h + (dt * x)[:, None] * B_t_n[None, :]
        tl.debug_barrier()  # scratch is written before another thread may read it
        for j in range(size):
            k = size - 1 - j
            t = lo + k
            x, dt, slope, decay, B_t_n = _read(
                u_at + t * u_t, delta_at + t * delta_t, B_at + t * B_t, A_en, bias_e, mark, b * T + t,
                e_in, n_in, SOFTPLUS,
            )  # fmt: skip
            C_t_n = tl.load(C_at + t * C_t, mask=n_in, other=0.0).to(tl.float32)
            dy = tl.load(dout + b * dout_b + e * dout_e + t * dout_t, mask=e_in, other=0.0).to(tl.float32)
            before = _cells(scratch, (b * CHUNK + k) * E * N, cell, cell_in)
            h = decay * before + (dt * x)[:, None] * B_t_n[None, :]
            row = (b * T + t) * E + e
            if z is not None:
                gate = tl.load(z + b * z_b + e * z_e + t * z_t, mask=e_in, other=0.0).to(tl.float32)
                s = 1.0 / (1.0 + tl.exp(-gate))
                y = tl.sum(h * C_t_n[None, :], 1) + D_e * x
                tl.store(dz + row, dy * y * s * (1.0 + gate * (1.0 - s)), mask=e_in)
                dy *= gate * s
            g += dy[:, None] * C_t_n[None, :]
            gB = tl.sum(g * B_t_n[None, :], 1)
            dlog = g * before * decay  # gradient of dt_t A
            ddt = (x * gB + tl.sum(dlog * A_en, 1)) * slope
            tl.store(du + row, dt * gB + D_e * dy, mask=e_in)
            tl.store(ddelta + row, ddt, mask=e_in)
            tl.store(dB + (block_row + t) * N + n, tl.sum(g * (dt * x)[:, None], 0), mask=n_in)
            tl.store(dC + (block_row + t) * N + n, tl.sum(dy[:, None] * h, 0), mask=n_in)
            dA_en += dlog * dt[:, None]
            dD_e += dy * x
            dbias_e += ddt
            g *= decay
        tl.debug_barrier()  # and read before the next chunk overwrites it
    tl.store(dA + b * E * N + cell, dA_en, mask=cell_in)
    tl.store(dh0 + b * E * N + cell, g, mask=cell_in)
    tl.store(dD + b * E + e, dD_e, mask=e_in)
    tl.store(dbias + b * E + e, dbias_e, mask=e_in)


def _strides(*tensors: Tensor | None) -> list[int]:
    return [s for t in tensors for s in ((0, 0, 0) if t is None else t.stride())]


def _blocks(N: int) -> dict[str, int]:
    block_n = triton.next_power_of_2(N)
    return {"CHUNK": CHUNK, "BLOCK_E": max(1, min(BLOCK_E_MAX, CELLS // block_n)), "BLOCK_N": block_n, "num_warps": 1}


class _SelectiveScan(torch.autograd.Function):
    """(u, delta, A, B, C, D, z, delta_bias, h0, mark, softplus, keep) -> y (B, E, T), last state (B, E, N) float32."""

    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, z, bias, h0, mark, softplus: bool, keep: bool):
        (b, E, T), N, blocks = u.shape, A.size(1), _blocks(A.size(1))
        out = u.new_empty(b, T, E).transpose(1, 2)
        last = u.new_empty(b, E, N, dtype=torch.float32)
        borders = u.new_empty(b, -(-T // CHUNK), E, N, dtype=torch.float32) if keep else None
        with torch.cuda.device_of(u):
            _forward[b, triton.cdiv(E, blocks["BLOCK_E"])](
                u, delta, A, B, C, D, z, bias, mark, h0, out, last, borders, *_strides(u, delta, B, C, z), E, T, N,
                SOFTPLUS=softplus, **blocks,
            )  # fmt: skip
        ctx.save_for_backward(u, delta, A, B, C, D, z, bias, mark, borders)
        ctx.softplus, ctx.has_h0 = softplus, h0 is not None
        ctx.set_materialize_grads(False)
        return out, last

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor | None, dlast: Tensor | None):  # pyrefly: ignore[bad-override]
        u, delta, A, B, C, D, z, bias, mark, borders = ctx.saved_tensors
        (b, E, T), N, blocks = u.shape, A.size(1), _blocks(A.size(1))
        n_blocks = triton.cdiv(E, blocks["BLOCK_E"])
        dout = torch.zeros_like(u) if dout is None else dout
        dlast = None if dlast is None else dlast.contiguous()
        du, ddelta, dz = (like.new_empty(b, T, E) for like in (u, delta, u if z is None else z))
        new = {"dtype": torch.float32, "device": u.device}
        dA, dh0 = (torch.empty(b, E, N, **new) for _ in range(2))
        dD, dbias = (torch.empty(b, E, **new) for _ in range(2))
        dB, dC = (torch.empty(b, n_blocks, T, N, **new) for _ in range(2))
        scratch = torch.empty(b, CHUNK, E, N, **new)
        with torch.cuda.device_of(u):
            _backward[b, n_blocks](
                u, delta, A, B, C, D, z, bias, mark, borders, scratch, dout, dlast,
                du, ddelta, dz, dA, dB, dC, dD, dbias, dh0, *_strides(u, delta, B, C, z, dout), E, T, N,
                SOFTPLUS=ctx.softplus, **blocks,
            )  # fmt: skip
        dB, dC = (t.sum(1).to(like.dtype).transpose(1, 2) for t, like in ((dB, B), (dC, C)))  # (B, N, T)
        return (
            du.transpose(1, 2), ddelta.transpose(1, 2), dA.sum(0), dB, dC, None if D is None else dD.sum(0),
            None if z is None else dz.transpose(1, 2), None if bias is None else dbias.sum(0),
            dh0 if ctx.has_h0 else None, None, None, None,
        )  # fmt: skip


def _marks(u: Tensor, seq_idx: Tensor | None, lengths: Tensor | None) -> Tensor | None:
    """(B, T) int8: 1 where a document begins behind another one, 2 on pads, else 0; None where all would be 0."""
    if seq_idx is None and lengths is None:
        return None
    mark = u.new_zeros(u.size(0), u.size(2), dtype=torch.int8)
    if seq_idx is not None:
        mark = document_starts(seq_idx).to(torch.int8)
    if lengths is not None:
        mark.masked_fill_(~valid_tokens(u.transpose(1, 2), lengths), 2)
    return mark


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
    """Mamba-1 scan with the meaning of mamba_ssm's selective_scan_ref; float32 inside, y in u's dtype, (B, E, T).

    u, delta, z: (B, E, T); A: (E, N); B, C: (B, N, T); D, delta_bias: (E,). Any strides; quickest where transpose(1, 2)
    is contiguous, as that of y is. initial_state: (B, E, N), belongs to the document of the first token. seq_idx:
    (B, T) document index, the state starts from 0 where it changes. lengths: (B,) valid tokens of right-padded rows; a
    pad has dt = 0 and begins no document, so the state passes it unchanged. return_last_state: also the last state,
    (B, E, N) float32. Differentiable once, in every float argument and through the last state. The gradients of B and C
    are summed from one float32 copy per block of channels: 2 * 4 T N E / 32 bytes per row while the backward runs,
    N <= 16. `available` must be None.
    """
    assert u.shape == delta.shape and (z is None or z.shape == u.shape), (u.shape, delta.shape)
    assert B.shape == C.shape == (u.size(0), A.size(1), u.size(2)), (B.shape, C.shape)
    assert all(abs(t.stride(2)) * u.size(2) < 2**31 for t in (u, delta, B, C)), "offsets within a row are int32"
    D, bias, h0 = (None if t is None else t.float().contiguous() for t in (D, delta_bias, initial_state))
    A, mark, keep = A.float().contiguous(), _marks(u, seq_idx, lengths), torch.is_grad_enabled()
    y, last = _SelectiveScan.apply(u, delta, A, B, C, D, z, bias, h0, mark, delta_softplus, keep)
    return (y, last) if return_last_state else y
