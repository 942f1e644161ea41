"""Multi-hop retrieval without a language model: retrieve, see which names the found texts bring in, retrieve those.

"Where was the director of X born?": X is found by its words, the director only through the text of X. Following names
from text to text is the idea of GoldEn Retriever (1910.07000) and, over a graph made beforehand, of HippoRAG
(2405.14831). Here the graph is not made: titles of the base are looked up in the texts that a hop has found.

    hop 1    s(c) = (score - floor) / (best - floor), floor: the score at rank POOL of the first retriever;
             at least 1 where the question names the title of c
    hop h    s(c) = s(p) (w + NEAR near + COVER cover) for a chunk p expanded in this hop and a chunk c it leads to:
             w = LINK where p mentions the title of c. Other names in p are searched for, together with the words of
             the question that p lacks; w = NAME for hits that hold the whole name, times their score over the best
    near     1 where a word of the question that is no name stands beside the mention, falling to .5 at WINDOW words
    cover    share of the question's words missing in p that c holds
    final    the best s over all ways to c

Recall of all gold titles in the first 10 (nDCG@10), first the first hop's BM25 alone (bm25s, k1 1.5, b .75, stemming):
2Wiki, 40 questions .15 (.63) -> .95 (.96); HotpotQA-500, 255 questions .81 (.79) -> .95 (.91); titles as mere text
.15 -> .60 and .81 -> .88. These are the questions it was developed on. The constants are round: POOL 20 .. 100,
WINDOW 4 .. 10, a beam of 3 .. 10, LINK .5 .. .8, NAME .1 .. .4, HITS 3 .. 5 leave 2Wiki in .92 .. 1 and HotpotQA in
.945 .. .953. Without near .95 and .94, without cover .93 and .95, without names that are no titles .95 and .93.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from nanochat.config import UserError
from nanochat.retrieval.contract import NO_HIT, Base, Ranking, Retriever
from nanochat.retrieval.titles import STOP_WORDS, Name, Page, Titles, capitalised

POOL = 30
LINK, NAME, NEAR, COVER = 0.5, 0.2, 0.5, 0.4
WINDOW, BEHIND = 6, 2  # words before and behind a mention
NAMES, HITS = 4, 3  # names searched for each expanded chunk, nearest first, and hits taken of each search
_TITLES = 65_536  # titles read at a time
_QUESTIONS = 256  # questions under way at once: what they read is kept as words

Way = tuple[tuple[str, int], ...]  # (query or name, chunk it led to), first hop first
NextQuery = Callable[[list[str], list[list[str]]], Sequence[str | None]]


@dataclass(frozen=True)
class MultiHopOptions:
    """first: retriever of every hop. max_hops: 1 is the first retriever with the bonus for named titles. beam: chunks
    expanded for each question and hop. next_query(questions, texts found so far for each, best first) -> the next query
    of each question, None where enough was found: for a model that writes queries, in place of the names."""

    first: str = "bm25"
    max_hops: int = 2
    beam: int = 4
    next_query: NextQuery | None = None

    def __post_init__(self) -> None:
        if self.first == MultiHopRetriever.name:
            raise UserError("retriever 'multihop': first='multihop' never ends, pass first='bm25' or another")
        for name in ("max_hops", "beam"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise UserError(f"retriever 'multihop': {name}={value!r}, expected a whole number of at least 1")


class MultiHopRetriever:
    """Hits carry a trace, the best way to them: ("hop 1: QUESTION -> TITLE", "hop 2: NAME -> TITLE", ...)."""

    name: ClassVar[str] = "multihop"
    needs: ClassVar[tuple[str, ...]] = ("bm25",)

    def __init__(self, base: Base, options: dict[str, Any] | None = None) -> None:
        """Reads all titles of the base once: seconds for a million."""
        known = list(MultiHopOptions.__dataclass_fields__)
        if unknown := [key for key in options or {} if key not in known]:
            raise UserError(f"retriever 'multihop' has no option {unknown[0]!r}: choose from {', '.join(known)}")
        self.options = MultiHopOptions(**(options or {}))
        self.base = base
        self.first = base.retriever(self.options.first)
        self.titles = Titles(_all_titles(base))

    def search(self, queries: Sequence[str], k: int, allowed: np.ndarray | None = None) -> Ranking:
        """allowed: (n_chunks,) bool -> ids (M, k), scores (M, k). Every hop is one search for all its queries."""
        ids = np.full((len(queries), k), NO_HIT, np.int64)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        trace: list[list[tuple[str, ...]]] = []
        for start in range(0, len(queries), _QUESTIONS):
            walk = _Walk(self.base, self.first, self.titles, self.options, allowed)
            for row, quest in enumerate(walk.run(queries[start : start + _QUESTIONS], k), start):
                best = quest.best()[:k]
                ids[row, : len(best)] = best
                scores[row, : len(best)] = [quest.scores[id] for id in best]
                trace.append(self._trace([quest.ways[id] for id in best]))
        return Ranking(ids, scores, trace)

    def _trace(self, ways: list[Way]) -> list[tuple[str, ...]]:
        seen = sorted({id for way in ways for _, id in way})
        titles = dict(zip(seen, self.base.titles(seen), strict=True))
        return [tuple(f"hop {n}: {query} -> {titles[id]}" for n, (query, id) in enumerate(way, 1)) for way in ways]


@dataclass
class _Quest:
    """One question under way. scores and ways by chunk id."""

    question: Page
    relations: frozenset[str] = frozenset()  # roots of its words outside names
    scores: dict[int, float] = field(default_factory=dict)
    ways: dict[int, Way] = field(default_factory=dict)
    expanded: set[int] = field(
        default_factory=set
    )  # in earlier hops; they stay as they are, so that no way is a circle

    def offer(self, id: int, score: float, query: str, way: Way = ()) -> None:
        if id not in self.expanded and score > self.scores.get(id, -np.inf):
            self.scores[id] = score
            self.ways[id] = (*way, (query, id))

    def best(self) -> list[int]:
        return sorted(self.scores, key=lambda id: (-np.float32(self.scores[id]), id))

    def front(self, beam: int) -> list[int]:
        return [id for id in self.best() if id not in self.expanded and self.scores[id] > 0][:beam]

    def near(self, page: Page, name: Name) -> float:
        """0, or .5 .. 1: how near to the mention a word stands that says how it relates to the question."""
        for distance in range(1, WINDOW + 1):
            places = [name.start - distance] + [name.end - 1 + distance] * (distance <= BEHIND)
            if any(0 <= i < len(page.roots) and page.roots[i] in self.relations for i in places):
                return 1 - (distance - 1) / (2 * WINDOW)
        return 0.0


class _Source:
    """A chunk that is expanded for a question, as it stood when the hop began."""

    def __init__(self, quest: _Quest, id: int, page: Page, titles: Titles) -> None:
        self.quest, self.page, self.way, self.score = quest, page, quest.ways[id], quest.scores[id]
        self.titled = titles.names(page)
        pairs = zip(quest.question.roots, quest.question.words, strict=True)
        self.missing = {r: word for r, word in pairs if word not in STOP_WORDS and r not in page.root_set}

    def offer(self, id: int, page: Page, weight: float, query: str, share: float = 1.0) -> None:
        cover = len(page.root_set & self.missing.keys()) / max(1, len(self.missing))
        self.quest.offer(id, self.score * (weight + COVER * cover) * share, query, self.way)

    def untitled(self) -> list[tuple[str, float]]:
        """(name, near) of names of two words and more that are neither title nor in the question, nearest first."""
        found: dict[str, float] = {}
        for name in capitalised(self.page, self.titled):
            words = self.page.words[name.start : name.end]
            if len(words) > 1 and not set(words) <= set(self.quest.question.words):
                text = self.page.text_of(name)
                found[text] = max(found.get(text, 0.0), self.quest.near(self.page, name))
        return sorted(found.items(), key=lambda item: -item[1])[:NAMES]


@dataclass
class _Walk:
    """The hops of some questions, and the texts they read."""

    base: Base
    first: Retriever
    titles: Titles
    options: MultiHopOptions
    allowed: np.ndarray | None
    pages: dict[int, Page] = field(default_factory=dict)

    def run(self, queries: Sequence[str], k: int) -> list[_Quest]:
        pools = self._pooled(queries, max(k, POOL))
        quests = [self._begin(query, pool) for query, pool in zip(queries, pools, strict=True)]
        for _ in range(1, self.options.max_hops):
            if self.options.next_query is None:
                self._follow_names(quests)
            else:
                self._follow_queries(quests, self.options.next_query)
        return quests

    def _pooled(self, queries: Sequence[str], k: int) -> list[dict[int, float]]:
        """Hits of the first retriever: 1 for the best, 0 at rank POOL, further ones below."""
        found = self.first.search(queries, k, self.allowed)
        pools = []
        for ids, scores in zip(found.ids.tolist(), found.scores.tolist(), strict=True):
            hits = [(id, score) for id, score in zip(ids, scores, strict=True) if id != NO_HIT]
            floor = hits[POOL - 1][1] if len(hits) >= POOL else min([0.0, *(score for _, score in hits)])
            span = hits[0][1] - floor if hits else 0.0
            pools.append({id: (score - floor) / span if span > 0 else 1.0 for id, score in hits})
        return pools

    def _begin(self, query: str, pool: dict[int, float]) -> _Quest:
        page = Page(query)
        titled = [name for name in self.titles.names(page) if name.end > 1]  # word 0 has its capital by grammar
        names = titled + [name for name in capitalised(page, titled) if name.start > 0]
        inside = {i for name in names for i in range(name.start, name.end)}
        relations = (i for i, word in enumerate(page.words) if i not in inside and word not in STOP_WORDS)
        quest = _Quest(page, frozenset(page.roots[i] for i in relations))
        for id, score in pool.items():
            quest.offer(id, score, query)
        for id in self._may(id for name in titled for id in name.ids):
            quest.offer(id, 1 + 0.1 * max(0.0, pool.get(id, 0.0)), query)
        return quest

    def _follow_names(self, quests: list[_Quest]) -> None:
        """Expand the best chunks of each question that were not expanded yet."""
        fronts = [quest.front(self.options.beam) for quest in quests]
        self._read(id for front in fronts for id in front)
        pairs = [(quest, id) for quest, front in zip(quests, fronts, strict=True) for id in front]
        sources = [_Source(quest, id, self.pages[id], self.titles) for quest, id in pairs]
        self._read(self._may(id for source in sources for name in source.titled for id in name.ids))
        for source in sources:
            for name in source.titled:
                weight = LINK + NEAR * source.quest.near(source.page, name)
                for id in self._may(name.ids):
                    source.offer(id, self.pages[id], weight, source.page.text_of(name))
        self._search_names([(source, *name) for source in sources for name in source.untitled()])
        for quest, id in pairs:
            quest.expanded.add(id)

    def _search_names(self, searches: list[tuple[_Source, str, float]]) -> None:
        if not searches:
            return
        queries = [" ".join([name, *source.missing.values()]) for source, name, _ in searches]
        found = self.first.search(queries, HITS, self.allowed)
        self._read(id for id in found.ids.ravel().tolist() if id != NO_HIT)
        for row, (source, name, near) in enumerate(searches):
            words, best = set(Page(name).words), float(found.scores[row, 0])
            for id, score in zip(found.ids[row].tolist(), found.scores[row].tolist(), strict=True):
                if id != NO_HIT and score > 0 and words <= set(self.pages[id].words):
                    source.offer(id, self.pages[id], NAME + NEAR * near, queries[row], score / best)

    def _follow_queries(self, quests: list[_Quest], next_query: NextQuery) -> None:
        """Hits of a written query count like those of the question."""
        fronts = [quest.best()[: self.options.beam] for quest in quests]
        self._read(id for front in fronts for id in front)
        texts = [[self.pages[id].text for id in front] for front in fronts]
        written = next_query([quest.question.text for quest in quests], texts)
        if len(written) != len(quests):
            raise UserError(f"next_query gave {len(written)} queries for {len(quests)} questions: one each, or None")
        asked = [(quest, front, query) for quest, front, query in zip(quests, fronts, written, strict=True) if query]
        for (quest, front, query), pool in zip(asked, self._pooled([q for *_, q in asked], POOL), strict=True):
            quest.expanded.update(front)
            for id, score in pool.items():
                quest.offer(id, score, query, quest.ways[front[0]] if front else ())

    def _may(self, ids: Iterable[int]) -> list[int]:
        return [id for id in ids if self.allowed is None or self.allowed[id]]

    def _read(self, ids: Iterable[int]) -> None:
        """Have these chunks in self.pages, with one request to the base."""
        new = list(dict.fromkeys(id for id in ids if id not in self.pages))
        self.pages.update(zip(new, map(Page, self.base.texts(new)), strict=True))


def _all_titles(base: Base) -> Iterator[str]:
    for start in range(0, base.n_chunks, _TITLES):
        yield from base.titles(range(start, min(start + _TITLES, base.n_chunks)))
