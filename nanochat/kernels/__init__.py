"""Which implementation runs: the only file that would import flash-attn, mamba-ssm, causal-conv1d or triton.

`kernels = auto | fast | reference` is decided once per model and printed once with its reason. Today there are two
attention paths: torch's scaled_dot_product_attention, and `ops.block_attention`, which on a CPU trains 1.5-2.5x faster
(LOG 2026-11-21). Both compute the same function; tests compare them.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat import ops
from nanochat.config import UserError

CHOICES = ("auto", "fast", "reference")
BLOCK_ATTENTION_MAX_T = 4096  # above, the stored probabilities of block_attention outgrow its gain


@dataclass(frozen=True)
class Kernels:
    """The choice of one model. `reason` is what a user reads."""

    attention: str = "sdpa"  # "sdpa" | "blocks"
    reason: str = "reference"

    def self_attention(self, q: Tensor, k: Tensor, v: Tensor, window: int, doc: Tensor | None, memo: dict) -> Tensor:
        """Causal attention of a whole segment on itself. q: (B, H, T, K), k, v: (B, G, T, K) -> (B, H, T, K).

        doc: (B, T) or None. memo keeps masks for the other layers of the same forward.
        """
        T = q.size(2)
        if self.attention == "blocks" and T <= BLOCK_ATTENTION_MAX_T and torch.is_grad_enabled():
            blocks = memo.get(("blocks", window))
            if blocks is None:
                blocks = memo["blocks", window] = ops.attention_blocks(T, window, doc, q)
            k, v = (t.repeat_interleave(q.size(1) // t.size(1), 1) if t.size(1) != q.size(1) else t for t in (k, v))
            return ops.block_attention(q, k, v, blocks)
        if doc is None and (not window or window >= T):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.size(1) != q.size(1))
        mask = memo.get(("mask", window))
        if mask is None:
            pos = torch.arange(T, device=q.device)[None]
            mask = memo["mask", window] = ops.attention_mask(pos, pos, window, doc, doc)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=k.size(1) != q.size(1))


def choose(kernels: str, device: torch.device) -> Kernels:
    """Resolve auto | fast | reference for this device. 'fast' that cannot be met is a UserError."""
    if kernels not in CHOICES:
        raise UserError(f"kernels={kernels!r}: expected {', '.join(CHOICES)}")
    if kernels == "reference":
        return Kernels("sdpa", "reference: torch's scaled_dot_product_attention, as asked")
    if device.type == "cpu":
        return Kernels("blocks", f"{kernels}: block attention, the fastest known on a CPU")
    if kernels == "fast":
        raise UserError(
            "kernels=fast: no kernel beyond torch's own is wired for this device yet: use kernels=auto (torch's SDPA)"
        )
    return Kernels("sdpa", "auto: torch's scaled_dot_product_attention (flash on this device where torch has it)")
