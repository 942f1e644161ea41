"""What every HTTP service of ours does alike: where it listens, whom it answers, how much of a request it reads."""

import asyncio
import contextlib
import ipaddress
import signal
import socket
import sys
from collections.abc import Callable, Collection
from urllib.parse import urlsplit

import uvicorn
from fastapi.exceptions import RequestValidationError
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat.config import UserError

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def own_names(host: str) -> tuple[str, ...]:
    """What requests may call a service that listens on `host`; () = anything. On loopback no web page can then reach it
    by another name."""
    return (*LOOPBACK, host) if is_loopback(host) else ()


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


def address(host: str, listener: socket.socket) -> str:
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listener.getsockname()[1]}"


def run(settings: uvicorn.Config, listener: socket.socket) -> None:
    """Until SIGTERM, which ends the process with code 0."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn ends its work first, then raises the signal again
    uvicorn.Server(settings).run(sockets=[listener])


def first_faults(e: RequestValidationError) -> tuple[str, str]:
    """What pydantic found: causes of the first mistakes as one line, field of the very first ("" = the whole body)."""
    found = [(".".join(str(part) for part in fault["loc"] if part != "body"), fault["msg"]) for fault in e.errors()[:3]]
    return "; ".join(f"{place}: {cause}" if place else cause for place, cause in found), found[0][0] if found else ""


class Gate:
    """Refuses a request to another host than `hosts` (where not empty), one that is larger than `limit` bytes as soon
    as it says or shows so, and one that is not there within `seconds`. error: (status, message) -> the answer."""

    def __init__(
        self, app: ASGIApp, limit: int, error: Callable[[int, str], Response], hosts: Collection[str] = (),
        seconds: float | None = None,
    ) -> None:  # fmt: skip
        self.app, self.limit, self.error, self.hosts, self.seconds = app, limit, error, hosts, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self.refusal(scope["path"], headers)
        if refusal is not None:
            return await refusal(scope, receive, send)
        stated = headers.get(b"content-length", "")
        try:
            body = await asyncio.wait_for(self.body(int(stated) if stated.isdigit() else 0, receive), self.seconds)
        except TimeoutError:
            refusal = self.error(408, f"the request was not there within {self.seconds:g} s")
            return await refusal(scope, receive, send)
        if body is None:
            return None
        if len(body) > self.limit:
            return await self.error(413, f"the request is larger than {self.limit} bytes")(scope, receive, send)
        whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        return await self.app(scope, replay, send)

    def refusal(self, path: str, headers: dict[bytes, str]) -> Response | None:
        """The answer to a request that is refused before its body is read."""
        host = _host_name(headers.get(b"host", ""))
        return (
            self.error(400, f"host {host!r} is not this server's name")
            if self.hosts and host not in self.hosts
            else None
        )

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
