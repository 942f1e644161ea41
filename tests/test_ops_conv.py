"""The causal convolution against its sum in float64, causal-conv1d's reference, and itself in pieces."""

import pytest
import torch
import torch.nn.functional as F
from oracles import causal_conv1d_refs
from torch import Tensor

from nanochat.config import UserError
from nanochat.ops import conv
from nanochat.ops.conv import causal_conv1d

B, C, T, W = 3, 10, 23, 4
DOCS = torch.tensor([[0] * 4 + [1] * 1 + [2] * 18, [5] * 23, [0] * 10 + [1] * 2 + [2] * 11])


@pytest.fixture(autouse=True, params=["five steps", "two rows"])
def small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv, "BLOCK_ELEMENTS", 5 * C if request.param == "five steps" else 2 * T * C)


def make(dtype: torch.dtype = torch.float32, width: int = W, steps: int = T) -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {"weight": (C, width), "bias": (C,), "initial_states": (B, C, width - 1)}
    x = torch.randn(B, steps, C, dtype=dtype).transpose(1, 2)  # time-major, as the project has it
    return {
        n: t.requires_grad_()
        for n, t in {"x": x, **{n: torch.randn(s, dtype=dtype) for n, s in shapes.items()}}.items()
    }


def equations(x, weight, bias, initial_states, seq_idx=None, silu=True) -> Tensor:
    """out[t] = silu(bias + sum_s weight[:, W - 1 - s] x[t - s]) over the inputs of t's document, one tap at a time."""
    steps, width = x.size(2), weight.size(1)
    everything = torch.cat((initial_states, x), 2)
    docs = torch.zeros(x.size(0), steps) if seq_idx is None else seq_idx
    docs = torch.cat((docs[:, :1].expand(-1, width - 1), docs), 1)
    out = torch.zeros_like(x) + bias[:, None]
    for k in range(width):
        same = docs[:, k : k + steps] == docs[:, width - 1 :]
        out = out + weight[:, k, None] * everything[:, :, k : k + steps] * same[:, None]
    return F.silu(out) if silu else out


def close(got: Tensor, want: Tensor, rel: float) -> None:
    assert got.shape == want.shape
    if want.numel():
        error, size = (got.double() - want.double()).abs().max(), want.abs().max()
        assert error <= rel * size, f"error {error:.2e}, largest value {size:.2e}"


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("width", [1, 2, 4, 9])
def test_outputs_and_all_gradients_equal_the_sum(width: int, packed: bool, dtype: torch.dtype, rel: float) -> None:
    seq_idx = DOCS if packed else None
    for silu in (False, True):
        x = make(dtype, width)
        x64 = {name: t.detach().double().requires_grad_() for name, t in x.items()}
        got = causal_conv1d(**x, seq_idx=seq_idx, activation="silu" if silu else None)
        want = equations(**x64, seq_idx=seq_idx, silu=silu)
        close(got, want, rel)
        g = torch.randn_like(got)
        grads = torch.autograd.grad(got, tuple(x.values()), g)
        for a, b in zip(grads, torch.autograd.grad(want, tuple(x64.values()), g.double()), strict=True):
            close(a, b, rel)


def test_gradcheck() -> None:
    x = make(torch.float64, steps=9)
    x |= {name: x[name].detach()[:2].requires_grad_() for name in ("x", "initial_states")}
    docs = DOCS[:2, :9]
    assert torch.autograd.gradcheck(lambda x, w, b, s: causal_conv1d(x, w, b, docs, s, True, "silu"), tuple(x.values()))


@pytest.mark.parametrize("steps", [1, 2, 3, T])
@pytest.mark.parametrize("with_state", [False, True])
def test_equals_causal_conv1d(with_state: bool, steps: int) -> None:
    x = make(steps=steps)
    states = x["initial_states"] if with_state else None
    args = (x["x"], x["weight"], x["bias"])
    want = causal_conv1d_refs().causal_conv1d_ref(*args, states, True, activation="swish")
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            got = causal_conv1d(*args, None, states, True, "swish")
        for a, b in zip(got, want, strict=True):
            close(a, b, 1e-5)


def test_seq_idx_means_what_causal_conv1d_means() -> None:
    x = make()
    seq_idx = DOCS.masked_fill(DOCS == 2, -1)
    reference = causal_conv1d_refs().causal_conv1d_ref
    for states in (None, x["initial_states"]):
        got = causal_conv1d(x["x"], x["weight"], None, seq_idx, states, activation="silu")
        want = reference(x["x"], x["weight"], None, states, activation="silu", seq_idx=seq_idx)
        close(got, want, 1e-5)


@pytest.mark.parametrize("pieces", [(23,), (1, 2, 20), (10, 13), (20, 1, 1, 1)])
@torch.no_grad()
def test_pieces_equal_the_whole(pieces: tuple[int, ...]) -> None:
    x = make()
    want, want_states = causal_conv1d(**x, return_final_states=True, activation="silu")
    outs, states = [], x["initial_states"]
    for piece in x["x"].split(pieces, 2):
        out, states = causal_conv1d(piece, x["weight"], x["bias"], None, states, True, "silu")
        outs.append(out)
    close(torch.cat(outs, 2), want, 1e-6)
    assert torch.equal(states, want_states)


@torch.no_grad()
def test_packed_documents_equal_separate_ones() -> None:
    x = make()
    weights = (x["weight"], x["bias"])
    docs = DOCS[2:].expand(B, T)
    packed, states = causal_conv1d(x["x"], *weights, docs, x["initial_states"], True, "silu")
    a, b, c = x["x"].split((10, 2, 11), 2)
    first = causal_conv1d(a, *weights, None, x["initial_states"], activation="silu")
    third, want_states = causal_conv1d(c, *weights, return_final_states=True, activation="silu")
    close(packed, torch.cat((first, causal_conv1d(b, *weights, activation="silu"), third), 2), 1e-6)
    assert torch.equal(states, want_states)
    _, states = causal_conv1d(x["x"][:, :, :12], *weights, docs[:, :12], x["initial_states"], True)
    assert torch.equal(states, F.pad(b, (W - 1 - 2, 0)))  # two tokens of the last document, nothing of the first


@torch.no_grad()
def test_final_states_are_those_at_each_rows_true_end() -> None:
    x, lengths = make(), torch.tensor([0, 2, 17])
    _, padded = causal_conv1d(**x, return_final_states=True, lengths=lengths)
    for row, n in enumerate(lengths.tolist()):
        everything = torch.cat((x["initial_states"][row], x["x"][row, :, :n]), 1)
        assert torch.equal(padded[row], everything[:, n:])


def test_gradients_pass_through_final_states() -> None:
    x = make()
    _, states = causal_conv1d(**x, return_final_states=True, lengths=torch.tensor([0, 2, 17]))
    gx, gs = torch.autograd.grad(states.sum(), (x["x"], x["initial_states"]))
    assert gx.sum((1, 2)).tolist() == [0, 2 * C, 3 * C] and gs.sum((1, 2)).tolist() == [3 * C, C, 0]


def test_bfloat16_is_summed_in_float32() -> None:
    x = {name: t.detach().bfloat16() for name, t in make().items()}
    got = causal_conv1d(**x, activation="silu")
    assert got.dtype == torch.bfloat16
    want = causal_conv1d(**{name: t.float() for name, t in x.items()}, activation="silu")
    assert torch.equal(got, want.bfloat16())
    with torch.no_grad():
        one, states = causal_conv1d(**(x | {"x": x["x"][:, :, :1]}), return_final_states=True, activation="silu")
    assert torch.equal(one, got[:, :, :1]) and states.dtype == torch.bfloat16


def test_time_major_memory_stays_time_major() -> None:
    x = make()
    out, states = causal_conv1d(**x, return_final_states=True)
    assert out.transpose(1, 2).is_contiguous() and states.transpose(1, 2).is_contiguous()
    (grad,) = torch.autograd.grad(out.sum(), x["x"])
    assert grad.transpose(1, 2).is_contiguous()
    close(causal_conv1d(**(x | {"x": x["x"].contiguous()})), out, 1e-6)


def test_an_unknown_activation_is_refused() -> None:
    x = make()
    with pytest.raises(UserError, match="silu"):
        causal_conv1d(**x, activation="gelu")
