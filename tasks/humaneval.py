"""HumanEval: complete a Python function from its docstring; its unit tests decide (arXiv 2107.03374).

The tests run in nanochat/execution.py's sandbox, in a process of their own.
"""

import re
from typing import Any

from nanochat import execution
from tasks.common import RowTask, exchange
from tasks.data import Source, split_rows

HUB = "openai/openai_humaneval"
SOURCES = {"test": Source("eval/HumanEval.jsonl.gz", HUB, ("openai_humaneval/test-00000-of-00001.parquet",))}
FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL)


class HumanEval(RowTask):
    name = "HumanEval"
    kind = "generative"

    def __init__(self, split: str = "test", **span: Any):
        super().__init__(split_rows(self.name, split, SOURCES, lambda row: row["prompt"]), **span)

    def conversation(self, row: Any) -> dict[str, Any]:
        same = {key: row[key] for key in ("task_id", "prompt", "entry_point", "test")}
        return {**exchange(row["prompt"], row["prompt"] + row["canonical_solution"]), **same}

    def evaluate(self, conversation: dict[str, Any], completion: str) -> bool:
        return bool(completion.strip()) and execution.run_python(program(conversation, completion)).ok


def program(conversation: dict[str, Any], completion: str) -> str:
    """What is run. The prompt comes first (its imports and helpers): the completion goes on with it, or defines anew.

    Of a completion with a fenced block only the first block counts.
    """
    block = FENCE.search(completion)
    code = block[1] if block else completion
    check = f"check({conversation['entry_point']})"
    return "\n".join((conversation["prompt"] + code, conversation["test"], check, ""))
