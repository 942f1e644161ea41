"""Readers: folders and data sets in their usual layouts -> documents and questions with gold document ids.

    with open("bad_rows.jsonl", "w") as listing:
        reading = Reading(listing)
        for item in READERS["squad"](Path("train-v2.0.json"), reading):  # Document or Question, as they come

What cannot be used is listed with file, line and cause, and counted; it never stops a reader. A file that is missing,
cut off or of the wrong kind as a whole does (UserError).
"""

from collections.abc import Callable, Iterator
from pathlib import Path

from nanochat.retrieval.document import Document
from nanochat.retrieval.readers.beir import read_beir
from nanochat.retrieval.readers.files import read_files
from nanochat.retrieval.readers.hotpotqa import read_hotpotqa
from nanochat.retrieval.readers.jsonl import read_jsonl
from nanochat.retrieval.readers.openqa import read_openqa
from nanochat.retrieval.readers.reading import Question, Reading
from nanochat.retrieval.readers.squad import read_squad

READERS: dict[str, Callable[[Path, Reading], Iterator[Document | Question]]] = {
    "files": read_files,
    "jsonl": read_jsonl,
    "squad": read_squad,
    "hotpotqa": read_hotpotqa,
    "beir": read_beir,
    "openqa": read_openqa,
}

__all__ = ["READERS", "Question", "Reading"]
