"""What a task is: conversations in a fixed order, and for most of them whether a completion is right.

    task = GSM8K("test", stop=100)
    conversation = task[0]                          # {"messages": [...]}, what tokenizer.render_conversation takes
    task.evaluate(conversation, " ... #### 72")     # text after <|assistant_start|> -> bool

Kinds: "categorical" (the answer is one of conversation["letters"]; compare the logits of these letters), "generative"
(sample, then evaluate the text), "conversation" (to train on; nothing to evaluate).
"""

import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, Literal

from nanochat.config import UserError
from nanochat.world_names import Dice

Split = Literal["train", "val", "test"]
Kind = Literal["categorical", "generative", "conversation"]
LETTERS = "ABCDEFGHIJ"
SHUFFLE_SEED = 42
SPLITS: tuple[Split, ...] = ("train", "val", "test")


class Task:
    """A subclass sets name and kind and defines size() and example(i); slicing is done here.

    start, stop, step choose examples as range(start, stop, step) does. baseline: accuracy of guessing.
    """

    name: str = ""
    kind: Kind = "conversation"
    baseline: float = 0.0

    def __init__(self, start: int = 0, stop: int | None = None, step: int = 1):
        if start < 0 or step < 1 or (stop is not None and stop < start):
            raise UserError(f"start={start}, stop={stop}, step={step}: expected 0 <= start <= stop and step >= 1")
        self.start, self.stop, self.step = start, stop, step

    def size(self) -> int:
        """Examples before slicing."""
        raise NotImplementedError

    def example(self, i: int) -> dict[str, Any]:
        """Conversation i of all size() of them, a fresh dict; a function of i alone."""
        raise NotImplementedError

    def span(self) -> range:
        size = self.size()
        return range(self.start, size if self.stop is None else min(self.stop, size), self.step)

    def __len__(self) -> int:
        return len(self.span())

    def __getitem__(self, i: int) -> dict[str, Any]:
        """IndexError outside 0 .. len - 1."""
        if i < 0:
            raise IndexError(f"{self.name}[{i}]: expected 0 .. {len(self) - 1}")
        return self.example(self.span()[i])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def evaluate(self, conversation: dict[str, Any], completion: str) -> bool:
        """Whether `completion` (text after <|assistant_start|>) answers the conversation's last user message."""
        raise UserError(f"{self.name} is to train on, it has no right answers: evaluate another task")

    def reward(self, conversation: dict[str, Any], completion: str) -> float:
        """For reinforcement learning: 1 or 0 unless the task says otherwise."""
        return float(self.evaluate(conversation, completion))


class ChoiceTask(Task):
    """Multiple choice: the last message is the letter."""

    kind: Kind = "categorical"
    baseline: float = 0.25

    def evaluate(self, conversation: dict[str, Any], completion: str) -> bool:
        return completion.strip() == conversation["messages"][-1]["content"]


class RowTask(Task):
    """A task over rows of data, in an order shuffled once, so that a slice is a fair sample (MMLU comes by subject)."""

    def __init__(self, rows: Sequence[Any], start: int = 0, stop: int | None = None, step: int = 1):
        super().__init__(start, stop, step)
        self.rows = rows
        self.order = Dice(SHUFFLE_SEED).shuffled(range(len(rows)))

    def size(self) -> int:
        return len(self.rows)

    def example(self, i: int) -> dict[str, Any]:
        return self.conversation(self.rows[self.order[i]])

    def conversation(self, row: Any) -> dict[str, Any]:
        """One row as a conversation."""
        raise NotImplementedError


class TaskMixture(Task):
    """All examples of all tasks in one shuffled order. A task listed twice is oversampled.

    A conversation keeps the place of its task under "task", so that it is judged by its own.
    """

    name = "mixture"

    def __init__(self, tasks: Sequence[Task], start: int = 0, stop: int | None = None, step: int = 1):
        super().__init__(start, stop, step)
        self.tasks = list(tasks)
        places = [(t, i) for t, task in enumerate(self.tasks) for i in range(len(task))]
        self.places: list[tuple[int, int]] = Dice(SHUFFLE_SEED).shuffled(places)

    def size(self) -> int:
        return len(self.places)

    def example(self, i: int) -> dict[str, Any]:
        task, j = self.places[i]
        return {**self.tasks[task][j], "task": task}

    def evaluate(self, conversation: dict[str, Any], completion: str) -> bool:
        return self.tasks[conversation["task"]].evaluate(conversation, completion)

    def reward(self, conversation: dict[str, Any], completion: str) -> float:
        return self.tasks[conversation["task"]].reward(conversation, completion)


class TaskSequence(Task):
    """One task after the other: a curriculum, where the reader goes through it in order."""

    name = "sequence"

    def __init__(self, tasks: Sequence[Task], start: int = 0, stop: int | None = None, step: int = 1):
        super().__init__(start, stop, step)
        self.tasks = list(tasks)
        self.starts = [0, *accumulate(len(t) for t in self.tasks)]  # of each task, and the end

    def size(self) -> int:
        return self.starts[-1]

    def example(self, i: int) -> dict[str, Any]:
        task = bisect_right(self.starts, i) - 1
        return self.tasks[task][i - self.starts[task]]


def render_mc(question: str, letters: Sequence[str], choices: Sequence[str]) -> str:
    """A multiple-choice question in nanochat's form, which its published numbers rest on.

    The letter stands after the choice and directly behind "=", so that it is the same token as in the answer.
    """
    lines = "".join(f"- {choice}={letter}\n" for letter, choice in zip(letters, choices, strict=True))
    return f"Multiple Choice question: {question}\n{lines}\nRespond only with the letter of the correct answer."


def choice_conversation(question: str, choices: Sequence[str], gold: int) -> dict[str, Any]:
    """-> a conversation with "letters"; gold is the place of the right choice."""
    letters = list(LETTERS[: len(choices)])
    return {**exchange(render_mc(question, letters, choices), letters[gold]), "letters": letters}


def exchange(question: str, answer: str | list[dict[str, Any]]) -> dict[str, Any]:
    """One user message and its answer as a conversation."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def text(part: str) -> dict[str, Any]:
    return {"type": "text", "text": part}


def tool_call(expression: str, result: str) -> list[dict[str, Any]]:
    """The two parts of a call of the calculator."""
    return [{"type": "python", "text": expression}, {"type": "python_output", "text": result}]


def plain(content: str | list[dict[str, Any]]) -> str:
    """A message's content as the text a model would have written, tool calls included."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def split_of(key: str) -> Split:
    """The one split a problem may be in, by its checksum: train and test share none, whatever is drawn."""
    tenth = zlib.crc32(key.encode()) % 10
    return "train" if tenth < 8 else "val" if tenth == 8 else "test"


def check_split(name: str, split: str) -> None:
    if split not in SPLITS:
        raise UserError(f"{name}: split {split!r}: expected one of {', '.join(SPLITS)}")
