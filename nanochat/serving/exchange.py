"""One HTTP request's way through the scheduler: submitted, listened to, and dropped when its client has left."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from nanochat.config import UserError
from nanochat.serving.metrics import Metrics
from nanochat.serving.request import Busy, End, Event, Failed, Request
from nanochat.serving.scheduler import Scheduler

T = TypeVar("T")


class Refusal(Exception):
    """Why a request is not answered; app.py makes a response of it."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after


class Exchange:
    """The prompts of one HTTP request. Events come as (which prompt, event)."""

    def __init__(self, scheduler: Scheduler, metrics: Metrics) -> None:
        self.scheduler, self.metrics = scheduler, metrics
        self.queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.requests: list[Request] = []
        self.left, self.done = 0, False

    def listener(self, place: int) -> Callable[[Event], None]:
        return lambda event: self.queue.put_nowait((place, event))

    def submit(self, requests: Sequence[Request]) -> None:
        """All of them or none: Refusal where the queue is full, UserError for what cannot work."""
        try:
            for request in requests:
                self.scheduler.submit(request)
                self.requests.append(request)
                self.left += request.n
        except Busy as e:
            self.close()
            raise Refusal(429, f"{e}: try again later", "queue_full", retry_after=self.patience()) from e
        except UserError:
            self.close()
            raise

    def patience(self) -> int:
        """Seconds after which the queue should have moved: what the waiting ones take at the mean of late."""
        whole, counts = self.metrics.whole, self.scheduler.counts
        mean = whole.sum / max(1, sum(whole.counts))
        return min(60, max(1, round(mean * (1 + counts.waiting / self.scheduler.limits.max_rows))))

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """Until every row has ended. Refusal where the scheduler failed it."""
        started, first = time.monotonic(), True
        while self.left:
            place, event = await self.queue.get()
            if isinstance(event, Failed):
                status = {"timeout": 503, "invalid": 400}.get(event.kind, 500)
                raise Refusal(status, event.message, event.kind, retry_after=5 if status == 503 else None)
            if first:
                self.metrics.first.observe(time.monotonic() - started)
                first = False
            self.left -= isinstance(event, End)
            yield place, event
        self.metrics.whole.observe(time.monotonic() - started)
        self.done = True

    def close(self) -> None:
        """Drop what is still under way."""
        if not self.done:
            for request in self.requests:
                self.scheduler.cancel(request)

    async def unless_gone(self, http: HttpRequest, work: Awaitable[T]) -> T | None:
        """The result of the work, or None where the client left before it came; then the rows are dropped."""
        working, watching = asyncio.ensure_future(work), asyncio.ensure_future(_gone(http))
        try:
            await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
            return working.result() if working.done() else None
        finally:
            working.cancel()
            watching.cancel()
            self.close()


async def _gone(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events. However it ends, the exchange is closed: what nobody reads is not written on."""

    def __init__(self, exchange: Exchange, lines: AsyncIterator[str]) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(lines, media_type="text/event-stream", headers=headers)
        self.exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def one_a_turn(message: Message) -> None:
            await send(message)
            # a broken connection is told in the loop's next turn, however much is ready to write
            await asyncio.sleep(0)

        try:
            await super().__call__(scope, receive, one_a_turn)
        finally:
            self.exchange.close()


def unknown(what: Any) -> Refusal:
    return Refusal(
        404, f"the model {str(what)[:100]!r} does not exist: GET /v1/models lists those that do", "model_not_found"
    )
