import json
import math

import pytest
import torch

from nanochat.config import UserError
from scripts import bench_ops
from scripts.peer_layers import PEERS

TINY = [
    "--d_models=128",
    "--lengths=16,32,64",
    "--tokens=32",
    "--repeats=2",
    "--seconds=60",
    "--contexts=8,32",
    "--decode_batch=2",
]


def run(base, *more: str) -> dict:
    threads = torch.get_num_threads()
    try:
        bench_ops.main([*TINY, *more])
    finally:
        torch.set_num_threads(threads)
    return json.loads((base / "bench" / "ops.json").read_text())


def test_a_run_measures_every_layer_of_ours(base, capsys):
    result = run(base, "--peers=none")
    rows = {(r["layer"], r["length"]): r for r in result["rows"]}
    assert set(rows) == {(name, n) for name in bench_ops.OURS for n in (16, 32, 64)}
    assert [rows["attn", n]["batch"] for n in (16, 32, 64)] == [2, 1, 1]
    assert all(r["calls"] == 2 and r["ms"] > 0 for r in rows.values())
    assert rows["mamba torch", 16]["kernels"].startswith("reference")
    r = rows["mamba", 16]
    assert r["tokens_per_s"] == pytest.approx(32 / r["ms"] * 1e3)
    assert result["n_params"]["128"]["attn"] == 4 * 128 * 128
    assert result["n_params"]["128"]["mlp"] == 8 * 128 * 128
    assert result["ratios"] == []
    assert {r["layer"]: list(r["factor"]) for r in result["growth"]} == {name: ["64"] for name in bench_ops.OURS}
    assert {(r["layer"], r["n"]) for r in result["crossovers"]} == {
        (name, n) for name in ("mamba", "mamba torch", "mamba2", "gdn") for n in (1, 2)
    }
    steps = {(r["layer"], r["context"]): r for r in result["decode"]}
    assert set(steps) == {(name, n) for name in bench_ops.OURS if name != "mlp" for n in (8, 32)}
    assert steps["attn", 32]["state_bytes"] == 4 * steps["attn", 8]["state_bytes"]
    assert steps["mamba", 32]["state_bytes"] == steps["mamba", 8]["state_bytes"]
    assert (base / "bench" / "ops.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "d_model 128, two mamba against attn + mlp" in out


def test_bfloat16_reaches_the_layers(base):
    result = run(base, "--peers=none", "--layers=attn", "--dtype=bfloat16", "--contexts=8")
    assert result["config"]["dtype"] == "bfloat16"
    assert bench_ops.our_layer("attn", 128, torch.bfloat16).module.attn.c_q.compute_dtype == torch.bfloat16


def test_no_matrix_of_a_layer_is_zero():
    layer = bench_ops.our_layer("attn", 128, torch.float32)
    assert all(p.any() for p in layer.module.parameters())


def test_crossing_lies_between_two_lengths_on_log_axes():
    assert bench_ops.crossing({256: 2.0, 512: 0.5}) == pytest.approx(math.sqrt(256 * 512))
    assert bench_ops.crossing({256: 2.0, 512: 1.5}) is None
    assert bench_ops.crossing({256: 0.9, 512: 0.5}) == 256


def test_ratios_and_growth_come_from_rows_of_equal_size():
    def row(layer, kind, length, batch, ms):
        ours = layer in bench_ops.OURS
        return {"layer": layer, "kind": kind, "ours": ours, "d_model": 64, "length": length, "batch": batch, "ms": ms}

    rows = [row("mamba", "mamba", 32, 2, 5.0), row("mamba", "mamba", 64, 1, 10.0), row("mamba", "mamba", 128, 1, 22.0)]
    rows += [row("mambapy", "mamba", 64, 1, 40.0)]
    assert bench_ops.ratios(rows) == [{"layer": "mamba", "peer": "mambapy", "d_model": 64, "times_faster": {64: 4.0}}]
    assert bench_ops.growth(rows) == [{"layer": "mamba", "d_model": 64, "factor": {128: 2.2}}]


def test_a_peer_that_is_named_and_missing_is_an_error(base, monkeypatch, capsys):
    monkeypatch.setattr(bench_ops, "find_spec", lambda name: None)
    for given in ("--peers=all", "--peers=mambapy"):
        with pytest.raises(UserError, match=r"peers=.*mambapy.*--install_peers"):
            bench_ops.main([*TINY, given])
    assert run(base, "--layers=mlp")["ratios"] == []
    assert "left out, not installed (see --install_peers): mambapy, transformers, mamba-ssm" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--layers=lstm", "--peers=fla", "--lengths=100", "--repeats=0", "--dtype=float64"])
def test_bad_flags_stop_before_any_work(flag):
    with pytest.raises(UserError, match=flag.lstrip("-").split("=")[0]):
        bench_ops.main([flag])


@pytest.mark.slow
def test_peers_have_our_sizes_and_run(base):
    installed = bench_ops.find_peers(bench_ops.BenchOpsConfig())
    if not installed:
        pytest.skip("no peer is installed: python -m scripts.bench_ops --install_peers")
    result = run(base)
    sizes = result["n_params"]["128"]
    for name in installed:
        assert sizes[name] == pytest.approx(sizes[PEERS[name].kind], rel=0.01)
    assert {r["peer"] for r in result["ratios"]} == set(installed)
    assert all(x > 0 for r in result["ratios"] for x in r["times_faster"].values())
