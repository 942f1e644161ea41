"""A run's metrics.jsonl as pictures: loss and validation, throughput. One JSON object a line, `step` in each."""

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.common import atomic_write, base_dir
from nanochat.config import UserError

# Okabe and Ito's palette, distinct for the colour-blind.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8A8A8A"
WIDTH, DPI = 7.0, 110  # inches, dots per inch


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows by rising step. UserError naming file and line for a bad line, unless it is the last one, cut by a kill.

    A step that goes back is a resume: what an earlier process wrote from that step on is forgotten. Two rows of the
    same step are one row, the later value of a key wins.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"metrics {path} do not exist: train first")
    lines = path.read_bytes().split(b"\n")
    rows: dict[int, dict[str, Any]] = {}
    last = -1
    for i, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            step = row["step"]
            if not isinstance(step, int):
                raise TypeError(f"step is {step!r}")
        except (ValueError, KeyError, TypeError) as e:
            if i == len(lines) - 1:  # no newline after it
                break
            raise UserError(f"{path}:{i + 1}: not a JSON object with a step ({e}): mend or delete the line") from e
        if step < last:
            rows = {s: r for s, r in rows.items() if s < step}
        rows[step] = {**rows.get(step, {}), **row}
        last = step
    return [rows[s] for s in sorted(rows)]


def plot_metrics(jsonl: Path, out_dir: Path | None = None, name: str | None = None) -> list[Path]:
    """Draw <name>_loss.png and <name>_throughput.png into out_dir (default <base dir>/report), as far as there is data.

    Default name: the stage and tag the file lies under, base_d20. Draws what there is of loss (nats per token),
    val_bpb, tokens_per_s and mfu.
    """
    jsonl = Path(jsonl)
    rows = read_metrics(jsonl)
    name = name or f"{jsonl.parent.parent.name.removesuffix('_checkpoints')}_{jsonl.parent.name}"
    made = []
    for kind, draw in (("loss", _draw_loss), ("throughput", _draw_throughput)):
        if png := draw(rows, name):
            made.append(Path(out_dir or base_dir() / "report") / f"{name}_{kind}.png")
            with atomic_write(made[-1]) as f:
                f.write(png)
    return made


def series(rows: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the rows that have a finite number under the key."""
    points = [(r["step"], float(r[key])) for r in rows if isinstance(r.get(key), int | float) and math.isfinite(r[key])]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.array(steps, dtype=np.int64), np.array(values, dtype=np.float64)


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of a fortieth of the points, narrower at the start so that the first plunge stays."""
    n = len(values)
    i = np.arange(n)
    half = np.minimum(max(1, n // 80), i // 4)
    left, right = i - half, np.minimum(i + half + 1, n)
    total = np.concatenate([[0.0], np.cumsum(values)])
    return (total[right] - total[left]) / (right - left)


def figure_of(panels: int) -> tuple[Any, list[Any]]:
    """A figure with panels one above the other that share the axis of steps."""
    from matplotlib.figure import Figure  # takes a second to import: only for those who draw

    figure = Figure(figsize=(WIDTH, 1.0 + 2.5 * panels), dpi=DPI, layout="constrained")
    axes = list(figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0])
    for ax in axes:
        ax.grid(True, color="#DDDDDD", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("step (optimizer updates)")
    return figure, axes


def png_bytes(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})  # no version: the same data, the same file
    return buffer.getvalue()


def faint_and_smooth(ax: Any, x: np.ndarray, y: np.ndarray, colour: str, label: str) -> None:
    if len(x) < 20:
        ax.plot(x, y, color=colour, linewidth=1.6, marker="o", markersize=3.5, label=label)
    else:
        ax.plot(x, y, color=colour, linewidth=0.7, alpha=0.35, label=f"{label}, each step")
        ax.plot(x, smooth(y), color=colour, linewidth=1.9, label=f"{label}, smoothed, last {smooth(y)[-1]:.3f}")


def _draw_loss(rows: list[dict[str, Any]], name: str) -> bytes | None:
    """Training loss above, validation bits per byte below."""
    (x, loss), (x_val, val) = series(rows, "loss"), series(rows, "val_bpb")
    if not len(x) and not len(x_val):
        return None
    figure, axes = figure_of(1 + (len(x) > 0 and len(x_val) > 0))
    if len(x):
        faint_and_smooth(axes[0], x, loss, BLUE, "train")
        _fit(axes[0], loss, smooth(loss))
        axes[0].set_ylabel("loss (nats per token)")
        axes[0].legend(frameon=False, loc="upper right")
    if len(x_val):
        ax = axes[-1]
        label = f"validation, last {val[-1]:.4f}"
        ax.plot(x_val, val, color=ORANGE, linewidth=1.6, marker="o", markersize=4, label=label)
        ax.legend(frameon=False, loc="upper right")
        _fit(ax, val, val)
        ax.set_ylabel("validation (bits per byte)")
    axes[0].set_title(_title(rows, name, "loss"), fontsize=10, loc="left")
    return png_bytes(figure)


def _fit(ax: Any, raw: np.ndarray, line: np.ndarray) -> None:
    """Leave the plunge of the first steps out of the frame when it would flatten all the rest, and say so."""
    skip = max(1, len(raw) // 20)
    if len(raw) < 4:
        return
    low, top, start = float(raw.min()), float(raw.max()), float(line[skip])
    high = max(start + 0.35 * (start - low), float(np.quantile(raw[skip:], 0.995)))
    if top - low > 1.6 * (high - low) > 0:
        ax.set_ylim(low - 0.06 * (high - low), high + 0.02 * (high - low))
        note = f"starts at {raw[0]:.2f}, above the frame" if raw[0] > high else f"peak of {top:.2f} above the frame"
        ax.text(0.16, 0.95, note, transform=ax.transAxes, color=GREY, fontsize=8, va="top")


def _draw_throughput(rows: list[dict[str, Any]], name: str) -> bytes | None:
    """Tokens per second, and model FLOPs utilisation where it was measured."""
    (x, rate), (x_mfu, mfu) = series(rows, "tokens_per_s"), series(rows, "mfu")
    if not len(x):
        return None
    figure, axes = figure_of(1 + (len(x_mfu) > 0))
    _speed_panel(axes[0], x, rate, GREEN, "tokens per second", lambda v: f"{v:,.0f}")
    if len(x_mfu):
        _speed_panel(axes[1], x_mfu, 100 * mfu, BLUE, "model FLOPs utilisation (%)", lambda v: f"{v:.1f} %")
    axes[0].set_title(_title(rows, name, "throughput"), fontsize=10, loc="left")
    return png_bytes(figure)


def _speed_panel(ax: Any, x: np.ndarray, y: np.ndarray, colour: str, label: str, show: Callable[[float], str]) -> None:
    """Each step as a dot, the median as a line; from zero, so that heights compare."""
    median = float(np.median(y))
    ax.plot(x, y, linestyle="", marker=".", markersize=3 if len(x) > 200 else 5, color=colour, alpha=0.5)
    ax.axhline(median, color="black", linewidth=1.2, linestyle="--", label=f"median {show(median)}")
    ax.legend(frameon=False, loc="lower right")
    ax.set_ylim(0, 1.25 * max(float(np.quantile(y, 0.98)), median, 1e-9))
    ax.set_ylabel(label)
    ax.yaxis.set_major_formatter(lambda v, _: f"{v:,.0f}" if v >= 10 else f"{v:g}")


def _title(rows: list[dict[str, Any]], name: str, what: str) -> str:
    tokens = series(rows, "tokens")[1]
    parts = [f"{name}: {what}", f"{rows[-1]['step']:,} steps"]
    if len(tokens):
        units = ((1e9, "billion "), (1e6, "million "), (1e3, "thousand "), (1, ""))
        size, unit = next((u for u in units if tokens[-1] >= u[0]), units[-1])
        parts.append(f"{tokens[-1] / size:,.1f} {unit}tokens")
    if bad := sum(isinstance(r.get("loss"), float) and not math.isfinite(r["loss"]) for r in rows):
        parts.append(f"{bad} steps without a finite loss")
    return ", ".join(parts)
