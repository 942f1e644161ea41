"""Reinforcement learning on a generative task: sample answers, reward the right ones (nanochat/rl.py).

python -m scripts.chat_rl --task=Arithmetic                  # from the sft checkpoint saved last
python -m scripts.chat_rl --task=GSM8K --source=mid --model_tag=d20
torchrun --standalone --nproc_per_node=8 -m scripts.chat_rl --task=GSM8K --device_batch_size=16
"""

import copy
import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from nanochat.checkpoint import checkpoint_meta, load_model, tag_of
from nanochat.common import run_script
from nanochat.config import changed_keys, load_config
from nanochat.device import init_ranks, pick_device
from nanochat.engine import Engine
from nanochat.finetune_config import inherit
from nanochat.gpt import GPT
from nanochat.optim import check_training
from nanochat.report import log_stage
from nanochat.rl import Actor, Batch, Order, collect, evaluate, mix_seed, task_judge
from nanochat.rl_health import Health
from nanochat.rl_stage import EVAL_SEED, RLKeys, Stage
from nanochat.run import Run
from nanochat.tokenizer import Tokenizer
from nanochat.train import Loop, make_optimizer, memory_advice
from tasks.common import Task
from tasks.mixtures import rl_task


@dataclass(frozen=True)
class ChatRLConfig(RLKeys):
    """Reinforcement learning from rewards a task gives. Sizes are counts, lengths are tokens."""

    SHORT: ClassVar = {"i": "source", "g": "model_tag", "s": "step", "a": "task"}

    # where from, what on
    source: Annotated[Literal["sft", "mid", "base", "rag", "refrag"], "-i: stage to start from"] = "sft"
    model_tag: Annotated[str | None, "-g: checkpoint folder, read and written; none = the one saved last"] = None
    step: Annotated[int | None, "-s: step to start from; none = the newest"] = None
    task: Annotated[str, "-a: generative tasks of tasks/mixtures.py, NAME or NAME:N, with commas between"] = (
        "Arithmetic"
    )
    # how much
    num_epochs: Annotated[float, "times through the task, when num_iterations is -1"] = 1.0
    num_iterations: Annotated[int, "optimizer steps; -1 = from num_epochs"] = -1
    device_batch_size: Annotated[int, "rows per device and forward of training"] = 8
    # how samples are drawn
    top_k: Annotated[int, "sample among the k best ids; 0 = all, what the gradient supposes"] = 0
    # the objective
    normalize_std: Annotated[bool, "divide advantages by the group's standard deviation, as GRPO does"] = False
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
        self.check_rl()
        check_training(self)
        if self.device_batch_size < 1 or self.eval_examples < 1:
            raise ValueError(
                f"device_batch_size={self.device_batch_size}, eval_examples={self.eval_examples}: give 1 or more"
            )
        if self.num_iterations <= 0 and not self.num_epochs > 0:
            raise ValueError("nothing says how long to train: set --num_iterations or --num_epochs > 0")

    def iterations(self, n_examples: int) -> int:
        if self.num_iterations > 0:
            return self.num_iterations
        return max(1, round(self.num_epochs * n_examples / self.examples_per_step))


def main(argv: list[str]) -> None:
    cfg = load_config(ChatRLConfig, argv)
    train, held_out = rl_task(cfg.task, "train"), rl_task(cfg.task, "val")
    cfg, run, model, tokenizer, meta = load_start(cfg)
    ranks = run.ranks
    n_examples = cfg.examples_per_rank(ranks.world_size)
    reference = copy.deepcopy(model).eval() if cfg.kl_coef else None
    loop = Loop(
        run, model, make_optimizer(model, cfg, run.dtype, ranks, share=cfg.init_lr_frac),
        num_iterations=cfg.iterations(len(train)), grad_clip=cfg.grad_clip, schedule=(0.0, 1.0, 0.0),
        log_every=cfg.log_every, keep_last=cfg.keep_last, meta=meta,
    )  # fmt: skip
    run.print(
        f"training: {loop.num_iterations} steps of {cfg.examples_per_step} x {cfg.num_samples} samples of {cfg.task} "
        f"({len(train)} examples)"
    )
    stage = Stage(
        cfg, loop, loop.begin(cfg.resume),
        lambda: load_model(cfg.source, run.device, cfg.model_tag, cfg.step)[0].state_dict(), reference,
    )  # fmt: skip
    order = Order(len(train), cfg.seed, ranks, stage.progress.position)
    actor, examiner = (make_actor(cfg, model, tokenizer, task) for task in (train, held_out))
    with memory_advice(cfg.device_batch_size, model.config.seq_len):
        for step in loop:
            if step.due(cfg.eval_every) or (step.number == 0 and cfg.eval_every >= 0):
                stage.held_out(evaluate(examiner, min(cfg.eval_examples, len(held_out)), EVAL_SEED, ranks))
            if stage.saves(step, cfg.save_every):
                stage.save(order.position)
            if step.last or stage.ended:
                break
            health = Health(run.device)
            for _ in loop.forwards():
                seed = mix_seed(cfg.seed, step.number, ranks.rank)
                kept, sampled = collect(actor, order, n_examples, seed, cfg.resample)
                health.add_groups(sampled)
                batch = Batch.of(kept, run.device, "grpo" if cfg.normalize_std else "reinforce")
                stage.backward(batch, cfg.device_batch_size, health)
            stage.update(health)
    if ranks.main:
        report(cfg, stage)
    run.close()


def load_start(cfg: ChatRLConfig) -> tuple[ChatRLConfig, Run, GPT, Tokenizer, dict[str, Any]]:
    """-> (cfg with nothing left open, run, model to train, tokenizer, meta of the checkpoints to come)."""
    _, device = init_ranks(pick_device(cfg.device))
    model, tokenizer, meta = load_model(
        cfg.source, device, cfg.model_tag, cfg.step, dtype=cfg.dtype, kernels=cfg.kernels
    )
    tag = cfg.model_tag or tag_of(meta)
    cfg = dataclasses.replace(cfg, **inherit(cfg, meta["train_config"]), model_tag=tag, step=meta["step"])
    run = Run.start("rl", tag, cfg)
    run.print(f"start: {cfg.source} {tag}, step {cfg.step}: {model.n_params()['total'] / 1e6:.2f}M parameters")
    run.print(f"kernels: {model.kernels.reason}")
    return cfg, run, model, tokenizer, checkpoint_meta(model, tokenizer, cfg, (cfg.source, tag, meta["step"]))


def make_actor(cfg: ChatRLConfig, model: GPT, tokenizer: Tokenizer, task: Task) -> Actor:
    """The model answering this task, with the calculator."""
    engine = Engine(model, tokenizer)
    judge = task_judge(task, tokenizer, engine.tools, cfg.truncated)
    return Actor(engine, lambda i: tokenizer.render_for_completion(task[i]), judge, cfg.sampling(cfg.top_k))


def report(cfg: ChatRLConfig, stage: Stage) -> None:
    """The section of this stage: reward and pass@k before and after, health, pictures."""
    metrics = {
        "model_tag": stage.run.model_tag,
        "source": f"{cfg.source}, step {cfg.step}",
        "task": cfg.task,
        **stage.metrics(),
        "config": changed_keys(cfg),
    }
    log_stage("chat_rl", metrics, text=stage.pass_table(), plots=stage.plots())


if __name__ == "__main__":
    run_script(main)
