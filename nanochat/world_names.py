"""Who lives in the invented world: entities, and names from a syllable grammar in which no two splits share a word.

Only `random.Random(text).random()` is drawn from: Python keeps that sequence from version to version, and choices made
from it here do not depend on how `choice` or `shuffle` are written there, nor on the hash seed.
"""

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from nanochat.world_text import CYCLE

T = TypeVar("T")
Split = Literal["train", "val", "test"]
SPLIT_OF_TENTH: tuple[Split, ...] = ("train",) * 8 + ("val", "test")
ONSETS = ("b", "br", "d", "dr", "f", "g", "gr", "h", "j", "k", "l", "m", "n", "p", "r", "s", "st", "t", "tr", "v")
CODAS = ("l", "m", "n", "nd", "r", "rk", "s", "sk", "th", "x")
VOWELS = "aeiou"
NAMES = {
    "town": ("{}",),
    "river": ("{} River",),
    "firm": ("{} Works", "{} and Sons", "{} Trading Company", "{} Mills"),
    "guild": ("{} Guild", "{} Brotherhood", "{} Society"),
    "dish": ("{} stew", "{} bread", "{} pie", "{} soup", "{} cake"),
    "book": ("The Song of {}", "Letters from {}", "The House of {}", "The Road to {}", "A Winter in {}"),
}


@dataclass(frozen=True)
class Entity:
    """One thing of the world. `title` is unique; `name` is shared by homonyms, which differ in type."""

    id: int
    type: str
    name: str
    title: str
    mention: str  # as written inside a sentence: "the Sorl River"
    alias: str | None
    pronoun: Literal["she", "he", "it"]


class Dice:
    """Choices built on random() alone; seeded by text, so a document's choices do not depend on other documents."""

    def __init__(self, *seed: object) -> None:
        self.random = random.Random("/".join(map(str, seed))).random

    def below(self, n: int) -> int:
        return int(self.random() * n)

    def chance(self, p: float) -> bool:
        return self.random() < p

    def pick(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        keys = [self.random() for _ in items]
        return [items[i] for i in sorted(range(len(items)), key=keys.__getitem__)]


def name_split(core: str) -> Split:
    """The one split that may use an invented word."""
    return SPLIT_OF_TENTH[zlib.crc32(core.encode()) % 10]


def make_entities(dice: Dice, n: int, split: Split) -> list[Entity]:
    persons = n * CYCLE.count("person") // len(CYCLE)
    given = [_core(dice, split) for _ in range(max(20, persons // 20))]
    families = [_core(dice, split) for _ in range(max(20, persons // 3))]
    entities: list[Entity] = []
    taken: set[str] = set()
    towns: list[str] = []
    for i in range(n):
        kind = CYCLE[i % len(CYCLE)]
        entity = None
        while entity is None or entity.title in taken or entity.alias in taken:
            person = f"{dice.pick(given)} {dice.pick(families)}" if kind == "person" else ""
            entity = _entity(i, kind, dice, split, person, towns)
        taken |= {entity.title} | ({entity.alias} if entity.alias else set())
        if kind == "town":
            towns.append(entity.name)
        entities.append(entity)
    return entities


def _entity(i: int, kind: str, dice: Dice, split: Split, person: str, towns: list[str]) -> Entity:
    """A fresh entity. One in 20 of the others carries a town's name; one in five has an alias."""
    alias = _core(dice, split) if dice.chance(0.2) else None
    if kind == "person":
        return Entity(i, kind, person, person, person, alias, "she" if dice.chance(0.5) else "he")
    if kind != "town" and towns and dice.chance(0.05):
        name = dice.pick(towns)
        return Entity(i, kind, name, f"{name} ({kind})", f"the {kind} {name}", alias, "it")
    name = dice.pick(NAMES[kind]).format(_core(dice, split))
    mention = f"the {name}" if kind in ("river", "guild") else name
    return Entity(i, kind, name, name, mention, alias, "it")


def _core(dice: Dice, split: Split) -> str:
    """An invented word of this split: two short syllables mostly, so two to four BPE tokens."""
    while True:
        syllables = [dice.pick(ONSETS) + dice.pick(VOWELS) for _ in range(3 if dice.chance(0.25) else 2)]
        word = ("".join(syllables) + dice.pick(CODAS)).capitalize()
        if name_split(word) == split:
            return word
