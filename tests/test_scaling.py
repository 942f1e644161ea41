"""Training over ranks: DDP and FSDP compute what one process computes, any number of ranks goes on from a checkpoint,
two hosts meet over a network, a rank that dies ends the job, and --resume goes on."""

import json
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from nanochat import core_bundle, device, optim
from nanochat.checkpoint import load_checkpoint
from nanochat.common import REPO_DIR
from nanochat.config import UserError
from nanochat.device import rows_of, shard_model
from nanochat.finetune import make_loop, start_from
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW
from nanochat.plots import read_metrics
from nanochat.run import Run
from nanochat.shards import write_shard
from nanochat.tokenizer import Tokenizer
from nanochat.train import Loop
from scripts import base_train
from scripts.mid_train import MidTrainConfig

PATTERNS = {"attention": "T", "hybrid": "M,T,M2,G"}
LRS = {"matrix": 0.02, "embedding": 0.1, "unembedding": 0.01, "scalar": 0.02, "ssm": 0.01}
TINY = [
    "--depth=2", "--d_model=32", "--head_dim=16", "--max_seq_len=32", "--device_batch_size=1", "--total_batch_size=384",
    "--eval_tokens=512", "--device=cpu", "--dtype=float32", "--log_every=100", "--eval_every=4", "--sample_every=-1",
    "--block_pattern=M,T", "--compile=false",
]  # fmt: skip
PAGE = (REPO_DIR / "docs" / "scaling.md").read_text(encoding="utf-8")
TINY_CONFIG = str(REPO_DIR / "configs" / "tiny_transformer.py")
PRELOAD = ["scripts.base_train", "torch.distributed.fsdp", "torch.distributed.tensor", "torch._dynamo"]
WORDS = ["river", "town", "stone", "bridge", "north", "of", "the", "a", "1987", "founded", "is", "was", "."]


# ---- ranks as processes of one test ----


def rank_main(work: Callable, arguments: tuple, env: dict[str, str], log: str) -> None:
    """What one rank of `together` runs; the machine is not measured, no picture is drawn."""
    os.environ.update(env)
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 1), os.dup2(fd, 2)
    torch.set_num_threads(1)
    device.peak_flops = lambda *_: 0.0
    base_train.plot_metrics = lambda _: []
    base_train.PROMPTS = ("the river", "a stone bridge")  # those of the script are too long for rows of 32
    work(*arguments)


def together(n: int, work: Callable, *arguments: Any, log: Path, timeout: float = 300) -> None:
    """Run work(*arguments) on n ranks; every rank must end well."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(n)}
    where["NANOCHAT_BASE_DIR"] = os.environ["NANOCHAT_BASE_DIR"]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    ranks = [
        context.Process(
            target=rank_main, args=(work, arguments, {**where, "RANK": str(r), "LOCAL_RANK": str(r)}, str(log))
        )
        for r in range(n)
    ]
    for p in ranks:
        p.start()
    deadline = time.monotonic() + timeout
    try:
        for p in ranks:
            p.join(max(0.0, deadline - time.monotonic()))
        assert [p.exitcode for p in ranks] == [0] * n, log.read_text()[-3000:]
    finally:
        for p in ranks:
            p.kill()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, too, no measuring and no pictures."""
    monkeypatch.setattr(device, "peak_flops", lambda *_: 0.0)
    monkeypatch.setattr(base_train, "plot_metrics", lambda _: [])


@pytest.fixture
def text(base: Path) -> Path:
    """A base folder with a few documents and a small tokenizer."""
    rng = random.Random(0)
    docs = [" ".join(rng.choices(WORDS, k=rng.randint(5, 60))) for _ in range(120)]
    for i in range(2):
        write_shard(base / "base_data" / f"shard_{i:05d}.parquet", docs[i * 60 : (i + 1) * 60], "test")
    Tokenizer.train(iter(docs), 300).save(base / "tokenizer")
    return base


def rows(path: Path) -> dict[int, dict]:
    return {row["step"]: row for row in read_metrics(path)}


def close(a: dict[int, dict], b: dict[int, dict], keys: tuple[str, ...] = ("loss", "val_bpb")) -> None:
    """The same steps with the same figures, within 1e-4."""
    assert sorted(a) == sorted(b)
    for step, row in a.items():
        for key in set(keys) & set(row):
            assert b[step][key] == pytest.approx(row[key], abs=1e-4), (step, key)


# ---- the same losses ----


def losses(pattern: str, parallel: str, steps: int = 4) -> list[tuple[float, float]]:
    """(loss, gradient norm) of a few steps over the same 12 rows, dealt to the ranks; some rows have no target."""
    run = Run.start("base", "t", base_train.BaseTrainConfig(device="cpu", dtype="float32"))
    rank, world = run.ranks.rank, run.ranks.world_size
    config = GPTConfig(
        4,
        pattern,
        32,
        2,
        vocab_size=50,
        seq_len=16,
        gdn_head_dim=8,
        mamba2_d_state=16,
        residual_scalars=True,
        head_tie=0.5,
    )
    model = GPT(config)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():  # at zero some gradients are pure rounding, which AdamW would magnify
        p.data.add_(0.05 * torch.randn(p.shape, generator=generator))
    model.set_compute(torch.float32)
    if parallel == "fsdp":
        shard_model(model, model.layers, run.device)
    optimizer = MuonAdamW(model, model.param_groups(), LRS, weight_decay=0.1, ranks=run.ranks)
    loop = Loop(run, model, optimizer, num_iterations=steps, grad_clip=1.0)
    ids = torch.randint(0, 50, (12, 16), generator=torch.Generator().manual_seed(1))
    targets = ids.roll(-1, 1)
    targets[3::4] = -1  # with four ranks, all rows of the last
    out = []
    for step in loop:
        if step.last:
            return out
        for x, y in zip(ids[rank::world].split(2), targets[rank::world].split(2), strict=True):
            loop.backward(model(x, y, loss_reduction="sum"), int((y >= 0).sum()))
        loop.update()
        out.append((loop.last_row["loss"], loop.last_row["grad_norm"]))
    raise AssertionError("the loop has a last step")


def all_losses(out: str) -> None:
    """losses() of every pattern, in DDP and FSDP, to a file."""
    found = {f"{name} {how}": losses(p, how) for name, p in PATTERNS.items() for how in ("ddp", "fsdp")}
    assert device.shared_out(range(7), lambda own: [str(i) for i in own]) == list("0123456")
    assert device.shared_out("a", list) == ["a"]  # nothing to do for the others
    if int(os.environ["RANK"]) == 0:
        Path(out).write_text(json.dumps(found))
    device.leave_ranks()


@pytest.mark.parametrize("n", [2, 3, 4])
def test_ranks_have_the_losses_of_one_process(base: Path, tmp_path: Path, n: int) -> None:
    together(n, all_losses, str(tmp_path / "found"), log=tmp_path / "log")
    found = json.loads((tmp_path / "found").read_text())
    for name, pattern in PATTERNS.items():
        expected = losses(pattern, "one")
        for how in ("ddp", "fsdp"):
            for step, (a, b) in enumerate(zip(found[f"{name} {how}"], expected, strict=True)):
                assert a == pytest.approx(b, abs=1e-4), (name, how, step)


def test_muon_sends_rows_to_owners_and_back_by_the_same_cut_as_torch() -> None:
    for n, world in ((10, 3), (10, 4), (3, 4), (8, 8), (1, 2)):
        ends = [rows_of(n, r, world) for r in range(world)]
        chunks = [len(c) for c in torch.arange(n).chunk(world)]
        assert [hi - lo for lo, hi in ends] == chunks + [0] * (world - len(chunks))


# ---- checkpoints of another number of ranks ----


def test_slices_of_moments_are_cut_anew_for_any_number_of_ranks() -> None:
    moments = {key: torch.randn(10, 2) for key in ("exp_avg", "exp_avg_sq")}
    for old, new in ((3, 4), (4, 3), (4, 1), (1, 7), (2, 4)):
        cuts = [rows_of(10, r, old) for r in range(old)]
        saved = {f"w[{a}:{b}].{key}": t[a:b] for a, b in cuts if b > a for key, t in moments.items()}
        saved |= {f"w[{a}:{b}].step": torch.tensor(7.0) for a, b in cuts if b > a}
        for lo, hi in (rows_of(10, r, new) for r in range(new)):
            if hi > lo:
                found = optim._cut_anew(saved, [f"w[{lo}:{hi}]"])
                assert found[f"w[{lo}:{hi}].step"] == 7
                assert all(torch.equal(found[f"w[{lo}:{hi}].{key}"], t[lo:hi]) for key, t in moments.items())
    assert "w[0:10].step" not in optim._cut_anew({"w[5:10].step": torch.tensor(7.0)}, ["w[0:10]"])


def test_a_stage_goes_on_with_the_moments_of_any_number_of_ranks(text: Path, tmp_path: Path) -> None:
    brief = ["--eval_every=-1", "--num_iterations=1", "--model_tag=t"]
    together(2, base_train.main, [*TINY, *brief], log=tmp_path / "log")
    said = {"messages": [{"role": role, "content": "the river"} for role in ("user", "assistant")]}
    cfg = MidTrainConfig(device="cpu", dtype="float32", num_iterations=1, model_tag="t")
    moments = make_loop(start_from(cfg, "mid"), [said]).optimizer.state_tensors()
    saved = load_checkpoint(text / "base_checkpoints/t", any_ranks=True, world_size=1).optim or {}
    cut = re.compile(r"\[(\d+):\d+\]")

    def first_row(name: str) -> int:
        found = cut.search(name)
        return int(found[1]) if found else 0

    assert {cut.sub("", name) for name in saved} == {cut.sub("", name) for name in moments} and len(saved) > len(
        moments
    )
    for name, t in moments.items():
        parts = [saved[s] for s in sorted(saved, key=first_row) if cut.sub("", s) == cut.sub("", name)]
        assert torch.equal(t, torch.cat(parts) if t.ndim else parts[0]), name


def copy_at(folder: Path, tag: str, step: int) -> Path:
    """The run in `folder` as it was at a step, under another name."""
    copy = folder.parent / tag
    copy.mkdir()
    shutil.copytree(folder / f"step_{step:06d}", copy / f"step_{step:06d}")
    shutil.copy(folder / "metrics.jsonl", copy)
    return copy


def refusal(arguments: list[str], out: str) -> None:
    """Write what base_train refuses with."""
    try:
        base_train.main(arguments)
    except UserError as e:
        if os.environ["RANK"] == "0":
            Path(out).write_text(str(e))
    device.leave_ranks()


@pytest.mark.slow
def test_four_ranks_save_and_two_one_and_four_go_on(text: Path, tmp_path: Path) -> None:
    """Sharded 4 -> 2 -> 1 and -> 4 unsharded; every loss is that of the run that was never interrupted."""
    log, folder = tmp_path / "log", text / "base_checkpoints"
    options = [*TINY, "--num_iterations=6", "--save_every=2", "--keep_last=9", "--resume", "--parallel=fsdp"]
    together(4, base_train.main, [*options, "--model_tag=four", "--sample_every=3"], log=log)
    four = rows(folder / "four/metrics.jsonl")
    assert sorted(four) == list(range(7)) and log.read_text().count("sample: ") == 2 * 2
    copy_at(folder / "four", "two", 2)
    together(2, base_train.main, [*options, "--model_tag=two"], log=log)
    assert "saved by 4 ranks, going on with 2" in log.read_text()
    close(four, rows(folder / "two/metrics.jsonl"))
    copy_at(folder / "two", "one", 4)
    base_train.main([*options, "--model_tag=one"])
    close(four, rows(folder / "one/metrics.jsonl"))
    copy_at(folder / "two", "again", 4)
    together(4, base_train.main, [*options, "--model_tag=again", "--parallel=ddp"], log=log)
    close(four, rows(folder / "again/metrics.jsonl"))
    saved = [load_checkpoint(folder / tag, 6, any_ranks=True, world_size=0) for tag in ("four", "again", "one")]
    names = [{name.partition("[")[0] for name in c.optim or {}} for c in saved]
    assert names[0] == names[1] == names[2] and saved[0].optim.keys() == saved[1].optim.keys()  # pyrefly: ignore
    for c in saved[1:]:
        for name, t in (saved[0].model or {}).items():
            torch.testing.assert_close(
                (c.model or {})[name], t, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
            )
    together(3, refusal, [*options, "--model_tag=four"], str(tmp_path / "said"), log=log)
    assert (
        "4 streams, one for each rank it began with: resume with a number of ranks that divides 4, not 3"
        in (tmp_path / "said").read_text()
    )


def test_streams_that_a_step_cannot_share_out_are_refused() -> None:
    with pytest.raises(UserError, match="reads 4 streams of its text, but makes 2 forwards a step: set --total_batch"):
        base_train.Streams([None] * 4, [{}] * 4, grad_accum=2)  # pyrefly: ignore


def test_compiling_a_sharded_model_is_refused_before_any_work() -> None:
    with pytest.raises(UserError, match="add --compile=false, or take --parallel=ddp"):
        base_train.main(["--compile", "--parallel=fsdp"])


# ---- CORE while training ----


def core_of_a_rank(out: str, fails: bool) -> None:
    """What base_train's CORE reads, on a machine that has yet to download it: a line for each download and each end."""
    os.environ["NANOCHAT_DATA"] = out
    said = Path(out) / os.environ["RANK"]

    def download(folder: Path) -> None:
        said.write_text("downloads, ")
        time.sleep(0.2)  # as long as others need to see that there is no folder yet
        if fails:
            raise UserError("no network")
        folder.mkdir(parents=True)

    core_bundle._download = download
    base_train.evaluate_core = lambda scorer, folder, *_, **__: [folder.name]
    base_train.core = lambda scores: scores
    cfg = base_train.BaseTrainConfig(device="cpu")
    ranks, _ = device.init_ranks(torch.device("cpu"))
    model = GPT(GPTConfig(1, "T", 32, 2, vocab_size=50, seq_len=16))
    try:
        found = base_train.core_metric(cfg, model, None, ranks)  # pyrefly: ignore
    except UserError as e:
        found = e
    with said.open("a") as f:
        f.write(str(found))
    device.leave_ranks()


@pytest.mark.parametrize(("fails", "first", "second"), [
    (False, "downloads, eval_bundle", "eval_bundle"),
    (True, "downloads, no network", "rank 1 has no CORE bundle: rank 0 says why it could not get it"),
])  # fmt: skip
def test_one_rank_downloads_core_for_all(base: Path, tmp_path: Path, fails: bool, first: str, second: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    together(2, core_of_a_rank, str(out), fails, log=tmp_path / "log", timeout=60)
    assert [(out / rank).read_text() for rank in "01"] == [first, second]


# ---- torchrun, hosts, and a rank that dies ----


def torchrun(arguments: list[str], log: Path, *options: str) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", *options]
    command = [*launch, "-m", "scripts.base_train", *arguments]
    return subprocess.Popen(command, cwd=REPO_DIR, env=env, stdout=log.open("a"), stderr=subprocess.STDOUT)


def wait(process: subprocess.Popen, log: Path, timeout: float = 300) -> int:
    """Exit code; a process that hangs is a failure, with what it has said."""
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.terminate()
        raise AssertionError(f"no end after {timeout} s:\n{log.read_text()[-3000:]}") from None


def until_saved(folder: Path, process: subprocess.Popen, log: Path, timeout: float = 300) -> None:
    """Return as soon as a run that goes on has a checkpoint there."""
    deadline = time.monotonic() + timeout
    while not list(folder.glob("step_*")):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.02)


TWO_HOSTS = r"""
set -e
mount --bind "$1" /etc/hosts
for i in 1 2; do unshare --net --uts sleep 600 & hosts[i]=$!; done
on() { nsenter --target "${hosts[$1]}" --net --uts "${@:2}"; }
for i in 1 2; do
    while [ "$(readlink /proc/${hosts[i]}/ns/net)" = "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
done
ip link add v1 type veth peer name v2
for i in 1 2; do
    ip link set v$i netns "${hosts[i]}"
    on $i sh -c "hostname host$i; ip link set lo up; ip addr add 10.77.0.$i/24 dev v$i; ip link set v$i up"
done
for i in 1 2; do on $i "${@:2}" & job[i]=$!; done
wait "${job[1]}"
wait "${job[2]}"
"""
UNSHARE = [
    "unshare", "--user", "--map-root-user", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child",
    "bash", "-c", TWO_HOSTS, "bash",
]  # fmt: skip


def page_command(word: str) -> list[str]:
    """The command of docs/scaling.md that holds `word`, for tiny machines: half the processes of a host, or one."""
    [line] = [line for line in PAGE.replace("\\\n", " ").splitlines() if line.startswith("torchrun ") and word in line]
    return shlex.split(line)[1:]


@pytest.mark.slow
def test_two_hosts_meet_over_a_network_and_train(text: Path, tmp_path: Path) -> None:
    """The page's command on two hosts with a network, a name and an address of their own, one process each."""
    log, folder = tmp_path / "log", text / "base_checkpoints"
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n10.77.0.1 host1\n10.77.0.2 host2\n")
    probe = subprocess.run([*UNSHARE, str(tmp_path / "hosts"), "true"], capture_output=True, text=True, timeout=30)
    if probe.returncode:
        pytest.skip(f"this kernel lets nobody make network namespaces: {probe.stderr.strip()[-200:]}")
    options = [*TINY, "--num_iterations=4", "--save_every=2"]
    command = ["--nproc_per_node=1" if a.startswith("--nproc") else a for a in page_command("--nnodes=2")]
    command[command.index("configs/transformer_d20.py")] = TINY_CONFIG
    launch = [*UNSHARE, str(tmp_path / "hosts"), sys.executable, "-m", "torch.distributed.run", *command, *options]
    job = subprocess.Popen(
        [*launch, "--model_tag=hosts"], cwd=REPO_DIR, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log.open("a"),
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert wait(job, log) == 0, log.read_text()[-3000:]
    assert "2 rank(s)" in log.read_text()
    together(2, base_train.main, [TINY_CONFIG, *options, "--model_tag=one_host"], log=log)
    close(rows(folder / "one_host/metrics.jsonl"), rows(folder / "hosts/metrics.jsonl"))


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_rank_that_is_killed_ends_the_job_and_resume_goes_on(text: Path, tmp_path: Path, parallel: str) -> None:
    log, folder = tmp_path / "log", text / "base_checkpoints"
    options = [*TINY, "--num_iterations=60", "--save_every=4", "--eval_every=-1", "--total_batch_size=64", "--resume"]
    options += [f"--parallel={parallel}"]
    job = torchrun([*options, "--model_tag=killed"], log, "--standalone", "--nproc_per_node=2")
    until_saved(folder / "killed", job, log)
    [victim] = [p for p in psutil.Process(job.pid).children() if p.environ().get("RANK") == "1"]
    victim.send_signal(signal.SIGKILL)
    assert wait(job, log, 120) != 0
    said = log.read_text()
    assert re.search(r"^error: rank 0 (has lost another rank|was told to stop).* --resume to go on", said, re.MULTILINE)
    assert "Signal 9 (SIGKILL) received" in said
    killed = folder / "killed"
    assert max(rows(killed / "metrics.jsonl")) < 60
    together(2, base_train.main, [*options, "--model_tag=killed"], log=log)
    together(2, base_train.main, [*options, "--model_tag=whole"], log=log)
    again, whole = rows(killed / "metrics.jsonl"), rows(folder / "whole/metrics.jsonl")
    assert sorted(again) == sorted(whole) == list(range(1, 61))
    assert [again[s]["loss"] for s in again] == [whole[s]["loss"] for s in again]  # bit for bit


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has died")
def test_ranks_end_with_a_torchrun_that_is_killed(text: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    options = [*TINY, "--num_iterations=1000000", "--eval_every=-1", "--total_batch_size=64", "--model_tag=endless"]
    job = torchrun([*options, "--save_every=4"], log, "--standalone", "--nproc_per_node=2")
    until_saved(text / "base_checkpoints" / "endless", job, log)
    ranks = psutil.Process(job.pid).children()
    job.kill()
    job.wait()
    _, left = psutil.wait_procs(ranks, 60)
    for p in left:
        p.kill()
    assert len(ranks) == 2 and not left
    assert re.search(r"^error: rank [01] (was told to stop|has lost another rank)", log.read_text(), re.MULTILINE)


@pytest.mark.slow
def test_the_launcher_ends_as_its_ranks_do_and_adds_no_traceback(text: Path, tmp_path: Path) -> None:
    log, endless = tmp_path / "log", [*TINY, "--num_iterations=1000000", "--eval_every=-1", "--total_batch_size=64"]

    def start(*options: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "nanochat.launch", "2", "scripts.base_train", *options]
        return subprocess.Popen(command, cwd=REPO_DIR, stdout=log.open("w"), stderr=subprocess.STDOUT)

    assert wait(start("--detph=2"), log) == 2
    assert "did you mean 'depth'" in log.read_text() and "Traceback" not in log.read_text()
    for number, code, said in (
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGKILL, 137, "was ended by SIGKILL: start it again with --resume"),
    ):
        job = start(*endless, "--run=dummy", "--save_every=4", f"--model_tag=by_{number}")
        until_saved(text / "base_checkpoints" / f"by_{number}", job, log)
        if number == signal.SIGINT:  # to the launcher, as by Ctrl-C; ranks are in sessions of their own
            job.send_signal(number)
        else:
            psutil.Process(job.pid).children()[0].send_signal(number)
        assert wait(job, log, 120) == code, log.read_text()
        assert said in log.read_text() and "Traceback" not in log.read_text()
