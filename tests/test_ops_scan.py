"""The selective scan against its equations in float64, against mamba_ssm's reference, and against itself in pieces."""

import pytest
import torch
import torch.nn.functional as F
from oracles import mamba_ssm_ref
from torch import Tensor

from nanochat.config import UserError
from nanochat.ops import scan
from nanochat.ops.scan import selective_scan, selective_state_update

B, E, N, T = 3, 10, 4, 23


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows and five steps a tile, so that 3 rows of 23 steps cross borders, with a rest in both directions."""
    monkeypatch.setattr(scan, "STEP_ELEMENTS", 2 * N * E)
    monkeypatch.setattr(scan, "TILE_ELEMENTS", 5 * 2 * N * E)


def make(dtype: torch.dtype = torch.float32, steps: int = T, E: int = E) -> dict[str, Tensor]:
    torch.manual_seed(0)
    x = {"u": (B, E, steps), "delta": (B, E, steps), "B": (B, N, steps), "C": (B, N, steps), "z": (B, E, steps)}
    x |= {"A": (E, N), "D": (E,), "delta_bias": (E,), "initial_state": (B, E, N)}
    made = {name: torch.randn(shape, dtype=torch.float64).to(dtype) for name, shape in x.items()}
    made["A"] = -3 * made["A"].abs()
    return {name: t.requires_grad_() for name, t in made.items()}


def equations(u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx=None, lengths=None) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t, y_t = C_t h_t + D u_t, one step at a time."""
    dt = F.softplus(delta + delta_bias[:, None])
    h, outs = initial_state, []
    for t in range(u.size(2)):
        if seq_idx is not None and t:
            h = torch.where((seq_idx[:, t] != seq_idx[:, t - 1])[:, None, None], 0.0, h)
        new = torch.exp(dt[:, :, t, None] * A) * h + (dt * u)[:, :, t, None] * B[:, None, :, t]
        h = new if lengths is None else torch.where((t < lengths)[:, None, None], new, h)
        outs.append((h * C[:, None, :, t]).sum(-1) + D * u[:, :, t])
    return torch.stack(outs, 2) * F.silu(z), h


def run(x: dict[str, Tensor], **options) -> tuple[Tensor, Tensor]:
    return selective_scan(**x, delta_softplus=True, return_last_state=True, **options)


def close(got: Tensor, want: Tensor, rel: float) -> None:
    assert got.shape == want.shape
    error, size = (got.double() - want.double()).abs().max(), want.abs().max()
    assert error <= rel * size, f"error {error:.2e}, largest value {size:.2e}"


DOCS = torch.tensor([[0] * 4 + [1] * 1 + [2] * 18, [5] * 23, [0] * 10 + [1] * 13])
LENGTHS = torch.tensor([23, 0, 12])
CASES = {"plain": {}, "docs": {"seq_idx": DOCS}, "lengths": {"lengths": LENGTHS}}


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_all_gradients_equal_the_equations(case: str, dtype: torch.dtype, rel: float) -> None:
    x, options = make(dtype), CASES[case]
    x64 = {name: t.detach().double().requires_grad_() for name, t in x.items()}
    got, want = run(x, **options), equations(**x64, **options)
    valid = torch.arange(T) < options.get("lengths", torch.full((B,), T))[:, None]  # (B, T)
    g = torch.randn_like(got[0]) * valid[:, None]
    g_last = torch.randn_like(got[1])
    close(got[0] * valid[:, None], want[0] * valid[:, None], rel)
    close(got[1], want[1], rel)
    assert got[0].isfinite().all()
    grads = torch.autograd.grad(got, tuple(x.values()), (g, g_last))
    wants = torch.autograd.grad(want, tuple(x64.values()), (g.double(), g_last.double()))
    for a, b in zip(grads, wants, strict=True):
        close(a, b, rel)


def test_gradcheck() -> None:
    torch.manual_seed(0)
    small = [torch.randn(2, 3, 7), torch.randn(2, 3, 7), -torch.rand(3, 2), torch.randn(2, 2, 7), torch.randn(2, 2, 7)]
    inputs = [x.double().requires_grad_() for x in (*small, torch.randn(3), torch.randn(2, 3, 7), torch.randn(3))]
    assert torch.autograd.gradcheck(lambda *x: selective_scan(*x, True, True), inputs)


@pytest.mark.parametrize("shape", ["(B, N, T)", "(E, N)", "(B, G, N, T)"])
@pytest.mark.parametrize("bare", [False, True])
def test_equals_mamba_ssm(shape: str, bare: bool) -> None:
    reference = mamba_ssm_ref().selective_scan_ref
    x = make()
    del x["initial_state"]
    if shape != "(B, N, T)":
        size = (E, N) if shape == "(E, N)" else (B, 2, N, T)
        x |= {name: torch.randn(size, requires_grad=True) for name in "BC"}
    if bare:
        x = {name: x[name] for name in ("u", "delta", "A", "B", "C")}
        x["delta"] = x["delta"].detach().abs().requires_grad_()
    got = selective_scan(**x, delta_softplus=not bare, return_last_state=True)
    want = reference(**x, delta_softplus=not bare, return_last_state=True)
    g = [torch.randn_like(o) for o in got]
    for a, b in zip(got, want, strict=True):
        close(a, b, 1e-5)
    grads = (torch.autograd.grad(o, tuple(x.values()), g) for o in (got, want))
    for a, b in zip(*grads, strict=True):
        close(a, b, 1e-5)


def test_one_group_for_B_and_several_for_C_is_repeated() -> None:
    x = make()
    c = torch.randn(B, 2, N, T)
    got = selective_scan(x["u"], x["delta"], x["A"], x["B"][:, None], c, delta_softplus=True)
    want = mamba_ssm_ref().selective_scan_ref(x["u"], x["delta"], x["A"], x["B"], c, delta_softplus=True)
    close(got, want, 1e-5)


def cut(x: dict[str, Tensor], lo: int, hi: int, **more: Tensor) -> dict[str, Tensor]:
    return {name: t[:, :, lo:hi] if t.size(-1) == T else t for name, t in x.items()} | more


@torch.no_grad()
def test_pieces_and_single_steps_equal_the_whole() -> None:
    x = make()
    want, want_last = run(x)
    first, state = run(cut(x, 0, 9))
    second, state = run(cut(x, 9, 16, initial_state=state))
    outs, state = [first, second], state.clone()
    for t in range(16, T):
        u, delta, b, c, z = (x[name][:, :, t] for name in ("u", "delta", "B", "C", "z"))
        y = selective_state_update(state, u, delta, x["A"], b, c, x["D"], z, x["delta_bias"], True)
        outs.append(y[:, :, None])
    close(torch.cat(outs, 2), want, 1e-5)
    close(state, want_last, 1e-5)


@torch.no_grad()
def test_packed_documents_equal_separate_ones() -> None:
    x = make()
    packed, last = run(x, seq_idx=DOCS[:1].expand(B, T))
    zero = torch.zeros(B, E, N)
    alone = [run(cut(x, lo, hi, **({} if lo == 0 else {"initial_state": zero}))) for lo, hi in ((0, 4), (4, 5), (5, T))]
    close(packed, torch.cat([out for out, _ in alone], 2), 1e-6)
    close(last, alone[-1][1], 1e-6)


@torch.no_grad()
def test_padding_does_not_move_the_state() -> None:
    x = make()
    _, padded = run(x, lengths=LENGTHS, seq_idx=DOCS)
    for row, n in enumerate(LENGTHS.tolist()):
        if n == 0:
            assert torch.equal(padded[row], x["initial_state"][row])
            continue
        _, alone = run(cut(x, 0, n), seq_idx=DOCS[:, :n])
        close(padded[row], alone[row], 1e-6)


def test_bfloat16_stays_close_and_keeps_a_float32_state() -> None:
    x = make()
    low = {name: t.detach().bfloat16() if t.ndim == 3 and name != "initial_state" else t for name, t in x.items()}
    out, last = run(low)
    want, want_last = run({name: t.float() for name, t in low.items()})
    assert out.dtype == torch.bfloat16 and last.dtype == torch.float32
    close(out, want, 5e-3)
    close(last, want_last, 1e-5)
    low["u"].requires_grad_()
    (grad,) = torch.autograd.grad(run(low)[0].float().sum(), low["u"])
    assert grad.dtype == torch.bfloat16 and grad.isfinite().all()


def test_what_is_kept_for_the_backward_is_no_state_per_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "TILE_ELEMENTS", 32 * 2 * N * E)
    kept = []
    x = make(steps=512)

    def pack(t: Tensor) -> Tensor:
        kept.append(t.nbytes)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run(x)
    assert max(kept) <= x["u"].nbytes
    assert sum(kept) < 0.6 * B * E * N * 512 * 4 * 4  # u, delta, z, y and the borders, N = 4: below half a state each


@pytest.mark.parametrize("bare", [False, True])
@torch.no_grad()
def test_state_update_equals_mamba_ssm(bare: bool) -> None:
    reference = mamba_ssm_ref().selective_state_update_ref
    torch.manual_seed(0)
    state, x, dt, b, c = (torch.randn(s) for s in ((B, E, N), (B, E), (B, E), (B, N), (B, N)))
    A, D, z, bias = -torch.rand(E, N), torch.randn(E), torch.randn(B, E), torch.randn(E)
    optional = (None, None, None) if bare else (D, z, bias)
    ours, theirs = state.clone(), state.clone()
    close(
        selective_state_update(ours, x, dt, A, b, c, *optional, True),
        reference(theirs, x, dt, A, b, c, *optional, True),
        1e-5,
    )
    close(ours, theirs, 1e-5)


def test_complex_decays_are_refused() -> None:
    x = make()
    x["A"] = x["A"].detach().to(torch.complex64)
    with pytest.raises(UserError, match="only real"):
        run(x)
