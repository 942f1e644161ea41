"""A knowledge base over HTTP, for other programs.

    python -m nanochat.retrieval.serve rag_data/knowledge_base --port 8100

    POST   /search     {"queries": ["..."], "k": 5, "retriever": null, "where": null}
                       -> {"version", "hits": [[{"id", "title", "text", "start", "end", "score", "rank", ...}]]}
    POST   /documents  {"documents": [{"id", "text", "title"?, "metadata"?}], "replace": false} -> {"version", "added"}
    DELETE /documents  {"ids": ["..."]} -> {"version", "deleted"}
    GET    /health     -> {"status": "ok", "version", "documents", "chunks", "retriever", "read_only"}

Every error is {"error": {"message", "type"}}. There is no password: it listens on loopback unless told otherwise, and
then only to requests that name a loopback host, so that no web page can reach it by another name. Searches run while
documents are added; one write runs at a time.
"""

import contextlib
import ipaddress
import json
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat.common import run_script
from nanochat.config import UserError, load_config
from nanochat.retrieval import RETRIEVERS, Document, Hit, KnowledgeBase

LOOPBACK = ("localhost", "127.0.0.1", "::1")
TYPES = {403: "read_only", 404: "not_found", 405: "not_found", 413: "too_large"}  # all others: bad_request


@dataclass(frozen=True)
class ServeConfig:
    """Serve a knowledge base over HTTP: python -m nanochat.retrieval.serve KNOWLEDGE_BASE --port 8100"""

    SHORT: ClassVar = {"p": "port"}

    knowledge_base: Annotated[str, "folder, or opensearch://host:9200/name; may stand first without its name"]
    host: Annotated[str, "address to listen on"] = "127.0.0.1"
    port: Annotated[int, "-p: 0 = any that is free"] = 8100
    read_only: Annotated[bool, "refuse to add and delete"] = False
    max_body_bytes: Annotated[int, "size of a request"] = 8_000_000
    max_queries: Annotated[int, "queries of one search"] = 256
    max_query_chars: Annotated[int, "length of a query"] = 10_000
    max_k: Annotated[int, "hits of each query"] = 100
    max_documents: Annotated[int, "documents (or ids) of one write"] = 1000

    def __post_init__(self) -> None:
        limits = ("max_body_bytes", "max_queries", "max_query_chars", "max_k", "max_documents")
        small = [name for name in limits if getattr(self, name) < 1]
        if small or not 0 <= self.port < 2**16:
            raise ValueError(
                f"port={self.port}: expected 0 to 65535" if not small else f"{small[0]} must be at least 1"
            )

    @property
    def loopback(self) -> bool:
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(self.host).is_loopback
        return self.host == "localhost"


def _sendable(value: Any) -> Any:
    """ValueError for what JSON in UTF-8 cannot say: NaN, half of a surrogate pair."""
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    return value


Text = Annotated[str, AfterValidator(_sendable)]
Values = Annotated[dict[str, Any], AfterValidator(_sendable)]


class Body(BaseModel):
    """Unknown fields are refused, and nothing is converted: "5" is no number."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Search(Body):
    queries: list[Text] = Field(min_length=1)
    k: int = Field(default=5, ge=1)
    retriever: Text | None = None
    where: Values | None = None


class NewDocument(Body):
    id: Text = Field(min_length=1)
    text: Text
    title: Text = ""
    metadata: Values = {}


class Add(Body):
    documents: list[NewDocument] = Field(min_length=1)
    replace: bool = False


class Delete(Body):
    ids: list[Text] = Field(min_length=1)


class Gate:
    """Refuses a request that is larger than `limit` bytes, as soon as it says or shows so, or that names another host
    than `hosts` (any host where that is empty)."""

    def __init__(self, app: ASGIApp, limit: int, hosts: Collection[str] = ()) -> None:
        self.app, self.limit, self.hosts = app, limit, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = _host_name(headers.get(b"host", ""))
        if self.hosts and host not in self.hosts:
            return await _error(400, f"host {host!r} is not this server's name")(scope, receive, send)
        stated = headers.get(b"content-length", "")
        size, body, more = int(stated) if stated.isdigit() else 0, b"", True
        while more and max(size, len(body)) <= self.limit:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body, more = body + message.get("body", b""), message.get("more_body", False)
        if max(size, len(body)) > self.limit:
            refusal = _error(413, f"the request is larger than {self.limit} bytes: send less at a time")
            return await refusal(scope, receive, send)
        whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        return await self.app(scope, replay, send)


def _host_name(header: str) -> str:
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""


def make_app(kb: KnowledgeBase, cfg: ServeConfig) -> FastAPI:
    """The routes over an open base, which is closed when the app ends."""
    writing = threading.Lock()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        kb.close()

    app = FastAPI(title="nanochat retrieval", lifespan=lifespan)
    app.add_middleware(Gate, limit=cfg.max_body_bytes, hosts=(*LOOPBACK, cfg.host) if cfg.loopback else ())
    app.add_exception_handler(UserError, lambda request, e: _error(400, str(e)))
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(StarletteHTTPException, _refused)
    app.add_exception_handler(Exception, lambda request, e: _error(500, f"internal error: {type(e).__name__}"))

    def newest() -> None:
        """Take what other processes wrote; while this one writes, it does so itself."""
        if writing.acquire(blocking=False):
            try:
                kb.refresh()
            finally:
                writing.release()

    def check_writable(count: int) -> None:
        if cfg.read_only:
            raise HTTPException(403, "this server only reads: start it without --read_only")
        if count > cfg.max_documents:
            raise HTTPException(413, f"{count} documents at once, at most {cfg.max_documents} are taken")

    @app.post("/search")
    def search(body: Search) -> dict[str, Any]:
        check_search(body, cfg, kb.manifest["retriever"])
        newest()
        hits = kb.search(body.queries, k=body.k, retriever=body.retriever, where=body.where)
        return {"version": kb.version, "hits": [[hit_json(hit) for hit in row] for row in hits]}

    @app.post("/documents")
    def add(body: Add) -> dict[str, Any]:
        check_writable(len(body.documents))
        with writing:
            added = kb.add([Document(d.id, d.text, d.title, d.metadata) for d in body.documents], replace=body.replace)
            return {"version": kb.version, "added": added}

    @app.delete("/documents")
    def delete(body: Delete) -> dict[str, Any]:
        check_writable(len(body.ids))
        with writing:
            deleted = kb.delete(body.ids)
            return {"version": kb.version, "deleted": deleted}

    @app.get("/health")
    def health() -> dict[str, Any]:
        newest()
        state = {"version": kb.version, "documents": len(kb), "chunks": kb.n_chunks}
        return {"status": "ok", **state, "retriever": kb.manifest["retriever"], "read_only": cfg.read_only}

    return app


def check_search(body: Search, cfg: ServeConfig, default: str) -> None:
    """UserError for what is over a limit. Retrievers go by name here: "package.module:Class" would import anything."""
    if len(body.queries) > cfg.max_queries:
        raise UserError(f"{len(body.queries)} queries at once, at most {cfg.max_queries} are taken")
    longest = max(map(len, body.queries))
    if longest > cfg.max_query_chars:
        raise UserError(f"a query of {longest} characters, at most {cfg.max_query_chars} are taken")
    if body.k > cfg.max_k:
        raise UserError(f"k={body.k}: at most {cfg.max_k}")
    if body.retriever not in (None, default, *RETRIEVERS):
        raise UserError(f"unknown retriever {body.retriever!r}: choose from {', '.join(RETRIEVERS)}")


def hit_json(hit: Hit) -> dict[str, Any]:
    """text is that of the chunk: characters start to end of the document's."""
    document, chunk = hit.document, hit.chunk
    where = {"text": chunk.text, "start": chunk.start, "end": chunk.end}
    how = {"score": float(hit.score), "rank": hit.rank, "source": hit.source, "trace": list(hit.trace)}
    return {"id": document.id, "title": document.title, **where, **how, "metadata": document.metadata}


def _error(status: int, message: str) -> JSONResponse:
    kind = "internal" if status >= 500 else TYPES.get(status, "bad_request")
    return JSONResponse({"error": {"message": message, "type": kind}}, status)


def _refused(request: Request, e: Exception) -> JSONResponse:
    assert isinstance(e, StarletteHTTPException)
    return _error(e.status_code, str(e.detail))


def _invalid(request: Request, e: Exception) -> JSONResponse:
    """What pydantic found, as one line: field and cause of the first mistakes."""
    assert isinstance(e, RequestValidationError)
    causes = []
    for fault in e.errors()[:3]:
        place = ".".join(str(part) for part in fault["loc"] if part != "body")
        causes.append(f"{place}: {fault['msg']}" if place else fault["msg"])
    return _error(400, "; ".join(causes))


def listen(host: str, port: int) -> socket.socket:
    """UserError where the port is taken or the address is not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)  # who calls before the server runs waits
    except OSError as e:
        raise UserError(f"cannot listen on {host}:{port} ({e.strerror}): choose another with --host or --port") from e
    return listener


def main(argv: list[str]) -> None:
    if argv and not argv[0].startswith("-") and not argv[0].endswith(".py"):
        argv = ["--knowledge_base", *argv]
    cfg = load_config(ServeConfig, argv)
    kb = KnowledgeBase.open(cfg.knowledge_base)
    listener = listen(cfg.host, cfg.port)
    if not cfg.loopback:
        print("warning: not a loopback address; whoever reaches it may search" + " and write" * (not cfg.read_only))
    shown = f"[{cfg.host}]" if ":" in cfg.host else cfg.host
    print(f"{cfg.knowledge_base}: {len(kb)} documents at http://{shown}:{listener.getsockname()[1]}", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn ends its work first, then raises the signal again
    settings = uvicorn.Config(make_app(kb, cfg), log_level="warning", timeout_graceful_shutdown=10)
    uvicorn.Server(settings).run(sockets=[listener])


if __name__ == "__main__":
    run_script(main)
