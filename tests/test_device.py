"""What a run asks of its device, on stand-ins for GPUs."""

import ctypes
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from nanochat import device
from nanochat.common import REPO_DIR
from nanochat.device import Ranks


@pytest.mark.parametrize(("major", "dtype"), [(7, torch.float32), (8, torch.bfloat16), (9, torch.bfloat16)])
def test_auto_takes_bfloat16_of_gpus_that_multiply_it_themselves(
    monkeypatch: pytest.MonkeyPatch, major: int, dtype: torch.dtype
) -> None:
    """A card before Ampere holds bfloat16 tensors, too, but computes in float32 and rounds."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=major))
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda _: True)
    assert device.pick_dtype("auto", torch.device("cuda")) == dtype


FAILING_RANK = """
import sys, time, torch
import torch.distributed as dist
from nanochat import device
from nanochat.common import run_script
from nanochat.config import UserError

joined = []
torch.cuda.set_device = lambda _: None
dist.init_process_group = lambda backend, **_: joined.append(backend)
dist.is_initialized = lambda: bool(joined)
dist.destroy_process_group = lambda: time.sleep(600)  # as NCCL's, which waits for the others

def main(argv):
    device.init_ranks(torch.device("cuda"))
    assert joined == ["nccl"]
    print("what was said before", end="")
    errors = {"user": UserError("out of memory"), "bug": ZeroDivisionError("a bug"), "ctrl-c": KeyboardInterrupt()}
    raise errors[argv[0]]

run_script(main)
"""


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [("user", 2, "error: out of memory\n"), ("bug", 1, "a bug\n"), ("ctrl-c", 130, "interrupted\n")],
)
def test_a_failed_rank_does_not_wait_for_the_others_of_nccl(how: str, code: int, said: str) -> None:
    env = {**os.environ, "WORLD_SIZE": "2", "RANK": "1", "PYTHONPATH": str(REPO_DIR)}
    command = [sys.executable, "-c", FAILING_RANK, how]
    done = subprocess.run(command, cwd=REPO_DIR, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (code, "what was said before"), done.stderr
    assert done.stderr.endswith(said) and (how == "bug" or done.stderr == said)


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
@pytest.mark.parametrize(("backend", "signum"), [("nccl", signal.SIGKILL), ("gloo", signal.SIGTERM)])
def test_a_rank_whose_torchrun_is_killed_gets_a_signal_that_it_can_act_on(
    monkeypatch: pytest.MonkeyPatch, backend: str, signum: int
) -> None:
    asked, exits = [], []
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(prctl=lambda *args: asked.append(args)))
    monkeypatch.setattr(device.signal, "signal", lambda *_: None)
    monkeypatch.setattr(device.atexit, "register", lambda _: None)
    monkeypatch.setattr(device, "error_exits", exits)
    device._prepare_end(Ranks(0, 0, 2), backend)
    assert asked == [(1, signum)] and bool(exits) == (backend == "nccl")
