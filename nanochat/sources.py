"""Local text of the user's own -> documents: .txt .md (also .gz), .jsonl (also .gz) and .parquet, files or folders.

One text file is one document; above 1 MB (or when it is the only file) it is cut at blank lines, so that validation can
hold out part of it. A .jsonl line holds `text` or `content`; a .parquet file a column `text`. Bad input stops with file
and place, or is repaired (errors="replace") or left out (errors="skip") and counted.
"""

import codecs
import glob
import gzip
import itertools
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import UserError

Errors = Literal["strict", "replace", "skip"]
SUFFIXES = (".txt", ".txt.gz", ".md", ".md.gz", ".jsonl", ".jsonl.gz", ".parquet")
WHOLE = 1_000_000  # bytes: a text file up to this is one document
PIECE = 32_000  # characters: a larger one is cut at the first blank line after this many
BLOCK = 1 << 20  # bytes read at once
VALIDATION_NAME = re.compile(r"(^|[^a-z])(dev|val|valid|validation)([-_]\d+(-of-\d+)?)?$", re.IGNORECASE)
SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass
class Source:
    """What a --source names: files in reading order, those that are validation by name, and how many were left out."""

    train: list[Path]
    val: list[Path]
    ignored: list[Path]

    def fingerprint(self) -> list[list[Any]]:
        """[path, bytes, time of change] of every file: equal means nothing changed since."""
        stats = [(p, p.stat()) for p in [*self.train, *self.val]]
        return [[str(p.resolve()), s.st_size, s.st_mtime_ns] for p, s in stats]


@dataclass
class Reader:
    """Reads files into documents and counts what it repaired or left out."""

    errors: Errors = "strict"
    replaced: int = 0
    skipped: int = 0
    empty: int = 0
    first_fault: str = field(default="", repr=False)

    def documents(self, files: list[Path], split_small: bool = False) -> Iterator[str]:
        """Documents of all files in order. split_small cuts text files below 1 MB as well.

        Raises UserError naming file and byte, line or row of the first fault (errors="strict").
        """
        for path in files:
            kind = path.name.removesuffix(".gz").rpartition(".")[2]
            try:
                if kind == "parquet":
                    texts = self._parquet(path)
                elif kind == "jsonl":
                    texts = self._jsonl(path)
                else:
                    texts = self._text(path, split_small)
                for text in texts:
                    if text.strip():
                        yield text
                    else:
                        self.empty += 1
            except (EOFError, gzip.BadGzipFile, zlib.error, pa.ArrowException, OSError) as e:
                raise UserError(f"{path} cannot be read ({_short(e)}): restore the file, or remove it") from e

    def _text(self, path: Path, split_small: bool) -> Iterator[str]:
        with _open(path) as f:
            size = sum(len(block) for block in itertools.islice(iter(lambda: f.read(BLOCK), b""), 2))
        # A lone short file is cut finer, to give some tens of pieces to hold one out from.
        small = min(PIECE, max(1_000, size // 50)) if split_small else WHOLE + 1
        limit = PIECE if size > WHOLE else small
        with _open(path) as f:
            offset = 0
            for piece in _pieces(f, limit):
                raw = len(piece.encode("utf-8", "surrogateescape"))
                text = self._clean(piece, path, f"byte {offset + _fault_offset(piece)}")
                offset += raw
                if text is not None:
                    yield text.removeprefix("\ufeff").replace("\r\n", "\n").strip("\n")

    def _jsonl(self, path: Path) -> Iterator[str]:
        with _open(path) as f:
            for number, raw in enumerate(f, 1):
                line = self._clean(raw.decode("utf-8", "surrogateescape"), path, f"line {number}")
                if line is None or not line.strip():
                    continue
                try:
                    value = json.loads(line.removeprefix("\ufeff"))
                except (ValueError, RecursionError) as e:
                    self._fault(f"{path}:{number}: not JSON ({e})")
                    continue
                text = value.get("text", value.get("content")) if isinstance(value, dict) else None
                if not isinstance(text, str):
                    has = f"has {', '.join(map(str, value))}" if isinstance(value, dict) else "is no object"
                    self._fault(
                        f"{path}:{number}: expected a field 'text' or 'content' holding a string; the line {has}"
                    )
                    continue
                text = self._clean(text, path, f"line {number}")
                if text is not None:
                    yield text

    def _parquet(self, path: Path) -> Iterator[str]:
        with pq.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                raise UserError(
                    f"{path} has no column 'text' (it has {', '.join(file.schema_arrow.names)}): rename one"
                )
            row = 0
            for group in range(file.num_row_groups):
                column = file.read_row_group(group, columns=["text"]).column("text")
                if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
                    raise UserError(f"{path}: column 'text' holds {column.type}, expected strings")
                for raw in column.cast(pa.large_binary()).to_pylist():
                    row += 1
                    if raw is None:
                        self._fault(f"{path}: row {row} has no text (null)")
                        continue
                    text = self._clean(raw.decode("utf-8", "surrogateescape"), path, f"row {row}")
                    if text is not None:
                        yield text

    def _clean(self, text: str, path: Path, place: str) -> str | None:
        """The text if it is valid Unicode; otherwise repaired, None (left out), or a UserError."""
        if SURROGATE.search(text) is None:
            return text
        if self.errors == "replace":
            self.replaced += 1
            # bytes that escaped decoding become U+FFFD as Python's own "replace" writes them
            raw = (
                text.encode("utf-8", "surrogateescape") if _only_bytes(text) else SURROGATE.sub("\ufffd", text).encode()
            )
            return raw.decode("utf-8", "replace")
        self._fault(f"{path}: invalid UTF-8 at {place}", "; --errors=replace repairs it")
        return None

    def _fault(self, what: str, more: str = "") -> None:
        if self.errors != "skip":
            raise UserError(f"{what}: mend the file, or pass --errors=skip to leave such documents out{more}")
        self.skipped += 1
        self.first_fault = self.first_fault or what


def find_files(source: str, keep_split: bool = True, flag: str = "--source") -> Source:
    """Files that `source` (file, folder or glob) names, sorted by path; dot files are passed over.

    A folder holding shard_*.parquet is a folder of shards: its other files are left out. keep_split: files whose name
    ends in dev, val, valid or validation, as a word, are the validation split, if others remain for training. flag:
    what an error says it was given by.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        shards = sorted(path.glob("shard_*.parquet"))
        files = [p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path))]
        files.sort(key=lambda p: p.relative_to(path).as_posix())
        known = shards or [p for p in files if p.name.lower().endswith(SUFFIXES)]
        ignored = [p for p in files if p not in set(known)]
    elif path.is_file():
        known, ignored = [path], []
    else:
        matches = glob.glob(str(path), recursive=True)  # noqa: PTH207 (the pattern may be absolute)
        known, ignored = sorted(Path(p) for p in matches if Path(p).is_file()), []
    wanted = f"expected {', '.join(SUFFIXES)}"
    if not known:
        where = "holds no text files" if path.is_dir() else "does not exist"
        raise UserError(f"{flag}={source} {where}: {wanted}, a folder of them, or a quoted glob")
    for p in known:
        if not p.name.lower().endswith(SUFFIXES):
            raise UserError(f"{flag}: {p} is of an unknown kind: {wanted}")
    val = [p for p in known if VALIDATION_NAME.search(p.name.partition(".")[0])] if keep_split else []
    train = [p for p in known if p not in set(val)]
    return Source(train, val, ignored) if train else Source(known, [], ignored)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")  # type: ignore[return-value]


def _pieces(file: IO[bytes], limit: int) -> Iterator[str]:
    """Text cut after `limit` characters at a blank line; where none comes within 4 x limit, at a line or a space."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    text, end = "", False
    while not end or text:
        if not end and len(text) <= 4 * limit:
            block = file.read(BLOCK)
            end = not block
            text += decoder.decode(block, final=end)
            continue
        cut = _cut(text, limit)
        yield text[:cut]
        text = text[cut:]


def _cut(text: str, limit: int) -> int:
    if len(text) <= limit:
        return len(text)
    for boundary in (r"\r?\n[ \t]*\r?\n\s*", r"\n", r"\s"):
        found = re.compile(boundary).search(text, limit, 4 * limit)
        if found:
            return found.end()
    return min(len(text), 4 * limit)


def _fault_offset(piece: str) -> int:
    found = SURROGATE.search(piece)
    return len(piece[: found.start()].encode("utf-8", "surrogateescape")) if found else 0


def _only_bytes(text: str) -> bool:
    return all("\udc80" <= c <= "\udcff" for c in SURROGATE.findall(text))


def _short(e: BaseException) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0][:160]
