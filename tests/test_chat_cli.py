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
from nanochat.rag import Answer, answer, answer_parts
from nanochat.retrieval import Chunk, Document, Hit, KnowledgeBase
from nanochat.tokenizer import Tokenizer
from scripts import chat_cli
from scripts.chat_cli import ABSTENTION, ChatConfig, Conversation, Sourced, said, sources

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


# ---- with a knowledge base ----

NAMES = ("Aller", "Brenta", "Cam", "Drava", "Ebro")
RIVERS = [Document(name, f"The {name} runs to the sea. " * 5, f"River {name}") for name in NAMES]


@pytest.fixture(scope="module")
def notes(tmp_path_factory):
    """A folder as prepare_rag_dataset makes it."""
    path = tmp_path_factory.mktemp("notes")
    KnowledgeBase.build(RIVERS, path / "knowledge_base", retriever="bm25").close()
    return path


def rivers(home, **options) -> Sourced:
    """A chat of the sft model with room for documents."""
    engine = Engine(engine_of(home).model, Tokenizer.load(), max_context=640)
    return Sourced(engine, ChatConfig(source="sft", **options))


def writing(talk: Sourced, *answers: list[dict] | list[int]) -> list[str]:
    """Makes the engine write these in turn -> the prompts it will have been given."""
    prompts, queue, tokenizer = [], list(answers), talk.engine.tokenizer

    def generate_batch(ids, traces, **_):
        traces.append([])
        prompts.extend(tokenizer.decode(row) for row in ids)
        exchange = [{"role": "user", "content": "?"}, {"role": "assistant", "content": queue.pop(0)}]
        row, mask = tokenizer.render_conversation({"messages": exchange})
        written = [i for i, trained in zip(row, mask, strict=True) if trained][:-1]
        return [ids[0] + written], [[0] * len(ids[0]) + [1] * len(written)]

    talk.engine.generate_batch = generate_batch
    return prompts


def test_an_answer_from_documents_is_that_of_nanochat_rag(home, notes):
    talk = rivers(home, knowledge_base=str(notes), top_k=2, max_tokens=12, max_doc_length=60)
    text, listed = talk.say("River Drava")
    tokenizer = Tokenizer.load()
    talk.engine.model.config = dataclasses.replace(talk.engine.model.config, seq_len=640)
    expected = answer(talk.engine.model, tokenizer, talk.kb, "River Drava", 2, None, 60, 12)
    assert text == said(expected) and listed == sources(expected) and len(expected.hits) == 2
    assert "[1] River Drava: The Drava runs to the sea. The Drava" in listed and listed.endswith(" ...")


def test_a_question_on_the_command_line_prints_answer_and_sources(home, notes, capsys):
    short = ["--knowledge_base", str(notes), "--max_tokens=4", "--top_k=1", "--max_doc_length=16"]
    out, err = run(capsys, "-i", "sft", "-p", "River Drava", *short)
    assert out.splitlines()[-2] == "" and "[1] River Drava: The Drava runs" in out
    assert "5 documents in" in err
    assert (
        out
        == run(capsys, "-i", "sft", "-p", "River Drava", "--knowledge_base", str(notes / "knowledge_base"), *short[2:])[
            0
        ]
    )


def test_citations_and_abstentions_are_told_in_words():
    def hit(title, text):
        return Hit(Document("d", text, title), Chunk(0, len(text), text), 1.0, 1, "test")

    hits = [hit("Ada\x1b[2J", "wrote\n\na program " * 40), hit("", "short")]
    reply = Answer("a \x1b[2Jprogram", (2, 2, 7), hits, False)
    assert said(reply) == "a [2Jprogram [2][7: no such document]"
    first, second = sources(reply).split("\n")[2:]
    assert first.startswith("  [1] Ada [2J: wrote a program wrote") and "\x1b" not in first and len(first) < 120
    assert second == "* [2] short"
    assert said(Answer("", (), hits, True)) == ABSTENTION
    assert said(Answer("", (1,), hits, False)) == "(an empty answer) [1]"
    assert sources(Answer("x", (), [], False)).strip() == "no document was found"


def test_answered_turns_are_shown_again_without_their_documents(home, notes):
    talk = rivers(home, knowledge_base=str(notes), top_k=1, max_tokens=16, max_doc_length=40)
    prompts = writing(talk, answer_parts("the sea", [1]), [{"type": "abstain"}], answer_parts("sky"), answer_parts("a"))
    answers = ["".join(talk.say(text)) for text in ("River Drava", "River Ebro", "River Brenta")]
    assert [a.split("\n")[0] for a in answers] == ["the sea [1]", ABSTENTION, "sky"]
    assert "* [1] River Drava" in answers[0] and "  [1] River Brenta" in answers[2]
    turn = "<|user_start|>River Drava<|user_end|><|assistant_start|> the sea<|assistant_end|>"
    earlier = f"<|bos|>{turn}<|user_start|>River Brenta"
    assert prompts[2].startswith(earlier) and "[1] River Brenta" in prompts[2]
    talk.clear()
    "".join(talk.say("River Cam"))
    assert prompts[3].startswith("<|bos|><|user_start|>River Cam<|info_start|>")


def test_documents_that_do_not_fit_are_told(home, notes, capsys):
    talk = Sourced(
        engine_of(home), ChatConfig(source="sft", knowledge_base=str(notes), max_tokens=8, max_doc_length=20)
    )
    "".join(talk.say("river sea"))
    assert "of 5 documents found, 2 fit the context of 64 tokens" in capsys.readouterr().err
    with pytest.raises(UserError, match="the question needs"):
        "".join(talk.say("river " * 60))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--retriever_type=bm25"], "add --knowledge_base"),
        (["--knowledge_base=KB", "-t", "0.5"], "not sampled: leave temperature"),
        (["--knowledge_base=KB", "--top_k=0"], "top_k=0"),
        (["--knowledge_base=KB", "-i", "sft", "--max_doc_length=0"], "max_doc_length=0: expected at least 16"),
        (["--knowledge_base=KB", "-i", "base"], "-i base goes on from a text"),
        (["--knowledge_base=KB"], r"no rag checkpoint.*base, sft \(-i sft\)"),
        (["--knowledge_base=KB", "-i", "sft", "--retriever_type=dense"], "needs the index 'dense'"),
        (["--knowledge_base=KB/none", "-i", "sft"], "none"),
    ],
)
def test_mistakes_about_documents_are_named(home, notes, flags, message):
    with pytest.raises(UserError, match=message):
        chat_cli.main([*(flag.replace("KB", str(notes)) for flag in flags), "-p", "River Drava", "--device=cpu"])


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
