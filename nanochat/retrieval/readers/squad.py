"""SQuAD 1.1 and 2.0 (arXiv 1606.05250, 1806.03822): a paragraph is a document and the gold one of its questions.

The official .json files ({"data": [{"title", "paragraphs": [{"context", "qas"}]}]}), and JSON Lines with one paragraph
each: {"article", "pid", "context", "qas": [{"id", "question", "answers": ["..."], "impossible"?}]}. Questions that
SQuAD 2.0 calls impossible have no answers and no gold document: the right reply is to abstain.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanochat.config import UserError
from nanochat.retrieval.document import Document
from nanochat.retrieval.readers.reading import (
    Question,
    Reading,
    checked_object,
    checksum,
    data_files,
    id_field,
    list_field,
    question_row,
    text_field,
    texts_field,
)


def read_squad(path: Path, reading: Reading) -> Iterator[Document | Question]:
    for file in data_files(path, [".json", ".jsonl"]):
        for line, entry in reading.entries(file):
            paragraphs = [entry] if "context" in entry else []
            with reading.row(file, line):
                paragraphs = paragraphs or _paragraphs(entry)
            for paragraph in paragraphs:
                with reading.row(file, line):
                    yield from _read(paragraph, file, line, reading)


def _paragraphs(article: dict[str, Any]) -> list[dict[str, Any]]:
    """The paragraphs of an official article in the form of one line each."""
    title, paragraphs = text_field(article, "title"), list_field(article, "paragraphs")
    return [{**checked_object(p), "article": title, "pid": f"{title}#{i}"} for i, p in enumerate(paragraphs)]


def _read(paragraph: dict[str, Any], file: Path, line: int, reading: Reading) -> Iterator[Document | Question]:
    context = text_field(paragraph, "context")
    title = str(paragraph.get("article") or "").replace("_", " ")
    id = str(paragraph.get("pid") or checksum(title, context).hex())
    yield from reading.document(Document(id, context, title))
    for qa in list_field(paragraph, "qas"):
        with reading.row(file, line):
            row = _question(checked_object(qa), id, context)
            yield from reading.question(Question(row, str(file), line))


def _question(qa: dict[str, Any], document: str, context: str) -> dict[str, Any]:
    text, given = text_field(qa, "question"), qa.get("answers") or []
    impossible = bool(qa.get("is_impossible", qa.get("impossible", False)))
    if isinstance(given, dict):  # {"text": [...], "answer_start": [...]} of the Hugging Face files
        given = given.get("text")
    if isinstance(given, list):
        given = [a.get("text") if isinstance(a, dict) else a for a in given]
    answers = texts_field(given, "answers")
    if not impossible and not answers:
        raise UserError(f"question {text[:60]!r} has no answers and is not marked impossible")
    missing = next((a for a in answers if a not in context), None)
    if missing is not None:
        raise UserError(f"answer {missing!r} does not stand in its paragraph {document!r}")
    id = id_field(qa, checksum(text).hex())
    return question_row(id, text, answers, [] if impossible else [document], not impossible)
