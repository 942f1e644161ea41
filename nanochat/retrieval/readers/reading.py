"""What every reader shares: opening files, lines and JSON, and the listing of what cannot be used."""

import contextlib
import gzip
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from nanochat.config import UserError
from nanochat.retrieval.document import Document, metadata_json

SHOWN = 3  # bad rows an error message quotes


@dataclass(frozen=True)
class Question:
    """A row of train.jsonl or val.jsonl and where it came from. split: where the source itself says so."""

    row: dict[str, Any]
    file: str
    line: int
    split: Literal["train", "val"] | None = None


class Reading:
    """Counts what was read and lists what was not, one JSON object a line: {"file", "line", "cause"}.

    A bad row is raised as UserError inside `with reading.row(file, line)`; line 0 means the whole file.
    """

    def __init__(self, listing: IO[str]) -> None:
        self.listing = listing
        self.documents = self.questions = self.bad = 0
        self.notes: Counter[str] = Counter()  # what was passed over on purpose
        self.first: list[str] = []  # bad rows in words, for messages
        self._seen: dict[str, bytes] = {}  # document id -> checksum of its content
        self._asked: dict[str, bytes] = {}  # question id -> checksum of its row
        self._ids: dict[bytes, str] = {}  # checksum of (title, text) -> id, where titles are ids
        self._titles: Counter[str] = Counter()

    @property
    def rows(self) -> int:
        return self.documents + self.questions + self.bad

    @contextlib.contextmanager
    def row(self, file: Path | str, line: int) -> Iterator[None]:
        """List the UserError of a bad row instead of raising it."""
        try:
            yield
        except UserError as e:
            self.refuse(file, line, str(e))

    def refuse(self, file: Path | str, line: int, cause: str) -> None:
        self.bad += 1
        self.listing.write(json.dumps({"file": str(file), "line": line, "cause": cause}) + "\n")
        if len(self.first) < SHOWN:
            words = f"{file}:{line}: {cause}" if line else f"{file}: {cause}"
            self.first.append(words.encode(errors="backslashreplace").decode())  # a file name may be no Unicode

    def document(self, document: Document) -> list[Document]:
        """[document], or [] where the same one came before. UserError: its id stands for another one, or what
        no base can hold."""
        if not document.text.strip():
            raise UserError(f"document {document.id!r} has no text")
        checksum(document.id)
        metadata_json(document)
        if not _is_new(self._seen, document.id, checksum(document.title, document.text), "document"):
            self.notes["documents that came twice"] += 1
            return []
        self.documents += 1
        return [document]

    def question(self, question: Question) -> list[Question]:
        """As document() does."""
        id = question.row["id"]
        if not _is_new(self._asked, id, checksum(json.dumps(question.row, sort_keys=True)), "question"):
            self.notes["questions that came twice"] += 1
            return []
        self.questions += 1
        return [question]

    def id_for(self, title: str, text: str) -> str:
        """An id for a document that has none: its title; "title#2" and so on for further texts under it."""
        content = checksum(title, text)
        if content not in self._ids:
            self._titles[title] += 1
            self._ids[content] = title if self._titles[title] == 1 else f"{title}#{self._titles[title]}"
        return self._ids[content]

    def has(self, id: str) -> bool:
        return id in self._seen

    def drop(self, question: Question, cause: str) -> None:
        """A question that was counted as good turns out bad."""
        self.questions -= 1
        self.refuse(question.file, question.line, cause)

    def lines(self, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        """(line number, object) of a .jsonl or .jsonl.gz file; lines that are no JSON object are listed."""
        with opened(path) as f:
            for number, raw in enumerate(f, 1):
                if raw.strip():
                    with self.row(path, number):
                        yield number, parse(raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw)

    def entries(self, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        """(number from 1, object) of a JSON Lines file, or of a .json file's list (in "data", where it is an object).

        The number is the line, or the place in the list.
        """
        if not path.name.removesuffix(".gz").endswith(".json"):
            yield from self.lines(path)
            return
        with opened(path) as f:
            try:
                value = json.loads(f.read())
            except (ValueError, RecursionError) as e:
                raise UserError(f"{path} is not JSON ({e}): one object a line is read from a .jsonl file") from e
        values = value.get("data") if isinstance(value, dict) else value
        if not isinstance(values, list):
            raise UserError(f'{path}: expected a list of objects, or {{"data": [...]}}')
        for number, entry in enumerate(values, 1):
            with self.row(path, number):
                yield number, checked_object(entry)


def _is_new(seen: dict[str, bytes], id: str, content: bytes, what: str) -> bool:
    before = seen.get(id)
    if before is None:
        seen[id] = content
    elif before != content:
        raise UserError(f"another {what} has the id {id!r} already: give every {what} its own")
    return before is None


def parse(raw: bytes) -> dict[str, Any]:
    """One line of JSON. UserError naming what is wrong with it."""
    try:
        return checked_object(json.loads(raw.decode("utf-8")))
    except UnicodeDecodeError as e:
        raise UserError(f"not UTF-8 (byte {e.object[e.start]:#04x} at {e.start} of the line)") from e
    except (ValueError, RecursionError) as e:  # a number of 5,000 digits is a plain ValueError
        raise UserError(f"not JSON ({e})") from e


def checked_object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"expected a JSON object, not {str(value)[:60]!r}")
    return value


@contextlib.contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, unpacked where its name ends in .gz. UserError where it is missing, cut off or damaged."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as f:
            yield f  # type: ignore[misc]
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (EOFError, OSError, zlib.error) as e:  # gzip.BadGzipFile is an OSError
        raise UserError(f"{path} cannot be read ({e}): restore the file, or remove it") from e


def data_files(path: Path, suffixes: Sequence[str]) -> list[Path]:
    """The file itself, or the files of a folder and its folders with these endings, in the order of their names."""
    if not path.exists():
        raise UserError(f"--input={path} does not exist: expected a file or a folder")
    if not path.is_dir():  # a pipe will do as well
        return [path]
    endings = tuple(s + gz for s in suffixes for gz in ("", ".gz"))
    found = [p for p in walk(path) if p.name.lower().endswith(endings)]
    if not found:
        raise UserError(f"--input={path} holds no {' or '.join(endings)} file")
    return found


def walk(folder: Path) -> list[Path]:
    """Files below a folder, by relative path; hidden ones are passed over."""
    paths = [(p.relative_to(folder), p) for p in folder.rglob("*") if p.is_file()]
    shown = [(r, p) for r, p in paths if not any(part.startswith(".") for part in r.parts)]
    return [p for _, p in sorted(shown, key=lambda pair: pair[0].as_posix())]


def checksum(*texts: str) -> bytes:
    """16 bytes. UserError where a text holds half of a surrogate pair, which no file can."""
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        try:
            digest.update(text.encode() + b"\0")
        except UnicodeEncodeError as e:
            raise UserError(f"half of a surrogate pair at character {e.start}: not valid Unicode") from e
    return digest.digest()


def text_field(row: dict[str, Any], *names: str) -> str:
    """The first of these keys that the row has; it must hold text that is not blank."""
    name = next((n for n in names if n in row), None)
    if name is None:
        raise UserError(f"no {names[0]!r}: the row has {', '.join(map(repr, row)) or 'nothing'}")
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{name!r} is {str(value)[:60]!r}: expected text")
    return value


def id_field(row: dict[str, Any], default: str = "") -> str:
    """`id` or `_id` as text; numbers are written out. UserError where there is none and no default."""
    value = row.get("id", row.get("_id"))
    if value is None and default:
        return default
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise UserError(f"id {str(value)[:60]!r}: expected text or a number")
    return str(value)


def list_field(row: dict[str, Any], name: str) -> list[Any]:
    if not isinstance(row.get(name), list):
        raise UserError(f"{name!r} is {str(row.get(name))[:60]!r}: expected a list")
    return row[name]


def texts_field(value: Any, name: str) -> list[str]:
    """A list of texts without repeats; a lone text is a list of one."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise UserError(f"{name!r} is {str(value)[:60]!r}: expected a list of texts")
    return list(dict.fromkeys(v for v in values if v.strip()))


def answers_field(row: dict[str, Any]) -> list[str]:
    """`answers` or `answer`: a list of texts, or one text."""
    return texts_field(row["answers"] if "answers" in row else row.get("answer") or [], "answers")


def checked_hops(value: Any) -> list[dict[str, Any]]:
    """The steps of a question, as [{"query": str, "answer": str, "gold_ids": [str]}]; any key may be missing."""
    if not value:
        return []

    def sound(hop: Any) -> bool:
        gold = hop.get("gold_ids") or [] if isinstance(hop, dict) else None
        return isinstance(gold, list) and all(
            isinstance(t, str) for t in [*gold, hop.get("query") or "", hop.get("answer") or ""]
        )

    if not isinstance(value, list) or not all(map(sound, value)):
        raise UserError(
            f'hops is {str(value)[:60]!r}, expected a list of {{"query": str, "answer": str, "gold_ids": [str]}}'
        )
    return value


def question_row(
    id: str, question: str, answers: Sequence[str], gold_ids: Sequence[str], answerable: bool = True, **more: Any
) -> dict[str, Any]:
    """The row that is written. more: kind, hops and the like; empty ones are left out.

    UserError: an answerable question without gold documents, or one that cannot be answered but has answers.
    """
    if answerable and not gold_ids:
        raise UserError("an answerable question without a gold document")
    if not answerable and answers:
        raise UserError(f"a question that is not answerable has the answer {answers[0]!r}")
    row = {"id": id, "question": question.strip(), "answers": list(answers), "gold_ids": list(dict.fromkeys(gold_ids))}
    row |= {"answerable": answerable, **{k: v for k, v in more.items() if v}}
    checksum(json.dumps(row, ensure_ascii=False))
    return row
