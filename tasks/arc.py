"""ARC, science questions of school exams (arXiv 1803.05457), and MC-Train: the training questions of four such sets.

MC-Train is ARC-Easy, ARC-Challenge, OpenBookQA (1809.02789) and CommonsenseQA (1811.00937): to train on choices.
"""

from typing import Any, Literal

from tasks.common import ChoiceTask, RowTask, choice_conversation
from tasks.data import Source, split_rows

HUB = "allenai/ai2_arc"
TRAIN_FILE = "sft/mc_train_arc_obqa_csqa.jsonl.gz"  # four sets in one file, told apart by "source"


class ARC(RowTask, ChoiceTask):
    def __init__(self, subset: Literal["ARC-Easy", "ARC-Challenge"], split: str, **span: Any):
        self.name = subset
        mine = subset.lower().replace("-", "_")
        sources = {
            s: Source(local, HUB, (f"{subset}/{s}-00000-of-00001.parquet",))
            for s, local in (("train", TRAIN_FILE), ("test", f"eval_core/world_knowledge/{mine}.jsonl.gz"))
        }
        rows = split_rows(subset, split, sources, question)
        super().__init__([r for r in rows if r.get("source", mine) == mine], **span)

    def conversation(self, row: Any) -> dict[str, Any]:
        return choice_conversation(question(row), *choices(row))


class MCTrain(RowTask, ChoiceTask):
    name = "MC-Train"

    def __init__(self, split: str, **span: Any):
        super().__init__(split_rows(self.name, split, {"train": Source(TRAIN_FILE)}, question), **span)
        self.baseline = sum(1 / len(row["choices"]) for row in self.rows) / len(self.rows)

    def conversation(self, row: Any) -> dict[str, Any]:
        return choice_conversation(question(row), *choices(row))


def question(row: dict[str, Any]) -> str:
    """The test files of the data folder are CORE's, which put a word before the question."""
    return row["question"] if "question" in row else row["query"].removeprefix("Question: ")


def choices(row: dict[str, Any]) -> tuple[list[str], int]:
    """-> (texts, place of the right one), from a row of the hub or of the data folder.

    The hub's labels are letters or digits; ours are always letters, by place.
    """
    if isinstance(row["choices"], dict):
        return row["choices"]["text"], row["choices"]["label"].index(row["answerKey"])
    return row["choices"], row["gold"]
