"""Tables and the picture of scripts.bench_retrieval, made from the rows of its JSON."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from nanochat.common import atomic_write
from nanochat.plots import BLUE, DPI, GREEN, GREY, ORANGE

Row = dict[str, Any]

SPEED = {  # column -> (key, format, width)
    "build s": ("build_s", ".2f", 9),
    "build MB": ("build_mb", ".0f", 10),
    "disk MB": ("disk_mb", ".1f", 9),
    "open s": ("open_s", ".3f", 8),
    "first s": ("first_s", ".3f", 9),
    "1 by 1 q/s": ("single", ".0f", 12),
    "batch q/s": ("batch", ".0f", 11),
    "search MB": ("search_mb", ".0f", 11),
    "add s": ("add_s", ".2f", 8),
}
VECTORS = {
    "recall@10": ("recall", ".3f", 11),
    "build s": ("build_s", ".2f", 9),
    "x": ("times_build", ".2f", 8),
    "build MB": ("build_mb", ".0f", 10),
    "disk MB": ("disk_mb", ".1f", 9),
    "open s": ("open_s", ".3f", 8),
    "1 by 1 q/s": ("single", ".0f", 12),
    "x ": ("times_single", ".2f", 8),
    "batch q/s": ("batch", ".0f", 11),
    "x  ": ("times_batch", ".2f", 8),
}
RATIOS = {
    "build_s": "build",
    "build_mb": "build MB",
    "disk_mb": "disk",
    "search_mb": "search MB",
    "single": "1 by 1",
    "batch": "batch",
}


def table(part: str, rows: list[Row]) -> str:
    """The rows of one part as text, a line each."""
    if part == "quality":
        return quality_table(rows)
    columns = SPEED if part == "speed" else VECTORS
    head = f"\n{part:<18}" + "".join(f"{name.strip():>{width}}" for name, (_, _, width) in columns.items())
    lines = [head]
    for r in rows:
        name = r["engine"] if part == "speed" else f"{r['index']} {r['engine']}"
        if name == "tokens given":
            name = "  tokens given"
        cells = (f"{format(r[key], form) if key in r else '-':>{width}}" for key, form, width in columns.values())
        lines.append(f"{name:<18}{''.join(cells)}")
    return "\n".join(lines)


def ratio_table(rows: list[Row]) -> str:
    """Above 1 ours is faster, or takes less."""
    names = "".join(f"{name:>11}" for name in RATIOS.values())
    lines = [f"\n{'times better than':<34}{names}"]
    for r in rows:
        lines.append(
            f"{r['ours'] + ' / ' + r['peer']:<34}"
            + "".join(f"{r[key]:11.2f}" if key in r else f"{'-':>11}" for key in RATIOS)
        )
    return "\n".join(lines)


def quality_table(rows: list[Row]) -> str:
    """nDCG with its interval, its ratio to bm25s's and the paired interval of the difference."""
    if not rows:
        return ""
    wide = max(len(r["method"]) for r in rows) + 2
    head = f"{'method':<{wide}}{'nDCG@10':>9}{'95 %':>16}{'recall@10':>11}{'all gold':>10}{'MRR@10':>9}"
    lines = [f"\n{rows[0]['set']}, {rows[0]['questions']:,} questions", f"{head}{'/ bm25s':>9}{'- bm25s, 95 %':>24}"]
    for r in rows:
        interval = "{:.3f} .. {:.3f}".format(*r["ndcg_interval"]) if "ndcg_interval" in r else ""
        line = f"{r['method']:<{wide}}{r['ndcg']:9.4f}{interval:>16}{r['recall']:11.3f}{r['all_gold']:10.3f}"
        minus = "{:+.4f} ({:+.3f} .. {:+.3f})".format(*r["minus_bm25s"]) if "minus_bm25s" in r else ""
        lines.append(f"{line}{r['mrr']:9.3f}{r['times_bm25s']:9.3f}{minus:>28}")
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """A panel for each part that was measured: quality by set, speed by engine, recall against speed."""
    parts = [(name, draw) for name, draw in PANELS.items() if result.get(name)]
    figure = Figure(figsize=(2 + 6 * len(parts), 5), dpi=DPI, layout="constrained")
    for ax, (name, draw) in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        draw(ax, result[name])
        ax.grid(True, color="#DDDDDD", linewidth=0.6)
        ax.set_axisbelow(True)
    with atomic_write(path) as f:
        figure.savefig(f, format="png")


def draw_quality(ax: Any, rows: list[Row]) -> None:
    """nDCG@10 with its interval; a row for each method, a colour for each set."""
    rows = [r for r in rows if "ndcg_interval" in r]
    sets, methods = (list(dict.fromkeys(r[key] for r in rows)) for key in ("set", "method"))
    for i, name in enumerate(sets):
        own = [r for r in rows if r["set"] == name]
        y = [methods.index(r["method"]) + 0.8 * (i + 0.5) / len(sets) - 0.4 for r in own]
        error = [[max(0.0, s * (r["ndcg"] - r["ndcg_interval"][e])) for r in own] for e, s in ((0, 1), (1, -1))]
        colour = (BLUE, ORANGE, GREEN, GREY, "black")[i % 5]
        ax.errorbar([r["ndcg"] for r in own], y, xerr=error, fmt="o", markersize=4, color=colour, label=name)
    ax.set(yticks=range(len(methods)), yticklabels=methods, xlabel="nDCG@10, 95 %", title="quality")
    ax.invert_yaxis()
    ax.legend(fontsize=8, frameon=False)


def draw_speed(ax: Any, rows: list[Row]) -> None:
    bars(ax, [r["engine"] for r in rows], rows)
    ax.set_title("questions per second")


def bars(ax: Any, names: list[str], rows: list[Row]) -> None:
    for i, (key, label, colour) in enumerate((("single", "one by one", BLUE), ("batch", "batch", ORANGE))):
        made = ax.barh([y + 0.4 * i - 0.2 for y in range(len(rows))], [r[key] for r in rows], 0.4, color=colour)
        ax.bar_label(made, fmt="%.3g", fontsize=7, padding=2)
        made.set_label(label)
    ax.set(yticks=range(len(names)), yticklabels=names, xscale="log", xlabel="questions per second")
    ax.invert_yaxis()
    ax.margins(x=0.15)
    ax.legend(fontsize=8, frameon=False)


def draw_vectors(ax: Any, rows: list[Row]) -> None:
    """Up and to the right is better."""
    for engine, colour, marker in (("ours", BLUE, "o"), ("faiss", GREY, "s")):
        own = [r for r in rows if r["engine"] == engine]
        ax.plot([r["recall"] for r in own], [r["single"] for r in own], marker, color=colour, label=engine)
        for r in own:
            ax.annotate(r["index"], (r["recall"], r["single"]), (4, 4), textcoords="offset points", fontsize=8)
    ax.set(yscale="log", xlabel="recall@10", ylabel="questions per second, one by one", title="vectors")
    ax.legend(fontsize=8, frameon=False)


PANELS = {"quality": draw_quality, "speed": draw_speed, "vectors": draw_vectors}
