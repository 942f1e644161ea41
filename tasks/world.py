"""Questions about an invented world (nanochat/world.py) with exact answers and exact evidence, and its documents.

    world = World(0, SIZES["small"])
    documents = world_documents(world, max_facts=3)      # to build a knowledge base from
    rows = world_rows(world, 1000, kinds=("1hop", "2hop", "missing"), max_facts=3)

A row: id, kind, question, answers (any is right; empty when not answerable), answerable, relations (those asked for, in
order), gold_ids (one document for each hop; with one less the answer does not follow) and hops. A hop: query (what to
search for), answer (as its document writes it) and gold_ids (any one of them is enough). Some kinds carry more:

missing         the fact, or one fact of two hops, is in no document; the hop that fails has no answer and is the last.
                memory_answers: what the world (and a model trained on its whole text) says
false_premise   the relation makes no sense for the entity
counterfactual  documents: to be put in place of those with the same id; they say another thing than the world, and are
                right. memory_answers: what the world says
conflict        documents: two dated ones that disagree, the first in place of the one with its id, the second beside
                it; the newer is right. stale_answers: what the older says

Within a call no two rows of a kind ask the same; calls with other seeds may. Related: PhantomWiki (2502.20377), MuSiQue
(2108.00573: no document may be spared), Longpre et al. (2109.05052: documents against memory).
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from nanochat.config import UserError
from nanochat.retrieval.document import Document
from nanochat.world import VERSION, Fact, World
from nanochat.world_names import Dice
from nanochat.world_text import RELATIONS
from tasks.world_asker import Asker, Row
from tasks.world_controls import guess_prior, invented_words, new_names, relabel, shuffled
from tasks.world_paths import Articles, held_back
from tasks.world_wording import COMPARISONS, FALSE_PREMISES, WORDINGS

__all__ = [
    "KINDS", "SIZES", "guess_prior", "held_back", "invented_words", "new_names", "relabel", "shuffled",
    "world_documents", "world_rows",
]  # fmt: skip
SIZES = {"nano": 64, "small": 1_000, "base": 20_000, "million": 1_000_000}  # entities; at least one document each
PATIENCE = 200  # draws in a row without a new question after which a kind of answer counts as used up


def world_documents(
    world: World,
    max_facts: int | None = None,
    without: Collection[int] | None = None,
    instead: Mapping[int, Fact] | None = None,
) -> Iterator[Document]:
    """The documents that questions of `world_rows` with the same max_facts rest on; made one by one.

    Ids are "train0-17" (split, seed, entity), with "/1", "/2" behind when max_facts is given: then no document states
    more facts than that, and each names its subject. metadata: {"facts": ids of the facts stated, "entity": id}.
    without: ids of facts to leave out, by default those that questions of kind "missing" ask for. instead: {id: altered
    fact}, stated in place of the true one.
    """
    articles = Articles(world, max_facts, without, instead)
    for entity in world.entities:
        yield from articles.about(entity.id)


def world_rows(
    world: World, n: int, kinds: Sequence[str] = ("1hop", "2hop"), seed: int = 0, max_facts: int | None = None
) -> list[Row]:
    """n rows, equally many of each kind (of one named twice, twice as many), in mixed order.

    Answers of every type come equally often while there are any.

    No answer is right for more than one row in 25 of its kind, and one more. UserError: unknown kind, or a world too
    small for n.
    """
    unknown = [k for k in kinds if k not in KINDS]
    if unknown or not kinds or n < 1:
        raise UserError(f"n={n}, kinds={','.join(kinds)}: expected n >= 1 and kinds of {', '.join(KINDS)}")
    asker = Asker(world, max_facts)
    counts: Counter[str] = Counter()
    for i, kind in enumerate(kinds):
        counts[kind] += n // len(kinds) + (i < n % len(kinds))
    rows = [row for kind, count in counts.items() for row in _balanced(asker, kind, count, seed)]
    return Dice("order", seed).shuffled(rows)


def _balanced(asker: Asker, kind: str, n: int, seed: int) -> list[Row]:
    """n rows of one kind, taking turns among kinds of answers (or relations) until each is used up."""
    ask, groups = KINDS[kind]
    world, rows, seen, given = asker.world, list[Row](), set[tuple[str, ...]](), Counter[str]()
    dice = Dice(VERSION, world.seed, world.split, "rows", kind, seed)
    misses = dict.fromkeys(groups, 0)
    while len(rows) < n:
        if not misses:
            raise UserError(
                f"a world of {len(world.entities)} entities has {len(rows)} questions of kind {kind}, not {n}: "
                f"ask for fewer, or take a larger world"
            )
        group = list(misses)[len(rows) % len(misses)]
        row = ask(asker, dice, group)
        answer = "" if row is None else next(iter(row["answers"] or row.get("memory_answers", [])), "")
        asked = () if row is None else (*row["relations"], *(hop["query"] for hop in row["hops"]))
        if row is None or asked in seen or (answer and given[answer] > n // 25):
            misses[group] += 1
            if misses[group] == PATIENCE:
                del misses[group]
            continue
        misses[group] = 0
        seen.add(asked)
        given[answer] += 1
        rows.append({"id": f"{world.split}{world.seed}-q{seed}-{kind}-{len(rows)}", "kind": kind, **row})
    return rows


def _hops(n: int) -> Callable[[Asker, Dice, str], Row | None]:
    return lambda asker, dice, answer: asker.chain(dice, answer, n)


_ANSWERS = tuple(dict.fromkeys(RELATIONS[relation].object for relation in WORDINGS))
KINDS: dict[str, tuple[Callable[[Asker, Dice, str], Row | None], tuple[str, ...]]] = {  # and what takes turns
    "1hop": (_hops(1), _ANSWERS),
    "2hop": (_hops(2), _ANSWERS),
    "3hop": (_hops(3), _ANSWERS),
    "4hop": (_hops(4), _ANSWERS),
    "comparison": (Asker.comparison, tuple(COMPARISONS)),
    "missing": (Asker.missing, _ANSWERS),
    "false_premise": (Asker.false_premise, tuple(FALSE_PREMISES)),
    "counterfactual": (Asker.counterfactual, _ANSWERS),
    "conflict": (Asker.conflict, _ANSWERS),
}
