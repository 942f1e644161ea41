"""bench_context from end to end on tiny models; that its limits are limits; its errors."""

import dataclasses
import json
from pathlib import Path

import pytest

from nanochat.checkpoint import checkpoint_dir, save_checkpoint
from nanochat.common import read_json
from nanochat.config import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import Tokenizer
from scripts import bench_context
from scripts.bench_context import GIB, MATRIX_BYTES, BenchContextConfig, plan

CONFIG = """depth = 2
d_model = 32
head_dim = 16
max_seq_len = 64
"""
QUICK = [
    "--doc_tokens=20",
    "--question_tokens=16",
    "--answer_tokens=3",
    "--repeats=2",
    "--device=cpu",
    "--dtype=float32",
]


def config(folder: Path, name: str, pattern: str, length: int = 64) -> str:
    path = folder / f"{name}.py"
    path.write_text(f"{CONFIG}block_pattern = {pattern!r}\nmax_seq_len = {length}\n")
    return str(path)


def test_configs_and_checkpoints_are_measured_planned_and_written(base: Path, tmp_path: Path, capsys) -> None:
    tokenizer = Tokenizer.train(["the river runs to the sea " * 30], 300)
    tokenizer.save(base / "tokenizer")
    model = GPT(GPTConfig(2, ["mamba"], 32, 2, vocab_size=tokenizer.vocab_size, seq_len=64))
    model.init_weights(0)
    meta = {"model_config": dataclasses.asdict(model.config), "tokenizer_hash": tokenizer.hash}
    save_checkpoint(checkpoint_dir("sft", "m"), 3, model=model.state_dict(), optim=None, state={}, meta=meta)
    files = [config(tmp_path, "full", "T")]
    given = [*files, "--checkpoints=sft:m", "--documents=4,1", f"--plan={files[0]},mamba_d20", *QUICK]
    bench_context.main(given)
    out = capsys.readouterr().out
    found = read_json(base / "bench" / "context.json")
    assert (base / "bench" / "context.png").stat().st_size > 10_000
    cells = {(r["backbone"], r["documents"]): r for r in found["rows"]}
    assert list(cells) == [("full", 1), ("sft:m", 1), ("full", 4), ("sft:m", 4)]
    assert [r["prompt_tokens"] for r in cells.values()] == [36, 36, 96, 96]
    # keys and values of 2 layers, 32 wide, in 2 bytes here and 4 where the residual stream is float32
    assert [cells["full", n]["state_bytes"] for n in (1, 4)] == [2 * 2 * 32 * 2 * n for n in (39, 99)]
    assert cells["full", 4]["state_bytes_here"] == 2 * cells["full", 4]["state_bytes"]
    assert cells["sft:m", 1]["state_bytes"] == cells["sft:m", 4]["state_bytes"]
    assert all(r["ttft_ms"] > 0 and r["answer_ms"] > 0 and r["parameters"]["total"] > 0 for r in cells.values())
    assert "| full     | 4 " in out and "20 mamba" in out and len(found["plan"]) == 4
    assert found["vocab_size"] == tokenizer.vocab_size and found["config"]["documents"] == ["4", "1"]


def test_the_plan_fits_and_one_document_more_does_not(tmp_path: Path) -> None:
    for pattern in ("T", "M", "M,T"):
        name = config(tmp_path, "x", pattern)
        for memory in (0.02, 0.2):
            cfg = BenchContextConfig(memory_gb=memory, reserve_gb=0.01, rows=[1, 7])
            for row in plan(cfg, name, 500):
                model = GPT(
                    dataclasses.replace(
                        bench_context.load_config(bench_context.BaseTrainConfig, [name]).gpt_config(500)
                    )
                )

                def used(n: int, row: dict = row, model: GPT = model, cfg: BenchContextConfig = cfg) -> int:
                    T = cfg.context(n)
                    return row["weight_bytes"] + row["rows"] * model.state_bytes(T) + T * row["reading_bytes"]

                room = (memory - 0.01) * GIB
                assert used(row["fits"]) <= room < used(row["fits"] + 1)
                assert row["weight_bytes"] <= MATRIX_BYTES * sum(p.numel() for p in model.parameters())


def test_what_grows_limits_attention_first(tmp_path: Path) -> None:
    cfg = BenchContextConfig(memory_gb=1.0, reserve_gb=0.1, rows=[32])
    patterns = {"full": "T", "mixed": "M,T", "mamba": "M"}
    rows = {name: plan(cfg, config(tmp_path, name, p, 2048), 500)[0] for name, p in patterns.items()}
    assert rows["full"]["fits"] < rows["mixed"]["fits"] < rows["mamba"]["fits"]
    assert rows["mamba"]["state_bytes_document"] == 0
    assert {r["trained_documents"] for r in rows.values()} == {(2048 - 64) // 128}


def test_nothing_fits_a_model_larger_than_the_memory(capsys, base: Path) -> None:
    bench_context.main(["--documents=none", "--plan=transformer_d20", "--memory_gb=2", "--reserve_gb=0", "--rows=1"])
    [row] = json.loads((base / "bench" / "context.json").read_text())["plan"]
    assert row["fits"] == -1 and "| 0 " in capsys.readouterr().out and row["parameters"] == 560988160
    assert not (base / "bench" / "context.png").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--documents=3,x"], "documents=3,x: expected numbers above 0"),
        (["--rows=0"], "rows=0"),
        (["--checkpoints=none:x"], "checkpoints=none:x: expected stage or stage:tag"),
        (["--memory_gb=1"], "nothing is left for a model"),
        (["--plan=transformer_d21"], "did you mean .*transformer_d20"),
        (["--doc_tokens=0"], "at least 1"),
        (["configs/tiny_mamba.py", "configs/tiny_mamba.py", "--plan=none"], "two backbones have one name"),
    ],
)
def test_mistakes_are_named(base: Path, flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        bench_context.main(flags)
