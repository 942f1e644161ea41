"""GSM8K: grade-school word problems with calculator calls (arXiv 2110.14168).

A solution writes a call as <<48/2=24>>, which becomes a python part and its output, and ends in "#### 72".
"""

import re
from typing import Any

from tasks.common import RowTask, exchange, plain, text, tool_call
from tasks.data import Source, split_rows

HUB = "openai/gsm8k"
LOCAL = {"train": "sft/gsm8k_train.jsonl.gz", "test": "eval/gsm8k_test_dev.jsonl.gz"}  # test: half of it
CALL = re.compile(r"<<([^>]*)>>")
ANSWER = re.compile(r"#### (-?[0-9.,]+)")


class GSM8K(RowTask):
    name = "GSM8K"
    kind = "generative"

    def __init__(self, split: str, **span: Any):
        sources = {s: Source(LOCAL[s], HUB, (f"main/{s}-00000-of-00001.parquet",)) for s in LOCAL}
        super().__init__(split_rows(self.name, split, sources, lambda row: row["question"]), **span)

    def conversation(self, row: Any) -> dict[str, Any]:
        return exchange(row["question"], solution_parts(row["answer"]))

    def evaluate(self, conversation: dict[str, Any], completion: str) -> bool:
        return same_answer(conversation, completion)


def solution_parts(answer: str) -> list[dict[str, Any]]:
    """'4/2=<<4/2=2>>2' -> text '4/2=', python '4/2', python_output '2', text '2'."""
    parts = []
    for i, piece in enumerate(CALL.split(answer)):  # odd places are calls
        if i % 2:
            expression, _, result = piece.rpartition("=")
            parts += tool_call(expression, result)
        elif piece:
            parts.append(text(piece))
    return parts


def extract_answer(completion: str) -> str | None:
    """The number after the first "####", without commas; None where there is none."""
    match = ANSWER.search(completion)
    return match[1].replace(",", "") if match else None


def same_answer(conversation: dict[str, Any], completion: str) -> bool:
    """Whether the completion gives the number that ends the conversation's last message."""
    expected = extract_answer(plain(conversation["messages"][-1]["content"]))
    assert expected is not None, conversation
    return extract_answer(completion) == expected
