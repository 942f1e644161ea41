"""Knowledge bases beside the libraries people use for the same: bm25s, rank-bm25 and FAISS, in one run.

    python -m scripts.bench_retrieval                                        # all three parts
    python -m scripts.bench_retrieval --parts=quality --encoder=FOLDER       # and a sentence-transformers model
    python -m scripts.bench_retrieval --parts=speed --passages=1000000 --repeats=1 --methods=bm25

quality: every set of $NANOCHAT_DATA/ir and SQuAD's questions to their paragraphs (qa/squad11_dev). Documents are whole,
title before text. bm25s and rank-bm25 get Lucene's BM25 (Okapi for rank-bm25) with k1 1.5, b .75, bm25s's English stop
words and PyStemmer; FAISS an exact index of the vectors that "dense" searches. Intervals are 95 % bootstrap.
speed: generated passages of about 60 words of a Zipf vocabulary that begins with English stop words, with titles that
other passages mention. A question is 8 words of a passage. Text goes in and ids come out, unless the row says "tokens
given". "kb" rows are whole knowledge bases: their builds write documents, hashes and indexes to the disk, flushed, and
their searches return documents. "index alone" is what bm25s does too. "opensearch" (--opensearch=URL of a node that
runs) is a knowledge base there; its MB are the client's.
vectors: around random centres, length 1, questions drawn alike; recall@10 against exact search.

Every figure of speed and vectors comes from a process of its own (bench_retrieval_worker.py); --repeats goes round the
engines in turn, figures are medians. "build MB" is the peak above the texts, which each process holds as a list;
"search MB" the peak of opening and searching, memory-mapped pages included; "first s" from opening to the first answer,
compiling included. "x" columns: how many times faster ours is. Writes <output>/retrieval.{json,png}.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from nanochat.common import base_dir, git_state, machine_info, run_script, write_json
from nanochat.config import load_config
from scripts.bench_retrieval_quality import METHODS, K, Row, quality
from scripts.bench_retrieval_report import plot, ratio_table, table

RANK_BM25_MOST = 100_000  # passages; it scores every one of them in Python for each question
KINDS = ["flat", "sq8", "hnsw", "ivfpq"]
CENTRES = 1000
QUESTION_WORDS = 8
# bm25s's English list (Lucene's), the most frequent in English first
STOP_WORDS = """the of and to in a is that for it as was with be by on not this are or at but they an will if their
    there no into then such these""".split()  # noqa: SIM905
PACKAGES = ["bm25s", "rank-bm25", "faiss-cpu", "numba", "PyStemmer", "numpy", "sentence-transformers", "rustbpe"]


@dataclass(frozen=True)
class BenchRetrievalConfig:
    """Quality and speed of knowledge bases, beside bm25s, rank-bm25 and FAISS."""

    parts: Annotated[list, "quality, speed, vectors"] = field(default_factory=lambda: ["quality", "speed", "vectors"])
    sets: Annotated[list, "of quality, by name; none = every set there is"] = ()  # pyrefly: ignore
    methods: Annotated[list, "of quality and speed; speed leaves simple out above 100,000"] = tuple(METHODS)  # pyrefly: ignore
    encoder: Annotated[str, "quality: a sentence-transformers model beside the static encoder, folder or name"] = ""
    passages: Annotated[int, "of speed"] = 100_000
    opensearch: Annotated[str, "speed: an index to make and measure too, opensearch://host:9200/name"] = ""
    added: Annotated[int, "passages added afterwards"] = 1000
    questions: Annotated[int, "of speed and vectors"] = 1000
    seconds: Annotated[float, "searching one by one stops after so long"] = 10.0
    vectors: Annotated[int, "of vectors"] = 100_000
    dim: Annotated[int, "their length"] = 256
    indexes: Annotated[list, "of vectors: " + ", ".join(KINDS)] = tuple(KINDS)  # pyrefly: ignore
    threads: Annotated[int, "of every library"] = 2
    repeats: Annotated[int, "runs of each, in processes of their own"] = 3
    seed: Annotated[int, "of what is generated"] = 0
    output: Annotated[str, "folder to write to; '' = <base dir>/bench"] = ""

    def __post_init__(self) -> None:
        for name, known in (("parts", ["quality", "speed", "vectors"]), ("methods", METHODS), ("indexes", KINDS)):
            if unknown := set(getattr(self, name)) - set(known):
                raise ValueError(f"{name}={', '.join(sorted(unknown))}: expected some of {', '.join(known)}")
        for name in ("passages", "added", "questions", "vectors", "dim", "threads", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1")
        if self.vectors < K or self.passages < K:
            raise ValueError(f"passages={self.passages}, vectors={self.vectors}: expected at least {K}")


# ---- speed ----


def words(n: int) -> list[str]:
    """Distinct words: stop words, then syllables with English endings, so that stemming has something to do."""
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    made: list[str] = list(STOP_WORDS)
    number = 0
    while len(made) < n:
        number += 1
        left, stem = number, ""
        while left:
            left, digit = divmod(left, len(syllables))
            stem = syllables[digit] + stem
        made += [f"{stem}{end}" for end in ("x", "xing", "xed", "xes")]
    return made[:n]


def write_passages(path: Path, questions_path: Path, n: int, n_questions: int, seed: int) -> None:
    """A passage a line, title TAB text; the questions as JSON. The same numbers, the same files."""
    rng = np.random.default_rng(seed)
    vocabulary = np.array(words(300_000), dtype=object)
    weights = np.cumsum(1 / (np.arange(len(vocabulary)) + 2.7))  # Zipf's law as Mandelbrot has it
    titles = rng.integers(len(STOP_WORDS), len(vocabulary), (n, 2))
    title = lambda i: " ".join(word.capitalize() for word in vocabulary[titles[i]])  # noqa: E731
    asked, questions = set(rng.choice(n, min(n, n_questions), replace=False).tolist()), []
    with open(path, "w", encoding="utf-8") as f:
        for i in range(n):
            length = int(rng.integers(30, 91))
            own = vocabulary[np.searchsorted(weights, rng.random(length) * weights[-1])]
            if i in asked:
                questions.append(" ".join(own[rng.choice(length, QUESTION_WORDS, replace=False)]))
            ends = [f"{word}." if at % 12 == 11 else word for at, word in enumerate(own.tolist())]
            ends.insert(length // 2, title(int(rng.integers(n))))
            f.write(f"{title(i)}\t{' '.join(ends)}.\n")
    questions_path.write_text(json.dumps(questions))


def speed(cfg: BenchRetrievalConfig, tmp: Path) -> list[Row]:
    print(f"writing {cfg.passages + cfg.added:,} passages", flush=True)
    files = {"passages": str(tmp / "passages.txt"), "questions": str(tmp / "questions.json")}
    write_passages(Path(files["passages"]), Path(files["questions"]), cfg.passages + cfg.added, cfg.questions, cfg.seed)
    methods = [m for m in cfg.methods if m != "simple" or cfg.passages <= RANK_BM25_MOST]
    engines = [f"kb {m}" for m in sorted(methods, key=lambda m: m != "bm25")] + ["index alone", "bm25s numba"]
    engines += ["rank-bm25"] if cfg.passages <= RANK_BM25_MOST else []
    engines += ["opensearch"] if cfg.opensearch else []
    shared = {"kind": "speed", "n": cfg.passages, "k": K, "seconds": cfg.seconds, "threads": cfg.threads, **files}
    jobs = [{**shared, "engine": e, "folder": str(tmp / e.replace(" ", "_"))} for e in engines]
    for job in jobs:
        job["folder"] = cfg.opensearch if job["engine"] == "opensearch" else job["folder"]
    rows = measure(jobs, cfg.repeats)
    return [row for measured in rows for row in (measured, *also(measured))]


def also(row: Row) -> list[Row]:
    """What was measured of an engine beside its questions per second, as rows of their own."""
    named = {"tokens": "tokens given", "read": f"{row['engine']}, read"}
    return [
        {**row, "engine": name, "single": row[f"single_{key}"], "batch": row[f"batch_{key}"]}
        for key, name in named.items()
        if f"single_{key}" in row
    ]


def ratios(rows: list[Row]) -> list[Row]:
    """How many times faster, or smaller, each of our BM25s is than each peer."""
    ours = ("kb bm25", "kb bm25, read", "index alone")
    peers = ("bm25s numba", "tokens given", "rank-bm25", "opensearch")
    by_name = {r["engine"]: r for r in rows}
    found = []
    for mine in (by_name[name] for name in ours if name in by_name):
        for peer in (by_name[name] for name in peers if name in by_name):
            row: Row = {"ours": mine["engine"], "peer": peer["engine"]}
            less = (key for key in ("build_s", "build_mb", "disk_mb", "search_mb") if key in peer)
            row |= {key: peer[key] / max(mine[key], 1e-9) for key in less}
            found.append(row | {key: mine[key] / peer[key] for key in ("single", "batch")})
    return found


def vectors(cfg: BenchRetrievalConfig, tmp: Path) -> list[Row]:
    rng = np.random.default_rng(cfg.seed)
    centres = rng.standard_normal((CENTRES, cfg.dim), np.float32)
    all_ = rng.standard_normal((cfg.vectors + cfg.questions, cfg.dim), np.float32)
    all_ += centres[rng.integers(0, CENTRES, len(all_))]
    all_ /= np.linalg.norm(all_, axis=1, keepdims=True)
    stored, asked = all_[: cfg.vectors], all_[cfg.vectors :]
    exact = [np.argpartition(-(stored @ q), K - 1)[:K] for q in asked]
    for name, array in (("stored", stored), ("asked", asked), ("exact", np.array(exact))):
        np.save(tmp / f"{name}.npy", array)
    jobs = []
    for kind in (k for k in KINDS if k in cfg.indexes):
        for engine in ("ours", "faiss"):
            job = {"kind": "vectors", "engine": engine, "index": kind, "k": K, "data": str(tmp), "threads": cfg.threads}
            jobs.append({**job, "seconds": cfg.seconds, "folder": str(tmp / f"{engine}_{kind}")})
    rows = measure(jobs, cfg.repeats)
    ours = {r["index"]: r for r in rows if r["engine"] == "ours"}
    for r in rows:
        r["times_build"] = r["build_s"] / ours[r["index"]]["build_s"]
        r |= {f"times_{name}": ours[r["index"]][name] / r[name] for name in ("single", "batch")}
    return rows


def measure(jobs: list[Row], repeats: int) -> list[Row]:
    """One row a job, with the medians over repeats."""
    runs: list[list[Row]] = [[] for _ in jobs]
    for repeat in range(repeats):
        for i, job in enumerate(jobs):
            runs[i].append(run_job(job))
            name = f"{job['engine']} {job.get('index', '')}".strip()
            print(f"{repeat * len(jobs) + i + 1}/{repeats * len(jobs)} {name}", file=sys.stderr, flush=True)
    rows = []
    for job, done in zip(jobs, runs, strict=True):
        row = {key: job[key] for key in ("engine", "index") if key in job}
        row |= {key: statistics.median(r[key] for r in done) for key in done[0]}
        rows.append({**row, "runs": done})
    return rows


def run_job(job: Row) -> Row:
    """Build in one process, open and search in another; an engine that cannot save does both in the first."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), str(job["threads"]))
    figures: Row = {}
    for step in ("build", "search"):
        command = [sys.executable, "-m", "scripts.bench_retrieval_worker", json.dumps({**job, "step": step})]
        done = subprocess.run(command, env={**os.environ, **threads}, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{step} with {job['engine']} failed:\n{done.stderr[-2000:]}")
        figures |= json.loads(done.stdout.splitlines()[-1])
        if "single" in figures:
            break
    return figures


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def main(argv: list[str]) -> None:
    cfg = load_config(BenchRetrievalConfig, argv)
    out = Path(cfg.output or base_dir() / "bench")
    out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"config": asdict(cfg), "machine": machine_info(), **git_state(), "versions": versions()}
    for part in ("quality", "speed", "vectors"):
        if part not in cfg.parts:
            continue
        if part == "quality":
            result[part] = quality(
                cfg.sets, cfg.methods, cfg.encoder, lambda rows: print(table("quality", rows), flush=True)
            )
            shown = [r for r in result[part] if r["set"] == "mean"]
        else:
            with tempfile.TemporaryDirectory(dir=out) as tmp:
                shown = result[part] = (speed if part == "speed" else vectors)(cfg, Path(tmp))
        print(table(part, shown), flush=True)
    if "speed" in result:
        result["ratios"] = ratios(result["speed"])
        print(ratio_table(result["ratios"]))
    write_json(out / "retrieval.json", result)
    plot(result, out / "retrieval.png")
    print(f"wrote {out / 'retrieval.json'} and retrieval.png")


if __name__ == "__main__":
    run_script(main)
