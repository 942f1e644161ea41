"""The health of a reinforcement-learning run: figures of each step, a guard against collapse, their pictures."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat.common import atomic_write, base_dir
from nanochat.device import all_reduce_sum
from nanochat.plots import BLUE, GREEN, ORANGE, faint_and_smooth, figure_of, png_bytes, read_metrics, series
from nanochat.rl import Batch, Group

SUMS = """groups zero_variance trajectories reward correct valid truncated length logp tokens logp_correct
    tokens_correct""".split()  # noqa: SIM905
# how far below its best a smoothed figure may fall before the run counts as collapsed
FALLS = {"reward": 0.15, "valid": 0.2, "logp_correct": 0.5}
SIGMAS = 3.0  # standard errors of the difference


@dataclass
class Health:
    """Sums over one step of this rank; figures() are those of all ranks."""

    device: torch.device
    more: Sequence[str] = ()  # names of Verdict.figures
    sums: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        self.sums = dict.fromkeys([*SUMS, *self.more], 0.0)

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
                for name in self.more:
                    self.sums[name] += v.figures[name]

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
        values = all_reduce_sum(torch.tensor(list(self.sums.values()), device=self.device)).tolist()
        s = dict(zip(self.sums, values, strict=True))
        out = {}
        if s["trajectories"]:
            out = {
                k: s[k] / s["trajectories"] for k in ("reward", "correct", "valid", "truncated", "length", *self.more)
            }
            out |= {"zero_variance": s["zero_variance"] / s["groups"], "groups": s["groups"]}
        if s["tokens"]:
            out["entropy"] = -s["logp"] / s["tokens"]
        if s["tokens_correct"]:
            out["logp_correct"] = s["logp_correct"] / s["tokens_correct"]
        return out


@dataclass
class Guard:
    """Tells a collapse: figures of training, or of held-out examples, far below their best.

    Of training: the reward, the share of valid formats and log p of correct trajectories, whose decay precedes that of
    the reward (arXiv 2512.04220); means that forget with `decay`, the first `warmup` of them too noisy to be a best.
    """

    falls: dict[str, float] = field(default_factory=lambda: dict(FALLS))
    decay: float = 0.9
    warmup: int = 10
    state: dict[str, dict[str, Any]] = field(default_factory=dict)  # for a checkpoint

    def update(self, figures: dict[str, float]) -> str | None:
        """One step of training -> what fell and how far, or None."""
        for key, fall in self.falls.items():
            if key not in figures:
                continue
            s = self.state.setdefault(key, {"sum": 0.0, "weight": 0.0, "steps": 0.0})
            s["sum"] = self.decay * s["sum"] + figures[key]
            s["weight"] = self.decay * s["weight"] + 1.0
            s["steps"] += 1
            now = s["sum"] / s["weight"]
            if s["steps"] >= self.warmup:
                s["best"] = max(s.get("best", now), now)
                if now < s["best"] - fall:
                    return f"{key} fell from {s['best']:.3f} to {now:.3f} (smoothed)"
        return None

    def held_out(self, scores: dict[str, dict[str, float]]) -> str | None:
        """An evaluation -> what fell by more than SIGMAS standard errors below the one of highest reward, or None.

        Of pass@k the widest is watched: a policy that repeats one wrong answer loses it first. Where the reward is
        higher than ever, it may fall: that is a policy becoming sure.
        """
        best = self.state.setdefault("held_out", scores)
        if scores["reward"]["value"] > best["reward"]["value"]:
            self.state["held_out"] = scores
            return None
        for name in ("reward", *[name for name in scores if name.startswith("pass@")][-1:]):
            was, now = best[name], scores[name]
            if was["value"] - now["value"] > SIGMAS * math.hypot(was["stderr"], now["stderr"]):
                return f"held-out {name} fell from {was['value']:.3f} to {now['value']:.3f}"
        return None

    def forget(self) -> None:
        """Begin the means of training anew, after a rollback."""
        for key in self.falls:
            self.state.pop(key, None)


# of a picture: (axis, {key of metrics.jsonl: label})
PANELS: list[tuple[str, dict[str, str]]] = [
    ("reward", {"reward": "train, all samples", "held_out_reward": "held out"}),
    ("nats per token", {"entropy": "entropy", "logp_correct": "log p of correct trajectories"}),
    ("share", {"valid": "valid format", "zero_variance": "groups skipped: equal rewards", "truncated": "cut"}),
    ("ids written", {"length": "length"}),
    ("calls", {"searches": "searches of a question", "hops": "steps it takes"}),
    ("gradient norm", {"grad_norm": "before clipping"}),
]
COLOURS = (BLUE, ORANGE, GREEN)


def plot_health(jsonl: Path, name: str, out_dir: Path | None = None) -> Path:
    """Draw <name>_health.png into out_dir (default <base dir>/report) from a run's metrics.jsonl."""
    rows = read_metrics(jsonl)
    panels = [(axis, [k for k in keys if len(series(rows, k)[0])], keys) for axis, keys in PANELS]
    panels = [p for p in panels if p[1]]
    figure, axes = figure_of(max(1, len(panels)))
    for ax, (axis, found, labels) in zip(axes, panels, strict=False):
        for key, colour in zip(found, COLOURS, strict=False):
            faint_and_smooth(ax, *series(rows, key), colour, labels[key])
        ax.set_ylabel(axis)
        ax.legend(frameon=False, fontsize=8)
    axes[0].set_title(f"{name}: health, {rows[-1]['step']:,} steps", fontsize=10, loc="left")
    path = Path(out_dir or base_dir() / "report") / f"{name}_health.png"
    with atomic_write(path) as f:
        f.write(png_bytes(figure))
    return path
