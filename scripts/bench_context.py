"""How many documents fit? Prompt, state, peak memory and time to the first token, by backbone and number of documents.

    python -m scripts.bench_context                                   # the tiny configs, and the plan of the d20 ones
    python -m scripts.bench_context configs/tiny_hybrid.py --checkpoints=rag:tiny_hybrid,sft --doc_tokens=256
    python -m scripts.bench_context --plan=configs/rag_hybrid_d20.py --memory_gb=12 --rows=1,32

Measured: a random prompt of a question and n documents of doc_tokens each, read and answered by the engine; a config
file has random weights. Every cell is a process of its own. Its peak is what memory (resident, on CUDA allocated) rose
over the weights and a short warm-up. Backbones take turns.
Planned: the most documents for which weights, reserve_gb, the states of all conversations and the activations of one
prompt that is read fit memory_gb. Computed from parameters and state_bytes, nothing of that size is built; activations
are an estimate (READING). Whether a model makes use of so many documents is another question: rag_eval asks it.

The first nanochat-turbo stated 3-5 documents for a Transformer, 8-10 for a hybrid, 15-20 for Mamba, without a
measurement. Writes <base dir>/bench/context.{json,png}.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
from matplotlib.figure import Figure

from nanochat.blocks import entry_names
from nanochat.checkpoint import SOURCES, load_model
from nanochat.common import REPO_DIR, atomic_write, base_dir, git_state, machine_info, run_script, write_json
from nanochat.config import UserError, load_config
from nanochat.device import describe_device, pick_device, pick_dtype, synchronize
from nanochat.engine import Engine
from nanochat.gpt import GPT
from nanochat.layers import Linear
from nanochat.plots import BLUE, DPI, GREEN, ORANGE
from nanochat.report import aligned_table
from nanochat.tokenizer import Tokenizer
from scripts.base_train import BaseTrainConfig, build_model
from scripts.bench_arch import peak_bytes, start_peak

TINY = ("tiny_transformer", "tiny_mamba", "tiny_mamba2", "tiny_hybrid")
GPU = ("transformer_d20", "hybrid_sparse_attention_d20", "rag_hybrid_d20", "mamba_d20", "mamba2_d20")
DEFAULT_VOCAB = 65536  # of the plan, and where no tokenizer is trained
MIB, GIB = 2**20, 2**30
MOST = 1_000_000  # documents are counted up to
# Bytes of memory per parameter of a matrix: float32, its bfloat16 copy, and a second one where matrices are joined.
MATRIX_BYTES, TABLE_BYTES = 4 + 2 + 2, 4
# Live at once in bfloat16 while a prompt is read, per token: so many vectors of width d_model, and so many outputs of
# the widest matrix of a block. An estimate; a CPU, which keeps the residual stream in float32, takes about twice that.
READING = (4, 4)
COLOURS = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito

Row = dict[str, Any]


@dataclass(frozen=True)
class BenchContextConfig:
    """Documents in the context: cost and limit, by backbone."""

    checkpoints: Annotated[list, "stage or stage:tag, as rag:tiny_hybrid,sft"] = field(default_factory=list)
    documents: Annotated[list, "numbers of documents; none = measure nothing"] = (3, 5, 8, 10, 15, 20, 40)  # pyrefly: ignore
    doc_tokens: Annotated[int, "tokens of a document"] = 128
    question_tokens: Annotated[int, "tokens of the question and what stands around it"] = 32
    answer_tokens: Annotated[int, "tokens of an answer"] = 32
    repeats: Annotated[int, "timed readings of each prompt; the median counts"] = 3
    vocab_size: Annotated[int, "ids; 0 = the tokenizer's where one is trained, else 65536"] = 0
    plan: Annotated[list, "config files, or names in configs/, whose limits are computed; none = no plan"] = GPU  # pyrefly: ignore
    memory_gb: Annotated[float, "memory of the device of the plan, GiB"] = 24.0
    reserve_gb: Annotated[float, "of it for the CUDA context and what fragmentation costs"] = 2.0
    rows: Annotated[list, "conversations held at once, in the plan"] = (1, 32)  # pyrefly: ignore
    device: Annotated[str, "cpu, cuda, mps; '' = the best there is"] = ""
    dtype: Annotated[str, "auto, float32 or bfloat16"] = "auto"

    def __post_init__(self) -> None:
        for key in ("documents", "rows"):
            if not all(str(n).isdecimal() and int(n) > 0 for n in given(getattr(self, key))):
                raise ValueError(f"{key}={','.join(map(str, getattr(self, key)))}: expected numbers above 0, as 3,5,8")
        if min(self.doc_tokens, self.question_tokens, self.answer_tokens, self.repeats) < 1 or self.vocab_size < 0:
            raise ValueError("doc_tokens, question_tokens, answer_tokens and repeats must be at least 1")
        if not 0 <= self.reserve_gb < self.memory_gb:
            raise ValueError(f"memory_gb={self.memory_gb}, reserve_gb={self.reserve_gb}: nothing is left for a model")
        for name in self.checkpoints:
            if name.partition(":")[0] not in SOURCES:
                raise ValueError(
                    f"checkpoints={name}: expected stage or stage:tag, the stage one of {', '.join(SOURCES)}"
                )

    def prompt(self, n: int) -> int:
        """Tokens of a question with n documents."""
        return self.question_tokens + n * self.doc_tokens

    def context(self, n: int) -> int:
        """Tokens that prompt and answer need."""
        return self.prompt(n) + self.answer_tokens

    def most(self, fits: Callable[[int], bool]) -> int:
        """The largest n up to MOST with fits(context of n); -1 where none does. What fits a longer context fits a
        shorter one."""
        low, high = -1, MOST + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(self.context(middle)) else (low, middle)
        return low


def given(values: Sequence[Any]) -> list[Any]:
    """A list of the command line, where "none" is an empty one."""
    return [] if list(values) == ["none"] else list(values)


@dataclass(frozen=True)
class Backbone:
    """What is measured: a config file, or a checkpoint. Small enough to be sent to a process."""

    name: str
    config: BaseTrainConfig | None = None
    stage: str = ""
    tag: str | None = None

    def model(self, device: torch.device, dtype: str, vocab_size: int) -> tuple[GPT, str]:
        """-> (the model, ready to decode, which kernels run)."""
        if self.config is None:
            model, _, _ = load_model(self.stage, device, self.tag, dtype=dtype)
            return model, model.kernels.reason
        model, kernels = build_model(self.config.gpt_config(vocab_size), device, pick_dtype(dtype, device), "auto", 0)
        return model.eval(), kernels


def backbones(cfg: BenchContextConfig, files: list[str]) -> list[Backbone]:
    """The files and checkpoints asked for, else the tiny configs."""
    if not files and not cfg.checkpoints:
        files = [config_path(name) for name in TINY]
    found = [Backbone(Path(f).stem, load_config(BaseTrainConfig, [f])) for f in files]
    found += [Backbone(name, None, *parts(name)) for name in cfg.checkpoints]
    if len({b.name for b in found}) < len(found):
        raise UserError(f"two backbones have one name ({', '.join(b.name for b in found)}): tables go by it")
    return found


def parts(name: str) -> tuple[str, str | None]:
    """stage or stage:tag"""
    stage, _, tag = name.partition(":")
    return stage, tag or None


def config_path(name: str) -> str:
    return name if name.endswith(".py") else str(REPO_DIR / "configs" / f"{name}.py")


def vocabulary(cfg: BenchContextConfig) -> tuple[int, str]:
    """-> (ids, where the number is from)."""
    if cfg.vocab_size:
        return cfg.vocab_size, "as asked"
    if (base_dir() / "tokenizer").exists():
        return Tokenizer.load().vocab_size, "the trained tokenizer's"
    return DEFAULT_VOCAB, "no tokenizer is trained yet"


# ---- measured ----


def measure(cfg: BenchContextConfig, backbone: Backbone, n: int, vocab_size: int, threads: int) -> Row:
    """One cell, in a process that has done nothing else."""
    torch.set_num_threads(threads)
    device = pick_device(cfg.device)
    model, kernels = backbone.model(device, cfg.dtype, vocab_size)
    engine = Engine(model, max_context=cfg.context(n))  # without a tokenizer no id ends an answer
    prompt = torch.randint(model.config.vocab_size, (cfg.prompt(n),), generator=torch.Generator().manual_seed(0))
    ids = prompt.tolist()
    read(engine, ids[:16], 2, device)  # casts and tables
    held, times = start_peak(device), []
    for _ in range(cfg.repeats):
        times.append(read(engine, ids, cfg.answer_tokens, device))
    peak = None if held is None else peak_bytes(device) - held
    held_bytes = model.init_state(1, cfg.context(n)).bytes()
    first, rest = (statistics.median(column) for column in zip(*times, strict=True))
    return {
        "backbone": backbone.name, "documents": n, "prompt_tokens": len(ids), "trained_context": model.config.seq_len,
        "blocks": entry_names(model.config.block_pattern, model.config.n_layer), "parameters": model.n_params(),
        "state_bytes": model.state_bytes(cfg.context(n)), "state_bytes_here": held_bytes,
        "peak_bytes": peak, "ttft_ms": 1e3 * first, "answer_ms": 1e3 * rest, "kernels": kernels,
        "dtype": str(model.compute_dtype)[6:],
    }  # fmt: skip


def read(engine: Engine, ids: list[int], n_tokens: int, device: torch.device) -> tuple[float, float]:
    """-> (seconds to the first id, seconds for the n_tokens - 1 others)."""
    synchronize(device)
    start = time.perf_counter()
    steps = engine.generate(ids, max_tokens=n_tokens, temperature=0.0)
    next(steps)
    synchronize(device)
    first = time.perf_counter()
    made = 1 + sum(1 for _ in steps)
    assert made == n_tokens, made
    return first - start, time.perf_counter() - first


def alone(f: Callable[..., Any], *args: Any) -> Any:
    """f(*args) in a process that has done nothing else; None where it was killed or memory ran out."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["scripts.bench_arch"])  # what takes long to import, once
    try:
        with ProcessPoolExecutor(1, context) as pool:
            return pool.submit(f, *args).result()
    except (BrokenProcessPool, MemoryError, torch.OutOfMemoryError):
        return None


def measure_all(cfg: BenchContextConfig, found: list[Backbone], vocab_size: int) -> list[Row]:
    """Every backbone at every number of documents, printed as it comes; a cell whose process was killed is left out."""
    rows = []
    for n in sorted(map(int, given(cfg.documents))):
        for backbone in found:
            row = alone(measure, cfg, backbone, n, vocab_size, torch.get_num_threads())
            if row is None:
                row = {"backbone": backbone.name, "documents": n, "prompt_tokens": cfg.prompt(n)}
                row |= {"left_out": "killed"}
            rows.append(row)
            print(f"{backbone.name}, {n} documents: {told(row)}", flush=True)
    return rows


def told(row: Row) -> str:
    if "left_out" in row:
        return row["left_out"]
    return f"{row['prompt_tokens']:,} tokens, state {mib(row['state_bytes'])} MiB, first token {row['ttft_ms']:.0f} ms"


# ---- planned ----


def plan(cfg: BenchContextConfig, name: str, vocab_size: int) -> list[Row]:
    """A row for each number of conversations at once: the documents each of them can hold."""
    config = load_config(BaseTrainConfig, [config_path(name)])
    with torch.device("meta"):
        model = GPT(config.gpt_config(vocab_size))
    n_params = model.n_params()
    weights = TABLE_BYTES * n_params["embedding"] + MATRIX_BYTES * (n_params["total"] - n_params["embedding"])
    room = (cfg.memory_gb - cfg.reserve_gb) * GIB - weights
    reading = reading_bytes(model)
    row = {
        "config": Path(name).stem, "blocks": entry_names(model.config.block_pattern, model.config.n_layer),
        "parameters": n_params["total"], "weight_bytes": weights, "reading_bytes": reading,
        "state_bytes_document": model.state_bytes(cfg.context(MOST)) - model.state_bytes(cfg.context(MOST - 1)),
        "trained_context": config.max_seq_len, "trained_documents": cfg.most(lambda T: config.max_seq_len >= T),
    }  # fmt: skip
    rows = []
    for batch in map(int, cfg.rows):
        fits = cfg.most(lambda T, batch=batch: batch * model.state_bytes(T) + T * reading <= room)
        rows.append({**row, "rows": batch, "fits": fits})
    return rows


def reading_bytes(model: GPT) -> int:
    """Bytes per token of a prompt that is read in one forward, as the engine does."""
    widest = max(m.weight.shape[0] for block in model.layers for m in block.modules() if isinstance(m, Linear))
    vectors, outputs = READING
    return 2 * (vectors * model.config.d_model + outputs * widest)


# ---- told ----


def mib(n: float | None) -> str:
    return "-" if n is None else f"{n / MIB:,.2f}" if n < 10 * MIB else f"{n / MIB:,.0f}"


def layers(blocks: list[str]) -> str:
    """8 attn, 12 mamba"""
    return ", ".join(f"{blocks.count(name)} {name}" for name in dict.fromkeys(blocks))


def measured_table(rows: list[Row]) -> str:
    head = "backbone|documents|prompt tokens|state MiB|state here MiB|peak MiB|first token ms|answer ms"
    lines: list[list[str]] = [[str(word) for word in head.split("|")]]
    for r in rows:
        start = [r["backbone"], str(r["documents"]), f"{r['prompt_tokens']:,}"]
        if "left_out" in r:
            lines.append([*start, r["left_out"], "", "", "", ""])
        else:
            memory = [mib(r[key]) for key in ("state_bytes", "state_bytes_here", "peak_bytes")]
            lines.append([*start, *memory, f"{r['ttft_ms']:,.0f}", f"{r['answer_ms']:,.0f}"])
    return aligned_table(lines)


def plan_table(rows: list[Row]) -> str:
    head = "config|layers|M parameters|weights GiB|state a document MiB|reading a token KiB|at once|fit|trained for"
    lines: list[list[str]] = [[str(word) for word in head.split("|")]]
    for r in rows:
        size = [f"{r['parameters'] / 1e6:,.0f}", f"{r['weight_bytes'] / GIB:.2f}", mib(r["state_bytes_document"])]
        counts = [str(r["rows"]), f"{max(r['fits'], 0):,}", str(max(r["trained_documents"], 0))]
        lines.append([r["config"], layers(r["blocks"]), *size, f"{r['reading_bytes'] / 1024:.0f}", *counts])
    return aligned_table(lines)


def text_of(cfg: BenchContextConfig, rows: list[Row], planned: list[Row], where: str) -> str:
    parts = []
    if rows:
        about = f"Measured, {where}; documents of {cfg.doc_tokens} tokens, answers of {cfg.answer_tokens}."
        about += " State: of one conversation on a GPU; here: as held in this run."
        parts.append(f"{about}\n\n{measured_table(rows)}")
    if planned:
        about = (
            f"Planned: documents of {cfg.doc_tokens} tokens that fit {cfg.memory_gb:g} GiB, {cfg.reserve_gb:g} of it"
        )
        parts.append(f"{about} free, and how many fit the length of training.\n\n{plan_table(planned)}")
    return "\n\n".join(parts)


def plot(rows: list[Row], where: str, path: Path) -> None:
    """State, peak memory and time to the first token against the number of documents, a line for each backbone."""
    figure = Figure(figsize=(13, 4), dpi=DPI, layout="constrained")
    panels = {"state_bytes": "state, MiB", "peak_bytes": "peak over the weights, MiB", "ttft_ms": "first token, ms"}
    for ax, (key, label) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for i, name in enumerate(dict.fromkeys(r["backbone"] for r in rows)):
            points = [(r["documents"], r[key]) for r in rows if r["backbone"] == name and r.get(key) is not None]
            x, y = [p[0] for p in points], [p[1] / (MIB if "bytes" in key else 1) for p in points]
            ax.plot(x, y, "o-", color=COLOURS[i % len(COLOURS)], markersize=4, linewidth=1.4, label=name)
        ax.set(xlabel="documents", ylabel=label, ylim=(0, None))
        ax.grid(True, color="#DDDDDD", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(fontsize=8, frameon=False)
    figure.suptitle(f"documents in the context, {where}", fontsize=10)
    with atomic_write(path) as f:
        figure.savefig(f, format="png", metadata={"Software": None})


def main(argv: list[str]) -> None:
    files = [a for a in argv if a.endswith(".py") and not a.startswith("-")]
    cfg = load_config(BenchContextConfig, [a for a in argv if a not in files])
    vocab_size, why = vocabulary(cfg)
    planned = [row for name in given(cfg.plan) for row in plan(cfg, str(name), cfg.vocab_size or DEFAULT_VOCAB)]
    found = backbones(cfg, files) if given(cfg.documents) else []
    device = pick_device(cfg.device)
    where = describe_device(device, pick_dtype(cfg.dtype, device))
    print(f"{where}; vocabulary {vocab_size} ({why})")
    rows = measure_all(cfg, found, vocab_size)
    print(f"\n{text_of(cfg, rows, planned, where)}\n")
    out = base_dir() / "bench"
    about = {"config": asdict(cfg), "machine": machine_info(), "device": where, **git_state()}
    write_json(out / "context.json", {**about, "vocab_size": vocab_size, "rows": rows, "plan": planned})
    if rows:
        plot(rows, where, out / "context.png")
    print(f"wrote {out / 'context.json'}" + (" and context.png" if rows else ""))


if __name__ == "__main__":
    run_script(main)
