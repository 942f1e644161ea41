"""Knowledge bases: versions that are whole whatever happens to the writer, damage that is named, filters, ids."""

import copy
import errno
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanochat.config import UserError
from nanochat.retrieval import Document, KnowledgeBase, store, writer
from nanochat.retrieval import manifest as manifests
from nanochat.retrieval.__main__ import main as command

RETRIEVER = "bm25"  # one with files
REPO = Path(__file__).resolve().parent.parent
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["nanochat.retrieval", "nanochat.retrieval.bm25"])


def make(n: int, prefix: str = "d", **metadata: Any) -> list[Document]:
    return [
        Document(
            f"{prefix}{i}", f"Text {i} of the {'red' if i % 2 else 'blue'} house.", f"Title {i}", metadata | {"n": i}
        )
        for i in range(n)
    ]


def build(path: Path, documents: Any = None, **how: Any) -> KnowledgeBase:
    return KnowledgeBase.build(
        make(20) if documents is None else documents, path / "kb", **{"retriever": "simple", **how}
    )


def ids(kb: KnowledgeBase) -> list[str]:
    return [document.id for document in kb.documents()]


def unnamed(path: Path, kb: KnowledgeBase) -> set[str]:
    """Files and folders of the base that neither its manifest names nor the version before."""
    known = {*manifests.units(kb.manifest), *kb.manifest["previous"]}
    return {f"{folder}/{p.name}" for folder in manifests.FOLDERS for p in (path / folder).glob("*")} - known


# ---- documents ----


def test_documents_come_back_as_they_were(tmp_path: Path) -> None:
    documents = [
        Document("a", "naïve 日本語 \U0001f600\n\ttext\0", "Tïtle", {"x": [1, 2.5, None, True, {"y": "z"}]}),
        Document("b", "", "only a title"),
        Document("c", "no title"),
        Document("d", ""),
        Document("e", "long " * 100_000),
    ]
    kb = build(tmp_path, documents, chunk_tokens=64, chunk_overlap=8)
    assert list(kb.documents()) == documents
    assert [kb.get(d.id) for d in documents] == documents
    assert kb.get("f") is None
    assert len(kb) == 5
    assert [h.document.id for h in kb.search("ONLY title")] == ["b", "c"]
    for hit in kb.search("long", k=10_000, per_document=0):
        assert hit.document.text[hit.chunk.start : hit.chunk.end] == hit.chunk.text
    assert kb.titles([0, 1]) == ["Tïtle", "only a title"]
    assert kb.texts([0, 1, 2]) == ["Tïtle. naïve 日本語 \U0001f600\n\ttext\0", "only a title", "no title"]


def test_a_million_characters_and_many_batches_keep_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "BATCH_ROWS", 7)
    kb = build(tmp_path, iter(make(100)), chunk_tokens=3)
    assert list(kb.documents()) == make(100)
    texts = list(store.Texts(kb.snapshot.segments[0]))
    assert texts == kb.texts(range(kb.n_chunks))
    assert len(texts) == len(store.Texts(kb.snapshot.segments[0])) > 200
    assert [kb.get(f"d{i}") for i in range(100)] == make(100)


def test_documents_are_read_one_batch_at_a_time(tmp_path: Path) -> None:
    held = 0

    class Counted(str):
        def __del__(self) -> None:
            nonlocal held
            held -= 1

    def documents() -> Iterator[Document]:
        nonlocal held
        for i in range(5 * store.BATCH_ROWS):
            held += 1
            assert held < 3 * store.BATCH_ROWS, "more than two batches are held"
            yield Document(f"{i}", Counted("text"))

    assert len(build(tmp_path, documents())) == 5 * store.BATCH_ROWS


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([Document("a", "x"), Document("b", "y"), Document("a", "z")], "documents 0 and 2 have the same id 'a'"),
        ([Document("a", "x"), {"id": "b"}], "document 1 is a dict"),
        ([Document("a", "half \ud800")], "document 'a' holds half of a surrogate pair"),
        ([Document("a", "x", metadata={"x": {1, 2}})], "document 'a': its metadata is not JSON"),
        ([Document("a", "x", metadata={"x": float("nan")})], "document 'a': its metadata is not JSON"),
        ([Document("a", "x", metadata={1: 2})], "document 'a': its metadata is not JSON"),  # pyrefly: ignore
    ],
)
def test_a_bad_document_is_named_and_leaves_nothing(tmp_path: Path, bad: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(tmp_path, bad)
    assert not list((tmp_path / "kb" / "segments").iterdir())
    kb = build(tmp_path)
    with pytest.raises(UserError, match=message):
        kb.add(bad)
    assert (kb.version, len(kb), unnamed(tmp_path / "kb", kb)) == (1, 20, set())


def test_ids_of_equal_hash_are_kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_hash", lambda id: len(id))
    kb = build(tmp_path, make(30))
    assert [kb.get(f"d{i}") for i in range(30)] == make(30)
    assert kb.delete(["d3", "d17", "x1"]) == 2
    assert ids(kb) == [f"d{i}" for i in range(30) if i not in (3, 17)]


# ---- adding and deleting ----


def test_add_delete_compact_and_reopen(tmp_path: Path) -> None:
    kb = build(tmp_path)
    assert kb.add(make(5, "e")) == 5
    assert kb.delete(["d1", "e2", "unknown", "d1"]) == 2
    expected = [f"d{i}" for i in range(20) if i != 1] + ["e0", "e1", "e3", "e4"]
    for again in (kb, KnowledgeBase.open(tmp_path / "kb")):
        assert (ids(again), len(again), again.version, again.n_chunks) == (expected, 23, 3, 25)
        assert again.get("d1") is None
    kb.compact()
    assert (ids(kb), kb.version, kb.n_chunks) == (expected, 4, 23)
    kb.compact()
    assert kb.version == 4, "nothing to do"
    assert kb.delete(["d1"]) == kb.add([]) == 0
    assert kb.version == 4
    assert kb.add(make(2)[1:]) == 1, "a deleted id is free again"
    kb.verify()


def test_an_id_the_base_has_is_refused_or_replaced(tmp_path: Path) -> None:
    kb = build(tmp_path)
    new = [Document("d3", "green"), Document("d4", "green"), Document("z", "green")]
    with pytest.raises(UserError, match=r"has a document 'd3' already \(2 such ids\): pass replace=True"):
        kb.add(new)
    assert kb.version == 1
    assert kb.add(new, replace=True) == 3
    assert (kb.version, len(kb), kb.get("d3")) == (2, 21, new[0])
    assert {h.document.id for h in kb.search("green")} == {"d3", "d4", "z"}
    assert kb.add(new, replace=True) == 3
    assert len(kb.snapshot.segments) == 2, "a segment of deleted documents only is dropped"


def test_an_empty_base_answers_and_grows(tmp_path: Path) -> None:
    kb = build(tmp_path, [], retriever=RETRIEVER)
    assert (len(kb), kb.search("house"), kb.search(["a house", "b"]), ids(kb), kb.get("a")) == (
        0,
        [],
        [[], []],
        [],
        None,
    )
    kb.verify()
    kb.compact()
    kb.add(make(3))
    assert len(kb.search("house")) == 3
    assert kb.delete(["d0", "d1", "d2"]) == 3
    assert (len(kb), kb.search("house"), kb.manifest["segments"]) == (0, [], [])
    kb.add(make(2))
    assert len(KnowledgeBase.open(tmp_path / "kb").search("house")) == 2


def test_small_segments_are_merged_and_the_large_one_is_left(tmp_path: Path) -> None:
    kb = build(tmp_path, make(500))
    first = tmp_path / "kb/segments/000001/documents.arrow"
    written = first.stat().st_mtime_ns
    kb.delete(["d7"])
    for i in range(18):
        kb.add(make(3, f"e{i}-"))
        assert len(kb.snapshot.segments) <= 8
    assert kb.manifest["segments"][0]["name"] == "000001"
    assert first.stat().st_mtime_ns == written
    assert sorted(ids(kb)) == sorted(
        [f"d{i}" for i in range(500) if i != 7] + [f"e{i}-{j}" for i in range(18) for j in range(3)]
    )
    assert unnamed(tmp_path / "kb", kb) == set()


def test_small_segments_grow_by_powers() -> None:
    assert writer.small_segments([100_000, 1000, 1000, 1000, 1000]) == [1, 2, 3, 4]
    assert writer.small_segments([100_000, 8000, *[1000] * 7]) == list(range(1, 9))
    assert writer.small_segments([100, 10_000, 1]) == [0, 2]


def test_adding_leaves_the_files_of_earlier_segments_alone(tmp_path: Path) -> None:
    kb = build(tmp_path, make(200), retriever=RETRIEVER)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "kb/segments/000001").rglob("*")}
    kb.add(make(5, "e"))
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "kb/segments/000001").rglob("*")} == before


# ---- where ----

TAGGED = [
    Document("a", "house", metadata={"lang": "en", "year": 1999, "tag": ["x", "y"], "open": True}),
    Document("b", "house", metadata={"lang": "de", "year": 2005.5, "tag": "x", "open": False}),
    Document("c", "house", metadata={"lang": "en", "year": "2005", "tag": [], "note": None}),
    Document("d", "house", metadata={"year": 1, "open": 1}),
    Document("e", "house", metadata={"lang": {"en": 1}, "year": [1990, 2010]}),
]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({}, "abcde"),
        ({"lang": "en"}, "ac"),
        ({"lang": ["en", "de"]}, "abc"),
        ({"lang": []}, ""),
        ({"lang": {"!=": "en"}}, "be"),
        ({"year": {">=": 1999}}, "abe"),
        ({"year": {">": 1, "<": 2005}}, "ae"),
        ({"year": {"<=": "2005"}}, "c"),
        ({"year": 1}, "d"),
        ({"tag": "x"}, "ab"),
        ({"tag": {"!=": "x"}}, "c"),
        ({"tag": {"in": ("y", "z")}}, "a"),
        ({"open": True}, "a"),
        ({"open": 1}, "d"),
        ({"open": 1.0}, "d"),
        ({"note": None}, "c"),
        ({"nothing": None}, ""),
        ({"lang": "en", "year": {">": 0}}, "a"),
    ],
)
def test_conditions_on_metadata(tmp_path: Path, where: dict[str, Any], expected: str) -> None:
    kb = build(tmp_path, TAGGED[:2])
    kb.add(TAGGED[2:])
    assert "".join(sorted(h.document.id for h in kb.search("house", where=where))) == expected


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"year": {"=>": 1}}, "where\\['year'\\]: unknown operator '=>', choose from ==, "),
        ({"year": {}}, "give an operator"),
        ({"year": {">": None}}, "> cannot compare with None"),
        ({"year": {">": True}}, "> cannot compare with True"),
        ({"year": {"in": "ab"}}, "'in' takes a list"),
        ({"year": [[1]]}, "in cannot compare with \\[1\\]"),
        ("lang=en", "expected a dict"),
    ],
)
def test_a_bad_condition_is_explained(tmp_path: Path, where: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(tmp_path).search("house", where=where)


# ---- arguments ----


def test_bad_arguments_are_explained(tmp_path: Path) -> None:
    kb = build(tmp_path)
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("k=0", lambda: kb.search("x", k=0)),
        ("k=2.5: expected a whole number", lambda: kb.search("x", k=2.5)),  # pyrefly: ignore
        ("per_document=-1", lambda: kb.search("x", per_document=-1)),
        ("query 3 is a int", lambda: kb.search(["x", 3])),  # pyrefly: ignore
        ("did you mean 'bm25'", lambda: kb.search("x", retriever="bm52")),
        ("retriever 'bm25' needs the index 'bm25', .* has none", lambda: kb.search("x", retriever="bm25")),
        ("has no options, got weight", lambda: kb.search("x", options={"weight": 1})),
        ("mmr=2", lambda: kb.search("house", mmr=2)),
        (r"expected a list of ids, \['d1'\]", lambda: kb.delete("d1")),
        ("holds a knowledge base: add to it, or build with overwrite=True", lambda: build(tmp_path)),
        ("chunk_overlap=5 must be less", lambda: build(tmp_path, chunk_tokens=5, chunk_overlap=5)),
        ("unknown retriever 'tfidf'", lambda: build(tmp_path, retriever="tfidf")),
        ("holds no knowledge base", lambda: KnowledgeBase.open(tmp_path)),
        ("holds no knowledge base", lambda: KnowledgeBase.open(tmp_path / "nothing")),
        ("holds other files", lambda: KnowledgeBase.build([], tmp_path)),
    ]
    for message, call in calls:
        with pytest.raises(UserError, match=message):
            call()
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        KnowledgeBase.build([], tmp_path / "file")
    kb.close()
    with pytest.raises(UserError, match="was closed"):
        kb.search("x")


class Encoder:
    """Three letters counted."""

    dim = 3

    def __init__(self, fingerprint: str = "letters-1") -> None:
        self.fingerprint = fingerprint

    def encode(self, texts: Any, kind: str = "passage") -> np.ndarray:
        counts = np.array([[1 + text.count(letter) for letter in "abc"] for text in texts], np.float32)
        return counts.reshape(-1, 3) / np.linalg.norm(counts.reshape(-1, 3), axis=1, keepdims=True)


def test_another_encoder_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    kb = build(tmp_path, retriever="dense", encoder=Encoder())
    assert "Encoder object" not in json.dumps(kb.manifest)
    kb.add(make(3, "e"))
    assert len(kb.search("house")) == 10
    bare = KnowledgeBase.open(tmp_path / "kb")
    assert len(bare.search("house", retriever="simple")) == 10
    with pytest.raises(UserError, match=r"fingerprint letters-1\): pass it to KnowledgeBase.open"):
        bare.search("house")
    with pytest.raises(UserError, match=r"fingerprint letters-1\): pass it to KnowledgeBase.open"):
        bare.add(make(1, "f"))
    with pytest.raises(UserError, match="by the encoder letters-1, not by letters-2"):
        KnowledgeBase.open(tmp_path / "kb", encoder=Encoder("letters-2"))
    assert len(KnowledgeBase.open(tmp_path / "kb", encoder=Encoder()).search("house")) == 10


def test_an_encoder_without_vectors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs no vectors"):
        build(tmp_path, encoder=Encoder())
    build(tmp_path)
    with pytest.raises(UserError, match="leave encoder out"):
        KnowledgeBase.open(tmp_path / "kb", encoder=Encoder())


# ---- damage ----


def named_files(kb: KnowledgeBase) -> list[Path]:
    return [kb.path / name for name in manifests.files(kb.manifest)]


def test_a_missing_or_cut_file_is_named_at_opening(tmp_path: Path) -> None:
    kb = build(tmp_path, retriever=RETRIEVER, bm25={})
    kb.add(make(3, "e"))
    kb.delete(["d1"])
    kb.close()
    files = [*named_files(KnowledgeBase.open(kb.path)), kb.path / "manifest.json"]
    assert len(files) > 10
    for file in files:
        whole = file.read_bytes()
        file.unlink()
        with pytest.raises(UserError, match=f"{file} is missing|holds only an unfinished build"):
            KnowledgeBase.open(kb.path)
        if whole:
            file.write_bytes(whole[:-2])
            with pytest.raises(
                UserError, match=f"{file} is .* bytes long, .* were written|{file} is damaged|{file} is not valid"
            ):
                KnowledgeBase.open(kb.path)
        file.write_bytes(whole)
    KnowledgeBase.open(kb.path).verify()


def test_a_damaged_list_of_deleted_rows_is_named(tmp_path: Path) -> None:
    kb = build(tmp_path)
    kb.delete(["d1"])
    [file] = (kb.path / "deleted").iterdir()
    whole = file.read_bytes()
    for damage in (bytes(len(whole)), whole.replace(b"(1,)", b"(0,)"), whole.replace(b"<i4", b"<f4")):
        file.write_bytes(damage)
        with pytest.raises(UserError, match=f"{file} is damaged"):
            KnowledgeBase.open(kb.path)


def test_a_flipped_bit_is_found_by_verify(tmp_path: Path) -> None:
    kb = build(tmp_path, retriever=RETRIEVER)
    kb.delete(["d1"])
    dice = random.Random(0)
    for file in named_files(kb):
        whole = file.read_bytes()
        if not whole:
            continue
        place = dice.randrange(len(whole))
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << dice.randrange(8)]) + whole[place + 1 :])
        with pytest.raises(UserError, match=f"{file} is damaged"):
            kb.verify()
        file.write_bytes(whole)
    kb.verify()


def test_no_flipped_bit_of_what_describes_the_columns_is_a_traceback(tmp_path: Path) -> None:
    kb = build(tmp_path, retriever=RETRIEVER)
    [file] = [path for path in named_files(kb) if path.name == "documents.arrow"]
    whole = file.read_bytes()
    for place in range(8, 700):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << (place % 8)]) + whole[place + 1 :])
        with pytest.raises(UserError, match="is damaged"):
            KnowledgeBase.open(kb.path).verify()


def test_a_changed_manifest_is_refused(tmp_path: Path) -> None:
    file = build(tmp_path).path / "manifest.json"
    text = file.read_text()
    for changed, message in [
        (text.replace('"documents": 20', '"documents": 21', 1), "is damaged: its own sha256"),
        (text.replace('"format": 1', '"format": 9'), "has format 9, this version reads 1"),
        ("[]", "has format 'list'"),
        (text[:-9], "is not valid JSON"),
    ]:
        file.write_text(changed)
        with pytest.raises(UserError, match=message):
            KnowledgeBase.open(file.parent)


@pytest.mark.parametrize("fail_at", range(0, 14, 2))
def test_a_full_disk_leaves_the_last_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail_at: int) -> None:
    kb = build(tmp_path, retriever=RETRIEVER)
    calls = 0
    fsync = os.fsync

    def full(fd: int) -> None:
        nonlocal calls
        calls += 1
        if calls > fail_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(fd)

    for act in (
        lambda: kb.add(make(3, "e")),
        lambda: kb.delete(["d1"]),
        lambda: build(tmp_path, make(2), overwrite=True),
    ):
        calls = 0
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            try:
                act()
            except UserError as e:
                assert "no space left" in str(e)
        for base in (kb, KnowledgeBase.open(kb.path)):
            base.refresh()
            assert unnamed(kb.path, base) == set()
            base.verify()
    assert len(kb) in (2, 19, 20, 22, 23)


def test_an_error_of_the_caller_leaves_the_last_version(tmp_path: Path) -> None:
    def broken() -> Iterator[Document]:
        yield from make(5, "e")
        raise RuntimeError("no more")

    kb = build(tmp_path)
    for act in (lambda: kb.add(broken()), lambda: build(tmp_path, broken(), overwrite=True)):
        with pytest.raises(RuntimeError, match="no more"):
            act()
        kb.refresh()
        assert (kb.version, ids(kb), unnamed(kb.path, kb)) == (1, [f"d{i}" for i in range(20)], set())


# ---- several processes ----


def test_a_second_writer_is_refused_by_name_of_the_first(tmp_path: Path) -> None:
    kb = build(tmp_path)
    other = KnowledgeBase.open(kb.path)
    with manifests.writing(kb.path):
        for act in (lambda: other.add(make(1, "e")), lambda: other.delete(["d1"]), other.compact):
            with pytest.raises(UserError, match=f"is being written by process {os.getpid()}: wait"):
                act()
        assert len(other.search("house")) == 10
    assert other.add(make(1, "e")) == 1


def test_the_lock_of_another_process_is_seen(tmp_path: Path) -> None:
    kb = build(tmp_path)
    program = (
        "import sys, time; from pathlib import Path; from nanochat.retrieval.manifest import writing\n"
        "with writing(Path(sys.argv[1])): print('locked', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, kb.path], stdout=subprocess.PIPE, text=True, cwd=REPO
    ) as child:
        try:
            assert child.stdout and child.stdout.readline() == "locked\n"
            with pytest.raises(UserError, match=f"is being written by process {child.pid}"):
                kb.add(make(1, "e"))
        finally:
            child.kill()
    assert kb.add(make(1, "e")) == 1, "the lock goes with its process"


def test_readers_see_whole_versions_while_one_writes(tmp_path: Path) -> None:
    """Documents come and go in sixes; no reader ever sees a part of six."""
    path = build(tmp_path, make(6), retriever=RETRIEVER).path
    seen: list[int] = []
    done = threading.Event()
    failed: list[BaseException] = []

    def read() -> None:
        try:
            while not done.is_set():
                kb = KnowledgeBase.open(path)
                for _ in range(5):
                    found = kb.search("house", k=1000)
                    assert len(found) == len(kb) and len(kb) % 6 == 0
                    assert {h.document.id for h in found} == set(ids(kb))
                    seen.append(kb.version)
                    kb.refresh()
        except BaseException as e:
            failed.append(e)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    kb = KnowledgeBase.open(path)
    for i in range(6):
        kb.add(make(6, f"e{i}-"))
        kb.delete([f"e{i // 2}-{j}" for j in range(6)])
        if i % 3 == 2:
            kb.compact()
    done.set()
    for reader in readers:
        reader.join()
    assert not failed, failed
    assert len(set(seen)) > 1


def test_a_reader_left_behind_goes_on_by_itself(tmp_path: Path) -> None:
    kb = build(tmp_path, retriever=RETRIEVER)
    late = KnowledgeBase.open(kb.path)
    early = KnowledgeBase.open(kb.path)
    before = [(h.document.id, h.score) for h in early.search("red house")]
    for i in range(3):
        kb.add(make(1, f"e{i}-"))
        kb.compact()
    assert [(h.document.id, h.score) for h in early.search("red house")] == before, "its files are still mapped"
    assert early.version == 1
    assert len(late.search("house", k=50)) == 23, "its index was gone before it was opened"
    assert late.version == kb.version


# ---- kills ----


def _whole(kb: KnowledgeBase) -> bool:
    """Batches of 40 documents, complete; deletions take documents 0 to 9 of a batch together."""
    batches: dict[str, set[int]] = {}
    for id in ids(kb):
        batch, _, number = id.partition("-")
        batches.setdefault(batch, set()).add(int(number))
    return all(numbers in (set(range(40)), set(range(10, 40))) for numbers in batches.values())


def _work(path: Path, act: str, ready: Connection) -> None:
    """Change the base until killed."""
    ready.send(os.getpid())
    for i in range(10_000):
        batch = make(40, f"{act}{i}-")
        if act == "build":
            KnowledgeBase.build([*batch, *make(40, f"also{i}-")], path, retriever=RETRIEVER, overwrite=True)
            continue
        kb = KnowledgeBase.open(path)
        if act == "add":
            kb.add(batch, replace=True)
        elif act == "delete":
            kb.delete([f"d{i}-{j}" for j in range(10)])
        else:
            kb.add(batch, replace=True)
            kb.delete([f"{act}{i}-{j}" for j in range(10)])
            kb.compact()


def _die_at(path: Path, act: str, n: int, ready: Connection) -> None:
    """Die at the n-th flush."""
    fsync = os.fsync
    left = [n]

    def dying(fd: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(fd)

    os.fsync = dying  # pyrefly: ignore
    _work(path, act, ready)


def _check_survivor(path: Path) -> None:
    kb = KnowledgeBase.open(path)
    assert _whole(kb)
    kb.verify()
    assert {h.document.id for h in kb.search("house", k=10_000)} == set(ids(kb))
    n = len(kb)
    assert kb.add(make(40, f"after{n}-")) == 40
    assert len(KnowledgeBase.open(path)) == n + 40
    assert unnamed(path, kb) == set()
    kb.verify()


@pytest.mark.parametrize("act", ["build", "add", "delete", "compact"])
def test_a_killed_writer_leaves_a_whole_version(tmp_path: Path, act: str) -> None:
    dice = random.Random(act)
    batches = [d for i in range(8) for d in make(40, f"d{i}-")]
    path = build(tmp_path, batches, retriever=RETRIEVER).path
    for _ in range(3):
        ready, send = SERVER.Pipe(duplex=False)
        child = SERVER.Process(target=_work, args=(path, act, send))
        child.start()
        ready.recv()
        time.sleep(dice.uniform(0.0, 0.12))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        _check_survivor(path)


@pytest.mark.parametrize("act", ["build", "add", "delete", "compact"])
def test_a_writer_killed_at_any_flush_leaves_a_whole_version(tmp_path: Path, act: str) -> None:
    start = build(tmp_path, [d for i in range(8) for d in make(40, f"d{i}-")], retriever=RETRIEVER).path
    for n in {"build": (0, 3, 7, 8), "add": (1, 5, 7, 8), "delete": (0, 1, 2, 3), "compact": (10, 14, 18, 21)}[act]:
        path = tmp_path / f"kb{n}"
        shutil.copytree(start, path)
        _, send = SERVER.Pipe(duplex=False)
        child = SERVER.Process(target=_die_at, args=(path, act, n, send))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        _check_survivor(path)


def test_a_killed_first_build_can_be_built_again(tmp_path: Path) -> None:
    path = tmp_path / "kb"
    _, send = SERVER.Pipe(duplex=False)
    child = SERVER.Process(target=_die_at, args=(path, "build", 2, send))
    child.start()
    child.join()
    with pytest.raises(UserError, match="holds only an unfinished build"):
        KnowledgeBase.open(path)
    kb = build(tmp_path)
    assert (len(kb), unnamed(path, kb)) == (20, set())


def test_building_over_a_base_keeps_its_readers(tmp_path: Path) -> None:
    old = build(tmp_path)
    new = build(tmp_path, make(3, "e"), retriever=RETRIEVER, overwrite=True)
    assert (len(old), len(new), new.version) == (20, 3, 2)
    assert len(old.search("house", k=50)) == 20
    old.refresh()
    assert ids(old) == ids(new)


def test_hits_are_of_the_version_searched_whenever_they_are_read(tmp_path: Path) -> None:
    kb = build(tmp_path, chunk_tokens=4)
    found, same = (kb.search("Text 7 house", k=30, per_document=0) for _ in range(2))
    assert pickle.loads(pickle.dumps(same)) == same
    assert kb.delete([same[0].document.id]) == 1
    for _ in range(3):  # the files of that version are gone
        kb.add(make(1, "e"), replace=True)
        kb.compact()
    kb.close()
    shutil.rmtree(kb.path)
    assert found == same and copy.copy(found[0]) == same[0]
    for hit in found:
        assert hit.chunk.text == hit.document.text[hit.chunk.start : hit.chunk.end]
        assert "_unread" not in vars(hit), "nor does it hold the version any longer"
    assert len({id(hit.document) for hit in found}) == len({hit.document.id for hit in found}), "each is read once"
    with pytest.raises(AttributeError, match="'documents'"):
        found[0].documents  # noqa: B018


def test_a_base_made_anew_at_the_same_place_is_seen(tmp_path: Path) -> None:
    old = build(tmp_path)
    shutil.rmtree(old.path)
    build(tmp_path, make(3, "e"))
    old.refresh()
    assert ids(old) == ["e0", "e1", "e2"]


# ---- the command ----


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(build(tmp_path).path)
    command([path, "info"])
    assert json.loads(capsys.readouterr().out)["counts"] == {"documents": 20, "deleted": 0, "chunks": 20}
    command([path, "search", "text", "7"])
    assert "Title 7" in capsys.readouterr().out.splitlines()[0]
    command([path, "verify"])
    assert "20 documents, every file as it was written" in capsys.readouterr().out
    with pytest.raises(UserError, match="usage: "):
        command([path, "explode"])
    (tmp_path / "kb/segments/000001/ids.npy").unlink()
    program = [sys.executable, "-m", "nanochat.retrieval", path, "verify"]
    bad = subprocess.run(program, cwd=REPO, capture_output=True, text=True)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("error: ") and bad.stderr.count("\n") == 1
