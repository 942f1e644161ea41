"""Every command of docs/scaling.md is run on a tiny model with few ranks; that of two hosts is run by test_scaling."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
from test_scaling import PAGE, TINY, quick, rows, text, together  # noqa: F401 (fixtures)

from scripts import base_train
from scripts.base_train import BaseTrainConfig


def commands() -> list[tuple[int, list[str]]]:
    """(ranks, arguments of base_train) of every command of one host, in order."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            launch, _, arguments = line.partition("scripts.base_train ")
            assert arguments and re.match(r"python -m (nanochat.launch \d )?$|torchrun .*-m $", launch), line
            if "--nnodes" not in launch:
                n = re.search(r"--nproc_per_node=(\d+)|launch (\d+)", launch)
                found.append((int(n[1] or n[2]) if n else 1, shlex.split(arguments)))
    return found


@pytest.mark.slow
def test_every_command_of_the_page_trains(text: Path, tmp_path: Path) -> None:  # noqa: F811
    """In order, with half as many ranks, and one step more each time it resumes."""
    log, steps = tmp_path / "log", 1
    assert [n for n, _ in commands()] == [1, 8, 8, 2, 8, 4, 1]
    for i, (n, arguments) in enumerate(commands()):
        arguments = [*arguments, *TINY, "--eval_every=-1"]
        if i == 0:
            arguments += ["--model_tag=alone"]
        if "--resume" in arguments:
            steps += 1
        together(max(1, n // 2), base_train.main, [*arguments, f"--num_iterations={steps}"], log=log)
    said = log.read_text()
    assert "saved by 4 ranks, going on with 2" in said and "saved by 2 ranks, going on with 1" in said
    assert sorted(rows(text / "base_checkpoints/d2/metrics.jsonl")) == [1, 2, 3, 4]
    assert all((text / "base_checkpoints" / tag / "step_000001").is_dir() for tag in ("sharded", "alone"))


def test_every_key_of_the_page_is_one() -> None:
    torchruns = {"standalone", "nnodes", "nproc_per_node", "rdzv_backend", "rdzv_id", "rdzv_endpoint"}
    assert set(re.findall(r"--(\w+)", PAGE)) <= {f.name for f in fields(BaseTrainConfig)} | torchruns
