"""What lies in an OpenSearch index: a record for each chunk, and conditions on metadata in the engine's language.

A record's id is a number made from its document's id and its place in it (63 bits of BLAKE2b), so that writing a
document twice writes the same records, and a chunk id of contract.py is a record's id. Chunk 0 also keeps the number of
chunks and, where that is not its own text, the document's.

Metadata is kept as JSON; for filters its values lie in fields by their type (numbers.KEY, texts.KEY, truths.KEY), so
that "2000" is not 2000 and no two documents can disagree on a field's type. Unlike in a folder's base, texts of more
than 8,191 characters are not found by filters, and integers beyond 2^53 are compared as doubles.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import numpy as np

from nanochat.config import UserError
from nanochat.retrieval.document import Document, indexed_text, metadata_json
from nanochat.retrieval.where import ORDER, parse_where

KEYWORD_LIMIT = 8191  # characters; Lucene's longest term is 32,766 bytes, a character has up to 4
ENGINE_ORDER = dict(zip(ORDER, ("lt", "lte", "gt", "gte"), strict=True))
Record = dict[str, Any]


@dataclass(frozen=True)
class OpenSearchBm25:
    k1: float = 1.5
    b: float = 0.75
    analyzer: str = "english"  # lower case, English stop words, Porter's stemmer; or another the engine has

    def __post_init__(self) -> None:
        if self.k1 < 0 or not 0 <= self.b <= 1:
            raise UserError(f"bm25: k1={self.k1}, b={self.b}: expected k1 of 0 or more and b from 0 to 1")


@dataclass(frozen=True)
class OpenSearchDense:
    """HNSW (Malkov & Yashunin, arXiv 1603.09320) of the engine's Lucene part, which needs no native library."""

    m: int = 16  # links of a vector
    ef_construction: int = 128
    ef: int = 400  # candidates of a search; recall@10 on 20k vectors of length 256: .82 with 100, .92 with 400

    def __post_init__(self) -> None:
        if min(self.m, self.ef_construction, self.ef) < 1:
            raise UserError(f"dense: m={self.m}, ef_construction={self.ef_construction}, ef={self.ef}: all 1 or more")


def index_body(meta: dict[str, Any], shards: int, replicas: int) -> dict[str, Any]:
    """Settings and mapping. meta: the base's manifest."""
    about = meta["indexes"].get("dense")
    bm25 = OpenSearchBm25(**meta["indexes"]["bm25"]["options"])
    kept, number = {"type": "text", "index": False, "copy_to": "content"}, {"type": "long"}
    fields: dict[str, Any] = {
        "id": number,  # the record's own, to order equal scores by
        "document": {"type": "keyword"},
        "chunk": number,
        "chunks": number,
        "batch": number,
        "title": kept,
        "text": kept,
        "content": {"type": "text", "analyzer": bm25.analyzer},
        "keys": {"type": "keyword", "ignore_above": KEYWORD_LIMIT},
        **{name: {"type": "object", "dynamic": True} for name in ("numbers", "texts", "truths")},
    }
    settings: dict[str, Any] = {
        "number_of_shards": shards,
        "number_of_replicas": replicas,
        "refresh_interval": -1,  # until the build is complete
        "similarity": {"default": {"type": "BM25", "k1": bm25.k1, "b": bm25.b}},
    }
    if about:
        dense = OpenSearchDense(**about["options"])
        parameters = {"m": dense.m, "ef_construction": dense.ef_construction}
        method = {"name": "hnsw", "engine": "lucene", "space_type": "innerproduct", "parameters": parameters}
        fields["vector"] = {"type": "knn_vector", "dimension": about["dim"], "method": method}
        settings["knn"] = True
    keyword = {"type": "keyword", "ignore_above": KEYWORD_LIMIT}
    dynamic = [
        {"numbers": {"path_match": "numbers.*", "mapping": {"type": "double"}}},
        {"texts": {"path_match": "texts.*", "mapping": keyword}},
        {"truths": {"path_match": "truths.*", "mapping": keyword}},
    ]
    mapping = {"dynamic": False, "dynamic_templates": dynamic, "_meta": meta, "properties": fields}
    if about:
        mapping["_source"] = {"excludes": ["vector"]}  # found by, never read
    return {"settings": {"index": settings}, "mappings": mapping}


# ---- documents ----


def record_id(document: str, chunk: int) -> int:
    try:
        digest = hashlib.blake2b(f"{chunk}:{document}".encode(), digest_size=8).digest()
    except UnicodeEncodeError:
        raise UserError(f"document id {document!r} holds half of a surrogate pair, which is no character") from None
    return int.from_bytes(digest, "little") >> 1


def records_of(document: Document, spans: Sequence[tuple[int, int]], batch: int) -> dict[int, Record]:
    """One for each chunk; without vectors."""
    common = {"document": document.id, "title": document.title, "batch": batch, "metadata": metadata_json(document)}
    common |= _filter_fields(document.metadata)
    records = {}
    for n, (start, end) in enumerate(spans or [(0, 0)]):  # a document without text is found by its title
        id = record_id(document.id, n)
        records[id] = common | {"id": id, "chunk": n, "start": start, "end": end, "text": document.text[start:end]}
        if n == 0:
            records[id]["chunks"] = max(1, len(spans))
            if records[id]["text"] != document.text:
                records[id]["body"] = document.text
    return records


def document_of(record: Record) -> Document:
    """From the record of its chunk 0."""
    assert record["chunk"] == 0
    text = record.get("body", record["text"])
    return Document(record["document"], text, record["title"], json.loads(record["metadata"]))


def record_text(record: Record) -> str:
    return indexed_text(record["title"], record["text"])


def document_digest(document: Document) -> bytes:
    parts = [document.id, document.title, document.text, metadata_json(document)]
    return hashlib.sha256(json.dumps(parts).encode()).digest()


def vectors_json(vectors: np.ndarray) -> list[list[float]]:
    """Seven decimals: what float32 holds of a value near 1, in half the bytes."""
    return np.round(vectors.astype(np.float64), 7).tolist()


# ---- conditions ----


def _filter_fields(metadata: dict[str, Any]) -> Record:
    fields: Record = {"keys": list(metadata), "numbers": {}, "texts": {}, "truths": {}}
    for key, value in metadata.items():
        for one in value if isinstance(value, list) else [value]:
            if term := _term(one):
                fields[term[0]].setdefault(_name(key), []).append(term[1])
    return fields


def _term(value: Any) -> tuple[str, Any] | None:
    """-> the field for values of this type and what stands there; None for what no condition can name."""
    if value is None or isinstance(value, bool):
        return "truths", json.dumps(value)
    if isinstance(value, (int, float)):
        return ("numbers", float(value)) if math.isfinite(value) else None
    return ("texts", value) if isinstance(value, str) else None


def _name(key: str) -> str:
    """A metadata key as part of a field's name, where a point would mean a field within a field."""
    return "_" + quote(key, safe="").replace(".", "%2E")


def clauses(where: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Conditions of where.py -> filter clauses of a bool query, all of which must hold."""
    parse_where(where or {})  # says what is wrong
    made = []
    for key, wanted in (where or {}).items():
        many = isinstance(wanted, (list, tuple, set, frozenset))
        signs = wanted if isinstance(wanted, dict) else {"in" if many else "==": wanted}
        made += [_clause(key, sign, value) for sign, value in signs.items()]
    return made


def _clause(key: str, sign: str, value: Any) -> dict[str, Any]:
    if sign == "!=":
        return {"bool": {"filter": [{"term": {"keys": key}}], "must_not": [_clause(key, "==", value)]}}
    if sign in ENGINE_ORDER:
        kind, bound = _term(value) or ("numbers", value)
        return {"range": {f"{kind}.{_name(key)}": {ENGINE_ORDER[sign]: bound}}}
    terms = [term for one in (value if sign == "in" else [value]) if (term := _term(one))]
    return {
        "bool": {"should": [{"term": {f"{kind}.{_name(key)}": one}} for kind, one in terms] or [{"match_none": {}}]}
    }
