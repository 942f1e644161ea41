"""The choice of chunks: Plackett-Luce against brute force, rules, and that learning finds the chunk that matters."""

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nanochat.compress import stages
from nanochat.compress.chunks import Chunk, Prompt
from nanochat.compress.evaluate import verdicts
from nanochat.compress.policy import (
    FEATURES,
    Policy,
    best,
    bm25,
    entropy,
    log_prob,
    n_expanded,
    rule_scores,
    sample,
)
from nanochat.compress.stages import advantages, reinforce, supervise

SCORES = torch.tensor([0.3, -1.0, 2.0, 0.0])


def brute_force(scores: list[float], picks: tuple[int, ...]) -> float:
    """Probability of drawing these in this order from softmax(scores) without replacement."""
    left, p = dict(enumerate(map(math.exp, scores))), 1.0
    for pick in picks:
        p *= left[pick] / sum(left.values())
        del left[pick]
    return p


def test_log_probabilities_are_those_of_drawing_without_replacement() -> None:
    for n in (1, 2, 3, 4):
        orders = list(itertools.permutations(range(4), n))
        found = log_prob(SCORES[None], torch.tensor([orders]))[0]
        expected = [brute_force(SCORES.tolist(), order) for order in orders]
        torch.testing.assert_close(found.exp(), torch.tensor(expected))
        assert found.exp().sum().item() == pytest.approx(1)


def test_rows_may_have_fewer_chunks_and_fewer_picks() -> None:
    scores = torch.tensor([[0.3, -1.0, 2.0, 0.0], [1.0, 0.5, -torch.inf, -torch.inf]])
    picks = torch.tensor([[[2, 0, 1]], [[1, -1, -1]]])
    expected = [brute_force(SCORES.tolist(), (2, 0, 1)), brute_force([1.0, 0.5], (1,))]
    torch.testing.assert_close(log_prob(scores, picks)[:, 0].exp(), torch.tensor(expected))
    drawn = sample(scores, torch.tensor([3, 2]), 200, torch.Generator().manual_seed(0))
    assert drawn.shape == (2, 200, 3) and bool((drawn[0] >= 0).all())
    assert bool((drawn[1, :, 2] == -1).all()) and set(drawn[1, :, :2].flatten().tolist()) == {0, 1}
    assert best(scores, torch.tensor([3, 1])).tolist() == [[2, 0, 3], [0, -1, -1]]


def test_samples_have_the_probabilities_that_log_prob_says() -> None:
    n = 40_000
    drawn = sample(SCORES[None], torch.tensor([2]), n, torch.Generator().manual_seed(1))[0]
    for order in itertools.permutations(range(4), 2):
        p = brute_force(SCORES.tolist(), order)
        share = (drawn == torch.tensor(order)).all(1).float().mean().item()
        assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / n)


def test_gradient_of_a_choice_raises_its_scores() -> None:
    scores = SCORES.clone()[None].requires_grad_()
    log_prob(scores, torch.tensor([[[1]]])).sum().backward()
    expected = -SCORES.softmax(-1)
    expected[1] += 1
    assert scores.grad is not None
    torch.testing.assert_close(scores.grad[0], expected)


def test_entropy_is_the_logarithm_of_equal_chunks() -> None:
    assert entropy(torch.tensor([[1.0, 1.0, 1.0, -torch.inf]])).item() == pytest.approx(math.log(3))


def test_shares_of_chunks() -> None:
    assert [n_expanded(20, p) for p in (0, 0.01, 0.1, 0.5, 1)] == [0, 1, 2, 10, 20]
    assert n_expanded(0, 0.5) == 0 and n_expanded(1, 0.9) == 1


def test_advantages_are_relative_to_the_group() -> None:
    reward = torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]])
    assert advantages(reward).tolist() == [[-1, 0, 1], [0, 0, 0]]
    assert advantages(reward, normalize_std=True)[0].std().item() == pytest.approx(1, abs=1e-3)


# ---- rules ----


def prompt(n: int, gold: tuple[int, ...] = ()) -> Prompt:
    ids = list(range(3 * n + 1))
    return Prompt(ids, [0] * 3 * n + [1], [Chunk(3 * i, 3 * i + 3, i + 1) for i in range(n)], "where", gold)


def test_bm25_finds_the_chunk_that_says_the_words() -> None:
    texts = ["[1] Ada Ada was born in Rome", "[2] Ben Ben was born in Oslo", "[3] Ada Ada likes soup", "nothing of it"]
    scores = bm25("Where was Ada born?", texts)
    assert scores.argmax() == 0 and scores.max() == 1 and scores[3] == 0
    assert bm25("zebra", texts).tolist() == [0, 0, 0, 0]


def test_rules_choose_what_their_names_say() -> None:
    p, features = prompt(4, gold=(1,)), np.zeros((4, len(FEATURES)), np.float32)
    features[:, FEATURES.index("bm25")] = [0.1, 0.2, 1.0, 0.5]
    features[:, FEATURES.index("cosine")] = [0.9, 0.2, 0.3, 0.5]

    def order(name: str, seed: int = 0) -> list[int]:
        return np.argsort(-rule_scores(name, p, features, seed), kind="stable").tolist()

    assert order("first") == [0, 1, 2, 3]
    assert order("bm25") == [2, 3, 1, 0]
    assert order("cosine") == [0, 3, 2, 1]
    assert order("oracle") == [1, 2, 3, 0]
    assert order("random", 1) == order("random", 1)
    assert len({tuple(order("random", s)) for s in range(20)}) > 5


def test_verdicts_compare_rl_with_full_context_and_with_the_best_other_policy() -> None:
    def row(policy: str, p: float, right: list[float]) -> dict[str, Any]:
        return {"policy": policy, "p": p, "rate": 8.0, "accuracy": float(np.mean(right)), "right": right}

    few, many = [0.0, 1.0] * 50, [1.0] * 90 + [0.0] * 10
    rows = [row("all", 1, many), row("bm25", 0.1, few), row("oracle", 0.1, many), row("random", 0.1, [0.0] * 100),
            row("rl", 0.1, many)]  # fmt: skip
    against_all, against_best = verdicts(rows)
    assert "not different from all" in against_all
    assert "better than bm25: +40.0 points" in against_best
    rows[-1]["right"], rows[-1]["accuracy"] = few, 0.5
    assert "worse than all" in verdicts(rows)[0] and "not different from bm25" in verdicts(rows)[1]


# ---- learning ----


@dataclass
class Toy:
    """A reader whose question vector is near one chunk's: that chunk is the evidence."""

    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    n: int = 8
    seen: tuple[Tensor, ...] = ()

    def prompts(self, n: int) -> list[Prompt]:
        chunks = torch.from_numpy(self.rng.standard_normal((n, self.n, 16))).float()
        gold = self.rng.integers(0, self.n, n)
        question = chunks[torch.arange(n), torch.from_numpy(gold)]
        self.seen = (question, chunks, torch.zeros(n, self.n, len(FEATURES)), torch.ones(n, self.n, dtype=torch.bool))
        return [prompt(self.n, (int(g),)) for g in gold]

    def look(self, prompts: list[Prompt]) -> tuple[Tensor, ...]:
        return self.seen


def paid(reader: Any, prompts: list[Prompt], choices: list[list[list[int]]], rows: int) -> list[Tensor]:
    return [torch.tensor([float(p.gold[0] in c) for c in own]) for p, own in zip(prompts, choices, strict=True)]


def hits(toy: Toy, policy: Policy) -> float:
    prompts = toy.prompts(400)
    with torch.no_grad():
        picks = best(policy(*toy.look(prompts)), torch.ones(400, dtype=torch.long))[:, 0].tolist()
    return float(np.mean([pick == p.gold[0] for pick, p in zip(picks, prompts, strict=True)]))


def learn(toy: Toy, steps: int, loss_of: Any) -> Policy:
    torch.manual_seed(0)
    policy = Policy(16, width=32)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    for _ in range(steps):
        loss, n, _ = loss_of(policy, toy.prompts(32))
        optimizer.zero_grad()
        (loss / n).backward()
        optimizer.step()
    return policy


def test_reinforcement_beats_random_where_one_chunk_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "rewards", paid)
    toy, generator = Toy(), torch.Generator().manual_seed(0)
    reader: Any = toy
    policy = learn(toy, 150, lambda policy, p: reinforce(reader, policy, p, 0.125, 8, generator, 64, 0.0))
    assert hits(toy, policy) > 0.5, "random picks one of eight: 0.125"


@pytest.mark.parametrize("labels", ["gold", "utility"])
def test_supervision_finds_the_chunk_that_matters(labels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "rewards", paid)
    toy = Toy()
    reader: Any = toy
    policy = learn(toy, 80, lambda policy, p: supervise(reader, policy, p, labels, 64))
    assert hits(toy, policy) > 0.8


def test_a_policy_starts_as_bm25_and_does_not_see_pads() -> None:
    policy, rng = Policy(16), torch.Generator().manual_seed(0)
    question, chunks = torch.randn(1, 16, generator=rng), torch.randn(1, 3, 16, generator=rng)
    features = torch.zeros(1, 3, len(FEATURES))
    features[0, :, 0] = torch.tensor([0.1, 1.0, 0.5])
    with torch.no_grad():
        scores = policy(question, chunks, features, torch.ones(1, 3, dtype=torch.bool))
        assert scores[0].argsort(descending=True).tolist() == [1, 2, 0]
        torch.nn.init.normal_(policy.score.weight)
        scores = policy(question, chunks, features, torch.ones(1, 3, dtype=torch.bool))
        padded = [torch.cat((t, torch.randn(1, 2, t.size(2))), 1) for t in (chunks, features)]
        valid = torch.tensor([[True, True, True, False, False]])
        again = policy(question, *padded, valid)
    torch.testing.assert_close(again[:, :3], scores)
    assert bool((again[:, 3:] == -torch.inf).all())
