"""Decoding a few rows on a CPU, compiled: rustbpe/src/linear.rs, rustbpe/src/attend.rs and rustbpe/src/norm.rs.

`pack` lays a weight out once for products of few rows, `attend` is the attention of one query a row, `rms_norm` spares
the norms their many small operations. All add up in float32, and what they give for a row does not depend on the rows
beside it, to the last bit.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from nanochat.kernels import native

NEEDED = ("PackedLinear", "attend_one", "rms_norm")


def available(device: torch.device) -> str | None:
    """Why it cannot run on this device, or None if it can."""
    if native.available(device) is None and not all(hasattr(native.rustbpe, name) for name in NEEDED):
        return "the installed rustbpe is an old build: bash scripts/setup.sh builds ours"
    return native.available(device)


def _numbers(x: Tensor) -> np.ndarray:
    """The same memory as numpy; bfloat16 as its bits, uint16."""
    return x.detach().view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.detach().numpy()


def pack(weight: Tensor, simd: str | None = None) -> Callable[[Tensor], Tensor]:
    """weight (N, K) float32 or bfloat16, which is copied -> x (..., K) -> x W^T (..., N) float32.

    Where the machine multiplies pairs of bfloat16, x is rounded to it for a bfloat16 weight, as torch does.
    simd: "avx512bf16" | "avx512" | "avx2" | "baseline", for tests; None = the best of this machine.
    """
    assert weight.dtype in (torch.float32, torch.bfloat16), weight.dtype
    packed = native.module().PackedLinear(_numbers(weight.contiguous()))
    n, k = weight.shape

    def multiply(x: Tensor) -> Tensor:
        rows = x.detach().reshape(-1, k).to(torch.float32).contiguous()
        y = packed(rows.numpy(), threads=torch.get_num_threads(), simd=simd)
        return torch.from_numpy(y).view(*x.shape[:-1], n)

    return multiply


def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, simd: str | None = None) -> Tensor:
    """softmax(q k^T / sqrt(K)) v. q: (B, H, 1, K), k, v: (B, G, capacity, K) float32 or bfloat16, contiguous, lengths:
    (B,) int64, how many of the places hold a key -> (B, H, 1, K) float32."""
    arrays = map(_numbers, (q[:, :, 0].to(torch.float32).contiguous(), k, v, lengths))
    return torch.from_numpy(native.module().attend_one(*arrays, threads=torch.get_num_threads(), simd=simd))[:, :, None]


def rms_norm(x: Tensor, cos: Tensor | None = None, sin: Tensor | None = None, simd: str | None = None) -> Tensor:
    """ops.rms_norm of float32: x (..., D) -> the same shape; with tables (1 or B, T, 1, K/2) x is (B, T, H, K)."""
    y = x.detach().contiguous().view(-1, x.size(-2), x.size(-1))
    tables = () if cos is None or sin is None else (t.reshape(-1, t.size(-1)).numpy() for t in (cos, sin))
    return torch.from_numpy(native.module().rms_norm(y.numpy(), *tables, simd=simd)).view(x.shape)
