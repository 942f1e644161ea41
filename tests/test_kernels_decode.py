"""Packed weights and the attention of one query against float64, at every level of vectors, and a packed model."""

import copy
from typing import Any

import numpy as np
import pytest
import rustbpe
import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat import ops
from nanochat.blocks.attn import AttentionState
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig, ModelState
from nanochat.kernels import decode, native

LEVELS = ["baseline", "avx2", "avx512", "avx512bf16"]
LEVELS = LEVELS[: LEVELS.index(rustbpe.simd_level()) + 1]
STACKS = [["attn"], ["mamba", {"block": "attn", "attn_conv": 4}], ["mamba2"], ["gdn"]]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("simd", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("M", "N", "K"), [(1, 1, 1), (2, 33, 7), (8, 64, 32), (15, 31, 129), (64, 70, 513)])
def test_a_packed_weight_multiplies_as_float64(M: int, N: int, K: int, dtype: torch.dtype, simd: str) -> None:
    x, weight = randn(M, K), randn(N, K, seed=1).to(dtype)
    y = decode.pack(weight, simd)(x)
    rounds = dtype == torch.bfloat16 and simd == "avx512bf16"
    want = (x.bfloat16() if rounds else x).double() @ weight.double().T
    assert y.dtype == torch.float32 and y.shape == (M, N)
    assert (y - want).abs().max() <= 1e-6 * want.abs().max() + 1e-6


@pytest.mark.parametrize("simd", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_a_product_does_not_depend_on_its_company(
    dtype: torch.dtype, simd: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    multiply, x = decode.pack(randn(1100, 500, seed=1).to(dtype), simd), randn(64, 500)
    whole = multiply(x)
    for rows in (1, 2, 3, 7, 8, 21):
        assert torch.equal(multiply(x[-rows:]), whole[-rows:])
    assert torch.equal(multiply(x.view(4, 16, 500)), whole.view(4, 16, -1))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert torch.equal(multiply(x), whole)


@pytest.mark.parametrize("simd", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("H", "G", "K"), [(2, 2, 128), (4, 1, 64), (6, 2, 20), (1, 1, 2)])
def test_the_attention_of_one_query_equals_float64(H: int, G: int, K: int, dtype: torch.dtype, simd: str) -> None:
    q, k, v = randn(3, H, 1, K), randn(3, G, 50, K, seed=1).to(dtype), randn(3, G, 50, K, seed=2).to(dtype)
    lengths = torch.tensor([50, 1, 33])
    y = decode.attend(q, k, v, lengths, simd)
    mask = (torch.arange(50) < lengths[:, None])[:, None, None]
    want = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
    k, v = k[2:, :, :40].contiguous(), v[2:, :, :40].contiguous()
    assert torch.equal(decode.attend(q[2:], k, v, lengths[2:], simd), y[2:])


@pytest.mark.parametrize("simd", LEVELS)
@pytest.mark.parametrize("rows", [0, 5, 15])
@pytest.mark.parametrize(("H", "K"), [(1, 2), (3, 20), (8, 64)])
def test_the_norm_of_few_rows_equals_the_reference(H: int, K: int, rows: int, simd: str) -> None:
    x, angles = randn(3, 5, H, K) * 7, randn(rows, K // 2, seed=1)
    tables = [f(angles).view(rows // 5, 5, 1, K // 2) for f in (torch.cos, torch.sin)] if rows else []
    y = decode.rms_norm(x, *tables, simd=simd)
    with torch.no_grad():
        torch.testing.assert_close(y, ops.rms_norm(x, torch.float32, *tables), rtol=1e-5, atol=1e-6)
    assert torch.equal(decode.rms_norm(x[2:], *(t[-1:] for t in tables), simd=simd), y[2:])
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)  # of another layout
    assert torch.equal(decode.rms_norm(turned, *tables, simd=simd), y)


def test_a_norm_takes_tables_that_fit() -> None:
    x, table = np.ones((4, 2, 6), np.float32), np.ones((3, 3), np.float32)
    with pytest.raises(ValueError, match=r"cos has shape \(3, 3\): expected \(a divisor of 4, 3\)"):
        rustbpe.rms_norm(x, table, table)
    with pytest.raises(ValueError, match=r"sin: expected .* of shape \[2, 3\]"):
        rustbpe.rms_norm(x, table[:2], table)


def test_a_bad_array_is_named() -> None:
    x, q, k = np.ones((2, 3), np.float32), np.ones((2, 2, 4), np.float32), np.ones((2, 1, 5, 4), np.float32)
    with pytest.raises(ValueError, match=r"x: .*\[2, 4\], got shape \[2, 3\]"):
        rustbpe.PackedLinear(np.ones((5, 4), np.float32))(x)
    with pytest.raises(ValueError, match=r"weight: .*float32"):
        rustbpe.PackedLinear(np.ones((5, 4)))  # pyrefly: ignore
    with pytest.raises(ValueError, match="lengths: 6, expected 1 to 5"):
        rustbpe.attend_one(q, k, k, np.array([1, 6]))
    with pytest.raises(ValueError, match="3 heads, k 2"):
        rustbpe.attend_one(q[:, :1].repeat(3, 1), k.repeat(2, 1), k.repeat(2, 1), np.array([1, 1]))


def make(stack: list[Any], dtype: torch.dtype = torch.float32, kernels: str = "auto") -> GPT:
    config = GPTConfig(
        n_layer=2, block_pattern=stack, d_model=64, n_head=2, n_kv_head=1, vocab_size=100, seq_len=64, head_tie=0.05,
        gdn_head_dim=16, mamba2_head_dim=16, mamba2_d_state=16,
    )  # fmt: skip
    model = GPT(config)
    model.init_weights(0)
    for i, p in enumerate(model.blocks.parameters()):  # none is left at zero
        torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(i))
    model.set_compute(dtype, kernels)
    return model.eval()


@torch.no_grad()
def decoded(model: GPT) -> tuple[Tensor, ModelState]:
    """Logits of three ragged rows: after their prompts and after five ids more, (6, 3, 100)."""
    ids = torch.randint(100, (3, 40), generator=torch.Generator().manual_seed(0))
    state, lengths = model.init_state(3, 60), torch.tensor([30, 4, 17])
    steps = [model(ids[:, :30], state=state, lengths=lengths, last_only=True)]
    steps += [model(ids[:, 30 + t, None], state=state) for t in range(5)]
    return torch.stack([s[:, 0] for s in steps]), state


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 2e-5), (torch.bfloat16, 5e-2)])
def test_a_packed_model_says_what_the_unpacked_one_does(stack: list[Any], dtype: torch.dtype, atol: float) -> None:
    packed, plain = make(stack, dtype), make(stack, dtype, "reference")
    got, want = decoded(packed)[0], decoded(plain)[0]
    assert packed.head._packed and not plain.head._packed
    assert (got - want).abs().max() <= atol * want.abs().max()


@pytest.mark.parametrize("stack", STACKS)
@torch.no_grad()
def test_a_packed_model_gives_a_row_the_same_bits_in_any_company(stack: list[Any]) -> None:
    model = make(stack)
    _, state = decoded(model)
    alone = [state.select(torch.tensor([row])) for row in range(3)]
    ids = torch.tensor([[3], [50], [7]])
    together = model(ids, state=state)
    for row in range(3):
        assert torch.equal(model(ids[row : row + 1], state=alone[row])[0], together[row])


@torch.no_grad()
def test_keys_and_values_are_kept_in_bfloat16_where_that_is_read() -> None:
    half, full, plain = make(["attn"], torch.bfloat16), make(["attn"]), make(["attn"], torch.bfloat16, "reference")
    kept = [model.init_state(2, 20).layers[0] for model in (half, full, plain)]
    assert [s.k.dtype for s in kept] == [torch.bfloat16, torch.float32, torch.float32]  # pyrefly: ignore
    assert 2 * kept[0].bytes() == kept[1].bytes()
    state, prompt = half.init_state(1, 20), torch.tensor([[5, 6, 7]])
    logits = half(prompt, state=state, last_only=True)
    samples = state.repeat(2)  # their prompt is shared, which torch reads
    assert samples.layers[0].k.dtype == torch.float32  # pyrefly: ignore
    ids = torch.tensor([[8], [8]])
    one, two = half(ids[:1], state=state), half(ids, state=samples)
    assert (two - one).abs().max() <= 0.02 * one.abs().max() < logits.abs().max()


def test_training_drops_the_packing_and_new_weights_are_packed_anew() -> None:
    model = make(["mamba", "attn"])
    before, _ = decoded(model)
    copied = copy.deepcopy(model)
    assert model.head._packed and not copied.head._packed
    model.train()
    assert not any(getattr(m, "_packed", None) for m in model.modules())
    model.pack()
    assert model.head._pack is None  # it is in training
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    fresh = make(["mamba", "attn"])
    fresh.load_state_dict(model.state_dict())
    after, _ = decoded(model.eval())
    assert torch.equal(after, decoded(fresh)[0]) and not torch.equal(after, before)
    assert torch.equal(decoded(copied)[0], before)


def test_what_has_a_gradient_or_many_rows_is_not_packed() -> None:
    model = make(["attn"])
    state = model.init_state(1, 8)
    model(torch.tensor([[1, 2]]), state=state).sum().backward()
    assert model.head.weight.grad is not None and not model.head._packed
    with torch.no_grad():
        model(torch.zeros(5, 20, dtype=torch.long), last_only=True)
    assert model.head._packed and not model.blocks[0].mlp.c_fc._packed  # pyrefly: ignore


def test_without_the_module_decoding_works_and_the_reason_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    want = decoded(make(["attn"]))[0]
    monkeypatch.setattr(native, "rustbpe", None)
    model = make(["attn"])
    assert "decode torch (rustbpe is not installed" in model.kernels.reason
    torch.testing.assert_close(decoded(model)[0], want, rtol=1e-4, atol=1e-4)
    assert not model.head._packed
    monkeypatch.setattr(native, "rustbpe", np)
    assert "scripts/setup.sh" in (decode.available(torch.device("cpu")) or "")


@torch.no_grad()
def test_a_ring_that_has_gone_round_is_read_whole() -> None:
    config = GPTConfig(n_layer=2, d_model=32, n_head=2, vocab_size=50, seq_len=64, window=8, window_pattern="SL")
    models = [GPT(config) for _ in range(2)]
    for model, kernels in zip(models, ("auto", "reference"), strict=True):
        model.init_weights(0)
        torch.nn.init.normal_(model.layers[0].attn.c_proj.weight, generator=torch.Generator().manual_seed(1))  # pyrefly: ignore
        model.eval().set_compute(torch.float32, kernels)
    rows = [Engine(model).generate_batch([[1, 2, 3], [4]], max_tokens=40, temperature=0.0)[0] for model in models]
    state = models[0].init_state(1, 64).layers[0]
    assert isinstance(state, AttentionState) and state.capacity == 8
    assert rows[0] == rows[1] and len(set(rows[0][0])) > 4
