"""A small invented world (people, towns, rivers, firms, guilds, dishes, books), written down as short English articles.

Every fact has an id and every document lists the facts it states, so questions put on top have exact answers and exact
evidence. Nothing is downloaded and nothing exists in any corpus. Close relatives: bAbI (1502.05698), PhantomWiki
(2502.20377). Splits never share a name: a name belongs to train, val or test by its checksum, whatever the seed. The
test split is also phrased with templates that train and val never use.

    world = World(seed=0, n_entities=1000)
    world.entities[0].title, world.facts_of(0), next(world.documents()).page
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nanochat.world_more import MORE_CLAUSES
from nanochat.world_names import Dice, Entity, Split, make_entities
from nanochat.world_text import CYCLE, INTROS, LEADS, LINKS, RELATIONS, VALUES, Relation

Where = Literal["subject", "object", "both"]
Templates = Literal["train", "many", "test"]
Forms = tuple[str, str, str]  # nominative, possessive, objective
VERSION = 1  # raise when the same arguments give other text: results name it
WHERE: tuple[Where, ...] = ("subject", "subject", "subject", "both", "object")
PRONOUNS = {"she": ("she", "her", "her"), "he": ("he", "his", "him"), "it": ("it", "its", "it")}


@dataclass(frozen=True)
class Fact:
    """`value` is the answer as text; `object` is its entity, None for a date, number or word."""

    id: int
    subject: int
    relation: str
    object: int | None
    value: str
    where: Where  # whose article states it


@dataclass(frozen=True)
class WorldDocument:
    """`entity`: whom it is about (the first one, for a tale). `facts`: ids of every fact the text states.

    `text` is the body without the title; `page` is both, the way a language model reads it.
    """

    id: str
    title: str
    text: str
    entity: int
    facts: tuple[int, ...]

    @property
    def page(self) -> str:
        return f"{self.title}\n\n{self.text}"


class World:
    """Entities, facts and documents, all a function of (seed, n_entities, split, templates).

    seed: any int. n_entities: at least 20 (one round of all seven types).
    templates: "train" or "test" wordings, or "many": those of train and further ones (nanochat/world_more.py). By
    default test wordings for the test split only.
    """

    def __init__(
        self,
        seed: int,
        n_entities: int,
        split: Split = "train",
        templates: Templates | None = None,
    ) -> None:
        if split not in ("train", "val", "test"):
            raise ValueError(f"split={split!r}: expected train, val or test")
        if n_entities < len(CYCLE):
            raise ValueError(f"n_entities={n_entities}: a world needs at least {len(CYCLE)}, one round of every type")
        self.seed, self.split = seed, split
        self.templates: Templates = templates or ("test" if split == "test" else "train")
        self.entities = make_entities(Dice(VERSION, seed, split, "entities"), n_entities, split)
        self.by_type: dict[str, list[Entity]] = {
            t: [e for e in self.entities if e.type == t] for t in dict.fromkeys(CYCLE)
        }
        self.facts = self._make_facts(Dice(VERSION, seed, split, "facts"))
        self._of: dict[int, list[Fact]] = {e.id: [] for e in self.entities}
        self._about: dict[int, list[Fact]] = {e.id: [] for e in self.entities}
        for fact in self.facts:
            self._of[fact.subject].append(fact)
            if fact.object is not None:
                self._about[fact.object].append(fact)

    def facts_of(self, entity: int, relation: str | None = None) -> list[Fact]:
        """Facts whose subject is `entity`, of one relation or of all."""
        return [f for f in self._of[entity] if relation in (None, f.relation)]

    def facts_about(self, entity: int, relation: str | None = None) -> list[Fact]:
        """Facts whose object is `entity`."""
        return [f for f in self._about[entity] if relation in (None, f.relation)]

    def documents(
        self, tales: int = 0, without: Collection[int] = (), instead: Mapping[int, Fact] | None = None
    ) -> Iterator[WorldDocument]:
        """One article for each entity, then `tales` documents that walk from one entity to the next.

        without: ids of facts no document may state. instead: {id: altered fact}, stated in place of the true one.
        """
        for entity in self.entities:
            yield self.article(entity.id, without, instead)
        for i in range(tales):
            yield self.tale(i, without, instead)

    def article(
        self, entity: int, without: Collection[int] = (), instead: Mapping[int, Fact] | None = None
    ) -> WorldDocument:
        """The article of one entity: an opening line, its own facts, then facts of others that are told here."""
        e, dice = self.entities[entity], Dice(VERSION, self.seed, self.split, "article", entity)
        writer = _Writer(self, dice)
        own, told = self._current(entity, without, instead or {})
        alias = dice.pick((" (also known as {})", " (sometimes called {})")).format(e.alias) if e.alias else ""
        writer.plain(dice.pick(INTROS[e.type]).format(n=e.mention + alias))
        for group in dice.shuffled(_groups([f for f in own if f.where != "object"])):
            writer.state(group, writer.reference(e), e.mention)
        for fact in dice.shuffled([f for f in told if f.where != "subject"]):
            name = self._spoken(fact.subject, dice)
            writer.state([fact], _by_name(name), name)
        return WorldDocument(f"{self.split}{self.seed}-{entity}", e.title, writer.text(), entity, writer.facts())

    def tale(
        self, index: int, without: Collection[int] = (), instead: Mapping[int, Fact] | None = None
    ) -> WorldDocument:
        """Follow facts from entity to entity for three to five steps, saying more about each on the way."""
        dice = Dice(VERSION, self.seed, self.split, "tale", index)
        writer = _Writer(self, dice)
        here = first = last = dice.pick(self.entities)
        for step in range(3 + dice.below(3)):
            facts = dice.shuffled(self._current(here.id, without, instead or {})[0])
            onward = [f for f in facts if f.object is not None]
            aside = [f for f in facts if f.object is None][: 1 + dice.below(2)]
            if step or not onward + aside:
                writer.plain(dice.pick(LINKS).format(n=here.mention))
            for i, fact in enumerate(aside + onward[:1]):
                writer.state([fact], writer.reference(here) if i or step else _by_name(here.mention), here.mention)
            if not onward:
                break
            assert onward[0].object is not None
            here = last = self.entities[onward[0].object]
        title = first.title if first == last else f"{first.title} and {last.title}"
        return WorldDocument(f"{self.split}{self.seed}-tale{index}", title, writer.text(), first.id, writer.facts())

    def _current(
        self, entity: int, without: Collection[int], instead: Mapping[int, Fact]
    ) -> tuple[list[Fact], list[Fact]]:
        """(facts of the entity, facts about it) once some are left out and some altered."""
        own = [instead.get(f.id, f) for f in self._of[entity] if f.id not in without]
        about = [f for f in self._about[entity] if f.id not in without and f.id not in instead]
        return own, about + [f for f in instead.values() if f.object == entity and f.id not in without]

    def _spoken(self, entity: int, dice: Dice) -> str:
        e = self.entities[entity]
        return e.alias if e.alias and dice.chance(0.25) else e.mention

    def _make_facts(self, dice: Dice) -> list[Fact]:
        """Each relation holds for 4 in 5 of its subjects; a many-valued one has one to three values."""
        facts: list[Fact] = []
        for e in self.entities:
            for rel in (r for r in RELATIONS.values() if r.subject == e.type and dice.chance(0.8)):
                for obj in self._objects(rel, e, 1 + dice.below(3) if rel.many else 1, dice):
                    entity = obj if isinstance(obj, Entity) else None
                    where = dice.pick(WHERE) if entity else "subject"
                    value = entity.name if entity else str(obj)
                    facts.append(Fact(len(facts), e.id, rel.name, entity.id if entity else None, value, where))
        return facts

    def _objects(self, rel: Relation, subject: Entity, n: int, dice: Dice) -> list[Any]:
        """n distinct objects, never the subject itself; fewer where the world is too small."""
        pool = self.by_type.get(rel.object)
        found: dict[Any, None] = {}
        for _ in range(20 * n):
            obj = dice.pick(pool) if pool else _value(rel.object, dice)
            if obj != subject:
                found[obj] = None
            if len(found) == n:
                break
        return list(found)


class _Writer:
    """Builds one document: clauses in order, the facts they state, paragraphs."""

    def __init__(self, world: World, dice: Dice) -> None:
        self.world, self.dice = world, dice
        self.clauses: list[tuple[str, bool]] = []  # (clause, whether it states a fact and may be joined to another)
        self.stated: list[int] = []

    def plain(self, clause: str) -> None:
        self.clauses.append((clause, False))

    def state(self, facts: list[Fact], subject: Forms, name: str) -> None:
        """One clause for facts that share subject and relation, speaking of the subject as given.

        `name` takes over where a pronoun would read badly ("the mayor of it").
        """
        rel = RELATIONS[facts[0].relation]
        objects = [f.value if f.object is None else self.world._spoken(f.object, self.dice) for f in facts]
        listed = objects[0] if len(objects) == 1 else ", ".join(objects[:-1]) + " and " + objects[-1]
        more = MORE_CLAUSES[rel.name] if self.world.templates == "many" else ()
        template = self.dice.pick(rel.test if self.world.templates == "test" else (*rel.train, *more))
        s, sp, so = _by_name(name) if "of {so}" in template else subject
        self.clauses.append((template.format(s=s, sp=sp, so=so, o=listed), True))
        self.stated += [f.id for f in facts]

    def reference(self, e: Entity) -> Forms:
        """How the entity just spoken of is called next: a pronoun mostly, its kind, or its name again."""
        roll = self.dice.random()
        if roll < 0.6:
            return PRONOUNS[e.pronoun]
        return _by_name(f"the {e.type}" if roll < 0.75 and e.type != "person" else e.mention)

    def text(self) -> str:
        """Paragraphs of three to five sentences; a sentence is one clause or two joined."""
        sentences, clauses = [], list(self.clauses)
        while clauses:
            clause, factual = clauses.pop(0)
            if factual and clauses and clauses[0][1] and self.dice.chance(0.2):
                clause += self.dice.pick((", and ", "; ")) + clauses.pop(0)[0]
            elif factual and self.dice.chance(0.12):
                clause = self.dice.pick(LEADS) + clause
            sentences.append(clause[0].upper() + clause[1:] + ".")
        paragraphs = []
        while sentences:
            n = 3 + self.dice.below(3)
            paragraphs.append(" ".join(sentences[:n]))
            sentences = sentences[n:]
        return "\n\n".join(paragraphs)

    def facts(self) -> tuple[int, ...]:
        return tuple(sorted(set(self.stated)))


def _by_name(name: str) -> Forms:
    return name, name + "'s", name


def _groups(facts: list[Fact]) -> list[list[Fact]]:
    """Facts of one relation together, in order of first appearance."""
    groups: dict[str, list[Fact]] = {}
    for f in facts:
        groups.setdefault(f.relation, []).append(f)
    return list(groups.values())


def _value(kind: str, dice: Dice) -> str:
    values = VALUES[kind]
    if isinstance(values, tuple):
        return dice.pick(values)
    low, high, form = values["low"], values["high"], values["form"]
    return form.format(n=low + dice.below(high - low), day=1 + dice.below(28), month=dice.pick(VALUES["month"]))
