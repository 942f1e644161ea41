"""The RAG evaluation as pictures: what becomes of the questions, risk against coverage, documents and places."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanochat.common import atomic_write
from nanochat.plots import BLUE, DPI, GREEN, GREY, ORANGE, WIDTH, png_bytes
from nanochat.rag_eval import Figure, Prediction, risk_curve, summary

COLOURS = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", GREY)
OUTCOMES = {"accuracy": GREEN, "abstention": "#DDDDDD", "hallucination": ORANGE}


def plot_conditions(runs: Mapping[str, Sequence[Prediction]], path: Path) -> Path:
    """Shares of right answers, abstentions and hallucinations by condition, and the interval of the last."""
    figure, [ax] = _panels(1, 1.2 + 0.42 * len(runs))
    found = {name: summary(run) for name, run in runs.items()}
    left = [0.0] * len(runs)
    for outcome, colour in OUTCOMES.items():
        widths = [f[outcome].value for f in found.values()]
        ax.barh(list(found), widths, left=left, color=colour, label=outcome, height=0.7)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    errors = [[f["hallucination"].high - f["hallucination"].value for f in found.values()],
              [f["hallucination"].value - f["hallucination"].low for f in found.values()]]  # fmt: skip
    starts = [1 - f["hallucination"].value for f in found.values()]
    ax.errorbar(starts, list(found), xerr=errors, fmt="none", ecolor="black", elinewidth=1, capsize=2)
    ax.invert_yaxis()
    ax.set_xlim(0, 1)
    ax.set_xlabel("share of the questions (black: 95 % interval of hallucination)")
    ax.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    return _save(figure, path)


def plot_coverage(runs: Mapping[str, Sequence[Prediction]], path: Path) -> Path:
    """Wrong answers among the surest ones, as more of the questions are answered."""
    figure, [ax] = _panels(1, 3.4)
    for (name, run), colour in zip(runs.items(), COLOURS, strict=False):
        ax.plot(*risk_curve(run), color=colour, linewidth=1.6, label=name)
    ax.set_xlim(0, 1)
    ax.set_ylim(-0.02, 1.02)
    ax.set_xlabel("share of the questions answered, surest first (mean log-probability)")
    ax.set_ylabel("wrong among these")
    ax.legend(frameon=False)
    return _save(figure, path)


def plot_documents(
    sizes: Mapping[str, Mapping[int, Figure]], places: Mapping[str, Mapping[int, Figure]], path: Path
) -> Path:
    """EM by the number of documents and by the place of the gold one; a line for each model."""
    figure, axes = _panels(2, 3.2)
    for ax, found, label in zip(axes, (sizes, places), ("documents", "place of the gold document"), strict=True):
        for (name, line), colour in zip(found.items(), COLOURS, strict=False):
            x, y = list(line), [f.value for f in line.values()]
            errors = [[f.value - f.low for f in line.values()], [f.high - f.value for f in line.values()]]
            ax.errorbar(x, y, yerr=errors, color=colour, marker="o", markersize=4, capsize=2, linewidth=1.5, label=name)
        ax.set_ylim(-0.02, 1.02)
        ax.set_xlabel(label)
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes[0].set_ylabel("exact match")
    axes[0].legend(frameon=False, fontsize=8)
    return _save(figure, path)


def _panels(columns: int, height: float) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure as Picture  # takes a second to import: only for those who draw

    figure = Picture(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    axes = list(figure.subplots(1, columns, squeeze=False)[0])
    for ax in axes:
        ax.grid(True, color="#DDDDDD", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> Path:
    with atomic_write(path) as f:
        f.write(png_bytes(figure))
    return path
