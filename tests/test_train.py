"""The loop and base_train: accumulation by tokens, guards, schedules, resume, errors before any work."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from nanochat import train
from nanochat.common import REPO_DIR
from nanochat.config import UserError, load_config
from nanochat.device import Ranks
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW
from nanochat.run import Run
from nanochat.shards import write_shard
from nanochat.tokenizer import Tokenizer
from nanochat.train import Loop, Step
from scripts import base_train
from scripts.base_train import BaseTrainConfig

TINY = GPTConfig(n_layer=2, d_model=32, n_head=2, vocab_size=50, seq_len=16)
LRS = {"matrix": 0.02, "embedding": 0.3, "unembedding": 0.01, "scalar": 0.05}
SMALL = [
    "--depth=2", "--d_model=32", "--head_dim=16", "--max_seq_len=32", "--device_batch_size=2", "--total_batch_size=128",
    "--eval_tokens=512", "--softcap=0", "--model_tag=t", "--device=cpu", "--log_every=100",
]  # fmt: skip


@pytest.fixture
def text(base: Path) -> Path:
    """A base folder with a few documents and a small tokenizer."""
    rng = random.Random(0)
    words = ["river", "town", "stone", "bridge", "north", "of", "the", "a", "1987", "founded", "is", "was", "."]
    docs = [" ".join(rng.choices(words, k=rng.randint(5, 120))) for _ in range(300)]
    for i in range(3):
        write_shard(base / "base_data" / f"shard_{i:05d}.parquet", docs[i * 100 : (i + 1) * 100], "test")
    Tokenizer.train(iter(docs), 320).save(base / "tokenizer")
    return base


def make_loop(tmp_path: Path, **options) -> Loop:
    model = GPT(TINY)
    model.init_weights(0)
    optimizer = MuonAdamW(model, model.param_groups(), LRS)
    run = Run("base", "t", torch.device("cpu"), torch.float32, Ranks(), tmp_path / "t")
    return Loop(run, model, optimizer, **{"num_iterations": 3, **options})


def rows(path: Path) -> dict[int, dict]:
    return {r["step"]: r for r in map(json.loads, path.read_text().splitlines())}


def test_accumulation_weighs_tokens_not_rows(tmp_path: Path) -> None:
    ids = torch.randint(0, 50, (4, 16), generator=torch.Generator().manual_seed(0))
    targets = ids.roll(-1, 1)
    targets[0, 2:] = -1  # a row with few targets
    weights = []
    for split in ([4], [1, 3], [3, 1], [1, 1, 1, 1]):
        loop = make_loop(tmp_path)
        for step in loop:
            if step.last:
                break
            for x, y in zip(ids.split(split), targets.split(split), strict=True):
                loop.backward(loop.model(x, y, loss_reduction="sum"), int((y >= 0).sum()))
            loop.update()
        weights.append((loop.smooth_loss, loop.model.blocks[0].mlp.c_fc.weight.detach()))
    for loss, weight in weights[1:]:
        assert loss == pytest.approx(weights[0][0], rel=1e-5)
        torch.testing.assert_close(weight, weights[0][1], rtol=1e-3, atol=1e-5)


def test_a_step_without_any_target_changes_nothing_and_is_finite(tmp_path: Path) -> None:
    loop = make_loop(tmp_path, num_iterations=1)
    before = [p.detach().clone() for p in loop.model.parameters()]
    ids = torch.zeros(2, 16, dtype=torch.long)
    for step in loop:
        if step.last:
            break
        loop.backward(loop.model(ids, torch.full_like(ids, -1), loss_reduction="sum"), 0)
        loop.update()
    assert loop.last_row["loss"] == 0 and loop.skipped == 0
    assert all(torch.equal(p, q) for p, q in zip(loop.model.parameters(), before, strict=True))


def test_a_loss_that_is_not_finite_is_skipped_then_stops_the_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    loop = make_loop(tmp_path, num_iterations=50)
    before = [p.detach().clone() for p in loop.model.parameters()]
    with pytest.raises(UserError, match=r"10 steps in a row without a finite loss, at step 9.*lower --matrix_lr"):
        for _ in loop:
            loop.backward(loop.model(torch.zeros(1, 4, dtype=torch.long)).sum() * float("nan"), 4)
            loop.update()
    assert loop.skipped == 10 and "update skipped (10 in a row)" in capsys.readouterr().out
    assert all(torch.equal(p, q) for p, q in zip(loop.model.parameters(), before, strict=True))


def test_gradients_are_clipped_to_the_norm(tmp_path: Path) -> None:
    loop = make_loop(tmp_path, grad_clip=0.5)
    ids = torch.randint(0, 50, (4, 16))
    loop.backward(1e3 * loop.model(ids, ids, loss_reduction="sum"), 4)
    _, norm = loop._gather()
    grads = [m.grads for m in loop.optimizer.matrices] + [s.grad for s in loop.optimizer.slices]
    assert sum(g.numel() for g in grads) == sum(p.numel() for p in loop.model.parameters())
    after = torch.stack([g.norm() for g in grads]).norm()
    assert norm > 100 and after.item() == pytest.approx(0.5, rel=1e-4)


def test_steps_are_due_as_documented() -> None:
    assert [n for n in range(11) if Step(n, 10, False).due(4)] == [4, 8, 10]
    assert [n for n in range(11) if Step(n, 10, False).due(0)] == [10]
    assert not any(Step(n, 10, False).due(-1) for n in range(11))


def test_running_out_of_memory_names_the_key_and_the_value() -> None:
    with pytest.raises(UserError, match="--device_batch_size=4 \\(now 8"), train.memory_advice(8, 512):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(UserError, match="--max_seq_len=256 \\(now 512"), train.memory_advice(1, 512):
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="another"), train.memory_advice(1, 512):
        raise RuntimeError("another fault")


def test_base_train_lowers_the_loss_and_writes_what_it_says(text: Path) -> None:
    base_train.main([*SMALL, "--num_iterations=60", "--eval_every=20", "--save_every=20"])
    folder = text / "base_checkpoints" / "t"
    metrics = rows(folder / "metrics.jsonl")
    assert sorted(metrics) == list(range(61))
    assert metrics[60]["val_bpb"] < 0.85 * metrics[0]["val_bpb"]
    assert {"loss", "lr_scale", "grad_norm", "tokens_per_s", "mfu", "seconds"} <= set(metrics[5])
    assert sorted(p.name for p in folder.glob("step_*")) == ["step_000040", "step_000060"]
    assert json.loads((text / "report" / "base_training.json").read_text())


def test_a_used_folder_is_not_overwritten(text: Path) -> None:
    base_train.main([*SMALL, "--num_iterations=2", "--eval_every=-1"])
    with pytest.raises(UserError, match="holds a run at step 2: add --resume"):
        base_train.main([*SMALL, "--num_iterations=2", "--eval_every=-1"])


OLD_FILE = """depth = 20
block_pattern = ["T"] * 12 + ["M"] * 8
mamba_d_state = 16
mamba_d_conv = 4
mamba_expand = 2
mamba_use_mlp = False
max_seq_len = 2048
device_batch_size = 4
total_batch_size = 524288
target_param_data_ratio = 20
embedding_lr = 0.2
unembedding_lr = 0.004
matrix_lr = 0.02
weight_decay = 0.0
grad_clip = 1.0
init_lr_frac = 0.02
"""


def test_an_old_nanochat_turbo_file_trains_its_stack(text: Path, tmp_path: Path) -> None:
    """The file unchanged; only width and lengths are made tiny on the command line."""
    path = tmp_path / "hybrid_early_t_late_m_d20.py"
    path.write_text(OLD_FILE)
    options = [o for o in SMALL if not o.startswith("--depth")]
    base_train.main([str(path), *options, "--num_iterations=3", "--eval_every=0"])
    folder = text / "base_checkpoints" / "t"
    meta = json.loads((folder / "step_000003" / "meta.json").read_text())
    assert meta["model_config"]["block_pattern"] == ["attn"] * 12 + ["mamba"] * 8
    assert rows(folder / "metrics.jsonl")[3]["loss"] < rows(folder / "metrics.jsonl")[1]["loss"]


@pytest.mark.parametrize("pattern", ["T", "M2,G", "M,T"])
def test_resume_continues_bit_identically(text: Path, pattern: str) -> None:
    options = [*SMALL, f"--block_pattern={pattern}", "--gdn_head_dim=8", "--num_iterations=12"]
    options += ["--eval_every=4", "--save_every=5"]
    base_train.main([*options, "--model_tag=whole"])
    base_train.main([*options, "--model_tag=cut"])
    cut = text / "base_checkpoints" / "cut"
    newest = cut / "step_000012"
    for p in newest.iterdir():
        p.unlink()
    newest.rmdir()
    base_train.main([*options, "--model_tag=cut", "--resume"])
    whole, again = rows(text / "base_checkpoints/whole/metrics.jsonl"), rows(cut / "metrics.jsonl")
    assert sorted(again) == sorted(whole)
    for step, row in whole.items():
        for key in ("loss", "grad_norm", "val_bpb", "tokens"):
            assert again[step].get(key) == row.get(key), (step, key)


def test_a_run_resumes_only_with_its_own_model_and_tokenizer(text: Path) -> None:
    options = [*SMALL, "--num_iterations=2", "--eval_every=-1", "--resume"]
    base_train.main(options)
    with pytest.raises(UserError, match=r"another model_config \(mlp_ratio 4, now 2\)") as e:
        base_train.main([*options, "--mlp_ratio=2"])
    Tokenizer.train(iter(["another text " * 50]), 290).save(text / "tokenizer")
    with pytest.raises(UserError, match="another"):
        base_train.main(options)
    assert "--model_tag" in str(e.value)


def test_a_second_run_in_one_folder_is_refused_until_the_first_has_ended_or_was_killed(tmp_path: Path) -> None:
    hold = "import pathlib, sys; from nanochat.stepfolder import claim; f = claim(pathlib.Path(sys.argv[1])); print(1)"
    command = [sys.executable, "-uc", f"{hold}; sys.stdin.read()", str(tmp_path / "t")]
    with subprocess.Popen(command, cwd=REPO_DIR, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout is not None and first.stdout.readline() == b"1\n"
        metrics = tmp_path / "t" / "metrics.jsonl"
        metrics.write_text('{"step": 1}\n')
        with pytest.raises(UserError, match=r"another run trains in .*--model_tag"):
            make_loop(tmp_path).begin(True)
        assert metrics.read_text() == '{"step": 1}\n'
        first.kill()
    assert make_loop(tmp_path).begin(True) == {} and not metrics.read_text()
    assert make_loop(tmp_path).begin(False) == {}  # one process may begin again


def test_resume_where_there_is_no_checkpoint_says_that_the_run_starts_anew(tmp_path: Path, capsys) -> None:
    make_loop(tmp_path).begin(False)
    assert not capsys.readouterr().out
    make_loop(tmp_path).begin(True)
    assert capsys.readouterr().out == f"--resume: no checkpoint in {tmp_path / 't'}, so this run starts anew\n"


def start(arguments: list[str], log: Path) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "scripts.base_train", *arguments]
    return subprocess.Popen(command, cwd=REPO_DIR, env=env, stdout=log.open("a"), stderr=subprocess.STDOUT)


@pytest.mark.slow
def test_losses_after_kill_9_at_random_moments_are_those_of_an_uninterrupted_run(text: Path, tmp_path: Path) -> None:
    options = [*SMALL, "--num_iterations=400", "--eval_every=100", "--save_every=3", "--resume"]
    base_train.main([*options, "--model_tag=whole"])
    whole = rows(text / "base_checkpoints/whole/metrics.jsonl")
    rng, log, metrics = random.Random(0), tmp_path / "log", text / "base_checkpoints/killed/metrics.jsonl"
    kills, reached = 0, 0
    while kills < 20:
        process = start([*options, "--model_tag=killed"], log)
        size = metrics.stat().st_size if metrics.exists() else 0
        deadline = time.monotonic() + 120
        while not metrics.exists() or metrics.stat().st_size <= size:  # until it trains
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
            size = min(size, metrics.stat().st_size) if metrics.exists() else 0
            time.sleep(0.002)
        time.sleep(rng.random() * 0.25)
        if process.poll() is None:
            kills += 1
        process.send_signal(signal.SIGKILL)
        process.wait()
        reached = max(rows_so_far(metrics))
        if reached >= 390:
            break
    assert kills >= 20 or reached >= 390
    last = start([*options, "--model_tag=killed"], log)
    assert last.wait(timeout=600) == 0, log.read_text()[-2000:]
    assert "damaged" not in log.read_text()
    killed = rows(metrics)
    assert sorted(killed) == sorted(whole)
    for step, row in whole.items():
        for key in ("loss", "grad_norm", "val_bpb", "tokens"):
            assert killed[step].get(key) == row.get(key), (step, key)


def torchrun(n: int, arguments: list[str]) -> subprocess.CompletedProcess:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launch, "-m", "scripts.base_train", "--", *arguments]
    return subprocess.run(command, cwd=REPO_DIR, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_two_ranks_train_save_and_resume_bit_identically(text: Path) -> None:
    options = [*SMALL, "--num_iterations=9", "--eval_every=3", "--save_every=4", "--resume"]
    for tag in ("whole", "cut"):
        done = torchrun(2, [*options, f"--model_tag={tag}"])
        assert done.returncode == 0, done.stderr[-2000:]
    cut = text / "base_checkpoints" / "cut"
    for p in (cut / "step_000009").iterdir():
        p.unlink()
    (cut / "step_000009").rmdir()
    done = torchrun(2, [*options, "--model_tag=cut"])
    assert done.returncode == 0 and "resuming cut at step 8" in done.stdout, done.stderr[-2000:]
    whole, again = rows(text / "base_checkpoints/whole/metrics.jsonl"), rows(cut / "metrics.jsonl")
    assert sorted(whole) == sorted(again) == list(range(10))
    for step, row in whole.items():
        for key in ("loss", "grad_norm", "val_bpb", "tokens"):
            assert again[step].get(key) == row.get(key), (step, key)
    assert whole[9]["val_bpb"] < whole[0]["val_bpb"]
    base_train.main([*options, "--model_tag=cut"])  # nothing is left to do, and one process may do it


def test_the_tracker_that_was_asked_for_gets_the_metrics(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple] = []
    fake = types.ModuleType("trackio")
    fake.init = lambda **kw: seen.append(("init", kw["name"])) or True  # pyrefly: ignore
    fake.log = lambda metrics, step: seen.append((step, metrics["loss"]))  # pyrefly: ignore
    fake.finish = lambda: seen.append(("finish",))  # pyrefly: ignore
    monkeypatch.setitem(sys.modules, "trackio", fake)
    base_train.main([*SMALL, "--num_iterations=2", "--eval_every=-1", "--track=trackio", "--run=mine"])
    assert [s[0] for s in seen] == ["init", 1, 2, "finish"] and seen[0][1] == "mine"


def test_a_tracker_that_is_not_installed_names_the_cure(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb is not installed: uv pip install wandb, or --run=dummy"):
        base_train.main([*SMALL, "--num_iterations=2", "--run=mine"])


def rows_so_far(path: Path) -> set[int]:
    """Steps recorded, without a line cut by the kill."""
    steps = {0}
    for line in path.read_text().splitlines():
        try:
            steps.add(json.loads(line)["step"])
        except json.JSONDecodeError:
            continue
    return steps


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dpeth=4"], "unknown key --dpeth: did you mean 'depth'?"),
        (["--depth=four"], "--depth=four: expected int"),
        (["configs/tiny_transfromer.py"], "did you mean configs/tiny_transformer.py?"),
        (["--depth=0"], "depth=0"),
        (["--num_iterations=-1", "--target_param_data_ratio=0"], "nothing says how long to train"),
        (["--total_batch_size=100"], "use --total_batch_size=128"),
        (["--dtype=float8"], "expected auto|float32|bfloat16"),
        (["--device=tpu9000"], "is no torch device"),
        (["--block_pattern=TX"], "unknown block 'TX'"),
        (["--warmup_ratio=0.9", "--warmdown_ratio=0.9"], "must lie in 0..1"),
        (["--n_head=3"], "d_model=32 is no multiple of n_head=3"),
        (["--kernels=quick"], "expected auto|fast|reference"),
        (["--head_dim=0"], "head_dim=0"),
        (["--d_model=-8"], "d_model=-8"),
        (["--window=-1"], "window=-1"),
        (["--rope_base=0"], "rope_base=0"),
        (["--softcap=-1"], "softcap=-1"),
        (["--n_kv_head=-1"], "n_kv_head=-1"),
    ],
)
def test_what_cannot_work_is_one_line_before_any_work(text: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as e:
        base_train.main([*SMALL, *arguments])
    assert message in str(e.value) and "\n" not in str(e.value)
    assert not (text / "base_checkpoints").exists()


def test_a_missing_dataset_or_tokenizer_names_the_command(base: Path) -> None:
    with pytest.raises(UserError, match=r"scripts\.tok_train"):
        base_train.main(SMALL)


def test_an_error_is_one_line_and_exit_code_2(base: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "scripts.base_train", "--depht=4"], cwd=REPO_DIR, capture_output=True, text=True
    )
    assert (
        done.returncode == 2
        and done.stderr == "error: unknown key --depht: did you mean 'depth'?\n"
        and not done.stdout
    )


def test_shipped_configs_build_on_the_meta_device() -> None:
    for path in sorted((REPO_DIR / "configs").glob("*.py")):
        cfg = load_config(BaseTrainConfig, [str(path)])
        with torch.device("meta"):
            model = GPT(cfg.gpt_config(65536))
        assert model.n_params()["total"] > 0 and model.flops_per_token() > 0
        cfg.grad_accum(1), cfg.iterations(model, cfg.total_batch_size)


def test_d20_has_the_parameters_of_nanochat() -> None:
    with torch.device("meta"):
        model = GPT(load_config(BaseTrainConfig, [str(REPO_DIR / "configs/transformer_d20.py")]).gpt_config(65536))
    assert model.n_params()["total"] == 560_988_160
