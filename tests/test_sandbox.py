"""Attempts to escape from run_python. Where this machine lacks what should stop one, that one is skipped: nothing here
may do harm. Each is tried with all layers on, and again with only one of two layers that should each suffice."""

import functools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from nanochat.config import UserError
from nanochat.execution import MAX_OUTPUT, PROTECTIONS, RUNNER, Result, probe, run_many, run_python

FILES = [((), "mount_namespace"), (("mount_namespace",), "landlock"), (("landlock",), "mount_namespace")]
PROCESSES = [((), "seccomp"), (("seccomp",), "pid_namespace"), (("pid_namespace",), "seccomp")]


@functools.cache
def given(without: tuple[str, ...] = ()) -> dict[str, bool]:
    return run_python("", _without=without).protections


def attack(code: str, needs: tuple[str, ...] = (), without: tuple[str, ...] = (), **options) -> Result:
    """Run code that must not succeed; skip if what should stop it is off. `try_(f)` prints what f returns or raises."""
    for name in needs:
        if not given(without)[name]:
            pytest.skip(f"{name} is off on this machine")
    result = run_python(TRY + textwrap.dedent(code), _without=without, **options)
    assert all(result.protections[name] for name in needs)
    assert not any(result.protections[name] for name in without)
    return result


TRY = """
import os, sys
def try_(f, *args):
    try:
        print("escaped", f(*args), flush=True)
    except (OSError, AttributeError) as e:
        print("stopped", e, flush=True)
"""


def processes_left() -> list[psutil.Process]:
    """Processes of sandboxes that this process started: a fork keeps the command line."""
    mine = [str(RUNNER), str(os.getpid())]
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = process.info["cmdline"] or []
        if mine == line[5:7] and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


@pytest.fixture(autouse=True)
def nothing_left(tmp_path, monkeypatch):
    """Every test ends with no process, no file and no descriptor of a sandbox."""
    folder = Path(tempfile.mkdtemp(prefix="nanochat-test-"))  # not tmp_path, where only its owner may enter
    folder.chmod(0o755)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    descriptors = psutil.Process().num_fds() if hasattr(psutil.Process, "num_fds") else 0
    yield
    assert processes_left() == []
    folder.rmdir()  # fails unless empty
    assert descriptors == (psutil.Process().num_fds() if descriptors else 0)


# What an honest program gets


def test_output_errors_and_input_are_passed_on():
    result = run_python("import sys\nprint(input(), sys.stdin.read())\nprint('e', file=sys.stderr)", stdin="é\nb\nc")
    assert result == Result(True, "é b\nc\n", "e\n", None, protections=result.protections)
    assert run_python("print(len(input()))", stdin="x" * 1_000_000).stdout == "1000000\n"


def test_the_standard_library_works():
    code = """
        import asyncio, collections, dataclasses, datetime, decimal, hashlib, heapq, itertools, json, math, random, re
        import sqlite3, string, tempfile, threading, typing
        @dataclasses.dataclass
        class A: x: int
        async def f(): return A(3)
        print(asyncio.run(f()), random.random() < 1, sqlite3.connect(":memory:").execute("select 1").fetchone())
        thread = threading.Thread(target=print, args=(5,))
        thread.start()
        thread.join()
        with tempfile.TemporaryFile() as file: file.write(os.urandom(9))
        with open("x.txt", "w") as file: file.write("y")
        print(open("x.txt").read(), open("/dev/null", "w").write("a"), __name__, sys.modules["__main__"].A(1))
    """
    result = attack(code)
    assert result.ok, result.stderr
    assert result.stdout == "A(x=3) True (1,)\n5\ny 1 __main__ A(x=1)\n"


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("assert False, 'no'", "AssertionError: no"),
        ("def f(:", "SyntaxError: invalid syntax (main.py, line 1)"),
        ("\0", ""),
        ("def f(): f()\nf()", "RecursionError: maximum recursion depth exceeded"),
        ("class E(Exception):\n def __str__(self): raise self\nraise E", "E"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("import os; os._exit(0)", "exited with 0 before its end"),
        ("import os; os._exit(3)", "exited with 3 before its end"),
        ("import os; os.abort()", "ended by SIG"),
        ("import ctypes; ctypes.string_at(0)", "ended by SIGSEGV"),
        ("import atexit, os; atexit.register(os._exit, 0); 1/0", "ZeroDivisionError: division by zero"),
        ("import os, sys; sys.excepthook = lambda *a: os._exit(0); 1/0", "ZeroDivisionError: division by zero"),
        ("import os; os.write = lambda *a: 0; 1/0", "ZeroDivisionError: division by zero"),
        ("import os; os.closerange(0, 64); os._exit(0)", "exited with 0 before its end"),
        ("import os\nfor fd in range(3, 64):\n try: os.write(fd, b'ok\\n0')\n except OSError: pass\n1/0", "ok"),
    ],
)
def test_what_does_not_reach_its_end_is_not_ok(code, error):
    result = run_python(code)
    assert not result.ok
    assert (result.error or "").startswith(error)
    assert not result.timed_out and not result.memory_exceeded


def test_a_traceback_names_the_code_alone():
    stderr = run_python("def f():\n    return 1 / 0\nf()").stderr
    assert 'File "main.py", line 2, in f' in stderr
    assert "sandbox_runner" not in stderr


def test_closing_stdout_is_no_failure():
    assert run_python("import sys; print(1); sys.stdout.close()") == run_python("import os; os.write(1, b'1\\n')")


def test_many_keep_their_order_and_share_nothing():
    codes = [f"import os; print({i}, os.listdir(), os.getcwd()); open('left', 'w')" for i in range(6)]
    results = run_many(codes, workers=3, timeout_s=10)
    assert [r.stdout.split()[:2] for r in results] == [[str(i), "[]"] for i in range(6)]


def test_a_call_costs_little():
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        run_python("")
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.15


# The report


def test_the_report_agrees_with_the_kernel():
    """/proc shows what holds: it is readable where neither of the two layers that hide it is on."""
    code = """
        status = dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines() if ":\\t" in line)
        print(int(status["Seccomp"]) == 2, int(status["NoNewPrivs"]), int(status["CapEff"], 16) == 0)
        for name in ("user", "pid", "net", "ipc", "uts"):
            print(name, os.readlink(f"/proc/self/ns/{name}"))
    """
    result = attack(code, without=("mount_namespace", "landlock"))
    if not result.ok:
        pytest.skip("no /proc here")
    first, *links = result.stdout.splitlines()
    on = result.protections
    assert first.split()[:2] == [str(on["seccomp"]), str(int(on["no_new_privs"]))]
    assert first.endswith("True") or not on["unprivileged"]
    for line in links:
        name, link = line.split()
        assert (link != str(Path(f"/proc/self/ns/{name}").readlink())) == on[f"{name}_namespace"]


def test_every_protection_is_named_and_printed():
    assert set(probe()) == set(PROTECTIONS)
    lines = subprocess.run([sys.executable, "-m", "nanochat.execution"], capture_output=True, text=True).stdout
    assert [line.split()[:2] for line in lines.splitlines()] == [[k, "on" if v else "OFF"] for k, v in probe().items()]


def test_a_required_protection_that_is_off_stops_the_run():
    start = time.monotonic()
    with pytest.raises(UserError, match="does not give landlock"):
        run_python("import time; time.sleep(9)", protections_required=["landlock"], _without=["landlock"], timeout_s=20)
    assert time.monotonic() - start < 5
    with pytest.raises(UserError, match="no protection is called 'moat'"):
        run_python("", protections_required=["moat"])
    on = [name for name, value in probe().items() if value]
    assert run_python("", protections_required=on).ok


@pytest.mark.parametrize("options", [{"timeout_s": 0}, {"timeout_s": float("nan")}, {"memory_mb": 8}])
def test_limits_out_of_range_are_refused(options):
    with pytest.raises(UserError):
        run_python("", **options)


# Files


@pytest.mark.parametrize(("without", "need"), FILES)
def test_no_file_of_the_user_can_be_read(without, need, tmp_path, monkeypatch):
    places = [place for place in (tmp_path, Path.home(), Path("/root")) if os.access(place, os.W_OK)]
    monkeypatch.setenv("HOME", str(tmp_path))
    system = ["/etc/passwd", "/etc/shadow", "/etc/hostname", "/proc/self/status", "/proc/1/environ", __file__]
    secrets = []
    try:
        for place in places:
            fd, name = tempfile.mkstemp(prefix="sandbox-secret-", dir=place)
            os.close(fd)
            secrets.append(name)
        code = f"""
            for path in {secrets + system}:
                for other in (path, "../../../../../.." + path, "/proc/self/root" + path):
                    try_(open, other)
            for path in {[str(place) for place in places]}:
                try: print([name for name in os.listdir(path) if "secret" in name])
                except OSError: print([])
            for path in ("/etc", "/proc", "/sys", os.path.expanduser("~")):
                try_(os.listdir, path)
            print(dict(os.environ))
        """
        result = attack(code, (need,), without)
    finally:
        for name in secrets:
            Path(name).unlink()
    assert result.ok, result.stderr
    lines = result.stdout.splitlines()
    assert sum(line.startswith("stopped") for line in lines) >= 3 * len(secrets + system) + 4
    assert lines.count("[]") == len(places) and lines[-1] == "{}"
    assert not any(line.startswith("escaped") for line in lines)


@pytest.mark.parametrize(("without", "need"), FILES)
def test_nothing_outside_can_be_written(without, need, tmp_path):
    victim, inner = tmp_path / "victim", tmp_path / "inner"
    victim.write_text("whole")
    victim.chmod(0o644)
    inner.mkdir()
    before = victim.stat()
    library = Path(os.__file__).parent
    marks = [
        Path(folder) / f"sandbox-mark-{os.getpid()}" for folder in (tmp_path, inner, "/dev/shm", "/var/tmp", library)
    ]
    code = f"""
        import shutil
        victim, inner = {str(victim)!r}, {str(inner)!r}
        for path in {[str(m) for m in marks]}:
            try_(open, path, "w"), try_(os.mkdir, path), try_(os.mkfifo, path), try_(os.symlink, "/", path)
        for mode in ("w", "a", "r+"):
            try_(open, victim, mode)
        try_(os.truncate, victim, 0), try_(os.unlink, victim), try_(os.rename, victim, "x"), try_(os.link, victim, "x")
        try_(os.chmod, victim, 0), try_(os.utime, victim, (0, 0)), try_(os.rmdir, inner), try_(os.chmod, inner, 0)
        try_(os.setxattr, victim, "user.x", b"y"), try_(os.chown, victim, 1, 1)
        os.symlink(victim, "link")
        os.symlink(os.path.dirname(victim), "folder")
        try_(open, "link", "w"), try_(open, "folder/sandbox-new", "w"), try_(open, "folder/victim", "w")
        try_(os.replace, "link", inner + "/link"), try_(os.listdir, "folder")
        print("end")
    """
    result = attack(code, (need,), without)
    assert result.ok, result.stderr
    assert "escaped" not in result.stdout
    after = victim.stat()
    assert victim.read_text() == "whole"
    assert (after.st_mode, after.st_mtime, after.st_uid, after.st_nlink) == (
        before.st_mode,
        before.st_mtime,
        before.st_uid,
        1,
    )
    assert not any(mark.exists() for mark in marks)
    assert {p.name for p in tmp_path.iterdir()} == {"victim", "inner"}
    assert list(inner.iterdir()) == []


@pytest.mark.parametrize(("without", "need"), [((), "seccomp"), (("seccomp",), "unprivileged")])
def test_the_walls_cannot_be_taken_down(without, need):
    code = """
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        for call, args in {
            "mount": (b"none", b"/", None, 4096 | 32, None), "umount2": (b"/tmp", 2), "chroot": (b"/",),
            "setresuid": (0, 0, 0), "setns": (0, 0), "sethostname": (b"x", 1),
        }.items():
            print(call, getattr(libc, call)(*args))
        try_(os.mknod, "disk", 0o60666, os.makedev(254, 0))
        try_(open, "/usr/lib/x", "w")
    """
    result = attack(code, (need, "mount_namespace"), without)
    assert result.ok, result.stderr
    assert [line.split()[1] for line in result.stdout.splitlines()[:6]] == ["-1"] * 6
    assert "escaped" not in result.stdout


def test_the_disk_cannot_be_filled():
    code = """
        import itertools
        block, n = bytes(1 << 20), 0
        try:
            with open("big", "wb") as file:
                while True: n += file.write(block)
        except OSError as e: print(e.errno, n)
        try:
            for i in itertools.count():
                with open(f"big{i}", "wb") as file: n += file.write(block * 15)
        except OSError as e: print(e.errno, n)
        for i in range(100):
            if os.path.exists(f"big{i}"): os.unlink(f"big{i}")
        try:
            for i in itertools.count(): open(f"small{i}", "w").close()
        except OSError as e: print(e.errno, i)
    """
    result = attack(code, ("mount_namespace", "rlimits"), timeout_s=20)
    (big, size), (full, total), (inodes, files) = (map(int, line.split()) for line in result.stdout.splitlines())
    assert (big, full, inodes) == (27, 28, 28)  # EFBIG, ENOSPC, ENOSPC
    assert size <= 16 << 20 and total <= 100 << 20 and files <= 4096


def test_one_file_is_bounded_where_files_are_in_view():
    code = "with open('big', 'wb') as file:\n while True: file.write(bytes(1 << 20))"
    result = attack(code, ("landlock", "rlimits"), ("mount_namespace",))
    assert "File too large" in (result.error or result.stdout)


def test_a_folder_too_deep_for_python_is_removed():
    code = """
        for i in range(400):
            os.mkdir("deep" * 20)
            os.chdir("deep" * 20)
        os.umask(0o777)
        os.mkdir("closed")
        print("end")
    """
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(350)
    try:
        assert attack(code, ("landlock",), ("mount_namespace",)).stdout == "end\n"
    finally:
        sys.setrecursionlimit(limit)


# Network


def test_no_socket_reaches_a_listener():
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.1", 0))
        tcp.setblocking(False)
        udp.setblocking(False)
        code = f"""
            import socket
            try_(socket.create_connection, ("127.0.0.1", {tcp.getsockname()[1]}), 1)
            def send(): socket.socket(2, 2).sendto(b"x", ("127.0.0.1", {udp.getsockname()[1]}))
            try_(send)
            try_(socket.create_connection, ("1.1.1.1", 53), 1)
            try_(socket.getaddrinfo, "localhost", 80)
            print("end")
        """
        for without, need in (((), "net_namespace"), (("seccomp",), "net_namespace"), (("net_namespace",), "seccomp")):
            result = attack(code, (need,), without)
            assert result.stdout.count("stopped") >= 3, result.stdout
            with pytest.raises(BlockingIOError):
                tcp.accept()
            with pytest.raises(BlockingIOError):
                udp.recv(1)


@pytest.mark.skipif(sys.platform != "linux", reason="abstract sockets are Linux's")
@pytest.mark.parametrize(("without", "need"), [((), "seccomp"), (("seccomp",), "net_namespace")])
def test_no_unix_socket_reaches_a_listener(without, need):
    with socket.socket(socket.AF_UNIX) as listener:
        name = f"\0nanochat-{os.getpid()}"
        listener.bind(name)
        listener.listen()
        result = attack(f"import socket\ntry_(lambda: socket.socket(1).connect({name!r}))", (need,), without)
    assert result.stdout.startswith("stopped")


def test_with_the_layers_off_the_same_attempts_succeed(tmp_path):
    """Else the tests above would pass for want of trying."""
    (tmp_path / "mine").write_text("read")
    everything = tuple(name for name in PROTECTIONS if name not in ("rlimits", "no_new_privs", "dies_with_parent"))
    if os.getuid() != 0:
        everything = everything[1:]  # nothing takes "unprivileged" from an ordinary user
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = f"""
            import socket
            try_(lambda: open({str(tmp_path / "mine")!r}).read())
            try_(socket.create_connection, ("127.0.0.1", {server.getsockname()[1]}), 1)
            try_(os.kill, {os.getpid()}, 0)
        """
        result = run_python(TRY + textwrap.dedent(code), _without=everything)
    assert result.stdout.startswith("escaped read\nescaped <socket") and result.stdout.count("escaped") == 3
    assert not any(result.protections[name] for name in everything)


# Processes


@pytest.mark.parametrize(
    ("without", "needs"), [((), ("seccomp",)), (("seccomp",), ("pid_namespace", "user_namespace", "rlimits"))]
)
def test_a_fork_bomb_ends_with_the_call(without, needs):
    code = """
        import time
        while True:
            try: os.fork()
            except OSError: time.sleep(0.01)
    """
    result = attack(code, needs, without, timeout_s=1)
    assert result.timed_out and not result.ok


@pytest.mark.parametrize(("without", "need"), PROCESSES)
def test_no_daemon_stays_behind(without, need):
    code = """
        import signal, time
        def daemon():
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    for i in range(1, 32):
                        if i not in (9, 19): signal.signal(i, signal.SIG_IGN)
                    os.closerange(0, 64)
                    while True: time.sleep(60)
                os._exit(0)
        try_(daemon)
        time.sleep(0.1)
    """
    start = time.monotonic()
    assert attack(code, (need,), without, timeout_s=20).ok
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("without", [(), ("seccomp",), ("pid_namespace",), ("seccomp", "pid_namespace")])
def test_sleeping_for_ever_ends_in_time(without):
    code = """
        import signal, time
        for i in range(1, 32):
            if i not in (9, 19): signal.signal(i, signal.SIG_IGN)
        try_(os.setsid)
        print("before", flush=True)
        os.closerange(0, 64)
        while True: time.sleep(60)
    """
    start = time.monotonic()
    result = attack(code, without=without, timeout_s=0.5)
    assert result.timed_out and result.error == "timed out after 0.5 s" and "before" in result.stdout
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(("without", "need"), PROCESSES)
def test_no_signal_reaches_another_process(without, need):
    got = []
    before = signal.signal(signal.SIGUSR1, lambda *_: got.append(1))
    try:
        code = f"""
            for pid in ({os.getpid()}, -{os.getpid()}, os.getppid(), 0, -1):
                try_(os.kill, pid, 10)
            try_(os.pidfd_open, {os.getpid()})
            print("end")
        """
        result = attack(code, (need,), without)
        time.sleep(0.05)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert got == []
    assert "stopped" in result.stdout.splitlines()[0]


@pytest.mark.parametrize(
    ("without", "need"),
    [((), "mount_namespace"), (("seccomp",), "mount_namespace"), (("mount_namespace",), "landlock")],
)
def test_the_parents_memory_and_environment_are_out_of_sight(without, need, monkeypatch):
    monkeypatch.setenv("SANDBOX_SECRET", "secret-of-the-parent")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as other:
        code = f"""
            import ctypes
            libc = ctypes.CDLL(None, use_errno=True)
            for pid in ({other.pid}, {os.getpid()}, os.getppid()):
                print("ptrace", libc.ptrace(16, pid, None, None))  # PTRACE_ATTACH
                for name in ("environ", "mem", "cmdline", "maps", "fd/0"):
                    try_(lambda: open(f"/proc/{{pid}}/{{name}}", "rb").read(99999))
        """
        result = attack(code, (need,), without)
    assert result.ok, result.stderr
    assert result.stdout.count("ptrace -1") == 3
    assert "escaped" not in result.stdout and "secret-of" not in result.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_the_code_dies_with_its_parent():
    if not given()["dies_with_parent"]:
        pytest.skip("dies_with_parent is off on this machine")
    script = f"import tempfile; tempfile.tempdir = {tempfile.tempdir!r}; from nanochat.execution import run_python\n"
    script += "run_python('while True: pass', timeout_s=60)"
    with subprocess.Popen([sys.executable, "-c", script], cwd=RUNNER.parent.parent) as parent:
        deadline = time.monotonic() + 20
        while len(children := psutil.Process(parent.pid).children(recursive=True)) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.2)
        parent.kill()
    assert len(children) == 2
    _, alive = psutil.wait_procs(children, timeout=5)
    assert alive == []
    for folder in Path(tempfile.gettempdir()).iterdir():
        folder.rmdir()  # nobody was left to do it; it is empty


# Memory and output


@pytest.mark.parametrize(
    "code",
    [
        "x = bytearray(1 << 30)",
        "x = [0] * 10**9",
        "x = []\nwhile True: x.append(bytes(1 << 20))",
        "x = 'a'\nwhile True: x += x",
        "import mmap\ntry: mmap.mmap(-1, 1 << 30)\nexcept OSError as e: raise MemoryError(e)",
    ],
)
def test_a_memory_bomb_ends_itself(code):
    if not given()["rlimits"]:
        pytest.skip("rlimits is off on this machine")
    result = run_python(code, memory_mb=128)
    assert result.memory_exceeded and not result.ok and not result.timed_out


def test_memory_within_the_limit_is_given():
    assert run_python("x = bytearray(100 << 20)", memory_mb=160).ok


def test_endless_recursion_through_c_does_no_harm():
    code = "import sys\nsys.setrecursionlimit(10**8)\ndef f(x): return max([x], key=f)\nf(1)"
    result = attack(code, timeout_s=5)
    assert not result.ok


@pytest.mark.parametrize("target", ["1", "2", "None"])
def test_endless_output_is_cut(target):
    """10 GB to stdout, to stderr, to each descriptor there is."""
    code = f"""
        block = b"x" * (1 << 20)
        for i in range(10_000):
            for fd in ([{target}] if {target} else range(1, 64)):
                try: os.write(fd, block)
                except OSError: pass
    """
    before = psutil.Process().memory_info().rss
    result = attack(code, timeout_s=20)
    assert result.error == f"more than {MAX_OUTPUT} bytes of output" and not result.timed_out
    assert max(len(result.stdout), len(result.stderr)) <= MAX_OUTPUT
    assert psutil.Process().memory_info().rss - before < 20 << 20
