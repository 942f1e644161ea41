"""On-policy, group-relative policy gradient: sample groups, judge them, weigh their tokens. Its health: rl_health.py.

    actor = Actor(engine, prompt, judge, Sampling(num_samples=16))
    kept, sampled = collect(actor, order, 16, seed)  # kept: groups whose rewards differ
    for part in Batch.of(kept, device).parts(8):
        loss, logp = policy_loss(model, part)
        loop.backward(loss, part.tokens)  # the update divides by all tokens of the step

A_i = R_i - mean of its group (Dr. GRPO, arXiv 2503.20783: no division by the standard deviation); the loss is
-sum_i sum_t M_it A_i log p(y_it) / sum_i sum_t M_it over the whole step (DAPO's token-level norm, arXiv 2503.14476, and
nanochat's), M = 1 on what the policy sampled: prompts and what tools forced are 0. Groups whose rewards are all equal
teach nothing and are replaced (DAPO).

That is "reinforce", the default, with one update for each batch, so that there is no ratio and nothing to clip. Others:
"grpo" divides A by the standard deviation (2402.03300), "dapo" does so too and uses a batch for several updates with
clipped ratios (`remember`), "rejection" imitates the right samples of the same groups (RAFT, 2304.06767).

What is asked, which tools there are and what is rewarded is the caller's: `prompt(example) -> ids`, the engine's tools,
and `judge(trajectory) -> Verdict`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from nanochat.device import Ranks, all_reduce_sum
from nanochat.engine import Engine
from nanochat.gpt import GPT
from nanochat.sampling import ENDED
from nanochat.tools import Call

Algorithm = Literal["reinforce", "grpo", "dapo", "rejection"]
CLIP = (0.2, 0.28)  # how far a ratio counts below and above 1 (2503.14476, section 3.1)
EQUAL = 1e-6  # rewards this close are the same


@dataclass(frozen=True)
class Sampling:
    """How trajectories are drawn. The gradient is that of the sampled policy only at temperature 1 with top_k 0."""

    num_samples: int = 16  # of each example: the group
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    batch_size: int = 128  # rows sampled together


@dataclass(frozen=True)
class Trajectory:
    """A prompt and what was written after it, the id that ended it included."""

    example: int
    ids: list[int]
    mask: list[int]  # 1 where the policy sampled, 0 on the prompt and on what tools forced
    n_prompt: int
    ended: bool  # by an end id; False: cut at max_new_tokens or at the end of the context
    trace: list[Call] = field(default_factory=list)  # its calls of tools

    def text(self, tokenizer: Any) -> str:
        """What was written, without its end id, as a task's evaluate() takes it."""
        return tokenizer.decode(self.ids[self.n_prompt : len(self.ids) - self.ended], errors="replace")

    @property
    def length(self) -> int:
        """Ids written, those of tools included."""
        return len(self.ids) - self.n_prompt


@dataclass(frozen=True)
class Verdict:
    """What a trajectory is worth. `masked`: it counts neither in the loss nor in its group's mean."""

    reward: float
    correct: bool
    valid: bool = True  # in the expected format
    masked: bool = False
    figures: dict[str, float] = field(default_factory=dict)  # what else the health of a step is to show, as means


Judge = Callable[[Trajectory], Verdict]


@dataclass(frozen=True)
class Group:
    """All samples of one example."""

    trajectories: list[Trajectory]
    verdicts: list[Verdict]

    @property
    def rewards(self) -> list[float]:
        """Of the samples that count."""
        return [v.reward for v in self.verdicts if not v.masked]

    @property
    def teaches(self) -> bool:
        """Whether the rewards that count differ: else every advantage is 0."""
        return bool(self.rewards) and max(self.rewards) - min(self.rewards) > EQUAL


# ---- sampling ----


def task_judge(task: Any, tokenizer: Any, tools: dict[int, Any], truncated: str = "zero") -> Judge:
    """Rewards by a task (tasks/common.py): trajectory i answers task[i]; a reward of 1 counts as correct.

    tools: the engine's. truncated: what was cut is worth 0 ("zero") or left out of loss and mean ("mask").
    """

    def judge(trajectory: Trajectory) -> Verdict:
        if not trajectory.ended:
            return Verdict(0.0, False, False, masked=truncated == "mask")
        reward = float(task.reward(task[trajectory.example], trajectory.text(tokenizer)))
        return Verdict(reward, reward >= 1.0, well_formed(trajectory, tools))

    return judge


def well_formed(trajectory: Trajectory, tools: dict[int, Any]) -> bool:
    """Ended by itself, every tool call closed by the policy, and no tool's output written by it.

    A query that grew past its budget, whose end was forced, was not closed by the policy.
    """
    ends = {tool.end for tool in tools.values()}
    outputs = {i for tool in tools.values() for i in (tool.output_start, tool.output_end)}
    opened = None
    for token, sampled in zip(trajectory.ids, trajectory.mask, strict=True):
        if not sampled:
            if opened is not None:
                return False
            continue
        if token in outputs or (token in ends and (opened is None or token != opened.end)):
            return False
        if opened is None:
            opened = tools.get(token)
        elif token == opened.end:
            opened = None
    return trajectory.ended and opened is None


@dataclass(frozen=True)
class Actor:
    """A model that writes, what it is asked, and what its answers are worth."""

    engine: Engine
    prompt: Callable[[int], list[int]]  # example -> ids
    judge: Judge
    sampling: Sampling


def rollouts(actor: Actor, examples: Sequence[int], seed: int) -> list[Group]:
    """num_samples trajectories of each example, judged. The model is in eval mode while it writes, then as before."""
    model, per_batch = actor.engine.model, max(1, actor.sampling.batch_size // actor.sampling.num_samples)
    was_training = model.training
    model.eval()
    try:
        batches = range(0, len(examples), per_batch)
        return [g for i in batches for g in _sample(actor, examples[i : i + per_batch], mix_seed(seed, i))]
    finally:
        model.train(was_training)  # also drops the weights cast for sampling (nanochat/layers.py)


def _sample(actor: Actor, examples: Sequence[int], seed: int) -> list[Group]:
    engine, sampling, n = actor.engine, actor.sampling, actor.sampling.num_samples
    prompts = [actor.prompt(i) for i in examples]
    ids = [list(p) for p in prompts for _ in range(n)]
    masks = [[0] * len(row) for row in ids]
    columns = engine.generate(
        prompts, n, max_tokens=sampling.max_new_tokens, temperature=sampling.temperature,
        top_k=sampling.top_k or None, seed=seed, traces=(traces := []),
    )  # fmt: skip
    for column, mask in columns:
        for r, (token, sampled) in enumerate(zip(column, mask, strict=True)):
            if token != ENDED:
                ids[r].append(token)
                masks[r].append(sampled)
    written = [
        Trajectory(
            examples[r // n], ids[r], masks[r], len(prompts[r // n]), ids[r][-1] in engine.terminators, traces[r]
        )
        for r in range(len(ids))
    ]
    return [Group(g, [actor.judge(t) for t in g]) for g in (written[i : i + n] for i in range(0, len(written), n))]


def mix_seed(*parts: int) -> int:
    """Several numbers -> one seed; different numbers, unrelated streams."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


class Examples(Protocol):
    """Which examples come, without end."""

    def __next__(self) -> int: ...


class Order:
    """Examples without end: all n of them in a new order each epoch, every world_size-th for this rank."""

    def __init__(self, n: int, seed: int, ranks: Ranks | None = None, position: int = 0):
        assert n > 0
        self.n, self.seed, self.ranks, self.position = n, seed, ranks or Ranks(), position  # position: for a checkpoint
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __next__(self) -> int:
        epoch, place = divmod(self.position * self.ranks.world_size + self.ranks.rank, self.n)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.n)
        self.position += 1
        return int(self._order[place])


def collect(actor: Actor, order: Examples, n: int, seed: int, rounds: int = 1) -> tuple[list[Group], list[Group]]:
    """-> (up to n groups that teach, all groups sampled). For those missing, others are drawn `rounds` times."""
    kept: list[Group] = []
    sampled: list[Group] = []
    for i in range(1 + rounds):
        if len(kept) == n:
            break
        examples = [next(order) for _ in range(n - len(kept))]
        new = rollouts(actor, examples, mix_seed(seed, i))
        sampled += new
        kept += [g for g in new if g.teaches]
    return kept, sampled


# ---- the gradient ----


def advantages(rewards: Sequence[float], by_std: bool = False) -> list[float]:
    """R_i - mean(R), of one group; by_std divides by the standard deviation too (GRPO, arXiv 2402.03300)."""
    r = np.asarray(rewards, dtype=np.float64)
    a = r - r.mean()
    return (a / (r.std() + 1e-4) if by_std else a).tolist()


def weights(group: Group, algorithm: Algorithm) -> list[float]:
    """What -log p of each sample that counts is multiplied with."""
    if algorithm == "rejection":
        return [float(v.correct) for v in group.verdicts if not v.masked]
    return advantages(group.rewards, by_std=algorithm != "reinforce")


@dataclass(frozen=True)
class Batch:
    """Trajectories as tensors, right-padded with id 0."""

    ids: Tensor  # (B, T) long
    sampled: Tensor  # (B, T) bool: the ids that are trained on
    advantages: Tensor  # (B,) float32
    rewards: Tensor  # (B,) float32
    correct: Tensor  # (B,) bool
    lengths: list[int]
    old: Tensor | None = None  # (B, T - 1) log p of the targets when they were sampled: makes the loss one of ratios

    @classmethod
    def of(
        cls, groups: Sequence[Group], device: torch.device | str = "cpu", algorithm: Algorithm = "reinforce"
    ) -> "Batch":
        """Groups -> their trajectories that count, the shortest first, so that parts() pads little."""
        rows = []
        for group in groups:
            pairs = [(t, v) for t, v in zip(group.trajectories, group.verdicts, strict=True) if not v.masked]
            rows += zip(pairs, weights(group, algorithm), strict=True)
        rows.sort(key=lambda row: len(row[0][0].ids))
        lengths = [len(t.ids) for (t, _), _ in rows]
        ids = torch.zeros(len(rows), max(lengths, default=1), dtype=torch.long)
        sampled = torch.zeros_like(ids, dtype=torch.bool)
        for r, ((t, _), _) in enumerate(rows):
            ids[r, : len(t.ids)] = torch.tensor(t.ids)
            sampled[r, : len(t.ids)] = torch.tensor(t.mask, dtype=torch.bool)
        return cls(
            ids.to(device),
            sampled.to(device),
            torch.tensor([a for _, a in rows], dtype=torch.float32, device=device),
            torch.tensor([v.reward for (_, v), _ in rows], dtype=torch.float32, device=device),
            torch.tensor([v.correct for (_, v), _ in rows], dtype=torch.bool, device=device),
            lengths,
        )

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """Ids the policy sampled: what a summed loss is divided by."""
        return int(self.sampled[:, 1:].sum())

    @property
    def targets(self) -> Tensor:
        """(B, T - 1): the id after each position where the policy sampled it, else -1."""
        return torch.where(self.sampled[:, 1:], self.ids[:, 1:], -1)

    def parts(self, size: int) -> Iterator["Batch"]:
        """Batches of up to `size` rows, each cut to its longest row."""
        for i in range(0, len(self), size):
            j, T = slice(i, i + size), max(self.lengths[i : i + size])
            yield Batch(
                self.ids[j, :T], self.sampled[j, :T], self.advantages[j], self.rewards[j], self.correct[j],
                self.lengths[j], None if self.old is None else self.old[j, : T - 1],
            )  # fmt: skip


@torch.no_grad()
def remember(model: GPT, batch: Batch, size: int) -> Batch:
    """The batch with log p under the model as it is, so that it can be used for several updates."""
    old = torch.zeros(batch.ids[:, 1:].shape, device=batch.ids.device)  # (B, T - 1)
    for start, part in zip(range(0, len(batch), size), batch.parts(size), strict=True):
        nll = model(part.ids[:, :-1], part.targets, loss_reduction="none")
        old[start : start + len(part), : nll.shape[1]] = -nll
    return replace(batch, old=old)


def policy_loss(
    model: GPT, batch: Batch, correct_weight: float = 0.0, reference: GPT | None = None, kl_coef: float = 0.0
) -> tuple[Tensor, Tensor]:
    """-> (loss summed over sampled tokens, log p of every target (B, T - 1), 0 where there is none, detached).

    correct_weight: weight of the cross-entropy of correct trajectories, against the decay of their likelihood that
    precedes a collapse (arXiv 2512.04220). On policy its expected gradient is that of the reward, only larger.
    With batch.old the advantages weigh min(r A, clip(r) A), r = p / p_old of each token (PPO, 1707.06347, eq. 7).
    reference, kl_coef: GRPO's estimate of the divergence from a frozen model (arXiv 2402.03300, eq. 4).
    """
    x, y = batch.ids[:, :-1], batch.targets
    nll = model(x, y, loss_reduction="none")  # (B, T - 1) nats, 0 where y is -1
    if batch.old is None:
        weight = batch.advantages + correct_weight * batch.correct  # (B,)
        loss = (weight[:, None] * nll).sum()
    else:
        r, A = (-nll - batch.old).exp(), batch.advantages[:, None]
        gain = torch.minimum(r * A, r.clamp(1 - CLIP[0], 1 + CLIP[1]) * A)  # (B, T - 1)
        loss = correct_weight * (batch.correct[:, None] * nll).sum() - gain[y >= 0].sum()
    if reference is not None and kl_coef:
        with torch.no_grad():
            reference_nll = reference(x, y, loss_reduction="none")
        ratio = nll - reference_nll  # log p_ref - log p
        loss = loss + kl_coef * (ratio.exp() - ratio - 1).sum()
    return loss, -nll.detach()


# ---- held-out score ----


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Chance that k of n samples hold a correct one, without bias (arXiv 2107.03374, eq. 1)."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def evaluate(actor: Actor, n_examples: int, seed: int, ranks: Ranks | None = None) -> dict[str, dict[str, float]]:
    """ "reward", "valid" and "pass@k", k = 1, 2, 4 .. num_samples, over examples 0 .. n_examples - 1.

    Each {"value", "stderr", "n"}: means over examples with the standard error of that mean. Ranks share the work.
    """
    ranks, n = ranks or Ranks(), actor.sampling.num_samples
    ks = sorted({min(2**i, n) for i in range(n.bit_length() + 1)})
    names = ["reward", "valid", *(f"pass@{k}" for k in ks)]
    sums = torch.zeros(2, len(names), dtype=torch.float64)
    mine = range(ranks.rank, n_examples, ranks.world_size)
    for group in rollouts(actor, mine, mix_seed(seed, ranks.rank)):
        c = sum(v.correct for v in group.verdicts)
        means = [sum(v.reward for v in group.verdicts) / n, sum(v.valid for v in group.verdicts) / n]
        row = torch.tensor([*means, *(pass_at_k(n, c, k) for k in ks)], dtype=torch.float64)
        sums += torch.stack((row, row * row))
    total, squares = all_reduce_sum(sums.float().to(actor.engine.model.device)).tolist()
    return {name: score(total[i], squares[i], n_examples) for i, name in enumerate(names)}


def score(total: float, squares: float, n: int) -> dict[str, float]:
    """Mean and its standard error from the sums of n values and of their squares."""
    mean = total / n
    variance = max(squares / n - mean * mean, 0.0) * n / max(n - 1, 1)
    return {"value": mean, "stderr": math.sqrt(variance / n), "n": n}
