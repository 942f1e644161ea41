"""Mamba block ("mamba", "M"): the selective state space model of Gu and Dao, arXiv 2312.00752, algorithm 2.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t,   y_t = C_t h_t + D u_t,   out = W_out (y * silu(z))

u is a short causal convolution of the input; dt, B_t, C_t depend on it. The state h (B, E, N), the steps and A are
float32. Projections are one Linear each, where the paper's code packs them, so that Muon sees each matrix by itself.
"""

import math

import torch
import torch.nn as nn
from torch import Tensor

from nanochat.blocks.contract import Block, BlockState, Context, GPTConfig, RecurrentState
from nanochat.layers import Linear, init_uniform

DT_MIN, DT_MAX = 1e-3, 1e-1  # the range of step sizes at the start; arXiv 2312.00752, section 3.6


class MambaBlock(Block):
    KERNELS = ("conv", "scan")

    def __init__(self, config: GPTConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx, mlp=config.mamba_use_mlp)
        D, N, W = config.d_model, config.mamba_d_state, config.mamba_d_conv
        E, R = config.mamba_expand * D, math.ceil(D / 16)  # d_inner, rank of dt
        self.d_inner, self.dt_rank, self.d_state = E, R, N
        self.in_x, self.in_z = Linear(D, E), Linear(D, E)
        self.conv_weight, self.conv_bias = nn.Parameter(torch.empty(E, W)), nn.Parameter(torch.empty(E))
        self.x_proj = Linear(E, R + 2 * N)
        self.dt_proj, self.dt_bias = Linear(R, E), nn.Parameter(torch.empty(E))
        self.A_log, self.D_skip = nn.Parameter(torch.empty(E, N)), nn.Parameter(torch.empty(E))
        self.out_proj = Linear(E, D)

    def mix(self, x: Tensor, ctx: Context, state: BlockState | None) -> Tensor:
        assert state is None or isinstance(state, RecurrentState)
        u, z = self.in_x(x), self.in_z(x)  # (B, T, E)
        u = convolve(u, self.conv_weight, self.conv_bias, ctx, state)
        dt, B_t, C_t = self.x_proj(u).split((self.dt_rank, self.d_state, self.d_state), -1)
        delta = self.dt_proj(dt)  # (B, T, E), softplus and bias in float32 below
        A = -torch.exp(self.A_log)
        if state is not None and x.size(1) == 1 and ctx.lengths is None:
            y = ctx.kernels.selective_state_update(
                state["ssm"], u[:, 0], delta[:, 0], A, B_t[:, 0], C_t[:, 0], self.D_skip, z[:, 0], self.dt_bias, True
            )
            return self.out_proj(y[:, None])
        y = ctx.kernels.selective_scan(
            *(t.transpose(1, 2) for t in (u, delta)), A, *(t.transpose(1, 2) for t in (B_t, C_t)), self.D_skip,
            z.transpose(1, 2), self.dt_bias, delta_softplus=True, return_last_state=state is not None,
            initial_state=None if state is None else state["ssm"], seq_idx=ctx.doc, lengths=ctx.valid,
        )  # fmt: skip
        if state is not None:
            y, last = y
            state.update(ssm=last)
        return self.out_proj(y.transpose(1, 2))

    def init_weights(self, generator: torch.Generator) -> None:
        super().init_weights(generator)
        for linear in (self.in_x, self.in_z, self.x_proj):
            init_uniform(linear.weight, generator)
        init_uniform(self.dt_proj.weight, generator, std=self.dt_rank**-0.5 / 3**0.5)
        nn.init.zeros_(self.out_proj.weight)
        init_conv(self.conv_weight, self.conv_bias, generator)
        init_dt_bias(self.dt_bias, generator)
        with torch.no_grad():
            self.A_log.copy_(torch.arange(1, self.d_state + 1).log().expand_as(self.A_log))  # S4D-real
        nn.init.ones_(self.D_skip)

    def init_state(self, batch: int, max_len: int, device: torch.device, dtype: torch.dtype) -> RecurrentState:
        return RecurrentState(
            conv=torch.zeros(batch, self.d_inner, self.conv_weight.size(1) - 1, device=device, dtype=dtype),
            ssm=torch.zeros(batch, self.d_inner, self.d_state, device=device),
        )

    def param_groups(self) -> dict[str, list[nn.Parameter]]:
        return recurrent_groups(super().param_groups(), self.dt_proj)

    def flops_per_token(self, seq_len: int) -> int:
        """The scan: 9 N multiply-adds and exponentials per channel forward, twice that backward."""
        return super().flops_per_token(seq_len) + 3 * self.d_inner * (9 * self.d_state + 2 * self.conv_weight.size(1))

    def state_bytes(self, context_len: int) -> int:
        return self.d_inner * (4 * self.d_state + 2 * (self.conv_weight.size(1) - 1))


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ctx: Context,
    state: RecurrentState | None,
    activation: str | None = "silu",
) -> Tensor:
    """The short causal convolution, (B, T, C) -> (B, T, C); its tail is kept in the state."""
    y = ctx.kernels.causal_conv1d(
        x.transpose(1, 2), weight, bias, seq_idx=ctx.doc, initial_states=None if state is None else state["conv"],
        return_final_states=state is not None, activation=activation, lengths=ctx.valid,
    )  # fmt: skip
    if state is not None:
        y, tail = y
        state.update(conv=tail)
    return y.transpose(1, 2)


@torch.no_grad()
def init_conv(weight: Tensor, bias: Tensor | None, generator: torch.Generator) -> None:
    """As torch's Conv1d: uniform within width^-0.5. (C, W), (C)."""
    for t in (weight,) if bias is None else (weight, bias):
        init_uniform(t, generator, std=(3 * weight.size(1)) ** -0.5)


@torch.no_grad()
def init_dt_bias(bias: Tensor, generator: torch.Generator) -> None:
    """softplus(bias) is log-uniform in DT_MIN..DT_MAX; the inverse of softplus is x + log(1 - exp(-x))."""
    low, high = math.log(DT_MIN), math.log(DT_MAX)
    dt = (torch.rand(bias.shape, generator=generator) * (high - low) + low).exp()
    bias.copy_(dt + torch.log(-torch.expm1(-dt)))


def recurrent_groups(groups: dict[str, list[nn.Parameter]], *more: Linear) -> dict[str, list[nn.Parameter]]:
    """What steers a recurrence (A_log, D, dt, convolutions, `more`) has a role and a rate of its own: 'ssm'."""
    mine = {id(p) for linear in more for p in linear.parameters()}
    ssm = groups["scalar"] + [p for p in groups["matrix"] if id(p) in mine]
    return {**groups, "matrix": [p for p in groups["matrix"] if id(p) not in mine], "scalar": [], "ssm": ssm}
