"""The words of the invented world: entity types, relations with their paraphrases, values, opening lines. Data only.

In a template {s} {sp} {so} are the subject as nominative, possessive and objective (a name, "the town" or a
pronoun) and {o} is the object, or a list of them where the relation is many-valued. Clauses
start in lower case and carry no full stop.
"""

from dataclasses import dataclass
from typing import Any


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# One round of types; entity i has type CYCLE[i % 20]. A type that others point at comes before them where it can.
CYCLE = _words(
    "person town firm person river dish person guild town person book firm person dish town person guild book "
    "firm person"
)


@dataclass(frozen=True)
class Relation:
    """subject: an entity type. object: an entity type, or a key of VALUES. many: it may hold for several objects."""

    name: str
    subject: str
    object: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    many: bool = False


def wordings(text: str) -> tuple[str, ...]:
    """ "this way | that way" -> both; "" -> none."""
    return tuple(text.split(" | ")) if text else ()


def _relation(name: str, subject: str, object: str, train: str, test: str, many: bool = False) -> Relation:
    return Relation(name, subject, object, wordings(train), wordings(test), many)


_ALL = (
    _relation(
        "born_in", "person", "town",
        "{s} was born in {o} | {s} came into the world in {o} | {sp} birthplace is {o} | {s} is a native of {o}",
        "{o} is the place where {s} was born | by birth {s} belongs to {o}",
    ),
    _relation(
        "birth_date", "person", "date",
        "{s} was born on {o} | {sp} date of birth is {o} | the parish book gives {sp} birth as {o}",
        "{o} was the day on which {s} was born | {sp} first day was {o}",
    ),
    _relation(
        "lives_in", "person", "town",
        "{s} lives in {o} | {sp} home is in {o} | {s} has a house in {o} | {s} settled in {o} long ago",
        "{o} is home to {so} | {s} resides in {o}",
    ),
    _relation(
        "trade", "person", "trade",
        "{s} works as a {o} | {s} is a {o} by trade | by profession {s} is a {o} | {s} earns a living as a {o}",
        "{sp} occupation is that of a {o} | {s} follows the calling of a {o}",
    ),
    _relation(
        "employer", "person", "firm",
        "{s} is employed by {o} | {s} works for {o} | {sp} employer is {o} | {s} holds a post at {o}",
        "{o} pays the wages of {so} | {s} is on the staff of {o}",
    ),
    _relation(
        "teacher", "person", "person",
        "{s} studied under {o} | {s} was taught by {o} | {o} taught {so} | {s} learned the craft from {o}",
        "{o} trained {so} | {s} was a pupil of {o}",
    ),
    _relation(
        "favourite_dish", "person", "dish",
        "{sp} favourite dish is {o} | {s} likes {o} more than any other meal | on feast days {s} always asks for {o}",
        "nothing pleases {so} at table like {o} | of all food {s} prefers {o}",
    ),
    _relation(
        "friend", "person", "person",
        "{s} is a friend of {o} | {s} often writes to {o} | {s} has long been close to {o}",
        "{s} keeps company with {o} | {sp} circle includes {o}", many=True,
    ),
    _relation(
        "on_river", "town", "river",
        "{s} stands on {o} | {s} lies beside {o} | {o} runs through {so} | {s} was built on the banks of {o}",
        "the water that passes {so} is {o} | {s} sits along {o}",
    ),
    _relation(
        "founded", "town", "year",
        "{s} was founded in {o} | settlers built {so} in {o} | {sp} history begins in {o}",
        "{o} is the year in which {s} was founded | {s} dates from {o}",
    ),
    _relation(
        "mayor", "town", "person",
        "{sp} mayor is {o} | {o} serves as mayor of {so} | {s} has {o} as its mayor",
        "{o} governs {so} as mayor | the office of mayor in {so} is held by {o}",
    ),
    _relation(
        "population", "town", "people",
        "{s} has {o} inhabitants | {o} people live in {so} | {sp} population is {o}",
        "{s} counts {o} souls | the last census found {o} people in {so}",
    ),
    _relation(
        "market_day", "town", "weekday",
        "the market in {so} is held on {o} | {s} holds its market every {o} | farmers come to {so} on {o} to sell",
        "{o} is market day in {so} | the stalls of {so} open on {o}",
    ),
    _relation(
        "trades_with", "town", "town",
        "{s} trades with {o} | {s} has old ties of trade with {o} | most goods sold in {so} come from {o}",
        "carts go back and forth between {so} and {o} | the merchants of {so} deal with {o}", many=True,
    ),
    _relation(
        "seat", "firm", "town",
        "{s} is based in {o} | {s} has its main office in {o} | the headquarters of {so} are in {o}",
        "{o} is the seat of {so} | {s} is run from {o}",
    ),
    _relation(
        "founder", "firm", "person",
        "{s} was founded by {o} | {o} set up {so} | {sp} founder was {o} | {s} was started by {o}",
        "{s} owes its beginning to {o} | {o} brought {so} into being",
    ),
    _relation(
        "staff", "firm", "staff",
        "{s} employs {o} people | {o} people work at {so} | {s} has a staff of {o}",
        "the payroll of {so} lists {o} people | {s} gives work to {o} people",
    ),
    _relation(
        "makes", "firm", "goods",
        "{s} makes {o} | {s} is known for its {o} | the workshops of {so} turn out {o} | {s} sells {o}",
        "{s} produces {o} | customers come to {so} for {o}", many=True,
    ),
    _relation(
        "length", "river", "length",
        "{s} is {o} long | from source to mouth {s} measures {o} | {sp} length is {o}",
        "{s} runs for {o} | {s} covers {o} in all",
    ),
    _relation(
        "mouth", "river", "river",
        "{s} flows into {o} | {s} ends where it meets {o} | the waters of {so} empty into {o}",
        "{s} joins {o} | {o} receives {so}",
    ),
    _relation(
        "source", "river", "hills",
        "{s} rises in the {o} | the source of {so} lies in the {o} | {s} springs from the {o}",
        "{s} has its beginning in the {o} | the {o} give birth to {so}",
    ),
    _relation(
        "hall", "guild", "town",
        "{s} meets in {o} | {s} has its hall in {o} | the hall of {so} stands in {o}",
        "{o} houses {so} | {s} gathers in {o}",
    ),
    _relation(
        "master", "guild", "person",
        "{sp} master is {o} | {s} is led by {o} | {o} heads {so} | {s} chose {o} as its master",
        "{o} presides over {so} | at the head of {so} stands {o}",
    ),
    _relation(
        "colour", "guild", "colour",
        "{s} wears {o} | {sp} colour is {o} | {sp} banner is {o}",
        "{o} is the colour of {so} | {s} is known by its {o} coats",
    ),
    _relation(
        "member", "guild", "person",
        "{s} counts {o} as members | among the members of {so} one finds {o} | {s} has admitted {o}",
        "{s} lists {o} on its roll | {s} opened its doors to {o}", many=True,
    ),
    _relation(
        "origin", "dish", "town",
        "{s} comes from {o} | {s} was first cooked in {o} | the home of {so} is {o}",
        "{o} gave the world {so} | {s} has its origin in {o}",
    ),
    _relation(
        "inventor", "dish", "person",
        "{s} was invented by {o} | the recipe for {so} is the work of {o} | {o} was the first to cook {so}",
        "{o} devised {so} | {s} is owed to {o}",
    ),
    _relation(
        "ingredient", "dish", "ingredient",
        "{s} is made with {o} | the cook needs {o} for {so} | {s} contains {o}",
        "{s} calls for {o} | into {so} go {o}", many=True,
    ),
    _relation(
        "author", "book", "person",
        "{s} was written by {o} | {sp} author is {o} | {o} wrote {so}",
        "{s} came from the pen of {o} | {o} is the writer of {so}",
    ),
    _relation(
        "published", "book", "year",
        "{s} was published in {o} | {s} first appeared in {o} | the first printing of {so} is from {o}",
        "{o} saw the first edition of {so} | {s} reached the shops in {o}",
    ),
    _relation(
        "setting", "book", "town",
        "{s} is set in {o} | the story of {so} takes place in {o} | {s} tells of life in {o}",
        "{o} is the scene of {so} | the events of {so} happen in {o}",
    ),
)  # fmt: skip
RELATIONS: dict[str, Relation] = {r.name: r for r in _ALL}

# A tuple is a list of words; a dict a number in [low, high) put into a form.
VALUES: dict[str, Any] = {
    "year": {"low": 1100, "high": 1990, "form": "{n}"},
    "date": {"low": 1880, "high": 1990, "form": "{day} {month} {n}"},
    "people": {"low": 300, "high": 60000, "form": "{n}"},
    "staff": {"low": 4, "high": 900, "form": "{n}"},
    "length": {"low": 20, "high": 900, "form": "{n} kilometres"},
    "month": _words("January February March April May June July August September October November December"),
    "weekday": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "colour": _words("red blue green white black grey yellow brown purple silver crimson scarlet"),
    "trade": _words(
        "mason baker weaver potter smith carpenter teacher doctor lawyer printer painter sailor farmer miller tailor "
        "gardener clerk singer fisher brewer glazier cobbler surveyor nurse"
    ),
    "goods": _words(
        "bricks lamps ropes clocks boots carpets barrels bells candles hats paper glass knives ploughs boats pianos "
        "saddles mirrors tiles umbrellas buttons nails wagons spectacles"
    ),
    "ingredient": _words(
        "onions barley honey butter apples lentils carrots plums mushrooms walnuts cream ginger salt pepper cabbage "
        "beans eggs trout mutton cheese vinegar garlic leeks pears"
    ),
    "hills": tuple(f"{a} {b}" for a in _words("Grey Long Red High White") for b in _words("Hills Mountains Downs")),
}  # fmt: skip

INTROS = {
    "person": (
        "{n} is a well-known figure in the region",
        "many stories are told about {n}",
        "this page is about {n}, whose name is often heard in the district",
        "{n} is remembered by many people",
    ),
    "town": ("{n} is a town", "{n} is a town of the lowlands", "travellers often stop at {n}, a town with an old wall"),
    "river": ("{n} is a river", "{n} is a slow river with many bends", "{n} is one of the rivers of the country"),
    "firm": ("{n} is a firm", "{n} is a business of good repute", "{n} is a company with a long history"),
    "guild": ("{n} is a guild", "{n} is an old guild with strict rules", "{n} is a guild of craftsmen and merchants"),
    "dish": ("{n} is a dish", "{n} is a dish served in many houses", "{n} is a plain but filling dish"),
    "book": ("{n} is a book", "{n} is a book that is still read", "{n} is a book in one volume"),
}

LEADS = (
    "by all accounts, ", "as far as the records show, ", "it is said that ", "according to the archive, ",
    "neighbours recall that ", "it is well known that ", "the almanac notes that ", "for many years now, ",
)  # fmt: skip

LINKS = (
    "this brings us to {n}", "something should be said of {n} too", "now to {n}", "as for {n}, there is more to tell",
    "{n} is a story of its own", "the reader may know {n} already",
)  # fmt: skip
