"""The loop of every stage: accumulate, update, clock, guard, save, resume. No callbacks, no subclassing: each script
keeps its own visible `for step in loop:`.

    for step in loop:
        if step.due(cfg.eval_every):
            loop.log(val_bpb=...)
        if step.due(cfg.save_every):
            loop.save(cursor)
        if step.last:
            break
        for _ in loop.forwards():
            batch = next(batches)
            loop.backward(model(batch.x, batch.y, doc=batch.doc, loss_reduction="sum"), batch.tokens)
        loop.update()
"""

import contextlib
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from nanochat import device as devices
from nanochat.checkpoint import Checkpoint, restore_rng, rng_state, save_checkpoint
from nanochat.config import UserError
from nanochat.device import Ranks, all_reduce_sum, load_weights, whole_tensors
from nanochat.gpt import GPT
from nanochat.optim import MuonAdamW, lr_schedule, muon_momentum, role_rates
from nanochat.run import Run

MAX_BAD_STEPS = 10  # updates in a row that may be skipped for a loss or gradient that is not finite


@dataclass(frozen=True)
class Step:
    """One turn of the loop: `number` updates are done, `total` will be."""

    number: int
    total: int
    first: bool  # the first turn of this process

    @property
    def last(self) -> bool:
        """All updates are done: evaluate, save, break."""
        return self.number >= self.total

    def due(self, every: int) -> bool:
        """Every so many steps and at the end; never for every <= 0 except at the end of every=0."""
        if every < 0:
            return False
        return self.last or (every > 0 and self.number % every == 0 and self.number > 0)


class Loop:
    """Iterates over steps. Within a step the script calls backward() for each of forwards(), then update() once."""

    def __init__(
        self,
        run: Run,
        model: GPT,
        optimizer: MuonAdamW,
        *,
        num_iterations: int,
        grad_accum: int = 1,
        tokens_per_step: int = 0,
        flops_per_token: int = 0,
        grad_clip: float = 0.0,
        schedule: tuple[float, float, float] = (0.0, 0.2, 0.0),
        log_every: int = 10,
        keep_last: int = 2,
        meta: dict[str, Any] | None = None,
    ) -> None:
        self.run, self.model, self.optimizer = run, model.train(), optimizer
        self.num_iterations, self.grad_accum, self.grad_clip = num_iterations, grad_accum, grad_clip
        self.tokens_per_step, self.flops_per_token, self.schedule = tokens_per_step, flops_per_token, schedule
        self.log_every, self.keep_last, self.meta = log_every, keep_last, meta or {}
        self.step, self.bad_steps, self.skipped = 0, 0, 0
        self.tokens, self.seconds, self.smooth_loss = 0, 0.0, 0.0
        self._loss = torch.zeros((), device=run.device)
        self._count = torch.zeros((), device=run.device)
        self._started = time.perf_counter()
        self._peak = devices.peak_flops(run.device, run.dtype) * run.ranks.world_size
        self.last_row: dict[str, Any] = {}  # figures of the last step, for a report
        self._pending: dict[str, Any] = {}
        self._rates: list[float] = []
        self._tokens_of_step = 0

    def __iter__(self) -> Iterator[Step]:
        """Steps from the current one to the last, with a bar on a terminal. After the last one the script breaks."""
        self._bar = tqdm(
            total=self.num_iterations,
            initial=self.step,
            disable=not (self.run.ranks.main and sys.stderr.isatty()),
            unit="step",
            dynamic_ncols=True,
        )
        first = True
        try:
            while True:
                step = Step(self.step, self.num_iterations, first)
                yield step
                if step.last:
                    return
                assert self.step == step.number + 1, "the script must call loop.update() once per step, or break"
                first = False
        finally:
            self._flush()
            self._bar.close()

    def forwards(self) -> Iterator[int]:
        """One turn per forward of the step; the step's clock starts here, so loading counts and evaluation does not."""
        self._started = time.perf_counter()
        yield from range(self.grad_accum)

    def backward(self, loss: Tensor, tokens: int) -> None:
        """Add the gradient of a summed loss over `tokens` targets. The update divides by all tokens of the step."""
        if tokens or self.optimizer.sharded:  # the ranks of a sharded model go through it together
            loss.backward()
        self._loss += loss.detach()
        self._count += tokens

    def update(self, progress: float | None = None) -> None:
        """One optimizer step from what backward() gathered; skipped, and counted, when it is not finite."""
        loss, grad_norm = self._gather()
        progress = self.step / max(1, self.num_iterations) if progress is None else progress
        scale = lr_schedule(progress, *self.schedule)
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.optimizer.step(scale, muon_momentum(self.step))
            self.bad_steps = 0
        else:
            self._skip(loss, grad_norm)
        self.optimizer.zero_grad()
        self.step += 1
        self._clock(loss, grad_norm, scale)

    def _gather(self) -> tuple[float, float]:
        """Sum gradients, loss and tokens over ranks, divide by tokens, clip. -> (mean loss, gradient norm)."""
        totals = all_reduce_sum(torch.stack((self._loss, self._count)))
        self._loss, self._count = torch.zeros_like(self._loss), torch.zeros_like(self._count)
        loss, tokens = totals.tolist()
        self._tokens_of_step = int(tokens)
        return (loss / tokens if tokens else 0.0), self.optimizer.gather(tokens, self.grad_clip)

    def _skip(self, loss: float, grad_norm: float) -> None:
        self.bad_steps += 1
        self.skipped += 1
        self.run.print(
            f"step {self.step}: loss {loss}, gradient norm {grad_norm}: update skipped ({self.bad_steps} in a row)"
        )
        if self.bad_steps >= MAX_BAD_STEPS:
            raise UserError(
                f"{MAX_BAD_STEPS} steps in a row without a finite loss, at step {self.step}: "
                f"lower --matrix_lr and --embedding_lr, or set --grad_clip=1, and --resume from the last checkpoint"
            )

    def _clock(self, loss: float, grad_norm: float, scale: float) -> None:
        devices.synchronize(self.run.device)
        dt = time.perf_counter() - self._started
        self.seconds += dt
        self.tokens += self._tokens_of_step
        self.smooth_loss = loss if self.step == 1 else 0.9 * self.smooth_loss + 0.1 * loss
        rate = self.tokens_per_step / dt if self.tokens_per_step else self._tokens_of_step / dt
        row = {
            "loss": loss,
            "lr_scale": scale,
            "grad_norm": grad_norm,
            "tokens": self.tokens,
            "tokens_per_s": rate,
            "dt": dt,
            "seconds": self.seconds,
        }
        if self._peak and self.flops_per_token:
            row["mfu"] = rate * self.flops_per_token / self._peak
        if self.skipped:
            row["skipped"] = self.skipped
        self._flush()
        self._pending = {"step": self.step, **row}
        self.last_row = row
        self._rates.append(rate)
        self._bar.update(1)
        self._bar.set_postfix_str(f"loss {self.smooth_loss:.3f}, {rate:,.0f} tok/s", refresh=False)
        if self._bar.disable and (self.step % self.log_every == 0 or self.step in (1, self.num_iterations)):
            left = (self.num_iterations - self.step) * self.seconds / self.step
            mfu = f", mfu {100 * row['mfu']:.0f}%" if "mfu" in row else ""
            self.run.print(
                f"step {self.step}/{self.num_iterations}: loss {self.smooth_loss:.4f}, {rate:,.0f} tok/s{mfu}, "
                f"{self.seconds:.0f}s, {left:.0f}s left"
            )

    def median_rate(self) -> float:
        """Tokens per second of this process's median step."""
        return statistics.median(self._rates) if self._rates else 0.0

    def log(self, **metrics: float) -> None:
        """Add evaluation figures to the row of the current step."""
        self._pending = {"step": self.step, **self._pending, **metrics}
        self.last_row = {**self.last_row, **metrics}
        self.run.print(f"step {self.step}: " + ", ".join(f"{k} {v:.4f}" for k, v in metrics.items()))

    def _flush(self) -> None:
        if self._pending:
            self.run.record(self._pending)
        self._pending = {}

    def save(self, state: dict[str, Any] | None = None) -> None:
        """Save model, optimizer, clock, RNG and the caller's state (a loader cursor) after `step` updates."""
        self._flush()
        save_checkpoint(
            self.run.dir,
            self.step,
            model=whole_tensors(self.model.state_dict(), keep=self.run.ranks.main),
            optim=self.optimizer.state_tensors(),
            state={
                "caller": state or {},
                "clock": {"tokens": self.tokens, "seconds": self.seconds, "smooth_loss": self.smooth_loss},
                "skipped": self.skipped,
                "rng": rng_state(),
            },
            meta={**self.meta, "step": self.step, "num_iterations": self.num_iterations},
            rank=self.run.ranks.rank,
            world_size=self.run.ranks.world_size,
            keep_last=self.keep_last,
        )

    def begin(self, resume: bool) -> dict[str, Any]:
        """Go on from the newest checkpoint of this run, if asked to; a used folder is never overwritten.

        Returns what the caller gave to save(), {} for a new run.
        """
        newest = self._newest(resume)
        return {} if newest is None else self.restore(newest)

    def begin_streams(self, resume: bool) -> list[dict[str, Any]]:
        """begin() where save() is given {"streams": [a cursor for each stream of data this rank reads]}: any number of
        ranks by which the streams can be divided may go on. -> cursors of this rank's streams, [] for a new run."""
        newest = self._newest(resume, any_ranks=True)
        if newest is None:
            return []
        self.restore(newest)
        streams = [cursor for state in newest.states for cursor in _streams(state["caller"])]
        ranks = self.run.ranks
        if newest.meta["world_size"] == ranks.world_size:
            return streams
        if len(streams) % ranks.world_size:
            raise UserError(
                f"the text of {self.run.dir.name} is dealt in {len(streams)} streams, one for each rank it began with: "
                f"resume with a number of ranks that divides {len(streams)}, not {ranks.world_size}"
            )
        self.run.print(f"saved by {newest.meta['world_size']} ranks, going on with {ranks.world_size}")
        return sorted(streams, key=lambda cursor: cursor["rank"])[ranks.rank :: ranks.world_size]

    def _newest(self, resume: bool, any_ranks: bool = False) -> Checkpoint | None:
        """The checkpoint to go on from, None for a new run; UserError where there is one and nobody asked to go on."""
        other = "--out_tag" if "out_tag" in self.meta.get("train_config", {}) else "--model_tag"
        self.run.claim(other)
        newest = self.run.newest(any_ranks)
        if newest is None:
            if resume:
                self.run.print(f"--resume: no checkpoint in {self.run.dir}, so this run starts anew")
            self.run.forget_after(-1)
        elif not resume:
            raise UserError(
                f"{self.run.dir} holds a run at step {newest.step}: add --resume to go on with it, "
                f"or choose another {other}, or remove the folder"
            )
        return newest

    def restore(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Continue from a checkpoint of this run, exactly as if nothing had happened -> the caller's state."""
        assert checkpoint.model is not None and checkpoint.state is not None
        for key in ("model_config", "tokenizer_hash"):
            if key in self.meta and checkpoint.meta.get(key) != self.meta[key]:
                raise UserError(
                    f"{self.run.dir} at step {checkpoint.step} has another {key} "
                    f"({_difference(checkpoint.meta.get(key), self.meta[key])}): "
                    f"resume with what it was trained with, or choose another --model_tag"
                )
        load_weights(self.model, checkpoint.model)
        self.optimizer.load_state_tensors(checkpoint.optim or {})
        state = checkpoint.state
        self.step = checkpoint.step
        clock = state["clock"]
        self.tokens, self.seconds, self.smooth_loss = clock["tokens"], clock["seconds"], clock["smooth_loss"]
        self.skipped = state["skipped"]
        restore_rng(state["rng"])
        self.meta = {**checkpoint.meta, **self.meta}
        self.run.forget_after(self.step)
        self.run.print(f"resuming {self.run.dir.name} at step {self.step}")
        return state["caller"]


def _streams(caller: dict[str, Any]) -> list[dict[str, Any]]:
    """What base_train saved; before it knew streams, that was the cursor itself."""
    return caller.get("streams", [caller])


def _difference(saved: Any, now: Any) -> str:
    """The first key that differs, with both values."""
    if not (isinstance(saved, dict) and isinstance(now, dict)):
        return f"{str(saved)[:12]}, now {str(now)[:12]}"
    key = next(k for k in {**saved, **now} if saved.get(k) != now.get(k))
    return f"{key} {saved.get(key)!r}, now {now.get(key)!r}"


def forwards_per_step(total_batch_size: int, device_batch_size: int, seq_len: int, world_size: int) -> int:
    """Forwards per rank that make a step of total_batch_size tokens; 0 tokens = one forward."""
    forward = device_batch_size * seq_len * world_size
    total = total_batch_size or forward
    if total % forward:
        near = max(1, round(total / forward)) * forward
        raise UserError(
            f"total_batch_size={total} is no multiple of device_batch_size * max_seq_len * ranks = {forward}: "
            f"use --total_batch_size={near}"
        )
    return total // forward


def make_optimizer(
    model: GPT,
    cfg: Any,
    dtype: torch.dtype,
    ranks: Ranks | None = None,
    *,
    share: float = 1.0,
    weight_decay: float = 0.0,
) -> MuonAdamW:
    """The optimizer of a stage that trains the whole model, at a share of the rates of its configuration."""
    lrs = role_rates(cfg, model.config.d_model, share)
    return MuonAdamW(model, model.param_groups(), lrs, weight_decay=weight_decay, dtype=dtype, ranks=ranks)


@contextlib.contextmanager
def memory_advice(device_batch_size: int, seq_len: int) -> Iterator[None]:
    """Turn running out of memory into the key to lower and the value to try."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as e:
        text = str(e)
        if isinstance(e, RuntimeError) and not isinstance(e, torch.OutOfMemoryError) and "allocate memory" not in text:
            raise
        if device_batch_size > 1:
            cure = f"--device_batch_size={device_batch_size // 2} (now {device_batch_size}; the total batch stays)"
        else:
            cure = f"--max_seq_len={max(64, seq_len // 2)} (now {seq_len}), or a smaller --depth"
        raise UserError(f"out of memory: lower {cure}") from e


def compile_model(model: GPT) -> Callable[..., Tensor]:
    """torch.compile of the forward. On a CPU it costs minutes before the first step (docs/LOG.md has the figures)."""
    os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "1")
    return torch.compile(model, dynamic=False)
