"""The losses of the stages, each a function of one step's prompts -> (summed loss, how many targets it sums over).

reconstruct   decoder frozen: j chunks as vectors, then their tokens (curriculum over j)
continuation  j chunks, a share of them expanded, then the tokens that follow them
questions     questions with documents, a share of chunks expanded; the model before compression is the teacher
supervise     the policy learns which chunks are evidence, or log p(answer | chunk i expanded) - log p(answer | none)
reinforce     the policy's own choices, rewarded with the mean log p of the right answer (no generation)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.compress.chunks import Chunk, Prompt
from nanochat.compress.curriculum import size_shares
from nanochat.compress.policy import Policy, entropy, log_prob, n_expanded, sample
from nanochat.compress.reader import Reader, at_targets
from nanochat.gpt import GPT

# Shares of chunks that stay tokens while training: one checkpoint for every budget; 1 keeps it a plain RAG model
SHARES = (0.1, 0.25, 0.5, 1.0, 1.0)  # more often all, else reading all is unlearnt (LOG 2026-11-22)
UTILITY_TEMPERATURE = 0.2  # nats per token; utilities differ by some tenths to some nats


@dataclass(frozen=True)
class Stream:
    """Texts to reconstruct and to go on with: the ids of their chunks, in order."""

    chunks: list[list[int]]
    bos: int
    doc: int

    def take(self, rng: np.random.Generator, n: int) -> list[list[int]]:
        at = int(rng.integers(0, max(1, len(self.chunks) - n + 1)))
        return self.chunks[at : at + n]

    def reconstruction(self, rng: np.random.Generator, j: int) -> Prompt:
        """<|bos|>, j chunks, <|doc|>, the same tokens again, which are trained on."""
        chunks = self.take(rng, j)
        ids, spans = self._laid(chunks)
        again = [i for chunk in chunks for i in chunk]
        return Prompt([*ids, self.doc, *again], [0] * (len(ids) + 1) + [1] * len(again), spans)

    def continuation(self, rng: np.random.Generator, j: int) -> Prompt:
        """<|bos|>, j chunks, then as many more, whose tokens are trained on."""
        chunks = self.take(rng, 2 * j)
        ids, spans = self._laid(chunks[:j])
        after = [i for chunk in chunks[j:] for i in chunk]
        return Prompt(ids + after, [0] * len(ids) + [1] * len(after), spans)

    def _laid(self, chunks: list[list[int]]) -> tuple[list[int], list[Chunk]]:
        ids, spans = [self.bos], list[Chunk]()
        for chunk in chunks:
            spans.append(Chunk(len(ids), len(ids) + len(chunk)))
            ids += chunk
        return ids, spans


def of_size(rng: np.random.Generator, progress: float, largest: int) -> int:
    """A number of chunks drawn from the curriculum."""
    shares = size_shares(progress, largest)
    return int(2 ** rng.choice(len(shares), p=shares))


def reconstruct(reader: Reader, prompts: Sequence[Prompt]) -> tuple[Tensor, int]:
    """The model's parameters must not ask for gradients; those of the encoder do."""
    batch = reader.batch(prompts, [()] * len(prompts))
    return reader.model(batch.x, batch.y, loss_reduction="sum", inject=reader.inject(batch)), batch.targets


def spread(rng: np.random.Generator, prompt: Prompt, gold_share: float) -> list[int]:
    """Which chunks stay tokens in training: a random share of SHARES; with probability gold_share, the gold, too."""
    n = len(prompt.chunks)
    chosen = set(rng.permutation(n)[: n_expanded(n, float(rng.choice(SHARES)))].tolist())
    return sorted(chosen | set(prompt.gold)) if rng.random() < gold_share else sorted(chosen)


def distil(
    reader: Reader, teacher: GPT | None, prompts: Sequence[Prompt], expanded: Sequence[Sequence[int]], weight: float
) -> tuple[Tensor, int]:
    """Cross-entropy + weight * KL(teacher reading all tokens || model reading the mixture), over the targets.

    The signal of PISCO (arXiv 2501.16075), whose compressor needs no reconstruction at all. teacher None: no KL.
    """
    batch = reader.batch(prompts, expanded)
    inject = reader.inject(batch)
    if teacher is None or weight == 0:
        return reader.model(batch.x, batch.y, loss_reduction="sum", inject=inject), batch.targets
    logp = at_targets(reader.model, batch, inject)  # (n, V)
    loss = F.nll_loss(logp, batch.y[batch.y >= 0], reduction="sum")
    whole = reader.batch(prompts, [range(len(p.chunks)) for p in prompts])
    with torch.no_grad():
        wanted = at_targets(teacher, whole, None)
    return loss + weight * F.kl_div(logp, wanted, log_target=True, reduction="sum"), batch.targets


# ---- the policy ----


@torch.no_grad()
def rewards(
    reader: Reader, prompts: Sequence[Prompt], choices: Sequence[Sequence[Sequence[int]]], rows: int
) -> list[Tensor]:
    """Mean log p of each prompt's answer under each of its choices, teacher forced, `rows` of them at a time."""
    flat = [(p, c) for p, own in zip(prompts, choices, strict=True) for c in own]
    parts = []
    for i in range(0, len(flat), rows):
        part = flat[i : i + rows]
        parts.append(reader.logprobs(reader.batch([p for p, _ in part], [c for _, c in part])))
    return list(torch.cat(parts).split([len(own) for own in choices]))


def utilities(reader: Reader, prompts: Sequence[Prompt], rows: int) -> list[Tensor]:
    """log p(answer | only chunk i expanded) - log p(answer | none), mean per token: (L,) for each prompt."""
    alone: list[list[list[int]]] = [[[], *([i] for i in range(len(p.chunks)))] for p in prompts]
    return [logp[1:] - logp[0] for logp in rewards(reader, prompts, alone, rows)]


def supervise(
    reader: Reader, policy: Policy, prompts: Sequence[Prompt], labels: str, rows: int
) -> tuple[Tensor, int, dict[str, Any]]:
    """Cross-entropy of the scores with what each chunk is worth. labels: "gold", all of the evidence alike and no
    forward of the model; or "utility", softmax(utility / temperature)."""
    scores = policy(*reader.look(prompts)).log_softmax(-1)  # (B, L)
    worth = torch.zeros_like(scores)
    if labels == "gold":
        for b, prompt in enumerate(prompts):
            worth[b, list(prompt.gold)] = 1 / len(prompt.gold)
    else:
        for b, gain in enumerate(utilities(reader, prompts, rows)):
            worth[b, : len(gain)] = (gain / UTILITY_TEMPERATURE).softmax(-1)
    found = worth.gather(1, scores.argmax(1, keepdim=True)) > 0.5 * worth.amax(1, keepdim=True)
    loss = -(worth * scores.masked_fill(worth == 0, 0)).sum()
    return loss, len(prompts), {"policy_finds_best": float(found.float().mean())}


def advantages(reward: Tensor, normalize_std: bool = False) -> Tensor:
    """(B, G) -> reward minus its group's mean; divided by its standard deviation as GRPO does, if asked for."""
    a = reward - reward.mean(1, keepdim=True)
    return a / (reward.std(1, keepdim=True) + 1e-4) if normalize_std else a


def reinforce(
    reader: Reader,
    policy: Policy,
    prompts: Sequence[Prompt],
    p: float,
    n_sample: int,
    generator: torch.Generator,
    rows: int,
    entropy_weight: float = 0.01,
    normalize_std: bool = False,
) -> tuple[Tensor, int, dict[str, Any]]:
    """On-policy: -A_g log p(choice g) / number of picks, a group of n_sample choices for each prompt."""
    counts = torch.tensor([n_expanded(len(q.chunks), p) for q in prompts])
    scores = policy(*reader.look(prompts))  # (B, L)
    picks = sample(scores.detach(), counts, n_sample, generator)  # (B, G, n)
    choices = [[[i for i in row if i >= 0] for row in own] for own in picks.tolist()]
    reward = torch.stack(rewards(reader, prompts, choices, rows))  # (B, G)
    logp = log_prob(scores, picks) / counts.to(scores.device)[:, None]
    surprise = entropy(scores)
    loss = -(advantages(reward, normalize_std) * logp).mean(1).sum() - entropy_weight * surprise.sum()
    figures = {"reward": float(reward.mean()), "reward_spread": float(reward.std(1).mean()),
               "policy_entropy": float(surprise.detach().mean())}  # fmt: skip
    return loss, len(prompts), figures
