"""The report: figures land in the right cell, pictures are found from both places, bad metrics are named by line."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nanochat import report
from nanochat.config import UserError
from nanochat.plots import plot_metrics, read_metrics, series, smooth
from nanochat.report import column_of, generate, log_stage, report_dir, reset


@pytest.fixture
def here(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder of this test's own, beside its NANOCHAT_BASE_DIR."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def write_run(base: Path, n: int = 60, tag: str = "d2") -> Path:
    path = base / "base_checkpoints" / tag / "metrics.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"step": s, "loss": 3 + 6 / s, "tokens_per_s": 1000.0, "tokens": 64 * s, "mfu": 0.4, "val_bpb": 1 + 1 / s}
        for s in range(1, n + 1)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def summary_of(text: str) -> dict[str, dict[str, str]]:
    """The summary table of a report: row -> column -> cell."""
    table = text.split("## Summary")[1].split("##")[0]
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return {r[0]: dict(zip(rows[0][1:], r[1:], strict=True)) for r in rows[2:]}


# ---- the report ----


def test_an_empty_report_has_machine_commit_and_a_table_of_dashes(here):
    text = generate().read_text()
    assert re.search(r"\| CPU \| \S+", text) and "No stage has run yet" in text and "not recorded" in text
    table = summary_of(text)
    assert list(table) == ["CORE", "ARC-Challenge", "ARC-Easy", "GSM8K", "HumanEval", "MMLU", "ChatCORE", "val bpb"]
    assert list(table["CORE"]) == ["BASE", "MID", "SFT", "RAG", "RL"]
    assert {c for row in table.values() for c in row.values()} == {"-"}


def test_every_figure_lands_in_its_row_and_column(here):
    log_stage("base_training", {"val_bpb": 0.9123})
    log_stage("base_eval", {"CORE": {"value": 0.2219, "stderr": 0.004, "n": 500}})
    log_stage("chat_evaluation_mid", {"ARC-Easy": {"value": 0.3561, "stderr": None, "n": 2376}})
    log_stage("chat_evaluation_sft", {"ARC-Easy": np.float32(0.5), "MMLU": torch.tensor(0.25), "GSM8K": float("nan")})
    log_stage("rag_evaluation", {"EM": 0.4, "F1": 0.5}, summary=["EM"])
    log_stage("chat_rl", {"GSM8K": 0.0758})
    table = summary_of(generate().read_text())
    assert table["val bpb"] == {"BASE": "0.9123", "MID": "-", "SFT": "-", "RAG": "-", "RL": "-"}
    assert table["CORE"]["BASE"] == "0.2219 ± 0.0040 (n=500)"
    assert table["ARC-Easy"] == {"BASE": "-", "MID": "0.3561 (n=2376)", "SFT": "0.5000", "RAG": "-", "RL": "-"}
    assert table["MMLU"]["SFT"] == "0.2500" and table["GSM8K"] == {**dict.fromkeys(table["GSM8K"], "-"), "RL": "0.0758"}
    assert table["EM"]["RAG"] == "0.4000" and "F1" not in table


def test_refrag_gets_its_column_only_when_it_ran(here):
    log_stage("refrag_evaluation", {"MMLU": 0.3})
    assert summary_of(generate().read_text())["MMLU"]["REFRAG"] == "0.3000"


@pytest.mark.parametrize(
    ("stage", "column"),
    [
        ("base_loss", "BASE"),
        ("mid_training", "MID"),
        ("chat_sft", "SFT"),
        ("chat_evaluation_rl", "RL"),
        ("rag_training", "RAG"),
        ("tokenizer_training", None),
        ("my_database", None),
    ],
)
def test_a_stage_reports_to_the_column_of_its_name(stage, column):
    assert column_of(stage) == column


def test_a_stage_run_again_replaces_its_section_and_merge_keeps_the_other_tasks(here):
    log_stage("chat_evaluation_sft", {"ARC-Easy": 0.1, "MMLU": 0.2})
    log_stage("chat_evaluation_sft", {"ARC-Easy": 0.3}, merge=True)
    table = summary_of(generate().read_text())
    assert (table["ARC-Easy"]["SFT"], table["MMLU"]["SFT"]) == ("0.3000", "0.2000")
    log_stage("chat_evaluation_sft", {"MMLU": 0.4})
    table = summary_of(generate().read_text())
    assert (table["ARC-Easy"]["SFT"], table["MMLU"]["SFT"]) == ("-", "0.4000")


def test_known_stages_come_in_the_order_of_the_pipeline_and_others_after(here, monkeypatch):
    times = iter(f"2026-01-01T00:00:0{i}+00:00" for i in range(9))
    monkeypatch.setattr(report, "_now", lambda: next(times))
    for stage in ("zebra", "chat_sft", "apple", "base_training", "tokenizer_training"):
        log_stage(stage, {})
    heads = re.findall(r"^## (.*)", generate().read_text(), flags=re.MULTILINE)
    assert heads[-5:] == ["Tokenizer training", "Base training", "Chat sft", "Zebra", "Apple"]


def test_durations_and_the_whole_time_are_given(here, monkeypatch):
    times = iter(["2026-01-01T10:00:00+00:00", "2026-01-01T10:20:00+00:00", "2026-01-01T13:51:00+00:00"])
    monkeypatch.setattr(report, "_now", lambda: next(times))
    reset()
    log_stage("base_training", {"minutes": 20.0})
    log_stage("chat_sft", {}, duration_s=9060)
    text = generate().read_text()
    assert "Total wall clock time: 3h51m" in text
    assert "| base_training | 20m00s |" in text and "| chat_sft | 2h31m |" in text


def test_values_cannot_break_the_table(here):
    log_stage("base_training", {"samples": "a|b\n## c", "n": 1234567, "tiny": 1e-9, "list": [1, "x"], "none": None})
    text = generate().read_text()
    assert "| samples | a\\|b ## c |" in text and "\n## c" not in text
    assert "| n | 1,234,567 |" in text and "| tiny | 1.000e-09 |" in text and '| list | [1, "x"] |' in text


def test_what_is_no_metric_is_refused(here):
    with pytest.raises(ValueError, match=r"metric a\.b is a object"):
        log_stage("x", {"a": {"b": object()}})
    for name in ("header", "../x", "Base", ""):
        with pytest.raises(ValueError, match="stage="):
            log_stage(name, {})


def test_a_damaged_section_is_named(here):
    log_stage("base_training", {}).write_text("{")
    with pytest.raises(UserError, match=r"base_training\.json is not valid JSON"):
        generate()


def test_a_picture_that_is_gone_is_named_with_its_stage(here, base):
    log_stage("base_training", {}, plots=plot_metrics(write_run(base)))
    (report_dir() / "base_d2_loss.png").unlink()
    with pytest.raises(UserError, match=r"base_d2_loss\.png of the stage base_training"):
        generate()


def test_pictures_are_found_from_both_reports(here, base):
    log_stage("base_training", {}, plots=plot_metrics(write_run(base)))
    elsewhere = here / "other.png"
    elsewhere.write_bytes(b"png")
    log_stage("extra", {}, plots=[elsewhere])
    (here / "report_files").mkdir()
    (here / "report_files" / "stale.png").touch()
    for path in (generate(), here / "report.md"):
        links = re.findall(r"!\[[^]]*\]\(([^)]*)\)", path.read_text())
        assert len(links) == 3 and all((path.parent / link).is_file() for link in links)
    assert not (here / "report_files" / "stale.png").exists()


def test_reset_empties_the_report_and_the_command_line_does_both(here, base):
    log_stage("base_training", {}, plots=plot_metrics(write_run(base)))
    run = [sys.executable, "-m", "nanochat.report"]
    env = {"NANOCHAT_BASE_DIR": str(base), "PATH": "/usr/bin:/bin", "PYTHONPATH": str(report.REPO_DIR)}
    subprocess.run([*run, "reset"], env=env, check=True)
    assert [p.name for p in report_dir().iterdir()] == ["header.json"]
    assert {"start", "machine", "git"} <= set(json.loads((report_dir() / "header.json").read_text()))
    subprocess.run([*run, "generate"], env=env, check=True)
    assert "torch" in (here / "report.md").read_text()
    wrong = subprocess.run([*run, "generat"], env=env, capture_output=True, text=True)
    assert wrong.returncode == 2 and "expected `reset` or `generate`" in wrong.stderr and wrong.stderr.count("\n") == 1


# ---- metrics and plots ----


def test_a_step_done_again_after_a_resume_counts_once_and_the_last_one_wins(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = [{"step": s, "loss": 1.0, "val_bpb": 9.0} for s in range(1, 8)]
    again = [{"step": s, "loss": 2.0} for s in range(5, 7)]
    path.write_text("".join(json.dumps(r) + "\n" for r in first + again))
    rows = read_metrics(path)
    assert [(r["step"], r["loss"]) for r in rows] == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (6, 2)]
    assert "val_bpb" not in rows[-1]


def test_two_rows_of_a_step_are_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n\n{"step": 1, "val_bpb": 1.0, "loss": 2.0}\n')
    assert read_metrics(path) == [{"step": 1, "val_bpb": 1.0, "loss": 2.0}]


def test_a_line_cut_by_a_kill_at_any_byte_is_tolerated_at_the_end(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole, last = b'{"step": 1, "loss": 3.0}\n', '{"step": 2, "note": "naïve"}\n'.encode()
    for cut in range(len(last)):
        path.write_bytes(whole + last[:cut])
        complete = cut == len(last) - 1  # only the newline is missing
        assert [r["step"] for r in read_metrics(path)] == ([1, 2] if complete else [1])


@pytest.mark.parametrize("bad", ["{", "[]", '{"loss": 1}', '{"step": "x"}', "null", "{} {}"])
def test_a_bad_line_in_the_middle_is_named(bad, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{bad}\n{{"step": 2}}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: not a JSON object with a step"):
        read_metrics(path)
    with pytest.raises(UserError, match="do not exist"):
        read_metrics(tmp_path / "absent")


def test_smoothing_keeps_a_constant_the_length_and_the_first_value():
    assert np.allclose(smooth(np.full(100, 2.5)), 2.5)
    noisy = np.linspace(5, 3, 400) + np.random.default_rng(0).normal(size=400)
    line = smooth(noisy)
    assert len(line) == 400 and line[0] == noisy[0]
    assert np.abs(np.diff(line))[50:].mean() < 0.4 * np.abs(np.diff(noisy))[50:].mean()
    for n in range(1, 6):
        assert len(smooth(np.arange(float(n)))) == n


def test_only_finite_numbers_are_drawn():
    rows = [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": 3}, {"step": 3}, {"step": 4, "loss": None}]
    x, y = series(rows, "loss")
    assert x.tolist() == [2] and y.tolist() == [3.0]


def pixels(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return imread(path)


def test_plots_are_small_pngs_with_ink_and_the_same_each_time(base):
    made = plot_metrics(write_run(base, 3000))
    assert [p.name for p in made] == ["base_d2_loss.png", "base_d2_throughput.png"] and made[0].parent == report_dir()
    for path in made:
        assert path.stat().st_size < 150_000
        assert 500 < pixels(path).shape[1] < 1000 and pixels(path)[..., :3].std() > 0.05
    before = [p.read_bytes() for p in made]
    assert [p.read_bytes() for p in plot_metrics(write_run(base, 3000))] == before


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        ([], []),
        ([{"step": 0, "val_bpb": 3.2}], ["x_loss.png"]),
        ([{"step": 1, "loss": 2.0}], ["x_loss.png"]),
        ([{"step": s, "loss": 2.0, "tokens_per_s": 0.0} for s in range(30)], ["x_loss.png", "x_throughput.png"]),
        ([{"step": s, "loss": float("nan")} for s in range(9)], []),
        ([{"step": s, "loss": 1e30 if s == 9 else 1.0, "tokens": s} for s in range(40)], ["x_loss.png"]),
    ],
)
def test_any_subset_of_metrics_is_drawn(rows, names, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert [p.name for p in plot_metrics(path, tmp_path / "out", name="x")] == names
