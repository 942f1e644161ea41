"""Time to the first token over compressed documents, on random weights: the same model reading all tokens, beside it.

    python -m scripts.bench_compress                     # depth 6, width 256, 2 of 3 layers Mamba, 512 .. 8192 tokens
    python -m scripts.bench_compress --block_pattern=attn --chunk_tokens=16 --p=0

tokens: the whole prompt, as plain RAG. cached: chunk vectors from the cache. encoded: the encoder runs for every chunk.
all in: the search, rendering, cutting, the policy and its features, cached vectors; of these, tokens pays nothing.
Documents are articles of the invented world, joined to doc_length tokens each; question, numbers and titles stay
tokens. A share p of chunks is expanded. Repeats of the variants are interleaved; medians. Writes
<base dir>/bench/compress.{json,png}, with the bytes of decoding state (as on a GPU) after prompts of both kinds.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from nanochat.common import atomic_write, base_dir, git_state, machine_info, run_script, write_json
from nanochat.compress.chunks import Prompt, make_prompt, mix
from nanochat.compress.reader import Reader, build_cache
from nanochat.config import load_config
from nanochat.device import describe_device, pick_device, pick_dtype, synchronize
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.plots import figure_of, png_bytes
from nanochat.rag import question_conversation
from nanochat.report import aligned_table
from nanochat.retrieval import Document, KnowledgeBase
from nanochat.tokenizer import Tokenizer
from nanochat.world import World
from tasks.world import world_documents

QUESTION = "Who is the mayor of the town in which the founder of the Hiren Society was born?"
VARIANTS = ("tokens", "cached", "encoded", "all in")


@dataclass(frozen=True)
class BenchCompressConfig:
    """Time to the first token over compressed documents, on random weights."""

    depth: Annotated[int, "layers"] = 6
    d_model: Annotated[int, "width"] = 256
    n_head: Annotated[int, "attention heads"] = 2
    vocab_size: Annotated[int, "ids in the vocabulary"] = 4096
    block_pattern: Annotated[list | str | None, "blocks, tiled to depth; None = attention"] = "2*mamba+attn"
    chunk_tokens: Annotated[int, "tokens of a chunk at most"] = 32
    encoder_layers: Annotated[int, "blocks of the chunk encoder; 0 = a sixth of depth, at least 1"] = 0
    p: Annotated[float, "share of chunks that stay tokens"] = 0.1
    lengths: Annotated[list, "tokens of a prompt, about"] = (512, 1024, 2048, 4096, 8192)  # pyrefly: ignore
    doc_length: Annotated[int, "tokens of a document"] = 256
    repeats: Annotated[int, "timed runs of each; one more runs first, untimed"] = 3
    dtype: Annotated[str, "auto, float32, bfloat16"] = "auto"
    device: Annotated[str, "cpu, cuda, ...; '' = the best there is"] = ""


def documents(tokenizer: Tokenizer, doc_length: int, n: int) -> Iterator[Document]:
    """n documents of about doc_length ids, of whole articles."""
    title, texts, size = "", list[str](), 0
    for article in world_documents(World(0, 40 * n)):
        title = title or article.title
        texts.append(article.text)
        size += len(tokenizer.encode_ordinary(article.text))
        if size >= doc_length:
            yield Document(article.id, " ".join(texts), title)
            title, texts, size, n = "", [], 0, n - 1
        if not n:
            return


def make_reader(cfg: BenchCompressConfig, device: torch.device) -> Reader:
    tokenizer = Tokenizer.train((d.text for d in world_documents(World(1, 500))), cfg.vocab_size)
    config = GPTConfig(
        n_layer=cfg.depth, block_pattern=cfg.block_pattern, d_model=cfg.d_model, n_head=cfg.n_head,
        vocab_size=tokenizer.vocab_size, seq_len=2 * max(map(int, cfg.lengths)),
    )  # fmt: skip
    model = GPT(config)
    model.init_weights(0)
    model.to(device).eval().set_compute(pick_dtype(cfg.dtype, device))
    reader = Reader.new(model, tokenizer, cfg.chunk_tokens, cfg.encoder_layers)
    reader.encoder.eval()
    return reader


def ask(reader: Reader, kb: KnowledgeBase, k: int) -> Prompt:
    """The search for the question, its prompt, cut."""
    shown = [{"title": hit.document.title, "text": hit.chunk.text} for hit in kb.search(QUESTION, k=k)]
    messages = [*question_conversation(QUESTION, shown)["messages"], {"role": "assistant", "content": "."}]
    return make_prompt(reader.tokenizer, {"messages": messages, "answers": []}, reader.k)


def first_token(reader: Reader, prompt: Prompt, expanded: list[int]) -> int:
    """Read the mixed prompt, sample one id -> the places it took."""
    ids, mask, slots = mix(prompt, expanded, reader.chunk_id)
    ids = ids[: mask.index(1)]
    with torch.inference_mode():
        vectors = [reader.vectors([prompt.chunk_ids(i) for i in slots])] if slots else None
    engine = Engine(reader.model, reader.tokenizer, tools=())
    next(engine.generate(ids, max_tokens=1, temperature=0, vectors=vectors))
    return len(ids)


def variants(cfg: BenchCompressConfig, reader: Reader, kb: KnowledgeBase, k: int) -> dict[str, Callable[[], int]]:
    """Name -> one run, which returns how many places the model read."""
    prompt, cache = ask(reader, kb, k), build_cache(reader, kb)
    [chosen] = reader.choose("rl", [prompt], cfg.p)

    def run(cached: bool) -> int:
        reader.cache = cache if cached else None
        return first_token(reader, prompt, chosen)

    def all_in() -> int:
        reader.cache = cache
        asked = ask(reader, kb, k)
        return first_token(reader, asked, reader.choose("rl", [asked], cfg.p)[0])

    whole = list(range(len(prompt.chunks)))
    calls = (lambda: first_token(reader, prompt, whole), lambda: run(True), lambda: run(False), all_in)
    return dict(zip(VARIANTS, calls, strict=True))


def measure(cfg: BenchCompressConfig, device: torch.device, folder: Path) -> list[dict[str, Any]]:
    """A row for each length and variant."""
    reader, rows = make_reader(cfg, device), list[dict[str, Any]]()
    most = max(1, round(max(map(int, cfg.lengths)) / cfg.doc_length))
    kb = KnowledgeBase.build(documents(reader.tokenizer, cfg.doc_length, 2 * most), folder / "kb", retriever="bm25")
    for length in map(int, cfg.lengths):
        runs = variants(cfg, reader, kb, max(1, round(length / cfg.doc_length)))
        seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
        places = {name: run() for name, run in runs.items()}
        for _ in range(cfg.repeats):
            for name, run in runs.items():
                synchronize(device)
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
        median = {name: statistics.median(taken) for name, taken in seconds.items()}
        for name in VARIANTS:
            rows.append({
                "tokens": places["tokens"], "variant": name, "places": places[name],
                "ttft_ms": round(1e3 * median[name], 2), "best_ms": round(1e3 * min(seconds[name]), 2),
                "times_faster": round(median["tokens"] / median[name], 2),
                "state_bytes": reader.model.state_bytes(places[name]),
            })  # fmt: skip
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    head = ["tokens", "variant", "places", "TTFT ms", "best ms", "times faster", "state KB"]
    lines = [[str(r["tokens"]), r["variant"], str(r["places"]), f"{r['ttft_ms']:.1f}", f"{r['best_ms']:.1f}",
              f"{r['times_faster']:.2f}", f"{r['state_bytes'] / 1024:.0f}"] for r in rows]  # fmt: skip
    return aligned_table([head, *lines])


def plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Milliseconds over tokens, a line per variant."""
    figure, [ax] = figure_of(1)
    for name in VARIANTS:
        own = [r for r in rows if r["variant"] == name]
        ax.plot([r["tokens"] for r in own], [r["ttft_ms"] for r in own], marker="o", label=name)
    ax.set(xlabel="tokens of the whole prompt", ylabel="time to first token (ms)", title=title)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.legend(frameon=False)
    with atomic_write(path) as f:
        f.write(png_bytes(figure))


def main(argv: list[str]) -> None:
    cfg = load_config(BenchCompressConfig, argv)
    device = pick_device(cfg.device)
    print(describe_device(device, pick_dtype(cfg.dtype, device)))
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(cfg, device, Path(folder))
    print(table(rows))
    out = base_dir() / "bench"
    write_json(out / "compress.json", {"config": asdict(cfg), "machine": machine_info(), **git_state(), "rows": rows})
    name = cfg.block_pattern if isinstance(cfg.block_pattern, str) else "attention"
    plot(rows, f"{name}, depth {cfg.depth}, k={cfg.chunk_tokens}, p={cfg.p:g}", out / "compress.png")
    print(f"wrote {out / 'compress.json'} and compress.png")


if __name__ == "__main__":
    run_script(main)
