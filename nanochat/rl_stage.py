"""What stages of reinforcement learning share (chat_rl, refrag_finetune): keys, progress, learning, guard, report.

stage = Stage(cfg, loop, loop.begin(cfg.resume), weights_of_the_start)
for step in loop:
    if step.due(cfg.eval_every):
        stage.held_out(evaluate(examiner, n, EVAL_SEED, ranks))
    if stage.saves(step, cfg.save_every):
        stage.save(order.position)
    if step.last or stage.ended:
        break
    health = Health(run.device)
    for _ in loop.forwards():
        kept, sampled = collect(actor, order, n, seed, cfg.resample)
        health.add_groups(sampled)
        stage.backward(Batch.of(kept, run.device), cfg.device_batch_size, health)
    stage.update(health)
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from nanochat.checkpoint import list_steps, load_checkpoint
from nanochat.config import UserError
from nanochat.gpt import GPT
from nanochat.plots import read_metrics
from nanochat.report import plot_metrics
from nanochat.rl import Batch, Sampling, policy_loss
from nanochat.rl_health import Guard, Health, plot_health
from nanochat.train import Loop, Step

MAX_ROLLBACKS = 3  # then the run stops
EVAL_SEED = 1_000_003  # held-out samples are drawn alike at every evaluation


@dataclass(frozen=True)
class RLKeys:
    """Keys of every stage of reinforcement learning."""

    # how much
    examples_per_step: Annotated[int, "examples whose samples make one step, over all ranks"] = 16
    num_samples: Annotated[int, "samples of an example: the group"] = 16
    resample: Annotated[int, "times a step draws other examples for groups whose rewards are all equal"] = 1
    sample_batch_size: Annotated[int, "rows per device sampled together"] = 128
    # how samples are drawn
    max_new_tokens: Annotated[int, "longest answer"] = 256
    temperature: Annotated[float, "of sampling; the gradient is that of the policy only at 1"] = 1.0
    truncated: Annotated[Literal["zero", "mask"], "an answer that was cut: reward 0, or left out"] = "zero"
    # the objective
    kl_coef: Annotated[float, "weight of the divergence from the model at the start; 0 = none"] = 0.0
    correct_weight: Annotated[float, "weight of the cross-entropy of correct answers, a guard against collapse"] = 0.1
    guard: Annotated[
        Literal["rollback", "stop", "off"],
        "when reward, format or log p of correct answers collapse: take back the best checkpoint, then go on at half "
        "the rates (rollback), or end (stop)",
    ] = "rollback"

    def check_rl(self) -> None:
        """ValueError for what cannot work."""
        if min(self.examples_per_step, self.sample_batch_size, self.max_new_tokens) < 1:
            raise ValueError(
                f"examples_per_step={self.examples_per_step}, sample_batch_size={self.sample_batch_size}, "
                f"max_new_tokens={self.max_new_tokens}: give 1 or more"
            )
        if self.num_samples < 2:
            raise ValueError(f"num_samples={self.num_samples}: a group needs at least 2 samples to compare")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature}: greedy samples are all alike, give more than 0")
        if self.resample < 0:
            raise ValueError(f"resample={self.resample}: give 0 or more")

    def examples_per_rank(self, world_size: int) -> int:
        if self.examples_per_step % world_size:
            near = max(1, round(self.examples_per_step / world_size)) * world_size
            raise UserError(
                f"examples_per_step={self.examples_per_step} is no multiple of {world_size} ranks: "
                f"use --examples_per_step={near}"
            )
        return self.examples_per_step // world_size

    def sampling(self, top_k: int = 0) -> Sampling:
        return Sampling(self.num_samples, self.max_new_tokens, self.temperature, top_k, self.sample_batch_size)


@dataclass
class Progress:
    """Where a run is, beside what the loop keeps."""

    position: Any = 0  # in the order of examples
    guard: dict[str, Any] = field(default_factory=dict)
    rollbacks: int = 0
    ended: str = ""  # why the guard ended the run


class Stage:
    """A run of reinforcement learning: what happens around its loop at each step.

    saved: what the loop's begin() gave. start: the weights to go back to where no checkpoint was better.
    """

    def __init__(
        self, keys: RLKeys, loop: Loop, saved: dict[str, Any], start: Callable[[], dict[str, Any]],
        reference: GPT | None = None,
    ):  # fmt: skip
        self.keys, self.loop, self.run, self.start, self.reference = keys, loop, loop.run, start, reference
        self.progress = Progress(**saved)
        self.guard = Guard(state=self.progress.guard)
        slow_down(loop, self.progress.rollbacks)
        if self.ended:
            raise UserError(f"{self.run.dir}: the guard ended this run ({self.ended}): start another at lower rates")

    @property
    def ended(self) -> str:
        return self.progress.ended

    def held_out(self, scores: dict[str, dict[str, float]]) -> None:
        """Log an evaluation and remember it; back to better weights where it fell."""
        self.loop.log(**{f"held_out_{name}": score["value"] for name, score in scores.items()})
        self.loop.meta["held_out"] = scores
        self.loop.meta.setdefault("held_out_before", scores)
        if self.keys.guard != "off" and (reason := self.guard.held_out(scores)):
            self.roll_back(reason)

    def saves(self, step: Step, every: int) -> bool:
        return (step.due(every) or (bool(self.ended) and every >= 0)) and not step.first

    def save(self, position: Any) -> None:
        self.progress.position = position
        self.loop.save(dataclasses.asdict(self.progress))

    def backward(self, batch: Batch, size: int, health: Health) -> None:
        """The gradient of a batch, `size` rows at a time."""
        for part in batch.parts(size):
            loss, logp = policy_loss(self.loop.model, part, self.keys.correct_weight, self.reference, self.keys.kl_coef)
            self.loop.backward(loss, part.tokens)
            health.add_logp(part, logp)

    def update(self, health: Health) -> dict[str, float]:
        """One optimizer step -> the health of the step: recorded always, printed now and then, seen by the guard."""
        figures, loop = health.figures(), self.loop
        # where no group teaches, the schedule's end: a rate of 0, so that momentum alone does not move the weights
        loop.update(None if "entropy" in figures else 1.0)
        self.run.record({"step": loop.step, **figures})
        if loop.step % loop.log_every == 0 or loop.step == 1:
            self.run.print(f"step {loop.step}: " + ", ".join(f"{k} {v:.3f}" for k, v in figures.items()))
        if self.keys.guard != "off" and (reason := self.guard.update(figures)):
            self.roll_back(reason)
        return figures

    def roll_back(self, reason: str) -> None:
        """Take back the weights with the highest held-out reward, of those on disk and the start; forget the moments.

        The run goes on from them, or ends where the guard is to stop it or has done this MAX_ROLLBACKS times.
        """
        run, loop, progress = self.run, self.loop, self.progress
        scores = {-1: loop.meta.get("held_out_before", {})}  # -1: the start
        for step in list_steps(run.dir):
            if step <= loop.step:
                scores[step] = load_checkpoint(run.dir, step, want=()).meta.get("held_out", {})
        best = max(scores, key=lambda step: (reward_of(scores[step]), -step))
        if best >= 0:
            weights = load_checkpoint(run.dir, best, device=run.device, want=("model",)).model
        else:
            weights = self.start()
        assert weights is not None
        loop.model.load_state_dict(weights)
        loop.meta["held_out"] = scores[best]
        for moment in loop.optimizer.state_tensors().values():
            moment.zero_()
        self.guard.forget()
        slow_down(loop, 1)
        progress.rollbacks += 1
        if self.keys.guard == "stop" or progress.rollbacks > MAX_ROLLBACKS:
            progress.ended, loop.num_iterations = f"step {loop.step}: {reason}", loop.step
        came_from = f"step {best}" if best >= 0 else "the start"
        after = "the run ends" if progress.ended else "going on at half the rates"
        run.print(f"step {loop.step}: {reason}: back to the weights of {came_from}, {after}")

    # ---- the report ----

    def metrics(self) -> dict[str, Any]:
        """Reward before and after, the health of the last step, what the guard did."""
        loop = self.loop
        names = ("reward", "valid", "correct", "truncated", "length", "entropy", "logp_correct", "zero_variance")
        last = {k: v for row in read_metrics(self.run.metrics_path)[-1:] for k, v in row.items() if k in names}
        return {
            "steps": loop.step,
            "held-out reward before": loop.meta.get("held_out_before", {}).get("reward", "not evaluated"),
            "held-out reward after": loop.meta.get("held_out", {}).get("reward", "not evaluated"),
            **{f"last step: {k}": v for k, v in last.items()},
            "rollbacks": self.progress.rollbacks,
            "ended by the guard": self.ended or "no",
            "tokens trained on": loop.tokens,
            "minutes": loop.seconds / 60,
        }

    def pass_table(self) -> str:
        """pass@k before and after, as Markdown; nothing where there was no evaluation."""
        before, after = (self.loop.meta.get(k, {}) for k in ("held_out_before", "held_out"))
        rows = [f"| {k} | {show(before[k])} | {show(after[k])} |\n" for k in after if k.startswith("pass@")]
        head = "Held-out examples, before and after:\n\n| | before | after |\n| --- | --- | --- |\n"
        return head + "".join(rows) if rows else ""

    def plots(self) -> list[Path]:
        path, run = self.run.metrics_path, self.run
        return [*plot_metrics(path), plot_health(path, f"{run.source}_{run.model_tag}")]


def slow_down(loop: Loop, halvings: int) -> None:
    """Halve all rates so many times."""
    loop.optimizer.lrs = {role: lr * 0.5**halvings for role, lr in loop.optimizer.lrs.items()}


def reward_of(scores: dict[str, Any]) -> float:
    """The held-out reward of an evaluation; -inf where there was none."""
    return scores["reward"]["value"] if scores else -math.inf


def show(score: dict[str, Any]) -> str:
    return f"{score['value']:.4f} ± {score['stderr']:.4f} (n={score['n']})"
