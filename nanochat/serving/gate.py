"""Who may ask and how much, before any route sees the request; and errors in the shape OpenAI's clients read."""

import hmac
from collections.abc import Callable, Collection
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat import web

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


class Gate(web.Gate):
    """Refuses requests without the key, too, where there is one, and counts what is answered."""

    def __init__(
        self, app: ASGIApp, limit: int, seconds: float, api_key: str | None = None, hosts: Collection[str] = (),
        answered: Callable[[str, int], None] = lambda route, status: None,
    ) -> None:  # fmt: skip
        """answered: is told route and status of every response."""
        super().__init__(app, limit, _gate_error, hosts, seconds)
        self.answered, self.key = answered, None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.answered(getattr(scope.get("route"), "path", "other"), message["status"])
            await send(message)

        await super().__call__(scope, receive, counted)

    def refusal(self, path: str, headers: dict[bytes, str]) -> Response | None:
        refusal = super().refusal(path, headers)
        if refusal is not None or self.key is None or path in OPEN or path.startswith("/static/"):
            return refusal
        scheme, _, given = headers.get(b"authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode("latin-1"), self.key):
            return None
        return error(401, "wrong or missing API key: send Authorization: Bearer KEY", "invalid_api_key")


def _gate_error(status: int, message: str) -> JSONResponse:
    return error(status, message, "request_too_large" if status == 413 else None)
