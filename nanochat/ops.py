"""Reference mathematics in plain torch: correct everywhere and quick on a CPU. No module state, no kernels here.

`linear_cross_entropy` and `block_attention` carry hand-written gradients because eager autograd would keep every
intermediate: the logits of one step (B*T, V) are 67 MB in bfloat16 at 4,096 tokens and 8,192 words, and reading them
from memory costs more than multiplying them. Both work in pieces that stay in cache.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CE_ROWS = 512  # rows of logits alive at once: 8 MB at V = 8,192 in bfloat16 (LOG 2026-11-21: the best of five)
ATTN_BLOCK = 128  # queries per block: (B*H, 128, S) scores; the masked half of the work is mostly skipped


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of -log softmax(softcap * tanh(x W^T / softcap))[target]; the forward makes the gradients, chunk by chunk."""

    @staticmethod
    def forward(ctx, x: Tensor, master: Tensor, targets: Tensor, softcap: float) -> Tensor:
        """x: (N, D), master: (V, D) multiplied in x's dtype, targets: (N,) with -1 for none -> () float32."""
        weight = master.to(x.dtype)
        grad_x, grad_w = torch.empty_like(x), torch.zeros_like(master)
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        some_without = bool((targets < 0).any())  # one look instead of masking every chunk
        for i in range(0, x.size(0), CE_ROWS):
            xc, yc = x[i : i + CE_ROWS], targets[i : i + CE_ROWS, None]
            logits = xc @ weight.t()  # (n, V)
            capped = logits.div_(softcap).tanh_() if softcap else None
            if capped is not None:
                logits = capped * softcap
            p = torch.softmax(logits, -1)
            index = yc.clamp_min(0)
            total -= p.gather(1, index).float().clamp_min(1e-38).log().masked_fill(yc < 0, 0).sum()
            p.scatter_add_(1, index, torch.full_like(index, -1, dtype=p.dtype))
            if capped is not None:
                p.mul_(capped.square_().neg_().add_(1))  # d tanh
            if some_without:
                p.masked_fill_(yc < 0, 0)
            torch.mm(p, weight, out=grad_x[i : i + CE_ROWS])
            grad_w += p.t() @ xc
        ctx.save_for_backward(grad_x, grad_w)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyrefly: ignore[bad-override]
        grad_x, grad_w = ctx.saved_tensors
        return grad_x * grad.to(grad_x.dtype), grad_w * grad, None, None


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, softcap: float = 0.0) -> Tensor:
    """Summed cross-entropy of the logits x W^T, in nats, without ever holding all logits.

    x: (N, D), weight: (V, D), the float32 master, which is multiplied in x's dtype and gets a float32 gradient;
    targets: (N,), -1 = no target -> () float32. softcap as in Gemma 2 (arXiv 2408.00118):
    c * tanh(logits / c); 0 = none.
    """
    return _LinearCrossEntropy.apply(x, weight, targets, softcap)


def linear_cross_entropy_rows(x: Tensor, weight: Tensor, targets: Tensor, softcap: float = 0.0) -> Tensor:
    """The same per row and in float32, for evaluation: (N, D), (V, D), (N,) -> (N,) nats, 0 where target is -1."""
    out = torch.empty(x.size(0), dtype=torch.float32, device=x.device)
    for i in range(0, x.size(0), CE_ROWS):
        logits = cap_logits((x[i : i + CE_ROWS] @ weight.t()).float(), softcap)  # (n, V)
        out[i : i + CE_ROWS] = F.cross_entropy(logits, targets[i : i + CE_ROWS], ignore_index=-1, reduction="none")
    return out


def cap_logits(logits: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(logits / softcap) if softcap else logits


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


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864), halves layout. x: (B, T, H, K), cos, sin: (1 or B, T, 1, K/2)."""
    x1, x2 = x.chunk(2, -1)
    return torch.cat((torch.addcmul(x1 * cos, x2, sin), torch.addcmul(x2 * cos, x1, sin, value=-1)), -1)


NORM_EPS = 1e-6


class _ReLUSquared(torch.autograd.Function):
    """relu(x)^2 in two passes forward and three backward; autograd's own takes twice that."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        r = torch.relu(x)
        ctx.save_for_backward(r)
        return r * r

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyrefly: ignore[bad-override]
        (r,) = ctx.saved_tensors
        return (grad * r).mul_(2)


def relu_squared(x: Tensor) -> Tensor:
    """relu(x)^2 (Primer, arXiv 2109.08668), any shape."""
    if torch.is_grad_enabled():
        return _ReLUSquared.apply(x)
    x = torch.relu(x)
    return x * x


def _inverse_rms(x: Tensor) -> Tensor:
    """(..., D) -> (..., 1) float32, in one pass over x."""
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return torch.rsqrt(size.square_().div_(x.size(-1)).add_(NORM_EPS))


def _scale_and_rotate(x: Tensor, r: Tensor, dtype: torch.dtype, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    n = x * r
    return (n if cos is None or sin is None else rotate(n, cos, sin)).to(dtype)


class _RMSNorm(torch.autograd.Function):
    """x / rms(x) over the last axis, then a rotation if there are tables; computed in float32, given in `dtype`."""

    @staticmethod
    def forward(ctx, x: Tensor, dtype: torch.dtype, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        r = _inverse_rms(x)
        ctx.save_for_backward(x, r, cos, sin)
        return _scale_and_rotate(x, r, dtype, cos, sin)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyrefly: ignore[bad-override]
        x, r, cos, sin = ctx.saved_tensors
        grad = grad.float()
        if cos is not None:
            grad = rotate(grad, cos, -sin)  # the inverse rotation
        n = x * r
        dot = (grad * n).mean(-1, keepdim=True)
        return torch.addcmul(grad, n, dot, value=-1).mul_(r).to(x.dtype), None, None, None


def rms_norm(x: Tensor, dtype: torch.dtype, cos: Tensor | None = None, sin: Tensor | None = None) -> Tensor:
    """Parameter-free RMSNorm (arXiv 1910.07467) of (..., D) in float32, rotated by cos, sin if given, cast to dtype.

    A rotation keeps the norm, so this is QK norm and rotary embedding in either order.
    """
    if torch.is_grad_enabled():
        return _RMSNorm.apply(x, dtype, cos, sin)
    return _scale_and_rotate(x, _inverse_rms(x), dtype, cos, sin)
