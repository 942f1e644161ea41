"""One question about the invented world at a time, of any kind that tasks/world.py lists and in its row format."""

import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from nanochat.retrieval.document import Document
from nanochat.world import Fact, World
from nanochat.world_names import Dice, Entity
from nanochat.world_text import RELATIONS, VALUES
from tasks.world_paths import Articles, Chains, surfaces
from tasks.world_wording import COMPARISONS, DATED, FALSE_PREMISES, WORDINGS

Row = dict[str, Any]
YEARS = range(1995, 2025)  # of dated documents: later than every year the world tells of


class Asker:
    """Makes rows about one world; every method draws once, and returns None where the draw is no good."""

    def __init__(self, world: World, max_facts: int | None) -> None:
        self.world, self.articles = world, Articles(world, max_facts)
        self.chains = Chains(world, self.articles)

    def chain(self, dice: Dice, answer: str, n: int, gap: int | None = None) -> Row | None:
        """What n facts lead to: the mayor of the town where the founder of X was born."""
        facts = self.chains.draw(dice, answer, n, gap)
        if facts is None:
            return None
        name = self.called(self.world.entities[facts[0].subject], dice)
        question, hops = self.question(dice, name, [f.relation for f in facts]), self.hops(facts, name)
        told = [s for f in facts for s in self.answers(f)]
        if _any_in(told, question):
            return None
        more = {} if gap is None else {"memory_answers": self.answers(facts[-1])}
        return _row(question, [] if more else self.answers(facts[-1]), facts, hops, **more)

    def missing(self, dice: Dice, answer: str) -> Row | None:
        n = 1 + dice.below(2)
        return self.chain(dice, answer, n, gap=dice.below(n))

    def false_premise(self, dice: Dice, relation: str) -> Row | None:
        entity = dice.pick(self.world.by_type[dice.pick(FALSE_PREMISES[relation])])
        name = self.called(entity, dice)
        able = self.world.by_type[RELATIONS[relation].subject]
        if any(name in surfaces(other) for other in able):  # a river may be called as a town is, and has a length
            return None
        hop = {"query": WORDINGS[relation].query.format(s=name), "answer": None, "gold_ids": []}
        row = _row(self.question(dice, name, [relation]), [], [], [hop])
        return {**row, "relations": [relation]}

    def comparison(self, dice: Dice, relation: str) -> Row | None:
        """The value of the greater (or smaller) of two: both documents are needed, guessing a name is no use."""
        facts = self.chains.of_relation.get(relation, [])
        pair = [dice.pick(facts), dice.pick(facts)] if facts else []
        places = [p for f in pair for p in self.articles.stating(f)]
        if not pair or pair[0].value == pair[1].value or len(set(places)) < len(places):
            return None
        wording, more = COMPARISONS[relation], dice.chance(0.5)
        names = [self.called(self.world.entities[f.subject], dice) for f in pair]
        template = dice.pick(wording.asks[self.world.templates])
        question = template.format(a=names[0], b=names[1], w=wording.more if more else wording.less)
        answer = sorted(pair, key=_size)[more]
        if _any_in([f.value for f in pair], question):
            return None
        hops = [hop for f, name in zip(pair, names, strict=True) for hop in self.hops([f], name)]
        return {**_row(_capital(question), [answer.value], pair, hops), "relations": [relation]}

    def counterfactual(self, dice: Dice, answer: str) -> Row | None:
        changed = self.changed(dice, answer)
        if changed is None:
            return None
        row, old, new, _, altered = changed
        row["hops"][0]["answer"] = self.shown(new, altered.text)
        return {
            **row,
            "answers": self.answers(new),
            "documents": [asdict(altered)],
            "memory_answers": self.answers(old),
        }

    def conflict(self, dice: Dice, answer: str) -> Row | None:
        changed = self.changed(dice, answer)
        if changed is None:
            return None
        row, *facts, original, altered = changed
        first = dice.below(len(YEARS) - 1)
        years = [YEARS[first], YEARS[first + 1 + dice.below(len(YEARS) - 1 - first)]]
        newer = dice.below(2)  # whether the altered one is
        years = years if newer else years[::-1]
        pages = [
            replace(page, text=f"{said.format(year=year)} {page.text}", metadata={**page.metadata, "year": year})
            for page, year in zip((original, altered), years, strict=True)
            for said in [dice.pick(DATED[self.world.templates])]
        ]
        pages[1] = replace(pages[1], id=f"{altered.id}@{years[1]}")
        gold, fact = [pages[newer].id], facts[newer]
        hop = {**row["hops"][0], "answer": self.shown(fact, pages[newer].text), "gold_ids": gold}
        told = {"answers": self.answers(fact), "stale_answers": self.answers(facts[1 - newer])}
        return {**row, **told, "gold_ids": gold, "hops": [hop], "documents": [asdict(p) for p in pages]}

    def changed(self, dice: Dice, answer: str) -> tuple[Row, Fact, Fact, Document, Document] | None:
        """A row of one hop, its fact, another fact in its place, and the only document that states either."""
        row_facts = self.chains.draw(dice, answer, 1)
        if row_facts is None or row_facts[0].where != "subject":
            return None
        old = row_facts[0]
        other = dice.pick(self.chains.of_relation[old.relation])
        new = replace(old, object=other.object, value=other.value)
        name = self.called(self.world.entities[old.subject], dice)
        question = self.question(dice, name, [old.relation])
        articles = Articles(self.world, self.articles.max_facts, self.articles.without, {old.id: new})
        place = self.articles.stating(old)[0]
        original, altered = self.articles.document(place), articles.document(place)
        ours, theirs = self.answers(old), self.answers(new)
        mixed = _any_in(theirs, original.title + " " + original.text) or _any_in(
            ours, altered.title + " " + altered.text
        )
        if mixed or new.object == old.subject or _any_in(ours + theirs, question):
            return None
        return _row(question, ours, [old], self.hops([old], name)), old, new, original, altered

    def called(self, entity: Entity, dice: Dice) -> str:
        """What a question calls it: its alias one time in four, where it has one."""
        return entity.alias if entity.alias and dice.chance(0.25) else entity.mention

    def question(self, dice: Dice, name: str, relations: Sequence[str]) -> str:
        *inner, last = relations
        for relation in inner:
            name = dice.pick(WORDINGS[relation].phrases[self.world.templates]).format(s=name)
        return _capital(dice.pick(WORDINGS[last].asks[self.world.templates]).format(s=name))

    def hops(self, facts: list[Fact], name: str) -> list[Row]:
        """The searches that lead there, each speaking of its subject as the document before did."""
        hops: list[Row] = []
        for fact in facts:
            places = self.articles.stating(fact)
            query = WORDINGS[fact.relation].query.format(s=name)
            if not places:
                return [*hops, {"query": query, "answer": None, "gold_ids": []}]
            shown = self.shown(fact, self.articles.document(places[0]).text)
            hops.append({"query": query, "answer": shown, "gold_ids": [self.articles.id(p) for p in places]})
            if fact.object is not None:
                entity = self.world.entities[fact.object]
                name = shown if shown == entity.alias else entity.mention
        return hops

    def answers(self, fact: Fact) -> list[str]:
        return [fact.value] if fact.object is None else surfaces(self.world.entities[fact.object])

    def shown(self, fact: Fact, text: str) -> str:
        """The fact's object as the text names it."""
        found = [s for s in self.answers(fact) if _any_in([s], text)]
        assert found, f"{fact} is not in {text!r}"
        return found[0]


def _row(question: str, answers: list[str], facts: list[Fact], hops: list[Row], **more: Any) -> Row:
    gold = [hop["gold_ids"][0] for hop in hops] if answers else []
    row = {"question": question, "answers": answers, "answerable": bool(answers), "gold_ids": gold, "hops": hops}
    return {**row, "relations": [f.relation for f in facts], **more}


def _any_in(names: list[str], text: str) -> bool:
    """Whether one of the names stands in the text as whole words."""
    return any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text, re.IGNORECASE) for name in names)


def _capital(question: str) -> str:
    return question[0].upper() + question[1:]


def _size(fact: Fact) -> tuple[int, ...]:
    """What values of a compared relation are ordered by: "9 May 1901" by year, month, day; others by their number."""
    words = fact.value.split()
    if len(words) == 3:
        return int(words[2]), VALUES["month"].index(words[1]), int(words[0])
    return (int(words[0]),)
