"""BM25 and k-NN of an OpenSearch index as retrievers: contract.py's, but `allowed` is a list of filter clauses.

They are given to hybrid, rerank and multihop, which hand `allowed` on as they got it.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from nanochat.config import UserError
from nanochat.retrieval.contract import NO_HIT, Ranking
from nanochat.retrieval.encoders import Encoder
from nanochat.retrieval.opensearch_engine import Engine
from nanochat.retrieval.opensearch_records import OpenSearchDense, Record, vectors_json
from nanochat.retrieval.registry import retriever_class

MAX_WINDOW = 10_000  # index.max_result_window: the most an engine answers
WITH_RECORDS = 50  # searches for no more than this bring the records along: one trip instead of two
KEEP_RECORDS = 50_000
MANY_QUERIES = 128  # of one request
MANY_RECORDS = 1000


class Records:
    """Records of the index by id; the last used are kept. Safe to use from several threads."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._kept: OrderedDict[int, Record] = OrderedDict()
        self._lock = threading.Lock()

    def keep(self, found: dict[int, Record]) -> None:
        with self._lock:
            self._kept.update(found)
            for id in found:
                self._kept.move_to_end(id)
            while len(self._kept) > KEEP_RECORDS:
                self._kept.popitem(last=False)

    def forget(self) -> None:
        with self._lock:
            self._kept.clear()

    def of(self, ids: Sequence[int]) -> dict[int, Record]:
        """UserError where one is gone: it was deleted between the search and this."""
        with self._lock:
            have = {id: self._kept[id] for id in ids if id in self._kept}
        missing = [id for id in dict.fromkeys(ids) if id not in have]
        found = {}
        for i in range(0, len(missing), MANY_RECORDS):
            found |= self.engine.records(missing[i : i + MANY_RECORDS])
        if len(found) < len(missing):
            raise UserError(f"{self.engine.address}: a document was deleted while a search found it: search again")
        self.keep(found)
        return have | found


class RemoteBm25:
    name: ClassVar[str] = "bm25"
    needs: ClassVar[tuple[str, ...]] = ("bm25",)

    def __init__(self, engine: Engine, records: Records) -> None:
        self.engine, self.records = engine, records

    def search(self, queries: Sequence[str], k: int, allowed: Any = None) -> Ranking:
        def query(text: str) -> dict[str, Any]:
            return {"bool": {"must": [{"match": {"content": text}}], "filter": allowed or []}}

        return ranking(self.engine, self.records, [query(text) for text in queries], k)


class RemoteDense:
    name: ClassVar[str] = "dense"
    needs: ClassVar[tuple[str, ...]] = ("dense",)

    def __init__(self, engine: Engine, records: Records, encoder: Encoder, options: OpenSearchDense) -> None:
        self.engine, self.records, self.encoder, self.options = engine, records, encoder, options

    def search(self, queries: Sequence[str], k: int, allowed: Any = None) -> Ranking:
        """Scores are inner products. A query without known words, whose vector is 0, finds nothing."""
        vectors = self.encoder.encode(queries, "query")
        near = {"k": min(max(k, self.options.ef), MAX_WINDOW)} | (
            {"filter": {"bool": {"filter": allowed}}} if allowed else {}
        )
        asked = [
            {"knn": {"vector": near | {"vector": vector}}} if any(vector) else None for vector in vectors_json(vectors)
        ]
        found = ranking(self.engine, self.records, asked, k)
        # the engine's score of an inner product p is 1 + p, or 1 / (1 - p) below 0
        with np.errstate(divide="ignore"):
            return found._replace(scores=np.where(found.scores >= 1, found.scores - 1, 1 - 1 / found.scores))


def ranking(engine: Engine, records: Records, asked: Sequence[dict[str, Any] | None], k: int) -> Ranking:
    """The engine's first k hits of each query; of a None, none. At most MAX_WINDOW."""
    ids, scores = np.full((len(asked), k), NO_HIT, np.int64), np.full((len(asked), k), -np.inf, np.float32)
    rows = [m for m, query in enumerate(asked) if query is not None]
    for i in range(0, len(rows), MANY_QUERIES):
        some = rows[i : i + MANY_QUERIES]
        for m, answer in zip(some, engine.search([_body(asked[m], k) for m in some]), strict=True):
            hits = answer["hits"]["hits"]
            ids[m, : len(hits)] = [int(hit["_id"]) for hit in hits]
            scores[m, : len(hits)] = [hit["_score"] for hit in hits]
            records.keep({int(hit["_id"]): hit["_source"] for hit in hits if "_source" in hit})
    return Ranking(ids, scores)


def recall(engine: Engine, vectors: Sequence[list[float]], options: OpenSearchDense, k: int = 10) -> float:
    """Share of the exact k nearest of these vectors that a search by the graph finds. Reads every vector each time."""
    engine.refresh()
    hits = 0
    for vector in vectors:
        asked = {"field": "vector", "query_value": vector, "space_type": "innerproduct"}
        script = {"source": "knn_score", "lang": "knn", "params": asked}
        exact = {"script_score": {"query": {"exists": {"field": "vector"}}, "script": script}}
        near = {"knn": {"vector": {"vector": vector, "k": max(k, options.ef)}}}
        best, found = (
            [hit["_score"] for hit in answer["hits"]["hits"]]
            for answer in engine.search([_body(exact, k), _body(near, k)])
        )
        hits += sum(score >= best[-1] - 1e-5 for score in found) / len(best)
    return hits / len(vectors)


def _body(query: dict[str, Any] | None, k: int) -> dict[str, Any]:
    return {
        "query": query,
        "size": min(k, MAX_WINDOW),
        "sort": ["_score", {"id": "asc"}],
        "track_total_hits": False,
        "_source": k <= WITH_RECORDS,
    }


def remote_class(name: str) -> Any:
    """The class of a retriever that works over OpenSearch."""
    if name in REMOTE:
        return REMOTE[name]
    found = retriever_class(name)
    if name not in COMBINED:
        raise UserError(
            f"retriever {name!r} needs a folder's files; over OpenSearch: {', '.join((*REMOTE, *COMBINED))}"
        )
    return found


REMOTE = {"bm25": RemoteBm25, "dense": RemoteDense}
COMBINED = ("hybrid", "rerank")  # they ask the base for its retrievers and texts only
