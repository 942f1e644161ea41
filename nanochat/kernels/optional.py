"""Adapters to kernels of other packages, with the arguments of `nanochat.ops` and `Kernels.self_attention`.

Written from the packages' documented signatures; not yet run here, on no GPU and with none of these packages installed:
tests check the argument mapping with stand-ins. Nothing is imported before `available` or an adapter is called.
"""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.config import UserError
from nanochat.ops.rows import document_numbers, document_starts, valid_tokens

NO_LIMIT = (0.0, float("inf"))


@dataclass(frozen=True)
class Package:
    """One function of an optional package, and what to type where it is missing."""

    module: str
    function: str
    cure: str

    def load(self, function: str = "") -> Callable[..., Any]:
        """The function (or another one of its module); raises what the import raises.

        torch.compile follows the look into sys.modules, where `available` has put it, but no import.
        """
        module = sys.modules[self.module] if self.module in sys.modules else import_module(self.module)
        return getattr(module, function or self.function)

    def available(self, device: torch.device) -> str | None:
        """Why it cannot run on this device, with the import's own words; None = it can."""
        name = self.module.split(".")[0]
        if device.type != "cuda":
            return f"{name} needs a cuda device, got {device.type}"
        try:
            self.load()
        except (ImportError, AttributeError, OSError, RuntimeError) as error:
            return f"{name} cannot be imported ({type(error).__name__}: {str(error).splitlines()[0]}): {self.cure}"
        return None


_BUILD = "pip install --no-build-isolation {} (compiles with nvcc for the installed torch)"
SELECTIVE_SCAN = Package(
    "mamba_ssm.ops.selective_scan_interface", "selective_scan_fn", _BUILD.format("mamba-ssm") + ", with its CUDA scan"
)
SSD_SCAN = Package("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined", _BUILD.format("mamba-ssm"))
CAUSAL_CONV1D = Package("causal_conv1d", "causal_conv1d_fn", _BUILD.format("causal-conv1d"))
FLASH_ATTENTION = Package("flash_attn", "flash_attn_func", _BUILD.format("flash-attn"))
FLEX_ATTENTION = Package("torch.nn.attention.flex_attention", "flex_attention", "pip install 'torch>=2.6'")
GATED_DELTA_RULE = Package("fla.ops.gated_delta_rule", "chunk_gated_delta_rule", "pip install flash-linear-attention")


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
) -> Tensor | tuple[Tensor, Tensor]:
    """`ops.selective_scan` by mamba_ssm's CUDA kernel; unrun. It takes no initial state, seq_idx or lengths.

    Shapes as there: (B, E, T), time contiguous or copied. The kernel has no gradient through the last state, which is
    therefore given detached.
    """
    same = [None if t is None else t.to(u.dtype) for t in (delta, B, C, z)]
    wide = [None if t is None else t.float() for t in (A, D, delta_bias)]
    out = SELECTIVE_SCAN.load()(
        u, same[0], wide[0], same[1], same[2], wide[1], same[3], wide[2], delta_softplus, return_last_state
    )
    return (out[0], out[1].detach()) if return_last_state else out


def documents(seq_idx: Tensor, lengths: Tensor | None = None) -> Tensor:
    """(B, T) any index that changes where a document ends -> (B, T) int32 counted from 0 in each row.

    Kernels compare indices and give the initial state to document 0, so they need them distinct and starting there.
    Pads stay with the last valid token.
    """
    valid = None if lengths is None else valid_tokens(seq_idx, lengths)
    return document_numbers(seq_idx, valid).int()


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int = 256,
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
    """`ops.ssd_scan` by mamba_ssm's Triton kernels; unrun. x: (B, T, H, P), dt: (B, T, H), B, C: (B, T, G, N).

    chunk_size: a power of two. With lengths, dt is made here and then 0 on pads: the kernel's softplus would undo a 0.
    """
    if lengths is not None:
        dt = dt.float() if dt_bias is None else dt.float() + dt_bias
        dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
        dt = torch.where(valid_tokens(x, lengths)[..., None], dt, 0.0)
        dt_bias, dt_softplus, dt_limit = None, False, NO_LIMIT
    return SSD_SCAN.load()(
        x,
        dt,
        A.float(),
        B.to(x.dtype),
        C.to(x.dtype),
        chunk_size,
        D=D,
        z=z,
        dt_bias=dt_bias,
        initial_states=initial_states,
        seq_idx=None if seq_idx is None else documents(seq_idx, lengths),
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        return_final_states=return_final_states,
    )


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`ops.causal_conv1d` by causal_conv1d's CUDA kernel; unrun. x: (B, E, T), weight: (E, 2..4), any E in steps of 8.

    Either documents or states, not both; both need x with contiguous channels, which is copied where it has none.
    The final states are those of T tokens: not for right-padded rows.
    """
    stateful = initial_states is not None or return_final_states
    assert seq_idx is None or not stateful, "causal_conv1d takes seq_idx or states, not both"
    if (seq_idx is not None or stateful) and (x.stride(1) != 1 or x.stride(0) % 8 or x.stride(2) % 8):
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    return CAUSAL_CONV1D.load()(
        x,
        weight.to(x.dtype),
        None if bias is None else bias.to(x.dtype),
        seq_idx=None if seq_idx is None else documents(seq_idx).masked_fill(seq_idx < 0, -1),  # below 0: output 0
        initial_states=None if initial_states is None else initial_states.to(x.dtype),
        return_final_states=return_final_states,
        activation=activation,
    )


def cu_seqlens(seq_idx: Tensor) -> Tensor:
    """(B, T) document index -> first token of every document in the B T tokens laid end to end, with B T behind
    (n + 1,) long. How many there are is known to the device alone, so the host waits for it."""
    starts = document_starts(seq_idx)
    starts[:, 0] = True
    return F.pad(starts.flatten().nonzero()[:, 0], (0, 1), value=seq_idx.numel())


@functools.lru_cache(maxsize=1)
def _end_to_end(seq_idx: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """documents(), and their cu_seqlens. One for all layers of a forward, told by the identity of its tensors, as fla
    tells what it keeps of cu_seqlens: whoever changes seq_idx in place gets the old ones."""
    doc = documents(seq_idx, lengths)
    return doc, cu_seqlens(doc)


def _few_sizes(seq_idx: Tensor) -> tuple[Tensor, int]:
    """The same with empty documents behind and a longest rounded up, both to a power of two: torch.compile makes new
    code for every size it meets, and gives up after eight. Only what asks the device is then left to plain Python."""
    cu = cu_seqlens(seq_idx).int()
    longest = int(cu.diff().max())
    n = 1 << (len(cu) - 2).bit_length()
    return torch.cat((cu, cu[-1:].expand(n + 1 - len(cu)))), 1 << (longest - 1).bit_length()


def _need_half(package: str, x: Tensor) -> None:
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise UserError(f"{package} multiplies bfloat16 or float16, got {x.dtype}: set dtype=bfloat16 or kernels=auto")


def flash_attention(q: Tensor, k: Tensor, v: Tensor, window: int, doc: Tensor | None, memo: dict) -> Tensor:
    """`Kernels.self_attention` by flash_attn; unrun. q: (B, H, T, K), k, v: (B, G, T, K) bf16/fp16 -> (B, H, T, K).

    window: tokens a query sees with its own, 0 = all (flash_attn counts those before it). doc: (B, T) or None.
    """
    _need_half("flash_attn", q)
    B, _, T, _ = q.shape
    options = {"causal": True, "window_size": (window - 1, 0) if window else (-1, -1)}
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, T, H or G, K)
    if doc is None:
        return FLASH_ATTENTION.load()(q, k, v, **options).transpose(1, 2)
    if "cu_seqlens" not in memo:
        memo["cu_seqlens"] = _few_sizes(doc)
    cu, longest = memo["cu_seqlens"]
    q, k, v = (t.reshape(B * T, *t.shape[2:]) for t in (q, k, v))
    out = FLASH_ATTENTION.load("flash_attn_varlen_func")(q, k, v, cu, cu, longest, longest, **options)
    return out.view(B, T, *out.shape[1:]).transpose(1, 2)


def document_mask(doc: Tensor | None, window: int) -> Callable[..., Tensor]:
    """flex_attention's mask_mod: not after the query, within the window (0 = all), in its document. doc: (B, T)."""

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        mask = q >= k
        if window:
            mask = mask & (q - k < window)
        return mask if doc is None else mask & (doc[b, q] == doc[b, k])

    return seen


_compiled = functools.cache(torch.compile)


def _flex(function: str) -> Callable[..., Any]:
    """A function of flex_attention, compiled: with the model where that is being compiled, else by itself."""
    found = FLEX_ATTENTION.load(function)
    return found if torch.compiler.is_compiling() else _compiled(found)


def flex_attention(q: Tensor, k: Tensor, v: Tensor, window: int, doc: Tensor | None, memo: dict) -> Tensor:
    """`Kernels.self_attention` by torch's flex_attention, compiled; unrun. Shapes as `flash_attention`, any dtype."""
    mask = memo.get(("flex", window))
    if mask is None:
        B, T = (None if doc is None else q.size(0)), q.size(2)
        create = _flex("create_block_mask")  # eager, it would hold several (B, T, T)
        mask = memo["flex", window] = create(document_mask(doc, window), B, None, T, T, device=q.device)
    return _flex("flex_attention")(q, k, v, block_mask=mask, enable_gqa=q.size(1) != k.size(1))


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    *,
    seq_idx: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`ops.gated_delta_rule` by fla's Triton kernels; unrun. q, k: (B, T, Hk, K), v: (B, T, H, V), g, beta: (B, T, H).

    bfloat16 or float16. Packed documents are laid end to end, since fla wants one row with cu_seqlens: the initial
    state (B, H, K, V) goes to the first document of each row, the final one comes from the last. Pads: g = beta = 0.
    """
    _need_half("fla", q)
    (B, T, H, _), options = v.shape, {"scale": scale, "output_final_state": return_final_state}
    q, k = (t.repeat_interleave(H // t.size(2), 2) if t.size(2) != H else t for t in (q, k))
    if lengths is not None:
        valid = valid_tokens(v, lengths)[..., None]
        g, beta = (torch.where(valid, t, 0.0) for t in (g, beta))
    if seq_idx is None:
        out, state = GATED_DELTA_RULE.load()(q, k, v, g, beta, initial_state=initial_state, **options)
        return (out, state) if return_final_state else out
    doc, cu = _end_to_end(seq_idx, lengths)
    last = (doc[:, -1].long() + 1).cumsum(0) - 1  # (B,) of all documents, each row's last
    if initial_state is not None:
        states = initial_state.new_zeros(len(cu) - 1, *initial_state.shape[1:])
        initial_state = states.index_copy(0, last - doc[:, -1], initial_state)
    flat = (t.reshape(1, B * T, *t.shape[2:]) for t in (q, k, v, g, beta))
    out, state = GATED_DELTA_RULE.load()(*flat, initial_state=initial_state, cu_seqlens=cu, **options)
    out = out.view(B, T, *out.shape[2:])
    return (out, state[last]) if return_final_state else out
