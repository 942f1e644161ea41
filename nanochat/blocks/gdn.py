"""Gated DeltaNet block ("gdn", "G"): Yang, Kautz and Hatamizadeh, arXiv 2412.06464, equation 10 and section 3.4.

    S_t = exp(g_t) S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T,   o_t = S_t q_t,   out = W_out (norm(o) * silu(z))

q, k, v pass a short causal convolution; q and k have unit length; g = -exp(A_log) softplus(a + dt_bias) as in Mamba-2.
The norm of the output has no weight of its own: W_out, which comes next, can hold it. The state is float32.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from nanochat.blocks.contract import Block, BlockState, Context, GPTConfig, RecurrentState
from nanochat.blocks.mamba import convolve, init_conv, init_dt_bias, recurrent_groups
from nanochat.blocks.mamba2 import init_decay
from nanochat.config import UserError
from nanochat.layers import Linear, init_uniform, linear_together, norm
from nanochat.ops import gated_delta_update, rms_norm

CHUNK = 64


class GatedDeltaNetBlock(Block):
    KERNELS = ("conv", "delta")

    def __init__(self, config: GPTConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx, mlp=config.mamba_use_mlp)
        D, K = config.d_model, config.gdn_head_dim
        if K < 1 or config.gdn_expand_v < 1 or config.gdn_expand * D < K:
            raise UserError(
                f"gdn: gdn_expand * d_model = {config.gdn_expand * D:g} channels hold no head of gdn_head_dim={K}: "
                f"use --gdn_head_dim={max(1, int(config.gdn_expand * D))} or less"
            )
        self.n_head, self.head_dim, self.value_dim = int(config.gdn_expand * D / K), K, config.gdn_expand_v * K
        self.d_key, self.d_value = self.n_head * K, self.n_head * self.value_dim
        self.in_q, self.in_k = Linear(D, self.d_key), Linear(D, self.d_key)
        self.in_v, self.in_z = Linear(D, self.d_value), Linear(D, self.d_value)
        self.in_a, self.in_b = Linear(D, self.n_head), Linear(D, self.n_head)
        self.conv_weight = nn.Parameter(torch.empty(2 * self.d_key + self.d_value, config.mamba_d_conv))
        self.A_log, self.dt_bias = nn.Parameter(torch.empty(self.n_head)), nn.Parameter(torch.empty(self.n_head))
        self.out_proj = Linear(self.d_value, D)

    def mix(self, x: Tensor, ctx: Context, state: BlockState | None) -> Tensor:
        assert state is None or isinstance(state, RecurrentState)
        B, T, H = *x.shape[:2], self.n_head
        qkv = convolve(linear_together(x, self.in_q, self.in_k, self.in_v), self.conv_weight, None, ctx, state)
        qk, v = qkv.split((2 * self.d_key, self.d_value), -1)
        qk = qk.reshape(B, T, 2 * H, self.head_dim)
        q, k = rms_norm(qk, qk.dtype, scale=self.head_dim**-0.5).chunk(2, 2)  # of length 1
        v = v.reshape(B, T, H, self.value_dim)
        a, b = linear_together(x, self.in_a, self.in_b).float().chunk(2, -1)  # (B, T, H)
        g, beta = -torch.exp(self.A_log) * F.softplus(a + self.dt_bias), torch.sigmoid(b)
        if state is not None and T == 1 and ctx.lengths is None:
            o = gated_delta_update(state["ssm"], q[:, 0], k[:, 0], v[:, 0], g[:, 0], beta[:, 0])[:, None]
        else:
            o = ctx.kernels.gated_delta_rule(
                q, k, v, g, beta, initial_state=None if state is None else state["ssm"],
                return_final_state=state is not None, chunk_size=CHUNK, seq_idx=ctx.doc, lengths=ctx.valid,
            )  # fmt: skip
            if state is not None:
                o, last = o
                state.update(ssm=last)
        return self.out_proj(norm(o, v.dtype).reshape(B, T, self.d_value) * F.silu(self.in_z(x)))

    def init_weights(self, generator: torch.Generator) -> None:
        super().init_weights(generator)
        for linear in (self.in_q, self.in_k, self.in_v, self.in_z, self.in_a, self.in_b):
            init_uniform(linear.weight, generator)
        nn.init.zeros_(self.out_proj.weight)
        init_conv(self.conv_weight, None, generator)
        init_dt_bias(self.dt_bias, generator)
        init_decay(self.A_log, generator)

    def init_state(self, batch: int, max_len: int, device: torch.device, dtype: torch.dtype) -> RecurrentState:
        C, W = self.conv_weight.shape
        return RecurrentState(
            conv=torch.zeros(batch, C, W - 1, device=device, dtype=dtype),
            ssm=torch.zeros(batch, self.n_head, self.head_dim, self.value_dim, device=device),
        )

    def param_groups(self) -> dict[str, list[nn.Parameter]]:
        return recurrent_groups(super().param_groups(), self.in_a, self.in_b)

    def flops_per_token(self, seq_len: int) -> int:
        """Per head and chunk of Q tokens: k k^T and q k^T (4 Q K), their products with values and keys (4 Q V + 2 Q K),
        states in and out (6 K V); three times that with the backward."""
        H, K, V, Q = self.n_head, self.head_dim, self.value_dim, CHUNK
        scan = H * (6 * Q * K + 4 * Q * V + 6 * K * V)
        return super().flops_per_token(seq_len) + 3 * (scan + 2 * self.conv_weight.numel())

    def state_bytes(self, context_len: int) -> int:
        C, W = self.conv_weight.shape
        return 4 * self.d_key * self.value_dim + 2 * C * (W - 1)
