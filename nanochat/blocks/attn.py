"""Attention block ("attn"): grouped-query causal attention with RoPE and QK norm, then by default a ReLU^2 MLP.

Optional: a sliding window on some layers (arXiv 2004.05150), gated value embeddings (as in modded-nanogpt,
after arXiv 2410.17897), a short causal convolution of what queries, keys and values are made of, added to it, so that
a key knows the tokens before its own (as the first of the Canon layers, Allen-Zhu, Physics of Language Models 4.1).
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from nanochat.blocks.contract import Block, BlockState, Context, GPTConfig, RecurrentState
from nanochat.blocks.mamba import convolve, init_conv, recurrent_groups
from nanochat.blocks.pattern import entry_names
from nanochat.layers import Embedding, Linear, init_uniform, linear_together
from nanochat.ops import attention_mask, shared_prefix_attention

GATE_CHANNELS = 32  # channels of x that set the gate of the value embedding


class AttentionState(BlockState):
    """Keys and values of the last `capacity` tokens of each row, a ring buffer: slot = position mod capacity.

    Rows sampled from one prompt share its keys and values: `prefix`, stored once, comes before what each row keeps.
    """

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        windowed: bool,
        prefix: tuple[Tensor, Tensor] | None = None,
        conv: RecurrentState | None = None,
    ) -> None:
        self.k, self.v, self.windowed = k, v, windowed  # (B, G, capacity, K)
        self.prefix = prefix  # two of (1, G, S0, K)
        self.conv = conv or RecurrentState()  # "conv": (B, D, W - 1), where there is a convolution

    @property
    def capacity(self) -> int:
        return self.k.size(2)

    @property
    def shared(self) -> int:
        """Tokens in the prefix."""
        return 0 if self.prefix is None else self.prefix[0].size(2)

    def select(self, rows: Tensor) -> "AttentionState":
        rows = rows.to(self.k.device)
        k, v = self.k.index_select(0, rows), self.v.index_select(0, rows)
        return AttentionState(k, v, self.windowed, self.prefix, self.conv.select(rows))

    def repeat(self, n: int, pos: Tensor) -> "AttentionState":
        used = int(pos[0])
        if len(pos) != 1 or self.windowed or self.prefix is not None or not used:
            return self.select(torch.arange(len(pos)).repeat_interleave(n))
        _, G, capacity, K = self.k.shape
        # float32 on a CPU, where torch multiplies a few rows of bfloat16 slowly and our attention has no prefix
        dtype = torch.float32 if self.k.device.type == "cpu" else self.k.dtype
        k, v = (self.k.new_zeros(n, G, capacity - used, K, dtype=dtype) for _ in range(2))
        prefix = tuple(t[:, :, :used].to(dtype, copy=True) for t in (self.k, self.v))
        conv = self.conv.select(torch.zeros(n, dtype=torch.long))
        return AttentionState(k, v, self.windowed, (prefix[0], prefix[1]), conv)

    def join(self, other: "AttentionState") -> "AttentionState":
        assert self.prefix is other.prefix, "rows of two prompts"
        k, v = torch.cat((self.k, other.k)), torch.cat((self.v, other.v))
        return AttentionState(k, v, self.windowed, self.prefix, self.conv.join(other.conv))

    def bytes(self) -> int:
        return self.conv.bytes() + sum(t.nbytes for t in (self.k, self.v, *(self.prefix or ())))

    def slot_positions(self, pos: Tensor, n_slots: int) -> Tensor:
        """Which position each of the first n_slots holds after pos tokens, (B, n_slots); negative where empty."""
        last = pos[:, None] - 1
        return last - (last - torch.arange(n_slots, device=pos.device)) % self.capacity

    def append(self, k: Tensor, v: Tensor, ctx: Context) -> None:
        """Store one token per row, k, v: (B, G, 1, K)."""
        assert ctx.pos is not None
        if ctx.uniform_pos is not None:
            slot = (ctx.uniform_pos - self.shared) % self.capacity
            self.k[:, :, slot : slot + 1], self.v[:, :, slot : slot + 1] = k, v
        else:
            key = "slots", self.capacity, self.shared
            if key not in ctx.memo:
                at = torch.arange(k.size(0)), (ctx.pos - self.shared) % self.capacity
                ctx.memo[key] = torch.stack(at).to(self.k.device)
            rows, slots = ctx.memo[key]
            self.k[rows, :, slots], self.v[rows, :, slots] = k[:, :, 0], v[:, :, 0]

    def lengths(self, ctx: Context) -> Tensor:
        """How many slots of each row hold a token after `append`: the first ones, (B,)."""
        assert ctx.pos is not None
        key = "lengths", self.capacity, self.shared
        if key not in ctx.memo:
            ctx.memo[key] = (ctx.pos - self.shared + 1).clamp_max(self.capacity)
        return ctx.memo[key]

    def kept(self, ctx: Context) -> tuple[Tensor, Tensor, Tensor | None]:
        """After `append`: keys and values (B, G, S, K) to attend to, and their mask."""
        assert ctx.pos is not None
        pos = ctx.pos - self.shared
        used = min(int(pos.max()) + 1, self.capacity)
        if ctx.uniform_pos is not None:
            return self.k[:, :, :used], self.v[:, :, :used], None
        key = "append", self.capacity, self.shared
        mask = ctx.memo.get(key)
        if mask is None:
            seen = self.slot_positions(pos + 1, used) >= 0
            mask = ctx.memo[key] = seen[:, None, None].to(self.k.device)  # (B, 1, 1, S)
        return self.k[:, :, :used], self.v[:, :, :used], mask

    def extend(self, k: Tensor, v: Tensor, ctx: Context, window: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store T tokens per row, k, v: (B, G, T, K) -> what they attend to, (B, G, S + T, K), and its mask.

        A ring may drop what the first of the new tokens still sees, so the answer is the old content, then the new.
        The prefix comes before both.
        """
        assert ctx.pos is not None
        pos, new = ctx.pos - self.shared, ctx.q_pos - self.shared  # places in what each row keeps
        used = min(int(pos.max()), self.capacity)
        before = () if self.prefix is None else tuple(t.expand(k.size(0), -1, -1, -1) for t in self.prefix)
        keys = torch.cat((*before[:1], self.k[:, :, :used], k), 2)
        values = torch.cat((*before[1:], self.v[:, :, :used], v), 2)
        key = "extend", window, self.capacity, self.shared
        mask = ctx.memo.get(key)
        if mask is None:
            old = self.slot_positions(pos, used).to(k.device)
            mask = attention_mask(new, torch.cat((old, new), 1), window, None, None)
            mask = ctx.memo[key] = F.pad(mask, (self.shared, 0), value=True)
        self.write(k, v, ctx)
        return keys, values, mask

    def write(self, k: Tensor, v: Tensor, ctx: Context) -> None:
        """Store the valid ones of T tokens per row; pads never enter."""
        assert ctx.pos is not None
        T, k, v = k.size(2), k.to(self.k.dtype), v.to(self.v.dtype)
        if ctx.lengths is None and ctx.uniform_pos is not None:
            p = ctx.uniform_pos - self.shared
            if p + T <= self.capacity:
                self.k[:, :, p : p + T], self.v[:, :, p : p + T] = k, v
                return
        key = "write", self.capacity, self.shared
        if key not in ctx.memo:
            lengths = torch.full_like(ctx.pos, T) if ctx.lengths is None else ctx.lengths
            t = torch.arange(T)
            valid = (t < lengths[:, None]) & (t >= lengths[:, None] - self.capacity)  # (B, T)
            rows, cols = valid.nonzero(as_tuple=True)
            slots = (ctx.pos[rows] - self.shared + cols) % self.capacity
            ctx.memo[key] = torch.stack((rows, cols, slots)).to(self.k.device)
        rows, cols, slots = ctx.memo[key]
        self.k[rows, :, slots], self.v[rows, :, slots] = k[rows, :, cols], v[rows, :, cols]


class Attention(nn.Module):
    """Multi-head attention with G = n_kv_head groups of keys and values. (B, T, D) -> (B, T, D)."""

    def __init__(self, config: GPTConfig, window: int, has_value_embedding: bool) -> None:
        super().__init__()
        D, self.n_head, self.n_kv_head, self.head_dim = config.d_model, config.n_head, config.kv_heads, config.head_dim
        self.window = window
        W = config.attn_conv
        self.conv_weight = nn.Parameter(torch.empty(D, W)) if W else None
        self.c_q = Linear(D, self.n_head * self.head_dim)
        self.c_k = Linear(D, self.n_kv_head * self.head_dim)
        self.c_v = Linear(D, self.n_kv_head * self.head_dim)
        self.c_proj = Linear(self.n_head * self.head_dim, D)
        self.value_embed = self.value_gate = None
        if has_value_embedding:
            self.value_embed = Embedding(config.vocab_size, self.n_kv_head * self.head_dim)
            self.value_gate = Linear(min(GATE_CHANNELS, D), self.n_kv_head)

    def init_weights(self, generator: torch.Generator) -> None:
        for linear in (self.c_q, self.c_k, self.c_v):
            init_uniform(linear.weight, generator)
        nn.init.zeros_(self.c_proj.weight)
        if self.conv_weight is not None:
            init_conv(self.conv_weight, None, generator)
        if self.value_embed is not None and self.value_gate is not None:
            init_uniform(self.value_embed.weight, generator, std=self.c_v.weight.size(1) ** -0.5)
            nn.init.zeros_(self.value_gate.weight)

    def forward(self, x: Tensor, ctx: Context, state: AttentionState | None) -> Tensor:
        B, T, _ = x.shape
        H, G, K = self.n_head, self.n_kv_head, self.head_dim
        if self.conv_weight is not None:
            tail = None if state is None else state.conv
            x = x + convolve(x, self.conv_weight, None, ctx, tail, activation=None)
        qkv = linear_together(x, self.c_q, self.c_k, self.c_v).view(B, T, H + 2 * G, K)
        qk, v = qkv[:, :, : H + G], qkv[:, :, H + G :]
        if self.value_embed is not None and self.value_gate is not None:
            gate = 2 * torch.sigmoid(self.value_gate(x[..., : self.value_gate.in_features]))  # (B, T, G)
            v = v + gate[..., None] * self.value_embed(ctx.ids).view(B, T, G, K).to(v.dtype)
        qk = ctx.kernels.norm(qk, qk.dtype, ctx.cos, ctx.sin).transpose(1, 2)  # (B, H + G, T, K)
        q, k, v = qk[:, :H], qk[:, H:], v.transpose(1, 2)
        return self.c_proj(self.attend(q, k, v, ctx, state).transpose(1, 2).reshape(B, T, H * K))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, state: AttentionState | None) -> Tensor:
        """q: (B, H, T, K), k, v: (B, G, T, K) -> (B, H, T, K)."""
        if state is None:
            return ctx.kernels.self_attention(q, k, v, self.window, ctx.doc, ctx.memo)
        if ctx.uniform_pos == 0:  # nothing stored yet: pads stand behind every token that could see them
            state.write(k, v, ctx)
            return ctx.kernels.self_attention(q, k, v, self.window, None, ctx.memo)
        dtype, k, v = q.dtype, k.to(state.k.dtype), v.to(state.v.dtype)
        if q.size(2) == 1 and ctx.lengths is None:
            state.append(k, v, ctx)
            y = ctx.kernels.attend(q, state.k, state.v, state.lengths(ctx)) if state.prefix is None else None
            if y is not None:
                return y.to(dtype)
            k, v, mask = state.kept(ctx)
            if state.prefix is not None:
                return shared_prefix_attention(q.to(k.dtype), *state.prefix, k, v, mask).to(dtype)
        else:
            k, v, mask = state.extend(k, v, ctx, self.window)
        y = F.scaled_dot_product_attention(
            q.to(k.dtype), k, v, attn_mask=mask, enable_gqa=self.n_head != self.n_kv_head
        )
        return y.to(dtype)


class AttentionBlock(Block):
    """Attention, full or in a sliding window; the pattern entry's `window` (0 = full) wins over window_pattern."""

    OPTIONS = ("window",)
    KERNELS = ("attention",)

    def __init__(self, config: GPTConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx, mlp=True)
        names = entry_names(config.block_pattern, config.n_layer)
        ordinal, n_attn = names[:layer_idx].count("attn"), names.count("attn")
        last = ordinal == n_attn - 1
        short = config.window_pattern[ordinal % len(config.window_pattern)] == "S" and not last
        window = self.option("window", config.short_window if short else 0) or 0
        if config.attn_conv:
            self.KERNELS = (*self.KERNELS, "conv")
        self.attn = Attention(config, window, config.value_embeddings and (n_attn - 1 - ordinal) % 2 == 0)

    def mix(self, x: Tensor, ctx: Context, state: BlockState | None) -> Tensor:
        assert state is None or isinstance(state, AttentionState)
        return self.attn(x, ctx, state)

    def init_weights(self, generator: torch.Generator) -> None:
        self.attn.init_weights(generator)
        super().init_weights(generator)

    def init_state(self, batch: int, max_len: int, device: torch.device, dtype: torch.dtype) -> AttentionState:
        """In bfloat16 where that is multiplied in and our own attention reads it: it waits for memory, half as much."""
        window, c_q = self.attn.window, self.attn.c_q
        kept = torch.bfloat16 if c_q.packs and c_q.compute_dtype == torch.bfloat16 else dtype
        shape = (batch, self.attn.n_kv_head, min(max_len, window) if window else max_len, self.attn.head_dim)
        k, v = (torch.zeros(shape, device=device, dtype=kept) for _ in range(2))
        D, W = self.config.d_model, self.config.attn_conv
        tail = {"conv": torch.zeros(batch, D, W - 1, device=device, dtype=dtype)} if W else {}
        return AttentionState(k, v, bool(window), conv=RecurrentState(**tail))

    def param_groups(self) -> dict[str, list[nn.Parameter]]:
        groups = super().param_groups()
        gate = self.attn.value_gate
        if self.attn.conv_weight is not None:  # all that is scalar so far
            groups = recurrent_groups(groups)
        if gate is not None:  # a gate of few channels is no matrix for Muon
            groups["matrix"] = [p for p in groups["matrix"] if p is not gate.weight]
            groups["scalar"] += gate.parameters()
        return groups

    def flops_per_token(self, seq_len: int) -> int:
        seen = min(seq_len, self.attn.window or seq_len)
        taps = self.config.attn_conv * self.config.d_model
        return super().flops_per_token(seq_len) + 12 * self.attn.n_head * self.attn.head_dim * seen + 6 * taps

    def state_bytes(self, context_len: int) -> int:
        kept = min(context_len, self.attn.window or context_len)
        tail = max(0, self.config.attn_conv - 1) * self.config.d_model
        return 2 * (2 * self.attn.n_kv_head * self.attn.head_dim * kept + tail)
