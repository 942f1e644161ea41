"""CORE of a base model, or of one of the stages after it: 22 tasks answered from examples in the context.

    python -m scripts.base_eval --model_tag=d20
    python -m scripts.base_eval --tasks=arc_easy,copa --max_per_task=200      # a quick look
    torchrun --standalone --nproc_per_node=8 -m scripts.base_eval
    python -m scripts.base_eval --hf_path=models/gpt2                         # a folder transformers can load

Writes the table to <base dir>/base_eval as CSV and JSON, and to the report. Where a task has no file the aggregate is
named after how many there are: without CoQA it is CORE-21, beside the same 21 tasks of DCLM's published models.
"""

import csv
import difflib
import io
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from nanochat.checkpoint import load_model, tag_of
from nanochat.common import atomic_write, base_dir, git_state, read_json, run_script, write_json
from nanochat.config import UserError, load_config
from nanochat.core_bundle import CORE_TASKS, CoreTask, task_file
from nanochat.core_eval import (
    GPTScorer,
    Scorer,
    TaskScore,
    core,
    evaluate_core,
    judge_logits,
    published_scores,
    shared_core_folder,
)  # fmt: skip
from nanochat.device import describe_device, init_ranks, leave_ranks, pick_device, pick_dtype
from nanochat.report import aligned_table, log_stage

NEAREST = 5  # published models shown beside ours, with the best and the last of them
GPT2_XL = 0.256525  # CORE of GPT-2 with 1.6B parameters, the mark of nanochat's leaderboard


@dataclass(frozen=True)
class BaseEvalConfig:
    """Evaluate CORE."""

    SHORT: ClassVar = {"i": "source", "g": "model_tag", "s": "step", "x": "max_per_task", "device_type": "device"}

    source: Annotated[Literal["base", "mid", "sft", "rl", "rag", "refrag"], "-i: stage of the checkpoint"] = "base"
    model_tag: Annotated[str | None, "-g: checkpoint folder; none = the one saved last"] = None
    step: Annotated[int | None, "-s: step; none = the newest"] = None
    hf_path: Annotated[str | None, "evaluate the transformers model in this folder instead"] = None
    tasks: Annotated[list | None, "only these, as a,b; none = all 22"] = None
    max_per_task: Annotated[int, "-x: questions of each task; -1 = all"] = -1
    device_batch_tokens: Annotated[int, "tokens per forward, padding included"] = 32768
    device: Annotated[str, "cpu, cuda, mps; empty = the best there is"] = ""
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], "multiplication dtype"] = "auto"

    def __post_init__(self) -> None:
        if self.hf_path and (self.model_tag or self.step is not None or self.source != "base"):
            raise ValueError("hf_path names a model of its own: leave source, model_tag and step out")
        if self.max_per_task == 0 or self.device_batch_tokens < 1:
            raise ValueError(
                f"max_per_task={self.max_per_task}, device_batch_tokens={self.device_batch_tokens}: give positive "
                "numbers, or max_per_task=-1 for all questions"
            )


class HFScorer:
    """A causal model of transformers. Every option is read whole: no state is shared."""

    shares = False

    def __init__(self, folder: str, device: torch.device, dtype: torch.dtype) -> None:
        if not Path(folder).is_dir():
            raise UserError(f"hf_path={folder} is not a folder: give one that holds config.json, weights and tokenizer")
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer  # heavy, and only for this

            tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=dtype)
        except ImportError as e:
            raise UserError(f"--hf_path needs transformers ({e}): uv pip install transformers") from e
        except (OSError, ValueError) as e:
            raise UserError(f"transformers cannot load {folder}: {' '.join(str(e).split())[:300]}") from e
        self.model, self.tokenizer, self.device = model.eval().to(device), tokenizer, device
        start, end = tokenizer.bos_token_id, tokenizer.eos_token_id  # GPT-2 has one token for both
        if start is None and end is None:
            raise UserError(
                f"the tokenizer of {folder} has neither bos nor eos token: CORE starts each prompt with one"
            )
        self.bos_id = end if start is None else start
        self.max_len = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [[self.bos_id, *ids] for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]

    def prefill(self, ids: Tensor, lengths: Tensor | None, max_len: int) -> Any:
        raise NotImplementedError

    def score(
        self, ids: Tensor, rows: Tensor, cols: Tensor, targets: Tensor, state: Any, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return judge_logits(self.model(input_ids=ids, use_cache=False).logits[rows, cols].float(), targets)


def pick_tasks(names: list | None) -> list[CoreTask]:
    """The tasks of these names, in CORE's order; all for None."""
    known = {t.label: t for t in CORE_TASKS}
    for name in names or []:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise UserError(f"tasks: CORE has no task {name!r}: {hint}")
    return [t for t in CORE_TASKS if names is None or t.label in names]


def aggregate_name(n_tasks: int, chosen: bool, max_per_task: int) -> str:
    """CORE, CORE-21 where a task has no file; a selection or a limited run never bears that name alone."""
    name = f"mean of {n_tasks} tasks" if chosen else "CORE" if n_tasks == len(CORE_TASKS) else f"CORE-{n_tasks}"
    return name if max_per_task < 0 else f"{name} ({max_per_task} per task)"


def score_table(scores: Sequence[TaskScore], value: float, stderr: float, name: str) -> str:
    rows = [["task", "shots", "accuracy", "±", "guessing", "centred", "±", "n", "cropped"]]
    for s in scores:
        figures = [s.accuracy, s.accuracy_stderr, s.task.baseline, s.centered, s.centered_stderr]
        rows.append([s.task.label, str(s.task.shots), *(f"{x:.4f}" for x in figures), str(s.n), str(s.cropped)])
    n, cropped = sum(s.n for s in scores), sum(s.cropped for s in scores)
    rows.append([f"**{name}**", "", "", "", "", f"**{value:.4f}**", f"{stderr:.4f}", str(n), str(cropped)])
    return aligned_table(rows)


def published_table(folder: Path, labels: Sequence[str], name: str, value: float, stderr: float) -> str:
    """Ours among the published models that come nearest, all over the same tasks. '' where none are known."""
    models = published_scores(folder, labels)
    if not models:
        return ""
    near = sorted(range(len(models)), key=lambda i: abs(models[i][2] - value))[:NEAREST]
    rows = [(shorten(models[i][0]), f"{models[i][1]:.4f}", models[i][2]) for i in {0, *near, len(models) - 1}]
    rows.append(("**ours**", f"{value:.4f} ± {stderr:.4f}" if name == "CORE" else "-", value))
    rows.sort(key=lambda r: -r[2])
    text = [[model, published, f"{mean:.4f}"] for model, published, mean in rows]
    head = ["model", "CORE (22 tasks)", f"the same {len(labels)} tasks"]
    about = f"""Published: DCLM's evaluations of {len(models)} models (arXiv 2406.11794), here the best, the last and
those nearest to ours. Their prompts, tokenizers and contexts differ from ours in detail. GPT-2 with 1.6B parameters has
CORE {GPT2_XL} in nanochat's hands (22 tasks)."""
    return aligned_table([head, *text]) + "\n\n" + " ".join(about.split())


def shorten(name: str) -> str:
    return name if len(name) <= 60 else f"{name[:40]}...{name[-17:]}"


def notes(folder: Path, scores: Sequence[TaskScore], tasks: Sequence[CoreTask]) -> list[str]:
    """What a reader of the figures must know: tasks without data, sets that are not the original, cropped prompts."""
    missing = [t for t in tasks if task_file(folder, t) is None]
    lines = [f"No file for {t.label}: put {t.file}.gz in {folder} to have it counted." for t in missing]
    listing = folder / "core_tasks.json"
    remarks = {t["label"]: t.get("note") for t in read_json(listing)["core"]} if listing.is_file() else {}
    if changed := [f"{s.task.label} ({note})" for s in scores if (note := remarks.get(s.task.label))]:
        lines.append(f"Not the original files, as the bundle's core_tasks.json says: {', '.join(changed)}.")
    if cropped := sum(s.cropped for s in scores):
        lines.append(f"{cropped} questions were longer than the model's context and lost examples from the left.")
    return lines


def load(cfg: BaseEvalConfig, device: torch.device) -> tuple[Scorer, str, str]:
    """-> (the model ready to be scored, a file name for it, a line about it)."""
    if cfg.hf_path:
        dtype = pick_dtype(cfg.dtype, device)
        scorer = HFScorer(cfg.hf_path, device, dtype)
        name = re.sub(r"[^A-Za-z0-9_.-]+", "_", Path(cfg.hf_path).resolve().name)
        return scorer, f"hf_{name}", f"{cfg.hf_path}; {describe_device(device, dtype)}"
    model, tokenizer, meta = load_model(cfg.source, device, cfg.model_tag, cfg.step, dtype=cfg.dtype)
    tag = cfg.model_tag or tag_of(meta)
    name = f"{cfg.source}_{tag}_{meta['step']:06d}"
    return GPTScorer(model, tokenizer), name, f"{name}; {describe_device(device, model.compute_dtype)}"


def save(path: Path, scores: Sequence[TaskScore], result: dict[str, Any]) -> None:
    """<path>.csv, a row per task and the aggregate last, and <path>.json."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["task", "accuracy", "accuracy_stderr", "centered", "centered_stderr", "n", "cropped"])
    for s in scores:
        figures = [s.accuracy, s.accuracy_stderr, s.centered, s.centered_stderr]
        writer.writerow([s.task.label, *(f"{x:.6f}" for x in figures), s.n, s.cropped])
    total = result["aggregate"]
    writer.writerow([result["name"], "", "", f"{total['value']:.6f}", f"{total['stderr']:.6f}", total["n"], ""])
    with atomic_write(path.with_name(path.name + ".csv"), "w") as f:
        f.write(out.getvalue())
    write_json(path.with_name(path.name + ".json"), result)


def tell(score: TaskScore) -> None:
    cropped = f", {score.cropped} cropped" if score.cropped else ""
    print(f"{score.task.label}: {score.accuracy:.4f} ± {score.accuracy_stderr:.4f} (n={score.n}{cropped})", flush=True)


def main(argv: list[str]) -> None:
    cfg = load_config(BaseEvalConfig, argv)
    tasks = pick_tasks(cfg.tasks)
    ranks, device = init_ranks(pick_device(cfg.device))
    folder = shared_core_folder(ranks, device)
    if absent := [t.label for t in tasks if cfg.tasks is not None and task_file(folder, t) is None]:
        raise UserError(f"{folder} has no file of {absent[0]}: leave it out of --tasks, or put its file there")
    scorer, model_name, about = load(cfg, device)
    start = time.monotonic()
    if ranks.main:
        print(f"{about}; {folder}")
    scores = evaluate_core(
        scorer, folder, tasks, cfg.max_per_task, cfg.device_batch_tokens, ranks, tell if ranks.main else lambda s: None
    )
    if ranks.main:
        report(cfg, scores, tasks, folder, model_name, time.monotonic() - start)
    leave_ranks()


def report(
    cfg: BaseEvalConfig,
    scores: Sequence[TaskScore],
    tasks: Sequence[CoreTask],
    folder: Path,
    model_name: str,
    seconds: float,
) -> None:
    """Print, write the files, and log to the report (a model from elsewhere does not enter the report)."""
    value, stderr = core(scores)
    name = aggregate_name(len(scores), cfg.tasks is not None, cfg.max_per_task)
    total = {"value": value, "stderr": stderr, "n": sum(s.n for s in scores)}
    labels = [s.task.label for s in scores]
    parts = [
        score_table(scores, value, stderr, name),
        "\n".join(f"- {line}" for line in notes(folder, scores, tasks)),
        published_table(folder, labels, name, value, stderr),
    ]
    text = "\n\n".join(p for p in parts if p)
    suffix = re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_").lower()
    path = base_dir() / "base_eval" / f"{model_name}_{suffix}"
    accuracy = {s.task.label: {"value": s.accuracy, "stderr": s.accuracy_stderr, "n": s.n} for s in scores}
    centred = {s.task.label: s.centered for s in scores}
    result = {"name": name, "aggregate": total, "accuracy": accuracy, "centered": centred, "seconds": seconds}
    save(path, scores, {**result, "folder": str(folder), "git": git_state()})
    print(f"\n{text}\n\n{name}: {value:.4f} ± {stderr:.4f} in {seconds:.0f} s; {path}.csv and .json")
    if not cfg.hf_path:
        stage = "base_eval" if cfg.source == "base" else f"core_eval_{cfg.source}"
        log_stage(stage, {name: total}, text, duration_s=seconds, summary=[name])


if __name__ == "__main__":
    run_script(main)
