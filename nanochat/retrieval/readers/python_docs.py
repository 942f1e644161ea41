"""Python's own documentation as documents and questions: what `pydoc` shows of the standard library, with no files.

    item = next(python_items(Reading(listing)))    # Document("python/os.path.join", ...), then its Question

A question ("What does os.path.join do?") is answered by the first sentence of the docstring. Another Python version
gives other text.
"""

import importlib
import inspect
import re
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from nanochat.retrieval.document import Document
from nanochat.retrieval.readers.reading import Question, Reading, question_row

MODULES = """
    abc argparse array ast base64 bisect builtins bz2 calendar cmath codecs collections configparser contextlib copy csv
    dataclasses datetime decimal difflib email enum fileinput fnmatch fractions functools gc getpass glob gzip hashlib
    heapq hmac html http.client inspect io ipaddress itertools json keyword linecache locale logging lzma mailbox math
    mimetypes multiprocessing numbers operator os os.path pathlib pickle pkgutil platform plistlib pprint queue random
    re sched secrets select selectors shelve shlex shutil signal socket sqlite3 ssl stat statistics string struct
    subprocess sys tarfile tempfile textwrap threading time timeit tokenize traceback types typing unicodedata unittest
    urllib.parse urllib.request uuid warnings wave weakref xml.etree.ElementTree zipfile zlib""".split()  # noqa: SIM905
SHORTEST = 20  # characters: a shorter answer or docstring says nothing
LONGEST = 200  # characters of an answer; longer sentences are documents without a question


def python_items(reading: Reading) -> Iterator[Document | Question]:
    """Modules, then their public functions and classes with the public methods; equal docstrings once."""
    seen: set[str] = set()
    for title, thing in _things(reading):
        text = _docstring(thing)
        if len(text) < SHORTEST or text in seen:
            continue
        seen.add(text)
        document = Document(f"python/{title}", f"{_signature(title, thing)}{text}", title)
        yield from reading.document(document)
        answer = first_sentence(text)
        if answer:
            row = question_row(document.id, _wording(title, thing), [answer], [document.id], kind="python")
            yield from reading.question(Question(row, document.id, 0))


def first_sentence(text: str) -> str:
    """The first sentence of a docstring on one line, or "" where it does not begin with one of SHORTEST to LONGEST.

    A first line that repeats the signature, as many functions written in C have, is passed over.
    """
    lines = text.split("\n")
    while lines and (re.match(r"[\w.]+\(", lines[0]) or not lines[0].strip()):
        lines.pop(0)
    paragraph = " ".join("\n".join(lines).split("\n\n")[0].split())
    found = re.match(r"[A-Z].+?\.(?<!e\.g\.)(?<!i\.e\.)(?<!\beg\.)(?<!\betc\.)(?=\s|$)", paragraph)
    return found[0] if found and SHORTEST <= len(found[0]) <= LONGEST else ""


def _things(reading: Reading) -> Iterator[tuple[str, Any]]:
    """(dotted name, object): each module before what is in it, in the order of names."""
    for module in MODULES:
        try:
            top = importlib.import_module(module)
        except ImportError:  # built without ssl or sqlite3
            reading.notes[f"modules this Python lacks: {module}"] += 1
            continue
        yield module, top
        for name in sorted(getattr(top, "__all__", [n for n in vars(top) if not n.startswith("_")])):
            with warnings.catch_warnings(action="ignore"):  # names that are about to go
                thing = getattr(top, name, None)
            if not (inspect.isclass(thing) or inspect.isroutine(thing)):
                continue
            title = f"{module}.{name}".removeprefix("builtins.")
            yield title, thing
            if inspect.isclass(thing) and not issubclass(thing, BaseException):
                yield from ((f"{title}.{m}", vars(thing)[m]) for m in sorted(vars(thing)) if not m.startswith("_"))


def _docstring(thing: Any) -> str:
    """Its own docstring: none that is inherited, and not that of the type of a plain value."""
    if isinstance(thing, staticmethod | classmethod):
        thing = thing.__func__
    if not isinstance(thing, ModuleType | type | property) and not inspect.isroutine(thing):
        return ""
    text = thing.__doc__
    return inspect.cleandoc(text) if isinstance(text, str) else ""


def _signature(title: str, thing: Any) -> str:
    """A line, or "" where there is none, or one that changes from run to run (an address)."""
    try:
        line = f"{title}{inspect.signature(thing)}\n" if inspect.isroutine(thing) else ""
    except (ValueError, TypeError):  # written in C without one
        return ""
    return "" if " at 0x" in line else line


def _wording(title: str, thing: Any) -> str:
    if isinstance(thing, ModuleType):
        return f"What is the module {title} for?"
    return f"What is {title}?" if isinstance(thing, type | property) else f"What does {title} do?"
