"""One process of a training run: device, ranks, seed, folder, metrics.jsonl, tracker. Its loop is in train.py.

run = Run.start("base", "d20", cfg)  # cfg.device, dtype, seed, run, track
run.print("only rank 0 talks")
run.close()
"""

import contextlib
import dataclasses
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from nanochat import device as devices
from nanochat.checkpoint import Checkpoint, checkpoint_dir, list_steps, load_checkpoint
from nanochat.common import atomic_write
from nanochat.config import UserError
from nanochat.device import Ranks
from nanochat.stepfolder import claim


@dataclass
class Run:
    """One process of one training run: where it computes and where it writes."""

    source: str  # base, mid, sft, rag, refrag, rl
    model_tag: str
    device: torch.device
    dtype: torch.dtype
    ranks: Ranks
    dir: Path
    tracker: Any = None
    claimed: Any = None  # the open file that keeps other runs out of dir, on rank 0

    @classmethod
    def start(cls, source: str, model_tag: str, cfg: Any) -> "Run":
        """Pick the device, join the ranks, seed everything, open the tracker, as the stage's configuration says."""
        ranks, chosen = devices.init_ranks(devices.pick_device(cfg.device))
        compute = devices.pick_dtype(cfg.dtype, chosen)
        random.seed(cfg.seed)
        np.random.seed(cfg.seed)
        torch.manual_seed(cfg.seed)
        if chosen.type == "cuda":
            torch.set_float32_matmul_precision("high")
        tracker = _tracker(cfg.track, cfg.run, source, dataclasses.asdict(cfg)) if ranks.main else None
        self = cls(source, model_tag, chosen, compute, ranks, checkpoint_dir(source, model_tag), tracker)
        self.print(f"device: {devices.describe_device(chosen, compute)}, {ranks.world_size} rank(s)")
        return self

    def print(self, text: str) -> None:
        """Only rank 0 talks; never in the middle of a progress bar."""
        if self.ranks.main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()  # a log that is followed shows each line when it is written

    @property
    def metrics_path(self) -> Path:
        return self.dir / "metrics.jsonl"

    def record(self, row: dict[str, Any]) -> None:
        """Append one row to metrics.jsonl (rank 0) and hand it to the tracker."""
        if not self.ranks.main:
            return
        self.dir.mkdir(parents=True, exist_ok=True)
        with open(self.metrics_path, "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")
        if self.tracker is not None:
            self.tracker.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def forget_after(self, step: int) -> None:
        """Drop metrics of steps that will be done again, and a line cut by a kill; -1 = all of them."""
        if not (self.ranks.main and self.metrics_path.exists()):
            return
        kept = []
        for line in self.metrics_path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError, TypeError):
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
        with atomic_write(self.metrics_path, "w") as f:
            f.writelines(kept)

    def claim(self, other: str) -> None:
        """Keep other runs out of this one's folder until it ends; UserError, on every rank, where one trains there."""
        if self.ranks.main:
            self.claimed = claim(self.dir)
        free = [self.claimed is not None]
        if self.ranks.world_size > 1:
            dist.broadcast_object_list(free, src=0)
        if not free[0]:
            raise UserError(f"another run trains in {self.dir} now: wait until it has ended, or choose another {other}")

    def newest(self, any_ranks: bool = False) -> Checkpoint | None:
        """The newest whole checkpoint of this run on this rank, or None. any_ranks: also of another number of ranks."""
        if not list_steps(self.dir):
            return None
        ranks = self.ranks
        return load_checkpoint(self.dir, rank=ranks.rank, world_size=ranks.world_size, any_ranks=any_ranks)

    def close(self) -> None:
        """End the tracker's run and leave the other ranks."""
        if self.tracker is not None:
            self.tracker.finish()
        if self.claimed is not None:
            self.claimed.close()
        devices.leave_ranks()


def _tracker(track: str, run: str, source: str, config: dict[str, Any]) -> Any:
    """wandb and trackio share an interface; 'dummy' as run name means neither (nanochat's habit)."""
    if track == "none" and run != "dummy":
        track = "wandb"
    if track == "none" or run == "dummy":
        return None
    if track not in ("wandb", "trackio"):
        raise UserError(f"track={track!r}: expected none, wandb or trackio")
    try:
        module = __import__(track)
    except ImportError:
        raise UserError(f"{track} is not installed: uv pip install {track}, or --run=dummy for no tracking") from None
    return module.init(project=f"nanochat-{source}", name=run, config=config) and module
