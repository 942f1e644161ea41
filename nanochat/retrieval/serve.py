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
import json
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException as StarletteHTTPException

from nanochat.common import run_script
from nanochat.config import UserError, load_config
from nanochat.retrieval import RETRIEVERS, Document, Hit, KnowledgeBase
from nanochat.web import Gate, address, first_faults, is_loopback, listen, own_names, run

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
        return is_loopback(self.host)


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


def make_app(kb: KnowledgeBase, cfg: ServeConfig) -> FastAPI:
    """The routes over an open base, which is closed when the app ends."""
    writing = threading.Lock()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        kb.close()

    app = FastAPI(title="nanochat retrieval", lifespan=lifespan)
    app.add_middleware(Gate, limit=cfg.max_body_bytes, error=_gate_error, hosts=own_names(cfg.host))
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


def _gate_error(status: int, message: str) -> JSONResponse:
    return _error(status, f"{message}: send less at a time" if status == 413 else message)


def _invalid(request: Request, e: Exception) -> JSONResponse:
    assert isinstance(e, RequestValidationError)
    return _error(400, first_faults(e)[0])


def main(argv: list[str]) -> None:
    if argv and not argv[0].startswith("-") and not argv[0].endswith(".py"):
        argv = ["--knowledge_base", *argv]
    cfg = load_config(ServeConfig, argv)
    kb = KnowledgeBase.open(cfg.knowledge_base)
    listener = listen(cfg.host, cfg.port)
    if not cfg.loopback:
        print("warning: not a loopback address; whoever reaches it may search" + " and write" * (not cfg.read_only))
    print(f"{cfg.knowledge_base}: {len(kb)} documents at {address(cfg.host, listener)}", flush=True)
    run(uvicorn.Config(make_app(kb, cfg), log_level="warning", timeout_graceful_shutdown=10), listener)


if __name__ == "__main__":
    run_script(main)
