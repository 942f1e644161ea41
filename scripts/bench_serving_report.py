"""Table and picture of scripts.bench_serving, made from the rows of its JSON."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from nanochat.common import atomic_write
from nanochat.plots import BLUE, DPI, GREEN, GREY, ORANGE, png_bytes
from nanochat.report import aligned_table

Row = dict[str, Any]

HEAD = ["answers", "load", "server", "tokens/s", "TTFT ms p50 / p90 / p99", "ms per token p50 / p90 / p99",
        "answered", "refused", "lost"]  # fmt: skip
COLOURS = {"ours": BLUE, "whole": GREY, "engine": GREEN, "transformers": ORANGE}


def load_name(row: Row) -> str:
    if row.get("rate") is not None:
        return f"{row['rate']:g} a second"
    return f"{row['clients']} client" + "s" * (row["clients"] != 1)


def table(rows: list[Row]) -> str:
    lines = [
        [
            r["lengths"], load_name(r), r["server"], f"{r['tok_per_s']:.0f}", _three(r["ttft_ms"]),
            _three(r["tpot_ms"]), str(r["answered"]), str(r["refused"]), str(r["lost"]),
        ]
        for r in rows
    ]  # fmt: skip
    return aligned_table([HEAD, *lines])


def _three(values: list[float] | None) -> str:
    return "-" if values is None else " / ".join(f"{v:.3g}" if v < 100 else f"{v:.0f}" for v in values)


def ratios(rows: list[Row]) -> list[str]:
    """What 16 clients get of one client's speed (the most clients there are, where it is not 16), and of the peer's."""
    speed = {(r["lengths"], r["server"], r["clients"]): r["tok_per_s"] for r in rows if r.get("rate") is None}
    out = []
    for lengths in dict.fromkeys(r["lengths"] for r in rows):
        levels = [c for own, server, c in speed if (own, server) == (lengths, "ours")]
        n = 16 if 16 in levels else max(levels, default=1)
        own, one = speed.get((lengths, "ours", n), 0.0), speed.get((lengths, "ours", 1), 0.0)
        if one and n > 1:
            out.append(f"{lengths}: {n} clients get {own / one:.2f} times the tokens/s of one")
        if peer := speed.get((lengths, "transformers", n)):
            out.append(f"{lengths}: {own / peer:.2f} times transformers' batched generate at {n}")
            if whole := speed.get((lengths, "whole", n)):
                out.append(f"{lengths}: {whole / peer:.2f} times that where the server answers in one piece, too")
            if offline := speed.get((lengths, "engine", n)):
                out.append(f"{lengths}: {offline / peer:.2f} times that without server and HTTP")
    return out


def check_lines(name: str, found: Row) -> str:
    """One line of what a check found."""
    return f"{name}: " + ", ".join(f"{key} {_value(value)}" for key, value in found.items())


def _value(value: Any) -> str:
    return _three(value) if isinstance(value, list) else f"{value:g}" if isinstance(value, float) else str(value)


def plot(rows: list[Row], title: str, path: Path) -> None:
    """Tokens a second and the median time to the first token over the number of clients."""
    closed = [r for r in rows if r.get("rate") is None]
    figure = Figure(figsize=(9, 3.8), dpi=DPI, layout="constrained")
    speed, wait = figure.subplots(1, 2)
    for server, lengths in dict.fromkeys((r["server"], r["lengths"]) for r in closed):
        own = [r for r in closed if (r["server"], r["lengths"]) == (server, lengths) and r["ttft_ms"]]
        style = {"color": COLOURS[server], "linestyle": "-" if lengths == "even" else "--", "marker": "o"}
        xs = [r["clients"] for r in own]
        speed.plot(xs, [r["tok_per_s"] for r in own], label=f"{server}, {lengths} lengths", markersize=4, **style)
        wait.plot(xs, [r["ttft_ms"][0] for r in own], markersize=4, **style)
    for ax, label in ((speed, "tokens a second"), (wait, "median time to first token (ms)")):
        ax.set(xscale="log", yscale="log", xlabel="clients at once", ylabel=label)
        ax.set_xticks(sorted({r["clients"] for r in closed}), labels=map(str, sorted({r["clients"] for r in closed})))
        ax.minorticks_off()
        ax.grid(True, color="#DDDDDD", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    speed.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    with atomic_write(path) as f:
        f.write(png_bytes(figure))
