"""MMLU: four-way questions in 57 subjects (arXiv 2009.03300). "train" is its auxiliary_train, on the hub only."""

from typing import Any

from tasks.common import ChoiceTask, RowTask, choice_conversation
from tasks.data import Source, split_rows

HUB = "cais/mmlu"
FILES = {"train": "auxiliary_train", "val": "validation", "test": "test"}
LOCAL = {"train": "", "val": "eval/mmlu_val.jsonl.gz", "test": "eval/mmlu_test_dev.jsonl.gz"}  # test: half of it


class MMLU(RowTask, ChoiceTask):
    name = "MMLU"

    def __init__(self, split: str, **span: Any):
        sources = {s: Source(LOCAL[s], HUB, (f"all/{FILES[s]}-00000-of-00001.parquet",)) for s in FILES}
        super().__init__(split_rows(self.name, split, sources, lambda row: row["question"]), **span)

    def conversation(self, row: Any) -> dict[str, Any]:
        return {**choice_conversation(row["question"], row["choices"], row["answer"]), "subject": row["subject"]}
