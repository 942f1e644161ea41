"""Which documents a world is written down in, which of them state a fact, and chains of facts to ask about."""

import zlib
from collections.abc import Collection, Iterator, Mapping

from nanochat.config import UserError
from nanochat.retrieval.document import Document
from nanochat.world import VERSION, Fact, World
from nanochat.world_names import Dice, Entity
from nanochat.world_text import RELATIONS

Place = tuple[int, int]  # an entity and the number of a part of its article, from 0


def held_back(world: World) -> frozenset[int]:
    """Ids of one in ten facts of relations with one value: questions of kind "missing" ask for them.

    The documents leave them out, whatever rows are drawn, so that one knowledge base serves all rows of a world.
    """
    ids = (f.id for f in world.facts if not RELATIONS[f.relation].many)
    return frozenset(i for i in ids if zlib.crc32(f"{VERSION}/{world.seed}/{world.split}/{i}".encode()) % 10 == 0)


class Articles:
    """The documents of a world, one or several short ones for each entity, each made when asked for.

    max_facts: a document states at most so many facts (and names its subject); None: one document for each entity.
    without: ids of facts no document states; None: those held back. instead: {id: altered fact}, stated in place of the
    true one. Which facts share a document depends on neither, so a changed fact changes only documents that state it.
    """

    def __init__(
        self,
        world: World,
        max_facts: int | None = None,
        without: Collection[int] | None = None,
        instead: Mapping[int, Fact] | None = None,
    ) -> None:
        if max_facts is not None and max_facts < 1:
            raise UserError(f"max_facts={max_facts}: expected at least 1, or none to leave articles whole")
        self.world, self.max_facts = world, max_facts
        self.without = held_back(world) if without is None else frozenset(without)
        self.instead = dict(instead or {})
        self.moved: dict[int, list[int]] = {}  # entity -> altered facts that its article tells now
        for fact in self.instead.values():
            if fact.object is not None and fact.where != "subject" and fact.object != world.facts[fact.id].object:
                self.moved.setdefault(fact.object, []).append(fact.id)

    def parts(self, entity: int) -> list[list[int]]:
        """Fact ids of each document about the entity, those left out included."""
        own = [f.id for f in self.world.facts_of(entity) if f.where != "object"]
        ids = own + [f.id for f in self.world.facts_about(entity) if f.where != "subject"]
        moved = self.moved.get(entity, [])
        if self.max_facts is None:
            return [ids + moved]
        ids = Dice(VERSION, self.world.seed, self.world.split, "parts", entity).shuffled(ids) + moved
        n = max(1, -(-len(ids) // self.max_facts))  # as few documents as it takes, their facts as equal as can be
        size, longer = divmod(len(ids), n)
        ends = [(i + 1) * size + min(i + 1, longer) for i in range(n)]
        return [ids[a:b] for a, b in zip([0, *ends], ends, strict=False)]

    def id(self, place: Place) -> str:
        entity, part = place
        behind = "" if self.max_facts is None else f"/{part + 1}"
        return f"{self.world.split}{self.world.seed}-{entity}{behind}"

    def document(self, place: Place) -> Document:
        entity, part = place
        return self._write(place, self.parts(entity)[part])

    def about(self, entity: int) -> Iterator[Document]:
        """The entity's documents; one from which every fact is left out is not written, except the first."""
        for part, ids in enumerate(self.parts(entity)):
            if part == 0 or not self.without.issuperset(ids):
                yield self._write((entity, part), ids)

    def stating(self, fact: Fact) -> list[Place]:
        """Where a true fact is stated, the subject's own article first; nowhere when it is left out."""
        if fact.id in self.without:
            return []
        homes = [fact.subject] if fact.where != "object" else []
        if fact.object is not None and fact.where != "subject":
            homes.append(fact.object)
        return [(home, part) for home in homes for part, ids in enumerate(self.parts(home)) if fact.id in ids]

    def _write(self, place: Place, ids: list[int]) -> Document:
        entity, stated = place[0], set(ids) - self.without
        others = {f.id for f in (*self.world.facts_of(entity), *self.world.facts_about(entity))} - stated
        instead = {i: self.instead[i] for i in ids if i in self.instead}
        page = self.world.article(entity, others | (set(ids) & self.without), instead)
        return Document(self.id(place), page.text, page.title, {"facts": list(page.facts), "entity": entity})


class Chains:
    """Facts to ask about, drawn so that every kind of answer comes equally often."""

    def __init__(self, world: World, articles: Articles) -> None:
        self.world, self.articles = world, articles
        self.gone = held_back(world)
        asked = [f for f in world.facts if self.askable(f)]
        self.known = _by_answer([f for f in asked if f.id not in self.gone])
        self.missing = _by_answer([f for f in asked if f.id in self.gone])
        self.of_relation: dict[str, list[Fact]] = {}
        for fact in (f for facts in self.known.values() for f in facts):
            self.of_relation.setdefault(fact.relation, []).append(fact)

    def askable(self, fact: Fact) -> bool:
        """One value only, and told under a known name: another's article may say an alias it does not explain."""
        told_alone = fact.where == "subject" or self.world.entities[fact.subject].alias is None
        return told_alone and not RELATIONS[fact.relation].many

    def draw(self, dice: Dice, answer: str, n: int, gap: int | None = None) -> list[Fact] | None:
        """n facts, the object of each the subject of the next, the last one's object of the given kind.

        gap: place of the one fact that is held back; all others are known. None when the draw leads nowhere: no chain
        goes on, it comes back to where it was, or one document states two facts of it, so that fewer would do.
        """
        pool = (self.missing if gap == n - 1 else self.known).get(answer)
        chain = [dice.pick(pool)] if pool else []
        while chain and len(chain) < n:
            held = gap == n - 1 - len(chain)
            before = [
                f for f in self.world.facts_about(chain[0].subject) if self.askable(f) and (f.id in self.gone) == held
            ]
            if not before:
                return None
            chain.insert(0, dice.pick(before))
        seen = [f.subject for f in chain] + [f.object for f in chain[-1:] if f.object is not None]
        places = [p for f in chain for p in self.articles.stating(f)]
        return chain if chain and len(set(seen)) == len(seen) and len(set(places)) == len(places) else None


def _by_answer(facts: list[Fact]) -> dict[str, list[Fact]]:
    """By kind of answer: a type of entity, or of value."""
    found: dict[str, list[Fact]] = {}
    for fact in facts:
        found.setdefault(RELATIONS[fact.relation].object, []).append(fact)
    return found


def surfaces(entity: Entity) -> list[str]:
    """Every way a text may name it, without "the": "Lefatrim", "river Lefatrim", its alias."""
    return list(dict.fromkeys(s for s in (entity.name, entity.mention.removeprefix("the "), entity.alias) if s))
