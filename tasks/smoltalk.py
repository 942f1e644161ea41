"""SmolTalk, the small edition: 460 thousand conversations made for small models (arXiv 2502.02737). On the hub only."""

from typing import Any

from tasks.common import RowTask
from tasks.conversations import checked
from tasks.data import Source, split_rows

HUB = "HuggingFaceTB/smol-smoltalk"
SOURCES = {
    "train": Source(hub=HUB, files=tuple(f"data/train-{i:05d}-of-00004.parquet" for i in range(4))),
    "val": Source(hub=HUB, files=("data/test-00000-of-00001.parquet",)),
}


class SmolTalk(RowTask):
    name = "SmolTalk"

    def __init__(self, split: str, **span: Any):
        super().__init__(split_rows(self.name, split, SOURCES, str), **span)

    def conversation(self, row: Any) -> dict[str, Any]:
        return {"messages": checked(row["messages"], HUB)}
