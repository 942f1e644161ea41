"""One measurement of one engine: a process that scripts.bench_retrieval starts for each.

    python -m scripts.bench_retrieval_worker '{"kind": "speed", "step": "build", "engine": "bm25s numba", ...}'

prints its figures as JSON. Imports stand inside functions because a process must hold only the library it measures.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from scripts.bench_tokenizer_worker import peak, reset_peak

TIMES = 3  # batches timed; the median counts

Figures = dict[str, float]


class Engine(Protocol):
    saves: bool  # whether another process can open what build wrote

    def build(self, texts: list[str]) -> None: ...
    def open(self) -> None: ...
    def search(self, queries: list[str], k: int) -> Sequence[Any]: ...


class Base:
    """Ours: a knowledge base with one method, in a folder or in OpenSearch. Documents come from a generator."""

    saves = True

    def __init__(self, folder: str, threads: int, method: str) -> None:
        from nanochat.retrieval import Document, KnowledgeBase, retriever_class

        self.needs = retriever_class(method).needs  # imported before the clock starts
        self.folder, self.threads, self.method = folder, threads, method
        self.Document, self.KnowledgeBase = Document, KnowledgeBase

    def documents(self, texts: Iterable[str], first: int = 0) -> Iterable[Any]:
        for i, text in enumerate(texts, first):
            title, _, body = text.partition("\n")
            yield self.Document(str(i), body, title)

    def build(self, texts: list[str]) -> None:
        bm25 = {"threads": self.threads} if "bm25" in self.needs and "://" not in self.folder else None
        self.KnowledgeBase.build(
            self.documents(texts), self.folder, retriever=self.method, bm25=bm25, overwrite="://" in self.folder
        )

    def open(self) -> None:
        self.kb = self.KnowledgeBase.open(self.folder)

    def search(self, queries: list[str], k: int) -> Sequence[Any]:
        return self.kb.search(queries, k)

    def read(self, queries: list[str], k: int) -> list[str]:
        """As search, and every text found is read."""
        return [hit.chunk.text for hits in self.kb.search(queries, k) for hit in hits]

    def add(self, texts: list[str]) -> None:
        self.kb.add(self.documents(texts, first=10**9))


class Index:
    """Ours without documents: the BM25 index and its retriever. It is what they ask of a base, too."""

    saves = True

    def __init__(self, folder: Path, threads: int) -> None:
        from nanochat.retrieval.bm25 import Bm25Index, Bm25Retriever

        self.folder, self.Bm25Index, self.Bm25Retriever = folder, Bm25Index, Bm25Retriever
        self.kept = {"threads": threads}

    def build(self, texts: list[str]) -> None:
        self.folder.mkdir(parents=True)
        about = self.Bm25Index.build(iter(texts), self.folder, self.folder, self.kept)
        (self.folder / "chunks").write_text(str(about["chunks"]))

    def open(self) -> None:
        self.n_chunks = int((self.folder / "chunks").read_text())
        self.retriever: Any = self.Bm25Retriever(self)  # pyrefly: ignore

    def search(self, queries: list[str], k: int) -> Sequence[Any]:
        return self.retriever.search(queries, k).ids

    def folders(self, index: str) -> list[Path]:
        return [self.folder]

    def options(self, index: str) -> dict[str, Any]:
        return self.kept


class Bm25s:
    """The package bm25s with its Tokenizer class and PyStemmer."""

    saves = True

    def __init__(self, folder: Path, threads: int, backend: str = "numba") -> None:
        import bm25s
        import Stemmer  # pyrefly: ignore
        from bm25s.tokenization import Tokenizer

        self.bm25s, self.folder, self.threads, self.backend = bm25s, folder, threads, backend
        self.tokenizer: Any = Tokenizer(stopwords="en", stemmer=Stemmer.Stemmer("english"))

    def build(self, texts: list[str]) -> None:
        csc = "auto" if self.backend == "numba" else "numpy"
        index = self.bm25s.BM25(method="lucene", k1=1.5, b=0.75, backend=self.backend, csc_backend=csc)
        index.index(self.tokenizer.tokenize(texts, return_as="tuple", show_progress=False), show_progress=False)
        index.save(self.folder, show_progress=False)
        self.tokenizer.save_vocab(self.folder)

    def open(self) -> None:
        self.index = self.bm25s.BM25.load(self.folder)
        self.tokenizer.load_vocab(self.folder)

    def tokens(self, queries: list[str]) -> list[list[int]]:
        return self.tokenizer.tokenize(queries, update_vocab=False, return_as="ids", show_progress=False)

    def search(self, queries: list[str], k: int) -> Sequence[Any]:
        return self.search_tokens(self.tokens(queries), k)

    def search_tokens(self, tokens: list[list[int]], k: int) -> Sequence[Any]:
        """Ids by score; it fills up with documents of score 0, which are left out."""
        n = self.threads if len(tokens) > 1 else 1
        found = self.index.retrieve(tokens, k=k, show_progress=False, n_threads=n)  # pyrefly: ignore
        return [ids[scores > 0] for ids, scores in zip(found.documents, found.scores, strict=True)]


class RankBm25:
    """The package rank-bm25 (BM25Okapi), on the tokens of bm25s. It has no file format and no batches."""

    saves = False

    def __init__(self, folder: Path, threads: int) -> None:
        from rank_bm25 import BM25Okapi

        self.make, self.tokenizer = BM25Okapi, Bm25s(folder, threads, "numpy").tokenizer

    def build(self, texts: list[str]) -> None:
        self.index = self.make(self.tokenizer.tokenize(texts, return_as="string", show_progress=False))

    def open(self) -> None:
        pass

    def search(self, queries: list[str], k: int) -> Sequence[Any]:
        tokens = self.tokenizer.tokenize(queries, update_vocab=False, return_as="string", show_progress=False)
        return [np.argsort(-self.index.get_scores(own), kind="stable")[:k] for own in tokens]


def engine_of(job: dict[str, Any]) -> Any:
    folder, threads, name = Path(job["folder"]), job["threads"], job["engine"]
    if name.startswith("kb ") or name == "opensearch":
        return Base(job["folder"], threads, "bm25" if name == "opensearch" else name.removeprefix("kb "))
    return {"index alone": Index, "bm25s numba": Bm25s, "rank-bm25": RankBm25}[name](folder, threads)


# ---- speed ----


def speed_job(job: dict[str, Any]) -> Figures:
    engine = engine_of(job)
    if job["step"] == "search":
        return search_figures(engine, job)
    if "://" not in job["folder"]:
        warm = engine_of({**job, "folder": f"{job['folder']}.warm"})
        warm.build(read_texts(job["passages"], 0, 50))  # compiles what is compiled at first use
        shutil.rmtree(f"{job['folder']}.warm", ignore_errors=True)
        shutil.rmtree(job["folder"], ignore_errors=True)
    texts = read_texts(job["passages"], 0, job["n"])
    figures = build_figures(lambda: engine.build(texts), Path(job["folder"]))
    return figures if engine.saves else figures | search_figures(engine, job)


def build_figures(build: Callable[[], None], folder: Path) -> Figures:
    before, start = reset_peak(), time.perf_counter()
    build()
    seconds = time.perf_counter() - start
    figures = {"build_s": seconds, "build_mb": (peak() - before) / 1e6}
    return figures | ({"disk_mb": size(folder) / 1e6} if folder.exists() else {})


def search_figures(engine: Any, job: dict[str, Any]) -> Figures:
    """Opening, then the first question on its own (a retriever opens with it), then the rates."""
    questions, k = json.loads(Path(job["questions"]).read_text()), job["k"]
    before, start = reset_peak(), time.perf_counter()
    engine.open()
    figures = {"open_s": time.perf_counter() - start}
    engine.search(questions[:1], k)
    figures["first_s"] = time.perf_counter() - start
    engine.search(questions[:2], k)  # batches are compiled by themselves in bm25s
    figures |= rates(lambda given: engine.search(given, k), questions, job["seconds"])
    if engine.saves:
        figures["search_mb"] = (peak() - before) / 1e6
    if isinstance(engine, Bm25s):
        tokens = engine.tokens(questions)
        given = rates(lambda chosen: engine.search_tokens(chosen, k), tokens, job["seconds"])
        figures |= {f"{name}_tokens": value for name, value in given.items()}
    if isinstance(engine, Base):
        given = rates(lambda chosen: engine.read(chosen, k), questions, job["seconds"])
        figures |= {f"{name}_read": value for name, value in given.items()}
        texts = read_texts(job["passages"], job["n"], None)
        start = time.perf_counter()
        engine.add(texts)
        figures["add_s"] = time.perf_counter() - start
    return figures


def rates(search: Callable[[Any], Any], questions: Any, seconds: float) -> Figures:
    """Questions per second: one by one for so many seconds at most, then as many at once as fit into them."""
    start, done = time.perf_counter(), 0
    while done < len(questions) and time.perf_counter() - start < seconds:
        search(questions[done : done + 1])
        done += 1
    single = done / (time.perf_counter() - start)
    n, batches = min(len(questions), max(8, int(single * seconds))), []
    for _ in range(TIMES):
        start = time.perf_counter()
        search(questions[:n])
        batches.append(n / (time.perf_counter() - start))
    return {"single": single, "batch": float(np.median(batches))}


def read_texts(path: str, first: int, last: int | None) -> list[str]:
    """Lines first .. last - 1 as the title, a new line and the text."""
    with open(path, encoding="utf-8") as f:
        return [line.rstrip("\n").replace("\t", "\n", 1) for line in islice(f, first, last)]


def size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


# ---- vectors ----


class Rows:
    """An Encoder whose text "7" has the vector of row 7."""

    def __init__(self, vectors: np.ndarray) -> None:
        self.vectors, self.dim, self.fingerprint = vectors, vectors.shape[1], "rows"

    def encode(self, texts: Sequence[str], kind: str = "passage") -> np.ndarray:
        return self.vectors[[int(text) for text in texts]]


class OurVectors:
    """Ours over a folder; it is what the retriever asks of a base, too."""

    def __init__(self, job: dict[str, Any], stored: np.ndarray) -> None:
        from nanochat.retrieval.dense import DenseIndex, DenseRetriever

        self.folder, self.n_chunks = Path(job["folder"]), len(stored)
        self.DenseIndex, self.Retriever = DenseIndex, DenseRetriever
        self.kept = DenseIndex.prepare([], self.folder, {"encoder": Rows(stored), "index": job["index"]})

    def build(self) -> None:
        self.folder.mkdir(parents=True)
        self.DenseIndex.build(map(str, range(self.n_chunks)), self.folder, self.folder, self.kept)

    def open(self) -> None:
        self.retriever: Any = self.Retriever(self)  # pyrefly: ignore

    def search(self, vectors: np.ndarray, k: int) -> np.ndarray:
        return self.retriever.search_vectors(vectors, k)[0]

    def folders(self, index: str) -> list[Path]:
        return [self.folder]

    def shared(self, index: str) -> Path:
        return self.folder

    def options(self, index: str) -> dict[str, Any]:
        return self.kept


class FaissVectors:
    """FAISS by its index factory, with the numbers ours has (nanochat/retrieval/vectors.py)."""

    def __init__(self, job: dict[str, Any], stored: np.ndarray) -> None:
        import faiss

        self.faiss: Any = faiss
        self.path, self.stored = Path(job["folder"]) / "index", stored
        n, dim = stored.shape
        cells = max(1, min(int(4 * n**0.5), n // 39))
        factories = {"flat": "Flat", "sq8": "SQ8", "hnsw": "HNSW32_SQ8", "ivfpq": f"IVF{cells},PQ{dim // 4}x8"}
        self.factory = factories[job["index"]]

    def build(self) -> None:
        index = self.faiss.index_factory(self.stored.shape[1], self.factory, self.faiss.METRIC_INNER_PRODUCT)
        if self.factory.startswith("HNSW"):
            index.hnsw.efConstruction = 200
        if not index.is_trained:
            index.train(self.stored[:100_000])
        index.add(self.stored)
        self.path.parent.mkdir(parents=True)
        self.faiss.write_index(index, str(self.path))

    def open(self) -> None:
        self.index = self.faiss.read_index(str(self.path))
        if self.factory.startswith("HNSW"):
            self.index.hnsw.efSearch = 128
        if self.factory.startswith("IVF"):
            self.index.nprobe = 32

    def search(self, vectors: np.ndarray, k: int) -> np.ndarray:
        return self.index.search(vectors, k)[1]


def vectors_job(job: dict[str, Any]) -> Figures:
    data = Path(job["data"])
    stored, asked, exact = (np.load(data / f"{name}.npy") for name in ("stored", "asked", "exact"))
    engine = (OurVectors if job["engine"] == "ours" else FaissVectors)(job, stored)
    if job["step"] == "build":
        shutil.rmtree(job["folder"], ignore_errors=True)
        return build_figures(engine.build, Path(job["folder"]))
    start = time.perf_counter()
    engine.open()
    figures = {"open_s": time.perf_counter() - start}
    found = engine.search(asked, job["k"])
    recall = np.mean([len(set(a) & set(b)) / job["k"] for a, b in zip(found.tolist(), exact.tolist(), strict=True)])
    return (
        figures | {"recall": float(recall)} | rates(lambda given: engine.search(given, job["k"]), asked, job["seconds"])
    )


def main(job: dict[str, Any]) -> None:
    print(json.dumps((speed_job if job["kind"] == "speed" else vectors_job)(job)))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
