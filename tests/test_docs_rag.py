"""Every command of docs/rag.md is run, in the order of the page, with models and sets made small; so is its Python."""

import contextlib
import dataclasses
import importlib
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanochat import device, finetune
from nanochat.checkpoint import checkpoint_dir, save_checkpoint
from nanochat.gpt import GPT, GPTConfig
from nanochat.retrieval import KnowledgeBase
from nanochat.tokenizer import Tokenizer
from nanochat.world import World
from scripts.bench_context import BenchContextConfig, plan
from scripts.chat_cli import ABSTENTION
from scripts.prepare_rag_dataset import PrepareConfig
from scripts.rag_eval import RagEvalConfig
from scripts.rag_finetune import RagFinetuneConfig
from tasks.world import world_documents

PAGE = (Path(__file__).parent.parent / "docs" / "rag.md").read_text(encoding="utf-8")
ON_CPU = ["--device=cpu", "--dtype=float32"]
TINY = {  # what a command of the page gets added: less of everything
    "prepare_rag_dataset": [],
    "rag_finetune": [
        *ON_CPU, "--num_iterations=1", "--eval_tokens=512", "--eval_questions=4", "--max_seq_len=256",
        "--embedding_lr=0.2", "--unembedding_lr=0.004", "--matrix_lr=0.02", "--scalar_lr=0.02", "--ssm_lr=0.01",
        "--weight_decay=0", "--grad_clip=1", "--device_batch_size=2", "--total_batch_size=0", "--max_doc_length=40",
        "--chat_tasks=Arithmetic:20", "--top_k=2",
    ],
    "rag_eval": [*ON_CPU, "-x", "6", "--top_k=2", "--max_doc_length=40", "--max_new_tokens=3", "--size_questions=0"],
    "chat_cli": [*ON_CPU, "--max_tokens=4", "--max_doc_length=60"],
    "bench_context": [*ON_CPU, "--documents=none"],
}  # fmt: skip
WORLD = ["--world_size=nano", "--retriever_type=simple", "--kinds=1hop,missing"]
NOTES = {
    "mill.txt": "The mill stands below the weir. It was rebuilt after the flood of 1823, with a wheel of iron.\n",
    "people.txt": "Ilse Brandt runs the mill, her brother the ferry.\n",
    "river.html": "<title>The river</title><p>The river floods in March.</p>",
    "pixel.png": "no text",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def commands() -> list[tuple[str, list[str]]]:
    """(script, arguments) of every command, in order."""
    lines = [shlex.split(line) for block in blocks("bash") for line in block.splitlines()]
    assert all(line[:2] == ["python", "-m"] and line[2].startswith("scripts.") for line in lines)
    return [(line[2].removeprefix("scripts."), line[3:]) for line in lines]


def say(script: str, arguments: list[str]) -> None:
    tiny = WORLD if "world" in arguments else TINY[script]
    importlib.import_module(f"scripts.{script}").main([*arguments, *tiny])


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The whole page, run once in a folder with my_notes, mine.jsonl and an untrained chat model -> what it printed."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "my_notes").mkdir()
    for name, text in NOTES.items():
        (folder / "my_notes" / name).write_text(text)
    [rows] = blocks("json")
    document, right, none = rows.strip().splitlines()
    rights = [right.replace('{"question"', f'{{"id": "{i}", "question"') for i in range(12)]
    (folder / "mine.jsonl").write_text("\n".join([document, none, *rights]))
    tokenizer = Tokenizer.train((d.text for d in world_documents(World(0, 64, "train"))), 400)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder / "base"))
        patch.chdir(folder)
        patch.setattr(device, "peak_flops", lambda *_: 0.0)
        patch.setattr(finetune, "plot_metrics", lambda _: [])
        patch.setattr(importlib.import_module("scripts.rag_eval"), "draw", lambda *_: [])
        tokenizer.save(folder / "base" / "tokenizer")
        model = GPT(GPTConfig(2, ["attn", "mamba"], 32, 2, vocab_size=tokenizer.vocab_size, seq_len=256))
        model.init_weights(0)
        meta = {"model_config": dataclasses.asdict(model.config), "tokenizer_hash": tokenizer.hash, "train_config": {}}
        save_checkpoint(checkpoint_dir("sft", "t"), 1, model=model.state_dict(), optim=None, state={}, meta=meta)
        output = []
        for script, arguments in commands():
            with contextlib.redirect_stdout(out := io.StringIO()):
                say(script, arguments)
            output.append((script, arguments, out.getvalue()))
        yield {"folder": folder, "output": output}


def test_the_page_leads_from_files_to_an_answer_in_five_commands(told: dict[str, Any]) -> None:
    names = [script for script, _, _ in told["output"]]
    assert names[:5] == ["prepare_rag_dataset", "rag_finetune", "rag_eval", "prepare_rag_dataset", "chat_cli"]
    assert len(blocks("bash")[0].splitlines()) == 5


def test_sources_are_listed_as_the_page_shows(told: dict[str, Any]) -> None:
    [shown] = blocks("text")
    listed, printed = (text.partition("\n\n")[2].replace("* [", "  [") for text in (shown, told["output"][4][2]))
    assert printed.splitlines() == listed.splitlines() != []
    assert re.match(r"Ilse Brandt \[(\d)\]\n\n(  .*\n)?\* \[\1\] people: ", shown) and f"`{ABSTENTION}`" in PAGE


def test_every_stage_left_what_the_next_one_reads(told: dict[str, Any]) -> None:
    base = told["folder"] / "base"
    assert list((base / "rag_checkpoints" / "t").glob("step_*")) and (base / "report" / "rag_evaluation.json").is_file()
    assert list((base / "rag_eval").glob("rag_t_*/rag.jsonl"))
    assert len(KnowledgeBase.open(told["folder"] / "notes" / "knowledge_base")) == 3


def test_the_python_of_the_page_runs(told: dict[str, Any], capsys: pytest.CaptureFixture) -> None:
    for code in blocks("python"):
        exec(compile(code, "docs/rag.md", "exec"), {})
    assert re.search(r"(True|False) \[", capsys.readouterr().out)


def test_every_key_and_default_of_the_recipes_is_the_scripts() -> None:
    fields = {f.name: f for f in dataclasses.fields(RagFinetuneConfig)}
    table = PAGE.split("## Recipes")[1].split("\n\n")[1]
    rows = re.findall(r"^\| `--(\w+)` \| ([\d.]+|that of the knowledge base) \|", table, re.MULTILINE)
    assert len(rows) == len(table.splitlines()) - 2 == 7
    for key, default in rows:
        assert fields[key].default == (float(default) if default[0].isdigit() else None)
    keys = {
        f.name
        for c in (RagEvalConfig, RagFinetuneConfig, BenchContextConfig, PrepareConfig)
        for f in dataclasses.fields(c)
    }
    assert set(re.findall(r"`[^`\n]*--(\w+)[^`\n]*`", PAGE)) <= keys


def test_the_plan_of_the_page_is_the_plan() -> None:
    cfg = BenchContextConfig(memory_gb=8.0, reserve_gb=2.0, doc_tokens=128, rows=[1, 32])
    names = ("transformer_d20", "rag_hybrid_d20", "mamba_d20")
    one, many = zip(*([row["fits"] for row in plan(cfg, name, 65536)] for name in names), strict=True)
    text = " ".join(PAGE.split())
    assert f"the plan is {one[0]} for `{names[0]}`, {one[1]} for `{names[1]}` and {one[2]} for `{names[2]}`" in text
    assert f"with 32 conversations at once {many[0]}, {many[1]} and {many[2]}" in text
