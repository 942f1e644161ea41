"""report.md: what ran, on what, for how long and how well. Every stage appends a section; `generate` puts it together.

    python -m nanochat.report reset       # before the first stage: remembers the start, the machine, the commit
    python -m nanochat.report generate    # <base dir>/report/report.md, and ./report.md with ./report_files
    python -m nanochat.report generate --gpu_price=3     # with the cost, at USD per GPU hour (or GPU_PRICE_PER_HOUR)

A stage calls log_stage("chat_evaluation_sft", {"ARC-Easy": {"value": 0.39, "stderr": 0.01, "n": 2376}, ...}) on rank 0.
The summary table has a column per part of the pipeline and picks these figures up by name.
"""

import datetime
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanochat.common import REPO_DIR, atomic_write, base_dir, git_state, machine_info, read_json, run_script, write_json
from nanochat.config import UserError
from nanochat.plots import plot_metrics

__all__ = ["aligned_table", "generate", "log_stage", "plot_metrics", "report_dir", "reset", "significance"]

STAGES = """
    tokenizer_training tokenizer_evaluation base_training base_loss base_eval chat_evaluation_base mid_training
    chat_evaluation_mid chat_sft chat_evaluation_sft rag_finetuning rag_evaluation chat_evaluation_rag
    refrag_cold_start refrag_training refrag_multihop_evaluation refrag_compress refrag_compress_evaluation
    refrag_evaluation chat_evaluation_refrag chat_rl chat_evaluation_rl
""".split()  # noqa: SIM905
# Column -> what the name of its stages starts or ends with.
COLUMNS = {"BASE": "base", "MID": "mid", "SFT": "sft", "RAG": "rag", "REFRAG": "refrag", "RL": "rl"}
ROWS = ["CORE", "ARC-Challenge", "ARC-Easy", "GSM8K", "HumanEval", "MMLU", "ChatCORE", "val_bpb"]
LEGEND = (
    "↑ and ↓: above or below the nearest figure to its left by more than 2 standard errors of the difference. "
    "± is a standard error, n the number of questions."
)
COUNTED = (".py", ".rs", ".md", ".html", ".toml", ".sh")  # as nanochat counts its own size


def report_dir() -> Path:
    return base_dir() / "report"


def log_stage(
    stage: str,
    metrics: dict[str, Any],
    text: str = "",
    plots: Sequence[Path] = (),
    *,
    duration_s: float | None = None,
    summary: Sequence[str] = (),
    merge: bool = False,
) -> Path:
    """Write <base dir>/report/<stage>.json and return it; the last call for a stage counts. Only rank 0 calls it.

    metrics: name -> number, text, list, or {"value", "stderr", "n"} for a figure with its standard error.
    text: Markdown after the table. plots: PNG files, copied beside the report where they lie elsewhere.
    duration_s: default the metric `seconds`, or 60 * `minutes`. summary: metrics that get a row in the summary table
    beside nanochat's. merge: keep metrics of an earlier call that this one does not give (one task evaluated again).
    """
    if not re.fullmatch(r"[a-z0-9_]+", stage) or stage == "header":
        raise ValueError(f"stage={stage!r}: expected a name of lower-case letters, digits and _")
    path = report_dir() / f"{stage}.json"
    before = read_json(path) if merge and path.is_file() else {"metrics": {}, "summary": []}
    metrics = {k: _plain(v, k) for k, v in metrics.items()}
    if duration_s is None:
        duration_s = metrics.get("seconds", 60 * metrics["minutes"] if "minutes" in metrics else None)
    report_dir().mkdir(parents=True, exist_ok=True)
    section = {
        "stage": stage,
        "time": _now(),
        "duration_s": duration_s,
        "git": git_state(),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "metrics": {**before["metrics"], **metrics},
        "summary": [*dict.fromkeys([*before["summary"], *summary])],
        "text": text,
        "plots": [_bring(Path(p)).name for p in plots],
    }
    write_json(path, section)
    return path


def _plain(value: Any, name: str) -> Any:
    """JSON form of a metric; numpy and torch scalars become numbers."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, dict):
        return {str(k): _plain(v, f"{name}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, name) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value) if isinstance(value, Path) else _refuse(value, name)


def _refuse(value: Any, name: str) -> Any:
    raise ValueError(f"metric {name} is a {type(value).__name__}: expected a number, text, list or dict")


def _bring(plot: Path) -> Path:
    """The plot inside the report folder, copied there if need be."""
    inside = report_dir() / plot.name
    if plot.resolve() != inside.resolve():
        with atomic_write(inside) as f:
            f.write(plot.read_bytes())
    return inside


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def reset() -> Path:
    """Empty <base dir>/report and write header.json: now, this machine, this commit."""
    for pattern in ("*.json", "*.png", "report.md"):
        for path in report_dir().glob(pattern):
            path.unlink()
    path = report_dir() / "header.json"
    write_json(path, _header())
    return path


def _header() -> dict[str, Any]:
    return {"start": _now(), "machine": {**machine_info(), **_torch_info()}, "git": git_state()}


def _torch_info() -> dict[str, Any]:
    """Version of torch and the GPUs it sees; nothing where torch is not installed."""
    if importlib.util.find_spec("torch") is None:
        return {}
    import torch  # heavy: only for the header

    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    names = [f"{g.name}, {g.total_memory / 2**30:.0f} GiB" for g in gpus]
    return {"torch": torch.__version__, "gpus": [f"{names.count(n)} x {n}" for n in dict.fromkeys(names)]}


# ---- putting it together ----


def generate(to: Path | None = None, gpu_price: float | None = None) -> Path:
    """Write <base dir>/report/report.md, and a copy as <to>/report.md (default: here) with pictures in report_files.

    gpu_price: USD for an hour of one GPU.
    """
    sections = _sections()
    path = report_dir() / "report.md"
    header_path = report_dir() / "header.json"
    header = read_json(header_path, "report header") if header_path.is_file() else {**_header(), "start": None}
    header["gpu_price"] = gpu_price
    _write_text(path, _markdown(header, sections, folder=""))
    to = Path(to or Path.cwd())
    if to.resolve() != report_dir().resolve():
        files = to / "report_files"
        shutil.rmtree(files, ignore_errors=True)
        for plot in [p for s in sections for p in s["plots"]]:
            with atomic_write(files / plot) as f:
                f.write((report_dir() / plot).read_bytes())
        _write_text(to / "report.md", _markdown(header, sections, folder="report_files/"))
    return path


def _write_text(path: Path, text: str) -> None:
    with atomic_write(path, "w") as f:
        f.write(text)


def _sections() -> list[dict[str, Any]]:
    """The stages that were logged: the known ones in the order of the pipeline, then others by time."""
    found = [read_json(p, "report section") for p in sorted(report_dir().glob("*.json")) if p.name != "header.json"]
    for plot, stage in [(report_dir() / p, s["stage"]) for s in found for p in s["plots"]]:
        if not plot.is_file():
            raise UserError(f"picture {plot} of the stage {stage} is gone: restore it, or run the stage again")
    found.sort(key=lambda s: _time(s["time"]))
    return sorted(found, key=lambda s: STAGES.index(s["stage"]) if s["stage"] in STAGES else len(STAGES))


def _time(text: str) -> datetime.datetime:
    return datetime.datetime.fromisoformat(text)


def _markdown(header: dict[str, Any], sections: list[dict[str, Any]], folder: str) -> str:
    parts = ["# nanochat-turbo training report", _environment(header), _size(), "## Summary", _summary(sections)]
    parts += [_timings(header, sections)] + [_section(s, folder) for s in sections]
    if not sections:
        parts.append("No stage has run yet.")
    return "\n\n".join(p for p in parts if p) + "\n"


def _environment(header: dict[str, Any]) -> str:
    machine, git = header["machine"], header["git"]
    changed = ", with uncommitted changes" if git.get("dirty") == "yes" else ""
    features = f" ({', '.join(machine['cpu_features'])})" if machine.get("cpu_features") else ""
    rows = {
        "Commit": f"{git['commit']} on {git['branch']}{changed}" if git else "not a git checkout",
        "Started": header["start"] or "not recorded (`python -m nanochat.report reset` before the first stage does)",
        "CPU": f"{machine['cpu']}{features}",
        "Cores, memory": f"{machine['cores']}, {machine['memory_gib']} GiB",
        "GPU": "; ".join(machine.get("gpus", [])) or "none",
        "System": machine["system"],
        "Python, torch": f"{machine['python']}, {machine.get('torch', 'not installed')}",
    }
    return "## Environment\n\n" + _table(["", ""], [[k, v] for k, v in rows.items()])


def _size() -> str:
    """nanochat's measure of bloat, over the tracked files of this checkout."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=REPO_DIR, capture_output=True) if git_state() else None
    if done is None or done.returncode:
        return "## Size of the code\n\nNot a git checkout: not counted."
    names = [n for n in done.stdout.decode().split("\0") if n.endswith(COUNTED)]
    texts = [(REPO_DIR / n).read_text(encoding="utf-8", errors="replace") for n in names if (REPO_DIR / n).is_file()]
    characters, lines = sum(map(len, texts)), sum(t.count("\n") for t in texts)
    lock = REPO_DIR / "requirements.lock"
    rows = [
        ["Characters", f"{characters:,}"],
        ["Lines", f"{lines:,}"],
        ["Files", f"{len(texts):,}"],
        ["Tokens (about, 4 characters each)", f"{characters // 4:,}"],
    ]
    if lock.is_file():
        pinned = len(re.findall(r"^[A-Za-z0-9_.\[\]-]+==", lock.read_text(), flags=re.MULTILINE))
        rows.append(["Packages in requirements.lock", f"{pinned:,}"])
    return f"## Size of the code\n\nTracked {' '.join(COUNTED)} files, tests included.\n\n" + _table(["", ""], rows)


def column_of(stage: str) -> str | None:
    """The column of the summary table a stage reports to, or None: base_eval -> BASE, chat_evaluation_sft -> SFT."""
    words = stage.split("_")
    return next((c for c, word in COLUMNS.items() if word in (words[0], words[-1])), None)


def _summary(sections: list[dict[str, Any]]) -> str:
    """nanochat's table: a metric per row, a part of the pipeline per column, '-' where nothing was measured."""
    cells: dict[tuple[str, str], Any] = {}
    extra = dict.fromkeys(name for s in sections for name in s["summary"] if name not in ROWS)
    for section in sorted(sections, key=lambda s: _time(s["time"])):  # of two stages of a column the later one counts
        column = column_of(section["stage"])
        for name in (*ROWS, *extra):
            if column and _number(section["metrics"].get(name)) is not None:
                cells[name, column] = section["metrics"][name]
    columns = [c for c in COLUMNS if c != "REFRAG" or any(column == c for _, column in cells)]
    rows = [[name.replace("_", " "), *_row([cells.get((name, c)) for c in columns])] for name in (*ROWS, *extra)]
    marked = any(cell[-1] in "↑↓" for row in rows for cell in row)
    return _table(["Metric", *columns], rows) + (f"\n\n{LEGEND}" if marked else "")


def _row(values: list[Any]) -> list[str]:
    """The cells of one metric, each marked where it differs from the one before by more than chance."""
    cells, last = [], None
    for value in values:
        z = None if last is None or value is None else significance(last, value)
        mark = "" if z is None or abs(z) <= 2 else " ↑" if z > 0 else " ↓"
        cells.append("-" if value is None else _cell(value) + mark)
        last = last if value is None else value
    return cells


def significance(a: Any, b: Any) -> float | None:
    """b - a in standard errors of their difference; None where one of them has no standard error and count.

    The samples count as independent: stages that answer the same questions differ more clearly than this says. A
    standard error is 1/n at least, for none or all right of n shows no spread.
    """
    if not all(isinstance(m, dict) and m.get("stderr") is not None and m.get("n") for m in (a, b)):
        return None
    errors = [max(m["stderr"], 1 / m["n"]) for m in (a, b)]
    return (b["value"] - a["value"]) / math.hypot(*errors)


def _number(value: Any) -> float | None:
    """The finite number of a metric, or None."""
    if isinstance(value, dict):
        value = value.get("value")
    ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if ok else None


def _cell(value: Any) -> str:
    """0.2875 ± 0.0132 (n=1172), as far as it is known."""
    if not isinstance(value, dict):
        return f"{value:.4f}"
    stderr = f" ± {value['stderr']:.4f}" if value.get("stderr") is not None else ""
    n = f" (n={value['n']})" if value.get("n") is not None else ""
    return f"{value['value']:.4f}{stderr}{n}"


def _timings(header: dict[str, Any], sections: list[dict[str, Any]]) -> str:
    rows = [
        [s["stage"], "-" if s["duration_s"] is None else _span(s["duration_s"]), s["time"], s["git"].get("commit", "-")]
        for s in sorted(sections, key=lambda s: _time(s["time"]))
    ]
    if not rows:
        return ""
    total = ""
    if header["start"]:
        seconds = (_time(rows[-1][2]) - _time(header["start"])).total_seconds()
        total = f"Total wall clock time: {_span(seconds)}{_cost(header, seconds)}\n\n"
    return f"## Time\n\n{total}" + _table(["Stage", "Took", "Finished", "Commit"], rows)


def _cost(header: dict[str, Any], seconds: float) -> str:
    """What the machine's GPUs cost in that time, where their price is given."""
    price, n = header["gpu_price"], sum(int(g.split(" x ")[0]) for g in header["machine"].get("gpus", []))
    if price is None:
        return ""
    return f", cost: ${seconds / 3600 * n * price:.2f} ({n} GPUs at ${price:.2f} per GPU hour)"


def _span(seconds: float) -> str:
    """3h51m, 12m05s, 8.1s."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def _section(section: dict[str, Any], folder: str) -> str:
    parts = [f"## {section['stage'].replace('_', ' ').capitalize()}", f"    {section['command']}"]
    rows = [[name, _show(value)] for name, value in section["metrics"].items()]
    parts += [_table(["Metric", "Value"], rows)] if rows else []
    parts += [section["text"].strip()]
    parts += [f"![{Path(p).stem.replace('_', ' ')}]({folder}{p})" for p in section["plots"]]
    return "\n\n".join(p for p in parts if p)


def _show(value: Any) -> str:
    if isinstance(value, dict) and _number(value) is not None:
        return _cell(value)
    if isinstance(value, dict):
        return ", ".join(f"{k}: {_show(v)}" for k, v in value.items())
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4f}" if value == 0 or 1e-3 <= abs(value) < 1e9 or not math.isfinite(value) else f"{value:.3e}"
    return json.dumps(value, ensure_ascii=False)


def _table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; a bar or a line break in a cell cannot break it."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(" ".join(c.replace("|", "\\|").split()) for c in r) + " |" for r in lines)


def aligned_table(rows: list[list[str]]) -> str:
    """A Markdown table that a terminal shows well, too. Its first row is the head."""
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    rows = [rows[0], ["-" * w for w in widths], *rows[1:]]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |" for r in rows)


def _gpu_price(flags: list[str]) -> float | None:
    """USD per GPU hour from --gpu_price=N, else from GPU_PRICE_PER_HOUR."""
    name, _, text = flags[0].lstrip("-").partition("=") if flags else ("gpu_price", "", "")
    text = text or os.environ.get("GPU_PRICE_PER_HOUR", "")
    if name.replace("-", "_") != "gpu_price" or len(flags) > 1 or not re.fullmatch(r"|\d+\.?\d*", text):
        given = " ".join(flags) or f"GPU_PRICE_PER_HOUR={text}"
        raise UserError(f"{given}: expected --gpu_price=USD or GPU_PRICE_PER_HOUR=USD, for an hour of one GPU")
    return float(text) if text else None


def main(argv: list[str]) -> None:
    if argv == ["reset"]:
        print(f"started {reset()}")
    elif argv[:1] == ["generate"]:
        print(f"wrote {generate(gpu_price=_gpu_price(argv[1:]))} and {Path.cwd() / 'report.md'}")
    else:
        raise UserError(f"nanochat.report {' '.join(argv)}: expected `reset` or `generate`")


if __name__ == "__main__":
    run_script(main)
