"""Step folders on disk: which exist, which are whole, and how a new one appears without ever leaving none.

A save fills `.tmp-step_000100`, fsyncs it and renames it: a folder called step_* was complete at that moment. Saving a
step again first moves the old folder to `.old-step_000100`; while step_000100 is absent, readers use the old one. What
is to be deleted is first renamed to `.trash-*`. The next save clears, under a lock, whatever a dead run left behind.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any

from nanochat.common import fsync_dir, read_json, sha256_file
from nanochat.config import UserError

FORMAT = 1
STEP_NAME = re.compile(r"(\.old-)?step_(\d{6,})")
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

Files = dict[str, dict[str, Any]]  # file name -> {"size": bytes, "sha256": hex}


def step_name(step: int) -> str:
    return f"step_{step:06d}"


def step_of(folder: Path) -> int | None:
    found = STEP_NAME.fullmatch(folder.name)
    return int(found[2]) if found else None


# ---- writing ----


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """One process at a time saves into a folder, so a temporary folder found under the lock belongs to a dead run."""
    with open(directory / ".lock", "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX)
        except OSError as e:
            _no_locks(e, directory)
        yield


def claim(directory: Path) -> IO[str] | None:
    """The folder for this process alone while the file it returns is open; None where another process has it.

    A record lock: a killed process leaves none behind, also where its children live on.
    """
    directory.mkdir(parents=True, exist_ok=True)
    file = open(directory / ".training", "w")  # noqa: SIM115
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno in (errno.EACCES, errno.EAGAIN):
            file.close()
            return None
        _no_locks(e, directory)
    return file


def _no_locks(e: OSError, directory: Path) -> None:
    if e.errno not in NO_LOCKS:
        raise e
    print(f"note: {directory} is on a disk without file locks: let only one run save there", file=sys.stderr)


def clear_leftovers(directory: Path) -> None:
    """Undo what a kill left: a step moved aside comes back unless its successor is in place; the rest is removed."""
    for old in directory.glob(".old-step_*"):
        target = old.with_name(old.name.removeprefix(".old-"))
        if not target.exists():
            os.replace(old, target)
    for pattern in (".tmp-step_*", ".old-step_*", ".trash-step_*"):
        for dead in directory.glob(pattern):
            shutil.rmtree(dead)


def swap_in(tmp: Path, target: Path) -> None:
    """Rename tmp to target. At every moment a whole folder is at target or at .old-target."""
    old = target.with_name(f".old-{target.name}")
    if target.exists():
        os.replace(target, old)
    os.replace(tmp, target)
    fsync_dir(target.parent)
    fsync_dir(target.parent.parent)
    if old.exists():
        shutil.rmtree(old)


def drop_older(directory: Path, step: int, keep_last: int) -> None:
    """Remove all but the newest `keep_last` steps up to `step`. Later ones, of an abandoned run, are the user's."""
    steps = list_steps(directory)
    for old in [s for s in steps if s <= step][:-keep_last]:
        trash = directory / f".trash-{step_name(old)}"
        os.replace(directory / step_name(old), trash)
        shutil.rmtree(trash)
    if later := [s for s in steps if s > step]:
        print(
            f"note: {directory} also holds later steps {later} of an earlier run, and --resume would take {later[-1]}: "
            "delete them, or train under another --model_tag",
            file=sys.stderr,
        )


# ---- checking ----


def manifest_text(step: int, saved_at: float, files: Files) -> str:
    """The manifest of a step; its own sha256 makes a flipped byte in it detectable."""
    content = {"format": FORMAT, "step": step, "saved_at": saved_at, "files": dict(sorted(files.items()))}
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=1) + "\n"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a step folder. UserError unless it is byte for byte what a save of that step writes."""
    path = folder / "manifest.json"
    manifest = read_json(path, "manifest")
    try:
        if manifest["format"] != FORMAT:
            raise UserError(f"{path} has format {manifest['format']!r}, this version reads {FORMAT}")
        whole = manifest_text(manifest["step"], manifest["saved_at"], manifest["files"])
    except (KeyError, TypeError, AttributeError):
        whole = ""
    if path.read_bytes() != whole.encode() or manifest["step"] != step_of(folder):
        raise UserError(f"{path} is damaged: its own sha256 does not match")
    return manifest


def check(folder: Path, names: Collection[str] | None = None) -> None:
    """UserError naming the first missing, cut or changed file. names: look only at these, as far as they were saved."""
    try:
        for name, saved in read_manifest(folder)["files"].items():
            if names is not None and name not in names:
                continue
            path = folder / name
            if not path.is_file():
                raise UserError(f"{path} is missing")
            if path.stat().st_size != saved["size"]:
                raise UserError(f"{path} is {path.stat().st_size:,} bytes long, {saved['size']:,} were saved")
            if sha256_file(path) != saved["sha256"]:
                raise UserError(f"{path} is damaged: its sha256 is not the one it was saved with")
    except OSError as e:
        raise UserError(f"{e.filename or folder} cannot be read: {e.strerror}") from e


def folders(directory: Path) -> dict[int, Path]:
    """step -> folder, rising. A step moved aside counts while its successor is not in place."""
    found: dict[int, Path] = {}
    for name in sorted((p.name for p in Path(directory).glob("*step_*")), reverse=True):  # step_* before .old-step_*
        if match := STEP_NAME.fullmatch(name):
            found.setdefault(int(match[2]), Path(directory) / name)
    return dict(sorted(found.items()))


def folder_of(directory: Path, step: int) -> Path:
    """The folder of a step. UserError listing the steps there are."""
    have = folders(directory)
    if step not in have:
        raise UserError(f"no step {step} in {directory}: it has {', '.join(map(str, have)) or 'no checkpoint'}")
    return have[step]


def list_steps(directory: Path) -> list[int]:
    """Saved steps, rising, whole or not."""
    return list(folders(directory))


def newest_whole(directory: Path) -> int | None:
    """The newest step whose every file is as it was saved, or None. One line on stderr for each step passed over."""
    return newest(directory, tell=True)


def newest(
    directory: Path, names: Collection[str] | None = None, but: int | None = None, tell: bool = False
) -> int | None:
    """newest_whole, looking only at the files `names`, leaving out the step `but`, silent unless `tell`."""
    for step, folder in reversed(folders(directory).items()):
        if step == but:
            continue
        try:
            check(folder, names)
            return step
        except UserError as e:
            if tell:
                print(f"passing over checkpoint {folder.name}: {e}", file=sys.stderr)
    return None


def good_step_hint(directory: Path, names: Collection[str] | None = None, but: int | None = None) -> str:
    step = newest(directory, names, but)
    if step is None:
        return f"there is no other good step in {directory}"
    return f"the newest good step in {directory} is {step}: --resume goes on from it, --step={step} loads it"


def verify(directory: Path, step: int, names: Collection[str] | None = None) -> None:
    """UserError naming the bad file and the newest good step unless every file of the step is as it was saved."""
    folder = folder_of(directory, step)
    try:
        check(folder, names)
    except UserError as e:
        raise UserError(f"{e}; {good_step_hint(directory, names, but=step)}") from e
