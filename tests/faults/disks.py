"""A disk that is full, a file that may not grow, a folder that may not be written.

The first and the last are a tmpfs in a mount namespace of the campaign's own. Where the kernel allows none to this
user, only the limit on the size of a file (RLIMIT_FSIZE) is tried, and the table says so.
"""

import json
import os
import resource
import traceback
from collections.abc import Callable
from pathlib import Path

import httpx

from nanochat.retrieval import KnowledgeBase
from tests.faults.children import Child, Command, Prelude, own_mounts, read_only
from tests.faults.kills import ask, serve, wait_for_address
from tests.faults.tally import Tally, judge
from tests.faults.victims import Lab, add, ask_base, measure, metrics, prepare, search, train

SIZE = 64_000_000  # of the tmpfs
GROWS = {
    "train": 500_000,
    "prepare": 250_000,
    "add": 60_000,
    "compact": 250_000,
    "dataset": 60_000,
    "tok": 30_000,
    "loss": 3_000,
}  # fmt: skip (bytes each writes, about)


def writers(base: Path) -> dict[str, tuple[str, Command]]:
    """name -> (where, command): what writes."""
    texts = [f"--source={base / 'texts'}", f"--out={base / 'data2'}", "--shard_mb=0.01"]
    return {
        "train": ("training and saving", train(10)),
        "prepare": ("prepare_rag_dataset", prepare(base)),
        "add": ("add to a base", add(base, 1)),
        "compact": ("compact a base", ask_base(base, "compact")),
        "dataset": ("nanochat.dataset", Command("nanochat.dataset", texts)),
        "tok": ("tok_train", Command("scripts.tok_train", ["--vocab_size=320"])),
        "loss": ("base_loss", measure()),
    }


def attack(lab: Lab, tally: Tally, fault: str, name: str, base: Path, case: str, around: Callable | None = None,
           prelude: Prelude | None = None) -> None:  # fmt: skip
    """Run one writer under the fault, then without it. around: switches the fault on, and off again."""
    lab.copy(base)
    if name == "compact":  # something to do
        KnowledgeBase.open(base / "rag" / "knowledge_base").delete(["d59"])
    where, command = writers(base)[name]
    if around:
        around(True)
    done = lab.run(command, base, prelude)
    if around:
        around(False)
    verdict = judge(done, [base.name, "NANOCHAT_BASE_DIR"], same=True)
    lost = "" if name == "compact" else lab.lost(base)
    again = lab.run(command, base) if done.code else done
    if not lost and again.code != 0:
        lost = f"without the fault: exit {again.code}: {again.err[-200:]}"
    elif not lost and name == "train" and metrics(base) != lab.trained:
        lost = "other losses than without the fault"
    tally.count(fault, where, verdict, lost=lost, case=case)


def limited(lab: Lab, tally: Tally, rounds: int) -> None:
    """No file may grow beyond so many bytes: EFBIG in the middle of a write."""
    for name, grows in GROWS.items():
        for _ in range(rounds):
            most = max(4096, int(lab.rng.uniform(0.02, 0.7) * grows))  # what is said goes to a file, too

            def prelude(most: int = most) -> None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

            attack(lab, tally, "file size limit", name, lab.folder / "base", f"{most} bytes", prelude=prelude)


def full(lab: Lab, tally: Tally, rounds: int, base: Path) -> None:
    """So many bytes are left on the disk."""
    filler = base.parent / "filler"

    for name, grows in GROWS.items():
        for _ in range(rounds):
            left = int(lab.rng.uniform(0, 1.1) * grows)

            def fill(on: bool, left: int = left) -> None:
                if not on:
                    filler.unlink()
                    return
                stat = os.statvfs(base.parent)
                with open(filler, "wb") as f:
                    os.posix_fallocate(f.fileno(), 0, max(1, stat.f_bavail * stat.f_frsize - left))

            attack(lab, tally, "disk full", name, base, f"{left} bytes left", fill)


def unwritable(lab: Lab, tally: Tally, base: Path) -> None:
    """Nothing may be written; what only reads must work."""

    def switch(on: bool) -> None:
        read_only(base.parent, on)

    for name in GROWS:
        attack(lab, tally, "read-only", name, base, "", switch)
    lab.copy(base)
    switch(True)
    for command in (search(base), ask_base(base, "verify"), ask_base(base, "info")):
        done = lab.run(command, base)
        tally.count(
            "read-only", "search, verify, info", judge(done, [base.name], same=done.code == 0), case=str(command)
        )
    server = Child(serve(base), base, lab.logs)
    try:
        lost = "" if ask(wait_for_address(server)) else "no answer"
    except (RuntimeError, httpx.HTTPError) as e:
        lost = str(e)
    server.kill(0)
    tally.count("read-only", "serving", lost=lost)
    switch(False)


def on_own_disk(lab: Lab, tally: Tally, work: Callable[[Tally, Path], None]) -> str:
    """work(tally, base) in a process with a disk of its own -> "" or why there is none."""
    point, result = lab.folder / "disk", lab.folder / "result.json"
    point.mkdir(exist_ok=True)
    result.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        try:
            try:
                own_mounts(point, SIZE)
            except OSError as e:
                result.write_text(json.dumps(str(e)))
                os._exit(0)
            own = Tally()
            work(own, point / "base")
            result.write_text(json.dumps(own.as_json()))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    text = result.read_text()
    if isinstance(json.loads(text), str):
        return json.loads(text)
    tally.take(text)
    return ""
