"""BEIR's layout (arXiv 2104.08663): a folder with corpus.jsonl, queries.jsonl and qrels/*.tsv, each perhaps .gz.

qrels lines are "query-id <tab> corpus-id <tab> score" under a header; a score above 0 is relevant. A query with
judgements is a question without answers; grades other than 1 are kept as "relevance". With several qrels files,
train.tsv is the training split and the others are validation; with one file the caller splits.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from nanochat.config import UserError
from nanochat.retrieval.document import Document
from nanochat.retrieval.readers.jsonl import document_of
from nanochat.retrieval.readers.reading import Question, Reading, id_field, opened, question_row, text_field

Judged = dict[str, tuple[int, dict[str, int]]]  # query id -> (its first line, {document id: score})


def read_beir(path: Path, reading: Reading) -> Iterator[Document | Question]:
    corpus, queries = _file(path, "corpus.jsonl"), _file(path, "queries.jsonl")
    judgements = sorted([*path.glob("qrels/*.tsv"), *path.glob("qrels/*.tsv.gz")])
    if not judgements:
        raise UserError(f"{path} has no qrels/*.tsv: which documents answer which query stands there")
    for line, row in reading.lines(corpus):
        with reading.row(corpus, line):
            yield from reading.document(document_of(row))
    asked: dict[str, str] = {}
    for line, row in reading.lines(queries):
        with reading.row(queries, line):
            asked[id_field(row)] = text_field(row, "text")
    used: set[str] = set()
    for file in judgements:
        split = _split(file) if len(judgements) > 1 else None
        for id, (line, scores) in _qrels(file, reading).items():
            with reading.row(file, line):
                if id not in asked:
                    raise UserError(f"query {id!r} is not in {queries.name}")
                if id in used:
                    raise UserError(f"query {id!r} has judgements in another qrels file already")
                used.add(id)
                gold = [d for d, score in scores.items() if score > 0]
                graded = {d: s for d, s in scores.items() if s > 0} if max(scores.values()) > 1 else {}
                row = question_row(id, asked[id], [], gold, relevance=graded)
                yield from reading.question(Question(row, str(file), line, split))
    reading.notes["queries without judgements"] += len(asked.keys() - used)


def _file(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise UserError(f"{folder} has no {name}: --mode beir expects corpus.jsonl, queries.jsonl and qrels/*.tsv")


def _split(file: Path) -> Literal["train", "val"]:
    return "train" if file.name.partition(".")[0] == "train" else "val"


def _qrels(file: Path, reading: Reading) -> Judged:
    judged: Judged = defaultdict(lambda: (0, {}))
    with opened(file) as f:
        for line, raw in enumerate(f, 1):
            if not raw.strip() or (line == 1 and raw.startswith(b"query-id")):
                continue
            with reading.row(file, line):
                query, document, score = _judgement(raw)
                first, scores = judged[query]
                scores[document] = score
                judged[query] = (first or line, scores)
    return judged


def _judgement(raw: bytes) -> tuple[str, str, int]:
    try:
        query, document, score = raw.decode("utf-8").rstrip("\r\n").split("\t")
        return query, document, int(score)
    except ValueError as e:  # UnicodeDecodeError is one
        raise UserError(f"expected query-id, corpus-id and a whole number between tabs, not {raw[:60]!r}") from e
