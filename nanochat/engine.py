"""Generation: one prefill, then decode steps over the rows still being written. Token ids in, token ids out.

    engine = Engine(model, tokenizer)
    for column, mask in engine.generate(ids, num_samples=4, max_tokens=64):   # one id per row and step
        ...
    rows, masks = engine.generate_batch([ids_a, ids_b], temperature=0)

The engine knows no block by name: a state is whatever `model.init_state` returned, and it is repeated over samples
after the prefill and narrowed to the live rows as others end. A row that has ended costs nothing. A tool's output is
forced into its row as ids; sampled ids are never decoded and encoded again.
"""

import codecs
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nanochat.config import UserError
from nanochat.execution import calculate, run_python
from nanochat.sampling import ENDED, Sampler


@dataclass(frozen=True)
class Tool:
    """Ids sampled between `start` and `end` are decoded and given to `handler`; its text comes back into the row.

    The text is encoded as ordinary text (it cannot spell a special token), cut to `budget` ids and wrapped in
    `output_start`, `output_end`. A handler that returns None forces nothing. After `max_calls` calls in one row the
    start id is an ordinary id there.
    """

    start: int
    end: int
    handler: Callable[[str], str | None]
    output_start: int
    output_end: int
    budget: int = 256
    max_calls: int = 64


PYTHON_TOKENS = ("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>")


def calculator(tokenizer: Any) -> Tool:
    """The calculator, between nanochat's python and output tokens."""
    start, end, output_start, output_end = map(tokenizer.encode_special, PYTHON_TOKENS)
    return Tool(start, end, calculate, output_start, output_end)


def python(tokenizer: Any, timeout_s: float = 5.0) -> Tool:
    """Python in the sandbox, between the same tokens: what the code prints comes back, or why it failed."""

    def handler(code: str) -> str:
        result = run_python(code, timeout_s=timeout_s)
        return result.stdout.rstrip("\n") if result.ok else f"error: {result.error}"

    start, end, output_start, output_end = map(tokenizer.encode_special, PYTHON_TOKENS)
    return Tool(start, end, handler, output_start, output_end, max_calls=8)


@dataclass
class Session:
    """The state of one conversation, kept between calls of `generate`, so that a turn prefills only what is new."""

    ids: list[int] = field(default_factory=list)  # what `state` has read
    state: Any = None


@dataclass
class Row:
    """One sequence being written."""

    column: int  # its place in what generate yields
    left: int  # how many more ids it may emit
    forced: deque[int] = field(default_factory=deque)
    tool: Tool | None = None  # the tool whose query is being sampled
    query: list[int] = field(default_factory=list)
    calls: Counter[int] = field(default_factory=Counter)


class Engine:
    def __init__(
        self, model: Any, tokenizer: Any = None, tools: Sequence[Tool] | None = None, max_context: int | None = None
    ):
        """tools=None is the calculator alone, () is none. Without a tokenizer there are no tools and no terminators.

        max_context: ids a row may hold, prompt included; default is the length the model was trained on.
        """
        if tools is None:
            tools = [calculator(tokenizer)] if tokenizer is not None else []
        self.model, self.tokenizer = model, tokenizer
        self.tools = {tool.start: tool for tool in tools}
        self.max_context = model.config.seq_len if max_context is None else max_context
        specials = ("<|assistant_end|>", "<|bos|>") if tokenizer is not None else ()
        self.terminators = frozenset(map(tokenizer.encode_special, specials)) if specials else frozenset()

    def generate(
        self,
        ids: list[int] | list[list[int]],
        num_samples: int = 1,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 42,
        stop: Iterable[int] = (),
        session: Session | None = None,
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Yield (column, mask) once per step: row r's id and 1 if it was sampled, 0 if a tool forced it.

        Prompt i is sampled num_samples times, in rows i*num_samples and on. A row ends after <|assistant_end|>,
        <|bos|> or an id of `stop` (that id is yielded), after max_tokens ids, or at max_context; from then on its
        entry is ENDED with mask 0. What a row says depends on its prompt, the options and its number r, not on which
        other rows there are, up to the rounding of batched products. Raises UserError for prompts or options that
        cannot work.
        """
        prompts = self._check_prompts(ids)
        sampler = Sampler(len(prompts) * num_samples, temperature, top_k, top_p, seed)
        if num_samples < 1 or (max_tokens is not None and max_tokens < 0):
            raise UserError(f"num_samples={num_samples}, max_tokens={max_tokens}: expected at least 1 and at least 0")
        if session is not None and (len(prompts) > 1 or num_samples > 1):
            raise UserError(f"a session holds one row, not {len(prompts) * num_samples}: leave session out")
        room = [self.max_context - len(p) for p in prompts]
        limits = room if max_tokens is None else [min(max_tokens, r) for r in room]
        rows = [Row(i * num_samples + j, limits[i]) for i in range(len(prompts)) for j in range(num_samples)]
        return self._run(prompts, rows, sampler, self.terminators | set(stop), session)

    def generate_batch(
        self, ids: list[int] | list[list[int]], num_samples: int = 1, stop: Iterable[int] = (), **options: Any
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Run `generate` to the end -> (rows, masks): prompt and generated ids, without the id that ended the row.

        The mask is 1 where an id was sampled, 0 on the prompt and on what tools forced. Options are generate's.
        """
        prompts = self._check_prompts(ids)
        rows = [list(p) for p in prompts for _ in range(num_samples)]
        masks = [[0] * len(row) for row in rows]
        ends = self.terminators | set(stop)
        for column, mask in self.generate(prompts, num_samples, stop=ends, **options):
            for r, (token, sampled) in enumerate(zip(column, mask, strict=True)):
                if token != ENDED and token not in ends:
                    rows[r].append(token)
                    masks[r].append(sampled)
        return rows, masks

    def _check_prompts(self, ids: Any) -> list[list[int]]:
        """One prompt or several -> several, each with at least one id, all in the vocabulary, with room to go on."""
        ids = ids.tolist() if hasattr(ids, "tolist") else ids  # arrays and tensors
        prompts = [list(p) for p in ids] if len(ids) and not isinstance(ids[0], int) else [list(ids)]
        vocab_size = self.model.config.vocab_size
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise UserError(f"prompt {i} is empty: start it with the tokenizer's bos_id")
            if min(prompt) < 0 or max(prompt) >= vocab_size:
                wrong = next(t for t in prompt if not 0 <= t < vocab_size)
                raise UserError(f"prompt {i} holds id {wrong}, the model knows 0..{vocab_size - 1}: wrong tokenizer?")
            if len(prompt) >= self.max_context:
                raise UserError(
                    f"prompt {i} is {len(prompt)} tokens and the context holds {self.max_context}, answer included: "
                    f"shorten it to {self.max_context - 1} at most"
                )
        return prompts

    @torch.inference_mode()
    def _run(
        self, prompts: list[list[int]], rows: list[Row], sampler: Sampler, ends: Collection[int], session: Any
    ) -> Iterator[tuple[list[int], list[int]]]:
        live = [row for row in rows if row.left > 0]
        if not live:
            return
        assert len(live) == len(rows), "every prompt has room for one id, and max_tokens is common to all"
        logits, state = self._prefill(prompts, len(rows) // len(prompts), max(r.left for r in rows), session)
        while True:
            picked = sampler(logits, [row.column for row in live])
            column, mask = [ENDED] * len(rows), [0] * len(rows)
            for row, token in zip(live, picked, strict=True):
                column[row.column], mask[row.column] = self._advance(row, token, ends)
            yield column, mask
            kept = [i for i, row in enumerate(live) if row.left > 0]
            if not kept:
                return
            if len(kept) < len(live):
                live = [live[i] for i in kept]
                state = state.select(torch.tensor(kept))
            fed = [[column[row.column]] for row in live]
            logits = self._forward(fed, state, session)  # (rows alive, V)

    def _prefill(
        self, prompts: list[list[int]], num_samples: int, max_tokens: int, session: Session | None
    ) -> tuple[Tensor, Any]:
        """Read every prompt once, as one right-padded batch -> logits after each (rows, V), and the rows' state."""
        longest = max(map(len, prompts))
        if session is not None:
            ids = prompts[0]
            if session.state is None or len(session.ids) >= len(ids) or ids[: len(session.ids)] != session.ids:
                session.ids, session.state = [], self.model.init_state(1, self.max_context)
            state = session.state
            return self._forward([ids[len(session.ids) :]], state, session), state
        state = self.model.init_state(len(prompts), min(longest + max_tokens, self.max_context))
        logits = self._forward(prompts, state, None)
        if num_samples > 1:
            logits, state = logits.repeat_interleave(num_samples, dim=0), state.repeat(num_samples)
        return logits, state

    def _forward(self, ids: list[list[int]], state: Any, session: Session | None) -> Tensor:
        """Feed ids to the rows of the state -> logits after each row's last id (B, V)."""
        lengths = [len(row) for row in ids]
        T, device = max(lengths), self.model.device
        x = torch.tensor([row + [0] * (T - len(row)) for row in ids], device=device)  # (B, T)
        ragged = torch.tensor(lengths, device=device) if min(lengths) < T else None
        if session is None:
            return self.model(x, state=state, lengths=ragged, last_only=True)[:, 0]
        session.state = None  # an interrupted forward leaves a state of unknown content: the next turn starts afresh
        logits = self.model(x, state=state, lengths=ragged, last_only=True)[:, 0]
        session.ids, session.state = session.ids + ids[0], state
        return logits

    def _advance(self, row: Row, sampled: int, ends: Collection[int]) -> tuple[int, int]:
        """Emit the row's next id -> (id, mask), and follow the tools: open, collect, call."""
        row.left -= 1
        if row.forced:
            token, mask = row.forced.popleft(), 0
        else:
            token, mask = sampled, 1
            tool = self.tools.get(token)
            if tool is not None and row.calls[token] < tool.max_calls:
                row.tool, row.query = tool, []
            elif row.tool is not None and token == row.tool.end:
                row.calls[row.tool.start] += 1
                row.forced.extend(self._call(row.tool, row.query))
                row.tool = None
            elif row.tool is not None:
                row.query.append(token)
        if token in ends:
            row.left = 0
        return token, mask

    def _call(self, tool: Tool, query: list[int]) -> list[int]:
        """The ids a finished query forces into its row; none if the handler has no answer."""
        output = tool.handler(self.tokenizer.decode(query, errors="replace"))
        if output is None:
            return []
        return [tool.output_start, *self.tokenizer.encode(output)[: tool.budget], tool.output_end]


class StreamDecoder:
    """ids, one at a time -> text as soon as it is whole: a character split over ids waits for its last byte."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self.utf8.decode(self.tokenizer.decode_bytes([token]))

    def flush(self) -> str:
        """What is left at the end: the replacement character if bytes of an unfinished one are held, else nothing."""
        return self.utf8.decode(b"", final=True)
