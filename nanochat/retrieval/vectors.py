"""Vectors on disk and the FAISS indexes over them. What an index proposes is scored again with the float32 vectors.

    flat    the vectors themselves: exact
    sq8     8 bits a value, a quarter of the memory; candidates are found by them and ordered by the vectors
    hnsw    a graph over 8-bit vectors (Malkov & Yashunin, arXiv 1603.09320): for more than can be scanned
    ivfpq   cells and product codes (Jegou et al. 2011), a sixteenth of the memory: where nothing else fits

A segment's folder holds dense.json, index.faiss and, unless the index is flat, vectors.f32 (n * dim float32, little
endian); the large ones are memory-mapped. A segment of fewer than FLAT_BELOW vectors is flat whatever is asked.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.common import atomic_write, read_json
from nanochat.config import UserError
from nanochat.retrieval.contract import NO_HIT

SCAN_LIMIT = 200_000  # vectors that 8-bit scanning serves at some 150 queries a second and core
FLAT_BELOW = 2_000  # too few to train cells and codes on, and scanned in microseconds
FEW = 0.1  # allowed share below which a graph or cells would be walked in vain: those allowed are scanned
TIE = 1e-5  # more than two ways of summing a product of unit vectors differ
BLOCK = 65_536  # vectors copied into memory at a time
BATCH = 16  # queries given to cells at a time: from 20 on FAISS multiplies matrices, which rounds otherwise


def library() -> Any:
    """The module faiss, imported when the first vectors are; its type stubs lag behind it."""
    import faiss

    return faiss


def read_vectors(path: Path, n: int, dim: int) -> np.ndarray:
    """-> (n, dim) float32, memory-mapped."""
    if not path.is_file() or path.stat().st_size != n * dim * 4:
        raise UserError(f"{path} is missing or not {n} x {dim} float32: restore it, or build the base again")
    return np.memmap(path, "<f4", "r", shape=(n, dim)) if n else np.zeros((0, dim), np.float32)


def choose_index(asked: str, n: int) -> str:
    if n < FLAT_BELOW:
        return "flat"
    return asked if asked != "auto" else "sq8" if n <= SCAN_LIMIT else "hnsw"


def make_index(kind: str, vectors: np.ndarray) -> Any:
    """A trained FAISS index of all vectors, inner product."""
    faiss = library()
    n, dim = vectors.shape
    if kind == "flat":
        index = faiss.IndexFlatIP(dim)
    elif kind == "sq8":
        index = faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
    elif kind == "hnsw":
        index = faiss.IndexHNSWSQ(dim, faiss.ScalarQuantizer.QT_8bit, 32, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = 200
    else:
        assert kind == "ivfpq", kind
        cells = max(1, min(int(4 * n**0.5), n // 39))  # FAISS wants 39 vectors a cell
        codes = max(m for m in range(1, dim // 4 + 2) if dim % m == 0)  # of 8 bits, for four values each
        index = faiss.IndexIVFPQ(faiss.IndexFlatIP(dim), dim, cells, codes, 8, faiss.METRIC_INNER_PRODUCT)
        index.cp.min_points_per_centroid = index.pq.cp.min_points_per_centroid = 1  # fewer are fine: recall is measured
    if not index.is_trained:
        index.train(np.ascontiguousarray(vectors[:: max(1, n // 100_000)]))
    for start in range(0, n, BLOCK):
        index.add(np.ascontiguousarray(vectors[start : start + BLOCK]))
    return index


def write_index(index: Any, path: Path) -> None:
    faiss = library()
    with atomic_write(path) as f:
        faiss.write_index(index, faiss.PyCallbackIOWriter(f.write))


def measure_recall(segment: "Segment", vectors: np.ndarray, seed: int) -> float | None:
    """recall@10 against exact search, of 200 of the vectors (each without itself) -> None for fewer than two."""
    n = len(vectors)
    if n < 2:
        return None
    rows = np.random.default_rng(seed).choice(n, min(n, 200), replace=False)
    queries, k = np.ascontiguousarray(vectors[rows]), min(11, n)
    exact = best(scan_rows(vectors, np.arange(n), queries, k), queries, vectors, k)[0]
    found = best(segment.candidates(queries, k), queries, vectors, k)[0]
    pairs = [(set(e) - {row}, set(f)) for row, e, f in zip(rows, exact, found, strict=True)]
    return round(float(np.mean([len(e & f) / len(e) for e, f in pairs])), 4)


# ---- searching ----


class Segment:
    """The index of one segment, opened. Row numbers here count from 0 in each segment."""

    def __init__(self, folder: Path, ef: int, nprobe: int) -> None:
        faiss = library()
        about = read_json(folder / "dense.json", "dense index")
        self.n, self.kind, self.ef, self.nprobe = about["vectors"], about["index"], ef, nprobe
        if not (folder / "index.faiss").is_file():
            raise UserError(f"{folder / 'index.faiss'} does not exist: restore it, or build the base again")
        try:
            self.index = faiss.read_index(str(folder / "index.faiss"), faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as e:
            raise UserError(f"{folder / 'index.faiss'} is damaged: restore it, or build the base again") from e
        if self.index.ntotal != self.n or self.index.d != about["dim"]:
            raise UserError(f"{folder}: index.faiss and dense.json do not fit: restore them, or build the base again")
        if self.kind != "flat":
            self.vectors = np.asarray(read_vectors(folder / "vectors.f32", self.n, about["dim"]))
        elif self.n:
            self.vectors = faiss.rev_swig_ptr(self.index.get_xb(), self.n * about["dim"]).reshape(self.n, about["dim"])
        else:
            self.vectors = np.zeros((0, about["dim"]), np.float32)

    def candidates(self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> list[np.ndarray]:
        """queries: (M, dim) -> rows of each that may hold its k best; a flat index and a small share allowed: do."""
        n_allowed = self.n if allowed is None else int(np.count_nonzero(allowed))
        if not n_allowed:
            return [np.empty(0, np.int64)] * len(queries)
        if self.kind == "flat":
            return scan(self.index, queries, k, allowed)
        if allowed is not None and n_allowed < FEW * self.n:
            return scan_rows(self.vectors, np.flatnonzero(allowed), queries, k)
        step = BATCH if self.kind == "ivfpq" else len(queries)
        found = [c for i in range(0, len(queries), step) for c in self.approximate(queries[i : i + step], k, allowed)]
        short = [i for i, c in enumerate(found) if len(c) < min(k, n_allowed)]  # a graph may end behind a filter
        if short:
            rows = np.arange(self.n) if allowed is None else np.flatnonzero(allowed)
            for i, complete in zip(short, scan_rows(self.vectors, rows, queries[short], k), strict=True):
                found[i] = complete
        return found

    def approximate(self, queries: np.ndarray, k: int, allowed: np.ndarray | None) -> list[np.ndarray]:
        faiss = library()
        n, select = min(max(4 * k, 100), self.n), selector(allowed)
        if self.kind == "hnsw":
            params = faiss.SearchParametersHNSW(efSearch=max(self.ef, n), sel=select)
        elif self.kind == "ivfpq":
            params = faiss.SearchParametersIVF(nprobe=self.nprobe, sel=select)
        else:
            params = faiss.SearchParameters(sel=select)
        return [row[row != NO_HIT] for row in self.index.search(queries, n, params=params)[1]]


def selector(allowed: np.ndarray | None) -> Any:
    """(n,) bool -> what FAISS skips rows by. FAISS wants a bit a row; the selector keeps them alive."""
    return None if allowed is None else library().IDSelectorBitmap(np.packbits(allowed, bitorder="little"))


def scan(index: Any, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> list[np.ndarray]:
    """Exact: for each query the k best rows of a flat index, and all that are as good as the k-th but for rounding."""
    faiss = library()
    params, n = faiss.SearchParameters(sel=selector(allowed)), k + 16
    found: list[np.ndarray] = [np.empty(0, np.int64)] * len(queries)
    left = np.arange(len(queries))
    while len(left):
        n = min(n, index.ntotal)
        scores, rows = index.search(queries[left], n, params=params)
        more = (rows[:, -1] != NO_HIT) & (scores[:, -1] > scores[:, min(k, n) - 1] - TIE) & (n < index.ntotal)
        for i in np.flatnonzero(~more):
            found[left[i]] = rows[i][rows[i] != NO_HIT]
        left, n = left[more], 4 * n
    return found


def scan_rows(vectors: np.ndarray, rows: np.ndarray, queries: np.ndarray, k: int) -> list[np.ndarray]:
    """scan of some rows of the vectors, BLOCK in memory at a time."""
    parts = []
    for start in range(0, len(rows), BLOCK):
        own = rows[start : start + BLOCK]
        parts.append([own[c] for c in scan(make_index("flat", vectors[own]), queries, k)])
    return [np.concatenate(p) for p in zip(*parts, strict=True)]


def best(
    candidates: Sequence[np.ndarray], queries: np.ndarray, vectors: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Score the candidates with their vectors -> rows (M, k) int64 and scores (M, k) float32, best first.

    Summed row by row, never as a matrix product: a score depends on nothing but its two vectors.
    """
    ids, scores = np.full((len(queries), k), NO_HIT, np.int64), np.full((len(queries), k), -np.inf, np.float32)
    for m, (rows, query) in enumerate(zip(candidates, queries, strict=True)):
        rows = np.sort(rows)
        own = (vectors[rows] * query).sum(1)
        top = np.argsort(-own, kind="stable")[:k]
        ids[m, : len(top)], scores[m, : len(top)] = rows[top], own[top]
    return ids, scores
