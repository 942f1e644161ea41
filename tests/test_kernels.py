"""Which implementation is chosen, which one a call reaches. Stand-ins for devices and packages that are not here."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nanochat import kernels as k
from nanochat import ops
from nanochat.blocks import BLOCKS, GPTConfig
from nanochat.config import UserError
from nanochat.gpt import GPT
from nanochat.kernels import choose, native, optional, triton_scan

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
OPS = ("attention", "conv", "scan", "ssd", "delta")
REFERENCES = ("causal_conv1d", "selective_scan", "selective_state_update", "ssd_scan", "gated_delta_rule")


def absent(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Replace CANDIDATES for cuda: all can run but the named, which say how to get them; `run` gives the name."""
    cuda = {
        op: [
            replace(
                one,
                run=lambda *args, name=one.name, **options: name,
                why_not=lambda device, dtype, name=one.name: f"{name} is absent: get {name}" if name in names else None,
            )
            for one in candidates
        ]
        for op, candidates in k.CANDIDATES["cuda"].items()
    }
    monkeypatch.setitem(k.CANDIDATES, "cuda", cuda)
    monkeypatch.setattr(k, "_torch_attention", lambda *args: "torch")
    for name in REFERENCES:
        monkeypatch.setattr(ops, name, lambda *args, **options: "ops")


@pytest.mark.parametrize("kernels", ["auto", "fast"])
def test_this_machine_gets_its_candidates_and_the_reason_names_them(kernels: str) -> None:
    why = native.available(CPU)
    if why is not None and kernels == "fast":
        pytest.skip(why)
    chosen = choose(kernels, CPU, ("attention", "conv", "scan", "attention"))
    scan = "scan native" if why is None else f"scan torch ({why})"
    assert chosen.reason == f"{kernels}: attention blocks, conv torch, {scan}"
    assert [one.name for one in chosen.chosen["attention"]] == ["blocks"]


def test_reference_chooses_nothing_and_another_word_is_refused() -> None:
    for device in (CPU, CUDA):
        chosen = choose("reference", device, OPS)
        assert not chosen.chosen and chosen.reason == "reference: nanochat.ops, as asked"
    with pytest.raises(UserError, match=r"kernels='quick': expected auto, fast, reference"):
        choose("quick", CPU)


def test_fast_without_the_native_scan_names_cause_and_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "rustbpe", None)
    message = r"kernels=fast: nothing for scan runs on cpu: rustbpe is not installed: bash .*; or set kernels=auto"
    with pytest.raises(UserError, match=message):
        choose("fast", CPU, ("scan",))
    assert "scan torch (rustbpe is not installed" in choose("auto", CPU, ("scan",)).reason
    assert choose("fast", CPU, ("attention",)).chosen["attention"]  # not asked for: not looked at


@pytest.mark.parametrize("op", OPS)
def test_fast_on_cuda_is_an_error_only_where_every_candidate_is_missing(
    monkeypatch: pytest.MonkeyPatch, op: str
) -> None:
    names = [one.name for one in k.CANDIDATES["cuda"][op]]
    absent(monkeypatch, *names)
    causes = "; ".join(f"{name} is absent: get {name}" for name in names)
    with pytest.raises(UserError, match=f"kernels=fast: nothing for {op} runs on cuda: {causes}; or set kernels=auto"):
        choose("fast", CUDA, (op,), torch.bfloat16)
    assert choose("auto", CUDA, (op,), torch.bfloat16).reason == f"auto: {op} torch ({causes})"
    for other in names:
        absent(monkeypatch, *(name for name in names if name != other))
        assert [one.name for one in choose("fast", CUDA, (op,), torch.bfloat16).chosen[op]] == [other]


def test_packages_that_are_not_installed_are_named_with_their_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(package: optional.Package, function: str = "") -> None:
        raise ImportError(f"No module named {package.module!r}")

    monkeypatch.setattr(optional.Package, "load", load)
    for op, package in (("conv", "causal-conv1d"), ("delta", "flash-linear-attention")):
        with pytest.raises(
            UserError, match=rf"nothing for {op} runs on cuda: .*No module named.*: pip install.*{package}"
        ):
            choose("fast", CUDA, (op,), torch.bfloat16)


def test_a_device_without_candidates_runs_torch_also_when_fast() -> None:
    assert choose("fast", torch.device("mps"), ("attention", "scan")).reason == "fast: attention torch, scan torch"


def test_float32_takes_nothing_that_multiplies_only_half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optional.Package, "available", lambda package, device: None)
    for one in ("attention flash_attn", "ssd mamba_ssm", "delta fla"):
        assert one in choose("auto", CUDA, OPS, torch.bfloat16).reason
    reason = choose("auto", CUDA, OPS, torch.float32).reason
    assert "attention flex (flash_attn multiplies bfloat16 or float16, not float32: use bfloat16)" in reason
    assert "scan mamba_ssm" in reason and "conv causal_conv1d" in reason and "delta torch (fla" in reason
    with pytest.raises(UserError, match=r"nothing for delta runs on cuda: fla multiplies .* not float32: use bfloat16"):
        choose("fast", CUDA, ("delta",), torch.float32)


def test_the_model_asks_for_its_blocks_operations_in_its_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {op for block in BLOCKS.values() for op in block.KERNELS} <= k.CANDIDATES["cuda"].keys()
    one = replace(k.CANDIDATES["cpu"]["attention"][0], why_not=lambda device, dtype: f"not in {dtype}")
    monkeypatch.setitem(k.CANDIDATES["cpu"], "attention", [one])
    model = GPT(GPTConfig(n_layer=2, d_model=32, vocab_size=8, block_pattern=["attn", "mamba2"]))
    monkeypatch.setattr(k.decode, "available", lambda device: "absent")
    reason = "auto: attention torch (not in torch.bfloat16), conv torch, ssd torch, decode torch (absent)"
    assert model.set_compute(torch.bfloat16) == reason


DOC, LENGTHS = torch.zeros(2, 6, dtype=torch.int), torch.tensor([3, 6])


def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def attention(K: int = 16, doc: Tensor | None = None, dtype: torch.dtype = torch.bfloat16) -> tuple:
    return tuple(zeros(2, 2, 6, K, dtype=dtype) for _ in range(3)), {"window": 0, "doc": doc, "memo": {}}


def scan(dtype: torch.dtype = torch.bfloat16, B: Tensor | None = None, **options: Any) -> tuple:
    u, B = zeros(2, 8, 6, dtype=dtype), zeros(2, 4, 6) if B is None else B
    return (u, u, zeros(8, 4), B, zeros(2, 4, 6)), options


def conv(E: int = 8, wider: int = 0, width: int = 4, dtype: torch.dtype = torch.bfloat16, **options: Any) -> tuple:
    return (zeros(2, 6, E + wider, dtype=dtype)[..., :E].transpose(1, 2), zeros(E, width)), options


def ssd(dtype: torch.dtype = torch.bfloat16, **options: Any) -> tuple:
    B = zeros(2, 6, 1, 4)
    return (zeros(2, 6, 2, 4, dtype=dtype), zeros(2, 6, 2), zeros(2), B, B), options


def delta(K: int = 16, dtype: torch.dtype = torch.bfloat16, **options: Any) -> tuple:
    q = zeros(2, 6, 2, K, dtype=dtype)
    return (q, q, q, zeros(2, 6, 2), zeros(2, 6, 2)), options


WIDE = torch.float32
CALLS = {  # method -> (call, who serves it where everything is installed, who if the first is not)
    "self_attention": [
        (attention(), "flash_attn", "torch"),
        (attention(doc=DOC), "flash_attn", "flex"),
        (attention(K=512, doc=DOC), "flex", "flex"),
        (attention(dtype=WIDE), "torch", "torch"),
        (attention(K=8, doc=DOC, dtype=WIDE), "torch", "torch"),
    ],
    "selective_scan": [
        (scan(), "mamba_ssm", "triton"),
        (scan(seq_idx=DOC), "triton", "triton"),
        (scan(lengths=LENGTHS), "triton", "triton"),
        (scan(initial_state=zeros(2, 8, 4)), "triton", "triton"),
        (scan(return_last_state=True), "triton", "triton"),
        (scan(torch.float64), "ops", "ops"),
        (scan(B=zeros(8, 4)), "ops", "ops"),
    ],
    "selective_state_update": [((), "ops", "ops")],
    "causal_conv1d": [
        (conv(), "causal_conv1d", "ops"),
        (conv(seq_idx=DOC), "causal_conv1d", "ops"),
        (conv(return_final_states=True), "causal_conv1d", "ops"),
        (conv(initial_states=zeros(2, 3, 8).transpose(1, 2)), "causal_conv1d", "ops"),
        (conv(initial_states=zeros(2, 8, 3)), "ops", "ops"),
        (conv(seq_idx=DOC, return_final_states=True), "ops", "ops"),
        (conv(lengths=LENGTHS), "ops", "ops"),
        (conv(width=5), "ops", "ops"),
        (conv(E=12), "ops", "ops"),
        (conv(wider=8), "causal_conv1d", "ops"),
        (conv(wider=1), "ops", "ops"),
        (conv(dtype=torch.float64), "ops", "ops"),
    ],
    "ssd_scan": [
        (ssd(seq_idx=DOC, lengths=LENGTHS, chunk_size=64), "mamba_ssm", "triton"),
        (ssd(chunk_size=48), "triton", "triton"),
        (ssd(WIDE), "triton", "triton"),
        (ssd(torch.float64), "ops", "ops"),
    ],
    "gated_delta_rule": [
        (delta(chunk_size=64, seq_idx=DOC), "fla", "ops"),
        (delta(K=512), "ops", "ops"),
        (delta(dtype=WIDE), "ops", "ops"),
    ],
}


@pytest.mark.parametrize("method", CALLS)
def test_a_call_reaches_the_first_implementation_that_serves_it(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    for missing, column in (((), 1), (("flash_attn", "mamba_ssm", "causal_conv1d", "fla"), 2)):
        absent(monkeypatch, *missing)
        chosen = choose("auto", CUDA, OPS, torch.bfloat16)
        for row in CALLS[method]:
            args, options = row[0] or ((), {})
            assert getattr(chosen, method)(*args, **options) == row[column], (missing, row[1:], options.keys())


def test_a_last_state_without_gradient_goes_to_mamba_ssm(monkeypatch: pytest.MonkeyPatch) -> None:
    absent(monkeypatch)
    args, options = scan(return_last_state=True)
    with torch.no_grad():
        assert choose("auto", CUDA, OPS, torch.bfloat16).selective_scan(*args, **options) == "mamba_ssm"


def test_fla_is_called_without_a_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(optional, "gated_delta_rule", lambda *args, **options: seen.append((len(args), options)))
    monkeypatch.setattr(optional.Package, "available", lambda package, device: None)
    args, options = delta(chunk_size=64, scale=0.5, seq_idx=DOC)
    choose("fast", CUDA, ("delta",), torch.bfloat16).gated_delta_rule(*args, **options)
    assert seen == [(8, {"seq_idx": DOC})]


def test_reason_shows_the_order_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    absent(monkeypatch, "flash_attn")
    reason = choose("auto", CUDA, ("scan", "attention"), torch.bfloat16).reason
    assert reason == "auto: scan mamba_ssm else triton, attention flex (flash_attn is absent: get flash_attn)"


@pytest.mark.skipif(native.available(CPU) is not None, reason="the native scan is not built")
def test_the_native_scan_leaves_other_shapes_of_B_to_ops() -> None:
    torch.manual_seed(0)
    u, A, B, C = torch.randn(2, 8, 6), -torch.rand(8, 4), torch.randn(8, 4), torch.randn(2, 4, 6)
    chosen = choose("fast", CPU, ("scan",))
    torch.testing.assert_close(chosen.selective_scan(u, u, A, B, C), ops.selective_scan(u, u, A, B, C))
    assert chosen.chosen["scan"][0].step is native.selective_state_update


def test_block_attention_serves_training_only_and_agrees_with_torch() -> None:
    torch.manual_seed(0)
    q, key, v = (torch.randn(2, n, 12, 8) for n in (4, 2, 2))
    doc = torch.tensor([[0] * 5 + [1] * 7, [0] * 12])
    auto, reference = choose("auto", CPU), choose("reference", CPU)
    for window in (0, 3):
        memo: dict = {}
        want = reference.self_attention(q, key, v, window, doc, {})
        torch.testing.assert_close(auto.self_attention(q, key, v, window, doc, memo), want)
        with torch.no_grad():
            torch.testing.assert_close(auto.self_attention(q, key, v, window, doc, memo), want)
        assert {("blocks", window), ("mask", window)} == memo.keys()


def test_flex_attention_is_compiled_with_the_model_as_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.testing import CompileCounter  # the compiler, which takes seconds to import

    flex = next(one for one in k.CANDIDATES["cuda"]["attention"] if one.name == "flex")
    here = replace(flex, why_not=lambda device, dtype: flex.why_not(CUDA, dtype))  # which imports it
    monkeypatch.setitem(k.CANDIDATES["cpu"], "attention", [here])
    model = GPT(GPTConfig(n_layer=3, d_model=32, n_head=2, vocab_size=8, window_pattern="SL"))
    model.init_weights()
    for p in model.parameters():  # of which zeros would hide what attention gives
        torch.nn.init.normal_(p, std=0.1)
    ids = torch.arange(128).view(2, 64) % 8  # more rows than decoding kernels take
    with torch.no_grad():
        docs = [(torch.arange(128).view(2, 64) * n // 128).int() for n in (5, 6, 7)]
        want = [model(ids, doc=doc) for doc in docs]
        assert "attention flex" in model.set_compute(torch.float32)
        counter = CompileCounter()
        compiled = torch.compile(model, backend=counter, dynamic=False, fullgraph=True)
        for doc, logits in zip(docs, want, strict=True):
            torch.testing.assert_close(compiled(ids, doc=doc), logits)
    assert counter.frame_count == 1


def test_our_triton_kernels_are_refused_on_a_cpu_without_the_interpreter() -> None:
    if triton_scan.triton is None:
        pytest.skip("triton is not installed")
    assert "need a cuda device, got cpu" in (triton_scan.available(CPU) or "")
