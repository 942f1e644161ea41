"""Multi-hop retrieval on invented worlds, whose links are known, and on two published sets of questions."""

import gzip
import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanochat.config import UserError
from nanochat.retrieval import Document, KnowledgeBase
from nanochat.retrieval.contract import NO_HIT, Ranking
from nanochat.retrieval.metrics import all_recall_at_k, ndcg_at_k
from nanochat.retrieval.multihop import MultiHopRetriever
from nanochat.retrieval.simple import SimpleRetriever
from nanochat.retrieval.titles import MAX_TITLE, STOP_WORDS, Page, Titles, capitalised

FILMS = {
    "Silent Harbour": "Silent Harbour is a drama film directed by Greta Malm and starring Otto Finch.",
    "The Ninth Door": "The Ninth Door is a comedy film directed by Paulo Reis, starring Ines Costa.",
    "Harbour Lights": "Harbour Lights is a film starring Otto Finch in the part of a sailor.",
    "Greta Malm": "Malm, born in Kirkevik in 1931, made documentaries about ships.",
    "Otto Finch": "Finch is an actor known for quiet parts.",
    "Paulo Reis (artist)": "Reis (1940 in Porto) was a painter before he turned to cinema.",
    "Ines Costa": "Costa is a singer.",
    "Kirkevik": "Kirkevik is a town in the province of Ostmark.",
    "Ostmark": "A region with eleven lakes.",
    "Quiet Parts": "An album of piano music.",
}


class TextBase:
    """Chunks in memory, found by the retriever without an index."""

    def __init__(self, chunks: dict[str, str], titled: bool = True) -> None:
        self._titles = [title if titled else "" for title in chunks]
        self._texts = [f"{title}\n{text}" if titled else text for title, text in chunks.items()]
        self.n_chunks = len(chunks)

    def texts(self, ids: Sequence[int]) -> list[str]:
        return [self._texts[i] for i in ids]

    def titles(self, ids: Sequence[int]) -> list[str]:
        return [self._titles[i] for i in ids]

    def retriever(self, name: str) -> Any:
        return SimpleRetriever(self)  # pyrefly: ignore[bad-argument-type]


def multihop(chunks: dict[str, str], titled: bool = True, **options: Any) -> MultiHopRetriever:
    return MultiHopRetriever(TextBase(chunks, titled), options)  # pyrefly: ignore[bad-argument-type]


def found(ranking: Ranking, chunks: dict[str, str], row: int = 0) -> list[str]:
    return [list(chunks)[i] for i in ranking.ids[row] if i != NO_HIT]


def ways(ranking: Ranking, chunks: dict[str, str]) -> dict[str, tuple[str, ...]]:
    assert ranking.trace is not None
    return dict(zip(found(ranking, chunks), ranking.trace[0], strict=True))


def invented(rng: random.Random, n: int = 60) -> dict[str, str]:
    """Chunks that mention each other's titles among words of a small vocabulary."""
    titles = [f"{rng.choice('BDGKLMN')}{rng.choice('aeiou')}l{i} Hill" for i in range(n)]
    words = ["river", "built", "owner", "stone", "near", "village", "painted", "the"]
    return {t: " ".join([*rng.choices(words, k=6), rng.choice(titles), *rng.choices(words, k=4)]) for t in titles}


def test_a_name_in_the_first_text_leads_to_the_second() -> None:
    question = "Where was the director of Silent Harbour born?"
    once = SimpleRetriever(TextBase(FILMS)).search([question], 10)  # pyrefly: ignore[bad-argument-type]
    ranking = multihop(FILMS).search([question], 3)
    assert found(once, FILMS).index("Greta Malm") > 1
    assert set(found(ranking, FILMS)[:2]) == {"Silent Harbour", "Greta Malm"}
    assert ways(ranking, FILMS)["Silent Harbour"] == (f"hop 1: {question} -> Silent Harbour",)
    assert ways(ranking, FILMS)["Greta Malm"] == (
        f"hop 1: {question} -> Silent Harbour",
        "hop 2: Greta Malm -> Greta Malm",
    )


def test_a_comparison_finds_both_sides() -> None:
    question = "Which film has the older director, Silent Harbour or The Ninth Door?"
    ranking = multihop(FILMS).search([question], 4)
    assert set(found(ranking, FILMS)) == {"Silent Harbour", "The Ninth Door", "Greta Malm", "Paulo Reis (artist)"}


def test_a_third_hop_is_reached_only_with_three_hops() -> None:
    question = ["Silent Harbour director birthplace lakes"]
    assert "Greta Malm" not in found(multihop(FILMS, max_hops=1).search(question, 10), FILMS)
    assert "Kirkevik" not in found(multihop(FILMS, max_hops=2).search(question, 10), FILMS)
    way = ways(multihop(FILMS, max_hops=3).search(question, 10), FILMS)["Kirkevik"]
    assert [step.rpartition(" -> ")[2] for step in way] == ["Silent Harbour", "Greta Malm", "Kirkevik"]


def test_names_are_searched_for_where_nothing_has_a_title() -> None:
    chunks = {**FILMS, "Greta Malm": "Greta Malm, raised in Kirkevik, made documentaries about ships."}
    question = ["Who was the director of the drama Silent Harbour?"]
    assert found(multihop(chunks, titled=False, max_hops=1).search(question, 10), chunks).count("Greta Malm") == 0
    ranking = multihop(chunks, titled=False).search(question, 10)
    assert "Greta Malm" in found(ranking, chunks)


def test_no_hop_goes_to_or_through_what_is_not_allowed() -> None:
    question, names = ["Silent Harbour director birthplace"], list(FILMS)
    assert "Kirkevik" in found(multihop(FILMS, max_hops=3).search(question, 10), FILMS)
    allowed = np.ones(len(FILMS), bool)
    allowed[names.index("Greta Malm")] = False
    hits = found(multihop(FILMS, max_hops=3).search(question, 10, allowed), FILMS)
    assert "Silent Harbour" in hits
    assert "Greta Malm" not in hits
    assert "Kirkevik" not in hits
    allowed[:] = False
    assert found(multihop(FILMS).search(question, 10, allowed), FILMS) == []


@pytest.mark.parametrize("max_hops", [1, 2, 3])
def test_rankings_of_invented_worlds_are_well_formed(max_hops: int) -> None:
    rng = random.Random(max_hops)
    for _ in range(10):
        chunks = invented(rng)
        titles = list(chunks)
        queries = [f"who painted the river of {rng.choice(titles)}", "stone village near the owner", ""]
        base = TextBase(chunks)
        ranking = multihop(chunks, max_hops=max_hops).search(queries, 70)
        once = SimpleRetriever(base).search(queries, 70)  # pyrefly: ignore[bad-argument-type]
        assert ranking.trace is not None
        for row, trace in enumerate(ranking.trace):
            ids = [i for i in ranking.ids[row].tolist() if i != NO_HIT]
            assert len(set(ids)) == len(ids) == len(trace)
            assert set(ids) >= set(once.ids[row].tolist()) - {NO_HIT}
            assert (ranking.scores[row, len(ids) :] == -np.inf).all()
            keys = list(zip((-ranking.scores[row, : len(ids)]).tolist(), ids, strict=True))
            assert keys == sorted(keys)
            for id, steps in zip(ids, trace, strict=True):
                places = [step.rpartition(" -> ")[2] for step in steps]
                assert 1 <= len(places) <= max_hops
                assert len(set(places)) == len(places)
                assert places[-1] == titles[id]
                assert all(b in chunks[a] for a, b in itertools.pairwise(places))
        assert (ranking.ids[2] == NO_HIT).all()


def test_a_query_alone_or_among_others_gives_the_same_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(7)
    chunks = invented(rng)
    queries = [f"{rng.choice(['built', 'owner of', 'near'])} {rng.choice(list(chunks))}" for _ in range(9)]
    retriever = multihop(chunks, max_hops=3)
    whole = retriever.search(queries, 8)
    monkeypatch.setattr("nanochat.retrieval.multihop._QUESTIONS", 2)
    for row, query in enumerate(queries):
        for ranking, at in ((retriever.search([query], 8), 0), (retriever.search(queries[::-1], 8), 8 - row)):
            assert (ranking.ids[at] == whole.ids[row]).all()
            assert (ranking.scores[at] == whole.scores[row]).all()
            assert ranking.trace is not None and whole.trace is not None
            assert ranking.trace[at] == whole.trace[row]


def test_fewer_hits_are_the_first_of_more() -> None:
    retriever = multihop(invented(random.Random(3)))
    few, many = (retriever.search(["stone village near the owner"], k) for k in (5, 60))
    assert (few.ids[0] == many.ids[0, :5]).all()


def test_a_model_may_write_the_queries() -> None:
    asked: list[tuple[list[str], list[list[str]]]] = []

    def next_query(questions: list[str], texts: list[list[str]]) -> list[str | None]:
        asked.append((questions, texts))
        return ["eleven lakes", None]

    retriever = multihop(FILMS, next_query=next_query)
    ranking = retriever.search(["Silent Harbour", "Quiet Parts"], 5)
    assert [questions for questions, _ in asked] == [["Silent Harbour", "Quiet Parts"]]
    assert asked[0][1][0][0].startswith("Silent Harbour\n")
    assert "Ostmark" in found(ranking, FILMS)
    assert "Ostmark" not in found(ranking, FILMS, row=1)
    assert ways(ranking, FILMS)["Ostmark"][-1] == "hop 2: eleven lakes -> Ostmark"
    with pytest.raises(UserError, match="2 queries for 1 questions"):
        retriever.search(["Silent Harbour"], 5)


def test_an_empty_base_and_an_empty_question_find_nothing() -> None:
    assert (multihop({}).search(["Greta Malm"], 3).ids == NO_HIT).all()
    assert (multihop(FILMS).search(["", "?!"], 3).ids == NO_HIT).all()
    assert multihop(FILMS).search([], 3).ids.shape == (0, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hops": 2}, "no option 'hops'"),
        ({"first": "multihop"}, "never ends"),
        ({"max_hops": 0}, "max_hops=0"),
        ({"beam": 1.5}, "beam=1.5"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        multihop(FILMS, **options)


def longest_titles(titles: list[str], text: str) -> list[tuple[int, int, int]]:
    """The slow reference: at each word, every title from the longest on. -> (first word, end, chunk id)."""
    words, i, found = text.split(), 0, []
    while i < len(words):
        for id in sorted(range(len(titles)), key=lambda id: -len(titles[id].split())):
            n = len(titles[id].split())
            same = [w.lower() for w in words[i : i + n]] == titles[id].lower().split()
            if same and words[i][0].isupper() and not set(titles[id].lower().split()) <= STOP_WORDS:
                found.append((i, i + n, id))
                i += n - 1
                break
        i += 1
    return found


def test_titles_in_a_text_are_those_of_the_slow_search() -> None:
    rng = random.Random(0)
    words = ["The", "Red", "red", "Fox", "of", "Of", "York", "New", "and"]
    some = 0
    for _ in range(300):
        titles = [" ".join(rng.choices(words, k=rng.randrange(1, 5))) for _ in range(6)]
        titles = list({title.lower(): title for title in titles}.values())
        text = " ".join(rng.choices(words, k=12))
        names = [(name.start, name.end, name.ids[0]) for name in Titles(titles).names(Page(text))]
        assert names == longest_titles(titles, text)
        some += len(names)
    assert some > 300


def test_titles_meet_apostrophes_asides_cases_and_lengths() -> None:
    titles = Titles(["God's Gift", "William Duncan (actor)", "Blood Street", "Film", "the", "1941", "Lothair II"])

    def ids(text: str) -> list[int]:
        return [name.ids[0] for name in titles.names(Page(text))]

    assert ids("Is God'S Gift older than Blood street?") == [0, 2]
    assert ids("directed by William Duncan, a film of 1941; The End") == [1]
    assert ids("the mother of lothair ii's wife, a film") == [6]
    long = " ".join(f"W{i}" for i in range(MAX_TITLE + 1))
    assert Titles([long]).names(Page(long)) == []


def test_runs_of_capitals_are_names() -> None:
    page = Page("It was J. S. Bach who met Anna-Maria Keil (Leipzig) in March. Old and St. Thomas stood.")
    texts = [page.text_of(name) for name in capitalised(page, [])]
    assert texts == ["J. S. Bach", "Anna-Maria Keil", "Leipzig", "March", "Old", "St. Thomas"]
    keil = Titles(["Keil"]).names(page)
    assert [page.text_of(name) for name in capitalised(page, keil)][1] == "Anna-Maria"


def rows(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


@pytest.mark.data
@pytest.mark.parametrize(("name", "goal"), [("2wiki", 0.9), ("hotpot500", 0.92)])
def test_all_gold_documents_are_found_more_often_than_by_one_search(
    data: Path, tmp_path: Path, name: str, goal: float
) -> None:
    corpus, questions = rows(data / f"ir/{name}_corpus.jsonl.gz"), rows(data / f"ir/{name}_queries_dev.jsonl.gz")
    documents = (Document(str(i), row["text"], title=row["title"]) for i, row in enumerate(corpus))
    kb = KnowledgeBase.build(documents, tmp_path / "kb", retriever="multihop")
    recall, ndcg = {}, {}
    for retriever in ("bm25", "multihop"):
        answers = kb.search([q["question"] for q in questions], k=10, retriever=retriever)
        titles = [[hit.document.title for hit in hits] for hits in answers]
        pairs = [(found, q["gold_titles"]) for found, q in zip(titles, questions, strict=True)]
        recall[retriever] = np.mean([all_recall_at_k(*pair, k=10) for pair in pairs])
        ndcg[retriever] = np.mean([ndcg_at_k(*pair, k=10) for pair in pairs])
    assert recall["multihop"] >= goal > recall["bm25"]
    assert ndcg["multihop"] > ndcg["bm25"] + 0.05
    if name == "2wiki":
        assert recall["multihop"] >= 2 * recall["bm25"]
