"""The health of a reinforcement-learning run: figures of each step, a guard against collapse, their pictures."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from nanochat.common import atomic_write, base_dir
from nanochat.device import all_reduce_sum
from nanochat.plots import BLUE, GREEN, ORANGE, _faint_and_smooth, _figure, _png, read_metrics, series
from nanochat.rl import Batch, Group

SUMS = """groups zero_variance trajectories reward correct valid truncated length logp tokens logp_correct
    tokens_correct""".split()  # noqa: SIM905
# how far below its best a smoothed figure may fall before the run counts as collapsed
FALLS = {"reward": 0.15, "valid": 0.2, "logp_correct": 0.5}


@dataclass
class Health:
    """Sums over one step of this rank; figures() are those of all ranks."""

    device: torch.device
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SUMS, 0.0))

    def add_groups(self, groups: Sequence[Group]) -> None:
        """All groups sampled in the step, the skipped ones too."""
        for group in groups:
            self.sums["groups"] += 1
            self.sums["zero_variance"] += not group.teaches
            for t, v in zip(group.trajectories, group.verdicts, strict=True):
                self.sums["trajectories"] += 1
                self.sums["reward"] += v.reward
                self.sums["correct"] += v.correct
                self.sums["valid"] += v.valid
                self.sums["truncated"] += not t.ended
                self.sums["length"] += t.length

    def add_logp(self, batch: Batch, logp: Tensor) -> None:
        """What policy_loss returned for a part of the step."""
        sampled = batch.sampled[:, 1:]
        self.sums["logp"] += float(logp.sum())
        self.sums["tokens"] += float(sampled.sum())
        self.sums["logp_correct"] += float(logp[batch.correct].sum())
        self.sums["tokens_correct"] += float(sampled[batch.correct].sum())

    def figures(self) -> dict[str, float]:
        """Means; a figure nothing was counted for is left out.

        entropy: nats per sampled token, estimated by -log p of what was sampled. logp_correct: nats per sampled token
        of correct trajectories. length: ids written. zero_variance: share of groups that were skipped.
        """
        values = all_reduce_sum(torch.tensor([self.sums[k] for k in SUMS], device=self.device)).tolist()
        s = dict(zip(SUMS, values, strict=True))
        out = {}
        if s["trajectories"]:
            out = {k: s[k] / s["trajectories"] for k in ("reward", "correct", "valid", "truncated", "length")}
            out |= {"zero_variance": s["zero_variance"] / s["groups"], "groups": s["groups"]}
        if s["tokens"]:
            out["entropy"] = -s["logp"] / s["tokens"]
        if s["tokens_correct"]:
            out["logp_correct"] = s["logp_correct"] / s["tokens_correct"]
        return out


@dataclass
class Guard:
    """Collapse: the smoothed reward, share of valid formats or log p of correct trajectories far below its best.

    The likelihood falls before the reward does (arXiv 2512.04220). Figures are means that forget with `decay`; the
    first `warmup` steps are too noisy to be anyone's best.
    """

    falls: dict[str, float] = field(default_factory=lambda: dict(FALLS))
    decay: float = 0.9
    warmup: int = 10
    state: dict[str, dict[str, float]] = field(default_factory=dict)  # for a checkpoint

    def update(self, figures: dict[str, float]) -> str | None:
        """Take one step's figures -> what fell and how far, or None."""
        for key, fall in self.falls.items():
            if key not in figures:
                continue
            s = self.state.setdefault(key, {"sum": 0.0, "weight": 0.0, "steps": 0, "best": -math.inf})
            s["sum"] = self.decay * s["sum"] + figures[key]
            s["weight"] = self.decay * s["weight"] + 1.0
            s["steps"] += 1
            now = s["sum"] / s["weight"]
            if s["steps"] >= self.warmup:
                s["best"] = max(s["best"], now)
                if now < s["best"] - fall:
                    return f"{key} fell from {s['best']:.3f} to {now:.3f} (smoothed)"
        return None

    def forget(self) -> None:
        """Start anew, after a rollback."""
        self.state.clear()


# of a picture: (axis, {key of metrics.jsonl: label})
PANELS: list[tuple[str, dict[str, str]]] = [
    ("reward", {"reward": "train, all samples", "held_out_reward": "held out"}),
    ("nats per token", {"entropy": "entropy", "logp_correct": "log p of correct trajectories"}),
    ("share", {"valid": "valid format", "zero_variance": "groups skipped: equal rewards", "truncated": "cut"}),
    ("ids written", {"length": "length"}),
    ("gradient norm", {"grad_norm": "before clipping"}),
]
COLOURS = (BLUE, ORANGE, GREEN)


def plot_health(jsonl: Path, name: str, out_dir: Path | None = None) -> Path:
    """Draw <name>_health.png into out_dir (default <base dir>/report) from a run's metrics.jsonl."""
    rows = read_metrics(jsonl)
    panels = [(axis, [k for k in keys if len(series(rows, k)[0])], keys) for axis, keys in PANELS]
    panels = [p for p in panels if p[1]]
    figure, axes = _figure(max(1, len(panels)))
    for ax, (axis, found, labels) in zip(axes, panels, strict=False):
        for key, colour in zip(found, COLOURS, strict=False):
            _faint_and_smooth(ax, *series(rows, key), colour, labels[key])
        ax.set_ylabel(axis)
        ax.legend(frameon=False, fontsize=8)
    axes[0].set_title(f"{name}: health, {rows[-1]['step']:,} steps", fontsize=10, loc="left")
    path = Path(out_dir or base_dir() / "report") / f"{name}_health.png"
    with atomic_write(path) as f:
        f.write(_png(figure))
    return path
