"""One version of a knowledge base, opened: the Base that retrievers ask, and the search over it. It never changes."""

import bisect
import itertools
import json
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.config import UserError
from nanochat.retrieval import manifest as manifests
from nanochat.retrieval.contract import NO_HIT, Retriever
from nanochat.retrieval.document import Chunk, Document, Hit
from nanochat.retrieval.mmr import mmr as rank_mmr
from nanochat.retrieval.registry import Opened, check_index, retriever_class
from nanochat.retrieval.simple import words
from nanochat.retrieval.store import Segment
from nanochat.retrieval.where import Test, parse_where

ENCODED = "dense"  # the index an encoder object given to build and open is for
KEEP_MASKS = 16  # one bool per chunk each, by filter
LETTER = re.compile(r"\w")

Found = tuple[int, float, tuple[str, ...]]  # chunk id, score, trace


class Snapshot:
    """old: the version before, whose open segments are taken over."""

    def __init__(
        self, path: Path, manifest: manifests.Manifest, encoder: Any = None, old: "Snapshot | None" = None
    ) -> None:
        self.path, self.manifest, self.encoder = path, manifest, encoder
        _check_encoder(path, manifest, encoder)
        manifests.check_sizes(path, manifest)
        opened = _opened(old) if old else {}
        self.segments = [opened.get(_key(e)) or Segment(path / "segments" / e["name"]) for e in manifest["segments"]]
        self.first_chunks = [0, *itertools.accumulate(segment.n_chunks for segment in self.segments)]
        self.first_documents = [0, *itertools.accumulate(segment.n_documents for segment in self.segments)]
        self.n_chunks = self.first_chunks[-1]
        self.deleted = [_deleted_rows(path, entry) for entry in manifest["segments"]]
        self.n_documents = self.first_documents[-1] - sum(len(rows) for rows in self.deleted)
        self._opened = Opened()
        self._lock = threading.Lock()  # of the masks
        self._masks: dict[str, np.ndarray] = {}

    # ---- what a retriever asks (contract.Base) ----

    def folders(self, index: str) -> list[Path]:
        self._check_index(index)
        return [segment.folder / index for segment in self.segments]

    def shared(self, index: str) -> Path:
        self._check_index(index)
        return self.path / "shared" / (self.manifest["shared"]["name"] or "") / index

    def options(self, index: str) -> dict[str, Any]:
        """With the encoder as an object where one was given."""
        self._check_index(index)
        return index_options(self.path, self.manifest, index, self.encoder)

    def texts(self, ids: Sequence[int]) -> list[str]:
        return [segment.indexed_text(chunk) for segment, chunk in map(self._locate, ids)]

    def titles(self, ids: Sequence[int]) -> list[str]:
        return [segment.cell("title", int(segment.document_of[chunk])) for segment, chunk in map(self._locate, ids)]

    def retriever(self, name: str, options: dict[str, Any] | None = None) -> Retriever:
        """Opened once for each name and options."""

        def make() -> Any:
            made = retriever_class(name)
            for index in made.needs:
                self._check_index(index, name)
                self.options(index)
            manifests.check_sizes(self.path, self.manifest)
            return made(self, options)

        return self._opened.get(name, options, make)

    def _check_index(self, index: str, retriever: str = "") -> None:
        cure = f"{index}={{}} or a retriever that needs it"
        check_index(self.path, self.manifest["indexes"], index, retriever, cure)

    # ---- documents ----

    def get(self, id: str) -> Document | None:
        for segment, deleted in zip(self.segments, self.deleted, strict=True):
            row = int(segment.rows_of([id])[0])
            if row >= 0 and not _holds(deleted, row):
                return segment.document(row)
        return None

    def documents(self) -> Iterator[Document]:
        for i, segment in enumerate(self.segments):
            yield from segment.documents(self.alive(i))

    def alive(self, i: int) -> np.ndarray | None:
        """(n_documents of segment i,) bool; None where nothing is deleted."""
        if not len(self.deleted[i]):
            return None
        alive = np.ones(self.segments[i].n_documents, bool)
        alive[self.deleted[i]] = False
        return alive

    def alive_rows(self, i: int, ids: Sequence[str]) -> np.ndarray:
        """The rows of segment i that these ids have and that are not deleted, rising."""
        rows = self.segments[i].rows_of(ids)
        return np.setdiff1d(rows[rows >= 0], self.deleted[i])

    def _locate(self, id: int) -> tuple[Segment, int]:
        i = bisect.bisect_right(self.first_chunks, id) - 1
        return self.segments[i], int(id) - self.first_chunks[i]

    # ---- search ----

    def search(
        self,
        queries: Sequence[str],
        k: int,
        retriever: str | None,
        where: dict[str, Any] | None,
        per_document: int,
        mmr: float | None,
        options: dict[str, Any] | None,
    ) -> list[list[Hit]]:
        """See KnowledgeBase.search."""
        retriever = retriever or self.manifest["retriever"]
        allowed = self._allowed(where)
        asked = [i for i, query in enumerate(queries) if LETTER.search(query)]
        found: list[list[Found]] = [[] for _ in queries]
        opened = self.retriever(retriever, options)
        if self.n_chunks and asked and (allowed is None or allowed.any()):
            several = [queries[i] for i in asked]
            best = self._ranked(opened, several, k if mmr is None else max(4 * k, 50), allowed, per_document)
            for i, hits in zip(asked, best, strict=True):
                found[i] = hits if mmr is None else self._diverse(hits, k, mmr)
        unread, read = Hit.unread, self.reader()
        return [
            [unread(read, id, score, rank, retriever, trace) for rank, (id, score, trace) in enumerate(row, 1)]
            for row in found
        ]

    def reader(self) -> Callable[[int], tuple[Document, Chunk]]:
        """A function of a chunk id -> the document it is of, read once, and the chunk."""
        cache: dict[tuple[Path, int], Document] = {}

        def read(id: int) -> tuple[Document, Chunk]:
            segment, chunk = self._locate(id)
            row, start, end = segment.document_of.item(chunk), segment.starts.item(chunk), segment.ends.item(chunk)
            document = cache.get((segment.folder, row))
            if document is None:
                document = cache[segment.folder, row] = segment.document(row)
            return document, Chunk(start, end, document.text[start:end])

        return read

    def _ranked(
        self, retriever: Retriever, queries: list[str], k: int, allowed: np.ndarray | None, per_document: int
    ) -> list[list[Found]]:
        """The best k chunks of each query, at most per_document (0: any number) of one document.

        Queries whose first hits are too often of the same documents are asked again for four times as many.
        """
        if self.n_chunks == self.first_documents[-1]:
            per_document = 0  # every document is one chunk
        found: list[list[Found]] = [[] for _ in queries]
        pending = list(range(len(queries)))
        want = k if per_document == 0 else 3 * k
        while pending:
            want = min(want, self.n_chunks)
            ranking = retriever.search([queries[i] for i in pending], want, allowed)
            short = []
            for row, i in enumerate(pending):
                ids, scores = ranking.ids[row].tolist(), ranking.scores[row].tolist()
                n = ids.index(NO_HIT) if NO_HIT in ids else len(ids)
                traces = ranking.trace[row][:n] if ranking.trace else [()] * n
                hits = list(zip(ids[:n], scores[:n], traces, strict=True))
                found[i] = self._thin(hits, per_document)[:k]
                if len(found[i]) < k and n == want < self.n_chunks:
                    short.append(i)
            pending, want = short, 4 * want
        return found

    def _thin(self, hits: list[Found], per_document: int) -> list[Found]:
        if per_document == 0:
            return hits
        count: dict[tuple[Path, int], int] = {}
        kept = []
        for hit in hits:
            segment, chunk = self._locate(hit[0])
            document = (segment.folder, int(segment.document_of[chunk]))
            count[document] = count.get(document, 0) + 1
            if count[document] <= per_document:
                kept.append(hit)
        return kept

    def _diverse(self, hits: list[Found], k: int, weight: float) -> list[Found]:
        sets = [set(words(text)) for text in self.texts([hit[0] for hit in hits])]
        return [hits[i] for i in rank_mmr(sets, [hit[1] for hit in hits], weight, k)]

    def _allowed(self, where: dict[str, Any] | None) -> np.ndarray | None:
        """(n_chunks,) bool, or None where every chunk may be found."""
        if not where and not any(map(len, self.deleted)):
            return None
        key = repr(where or {})
        mask = self._masks.get(key)
        if mask is None:
            tests = parse_where(where or {})
            parts = [self._matching(i, tests) for i in range(len(self.segments))]
            mask = np.concatenate([np.zeros(0, bool), *parts])
            with self._lock:
                while len(self._masks) >= KEEP_MASKS:
                    self._masks.pop(next(iter(self._masks)))
                self._masks[key] = mask
        return mask

    def _matching(self, i: int, tests: dict[str, Test]) -> np.ndarray:
        """(n_chunks of segment i,) bool: of documents that are alive and pass every test."""
        segment, mask = self.segments[i], self.alive(i)
        mask = np.ones(segment.n_documents, bool) if mask is None else mask
        for key, test in tests.items():
            codes, values = segment.metadata(key)
            mask &= np.array([*map(test, values), False])[codes]  # code -1, no such key, is the False
        return mask[segment.document_of]


def index_options(path: Path, manifest: manifests.Manifest, index: str, encoder: Any) -> dict[str, Any]:
    """The options of an index from the manifest; an encoder given at build is put back as the object."""
    options = dict(manifest["indexes"][index]["options"])
    if index == ENCODED and options.get("encoder") == "given":
        if encoder is None:
            raise UserError(
                f"the vectors of {path} were made by an encoder of your own (fingerprint {options['fingerprint']}): "
                "pass it to KnowledgeBase.open(path, encoder=...)"
            )
        options["encoder"] = encoder
    return options


def _check_encoder(path: Path, manifest: manifests.Manifest, encoder: Any) -> None:
    if encoder is None:
        return
    if ENCODED not in manifest["indexes"]:
        raise UserError(f"{path} has no index {ENCODED!r} an encoder could serve: leave encoder out")
    made_by = manifest["indexes"][ENCODED]["options"].get("fingerprint")
    if encoder.fingerprint != made_by:
        raise UserError(
            f"the vectors of {path} were made by the encoder {made_by}, not by {encoder.fingerprint}: "
            "open it with that one, or build it again"
        )


def _opened(old: Snapshot) -> dict[tuple[str, str], Segment]:
    return {_key(entry): segment for entry, segment in zip(old.manifest["segments"], old.segments, strict=True)}


def _key(entry: dict[str, Any]) -> tuple[str, str]:
    """A base built anew at the same path has the same names, but not the same content."""
    return entry["name"], json.dumps(entry["files"])


def _deleted_rows(path: Path, entry: dict[str, Any]) -> np.ndarray:
    """Rising rows, int32."""
    if not entry["deleted"]:
        return np.zeros(0, np.int32)
    file = path / next(iter(entry["deleted"]["file"]))
    try:
        rows = np.load(file)
        if rows.shape != (entry["deleted"]["count"],) or rows.dtype != np.int32:
            raise ValueError(f"it holds {rows.dtype} {rows.shape}")
    except (ValueError, EOFError, TypeError) as e:
        raise UserError(f"{file} is damaged ({e}): restore it or build the base again") from e
    return rows


def _holds(rows: np.ndarray, row: int) -> bool:
    place = int(np.searchsorted(rows, row))
    return place < len(rows) and int(rows[place]) == row
