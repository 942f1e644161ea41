"""Clients for scripts.bench_serving: HTTP over plain asyncio streams, so that they take little of the server's CPU."""

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

LOST = (ConnectionError, asyncio.IncompleteReadError, ValueError, IndexError)  # a connection that broke, or no HTTP
PERCENTILES = (50, 90, 99)
RAMP = 0.2  # share of a level's seconds that is not measured: every client is under way after it

Bodies = Iterator[dict[str, Any]]


@dataclass
class Answer:
    """What a client got. Times are those of time.perf_counter; status 0 is a connection that broke."""

    start: float
    status: int = 0
    retry_after: int | None = None
    text: str = ""
    first: float = math.nan  # when the first text came
    last: float = math.nan
    n_tokens: int = 0
    whole: bool = False

    @property
    def lost(self) -> bool:
        return self.status == 0 or (self.status == 200 and not self.whole)

    def within(self, start: float, end: float) -> float:
        """How many of the tokens came between two times, as if they came evenly."""
        span = max(self.last - self.first, 1e-9)
        overlap = min(self.last, end) - max(self.first, start)
        return self.n_tokens * min(1.0, max(0.0, overlap + 1e-9) / span) if overlap >= 0 else 0.0


@dataclass
class Level:
    """Everything that one offered load was answered."""

    start: float
    end: float
    answers: list[Answer] = field(default_factory=list)


async def send(
    port: int, method: str, path: str, body: dict[str, Any] | None = None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    raw = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
    return reader, writer


async def read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """-> (status, headers)"""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in lines[1:] if line)
    return int(lines[0].split()[1]), {name.lower(): value.strip() for name, _, value in pairs}


async def read_body(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    """Pieces, as they come."""
    if headers.get("transfer-encoding") != "chunked":
        yield await reader.readexactly(int(headers["content-length"]))
        return
    while size := int(await reader.readline(), 16):
        yield (await reader.readexactly(size + 2))[:-2]
    await reader.readline()


async def events(pieces: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any] | None]:
    """Server-sent events; None for [DONE]."""
    held = b""
    async for piece in pieces:
        *lines, held = (held + piece).split(b"\n\n")
        for line in lines:
            yield None if line == b"data: [DONE]" else json.loads(line.removeprefix(b"data: "))


async def ask(port: int, path: str, body: dict[str, Any]) -> Answer:
    """One request, streamed where its body says so. A connection that breaks leaves status 0 or `whole` False."""
    answer = Answer(time.perf_counter())
    writer = None
    try:
        reader, writer = await send(port, "POST", path, body)
        status, headers = await read_head(reader)
        answer.retry_after = int(headers["retry-after"]) if "retry-after" in headers else None
        pieces = read_body(reader, headers)
        if status == 200 and body.get("stream"):
            await _take_stream(answer, pieces)
        else:
            _take_whole(answer, status, json.loads(b"".join([piece async for piece in pieces])))
        answer.status = status
    except LOST:
        pass
    finally:
        if writer is not None:
            writer.close()
    return answer


async def _take_stream(answer: Answer, pieces: AsyncIterator[bytes]) -> None:
    async for event in events(pieces):
        if event is None:
            answer.whole = True
            continue
        for choice in event.get("choices", ()):
            text = choice["text"] if "text" in choice else choice["delta"].get("content")
            if text:
                answer.last = time.perf_counter()
                answer.first = answer.last if math.isnan(answer.first) else answer.first
                answer.text += text
        if event.get("usage"):
            answer.n_tokens = event["usage"]["completion_tokens"]
        if "error" in event:
            raise ConnectionError(event["error"]["message"])


def _take_whole(answer: Answer, status: int, value: dict[str, Any]) -> None:
    if status != 200:
        return
    [choice] = value["choices"]
    answer.text = choice["text"] if "text" in choice else choice["message"]["content"] or ""
    answer.n_tokens, answer.whole = value["usage"]["completion_tokens"], True
    answer.first = answer.last = time.perf_counter()


# ---- offered load ----


async def closed_loop(port: int, bodies: Bodies, clients: int, seconds: float) -> Level:
    """Clients that each ask again as soon as they are answered."""
    start = time.perf_counter()
    level = Level(start + RAMP * seconds, start + seconds)

    async def client() -> None:
        while time.perf_counter() < level.end:
            level.answers.append(await ask(port, "/v1/completions", next(bodies)))

    await asyncio.gather(*(client() for _ in range(clients)))
    return level


async def poisson(port: int, bodies: Bodies, rate: float, seconds: float, seed: int) -> Level:
    """Requests that come at random times, `rate` a second, whether or not those before are answered."""
    rng, start = np.random.default_rng(seed), time.perf_counter()
    level, under_way, at = Level(start + RAMP * seconds, start + seconds), [], start
    while (at := at + float(rng.exponential(1 / rate))) < level.end:
        await asyncio.sleep(max(0.0, at - time.perf_counter()))
        under_way.append(asyncio.create_task(ask(port, "/v1/completions", next(bodies))))
    level.answers += await asyncio.gather(*under_way)
    return level


def figures(levels: list[Level]) -> dict[str, Any]:
    """Tokens a second: the median of the levels, which are repeats. Percentiles: over all answers begun in time."""
    speeds = [sum(a.within(lv.start, lv.end) for a in lv.answers) / (lv.end - lv.start) for lv in levels]
    answers = [a for lv in levels for a in lv.answers]
    good = [a for lv in levels for a in lv.answers if a.whole and a.n_tokens and a.start >= lv.start - 1e-9] or [
        a for a in answers if a.whole and a.n_tokens
    ]
    per_token = [(a.last - a.first) / (a.n_tokens - 1) for a in good if a.n_tokens > 1]
    return {
        "tok_per_s": round(float(np.median(speeds)), 1),
        "ttft_ms": spread([a.first - a.start for a in good]),
        "tpot_ms": spread(per_token),
        "answered": sum(a.whole for a in answers),
        "refused": sum(a.status == 429 for a in answers),
        "lost": sum(a.lost or a.status >= 500 for a in answers),
    }


def spread(seconds: list[float]) -> list[float] | None:
    """Milliseconds at PERCENTILES."""
    known = [s for s in seconds if not math.isnan(s)]
    return [round(1e3 * float(v), 2) for v in np.percentile(known, PERCENTILES)] if known else None


# ---- what must hold ----


async def clients_check(
    port: int, n_clients: int, seconds: float, body_of: Callable[[int, int], tuple[dict[str, Any], str]]
) -> dict[str, Any]:
    """n clients for so long. body_of(client, turn) -> (body, the text its answer must have). Refused ones wait and ask
    again: `refused` counts them, `unruly` those told no time, or one beyond a minute."""
    counts = dict.fromkeys(("answers", "wrong", "lost", "refused", "unruly"), 0)
    latest: list[float] = []
    end = time.perf_counter() + seconds

    async def client(i: int) -> None:
        turn = 0
        while time.perf_counter() < end:
            body, expected = body_of(i, turn)
            answer = await ask(port, "/v1/chat/completions", body)
            if answer.status == 429:
                counts["refused"] += 1
                counts["unruly"] += answer.retry_after is None or not 1 <= answer.retry_after <= 60
                await asyncio.sleep(min(answer.retry_after or 1, max(0.0, end - time.perf_counter())))
                continue
            turn += 1
            counts["answers"] += answer.whole
            counts["lost"] += not answer.whole
            counts["wrong"] += answer.whole and answer.text != expected
            latest.append(time.perf_counter() - answer.start)

    await asyncio.gather(*(client(i) for i in range(n_clients)))
    return {**counts, "answer_ms": spread(latest)}


async def disconnect(port: int, body: dict[str, Any]) -> bool:
    """Leave in the middle of a stream, abruptly -> whether there was one to leave."""
    for _ in range(60):
        reader, writer = await send(port, "POST", "/v1/chat/completions", body)
        status, headers = await read_head(reader)
        if status == 200:
            seen = 0
            async for event in events(read_body(reader, headers)):
                seen += 1
                ended = event is None or event["choices"][0]["finish_reason"]
                if ended or seen == 3:  # the role, then text
                    writer.transport.abort()  # no goodbye
                    return not ended
        writer.close()
        await asyncio.sleep(0.5)
    return False


async def read_metrics(port: int) -> dict[str, float]:
    reader, writer = await send(port, "GET", "/metrics")
    _, headers = await read_head(reader)
    text = b"".join([piece async for piece in read_body(reader, headers)]).decode()
    writer.close()
    lines = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in lines}


async def disconnects_check(port: int, n: int, body: dict[str, Any], at_once: int = 16) -> dict[str, Any]:
    """n disconnects, at_once together; then how long until /metrics shows no row and nothing waiting."""
    gate, left = asyncio.Semaphore(at_once), 0

    async def one() -> bool:
        async with gate:
            return await disconnect(port, body)

    left = sum(await asyncio.gather(*(one() for _ in range(n))))
    start = time.perf_counter()
    rows = waiting = math.inf
    while time.perf_counter() - start < 20:
        seen = await read_metrics(port)
        rows, waiting = seen["nanochat_rows_running"], seen["nanochat_requests_waiting"]
        if rows == waiting == 0:
            break
        await asyncio.sleep(0.05)
    found = {"disconnects": n, "in_the_middle": left, "rows_left": rows, "waiting_left": waiting}
    return {**found, "idle_after_s": round(time.perf_counter() - start, 2)}
