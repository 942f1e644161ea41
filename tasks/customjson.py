"""Your own conversations: a .jsonl or .jsonl.gz file, one conversation a line.

    {"messages": [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am ..."}]}

or only the list of messages, as nanochat's identity_conversations.jsonl has them. Every line is checked when the file
is opened; nothing is left out.
"""

from pathlib import Path
from typing import Any

from nanochat.config import UserError
from tasks.common import RowTask, check_split
from tasks.conversations import checked
from tasks.data import held_out, numbered_lines


class CustomJSON(RowTask):
    """split "train", "val" or "test": the last two are a twentieth, by checksum, and "train"
    lacks it. None is the whole file."""

    def __init__(self, path: str | Path, split: str | None = None, **span: Any):
        path = Path(path).expanduser()
        self.name = path.name
        rows = [_messages(value, f"{path}:{n}") for n, value in numbered_lines(path)]
        if split is not None:
            check_split(self.name, split)
            rows = held_out(rows, split, str)
        super().__init__(rows, **span)

    def conversation(self, row: Any) -> dict[str, Any]:
        return {"messages": [dict(m) for m in row]}


def _messages(value: Any, where: str) -> list[dict[str, Any]]:
    messages = value.get("messages") if isinstance(value, dict) else value
    if not isinstance(messages, list):
        raise UserError(f'{where}: expected {{"messages": [...]}} or a list of messages, not {str(value)[:60]!r}')
    return checked(messages, where)
