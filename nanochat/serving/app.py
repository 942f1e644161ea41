"""The routes: OpenAI's API over the scheduler, the page, /health and /metrics.

/chat/completions and /stats are those of nanochat's own first server, for its clients.

Every error is {"error": {"message", "type", "param", "code"}}: 400 for what cannot work, 401 without the key, 404, 413
for too large a body, 429 with Retry-After where the queue is full, 503 where an answer took too long or
the knowledge base cannot be searched, 500.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException as StarletteHTTPException

from nanochat import web
from nanochat.config import UserError
from nanochat.serving import openai_api as api
from nanochat.serving import streams
from nanochat.serving.exchange import EventStream, Refusal, unknown
from nanochat.serving.gate import Gate, error
from nanochat.serving.scheduler import Delivery, deliver_here
from nanochat.serving.service import Service

HERE = Path(__file__).parent
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
REFUSED: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": api.ErrorBody, "description": "Refused: error.message says why"},
    "5XX": {"model": api.ErrorBody, "description": "No answer: it took too long, or the server is at fault"},
}
STREAMS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer, or with `stream` its chunks as server-sent events",
        "content": {"text/event-stream": {}},
    }
}


def make_app(service: Service) -> FastAPI:
    """The schedulers run as long as the app does."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()

        def deliver(events: list[Delivery]) -> None:
            loop.call_soon_threadsafe(deliver_here, events)

        for scheduler in service.schedulers:
            scheduler.deliver = deliver
            scheduler.start()
        yield
        for scheduler in service.schedulers:
            await asyncio.to_thread(scheduler.stop)
        if service.kb is not None:
            service.kb.close()

    app = FastAPI(title="nanochat", lifespan=lifespan, docs_url=None, redoc_url=None, responses=REFUSED)
    settings = service.settings
    app.add_middleware(
        Gate, limit=settings.max_body_bytes, seconds=settings.body_seconds, api_key=settings.api_key,
        hosts=settings.hosts, answered=service.metrics.answered,
    )  # fmt: skip
    if settings.cors_origins:
        headers = ["authorization", "content-type"]
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["*"], allow_headers=headers
        )
    add_errors(app)
    add_answers(app, service)
    add_state(app, service)
    add_page(app)
    return app


def add_errors(app: FastAPI) -> None:
    app.add_exception_handler(Refusal, _refusal)
    app.add_exception_handler(UserError, lambda request, e: error(400, str(e)))
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(StarletteHTTPException, _http)
    app.add_exception_handler(Exception, lambda request, e: error(500, f"internal error: {type(e).__name__}"))


def _refusal(request: Request, e: Exception) -> JSONResponse:
    assert isinstance(e, Refusal)
    return error(e.status, str(e), e.code, e.param, e.retry_after)


def _http(request: Request, e: Exception) -> JSONResponse:
    assert isinstance(e, StarletteHTTPException)
    return error(e.status_code, str(e.detail))


def _invalid(request: Request, e: Exception) -> JSONResponse:
    assert isinstance(e, RequestValidationError)
    causes, first = web.first_faults(e)
    return error(400, causes, param=first or None)


def add_answers(app: FastAPI, service: Service) -> None:
    model = service.settings.model

    @app.post("/v1/chat/completions", response_model=None, responses=STREAMS)
    async def chat(body: api.ChatBody, http: Request) -> Response:
        exchange = service.exchange()
        request, prompt = await run_in_threadpool(service.chat, body, exchange)
        exchange.submit([request])
        if body.stream:
            return EventStream(exchange, streams.chat_chunks(exchange, prompt, model, body.include_usage))
        return _json(await exchange.unless_gone(http, streams.chat_answer(exchange, prompt, model)))

    @app.post("/v1/completions", response_model=None, responses=STREAMS)
    async def complete(body: api.CompletionBody, http: Request) -> Response:
        exchange = service.exchange()
        exchange.submit(await run_in_threadpool(service.complete, body, exchange))
        if body.stream:
            return EventStream(exchange, streams.completion_chunks(exchange, model, body.include_usage))
        return _json(await exchange.unless_gone(http, streams.completion_answer(exchange, model)))

    @app.post("/chat/completions", response_model=None, responses=STREAMS)
    async def old_chat(body: api.ChatBody) -> Response:
        exchange = service.exchange()
        request, _ = await run_in_threadpool(service.chat, body.model_copy(update={"n": 1, "stream": True}), exchange)
        exchange.submit([request])
        return EventStream(exchange, streams.old_chunks(exchange))

    @app.post("/v1/embeddings", response_model=None)
    async def embed(body: api.EmbeddingBody) -> dict[str, Any]:
        vectors, n = await run_in_threadpool(service.embed, body)
        data = [api.embedding(v, i, body.encoding_format) for i, v in enumerate(vectors)]
        return {"object": "list", "data": data, "model": model, "usage": {"prompt_tokens": n, "total_tokens": n}}


def _json(answer: dict[str, Any] | None) -> Response:
    """An answer, or for a client that has left, nothing that it could read."""
    return Response(status_code=499) if answer is None else JSONResponse(answer)


def add_state(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.model_card]}

    @app.get("/v1/models/{name}")
    def one_model(name: str) -> dict[str, Any]:
        if name != service.settings.model:
            raise unknown(name)
        return service.model_card

    @app.get("/health", response_model=None)
    def health() -> Response:
        return JSONResponse(service.health(), 503 if service.broken else 200)

    @app.get("/stats")
    def stats() -> dict[str, Any]:
        return service.health()

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> Response:
        return PlainTextResponse(service.metrics_text(), media_type="text/plain; version=0.0.4")


def add_page(app: FastAPI) -> None:
    app.mount("/static", StaticFiles(directory=HERE / "static"), name="static")

    @app.get("/", include_in_schema=False)
    def page() -> Response:
        headers = {"content-security-policy": PAGE_POLICY, "x-content-type-options": "nosniff"}
        return FileResponse(HERE / "page.html", headers={**headers, "referrer-policy": "no-referrer"})
