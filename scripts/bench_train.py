"""Training speed and loss beside a plain PyTorch model of the same shape, in one run, step by step in turn.

    python -m scripts.bench_train                      # depth 4, width 256, length 512, 4,096 tokens a step, 120 steps
    python -m scripts.bench_train --steps=20 --dtype=float32

The plain model is scripts/plain_model.py: float32, eager, torch AdamW, SDPA. Both see the same batches and are judged
on the same fixed windows of validation text ("head": starts of long documents, "stream": anywhere).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Annotated, Any, Literal

import matplotlib
import torch

from nanochat.common import base_dir, git_state, keep_freed_memory, machine_info, run_script, write_json
from nanochat.config import load_config
from nanochat.dataloader import Batch, PackedLoader, document_index, val_windows
from nanochat.dataset import shard_paths
from nanochat.device import describe_device, pick_device, pick_dtype
from nanochat.loss_eval import evaluate_bpb
from nanochat.optim import lr_schedule, muon_momentum
from nanochat.tokenizer import Tokenizer
from nanochat.train import compile_model
from scripts.base_train import BaseTrainConfig, build_model
from scripts.plain_model import PlainGPT

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclass(frozen=True)
class BenchTrainConfig(BaseTrainConfig):
    """Compare training with a plain PyTorch model. Every key of base_train, and:"""

    depth: Annotated[int, "layers"] = 4
    max_seq_len: Annotated[int, "context length"] = 512
    device_batch_size: Annotated[int, "rows"] = 8
    total_batch_size: Annotated[int, "tokens per step"] = 4096
    softcap: Annotated[float, "cap of the logits; 0 = none"] = 0.0
    eval_tokens: Annotated[int, "tokens of validation text of each kind"] = 65536
    steps: Annotated[int, "training steps of each model"] = 120
    plain_lr: Annotated[float, "AdamW of the plain model"] = 3e-3
    only: Annotated[Literal["both", "ours", "plain"], "which models run"] = "both"


@dataclass
class Entry:
    """One contestant: what it does in a step, and what was measured."""

    name: str
    step: Callable[[Batch, int], float]
    model: torch.nn.Module
    ours: bool  # and so keeps packed documents apart
    seconds: list[float]
    losses: list[float]


def ours(cfg: BenchTrainConfig, vocab_size: int, device: torch.device, dtype: torch.dtype) -> Entry:
    model, kernels = build_model(cfg.gpt_config(vocab_size), device, dtype, cfg.kernels, cfg.seed)
    optimizer = cfg.make_optimizer(model, dtype)
    print(f"ours: {kernels}, {str(dtype)[6:]}, {model.n_params()['total'] / 1e6:.2f}M parameters")

    forward = compile_model(model) if cfg.compile else model

    def step(batch: Batch, i: int) -> float:
        loss = forward(batch.x, batch.y, doc=batch.doc if cfg.doc_mask else None, loss_reduction="sum")
        loss.backward()
        optimizer.gather(batch.tokens, cfg.grad_clip)
        scale = lr_schedule(i / cfg.steps, cfg.warmup_ratio, cfg.warmdown_ratio, cfg.final_lr_frac)
        optimizer.step(scale, muon_momentum(i))
        optimizer.zero_grad()
        return loss.item() / batch.tokens

    return Entry("nanochat-turbo", step, model, cfg.doc_mask, [], [])


def plain(cfg: BenchTrainConfig, vocab_size: int, device: torch.device) -> Entry:
    torch.manual_seed(cfg.seed)
    shape = cfg.gpt_config(vocab_size)
    model = PlainGPT(vocab_size, shape.n_layer, shape.n_head, shape.d_model, shape.seq_len).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.plain_lr, betas=(0.9, 0.95), weight_decay=0.1)
    print(
        f"plain: eager float32, AdamW {cfg.plain_lr}, "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters"
    )

    def step(batch: Batch, i: int) -> float:
        for group in optimizer.param_groups:
            group["lr"] = cfg.plain_lr * lr_schedule(i / cfg.steps, 0.05, cfg.warmdown_ratio, cfg.final_lr_frac)
        loss = model(batch.x, batch.y)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return Entry("plain PyTorch", step, model, False, [], [])


class _Nats(torch.nn.Module):
    """Gives the plain model the (B, T) losses that evaluate_bpb asks for."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor, y: torch.Tensor, loss_reduction: str, doc: Any = None) -> torch.Tensor:
        logits = self.model(x).flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, y.flatten(), ignore_index=-1, reduction="none").view_as(y)


def main(argv: list[str]) -> None:
    cfg = load_config(BenchTrainConfig, argv)
    tokenizer = Tokenizer.load()
    device = pick_device(cfg.device)
    dtype = pick_dtype(cfg.dtype, device)
    print(describe_device(device, dtype))
    entries = [ours(cfg, tokenizer.vocab_size, device, dtype)] if cfg.only != "plain" else []
    entries += [plain(cfg, tokenizer.vocab_size, device)] if cfg.only != "ours" else []
    with PackedLoader(
        shard_paths("train"), tokenizer, cfg.device_batch_size, cfg.max_seq_len, device=device
    ) as batches:
        for i in range(cfg.steps):
            batch = next(batches)
            for entry in entries:
                keep_freed_memory(entry.ours)  # the plain model's users do not import nanochat
                start = time.perf_counter()
                entry.losses.append(entry.step(batch, i))
                entry.seconds.append(time.perf_counter() - start)
            if (i + 1) % 20 == 0:
                now = ", ".join(
                    f"{e.name} {e.losses[-1]:.3f} ({1e3 * median(e.seconds[-20:]):.0f} ms)" for e in entries
                )
                print(f"step {i + 1}: {now}", flush=True)
    rows = [figures(cfg, entry, tokenizer) for entry in entries]
    table(rows)
    out = base_dir() / "bench"
    result = {"machine": machine_info(), "git": git_state(), "torch": torch.__version__, "rows": rows}
    write_json(out / "train.json", result)
    plot(entries, rows, out / "train.png")
    print(f"wrote {out / 'train.json'} and train.png")


def figures(cfg: BenchTrainConfig, entry: Entry, tokenizer: Tokenizer) -> dict[str, Any]:
    """Median speed, and bits per byte on both kinds of fixed windows."""
    bpb = {}
    for kind in ("head", "stream"):
        x, y = val_windows(shard_paths("val"), tokenizer, cfg.max_seq_len, cfg.eval_tokens, kind)
        model = entry.model if entry.name == "nanochat-turbo" else _Nats(entry.model)
        doc = document_index(x, tokenizer.bos_id) if entry.ours else None
        bpb[kind] = evaluate_bpb(model, x, y, tokenizer.token_bytes, cfg.device_batch_size, doc)
    dt = median(entry.seconds[2:] or entry.seconds)
    tokens = cfg.device_batch_size * cfg.max_seq_len
    return {
        "name": entry.name,
        "tokens_per_s": tokens / dt,
        "best_tokens_per_s": tokens / min(entry.seconds),
        "ms_per_step": 1e3 * dt,
        "steps": cfg.steps,
        "head_bpb": bpb["head"],
        "stream_bpb": bpb["stream"],
    }


def table(rows: list[dict[str, Any]]) -> None:
    print(f"\n{'':16}{'tok/s':>9}{'best':>9}{'ms/step':>9}{'head bpb':>10}{'stream bpb':>12}{'ratio':>8}")
    for r in rows:
        ratio = f"{r['tokens_per_s'] / rows[-1]['tokens_per_s']:.2f}x"
        print(
            f"{r['name']:16}{r['tokens_per_s']:9.0f}{r['best_tokens_per_s']:9.0f}{r['ms_per_step']:9.0f}"
            f"{r['head_bpb']:10.3f}{r['stream_bpb']:12.3f}{ratio:>8}"
        )


def plot(entries: list[Entry], rows: list[dict[str, Any]], path: Any) -> None:
    """Loss against seconds of training."""
    fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for entry, row in zip(entries, rows, strict=True):
        seconds = torch.tensor(entry.seconds).cumsum(0)
        ax.plot(seconds, entry.losses, label=f"{entry.name}: {row['tokens_per_s']:,.0f} tokens/s")
    ax.set(xlabel="seconds of training", ylabel="training loss (nats per token)", title="Equal batches, equal steps")
    ax.legend()
    fig.savefig(path, dpi=110)


if __name__ == "__main__":
    run_script(main)
