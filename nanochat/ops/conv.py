"""Causal depthwise convolution over time and its SiLU: the short filter in front of a recurrence (arXiv 2312.00752).

    out[t] = silu(bias + sum_k weight[:, k] * x[t - (W - 1) + k])

As W shifted multiply-adds over blocks of time that stay in cache, so that memory is read and written once. Arguments
are (B, C, T) as in the causal-conv1d package; memory is best time-major, that is x = (B, T, C).transpose(1, 2), and the
result is such a view too.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanochat.config import UserError
from nanochat.ops.rows import document_numbers

BLOCK_ELEMENTS = 131072  # of a block's (b, t, C): 0.5 MB; the backward works on three such


def time_major(x: Tensor) -> Tensor:
    """(B, C, T) -> (B, T, C) with the channels next to each other in memory; a copy only if they were not."""
    x = x.transpose(1, 2)
    return x if x.stride(-1) == 1 or x.size(-1) == 1 else x.contiguous()


def state_dtype(x: Tensor) -> torch.dtype:
    """What sums over time are kept in: float32, or float64 for float64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _blocks(x: Tensor, n: int) -> list[tuple[slice, int, int]]:
    """Cut (B, T, C) into [(rows, lo, hi)]; the blocks of the same rows follow each other in time.

    The first block of a row has n tokens: it alone reads what precedes x, so it alone must be put together in memory.
    """
    B, T, C = x.shape
    budget = BLOCK_ELEMENTS if x.device.type == "cpu" else B * T * C  # a GPU wants one launch
    rows, steps = max(1, budget // (T * C)), max(1, budget // C)
    cuts = [0, *range(min(n, T), T, steps), T]
    return [
        (slice(b, b + rows), *cut) for b in range(0, B, rows) for cut in itertools.pairwise(cuts) if cut[0] < cut[1]
    ]


def _window(x: Tensor, before: Tensor, rows: slice, lo: int, hi: int) -> Tensor:
    """Inputs lo - (W - 1) .. hi of these rows in the dtype of `before` (B, W - 1, C), which precedes x[:, 0]."""
    n = before.size(1)
    if lo >= n:
        return x[rows, lo - n : hi].to(before.dtype)
    return torch.cat((before[rows, lo:], x[rows, :hi].to(before.dtype)), 1)


def _taps(window: Tensor, weight: Tensor, bias: Tensor, same: Tensor | None) -> Tensor:
    """window: (b, t + W - 1, C), weight: (W, C), bias: (C,), same: (b, t, W) or None -> (b, t, C) before the SiLU."""
    W, t = weight.size(0), window.size(1) - weight.size(0) + 1
    acc = torch.addcmul(bias, window[:, W - 1 :], weight[-1])
    for k in range(W - 1):
        x = window[:, k : k + t]
        acc.addcmul_(x if same is None else x * same[:, :, k, None], weight[k])
    return acc


class _CausalConv(torch.autograd.Function):
    """Keeps x and computes what stands before the SiLU again: W multiply-adds in cache cost less than its storage."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor, before: Tensor, same: Tensor | None, silu: bool
    ) -> Tensor:
        """x: (B, T, C), weight: (W, C), bias: (C,), before: (B, W - 1, C), same: (B, T, W) -> (B, T, C)."""
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for rows, lo, hi in _blocks(x, before.size(1)):
            acc = _taps(_window(x, before, rows, lo, hi), weight, bias, None if same is None else same[rows, lo:hi])
            out[rows, lo:hi] = F.silu(acc, inplace=True) if silu else acc
        ctx.save_for_backward(x, weight, bias, before, same)
        ctx.silu = silu
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # pyrefly: ignore[bad-override]
        x, weight, bias, before, all_same = ctx.saved_tensors
        W, n = weight.size(0), before.size(1)
        dx, d_before = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(before)
        d_weight, d_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        carry = before  # gradient of the last W - 1 inputs so far; what stands here first is overwritten
        for rows, lo, hi in _blocks(x, n):
            t = hi - lo
            same = None if all_same is None else all_same[rows, lo:hi]
            window, g = _window(x, before, rows, lo, hi), grad[rows, lo:hi].to(weight.dtype)
            if ctx.silu:
                g = torch.ops.aten.silu_backward(g, _taps(window, weight, bias, same))
            d_bias += g.sum((0, 1))
            d_window = torch.empty_like(window)
            torch.mul(g, weight[-1], out=d_window[:, n:])
            d_window[:, :n] = 0 if lo == 0 else carry
            for k in range(W):
                gk = g if same is None or k == n else g * same[:, :, k, None]
                d_weight[k] += (gk * window[:, k : k + t]).sum((0, 1))
                if k < n:
                    d_window[:, k : k + t].addcmul_(gk, weight[k])
            dx[rows, max(lo - n, 0) : hi] = d_window[:, max(n - lo, 0) :]
            if lo < n:
                d_before[rows, lo:] = d_window[:, : n - lo]
            carry = d_window[:, t:]
        return dx, d_weight, d_bias, d_before, None, None


def _same_document(seq_idx: Tensor, width: int) -> Tensor:
    """(B, T) -> (B, T, W) float: 1 where a token's tap k lies in its document; what precedes a row is in its first."""
    doc = document_numbers(seq_idx)
    return (F.pad(doc, (width - 1, 0)).unfold(1, width, 1) == doc[:, :, None]).float()


def _final_states(x: Tensor, before: Tensor, seq_idx: Tensor | None, lengths: Tensor | None) -> Tensor:
    """The W - 1 inputs before each row's end: x (B, T, C), before (B, W - 1, C) -> (B, W - 1, C) in x.dtype."""
    (_, T, C), n = x.shape, before.size(1)
    if lengths is None and seq_idx is None:
        return (x[:, T - n :] if n <= T else torch.cat((before[:, T:].to(x.dtype), x), 1)).clone()
    end = torch.full((x.size(0),), T, device=x.device) if lengths is None else lengths.to(x.device)
    at = end[:, None] - n + torch.arange(n, device=x.device)  # (B, n) times; negative ones lie in `before`
    new = x.gather(1, at.clamp_min(0)[..., None].expand(-1, -1, C))
    old = before.to(x.dtype).gather(1, (at + n).clamp_max(n - 1)[..., None].expand(-1, -1, C))
    states = torch.where((at < 0)[..., None], old, new)
    if seq_idx is None:
        return states
    doc = document_numbers(seq_idx)
    last = doc.gather(1, (end - 1).clamp_min(0)[:, None])
    return states.masked_fill((doc.gather(1, at.clamp_min(0)) != last)[..., None], 0)


def _one_token(x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    """Decoding: x (B, 1, C), before (B, W - 1, C) -> out (B, 1, C), states (B, W - 1, C). No gradient."""
    window = torch.cat((before.to(x.dtype), x), 1)  # (B, W, C)
    acc = (window * weight.t().to(state_dtype(x))).sum(1, keepdim=True)
    if bias is not None:
        acc += bias
    return (F.silu(acc, inplace=True) if silu else acc).to(x.dtype), window[:, 1:]


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    activation: str | None = None,
    lengths: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Each channel's last W inputs times its weights. x: (B, C, T), weight: (C, W), bias: (C,) -> (B, C, T) in x.dtype.

    seq_idx: (B, T) document of each token of a packed row; no tap crosses a change, and a negative one gives 0.
    initial_states: (B, C, W - 1), the inputs before x, of the first token's document; None = zeros.
    lengths: (B,) valid tokens of right-padded rows, 0 to T; None = T. Outputs beyond are unspecified.
    With return_final_states also the last W - 1 inputs of each row's last document, (B, C, W - 1) in x.dtype, which are
    the initial states of what follows. Sums are float32. UserError for an activation other than None, silu, swish.
    """
    if activation not in (None, "silu", "swish"):
        raise UserError(f"activation={activation!r}: expected None, 'silu' or 'swish'")
    B, C, T = x.shape
    silu, xt, dtype = activation is not None, time_major(x), state_dtype(x)
    if initial_states is None:
        before = torch.zeros(B, weight.size(1) - 1, C, dtype=dtype, device=x.device)
    else:
        before = initial_states.transpose(1, 2)
    if T == 1 and lengths is None and seq_idx is None and not torch.is_grad_enabled():
        out, states = _one_token(xt, weight, bias, before, silu)
        return (out.transpose(1, 2), states.transpose(1, 2)) if return_final_states else out.transpose(1, 2)
    w = weight.t().to(dtype).contiguous()
    b = torch.zeros_like(w[0]) if bias is None else bias.to(dtype)
    same = None if seq_idx is None else _same_document(seq_idx, weight.size(1))
    out = _CausalConv.apply(xt, w, b, before.to(dtype), same, silu).transpose(1, 2)
    # looking first spares a CPU the copy, but would make the host wait for any other device
    if seq_idx is not None and (seq_idx.device.type != "cpu" or bool((seq_idx < 0).any())):
        out = out.masked_fill((seq_idx < 0)[:, None], 0)
    if not return_final_states:
        return out
    return out, _final_states(xt, before, seq_idx, lengths).transpose(1, 2)
