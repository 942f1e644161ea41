"""Mamba-2 block ("mamba2", "M2"): state space duality, Dao and Gu, arXiv 2405.21060, sections 6 and 7.

    h_t = exp(dt_t a) h_{t-1} + dt_t B_t x_t^T,   y_t = C_t h_t + D x_t,   out = W_out norm(y * silu(z))

One decay per head (x: H heads of P channels), B_t and C_t shared by groups of heads. The gated norm has no weight of
its own: W_out, which comes next, can hold it. The state h (B, H, P, N), the steps and the decays are float32.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from nanochat.blocks.contract import Block, BlockState, Context, GPTConfig, RecurrentState
from nanochat.blocks.mamba import convolve, init_conv, init_dt_bias, recurrent_groups
from nanochat.config import UserError
from nanochat.layers import Linear, init_uniform, linear_together, norm
from nanochat.ops import ssd_state_update

CHUNK = 64  # tokens of a chunk of the SSD scan


class Mamba2Block(Block):
    KERNELS = ("conv", "ssd")

    def __init__(self, config: GPTConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx, mlp=config.mamba_use_mlp)
        D, N, W = config.d_model, config.mamba2_d_state, config.mamba_d_conv
        E, P, G = config.mamba_expand * D, config.mamba2_head_dim, config.mamba2_n_group
        if P < 1 or G < 1 or E % P or (E // P) % G:
            raise UserError(
                f"mamba2: mamba_expand * d_model = {E} channels do not make heads of mamba2_head_dim={P} in "
                f"mamba2_n_group={G} groups: choose a head_dim that divides {E} and groups that divide the heads"
            )
        self.n_head, self.head_dim, self.n_group, self.d_state, self.d_inner = E // P, P, G, N, E
        self.in_z, self.in_x, self.in_bc = Linear(D, E), Linear(D, E), Linear(D, 2 * G * N)
        self.in_dt, self.dt_bias = Linear(D, self.n_head), nn.Parameter(torch.empty(self.n_head))
        C = E + 2 * G * N  # channels of the convolution
        self.conv_weight, self.conv_bias = nn.Parameter(torch.empty(C, W)), nn.Parameter(torch.empty(C))
        self.A_log, self.D_skip = nn.Parameter(torch.empty(self.n_head)), nn.Parameter(torch.empty(self.n_head))
        self.out_proj = Linear(E, D)

    def mix(self, x: Tensor, ctx: Context, state: BlockState | None) -> Tensor:
        assert state is None or isinstance(state, RecurrentState)
        B, T, _ = x.shape
        GN, heads, groups = self.n_group * self.d_state, (self.n_head, self.head_dim), (self.n_group, self.d_state)
        z, dt = self.in_z(x), self.in_dt(x)  # (B, T, E), (B, T, H)
        xbc = convolve(linear_together(x, self.in_x, self.in_bc), self.conv_weight, self.conv_bias, ctx, state)
        u, B_t, C_t = xbc.split((self.d_inner, GN, GN), -1)
        u = u.reshape(B, T, *heads)
        B_t, C_t = B_t.reshape(B, T, *groups), C_t.reshape(B, T, *groups)
        A = -torch.exp(self.A_log)
        if state is not None and T == 1 and ctx.lengths is None:
            y = ssd_state_update(
                state["ssm"], u[:, 0], dt[:, 0], A, B_t[:, 0], C_t[:, 0], self.D_skip, None, self.dt_bias, True
            )
        else:
            y = ctx.kernels.ssd_scan(
                u, dt, A, B_t, C_t, CHUNK, self.D_skip, None, self.dt_bias, dt_softplus=True, seq_idx=ctx.doc,
                initial_states=None if state is None else state["ssm"], return_final_states=state is not None,
                lengths=ctx.valid,
            )  # fmt: skip
            if state is not None:
                y, last = y
                state.update(ssm=last)
        y = y.reshape(z.shape) * F.silu(z)
        return self.out_proj(norm(y.view(B, T, self.n_group, -1)).view(z.shape))  # by group, as the paper for TP

    def init_weights(self, generator: torch.Generator) -> None:
        super().init_weights(generator)
        for linear in (self.in_z, self.in_x, self.in_bc, self.in_dt):
            init_uniform(linear.weight, generator)
        nn.init.zeros_(self.out_proj.weight)
        init_conv(self.conv_weight, self.conv_bias, generator)
        init_dt_bias(self.dt_bias, generator)
        init_decay(self.A_log, generator)
        nn.init.ones_(self.D_skip)

    def init_state(self, batch: int, max_len: int, device: torch.device, dtype: torch.dtype) -> RecurrentState:
        C, W = self.conv_weight.shape
        return RecurrentState(
            conv=torch.zeros(batch, C, W - 1, device=device, dtype=dtype),
            ssm=torch.zeros(batch, self.n_head, self.head_dim, self.d_state, device=device),
        )

    def param_groups(self) -> dict[str, list[nn.Parameter]]:
        return recurrent_groups(super().param_groups(), self.in_dt)

    def flops_per_token(self, seq_len: int) -> int:
        """Per chunk of Q tokens and head: scores and their product with x (2 Q (N / heads of a group + P), half masked
        but multiplied), states in and out (4 N P); three times that with the backward."""
        H, P, N, Q = self.n_head, self.head_dim, self.d_state, CHUNK
        scan = 2 * Q * (self.n_group * N + H * P) + 4 * H * P * N
        return super().flops_per_token(seq_len) + 3 * (scan + 2 * self.conv_weight.numel())

    def state_bytes(self, context_len: int) -> int:
        C, W = self.conv_weight.shape
        return 4 * self.d_inner * self.d_state + 2 * C * (W - 1)


@torch.no_grad()
def init_decay(A_log: Tensor, generator: torch.Generator) -> None:
    """A uniform in 1..16, as the paper's code has it. (H,)"""
    A_log.copy_((torch.rand(A_log.shape, generator=generator) * 15 + 1).log())
