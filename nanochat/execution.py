"""Run Python that a model wrote, in a process of its own that can reach as little as this kernel allows.

    result = run_python("print(1 + 1)", timeout_s=2.0)        # result.ok, result.stdout == "2\n"
    python -m nanochat.execution                              # what this machine protects from, and what not

`nanochat/sandbox_runner.py` is the other side. Each protection is tried at each call and stands in
`Result.protections` as on or off; `protections_required` turns an off into an error before the code runs.

`ok` says that the code came to its last line, not that it exited with 0: sys.exit(0) and os._exit(0) are failures. It
is no proof against code that overrides `__eq__`, or searches the interpreter's memory for the proof of its own end.
"""

import contextlib
import math
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from nanochat.calculator import MAX_BITS, calculate
from nanochat.common import run_script
from nanochat.config import UserError

__all__ = ["MAX_BITS", "PROTECTIONS", "Result", "calculate", "probe", "run_many", "run_python"]

RUNNER = Path(__file__).with_name("sandbox_runner.py")
MAX_OUTPUT = 64 << 10  # bytes of stdout, and of stderr, after which the code is stopped
STARTUP_S = 20.0  # seconds for the process to start; the code's own time counts from there
GRACE_S = 1.0  # seconds between asking the process to end and ending its group

PROTECTIONS = {
    "unprivileged": "not root, and no capabilities",
    "user_namespace": "no rights over this machine's own namespaces",
    "mount_namespace": "sees Python's library, four devices and an empty 64 MiB /tmp in memory, no other file",
    "pid_namespace": "sees no other process; all it started ends with it",
    "net_namespace": "no network, not even localhost",
    "ipc_namespace": "no shared memory or queues with others",
    "uts_namespace": "cannot rename the machine",
    "landlock": "reads Python's library, writes its own folder, no other file",
    "seccomp": "no new process, socket, exec, ptrace, mount, signal to others",
    "rlimits": "memory, CPU, file size, processes, open files",
    "no_new_privs": "no rights from setuid files",
    "dies_with_parent": "ends when this process ends, however that ends",
}


@dataclass(frozen=True)
class Result:
    """What came of a run. stdout and stderr hold at most MAX_OUTPUT bytes each, decoded with replacement marks.

    `error` is None exactly when `ok`: else the exception, signal, exit or limit, in one line.
    """

    ok: bool
    stdout: str
    stderr: str
    error: str | None
    timed_out: bool = False
    memory_exceeded: bool = False
    protections: dict[str, bool] = field(default_factory=dict)


def run_python(
    code: str,
    *,
    timeout_s: float = 5.0,
    memory_mb: int = 256,
    stdin: str = "",
    protections_required: Collection[str] = (),
    _without: Collection[str] = (),
) -> Result:
    """Run `code` as __main__ with `stdin`. Nothing of it is left afterwards: no process, no file.

    timeout_s: wall-clock seconds from the code's first line; CPU time is limited too. memory_mb: MiB of address space,
    about 30 of which are Python itself. Raises UserError for a limit out of range and for a required protection
    (names: PROTECTIONS) that is off here: the code has then not run. `_without` leaves some out, to test the others.
    """
    if not (0 < timeout_s < 1e6 and memory_mb >= 64):
        raise UserError(f"timeout_s={timeout_s}, memory_mb={memory_mb}: a time above 0 and 64 MiB at least")
    if unknown := set(protections_required) - set(PROTECTIONS):
        raise UserError(f"no protection is called {sorted(unknown)[0]!r}: {', '.join(PROTECTIONS)}")
    nonce, script = secrets.token_hex(16), code.encode(errors="surrogatepass")
    limits = f"{len(script)} {math.ceil(timeout_s) + 1} {memory_mb << 20}"
    request = f"{nonce} {limits} {','.join(_without)} {','.join(protections_required)}\n".encode()
    work = tempfile.mkdtemp(prefix="nanochat-sandbox-")
    try:
        run = _Run(work, request + script + stdin.encode(errors="surrogatepass"), timeout_s)
    finally:
        _remove(work)
    return _result(run, nonce, timeout_s, protections_required)


def run_many(codes: Iterable[str], workers: int = 2, **options) -> list[Result]:
    """`run_python` for each of `codes`, `workers` at a time, with the same options. Results in the order of `codes`."""
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda code: run_python(code, **options), codes))


def probe() -> dict[str, bool]:
    """Which protections this machine gives, tried on an empty program."""
    return run_python("").protections


class _Run:
    """One run of the runner, from its start to the end of its process group. Holds what came out of its pipes."""

    def __init__(self, work: str, request: bytes, timeout_s: float) -> None:
        self.out: dict[str, bytearray] = {"stdout": bytearray(), "stderr": bytearray(), "status": bytearray()}
        self.stopped = ""  # "time" or "output", where this side ended the run
        status, theirs = os.pipe()
        command = [sys.executable, "-I", "-S", "-X", "utf8", str(RUNNER), str(os.getpid()), str(theirs)]
        pipe = subprocess.PIPE
        with open(status, "rb", buffering=0) as reader:
            try:
                process = subprocess.Popen(
                    command, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0, env={}, cwd=work,
                    pass_fds=(theirs,), start_new_session=True,
                )  # fmt: skip
            finally:
                os.close(theirs)
            with process:
                try:
                    _send(process, request)
                    self._read({"stdout": process.stdout, "stderr": process.stderr, "status": reader}, timeout_s)
                finally:
                    _end(process)

    def _read(self, pipes: dict, timeout_s: float) -> None:
        """Read all pipes to their end, or to a limit. The clock starts anew with the first line of status."""
        deadline, started = time.monotonic() + STARTUP_S, False
        with selectors.DefaultSelector() as selector:
            for name, pipe in pipes.items():
                selector.register(pipe, selectors.EVENT_READ, name)
            while selector.get_map():
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                for key, _ in ready:
                    chunk = os.read(key.fd, 1 << 16)
                    self.out[key.data] += chunk
                    if not chunk:
                        selector.unregister(key.fileobj)
                if not started and b"\n" in self.out["status"]:
                    deadline, started = time.monotonic() + timeout_s, True
                if any(len(text) > MAX_OUTPUT for text in self.out.values()):
                    self.stopped = "output"
                    return
                if time.monotonic() >= deadline:
                    self.stopped = "time"
                    return


def _send(process: subprocess.Popen, request: bytes) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it could not start: its stderr tells
        process.stdin.write(request)
    process.stdin.close()


def _end(process: subprocess.Popen) -> None:
    """Have the runner end the code and itself, then end whatever is left of its group, and only then reap it."""
    if hasattr(os, "waitid"):  # not on macOS
        os.kill(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_S
        while not os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG):
            if time.monotonic() > deadline:
                break
            time.sleep(0.001)
    with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: EPERM for a group of zombies
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _remove(folder: str) -> None:
    """Remove the working folder. What code can leave there, without a mount namespace, may be too deep for Python."""
    try:
        shutil.rmtree(folder)
    except (OSError, RecursionError):
        if subprocess.run(["rm", "-rf", folder], stderr=subprocess.DEVNULL).returncode:
            subprocess.run(["chmod", "-R", "u+rwX", folder], stderr=subprocess.DEVNULL)
            subprocess.run(["rm", "-rf", folder], check=True)


def _result(run: _Run, nonce: str, timeout_s: float, required: Collection[str]) -> Result:
    """Judge a run. Only the first line of status is the runner's for certain; the code may have written to the rest."""
    stdout, stderr, status = (bytes(run.out[name])[:MAX_OUTPUT].decode(errors="replace") for name in run.out)
    first, line_ends, rest = status.partition("\n")
    if not line_ends:
        raise RuntimeError(f"the sandbox did not start (status {status!r}): {stderr.strip()[-500:]}")
    given = dict(word.split("=") for word in first.split())
    protections = {name: given.get(name) == "1" for name in PROTECTIONS}
    if off := [name for name in required if not protections[name]]:
        raise UserError(f"this machine does not give {', '.join(off)}: run elsewhere, or require less")
    verdict, _, exit_code = rest.rpartition("\n")
    if run.stopped == "time":
        error = f"timed out after {timeout_s:g} s"
    elif run.stopped == "output":
        error = f"more than {MAX_OUTPUT} bytes of output"
    elif verdict == nonce and exit_code == "0":
        error = None
    else:
        error = verdict or _ending(exit_code)
    memory = error is not None and error.startswith("MemoryError")
    return Result(error is None, stdout, stderr, error, run.stopped == "time", memory, protections)


def _ending(exit_code: str) -> str:
    """'0' -> 'exited with 0 before its end'; '137' -> 'ended by SIGKILL'."""
    if exit_code.isdigit() and int(exit_code) > 128:
        with contextlib.suppress(ValueError):
            return f"ended by {signal.Signals(int(exit_code) - 128).name}"
    return f"exited with {exit_code or 'no code'} before its end"


def main(argv: list[str]) -> None:
    """Print what this machine gives."""
    for name, on in probe().items():
        print(f"{name:18s} {'on' if on else 'OFF':3s}  {PROTECTIONS[name]}")


if __name__ == "__main__":
    run_script(main)
