"""Our Triton kernels against float64, run on the CPU under Triton's interpreter; adapters against stand-ins.

The interpreter must be chosen before triton is imported, so all its cases run in one subprocess: this file as a script.
"""

import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat import ops
from nanochat.kernels import optional, triton_scan, triton_ssd
from nanochat.ops import attention_mask

Inputs = dict[str, Tensor]
TOLERANCE = {"bfloat16": 1e-2, "bfloat16 chunk states": 1e-2, "bfloat16 ssd": 2e-2}  # else 1e-5, of the largest element


def scan_inputs(B: int, E: int, T: int, N: int, optional_ones: str = "", dtype: torch.dtype = torch.float32) -> Inputs:
    """u, delta, z: (B, E, T) views of time-major tensors, u of a wider one, as a block passes them."""
    x = {"u": torch.randn(B, T, 2 * E, dtype=dtype)[..., :E].transpose(1, 2)}
    x |= {"delta": torch.randn(B, T, E, dtype=dtype).transpose(1, 2), "A": -torch.rand(E, N) - 0.1}
    x |= {"B": torch.randn(B, T, N, dtype=dtype).transpose(1, 2), "C": torch.randn(B, N, T, dtype=dtype)}
    more = {"D": torch.randn(E), "z": torch.randn(B, E, T, dtype=dtype), "delta_bias": torch.randn(E) - 2}
    more["initial_state"] = torch.randn(B, E, N)
    return x | {name: more[name] for name in optional_ones.split()}


def scan_oracle(
    x: Inputs, softplus: bool, seq_idx: Tensor | None = None, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One step after the other, in the inputs' dtype."""
    u, delta, A = x["u"], x["delta"], x["A"]
    if "delta_bias" in x:
        delta = delta + x["delta_bias"][:, None]
    if softplus:
        delta = F.softplus(delta)
    h, ys = x.get("initial_state", torch.zeros(u.size(0), *A.shape, dtype=u.dtype)), []
    for t in range(u.size(2)):
        valid = torch.ones(u.size(0), dtype=torch.bool) if lengths is None else t < lengths
        begins = valid & (seq_idx[:, t] != seq_idx[:, t - 1]) if seq_idx is not None and t else torch.zeros_like(valid)
        dt = (delta[:, :, t] * valid[:, None])[..., None]
        decay = torch.where(begins[:, None, None], 0.0, torch.exp(dt * A))
        h = decay * h + dt * u[:, :, t, None] * x["B"][:, None, :, t]
        ys.append((h * x["C"][:, None, :, t]).sum(-1) + (x["D"] * u[:, :, t] if "D" in x else 0))
    y = torch.stack(ys, -1)
    return (y * F.silu(x["z"]) if "z" in x else y), h


def errors(run: Callable, oracle: Callable, inputs: Inputs, outputs: tuple[str, ...]) -> dict[str, float]:
    """Largest error of every output and gradient, relative to the largest element of its float64 counterpart."""
    sides = []
    for function, dtype in ((run, None), (oracle, torch.float64)):
        x = {k: v.detach().to(dtype or v.dtype).requires_grad_() for k, v in inputs.items()}
        out = function(x)
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(t.shape, generator=generator) for t in out]
        loss = sum((t * w.to(dtype or torch.float32)).sum() for t, w in zip(out, weights, strict=True))
        grads = torch.autograd.grad(loss, list(x.values()))
        sides.append(dict(zip(outputs, out, strict=True)) | {f"d{k}": g for k, g in zip(x, grads, strict=True)})
    got, want = ({k: t.detach().double() for k, t in side.items()} for side in sides)
    return {k: float((got[k] - want[k]).abs().max() / want[k].abs().max()) for k in want}


def scan_case(softplus: bool, shape: tuple[int, ...], named: str = "", dtype: torch.dtype = torch.float32, **rows):
    inputs = scan_inputs(*shape, optional_ones=named, dtype=dtype)

    def run(x: Inputs) -> tuple[Tensor, Tensor]:
        x = dict(x)
        positional = [x.pop(name, None) for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
        y, last = triton_scan.selective_scan(*positional, softplus, True, **x, **rows)
        assert y.dtype == dtype and last.dtype == torch.float32
        return y, last

    return errors(run, lambda x: scan_oracle(x, softplus, **rows), inputs, ("y", "last"))


def states_case(H: int, G: int, dtype: torch.dtype = torch.float32, P: int = 12) -> dict[str, float]:
    B, nc, Q, N = 1, 2, 70, 20
    xBC = torch.randn(B, nc, Q, H * P + 2 * G * N, dtype=dtype)
    inputs = {"x": xBC[..., : H * P].unflatten(-1, (H, P)), "dt": torch.rand(B, nc, Q, H)}
    inputs |= {"decay_to_end": torch.rand(B, nc, Q, H), "B": xBC[..., -G * N :].unflatten(-1, (G, N))}

    def oracle(x: Inputs) -> tuple[Tensor]:
        B_h = x["B"].repeat_interleave(H // G, 3)
        return (torch.einsum("bcqhp,bcqh,bcqhn->bchpn", x["x"], x["dt"] * x["decay_to_end"], B_h),)

    return errors(lambda x: (triton_ssd.chunk_states(**x),), oracle, inputs, ("states",))


def ops_case(named: str, **rows: Tensor) -> dict[str, float]:
    """The scan against nanochat.ops in float64."""

    def run(scan: Callable, x: Inputs) -> tuple[Tensor, Tensor]:
        x = dict(x)
        y, last = scan(x.pop("u"), x.pop("delta"), x.pop("A"), x.pop("B"), x.pop("C"), **x, **SCAN, **rows)
        return at_valid(y.transpose(1, 2), **rows), last

    scans = (triton_scan.selective_scan, ops.selective_scan)
    return errors(*(partial(run, scan) for scan in scans), scan_inputs(2, 8, 16, 4, named), ("y", "last"))


def ssd_case(T: int, G: int, named: str = "", dtype: torch.dtype = torch.float32, **rows: Any) -> dict[str, float]:
    """triton_ssd.ssd_scan in chunks of 8 against nanochat.ops.ssd_scan in float64."""
    B, H, P, N = 2, 4, 3, 5
    xBC = torch.randn(B, T, H * P + 2 * G * N, dtype=dtype)
    inputs = {"x": xBC[..., : H * P].unflatten(-1, (H, P)), "dt": torch.randn(B, T, H, dtype=dtype)}
    inputs |= {"A": -torch.rand(H) * 2 - 0.1, "B": xBC[..., H * P : H * P + G * N].unflatten(-1, (G, N))}
    inputs["C"] = xBC[..., -G * N :].unflatten(-1, (G, N))
    more = {"D": torch.randn(H, P), "z": torch.randn(B, T, H, P, dtype=dtype), "dt_bias": torch.randn(H)}
    more["initial_states"] = torch.randn(B, H, P, N)
    rows = {"chunk_size": 8, "dt_softplus": True, "return_final_states": True} | rows

    def run(scan: Callable, x: Inputs) -> tuple[Tensor, Tensor]:
        y, last = scan(**x, **rows)
        assert y.dtype == x["x"].dtype and (dtype == torch.float32 or last.dtype != dtype)
        return at_valid(y, **rows), last

    scans, inputs = (triton_ssd.ssd_scan, ops.ssd_scan), inputs | {name: more[name] for name in named.split()}
    return errors(*(partial(run, scan) for scan in scans), inputs, ("y", "last"))


def at_valid(y: Tensor, lengths: Tensor | None = None, **_: Any) -> Tensor:
    """y: (B, T, ...) without what stands at pads, which means nothing."""
    if lengths is None:
        return y
    return y * (torch.arange(y.size(1)) < lengths[:, None]).view(*y.shape[:2], *[1] * (y.ndim - 2))


SCAN = {"delta_softplus": True, "return_last_state": True}
ALL = "D z delta_bias initial_state"
ALL_SSD = "D z dt_bias initial_states"
DOC = torch.tensor([[3] * 7 + [1] * 2 + [3] * 7, [0] * 8 + [1] * 8])  # one border of a document on a border of chunks
CASES: dict[str, Callable[[], dict[str, float]]] = {
    "bare": lambda: scan_case(False, (1, 8, 9, 4)),
    "small steps": lambda: scan_case(True, (1, 8, 5, 4), "delta_bias"),
    "everything, packed, N no power of two": lambda: scan_case(True, (2, 12, 16, 5), ALL, seq_idx=DOC),
    "packed and padded": lambda: scan_case(
        True, (2, 8, 16, 4), "initial_state z", seq_idx=DOC, lengths=torch.tensor([8, 0])
    ),
    "two chunks of 64, one channel too few": lambda: scan_case(True, (1, 15, 70, 16), "initial_state"),
    "two blocks of channels": lambda: scan_case(True, (1, 40, 4, 16), "D"),
    "bfloat16": lambda: scan_case(True, (1, 8, 6, 4), ALL, torch.bfloat16),
    "chunk states": lambda: states_case(4, 2),
    "chunk states of wide heads": lambda: states_case(2, 1, P=70),
    "bfloat16 chunk states": lambda: states_case(2, 1, torch.bfloat16),
    "scan as ops": lambda: ops_case(ALL, seq_idx=DOC, lengths=torch.tensor([13, 16])),
    "ssd bare, a chunk longer than the sequence": lambda: ssd_case(5, 1),
    "ssd with everything, packed": lambda: ssd_case(16, 2, ALL_SSD, seq_idx=DOC),
    "ssd padded": lambda: ssd_case(13, 1, "initial_states", lengths=torch.tensor([0, 9])),
    "ssd packed and padded": lambda: ssd_case(16, 2, "initial_states z", seq_idx=DOC, lengths=torch.tensor([8, 15])),
    "ssd with limited steps": lambda: ssd_case(9, 1, "dt_bias", dt_softplus=False, dt_limit=(0.2, 0.9)),
    "bfloat16 ssd": lambda: ssd_case(16, 1, ALL_SSD, torch.bfloat16, seq_idx=DOC),
}


def run_all() -> None:
    """In the subprocess: every case, as JSON on the last line."""
    found = {}
    for name, case in CASES.items():
        torch.manual_seed(0)
        triton_scan.CHUNK = 64 if "64" in name else 8
        found[name] = case()
    print(json.dumps(found))


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, float]]:
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_kernels_match_float64(found: dict[str, dict[str, float]], case: str) -> None:
    wrong = {name: e for name, e in found[case].items() if not e < TOLERANCE.get(case, 1e-5)}
    assert not wrong, found[case]


def test_ssd_keeps_no_more_than_its_inputs_for_the_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    def chunk_states(x: Tensor, dt: Tensor, decay: Tensor, B: Tensor) -> Tensor:
        """Of one group of heads, in plain torch, so that no Triton is needed."""
        return torch.einsum("bcqhp,bcqh,bcqn->bchpn", x, dt * decay, B[..., 0, :])

    monkeypatch.setattr(triton_ssd, "chunk_states", chunk_states)
    torch.manual_seed(0)
    x, dt, A, B, C = torch.randn(1, 256, 4, 8), torch.rand(1, 256, 4), -torch.rand(4), *torch.randn(2, 1, 256, 1, 8)
    inputs, kept = [t.requires_grad_() for t in (x, dt, A, B, C)], {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = triton_ssd.ssd_scan(*inputs, chunk_size=64)
    assert 0 < sum(kept.values()) <= sum(t.untyped_storage().nbytes() for t in inputs)
    got, want = (torch.autograd.grad(t.square().sum(), inputs) for t in (y, ops.ssd_scan(*inputs)))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_available_names_cause_and_cure() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    ours = triton_scan.available(cpu)
    assert ours is not None and ("needs" in ours or "need" in ours or "pip install" in ours)
    for package in (optional.SELECTIVE_SCAN, optional.SSD_SCAN, optional.FLASH_ATTENTION, optional.GATED_DELTA_RULE):
        assert "needs a cuda device, got cpu" in (package.available(cpu) or "")
        if find_spec(package.module.split(".")[0]) is None:
            why = package.available(cuda) or ""
            assert "ModuleNotFoundError: No module named" in why and "pip install" in why
    broken = optional.Package("json", "no_such_function", "type this").available(cuda)
    assert broken is not None and "no_such_function" in broken and broken.endswith("type this")


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Callable) -> None:
    """A module `name` with these functions, its parents empty."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
    vars(sys.modules[name]).update(functions)


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, causal: bool, window_size: tuple[int, int]) -> Tensor:
    """What flash_attn documents: (B, T, H, K), keys i - left .. i + right, -1 = no limit."""
    T, (left, right) = q.size(1), window_size
    i, j = torch.arange(T)[:, None], torch.arange(T)
    seen = (j <= i) if causal else torch.ones(T, T, dtype=torch.bool)
    seen &= (j >= i - left) | (left < 0)
    seen &= (j <= i + right) | (right < 0)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True).transpose(1, 2)


def flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q: int, max_k: int, **options) -> Tensor:
    """(tokens, H, K) and int32 cu_seqlens: every sequence by itself."""
    assert cu_q.dtype == torch.int32 and cu_q[-1] == len(q) and cu_q.diff().max() <= max_q == max_k
    pieces = zip(*(t.split(cu_q.diff().tolist()) for t in (q, k, v)), strict=True)
    return torch.cat([flash_attn_func(*(t[None] for t in piece), **options)[0] for piece in pieces if len(piece[0])])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [0, 1, 5])
def test_flash_adapter_sees_what_self_attention_sees(
    monkeypatch: pytest.MonkeyPatch, window: int, packed: bool
) -> None:
    stand_in(monkeypatch, "flash_attn", flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 16, 8, dtype=torch.bfloat16) for n in (4, 2, 2))
    doc = optional.documents(DOC) if packed else None  # attention knows a document by its index alone
    pos = torch.arange(16)[None]
    mask = attention_mask(pos, pos, window, doc, doc)
    want = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask, enable_gqa=True)
    got = optional.flash_attention(q, k, v, window, doc, {})
    torch.testing.assert_close(got.float(), want, rtol=2e-2, atol=2e-2)
    b, i = torch.arange(2)[:, None, None, None], torch.arange(16)
    assert torch.equal(
        optional.document_mask(doc, window)(b, torch.tensor(0), i[:, None], i).expand(2, 1, 16, 16),
        mask.expand(2, 1, 16, 16),
    )


def test_the_flash_adapter_gives_few_sizes() -> None:
    cu, longest = optional._few_sizes(optional.documents(DOC))
    assert cu.tolist() == [0, 7, 9, 16, 24, 32, 32, 32, 32] and cu.dtype == torch.int32 and longest == 8
    assert optional._few_sizes(torch.zeros(1, 9))[0].tolist() == [0, 9]


def test_ssd_adapter_masks_pads_behind_softplus_and_counts_documents_from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def mamba_chunk_scan_combined(x: Tensor, dt: Tensor, *args, **options) -> Tensor:
        seen.update(options, dt=dt)
        return x

    stand_in(monkeypatch, "mamba_ssm.ops.triton.ssd_combined", mamba_chunk_scan_combined=mamba_chunk_scan_combined)
    x, dt, bias, B = torch.randn(2, 16, 2, 4), torch.randn(2, 16, 2), torch.randn(2), torch.randn(2, 16, 1, 4)
    optional.ssd_scan(
        x, dt, -torch.rand(2), B, B, dt_bias=bias, dt_softplus=True, seq_idx=DOC, lengths=torch.tensor([16, 5])
    )
    torch.testing.assert_close(seen["dt"][0], F.softplus(dt + bias)[0])
    assert not seen["dt"][1, 5:].any() and seen["dt_bias"] is None and not seen["dt_softplus"]
    assert seen["seq_idx"].tolist() == [[0] * 7 + [1] * 2 + [2] * 7, [0] * 16] and seen["seq_idx"].dtype == torch.int32


def test_delta_adapter_gives_each_row_its_state(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def chunk_gated_delta_rule(q, k, v, g, beta, scale, initial_state, output_final_state, cu_seqlens):
        """A state that adds beta over its document."""
        assert q.size(0) == 1 and cu_seqlens.tolist() == [0, 7, 9, 16, 24, 32]
        given.append(cu_seqlens)
        sums = torch.stack([t.sum(0) for t in beta[0].split(cu_seqlens.diff().tolist())])
        return v, initial_state + sums[..., None, None]

    stand_in(monkeypatch, "fla.ops.gated_delta_rule", chunk_gated_delta_rule=chunk_gated_delta_rule)
    q, v = torch.randn(2, 16, 1, 4, dtype=torch.bfloat16), torch.randn(2, 16, 2, 4, dtype=torch.bfloat16)
    g = beta = torch.ones(2, 16, 2)
    state = torch.full((2, 2, 4, 4), 100.0)
    out, last = optional.gated_delta_rule(q, q, v, g, beta, None, state, True, seq_idx=DOC)
    assert torch.equal(out, v) and last[:, 0, 0, 0].tolist() == [7, 8]  # of the last documents, which began at 0
    optional.gated_delta_rule(q, q, v, g, beta, None, state, True, seq_idx=DOC)
    assert given[0] is given[1]  # the next layer waits for no count, and fla knows the tensor


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_kernels_compile_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    """To machine code of sm_80: what the interpreter accepts, the compiler may not."""
    code = "import test_kernels_triton as t; t.compile_all()"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    env["PYTHONPATH"] = os.pathsep.join((str(Path(__file__).parents[1]), str(Path(__file__).parent)))
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def compile_all() -> None:
    """Every kernel with all its options and a head_dim of 256, bfloat16 inputs, float32 elsewhere."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    scan = triton_scan._blocks(16)
    warps, half = scan.pop("num_warps"), {"u", "delta", "B", "C", "z", "out", "dout", "du", "ddelta", "dz"}
    ssd_half, edges = {"x", "B", "dx", "dB"}, triton_ssd._blocks(64, 256, 128)
    todo = [(k, scan | {"SOFTPLUS": True}, half, warps) for k in (triton_scan._forward, triton_scan._backward)]
    todo += [(k, edges, ssd_half, 4) for k in (triton_ssd._forward, triton_ssd._backward_x, triton_ssd._backward_B)]
    for kernel, constants, bfloat16, num_warps in todo:
        sizes = {"E", "T", "N", "nc", "Q", "H", "P", "G"} | {p.name for p in kernel.params if "_" in p.name}
        signature = {}
        for p in kernel.params:
            size = "i32" if p.name in sizes else "*bf16" if p.name in bfloat16 else "*fp32"
            signature[p.name] = "constexpr" if p.name in constants else {"mark": "*i8"}.get(p.name, size)
        source = ASTSource(kernel, signature, {(kernel.arg_names.index(k),): v for k, v in constants.items()})
        made = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": num_warps})
        assert made.asm["cubin"] and made.metadata.shared <= 101_376, made.metadata.shared  # of 30- and 40-series cards


if __name__ == "__main__":
    run_all()
