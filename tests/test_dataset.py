"""Shards: downloads from a server that stalls, cuts and lies; local files; the embedded default; damage and repair."""

import gzip
import hashlib
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import dataset, embedded, shards
from nanochat.common import UserError, data_dir
from nanochat.dataset import iter_documents, read_documents, shard_paths
from nanochat.download import Fetcher
from nanochat.shards import write_shard
from nanochat.sources import PIECE, Reader, find_files

REPO = Path(__file__).resolve().parent.parent
Handler = http.server.BaseHTTPRequestHandler
FAST = ["--timeout=0.4", "--retries=2"]


# ---- a local server with a fault per path ----


class Server:
    """Serves files; a fault(handler, body) handles a request itself, or returns False to let it be served well."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, Callable[[Handler, bytes], bool]] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.ended = threading.Event()
        server = self

        class Answer(Handler):
            protocol_version = "HTTP/1.0"

            def do_GET(self) -> None:
                name = self.path.rpartition("/")[2]
                server.requests.append((name, self.headers.get("Range")))
                body = server.files.get(name)
                if body is None:
                    return self.send_error(404)
                fault = server.faults.get(name)
                if not (fault and fault(self, body)):
                    serve_well(self, body)
                return None

            def log_message(self, *args: Any) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def count(self, name: str) -> int:
        return sum(n == name for n, _ in self.requests)


def head(h: Handler, status: int, length: int | None, **more: str) -> None:
    h.send_response(status)
    if length is not None:
        h.send_header("Content-Length", str(length))
    for key, value in {"ETag": '"v1"', **more}.items():
        h.send_header(key.replace("_", "-"), value)
    h.end_headers()


def serve_well(h: Handler, body: bytes) -> None:
    wanted = re.fullmatch(r"bytes=(\d+)-", h.headers.get("Range", ""))
    if_range = h.headers.get("If-Range")
    if wanted is None or if_range not in (None, '"v1"'):
        head(h, 200, len(body))
        h.wfile.write(body)
    elif int(wanted[1]) >= len(body):
        head(h, 416, 0, Content_Range=f"bytes */{len(body)}")
    else:
        start = int(wanted[1])
        head(h, 206, len(body) - start, Content_Range=f"bytes {start}-{len(body) - 1}/{len(body)}")
        h.wfile.write(body[start:])


def times(n: int, fault: Callable[[Handler, bytes], None]) -> Callable[[Handler, bytes], bool]:
    """The fault on the first n requests, then good service."""
    left = [n]

    def apply(h: Handler, body: bytes) -> bool:
        left[0] -= 1
        if left[0] < 0:
            return False
        fault(h, body)
        return True

    return apply


def cut(h: Handler, body: bytes) -> None:
    head(h, 200, len(body))
    h.wfile.write(body[: len(body) // 2])


def stall(h: Handler, body: bytes) -> None:
    head(h, 200, len(body))
    h.wfile.write(body[:100])
    h.wfile.flush()
    h.server.stalled.wait(30)  # type: ignore[attr-defined]


def dribble(h: Handler, body: bytes) -> None:
    head(h, 200, len(body))
    for i in range(40):
        try:
            h.wfile.write(body[i : i + 1])
            h.wfile.flush()
        except OSError:
            return
        if h.server.stalled.wait(0.05):  # type: ignore[attr-defined]
            return


def html(h: Handler, body: bytes) -> None:
    head(h, 200, 40, Content_Type="text/html")
    h.wfile.write(b"<html>please log in to the network</html>"[:40])


def says_less(h: Handler, body: bytes) -> None:
    head(h, 200, len(body) - 50)
    h.wfile.write(body)


def says_more(h: Handler, body: bytes) -> None:
    head(h, 200, len(body) + 1000)
    h.wfile.write(body)


def no_length_and_cut(h: Handler, body: bytes) -> None:
    head(h, 200, None)
    h.wfile.write(body[:-30])


def flipped(h: Handler, body: bytes) -> None:
    broken = bytearray(body)
    broken[len(body) // 2] ^= 0xFF
    head(h, 200, len(body))
    h.wfile.write(bytes(broken))


def ignores_range(h: Handler, body: bytes) -> None:
    head(h, 200, len(body))
    h.wfile.write(body)


def refuses_range(h: Handler, body: bytes) -> None:
    if h.headers.get("Range"):
        head(h, 416, 0)
    else:
        serve_well(h, body)


def wrong_start(h: Handler, body: bytes) -> None:
    if h.headers.get("Range"):
        head(h, 206, len(body), Content_Range=f"bytes 0-{len(body) - 1}/{len(body)}")
        h.wfile.write(body)
    else:
        serve_well(h, body)


def busy(h: Handler, body: bytes) -> None:
    head(h, 503, 0)


TRANSIENT = [cut, stall, dribble, html, says_less, says_more, no_length_and_cut, flipped, busy]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Four shards of distinct text, the last of them validation; names.txt lists them."""
    s = Server()
    s.http.stalled = threading.Event()  # type: ignore[attr-defined]
    names = []
    for i in range(4):
        path = tmp_path / "made" / f"part-{i}.parquet"
        write_shard(path, [f"document {i}.{j} " + os.urandom(30).hex() for j in range(700)], "test")
        s.files[path.name] = path.read_bytes()
        names.append(path.name)
    (tmp_path / "names.txt").write_text("# validation is the last\n" + "\n".join(names) + "\n")
    yield s
    s.http.stalled.set()  # type: ignore[attr-defined]
    s.http.shutdown()
    s.http.server_close()


@pytest.fixture
def get(server: Server, tmp_path: Path) -> Callable[..., Path]:
    def run(n: int, *more: str) -> Path:
        out = tmp_path / "out"
        where = [f"--base_url={server.url}/data", f"--shard_list={tmp_path / 'names.txt'}", f"--out={out}"]
        dataset.main(["-n", str(n), "-w", "2", *where, *FAST, *more])
        return out

    return run


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))


def read_all(folder: Path, split: Any) -> list[str]:
    return list(iter_documents(split, folder))


# ---- downloads ----


def test_download_takes_n_shards_and_the_pinned_validation_shard(server, get):
    out = get(2)
    assert names(out) == ["manifest.json", "shard_00000.parquet", "shard_00001.parquet", "shard_00003.parquet"]
    for name, remote in (("shard_00000", "part-0"), ("shard_00001", "part-1"), ("shard_00003", "part-3")):
        assert (out / f"{name}.parquet").read_bytes() == server.files[f"{remote}.parquet"]
    assert [p.name for p in shard_paths("train", out)] == ["shard_00000.parquet", "shard_00001.parquet"]
    assert all(t.startswith("document 3.") for t in read_all(out, "val"))


def test_growing_n_fetches_only_what_is_missing_and_keeps_validation(server, get, capsys):
    val = shard_paths("val", get(1))
    fetched = len(server.requests)
    assert shard_paths("val", get(-1)) == val
    assert len(server.requests) == fetched + 2
    get(3)
    assert len(server.requests) == fetched + 2 and "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("fault", TRANSIENT, ids=lambda f: f.__name__)
def test_download_recovers_from(fault, server, get):
    server.faults["part-0.parquet"] = times(1, fault)
    out = get(1)
    assert (out / "shard_00000.parquet").read_bytes() == server.files["part-0.parquet"]
    assert names(out) == ["manifest.json", "shard_00000.parquet", "shard_00003.parquet"]


@pytest.mark.parametrize("fault", [html, cut, flipped, busy], ids=lambda f: f.__name__)
def test_lasting_trouble_names_the_url_and_the_cure(fault, server, get):
    server.faults["part-0.parquet"] = times(99, fault)
    with pytest.raises(UserError) as e:
        get(1)
    message = str(e.value)
    assert f"{server.url}/data/part-0.parquet" in message and "--source" in message and "--embedded" in message
    assert "\n" not in message


def test_retries_are_bounded(server, get):
    server.faults["part-0.parquet"] = times(99, busy)
    with pytest.raises(UserError, match="gave up after 3 attempts"):
        get(1)
    assert server.count("part-0.parquet") == 3


def test_a_missing_file_is_not_asked_for_again(server, get):
    del server.files["part-0.parquet"]
    with pytest.raises(UserError, match=r"404.*--source"):
        get(1)
    assert server.count("part-0.parquet") == 1


def test_a_cut_download_resumes_where_it_stopped(server, get):
    server.faults["part-0.parquet"] = times(1, cut)
    get(1)
    half = len(server.files["part-0.parquet"]) // 2
    assert [r for n, r in server.requests if n == "part-0.parquet"] == [None, f"bytes={half}-"]


def test_the_next_run_resumes_a_part_file(server, get):
    server.faults["part-0.parquet"] = times(3, cut_in_pieces)
    with pytest.raises(UserError, match="cut off at"):
        get(1)
    done = len(server.requests)
    get(1)
    again = [r for n, r in server.requests[done:] if n == "part-0.parquet"]
    assert len(again) == 1 and again[0] is not None and again[0] != "bytes=0-"


def cut_in_pieces(h: Handler, body: bytes) -> None:
    """100 more bytes at each request."""
    wanted = re.fullmatch(r"bytes=(\d+)-", h.headers.get("Range", "bytes=0-"))
    assert wanted
    start = int(wanted[1])
    if start:
        head(h, 206, len(body) - start, Content_Range=f"bytes {start}-{len(body) - 1}/{len(body)}")
    else:
        head(h, 200, len(body))
    h.wfile.write(body[start : start + 100])


@pytest.mark.parametrize("fault", [ignores_range, refuses_range, wrong_start], ids=lambda f: f.__name__)
def test_a_server_that_cannot_resume_sends_the_whole_file(fault, server, get):
    first = times(1, cut)
    server.faults["part-0.parquet"] = lambda h, body: first(h, body) or (fault(h, body), True)[1]
    out = get(1)
    assert (out / "shard_00000.parquet").read_bytes() == server.files["part-0.parquet"]


def test_a_file_changed_on_the_server_is_not_glued_to_an_old_half(server, tmp_path):
    body = server.files["part-0.parquet"]
    (tmp_path / "x.parquet.part").write_bytes(bytes(len(body) // 2))
    (tmp_path / "x.parquet.part.etag").write_text('"v0"')
    Fetcher(check=lambda p: None).fetch(f"{server.url}/part-0.parquet", tmp_path / "x.parquet")
    assert (tmp_path / "x.parquet").read_bytes() == body and len(server.requests) == 1


def test_a_trickle_counts_as_a_stall(server, tmp_path):
    server.faults["part-0.parquet"] = times(1, dribble)
    heard: list[str] = []
    fetcher = Fetcher(check=lambda p: None, timeout=0.4, pause=0.01, on_retry=heard.append)
    fetcher.fetch(f"{server.url}/part-0.parquet", tmp_path / "x.parquet")
    assert len(heard) == 1 and "stalled" in heard[0]


def test_bytes_and_sizes_are_reported_for_the_bar(server, tmp_path):
    server.faults["part-0.parquet"] = times(1, html)
    got, sizes, body = [], [], server.files["part-0.parquet"]
    fetcher = Fetcher(check=shards.count_rows, pause=0.01, on_bytes=got.append, on_size=sizes.append)
    fetcher.fetch(f"{server.url}/part-0.parquet", tmp_path / "x.parquet")
    assert sum(got) == len(body) == sizes[-1]


def test_a_complete_part_file_is_taken_without_fetching_it_again(server, tmp_path):
    part = tmp_path / "x.parquet.part"
    part.write_bytes(server.files["part-0.parquet"])
    Fetcher(check=lambda p: None).fetch(f"{server.url}/part-0.parquet", tmp_path / "x.parquet")
    assert (tmp_path / "x.parquet").read_bytes() == server.files["part-0.parquet"]
    assert [r for _, r in server.requests] == [f"bytes={len(server.files['part-0.parquet'])}-"]


def test_a_file_that_is_parquet_but_no_text_is_refused(server, get, tmp_path):
    pq.write_table(pa.table({"words": ["a"]}), tmp_path / "other.parquet")
    server.files["part-0.parquet"] = (tmp_path / "other.parquet").read_bytes()
    with pytest.raises(UserError, match="no column 'text'"):
        get(1)


def test_no_network_says_what_to_do_instead(tmp_path):
    with pytest.raises(UserError, match=r"gave up after 1 attempts.*--source PATH.*--embedded"):
        dataset.main(["-n", "1", "--base_url=http://127.0.0.1:9", f"--out={tmp_path}", "--retries=0", "--timeout=0.5"])


def test_a_damaged_download_is_fetched_again_by_the_same_command(server, get):
    out = get(1)
    path = out / "shard_00000.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"shard_00000.parquet has \d+ bytes.*run `python -m nanochat.dataset -n 1"):
        shard_paths("train", out)
    get(1)
    assert path.read_bytes() == server.files["part-0.parquet"] and server.count("part-3.parquet") == 1


def test_a_half_done_download_is_usable_with_a_warning(server, get, tmp_path):
    get(1)
    del server.files["part-2.parquet"]
    with pytest.raises(UserError, match="404"):
        get(3, "-w", "1")
    with pytest.warns(UserWarning, match="3 of 4 shards"):
        assert len(shard_paths("train", tmp_path / "out")) == 2


def test_more_shards_than_there_are_is_an_error(get):
    with pytest.raises(UserError, match="there are 3 training shards"):
        get(4)


def test_another_download_is_not_mixed_in(server, get, tmp_path):
    get(1)
    (tmp_path / "names.txt").write_text("part-1.parquet\npart-2.parquet\n")
    with pytest.raises(UserError, match="--overwrite"):
        get(1)
    out = get(1, "--overwrite")
    assert names(out) == ["manifest.json", "shard_00000.parquet", "shard_00001.parquet"]
    assert (out / "shard_00000.parquet").read_bytes() == server.files["part-1.parquet"]


@pytest.mark.slow
def test_kill_9_in_the_middle_then_the_same_command_finishes(server, tmp_path):
    server.faults["part-0.parquet"] = times(1, stall)
    out = tmp_path / "out"
    where = [f"--base_url={server.url}", f"--shard_list={tmp_path / 'names.txt'}", f"--out={out}"]
    command = [sys.executable, "-m", "nanochat.dataset", "-n", "2", "-w", "1", *where]
    child = subprocess.Popen(command, cwd=REPO, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (out / "shard_00000.parquet.part").is_file() and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert "shard_00000.parquet" not in names(out)
    subprocess.run(command, cwd=REPO, check=True, stdout=subprocess.DEVNULL)
    assert len(shard_paths("train", out, verify=True)) == 2


# ---- local files ----


def convert(source: Path | str, out: Path, *more: str) -> Path:
    dataset.main([f"--source={source}", f"--out={out}", *more])
    return out


@pytest.fixture
def mixed(tmp_path: Path) -> tuple[Path, list[str]]:
    """A folder with one file of each kind, and the documents in it."""
    folder, texts = tmp_path / "mixed", [f"text {i}: " + "word " * (i % 50) + "été" for i in range(120)]
    (folder / "deep").mkdir(parents=True)
    texts = [t.strip() for t in texts]
    (folder / "a.txt").write_text(texts[0])
    (folder / "b.md").write_text("\ufeff" + texts[1] + "\n")
    (folder / "c.txt.gz").write_bytes(gzip.compress(texts[2].encode()))
    lines = [json.dumps({"text": t}) for t in texts[3:30]] + ["", json.dumps({"content": texts[30]})]
    (folder / "deep" / "d.jsonl").write_text("\n".join(lines))
    (folder / "deep" / "e.jsonl.gz").write_bytes(
        gzip.compress("\n".join(json.dumps({"text": t}) for t in texts[31:60]).encode())
    )
    pq.write_table(pa.table({"id": range(60), "text": texts[60:]}), folder / "f.parquet", row_group_size=7)
    (folder / "picture.png").write_bytes(b"x")
    (folder / ".hidden.txt").write_text("not this one")
    return folder, texts


def test_all_kinds_of_files_give_each_document_once(mixed, tmp_path):
    folder, texts = mixed
    out = convert(folder, tmp_path / "out")
    train, val = read_all(out, "train"), read_all(out, "val")
    assert val and sorted(train + val) == sorted(texts)
    assert train != sorted(train)


def test_conversion_is_deterministic_and_idempotent(mixed, tmp_path, capsys):
    a, b = convert(mixed[0], tmp_path / "a"), convert(mixed[0], tmp_path / "b")
    files = [p for p in names(a) if p.endswith(".parquet")]
    assert [(a / f).read_bytes() for f in files] == [(b / f).read_bytes() for f in files]
    before = (a / files[0]).stat().st_mtime_ns
    capsys.readouterr()
    convert(mixed[0], a)
    assert "nothing to do" in capsys.readouterr().out and (a / files[0]).stat().st_mtime_ns == before


def test_a_changed_source_is_refused_until_overwrite(mixed, tmp_path):
    out = convert(mixed[0], tmp_path / "out")
    (mixed[0] / "new.txt").write_text("one more document")
    with pytest.raises(UserError, match="--overwrite"):
        convert(mixed[0], out)
    convert(mixed[0], out, "--overwrite")
    assert "one more document" in read_all(out, "train") + read_all(out, "val")


def test_a_fault_in_the_source_leaves_the_old_data_whole(mixed, tmp_path):
    out = convert(mixed[0], tmp_path / "out")
    (mixed[0] / "bad.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"bad\.jsonl:1"):
        convert(mixed[0], out, "--overwrite")
    assert len(read_all(out, "train") + read_all(out, "val")) == 120
    assert not list(out.glob(".spool*"))


def test_shards_have_the_asked_size_and_moderate_row_groups(tmp_path):
    rows = [{"text": f"{i} " + "x" * 1000} for i in range(3000)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = convert(tmp_path / "a.jsonl", tmp_path / "out", "--shard_mb=1")
    paths = shard_paths("train", out)
    assert len(paths) == 3
    for path in paths:
        file = pq.ParquetFile(path)
        assert all(file.metadata.row_group(g).num_rows <= 512 for g in range(file.num_row_groups))
        assert file.metadata.row_group(0).column(0).compression == "ZSTD"
    val = read_all(out, "val")
    assert 1 <= len(val) <= 35, "one percent of the bytes"


def test_copies_of_a_text_never_sit_on_both_sides(tmp_path):
    rows = [{"text": f"copied text number {i % 40}"} for i in range(400)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = convert(tmp_path / "a.jsonl", tmp_path / "out", "--val_fraction=0.3")
    train, val = read_all(out, "train"), read_all(out, "val")
    assert len(train) + len(val) == 400 and not set(train) & set(val) and len(val) > 40


def test_a_file_named_as_validation_is_the_validation_split(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": f"train {i}"}) for i in range(20)))
    (folder / "b_dev.jsonl").write_text("\n".join(json.dumps({"text": f"dev {i}"}) for i in range(5)))
    out = convert(folder, tmp_path / "out")
    assert read_all(out, "val") == [f"dev {i}" for i in range(5)]
    out = convert(folder, tmp_path / "other", "--keep_split=false", "--val_fraction=0.5")
    assert any(t.startswith("train") for t in read_all(out, "val"))


@pytest.mark.parametrize(
    ("name", "is_val"),
    [
        ("val.jsonl", True),
        ("text_00012_dev.parquet", True),
        ("validation-00000-of-00001.parquet", True),
        ("my.valid.txt", False),
        ("devices.txt", False),
        ("carnival.txt", False),
        ("interval_3.txt", False),
    ],
)
def test_what_counts_as_a_validation_name(tmp_path, name, is_val):
    (tmp_path / name).write_text("x")
    (tmp_path / "other.txt").write_text("y")
    assert [p.name for p in find_files(str(tmp_path)).val] == ([name] if is_val else [])


def test_a_long_text_is_cut_at_blank_lines_and_loses_nothing(tmp_path):
    paragraphs = [f"Paragraph {i}. " + "Some words of it. " * 40 for i in range(2000)]
    (tmp_path / "book.txt").write_text("\r\n\r\n".join(paragraphs), newline="")
    (tmp_path / "note.txt").write_text("short\n\nnote")
    docs = list(Reader().documents(find_files(str(tmp_path)).train))
    assert docs[-1] == "short\n\nnote"
    assert len(docs) > 20 and all(d.startswith("Paragraph") and len(d) < 2 * PIECE for d in docs[:-1])
    assert [p for d in docs[:-1] for p in d.split("\n\n")] == paragraphs


def test_text_without_any_break_is_cut_too(tmp_path):
    (tmp_path / "a.txt").write_text("é" * 1_200_000)
    docs = list(Reader().documents([tmp_path / "a.txt"]))
    assert len(docs) > 5 and "".join(docs) == "é" * 1_200_000


def test_one_short_text_alone_still_gives_a_validation_split(tmp_path):
    (tmp_path / "only.txt").write_text("\n\n".join(f"Paragraph {i} says something new." for i in range(200)))
    out = convert(tmp_path / "only.txt", tmp_path / "out")
    assert read_all(out, "val") and len(read_all(out, "train")) > 3


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "é fine ".encode() + b"\xff rest", r"a\.txt: invalid UTF-8 at byte 8"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": "\xff"}\n', r"a\.jsonl: invalid UTF-8 at line 2"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": \n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b'{"text": "fine"}\n{"body": "x"}\n', r"a\.jsonl:2: expected a field 'text'.*has body"),
        ("a.jsonl", b'{"text": "fine"}\n[1]\n', r"a\.jsonl:2: expected"),
        ("a.jsonl", b'{"text": "\\ud800 half a pair"}\n', r"a\.jsonl: invalid UTF-8 at line 1"),
    ],
)
def test_bad_input_stops_with_file_and_place(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=expected + ".*--errors=skip"):
        list(Reader().documents([tmp_path / name]))


def test_bad_bytes_far_into_a_long_file_are_found_at_their_offset(tmp_path):
    good = ("A paragraph of é text.\n\n" * 60_000).encode()
    (tmp_path / "a.txt").write_bytes(good + b"\xc3\x28" + good)
    with pytest.raises(UserError, match=f"byte {len(good)}:"):
        list(Reader().documents([tmp_path / "a.txt"]))


def test_errors_replace_repairs_and_skip_leaves_out_with_counts(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good \xff bad")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "one"}\n{"text": "t\xc3"}\nnonsense\n{"text": " "}\n')
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "one"}\n{"text": "t\xc3"}\n')
    skip = Reader("skip")
    assert list(skip.documents([tmp_path / "a.txt", tmp_path / "b.jsonl"])) == ["one"]
    assert (skip.skipped, skip.empty, skip.replaced) == (3, 1, 0)
    replace = Reader("replace")
    assert list(replace.documents([tmp_path / "a.txt", tmp_path / "c.jsonl"])) == ["good \ufffd bad", "one", "t\ufffd"]
    assert replace.replaced == 2


def test_parquet_with_bad_utf8_or_null_is_named_by_row(tmp_path):
    bad = pa.array([b"fine", b"\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": bad}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: invalid UTF-8 at row 2"):
        list(Reader().documents([tmp_path / "a.parquet"]))
    pq.write_table(pa.table({"text": ["x", None]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b\.parquet: row 2 has no text"):
        list(Reader().documents([tmp_path / "b.parquet"]))
    assert list(Reader("skip").documents([tmp_path / "a.parquet", tmp_path / "b.parquet"])) == ["fine", "x"]


def test_damaged_sources_name_the_file(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(os.urandom(5000))[:-500])
    (tmp_path / "b.parquet").write_bytes(b"PAR1 nothing more")
    (tmp_path / "c.jsonl.gz").write_bytes(b"not gzip")
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(UserError, match=re.escape(str(path))):
            list(Reader("replace").documents([path]))


def test_sources_that_are_none_say_what_is_expected(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "blank.txt").write_text(" \n ")
    for source in (tmp_path / "empty", tmp_path / "missing.txt", tmp_path / "a.csv"):
        with pytest.raises(UserError, match=r"expected \.txt.*\.parquet"):
            convert(source, tmp_path / "out")
    with pytest.raises(UserError, match="at least two"):
        convert(tmp_path / "blank.txt", tmp_path / "out")


def test_a_glob_names_files(mixed, tmp_path):
    found = find_files(str(mixed[0] / "*.txt"))
    assert [p.name for p in found.train] == ["a.txt"]


@pytest.mark.data
def test_a_folder_of_shards_keeps_its_dev_shard(tmp_path):
    data = data_dir()
    if data is None or not (data / "text" / "shard_00012_dev.parquet").is_file():
        pytest.skip("no shared text shards here (NANOCHAT_DATA)")
    found = find_files(str(data / "text"))
    assert [p.name for p in found.val] == ["shard_00012_dev.parquet"] and len(found.train) == 12
    out = convert(data / "text" / "shard_0001[12]*.parquet", tmp_path / "out")
    assert read_all(out, "val") == [t for _, texts in read_documents(found.val[0]) for t in texts]


# ---- the embedded default ----


@pytest.fixture(scope="module")
def english() -> list[str]:
    return list(embedded.english_documents())


def test_embedded_text_does_not_depend_on_the_hash_seed(english):
    code = (
        "import hashlib; from nanochat.embedded import *\n"
        "print(hashlib.sha256(repr(list(english_documents())).encode()).hexdigest())"
    )
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == hashlib.sha256(repr(english).encode()).hexdigest()


def test_asking_for_nothing_writes_the_embedded_default_and_says_so(english, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(embedded, "english_documents", lambda: iter(english))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    dataset.main(["--embedded_mb=1"])
    assert "embedded default" in capsys.readouterr().out
    first = [p.read_bytes() for p in (*shard_paths("train"), *shard_paths("val"))]
    dataset.main(["--embedded", "--embedded_mb=1", "--overwrite"])
    assert "nothing to do" in capsys.readouterr().out
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "other"))
    dataset.main(["--embedded_mb=1"])
    assert [p.read_bytes() for p in (*shard_paths("train"), *shard_paths("val"))] == first
    assert not set(iter_documents("train")) & set(iter_documents("val"))


def test_embedded_default_has_the_asked_size_and_at_most_a_third_english(monkeypatch):
    monkeypatch.setattr(embedded, "english_documents", lambda: iter(["real English words " * 100] * 1000))
    docs = list(embedded.embedded_documents(2))
    size = sum(len(d.encode()) for d in docs)
    english = sum(len(d) for d in docs if d.startswith("real English"))
    assert 0.85e6 * 2 < size < 1.15e6 * 2 and 0.3 < english / size < 0.37


def test_english_documents_come_from_topics_and_docstrings(english):
    docs = english
    assert sum(map(len, docs)) > 1e6
    assert any("Assignment statements" in d for d in docs), "pydoc topics"
    assert any("Filename matching with shell patterns." in d for d in docs), "fnmatch's docstring"
    assert len(set(docs)) == len(docs) and all(len(d) >= 200 for d in docs)


# ---- reading ----


@pytest.fixture
def small(tmp_path: Path) -> Path:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": f"text {i}"}) for i in range(1500)))
    return convert(tmp_path / "a.jsonl", tmp_path / "out")


def test_read_documents_starts_anywhere_and_strides(small):
    path = shard_paths("train", small)[0]
    groups = list(read_documents(path))
    assert [g for g, _ in groups] == [0, 1, 2]
    assert list(read_documents(path, 1)) == groups[1:]
    assert list(read_documents(path, 1, step=2)) == groups[1::2]


@pytest.mark.parametrize("cut_at", [0, 3, 100, -1])
def test_a_truncated_shard_stops_with_file_and_cure(small, cut_at):
    path = shard_paths("train", small)[0]
    path.write_bytes(path.read_bytes()[:cut_at])
    with pytest.raises(UserError, match=rf"{path.name}.*run `python -m nanochat.dataset --source"):
        shard_paths("train", small)
    with pytest.raises(UserError, match=rf"{path.name} is damaged.*run `python -m nanochat.dataset --source"):
        list(read_documents(path))


def test_a_flipped_byte_of_text_is_found_when_read_and_when_verified(small):
    path = shard_paths("train", small)[0]
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0x01
    path.write_bytes(bytes(raw))
    with pytest.raises(UserError, match="SHA-256"):
        shard_paths("train", small, verify=True)
    with pytest.raises(UserError, match=rf"{path.name} is damaged"):
        list(read_documents(path))


def test_running_the_same_command_again_mends_a_damaged_shard(small, tmp_path, capsys):
    path = shard_paths("train", small)[0]
    good = path.read_bytes()
    path.write_bytes(good[:-7] + b"1234567")
    convert(tmp_path / "a.jsonl", small)
    assert "damaged" in capsys.readouterr().out and path.read_bytes() == good


def test_a_missing_shard_or_folder_says_what_to_run(small, tmp_path):
    shard_paths("train", small)[0].unlink()
    with pytest.raises(UserError, match=r"is missing.*run `python"):
        shard_paths("val", small)
    with pytest.raises(UserError, match=r"holds no shards: run `python -m nanochat\.dataset`"):
        shard_paths("train", tmp_path / "nowhere")


def test_an_unfinished_build_is_not_read(small):
    manifest = json.loads((small / "manifest.json").read_text())
    (small / "manifest.json").write_text(json.dumps({**manifest, "state": "building"}))
    with pytest.raises(UserError, match="unfinished: run"):
        shard_paths("train", small)


def test_shards_of_another_tool_are_read_but_not_replaced(tmp_path):
    for i in range(3):
        pq.write_table(pa.table({"text": [f"shard {i}"]}), tmp_path / f"shard_{i:05d}.parquet")
    assert read_all(tmp_path, "train") == ["shard 0", "shard 1"] and read_all(tmp_path, "val") == ["shard 2"]
    with pytest.raises(UserError, match=r"no manifest.*--overwrite"):
        dataset.main(["--embedded_mb=1", f"--out={tmp_path}"])
    path = tmp_path / "shard_00001.parquet"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"shard_00001\.parquet is truncated"):
        shard_paths("train", tmp_path)


def test_overwrite_removes_all_of_our_files_and_no_others(small, tmp_path):
    convert(tmp_path / "a.jsonl", small, "--shard_mb=0.004", "--overwrite")
    assert len(shard_paths("train", small)) >= 3
    (small / "mine.txt").write_text("keep")
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": f"other {i}"}) for i in range(10)))
    convert(tmp_path / "b.jsonl", small, "--overwrite")
    assert names(small) == ["manifest.json", "mine.txt", "shard_00000.parquet", "shard_00001.parquet"]
    assert (small / "mine.txt").read_text() == "keep" and all("other" in t for t in read_all(small, "train"))


def test_two_writers_do_not_share_a_folder(tmp_path):
    with dataset._locked(tmp_path), pytest.raises(UserError, match="another process"), dataset._locked(tmp_path):
        pass


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["-n", "2", "--source=x"], "exclude each other"),
        (["-n", "0"], "from 1 on, or -1"),
        (["--val_fraction=0.9"], "at most 0.5"),
        (["--errors=ignore"], "strict|replace|skip"),
        (["--shard_mb=0"], "more than 0"),
    ],
)
def test_impossible_arguments_are_refused(argv, expected):
    with pytest.raises(UserError, match=re.escape(expected)):
        dataset.main(argv)


def test_default_list_is_fineweb_edu_with_the_last_shard_as_validation():
    from nanochat.remote import BASE_URL, remote_urls

    urls = remote_urls(BASE_URL, None)
    assert len(urls) == 1823
    assert urls[0] == f"{BASE_URL}/shard_00000.parquet" and urls[-1] == f"{BASE_URL}/shard_01822.parquet"


def test_a_full_disk_names_the_folder(tmp_path, monkeypatch):
    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": f"text {i}"}) for i in range(10)))
    monkeypatch.setattr(shards.pq, "ParquetWriter", full)
    with pytest.raises(UserError, match="no space left writing"):
        convert(tmp_path / "a.jsonl", tmp_path / "out")
