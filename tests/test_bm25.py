"""BM25 against rank-bm25, bm25s and the formula; shortcuts, segments, threads and batches against the slow way."""

import gzip
import json
import math
import random
import re
import weakref
from collections import Counter
from pathlib import Path

import bm25s
import numpy as np
import pytest
import rustbpe
import Stemmer
from bm25s.stopwords import STOPWORDS_EN
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_bm25 import BM25Okapi

from nanochat.common import data_dir
from nanochat.config import UserError
from nanochat.retrieval.bm25 import FILE, Bm25Index, Bm25Retriever
from nanochat.retrieval.contract import NO_HIT
from nanochat.retrieval.metrics import ndcg_at_k

PLAIN = {"stem": False, "stop_words": False}


class Segments:
    """A Base with a BM25 index, its texts in as many segments as given."""

    def __init__(self, folder: Path, segments: list[list[str]], **options) -> None:
        self.n_chunks, self.folder, self.n = sum(map(len, segments)), folder, len(segments)
        self.kept = Bm25Index.prepare([], folder, options)
        self.about = []
        for i, texts in enumerate(segments):
            (folder / f"segment{i}").mkdir(parents=True, exist_ok=True)
            self.about.append(Bm25Index.build(iter(texts), folder / f"segment{i}", folder, self.kept))

    def folders(self, index):
        return [self.folder / f"segment{i}" for i in range(self.n)]

    def options(self, index):
        return self.kept


def words(seed: int, n: int, longest: int, vocabulary: int) -> list[str]:
    """n texts with frequent and rare words."""
    rng = random.Random(seed)
    return [
        " ".join(f"w{int(vocabulary * rng.random() ** 3)}" for _ in range(rng.randint(0, longest))) for _ in range(n)
    ]


def retriever(folder: Path, segments: list[list[str]], search: dict | None = None, **options) -> Bm25Retriever:
    return Bm25Retriever(Segments(folder, segments, **PLAIN | options), search)


def best(scores: np.ndarray, k: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """What a search must give, from the scores of all texts."""
    hits = np.flatnonzero((scores > 0) & (True if allowed is None else allowed))
    hits = hits[np.argsort(-scores[hits], kind="stable")][:k]
    ids, found = np.full(k, NO_HIT), np.full(k, -np.inf, np.float32)
    ids[: len(hits)], found[: len(hits)] = hits, scores[hits]
    return ids, found


# ---- oracles ----


@pytest.mark.parametrize("method", ["lucene", "robertson", "atire"])
@pytest.mark.parametrize(("k1", "b"), [(1.5, 0.75), (0.9, 0.4), (2.0, 0.0)])
def test_scores_equal_bm25s(tmp_path, method, k1, b):
    texts = words(1, 400, 60, 300)
    oracle = bm25s.BM25(method=method, k1=k1, b=b)
    oracle.index([t.split() for t in texts], show_progress=False)
    ours = retriever(tmp_path, [texts], variant=method, k1=k1, b=b).index
    for query in words(2, 20, 8, 300):
        known = [word for word in query.split() if word in oracle.vocab_dict]
        expected = oracle.get_scores(known) if known else np.zeros(len(texts))
        np.testing.assert_allclose(ours.scores(query), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("k1", "b"), [(1.5, 0.75), (0.9, 0.4)])
def test_okapi_scores_equal_rank_bm25(tmp_path, k1, b):
    texts = [f"{text} w0" if i % 3 else text for i, text in enumerate(words(3, 300, 40, 80))]
    oracle = BM25Okapi([t.split() for t in texts], k1=k1, b=b)
    assert oracle.idf["w0"] == oracle.epsilon * oracle.average_idf > 0, "w0 is in more than half of the texts"
    ours = retriever(tmp_path, [texts[:50], texts[50:]], variant="okapi", k1=k1, b=b).index
    for query in ["w0", *words(4, 20, 8, 80)]:
        np.testing.assert_allclose(ours.scores(query), oracle.get_scores(query.split()), rtol=1e-5, atol=1e-5)


def test_scores_equal_the_formula(tmp_path):
    texts = [*words(5, 200, 30, 50), "w1 " * 70_000]  # a frequency beyond 16 bits
    counts = [Counter(t.split()) for t in texts]
    lengths = np.array([c.total() for c in counts])
    ours = retriever(tmp_path, [texts])
    for query in words(6, 20, 6, 60):
        expected = np.zeros(len(texts))
        for word in query.split():
            tf = np.array([min(c[word], 65_535) for c in counts])
            df = (tf > 0).sum()
            idf = math.log(1 + (len(texts) - df + 0.5) / (df + 0.5))
            expected += idf * tf / (tf + 1.5 * (0.25 + 0.75 * lengths / lengths.mean()))
        np.testing.assert_allclose(ours.index.scores(query), expected, rtol=2e-6)


TEXTS = [
    "The Runners' cats were running_fast in 1999: I am a x",
    "Größe, ΟΔΟΣ and Привет; 東京タワー 東 – naïve İstanbul",
    "e-mail\tfoo.bar\nA.B. 3.14 c++ __init__ don't",
    "",
]


def test_terms_are_those_of_bm25s():
    pattern = re.compile(r"(?u)\b\w\w+\b")
    plain = [pattern.findall(text.lower()) for text in TEXTS]
    assert rustbpe.terms(TEXTS, False, False) == plain
    kept = [[word for word in text if word not in STOPWORDS_EN] for text in plain]
    assert rustbpe.terms(TEXTS, False, True) == kept
    assert rustbpe.terms(TEXTS, True, True) == [Stemmer.Stemmer("english").stemWords(text) for text in kept]
    assert rustbpe.terms(list(STOPWORDS_EN), False, True) == [[]] * 33


@pytest.mark.data
def test_stems_are_those_of_pystemmer():
    with gzip.open(data_dir() / "tok" / "words_alpha.txt.gz", "rt") as f:
        words = f.read().split()
    words = [word for word in words if len(word) > 1] + [
        "größeres",
        "naïvely",
        "élans",
        "x1s",
        "__init__s",
        "1990s",
        "éies",
    ]
    ours = rustbpe.terms([" ".join(words)], True, False)[0]
    differ = [
        pair
        for pair in zip(words, ours, Stemmer.Stemmer("english").stemWords(words), strict=True)
        if pair[1] != pair[2]
    ]
    assert differ == []


@pytest.mark.data
@pytest.mark.parametrize(("name", "queries", "least"), [("hotpot500", "_dev", 0.7917), ("vaswani", "", 0.4279)])
def test_ndcg_is_that_of_bm25s(tmp_path, name, queries, least):
    """0.7917 and 0.4280 (0.4279 where ties come in the order of ids)."""

    def rows(file: str) -> list[dict]:
        with gzip.open(data_dir() / "ir" / file, "rt", encoding="utf-8") as f:
            return [json.loads(line) for line in f]

    corpus, asked = rows(f"{name}_corpus.jsonl.gz"), rows(f"{name}_queries{queries}.jsonl.gz")
    base = Segments(tmp_path, [[f"{row['title']}\n{row['text']}" if "title" in row else row["text"] for row in corpus]])
    found = Bm25Retriever(base).search([row.get("question") or row["text"] for row in asked], 10).ids
    names = [row.get("title") or row["id"] for row in corpus]
    gold = [row.get("gold_titles") or row["qrels"] for row in asked]
    values = [ndcg_at_k([names[i] for i in ids if i >= 0], g, 10) for ids, g in zip(found, gold, strict=True)]
    assert np.mean(values) >= least


# ---- invariants ----

text = st.lists(st.sampled_from([f"w{i}" for i in range(12)]), max_size=12).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(
    segments=st.lists(st.lists(text, max_size=25), min_size=1, max_size=3),
    queries=st.lists(text, min_size=1, max_size=4),
    k=st.integers(1, 40),
    variant=st.sampled_from(["lucene", "robertson", "atire", "okapi"]),
    k1=st.sampled_from([0.0, 0.9, 1.5]),
    b=st.sampled_from([0.0, 0.75, 1.0]),
    seed=st.integers(0, 9),
)
def test_search_equals_scoring_everything(tmp_path_factory, segments, queries, k, variant, k1, b, seed):
    ours = retriever(tmp_path_factory.mktemp("any"), segments, variant=variant, k1=k1, b=b)
    n = len(ours.index)
    for allowed in (None, np.random.default_rng(seed).random(n) < 0.5):
        got = ours.search(queries, k, allowed)
        for row, query in enumerate(queries):
            ids, scores = best(ours.index.scores(query), k, allowed)
            assert np.array_equal(got.ids[row], ids)
            assert np.array_equal(got.scores[row], scores)  # to the last bit


def test_search_equals_scoring_everything_in_a_larger_base(tmp_path):
    """Rare words decide and frequent ones are only looked up; several blocks' worth of texts is in the Rust tests."""
    rng = random.Random(0)
    texts = [f"{t} rare{rng.randrange(2000)}" for t in words(7, 20_000, 12, 100)]
    ours = retriever(tmp_path, [texts[:15_000], texts[15_000:]])
    queries = [f"{q} rare{i} w0 w1" for i, q in enumerate(words(8, 40, 4, 100))]
    for k in (1, 10, 1000):
        got = ours.search(queries, k)
        for row, query in enumerate(queries):
            ids, scores = best(ours.index.scores(query), k)
            assert np.array_equal(got.ids[row], ids)
            assert np.array_equal(got.scores[row], scores)


def test_segments_threads_and_batches_change_no_bit(tmp_path):
    texts, queries = words(9, 3000, 30, 500), words(10, 150, 8, 500)
    one = retriever(tmp_path / "one", [texts], threads=1)
    many = retriever(tmp_path / "many", [texts[:7], [], texts[7:1000], texts[1000:]], threads=3)
    whole = one.search(queries, 20)
    for other in (many.search(queries, 20), retriever(tmp_path / "again", [texts], threads=2).search(queries, 20)):
        assert np.array_equal(whole.ids, other.ids)
        assert np.array_equal(whole.scores, other.scores)
    for i in (0, 77):
        alone = many.search(queries[i : i + 1], 20)
        assert np.array_equal(alone.ids[0], whole.ids[i])
        assert np.array_equal(alone.scores[0], whole.scores[i])
    files = [tmp_path / name / "segment0" / FILE for name in ("one", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_k1_b_and_variant_change_without_a_rebuild(tmp_path):
    texts, queries = words(11, 300, 30, 100), words(12, 20, 6, 100)
    base = Segments(tmp_path / "default", [texts], **PLAIN)
    for change in ({"k1": 0.9, "b": 0.4}, {"variant": "atire"}):
        changed = Bm25Retriever(base, change).search(queries, 10)
        built = retriever(tmp_path / "built", [texts], **change).search(queries, 10)
        assert np.array_equal(changed.ids, built.ids)
        assert np.array_equal(changed.scores, built.scores)


def test_a_repeated_word_counts_each_time(tmp_path):
    index = retriever(tmp_path, [["w1 w2", "w2 w3", "w4"]]).index
    np.testing.assert_allclose(index.scores("w2 w3 w2"), 2 * index.scores("w2") + index.scores("w3"), rtol=1e-6)


def test_words_of_one_stem_meet(tmp_path):
    base = Segments(tmp_path, [["The dogs are running", "a cat sleeps"]])
    assert Bm25Retriever(base).search(["Dog runs the"], 5).ids.tolist() == [[0, -1, -1, -1, -1]]
    assert base.about == [{"chunks": 2, "terms": 4, "length": 4, "postings": 4}]  # without the, are, a


# ---- edges ----


def test_no_hits_where_there_is_nothing_to_find(tmp_path):
    nothing = [["", "is a the", "–"], [], ["one text"]]
    for i, segments in enumerate([[], [[]], [["", "-"]], nothing]):
        base = Segments(tmp_path / str(i), segments)
        got = Bm25Retriever(base).search(["", "the", "absent", "x"], 3)
        assert got.ids.shape == got.scores.shape == (4, 3)
        assert (got.ids == NO_HIT).all()
        assert np.isneginf(got.scores).all()
    assert Bm25Retriever(base).search([], 3).ids.shape == (0, 3)
    found = Bm25Retriever(base).search(["text"], 100)
    assert found.ids[0, :2].tolist() == [3, NO_HIT]
    assert found.ids.shape == (1, 100)


def test_equal_scores_come_in_the_order_of_ids(tmp_path):
    ours = retriever(tmp_path, [["w1 w2"] * 700, ["w1 w3"] * 700])
    assert ours.search(["w1"], 900).ids[0].tolist() == list(range(900))
    odd = np.arange(1400) % 2 == 1
    assert ours.search(["w1"], 5, odd).ids[0].tolist() == [1, 3, 5, 7, 9]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k2": 1.0}, "unknown option 'k2'"),
        ({"k1": -1.0}, "k1=-1.0: expected a number from 0"),
        ({"k1": math.nan}, "k1=nan"),
        ({"b": 1.5}, "b=1.5: expected a number from 0 to 1"),
        ({"variant": "okapy"}, "variant = 'okapy'"),
        ({"threads": -1}, "threads=-1"),
        ({"stem": "no"}, "stem = 'no' is a str"),
    ],
)
def test_bad_options_are_named(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        Bm25Index.prepare([], tmp_path, options)


def test_stemming_cannot_change_after_the_build(tmp_path):
    base = Segments(tmp_path, [["dogs"]])
    with pytest.raises(UserError, match="built with stem=True"):
        Bm25Retriever(base, {"stem": False})


def test_a_damaged_index_is_named(tmp_path):
    base = Segments(tmp_path, [words(13, 200, 20, 50)])
    path = tmp_path / "segment0" / FILE
    whole = path.read_bytes()
    rng = random.Random(0)
    for size in (0, 5, 127, 128, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=re.escape(str(path))):
            Bm25Retriever(base)
    for at in [rng.randrange(128) for _ in range(50)] + [len(whole) - rng.randrange(1000) - 1 for _ in range(50)]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
        with pytest.raises(UserError, match=re.escape(str(path))):
            Bm25Retriever(base)
    path.unlink()
    with pytest.raises(UserError, match=f"{re.escape(str(path))}: cannot be opened"):
        Bm25Retriever(base)


def test_a_failed_build_leaves_nothing(tmp_path):
    def texts():
        yield "one"
        raise RuntimeError("the source broke")

    options = Bm25Index.prepare([], tmp_path, {})
    with pytest.raises(RuntimeError, match="the source broke"):
        Bm25Index.build(texts(), tmp_path, tmp_path, options)
    with pytest.raises(ValueError, match="surrogate"):
        Bm25Index.build(["a \ud800 b"], tmp_path, tmp_path, options)
    with pytest.raises(TypeError, match="must be str, not int"):
        Bm25Index.build([1], tmp_path, tmp_path, options)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match="absent"):
        Bm25Index.build(["one"], tmp_path / "absent", tmp_path, options)


def test_a_query_with_a_lone_surrogate_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="surrogate"):
        retriever(tmp_path, [["one"]]).search(["\ud800"], 1)


def test_allowed_must_fit(tmp_path):
    with pytest.raises(UserError, match="allowed has 2 values"):
        retriever(tmp_path, [["one"]]).search(["one"], 1, np.ones(2, bool))


def test_texts_are_read_a_few_at_a_time(tmp_path):
    """Those already indexed can go while a generator is still giving."""
    alive, most = weakref.WeakSet(), 0

    class Text(str):
        pass

    def texts():
        nonlocal most
        for i in range(40):
            text = Text(f"word{i} " * 100_000)
            alive.add(text)
            most = max(most, len(alive))
            yield text

    assert Bm25Index.build(texts(), tmp_path, tmp_path, {"threads": 1})["length"] == 4_000_000
    assert most < 20
