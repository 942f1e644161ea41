import base64
import gzip
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.common import data_dir
from nanochat.config import UserError
from nanochat.tokenizer import LONG_TEXT, SPECIAL_TOKENS, Tokenizer

DATA = data_dir()
CORPUS = [
    Path(json.__file__).read_text(encoding="utf-8"),
    "The quick brown fox jumps over the lazy dog. Überraschung: 12345 Äpfel, 你好，世界 🌍🌍 naïve café.\r\n\t" * 20,
]
ANY_TEXT = st.text(
    st.characters(exclude_categories=())
)  # surrogates, unassigned code points and control characters too
NASTY = [
    "",
    " ",
    "\0",
    "\ud800",
    "x\udfff y",
    "\ud83d\ude00",
    "\udc00\ud800",
    "e\u0301",
    "\ufeffa",
    "\r\n\r",
    "a" * 9999,
]


@cache
def tok() -> Tokenizer:
    return Tokenizer.train(CORPUS, vocab_size=600, threads=1)


@cache
def published(name: str) -> Tokenizer:
    assert DATA is not None
    with gzip.open(DATA / f"tok/vocab/{name}.tiktoken.gz", "rt") as f:
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in f)}
    return Tokenizer.from_ranks(ranks, json.loads((DATA / "tok/vocab/pattern_strings.json").read_text())[name])


def cases(name: str) -> list[dict]:
    assert DATA is not None
    with gzip.open(DATA / "tok/cases" / name, "rt", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


# encoding


@pytest.mark.data
@pytest.mark.parametrize(
    ("file", "vocabulary"),
    [
        ("jtokkit_r50k_base.jsonl.gz", "r50k_base"),
        ("jtokkit_o200k_base.jsonl.gz", "o200k_base"),
        ("testplans.jsonl.gz", "r50k_base"),  # the p50k rows need a vocabulary that is not in the folder
        ("oracle_encodings_dev.jsonl.gz", "r50k_base"),
        ("oracle_encodings_dev.jsonl.gz", "cl100k_base"),
        ("oracle_encodings_dev.jsonl.gz", "o200k_base"),
    ],
)
def test_encoding_equals_published_cases(file, vocabulary):
    rows = [r for r in cases(file) if r.get("encoding", vocabulary) == vocabulary]
    texts, expected = [r["text"] for r in rows], [r.get("ids", r.get(vocabulary)) for r in rows]
    assert len(rows) >= 64
    assert [published(vocabulary).encode(t) for t in texts] == expected  # tiktoken
    assert published(vocabulary).encode(texts) == expected  # rustbpe
    assert [published(vocabulary).decode(ids) for ids in expected] == texts


@given(st.lists(ANY_TEXT, max_size=5))
@settings(max_examples=300, deadline=None)
def test_list_and_single_encoding_agree_and_round_trip(texts):
    ids = tok().encode(texts)
    assert ids == [tok().encode(t) for t in texts]
    assert [tok().decode(i) for i in ids] == texts
    flat, offsets = tok().encode_array(texts)
    assert flat.tolist() == [i for row in ids for i in row]
    assert offsets.tolist() == np.cumsum([0] + [len(row) for row in ids]).tolist()


@pytest.mark.data
@pytest.mark.parametrize("name", ["r50k_base", "cl100k_base", "o200k_base"])
@given(text=ANY_TEXT)
@settings(deadline=None)
def test_rust_and_tiktoken_agree_on_published_vocabularies(name, text):
    ids = published(name).encode(text)
    assert published(name).encode([text]) == [ids]
    assert published(name).decode(ids) == text


def test_long_text_agrees_with_tiktoken():
    text = CORPUS[0] * (3 * LONG_TEXT // len(CORPUS[0]))
    assert len(text) > LONG_TEXT
    assert tok().encode(text) == tok()._tiktoken.encode_ordinary(text)


@pytest.mark.parametrize("text", NASTY)
def test_nasty_text_round_trips(text):
    ids = tok().encode(text)
    assert tok().decode(ids) == text
    assert tok().decode_bytes(ids) == text.encode("utf-8", "surrogatepass")
    assert tok().encode([text, text]) == [ids, ids]


@pytest.mark.parametrize("letter", ["a", *(pytest.param(c, marks=pytest.mark.slow) for c in " \n!7é\ud800")])
def test_ten_megabytes_of_one_letter_round_trip(letter):
    text = letter * (10_000_000 // len(letter.encode("utf-8", "surrogatepass")))
    assert tok().decode(tok().encode(text)) == text


def test_decode_can_leave_surrogates_out():
    ids = tok().encode("a\ud800b")
    assert tok().decode(ids, errors="replace").isprintable()
    assert "\ud800" not in tok().decode(ids, errors="replace")
    assert tok().decode([0xC3]) == "\ufffd"  # byte tokens come first, in byte order


@given(st.lists(st.integers(0, 599)))
def test_any_ids_decode(ids):
    assert tok().decode_bytes(ids) == b"".join(tok().decode_bytes([i]) for i in ids)
    tok().decode(ids, errors="replace").encode("utf-8")


@pytest.mark.parametrize("bad", [600, -1, 2**40])
def test_unknown_id_is_an_error(bad):
    assert tok().vocab_size == 600
    with pytest.raises(ValueError, match=f"id {bad} is outside the vocabulary"):
        tok().decode([5, bad])


def test_encode_refuses_what_is_no_text():
    for bad in (b"bytes", ["a", 5], ["a", None]):
        with pytest.raises(TypeError):
            tok().encode(bad)


def test_prepend_and_append_take_ids_and_names():
    bos, end = tok().bos_id, tok().encode_special("<|user_end|>")
    assert tok().encode("ab", prepend="<|bos|>", append=end) == [bos, *tok().encode("ab"), end]
    assert tok().encode(["", "ab"], prepend=bos) == [[bos], [bos, *tok().encode("ab")]]
    with pytest.raises(ValueError, match="not a special token"):
        tok().encode("ab", prepend="<|eos|>")


def test_special_tokens_follow_the_merges_in_nanochat_order():
    assert [tok().encode_special(s) for s in SPECIAL_TOKENS] == list(range(600 - 18, 600))
    assert SPECIAL_TOKENS[:3] == ["<|bos|>", "<|user_start|>", "<|user_end|>"]
    assert SPECIAL_TOKENS[7:9] == ["<|output_start|>", "<|output_end|>"]
    assert tok().bos_id == 582


@pytest.mark.parametrize("name", SPECIAL_TOKENS)
def test_text_that_spells_a_special_token_is_plain_text(name):
    first_special = tok().bos_id
    for text in (name, f"x{name}{name} y"):
        for ids in (tok().encode(text), tok().encode([text])[0], tok().encode(text * 10_000)):
            assert max(ids) < first_special
    assert tok().decode([tok().encode_special(name)]) == name


@given(ANY_TEXT)
def test_token_bytes_add_up_to_the_text(text):
    sizes = tok().token_bytes
    assert sizes.dtype == np.int32
    assert sizes.shape == (600,)
    assert not sizes[-18:].any()
    assert sizes[tok().encode(text)].sum() == len(text.encode("utf-8", "surrogatepass"))


# training, saving, loading


def test_vocab_size_counts_special_tokens_and_is_checked():
    smallest = Tokenizer.train(["aaaa"], vocab_size=274)
    assert smallest.vocab_size == 274
    assert smallest.encode("aa") == [smallest.encode("a")[0]] * 2
    assert Tokenizer.train(["ab"], vocab_size=5000).vocab_size == 275  # one pair to merge
    for bad in (0, 273, 2**32, -5):
        with pytest.raises(UserError, match=f"vocab_size={bad}"):
            Tokenizer.train(["ab"], vocab_size=bad)
    with pytest.raises(TypeError, match=r"pass \[text\]"):
        Tokenizer.train("ab", vocab_size=300)


def test_training_takes_broken_surrogates():
    assert Tokenizer.train(["ab\ud800ab"], vocab_size=275).decode_bytes([256]) == b"ab"


def test_save_and_load_give_the_same_tokenizer(tmp_path):
    path = tok().save(tmp_path / "new" / "folder")
    again = Tokenizer.load(path.parent)
    assert again.hash == tok().hash
    assert again.encode(CORPUS) == tok().encode(CORPUS)
    assert again.special_ids == tok().special_ids
    assert [p.name for p in path.parent.iterdir()] == ["tokenizer.json"]


def test_load_reads_the_base_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"python -m scripts\.tok_train"):
        Tokenizer.load()
    tok().save(tmp_path / "tokenizer")
    assert Tokenizer.load().hash == tok().hash


def _swap_two_tokens(data: dict) -> None:
    tokens = data["tokens"]
    tokens[300], tokens[301] = tokens[301], tokens[300]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_swap_two_tokens, "sha256"),
        (lambda d: d.update(pattern=r"\S+|\s+"), "sha256"),
        (lambda d: d["special_tokens"].append("<|new|>"), "sha256"),
        (lambda d: d["tokens"].pop(0), "damaged"),
        (lambda d: d["tokens"].__setitem__(270, "?"), "damaged"),
        (lambda d: d.pop("sha256"), "damaged"),
        (lambda d: d.update(tokens=None), "damaged"),
        (lambda d: d.update(pattern="("), "damaged"),
        (lambda d: d.update(format=2), "format 2"),
    ],
)
def test_damaged_file_is_refused_in_one_line(tmp_path, damage, message):
    path = tok().save(tmp_path)
    data = json.loads(path.read_text())
    damage(data)
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=message) as error:
        Tokenizer.load(tmp_path)
    assert str(path) in str(error.value)
    assert "tok_train" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "[]", '{"format": 1, "tok', "\udcff"])
def test_file_that_is_no_tokenizer_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
