"""The OpenSearch back end on real nodes: one JVM each on loopback (tests/opensearch_nodes.py)."""

import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from nanochat.config import UserError
from nanochat.retrieval.chunking import chunk_spans
from nanochat.retrieval.document import Document, indexed_text
from nanochat.retrieval.kb import KnowledgeBase
from nanochat.retrieval.opensearch import OpenSearchBase
from nanochat.retrieval.opensearch_engine import Engine, parse_address
from nanochat.retrieval.opensearch_records import records_of
from tests.opensearch_nodes import Node, free_ports

pytestmark = pytest.mark.slow
DIM = 64


class LetterPairs:
    """An encoder without training: counts of letter pairs."""

    fingerprint, dim = "letter pairs", DIM

    def __init__(self) -> None:
        self.encoded = 0

    def encode(self, texts, kind="passage") -> np.ndarray:
        self.encoded += len(texts)
        out = np.zeros((len(texts), DIM), np.float32)
        for row, text in zip(out, texts, strict=True):
            for a, b in zip(text.lower(), text.lower()[1:], strict=False):
                if (a + b).isalpha():
                    row[(ord(a) * 31 + ord(b)) % DIM] += 1
        return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-12)


CITIES = ["Lisbon", "Oslo", "Kyoto", "Cairo", "Quito", "Hanoi", "Sofia", "Turin", "Perth", "Accra"]
TRADES = ["weaver", "baker", "printer", "sailor", "mason", "potter"]


def people(n: int = 120) -> list[Document]:
    """Each has a city, a trade and a year; the second sentence is another chunk."""
    documents = []
    for i in range(n):
        city, trade, year = CITIES[i % 10], TRADES[i % 6], 1900 + i
        text = f"The person Person{i} of {city} worked as a {trade}.\n\n"
        text += f"The workshop of person{i} opened in the year {year}."
        metadata = {"city": city, "year": year, "tags": [trade, "person"], "alive": i % 2 == 0, "a.b": str(i)}
        documents.append(Document(f"p/{i}", text, title=f"Person{i}", metadata=metadata))
    return [*documents, Document("empty", "", title="Zeppelin")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("opensearch")


@pytest.fixture(scope="module")
def node(folder: Path) -> Iterator[Node]:
    started = Node("n1", folder)
    try:
        yield started.wait()
    finally:
        started.stop()


@pytest.fixture(scope="module")
def kb(node: Node) -> OpenSearchBase:
    """Not changed by any test."""
    return OpenSearchBase.build(
        people(), node.url("people"), "hybrid", chunk_tokens=14, encoder=LetterPairs(), shards=3
    )


def ids(hits) -> list[str]:
    return [hit.document.id for hit in hits]


def test_it_holds_what_was_given(kb: OpenSearchBase) -> None:
    given = people()
    assert len(kb) == len(given) and kb.n_chunks == 2 * len(given) - 1
    assert sorted(kb.documents(), key=lambda d: d.id) == sorted(given, key=lambda d: d.id)
    assert kb.get("p/7") == given[7] and kb.get("p/") is None
    kb.verify()


def test_a_hit_names_its_document_and_chunk(kb: OpenSearchBase) -> None:
    hit = kb.search("workshop opened 1917", k=1, retriever="bm25")[0]
    assert hit.document == people()[17] and hit.rank == 1 and hit.source == "bm25"
    assert hit.chunk.text == "The workshop of person17 opened in the year 1917."
    assert hit.document.text[hit.chunk.start : hit.chunk.end] == hit.chunk.text
    assert ids(kb.search("zeppelin", retriever="bm25")) == ["empty"]


def test_top_hits_are_those_of_our_own_bm25(kb: OpenSearchBase, tmp_path: Path) -> None:
    pytest.importorskip("nanochat.retrieval.bm25")
    ours = KnowledgeBase.build(people(), tmp_path / "ours", "bm25", chunk_tokens=14)
    queries = [f"in which year did the workshop of person{i} open" for i in range(0, 120, 7)]
    remote, local = kb.search(queries, k=1, retriever="bm25"), ours.search(queries, k=1)
    assert [ids(hits) for hits in remote] == [ids(hits) for hits in local]


def test_scores_do_not_depend_on_shards(kb: OpenSearchBase, node: Node) -> None:
    one = OpenSearchBase.build(people(), node.url("one_shard"), chunk_tokens=14)
    found, expected = (base.search("weaver of Lisbon", k=30, retriever="bm25") for base in (kb, one))
    assert [hit.score for hit in found] == pytest.approx([hit.score for hit in expected], rel=1e-5)
    assert ids(found) == ids(expected)


def test_vectors_are_ranked_by_inner_product(kb: OpenSearchBase, node: Node) -> None:
    encoder = LetterPairs()
    opened = KnowledgeBase.open(node.url("people"), encoder)
    found = opened.search("the potter of Quito", k=10, retriever="dense", per_document=0)
    texts = [indexed_text(hit.document.title, hit.chunk.text) for hit in found]
    exact = encoder.encode(texts) @ encoder.encode(["the potter of Quito"], "query")[0]
    np.testing.assert_allclose([hit.score for hit in found], exact, atol=1e-5)
    given = [(d, span) for d in people() for span in chunk_spans(d.text, 14) or [(0, 0)]]
    every = [indexed_text(d.title, d.text[start:end]) for d, (start, end) in given]
    best = np.sort(encoder.encode(every) @ encoder.encode(["the potter of Quito"], "query")[0])[::-1][:10]
    np.testing.assert_allclose([hit.score for hit in found], best, atol=1e-5)
    assert kb.manifest["indexes"]["dense"]["recall"] == 1  # ef is more than there are vectors


def test_the_measured_recall_is_that_of_the_graph(node: Node, capfd) -> None:
    class Noise(LetterPairs):
        def encode(self, texts, kind="passage") -> np.ndarray:
            rows = [np.random.default_rng(int(text)).standard_normal(DIM) for text in texts]
            return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    documents = [Document(str(i), str(i)) for i in range(2000)]
    coarse = {"m": 2, "ef_construction": 4, "ef": 10}
    kb = OpenSearchBase.build(documents, node.url("noise"), "dense", dense=coarse, encoder=Noise())
    measured = kb.manifest["indexes"]["dense"]["recall"]
    vectors = Noise().encode([d.text for d in documents])
    nearest = np.argsort(-vectors @ vectors.T, axis=1)[:, :10]
    queries = range(0, 2000, 20)
    found = kb.search([str(i) for i in queries], k=10)
    true = (
        np.mean(
            [
                len({int(id) for id in ids(hits)} & set(nearest[i].tolist()))
                for i, hits in zip(queries, found, strict=True)
            ]
        )
        / 10
    )
    assert measured < 0.9 and abs(measured - true) < 0.15
    assert f"recall@10 of the graph {measured:.3f}" in capfd.readouterr().err


@pytest.mark.parametrize("retriever", ["bm25", "dense", "hybrid"])
def test_many_queries_answer_as_each_alone(kb: OpenSearchBase, retriever: str) -> None:
    queries = ["baker of Sofia", "", "Person12 opened", "?!", "year 1950"]
    together = kb.search(queries, k=5, retriever=retriever)
    assert together == [kb.search(query, k=5, retriever=retriever) for query in queries]
    assert [len(hits) for hits in together] == [5, 0, 5, 0, 5]
    assert all(len(set(ids(hits))) == len(hits) for hits in together)  # best chunk of each document


def test_k_beyond_the_base_gives_all_there_are(kb: OpenSearchBase) -> None:
    assert len(kb.search("person", k=10**6, retriever="dense")) == len(kb)
    assert len(kb.search("person", k=10**6, retriever="dense", per_document=0)) == kb.n_chunks


CONDITIONS = [
    {"city": "Oslo"},
    {"city": ["Oslo", "Cairo"], "year": {">=": 1950, "<": 1990}},
    {"tags": "weaver"},
    {"tags": {"!=": "weaver"}},
    {"alive": True},
    {"year": "1950"},
    {"a.b": "12"},
    {"city": {">": "Oslo"}},
    {"missing": {"!=": 3}},
]


@pytest.mark.parametrize("where", CONDITIONS, ids=str)
def test_conditions_mean_the_same_as_in_a_folder(kb: OpenSearchBase, where: dict) -> None:
    from nanochat.retrieval.where import parse_where

    tests = parse_where(where)
    expected = {d.id for d in people() if all(key in d.metadata and t(d.metadata[key]) for key, t in tests.items())}
    for retriever in ("bm25", "dense", "hybrid"):
        assert set(ids(kb.search("person", k=200, retriever=retriever, where=where))) == expected


def test_hybrid_takes_a_weight_and_rerank_a_scorer(kb: OpenSearchBase) -> None:
    class Shortest:
        def score(self, query, texts):
            return [-len(text) for text in texts]

    query = "the potter of Quito"
    for weight, name in ((0.0, "bm25"), (1.0, "dense")):
        found = kb.search(query, k=1, retriever="hybrid", options={"weight": weight})
        assert ids(found) == ids(kb.search(query, k=1, retriever=name))
    found = kb.search(
        query, k=4, retriever="rerank", options={"scorer": Shortest(), "depth": 30}, where={"alive": True}
    )
    candidates = kb.search(query, k=30, retriever="bm25", where={"alive": True}, per_document=0)
    assert {hit.document.id for hit in found} <= set(ids(candidates)) and all(
        h.document.metadata["alive"] for h in found
    )
    lengths = [len(indexed_text(hit.document.title, hit.chunk.text)) for hit in candidates]
    assert [-hit.score for hit in found] == sorted(lengths)[:4]


def test_mmr_takes_unlike_hits(kb: OpenSearchBase) -> None:
    plain = kb.search("weaver", k=3, retriever="bm25", per_document=0)
    assert kb.search("weaver", k=3, retriever="bm25", per_document=0, mmr=1.0)[0].document == plain[0].document
    assert len(kb.search("weaver", k=3, retriever="bm25", mmr=0.3)) == 3


def test_add_delete_and_replace(node: Node) -> None:
    encoder = LetterPairs()
    kb = OpenSearchBase.build(people(), node.url("changing"), "hybrid", chunk_tokens=14, encoder=encoder)
    n, version = len(kb), kb.version
    assert kb.add([Document("gnu", "A gnu grazes here."), Document("yak", "A yak sleeps there.")]) == 2
    assert ids(kb.search("gnu", k=1)) == ["gnu"] and len(kb) == n + 2 and kb.version > version
    with pytest.raises(UserError, match="'p/3' is in the base already"):
        kb.add([Document("okapi", "An okapi hides."), Document("p/3", "again")])
    assert kb.get("okapi") is None and kb.get("p/3") == people()[3] and len(kb) == n + 2
    assert kb.add([Document("p/3", "An okapi, in one chunk.")], replace=True) == 1
    assert ids(kb.search("workshop person3", retriever="bm25", where={"year": 1903})) == []
    assert ids(kb.search("okapi", retriever="bm25")) == ["p/3"] and len(kb) == n + 2
    assert kb.delete(["gnu", "p/3", "nobody"]) == 2
    assert ids(kb.search("gnu okapi", retriever="bm25")) == [] and len(kb) == n
    kb.compact()
    kb.verify()


BUILDER = """
import sys
from nanochat.retrieval import opensearch_build
from nanochat.retrieval.opensearch import OpenSearchBase
from tests.test_opensearch import LetterPairs, people
opensearch_build.BATCH_DOCUMENTS = 10

def documents():
    for i, document in enumerate(people()):
        if i == 75:
            print("75 given", flush=True)
            sys.stdin.read()
        yield document

OpenSearchBase.build(documents(), sys.argv[1], "dense", chunk_tokens=14, encoder=LetterPairs())
"""


def test_a_killed_build_goes_on_where_it_stopped(node: Node, capfd) -> None:
    url, rest = node.url("resumed"), {"chunk_tokens": 14, "encoder": LetterPairs()}
    command = [sys.executable, "-c", textwrap.dedent(BUILDER), url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as builder:
        assert builder.stdout is not None and builder.stdout.readline() == "75 given\n"
        builder.send_signal(signal.SIGKILL)
    with pytest.raises(UserError, match="was interrupted"):
        OpenSearchBase.open(url)
    # a batch that was written in part: killed between its records and the note that they are in
    assert Engine(parse_address(url)).bulk("create", records_of(people()[71], [(0, 5)], batch=7)) == []
    with pytest.raises(UserError, match="other settings"):
        OpenSearchBase.build(people(), url, "dense", **rest | {"chunk_tokens": 15})
    with pytest.raises(UserError, match="do not begin with them"):
        OpenSearchBase.build(people()[1:], url, "dense", **rest)
    kb = OpenSearchBase.build(people(), url, "dense", progress=True, **rest)
    assert rest["encoder"].encoded == 2 * (120 - 70) + 1  # 70 documents were in whole batches
    assert len(kb) == 121 and sorted(d.id for d in kb.documents()) == sorted(d.id for d in people())
    kb.verify()
    assert "121 documents" in capfd.readouterr().err
    with pytest.raises(UserError, match="holds a knowledge base"):
        OpenSearchBase.build(people(), url, "dense", **rest)
    assert len(OpenSearchBase.build(people()[:3], url, overwrite=True)) == 3


def test_errors_say_what_to_do(kb: OpenSearchBase, node: Node) -> None:
    (nobody,) = free_ports(1)
    with pytest.raises(UserError, match="cannot be reached"):
        OpenSearchBase.open(f"opensearch://127.0.0.1:{nobody}/people")
    with pytest.raises(UserError, match="has no index 'nothing'"):
        OpenSearchBase.open(node.url("nothing"))
    other = LetterPairs()
    other.fingerprint = "another"
    with pytest.raises(UserError, match="made by the encoder letter pairs, not by another"):
        OpenSearchBase.open(node.url("people"), other)
    with pytest.raises(UserError, match="pass it to"):
        OpenSearchBase.open(node.url("people")).search("x", retriever="dense")
    with pytest.raises(UserError, match="same id 'a'"):
        OpenSearchBase.build([Document("a", "x"), Document("a", "y")], node.url("twice"))
    with pytest.raises(UserError, match="unknown option 'k_1'"):
        OpenSearchBase.build([], node.url("option"), bm25={"k_1": 1.0})
    with pytest.raises(UserError, match="analyzer"):
        OpenSearchBase.build([], node.url("option"), bm25={"analyzer": "klingon"})
    with pytest.raises(UserError, match="needs a folder's files"):
        kb.search("x", retriever="multihop")
    with pytest.raises(UserError, match="k is at least 1"):
        kb.search("x", k=0)


def test_an_empty_base_finds_nothing_and_grows(node: Node) -> None:
    kb = KnowledgeBase.build([], node.url("empty"))
    assert len(kb) == 0 and kb.search("anything") == [] and list(kb.documents()) == []
    kb.add(people())
    assert ids(kb.search("person5 workshop", k=1)) == ["p/5"]


@pytest.mark.parametrize("url", ["opensearch:///x", "opensearch://h:1", "opensearch://h:p/x", "opensearch://h/x?k=1"])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(UserError, match="expected"):
        parse_address(url)


def test_a_password_is_never_shown() -> None:
    address = parse_address("opensearch://ada:secret@h1,h2:9201/base?tls=true")
    assert address.hosts == (("h1", 9200), ("h2", 9201)) and address.password == "secret" and address.tls
    assert "secret" not in f"{address} {address!r}"
    with pytest.raises(UserError) as raised:
        parse_address("opensearch://ada:secret@h1:x/base")
    assert "secret" not in str(raised.value)


def test_a_lost_node_loses_nothing(node: Node, folder: Path) -> None:
    """The node killed is the one that started the cluster and manages it."""
    others = [Node(name, folder, seed=node) for name in ("n2", "n3")]
    try:
        for other in others:
            other.wait(nodes=3)
        ports = ",".join(f"127.0.0.1:{n.port}" for n in (node, *others))
        url, encoder = f"opensearch://{ports}/replicated", LetterPairs()
        kb = OpenSearchBase.build(
            people(), url, "hybrid", chunk_tokens=14, encoder=encoder, shards=3, replicas=1, overwrite=True
        )
        kb.engine.ask(lambda client: client.cluster.health(index="replicated", wait_for_status="green"))
        queries = [f"workshop of person{i}" for i in range(0, 120, 10)]
        before = kb.search(queries, k=5)
        node.kill()
        assert kb.search(queries, k=5) == before
        assert len(OpenSearchBase.open(url, encoder)) == 121
        assert sorted(d.id for d in kb.documents()) == sorted(d.id for d in people())
        assert kb.add([Document("after", "A gnu came afterwards.")]) == 1
        assert ids(kb.search("gnu afterwards", k=1)) == ["after"]
        kb.verify()
    finally:
        for other in others:
            other.stop()
