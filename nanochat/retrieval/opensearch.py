"""A knowledge base in an OpenSearch index (2.x): the same methods over as many nodes, shards and replicas as it takes.

    kb = OpenSearchBase.build(documents, "opensearch://127.0.0.1:9200/my_base", chunk_tokens=256, shards=3, replicas=1)
    kb = KnowledgeBase.open("opensearch://127.0.0.1:9200/my_base")

"bm25" and "dense" are the engine's own (english analyzer; HNSW over inner products). hybrid and rerank work on top of
them as they do over a folder; multihop needs a folder. Unlike a folder's base: words are cut by the engine's analyzer
and lengths are kept in a byte, so BM25 scores differ from ours; a search counts at most 10,000 chunks; writers do not
lock each other out; an add is seen piece by piece while it runs (one that fails is taken back, unless it replaced
documents).

An interrupted build goes on where it stopped when it is called again with the same documents: a record in the index
says how many are in, and a hash that they are the same.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from nanochat.config import UserError
from nanochat.retrieval.contract import NO_HIT, Ranking, Retriever
from nanochat.retrieval.document import Chunk, Document, Hit
from nanochat.retrieval.encoders import Encoder
from nanochat.retrieval.mmr import mmr as rank_mmr
from nanochat.retrieval.opensearch_build import FORMAT, Writer, add_documents, build_index
from nanochat.retrieval.opensearch_engine import LONG_S, Engine, parse_address
from nanochat.retrieval.opensearch_records import OpenSearchDense, clauses, document_of, record_id, record_text
from nanochat.retrieval.opensearch_search import MAX_WINDOW, Records, RemoteBm25, RemoteDense, remote_class
from nanochat.retrieval.registry import Opened, check_index

WORDS = re.compile(r"\w+")
CHUNKS = {"exists": {"field": "id"}}
DOCUMENTS = {"term": {"chunk": 0}}

Found = tuple[int, float, tuple[str, ...]]  # chunk id, score, trace


class OpenSearchBase:
    """Made by `build` or `open`. Safe to use from several threads."""

    def __init__(self, url: str, encoder: Encoder | None = None) -> None:
        address = parse_address(url)
        self.engine, self.path, self.encoder = Engine(address), str(address), encoder
        meta = self.engine.meta()
        if meta is None:
            raise UserError(
                f"OpenSearch at {address.nodes} has no index {address.index!r}: "
                f"KnowledgeBase.build(documents, {self.path!r}) makes it"
            )
        if meta.get("format") != FORMAT:
            raise UserError(
                f"{self.path} is no knowledge base of format {FORMAT}: choose another index, or build again"
            )
        if not meta["complete"]:
            raise UserError(
                f"{self.path}: its build was interrupted; the same KnowledgeBase.build(...) again completes it"
            )
        self.manifest: dict[str, Any] = meta
        _check_encoder(self.path, meta, encoder)
        self._records = Records(self.engine)
        self._opened = Opened()
        self.refresh()

    # ---- making and opening ----

    @staticmethod
    def build(
        documents: Iterable[Document],
        path: str,
        retriever: str = "bm25",
        chunk_tokens: int = 0,
        chunk_overlap: int = 0,
        bm25: dict[str, Any] | None = None,
        dense: dict[str, Any] | None = None,
        encoder: Encoder | None = None,
        progress: bool = False,
        overwrite: bool = False,
        shards: int = 1,
        replicas: int = 0,
    ) -> "OpenSearchBase":
        """KnowledgeBase.build into an index, or the rest of a build that was interrupted.

        bm25, dense: the fields of OpenSearchBm25 and OpenSearchDense. encoder: needed for dense and hybrid. shards:
        parts of the index, for more nodes; replicas: further copies of each, on other nodes. overwrite: remove the
        base there first.
        """
        engine = Engine(parse_address(path))
        options = {"bm25": bm25, "dense": dense}
        writer = Writer(engine, chunk_tokens, chunk_overlap, encoder, progress)
        build_index(writer, documents, retriever, options, overwrite, shards, replicas)
        return OpenSearchBase(path, encoder)

    @staticmethod
    def open(path: str, encoder: Encoder | None = None) -> "OpenSearchBase":
        return OpenSearchBase(path, encoder)

    # ---- what a retriever asks (contract.Base, without files) ----

    def options(self, index: str) -> dict[str, Any]:
        self._check_index(index)
        return self.manifest["indexes"][index]["options"]

    def texts(self, ids: Sequence[int]) -> list[str]:
        records = self._records.of(ids)
        return [record_text(records[id]) for id in ids]

    def titles(self, ids: Sequence[int]) -> list[str]:
        records = self._records.of(ids)
        return [records[id]["title"] for id in ids]

    def retriever(self, name: str, options: dict[str, Any] | None = None) -> Retriever:
        if options and name in ("bm25", "dense"):
            raise UserError(f"retriever {name!r} of {self.path} takes no options: they were set when it was built")
        return self._opened.get(name, options, lambda: self._make(name, options))

    def _make(self, name: str, options: dict[str, Any] | None) -> Any:
        made = remote_class(name)
        for index in made.needs:
            self._check_index(index, name)
        if made is RemoteBm25:
            return RemoteBm25(self.engine, self._records)
        if made is not RemoteDense:
            return made(self, options)
        if self.encoder is None:
            fingerprint = self.manifest["indexes"]["dense"]["fingerprint"]
            raise UserError(
                f"the vectors of {self.path} were made by an encoder (fingerprint {fingerprint}): pass it to "
                "KnowledgeBase.open(path, encoder=...)"
            )
        return RemoteDense(self.engine, self._records, self.encoder, OpenSearchDense(**self.options("dense")))

    def _check_index(self, index: str, retriever: str = "") -> None:
        cure = "retriever='hybrid' and an encoder"
        check_index(self.path, self.manifest["indexes"], index, retriever, cure)

    # ---- searching ----

    def search(
        self,
        queries: str | Sequence[str],
        k: int = 10,
        retriever: str | None = None,
        where: dict[str, Any] | None = None,
        per_document: int = 1,
        mmr: float | None = None,
        options: dict[str, Any] | None = None,
    ) -> Any:
        """See KnowledgeBase.search."""
        several = [queries] if isinstance(queries, str) else list(queries)
        for query in several:
            if not isinstance(query, str):
                raise UserError(f"query {query!r} is a {type(query).__name__}, expected text")
        if k < 1 or per_document < 0:
            raise UserError(f"k={k}, per_document={per_document}: k is at least 1, per_document at least 0")
        if min(k, self.n_chunks) > MAX_WINDOW:
            raise UserError(f"k={k}: OpenSearch answers with {MAX_WINDOW:,} chunks at most")
        name = retriever or self.manifest["retriever"]
        opened, allowed = self.retriever(name, options), clauses(where)
        asked = [i for i, query in enumerate(several) if WORDS.search(query)]
        found: list[list[Hit]] = [[] for _ in several]
        if asked and self.n_chunks:
            want = k if mmr is None else max(4 * k, 50)
            best = self._ranked(opened, [several[i] for i in asked], want, allowed or None, per_document)
            if mmr is not None:
                best = [self._diverse(hits, k, mmr) for hits in best]
            for i, hits in zip(asked, self._hits(best, name), strict=True):
                found[i] = hits
        return found[0] if isinstance(queries, str) else found

    def _ranked(
        self, retriever: Retriever, queries: list[str], k: int, allowed: Any, per_document: int
    ) -> list[list[Found]]:
        """The best k chunks of each query; those with too many of the same documents are asked for again."""
        if self.n_chunks == self.n_documents:
            per_document = 0  # every document is one chunk
        most = min(self.n_chunks, MAX_WINDOW)
        want = min(k if per_document == 0 else 3 * k, most)
        found: list[list[Found]] = [[] for _ in queries]
        pending = list(range(len(queries)))
        while pending:
            rows = _rows(retriever.search([queries[i] for i in pending], want, allowed))
            for i, row in zip(pending, rows, strict=True):
                found[i] = self._thin(row, per_document)[:k]
            pending = [i for i, row in zip(pending, rows, strict=True) if len(found[i]) < k and len(row) == want < most]
            want = min(4 * want, most)
        return found

    def _thin(self, hits: list[Found], per_document: int) -> list[Found]:
        """At most per_document of each document; 0 is no limit."""
        if per_document == 0:
            return hits
        records, count, kept = self._records.of([hit[0] for hit in hits]), {}, []
        for hit in hits:
            document = records[hit[0]]["document"]
            count[document] = count.get(document, 0) + 1
            if count[document] <= per_document:
                kept.append(hit)
        return kept

    def _diverse(self, hits: list[Found], k: int, weight: float) -> list[Found]:
        sets = [set(WORDS.findall(text.lower())) for text in self.texts([hit[0] for hit in hits])]
        return [hits[i] for i in rank_mmr(sets, [hit[1] for hit in hits], weight, k)]

    def _hits(self, rows: list[list[Found]], source: str) -> list[list[Hit]]:
        records = self._records.of([id for row in rows for id, _, _ in row])
        first = {id: record_id(record["document"], 0) for id, record in records.items()}
        records |= self._records.of(list(first.values()))
        documents = {id: document_of(records[chunk_0]) for id, chunk_0 in first.items()}

        def hit(rank: int, id: int, score: float, trace: tuple[str, ...]) -> Hit:
            chunk = Chunk(records[id]["start"], records[id]["end"], records[id]["text"])
            return Hit(documents[id], chunk, score, rank, source, tuple(trace))

        return [[hit(rank, *found) for rank, found in enumerate(row, 1)] for row in rows]

    def documents(self) -> Iterator[Document]:
        """All of them, in the order of their ids' characters."""
        last: list[Any] = []
        while True:
            body = {"query": DOCUMENTS, "sort": ["document"], "size": 500} | ({"search_after": last} if last else {})
            hits = self.engine.search([body])[0]["hits"]["hits"]
            if not hits:
                return
            yield from (document_of(hit["_source"]) for hit in hits)
            last = hits[-1]["sort"]

    def get(self, id: str) -> Document | None:
        found = self.engine.records([record_id(id, 0)])
        return document_of(next(iter(found.values()))) if found else None

    def __len__(self) -> int:
        return self.n_documents

    @property
    def version(self) -> int:
        """The number of writes there have been: another number, another content."""
        index, level = self.engine.index, {"level": "shards"}
        shards = self.engine.ask(lambda client: client.indices.stats(index=index, params=level))["indices"]
        copies = next(iter(shards.values()))["shards"].values()
        return sum(max(copy["seq_no"]["max_seq_no"] for copy in copies_of_one) + 1 for copies_of_one in copies)

    # ---- changing ----

    def add(self, documents: Iterable[Document], replace: bool = False, progress: bool = False) -> int:
        """-> how many. An id the base has is a UserError and nothing is added, unless replace=True."""
        chunking = self.manifest["chunking"]
        if "dense" in self.manifest["indexes"] and self.encoder is None:
            self.retriever("dense")  # says which encoder is missing
        writer = Writer(self.engine, chunking["chunk_tokens"], chunking["chunk_overlap"], self.encoder, progress)
        try:
            return add_documents(writer, documents, replace)
        finally:
            self.refresh()

    def delete(self, ids: Iterable[str]) -> int:
        """-> how many there were. Unknown ids are passed over."""
        wanted, before = list(dict.fromkeys(ids)), len(self)
        for i in range(0, len(wanted), 10_000):
            self.engine.delete_where({"terms": {"document": wanted[i : i + 10_000]}})
        self.refresh()
        return before - len(self)

    def compact(self) -> None:
        """Free the room of what was deleted, which term statistics count until then."""
        how = {"params": {"only_expunge_deletes": "true"}, "request_timeout": LONG_S}
        self.engine.ask(lambda client: client.indices.forcemerge(index=self.engine.index, **how))

    def verify(self) -> None:
        """UserError where shards are missing, or chunks, or vectors."""
        self.refresh()
        health = self.engine.ask(lambda client: client.cluster.health(index=self.engine.index))
        if health["status"] == "red":
            raise UserError(f"{self.path}: parts of the index are on no node that answers: start the missing nodes")
        body = {"size": 0, "query": CHUNKS, "aggs": {"chunks": {"sum": {"field": "chunks"}}}}
        expected = int(self.engine.search([body])[0]["aggregations"]["chunks"]["value"])
        if expected != self.n_chunks:
            raise UserError(f"{self.path} has {self.n_chunks:,} chunks, its documents say {expected:,}: build it again")
        if "dense" in self.manifest["indexes"]:
            encoded = self.engine.count({"exists": {"field": "vector"}})
            if encoded != self.n_chunks:
                raise UserError(f"{self.path} has {encoded:,} vectors of {self.n_chunks:,} chunks: build it again")

    def refresh(self) -> None:
        """Make what was written found, and count anew."""
        self.engine.refresh()
        self._records.forget()
        self.n_chunks, self.n_documents = self.engine.count(CHUNKS), self.engine.count(DOCUMENTS)

    def close(self) -> None:
        self.engine.client.close()


def _rows(ranking: Ranking) -> list[list[Found]]:
    """The hits of each query, without NO_HIT."""
    traces = ranking.trace or [[()] * ranking.ids.shape[1]] * len(ranking.ids)
    rows = zip(ranking.ids.tolist(), ranking.scores.tolist(), traces, strict=True)
    return [[hit for hit in zip(ids, scores, t, strict=False) if hit[0] != NO_HIT] for ids, scores, t in rows]


def _check_encoder(path: str, meta: dict[str, Any], encoder: Encoder | None) -> None:
    if encoder is None:
        return
    if "dense" not in meta["indexes"]:
        raise UserError(f"{path} has no vectors an encoder could serve: leave encoder out")
    made_by = meta["indexes"]["dense"]["fingerprint"]
    if encoder.fingerprint != made_by:
        raise UserError(
            f"the vectors of {path} were made by the encoder {made_by}, not by {encoder.fingerprint}: open it with "
            "that one, or build it again"
        )
