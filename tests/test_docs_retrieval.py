"""Every command and every line of Python in docs/retrieval.md runs as it stands there."""

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanochat import checkpoint
from nanochat.common import REPO_DIR
from nanochat.gpt import GPT, GPTConfig
from nanochat.retrieval import RETRIEVERS, KnowledgeBase
from nanochat.tokenizer import Tokenizer
from tests.opensearch_nodes import Node

PAGE = REPO_DIR / "docs" / "retrieval.md"
TEXT = PAGE.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
REMOTE = "opensearch://127.0.0.1:9200/people"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, where `python` is ours and finds the repository."""
    monkeypatch.chdir(tmp_path)
    bin_ = tmp_path / ".bin"
    bin_.mkdir()
    (bin_ / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (bin_ / "python").chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(REPO_DIR))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path


def run_bash(code: str) -> str:
    done = subprocess.run(["bash", "-euc", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_python(codes: list[str]) -> dict[str, Any]:
    """One after the other with the same names, as in a session."""
    names: dict[str, Any] = {}
    for code in codes:
        exec(compile(code, str(PAGE), "exec"), names)
    return names


def blocks(language: str) -> list[str]:
    return [code for name, code in BLOCKS if name == language]


def test_every_block_is_of_a_kind_that_is_run() -> None:
    assert {name for name, _ in BLOCKS} == {"bash", "python"}
    assert TEXT.count("```") == 2 * len(BLOCKS)


def test_the_commands_run(place: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is missing")
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = str(s.getsockname()[1])
    make, serve = blocks("bash")
    assert "The well in Maple Lane" in run_bash(make).splitlines()[-1]
    answers = run_bash(serve.replace("8100", port))
    for part in ('"status":"ok"', '"id":"well.md"', '"added":1', '"deleted":1'):
        assert part in answers.replace(": ", ":"), part


def test_the_python_runs(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = Tokenizer.train(["who wrote the first program and a compiler"] * 3, 300)
    model = GPT(GPTConfig(2, ["attn"] * 2, 64, 2, vocab_size=tokenizer.vocab_size, seq_len=64))
    model.init_weights(0)
    monkeypatch.setattr(checkpoint, "load_model", lambda source, device: (model.eval(), tokenizer, {}))
    names = run_python([code for code in blocks("python") if REMOTE not in code])
    said = capsys.readouterr().out
    assert said.startswith("1 ") and "Ada Lovelace Ada wrote the first program." in said.splitlines()[0]
    for name in ("simple", "bm25", "hybrid", "multihop"):
        assert f"{name} ['ada'" in said
    assert [hit.document.id for hit in names["recent"]] == ["grace"]
    assert names["hops"][0].startswith("hop 1: ") and names["strict"] and names["mixed"] and names["varied"]
    assert {hit.source for hit in names["judged"]} == {"rerank"}
    assert sorted(d.id for d in KnowledgeBase.open("people").documents()) == ["ada", "grace", "linus"]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    started = Node("docs", tmp_path)
    try:
        yield started.wait()
    finally:
        started.stop()


@pytest.mark.slow
def test_the_python_over_opensearch_runs(place: Path, node: Node) -> None:
    remote = next(code for code in blocks("python") if REMOTE in code).replace(REMOTE, node.url("people"))
    names = run_python([blocks("python")[0].replace(", dense={}", ""), remote])
    assert [hit.document.id for hit in names["hits"]] == ["ada"]
    assert len(names["remote"]) == 4


def test_every_retriever_stands_in_the_table() -> None:
    table = TEXT.split("| retriever |")[1].split("\n\n")[0]
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == [
        "simple",
        "bm25",
        "dense",
        "hybrid",
        "multihop",
        "rerank",
    ]
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == set(RETRIEVERS)
