"""Checkpoints come back bit for bit; no kill, full disk or damaged file goes unnoticed or costs a saved step."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from nanochat import checkpoint, stepfolder
from nanochat.checkpoint import (
    checkpoint_dir,
    list_steps,
    load_checkpoint,
    load_model,
    newest_whole,
    restore_rng,
    rng_state,
    save_checkpoint,
    verify,
)
from nanochat.config import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.tensorfile import DTYPES, pack, read_tensors, safetensors_bytes, unpack, write_file
from nanochat.tokenizer import Tokenizer

STATE = {"cursor": {"shard": 3, "row": 7}, "buffer": np.arange(6, dtype=np.uint16), "rng": torch.arange(9).byte()}


def save(directory: Path, step: int, size: int = 10, **changes) -> Path:
    """A small checkpoint whose contents follow from its step."""
    parts = {
        "model": {"w": torch.full((size,), float(step)), "b": torch.full((3, 2), step, dtype=torch.bfloat16)},
        "optim": {"w.momentum": torch.full((size,), -float(step))},
        "state": {**STATE, "step": step},
        "meta": {"val_bpb": 1.5, "note": f"step {step}"},
    }
    return save_checkpoint(directory, step, **{**parts, **changes})


def check_content(directory: Path, step: int, size: int = 10) -> None:
    c = load_checkpoint(directory, step)
    assert c.step == c.meta["step"] == c.state["step"] == step
    assert c.meta["note"] == f"step {step}"
    assert torch.equal(c.model["w"], torch.full((size,), float(step)))
    assert torch.equal(c.optim["w.momentum"], torch.full((size,), -float(step)))


# ---- what is saved comes back ----


def test_a_save_comes_back_bit_for_bit_and_leaves_only_its_folder(tmp_path):
    folder = save(tmp_path, 100)
    assert sorted(p.name for p in folder.iterdir()) == [
        "manifest.json",
        "meta.json",
        "model.safetensors",
        "optim_rank0.safetensors",
        "state_rank0.json",
        "state_rank0.safetensors",
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "step_000100"]
    c = load_checkpoint(tmp_path)
    assert c.meta == {"val_bpb": 1.5, "note": "step 100", "step": 100, "world_size": 1}
    assert (
        torch.equal(c.model["b"], torch.full((3, 2), 100, dtype=torch.bfloat16))
        and c.model["b"].dtype == torch.bfloat16
    )
    assert c.state["cursor"] == STATE["cursor"]
    assert isinstance(c.state["buffer"], np.ndarray) and c.state["buffer"].dtype == np.uint16
    assert np.array_equal(c.state["buffer"], STATE["buffer"]) and torch.equal(c.state["rng"], STATE["rng"])


def test_only_what_is_wanted_is_read(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "step_000001" / "optim_rank0.safetensors").unlink()
    c = load_checkpoint(tmp_path, 1, want=("model",))
    assert c.model is not None and c.optim is None and c.state is None
    with pytest.raises(UserError, match=r"optim_rank0\.safetensors is missing"):
        load_checkpoint(tmp_path, 1)
    with pytest.raises(ValueError, match="weights"):
        load_checkpoint(tmp_path, 1, want=("weights",))


def test_a_checkpoint_without_optimizer_says_so_by_none(tmp_path):
    save(tmp_path, 1, optim=None)
    assert load_checkpoint(tmp_path).optim is None


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
def test_every_dtype_reads_back_the_same_here_and_in_the_safetensors_library(dtype, tmp_path):
    g = torch.Generator().manual_seed(0)
    width = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (4, 6 * width), generator=g, dtype=torch.uint8)
    tensors = {"wide": torch.ones(3, dtype=torch.float64), "x": raw.view(dtype), "zero": torch.zeros((), dtype=dtype)}
    tensors |= {"none": torch.zeros(0, 3, dtype=dtype), "t": raw.view(dtype).t()}  # empty, and not contiguous
    made = write_file(tmp_path / "x.safetensors", safetensors_bytes(tensors))
    assert made["size"] == (tmp_path / "x.safetensors").stat().st_size
    for read in (read_tensors(tmp_path / "x.safetensors", "cpu"), load_file(tmp_path / "x.safetensors")):
        assert set(read) == set(tensors)
        for name, t in tensors.items():
            assert read[name].dtype == t.dtype and read[name].shape == t.shape
            same = [x.contiguous().reshape(-1).view(torch.uint8) for x in (read[name], t)]
            assert torch.equal(*same), name


def test_tied_tensors_stay_tied_and_overlapping_ones_keep_their_values(tmp_path):
    base = torch.arange(12.0)
    tensors = {"a": base, "b": base, "head": base[:4], "tail": base[2:8], "rows": base.view(3, 4)}
    write_file(tmp_path / "x", safetensors_bytes(tensors))
    read = read_tensors(tmp_path / "x", "cpu")
    assert all(torch.equal(read[k], v) for k, v in tensors.items())
    read["a"][0] = 99
    assert read["b"][0] == 99 and read["head"][0] == 0
    assert (tmp_path / "x").stat().st_size < 12 * 4 * 5 + 600


def test_tensors_without_a_plain_form_are_refused_by_name(tmp_path):
    for bad in (torch.zeros(3, device="meta"), torch.eye(3).to_sparse(), torch.zeros(3, dtype=torch.complex128)):
        with pytest.raises(ValueError, match=r"block\.w is a Tensor"):
            list(safetensors_bytes({"block.w": bad}))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text().filter(lambda k: not k.startswith("__")), inner, max_size=3)
    ),
)


@settings(max_examples=100, deadline=None)
@given(json_values)
def test_any_nested_state_survives_packing_and_json(value):
    packed, tensors = pack({"v": value, "t": torch.ones(2), "inner": [np.zeros((), np.float16), (np.arange(3),)]})
    back = unpack(json.loads(json.dumps(packed)), tensors)
    assert back["v"] == value and type(back["v"]) is type(value)
    assert back["inner"][0].shape == () and back["inner"][0].dtype == np.float16
    assert np.array_equal(back["inner"][1][0], np.arange(3))


def test_state_and_meta_of_other_types_are_refused_with_their_place(tmp_path):
    for state, where in (
        ({"a": {"b": object()}}, r"state\.a\.b"),
        ({1: 2}, "key 1"),
        ({"__tensor__": 1}, "__tensor__"),
    ):
        with pytest.raises(ValueError, match=where):
            save(tmp_path, 1, state=state)
    with pytest.raises(ValueError, match="meta"):
        save(tmp_path, 1, meta={"x": np.zeros(2)})
    assert list_steps(tmp_path) == []


def test_random_generators_continue_where_they_were_saved(tmp_path):
    def draw():
        return random.random(), np.random.rand(), torch.rand(3).tolist()

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    draw()
    save(tmp_path, 1, state={"rng": rng_state()})
    expected = [draw() for _ in range(3)]
    draw()
    restore_rng(load_checkpoint(tmp_path).state["rng"])
    assert [draw() for _ in range(3)] == expected


def train(directory: Path, start: int, stop: int) -> list[float]:
    """Losses of steps start..stop-1 of a little model with dropout, resumed where start > 0, saved at the end."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.5), torch.nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    torch.manual_seed(start)
    if start:
        c = load_checkpoint(directory, start)
        model.load_state_dict(c.model)
        optimizer.load_state_dict(c.state["optimizer"] | {"state": {int(k): v for k, v in c.state["moments"].items()}})
        restore_rng(c.state["rng"])
    losses = []
    for _ in range(start, stop):
        loss = (model(torch.randn(4, 8)) - np.random.rand() - random.random()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    moments = {str(k): v for k, v in optimizer.state_dict()["state"].items()}
    state = {"rng": rng_state(), "optimizer": {**optimizer.state_dict(), "state": {}}, "moments": moments}
    save(directory, stop, model=model.state_dict(), state=state)
    return losses


def test_training_goes_on_bit_for_bit_after_a_resume(tmp_path):
    torch.manual_seed(7), np.random.seed(7), random.seed(7)
    save(tmp_path / "a", 1, model={}, state={"rng": rng_state()})
    whole = train(tmp_path / "a", 0, 10)
    restore_rng(load_checkpoint(tmp_path / "a", 1).state["rng"])
    parts = train(tmp_path / "b", 0, 4) + train(tmp_path / "b", 4, 7) + train(tmp_path / "b", 7, 10)
    assert parts == whole
    a, b = (load_checkpoint(tmp_path / x, 10).model for x in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.gpu
def test_a_gpu_s_tensors_come_back_to_the_gpu(tmp_path):
    tensors = {"w": torch.randn(5, 7, device="cuda", dtype=torch.bfloat16).t(), "b": torch.randn(3, device="cuda")}
    save(tmp_path, 1, model=tensors, optim=tensors, state={"rng": rng_state(), "t": tensors["b"]})
    c = load_checkpoint(tmp_path, 1, device="cuda")
    for k, t in tensors.items():
        assert c.model[k].device.type == "cuda" and torch.equal(c.model[k], t) and torch.equal(c.optim[k], t)
    assert c.state["t"].device.type == "cpu" and torch.equal(c.state["rng"]["cuda"], torch.cuda.get_rng_state())


# ---- which steps remain ----


def test_the_last_k_steps_remain(tmp_path):
    for step in range(10, 60, 10):
        save(tmp_path, step, keep_last=3)
    assert list_steps(tmp_path) == [30, 40, 50]
    save(tmp_path, 60, keep_last=1)
    assert list_steps(tmp_path) == [60]
    with pytest.raises(UserError, match="keep_last=0"):
        save(tmp_path, 70, keep_last=0)


def test_going_back_keeps_the_new_step_and_tells_of_later_ones(tmp_path, capsys):
    for step in (10, 20, 30):
        save(tmp_path, step, keep_last=3)
    save(tmp_path, 15, keep_last=1)
    assert list_steps(tmp_path) == [15, 20, 30]
    assert "later steps [20, 30]" in capsys.readouterr().err


def test_steps_are_ordered_by_number_beyond_six_digits(tmp_path):
    for step in (999_999, 1_000_000):
        save(tmp_path, step)
    assert list_steps(tmp_path) == [999_999, 1_000_000] and newest_whole(tmp_path) == 1_000_000


def test_no_checkpoint_and_no_such_step_are_said_plainly(tmp_path):
    with pytest.raises(UserError, match="no checkpoint in"):
        load_checkpoint(tmp_path / "absent")
    save(tmp_path, 10)
    with pytest.raises(UserError, match=r"no step 11 .* it has 10"):
        load_checkpoint(tmp_path, 11)


def test_another_number_of_processes_is_refused(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(UserError, match="saved by 1 processes, this run has 2"):
        load_checkpoint(tmp_path, 1, world_size=2)


# ---- damage ----


def damage(path: Path, how: str, at: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[: int(len(data) * at)])
    else:
        data[int(len(data) * at)] ^= 0x10
        path.write_bytes(data)


@pytest.mark.parametrize("how", ["missing", "truncated", "flipped"])
def test_damage_to_any_file_is_named_with_the_newest_good_step(how, tmp_path, capsys):
    save(tmp_path, 10, keep_last=9), save(tmp_path, 20, keep_last=9)
    whole = tmp_path / "whole"
    shutil.copytree(tmp_path / "step_000020", whole)
    for file in sorted(p.name for p in whole.iterdir()):
        damage(tmp_path / "step_000020" / file, how)
        for read in (verify, load_checkpoint):
            with pytest.raises(UserError, match=f"{file}.*newest good step .* is 10: --resume") as e:
                read(tmp_path, 20)
            assert "\n" not in str(e.value)
        assert newest_whole(tmp_path) == load_checkpoint(tmp_path).step == 10
        err = capsys.readouterr().err.splitlines()
        assert len(err) == 2 and all("passing over checkpoint step_000020" in x and file in x for x in err)
        shutil.rmtree(tmp_path / "step_000020")
        shutil.copytree(whole, tmp_path / "step_000020")
    verify(tmp_path, 20)


def test_a_flip_of_any_single_bit_is_noticed(tmp_path):
    folder = save(tmp_path, 10)
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        for at in range(0, len(data), max(1, len(data) // 60)):
            path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
            assert stepfolder.newest(tmp_path) is None, (path.name, at)
        path.write_bytes(data)
    verify(tmp_path, 10)


def test_a_file_cut_at_any_byte_is_noticed(tmp_path):
    folder = save(tmp_path, 10)
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        for size in range(0, len(data), max(1, len(data) // 60)):
            path.write_bytes(data[:size])
            assert stepfolder.newest(tmp_path) is None, (path.name, size)
        path.write_bytes(data)
    verify(tmp_path, 10)


def test_a_renamed_folder_is_not_taken_for_another_step(tmp_path):
    save(tmp_path, 10).rename(tmp_path / "step_000020")
    with pytest.raises(UserError, match="manifest"):
        verify(tmp_path, 20)


def test_nothing_whole_is_said_and_not_loaded(tmp_path, capsys):
    damage(save(tmp_path, 10) / "model.safetensors", "flipped")
    assert newest_whole(tmp_path) is None
    with pytest.raises(UserError, match="no whole checkpoint"):
        load_checkpoint(tmp_path)
    with pytest.raises(UserError, match="no other good step"):
        verify(tmp_path, 10)
    capsys.readouterr()


# ---- kills and full disks ----


def in_child(work, *args) -> int:
    """Exit code of a forked child that runs work(*args); 1 with a traceback where it raised."""
    pid = os.fork()
    if pid == 0:
        try:
            work(*args)
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die_at(event_number: int, directory: Path, work) -> None:
    """Run work(directory), but exit like a kill just before its n-th file system operation."""
    seen = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal seen
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            seen += 1
            if seen > event_number:
                os._exit(9)

    sys.addaudithook(hook)
    work(directory)


def kill_everywhere(start: Path, work, check) -> int:
    """Repeat work on copies of `start`, killed before its 1st, 2nd, ... file operation, until it comes through."""
    for n in range(10_000):
        directory = start.with_name(f"{start.name}_{n}")
        shutil.copytree(start, directory)
        code = in_child(die_at, n, directory, work)
        assert code in (0, 9)
        check(directory)
        shutil.rmtree(directory)
        if code == 0:
            return n
    raise AssertionError("never came through")


def test_a_kill_at_any_file_operation_of_a_save_leaves_a_whole_checkpoint(tmp_path, capsys):
    start = tmp_path / "run"
    save(start, 10), save(start, 20)

    def check(directory):
        newest = newest_whole(directory)
        assert newest in (20, 30)
        for step in list_steps(directory):
            check_content(directory, step)
        save(directory, 40)  # the next run clears up and goes on
        assert list_steps(directory)[-1] == 40 and len(list_steps(directory)) == 2
        assert not [p.name for p in directory.iterdir() if p.name.startswith((".tmp", ".old", ".trash"))]

    points = kill_everywhere(start, lambda d: save(d, 30), check)
    assert points > 20
    assert "passing over" not in capsys.readouterr().err


def test_a_kill_while_saving_a_step_again_leaves_the_old_or_the_new_one(tmp_path, capsys):
    start = tmp_path / "run"
    save(start, 20)

    def check(directory):
        assert newest_whole(directory) == 20 and list_steps(directory) == [20]
        note = load_checkpoint(directory, 20).meta["note"]
        assert note in ("step 20", "again")
        save(directory, 20, meta={"note": "third"})
        assert load_checkpoint(directory).meta["note"] == "third"
        assert sorted(p.name for p in directory.iterdir()) == [".lock", "step_000020"]

    kill_everywhere(start, lambda d: save(d, 20, meta={"note": "again"}), check)
    assert "passing over" not in capsys.readouterr().err


def test_a_kill_while_clearing_up_after_a_kill_loses_nothing(tmp_path):
    start = tmp_path / "run"
    save(start, 20)
    shutil.copytree(start / "step_000020", start / ".tmp-step_000020")
    (start / "step_000020").rename(start / ".old-step_000020")  # killed between the two renames

    def check(directory):
        check_content(directory, newest_whole(directory))

    kill_everywhere(start, lambda d: save(d, 30), check)


def test_everything_is_on_the_disk_before_the_rename_that_makes_it_count(tmp_path, monkeypatch):
    log = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (log.append(str(Path(f"/proc/self/fd/{fd}").readlink())), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (log.append((Path(a).name, Path(b).name)), replace(a, b))[1])
    folder = save(tmp_path, 10)
    rename = log.index((".tmp-step_000010", "step_000010"))
    tmp = tmp_path / ".tmp-step_000010"
    assert {str(tmp / p.name) for p in folder.iterdir()} | {str(tmp)} <= set(log[:rename])
    assert str(tmp_path) in log[rename:] and str(tmp_path.parent) in log[rename:]


def save_forever(directory: Path, said: int) -> None:
    for step in range(1, 1_000_000):
        save(directory, 10 * (step // 2), size=20_000)  # every step twice: overwriting is hit as well
        os.write(said, f"{10 * (step // 2)}\n".encode())


@pytest.mark.slow
def test_a_hundred_real_kills_lose_no_step_that_was_reported_as_saved(tmp_path, capsys):
    rng = random.Random(0)
    interrupted = 0
    for _ in range(100):
        r, w = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(r)
            save_forever(tmp_path / "run", w)
        os.close(w)
        os.read(r, 1)  # the first save is done
        time.sleep(rng.uniform(0, 0.06))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        reported = [int(x) for x in (b"0" + os.read(r, 1 << 16)).split() if x]
        os.close(r)
        newest = newest_whole(tmp_path / "run")
        assert newest >= reported[-1]
        check_content(tmp_path / "run", newest, size=20_000)
        interrupted += any((tmp_path / "run").glob(".*-step_*"))
        shutil.rmtree(tmp_path / "run") if rng.random() < 0.5 else None
    assert interrupted > 20  # most kills fell into a save
    assert "passing over" not in capsys.readouterr().err


def fail_with_small_files(directory: Path, limit: int, report: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        save(directory, 20, size=100_000)
    except UserError as e:
        os.write(report, str(e).encode())


@pytest.mark.parametrize("limit", [50, 1_000, 300_000])
def test_a_disk_that_fills_up_is_reported_with_bytes_and_step_and_costs_nothing(limit, tmp_path):
    directory = tmp_path / "run"
    save(directory, 10)
    r, w = os.pipe()
    assert in_child(fail_with_small_files, directory, limit, w) == 0
    os.close(w)
    said = os.read(r, 10_000).decode()
    os.close(r)
    assert "no space left" in said and str(directory) in said and "needs 800," in said
    assert f"newest good step in {directory} is 10" in said and "\n" not in said
    assert sorted(p.name for p in directory.iterdir()) == [".lock", "step_000010"]
    check_content(directory, 10)


def test_a_save_larger_than_the_free_space_is_refused_before_writing(tmp_path, monkeypatch):
    save(tmp_path, 10)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    monkeypatch.setattr(checkpoint, "write_file", lambda *a: pytest.fail("wrote to a full disk"))
    with pytest.raises(UserError, match=r"no space left.*needs \d+ bytes, 100 are free.*is 10"):
        save(tmp_path, 20)
    assert list_steps(tmp_path) == [10]


@pytest.mark.parametrize("name", ["mkdir", "replace", "fsync", "rename"])
@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC, errno.EIO])
def test_a_refusal_of_the_disk_at_any_call_leaves_the_last_checkpoint(name, code, tmp_path, monkeypatch):
    real = getattr(os, name)
    for n in range(100):
        directory = tmp_path / str(n)
        save(directory, 10, keep_last=1)
        left = n

        def refuse(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(code, os.strerror(code), str(args[0]))
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, name, refuse)
            try:
                save(directory, 20, keep_last=1)
                done = True
            except OSError as e:
                assert code == errno.EIO and e.errno == code
                done = False
            except UserError as e:
                assert code != errno.EIO and str(directory) in str(e) and "newest good step" in str(e)
                done = False
        check_content(directory, newest_whole(directory))
        if done:
            return
    raise AssertionError("never came through")


# ---- several processes ----

TWO_RANKS = """
import sys, torch, torch.distributed as dist
from pathlib import Path
from nanochat.checkpoint import load_checkpoint, save_checkpoint
from nanochat.config import UserError
dist.init_process_group("gloo")
rank, directory = dist.get_rank(), Path(sys.argv[1])
def save(step, own):
    return save_checkpoint(directory, step, model={"w": torch.full((4,), float(rank))}, optim={"m": own},
                           state={"rank": rank}, meta={"rank": rank}, rank=rank, world_size=2)
save(10, torch.full((3,), float(rank)))
c = load_checkpoint(directory, rank=rank, world_size=2)
assert c.meta == {"rank": 0, "step": 10, "world_size": 2} and c.state == {"rank": rank}
assert c.model["w"].tolist() == [0.0] * 4 and c.optim["m"].tolist() == [rank] * 3
try:
    save(20, torch.zeros(3, device="meta" if rank else "cpu"))
    raise SystemExit("no error")
except UserError as e:
    assert rank == 0 and "rank 1" in str(e), e
except ValueError as e:
    assert rank == 1, e
save(30, torch.zeros(3))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_save_their_own_parts_and_fail_together(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO_RANKS)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run = subprocess.run([*command, script, tmp_path / "run"], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert list_steps(tmp_path / "run") == [10, 30]
    names = {p.name for p in (tmp_path / "run" / "step_000010").iterdir()}
    assert {"optim_rank0.safetensors", "optim_rank1.safetensors", "state_rank0.json", "state_rank1.json"} <= names
    (tmp_path / "run" / "step_000010" / "optim_rank1.safetensors").unlink()
    with pytest.raises(UserError, match=r"optim_rank1\.safetensors is missing"):
        verify(tmp_path / "run", 10)


def test_more_ranks_than_processes_is_a_mistake_of_the_caller(tmp_path):
    with pytest.raises(ValueError, match="init_ranks"):
        save(tmp_path, 1, world_size=2)


# ---- models ----


@pytest.fixture
def home(base: Path) -> Path:
    """A NANOCHAT_BASE_DIR with a tokenizer."""
    Tokenizer.train(["the cat sat on the mat. " * 20], 300).save(base / "tokenizer")
    return base


def save_model(source: str, tag: str, step: int, seed: int = 0, **meta) -> GPT:
    tokenizer = Tokenizer.load()
    config = {"n_layer": 2, "d_model": 32, "n_head": 2, "vocab_size": tokenizer.vocab_size, "seq_len": 64}
    model = GPT(GPTConfig(**config))
    model.init_weights(seed)
    meta = {"model_config": config, "tokenizer_hash": tokenizer.hash, **meta}
    save_checkpoint(checkpoint_dir(source, tag), step, model=model.state_dict(), optim=None, state={}, meta=meta)
    return model


def test_a_loaded_model_gives_the_logits_of_the_saved_one(home):
    model = save_model("base", "d2", 5)
    loaded, tokenizer, meta = load_model("base", "cpu", dtype="float32", kernels="reference")
    ids = torch.tensor([tokenizer.encode("the cat sat")])
    assert torch.equal(loaded(ids), model(ids)) and not loaded.training and meta["step"] == 5
    assert all(p.requires_grad for p in loaded.parameters())


def test_the_tag_saved_last_is_taken_and_named(home, capsys):
    for tag, step, seed in (("d4", 9, 1), ("d2", 5, 2), ("d8", 7, 3)):
        save_model("sft", tag, step, seed)
    assert load_model("chatsft", "cpu")[2]["step"] == 7
    assert "d8" in capsys.readouterr().err
    damage(checkpoint_dir("sft", "d8") / "step_000007" / "model.safetensors", "flipped")
    assert load_model("sft", "cpu")[2]["step"] == 5
    assert "passing over checkpoint step_000007" in capsys.readouterr().err
    with pytest.raises(UserError, match="sha256"):
        load_model("sft", "cpu", "d8", 7)
    assert load_model("sft", "cpu", "d4")[2]["step"] == 9


def test_what_is_not_there_is_said_with_what_is(home):
    with pytest.raises(UserError, match="no whole checkpoint"):
        load_model("base", "cpu")
    save_model("base", "d20", 5)
    with pytest.raises(UserError, match=r"trained tags of base: d20; did you mean 'd20'"):
        load_model("base", "cpu", "d2")
    with pytest.raises(UserError, match=r"no step 6 .* it has 5"):
        load_model("base", "cpu", "d20", 6)
    with pytest.raises(UserError, match="did you mean 'base'"):
        load_model("bas", "cpu")
    for tag in ("", "../x", "a/b", ".", "/etc"):
        with pytest.raises(UserError, match="plain folder name"):
            checkpoint_dir("base", tag)


def test_another_tokenizer_is_refused(home):
    save_model("base", "d2", 5)
    Tokenizer.train(["another text altogether, of other words " * 20], 300).save(home / "tokenizer")
    with pytest.raises(UserError, match="trained with tokenizer"):
        load_model("base", "cpu")


def test_configs_and_weights_that_do_not_fit_are_refused_in_one_line(home):
    config = {"n_layer": 2, "d_model": 32, "n_head": 2, "vocab_size": Tokenizer.load().vocab_size}
    for change, message in (
        ({"n_layers": 2}, "n_layers.*did you mean 'n_layer'"),
        ({"n_layer": 3}, "weights and model_config do not fit.*Missing key"),
        ({"d_model": 64}, "weights and model_config do not fit.*size mismatch"),
    ):
        save_model("base", "d2", 5, model_config={**config, **change})
        with pytest.raises(UserError, match=message) as e:
            load_model("base", "cpu")
        assert "\n" not in str(e.value)
    save_model("base", "d2", 5, model_config=None)
    with pytest.raises(UserError, match="no model_config"):
        load_model("base", "cpu")
