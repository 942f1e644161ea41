"""Reference mathematics in plain torch: correct everywhere and quick on a CPU. No module state, no kernels here.

Shapes are (batch, time, ...) unless a function says that it follows mamba_ssm's (batch, channels, time).
"""

from nanochat.ops.attention import attention_blocks, attention_mask, block_attention, shared_prefix_attention
from nanochat.ops.dense import (
    cap_logits,
    linear_cross_entropy,
    linear_cross_entropy_rows,
    relu_squared,
    rms_norm,
    rotate,
)

__all__ = [
    "attention_blocks",
    "attention_mask",
    "block_attention",
    "cap_logits",
    "linear_cross_entropy",
    "linear_cross_entropy_rows",
    "relu_squared",
    "rms_norm",
    "rotate",
    "shared_prefix_attention",
]
