"""rag_eval --mode multihop: a model that searches, beside its cold start and single-shot RAG.

    python -m scripts.rag_eval --mode multihop --knowledge_base rag_data -g tiny --compare=tiny_seed2,tiny_seed3

refrag     the model after reinforcement learning, greedy, with the search tool
cold       the cold start it began from
single     the rag model with top_k documents found by the question: single-shot RAG

EM and F1 are those of answerable questions, 0 for abstaining. The ceiling is the share of questions for whose every
step the oracle's query finds a gold document: what reading without a fault would reach. --compare adds checkpoints
trained alike with other seeds: every figure is a mean over them, and a bootstrap over questions gives the intervals.
Predictions with their searches go to <base dir>/rag_eval/<checkpoint>/multihop.jsonl.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from nanochat.checkpoint import load_model, tag_of
from nanochat.common import atomic_write, base_dir, write_json
from nanochat.device import init_ranks, leave_ranks, pick_device, shared_out
from nanochat.engine import Engine
from nanochat.multihop_rl import Outcome, Row, make_actor, make_tool, n_hops, outcome
from nanochat.plots import BLUE, GREEN, GREY, ORANGE, png_bytes
from nanochat.rag import MAX_DOC_LENGTH, answer_batch
from nanochat.rag_eval import Figure, figure
from nanochat.report import aligned_table, log_stage, report_dir
from nanochat.retrieval.metrics import f1, paired_bootstrap
from nanochat.rl import Sampling, Verdict, rollouts
from nanochat.tools import Tool

SECTION = "refrag_multihop_evaluation"
COLOURS = {"single": GREY, "cold": ORANGE, "refrag": BLUE}


@dataclass(frozen=True)
class MultihopEvalConfig:
    """Evaluate a model that searches step by step."""

    SHORT: ClassVar = {"i": "source", "g": "model_tag", "s": "step", "x": "max_problems", "b": "batch_size",
                       "d": "dtype", "device_type": "device"}  # fmt: skip

    knowledge_base: Annotated[str, "folder made by prepare_rag_dataset, or a knowledge base"]
    mode: Annotated[Literal["multihop"], "this one"] = "multihop"
    rows: Annotated[str | None, "questions with hops, JSONL; none = val.jsonl beside the knowledge base"] = None
    source: Annotated[Literal["refrag", "rag", "sft", "rl"], "-i: stage of the checkpoint"] = "refrag"
    model_tag: Annotated[str | None, "-g: checkpoint folder; none = the one saved last"] = None
    step: Annotated[int | None, "-s: step; none = the newest"] = None
    compare: Annotated[list | None, "further tags, of other seeds, as a,b: figures become means over all"] = None
    cold: Annotated[bool, "its cold start beside it: refrag, tag MODEL_TAG_cold"] = True
    single: Annotated[str, "stage of the model for single-shot RAG; none = without"] = "rag"
    single_tag: Annotated[str | None, "its checkpoint folder; none = as model_tag"] = None
    max_problems: Annotated[int, "-x: questions, drawn by the seed; -1 = all"] = 500
    retriever_type: Annotated[str | None, "none = the knowledge base's own"] = None
    max_hops: Annotated[int, "questions of more steps are left out"] = 3
    top_k_per_hop: Annotated[int, "documents of a search"] = 1
    top_k: Annotated[int, "documents of single-shot RAG"] = 5
    max_searches: Annotated[int, "searches of a question; 0 = max_hops + 1"] = 0
    max_doc_length: Annotated[int, "tokens of a document"] = MAX_DOC_LENGTH
    max_new_tokens: Annotated[int, "ids after the question, documents included"] = 1024
    batch_size: Annotated[int, "-b: questions that run together"] = 32
    seed: Annotated[int, "of the choice of questions"] = 42
    show: Annotated[int, "traces in the report"] = 3
    device: Annotated[str, "cpu, cuda, mps; empty = the best there is"] = ""
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], "-d: multiplication dtype"] = "auto"

    def __post_init__(self) -> None:
        if min(self.max_hops, self.top_k_per_hop, self.top_k, self.batch_size, self.max_new_tokens) < 1:
            raise ValueError("max_hops, top_k_per_hop, top_k, batch_size and max_new_tokens: give 1 or more of each")


@dataclass(frozen=True)
class Episode:
    """A question, what became of it, its queries and the ids of the documents each of them showed."""

    row: Row
    outcome: Outcome
    queries: tuple[str, ...] = ()
    found: tuple[tuple[str, ...], ...] = ()

    @property
    def supported(self) -> float | None:
        """Whether for every step a gold document was shown; None where the question has no answer."""
        if not self.row["answerable"]:
            return None
        shown = {id for ids in self.found for id in ids}
        return float(all(shown & set(hop["gold_ids"]) for hop in self.row["hops"]))

    def values(self) -> dict[str, float | None]:
        row, o = self.row, self.outcome
        known = row["answerable"]
        return {
            "EM": o.score(row) if known else None,
            "F1": o.score(row, f1) if known else None,
            "abstained, answerable": float(o.abstained) if known else None,
            "abstained, unanswerable": None if known else float(o.abstained),
            "searches": float(o.searches),
            "steps needed": float(n_hops(row)),
            "over-searching": float(o.searches > n_hops(row)) if known else None,
            "all support found": self.supported,
            "valid format": float(o.valid),
        }

    def record(self) -> dict[str, Any]:
        """A line of the predictions' file."""
        row, o = self.row, self.outcome
        searches = [{"query": q, "documents": ids} for q, ids in zip(self.queries, self.found, strict=True)]
        return {
            "id": row.get("id"), "kind": row.get("kind"), "question": row["question"], "answers": row["answers"],
            "answerable": row["answerable"], "hops": n_hops(row), "text": o.text, "abstained": o.abstained,
            "citations": o.citations, "valid": o.valid, "em": o.score(row), "supported": self.supported,
            "searches": searches,
        }  # fmt: skip


def search_and_answer(
    model: Any, tokenizer: Any, tool: Tool, rows: Sequence[Row], max_new_tokens: int, batch_size: int
) -> list[Episode]:
    """Greedy, every row once."""
    sampling = Sampling(1, max_new_tokens, temperature=0.0, batch_size=batch_size)
    actor = make_actor(model, tokenizer, tool, rows, lambda t: Verdict(0.0, False), sampling)
    found = []
    for row, group in zip(rows, rollouts(actor, range(len(rows)), seed=0), strict=True):
        [t] = group.trajectories
        ids = tuple(tuple(hit.document.id for hit in call.result or ()) for call in t.trace)
        found.append(Episode(row, outcome(t, tokenizer, tool), tuple(call.query for call in t.trace), ids))
    return found


def single_shot(
    model: Any, tokenizer: Any, kb: Any, rows: Sequence[Row], top_k: int, retriever: str | None, max_doc_length: int,
    batch_size: int,
) -> list[Episode]:  # fmt: skip
    """The question itself is the only query, and its documents stand in the prompt."""
    engine, found = Engine(model, tokenizer, tools=()), []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        questions = [row["question"] for row in batch]
        replies = answer_batch(engine, kb, questions, top_k, retriever, max_doc_length, max_new_tokens=32)
        for row, reply in zip(batch, replies, strict=True):
            ids = tuple(hit.document.id for hit in reply.hits)
            o = Outcome(reply.text, reply.citations, reply.abstained, reply.well_formed, 1)
            found.append(Episode(row, o, (row["question"],), (ids,)))
    return found


def ceiling(tool: Tool, rows: Sequence[Row]) -> list[float | None]:
    """For each answerable row whether the oracle's queries all show a gold document."""
    assert tool.render is not None
    hits = tool.handler([hop["query"] for row in rows for hop in row["hops"]])
    shown = [{hit.document.id for hit in tool.render(found, [])[1]} for found in hits]
    reachable, at = list[float | None](), 0
    for row in rows:
        steps = zip(row["hops"], shown[at : at + len(row["hops"])], strict=True)
        at += len(row["hops"])
        reachable.append(float(all(ids & set(hop["gold_ids"]) for hop, ids in steps)) if row["answerable"] else None)
    return reachable


# ---- figures ----

Runs = Mapping[str, Sequence[Sequence[Episode]]]  # of each condition one run for each seed, the same rows in all


def per_question(runs: Sequence[Sequence[Episode]], metric: str, hops: int | None = None) -> list[float]:
    """Means over the runs, of the questions that count (of so many hops)."""
    found = []
    for same in zip(*runs, strict=True):
        numbers = [e.values()[metric] for e in same if hops is None or n_hops(e.row) == hops]
        if numbers and None not in numbers:
            found.append(sum(numbers) / len(numbers))
    return found


def cell(numbers: Sequence[float]) -> str:
    return str(figure(numbers)) if numbers else "-"


def all_hops(runs: Runs) -> list[int]:
    return sorted({n_hops(e.row) for e in next(iter(runs.values()))[0] if e.row["answerable"]})


def em_table(runs: Runs, reachable: Sequence[float | None]) -> str:
    """EM by hops, the retriever's ceiling above."""
    hops = all_hops(runs)
    rows = next(iter(runs.values()))[0]
    counts = [len(per_question([rows], "EM", h)) for h in hops]
    table = [["EM", *(f"{h} hop{'s' * (h > 1)} (n={n})" for h, n in zip(hops, counts, strict=True)), "all"]]
    tops = [
        [c for c, e in zip(reachable, rows, strict=True) if c is not None and h in (None, n_hops(e.row))]
        for h in [*hops, None]
    ]
    table.append(["retriever's ceiling", *map(cell, tops)])
    for name, of_name in runs.items():
        table.append([name, *(cell(per_question(of_name, "EM", h)) for h in [*hops, None])])
    return aligned_table(table)


def search_table(runs: Runs) -> str:
    names = [name for name in next(iter(runs.values()))[0][0].values() if name != "EM"]
    rows = [[name, *(cell(per_question(of_name, name)) for of_name in runs.values())] for name in names]
    return aligned_table([["", *runs], *rows])


def difference(a: Sequence[Sequence[Episode]], b: Sequence[Sequence[Episode]], hops: int | None) -> Figure | None:
    """EM of a - EM of b, paired by question."""
    left, right = per_question(a, "EM", hops), per_question(b, "EM", hops)
    return Figure(*paired_bootstrap(left, right), 0.0, len(left)) if left else None


def difference_table(runs: Runs) -> str:
    """The first condition against every other; an interval without 0 is a difference."""
    (first, mine), *others = runs.items()
    hops = [*all_hops(runs), None]
    head = ["EM, paired", *("all" if h is None else f"{h} hop{'s' * (h > 1)}" for h in hops)]
    rows = [[f"{first} - {name}", *(str(difference(mine, other, h) or "-") for h in hops)] for name, other in others]
    return aligned_table([head, *rows]) if rows else ""


def traces(episodes: Sequence[Episode], n: int) -> str:
    """The first n episodes as indented lines of Markdown."""
    lines = []
    for e in episodes[:n]:
        said = "(abstains)" if e.outcome.abstained else json.dumps(e.outcome.text, ensure_ascii=False)
        right = ", ".join(e.row["answers"]) or "no answer"
        lines.append(f"{json.dumps(e.row['question'], ensure_ascii=False)} ({n_hops(e.row)} hops: {right})")
        lines += [
            f"  search {json.dumps(q, ensure_ascii=False)}: {', '.join(ids) or 'nothing'}"
            for q, ids in zip(e.queries, e.found, strict=True)
        ]
        lines.append(f"  {said} {''.join(f'[{c}]' for c in e.outcome.citations)}".rstrip())
    return "\n".join(f"    {line}" for line in lines)


def plot(runs: Runs, reachable: Sequence[float | None], path: Path) -> Path:
    """EM by hops with intervals, the ceiling as a line; below it searches made."""
    from matplotlib.figure import Figure as Canvas  # takes a second to import: only for those who draw

    hops = all_hops(runs)
    canvas = Canvas(figsize=(7.0, 5.2), dpi=110, layout="constrained")
    top, below = canvas.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for i, (name, of_name) in enumerate(runs.items()):
        x = [h + (i - (len(runs) - 1) / 2) * 0.25 for h in range(len(hops))]
        found = [figure(per_question(of_name, "EM", h)) for h in hops]
        errors = [[f.value - f.low for f in found], [f.high - f.value for f in found]]
        top.bar(x, [f.value for f in found], 0.22, yerr=errors, capsize=3, color=COLOURS.get(name, GREEN), label=name)
        searches = [figure(per_question(of_name, "searches", h)).value for h in hops]
        below.bar(x, searches, 0.22, color=COLOURS.get(name, GREEN))
    rows = next(iter(runs.values()))[0]
    for h, hop in enumerate(hops):
        tops = [c for c, e in zip(reachable, rows, strict=True) if c is not None and n_hops(e.row) == hop]
        top.hlines(
            sum(tops) / len(tops),
            h - 0.45,
            h + 0.45,
            color="black",
            linewidth=1,
            label=None if h else "retriever's ceiling",
        )
        below.hlines(hop, h - 0.45, h + 0.45, color="black", linewidth=1, label=None if h else "steps needed")
    top.set_ylabel("exact match")
    below.set_ylabel("searches")
    below.set_xticks(range(len(hops)), [f"{h} hop{'s' * (h > 1)}" for h in hops])
    for ax in (top, below):
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=8)
    with atomic_write(path) as f:
        f.write(png_bytes(canvas))
    return path


# ---- the command ----


def multihop_eval_main(cfg: MultihopEvalConfig, kb: Any, rows: Sequence[Row]) -> None:
    """Ask every condition the same rows, then tables, picture, predictions and the report's section."""
    started = time.monotonic()
    ranks, device = init_ranks(pick_device(cfg.device))
    conditions: dict[str, list[list[Episode]]] = {}
    reachable: list[float | None] = []
    checkpoint = ""

    def ask(name: str, source: str, tag: str | None, step: int | None, how: Callable[..., list[Episode]]) -> str:
        nonlocal checkpoint
        model, tokenizer, meta = load_model(source, device, tag, step, dtype=cfg.dtype)
        tag = tag or tag_of(meta)
        episodes = shared_out(rows, lambda own: how(model, tokenizer, own))
        conditions.setdefault(name, []).append(episodes)
        folder = base_dir() / "rag_eval" / f"{source}_{tag}_{meta['step']:06d}"
        checkpoint = checkpoint or folder.name
        if not ranks.main:
            return tag
        with atomic_write(folder / "multihop.jsonl", "w") as f:
            f.writelines(json.dumps(e.record(), ensure_ascii=False) + "\n" for e in episodes)
        print(f"{folder.name}, {name}: EM {cell(per_question([episodes], 'EM'))}", flush=True)
        return tag

    def searching(model: Any, tokenizer: Any, own: list[Row]) -> list[Episode]:
        tool = make_tool(
            tokenizer,
            kb,
            cfg.top_k_per_hop,
            cfg.max_doc_length,
            cfg.max_searches or cfg.max_hops + 1,
            cfg.retriever_type,
        )
        reachable[:] = reachable or ceiling(tool, rows)
        return search_and_answer(model, tokenizer, tool, own, cfg.max_new_tokens, cfg.batch_size)

    def once(model: Any, tokenizer: Any, own: list[Row]) -> list[Episode]:
        return single_shot(model, tokenizer, kb, own, cfg.top_k, cfg.retriever_type, cfg.max_doc_length, cfg.batch_size)

    first = ask(cfg.source, cfg.source, cfg.model_tag, cfg.step, searching)
    tags = [first, *map(str, cfg.compare or ())]
    for tag in tags[1:]:
        ask(cfg.source, cfg.source, tag, None, searching)
    for tag in tags if cfg.cold else ():
        ask("cold", "refrag", f"{tag}_cold", None, searching)
    if cfg.single != "none":
        ask("single", cfg.single, cfg.single_tag or first, None, once)
    if ranks.main:
        _report(cfg, conditions, reachable, checkpoint, time.monotonic() - started)
    leave_ranks()


def _report(cfg: MultihopEvalConfig, runs: Runs, reachable: Sequence[float | None], name: str, seconds: float) -> None:
    mine = runs[cfg.source]
    seeds = f"means over {len(mine)} seeds; " if len(mine) > 1 else ""
    parts = [
        f"{len(mine[0])} questions, {cfg.top_k_per_hop} documents a search; {seeds}95 % intervals by "
        "bootstrap over questions.",
        em_table(runs, reachable), difference_table(runs), search_table(runs), traces(mine[0], cfg.show),
    ]  # fmt: skip
    text = "\n\n".join(part for part in parts if part)
    print(f"\n{text}\n")
    figures = {c: {m: figure(v) for m in of[0][0].values() if (v := per_question(of, m))} for c, of in runs.items()}
    by_hops = {c: {f"EM {h} hops": figure(per_question(of, "EM", h)) for h in all_hops(runs)} for c, of in runs.items()}
    every = {c: {m: dataclasses.asdict(f) for m, f in {**figures[c], **by_hops[c]}.items()} for c in runs}
    write_json(
        base_dir() / "rag_eval" / name / "multihop.json", {"config": dataclasses.asdict(cfg), "conditions": every}
    )
    metrics: dict[str, Any] = {"checkpoint": name, "questions": len(mine[0]), "seconds": round(seconds, 1)}
    metrics |= {"multi-hop exact match": every[cfg.source]["EM"], "searches": every[cfg.source]["searches"]}
    picture = plot(runs, reachable, report_dir() / f"rag_eval_{name}_multihop.png")
    log_stage(SECTION, metrics, text, [picture], summary=["multi-hop exact match"])
