"""What a block is: the model's configuration, the context one forward shares, and the methods the core calls.

The core knows no block by name. A block mixes tokens and, if it has an MLP, channels; it makes and advances its own
state and says what it costs. Positions live in the context: the model advances them once per forward, no block does.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn as nn
from torch import Tensor

from nanochat.config import UserError
from nanochat.kernels import Kernels
from nanochat.layers import MLP, Linear


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
    head_tie: float = 0.0  # the head's rows are their own weights plus this times the normed embedding of the token
    softcap: float = 0.0  # logits become softcap * tanh(logits / softcap); 0 = off
    window_pattern: str = "L"  # tiled over the attention layers: L full context, S sliding window; the last is always L
    window: int = 0  # tokens an S layer sees; 0 = seq_len / 4
    attn_conv: int = 0  # width of a short causal convolution ahead of queries, keys and values; 0 = none
    value_embeddings: bool = False  # every second attention layer adds a gated embedding of the token to its values
    residual_scalars: bool = False  # x <- a_i x + b_i x_0 before block i, both learned
    mlp: bool | None = None  # an MLP after the mixer; None = attention has one, the others as mamba_use_mlp says
    mamba_d_state: int = 16
    mamba_d_conv: int = 4  # width of the short convolution, of gdn too
    mamba_expand: int = 2  # d_inner / d_model, of mamba2 too
    mamba_use_mlp: bool = False
    mamba2_d_state: int = 128
    mamba2_head_dim: int = 64
    mamba2_n_group: int = 1  # groups of heads that share B and C
    gdn_head_dim: int = 64  # channels of a key; a value has gdn_expand_v times as many
    gdn_expand: float = 0.75  # width of all keys / d_model, as in arXiv 2412.06464
    gdn_expand_v: int = 2

    def __post_init__(self) -> None:
        if self.n_layer < 1 or self.vocab_size < 1 or self.seq_len < 1:
            raise UserError(
                f"n_layer={self.n_layer}, vocab_size={self.vocab_size}, seq_len={self.seq_len}: all must be > 0"
            )
        if min(self.d_model, self.n_head, self.mlp_ratio) < 1 or self.n_kv_head < 0:
            raise UserError(
                f"d_model={self.d_model}, n_head={self.n_head}, mlp_ratio={self.mlp_ratio}, n_kv_head="
                f"{self.n_kv_head}: the first three must be at least 1, the last at least 0"
            )
        if self.window < 0 or self.softcap < 0 or self.rope_base <= 0:
            raise UserError(
                f"window={self.window}, softcap={self.softcap}, rope_base={self.rope_base}: expected the first two to "
                f"be 0 or more, the last more than 0"
            )
        if self.d_model % self.n_head:
            raise UserError(f"d_model={self.d_model} is no multiple of n_head={self.n_head}: change one of them")
        if self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim} is odd, rotary embedding needs pairs: change d_model or n_head")
        if self.n_head % self.kv_heads:
            raise UserError(f"n_head={self.n_head} is no multiple of n_kv_head={self.n_kv_head}: change one of them")
        if self.attn_conv < 0 or self.attn_conv == 1:
            raise UserError(f"attn_conv={self.attn_conv}: expected 0 (none) or a width of at least 2")
        if self.mamba_d_state < 1 or self.mamba_d_conv < 2 or self.mamba_expand < 1:
            raise UserError(
                f"mamba_d_state={self.mamba_d_state}, mamba_d_conv={self.mamba_d_conv}, mamba_expand="
                f"{self.mamba_expand}: expected at least 1, 2 and 1"
            )
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise UserError(f"window_pattern={self.window_pattern!r}: expected letters S and L, like SSSL")

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def short_window(self) -> int:
        """Tokens an S layer sees."""
        return self.window or max(1, self.seq_len // 4)


@dataclass
class Context:
    """What one forward gives every block: B rows of T new tokens. `pos` and `lengths` lie on the CPU (no sync)."""

    ids: Tensor  # (B, T)
    cos: Tensor  # rotary tables for these tokens, (1 or B, T, 1, K/2)
    sin: Tensor
    kernels: Kernels
    dtype: torch.dtype = torch.float32  # what matrices multiply is given in this
    doc: Tensor | None = None  # (B, T) document index in a packed row; None = one document per row
    pos: Tensor | None = None  # (B,) tokens each row's state holds already; None = no state
    lengths: Tensor | None = None  # (B,) new tokens per row when rows are right-padded; None = all T
    memo: dict[Any, Any] = field(default_factory=dict)  # masks and places shared by the layers of this forward

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

    @cached_property
    def valid(self) -> Tensor | None:
        """`lengths` on the device, or None."""
        return None if self.lengths is None else self.lengths.to(self.ids.device)


class BlockState:
    """What a block remembers between forwards; row b belongs to sequence b. This one remembers nothing."""

    def select(self, rows: Tensor) -> "BlockState":
        """A state of the given rows, in that order (rows may repeat)."""
        return self

    def repeat(self, n: int, pos: Tensor) -> "BlockState":
        """Row i becomes rows i*n .. i*n + n-1; pos (B,): tokens each row has seen."""
        return self.select(torch.arange(len(pos)).repeat_interleave(n))

    def join(self, other: Any) -> "BlockState":
        """The rows of this state, then those of `other`, a state of the same block; both were selected from one."""
        return self

    def bytes(self) -> int:
        """Memory held, all rows together."""
        return 0


class RecurrentState(BlockState):
    """Named tensors of a constant size, (B, ...) each: the tail of a convolution, the state of a recurrence."""

    def __init__(self, **tensors: Tensor) -> None:
        self.tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def update(self, **tensors: Tensor) -> None:
        """Replace tensors after a forward; dtypes stay."""
        for name, t in tensors.items():
            self.tensors[name] = t.to(self.tensors[name].dtype)

    def select(self, rows: Tensor) -> "RecurrentState":
        return RecurrentState(**{k: t.index_select(0, rows.to(t.device)) for k, t in self.tensors.items()})

    def join(self, other: "RecurrentState") -> "RecurrentState":
        return RecurrentState(**{k: torch.cat((t, other[k])) for k, t in self.tensors.items()})

    def bytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())


class Block(nn.Module):
    """One layer of the stack: x + mix(norm(x)), then, if it has an MLP, x + mlp(norm(x)). x: (B, T, D) float.

    A block of one's own overrides `mix` and `init_weights`, and what of the rest differs; docs/blocks.md shows one.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = ()  # keys of a pattern entry that are no field of GPTConfig, see option()
    KERNELS: tuple[str, ...] = ()  # operations it calls on ctx.kernels, so that a choice can name them

    def __init__(self, config: GPTConfig, layer_idx: int, mlp: bool = False) -> None:
        """mlp: whether the block has an MLP where config.mlp is None."""
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        has_mlp = mlp if config.mlp is None else config.mlp
        self.mlp = MLP(config.d_model, config.mlp_ratio * config.d_model) if has_mlp else None

    def option(self, key: str, default: Any) -> Any:
        """The value this layer's entry in the pattern gives to one of OPTIONS."""
        pattern = self.config.block_pattern
        entry = pattern[self.layer_idx] if isinstance(pattern, list) and self.layer_idx < len(pattern) else None
        return entry.get(key, default) if isinstance(entry, dict) else default

    def mix(self, x: Tensor, ctx: Context, state: BlockState | None) -> Tensor:
        """Mix tokens: x (B, T, D) in ctx.dtype -> (B, T, D).

        With a state, x continues the sequences at ctx.pos, and the state is advanced by ctx.lengths (or T).
        """
        raise NotImplementedError

    def forward(self, x: Tensor, ctx: Context, state: BlockState | None = None) -> Tensor:
        x = x + self.mix(ctx.kernels.norm(x, ctx.dtype), ctx, state)
        return x if self.mlp is None else x + self.mlp(ctx.kernels.norm(x, ctx.dtype))

    def init_weights(self, generator: torch.Generator) -> None:
        """Set every parameter, also after to_empty(). This one sets the MLP's: call it, then set your own."""
        if self.mlp is not None:
            self.mlp.init_weights(generator)

    def init_state(self, batch: int, max_len: int, device: torch.device, dtype: torch.dtype) -> BlockState:
        return BlockState()

    def param_groups(self) -> dict[str, list[nn.Parameter]]:
        """Role -> parameters: 'matrix' (Muon), 'embedding', 'unembedding', 'scalar', 'ssm' (AdamW, a rate for each).

        Here: weights of Linears are matrices, Embeddings are embeddings, all else is scalar. Only matrices decay.
        """
        roles: dict[str, list[nn.Parameter]] = {"matrix": [], "embedding": [], "scalar": []}
        for module in self.modules():
            role = {Linear: "matrix", nn.Embedding: "embedding"}
            kind = next((name for cls, name in role.items() if isinstance(module, cls)), "scalar")
            roles[kind] += module.parameters(recurse=False)
        return roles

    def flops_per_token(self, seq_len: int) -> int:
        """Forward + backward FLOPs per token at this context length: 6 per weight used, and what mixing adds."""
        return linear_flops(self)

    def state_bytes(self, context_len: int) -> int:
        """Bytes one sequence of this length keeps for decoding on a GPU (bfloat16, recurrent states float32)."""
        return 0


def linear_flops(module: nn.Module) -> int:
    """6 FLOPs per weight of every Linear: 2 forward, 4 backward."""
    return 6 * sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
