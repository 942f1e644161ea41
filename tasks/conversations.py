"""Sets of conversations from the data folder's sft/, each under its own name. Sources and licences: its MANIFEST.md."""

from typing import Any

from nanochat.config import UserError
from nanochat.conversation import parse
from tasks.common import RowTask, exchange
from tasks.data import Source, split_rows

# name -> files; a set without a file for "val" holds some rows out
SETS: dict[str, dict[str, str]] = {
    "Dolly-OpenQA": {"train": "dolly_open_qa"},
    "DollyHHRLHF": {"train": "dolly_hhrlhf_small"},
    "FastChatIdentity": {"train": "fastchat_identity"},
    "OASST1": {"train": "oasst1_valid_en"},
    "P3": {"train": "p3_permissive"},
    "Rasbt": {"train": "rasbt_instructions"},
    "SelfInstruct": {"train": "self_instruct_seed"},
    "SGD": {"train": "sgd_train", "val": "sgd_dev"},
}

# what FastChat's identity conversations say about another model -> about this one
OTHERS = {"Vicuna": "nanochat", "Large Model Systems Organization (LMSYS)": "the nanochat project"}


class Conversations(RowTask):
    """One of SETS."""

    def __init__(self, name: str, split: str, **span: Any):
        self.name = name
        sources = {s: Source(f"sft/{file}.jsonl.gz") for s, file in SETS[name].items()}
        super().__init__(split_rows(name, split, sources, str), **span)

    def conversation(self, row: Any) -> dict[str, Any]:
        found = checked(messages(row), self.name)
        return {"messages": [renamed(m) for m in found] if self.name == "FastChatIdentity" else found}


def messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Of a row of conversations, or of an instruction with its first input and output."""
    if "messages" in row:
        return row["messages"]
    instance = row["instances"][0]
    question = f"{row['instruction']}\n\n{instance['input']}" if instance["input"] else row["instruction"]
    return exchange(question, instance["output"])["messages"]


def renamed(message: dict[str, Any]) -> dict[str, Any]:
    """The same words about this model."""
    content = message["content"]
    for other, own in OTHERS.items():
        content = content.replace(other, own)
    return {**message, "content": content}


def checked(messages: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """Copies of the messages. UserError where they are no conversation to train on: it must end in an answer."""
    try:
        _, turns = parse({"messages": messages})
        if turns[-1].role != "assistant" or not messages[-1]["content"]:
            raise UserError(f"messages[{len(messages) - 1}] is no assistant's answer: a conversation must end in one")
    except UserError as e:
        raise UserError(f"{where}: {e}") from e
    return [{"role": m["role"], "content": m["content"]} for m in messages]
