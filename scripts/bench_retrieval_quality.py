"""The quality part of scripts.bench_retrieval: four measures of the first ten of every method, on every set."""

import gzip
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.common import data_dir
from nanochat.config import UserError
from nanochat.retrieval import RETRIEVERS, Document, KnowledgeBase
from nanochat.retrieval.metrics import (
    all_recall_at_k,
    mean_interval,
    mrr_at_k,
    ndcg_at_k,
    paired_bootstrap,
    recall_at_k,
)
from scripts.bench_retrieval_worker import Bm25s, RankBm25

K = 10
MEASURES = {"ndcg": ndcg_at_k, "recall": recall_at_k, "all_gold": all_recall_at_k, "mrr": mrr_at_k}
METHODS = [name for name in RETRIEVERS if name != "rerank"]  # which needs a model

Row = dict[str, Any]
Search = Callable[[list[str]], list[list[str]]]  # questions -> ids of documents, best first


@dataclass(frozen=True)
class Corpus:
    """gold: for each question the relevant names with their grades. names: what gold calls a document, by its id."""

    name: str
    documents: list[Document]
    questions: list[str]
    gold: list[dict[str, float]]
    names: dict[str, str]

    @property
    def texts(self) -> list[str]:
        return [f"{d.title}\n{d.text}" if d.title else d.text for d in self.documents]


def read_rows(path: Path) -> list[Row]:
    with gzip.open(path, "rt", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def read_sets(wanted: Sequence[str]) -> Iterator[Corpus]:
    """The sets of the data folder, in the order of their names, SQuAD last."""
    folder = data_dir()
    if folder is None:
        raise UserError("no sets to measure with: point NANOCHAT_DATA at a folder with ir/*_corpus.jsonl.gz")
    corpora = {p.name.removesuffix("_corpus.jsonl.gz"): p for p in sorted((folder / "ir").glob("*_corpus.jsonl.gz"))}
    squad = folder / "qa" / "squad11_dev.jsonl.gz"
    known = [*corpora, *(["squad11_dev"] if squad.is_file() else [])]
    if unknown := set(wanted) - set(known) or not known:
        raise UserError(f"sets={unknown}: {folder} has {', '.join(known) or 'none'}")
    for name in (n for n in known if not wanted or n in wanted):
        yield squad_corpus(read_rows(squad)) if name == "squad11_dev" else ir_corpus(name, corpora[name])


def ir_corpus(name: str, path: Path) -> Corpus:
    rows = read_rows(path)
    asked = [row for file in sorted(path.parent.glob(f"{name}_queries*.jsonl.gz")) for row in read_rows(file)]
    by_title = "gold_titles" in asked[0]
    documents = [Document(str(row["id"]), row["text"], row.get("title", "")) for row in rows]
    gold = [dict.fromkeys(row["gold_titles"], 1.0) if by_title else row["qrels"] for row in asked]
    names = {d.id: d.title if by_title else d.id for d in documents}
    return Corpus(name, documents, [row.get("question") or row["text"] for row in asked], gold, names)


def squad_corpus(rows: list[Row]) -> Corpus:
    documents = [Document(row["pid"], row["context"], row["article"].replace("_", " ")) for row in rows]
    pairs = [(qa["question"], {row["pid"]: 1.0}) for row in rows for qa in row["qas"]]
    return Corpus(
        "squad11_dev", documents, [q for q, _ in pairs], [g for _, g in pairs], {d.id: d.id for d in documents}
    )


def quality(sets: Sequence[str], methods: Sequence[str], encoder: str, show: Callable[[list[Row]], None]) -> list[Row]:
    """A row for each set and method; the last rows are means over the sets. encoder: a second one; '' = none. show:
    called with the rows of each set when they are there."""
    rows: list[Row] = []
    for corpus in read_sets(sets):
        print(f"{corpus.name}: {len(corpus.documents):,} documents, {len(corpus.questions):,} questions", flush=True)
        rows += quality_of(corpus, methods, encoder)
        show([r for r in rows if r["set"] == corpus.name])
    measured = list(dict.fromkeys(r["set"] for r in rows))
    for method in dict.fromkeys(r["method"] for r in rows):
        own = [r for r in rows if r["method"] == method]
        if len(own) == len(measured) > 1:
            means = {m: statistics.fmean(r[m] for r in own) for m in MEASURES}
            rows.append({"set": "mean", "method": method, "questions": sum(r["questions"] for r in own), **means})
            rows[-1]["times_bm25s"] = statistics.fmean(r["times_bm25s"] for r in own)
    return rows


def quality_of(corpus: Corpus, methods: Sequence[str], encoder: str) -> list[Row]:
    with tempfile.TemporaryDirectory() as tmp:
        searches = {"bm25s": peer_search(Bm25s(Path(tmp) / "bm25s", 1, "numpy"), corpus)}
        searches["rank-bm25"] = peer_search(RankBm25(Path(tmp), 1), corpus)
        searches |= our_searches(corpus, methods, encoder, Path(tmp))
        values = {name: values_of(corpus, search(corpus.questions)) for name, search in searches.items()}
    rows = []
    for name, by_measure in values.items():
        row: Row = {"set": corpus.name, "method": name, "questions": len(by_measure["ndcg"])}
        row["unjudged"] = len(corpus.questions) - row["questions"]
        for measure, each in by_measure.items():
            row[measure], *row[f"{measure}_interval"] = mean_interval(each)
        row["times_bm25s"] = row["ndcg"] / statistics.fmean(values["bm25s"]["ndcg"])
        row["minus_bm25s"] = paired_bootstrap(by_measure["ndcg"], values["bm25s"]["ndcg"])
        rows.append(row)
    return rows


def values_of(corpus: Corpus, found: list[list[str]]) -> dict[str, list[float]]:
    """Each measure of each question that has a relevant document."""
    ranked = [[corpus.names[id] for id in ids] for ids in found]
    pairs = [(r, g) for r, g in zip(ranked, corpus.gold, strict=True) if any(g.values())]
    gold = [{name for name, grade in g.items() if grade > 0} for _, g in pairs]
    values = {
        m: [f(r, g, K) for (r, _), g in zip(pairs, gold, strict=True)] for m, f in MEASURES.items() if m != "ndcg"
    }
    return {"ndcg": [ndcg_at_k(r, g, K) for r, g in pairs], **values}  # pyrefly: ignore


def peer_search(engine: Bm25s | RankBm25, corpus: Corpus) -> Search:
    engine.build(corpus.texts)
    engine.open()

    def search(questions: list[str]) -> list[list[str]]:
        rows = [engine.search([q], min(K, len(corpus.documents)))[0] for q in questions]
        return [[corpus.documents[i].id for i in row] for row in rows]

    return search


def our_searches(corpus: Corpus, methods: Sequence[str], second: str, tmp: Path) -> dict[str, Search]:
    """Our methods, and FAISS over the vectors of the dense ones."""
    searches: dict[str, Search] = {}
    wanted = [m for m in METHODS if m in methods]
    dense = [m for m in wanted if m in ("dense", "hybrid")]
    for encoder, own in {"static": wanted, **({second: dense} if second else {})}.items():
        options = {"encoder": encoder} if dense else None
        folder = tmp / f"base{len(searches)}"
        kb = KnowledgeBase.build(corpus.documents, folder, dense=options)
        suffix = "" if encoder == "static" else f" {Path(encoder).parent.name if Path(encoder).is_dir() else encoder}"
        for method in own:
            searches[method + suffix] = our_search(kb, method)
        if dense:
            searches[f"faiss flat{suffix}"] = faiss_search(kb, corpus)
    return searches


def our_search(kb: KnowledgeBase, method: str) -> Search:
    return lambda questions: [[h.document.id for h in hits] for hits in kb.search(questions, K, method)]


def faiss_search(kb: KnowledgeBase, corpus: Corpus) -> Search:
    import faiss

    retriever: Any = kb.retriever("dense")
    vectors = np.ascontiguousarray(np.concatenate([segment.vectors for segment in retriever.segments]))
    index: Any = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)

    def search(questions: list[str]) -> list[list[str]]:
        ids = index.search(retriever.encoder.encode(questions, "query"), min(K, len(vectors)))[1]
        return [[corpus.documents[i].id for i in row if i >= 0] for row in ids]

    return search
