"""Your own JSON Lines: documents, questions, or both mixed, one object a line.

    {"id": "a1", "title": "Wells", "text": "...", "year": 1999}       a document; all other keys are its metadata
    {"question": "...", "answers": ["..."], "gold_ids": ["a1"]}        a question about documents of the same input
    {"question": "...", "answer": "...", "documents": [{"title": "...", "text": "...", "gold": true}, "more text"]}

The documents of a question join the knowledge base. Without gold_ids those marked "gold" are the gold ones, and all of
them where none is marked. "answerable": false with no answers is a question to abstain from. "hops" and "kind" are
kept. A document without an id gets one: file:line, or the checksum of its text where it belongs to a question.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanochat.config import UserError
from nanochat.retrieval.document import Document
from nanochat.retrieval.readers.reading import (
    Question,
    Reading,
    answers_field,
    checked_hops,
    checked_object,
    checksum,
    data_files,
    id_field,
    list_field,
    question_row,
    text_field,
)


def read_jsonl(path: Path, reading: Reading) -> Iterator[Document | Question]:
    for file in data_files(path, [".jsonl"]):
        for line, row in reading.lines(file):
            with reading.row(file, line):
                if "question" in row:
                    documents, question = _question(row)
                    for document in documents:
                        yield from reading.document(document)
                    yield from reading.question(Question(question, str(file), line))
                else:
                    yield from reading.document(document_of(row, f"{file.name}:{line}"))


def document_of(row: dict[str, Any], default_id: str = "") -> Document:
    """{"id"?, "title"?, "text", ...} -> Document; "metadata" may hold its own object (as BEIR's files do).

    Of a document that is only a title, as many in BEIR are, the title is the text.
    """
    known = {"id", "_id", "title", "text", "metadata"}
    inner = row.get("metadata") or {}
    if not isinstance(inner, dict):
        raise UserError(f"'metadata' is {str(inner)[:60]!r}: expected an object")
    title = row.get("title") or ""
    if title and row.get("text") == "":
        row, title = {**row, "text": title}, ""
    metadata = {**inner, **{k: v for k, v in row.items() if k not in known}}
    return Document(id_field(row, default_id), text_field(row, "text"), title, metadata)


def _question(row: dict[str, Any]) -> tuple[list[Document], dict[str, Any]]:
    """-> (documents it brings along, the row to write)."""
    text = text_field(row, "question")
    answers = answers_field(row)
    answerable = row.get("answerable", True)
    if not isinstance(answerable, bool):
        raise UserError(f"'answerable' is {answerable!r}: expected true or false")
    if answerable and not answers:
        raise UserError('no answers: give some, or "answerable": false')
    pairs = [_own_document(value) for value in (list_field(row, "documents") if row.get("documents") else [])]
    documents = [document for document, _ in pairs]
    if "gold_ids" in row:
        gold = [id_field({"id": i}) for i in list_field(row, "gold_ids")]
    elif answerable:
        gold = [d.id for d, marked in pairs if marked] or [d.id for d in documents]
    else:
        gold = []
    id = id_field(row, checksum(text).hex())
    kind, hops = row.get("kind"), checked_hops(row.get("hops"))
    if kind is not None and not isinstance(kind, str):
        raise UserError(f"'kind' is {str(kind)[:60]!r}: expected a text")
    return documents, question_row(id, text, answers, gold, answerable, kind=kind, hops=hops)


def _own_document(value: Any) -> tuple[Document, bool]:
    """-> (document, whether it is marked as gold)."""
    own = dict(checked_object({"text": value} if isinstance(value, str) else value))
    gold = bool(own.pop("gold", False))
    default_id = checksum(str(own.get("title") or ""), text_field(own, "text")).hex()
    return document_of(own, default_id), gold
