"""The page in a real browser, before a server that says what each test scripts. Skipped where there is no chromium."""

import itertools
import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Queue
from typing import Any, Literal
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from nanochat.common import REPO_DIR

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WAIT_MS = 20_000  # for one thing to come
LIMIT_S = 60  # for a whole test
expect.set_options(timeout=WAIT_MS)
DESKTOP: dict[str, Any] = {"viewport": {"width": 1280, "height": 800}}
PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "is_mobile": True}
FOLDER = REPO_DIR / "nanochat" / "serving"
TYPES = {".js": "text/javascript", ".css": "text/css", ".html": "text/html; charset=utf-8"}
SOURCES = [
    {
        "n": 1,
        "id": "mill",
        "title": "The mill",
        "text": "Ada Byron runs the mill. It is old.",
        "score": 2.5,
        "cited": True,
    },
    {"n": 2, "id": "weir", "title": "The weir", "text": "Water falls over the weir.", "score": 1.25, "cited": False},
]
TRACE = [{"query": "who runs the mill", "titles": ["The mill"]}, {"query": "Ada Byron", "titles": []}]
HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"


class Server(ThreadingHTTPServer):
    """Serves the page's files. Each chat request is kept in `asked` and answered by `script`: either a function of the
    request that returns chunks of text, dicts (merged into the chunk) or Queues (whose items follow as they come, None
    ends), or (status, headers, body)."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reset()

    def reset(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.headers_seen: list[dict[str, str]] = []
        self.script: Callable[[dict[str, Any]], Any] = lambda body: ["Hello."]
        self.models: list[dict[str, Any]] = [{"id": "tiny"}, {"id": "other"}]
        self.key = ""
        self.gone = threading.Event()  # a client left in the middle of an answer

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is said on stderr."""

    @property
    def fake(self) -> Server:
        assert isinstance(self.server, Server)
        return self.server

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        name = "page.html" if path == "/" else path[1:]
        file = FOLDER / name
        if path == "/v1/models":
            if not self.refused():
                self.send(200, {}, json.dumps({"object": "list", "data": self.fake.models}))
        elif re.fullmatch(r"page\.html|static/\w+\.\w+", name) and file.is_file():
            self.send(200, {"Content-Type": TYPES[file.suffix]}, file.read_text())
        else:
            self.send(404, {}, "{}")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.refused():
            return
        self.fake.asked.append(body)
        reply = self.fake.script(body)
        if isinstance(reply, tuple):
            self.send(*reply)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        try:
            for piece in unfolded(reply):
                self.wfile.write(piece if isinstance(piece, bytes) else event(piece))
                self.wfile.flush()
            self.wfile.write(
                event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}) + b"data: [DONE]\n\n"
            )
        except (BrokenPipeError, ConnectionResetError):
            self.fake.gone.set()

    def refused(self) -> bool:
        key = self.fake.key
        if not key or self.headers.get("Authorization") == f"Bearer {key}":
            return False
        self.send(
            401, {}, json.dumps({"error": {"message": "wrong API key", "type": "auth", "param": None, "code": None}})
        )
        return True

    def send(self, status: int, headers: dict[str, str], body: str) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body.encode())),
            **headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body.encode())


def event(piece: str | dict[str, Any]) -> bytes:
    chunk = {"object": "chat.completion.chunk", "choices": []}
    if isinstance(piece, str):
        chunk["choices"] = [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]
    else:
        chunk |= piece
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode()


def unfolded(pieces: Any) -> Iterator[Any]:
    for piece in pieces:
        if isinstance(piece, Queue):
            while (item := piece.get(timeout=30)) is not None:
                yield item
        else:
            yield piece


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The system's browser, or the one $CHROMIUM names; never one that playwright downloads."""
    program = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("needs chromium: apt-get install chromium, or set CHROMIUM to a browser of its family")
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=program) as browser:
        yield browser


@pytest.fixture(scope="module")
def browser_pid(browser: Browser) -> int:
    processes = browser.new_browser_cdp_session().send("SystemInfo.getProcessInfo")["processInfo"]
    return next(process["id"] for process in processes if process["type"] == "browser")


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def server(running: Server) -> Server:
    running.reset()
    return running


@pytest.fixture
def faults() -> list[str]:
    """Exceptions nobody caught, and everything on the page's console."""
    return []


@pytest.fixture
def page(
    browser: Browser, browser_pid: int, server: Server, faults: list[str], request: pytest.FixtureRequest
) -> Iterator[Page]:
    """The page, opened with nothing stored; the test fails where it threw, or the browser reported a fault of it.
    A parameter is a device other than DESKTOP."""
    with killed_late(browser_pid), browser.new_page(**getattr(request, "param", DESKTOP)) as page:
        page.set_default_timeout(WAIT_MS)
        page.on("pageerror", lambda thrown: faults.append(str(thrown)))
        page.on("console", lambda message: faults.append(message.text))
        open_page(page, server)
        yield page
    assert [fault for fault in faults if not re.search("status of [45]|ERR_INCOMPLETE", fault)] == []


@contextmanager
def killed_late(pid: int) -> Iterator[None]:
    """Kill the browser after LIMIT_S: for a page that loops, evaluate() and expect() wait without end."""
    timer = threading.Timer(LIMIT_S, os.kill, (pid, signal.SIGKILL))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def open_page(page: Page, server: Server) -> None:
    page.goto(server.url)
    expect(page.locator("#model option")).not_to_have_count(0)


def ask(page: Page, text: str) -> None:
    page.fill("#input", text)
    page.press("#input", "Enter")


def ask_and_wait(page: Page, text: str) -> str:
    """-> the text of the answer."""
    before = page.locator(".message.assistant").count()
    ask(page, text)
    expect(page.locator(".message.assistant:not(.running)")).to_have_count(before + 1)
    return answer(page).inner_text()


def answer(page: Page) -> Locator:
    """The last one's text."""
    return page.locator(".message.assistant .content").last


def shows(page: Page, text: str) -> None:
    """Wait until this is the last answer."""
    expect(answer(page)).to_have_text(text, use_inner_text=True)


def done(page: Page) -> None:
    expect(page.locator(".message.assistant")).not_to_have_count(0)
    expect(page.locator(".running")).to_have_count(0)


def click(page: Page, name: str) -> None:
    """Press the last button of this name."""
    page.get_by_role("button", name=name, exact=True).last.click()


def unfold(page: Page) -> None:
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")


# ---- a conversation ----


def test_an_answer_is_shown_while_it_is_written(page: Page, server: Server) -> None:
    pieces: Queue[Any] = Queue()
    server.script = lambda body: [pieces]
    ask(page, "Hi")
    pieces.put("One **bo")
    shows(page, "One **bo")
    assert page.inner_text("#send") == "Stop"
    pieces.put("ld** word")
    shows(page, "One bold word")
    assert page.text_content(".content strong") == "bold"
    pieces.put({"usage": {"prompt_tokens": 3, "completion_tokens": 7, "total_tokens": 10}})
    pieces.put(None)
    done(page)
    assert page.inner_text("#send") == "Send"
    assert "7 tokens" in page.inner_text(".message.assistant footer")
    assert server.asked[0]["messages"] == [{"role": "user", "content": "Hi"}]
    assert server.asked[0]["model"] == "tiny" and server.asked[0]["stream"] is True


def test_characters_split_between_network_pieces_arrive_whole(page: Page, server: Server) -> None:
    raw = event("naïve 日本 🙂") + b": a comment\n\n" + event("\r\n!").replace(b"\n\n", b"\r\n\r\n")
    cuts = [0, raw.index("日".encode()) + 1, raw.index("🙂".encode()) + 2, raw.index(b"\r\n") + 1, len(raw)]

    def slowly(body: dict[str, Any]) -> Iterator[bytes]:
        for start, end in itertools.pairwise(cuts):
            time.sleep(0.1)  # or the pieces travel as one
            yield raw[start:end]

    server.script = slowly
    assert ask_and_wait(page, "Hi").split() == ["naïve", "日本", "🙂", "!"]


def test_stop_closes_the_connection_and_keeps_what_was_written(page: Page, server: Server) -> None:
    def forever() -> Iterator[str]:
        while not server.gone.wait(0.02):
            yield "word "

    server.script = lambda body: forever()
    ask(page, "Hi")
    expect(answer(page)).to_contain_text("word word word", use_inner_text=True)
    click(page, "Stop")
    done(page)
    assert server.gone.wait(10)
    assert "word word" in answer(page).inner_text() and "Stopped" in page.inner_text(".message.assistant footer")
    server.script = lambda body: ["Fine."]
    assert ask_and_wait(page, "And now?") == "Fine."
    assert [m["role"] for m in server.asked[1]["messages"]] == ["user", "assistant", "user"]


def test_escape_stops_and_keys_do_the_rest(page: Page, server: Server) -> None:
    pieces: Queue[Any] = Queue()
    server.script = lambda body: [pieces]
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("/")
    expect(page.locator("#input")).to_be_focused()
    page.keyboard.insert_text("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.insert_text("two")
    assert page.input_value("#input") == "one\ntwo" and not server.asked
    page.keyboard.press("Enter")
    pieces.put("Wor")
    shows(page, "Wor")
    page.keyboard.press("Escape")
    done(page)
    pieces.put(None)
    page.keyboard.press("ArrowUp")
    assert page.evaluate("document.activeElement.value") == "one\ntwo"
    page.keyboard.press("Escape")
    page.keyboard.press("Control+Shift+O")
    expect(page.locator(".message")).to_have_count(0)


def test_an_answer_comes_again_and_the_first_one_is_kept(page: Page, server: Server) -> None:
    server.script = lambda body: [f"Answer {len(server.asked)}."]
    ask_and_wait(page, "Hi")
    click(page, "Regenerate")
    shows(page, "Answer 2.")
    done(page)
    assert server.asked[0] == server.asked[1]
    click(page, "Version before")
    shows(page, "Answer 1.")
    ask_and_wait(page, "Go on")
    assert [m["content"] for m in server.asked[2]["messages"]] == ["Hi", "Answer 1.", "Go on"]


def test_an_edited_question_starts_a_branch(page: Page, server: Server) -> None:
    server.script = lambda body: [f"Answer to {body['messages'][-1]['content']}."]
    ask_and_wait(page, "first")
    ask_and_wait(page, "second")
    page.get_by_role("button", name="Edit", exact=True).first.click()
    page.keyboard.press("Control+A")
    page.keyboard.insert_text("changed")
    page.keyboard.press("Enter")
    shows(page, "Answer to changed.")
    done(page)
    assert server.asked[-1]["messages"] == [{"role": "user", "content": "changed"}]
    assert page.locator(".message").count() == 2
    click(page, "Version before")
    shows(page, "Answer to second.")


def test_copy_gives_the_markdown(page: Page, server: Server) -> None:
    server.script = lambda body: ["Some **bold** `code`."]
    ask_and_wait(page, "Hi")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    click(page, "Copy")
    expect(page.get_by_role("button", name="Copied", exact=True)).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == "Some **bold** `code`."


# ---- history ----


def test_conversations_outlive_a_reload(page: Page, server: Server) -> None:
    server.script = lambda body: ["Kept.", {"sources": SOURCES}]
    ask_and_wait(page, "Remember me")
    page.reload()
    assert answer(page).inner_text() == "Kept."
    assert page.locator(".source").count() == 2
    page.click("#new")
    expect(page.locator(".message")).to_have_count(0)
    ask_and_wait(page, "Another one")
    assert page.locator("#history a").all_text_contents() == ["Another one", "Remember me"]
    page.get_by_role("link", name="Remember me", exact=True).click()
    shows(page, "Kept.")
    page.click("#history li.current [title=Delete]")
    expect(page.locator("#history a")).to_have_count(1)
    click(page, "Undo")
    expect(page.locator("#history a")).to_have_count(2)
    page.click("#history li.current [title=Rename]")
    page.keyboard.insert_text("New name")
    page.keyboard.press("Enter")
    expect(page.locator("#history li.current a")).to_have_text("New name")
    assert page.title() == "New name"


def test_a_conversation_deleted_while_it_is_answered_stays_deleted(page: Page, server: Server) -> None:
    pieces: Queue[Any] = Queue()
    server.script = lambda body: [pieces]
    ask(page, "Hi")
    pieces.put("Begun")
    shows(page, "Begun")
    page.click("#history li.current [title=Delete]")
    pieces.put("more" * 1000)
    pieces.put(None)
    expect(page.locator(".message")).to_have_count(0)
    server.script = lambda body: ["Fine."]
    ask_and_wait(page, "Another")
    assert page.locator("#history a").all_text_contents() == ["Another"]
    assert page.evaluate("Object.keys(localStorage).filter(key => key.startsWith('nanochat.chat.')).length") == 1


def test_an_answer_goes_on_while_another_conversation_is_shown(page: Page, server: Server) -> None:
    pieces: Queue[Any] = Queue()
    server.script = lambda body: [pieces] if body["messages"][-1]["content"] == "slow" else ["Quick."]
    ask(page, "slow")
    pieces.put("Begun ")
    shows(page, "Begun")
    page.click("#new")
    assert ask_and_wait(page, "quick") == "Quick."
    pieces.put("and ended.")
    pieces.put(None)
    page.get_by_role("link", name="slow", exact=True).click()
    shows(page, "Begun and ended.")


def test_a_full_storage_is_said(page: Page, server: Server) -> None:
    page.evaluate("""for (let n = 1 << 22; n > 8; n >>= 1) {
        try { for (let i = 0; ; i++) localStorage.setItem(`fill.${n}.${i}`, 'x'.repeat(n)) } catch {} }""")
    ask_and_wait(page, "Hi")
    assert "no room" in page.inner_text("#notice")


# ---- what is sent ----


def test_settings_are_sent_and_kept_and_wrong_ones_are_not(page: Page, server: Server) -> None:
    page.click("#options")
    fields = {
        "temperature": "0.7",
        "top_p": "0.9",
        "top_k": "40",
        "seed": "7",
        "max_tokens": "99",
        "system": "Be brief.",
        "stop": "A\nB",
    }
    for name, value in {**fields, "min_p": "3"}.items():
        page.fill(f"#settings [name={name}]", value)
    assert "not used" in page.inner_text("#settings-form")
    ask_and_wait(page, "Hi")
    body = server.asked[0]
    assert {name: body[name] for name in ("temperature", "top_p", "top_k", "seed", "max_tokens", "stop")} == {
        "temperature": 0.7, "top_p": 0.9, "top_k": 40, "seed": 7, "max_tokens": 99, "stop": ["A", "B"],
    }  # fmt: skip
    assert body["messages"][0] == {"role": "system", "content": "Be brief."} and "min_p" not in body
    page.goto(server.url)
    assert page.input_value("#settings [name=top_k]") == "40"


def test_another_model_answers_when_chosen(page: Page, server: Server) -> None:
    page.select_option("#model", "other")
    ask_and_wait(page, "Hi")
    assert server.asked[0]["model"] == "other"
    page.goto(server.url)
    expect(page.locator("#model")).to_have_value("other")


def test_documents_can_be_left_out_where_the_server_has_some(page: Page, server: Server) -> None:
    assert page.is_hidden("#retrieval")
    ask_and_wait(page, "Hi")
    assert "retrieval" not in server.asked[0]
    server.models = [{"id": "tiny", "retrieval": True}]
    page.goto(server.url)
    expect(page.locator("#retrieval")).to_be_visible()
    ask_and_wait(page, "Hi")
    page.uncheck("#retrieval-on")
    ask_and_wait(page, "Hi")
    assert [body["retrieval"] for body in server.asked[1:]] == [True, False]


# ---- documents ----


def test_sources_show_titles_and_marked_passages(page: Page, server: Server) -> None:
    server.script = lambda body: ["Ada Byron does [1], not [7].", {"sources": SOURCES, "trace": TRACE}]
    ask_and_wait(page, "Who runs the mill?")
    assert page.locator(".source.cited .title").all_text_contents() == ["The mill"]
    assert page.locator(".source:not(.cited) .title").all_text_contents() == ["The weir"]
    assert page.locator(".source.cited mark").all_text_contents() == ["Ada Byron"]
    assert "[7]" in answer(page).inner_text()
    expect(page.locator(".source.cited[open]")).to_have_count(0)
    page.click(".cite")
    expect(page.locator(".source.cited[open]")).to_be_visible()
    expect(page.locator(".source[data-n='1'] summary")).to_be_focused()
    page.get_by_text("2 searches", exact=True).click()
    expect(page.locator(".trace[open]")).to_be_visible()
    assert page.locator(".query").all_text_contents() == ["who runs the mill", "Ada Byron"]


def test_calls_of_tools_are_put_together(page: Page, server: Server) -> None:
    def call(**function: str) -> dict[str, Any]:
        return {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, "function": function}]}}]}

    server.script = lambda body: [call(name="add", arguments='{"a": '), call(arguments="1}")]
    ask_and_wait(page, "Hi")
    page.get_by_text("Calls add", exact=True).click()
    assert page.inner_text(".call pre") == '{"a": 1}'


# ---- strangers' text ----


def test_html_from_anywhere_is_text(page: Page, server: Server) -> None:
    hostile = f"{HOSTILE} **{HOSTILE}** [1] `{HOSTILE}` [x](javascript:window.hacked=3) ![i](http://evil.test/p.png)"
    hostile += f"\n\n```{HOSTILE}\n{HOSTILE}\n```\n\n| {HOSTILE} |\n|---|\n| {HOSTILE} |"
    hostile += "\n\n<svg onload='window.hacked=4'>\n\n[y](data:text/html,<script>1</script>)"
    source = {"n": 1, "id": HOSTILE, "title": HOSTILE, "text": HOSTILE, "score": 1, "cited": True}
    server.models = [{"id": HOSTILE}]
    server.script = lambda body: [hostile, {"sources": [source], "trace": [{"query": HOSTILE, "titles": [HOSTILE]}]}]
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    open_page(page, server)
    shown = ask_and_wait(page, HOSTILE)
    assert shown.count("<script>window.hacked = 1</script>") >= 5
    assert "[x](javascript:window.hacked=3)" in shown
    unfold(page)
    assert page.locator("main, aside").locator("script, img, svg, iframe").count() == 0
    assert page.locator("main a").evaluate_all("links => links.map(a => a.protocol)") == ["http:"]  # the picture's
    assert page.text_content(".source .title") == HOSTILE
    assert page.locator("#history a").all_text_contents()[0].startswith("<script>")
    assert page.evaluate("window.hacked") is None
    assert requested and all(url.startswith(server.url) for url in requested)


def test_the_page_cannot_take_html_or_call_out(page: Page, faults: list[str]) -> None:
    """By its own policy, whatever headers a server sends."""
    refused = "(() => { try { document.body.innerHTML = '<b>x</b>'; return false } catch (e) { return e.name } })()"
    assert page.evaluate(refused) == "TypeError"
    assert page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'sent', e => e.name)") == "TypeError"
    assert any("Content Security Policy" in fault for fault in faults)
    faults.clear()


@pytest.mark.parametrize(
    "name", ["page.html", *sorted(f"static/{file.name}" for file in (FOLDER / "static").iterdir())]
)
def test_no_file_writes_html_or_names_another_host(name: str) -> None:
    text = (FOLDER / name).read_text()
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function",
        text.replace("never innerHTML", ""),
    )
    assert not re.search(r"""(src|href|url|import|fetch)\W{0,3}["'(]\s*(https?:)?//""", text)


# ---- errors ----


def error(message: str) -> str:
    return json.dumps({"error": {"message": message, "type": "t", "param": None, "code": None}})


def test_a_busy_server_is_said_and_asked_again(page: Page, server: Server) -> None:
    server.script = lambda body: (429, {"Retry-After": "3"}, error("the queue is full"))
    ask_and_wait(page, "Hi")
    assert page.inner_text(".error span") == "the queue is full (try again in 3 s)"
    server.script = lambda body: ["Now."]
    click(page, "Try again")
    shows(page, "Now.")
    assert server.asked[0] == server.asked[1]


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ((500, {}, "no JSON"), "The server answered 500"),
        (["Half", {"error": {"message": "out of memory"}}], "out of memory"),
        (["Half", b"data: {\"choices\"", ConnectionResetError], "The connection ended before the answer did."),
    ],
)  # fmt: skip
def test_a_failed_answer_says_why_and_only_its_text_is_sent(page: Page, server: Server, script: Any, said: str) -> None:
    def failing(body: dict[str, Any]) -> Iterator[Any]:
        for piece in script:
            if piece is ConnectionResetError:
                raise ConnectionResetError
            yield piece

    server.script = lambda body: script if isinstance(script, tuple) else failing(body)
    ask_and_wait(page, "Hi")
    assert said in page.inner_text(".error span")
    assert answer(page).inner_text() == ("" if isinstance(script, tuple) else "Half")
    server.script = lambda body: ["Fine."]
    ask_and_wait(page, "Again")
    roles = [message["role"] for message in server.asked[1]["messages"]]
    assert roles == (["user"] if isinstance(script, tuple) else ["user", "assistant", "user"])


def test_a_key_is_asked_for_and_forgotten_with_the_tab(page: Page, server: Server) -> None:
    server.key = "sesame"
    page.goto(server.url)
    expect(page.locator("#notice")).to_be_visible()
    click(page, "Enter it")
    expect(page.locator("[name=key]")).to_be_focused()
    page.keyboard.insert_text("sesame")
    page.keyboard.press("Tab")
    expect(page.locator("#model option")).to_have_count(2)
    assert ask_and_wait(page, "Hi") == "Hello."
    assert "sesame" not in page.evaluate("JSON.stringify(localStorage)")


# ---- looks ----

LONG = (
    "A [link](https://example.org), `code`.\n\n```python\n"
    + "x = 1 + " * 60
    + "1\n```\n\n| a | b |\n|---|--:|\n"
    + "| "
    + "w" * 300
    + " | 2 |\n"
)

CONTRAST = """(() => {
  const rgb = text => (text.match(/[\\d.]+/g) ?? []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => (v /= 255, v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
    if (c.length === 3 || c[3] > 0) return c } return [255, 255, 255] };
  const low = [];
  for (const e of document.querySelectorAll('body *')) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) || !e.getClientRects().length) continue;
    const [a, b] = [light(rgb(getComputedStyle(e).color)), light(behind(e))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) low.push([e.tagName, e.className, e.textContent.slice(0, 20), ratio]);
  }
  return low })()"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_text_is_readable_in_both_themes(page: Page, server: Server, theme: Literal["light", "dark"]) -> None:
    """Contrast of WCAG 2.2, success criterion 1.4.3: 4.5 to 1."""
    server.script = lambda body: [
        "Ada [1]. " + LONG,
        {"sources": SOURCES, "trace": TRACE, "usage": {"completion_tokens": 9}},
    ]
    page.emulate_media(color_scheme=theme)
    ask_and_wait(page, "Who?")
    server.script = lambda body: (500, {}, error("broken"))
    ask_and_wait(page, "And?")
    page.click("#options")
    unfold(page)
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (theme == "dark")
    assert page.evaluate(CONTRAST) == []


@pytest.mark.parametrize("page", [PHONE], indirect=True, ids=["phone"])
def test_a_phone_shows_everything_within_its_width(page: Page, server: Server) -> None:
    server.script = lambda body: [LONG + "w" * 400, {"sources": SOURCES, "trace": TRACE}]
    ask_and_wait(page, "q" * 400)
    unfold(page)
    parts = "body, main, #scroll, #thread, .message, .content, #composer, header"
    wide = f"[...document.querySelectorAll('{parts}')].filter(e => e.scrollWidth > e.clientWidth).length"
    assert page.evaluate("document.documentElement.scrollWidth") <= 390 and page.evaluate(wide) == 0
    expect(page.locator("#sidebar")).to_be_hidden()
    page.click("#menu")
    expect(page.locator("#sidebar")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#sidebar")).to_be_hidden()
    page.click("#options")
    page.click("#settings-close")
    expect(page.locator("#settings")).to_be_hidden()


def test_every_control_has_a_name(page: Page, server: Server) -> None:
    server.script = lambda body: ["Ada [1].\n\n```\nx\n```", {"sources": SOURCES, "trace": TRACE}]
    ask_and_wait(page, "Who?")
    page.click("#options")
    nodes = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    controls = [
        n
        for n in nodes
        if n.get("role", {}).get("value")
        in ("button", "textbox", "searchbox", "combobox", "link", "spinbutton", "checkbox")
    ]
    assert len(controls) > 20
    assert [n for n in controls if not n.get("name", {}).get("value", "").strip()] == []


# ---- markdown ----

CASES = [
    "# Title\n\nText with *em*, **strong**, ***both***, ~~gone~~ and `code`.",
    "a *b **c** d* e **f *g* h** _i_ __j__ snake_case_name 2*3*4",
    "**a * b** and ** c ** and *unclosed",
    "``a ` b`` ` `` ` \\*no\\* `\\`",
    "- a\n- b\n  - c\n  - d\n- e",
    "1. a\n2. b\n\n   more\n3. c",
    "7. seven\n8. eight",
    "- a\n\n- b",
    "* a\n+ b",
    "text\n- item\n\ntext",
    "In\n1984. was a year",
    "> quote\n> more\n>\n> - list\n\nafter",
    "```python\nif x:\n    pass\n```\nafter",
    "~~~\n```\n~~~",
    "```\nunclosed\n\n<b>",
    "- a\n  ```\n  code\n    deep\n  ```\n- b",
    "| a | b | c |\n|:--|:-:|--:|\n| 1 | `x` | 3 |\n| **4** | 5 \\| 6 |",
    "[a](https://example.org/x_(y)) <https://example.org> [b](http://example.org \"title\") [c](mailto:a@b.org)",
    "---\n\n***\n\ntext",
    "a\nb\n\nc",
    "<div>html</div> & <b>bold</b>",
    "### Head ###\n#no head\n####### seven",
]  # fmt: skip

MARKDOWN = """import('/static/markdown.js').then(({render}) => CASES.map(text => {
  const element = document.createElement('div');
  render(element, text);
  return element.innerHTML })).catch(e => String(e.stack))"""


def rendered(page: Page, cases: list[str]) -> list[str]:
    return page.evaluate(MARKDOWN.replace("CASES", json.dumps(cases)))


def plain_html(html: str) -> str:
    """Without what the page adds: directions, titles, targets, the bar over code and the frame of a table."""
    bar = r'<div class="bar"><span>.*?</span><button.*?</button></div>'
    code = rf'<div class="code">{bar}<pre tabindex="0"><code>(.*?)</code></pre></div>'
    html = re.sub(code, r"<pre><code>\1</code></pre>", html, flags=re.S)
    html = re.sub(r'<div class="table" tabindex="0">(.*?)</div>', r"\1", html, flags=re.S)
    html = re.sub(r'(href="https?://[^"/]*)"', r'\1/"', html)
    html = re.sub(r' (dir|class|title|target|rel|style)="[^"]*"', "", html)
    return re.sub(r"\s*\n\s*|(?<=>) +| +(?=</?(?:p|li|ul|ol|t[dhr])\b)", "", html)


def test_markdown_is_what_another_parser_makes_of_it(page: Page) -> None:
    markdown_it = pytest.importorskip("markdown_it")
    parser = markdown_it.MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    ours = rendered(page, CASES)
    for text, html in zip(CASES, ours, strict=True):
        expected = parser.render(text).replace("<s>", "<del>").replace("</s>", "</del>").replace("<br />", "")
        expected = expected.replace("&quot;", '"').replace("<hr />", "<hr>")
        assert plain_html(html) == plain_html(expected), text


def test_a_growing_text_ends_as_the_whole_one_and_keeps_its_beginning(page: Page) -> None:
    text = "\n\n".join(CASES)
    grown = page.evaluate(f"""import('/static/markdown.js').then(({{render}}) => {{
      const text = {json.dumps(text)}, element = document.createElement('div');
      render(element, text.slice(0, 200));
      const first = element.firstChild;
      for (let n = 201; n < text.length; n += 7) render(element, text.slice(0, n));
      render(element, text);
      return [element.innerHTML, element.firstChild === first] }})""")
    assert grown == [rendered(page, [text])[0], True]


def test_markdown_of_any_shape_ends(page: Page) -> None:
    """Texts on which careless patterns take minutes: the browser gets LIMIT_S for all of them."""
    units = [
        "[",
        "![",
        "*a ",
        "**a ",
        "_",
        "`",
        "``a`",
        "> ",
        "- ",
        "  " * 9 + "- a\n",
        "|",
        "|-|\n",
        "[a](",
        "<http://",
        "\\",
        "~~",
        "# ",
        "((",
        "1. ",
    ]
    cases = [unit * (20_000 // len(unit)) for unit in units] + [
        ">" * 20_000,
        "[a](http://x" + "(" * 20_000,
        " " * 20_000 + "#",
    ]
    lengths = page.evaluate(
        MARKDOWN.replace("CASES", json.dumps(cases)).replace("element.innerHTML", "element.textContent.length")
    )
    assert len(lengths) == len(cases)
