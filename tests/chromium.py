"""A real browser for tests: chromium without a window, driven over the DevTools protocol on a pipe (two file
descriptors and JSON ended by a zero byte), so that no package is needed. https://chromedevtools.github.io/devtools-protocol/
"""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import Empty, Queue
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless=new", "--no-sandbox", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu", "--in-process-gpu",
    "--disable-extensions", "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update",
    "--password-store=basic", "--hide-scrollbars", "--renderer-process-limit=1",
)  # fmt: skip
# The child's descriptors 3 and 4 are the pipe.
START = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)
WAIT_S = 30


def find_chromium() -> str | None:
    """Path of the program, or None; $CHROMIUM names another."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Chromium:
    """One browser."""

    def __init__(self, program: str, profile: Path) -> None:
        theirs_in, self.out = _high_pipe()
        self.inward, theirs_out = _high_pipe()
        argv = [
            sys.executable,
            "-c",
            START,
            str(theirs_in),
            str(theirs_out),
            program,
            *FLAGS,
            f"--user-data-dir={profile}",
        ]
        self.process = subprocess.Popen(argv, pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL)
        os.close(theirs_in)
        os.close(theirs_out)
        self.answers: dict[int, Queue[dict[str, Any]]] = {}
        self.pages: dict[str, Page] = {}
        self.last_id = 0
        threading.Thread(target=self._read, daemon=True).start()

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """One command -> its result. AssertionError where the browser refuses, or says nothing for WAIT_S."""
        self.last_id += 1
        message = {"id": self.last_id, "method": method, "params": params} | ({"sessionId": session} if session else {})
        self.answers[self.last_id] = answers = Queue[dict[str, Any]]()
        os.write(self.out, json.dumps(message).encode() + b"\0")
        try:
            answer = answers.get(timeout=WAIT_S)
        except Empty:
            raise AssertionError(f"no answer to {method}") from None
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def new_page(self, width: int = 1280, height: int = 800) -> "Page":
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        self.pages[session] = page
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.call(f"{domain}.enable")
        page.resize(width, height)
        return page

    def close(self) -> None:
        self.call("Browser.close")
        self.process.wait(WAIT_S)
        os.close(self.out)

    def _read(self) -> None:
        rest = b""
        while piece := os.read(self.inward, 1 << 16):
            *whole, rest = (rest + piece).split(b"\0")
            for message in map(json.loads, whole):
                if "id" in message:
                    self.answers.pop(message["id"]).put(message)
                elif page := self.pages.get(message.get("sessionId", "")):
                    page.events.append((message["method"], message["params"]))
        os.close(self.inward)


class Page:
    """One tab. events: what the browser told about it, as (method, params), oldest first."""

    def __init__(self, browser: Chromium, session: str) -> None:
        self.browser, self.session = browser, session
        self.events: list[tuple[str, dict[str, Any]]] = []

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **params)

    def go(self, url: str) -> None:
        seen = len(self.events)
        self.call("Page.navigate", url=url)
        wait(lambda: any(method == "Page.loadEventFired" for method, _ in self.events[seen:]), "the page's load")

    def js(self, expression: str) -> Any:
        """The value of an expression (a promise's, once it is there), as JSON can say it."""
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, (expression, result["exceptionDetails"])
        return result["result"].get("value")

    def wait(self, expression: str) -> Any:
        """Wait until the expression is true -> its value."""
        return wait(lambda: self.js(expression), expression)

    def text(self, selector: str) -> str:
        return self.js(f"document.querySelector({json.dumps(selector)})?.innerText")

    def click(self, selector: str, text: str | None = None) -> None:
        """Press the mouse where the last element of this selector (and text) is seen."""
        which = f"[...document.querySelectorAll({json.dumps(selector)})].filter(e => e.getClientRects().length)"
        which += f".filter(e => e.textContent.trim() === {json.dumps(text)})" if text else ""
        self.wait(f"{which}.length > 0")
        find = f"(e => (e.scrollIntoView({{block: 'nearest'}}), e.getBoundingClientRect()))({which}.at(-1))"
        x, y = self.js(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({find})")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def key(self, name: str, modifiers: int = 0) -> None:
        """modifiers: 1 Alt, 2 Ctrl, 8 Shift."""
        codes = {"Enter": 13, "Escape": 27, "ArrowUp": 38, "Tab": 9}
        base = {
            "key": name,
            "code": name,
            "windowsVirtualKeyCode": codes.get(name) or ord(name.upper()),
            "modifiers": modifiers,
        }
        typed = {"text": "\r"} if name == "Enter" else {"text": name} if len(name) == 1 and not modifiers & 2 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **base, **typed)
        self.call("Input.dispatchKeyEvent", type="keyUp", **base)

    def resize(self, width: int, height: int, mobile: bool = False) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1}
        self.call("Emulation.setDeviceMetricsOverride", **size, mobile=mobile)

    def theme(self, name: str) -> None:
        """What the system prefers: "light" or "dark"."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def requests(self) -> list[str]:
        """Addresses asked for so far."""
        return [params["request"]["url"] for method, params in self.events if method == "Network.requestWillBeSent"]

    def faults(self) -> list[str]:
        """Exceptions nobody caught, and what the browser complained about."""
        thrown = [str(p["exceptionDetails"]) for method, p in self.events if method == "Runtime.exceptionThrown"]
        logged = [p["entry"]["text"] for method, p in self.events if method == "Log.entryAdded"]
        return thrown + logged


def wait(reached: Callable[[], Any], what: str) -> Any:
    """-> the first true value of `reached`. AssertionError after WAIT_S."""
    end = time.monotonic() + WAIT_S
    while not (value := reached()):
        assert time.monotonic() < end, f"waited {WAIT_S} s for {what}"
        time.sleep(0.02)
    return value


def _high_pipe() -> tuple[int, int]:
    """(read end, write end) with numbers far from 3 and 4."""
    pipe = os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in pipe]
    for end in pipe:
        os.close(end)
    return high[0], high[1]
