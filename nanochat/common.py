"""Where files live, how they are written, and what this machine is. No torch here: retrieval and the CLIs share it."""

import contextlib
import ctypes
import datetime
import errno
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from nanochat.config import UserError

REPO_DIR = Path(__file__).resolve().parent.parent


def base_dir() -> Path:
    """$NANOCHAT_BASE_DIR, default ~/.cache/nanochat: data, tokenizer, checkpoints, report."""
    return Path(os.environ.get("NANOCHAT_BASE_DIR") or Path.home() / ".cache" / "nanochat")


def data_dir() -> Path | None:
    """Folder of real data: $NANOCHAT_DATA, else ../shared/data beside the repo where that exists, else None."""
    given = os.environ.get("NANOCHAT_DATA")
    if given and not Path(given).is_dir():
        raise UserError(f"NANOCHAT_DATA={given} is not a folder: point it at the data, or unset it")
    default = REPO_DIR.parent / "shared" / "data"
    return Path(given) if given else default if default.is_dir() else None


error_exits: list[Callable[[int], None]] = []  # what run_script calls with the exit code once it has told an error


def run_script(main: Callable[[list[str]], None]) -> None:
    """Run a script's main(argv). A UserError becomes one line on stderr and exit code 2, and so does what the system
    refuses (a full disk, a file where a folder belongs); Ctrl-C exits 130."""
    try:
        main(sys.argv[1:])
    except UserError as e:
        _fail(f"error: {e}", 2)
    except BrokenPipeError:  # whoever read the output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _fail("error: nobody reads the output any more", 1)
    except OSError as e:
        _fail(f"error: {_refused(e)}", 2)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except Exception:
        if not error_exits:
            raise
        _fail(traceback.format_exc().rstrip(), 1)


def _fail(text: str, code: int) -> NoReturn:
    print(text, file=sys.stderr)
    for leave in error_exits:
        leave(code)
    raise SystemExit(code) from None


def _refused(e: OSError) -> str:
    """What the system would not do, where, and what to do."""
    if known := _disk_error(e, Path(e.filename or "a file")):
        return str(known)
    what = f"{e.filename}: {e.strerror}" if e.filename else str(e) or type(e).__name__
    return f"{' '.join(what.split())}: mend that, or name another path"


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "wb") -> Iterator[Any]:
    """Open a temporary file beside `path`; on success flush, fsync and rename it over `path`, on error remove it."""
    path = Path(path)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(tmp, mode, encoding=None if "b" in mode else "utf-8") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
        fsync_dir(path.parent)
    except OSError as e:
        raise_disk_error(e, path)
    finally:
        with contextlib.suppress(OSError):  # on a read-only disk this would hide what went wrong
            tmp.unlink(missing_ok=True)


WHERE = "NANOCHAT_BASE_DIR, or --output where the command has it"


def _disk_error(e: OSError, path: Path) -> UserError | None:
    """Of a full disk or a read-only folder, naming folder and cure."""
    if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return UserError(f"no space left writing {path}: free space, or write elsewhere ({WHERE})")
    if e.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return UserError(f"cannot write {path} ({e.strerror}): make it writable, or write elsewhere ({WHERE})")
    return None


def raise_disk_error(e: OSError, path: Path) -> NoReturn:
    """Turn a full disk or a read-only folder into a UserError; raise anything else as it is."""
    if known := _disk_error(e, path):
        raise known from e
    raise e


def fsync_dir(path: Path) -> None:
    """Make a rename in `path` survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_json(path: Path, value: Any) -> None:
    with atomic_write(path, "w") as f:
        json.dump(value, f, indent=1, ensure_ascii=False)
        f.write("\n")


def read_json(path: Path, what: str = "file") -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{what} {path} does not exist") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{what} {path} is not valid JSON ({e}): restore it or make it again") from e


def sha256_file(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def git_state() -> dict[str, str]:
    """{"commit", "branch", "dirty"}, empty outside a git checkout."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=REPO_DIR, capture_output=True, text=True, timeout=10)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "--short", "HEAD")
        if not commit:
            return {}
        dirty = "yes" if git("status", "--porcelain") else "no"
        return {"commit": commit, "branch": git("rev-parse", "--abbrev-ref", "HEAD"), "dirty": dirty}
    except (OSError, subprocess.TimeoutExpired):
        return {}


def keep_freed_memory(keep: bool = True) -> None:
    """Whether freed memory stays with the process; a C library other than glibc is left as it is.

    glibc gives large blocks back to the kernel, and at the next step they are faulted in again page by page: 19,000
    faults a training step at depth 4 (docs/LOG.md, 2026-11-21). keep=False is where glibc's own thresholds settle in a
    process that uses such blocks, for benchmarks of code that does not import nanochat.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(-1, 1 << 30 if keep else 64 << 20)  # M_TRIM_THRESHOLD of malloc.h
    libc.mallopt(-3, 1 << 30 if keep else 32 << 20)  # M_MMAP_THRESHOLD


def find_uv() -> str:
    """Path of uv: from PATH, else beside this Python. UserError where there is none."""
    beside = Path(sys.executable).with_name("uv")
    found = shutil.which("uv") or (str(beside) if beside.is_file() else None)
    if found is None:
        raise UserError(f"uv is needed to install the peers: {sys.executable} -m pip install uv")
    return found


def cpu_flags() -> set[str]:
    """Instruction-set flags of the CPU (Linux), empty elsewhere."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return set(line.partition(":")[2].split())
    except OSError:
        pass
    return set()


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 natively (AVX-512 BF16 or AMX): about twice float32's speed."""
    return bool({"avx512_bf16", "amx_bf16"} & cpu_flags())


def machine_info() -> dict[str, Any]:
    """What a benchmark or report says of the machine: CPU, cores, memory, system. The GPU is the caller's to add."""
    model = next(
        (x.partition(":")[2].strip() for x in _lines("/proc/cpuinfo") if x.startswith("model name")), platform.machine()
    )
    total = next((int(x.split()[1]) for x in _lines("/proc/meminfo") if x.startswith("MemTotal")), 0)
    fast = sorted({"avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16"} & cpu_flags())
    return {
        "cpu": model,
        "cpu_features": fast,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(total / 2**20, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
