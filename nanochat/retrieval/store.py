"""One segment on disk: documents and chunks in Arrow files that are mapped, not read, and a table that finds an id.

documents.arrow: id, title, text, metadata (JSON), in batches of a few megabytes. chunks.arrow: document (row), start,
end (characters of its text), one batch. ids.npy: 64-bit hashes of the ids, sorted; rows.npy: their rows.
"""

import bisect
import hashlib
import itertools
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from nanochat.common import fsync_dir, sha256_file
from nanochat.config import UserError
from nanochat.retrieval.chunking import check_chunking, chunk_spans
from nanochat.retrieval.document import Document, batches, indexed_text, metadata_json

DOCUMENTS = pa.schema([(name, pa.large_string()) for name in ("id", "title", "text", "metadata")])
CHUNKS = pa.schema([(name, pa.int32()) for name in ("document", "start", "end")])
PLACE = {name: i for i, name in enumerate(DOCUMENTS.names)}
BATCH_ROWS = 4096
BATCH_CHARACTERS = 4_000_000
KEEP_KEYS = 16  # metadata keys kept decoded
MISSING = object()


# ---- writing ----


def write_documents(documents: Iterable[Document], folder: Path, chunk_tokens: int, chunk_overlap: int) -> None:
    """Write a segment without indexes, holding one batch at a time. UserError for two documents of one id."""
    check_chunking(chunk_tokens, chunk_overlap)
    hashes, chunks = array("Q"), [array("i"), array("i"), array("i")]
    with open(folder / "documents.arrow", "wb") as f, pa.ipc.new_file(f, DOCUMENTS) as out:
        for batch in batches(documents, BATCH_ROWS, BATCH_CHARACTERS):
            for document in batch:
                # a document without text still has a chunk: its title is found
                for start, end in chunk_spans(document.text, chunk_tokens, chunk_overlap) or [(0, 0)]:
                    for column, value in zip(chunks, (len(hashes), start, end), strict=True):
                        column.append(value)
                hashes.append(_hash(document.id))
            out.write_batch(_arrow(batch))
    columns = [pa.array(np.frombuffer(column, np.int32)) for column in chunks]
    with open(folder / "chunks.arrow", "wb") as f, pa.ipc.new_file(f, CHUNKS) as out:
        out.write_batch(pa.record_batch(columns, schema=CHUNKS))
    ids = np.frombuffer(hashes, np.uint64)
    rows = np.argsort(ids, kind="stable")
    np.save(folder / "ids.npy", ids[rows])
    np.save(folder / "rows.npy", rows.astype(np.int32))
    _check_unique(Segment(folder))


def _arrow(batch: Sequence[Document]) -> pa.RecordBatch:
    try:
        columns = [[getattr(d, name) for d in batch] for name in ("id", "title", "text")]
        return pa.record_batch(
            [pa.array(c, pa.large_string()) for c in (*columns, map(metadata_json, batch))], schema=DOCUMENTS
        )
    except UnicodeEncodeError:
        bad = next(d for d in batch if _not_utf8(d.id) or _not_utf8(d.title) or _not_utf8(d.text))
        raise UserError(
            f"document {bad.id!r} holds half of a surrogate pair, which is no character: decode its source as UTF-8"
        ) from None


def _not_utf8(text: str) -> bool:
    return any("\ud800" <= c <= "\udfff" for c in text)


def _hash(id: str) -> int:
    return int.from_bytes(hashlib.blake2b(id.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _check_unique(segment: "Segment") -> None:
    """UserError naming two rows of one id. Only rows of equal hash are looked at."""
    same = np.flatnonzero(segment.hashes[1:] == segment.hashes[:-1])
    seen: dict[str, int] = {}
    for i in sorted({*same.tolist(), *(same + 1).tolist()}, key=lambda i: segment.hash_rows[i]):
        row = int(segment.hash_rows[i])
        if (id := segment.cell("id", row)) in seen:
            raise UserError(f"documents {seen[id]} and {row} have the same id {id!r}: give every document its own")
        seen[id] = row


def seal(folder: Path, base: Path) -> dict[str, dict[str, Any]]:
    """Flush all files of a folder to disk -> {path within base: {"size", "sha256"}}."""
    sealed = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            fsync_dir(path)
        else:
            with open(path, "rb") as f:
                os.fsync(f.fileno())
            sealed[path.relative_to(base).as_posix()] = {"size": path.stat().st_size, "sha256": sha256_file(path)}
    for path in (folder, folder.parent, base):
        fsync_dir(path)
    return sealed


# ---- reading ----


class Segment:
    """A mapped segment. Rows count documents, chunks count chunks, both from 0 within the segment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.batches = _map(folder / "documents.arrow")
            self.columns = [[Cells(column) for column in batch.columns] for batch in self.batches]
            document, start, end = [c.to_numpy() for c in _map(folder / "chunks.arrow")[0].columns]
            self.hashes = np.load(folder / "ids.npy", mmap_mode="r")  # (n_documents,) uint64, sorted
            self.hash_rows = np.load(folder / "rows.npy", mmap_mode="r")  # (n_documents,) int32
        except (pa.ArrowInvalid, ValueError, TypeError, OSError) as e:
            if isinstance(e, OSError) and e.errno is not None:  # of the file system; those of Arrow's reading have none
                raise
            raise UserError(f"{folder} is damaged ({e}): restore it or build the base again") from e
        self.document_of, self.starts, self.ends = document, start, end  # (n_chunks,) int32
        self.first_rows = [0, *itertools.accumulate(batch.num_rows for batch in self.batches)]
        self.n_documents, self.n_chunks = self.first_rows[-1], len(document)
        self._metadata: dict[str, tuple[np.ndarray, list[Any]]] = {}

    def cell(self, column: str, row: int) -> str:
        batch = bisect.bisect_right(self.first_rows, row) - 1
        return self.columns[batch][PLACE[column]][row - self.first_rows[batch]]

    def document(self, row: int) -> Document:
        batch = bisect.bisect_right(self.first_rows, row) - 1
        i = row - self.first_rows[batch]
        return _document(*[column[i] for column in self.columns[batch]])

    def documents(self, alive: np.ndarray | None = None) -> Iterator[Document]:
        """In order. alive: (n_documents,) bool; None for all."""
        for first, batch in zip(self.first_rows, self.batches, strict=False):
            for row, cells in enumerate(zip(*(column.to_pylist() for column in batch.columns), strict=True), first):
                if alive is None or alive[row]:
                    yield _document(*cells)

    def rows_of(self, ids: Sequence[str]) -> np.ndarray:
        """The row of each id, -1 where there is none: (len(ids),) int64."""
        wanted = np.array([_hash(id) for id in ids], np.uint64)
        return self._rows(wanted, np.searchsorted(self.hashes, wanted), ids)

    def _rows(self, wanted: np.ndarray, places: np.ndarray, ids: Sequence[str]) -> np.ndarray:
        rows = np.full(len(ids), -1, np.int64)
        for i, place in enumerate(places.tolist()):
            while place < self.n_documents and self.hashes[place] == wanted[i]:
                row = int(self.hash_rows[place])
                if self.cell("id", row) == ids[i]:
                    rows[i] = row
                place += 1
        return rows

    def ids(self) -> list[str]:
        return [id for batch in self.batches for id in batch.column("id").to_pylist()]

    def indexed_text(self, chunk: int) -> str:
        row = int(self.document_of[chunk])
        text = self.cell("text", row)[self.starts[chunk] : self.ends[chunk]]
        return indexed_text(self.cell("title", row), text)

    def indexed_texts(self) -> Iterator[str]:
        """Of all chunks in order, one batch of documents at a time."""
        for first, batch in zip(self.first_rows, self.batches, strict=False):
            titles, texts = batch.column("title").to_pylist(), batch.column("text").to_pylist()
            chunks = slice(*np.searchsorted(self.document_of, (first, first + batch.num_rows)))
            columns = (self.document_of[chunks] - first, self.starts[chunks], self.ends[chunks])
            for row, start, end in zip(*(column.tolist() for column in columns), strict=True):
                yield indexed_text(titles[row], texts[row][start:end])

    def metadata(self, key: str) -> tuple[np.ndarray, list[Any]]:
        """A metadata key as (codes (n_documents,) int32, values): values[codes[row]], and -1 without the key."""
        found = self._metadata.get(key)
        if found is None:
            found = self._read_metadata(key)
            self._metadata = dict([*self._metadata.items(), (key, found)][-KEEP_KEYS:])
        return found

    def _read_metadata(self, key: str) -> tuple[np.ndarray, list[Any]]:
        codes: list[np.ndarray] = []
        code_of: dict[Any, int] = {}
        values: list[Any] = []
        for batch in self.batches:
            encoded = batch.column("metadata").dictionary_encode()
            of_cell = []
            for cell in encoded.dictionary.to_pylist():
                value = json.loads(cell).get(key, MISSING)
                if value is MISSING:
                    of_cell.append(-1)
                    continue
                name = (type(value), json.dumps(value) if isinstance(value, (list, dict)) else value)
                if name not in code_of:
                    code_of[name] = len(values)
                    values.append(value)
                of_cell.append(code_of[name])
            codes.append(np.array(of_cell, np.int32)[encoded.indices.to_numpy()])
        return np.concatenate(codes or [np.zeros(0, np.int32)]), values


class Cells:
    """The strings of a mapped column, one at a time: through pyarrow's scalars a search spent most of its time here."""

    def __init__(self, column: pa.Array) -> None:
        if column.offset or column.null_count:
            raise ValueError("a column has nulls or an offset, as none is written")
        _, offsets, data = column.buffers()
        self.offsets = memoryview(offsets).cast("q")  # (n + 1,), of a large_string
        self.data = memoryview(data or b"")

    def __getitem__(self, i: int) -> str:
        return str(self.data[self.offsets[i] : self.offsets[i + 1]], "utf-8")


class Texts:
    """What is indexed of a segment, chunk by chunk; may be iterated more than once."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment

    def __len__(self) -> int:
        return self.segment.n_chunks

    def __iter__(self) -> Iterator[str]:
        return self.segment.indexed_texts()


def _map(path: Path) -> list[pa.RecordBatch]:
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    return [reader.get_batch(i) for i in range(reader.num_record_batches)]


def _document(id: str, title: str, text: str, metadata: str) -> Document:
    return Document(id, text, title, json.loads(metadata) if metadata != "{}" else {})
