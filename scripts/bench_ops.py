"""Speed of one layer on a CPU, forward and backward, ours beside other libraries', in one run; then of decoding.

    python -m scripts.bench_ops --install_peers      # once: fetch the peers into <base dir>/bench/peers_ops
    python -m scripts.bench_ops                      # every layer, and the peers that are installed; 10 minutes
    python -m scripts.bench_ops --peers=none --layers=attn,mlp,mamba --growth

A call takes 2,048 tokens, or one longer sequence. Calls go round the layers in turn, so that a busy machine slows all
of them; figures are medians. "mamba torch" is the mamba block without its native kernel (kernels=reference). Ours
include the norm before the layer and the residual sum, the peers' do not; the sizes are those of our blocks, as the
parameter counts show. Peers run with glibc's own memory thresholds, ours with nanochat's. With --dtype=bfloat16 ours
multiply in bfloat16 and the peers run under autocast.
"+MB" is the peak of resident memory in a first call over what was held before (Linux). "x ours" compares with our layer
of the same kind. transformers' Mamba without mambapy stops at length 512: its backward is quadratic in the length.
Writes <base dir>/bench/ops.{json,png}.
"""

import ctypes
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import torch
import torch.nn as nn
from matplotlib.figure import Figure
from torch import Tensor

from nanochat import kernels as kernels_module
from nanochat.blocks import Block, BlockState, Context, GPTConfig, build
from nanochat.common import atomic_write, base_dir, git_state, keep_freed_memory, machine_info, run_script, write_json
from nanochat.config import UserError, load_config
from nanochat.device import DTYPES, describe_device
from nanochat.kernels import Kernels
from nanochat.layers import Rotary, init_uniform, set_compute_dtype
from nanochat.plots import BLUE, DPI, GREEN, GREY, ORANGE
from scripts.peer_layers import PACKAGES, PEERS, install_peers

CPU = torch.device("cpu")
HEAD_DIM = 128  # of attention
OURS = {  # row -> (block, kernels)
    "attn": ("attn", "auto"),
    "mlp": ("mlp", "auto"),
    "mamba": ("mamba", "auto"),
    "mamba torch": ("mamba", "reference"),
    "mamba2": ("mamba2", "auto"),
    "gdn": ("gdn", "auto"),
}
COLOURS = {"attn": "black", "mlp": GREY, "mamba": BLUE, "mamba2": ORANGE, "gdn": GREEN}
EXTRA_LENGTH = 16384  # of --growth
DECODE_SECONDS = 0.02  # one timing of a decoding step repeats it for about so long

Row = dict[str, Any]


@dataclass(frozen=True)
class BenchOpsConfig:
    """Speed of one layer, beside other libraries."""

    d_models: Annotated[list, "widths"] = (256, 512)  # pyrefly: ignore
    lengths: Annotated[list, "sequence lengths, powers of two"] = (256, 512, 1024, 2048, 4096, 8192)  # pyrefly: ignore
    tokens: Annotated[int, "tokens per call; a longer sequence is a call of its own"] = 2048
    layers: Annotated[list, "ours: " + ", ".join(OURS)] = tuple(OURS)  # pyrefly: ignore
    peers: Annotated[list, "none, all, or some of " + ", ".join(PACKAGES) + "; default: what is installed"] = ()  # pyrefly: ignore
    dtype: Annotated[Literal["float32", "bfloat16"], "what matrices multiply in"] = "float32"
    threads: Annotated[int, "threads of torch"] = 1
    repeats: Annotated[int, "timed calls of each, after one that is not"] = 5
    seconds: Annotated[float, "a layer is called no more after so long; one whose first call takes it keeps that"] = 3.0
    growth: Annotated[bool, f"measure ours at length {EXTRA_LENGTH} too"] = False
    contexts: Annotated[list, "tokens seen before a decoding step"] = (256, 1024, 4096, 16384)  # pyrefly: ignore
    decode_batch: Annotated[int, "sequences in a decoding step"] = 8
    peers_dir: Annotated[str, "folder of the peers; '' = <base dir>/bench/peers_ops"] = ""
    install_peers: Annotated[bool, "install the peers into that folder, and stop"] = False

    def __post_init__(self) -> None:
        for key, given, known in (("layers", self.layers, OURS), ("peers", self.peers, [*PACKAGES, "all", "none"])):
            if unknown := set(given) - set(known):
                raise ValueError(f"{key}={','.join(sorted(unknown))}: expected some of {', '.join(known)}")
        if any(int(n) < 1 or int(n) & (int(n) - 1) for n in self.lengths):
            raise ValueError(f"lengths={list(self.lengths)}: expected powers of two, like 256,512")
        if min(self.threads, self.repeats, self.tokens, self.decode_batch) < 1:
            raise ValueError("threads, repeats, tokens and decode_batch must be at least 1")


@dataclass
class Layer:
    """One row of the table: a module and how to call it, (B, T, D) -> (B, T, D)."""

    name: str
    kind: str  # the block it is, or is compared with
    module: nn.Module
    call: Callable[[Tensor], Tensor]
    ours: bool
    max_len: float = math.inf
    kernels: Kernels = field(default_factory=Kernels)

    @property
    def n_params(self) -> int:
        return sum(p.numel() for p in self.module.parameters())


def shape(d_model: int, mlp: bool | None = False) -> GPTConfig:
    """One layer of this width, by default a mixer without an MLP."""
    return GPTConfig(n_layer=1, d_model=d_model, n_head=max(1, d_model // HEAD_DIM), mlp=mlp)


def our_layer(name: str, d_model: int, dtype: torch.dtype) -> Layer:
    kind, choice = OURS[name]
    config = shape(d_model, None if kind == "mlp" else False)
    block = build(kind, config, 0)
    generator = torch.Generator().manual_seed(0)
    block.init_weights(generator)
    for p in block.parameters():  # a zero output matrix hands zero gradients to what stands before it
        if p.ndim == 2 and not p.any():
            init_uniform(p, generator)
    set_compute_dtype(block, dtype)
    kernels = kernels_module.choose(choice, CPU, block.KERNELS)
    rotary = Rotary(config.head_dim, config.rope_base)

    def call(x: Tensor) -> Tensor:
        return block(x, context(x, rotary, kernels, dtype))

    return Layer(name, kind, block, call, True, kernels=kernels)


def context(x: Tensor, rotary: Rotary, kernels: Kernels, dtype: torch.dtype, pos: int | None = None) -> Context:
    """What the model would give a block with x (B, T, D), every row of which has seen pos tokens (None: no state)."""
    B, T, _ = x.shape
    first = pos or 0
    cos, sin = (t[None, first : first + T, None] for t in rotary.tables(first + T, x))  # (1, T, 1, K/2)
    seen = None if pos is None else torch.full((B,), pos)
    return Context(torch.zeros(B, T, dtype=torch.long), cos, sin, kernels, dtype, pos=seen)


def find_peers(cfg: BenchOpsConfig) -> list[str]:
    """The rows of the packages that are asked for and installed; UserError where one is named and missing."""
    if "none" in cfg.peers:
        return []
    sys.path.insert(0, str(peers_folder(cfg)))
    wanted = [p for p in PACKAGES if p in cfg.peers or "all" in cfg.peers or not cfg.peers]
    missing = [p for p in wanted if find_spec(p.replace("-", "_")) is None]
    if missing and cfg.peers:
        raise UserError(f"peers={','.join(missing)}: not installed; python -m scripts.bench_ops --install_peers")
    if missing:
        print(f"left out, not installed (see --install_peers): {', '.join(missing)}")
    return [name for name, peer in PEERS.items() if set(peer.packages) <= set(wanted) - set(missing)]


def peers_folder(cfg: BenchOpsConfig) -> Path:
    return Path(cfg.peers_dir or base_dir() / "bench" / "peers_ops").resolve()


def peer_layer(name: str, d_model: int, dtype: torch.dtype) -> Layer:
    torch.manual_seed(0)
    peer = PEERS[name]
    module = peer.make(shape(d_model))

    def call(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return module(x)

    return Layer(name, peer.kind, module, call, False, peer.max_len)


def forward_backward(layer: Layer, x: Tensor, grad: Tensor) -> float:
    """Seconds. x, grad: (B, T, D)."""
    keep_freed_memory(layer.ours)  # the peers' users do not import nanochat
    layer.module.zero_grad(set_to_none=True)
    x.grad = None
    start = time.perf_counter()
    y = layer.call(x)
    y.backward(grad.to(y.dtype))
    return time.perf_counter() - start


def peak_memory(run: Callable[[], float]) -> tuple[float, int | None]:
    """-> (what run returns, bytes that resident memory rose at its peak; None where the system does not say)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what earlier layers freed
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
        before = memory("VmRSS")
    except (OSError, AttributeError):
        return run(), None
    return run(), memory("VmHWM") - before


def memory(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def measure(cfg: BenchOpsConfig, layers: list[Layer], d_model: int, length: int) -> list[Row]:
    """One width and length, the layers in turn. Rows with the median of the calls."""
    B = max(1, cfg.tokens // length)
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(B, length, d_model, generator=generator) for _ in range(2))
    x.requires_grad_()
    layers = [layer for layer in layers if length <= layer.max_len]
    seconds: dict[str, list[float]] = {}
    extra: dict[str, int | None] = {}
    for layer in layers:
        first, extra[layer.name] = peak_memory(lambda layer=layer: forward_backward(layer, x, grad))
        seconds[layer.name] = [first] if first > cfg.seconds else []
    for _ in range(cfg.repeats):
        for layer in layers:
            if not seconds[layer.name] or sum(seconds[layer.name]) < cfg.seconds:
                seconds[layer.name].append(forward_backward(layer, x, grad))
    for layer in layers:
        layer.module.zero_grad(set_to_none=True)
    return [figures(layer, d_model, length, B, seconds[layer.name], extra[layer.name], seconds) for layer in layers]


def figures(layer: Layer, d_model: int, length: int, B: int, calls: list, extra: int | None, seconds: dict) -> Row:
    """One row: milliseconds per call, and how many times our layer of its kind fits into them."""
    dt = median(calls)
    ours = seconds.get(layer.kind)
    row: Row = {"layer": layer.name, "kind": layer.kind, "ours": layer.ours, "d_model": d_model, "length": length}
    row |= {"kernels": layer.kernels.reason if layer.ours else None}
    row |= {"batch": B, "calls": len(calls), "ms": 1e3 * dt, "tokens_per_s": B * length / dt}
    return row | {"extra_bytes": extra, "times_ours": dt / median(ours) if ours else None}


TITLE = (
    f"{'layer':<26}{'d_model':>8}{'length':>8}{'batch':>6}{'calls':>6}{'ms':>10}{'tokens/s':>11}{'+MB':>7}{'x ours':>8}"
)


def table_row(r: Row) -> str:
    mb = "-" if r["extra_bytes"] is None else f"{r['extra_bytes'] / 1e6:.0f}"
    ratio = "-" if r["times_ours"] is None else f"{r['times_ours']:.2f}"
    start = f"{r['layer']:<26}{r['d_model']:8d}{r['length']:8d}{r['batch']:6d}{r['calls']:6d}"
    return f"{start}{r['ms']:10.1f}{r['tokens_per_s']:11.0f}{mb:>7}{ratio:>8}"


def ratios(rows: list[Row]) -> list[Row]:
    """How many times faster each of ours is than each peer of its kind, by length."""
    ms = {(r["layer"], r["d_model"], r["length"]): r["ms"] for r in rows}
    found: dict[tuple[str, str, int], dict[int, float]] = {}
    for r in rows:
        for name, (kind, _) in OURS.items():
            mine = ms.get((name, r["d_model"], r["length"]))
            if not r["ours"] and kind == r["kind"] and mine is not None:
                found.setdefault((name, r["layer"], r["d_model"]), {})[r["length"]] = r["ms"] / mine
    return [{"layer": a, "peer": b, "d_model": d, "times_faster": t} for (a, b, d), t in found.items()]


def growth(rows: list[Row]) -> list[Row]:
    """By what factor the time of one of our sequences grows when a length that fills a call alone doubles."""
    ms = {(r["layer"], r["d_model"], r["length"]): r["ms"] for r in rows if r["ours"] and r["batch"] == 1}
    found: dict[tuple[str, int], dict[int, float]] = {}
    for name, d, n in ms:
        if (name, d, 2 * n) in ms:
            found.setdefault((name, d), {})[2 * n] = ms[name, d, 2 * n] / ms[name, d, n]
    return [{"layer": name, "d_model": d, "factor": f} for (name, d), f in found.items()]


def crossovers(rows: list[Row]) -> list[Row]:
    """Where each recurrent layer of ours overtakes attention, and where two of them overtake attention + MLP."""
    ms: dict[tuple[str, int], dict[int, float]] = {}
    for r in rows:
        ms.setdefault((r["layer"], r["d_model"]), {})[r["length"]] = r["ms"]
    found = []
    for (name, d), mine in ms.items():
        attn, mlp = ms.get(("attn", d), {}), ms.get(("mlp", d), {})
        if name not in OURS or name in ("attn", "mlp"):
            continue
        alone = {n: mine[n] / attn[n] for n in mine if n in attn}
        pair = {n: 2 * mine[n] / (attn[n] + mlp[n]) for n in mine if n in attn and n in mlp}
        found += [{"layer": name, "n": 1, "d_model": d, "against": "attn", "length": crossing(alone), "ratio": alone}]
        found += [
            {"layer": name, "n": 2, "d_model": d, "against": "attn + mlp", "length": crossing(pair), "ratio": pair}
        ]
    return found


def crossing(ratio: dict[int, float]) -> float | None:
    """The first length where the ratio is below 1, between two lengths on log axes; None = at none.

    The shortest length means: there or before.
    """
    lengths = sorted(ratio)
    i = next((i for i, n in enumerate(lengths) if ratio[n] < 1), None)
    if i is None or i == 0:
        return None if i is None else float(lengths[0])
    a, b = lengths[i - 1], lengths[i]
    above, below = math.log(ratio[a]), math.log(ratio[b])
    return a * (b / a) ** (above / (above - below))


def summary(result: dict[str, Any]) -> str:
    """The comparisons as text, a line each."""
    lines = ["", "how many times faster ours is, by length"]
    for r in result["ratios"]:
        each = ", ".join(f"{n} {x:.2f}" for n, x in r["times_faster"].items())
        lines.append(f"  d_model {r['d_model']}, {r['layer']} against {r['peer']}: {each}")
    lines += ["growth of the time of a sequence when its length doubles to"]
    for r in result["growth"]:
        each = ", ".join(f"{n} {x:.2f}" for n, x in r["factor"].items())
        lines.append(f"  d_model {r['d_model']}, {r['layer']}: {each}")
    lines += ["first length at which it is faster (ratio of times by length)"]
    for r in result["crossovers"]:
        shortest = min(r["ratio"], default=0)
        at = "none" if r["length"] is None else f"{'<= ' if r['length'] == shortest else ''}{r['length']:.0f}"
        each = ", ".join(f"{n} {x:.2f}" for n, x in r["ratio"].items())
        what = f"{'two ' * (r['n'] - 1)}{r['layer']} against {r['against']}"
        lines.append(f"  d_model {r['d_model']}, {what}: {at} ({each})")
    return "\n".join(lines)


def decode(cfg: BenchOpsConfig, layers: list[Layer], d_model: int, seen: int) -> list[Row]:
    """One token for each of decode_batch sequences that have seen so many, in microseconds per block."""
    x = torch.randn(cfg.decode_batch, 1, d_model, generator=torch.Generator().manual_seed(0))
    config, dtype = shape(d_model), DTYPES[cfg.dtype]
    rotary, steps = Rotary(config.head_dim, config.rope_base), []
    for layer in layers:
        block = layer.module
        assert isinstance(block, Block)
        state = fill(block.eval().init_state(cfg.decode_batch, seen + 1, CPU, torch.float32))
        ctx = context(x, rotary, layer.kernels, dtype, pos=seen)
        steps.append(lambda block=block, ctx=ctx, state=state: block(x, ctx, state))
    calls = [max(1, int(DECODE_SECONDS / (repeat_step(step, 2) + 1e-9))) for step in steps]
    seconds: list[list[float]] = [[] for _ in steps]
    for _ in range(cfg.repeats):
        for step, n, times in zip(steps, calls, seconds, strict=True):
            times.append(repeat_step(step, n))
    return [decode_row(layer, d_model, seen, median(times)) for layer, times in zip(layers, seconds, strict=True)]


def fill(state: BlockState) -> BlockState:
    """Noise in place of fresh zeros, whose pages the system would read from one place."""
    for value in vars(state).values():
        for t in value.values() if isinstance(value, dict) else [value]:
            if isinstance(t, Tensor):
                t.normal_(0, 0.1)
    return state


@torch.inference_mode()
def repeat_step(step: Callable[[], Tensor], n: int) -> float:
    """Seconds per step. Every step stands at the same position, so the state grows no further."""
    start = time.perf_counter()
    for _ in range(n):
        step()
    return (time.perf_counter() - start) / n


def decode_row(layer: Layer, d_model: int, seen: int, seconds: float) -> Row:
    assert isinstance(layer.module, Block)
    row: Row = {"layer": layer.name, "kind": layer.kind, "d_model": d_model, "context": seen}
    return row | {"us": 1e6 * seconds, "state_bytes": layer.module.state_bytes(seen)}


def decode_table(rows: list[Row], batch: int) -> str:
    lines = [
        f"\none token at batch {batch}: microseconds per block, and state bytes per sequence (16 bits, SSM 32 bits)"
    ]
    lines += [f"{'layer':<26}{'d_model':>8}{'context':>9}{'us':>10}{'bytes':>12}"]
    for r in rows:
        lines.append(f"{r['layer']:<26}{r['d_model']:8d}{r['context']:9d}{r['us']:10.0f}{r['state_bytes']:12d}")
    return "\n".join(lines)


def plot(rows: list[Row], decoded: list[Row], title: str, path: Path) -> None:
    """Microseconds per token against the length, a panel per width; below, decoding against the context."""
    widths = sorted({r["d_model"] for r in rows})
    fig = Figure(figsize=(2 + 5 * len(widths), 8), dpi=DPI, layout="constrained")
    axes = fig.subplots(2, len(widths), squeeze=False)
    for i, d in enumerate(widths):
        chosen = [(r, r["length"], 1e6 / r["tokens_per_s"]) for r in rows if r["d_model"] == d]
        curves(axes[0, i], chosen, f"forward + backward, width {d}", "length", "microseconds per token")
        chosen = [(r, r["context"], r["us"]) for r in decoded if r["d_model"] == d]
        curves(axes[1, i], chosen, f"decoding one token, width {d}", "tokens before", "microseconds per block")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    fig.suptitle(title, fontsize=10)
    with atomic_write(path) as f:
        fig.savefig(f, format="png")


def curves(ax: Any, points: list[tuple[Row, int, float]], title: str, xlabel: str, ylabel: str) -> None:
    """A curve per layer: the colour is its kind, ours are solid lines with dots."""
    markers = dict(zip([*OURS, *PEERS], "oooDoo^vxsP*X", strict=True))
    for name in dict.fromkeys(row["layer"] for row, _, _ in points):
        xy = [(row, x, y) for row, x, y in points if row["layer"] == name]
        style = {"color": COLOURS[xy[0][0]["kind"]], "marker": markers[name], "markersize": 4, "label": name}
        ax.plot([x for _, x, _ in xy], [y for _, _, y in xy], "-" if name in OURS else "--", linewidth=1.2, **style)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda v, _: f"{v:.0f}")
    ax.set(yscale="log", title=title, xlabel=xlabel, ylabel=ylabel)
    ax.grid(True, color="#DDDDDD", linewidth=0.6)


def measure_width(cfg: BenchOpsConfig, d_model: int, peers: list[str]) -> tuple[list[Row], list[Row], dict[str, int]]:
    """All lengths and contexts of one width, printed as they come -> (rows, rows of decoding, parameters by layer)."""
    dtype = DTYPES[cfg.dtype]
    layers = [our_layer(name, d_model, dtype) for name in OURS if name in cfg.layers]
    mixers = [layer for layer in layers if layer.kind != "mlp"]
    layers += [peer_layer(name, d_model, dtype) for name in peers if PEERS[name].kind in {x.kind for x in layers}]
    n_params = {layer.name: layer.n_params for layer in layers}
    print(f"\nparameters at d_model {d_model}: " + ", ".join(f"{name} {n:,}" for name, n in n_params.items()))
    for layer in layers:
        if layer.ours:
            print(f"{layer.name}: {layer.kernels.reason}")
    for layer in layers:  # what a library sets up once
        forward_backward(layer, torch.randn(1, 16, d_model, requires_grad=True), torch.ones(1, 16, d_model))
    print(TITLE, flush=True)
    rows, decoded = [], []
    lengths = sorted({int(n) for n in cfg.lengths} | ({EXTRA_LENGTH} if cfg.growth else set()))
    for length in lengths:
        extra = length not in map(int, cfg.lengths)
        rows += (new := measure(cfg, [x for x in layers if x.ours or not extra], d_model, length))
        print("\n".join(map(table_row, new)), flush=True)
    for seen in map(int, cfg.contexts):
        decoded += decode(cfg, mixers, d_model, seen)
    return rows, decoded, n_params


def main(argv: list[str]) -> None:
    cfg = load_config(BenchOpsConfig, argv)
    if cfg.install_peers:
        install_peers(peers_folder(cfg))
        return
    peers = find_peers(cfg)
    torch.set_num_threads(cfg.threads)
    print(describe_device(CPU, DTYPES[cfg.dtype]))
    rows, decoded, n_params = [], [], {}
    for d_model in map(int, cfg.d_models):
        new, steps, n_params[d_model] = measure_width(cfg, d_model, peers)
        rows, decoded = rows + new, decoded + steps
    versions = {"torch": torch.__version__}
    versions |= {p: version(p) for p in PACKAGES if any(p in PEERS[name].packages for name in peers)}
    facts = {
        "config": asdict(cfg),
        "machine": machine_info(),
        **git_state(),
        "versions": versions,
        "n_params": n_params,
    }
    result = {**facts, "rows": rows, "decode": decoded}
    result |= {"ratios": ratios(rows), "growth": growth(rows), "crossovers": crossovers(rows)}
    print(decode_table(decoded, cfg.decode_batch))
    print(summary(result))
    out = base_dir() / "bench"
    write_json(out / "ops.json", result)
    plot(rows, decoded, f"one layer, {cfg.dtype}, {cfg.threads} thread(s)", out / "ops.png")
    print(f"wrote {out / 'ops.json'} and ops.png")


if __name__ == "__main__":
    run_script(main)
