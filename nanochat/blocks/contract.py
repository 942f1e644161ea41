"""What a block is: the model's configuration, the context one forward shares, and the methods the core calls.

The core knows no block by name. A block mixes tokens (and, in most, channels), makes and advances its own state, and
says what it costs. Positions live in the context: the model advances them once per forward, a block never does.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from nanochat.config import UserError
from nanochat.kernels import Kernels


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model; stored as JSON in every checkpoint. Sizes are counts, lengths are tokens."""

    n_layer: int = 4
    block_pattern: list | str | None = None  # tiled to n_layer; None = all attention; GPT stores the resolved list
    d_model: int = 256
    n_head: int = 2
    n_kv_head: int = 0  # 0 = n_head; fewer = grouped-query attention (arXiv 2305.13245)
    vocab_size: int = 65536
    seq_len: int = 2048
    mlp_ratio: int = 4
    rope_base: float = 10000.0
    softcap: float = 0.0  # logits become softcap * tanh(logits / softcap); 0 = off
    window_pattern: str = "L"  # tiled over the attention layers: L full context, S sliding window; the last is always L
    window: int = 0  # tokens an S layer sees; 0 = seq_len / 4
    value_embeddings: bool = False  # every second attention layer adds a gated embedding of the token to its values
    residual_scalars: bool = False  # x <- a_i x + b_i x_0 before block i, both learned
    mamba_d_state: int = 16
    mamba_d_conv: int = 4
    mamba_expand: int = 2
    mamba_use_mlp: bool = False

    def __post_init__(self) -> None:
        if self.n_layer < 1 or self.vocab_size < 1 or self.seq_len < 1:
            raise UserError(
                f"n_layer={self.n_layer}, vocab_size={self.vocab_size}, seq_len={self.seq_len}: all must be > 0"
            )
        if self.d_model % self.n_head:
            raise UserError(f"d_model={self.d_model} is no multiple of n_head={self.n_head}: change one of them")
        if self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim} is odd, rotary embedding needs pairs: change d_model or n_head")
        if self.n_head % self.kv_heads:
            raise UserError(f"n_head={self.n_head} is no multiple of n_kv_head={self.n_kv_head}: change one of them")
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise UserError(f"window_pattern={self.window_pattern!r}: expected letters S and L, like SSSL")

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head


@dataclass
class Context:
    """What one forward gives every block: B rows of T new tokens. `pos` and `lengths` lie on the CPU (no sync)."""

    ids: Tensor  # (B, T)
    cos: Tensor  # rotary tables for these tokens, (1 or B, T, 1, K/2)
    sin: Tensor
    kernels: Kernels
    doc: Tensor | None = None  # (B, T) document index in a packed row; None = one document per row
    pos: Tensor | None = None  # (B,) tokens each row's state holds already; None = no state
    lengths: Tensor | None = None  # (B,) new tokens per row when rows are right-padded; None = all T
    memo: dict[Any, Any] = field(default_factory=dict)  # masks shared by the layers of this forward

    @cached_property
    def uniform_pos(self) -> int | None:
        """The position all rows share, or None when they differ."""
        assert self.pos is not None
        first = int(self.pos[0])
        return first if bool((self.pos == first).all()) else None

    @cached_property
    def q_pos(self) -> Tensor:
        """Absolute position of every new token, (B, T), on the device."""
        assert self.pos is not None
        return (self.pos[:, None] + torch.arange(self.ids.size(1))).to(self.ids.device)


class BlockState:
    """What a block remembers between forwards; row b belongs to sequence b."""

    def select(self, rows: Tensor) -> "BlockState":
        """A state of the given rows, in that order (rows may repeat)."""
        raise NotImplementedError

    def repeat(self, n: int, pos: Tensor) -> "BlockState":
        """Row i becomes rows i*n .. i*n + n-1; pos (B,): tokens each row has seen."""
        return self.select(torch.arange(len(pos)).repeat_interleave(n))

    def bytes(self) -> int:
        """Memory held, all rows together."""
        raise NotImplementedError


class Block(nn.Module):
    """One layer of the stack: x (B, T, D) float -> (B, T, D)."""

    def __init__(self, config: GPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx

    def forward(self, x: Tensor, ctx: Context, state: BlockState | None = None) -> Tensor:
        """With a state, x continues the sequences at ctx.pos and the state is advanced by ctx.lengths (or T)."""
        raise NotImplementedError

    def init_weights(self, generator: torch.Generator) -> None:
        """Set every parameter, also after to_empty()."""
        raise NotImplementedError

    def init_state(self, batch: int, max_len: int, device: torch.device, dtype: torch.dtype) -> BlockState:
        raise NotImplementedError

    def param_groups(self) -> dict[str, list[nn.Parameter]]:
        """Role -> parameters: 'matrix' (Muon), 'embedding', 'unembedding', 'scalar' (AdamW, each with its own rate)."""
        raise NotImplementedError

    def flops_per_token(self, seq_len: int) -> int:
        """Forward + backward FLOPs per token at this context length (6 per weight used, 12 H K S for attention)."""
        raise NotImplementedError

    def state_bytes(self, context_len: int) -> int:
        """Bytes one sequence of this length keeps for decoding in bfloat16."""
        raise NotImplementedError


def linear_flops(module: nn.Module) -> int:
    """6 FLOPs per weight of every 2-D parameter except embeddings: 2 forward, 4 backward."""
    tables = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    return 6 * sum(p.numel() for p in module.parameters() if p.ndim == 2 and id(p) not in tables)
