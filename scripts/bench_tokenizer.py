"""Our rustbpe beside other BPE libraries, in one run on one text: training and encoding.

    python -m scripts.bench_tokenizer --install_peers          # once: fetch the peers into <base dir>/bench/peers
    python -m scripts.bench_tokenizer                          # train on 50 MB, encode 20 MB; half an hour on 2 cores
    python -m scripts.bench_tokenizer --repeats=1 --libraries=ours,rustbpe,gigatoken

Reads the parquet shards of $NANOCHAT_DATA/text. Every figure comes from a process of its own
(bench_tokenizer_worker.py), and repeats go round the libraries in turn, so that a busy machine slows all of them.
Figures are medians over repeats.
Training: our default pattern, except gigatoken, whose splitter (GPT-2's) is fixed. "MB above text" is the peak of
resident memory over what the process held with the text loaded. "in common" is the share of our tokens that the library
has too: ties are broken differently.
Encoding: a vocabulary trained with cl100k's pattern, the only one that all can take. "cold" is the first pass of a
process, "warm" the best of three more with copies of the texts, "warm CPU" MB per second of CPU time (tells more where
cores are shared).
Writes <output>/tokenizer.{json,png}.
"""

import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import numpy as np
import pyarrow.parquet as pq
import rustbpe

from nanochat.common import atomic_write, base_dir, data_dir, find_uv, git_state, machine_info, run_script, write_json
from nanochat.config import UserError, load_config

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PEERS = {"rustbpe": "0.1.0", "tokenizers": "0.23.3", "bpeasy": "0.1.6", "gigatoken": "0.10.0"}
TRAINERS = ["ours", *PEERS]
ENCODERS = ["ours", "tiktoken", "tokenizers", "gigatoken"]
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)


@dataclass(frozen=True)
class BenchTokenizerConfig:
    """Training and encoding speed of rustbpe and its peers."""

    mb: Annotated[float, "MB of text to train on; 0 = no training"] = 50
    encode_mb: Annotated[float, "MB of text to encode; 0 = no encoding"] = 20
    vocab_sizes: Annotated[list, "vocabularies to train; encoding uses the first"] = (32768, 65536)  # pyrefly: ignore
    threads: Annotated[list, "numbers of threads"] = (1, 2)  # pyrefly: ignore
    repeats: Annotated[int, "runs of each, in processes of their own"] = 3
    libraries: Annotated[list, "ours, tiktoken, " + ", ".join(PEERS)] = ("ours", "tiktoken", *PEERS)  # pyrefly: ignore
    peers: Annotated[str, "folder of the peers; '' = <base dir>/bench/peers"] = ""
    install_peers: Annotated[bool, "install the peers into that folder, and stop"] = False
    output: Annotated[str, "folder to write to; '' = <base dir>/bench"] = ""

    def __post_init__(self) -> None:
        if unknown := set(self.libraries) - {"ours", "tiktoken", *PEERS}:
            raise ValueError(f"libraries={unknown}: expected some of ours, tiktoken, {', '.join(PEERS)}")


def read_texts(mb: float) -> list[str]:
    folder = data_dir()
    if folder is None:
        raise UserError("no text to measure with: point NANOCHAT_DATA at a folder with text/*.parquet")
    texts, size = [], 0
    for shard in sorted((folder / "text").glob("*.parquet")):
        for text in pq.read_table(shard, columns=["text"])["text"].to_pylist():
            size += len(text.encode())
            if size > mb * 1e6:
                return texts
            texts.append(text)
    return texts


def make_jobs(cfg: BenchTokenizerConfig, peers: Path, tmp: Path) -> list[dict[str, Any]]:
    """What to measure; writes what the processes read."""
    jobs = []
    sets = (("train", cfg.mb, TRAINERS, cfg.vocab_sizes), ("encode", cfg.encode_mb, ENCODERS, cfg.vocab_sizes[:1]))
    for kind, mb, libraries, vocab_sizes in sets:
        texts = read_texts(mb)
        (tmp / kind).write_bytes(pickle.dumps(texts))
        if kind == "encode" and mb:
            (tmp / "ranks").write_bytes(pickle.dumps(dict(rustbpe.train(texts, int(vocab_sizes[0]), CL100K))))
        for vocab_size in map(int, vocab_sizes if mb else []):
            for threads in map(int, cfg.threads):
                for library in (name for name in libraries if name in cfg.libraries):
                    job = {"kind": kind, "library": library, "vocab_size": vocab_size, "threads": threads}
                    if library in PEERS and not (peers / library).is_dir():
                        print(f"{kind} {library}: not installed, see --install_peers")
                        continue
                    job |= {"peers": str(peers) if library in PEERS else "", "texts": str(tmp / kind)}
                    job |= {
                        "pattern": rustbpe.DEFAULT_PATTERN if kind == "train" else CL100K,
                        "ranks": str(tmp / "ranks"),
                    }
                    jobs.append(job | {"result": str(tmp / f"{kind}_{library}_{vocab_size}_{threads}.npy")})
    return jobs


def run_job(job: dict[str, Any]) -> dict[str, float]:
    env = {**os.environ, "RAYON_NUM_THREADS": str(job["threads"]), "TOKENIZERS_PARALLELISM": "true"}
    command = [sys.executable, "-m", "scripts.bench_tokenizer_worker", json.dumps(job)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{job['kind']} with {job['library']} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(jobs: list[dict[str, Any]], repeats: int) -> list[dict[str, Any]]:
    """One row a job, with the medians over repeats."""
    runs: list[list[dict[str, float]]] = [[] for _ in jobs]
    for repeat in range(repeats):
        for i, job in enumerate(jobs):
            runs[i].append(run_job(job))
            print(f"\r{repeat * len(jobs) + i + 1}/{repeats * len(jobs)} runs", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    rows = []
    for job, done in zip(jobs, runs, strict=True):
        row = {k: job[k] for k in ("kind", "library", "vocab_size", "threads")}
        row |= {k: statistics.median(figures[k] for figures in done) for k in done[0]}
        rows.append(row | {"runs": done} | compare(job, jobs))
    return rows


def compare(job: dict[str, Any], jobs: list[dict[str, Any]]) -> dict[str, Any]:
    """How far a result agrees with ours (training) or with tiktoken's (encoding)."""
    reference = {"train": "ours", "encode": "tiktoken"}[job["kind"]]
    keys = ("kind", "vocab_size", "threads")
    other = next((j for j in jobs if j["library"] == reference and all(j[k] == job[k] for k in keys)), None)
    if other is None:
        return {}
    if job["kind"] == "encode":
        return {"ids_equal": np.array_equal(np.load(job["result"]), np.load(other["result"]))}
    mine, theirs = (set(pickle.loads(Path(j["result"]).read_bytes())) for j in (job, other))
    return {"in_common": len(mine & theirs) / len(theirs)}


def table(rows: list[dict[str, Any]]) -> str:
    """Training and encoding, a line a figure; "ours" is how many times faster ours is."""
    lines = []
    for kind, unit in (("train", "seconds"), ("encode", "warm")):
        titles = {
            "train": "seconds     CPU  MB above text  in common",
            "encode": "   cold    warm  warm CPU  ids equal",
        }
        if any(r["kind"] == kind for r in rows):
            lines += ["", f"{kind:<12} vocabulary  threads  {titles[kind]}    ours"]
        for r in (r for r in rows if r["kind"] == kind):
            keys = ("kind", "vocab_size", "threads")
            ours = next((o[unit] for o in rows if o["library"] == "ours" and all(o[k] == r[k] for k in keys)), 0.0)
            ratio = r[unit] / ours if kind == "train" and ours else ours / r[unit]
            line = f"{r['library']:<12} {r['vocab_size']:10d}  {r['threads']:7d}  "
            if kind == "train":
                line += f"{r['seconds']:7.2f} {r['cpu_seconds']:7.2f}  {r['mb_above_text']:13.0f}"
                line += f"  {r.get('in_common', float('nan')):9.4f}"
            else:
                line += f"{r['cold']:7.1f} {r['warm']:7.1f}  {r['warm_cpu']:8.1f}  {r.get('ids_equal', '?')!s:>9}"
            lines.append(f"{line}  {ratio:5.1f}x")
    return "\n".join(lines[1:])


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars on a log scale: seconds of training, and MB/s of the first and of later passes of encoding."""
    panels = [("train", "seconds", "training, s"), ("encode", "cold", "encoding, first pass, MB/s")]
    panels += [("encode", "warm", "encoding, later passes, MB/s")]
    panels = [panel for panel in panels if any(r["kind"] == panel[0] for r in rows)]
    fig, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False)
    for ax, (kind, unit, title) in zip(axes[0], panels, strict=True):
        chosen = [r for r in rows if r["kind"] == kind]
        libraries = list(dict.fromkeys(r["library"] for r in chosen))
        settings = list(dict.fromkeys((r["vocab_size"], r["threads"]) for r in chosen))
        for i, setting in enumerate(settings):
            values = {r["library"]: r[unit] for r in chosen if (r["vocab_size"], r["threads"]) == setting}
            places = [libraries.index(name) + (i - (len(settings) - 1) / 2) * 0.8 / len(settings) for name in values]
            label = f"{setting[0]} tokens, {setting[1]} threads"
            ax.bar_label(ax.bar(places, values.values(), 0.8 / len(settings), label=label), fmt="%.3g", fontsize=6)
        ax.set(xticks=range(len(libraries)), xticklabels=libraries, title=title, yscale="log")
    axes[0, 0].legend(fontsize=7)
    fig.tight_layout()
    with atomic_write(path) as f:
        fig.savefig(f, format="png", dpi=120)
    plt.close(fig)


def main(argv: list[str]) -> None:
    cfg = load_config(BenchTokenizerConfig, argv)
    peers = Path(cfg.peers or base_dir() / "bench" / "peers").resolve()
    wanted = [f"{name}=={number}" for name, number in PEERS.items()]
    if cfg.install_peers:
        subprocess.run(
            [find_uv(), "pip", "install", "--python", sys.executable, "--target", str(peers), *wanted], check=True
        )
        return
    with tempfile.TemporaryDirectory() as tmp:
        rows = measure(make_jobs(cfg, peers, Path(tmp)), cfg.repeats)
    print(table(rows))
    out = Path(cfg.output or base_dir() / "bench")
    versions = {"ours": version("rustbpe"), "tiktoken": version("tiktoken"), **PEERS}
    facts = {"config": asdict(cfg), "machine": machine_info(), **git_state(), "versions": versions}
    write_json(out / "tokenizer.json", {**facts, "rows": rows})
    plot(rows, out / "tokenizer.png")
    print(f"wrote {out / 'tokenizer.json'} and tokenizer.png")


if __name__ == "__main__":
    run_script(main)
