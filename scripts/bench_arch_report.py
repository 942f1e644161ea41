"""Tables and pictures of what bench_arch wrote, from its JSON alone.

python -m scripts.bench_arch_report                 # of <base dir>/bench/arch.json
python -m scripts.bench_arch_report --out=NAME      # of NAME.json there
"""

import io
import math
import statistics
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

from nanochat.blocks import entry_names
from nanochat.common import atomic_write, base_dir, read_json, run_script
from nanochat.config import load_config
from nanochat.plots import BLUE, DPI, GREEN, GREY, ORANGE

# The rest of Okabe and Ito's palette after the colours of plots.py; architectures take them in order.
COLOURS = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MIB = 2**20
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class BenchArchReportConfig:
    """Tables and pictures of a bench_arch run."""

    out: Annotated[str, "name of the JSON file in <base dir>/bench, without .json"] = "arch"


def compact(names: list[str]) -> str:
    """Block names in the notation of block_pattern: ["mamba", "mamba", "attn"] -> "2*mamba+attn"."""
    runs = [(name, len(list(run))) for name, run in groupby(names)]
    return "+".join(f"{n}*{name}" if n > 1 else name for name, n in runs)


def mean(values: list[float]) -> float:
    return statistics.fmean(values)


def part_rows(results: dict[str, Any], part: str) -> Rows:
    return results["parts"].get(part, {"rows": []})["rows"]


def by_arch(rows: Rows) -> dict[str, Rows]:
    """Rows of each architecture, in the order of the run."""
    return {name: [r for r in rows if r["arch"] == name] for name in dict.fromkeys(r["arch"] for r in rows)}


# ---- what the rows say ----


def best_runs(rows: Rows) -> Rows:
    """The runs of one architecture at its best rate, one per seed; empty when every rate diverged."""
    first = [r for r in rows if r["seed"] == rows[0]["seed"] and r["bpb"] is not None]
    if not first:
        return []
    lr = min(first, key=lambda r: r["bpb"])["lr"]
    return [r for r in rows if r["lr"] == lr and r["bpb"] is not None]


def curve(rows: Rows, metric: str) -> dict[int, float]:
    """Length -> value, where it was measured."""
    return {r["length"]: r[metric] for r in rows if metric in r}


def crossover(first: dict[int, float], other: dict[int, float]) -> float | None:
    """The length from which `other` costs less than `first` at all longer ones, interpolated in log-log.

    The shortest common length where it always does, None where it does not at the longest common one.
    """
    lengths = sorted(set(first) & set(other))
    gap = [math.log(other[n] / max(first[n], 1e-12)) for n in lengths]
    if not lengths or gap[-1] >= 0:
        return None
    above = [i for i, g in enumerate(gap) if g >= 0]
    if not above:
        return float(lengths[0])
    i = above[-1]
    share = gap[i] / (gap[i] - gap[i + 1])
    return math.exp((1 - share) * math.log(lengths[i]) + share * math.log(lengths[i + 1]))


def crossovers(rows: Rows, metric: str) -> dict[str, tuple[str, float | None]]:
    """Architecture -> (what to print, the length), beside the first architecture."""
    (_, first_rows), *others = by_arch(rows).items()
    first = curve(first_rows, metric)
    found: dict[str, tuple[str, float | None]] = {}
    for name, other_rows in others:
        other = curve(other_rows, metric)
        common = sorted(set(first) & set(other))
        at = crossover(first, other)
        if not common:
            found[name] = ("-", None)
        elif at is None:
            found[name] = (f"none up to {common[-1]:,}", None)
        elif at == common[0]:
            found[name] = (f"cheaper from {common[0]:,} on", at)
        else:
            found[name] = (f"{at:,.0f}", at)
    return found


def best_accuracy(rows: Rows, length: int) -> list[float]:
    """Of one architecture: the best over the rates at the length of training, for each seed, seen at `length`."""
    values = []
    for seed in dict.fromkeys(r["seed"] for r in rows):
        tried = [r for r in rows if r["seed"] == seed]
        best = max(tried, key=lambda r: next(iter(r["accuracy"].values())))
        values.append({int(T): a for T, a in best["accuracy"].items()}[length])
    return values


def headline(results: dict[str, Any]) -> dict[str, Any]:
    """Figures for the report's section: bits per byte and accuracies of each architecture."""
    figures: dict[str, Any] = {}
    for name, rows in by_arch(part_rows(results, "train")).items():
        if runs := best_runs(rows):
            figures[f"{name}: stream bpb"] = mean([r["bpb"] for r in runs])
            figures[f"{name}: tokens_per_s"] = statistics.median(r["tokens_per_s"] for r in rows)
    for part in ("recall", "needle"):
        for name, rows in by_arch(part_rows(results, part)).items():
            length = max(map(int, rows[0]["accuracy"]))
            figures[f"{name}: {part} at {length}"] = mean(best_accuracy(rows, length))
    return figures


# ---- tables ----


def tables(results: dict[str, Any]) -> str:
    """All tables, in Markdown that reads in a terminal too."""
    makers = {"train": train_tables, "length": length_tables, "recall": toy_table, "needle": toy_table}
    texts = []
    for part, found in results["parts"].items():
        where = f"{found['device']}, commit {found['git'].get('commit', '?')}, {found['wall_s']:.0f} s"
        texts.append(f"### {part}\n\n{makers[part](results, part)}\n\n{where}: `{found['command']}`")
    return "\n\n".join(texts)


def train_tables(results: dict[str, Any], part: str) -> str:
    found = results["parts"][part]
    head = "architecture|blocks|M parameters|MFLOP/token|best rate|stream bpb|runs|tokens|seconds|tokens/s|peak MiB"
    lines = [[str(word) for word in head.split("|")]]
    sweep: list[list[str]] = []
    lrs = list(dict.fromkeys(r["lr"] for r in found["rows"]))
    for name, rows in by_arch(found["rows"]).items():
        runs, shape = best_runs(rows), results["architectures"][name]
        peaks = [r["peak_bytes"] for r in rows if r["peak_bytes"] is not None]
        lines.append([
            name, compact(entry_names(shape["block_pattern"], shape["n_layer"])),
            f"{rows[0]['parameters']['total'] / 1e6:.2f}", f"{rows[0]['flops_per_token'] / 1e6:.1f}",
            f"{runs[0]['lr']:g}{edge(runs[0]['lr'], lrs)}" if runs else "-",
            spread([r["bpb"] for r in runs], 4) if runs else "all diverged", str(len(runs)),
            f"{mean([r['tokens'] for r in runs or rows]):,.0f}", f"{mean([r['seconds'] for r in runs or rows]):.0f}",
            f"{statistics.median(r['tokens_per_s'] for r in rows):,.0f}",
            f"{statistics.median(peaks) / MIB:,.0f}" if peaks else "-",
        ])  # fmt: skip
        first = {r["lr"]: r["bpb"] for r in rows if r["seed"] == rows[0]["seed"]}
        sweep.append([name, *("diverged" if first[lr] is None else f"{first[lr]:.4f}" for lr in lrs)])
    note = (
        f"{found['amount']:,.6g} {found['budget']} for each run, the same batches. Bits per byte of fixed stream "
        f"windows, mean and half the range over seeds; * = the best rate is at the edge of the sweep. Peak: memory of "
        f"a run above what the process held before it."
    )
    rates = table([["stream bpb at matrix_lr", *(f"{lr:g}" for lr in lrs)], *sweep])
    return f"{table(lines)}\n\n{rates}\n\n{note}"


def edge(lr: float, lrs: list[float]) -> str:
    return "*" if len(lrs) > 1 and lr in (min(lrs), max(lrs)) else ""


def spread(values: list[float], digits: int) -> str:
    """Mean, and half the range where there are several."""
    half = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{half}"


def metrics_of(rows: Rows) -> dict[str, str]:
    """Key of a row -> what it is."""
    decodes = list(dict.fromkeys(k for r in rows for k in r if k.startswith("decode_ms_")))
    names = {k: f"decode, ms per step of {k.removeprefix('decode_ms_')} rows" for k in decodes}
    return {"prefill_ms": "prefill, ms", **names, "state_bytes": "state of one row, MiB"}


def length_tables(results: dict[str, Any], part: str) -> str:
    rows = part_rows(results, part)
    lengths = sorted({r["length"] for r in rows})
    texts = []
    for metric, title in metrics_of(rows).items():
        lines = [[title, *(f"{n:,}" for n in lengths), "crossover"]]
        crossed = crossovers(rows, metric)
        for name, found in by_arch(rows).items():
            values = curve(found, metric)
            scale = MIB if metric == "state_bytes" else 1
            cells = [f"{values[n] / scale:,.4g}" if n in values else "-" for n in lengths]
            lines.append([name, *cells, crossed.get(name, ("",))[0]])
        texts.append(table(lines))
    left_out = [f"{r['arch']} at {r['length']:,}: {r['left_out']}." for r in rows if "left_out" in r]
    first = rows[0]["arch"]
    note = f"Crossover: the context from which it costs less than {first}. Random weights, {rows[0]['dtype']}."
    return "\n\n".join([*texts, " ".join([note, *left_out])])


def toy_table(results: dict[str, Any], part: str) -> str:
    rows = part_rows(results, part)
    lengths = list(map(int, rows[0]["accuracy"]))
    lines = [["architecture", "toy model", *(f"accuracy at {n}" for n in lengths), "seeds", "steps", "s a run"]]
    for name, found in by_arch(rows).items():
        cells = [spread(best_accuracy(found, n), 3) for n in lengths]
        seeds = len({r["seed"] for r in found})
        steps, seconds = max(r["steps"] for r in found), mean([r["seconds"] for r in found])
        lines.append([name, found[0]["blocks"], *cells, str(seeds), f"{steps:,}", f"{seconds:.0f}"])
    rates = ", ".join(f"{lr:g}" for lr in dict.fromkeys(r["lr"] for r in rows))
    what = "Several keys asked for" if part == "recall" else f"One key; trained at {lengths[0]} tokens"
    note = f"{what}; the best of the matrix rates {rates} for each seed, mean and half the range over seeds."
    return f"{table(lines)}\n\n{note}"


def table(lines: list[list[str]]) -> str:
    """Markdown, padded: the first column to the left, the others to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    padded = [
        [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))] for line in lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in [padded[0], rule, *padded[1:]])


# ---- pictures ----


def plots(results: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """<stem>_<part>.png of each part that has rows -> their paths."""
    makers = {"train": draw_train, "length": draw_length, "recall": draw_recall, "needle": draw_needle}
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(results["architectures"])}
    made = []
    for part in results["parts"]:
        made.append(folder / f"{stem}_{part}.png")
        buffer = io.BytesIO()
        makers[part](part_rows(results, part), colours).savefig(buffer, format="png", metadata={"Software": None})
        with atomic_write(made[-1]) as f:
            f.write(buffer.getvalue())
    return made


def panels(n: int, columns: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure  # takes a second to import: only for those who draw

    rows = -(-n // columns)
    figure = Figure(figsize=(0.5 + 4.6 * columns, 0.4 + 3.6 * rows), dpi=DPI, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes:
        ax.grid(True, color="#DDDDDD", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_axisbelow(True)
    for ax in axes[n:]:
        ax.remove()
    return figure, axes[:n]


def draw_train(rows: Rows, colours: dict[str, str]) -> Any:
    """Bits per byte with a dot per seed; over the rates; the training loss over seconds."""
    figure, (seeds, rates, losses) = panels(3, 3)
    found, lrs = by_arch(rows), sorted({r["lr"] for r in rows})
    for i, (name, of) in enumerate(found.items()):
        values = [r["bpb"] for r in best_runs(of)]
        if values:
            seeds.plot([i], [mean(values)], color=colours[name], marker="_", markersize=28, markeredgewidth=2)
            seeds.plot([i] * len(values), values, linestyle="", marker="o", color=colours[name])
        sweep = sorted((r["lr"], r["bpb"]) for r in of if r["seed"] == of[0]["seed"] and r["bpb"] is not None)
        rates.plot(*zip(*sweep, strict=True) if sweep else ((), ()), color=colours[name], marker="o", label=name)
        for run in best_runs(of)[:1]:
            _, seconds, loss = zip(*run["curve"], strict=True)
            losses.plot(seconds, loss, color=colours[name], label=name)
    seeds.set_xticks(range(len(found)), list(found), rotation=25, ha="right")
    seeds.set(ylabel="stream bits per byte", title="best rate: mean, and a dot per seed")
    rates.set(xlabel="matrix_lr", ylabel="stream bits per byte", xscale="log", title="sweep")
    rates.set_xticks(lrs, [f"{lr:g}" for lr in lrs])
    rates.minorticks_off()
    losses.set(xlabel="seconds of training", ylabel="loss (nats per token)", title="training")
    rates.legend(frameon=False, fontsize=8)
    return figure


def draw_length(rows: Rows, colours: dict[str, str]) -> Any:
    """Each cost over the context, with the crossovers on the curves."""
    metrics, lengths = metrics_of(rows), sorted({r["length"] for r in rows})
    figure, axes = panels(len(metrics), 2)
    for ax, (metric, title) in zip(axes, metrics.items(), strict=True):
        scale = MIB if metric == "state_bytes" else 1
        for name, of in by_arch(rows).items():
            points = {n: v / scale for n, v in curve(of, metric).items()}
            if not points:
                continue
            ax.plot(list(points), list(points.values()), color=colours[name], marker="o", markersize=4, label=name)
        for name, (text, at) in crossovers(rows, metric).items():
            if at is not None and at > min(lengths):  # a curve that is always below shows it
                ax.axvline(at, color=colours[name], linestyle=":", linewidth=1.3)
                ax.text(
                    at, 0.98, f" {text}", color=colours[name], fontsize=7, rotation=90, va="top", ha="right",
                    transform=ax.get_xaxis_transform(),
                )  # fmt: skip
        ax.set(xlabel="context (tokens)", title=title)
        if ax.lines:
            ax.set(xscale="log", yscale="log")
        ax.set_xticks(lengths, [f"{n:,}" for n in lengths])
        ax.minorticks_off()
    if axes[0].lines:
        axes[0].legend(frameon=False, fontsize=8)
    return figure


def draw_recall(rows: Rows, colours: dict[str, str]) -> Any:
    figure, (ax,) = panels(1, 1)
    found = by_arch(rows)
    for i, (name, of) in enumerate(found.items()):
        values = best_accuracy(of, int(next(iter(of[0]["accuracy"]))))
        ax.bar(i, mean(values), color=colours[name], alpha=0.5)
        ax.plot([i] * len(values), values, linestyle="", marker="o", color=colours[name])
    ax.axhline(1, color=GREY, linewidth=0.8, linestyle="--")
    labels = [f"{name}\n{of[0]['blocks']}" for name, of in found.items()]
    ax.set_xticks(range(len(found)), labels, rotation=25, ha="right", fontsize=8)
    ax.set(ylim=(0, 1.05), ylabel="accuracy, held-out", title="associative recall (MQAR), a dot per seed")
    return figure


def draw_needle(rows: Rows, colours: dict[str, str]) -> Any:
    figure, (ax,) = panels(1, 1)
    for name, of in by_arch(rows).items():
        lengths = list(map(int, of[0]["accuracy"]))
        values = [best_accuracy(of, n) for n in lengths]
        ax.plot(
            lengths, [mean(v) for v in values], color=colours[name], marker="o", label=f"{name} ({of[0]['blocks']})"
        )
        ax.fill_between(lengths, [min(v) for v in values], [max(v) for v in values], color=colours[name], alpha=0.15)
    ax.set(ylim=(0, 1.05), xscale="log", xlabel="tokens around the needle", ylabel="accuracy, held-out")
    ax.set_title(f"needle, trained at {lengths[0]} tokens")
    ax.set_xticks(lengths, [f"{n:,}" for n in lengths])
    ax.minorticks_off()
    ax.legend(frameon=False, fontsize=8)
    return figure


def main(argv: list[str]) -> None:
    cfg = load_config(BenchArchReportConfig, argv)
    folder = base_dir() / "bench"
    results = read_json(folder / f"{cfg.out}.json", "results of bench_arch")
    print(tables(results))
    print(f"\nwrote {', '.join(str(p) for p in plots(results, folder, cfg.out))}")


if __name__ == "__main__":
    run_script(main)
