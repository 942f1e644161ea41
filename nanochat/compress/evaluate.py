"""Accuracy against compression for each policy, greedy answers through the engine, all on the same questions."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.common import atomic_write, base_dir
from nanochat.compress.chunks import Prompt
from nanochat.compress.reader import LEARNED, POLICIES, Reader
from nanochat.plots import figure_of, png_bytes
from nanochat.report import aligned_table
from nanochat.retrieval.metrics import mean_interval, paired_bootstrap

Judge = Callable[[dict[str, Any], str], bool]  # a conversation, the completion as decoded -> whether it is right
BATCH = 64  # questions answered together


def compression(prompt: Prompt, expanded: Sequence[int]) -> tuple[int, int, int, int]:
    """-> (ids of chunks, places they take, ids of the whole prompt, places it takes)."""
    ids = sum(c.end - c.start for c in prompt.chunks)
    kept = sum(prompt.chunks[i].end - prompt.chunks[i].start for i in expanded)
    places = kept + len(prompt.chunks) - len(expanded)
    return ids, places, prompt.n_prompt, prompt.n_prompt - ids + places


def right(reader: Reader, prompts: Sequence[Prompt], expanded: Sequence[Sequence[int]], judge: Judge) -> list[float]:
    """1 or 0 for each question."""
    found = []
    for i in range(0, len(prompts), BATCH):
        written = reader.answers(prompts[i : i + BATCH], expanded[i : i + BATCH])
        for prompt, ids in zip(prompts[i : i + BATCH], written, strict=True):
            said = reader.tokenizer.decode(ids, errors="replace")
            found.append(float(judge(prompt.conversation or {}, said)))
    return found


def evaluate(
    reader: Reader,
    prompts: Sequence[Prompt],
    judge: Judge,
    shares: Sequence[float] = (0.05, 0.1, 0.25),
    policies: Sequence[str] = POLICIES,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """A row per policy and share p of chunks expanded ("none" and "all" have one): accuracy with its interval, rate
    (tokens of documents' texts per place they take), prompt_rate (titles and question included), gold_expanded (share
    of questions whose evidence all stays tokens), and `right`, 1 or 0 for each question."""
    rows = []
    for name in policies:
        for p in {"none": (0.0,), "all": (1.0,)}.get(name, shares):
            expanded = [e for i in range(0, len(prompts), BATCH)
                        for e in reader.choose(name, prompts[i : i + BATCH], p, seed + i)]  # fmt: skip
            answered = right(reader, prompts, expanded, judge)
            accuracy, low, high = mean_interval(answered)
            ids, places, whole, taken = np.sum([compression(q, e) for q, e in zip(prompts, expanded, strict=True)], 0)
            gold = [set(q.gold) <= set(e) for q, e in zip(prompts, expanded, strict=True) if q.gold]
            rows.append({"policy": name, "p": p, "accuracy": accuracy, "low": low, "high": high,
                         "rate": float(ids / max(1, places)), "prompt_rate": float(whole / taken),
                         "gold_expanded": float(np.mean(gold)) if gold else float("nan"), "right": answered,
                         })  # fmt: skip
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of `evaluate`."""
    head = ["policy", "p", "x compressed", "x, whole prompt", "evidence expanded", "accuracy", "95 %"]
    lines = [
        [r["policy"], f"{r['p']:g}", f"{r['rate']:.2f}", f"{r['prompt_rate']:.2f}", f"{r['gold_expanded']:.3f}",
         f"{r['accuracy']:.3f}", f"{r['low']:.3f} .. {r['high']:.3f}"]
        for r in rows
    ]  # fmt: skip
    return aligned_table([head, *lines])


def verdicts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What may be claimed of the rl policy at each p: against all chunks expanded, and against the best policy that
    neither is trained by RL nor knows the answer; paired differences."""
    said = []
    full = next((r for r in rows if r["policy"] == "all"), None)
    for mine in (r for r in rows if r["policy"] == "rl"):
        others = [r for r in rows if r["p"] == mine["p"] and r["policy"] not in ("rl", "oracle")]
        best = max(others, key=lambda r: r["accuracy"], default=None)
        for other in (full, best):
            if other is not None:
                mean, low, high = paired_bootstrap(mine["right"], other["right"])
                word = "better than" if low > 0 else "worse than" if high < 0 else "not different from"
                said.append(f"p={mine['p']:g} ({mine['rate']:.1f}x): rl is {word} {other['policy']}: {100 * mean:+.1f} "
                            f"points ({100 * low:+.1f} .. {100 * high:+.1f})")  # fmt: skip
    return said


def judge_policies(
    reader: Reader, prompts: Sequence[Prompt], judge: Judge, shares: Sequence[float], name: str, seed: int
) -> tuple[list[dict[str, Any]], dict[str, Any], str, Path]:
    """Evaluate all policies -> (rows of `evaluate`, metrics and text for a report, the plot)."""
    reader.model.eval()
    reader.encoder.eval()
    rows = evaluate(reader, prompts, judge, shares, seed=seed)
    metrics = {}
    for r in rows:
        if r["policy"] in ("none", "all", *LEARNED):
            interval = f"{r['accuracy']:.3f} ({r['low']:.3f} .. {r['high']:.3f}) at {r['rate']:.1f}x"
            metrics[f"accuracy, {r['policy']}, p={r['p']:g}"] = interval
    text = f"{table(rows)}\n\n" + "".join(f"- {line}\n" for line in verdicts(rows))
    title = f"{name}: {len(prompts)} questions, chunks of {reader.k} tokens at most"
    return rows, metrics, text, plot(rows, f"refrag_{name}_policies", title)


def plot(rows: Sequence[dict[str, Any]], name: str, title: str) -> Path:
    """Accuracy over compression, a line per policy -> <base dir>/report/<name>.png."""
    figure, [ax] = figure_of(1)
    figure.set_size_inches(7, 4.5)
    for policy in dict.fromkeys(r["policy"] for r in rows):
        own = sorted((r for r in rows if r["policy"] == policy), key=lambda r: r["rate"])
        x, y = [r["rate"] for r in own], [r["accuracy"] for r in own]
        bars = [[r["accuracy"] - r["low"] for r in own], [r["high"] - r["accuracy"] for r in own]]
        style = "-" if policy in LEARNED else "--"
        ax.errorbar(x, y, yerr=bars, marker="o", linestyle=style, linewidth=1.5, capsize=2, label=policy)
    ax.set(xlabel="tokens of documents per place in the context", ylabel="accuracy", title=title)
    ax.legend(frameon=False, fontsize=8, ncols=2)
    path = base_dir() / "report" / f"{name}.png"
    with atomic_write(path) as f:
        f.write(png_bytes(figure))
    return path
