"""A tiny run of each part, and the parts of it that must be right for the figures to mean anything."""

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest

from nanochat.common import data_dir
from nanochat.config import UserError
from scripts import bench_retrieval, bench_retrieval_quality, bench_retrieval_worker

TINY = ["--seconds=0.05", "--repeats=1", "--questions=12", "--threads=1"]


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three sets in the layouts of the real ones: the gold is a title, an id with a grade, or the paragraph."""
    words = bench_retrieval.words(200)[40:]
    rng = random.Random(0)
    texts = [" ".join(rng.sample(words, 12)) for _ in range(30)]
    rows = [{"id": i, "title": f"Title {i}", "text": text} for i, text in enumerate(texts)]
    asked = [{"id": str(i), "question": texts[i][:40], "gold_titles": [f"Title {i}"]} for i in (3, 8)]
    folder = tmp_path / "data"
    write_rows(folder / "ir" / "titled_corpus.jsonl.gz", rows)
    write_rows(folder / "ir" / "titled_queries_dev.jsonl.gz", asked)
    write_rows(folder / "ir" / "graded_corpus.jsonl.gz", [{"id": str(i), "text": t} for i, t in enumerate(texts)])
    graded = [{"id": "a", "text": texts[5][:40], "qrels": {"5": 2, "6": 0}}, {"id": "b", "text": "none", "qrels": {}}]
    write_rows(folder / "ir" / "graded_queries.jsonl.gz", graded)
    qas = [{"id": "q", "question": texts[9][:30]}]
    write_rows(
        folder / "qa" / "squad11_dev.jsonl.gz", [{"article": "A_b", "pid": "A_b#0", "context": texts[9], "qas": qas}]
    )
    monkeypatch.setenv("NANOCHAT_DATA", str(folder))


def run(base: Path, *more: str) -> dict:
    bench_retrieval.main([*TINY, *more])
    assert (base / "bench" / "retrieval.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((base / "bench" / "retrieval.json").read_text())


def test_quality_measures_every_method_beside_its_peers(sets, base, capsys):
    result = run(base, "--parts=quality")
    rows = {(r["set"], r["method"]): r for r in result["quality"]}
    methods = [*bench_retrieval_quality.METHODS, "bm25s", "rank-bm25", "faiss flat"]
    assert set(rows) == {(s, m) for s in ("titled", "graded", "squad11_dev", "mean") for m in methods}
    for name in ("bm25", "bm25s", "rank-bm25", "simple", "hybrid"):
        assert rows["titled", name]["ndcg"] == 1, name  # the question is the beginning of the text
    assert rows["graded", "bm25"]["questions"] == 1 and rows["graded", "bm25"]["unjudged"] == 1
    assert rows["mean", "bm25"]["questions"] == 4
    for name in ("titled", "graded"):
        assert rows[name, "dense"]["ndcg"] == rows[name, "faiss flat"]["ndcg"]
    low, high = rows["titled", "dense"]["ndcg_interval"]
    assert low <= rows["titled", "dense"]["ndcg"] <= high
    assert "mean, 4 questions" in capsys.readouterr().out


def test_methods_and_sets_can_be_chosen(sets, base):
    rows = run(base, "--parts=quality", "--methods=bm25", "--sets=graded")["quality"]
    assert {(r["set"], r["method"]) for r in rows} == {("graded", m) for m in ("bm25", "bm25s", "rank-bm25")}


def test_speed_measures_engines_in_processes_of_their_own(base, capsys, monkeypatch):
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")  # compiling takes seconds
    result = run(base, "--parts=speed", "--passages=60", "--added=5", "--methods=bm25")
    rows = {r["engine"]: r for r in result["speed"]}
    assert list(rows) == ["kb bm25", "kb bm25, read", "index alone", "bm25s numba", "tokens given", "rank-bm25"]
    for r in rows.values():
        assert min(r["build_s"], r["single"], r["batch"]) > 0
    assert rows["kb bm25"]["disk_mb"] > rows["index alone"]["disk_mb"] > 0 and "disk_mb" not in rows["rank-bm25"]
    assert "add_s" in rows["kb bm25"] and "add_s" not in rows["bm25s numba"]
    ratio = next(r for r in result["ratios"] if r["ours"] == "kb bm25" and r["peer"] == "rank-bm25")
    assert ratio["single"] == pytest.approx(rows["kb bm25"]["single"] / rows["rank-bm25"]["single"])
    assert ratio["build_s"] == pytest.approx(rows["rank-bm25"]["build_s"] / rows["kb bm25"]["build_s"])
    assert "index alone / bm25s numba" in capsys.readouterr().out
    assert not list((base / "bench").glob("tmp*"))


def test_vectors_measures_ours_and_faiss_against_exact_search(base):
    rows = run(base, "--parts=vectors", "--vectors=100", "--dim=8", "--indexes=sq8")["vectors"]
    assert [(r["index"], r["engine"]) for r in rows] == [("sq8", "ours"), ("sq8", "faiss")]
    ours, peer = rows
    assert ours["recall"] == 1 and 0.8 < peer["recall"] <= 1  # so few vectors are searched exactly
    assert ours["times_build"] == ours["times_single"] == 1
    assert peer["times_single"] == pytest.approx(ours["single"] / peer["single"])


def test_generated_passages_are_the_same_for_a_seed(tmp_path):
    def made(name: str, seed: int) -> tuple[str, list[str]]:
        bench_retrieval.write_passages(tmp_path / name, tmp_path / f"{name}.json", 40, 6, seed)
        return (tmp_path / name).read_text(), json.loads((tmp_path / f"{name}.json").read_text())

    passages, questions = made("a", 0)
    assert made("b", 0) == (passages, questions) != made("c", 1)
    lengths = [len(line.split("\t")[1].split()) for line in passages.splitlines()]
    assert len(lengths) == 40 and min(lengths) >= 32 and max(lengths) <= 92
    assert len(questions) == 6 and {len(q.split()) for q in questions} == {bench_retrieval.QUESTION_WORDS}
    titles = [line.split("\t")[0] for line in passages.splitlines()]
    assert all(any(title in line for title in titles) for line in passages.splitlines())


def test_generated_words_are_distinct():
    made = bench_retrieval.words(5000)
    assert len(set(made)) == 5000 and made[: len(bench_retrieval.STOP_WORDS)] == bench_retrieval.STOP_WORDS


def test_engines_of_bm25_find_the_same(tmp_path):
    """What is compared for speed must do the same work."""
    bench_retrieval.write_passages(tmp_path / "p", tmp_path / "q.json", 300, 20, 0)
    texts = bench_retrieval_worker.read_texts(str(tmp_path / "p"), 0, None)
    questions = json.loads((tmp_path / "q.json").read_text())
    job = {"threads": 1, "folder": str(tmp_path / "ours")}
    engines = [bench_retrieval_worker.engine_of({**job, "engine": "kb bm25"})]
    engines += [
        bench_retrieval_worker.engine_of({"threads": 1, "folder": str(tmp_path / "i"), "engine": "index alone"})
    ]
    engines += [bench_retrieval_worker.Bm25s(tmp_path / "bm25s", 1, "numpy")]
    found = []
    for engine in engines:
        engine.build(texts)
        engine.open()
        found.append([list(row) for row in engine.search(questions, 5)])
    hits = [{int(hit.document.id) for hit in row} for row in found[0]]
    for other in found[1:]:
        assert np.mean([a == set(b) for a, b in zip(hits, other, strict=True)]) >= 0.9  # but for equal scores


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--parts=all", "parts=all"),
        ("--methods=bm26", "methods=bm26"),
        ("--vectors=3", "vectors=3"),
        ("--dim=0", "dim=0"),
    ],
)
def test_wrong_settings_are_refused(flag, said):
    with pytest.raises(UserError, match=said):
        bench_retrieval.main([flag])


def test_an_unknown_set_is_named(sets, base):
    with pytest.raises(UserError, match="titled"):
        bench_retrieval.main(["--parts=quality", "--sets=nothing"])


@pytest.mark.data
def test_the_real_sets_are_read():
    assert data_dir()
    found = {
        c.name: (len(c.documents), len(c.questions))
        for c in bench_retrieval_quality.read_sets(["hotpot500", "squad11_dev"])
    }
    assert found == {"hotpot500": (4937, 255), "squad11_dev": (420, 1924)}
