"""Gated delta rule: the chunked form against a float64 recurrence, against itself in pieces, against transformers."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.config import UserError
from nanochat.ops.delta import gated_delta_rule, gated_delta_update, unit_lower_inverse

NAMES = ("q", "k", "v", "g", "beta", "state")


def reference(q, k, v, g, beta, state):  # one token after another, in float64
    q, k, v, g, beta, S = (x.double() for x in (q, k, v, g, beta, state))
    q, k = (x.repeat_interleave(v.size(2) // x.size(2), 2) for x in (q, k))
    out = []
    for q_t, k_t, v_t, g_t, b_t in zip(*(x.unbind(1) for x in (q, k, v, g, beta)), strict=True):
        S = g_t.exp()[..., None, None] * S
        u = b_t[..., None] * (v_t - torch.einsum("bhkv,bhk->bhv", S, k_t))
        S = S + k_t[..., None] * u[..., None, :]
        out.append(torch.einsum("bhkv,bhk->bhv", S, q_t) * q.size(-1) ** -0.5)
    return torch.stack(out, 1), S


def inputs(B: int = 2, T: int = 75, H: int = 4, K: int = 16, V: int = 24, Hk: int = 0) -> list[Tensor]:
    """q, k, v, g, beta, state."""
    torch.manual_seed(0)
    q, k = (F.normalize(torch.randn(B, T, Hk or H, K), dim=-1) for _ in range(2))
    g, beta = -torch.rand(B, T, H).square() * 2, torch.rand(B, T, H)
    return [q, k, torch.randn(B, T, H, V), g, beta, torch.randn(B, H, K, V)]


def rule(*x: Tensor, **options) -> tuple[Tensor, Tensor]:
    *x, state = x
    return gated_delta_rule(*x, initial_state=state, return_final_state=True, **options)


def results(f, x: list[Tensor], **options) -> dict[str, Tensor]:
    """Output, final state, and the gradient of a random projection of both, by name."""
    x = [t.detach().requires_grad_() for t in x]
    out, state = f(*x, **options)
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in (out, state)]
    grads = torch.autograd.grad((out, state), x, seeds)
    return {"out": out, "final": state, **dict(zip(NAMES, grads, strict=True))}


def error(got: Tensor, want: Tensor) -> float:
    got, want = got.detach(), want.detach()
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], limit: float = 1e-5) -> None:
    errors = {name: error(got[name], want[name]) for name in want}
    assert all(e < limit for e in errors.values()), errors  # a nan fails too


@pytest.mark.parametrize("T", [1, 16, 33, 75])
@pytest.mark.parametrize("chunk_size", [8, 24, 32, 64])
def test_chunks_equal_the_recurrence_with_all_gradients(T: int, chunk_size: int) -> None:
    x = inputs(T=T)
    assert_close(results(rule, x, chunk_size=chunk_size), results(reference, x))


def test_float64_is_exact() -> None:
    x = [t.double() for t in inputs()]
    assert_close(results(rule, x, chunk_size=32), results(reference, x), 1e-12)


def test_key_heads_may_be_fewer_than_value_heads() -> None:
    x = inputs(Hk=2)
    assert_close(results(rule, x, chunk_size=32), results(reference, x))


def test_state_defaults_to_zero_and_scale_multiplies_the_output() -> None:
    *x, state = inputs()
    want, _ = rule(*x, torch.zeros_like(state))
    torch.testing.assert_close(gated_delta_rule(*x), want)
    torch.testing.assert_close(gated_delta_rule(*x, scale=1.0), want * 4)  # K = 16


def test_gradients_without_an_asked_for_state() -> None:
    x = [t.requires_grad_() for t in inputs()[:5]]
    y = [t.detach().double().requires_grad_() for t in x]
    got = torch.autograd.grad(gated_delta_rule(*x, chunk_size=32).square().sum(), x)
    want = torch.autograd.grad(reference(*y, torch.zeros(2, 4, 16, 24))[0].square().sum(), y)
    for a, b in zip(got, want, strict=True):
        assert error(a, b) < 1e-5


def test_prefill_in_pieces_equals_whole() -> None:
    *x, state = inputs()
    want, want_state = rule(*x, state, chunk_size=16)
    outs, at = [], 0
    for n in (1, 20, 16, 38):
        out, state = rule(*(t[:, at : at + n] for t in x), state, chunk_size=16)
        outs.append(out)
        at += n
    torch.testing.assert_close(torch.cat(outs, 1), want)
    torch.testing.assert_close(state, want_state)


@pytest.mark.parametrize("Hk", [2, 4])
def test_steps_equal_whole(Hk: int) -> None:
    *x, state = inputs(T=20, Hk=Hk)
    want, want_state = rule(*x, state)
    outs = [gated_delta_update(state, *(t[:, i] for t in x)) for i in range(20)]
    torch.testing.assert_close(torch.stack(outs, 1), want)
    torch.testing.assert_close(state, want_state)


def test_packed_documents_equal_separate_ones_with_all_gradients() -> None:
    x = inputs(B=1)
    cuts = [0, 5, 16, 17, 60, 75]  # within a chunk, on its edge, one token, over several chunks
    seq_idx = torch.repeat_interleave(torch.tensor([3, 1, 2, 1, 0]), torch.tensor(cuts).diff())[None]

    def separate(*x: Tensor) -> tuple[Tensor, Tensor]:
        *x, state = x
        outs = []
        for lo, hi in pairwise(cuts):
            out, last = reference(*(t[:, lo:hi] for t in x), state if lo == 0 else torch.zeros_like(state))
            outs.append(out)
        return torch.cat(outs, 1), last

    assert_close(results(rule, x, chunk_size=16, seq_idx=seq_idx), results(separate, x))
    x[3][0, 30] = -float("inf")  # forgetting everything is a document's start too
    assert_close(results(rule, x, chunk_size=16, seq_idx=seq_idx), results(separate, x))


@pytest.mark.parametrize("packed", [False, True])
def test_padded_rows_end_in_the_state_of_their_last_token(packed: bool) -> None:
    *x, state = inputs(B=4)
    lengths = torch.tensor([0, 1, 40, 75])
    seq_idx = (torch.arange(75) >= lengths[:, None]).int() if packed else None  # pads are often a document of their own
    out, got = rule(*x, state, chunk_size=16, seq_idx=seq_idx, lengths=lengths)
    assert torch.equal(got[0], state[0])
    for b, n in enumerate(lengths.tolist()):
        if n:
            want, want_state = reference(*(t[b : b + 1, :n] for t in x), state[b : b + 1])
            assert error(out[b, :n], want[0]) < 1e-5 and error(got[b], want_state[0]) < 1e-5


def test_strong_decay_keeps_the_digits_of_weak_decay() -> None:
    x = inputs(T=128)
    x[3] = torch.where(torch.rand_like(x[3]) < 0.2, -50.0, x[3] * 0.01)
    assert_close(results(rule, x), results(reference, x))


def test_repeated_keys_written_in_full_stay_accurate() -> None:
    x = inputs(T=128)
    x[1] = F.normalize(x[1][:, :1] + 0.01 * x[1], dim=-1)  # A is nearly all ones: powers of it reach 1e17
    x[3], x[4] = x[3] * 0.01, 1 - 0.001 * x[4]
    assert_close(results(rule, x), results(reference, x))


def test_bfloat16_is_close() -> None:
    x = inputs(T=128)
    half = [t.bfloat16() for t in x[:3]]
    got = results(rule, [*half, *x[3:]])
    assert got["out"].dtype == got["q"].dtype == torch.bfloat16
    assert got["final"].dtype == got["g"].dtype == torch.float32
    assert_close(got, results(reference, [*half, *x[3:]]), 0.01)


@pytest.mark.parametrize("Q", [1, 7, 16, 24, 64])
def test_unit_lower_inverse(Q: int) -> None:
    torch.manual_seed(0)
    A = torch.randn(3, 2, Q, Q) / Q**0.5
    want = torch.linalg.inv(torch.eye(Q) + A.tril(-1).double())
    assert error(unit_lower_inverse(A), want) < 1e-6


def test_shapes_that_do_not_fit_are_refused() -> None:
    q, k, v, g, beta, state = inputs(Hk=3)
    with pytest.raises(UserError, match="4 value heads and 3 key heads"):
        gated_delta_rule(q, k, v, g, beta)
    with pytest.raises(UserError, match="expected q and k"):
        gated_delta_rule(v, v, v, g[:, 1:], beta)
    with pytest.raises(UserError, match="expected q and k"):
        gated_delta_update(state, q[:, 0], k[:, 0], v[:, 0], g, beta)


@pytest.mark.parametrize("oracle", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"])
@pytest.mark.parametrize("Hk", [2, 4])
def test_equals_transformers(oracle: str, Hk: int) -> None:
    pytest.importorskip("transformers", reason="the oracle is transformers' Qwen3-Next: pip install transformers")
    from transformers.models.qwen3_next import modeling_qwen3_next

    *x, state = inputs(Hk=Hk)
    want = getattr(modeling_qwen3_next, oracle)(*x, initial_state=state, output_final_state=True)
    for a, b in zip(rule(*x, state), want, strict=True):
        assert error(a, b) < 1e-5
