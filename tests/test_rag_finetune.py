"""tasks.rag and rag_finetune: what a question is shown, by which rule it is answered, and that training teaches it."""

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanochat import device, finetune
from nanochat.checkpoint import checkpoint_dir, load_model, save_checkpoint
from nanochat.common import REPO_DIR
from nanochat.config import UserError, load_config
from nanochat.gpt import GPT, GPTConfig
from nanochat.plots import read_metrics
from nanochat.retrieval import Document, KnowledgeBase
from nanochat.tokenizer import Tokenizer
from nanochat.world import World
from scripts import rag_finetune
from scripts.prepare_rag_dataset import main as prepare
from scripts.rag_finetune import RagFinetuneConfig
from tasks.mixtures import with_chat
from tasks.rag import RAG, Shares, alike, dataset_folder, hops, load_rows
from tasks.world import world_documents, world_rows

WORLD = World(0, 64, "train")
KINDS = ("1hop", "2hop", "missing", "counterfactual", "conflict")
ROWS = world_rows(WORLD, 60, kinds=KINDS, max_facts=2)
OPTIONS = [
    "--device=cpu", "--dtype=float32", "--eval_tokens=512", "--log_every=100", "--model_tag=t", "--save_every=-1",
    "--embedding_lr=0.2", "--unembedding_lr=0.004", "--matrix_lr=0.02", "--scalar_lr=0.02", "--ssm_lr=0.01",
    "--weight_decay=0", "--grad_clip=1", "--device_batch_size=2", "--total_batch_size=0", "--max_seq_len=256",
    "--chat_tasks=Arithmetic:20", "--top_k=2", "--max_doc_length=40",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """No measuring of the machine, no pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "peak_flops", lambda *_: 0.0)
        patch.setattr(finetune, "plot_metrics", lambda _: [])
        yield


@pytest.fixture(scope="module")
def kb(tmp_path_factory: pytest.TempPathFactory) -> KnowledgeBase:
    path = tmp_path_factory.mktemp("kb") / "kb"
    return KnowledgeBase.build(world_documents(WORLD, max_facts=2), path, retriever="simple")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train((d.text for d in world_documents(WORLD)), 500)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A base folder with a tokenizer, an untrained sft checkpoint `t` and a dataset."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer.save(folder / "tokenizer")
    prepare(["--mode=world", f"--output={folder / 'data'}", "--world_size=nano", "--max_facts=2",
             "--retriever_type=simple", "--kinds=1hop,missing"])  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        model = GPT(GPTConfig(2, ["attn", "mamba"], 32, 2, vocab_size=tokenizer.vocab_size, seq_len=256))
        model.init_weights(0)
        meta = {"model_config": dataclasses.asdict(model.config), "tokenizer_hash": tokenizer.hash, "train_config": {}}
        save_checkpoint(checkpoint_dir("sft", "t"), 1, model=model.state_dict(), optim=None, state={}, meta=meta)
    return folder


@pytest.fixture
def home(dataset: Path, base: Path) -> Path:
    for name in ("tokenizer", "data", "sft_checkpoints"):
        shutil.copytree(dataset / name, base / name)
    return base


def shown(conversation: dict[str, Any]) -> list[dict[str, str]]:
    content = conversation["messages"][-2]["content"]
    return content[1]["documents"] if isinstance(content, list) else []


def said(conversation: dict[str, Any]) -> list[dict[str, Any]]:
    return conversation["messages"][-1]["content"]


def text_of(document: dict[str, str]) -> str:
    return f"{document['title']}\n{document['text']}"


# ---- what is shown ----


def test_an_answer_is_in_what_it_cites_and_nowhere_without(kb: KnowledgeBase) -> None:
    task = RAG(ROWS, kb, top_k=4, variants=6)
    for conversation in task:
        documents, texts = shown(conversation), [text_of(d) for d in shown(conversation)]
        assert len(documents) <= 4
        if conversation["answerable"]:
            answer, *cites = said(conversation)
            assert [c["n"] for c in cites] == conversation["gold"] != [] and answer["text"][1:] in conversation[
                "answers"
            ]
            assert any(answer["text"] in texts[n - 1] for n in conversation["gold"])
        else:
            assert said(conversation) == [{"type": "abstain"}] and conversation["gold"] == []
        if conversation["case"] == "absent":
            assert not any(answer in text for answer in conversation["answers"] for text in texts)
        if conversation["case"] == "gold" and conversation["kind"] == "1hop":
            others = [text for n, text in enumerate(texts, 1) if n not in conversation["gold"]]
            assert not any(f" {answer}." in text for answer in conversation["answers"] for text in others)


def test_every_kind_is_treated_as_it_should(kb: KnowledgeBase) -> None:
    task = RAG(ROWS, kb, top_k=4, variants=6)
    for i, conversation in enumerate(task):
        row, titles = ROWS[i % len(ROWS)], Counter(d["title"] for d in shown(conversation))
        if row["kind"] == "missing":
            assert conversation["case"] == "unanswerable" and not conversation["answerable"]
        elif conversation["case"] != "gold":
            continue
        elif row["kind"] == "2hop":
            assert len(conversation["gold"]) == len(hops(row)) == 2
        elif row["kind"] == "counterfactual":
            told = [d["text"] for d in shown(conversation)]
            original = kb.get(row["gold_ids"][0])
            assert told[conversation["gold"][0] - 1] == row["documents"][0]["text"]
            assert original is not None and original.text not in told
        elif row["kind"] == "conflict":
            gold = shown(conversation)[conversation["gold"][0] - 1]
            assert gold["text"] == next(d["text"] for d in row["documents"] if d["id"] in row["gold_ids"])
            assert titles[row["documents"][0]["title"]] >= 2


def test_shares_positions_and_numbers_of_documents_are_as_drawn(kb: KnowledgeBase) -> None:
    rows = [row for row in ROWS if row["kind"] == "1hop"]
    task = RAG(rows, kb, top_k=4, shares=Shares(0.6, 0.3, 0.1), variants=1000 // len(rows))
    cases = Counter(c["case"] for c in task)
    for case, share in (("gold", 0.6), ("absent", 0.3), ("retrieved", 0.1)):
        assert abs(cases[case] / len(task) - share) < 0.07  # four standard deviations
    gold = [c for c in task if c["case"] == "gold"]
    counts = Counter((len(shown(c)), c["gold"][0]) for c in gold)
    for n in range(1, 5):
        for position in range(1, n + 1):
            assert abs(counts[n, position] / len(gold) - 1 / 4 / n) < 0.08, (n, position)
    with pytest.raises(UserError, match=r"gold=0.5, absent=0.2, retrieved=0.2: expected 0 or more, 1 in all"):
        Shares(0.5)


def test_other_documents_answer_the_same_of_something_else(kb: KnowledgeBase) -> None:
    rows = world_rows(WORLD, 200, kinds=("1hop",), max_facts=2)
    evidence = {key: {id for row in rows if alike(row) == key for hop in hops(row) for id in hop} for key in
                map(alike, rows)}  # fmt: skip
    task = RAG(rows, kb, top_k=4, shares=Shares(0.5, 0.5, 0), variants=400 // len(rows))
    by_text = {p.text: p.id for p in task.passages.values()}
    by_text |= {d.text: id for ids in evidence.values() for id in ids if (d := kb.get(id)) is not None}
    rivals = others = 0
    for i, conversation in enumerate(task):
        row = task.rows[i % len(rows)]
        own = {id for hop in hops(row) for id in hop}
        ids = [by_text[d["text"]] for d in shown(conversation)]
        if len(evidence[alike(row)] - own) >= 4:
            rivals += sum(id in evidence[alike(row)] - own for id in ids)
            others += sum(id not in own for id in ids)
    assert others > 200 and 0.33 < rivals / others < 0.7  # a third is drawn so, some of the rest happen to be


def test_the_length_of_a_document_does_not_tell_that_it_is_the_gold_one(tmp_path: Path) -> None:
    """A document of many facts is asked about more often than one of few, so distractors are what others ask about."""
    kb = KnowledgeBase.build(
        [Document(f"{n}-{i}", f"w{n}v{i} " + "it is so. " * n, f"t{n}v{i}") for n in (1, 20) for i in range(30)],
        tmp_path / "kb",
        retriever="simple",
    )
    often = [(20, i) for i in range(30)] * 3 + [(1, i) for i in range(30)]
    rows = [{"id": f"{j}", "question": f"Where does t{n}v{i} lie?", "answers": [f"w{n}v{i}"], "answerable": True,
             "gold_ids": [f"{n}-{i}"]} for j, (n, i) in enumerate(often)]  # fmt: skip
    long = [0, 0]
    for conversation in RAG(rows, kb, top_k=5, shares=Shares(0, 1, 0), variants=5):
        for document in shown(conversation):
            long[0] += "so. it" in document["text"]
            long[1] += 1
    assert long[1] > 1000 and 0.65 < long[0] / long[1] < 0.85


def test_questions_without_relations_are_alike_by_their_first_words() -> None:
    row = {"question": "Who runs the mill?"}
    assert alike(row) == alike({"question": "Who runs  a ferry"}) == "who runs"
    assert alike({**row, "relations": ["employer", "town"]}) == "employer town"


def test_a_conversation_is_a_function_of_its_number(kb: KnowledgeBase) -> None:
    one, two = RAG(ROWS, kb, top_k=3, variants=2), RAG(ROWS, kb, top_k=3, variants=2)
    assert [two[i] for i in reversed(range(len(two)))] == list(reversed(list(one)))
    assert len(one) == 2 * len(ROWS) and one[0] != one[len(ROWS)]
    assert list(RAG(ROWS, kb, top_k=3, seed=1)) != list(RAG(ROWS, kb, top_k=3))
    assert RAG(ROWS, kb, start=5, stop=8)[1] == RAG(ROWS, kb)[6]


def test_no_more_documents_are_asked_for_than_there_are(kb: KnowledgeBase) -> None:
    rows = [row for row in ROWS if not row.get("documents")][:2]
    every, exact = RAG(rows, kb, top_k=10**9), RAG(rows, kb, top_k=len(kb))
    assert every.top_k == len(kb) and list(every) == list(exact)


def test_retrieved_documents_come_as_they_are_ranked(kb: KnowledgeBase) -> None:
    rows = [row for row in ROWS if row["kind"] == "1hop"]
    task = RAG(rows, kb, top_k=3, shares=Shares(0, 0, 1))
    found = [[h.document for h in hits] for hits in kb.search([row["question"] for row in rows], k=10)]
    for row, conversation, documents in zip(rows, task, found, strict=True):
        titles = [d.title for d in documents]
        places = [titles.index(d["title"]) for d in shown(conversation)]
        assert places == sorted(places)
        golden = {id for hop in hops(row) for id in hop}
        texts = {d.text for d in documents if d.id in golden}
        assert conversation["answerable"] == any(d["text"] in texts for d in shown(conversation))
    ids = [{d.id for d in documents[:3]} for documents in found]
    hit = [bool(found & {id for hop in hops(row) for id in hop}) for row, found in zip(rows, ids, strict=True)]
    assert task.recall() == pytest.approx(sum(hit) / len(hit))


def test_prompts_fit_and_lose_distractors_before_evidence(kb: KnowledgeBase, tokenizer: Tokenizer) -> None:
    free, tight = (
        RAG(ROWS, kb, top_k=5, variants=2, tokenizer=tokenizer, max_doc_length=60, max_tokens=n) for n in (None, 200)
    )
    fewer = 0
    for a, b in zip(free, tight, strict=True):
        assert len(tokenizer.render_conversation(b)[0]) <= 200
        assert b["answerable"] or not a["answerable"] or len(a["gold"]) > 1  # two may be too long together
        if b["answerable"]:
            assert [shown(a)[n - 1] for n in a["gold"]] == [shown(b)[n - 1] for n in b["gold"]]
        assert all(len(tokenizer.render_documents([d], 9)) <= 60 for d in shown(a))
        fewer += len(shown(b)) < len(shown(a))
    assert fewer


def test_gold_stands_anywhere_also_where_distractors_were_left_out(kb: KnowledgeBase, tokenizer: Tokenizer) -> None:
    rows = [row for row in ROWS if row["kind"] == "1hop"]
    options = {"tokenizer": tokenizer, "max_doc_length": 60, "shares": Shares(1, 0, 0)}
    task, free = (RAG(rows, kb, top_k=5, variants=60, max_tokens=n, **options) for n in (180, None))
    fewer = [b for a, b in zip(free, task, strict=True) if len(shown(a)) > len(shown(b)) == 2 and b["gold"]]
    first, n = sum(b["gold"] == [1] for b in fewer), len(fewer)
    assert n > 100 and abs(first - n / 2) < 4 * (n / 4) ** 0.5


def test_what_alone_is_too_long_is_left_out_and_abstained_from(kb: KnowledgeBase, tokenizer: Tokenizer) -> None:
    rows = [row for row in ROWS if row["kind"] == "2hop"]
    options = {"top_k": 3, "shares": Shares(1, 0, 0), "tokenizer": tokenizer, "max_doc_length": 80, "variants": 9}
    free, task = (RAG(rows, kb, max_tokens=n, **options) for n in (None, 220))
    lost = [(a, b) for a, b in zip(free, task, strict=True) if a["answerable"] and not b["answerable"]]
    assert lost and any(b["answerable"] for b in task)
    for a, b in lost:
        assert said(b) == [{"type": "abstain"}] and b["gold"] == []
        assert all(shown(a)[n - 1] not in shown(b) for n in a["gold"])


def test_a_step_that_is_cut_off_is_missing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    filler = "It tells of life in the town. " * 20
    documents = [Document("near", "She lives in Brebrix.", "Hales"),
                 Document("far", f"{filler}She lives in Brebrix.", "Hales"),
                 Document("mayor", "The mayor of Brebrix is Fubes.", "Brebrix")]  # fmt: skip
    row = {"question": "Who is mayor there?", "answers": ["Fubes"], "answerable": True}
    rows = [
        {**row, "gold_ids": [id, "mayor"], "hops": [{"query": "home", "answer": "Brebrix", "gold_ids": [id]},
                                                    {"query": "mayor", "answer": "Fubes", "gold_ids": ["mayor"]}]}
        for id in ("near", "far")
    ]  # fmt: skip
    kb = KnowledgeBase.build(documents, tmp_path / "kb", retriever="simple")
    task = RAG(rows, kb, shares=Shares(1, 0, 0), tokenizer=tokenizer, max_doc_length=60)
    assert [c["answerable"] for c in task] == [True, True]  # the mayor's document says Brebrix, too
    rows[1]["hops"][0]["answer"] = "She lives in Brebrix"
    rows[0]["hops"][0]["answer"] = "She lives in Brebrix"
    assert [c["answerable"] for c in RAG(rows, kb, shares=Shares(1, 0, 0), tokenizer=tokenizer, max_doc_length=60)] == [
        True,
        False,
    ]
    cut = KnowledgeBase.build(documents, tmp_path / "cut", retriever="simple", chunk_tokens=14)
    task = RAG(rows, cut, shares=Shares(1, 0, 0), tokenizer=tokenizer, max_doc_length=60)
    assert [c["answerable"] for c in task] == [True, True]  # the chunk is chosen by what the step finds


def test_evidence_that_is_cut_off_is_none(tmp_path: Path, tokenizer: Tokenizer) -> None:
    filler = "It tells of life in the town. " * 20
    documents = [Document("early", f"She was born in Brebrix. {filler}", "Hales"),
                 Document("late", f"{filler}She was born in Brebrix.", "Fubes")]  # fmt: skip
    row = {"question": "Where was she born?", "answers": ["Brebrix"], "answerable": True}
    rows = [{**row, "gold_ids": [d.id]} for d in documents]
    whole = KnowledgeBase.build(documents, tmp_path / "whole", retriever="simple")
    task = RAG(rows, whole, shares=Shares(1, 0, 0), tokenizer=tokenizer, max_doc_length=60)
    assert [c["answerable"] for c in task] == [True, False]
    cut = KnowledgeBase.build(documents, tmp_path / "cut", retriever="simple", chunk_tokens=14)
    task = RAG(rows, cut, shares=Shares(1, 0, 0), tokenizer=tokenizer, max_doc_length=60)
    assert [c["answerable"] for c in task] == [True, True]  # of several chunks the one that holds the answer


def test_what_is_no_text_of_a_document_may_be_an_answer(kb: KnowledgeBase) -> None:
    row = next(row for row in ROWS if row["kind"] == "1hop")
    task = RAG([{**row, "answers": ["yes"]}], kb, shares=Shares(1, 0, 0), variants=20)
    assert all(said(c)[0]["text"] == " yes" for c in task) and max(len(shown(c)) for c in task) == 5
    with pytest.raises(UserError, match="its gold document 'nowhere' is not in the knowledge base"):
        list(RAG([{**row, "gold_ids": ["nowhere"], "hops": []}], kb))


# ---- judging, rows, mixture ----


def test_a_completion_is_judged_by_its_text(kb: KnowledgeBase, tokenizer: Tokenizer) -> None:
    task = RAG(ROWS, kb, variants=3)
    for conversation in task:
        ids, mask = tokenizer.render_conversation(conversation)
        completion = tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m][:-1])
        assert task.evaluate(conversation, completion)
        assert not task.evaluate(conversation, "<|cite_start|>1<|cite_end|>nobody")
        assert task.evaluate(conversation, "<|abstain|>") is not conversation["answerable"]
    answer = next(c for c in task if c["answerable"])
    searched = "<|search_start|>x<|search_end|><|info_start|><|doc|>nobody<|info_end|>"
    assert task.evaluate(answer, f"{searched}The {answer['answers'][0].upper()}.")


def test_bad_rows_are_named_by_line(tmp_path: Path) -> None:
    good = {"question": "who?", "answers": ["a"], "gold_ids": ["1"], "answerable": True}
    path = tmp_path / "rows.jsonl"
    for bad, message in (
        ({**good, "question": " "}, "is no question"),
        ({**good, "answers": "a"}, "answers is 'a'"),
        ({**good, "gold_ids": [1]}, "gold_ids is"),
        ({**good, "answerable": 1}, "answerable is 1"),
        ({**good, "answers": []}, "answerable, but without"),
        ({**good, "documents": [{"text": "x"}]}, "document "),
        ({**good, "hops": ["a"]}, "hops is"),
        ({**good, "hops": {"query": "a"}}, "hops is"),
        ({**good, "relations": 3}, "relations is '3'"),
    ):
        path.write_text(f"{json.dumps(good)}\n{json.dumps(bad)}\n")
        with pytest.raises(UserError, match=r"rows.jsonl:2: .*" + message):
            load_rows(path)
    path.write_text(json.dumps(good))
    assert load_rows(path) == [good]


def test_plain_conversations_are_the_share_asked_for(kb: KnowledgeBase) -> None:
    task = RAG(ROWS, kb)
    both = with_chat(task, "train", ["Arithmetic:5"], 0.25)
    assert len(both) == 80 and sum("case" in c for c in both) == 60  # the five are repeated
    assert with_chat(task, "train", ["Arithmetic"], 0.0) is task


# ---- the script ----


def test_training_lowers_the_loss_and_reports_reading(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*OPTIONS, f"--knowledge_base={home / 'data'}", "--num_iterations=30", "--eval_every=15"]
    rag_finetune.main([*argv, "--eval_questions=12", "--save_every=0"])
    metrics = {row["step"]: row for row in read_metrics(home / "rag_checkpoints/t/metrics.jsonl")}
    assert metrics[30]["val_loss"] < 0.6 * metrics[0]["val_loss"]
    for step in (0, 15, 30):
        figures = {k: metrics[step][k] for k in ("reading_accuracy", "citation_accuracy", "abstains_gold")}
        assert all(0 <= v <= 1 for v in figures.values()) and metrics[step]["abstains_absent"] <= 1
        assert metrics[step]["retrieval_recall"] == metrics[0]["retrieval_recall"] > 0
    section = json.loads((home / "report/rag_finetuning.json").read_text())
    assert section["metrics"]["reading_accuracy"] == metrics[30]["reading_accuracy"]
    assert (
        section["summary"] == ["val_loss", "reading_accuracy", "abstains_absent"] and "Who are you?" in section["text"]
    )
    assert section["metrics"]["val_loss before"] == metrics[0]["val_loss"]
    _, _, meta = load_model("rag", "cpu", "t")
    assert meta["source"] == {"stage": "sft", "model_tag": "t", "step": 1}
    out = capsys.readouterr().out
    assert "12 are answered at each validation" in out and "retrieval recall@2" in out and "sample: " in out


def test_resume_continues_bit_identically(home: Path) -> None:
    argv = [*OPTIONS, f"--knowledge_base={home / 'data'}", "--num_iterations=5", "--eval_every=2", "--save_every=2"]
    for tag in ("whole", "cut"):
        shutil.copytree(home / "sft_checkpoints/t", home / "sft_checkpoints" / tag)
        rag_finetune.main([*argv, "--eval_questions=4", f"--model_tag={tag}"])
    folder = home / "rag_checkpoints"
    shutil.rmtree(folder / "cut/step_000005")
    rag_finetune.main([*argv, "--eval_questions=4", "--model_tag=cut", "--resume"])
    whole, cut = (read_metrics(folder / tag / "metrics.jsonl") for tag in ("whole", "cut"))
    keys = ("step", "loss", "val_loss", "reading_accuracy", "abstains_absent")
    assert [[r.get(k) for k in keys] for r in whole] == [[r.get(k) for k in keys] for r in cut]


def test_the_folder_is_found_by_its_knowledge_base_too(home: Path) -> None:
    assert dataset_folder(home / "data") == dataset_folder(home / "data" / "knowledge_base") == home / "data"
    with pytest.raises(UserError, match=r"--knowledge_base=.*prepare_rag_dataset"):
        dataset_folder(home / "tokenizer")
    with pytest.raises(UserError, match="missing --knowledge_base=DIR"):
        rag_finetune.main([])


@pytest.mark.parametrize("name", ["rag_hybrid_d20", "rag_mamba_d20", "tiny_hybrid"])
def test_config_files_for_it_and_for_base_training_load(name: str) -> None:
    cfg = load_config(RagFinetuneConfig, [str(REPO_DIR / "configs" / f"{name}.py"), "--chat_tasks=a,b"])
    assert cfg.tasks == ["a", "b"] and cfg.shares == Shares()
    for wrong in ("--chat_share=1", "--absent_share=0.9", "--retrieved_share=-0.1"):
        with pytest.raises(UserError):
            load_config(RagFinetuneConfig, [wrong])
