"""Chunks: exact offsets, nothing lost, no chunk too long, whole sentences where they fit."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.config import UserError
from nanochat.retrieval.chunking import chunk_spans, count_tokens, sentences

PARTS = [
    "word",
    "a",
    " ",
    "  ",
    "\n",
    "\n\n",
    ".",
    "...",
    "!",
    "? ",
    '." ',
    "Dr. ",
    "e.g. ",
    "日本語",
    "。",
    "é",
    "x" * 50,
]
texts = st.one_of(st.text(max_size=300), st.lists(st.sampled_from(PARTS), max_size=120).map("".join))
STORY = (
    "Ada met Dr. Lovelace in London. They spoke of engines, e.g. the analytical one! "
    '"Will it think?" she asked. J. S. Bach would have laughed... but he was dead.\n\nA new day began.'
)


@settings(max_examples=300, deadline=None)
@given(texts, st.integers(1, 30), st.integers(0, 29))
def test_nothing_is_lost_and_no_chunk_is_too_long(text: str, chunk_tokens: int, overlap: int) -> None:
    spans = chunk_spans(text, chunk_tokens, min(overlap, chunk_tokens - 1))
    covered = {i for start, end in spans for i in range(start, end)}
    assert covered >= {i for i, c in enumerate(text) if not c.isspace()}
    for start, end in spans:
        assert 0 <= start < end <= len(text)
        assert text[start:end] == text[start:end].strip()
        assert count_tokens(text[start:end]) <= chunk_tokens
    assert spans == sorted(spans)
    assert len({end for _, end in spans}) == len(spans), "a chunk lies within another"


@settings(max_examples=200, deadline=None)
@given(texts, st.integers(2, 30), st.integers(0, 29))
def test_neighbours_share_at_most_the_overlap(text: str, chunk_tokens: int, overlap: int) -> None:
    overlap = min(overlap, chunk_tokens - 1)
    spans = chunk_spans(text, chunk_tokens, overlap)
    for (_, end), (start, _) in itertools.pairwise(spans):
        assert count_tokens(text[start : max(start, end)]) <= overlap


@settings(max_examples=200, deadline=None)
@given(texts)
def test_sentences_follow_each_other_without_a_gap(text: str) -> None:
    spans = sentences(text)
    assert "".join(text[start:end] for start, end in spans) == text
    assert all(start < end for start, end in spans)


def test_sentences_end_at_marks_but_not_at_short_forms_and_initials() -> None:
    assert [STORY[start:end].strip() for start, end in sentences(STORY)] == [
        "Ada met Dr. Lovelace in London.",
        "They spoke of engines, e.g. the analytical one!",
        '"Will it think?"',
        "she asked.",
        "J. S. Bach would have laughed...",
        "but he was dead.",
        "A new day began.",
    ]


def test_chunks_are_whole_sentences_and_begin_with_the_last_of_the_one_before() -> None:
    text = "One two three. Four five six. Seven eight nine. Ten eleven twelve."
    assert [text[s:e] for s, e in chunk_spans(text, 8)] == [text[:29], text[30:]]
    assert [text[s:e] for s, e in chunk_spans(text, 8, 4)] == [text[:29], text[15:47], text[30:]]
    assert [text[s:e] for s, e in chunk_spans(text, 8, 3)] == [text[:29], text[30:]]  # no sentence is that short


def test_a_sentence_that_is_too_long_is_cut_between_words() -> None:
    text = "don't stop now and never ever look back at what we've left"
    chunks = [text[s:e] for s, e in chunk_spans(text, 5)]
    assert " ".join(chunks) == text
    assert max(map(count_tokens, chunks)) <= 5


def test_words_marks_and_ideographs_count() -> None:
    assert count_tokens("It's 3.14, naïve!") == 9
    assert count_tokens("機械 学習です") == 6
    assert count_tokens("a" * 41) == 3
    assert count_tokens(" \n\t") == 0


@pytest.mark.parametrize("unit", ["word ", "x", ".", "a.", ".)", "\n", "\n ", "日", "? ", "-"])
def test_a_line_of_a_megabyte_is_cut(unit: str) -> None:
    text = unit * (300_000 // len(unit))
    spans = chunk_spans(text, 256, 32)
    assert sum(end - start for start, end in spans) >= len(text.replace("\n", "").replace(" ", ""))


def test_whole_documents_are_one_chunk() -> None:
    assert chunk_spans(" a b ", 0) == [(0, 5)]
    assert chunk_spans("", 0) == chunk_spans(" \n", 7) == []


@pytest.mark.parametrize(("tokens", "overlap"), [(-1, 0), (5, -1), (5, 5), (0, 1)])
def test_sizes_that_cannot_be_are_refused(tokens: int, overlap: int) -> None:
    with pytest.raises(UserError, match="chunk_"):
        chunk_spans("text", tokens, overlap)
