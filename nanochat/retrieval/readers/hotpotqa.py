"""Multi-hop questions with their paragraphs: HotpotQA (arXiv 1809.09600), 2WikiMultihopQA (2011.01060), MuSiQue
(2108.00573). The paragraphs of all questions together are the documents.

HotpotQA and 2Wiki: "context" as [[title, [sentence, ...]], ...], or a list of {"title", "sentences"}, or the two lists
of the Hugging Face files; gold are the titles in "supporting_facts". MuSiQue: "paragraphs" of {"title",
"paragraph_text", "is_supporting"}, and "question_decomposition", which becomes "hops" with every #1 filled in.
A document's id is its title; further texts under the same title are "title#2", "title#3".
"""

import re
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


def read_hotpotqa(path: Path, reading: Reading) -> Iterator[Document | Question]:
    for file in data_files(path, [".json", ".jsonl"]):
        for line, row in reading.entries(file):
            with reading.row(file, line):
                documents = [Document(reading.id_for(t, text), text, t) for t, text in _paragraphs(row)]
                question = _musique(row, documents) if "paragraphs" in row else _hotpotqa(row, documents)
                for document in documents:
                    if not reading.has(document.id):  # questions share paragraphs
                        yield from reading.document(document)
                yield from reading.question(Question(question, str(file), line))


def _paragraphs(row: dict[str, Any]) -> list[tuple[str, str]]:
    """(title, text) of each paragraph."""
    if "paragraphs" in row:
        entries = [checked_object(p) for p in list_field(row, "paragraphs")]
        return [(text_field(p, "title"), text_field(p, "paragraph_text", "text")) for p in entries]
    context = row.get("context")
    if isinstance(context, dict):
        titles, sentences = list_field(context, "title"), list_field(context, "sentences")
        if len(titles) != len(sentences):
            raise UserError(f"'context' has {len(titles)} titles for {len(sentences)} paragraphs")
        context = list(zip(titles, sentences, strict=True))
    if not isinstance(context, list) or not context:
        raise UserError("no 'context' and no 'paragraphs' with the documents of the question")
    return [_paragraph(p) for p in context]


def _paragraph(value: Any) -> tuple[str, str]:
    """[title, sentences] or {"title", "sentences"}. Sentences are joined with one space."""
    if isinstance(value, dict):
        value = (value.get("title"), value.get("sentences"))
    if not isinstance(value, list | tuple) or len(value) < 2:
        raise UserError(f"a paragraph is {str(value)[:60]!r}: expected [title, [sentence, ...]]")
    title = text_field({"title": value[0]}, "title")
    if not isinstance(value[1], list) or not all(isinstance(s, str) for s in value[1]):
        raise UserError(f"paragraph {title!r}: its sentences are {str(value[1])[:60]!r}, expected a list of texts")
    text = " ".join(s.strip() for s in value[1] if s.strip())
    return title, text_field({"text of " + title: text}, "text of " + title)


def _hotpotqa(row: dict[str, Any], documents: list[Document]) -> dict[str, Any]:
    wanted = _gold_titles(row.get("supporting_facts"))
    missing = set(wanted) - {d.title for d in documents}
    if missing:
        raise UserError(f"the gold document {min(missing)!r} is not among the question's paragraphs")
    gold = [d.id for d in documents if d.title in wanted]
    text, answer = text_field(row, "question"), text_field(row, "answer")
    id = id_field(row, checksum(text).hex())
    return question_row(id, text, [answer.strip()], gold, kind=row.get("type"))


def _gold_titles(facts: Any) -> list[str]:
    """[[title, sentence number], ...] or {"title": [...], "sent_id": [...]} -> titles."""
    pairs = [[t] for t in list_field(facts, "title")] if isinstance(facts, dict) else facts
    if not isinstance(pairs, list) or not all(isinstance(p, list) and p for p in pairs):
        raise UserError(f"'supporting_facts' is {str(facts)[:60]!r}: expected [[title, sentence number], ...]")
    return texts_field([p[0] for p in pairs], "supporting_facts")


def _musique(row: dict[str, Any], documents: list[Document]) -> dict[str, Any]:
    text, answerable = text_field(row, "question"), bool(row.get("answerable", True))
    id = id_field(row, checksum(text).hex())
    kind = id.partition("_")[0]  # "2hop__..."
    if not answerable:
        return question_row(id, text, [], [], False, kind=kind)
    answers = texts_field(
        [text_field(row, "answer"), *texts_field(row.get("answer_aliases", []), "answer_aliases")], ""
    )
    gold = [d.id for d, p in zip(documents, row["paragraphs"], strict=True) if p.get("is_supporting")]
    hops = _hops(list_field(row, "question_decomposition"), documents) if row.get("question_decomposition") else []
    return question_row(id, text, answers, gold, kind=kind, hops=hops)


def _hops(steps: list[Any], documents: list[Document]) -> list[dict[str, Any]]:
    """[{"query", "answer", "gold_ids"}]: #1 in a later step stands for the first step's answer."""
    hops: list[dict[str, Any]] = []
    for step in steps:
        step = checked_object(step)
        place = step.get("paragraph_support_idx")
        if not isinstance(place, int) or not 0 <= place < len(documents):
            raise UserError(f"step {len(hops) + 1} names paragraph {place}, but there are {len(documents)}")
        query = re.sub(r"#(\d+)", lambda m: _earlier(hops, int(m[1])), text_field(step, "question"))
        hops.append({"query": query, "answer": text_field(step, "answer"), "gold_ids": [documents[place].id]})
    return hops


def _earlier(hops: list[dict[str, Any]], number: int) -> str:
    if not 1 <= number <= len(hops):
        raise UserError(f"step {len(hops) + 1} refers to step {number}, which does not come before it")
    return hops[number - 1]["answer"]
