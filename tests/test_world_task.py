"""Questions about the invented world: an independent reader checks them, and nothing leaks from train to test."""

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable

import pytest

from nanochat.config import UserError
from nanochat.retrieval.document import Document
from nanochat.world import Fact, World
from nanochat.world_more import MORE_CLAUSES
from nanochat.world_names import NAMES, name_split
from nanochat.world_text import RELATIONS, VALUES
from tasks.world import (
    KINDS,
    SIZES,
    guess_prior,
    held_back,
    new_names,
    relabel,
    shuffled,
    world_documents,
    world_rows,
)
from tasks.world_questions import QUESTIONS
from tasks.world_wording import COMPARISONS, DATED, FALSE_PREMISES, WORDINGS

MAX_FACTS = 3
CHAINS = ("1hop", "2hop", "3hop", "4hop")
FORM_WORDS = {word for forms in NAMES.values() for form in forms for word in form.split()}


@pytest.fixture(scope="module")
def worlds() -> dict[str, World]:
    return {split: World(5, 600, split) for split in ("train", "val", "test")}  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def rows(worlds) -> dict[str, list[dict]]:
    """20 of each kind for train and val, 40 for test."""
    sizes = {"train": 20, "val": 20, "test": 40}
    return {s: world_rows(w, sizes[s] * len(KINDS), tuple(KINDS), max_facts=MAX_FACTS) for s, w in worlds.items()}


@pytest.fixture(scope="module")
def documents(worlds) -> dict[str, dict[str, Document]]:
    return {split: {d.id: d for d in world_documents(w, MAX_FACTS)} for split, w in worlds.items()}


def of_kind(rows: dict[str, list[dict]], *kinds: str) -> list[tuple[str, dict]]:
    return [(split, row) for split, some in rows.items() for row in some if row["kind"] in kinds]


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def stands_in(names: Iterable[str], text: str) -> bool:
    return any(re.search(rf"\b{re.escape(name)}\b", text, re.IGNORECASE) for name in names)


def named_in(world: World, text: str) -> list[int]:
    """Entities a question speaks of, in order, the longest name first where names overlap."""
    names = {name: e.id for e in world.entities for name in (e.mention, e.alias) if name and name in text}
    places = [
        (m.start(), m.end(), i) for name, i in names.items() for m in re.finditer(rf"\b{re.escape(name)}\b", text)
    ]
    longest = [p for p in places if not any(q[0] <= p[0] and p[1] <= q[1] and q != p for q in places)]
    return [i for _, _, i in sorted(longest)]


def read(world: World, row: dict, pages: Iterable[Document]) -> set[str] | None:
    """Answer from the facts that these pages list and the names in the question; None when a fact is wanting."""
    told: set[int] = set()
    for page in pages:
        told.update(page.metadata["facts"])

    def find(subject: int, relation: str) -> Fact | None:
        return next((f for f in world.facts_of(subject, relation) if f.id in told), None)

    subjects = named_in(world, row["question"])
    if row["kind"] == "comparison":
        return compare(row, [find(s, row["relations"][0]) for s in subjects])
    assert len(subjects) == 1, row
    here: int | None = subjects[0]
    fact = None
    for relation in row["relations"]:
        fact = find(here, relation) if here is not None else None
        if fact is None:
            return None
        here = fact.object
    entity = world.entities[here] if here is not None else None
    return {fact.value} | ({entity.name, entity.alias or entity.name} if entity else set()) if fact else None


def compare(row: dict, facts: list[Fact | None]) -> set[str] | None:
    assert len(facts) == 2
    if None in facts:
        return None
    months = VALUES["month"]
    sizes = []
    for fact in facts:
        assert fact is not None
        parts = [months.index(w) if w in months else int(w) for w in fact.value.replace(" kilometres", "").split()]
        sizes.append((parts[::-1], fact.value))
    wording = COMPARISONS[row["relations"][0]]
    assert (wording.more in words(row["question"])) != (wording.less in words(row["question"])), row
    return {max(sizes)[1] if wording.more in words(row["question"]) else min(sizes)[1]}


def test_rows_have_the_documented_shape_and_are_json(rows):
    for split, row in of_kind(rows, *KINDS):
        assert json.loads(json.dumps(row)) == row and row["id"].startswith(f"{split}5-q0-{row['kind']}-")
        assert row["answerable"] == bool(row["answers"]) == bool(row["gold_ids"])
        assert row["question"][0].isupper() and row["question"].endswith("?") and "{" not in row["question"]
        assert all(set(hop) == {"query", "answer", "gold_ids"} for hop in row["hops"])
        assert ("documents" in row) == (row["kind"] in ("counterfactual", "conflict"))
        if row["answerable"]:
            assert [hop["gold_ids"][0] for hop in row["hops"]] == row["gold_ids"]
    for some in rows.values():
        assert len({r["id"] for r in some}) == len(some)
        asked = [(r["kind"], *r["relations"], *(hop["query"] for hop in r["hops"])) for r in some]
        assert len(set(asked)) == len(asked)
        assert len(set(Counter(r["kind"] for r in some).values())) == 1


def test_a_reader_of_the_gold_documents_finds_the_answer(worlds, rows, documents):
    for split, row in of_kind(rows, *CHAINS, "comparison"):
        found = read(worlds[split], row, [documents[split][i] for i in row["gold_ids"]])
        assert found is not None and found & set(row["answers"]), row
        assert len(row["gold_ids"]) == (2 if row["kind"] == "comparison" else int(row["kind"][0]))


def test_no_gold_document_may_be_spared(worlds, rows, documents):
    """Neither of the gold documents alone nor, with its alternatives, of all documents there are."""
    for split, row in of_kind(rows, *CHAINS, "comparison"):
        pages = documents[split]
        for gold, hop in zip(row["gold_ids"], row["hops"], strict=True):
            assert read(worlds[split], row, [pages[i] for i in row["gold_ids"] if i != gold]) is None, row
            rest = [d for d in pages.values() if d.id not in hop["gold_ids"]]
            assert read(worlds[split], row, rest) is None, row
            for other in hop["gold_ids"]:
                instead = [pages[other if i == gold else i] for i in row["gold_ids"]]
                assert read(worlds[split], row, instead) == read(worlds[split], row, pages.values()) is not None


def test_the_answer_of_a_hop_stands_in_its_first_document(worlds, rows, documents):
    for split, row in of_kind(rows, *CHAINS, "comparison"):
        for hop in row["hops"]:
            first = documents[split][hop["gold_ids"][0]]
            assert stands_in([hop["answer"]], f"{first.title} {first.text}"), (hop, first)


def test_every_gold_document_names_the_subject_as_the_query_does(rows, documents):
    """An article of another entity may know the subject by an alias only; nothing then ties it to the question."""
    for split, row in of_kind(rows, *CHAINS, "comparison"):
        for hop in row["hops"]:
            named = {w for w in words(hop["query"]) if w[0].isupper()}
            for page in (documents[split][i] for i in hop["gold_ids"]):
                assert named <= set(words(f"{page.title} {page.text}")), (hop, page)


def test_a_query_names_the_subject_as_the_question_or_the_last_document_did(rows):
    for _, row in of_kind(rows, *CHAINS):
        known = row["question"]
        for hop in row["hops"]:
            named = [w for w in words(hop["query"]) if w[0].isupper() and w not in FORM_WORDS]
            assert named and all(w in words(known) for w in named), row
            known = hop["answer"]


def test_no_answer_stands_in_its_question_nor_does_a_step_on_the_way(rows):
    of_namesakes = world_rows(World(0, 40), 40, ("1hop",))  # here the town Lefatrim lies on the river Lefatrim
    for row in of_namesakes + [row for _, row in of_kind(rows, *KINDS)]:
        told = [*row["answers"], *row.get("memory_answers", []), *row.get("stale_answers", [])]
        told += [hop["answer"] for hop in row["hops"] if hop["answer"]]
        assert not stands_in(told, row["question"]), row


def test_unanswerable_rows_really_are(worlds, rows, documents):
    memory = {
        split: [Document(d.id, d.text, d.title, {"facts": d.facts}) for d in w.documents()]
        for split, w in worlds.items()
    }
    for split, row in of_kind(rows, "missing", "false_premise"):
        assert read(worlds[split], row, documents[split].values()) is None
        assert row["answers"] == row["gold_ids"] == row["hops"][-1]["gold_ids"] == [] and not row["hops"][-1]["answer"]
        remembered = read(worlds[split], row, memory[split])
        if row["kind"] == "missing":
            assert remembered is not None and remembered & set(row["memory_answers"])
        else:
            (subject,) = named_in(worlds[split], row["question"])
            kind = worlds[split].entities[subject].type
            assert remembered is None and kind != RELATIONS[row["relations"][0]].subject


def test_counterfactual_documents_say_the_answer_and_not_what_the_world_says(worlds, rows, documents):
    for split, row in of_kind(rows, "counterfactual"):
        (page,) = row["documents"]
        original = documents[split][page["id"]]
        assert row["gold_ids"] == [page["id"]] and page["title"] == original.title
        assert page["metadata"] == original.metadata
        assert stands_in(row["answers"], page["text"]) and stands_in(row["memory_answers"], original.text)
        assert not stands_in(row["memory_answers"], page["text"]) and not stands_in(row["answers"], original.text)
        remembered = read(worlds[split], row, documents[split].values())
        assert remembered is not None and remembered & set(row["memory_answers"])
        assert not remembered & set(row["answers"])
        elsewhere = [d for d in documents[split].values() if d.id != page["id"]]
        assert read(worlds[split], row, elsewhere) is None


def test_of_two_conflicting_documents_the_newer_is_right_be_it_the_worlds_or_not(worlds, rows, documents):
    worlds_own = []
    for split, row in of_kind(rows, "conflict"):
        old, new = sorted(row["documents"], key=lambda d: d["metadata"]["year"])
        assert old["metadata"]["year"] < new["metadata"]["year"] and row["gold_ids"] == [new["id"]]
        assert row["documents"][0]["id"] in documents[split] and row["documents"][1]["id"] not in documents[split]
        for page, said, unsaid in ((old, "stale_answers", "answers"), (new, "answers", "stale_answers")):
            opening = page["text"].partition(". ")[0]
            assert str(page["metadata"]["year"]) in opening
            assert stands_in(row[said], page["text"]) and not stands_in(row[unsaid], page["text"]), row
        remembered = read(worlds[split], row, documents[split].values())
        assert remembered is not None
        worlds_own.append(bool(remembered & set(row["answers"])))
    assert 0.25 < sum(worlds_own) / len(worlds_own) < 0.75


def test_documents_state_every_fact_where_the_world_says_but_those_held_back(worlds):
    world = worlds["train"]
    gone = held_back(world)
    for max_facts in (None, 1, MAX_FACTS):
        pages = list(world_documents(world, max_facts))
        assert len({d.id for d in pages}) == len(pages)
        stated = Counter((i, d.metadata["entity"]) for d in pages for i in d.metadata["facts"])
        assert set(stated.values()) == {1}
        homes = {
            f.id: {"subject": {f.subject}, "object": {f.object}, "both": {f.subject, f.object}} for f in world.facts
        }
        wanted = {(f.id, home) for f in world.facts if f.id not in gone for home in homes[f.id][f.where]}
        assert set(stated) == wanted
        for page in pages:
            assert len(page.metadata["facts"]) <= (max_facts or 1000)
            assert page.title == world.entities[page.metadata["entity"]].title
            assert world.entities[page.metadata["entity"]].name in page.text
    assert 0.05 < len(gone) / len(world.facts) < 0.12


def test_whole_articles_are_those_of_the_world(worlds):
    world = worlds["val"]
    told = {f"val5-{d.entity}": d.text for d in world.documents(without=held_back(world))}
    assert {d.id: d.text for d in world_documents(world)} == told
    everything = {f"val5-{d.entity}": d.text for d in world.documents()}
    assert {d.id: d.text for d in world_documents(world, without=())} == everything


def test_a_fact_left_out_changes_only_the_documents_that_stated_it(worlds):
    world = worlds["train"]
    fact = next(f for f in world.facts if f.where == "both" and f.id not in held_back(world))
    before = {d.id: d for d in world_documents(world, 2)}
    after = {d.id: d for d in world_documents(world, 2, without={fact.id, *held_back(world)})}
    changed = {i for i, d in before.items() if after.get(i) != d}
    assert changed == {i for i, d in before.items() if fact.id in d.metadata["facts"]} and len(changed) == 2


def test_short_documents_fit_five_to_a_context(documents):
    lengths = [len(re.findall(r"\w+|[^\w\s]", f"{d.title} {d.text}")) for d in documents["train"].values()]
    assert max(lengths) < 90


def test_the_same_seed_gives_the_same_rows_and_another_seed_others(worlds):
    first, again, other = (world_rows(worlds["val"], 20, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert len({r["question"] for r in first} & {r["question"] for r in other}) < 5


def test_kinds_are_drawn_independently_of_each_other(worlds):
    alone = world_rows(worlds["val"], 10, ("2hop",))
    mixed = world_rows(worlds["val"], 30, ("1hop", "2hop", "missing"))
    assert sorted(r["question"] for r in alone) == sorted(r["question"] for r in mixed if r["kind"] == "2hop")


def test_wordings_of_train_and_test_are_disjoint_and_used_in_their_own_worlds_only(rows):
    assert set(WORDINGS) == set(QUESTIONS)
    for relation, wording in WORDINGS.items():
        for told in (wording.asks, wording.phrases):
            assert not set(told["many"]) & set(told["test"]) and set(told["train"]) <= set(told["many"]), relation
            for some in told.values():
                assert all(template.count("{s}") == 1 for template in some), relation
                assert len(some) >= 2 or told is wording.phrases, relation
        assert len(set(wording.asks["many"])) == 9, relation
        nests = any(RELATIONS[relation].object == r.subject for r in RELATIONS.values())
        assert all((len(some) >= 2) == nests for some in wording.phrases.values()), relation
    for comparison in COMPARISONS.values():
        assert not set(comparison.asks["train"]) & set(comparison.asks["test"])
    assert not set(DATED["train"]) & set(DATED["test"])
    for split, row in of_kind(rows, "1hop", "missing", "false_premise"):
        if len(row["relations"]) == 1:
            own, foreign = ("test", "train") if split == "test" else ("train", "test")
            asked = WORDINGS[row["relations"][0]].asks
            patterns = {s: [re.escape(t).replace(r"\{s\}", "(.+)") for t in asked[s]] for s in asked}
            assert any(re.fullmatch(p, row["question"]) for p in patterns[own])
            assert not any(re.fullmatch(p, row["question"]) for p in patterns[foreign])


def test_false_premises_are_of_other_types():
    types = {r.subject for r in RELATIONS.values()}
    for relation, subjects in FALSE_PREMISES.items():
        assert set(subjects) <= types - {RELATIONS[relation].subject} and subjects


def invented(world: World) -> set[str]:
    names = [name for e in world.entities for name in (e.name, e.alias) if name]
    return {w for name in names for w in name.split()} - FORM_WORDS


def grams_with_a_name(world: World, texts: Iterable[str]) -> set[tuple[str, ...]]:
    """Runs of five words of which one is an invented name: what a fact is told in."""
    names, found = invented(world), set()
    for text in texts:
        run = words(text)
        found |= {g for g in zip(*(run[i:] for i in range(5)), strict=False) if not names.isdisjoint(g)}
    return found


def test_train_val_and_test_worlds_share_no_name_and_no_five_words_around_one(worlds, rows, documents):
    told = {}
    for split, world in worlds.items():
        assert all(name_split(name) == split for name in invented(world))
        texts = [f"{d.title}. {d.text}" for d in documents[split].values()]
        texts += [t for r in rows[split] for t in (r["question"], *(h["query"] for h in r["hops"]))]
        told[split] = grams_with_a_name(world, texts)
        assert len(told[split]) > 10_000
    for a, b in itertools.combinations(told, 2):
        assert not told[a] & told[b]


def test_documents_of_test_worlds_are_told_in_words_held_out_from_train_worlds(worlds, documents):
    """No three words of a training template that hold no slot and no test template has stand in a test document."""
    held = {"train": set[str](), "test": set[str]()}
    for relation in RELATIONS.values():
        every = (*relation.train, *MORE_CLAUSES[relation.name])
        for split, templates in (("train", every), ("test", relation.test)):
            for piece in (p for t in templates for p in re.split(r"\{\w+\}", t)):
                run = words(piece)
                held[split] |= {" ".join(run[i : i + 3]) for i in range(len(run) - 2)}
    assert len(held["train"] - held["test"]) > 50
    both = {"train": world_documents(World(0, 1000, templates="many")), "test": documents["test"].values()}
    told = {split: " ".join(" ".join(words(d.text)) for d in those) for split, those in both.items()}
    for mine, other in (("train", "test"), ("test", "train")):
        only = held[mine] - held[other]
        assert not [run for run in only if f" {run} " in told[other]]
        assert sum(f" {run} " in told[mine] for run in only) > 0.9 * len(only)


def test_guessing_from_the_question_alone_reaches_little():
    world = World(1, 2000, "test")
    for kind in ("1hop", "2hop", "comparison"):
        rows = world_rows(world, 500, (kind,))
        assert guess_prior(rows) < 0.15, kind
        common = Counter(r["answers"][0] for r in rows).most_common(1)[0][1]
        assert common <= 1 + 500 // 25
    types = Counter(RELATIONS[r["relations"][-1]].object for r in world_rows(world, 280, ("1hop",)))
    assert len(types) == 14 and set(types.values()) == {20}


def test_no_answer_is_right_for_more_than_its_share_where_the_world_has_few():
    rows = world_rows(World(0, SIZES["nano"]), 60, ("2hop",))
    assert max(Counter(r["answers"][0] for r in rows).values()) <= 1 + 60 // 25


def test_guess_prior_counts_the_best_constant_of_each_form():
    asked = [("mayor", ["A", "Al"]), ("mayor", ["A"]), ("mayor", ["B"]), ("trade", []), ("trade", []), ("trade", ["C"])]
    assert guess_prior([{"relations": ["born_in", r], "answers": a} for r, a in asked]) == pytest.approx(4 / 6)
    with pytest.raises(UserError, match="no rows"):
        guess_prior([])


def test_relabelled_rows_and_documents_keep_their_structure_under_other_names(worlds, rows, documents):
    world = worlds["train"]
    names = new_names(world, seed=1)
    assert set(names) == set(names.values()) == invented(world) and all(a != b for a, b in names.items())
    changed, pages = relabel(rows["train"], names), relabel(list(documents["train"].values()), names)
    back = {b: a for a, b in names.items()}
    assert relabel(changed, back) == rows["train"] and relabel(pages, back) == list(documents["train"].values())
    for old, new in zip(rows["train"], changed, strict=True):
        assert old["question"] != new["question"] and len(words(old["question"])) == len(words(new["question"]))
        assert [old[k] for k in ("id", "gold_ids", "relations")] == [new[k] for k in ("id", "gold_ids", "relations")]
    by_id = {d.id: d for d in pages}
    for row in changed:
        if row["kind"] in CHAINS:
            first = by_id[row["hops"][0]["gold_ids"][0]]
            assert stands_in([row["hops"][0]["answer"]], f"{first.title} {first.text}")


def test_shuffled_rows_have_documents_from_which_nothing_follows(worlds, rows, documents):
    moved = shuffled(rows["test"])
    assert [r["question"] for r in moved] == [r["question"] for r in rows["test"]]
    assert moved == shuffled(rows["test"])
    for row in moved:
        if row["kind"] in (*CHAINS, "comparison"):
            assert read(worlds["test"], row, [documents["test"][i] for i in row["gold_ids"]]) is None
        for page in row.get("documents", []):
            assert page["metadata"]["entity"] not in named_in(worlds["test"], row["question"])
    with pytest.raises(UserError, match="can lend it documents"):
        shuffled(rows["test"][:1])


@pytest.mark.parametrize("kind", ["1hop", "2hop", "comparison", "missing", "counterfactual", "conflict"])
def test_the_smallest_size_has_questions_with_and_without_splitting(kind):
    world = World(0, SIZES["nano"])
    for max_facts in (None, 2):
        assert len(world_rows(world, 8, (kind,), max_facts=max_facts)) == 8


def test_what_cannot_be_asked_for_is_refused():
    world = World(0, SIZES["nano"])
    with pytest.raises(UserError, match="a world of 64 entities has"):
        world_rows(world, 5000, ("1hop",))
    with pytest.raises(UserError, match="kinds of 1hop, 2hop"):
        world_rows(world, 5, ("5hop",))
    with pytest.raises(UserError, match="n >= 1"):
        world_rows(world, 0)
    with pytest.raises(UserError, match="max_facts=0"):
        next(world_documents(world, 0))


def test_documents_of_a_large_world_come_one_by_one(monkeypatch):
    world, written = World(0, 400), []
    article = world.article
    monkeypatch.setattr(world, "article", lambda entity, *a: written.append(entity) or article(entity, *a))
    stream = world_documents(world, MAX_FACTS)
    next(stream)
    next(stream)
    assert len(written) == 2
