"""Run a command as users do, in a process that may be killed at any moment, without paying for its imports each time.

A child is a fork of this process, which has imported everything and computed nothing. It runs the module as
`python -m MODULE` would: same argv, same exit code, same lines on stdout and stderr.
"""

import ctypes
import os
import runpy
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

Prelude = Callable[[], None]
NEWNS, NEWUSER = 0x00020000, 0x10000000  # clone(2)
RDONLY, REMOUNT, PRIVATE_REC = 1, 32, (1 << 18) | (1 << 14)  # mount(2)


@dataclass(frozen=True)
class Command:
    """module and arguments; a callable in the place of the module is run by run_script."""

    run: str | Callable[[list[str]], None]
    args: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Done:
    """code: as a shell shows it, negative where a signal ended the process."""

    code: int
    out: str
    err: str

    @property
    def trace(self) -> bool:
        return "Traceback (most recent call last)" in self.err + self.out


class Child:
    """A command that runs. prelude: called in the child before it."""

    def __init__(self, command: Command, base: Path, logs: Path, prelude: Prelude | None = None) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.out, self.err = logs / "out", logs / "err"
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _become(command, base, self.out, self.err, prelude)

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def kill(self, after: float) -> bool:
        """SIGKILL after so many seconds -> whether it was still running."""
        end = time.monotonic() + after
        while time.monotonic() < end:
            if self.poll() is not None:
                return False
            time.sleep(min(0.002, max(0.0, end - time.monotonic())))
        os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status) == -signal.SIGKILL

    def wait(self, timeout: float = 600) -> Done:
        """What became of it. A child that does not end within the timeout counts as killed by it (code -9)."""
        end = time.monotonic() + timeout
        code = self.poll()
        while code is None and time.monotonic() < end:
            time.sleep(0.002)
            code = self.poll()
        if code is None:
            self.kill(0)
            code = -signal.SIGKILL
        return Done(code, self.out.read_text(errors="replace"), self.err.read_text(errors="replace"))


def run(command: Command, base: Path, logs: Path, prelude: Prelude | None = None) -> Done:
    return Child(command, base, logs, prelude).wait()


def _become(command: Command, base: Path, out: Path, err: Path, prelude: Prelude | None) -> None:
    """In the child: run the command, then leave without the parent's exit handlers."""
    code = 1
    try:
        for path, number in ((out, 1), (err, 2)):
            fd = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
            os.dup2(fd, number)
        os.environ["NANOCHAT_BASE_DIR"] = str(base)
        if prelude:
            prelude()
        code = _exit_code(command)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def _exit_code(command: Command) -> int:
    name = command.run if isinstance(command.run, str) else "act"
    sys.argv = [name, *command.args]
    try:
        if isinstance(command.run, str):
            warnings.filterwarnings("ignore", "'.*' found in sys.modules", RuntimeWarning)
            runpy.run_module(command.run, run_name="__main__", alter_sys=True)
        else:
            from nanochat.common import run_script

            run_script(command.run)
    except SystemExit as e:
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
        return e.code if isinstance(e.code, int) else int(e.code is not None)
    return 0


# ---- preludes ----


def dies_at(n: int) -> Prelude:
    """SIGKILL to itself before its n-th change of a file system: flush, rename, removal, new folder."""

    def prelude() -> None:
        left = [n]
        for name in ("fsync", "replace", "rename", "unlink", "rmdir", "mkdir"):
            setattr(os, name, _counting(getattr(os, name), left))

    return prelude


def _counting(work: Callable, left: list[int]) -> Callable:
    def counted(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return work(*args, **kwargs)

    return counted


def own_mounts(mount_point: Path, size: int) -> None:
    """An empty tmpfs of `size` bytes at mount_point that only this process and its children see. OSError where the
    kernel allows it to no user of this kind."""
    uid, gid = os.getuid(), os.getgid()
    _call("unshare", NEWNS if uid == 0 else NEWNS | NEWUSER)
    if uid != 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    _call("mount", b"none", b"/", None, PRIVATE_REC, None)
    _call("mount", b"tmpfs", str(mount_point).encode(), b"tmpfs", 0, f"size={size}".encode())


def read_only(mount_point: Path, on: bool) -> None:
    _call("mount", b"none", str(mount_point).encode(), None, REMOUNT | (RDONLY if on else 0), None)


def _call(name: str, *args: object) -> None:
    """A C library function that returns 0, or OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    wrapped = [ctypes.c_ulong(a) if isinstance(a, int) and name == "mount" else a for a in args]
    if getattr(libc, name)(*wrapped) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
