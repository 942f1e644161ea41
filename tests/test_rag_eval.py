"""rag_eval: figures of hand-made predictions, what each condition shows, the script from checkpoints to a report."""

import dataclasses
import json
import math
import operator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import rag_conditions
from nanochat.checkpoint import checkpoint_dir, save_checkpoint
from nanochat.config import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.rag import Answer
from nanochat.rag_conditions import CONDITIONS, Evidence, gather, may_distract, predict, with_own
from nanochat.rag_eval import (
    Prediction,
    Question,
    difference,
    guessing,
    is_sufficient,
    limited,
    prediction_from,
    question_from,
    retrieval_values,
    risk_curve,
    summary,
)
from nanochat.rag_tables import by_position, equal_coverage, layers
from nanochat.report import generate, report_dir
from nanochat.retrieval import Chunk, Document, Hit, KnowledgeBase
from nanochat.retrieval.metrics import cover_match
from nanochat.tokenizer import Tokenizer
from nanochat.world import World
from scripts import rag_eval
from tasks.world import guess_prior, world_documents, world_rows

WORLD = World(0, 64, "val")
DRAWN = world_rows(WORLD, 60, kinds=("1hop", "2hop", "missing", "counterfactual", "conflict"), max_facts=3)
ROWS = list({row["question"]: row for row in DRAWN}.values())
DOCUMENTS = list(world_documents(WORLD, max_facts=3))
TOKENIZER = Tokenizer.train([d.text for d in DOCUMENTS], 330)
values = operator.attrgetter("values")
SPLIT = ("right, supported", "right, unsupported", "wrong, supported (reading error)", "wrong, unsupported")


def question(**changed) -> Question:
    return Question(**{"id": "q", "text": "Where?", "answers": ("Rome",), "gold": (("a",),), **changed})


def hit(id: str, text: str, title: str = "") -> Hit:
    return Hit(Document(id, text, title), Chunk(0, len(text), text), 1.0, 1, "test")


def said(q: Question, text: str, hits: list[Hit], citations: tuple[int, ...] = (), abstained: bool = False):
    return prediction_from(q, Answer(text, citations, hits, abstained), [h.document.id for h in hits])


# ---- figures of one prediction ----


@pytest.mark.parametrize(
    ("text", "abstained", "expected"),
    [
        ("Rome", False, {"EM": 1, "F1": 1, "accuracy": 1, "abstention": 0, "hallucination": 0, "coverage": 1}),
        ("In Rome.", False, {"EM": 0, "F1": 2 / 3, "accuracy": 1, "abstention": 0, "hallucination": 0}),
        ("Paris", False, {"EM": 0, "F1": 0, "accuracy": 0, "hallucination": 1, "wrong among answered": 1}),
        ("", True, {"EM": 0, "F1": 0, "accuracy": 0, "abstention": 1, "hallucination": 0, "coverage": 0}),
        ("I don't know.", False, {"abstention": 1, "hallucination": 0, "wrong among answered": None}),
        (" ...", False, {"abstention": 1, "hallucination": 0, "words": None}),
    ],
)
def test_an_answerable_question_is_judged(text: str, abstained: bool, expected: dict) -> None:
    found = values(said(question(), text, [], abstained=abstained))
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_any_answer_to_an_unanswerable_question_is_a_hallucination() -> None:
    q = question(answers=(), answerable=False, gold=())
    answered, abstained = values(said(q, "Rome", [])), values(said(q, "", [], abstained=True))
    assert (answered["hallucination"], answered["accuracy"], answered["EM"], answered["coverage"]) == (1, 0, None, None)
    assert (abstained["hallucination"], abstained["accuracy"], abstained["abstained, unanswerable"]) == (0, 0, 1)


@pytest.mark.parametrize(
    ("text", "documents", "expected"),
    [
        ("Rome", ["He lives in Rome."], 0),
        ("He is in Rome", ["Rome is where he lives."], 0),  # the answer stands there, if not the sentence
        ("Rome", ["He lives somewhere."], 1),
        ("Rome", [], 1),
        ("Paris", ["Rome and Paris."], 2),
        ("Paris", ["He lives in Rome, not Parisian."], 3),
    ],
)
def test_answers_split_by_right_and_by_what_stands_in_the_documents(text, documents, expected) -> None:
    found = values(said(question(), text, [hit("a", d) for d in documents]))
    assert [found[name] for name in SPLIT] == [float(i == expected) for i in range(4)]


def test_yes_is_supported_where_the_gold_documents_are_shown() -> None:
    q = question(answers=("yes",))
    assert said(q, "Yes", [hit("a", "Both are rivers.")]).supported
    assert not said(q, "Yes", [hit("b", "Both are rivers, yes.")]).supported


def test_documents_are_sufficient_when_every_piece_is_shown_and_the_answer_is_not_cut_off() -> None:
    q = question(gold=(("a", "a2"), ("b",)))
    a2, b = hit("a2", "She was born in Ur."), hit("b", "The mayor of Ur lives in Rome.")
    assert is_sufficient(q, [b, hit("x", "."), a2]) is True
    assert is_sufficient(q, [b]) is False and is_sufficient(q, []) is False
    assert is_sufficient(q, [dataclasses.replace(b, chunk=Chunk(0, 13, "The mayor of")), a2]) is False
    half = question(gold=q.gold, steps=(("Ur",), ("Rome",)))
    assert is_sufficient(half, [b, a2]) is True
    a2_cut, b_cut = (dataclasses.replace(d, chunk=Chunk(0, 7, d.chunk.text[:7])) for d in (a2, b))
    assert is_sufficient(half, [a2_cut, hit("b", "Rome.")]) is False  # the step on the way is not told any more
    assert is_sufficient(half, [a2, b_cut]) is False
    assert is_sufficient(question(gold=()), [b]) is None
    assert values(said(q, "Rome", [b]))["reading EM"] is None
    assert values(said(q, "Rome", [b, a2]))["reading EM"] == 1
    assert values(said(q, "", [b], abstained=True))["abstained, documents insufficient"] == 1
    assert values(said(q, "", [b, a2], abstained=True))["abstained, documents sufficient"] == 1


@pytest.mark.parametrize(
    ("citations", "precision", "recall"),
    [
        ((), None, 0),
        ((1,), 1, 0.5),
        ((1, 1), 1, 0.5),
        ((3, 1), 1, 1),
        ((1, 2), 0.5, 0.5),
        ((2,), 0, 0),
        ((1, 9), 0.5, 0.5),
    ],
)
def test_citations_are_measured_against_the_gold_documents(citations, precision, recall) -> None:
    q = question(gold=(("a", "a2"), ("b",), ("never shown",)))
    found = values(said(q, "Rome", [hit("a2", "Rome"), hit("x", "Rome"), hit("b", "Rome")], citations))
    assert (found["citation precision"], found["citation recall"]) == (precision, recall)


def test_citing_on_an_unanswerable_question_is_imprecise_and_unknown_gold_is_not_counted() -> None:
    unanswerable = question(answers=(), answerable=False, gold=())
    assert values(said(unanswerable, "Rome", [hit("a", "Rome")], (1,)))["citation precision"] == 0
    assert values(said(question(gold=()), "Rome", [hit("a", "Rome")], (1,)))["citation precision"] is None


@pytest.mark.parametrize(
    ("text", "context", "memory"),
    [("Rome", 1, 0), ("Old Town", 0, 1), ("Rome, once Old Town", 0, 1), ("Paris", 0, 0), ("", 0, 0)],
)
def test_changed_documents_are_followed_or_memory_is(text, context, memory) -> None:
    found = values(said(question(outdated=("Old Town",)), text, [hit("a", "Rome")]))
    assert (found["context-following"], found["memory-following"]) == (context, memory)
    assert values(said(question(), text, []))["context-following"] is None


def test_an_outdated_answer_inside_the_right_one_does_no_harm() -> None:
    assert said(question(answers=("New York",), outdated=("York",)), "New York", []).right


def test_retrieval_is_measured_by_pieces_of_evidence() -> None:
    q = question(gold=(("a", "a2"), ("b",)))
    expected = {"any gold": 1.0, "all gold": 0.0, "recall": 0.5, "MRR": 1 / 3}
    assert retrieval_values(q, ["x", "y", "a2", "a"]) == pytest.approx(expected)
    assert retrieval_values(q, ["b", "a2"])["all gold"] == 1 and retrieval_values(q, [])["MRR"] == 0
    assert set(retrieval_values(question(gold=()), ["a"]).values()) == {None}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["Rome", "Paris", "", "in Rome", "Old"]), st.booleans(), st.booleans()),
                min_size=1, max_size=12))  # fmt: skip
def test_outcomes_add_up_to_one_and_so_do_the_four_kinds_of_answers(given) -> None:
    run = [
        said(question(answers=("Rome",) if ok else (), answerable=ok), text, [hit("a", "Rome, Paris")], (), abstains)
        for text, ok, abstains in given
    ]
    found = summary(run)
    assert sum(found[m].value for m in ("accuracy", "abstention", "hallucination")) == pytest.approx(1)
    if any(p.answered for p in run):
        assert sum(found[m].value for m in SPLIT) == pytest.approx(1)
        assert found[SPLIT[0]].n == sum(p.answered for p in run)


# ---- figures of several ----


def run_of(rights: list[int | None], logprobs: list[float] | None = None) -> list[Prediction]:
    """Answers that are right (1), wrong (0) or missing (None)."""
    texts = {1: "Rome", 0: "Paris", None: ""}
    sure = logprobs or [0.0] * len(rights)
    return [
        Prediction(question(id=str(i)), texts[r], r is None, logprob=p)
        for i, (r, p) in enumerate(zip(rights, sure, strict=True))
    ]


def test_a_mean_has_its_count_standard_error_and_interval() -> None:
    found = summary(run_of([1] * 30 + [0] * 10))["accuracy"]
    assert (found.value, found.n) == (0.75, 40)
    assert found.stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 40))
    assert found.low == pytest.approx(0.75 - 1.96 * found.stderr, abs=0.03)
    assert found.high == pytest.approx(0.75 + 1.96 * found.stderr, abs=0.03)


def test_differences_are_paired() -> None:
    a, b = run_of([1, 1, 0, 1] * 10), run_of([1, 0, 0, 0] * 10)
    found = difference(a, b, "EM")
    assert found is not None and found.value == 0.5 and 0.3 < found.low < 0.5 < found.high < 0.7
    same = difference(a, a, "EM")
    assert same is not None and (same.low, same.high) == (0, 0)
    with pytest.raises(UserError, match="another order"):
        difference(a, b[::-1], "EM")


def test_the_surest_answers_are_kept_and_both_are_cut_to_the_same_coverage() -> None:
    always = run_of([1, 0, 0, 1], [-0.1, -5.0, -1.0, -2.0])
    assert [p.answered for p in limited(always, 2)] == [True, False, True, False]
    some = run_of([1, None, 1, None])
    a, b = equal_coverage(some, always)
    assert a == some and summary(b)["hallucination"].value == 0.25 and summary(b)["abstention"].value == 0.5
    assert risk_curve(always) == ([0.25, 0.5, 0.75, 1.0], pytest.approx([0, 1 / 2, 1 / 3, 1 / 2]))
    assert risk_curve(run_of([None])) == ([], [])


def test_guessing_takes_one_answer_for_each_form_of_question() -> None:
    answers = [("Rome", "Roma"), ("the Roma",), ("Ur",), ("Rome",), ()]
    asked = [question(answers=a, answerable=bool(a)) for a in answers]
    assert guessing(asked) == (0.5, 0.5)  # Roma or Rome twice of four; each half knows one of them from the other
    assert guessing([dataclasses.replace(q, form=str(i)) for i, q in enumerate(asked)]) == (1, 0)
    bound, honest = guessing([question_from(row, "") for row in ROWS])
    assert bound == pytest.approx(guess_prior([row for row in ROWS if row["answerable"]])) and honest < bound


def test_rows_become_questions_with_alternatives_for_each_hop() -> None:
    hops = [{"answer": "Ur", "gold_ids": ["a", "a2"]}, {"answer": "Rome", "gold_ids": ["b"]}]
    row = {"question": "Where?", "answers": ["Rome"], "gold_ids": ["a", "b"], "hops": hops, "answerable": True}
    found = question_from(row, "3")
    assert (found.id, found.kind, found.clues) == ("3", "answerable", ("Rome", "Ur", "Rome"))
    assert found.gold == (("a", "a2"), ("b",))
    assert question_from({**row, "hops": []}, "3").gold == (("a",), ("b",))
    with pytest.raises(UserError, match="question 7 has no answers"):
        question_from({"id": 7, "question": "?", "answers": []}, "")


# ---- conditions ----


@pytest.fixture(scope="module")
def kb(tmp_path_factory: pytest.TempPathFactory) -> KnowledgeBase:
    return KnowledgeBase.build(DOCUMENTS, tmp_path_factory.mktemp("base") / "knowledge_base")


@pytest.fixture(scope="module")
def evidence(kb: KnowledgeBase) -> Evidence:
    return gather([question_from(row, "") for row in ROWS], kb, top_k=4, far=10)


def ids(hits: list[Hit]) -> list[str]:
    return [h.document.id for h in hits]


def test_every_condition_shows_what_it_says(evidence: Evidence) -> None:
    shown = {name: evidence.documents(name) for name in CONDITIONS}
    assert shown["documents_untrained"] is shown["rag"] and not any(shown["closed_book"])
    for i, q in enumerate(evidence.questions):
        assert len(shown["rag"][i]) == 4
        assert q.gold_ids.isdisjoint(ids(shown["shuffled"][i]))
        if not q.gold:
            assert shown["oracle"][i] == shown["rag"][i] == shown["oracle_distractors"][i]
            continue
        assert is_sufficient(q, shown["oracle"][i]) and len(shown["oracle"][i]) <= len(q.gold)
        assert is_sufficient(q, shown["oracle_distractors"][i]) and len(shown["oracle_distractors"][i]) == 4
        others = [h for h in shown["oracle_distractors"][i] if h.document.id not in q.gold_ids]
        assert all(may_distract(q, h) for h in others)
        assert not any(cover_match(h.chunk.text, q.answers) for h in others)


def test_the_gold_document_takes_every_place_equally_often(evidence: Evidence) -> None:
    chosen = [i for i, q in enumerate(evidence.questions) if len(q.gold) == 1]
    places = [ids(evidence.among(i, 3)).index(evidence.gold[i][0].document.id) for i in chosen]
    assert places == [i % 3 for i in chosen]
    assert [ids(evidence.among(i, 3)) for i in chosen] == [ids(evidence.among(i, 3)) for i in chosen]
    run = [Prediction(evidence.questions[i], "", True, offered=tuple(ids(evidence.among(i, 3)))) for i in chosen]
    assert sum(f.n for f in by_position(run).values()) == len(chosen) and set(by_position(run)) == {1, 2, 3}


def test_changed_documents_stand_where_the_old_ones_were_found(evidence: Evidence, kb: KnowledgeBase) -> None:
    for q, hits in zip(evidence.questions, evidence.retrieved, strict=True):
        own = {d.id: d for d in q.own}
        assert all(h.document == own[h.document.id] for h in hits if h.document.id in own)
        if q.kind == "conflict" and own.keys() & set(ids(hits)):
            assert own.keys() <= set(ids(hits))
    new = Document("new", "Rome.")
    hits = [hit("x", "."), hit("y", ".")]
    assert ids(with_own(question(own=(new,)), hits, kb, 3)) == ["new", "x", "y"]
    missed = question(own=(Document(DOCUMENTS[0].id, "Rome."),))
    assert with_own(missed, hits, kb, 2) == hits
    found = with_own(question(own=(Document("y", "Rome."), new)), [*hits, hit("z", ".")], kb, 4)
    assert (ids(found), [h.rank for h in found]) == (["x", "y", "new", "z"], [1, 2, 3, 4])
    assert found[1].chunk.text == "Rome."
    assert ids(with_own(question(own=(Document("y", "Rome."), new)), hits, kb, 2)) == ["y", "new"]


def test_a_gold_document_that_is_nowhere_is_named(kb: KnowledgeBase) -> None:
    with pytest.raises(UserError, match="question q: its gold document 'a' is not in"):
        gather([question()], kb)


def test_of_few_questions_shuffling_shows_what_another_found_without_the_gold_ones(kb: KnowledgeBase) -> None:
    row = next(row for row in ROWS if row["kind"] == "1hop")
    for n in (1, 2):
        lone = gather([question_from(row, "")] * n, kb)
        for shown, found in zip(lone.documents("shuffled"), lone.documents("rag"), strict=True):
            assert shown == [hit for hit in found if hit.document.id not in row["gold_ids"]] != found


def test_no_more_documents_are_asked_for_than_there_are(kb: KnowledgeBase) -> None:
    asked = [question_from(row, "") for row in ROWS[:2]]
    most = len(kb) + max(len(q.own) for q in asked)
    every, exact = (gather(asked, kb, top_k=n) for n in (10**9, most))
    assert every == exact and every.top_k == most


def reads(engine, questions, hits, *_, **__) -> list[Answer]:
    """A perfect reader of one hop: the answer and its document where it is shown, else it abstains."""
    replies = []
    for text, shown in zip(questions, hits, strict=True):
        q = next(q for q in (question_from(row, "") for row in ROWS) if q.text == text)
        at = next((n for n, h in enumerate(shown, 1) if cover_match(h.chunk.text, q.answers or ["~"])), None)
        text = q.answers[0] if at else ""
        replies.append(Answer(text, (at,) if at else (), list(shown), not at, logprob=-1.0))
    return replies


def test_a_perfect_reader_is_bounded_by_retrieval_alone(evidence: Evidence, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rag_conditions, "answer_from", reads)
    model = tiny()
    found = {}
    for name in CONDITIONS:
        run = predict(model, TOKENIZER, evidence.questions, evidence.documents(name), 512, batch_size=7)
        assert [p.question for p in run] == evidence.questions
        found[name] = summary(run)
        if name == "rag":
            reading = [values(p)["reading EM"] for p in run]
            assert {v for v in reading if v is not None} == {1.0}
    assert found["oracle"]["EM"].value == found["oracle_distractors"]["EM"].value == 1
    assert found["closed_book"]["abstention"].value == 1 and found["shuffled"]["EM"].value < 0.2
    assert found["shuffled"]["EM"].value < found["rag"]["EM"].value <= 1
    assert all(f["hallucination"].value == 0 for f in found.values())
    assert found["oracle"]["citation precision"].value > 0.9 and found["oracle"]["context-following"].value == 1


# ---- the model and the script ----


def tiny(pattern: list[str] | None = None, seq_len: int = 160) -> GPT:
    model = GPT(GPTConfig(2, pattern or ["attn"], 32, 2, vocab_size=TOKENIZER.vocab_size, seq_len=seq_len))
    model.init_weights(0)
    model.set_compute(torch.float32)
    return model.eval()


def test_documents_that_do_not_fit_are_dropped_from_the_last_and_counted(evidence: Evidence) -> None:
    model, documents = tiny(), evidence.documents("rag")
    run = predict(model, TOKENIZER, evidence.questions[:9], documents[:9], 48, max_new_tokens=4, batch_size=4)
    found = summary(run)
    assert all(
        p.offered == tuple(ids(d)) and p.shown == p.offered[: len(p.shown)]
        for p, d in zip(run, documents[:9], strict=True)
    )
    assert (
        found["documents dropped"].value > 0 and found["documents dropped"].value + found["documents shown"].value == 4
    )
    assert all(p.prompt_tokens <= 156 and p.logprob is not None and p.logprob < 0 for p in run)


def test_answers_do_not_depend_on_the_batch(evidence: Evidence) -> None:
    model, documents = tiny(["mamba"]), evidence.documents("rag")
    runs = [predict(model, TOKENIZER, evidence.questions[:5], documents[:5], 48, 8, size) for size in (1, 5)]
    assert [(p.text, p.citations, p.shown) for p in runs[0]] == [(p.text, p.citations, p.shown) for p in runs[1]]


@pytest.fixture
def home(base: Path, kb: KnowledgeBase) -> Path:
    """A base folder with an sft and two rag checkpoints; rows lie beside the knowledge base."""
    TOKENIZER.save(base / "tokenizer")
    for source, tag, pattern in (("sft", "t", ["attn"]), ("rag", "t", ["attn"]), ("rag", "m", ["attn", "mamba"])):
        model = tiny(pattern)
        meta = {"model_config": dataclasses.asdict(model.config), "tokenizer_hash": TOKENIZER.hash}
        meta["train_config"] = {"model_tag": tag}
        save_checkpoint(checkpoint_dir(source, tag), 3, model=model.state_dict(), optim=None, state={}, meta=meta)
    with open(Path(kb.path).parent / "val.jsonl", "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in ROWS)
    return base


QUICK = ["-x", "16", "--top_k=2", "--max_doc_length=48", "--max_new_tokens=4", "--device=cpu", "-d", "float32",
         "--sizes=1,2,20", "--size_questions=6"]  # fmt: skip


def test_the_script_measures_every_condition_and_reports(home: Path, kb: KnowledgeBase, capsys) -> None:
    folder = str(Path(kb.path).parent)
    rag_eval.main(["--knowledge_base", folder, "-g", "t", "--compare=m,t,m", *QUICK])
    out = capsys.readouterr().out
    assert "rag_t_000003: given twice, measured once" in out and "rag_m_000003: given twice, measured once" in out
    assert "rag_t_000003: 20 documents are there and fit for 0 of 6 questions: left out" in out
    files = {c: home / "rag_eval" / f"{'sft' if who == 'baseline' else 'rag'}_t_000003" / f"{c}.jsonl"
             for c, (who, _) in CONDITIONS.items()}  # fmt: skip
    lines = {c: [json.loads(line) for line in path.open()] for c, path in files.items()}
    asked = [line["id"] for line in lines["rag"]]
    assert len(asked) == 16 and all([line["id"] for line in found] == asked for found in lines.values())
    assert [x["documents"] for x in lines["rag"]] == [x["documents"] for x in lines["documents_untrained"]]
    assert [x["text"] for x in lines["rag"]] == [x["text"] for x in lines["documents_untrained"]]  # the same weights
    section = json.loads((report_dir() / "rag_evaluation.json").read_text())
    assert section["metrics"]["RAG exact match"]["n"] == sum(line["answerable"] for line in lines["rag"])
    assert (
        len(section["plots"]) == 3
        and "| rag - closed_book " in section["text"]
        and "1 attn, 1 mamba" in section["text"]
    )
    kept = json.loads((home / "rag_eval" / "rag_t_000003" / "summary.json").read_text())
    assert list(kept["conditions"]) == list(CONDITIONS)
    trio = [kept["conditions"]["rag"][m]["value"] for m in ("accuracy", "abstention", "hallucination")]
    assert sum(trio) == pytest.approx(1)
    table = generate(home).read_text().split("## Summary")[1].splitlines()
    row = next(line for line in table if line.startswith("| RAG exact match"))
    assert row.split("|")[5].strip().endswith(f"(n={section['metrics']['RAG exact match']['n']})")


def test_a_model_is_evaluated_without_a_baseline_and_without_sizes(home: Path, kb: KnowledgeBase, capsys) -> None:
    rag_eval.main(["--knowledge_base", str(kb.path), "-g", "m", "--baseline=none", *QUICK, "--size_questions=0"])
    out = capsys.readouterr().out
    assert "closed_book" not in out and "oracle" in out and "place of the gold" not in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--baseline_tag=x"], "trained tags of sft: t"),
        (["--compare=nope", "--knowledge_base=nowhere"], "--compare=nope: no checkpoint in"),
        (["--rows=none.jsonl"], "none.jsonl"),
        (["--sizes=0"], "expected numbers of documents"),
        (["--top_k=0"], "give positive numbers"),
        (["--retriever_type=dense"], "needs the index 'dense'"),
    ],
)
def test_mistakes_are_named(home: Path, kb: KnowledgeBase, flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rag_eval.main(["--knowledge_base", str(kb.path), "-g", "t", *QUICK, *flags])


def test_layers_are_counted_by_name() -> None:
    assert layers("T,M", 4) == "2 attn, 2 mamba"
