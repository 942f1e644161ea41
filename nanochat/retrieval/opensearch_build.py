"""Writing into an OpenSearch index: a build that can be interrupted, and additions.

Records carry the number of their batch. After each batch of a build the record PROGRESS says how many batches and
documents are in and the SHA-256 of those documents. A build that goes on deletes records of later batches, passes over
that many documents, checks that their hash is the same, and continues. An addition's number is random and negative.
"""

import hashlib
import random
import sys
from collections.abc import Iterable
from dataclasses import asdict
from itertools import islice
from typing import Any

import numpy as np
from tqdm import tqdm

from nanochat.config import UserError
from nanochat.retrieval.chunking import check_chunking, chunk_spans
from nanochat.retrieval.document import Document, batches
from nanochat.retrieval.encoders import Encoder
from nanochat.retrieval.opensearch_engine import Engine
from nanochat.retrieval.opensearch_records import (
    OpenSearchBm25,
    OpenSearchDense,
    Record,
    document_digest,
    index_body,
    record_text,
    records_of,
    vectors_json,
)
from nanochat.retrieval.opensearch_search import recall, remote_class
from nanochat.retrieval.options import read_options

FORMAT = 1
PROGRESS = "progress"  # id of the record that says how far a build is
SAMPLE = 50  # vectors the recall is measured with
BATCH_DOCUMENTS, BATCH_CHARACTERS = 500, 1_000_000


class Writer:
    """Writes batches of documents. encoder: None where the index has no vectors."""

    def __init__(
        self, engine: Engine, chunk_tokens: int, chunk_overlap: int, encoder: Encoder | None, progress: bool
    ) -> None:
        check_chunking(chunk_tokens, chunk_overlap)
        self.engine, self.encoder, self.progress = engine, encoder, progress
        self.sample: list[list[float]] = []  # vectors that were written, each as likely as any other
        self._encoded, self._random = 0, random.Random(0)
        self.chunking = {"chunk_tokens": chunk_tokens, "chunk_overlap": chunk_overlap}

    def write(self, documents: list[Document], batch: int, replace: bool = False) -> None:
        """UserError for an id the index has, unless replace=True."""
        records: dict[int, Record] = {}
        for document in documents:
            made = records_of(document, chunk_spans(document.text, **self.chunking), batch)
            if made.keys() & records.keys():
                raise UserError(f"two documents have the same id {document.id!r}: give every document its own")
            records |= made
        if self.encoder is not None:
            self._encode(self.encoder, list(records.values()))
        if replace:
            self.engine.bulk("index", records)
            stale = {"terms": {"document": [document.id for document in documents]}}
            self.engine.delete_where({"bool": {"filter": stale, "must_not": {"term": {"batch": batch}}}})
            return
        # a request that was sent again after a lost answer finds its own records
        for id, record in self.engine.records(self.engine.bulk("create", records)).items():
            if record["batch"] != batch:
                raise UserError(
                    f"document {records[id]['document']!r} is in the base already: replace=True replaces it"
                )

    def _encode(self, encoder: Encoder, records: list[Record]) -> None:
        vectors = encoder.encode([record_text(record) for record in records], "passage")
        bad = np.flatnonzero(~np.isfinite(vectors).all(1))
        if len(bad):
            raise UserError(f"the encoder gave no numbers for document {records[bad[0]]['document']!r}: mend it")
        for record, vector in zip(records, vectors_json(vectors), strict=True):
            record["vector"] = vector
            self._encoded += 1
            place = len(self.sample) if len(self.sample) < SAMPLE else self._random.randrange(self._encoded)
            if any(vector) and place < SAMPLE:
                self.sample[place : place + 1] = [vector]

    def bar(self, done: int = 0) -> tqdm:
        return tqdm(desc=self.engine.index, unit=" documents", initial=done, disable=not self.progress, file=sys.stderr)


def add_documents(writer: Writer, documents: Iterable[Document], replace: bool) -> int:
    """-> how many. What was written before an error is deleted again, unless it replaced something."""
    batch, n = -random.SystemRandom().getrandbits(62) - 1, 0
    try:
        with writer.bar() as bar:
            for some in batches(documents, BATCH_DOCUMENTS, BATCH_CHARACTERS):
                writer.write(some, batch, replace)
                n += len(some)
                bar.update(len(some))
    except BaseException:
        if not replace:
            writer.engine.delete_where({"term": {"batch": batch}})
        raise
    return n


def build_index(
    writer: Writer,
    documents: Iterable[Document],
    retriever: str,
    options: dict[str, dict[str, Any] | None],
    overwrite: bool,
    shards: int,
    replicas: int,
) -> None:
    """Make the index, or go on with an interrupted build of the same settings, and fill it."""
    engine = writer.engine
    meta = _new_meta(writer, retriever, options)
    left = engine.meta()
    if left is not None and left.get("format") is None:
        raise UserError(f"{engine.address} holds something else: choose another index")
    if left is not None and overwrite:
        engine.ask(lambda client: client.indices.delete(index=engine.index))
        left = None
    if left is None:
        body = index_body(meta, shards, replicas)
        engine.ask(lambda client: client.indices.create(index=engine.index, body=body))
    elif left.get("complete"):
        raise UserError(f"{engine.address} holds a knowledge base: add to it, or build with overwrite=True")
    elif left != meta:
        raise UserError(f"{engine.address} holds a part of a build with other settings: use those, or overwrite=True")
    _fill(writer, documents)
    if writer.sample:
        found = recall(engine, writer.sample, OpenSearchDense(**meta["indexes"]["dense"]["options"]))
        meta["indexes"]["dense"]["recall"] = round(found, 3)
        print(
            f"{engine.address}: recall@10 of the graph {found:.3f} over {len(writer.sample)} vectors", file=sys.stderr
        )
    settings, finished = {"index": {"refresh_interval": None}}, {"_meta": meta | {"complete": True}}
    engine.ask(lambda client: client.indices.put_settings(index=engine.index, body=settings))
    engine.ask(lambda client: client.indices.put_mapping(index=engine.index, body=finished))


def _new_meta(writer: Writer, retriever: str, options: dict[str, dict[str, Any] | None]) -> dict[str, Any]:
    needed = remote_class(retriever).needs
    bm25 = asdict(read_options(OpenSearchBm25, options["bm25"] or {}, "bm25"))
    indexes: dict[str, Any] = {"bm25": {"options": bm25}}
    if "dense" in needed or options["dense"] is not None:
        dense = asdict(read_options(OpenSearchDense, options["dense"] or {}, "dense"))
        if writer.encoder is None:
            raise UserError(f"retriever {retriever!r} over OpenSearch needs vectors: pass encoder=... (encoders.py)")
        about = {"fingerprint": writer.encoder.fingerprint, "dim": writer.encoder.dim}
        indexes["dense"] = {"options": dense, **about}
    elif writer.encoder is not None:
        raise UserError(f"encoder is given, but retriever {retriever!r} needs no vectors: add dense={{}}")
    return {
        "format": FORMAT,
        "complete": False,
        "retriever": retriever,
        "chunking": writer.chunking,
        "indexes": indexes,
    }


def _fill(writer: Writer, documents: Iterable[Document]) -> None:
    engine, rest, digest = writer.engine, iter(documents), hashlib.sha256()
    found = engine.ask(lambda client: client.get(index=engine.index, id=PROGRESS, ignore=404))
    done = found["_source"] if found.get("found") else {"batches": 0, "documents": 0, "digest": digest.hexdigest()}
    for document in islice(rest, done["documents"]):
        digest.update(document_digest(document))
    if digest.hexdigest() != done["digest"]:
        raise UserError(
            f"{engine.address} holds {done['documents']:,} documents of an interrupted build, and those given now do "
            "not begin with them: give the same, or overwrite=True"
        )
    engine.delete_where({"range": {"batch": {"gte": done["batches"]}}})
    with writer.bar(done["documents"]) as bar:
        for batch, some in enumerate(batches(rest, BATCH_DOCUMENTS, BATCH_CHARACTERS), done["batches"]):
            writer.write(some, batch)
            for document in some:
                digest.update(document_digest(document))
            n = done["documents"] + len(some)
            done = {"batches": batch + 1, "documents": n, "digest": digest.hexdigest()}
            _note(engine, done)
            bar.update(len(some))


def _note(engine: Engine, done: dict[str, Any]) -> None:
    engine.ask(lambda client: client.index(index=engine.index, id=PROGRESS, body=done))
