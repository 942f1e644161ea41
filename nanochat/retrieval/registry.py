"""Retrievers and indexes by name. A module is imported when its name is first used: FAISS only where vectors are."""

import difflib
import importlib
from typing import Any

from nanochat.config import UserError

RETRIEVERS = {
    "simple": "nanochat.retrieval.simple:SimpleRetriever",
    "bm25": "nanochat.retrieval.bm25:Bm25Retriever",
    "dense": "nanochat.retrieval.dense:DenseRetriever",
    "hybrid": "nanochat.retrieval.hybrid:HybridRetriever",
    "rerank": "nanochat.retrieval.rerank:RerankRetriever",
    "multihop": "nanochat.retrieval.multihop:MultiHopRetriever",
}
INDEXES = {
    "bm25": "nanochat.retrieval.bm25:Bm25Index",
    "dense": "nanochat.retrieval.dense:DenseIndex",
}


def retriever_class(name: str) -> Any:
    """The class of a retriever: a name in RETRIEVERS, or "package.module:Class"."""
    return _load(name, RETRIEVERS, "retriever")


def index_class(name: str) -> Any:
    return _load(name, INDEXES, "index")


def _load(name: str, known: dict[str, str], what: str) -> Any:
    target = known.get(name, name)
    if ":" not in target:
        near = difflib.get_close_matches(name, known, n=1)
        raise UserError(
            f"unknown {what} {name!r}: " + (f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(known)}")
        )
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)
