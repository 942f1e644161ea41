"""Who may ask and how much, before any route sees the request; and errors in the shape OpenAI's clients read."""

import asyncio
import hmac
from collections.abc import Callable, Collection
from typing import Any
from urllib.parse import urlsplit

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN = ("/", "/health")  # without a key; as is /static/
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def error(
    status: int, message: str, code: str | None = None, param: str | None = None, retry_after: int | None = None
) -> JSONResponse:
    headers = {} if retry_after is None else {"retry-after": str(retry_after)}
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error_body(status, message, code, param), status, headers)


def error_body(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    kind = "server_error" if status >= 500 else TYPES.get(status, "invalid_request_error")
    clean = message.encode("utf-8", "replace").decode()  # a lone surrogate of the request has no UTF-8
    return {"error": {"message": clean, "type": kind, "param": param, "code": code}}


class Gate:
    """Refuses other hosts than `hosts` (where not empty), requests without the key (where there is one), bodies larger
    than `limit` bytes as soon as they say or show so, and bodies that are not there within `seconds`."""

    def __init__(
        self, app: ASGIApp, limit: int, seconds: float, api_key: str | None = None, hosts: Collection[str] = (),
        answered: Callable[[str, int], None] = lambda route, status: None,
    ) -> None:  # fmt: skip
        """answered: is told route and status of every response."""
        self.app, self.limit, self.seconds, self.hosts, self.answered = app, limit, seconds, hosts, answered
        self.key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.answered(getattr(scope.get("route"), "path", "other"), message["status"])
            await send(message)

        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self.refusal(scope["path"], headers)
        if refusal is not None:
            return await refusal(scope, receive, counted)
        stated = headers.get(b"content-length", "")
        try:
            body = await asyncio.wait_for(self.body(int(stated) if stated.isdigit() else 0, receive), self.seconds)
        except TimeoutError:
            return await error(408, f"the request was not there within {self.seconds:g} s")(scope, receive, counted)
        if body is None:
            return None
        if len(body) > self.limit:
            refusal = error(413, f"the request is larger than {self.limit} bytes", "request_too_large")
            return await refusal(scope, receive, counted)
        whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        return await self.app(scope, replay, counted)

    def refusal(self, path: str, headers: dict[bytes, str]) -> JSONResponse | None:
        host = _host_name(headers.get(b"host", ""))
        if self.hosts and host not in self.hosts:
            return error(400, f"host {host!r} is not this server's name")
        if self.key is None or path in OPEN or path.startswith("/static/"):
            return None
        scheme, _, given = headers.get(b"authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode("latin-1"), self.key):
            return None
        return error(401, "wrong or missing API key: send Authorization: Bearer KEY", "invalid_api_key")

    async def body(self, stated: int, receive: Receive) -> bytes | None:
        """What was sent, or more bytes than the limit where it is too much; None where the client has left."""
        body, more = bytearray(), True
        if stated > self.limit:
            return bytes(self.limit + 1)
        while more and len(body) <= self.limit:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
        return bytes(body)


def _host_name(header: str) -> str:
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""
