"""rustbpe against oracles: BPE by its definition, published merges and encodings, tiktoken, regex, tokenizers."""

import base64
import gzip
import json
import random
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
import rustbpe
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.common import data_dir

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
R50K = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
HEAD, TAIL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{HEAD}*{TAIL}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{HEAD}+{TAIL}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = [rustbpe.DEFAULT_PATTERN, GPT2, R50K, CL100K, LLAMA3, O200K]
BYTES = [(bytes([b]), b) for b in range(256)]
# Any text, and text dense in the characters on which the patterns turn: quotes, digits, marks, cases, kinds of space.
TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.text(
    st.sampled_from("'sStTlLvVeErRdDmMxZ0²Ⅷ  \t\n\r\u0085\u00a0\u3000./!-_éÉſKǅʰªµ中ก\u0e49\u0301😀\u200d{@`[")
)
# Unicode 14, which Python 3.11 knows: newer characters may be unassigned in one library and letters in the next.
ASSIGNED = st.text(st.characters(exclude_categories=["Cs", "Cn"]))


def naive(texts: list[str], vocab_size: int) -> list[bytes]:
    """BPE by its definition: count every pair anew for each merge; ties go to the smaller ids."""
    words = Counter(tuple(p.encode()) for t in texts for p in regex.findall(rustbpe.DEFAULT_PATTERN, t))
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < vocab_size:
        pairs: Counter[tuple[int, int]] = Counter()
        for word, n in words.items():
            for pair in pairwise(word):
                pairs[pair] += n
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        words = Counter({replace(word, best, len(tokens)): n for word, n in words.items()})
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return tokens


def replace(word: tuple[int, ...], pair: tuple[int, int], new: int) -> tuple[int, ...]:
    out: list[int] = []
    for token in word:
        if out and (out[-1], token) == pair:
            out[-1] = new
        else:
            out.append(token)
    return tuple(out)


@cache
def corpus() -> tuple[str, ...]:
    """English that every Python carries."""
    return tuple(Path(m.__file__).read_text(encoding="utf-8") for m in (json, random, base64, regex) if m.__file__)


@cache
def own() -> list[tuple[bytes, int]]:
    return rustbpe.train(corpus(), 1500)


def oracle(ranks: list[tuple[bytes, int]], pattern: str) -> tiktoken.Encoding:
    return tiktoken.Encoding("oracle", pat_str=pattern, mergeable_ranks=dict(ranks), special_tokens={})


@cache
def published(name: str) -> tuple[list[tuple[bytes, int]], str]:
    """Ranks and pattern of a vocabulary in the data folder."""
    folder = data_dir()
    assert folder is not None
    with gzip.open(folder / f"tok/vocab/{name}.tiktoken.gz", "rt") as f:
        ranks = [(base64.b64decode(token), int(rank)) for token, rank in map(str.split, f)]
    return ranks, json.loads((folder / "tok/vocab/pattern_strings.json").read_text())[name]


def unspell(token: str) -> bytes:
    """Bytes of a token in GPT-2's spelling: printable Latin-1 stands for itself, other bytes for U+0100 onwards."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return bytes(ord(c) if ord(c) < 256 else hidden[ord(c) - 256] for c in token)


def rows(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as f:
        yield from map(json.loads, f)


# ---- training


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("ab' é\n1", max_size=30), max_size=12), st.integers(256, 300))
def test_merges_are_those_of_the_definition(texts: list[str], vocab_size: int):
    assert [t for t, _ in rustbpe.train(texts, vocab_size, threads=1)] == naive(texts, vocab_size)


def test_merges_on_real_text_are_those_of_the_definition():
    assert [t for t, _ in own()[:400]] == naive(list(corpus()), 400)


@settings(max_examples=30, deadline=None)
@given(st.lists(TEXTS, max_size=20), st.integers(1, 4), st.integers(0, 40))
def test_threads_and_batches_do_not_change_the_merges(texts: list[str], threads: int, buffer: int):
    assert rustbpe.train(texts, 320, threads=threads, buffer=buffer) == rustbpe.train(texts, 320, threads=1)


def test_any_iterator_gives_the_same_merges_as_a_list():
    assert rustbpe.train(iter(corpus()), 1500, threads=2, buffer=1000) == own()


@pytest.mark.data
def test_published_cs336_merges_are_reproduced(data: Path):
    case = next(rows(data / "tok/cases/cs336_bpe_training.json.gz"))
    expected = [unspell(line.replace(" ", "")) for line in case["merges"].splitlines()]
    special = "<|endoftext|>"  # takes one of the 500 places, and no piece crosses it
    tokens = rustbpe.train(case["corpus_en"].split(special), 499, pattern=GPT2, tie="greater_bytes")
    assert len(expected) == 243
    assert [t for t, _ in tokens[256:]] == expected


def test_fewer_tokens_come_back_when_no_pair_is_left():
    assert rustbpe.train(["ab ab"], 1000) == [*BYTES, (b"ab", 256), (b" ab", 257)]
    assert rustbpe.train([], 300) == BYTES


def test_no_piece_crosses_the_end_of_a_text():
    assert rustbpe.train(["a", "b"] * 5, 300) == BYTES


def test_ties_follow_the_named_rule():
    texts = ["ab", "cd"]
    assert rustbpe.train(texts, 257)[-1] == (b"ab", 256)
    assert rustbpe.train(texts, 257, tie="greater_bytes")[-1] == (b"cd", 256)


def test_merges_equal_those_of_tokenizers_while_there_are_no_ties():
    # tokenizers breaks ties by its own ids (bytes in the order of GPT-2's alphabet), so the comparison ends at the
    # first tie: from there on both are right and may differ for good.
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(GPT2), "isolated")
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, level])
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(
        corpus(), tokenizers.trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    )
    theirs = json.loads(model.to_str())["model"]["merges"]
    ours = [token for token, _ in rustbpe.train(corpus(), 600, pattern=GPT2)[256:]]
    greater = [token for token, _ in rustbpe.train(corpus(), 600, pattern=GPT2, tie="greater_bytes")[256:]]
    first_tie = next(i for i, (a, b) in enumerate(zip(ours, greater, strict=True)) if a != b)
    assert first_tie > 20
    assert [unspell(a + b) for a, b in theirs[:first_tie]] == ours[:first_tie]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texts": ["a"], "vocab_size": 255}, "vocab_size=255.*256 or more"),
        ({"texts": ["a"], "vocab_size": -1}, "256 or more"),
        ({"texts": ["a"], "vocab_size": 300, "pattern": "("}, "not a regex"),
        ({"texts": ["a"], "vocab_size": 300, "tie": "first"}, "pass 'smaller_ids' or 'greater_bytes'"),
        ({"texts": ["a", "\ud800"], "vocab_size": 300}, "replace lone surrogates"),
    ],
)
def test_bad_arguments_are_refused_with_a_cure(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        rustbpe.train(**arguments)


@pytest.mark.parametrize("texts", ["one str", [b"bytes"], [None]])
def test_what_is_not_text_is_refused(texts: Any):
    with pytest.raises(TypeError, match="str"):
        rustbpe.train(texts, 300)


def test_an_error_in_the_iterator_reaches_the_caller():
    def texts() -> Iterator[str]:
        yield "a"
        raise RuntimeError("shard is damaged")

    with pytest.raises(RuntimeError, match="shard is damaged"):
        rustbpe.train(texts(), 300)


# ---- splitting


@pytest.mark.parametrize("pattern", PATTERNS)
def test_known_patterns_run_natively(pattern: str):
    assert rustbpe.splitter(pattern) == "native"


@pytest.mark.parametrize(
    "pattern", [rustbpe.DEFAULT_PATTERN + "|", r"\w+|\W", rustbpe.DEFAULT_PATTERN.replace("L", "Lu")]
)
def test_other_patterns_run_on_the_regex_engine(pattern: str):
    assert rustbpe.splitter(pattern) == "regex"


@pytest.mark.parametrize("pattern", PATTERNS)
@settings(max_examples=200, deadline=None)
@given(text=ASSIGNED | TEXTS.filter(lambda t: t.isascii()))
def test_pieces_are_those_of_the_regex_module(pattern: str, text: str):
    assert rustbpe.split(text, pattern) == regex.findall(pattern, text)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_character_is_cut_as_tiktoken_cuts_it(pattern: str):
    # With one token for each short piece a difference in cutting shows up as a difference in ids.
    characters = [chr(c) for c in (*range(0xD800), *range(0xE000, 0x1_0000), *range(0x1_0000, 0x11_0000, 61))]
    text = "".join(f"a{c}{c} {c}1{c}'S\n{c}b" for c in characters)
    pieces = [text[i : i + 4000] for i in range(0, len(text), 4000)]
    ranks = cut_marks(pattern, pieces[::9])
    encoder, reference = rustbpe.Encoder(ranks, pattern), oracle(ranks, pattern)
    ids, offsets = encoder.encode_batch(pieces, threads=2)
    for i, expected in enumerate(reference.encode_ordinary_batch(pieces, num_threads=2)):
        assert ids[offsets[i] : offsets[i + 1]].tolist() == expected


def cut_marks(pattern: str, texts: list[str]) -> list[tuple[bytes, int]]:
    """A vocabulary in which the pieces of texts are tokens, whether or not merges lead to them."""
    pieces = {p.encode() for t in texts for p in rustbpe.split(t, pattern)} - {b for b, _ in BYTES}
    return [*BYTES, *((piece, 256 + i) for i, piece in enumerate(sorted(pieces)))]


# ---- encoding


@pytest.mark.parametrize("pattern", PATTERNS)
@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_ids_of_random_text_are_tiktokens(pattern: str, text: str):
    encoder, reference = both(pattern)
    assert encoder.encode(text) == reference.encode_ordinary(text)


@cache
def both(pattern: str) -> tuple[rustbpe.Encoder, tiktoken.Encoding]:
    return rustbpe.Encoder(own(), pattern), oracle(own(), pattern)


def test_a_pattern_that_leaves_gaps_encodes_as_in_tiktoken():
    pattern = r"\w+| +(?=x)"
    text = "one, two;  x\n\nthree"
    assert rustbpe.Encoder(own(), pattern).encode(text) == oracle(own(), pattern).encode_ordinary(text)


@pytest.mark.data
@pytest.mark.parametrize("name", ["r50k_base", "cl100k_base", "o200k_base"])
def test_published_encodings_are_reproduced(data: Path, name: str):
    encoder = rustbpe.Encoder(*published(name))
    cases = [
        (row["text"], row["ids"]) for row in rows(data / "tok/cases/testplans.jsonl.gz") if row["encoding"] == name
    ]
    cases += [(row["text"], row[name]) for row in rows(data / "tok/cases/oracle_encodings_dev.jsonl.gz")]
    if name != "cl100k_base":
        cases += [(row["text"], row["ids"]) for row in rows(data / f"tok/cases/jtokkit_{name}.jsonl.gz")]
    ids, offsets = encoder.encode_batch([text for text, _ in cases], threads=2)
    assert len(cases) > 400
    for i, (text, expected) in enumerate(cases):
        assert ids[offsets[i] : offsets[i + 1]].tolist() == expected, text


@pytest.mark.data
@pytest.mark.parametrize("name", ["r50k_base", "cl100k_base", "o200k_base", "own"])
def test_a_hundred_languages_encode_as_in_tiktoken(data: Path, name: str):
    ranks, pattern = (own(), rustbpe.DEFAULT_PATTERN) if name == "own" else published(name)
    texts = [row["text"] for row in rows(data / "text/udhr_multilingual.jsonl.gz")]
    texts += [row["text"] for row in rows(data / "tok/cases/blns.jsonl.gz")]
    ids, offsets = rustbpe.Encoder(ranks, pattern).encode_batch(texts, threads=2)
    for i, expected in enumerate(oracle(ranks, pattern).encode_ordinary_batch(texts, num_threads=2)):
        assert ids[offsets[i] : offsets[i + 1]].tolist() == expected


@settings(max_examples=40, deadline=None)
@given(st.lists(TEXTS, max_size=30), st.integers(1, 4))
def test_a_batch_is_its_texts_one_after_the_other(texts: list[str], threads: int):
    encoder, _ = both(rustbpe.DEFAULT_PATTERN)
    ids, offsets = encoder.encode_batch(texts, threads=threads)
    assert (ids.dtype, offsets.dtype, offsets[0], offsets[-1]) == (np.uint16, np.int64, 0, len(ids))
    assert [ids[a:b].tolist() for a, b in pairwise(offsets)] == [encoder.encode(t) for t in texts]


def test_threads_share_an_encoder_without_changing_the_ids():
    encoder = rustbpe.Encoder(own())
    texts = [line for text in corpus() for line in text.splitlines()] * 8
    once = encoder.encode_batch(texts)
    for threads in (2, 3, 1):
        assert all(np.array_equal(a, b) for a, b in zip(encoder.encode_batch(texts, threads), once, strict=True))


def test_the_word_cache_is_bounded_and_does_not_change_the_ids():
    # More different words than the cache keeps (3 * 2**17): it starts anew on the way.
    encoder, reference = rustbpe.Encoder(own()), oracle(own(), rustbpe.DEFAULT_PATTERN)
    draw = random.Random(0)
    text = " ".join("".join(draw.choices("abcdefgh", k=9)) for _ in range(420_000))
    assert encoder.encode_batch([text])[0].tolist() == encoder.encode_batch([text])[0].tolist()
    assert encoder.encode(text[-9999:]) == reference.encode_ordinary(text[-9999:])


@pytest.mark.parametrize("length", [1, 15, 16, 17, 127, 128, 129, 1000])
def test_long_pieces_take_the_other_way_to_the_same_ids(length: int):
    encoder, reference = both(rustbpe.DEFAULT_PATTERN)
    letters = "".join(filter(str.isalpha, corpus()[0]))[:length]
    for text in (letters, " " * length, "\n" * length, "=" * length, "é" * length):
        assert encoder.encode(text) == reference.encode_ordinary(text)


@pytest.mark.slow
def test_ten_million_letters_in_a_row_are_one_piece_and_no_trouble():
    # A merge that scans the whole piece each time would need hours.
    ranks = [*BYTES, *((b"a" * 2**i, 255 + i) for i in range(1, 9))]
    ids, _ = rustbpe.Encoder(ranks).encode_batch(["a" * 10_000_000])
    assert (ids == 263).sum() == 10_000_000 // 256
    assert len(ids) - 10_000_000 // 256 == 1  # the rest, 128 letters, is one token too


def test_training_on_one_long_piece_is_no_trouble():
    tokens = rustbpe.train(["a" * 3_000_000], 300)
    assert [t for t, _ in tokens[256:262]] == [b"a" * 2**i for i in range(1, 7)]


def test_ids_are_uint16_up_to_65535_and_uint32_above():
    for top, dtype in ((65535, np.uint16), (65536, np.uint32)):
        ids, _ = rustbpe.Encoder([*BYTES, (b"hi", top)]).encode_batch(["hi a"])
        assert (ids.dtype, ids.tolist()) == (dtype, [top, 32, 97])
        assert ids.flags.writeable and ids.flags.c_contiguous


def test_nothing_encodes_to_nothing():
    encoder = rustbpe.Encoder(BYTES)
    assert encoder.encode("") == []
    for texts in ([], [""], ["", ""]):
        ids, offsets = encoder.encode_batch(texts, threads=2)
        assert (ids.tolist(), offsets.tolist()) == ([], [0] * (len(texts) + 1))


def test_lone_surrogates_are_refused_with_a_cure():
    encoder = rustbpe.Encoder(BYTES)
    for call in (lambda: encoder.encode("a\ud800b"), lambda: encoder.encode_batch(["fine", "\udfff"])):
        with pytest.raises(ValueError, match="replace lone surrogates") as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (BYTES[1:], "no token for byte 0x00"),
        ([*BYTES, (b"a", 256)], "occurs twice"),
        ([*BYTES, (b"ab", 97)], "two tokens have rank 97"),
        ([*BYTES, (b"", 256)], "tokens have bytes"),
    ],
)
def test_a_broken_vocabulary_is_refused(ranks: list[tuple[bytes, int]], message: str):
    with pytest.raises(ValueError, match=message):
        rustbpe.Encoder(ranks)
