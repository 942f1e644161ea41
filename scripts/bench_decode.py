"""Decoding speed on random weights: Engine.generate, beside a plain PyTorch model with a KV cache (plain_model.py).

    python -m scripts.bench_decode                      # depth 4, width 256, vocabulary 8192, prompt 256, 64 new tokens
    python -m scripts.bench_decode --block_pattern=TTTM --batches=1,32

Every row of a batch continues one prompt. tokens/s counts decoding alone: rows / time per step after the first. TTFT is
the time to the first ids: the engine reads the prompt once for all rows, the plain model reads it in every row. Repeats
of the variants are interleaved, so that a busy machine slows all of them. Writes <base dir>/bench/decode.{json,png}.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import torch
from torch import Tensor

from nanochat.common import atomic_write, base_dir, git_state, machine_info, run_script, write_json
from nanochat.config import load_config
from nanochat.device import DTYPES, describe_device, pick_device, pick_dtype, synchronize
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from scripts.plain_model import Cache, PlainGPT

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # the backend comes first: no display is needed


@dataclass(frozen=True)
class BenchDecodeConfig:
    """Decoding speed on random weights."""

    depth: Annotated[int, "layers"] = 4
    d_model: Annotated[int, "width"] = 256
    n_head: Annotated[int, "attention heads"] = 2
    vocab_size: Annotated[int, "ids in the vocabulary"] = 8192
    block_pattern: Annotated[list | str | None, "blocks, tiled to depth; None = attention"] = None
    prompt_len: Annotated[int, "ids in the prompt"] = 256
    max_tokens: Annotated[int, "ids to generate per row"] = 64
    batches: Annotated[list, "numbers of rows to measure"] = (1, 8, 32)  # pyrefly: ignore
    dtypes: Annotated[list, "float32, bfloat16"] = ("float32", "bfloat16")  # pyrefly: ignore
    temperature: Annotated[float, "0 = greedy"] = 1.0
    top_k: Annotated[int, "0 = all ids"] = 50
    repeats: Annotated[int, "timed runs of each; one more runs first, untimed"] = 5
    plain: Annotated[bool, "measure the plain PyTorch model too"] = True
    device: Annotated[str, "cpu, cuda, ...; '' = the best there is"] = ""


Steps = Callable[[int], Iterator[Any]]  # batch -> one item per generated id of each row


def engine_steps(cfg: BenchDecodeConfig, dtype: str, device: torch.device) -> Steps:
    """The engine over a GPT of the configured shape, multiplying in dtype."""
    config = GPTConfig(
        n_layer=cfg.depth,
        block_pattern=cfg.block_pattern,
        d_model=cfg.d_model,
        n_head=cfg.n_head,
        vocab_size=cfg.vocab_size,
        seq_len=cfg.prompt_len + cfg.max_tokens,
    )
    model = GPT(config)
    model.init_weights(0)
    model.to(device).eval().set_compute(pick_dtype(dtype, device))
    engine = Engine(model)  # without a tokenizer no id ends a row: every row is max_tokens long
    options = {"max_tokens": cfg.max_tokens, "temperature": cfg.temperature, "top_k": cfg.top_k}
    return lambda batch: engine.generate(prompt_ids(cfg), num_samples=batch, **options)


def plain_steps(cfg: BenchDecodeConfig, device: torch.device) -> Steps:
    """The plain model with its KV cache, sampled as most do it: top-k, softmax, multinomial."""
    model = PlainGPT(cfg.vocab_size, cfg.depth, cfg.n_head, cfg.d_model, cfg.prompt_len + cfg.max_tokens).to(device)

    @torch.inference_mode()
    def steps(batch: int) -> Iterator[list[int]]:
        torch.manual_seed(0)
        cache: Cache = []
        ids = torch.tensor([prompt_ids(cfg)] * batch, device=device)  # (B, T)
        for _ in range(cfg.max_tokens):
            ids = pick(model(ids, cache=cache)[:, -1], cfg)[:, None]  # (B, 1)
            yield ids.flatten().tolist()

    return steps


def pick(logits: Tensor, cfg: BenchDecodeConfig) -> Tensor:
    """(B, V) -> (B,)"""
    if cfg.temperature == 0:
        return logits.argmax(-1)
    values, ids = logits.topk(min(cfg.top_k or cfg.vocab_size, cfg.vocab_size))
    chosen = torch.multinomial(torch.softmax(values / cfg.temperature, -1), 1)
    return ids.gather(-1, chosen).squeeze(-1)


def prompt_ids(cfg: BenchDecodeConfig) -> list[int]:
    return torch.randint(cfg.vocab_size, (cfg.prompt_len,), generator=torch.Generator().manual_seed(0)).tolist()


def time_one(steps: Iterator[Any], device: torch.device) -> tuple[float, float, int]:
    """-> (seconds to the first ids, seconds per step after it, steps)."""
    synchronize(device)
    start = time.perf_counter()
    next(steps)
    first = time.perf_counter()
    n = 1 + sum(1 for _ in steps)
    return first - start, (time.perf_counter() - first) / (n - 1), n


def measure(cfg: BenchDecodeConfig, device: torch.device) -> list[dict[str, Any]]:
    """One row of figures per variant and batch."""
    variants = {f"engine {dtype}": engine_steps(cfg, dtype, device) for dtype in cfg.dtypes}
    if cfg.plain:
        variants["plain float32"] = plain_steps(cfg, device)
    rows = []
    for batch in map(int, cfg.batches):
        timings: dict[str, list[tuple[float, float, int]]] = {name: [] for name in variants}
        for repeat in range(cfg.repeats + 1):
            for name, steps in variants.items():
                timing = time_one(steps(batch), device)
                assert timing[2] == cfg.max_tokens, f"{name} made {timing[2]} ids"
                if repeat > 0:
                    timings[name].append(timing)
        rows += [{"variant": name, "batch": batch, **figures(batch, t)} for name, t in timings.items()]
    return rows


def figures(batch: int, timings: list[tuple[float, float, int]]) -> dict[str, float]:
    """Best and median over repeats."""
    ttft, tpot, _ = zip(*timings, strict=True)
    return {
        "tok_per_s_best": round(batch / min(tpot), 1),
        "tok_per_s_median": round(batch / statistics.median(tpot), 1),
        "tpot_ms_median": round(1e3 * statistics.median(tpot), 3),
        "ttft_ms_median": round(1e3 * statistics.median(ttft), 2),
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["variant            batch   tok/s best  tok/s median   TPOT ms   TTFT ms"]
    for r in rows:
        speed = f"{r['tok_per_s_best']:12.0f} {r['tok_per_s_median']:13.0f}"
        lines.append(
            f"{r['variant']:<18} {r['batch']:5d} {speed} {r['tpot_ms_median']:9.2f} {r['ttft_ms_median']:9.1f}"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Bars of the median tokens/s: a group per batch size, a colour per variant."""
    variants = list(dict.fromkeys(r["variant"] for r in rows))
    batches = list(dict.fromkeys(r["batch"] for r in rows))
    fig, axes = plt.subplots(figsize=(7, 4))
    for i, variant in enumerate(variants):
        speed = [r["tok_per_s_median"] for r in rows if r["variant"] == variant]
        places = [b + (i - (len(variants) - 1) / 2) * 0.8 / len(variants) for b in range(len(batches))]
        axes.bar_label(axes.bar(places, speed, 0.8 / len(variants), label=variant), fmt="%.0f", fontsize=7)
    axes.set(
        xticks=range(len(batches)), xticklabels=batches, xlabel="rows", ylabel="tokens/s", title=title, yscale="log"
    )
    axes.legend()
    fig.tight_layout()
    with atomic_write(path) as f:
        fig.savefig(f, format="png", dpi=120)
    plt.close(fig)


def main(argv: list[str]) -> None:
    cfg = load_config(BenchDecodeConfig, argv)
    device = pick_device(cfg.device)
    print(describe_device(device, DTYPES["float32"]))
    rows = measure(cfg, device)
    print(table(rows))
    out = base_dir() / "bench"
    write_json(out / "decode.json", {"config": asdict(cfg), "machine": machine_info(), **git_state(), "rows": rows})
    plot(rows, f"decoding, depth {cfg.depth}, width {cfg.d_model}, {device.type}", out / "decode.png")
    print(f"wrote {out / 'decode.json'} and decode.png")


if __name__ == "__main__":
    run_script(main)
