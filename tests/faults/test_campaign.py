"""A small campaign: the whole one is `python -m tests.faults.campaign`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat.common import REPO_DIR
from tests.faults.children import Done
from tests.faults.tally import Tally, Verdict, judge


@pytest.mark.slow
def test_kills_damage_and_broken_text_lose_nothing_and_are_said_in_one_line(tmp_path: Path) -> None:
    options = ["--kills=6", "--rounds=1", "--files=1", "--seed=1", "--parts=kill,corrupt,utf8"]
    argv = [
        sys.executable,
        "-m",
        "tests.faults.campaign",
        *options,
        f"--folder={tmp_path}",
        f"--out={tmp_path / 'o.json'}",
    ]
    done = subprocess.run(argv, cwd=REPO_DIR, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "o.json").read_text())["rows"]
    assert sum(row["tried"] for row in rows if row["fault"] == "kill -9") >= 6
    assert sum(row["codes"].get("2", 0) for row in rows if row["fault"] == "damaged file") >= 10


@pytest.mark.parametrize(
    ("done", "same", "failing"),
    [
        (Done(0, "", ""), True, ""),
        (Done(0, "", ""), False, "wrong"),
        (Done(2, "", "error: x/a.json is damaged: restore it\n"), False, ""),
        (Done(2, "", "note: first\nerror: x/a.json is damaged: restore it\n"), False, ""),
        (Done(2, "", "error: something else: restore it\n"), False, "vague"),
        (Done(2, "", "error: x/a.json is odd\n"), False, "vague"),
        (Done(2, "", "error: x/a.json: restore it\nand a second line\n"), False, "vague"),
        (Done(1, "", "Traceback (most recent call last):\nKeyError: 1\n"), False, "tracebacks"),
        (Done(-11, "", ""), False, "tracebacks"),
    ],
)
def test_what_counts_as_a_failure(done: Done, same: bool, failing: str) -> None:
    tally = Tally()
    tally.count("fault", "place", judge(done, ["a.json"], same))
    row = tally.rows["fault", "place"]
    assert tally.failed == bool(failing)
    assert not failing or getattr(row, failing) == 1


def test_losses_are_failures_and_tables_add_up() -> None:
    tally, other = Tally(), Tally()
    other.count("kill -9", "saving", lost="step 3")
    other.count("kill -9", "saving", Verdict(2))
    tally.take(json.dumps(other.as_json()))
    assert tally.failed == 1 and tally.rows == other.rows
    assert "saving" in tally.table() and "lost: : step 3" in tally.table()
