"""What documents are worth to a model: answers, citations and abstentions beside every control, with 95 % intervals.

    python -m scripts.rag_eval --knowledge_base rag_data                    # the rag model; the sft model beside it
    python -m scripts.rag_eval --knowledge_base rag_data -g tiny -x 500 --baseline=mid
    python -m scripts.rag_eval --knowledge_base rag_data -g d20 --compare=d20_hybrid,d20_mamba
    python -m scripts.rag_eval --mode multihop --knowledge_base rag_data    # nanochat/multihop_eval.py
    python -m scripts.rag_eval --mode compress -g tiny_compress             # nanochat/compress/judge.py

All conditions ask the same questions, and those with retrieved documents show the same ones:

closed_book           the baseline model without documents
documents_untrained   the baseline model with the retrieved documents
rag                   the model with the retrieved documents
oracle                the model with the gold documents alone; oracle_distractors: among random ones, top_k in all
shuffled              the model with documents retrieved for another question: what is left is guessing

--knowledge_base is a folder made by scripts.prepare_rag_dataset, or a knowledge base with --rows. What counts as right,
supported and so on says nanochat/rag_eval.py. Predictions go to <base dir>/rag_eval/<checkpoint>/<condition>.jsonl.
"""

import dataclasses
import json
import random
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch

from nanochat.checkpoint import checkpoint_dir, list_steps, load_model
from nanochat.common import atomic_write, base_dir, run_script, write_json
from nanochat.compress.judge import CompressEvalConfig, compress_eval_main
from nanochat.config import UserError, load_config
from nanochat.device import Ranks, describe_device, init_ranks, leave_ranks, pick_device
from nanochat.multihop_eval import MultihopEvalConfig, multihop_eval_main
from nanochat.rag import MAX_DOC_LENGTH, fit, open_base
from nanochat.rag_conditions import CONDITIONS, Evidence, gather, predict
from nanochat.rag_eval import Figure, Prediction, Question, guessing, question_from, summary
from nanochat.rag_plots import plot_conditions, plot_coverage, plot_documents
from nanochat.rag_tables import (
    architecture_table,
    by_position,
    condition_table,
    coverage_table,
    difference_table,
    kind_table,
    layers,
    position_table,
    retrieval_figures,
    size_table,
)
from nanochat.report import log_stage, report_dir
from nanochat.retrieval import KnowledgeBase
from tasks.compress import open_contexts
from tasks.multihop import usable
from tasks.rag import load_rows

Runs = dict[str, list[Prediction]]
SIZES = [1, 2, 3, 5, 10, 20]
CURVES = ("closed_book", "documents_untrained", "rag")  # with the risk at each coverage
FITTING = 0.95  # share of the questions for which n documents must fit, for n to be measured
HEADLINE = {"RAG exact match": "EM", "RAG F1": "F1", "RAG reading": "reading EM", "RAG accuracy": "accuracy",
            "RAG abstention": "abstention", "RAG hallucination": "hallucination",
            "RAG coverage": "coverage"}  # fmt: skip


@dataclass(frozen=True)
class RagEvalConfig:
    """Evaluate a model that answers from documents."""

    SHORT: ClassVar = {"i": "source", "g": "model_tag", "s": "step", "x": "max_problems", "b": "batch_size",
                       "d": "dtype", "device_type": "device"}  # fmt: skip

    knowledge_base: Annotated[str, "folder made by prepare_rag_dataset, or a knowledge base"]
    mode: Annotated[Literal["rag", "multihop"], "documents once, or search by search"] = "rag"
    rows: Annotated[str | None, "questions, JSONL; none = val.jsonl beside the knowledge base"] = None
    source: Annotated[Literal["base", "mid", "sft", "rl", "rag", "refrag"], "-i: stage of the checkpoint"] = "rag"
    model_tag: Annotated[str | None, "-g: checkpoint folder; none = the one saved last"] = None
    step: Annotated[int | None, "-s: step; none = the newest"] = None
    baseline: Annotated[Literal["base", "mid", "sft", "none"], "stage of the model without RAG training"] = "sft"
    baseline_tag: Annotated[str | None, "its checkpoint folder; none = as model_tag"] = None
    compare: Annotated[list | None, "further tags of the same stage, as a,b"] = None
    max_problems: Annotated[int, "-x: questions, drawn by the seed; -1 = all"] = 500
    retriever_type: Annotated[str | None, "none = the knowledge base's own"] = None
    top_k: Annotated[int, "documents retrieved for a question"] = 5
    max_doc_length: Annotated[int, "ids of one document"] = MAX_DOC_LENGTH
    max_new_tokens: Annotated[int, "longest answer"] = 32
    batch_size: Annotated[int, "-b: questions that run together"] = 32
    sizes: Annotated[list, "numbers of documents to read the gold one among; those that fit are measured"] = field(
        default_factory=lambda: SIZES
    )
    size_questions: Annotated[int, "questions for each of these numbers; 0 = leave them out"] = 200
    seed: Annotated[int, "of the questions, distractors and places"] = 42
    show: Annotated[int, "answers of each condition in the report"] = 2
    device: Annotated[str, "cpu, cuda, mps; empty = the best there is"] = ""
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], "-d: multiplication dtype"] = "auto"

    def __post_init__(self) -> None:
        counts = {k: getattr(self, k) for k in ("top_k", "max_new_tokens", "batch_size")}
        if min(counts.values()) < 1 or self.max_problems == 0 or self.size_questions < 0:
            given = ", ".join(f"{k}={v}" for k, v in {**counts, "max_problems": self.max_problems}.items())
            raise ValueError(f"{given}: give positive numbers, or max_problems=-1 for all questions")
        if not all(str(n).isdecimal() and int(n) > 0 for n in self.sizes):
            raise ValueError(f"sizes={','.join(map(str, self.sizes))}: expected numbers of documents, as 1,2,5")

    @property
    def numbers(self) -> list[int]:
        """The sizes, rising; a flag's are text."""
        return sorted({int(n) for n in self.sizes}) if self.size_questions else []


@dataclass(frozen=True)
class Reader:
    """A checkpoint that answers, by all ranks together. name: stage, tag and step."""

    ranks: Ranks
    name: str
    tag: str
    model: Any
    tokenizer: Any

    def ask(
        self, cfg: RagEvalConfig, questions: Sequence[Question], documents: Sequence[Any], score: bool = False
    ) -> list[Prediction]:
        limits = cfg.max_doc_length, cfg.max_new_tokens, cfg.batch_size
        return predict(self.model, self.tokenizer, questions, documents, *limits, score, self.progress)

    def progress(self, done: int, n: int) -> None:
        if self.ranks.main and sys.stderr.isatty():
            print(f"\r{done} of {n}", end="\r", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        if self.ranks.main:
            print(f"{self.name}{text}", flush=True)

    def save(self, name: str, predictions: Sequence[Prediction]) -> None:
        """To the folder of the checkpoint's predictions."""
        if self.ranks.main:
            with atomic_write(base_dir() / "rag_eval" / self.name / f"{name}.jsonl", "w") as f:
                f.writelines(json.dumps(p.record(), ensure_ascii=False) + "\n" for p in predictions)


def load_reader(cfg: RagEvalConfig, device: torch.device, source: str, tag: str | None, step: int | None) -> Reader:
    ranks, device = init_ranks(device)
    model, tokenizer, meta = load_model(source, device, tag, step, dtype=cfg.dtype)
    tag = tag or meta.get("train_config", {}).get("model_tag") or f"d{model.config.n_layer}"
    return Reader(ranks, f"{source}_{tag}_{meta['step']:06d}", tag, model, tokenizer)


def check_tags(source: str, tags: Iterable[str]) -> None:
    """UserError for a tag without a checkpoint, before another has been measured for nothing."""
    for tag in tags:
        if not list_steps(checkpoint_dir(source, tag)):
            raise UserError(f"--compare={tag}: no checkpoint in {checkpoint_dir(source, tag)}: give tags of {source}")


def open_data(cfg: RagEvalConfig | MultihopEvalConfig) -> tuple[KnowledgeBase, list[dict[str, Any]]]:
    """The knowledge base and max_problems of the rows."""
    if cfg.knowledge_base.startswith("opensearch://") and cfg.rows is None:
        raise UserError(f"--knowledge_base={cfg.knowledge_base} has no questions beside it: add --rows=FILE.jsonl")
    kb, folder = open_base(cfg.knowledge_base), Path(cfg.knowledge_base).expanduser()
    folder = folder if (folder / "knowledge_base").is_dir() else folder.parent
    rows = load_rows(cfg.rows or folder / "val.jsonl")
    if not rows:
        raise UserError(f"{cfg.rows or folder / 'val.jsonl'} holds no questions")
    order = random.Random(cfg.seed).sample(range(len(rows)), len(rows))
    return kb, [rows[i] for i in sorted(order[: cfg.max_problems if cfg.max_problems > 0 else None])]


# ---- what is measured ----


def run_conditions(
    cfg: RagEvalConfig, questions: Sequence[Question], reader: Reader, shown: Mapping[str, Sequence[Any]]
) -> Runs:
    """The predictions of each condition from what it shows, written down as they come."""
    runs = dict[str, list[Prediction]]()
    for name, documents in shown.items():
        start = time.monotonic()
        runs[name] = reader.ask(cfg, questions, documents, score=name in CURVES)
        found = summary(runs[name])
        parts = [f"{m} {found[m]}" for m in ("EM", "accuracy", "abstention", "hallucination") if m in found]
        reader.say(f", {name}: {', '.join(parts)}; {time.monotonic() - start:.0f} s")
        reader.save(name, runs[name])
    return runs


def run_sizes(cfg: RagEvalConfig, evidence: Evidence, reader: Reader) -> dict[int, list[Prediction]]:
    """The same questions with their gold documents among n, for every n that fits the context. They are those with the
    fewest gold documents, one as a rule."""
    counts = {i: len(gold) for i, gold in enumerate(evidence.gold) if gold and evidence.questions[i].answerable}
    few = min(counts.values(), default=0)
    chosen = [i for i, count in counts.items() if count == few][: cfg.size_questions]
    made: dict[int, list[Prediction]] = {}
    for n in cfg.numbers if chosen else []:
        if n < few:
            continue
        documents = [evidence.among(i, n) for i in chosen]
        share = sum(fits(cfg, evidence, reader, i, hits, n) for i, hits in zip(chosen, documents, strict=True))
        if share < FITTING * len(chosen):
            reader.say(f": {n} documents are there and fit for {share} of {len(chosen)} questions: left out")
            break
        made[n] = reader.ask(cfg, [evidence.questions[i] for i in chosen], documents)
        reader.say(f", gold among {n}: EM {summary(made[n])['EM']}")
        reader.save(f"among_{n}", made[n])
    return made


def fits(cfg: RagEvalConfig, evidence: Evidence, reader: Reader, i: int, hits: Sequence[Any], n: int) -> bool:
    """Whether there are n documents for question i and all fit."""
    budget, question = reader.model.config.seq_len - cfg.max_new_tokens, evidence.questions[i].text
    return len(hits) == n == len(fit(reader.tokenizer, question, hits, budget, cfg.max_doc_length))


# ---- what is told ----


@dataclass
class Results:
    """Of every checkpoint, by name: its conditions (the first also has the baseline's), sizes and layers."""

    runs: dict[str, Runs] = field(default_factory=dict)
    sizes: dict[str, dict[int, list[Prediction]]] = field(default_factory=dict)
    layers: dict[str, str] = field(default_factory=dict)

    def places(self, top_k: int) -> dict[str, dict[int, Figure]]:
        """EM by the place of the gold document among top_k, or the largest number below that was measured."""
        found = {}
        for name, sweep in self.sizes.items():
            measured = [n for n in sweep if n <= top_k]
            if measured and all(len(p.question.gold) == 1 for p in sweep[max(measured)]):
                found[name] = by_position(sweep[max(measured)])
        return found


def samples(runs: Mapping[str, Sequence[Prediction]], n: int) -> str:
    """The first n answers of each condition, as an indented block of Markdown."""
    lines = []
    for i in range(min(n, len(next(iter(runs.values()))))):
        question = next(iter(runs.values()))[i].question
        lines += [f"{json.dumps(question.text, ensure_ascii=False)}: {', '.join(question.answers) or 'no answer'}"]
        for name, run in runs.items():
            said = "(abstains)" if run[i].abstained else json.dumps(run[i].text, ensure_ascii=False)
            lines += [f"  {name:20s} {said} {''.join(f'[{c}]' for c in run[i].citations)}"]
    return "\n".join(f"    {line}".rstrip() for line in lines)


def text_of(cfg: RagEvalConfig, results: Results) -> str:
    """The report's section."""
    runs = next(iter(results.runs.values()))
    rag, sweeps = runs["rag"], results.sizes
    bound, guess = guessing([p.question for p in rag])
    gold = ", ".join(f"{name} {value}" for name, value in retrieval_figures(rag).items()) or "no question names gold"
    single = all(len(p.question.gold) < 2 for sweep in sweeps.values() for run in sweep.values() for p in run)
    parts = [
        f"{len(rag)} questions, {sum(p.question.answerable for p in rag)} of them answerable. Guessing, with "
        f"one answer for each form of question, reaches EM {guess:.3f} (chosen on half of the questions for the other "
        f"half; at most {bound:.3f}, chosen on the same). Retrieved, of the first {cfg.top_k}: {gold}. All intervals: "
        "95 %, bootstrap over the questions.",
        condition_table(runs),
        title("Differences, paired", difference_table(runs)),
        title("Hallucination where equally many questions are answered, the surest ones", coverage_table(runs)),
        title("By kind of question", kind_table(runs)),
        title(f"EM by number of documents, the gold one{'' if single else 's'} among them", size_table(sweeps)),
        title("EM by place of the gold document", position_table(results.places(cfg.top_k))),
        title("By architecture", architecture_table(results.layers, results.runs) if len(results.runs) > 1 else ""),
        title("Samples", samples(runs, cfg.show)),
    ]
    return "\n\n".join(part for part in parts if part)


def title(text: str, table: str) -> str:
    return f"### {text}\n\n{table}" if table else ""


def draw(cfg: RagEvalConfig, results: Results) -> list[Path]:
    name, runs = next(iter(results.runs.items()))
    curves = {n: runs[n] for n in CURVES if n in runs}
    plots = [
        plot_conditions(runs, report_dir() / f"rag_eval_{name}_conditions.png"),
        plot_coverage(curves, report_dir() / f"rag_eval_{name}_coverage.png"),
    ]
    sizes = {m: {n: summary(run)["EM"] for n, run in sweep.items()} for m, sweep in results.sizes.items() if sweep}
    if sizes:
        places = results.places(cfg.top_k)
        plots.append(plot_documents(sizes, places, report_dir() / f"rag_eval_{name}_documents.png"))
    return plots


def measured(figure: Figure) -> dict[str, float | int]:
    return dataclasses.asdict(figure)


def report(cfg: RagEvalConfig, results: Results, baseline: str, seconds: float) -> None:
    """Print the tables, log them, and write every figure to summary.json beside the predictions."""
    name, runs = next(iter(results.runs.items()))
    figures = {condition: summary(run) for condition, run in runs.items()}
    _, guess = guessing([p.question for p in runs["rag"]])
    head = {label: measured(figures["rag"][m]) for label, m in HEADLINE.items() if m in figures["rag"]}
    beside = {f"exact match, {c}": measured(f["EM"]) for c, f in figures.items() if c != "rag" and "EM" in f}
    beside |= {f"hallucination, {c}": measured(f["hallucination"]) for c, f in figures.items() if c != "rag"}
    settings = {"checkpoint": name, "baseline": baseline, "questions": len(runs["rag"]), "top_k": cfg.top_k}
    text = text_of(cfg, results)
    print(f"\n{text}\n")
    folder = base_dir() / "rag_eval" / name
    every = {c: {m: measured(f) for m, f in found.items()} for c, found in figures.items()}
    write_json(folder / "summary.json", {**settings, "config": dataclasses.asdict(cfg), "conditions": every})
    metrics = {**settings, "seconds": round(seconds, 1), "exact match, guessing": guess, **head, **beside}
    plots = draw(cfg, results)
    log_stage(f"{cfg.source}_evaluation", metrics, text, plots, summary=["RAG exact match", "RAG hallucination"])
    print(f"{name}: {seconds:.0f} s; predictions in {folder}")


def main(argv: list[str]) -> None:
    mode = re.search(r"--mode[= ](multihop|compress)\b", " ".join(argv))
    if mode and mode[1] == "multihop":
        multihop = load_config(MultihopEvalConfig, argv)
        kb, rows = open_data(multihop)
        multihop_eval_main(multihop, kb, usable(rows, multihop.max_hops))
        return
    if mode:
        compress_eval_main(load_config(CompressEvalConfig, argv), open_contexts)
        return
    cfg, start = load_config(RagEvalConfig, argv), time.monotonic()
    ranks, device = init_ranks(pick_device(cfg.device))
    check_tags(cfg.source, map(str, cfg.compare or ()))
    kb, rows = open_data(cfg)
    questions = [question_from(row, f"{n}") for n, row in enumerate(rows, 1)]
    evidence = gather(questions, kb, cfg.top_k, cfg.retriever_type, max(cfg.numbers, default=0), cfg.seed)
    shown = {condition: evidence.documents(condition) for condition in CONDITIONS}
    model = load_reader(cfg, device, cfg.source, cfg.model_tag, cfg.step)
    model.say(f"; {describe_device(device, model.model.compute_dtype)}; {len(rows)} questions")
    results, runs, name = Results(), dict[str, list[Prediction]](), "none"
    if cfg.baseline != "none":
        other = load_reader(cfg, device, cfg.baseline, cfg.baseline_tag or model.tag, None)
        name = other.name
        theirs = {c: shown[c] for c, (who, _) in CONDITIONS.items() if who == "baseline"}
        runs = run_conditions(cfg, questions, other, theirs)
        del other
    ours = {c: shown[c] for c, (who, _) in CONDITIONS.items() if who == "model"}
    for tag in [None, *(cfg.compare or [])]:
        reader = model if tag is None else load_reader(cfg, device, cfg.source, str(tag), None)
        if reader.name in results.runs:
            reader.say(": given twice, measured once")
            continue
        asked = ours if tag is None else {c: shown[c] for c in ("rag", "oracle")}
        results.runs[reader.name] = {**runs, **run_conditions(cfg, questions, reader, asked)}
        results.sizes[reader.name] = run_sizes(cfg, evidence, reader)
        results.layers[reader.name] = layers(reader.model.config.block_pattern, reader.model.config.n_layer)
        runs = {}
    if ranks.main:
        report(cfg, results, name, time.monotonic() - start)
    leave_ranks()


if __name__ == "__main__":
    run_script(main)
