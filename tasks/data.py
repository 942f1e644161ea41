"""Rows of real data sets: from the data folder, else from files of a Hugging Face dataset, else an error.

The data folder is $NANOCHAT_DATA (nanochat.common.data_dir). Hub files lie under <base dir>/task_data/<owner--name>/,
where a download puts them and where you may put them by hand. HF_HUB_OFFLINE=1 forbids the download.
"""

import gzip
import json
import socket
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import base_dir, data_dir
from nanochat.config import UserError
from tasks.common import check_split

VAL_SHARE = 20  # one in 20 training rows is held out, where a set brings no validation rows


@dataclass(frozen=True)
class Source:
    """Where the rows of one split may be: a file in the data folder, or files of a dataset on the hub."""

    local: str = ""
    hub: str = ""
    files: tuple[str, ...] = ()

    def place(self) -> Path:
        """Folder of this dataset's hub files."""
        return base_dir() / "task_data" / self.hub.replace("/", "--")


def split_rows(name: str, split: str, sources: Mapping[str, Source], key: Callable[[Any], str]) -> Sequence[Any]:
    """Rows of a split of the set `name`.

    Without a source of its own "val" is a twentieth of the training rows (chosen by the checksum of key(row), so that
    equal questions stay together) which "train" then lacks; "test" is "val" in a set that has neither.
    """
    check_split(name, split)
    source = sources.get(split)
    if source is not None and ("val" in sources or split == "test"):
        return load_rows(name, split, source)
    if split == "test" and "val" in sources:
        return load_rows(name, split, sources["val"])
    if "train" not in sources:
        raise UserError(f"{name} has no {split} split: it has {', '.join(sources)}")
    rows = load_rows(name, split, sources["train"])
    return held_out(rows, split, key)


def held_out(rows: Sequence[Any], split: str, key: Callable[[Any], str]) -> list[Any]:
    """One part of rows: "train", or what is held out of it for any other split."""
    return [r for r in rows if (zlib.crc32(key(r).encode()) % VAL_SHARE == 0) == (split != "train")]


def load_rows(name: str, split: str, source: Source) -> Sequence[Any]:
    """Rows of the first place that has them. UserError naming every place where none has."""
    folder = data_dir()
    if folder and source.local and (folder / source.local).is_file():
        return read_rows(folder / source.local)
    hub = [source.place() / file for file in source.files]
    missing = [path for path in hub if not path.is_file()]
    reason = ""
    if missing:
        reason = _download(source)
    if hub and not reason:
        return _joined([read_rows(path) for path in hub])
    ways = []
    if source.local:
        ways.append(f"put {source.local} into {folder or 'the folder NANOCHAT_DATA points to'}")
    if source.hub:
        ways.append(f"put {', '.join(source.files)} of the hub dataset {source.hub} into {source.place()}")
    raise UserError(f"{name} ({split}) is not on this machine{reason and f' ({reason})'}: {', or '.join(ways)}")


def _download(source: Source) -> str:
    """Fetch the hub files to their place. -> why that was not possible, "" where it was."""
    try:
        from huggingface_hub import constants, hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        return "to download it, install huggingface_hub"
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE forbids the download"
    if not _resolves(constants.ENDPOINT):  # the hub's client would try for half a minute
        return "no network: the hub's name does not resolve"
    try:
        for file in source.files:
            hf_hub_download(source.hub, file, repo_type="dataset", local_dir=source.place())
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, RuntimeError) as e:
        return f"the hub could not be reached or refused: {type(e).__name__}"
    return ""


def _resolves(url: str) -> bool:
    """Whether the host of url has an address here, or a proxy is there to ask."""
    if urllib.request.getproxies():
        return True
    try:
        return bool(socket.getaddrinfo(urlsplit(url).hostname, 443))
    except OSError:
        return False


def read_rows(path: Path) -> Sequence[Any]:
    """Rows of a .jsonl, .jsonl.gz or .parquet file."""
    return ParquetRows(path) if path.suffix == ".parquet" else read_jsonl(path)


class ParquetRows(Sequence[Any]):
    """Rows of a parquet file as dicts, made when they are asked for."""

    def __init__(self, path: Path):
        try:
            self.table = pq.read_table(path)
        except (pa.ArrowException, OSError) as e:
            raise UserError(f"{path} is no parquet file ({e}): remove it and fetch it again") from e

    def __len__(self) -> int:
        return self.table.num_rows

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self.table.slice(i, 1).to_pylist()[0]


def _joined(parts: list[Sequence[Any]]) -> Sequence[Any]:
    if len(parts) == 1:
        return parts[0]
    tables = [p for p in parts if isinstance(p, ParquetRows)]
    if len(tables) < len(parts):
        return [row for part in parts for row in part]
    tables[0].table = pa.concat_tables([p.table for p in tables])
    return tables[0]


@lru_cache(maxsize=8)
def read_jsonl(path: Path) -> tuple[Any, ...]:
    """The value of each line that is not blank. UserError with file and line where one is not JSON."""
    return tuple(value for _, value in numbered_lines(path))


def numbered_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number from 1, value) of each line of JSON that is not blank."""
    n = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as f:
            for n, line in enumerate(f, 1):  # bytes end at \n only: texts may hold U+2028
                if line.strip():
                    yield n, json.loads(line)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}:{n}: not a line of JSON ({e}): mend that line or remove it") from e
    except (OSError, EOFError, zlib.error) as e:
        raise UserError(f"{path} cannot be read after line {n} ({type(e).__name__}: {e}): restore the file") from e
