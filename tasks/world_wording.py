"""How questions about the invented world are worded, for train (and val) worlds and, in other words, for test worlds.

Data only. {s} is a name or a phrase that describes one thing ("the town where X was born"), so wordings nest.
"""

from dataclasses import dataclass

from nanochat.world_more import MORE_ASKS
from nanochat.world_text import wordings
from tasks.world_questions import QUESTIONS


@dataclass(frozen=True)
class Wording:
    """asks: whole questions. phrases: what describes the object, none for a date, number or word. query: for a search.

    asks and phrases are by templates: "train", "many" or "test".
    """

    asks: dict[str, tuple[str, ...]]
    phrases: dict[str, tuple[str, ...]]
    query: str


def _wording(relation: str, query: str, train: str, test: str, of_train: str = "", of_test: str = "") -> Wording:
    """train, test: questions, in train beside the one of QUESTIONS. of_train, of_test: phrases."""
    many = (QUESTIONS[relation], *MORE_ASKS[relation], *wordings(train))
    asks = {"train": (QUESTIONS[relation], *wordings(train)), "many": many, "test": wordings(test)}
    return Wording(asks, {"train": wordings(of_train), "many": wordings(of_train), "test": wordings(of_test)}, query)


WORDINGS: dict[str, Wording] = {
    "born_in": _wording(
        "born_in", "where was {s} born",
        "What is the birthplace of {s}?",
        "In which place was {s} brought into the world? | Which town is {s} a native of?",
        "the town where {s} was born | the birthplace of {s}",
        "the town that {s} is a native of | the place of birth of {s}",
    ),
    "birth_date": _wording(
        "birth_date", "date on which {s} was born",
        "What is the date of birth of {s}?",
        "On what day, month and year was {s} born? | Which date is given for the birth of {s}?",
    ),
    "lives_in": _wording(
        "lives_in", "where does {s} live",
        "Where does {s} live?",
        "Which town is home to {s}? | Where does {s} reside?",
        "the town where {s} lives | the town in which {s} has a home",
        "the place where {s} resides | the town that is home to {s}",
    ),
    "trade": _wording(
        "trade", "trade of {s}",
        "What does {s} do for a living?",
        "What is the occupation of {s}? | Which calling does {s} follow?",
    ),
    "employer": _wording(
        "employer", "employer of {s}",
        "Which firm does {s} work for?",
        "Who pays the wages of {s}? | Which business has {s} on its staff?",
        "the employer of {s} | the firm that {s} works for",
        "the company that pays {s} | the business that has {s} on its staff",
    ),
    "teacher": _wording(
        "teacher", "teacher of {s}",
        "Who taught {s}?",
        "Under whom did {s} train? | Whose pupil was {s}?",
        "the teacher of {s} | the person who taught {s}",
        "the person who trained {s} | the one whose pupil {s} was",
    ),
    "favourite_dish": _wording(
        "favourite_dish", "favourite dish of {s}",
        "Which dish does {s} like best?",
        "What does {s} most like to eat? | Which food does {s} prefer to all others?",
        "the favourite dish of {s} | the dish that {s} likes best",
        "the food that {s} prefers to all others | the meal that {s} loves most",
    ),
    "on_river": _wording(
        "on_river", "river on which {s} stands",
        "Which river runs through {s}?",
        "What is the name of the river at {s}? | Along which water does {s} sit?",
        "the river on which {s} stands | the river that runs through {s}",
        "the river that passes {s} | the water along which {s} sits",
    ),
    "founded": _wording(
        "founded", "year in which {s} was founded",
        "When was {s} founded?",
        "From what year does {s} date? | In what year did the history of {s} start?",
    ),
    "mayor": _wording(
        "mayor", "mayor of {s}",
        "Who serves as mayor of {s}?",
        "Who governs {s} as mayor? | By whom is the office of mayor held in {s}?",
        "the mayor of {s} | the person who serves as mayor of {s}",
        "the one who governs {s} as mayor | the holder of the office of mayor in {s}",
    ),
    "population": _wording(
        "population", "population of {s}",
        "What is the population of {s}?",
        "How many inhabitants does {s} count? | How many souls are there in {s}?",
    ),
    "market_day": _wording(
        "market_day", "market day in {s}",
        "When does {s} hold its market?",
        "Which weekday is market day in {s}? | On what day do the stalls of {s} open?",
    ),
    "seat": _wording(
        "seat", "where is {s} based",
        "In which town does {s} have its headquarters?",
        "From which town is {s} run? | Which town is the seat of {s}?",
        "the town where {s} is based | the town where {s} has its headquarters",
        "the town from which {s} is run | the seat of {s}",
    ),
    "founder": _wording(
        "founder", "founder of {s}",
        "Who set up {s}?",
        "Who brought {s} into being? | To whom does {s} owe its beginning?",
        "the founder of {s} | the person who set up {s}",
        "the one who brought {s} into being | the person to whom {s} owes its beginning",
    ),
    "staff": _wording(
        "staff", "people employed by {s}",
        "How many people does {s} employ?",
        "How many names are on the payroll of {s}? | To how many people does {s} give work?",
    ),
    "length": _wording(
        "length", "length of {s}",
        "What is the length of {s}?",
        "How far does {s} run from beginning to end? | What distance does {s} cover?",
    ),
    "mouth": _wording(
        "mouth", "river into which {s} flows",
        "Which river does {s} empty into?",
        "Which river receives {s}? | Which river does {s} join?",
        "the river into which {s} flows | the river that {s} empties into",
        "the river that receives {s} | the river that {s} joins",
    ),
    "source": _wording(
        "source", "source of {s}",
        "Where is the source of {s}?",
        "Which hills give birth to {s}? | In what high ground does {s} begin?",
    ),
    "hall": _wording(
        "hall", "where is the hall of {s}",
        "Where is the hall of {s}?",
        "Which town houses {s}? | Where does {s} gather?",
        "the town where {s} meets | the town where {s} has its hall",
        "the town that houses {s} | the place where {s} gathers",
    ),
    "master": _wording(
        "master", "master of {s}",
        "Who leads {s}?",
        "Who presides over {s}? | Who stands at the head of {s}?",
        "the master of {s} | the person who leads {s}",
        "the one who presides over {s} | the head of {s}",
    ),
    "colour": _wording(
        "colour", "colour of {s}",
        "Which colour does {s} wear?",
        "By what colour is {s} known? | What colour are the coats of {s}?",
    ),
    "origin": _wording(
        "origin", "town {s} comes from",
        "Where was {s} first cooked?",
        "Which town gave {s} to the world? | In what place does {s} have its origin?",
        "the town from which {s} comes | the town where {s} was first cooked",
        "the town that gave {s} to the world | the place of origin of {s}",
    ),
    "inventor": _wording(
        "inventor", "inventor of {s}",
        "Who was the first to cook {s}?",
        "Who devised {s}? | To whom is {s} owed?",
        "the inventor of {s} | the person who first cooked {s}",
        "the one who devised {s} | the person to whom {s} is owed",
    ),
    "author": _wording(
        "author", "author of {s}",
        "Who is the author of {s}?",
        "From whose pen did {s} come? | Who is the writer of {s}?",
        "the author of {s} | the person who wrote {s}",
        "the writer of {s} | the one from whose pen {s} came",
    ),
    "published": _wording(
        "published", "year in which {s} was published",
        "When did {s} first appear?",
        "What year saw the first edition of {s}? | In what year did {s} reach the shops?",
    ),
    "setting": _wording(
        "setting", "town in which {s} is set",
        "Where does the story of {s} take place?",
        "Which town is the scene of {s}? | Where do the events of {s} happen?",
        "the town where {s} is set | the town in which the story of {s} takes place",
        "the scene of {s} | the town where the events of {s} happen",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """Of two things {a} and {b}, the value of the {w} one. less, more: {w} for the smaller and the larger value."""

    less: str
    more: str
    asks: dict[str, tuple[str, ...]]


def _compare(less: str, more: str, train: str, test: str) -> Comparison:
    return Comparison(less, more, {"train": wordings(train), "many": wordings(train), "test": wordings(test)})


COMPARISONS = {
    "length": _compare(
        "shorter", "longer",
        "How long is the {w} of {a} and {b}? | What is the length of the {w} river, {a} or {b}?",
        "Of {a} and {b}, what does the {w} one measure? | Take the {w} of {a} and {b}: how far does it run?",
    ),
    "population": _compare(
        "smaller", "larger",
        "How many people live in the {w} of {a} and {b}? | What is the population of the {w} town, {a} or {b}?",
        "Of {a} and {b}, how many souls does the {w} one count? | Take the {w} of {a} and {b}: how many live there?",
    ),
    "staff": _compare(
        "smaller", "larger",
        "How many people work at the {w} of {a} and {b}? | How many people does the {w} firm employ, {a} or {b}?",
        "Of {a} and {b}, to how many does the {w} one give work? | The {w} of {a} and {b} has how many on its payroll?",
    ),
    "founded": _compare(
        "older", "younger",
        "In which year was the {w} of {a} and {b} founded? | When was the {w} town founded, {a} or {b}?",
        "Of {a} and {b}, from what year does the {w} one date? | The {w} of {a} and {b} dates from what year?",
    ),
    "published": _compare(
        "older", "newer",
        "In which year was the {w} of {a} and {b} published? | When did the {w} book first appear, {a} or {b}?",
        "Of {a} and {b}, what year saw the {w} one in print? | Take the {w} of {a} and {b}: from what year is it?",
    ),
    "birth_date": _compare(
        "elder", "younger",
        "On which date was the {w} of {a} and {b} born? | What is the date of birth of the {w} person, {a} or {b}?",
        "Of {a} and {b}, which date is given for the birth of the {w}? | The {w} of {a} and {b} has what birthday?",
    ),
}  # fmt: skip

# relation: types it makes no sense for, where no relation of theirs would pass for an answer (a dish has no author,
# but it has an inventor: dish is not listed under author)
FALSE_PREMISES: dict[str, tuple[str, ...]] = {
    relation: tuple(types.split())
    for relation, types in {
        "mayor": "river dish book firm guild",
        "market_day": "river dish book firm",
        "population": "river dish book",
        "length": "town guild firm",
        "mouth": "town guild firm",
        "source": "town guild firm",
        "employer": "town river dish",
        "teacher": "town river firm",
        "birth_date": "firm river dish",
        "trade": "river dish book",
        "favourite_dish": "town river firm guild",
        "author": "town river guild",
        "published": "town river guild person",
        "inventor": "town river person",
        "master": "river dish book",
        "colour": "river firm book dish",
        "staff": "river dish book",
        "hall": "river dish book",
    }.items()
}

# how a document says when it was written
DATED = {
    **dict.fromkeys(("train", "many"), ("Written in {year}.", "As of {year}.", "This page is from {year}.")),
    "test": ("Last revised in {year}.", "State of {year}."),
}
