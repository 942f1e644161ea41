"""Generation: one prefill, then decode steps over the rows still being written. Token ids in, token ids out.

    engine = Engine(model, tokenizer)
    for column, mask in engine.generate(ids, num_samples=4, max_tokens=64):   # one id per row and step
        ...
    rows, masks = engine.generate_batch([ids_a, ids_b], temperature=0)

The engine knows no block by name: a state is whatever `model.init_state` returned, and it is repeated over samples
after the prefill and narrowed to the live rows as others end. A row that has ended costs nothing. A tool's output
(nanochat/tools.py) is forced into its row as ids; sampled ids are never decoded and encoded again. While forced ids are
emitted the row costs nothing either: the model reads them in one forward, those of all rows that wait together.
"""

import codecs
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nanochat.config import UserError
from nanochat.sampling import ENDED, Sampler
from nanochat.tools import Call, Tool, calculator, python

__all__ = ["ENDED", "Engine", "Session", "StreamDecoder", "Tool", "calculator", "python"]


@dataclass
class Session:
    """The state of one conversation, kept between calls of `generate`, so that a turn prefills only what is new."""

    ids: list[int] = field(default_factory=list)  # what `state` has read
    state: Any = None


@dataclass
class Row:
    """One sequence being written."""

    column: int  # its place in what generate yields
    ids: list[int]  # the prompt and what was emitted
    left: int  # how many more ids it may emit
    trace: list[Call]
    forced: deque[int] = field(default_factory=deque)  # to be emitted, at no forward
    unread: list[int] = field(
        default_factory=list
    )  # what the model has yet to read: sampled ids, and forced ones whole
    tool: Tool | None = None  # whose query is being sampled
    opened: int = 0  # where in ids that query starts
    vectors: list[Tensor] = field(default_factory=list)  # for the <|chunk|> ids of what is unread

    def calls(self, tool: Tool) -> int:
        return sum(call.tool is tool for call in self.trace)


@dataclass
class Rows:
    """Rows read together: the model's state of them, and the logits after what each has read, (rows, V)."""

    rows: list[Row] = field(default_factory=list)
    state: Any = None
    logits: Any = None

    def where(self, test: Callable[[Row], Any]) -> "Rows":
        """Those of the rows that pass the test; self where all do."""
        kept = [i for i, row in enumerate(self.rows) if test(row)]
        if len(kept) == len(self.rows):
            return self
        if not kept:
            return Rows()
        index = torch.tensor(kept)
        return Rows([self.rows[i] for i in kept], self.state.select(index), self.logits[index.to(self.logits.device)])

    def join(self, other: "Rows") -> "Rows":
        """These rows, then the others."""
        if not (self.rows and other.rows):
            return self if self.rows else other
        state = self.state.join(other.state)
        return Rows(self.rows + other.rows, state, torch.cat((self.logits, other.logits)))


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
        traces: list[list[Call]] | None = None,
        vectors: Sequence[Tensor] | None = None,
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Yield (column, mask) once per step: row r's id and 1 if it was sampled, 0 if a tool forced it.

        Prompt i is sampled num_samples times, in rows i*num_samples and on. A row ends after <|assistant_end|>,
        <|bos|> or an id of `stop` (that id is yielded), after max_tokens ids, or at max_context; from then on its
        entry is ENDED with mask 0. What a row says depends on its prompt, the options and its number r, not on which
        other rows there are, up to the rounding of batched products. traces: a list that is given one list per row, to
        which each call is added as it is answered. vectors: for each prompt (n, D), which take the places of its n
        <|chunk|> ids (nanochat/compress). Raises UserError for prompts or options that cannot work.
        """
        prompts = self._check_prompts(ids)
        sampler = Sampler(len(prompts) * num_samples, temperature, top_k, top_p, seed)
        if num_samples < 1 or (max_tokens is not None and max_tokens < 0):
            raise UserError(f"num_samples={num_samples}, max_tokens={max_tokens}: expected at least 1 and at least 0")
        if session is not None and (len(prompts) > 1 or num_samples > 1):
            raise UserError(f"a session holds one row, not {len(prompts) * num_samples}: leave session out")
        if session is not None and vectors is not None:
            raise UserError("a session remembers ids, not vectors: leave session out")
        room = [self.max_context - len(p) for p in prompts]
        limits = room if max_tokens is None else [min(max_tokens, r) for r in room]
        rows = [
            Row(i * num_samples + j, list(prompt), limits[i], [])
            for i, prompt in enumerate(prompts)
            for j in range(num_samples)
        ]
        if traces is not None:
            traces[:] = [row.trace for row in rows]
        if vectors is not None:
            counts = [prompt.count(self.tokenizer.encode_special("<|chunk|>")) for prompt in prompts]
            if counts != [len(v) for v in vectors]:
                given = ", ".join(str(len(v)) for v in vectors)
                raise UserError(f"vectors for {given} chunks: the prompts have {counts} <|chunk|> ids")
            for row, own in zip(rows[::num_samples], vectors, strict=True):
                row.vectors = [own] * bool(len(own))
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

    def _take_vectors(self, rows: list[Row], ids: list[list[int]]) -> tuple[Tensor, Tensor] | None:
        """What rows bring for <|chunk|> ids among those they are fed -> (places (B, T), vectors (n, D)), or None."""
        vectors = [v for row in rows for v in row.vectors]
        if not vectors:
            return None
        chunk, T = self.tokenizer.encode_special("<|chunk|>"), max(map(len, ids))
        places = torch.zeros(len(ids), T, dtype=torch.bool)
        for place, row, own in zip(places, rows, ids, strict=True):
            if row.vectors:  # elsewhere the id was sampled
                place[: len(own)] = torch.tensor(own) == chunk
                row.vectors = []
        return places.to(self.model.device), torch.cat(vectors)

    @torch.inference_mode()
    def _run(
        self, prompts: list[list[int]], rows: list[Row], sampler: Sampler, ends: Collection[int], session: Any
    ) -> Iterator[tuple[list[int], list[int]]]:
        if not rows[0].left:
            return
        assert all(row.left for row in rows), "every prompt has room for one id, and max_tokens is common to all"
        n = len(rows) // len(prompts)
        inject = self._take_vectors(rows[::n], prompts)
        logits, state = self._prefill(prompts, n, max(r.left for r in rows), session, inject)
        writing, held = Rows(rows, state, logits), Rows()  # held: rows into which ids are forced
        while writing.rows or held.rows:
            # also with nothing to sample, for the sampler counts the steps
            picked = sampler(writing.logits if writing.rows else logits[:0], [row.column for row in writing.rows])
            column, mask = [ENDED] * len(rows), [0] * len(rows)
            for row, token in zip(writing.rows, picked, strict=True):
                column[row.column], mask[row.column] = self._write(row, token, ends)
            for row in held.rows:
                column[row.column] = self._force(row, ends)
            yield column, mask
            writing, held = self._prepare(writing, held, session)

    def _prepare(self, writing: Rows, held: Rows, session: Session | None) -> tuple[Rows, Rows]:
        """Between two steps: answer calls, and let the model read what the rows that sample next have yet unread."""
        writing, held = writing.where(lambda row: row.left), held.where(lambda row: row.left)
        self._answer([row for row in writing.rows if row.tool is not None and row.ids[-1] == row.tool.end])
        held = held.join(writing.where(lambda row: row.forced))
        writing = writing.where(lambda row: not row.forced)
        if any(row.unread and not row.forced for row in held.rows):  # with it all others, but those that end in between
            unread = held.where(lambda row: row.unread and len(row.forced) < row.left)
            held = held.where(lambda row: not row.unread or len(row.forced) >= row.left).join(
                self._read(unread, session)
            )
        if writing.rows:
            writing = self._read(writing, session)
        return writing.join(held.where(lambda row: not row.forced)), held.where(lambda row: row.forced)

    def _read(self, rows: Rows, session: Session | None) -> Rows:
        """Feed each row what it has unread."""
        ids = [row.unread for row in rows.rows]
        rows.logits = self._forward(ids, rows.state, session, self._take_vectors(rows.rows, ids))
        for row in rows.rows:
            row.unread = []
        return rows

    def _prefill(
        self,
        prompts: list[list[int]],
        num_samples: int,
        max_tokens: int,
        session: Session | None,
        inject: tuple[Tensor, Tensor] | None = None,
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
        logits = self._forward(prompts, state, None, inject)
        if num_samples > 1:
            logits, state = logits.repeat_interleave(num_samples, dim=0), state.repeat(num_samples)
        return logits, state

    def _forward(
        self, ids: list[list[int]], state: Any, session: Session | None, inject: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Feed ids to the rows of the state -> logits after each row's last id (B, V)."""
        lengths = [len(row) for row in ids]
        T, device = max(lengths), self.model.device
        x = torch.tensor([row + [0] * (T - len(row)) for row in ids], device=device)  # (B, T)
        ragged = torch.tensor(lengths, device=device) if min(lengths) < T else None
        more = {} if inject is None else {"inject": inject}  # models other than GPT need not know of it
        if session is None:
            return self.model(x, state=state, lengths=ragged, last_only=True, **more)[:, 0]
        session.state = None  # an interrupted forward leaves a state of unknown content: the next turn starts afresh
        logits = self.model(x, state=state, lengths=ragged, last_only=True, **more)[:, 0]
        session.ids, session.state = session.ids + ids[0], state
        return logits

    def _write(self, row: Row, token: int, ends: Collection[int]) -> tuple[int, int]:
        """Emit a sampled id -> (id, mask): the end of a query that grew too long takes its place, at mask 0."""
        mask, tool = 1, row.tool
        full = tool is not None and tool.max_query is not None and len(row.ids) - row.opened >= tool.max_query
        if tool is not None and full and token != tool.end and token not in ends:
            token, mask = tool.end, 0
        tool = self.tools.get(token)
        if tool is not None and (tool.over is not None or row.calls(tool) < tool.max_calls):
            row.tool, row.opened = tool, len(row.ids) + 1
        row.unread.append(token)
        return self._emit(row, token, ends), mask

    def _force(self, row: Row, ends: Collection[int]) -> int:
        """Emit the next of the ids a tool put into the row."""
        return self._emit(row, row.forced.popleft(), ends)

    def _emit(self, row: Row, token: int, ends: Collection[int]) -> int:
        row.ids.append(token)
        row.left = 0 if token in ends else row.left - 1
        return token

    def _answer(self, rows: list[Row]) -> None:
        """Answer the calls these rows have closed, all of one tool together."""
        for tool in self.tools.values():
            asking = [row for row in rows if row.tool is tool]
            queries = [self.tokenizer.decode(row.ids[row.opened : -1], errors="replace").strip() for row in asking]
            within = [row.calls(tool) < tool.max_calls for row in asking]
            results = iter(tool.answer([query for query, ask in zip(queries, within, strict=True) if ask]))
            for row, query, ask in zip(asking, queries, within, strict=True):
                output = shown = next(results) if ask else None
                if not ask:
                    output = tool.over
                elif tool.render is not None:
                    output, shown = tool.render(output, row.ids)
                if isinstance(output, tuple):  # ids, and the vectors for the <|chunk|> ids among them
                    output, row.vectors = output[0], [output[1]]
                ids = self._wrap(tool, output)
                row.trace.append(Call(tool, query, shown, len(row.ids), ids))
                row.forced.extend(ids)
                row.unread.extend(ids)
                row.tool = None

    def _wrap(self, tool: Tool, output: str | list[int] | None) -> list[int]:
        """The ids an output forces into its row; none where there is no output."""
        if output is None:
            return []
        ids = self.tokenizer.encode(output)[: tool.budget] if isinstance(output, str) else output
        return [tool.output_start, *ids, tool.output_end]


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
