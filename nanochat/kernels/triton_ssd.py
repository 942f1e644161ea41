"""Mamba-2's scan (SSD, arXiv 2405.21060, section 6) over all chunks at once, with the chunk states in Triton.

Within a chunk of Q tokens y = (C B^T * decay) (dt x), batched products of torch; each chunk adds
S[p, n] = sum_q w[q] x[q, p] B[q, n] per head to the state, w = dt * decay to the chunk's end; one state is carried from
chunk to chunk. For S an einsum would first repeat B for every head of its group; here a program reads it where it lies.
Products of x, B and C in their own dtype with float32 sums (float32 inputs: chunk states without TF32, the other
products as torch's matmul setting has it).

Checked under Triton's interpreter only, and compiled for sm_80 (tests/test_kernels_triton.py); not yet run on a GPU,
block sizes untuned.
"""

# Postponed annotations: the kernels below must still parse where triton is missing.
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from nanochat.kernels.optional import NO_LIMIT, documents
from nanochat.kernels.triton_scan import jit, tl, triton
from nanochat.ops.rows import valid_tokens

BLOCK = 64  # rows and columns of a tile at most


@jit
def _load(base, rows, cols, n_rows, n_cols, row_stride, col_stride):
    inside = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    return tl.load(base + rows[:, None] * row_stride + cols[None, :] * col_stride, mask=inside, other=0.0)


@jit
def _forward(
    x, w, B, out, x_b, x_c, x_q, x_h, x_p, B_b, B_c, B_q, B_g, B_n, nc, Q, H, P, G, N,
    BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (batch x chunk x head, P blocks, N blocks). out: (B, nc, H, P, N), w: (B, nc, Q, H), both contiguous."""
    bch = tl.program_id(0).to(tl.int64)
    h, bc = bch % H, bch // H
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    x += (bc // nc) * x_b + (bc % nc) * x_c + h * x_h
    B += (bc // nc) * B_b + (bc % nc) * B_c + h // (H // G) * B_g
    acc = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for i in range(tl.cdiv(Q, BLOCK_Q)):
        q = i * BLOCK_Q + tl.arange(0, BLOCK_Q)
        w_q = tl.load(w + (bc * Q + q) * H + h, mask=q < Q, other=0.0)
        x_pq = _load(x, p, q, P, Q, x_p, x_q)
        B_qn = _load(B, q, n, Q, N, B_q, B_n)
        acc += tl.dot(x_pq, (w_q[:, None] * B_qn).to(x_pq.dtype), input_precision="ieee")
    inside = (p < P)[:, None] & (n < N)[None, :]
    tl.store(out + (bch * P + p[:, None]) * N + n[None, :], acc, mask=inside)


@jit
def _backward_x(
    x, w, B, ds, dx, dw, x_b, x_c, x_q, x_h, x_p, B_b, B_c, B_q, B_g, B_n, nc, Q, H, P, G, N,
    BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (batch x chunk x head, Q blocks). dx: (B, nc, Q, H, P), dw: (B, nc, Q, H), ds as out."""
    bch = tl.program_id(0).to(tl.int64)
    h, bc = bch % H, bch // H
    q = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    x += (bc // nc) * x_b + (bc % nc) * x_c + h * x_h
    B += (bc // nc) * B_b + (bc % nc) * B_c + h // (H // G) * B_g
    at = (bc * Q + q) * H + h
    w_q = tl.load(w + at, mask=q < Q, other=0.0)
    dw_q = tl.zeros((BLOCK_Q,), tl.float32)
    for j in range(tl.cdiv(P, BLOCK_P)):
        p = j * BLOCK_P + tl.arange(0, BLOCK_P)
        m = tl.zeros((BLOCK_Q, BLOCK_P), tl.float32)  # dS^T B: the gradient of w x
        for i in range(tl.cdiv(N, BLOCK_N)):
            n = i * BLOCK_N + tl.arange(0, BLOCK_N)
            B_qn = _load(B, q, n, Q, N, B_q, B_n)
            ds_np = _load(ds + bch * P * N, n, p, N, P, 1, N)
            m += tl.dot(B_qn, ds_np.to(B_qn.dtype), input_precision="ieee")
        x_qp = _load(x, q, p, Q, P, x_q, x_p).to(tl.float32)
        dw_q += tl.sum(x_qp * m, 1)
        tl.store(dx + at[:, None] * P + p[None, :], w_q[:, None] * m, mask=(q < Q)[:, None] & (p < P)[None, :])
    tl.store(dw + at, dw_q, mask=q < Q)


@jit
def _backward_B(
    x, w, ds, dB, x_b, x_c, x_q, x_h, x_p, nc, Q, H, P, G, N,
    BLOCK_Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (batch x chunk x group, Q blocks, N blocks). dB: (B, nc, Q, G, N), summed over the heads."""
    bcg = tl.program_id(0).to(tl.int64)
    grp, bc = bcg % G, bcg // G
    q = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    x += (bc // nc) * x_b + (bc % nc) * x_c
    acc = tl.zeros((BLOCK_Q, BLOCK_N), tl.float32)
    for i in range(H // G):
        h = grp * (H // G) + i
        w_q = tl.load(w + (bc * Q + q) * H + h, mask=q < Q, other=0.0)
        for j in range(tl.cdiv(P, BLOCK_P)):
            p = j * BLOCK_P + tl.arange(0, BLOCK_P)
            x_qp = _load(x + h * x_h, q, p, Q, P, x_q, x_p)
            ds_pn = _load(ds + (bc * H + h) * P * N, p, n, P, N, N, 1)
            acc += w_q[:, None] * tl.dot(x_qp, ds_pn.to(x_qp.dtype), input_precision="ieee")
    at = (bc * Q + q) * G + grp
    tl.store(dB + at[:, None] * N + n[None, :], acc, mask=(q < Q)[:, None] & (n < N)[None, :])


def _blocks(Q: int, P: int, N: int) -> dict[str, int]:
    """Edges of the tiles: powers of two, at least 16 (tl.dot), at most BLOCK, so that they fit into shared memory."""
    edges = (min(BLOCK, max(16, triton.next_power_of_2(n))) for n in (Q, P, N))
    return dict(zip(("BLOCK_Q", "BLOCK_P", "BLOCK_N"), edges, strict=True))


class _ChunkStates(torch.autograd.Function):
    """x (B, nc, Q, H, P), w (B, nc, Q, H) float32, B (B, nc, Q, G, N) -> (B, nc, H, P, N) float32."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, B: Tensor) -> Tensor:
        (b, nc, Q, H, P), (G, N) = x.shape, B.shape[3:]
        out = x.new_empty(b, nc, H, P, N, dtype=torch.float32)
        blocks = _blocks(Q, P, N)
        grid = (b * nc * H, triton.cdiv(P, blocks["BLOCK_P"]), triton.cdiv(N, blocks["BLOCK_N"]))
        with torch.cuda.device_of(x):
            _forward[grid](x, w, B, out, *x.stride(), *B.stride(), nc, Q, H, P, G, N, **blocks)
        ctx.save_for_backward(x, w, B)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, ds: Tensor):  # pyrefly: ignore[bad-override]
        x, w, B = ctx.saved_tensors
        (b, nc, Q, H, P), (G, N) = x.shape, B.shape[3:]
        ds = ds.contiguous()
        dx, dw, dB = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, w, B))
        blocks = _blocks(Q, P, N)
        rows, cols, sizes = triton.cdiv(Q, blocks["BLOCK_Q"]), triton.cdiv(N, blocks["BLOCK_N"]), (nc, Q, H, P, G, N)
        with torch.cuda.device_of(x):
            _backward_x[b * nc * H, rows](x, w, B, ds, dx, dw, *x.stride(), *B.stride(), *sizes, **blocks)
            _backward_B[b * nc * G, rows, cols](x, w, ds, dB, *x.stride(), *sizes, **blocks)
        return dx, dw, dB


def chunk_states(x: Tensor, dt: Tensor, decay_to_end: Tensor, B: Tensor) -> Tensor:
    """What each chunk adds to the state: sum over its tokens of decay_to_end * dt * x B^T.

    x: (B, nc, Q, H, P), dt: (B, nc, Q, H), decay_to_end: (B, nc, Q, H) float32, exp taken and 0 where a later document
    begins, B: (B, nc, Q, G, N) in x's dtype, G divides H -> (B, nc, H, P, N) float32. Any strides. Differentiable once,
    in all four. `triton_scan.available` must be None.
    """
    assert x.dtype == B.dtype and x.size(3) % B.size(3) == 0, (x.dtype, B.dtype, x.shape, B.shape)
    if not x.is_cuda:  # the interpreter's dot reads bfloat16 as integers
        x, B = x.float(), B.float()
    return _ChunkStates.apply(x, (dt.float() * decay_to_end).contiguous(), B)


def _chunks(x: Tensor, Q: int) -> Tensor:
    """(B, T, ...) -> (B, nc, Q, ...) with zeros behind T."""
    pad = -x.size(1) % Q
    return (F.pad(x, (0, 0) * (x.ndim - 2) + (0, pad)) if pad else x).unflatten(1, (-1, Q))


def _chunk_decays(a: Tensor, doc: Tensor | None) -> tuple[Tensor, ...]:
    """Decays from a = dt A, (B, nc, H, Q) float32; exactly 0 between tokens of two documents, doc (B, nc, Q) or None.

    -> between two tokens (B, nc, H, Q, Q), 0 where the first is the later one; from the state before the chunk to a
    token and from a token to the chunk's end (B, nc, H, Q); from the state before to the end (B, nc, H).
    """
    s = a.cumsum(-1)
    hidden = torch.ones(a.size(-1), a.size(-1), dtype=torch.bool, device=a.device).triu_(1)
    since, until = s, s[..., -1:] - s
    if doc is not None:
        hidden = hidden | (doc[..., :, None] != doc[..., None, :])[:, :, None]  # (B, nc, 1, Q, Q)
        before = torch.cat((doc[:, :1, :1], doc[:, :-1, -1:]), 1)  # (B, nc, 1): of the token before the chunk
        since = since.masked_fill((doc != before)[:, :, None], -math.inf)
        until = until.masked_fill((doc != doc[..., -1:])[:, :, None], -math.inf)
    between = (s[..., :, None] - s[..., None, :]).masked_fill(hidden, -math.inf)
    return between.exp(), since.exp(), until.exp(), since[..., -1].exp()


def _carry(states: Tensor, across: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """states: (B, nc, H, P, N) added by each chunk, across: (B, nc, H), state: (B, H, P, N) before the first one
    -> the states before each chunk, (B, nc, H, P, N), and behind the last."""
    before = []
    for added, decay in zip(states.unbind(1), across[..., None, None].unbind(1), strict=True):
        before.append(state)
        state = torch.addcmul(added, decay, state)
    return torch.stack(before, 1), state


def _outputs(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, decays: tuple[Tensor, ...], before: Tensor) -> Tensor:
    """What the chunk's own tokens and the state before it give: x (B, nc, Q, H, P) -> y (B, nc, Q, H, P) float32."""
    G, between, since = B.size(3), *decays[:2]
    b, c = B.transpose(2, 3), C.transpose(2, 3)  # (B, nc, G, Q, N)
    weights = between.unflatten(2, (G, -1)) * (c @ b.mT)[:, :, :, None]  # (B, nc, G, H/G, Q, Q)
    xd = (x * dt[..., None]).to(x.dtype).transpose(2, 3)  # (B, nc, H, Q, P)
    own = weights.flatten(2, 3).to(x.dtype) @ xd
    h = before.to(x.dtype).unflatten(2, (G, -1)).flatten(3, 4)  # (B, nc, G, H/G * P, N)
    carried = (c @ h.mT).unflatten(-1, (-1, x.size(-1))).transpose(3, 4).flatten(2, 3)  # (B, nc, H, Q, P)
    return torch.addcmul(own.float(), since[..., None], carried.float()).transpose(2, 3)


def _scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """ssd_scan, with the final states, keeping all that its backward needs."""
    (_, T, H, P), N, pad = x.shape, B.size(-1), -x.size(1) % chunk_size
    dt = dt.float() if dt_bias is None else dt.float() + dt_bias
    dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
    doc = None
    if lengths is not None:
        dt = torch.where(valid_tokens(x, lengths)[..., None], dt, 0.0)
    if seq_idx is not None:
        doc = documents(seq_idx, lengths)
        doc = torch.cat((doc, doc[:, -1:].expand(-1, pad)), 1).unflatten(1, (-1, chunk_size))
    xs, Bs, Cs = (_chunks(t.to(x.dtype), chunk_size) for t in (x, B, C))
    dt = _chunks(dt, chunk_size)
    decays = _chunk_decays((dt * A.float()).transpose(2, 3), doc)
    added = chunk_states(xs, dt, decays[2].transpose(2, 3), Bs)
    state = added.new_zeros(x.size(0), H, P, N) if initial_states is None else initial_states.float()
    before, state = _carry(added, decays[3], state)
    y = _outputs(xs, dt, Bs, Cs, decays, before).flatten(1, 2)[:, :T]
    if D is not None:
        y = torch.addcmul(y, x.float(), D.float().view(H, -1))
    y = (y if z is None else y * F.silu(z.float())).to(x.dtype)
    return y, state


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int = 64,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = NO_LIMIT,
    return_final_states: bool = False,
    *,
    lengths: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`ops.ssd_scan`, all chunks at once.

    x, z: (B, T, H, P), dt: (B, T, H), A, dt_bias: (H,), B, C: (B, T, G, N), D: (H,) or (H, P), initial_states:
    (B, H, P, N), seq_idx: (B, T), lengths: (B,) -> y (B, T, H, P) in x's dtype, or (y, final_states (B, H, P, N)
    float32). Any T.

    Differentiable once. The backward computes the scan again: kept, the B T H Q decays in float32, as many weights and
    a state (H, P, N) per chunk of every layer of mamba2_d20 are 95 GB at 32 x 2,048 tokens. `triton_scan.available`
    must be None.
    """
    inputs = (x, dt, A, B, C, chunk_size, D, z, dt_bias, initial_states, seq_idx, dt_softplus, dt_limit, lengths)
    if torch.is_grad_enabled():
        y, state = checkpoint(_scan, *inputs, use_reentrant=False, preserve_rng_state=False)
    else:
        y, state = _scan(*inputs)
    return (y, state) if return_final_states else y
