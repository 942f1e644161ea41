"""The claims of this field, measured again: speed, memory, decoding, loss, recall, documents, RAG over context length.

    python -m scripts.bench_claims                       # configs/tiny_*.py; about 20 minutes on 2 cores
    python -m scripts.bench_claims --parts=decode,recall --seeds=5
    python -m scripts.bench_claims --parts=rag --knowledge_base=rag_data --rag_tags=tiny_hybrid,tiny_mamba
    python -m scripts.bench_claims configs/transformer_d20.py configs/mamba_d20.py --device=cuda
    python -m scripts.bench_claims --write-docs          # docs/benchmarks.md from what was measured; measures nothing

The first .py file is the Transformer. Each other one is measured at its parameters and at its FLOPs per token
(describe --match). The measuring is that of bench_arch, bench_context, describe and rag_eval; repeats take turns.
What each part does says docs/benchmarks.md. A part writes <base dir>/bench/claims/<part>_<cpu or cuda>.json, so that a
later run adds parts. Claims and verdicts: bench_claims_verdict.py, the page: bench_claims_report.py.
"""

import dataclasses
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from nanochat.blocks import entry_names
from nanochat.common import REPO_DIR, atomic_write, base_dir, git_state, machine_info, run_script, write_json
from nanochat.config import UserError, load_config
from nanochat.dataloader import val_windows
from nanochat.dataset import shard_paths
from nanochat.device import describe_device, pick_device, pick_dtype
from nanochat.rag_conditions import gather
from nanochat.rag_eval import Prediction, question_from
from nanochat.rag_tables import equal_coverage
from nanochat.report import log_stage, report_dir
from nanochat.tokenizer import Tokenizer
from scripts.base_train import BaseTrainConfig
from scripts.bench_arch import BenchArchConfig, learn_all, length_part, train_once, train_part
from scripts.bench_arch_report import best_accuracy, best_runs, by_arch, compact
from scripts.bench_claims_report import Results, draw, headline, page, read_results
from scripts.bench_context import (
    DEFAULT_VOCAB,
    GPU,
    Backbone,
    BenchContextConfig,
    alone,
    config_path,
    measure_all,
    plan,
)
from scripts.describe import DescribeConfig, matched, meta_model
from scripts.rag_eval import RagEvalConfig, load_reader, open_data, run_conditions

TINY = ("tiny_transformer", "tiny_mamba", "tiny_mamba2", "tiny_hybrid")
SIZES = {"params": "parameters", "flops": "FLOPs"}
ONE_STEP = 16  # tokens of the validation window of a run whose loss is not looked at
Row = dict[str, Any]


@dataclass(frozen=True)
class BenchClaimsConfig:
    """Measure the claims; config files, the Transformer first, come before the keys."""

    parts: Annotated[list, "train, length, decode, memory, recall, context, rag"] = (  # pyrefly: ignore
        "train", "length", "decode", "memory", "recall", "context")  # fmt: skip
    match: Annotated[list, "sizes at which the others equal the first: params, flops"] = ("params", "flops")  # pyrefly: ignore
    seeds: Annotated[int, "seeds of training and of recall, repeats of timings"] = 3
    lrs: Annotated[list, "rates of the matrices, tried with the first seed"] = (0.02, 0.04)  # pyrefly: ignore
    train_tokens: Annotated[int, "tokens of each run of `train`"] = 61440
    eval_tokens: Annotated[int, "tokens of its validation text"] = 65536
    train_lengths: Annotated[list, "context lengths of training"] = (512, 2048, 8192)  # pyrefly: ignore
    step_tokens: Annotated[int, "tokens of a step of `length`, one row at least"] = 4096
    steps: Annotated[int, "steps of each of its runs, the first two untimed"] = 3
    decode_lengths: Annotated[list, "contexts that are read and decoded from"] = (256, 1024, 4096, 16384)  # pyrefly: ignore
    state_lengths: Annotated[list, "contexts whose state is computed"] = (2048, 8192, 32768, 131072)  # pyrefly: ignore
    recall_pairs: Annotated[int, "pairs of key and value"] = 16
    recall_lens: Annotated[list, "tokens around them; trained on the first"] = (64, 128, 256)  # pyrefly: ignore
    toy_steps: Annotated[int, "training steps of a toy model at most"] = 1000
    toy_lrs: Annotated[list, "rates of its matrices to try"] = (0.02, 0.005)  # pyrefly: ignore
    documents: Annotated[list, "numbers of documents in a prompt"] = (5, 20)  # pyrefly: ignore
    doc_tokens: Annotated[int, "tokens of a document"] = 128
    plan: Annotated[list, "config files whose state and documents are computed, the Transformer first"] = GPU  # pyrefly: ignore
    memory_gb: Annotated[float, "memory of the device planned for, GiB"] = 24.0
    conversations: Annotated[list, "held at once, in the plan"] = (1, 32)  # pyrefly: ignore
    knowledge_base: Annotated[str, "of the part rag: folder made by prepare_rag_dataset"] = ""
    rag_tags: Annotated[list, "RAG checkpoints; none = the one saved last"] = ()  # pyrefly: ignore
    questions: Annotated[int, "asked of each, -1 = all"] = 500
    vocab_size: Annotated[int, "ids of the models where no tokenizer is trained"] = 8192
    workers: Annotated[int, "processes for toy models; 0 = one per core, on a GPU one"] = 0
    device: Annotated[str, "cpu, cuda, ...; '' = the best there is"] = ""
    dtype: Annotated[str, "auto, float32 or bfloat16"] = "auto"
    results: Annotated[str, "folder of the result files; '' = <base dir>/bench/claims"] = ""
    docs: Annotated[str, "page that --write-docs writes"] = str(REPO_DIR / "docs" / "benchmarks.md")
    write_docs: Annotated[bool, "write the page from the result files, measure nothing"] = False

    def __post_init__(self) -> None:
        for key, known in (("parts", list(PARTS)), ("match", list(SIZES))):
            if not set(getattr(self, key)) <= set(known) or not getattr(self, key):
                raise ValueError(f"{key}={','.join(getattr(self, key))}: expected some of {','.join(known)}")
        for key in LENGTHS:
            if not getattr(self, key) or not all(str(n).isdecimal() and int(n) > 0 for n in getattr(self, key)):
                raise ValueError(
                    f"{key}={','.join(map(str, getattr(self, key)))}: expected numbers above 0, as 512,2048"
                )
        least = {k: getattr(self, k) for k in ("seeds", "train_tokens", "step_tokens", "steps", "vocab_size")}
        if min(least.values()) < 1:
            raise ValueError(f"{least}: expected numbers above 0")
        if "rag" in self.parts and not self.knowledge_base:
            raise ValueError(
                "the part rag needs --knowledge_base=DIR, of scripts.prepare_rag_dataset, and a RAG checkpoint: "
                "bash speedrun.sh leaves both"
            )

    def numbers(self, key: str) -> list[int]:
        return sorted(int(n) for n in getattr(self, key))

    def folder(self) -> Path:
        return Path(self.results).expanduser() if self.results else base_dir() / "bench" / "claims"

    def arch_flags(self) -> list[str]:
        """What bench_arch is told."""
        given = {
            "budget": "tokens", "amount": self.train_tokens, "lrs": self.lrs, "seeds": self.seeds, "batches": (1, 8),
            "eval_tokens": self.eval_tokens, "lengths": self.decode_lengths, "toy_steps": self.toy_steps,
            "toy_lrs": self.toy_lrs, "recall_pairs": self.recall_pairs, "workers": self.workers,
            "device": self.device, "dtype": self.dtype,
        }  # fmt: skip
        return [f"--{k}={','.join(map(str, v)) if isinstance(v, list | tuple) else v}" for k, v in given.items()]


LENGTHS = ("train_lengths", "decode_lengths", "state_lengths", "recall_lens", "documents", "conversations")


# ---- what is compared ----


@dataclass(frozen=True)
class Stack:
    """One model. match: at which sizes it equals the first; "" = that one itself, or as its file says."""

    key: str
    arch: BenchArchConfig
    match: str = ""

    def about(self, group: str = "") -> Row:
        names = entry_names(self.arch.block_pattern, self.arch.depth)
        return {"kind": kind_of(self.arch), "blocks": compact(names), "match": self.match, "group": group}


def kind_of(cfg: BaseTrainConfig) -> str:
    """attn, mamba, ...: the one mixer of a stack; hybrid: attention and others."""
    kinds = set(entry_names(cfg.block_pattern, cfg.depth)) - {"mlp"}
    return "hybrid" if "attn" in kinds and len(kinds) > 1 else "+".join(sorted(kinds))


def stacks_of(cfg: BenchClaimsConfig, files: list[str], vocab_size: int) -> list[Stack]:
    """The first file as it is, each other one at each size; one stack where both sizes are the same."""
    flags = cfg.arch_flags()
    first, *others = [load_config(BenchArchConfig, [f, *flags]) for f in files]
    names = [Path(f).stem for f in files]
    if kind_of(first) != "attn" or not others or len(set(names)) < len(names):
        raise UserError(f"{', '.join(names)}: expected a stack of attention alone, then others, each name once")
    found = [Stack(names[0], first)]
    for name, file, arch in zip(names[1:], files[1:], others, strict=True):
        shapes: dict[tuple[int, int], tuple[DescribeConfig, list[str]]] = {}
        for how in cfg.match:
            best = matched(load_config(DescribeConfig, [file, f"--match={how}", f"--reference={files[0]}"]), vocab_size)
            shapes.setdefault((best.depth, best.d_model), (best, []))[1].append(SIZES[how])
        for best, sizes in shapes.values():
            shape = {"depth": best.depth, "d_model": best.d_model, "block_pattern": best.block_pattern}
            equal = " and ".join(sizes)
            found.append(Stack(f"{name}, equal {equal}", dataclasses.replace(arch, **shape), equal))
    return found


def unmatched(stacks: list[Stack]) -> list[Stack]:
    """One of each file: the one at equal parameters where it was asked for."""
    return list({s.key.partition(",")[0]: s for s in reversed(stacks)}.values())[::-1]


# ---- parts: -> rows, what their stacks are, notes ----

Found = tuple[list[Row], dict[str, Row], list[str]]


def train_rows(cfg: BenchClaimsConfig, stacks: list[Stack]) -> Found:
    """Bits per byte and speed of each seed at the best rate, the same tokens for all."""
    rows, notes = [], []
    for key, runs in by_arch(train_part(stacks[0].arch, {s.key: s.arch for s in stacks})).items():
        best = best_runs(runs)
        notes += [] if best else [f"{key}: diverged at every rate."]
        rows += [
            {"arch": key, "length": s.arch.max_seq_len, "repeat": r["seed"]}
            | {k: r[k] for k in ("bpb", "lr", "tokens_per_s", "tokens", "seconds", "flops_per_token", "parameters")}
            for s in stacks if s.key == key for r in best
        ]  # fmt: skip
    return rows, {s.key: s.about() for s in stacks}, notes


def length_rows(cfg: BenchClaimsConfig, stacks: list[Stack]) -> Found:
    """Training speed and peak memory at each length."""
    rows, notes = [], []
    for repeat in range(cfg.seeds):
        for length in cfg.numbers("train_lengths"):
            for stack in stacks:
                row = alone(train_cell, stack.arch, length, cfg.step_tokens, cfg.steps, torch.get_num_threads())
                if row is None:
                    notes.append(f"{stack.key} at {length:,}: killed, or out of memory.")
                    continue
                rows.append({"arch": stack.key, "length": length, "repeat": repeat, **row})
                peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f} MiB"
                print(f"length: {stack.key}, {length:,}: {row['tokens_per_s']:,.0f} tokens/s, {peak}", flush=True)
    return rows, {s.key: s.about() for s in stacks}, list(dict.fromkeys(notes))


def train_cell(arch: BenchArchConfig, length: int, step_tokens: int, steps: int, threads: int) -> Row:
    """A few steps of bench_arch's training. Rows are not cut at documents, so that a length is the length it says."""
    torch.set_num_threads(threads)
    batch = max(1, step_tokens // length)
    arch = dataclasses.replace(
        arch, max_seq_len=length, device_batch_size=batch, total_batch_size=batch * length, doc_mask=False,
        amount=float(steps * batch * length),
    )  # fmt: skip
    tokenizer = Tokenizer.load()
    row = train_once(arch, tokenizer, *val_windows(shard_paths("val"), tokenizer, ONE_STEP, ONE_STEP))
    return {k: row[k] for k in ("tokens_per_s", "peak_bytes", "tokens", "kernels", "dtype")}


def decode_rows(cfg: BenchClaimsConfig, stacks: list[Stack]) -> Found:
    """Reading and decoding on random weights."""
    archs, rows = {s.key: s.arch for s in stacks}, list[Row]()
    bench = dataclasses.replace(stacks[0].arch, vocab_size=vocabulary(cfg))
    for repeat in range(cfg.seeds):
        rows += [{**row, "repeat": repeat} for row in length_part(bench, archs)]
    notes = [f"{r['arch']} at {r['length']:,}: {r['left_out']}." for r in rows if "left_out" in r]
    return rows, {s.key: s.about() for s in stacks}, list(dict.fromkeys(notes))


def memory_rows(cfg: BenchClaimsConfig, stacks: list[Stack]) -> Found:
    """Bytes of the state of a conversation on a GPU, computed: of these stacks and of the planned ones."""
    planned = [Stack(f"planned {Path(n).stem}", load_config(BenchArchConfig, [config_path(str(n))])) for n in cfg.plan]
    about = {s.key: s.about() for s in stacks} | {s.key: s.about("planned") for s in planned}
    models = {s.key: meta_model(s.arch, DEFAULT_VOCAB) for s in [*stacks, *planned]}
    lengths = cfg.numbers("state_lengths")
    return (
        [{"arch": k, "length": n, "state_bytes": m.state_bytes(n)} for k, m in models.items() for n in lengths],
        about,
        [],
    )


def recall_rows(cfg: BenchClaimsConfig, stacks: list[Stack]) -> Found:
    """Accuracy of toy models of each file's blocks, trained at the first length."""
    chosen, rows = unmatched(stacks), list[Row]()
    found = learn_all(stacks[0].arch, {s.key: s.arch for s in chosen}, cfg.recall_pairs, cfg.numbers("recall_lens"))
    for key, runs in by_arch(found).items():
        for length in cfg.numbers("recall_lens"):
            best = enumerate(best_accuracy(runs, length))
            rows += [{"arch": key, "length": length, "repeat": seed, "accuracy": a} for seed, a in best]
    blocks = {r["arch"]: r["blocks"] for r in found}
    return rows, {s.key: {**s.about(), "blocks": blocks[s.key], "match": ""} for s in chosen}, []


def context_rows(cfg: BenchClaimsConfig, stacks: list[Stack]) -> Found:
    """Prompts of documents, measured; documents that fit a memory, computed for the planned configs."""
    chosen = unmatched(stacks)
    bench = BenchContextConfig(
        documents=cfg.numbers("documents"), doc_tokens=cfg.doc_tokens, repeats=1, memory_gb=cfg.memory_gb,
        reserve_gb=cfg.memory_gb / 12, rows=cfg.numbers("conversations"), device=cfg.device, dtype=cfg.dtype,
    )  # fmt: skip
    rows, about, notes = list[Row](), {s.key: s.about() for s in chosen}, list[str]()
    for repeat in range(cfg.seeds):
        for row in measure_all(bench, [Backbone(s.key, s.arch) for s in chosen], vocabulary(cfg)):
            given = {k: row.get(k) for k in ("ttft_ms", "answer_ms", "peak_bytes", "state_bytes")}
            rows.append({"arch": row["backbone"], "length": row["documents"], "repeat": repeat, **given})
            notes += [f"{row['backbone']}, {row['documents']} documents: killed."] if "left_out" in row else []
    for name in map(str, cfg.plan):
        key = f"planned {Path(name).stem}"
        about[key] = Stack(key, load_config(BenchArchConfig, [config_path(name)])).about("planned")
        for row in plan(bench, name, DEFAULT_VOCAB):
            rows.append({"arch": key, "length": row["rows"], "fits": max(0, row["fits"])})
            print(f"context: {key}, {row['rows']} conversations: {row['fits']:,} documents fit", flush=True)
    return rows, about, list(dict.fromkeys(notes))


def rag_rows(cfg: BenchClaimsConfig, stacks: list[Stack]) -> Found:
    """Every question's outcome with retrieved documents, and of the chat model of the same tag without."""
    flags = [f"--knowledge_base={cfg.knowledge_base}", f"--max_problems={cfg.questions}", f"--dtype={cfg.dtype}"]
    ask, device = load_config(RagEvalConfig, flags), pick_device(cfg.device)
    kb, found = open_data(ask)
    questions = [question_from(row, f"{n}") for n, row in enumerate(found, 1)]
    evidence = gather(questions, kb, ask.top_k, None, 0, ask.seed)
    rows, about = list[Row](), dict[str, Row]()
    for tag in map(str, cfg.rag_tags or [""]):
        model = load_reader(ask, device, "rag", tag or None, None)
        baseline = load_reader(ask, device, ask.baseline, model.tag, None)
        runs = run_conditions(ask, questions, baseline, {"closed_book": evidence.documents("closed_book")})
        runs |= run_conditions(ask, questions, model, {"rag": evidence.documents("rag")})
        shape = model.model.config
        names = entry_names(shape.block_pattern, shape.n_layer)
        about[model.name] = {"kind": "rag", "blocks": f"{model.tag}: {compact(names)}", "match": "", "group": model.tag}
        rows.append({"arch": model.name, "questions": len(questions), "values": outcomes(runs)})
    return rows, about, [f"{len(questions)} questions, those of all checkpoints; baseline: the {ask.baseline} model."]


def outcomes(runs: dict[str, list[Prediction]]) -> dict[str, dict[str, list[float]]]:
    """Metric -> condition -> 0 or 1 for each question."""
    surest = dict(zip(("rag", "closed_book"), equal_coverage(runs["rag"], runs["closed_book"]), strict=True))

    def each(found: dict[str, list[Prediction]], metric: str) -> dict[str, list[float]]:
        return {name: [p.values[metric] or 0.0 for p in run] for name, run in found.items()}

    return {m: each(runs, m) for m in ("accuracy", "hallucination")} | {
        "hallucination_equal": each(surest, "hallucination")
    }


PARTS: dict[str, Callable[[BenchClaimsConfig, list[Stack]], Found]] = {
    "train": train_rows, "length": length_rows, "decode": decode_rows, "memory": memory_rows,
    "recall": recall_rows, "context": context_rows, "rag": rag_rows,
}  # fmt: skip


# ---- putting it together ----


def vocabulary(cfg: BenchClaimsConfig) -> int:
    return Tokenizer.load().vocab_size if (base_dir() / "tokenizer").exists() else cfg.vocab_size


def run_part(cfg: BenchClaimsConfig, part: str, stacks: list[Stack]) -> Path:
    """Measure and write <part>_<device>.json."""
    device, start = pick_device(cfg.device), time.perf_counter()
    rows, about, notes = PARTS[part](cfg, stacks)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type if device.type != "cpu" else ""
    result = {
        "part": part, "where": "CPU" if device.type == "cpu" else "GPU", "gpu": gpu, "machine": machine_info(),
        "device": describe_device(device, pick_dtype(cfg.dtype, device)), "git": git_state(),
        "command": shlex.join(["python", *sys.orig_argv[1:]]), "versions": {"torch": torch.__version__},
        "config": dataclasses.asdict(cfg), "seconds": time.perf_counter() - start, "stacks": about, "notes": notes,
        "rows": rows,
    }  # fmt: skip
    path = cfg.folder() / f"{part}_{device.type}.json"
    write_json(path, result)
    print(f"{part}: {result['seconds']:.0f} s, wrote {path}", flush=True)
    return path


def write_page(docs: Path, results: Results) -> None:
    """The page, and beside it a picture for each kind of device."""
    pictures = [draw(results, where, docs.with_name(f"{docs.stem}_{where.lower()}.png")) for where in ("CPU", "GPU")]
    drawn = [p.name for p in pictures if p is not None]
    with atomic_write(docs, "w") as f:
        f.write(page(results, drawn))
    print(f"wrote {', '.join([str(docs), *drawn])}")


def main(argv: list[str]) -> None:
    files = [a for a in argv if a.endswith(".py") and not a.startswith("-")]
    cfg = load_config(BenchClaimsConfig, [a for a in argv if a not in files])
    if cfg.write_docs:
        write_page(Path(cfg.docs), read_results(cfg.folder()))
        return
    if {"train", "length"} & set(cfg.parts):  # an error now, not after other parts
        Tokenizer.load(), shard_paths("train"), shard_paths("val")
    device = pick_device(cfg.device)
    print(describe_device(device, pick_dtype(cfg.dtype, device)))
    stacks = stacks_of(cfg, files or [config_path(name) for name in TINY], vocabulary(cfg))
    for part in [p for p in PARTS if p in cfg.parts]:
        run_part(cfg, part, stacks)
    results = read_results(cfg.folder())
    text, where = (
        page(results).split("## Verdicts")[1].split("\n## ")[0].strip(),
        "CPU" if device.type == "cpu" else "GPU",
    )
    print(f"\n{text}\n")
    picture = draw(results, where, report_dir() / f"claims_{where.lower()}.png")
    log_stage("claims", headline(results), text=text, plots=[picture] if picture else [])
    print("docs/benchmarks.md from these results: python -m scripts.bench_claims --write-docs")


if __name__ == "__main__":
    run_script(main)
