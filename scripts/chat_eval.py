"""How often a chat model is right, task by task, and ChatCORE over them.

    python -m scripts.chat_eval -i sft                            # the embedded tasks, which need no files
    python -m scripts.chat_eval -i rl -a GSM8K,ARC-Easy -x 200    # 200 questions of each
    python -m scripts.chat_eval -i sft -a GSM8K -n 8 -t 1         # pass@1, pass@2, pass@4 and pass@8
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_eval -- -i sft -a all

-a takes names of tasks/mixtures.py, and: embedded; chatcore (nanochat's six tasks); all (both). A task whose data is
missing is an error. Every answer goes to <base dir>/chat_eval/<model>/<task>.jsonl. The report's section keeps what was
measured before of the same checkpoint, so tasks can be evaluated one by one.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch

from nanochat.chat_eval import CHATCORE_TASKS, Answer, Score, chat_core, chat_core_name, evaluate
from nanochat.checkpoint import load_model, tag_of
from nanochat.common import atomic_write, base_dir, read_json, run_script
from nanochat.config import UserError, load_config
from nanochat.device import Ranks, all_reduce_sum, describe_device, init_ranks, leave_ranks, pick_device
from nanochat.report import aligned_table, log_stage, report_dir
from tasks.common import Task, plain
from tasks.mixtures import eval_task

EMBEDDED = ("Arithmetic", "Spelling", "SpellingBee", "WorldChoice", "WorldQA")
GROUPS = {"embedded": EMBEDDED, "chatcore": CHATCORE_TASKS, "all": (*CHATCORE_TASKS, *EMBEDDED)}
SHOWN = 400  # characters of a question or an answer in a sample


@dataclass(frozen=True)
class ChatEvalConfig:
    """Evaluate a chat model."""

    SHORT: ClassVar = {
        "i": "source",
        "a": "tasks",
        "d": "dtype",
        "t": "temperature",
        "m": "max_new_tokens",
        "n": "num_samples",
        "k": "top_k",
        "b": "batch_size",
        "g": "model_tag",
        "s": "step",
        "x": "max_problems",
        "task_name": "tasks",
        "device_type": "device",
    }

    source: Annotated[Literal["base", "mid", "sft", "rl", "rag", "refrag"], "-i: stage of the checkpoint"] = "sft"
    model_tag: Annotated[str | None, "-g: checkpoint folder; none = the one saved last"] = None
    step: Annotated[int | None, "-s: step; none = the newest"] = None
    tasks: Annotated[list | None, "-a: as a,b, or embedded, chatcore, all; none = embedded"] = None
    max_problems: Annotated[int, "-x: questions of each task; -1 = all"] = -1
    num_samples: Annotated[int, "-n: answers to each question, for pass@k"] = 1
    temperature: Annotated[float, "-t: 0 = greedy"] = 0.0
    top_k: Annotated[int, "-k: sample among the k best ids; 0 = all"] = 50
    max_new_tokens: Annotated[int, "-m: longest answer"] = 512
    batch_size: Annotated[int, "-b: questions that run together"] = 32
    seed: Annotated[int, "same seed, same answers"] = 42
    show: Annotated[int, "answers of each task to print"] = 3
    device: Annotated[str, "cpu, cuda, mps; empty = the best there is"] = ""
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], "-d: multiplication dtype"] = "auto"

    def __post_init__(self) -> None:
        counts = {k: getattr(self, k) for k in ("num_samples", "max_new_tokens", "batch_size")}
        if min(counts.values()) < 1 or self.max_problems == 0:
            given = ", ".join(f"{k}={v}" for k, v in {**counts, "max_problems": self.max_problems}.items())
            raise ValueError(f"{given}: give positive numbers, or max_problems=-1 for all questions")
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError(f"num_samples={self.num_samples} equal answers at temperature 0: add -t 1")

    def sampling(self) -> dict[str, Any]:
        keys = "max_problems num_samples temperature top_k max_new_tokens batch_size seed".split()  # noqa: SIM905
        return {key: getattr(self, key) for key in keys}


def task_names(given: Sequence[str] | None) -> list[str]:
    """Names with groups spelled out, each once. nanochat's separator | is understood too."""
    names = [name for part in given or ["embedded"] for name in str(part).split("|")]
    return list(dict.fromkeys(name for part in names for name in GROUPS.get(part, [part])))


def load_tasks(names: Sequence[str]) -> list[Task]:
    """UserError naming every task that cannot be had."""
    tasks, errors = [], []
    for name in names:
        try:
            tasks.append(eval_task(name))
        except UserError as e:
            errors.append(str(e))
    if errors:
        raise UserError("; ".join(errors))
    return tasks


def load_tasks_once(names: Sequence[str], ranks: Ranks, device: torch.device) -> list[Task]:
    """As load_tasks; rank 0 downloads what must be downloaded, and the others wait."""
    tasks = load_tasks(names) if ranks.main else []
    all_reduce_sum(torch.zeros(1, device=device))
    return tasks or load_tasks(names)


# ---- what is shown and written ----


def record(task: Task, answer: Answer) -> dict[str, Any]:
    """One question, the expected answer and what the model made of it."""
    messages = task[answer.index]["messages"]
    return {
        "index": answer.index,
        "question": plain(messages[-2]["content"]),
        "expected": plain(messages[-1]["content"]),
        "completions": answer.completions,
        "correct": answer.correct,
    }


def save_answers(path: Path, task: Task, score: Score) -> None:
    with atomic_write(path, "w") as f:
        f.writelines(json.dumps(record(task, a), ensure_ascii=False) + "\n" for a in score.answers)


def samples(task: Task, score: Score, n: int) -> str:
    """The first n answers, as an indented block of Markdown."""
    lines = []
    for found in (record(task, a) for a in score.answers[:n]):
        lines += [f"{task.name} {found['index']}, {'right' if found['correct'][0] else 'wrong'}"]
        given = found["completions"][0] if found["completions"] else "(longer than the model's context)"
        for label, text in (("question", found["question"]), ("expected", found["expected"]), ("given", given)):
            cut = (text if len(text) <= SHOWN else f"{text[:SHOWN]}...").splitlines() or [""]
            lines += [f"  {name:9s} {visible(line)}" for name, line in zip_longest([label], cut, fillvalue="")]
    return "\n".join(f"    {line}".rstrip() for line in lines)


def visible(text: str) -> str:
    """What a model writes may hold control characters, which would act in a terminal."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def figures(score: Score) -> dict[str, dict[str, Any]]:
    """The report's metrics of one task."""
    made = {score.name: {"value": score.value, "stderr": score.stderr, "n": score.n, "baseline": score.baseline}}
    if score.too_long:
        made[score.name]["too_long"] = score.too_long
    for k, (value, stderr) in score.pass_at.items():
        made[f"{score.name} pass@{k}"] = {"value": value, "stderr": stderr, "n": score.n}
    return made


def with_chat_core(metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics, with ChatCORE over nanochat's six tasks, over the embedded ones, or else over all there are."""
    metrics = {name: m for name, m in metrics.items() if not name.startswith("ChatCORE")}
    tasks = [name for name, m in metrics.items() if of_task(m)]
    groups = [g for g in (CHATCORE_TASKS, EMBEDDED) if set(g) <= set(tasks)]
    for group in groups or [tasks] * (len(tasks) > 1):
        scores = [score_from(name, metrics[name]) for name in group]
        value, stderr = chat_core(scores)
        metrics[chat_core_name(group)] = {"value": value, "stderr": stderr, "n": sum(s.n for s in scores)}
    return metrics


def score_from(name: str, m: dict[str, Any]) -> Score:
    return Score(name, m["value"], m["stderr"], m["n"], m["baseline"], m.get("too_long", 0))


def of_task(metric: Any) -> bool:
    return isinstance(metric, dict) and "baseline" in metric


def score_table(metrics: dict[str, Any]) -> str:
    rows = [["task", "score", "±", "guessing", "centred", "±", "n", "too long"]]
    for name, m in metrics.items():
        if isinstance(m, dict):
            row = [name, f"{m['value']:.4f}", f"{m['stderr']:.4f}", "", "", "", str(m["n"]), ""]
            if of_task(m):
                score = score_from(name, m)
                row[3:6] = [f"{x:.4f}" for x in (score.baseline, score.centred, score.centred_stderr)]
                row[7] = str(score.too_long)
            rows.append(row)
    return aligned_table(rows)


def earlier(stage: str, checkpoint: str) -> dict[str, Any]:
    """The report's section of this stage, where it is of the same checkpoint; else an empty one."""
    path = report_dir() / f"{stage}.json"
    section = read_json(path) if path.is_file() else {}
    same = section.get("metrics", {}).get("checkpoint") == checkpoint
    return section if same else {"metrics": {}, "duration_s": 0.0}


def report(cfg: ChatEvalConfig, scores: Sequence[Score], checkpoint: str, shown: str, seconds: float) -> None:
    """Print the table and log it, with what was measured before of this checkpoint."""
    stage = f"chat_evaluation_{cfg.source}"
    before = earlier(stage, checkpoint)
    metrics = {**before["metrics"], "checkpoint": checkpoint}
    for score in scores:
        metrics.update(figures(score))
    metrics = with_chat_core(metrics)
    table = score_table(metrics)
    print(f"\n{table}\n\n{checkpoint}: {seconds:.0f} s; answers in {base_dir() / 'chat_eval' / checkpoint}")
    rows = [name for name, m in metrics.items() if isinstance(m, dict)]
    log_stage(stage, metrics, f"{table}\n\n{shown}", duration_s=seconds + (before["duration_s"] or 0), summary=rows)


def progress(done: int, n: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done} of {n}", end="\r", file=sys.stderr, flush=True)


def quiet(done: int, n: int) -> None:
    """What the other ranks say."""


def main(argv: list[str]) -> None:
    cfg = load_config(ChatEvalConfig, argv)
    ranks, device = init_ranks(pick_device(cfg.device))
    tasks = load_tasks_once(task_names(cfg.tasks), ranks, device)
    model, tokenizer, meta = load_model(cfg.source, device, cfg.model_tag, cfg.step, dtype=cfg.dtype)
    tag = cfg.model_tag or tag_of(meta)
    checkpoint = f"{cfg.source}_{tag}_{meta['step']:06d}"
    if ranks.main:
        print(f"{checkpoint}; {describe_device(device, model.compute_dtype)}", flush=True)
    start, scores, shown = time.monotonic(), [], []
    for task in tasks:
        score = evaluate(model, tokenizer, task, tell=progress if ranks.main else quiet, **cfg.sampling())
        scores.append(score)
        if ranks.main:
            save_answers(base_dir() / "chat_eval" / checkpoint / f"{task.name}.jsonl", task, score)
            shown.append(samples(task, score, cfg.show))
            print(f"{task.name}: {score.value:.4f} ± {score.stderr:.4f} (n={score.n})\n{shown[-1]}", flush=True)
    if ranks.main:
        report(cfg, scores, checkpoint, "\n\n".join(s for s in shown if s), time.monotonic() - start)
    leave_ranks()


if __name__ == "__main__":
    run_script(main)
