"""Conversations as token ids with a loss mask: nanochat's chat format, plus retrieval parts.

    {"messages": [{"role": "system" | "user" | "assistant", "content": str | [part, ...]}]}

The system text joins the first user message; user and assistant then alternate. Parts, and whether they are trained on:

    user (all 0)  {"type": "text", "text": str}, {"type": "docs", "documents": [document, ...]}
    assistant, 1  text, python, search, each with "text": str; {"type": "cite", "n": 1}; {"type": "abstain"}
    assistant, 0  {"type": "python_output", "text": str}, {"type": "info", "documents": [document, ...]}

A document is a str or {"text": str, "title": str?, "id": any?}. It is rendered as <|doc|> and "[n] title", newline,
text, " [n]", where n counts the documents of the conversation from 1: that is the number a `cite` part names. At the
end it stands once more because only there has a model read what it is the number of (LOG 2026-11-22). "docs" and "info"
may carry "text" in place of "documents" (a tool that found nothing). All text is encoded as ordinary text: a document
that spells a special token does not become one.

With max_tokens a conversation is shortened in this order, and never inside a question, an answer or a tool call:
documents at whole sentences, then whole (oldest turns first, the last of a turn first, cited ones last); then whole
exchanges, the oldest first, while the system text stays. What still does not fit is a UserError.
"""

import difflib
import re
from dataclasses import dataclass, replace
from typing import Any, Protocol

from nanochat.config import UserError


class TextEncoder(Protocol):
    """What rendering needs of a tokenizer."""

    def encode_ordinary(self, text: str) -> list[int]: ...

    def encode_special(self, name: str) -> int: ...


@dataclass(frozen=True)
class Turn:
    index: int  # place in conversation["messages"], for error messages
    role: str
    parts: list[dict[str, Any]]


@dataclass(frozen=True)
class Piece:
    """A run of ids with one mask value. Of a document, `text` may be shortened from `body` on; `tail` stays."""

    ids: list[int]
    mask: int = 0
    turn: int = 0
    text: str | None = None
    body: int = 0
    cited: bool = False
    tail: str = ""


# part type -> (opening token, closing token, mask)
WRAPPED = {
    "python": ("<|python_start|>", "<|python_end|>", 1),
    "python_output": ("<|output_start|>", "<|output_end|>", 0),
    "search": ("<|search_start|>", "<|search_end|>", 1),
    "cite": ("<|cite_start|>", "<|cite_end|>", 1),
    "info": ("<|info_start|>", "<|info_end|>", 0),
    "docs": ("<|info_start|>", "<|info_end|>", 0),
}
PARTS = {
    "system": ("text",),
    "user": ("text", "docs"),
    "assistant": ("text", "python", "python_output", "search", "info", "cite", "abstain"),
}
SENTENCE_END = re.compile(r"[.!?。！？]+[\"'”’)\]]*(?=\s)|(?<=[。！？])|(?=\n)")


def render(tok: TextEncoder, conversation: Any, max_tokens: int | None = None) -> tuple[list[int], list[int]]:
    """-> (ids, mask), both (T,): mask is 1 where the model is trained to predict this id. See the module docstring."""
    system, turns = parse(conversation)
    pieces = _fit(tok, system, turns, max_tokens, reserve=1)
    ids, mask = [tok.encode_special("<|bos|>")], [0]
    for piece in pieces:
        ids += piece.ids
        mask += [piece.mask] * len(piece.ids)
    return ids, mask


def render_prompt(tok: TextEncoder, conversation: Any, max_tokens: int | None = None) -> list[int]:
    """-> ids (T,) ending in <|assistant_start|>, for the model to go on. A last assistant message is left out."""
    system, turns = parse(conversation)
    if turns[-1].role == "assistant":
        turns = turns[:-1]
    pieces = _fit(tok, system, turns, max_tokens, reserve=2)
    ids = [i for piece in pieces for i in piece.ids]
    return [tok.encode_special("<|bos|>"), *ids, tok.encode_special("<|assistant_start|>")]


def render_documents(
    tok: TextEncoder, documents: list[Any], first: int = 1, max_tokens: int | None = None
) -> list[int]:
    """-> ids of the documents numbered from `first`, without the <|info_start|> <|info_end|> around them.

    More than max_tokens: the last ones are shortened at whole sentences, then left out.
    """
    pieces = [
        _document(tok, d, n, turn=0, cited=False) for n, d in enumerate(_documents(documents, "documents"), first)
    ]
    if max_tokens is not None:
        pieces = _shorten_documents(tok, pieces, max_tokens)
    return [i for piece in pieces for i in piece.ids]


def parse(conversation: Any) -> tuple[str, list[Turn]]:
    """-> (system text, turns). UserError naming the message where the conversation is not as it should be."""
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, list):
        raise UserError('a conversation is {"messages": [...]}, not ' + _short(conversation))
    turns = [_turn(i, message) for i, message in enumerate(messages)]
    system = ""
    if turns and turns[0].role == "system":
        system = "".join(p["text"] for p in turns.pop(0).parts)
    if not turns:
        raise UserError('the conversation has no user message: add {"role": "user", "content": ...}')
    for k, turn in enumerate(turns):
        expected = ("user", "assistant")[k % 2]
        if turn.role != expected:
            after = f"after {turns[k - 1].role!r}" if k else "first (after an optional system message)"
            cure = "only messages[0] may be a system message" if turn.role == "system" else "merge or reorder messages"
            raise UserError(f"messages[{turn.index}] has role {turn.role!r}, expected {expected!r} {after}: {cure}")
    return system, turns


def _turn(index: int, message: Any) -> Turn:
    where = f"messages[{index}]"
    if not isinstance(message, dict) or "content" not in message:
        raise UserError(f'{where} is {_short(message)}, expected {{"role": ..., "content": ...}}')
    role, content = message.get("role"), message["content"]
    if role not in PARTS:
        raise UserError(f"{where} has role {role!r}, expected one of {', '.join(PARTS)}")
    if isinstance(content, str):
        return Turn(index, role, [{"type": "text", "text": content}])
    if not isinstance(content, list):
        raise UserError(f"{where} content is {_short(content)}, expected a string or a list of parts")
    return Turn(index, role, [_part(f"{where} part {k}", role, part) for k, part in enumerate(content)])


def _part(where: str, role: str, part: Any) -> dict[str, Any]:
    """Check one part of a list content; documents come out as {"title", "text"}."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in PARTS[role]:
        near = difflib.get_close_matches(str(kind), PARTS[role], n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise UserError(
            f"{where} of a {role} turn is {_short(part)}: type must be one of {', '.join(PARTS[role])}{hint}"
        )
    if kind == "abstain":
        return {"type": kind}
    if kind == "cite":
        n = part.get("n")
        if type(n) is not int or n < 1:
            raise UserError(
                f'{where} (cite) has n={n!r}, expected the number of a document: {{"type": "cite", "n": 1}}'
            )
        return {"type": kind, "text": str(n), "n": n}
    if kind in ("docs", "info") and "text" not in part:
        return {"type": kind, "documents": _documents(part.get("documents"), f"{where} ({kind})")}
    if not isinstance(part.get("text"), str):
        raise UserError(f'{where} ({kind}) has no text: expected {{"type": "{kind}", "text": "..."}}')
    return {"type": kind, "text": part["text"]}


def _documents(documents: Any, where: str) -> list[dict[str, str]]:
    if not isinstance(documents, list):
        raise UserError(f'{where} has no list of documents: expected "documents": [{{"title": ..., "text": ...}}]')
    clean = []
    for k, d in enumerate(documents):
        d = {"text": d} if isinstance(d, str) else d
        title = (d.get("title") or "") if isinstance(d, dict) else None
        if not isinstance(title, str) or not isinstance(d.get("text"), str):
            raise UserError(f'{where} documents[{k}] is {_short(d)}, expected {{"title": str (optional), "text": str}}')
        clean.append({"title": title, "text": d["text"]})
    return clean


def _fit(tok: TextEncoder, system: str, turns: list[Turn], max_tokens: int | None, reserve: int) -> list[Piece]:
    """The pieces of all turns, or of as much of the conversation as max_tokens - reserve ids hold."""
    cited = {part["n"] for turn in turns for part in turn.parts if part["type"] == "cite"}
    numbers, n = [], 1  # number of each turn's first document: dropping turns must not renumber the rest
    for turn in turns:
        numbers.append(n)
        n += sum(len(part.get("documents", ())) for part in turn.parts)
    rendered = [_turn_pieces(tok, turn, number, cited) for turn, number in zip(turns, numbers, strict=True)]
    least = 0
    for start in range(0, len(turns), 2):  # user turns
        first = rendered[start]
        if system:
            first = _turn_pieces(tok, _with_system(turns[start], system), numbers[start], cited)
        pieces = [*first, *(p for r in rendered[start + 1 :] for p in r)]
        if max_tokens is None:
            return pieces
        least = reserve + sum(len(p.ids) for p in pieces if p.text is None)
        if least <= max_tokens:
            return _shorten_documents(tok, pieces, max_tokens - reserve)
    last = turns[-1].index
    raise UserError(
        f"the last exchange (messages[{last}]) needs {least} tokens without any document, but max_tokens={max_tokens}: "
        f"raise max_tokens (--max_seq_len) to {least} or shorten the message"
    )


def _with_system(turn: Turn, system: str) -> Turn:
    """The user turn with the system text and a blank line before it."""
    head = turn.parts[0]["text"] if turn.parts and turn.parts[0]["type"] == "text" else None
    rest = turn.parts if head is None else turn.parts[1:]
    return replace(turn, parts=[{"type": "text", "text": f"{system}\n\n{head or ''}"}, *rest])


def _turn_pieces(tok: TextEncoder, turn: Turn, number: int, cited: set[int]) -> list[Piece]:
    """One turn between its role tokens. The role's end token is trained in an assistant turn: it says "I am done"."""
    assistant = turn.role == "assistant"
    pieces = [Piece([tok.encode_special(f"<|{turn.role}_start|>")])]
    for part in turn.parts:
        if part["type"] == "text":
            pieces.append(Piece(tok.encode_ordinary(part["text"]), int(assistant)))
        elif part["type"] == "abstain":
            pieces.append(Piece([tok.encode_special("<|abstain|>")], 1))
        else:
            start, end, mask = WRAPPED[part["type"]]
            pieces.append(Piece([tok.encode_special(start)], mask))
            for document in part.get("documents", ()):
                pieces.append(_document(tok, document, number, turn.index, number in cited))
                number += 1
            pieces.append(Piece([*tok.encode_ordinary(part.get("text", "")), tok.encode_special(end)], mask))
    pieces.append(Piece([tok.encode_special(f"<|{turn.role}_end|>")], int(assistant)))
    return pieces


def plain_text(content: Any) -> str:
    """The texts of a message's content, one that is said again once: a question is repeated behind its documents."""
    if isinstance(content, str):
        return content
    return "".join(dict.fromkeys(part["text"] for part in content if part["type"] == "text"))


def frame(number: int, title: str) -> tuple[str, str]:
    """What stands before the text of a document, and what behind it."""
    return f"[{number}] {title}".rstrip() + "\n", f" [{number}]"


def shown_text(rendered: str, number: int, title: str) -> str:
    """The text of a document, of what was rendered of it behind <|doc|>."""
    head, tail = frame(number, title)
    return rendered[len(head) :].removesuffix(tail)


def _document(tok: TextEncoder, document: dict[str, str], number: int, turn: int, cited: bool) -> Piece:
    head, tail = frame(number, document["title"])
    text = head + document["text"]
    ids = [tok.encode_special("<|doc|>"), *tok.encode_ordinary(text + tail)]
    return Piece(ids, 0, turn, text, len(head), cited, tail)


def _shorten_documents(tok: TextEncoder, pieces: list[Piece], budget: int) -> list[Piece]:
    """Shorten, then drop documents until the pieces hold at most `budget` ids (or no document is left)."""
    over = sum(len(p.ids) for p in pieces) - budget
    documents = [(p.cited, p.turn, -i) for i, p in enumerate(pieces) if p.text is not None]
    pieces = list(pieces)
    for _, _, minus_i in sorted(documents):
        if over <= 0:
            break
        piece = pieces[-minus_i]
        kept = _whole_sentences(tok, piece, len(piece.ids) - over)
        over -= len(piece.ids) - len(kept)
        pieces[-minus_i] = replace(piece, ids=kept)
    return pieces


def _whole_sentences(tok: TextEncoder, piece: Piece, limit: int) -> list[int]:
    """Ids of the document's most leading sentences within `limit` ids; [] where not even one fits."""
    text = piece.text or ""
    ends = [m.end() for m in SENTENCE_END.finditer(text, piece.body) if text[piece.body : m.end()].strip()]
    best: list[int] = []
    low, high = 0, len(ends)  # ends[:low] fits, ends[:high + 1] does not
    while low < high and limit > 1:
        middle = (low + high) // 2
        ids = [piece.ids[0], *tok.encode_ordinary(text[: ends[middle]] + piece.tail)]
        if len(ids) <= limit:
            low, best = middle + 1, ids
        else:
            high = middle
    return best


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
