"""mid_train and chat_sft: every backbone, masks, resume, what does not fit, what the checkpoint decides."""

import itertools
import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat import device, finetune
from nanochat.chat_loader import ConversationLoader, fixed_rows, survey
from nanochat.checkpoint import checkpoint_dir, load_checkpoint, load_model, save_checkpoint
from nanochat.common import REPO_DIR
from nanochat.config import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.plots import plot_metrics, read_metrics
from nanochat.shards import write_shard
from nanochat.tokenizer import Tokenizer
from scripts import base_train, chat_sft, mid_train
from scripts.mid_train import MidTrainConfig

BASE = [
    "--depth=2", "--d_model=32", "--head_dim=16", "--max_seq_len=64", "--device_batch_size=2", "--total_batch_size=256",
    "--eval_every=-1", "--softcap=0", "--device=cpu", "--num_iterations=3", "--mamba_d_state=4", "--mamba2_d_state=8",
    "--mamba2_head_dim=16", "--gdn_head_dim=16", "--model_tag=t", "--dtype=float32",
]  # fmt: skip
CHAT = ["--device=cpu", "--dtype=float32", "--eval_tokens=512", "--log_every=100", "--model_tag=t"]
PATTERNS = ["T", "M", "M2", "G", "M,T"]
WORDS = [
    "river",
    "town",
    "stone",
    "bridge",
    "north",
    "of",
    "the",
    "a",
    "what",
    "is",
    "who",
    "are",
    "you",
    "1",
    "2",
    "+",
]


def make_chats(path: Path, n: int = 120, seed: int = 0) -> Path:
    """Conversations that a tiny model can learn: the answer repeats the question's first word."""
    rng = random.Random(seed)
    with path.open("w") as f:
        for _ in range(n):
            words = rng.choices(WORDS, k=rng.randint(1, 5))
            chat = [
                {"role": "user", "content": " ".join(words)},
                {"role": "assistant", "content": f"It is {words[0]}."},
            ]
            f.write(json.dumps({"messages": chat}) + "\n")
    return path


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """No measuring of the machine, and no pictures but where a test asks for them: they take longer than the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "peak_flops", lambda *_: 0.0)
        for module in (base_train, finetune):
            patch.setattr(module, "plot_metrics", lambda _: [])
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base folder with text, a tokenizer, conversations and a base model of every pattern, made once."""
    folder = tmp_path_factory.mktemp("base")
    rng = random.Random(0)
    docs = [" ".join(rng.choices(WORDS, k=rng.randint(5, 80))) for _ in range(120)]
    for i in range(2):
        write_shard(folder / "base_data" / f"shard_{i:05d}.parquet", docs[i * 60 : (i + 1) * 60], "test")
    Tokenizer.train(iter(docs), 300).save(folder / "tokenizer")
    make_chats(folder / "chats.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        for pattern in PATTERNS:
            base_train.main([*BASE, f"--block_pattern={pattern}", f"--model_tag={pattern}"])
    return folder


@pytest.fixture
def pretrained(made: Path, base: Path) -> Path:
    """A copy of it as this test's own; the attention model is `t`."""
    shutil.copytree(made / "tokenizer", base / "tokenizer")
    shutil.copytree(made / "base_checkpoints" / "T", base / "base_checkpoints" / "t")
    shutil.copy(made / "chats.jsonl", base)
    return base


def rows(path: Path) -> dict[int, dict]:
    return {r["step"]: r for r in read_metrics(path)}


def chats(folder: Path) -> str:
    return f"--tasks={folder / 'chats.jsonl'}"


class Listed(list):
    """A task of the conversations in a list."""


def chat(*texts: str) -> dict[str, Any]:
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]}


def tokenizer() -> Tokenizer:
    return Tokenizer.train(iter([" ".join(WORDS) * 20]), 290)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_base_mid_sft_run_and_keep_the_architecture(made: Path, monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(made))
    options = [*CHAT, chats(made), "--num_iterations=3", f"--model_tag={pattern}"]
    mid_train.main(options)
    chat_sft.main(options)
    base_config = load_model("base", "cpu", pattern)[2]["model_config"]
    for source in ("mid", "sft"):
        model, _, meta = load_model(source, "cpu", pattern, dtype="float32")
        assert meta["model_config"] == base_config and meta["step"] == 3
        assert all(p.isfinite().all() for p in model.parameters())
    assert meta["source"] == {"stage": "mid", "model_tag": pattern, "step": 3}
    metrics = rows(made / "sft_checkpoints" / pattern / "metrics.jsonl")
    assert all(math.isfinite(metrics[step]["loss"]) for step in (1, 2, 3))


def test_mid_training_lowers_the_loss_and_reports_it(
    pretrained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune, "plot_metrics", plot_metrics)
    mid_train.main([*CHAT, chats(pretrained), "--num_iterations=40", "--eval_every=20"])
    metrics = rows(pretrained / "mid_checkpoints/t/metrics.jsonl")
    assert metrics[40]["val_loss"] < 0.6 * metrics[0]["val_loss"]
    assert metrics[40]["val_bpb"] < metrics[0]["val_bpb"]
    section = json.loads((pretrained / "report/mid_training.json").read_text())["metrics"]
    assert section["val_loss"] == metrics[40]["val_loss"] and section["val_loss before"] == metrics[0]["val_loss"]
    assert (pretrained / "report/mid_t_loss.png").is_file()
    assert "at step 40" in section["val_loss lowest"] and section["conversations left out"] == 0
    out = capsys.readouterr().out
    assert "from its training: embedding_lr=0.2" in out and "max_seq_len=64" in out
    assert "warm start: the optimizer goes on with the moments of base t, step 3" in out
    assert "sample: 'Who are you?'" in out


def test_embedded_tasks_are_the_default_and_one_epoch_the_length(
    pretrained: Path, capsys: pytest.CaptureFixture
) -> None:
    mid_train.main([*CHAT, "--tasks=Spelling:40,Arithmetic:40,Identity:40", "--save_every=-1", "--eval_every=-1"])
    assert "about 1.0" in capsys.readouterr().out
    assert not list((pretrained / "mid_checkpoints/t").glob("step_*"))
    names = MidTrainConfig(identity="me.jsonl").names({"embedded": ["Arithmetic", "Identity"]}, ["embedded"])
    assert names == ["Arithmetic", "me.jsonl"]


@pytest.mark.parametrize("script", [mid_train, chat_sft])
def test_resume_continues_bit_identically(pretrained: Path, script: Any) -> None:
    source = "mid" if script is mid_train else "sft"
    options = [*CHAT, chats(pretrained), "--source=base", "--num_iterations=11", "--eval_every=4", "--save_every=4"]
    for tag in ("whole", "cut"):
        shutil.copytree(pretrained / "base_checkpoints/t", pretrained / "base_checkpoints" / tag)
        script.main([*options, f"--model_tag={tag}"])
    cut = pretrained / f"{source}_checkpoints/cut"
    shutil.rmtree(cut / "step_000011")
    script.main([*options, "--model_tag=cut", "--resume"])
    whole, again = rows(cut.parent / "whole/metrics.jsonl"), rows(cut / "metrics.jsonl")
    assert sorted(again) == sorted(whole) == list(range(12))
    for step, row in whole.items():
        for key in ("loss", "grad_norm", "val_loss", "val_bpb", "tokens"):
            assert again[step].get(key) == row.get(key), (step, key)


def test_batches_go_on_from_any_cursor() -> None:
    tok = tokenizer()
    task = Listed(chat(" ".join(WORDS[: 1 + i % 9]), "the " * (1 + i % 4)) for i in range(23))
    with ConversationLoader(task, tok, 2, 40, seed=1) as loader:
        whole = [next(loader) for _ in range(12)]
    for k in (0, 3, 7):
        with ConversationLoader(task, tok, 2, 40, seed=1, cursor=whole[k].cursor()) as loader:
            for expected, batch in zip(whole[k + 1 :], loader, strict=False):
                assert torch.equal(batch.x, expected.x) and torch.equal(batch.y, expected.y)
                assert torch.equal(batch.doc, expected.doc) and batch.tokens == expected.tokens
    with pytest.raises(UserError, match="cannot resume the conversations exactly: seed was 1 and is 2"):
        ConversationLoader(task, tok, 2, 40, seed=2, cursor=whole[0].cursor())
    with pytest.raises(UserError, match="conversations was '23"):
        ConversationLoader(Listed(task[:-1]), tok, 2, 40, seed=1, cursor=whole[0].cursor())


def test_an_epoch_reads_every_conversation_once_over_all_ranks() -> None:
    tok = tokenizer()
    task = Listed(chat(f"{i}?", f"={i}.") for i in range(600))
    seen: list[str] = []
    for rank in range(2):
        said: list[str] = []
        with ConversationLoader(task, tok, 1, 64, rank=rank, world_size=2) as loader:
            while len(said) < 200:  # short of an epoch's 300
                batch = next(loader)
                for d in range(int(batch.doc.max()) + 1):
                    answer = batch.y[(batch.doc == d) & (batch.y >= 0)]
                    if len(answer):
                        said.append(tok.decode(answer))
        seen += said
    assert len(set(seen)) == len(seen)


def test_a_short_run_sees_short_conversations_as_often_as_long_ones() -> None:
    """Best fit takes the long ones first, so what waits is short: it must be little."""
    tok = tokenizer()
    task = Listed([chat("a" * (25, 150)[i % 2], "SL"[i % 2]) for i in range(2000)])
    seen = {"S": 0, "L": 0}
    with ConversationLoader(task, tok, 8, 512) as loader:
        for batch in itertools.islice(loader, 25):
            for answer in tok.decode(batch.y[(batch.y >= 0) & (batch.y < 256)]):
                seen[answer] += 1
    assert seen["L"] > 400 and seen["S"] > 0.6 * seen["L"], seen


def test_only_the_assistants_tokens_are_targets() -> None:
    tok = tokenizer()
    parts = [
        {"type": "python", "text": "1+2"},
        {"type": "python_output", "text": "3"},
        {"type": "text", "text": "so 3"},
    ]
    task = Listed([chat("what is 1+2", parts), chat("who", "you", "are", "a town")])  # pyrefly: ignore
    x, y, _ = fixed_rows(task, tok, 80, 80)
    kept = tok.decode(y[y >= 0])
    assert kept == ("<|python_start|>1+2<|python_end|>so 3<|assistant_end|>you<|assistant_end|>a town<|assistant_end|>")
    assert torch.equal(y[:, :-1][y[:, :-1] >= 0], x[:, 1:][y[:, :-1] >= 0])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_conversations_of_a_row_do_not_see_each_other(pattern: str) -> None:
    tok = tokenizer()
    first, second = chat("river of the north", "the town is a stone"), chat("who are you", "a bridge")
    other = chat("river of the stone", "the town is a river")
    model = GPT(
        GPTConfig(
            n_layer=2, block_pattern=pattern, d_model=32, n_head=2, vocab_size=tok.vocab_size, seq_len=64,
            mamba_d_state=4, mamba2_d_state=8, mamba2_head_dim=16, gdn_head_dim=16,
        )
    )  # fmt: skip
    model.init_weights(0)
    torch.nn.init.normal_(model.head.weight)
    losses = []
    for before in (first, other):
        x, y, doc = fixed_rows(Listed([before, second]), tok, 70, 70)
        assert len(x) == 1 and int(doc.max()) >= 1
        loss = model(x, y, doc=doc, loss_reduction="none")
        losses.append(loss[(doc == 1) & (y >= 0)])
    assert len(losses[0]) == len(losses[1]) > 0
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_shortened_or_left_out_and_counted() -> None:
    tok = tokenizer()
    long = "river " * 100
    task = Listed([chat("who", "you"), chat("who", long), chat(long, "you", "what", "a town"), chat("who", "a stone")])
    found = survey(task, tok, 30)
    assert (found.conversations, found.shortened, found.left_out) == (4, 1, 1)
    assert "25.0% shortened, 25.0% too long and left out" in str(found)
    with ConversationLoader(task, tok, 1, 30) as loader:
        counts = [next(loader).cursor()["counts"] for _ in range(3)][-1]
    assert counts["left_out"] > 0 and abs(counts["left_out"] - counts["read"] / 4) <= 1
    with pytest.raises(UserError, match=r"none of 1 conversations fits a row of 31 tokens.*raise --max_seq_len"):
        survey(Listed([chat("who", long)]), tok, 30)
    with (
        pytest.raises(UserError, match="none of"),
        ConversationLoader(Listed([chat("who", long)]), tok, 1, 30) as loader,
    ):
        next(loader)
    with pytest.raises(UserError, match="conversation 0: messages\\[0\\] has role 'assistant'"):
        survey(Listed([{"messages": [{"role": "assistant", "content": "hi"}]}]), tok, 30)


def test_long_conversations_in_short_rows_stay_finite(pretrained: Path) -> None:
    """karpathy/nanochat 590: long conversations and small micro-batches made rows without targets, and the loss NaN."""
    rng = random.Random(1)
    with (pretrained / "long.jsonl").open("w") as f:
        for i in range(200):
            n = rng.choice([2, 10, 60, 200])
            words = [" ".join(rng.choices(WORDS, k=max(1, n // 4))) for _ in range(4 if i % 3 else 2)]
            f.write(json.dumps(chat(*words)) + "\n")
    options = [f"--tasks={pretrained / 'long.jsonl'}", "--device_batch_size=1", "--total_batch_size=64"]
    chat_sft.main([*CHAT, *options, "--source=base", "--num_iterations=40", "--eval_every=0"])
    metrics = rows(pretrained / "sft_checkpoints/t/metrics.jsonl")
    assert all(math.isfinite(metrics[step]["loss"]) and "skipped" not in metrics[step] for step in range(1, 41))
    section = json.loads((pretrained / "report/chat_sft.json").read_text())["metrics"]
    assert section["conversations left out"] > 0 and section["conversations shortened"] > 0


def test_rates_come_from_the_checkpoint_and_moments_too(pretrained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*CHAT, chats(pretrained), "--source=base", "--num_iterations=1", "--eval_every=-1"]
    chat_sft.main([*options, "--matrix_lr=0.5", "--init_lr_frac=0.25"])
    meta = load_checkpoint(pretrained / "sft_checkpoints/t", want=()).meta
    assert meta["train_config"]["matrix_lr"] == 0.5 and meta["train_config"]["embedding_lr"] == 0.2
    assert "matrix_lr" not in capsys.readouterr().out.split("from its training: ")[1].splitlines()[0]
    moments, begun = (load_checkpoint(pretrained / f"{source}_checkpoints/t").optim for source in ("sft", "base"))
    assert moments is not None and begun is not None and sorted(moments) == sorted(begun)
    steps = {name: t.item() for name, t in moments.items() if name.endswith(".step")}
    assert steps and set(steps.values()) == {4}  # base_train's three and one


def test_a_warm_start_that_cannot_be_says_why(pretrained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*CHAT, chats(pretrained), "--num_iterations=1", "--eval_every=-1", "--dry_run"]
    mid_train.main([*options, "--warm_start=false"])
    assert "warm start" not in capsys.readouterr().out
    model, _, meta = load_model("base", "cpu", "t")
    save_checkpoint(
        checkpoint_dir("base", "t"), meta["step"], model=model.state_dict(), optim=None, state={}, meta=meta
    )
    mid_train.main(options)
    assert "moments start at zero: base t holds none" in capsys.readouterr().out
    assert not list(pretrained.glob("mid_checkpoints/t/step_*"))
    assert not (pretrained / "report/mid_training.json").exists()


def test_a_config_that_contradicts_the_checkpoint_names_both(pretrained: Path, tmp_path: Path) -> None:
    config = tmp_path / "mine.py"
    config.write_text('depth = 2\nblock_pattern = ["M"] * 2\nmax_seq_len = 64\ntarget_param_data_ratio = 20\n')
    with pytest.raises(UserError) as e:
        mid_train.main([str(config), *CHAT, chats(pretrained)])
    message = str(e.value)
    assert "block_pattern is 2 mamba, but base t has 2 attn" in message and "scripts.base_train" in message
    assert "\n" not in message
    config.write_text('depth = 2\nblock_pattern = "TT"\nd_model = 32\nmax_seq_len = 64\n')
    mid_train.main([str(config), *CHAT, chats(pretrained), "--num_iterations=1", "--eval_every=-1"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sorce=mid"], "unknown key --sorce: did you mean 'source'?"),
        (["--init_lr_fraq=1"], "did you mean 'init_lr_frac'?"),
        (["--depth=4"], "depth is 4, but base t has 2"),
        (["--source=mdi"], "did you mean 'mid'?"),
        (["--source=mid"], "make one by `python -m scripts.mid_train`"),
        (["--model_tag=x"], "make one by `python -m scripts.base_train`"),
        (["--model_tag=", "--depth=20"], "base_checkpoints/d20: make one by"),
        (["--max_seq_len=1"], "max_seq_len=1: expected at least 2"),
        (["--device_batch_size=3"], "use --total_batch_size="),
        (["--total_batch_size=256", "--target_examples_per_step=8"], "give one"),
        (["--num_epochs=0"], "nothing says how long to train"),
        (["--tasks=Arithmetik"], "did you mean 'Arithmetic'?"),
        (["--identity=nowhere.jsonl"], "nowhere.jsonl does not exist"),
    ],
)
def test_what_cannot_work_is_one_line(pretrained: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as e:
        mid_train.main([*CHAT, chats(pretrained), *arguments])
    assert message in str(e.value) and "\n" not in str(e.value)
    assert not list(pretrained.glob("mid_checkpoints/*/step_*"))


def test_longer_rows_make_the_context_longer(pretrained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    longer = ["--max_seq_len=128", "--device_batch_size=2", "--total_batch_size=256", "--num_iterations=2"]
    mid_train.main([*CHAT, chats(pretrained), *longer, "--eval_every=-1"])
    assert "context: 128 tokens, 64 before" in capsys.readouterr().out
    model, _, meta = load_model("mid", torch.device("cpu"), "t")
    assert model.config.seq_len == meta["train_config"]["max_seq_len"] == 128
    assert model(torch.zeros(1, 128, dtype=torch.long)).shape[1] == 128


def test_a_stage_may_go_on_from_its_own_model_under_another_name(pretrained: Path) -> None:
    short = [*CHAT, chats(pretrained), "--num_iterations=1", "--eval_every=-1"]
    mid_train.main(short)
    with pytest.raises(UserError, match="choose another --out_tag"):
        mid_train.main([*short, "--source=mid"])
    mid_train.main([*short, "--source=mid", "--out_tag=u"])
    meta = load_model("mid", torch.device("cpu"), "u")[2]
    assert meta["train_config"]["model_tag"] == "u" and meta["source"] == {"stage": "mid", "model_tag": "t", "step": 1}


def test_which_of_several_models_is_asked_for(pretrained: Path) -> None:
    shutil.copytree(pretrained / "base_checkpoints/t", pretrained / "base_checkpoints/u")
    with pytest.raises(UserError, match=r"base has several models: choose one by --model_tag=t\|u"):
        mid_train.main([*CHAT, chats(pretrained), "--model_tag="])


def test_examples_per_step_become_tokens(pretrained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat_sft.main([*CHAT, chats(pretrained), "--source=base", "--target_examples_per_step=24", "--dry_run"])
    assert "steps of 384 tokens" in capsys.readouterr().out


def torchrun(script: str, arguments: list[str]) -> str:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", script, "--"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *arguments], cwd=REPO_DIR, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_two_ranks_train_save_and_resume_bit_identically(pretrained: Path) -> None:
    options = [*CHAT, chats(pretrained), "--num_iterations=6", "--eval_every=3", "--save_every=4", "--resume"]
    whole = torchrun("scripts.mid_train", options)
    assert "warm start: the optimizer goes on with the moments of base t" in whole  # which one process has trained
    shutil.copytree(pretrained / "mid_checkpoints/t", pretrained / "whole")
    shutil.rmtree(pretrained / "mid_checkpoints/t/step_000006")
    assert "resuming t at step 4" in torchrun("scripts.mid_train", options)
    first, again = (rows(pretrained / name / "metrics.jsonl") for name in ("whole", "mid_checkpoints/t"))
    for step, row in first.items():
        for key in ("loss", "grad_norm", "val_loss", "val_bpb", "tokens"):
            assert again[step].get(key) == row.get(key), (step, key)
    assert "warm start: the optimizer goes on" in torchrun("scripts.chat_sft", options)
