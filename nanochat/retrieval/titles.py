"""Names in a text: titles of the knowledge base that it mentions, and other runs of capitalised words.

Works for scripts that have capitals. In a text all in lower case, only titles of two words and more are seen.
"""

import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

MAX_TITLE = 16  # words; a longer title is never found in a text
FAN = 8  # chunks a name may stand for; one of more, as where every paragraph has its article's title, tells nothing
_WORD = re.compile(r"[^\W_]+")
_ASIDE = re.compile(r"\s*\([^)]*\)\s*$")  # "Mercury (planet)" is called Mercury
STOP_WORDS = frozenset(
    """a an and are as at be both but by did do does first for from had has have he her his how if in into is it its me
    my no not of on or our s same she so t than that the their them then there these they this those to was we were what
    when where which while who whom whose why will with you your""".split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Page:
    """A text cut into words: runs of letters and digits, in lower case."""

    text: str

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        return [m.span() for m in _WORD.finditer(self.text)]

    @cached_property
    def words(self) -> list[str]:
        return [self.text[start:end].lower() for start, end in self.spans]

    @cached_property
    def roots(self) -> list[str]:
        return [root(word) for word in self.words]

    @cached_property
    def root_set(self) -> frozenset[str]:
        return frozenset(self.roots)

    def text_of(self, name: "Name") -> str:
        return self.text[self.spans[name.start][0] : self.spans[name.end - 1][1]]


@dataclass(frozen=True)
class Name:
    """Words [start, end) of a page. ids: chunks with that title, none where the base has none or more than FAN."""

    start: int
    end: int
    ids: tuple[int, ...] = ()


def root(word: str) -> str:
    """Five letters, so that "director" meets "directed", and "composer" "composed": Snowball's stems differ."""
    return word[:5]


class Titles:
    """Chunk ids by title, in 16 bytes a title: sorted hashes, not strings. Made for the process, not for a file."""

    def __init__(self, titles: Iterable[str]) -> None:
        hashes, owners = array("q"), array("q")
        for id, title in enumerate(titles):
            for name in {title, _ASIDE.sub("", title)}:
                words = Page(name).words
                if len(words) <= MAX_TITLE and not STOP_WORDS.issuperset(words):
                    hashes.append(hash(" ".join(words)))
                    owners.append(id)
        order = np.argsort(np.array(hashes, np.int64), kind="stable")  # chunk ids of one title stay in order
        self.hashes = np.array(hashes, np.int64)[order]
        self.owners = np.array(owners, np.int64)[order]

    def names(self, page: Page) -> list[Name]:
        """Titles in the page, each as long as possible, from left to right without overlap."""
        starts = [i for i in range(len(page.words)) if page.text[page.spans[i][0]].isupper() or self._begins(page, i)]
        spans = [(i, j) for i in starts for j in range(min(i + MAX_TITLE, len(page.words)), i, -1)]
        keys = np.array([hash(" ".join(page.words[i:j])) for i, j in spans], np.int64)
        first = np.searchsorted(self.hashes, keys)
        last = np.searchsorted(self.hashes, keys, side="right")
        found, free = [], 0
        for (i, j), a, b in zip(spans, first.tolist(), last.tolist(), strict=True):
            if a < b and i >= free and (j - i > 1 or page.text[page.spans[i][0]].isupper()):
                found.append(Name(i, j, tuple(self.owners[a:b].tolist()) if b - a <= FAN else ()))
                free = j
        return found

    @staticmethod
    def _begins(page: Page, i: int) -> bool:
        """May a title begin here without a capital: with a number, or in a text that has none."""
        return page.text.islower() or page.text[page.spans[i][0]].isdigit()


def capitalised(page: Page, taken: Sequence[Name]) -> list[Name]:
    """Runs of capitalised words outside `taken`: "Anna-Maria Keil", "J. S. Bach"."""
    used = {i for name in taken for i in range(name.start, name.end)}
    fits = [
        i not in used and page.text[start].isupper() and (len(page.words[i]) == 1 or page.words[i] not in STOP_WORDS)
        for i, (start, _) in enumerate(page.spans)
    ]
    names, i = [], 0
    while i < len(fits):
        j = i
        while j < len(fits) and fits[j] and (j == i or _joined(page, j)):
            j += 1
        if j > i:
            names.append(Name(i, j))
        i = max(j, i + 1)
    return names


def _joined(page: Page, i: int) -> bool:
    """Do words i - 1 and i belong to one name: a space or a hyphen between, or a point after one or two letters."""
    between = page.text[page.spans[i - 1][1] : page.spans[i][0]]
    return between in (" ", "-") or (between == ". " and len(page.words[i - 1]) <= 2)
