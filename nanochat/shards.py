"""Parquet shards on disk: write, check, list and read them, and the manifest that says what a data folder holds.

A data folder has shard_NNNNN.parquet files (column `text`), the last of which is the validation split, and
manifest.json: the recipe that made it and rows, bytes and SHA-256 of each shard. A folder of shards without a manifest
(made by other tools) is read too, checked by the marks at both ends of each file only.
"""

import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import UserError, atomic_write, base_dir, read_json, sha256_file, write_json

GROUP_ROWS = 512  # documents in a row group: small enough to share out among ranks, large enough to compress
GROUP_BYTES = 4_000_000  # text in a row group, where documents are long
MAKE = "python -m nanochat.dataset"
SCHEMA = pa.schema([("text", pa.string())])


@dataclass(frozen=True)
class Shard:
    """One line of the manifest. bytes and sha256 are of the file; source says where its text came from."""

    name: str
    rows: int
    bytes: int
    sha256: str
    source: str


@dataclass(frozen=True)
class Manifest:
    """state: "building" (not usable yet), "downloading" (usable once validation is there) or "complete"."""

    state: Literal["building", "downloading", "complete"]
    recipe: dict[str, Any]
    command: str
    planned: int
    shards: list[Shard]
    format: int = 1

    def save(self, folder: Path) -> None:
        write_json(folder / "manifest.json", asdict(self))


def default_folder() -> Path:
    return base_dir() / "base_data"


def load_manifest(folder: Path) -> Manifest | None:
    """The manifest, None where there is none. UserError where it cannot be read."""
    path = folder / "manifest.json"
    if not path.is_file():
        return None
    value = read_json(path, "data manifest")
    try:
        shards = [Shard(**s) for s in value.pop("shards")]
        return Manifest(shards=shards, **value)
    except (TypeError, KeyError, AttributeError) as e:
        raise UserError(f"{path} is not a data manifest ({e}): make the data again with {MAKE} --overwrite") from e


def shard_name(index: int) -> str:
    return f"shard_{index:05d}.parquet"


def shard_paths(split: Literal["train", "val"], data_dir: Path | None = None, verify: bool = False) -> list[Path]:
    """Shards of a split in name order; the last shard of the folder is "val", all before it are "train".

    Sizes are always compared with the manifest, hashes where `verify` is set. UserError names the file and the cure.
    """
    assert split in ("train", "val"), split
    folder = Path(data_dir) if data_dir else default_folder()
    manifest = load_manifest(folder)
    if manifest:
        cure = f"run `{manifest.command}` again, it makes damaged shards anew"
        if manifest.state == "building":
            raise UserError(f"the data in {folder} is unfinished: run `{manifest.command}` again")
        if manifest.state == "downloading":
            have = f"{len(manifest.shards)} of {manifest.planned} shards"
            warnings.warn(f"{folder}: using {have}; the download is unfinished (`{manifest.command}`)", stacklevel=2)
        shards = sorted(manifest.shards, key=lambda s: s.name)
        for shard in shards:
            problem = _problem(folder / shard.name, shard, verify)
            if problem:
                raise UserError(f"{folder / shard.name} {problem}: {cure}")
        paths = [folder / s.name for s in shards]
    else:
        paths = sorted(folder.glob("shard_*.parquet"))
        for path in paths:
            problem = _problem(path, None, False)
            if problem:
                raise UserError(f"{path} {problem}: delete it and fetch it again")
    if len(paths) < 2:
        found = "holds one shard only, and the last is validation" if paths else "holds no shards"
        raise UserError(f"{folder} {found}: run `{MAKE}` (see --help for -n, --source, --embedded)")
    return paths[:-1] if split == "train" else paths[-1:]


def iter_documents(split: Literal["train", "val"], data_dir: Path | None = None) -> Iterator[str]:
    """Every document of a split, in file order."""
    for path in shard_paths(split, data_dir):
        for _, texts in read_documents(path):
            yield from texts


def read_documents(path: Path, start_row_group: int = 0, step: int = 1) -> Iterator[tuple[int, list[str]]]:
    """(row group index, its documents) from start_row_group on, every step-th.

    UserError where the file is damaged: page checksums are checked (our own shards carry them, not all others do).
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if "text" not in file.schema_arrow.names:
                raise UserError(f"{path} has no column 'text': it is not a shard; make the data again with {MAKE}")
            for group in range(start_row_group, file.num_row_groups, step):
                texts = file.read_row_group(group, columns=["text"]).column("text").to_pylist()
                if not all(isinstance(t, str) for t in texts):
                    raise UserError(f"{path}: row group {group} holds rows that are no text: make the shard again")
                yield group, texts
    except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
        reason = (str(e).splitlines() or [type(e).__name__])[0][:160]
        raise UserError(f"{path} is damaged ({reason}): delete it and run `{_command(path)}` again") from e


def count_rows(path: Path) -> int:
    """Decode every row group of a shard: the number of documents. UserError where anything in it cannot be read."""
    rows = sum(len(texts) for _, texts in read_documents(path))
    if rows == 0:
        raise UserError(f"{path} holds no documents")
    return rows


def write_shard(path: Path, texts: list[str], source: str) -> Shard:
    """Write documents as one shard (zstd, row groups of at most GROUP_ROWS rows), by atomic rename."""
    with atomic_write(path) as f, pq.ParquetWriter(f, SCHEMA, compression="zstd", write_page_checksum=True) as writer:
        for group in _row_groups(texts):
            writer.write_table(pa.table({"text": group}, schema=SCHEMA))
    return describe(path, len(texts), source)


def describe(path: Path, rows: int, source: str) -> Shard:
    return Shard(path.name, rows, path.stat().st_size, sha256_file(path), source)


def damaged(folder: Path, manifest: Manifest) -> list[str]:
    """Names of shards that are gone or differ from the manifest in size or hash."""
    return [s.name for s in manifest.shards if _problem(folder / s.name, s, verify=True)]


def _row_groups(texts: list[str]) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if len(group) == GROUP_ROWS or size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _problem(path: Path, shard: Shard | None, verify: bool) -> str:
    """What is wrong with a shard as the file system and its ends tell, or ""."""
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if shard and size != shard.bytes:
        return f"has {size} bytes, the manifest says {shard.bytes} (truncated or changed)"
    with open(path, "rb") as f:
        head = f.read(4)
        f.seek(max(0, size - 4))
        if size < 12 or head != b"PAR1" or f.read(4) != b"PAR1":
            return "is truncated or not a parquet file"
    if shard and verify and sha256_file(path) != shard.sha256:
        return "differs from its SHA-256 in the manifest (corrupt)"
    return ""


def _command(path: Path) -> str:
    manifest = load_manifest(path.parent)
    return manifest.command if manifest else MAKE
