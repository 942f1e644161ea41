"""Architectures side by side: training at an equal budget, cost over the context length, associative recall.

    python -m scripts.bench_arch                        # the tiny configs, all parts
    python -m scripts.bench_arch configs/tiny_transformer.py configs/tiny_hybrid.py --budget=seconds --amount=60
    python -m scripts.bench_arch --parts=length --lengths=256,1024,4096     # this part anew, the others stay

Every .py file is one architecture, every --key=value holds for all of them. Parts:
train: the same batches for all, an equal budget, each matrix rate once; the best rate again with other seeds.
length: random weights; prefill, decode with contexts of their own, state; where each gets cheaper than the first one.
recall, needle: toy models of each architecture's blocks on tasks/recall.py.
Writes <base dir>/bench/<out>.json after each part, then tables and pictures from it (bench_arch_report.py).
"""

import ctypes
import dataclasses
import gc
import itertools
import json
import math
import multiprocessing
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import psutil
import torch
from torch import Tensor

from nanochat.blocks import entry_names
from nanochat.common import REPO_DIR, base_dir, git_state, machine_info, read_json, run_script, write_json
from nanochat.config import UserError, load_config
from nanochat.dataloader import PackedLoader, document_index, val_windows
from nanochat.dataset import shard_paths
from nanochat.device import describe_device, pick_device, pick_dtype, synchronize
from nanochat.gpt import GPT, ModelState
from nanochat.loss_eval import evaluate_bpb
from nanochat.optim import lr_schedule, muon_momentum
from nanochat.report import log_stage
from nanochat.tokenizer import Tokenizer
from nanochat.train import compile_model, memory_advice
from scripts.base_train import BaseTrainConfig, build_model
from scripts.bench_arch_report import compact, headline, plots, tables
from tasks.recall import Toy, learn

TINY = ("tiny_transformer", "tiny_mamba", "tiny_mamba2", "tiny_gdn", "tiny_hybrid")
AMOUNTS = {"tokens": 1e5, "flops": 4e12, "seconds": 20.0}  # about 20 s a run of a tiny config on two cores
# Toy models: small enough for a run of a minute on one core. Blocks keep what is not named here from their config.
TOY = {
    "n_layer": 2, "d_model": 64, "n_head": 2, "n_kv_head": 0, "vocab_size": 64, "softcap": 0.0, "window_pattern": "L",
    "mamba_d_state": 16, "mamba2_d_state": 16, "mamba2_head_dim": 32, "mamba2_n_group": 1, "gdn_head_dim": 16,
}  # fmt: skip
PIECE = 2048  # tokens of one forward of a long prefill


@dataclass(frozen=True)
class BenchArchConfig(BaseTrainConfig):
    """Compare architectures, one config file each. Every key of base_train, for all of them, and:"""

    budget: Annotated[Literal["tokens", "flops", "seconds"], "what is equal in training"] = "tokens"
    amount: Annotated[float, "of the budget, for each run; 0 = 1e5 tokens, 4e12 FLOPs or 20 seconds"] = 0.0
    lrs: Annotated[list, "rates of the matrices to try"] = (0.01, 0.02, 0.04)  # pyrefly: ignore
    seeds: Annotated[int, "runs at the best rate, the one of the sweep among them; of a toy model too"] = 1
    eval_tokens: Annotated[int, "tokens of validation text, fixed stream windows"] = 65536
    parts: Annotated[list, "train, length, recall, needle"] = ("train", "length", "recall", "needle")  # pyrefly: ignore
    lengths: Annotated[list, "context lengths"] = (256, 1024, 4096, 16384, 32768)  # pyrefly: ignore
    batches: Annotated[list, "rows that decode, each with a context of its own"] = (1, 8)  # pyrefly: ignore
    decode_steps: Annotated[int, "timed steps at each length, the median counts"] = 8
    cell_seconds: Annotated[float, "a prefill may take; longer contexts are then left out"] = 60.0
    vocab_size: Annotated[int, "ids of the models of `length`; 0 = those of the tokenizer"] = 0
    toy_steps: Annotated[int, "training steps of a toy model; fewer when it has solved its task"] = 1000
    toy_lrs: Annotated[list, "rates of its matrices to try"] = (0.02, 0.005)  # pyrefly: ignore
    recall_pairs: Annotated[int, "pairs of key and value"] = 16
    recall_len: Annotated[int, "tokens of a sequence of recall"] = 64
    needle_lens: Annotated[list, "tokens around a needle; trained on the first"] = (64, 128, 256, 512)  # pyrefly: ignore
    workers: Annotated[int, "processes for toy models, a thread each; 0 = one per core, on a GPU one"] = 0
    out: Annotated[str, "name of the files written"] = "arch"

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [p for p in self.parts if p not in PARTS]
        if unknown or not self.parts:
            raise ValueError(f"parts={','.join(unknown) or 'none'}: expected some of {','.join(PARTS)}")
        for key, kind in LISTS.items():
            try:
                values = [kind(v) for v in getattr(self, key)]
            except ValueError:
                values = []
            if not values or min(values) <= 0:
                raise ValueError(f"{key}={getattr(self, key)}: expected numbers above 0, like --{key}=1,8")
        least = {k: getattr(self, k) for k in ("seeds", "decode_steps", "cell_seconds", "toy_steps")}
        if min(least.values()) <= 0 or self.amount < 0 or self.workers < 0:
            raise ValueError(f"{least}, amount={self.amount}, workers={self.workers}: expected > 0, the last two >= 0")

    def numbers(self, key: str) -> list[Any]:
        """The numbers of a list, which the command line gives as text."""
        return [LISTS[key](v) for v in getattr(self, key)]


LISTS = {"lrs": float, "toy_lrs": float, "lengths": int, "batches": int, "needle_lens": int}
Archs = dict[str, BenchArchConfig]
Rows = list[dict[str, Any]]


def read_argv(argv: list[str]) -> tuple[BenchArchConfig, Archs]:
    """-> the keys of the bench, and the configuration of each file under the file's name."""
    files = [a for a in argv if a.endswith(".py") and not a.startswith("-")]
    keys = [a for a in argv if a not in files]
    cfg = load_config(BenchArchConfig, keys)
    files = files or [str(p) for p in (REPO_DIR / "configs" / f"{name}.py" for name in TINY) if p.is_file()]
    archs = {Path(f).stem: load_config(BenchArchConfig, [f, *keys]) for f in files}
    if len(archs) < len(files):
        raise UserError(f"two config files have one name ({', '.join(files)}): rename one, tables go by it")
    return cfg, archs


# ---- training at an equal budget ----


def train_part(cfg: BenchArchConfig, archs: Archs) -> Rows:
    """A row per run: architecture x rate, then the further seeds of the best rate. bpb is None where it diverged."""
    if len(found := {c.max_seq_len for c in archs.values()}) > 1:
        raise UserError(
            f"max_seq_len differs ({', '.join(map(str, sorted(found)))}), so bits per byte cannot be compared: "
            f"give one for all, --max_seq_len={min(found)}"
        )
    tokenizer = Tokenizer.load()
    shard_paths("train")  # an error now, not after the tokenizer
    x, y = val_windows(shard_paths("val"), tokenizer, found.pop(), cfg.eval_tokens)
    rows: Rows = []
    for name, arch in archs.items():

        def run(lr: float, seed: int, name: str = name, arch: BenchArchConfig = arch) -> dict[str, Any]:
            change = {"matrix_lr": lr, "seed": seed, "budget": cfg.budget, "amount": cfg.amount}
            row = {"arch": name, **train_once(dataclasses.replace(arch, **change), tokenizer, x, y)}
            bpb = "diverged" if row["bpb"] is None else f"stream bpb {row['bpb']:.4f}"
            speed = f"{row['tokens']:,} tokens, {row['seconds']:.0f} s, {row['tokens_per_s']:,.0f} tokens/s"
            print(f"train: {name}, matrix_lr {lr:g}, seed {seed}: {bpb}, {speed}", flush=True)
            return row

        sweep = [run(lr, arch.seed) for lr in cfg.numbers("lrs")]
        best = min(sweep, key=lambda r: math.inf if r["bpb"] is None else r["bpb"])["lr"]
        rows += sweep + [run(best, arch.seed + i) for i in range(1, cfg.seeds)]
    return rows


def train_once(cfg: BenchArchConfig, tokenizer: Tokenizer, x: Tensor, y: Tensor) -> dict[str, Any]:
    """One model until the budget is spent. x, y: (N, T) validation windows. Its clock runs in steps, with loading."""
    device = pick_device(cfg.device)
    dtype = pick_dtype(cfg.dtype, device)
    held = start_peak(device)
    model, kernels = build_model(cfg.gpt_config(tokenizer.vocab_size), device, dtype, cfg.kernels, cfg.seed)
    optimizer, accum, flops = cfg.make_optimizer(model, dtype), cfg.grad_accum(1), model.flops_per_token()
    forward = compile_model(model) if cfg.compile else model
    amount, tokens, dts, curve, loss = cfg.amount or AMOUNTS[cfg.budget], 0, [], [], 0.0
    loader = PackedLoader(
        shard_paths("train"), tokenizer, cfg.device_batch_size, cfg.max_seq_len, device=device, buffer_tokens=2**18
    )
    with loader, memory_advice(cfg.device_batch_size, cfg.max_seq_len):
        batches = itertools.chain([next(loader)], loader)  # the first waits for the queue, nobody's fault
        while (progress := spent(cfg.budget, tokens, tokens * flops, sum(dts)) / amount) < 1 and math.isfinite(loss):
            start, total, targets = time.perf_counter(), torch.zeros((), device=device), 0
            for batch in itertools.islice(batches, accum):
                doc = batch.doc if cfg.doc_mask else None
                part = forward(batch.x, batch.y, doc=doc, loss_reduction="sum")
                part.backward()
                total, targets, tokens = total + part.detach(), targets + batch.tokens, tokens + batch.x.numel()
            optimizer.gather(targets, cfg.grad_clip)
            scale = lr_schedule(progress, cfg.warmup_ratio, cfg.warmdown_ratio, cfg.final_lr_frac)
            optimizer.step(scale, muon_momentum(len(dts)))
            optimizer.zero_grad()
            loss = total.item() / max(targets, 1)
            dts.append(time.perf_counter() - start)
            curve.append([tokens, round(sum(dts), 3), round(loss, 4) if math.isfinite(loss) else None])
    peak = None if held is None else peak_bytes(device) - held
    bpb = bits_per_byte(cfg, model, tokenizer, x, y) if math.isfinite(loss) else math.nan
    return {
        "lr": cfg.matrix_lr, "seed": cfg.seed, "bpb": bpb if math.isfinite(bpb) else None, "tokens": tokens,
        "seconds": sum(dts), "flops": tokens * flops, "flops_per_token": flops, "parameters": model.n_params(),
        "tokens_per_s": tokens / len(dts) / statistics.median(dts[2:] or dts), "peak_bytes": peak,
        "kernels": kernels, "dtype": str(dtype)[6:], "curve": curve[:: -(-len(curve) // 100)],
    }  # fmt: skip


def spent(budget: str, tokens: int, flops: int, seconds: float) -> float:
    return {"tokens": tokens, "flops": flops, "seconds": seconds}[budget]


def bits_per_byte(cfg: BenchArchConfig, model: GPT, tokenizer: Tokenizer, x: Tensor, y: Tensor) -> float:
    """Of the stream windows x, y (N, T)."""
    x, y = x.to(model.device), y.to(model.device)
    doc = document_index(x, tokenizer.bos_id) if cfg.doc_mask else None
    return evaluate_bpb(model.eval(), x, y, tokenizer.token_bytes, cfg.device_batch_size, doc)


def start_peak(device: torch.device) -> int | None:
    """Bytes held now; the high-water mark starts here. None where this machine does not tell."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # give back what earlier runs left, or it would count for free
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
    except OSError:
        return None
    return psutil.Process().memory_info().rss


def peak_bytes(device: torch.device) -> int:
    """The high-water mark since start_peak."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


# ---- cost over the context length ----


def length_part(cfg: BenchArchConfig, archs: Archs) -> Rows:
    """A row per architecture and length: prefill_ms, decode_ms_<rows> per step, state_bytes; or why it was left out."""
    vocab_size = cfg.vocab_size or Tokenizer.load().vocab_size
    rows: Rows = []
    for name, arch in archs.items():
        device = pick_device(arch.device)
        dtype = pick_dtype(arch.dtype, device)
        model, kernels = build_model(arch.gpt_config(vocab_size), device, dtype, arch.kernels, arch.seed)
        model.eval()
        longer = ""  # why longer contexts are left out
        for length in sorted(cfg.numbers("lengths")):
            row: dict[str, Any] = {"arch": name, "length": length, "kernels": kernels, "dtype": str(dtype)[6:]}
            row |= {"left_out": longer} if longer else measure(cfg, model, length)
            if "left_out" in row:
                longer = longer or row["left_out"]
            elif row["prefill_ms"] / 1e3 > cfg.cell_seconds / 2:
                longer = f"prefill of {length:,} tokens took {row['prefill_ms'] / 1e3:.0f} s"
            rows.append(row)
            figures = [f"{k} {v:,.6g}" for k, v in row.items() if k.startswith(("prefill", "decode", "state_bytes"))]
            print(f"length: {name}, {length:,}: {row.get('left_out') or ', '.join(figures)}", flush=True)
    return rows


@torch.inference_mode()
def measure(cfg: BenchArchConfig, model: GPT, length: int) -> dict[str, Any]:
    """One cell. Prefill counts the best of up to 3 that take 1 s together, decode the median step."""
    room = length + cfg.decode_steps + 1
    ids = torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    ids, times, state = ids.to(model.device), [], model.init_state(1, room)
    prefill(model, ids[:, :PIECE], state, cfg.cell_seconds)  # caches, tables, casts
    while len(times) < 3 and sum(times) < 1.0:
        state = model.init_state(1, room)
        times.append(prefill(model, ids, state, cfg.cell_seconds))
        if math.isinf(times[-1]):
            return {"left_out": f"prefill of {length:,} tokens passed {cfg.cell_seconds:g} s"}
    held = model.init_state(1, length).bytes()
    row = {"prefill_ms": 1e3 * min(times), "state_bytes": held, "state_bytes_gpu": model.state_bytes(length)}
    for batch in cfg.numbers("batches"):
        if 2 * batch * held < free_bytes(model.device):  # the rows, and what a step copies
            row[f"decode_ms_{batch}"] = 1e3 * decode(model, ids, state, batch, cfg.decode_steps)
    return row


def prefill(model: GPT, ids: Tensor, state: ModelState, limit_s: float) -> float:
    """Read ids (1, T) into the state by pieces -> seconds, inf once the limit is passed."""
    synchronize(model.device)
    start = time.perf_counter()
    for piece in ids.split(PIECE, dim=1):
        model(piece, state=state, last_only=True)
        synchronize(model.device)
        if time.perf_counter() - start > limit_s:
            return math.inf
    return time.perf_counter() - start


def decode(model: GPT, ids: Tensor, state: ModelState, batch: int, steps: int) -> float:
    """Seconds of the median step of `batch` rows, each with its own copy of the state; one step more runs untimed."""
    state = state.select(torch.zeros(batch, dtype=torch.long))
    last, times = ids[:, -1:].expand(batch, 1), []
    for _ in range(steps + 1):
        synchronize(model.device)
        start = time.perf_counter()
        model(last, state=state, last_only=True)
        synchronize(model.device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


# ---- associative recall ----


def recall_part(cfg: BenchArchConfig, archs: Archs) -> Rows:
    return learn_all(cfg, archs, cfg.recall_pairs, [cfg.recall_len])


def needle_part(cfg: BenchArchConfig, archs: Archs) -> Rows:
    return learn_all(cfg, archs, 0, cfg.numbers("needle_lens"))


def learn_all(cfg: BenchArchConfig, archs: Archs, n_pair: int, lens: list[int]) -> Rows:
    """A row per architecture, seed and rate tried: accuracy on held-out sequences of each length."""
    device = pick_device(cfg.device)
    lrs = tuple(cfg.numbers("toy_lrs"))
    toys = {}
    for name, arch in archs.items():
        shape = {**TOY, "block_pattern": toy_blocks(arch), "seq_len": lens[0]}
        config = dataclasses.replace(arch.gpt_config(TOY["vocab_size"]), **shape)  # pyrefly: ignore
        for seed in range(cfg.seeds):
            toys[name, seed] = Toy(config, n_pair, cfg.toy_steps, 32, lrs, seed, tuple(lens), device=str(device))
    rows: Rows = []
    workers = cfg.workers or (torch.get_num_threads() if device.type == "cpu" else 1)
    for (name, seed), found in zip(toys, each(learn, list(toys.values()), workers), strict=True):
        blocks = compact(toy_blocks(archs[name]))
        rows += [{"arch": name, "blocks": blocks, **row} for row in found]
        for row in found:
            accuracy = ", ".join(f"{T}: {a:.3f}" for T, a in row["accuracy"].items())
            task = f"mqar of {n_pair} pairs" if n_pair else "needle"
            print(
                f"{task}: {name} ({blocks}), lr {row['lr']:g}, seed {seed}: accuracy {accuracy}, {row['steps']} steps, "
                f"{row['seconds']:.0f} s",
                flush=True,
            )
    return rows


def toy_blocks(cfg: BenchArchConfig) -> list[str]:
    """Two mixers that stand for a stack: its one kind twice, or its first recurrence and then attention."""
    kinds = list(dict.fromkeys(n for n in entry_names(cfg.block_pattern, cfg.depth) if n != "mlp"))
    others = [k for k in kinds if k != "attn"]
    if not others:
        return ["attn", "attn"]
    return [others[0], "attn" if "attn" in kinds else others[-1]]


def each(f: Callable[[Any], Any], items: list[Any], workers: int) -> Any:
    """map in processes of one thread each, results in order; one worker is this process."""
    if min(workers, len(items)) == 1:
        yield from map(f, items)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(f, items)


# ---- putting it together ----

PARTS = {"train": train_part, "length": length_part, "recall": recall_part, "needle": needle_part}


def earlier(path: Path, architectures: dict[str, Any]) -> dict[str, Any]:
    """The parts an earlier run wrote, if it was about the same architectures."""
    if not path.is_file():
        return {}
    found = read_json(path, "earlier results")
    if found.get("architectures") != json.loads(json.dumps(architectures)):
        print(f"{path} is of other architectures and will be overwritten (--out=NAME keeps it)")
        return {}
    return found["parts"]


def main(argv: list[str]) -> None:
    cfg, archs = read_argv(argv)
    device = pick_device(cfg.device)
    print(describe_device(device, pick_dtype(cfg.dtype, device)))
    path = base_dir() / "bench" / f"{cfg.out}.json"
    shapes = {name: {**dataclasses.asdict(arch.gpt_config(1)), "vocab_size": 0} for name, arch in archs.items()}
    results: dict[str, Any] = {"architectures": shapes, "parts": {}}
    for name, arch in archs.items():
        print(f"{name}: {compact(entry_names(arch.block_pattern, arch.depth))}, width {shapes[name]['d_model']}")
    parts = earlier(path, shapes)
    for part in [p for p in PARTS if p in cfg.parts]:
        start, command = time.perf_counter(), shlex.join(["python", *sys.orig_argv[1:]])
        about = {"command": command, "git": git_state(), "machine": machine_info(), "torch": torch.__version__}
        about |= {"device": describe_device(device, pick_dtype(cfg.dtype, device)), "amount": cfg.amount}
        about |= {"budget": cfg.budget, "threads": torch.get_num_threads()}
        about["amount"] = cfg.amount or AMOUNTS[cfg.budget]
        rows = PARTS[part](cfg, archs)
        parts[part] = {**about, "wall_s": time.perf_counter() - start, "rows": rows}
        results["parts"] = {p: parts[p] for p in PARTS if p in parts}
        write_json(path, results)
    text, pictures = tables(results), plots(results, path.parent, cfg.out)
    print(f"\n{text}")
    seconds = sum(p["wall_s"] for p in results["parts"].values())
    log_stage("architectures", headline(results), text=text, plots=pictures, duration_s=seconds)
    print(f"wrote {path} and {', '.join(p.name for p in pictures)}")


if __name__ == "__main__":
    run_script(main)
