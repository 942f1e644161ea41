"""Cut a text into chunks of so many tokens at the ends of sentences, by offsets: text[start:end] is the chunk.

A token is a word, or one mark; a word counts once per 20 letters, and an ideograph or kana counts by itself. That is
near what a trained tokenizer makes of English, needs none, and gives the same chunks on every machine.
"""

import bisect
import re

from nanochat.config import UserError

CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
TOKEN = re.compile(rf"[^\W{CJK}]{{1,20}}|[{CJK}]|[^\w\s]")
END = re.compile(  # marks that end a sentence with what closes it, or an empty line; each pattern is linear in the text
    r"(?<![.!?…])[.!?…]++[\"'”’»)\]]*+\s++|[。！？｡]++[」』”’）]*+\s*+|\n[^\S\n]*+\n\s*+"
)
NOT_AN_END = re.compile(
    r"(?:^|[\s(])(?:[A-Z]|[Ee]\.g|[Ii]\.e|Mrs?|Ms|Drs?|Profs?|St|Sr|Jr|vs|cf|No|Nos|Figs?|Eqs?|pp|approx|al|ca)$"
)

Span = tuple[int, int]


def count_tokens(text: str) -> int:
    return sum(1 for _ in TOKEN.finditer(text))


def sentences(text: str) -> list[Span]:
    """Spans that follow each other without a gap; white space belongs to the sentence before it."""
    starts = [0]
    for mark in END.finditer(text):
        if mark.end() < len(text) and not _abbreviated(text, mark):
            starts.append(mark.end())
    return list(zip(starts, [*starts[1:], len(text)], strict=True)) if text else []


def _abbreviated(text: str, mark: re.Match[str]) -> bool:
    """Whether the mark is the point after a name's initial or a short form."""
    if mark[0].strip() != ".":
        return False
    return bool(NOT_AN_END.search(text[max(0, mark.start() - 8) : mark.start()]))


def chunk_spans(text: str, chunk_tokens: int, chunk_overlap: int = 0) -> list[Span]:
    """Chunks of at most `chunk_tokens` tokens, in order; every character but white space lies in at least one.

    Whole sentences are packed; one that is longer is cut between words. A chunk begins with the last sentences of the
    one before it, as many as have at most `chunk_overlap` tokens together. chunk_tokens=0: the whole text.
    """
    check_chunking(chunk_tokens, chunk_overlap)
    if chunk_tokens == 0:
        return [(0, len(text))] if text.strip() else []
    tokens = [match.start() for match in TOKEN.finditer(text)]
    pieces = [piece for s in sentences(text) for piece in _cut(text, s, tokens, chunk_tokens)]
    sizes = [bisect.bisect_left(tokens, end) - bisect.bisect_left(tokens, start) for start, end in pieces]
    return [_strip(text, pieces[i][0], pieces[j - 1][1]) for i, j in _pack(sizes, chunk_tokens, chunk_overlap)]


def check_chunking(chunk_tokens: int, chunk_overlap: int) -> None:
    if chunk_tokens < 0 or chunk_overlap < 0:
        raise UserError(f"chunk_tokens={chunk_tokens}, chunk_overlap={chunk_overlap}: both are 0 or more")
    if chunk_overlap and chunk_overlap >= chunk_tokens:
        raise UserError(f"chunk_overlap={chunk_overlap} must be less than chunk_tokens={chunk_tokens}")


def _cut(text: str, sentence: Span, tokens: list[int], limit: int) -> list[Span]:
    """A sentence as pieces of at most `limit` tokens, cut after white space where there is some."""
    start, end = sentence
    pieces = []
    first, last = bisect.bisect_left(tokens, start), bisect.bisect_left(tokens, end)
    while last - first > limit:
        cut = first + limit
        while cut > first and not text[tokens[cut] - 1].isspace():
            cut -= 1
        first = cut if cut > first else first + limit
        pieces.append((start, tokens[first]))
        start = tokens[first]
    return [*pieces, (start, end)] if last > first else pieces


def _pack(sizes: list[int], limit: int, overlap: int) -> list[Span]:
    """Pieces i to j - 1 make a chunk. Each chunk holds a piece that the one before it does not."""
    chunks = []
    begin, total = 0, 0
    for j, size in enumerate(sizes):
        if total + size > limit:
            chunks.append((begin, j))
            begin, total = j, 0
            while begin > chunks[-1][0] + 1 and total + sizes[begin - 1] <= min(overlap, limit - size):
                begin -= 1
                total += sizes[begin]
        total += size
    return [*chunks, (begin, len(sizes))] if sizes else chunks


def _strip(text: str, start: int, end: int) -> Span:
    while text[start].isspace():
        start += 1
    while text[end - 1].isspace():
        end -= 1
    return start, end
