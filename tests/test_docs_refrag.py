"""Every command of docs/refrag.md is run, in the order of the page, with models and sets made small; so is its Python.
Its tables are held against the code."""

import dataclasses
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanochat import device, finetune, multihop_eval
from nanochat.checkpoint import checkpoint_dir, save_checkpoint
from nanochat.common import REPO_DIR, base_dir, read_json
from nanochat.compress import evaluate as evaluation
from nanochat.compress import train
from nanochat.compress.chunks import effective_rate
from nanochat.compress.reader import POLICIES
from nanochat.compress.stages import SHARES
from nanochat.compress.train import CompressConfig
from nanochat.gpt import GPT, GPTConfig
from nanochat.multihop_rl import COST_FROM, QUERY_TOKENS, REWARDS, Outcome
from nanochat.rl_health import FALLS, SIGMAS
from nanochat.rl_stage import MAX_ROLLBACKS
from nanochat.tokenizer import Tokenizer
from nanochat.world import World
from scripts import bench_compress
from scripts.refrag_finetune import MultihopConfig
from tasks.world import world_documents

PAGE = (REPO_DIR / "docs" / "refrag.md").read_text(encoding="utf-8")
WORDS = " ".join(PAGE.split())
TAG = "tiny_hybrid"
ON_CPU = ["--device=cpu", "--dtype=float32"]
TINY = {  # what a command of the page gets added: less of everything
    ("prepare_rag_dataset", "rag"): ["--world_size=nano", "--retriever_type=simple", "--questions=60"],
    ("refrag_finetune", "rag"): [
        *ON_CPU, "--num_iterations=1", "--max_iterations=1", "--examples_per_step=2", "--num_samples=2",
        "--eval_every=0", "--eval_examples=2", "--eval_tokens=512", "--max_new_tokens=12", "--truncated=zero",
        "--guard=off", "--max_doc_length=40", "--chat_tasks=Arithmetic:20", "--device_batch_size=2",
        "--total_batch_size=0", "--weight_decay=0", "--grad_clip=1", "--max_seq_len=512",
    ],
    ("rag_eval", "multihop"): [*ON_CPU, "-x", "6", "--max_new_tokens=8", "--max_doc_length=40", "--top_k=2"],
    ("refrag_finetune", "compress"): [
        *ON_CPU, "--reconstruction_steps=1", "--continuation_steps=1", "--question_steps=1", "--supervise_steps=1",
        "--reinforce_steps=1", "--reconstruction_chunks=2", "--largest_chunks=2", "--questions_per_step=2",
        "--policy_questions=2", "--num_samples=2", "--eval_questions=2", "--expand=0.25", "--top_k=3",
    ],
    ("rag_eval", "compress"): [*ON_CPU, "-x", "3"],
    ("bench_compress", "rag"): [
        *ON_CPU, "--depth=3", "--d_model=32", "--vocab_size=600", "--lengths=256", "--doc_length=128", "--repeats=1",
    ],
}  # fmt: skip
RATES = {"embedding_lr": 0.1, "unembedding_lr": 0.004, "matrix_lr": 0.01, "scalar_lr": 0.01, "ssm_lr": 0.001}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def say(line: str) -> None:
    """Run a line of the page, made small."""
    python, m, module, *arguments = shlex.split(line)
    mode = re.search(r"--mode (multihop|compress)\b", line)
    assert (python, m) == ("python", "-m") and module.startswith("scripts.")
    tiny = TINY[module.removeprefix("scripts."), mode[1] if mode else "rag"]
    importlib.import_module(module).main([*arguments, *tiny])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The whole page, run once in a folder with rag_data and an untrained RAG model."""
    folder = tmp_path_factory.mktemp("page")
    tokenizer = Tokenizer.train((d.text for d in world_documents(World(0, 64, "train"))), 400)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder / "base"))
        patch.chdir(folder)
        patch.setattr(device, "peak_flops", lambda *_: 0.0)
        patch.setattr(multihop_eval, "png_bytes", lambda figure: b"")
        patch.setattr(evaluation, "png_bytes", lambda figure: b"")
        patch.setattr(bench_compress, "png_bytes", lambda figure: b"")
        patch.setattr(finetune, "plot_metrics", lambda _: [])
        patch.setattr(train, "plot_metrics", lambda _: [])
        tokenizer.save(folder / "base" / "tokenizer")
        model = GPT(GPTConfig(2, ["attn", "mamba"], 32, 2, vocab_size=tokenizer.vocab_size, seq_len=512))
        model.init_weights(0)
        meta = {"model_config": dataclasses.asdict(model.config), "tokenizer_hash": tokenizer.hash}
        meta |= {"train_config": {**RATES, "model_tag": TAG}}
        save_checkpoint(checkpoint_dir("rag", TAG), 1, model=model.state_dict(), optim=None, state={}, meta=meta)
        say("python -m scripts.prepare_rag_dataset --mode world --output rag_data --max_facts=2 --kinds=1hop,missing")
        for line in "".join(blocks("bash")).splitlines():
            say(line)
        yield folder


def test_both_modes_and_their_evaluations_leave_what_the_page_says(place: Path) -> None:
    assert [len(block.splitlines()) for block in blocks("bash")] == [3, 3]
    tags = {path.name for path in (base_dir() / "refrag_checkpoints").iterdir()}
    assert tags == {TAG, f"{TAG}_cold", f"{TAG}_compress"}
    sections = {path.stem for path in (base_dir() / "report").glob("refrag_*.json")}
    assert sections == {
        "refrag_cold_start", "refrag_training", "refrag_multihop_evaluation", "refrag_compress",
        "refrag_compress_evaluation",
    }  # fmt: skip
    text = read_json(base_dir() / "report" / "refrag_multihop_evaluation.json")["text"]
    assert "refrag - cold" in text and "refrag - single" in text and "retriever's ceiling" in text
    assert list((place / "rag_data" / "knowledge_base.vectors").glob("*/vectors.npy"))
    assert (base_dir() / "bench" / "compress.json").is_file()


def test_the_python_of_the_page_runs(place: Path, capsys: pytest.CaptureFixture) -> None:
    names: dict[str, Any] = {}
    for code in blocks("python"):
        exec(compile(code, "docs/refrag.md", "exec"), names)
    assert len(capsys.readouterr().out.splitlines()) >= 2
    assert names["episode"].row["question"] == names["question"] and names["kept"]


# ---- tables ----


def rows_under(heading: str, first: str) -> list[list[str]]:
    """Cells of the first table under a heading whose head begins with `first`, without the head."""
    table = PAGE.split(f"\n{heading}\n")[1].split(f"\n| {first}")[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.splitlines()[2:]]


def told(value: Any) -> str:
    """A default as the page writes it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


@pytest.mark.parametrize(
    ("heading", "config"), [("## Search step by step", MultihopConfig), ("## Documents as vectors", CompressConfig)]
)
def test_every_key_and_default_is_the_scripts(heading: str, config: Any) -> None:
    fields = {f.name: f for f in dataclasses.fields(config)}
    rows = rows_under(heading, "key |")
    assert len(rows) > 15
    for name, default, *_ in rows:
        key = name.strip("`-")
        has = CompressConfig().shares if key == "expand" else fields[key].default
        assert told(has) == default, key
    section = PAGE.split(f"\n{heading}\n")[1].split("\n## ")[0]
    known = {*fields, "compare", "model_tag", "block_pattern", "lengths", "output", "kinds"}
    assert set(re.findall(r"--(\w+)", section)) <= known


def test_rewards_are_those_of_the_code() -> None:
    row = {"question": "?", "answers": ["Ada Lee"], "answerable": True, "hops": [{}, {}]}
    cases = [("Ada Lee", False, True), ("Ada Lee", False, False), ("Bob", False, True), ("Bob", False, False),
             ("", True, True)]  # fmt: skip
    rows = rows_under("### What is rewarded", "reward |")
    assert [name.strip("`") for name, *_ in rows] == list(REWARDS)
    for name, *said in rows:
        worth = [REWARDS[name.strip("`")](Outcome(text, (), abstained, ok, 2), row) for text, abstained, ok in cases]
        assert worth == pytest.approx([float(cell.partition(",")[0]) for cell in said])
    none = {**row, "answers": [], "answerable": False}
    assert all(reward(Outcome("", (), True, True, 2), none) == 1 for reward in REWARDS.values())


def test_policies_are_those_of_the_code() -> None:
    names = [name for cell, *_ in rows_under("### Policies", "policy |") for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(names) == sorted(POLICIES)


def test_numbers_in_the_text_are_those_of_the_code() -> None:
    assert f"{effective_rate(32, 0.1):.1f} times for k = 32, p = 0.1" in WORDS
    assert CompressConfig().chunk_tokens == 32 and "fit 32 tokens" in WORDS
    assert ", ".join(f"{100 * p:g}" for p in SHARES[:-1]) + f" and {100 * SHARES[-1]:g} % of the chunks" in WORDS
    assert f"within {QUERY_TOKENS} tokens" in WORDS and f"once {100 * COST_FROM:g} % of the answers" in WORDS
    falls = "reward down by {reward}, valid formats by {valid} or log p of right trajectories by {logp_correct}"
    assert falls.format(**FALLS) in WORDS
    assert (
        (SIGMAS, MAX_ROLLBACKS) == (3.0, 3) and "by three standard errors" in WORDS and "three times at most" in WORDS
    )
    samples = MultihopConfig(knowledge_base="x").num_samples
    assert f"pass@{samples}" in WORDS and f"samples {samples} trajectories" in WORDS


def test_every_test_the_page_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    code = "".join(p.read_text() for p in (REPO_DIR / "tests").glob("test_*.py"))
    assert len(named) > 8
    assert [name for name in sorted(named) if f"def {name}(" not in code] == []
