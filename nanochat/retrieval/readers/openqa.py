"""Questions with their answers and nothing else, as NQ-Open's .jsonl has them: {"question", "answer": ["..."]}.

Which documents are gold has to be found: the rows have none yet, so they are no rows of a data set as they are.
"""

from collections.abc import Iterator
from pathlib import Path

from nanochat.config import UserError
from nanochat.retrieval.readers.reading import (
    Question,
    Reading,
    answers_field,
    checksum,
    data_files,
    id_field,
    text_field,
)


def read_openqa(path: Path, reading: Reading) -> Iterator[Question]:
    for file in data_files(path, [".jsonl"]):
        for line, row in reading.lines(file):
            with reading.row(file, line):
                question, answers = text_field(row, "question"), answers_field(row)
                if not answers:
                    raise UserError(f"question {question[:60]!r} has no answers")
                id = id_field(row, checksum(question).hex())
                given = {"id": id, "question": question.strip(), "answers": answers, "gold_ids": []}
                yield from reading.question(Question({**given, "answerable": True}, str(file), line))
