"""Pretrain a base model on packed text.

python -m scripts.base_train configs/tiny_transformer.py
torchrun --standalone --nproc_per_node=8 -m scripts.base_train configs/transformer_d20.py --device_batch_size=16
Several hosts, sharded models, another number of ranks: docs/scaling.md.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from nanochat.blocks import entry_names
from nanochat.checkpoint import checkpoint_meta
from nanochat.common import run_script
from nanochat.config import UserError, changed_keys, load_config
from nanochat.core_bundle import CORE_TASKS
from nanochat.core_eval import GPTScorer, core, evaluate_core, shared_core_folder
from nanochat.dataloader import Batch, PackedLoader, document_index, val_windows
from nanochat.dataset import shard_paths
from nanochat.device import Ranks, gathered, lost_ranks, shard_model
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.loss_eval import evaluate_bpb
from nanochat.optim import MuonAdamW, check_training
from nanochat.report import log_stage, plot_metrics
from nanochat.run import Run
from nanochat.tokenizer import Tokenizer
from nanochat.train import Loop, compile_model, forwards_per_step, make_optimizer, memory_advice

PROMPTS = ("The capital of", "The river", "She was born in", "If yesterday was Friday, then tomorrow is")


@dataclass(frozen=True)
class BaseTrainConfig:
    """Pretrain a base model. Sizes are counts, lengths are tokens, rates are per step."""

    # the model
    depth: Annotated[int, "layers; the width follows: depth * aspect_ratio"] = 20
    aspect_ratio: Annotated[int, "d_model per layer"] = 64
    d_model: Annotated[int, "width; 0 = depth * aspect_ratio"] = 0
    head_dim: Annotated[int, "channels of a head; n_head = d_model / head_dim, rounded up to divide"] = 128
    n_head: Annotated[int, "heads; 0 = from head_dim"] = 0
    n_kv_head: Annotated[int, "key/value heads; 0 = n_head"] = 0
    block_pattern: Annotated[list | str | None, "block of each layer, tiled to depth (docs/blocks.md); none = attn"] = (
        None
    )
    max_seq_len: Annotated[int, "context length of training"] = 2048
    mlp_ratio: Annotated[int, "hidden width of the MLP / d_model"] = 4
    softcap: Annotated[float, "cap of the logits; 0 = none"] = 15.0
    rope_base: Annotated[float, "base of the rotary frequencies"] = 10000.0
    window_pattern: Annotated[str, "attention layers: L full, S sliding window; tiled, the last is always L"] = "L"
    window: Annotated[int, "tokens an S layer sees; 0 = max_seq_len / 4"] = 0
    attn_conv: Annotated[int, "width of a short causal convolution ahead of attention; 0 = none"] = 0
    value_embeddings: Annotated[bool, "gated token embeddings added to the values of every second layer"] = False
    residual_scalars: Annotated[bool, "learned scale of the residual and of the embedding before each block"] = False
    head_tie: Annotated[float, "share of each normed token embedding in the head (layers.Head); 0 = untied"] = 0.0
    mamba_d_state: Annotated[int, "state size N of a Mamba block"] = 16
    mamba_d_conv: Annotated[int, "width of the convolution, of mamba2 and gdn too"] = 4
    mamba_expand: Annotated[int, "inner width / d_model, of mamba2 too"] = 2
    mamba_use_mlp: Annotated[bool, "an MLP after each mamba, mamba2 or gdn mixer"] = False
    mlp: Annotated[bool | None, "an MLP after every mixer; none = after attention, else as mamba_use_mlp"] = None
    mamba2_d_state: Annotated[int, "state size N of a Mamba-2 head"] = 128
    mamba2_head_dim: Annotated[int, "channels of a Mamba-2 head"] = 64
    mamba2_n_group: Annotated[int, "groups of Mamba-2 heads that share B and C"] = 1
    gdn_head_dim: Annotated[int, "channels of a Gated DeltaNet key"] = 64
    gdn_expand: Annotated[float, "width of all Gated DeltaNet keys / d_model"] = 0.75
    gdn_expand_v: Annotated[int, "channels of a Gated DeltaNet value / of its key"] = 2
    doc_mask: Annotated[bool, "documents packed into a row do not see each other"] = True
    # how long: the first of these that is positive decides
    num_iterations: Annotated[int, "optimizer steps; -1 = from the two below"] = -1
    target_flops: Annotated[float, "total FLOPs to spend; -1 = from the one below"] = -1.0
    target_param_data_ratio: Annotated[float, "tokens per parameter (Chinchilla, arXiv 2203.15556: 20)"] = 20.0
    # the batch
    device_batch_size: Annotated[int, "rows per device and forward"] = 32
    total_batch_size: Annotated[int, "tokens per step, reached by accumulation; 0 = one forward per device"] = 524288
    # the optimizer
    embedding_lr: Annotated[float, "AdamW, embeddings; scaled by (d_model / 768)^-0.5"] = 0.2
    unembedding_lr: Annotated[float, "AdamW, head; scaled alike"] = 0.004
    scalar_lr: Annotated[float, "AdamW, scalars and gates"] = 0.02
    ssm_lr: Annotated[float, "AdamW, what steers a recurrence: A_log, D, dt, convolutions"] = 0.01
    matrix_lr: Annotated[float, "Muon, matrices"] = 0.02
    weight_decay: Annotated[float, "decoupled, matrices only"] = 0.0
    grad_clip: Annotated[float, "largest gradient norm; 0 = no clipping"] = 1.0
    warmup_ratio: Annotated[float, "share of the run over which rates rise"] = 0.0
    warmdown_ratio: Annotated[float, "share of the run over which rates fall"] = 0.2
    final_lr_frac: Annotated[float, "rate at the end / rate at the top"] = 0.0
    # evaluation and output
    eval_every: Annotated[int, "steps between validations; 0 = only at the end, -1 = never"] = 250
    eval_tokens: Annotated[int, "tokens of validation text, fixed windows"] = 20 * 524288
    core_metric_every: Annotated[int, "steps between CORE evaluations; 0 = only at the end, -1 = never"] = -1
    core_metric_max_per_task: Annotated[int, "questions of each CORE task; -1 = all"] = 500
    sample_every: Annotated[int, "steps between samples; 0 = only at the end, -1 = never"] = 2000
    save_every: Annotated[int, "steps between checkpoints; 0 = only at the end, -1 = never"] = 1000
    keep_last: Annotated[int, "checkpoints kept"] = 2
    log_every: Annotated[int, "steps between printed lines where there is no terminal"] = 10
    resume: Annotated[bool, "go on from the newest whole checkpoint of this model_tag"] = False
    run: Annotated[str, "name of the run for the tracker; dummy = no tracking"] = "dummy"
    track: Annotated[Literal["none", "wandb", "trackio"], "tracker"] = "none"
    model_tag: Annotated[str, "name of the checkpoint folder; empty = d<depth>"] = ""
    # the machine
    device: Annotated[str, "cpu, cuda, mps; empty = the best there is"] = ""
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], "multiplication dtype; auto = bfloat16 where native"] = (
        "auto"
    )
    kernels: Annotated[Literal["auto", "fast", "reference"], "which implementations run"] = "auto"
    parallel: Annotated[Literal["ddp", "fsdp"], "of several ranks each holds the model: ddp, or its share: fsdp"] = (
        "ddp"
    )
    compile: Annotated[bool, "torch.compile the model (pays on GPUs; on a CPU see docs/LOG.md)"] = False
    seed: Annotated[int, "of the weights and the data order"] = 42

    def __post_init__(self) -> None:
        if self.compile and self.parallel == "fsdp":
            raise ValueError(
                "--parallel=fsdp does not work with --compile: add --compile=false, or take --parallel=ddp"
            )
        if self.depth < 1 or self.device_batch_size < 1 or self.max_seq_len < 2:
            raise ValueError(
                f"depth={self.depth}, device_batch_size={self.device_batch_size}, max_seq_len={self.max_seq_len}: "
                f"the first two must be at least 1, the last at least 2"
            )
        if self.num_iterations <= 0 and self.target_flops <= 0 and self.target_param_data_ratio <= 0:
            raise ValueError(
                "nothing says how long to train: set --num_iterations, --target_flops or --target_param_data_ratio > 0"
            )
        if min(self.d_model, self.n_head) < 0 or min(self.head_dim, self.aspect_ratio) < 1:
            raise ValueError(
                f"d_model={self.d_model}, n_head={self.n_head}, head_dim={self.head_dim}, aspect_ratio="
                f"{self.aspect_ratio}: the first two must be at least 0, the last two at least 1"
            )
        check_training(self)

    def gpt_config(self, vocab_size: int) -> GPTConfig:
        """The model this configuration describes, for a vocabulary of this size."""
        d_model = self.d_model or self.depth * self.aspect_ratio
        n_head = self.n_head or next(
            h for h in range(max(1, -(-d_model // self.head_dim)), d_model + 1) if d_model % h == 0
        )
        same = {f.name for f in dataclasses.fields(GPTConfig)} & {f.name for f in dataclasses.fields(self)}
        values: dict[str, Any] = {name: getattr(self, name) for name in same}
        values |= {"n_layer": self.depth, "d_model": d_model, "n_head": n_head}
        values |= {"vocab_size": vocab_size, "seq_len": self.max_seq_len}
        return GPTConfig(**values)

    def grad_accum(self, world_size: int) -> int:
        """Forwards per rank and step."""
        return forwards_per_step(self.total_batch_size, self.device_batch_size, self.max_seq_len, world_size)

    def iterations(self, model: GPT, tokens_per_step: int) -> int:
        """Steps of the run."""
        if self.num_iterations > 0:
            return self.num_iterations
        if self.target_flops > 0:
            return max(1, math.ceil(self.target_flops / (model.flops_per_token() * tokens_per_step)))
        return max(1, math.ceil(self.target_param_data_ratio * model.n_params()["total"] / tokens_per_step))

    def make_optimizer(self, model: GPT, dtype: torch.dtype, ranks: Ranks | None = None) -> MuonAdamW:
        return make_optimizer(model, self, dtype, ranks, weight_decay=self.weight_decay)


def build_model(
    config: GPTConfig, device: torch.device, dtype: torch.dtype, kernels: str, seed: int
) -> tuple[GPT, str]:
    """Meta device, then real memory, then weights: no parameter is ever drawn twice. -> (model, kernel choice)."""
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device=device)
    model.init_weights(seed)
    return model, model.set_compute(dtype, kernels)


def main(argv: list[str]) -> None:
    cfg = load_config(BaseTrainConfig, argv)
    tokenizer = Tokenizer.load()
    train_shards, val_shards = shard_paths("train"), shard_paths("val")
    config = cfg.gpt_config(tokenizer.vocab_size)
    tag = cfg.model_tag or f"d{cfg.depth}"
    run = Run.start("base", tag, cfg)
    ranks, T = run.ranks, cfg.max_seq_len
    grad_accum = cfg.grad_accum(ranks.world_size)
    model, kernels = build_model(config, run.device, run.dtype, cfg.kernels, cfg.seed)
    if cfg.parallel == "fsdp" and ranks.world_size > 1:
        shard_model(model, model.layers, run.device)
    tokens_per_step = cfg.total_batch_size or cfg.device_batch_size * T * ranks.world_size
    num_iterations = cfg.iterations(model, tokens_per_step)
    describe(
        run, model, kernels, num_iterations, tokens_per_step, f"{grad_accum} x {cfg.device_batch_size} rows of {T}"
    )
    loop = Loop(
        run, model, cfg.make_optimizer(model, run.dtype, ranks), num_iterations=num_iterations, grad_accum=grad_accum,
        tokens_per_step=tokens_per_step, flops_per_token=model.flops_per_token(), grad_clip=cfg.grad_clip,
        schedule=(cfg.warmup_ratio, cfg.warmdown_ratio, cfg.final_lr_frac), log_every=cfg.log_every,
        keep_last=cfg.keep_last, meta=checkpoint_meta(model, tokenizer, cfg),
    )  # fmt: skip
    batches = open_streams(cfg, run, tokenizer, train_shards, loop.begin_streams(cfg.resume), grad_accum)
    val_x, val_y = (t.to(run.device) for t in val_windows(val_shards, tokenizer, T, cfg.eval_tokens))
    val_doc = document_index(val_x, tokenizer.bos_id) if cfg.doc_mask else None
    forward = compile_model(model) if cfg.compile else model

    samples: list[str] = []
    with batches, memory_advice(cfg.device_batch_size, T), lost_ranks(ranks):
        for step in loop:
            if step.due(cfg.eval_every) or (step.number == 0 and cfg.eval_every >= 0):
                val_bpb = evaluate_bpb(model, val_x, val_y, tokenizer.token_bytes, cfg.device_batch_size, val_doc)
                loop.log(val_bpb=val_bpb)
                loop.meta["val_bpb"] = val_bpb
                loop.meta.setdefault("untrained_val_bpb", val_bpb)
            if step.due(cfg.core_metric_every):
                loop.log(core=core_metric(cfg, model, tokenizer, ranks))
            if step.due(cfg.save_every) and not step.first:
                loop.save(batches.place())
            if step.due(cfg.sample_every):
                with gathered(model):
                    samples = sample(run, model, tokenizer) if ranks.main else []
            if step.last:
                break
            for _ in loop.forwards():
                batch = next(batches)
                loss = forward(batch.x, batch.y, doc=batch.doc if cfg.doc_mask else None, loss_reduction="sum")
                loop.backward(loss, batch.tokens)
            loop.update()
    if ranks.main:
        report(cfg, run, loop, samples)
    run.close()


class Streams:
    """The streams of text this rank reads, one batch of each in turn.

    A run deals its text to as many streams as it began with ranks. On fewer ranks each reads several of them, so that a
    step is made of the same rows.
    """

    def __init__(self, loaders: list[PackedLoader], cursors: list[dict[str, Any]], grad_accum: int) -> None:
        if grad_accum % len(loaders):
            raise UserError(
                f"this run began with more ranks, so each of these reads {len(loaders)} streams of its text, but makes "
                f"{grad_accum} forwards a step: set --total_batch_size to the tokens of a step of that run"
            )
        self.loaders, self.turn = loaders, 0
        self.places: list[Callable[[], dict[str, Any]]] = [lambda c=c: c for c in cursors]

    def __next__(self) -> Batch:
        turn, self.turn = self.turn, (self.turn + 1) % len(self.loaders)
        batch = next(self.loaders[turn])
        self.places[turn] = batch.cursor
        return batch

    def place(self) -> dict[str, Any]:
        """For Loop.save: where each stream goes on."""
        return {"streams": [place() for place in self.places]}

    def __enter__(self) -> "Streams":
        return self

    def __exit__(self, *_: object) -> None:
        for loader in self.loaders:
            loader.close()


def open_streams(
    cfg: BaseTrainConfig, run: Run, tokenizer: Tokenizer, shards: list[Path], cursors: list[dict[str, Any]],
    grad_accum: int,
) -> Streams:  # fmt: skip
    """This rank's streams: from the cursors of those it reads on, or, without any, one from the beginning."""
    loaders = []
    for cursor in cursors or [None]:
        dealt = cursor or {"rank": run.ranks.rank, "world_size": run.ranks.world_size}
        loaders.append(
            PackedLoader(
                shards, tokenizer, cfg.device_batch_size, cfg.max_seq_len, device=run.device, cursor=cursor,
                rank=dealt["rank"], world_size=dealt["world_size"],
            )
        )  # fmt: skip
    return Streams(loaders, cursors or [{}], grad_accum)


def describe(run: Run, model: GPT, kernels: str, steps: int, tokens_per_step: int, forwards: str) -> None:
    """What is about to be trained, in four lines."""
    n, flops = model.n_params(), model.flops_per_token() / 1e6
    parts = ", ".join(f"{n[part] / 1e6:.2f}M {part}" for part in ("embedding", "head", "blocks"))
    ratio = steps * tokens_per_step / n["total"]
    run.print(f"kernels: {kernels}")
    run.print(f"blocks: {' '.join(entry_names(model.config.block_pattern, model.config.n_layer))}")
    run.print(f"model: {n['total'] / 1e6:.2f}M parameters ({parts}), {flops:.1f} MFLOP per token")
    run.print(f"training: {steps} steps of {tokens_per_step} tokens ({forwards}), {ratio:.1f} tokens per parameter")


def core_metric(cfg: BaseTrainConfig, model: GPT, tokenizer: Tokenizer, ranks: Ranks) -> float:
    """CORE of the model as it stands, over the tasks that have data."""
    model.eval()
    scorer, folder = GPTScorer(model, tokenizer), shared_core_folder(ranks, model.device)
    with gathered(model):
        scores = evaluate_core(scorer, folder, CORE_TASKS, cfg.core_metric_max_per_task, ranks=ranks)
    model.train()
    return core(scores)[0]


def sample(run: Run, model: GPT, tokenizer: Tokenizer) -> list[str]:
    """Greedy continuations of the fixed prompts, printed."""
    prompts = [[tokenizer.bos_id, *tokenizer.encode(p)] for p in PROMPTS]
    model.eval()
    rows, _ = Engine(model, tokenizer).generate_batch(prompts, max_tokens=16, temperature=0.0)
    model.train()
    texts = [tokenizer.decode(row[1:]) for row in rows]
    for text in texts:
        run.print(f"sample: {text!r}")
    return texts


def report(cfg: BaseTrainConfig, run: Run, loop: Loop, samples: list[str]) -> None:
    """The section of this stage: shape, losses, speed."""
    params, last = loop.model.n_params(), loop.last_row
    metrics = {
        "model_tag": run.model_tag,
        "blocks": " ".join(entry_names(loop.model.config.block_pattern, loop.model.config.n_layer)),
        "parameters": params["total"],
        "steps": loop.num_iterations,
        "tokens": loop.tokens,
        "tokens per parameter": loop.tokens / params["total"],
        "train loss (nats, smoothed)": loop.smooth_loss,
        "val_bpb": last.get("val_bpb", float("nan")),
        "val_bpb untrained": loop.meta.get("untrained_val_bpb", float("nan")),
        "tokens_per_s (median)": loop.median_rate(),
        "mfu": last.get("mfu", float("nan")),
        "minutes": loop.seconds / 60,
        "updates skipped": loop.skipped,
        "config": changed_keys(cfg),
    }
    text = "".join(f"- {t}\n" for t in samples)
    log_stage(
        "base_training", metrics, text=text and f"Greedy samples:\n\n{text}", plots=plot_metrics(run.metrics_path)
    )


if __name__ == "__main__":
    run_script(main)
