"""bench_claims: ratios, verdicts, the page of made-up results, a tiny run of two parts, its errors."""

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest

from nanochat.common import REPO_DIR, write_json
from nanochat.config import UserError
from nanochat.rag_eval import Prediction, Question
from nanochat.retrieval.metrics import mean_interval
from nanochat.shards import write_shard
from nanochat.tokenizer import Tokenizer
from scripts import bench_claims
from scripts.bench_claims_report import judged, page, read_results
from scripts.bench_claims_verdict import CLAIMS, T975, Point, Ratio, level, paired_ratio, question_ratio, verdict

CONFIG = """depth = 2
d_model = 64
head_dim = 32
max_seq_len = 32
softcap = 0.0
device_batch_size = 2
total_batch_size = 128
dtype = "float32"
"""
TINY = [
    "--seeds=2", "--lrs=0.02", "--train_tokens=256", "--eval_tokens=128", "--decode_lengths=16,64",
    "--state_lengths=32,1024", "--device=cpu", "--dtype=float32", "--workers=1",
]  # fmt: skip
MADE_UP = "python -m scripts.bench_claims --made-up-by-a-test"


# ---- ratios ----


def test_a_ratio_is_turned_so_that_above_one_speaks_for_the_claim() -> None:
    assert paired_ratio([10.0], [20.0], "higher").value == pytest.approx(2)
    assert paired_ratio([10.0], [20.0], "lower").value == pytest.approx(0.5)
    assert paired_ratio([10.0], [20.0], "lower").low is None  # one run has no interval
    same = paired_ratio([1.0, 2.0, 3.0], [2.0, 4.0, 6.0], "higher")  # pairs: what all share drops out
    assert (same.low, same.high) == (pytest.approx(2), pytest.approx(2))


def test_the_interval_is_students_t_over_logarithms() -> None:
    stats = pytest.importorskip("scipy.stats")
    first, other = [3.0, 4.0, 5.0, 4.5], [6.0, 7.0, 11.0, 8.0]
    logs = [math.log(b / a) for a, b in zip(first, other, strict=True)]
    low, high = stats.t.interval(0.95, 3, loc=sum(logs) / 4, scale=stats.sem(logs))
    found = paired_ratio(first, other, "higher")
    assert (found.low, found.high) == (pytest.approx(math.exp(low), rel=1e-3), pytest.approx(math.exp(high), rel=1e-3))
    assert [stats.t.ppf(0.975, n) for n in range(1, 11)] == pytest.approx(T975, abs=1e-3)


def test_shares_of_questions_are_compared_by_a_paired_bootstrap() -> None:
    rng = random.Random(0)
    first = [float(rng.random() < 0.2) for _ in range(400)]
    other = [max(a, float(rng.random() < 0.5)) for a in first]
    found = question_ratio(first, other, "higher")
    assert found.value == pytest.approx(sum(other) / sum(first), rel=0.02)
    _, low, high = mean_interval([b - a for a, b in zip(first, other, strict=True)])  # of the difference
    base = sum(first) / 400
    assert found.low is not None and found.high is not None
    assert 1 < found.low < 1 + high / base and found.high > 1 + low / base
    assert question_ratio(first, first, "lower") == Ratio(1.0, 1.0, 1.0)
    assert question_ratio([0.0] * 9, [1.0] * 9, "higher").value == 19  # none right still gives a number


# ---- verdicts ----


def points(*ratios: tuple[float, float]) -> list[Point]:
    """At 512, 1,024, ... tokens."""
    return [Point(512 * 2**i, Ratio((a + b) / 2, a, b)) for i, (a, b) in enumerate(ratios)]


@pytest.mark.parametrize(
    ("interval", "stated", "expected"),
    [
        ((0.5, 0.9), 1, 0), ((0.9, 1.1), 1, 1), ((1.0, 1.2), 1, 1), ((1.1, 1.2), 1, 3), ((1.1, 1.2), 3, 2),
        ((1.1, 3.5), 3, 2), ((3.0, 3.5), 3, 3), ((0.9, 9.0), 3, 1), ((1.0, 1.0), 1, 1),
    ],
)  # fmt: skip
def test_an_interval_that_includes_one_is_no_difference(interval: tuple, stated: float, expected: int) -> None:
    assert level(Ratio(1.0, *interval), stated) == expected


@pytest.mark.parametrize(
    ("curve", "stated", "word", "text"),
    [
        ([], 1, "not measured", "not measured"),
        ([(1.1, 1.2)], 1, "holds", "holds at 512 tokens"),
        ([(1.1, 1.2), (2, 3)], 1, "holds", "holds from 512 tokens on, everywhere measured"),
        ([(0.5, 0.6), (0.9, 1.1), (1.2, 1.3), (2, 3)], 1, "holds", "holds from 2,048 tokens on"),
        ([(2, 3), (0.9, 1.1), (2, 3)], 1, "holds", "holds at 2,048 tokens"),
        ([(0.5, 0.6), (0.7, 0.8)], 1, "does not hold", "does not hold from 512 tokens on, everywhere measured"),
        ([(1.2, 1.3), (0.7, 0.8)], 1, "does not hold", "does not hold at 1,024 tokens (but better at 512)"),
        ([(0.5, 0.6), (0.9, 1.1)], 1, "no difference seen", "no difference seen at 1,024 tokens"),
        ([(0.9, 1.1), (1.5, 2.0)], 3, "better, but less than stated", "better, but less than stated at 1,024 tokens"),
        ([(1.5, 4.0)], 3, "better, but less than stated", "better, 3.00x neither shown nor excluded at 512 tokens"),
        ([(3.1, 4.0), (1.5, 2.0)], 3, "better, but less than stated",
         "better, but less than stated from 512 tokens on, everywhere measured (as stated at 512)"),
    ],
)  # fmt: skip
def test_a_verdict_says_from_which_length_on(curve: list, stated: float, word: str, text: str) -> None:
    found = verdict(points(*curve), stated, "tokens")
    assert (found.word, found.text) == (word, text)


def test_one_run_is_not_judged() -> None:
    assert verdict([Point(512, Ratio(9.0, None, None))], 1, "tokens").word == "one run"
    assert verdict([Point(0, Ratio(2.0, 1.5, 2.5))], 1, "").text == "holds"


# ---- the page ----


def made_up(part: str, where: str, stacks: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A result file that no machine wrote."""
    machine = {"cpu": "Made-up CPU", "cores": 3, "date": "1999-12-31T00:00:00"}
    return {
        "part": part, "where": where, "gpu": "Made-up GPU" if where == "GPU" else "", "machine": machine,
        "device": "made up", "git": {"commit": "0000000"}, "command": MADE_UP, "versions": {"torch": "0.0"},
        "stacks": stacks, "notes": ["a made-up note."], "rows": rows,
    }  # fmt: skip


def stack(kind: str, group: str = "", match: str = "") -> dict[str, str]:
    return {"kind": kind, "blocks": f"9*{kind}", "match": match, "group": group}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    stacks = {"t": stack("attn"), "m": stack("mamba", match="parameters"), "f": stack("mamba", match="FLOPs")}
    speeds = {("t", 512): 100, ("t", 8192): 20, ("m", 512): 90, ("m", 8192): 100, ("f", 512): 400, ("f", 8192): 300}
    rows = [
        {
            "arch": a,
            "length": n,
            "repeat": i,
            "tokens_per_s": v + (i if a == "t" else 2 * i) * v / 100,
            "peak_bytes": None,
        }
        for (a, n), v in speeds.items()
        for i in range(3)
    ]
    write_json(tmp_path / "length_cpu.json", made_up("length", "CPU", stacks, rows))
    planned = {"pt": stack("attn", "planned"), "pm": stack("mamba", "planned")}
    state = [{"arch": a, "length": n, "state_bytes": b} for a, n, b in (("t", 32768, 2**25), ("m", 32768, 2**15))]
    state += [{"arch": a, "length": 32768, "state_bytes": b} for a, b in (("pt", 2**30), ("pm", 2**19))]
    write_json(tmp_path / "memory_cuda.json", made_up("memory", "GPU", {**stacks, **planned}, state))
    right = {"closed_book": [1.0] * 10 + [0.0] * 90, "rag": [1.0] * 50 + [0.0] * 50}
    outcomes = {"accuracy": right, "hallucination": right, "hallucination_equal": right}
    rag = [{"arch": "rag_x", "questions": 100, "values": outcomes}]
    write_json(tmp_path / "rag_cpu.json", made_up("rag", "CPU", {"rag_x": stack("rag", "x")}, rag))
    return tmp_path


def section(text: str, id: str) -> str:
    return text.split(f"\n## {id}\n")[1].split("\n## ")[0]


def test_the_page_says_what_holds_from_where_and_what_was_not_measured(folder: Path) -> None:
    text = page(read_results(folder))
    speed = section(text, "training_speed")
    rows = {
        line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]]
        for line in speed.splitlines()
        if "|" in line
    }
    assert rows["Transformer (9*attn), tokens/s"][:2] == ["101", "20.2"]
    ratios = rows["Mamba (9*mamba), equal parameters"]
    assert (
        ratios[0].startswith("0.909x [0.8") and ratios[1].startswith("5.05x [") and ratios[2] == "holds at 8,192 tokens"
    )
    assert rows["Mamba (9*mamba), equal FLOPs"][2] == "holds from 512 tokens on, everywhere measured"
    measured = rows["Mamba (9*mamba), equal FLOPs"][3]
    assert MADE_UP in measured and "Made-up CPU, 3 cores" in measured and "1999-12-31" in measured
    assert "On a GPU: not measured (`python -m scripts.bench_claims --parts=length`)" in speed
    assert "a made-up note." in speed
    state = section(text, "state")
    assert "1,024x" in state and "2,048x" in state and "Made-up GPU" in state and "On a CPU: not measured" in state
    assert "better, but less than stated at 32,768 tokens" in state and "holds at 32,768 tokens" in state
    assert "holds" in section(text, "rag_accuracy") and "does not hold" in section(text, "rag_hallucination")
    assert "On a CPU or a GPU: not measured" in section(text, "recall")


def test_without_results_every_claim_is_not_measured(tmp_path: Path) -> None:
    text = page(read_results(tmp_path))
    for claim in CLAIMS:
        assert "On a CPU or a GPU: not measured" in section(text, claim.id)
    summary = section(text, "Verdicts").strip().splitlines()[2:]
    assert all(line.count("not measured") == 2 for line in summary) and len(summary) >= len(CLAIMS)


def test_every_claim_stands_on_the_page_of_the_repository() -> None:
    text = (REPO_DIR / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\w+_?\w*)$", text, re.MULTILINE)[1:-1] == [c.id for c in CLAIMS]
    assert all(claim.text in text for claim in CLAIMS)


def test_a_stack_that_was_not_measured_at_a_length_has_no_ratio_there(folder: Path) -> None:
    result = json.loads((folder / "length_cpu.json").read_text())
    result["rows"] = [r for r in result["rows"] if not (r["arch"] == "m" and r["length"] == 8192)]
    claim = next(c for c in CLAIMS if c.id == "training_speed")
    assert [p.at for p in judged(claim, result)["m"][1]] == [512]
    assert judged(next(c for c in CLAIMS if c.id == "training_memory"), result) == {}  # this machine does not tell


# ---- a run ----


@pytest.fixture
def configs(base: Path, tmp_path: Path) -> list[str]:
    """A base folder with some text and a tokenizer; a Transformer and a Mamba."""
    rng = random.Random(0)
    docs = [" ".join(rng.choices(["river", "town", "stone", "of", "the", "."], k=60)) for _ in range(40)]
    for i in range(2):
        write_shard(base / "base_data" / f"shard_{i:05d}.parquet", docs[i * 20 : (i + 1) * 20], "test")
    Tokenizer.train(iter(docs), 300).save(base / "tokenizer")
    files = {"full": "T", "rec": "M"}
    for name, pattern in files.items():
        (tmp_path / f"{name}.py").write_text(f"{CONFIG}block_pattern = {pattern!r}\n")
    return [str(tmp_path / f"{name}.py") for name in files]


def test_a_later_run_adds_parts_and_the_page_is_written_from_both(
    configs: list[str], base: Path, tmp_path: Path
) -> None:
    bench_claims.main([*configs, *TINY, "--parts=train,memory", "--plan=transformer_d20,mamba_d20"])
    bench_claims.main([*configs, *TINY, "--parts=decode", "--match=params"])
    folder = base / "bench" / "claims"
    assert sorted(p.name for p in folder.glob("*")) == ["decode_cpu.json", "memory_cpu.json", "train_cpu.json"]
    results = read_results(folder)
    train = results["train", "CPU"]
    assert {r["repeat"] for r in train["rows"]} == {42, 43} and all(0 < r["bpb"] < 8 for r in train["rows"])
    assert {"full"} < set(train["stacks"]) and {s["match"] for s in train["stacks"].values()} >= {""}
    assert {"command", "machine", "versions", "git", "device"} <= set(train) and "node" not in train["machine"]
    bench_claims.main(["--write-docs", f"--docs={tmp_path / 'page.md'}"])
    text = (tmp_path / "page.md").read_text()
    assert "bits per byte" in section(text, "loss") and "On a GPU: not measured" in section(text, "loss")
    assert "ms a step of 8 rows" in section(text, "decoding")
    assert "](page_cpu.png)" in text and (tmp_path / "page_cpu.png").read_bytes()[1:4] == b"PNG"
    logged = json.loads((base / "report" / "claims.json").read_text())
    assert any(name.startswith("loss, Mamba") for name in logged["metrics"]) and logged["plots"] == ["claims_cpu.png"]


def test_outcomes_hold_every_question_of_both_conditions() -> None:
    asked = [Question(str(i), "Where?", ("Rome",)) for i in range(3)]
    rag = [Prediction(q, text, logprob=-1.0) for q, text in zip(asked, ("Rome", "Oslo", ""), strict=True)]
    closed = [Prediction(q, "Paris", logprob=-float(i)) for i, q in enumerate(asked)]
    found = bench_claims.outcomes({"closed_book": closed, "rag": rag})
    assert found["accuracy"] == {"closed_book": [0, 0, 0], "rag": [1, 0, 0]}
    assert found["hallucination"] == {"closed_book": [1, 1, 1], "rag": [0, 1, 0]}
    assert found["hallucination_equal"] == {"closed_book": [1, 1, 0], "rag": [0, 1, 0]}  # two answers each


def test_a_training_cell_measures_a_length(configs: list[str]) -> None:
    cfg = bench_claims.load_config(bench_claims.BenchClaimsConfig, TINY)
    stacks = bench_claims.stacks_of(cfg, configs, 300)
    row = bench_claims.train_cell(stacks[-1].arch, 64, 128, 2, 1)
    assert row["tokens"] == 2 * 128 and row["tokens_per_s"] > 0


def test_stacks_are_matched_to_the_first_and_one_of_each_learns_recall(configs: list[str]) -> None:
    cfg = bench_claims.load_config(bench_claims.BenchClaimsConfig, TINY)
    stacks = bench_claims.stacks_of(cfg, configs, 300)
    assert stacks[0].match == "" and [s.arch.block_pattern for s in stacks[1:]] == [["mamba"]] * (len(stacks) - 1)
    assert [s.key for s in bench_claims.unmatched(stacks)] == ["full", stacks[1].key]
    with pytest.raises(UserError, match="expected a stack of attention alone"):
        bench_claims.stacks_of(cfg, configs[::-1], 300)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--parts=speed"], "parts=speed: expected some of train,length"),
        (["--match=size"], "match=size: expected some of params,flops"),
        (["--train_lengths=none"], "train_lengths=none: expected numbers above 0"),
        (["--seeds=0"], "expected numbers above 0"),
        (["--parts=rag"], "the part rag needs --knowledge_base"),
        (["--parts=train"], "tokenizer"),
    ],
)
def test_mistakes_are_named(base: Path, flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        bench_claims.main(flags)
