"""The core and its blocks: parity of every way to run them, packing, registry, costs."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

from nanochat import blocks
from nanochat.config import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW

PLAIN = GPTConfig(n_layer=4, d_model=64, n_head=2, vocab_size=100, seq_len=32)
RICH = dataclasses.replace(
    PLAIN,
    n_kv_head=1,
    window_pattern="SL",
    window=7,
    value_embeddings=True,
    residual_scalars=True,
    softcap=15.0,
    head_tie=0.05,
)
SMALL = dataclasses.replace(
    PLAIN, n_layer=2, mamba_d_state=8, mamba2_d_state=16, mamba2_head_dim=32, gdn_head_dim=16, mamba2_n_group=2
)
STACKS = {  # every block alone, and each at the beginning and at the end of a stack
    "plain": PLAIN,
    "rich": RICH,
    "conv": dataclasses.replace(RICH, n_layer=2, attn_conv=4),
    "M": dataclasses.replace(SMALL, block_pattern="M"),
    "M2": dataclasses.replace(SMALL, block_pattern="M2"),
    "G": dataclasses.replace(SMALL, block_pattern="G", mamba_use_mlp=True),
    "T-M": dataclasses.replace(SMALL, block_pattern=["attn", "mamba"]),
    "M-T": dataclasses.replace(SMALL, block_pattern=["mamba", {"block": "attn", "window": 5}]),
    "M2-G": dataclasses.replace(SMALL, block_pattern=["mamba2", "gdn"]),
    "G-M2": dataclasses.replace(SMALL, block_pattern=["gdn", {"block": "mamba2", "mlp": True}]),
    "nemotron": dataclasses.replace(SMALL, n_layer=5, block_pattern="M-G*-"),
}


def make(config: GPTConfig, seed: int = 0) -> GPT:
    """A model with every parameter away from its initial zero."""
    model = GPT(config)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model.eval()


@pytest.fixture(params=STACKS.values(), ids=STACKS.keys())
def model(request: pytest.FixtureRequest) -> GPT:
    return make(request.param)


IDS = torch.randint(0, 100, (3, 24), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("plan", [[24], [10, 14], [1] * 24, [5, 1, 1, 17]], ids=str)
def test_prefill_in_any_chunks_equals_the_full_pass(model: GPT, plan: list[int]) -> None:
    state, done = model.init_state(3, 40), 0
    for n in plan:
        logits = model(IDS[:, done : done + n], state=state)
        torch.testing.assert_close(logits, model(IDS)[:, done : done + n], rtol=1e-4, atol=1e-5)
        done += n
    assert state.pos.tolist() == [24] * 3


@torch.no_grad()
def test_ragged_right_padded_prefill_then_decode_equals_the_full_pass(model: GPT) -> None:
    full, lengths = model(IDS), torch.tensor([5, 12, 9])
    state = model.init_state(3, 40)
    logits = model(IDS[:, :12], state=state, lengths=lengths, last_only=True)
    rows = torch.arange(3)
    torch.testing.assert_close(logits[:, 0], full[rows, lengths - 1], rtol=1e-4, atol=1e-5)
    for _ in range(6):
        at = state.pos
        logits = model(IDS[rows, at][:, None], state=state)
        torch.testing.assert_close(logits[:, 0], full[rows, at], rtol=1e-4, atol=1e-5)
    segment = torch.stack([IDS[b, state.pos[b] : state.pos[b] + 3] for b in range(3)])
    logits = model(segment, state=state, lengths=torch.tensor([3, 1, 2]), last_only=True)
    torch.testing.assert_close(logits[:, 0], full[rows, state.pos - 1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_select_and_repeat_carry_each_row(model: GPT) -> None:
    state = model.init_state(3, 40)
    model(IDS[:, :20], state=state)
    two = state.select(torch.tensor([2, 0])).repeat(2)
    logits = model(IDS[[2, 2, 0, 0], 20:21], state=two)
    torch.testing.assert_close(logits[:, 0], model(IDS)[[2, 2, 0, 0], 20], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_rows_repeated_from_one_share_its_prefix_and_stay_exact(model: GPT) -> None:
    state = model.init_state(1, 40)
    model(IDS[:1, :10], state=state)
    rows = state.repeat(3)
    own = IDS.clone()
    own[:, :10] = IDS[0, :10]
    full = model(own)
    for t in range(10, 14):
        logits = model(own[:, t : t + 1], state=rows)
        torch.testing.assert_close(logits[:, 0], full[:, t], rtol=1e-4, atol=1e-5)
    if model.config.block_pattern == ["attn"] * 4 and not model.config.window:
        assert rows.layers[0].shared == 10 and rows.bytes() < 3 * state.bytes()  # pyrefly: ignore
    rows = rows.select(torch.tensor([2, 0]))
    lengths = torch.tensor([1, 4])
    logits = model(own[[2, 0], 14:18], state=rows, lengths=lengths, last_only=True)  # no longer one token, nor aligned
    torch.testing.assert_close(logits[:, 0], full[[2, 0], 13 + lengths], rtol=1e-4, atol=1e-5)
    logits = model(own[[2, 0], rows.pos][:, None], state=rows)
    torch.testing.assert_close(logits[:, 0], full[[2, 0], 14 + lengths], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_rows_that_share_a_prefix_may_stand_at_different_positions(model: GPT) -> None:
    state = model.init_state(1, 40)
    model(IDS[:1, :10], state=state)
    rows = state.repeat(2)
    own = IDS[[0, 1]].clone()
    own[:, :10] = IDS[0, :10]
    full = model(own)
    model(own[:, 10:13], state=rows, lengths=torch.tensor([1, 3]))
    for _ in range(3):
        at = rows.pos
        logits = model(own[[0, 1], at][:, None], state=rows)
        torch.testing.assert_close(logits[:, 0], full[[0, 1], at], rtol=1e-4, atol=1e-5)


def test_a_layer_may_have_a_convolution_of_its_own() -> None:
    pattern = ["attn", {"block": "attn", "attn_conv": 3}]
    first, second = GPT(dataclasses.replace(PLAIN, n_layer=2, block_pattern=pattern)).layers
    assert (first.KERNELS, second.KERNELS) == (("attention",), ("attention", "conv"))
    assert [p.shape for p in second.param_groups()["ssm"]] == [(64, 3)] and "ssm" not in first.param_groups()


@torch.no_grad()
def test_a_window_keeps_a_ring_of_its_size() -> None:
    model = make(RICH)
    state = model.init_state(1, 1000)
    assert [s.k.size(2) for s in state.layers] == [7, 1000, 7, 1000]  # pyrefly: ignore
    long = torch.randint(0, 100, (1, 200))
    for i in range(0, 200, 8):
        logits = model(long[:, i : i + 8], state=state)
    torch.testing.assert_close(logits, model(long)[:, -8:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernels", ["reference", "auto"])
def test_packed_documents_equal_separate_documents(model: GPT, kernels: str) -> None:
    model.set_compute(torch.float32, kernels)
    parts = [IDS[0, :9], IDS[1, :4], IDS[2, :11]]
    doc = torch.cat([torch.full((len(p),), i) for i, p in enumerate(parts)])[None]
    targets = torch.randint(0, 100, (1, 24), generator=torch.Generator().manual_seed(2))
    packed = model(torch.cat(parts)[None], targets, doc=doc, loss_reduction="none")[0]
    split = targets[0].split([len(p) for p in parts])
    alone = [model(p[None], t[None], loss_reduction="none")[0] for p, t in zip(parts, split, strict=True)]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-5)
    loss = model(torch.cat(parts)[None], targets, doc=doc, loss_reduction="sum")
    got = torch.autograd.grad(loss, model.head.weight)[0]
    apart = sum(model(p[None], t[None], loss_reduction="sum") for p, t in zip(parts, split, strict=True))
    torch.testing.assert_close(got, torch.autograd.grad(apart, model.head.weight)[0], rtol=1e-3, atol=1e-4)


def test_losses_agree_with_cross_entropy_of_the_logits(model: GPT) -> None:
    y = IDS.roll(-1, 1).clone()
    y[0, :5] = -1
    want = F.cross_entropy(model(IDS).flatten(0, 1), y.flatten(), ignore_index=-1, reduction="none")
    torch.testing.assert_close(model(IDS, y, loss_reduction="none").flatten(), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(IDS, y, loss_reduction="sum"), want.sum(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(model(IDS, y), want.sum() / (y >= 0).sum(), rtol=1e-4, atol=1e-5)


def test_a_row_without_targets_gives_zero_not_nan(model: GPT) -> None:
    loss = model(IDS, torch.full_like(IDS, -1))
    loss.backward()
    assert loss == 0 and all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_kernels_auto_and_reference_give_the_same_gradients(model: GPT) -> None:
    grads = []
    for kernels in ("reference", "auto"):
        model.set_compute(torch.float32, kernels)
        loss = model(IDS, IDS.roll(-1, 1), loss_reduction="sum")
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_close_and_keeps_float32_masters(model: GPT) -> None:
    exact = model(IDS, IDS.roll(-1, 1)).item()
    model.set_compute(torch.bfloat16)
    loss = model(IDS, IDS.roll(-1, 1))
    loss.backward()
    assert abs(loss.item() - exact) < 0.02
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)


@torch.no_grad()
def test_bfloat16_decodes_ragged_rows_like_the_full_pass(model: GPT) -> None:
    model.set_compute(torch.bfloat16)
    full, lengths = model(IDS), torch.tensor([5, 12, 9])
    state = model.init_state(3, 40)
    logits = model(IDS[:, :12], state=state, lengths=lengths, last_only=True)
    rows = torch.arange(3)
    torch.testing.assert_close(logits[:, 0], full[rows, lengths - 1], rtol=0.05, atol=0.05)
    for _ in range(3):
        at = state.pos
        logits = model(IDS[rows, at][:, None], state=state)
        torch.testing.assert_close(logits[:, 0], full[rows, at], rtol=0.05, atol=0.05)


def test_training_drops_the_cast_weights_of_eval_mode() -> None:
    model = make(PLAIN)
    model.set_compute(torch.bfloat16)
    optimizer = MuonAdamW(model, model.param_groups(), {"matrix": 0.1, "embedding": 0.1, "unembedding": 0.1})
    with torch.no_grad():
        before = model(IDS)  # keeps casts
    model.train()
    model(IDS, IDS.roll(-1, 1)).backward()
    optimizer.gather()
    optimizer.step()
    fresh = GPT(PLAIN)
    fresh.load_state_dict(model.state_dict())
    fresh.set_compute(torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(model(IDS), fresh(IDS)) and not torch.equal(model(IDS), before)
        assert torch.equal(model.eval()(IDS), fresh(IDS))


def test_building_on_meta_sets_every_parameter() -> None:
    with torch.device("meta"):
        model = GPT(RICH)
    model.to_empty(device="cpu")
    for p in model.parameters():
        torch.nn.init.constant_(p, float("nan"))
    model.init_weights(3)
    other = GPT(RICH)
    other.init_weights(3)
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_an_untrained_model_predicts_uniformly() -> None:
    model = GPT(PLAIN)
    model.init_weights(0)
    assert abs(model(IDS, IDS.roll(-1, 1)).item() - torch.tensor(100.0).log().item()) < 0.02


def test_every_parameter_is_in_one_group_and_muon_gets_matrices(model: GPT) -> None:
    groups = model.param_groups()
    assert sum(len(g) for g in groups.values()) == len(list(model.parameters()))
    assert all(p.ndim == 2 for p in groups["matrix"])


def test_config_survives_json(model: GPT) -> None:
    again = GPTConfig(**json.loads(json.dumps(dataclasses.asdict(model.config))))
    assert GPT(again).config == model.config


class ScaleBlock(blocks.Block):
    """A user's own block, without state: x * a."""

    def __init__(self, config: GPTConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.a = torch.nn.Parameter(torch.empty(config.d_model))

    def forward(self, x, ctx, state=None):
        return x * self.a

    def init_weights(self, generator):
        torch.nn.init.ones_(self.a)


@torch.no_grad()
def test_a_block_from_outside_needs_no_edit_of_the_core() -> None:
    model = make(dataclasses.replace(PLAIN, block_pattern=["attn", f"{__name__}:ScaleBlock"]))
    state = model.init_state(3, 24)
    chunks = [model(IDS[:, :20], state=state), model(IDS[:, 20:], state=state)]
    torch.testing.assert_close(torch.cat(chunks, 1), model(IDS), rtol=1e-4, atol=1e-5)


def test_costs_are_counted_from_the_shapes() -> None:
    model = GPT(PLAIN)
    D, V, L, T = 64, 100, 4, 32
    assert model.flops_per_token() == 6 * (12 * D * D * L + D * V) + 12 * D * T * L
    assert model.state_bytes(10) == L * 2 * 2 * D * 10
    assert model.n_params() == {
        "embedding": V * D,
        "head": V * D,
        "blocks": 12 * D * D * L,
        "total": 2 * V * D + 12 * D * D * L,
    }
    conv = GPT(dataclasses.replace(PLAIN, attn_conv=4))
    assert conv.flops_per_token() - model.flops_per_token() == 6 * 4 * D * L
    assert conv.state_bytes(10) - model.state_bytes(10) == 2 * 3 * D * L
    assert conv.init_state(2, 10).bytes() - model.init_state(2, 10).bytes() == 2 * 4 * 3 * D * L
    assert GPT(RICH).state_bytes(1000) < GPT(dataclasses.replace(RICH, window_pattern="L")).state_bytes(1000)


def test_impossible_shapes_are_refused_with_the_cure() -> None:
    for change, text in (
        ({"n_head": 3}, "d_model=64 is no multiple of n_head=3"),
        ({"n_kv_head": 3, "n_head": 4}, "n_head=4 is no multiple of n_kv_head=3"),
        ({"window_pattern": "X"}, "letters S and L"),
        ({"n_layer": 0}, "must be > 0"),
        ({"attn_conv": 1}, "attn_conv=1: expected 0"),
    ):
        with pytest.raises(UserError, match=text):
            dataclasses.replace(PLAIN, **change)


def test_a_longer_context_leaves_windows_and_short_rows_alone() -> None:
    model = make(dataclasses.replace(PLAIN, window_pattern="SL"))
    before = model(IDS)
    model.extend(64)
    assert torch.equal(model(IDS), before)
    again = GPT(model.config)
    again.load_state_dict(model.state_dict())
    assert again.config.seq_len == 64 and torch.equal(again.eval()(IDS), before)


def test_a_state_that_is_full_says_so() -> None:
    model = make(PLAIN)
    with pytest.raises(UserError, match="25 tokens do not fit a state made for 24"):
        state = model.init_state(3, 24)
        model(IDS, state=state)
        model(IDS[:, :1], state=state)
