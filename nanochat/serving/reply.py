"""From the ids of an answer to the text a reader sees, as they come.

Calls of tools and what came back are no part of the text; citations stand behind it, as [n]; the token that abstains
becomes words. A stop string ends the text before itself.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from nanochat.conversation import WRAPPED
from nanochat.engine import StreamDecoder

ABSTENTION = "I don't know (not in the documents)."


class Stops:
    """Text up to the first of some strings; what may be the start of one waits."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops, self.held, self.hit = [s for s in stops if s], "", False

    def push(self, text: str) -> str:
        """-> what can be shown now; nothing more once a stop string was hit."""
        if self.hit or not self.stops:
            return "" if self.hit else text
        self.held += text
        found = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            self.hit = True
            shown, self.held = self.held[: min(found)], ""
            return shown
        waits = max(_overlap(self.held, stop) for stop in self.stops)
        shown = self.held[: len(self.held) - waits]
        self.held = self.held[len(shown) :]
        return shown

    def flush(self) -> str:
        shown, self.held = self.held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class Reply:
    """The visible text of one row."""

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.decoder, self.stops = tokenizer, StreamDecoder(tokenizer), Stops(stops)
        self.special = {i: name for name, i in tokenizer.special_ids.items()}
        self.closing = ""  # the special token that ends what is hidden now
        self.inside: list[int] = []
        self.citations: list[int] = []

    @property
    def stopped(self) -> bool:
        return self.stops.hit

    def visible(self, token: int) -> bool:
        """Whether this id, coming next, is text."""
        return not self.closing and token not in self.special

    def push(self, token: int) -> str:
        """-> the text that became whole with this id."""
        name = self.special.get(token)
        if self.closing:
            if name == self.closing:
                self._close()
            else:
                self.inside.append(token)
            return ""
        if name is None:
            return self.stops.push(self.decoder.push(token))
        if name == "<|abstain|>":
            return self.stops.push(ABSTENTION)
        self.closing = CLOSING.get(name, "")
        self.inside = []
        return ""

    def _close(self) -> None:
        if self.closing == "<|cite_end|>":
            said = self.tokenizer.decode(self.inside, errors="replace").strip()
            if said.isascii() and said.isdecimal() and 0 < int(said[:6]) < 10**5:
                self.citations.append(int(said[:6]))
        self.closing = ""

    def finish(self) -> str:
        """What waited, and the citations."""
        rest = self.stops.push(self.decoder.flush()) + self.stops.flush()
        marks = "".join(f"[{n}]" for n in dict.fromkeys(self.citations))
        return rest + (f" {marks}" if marks else "")


CLOSING = {opening: closing for opening, closing, _ in WRAPPED.values()}


def reply_text(tokenizer: Any, ids: Iterable[int], stops: Sequence[str] = ()) -> str:
    """The whole text of an answer's ids, without the one that ended it: what a client gets for them."""
    reply = Reply(tokenizer, stops)
    return "".join([*map(reply.push, ids), reply.finish()])
