"""Gated DeltaNet (arXiv 2412.06464): a matrix memory that forgets by a gate and corrects what it holds under a key.

Per head, with the state S (K, V), log decay g_t and writing strength beta_t:

    S_t = exp(g_t) S_{t-1} + k_t (beta_t (v_t - exp(g_t) S_{t-1}^T k_t))^T,    o_t = scale * S_t^T q_t

In a chunk of Q tokens that starts from S, the corrections U (Q, V) solve a unit lower triangular system (the WY form of
arXiv 2406.06484, with decays as in arXiv 2412.06464, section 3.3):

    (I + A) U = beta (V - e^G K S),    A_ij = beta_i e^(G_i - G_j) k_i.k_j for j < i,    G = cumsum(g)

so all the work is matrix products. Unlike the papers we never form W = (I + A)^-1 beta e^G K: subtracting K S before
the solve takes one product less per chunk. Decays, the inverse and the states are float32; products take the inputs'
dtype.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.config import UserError
from nanochat.ops.rows import document_starts, valid_tokens

CHUNK = 64  # tokens
LEAF = 16  # order below which an inverse is not split further


def unit_lower_inverse(A: Tensor) -> Tensor:
    """(I + A)^-1 of the strictly lower part of A (whatever else A holds is ignored): (..., Q, Q) -> (..., Q, Q)."""
    Q = A.size(-1)
    if Q <= LEAF or Q % 2:
        eye = torch.eye(Q, dtype=A.dtype, device=A.device)
        return torch.linalg.solve_triangular(A, eye.expand_as(A), upper=False, unitriangular=True)
    h = Q // 2
    top, low = unit_lower_inverse(torch.stack((A[..., :h, :h], A[..., h:, h:]))).unbind()
    out = torch.zeros_like(A)
    out[..., :h, :h], out[..., h:, h:] = top, low
    out[..., h:, :h] = -(low @ A[..., h:, :h] @ top)
    return out


def _to_chunks(x: Tensor, Q: int) -> Tensor:
    """(B, T, H, ...) -> (C, B H, Q, ...)."""
    x = x.unflatten(1, (-1, Q)).transpose(0, 1).transpose(2, 3)  # (C, B, H, Q, ...)
    return x.flatten(1, 2)


def _from_chunks(x: Tensor, B: int) -> Tensor:
    """(C, B H, Q, ...) -> (B, T, H, ...)."""
    return x.unflatten(1, (B, -1)).transpose(0, 1).transpose(2, 3).flatten(1, 2)


def _decays(g: Tensor, doc: Tensor | None, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Products of the decays between two places of a chunk, 0 across documents. g, doc: (C, N, Q) ->

    pairs (C, N, 2 Q, Q): from token j to token i, for j < i (keys), then for j <= i and times scale (queries);
    read (C, N, 2 Q, 1): from the chunk's start to token i, and the same times scale;
    write (C, N, Q, 1): from token j to the chunk's end; carry (C, N, 1, 1): over the whole chunk.
    """
    Q = g.size(-1)
    lower = torch.ones(Q, Q, dtype=torch.bool, device=g.device).tril()
    # sums over j < t <= i, not differences of G: next to g = -50 a difference has lost the digits of the small ones
    pairs = torch.where(lower.tril(-1), g[..., None], 0.0).cumsum_(-2).exp_()  # (C, N, Q, Q)
    read = g.cumsum(-1).exp_()[..., None]  # (C, N, Q, 1)
    if doc is not None:
        lower = lower & (doc[..., None] == doc[..., None, :])
        before = torch.cat((doc[:1, :, :1], doc[:-1, :, -1:]))  # of the state that comes in, (C, N, 1)
        read = read * (doc == before)[..., None]
    pairs = pairs.mul_(lower)
    write, carry = pairs[..., -1, :, None].contiguous(), read[..., -1:, :]
    return torch.cat((pairs.tril(-1), pairs * scale), -2), torch.cat((read, read * scale), -2), write, carry


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Over the last axis, summed in float32 at least."""
    return (a * b).sum(-1, dtype=torch.promote_types(a.dtype, torch.float32))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in place; total may be of higher precision than a and b."""
    if total.dtype == a.dtype:
        total.baddbmm_(a, b)
    else:
        total += torch.bmm(a, b)


class _GatedDeltaRule(torch.autograd.Function):
    """The chunked rule with its gradient; T is a multiple of Q. Kept for the backward: q, k, U, three (T, Q), C states.

    The triangular system is never differentiated as such: with dR = (I + A)^-T dU, its gradient is dA = -dR U^T.
    """

    @staticmethod
    def forward(ctx, q, k, v, g, beta, state, doc, scale: float, Q: int):
        """q, k: (B, T, H, K), v: (B, T, H, V), g, beta: (B, T, H) and state (B, H, K, V) float32, doc: (C, B H, Q)."""
        dtype, keep = q.dtype, any(ctx.needs_input_grad)
        kq = torch.cat((_to_chunks(k, Q), _to_chunks(q, Q)), 2)  # (C, N, 2 Q, K), N = B H
        values, gates, betas = _to_chunks(v, Q), _to_chunks(g, Q), _to_chunks(beta, Q)[..., None]
        pairs, read, write, carry = _decays(gates, doc, scale)
        pairs *= kq @ kq[:, :, :Q].mT
        pairs[:, :, :Q] *= betas  # A, then what queries read of U
        inverse, pairs = unit_lower_inverse(pairs[:, :, :Q]).to(dtype), pairs.to(dtype)
        S = state.flatten(0, 1).clone()  # (N, K, V)
        low = S.to(dtype, copy=keep)
        states, U, out = [], [], torch.empty_like(values)
        for c, (x, v_c, b) in enumerate(zip(kq, values, betas, strict=True)):
            seen = torch.bmm(x, low) * read[c]  # what the state says to keys and to queries, (N, 2 Q, V)
            u = torch.bmm(inverse[c], ((v_c - seen[:, :Q]) * b).to(dtype))  # (N, Q, V)
            torch.baddbmm(seen[:, Q:].to(dtype), pairs[c, :, Q:], u, out=out[c])
            _add_product(S.mul_(carry[c]), x[:, :Q].mT, (u * write[c]).to(dtype))
            if keep:
                states.append(low)
                U.append(u)
            low = S.to(dtype, copy=keep)
        ctx.save_for_backward(kq, v, g, beta, doc, inverse, pairs, *states, *U)
        ctx.scale, ctx.Q = scale, Q
        return _from_chunks(out, len(q)), S.view_as(state)

    @staticmethod
    def backward(ctx, grad_out, grad_state):  # pyrefly: ignore[bad-override]
        kq, v, g, beta, doc, inverse, pairs, *rest = ctx.saved_tensors
        (C, N, _, K), B, Q, dtype = kq.shape, len(v), ctx.Q, kq.dtype
        states, U = rest[:C], rest[C:]
        betas = _to_chunks(beta, Q)[..., None]
        decays, read, write, carry = _decays(_to_chunks(g, Q), doc, ctx.scale)
        grad_out = _to_chunks(grad_out, Q)
        dU = pairs[:, :, Q:].mT @ grad_out  # (C, N, Q, V), from the outputs of the same chunk
        dR, d_row, d_col = torch.empty_like(dU), torch.empty_like(kq), kq.new_empty(C, N, Q, K)
        into, within, out_of, over = (g.new_empty(C, N, n) for n in (2 * Q, 2 * Q, Q, 1))  # gradients of log decays
        dS = grad_state.flatten(0, 1).clone()  # (N, K, V)
        for c in reversed(range(C)):
            k, dS_c = kq[c, :, :Q], dS.to(dtype)
            torch.bmm((U[c] * write[c]).to(dtype), dS_c.mT, out=d_col[c])
            out_of[c] = _dot(k, d_col[c])
            torch.bmm(inverse[c].mT, dU[c] + (torch.bmm(k, dS_c) * write[c]).to(dtype), out=dR[c])
            y = torch.cat((-dR[c], grad_out[c]), 1)  # (N, 2 Q, V)
            d_seen = (y * read[c]).to(dtype)
            torch.bmm(d_seen, states[c].mT, out=d_row[c])
            into[c] = _dot(kq[c], d_row[c])
            y = torch.bmm(y, U[c].mT)  # (N, 2 Q, Q)
            flow = y.to(g.dtype) * pairs[c]
            within[c] = flow.sum(-1)
            within[c, :, :Q] -= flow.sum(-2)
            y = (y * decays[c]).to(dtype)
            d_row[c].baddbmm_(y, k)
            y[:, :Q] *= betas[c]
            d_seen[:, :Q] *= betas[c]
            d_col[c].baddbmm_(y.mT, kq[c])
            over[c, :, 0] = torch.linalg.vecdot(states[c].flatten(1).to(dS.dtype), dS.flatten(1))
            _add_product(dS.mul_(carry[c]), kq[c].mT, d_seen)
        into[..., :Q] *= betas[..., 0]
        dG = (into + within).unflatten(-1, (2, Q)).sum(-2) - out_of
        dG[..., -1:] += out_of.sum(-1, keepdim=True) + over * carry[..., 0]
        dg = dG.flip(-1).cumsum(-1).flip(-1)
        k, dk = kq[:, :, :Q], d_row[:, :, :Q]
        by_key = _dot(k, dk)
        d_beta = by_key + _dot(_to_chunks(v, Q), dR)
        grads = d_row[:, :, Q:], d_col + (dk * betas).to(dtype), (dR * betas).to(dtype), dg, d_beta
        return *(_from_chunks(x, B) for x in grads), dS.unflatten(0, (B, -1)), None, None, None


def _check(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> None:
    """The shapes of the rule, after any batch and time axes: q, k (..., Hk, K), v (..., H, V), g, beta (..., H)."""
    if q.shape != k.shape or q.shape[:-2] != v.shape[:-2] or not g.shape == beta.shape == v.shape[:-1]:
        given = ", ".join(
            f"{n} {tuple(x.shape)}" for n, x in zip(("q", "k", "v", "g", "beta"), (q, k, v, g, beta), strict=True)
        )
        raise UserError(f"{given}: expected q and k (..., Hk, K), v (..., H, V), g and beta (..., H)")
    if v.size(-2) % q.size(-2):
        raise UserError(f"{v.size(-2)} value heads and {q.size(-2)} key heads: make the second divide the first")


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    chunk_size: int = CHUNK,
    *,
    seq_idx: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The gated delta rule over whole sequences -> o (B, T, H, V) in q's dtype, and the final state if asked for.

    q, k: (B, T, Hk, K), normalised by the caller; v: (B, T, H, V), head h reads q/k head h // (H / Hk);
    g: (B, T, H) log decay <= 0; beta: (B, T, H) in 0..1; scale: of o, default K^-0.5.
    initial_state: (B, H, K, V), default zero; the final state is float32. chunk_size: tokens; best a power of two.
    seq_idx: (B, T) document of each token in packed rows; documents do not see each other, and the initial state
    belongs to the first token's. lengths: (B,) valid tokens of right-padded rows, 0 allowed; the state stops there,
    outputs behind it mean nothing.
    Shapes that do not fit raise UserError. Differentiable once, in all floating inputs.
    """
    _check(q, k, v, g, beta)
    (B, T, H, V), K = v.shape, q.size(-1)
    wide = torch.promote_types(q.dtype, torch.float32)  # float64 is for tests
    g, beta, valid = g.to(wide), beta.to(wide), None
    if lengths is not None:
        valid = valid_tokens(q, lengths)
        g, beta = (torch.where(valid[..., None], x, 0.0) for x in (g, beta))
    Q = min(chunk_size, max(LEAF, 1 << (T - 1).bit_length()))
    pad, doc = -T % Q, None
    if seq_idx is not None:
        doc = F.pad(document_starts(seq_idx, valid), (0, pad)).cumsum(1)  # what pads a row belongs to its last document
        doc = _to_chunks(doc[..., None].expand(-1, -1, H), Q)
    q, k, v = (F.pad(x.to(q.dtype), (0, 0, 0, 0, 0, pad)) if pad else x.to(q.dtype) for x in (q, k, v))
    g, beta = (F.pad(x, (0, 0, 0, pad)) for x in (g, beta)) if pad else (g, beta)
    q, k = (x.repeat_interleave(H // x.size(2), 2) if x.size(2) != H else x for x in (q, k))
    state = q.new_zeros(B, H, K, V, dtype=wide) if initial_state is None else initial_state.to(wide)
    out, state = _GatedDeltaRule.apply(q, k, v, g, beta, state, doc, K**-0.5 if scale is None else scale, Q)
    return (out[:, :T], state) if return_final_state else out[:, :T]


def gated_delta_update(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float | None = None
) -> Tensor:
    """One token: state (B, H, K, V) float32 is advanced in place -> o (B, H, V) in q's dtype. Not differentiable.

    q, k: (B, Hk, K), v: (B, H, V), g, beta: (B, H), as in gated_delta_rule. The state is read once for both the
    prediction and the answer: S_t^T q = e^g S^T q + (k.q) u.
    """
    _check(q, k, v, g, beta)
    H, K = state.shape[1:3]
    dtype, scale = q.dtype, K**-0.5 if scale is None else scale
    kq = torch.stack((k, q), 2).float().repeat_interleave(H // k.size(1), 1)  # (B, H, 2, K)
    decay = g.float().exp()[..., None, None]  # (B, H, 1, 1)
    seen = (kq @ state) * decay  # (B, H, 2, V)
    k, q = kq.unbind(2)
    u = (v - seen[:, :, 0]) * beta[..., None].float()  # (B, H, V)
    state.mul_(decay).addcmul_(k[..., None], u[..., None, :])
    return ((seen[:, :, 1] + _dot(k, q)[..., None] * u) * scale).to(dtype)
