"""The official openai client against the app, in this process; the model says a script where a test needs its words."""

import asyncio
import contextlib
import json
import logging
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest
import uvicorn
from serving_model import make
from test_serving import scripted

from nanochat.engine import Engine, calculator
from nanochat.serving import prompts
from nanochat.serving.app import make_app
from nanochat.serving.exchange import EventStream, Exchange
from nanochat.serving.functions import Function, Functions
from nanochat.serving.metrics import Metrics
from nanochat.serving.scheduler import Limits, Scheduler
from nanochat.serving.service import Service, Settings
from nanochat.tools import PYTHON_TOKENS

openai: Any = pytest.importorskip("openai", reason="the openai package is not installed (the dev group has it)")

WEATHER = {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
TOOLS = [{"type": "function", "function": WEATHER}]
ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the weather?"}]
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
ANSWERED = [
    *ASKED,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
]
SETTINGS = Settings(model="tiny", default_tokens=60, api_key="secret", temperature=0)
LIMITS = Limits()


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(*make(["attn", "mamba2"]))


def saying(engine: Engine, messages: list[dict[str, Any]], text: list[str | int]) -> Engine:
    """An engine that answers these messages, with WEATHER at hand, by the text and the special ids in it."""
    turns = prompts.conversation(messages, Functions([Function.of(WEATHER)], engine.tokenizer))
    own = scripted(engine, text, len(prompts.chat_prompt(engine.tokenizer, turns).ids))
    return Engine(own.model, engine.tokenizer, [calculator(engine.tokenizer)])


def calling(engine: Engine) -> Engine:
    start, end, _, _ = (engine.tokenizer.encode_special(name) for name in PYTHON_TOKENS)
    return saying(engine, ASKED, ["Let me look.", start, "get_weather('Oslo')", end, "not said"])


@contextlib.asynccontextmanager
async def client_of(
    engine: Engine, settings: Settings = SETTINGS, key: str = "secret", limits: Limits = LIMITS
) -> AsyncIterator[Any]:
    app = make_app(Service([Scheduler(engine, limits)], settings))
    async with app.router.lifespan_context(app):
        http = httpx.AsyncClient(transport=httpx.ASGITransport(app=app))
        yield openai.AsyncOpenAI(base_url="http://localhost/v1", api_key=key, max_retries=0, http_client=http)


def talk(engine: Engine, work: Callable[[Any], Awaitable[Any]], **options: Any) -> Any:
    async def run() -> Any:
        async with client_of(engine, **options) as client:
            return await work(client)

    return asyncio.run(run())


def test_a_function_is_called_with_its_arguments(engine: Engine):
    answer = talk(calling(engine), lambda c: c.chat.completions.create(model="tiny", messages=ASKED, tools=TOOLS))
    [choice] = answer.choices
    [call] = choice.message.tool_calls
    assert (choice.finish_reason, choice.message.content, call.type) == ("tool_calls", "Let me look.", "function")
    assert call.function.name == "get_weather" and json.loads(call.function.arguments) == {"city": "Oslo"}


def test_a_streamed_call_is_put_together_by_the_clients_own_helper(engine: Engine):
    async def work(client: Any) -> tuple[list[Any], Any]:
        async with client.chat.completions.stream(model="tiny", messages=ASKED, tools=TOOLS) as stream:
            kinds = [event.type async for event in stream]
            return kinds, await stream.get_final_completion()

    kinds, whole = talk(calling(engine), work)
    [call] = whole.choices[0].message.tool_calls
    assert whole.choices[0].finish_reason == "tool_calls" and whole.choices[0].message.content == "Let me look."
    assert json.loads(call.function.arguments) == {"city": "Oslo"} and call.id.startswith("call-")
    assert "content.delta" in kinds and "tool_calls.function.arguments.done" in kinds


def test_the_result_of_the_call_is_answered_in_words(engine: Engine):
    own = saying(engine, ANSWERED, ["It rains in Oslo."])
    answer = talk(own, lambda c: c.chat.completions.create(model="tiny", messages=ANSWERED, tools=TOOLS))
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("It rains in Oslo.", "stop")


def test_a_conversation_goes_on_and_streams_the_same(engine: Engine):
    async def work(client: Any) -> tuple[Any, Any, str, Any]:
        models = [model.id async for model in await client.models.list()]
        first = await client.chat.completions.create(model="tiny", messages=ASKED, max_tokens=8)
        said = {"role": "assistant", "content": first.choices[0].message.content}
        options = {"model": "tiny", "messages": [*ASKED, said, *ASKED[1:]], "max_completion_tokens": 12, "n": 2}
        whole = await client.chat.completions.create(**options)
        stream = await client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
        chunks = [chunk async for chunk in stream]
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices and not c.choices[0].index)
        return models, whole, text, chunks[-1].usage

    models, whole, text, usage = talk(engine, work)
    assert models == ["tiny"] and text == whole.choices[0].message.content == whole.choices[1].message.content
    assert (usage.total_tokens, usage.completion_tokens) == (whole.usage.total_tokens, 24)


def test_embeddings_come_as_base64_and_as_numbers(engine: Engine):
    async def work(client: Any) -> list[Any]:
        kinds: list[dict[str, Any]] = [{}, {"encoding_format": "float"}]
        return [await client.embeddings.create(model="tiny", input=["the sea", "the river"], **kind) for kind in kinds]

    coded, plain = talk(engine, work)
    for one, other in zip(coded.data, plain.data, strict=True):
        assert len(one.embedding) == 32 and one.embedding == pytest.approx(other.embedding, abs=1e-6)


def test_completions_continue_a_text(engine: Engine):
    answer = talk(engine, lambda c: c.completions.create(model="tiny", prompt="the sea", max_tokens=5, temperature=0))
    assert answer.usage.completion_tokens == 5 and answer.choices[0].text


@pytest.mark.parametrize(
    ("error", "code", "request_", "options"),
    [
        ("AuthenticationError", "invalid_api_key", {}, {"key": "wrong"}),
        ("NotFoundError", "model_not_found", {"model": "gpt-9"}, {}),
        ("BadRequestError", "context_length_exceeded", {"messages": [{"role": "user", "content": "x " * 300}]}, {}),
        ("BadRequestError", None, {"temperature": -1}, {}),
        ("BadRequestError", None, {"messages": []}, {}),
        ("BadRequestError", None, {"tools": [{"type": "function", "function": {"name": "a b"}}]}, {}),
        ("RateLimitError", "queue_full", {"n": 2}, {"limits": Limits(max_rows=2, max_queue=0), "busy": True}),
        ("InternalServerError", "timeout", {}, {"settings": Settings("tiny", request_seconds=-1.0, api_key="secret")}),
    ],
)  # fmt: skip
def test_errors_arrive_as_the_clients_own(
    engine: Engine, error: str, code: str | None, request_: dict[str, Any], options: dict[str, Any]
):
    options = dict(options)
    busy = options.pop("busy", False)

    async def work(client: Any) -> Any:
        body = {"model": "tiny", "messages": ASKED, **request_}
        others = [client.chat.completions.create(**body, max_tokens=200) for _ in range(4 * busy)]
        results = await asyncio.gather(*others, client.chat.completions.create(**body), return_exceptions=True)
        return next(r for r in results if isinstance(r, Exception))

    found = talk(engine, work, **options)
    assert type(found).__name__ == error and found.code == code and "\n" not in found.message
    if busy:
        assert int(found.response.headers["retry-after"]) >= 1


def test_other_origins_are_let_in_only_where_named(engine: Engine):
    async def origins(named: tuple[str, ...]) -> list[str | None]:
        app = make_app(Service([Scheduler(engine)], Settings("tiny", cors_origins=named)))
        ask = {"origin": "http://a.b", "access-control-request-method": "POST"}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://localhost") as http:
            answers = [await http.options("/v1/models", headers=ask), await http.get("/v1/models", headers=ask)]
        return [answer.headers.get("access-control-allow-origin") for answer in answers]

    assert asyncio.run(origins(("http://a.b",))) == ["http://a.b"] * 2
    assert asyncio.run(origins(())) == asyncio.run(origins(("http://c.d",))) == [None] * 2


def test_a_stream_ends_where_its_client_breaks_off_however_much_is_ready(
    engine: Engine, caplog: pytest.LogCaptureFixture
):
    wire, written = socket.socket(), list[int]()

    async def lines() -> AsyncIterator[str]:
        yield "data: 0\n\n"
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() is a reset
        wire.close()
        for i in range(20):
            written.append(i)
            yield f"data: {i}\n\n"

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await EventStream(Exchange(Scheduler(engine), Metrics()), lines())(scope, receive, send)

    async def talk() -> None:
        server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_config=None, http="h11"))
        with socket.create_server(("127.0.0.1", 0)) as listener:
            wire.connect(listener.getsockname())
            wire.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            serving = asyncio.create_task(server.serve([listener]))
            async with asyncio.timeout(20):
                while not written:
                    await asyncio.sleep(0.01)
            server.should_exit = True
            await serving

    with caplog.at_level(logging.WARNING):
        asyncio.run(talk())
    assert len(written) < 5 and not caplog.records
