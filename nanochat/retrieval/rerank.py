"""Second look at the first hits of another retriever: a scorer reads query and text together, and sorts again.

The scorer is a cross-encoder (1901.04085) of sentence-transformers, named by path or hub name, or any object with
`score(query, texts) -> one number each`, higher is better: nanochat.model_encoder.LikelihoodScorer gives
log p(query | text) under a checkpoint of ours (query likelihood, as in 2204.07496).

    kb.search("who wrote it?", retriever="rerank", options={"scorer": "cross-encoder/ms-marco-MiniLM-L6-v2"})
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from nanochat.config import UserError
from nanochat.retrieval.contract import NO_HIT, Base, Ranking


class Scorer(Protocol):
    def score(self, query: str, texts: Sequence[str]) -> Sequence[float] | np.ndarray: ...


@dataclass(frozen=True)
class RerankOptions:
    """scorer: an object, or path or name of a cross-encoder. first: retriever of the candidates. depth: how many of
    them are read for each query (k where k is larger)."""

    scorer: Scorer | str | None = None
    first: str = "bm25"
    depth: int = 50

    def __post_init__(self) -> None:
        if self.scorer is None or self.scorer == "":
            raise UserError(
                "retriever 'rerank' has no scorer: pass options={'scorer': X}, X a path or name of a "
                "cross-encoder or an object with score(query, texts)"
            )
        if not isinstance(self.scorer, str) and not hasattr(self.scorer, "score"):
            raise UserError(f"scorer is {type(self.scorer).__name__}, expected a name or an object with .score")
        if self.first == RerankRetriever.name:
            raise UserError("retriever 'rerank': first='rerank' never ends, pass first='bm25' or another")
        if type(self.depth) is not int or self.depth < 1:
            raise UserError(f"retriever 'rerank': depth={self.depth!r}, expected a whole number of at least 1")


class RerankRetriever:
    name: ClassVar[str] = "rerank"
    needs: ClassVar[tuple[str, ...]] = ("bm25",)

    def __init__(self, base: Base, options: dict[str, Any] | None = None) -> None:
        known = list(RerankOptions.__dataclass_fields__)
        if unknown := [key for key in options or {} if key not in known]:
            raise UserError(f"retriever 'rerank' has no option {unknown[0]!r}: choose from {', '.join(known)}")
        self.options = RerankOptions(**(options or {}))
        self.base = base
        self.first = base.retriever(self.options.first)
        scorer = self.options.scorer
        assert scorer is not None
        self.scorer: Scorer = CrossEncoderScorer(scorer) if isinstance(scorer, str) else scorer

    def search(self, queries: Sequence[str], k: int, allowed: np.ndarray | None = None) -> Ranking:
        """allowed: (n_chunks,) bool -> ids (M, k), scores (M, k) of the scorer. Each query is scored by itself."""
        found = self.first.search(queries, max(k, self.options.depth), allowed)
        ids = np.full((len(queries), k), NO_HIT, np.int64)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        for row, query in enumerate(queries):
            candidates = np.sort(found.ids[row][found.ids[row] != NO_HIT])  # so that equal scores come in this order
            new = self._scores(query, candidates.tolist())
            best = np.argsort(-new, kind="stable")[:k]
            ids[row, : len(best)], scores[row, : len(best)] = candidates[best], new[best]
        return Ranking(ids, scores)

    def _scores(self, query: str, ids: list[int]) -> np.ndarray:
        if not ids:
            return np.zeros(0, np.float32)
        scores = np.asarray(self.scorer.score(query, self.base.texts(ids)), np.float32)
        if scores.shape != (len(ids),):
            raise UserError(f"the scorer gave an array of shape {scores.shape} for {len(ids)} texts: one number each")
        if not np.isfinite(scores).all():
            raise UserError(f"the scorer gave a number that is not finite for the query {query[:60]!r}")
        return scores


class CrossEncoderScorer:
    """A cross-encoder of sentence-transformers with one output, on the GPU where there is one."""

    def __init__(self, name: str) -> None:
        try:
            from sentence_transformers import CrossEncoder
        except ImportError as e:
            raise UserError(f"scorer {name!r} needs sentence-transformers: uv pip install sentence-transformers") from e
        try:
            self.model = CrossEncoder(name)
        except (OSError, ValueError) as e:
            raise UserError(f"no cross-encoder {name!r}: give a folder or a name on the hub ({_line(e)})") from e
        if (outputs := self.model.num_labels) != 1:
            raise UserError(f"cross-encoder {name!r} has {outputs} outputs, expected one: a model trained to rank")

    def score(self, query: str, texts: Sequence[str]) -> np.ndarray:
        """-> (len(texts),) float32."""
        pairs = [(query, text) for text in texts]
        return np.asarray(self.model.predict(pairs, show_progress_bar=False), np.float32)


def _line(e: Exception) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0]
