"""Associative recall: made-up sequences that tell architectures apart in a minute, and toy models that learn them.

mqar: pairs of a key and its value, then filler in which every key comes once more; at each its value is asked for
(multi-query associative recall, Zoology, arXiv 2312.04927; the queries' places follow a power law there, here they are
uniform). needle: one key and its value at a random depth among other keys, the first key again at the end. There is but
one value: what is tested is whether a model that finds it at one length does so at others.

Ids: 0 is filler, 1 .. V/2 - 1 are keys, V/2 .. V - 1 are values.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanochat.config import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW, lr_schedule, muon_momentum

CHECK_EVERY = 250  # steps between looks at the held-out sequences
SOLVED = 0.999  # held-out accuracy at which a run ends
HELD_OUT = 2**20  # added to the seed of the training sequences: another stream
RATES = {"embedding": 0.2, "unembedding": 0.01, "scalar": 0.02, "ssm": 0.01}  # those of base_train, about


def mqar(n: int, seq_len: int, vocab_size: int, n_pair: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """-> x, y (n, seq_len) long; y is the value of the key at that place, -1 where nothing is asked."""
    n_key = vocab_size // 2 - 1
    if n_pair < 1 or 3 * n_pair > seq_len or n_pair > n_key:
        raise UserError(
            f"{n_pair} pairs do not fit {seq_len} tokens and {n_key} keys: "
            f"expected 1 .. {min(seq_len // 3, n_key)} pairs, or more tokens or a larger vocabulary"
        )
    keys = 1 + torch.rand(n, n_key, generator=generator).argsort(1)[:, :n_pair]  # distinct in each row
    values = _values((n, n_pair), vocab_size, generator)
    places = 2 * n_pair + torch.rand(n, seq_len - 2 * n_pair, generator=generator).argsort(1)[:, :n_pair]
    x = torch.zeros(n, seq_len, dtype=torch.long)
    x[:, 0 : 2 * n_pair : 2], x[:, 1 : 2 * n_pair : 2] = keys, values
    x.scatter_(1, places, keys)
    return x, torch.full_like(x, -1).scatter_(1, places, values)


def needle(n: int, seq_len: int, vocab_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """-> x, y (n, seq_len) long; y is the needle's value at the last place, -1 elsewhere."""
    if seq_len < 3 or vocab_size < 6:
        raise UserError(f"a needle in {seq_len} tokens of {vocab_size} ids: expected at least 3 tokens and 6 ids")
    n_key, rows = vocab_size // 2 - 1, torch.arange(n)
    key, depth = torch.randint(n_key, (n,), generator=generator), torch.randint(seq_len - 2, (n,), generator=generator)
    x = 1 + (key[:, None] + torch.randint(1, n_key, (n, seq_len), generator=generator)) % n_key  # never the key itself
    y = torch.full_like(x, -1)
    x[:, -1] = x[rows, depth] = 1 + key
    y[:, -1] = x[rows, depth + 1] = _values((n, 1), vocab_size, generator)[:, 0]
    return x, y


def _values(shape: tuple[int, int], vocab_size: int, generator: torch.Generator) -> Tensor:
    return torch.randint(vocab_size // 2, vocab_size, shape, generator=generator)


@dataclass(frozen=True)
class Toy:
    """A model to be trained on one of the two tasks at each of the rates, until it has solved it."""

    config: GPTConfig  # seq_len: the length of training
    n_pair: int  # of mqar; 0 = the needle
    steps: int
    batch_size: int
    lrs: tuple[float, ...]
    seed: int
    test_lengths: tuple[int, ...]
    test_size: int = 512  # held-out sequences of each length
    device: str = "cpu"

    def draw(self, n: int, seq_len: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """x, y: (n, seq_len), on the device."""
        V = self.config.vocab_size
        x, y = mqar(n, seq_len, V, self.n_pair, generator) if self.n_pair else needle(n, seq_len, V, generator)
        return x.to(self.device), y.to(self.device)


def learn(toy: Toy) -> list[dict[str, Any]]:
    """Train at one rate after the other, until one solves the task -> a row for each."""
    rows: list[dict[str, Any]] = []
    for lr in toy.lrs:
        start = time.perf_counter()
        model, steps = train(toy, lr)
        found = {T: accuracy(toy, model, T) for T in toy.test_lengths}
        seconds = time.perf_counter() - start
        rows.append({"lr": lr, "seed": toy.seed, "steps": steps, "accuracy": found, "seconds": seconds})
        if found.get(toy.config.seq_len, 0.0) >= SOLVED:
            break
    return rows


def train(toy: Toy, lr: float) -> tuple[GPT, int]:
    """The optimizer of every stage on the loss of the answers alone, lr for the matrices -> the model, its steps.

    With AdamW alone two attention layers stayed at guessing among the row's values for 2,500 steps; with Muon they
    solve mqar of 4 pairs within some hundred.
    """
    model = GPT(toy.config).to(toy.device)
    model.init_weights(toy.seed)
    model.set_compute(torch.float32)
    optimizer = MuonAdamW(model, model.param_groups(), {**RATES, "matrix": lr})
    generator = torch.Generator().manual_seed(toy.seed)
    for step in range(toy.steps):
        if step % CHECK_EVERY == 0 and step and accuracy(toy, model, toy.config.seq_len) >= SOLVED:
            return model, step
        x, y = toy.draw(toy.batch_size, toy.config.seq_len, generator)
        model(x, y).backward()
        optimizer.gather(clip=1.0)
        optimizer.step(lr_schedule(step / toy.steps, 0.05, 0.5, 0.0), muon_momentum(step))
        optimizer.zero_grad()
    return model, toy.steps


@torch.inference_mode()
def accuracy(toy: Toy, model: GPT, seq_len: int) -> float:
    """Share of right answers on held-out sequences of this length."""
    generator, right, asked = torch.Generator().manual_seed(toy.seed + HELD_OUT), 0, 0
    model.eval()
    for start in range(0, toy.test_size, 64):
        x, y = toy.draw(min(64, toy.test_size - start), seq_len, generator)
        answers = model(x)[y >= 0].argmax(-1)
        right, asked = right + int((answers == y[y >= 0]).sum()), asked + len(answers)
    model.train()
    return right / asked
