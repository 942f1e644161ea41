"""Which tasks each stage trains on and is judged by, by name.

    mid_mixture("train")                                        # the embedded tasks: no files needed
    mid_mixture("train", ["SmolTalk", "MMLU", "GSM8K", "GSM8K", "mine.jsonl"])
    sft_mixture("val", ["embedded", "Dolly-OpenQA:1000"])

A name is one of TASKS, or of MIXTURES, which stands for several, or a .jsonl file of conversations. NAME:N is its first
N examples; a name given twice is seen twice as often. A set that is not on the machine is an error, never left out.
"""

import difflib
import math
from collections.abc import Callable, Sequence
from functools import partial

from nanochat.config import UserError
from tasks.arc import ARC, MCTrain
from tasks.common import Task, TaskMixture
from tasks.conversations import SETS, Conversations
from tasks.customjson import CustomJSON
from tasks.embedded import Arithmetic, Identity
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import SimpleSpelling, SpellingBee
from tasks.world_questions import WorldChoice, WorldQA

Constructor = Callable[..., Task]  # (split, start=, stop=, step=)

TASKS: dict[str, Constructor] = {
    "ARC-Easy": partial(ARC, "ARC-Easy"),
    "ARC-Challenge": partial(ARC, "ARC-Challenge"),
    "MMLU": MMLU,
    "GSM8K": GSM8K,
    "HumanEval": HumanEval,
    "SmolTalk": SmolTalk,
    "MC-Train": MCTrain,
    "Arithmetic": Arithmetic,
    "Spelling": SimpleSpelling,
    "SpellingBee": SpellingBee,
    "SpellingEnglish": partial(SimpleSpelling, words="english", train_size=200_000, name="SpellingEnglish"),
    "SpellingBeeEnglish": partial(SpellingBee, words="english", train_size=80_000, name="SpellingBeeEnglish"),
    "WorldChoice": WorldChoice,
    "WorldQA": WorldQA,
    "Identity": Identity,
    **{name: partial(Conversations, name) for name in SETS},
}
MIXTURES: dict[str, list[str]] = {
    "embedded": ["Arithmetic", "Spelling", "SpellingBee", "WorldChoice", "WorldQA", "Identity"],
    # nanochat's mid-training and SFT sets, with the embedded identity in place of its file
    "nanochat-mid": ["SmolTalk", "MMLU", "GSM8K", "Identity", "SpellingEnglish", "SpellingBeeEnglish"],
    "nanochat-sft": [
        "ARC-Easy", "ARC-Challenge", "GSM8K", "SmolTalk:10000", "Identity", "SpellingEnglish:300",
        "SpellingBeeEnglish:300",
    ],
}  # fmt: skip
DEFAULT = ["embedded"]


def mid_mixture(split: str, tasks: Sequence[str] | None = None) -> TaskMixture:
    """What mid_train sees. None: the embedded tasks."""
    return mixture(split, DEFAULT if tasks is None else tasks)


def sft_mixture(split: str, tasks: Sequence[str] | None = None) -> TaskMixture:
    """What chat_sft sees. None: the embedded tasks."""
    return mixture(split, DEFAULT if tasks is None else tasks)


def with_chat(task: Task, split: str, names: Sequence[str], share: float) -> Task:
    """The task among as many plain conversations as make up `share` of all, repeated where there are too few."""
    n = round(len(task) * share / (1 - share))
    if not n:
        return task
    chat = sft_mixture(split, names)
    return TaskMixture([task, TaskMixture(chat.tasks * math.ceil(n / len(chat)), stop=n)])


def mixture(split: str, names: Sequence[str]) -> TaskMixture:
    names = [part for name in names for part in MIXTURES.get(name, [name])]
    if not names:
        raise UserError("no tasks given: --tasks=NAME,NAME")
    tasks = [make_task(name, split) for name in names]
    if not any(len(task) for task in tasks):
        raise UserError(f"{', '.join(names)}: no conversations for {split}")
    return TaskMixture(tasks)


def rl_task(names: str, split: str) -> Task:
    """What completions are rewarded for: one generative task, or several in a mixture ("Arithmetic,Spelling")."""
    tasks = [make_task(name, split) for name in names.split(",")]
    for task in tasks:
        if task.kind != "generative":
            raise UserError(
                f"{task.name} is {task.kind}: reinforcement learning samples text, so it needs a generative task"
            )
    return tasks[0] if len(tasks) == 1 else TaskMixture(tasks)


def eval_task(name: str) -> Task:
    """The test split of a task that has right answers."""
    task = make_task(name, "test")
    if task.kind == "conversation":
        raise UserError(f"{name} is to train on, it has no right answers: evaluate another task")
    return task


def make_task(name: str, split: str) -> Task:
    """One task by name, NAME:N or file."""
    base, colon, count = name.rpartition(":")
    stop = None
    if colon and count.isdecimal():
        name, stop = base, int(count)
    if name.endswith((".jsonl", ".jsonl.gz")):
        return CustomJSON(name, split, stop=stop)
    if name not in TASKS:
        near = difflib.get_close_matches(name, [*TASKS, *MIXTURES], n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"unknown task {name!r}: {hint}There are {', '.join([*TASKS, *MIXTURES])}, and .jsonl files")
    return TASKS[name](split, stop=stop)
