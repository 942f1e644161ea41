"""Retrievers and indexes by name. A module is imported when its name is first used: FAISS only where vectors are."""

import difflib
import importlib
import json
import threading
from collections.abc import Callable, Mapping
from typing import Any

from nanochat.config import UserError
from nanochat.retrieval.contract import Retriever

KEEP_RETRIEVERS = 16  # opened, by name and options

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
    found = _load(name, RETRIEVERS, "retriever")
    if not hasattr(found, "needs"):
        raise UserError(f"retriever {name!r} has no `needs` (contract.Retriever): choose from {', '.join(RETRIEVERS)}")
    return found


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
    cure = f"choose from {', '.join(known)}, or give package.module:Class"
    if not all(part.isidentifier() for part in (*module.split("."), attribute)):
        raise UserError(f"unknown {what} {name!r}: {cure}")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ImportError as e:
        raise UserError(f"{what} {name!r} cannot be imported ({e}): {cure}") from e
    if not isinstance(found, type):
        raise UserError(f"{what} {name!r}: {module} has no class {attribute!r}: {cure}")
    return found


class Opened:
    """The retrievers of a base that were asked for last, each opened once for its name and options. For any thread."""

    def __init__(self) -> None:
        self._made: dict[str, tuple[Retriever, Any]] = {}
        self._lock = threading.RLock()  # a retriever may open another

    def get(self, name: str, options: dict[str, Any] | None, make: Callable[[], Any]) -> Retriever:
        key = f"{name} {json.dumps(options or {}, sort_keys=True, default=lambda value: f'object {id(value)}')}"
        with self._lock:
            if key not in self._made:
                made = make()
                while len(self._made) >= KEEP_RETRIEVERS:
                    self._made.pop(next(iter(self._made)))
                # options are kept with it: while they live, no other object has their id
                self._made[key] = made, options
            return self._made[key][0]


def check_index(path: Any, have: Mapping[str, Any], index: str, retriever: str, cure: str) -> None:
    """UserError where the base at path has no such index; retriever: the one that needs it, "" = none."""
    if index not in have:
        what = f"retriever {retriever!r} needs the index {index!r}" if retriever else f"there is no index {index!r}"
        raise UserError(f"{what}, {path} has {', '.join(have) or 'none'}: build it with {cure}")
