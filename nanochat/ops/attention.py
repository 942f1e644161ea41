"""Causal attention over blocks of queries, and attention to a prefix that rows share.

`block_attention` carries a hand-written gradient for the reason the cross-entropy does: its pieces stay in cache.
"""

import torch
from torch import Tensor

ATTN_BLOCK = 128  # queries per block: (B*H, 128, S) scores; the masked half of the work is mostly skipped


def attention_mask(q_pos: Tensor, k_pos: Tensor, window: int, q_doc: Tensor | None, k_doc: Tensor | None) -> Tensor:
    """Which keys a query sees: not after it, within the window (0 = all), in its document. Empty keys have k_pos -1.

    q_pos: (B, T) or (1, T), k_pos: (B, S) or (1, S), docs alike -> bool (B or 1, 1, T, S), True = visible.
    """
    gap = q_pos[:, :, None] - k_pos[:, None, :]  # (B, T, S)
    seen = (gap >= 0) & (k_pos >= 0)[:, None, :]
    if window:
        seen &= gap < window
    if q_doc is not None and k_doc is not None:
        seen = seen & (q_doc[:, :, None] == k_doc[:, None, :])
    return seen[:, None]


def attention_blocks(T: int, window: int, doc: Tensor | None, like: Tensor) -> list[tuple[int, int, int, Tensor]]:
    """Cut causal self-attention over T tokens into blocks of queries: [(lo, hi, start, bias)].

    Queries lo..hi see keys start..hi; bias (B or 1, 1, hi - lo, hi - start) adds 0 or -inf, in the dtype and on the
    device of `like`. doc: (B, T) document index or None. Made once per forward, shared by the layers.
    """
    pos = torch.arange(T, device=like.device)[None]  # (1, T)
    blocks = []
    for lo in range(0, T, ATTN_BLOCK):
        hi = min(lo + ATTN_BLOCK, T)
        start = max(0, lo - window + 1) if window else 0
        docs = (None, None) if doc is None else (doc[:, lo:hi], doc[:, start:hi])
        seen = attention_mask(pos[:, lo:hi], pos[:, start:hi], window, *docs)
        blocks.append((lo, hi, start, torch.zeros_like(seen, dtype=like.dtype).masked_fill_(~seen, float("-inf"))))
    return blocks


class _BlockAttention(torch.autograd.Function):
    """Causal self-attention over blocks of queries; a block multiplies only keys it may see."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, blocks: list[tuple[int, int, int, Tensor]]) -> Tensor:
        B, H, T, K = q.shape
        q, k, v = ((q * K**-0.5).reshape(B * H, T, K), k.reshape(B * H, T, K), v.reshape(B * H, T, K))
        out, probs = torch.empty_like(q), []
        for lo, hi, start, bias in blocks:
            s = torch.bmm(q[:, lo:hi], k[:, start:hi].transpose(1, 2))  # (B*H, t, s)
            s.view(B, H, hi - lo, hi - start).add_(bias)
            p = torch.softmax(s, -1)
            out[:, lo:hi] = torch.bmm(p, v[:, start:hi])
            probs.append(p)
        ctx.save_for_backward(q, k, v, *probs)
        ctx.blocks = [b[:3] for b in blocks]
        ctx.heads = H
        return out.view(B, H, T, K)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyrefly: ignore[bad-override]
        q, k, v, *probs = ctx.saved_tensors  # q is scaled already
        shape = (-1, ctx.heads, *q.shape[1:])
        grad = grad.reshape(q.shape)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (lo, hi, start), p in zip(ctx.blocks, probs, strict=True):
            g = grad[:, lo:hi]
            dp = torch.bmm(g, v[:, start:hi].transpose(1, 2))
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
            dq[:, lo:hi] = torch.bmm(ds, k[:, start:hi])
            dk[:, start:hi] += torch.bmm(ds.transpose(1, 2), q[:, lo:hi])
            dv[:, start:hi] += torch.bmm(p.transpose(1, 2), g)
        return dq.mul_(q.size(2) ** -0.5).view(shape), dk.view(shape), dv.view(shape), None


def block_attention(q: Tensor, k: Tensor, v: Tensor, blocks: list[tuple[int, int, int, Tensor]]) -> Tensor:
    """softmax(q k^T / sqrt(K) + bias) v over `attention_blocks`. q, k, v: (B, H, T, K) in one dtype -> (B, H, T, K).

    Keeps the probabilities for the backward, so memory grows with T^2 / 2: for training lengths, not for 32k prompts.
    """
    return _BlockAttention.apply(q, k, v, blocks)


def shared_prefix_attention(
    q: Tensor, prefix_k: Tensor, prefix_v: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> Tensor:
    """One query per row over a prefix all rows share, then over keys of its own; the prefix is read once, not per row.

    q: (B, H, 1, K), prefix: (1, G, S0, K), k, v: (B, G, S, K), mask: (B, 1, 1, S) of the own keys or None -> as q.
    """
    B, H, _, K = q.shape
    G = k.size(1)
    q = (q * K**-0.5).view(B, G, H // G, K)

    def by_group(x: Tensor) -> Tensor:  # (B, G, r, X) -> (G, B * r, X): rows become queries of one product
        return x.transpose(0, 1).reshape(G, B * (H // G), -1)

    def by_row(x: Tensor) -> Tensor:
        return x.view(G, B, H // G, -1).transpose(0, 1)

    own = q @ k.mT  # (B, G, r, S)
    if mask is not None:
        own = own.masked_fill(~mask, float("-inf"))
    p = torch.softmax(torch.cat((by_row(by_group(q) @ prefix_k[0].mT), own), -1), -1)
    p0, p1 = p.split((prefix_k.size(2), k.size(2)), -1)
    return (by_row(by_group(p0) @ prefix_v[0]) + p1 @ v).view(B, H, 1, K)
