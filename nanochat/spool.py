"""Shuffle more text than fits in memory: documents go to random files first, then each file is shuffled by itself."""

import array
import contextlib
import hashlib
import json
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np

from nanochat.common import UserError, raise_disk_error

BUCKETS = 64  # memory is about the largest bucket: 1/64 of the text


class Spool:
    """Collects documents in a temporary folder inside `folder`; gives them back shuffled, a share of them held out."""

    def __init__(self, folder: Path, seed: int) -> None:
        for stale in folder.glob(".spool-*"):  # of a run that was killed
            shutil.rmtree(stale, ignore_errors=True)
        self.folder, self.seed = folder, seed
        self.rng = random.Random(seed)
        self.keys, self.sizes = array.array("Q"), array.array("Q")
        self.threshold = -1  # documents whose key is at most this are held out

    def __enter__(self) -> "Spool":
        self.tmp = Path(tempfile.mkdtemp(prefix=".spool-", dir=self.folder))
        paths = [self.tmp / f"{i:02d}" for i in range(BUCKETS)]
        self.files: list[IO[str]] = [open(p, "w+", encoding="ascii") for p in paths]  # noqa: SIM115 (see __exit__)
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        for f in self.files:
            with contextlib.suppress(OSError):  # a full disk was reported where it was met
                f.close()
        shutil.rmtree(self.tmp, ignore_errors=True)

    @property
    def documents(self) -> int:
        return len(self.keys)

    @property
    def bytes(self) -> int:
        return sum(self.sizes)

    def add(self, text: str) -> None:
        raw = text.encode()
        key = int.from_bytes(hashlib.blake2b(raw, digest_size=8, salt=b"heldout").digest(), "big")
        self.keys.append(key)
        self.sizes.append(len(raw))
        try:
            self.files[int(self.rng.random() * BUCKETS)].write(f"{key} {json.dumps(text)}\n")
        except OSError as e:
            raise_disk_error(e, self.tmp)

    def hold_out(self, fraction: float, most: int) -> None:
        """Hold out the documents of smallest key: at least one, then up to `fraction` of all bytes or `most` bytes.

        fraction is at most 0.5, so something stays for training. The key is a hash of the text: copies of a text stay
        together and the choice does not depend on order.
        """
        keys, sizes = np.array(self.keys, np.uint64), np.array(self.sizes, np.int64)
        order = np.argsort(keys, kind="stable")
        distinct = len(np.unique(keys))
        if distinct < 2:
            raise UserError(
                f"{distinct} distinct documents: at least two are needed, one of them for validation "
                "(a lone text is cut at blank lines from 1000 characters on)"
            )
        within = int(np.searchsorted(np.cumsum(sizes[order]), min(fraction * sizes.sum(), most), side="right"))
        self.threshold = int(keys[order][max(within - 1, 0)])

    def kept(self) -> Iterator[str]:
        """Training documents in random order."""
        return self._read(held_out=False)

    def held_out(self) -> list[str]:
        return list(self._read(held_out=True))

    def _read(self, held_out: bool) -> Iterator[str]:
        for i, f in enumerate(self.files):
            try:
                f.seek(0)  # writes out what is buffered
            except OSError as e:
                raise_disk_error(e, self.tmp)
            rows = [line.split(" ", 1) for line in f]
            texts = [json.loads(text) for key, text in rows if (int(key) <= self.threshold) == held_out]
            random.Random(f"{self.seed}/{i}").shuffle(texts)
            yield from texts
