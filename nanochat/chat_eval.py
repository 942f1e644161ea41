"""How often a chat model is right: multiple choice by the logits of the letters, all else by what it writes.

    score = evaluate(model, tokenizer, task, max_new_tokens=128)      # task: a Task of tasks/common.py
    print(score.value, score.stderr, score.n)
    value, stderr = chat_core([score, ...])       # mean over tasks of (value - baseline) / (1 - baseline), as nanochat

A multiple-choice question is one forward: of its letters the likeliest after <|assistant_start|> is the answer. Every
other question is answered num_samples times and the task judges the texts; its score is pass@1, the mean over all
answers, and pass@k comes from the unbiased estimator of Chen et al. (arXiv 2107.03374, equation 1). A question that
does not fit the model's context counts as wrong, and is counted.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from nanochat.config import UserError
from nanochat.device import shared_out
from nanochat.engine import Engine

CHATCORE_TASKS = ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBeeEnglish")
JUDGES = 2  # threads that ask the task: HumanEval's tests are processes, and more at once would run out of time


class ChatTask(Protocol):
    """What is asked of a task; tasks/common.py has the class."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str: ...

    @property
    def baseline(self) -> float: ...

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> dict[str, Any]: ...

    def evaluate(self, conversation: dict[str, Any], completion: str) -> bool: ...


@dataclass(frozen=True)
class Answer:
    """What a model made of question `index` of a task: its texts (or letter), and which are right.

    Of a question that does not fit the context there are no texts, and correct is [False].
    """

    index: int
    completions: list[str]
    correct: list[bool]


@dataclass(frozen=True)
class Score:
    """What came of one task. value: share of right answers; stderr: over the choice of the n questions.

    pass_at: k -> (pass@k, its standard error), from k = 2 on. too_long: questions that do not fit the context.
    """

    name: str
    value: float
    stderr: float
    n: int
    baseline: float = 0.0
    too_long: int = 0
    pass_at: dict[int, tuple[float, float]] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list, repr=False)

    @property
    def centred(self) -> float:
        """0 for guessing, 1 for all right."""
        return (self.value - self.baseline) / (1 - self.baseline)

    @property
    def centred_stderr(self) -> float:
        return self.stderr / (1 - self.baseline)


def evaluate(
    model: Any,
    tokenizer: Any,
    task: ChatTask,
    *,
    max_problems: int = -1,
    batch_size: int = 32,
    num_samples: int = 1,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_k: int | None = 50,
    seed: int = 42,
    tell: Callable[[int, int], None] = lambda done, n: None,
) -> Score:
    """The first max_problems questions (-1 = all; tasks come shuffled). Ranks share them, all get the score.

    batch_size questions of like length run together. max_new_tokens, temperature, top_k and num_samples are for texts
    only; above temperature 0 what is sampled depends on seed, batch_size and the number of ranks. `tell` hears after
    each batch how many of this rank's questions are done.
    """
    n = len(task) if max_problems < 0 else min(max_problems, len(task))
    if n < 1 or batch_size < 1:
        raise UserError(f"{task.name}: {n} questions in batches of {batch_size}: expected at least 1 of each")
    engine = Engine(model, tokenizer)
    sampling = {"num_samples": num_samples, "max_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k}

    def work(mine: list[int]) -> list[Answer]:
        prompts = {i: tokenizer.render_for_completion(task[i]) for i in mine}
        answers = {i: Answer(i, [], [False]) for i in mine if len(prompts[i]) >= model.config.seq_len}
        for batch in batches(prompts, model.config.seq_len, batch_size):
            questions, ids = [task[i] for i in batch], [prompts[i] for i in batch]
            if task.kind == "categorical":
                completions = [[letter] for letter in choose_letters(model, tokenizer, questions, ids)]
            else:
                completions = write(engine, ids, seed=(seed << 32) + batch[0], **sampling)
            judged = judge(task, questions, completions)
            answers |= dict(zip(batch, map(Answer, batch, completions, judged), strict=True))
            tell(len(answers), len(mine))
        return [answers[i] for i in mine]

    return score_of(task, shared_out(range(n), work))


def batches(prompts: dict[int, list[int]], seq_len: int, batch_size: int) -> Iterator[list[int]]:
    """Numbers of the questions that leave room for an answer, those of like length together, the longest first."""
    fitting = sorted((i for i in prompts if len(prompts[i]) < seq_len), key=lambda i: -len(prompts[i]))
    for start in range(0, len(fitting), batch_size):
        yield fitting[start : start + batch_size]


@torch.inference_mode()
def choose_letters(model: Any, tokenizer: Any, questions: list[dict[str, Any]], ids: list[list[int]]) -> list[str]:
    """The likeliest of each question's own letters after its prompt; of equals the first."""
    lengths = torch.tensor([len(row) for row in ids])
    width = int(lengths.max())
    x = torch.tensor([row + [0] * (width - len(row)) for row in ids], device=model.device)  # (B, T)
    logits = model(x, lengths=lengths, last_only=True)[:, 0].cpu()  # (B, V)
    chosen = []
    for question, row in zip(questions, logits, strict=True):
        own = row[[letter_id(tokenizer, letter) for letter in question["letters"]]]
        if not own.isfinite().all():
            raise UserError("the model's logits are no finite numbers: evaluate an earlier step, or -d float32")
        chosen.append(question["letters"][int(own.argmax())])
    return chosen


def letter_id(tokenizer: Any, letter: str) -> int:
    ids = tokenizer.encode(letter)
    assert len(ids) == 1, f"{letter!r} is {len(ids)} tokens: the letters of a choice are single bytes"
    return ids[0]


def write(engine: Engine, ids: list[list[int]], num_samples: int, **options: Any) -> list[list[str]]:
    """num_samples texts for each prompt, what tools answered included."""
    rows, _ = engine.generate_batch(ids, num_samples, **options)
    texts = [engine.tokenizer.decode(row[len(ids[r // num_samples]) :], errors="replace") for r, row in enumerate(rows)]
    return [texts[i : i + num_samples] for i in range(0, len(texts), num_samples)]


def judge(task: ChatTask, questions: list[dict[str, Any]], completions: list[list[str]]) -> list[list[bool]]:
    """Which texts are right. JUDGES at a time: to judge a program is to run it (nanochat/execution.py)."""
    pairs = [(question, text) for question, texts in zip(questions, completions, strict=True) for text in texts]
    with ThreadPoolExecutor(JUDGES) as pool:
        right = pool.map(lambda pair: bool(task.evaluate(*pair)), pairs)
        return [[next(right) for _ in texts] for texts in completions]


# ---- from answers to figures ----


def score_of(task: ChatTask, answers: list[Answer]) -> Score:
    n_samples = max(len(a.correct) for a in answers)
    ks = [2**i for i in range(1, n_samples.bit_length()) if 2**i < n_samples] + [n_samples] * (n_samples > 1)
    counts = [(len(a.correct), sum(a.correct)) for a in answers]
    value, stderr = mean_and_stderr([right / n for n, right in counts])
    pass_at = {k: mean_and_stderr([pass_at_k(n, c, k) if c else 0.0 for n, c in counts]) for k in ks}
    too_long = sum(not a.completions for a in answers)
    return Score(task.name, value, stderr, len(answers), task.baseline, too_long, pass_at, answers)


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float]:
    """The standard error is the root of variance / n: of zeros and ones that of a binomial, sqrt(p (1 - p) / n)."""
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values)) / len(values)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k of n answers, drawn without replacement, hold one of the c right ones."""
    assert 0 <= c <= n and 1 <= k <= n
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def chat_core(scores: Sequence[Score]) -> tuple[float, float]:
    """-> (mean of the centred scores, its standard error over the choice of questions)."""
    value = sum(s.centred for s in scores) / len(scores)
    return value, math.sqrt(sum(s.centred_stderr**2 for s in scores)) / len(scores)


def chat_core_name(names: Sequence[str]) -> str:
    """ChatCORE for all six tasks; a mean of others says of which."""
    return "ChatCORE" if set(names) == set(CHATCORE_TASKS) else f"ChatCORE ({', '.join(names)})"
