"""Folders of .txt, .md, .html and .pdf files (all but .pdf also as .gz): one document a file, its id the path below
the folder. Folders are walked in the order of names; hidden files and other kinds are passed over and counted.

A file that is not UTF-8, holds no text or cannot be parsed is listed as bad; nothing is guessed or repaired. HTML goes
through beautifulsoup4 (html.parser), PDF through pypdf.
"""

import logging
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from nanochat.config import UserError
from nanochat.retrieval.document import Document
from nanochat.retrieval.readers.reading import Reading, opened, walk

Parsed = tuple[str, str, dict[str, int]]  # title, text, metadata
HIDDEN = ("script", "style", "noscript", "template", "head", "title", "svg")
BLOCKS = """address article aside blockquote br dd div dl dt fieldset figcaption figure footer form h1 h2 h3 h4 h5 h6
    header hr li main nav ol p pre section table td th tr ul""".split()  # noqa: SIM905
# what pypdf raises on damaged files besides its own errors: it trusts types and offsets that the file states
PDF_FAULTS = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    OSError,
    RuntimeError,
    EOFError,
    AssertionError,
)


def read_files(path: Path, reading: Reading) -> Iterator[Document]:
    if path.is_file():
        found = [(path.name, path)]
    elif path.is_dir():
        found = [(p.relative_to(path).as_posix(), p) for p in walk(path)]
    else:
        raise UserError(f"--input={path} does not exist: expected a file or a folder")
    wanted = [(id, p) for id, p in found if _kind(p) in KINDS]
    if not wanted:
        raise UserError(f"--input={path} holds no {', '.join(KINDS)} file")
    if len(found) > len(wanted):
        reading.notes["files of other kinds"] += len(found) - len(wanted)
    for id, file in wanted:
        with reading.row(file, 0):
            title, text, metadata = KINDS[_kind(file)](file)
            if not text.strip():
                raise UserError(
                    "no text in it" + (" (a scan? recognise its text first)" if "pages" in metadata else "")
                )
            yield from reading.document(Document(id, text, title, metadata))


def read_text(path: Path) -> Parsed:
    return _stem(path), _decoded(path), {}


def read_markdown(path: Path) -> Parsed:
    """The title is the first heading of the first level."""
    text = _decoded(path)
    heading = re.search(r"^# +(.+?)[ #]*$", text, re.MULTILINE)
    return heading[1] if heading else _stem(path), text, {}


def read_html(path: Path) -> Parsed:
    """What a reader would see: blocks on lines of their own, white space collapsed except in <pre>."""
    from bs4 import BeautifulSoup, NavigableString

    soup = BeautifulSoup(_decoded(path, _declared), "html.parser")
    title = " ".join(soup.title.get_text().split()) if soup.title else ""
    for tag in soup.find_all(HIDDEN):
        tag.decompose()
    for string in soup.find_all(string=True):
        if type(string) is NavigableString and not string.find_parent("pre"):
            string.replace_with(re.sub(r"\s+", " ", string))
    for tag in soup.find_all(BLOCKS):
        tag.insert_before("\n")
        tag.insert_after("\n")
    lines = re.sub(r"[ \t]+\n", "\n", re.sub(r"\n (?! )", "\n", soup.get_text()))
    return title or _stem(path), re.sub(r"\n{3,}", "\n\n", lines).strip(), {}


def read_pdf(path: Path) -> Parsed:
    """Pages with an empty line between them. Layout, tables and scans are beyond it."""
    from pypdf import PdfReader
    from pypdf.errors import DependencyError, PyPdfError

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # what it cannot read is listed, not logged
    try:
        with open(path, "rb") as f:
            reader = PdfReader(f)
            if reader.is_encrypted and not reader.decrypt(""):
                raise UserError("it needs a password: save it without one")
            pages = [page.extract_text().strip() for page in reader.pages]
            title = str((reader.metadata and reader.metadata.title) or "").strip()
    except UserError:
        raise
    except (PyPdfError, DependencyError, struct.error, zlib.error, *PDF_FAULTS) as e:
        raise UserError(f"not a readable PDF ({type(e).__name__}: {' '.join(str(e).split())[:120]})") from e
    return title or _stem(path), "\n\n".join(p for p in pages if p), {"pages": len(pages)}


KINDS: dict[str, Callable[[Path], Parsed]] = {
    ".txt": read_text,
    ".md": read_markdown,
    ".html": read_html,
    ".htm": read_html,
    ".pdf": read_pdf,
}


def _kind(path: Path) -> str:
    name = path.name.lower()
    bare = name.removesuffix(".gz")
    kind = "." + bare.rpartition(".")[2]
    return "" if kind == ".pdf" and bare != name else kind


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").rpartition(".")[0]


def _decoded(path: Path, declared: Callable[[bytes], str | None] = lambda raw: None) -> str:
    """The file's text with \\n as line ends. declared: names another encoding where the file itself does."""
    with opened(path) as f:
        raw = f.read()
    encoding = "utf-8-sig"
    try:
        try:
            text = raw.decode(encoding)
        except UnicodeDecodeError:
            encoding = declared(raw) or encoding
            text = raw.decode(encoding)
    except UnicodeDecodeError as e:
        raise UserError(f"not {encoding.removesuffix('-sig')} (byte {raw[e.start]:#04x} at {e.start})") from e
    except (LookupError, ValueError) as e:  # UnicodeError: 'undefined', 'idna'; ValueError: a name with a zero byte
        raise UserError(f"it names the encoding {encoding!r}, which no text can be read by") from e
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _declared(raw: bytes) -> str | None:
    from bs4.dammit import EncodingDetector

    return EncodingDetector.find_declared_encoding(raw, is_html=True)
