"""Slicing, mixtures, splits and the embedded tasks: everything that needs no files."""

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanochat import embedded
from nanochat.config import UserError
from nanochat.dataset import DatasetConfig
from nanochat.execution import calculate
from nanochat.tokenizer import Tokenizer
from nanochat.world import World
from nanochat.world_text import RELATIONS
from tasks import world_questions
from tasks.common import Task, TaskMixture, TaskSequence, exchange, plain, render_mc, split_of
from tasks.gsm8k import extract_answer
from tasks.mixtures import MIXTURES, TASKS, eval_task, make_task, mid_mixture, mixture, rl_task, sft_mixture
from tasks.spellingbee import words_of
from tasks.world_questions import QUESTIONS, WorldChoice, WorldQA

EMBEDDED = MIXTURES["embedded"]


class Counting(Task):
    """n examples that say which they are."""

    def __init__(self, label: str, n: int, **span: Any):
        super().__init__(**span)
        self.label, self.n = label, n

    def size(self) -> int:
        return self.n

    def example(self, i: int) -> dict[str, Any]:
        return exchange(self.label, str(i))


def said(task: Task) -> list[tuple[str, str]]:
    return [(c["messages"][0]["content"], c["messages"][1]["content"]) for c in task]


@pytest.fixture(autouse=True)
def small_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading all English of the standard library, which the true world's size depends on, takes seconds."""
    world = World(0, 1000)
    monkeypatch.setattr(world_questions, "embedded_world", lambda: world)


def asked(task: Task) -> list[str]:
    return [c["messages"][0]["content"] for c in task]


@pytest.mark.parametrize("span", [{}, {"start": 3}, {"stop": 5}, {"start": 2, "stop": 9, "step": 3}, {"start": 20}])
def test_slices_are_those_of_a_range(span: dict[str, int]) -> None:
    task = Counting("a", 10, **span)
    expected = list(range(10))[slice(span.get("start"), span.get("stop"), span.get("step"))]
    assert len(task) == len(expected)
    assert said(task) == [("a", str(i)) for i in expected]
    for outside in (-1, len(task)):
        with pytest.raises(IndexError):
            task[outside]


@pytest.mark.parametrize("span", [{"start": -1}, {"step": 0}, {"start": 5, "stop": 4}])
def test_a_slice_that_makes_no_sense_is_refused(span: dict[str, int]) -> None:
    with pytest.raises(UserError, match="expected 0 <= start"):
        Counting("a", 10, **span)


def test_a_mixture_holds_every_example_once_for_each_mention() -> None:
    a, b = Counting("a", 5), Counting("b", 7, start=2)
    mixed = TaskMixture([a, b, a])
    assert Counter(said(mixed)) == Counter(said(a) + said(b) + said(a))
    assert said(mixed) == said(TaskMixture([a, b, a]))
    assert said(mixed) != said(a) + said(b) + said(a)
    assert len(TaskMixture([a, b], stop=4)) == 4


def test_a_sequence_keeps_the_order() -> None:
    a, b, empty = Counting("a", 3), Counting("b", 2), Counting("c", 0)
    assert said(TaskSequence([a, empty, b])) == said(a) + said(b)


def test_the_letter_of_a_choice_stands_behind_the_equals_sign() -> None:
    rendered = render_mc("Which?", "AB", ["one", "two"])
    assert rendered.splitlines()[:3] == ["Multiple Choice question: Which?", "- one=A", "- two=B"]
    assert rendered.endswith("letter of the correct answer.")


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_examples_are_a_function_of_split_and_index(name: str) -> None:
    task, again = make_task(name, "train"), make_task(name, "train")
    assert [again[i] for i in (7, 0, 41)] == [task[i] for i in (7, 0, 41)]
    task[0]["messages"].clear()
    assert task[0]["messages"]


@pytest.mark.parametrize("name", [n for n in EMBEDDED if n != "WorldQA"])
def test_no_question_is_in_two_splits(name: str) -> None:
    train, val, test = (set(asked(make_task(name, s))) for s in ("train", "val", "test"))
    assert not train & val
    assert not train & test
    assert not val & test


def test_splits_share_no_sum_in_other_words() -> None:
    problems = {s: {sum_of(c) for c in make_task("Arithmetic", s)} for s in ("train", "test")}
    assert not problems["train"] & problems["test"]
    assert all(split_of(p) == "test" for p in problems["test"])


def sum_of(conversation: dict[str, Any]) -> str:
    return conversation["messages"][-1]["content"][0]["text"]


def test_splits_share_no_word_and_no_subject() -> None:
    assert not set(words_of("invented", "train")) & set(words_of("invented", "test"))
    for cls in (WorldChoice, WorldQA):
        train, test = cls("train"), cls("test")
        assert not {f.subject for f in train.facts} & {f.subject for f in test.facts}
        assert not {e.id for e in train.things} & {e.id for e in test.things}


@pytest.mark.parametrize("name", ["Arithmetic", "SpellingBee"])
def test_the_call_is_what_the_question_asks_and_gives_the_answer(name: str) -> None:
    for conversation in make_task(name, "test"):
        question = conversation["messages"][0]["content"]
        call, output, last = conversation["messages"][-1]["content"]
        assert calculate(call["text"]) == output["text"] == extract_answer(last["text"])
        copied = re.findall(r"\d+" if name == "Arithmetic" else r'"\w+"', question)
        used = Counter(re.findall(r"\d+" if name == "Arithmetic" else r'"\w+"', call["text"]))
        assert used <= Counter(copied)
        assert len(copied) - used.total() <= 1  # a number that has nothing to do with it


def test_guessing_the_commonest_count_gets_about_the_baseline() -> None:
    task = make_task("SpellingBee", "train")
    answers = Counter(c["messages"][-1]["content"][-1]["text"] for c in task)
    assert max(answers.values()) / len(task) == pytest.approx(task.baseline, abs=0.02)


def test_spelling_spells_the_word() -> None:
    for conversation in make_task("Spelling", "test"):
        word = conversation["messages"][0]["content"].split("\n")[1]
        assert conversation["messages"][1]["content"].replace(",", "") == word


def test_one_choice_is_right_and_the_letters_come_equally_often() -> None:
    task = WorldChoice("test")
    places = Counter()
    for conversation in task:
        lines = conversation["messages"][0]["content"].split("\n")
        choices = [line[2:].rpartition("=")[0] for line in lines if line.startswith("- ")]
        answer = conversation["messages"][1]["content"]
        assert len(set(choices)) == 4
        assert true_of(task.world, lines[0].removeprefix("Multiple Choice question: "), choices) == answer
        assert task.evaluate(conversation, answer)
        assert not task.evaluate(conversation, "")
        places[answer] += 1
    assert max(places.values()) < 0.33 * len(task)


def true_of(world: World, question: str, choices: list[str]) -> str:
    """The one right letter, found in the world's facts by reading the question back."""
    entities = {e.mention: e for e in world.entities}
    kind = re.fullmatch(r"Which of these is a (\w+)\?", question)
    if kind:
        right = [c in entities and entities[c].type == kind[1] for c in choices]
    else:
        facts = next(
            world.facts_of(entities[m[1]].id, relation)
            for relation, form in QUESTIONS.items()
            if (m := re.fullmatch(re.escape(form).replace(r"\{s\}", "(.+)"), question)) and m[1] in entities
        )
        values = {f.value if f.object is None else world.entities[f.object].mention for f in facts}
        right = [c in values for c in choices]
    assert sum(right) == 1, (question, choices)
    return "ABCD"[right.index(True)]


def test_the_answer_stands_once_in_the_article() -> None:
    task = WorldQA("test")
    for conversation in task:
        article, question = conversation["messages"][0]["content"].rsplit("\n\n", 1)
        answer = conversation["messages"][1]["content"].removeprefix("The answer is ").rstrip(".")
        assert len(re.findall(rf"\b{re.escape(answer)}\b", article)) == 1, (article, question)
        assert task.evaluate(conversation, f" {answer}.")
        assert not task.evaluate(conversation, "")


def test_every_single_valued_relation_has_a_question() -> None:
    assert set(QUESTIONS) == {r.name for r in RELATIONS.values() if not r.many}


@pytest.mark.parametrize("name", [n for n in EMBEDDED if n != "Identity"])
def test_own_answers_are_right_and_an_empty_one_is_wrong(name: str) -> None:
    task = eval_task(name)
    for conversation in task:
        answer = plain(conversation["messages"][-1]["content"])
        assert task.evaluate(conversation, answer)
        assert task.reward(conversation, answer) == 1.0
        assert task.reward(conversation, "") == 0.0


def test_embedded_conversations_fit_512_tokens_of_a_small_tokenizer() -> None:
    world = world_questions.embedded_world()
    tokenizer = Tokenizer.train([d.page for d in world.documents()], 1024)
    longest = 0
    for conversation in TaskMixture([make_task(n, "train") for n in EMBEDDED], stop=3000):
        ids, mask = tokenizer.render_conversation(conversation)
        assert any(mask)
        longest = max(longest, len(ids))
    assert longest < 256, longest  # twice into a row


def test_the_world_is_the_one_the_embedded_text_describes(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    for module in (world_questions, embedded):  # less English, which takes seconds to read
        monkeypatch.setattr(module, "english_documents", lambda: iter(["English. " * 1000] * 2))
    size = DatasetConfig.embedded_mb
    world = world_questions.make_world()
    assert json.loads((base / "task_data" / "embedded_world.json").read_text())["n_entities"] == len(world.entities)
    text = embedded.embedded_documents(size, DatasetConfig.seed)
    articles = list(itertools.islice(text, 2, 2 + len(world.entities)))
    assert [articles[0], articles[-1]] == [world.article(e.id).page for e in (world.entities[0], world.entities[-1])]


@pytest.mark.parametrize("make", [mid_mixture, sft_mixture])
def test_the_default_mixture_needs_no_files(
    make: Callable[[str], TaskMixture], base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_DATA", str(base))
    for split in ("train", "val"):
        mixed = make(split)
        assert len(mixed) == sum(len(make_task(n, split)) for n in EMBEDDED)
        assert mixed[0]["messages"]


def test_names_may_be_given_twice_or_cut() -> None:
    assert len(mixture("train", ["Arithmetic", "Arithmetic"])) == 2 * len(make_task("Arithmetic", "train"))
    assert len(mixture("train", ["Arithmetic:100", "Spelling:10"])) == 110
    assert said(make_task("Spelling:10", "train")) == said(make_task("Spelling", "train"))[:10]


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'GSM8K'"):
        mid_mixture("train", ["GSM8k"])
    with pytest.raises(UserError, match="no tasks given"):
        mid_mixture("train", [])
    with pytest.raises(UserError, match="split 'dev': expected one of"):
        make_task("Arithmetic", "dev")


def test_a_stage_refuses_a_task_of_the_wrong_kind() -> None:
    with pytest.raises(UserError, match="categorical"):
        rl_task("WorldChoice", "train")
    with pytest.raises(UserError, match="no right answers"):
        eval_task("Identity")
    with pytest.raises(UserError, match="no right answers"):
        make_task("Identity", "test").evaluate({}, "")
    assert rl_task("Arithmetic", "train").kind == "generative"


def test_several_tasks_are_rewarded_each_by_its_own() -> None:
    both = rl_task("Arithmetic:20,Spelling:20", "train")
    assert len(both) == 40
    for conversation in both:
        answer = plain(conversation["messages"][-1]["content"])
        assert both.reward(conversation, answer) == 1.0
        assert both.reward(conversation, "#### -1" if "####" in answer else answer[:-1]) == 0.0
    with pytest.raises(UserError, match="WorldChoice is categorical"):
        rl_task("Arithmetic,WorldChoice", "train")


def test_every_task_knows_its_own_name() -> None:
    for name in EMBEDDED:
        assert TASKS[name]("test").name == name
