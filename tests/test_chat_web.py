"""scripts.chat_web, run for real in a process of its own on a free port."""

import base64
import importlib.util
import json
import re
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import server_process
from server_process import stop
from serving_model import make, save

from nanochat.config import UserError
from nanochat.engine import Engine
from nanochat.retrieval import Document, KnowledgeBase
from nanochat.serving.reply import reply_text
from scripts import chat_web

DOCUMENTS = [
    Document("ada", "Ada Lovelace wrote the first program.", "Ada"),
    Document("alan", "Alan Turing asked whether machines think.", "Alan"),
]
MODEL = "nanochat-sft"
FLAGS = ["--max_body_bytes=20000", "--max_rows=8", "--max_queue=4", "--device=cpu", "--dtype=float32", "-m", "12"]
HELLO = [{"role": "user", "content": "hello"}]
WEATHER = {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("web")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(path))
        save(*make(["attn"], 4096), path)
    KnowledgeBase.build(DOCUMENTS, path / "kb", retriever="simple").close()
    return path


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(*make(["attn"], 4096))


def start(folder: Path, *flags: str) -> tuple[subprocess.Popen[str], str]:
    """-> (process, its address)"""
    env = {"NANOCHAT_BASE_DIR": str(folder), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    return server_process.start(["scripts.chat_web", *FLAGS, *flags], env)


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[httpx.Client]:
    process, url = start(folder)
    with httpx.Client(base_url=url, timeout=30) as client:
        yield client
    assert stop(process) == (0, "")


@pytest.fixture(scope="module")
def rag(folder: Path) -> Iterator[httpx.Client]:
    process, url = start(folder, f"--knowledge_base={folder / 'kb'}", "--api_key=secret", "--body_seconds=1")
    with httpx.Client(base_url=url, timeout=30, headers={"authorization": "Bearer secret"}) as client:
        yield client
    assert stop(process) == (0, "")


def chat(client: httpx.Client, **body: Any) -> httpx.Response:
    return client.post("/v1/chat/completions", json={"messages": HELLO, "temperature": 0, **body})


def refused(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"} and set(answer.json()["error"]) == {"message", "type", "param", "code"}
    return answer.json()["error"]


def chunks(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    lines = [line for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def offline(engine: Engine, messages: list[dict[str, str]], n: int) -> str:
    prompt = engine.tokenizer.render_for_completion({"messages": messages})
    rows, _ = engine.generate_batch(prompt, max_tokens=n, temperature=0)
    return reply_text(engine.tokenizer, rows[0][len(prompt) :])


def running(client: httpx.Client) -> int:
    return client.get("/health").json()["running"]


def comes_true(test: Any) -> bool:
    for _ in range(100):
        if test():
            return True
        time.sleep(0.05)
    return False


def test_a_chat_answer_is_the_offline_one_with_its_usage(client: httpx.Client, engine: Engine):
    answer = chat(client, model=MODEL, max_tokens=30).json()
    [choice] = answer["choices"]
    assert choice["message"]["content"] == offline(engine, HELLO, 30) and choice["message"]["role"] == "assistant"
    assert (answer["object"], answer["model"], choice["finish_reason"]) == ("chat.completion", MODEL, "length")
    n = len(engine.tokenizer.render_for_completion({"messages": HELLO}))
    used = answer["usage"]
    assert (used["prompt_tokens"], used["completion_tokens"], used["total_tokens"]) == (n, 30, n + 30)


def test_a_stream_says_the_same(client: httpx.Client):
    whole = chat(client, max_tokens=30, n=2).json()
    got = chunks(chat(client, max_tokens=30, n=2, stream=True, stream_options={"include_usage": True}))
    assert len({c["id"] for c in got}) == 1 and all(c["object"] == "chat.completion.chunk" for c in got)
    for choice in whole["choices"]:
        own = [c["choices"][0] for c in got[:-1] if c["choices"][0]["index"] == choice["index"]]
        assert own[0]["delta"]["role"] == "assistant" and len(own) > 5
        assert "".join(c["delta"].get("content", "") for c in own) == choice["message"]["content"]
        assert [c["finish_reason"] for c in own if c["finish_reason"]] == ["length"] and own[-1]["finish_reason"]
    assert got[-1]["choices"] == [] and got[-1]["usage"]["completion_tokens"] == 60


def test_old_clients_get_their_events(client: httpx.Client):
    whole = chat(client, max_tokens=30).json()["choices"][0]["message"]["content"]
    answer = client.post("/chat/completions", json={"messages": HELLO, "temperature": 0, "max_tokens": 30})
    events = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n") if line]
    assert "".join(e["token"] for e in events[:-1]) == whole and events[-1] == {"done": True}
    assert client.get("/stats").json()["status"] == "ok"


def test_seeds_stops_and_log_probabilities(client: httpx.Client):
    def text(**options: Any) -> str:
        return chat(client, max_tokens=20, **options).json()["choices"][0]["message"]["content"]

    assert text(temperature=1, seed=1) == text(temperature=1, seed=1) != text(temperature=1, seed=2)
    whole = text()
    stopped = chat(client, max_tokens=20, stop=[whole[6:9]]).json()["choices"][0]
    assert stopped["message"]["content"] == whole[: whole.index(whole[6:9])] and stopped["finish_reason"] == "stop"
    content = chat(client, max_tokens=6, logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
    assert len(content) == 6
    for one in content:
        assert one["logprob"] == one["top_logprobs"][0]["logprob"] > one["top_logprobs"][1]["logprob"]


def test_completions_continue_texts_and_ids(client: httpx.Client, engine: Engine):
    ids = engine.tokenizer.encode("the river", prepend="<|bos|>")
    rows, _ = engine.generate_batch(ids, max_tokens=10, temperature=0)
    body = {"prompt": ["the river", "the sea"], "max_tokens": 10, "temperature": 0, "logprobs": 2}
    answer = client.post("/v1/completions", json=body).json()
    first, second = answer["choices"]
    assert first["text"] == reply_text(engine.tokenizer, rows[0][len(ids) :]) and second["index"] == 1
    assert len(first["logprobs"]["tokens"]) == len(first["logprobs"]["top_logprobs"]) == 10
    by_ids = client.post("/v1/completions", json={**body, "prompt": ids}).json()
    assert by_ids["choices"][0]["text"] == first["text"]
    got = chunks(client.post("/v1/completions", json={**body, "stream": True}))
    for choice in answer["choices"]:
        said = [c["choices"][0]["text"] for c in got if c["choices"][0]["index"] == choice["index"]]
        assert "".join(said) == choice["text"]


def test_completions_come_n_times_and_best_of_is_n_or_absent(client: httpx.Client):
    body = {"prompt": "a", "n": 2, "max_tokens": 3}
    for more in ({}, {"best_of": 2}, {"best_of": None}):
        assert len(client.post("/v1/completions", json={**body, **more}).json()["choices"]) == 2
    assert "best_of" in refused(client.post("/v1/completions", json={**body, "best_of": 3}), 400)["message"]


def test_as_many_prompts_as_rows_and_queue_hold_are_answered_and_more_can_never_be(client: httpx.Client):
    assert comes_true(lambda: running(client) == 0)
    for n, most in ((1, 12), (4, 6)):  # of 8 rows and a queue of 4
        body = {"prompt": ["a"] * most, "n": n, "max_tokens": 2}
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 200 and len(answer.json()["choices"]) == n * most
        assert comes_true(lambda: running(client) == 0)
        error = refused(client.post("/v1/completions", json={**body, "prompt": ["a"] * (most + 1)}), 400)
        assert f"{most + 1} prompts" in error["message"] and f"1 to {most} " in error["message"]


def test_embeddings_have_length_one_and_base64_says_the_same(client: httpx.Client, engine: Engine):
    body = {"input": ["the river", "the sea runs to the sky"], "model": MODEL}
    vectors = [e["embedding"] for e in client.post("/v1/embeddings", json=body).json()["data"]]
    coded = client.post("/v1/embeddings", json={**body, "encoding_format": "base64"}).json()["data"]
    for vector, other in zip(vectors, coded, strict=True):
        assert len(vector) == 32 and sum(v * v for v in vector) == pytest.approx(1, abs=1e-5)
        assert struct.unpack("<32f", base64.b64decode(other["embedding"])) == pytest.approx(vector)
    ids = engine.tokenizer.encode("the river")
    [one] = client.post("/v1/embeddings", json={"input": ids}).json()["data"]
    assert one["embedding"] == pytest.approx(vectors[0], abs=1e-5)
    for wrong in ("", [], [""], [999], "the sea " * 2400):
        refused(client.post("/v1/embeddings", json={"input": wrong}), 400)


def test_models_health_metrics_and_the_page(client: httpx.Client):
    [model] = client.get("/v1/models").json()["data"]
    assert model["id"] == MODEL and client.get(f"/v1/models/{MODEL}").json() == model
    assert refused(client.get("/v1/models/other"), 404)["code"] == "model_not_found"
    assert client.get("/health").json()["status"] == "ok"
    text = client.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["nanochat_generated_tokens_total"]) > 0
    assert float(values['nanochat_first_token_seconds_bucket{le="+Inf"}']) == float(
        values["nanochat_first_token_seconds_count"]
    )
    page = client.get("/")
    assert page.status_code == 200 and "default-src 'none'" in page.headers["content-security-policy"]
    for name in re.findall(r'(?:src|href)="(/?static/[^"]+)"', page.text):
        assert client.get(name).status_code == 200


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "robot"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "text parts"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "no function call"),
        ({"messages": [*HELLO, {"role": "assistant", "tool_calls": 5}, *HELLO]}, "tool call"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "x"}]}, "last message"),
        ({"messages": [{"role": "user", "content": "x " * 5000}]}, "context holds 4096"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 9}, "n=9"),
        ({"stop": [""]}, "stop"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"frequency_penalty": 1}, "frequency_penalty"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0]"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"function": {"name": []}}, "tools": [{"function": WEATHER}]}, "tool_choice"),
        ({"tool_choice": {"function": {"name": {}}}, "tools": [{"function": WEATHER}]}, "tool_choice"),
        ({"retrieval": True}, "knowledge base"),
        ({"messages": [{"role": "\ud800", "content": "x"}]}, "role"),
    ],
)
def test_a_bad_request_is_refused_with_its_cause(client: httpx.Client, body: dict[str, Any], said: str):
    raw = json.dumps({"messages": HELLO, **body})
    answer = client.post("/v1/chat/completions", content=raw, headers={"content-type": "application/json"})
    error = refused(answer, 400)
    assert error["type"] == "invalid_request_error" and said in error["message"] and "\n" not in error["message"]


@pytest.mark.parametrize("raw", [b"{", b"", b"\xff", b"[1]", b"[" * 15_000, b'{"messages": NaN}'])
def test_malformed_json_is_refused(client: httpx.Client, raw: bytes):
    refused(client.post("/v1/chat/completions", content=raw, headers={"content-type": "application/json"}), 400)


def test_other_models_paths_hosts_and_large_bodies_are_refused(client: httpx.Client):
    assert refused(chat(client, model="gpt-9"), 404)["code"] == "model_not_found"
    refused(client.get("/nothing"), 404)
    refused(client.get("/v1/chat/completions"), 405)
    refused(client.get("/health", headers={"host": "rebound.example"}), 400)
    refused(chat(client, messages=[{"role": "user", "content": "x" * 30_000}]), 413)
    assert "access-control-allow-origin" not in client.get("/health", headers={"origin": "http://a.b"}).headers


def test_a_tool_conversation_goes_round(client: httpx.Client):
    tools = [{"type": "function", "function": WEATHER}]
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
    messages = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}]
    result = {"role": "tool", "tool_call_id": "call_1", "content": "rain"}
    answer = chat(client, messages=[*messages, result], tools=tools).json()
    assert answer["choices"][0]["message"]["content"]
    forced = chat(client, tools=tools, tool_choice="required", max_tokens=20).json()["choices"][0]
    assert forced["finish_reason"] in ("length", "stop", "tool_calls")


def test_many_at_once_each_get_their_own_answer_or_are_told_to_wait(client: httpx.Client, engine: Engine):
    def one(i: int) -> tuple[str, int, str]:
        text = f"the river {i}"
        with httpx.Client(base_url=client.base_url, timeout=60) as own:
            for _ in range(200):
                answer = chat(own, messages=[{"role": "user", "content": text}], max_tokens=10 + i)
                if answer.status_code != 429:
                    break
                assert int(answer.headers["retry-after"]) >= 1 and refused(answer, 429)["type"] == "rate_limit_error"
                time.sleep(0.05)
        return text, 10 + i, answer.json()["choices"][0]["message"]["content"]

    with ThreadPoolExecutor(24) as pool:
        for text, n, said in pool.map(one, range(24)):
            assert said == offline(engine, [{"role": "user", "content": text}], n)


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_leave_leave_no_row(client: httpx.Client, stream: bool):
    host, port = client.base_url.host, client.base_url.port
    raw = json.dumps({"messages": HELLO, "max_tokens": 4000, "stream": stream, "temperature": 1}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    wires = []
    for _ in range(8):
        wire = socket.create_connection((host, port), timeout=10)
        wire.sendall(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
        wires.append(wire)
    assert comes_true(lambda: running(client) > 0)
    for wire in wires:
        wire.close()
    assert comes_true(lambda: running(client) == 0 and client.get("/health").json()["waiting"] == 0)


def test_answers_from_documents_carry_sources(rag: httpx.Client):
    question = [{"role": "user", "content": "who wrote the first program"}]
    answer = chat(rag, messages=question).json()
    source = answer["sources"][0]
    assert (source["n"], source["id"], source["title"], source["text"]) == (1, "ada", "Ada", DOCUMENTS[0].text)
    assert isinstance(source["cited"], bool) and answer["trace"][0]["query"] == question[0]["content"]
    last = [c for c in chunks(chat(rag, messages=question, stream=True)) if c["choices"][0]["finish_reason"]][-1]
    assert last["sources"] == answer["sources"] and last["trace"] == answer["trace"]
    assert "sources" not in chat(rag, messages=question, retrieval=False).json()
    one = chat(rag, messages=[{"role": "system", "content": "Be brief."}, *question], retrieval={"top_k": 1}).json()
    assert len(one["sources"]) == 1
    for wrong in ("os:system", ["bm25"], {"bm25": 1}):
        assert "retrieval.retriever" in refused(chat(rag, retrieval={"retriever": wrong}), 400)["message"]
    refused(chat(rag, retrieval={"top_k": "many"}), 400)


def test_with_documents_long_answers_are_clipped_and_long_questions_have_the_code(rag: httpx.Client):
    for system in ([], [{"role": "system", "content": "Be brief."}]):
        question = [*system, {"role": "user", "content": "who wrote the first program"}]
        answer = chat(rag, messages=question, max_tokens=100_000, stop=["e", "a", " "]).json()
        assert answer["sources"][0]["id"] == "ada"
        question = [*system, {"role": "user", "content": "x " * 1500}]
        assert chat(rag, messages=question, max_tokens=4000, stop=["e", "a", " "]).status_code == 200
        question[-1] = {"role": "user", "content": "x " * 5000}
        error = refused(chat(rag, messages=question), 400)
        assert error["code"] == "context_length_exceeded" and "max_new_tokens" not in error["message"]


def test_a_knowledge_base_that_is_gone_is_the_servers_fault(rag: httpx.Client, folder: Path):
    assert "needs the index" in refused(chat(rag, retrieval={"retriever": "dense"}), 400)["message"]
    manifest = folder / "kb" / "manifest.json"
    whole = manifest.read_bytes()
    for damaged in (b"{", None):
        manifest.write_bytes(damaged) if damaged else manifest.unlink()
        error = refused(chat(rag), 503)
        assert (error["type"], error["code"]) == ("server_error", "knowledge_base") and "\n" not in error["message"]
        assert refused(chat(rag, retrieval={"retriever": "simple"}), 503)["code"] == "knowledge_base"
        assert chat(rag, retrieval=False).status_code == 200
    manifest.write_bytes(whole)
    assert chat(rag).status_code == 200


def test_the_key_is_asked_for_where_there_is_one(rag: httpx.Client):
    with httpx.Client(base_url=rag.base_url, timeout=30) as other:
        assert refused(chat(other), 401)["code"] == "invalid_api_key"
        refused(other.get("/v1/models", headers={"authorization": "Bearer wrong"}), 401)
        refused(other.get("/metrics"), 401)
        assert other.get("/health").status_code == 200


def test_a_client_that_dawdles_is_let_go(rag: httpx.Client):
    where = (rag.base_url.host, rag.base_url.port)
    with socket.create_connection(where, timeout=10) as silent, socket.create_connection(where, timeout=10) as slow:
        silent.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n")
        slow.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer secret\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        assert silent.recv(1000) == b""
        assert slow.recv(1000).startswith(b"HTTP/1.1 408")


def test_what_is_under_way_is_answered_after_sigterm(folder: Path):
    process, url = start(folder)
    with httpx.Client(base_url=url, timeout=30) as client, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(chat, client, max_tokens=300)
        with httpx.Client(base_url=url, timeout=30) as other:
            assert comes_true(lambda: running(other) > 0)
        process.send_signal(signal.SIGTERM)
        assert answer.result().json()["usage"]["completion_tokens"] == 300
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")


@pytest.mark.skipif(importlib.util.find_spec("openai") is None, reason="the openai package is not installed")
def test_the_official_client_talks_streams_embeds_and_reads_errors(client: httpx.Client):
    import openai

    talk: Any = openai.OpenAI(base_url=str(client.base_url).rstrip("/") + "/v1", api_key="none", max_retries=0)
    options = {"model": MODEL, "messages": HELLO, "temperature": 0, "max_tokens": 20}
    whole = talk.chat.completions.create(**options)
    parts = list(talk.chat.completions.create(**options, stream=True))
    text = "".join(p.choices[0].delta.content or "" for p in parts)
    assert text == whole.choices[0].message.content and parts[-1].choices[0].finish_reason == "length"
    assert len(talk.embeddings.create(model=MODEL, input="the sea").data[0].embedding) == 32
    tools = [{"type": "function", "function": WEATHER}]
    talk.chat.completions.create(**options, tools=tools)
    with pytest.raises(openai.NotFoundError):
        talk.chat.completions.create(**{**options, "model": "gpt-9"})
    with pytest.raises(openai.BadRequestError):
        talk.chat.completions.create(**{**options, "temperature": -1})


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--port=70000", "port=70000: expected 0 to 65535"),
        ("--default_tokens=0", "default_tokens=0: expected at least 1"),
        ("--retriever_type=bm25", "add --knowledge_base"),
        ("--temperature=nan", "temperature=nan: expected a finite number"),
        ("--temperature=-1", "temperature=-1.0: expected 0 to 100"),
        ("--top_k=-5", "top_k=-5: expected how many ids"),
        ("--max_context=-5", "max_context=-5: expected at least 1"),
        ("--max_context=0", "max_context=0: expected at least 1"),
        ("--max_context=4", "max_context=4 holds no chat: expected at least 6"),
        ("--request_seconds=nan", "request_seconds=nan: expected a finite number"),
        ("--documents=100", "documents=100: expected 1 to 50"),
        ("--max_doc_length=5", "max_doc_length=5: expected at least 16"),
    ],
)
def test_mistakes_are_told_before_the_server_listens(
    folder: Path, monkeypatch: pytest.MonkeyPatch, flag: str, said: str
):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder))
    monkeypatch.setattr(chat_web, "listen", lambda *_: pytest.fail("it listens"))
    with pytest.raises(UserError, match=said):
        chat_web.main([*FLAGS, flag])
