"""Fetch large files over HTTP: resumed by Range, stalls cut off, size and content checked, retried with back-off.

A file arrives as `NAME.part` (its ETag beside it in `NAME.part.etag`, so a changed file is never glued to an old
half) and gets its name only after `check` accepted it. Standard library only.
"""

import contextlib
import http.client
import os
import random
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanochat.common import UserError, fsync_dir, raise_disk_error

BLOCK = 1 << 18  # bytes asked of the socket at once
PROGRESS = 1 << 20  # an attempt that gained this many bytes does not count as failed
GIVE_UP = (400, 401, 403, 404, 410)  # asking again will not help


class Trouble(Exception):
    """One attempt failed; another may succeed."""


class Stopped(Exception):
    """Another file failed for good, or the user pressed Ctrl-C."""


@dataclass
class Fetcher:
    """How to fetch: timeout and stall window in seconds, retries without progress, first pause of the back-off.

    check(path) raises ValueError or OSError where the content is wrong. on_bytes(n) hears of bytes gained (or lost
    again), on_size(n) of the whole size as the server tells it, on_retry(message) of each pause.
    """

    check: Callable[[Path], object]
    timeout: float = 30.0
    min_rate: float = 1024.0  # bytes/s below which, over one timeout, the connection counts as stalled
    retries: int = 5
    pause: float = 1.0
    max_pause: float = 60.0
    cure: str = ""
    on_bytes: Callable[[int], None] = lambda n: None
    on_size: Callable[[int], None] = lambda n: None
    on_retry: Callable[[str], None] = lambda message: None
    stop: threading.Event = field(default_factory=threading.Event)

    def fetch(self, url: str, path: Path) -> None:
        """Download url to path. Raises UserError when retries are used up, Stopped when `stop` is set."""
        part, failed = path.with_name(path.name + ".part"), 0
        self.on_bytes(_size(part))
        while True:
            before = _size(part)
            try:
                self._attempt(url, part)
                self._verify(part)
                _publish(part, path)
                return
            except (Trouble, OSError, http.client.HTTPException) as e:
                if isinstance(e, urllib.error.HTTPError) and e.code in GIVE_UP:
                    raise UserError(f"{url}: the server answers {e.code} {e.reason}{self._hint()}") from e
                failed = 0 if _size(part) - before >= PROGRESS else failed + 1
                if failed > self.retries:
                    raise UserError(f"{url}: gave up after {failed} attempts ({_reason(e)}){self._hint()}") from e
                wait = min(self.max_pause, self.pause * 2 ** max(failed - 1, 0)) * random.uniform(0.5, 1.5)
                wait = max(wait, _retry_after(e, self.max_pause))
                self.on_retry(f"{path.name}: {_reason(e)}; trying again in {wait:.1f} s ({failed} of {self.retries})")
                if self.stop.wait(wait):
                    raise Stopped from e

    def _hint(self) -> str:
        return f": {self.cure}" if self.cure else ""

    def _attempt(self, url: str, part: Path) -> None:
        """One request that adds what is missing to `part`; Trouble where it ends short."""
        have, etag_file = _size(part), part.with_name(part.name + ".etag")
        headers = {"User-Agent": "nanochat-turbo", "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
            if etag_file.is_file():
                headers["If-Range"] = etag_file.read_text()
        try:
            answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=self.timeout)
        except urllib.error.HTTPError as e:
            if e.code != 416 or not have:
                raise
            if _total(e.headers.get("Content-Range")) == have:
                return  # everything was there already
            self._discard(part)
            raise Trouble("the server refuses to resume: starting the file again") from e
        with contextlib.closing(answer):
            if answer.status == 206:
                start, total = _range(answer.headers.get("Content-Range"))
                if start != have:
                    self._discard(part)
                    raise Trouble(f"asked for bytes from {have}, the server sent from {start}")
            elif answer.status == 200:
                self._discard(part)
                have, total = 0, _number(answer.headers.get("Content-Length"))
            else:
                raise Trouble(f"the server answers {answer.status}")
            if total is not None:
                self.on_size(total)
            _keep_etag(etag_file, answer.headers.get("ETag"))
            self._receive(answer, part)
        if total is not None and _size(part) != total:
            raise Trouble(f"cut off at {_size(part)} of {total} bytes")

    def _receive(self, answer: Any, part: Path) -> None:
        """Append the body to `part`, giving up where a whole timeout brings fewer than min_rate bytes a second."""
        deadline, gained = time.monotonic() + self.timeout, 0
        try:
            f = open(part, "ab")  # noqa: SIM115 (closed by the `with` below)
        except OSError as e:
            raise_disk_error(e, part)
            raise
        with f:
            while block := answer.read1(BLOCK):
                if self.stop.is_set():
                    raise Stopped
                _write(f, block, part)
                self.on_bytes(len(block))
                gained += len(block)
                if time.monotonic() > deadline:
                    if gained < self.min_rate * self.timeout:
                        raise Trouble(f"stalled: {gained} bytes in {self.timeout:g} s")
                    deadline, gained = time.monotonic() + self.timeout, 0

    def _verify(self, part: Path) -> None:
        try:
            self.check(part)
        except (ValueError, OSError) as e:
            self._discard(part)
            raise Trouble(f"what came is not the file: {_reason(e.__cause__ or e)}") from e

    def _discard(self, part: Path) -> None:
        self.on_bytes(-_size(part))
        part.unlink(missing_ok=True)
        part.with_name(part.name + ".etag").unlink(missing_ok=True)


def _write(f: Any, block: bytes, part: Path) -> None:
    """A full disk is the user's to mend, not a reason to try again."""
    try:
        f.write(block)
        f.flush()
    except OSError as e:
        raise_disk_error(e, part)


def _publish(part: Path, path: Path) -> None:
    with open(part, "rb") as f:
        os.fsync(f.fileno())
    os.replace(part, path)
    part.with_name(part.name + ".etag").unlink(missing_ok=True)
    fsync_dir(path.parent)


def _keep_etag(file: Path, etag: str | None) -> None:
    if etag and not etag.startswith("W/"):  # If-Range takes strong tags only (RFC 9110, 13.1.5)
        file.write_text(etag)
    else:
        file.unlink(missing_ok=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() else None


def _range(text: str | None) -> tuple[int | None, int | None]:
    """`bytes 100-199/500` -> (100, 500)."""
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", text or "")
    return (int(found[1]), _number(found[2])) if found else (None, None)


def _total(text: str | None) -> int | None:
    """`bytes */500`, the answer beside 416 -> 500."""
    return _number((text or "").rpartition("/")[2])


def _retry_after(e: BaseException, longest: float) -> float:
    seconds = _number(e.headers.get("Retry-After")) if isinstance(e, urllib.error.HTTPError) else None
    return min(longest, seconds or 0)


def _reason(e: BaseException) -> str:
    reason = getattr(e, "reason", None) or e
    if isinstance(e, urllib.error.HTTPError):
        reason = f"{e.code} {e.reason}"
    return (str(reason).splitlines() or [type(e).__name__])[0][:200]
