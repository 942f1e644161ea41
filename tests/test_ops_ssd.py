"""Mamba-2's scan against the recurrence of the paper (arXiv 2405.21060) in float64, and against mamba_ssm."""

import pytest
import torch
import torch.nn.functional as F
from oracles import mamba_ssm_ref
from torch import Tensor

from nanochat.ops.ssd import ssd_scan, ssd_state_update


def recurrence(x, dt, A, B, C, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, lengths=None):
    """One token after the other: h <- exp(dt A) h + dt x B^T, y = h C + D x; softplus on dt. -> (y, last state)."""
    (Bn, T, H, P), r = x.shape, x.size(2) // B.size(2)
    B, C = B.repeat_interleave(r, 2), C.repeat_interleave(r, 2)
    h = x.new_zeros(Bn, H, P, B.size(-1)) if initial_states is None else initial_states
    dt, ys = F.softplus(dt if dt_bias is None else dt + dt_bias), []
    for t in range(T):
        on = torch.ones(Bn) if lengths is None else (t < lengths).to(x.dtype)
        if seq_idx is not None and t:
            h = h * ((seq_idx[:, t] == seq_idx[:, t - 1]) | (on == 0))[:, None, None, None]
        d = dt[:, t] * on[:, None]
        h = (d * A).exp()[..., None, None] * h + torch.einsum("bh,bhp,bhn->bhpn", d, x[:, t], B[:, t])
        ys.append(torch.einsum("bhpn,bhn->bhp", h, C[:, t]))
    y = torch.stack(ys, 1)
    y = y if D is None else y + x * D.view(H, -1)
    return (y if z is None else y * F.silu(z)), h


def inputs(Bn: int = 2, T: int = 21, H: int = 4, P: int = 3, G: int = 1, N: int = 5) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "x": torch.randn(Bn, T, H, P),
        "dt": torch.randn(Bn, T, H),
        "A": -torch.rand(H) * 2 - 0.1,
        "B": torch.randn(Bn, T, G, N),
        "C": torch.randn(Bn, T, G, N),
        "D": torch.randn(H, P),
        "z": torch.randn(Bn, T, H, P),
        "dt_bias": torch.randn(H),
        "initial_states": torch.randn(Bn, H, P, N),
    }


def scan(data: dict[str, Tensor], chunk_size: int = 8, **more) -> tuple[Tensor, Tensor]:
    out = ssd_scan(**data, chunk_size=chunk_size, dt_softplus=True, return_final_states=True, **more)
    assert isinstance(out, tuple)
    return out


def cut(data: dict[str, Tensor], rows: slice, t: slice) -> dict[str, Tensor]:
    """Some rows and tokens of what has them."""
    return {k: v[rows, t] if k in ("x", "dt", "B", "C", "z") else v for k, v in data.items()}


def assert_near(got: Tensor, want: Tensor, rel: float = 1e-5) -> None:
    """Relative in the 2-norm; absolute below a norm of 1, where the sum over tokens in A's gradient cancels."""
    error = ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1)).item()
    assert got.shape == want.shape and error < rel, error


DOCS = torch.tensor([[0] * 3 + [1] * 8 + [2] * 10, [5] * 16 + [4] + [5] * 4])  # an index may come back
EXTRAS = {
    "plain": {},
    "docs": {"seq_idx": DOCS},
    "lengths": {"lengths": torch.tensor([0, 13])},
    "docs and lengths": {"seq_idx": DOCS, "lengths": torch.tensor([5, 16])},
}


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("G", [1, 2])
@pytest.mark.parametrize("T, chunk_size", [(21, 8), (21, 64), (16, 8)])
def test_scan_and_its_gradients_equal_the_recurrence(T: int, chunk_size: int, G: int, extra: str) -> None:
    data = cut(inputs(G=G), slice(None), slice(T))
    more = {k: v[:, :T] if k == "seq_idx" else v for k, v in EXTRAS[extra].items()}
    exact = {k: v.double().requires_grad_() for k, v in data.items()}
    ours = {k: v.clone().requires_grad_() for k, v in data.items()}
    want, got = recurrence(**exact, **more), scan(ours, chunk_size, **more)
    if "lengths" in more:  # what stands at a pad means nothing
        valid = (torch.arange(T) < more["lengths"][:, None])[..., None, None]
        want, got = (want[0] * valid, want[1]), (got[0] * valid, got[1])
    g, gh = torch.randn_like(data["x"]), torch.randn_like(data["initial_states"])
    for p, q in zip(got, want, strict=True):
        assert_near(p, q)
    wants = torch.autograd.grad(want, list(exact.values()), (g.double(), gh.double()))
    gots = torch.autograd.grad(got, list(ours.values()), (g, gh))
    for p, q in zip(gots, wants, strict=True):
        assert_near(p, q)


def test_float64_passes_gradcheck_without_optional_arguments() -> None:
    data = tuple(v.double().requires_grad_() for v in list(inputs(1, 5, 2, 2, 1, 2).values())[:5])  # x, dt, A, B, C
    assert torch.autograd.gradcheck(lambda *a: ssd_scan(*a, chunk_size=2, dt_softplus=True), data)


def test_strong_decay_gives_no_nan_and_right_gradients() -> None:
    data = {k: v for k, v in inputs(T=70).items() if k in ("x", "dt", "A", "B", "C")}
    data["A"] = torch.tensor([-500.0, -50.0, -5.0, -1e-3])
    exact = {k: v.double().requires_grad_() for k, v in data.items()}
    ours = {k: v.clone().requires_grad_() for k, v in data.items()}
    want, got = recurrence(**exact), scan(ours, 64)
    assert_near(got[0], want[0])
    g = torch.randn_like(data["x"])
    wants = torch.autograd.grad(want[0], list(exact.values()), g.double())
    for p, q in zip(torch.autograd.grad(got[0], list(ours.values()), g), wants, strict=True):
        assert_near(p, q, 1e-4)


def test_pieces_with_a_carried_state_equal_the_whole() -> None:
    data = inputs()
    want, state = scan(data)
    h, ys = data["initial_states"], []
    for t in (slice(0, 5), slice(5, 5), slice(5, 14), slice(14, 21)):
        y, h = scan(cut(data, slice(None), t) | {"initial_states": h})
        ys.append(y)
    assert_near(torch.cat(ys, 1), want)
    assert_near(h, state)


@pytest.mark.parametrize("G", [1, 2])
def test_steps_equal_the_whole(G: int) -> None:
    data = inputs(G=G)
    want, state = scan(data)
    fixed = {k: data[k] for k in ("A", "D", "dt_bias")}
    h = data["initial_states"].clone()
    for t in range(21):
        now = {k: data[k][:, t] for k in ("x", "dt", "B", "C", "z")}
        assert_near(ssd_state_update(h, **now, **fixed, dt_softplus=True), want[:, t])
    assert_near(h, state)


def test_packed_documents_equal_separate_ones() -> None:
    data = inputs(Bn=1)
    packed, state = scan(data, seq_idx=DOCS[:1])
    h = data["initial_states"]
    for t in (slice(0, 3), slice(3, 11), slice(11, 21)):
        y, h = scan(cut(data, slice(None), t) | {"initial_states": h})
        assert_near(packed[:, t], y)
        last, h = h, torch.zeros_like(h)
    assert_near(state, last)


def test_a_padded_row_ends_in_the_state_of_the_short_one() -> None:
    data, lengths = inputs(Bn=3), torch.tensor([0, 9, 21])
    y, state = scan(data, lengths=lengths)
    assert torch.equal(state[0], data["initial_states"][0])
    for row, n in enumerate(lengths.tolist()):
        part = cut(data, slice(row, row + 1), slice(n)) | {"initial_states": data["initial_states"][row, None]}
        alone, last = scan(part)
        assert_near(y[row, None, :n], alone)
        assert_near(state[row, None], last)


def test_dt_limit_clamps_and_without_softplus_no_step_is_negative() -> None:
    data = {k: v for k, v in inputs().items() if k in ("x", "dt", "A", "B", "C")}
    dt = data.pop("dt")
    assert torch.equal(ssd_scan(dt=dt, **data), ssd_scan(dt=dt.clamp_min(0), **data))
    limited = ssd_scan(dt=dt, **data, dt_softplus=True, dt_limit=(0.2, 0.5))
    assert torch.equal(limited, ssd_scan(dt=F.softplus(dt).clamp(0.2, 0.5), **data))


def test_nothing_is_kept_outside_autograd_and_the_result_is_the_same() -> None:
    data = inputs()
    with torch.no_grad():
        quiet = scan(data)
    data["x"].requires_grad_()
    for p, q in zip(quiet, scan(data), strict=True):
        assert torch.equal(p, q) and q.requires_grad


def test_bfloat16_is_close_and_keeps_float32_states() -> None:
    data = inputs(T=70, P=16, N=16)
    half = {k: v.bfloat16() if k in ("x", "B", "C", "z") else v for k, v in data.items()}
    exact = {k: v.to(data[k].dtype).requires_grad_() for k, v in half.items()}
    half = {k: v.requires_grad_() for k, v in half.items()}
    got, want = scan(half, 64), scan(exact, 64)
    assert got[0].dtype == torch.bfloat16 and got[1].dtype == torch.float32
    g = torch.randn_like(data["x"])
    grads = zip(
        torch.autograd.grad(got[0], list(half.values()), g.bfloat16()),
        torch.autograd.grad(want[0], list(exact.values()), g.bfloat16().float()),
        strict=True,
    )
    for p, q in (*zip(got, want, strict=True), *grads):
        assert_near(p, q, 0.01)


def test_scan_equals_mamba_ssm() -> None:
    ref, data = mamba_ssm_ref(), inputs(T=24, G=2)
    del data["initial_states"]
    want = ref.ssd_chunk_scan_combined_ref(**data, chunk_size=8, dt_softplus=True)
    assert_near(scan(data)[0], want)


def test_scan_equals_ssd_minimal_discrete() -> None:
    ref, data = mamba_ssm_ref(), inputs(T=24, G=2)
    x, dt, B, C, h = (data[k] for k in ("x", "dt", "B", "C", "initial_states"))
    dt = F.softplus(dt)
    by_head = (t.repeat_interleave(2, 2) for t in (B, C))
    want = ref.ssd_minimal_discrete(x * dt[..., None], dt * data["A"], *by_head, 8, h[:, None])
    got = ssd_scan(x, dt, data["A"], B, C, 8, initial_states=h, return_final_states=True)
    for p, q in zip(got, want, strict=True):
        assert_near(p, q)
