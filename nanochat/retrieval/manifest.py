"""What a knowledge base consists of: manifest.json, the lock of its writer, and which files may go.

The manifest names every file with its size and SHA-256 and is replaced by a rename: it is the version. Folders are
    segments/NAME/    documents.arrow, chunks.arrow, ids.npy, rows.npy and a folder per index; never changed
    deleted/          rows of a segment that are deleted, one file per segment and version
    shared/NAME/      a folder per index: what its segments share (an encoder)
where NAME is the version that wrote them. A writer removes, before and after its work, what neither the manifest names
nor the version before it (`previous`): a reader may be about to open those.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanochat.common import atomic_write, raise_disk_error, read_json, sha256_file
from nanochat.config import UserError

FORMAT = 1
FILE = "manifest.json"
FOLDERS = ("segments", "deleted", "shared")
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

Manifest = dict[str, Any]


def read(path: Path) -> Manifest:
    """The manifest of the base at `path`. UserError where there is none, or it is not as it was written."""
    file = path / FILE
    if not file.is_file():
        unfinished = "only an unfinished build" if (path / "segments").is_dir() else "no knowledge base"
        raise UserError(f"{path} holds {unfinished}: KnowledgeBase.build(documents, {str(path)!r}) makes one")
    manifest = read_json(file, "manifest")
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise UserError(f"{file} has format {found!r}, this version reads {FORMAT}: build the base again")
    if manifest.get("sha256") != _digest(manifest):
        raise UserError(f"{file} is damaged: its own sha256 does not match; restore it or build the base again")
    return manifest


def write(path: Path, manifest: Manifest) -> Manifest:
    """Make `manifest` the version at `path`; everything it names must lie there, flushed."""
    manifest = json.loads(json.dumps(manifest, default=lambda number: number.item()))  # numpy's numbers
    manifest["sha256"] = _digest(manifest)
    with atomic_write(path / FILE, "w") as f:
        json.dump(manifest, f, indent=1, ensure_ascii=False)
        f.write("\n")
    return manifest


def _digest(manifest: Manifest) -> str:
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def files(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """Path within the base -> {"size", "sha256"}, for every file but the manifest."""
    found = dict(manifest["shared"]["files"])
    for segment in manifest["segments"]:
        found |= segment["files"]
        if segment["deleted"]:
            found |= segment["deleted"]["file"]
    return found


def units(manifest: Manifest) -> list[str]:
    """What is kept or removed as one: segments, deletion files, the shared folder."""
    names = [f"segments/{segment['name']}" for segment in manifest["segments"]]
    names += [name for segment in manifest["segments"] if segment["deleted"] for name in segment["deleted"]["file"]]
    return names + ([f"shared/{manifest['shared']['name']}"] if manifest["shared"]["name"] else [])


def check_sizes(path: Path, manifest: Manifest) -> None:
    """UserError naming the first file that is missing or has another length."""
    for name, saved in files(manifest).items():
        try:
            size = (path / name).stat().st_size
        except FileNotFoundError:
            raise MissingFile(f"{path / name} is missing: restore it or build the base again") from None
        if size != saved["size"]:
            raise UserError(
                f"{path / name} is {size:,} bytes long, {saved['size']:,} were written: restore it or build again"
            )


def check_hashes(path: Path, manifest: Manifest) -> None:
    """check_sizes, then UserError naming the first file whose content is not what was written."""
    check_sizes(path, manifest)
    for name, saved in files(manifest).items():
        if sha256_file(path / name) != saved["sha256"]:
            raise UserError(
                f"{path / name} is damaged: its sha256 is not the one it was written with; "
                "restore it or build the base again"
            )


class MissingFile(UserError):
    """A file the manifest names is not there: damage, or a writer has gone on by two versions meanwhile."""


# ---- writing ----


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Be the only writer at `path`. Files of no use are removed: older versions, work of a dead or failing writer."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with _lock(path):
            clear_leftovers(path)  # of a writer that was killed
            try:
                yield
            finally:
                clear_leftovers(path)
    except OSError as e:
        raise_disk_error(e, path)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """flock on PATH/.lock, which holds the writer's process id. Released by the system when the process dies."""
    with open(path / ".lock", "a+") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            f.seek(0)
            raise UserError(
                f"{path} is being written by process {f.read().strip() or '(starting)'}: wait until it has finished"
            ) from None
        except OSError as e:
            if e.errno not in NO_LOCKS:
                raise
            print(f"note: {path} is on a disk without file locks: let only one process write there", file=sys.stderr)
        f.truncate(0)
        f.write(f"{os.getpid()}\n")
        f.flush()
        yield


def clear_leftovers(path: Path) -> None:
    """Remove what neither the manifest names nor the version before it."""
    manifest = read(path) if (path / FILE).exists() else None
    kept = {*units(manifest), *manifest["previous"]} if manifest else set()
    for folder in FOLDERS:
        for found in sorted((path / folder).glob("*")):
            if f"{folder}/{found.name}" not in kept:
                shutil.rmtree(found) if found.is_dir() else found.unlink()
    for partial in path.glob(f".{FILE}.*.tmp"):
        partial.unlink()
