"""The HTTP server, run for real in a process of its own on a free port."""

import json
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import server_process
from server_process import stop

from nanochat.config import UserError
from nanochat.retrieval import Document, KnowledgeBase
from nanochat.retrieval.serve import ServeConfig, listen, main

DOCUMENTS = [
    Document("ada", "Ada Lovelace wrote the first program.", "Ada", {"year": 1843}),
    Document("alan", "Alan Turing asked whether machines think.", "Alan", {"year": 1950}),
    Document("grace", "Grace Hopper wrote a compiler.", "Grace", {"year": 1952}),
]
LIMITS = ["--max_body_bytes=20000", "--max_queries=4", "--max_query_chars=100", "--max_k=10", "--max_documents=20"]


def start(folder: Path, *flags: str) -> tuple[subprocess.Popen[str], str]:
    """-> (process, its address)"""
    return server_process.start(["nanochat.retrieval.serve", str(folder), *LIMITS, *flags])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("serve") / "kb"
    KnowledgeBase.build(DOCUMENTS, path, retriever="simple").close()
    return path


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[httpx.Client]:
    process, url = start(folder)
    with httpx.Client(base_url=url, timeout=30) as client:
        yield client
    assert stop(process) == (0, "")


def refused(answer: httpx.Response, status: int) -> dict[str, str]:
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type"}
    return body["error"]


def search(client: httpx.Client, **body: Any) -> httpx.Response:
    return client.post("/search", json=body)


def test_a_search_answers_what_the_knowledge_base_answers(client: httpx.Client, folder: Path):
    queries = ["who wrote the first program", "machines think", "?!"]
    answer = search(client, queries=queries, k=2).json()
    kb = KnowledgeBase.open(folder)
    expected = kb.search(queries, k=2)
    assert [[(h["id"], h["rank"]) for h in row] for row in answer["hits"]] == [
        [(h.document.id, h.rank) for h in row] for row in expected
    ]
    first = answer["hits"][0][0]
    assert (first["id"], first["title"], first["metadata"], first["source"]) == ("ada", "Ada", {"year": 1843}, "simple")
    assert DOCUMENTS[0].text[first["start"] : first["end"]] == first["text"]
    assert first["score"] == pytest.approx(expected[0][0].score)
    assert answer["hits"][2] == []


def test_conditions_on_metadata_hold(client: httpx.Client):
    hits = search(client, queries=["wrote"], k=5, where={"year": {">": 1900}}).json()["hits"]
    assert [h["id"] for h in hits[0]] == ["grace"]


def test_health_counts(client: httpx.Client):
    state = client.get("/health").json()
    assert state["status"] == "ok" and state["retriever"] == "simple" and state["documents"] >= 3


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "queries"),
        ({"queries": []}, "queries"),
        ({"queries": "one"}, "queries"),
        ({"queries": ["a"], "k": 0}, "k"),
        ({"queries": ["a"], "k": 11}, "at most 10"),
        ({"queries": ["a"], "k": "5"}, "k"),
        ({"queries": ["a"], "top": 5}, "top"),
        ({"queries": ["a"] * 5}, "at most 4"),
        ({"queries": ["a" * 101]}, "at most 100"),
        ({"queries": ["a"], "retriever": "bm26"}, "unknown retriever 'bm26'"),
        ({"queries": ["a"], "retriever": "os:system"}, "unknown retriever"),
        ({"queries": ["a"], "retriever": "dense"}, "dense"),
        ({"queries": ["a"], "where": {"year": {"~": 1}}}, "operator"),
        ({"queries": ["\ud800"]}, "surrogate"),
    ],
)
def test_a_bad_search_is_refused_with_its_cause(client: httpx.Client, body: dict[str, Any], said: str):
    raw = json.dumps(body)  # httpx itself would not write half of a surrogate pair
    error = refused(client.post("/search", content=raw, headers={"content-type": "application/json"}), 400)
    assert error["type"] == "bad_request" and said in error["message"] and "\n" not in error["message"]


@pytest.mark.parametrize("raw", [b"{", b"", b"\xff\xfe", b"[1]", b'{"queries": ["a"]} x', b"[" * 15_000])
def test_malformed_json_is_refused(client: httpx.Client, raw: bytes):
    error = refused(client.post("/search", content=raw, headers={"content-type": "application/json"}), 400)
    assert error["type"] == "bad_request"


def test_what_a_web_page_may_send_unasked_is_refused(client: httpx.Client):
    raw = json.dumps({"documents": [{"id": "x", "text": "x"}]})
    refused(client.post("/documents", content=raw, headers={"content-type": "text/plain"}), 400)
    headers = {"host": "rebound.example"}
    assert (
        "rebound.example" in refused(client.post("/search", json={"queries": ["a"]}, headers=headers), 400)["message"]
    )
    refused(client.get("/health", headers={"host": "[half"}), 400)


def test_too_large_a_body_is_refused_stated_or_not(client: httpx.Client):
    large = json.dumps({"queries": ["a"], "where": {"x": "y" * 30_000}}).encode()
    headers = {"content-type": "application/json"}
    assert refused(client.post("/search", content=large, headers=headers), 413)["type"] == "too_large"
    pieces = (large[i : i + 1000] for i in range(0, len(large), 1000))
    assert refused(client.post("/search", content=pieces, headers=headers), 413)["type"] == "too_large"
    assert client.get("/health").status_code == 200


def test_a_large_body_is_refused_before_it_is_sent(client: httpx.Client):
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=10) as wire:
        wire.sendall(b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999999\r\n\r\n")
        assert wire.recv(1000).startswith(b"HTTP/1.1 413")


def test_unknown_paths_and_methods_are_json_errors_too(client: httpx.Client):
    assert refused(client.get("/nothing"), 404)["type"] == "not_found"
    assert refused(client.get("/search"), 405)["type"] == "not_found"


def test_documents_are_added_replaced_and_deleted(client: httpx.Client):
    new = {"id": "kurt", "text": "Kurt Goedel proved incompleteness.", "metadata": {"year": 1931}}
    assert client.post("/documents", json={"documents": [new]}).json()["added"] == 1
    assert search(client, queries=["incompleteness"]).json()["hits"][0][0]["id"] == "kurt"
    assert "kurt" in refused(client.post("/documents", json={"documents": [new]}), 400)["message"]
    new["text"] = "Kurt Goedel walked with Einstein."
    answer = client.post("/documents", json={"documents": [new], "replace": True}).json()
    assert answer["added"] == 1
    hits = search(client, queries=["Einstein"]).json()
    assert hits["version"] == answer["version"] and hits["hits"][0][0]["text"] == new["text"]
    gone = client.request("DELETE", "/documents", json={"ids": ["kurt", "nobody"]}).json()
    assert gone["deleted"] == 1
    assert search(client, queries=["Einstein"]).json()["hits"] == [[]]


@pytest.mark.parametrize(
    "document",
    [{"text": "no id"}, {"id": "", "text": "x"}, {"id": "x"}, {"id": "x", "text": 5}, {"id": "x", "text": "x", "a": 1}],
)
def test_a_bad_document_is_refused(client: httpx.Client, document: dict[str, Any]):
    refused(client.post("/documents", json={"documents": [document]}), 400)


@pytest.mark.parametrize("fields", [r'"text": "a \ud800 b"', '"text": "a", "metadata": {"x": NaN}'])
def test_what_json_could_not_answer_is_not_taken(client: httpx.Client, fields: str):
    raw = f'{{"documents": [{{"id": "x", {fields}}}]}}'
    refused(client.post("/documents", content=raw, headers={"content-type": "application/json"}), 400)


def test_too_many_documents_at_once_are_refused(client: httpx.Client):
    many = [{"id": f"n{i}", "text": "x"} for i in range(21)]
    assert refused(client.post("/documents", json={"documents": many}), 413)["type"] == "too_large"
    ids = [d["id"] for d in many]
    assert refused(client.request("DELETE", "/documents", json={"ids": ids}), 413)["type"] == "too_large"


def test_searches_run_while_documents_are_added(client: httpx.Client):
    before = client.get("/health").json()["documents"]
    done = threading.Event()

    def searches() -> list[tuple[int, list[str]]]:
        seen = []
        with httpx.Client(base_url=client.base_url, timeout=30) as own:
            while not done.is_set() or not seen:
                answer = search(own, queries=["zebra", "machines think"], k=10)
                assert answer.status_code == 200, answer.text
                zebras, machines = answer.json()["hits"]
                assert [h["id"] for h in machines] == ["alan"]
                seen.append((answer.json()["version"], sorted(h["id"] for h in zebras)))
        return seen

    def add(i: int) -> int:
        documents = [{"id": f"zebra{i}-{j}", "text": f"Zebra number {i} {j}."} for j in range(2)]
        return client.post("/documents", json={"documents": documents}).json()["added"]

    with ThreadPoolExecutor(7) as pool:
        readers = [pool.submit(searches) for _ in range(3)]
        try:
            assert list(pool.map(add, range(5))) == [2] * 5
        finally:
            done.set()
        seen = [found for reader in readers for found in reader.result()]
    assert all(len(ids) % 2 == 0 for _, ids in seen)  # an add is seen whole or not at all
    assert client.get("/health").json()["documents"] == before + 10


def test_what_another_process_adds_is_found(client: httpx.Client, folder: Path):
    other = KnowledgeBase.open(folder)
    other.add([Document("emmy", "Emmy Noether connected symmetries and conserved quantities.")])
    other.close()
    assert search(client, queries=["symmetries"]).json()["hits"][0][0]["id"] == "emmy"


def test_a_read_only_server_refuses_writes_and_ends_after_the_last_answer(folder: Path):
    process, url = start(folder, "--read_only")
    with httpx.Client(base_url=url, timeout=30) as client:
        assert search(client, queries=["machines think"]).json()["hits"][0][0]["id"] == "alan"
        added = client.post("/documents", json={"documents": [{"id": "x", "text": "x"}]})
        assert refused(added, 403)["type"] == "read_only"
        assert refused(client.request("DELETE", "/documents", json={"ids": ["ada"]}), 403)["type"] == "read_only"
        assert client.get("/health").json()["read_only"] is True

        def body() -> Iterator[bytes]:  # the server is told to end in the midst of a request, which it still answers
            yield b'{"queries": ["machines'
            process.send_signal(signal.SIGTERM)
            yield b' think"]}'

        answer = client.post("/search", content=body(), headers={"content-type": "application/json"})
    assert answer.json()["hits"][0][0]["id"] == "alan"
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")


def test_mistakes_at_the_start_are_told(folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match="port=70000"):
        main([str(folder), "--port", "70000"])
    with pytest.raises(UserError, match="max_k"):
        main([str(folder), "--max_k=0"])
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "none"))):
        main([str(tmp_path / "none")])
    with listen("127.0.0.1", 0) as taken, pytest.raises(UserError, match="cannot listen"):
        main([str(folder), "--port", str(taken.getsockname()[1])])


@pytest.mark.parametrize(("host", "loopback"), [("127.0.0.1", True), ("::1", True), ("0.0.0.0", False), ("a.b", False)])
def test_it_knows_a_loopback_address(host: str, loopback: bool):
    assert ServeConfig("kb", host=host).loopback is loopback
