"""Messages of the API -> prompt ids, with documents from a knowledge base where asked for.

A "tool" message is what came of the function call before it, and joins that assistant turn: the model goes on there.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nanochat import rag
from nanochat.config import UserError
from nanochat.retrieval.document import Hit
from nanochat.serving.functions import FunctionCall, Functions, written

SYSTEM = ("system", "developer")


@dataclass(frozen=True)
class Prompt:
    """ids up to where the answer begins; hits[n - 1] is document [n]."""

    ids: list[int]
    hits: list[Hit] = field(default_factory=list)
    query: str = ""


def content_text(content: Any, where: str) -> str:
    """A string, a list of text parts, or null -> text."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise UserError(f"{where}: content is no string and no list of text parts")
    texts = []
    for part in content:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str) or (isinstance(part, dict) and part.get("type", "text") != "text"):
            raise UserError(f"{where}: this model reads text parts only")
        texts.append(text)
    return "".join(texts)


def conversation(messages: Sequence[dict[str, Any]], functions: Functions | None) -> list[dict[str, Any]]:
    """The API's messages -> nanochat's: one system text, then user and assistant in turn. UserError where they are not
    so, naming the message."""
    system = [functions.text] if functions is not None else []
    turns: list[dict[str, Any]] = []
    for i, message in enumerate(messages):
        where, role = f"messages[{i}]", message.get("role")
        text = content_text(message.get("content"), where)
        if role in SYSTEM and not turns:
            system.append(text)
        elif role in SYSTEM:
            raise UserError(f"{where}: a system message stands before all others")
        elif role in ("tool", "function"):
            result = _result(turns, text, where)
            turns[-1]["content"].append(result)
        elif role == "assistant":
            if not turns or turns[-1]["role"] != "assistant":
                turns.append({"role": "assistant", "content": []})
            elif not _answered(turns[-1]):
                raise UserError(f"{where} follows an assistant message: expected user or tool")
            turns[-1]["content"] += _assistant_parts(message, text, where)
        elif role == "user":
            turns.append({"role": "user", "content": [{"type": "text", "text": text}]})
        else:
            raise UserError(f"{where} has role {role!r}: expected system, user, assistant or tool")
    head = [{"role": "system", "content": "\n\n".join(system)}] if any(system) else []
    return [*head, *turns]


def _answered(turn: dict[str, Any]) -> bool:
    return bool(turn["content"]) and turn["content"][-1]["type"] in ("python_output", "info")


def _result(turns: list[dict[str, Any]], text: str, where: str) -> dict[str, Any]:
    called = turns[-1]["content"] if turns and turns[-1]["role"] == "assistant" else []
    if not any(part["type"] in ("python", "search") for part in called):
        raise UserError(f"{where} answers no function call: expected an assistant message with tool_calls before it")
    last = [part["type"] for part in called if part["type"] in ("python", "search")][-1]
    return {"type": "info" if last == "search" else "python_output", "text": text}


def _assistant_parts(message: dict[str, Any], text: str, where: str) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}] if text else []
    calls = message.get("tool_calls") or []
    for call in calls if isinstance(calls, list) else [None]:
        try:
            function = call["function"]
            name, arguments = function["name"], json.loads(function["arguments"] or "{}")
            if not isinstance(name, str) or not isinstance(arguments, dict):
                raise TypeError
        except (KeyError, TypeError, ValueError, RecursionError):
            raise UserError(f'{where}: a tool call is {{"function": {{"name", "arguments": JSON object}}}}') from None
        kind = "search" if name == "search" else "python"
        whole = name in ("search", "python", "calculator") and len(arguments) == 1
        code = str(next(iter(arguments.values()))) if whole else written(FunctionCall(name, arguments))
        parts.append({"type": kind, "text": code})
    return parts


def chat_prompt(tokenizer: Any, turns: list[dict[str, Any]]) -> Prompt:
    """The prompt of a conversation as `conversation` gives it. Where it ends in a function's result, the answer goes on
    in that turn."""
    if turns and turns[-1]["role"] == "assistant" and _answered(turns[-1]):
        ids, _ = tokenizer.render_conversation({"messages": turns})
        return Prompt(ids[:-1])
    if not turns or turns[-1]["role"] != "user":
        raise UserError("the last message is to be answered: its role must be user or tool")
    return Prompt(tokenizer.render_for_completion({"messages": turns}))


def question_of(turns: Sequence[dict[str, Any]]) -> str:
    """The text to search for: the last message, where it is the user's."""
    last = turns[-1] if turns else {"role": None}
    text = "".join(part["text"] for part in last["content"]) if last["role"] == "user" else ""
    return text.encode("utf-8", "replace").decode()  # it is searched for and told again: no lone surrogates


def sourced_prompt(
    tokenizer: Any, turns: list[dict[str, Any]], hits: Sequence[Hit], budget: int, max_doc_length: int
) -> Prompt:
    """The prompt with documents for its question, as nanochat/rag.py lays it out: at most `budget` ids, or those of the
    question alone, with the system text, where they are more."""
    question = question_of(turns)
    system = turns[0]["content"] if turns[0]["role"] == "system" else ""
    alone = chat_prompt(tokenizer, [*turns[: bool(system)], turns[-1]]).ids
    budget = max(budget, len(alone))
    shown = rag.shortened(tokenizer, hits, max_doc_length)
    n = rag.n_fitting(tokenizer, question, shown, budget, system)
    if system:
        asked = turns[-1]["content"]
        last = {"role": "user", "content": rag.around(asked, shown[:n]) if n else asked}
        ids = tokenizer.render_for_completion({"messages": [*turns[:-1], last]}, max_tokens=budget)
    else:
        ids = rag.prompt_ids(tokenizer, question, shown[:n], budget, turns[:-1])
    return Prompt(ids, list(hits[:n]), question)
