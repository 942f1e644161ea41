"""The questions of CORE: its 22 tasks (DataComp-LM, arXiv 2406.11794) and where their files are."""

import gzip
import json
import random
import shutil
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.common import base_dir, data_dir
from nanochat.config import UserError
from nanochat.download import Fetcher

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"  # nanochat's, about 160 MB
PUBLISHED = "dclm_published_core_scores.jsonl.gz"


@dataclass(frozen=True)
class CoreTask:
    """One task. `file` lies below the bundle, there or under eval_data, plain or .gz."""

    label: str
    file: str
    kind: str  # multiple_choice, schema (contexts vary, continuation common) or language_modeling
    shots: int
    delimiter: str  # between context and continuation
    baseline: float  # accuracy of guessing


def _tasks(kind: str, *rows: tuple[str, str, int, str, float]) -> list[CoreTask]:
    return [CoreTask(label, file + ".jsonl", kind, shots, d, baseline) for label, file, shots, d, baseline in rows]


_ANSWER = "\nAnswer: "
# DCLM's eval/heavy.yaml, additional_aggregation.json and eval_meta_data.csv
CORE_TASKS = [
    *_tasks(
        "multiple_choice",
        ("hellaswag_zeroshot", "language_understanding/hellaswag", 0, " ", 0.25),
        ("hellaswag", "language_understanding/hellaswag", 10, " ", 0.25),
        ("arc_easy", "world_knowledge/arc_easy", 10, _ANSWER, 0.25),
        ("arc_challenge", "world_knowledge/arc_challenge", 10, _ANSWER, 0.25),
        ("copa", "commonsense_reasoning/copa", 0, " ", 0.5),
        ("commonsense_qa", "commonsense_reasoning/commonsense_qa", 10, " ", 0.403),
        ("piqa", "commonsense_reasoning/piqa", 10, _ANSWER, 0.5),
        ("openbook_qa", "commonsense_reasoning/openbook_qa", 0, " ", 0.25),
        ("boolq", "reading_comprehension/boolq", 10, _ANSWER, 0.62),
        ("agi_eval_lsat_ar", "symbolic_problem_solving/agi_eval_lsat_ar", 3, " ", 0.25),
        ("bigbench_language_identification", "language_understanding/bigbench_language_identification", 10, " ", 0.25),
    ),
    *_tasks(
        "schema",
        ("winograd", "language_understanding/winograd_wsc", 0, " ", 0.5),
        ("winogrande", "language_understanding/winogrande", 0, " ", 0.5),
    ),
    *_tasks(
        "language_modeling",
        ("lambada_openai", "language_understanding/lambada_openai", 0, " ", 0.0),
        ("jeopardy", "world_knowledge/jeopardy_all", 10, _ANSWER, 0.0),
        ("bigbench_qa_wikidata", "world_knowledge/bigbench_qa_wikidata", 10, " ", 0.0),
        ("squad", "reading_comprehension/squad", 10, " ", 0.0),
        ("coqa", "reading_comprehension/coqa", 0, " ", 0.0),
        ("bigbench_dyck_languages", "symbolic_problem_solving/bigbench_dyck_languages", 10, " ", 0.0),
        ("bigbench_cs_algorithms", "symbolic_problem_solving/bigbench_cs_algorithms", 10, " ", 0.0),
        ("bigbench_operators", "symbolic_problem_solving/bigbench_operators", 10, " ", 0.0),
        ("bigbench_repeat_copy_logic", "symbolic_problem_solving/bigbench_repeat_copy_logic", 10, " ", 0.0),
    ),
]
_KEYS = {
    "multiple_choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "language_modeling": ("context", "continuation"),
}


def core_folder() -> Path:
    """<data>/eval_core where there is one, else <base dir>/eval_bundle, downloaded if it is not there yet."""
    data = data_dir()
    if data is not None and (data / "eval_core").is_dir():
        return data / "eval_core"
    folder = base_dir() / "eval_bundle"
    if not folder.is_dir():
        _download(folder)
    return folder


def _download(folder: Path) -> None:
    """Fetch nanochat's bundle and unpack it; the folder appears whole or not at all."""

    def check(part: Path) -> None:
        with zipfile.ZipFile(part) as z:
            if bad := z.testzip():
                raise ValueError(f"{bad} is damaged")

    cure = f"without a network, put the unpacked bundle at {folder}, or set NANOCHAT_DATA to a folder with eval_core"
    archive, tmp = folder.with_name("eval_bundle.zip"), folder.with_name(".eval_bundle.tmp")
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"fetching {BUNDLE_URL}", file=sys.stderr)
    Fetcher(check=check, retries=2, cure=cure).fetch(BUNDLE_URL, archive)
    shutil.rmtree(tmp, ignore_errors=True)
    with zipfile.ZipFile(archive) as z:
        z.extractall(tmp)
    inner = tmp / "eval_bundle"
    (inner if inner.is_dir() else tmp).rename(folder)
    shutil.rmtree(tmp, ignore_errors=True)
    archive.unlink()


def task_file(folder: Path, task: CoreTask) -> Path | None:
    """Where the task's questions are, or None."""
    paths = [p for top in (folder, folder / "eval_data") for p in (top / f"{task.file}.gz", top / task.file)]
    return next((p for p in paths if p.is_file()), None)


def read_items(path: Path, task: CoreTask) -> list[dict[str, Any]]:
    """The questions, in nanochat's order: shuffled with seed 1337."""
    open_text: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    try:
        with open_text(path, "rt", encoding="utf-8") as f:
            items = [json.loads(line) for line in f if line.strip()]
    except (OSError, EOFError, ValueError) as e:
        raise UserError(f"{path} cannot be read ({e}): restore it") from e
    for i, item in enumerate(items):
        if missing := [k for k in _KEYS[task.kind] if k not in item]:
            raise UserError(f"{path}, question {i + 1} has no {missing[0]!r}: a {task.kind} task needs it")
    if len(items) <= task.shots:
        raise UserError(f"{path} has {len(items)} questions, {task.label} needs more than its {task.shots} examples")
    random.Random(1337).shuffle(items)
    return items
