"""The compiled selective scan against a float64 loop over time, on every kind of vectors this machine has."""

import numpy as np
import pytest
import rustbpe
import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat import ops
from nanochat.config import UserError
from nanochat.kernels import native

LEVELS = ["baseline", "avx2", "avx512", "avx512bf16"]
LEVELS = LEVELS[: LEVELS.index(rustbpe.simd_level()) + 1]
FLOATS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


def naive(u, delta, A, B, C, D=None, z=None, delta_bias=None, softplus=False, h=None, seq_idx=None, lengths=None):
    """The definition, a step at a time. Shapes as selective_scan."""
    delta = delta if delta_bias is None else delta + delta_bias[:, None]
    delta = F.softplus(delta) if softplus else delta
    h, y = torch.zeros(*u.shape[:2], A.size(1), dtype=u.dtype) if h is None else h, []
    for t in range(u.size(2)):
        live = torch.ones(u.size(0), dtype=torch.bool) if lengths is None else t < lengths
        if seq_idx is not None and t:
            h = h * ~(live & (seq_idx[:, t] != seq_idx[:, t - 1]))[:, None, None]
        dt = delta[:, :, t] * live[:, None]
        h = torch.exp(dt[..., None] * A) * h + (dt * u[:, :, t])[..., None] * B[:, None, :, t]
        y.append((h * C[:, None, :, t]).sum(-1))
    out = torch.stack(y, 2)
    out = out if D is None else out + D[:, None] * u
    return (out if z is None else out * F.silu(z)), h


def inputs(B: int, T: int, E: int, N: int, seed: int = 0) -> dict[str, Tensor]:
    """Leaf tensors by the names of selective_scan's arguments; time-major memory, values as a fresh Mamba has them."""
    g = torch.Generator().manual_seed(seed)
    args = {
        name: torch.randn(B, T, n, generator=g) for name, n in (("u", E), ("delta", E), ("z", E), ("B", N), ("C", N))
    }
    args = {name: x.transpose(1, 2) for name, x in args.items()}
    args["A"] = -torch.rand(E, N, generator=g) * N
    args |= {name: torch.randn(E, generator=g) for name in ("D", "delta_bias")}
    args["delta_bias"] -= 3
    args["initial_state"] = torch.randn(B, E, N, generator=g)
    return {name: args[name].requires_grad_() for name in FLOATS}


def close(got: Tensor, want: Tensor, name: str) -> None:
    scale = want.abs().max().clamp_min(1e-30)
    error = float((got.double() - want).abs().max() / scale)
    assert error < 1e-5, f"{name}: off by {error:.1e} of the largest"


def check(args: dict[str, Tensor], softplus: bool, simd: str | None, **rest: Tensor) -> None:
    """Outputs, last state and all gradients of both."""
    out, last = native.selective_scan(**args, delta_softplus=softplus, return_last_state=True, simd=simd, **rest)  # pyrefly: ignore
    wide = {name: x.detach().double().requires_grad_() for name, x in args.items()}
    h = wide.get("initial_state")
    want = naive(*(wide.get(name) for name in FLOATS[:-1]), softplus, h, rest.get("seq_idx"), rest.get("lengths"))
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=g, dtype=torch.float64) for x in want]
    got = torch.autograd.grad(out, args.values(), weights[0].float(), retain_graph=True, allow_unused=True)
    got2 = torch.autograd.grad(last, args.values(), weights[1].float(), allow_unused=True)
    ref = torch.autograd.grad(want[0], wide.values(), weights[0], retain_graph=True, allow_unused=True)
    ref2 = torch.autograd.grad(want[1], wide.values(), weights[1], allow_unused=True)
    for a, b, name in zip((out, last, *got, *got2), (*want, *ref, *ref2), ("out", "last", *args, *args), strict=True):
        if b is None:
            assert a is None or not a.any(), name
        else:
            close(a.detach(), b.detach(), name)


@pytest.mark.parametrize("simd", LEVELS)
@pytest.mark.parametrize(("T", "E", "N"), [(1, 1, 1), (31, 16, 4), (32, 70, 16), (67, 129, 17), (70, 20, 64)])
def test_equals_the_definition(T: int, E: int, N: int, simd: str) -> None:
    check(inputs(2, T, E, N), True, simd)


@pytest.mark.parametrize("simd", LEVELS)
@pytest.mark.parametrize("missing", [("D",), ("z",), ("delta_bias",), ("initial_state",), FLOATS[5:]])
def test_equals_the_definition_without_options(missing: tuple[str, ...], simd: str) -> None:
    args = {name: x for name, x in inputs(2, 40, 20, 8).items() if name not in missing}
    check(args, True, simd)
    args["delta"] = F.softplus(args["delta"]).detach().requires_grad_()
    if "delta_bias" not in args:
        check(args, False, simd)


@pytest.mark.parametrize("simd", LEVELS)
def test_documents_and_padding(simd: str) -> None:
    seq_idx = torch.randint(0, 5, (4, 75)).sort(1).values
    seq_idx[1, 32:] += 5  # a document that begins with a chunk
    lengths = torch.tensor([75, 0, 33, 1])
    check(inputs(4, 75, 20, 8), True, simd, seq_idx=seq_idx)
    check(inputs(4, 75, 20, 8), True, simd, lengths=lengths)
    check(inputs(4, 75, 20, 8), True, simd, lengths=lengths, seq_idx=seq_idx)


@pytest.mark.parametrize("simd", LEVELS)
def test_decay_may_underflow(simd: str) -> None:
    args = inputs(1, 40, 20, 8)
    with torch.no_grad():
        args["A"] *= 40
        args["delta_bias"] += 6
    check(args, True, simd)


@pytest.mark.parametrize("simd", LEVELS)
def test_a_nan_reaches_the_output(simd: str) -> None:
    args = inputs(1, 40, 20, 8)
    with torch.no_grad():
        args["delta"][0, 3, 7] = float("nan")
    out = native.selective_scan(**args, delta_softplus=True, simd=simd)  # pyrefly: ignore
    assert out[0, 3, 7:].isnan().all() and out.isnan().sum() == 33  # pyrefly: ignore


def test_threads_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(threads: int) -> list[Tensor]:
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        args = inputs(2, 70, 150, 16)
        out, last = native.selective_scan(**args, delta_softplus=True, return_last_state=True)  # pyrefly: ignore
        return [out, last, *torch.autograd.grad(out.square().sum() + last.square().sum(), args.values())]

    first = run(1)
    for threads in (2, 3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(threads), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_ops(dtype: torch.dtype) -> None:
    args = inputs(2, 67, 20, 16)
    low = {name: x.to(dtype) if name in ("u", "delta", "z", "B", "C") else x for name, x in args.items()}
    g = torch.randn(2, 20, 67)
    results = []
    for scan in (native.selective_scan, ops.selective_scan):
        out, last = scan(**low, delta_softplus=True, return_last_state=True)  # pyrefly: ignore
        assert out.dtype == dtype and last.dtype == torch.float32
        results.append([out, last, *torch.autograd.grad(out, args.values(), g.to(dtype))])
    rtol = 1e-5 if dtype == torch.float32 else 1e-2
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= rtol * b.abs().max()


@pytest.mark.parametrize("simd", LEVELS)
@pytest.mark.parametrize(("E", "N"), [(1, 1), (70, 16), (20, 17), (16, 4), (1030, 64)])
def test_steps_equal_the_scan(E: int, N: int, simd: str) -> None:
    with torch.no_grad():
        args = inputs(3, 5, E, N)
        out, last = native.selective_scan(**args, delta_softplus=True, return_last_state=True)  # pyrefly: ignore
        state = args["initial_state"].clone()
        u, delta, A, B, C, D, z, bias, _ = args.values()
        for t in range(5):
            step = (u[..., t], delta[..., t], A, B[..., t], C[..., t], D, z[..., t], bias, True)
            close(native.selective_state_update(state, *step, simd=simd), out[..., t].double(), "y")  # pyrefly: ignore
        close(state, last.double(), "state")


def test_a_step_takes_any_layout_and_missing_options() -> None:
    g = torch.Generator().manual_seed(0)
    state = torch.randn(2, 8, 20, generator=g).transpose(1, 2)
    x, dt = (torch.rand(2, 20, generator=g).bfloat16() for _ in range(2))
    A, B, C = -torch.rand(20, 8, generator=g), torch.rand(2, 8, generator=g), torch.rand(2, 8, generator=g)
    other = state.clone()
    y = native.selective_state_update(state, x, dt, A, B, C)
    want = ops.selective_state_update(other, x, dt, A, B, C)
    assert y.dtype == torch.bfloat16 and torch.allclose(y, want, rtol=1e-2)
    torch.testing.assert_close(state, other)


def test_what_it_cannot_do_is_a_user_error() -> None:
    args = {name: x.detach() for name, x in inputs(1, 3, 4, 2).items()}
    with pytest.raises(UserError, match="expected \\(B, N, T\\)"):
        native.selective_scan(**args | {"B": torch.ones(4, 2)})  # pyrefly: ignore
    with pytest.raises(UserError, match="float64"):
        native.selective_scan(**args | {"u": args["u"].double()})  # pyrefly: ignore
    with pytest.raises(UserError, match="float64"):
        native.selective_state_update(torch.zeros(1, 4, 2).double(), *(args["u"][..., 0],) * 2, *(args["A"],) * 3)


def test_a_bad_array_is_named() -> None:
    u, A, B = np.zeros((1, 3, 4), np.float32), np.zeros((4, 2), np.float32), np.zeros((1, 3, 2), np.float32)
    for args, options, message in [
        ((u[0], u, A, B, B), {}, "u: expected 3 dimensions"),
        ((u[:, :0], u, A, B, B), {}, "u: .*none empty"),
        ((u, u.astype(float), A, B, B), {}, "delta: .*float32 .*got float64"),
        ((u, u, A, B[:, :2], B), {}, r"b: .*\[1, 3, 2\], got shape \[1, 2, 2\]"),
        ((u, u, A, B, np.asfortranarray(B)), {}, "c: .*C-contiguous .*strides"),
        ((u, u, A, B, B), {"resets": B[..., 0]}, "resets: .*uint8"),
        ((u, u, A, B, B), {"lengths": [1]}, "lengths: .*int64 .*got list"),
        ((u, u, A, B, B), {"simd": "sse9"}, "simd=.sse9.: expected"),
    ]:
        with pytest.raises(ValueError, match=message):
            rustbpe.selective_scan_forward(*args, **options)  # pyrefly: ignore


def test_another_package_of_that_name_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.available() is None
    assert "CPU" in (native.available(torch.device("cuda")) or "")
    monkeypatch.setattr(native, "rustbpe", np)
    assert "scripts/setup.sh" in (native.available() or "")
    monkeypatch.setattr(native, "rustbpe", None)
    with pytest.raises(UserError, match=r"scripts/setup\.sh"):
        native.selective_scan(**inputs(1, 3, 4, 2))  # pyrefly: ignore
