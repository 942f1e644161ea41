"""What every retriever must do, whatever it ranks by: here run over all that need no model from outside."""

import itertools
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanochat.config import UserError
from nanochat.retrieval import Document, Hit, KnowledgeBase, retriever_class
from nanochat.retrieval.contract import NO_HIT
from nanochat.retrieval.simple import words

RETRIEVERS = ["simple", "bm25", "dense", "hybrid", "multihop"]
EXACT = ["simple", "bm25", "dense"]  # a chunk's score depends on the query and the chunk only
DENSE = {"dim": 16, "epochs": 1, "index": "flat"}
NOUNS = ["river", "mountain", "engine", "captain", "violin", "harbour", "garden", "winter", "letter", "machine"]
NAMES = ["Ada Byron", "Karl Gauss", "Mary Shelley", "José Sánchez", "Zoë Ångström", "李白"]
QUERIES = [
    "Where did Ada Byron see the river?",
    "engine engine captain",
    "the winter garden of José Sánchez",
    "Zoë Ångström 日本語 \U0001f600",
    "violin",
    "a word that nobody wrote: qwertz",
]


def story(dice: random.Random, i: int) -> Document:
    name = dice.choice(NAMES)
    told = [
        f"{name} saw the {dice.choice(NOUNS)} and the {dice.choice(NOUNS)} of {dice.choice(NAMES)}." for _ in range(6)
    ]
    return Document(f"d{i}", " ".join(told), f"{name} {i // 3}", {"year": 1900 + i, "odd": bool(i % 2)})


def stories() -> list[Document]:
    """Some alike word for word, some without a title or a text."""
    dice = random.Random(0)
    made = [story(dice, i) for i in range(60)]
    made += [Document(f"same{i}", "The violin of the captain.", "Violin", {"year": 1}) for i in range(5)]
    return [*made, Document("untitled", "An engine by the river."), Document("textless", "", "Winter garden")]


Places = dict[str, Path]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    """One base in three segments for each retriever; tests that change it copy it."""
    return {name: tmp_path_factory.mktemp(name) / "kb" for name in RETRIEVERS}


@pytest.fixture(params=RETRIEVERS)
def kb(request: pytest.FixtureRequest, places: Places) -> KnowledgeBase:
    path = places[request.param]
    if not path.exists():
        needs = retriever_class(request.param).needs
        documents = stories()
        how: dict[str, Any] = {"dense": DENSE} if "dense" in needs else {}
        made = KnowledgeBase.build(documents[:50], path, request.param, chunk_tokens=24, chunk_overlap=12, **how)
        made.add(documents[50:58])
        made.add(documents[58:])
    return KnowledgeBase.open(path)


@pytest.fixture
def changed(kb: KnowledgeBase, tmp_path: Path) -> KnowledgeBase:
    shutil.copytree(kb.path, tmp_path / "kb")
    return KnowledgeBase.open(tmp_path / "kb")


def told(hits: list[Hit]) -> list[tuple[str, int, float]]:
    return [(hit.document.id, hit.chunk.start, hit.score) for hit in hits]


def places_of(hits: list[Hit]) -> list[tuple[str, int]]:
    return [(hit.document.id, hit.chunk.start) for hit in hits]


def test_a_query_alone_is_answered_as_among_others(kb: KnowledgeBase) -> None:
    for k in (1, 7, 500):
        together = kb.search(QUERIES, k=k)
        assert [told(hits) for hits in together] == [told(kb.search(query, k=k)) for query in QUERIES]
        assert [told(hits) for hits in kb.search(QUERIES[::-1], k=k)] == [told(hits) for hits in together[::-1]]
    assert all(together[:5])


def test_a_base_opened_again_answers_the_same(kb: KnowledgeBase) -> None:
    again = KnowledgeBase.open(kb.path)
    assert list(map(told, again.search(QUERIES, k=20))) == list(map(told, kb.search(QUERIES, k=20)))


def test_hits_are_ranked_and_say_where_they_are_from(kb: KnowledgeBase) -> None:
    for hits in kb.search(QUERIES, k=20):
        assert [hit.rank for hit in hits] == list(range(1, len(hits) + 1))
        assert all(a.score >= b.score for a, b in itertools.pairwise(hits))
        assert {hit.source for hit in hits} <= {kb.manifest["retriever"]}
        for hit in hits:
            assert hit.document == kb.get(hit.document.id)
            assert hit.document.text[hit.chunk.start : hit.chunk.end] == hit.chunk.text


def test_compaction_changes_no_answer(changed: KnowledgeBase) -> None:
    before = changed.search(QUERIES, k=20)
    assert len(changed.manifest["segments"]) == 3
    changed.compact()
    assert len(changed.manifest["segments"]) == 1
    for old, new in zip(before, changed.search(QUERIES, k=20), strict=True):
        if changed.manifest["retriever"] in ("simple", "bm25"):
            assert told(new) == told(old)
        assert places_of(new) == places_of(old)
        np.testing.assert_allclose([hit.score for hit in new], [hit.score for hit in old], atol=1e-4)


def test_after_compaction_a_base_answers_like_one_that_never_held_what_was_deleted(
    changed: KnowledgeBase, tmp_path: Path
) -> None:
    if "dense" in changed.manifest["indexes"]:
        pytest.skip("the encoder was made of the documents that were there first")
    changed.delete([document.id for i, document in enumerate(changed.documents()) if i % 3 == 0])
    changed.compact()
    name = changed.manifest["retriever"]
    fresh = KnowledgeBase.build(changed.documents(), tmp_path / "fresh", name, chunk_tokens=24, chunk_overlap=12)
    assert list(map(told, changed.search(QUERIES, k=50))) == list(map(told, fresh.search(QUERIES, k=50)))


def test_deleted_documents_never_appear(changed: KnowledgeBase) -> None:
    gone = {document.id for i, document in enumerate(changed.documents()) if i % 3 or document.id.startswith("same")}
    assert changed.delete(gone) == len(gone)
    for base in (changed, KnowledgeBase.open(changed.path)):
        for hits in base.search(QUERIES, k=500, per_document=0):
            assert not {hit.document.id for hit in hits} & gone
    changed.compact()
    left = {document.id for document in changed.documents()}
    assert {hit.document.id for hits in changed.search(QUERIES, k=500) for hit in hits} <= left
    changed.delete(left)
    assert changed.search(QUERIES) == [[] for _ in QUERIES]


FILTERS: list[tuple[dict[str, Any], Callable[[dict[str, Any]], bool]]] = [
    ({"year": {">=": 1910, "<": 1930}}, lambda has: 1910 <= has.get("year", 0) < 1930),
    ({"odd": True}, lambda has: has.get("odd", False)),
    ({"year": [1903, 1]}, lambda has: has.get("year") in (1903, 1)),
    ({"year": 3000}, lambda has: False),
]


@pytest.mark.parametrize(("where", "right"), FILTERS, ids=["range", "true", "any of", "none"])
def test_filters_are_exact(kb: KnowledgeBase, where: dict[str, Any], right: Callable[[dict[str, Any]], bool]) -> None:
    for query in QUERIES:
        found = kb.search(query, k=500, where=where, per_document=0)
        assert all(right(hit.document.metadata) for hit in found)
        if kb.manifest["retriever"] in EXACT:
            every = kb.search(query, k=500, per_document=0)
            expected = told([hit for hit in every if right(hit.document.metadata)])
            assert told(found) == expected
            assert told(kb.search(query, k=4, where=where, per_document=0)) == expected[:4]


def test_more_hits_than_there_are_give_all_once(kb: KnowledgeBase) -> None:
    for hits in kb.search(QUERIES, k=10_000, per_document=0):
        assert len(places_of(hits)) == len(set(places_of(hits))) <= kb.n_chunks
    assert len(kb.search("violin captain", k=10_000)) >= 5


def test_equal_scores_come_in_the_order_of_chunk_ids(kb: KnowledgeBase) -> None:
    for k in (3, 10, kb.n_chunks):
        ranking = kb.retriever(kb.manifest["retriever"]).search(["violin of the captain", *QUERIES], k)
        assert ranking.ids.shape == ranking.scores.shape == (1 + len(QUERIES), k)
        assert (ranking.ids.dtype, ranking.scores.dtype) == (np.int64, np.float32)
        for ids, scores in zip(ranking.ids.tolist(), ranking.scores.tolist(), strict=True):
            n = ids.index(NO_HIT) if NO_HIT in ids else k
            assert set(ids[n:]) <= {NO_HIT} and set(scores[n:]) <= {-np.inf}
            pairs = list(zip(scores[:n], ids[:n], strict=True))
            assert pairs == sorted(pairs, key=lambda pair: (-pair[0], pair[1]))
    alike = [hit.document.id for hit in kb.search("The violin of the captain.", k=60) if "same" in hit.document.id]
    assert alike == [f"same{i}" for i in range(5)]


@pytest.mark.parametrize("query", ["", " \n\t", "?!", "... -- ()", "\U0001f600"])
def test_a_query_without_a_word_finds_nothing(kb: KnowledgeBase, query: str) -> None:
    assert kb.search(query) == []
    found = kb.search(["violin", query, "engine"], k=3)
    assert [told(hits) for hits in found] == [told(kb.search("violin", k=3)), [], told(kb.search("engine", k=3))]
    assert kb.search([]) == []


def test_letters_of_any_script_are_found(kb: KnowledgeBase) -> None:
    for name in ("Zoë Ångström", "José Sánchez", "李白"):
        best = kb.search(name, k=1)[0]
        assert name in best.document.title + best.chunk.text


@pytest.mark.parametrize("name", RETRIEVERS)
def test_an_empty_base_finds_nothing(tmp_path: Path, name: str) -> None:
    kb = KnowledgeBase.build([], tmp_path / "kb", name)
    assert kb.search("house") == []
    assert kb.retriever(name).search(["house"], 3).ids.tolist() == [[NO_HIT] * 3]


@pytest.mark.parametrize(
    "name", [":", ".x:Y", "foo:Bar", "json:", "json:Nothing", "json:loads", "json:JSONDecoder", "bm25:"]
)
def test_a_retriever_that_cannot_be_is_named(name: str) -> None:
    with pytest.raises(UserError, match=f"retriever '{re.escape(name)}'.*choose from simple, bm25"):
        retriever_class(name)


def test_a_document_gives_as_many_chunks_as_asked_for(kb: KnowledgeBase) -> None:
    for query in QUERIES[:5]:
        for per_document in (1, 2):
            hits = kb.search(query, k=12, per_document=per_document)
            ids = [hit.document.id for hit in hits]
            assert max(map(ids.count, ids)) <= per_document
        every = kb.search(query, k=10_000, per_document=0)
        ids = [hit.document.id for hit in every]
        assert max(map(ids.count, ids)) > 1
        if kb.manifest["retriever"] in EXACT:
            first = {hit.document.id: hit for hit in reversed(every)}  # the best of each document
            best = [hit for hit in every if first[hit.document.id] is hit]
            assert told(kb.search(query, k=12)) == told(best)[:12]


def test_searching_changes_no_document(kb: KnowledgeBase) -> None:
    before = list(kb.documents())
    for hits in kb.search(QUERIES, k=50, mmr=0.5):
        for hit in hits:
            hit.document.metadata["changed"] = True
    assert list(kb.documents()) == before == stories()


def test_diversity_keeps_the_best_and_prefers_what_is_new(kb: KnowledgeBase) -> None:
    plain, diverse = kb.search("violin captain", k=8), kb.search("violin captain", k=8, mmr=0.3)
    assert places_of(diverse[:1]) == places_of(plain[:1])
    assert len(diverse) == 8
    if kb.manifest["retriever"] in EXACT:
        assert told(kb.search("violin captain", k=8, mmr=1.0)) == told(plain)

    def alike(hits: list[Hit]) -> float:
        sets = [set(words(hit.chunk.text)) for hit in hits]
        return sum(len(a & b) / max(1, len(a | b)) for a, b in itertools.combinations(sets, 2))

    assert alike(diverse) < alike(plain)


# ---- simple, by its formula ----


def test_simple_scores_by_its_formula(tmp_path: Path) -> None:
    texts = ["a b b", "B c", "c d a a", ""]
    kb = KnowledgeBase.build([Document(f"{i}", text) for i, text in enumerate(texts)], tmp_path / "kb", "simple")
    scores = {hit.document.id: hit.score for hit in kb.search("a B b x", k=10)}
    a = b = np.log(1 + 4 / 2)
    assert scores == pytest.approx({"0": a + b, "1": b, "2": a})
