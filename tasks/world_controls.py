"""Controls for questions about the invented world: what guessing reaches, other names, other questions' documents.

If accuracy holds with documents exchanged (`shuffled`), or changes with every name exchanged (`relabel`), a model
answers from something else than what it is given.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from nanochat.config import UserError
from nanochat.retrieval.document import Document
from nanochat.world import World
from nanochat.world_names import NAMES, Dice

T = TypeVar("T")
Row = dict[str, Any]
FORM_WORDS = {word for forms in NAMES.values() for form in forms for word in form.split()}  # "River", "and", "{}"


def guess_prior(rows: Sequence[Row]) -> float:
    """Accuracy of the best constant answer to each form of question, a form being the relation asked for last.

    No answer is one of the constants. Chosen on the rows themselves: an upper bound, loose where a form has few rows.
    """
    forms: dict[str, list[Row]] = {}
    for row in rows:
        forms.setdefault(row["relations"][-1], []).append(row)
    if not forms:
        raise UserError("no rows: give at least one")
    return sum(_best_constant(form) for form in forms.values()) / len(rows)


def _best_constant(rows: list[Row]) -> int:
    """How many rows it answers."""
    return max(Counter(answer for row in rows for answer in set(row["answers"] or [None])).values())


def invented_words(world: World) -> list[str]:
    """Every word that names something in this world and is in no dictionary, sorted."""
    names = [name for e in world.entities for name in (e.name, e.alias) if name]
    return sorted({word for name in names for word in name.split()} - FORM_WORDS)


def new_names(world: World, seed: int = 0) -> dict[str, str]:
    """{invented word: another of the same world}, one to one, no word kept: every entity changes its name."""
    order = Dice("new names", seed).shuffled(invented_words(world))
    return dict(zip(order, order[1:] + order[:1], strict=True))


class Shifted(Mapping[str, str]):
    """Every word's name is the word `shift` places after it in `order`, round and round: one to one, in no time."""

    def __init__(self, order: Sequence[str], place: Mapping[str, int], shift: int) -> None:
        """place: of each word in `order`."""
        self.order, self.place, self.shift = order, place, shift

    def __getitem__(self, word: str) -> str:
        return self.order[(self.place[word] + self.shift) % len(self.order)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.order)

    def __len__(self) -> int:
        return len(self.order)

    @property
    def back(self) -> "Shifted":
        """What undoes it."""
        return Shifted(self.order, self.place, -self.shift)


class Names:
    """The ways to exchange these words for each other."""

    def __init__(self, words: Sequence[str], seed: int = 0) -> None:
        self.order = Dice("invented", seed).shuffled(words)
        self.place = {word: i for i, word in enumerate(self.order)}

    def draw(self, dice: Dice) -> Shifted:
        """One of them; empty where there are no words."""
        return Shifted(self.order, self.place, dice.below(len(self.order) or 1))


def relabel(thing: T, names: Mapping[str, str]) -> T:
    """The same rows, documents or text with every word that `names` has exchanged; ids stay.

    names = new_names(world); relabel(rows, names); (relabel(d, names) for d in world_documents(world))
    """
    changed: Any = thing
    if isinstance(thing, str):
        changed = re.sub(r"\w+", lambda match: names.get(match[0], match[0]), thing)
    elif isinstance(thing, Document):
        changed = replace(thing, title=relabel(thing.title, names), text=relabel(thing.text, names))
    elif isinstance(thing, dict):
        changed = {key: relabel(value, names) for key, value in thing.items()}
    elif isinstance(thing, list):
        changed = [relabel(value, names) for value in thing]
    return changed


def shuffled(rows: Sequence[Row], seed: int = 0) -> list[Row]:
    """Every row with the evidence (gold_ids, those of its hops, documents) of another row of its kind.

    The other row has as many hops, other answers and no document in common. UserError where there is none such.
    """
    found: list[Row] = []
    for i, row in enumerate(rows):
        order = Dice("shuffled", seed, i).shuffled(rows)
        other = next((r for r in order if _foreign(row, r)), None)
        if other is None:
            raise UserError(f"row {row['id']}: none of {len(rows)} rows can lend it documents: give more {row['kind']}")
        hops = [{**a, "gold_ids": b["gold_ids"]} for a, b in zip(row["hops"], other["hops"], strict=True)]
        lent = {key: other[key] for key in ("gold_ids", "documents") if key in other}
        found.append({**row, **lent, "hops": hops})
    return found


def _foreign(row: Row, other: Row) -> bool:
    alike = row["kind"] == other["kind"] and len(row["hops"]) == len(other["hops"]) and row is not other
    return alike and not set(row["answers"]) & set(other["answers"]) and not _evidence(row) & _evidence(other)


def _evidence(row: Row) -> set[str]:
    ids = {i for hop in row["hops"] for i in hop["gold_ids"]}
    return ids | {document["id"].partition("@")[0] for document in row.get("documents", [])}
