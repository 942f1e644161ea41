import dataclasses
import io
import os
import subprocess
import sys

import pytest
import torch

from nanochat.checkpoint import checkpoint_dir, save_checkpoint
from nanochat.common import REPO_DIR
from nanochat.config import UserError
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import Tokenizer
from scripts import chat_cli
from scripts.chat_cli import ChatConfig, Conversation

TEXTS = ["the river runs to the sea and the sea runs to the sky. ça va, 日本語, naïve café 🙂 " * 30]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base dir with a tokenizer and, for base and sft, a random model whose blocks all say something."""
    path = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(path))
        tokenizer = Tokenizer.train(TEXTS, 320)
        tokenizer.save(path / "tokenizer")
        config = GPTConfig(n_layer=2, d_model=32, n_head=2, vocab_size=tokenizer.vocab_size, seq_len=64)
        model = GPT(config)
        model.init_weights(0)
        with torch.no_grad():
            for p in model.parameters():
                p += 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
            model.head.weight[-18:] = 0  # special tokens: rare, so that answers are long enough to look at
        meta = {"model_config": dataclasses.asdict(model.config), "tokenizer_hash": tokenizer.hash}
        for source in ("base", "sft"):
            save_checkpoint(checkpoint_dir(source, "d2"), 7, model=model.state_dict(), optim=None, state={}, meta=meta)
    return path


@pytest.fixture
def home(folder, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder))
    return folder


def run(capsys, *argv: str) -> tuple[str, str]:
    chat_cli.main([*argv, "--device=cpu", "--dtype=float32"])
    captured = capsys.readouterr()
    return captured.out, captured.err


def engine_of(home) -> Engine:
    return chat_cli.load_engine(ChatConfig(device="cpu", dtype="float32"))


def test_base_model_continues_the_prompt(home, capsys):
    out, err = run(capsys, "-i", "base", "-p", "The river", "--max_tokens=12", "-t", "0")
    assert out.startswith("The river") and len(out) > len("The river\n") + 6
    assert "base, step 7" in err
    ids = Tokenizer.load().encode("The river", prepend="<|bos|>")
    rows, _ = engine_of(home).generate_batch(ids, max_tokens=12, temperature=0)
    assert out == Tokenizer.load().decode(rows[0][1:], errors="replace") + "\n"


def test_same_seed_same_text_and_other_seed_other_text(home, capsys):
    def text(seed):
        return run(capsys, "-i", "base", "-p", "", f"--seed={seed}", "-t", "1")[0]

    assert text(1) == text(1) != text(2)


def test_chat_prompt_goes_through_the_template(home, capsys):
    out, _ = run(capsys, "-p", "hello", "--max_tokens=9", "-t", "0")
    tokenizer = Tokenizer.load()
    ids = tokenizer.render_for_completion({"messages": [{"role": "user", "content": "hello"}]})
    rows, _ = engine_of(home).generate_batch(ids, max_tokens=9, temperature=0)
    assert out == tokenizer.decode(rows[0][len(ids) :], errors="replace") + "\n"


def test_turns_build_one_conversation_and_read_only_what_is_new(home):
    engine = engine_of(home)
    talk = Conversation(engine, ChatConfig(max_tokens=6, temperature=0))
    texts, messages = [], []
    for question in ("one", "two"):
        messages.append({"role": "user", "content": question})
        texts.append("".join(talk.say(question)))
    tokenizer = engine.tokenizer
    assert talk.ids.count(tokenizer.bos_id) == 1
    whole = [tokenizer.render_for_completion({"messages": [m]}) for m in messages]
    middle = talk.ids.index(tokenizer.encode_special("<|assistant_end|>")) + 1
    assert talk.ids[: len(whole[0])] == whole[0]
    assert talk.ids[middle : middle + len(whole[1]) - 1] == whole[1][1:]
    said, _ = engine.generate_batch(talk.ids[: middle + len(whole[1]) - 1], max_tokens=6, temperature=0)
    assert said[0] == talk.ids[:-1]
    assert talk.session.ids == talk.ids[: len(talk.session.ids)]


def test_long_conversation_is_refused_and_stays_usable(home):
    talk = Conversation(engine_of(home), ChatConfig(max_tokens=20, temperature=0))
    "".join(talk.say("a b c d"))
    before = list(talk.ids)
    with pytest.raises(UserError, match=r"context holds 64.*clear"):
        "".join(talk.say("x " * 40))
    assert talk.ids == before
    talk.clear()
    assert "".join(talk.say("a b c d"))


def test_interrupted_answer_leaves_a_conversation_that_goes_on(home):
    talk = Conversation(engine_of(home), ChatConfig(max_tokens=8, temperature=0))
    answer = talk.say("one")
    next(answer)
    next(answer)
    answer.close()
    end = talk.engine.tokenizer.encode_special("<|assistant_end|>")
    assert talk.ids[-1] == end and talk.ids.count(end) == 1
    resumed = "".join(talk.say("two"))
    fresh = Conversation(engine_of(home), ChatConfig(max_tokens=8, temperature=0))
    fresh.ids = talk.ids[: talk.ids.index(end) + 1]
    assert resumed == "".join(fresh.say("two"))


def test_commands_and_errors_of_the_loop(home, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\nhi\n" + "long " * 90 + "\nCLEAR\nhi\nquit\nnever read\n"))
    out, err = run(capsys, "--max_tokens=5", "-t", "0")
    first, second = out.splitlines()[0], out.splitlines()[-1]
    assert first == second and len(out.splitlines()) == 2
    assert "error: " in err and "new conversation" in err


def test_missing_stage_names_those_that_exist(home, base, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    with pytest.raises(UserError, match=r"no sft checkpoint.*nothing is trained yet"):
        chat_cli.main(["-p", "x"])
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(home))
    with pytest.raises(UserError, match=r"no rl checkpoint.*base, sft \(-i sft\)"):
        chat_cli.main(["-i", "rl", "-p", "x"])


def test_empty_chat_prompt_is_refused(home):
    with pytest.raises(UserError, match="--prompt is empty"):
        chat_cli.main(["-p", " "])


@pytest.mark.slow
def test_reader_that_leaves_and_bytes_that_are_no_text(home):
    """As a process: a closed pipe ends it without a traceback, stdin that is not UTF-8 and an ASCII stdout do not."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "", "LC_ALL": "C.UTF-8"}
    command = [sys.executable, "-m", "scripts.chat_cli", "--device=cpu", "-i", "base"]
    done = subprocess.run(
        ["sh", "-c", '"$@" | true', "sh", *command, "-p", "x", "--max_tokens=50"],
        cwd=REPO_DIR, env=environment, capture_output=True,
    )  # fmt: skip
    assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr
    environment["PYTHONIOENCODING"] = "ascii"
    done = subprocess.run(
        [*command, "--max_tokens=5"], cwd=REPO_DIR, env=environment, capture_output=True, input=b"a\xff\xfeb\nquit\n"
    )
    assert done.returncode == 0 and done.stdout.startswith(b"a")
