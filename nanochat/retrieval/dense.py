"""Search by vectors: what an encoder says of each chunk, in a FAISS index (vectors.py).

Which index: "auto" is sq8 up to SCAN_LIMIT vectors and hnsw above; flat, sq8, hnsw and ivfpq may be asked for. How much
of the exact answer it gives (recall@10, asked with 200 of its own vectors) is measured when it is built, printed and
returned for the manifest. Scores are inner products of unit vectors: cosines.
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from nanochat.common import atomic_write, write_json
from nanochat.config import UserError
from nanochat.retrieval.contract import NO_HIT, Base, Ranking
from nanochat.retrieval.encoders import Encoder, load_encoder
from nanochat.retrieval.options import read_options
from nanochat.retrieval.static import StaticEncoder
from nanochat.retrieval.vectors import (
    Segment,
    best,
    choose_index,
    make_index,
    measure_recall,
    read_vectors,
    write_index,
)

ENCODE = 1024  # texts encoded at a time


@dataclass(frozen=True)
class DenseOptions:
    """fingerprint and dim (of another encoder than "static") are filled in when a base is made."""

    encoder: object = "static"  # "static", a sentence-transformers model's folder or name, or an Encoder
    dim: int = 256
    index: Literal["auto", "flat", "sq8", "hnsw", "ivfpq"] = "auto"
    ef: int = 128  # hnsw: candidates kept while searching
    nprobe: int = 32  # ivfpq: cells looked into
    epochs: int = 20  # of the static encoder's training
    seed: int = 0
    fingerprint: str = ""

    def __post_init__(self) -> None:
        for name in ("dim", "ef", "nprobe"):
            if getattr(self, name) < 1:
                raise UserError(f"dense: {name}={getattr(self, name)}: expected at least 1")
        if self.epochs < 0:
            raise UserError(f"dense: epochs={self.epochs}: expected at least 0, 0 leaves the vectors untrained")


# ---- building ----


class DenseIndex:
    name: ClassVar[str] = "dense"

    @staticmethod
    def prepare(texts: Iterable[str], shared: Path, options: dict[str, Any]) -> dict[str, Any]:
        """Trains the static encoder; asks any other for its fingerprint. An Encoder object stays in the result."""
        o = read_options(DenseOptions, options, "dense")
        if o.encoder == "static":
            StaticEncoder.train(texts, o.dim, o.seed, o.epochs).save(shared)
        encoder = load_encoder(o.encoder, shared)
        kept = {f.name: getattr(o, f.name) for f in fields(o)}
        return kept | {"dim": encoder.dim, "fingerprint": encoder.fingerprint}

    @staticmethod
    def build(texts: Iterable[str], folder: Path, shared: Path, options: dict[str, Any]) -> dict[str, Any]:
        """-> {"vectors", "dim", "index", "recall@10"}. UserError for an encoder that gives NaN."""
        o = read_options(DenseOptions, options, "dense")
        encoder = load_encoder(o.encoder, shared, o.fingerprint)
        n = write_vectors(texts, encoder, folder / "vectors.f32")
        vectors = read_vectors(folder / "vectors.f32", n, encoder.dim)
        about: dict[str, Any] = {"vectors": n, "dim": encoder.dim, "index": choose_index(o.index, n)}
        write_index(make_index(about["index"], vectors), folder / "index.faiss")
        write_json(folder / "dense.json", about)
        about["recall@10"] = measure_recall(Segment(folder, o.ef, o.nprobe), vectors, o.seed)
        print(
            f"dense: {n:,} vectors of {encoder.dim}, {about['index']}, recall@10 {about['recall@10']}", file=sys.stderr
        )
        write_json(folder / "dense.json", about)
        if about["index"] == "flat":
            (folder / "vectors.f32").unlink()  # index.faiss holds them
        return about


def write_vectors(texts: Iterable[str], encoder: Encoder, path: Path) -> int:
    """Encode and write, ENCODE texts in memory at a time -> how many."""
    n, texts = 0, iter(texts)
    with atomic_write(path) as f:
        while batch := list(islice(texts, ENCODE)):
            vectors = np.asarray(encoder.encode(batch, "passage"), "<f4")
            assert vectors.shape == (len(batch), encoder.dim), f"{vectors.shape} for {len(batch)} texts"
            bad = ~np.isfinite(vectors).all(1)
            if bad.any():
                i = int(bad.argmax())
                raise UserError(
                    f"the encoder gives no finite vector for text {n + i} ({batch[i][:40]!r}): use another encoder or "
                    "checkpoint"
                )
            f.write(vectors.tobytes())
            n += len(batch)
    return n


# ---- searching ----


@dataclass(frozen=True)
class DenseSearchOptions:
    """0 = as the base was built."""

    ef: int = 0
    nprobe: int = 0


class DenseRetriever:
    name = "dense"
    needs: ClassVar[tuple[str, ...]] = ("dense",)

    def __init__(self, base: Base, options: dict[str, Any] | None = None) -> None:
        built = read_options(DenseOptions, base.options("dense"), "dense")
        own = read_options(DenseSearchOptions, options or {}, "dense")
        ef, nprobe = own.ef or built.ef, own.nprobe or built.nprobe
        self.segments = [Segment(folder, ef, nprobe) for folder in base.folders("dense")]
        # of a base that never had a document there is no encoder to load: the first ones train it
        self.encoder = load_encoder(built.encoder, base.shared("dense"), built.fingerprint) if self.segments else None
        assert sum(s.n for s in self.segments) == base.n_chunks, "the dense index is of other chunks"

    def search(self, queries: Sequence[str], k: int, allowed: np.ndarray | None = None) -> Ranking:
        """A query without words has no vector and no hits."""
        ids, scores = np.full((len(queries), k), NO_HIT, np.int64), np.full((len(queries), k), -np.inf, np.float32)
        if self.encoder is None:
            return Ranking(ids, scores)
        vectors = self.encoder.encode(queries, "query")
        asked = np.flatnonzero(vectors.any(1))
        if len(asked):
            ids[asked], scores[asked] = self.search_vectors(np.ascontiguousarray(vectors[asked]), k, allowed)
        return Ranking(ids, scores)

    def search_vectors(
        self, vectors: np.ndarray, k: int, allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """vectors: (M, dim) float32 -> chunk ids (M, k), scores (M, k) through all segments."""
        if not np.isfinite(vectors).all():
            raise UserError("a query's vector is not finite: use another encoder or checkpoint")
        first, parts = 0, []
        for segment in self.segments:
            own = None if allowed is None else allowed[first : first + segment.n]
            ids, scores = best(segment.candidates(vectors, k, own), vectors, segment.vectors, k)
            parts.append((np.where(ids == NO_HIT, NO_HIT, ids + first), scores))
            first += segment.n
        if not parts:
            return np.full((len(vectors), k), NO_HIT), np.full((len(vectors), k), -np.inf, np.float32)
        ids, scores = (np.concatenate(p, axis=1) for p in zip(*parts, strict=True))
        order = np.argsort(-scores, axis=1, kind="stable")[
            :, :k
        ]  # chunk ids grow from part to part: ties stay in order
        return np.take_along_axis(ids, order, 1), np.take_along_axis(scores, order, 1)
