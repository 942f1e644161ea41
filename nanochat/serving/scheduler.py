"""Continuous batching: requests come and go, and all rows under way are written together.

A round reads a piece of the prompts that are new (`prefill_tokens` ids at most, so that nobody's answer waits long for
somebody's prompt), then adds one id to every row being written. A row's text does not depend on the rows beside it, up
to the rounding of batched products, and is what Engine.generate gives for its prompt, options and number.

    scheduler = Scheduler(engine, Limits())
    scheduler.start()                   # a thread of its own; without it, call step() until it returns False
    scheduler.submit(Request(ids, max_tokens=64, listener=print))

The attention of a row holds keys and values for the ids it may need (a power of two), and rows of equal need are
written in one forward: a row that may become long costs the short ones no copying. Tools answer in a second thread.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from nanochat.config import UserError
from nanochat.engine import Engine, Rows
from nanochat.sampling import ENDED
from nanochat.serving.prefix import PrefixCache
from nanochat.serving.request import Busy, Chosen, End, Event, Failed, Piece, Request
from nanochat.serving.rows import Counts, Reading, ServedRow, make_rows, room_for
from nanochat.serving.sampling import chosen, pick

Delivery = tuple[Callable[[Event], Any], Event]


@dataclass(frozen=True)
class Limits:
    """max_rows: under way at once. max_queue: requests that wait for their turn. cache_bytes: of states kept."""

    max_rows: int = 32
    max_queue: int = 64
    prefill_tokens: int = 256
    cache_bytes: int = 256 << 20

    def __post_init__(self) -> None:
        if min(self.max_rows, self.prefill_tokens) < 1 or min(self.max_queue, self.cache_bytes) < 0:
            raise UserError(f"{self}: rows and prefill tokens must be at least 1, the others at least 0")

    def most(self, n: int) -> int:
        """Prompts answered n times each that an idle server takes at once."""
        return max(1, self.max_queue + self.max_rows // n)


def deliver_here(events: Sequence[Delivery]) -> None:
    for listener, event in events:
        listener(event)


def _live(row: Any) -> bool:
    return row.live


class Scheduler:
    def __init__(
        self, engine: Engine, limits: Limits = Limits(), deliver: Callable[[list[Delivery]], Any] = deliver_here
    ) -> None:
        """deliver is called once a round, in the scheduler's thread, with the events of that round in order."""
        self.engine, self.limits, self.deliver = engine, limits, deliver
        self.prefixes, self.counts = PrefixCache(limits.cache_bytes), Counts()
        self.changed = threading.Condition()
        self.waiting: deque[Request] = deque()  # guarded by `changed`, as is `stopping`
        self.stopping = False
        self.error: BaseException | None = None  # what ended the thread
        self.open: set[Request] = set()
        self.reading: list[Reading] = []
        self.writing: dict[int, Rows] = {}  # by room
        self.asking: list[Reading] = []  # rows that wait for the tools' thread
        self.answering: tuple[list[Reading], Future] | None = None
        self.tools = ThreadPoolExecutor(1, thread_name_prefix="tools")
        self.events: list[Delivery] = []
        self.thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    # ---- from any thread ----

    def submit(self, request: Request) -> None:
        """Busy where the queue is full; UserError for a prompt or options that cannot work."""
        self.engine._check_prompts(request.prompt)
        if not 1 <= request.n <= self.limits.max_rows or request.max_tokens < 1:
            raise UserError(
                f"n={request.n}, max_tokens={request.max_tokens}: expected 1 to {self.limits.max_rows}, and at least 1"
            )
        with self.changed:
            if self.stopping or self.error is not None:
                raise Busy("the server is ending")
            free = (self.limits.max_rows - self.counts.rows) // request.n  # so many begin with the next round
            if len(self.waiting) >= self.limits.max_queue + free:
                raise Busy(f"{len(self.waiting)} requests wait already")
            self.waiting.append(request)
            self.changed.notify()

    def cancel(self, request: Request) -> None:
        """Drop what is left of the request's rows at the next round; no event follows."""
        request.over = True
        self._wake()

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        """End the thread; what is under way fails."""
        with self.changed:
            self.stopping = True
            self.changed.notify()
        if self.thread.is_alive():
            self.thread.join()
        self.tools.shutdown(cancel_futures=True)

    def _wake(self) -> None:
        with self.changed:
            self.changed.notify()

    # ---- in the scheduler's thread ----

    def _run(self) -> None:
        try:
            while True:
                with self.changed:
                    if not (self.stopping or self.waiting or self.reading or self.writing):
                        self.changed.wait(1.0 if self.open else None)
                    if self.stopping:
                        break
                self.step()
        except BaseException as e:
            self.error = e
            raise
        finally:
            with self.changed:
                left = [*self.open, *self.waiting]
                self.waiting.clear()
            for request in left:
                self._fail(request, "internal", "the server stopped before the answer was whole")
            self._deliver()

    @torch.inference_mode()
    def step(self) -> bool:
        """One round. False where nothing is under way."""
        self._drop()
        self._admit()
        self._collect()
        self._read()
        for room in list(self.writing):
            self._write(room)
        self._ask()
        self.counts.steps += 1
        self._count()
        self._deliver()
        return bool(self.open or self.waiting)

    def _count(self) -> None:
        counts = self.counts
        parked = self.answering[0] if self.answering else []
        readings = [*self.reading, *self.asking, *parked]
        counts.rows = sum(len(r.rows) for r in readings) + sum(len(rows.rows) for rows in self.writing.values())
        counts.waiting = len(self.waiting)

    def _deliver(self) -> None:
        events, self.events = self.events, []
        if events:
            self.deliver(events)

    def _drop(self) -> None:
        """Rows of requests that are over or late leave."""
        with self.changed:
            requests = [*self.open, *self.waiting]
        for request in requests:
            if request.late and not request.over:
                self._fail(request, "timeout", f"no answer within {request.seconds:g} s")
        if not any(request.over for request in requests):
            return
        with self.changed:
            self.waiting = deque(request for request in self.waiting if not request.over)
        self.open = {request for request in self.open if not request.over}
        self.reading = [reading for reading in self.reading if reading.live]
        self.asking = [reading for reading in self.asking if reading.live]
        for room in list(self.writing):
            self._keep(room, self.writing[room].where(_live))

    def _keep(self, room: int, rows: Rows) -> None:
        if rows.rows:
            self.writing[room] = rows
        else:
            self.writing.pop(room, None)

    def _admit(self) -> None:
        """Requests leave the queue in their order, as long as there is room for their rows."""
        while True:
            with self.changed:
                self._count()
                if not self.waiting or self.counts.rows + self.waiting[0].n > self.limits.max_rows:
                    return
                request = self.waiting.popleft()
                self.counts.rows += request.n
            self.open.add(request)
            self._begin(request)

    def _begin(self, request: Request) -> None:
        rows = make_rows(request, self.engine.tokenizer, self.engine.max_context)
        for row in rows:
            for token in request.begin[: row.left]:
                self._emit(row, self.engine._write(row, token, self.engine.terminators)[0], None)
        rows = [row for row in rows if row.live]
        if not rows:
            return
        prompt, whole = request.prompt, rows[0].ids
        room = room_for(len(whole) + rows[0].left, self.engine.max_context)
        n, state = self.prefixes.find(room, prompt)
        shared = self.prefixes.boundary(prompt)
        if state is None:
            state = self.engine.model.init_state(1, room)
        request.cached = n
        self.counts.cached_tokens += n
        self.counts.prompt_tokens += len(prompt)
        self.reading.append(Reading(rows, whole[n:], room, state, max(0, shared - n)))
        for row in rows:
            row.unread = []

    # ---- reading ----

    def _read(self) -> None:
        """One forward over the next ids of the readings that have waited longest, of one room, padded within limits."""
        if not self.reading:
            return
        room, longest = self.reading[0].room, self.limits.prefill_tokens
        group: list[Reading] = []
        width = 0
        for reading in self.reading:
            wider = max(width, reading.next(longest))
            if reading.room == room and (not group or wider * (len(group) + 1) <= longest):
                group.append(reading)
                width = wider
        ids = [reading.unread[: reading.next(longest)] for reading in group]
        state = group[0].state
        for reading in group[1:]:
            state = state.join(reading.state)
        logits = self.engine._forward(ids, state, None)
        self._after_reading(group, [len(own) for own in ids], logits, state)

    def _after_reading(self, group: list[Reading], lengths: list[int], logits: Any, state: Any) -> None:
        """Readings that are through become rows to be written; the others take their state along."""
        rows: list[Any] = []
        places: list[int] = []
        for i, (reading, n) in enumerate(zip(group, lengths, strict=True)):
            reading.unread = reading.unread[n:]
            if reading.keep_at:
                reading.keep_at -= n
                if not reading.keep_at:
                    read = len(reading.rows[0].ids) - len(reading.unread)
                    self.prefixes.put(reading.room, reading.rows[0].ids[:read], state.select(torch.tensor([i])))
            if reading.unread:
                reading.state = state.select(torch.tensor([i]))
            else:
                live = [row for row in reading.rows if row.live]
                rows += live
                places += [i] * len(live)
        self.reading = [reading for reading in self.reading if reading.unread]
        if not rows:
            return
        if places != list(range(len(group))):
            index = torch.tensor(places)
            state, logits = state.select(index), logits[index.to(logits.device)]
        room = group[0].room
        self.writing[room] = self.writing.get(room, Rows()).join(Rows(rows, state, logits))

    # ---- writing ----

    def _write(self, room: int) -> None:
        """One id for every row of this room; then the model reads it in those that go on."""
        rows = self.writing[room]
        written: list[Any] = rows.rows
        picked = pick(rows.logits, written)
        for row, token, how in zip(written, picked, chosen(rows.logits, written, picked), strict=True):
            if token == ENDED:
                self._fail(row.request, "internal", "the model's logits are NaN: its checkpoint is damaged")
            elif not row.request.over:
                said, _ = self.engine._write(row, token, self.engine.terminators)
                self._emit(row, said, how)
        for i, row in enumerate(written):
            if not row.left and not row.request.over:
                self.prefixes.put(room, row.ids[:-1], rows.state.select(torch.tensor([i])))
        for i, row in enumerate(written):
            if row.live and row.tool is not None and row.ids[-1] == row.tool.end and not self._called(row):
                self.asking.append(Reading([row], [], room, rows.state.select(torch.tensor([i]))))
        parked = {id(reading.rows[0]) for reading in self.asking}
        rows = rows.where(lambda row: _live(row) and id(row) not in parked)
        if rows.rows:
            rows = self.engine._read(rows, None)
        self._keep(room, rows)

    def _emit(self, row: ServedRow, token: int, how: Chosen | None) -> None:
        """Tell what the row's newest id shows, and that the row ends where it does."""
        visible = row.reply.visible(token)
        ended = token in self.engine.terminators
        text = "" if ended else row.reply.push(token)
        self.counts.generated_tokens += 1
        if text or (how is not None and visible):
            self._tell(row, Piece(row.column, text, how if visible else None))
        if ended or row.reply.stopped:
            self._end(row, "stop", row.emitted - int(ended))
        elif not row.left:
            self._end(row, "length", row.emitted)

    def _tell(self, row: ServedRow, piece: Piece) -> None:
        if row.request.stream or not row.told:
            self.events.append((row.request.listener, piece))
            row.told = True
        else:
            row.kept.append(piece)

    def _end(self, row: ServedRow, reason: str, n_tokens: int, call: Any = None) -> None:
        row.left = 0
        request, text = row.request, row.reply.finish()
        cites = tuple(dict.fromkeys(row.reply.citations))
        self.counts.ended[reason] = self.counts.ended.get(reason, 0) + 1
        request.open -= 1
        self.events += [(request.listener, piece) for piece in row.kept]
        self.events.append((request.listener, End(row.column, reason, text, n_tokens, call, cites, tuple(row.trace))))
        if not request.open:
            self.open.discard(request)

    def _fail(self, request: Request, kind: str, message: str) -> None:
        if not request.over:
            request.over = True
            self.counts.ended[kind] = self.counts.ended.get(kind, 0) + 1
            self.events.append((request.listener, Failed(kind, message)))
        self.open.discard(request)

    # ---- tools ----

    def _called(self, row: ServedRow) -> bool:
        """Whether the row has called a function of its client, and so ends."""
        functions, tool = row.request.functions, row.tool
        if functions is None or tool is None:
            return False
        query = self.engine.tokenizer.decode(row.ids[row.opened : -1], errors="replace")
        call = functions.call(tool.start, query)
        if call is not None:
            self._end(row, "tool_calls", row.emitted, call)
        return call is not None

    def _ask(self) -> None:
        """Give the tools' thread all calls that came while it was at work."""
        if self.answering is None and self.asking:
            asking, self.asking = self.asking, []
            future = self.tools.submit(self.engine._answer, [row for reading in asking for row in reading.rows])
            self.answering = asking, future
            future.add_done_callback(lambda _: self._wake())

    def _collect(self) -> None:
        """Put what tools answered into the rows, which then read it."""
        if self.answering is None or not self.answering[1].done():
            return
        (asked, future), self.answering = self.answering, None
        error = future.exception()
        for reading in asked:
            [row] = reading.rows
            if error is not None:
                message = str(error) if isinstance(error, UserError) else f"a tool failed: {type(error).__name__}"
                self._fail(row.request, "internal", message)
            while row.live and row.forced:
                self._emit(row, self.engine._force(row, self.engine.terminators), None)
            if row.live:
                reading.unread, row.unread = row.unread, []
                self.reading.append(reading)
