"""speedrun.sh from end to end on a CPU, cut short, killed and called again, and what its GPU run would type."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanochat.common import REPO_DIR

SMALL = "--max_seq_len=256 --device_batch_size=1 --total_batch_size=512 --eval_tokens=1024"
STAGES = ["report_reset", "dataset", "tok_train", "tok_eval", "base_train", "base_loss", "bench_arch", "mid_train"]
STAGES += ["chat_eval_mid", "chat_sft", "chat_eval_sft", "chat_rl", "chat_eval_rl"]
STAGES += ["rag_data", "rag_finetune", "rag_eval", "hop_data", "refrag_finetune", "refrag_eval"]


def start(base: Path, **env: str) -> subprocess.Popen[str]:
    short = {"GPUS": "0", "SPEEDRUN_MAX_CHARS": "300000", "WANDB_RUN": "dummy", "OMP_NUM_THREADS": "1"}
    short["SPEEDRUN_TRAIN"] = f"{SMALL} --num_iterations=60 --save_every=15"
    short |= dict.fromkeys(("SPEEDRUN_MID", "SPEEDRUN_SFT", "SPEEDRUN_RAG"), "--num_iterations=3 --eval_tokens=1024")
    short["SPEEDRUN_RAG"] += " --eval_questions=8"
    short["SPEEDRUN_PROBLEMS"] = short["SPEEDRUN_RAG_PROBLEMS"] = "4"
    short["SPEEDRUN_RL"] = "--num_iterations=2 --examples_per_step=2 --num_samples=2 --eval_examples=2"
    short["SPEEDRUN_REFRAG"] = (
        "--num_iterations=2 --eval_tokens=1024 --max_iterations=1 --num_samples=2 --device_batch_size=1"
    )
    short |= {"SPEEDRUN_HOP_PROBLEMS": "4", "SPEEDRUN_HOP_QUESTIONS": "400"}
    short["SPEEDRUN_ARCH_SECONDS"] = "1"
    full = {**os.environ, "NANOCHAT_BASE_DIR": str(base), **short, **env}
    command = ["bash", str(REPO_DIR / "speedrun.sh")]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=base, env=full, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def finish(base: Path, **env: str) -> tuple[int, str, str]:
    process = start(base, **env)
    out, err = process.communicate(timeout=1200)
    return process.returncode, out, err


def finished_before(out: str) -> list[str]:
    return [line.split()[1].rstrip(":") for line in out.splitlines() if line.endswith(": finished before")]


def kill_after_a_checkpoint(base: Path) -> None:
    """Run until base_train has saved its first checkpoint, then kill -9 the whole process group."""
    process = start(base)
    deadline = time.monotonic() + 900
    while not list((base / "base_checkpoints").glob("tiny_hybrid/step_*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.slow
def test_a_killed_speedrun_goes_on_where_it_stopped(base: Path):
    kill_after_a_checkpoint(base)
    code, out, err = finish(base)
    assert code == 0, err
    assert finished_before(out) == STAGES[:4]
    step = re.search(r"resuming tiny_hybrid at step (\d+)", out)
    assert step and 15 <= int(step[1]) < 60
    assert (base / "report" / "report.md").is_file()

    code, out, err = finish(base)
    assert code == 0, err
    assert finished_before(out) == STAGES  # nothing is left to do but to report and to sample

    code, out, err = finish(
        base, SPEEDRUN_TRAIN=f"{SMALL} --num_iterations=90"
    )  # another run: it may not take over this one's model
    assert code == 1 and "FRESH=1" in err
    assert finished_before(out) == STAGES[:4]
    assert list((base / "base_checkpoints" / "tiny_hybrid").glob("step_000060"))


def gpu_run(tmp_path: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """The GPU run where modules and torchrun only say what they were given."""
    root, programs = tmp_path / "repo", tmp_path / "bin"
    for folder in (root / "scripts", programs):
        folder.mkdir(parents=True)
    shutil.copy(REPO_DIR / "speedrun.sh", root)
    (root / "scripts" / "setup.sh").write_text(f"cd '{REPO_DIR}'\nPATH='{programs}':$PATH\n")
    real = f'[ "$1" = - ] && exec {sys.executable} "$@"'
    for name, first in (("python", real), ("torchrun", ":")):
        (programs / name).write_text(f'#!/usr/bin/env bash\n{first}\necho "ran {name} $*"\n')
        (programs / name).chmod(0o755)
    env = {**os.environ, "NANOCHAT_BASE_DIR": str(tmp_path / "base"), "PYTHONPATH": str(REPO_DIR), **env}
    command = ["bash", str(root / "speedrun.sh")]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("env", "cure"),
    [
        ({"GPUS": "6"}, "--total_batch_size=393216 in SPEEDRUN_TRAIN, or fewer GPUs: GPUS=4 bash speedrun.sh"),
        (
            {"GPUS": "3", "SPEEDRUN_TRAIN": "--total_batch_size=589824"},
            "--examples_per_step=15 in SPEEDRUN_RL, or fewer GPUs: GPUS=1 bash speedrun.sh",
        ),
    ],
)
def test_gpus_that_cannot_share_a_step_are_refused_before_the_download(
    tmp_path: Path, env: dict[str, str], cure: str
) -> None:
    done = gpu_run(tmp_path, **env)
    assert done.returncode == 2 and "nanochat.dataset" not in done.stdout
    assert (
        done.stderr.startswith("error: ") and done.stderr.endswith(f": use {cure}\n") and done.stderr.count("\n") == 1
    )


def test_smaller_gpus_are_given_smaller_batches(tmp_path: Path) -> None:
    more = {"SPEEDRUN_TRAIN": "--device_batch_size=8 --softcap=0", "SPEEDRUN_RL": "--device_batch_size=4"}
    done = gpu_run(tmp_path, GPUS="4", SPEEDRUN_MID="--device_batch_size=2", **more)
    assert done.returncode == 0, done.stderr
    ran = re.findall(
        r"^ran torchrun .*--nproc_per_node=4 .*scripts\.(\w+) .*?--run=dummy (.*)--resume$", done.stdout, re.M
    )
    assert dict(ran) == {
        "base_train": "--device_batch_size=8 --softcap=0 ", "mid_train": "--device_batch_size=2 ", "chat_sft": "",
        "chat_rl": "--device_batch_size=4 ",
    }  # fmt: skip
