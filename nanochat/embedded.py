"""Training text with no network and no files: an invented world, and the English every Python installation carries.

The English is the standard library's help topics (`pydoc_data.topics`) and its docstrings, read from source with `ast`
and never imported: about 2 MB. The world (nanochat/world.py) makes up the rest; real English stays at a third or less.
The same Python version gives the same bytes; another version ships other docstrings.
"""

import ast
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanochat import world
from nanochat.world import World

BYTES_PER_ENTITY = 1980  # measured: one article and 3.5 tales for each entity, seed 0
TALES_PER_ENTITY = 3.5  # restates each fact about five times in other words
MAX_ENGLISH = 1 / 3  # of all bytes
PIECE = 8_000  # characters of English in one document, cut at paragraphs
SKIP = {"idlelib", "lib2to3", "turtledemo", "tests", "test", "__pycache__", "pydoc_data", "antigravity", "this"}


def embedded_documents(megabytes: float, seed: int = 0) -> Iterator[str]:
    """About `megabytes` (10^6 bytes) of documents: English first, then the world's articles and tales."""
    budget, english = int(megabytes * 1e6), 0
    for text in _spread(list(english_documents()), MAX_ENGLISH * budget):
        english += len(text.encode())
        yield text
    n_entities = max(20, int((budget - english) / BYTES_PER_ENTITY))
    for document in World(seed, n_entities).documents(tales=int(TALES_PER_ENTITY * n_entities)):
        yield document.page


def recipe(megabytes: float, seed: int) -> dict[str, Any]:
    """What must be equal for two embedded data sets to be the same (on one Python version)."""
    return {"kind": "embedded", "megabytes": megabytes, "seed": seed, "world_version": world.VERSION}


def english_documents() -> Iterator[str]:
    """Help topics, then one document or more for each module of the standard library, in name order; none twice."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        print("note: this Python has no pydoc_data.topics; the English text is docstrings only", file=sys.stderr)
        topics = {}
    seen: set[str] = set()
    for name in sorted(topics):
        if topics[name] not in seen:  # a few topics have two names
            seen.add(topics[name])
            yield from _pieces(topics[name].strip().split("\n\n"))
    for path in _stdlib_files():
        yield from _pieces(list(_docstrings(path, seen)))


def _stdlib_files() -> Iterator[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for name in sorted(sys.stdlib_module_names - SKIP):
        file, package = root / f"{name}.py", root / name
        if file.is_file():
            yield file
        elif package.is_dir():
            inside = (p for p in package.rglob("*.py") if not SKIP & set(p.relative_to(root).parts))
            yield from sorted(inside, key=lambda p: p.relative_to(root).as_posix())


def _docstrings(path: Path, seen: set[str]) -> Iterator[str]:
    """The docstrings of one file in source order, each under the name of what it describes, none of them twice."""
    todo: list[tuple[str, ast.AST]] = [(path.stem, ast.parse(path.read_bytes()))]
    while todo:
        name, node = todo.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= 40 and text not in seen:
                seen.add(text)
                yield f"{name}\n{text}"
        children = [(getattr(c, "name", name), c) for c in getattr(node, "body", []) if isinstance(c, ast.stmt)]
        todo += reversed(children)


def _pieces(paragraphs: list[str]) -> Iterator[str]:
    """Paragraphs joined into documents of about PIECE characters; documents below 200 characters are dropped."""
    piece: list[str] = []
    for i, paragraph in enumerate(paragraphs):
        piece.append(paragraph)
        if sum(map(len, piece)) >= PIECE or i == len(paragraphs) - 1:
            text = "\n\n".join(piece).strip()
            if len(text) >= 200:
                yield text
            piece = []


def _spread(texts: list[str], limit: float) -> Iterator[str]:
    """All texts if they fit into `limit` bytes, else an even sample of them that does."""
    total = sum(len(t.encode()) for t in texts)
    share, owed = min(1.0, limit / max(total, 1)), 0.0
    for text in texts:
        owed += share
        if owed >= 1 - 1e-9:
            owed -= 1
            yield text
