"""Questions about the invented world that the embedded pretraining text describes (nanochat/embedded.py, seed 0).

WorldChoice asks what the text says everywhere: what kind of thing a name is, what a weekday or a colour belongs to. The
wrong choices are of other kinds, so general knowledge of this world is enough; no single fact must be remembered.
WorldQA gives a short article and asks for one fact in it: reading, not remembering. Subjects belong to one split by
the checksum of their title, so test asks about things that train never asks about.
"""

import sys
from functools import lru_cache
from typing import Any

from nanochat.common import base_dir, read_json, write_json
from nanochat.dataset import DatasetConfig
from nanochat.embedded import BYTES_PER_ENTITY, MAX_ENGLISH, english_documents
from nanochat.world import VERSION, Fact, World
from nanochat.world_names import Dice
from nanochat.world_text import RELATIONS
from tasks.common import LETTERS, ChoiceTask, Task, check_split, choice_conversation, exchange, split_of

TRAIN_SIZE, TEST_SIZE = 8192, 512
QUESTIONS = {  # of the relations with one value
    "born_in": "Where was {s} born?",
    "birth_date": "On which date was {s} born?",
    "lives_in": "In which town does {s} live?",
    "trade": "What is the trade of {s}?",
    "employer": "Who is the employer of {s}?",
    "teacher": "Who was the teacher of {s}?",
    "favourite_dish": "What is the favourite dish of {s}?",
    "on_river": "On which river does {s} stand?",
    "founded": "In which year was {s} founded?",
    "mayor": "Who is the mayor of {s}?",
    "population": "How many people live in {s}?",
    "market_day": "On which day is the market in {s}?",
    "seat": "Where is {s} based?",
    "founder": "Who founded {s}?",
    "staff": "How many people work at {s}?",
    "length": "How long is {s}?",
    "mouth": "Into which river does {s} flow?",
    "source": "Where does {s} rise?",
    "hall": "In which town does {s} meet?",
    "master": "Who is the master of {s}?",
    "colour": "What is the colour of {s}?",
    "origin": "From which town does {s} come?",
    "inventor": "Who invented {s}?",
    "author": "Who wrote {s}?",
    "published": "In which year was {s} published?",
    "setting": "In which town is {s} set?",
}
CHOICE_THINGS = ("river", "firm", "guild", "dish")  # and CHOICE_VALUES: the kinds WorldChoice asks for
CHOICE_VALUES = ("weekday", "colour", "trade", "hills")
READING = ("trade", "year", "people", "weekday", "staff", "length", "hills", "colour")  # values WorldQA asks for
MORE = 7  # questions on the same choices in a training conversation: a letter is little to learn from
ANSWER = "The answer is"  # the value then follows a space, and is the same tokens as in the article


@lru_cache(maxsize=1)
def embedded_world() -> World:
    """make_world(), once in a process."""
    return make_world()


def make_world() -> World:
    """The world of the embedded pretraining text as `python -m nanochat.dataset` writes it by default.

    Its size depends on how much English this Python version brings; measuring that takes seconds, so the answer is
    kept in <base dir>/task_data/embedded_world.json.
    """
    made_of = {"megabytes": DatasetConfig.embedded_mb, "world_version": VERSION, "python": sys.version}
    path = base_dir() / "task_data" / "embedded_world.json"
    known: dict[str, Any] = read_json(path) if path.is_file() else {}
    if known.get("made_of") != made_of:
        budget = int(DatasetConfig.embedded_mb * 1e6)
        english = sum(len(t.encode()) for t in english_documents())
        assert english <= MAX_ENGLISH * budget, "only a sample of the English is used: count that"
        known = {"made_of": made_of, "n_entities": int((budget - english) / BYTES_PER_ENTITY)}
        write_json(path, known)
    return World(DatasetConfig.seed, known["n_entities"])


class WorldTask(Task):
    """world: by default the one the embedded text describes."""

    def __init__(self, split: str, world: World | None = None, **span: Any):
        super().__init__(**span)
        check_split(self.name, split)
        self.split, self.n = split, TRAIN_SIZE if split == "train" else TEST_SIZE
        self.world = world or embedded_world()
        mine = {e.id for e in self.world.entities if split_of(e.title) == split}
        self.things = [
            e for e in self.world.entities if e.id in mine and e.type in CHOICE_THINGS and "(" not in e.title
        ]
        self.facts = [f for f in self.world.facts if f.subject in mine and self.asks(f)]
        assert self.things and self.facts, f"a world of {len(self.world.entities)} has nothing to ask for in {split}"

    def asks(self, fact: Fact) -> bool:
        """Whether this fact may be the subject of a question."""
        return fact.relation in QUESTIONS

    def question(self, fact: Fact) -> str:
        return QUESTIONS[fact.relation].format(s=self.world.entities[fact.subject].mention)

    def size(self) -> int:
        return self.n


class WorldChoice(WorldTask, ChoiceTask):
    """Four choices of four kinds: things of a kind, and values of facts. Train goes on with more questions.

    Only kinds that their last word tells apart, so that a small model has a chance. The questions that follow are
    drawn anew each time: were each choice asked for once, the last answer would follow from the others.
    """

    name = "WorldChoice"

    def asks(self, fact: Fact) -> bool:
        return RELATIONS[fact.relation].object in CHOICE_VALUES and not RELATIONS[fact.relation].many

    def example(self, i: int) -> dict[str, Any]:
        dice = Dice(self.name, self.split, i)
        found: dict[str, tuple[str, str]] = {}  # kind -> question, choice
        while len(found) < 4:
            if dice.chance(0.75):
                thing = dice.pick(self.things)
                found.setdefault(thing.type, (f"Which of these is a {thing.type}?", thing.mention))
            else:
                fact = dice.pick(self.facts)
                found.setdefault(RELATIONS[fact.relation].object, (self.question(fact), fact.value))
        asked = list(found.values())
        shown = dice.shuffled([choice for _, choice in asked])
        conversation = choice_conversation(asked[0][0], shown, shown.index(asked[0][1]))
        for _ in range(MORE if self.split == "train" else 0):
            question, choice = dice.pick(asked)
            conversation["messages"] += exchange(question, LETTERS[shown.index(choice)])["messages"]
        return conversation


class WorldQA(WorldTask):
    """An article of a few sentences, and a question whose answer stands in it word for word; train asks all it can."""

    name = "WorldQA"
    kind = "generative"

    def asks(self, fact: Fact) -> bool:
        return _readable(fact)

    def example(self, i: int) -> dict[str, Any]:
        dice = Dice(self.name, self.split, i)
        fact = dice.pick(self.facts)
        world, subject = self.world, fact.subject
        facts = world.facts_of(subject)
        kept = [fact, *dice.shuffled([f for f in facts if f.relation != fact.relation])[:1]]
        left_out = {f.id for f in (*facts, *world.facts_about(subject))} - {f.id for f in kept}
        article = world.article(subject, without=left_out).text
        conversation = exchange(f"{article}\n\n{self.question(fact)}", f"{ANSWER} {fact.value}.")
        if self.split == "train":
            for other in filter(_readable, kept[1:]):
                conversation["messages"] += exchange(self.question(other), f"{ANSWER} {other.value}.")["messages"]
        return conversation

    def evaluate(self, conversation: dict[str, Any], completion: str) -> bool:
        return _bare(completion) == _bare(conversation["messages"][-1]["content"])


def _readable(fact: Fact) -> bool:
    """Whether a fact's value is a word, number or date: its subject's own article then states it as it is."""
    return RELATIONS[fact.relation].object in READING and not RELATIONS[fact.relation].many


def _bare(answer: str) -> str:
    return answer.strip().removeprefix(ANSWER).strip().rstrip(".")
