"""Every command of docs/serving.md is run, with a model and loads made small; so are its requests and its Python."""

import contextlib
import dataclasses
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving_model import make, save

from nanochat.common import REPO_DIR
from nanochat.retrieval import Document, KnowledgeBase
from scripts import bench_serving
from scripts.bench_serving import BenchServingConfig
from scripts.chat_web import WebConfig

PAGE = (Path(__file__).parent.parent / "docs" / "serving.md").read_text(encoding="utf-8")
HERE = "http://127.0.0.1:8000"
ON_CPU = ["--device=cpu", "--dtype=float32"]
TINY = [
    "--clients_at_once=1", "--lengths=even", "--seconds=0.2", "--repeats=1", "--prompt_tokens=8", "--max_tokens=4",
    "--clients=4", "--client_seconds=0.5", "--disconnects=2", "--threads=1", "--depth=1", "--d_model=32", "--n_head=1",
    "--vocab_size=320",
]  # fmt: skip


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def commands(name: str) -> list[list[str]]:
    """The words of every command that runs this program or script, in order."""
    lines = [shlex.split(line) for block in blocks("bash") for line in block.splitlines()]
    assert all(re.search(r"^(\w+=\S+ )?python -m scripts\.|^curl ", " ".join(line)) for line in lines)
    return [line for line in lines if name in line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands run: models under base/, and notes/."""
    path = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(path / "base"))
        save(*make(["attn", "mamba2"], 512), path / "base")
    KnowledgeBase.build([Document("mill", "Ilse Brandt runs the mill.", "The mill")], path / "notes").close()
    return path


@contextlib.contextmanager
def serving(folder: Path, words: list[str]) -> Iterator[str]:
    """The command as a process, on a free port of its own host -> its address."""
    at = words.index("python")
    env = {**os.environ, "NANOCHAT_BASE_DIR": str(folder / "base"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO_DIR)}
    env |= dict(word.split("=", 1) for word in words[:at])
    argv = [sys.executable, *(w for w in words[at + 1 :] if not w.startswith("--port")), "--port=0", *ON_CPU]
    process = subprocess.Popen(argv, cwd=folder, env=env, text=True, stdout=subprocess.PIPE)
    assert process.stdout is not None
    said = ""
    while not (found := re.search(r" at http://\S+:(\d+)\n", said)):
        line = process.stdout.readline()
        assert line, said
        said += line
    yield f"http://127.0.0.1:{found[1]}"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 0


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with serving(folder, commands("scripts.chat_web")[0]) as url:
        yield url


def test_the_requests_of_the_page_are_answered(url: str):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    requests = commands("curl")
    assert len(requests) == 4
    kinds = []
    for words in requests:
        argv = [word.replace(HERE, url) for word in words]
        out = subprocess.run([*argv, "-sS", "--fail"], capture_output=True, text=True, timeout=60, check=True).stdout
        kinds.append("stream" if out.startswith("data: ") else json.loads(out)["object"])
        assert kinds[-1] != "stream" or out.endswith("data: [DONE]\n\n")
    assert kinds == ["list", "chat.completion", "stream", "list"]


def test_the_python_of_the_page_runs(url: str):
    pytest.importorskip("openai", reason="the openai package is not installed (the dev group has it)")
    [code] = blocks("python")
    with contextlib.redirect_stdout(out := io.StringIO()):
        exec(compile(code.replace(HERE, url), "docs/serving.md", "exec"), {})
    assert out.getvalue()


def test_what_the_page_says_is_in_the_metrics_is_there(url: str):
    text = httpx.get(f"{url}/metrics").text
    named = set(re.findall(r"`(nanochat_\w+)`", PAGE))
    assert len(named) == 11 and all(f"# TYPE {name} " in text for name in named)


def test_every_route_of_the_page_is_the_servers(url: str):
    served = {
        f"{m.upper()} {path}" for path, ms in httpx.get(f"{url}/openapi.json").json()["paths"].items() for m in ms
    }
    rows = re.findall(r"^\| (`(?:GET|POST) /.*?`) \|", PAGE, re.MULTILINE)
    named = set()
    for method, path in re.findall(r"`(?:(GET|POST) )?(/\S+?)`", " ".join(rows)):
        named.add(f"{method or 'GET'} {path}")
    assert named - {"GET /openapi.json"} == served - {"GET /v1/models/{name}"}


def test_the_other_servers_of_the_page_answer_from_documents_and_ask_for_a_key(folder: Path):
    _, documents, keyed = commands("scripts.chat_web")
    question = {"messages": [{"role": "user", "content": "who runs the mill"}], "max_tokens": 4}
    with serving(folder, documents) as url:
        asked = httpx.post(f"{url}/v1/chat/completions", json=question, timeout=60).json()
        assert asked["sources"][0]["title"] == "The mill" and asked["trace"][0]["query"] == "who runs the mill"
        bare = httpx.post(f"{url}/v1/chat/completions", json={**question, "retrieval": False}, timeout=60).json()
        assert "sources" not in bare
        options: dict[str, Any] = {"top_k": 3, "retriever": "bm25"}
        found = httpx.post(f"{url}/v1/chat/completions", json={**question, "retrieval": options}, timeout=60).json()
        assert found["sources"]
    with serving(folder, keyed) as url:
        assert httpx.get(f"{url}/v1/models").status_code == 401
        assert httpx.get(f"{url}/v1/models", headers={"authorization": "Bearer change-me"}).status_code == 200


def test_the_benchmark_runs_as_the_page_says(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder / "base"))
    runs = commands("scripts.bench_serving")
    assert len(runs) == 3
    assert {flag.partition("=")[0] for words in runs for flag in words[3:]} == {"--random_model", "--dtype", "--parts"}
    bench_serving.main(TINY)  # the first has all parts of the others
    out = capsys.readouterr().out
    assert all(f"{part}: " in out for part in ("clients", "disconnects")) and "transformers" in out
    found = json.loads((folder / "base" / "bench" / "serving.json").read_text())
    assert found["clients"]["wrong"] == found["clients"]["lost"] == found["disconnects"]["rows_left"] == 0
    parts = found["config"]["parts"]
    assert all(set(p.removeprefix("--parts=").split(",")) <= set(parts) for w in runs for p in w if "--parts" in p)


def test_every_option_and_default_of_the_page_is_the_scripts():
    fields = {f.name: f for config in (WebConfig, BenchServingConfig) for f in dataclasses.fields(config)}
    assert {key for key in re.findall(r"--(\w+)", PAGE) if key not in ("help", "device")} <= set(fields)
    table = PAGE.split("## Limits")[1].split("\n\n")[1]
    rows = re.findall(r"^\| `--(\w+)` \| ([^|]+) \|", table, re.MULTILINE)
    assert len(rows) == len(table.splitlines()) - 2 == 10
    web = {f.name: f.default for f in dataclasses.fields(WebConfig)}
    for key, default in rows:
        assert web[key] == (float(default) if default[0].isdigit() else None), key
    [drain] = re.findall(r"`--drain_seconds` \((\d+)\)", PAGE)
    assert web["drain_seconds"] == int(drain)
