"""speedrun.sh from end to end on a CPU, cut short, killed and called again."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from nanochat.common import REPO_DIR

pytestmark = pytest.mark.slow

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
