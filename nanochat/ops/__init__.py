"""Reference mathematics in plain torch: correct everywhere and quick on a CPU. No module state, no kernels here.

Shapes are (batch, time, ...) unless a function says that it follows mamba_ssm's (batch, channels, time).
"""

from nanochat.ops.attention import attention_blocks, attention_mask, block_attention, shared_prefix_attention
from nanochat.ops.conv import causal_conv1d
from nanochat.ops.delta import gated_delta_rule, gated_delta_update
from nanochat.ops.dense import (
    cap_logits,
    linear_cross_entropy,
    linear_cross_entropy_rows,
    relu_squared,
    rms_norm,
    rotate,
)
from nanochat.ops.scan import selective_scan, selective_state_update
from nanochat.ops.ssd import ssd_scan, ssd_state_update

__all__ = [
    "attention_blocks",
    "attention_mask",
    "block_attention",
    "cap_logits",
    "causal_conv1d",
    "gated_delta_rule",
    "gated_delta_update",
    "linear_cross_entropy",
    "linear_cross_entropy_rows",
    "relu_squared",
    "rms_norm",
    "rotate",
    "selective_scan",
    "selective_state_update",
    "shared_prefix_attention",
    "ssd_scan",
    "ssd_state_update",
]
