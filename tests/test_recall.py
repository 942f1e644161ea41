"""The generators of recall data, and that a toy model learns from them."""

import pytest
import torch

from nanochat.config import UserError
from nanochat.gpt import GPTConfig
from tasks.recall import HELD_OUT, SOLVED, Toy, learn, mqar, needle

TINY = GPTConfig(n_layer=2, d_model=32, n_head=2, vocab_size=16, seq_len=8)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_mqar_asks_once_for_every_pair_it_has_shown_and_the_answer_is_its_value() -> None:
    x, y = mqar(50, 32, 64, 4, seeded())
    for row, answers in zip(x.tolist(), y.tolist(), strict=True):
        pairs = dict(zip(row[0:8:2], row[1:8:2], strict=True))
        assert len(pairs) == 4  # distinct keys
        assert set(pairs) <= set(range(1, 32)) and set(pairs.values()) <= set(range(32, 64))
        asked = {row[t]: a for t, a in enumerate(answers) if a >= 0}
        assert asked == pairs
        assert all(a == -1 for a in answers[:8])
        assert all((row[t] == 0) == (answers[t] == -1) for t in range(8, 32))  # the rest is filler


def test_needle_hides_one_key_and_asks_for_what_followed_it() -> None:
    x, y = needle(200, 24, 64, seeded())
    depths = set()
    for row, answers in zip(x.tolist(), y.tolist(), strict=True):
        key = row[-1]
        assert row.count(key) == 2 and sorted(row)[-1] >= 32 and all(1 <= v < 32 for v in sorted(row)[:-1])
        assert answers[:-1] == [-1] * 23 and answers[-1] == row[row.index(key) + 1]
        depths.add(row.index(key))
    assert depths == set(range(22))


def test_a_seed_fixes_the_data_and_the_held_out_sequences_are_others() -> None:
    for draw in (lambda g: mqar(8, 32, 64, 4, g), lambda g: needle(8, 32, 64, g)):
        assert all(torch.equal(a, b) for a, b in zip(draw(seeded(3)), draw(seeded(3)), strict=True))
        assert not torch.equal(draw(seeded(3))[0], draw(seeded(4))[0])
        assert not torch.equal(draw(seeded(3))[0], draw(seeded(3 + HELD_OUT))[0])


def test_every_key_and_value_is_drawn() -> None:
    x, _ = mqar(400, 12, 16, 3, seeded())
    assert set(x.flatten().tolist()) == set(range(16))


@pytest.mark.parametrize(("n_pair", "seq_len", "vocab_size"), [(5, 14, 64), (8, 64, 16), (0, 32, 64)])
def test_pairs_that_do_not_fit_are_refused(n_pair: int, seq_len: int, vocab_size: int) -> None:
    with pytest.raises(UserError, match=f"{n_pair} pairs do not fit {seq_len} tokens"):
        mqar(1, seq_len, vocab_size, n_pair, seeded())


def test_a_needle_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="a needle in 2 tokens of 64 ids"):
        needle(1, 2, 64, seeded())


def test_a_rate_that_solves_the_task_ends_the_run_and_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.recall.CHECK_EVERY", 20)
    toy = Toy(TINY, n_pair=1, steps=200, batch_size=16, lrs=(0.02, 0.01), seed=0, test_lengths=(8, 12), test_size=64)
    (row,) = learn(toy)
    assert row["steps"] < 200 and row["accuracy"][8] >= SOLVED and set(row["accuracy"]) == {8, 12}


def test_every_rate_is_tried_when_none_solves_the_task_and_seeds_repeat() -> None:
    toy = Toy(TINY, n_pair=0, steps=3, batch_size=4, lrs=(0.02, 0.01), seed=1, test_lengths=(8, 16), test_size=32)
    first, second = learn(toy), learn(toy)
    assert [(r["lr"], r["steps"]) for r in first] == [(0.02, 3), (0.01, 3)]
    assert [r["accuracy"] for r in first] == [r["accuracy"] for r in second]
