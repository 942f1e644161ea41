"""Verdicts on claims, docs/benchmarks.md and a picture from the result files of bench_claims.py.

python -m scripts.bench_claims --write-docs
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanochat.common import atomic_write, read_json
from nanochat.plots import BLUE, DPI, GREEN, GREY, ORANGE, png_bytes
from nanochat.report import aligned_table
from scripts.bench_claims_verdict import (
    CLAIMS,
    Claim,
    Point,
    Ratio,
    Verdict,
    number,
    paired_ratio,
    question_ratio,
    verdict,
)

TITLES = {"attn": "Transformer", "mamba": "Mamba", "mamba2": "Mamba-2", "gdn": "Gated DeltaNet", "hybrid": "Hybrid"}
COLOURS = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
Result = dict[str, Any]
Results = dict[tuple[str, str], Result]  # by part, and CPU or GPU


# ---- from result files ----


def read_results(folder: Path) -> Results:
    """{(part, "CPU" or "GPU"): result}. Of several GPU kinds the one measured last counts."""
    found = [read_json(path, "results of bench_claims") for path in sorted(folder.glob("*_*.json"))]
    return {(r["part"], r["where"]): r for r in sorted(found, key=lambda r: r["machine"]["date"])}


def values(result: Result, key: str, metric: str) -> dict[float, dict[int, float]]:
    """Of one stack: length -> seed or repeat -> value, where it was measured."""
    found: dict[float, dict[int, float]] = {}
    for row in result["rows"]:
        if row["arch"] == key and row.get(metric) is not None:
            found.setdefault(row.get("length", 0), {})[row.get("repeat", 0)] = row[metric]
    return found


def curve(claim: Claim, result: Result, first: str, other: str) -> list[Point]:
    """`other` beside `first` at each length that both have."""
    if claim.part == "rag":
        [row] = [r for r in result["rows"] if r["arch"] == other]
        at = row["values"][claim.metric]
        return [Point(0, question_ratio(at[claim.against], at["rag"], claim.better))]
    ours, theirs, points = values(result, other, claim.metric), values(result, first, claim.metric), []
    for length in sorted(set(ours) & set(theirs)):
        pairs = sorted(set(ours[length]) & set(theirs[length]))
        a, b = [theirs[length][i] for i in pairs], [ours[length][i] for i in pairs]
        if claim.computed and min(a[0], b[0]) <= 0:
            continue  # nothing fits: no ratio
        ratio = paired_ratio(a[:1], b[:1], claim.better) if claim.computed else paired_ratio(a, b, claim.better)
        points.append(Point(length, Ratio(ratio.value, *[ratio.value] * 2) if claim.computed else ratio))
    return points


def compared(claim: Claim, result: Result) -> list[tuple[str, str]]:
    """(first, other) for each stack the claim is about: one of the kind it is measured against, in the same group."""
    stacks, pairs = result["stacks"], []
    measured = {r["arch"] for r in result["rows"] if r.get(claim.metric) is not None or claim.part == "rag"}
    for key in [k for k, s in stacks.items() if s["kind"] in claim.kinds and k in measured]:
        like = [k for k, s in stacks.items() if s["kind"] == claim.against and s["group"] == stacks[key]["group"]]
        if claim.part == "rag" or like:
            pairs.append((like[0] if like else "", key))
    return pairs


def judged(claim: Claim, result: Result) -> dict[str, tuple[str, list[Point], Verdict]]:
    """Stack -> (compared with, its curve, the verdict)."""
    found = {}
    for first, other in compared(claim, result):
        points = curve(claim, result, first, other)
        found[other] = (first, points, verdict(points, claim.stated, claim.axis))
    return found


# ---- the page ----

INTRO = """# Which claims about Mamba, hybrids and retrieval hold?

Written by `python -m scripts.bench_claims --write-docs` from the result files of `python -m scripts.bench_claims`; what
is changed here by hand is lost. The claims are those of the first nanochat-turbo, which had no runs behind them, and of
the papers in this field. Each is one command away from being measured again, on a CPU or a GPU.

A ratio is turned so that above 1 speaks for the claim: 2x is half the time, half the memory, twice the speed. In
brackets stands its 95 % interval over seeds or repeats (of RAG, over questions); where it includes 1, no difference was
seen. One interval in twenty misses: a single verdict among many may be chance. What follows from a formula has no
interval. Stacks are compared at equal parameters and at equal FLOPs per token, counted at the length of training.
"""

METHOD = """## Measuring again

```bash
python -m scripts.bench_claims                          # the CPU sizes: configs/tiny_*.py
python -m scripts.bench_claims --parts=decode --seeds=5 # one part; what was measured of others stays
python -m scripts.bench_claims --parts=rag --knowledge_base=rag_data
python -m scripts.bench_claims --write-docs
```

On a GPU the same command takes its sizes from the config files named, the first of them the Transformer:

```bash
python -m scripts.bench_claims configs/transformer_d20.py configs/mamba_d20.py configs/mamba2_d20.py \\
    configs/hybrid_sparse_attention_d20.py --device=cuda --train_tokens=50000000 --step_tokens=65536 \\
    --train_lengths=2048,8192,32768 --decode_lengths=2048,8192,32768,131072
```

| part | what it does | measured by |
|---|---|---|
| train | the same batches for all, each matrix rate once, the best with every seed; held-out text | `bench_arch` |
| length | training steps at each length, a process for each, rows not cut at documents; speed, peak | `bench_arch` |
| decode | random weights: a prompt read, then steps of 1 and of 8 rows, each with its own context | `bench_arch` |
| memory | the state of a conversation as on a GPU, computed | `describe` |
| recall | two layers learn 16 pairs of key and value in 64 tokens; asked among more tokens too | `bench_arch` |
| context | prompts of documents: first token, peak; how many fit, computed for the d20 configs | `bench_context` |
| rag | questions asked of a RAG checkpoint, and without documents of the chat model before it | `rag_eval` |

It needs the text and the tokenizer that `bash speedrun.sh` leaves (parts train and length), and its checkpoints (rag).

## Limits

Peak memory of training on a CPU holds what loader and libraries take, too (160 MiB beside a model of 0.1M parameters):
ratios there are nearer to 1 than those of the model alone. Sizes of a CPU say little about billions of parameters, and
losses after some ten thousand tokens hardly differ. Speed depends on kernels: see [backbones.md](backbones.md).
Of documents the ratio is judged, not the numbers; whether a model finds its way among many is another question
([rag.md](rag.md)). The intervals of RAG are over questions, of one checkpoint each.
"""


def page(results: Results, pictures: Sequence[str] = ()) -> str:
    """docs/benchmarks.md. pictures: files beside it."""
    parts = [
        INTRO,
        *(f"![times better, over length]({name})\n" for name in pictures),
        "## Verdicts\n",
        _summary(results),
    ]
    for claim in CLAIMS:
        parts += [f"\n## {claim.id}\n", _told(claim)]
        tables = [_table(claim, results[claim.part, w], w) for w in ("CPU", "GPU") if (claim.part, w) in results]
        missing = [w for w in ("CPU", "GPU") if (claim.part, w) not in results]
        parts += [f"\n{t}" for t in tables]
        if missing:
            parts.append(f"\nOn a {' or a '.join(missing)}: not measured (`{command(claim)}`).")
    return "\n".join([*parts, f"\n{METHOD}"])


def command(claim: Claim) -> str:
    """What measures it."""
    base = " --knowledge_base=rag_data" if claim.part == "rag" else ""
    return f"python -m scripts.bench_claims --parts={claim.part}{base}"


def _told(claim: Claim) -> str:
    return f"{_who(claim)} {claim.text}. Stated by {claim.source}."


def _who(claim: Claim) -> str:
    names = [TITLES.get(k, "a model") for k in claim.kinds]
    said = (
        f"{', '.join(names[:-1])} or {names[-1].lower()}"
        if len(names) > 1 and names[-1] == "Hybrid"
        else " or ".join(names)
    )
    return f"{said[0].upper()}{said[1:]}"


def _summary(results: Results) -> str:
    """A row for each claim and stack at equal parameters."""
    lines = [["claim", "stack", "stated", "CPU", "GPU"]]
    for claim in CLAIMS:
        told = {w: _by_stack(claim, results.get((claim.part, w))) for w in ("CPU", "GPU")}
        names = dict.fromkeys([TITLES.get(k, "RAG") for k in claim.kinds])
        names |= dict.fromkeys(name for found in told.values() for name in found)
        stated = f"{number(claim.stated)}x" if claim.stated > 1 else "better"
        for name in names:
            cells = [told[w].get(name, "not measured") for w in ("CPU", "GPU")]
            lines.append([f"[{claim.id}](#{claim.id})", name, stated, *cells])
    return aligned_table(lines)


def _by_stack(claim: Claim, result: Result | None) -> dict[str, str]:
    """Title of a stack -> verdict; of several of one kind, the first, which is the one at equal parameters."""
    found: dict[str, str] = {}
    groups: dict[str, set[str]] = {}
    for key, (_, _, verdict_) in (judged(claim, result) if result else {}).items():
        stack = result["stacks"][key]  # pyrefly: ignore
        name = TITLES.get(stack["kind"], "RAG")
        if name in found and stack["group"] not in groups[name]:
            name = f"{name}, {stack['group']}"
        groups.setdefault(name, set()).add(stack["group"])
        found.setdefault(name, verdict_.text)
    return found


def _table(claim: Claim, result: Result, where: str) -> str:
    """What a claim's stacks were measured at: absolute values of what they are compared with, then ratios."""
    found = judged(claim, result)
    lengths = sorted({p.at for _, points, _ in found.values() for p in points})
    heads = [f"{n:,.0f} {claim.axis}" for n in lengths] if claim.axis else ["ratio"]
    lines = [["compared", *heads, "verdict", "measured"]]
    run = f"`{result['command']}`, {machine(result)}, {result['machine']['date'][:10]}"
    for row in [r for r in result["rows"] if claim.part == "rag"]:
        without = statistics.fmean(row["values"][claim.metric][claim.against])
        lines.append([f"{result['stacks'][row['arch']]['blocks']}, without: {claim.unit}", f"{without:.3f}", "", run])
    for key in dict.fromkeys(first for first, _, _ in found.values() if first):
        at = values(result, key, claim.metric)
        cells = [f"{statistics.fmean(at[n].values()) / claim.scale:,.4g}" if n in at else "-" for n in lengths]
        lines.append([f"{_label(result, key)}, {claim.unit}", *cells, "", run])
    for key, (_, points, said) in found.items():
        ratios = {p.at: str(p.ratio) for p in points}
        lines.append([_label(result, key), *(ratios.get(n, "-") for n in lengths), said.text, run])
    notes = "".join(f"\n{note}" for note in result.get("notes", []))
    about = (
        f"{where}, {result['device']}, torch {result['versions']['torch']}, commit {result['git'].get('commit', '?')}"
    )
    return f"{about}:\n\n{aligned_table(lines)}{f'{chr(10)}{notes}' if notes else ''}"


def _label(result: Result, key: str) -> str:
    s = result["stacks"][key]
    return f"{TITLES.get(s['kind'], 'RAG')} ({s['blocks']}){', equal ' + s['match'] if s['match'] else ''}"


def machine(result: Result) -> str:
    """The kind of machine: never its name."""
    m = result["machine"]
    return f"{result['gpu']}, {m['cpu']}" if result.get("gpu") else f"{m['cpu']}, {m['cores']} cores"


def headline(results: Results) -> dict[str, str]:
    """Claim and stack -> verdict, for the report's section."""
    return {
        f"{claim.id}, {name}, {where}": said
        for claim in CLAIMS for where in ("CPU", "GPU")
        for name, said in _by_stack(claim, results.get((claim.part, where))).items()
    }  # fmt: skip


# ---- the picture ----


def draw(results: Results, where: str, path: Path) -> Path | None:
    """Ratios over the length with their intervals, a panel for each claim that is a curve; None where none is."""
    from matplotlib.figure import Figure  # takes a second to import: only for those who draw
    from matplotlib.ticker import NullFormatter, NullLocator

    found = {c: judged(c, results[c.part, where]) for c in CLAIMS if c.axis and (c.part, where) in results}
    found = {c: f for c, f in found.items() if any(len(points) > 1 for _, points, _ in f.values())}
    if not found:
        return None
    n_row = -(-len(found) // 3)
    figure = Figure(figsize=(14, 3.4 * n_row), dpi=DPI, layout="constrained")
    axes = list(figure.subplots(n_row, 3, squeeze=False).flat)
    for ax in axes[len(found) :]:
        ax.remove()
    for ax, (claim, stacks) in zip(axes, found.items(), strict=False):
        for i, (key, (_, points, _)) in enumerate(stacks.items()):
            x, y = [p.at for p in points], [p.ratio.value for p in points]
            low = [p.ratio.value - (p.ratio.low or p.ratio.value) for p in points]
            high = [(p.ratio.high or p.ratio.value) - p.ratio.value for p in points]
            label = _label(results[claim.part, where], key)
            ax.errorbar(x, y, [low, high], color=COLOURS[i % 7], marker="o", markersize=4, capsize=3, label=label)
        ax.axhline(1, color=GREY, linewidth=1)
        ax.axhline(claim.stated, color=GREY, linewidth=1, linestyle=":")
        ax.set(xscale="log", yscale="log", xlabel=claim.axis, title=f"{claim.id}: times better (dotted: as stated)")
        shown = [p for _, points, _ in stacks.values() for p in points]
        lengths = sorted({p.at for p in shown})
        ax.set_xticks(lengths, [f"{at:,.0f}" for at in lengths])
        ratios = [1, claim.stated, *(p.ratio.value for p in shown)]
        ax.set_ylim(min(ratios) / 2, max(ratios) * 2)  # an interval of two repeats would hide everything else
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter("{x:g}" if max(ratios) < 8 * min(ratios) else NullFormatter())
        ax.xaxis.set_minor_locator(NullLocator())
        ax.tick_params(axis="both", which="both", labelsize=7)
        ax.title.set_fontsize(9)
        ax.legend(fontsize=6, frameon=False)
    with atomic_write(path) as f:
        f.write(png_bytes(figure))
    return path
