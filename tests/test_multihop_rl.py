"""Search in the loop: cold start, rewards, curriculum, the objectives, evaluation, the script from start to end."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_engine import PrefixModel
from test_rl import PATTERNS, group, small, steps_of
from torch import Tensor

from nanochat import multihop_eval, plots
from nanochat.config import UserError, load_config
from nanochat.finetune_config import inherit
from nanochat.multihop_eval import Episode, ceiling, difference, em_table, per_question, search_and_answer, traces
from nanochat.multihop_rl import (
    REWARDS,
    Cost,
    Curriculum,
    HopOrder,
    Level,
    Outcome,
    gold_ids,
    make_actor,
    make_judge,
    make_tool,
    outcome,
    parse_levels,
)
from nanochat.retrieval import KnowledgeBase
from nanochat.rl import Batch, Order, Sampling, Trajectory, policy_loss, remember, rollouts, weights, well_formed
from nanochat.shards import write_shard
from nanochat.tokenizer import Tokenizer
from nanochat.tools import NO_MORE_SEARCHES, NOTHING_FOUND
from nanochat.world import World
from nanochat.world_names import Dice
from scripts import base_train, rag_eval, refrag_finetune
from scripts.refrag_finetune import MultihopConfig
from tasks.common import exchange
from tasks.mixtures import with_chat
from tasks.multihop import ColdStart, Elsewhere, reworded, usable
from tasks.rag import exchangeable
from tasks.world import invented_words, world_documents, world_rows
from tasks.world_controls import Names, relabel

KINDS = ("1hop", "2hop", "3hop", "missing")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as prepare_rag_dataset makes it: knowledge_base, train.jsonl, val.jsonl; and a tokenizer."""
    folder = tmp_path_factory.mktemp("world")
    worlds = {split: World(0, 64, split) for split in ("train", "val")}
    documents = [d for world in worlds.values() for d in world_documents(world)]
    KnowledgeBase.build(documents, folder / "knowledge_base").close()
    for split, world in worlds.items():
        rows = world_rows(world, 60, KINDS)
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "dataset.json").write_text(json.dumps({"invented_words": invented_words(worlds["train"])}))
    Tokenizer.train((d.text for d in documents), 400).save(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def kb(place: Path) -> KnowledgeBase:
    return KnowledgeBase.open(place / "knowledge_base")


@pytest.fixture(scope="module")
def tokenizer(place: Path) -> Tokenizer:
    return Tokenizer.load(place / "tokenizer")


@pytest.fixture(scope="module")
def rows(place: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place / "train.jsonl").read_text().splitlines()]


def reciter(tokenizer: Tokenizer, whole: list[list[int]]) -> PrefixModel:
    """A model that goes on with the row of `whole` it is in; forced ids take the place of what it would have said."""

    def next_logits(prefix: list[int]) -> Tensor:
        row = next(row for row in whole if row[: len(prefix)] == prefix)
        return torch.eye(tokenizer.vocab_size)[row[len(prefix)]] * 1e4

    model = PrefixModel(next_logits, tokenizer.vocab_size, 4000)
    model.training, model.eval, model.train = False, lambda: None, lambda mode: None  # pyrefly: ignore
    return model


def say(tokenizer: Tokenizer, parts: list[dict[str, Any]], question: str = "Who?") -> list[int]:
    return tokenizer.render_conversation(exchange(question, parts))[0]


def act(tokenizer: Tokenizer, tool: Any, row: dict[str, Any], parts: list[dict[str, Any]], cut: int = 0) -> Trajectory:
    """The trajectory of a model that says these parts (without info), its last `cut` ids missing."""
    start = tokenizer.encode_special("<|assistant_start|>")
    whole = say(tokenizer, parts, row["question"])
    script = whole[whole.index(start) + 1 :]
    info = [tokenizer.encode_special(f"<|info_{end}|>") for end in ("start", "end")]

    def next_logits(prefix: list[int]) -> Tensor:
        said, inside = 0, False
        for token in prefix[prefix.index(start) + 1 :]:
            inside |= token == info[0]
            said += not inside
            inside &= token != info[1]
        return torch.eye(tokenizer.vocab_size)[script[min(said, len(script) - 1)]] * 1e4

    model = reciter(tokenizer, [])
    model.next_logits = next_logits
    sampling = Sampling(1, len(script) - cut if cut else 4000, temperature=0.0)
    actor = make_actor(model, tokenizer, tool, [row], lambda t: None, sampling)  # pyrefly: ignore
    return rollouts(actor, [0], 0)[0].trajectories[0]


def search(text: str) -> dict[str, Any]:
    return {"type": "search", "text": text}


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


ABSTAIN = {"type": "abstain"}


# ---- the cold start ----


@pytest.mark.parametrize("top_k", [1, 3])
def test_the_engine_forces_what_the_cold_start_shows_and_masks_the_same(
    kb: KnowledgeBase, tokenizer: Tokenizer, rows: list[dict[str, Any]], top_k: int
) -> None:
    tool = make_tool(tokenizer, kb, top_k, 60, 4)
    task = ColdStart(rows, tool, tokenizer, 3)
    rendered = [tokenizer.render_conversation(task[i]) for i in range(len(task))]
    model = reciter(tokenizer, [ids for ids, _ in rendered])
    asked = [{"question": task[i]["messages"][0]["content"]} for i in range(len(task))]
    actor = make_actor(model, tokenizer, tool, asked, lambda t: None, Sampling(1, 4000, 0.0))  # pyrefly: ignore
    shown = 0
    for (ids, mask), g in zip(rendered, rollouts(actor, range(len(task)), 0), strict=True):
        [t] = g.trajectories
        assert (t.ids, t.mask) == (ids, mask)
        assert outcome(t, tokenizer, tool).valid
        shown += t.ids.count(tokenizer.encode_special("<|doc|>"))
    assert shown > len(task)


def test_oracle_answers_are_right_and_cite_a_document_of_each_step(
    kb: KnowledgeBase, tokenizer: Tokenizer, rows: list[dict[str, Any]]
) -> None:
    tool = make_tool(tokenizer, kb, 2, 200, 4)
    by_question = {row["question"]: row for row in rows}
    kinds = dict.fromkeys(("answered", "abstained"), 0)
    for conversation in ColdStart(rows, tool, tokenizer, 3):
        row, parts = by_question[conversation["messages"][0]["content"]], conversation["messages"][1]["content"]
        documents = [d for p in parts if p["type"] == "info" for d in p.get("documents", [])]
        cited = [documents[p["n"] - 1] for p in parts if p["type"] == "cite"]
        if parts[-1]["type"] == "abstain":
            kinds["abstained"] += 1
            assert len(cited) == 0
            continue
        kinds["answered"] += 1
        [said] = [p["text"] for p in parts if p["type"] == "text"]
        assert row["answerable"] and said[1:] in row["answers"]
        for document, hop in zip(cited, row["hops"], strict=True):
            assert hop["answer"].lower() in f"{document['title']}\n{document['text']}".lower()
    assert min(kinds.values()) > 10


def test_a_miss_is_asked_again_in_other_words_and_then_given_up(tokenizer: Tokenizer) -> None:
    row = {"question": "Who taught Ada?", "answers": ["Bob"], "answerable": True, "relations": ["teacher"],
           "hops": [{"query": "teacher of Ada", "answer": "Bob", "gold_ids": ["x"]}]}  # fmt: skip
    other = reworded(row, 0)
    assert other != "teacher of Ada" and "Ada" in other
    asked: list[list[str]] = []

    def library(finds: set[str]) -> Any:
        hit = SimpleNamespace(
            document=SimpleNamespace(id="x", title="Ada"), chunk=SimpleNamespace(text="Bob taught Ada.")
        )

        def search(queries: list[str], k: int, retriever: str | None) -> list[list[Any]]:
            asked.append(queries)
            return [[hit] if query in finds else [] for query in queries]

        return SimpleNamespace(search=search)

    def parts(finds: set[str], **changes: Any) -> list[Any]:
        tool = make_tool(tokenizer, library(finds), 1, 40, changes.pop("max_searches", 4))
        made = ColdStart([{**row, **changes}], tool, tokenizer, 3)[0]["messages"][1]["content"]
        return [
            p.get("text", str(p.get("n", p["type"]))).strip() if "documents" not in p else "documents" for p in made
        ]

    assert parts({"teacher of Ada", other}) == ["teacher of Ada", "documents", "Bob", "1"]
    assert parts({other}) == ["teacher of Ada", NOTHING_FOUND, other, "documents", "Bob", "1"]
    assert parts(set()) == ["teacher of Ada", NOTHING_FOUND, other, NOTHING_FOUND, "abstain"]
    assert parts(set(), max_searches=1) == ["teacher of Ada", NOTHING_FOUND, other, NO_MORE_SEARCHES, "abstain"]
    assert parts({other}, answerable=False)[-1] == "abstain"
    assert reworded({**row, "relations": []}, 0) == row["question"]


def test_all_is_retrieved_in_two_batches_and_numbers_of_hops_take_turns(
    kb: KnowledgeBase, tokenizer: Tokenizer, rows: list[dict[str, Any]]
) -> None:
    calls: list[int] = []
    counted = SimpleNamespace(search=lambda queries, **how: (calls.append(len(queries)), kb.search(queries, **how))[1])
    task = ColdStart(rows, make_tool(tokenizer, counted, 1, 60, 4), tokenizer, 3)
    assert len(calls) == 2
    questions = {row["question"]: len(row["hops"]) for row in rows}
    assert [questions[task[i]["messages"][0]["content"]] for i in range(9)] == [1, 2, 3] * 3
    mixed = with_chat(task, "train", ["Arithmetic:5"], 0.1)
    assert len(mixed) == len(task) + round(len(task) / 9)


def test_what_does_not_fit_is_left_out_and_rows_without_steps_are_no_use(
    kb: KnowledgeBase, tokenizer: Tokenizer, rows: list[dict[str, Any]]
) -> None:
    tool = make_tool(tokenizer, kb, 2, 200, 4)
    task = ColdStart(rows, tool, tokenizer, 3, max_tokens=500)
    assert task.counts["too long"] and max(len(tokenizer.render_conversation(c)[0]) for c in task) <= 500
    with pytest.raises(UserError, match="lower --top_k_per_hop"):
        ColdStart(rows, tool, tokenizer, 3, max_tokens=20)
    with pytest.raises(UserError, match="none of 1 questions has 1 to 3 hops"):
        usable([{"question": "?", "answers": ["a"], "answerable": True}], 3)
    assert {len(row["hops"]) for row in usable(rows, 2)} == {1, 2}


def test_names_are_exchanged_throughout_a_trajectory_and_anew_each_time(
    tool: Any, tokenizer: Tokenizer, rows: list[dict[str, Any]]
) -> None:
    words = invented_words(World(0, 64, "train"))
    plain, renamed = ColdStart(rows, tool, tokenizer, 3), ColdStart(rows, tool, tokenizer, 3, invented=words)
    assert len(plain) == len(renamed)
    shifts = set()
    for i in (0, 1, 2, len(renamed) - 1):
        before, after = (words_of(task[i]) for task in (plain, renamed))
        assert len(before) == len(after) and words_of(renamed[i]) == after
        names: dict[str, str] = {}
        for old, new in zip(before, after, strict=True):
            assert names.setdefault(old, new) == new and (old == new) == (old not in words)
        assert len(set(names.values())) == len(names)
        old, new = next((old, new) for old, new in names.items() if old != new)
        shifts.add((renamed.names.place[new] - renamed.names.place[old]) % len(words))
    assert len(shifts) > 1
    longest = max(len(tokenizer.render_conversation(c)[0]) for c in plain)
    tight = ColdStart(rows, tool, tokenizer, 3, max_tokens=longest, invented=words)
    assert max(len(tokenizer.render_conversation(c)[0]) for c in tight) <= longest


def words_of(conversation: Any) -> list[str]:
    return re.findall(r"\w+", str(conversation))


# ---- what a trajectory is worth ----

ROW = {"question": "Who?", "answers": ["Ada Lee"], "answerable": True, "hops": [{}, {}]}
NONE = {**ROW, "answers": [], "answerable": False}


def made(said: str = "", abstained: bool = False, valid: bool = True, searches: int = 2) -> Outcome:
    return Outcome(said, (), abstained, valid, searches)


@pytest.mark.parametrize(
    ("reward", "o", "row", "worth"),
    [
        ("em", made("the Ada Lee"), ROW, 1.0),
        ("em", made("Ada Lee", valid=False), ROW, 0.8),
        ("em", made("Ada"), ROW, 0.2),
        ("em", made("Ada", valid=False), ROW, 0.0),
        ("em", made(abstained=True), ROW, 0.2),
        ("em", made(abstained=True), NONE, 1.0),
        ("em", made("Ada Lee"), NONE, 0.2),
        ("f1", made("Ada"), ROW, 0.2 + 0.8 * 2 / 3),
        ("f1", made("Ada", valid=False), ROW, 0.8 * 2 / 3),
        ("ternary", made("Ada Lee"), ROW, 1.0),
        ("ternary", made("Ada Lee", valid=False), ROW, 0.8),
        ("ternary", made(abstained=True), ROW, 0.0),
        ("ternary", made("Bob"), ROW, -1.0),
        ("ternary", made(abstained=True), NONE, 1.0),
        ("ternary", made("Bob"), NONE, -1.0),
    ],
)
def test_rewards(reward: str, o: Outcome, row: dict[str, Any], worth: float) -> None:
    assert REWARDS[reward](o, row) == pytest.approx(worth)


def test_needless_searches_cost_once_the_policy_is_good() -> None:
    cost = Cost(0.02)
    assert cost.of(made(searches=5), ROW) == 0
    cost.active = True
    assert cost.of(made(searches=5), ROW) == pytest.approx(0.06) and cost.of(made(searches=1), ROW) == 0


@pytest.fixture(scope="module")
def tool(kb: KnowledgeBase, tokenizer: Tokenizer) -> Any:
    return make_tool(tokenizer, kb, 1, 60, 2)


def test_retrieved_ids_are_no_targets(tool: Any, tokenizer: Tokenizer, rows: list[dict[str, Any]]) -> None:
    row = next(row for row in rows if row["answerable"])
    t = act(tokenizer, tool, row, [search(row["hops"][0]["query"]), {"type": "cite", "n": 1}, text("Bob")])
    sampled = [i for i, m in zip(t.ids, t.mask, strict=True) if m]
    names = {i: name for name, i in tokenizer.special_ids.items()}
    assert [names[i] for i in sampled if i in names] == [
        "<|search_start|>", "<|search_end|>", "<|cite_start|>", "<|cite_end|>", "<|assistant_end|>",
    ]  # fmt: skip
    forced = t.ids[t.trace[0].at : t.trace[0].at + len(t.trace[0].ids)]
    assert len(forced) > 20 and sum(t.mask) + t.n_prompt + len(forced) == len(t.ids)
    judge = make_judge([row], tokenizer, tool, "em")
    v = judge(t)
    assert v.valid and not v.correct and v.reward == pytest.approx(0.2) and v.figures["searches"] == 1
    batch = Batch.of([SimpleNamespace(trajectories=[t], verdicts=[v], rewards=[v.reward])])  # pyrefly: ignore
    assert batch.tokens == sum(t.mask) and batch.targets[batch.targets >= 0].tolist() == sampled


def test_a_query_whose_end_was_forced_is_malformed_also_before_a_good_one(
    tool: Any, tokenizer: Tokenizer, rows: list[dict[str, Any]]
) -> None:
    long = dataclasses.replace(tool, max_query=3)
    good = [search("a"), text("Bob")]
    assert outcome(act(tokenizer, long, rows[0], good), tokenizer, long).valid
    t = act(tokenizer, long, rows[0], [search("wxyz wxyz"), *good])
    assert t.trace[0].query != "wxyz wxyz" and t.ended
    assert not outcome(t, tokenizer, long).valid and not well_formed(t, {long.start: long})


@pytest.mark.parametrize(
    ("parts", "valid"),
    [
        ([search("birth of the author"), {"type": "cite", "n": 1}, text("Bob")], True),
        ([search("birth of the author"), {"type": "cite", "n": 2}, text("Bob")], False),  # one document was shown
        ([search(" "), text("Bob")], False),
        ([search("a"), search("b"), search("c"), text("Bob")], True),  # told "no more searches"
        ([search("birth of the author"), ABSTAIN], True),
        ([{"type": "cite", "n": 1}, ABSTAIN], False),
        ([text("Bob")], True),
    ],
)
def test_formats(tool: Any, tokenizer: Tokenizer, rows: list[dict[str, Any]], parts: list, valid: bool) -> None:
    t = act(tokenizer, tool, rows[0], parts)
    assert outcome(t, tokenizer, tool).valid == valid and len(t.trace) == [p["type"] for p in parts].count("search")


def test_void_and_cut_trajectories_are_left_out(tool: Any, tokenizer: Tokenizer, rows: list[dict[str, Any]]) -> None:
    judge = make_judge(rows, tokenizer, tool, "em")
    void = judge(act(tokenizer, tool, rows[0], [search("birth of the author")]))
    assert void.masked and void.figures["void"] == 1 and not void.valid
    cut = act(tokenizer, tool, rows[0], [text("Bob Bob Bob")], cut=2)
    assert judge(cut).masked and judge(cut).figures["void"] == 0
    zero = make_judge(rows, tokenizer, tool, "em", truncated="zero")(cut)
    assert not zero.masked and zero.reward == 0 and not zero.correct
    assert not judge(act(tokenizer, tool, rows[0], [ABSTAIN])).masked


# ---- the objectives ----


def test_weights_of_every_algorithm() -> None:
    g = group(([0, 1], 1.0), ([0, 2], 0.0), ([0, 3], 0.5), ([0, 3], 0.0), masked=(3,))
    assert weights(g, "reinforce") == [0.5, -0.5, 0.0]
    assert weights(g, "grpo") == weights(g, "dapo") == pytest.approx([1.2244, -1.2244, 0.0], rel=1e-3)
    assert weights(g, "rejection") == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_first_update_of_dapo_is_that_of_grpo_and_far_ratios_give_no_gradient(pattern: str) -> None:
    model, groups = small(pattern), [group(([1, 4, 5, 6], 1.0), ([1, 7], 0.0)), group(([2, 3, 3], 0.5), ([2, 9, 1], 0))]

    def gradient(batch: Batch) -> list[Tensor]:
        model.zero_grad()
        for part in batch.parts(3):
            policy_loss(model, part)[0].backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    batch = Batch.of(groups, algorithm="dapo")
    plain, same = gradient(batch), gradient(old := remember(model, batch, 2))
    torch.testing.assert_close(same, plain, rtol=1e-3, atol=1e-6)
    assert old.old is not None and (old.old[:, :1] < 0).all()
    likelier = dataclasses.replace(old, old=old.old - 1.0, advantages=old.advantages.abs())  # r = e, A > 0
    assert all(not g.any() for g in gradient(likelier))
    rarer = dataclasses.replace(old, old=old.old + 1.0, advantages=-old.advantages.abs())  # r = 1 / e, A < 0
    assert all(not g.any() for g in gradient(rarer))


# ---- the curriculum ----


def test_levels() -> None:
    assert parse_levels(None, 3, 2) == [Level(2, 2), Level(3, 2)] and parse_levels(None, 1, 2) == [Level(1, 2)]
    assert parse_levels(["2:1:0.1", "3:4", 3], 3, 2) == [Level(2, 1, 0.1), Level(3, 4), Level(3, 2)]
    for wrong in ("4", "2:0", "2:1:0", "2:1:1.5", "x", "2:1:1:1"):
        with pytest.raises(UserError, match="expected HOPS:DOCUMENTS:CORPUS"):
            parse_levels([wrong], 3, 2)


def test_a_level_ends_when_it_is_mastered_or_its_time_is_over() -> None:
    levels = [Level(1, 1), Level(2, 1), Level(3, 1)]
    good = Curriculum(levels)
    assert [good.update(0.9, 0.01) for _ in range(5)] == [False] * 4 + [True] and good.level.hops == 2
    assert good.right == 0  # of a new level nothing is known
    bad = Curriculum(levels)
    reached = [bad.update(0.1, step / 9) for step in range(1, 10)]
    assert [i for i, moved in enumerate(reached, 1) if moved] == [3, 6] and bad.level.hops == 3
    again = Curriculum(levels, state=json.loads(json.dumps(bad.state)))
    assert again.level == bad.level and not again.update(1.0, 1.0)


def test_every_number_of_hops_stays_in_the_mix_and_a_position_continues_it() -> None:
    rows = [{"hops": [{}] * (1 + i % 3), "answerable": True} for i in range(30)]
    order = HopOrder(rows, seed=1)
    order.focus = 2
    drawn = [1 + next(order) % 3 for _ in range(400)]
    shares = [drawn.count(h) / 400 for h in (1, 2, 3)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.06)
    again = HopOrder(rows, seed=1, position=json.loads(json.dumps(order.position)))
    again.focus = 2
    assert [next(order) for _ in range(20)] == [next(again) for _ in range(20)]
    none = [{"hops": [{}], "answerable": False}] * 5
    mixed = HopOrder([*rows, *none], seed=1, unanswerable=0.2)
    assert sum(next(mixed) >= len(rows) for _ in range(400)) == pytest.approx(80, abs=24)
    assert mixed.shares() == pytest.approx({0: 0.2, 1: 0.2, 2: 0.2, 3: 0.4}) and HopOrder(none, 1).shares() == {0: 1.0}
    only = HopOrder(rows[::3], seed=1)
    assert {next(only) for _ in range(20)} == {next(o) for o in [Order(10, 0)] for _ in range(20)}


def test_a_smaller_corpus_keeps_the_gold_documents(kb: KnowledgeBase, tokenizer: Tokenizer, rows: list) -> None:
    gold = gold_ids(rows[:5])
    queries = [hop["query"] for row in rows for hop in row["hops"]]
    found = {}
    for share in (1.0, 0.2):
        tool = make_tool(tokenizer, kb, 3, 60, 4, corpus=share, always=gold)
        found[share] = {hit.document.id for hits in tool.handler(queries) for hit in hits}
    assert found[0.2] & gold == found[1.0] & gold or found[0.2] & gold > found[1.0] & gold
    assert len(found[0.2] - gold) < 0.4 * len(found[1.0] - gold)
    assert found[0.2] - gold <= {d.id for d in kb.documents()}


def test_a_world_of_other_names_is_searched_and_judged_in_them(
    place: Path, kb: KnowledgeBase, tokenizer: Tokenizer, rows: list
) -> None:
    names = Names(exchangeable(place)).draw(Dice("test", 1))
    elsewhere = Elsewhere(rows, kb, names)
    tool = make_tool(tokenizer, elsewhere, 3, 60, 4)
    judge = make_judge(elsewhere, tokenizer, tool, "em")
    queries = [hop["query"] for row in rows for hop in row["hops"]]
    found, plain = elsewhere.search([relabel(query, names) for query in queries], k=3), kb.search(queries, k=3)
    assert [[hit.document.id for hit in hits] for hits in found] == [[h.document.id for h in hits] for hits in plain]
    for hits, before in zip(found, plain, strict=True):
        for hit, was in zip(hits, before, strict=True):
            assert (hit.chunk.text != was.chunk.text) == was.document.id.startswith("train")  # whose names they are
            assert relabel(hit.chunk.text, names.back) == was.chunk.text
            assert relabel(hit.document, names.back) == was.document and hit.score == was.score
    i, row = next((i, row) for i, row in enumerate(rows) if relabel(row["answers"], names) != row["answers"])
    for answers, right in ((row["answers"], False), (elsewhere[i]["answers"], True)):
        parts = [{"type": "search", "text": " x"}, {"type": "text", "text": answers[0]}]
        trajectory = dataclasses.replace(act(tokenizer, tool, elsewhere[i], parts), example=i)
        assert judge(trajectory).correct == right
    same = Elsewhere(rows, kb, Names([]).draw(Dice("test", 1)))
    assert list(same) == rows and same.search(queries[:3], k=2) == kb.search(queries[:3], k=2)


# ---- evaluation ----


def episode(row: dict[str, Any], o: Outcome, *found: tuple[str, ...]) -> Episode:
    return Episode(row, o, tuple("q" * (i + 1) for i in range(len(found))), found)


TWO = {**ROW, "hops": [{"gold_ids": ["a", "b"], "query": "x"}, {"gold_ids": ["c"], "query": "y"}]}


def test_figures_of_an_episode() -> None:
    right = episode(TWO, made("Ada Lee", searches=3), ("b",), ("z",), ("c",)).values()
    assert right["EM"] == right["F1"] == right["all support found"] == right["over-searching"] == 1
    assert right["searches"] == 3 and right["steps needed"] == 2 and right["abstained, unanswerable"] is None
    half = episode(TWO, made("Ada", searches=1), ("a",)).values()
    assert half["EM"] == half["all support found"] == 0 and half["F1"] == pytest.approx(2 / 3)
    none = episode({**TWO, "answerable": False, "answers": []}, made(abstained=True)).values()
    assert none["EM"] is None and none["abstained, unanswerable"] == 1 and none["all support found"] is None


def test_figures_are_means_over_seeds_and_differences_are_paired() -> None:
    one = {**TWO, "hops": TWO["hops"][:1]}
    good = [episode(TWO, made("Ada Lee")), episode(one, made("Ada Lee"))]
    bad = [episode(TWO, made("Bob")), episode(one, made("Ada Lee"))]
    assert per_question([good, bad], "EM") == [0.5, 1.0] and per_question([good, bad], "EM", 2) == [0.5]
    gap = difference([good, good], [bad], 2)
    assert gap is not None and gap.value == 1 and gap.n == 1
    table = em_table({"refrag": [good], "single": [bad]}, [1.0, 0.0])
    assert [len(line.split("|")) for line in table.splitlines()] == [6] * 5 and "retriever's ceiling" in table
    assert '"Bob"' in traces(bad, 1) and "search" in traces([episode(TWO, made("Bob"), ("a",))], 1)


def test_the_ceiling_and_the_episodes_of_an_oracle(kb: KnowledgeBase, tokenizer: Tokenizer, rows: list) -> None:
    tool = make_tool(tokenizer, kb, 1, 200, 4)
    task = ColdStart(rows, tool, tokenizer, 3)
    said = {c["messages"][0]["content"]: tokenizer.render_conversation(c)[0] for c in task}
    model = reciter(tokenizer, list(said.values()))
    asked = [row for row in rows if row["question"] in said]
    episodes, tops = search_and_answer(model, tokenizer, tool, asked, 4000, 16), ceiling(tool, asked)
    assert [e.row["question"] for e in episodes] == [row["question"] for row in asked]
    for e, top in zip(episodes, tops, strict=True):
        v = e.values()
        assert (top is None) == (not e.row["answerable"]) == (v["EM"] is None)
        assert v["EM"] is None or v["EM"] == v["all support found"] >= top  # a reworded query may still find it
    assert 0.3 < sum(e.outcome.searches for e in episodes) / len(episodes) / 4 < 1
    record = json.loads(json.dumps(episodes[0].record()))
    assert record["searches"][0]["query"] == episodes[0].queries[0]


# ---- the script ----

TINY = [
    "--d_model=32", "--head_dim=16", "--max_seq_len=512", "--device_batch_size=2", "--total_batch_size=0",
    "--num_iterations=2", "--eval_every=-1", "--softcap=0", "--device=cpu", "--mamba2_head_dim=16", "--gdn_head_dim=16",
    "--model_tag=t",
]  # fmt: skip
SMALL = [
    "--source=base", "--model_tag=t", "--device=cpu", "--num_iterations=3", "--max_iterations=2", "--eval_every=0",
    "--examples_per_step=2", "--num_samples=2", "--eval_examples=2", "--chat_tasks=Arithmetic:64", "--log_every=100",
    "--max_new_tokens=12", "--eval_tokens=1000", "--truncated=zero", "--guard=off", "--save_every=0",
]  # fmt: skip


@pytest.fixture
def ready(base: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A base folder with text and a tokenizer -> the flags that name the data."""
    monkeypatch.setattr(plots, "png_bytes", lambda figure: b"")
    monkeypatch.setattr(multihop_eval, "png_bytes", lambda figure: b"")
    shutil.copytree(place / "tokenizer", base / "tokenizer")
    texts = [d.text for d in KnowledgeBase.open(place / "knowledge_base").documents()]
    for i in range(2):
        write_shard(base / "base_data" / f"shard_{i:05d}.parquet", texts[i::2], "test")
    return [f"--knowledge_base={place}"]


def section(base: Path, name: str) -> dict[str, Any]:
    return json.loads((base / "report" / f"{name}.json").read_text())


@pytest.mark.parametrize("pattern", ["mamba+attn", "mamba2+gdn"])
def test_cold_start_then_rl_then_evaluation_for_every_backbone(base: Path, ready: list[str], pattern: str) -> None:
    base_train.main([*TINY, f"--depth={1 + pattern.count('+')}", f"--block_pattern={pattern}"])
    more = ["--curriculum=2:1:0.5,3:1", "--search_cost=0.02", "--kl_coef=0.01", "--reward=ternary"]
    refrag_finetune.main([*SMALL, *ready, *more])
    folders = {tag: base / "refrag_checkpoints" / tag for tag in ("t", "t_cold")}
    metas = {tag: json.loads(next(f.glob("step_*/meta.json")).read_text()) for tag, f in folders.items()}
    assert metas["t"]["source"] == {"stage": "refrag", "model_tag": "t_cold", "step": 3}
    assert metas["t_cold"]["train_config"]["model_tag"] == "t_cold" and metas["t"]["step"] == 2
    assert metas["t"]["train_config"]["matrix_lr"] == metas["t_cold"]["train_config"]["matrix_lr"]
    rows = steps_of(folders["t"])
    assert {"searches", "hops", "void", "reward", "valid"} <= set(rows[1]) and "held_out_reward" in rows[0]
    told = section(base, "refrag_training")
    assert "refrag - before" in told["text"] and "retriever's ceiling" in told["text"] and "hops:" in told["text"]
    assert section(base, "refrag_cold_start")["metrics"]["tasks"].startswith("ColdStart")
    # an untrained model under the name of a rag model stands in for single-shot RAG
    shutil.copytree(base / "base_checkpoints", base / "rag_checkpoints")
    options = ["--mode=multihop", "--model_tag=t", "--max_problems=4", "--max_new_tokens=12", "--compare=t"]
    rag_eval.main([*options, *ready, "--device=cpu"])
    text = section(base, "refrag_multihop_evaluation")["text"]
    assert "refrag - cold" in text and "refrag - single" in text and "2 seeds" in text
    predictions = base / "rag_eval" / "refrag_t_000002" / "multihop.jsonl"
    assert len(predictions.read_text().splitlines()) == 4


@pytest.fixture
def base_model(base: Path, ready: list[str]) -> list[str]:
    base_train.main([*TINY, "--depth=1"])
    return ready


def test_resume_continues_bit_identically_and_skips_a_finished_cold_start(
    base: Path, base_model: list[str], capsys: pytest.CaptureFixture
) -> None:
    options = [*SMALL, *base_model, "--max_iterations=4", "--save_every=2", "--rl_lr_frac=0.5", "--algorithm=dapo",
               "--updates_per_rollout=2", "--num_samples=4"]  # fmt: skip
    refrag_finetune.main(options)
    folder = base / "refrag_checkpoints" / "t"
    whole, weights = steps_of(folder), (folder / "step_000004" / "model.safetensors").read_bytes()
    assert any(row.get("grad_norm", 0) > 0 for row in whole.values())
    shutil.rmtree(folder / "step_000004")
    with pytest.raises(UserError, match="holds a run at step 3: add --resume"):
        refrag_finetune.main(options)
    capsys.readouterr()
    refrag_finetune.main([*options, "--resume"])
    assert "cold start: finished before" in capsys.readouterr().out
    again = steps_of(folder)
    for step, row in whole.items():
        for key in set(row) - {"dt", "seconds", "tokens_per_s", "mfu"}:
            assert again[step].get(key) == row[key], (step, key)
    assert (folder / "step_000004" / "model.safetensors").read_bytes() == weights


def test_a_cold_start_alone_and_rl_from_it_under_another_name(base: Path, base_model: list[str]) -> None:
    refrag_finetune.main([*SMALL, *base_model, "--use_rewards=False", "--out_tag=first"])
    assert not (base / "refrag_checkpoints" / "first_cold").exists()
    options = [*SMALL, *base_model, "--source=refrag", "--model_tag=first", "--cold_start=False", "--out_tag=second"]
    refrag_finetune.main([*options, "--algorithm=rejection"])
    meta = json.loads(next((base / "refrag_checkpoints" / "second").glob("step_*/meta.json")).read_text())
    assert meta["source"]["model_tag"] == "first" and meta["train_config"]["algorithm"] == "rejection"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_samples=1"], "at least 2 samples"),
        (["--updates_per_rollout=2"], "add --algorithm=dapo"),
        (["--algorithm=dapo", "--updates_per_rollout=3"], "no multiple of updates_per_rollout"),
        (["--cold_start=False"], "say from which --model_tag"),
        (["--cold_start=False", "--use_rewards=False"], "leave nothing to do"),
        (["--dry_run"], "--use_rewards=False for a run that saves none"),
        (["--curriculum=9:1"], "curriculum level '9:1'"),
        (["--reward=bleu"], "bleu"),
        (["--mode=multihops"], "multihops"),
        ([], "missing --knowledge_base"),
        (["--knowledge_base=nowhere"], "holds no knowledge_base"),
    ],
)
def test_what_cannot_work_is_one_line(base: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as e:
        refrag_finetune.main(arguments)
    assert message in str(e.value) and "\n" not in str(e.value)


def test_the_shipped_config_loads_and_the_other_mode_is_reached() -> None:
    cfg = load_config(MultihopConfig, ["configs/refrag_hybrid_d20.py"])
    assert (cfg.max_hops, cfg.top_k_per_hop, cfg.use_rewards, cfg.searches) == (3, 3, True, 4)
    with pytest.raises(UserError, match="did you mean 'chunk_tokens'"):
        refrag_finetune.main(["--mode", "compress", "--chunk_token=3"])


def test_rates_come_from_the_checkpoint_unless_given() -> None:
    names = ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr", "ssm_lr")
    cfg = MultihopConfig(matrix_lr=0.5)
    assert inherit(cfg, dict.fromkeys(names, 0.1)) == {name: 0.1 for name in names if name != "matrix_lr"}
    with pytest.raises(UserError, match="with which embedding_lr it was trained: give --embedding_lr"):
        inherit(cfg, {})
