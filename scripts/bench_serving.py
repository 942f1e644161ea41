"""The server under load: throughput and latency beside `transformers`, and whether every answer is the right one.

    python -m scripts.bench_serving                            # the sft model
    python -m scripts.bench_serving --random_model --parts=sweep,peer --dtype=float32

The server is scripts.chat_web as a process of its own, on loopback; this process is its clients, on the same cores.
Parts:
  sweep        clients that ask again as soon as they are answered, and with --rates requests that come at random
  whole        the same requests, each answered in one piece as generate() answers, not token by token in a stream
  peer         the same requests in static batches of transformers' generate(), between the repeats of the sweep
  engine       and of our engine in this process, without server and HTTP: what the peer's figures are to be set beside
  clients      many clients for a while: each answer is compared with the greedy one of the offline engine
  disconnects  clients that leave in the middle of a stream: no row may stay
Answers are `even`, all max_tokens long, or `spread`: lengths of an exponential distribution of that mean, as in chats.
Clients and disconnects are in float32, in which the offline answer is exact; questions whose answer hangs on two ids
nearer than MARGIN are left out. Writes <base dir>/bench/serving.{json,png}.
"""

import asyncio
import contextlib
import dataclasses
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import psutil
import torch

from nanochat.checkpoint import checkpoint_dir, load_model, save_checkpoint
from nanochat.common import REPO_DIR, base_dir, git_state, machine_info, run_script, write_json
from nanochat.config import UserError, load_config
from nanochat.device import DTYPES, describe_device, pick_dtype
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.serving.reply import reply_text
from nanochat.tokenizer import Tokenizer
from scripts.bench_serving_load import Bodies, Level, clients_check, closed_loop, disconnects_check, figures, poisson
from scripts.bench_serving_peer import Offline, Peer
from scripts.bench_serving_peer import closed_loop as static_loop
from scripts.bench_serving_report import check_lines, plot, ratios, table

PARTS = ("sweep", "whole", "peer", "engine", "clients", "disconnects")
MARGIN = 1e-3  # between the best two logits; rounding of batched float32 products stays below 1e-4
CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class BenchServingConfig:
    """The server under load, beside transformers."""

    SHORT: ClassVar = {"i": "source", "g": "model_tag", "s": "step", "d": "dtype"}

    parts: Annotated[list[str], "of sweep, whole, peer, engine, clients, disconnects"] = dataclasses.field(
        default_factory=lambda: list(PARTS)
    )
    source: Annotated[Literal["base", "mid", "sft", "rl", "rag", "refrag"], "-i: stage"] = "sft"
    model_tag: Annotated[str | None, "-g: folder of the model; None = the one saved last"] = None
    step: Annotated[int | None, "-s: checkpoint step; None = the newest"] = None
    random_model: Annotated[bool, "a model with random weights, of the next five keys"] = False
    depth: Annotated[int, "layers"] = 4
    d_model: Annotated[int, "width"] = 256
    n_head: Annotated[int, "attention heads"] = 4
    vocab_size: Annotated[int, "ids in the vocabulary"] = 8192
    block_pattern: Annotated[list | str | None, "blocks, tiled to depth; None = attention"] = None
    clients_at_once: Annotated[list[int], "of the closed loop, one level each"] = dataclasses.field(
        default_factory=lambda: [1, 2, 4, 8, 16, 32]
    )
    rates: Annotated[list[float], "requests a second of the open loop, one level each"] = dataclasses.field(
        default_factory=list
    )
    lengths: Annotated[list[str], "of answers: even, spread"] = dataclasses.field(
        default_factory=lambda: ["even", "spread"]
    )
    seconds: Annotated[float, "for each level and repeat"] = 10.0
    repeats: Annotated[int, "of every level, ours and the peer's in turn"] = 3
    prompt_tokens: Annotated[int, "ids of a prompt; no two prompts are alike"] = 64
    max_tokens: Annotated[int, "ids of an answer, or their mean"] = 64
    clients: Annotated[int, "at once, part clients"] = 200
    client_seconds: Annotated[float, "of part clients"] = 60.0
    disconnects: Annotated[int, "of part disconnects"] = 100
    dtype: Annotated[str, "-d: of sweep and peer: auto, float32 or bfloat16"] = "auto"
    threads: Annotated[int, "of the server and of the peer; 0 = as many as there are cores"] = 0

    def __post_init__(self) -> None:
        wrong = [*(p for p in self.parts if p not in PARTS), *(n for n in self.lengths if n not in ("even", "spread"))]
        if wrong:
            raise ValueError(f"{wrong[0]!r}: parts are {', '.join(PARTS)}, lengths even and spread")
        counts = (self.seconds, self.repeats, self.prompt_tokens, self.max_tokens, self.clients, self.client_seconds)
        if min(*counts, *(clients or rate or 0 for clients, rate in self.loads)) <= 0:
            raise ValueError("seconds, repeats, prompt_tokens, max_tokens, clients and rates must be above 0")
        if {"whole", "peer", "engine"} & set(self.parts) and "sweep" not in self.parts:
            raise ValueError("whole, peer and engine go with sweep: their figures are taken between those of the sweep")

    @property
    def loads(self) -> list[tuple[int | None, float | None]]:
        """(clients, None) of the closed loop, (None, rate) of the open one."""
        return [*((int(c), None) for c in self.clients_at_once), *((None, float(r)) for r in self.rates)]


@dataclasses.dataclass(frozen=True)
class Served:
    """A checkpoint, and the same model here."""

    base: Path
    flags: list[str]
    model: GPT
    tokenizer: Tokenizer
    name: str


@contextlib.contextmanager
def served(cfg: BenchServingConfig) -> Iterator[Served]:
    if not cfg.random_model:
        model, tokenizer, meta = load_model(cfg.source, CPU, cfg.model_tag, cfg.step)
        flags = [f"--source={cfg.source}", *([f"--model_tag={cfg.model_tag}"] if cfg.model_tag else [])]
        flags += [f"--step={cfg.step}"] if cfg.step is not None else []
        yield Served(base_dir(), flags, model, tokenizer, f"{cfg.source} {cfg.model_tag or ''} step {meta.get('step')}")
        return
    model, tokenizer = random_model(cfg)
    with tempfile.TemporaryDirectory(prefix="bench-serving-") as name, _base_dir(Path(name)) as folder:
        tokenizer.save(folder / "tokenizer")
        meta = {"model_config": dataclasses.asdict(model.config), "tokenizer_hash": tokenizer.hash}
        save_checkpoint(checkpoint_dir("sft", "random"), 1, model=model.state_dict(), optim=None, state={}, meta=meta)
        yield Served(folder, ["--source=sft"], model, tokenizer, "random weights")


@contextlib.contextmanager
def _base_dir(folder: Path) -> Iterator[Path]:
    before = os.environ.get("NANOCHAT_BASE_DIR")
    os.environ["NANOCHAT_BASE_DIR"] = str(folder)
    try:
        yield folder
    finally:
        os.environ.pop("NANOCHAT_BASE_DIR")
        if before is not None:
            os.environ["NANOCHAT_BASE_DIR"] = before


def random_model(cfg: BenchServingConfig) -> tuple[GPT, Tokenizer]:
    """Blocks that all say something, and no special token that greedy decoding picks: answers have their length."""
    tokenizer = Tokenizer.train([" ".join(words(5 * cfg.vocab_size))], cfg.vocab_size)
    seq_len = 2 * max(256, cfg.prompt_tokens + 4 * cfg.max_tokens)
    model = GPT(
        GPTConfig(
            n_layer=cfg.depth, block_pattern=cfg.block_pattern, d_model=cfg.d_model, n_head=cfg.n_head,
            vocab_size=tokenizer.vocab_size, seq_len=seq_len,
        )
    )  # fmt: skip
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn(p.shape, generator=generator) * cfg.d_model**-0.5
        model.head.weight[list(tokenizer.special_ids.values())] = 0  # a logit of 0, below the best of the others
    return model.eval(), tokenizer


def words(n: int) -> list[str]:
    """Of syllables; the same ones every time."""
    rng = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    return ["".join(rng.choices(syllables, k=rng.randrange(1, 5))) for _ in range(n)]


class Server:
    """scripts.chat_web in a process of its own; its resident memory is sampled while it runs."""

    def __init__(self, model: Served, threads: int, *flags: str) -> None:
        argv = [sys.executable, "-m", "scripts.chat_web", "--port=0", "--device=cpu", *model.flags, *flags]
        env = {**os.environ, "NANOCHAT_BASE_DIR": str(model.base), "OMP_NUM_THREADS": str(threads)}
        env.pop("NANOCHAT_API_KEY", None)
        self.process = subprocess.Popen(argv, cwd=REPO_DIR, env=env, text=True, stdout=subprocess.PIPE)
        self.port, self.said = 0, list[str]()
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line.strip())
            if found := re.search(r" at http://\S+:(\d+)$", line.rstrip()):
                self.port = int(found[1])
                break
        if not self.port:
            raise UserError(f"the server did not start: {' '.join(self.said) or 'see above'}")
        self.memory_mb: list[float] = []
        self.ending = threading.Event()
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.process.pid)
            while not self.ending.is_set():
                self.memory_mb.append(round(process.memory_info().rss / 2**20, 1))
                self.ending.wait(0.25)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *error: Any) -> None:
        self.ending.set()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


# ---- parts ----


def bodies(cfg: BenchServingConfig, lengths: str, vocab_size: int, seq_len: int, seed: int) -> Bodies:
    """Requests of /v1/completions without end: ids of ordinary tokens, greedy."""
    rng = random.Random(seed)
    room = seq_len - cfg.prompt_tokens
    if room < 1:
        raise UserError(f"prompt_tokens={cfg.prompt_tokens} fill the context of {seq_len}: lower it")
    while True:
        n = cfg.max_tokens if lengths == "even" else 1 + int(rng.expovariate(1 / cfg.max_tokens))
        prompt = [rng.randrange(vocab_size) for _ in range(cfg.prompt_tokens)]
        yield {
            "prompt": prompt, "max_tokens": min(n, 4 * cfg.max_tokens, room), "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip


def unstreamed(body: dict[str, Any]) -> dict[str, Any]:
    return {**{key: value for key, value in body.items() if key != "stream_options"}, "stream": False}


def sweep(cfg: BenchServingConfig, model: Served) -> list[dict[str, Any]]:
    """Rows of figures: every level, ours and the peer's."""
    config, dtype = model.model.config, pick_dtype(cfg.dtype, CPU)
    ordinary = model.tokenizer.vocab_size - len(model.tokenizer.special_ids)
    peer = Peer(config, model.model.n_params()["total"], dtype) if "peer" in cfg.parts else None
    if peer is not None:
        print(f"transformers: a Llama of {peer.n_params / 1e6:.1f}M parameters, {str(dtype)[6:]}", flush=True)
    static = {"transformers": peer.batch} if peer is not None else {}
    if "engine" in cfg.parts:
        static["engine"] = Offline(model.model, model.tokenizer, dtype).batch
    online = ("ours", "whole") if "whole" in cfg.parts else ("ours",)
    rows = []
    most = max(32, *(clients or 0 for clients, _ in cfg.loads))
    with Server(model, n_threads(cfg), f"--dtype={cfg.dtype}", f"--max_rows={most}", "--max_queue=256") as server:
        print("\n".join(server.said), flush=True)
        for lengths in cfg.lengths:
            found: dict[tuple[str, int | None, float | None], list[Level]] = {}
            for repeat in range(-1, cfg.repeats):  # the first is not counted, and short
                seconds = cfg.seconds if repeat >= 0 else min(1.0, cfg.seconds)
                for clients, rate in cfg.loads:
                    asked = bodies(cfg, lengths, ordinary, config.seq_len, 1000 * (repeat + 1) + (clients or 999))
                    for name in (*online, *(static if clients is not None else ())):
                        if name in online:
                            given = asked if name == "ours" else map(unstreamed, asked)
                            level = asyncio.run(_offer(server.port, given, clients, rate, seconds, repeat))
                        else:
                            assert clients is not None
                            level = static_loop(static[name], asked, clients, seconds)
                        if repeat >= 0:
                            found.setdefault((name, clients, rate), []).append(level)
            rows += [
                {"lengths": lengths, "clients": clients, "rate": rate, "server": name, **figures(levels)}
                for (name, clients, rate), levels in found.items()
            ]
    return rows


async def _offer(port: int, asked: Bodies, clients: int | None, rate: float | None, seconds: float, seed: int) -> Level:
    if rate is not None:
        return await poisson(port, asked, rate, seconds, seed + 1)
    assert clients is not None
    return await closed_loop(port, asked, clients, seconds)


@torch.inference_mode()
def known_answers(model: GPT, tokenizer: Tokenizer, n: int, max_tokens: int) -> list[tuple[str, list[str]]]:
    """(question, its greedy answer at each length 1..max_tokens) of n questions at most: those that hang on rounding
    (MARGIN) are left out."""
    model.set_compute(DTYPES["float32"])
    engine, rng = Engine(model, tokenizer, max_context=model.config.seq_len), random.Random(1)
    vocabulary = words(500)
    questions = [" ".join(rng.choices(vocabulary, k=rng.randrange(1, 12))) for _ in range(n)]
    found = []
    for i in range(0, n, 16):
        some = questions[i : i + 16]
        prompts = [tokenizer.render_for_completion({"messages": [{"role": "user", "content": q}]}) for q in some]
        rows, masks = engine.generate_batch(prompts, max_tokens=max_tokens, temperature=0)
        for question, prompt, row, mask in zip(some, prompts, rows, masks, strict=True):
            best = model(torch.tensor([row]))[0, len(prompt) - 1 :].topk(2).values  # (answer + 1, 2)
            sampled = torch.tensor([*mask[len(prompt) :], 1])[: len(best)]
            gaps = (best[:, 0] - best[:, 1])[sampled == 1]
            if float(gaps.min()) >= MARGIN:
                said = row[len(prompt) :]
                answers = [reply_text(tokenizer, said[:k]) for k in range(1, max_tokens + 1)]
                found.append((question, answers))
    return found


def check_clients(cfg: BenchServingConfig, model: Served, server: Server) -> dict[str, Any]:
    n_questions, max_tokens = 96, min(48, model.model.config.seq_len // 4)
    known = known_answers(model.model, model.tokenizer, n_questions, max_tokens)
    if not known:
        raise UserError("every question's answer hangs on rounding: no answer can be checked with this model")

    def body_of(client: int, turn: int) -> tuple[dict[str, Any], str]:
        rng = random.Random(f"{client} {turn}")
        (question, answers), n = rng.choice(known), rng.randrange(8, max_tokens + 1) if max_tokens > 8 else max_tokens
        body = {"messages": [{"role": "user", "content": question}], "max_tokens": n, "temperature": 0}
        stream = {"stream": True, "stream_options": {"include_usage": True}} if rng.random() < 0.5 else {}
        return {**body, **stream}, answers[n - 1]

    before = len(server.memory_mb)
    found = asyncio.run(clients_check(server.port, cfg.clients, cfg.client_seconds, body_of))
    time.sleep(0.5)
    memory = server.memory_mb[before - 1 :]
    sizes = {"memory_start_mb": memory[0], "memory_max_mb": max(memory), "memory_end_mb": memory[-1]}
    return {
        "clients": cfg.clients, "seconds": cfg.client_seconds, **found, "questions": len(known),
        "questions_left_out": n_questions - len(known), **sizes,
    }  # fmt: skip


def check_disconnects(cfg: BenchServingConfig, model: Served, server: Server) -> dict[str, Any]:
    body = {
        "messages": [{"role": "user", "content": "write a long text"}], "max_tokens": model.model.config.seq_len,
        "temperature": 1.0, "stream": True,
    }  # fmt: skip
    return asyncio.run(disconnects_check(server.port, cfg.disconnects, body))


def n_threads(cfg: BenchServingConfig) -> int:
    return cfg.threads or len(os.sched_getaffinity(0))


def main(argv: list[str]) -> None:
    cfg = load_config(BenchServingConfig, argv)
    torch.set_num_threads(n_threads(cfg))
    print(describe_device(CPU, pick_dtype(cfg.dtype, CPU)), flush=True)
    out = base_dir() / "bench"
    result: dict[str, Any] = {"config": dataclasses.asdict(cfg), "machine": machine_info(), **git_state()}
    with served(cfg) as model:
        size = model.model.n_params()["total"] / 1e6
        result["model"] = {"name": model.name, **dataclasses.asdict(model.model.config)}
        title = f"{model.name.strip()}, {size:.1f}M parameters, {n_threads(cfg)} threads, {cfg.dtype}"
        if "sweep" in cfg.parts:
            result["rows"] = sweep(cfg, model)
            print("\n".join([table(result["rows"]), *ratios(result["rows"])]), flush=True)
            plot(result["rows"], title, out / "serving.png")
        checks = {"clients": check_clients, "disconnects": check_disconnects}
        if wanted := [name for name in checks if name in cfg.parts]:
            with Server(model, n_threads(cfg), "--dtype=float32") as server:
                for name in wanted:
                    result[name] = checks[name](cfg, model, server)
                    print(check_lines(name, result[name]), flush=True)
    write_json(out / "serving.json", result)
    print(f"wrote {out / 'serving.json'}" + (" and serving.png" if "sweep" in cfg.parts else ""))


if __name__ == "__main__":
    run_script(main)
