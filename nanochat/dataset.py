"""Get training text into shards: download FineWeb-EDU, convert your own files, or write the embedded default.

    python -m nanochat.dataset                    # no network: an invented world and the English Python carries, 12 MB
    python -m nanochat.dataset -n 8               # 8 training shards of FineWeb-EDU and the pinned validation shard
    python -m nanochat.dataset --source my/texts  # .txt .md .jsonl .parquet, also .gz

The last shard of the folder is the validation split. For downloads that is always the last of the remote list (shard
1822), so validation does not move as -n grows; nanochat takes the last of those asked for. Run it again at any time:
what is whole stays, what is missing or damaged is made anew, and other data is never mixed in.
"""

import contextlib
import fcntl
import hashlib
import shlex
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

from tqdm import tqdm

from nanochat import embedded
from nanochat.common import UserError, raise_disk_error, run_script
from nanochat.config import load_config
from nanochat.remote import BASE_URL, fetch_shards, remote_urls
from nanochat.shards import (
    Manifest,
    Shard,
    damaged,
    default_folder,
    iter_documents,
    load_manifest,
    read_documents,
    shard_name,
    shard_paths,
    write_shard,
)
from nanochat.sources import Errors, Reader, find_files
from nanochat.spool import Spool

__all__ = ["iter_documents", "main", "read_documents", "shard_paths"]


@dataclass(frozen=True)
class DatasetConfig:
    """Write training shards: -n N downloads, --source PATH converts, neither writes the embedded default."""

    SHORT: ClassVar[dict[str, str]] = {"n": "num_files", "w": "num_workers"}

    num_files: Annotated[int | None, "training shards to download, besides the validation shard; -1 is all"] = None
    num_workers: Annotated[int, "downloads at the same time"] = 4
    source: Annotated[str | None, "file, folder or quoted glob of .txt .md .jsonl .parquet"] = None
    embedded: Annotated[bool, "write the embedded default (also the choice where nothing is asked)"] = False
    embedded_mb: Annotated[float, "size of the embedded default in MB of text"] = 12.0
    out: Annotated[str | None, "folder to write; default $NANOCHAT_BASE_DIR/base_data"] = None
    overwrite: Annotated[bool, "replace the data the folder holds"] = False
    base_url: Annotated[str, "where the shards lie"] = BASE_URL
    shard_list: Annotated[str | None, "file with one shard name or URL a line, validation last"] = None
    timeout: Annotated[float, "seconds without data before a connection is cut"] = 30.0
    retries: Annotated[int, "attempts after the first that may fail without progress"] = 5
    shard_mb: Annotated[float, "MB of text in a shard made from --source or the embedded default"] = 32.0
    val_fraction: Annotated[float, "share of text held out for validation (at most one shard)"] = 0.01
    keep_split: Annotated[bool, "--source: files named dev, val or validation are the validation split"] = True
    errors: Annotated[Errors, "--source: what to do with bad input"] = "strict"
    seed: Annotated[int, "of the shuffle and of the embedded world"] = 0

    def __post_init__(self) -> None:
        asked = [k for k in ("num_files", "source", "embedded") if getattr(self, k) not in (None, False)]
        if len(asked) > 1:
            raise ValueError(f"--{asked[0]} and --{asked[1]} exclude each other: give one")
        if self.num_files is not None and self.num_files != -1 and self.num_files < 1:
            raise ValueError(f"-n {self.num_files}: expected a number of shards from 1 on, or -1 for all")
        for key in ("num_workers", "embedded_mb", "timeout", "shard_mb"):
            if getattr(self, key) <= 0:
                raise ValueError(f"--{key}={getattr(self, key)}: expected more than 0")
        if self.retries < 0:
            raise ValueError(f"--retries={self.retries}: expected 0 or more")
        if not 0 < self.val_fraction <= 0.5:
            raise ValueError(f"--val_fraction={self.val_fraction}: expected more than 0, at most 0.5")


def main(argv: list[str]) -> None:
    cfg = load_config(DatasetConfig, argv)
    folder = Path(cfg.out).expanduser() if cfg.out else default_folder()
    command = shlex.join(["python", "-m", "nanochat.dataset", *argv])
    with _locked(folder):
        if cfg.num_files is not None:
            download(cfg, folder, command)
        elif cfg.source:
            convert(cfg, folder, command)
        else:
            if not cfg.embedded:
                print("no -n and no --source: writing the embedded default (-n N downloads FineWeb-EDU)")
            write_embedded(cfg, folder, command)


def write_embedded(cfg: DatasetConfig, folder: Path, command: str) -> None:
    recipe = {**embedded.recipe(cfg.embedded_mb, cfg.seed), **_sharding(cfg)}
    if _up_to_date(folder, recipe, cfg.overwrite):
        return
    build(embedded.embedded_documents(cfg.embedded_mb, cfg.seed), None, folder, recipe, command, cfg)


def convert(cfg: DatasetConfig, folder: Path, command: str) -> None:
    """Local text -> shards. The validation split is a file named so, or a share held out by content."""
    assert cfg.source
    found = find_files(cfg.source, cfg.keep_split)
    files = hashlib.sha256(repr(found.fingerprint()).encode()).hexdigest()
    source = str(Path(cfg.source).expanduser().absolute())
    recipe = {"kind": "source", "source": source, "files": files, "errors": cfg.errors, **_sharding(cfg)}
    recipe["keep_split"] = cfg.keep_split
    if _up_to_date(folder, recipe, cfg.overwrite):
        return
    print(f"reading {len(found.train) + len(found.val)} files from {cfg.source}")
    if found.val:
        print(
            f"validation is {', '.join(p.name for p in found.val)} (by name; --keep_split=false holds out by content)"
        )
    if found.ignored:
        print(f"left out {len(found.ignored)} other files: {', '.join(p.name for p in found.ignored[:5])} ...")
    reader = Reader(cfg.errors)
    lone = len(found.train) == 1
    train = reader.documents(found.train, split_small=lone)
    build(train, reader.documents(found.val) if found.val else None, folder, recipe, command, cfg)
    if reader.replaced or reader.skipped or reader.empty:
        what = f"repaired {reader.replaced}, left out {reader.skipped} bad and {reader.empty} empty documents"
        print(what + (f"; first: {reader.first_fault}" if reader.first_fault else ""))


def build(
    train: Iterable[str],
    val: Iterable[str] | None,
    folder: Path,
    recipe: dict[str, Any],
    command: str,
    cfg: DatasetConfig,
) -> None:
    """Shuffle documents (in bounded memory) and write shards, validation last.

    Where `val` is None, a share of the documents is held out by their content, so that equal texts stay on one side.
    Nothing of what the folder held is touched before all input has been read without fault.
    """
    limit = int(cfg.shard_mb * 1e6)
    with Spool(folder, cfg.seed) as spool:
        for text in _counted(train, "reading"):
            spool.add(text)
        if val is None:
            spool.hold_out(cfg.val_fraction, limit)
        held_out = spool.held_out() if val is None else list(val)
        if not held_out or not spool.documents:
            split = "training" if held_out else "validation"
            raise UserError(
                f"{recipe.get('source', folder)} holds no text for {split}: add some, or --keep_split=false"
            )
        _clear(folder)
        Manifest("building", recipe, command, 0, []).save(folder)
        source = str(recipe.get("source", recipe["kind"]))
        shards: list[Shard] = []
        for texts in _batches(spool.kept(), limit):
            shards.append(write_shard(folder / shard_name(len(shards)), texts, source))
        shards.append(write_shard(folder / shard_name(len(shards)), held_out, source))
    Manifest("complete", recipe, command, len(shards), shards).save(folder)
    rows = sum(s.rows for s in shards[:-1])
    print(f"{folder}: {spool.bytes / 1e6:.1f} MB of text")
    print(f"{len(shards) - 1} training shards of {rows} documents; 1 validation shard of {shards[-1].rows}")


def download(cfg: DatasetConfig, folder: Path, command: str) -> None:
    """Fetch the first N shards of the list and its last one. What is there and whole is not fetched again."""
    urls = remote_urls(cfg.base_url, cfg.shard_list)
    n = len(urls) - 1 if cfg.num_files == -1 else cfg.num_files
    if n is None or n > len(urls) - 1:
        raise UserError(f"-n {n}: there are {len(urls) - 1} training shards (and the validation shard); -n -1 is all")
    recipe = {
        "kind": "download",
        "base_url": cfg.base_url,
        "urls": hashlib.sha256("\n".join(urls).encode()).hexdigest(),
    }
    manifest = load_manifest(folder)
    if _other_data(folder, manifest, recipe):
        _refuse_unless(cfg.overwrite, folder, manifest)
    if manifest is None or manifest.recipe != recipe:
        _clear(folder)
        manifest = None
    have = {s.name: s for s in manifest.shards} if manifest else {}
    for name in damaged(folder, manifest) if manifest else []:
        print(f"{folder / name} is missing or damaged: fetching it again")
        (folder / name).unlink(missing_ok=True)
        del have[name]
    wanted = {shard_name(i): urls[i] for i in [len(urls) - 1, *range(n)]}  # validation first
    missing = {name: url for name, url in wanted.items() if name not in have}
    planned = len(have.keys() | wanted.keys())
    manifest = Manifest("downloading" if missing else "complete", recipe, command, planned, list(have.values()))
    if not missing:
        print(f"{folder}: all {len(have) - 1} training shards and the validation shard are there, nothing to do")
        return manifest.save(folder)
    manifest.save(folder)
    for shard in fetch_shards(missing, folder, cfg.num_workers, cfg.timeout, cfg.retries):
        manifest = replace(manifest, shards=sorted([*manifest.shards, shard], key=lambda s: s.name))
        manifest.save(folder)
    replace(manifest, state="complete").save(folder)
    print(f"{folder}: {planned - 1} training shards and the validation shard")
    return None


def _sharding(cfg: DatasetConfig) -> dict[str, Any]:
    return {"shard_mb": cfg.shard_mb, "val_fraction": cfg.val_fraction, "seed": cfg.seed}


def _up_to_date(folder: Path, recipe: dict[str, Any], overwrite: bool) -> bool:
    """Whether the folder holds just this, whole. UserError where it holds something else and may not be replaced."""
    manifest = load_manifest(folder)
    if _other_data(folder, manifest, recipe):
        _refuse_unless(overwrite, folder, manifest)
        return False
    if manifest is None or manifest.state != "complete":
        return False
    bad = damaged(folder, manifest)
    if bad:
        print(f"{folder / bad[0]} is missing or damaged: making the data again")
        return False
    print(f"{folder}: holds this data already ({len(manifest.shards)} shards), nothing to do")
    return True


def _other_data(folder: Path, manifest: Manifest | None, recipe: dict[str, Any]) -> bool:
    if manifest is None:
        return any(folder.glob("shard_*.parquet"))
    return manifest.recipe != recipe and (manifest.state != "building")


def _refuse_unless(overwrite: bool, folder: Path, manifest: Manifest | None) -> None:
    if not overwrite:
        what = f"data made by `{manifest.command}`" if manifest else "shards with no manifest, made by another tool"
        raise UserError(f"{folder} holds {what}: pass --overwrite to replace it, or --out=DIR to write elsewhere")


def _clear(folder: Path) -> None:
    """Remove our files and nothing else; the manifest last, so that a half-cleared folder is never read as whole."""
    for path in [*folder.glob("shard_*.parquet*"), folder / "manifest.json"]:
        path.unlink(missing_ok=True)


def _batches(texts: Iterable[str], limit: int) -> Iterator[list[str]]:
    """Lists of documents of about `limit` bytes each."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text.encode())
        if size >= limit:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _counted(texts: Iterable[str], what: str) -> Iterator[str]:
    return iter(tqdm(texts, desc=what, unit=" documents", disable=not sys.stderr.isatty()))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One writer at a time in a data folder; the lock goes with the process, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115 (closed by the `with` below)
    except OSError as e:
        raise_disk_error(e, folder)
        raise UserError(f"cannot write to {folder} ({e.strerror}): choose another folder with --out=DIR") from e
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is writing to {folder}: wait for it, or choose --out=DIR") from None
        yield


if __name__ == "__main__":
    run_script(main)
