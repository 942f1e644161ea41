"""The shards of FineWeb-EDU on the Hugging Face hub, or of any list like it, fetched several at a time."""

import sys
import threading
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from nanochat.common import UserError
from nanochat.download import Fetcher
from nanochat.shards import Shard, count_rows, describe, shard_name

BASE_URL = "https://huggingface.co/datasets/karpathy/fineweb-edu-100b-shuffle/resolve/main"
REMOTE_SHARDS = 1823  # shard_00000 .. shard_01822, about 100 MB and 250 million characters each
NO_NETWORK = "check the network, or use --source PATH (your own text) or --embedded (no network needed)"


def remote_urls(base_url: str, shard_list: str | None) -> list[str]:
    """URLs of all remote shards, validation last; entry i is kept as shard_{i:05d}.parquet."""
    names = [shard_name(i) for i in range(REMOTE_SHARDS)]
    if shard_list:
        try:
            lines = Path(shard_list).expanduser().read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"--shard_list={shard_list} cannot be read ({e})") from e
        names = [x.strip() for x in lines if x.strip() and not x.startswith("#")]
        if len(names) < 2:
            raise UserError(f"{shard_list} names {len(names)} shards: at least one for training and one for validation")
    return [urllib.parse.urljoin(base_url.rstrip("/") + "/", name) for name in names]


class _Progress:
    """What all threads have read; how much there will be is expected from the shards begun."""

    def __init__(self, bar: tqdm, n_shards: int):
        self.bar, self.n_shards, self.lock, self.sizes = bar, n_shards, threading.Lock(), dict[str, int]()

    def begun(self, name: str, size: int) -> None:
        with self.lock:
            self.sizes[name] = size
            self.bar.total = sum(self.sizes.values()) * self.n_shards // len(self.sizes)

    def read(self, n: int) -> None:
        with self.lock:
            self.bar.update(n)


def fetch_shards(
    missing: dict[str, str], folder: Path, num_workers: int, timeout: float, retries: int
) -> Iterator[Shard]:
    """Fetch {name: url} into folder in threads, yielding each shard as it is done; the first failure stops the others.

    timeout in seconds. Raises UserError naming the URL and what to do instead.
    """
    stop = threading.Event()
    quiet = not sys.stderr.isatty()
    with tqdm(unit="B", unit_scale=True, unit_divisor=1000, disable=quiet, total=0) as bar:
        progress = _Progress(bar, len(missing))

        def fetch(name: str) -> Shard:
            def check(part: Path) -> None:
                rows.append(count_rows(part))

            path, rows = folder / name, list[int]()
            fetcher = Fetcher(
                check=check,
                timeout=timeout,
                retries=retries,
                pause=min(1.0, timeout / 10),
                cure=NO_NETWORK,
                on_bytes=progress.read,
                on_size=lambda size: progress.begun(name, size),
                on_retry=lambda message: tqdm.write(message, file=sys.stderr),
                stop=stop,
            )
            if path.is_file():  # fetched by a run that was killed before it wrote the manifest
                try:
                    check(path)
                except UserError:
                    path.unlink()
            if not path.is_file():
                fetcher.fetch(missing[name], path)
            return describe(path, rows[-1], missing[name])

        pool = ThreadPoolExecutor(num_workers)
        try:
            jobs = [pool.submit(fetch, name) for name in missing]
            for done, job in enumerate(as_completed(jobs), 1):
                shard = job.result()
                bar.set_description(f"{done}/{len(jobs)} shards")
                if quiet:
                    print(f"{shard.name}: {shard.bytes / 1e6:.1f} MB, {done} of {len(jobs)}")
                yield shard
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
