"""What training on conversations shares between its stages (mid_train, chat_sft): start from the stage before it, the
length of the run, validation, samples and the report. The `for step in loop:` is the script's own.

    start = start_from(cfg, "mid")
    loop, rows = make_loop(start, train), val_rows(start, val)
    with open_batches(start, train, loop.begin(cfg.resume)) as batches: ...
    finish(start, loop, "mid_training", tasks, batches.place())
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanochat.blocks import entry_names
from nanochat.chat_loader import COUNTS, ConversationLoader, Conversations, Survey, fixed_rows, survey
from nanochat.checkpoint import checkpoint_dir, checkpoint_meta, list_steps, load_checkpoint, load_model
from nanochat.config import UserError, changed_keys
from nanochat.device import all_reduce_sum, init_ranks, pick_device
from nanochat.engine import Engine
from nanochat.finetune_config import INHERITED, SCRIPTS, FinetuneConfig, inherit
from nanochat.gpt import GPT
from nanochat.report import log_stage, plot_metrics
from nanochat.run import Run
from nanochat.tokenizer import Tokenizer
from nanochat.train import Loop, forwards_per_step, make_optimizer

PROMPTS = ("Who are you?", "What is 17 + 25?")


@dataclass(frozen=True)
class Start:
    """Where a stage starts: its run, the model of the stage before, and the configuration with nothing left open."""

    cfg: FinetuneConfig
    run: Run
    model: GPT
    tokenizer: Tokenizer
    meta: dict[str, Any]  # of the checkpoint started from
    T: int  # tokens of a row
    B: int  # rows per device and forward
    total_batch_size: int  # tokens per step, 0 = one forward per device


def start_from(cfg: FinetuneConfig, stage: str) -> Start:
    """Load the model cfg.source has trained, check and complete cfg by its checkpoint, open the run of `stage`."""
    tag = _find_tag(cfg)
    _, device = init_ranks(pick_device(cfg.device))
    model, tokenizer, meta = load_model(cfg.source, device, tag, cfg.step, dtype=cfg.dtype, kernels=cfg.kernels)
    cfg.check(model.config, f"{cfg.source} {tag}")
    keys = [key for key in INHERITED if key != "total_batch_size" or not cfg.target_examples_per_step]
    inherited = inherit(cfg, meta.get("train_config", {}), keys, f"{cfg.source} {tag}")
    cfg = dataclasses.replace(cfg, **inherited, model_tag=tag, step=meta["step"])
    T, B = _positive(cfg.max_seq_len, "max_seq_len", 2), _positive(cfg.device_batch_size, "device_batch_size", 1)
    trained = model.config.seq_len
    run = Run.start(stage, cfg.out_tag or tag, cfg)
    run.print(f"start: {cfg.source} {tag}, step {meta['step']}: {model.n_params()['total'] / 1e6:.2f}M parameters")
    run.print(f"blocks: {' '.join(entry_names(model.config.block_pattern, model.config.n_layer))}")
    run.print(f"kernels: {model.kernels.reason}")
    if trained < T:
        model.extend(T)
        run.print(f"context: {T} tokens, {trained} before: what is further away is learnt in this stage")
    if inherited:
        run.print("from its training: " + ", ".join(f"{k}={v}" for k, v in inherited.items()))
    return Start(cfg, run, model, tokenizer, meta, T, B, cfg.total_batch_size or 0)


def _find_tag(cfg: FinetuneConfig) -> str:
    """model_tag, else d<depth> as base_train names it, else the only tag there is. UserError with what to type."""
    tag = cfg.model_tag or (f"d{cfg.depth}" if cfg.depth else "")
    root = checkpoint_dir(cfg.source, tag or "any").parent
    tags = sorted(p.name for p in root.glob("*/") if list_steps(p))
    if not tag and len(tags) > 1:
        raise UserError(f"{cfg.source} has several models: choose one by --model_tag={'|'.join(tags)}")
    if not tag and tags:
        return tags[0]
    if tag not in tags:
        by = f"`python -m {SCRIPTS[cfg.source]}`" if cfg.source in SCRIPTS else f"the stage {cfg.source}"
        raise UserError(
            f"no checkpoint in {root / tag}: make one by {by} with the same config file and model_tag, or choose "
            f"another --source or --model_tag (there are: {', '.join(tags) or 'none'})"
        )
    return tag


def _positive(value: int | None, key: str, least: int) -> int:
    if value is None or value < least:
        raise UserError(f"{key}={value}: expected at least {least}")
    return value


def make_loop(start: Start, train: Conversations) -> Loop:
    """The loop of a stage: its length and steps from what the conversations look like, its optimizer warm if it can."""
    cfg, run, model = start.cfg, start.run, start.model
    seen = survey(train, start.tokenizer, start.T)
    run.print(f"conversations: {len(train)}, in rows of {start.T}: {seen}")
    tokens_per_step = _tokens_per_step(start, seen)
    grad_accum = forwards_per_step(tokens_per_step, start.B, start.T, run.ranks.world_size)
    rows = seen.rows * len(train) / seen.conversations
    steps = cfg.num_iterations
    if steps <= 0:
        steps = max(1, math.ceil(cfg.num_epochs * rows * start.T / tokens_per_step))
    epochs = steps * tokens_per_step / (rows * start.T)
    run.print(
        f"training: {steps} steps of {tokens_per_step} tokens ({grad_accum} x {start.B} rows of {start.T}), about "
        f"{epochs:.2f} epochs, rates x {cfg.init_lr_frac}"
    )
    optimizer = make_optimizer(
        model, cfg, run.dtype, run.ranks, share=cfg.init_lr_frac, weight_decay=cfg.weight_decay or 0.0
    )
    if cfg.warm_start:
        run.print(_warm_start(start, optimizer))
    saved_as = dataclasses.replace(cfg, model_tag=run.model_tag)
    return Loop(
        run, model, optimizer, num_iterations=steps, grad_accum=grad_accum, tokens_per_step=tokens_per_step,
        flops_per_token=model.flops_per_token(start.T), grad_clip=cfg.grad_clip or 0.0,
        schedule=(cfg.warmup_ratio, cfg.warmdown_ratio, cfg.final_lr_frac), log_every=cfg.log_every,
        keep_last=cfg.keep_last,
        meta=checkpoint_meta(model, start.tokenizer, saved_as, (cfg.source, cfg.model_tag, start.meta["step"])),
    )  # fmt: skip


def _tokens_per_step(start: Start, seen: Survey) -> int:
    """total_batch_size, or as many whole forwards as hold about target_examples_per_step conversations."""
    forward = start.B * start.T * start.run.ranks.world_size
    if start.cfg.target_examples_per_step is None:
        return start.total_batch_size or forward
    rows = start.cfg.target_examples_per_step * seen.rows / max(1, seen.conversations - seen.left_out)
    return max(1, round(rows * start.T / forward)) * forward


def _warm_start(start: Start, optimizer: Any) -> str:
    """Load the moments of the checkpoint started from, saved by any number of ranks -> what was done, or why not."""
    cfg, ranks, where = start.cfg, start.run.ranks, f"{start.cfg.source} {start.cfg.model_tag}"
    saved = load_checkpoint(
        checkpoint_dir(cfg.source, cfg.model_tag), cfg.step, rank=ranks.rank, world_size=ranks.world_size,
        any_ranks=True, device=start.run.device, want=("optim",),
    )  # fmt: skip
    if not saved.optim:
        return f"warm start: not possible, the optimizer's moments start at zero: {where} holds none"
    optimizer.load_state_tensors(saved.optim)
    return f"warm start: the optimizer goes on with the moments of {where}, step {cfg.step}"


def open_batches(start: Start, train: Conversations, cursor: dict[str, Any]) -> ConversationLoader:
    """This rank's batches, from the start or where a cursor says."""
    ranks = start.run.ranks
    return ConversationLoader(
        train, start.tokenizer, start.B, start.T, rank=ranks.rank, world_size=ranks.world_size,
        device=start.run.device, seed=start.cfg.seed, cursor=cursor or None,
    )  # fmt: skip


# ---- validation, samples, report ----

Rows = tuple[Tensor, Tensor, Tensor]  # x, y, doc, each (N, T)


def val_rows(start: Start, val: Conversations) -> Rows:
    """The rows every validation of this run looks at."""
    x, y, doc = (t.to(start.run.device) for t in fixed_rows(val, start.tokenizer, start.T, start.cfg.eval_tokens))
    wanted = max(1, start.cfg.eval_tokens // start.T)
    all_there_is = f", all there is of {wanted} asked for" if len(x) < wanted else ""
    start.run.print(f"validation: {len(x)} rows{all_there_is}, {int((y >= 0).sum())} targets")
    return x, y, doc


@torch.no_grad()
def evaluate(start: Start, rows: Rows) -> dict[str, float]:
    """{"val_loss": nats per target, "val_bpb": bits per byte of the targets that are text}, equal on every rank."""
    ranks, bytes_of = start.run.ranks, torch.as_tensor(start.tokenizer.token_bytes)
    own = [t[ranks.rank :: ranks.world_size] for t in rows]
    sums = torch.zeros(4, dtype=torch.float64)  # nats, targets, nats of text, bytes of text
    for x, y, doc in zip(*(t.split(start.B) for t in own if len(t)), strict=True):
        nats = start.model(x, y, doc=doc, loss_reduction="none").view_as(y)[y >= 0].cpu().double()  # (targets,)
        n_bytes = bytes_of[y[y >= 0].cpu()]
        text = n_bytes > 0
        sums += torch.stack([nats.sum(), torch.tensor(len(nats)), nats[text].sum(), n_bytes.sum()])
    sums = all_reduce_sum(sums.to(start.run.device)) if ranks.world_size > 1 else sums
    nats, targets, text_nats, text_bytes = sums.tolist()
    return {"val_loss": nats / targets, "val_bpb": text_nats / (math.log(2) * max(1.0, text_bytes))}


def validate(start: Start, loop: Loop, rows: Rows) -> None:
    """Evaluate, log, and remember the first and the lowest figures in the checkpoint's meta."""
    found = evaluate(start, rows)
    loop.log(**found)
    loop.meta |= found
    loop.meta.setdefault("before", found)
    if found["val_loss"] <= loop.meta.setdefault("lowest", {**found, "step": loop.step})["val_loss"]:
        loop.meta["lowest"] = {**found, "step": loop.step}


def answers(start: Start, questions: Sequence[str] = PROMPTS, max_tokens: int = 48) -> list[tuple[str, str]]:
    """(question, greedy answer) pairs, printed. A question that leaves no room for an answer is left out."""
    tokenizer, model = start.tokenizer, start.model
    rendered = [tokenizer.render_for_completion({"messages": [{"role": "user", "content": q}]}) for q in questions]
    fitting = [(q, ids) for q, ids in zip(questions, rendered, strict=True) if len(ids) < model.config.seq_len]
    if not fitting:
        return []
    prompts = [ids for _, ids in fitting]
    model.eval()
    rows, _ = Engine(model, tokenizer).generate_batch(prompts, max_tokens=max_tokens, temperature=0.0)
    model.train()
    said = [tokenizer.decode(row[len(ids) :], errors="replace") for row, ids in zip(rows, prompts, strict=True)]
    pairs = [(q, text) for (q, _), text in zip(fitting, said, strict=True)]
    for question, text in pairs:
        start.run.print(f"sample: {question!r} -> {text!r}")
    return pairs


def finish(
    start: Start, loop: Loop, section: str, tasks: Sequence[str], cursor: dict[str, Any], last: bool = True
) -> None:
    """Samples and the report's section, on every rank together; then the run ends, and the ranks part, unless another
    stage follows in this process (last=False): they cannot meet again."""
    run, cfg = start.run, start.cfg
    counts = torch.tensor([cursor.get("counts", {}).get(key, 0) for key in COUNTS], device=run.device)
    read = dict(zip(COUNTS, all_reduce_sum(counts).tolist(), strict=True))
    run.print("conversations: " + ", ".join(f"{n} {key.replace('_', ' ')}" for key, n in read.items()))
    if run.ranks.main:
        samples = answers(start)
        if not cfg.dry_run:
            _report(start, loop, section, tasks, read, samples)
    if last:
        run.close()
    elif run.tracker is not None:
        run.tracker.finish()


def _report(
    start: Start, loop: Loop, section: str, tasks: Sequence[str], read: dict[str, int], samples: list[tuple[str, str]]
) -> None:
    """Losses before and after, what was read, speed, samples."""
    cfg, meta, config = start.cfg, loop.meta, loop.model.config
    before, lowest = meta.get("before", {}), meta.get("lowest", {})
    metrics = {
        "model_tag": start.run.model_tag,
        "source": f"{cfg.source} {cfg.model_tag}, step {cfg.step}",
        "blocks": " ".join(entry_names(config.block_pattern, config.n_layer)),
        "tasks": ", ".join(tasks),
        "steps": loop.num_iterations,
        "conversations read": read["read"],
        "conversations shortened": read["shortened"],
        "conversations left out": read["left_out"],
        "targets": loop.tokens,
        "train loss (nats, smoothed)": loop.smooth_loss,
        "val_loss": meta.get("val_loss", math.nan),
        "val_loss before": before.get("val_loss", math.nan),
        "val_loss lowest": f"{lowest['val_loss']:.4f} at step {lowest['step']} (the last step is kept)"
        if lowest
        else "-",
        "bits per byte of answers": meta.get("val_bpb", math.nan),
        "bits per byte of answers before": before.get("val_bpb", math.nan),
        "tokens_per_s (median)": loop.median_rate(),
        "mfu": loop.last_row.get("mfu", math.nan),
        "minutes": loop.seconds / 60,
        "updates skipped": loop.skipped,
        "config": changed_keys(cfg),
    }
    text = "".join(f"- {question}\n  `{said!r}`\n" for question, said in samples)
    plots = plot_metrics(start.run.metrics_path)
    log_stage(section, metrics, text=text and f"Greedy answers:\n\n{text}", plots=plots, summary=["val_loss"])
