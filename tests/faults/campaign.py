"""Faults, by the hundred: is anything lost that was committed, is every cause said in one line?

    python -m tests.faults.campaign                          # 100 kills and the rest, about 10 minutes
    python -m tests.faults.campaign --kills=6 --rounds=1 --parts=kill,utf8

Parts: kill (kill -9 while training, saving, indexing, serving), disk (full, or a limit on the size of files), readonly,
corrupt (each file cut and with flipped bits), clock, utf8. A command that meets a fault must end with exit code 2 and
one line that names the place and a cure, or with exit code 0 and the result it has without the fault. Exit code 1 if
anything was lost, wrong, unclear or ended in a traceback.
"""

import importlib
import os
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

os.environ["OMP_NUM_THREADS"] = "1"  # children are forks, which take no threads along

from nanochat.common import git_state, run_script, write_json
from nanochat.config import load_config
from tests.faults.damage import clocks, corrupt, utf8
from tests.faults.disks import full, limited, on_own_disk, unwritable
from tests.faults.kills import kill_all
from tests.faults.tally import Tally
from tests.faults.victims import Lab

PARTS = ("kill", "disk", "readonly", "corrupt", "clock", "utf8")
IMPORTED = (  # before the first fork, what each child would import itself
    "scripts.base_train", "scripts.base_loss", "scripts.prepare_rag_dataset", "scripts.chat_web", "scripts.tok_train",
    "nanochat.dataset", "nanochat.report", "nanochat.retrieval.__main__", "nanochat.retrieval.bm25",
    "matplotlib.figure", "matplotlib.backends.backend_agg",
)  # fmt: skip


@dataclass(frozen=True)
class CampaignConfig:
    """Attack training, indexing, saving and serving, and count what was lost."""

    kills: Annotated[int, "processes killed, in all"] = 100
    rounds: Annotated[int, "full disks, size limits and clocks tried on each command; bits flipped in each file"] = 4
    files: Annotated[int, "damaged, of each kind, drawn at random; 0 = all"] = 0
    seed: Annotated[int, "of every random choice; when a kill strikes also depends on the machine"] = 0
    parts: Annotated[list, "as a,b of " + ", ".join(PARTS)] = PARTS  # pyrefly: ignore[bad-assignment]
    folder: Annotated[str, "where to work; empty = a temporary folder"] = ""
    out: Annotated[str, "JSON file of the table; empty = none"] = ""

    def __post_init__(self) -> None:
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown or self.kills < 1 or self.rounds < 1:
            raise ValueError(
                f"parts={unknown}, kills={self.kills}, rounds={self.rounds}: expected some of {PARTS}, and 1"
            )


def attack(cfg: CampaignConfig, part: str, lab: Lab, tally: Tally) -> str:
    """-> why there is no disk of its own, where one was wanted."""
    lab.rng = random.Random(f"{cfg.seed} {part}")  # a part alone is as it is among others
    if part == "kill":
        kill_all(lab, tally, cfg.kills)
    elif part == "disk":
        limited(lab, tally, cfg.rounds)
        return on_own_disk(lab, tally, lambda own, base: full(lab, own, cfg.rounds, base))
    elif part == "readonly":
        return on_own_disk(lab, tally, lambda own, base: unwritable(lab, own, base))
    elif part == "corrupt":
        corrupt(lab, tally, cfg.rounds, cfg.files)
    elif part == "clock":
        clocks(lab, tally, cfg.rounds)
    else:
        utf8(lab, tally)
    return ""


def main(argv: list[str]) -> None:
    cfg = load_config(CampaignConfig, argv)
    for name in IMPORTED:
        importlib.import_module(name)
    tally, started = Tally(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-", dir=cfg.folder or None) as folder:
        lab = Lab(Path(folder), cfg.seed)
        for part in cfg.parts:
            none = attack(cfg, part, lab, tally)
            seconds = time.monotonic() - started
            print(f"after {part}: {seconds:.0f} s{none and f'; no disk of its own: {none}'}", flush=True)
            if cfg.out:
                about = {"kills": cfg.kills, "rounds": cfg.rounds, "seed": cfg.seed, "seconds": seconds}
                write_json(
                    Path(cfg.out), {**about, "git": git_state(), "failed": tally.failed, "rows": tally.as_json()}
                )
    print(tally.table())
    sys.exit(1 if tally.failed else 0)


if __name__ == "__main__":
    run_script(main)
