"""The selective scan of Mamba-1 (arXiv 2312.00752) on a CPU, compiled: rustbpe/src/scan.rs behind torch's autograd.

Takes what ops.selective_scan takes and computes the same, in float32, on AVX-512, AVX2 or whatever the machine has.
torch.get_num_threads() threads work on it; the result does not depend on their number.
"""

from types import ModuleType

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanochat.config import UserError
from nanochat.ops.rows import document_starts

try:
    import rustbpe
except ImportError:
    rustbpe = None

NEEDED = ("selective_scan_forward", "selective_scan_backward", "selective_state_update")


def available(device: torch.device | None = None) -> str | None:
    """Why the kernel cannot run on this device, or None if it can."""
    if device is not None and device.type != "cpu":
        return f"the native scan runs on a CPU, not on {device.type}"
    if rustbpe is None:
        return "rustbpe is not installed: bash scripts/setup.sh"
    if not all(hasattr(rustbpe, name) for name in NEEDED):
        return (
            "the installed rustbpe is an old build, or another package of that name: bash scripts/setup.sh builds ours"
        )
    return None


def module() -> ModuleType:
    reason = available()
    if reason is not None:
        raise UserError(f"kernels: {reason}")
    assert rustbpe is not None
    return rustbpe


def _array(x: Tensor | None) -> np.ndarray | None:
    """The same memory as numpy."""
    return None if x is None else x.detach().numpy()


class _SelectiveScan(torch.autograd.Function):
    """Time-major float32 tensors -> out (B, T, E), last state (B, E, N)."""

    @staticmethod
    def forward(ctx, softplus: bool, keep: bool, simd: str | None, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        """tensors: u, delta (B, T, E), A (E, N), B_t, C_t (B, T, N), D (E,), z (B, T, E), bias (E,), h0 (B, E, N),
        resets (B, T) uint8, lengths (B,) int64; from D on each may be None."""
        *arrays, h0, resets, lengths = (_array(x) for x in tensors)
        ctx.options = {"simd": simd, "threads": torch.get_num_threads()}
        out, last, borders = module().selective_scan_forward(
            *arrays, softplus, initial_state=h0, resets=resets, lengths=lengths, keep=keep, **ctx.options
        )
        ctx.softplus = softplus
        ctx.save_for_backward(*tensors, torch.from_numpy(borders) if keep else None)
        ctx.set_materialize_grads(False)
        return torch.from_numpy(out), torch.from_numpy(last)

    @staticmethod
    @once_differentiable
    def backward(ctx, g_out: Tensor | None, g_last: Tensor | None):  # pyrefly: ignore[bad-override]
        *tensors, borders = ctx.saved_tensors
        *arrays, h0, resets, lengths = (_array(x) for x in tensors)
        g_out = torch.zeros_like(tensors[0]) if g_out is None else g_out.contiguous()
        g_last = None if g_last is None else g_last.contiguous()
        grads = module().selective_scan_backward(
            _array(g_out), _array(g_last), _array(borders), *arrays, ctx.softplus,
            initial_state=h0, resets=resets, lengths=lengths, **ctx.options,
        )  # fmt: skip
        return None, None, None, *(None if g is None else torch.from_numpy(g) for g in grads), None, None


def _float32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.float32).contiguous()


def _time_major(x: Tensor | None) -> Tensor | None:
    """(B, X, T) -> (B, T, X) float32, contiguous; a copy only where it is not already."""
    return None if x is None else _float32(x.transpose(1, 2))


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
    simd: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """ops.selective_scan for B, C of (B, N, T) and anything up to float32; best on (B, T, E) memory, as there.

    simd: "avx512bf16" | "avx512" | "avx2" | "baseline", for tests; None = the best of this machine.
    UserError: B or C in another shape, float64, a complex A, or the kernel is not built.
    """
    if B.ndim != 3 or C.ndim != 3:
        raise UserError(f"native scan: B {tuple(B.shape)}, C {tuple(C.shape)}: expected (B, N, T); kernels=reference")
    if torch.float64 in (u.dtype, delta.dtype) or A.is_complex():
        raise UserError(f"native scan: u is {u.dtype}, A is {A.dtype}: expected real float32; use kernels=reference")
    resets = None if seq_idx is None else document_starts(seq_idx).to(torch.uint8)
    floats = (
        *(_time_major(u), _time_major(delta), _float32(A), _time_major(B), _time_major(C)),
        *(_float32(D), _time_major(z), _float32(delta_bias), _float32(initial_state)),
    )
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in floats)
    lengths = None if lengths is None else lengths.to(torch.int64).contiguous()
    out, last = _SelectiveScan.apply(delta_softplus, keep, simd, *floats, resets, lengths)
    out = out.to(u.dtype).transpose(1, 2)
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
    *,
    simd: str | None = None,
) -> Tensor:
    """ops.selective_state_update: state (B, E, N) float32 is changed in place; x, dt, z: (B, E), A: (E, N),
    B, C: (B, N), D, dt_bias: (E,) -> (B, E) in x's dtype. A state that is not contiguous costs two copies.

    UserError: a state of another dtype, or the kernel is not built.
    """
    if state.dtype != torch.float32:
        raise UserError(f"native scan: the state is {state.dtype}: expected float32; use kernels=reference")
    kept = state.contiguous()
    arrays = [_array(_float32(t)) for t in (x, dt, A, B, C, D, z, dt_bias)]
    y = module().selective_state_update(
        _array(kept), *arrays, dt_softplus, threads=torch.get_num_threads(), simd=simd
    )  # fmt: skip
    if kept.data_ptr() != state.data_ptr():
        state.copy_(kept)
    return torch.from_numpy(y).to(x.dtype)
