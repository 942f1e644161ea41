"""bench_arch from end to end on a made-up dataset; what its tables say; its errors."""

import json
import random
from pathlib import Path

import pytest

from nanochat.common import write_json
from nanochat.config import UserError
from nanochat.shards import write_shard
from nanochat.tokenizer import Tokenizer
from scripts import bench_arch, bench_arch_report
from scripts.bench_arch import BenchArchConfig, read_argv, toy_blocks
from scripts.bench_arch_report import best_runs, compact, crossover, crossovers, tables

CONFIG = """depth = 2
d_model = 32
head_dim = 16
max_seq_len = 32
softcap = 0.0
device_batch_size = 2
total_batch_size = 128
device = "cpu"
dtype = "float32"
"""
SMALL = [
    "--eval_tokens=256", "--amount=1024", "--lrs=0.01,0.02", "--seeds=2", "--lengths=16,64", "--batches=1,2",
    "--decode_steps=2", "--toy_steps=2", "--needle_lens=8,12", "--toy_lrs=0.02", "--workers=1",
]  # fmt: skip
TOY_ROWS = [
    {"arch": a, "blocks": "2*attn", "lr": 0.1, "seed": 0, "steps": 9, "seconds": 1.0} for a in ("full", "window")
]
TOY_ROWS = [{**row, "accuracy": {"32": 0.5}} for row in TOY_ROWS]


@pytest.fixture
def configs(tmp_path: Path) -> list[str]:
    """Two architectures of attention: full, and with a window."""
    (tmp_path / "full.py").write_text(CONFIG)
    (tmp_path / "window.py").write_text(CONFIG + 'window_pattern = "SL"\nwindow = 8\n')
    return [str(tmp_path / "full.py"), str(tmp_path / "window.py")]


@pytest.fixture
def text(base: Path) -> Path:
    """A base folder with a few documents and a small tokenizer."""
    rng = random.Random(0)
    words = ["river", "town", "stone", "bridge", "north", "of", "the", "a", "1987", "founded", "is", "was", "."]
    docs = [" ".join(rng.choices(words, k=rng.randint(5, 120))) for _ in range(60)]
    for i in range(3):
        write_shard(base / "base_data" / f"shard_{i:05d}.parquet", docs[i * 20 : (i + 1) * 20], "test")
    Tokenizer.train(iter(docs), 320).save(base / "tokenizer")
    return base


def test_every_part_is_measured_written_and_reported(
    text: Path, configs: list[str], capsys: pytest.CaptureFixture
) -> None:
    bench_arch.main([*configs, *SMALL])
    results = json.loads((text / "bench" / "arch.json").read_text())
    parts = results["parts"]
    assert list(results["architectures"]) == ["full", "window"] and list(parts) == list(bench_arch.PARTS)
    train = parts["train"]["rows"]
    assert [(r["arch"], r["lr"]) for r in train[:2]] == [("full", 0.01), ("full", 0.02)] and len(train) == 6
    assert all(r["tokens"] == 1024 and 0 < r["bpb"] < 8 and r["tokens_per_s"] > 0 for r in train)
    assert [len({r["seed"] for r in best_runs([r for r in train if r["arch"] == a])}) for a in ("full", "window")] == [
        2,
        2,
    ]
    cells = {(r["arch"], r["length"]): r for r in parts["length"]["rows"]}
    assert all(r["prefill_ms"] > 0 and r["decode_ms_1"] > 0 and r["decode_ms_2"] > 0 for r in cells.values())
    assert cells["full", 16]["state_bytes"] == 2 * 2 * 16 * 32 * 4  # layers, keys and values, tokens, width, float32
    assert cells["window", 64]["state_bytes"] == 2 * (8 + 64) * 32 * 4
    for part, lengths in (("recall", {"64"}), ("needle", {"8", "12"})):
        assert all(set(r["accuracy"]) == lengths and r["blocks"] == "2*attn" for r in parts[part]["rows"])
    assert all({"command", "git", "machine", "torch", "wall_s"} <= set(p) for p in parts.values())
    for part in parts:
        assert (text / "bench" / f"arch_{part}.png").stat().st_size > 5000
    section = json.loads((text / "report" / "architectures.json").read_text())
    assert section["text"] == tables(results) and section["text"] in capsys.readouterr().out
    assert section["metrics"]["full: stream bpb"] > 0 and len(section["plots"]) == 4


def test_one_part_anew_keeps_the_others_of_the_same_architectures_only(
    base: Path, configs: list[str], capsys: pytest.CaptureFixture
) -> None:
    options = [*SMALL, "--vocab_size=50", "--batches=1"]
    path = base / "bench" / "arch.json"
    bench_arch.main([*configs, *options, "--parts=length"])
    before = json.loads(path.read_text())
    kept = bench_arch.earlier(path, before["architectures"])
    assert kept == before["parts"]
    assert bench_arch.earlier(path, {"other": {}}) == {} and "will be overwritten" in capsys.readouterr().out
    assert bench_arch.earlier(base / "none.json", {}) == {}
    write_json(path, {**before, "parts": {**kept, "recall": {**kept["length"], "rows": TOY_ROWS}}})
    bench_arch.main([*configs, *options, "--parts=length", "--lengths=8"])
    after = json.loads(path.read_text())["parts"]
    assert [r["length"] for r in after["length"]["rows"]] == [8, 8] and after["recall"]["rows"] == TOY_ROWS
    bench_arch_report.main([])
    assert "accuracy at 32" in capsys.readouterr().out


@pytest.mark.parametrize(("budget", "amount"), [("flops", 3e8), ("seconds", 0.05)])
def test_a_budget_is_met_by_the_first_step_that_reaches_it(
    text: Path, configs: list[str], budget: str, amount: float
) -> None:
    options = ["--parts=train", "--lrs=0.02", "--seeds=1", f"--budget={budget}", f"--amount={amount}"]
    bench_arch.main([configs[0], *SMALL, *options])
    (row,) = json.loads((text / "bench" / "arch.json").read_text())["parts"]["train"]["rows"]
    steps = row["tokens"] / 128
    assert amount <= row[budget] and (budget == "seconds" or row[budget] < amount * (1 + 1 / (steps - 1)))


def test_a_run_that_diverges_is_reported_as_such(text: Path, configs: list[str], capsys: pytest.CaptureFixture) -> None:
    bench_arch.main([configs[0], *SMALL, "--parts=train", "--lrs=1e38", "--seeds=1", "--grad_clip=0"])
    (row,) = json.loads((text / "bench" / "arch.json").read_text())["parts"]["train"]["rows"]
    assert row["bpb"] is None and "all diverged" in capsys.readouterr().out


def test_contexts_that_take_too_long_are_left_out_and_named(
    base: Path, configs: list[str], capsys: pytest.CaptureFixture
) -> None:
    bench_arch.main([configs[0], *SMALL, "--parts=length", "--vocab_size=50", "--cell_seconds=1e-6"])  # needs no data
    rows = json.loads((base / "bench" / "arch.json").read_text())["parts"]["length"]["rows"]
    assert all("passed 1e-06 s" in r["left_out"] for r in rows)
    assert "full at 64: prefill of 16 tokens passed 1e-06 s" in capsys.readouterr().out


@pytest.mark.slow
def test_toy_models_train_in_processes_too(base: Path, configs: list[str]) -> None:
    bench_arch.main([*configs, *SMALL, "--parts=recall", "--seeds=1", "--workers=2"])
    rows = json.loads((base / "bench" / "arch.json").read_text())["parts"]["recall"]["rows"]
    assert [r["arch"] for r in rows] == ["full", "window"] and rows[0]["accuracy"] == rows[1]["accuracy"]


def test_a_crossover_is_where_the_curves_meet_in_log_log() -> None:
    first = {n: n / 100 for n in (256, 1024, 4096, 16384)}
    assert crossover(first, dict.fromkeys(first, 20.0)) == pytest.approx(2000)
    assert crossover(first, dict.fromkeys(first, 1.0)) == 256
    assert crossover(first, dict.fromkeys(first, 200.0)) is None
    assert crossover(first, {256: 1.0, 1024: 100.0, 4096: 1.0}) == pytest.approx(1735, rel=1e-3)  # the last one counts
    assert crossover(first, {}) is None


def test_crossovers_are_told_in_words() -> None:
    def rows(arch: str, *values: float) -> list[dict]:
        return [{"arch": arch, "length": n, "prefill_ms": v} for n, v in zip((256, 1024), values, strict=False)]

    found = crossovers(
        [*rows("a", 1, 4), *rows("b", 2, 2), *rows("c", 9, 9), *rows("d", 0.5, 1), *rows("e")], "prefill_ms"
    )
    assert found["b"] == ("512", pytest.approx(512)) and found["c"] == ("none up to 1,024", None)
    assert found["d"] == ("cheaper from 256 on", 256) and "e" not in found


def test_blocks_are_named_shortly_and_toys_take_their_kinds() -> None:
    assert compact(["mamba", "mamba", "attn"]) == "2*mamba+attn"
    toys = {
        None: ["attn", "attn"],
        "M": ["mamba", "mamba"],
        "3*mamba2+attn": ["mamba2", "attn"],
        "TM": ["mamba", "attn"],
    }
    for pattern, expected in toys.items():
        assert toy_blocks(BenchArchConfig(depth=4, block_pattern=pattern)) == expected
    assert toy_blocks(BenchArchConfig(depth=4, block_pattern="M-G-")) == ["mamba2", "gdn"]


def test_keys_hold_for_all_files_and_each_file_is_an_architecture(configs: list[str]) -> None:
    cfg, archs = read_argv([configs[0], "--lrs=0.3", configs[1], "--depth=3"])
    assert cfg.numbers("lrs") == [0.3] and {n: a.depth for n, a in archs.items()} == {"full": 3, "window": 3}
    assert archs["window"].window == 8 and archs["full"].window == 0
    assert "tiny_transformer" in read_argv([])[1]


def test_errors_say_what_to_type(base: Path, configs: list[str], tmp_path: Path) -> None:
    def refused(*argv: str) -> str:
        with pytest.raises(UserError) as e:
            bench_arch.main([*SMALL, *argv])
        return str(e.value)

    assert "did you mean" in refused(configs[0].replace("full", "ful"))
    assert "parts=speed: expected some of train,length,recall,needle" in refused("--parts=speed")
    assert "lengths=['none']: expected numbers above 0" in refused(configs[0], "--parts=length", "--lengths=none")
    other = tmp_path / "b" / "full.py"
    other.parent.mkdir()
    other.write_text(CONFIG + "max_seq_len = 64\n")
    assert "two config files have one name" in refused(configs[0], str(other))
    assert "give one for all, --max_seq_len=32" in refused(configs[1], str(other), "--parts=train")
    assert "tokenizer" in refused(configs[0], "--parts=train")  # nothing is trained yet
    with pytest.raises(UserError, match=r"results of bench_arch .* does not exist"):
        bench_arch_report.main([])
