"""The invented world: determinism, disjoint splits, and documents that state exactly the facts they claim."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nanochat.world import VERSION, World
from nanochat.world_more import MORE_CLAUSES
from nanochat.world_names import NAMES, name_split
from nanochat.world_text import CYCLE, INTROS, RELATIONS, VALUES

REPO = Path(__file__).resolve().parent.parent
TYPE_WORDS = {w for forms in NAMES.values() for f in forms for w in f.replace("{}", "").split()}


@pytest.fixture(scope="module")
def world() -> World:
    return World(seed=3, n_entities=200)


def cores(world: World) -> set[str]:
    """Every invented word of a world's names."""
    names = [e.name for e in world.entities] + [e.alias for e in world.entities if e.alias]
    return {w for name in names for w in name.split()} - TYPE_WORDS


def digest_in_subprocess(hash_seed: str) -> str:
    code = (
        "import hashlib; from nanochat.world import World\n"
        "w = World(5, 100)\n"
        "print(hashlib.sha256(repr((w.entities, w.facts, list(w.documents(tales=50)))).encode()).hexdigest())"
    )
    env = {**os.environ, "PYTHONHASHSEED": hash_seed}
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, env=env, capture_output=True, text=True, check=True)
    return done.stdout


def test_same_seed_same_world_whatever_the_hash_seed():
    assert digest_in_subprocess("0") == digest_in_subprocess("12345") != ""


def test_first_words_of_version_1_do_not_move():
    """Golden values: a change here changes every world; raise VERSION with it."""
    world = World(0, 40)
    assert VERSION == 1
    assert [e.title for e in world.entities[:3]] == GOLDEN_TITLES
    assert len(world.facts) == GOLDEN_FACTS
    assert world.article(1).text == GOLDEN_ARTICLE


GOLDEN_TITLES = ["Lujusk Vufin", "Lefatrim", "Brejis Mills"]
GOLDEN_FACTS = 199
GOLDEN_ARTICLE = (
    "Lefatrim is a town. "
    "Lefatrim's population is 51673. "
    "It lies beside the river Lefatrim. "
    "Lefatrim has old ties of trade with Dritend and Storas.\n\n"
    "The town's history begins in 1148. "
    "It has Suloses Kapal as its mayor. "
    "Sefojisk soup was first cooked in Lefatrim. "
    "Brejis Mills is based in Lefatrim.\n\n"
    "Storas trades with Lefatrim. "
    "Suloses Grutrer lives in Lefatrim. "
    "Gigrirk was first cooked in Lefatrim.\n\n"
    "The headquarters of Rabrask and Sons are in Lefatrim."
)


def test_other_seeds_give_other_worlds():
    assert World(1, 40).entities != World(2, 40).entities


def test_splits_share_no_name_for_any_seed():
    worlds = {split: [cores(World(seed, 200, split)) for seed in (0, 1)] for split in ("train", "val", "test")}
    for split, sets in worlds.items():
        assert all(name_split(core) == split for names in sets for core in names)
    assert not set.union(*worlds["train"]) & set.union(*worlds["val"] + worlds["test"])


def test_train_and_test_templates_are_disjoint_and_the_test_split_uses_its_own():
    for rel in RELATIONS.values():
        assert len(rel.train) >= 3 and len(rel.test) >= 2 and not set(rel.train) & set(rel.test), rel.name
    assert World(0, 20, "test").templates == "test"
    assert World(0, 20, "val").templates == World(0, 20, "train").templates == "train"


def test_many_wordings_are_ten_of_which_none_is_held_out_and_facts_stay_the_same():
    assert set(MORE_CLAUSES) == set(RELATIONS)
    for rel in RELATIONS.values():
        many = (*rel.train, *MORE_CLAUSES[rel.name])
        assert len(set(many)) == 10 and not set(many) & set(rel.test), rel.name
        assert all(t.count("{o}") == 1 and sum(map(t.count, ("{s}", "{sp}", "{so}"))) for t in many), rel.name
    few, many = World(0, 200), World(0, 200, templates="many")
    assert few.facts == many.facts and few.entities == many.entities
    told, more = ([d.text for d in w.documents()] for w in (few, many))
    assert [sorted(d.facts) for d in few.documents()] == [sorted(d.facts) for d in many.documents()] and told != more


def test_schema_names_only_what_exists():
    for rel in RELATIONS.values():
        assert rel.subject in CYCLE and (rel.object in CYCLE or rel.object in VALUES), rel.name
        for template in rel.train + rel.test:
            assert "{o}" in template and re.search(r"\{s[po]?\}", template), template
            assert not template.endswith("."), template
    assert set(INTROS) == set(CYCLE)


def test_titles_are_unique_and_homonyms_differ_in_type():
    world = World(0, 2000)
    assert len({e.title for e in world.entities}) == len(world.entities)
    by_name: dict[str, list[str]] = {}
    for e in world.entities:
        by_name.setdefault(e.name, []).append(e.type)
    shared = [types for types in by_name.values() if len(types) > 1]
    assert shared, "the world should have homonyms"
    assert all(len(set(types)) == len(types) for types in shared)
    aliases = sum(e.alias is not None for e in world.entities)
    assert 0.15 < aliases / len(world.entities) < 0.25


def test_facts_fit_the_schema_and_single_valued_relations_have_one_value(world):
    for fact in world.facts:
        rel, subject = RELATIONS[fact.relation], world.entities[fact.subject]
        assert subject.type == rel.subject
        if fact.object is not None:
            assert world.entities[fact.object].type == rel.object
            assert fact.object != fact.subject and fact.value == world.entities[fact.object].name
    for e in world.entities:
        for rel in RELATIONS.values():
            values = [f.value for f in world.facts_of(e.id, rel.name)]
            assert len(values) == len(set(values)) <= (3 if rel.many else 1)


def test_every_fact_is_stated_by_some_article_and_where_it_says(world):
    stated = {d.entity: set(d.facts) for d in world.documents()}
    for fact in world.facts:
        assert (fact.id in stated[fact.subject]) == (fact.where in ("subject", "both"))
        if fact.object is not None:
            assert (fact.id in stated[fact.object]) == (fact.where in ("object", "both"))


def test_the_text_of_a_document_holds_the_value_of_each_fact_it_lists(world):
    for doc in world.documents(tales=100):
        for fact in (world.facts[i] for i in doc.facts):
            entity = world.entities[fact.object] if fact.object is not None else None
            names = {fact.value} | ({entity.alias} if entity and entity.alias else set())
            # an answer that is the page's own subject may be told by pronoun in a tale, never in an article
            assert any(n in doc.page for n in names), (doc.id, fact)
            subject = world.entities[fact.subject]
            assert any(n and n in doc.page for n in (subject.name, subject.alias)), (doc.id, fact)


def test_text_is_well_formed(world):
    for doc in world.documents(tales=100):
        assert not re.search(r"[{}]|  |,,|\.\.| ,| \.|;\.", doc.page), doc.page
        for sentence in re.split(r"(?<=\.)\s+", doc.text):
            assert sentence[0].isupper() or sentence[0].isdigit(), sentence
            assert sentence.endswith("."), sentence


def test_a_fact_left_out_is_in_no_document(world):
    gone = next(f for f in world.facts if f.relation == "employer" and f.where == "both")
    docs = list(world.documents(tales=200, without={gone.id}))
    assert all(gone.id not in d.facts for d in docs)
    value = re.escape(gone.value)
    subject = world.entities[gone.subject]
    article = world.article(gone.subject, without={gone.id})
    assert not re.search(rf"(employed by|works for|employer is|post at) {value}", article.text), subject


def test_an_altered_fact_is_told_in_place_of_the_true_one(world):
    true = next(f for f in world.facts if f.relation == "birth_date")
    told = world.article(true.subject, instead={true.id: replace(true, value="31 May 1776")})
    assert "31 May 1776" in told.text and true.value not in told.text and true.id in told.facts


def test_an_altered_object_moves_the_telling_to_the_new_objects_article(world):
    true = next(f for f in world.facts if f.relation == "seat" and f.where == "both")
    other = next(e for e in world.by_type["town"] if e.id != true.object)
    instead = {true.id: replace(true, object=other.id, value=other.name)}
    assert true.object is not None
    assert true.id in world.article(other.id, instead=instead).facts
    assert true.id not in world.article(true.object, instead=instead).facts


def test_a_document_does_not_depend_on_the_others(world):
    assert World(3, 200).article(150) == world.article(150) == list(world.documents())[150]


@pytest.mark.parametrize("arguments", [{"n_entities": 19}, {"n_entities": 40, "split": "dev"}])
def test_impossible_worlds_are_refused(arguments):
    with pytest.raises(ValueError, match=r"at least 20|expected train"):
        World(0, **arguments)
