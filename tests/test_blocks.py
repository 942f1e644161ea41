"""The blocks against transformers' modules with copied weights, and what each says of itself."""

import dataclasses
import importlib

import pytest
import torch
from oracles import need
from torch import Tensor, nn

from nanochat.blocks import BLOCKS, Block, GPTConfig, build
from nanochat.gpt import GPT

CONFIG = GPTConfig(
    n_layer=1, d_model=48, n_head=2, vocab_size=50, seq_len=64, mamba_d_state=8, mamba2_d_state=8, mamba2_head_dim=16,
    mamba2_n_group=2, gdn_head_dim=12,
)  # fmt: skip
X = torch.randn(2, 37, 48, generator=torch.Generator().manual_seed(0))


def mixer(name: str) -> tuple[Block, GPT]:
    """The block alone, every parameter away from zero, and the model that makes its context."""
    model = GPT(dataclasses.replace(CONFIG, block_pattern=[name]))
    model.init_weights(1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model.layers[0], model


def run(block: Block, model: GPT, x: Tensor) -> Tensor:
    ctx = model.context(torch.zeros(x.shape[:2], dtype=torch.long), None, None, None)
    return block.mix(x, ctx, None)


def theirs_of(family: str, config: str, module: str, **options) -> nn.Module:
    need("transformers")
    package = f"transformers.models.{family}"
    settings = getattr(importlib.import_module(f"{package}.configuration_{family}"), config)(**options)
    return getattr(importlib.import_module(f"{package}.modeling_{family}"), module)(settings, 0).float()


@pytest.mark.parametrize("kernels", ["reference", "auto"])
def test_mamba_equals_transformers(kernels: str) -> None:
    block, model = mixer("mamba")
    model.set_compute(torch.float32, kernels)
    theirs = theirs_of("mamba", "MambaConfig", "MambaMixer", hidden_size=48, state_size=8, num_hidden_layers=1)
    with torch.no_grad():
        theirs.in_proj.weight.copy_(torch.cat((block.in_x.weight, block.in_z.weight)))
        theirs.conv1d.weight.copy_(block.conv_weight[:, None])
        theirs.conv1d.bias.copy_(block.conv_bias)
        theirs.x_proj.weight.copy_(block.x_proj.weight)
        theirs.dt_proj.weight.copy_(block.dt_proj.weight)
        theirs.dt_proj.bias.copy_(block.dt_bias)
        theirs.A_log.copy_(block.A_log)
        theirs.D.copy_(block.D_skip)
        theirs.out_proj.weight.copy_(block.out_proj.weight)
    pairs = [(block.A_log, theirs.A_log), (block.dt_bias, theirs.dt_proj.bias), (block.D_skip, theirs.D)]
    both_ways(block, model, theirs, [*pairs, (block.x_proj.weight, theirs.x_proj.weight)])


def test_mamba2_equals_transformers() -> None:
    block, model = mixer("mamba2")
    theirs = theirs_of(
        "mamba2", "Mamba2Config", "Mamba2Mixer", hidden_size=48, state_size=8, num_heads=6, head_dim=16, n_groups=2,
        chunk_size=16, num_hidden_layers=1, layer_norm_epsilon=1e-6,
    )  # fmt: skip
    with torch.no_grad():
        parts = (block.in_z, block.in_x, block.in_bc, block.in_dt)
        theirs.in_proj.weight.copy_(torch.cat([p.weight for p in parts]))
        theirs.conv1d.weight.copy_(block.conv_weight[:, None])
        theirs.conv1d.bias.copy_(block.conv_bias)
        theirs.dt_bias.copy_(block.dt_bias)
        theirs.A_log.copy_(block.A_log)
        theirs.D.copy_(block.D_skip)
        theirs.norm.weight.fill_(1)
        theirs.out_proj.weight.copy_(block.out_proj.weight)
    pairs = [(block.A_log, theirs.A_log), (block.dt_bias, theirs.dt_bias), (block.D_skip, theirs.D)]
    both_ways(block, model, theirs, [*pairs, (block.out_proj.weight, theirs.out_proj.weight)])


def test_gated_deltanet_equals_transformers() -> None:
    block, model = mixer("gdn")
    H, K, V = block.n_head, block.head_dim, block.value_dim
    theirs = theirs_of(
        "qwen3_next", "Qwen3NextConfig", "Qwen3NextGatedDeltaNet", hidden_size=48, linear_num_value_heads=H,
        linear_num_key_heads=H, linear_key_head_dim=K, linear_value_head_dim=V, linear_conv_kernel_dim=4,
        num_hidden_layers=1, layer_types=["linear_attention"],
    )  # fmt: skip
    with torch.no_grad():
        by_head = [p.weight.view(H, -1, 48) for p in (block.in_q, block.in_k, block.in_v, block.in_z)]
        theirs.in_proj_qkvz.weight.copy_(torch.cat(by_head, 1).flatten(0, 1))
        ba = [p.weight.view(H, 1, 48) for p in (block.in_b, block.in_a)]
        theirs.in_proj_ba.weight.copy_(torch.cat(ba, 1).flatten(0, 1))
        theirs.conv1d.weight.copy_(block.conv_weight[:, None])
        theirs.dt_bias.copy_(block.dt_bias)
        theirs.A_log.copy_(block.A_log)
        theirs.norm.weight.fill_(1)
        theirs.out_proj.weight.copy_(block.out_proj.weight)
    pairs = [(block.A_log, theirs.A_log), (block.dt_bias, theirs.dt_bias)]
    both_ways(block, model, theirs, [*pairs, (block.out_proj.weight, theirs.out_proj.weight)])


def both_ways(block: Block, model: GPT, theirs: nn.Module, pairs: list[tuple[nn.Parameter, nn.Parameter]]) -> None:
    """Outputs and gradients of the input and of the paired parameters agree."""
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    ours, want = run(block, model, x), theirs(y)
    torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-5)
    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(3))
    got = torch.autograd.grad((ours * weight).sum(), [x, *(mine for mine, _ in pairs)])
    expected = torch.autograd.grad((want * weight).sum(), [y, *(other for _, other in pairs)])
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()


@pytest.mark.parametrize("name", ["mamba", "mamba2", "gdn"])
def test_step_sizes_start_log_uniform_between_a_thousandth_and_a_tenth(name: str) -> None:
    block = build(name, dataclasses.replace(CONFIG, d_model=1536, gdn_head_dim=2), 0)
    block.init_weights(torch.Generator().manual_seed(0))
    dt = torch.nn.functional.softplus(block.dt_bias.detach())
    assert dt.min() >= 0.99e-3 and dt.max() <= 0.101
    assert 0.008 < dt.log().mean().exp() < 0.0125  # the middle of the range on a log axis


@pytest.mark.parametrize("name", ["mamba", "mamba2", "gdn"])
def test_what_steers_a_recurrence_stays_away_from_muon_and_decay(name: str) -> None:
    block, _ = mixer(name)
    names = {id(p): n for n, p in block.named_parameters()}
    roles = {role: sorted(names[id(p)] for p in params) for role, params in block.param_groups().items()}
    assert {"A_log", "dt_bias", "conv_weight"} <= set(roles["ssm"]) and not roles["scalar"]
    assert "out_proj.weight" in roles["matrix"] and not set(roles["matrix"]) & set(roles["ssm"])


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_state_bytes_are_those_of_a_real_state(name: str) -> None:
    block, _ = mixer(name)
    state = block.init_state(1, 100, torch.device("cpu"), torch.bfloat16)
    assert block.state_bytes(100) == state.bytes()


@pytest.mark.parametrize("name", ["mamba", "mamba2", "gdn"])
def test_a_recurrent_state_does_not_grow(name: str) -> None:
    block, _ = mixer(name)
    assert block.state_bytes(10) == block.state_bytes(100_000)
    assert block.flops_per_token(10) == block.flops_per_token(100_000)


@pytest.mark.parametrize("name", sorted(set(BLOCKS) - {"mlp"}))
@pytest.mark.parametrize("mlp", [False, True])
def test_every_mixer_comes_with_and_without_an_mlp(name: str, mlp: bool) -> None:
    block = build({"block": name, "mlp": mlp}, CONFIG, 0)
    assert (block.mlp is not None) == mlp
