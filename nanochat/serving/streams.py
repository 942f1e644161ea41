"""Answers of chat completions and completions, whole or as server-sent events."""

import json
from collections.abc import AsyncIterator
from typing import Any

from nanochat.serving import openai_api as api
from nanochat.serving.exchange import Exchange, Refusal
from nanochat.serving.gate import error_body
from nanochat.serving.prompts import Prompt
from nanochat.serving.request import Chosen, End, Piece, Request


class Written:
    """What one choice has said so far."""

    def __init__(self) -> None:
        self.text, self.chosen, self.end = "", list[Chosen](), End(0, "length", "", 0)

    def take(self, event: Any) -> None:
        self.text += event.text
        if isinstance(event, End):
            self.end = event
        elif event.chosen is not None:
            self.chosen.append(event.chosen)


async def collect(exchange: Exchange) -> list[Written]:
    """All choices, those of the first prompt first."""
    n = exchange.requests[0].n
    choices = [Written() for _ in range(n * len(exchange.requests))]
    async for place, event in exchange.events():
        if isinstance(event, Piece | End):
            choices[place * n + event.choice].take(event)
    return choices


def tokens_used(requests: list[Request], completion: int) -> dict[str, Any]:
    return api.usage(sum(len(r.prompt) for r in requests), completion, sum(r.cached for r in requests))


def head(kind: str, model: str) -> dict[str, Any]:
    prefix = {"chat.completion": "chatcmpl", "chat.completion.chunk": "chatcmpl"}.get(kind, "cmpl")
    return {"id": api.answer_id(prefix), "object": kind, "created": api.now(), "model": model}


async def chat_answer(exchange: Exchange, prompt: Prompt, model: str) -> dict[str, Any]:
    written, [request] = await collect(exchange), exchange.requests
    tokenizer = exchange.scheduler.engine.tokenizer
    choices = []
    for i, w in enumerate(written):
        content = None if w.end.call is not None and not w.text else w.text
        message = {"role": "assistant", "content": content, "refusal": None, **api.tool_calls(w.end.call)}
        logprobs = None if request.logprobs is None else api.chat_logprobs(tokenizer, w.chosen)
        choice = {"index": i, "message": message, "logprobs": logprobs, "finish_reason": w.end.reason}
        choices.append({**choice, **api.more(w.end, prompt)})
    used = tokens_used([request], sum(w.end.n_tokens for w in written))
    top = {key: choices[0][key] for key in ("sources", "trace") if key in choices[0]}
    return {**head("chat.completion", model), "choices": choices, "usage": used, **top}


async def chat_chunks(exchange: Exchange, prompt: Prompt, model: str, include_usage: bool) -> AsyncIterator[str]:
    """Each choice: its role, its text as it comes, then why it ended, with sources and trace where there are any."""
    frame, [request] = head("chat.completion.chunk", model), exchange.requests
    tokenizer, total = exchange.scheduler.engine.tokenizer, 0

    def chunk(i: int, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None, **more: Any) -> str:
        choice = {"index": i, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return sse({**frame, "choices": [choice], **({"usage": None} if include_usage else {}), **more})

    for i in range(request.n):
        yield chunk(i, {"role": "assistant", "content": ""})
    try:
        async for _, event in exchange.events():
            if isinstance(event, Piece):
                nats = None if event.chosen is None else api.chat_logprobs(tokenizer, [event.chosen])
                yield chunk(event.choice, {"content": event.text}, None, nats)
            elif isinstance(event, End):
                if event.text:
                    yield chunk(event.choice, {"content": event.text})
                total += event.n_tokens
                if event.call is not None:
                    yield chunk(event.choice, api.tool_calls(event.call, index=True))
                yield chunk(event.choice, {}, event.reason, **api.more(event, prompt))
    except Refusal as e:
        yield sse(error_body(e.status, str(e), e.code))
    else:
        if include_usage:
            yield sse({**frame, "choices": [], "usage": tokens_used([request], total)})
    yield "data: [DONE]\n\n"


async def old_chunks(exchange: Exchange) -> AsyncIterator[str]:
    """The events of nanochat's own first server: {"token": text} as it comes, then {"done": true}."""
    try:
        async for _, event in exchange.events():
            if isinstance(event, Piece | End) and event.text:
                yield sse({"token": event.text})
    except Refusal as e:
        yield sse(error_body(e.status, str(e), e.code))
    yield sse({"done": True})


async def completion_answer(exchange: Exchange, model: str) -> dict[str, Any]:
    written, requests = await collect(exchange), exchange.requests
    tokenizer = exchange.scheduler.engine.tokenizer
    choices = []
    for i, w in enumerate(written):
        logprobs = None if requests[0].logprobs is None else api.completion_logprobs(tokenizer, w.chosen)
        choices.append({"index": i, "text": w.text, "logprobs": logprobs, "finish_reason": w.end.reason})
    used = tokens_used(requests, sum(w.end.n_tokens for w in written))
    return {**head("text_completion", model), "choices": choices, "usage": used}


async def completion_chunks(exchange: Exchange, model: str, include_usage: bool) -> AsyncIterator[str]:
    frame, requests, total = head("text_completion", model), exchange.requests, 0
    tokenizer, n = exchange.scheduler.engine.tokenizer, exchange.requests[0].n
    said = [0] * (n * len(requests))  # characters

    try:
        async for place, event in exchange.events():
            if not isinstance(event, Piece | End):
                continue
            i = place * n + event.choice
            reason, nats = None, None
            if isinstance(event, End):
                reason, total = event.reason, total + event.n_tokens
            elif event.chosen is not None:
                nats = api.completion_logprobs(tokenizer, [event.chosen], said[i])
            said[i] += len(event.text)
            choice = {"index": i, "text": event.text, "logprobs": nats, "finish_reason": reason}
            yield sse({**frame, "choices": [choice], **({"usage": None} if include_usage else {})})
    except Refusal as e:
        yield sse(error_body(e.status, str(e), e.code))
    else:
        if include_usage:
            yield sse({**frame, "choices": [], "usage": tokens_used(requests, total)})
    yield "data: [DONE]\n\n"


def sse(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, allow_nan=False)}\n\n"
