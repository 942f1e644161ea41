"""Mamba-2's recurrence as products of matrices: state space duality (arXiv 2405.21060, section 6), and one step of it.

Per head h_t = exp(dt_t A) h_(t-1) + dt_t x_t B_t^T and y_t = h_t C_t + D x_t: h is (P, N), the decay one number.
Inside a chunk of Q tokens this is masked attention, C B^T times the decay between the two tokens; from chunk to chunk
one state is carried. C B^T is made once per group of heads, and products with the state take the heads of a group as
one matrix. `_ChunkScan` carries a hand-written gradient, so that a chunk's pieces stay in cache: it keeps the state at
each chunk's start and what that state gave to the outputs. x, B and C are multiplied in x's dtype; decays, sums and
states are float32 (float64 for a float64 x). Decays are powers of two: on CPUs torch vectorises exp2, but not exp.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.ops.rows import document_numbers, valid_tokens

SSD_CHUNK = 64
NO_LIMIT = (0.0, math.inf)


def _chunk_decays(a: Tensor, doc: Tensor | None, hidden: Tensor, lo: int, hi: int) -> tuple[Tensor, ...]:
    """Decays of tokens lo..hi from a = dt A log2(e), (B, H, T); 0 between tokens of two documents, doc (B, T).

    hidden: (Q, Q), 0 where j <= i, else -inf. -> between two tokens (B, H, Q, Q), from the chunk's first state to a
    token and from a token to the chunk's end (B, Q, H, 1), from the first state to the end (B, H, 1, 1).
    """
    s = a[:, :, lo:hi].cumsum(-1)
    hidden = hidden[: hi - lo, : hi - lo]
    since, until = s.exp2(), (s[..., -1:] - s).exp2()
    if doc is not None:
        here, before = doc[:, None, lo:hi], doc[:, None, max(lo - 1, 0), None]  # (B, 1, Q), (B, 1, 1)
        hidden = hidden.masked_fill(here[..., :, None] != here[..., None, :], -math.inf)  # (B, 1, Q, Q)
        since, until = since * (here == before), until * (here == here[..., -1:])
    between = (hidden + s[..., :, None]).sub_(s[..., None, :]).exp2_()
    return between, since.transpose(1, 2)[..., None], until.transpose(1, 2)[..., None], since[..., -1:, None]


def _by_group(x: Tensor, G: int) -> Tensor:
    """(B, Q, H, P) -> (B, G, Q, H/G * P)"""
    return x.reshape(*x.shape[:2], G, -1).transpose(1, 2)


def _by_head(x: Tensor, P: int) -> Tensor:
    """(B, G, Q, H/G * P) -> (B, Q, H, P)"""
    return x.transpose(1, 2).reshape(x.size(0), x.size(2), -1, P)


def _advance_(state: Tensor, decay: Tensor, left: Tensor, right: Tensor) -> None:
    """state <- decay * state + left^T right. (B, H, P, N), (B, H, 1, 1), (B, G, Q, H/G * P), (B, G, Q, N)."""
    state.mul_(decay)
    if left.dtype == state.dtype:
        flat = state.view(-1, left.size(-1), right.size(-1))
        flat.baddbmm_(left.flatten(0, 1).mT, right.flatten(0, 1))
    else:
        state.add_((left.mT @ right).view_as(state))


class _ChunkScan(torch.autograd.Function):
    """The scan with a = dt A given beside dt, (B, T, H) both; D_skip (H, P) or None; doc (B, T) or None."""

    @staticmethod
    def forward(ctx, x, dt, a, B_t, C_t, D_skip, state, doc, hidden, keep):
        (B, T, H, P), (G, N), Q = x.shape, B_t.shape[2:], hidden.size(0)
        a = (a * math.log2(math.e)).transpose(1, 2).contiguous()  # (B, H, T)
        y, state = torch.empty_like(x), state.clone()
        carried = torch.empty_like(x) if keep else None
        states = x.new_empty((T + Q - 1) // Q if keep else 0, B, G, H // G * P, N)
        for lo in range(0, T, Q):
            hi = min(lo + Q, T)
            between, since, until, across = _chunk_decays(a, doc, hidden, lo, hi)
            b, c = B_t[:, lo:hi].transpose(1, 2), C_t[:, lo:hi].transpose(1, 2)  # (B, G, Q, N)
            xd = x[:, lo:hi] * dt[:, lo:hi, :, None]
            weights = between.view(B, G, -1, hi - lo, hi - lo).mul_((c @ b.mT)[:, :, None]).view_as(between)
            own = weights.to(x.dtype) @ xd.transpose(1, 2).to(x.dtype)  # (B, H, Q, P)
            h = state.view(B, G, -1, N).to(x.dtype)
            out = _by_head(c @ h.mT, P) * since
            if carried is not None:
                states[lo // Q], carried[:, lo:hi] = h, out
            out += own.transpose(1, 2)
            y[:, lo:hi] = out if D_skip is None else out.addcmul_(x[:, lo:hi], D_skip)
            _advance_(state, across, _by_group((xd * until).to(x.dtype), G), b)
        ctx.save_for_backward(x, dt, a, B_t, C_t, D_skip, doc, hidden, carried, states)
        return y, state

    @staticmethod
    def backward(ctx, grad, dh):  # pyrefly: ignore[bad-override]
        x, dt, a, B_t, C_t, D_skip, doc, hidden, carried, states = ctx.saved_tensors
        (B, T, _, P), G, Q, dtype = x.shape, B_t.size(2), hidden.size(0), x.dtype
        dx, ddt, da, dB, dC = (torch.empty_like(t) for t in (x, dt, dt, B_t, C_t))
        dD, dh = None if D_skip is None else torch.zeros_like(D_skip), dh.clone(memory_format=torch.contiguous_format)
        for lo in reversed(range(0, T, Q)):
            hi, h = min(lo + Q, T), states[lo // Q]
            xc, d, g, old = x[:, lo:hi], dt[:, lo:hi, :, None], grad[:, lo:hi], carried[:, lo:hi]
            b, c = B_t[:, lo:hi].transpose(1, 2), C_t[:, lo:hi].transpose(1, 2)  # (B, G, Q, N)
            between, since, until, across = _chunk_decays(a, doc, hidden, lo, hi)
            by_group, gh, dhg = (B, G, -1, hi - lo, hi - lo), g.transpose(1, 2).contiguous(), dh.view_as(h).to(dtype)
            scores = (c @ b.mT)[:, :, None]  # (B, G, 1, Q, Q)
            xd = xc * d
            dscores = (gh @ xd.permute(0, 2, 3, 1).to(dtype) * between).view(by_group)
            moved = (dscores * scores).view_as(between)  # gradient of the log decay between two tokens
            moved.diagonal(dim1=-2, dim2=-1).zero_()  # would cancel below but for rounding: a token does not decay
            dscores = dscores.sum(2).to(dtype)
            weights = between.view(by_group).mul_(scores).view_as(between).to(dtype)
            pulled = _by_head(b @ dhg.mT, P) * until  # (B, Q, H, P)
            gs, xu = _by_group((g * since).to(dtype), G), _by_group((xd * until).to(dtype), G)
            dC[:, lo:hi] = (dscores @ b + gs @ h).transpose(1, 2)
            dB[:, lo:hi] = (dscores.mT @ c + xu @ dhg).transpose(1, 2)
            left = (pulled * xd).sum(-1)  # (B, Q, H): through the state at the chunk's end
            ds = (moved.sum(-1) - moved.sum(-2)).transpose(1, 2) + (g * old).sum(-1) - left
            ds[:, -1] += left.sum(1) + (dh * h.view_as(dh)).sum((-1, -2)) * across[..., 0, 0]
            da[:, lo:hi] = ds.flip(1).cumsum(1).flip(1)
            dxd = pulled.add_((weights.mT @ gh).transpose(1, 2))
            ddt[:, lo:hi] = (dxd * xc).sum(-1)
            dxd *= d
            if dD is not None:
                dxd.addcmul_(g, D_skip)
                dD += (g * xc).sum((0, 1))
            dx[:, lo:hi] = dxd
            _advance_(dh, across, gs, c)
        return dx, ddt, da, dB, dC, dD, dh, None, None, None


def _step_sizes(dt: Tensor, dt_bias: Tensor | None, softplus: bool, limit: tuple[float, float]) -> Tensor:
    if dt_bias is not None:
        dt = dt + dt_bias
    if softplus:
        dt = F.softplus(dt)
    return dt if softplus and limit == NO_LIMIT else dt.clamp(*limit)


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int = SSD_CHUNK,
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
    """The scan over a whole sequence; arguments as mamba_ssm's mamba_chunk_scan_combined, whose place it takes.

    x: (B, T, H, P), dt: (B, T, H), A: (H,) negative, B, C: (B, T, G, N) with G dividing H, D: (H,) or (H, P),
    z: (B, T, H, P), y becomes y * silu(z); dt_bias: (H,); initial_states: (B, H, P, N), the first token's document's;
    seq_idx: (B, T), tokens see only their own document; dt is biased, made positive by softplus, then clamped.
    lengths: (B,) valid tokens of right-padded rows; a pad takes a step of size 0, its y means nothing.
    -> y (B, T, H, P) in x's dtype, or (y, final_states (B, H, P, N) float32). Any T; chunk_size changes only the time.
    """
    (Bn, T, H, P), N = x.shape, B.size(-1)
    assert dt.shape == (Bn, T, H) and B.shape == C.shape and H % B.size(2) == 0, (x.shape, dt.shape, B.shape, C.shape)
    wide = torch.promote_types(x.dtype, torch.float32)
    dt, valid = _step_sizes(dt.to(wide), dt_bias, dt_softplus, dt_limit), None
    if lengths is not None:
        valid = valid_tokens(x, lengths)
        dt = dt * valid[..., None]
    if initial_states is None:
        initial_states = torch.zeros(Bn, H, P, N, dtype=wide, device=x.device)
    y, state = _ChunkScan.apply(
        x,
        dt,
        dt * A.to(wide),
        B.to(x.dtype),
        C.to(x.dtype),
        None if D is None else D.to(wide).view(H, -1).expand(H, P),
        initial_states.to(wide).contiguous(),
        None if seq_idx is None else document_numbers(seq_idx, valid),
        torch.full((chunk_size, chunk_size), -math.inf, dtype=wide, device=x.device).triu_(1),
        torch.is_grad_enabled(),
    )
    y = y if z is None else y * F.silu(z)
    return (y, state) if return_final_states else y


def ssd_state_update(
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
    """One step of the recurrence; state (B, H, P, N) float32 is changed in place.

    x: (B, H, P), dt: (B, H), A: (H,), B, C: (B, G, N), D: (H,) or (H, P), z: (B, H, P), dt_bias: (H,)
    -> y (B, H, P) in x's dtype. y = h C is a product and a sum: as matrix times vector, CPUs take ten times as long.
    """
    (Bn, H, P), (G, N), wide = x.shape, B.shape[1:], state.dtype
    dt = _step_sizes(dt.to(wide), dt_bias, dt_softplus, NO_LIMIT)
    xd = (x * dt[..., None]).view(Bn * G, -1, 1)
    state.mul_((dt * A).exp()[..., None, None])
    h = state.view(Bn * G, -1, N)  # (B * G, H/G * P, N)
    h.addcmul_(xd, B.to(wide).reshape(Bn * G, 1, N))
    y = (h * C.to(wide).reshape(Bn * G, 1, N)).sum(-1).view(Bn, H, P)
    if D is not None:
        y = torch.addcmul(y, x.to(wide), D.to(wide).view(H, -1))
    return (y if z is None else y * F.silu(z.to(wide))).to(x.dtype)
