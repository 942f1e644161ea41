"""Reinforcement learning on a generative task: sample answers, reward the right ones (nanochat/rl.py).

python -m scripts.chat_rl --task=Arithmetic                  # from the sft checkpoint saved last
python -m scripts.chat_rl --task=GSM8K --source=mid --model_tag=d20
torchrun --standalone --nproc_per_node=8 -m scripts.chat_rl --task=GSM8K --device_batch_size=16
"""

import copy
import dataclasses
import math
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from nanochat.checkpoint import list_steps, load_checkpoint, load_model
from nanochat.common import git_state, run_script
from nanochat.config import UserError, load_config
from nanochat.device import init_ranks, pick_device
from nanochat.engine import Engine
from nanochat.gpt import GPT
from nanochat.plots import read_metrics
from nanochat.report import log_stage, plot_metrics
from nanochat.rl import Actor, Batch, Order, Sampling, collect, evaluate, mix_seed, policy_loss, task_judge
from nanochat.rl_health import Guard, Health, plot_health
from nanochat.tokenizer import Tokenizer
from nanochat.train import Loop, Run, changed_keys, make_optimizer, memory_advice
from tasks.common import Task
from tasks.mixtures import rl_task

RATES = ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr", "ssm_lr")
MAX_ROLLBACKS = 3  # then the run stops
EVAL_SEED = 1_000_003  # held-out samples are drawn alike at every evaluation


@dataclass(frozen=True)
class ChatRLConfig:
    """Reinforcement learning from rewards a task gives. Sizes are counts, lengths are tokens."""

    SHORT: ClassVar = {"i": "source", "g": "model_tag", "s": "step", "a": "task"}

    # where from, what on
    source: Annotated[Literal["sft", "mid", "base", "rag", "refrag"], "-i: stage to start from"] = "sft"
    model_tag: Annotated[str | None, "-g: checkpoint folder, read and written; none = the one saved last"] = None
    step: Annotated[int | None, "-s: step to start from; none = the newest"] = None
    task: Annotated[str, "-a: generative tasks of tasks/mixtures.py, NAME or NAME:N, with commas between"] = "Arithmetic"
    # how much
    num_epochs: Annotated[float, "times through the task, when num_iterations is -1"] = 1.0
    num_iterations: Annotated[int, "optimizer steps; -1 = from num_epochs"] = -1
    examples_per_step: Annotated[int, "examples whose samples make one step, over all ranks"] = 16
    num_samples: Annotated[int, "samples of an example: the group"] = 16
    resample: Annotated[int, "times a step draws other examples for groups whose rewards are all equal"] = 1
    device_batch_size: Annotated[int, "rows per device and forward of training"] = 8
    sample_batch_size: Annotated[int, "rows per device sampled together"] = 128
    # how samples are drawn
    max_new_tokens: Annotated[int, "longest answer"] = 256
    temperature: Annotated[float, "of sampling; the gradient is that of the policy only at 1"] = 1.0
    top_k: Annotated[int, "sample among the k best ids; 0 = all, what the gradient supposes"] = 0
    truncated: Annotated[Literal["zero", "mask"], "an answer that was cut: reward 0, or left out"] = "zero"
    # the objective
    normalize_std: Annotated[bool, "divide advantages by the group's standard deviation, as GRPO does"] = False
    kl_coef: Annotated[float, "weight of the divergence from the model at the start; 0 = none"] = 0.0
    correct_weight: Annotated[float, "weight of the cross-entropy of correct answers, a guard against collapse"] = 0.1
    guard: Annotated[
        Literal["rollback", "stop", "off"],
        "when reward, format or log p of correct answers collapse: take back the best checkpoint, then go on at half "
        "the rates (rollback), or end (stop)",
    ] = "rollback"
    # the optimizer
    embedding_lr: Annotated[float | None, "AdamW, embeddings; none = as the checkpoint was trained"] = None
    unembedding_lr: Annotated[float | None, "AdamW, head; alike"] = None
    scalar_lr: Annotated[float | None, "AdamW, scalars and gates; alike"] = None
    ssm_lr: Annotated[float | None, "AdamW, what steers a recurrence; alike"] = None
    matrix_lr: Annotated[float | None, "Muon, matrices; alike"] = None
    init_lr_frac: Annotated[float, "all rates start at this share of the above and fall to 0"] = 0.05
    grad_clip: Annotated[float, "largest gradient norm; 0 = no clipping"] = 1.0
    # evaluation and output
    eval_every: Annotated[int, "steps between evaluations on held-out examples; 0 = only at the end, -1 = never"] = 60
    eval_examples: Annotated[int, "held-out examples, num_samples answers each"] = 128
    save_every: Annotated[int, "steps between checkpoints; 0 = only at the end, -1 = never"] = 60
    keep_last: Annotated[int, "checkpoints kept"] = 3
    log_every: Annotated[int, "steps between printed lines"] = 10
    resume: Annotated[bool, "go on from the newest whole checkpoint of this model_tag"] = False
    run: Annotated[str, "name of the run for the tracker; dummy = no tracking"] = "dummy"
    track: Annotated[Literal["none", "wandb", "trackio"], "tracker"] = "none"
    # the machine
    device: Annotated[str, "cpu, cuda, mps; empty = the best there is"] = ""
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], "multiplication dtype"] = "auto"
    kernels: Annotated[Literal["auto", "fast", "reference"], "which implementations run"] = "auto"
    seed: Annotated[int, "of the order of examples and of sampling"] = 42

    def __post_init__(self) -> None:
        if min(self.examples_per_step, self.device_batch_size, self.sample_batch_size, self.max_new_tokens) < 1:
            raise ValueError(
                f"examples_per_step={self.examples_per_step}, device_batch_size={self.device_batch_size}, "
                f"sample_batch_size={self.sample_batch_size}, max_new_tokens={self.max_new_tokens}: give 1 or more"
            )
        if self.num_samples < 2:
            raise ValueError(f"num_samples={self.num_samples}: a group needs at least 2 samples to compare")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature}: greedy samples are all alike, give more than 0")
        if self.num_iterations <= 0 and self.num_epochs <= 0:
            raise ValueError("nothing says how long to train: set --num_iterations or --num_epochs > 0")
        if self.eval_examples < 1 or self.resample < 0:
            raise ValueError(f"eval_examples={self.eval_examples}, resample={self.resample}: give at least 1 and 0")

    def examples_per_rank(self, world_size: int) -> int:
        if self.examples_per_step % world_size:
            near = max(1, round(self.examples_per_step / world_size)) * world_size
            raise UserError(
                f"examples_per_step={self.examples_per_step} is no multiple of {world_size} ranks: "
                f"use --examples_per_step={near}"
            )
        return self.examples_per_step // world_size

    def iterations(self, n_examples: int) -> int:
        if self.num_iterations > 0:
            return self.num_iterations
        return max(1, round(self.num_epochs * n_examples / self.examples_per_step))

    def rates(self, trained: dict[str, Any]) -> dict[str, Any]:
        """The rates at the top, those not given from the configuration the checkpoint was trained with."""
        given = {key: getattr(self, key) for key in RATES}
        if missing := [key for key in RATES if given[key] is None and key not in trained]:
            raise UserError(f"the checkpoint does not say with which {missing[0]} it was trained: give --{missing[0]}")
        return {key: trained[key] if lr is None else lr for key, lr in given.items()}


def main(argv: list[str]) -> None:
    cfg = load_config(ChatRLConfig, argv)
    train, held_out = rl_task(cfg.task, "train"), rl_task(cfg.task, "val")
    cfg, run, model, tokenizer, meta = load_start(cfg)
    ranks = run.ranks
    n_examples = cfg.examples_per_rank(ranks.world_size)
    reference = copy.deepcopy(model).eval() if cfg.kl_coef else None
    rates = {key: lr * cfg.init_lr_frac for key, lr in cfg.rates({}).items()}
    loop = Loop(
        run, model, make_optimizer(model, run.dtype, ranks, **rates, weight_decay=0.0),
        num_iterations=cfg.iterations(len(train)), grad_clip=cfg.grad_clip, schedule=(0.0, 1.0, 0.0),
        log_every=cfg.log_every, keep_last=cfg.keep_last, meta=meta,
    )  # fmt: skip
    run.print(
        f"training: {loop.num_iterations} steps of {cfg.examples_per_step} x {cfg.num_samples} samples of {cfg.task} "
        f"({len(train)} examples)"
    )
    progress = Progress(**loop.begin(cfg.resume))
    slow_down(loop, progress.rollbacks)
    if progress.ended:
        raise UserError(f"{run.dir}: the guard ended this run ({progress.ended}): start another at lower rates")
    order, guard = Order(len(train), cfg.seed, ranks, progress.position), Guard(state=progress.guard)
    actor, examiner = (make_actor(cfg, model, tokenizer, task) for task in (train, held_out))
    with memory_advice(cfg.device_batch_size, model.config.seq_len):
        for step in loop:
            if step.due(cfg.eval_every) or (step.number == 0 and cfg.eval_every >= 0):
                scores = evaluate(examiner, min(cfg.eval_examples, len(held_out)), EVAL_SEED, ranks)
                loop.log(**{f"held_out_{name}": score["value"] for name, score in scores.items()})
                loop.meta["held_out"] = scores
                loop.meta.setdefault("held_out_before", scores)
                if cfg.guard != "off" and (reason := guard.held_out(scores)):
                    roll_back(cfg, loop, progress, guard, reason)
            if (step.due(cfg.save_every) or (progress.ended and cfg.save_every >= 0)) and not step.first:
                progress.position = order.position
                loop.save(dataclasses.asdict(progress))
            if step.last or progress.ended:
                break
            health = Health(run.device)
            for _ in loop.forwards():
                seed = mix_seed(cfg.seed, step.number, ranks.rank)
                kept, sampled = collect(actor, order, n_examples, seed, cfg.resample)
                health.add_groups(sampled)
                for part in Batch.of(kept, run.device, cfg.normalize_std).parts(cfg.device_batch_size):
                    loss, logp = policy_loss(model, part, cfg.correct_weight, reference, cfg.kl_coef)
                    loop.backward(loss, part.tokens)
                    health.add_logp(part, logp)
            figures = health.figures()
            # where no group teaches, the schedule's end: a rate of 0, so that momentum alone does not move the weights
            loop.update(None if "entropy" in figures else 1.0)
            tell(cfg, run, loop, figures)
            if cfg.guard != "off" and (reason := guard.update(figures)):
                roll_back(cfg, loop, progress, guard, reason)
    if ranks.main:
        report(cfg, run, loop, progress)
    run.close()


@dataclass
class Progress:
    """Where a run is, beside what the loop keeps."""

    position: int = 0  # in the order of examples
    guard: dict[str, Any] = field(default_factory=dict)
    rollbacks: int = 0
    ended: str = ""  # why the guard ended the run


def slow_down(loop: Loop, halvings: int) -> None:
    """Halve all rates so many times."""
    loop.optimizer.lrs = {role: lr * 0.5**halvings for role, lr in loop.optimizer.lrs.items()}


def load_start(cfg: ChatRLConfig) -> tuple[ChatRLConfig, Run, GPT, Tokenizer, dict[str, Any]]:
    """-> (cfg with nothing left open, run, model to train, tokenizer, meta of the checkpoints to come)."""
    _, device = init_ranks(pick_device(cfg.device))
    model, tokenizer, meta = load_model(
        cfg.source, device, cfg.model_tag, cfg.step, dtype=cfg.dtype, kernels=cfg.kernels
    )
    trained = meta["train_config"]
    tag = cfg.model_tag or trained.get("model_tag") or f"d{model.config.n_layer}"
    cfg = dataclasses.replace(cfg, **cfg.rates(trained), model_tag=tag, step=meta["step"])
    run = Run.start(
        "rl", tag, device=cfg.device, dtype=cfg.dtype, seed=cfg.seed, run=cfg.run, track=cfg.track,
        config=dataclasses.asdict(cfg),
    )  # fmt: skip
    run.print(f"start: {cfg.source} {tag}, step {cfg.step}: {model.n_params()['total'] / 1e6:.2f}M parameters")
    run.print(f"kernels: {model.kernels.reason}")
    return cfg, run, model, tokenizer, {
        "model_config": dataclasses.asdict(model.config), "train_config": dataclasses.asdict(cfg),
        "tokenizer_hash": tokenizer.hash, "kernels": model.kernels.reason, "git": git_state(),
        "source": {"stage": cfg.source, "model_tag": tag, "step": cfg.step},
    }  # fmt: skip


def make_actor(cfg: ChatRLConfig, model: GPT, tokenizer: Tokenizer, task: Task) -> Actor:
    """The model answering this task, with the calculator."""
    engine = Engine(model, tokenizer)
    judge = task_judge(task, tokenizer, engine.tools, cfg.truncated)
    sampling = Sampling(cfg.num_samples, cfg.max_new_tokens, cfg.temperature, cfg.top_k, cfg.sample_batch_size)
    return Actor(engine, lambda i: tokenizer.render_for_completion(task[i]), judge, sampling)


def tell(cfg: ChatRLConfig, run: Run, loop: Loop, figures: dict[str, float]) -> None:
    """The health of a step: to the metrics always, printed now and then."""
    run.record({"step": loop.step, **figures})
    if loop.step % cfg.log_every == 0 or loop.step == 1:
        run.print(f"step {loop.step}: " + ", ".join(f"{k} {v:.3f}" for k, v in figures.items()))


def roll_back(cfg: ChatRLConfig, loop: Loop, progress: Progress, guard: Guard, reason: str) -> None:
    """Take back the weights with the highest held-out reward, of those on disk and the start; forget the moments.

    The run goes on from them, or ends where the guard is to stop it or has done this MAX_ROLLBACKS times.
    """
    run = loop.run
    scores = {-1: loop.meta.get("held_out_before", {})}  # -1: the start
    for step in list_steps(run.dir):
        if step <= loop.step:
            scores[step] = load_checkpoint(run.dir, step, want=()).meta.get("held_out", {})
    best = max(scores, key=lambda step: (reward_of(scores[step]), -step))
    if best >= 0:
        weights = load_checkpoint(run.dir, best, device=run.device, want=("model",)).model
    else:
        weights = load_model(cfg.source, run.device, cfg.model_tag, cfg.step)[0].state_dict()
    assert weights is not None
    loop.model.load_state_dict(weights)
    loop.meta["held_out"] = scores[best]
    for moment in loop.optimizer.state_tensors().values():
        moment.zero_()
    guard.forget()
    slow_down(loop, 1)
    progress.rollbacks += 1
    if cfg.guard == "stop" or progress.rollbacks > MAX_ROLLBACKS:
        progress.ended, loop.num_iterations = f"step {loop.step}: {reason}", loop.step
    came_from = f"step {best}" if best >= 0 else "the start"
    after = "the run ends" if progress.ended else "going on at half the rates"
    run.print(f"step {loop.step}: {reason}: back to the weights of {came_from}, {after}")


def reward_of(scores: dict[str, Any]) -> float:
    """The held-out reward of an evaluation; -inf where there was none."""
    return scores["reward"]["value"] if scores else -math.inf


def report(cfg: ChatRLConfig, run: Run, loop: Loop, progress: Progress) -> None:
    """The section of this stage: reward and pass@k before and after, health, pictures."""
    before, after = (loop.meta.get(k, {}) for k in ("held_out_before", "held_out"))
    names = ("reward", "valid", "correct", "truncated", "length", "entropy", "logp_correct", "zero_variance")
    last = {k: v for row in read_metrics(run.metrics_path)[-1:] for k, v in row.items() if k in names}
    metrics = {
        "model_tag": run.model_tag,
        "source": f"{cfg.source}, step {cfg.step}",
        "task": cfg.task,
        "steps": loop.step,
        "held-out reward before": before.get("reward", "not evaluated"),
        "held-out reward after": after.get("reward", "not evaluated"),
        **{f"last step: {k}": v for k, v in last.items()},
        "rollbacks": progress.rollbacks,
        "ended by the guard": progress.ended or "no",
        "tokens trained on": loop.tokens,
        "minutes": loop.seconds / 60,
        "config": ", ".join(f"{k}={v}" for k, v in changed_keys(cfg).items()) or "defaults",
    }
    rows = [f"| {k} | {show(before[k])} | {show(after[k])} |\n" for k in after if k.startswith("pass@")]
    text = "".join(["Held-out examples, before and after:\n\n| | before | after |\n| --- | --- | --- |\n", *rows])
    plots = [*plot_metrics(run.metrics_path), plot_health(run.metrics_path, f"rl_{run.model_tag}")]
    log_stage("chat_rl", metrics, text=text if rows else "", plots=plots)


def show(score: dict[str, Any]) -> str:
    return f"{score['value']:.4f} ± {score['stderr']:.4f} (n={score['n']})"


if __name__ == "__main__":
    run_script(main)
