"""CORE: what a base model can do from examples in its context, on the 22 tasks of DataComp-LM (arXiv 2406.11794).

    scores = evaluate_core(GPTScorer(model, tokenizer), core_folder(), CORE_TASKS)
    value, stderr = core(scores)              # mean over tasks of (accuracy - baseline) / (1 - baseline)

Prompts, few-shot draws and scoring follow nanochat, so that numbers compare, with three differences. Questions run in
batches of like length, and what a question's options have in common is read once. A prompt longer than the model's
context keeps its <|bos|> and its end, and is counted. A limited run still draws its examples from the whole set.
Jeopardy is a plain mean over questions; DCLM's published figures average its categories.
"""

import gzip
import json
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.config import UserError
from nanochat.core_bundle import CORE_TASKS, PUBLISHED, CoreTask, core_folder, read_items, task_file
from nanochat.device import Ranks, all_reduce_sum
from nanochat.gpt import GPT
from nanochat.ops import cap_logits
from nanochat.tokenizer import Tokenizer

BLOCK = 512  # questions rendered, sorted by length and batched at a time
HEAD_ROWS = 1024  # rows of logits alive at once: 256 MB at V = 65,536


# ---- the metric ----


@dataclass(frozen=True)
class TaskScore:
    """What came of one task; cropped: questions whose prompt was longer than the model's context."""

    task: CoreTask
    correct: int
    n: int
    cropped: int = 0

    @property
    def accuracy(self) -> float:
        return self.correct / self.n

    @property
    def accuracy_stderr(self) -> float:
        """Binomial, over the choice of questions."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.n)

    @property
    def centered(self) -> float:
        return centered(self.accuracy, self.task.baseline)

    @property
    def centered_stderr(self) -> float:
        return self.accuracy_stderr / (1 - self.task.baseline)


def centered(accuracy: float, baseline: float) -> float:
    """0 for guessing, 1 for all right."""
    return (accuracy - baseline) / (1 - baseline)


def core(scores: Sequence[TaskScore]) -> tuple[float, float]:
    """-> (mean of the centred accuracies, its standard error over the choice of questions).

    Tasks count as independent, except that errors of tasks over the same file add up (an upper bound). Another seed of
    training moves CORE too: nanochat saw 0.25 to 0.27 in seven runs of one recipe.
    """
    by_file: dict[str, float] = defaultdict(float)
    for score in scores:
        by_file[score.task.file] += score.centered_stderr
    value = sum(s.centered for s in scores) / len(scores)
    return value, math.sqrt(sum(e * e for e in by_file.values())) / len(scores)


def published_scores(folder: Path, labels: Sequence[str]) -> list[tuple[str, float, float]]:
    """[(model, CORE as published, the same over `labels` alone)], best first; [] where the folder has no such file."""
    path = folder / PUBLISHED
    if not path.is_file():
        return []
    baselines = {t.label: t.baseline for t in CORE_TASKS}
    found = []
    with gzip.open(path, "rt", encoding="utf-8") as f:
        for row in map(json.loads, f):
            mean = sum(centered(row["icl"][x], baselines[x]) for x in labels) / len(labels)
            found.append((row["model"] if "/" in row["model"] else row["name"], row["core"], mean))
    return sorted(found, key=lambda r: -r[2])


# ---- prompts ----


def prompts(task: CoreTask, items: Sequence[dict[str, Any]], index: int) -> list[str]:
    """The texts of one question: one per option, or for language modelling without and with the continuation."""
    item, d = items[index], task.delimiter
    draws = random.Random(1234 + index).sample(range(len(items) - 1), task.shots)
    head = "".join(_example(task, items[i + (i >= index)]) + "\n\n" for i in draws)
    if task.kind == "multiple_choice":
        return [head + item["query"] + d + choice for choice in item["choices"]]
    if task.kind == "schema":
        return [head + context + d + item["continuation"] for context in item["context_options"]]
    text = head + item["context"].strip() + d
    return [text.strip(), text + item["continuation"]]  # a trailing space belongs to the continuation's first token


def _example(task: CoreTask, item: dict[str, Any]) -> str:
    if task.kind == "multiple_choice":
        return item["query"] + task.delimiter + item["choices"][item["gold"]]
    context = item["context_options"][item["gold"]] if task.kind == "schema" else item["context"].strip()
    return context + task.delimiter + item["continuation"]


@dataclass(frozen=True)
class Question:
    """One question as ids. Row r's continuation is rows[r][starts[r]:]; gold = -1: all its tokens must be likeliest."""

    rows: list[list[int]]
    starts: list[int]
    gold: int
    cropped: bool = False

    @property
    def shared(self) -> int:
        """Leading ids that all rows have in common and that predict nothing scored."""
        return min(_common(self.rows), min(self.starts) - 1) if len(self.rows) > 1 else 0

    @property
    def longest(self) -> int:
        return max(map(len, self.rows))


def make_question(task: CoreTask, item: dict[str, Any], rows: list[list[int]], max_len: int) -> Question:
    """rows: ids of the texts of `prompts`, <|bos|> first -> the question, cropped to max_len.

    The continuation is what follows the common ids (schema: the common ids at the end), and never empty; nanochat's is
    where one option is the beginning of another.
    """
    if task.kind == "schema":
        n = max(1, min(_common([r[::-1] for r in rows]), min(map(len, rows)) - 1))
        question = Question(rows, [len(r) - n for r in rows], item["gold"])
    elif task.kind == "multiple_choice":
        start = min(_common(rows), min(map(len, rows)) - 1)
        question = Question(rows, [start] * len(rows), item["gold"])
    else:
        question = Question(rows[1:], [min(_common(rows), len(rows[1]) - 1)], -1)
    return _crop(task, question, max_len)


def _common(rows: Sequence[Sequence[int]]) -> int:
    """Length of the common prefix."""
    first, n = rows[0], min(map(len, rows))
    for row in rows[1:]:
        n = next((i for i in range(n) if row[i] != first[i]), n)
    return n


def _crop(task: CoreTask, question: Question, max_len: int) -> Question:
    """Leave out what comes after <|bos|>, equally much in every row, until the longest fits."""
    cut = question.longest - max_len
    if cut <= 0:
        return question
    if cut >= min(question.starts):
        n = max(len(r) - s for r, s in zip(question.rows, question.starts, strict=True))
        raise UserError(
            f"{task.label}: an answer of {n} tokens does not fit a context of {max_len}: leave the task out"
        )
    rows, starts = [r[:1] + r[1 + cut :] for r in question.rows], [s - cut for s in question.starts]
    return Question(rows, starts, question.gold, cropped=True)


# ---- scoring ----


class Scorer(Protocol):
    """What CORE asks of a model."""

    max_len: int  # ids of a prompt with its continuation
    shares: bool  # whether prefill works

    @property
    def device(self) -> torch.device: ...

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, <|bos|> or its like first."""
        ...

    def prefill(self, ids: Tensor, lengths: Tensor | None, max_len: int) -> Any:
        """Read right-padded ids (B, T) -> a state that `select(rows)` copies and `score` goes on from."""
        ...

    def score(
        self, ids: Tensor, rows: Tensor, cols: Tensor, targets: Tensor, state: Any, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """ids: (B, T), right-padded; rows, cols, targets: (n,) -> (nats of the target after ids[row, col] (n,), whether
        it was the likeliest (n,))."""
        ...


class GPTScorer:
    """Our own models, any backbone."""

    shares = True

    def __init__(self, model: GPT, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.device, self.max_len = model.device, model.config.seq_len

    def encode(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer.encode(texts, prepend=self.tokenizer.bos_id)

    def prefill(self, ids: Tensor, lengths: Tensor | None, max_len: int) -> Any:
        state = self.model.init_state(len(ids), max_len)
        self.model.hidden(ids, state=state, lengths=lengths)
        return state

    def score(
        self, ids: Tensor, rows: Tensor, cols: Tensor, targets: Tensor, state: Any, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x = self.model.hidden(ids, state=state, lengths=lengths)[rows, cols]  # (n, D)
        parts = []
        for xc, yc in zip(x.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True):
            parts.append(judge_logits(cap_logits(self.model.head(xc).float(), self.model.config.softcap), yc))
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def judge_logits(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(n, V) float32, (n,) -> (nats of the target (n,), whether it is the argmax (n,))."""
    return F.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets


def score_rows(scorer: Scorer, rows: list[tuple[list[int], int]], state: Any = None) -> tuple[list[float], list[bool]]:
    """rows: (ids, where the continuation starts, >= 1) -> (mean nats of each, whether all its ids were likeliest).

    With a state, ids continue its rows.
    """
    counts = torch.tensor([len(ids) - start for ids, start in rows])
    index = torch.arange(len(rows)).repeat_interleave(counts)
    cols = torch.cat([torch.arange(start - 1, len(ids) - 1) for ids, start in rows])
    targets = torch.tensor([t for ids, start in rows for t in ids[start:]])
    x, lengths = _pad([ids[:-1] for ids, _ in rows])
    if state is None:
        lengths = None  # what stands right of a row changes nothing in it
    on_device = [t.to(scorer.device) for t in (x, index, cols, targets)]
    nats, hit = scorer.score(*on_device, state=state, lengths=lengths)
    if not nats.isfinite().all():
        raise UserError("the model gives a loss that is no finite number: evaluate an earlier step, or with float32")
    means = torch.zeros(len(rows), dtype=torch.float64).index_add_(0, index, nats.cpu().double()) / counts
    misses = torch.zeros(len(rows), dtype=torch.long).index_add_(0, index, (~hit).cpu().long())
    return means.tolist(), (misses == 0).tolist()


def _pad(rows: list[list[int]]) -> tuple[Tensor, Tensor | None]:
    """-> ids (B, T), right-padded with 0, and lengths (B,), None where all are alike."""
    width = max(map(len, rows))
    lengths = torch.tensor([len(r) for r in rows]) if any(len(r) < width for r in rows) else None
    return torch.tensor([r + [0] * (width - len(r)) for r in rows]), lengths


def answer_batch(scorer: Scorer, questions: list[Question]) -> list[bool]:
    """Which of the questions are answered rightly. What the options share is read once, then its state is copied."""
    shared = [q.shared if scorer.shares else 0 for q in questions]
    if min(shared) == 0:
        shared = [0] * len(questions)
    rows = [
        (ids[c:], start - c)
        for q, c in zip(questions, shared, strict=True)
        for ids, start in zip(q.rows, q.starts, strict=True)
    ]
    state = None
    if max(shared) > 0:
        ids, lengths = _pad([q.rows[0][:c] for q, c in zip(questions, shared, strict=True)])
        state = scorer.prefill(ids.to(scorer.device), lengths, max(shared) + max(len(ids) for ids, _ in rows))
        counts = torch.tensor([len(q.rows) for q in questions])
        state = state.select(torch.arange(len(questions)).repeat_interleave(counts))
    losses, hits = score_rows(scorer, rows, state)
    right, r = [], 0
    for q in questions:
        own = losses[r : r + len(q.rows)]
        right.append(hits[r] if q.gold < 0 else own.index(min(own)) == q.gold)
        r += len(q.rows)
    return right


def batches(questions: list[Question], budget: int) -> Iterator[list[Question]]:
    """Questions of like length together, the longest first; at most `budget` tokens with padding, or one question."""
    batch: list[Question] = []
    n_rows = 0
    for q in sorted(questions, key=lambda q: -q.longest):
        if batch and (n_rows + len(q.rows)) * batch[0].longest > budget:
            yield batch
            batch, n_rows = [], 0
        batch.append(q)
        n_rows += len(q.rows)
    if batch:
        yield batch


@torch.no_grad()
def evaluate_task(
    scorer: Scorer,
    task: CoreTask,
    items: list[dict[str, Any]],
    max_questions: int = -1,
    batch_tokens: int = 32768,
    ranks: Ranks | None = None,
) -> TaskScore:
    """The first max_questions (-1 = all) of items. Every rank takes its share, and all get the same score."""
    ranks = ranks or Ranks()
    n = len(items) if max_questions < 1 else min(max_questions, len(items))
    mine = range(ranks.rank, n, ranks.world_size)
    correct = cropped = 0
    for block in (mine[i : i + BLOCK] for i in range(0, len(mine), BLOCK)):
        texts = [prompts(task, items, i) for i in block]
        ids = iter(scorer.encode([t for group in texts for t in group]))
        questions = [
            make_question(task, items[i], [next(ids) for _ in group], scorer.max_len)
            for i, group in zip(block, texts, strict=True)
        ]
        cropped += sum(q.cropped for q in questions)
        correct += sum(sum(answer_batch(scorer, batch)) for batch in batches(questions, batch_tokens))
    counts = all_reduce_sum(torch.tensor([correct, cropped], device=scorer.device))
    return TaskScore(task, int(counts[0]), n, int(counts[1]))


def shared_core_folder(ranks: Ranks, device: torch.device) -> Path:
    """core_folder(), for all ranks together: rank 0 downloads the bundle if need be, and the others wait.

    Where it cannot, all end: the others would wait in vain."""
    error = None
    if ranks.main:
        try:
            core_folder()
        except Exception as e:
            error = e
    if all_reduce_sum(torch.tensor(float(error is not None), device=device)) > 0:
        raise error or UserError(f"rank {ranks.rank} has no CORE bundle: rank 0 says why it could not get it")
    return core_folder()


def evaluate_core(
    scorer: Scorer,
    folder: Path,
    tasks: Sequence[CoreTask],
    max_questions: int = -1,
    batch_tokens: int = 32768,
    ranks: Ranks | None = None,
    tell: Callable[[TaskScore], None] = lambda score: None,
) -> list[TaskScore]:
    """Scores of those tasks whose file is in the folder; `tell` hears of each as it is done. UserError if none is."""
    files = [(task, path) for task in tasks if (path := task_file(folder, task)) is not None]
    if not files:
        raise UserError(f"{folder} has no file of {', '.join(t.label for t in tasks)}: put the CORE bundle there")
    scores = []
    for task, path in files:
        scores.append(evaluate_task(scorer, task, read_items(path, task), max_questions, batch_tokens, ranks))
        tell(scores[-1])
    return scores
