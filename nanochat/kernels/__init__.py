"""Which implementation runs. This package alone imports flash-attn, mamba-ssm, causal-conv1d, fla and triton.

`kernels = auto | fast | reference` is decided once per model, for the operations its blocks list and the dtype it
multiplies in, and printed once: auto takes what can run, fastest first; fast is an error where an operation has
implementations for the device and none can run; reference is `nanochat.ops` everywhere. All implementations of an
operation compute the same function. A call that one cannot serve goes to the next, in the order of CANDIDATES, and at
last to torch's attention or `nanochat.ops`:

    operation  device  implementation  serves
    attention  cpu     blocks          training, up to BLOCK_ATTENTION_MAX_T tokens
               cuda    flash_attn      bfloat16 and float16, heads of up to 256 channels, packed documents too
                       flex            packed documents; else torch's own flash, with a window a mask
    decode     cpu     native          matrices and attention of few rows, outside autograd, after GPT.pack()
    scan       cpu     native          all but B or C of another shape than (B, N, T), and float64
               cuda    mamba_ssm       of these, no initial state, documents or lengths, nor a last state with gradients
                       triton          as native
    conv       cuda    causal_conv1d   no lengths; documents or states, not both; 2 to 4 taps, channels in steps of 8
    ssd        cuda    mamba_ssm       bfloat16 and float16 (it multiplies float32 as TF32), chunks of a power of two
                       triton          all but float64
    delta      cuda    fla             bfloat16 and float16, keys of up to 256 channels

What cuda lists has not run on a GPU yet: tests check which call goes where and, in the interpreter, our Triton kernels.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat import ops
from nanochat.config import UserError
from nanochat.kernels import decode, native, optional

CHOICES = ("auto", "fast", "reference")
BLOCK_ATTENTION_MAX_T = 4096  # above, the stored probabilities of block_attention outgrow its gain
HALF = (torch.bfloat16, torch.float16)
FEW_ROWS = 64  # above, multiplying takes longer than reading the weights, and torch reads them no slower

Multiply = Callable[[Tensor], Tensor]  # x (..., K) -> x W^T (..., N) float32
Pack = Callable[[Tensor], Multiply]  # of a weight W (N, K)
WhyNot = Callable[[torch.device, torch.dtype], str | None]  # why it cannot run there, None = it can


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation; `run` and `serves` take the operation's arguments."""

    name: str
    why_not: WhyNot
    run: Callable[..., Any]
    serves: Callable[..., bool]
    step: Callable[..., Tensor] | None = None  # one token of the same recurrence, where it has that
    pack: Pack | None = None  # of decode: lays a weight out
    norm: Callable[..., Tensor] | None = None  # of decode: of few rows


@dataclass(frozen=True)
class Kernels:
    """The choice of one model. Methods take the arguments of the functions they name; the first that serves runs."""

    chosen: dict[str, tuple[Implementation, ...]] = field(default_factory=dict)  # operation -> those that can run
    reason: str = "reference: nanochat.ops, as asked"  # what a user reads

    def _run(self, op: str, reference: Callable[..., Any], *args: Any, **options: Any) -> Any:
        served = (one.run for one in self.chosen.get(op, ()) if one.serves(*args, **options))
        return next(served, reference)(*args, **options)

    def self_attention(self, q: Tensor, k: Tensor, v: Tensor, window: int, doc: Tensor | None, memo: dict) -> Tensor:
        """Causal attention of a whole segment on itself. q: (B, H, T, K), k, v: (B, G, T, K) -> (B, H, T, K).

        window: tokens a query sees with its own, 0 = all. doc: (B, T) or None. memo keeps masks for the other layers of
        the same forward.
        """
        return self._run("attention", _torch_attention, q, k, v, window, doc, memo)

    @property
    def pack(self) -> Pack | None:
        """What lays a weight out for the products of a few rows, or None."""
        return next((one.pack for one in self.chosen.get("decode", ())), None)

    def norm(self, x: Tensor, dtype: torch.dtype, cos: Tensor | None = None, sin: Tensor | None = None) -> Tensor:
        """`ops.rms_norm` of (B, T, D) or (B, T, H, K)."""
        if x.dtype == dtype == torch.float32 and x.size(0) * x.size(1) <= FEW_ROWS and not torch.is_grad_enabled():
            for one in self.chosen.get("decode", ()):
                if one.norm is not None:
                    return one.norm(x, cos, sin)
        return ops.rms_norm(x, dtype, cos, sin)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor | None:
        """The attention of one query a row to a ring buffer, see decode.attend; None = the caller is to compute it."""
        return self._run("decode", lambda *_: None, q, k, v, lengths)

    def causal_conv1d(self, *args: Any, **options: Any) -> Any:
        """`ops.causal_conv1d`."""
        return self._run("conv", ops.causal_conv1d, *args, **options)

    def selective_scan(self, *args: Any, **options: Any) -> Any:
        """`ops.selective_scan`."""
        return self._run("scan", ops.selective_scan, *args, **options)

    def selective_state_update(self, *args: Any, **options: Any) -> Tensor:
        """`ops.selective_state_update`."""
        steps = (one.step for one in self.chosen.get("scan", ()) if one.step is not None)
        return next(steps, ops.selective_state_update)(*args, **options)

    def ssd_scan(self, *args: Any, **options: Any) -> Any:
        """`ops.ssd_scan`."""
        return self._run("ssd", ops.ssd_scan, *args, **options)

    def gated_delta_rule(self, *args: Any, **options: Any) -> Any:
        """`ops.gated_delta_rule`."""
        return self._run("delta", ops.gated_delta_rule, *args, **options)


def _torch_attention(q: Tensor, k: Tensor, v: Tensor, window: int, doc: Tensor | None, memo: dict) -> Tensor:
    """`Kernels.self_attention` by torch's scaled_dot_product_attention."""
    T, gqa = q.size(2), k.size(1) != q.size(1)
    if doc is None and (not window or window >= T):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    mask = memo.get(("mask", window))
    if mask is None:
        pos = torch.arange(T, device=q.device)[None]
        mask = memo["mask", window] = ops.attention_mask(pos, pos, window, doc, doc)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)


def _block_attention(q: Tensor, k: Tensor, v: Tensor, window: int, doc: Tensor | None, memo: dict) -> Tensor:
    """`Kernels.self_attention` by `ops.block_attention`."""
    blocks = memo.get(("blocks", window))
    if blocks is None:
        blocks = memo["blocks", window] = ops.attention_blocks(q.size(2), window, doc, q)
    k, v = (t.repeat_interleave(q.size(1) // t.size(1), 1) if t.size(1) != q.size(1) else t for t in (k, v))
    return ops.block_attention(q, k, v, blocks)


def _fla_delta_rule(
    q, k, v, g, beta, scale=None, initial_state=None, return_final_state=False, chunk_size=0, **rows
) -> Any:
    """`ops.gated_delta_rule` by fla, which chooses the chunk itself; it changes only the time."""
    return optional.gated_delta_rule(q, k, v, g, beta, scale, initial_state, return_final_state, **rows)


# Importing triton takes a sixth of the start of a command, so it waits for a device that our Triton kernels may run on.


def _triton_scan(*args: Any, **options: Any) -> Any:
    from nanochat.kernels import triton_scan

    return triton_scan.selective_scan(*args, **options)


def _triton_ssd(*args: Any, **options: Any) -> Any:
    from nanochat.kernels import triton_ssd

    return triton_ssd.ssd_scan(*args, **options)


def _triton_runs(device: torch.device, dtype: torch.dtype) -> str | None:
    from nanochat.kernels import triton_scan

    return triton_scan.available(device)


# What each implementation serves: predicates with the arguments of their operation.


def _blocks_serve(q, k, v, window, doc, memo) -> bool:
    return q.size(2) <= BLOCK_ATTENTION_MAX_T and torch.is_grad_enabled()


def _flash_serves(q, k, v, window, doc, memo) -> bool:
    return q.dtype in HALF and q.size(3) <= 256


def _flex_serves(q, k, v, window, doc, memo) -> bool:
    return doc is not None and q.size(3) >= 16  # rows of a tile that Triton multiplies


def _scan_served(u, delta, A, B, C, *_, **__) -> bool:
    return B.ndim == C.ndim == 3 and torch.float64 not in (u.dtype, delta.dtype) and not A.is_complex()


def _scan_served_by_mamba_ssm(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False, *,
    initial_state=None, seq_idx=None, lengths=None,
) -> bool:  # fmt: skip
    whole = initial_state is None and seq_idx is None and lengths is None
    last_without_gradient = not return_last_state or not torch.is_grad_enabled()
    return whole and last_without_gradient and _scan_served(u, delta, A, B, C)


def _conv_served(
    x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, activation=None, lengths=None
) -> bool:
    """The package asks for channels in steps of 8, also between tokens where channels are innermost, and for states
    with channels innermost; states of another layout (new ones) go to `ops`, which gives them back in that one."""
    documents, stateful = seq_idx is not None, initial_states is not None or return_final_states
    steps = x.stride(1) != 1 or x.stride(0) % 8 == x.stride(2) % 8 == 0
    layout = steps and x.size(1) % 8 == 0 and (initial_states is None or initial_states.stride(1) == 1)
    taps = 2 <= weight.size(1) <= 4 and x.dtype != torch.float64
    return lengths is None and not (documents and stateful) and taps and layout


def _ssd_served(x, *_, **__) -> bool:
    return x.dtype != torch.float64


def _ssd_served_by_mamba_ssm(x, dt, A, B, C, chunk_size=256, *_, **__) -> bool:
    return x.dtype in HALF and chunk_size >= 16 and chunk_size & (chunk_size - 1) == 0


def _delta_served(q, *_, **__) -> bool:
    return q.dtype in HALF and q.size(3) <= 256


def _package(package: optional.Package, half_only: bool = False) -> WhyNot:
    """Why a package cannot run on the device, or not in the dtype."""

    def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
        if half_only and dtype not in HALF:
            return f"{package.module.split('.')[0]} multiplies bfloat16 or float16, not {str(dtype)[6:]}: use bfloat16"
        return package.available(device)

    return why_not


def _native_runs(device: torch.device, dtype: torch.dtype) -> str | None:
    return native.available(device)


def _decode_runs(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype not in (torch.float32, torch.bfloat16):
        return f"native products are of float32 or bfloat16, not {str(dtype)[6:]}"
    return decode.available(device)


# device type -> operation -> implementations beside the reference, fastest first
CANDIDATES: dict[str, dict[str, list[Implementation]]] = {
    "cpu": {
        "attention": [Implementation("blocks", lambda device, dtype: None, _block_attention, _blocks_serve)],
        "decode": [
            Implementation(
                "native",
                _decode_runs,
                decode.attend,
                lambda q, k, v, lengths: k.dtype in (torch.float32, torch.bfloat16) and not torch.is_grad_enabled(),
                pack=decode.pack,
                norm=decode.rms_norm,
            )
        ],
        "scan": [
            Implementation(
                "native",
                _native_runs,
                native.selective_scan,
                _scan_served,
                step=native.selective_state_update,
            )
        ],
    },
    "cuda": {
        "attention": [
            Implementation(
                "flash_attn", _package(optional.FLASH_ATTENTION, True), optional.flash_attention, _flash_serves
            ),
            Implementation("flex", _package(optional.FLEX_ATTENTION), optional.flex_attention, _flex_serves),
        ],
        "scan": [
            Implementation(
                "mamba_ssm", _package(optional.SELECTIVE_SCAN), optional.selective_scan, _scan_served_by_mamba_ssm
            ),
            Implementation("triton", _triton_runs, _triton_scan, _scan_served),
        ],
        "conv": [
            Implementation("causal_conv1d", _package(optional.CAUSAL_CONV1D), optional.causal_conv1d, _conv_served)
        ],
        "ssd": [
            Implementation("mamba_ssm", _package(optional.SSD_SCAN, True), optional.ssd_scan, _ssd_served_by_mamba_ssm),
            Implementation("triton", _triton_runs, _triton_ssd, _ssd_served),
        ],
        "delta": [Implementation("fla", _package(optional.GATED_DELTA_RULE, True), _fla_delta_rule, _delta_served)],
    },
}


def choose(
    kernels: str, device: torch.device, needs: Iterable[str] = ("attention",), dtype: torch.dtype = torch.float32
) -> Kernels:
    """Resolve auto | fast | reference for this device, the operations a model needs, and the dtype it multiplies in.

    fast is a UserError where an operation has implementations for this device and none of them can run.
    """
    if kernels not in CHOICES:
        raise UserError(f"kernels={kernels!r}: expected {', '.join(CHOICES)}")
    if kernels == "reference":
        return Kernels()
    chosen: dict[str, tuple[Implementation, ...]] = {}
    notes: list[str] = []
    for op in dict.fromkeys(needs):
        candidates = CANDIDATES.get(device.type, {}).get(op, [])
        refusals = [one.why_not(device, dtype) for one in candidates]
        chosen[op] = tuple(one for one, why in zip(candidates, refusals, strict=True) if why is None)
        causes = "; ".join(why for why in refusals if why is not None)
        if causes and not chosen[op] and kernels == "fast":
            raise UserError(f"kernels=fast: nothing for {op} runs on {device.type}: {causes}; or set kernels=auto")
        names = " else ".join(one.name for one in chosen[op]) or "torch"
        notes.append(f"{op} {names}" + (f" ({causes})" if causes else ""))
    return Kernels(chosen, f"{kernels}: {', '.join(notes) or 'nothing to choose'}")
