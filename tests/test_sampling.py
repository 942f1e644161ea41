import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.config import UserError
from nanochat.sampling import Sampler, sample

GRID = (torch.arange(20000, dtype=torch.float64) / 20000).float()  # u, evenly spread: frequencies without chance


def shares(logits: list[float], temperature: float = 1.0, top_k=None, top_p=None) -> list[float]:
    """How much of [0, 1) falls to each id: the exact distribution `sample` draws from, up to 1/20000."""
    rows = torch.tensor(logits).expand(len(GRID), -1)
    picked = sample(rows, GRID, temperature, top_k, top_p)
    return (torch.bincount(picked, minlength=len(logits)) / len(GRID)).tolist()


LOGITS = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15]).log().tolist()


def test_plain_sampling_follows_the_softmax():
    assert shares(LOGITS) == pytest.approx([0.1, 0.4, 0.05, 0.3, 0.15], abs=2e-4)
    assert shares(LOGITS, temperature=2.0) == pytest.approx(
        torch.softmax(torch.tensor(LOGITS) / 2, 0).tolist(), abs=2e-4
    )


def test_top_k_keeps_the_k_best_in_proportion():
    assert shares(LOGITS, top_k=2) == pytest.approx([0, 4 / 7, 0, 3 / 7, 0], abs=2e-4)
    assert shares(LOGITS, top_k=1) == [0, 1, 0, 0, 0]
    assert shares(LOGITS, top_k=99) == pytest.approx(shares(LOGITS), abs=2e-4)


def test_top_p_keeps_the_fewest_ids_that_reach_p():
    assert shares(LOGITS, top_p=0.65) == pytest.approx([0, 4 / 7, 0, 3 / 7, 0], abs=2e-4)
    assert shares(LOGITS, top_p=0.75) == pytest.approx([0, 40 / 85, 0, 30 / 85, 15 / 85], abs=2e-4)
    assert shares(LOGITS, top_p=1e-9) == [0, 1, 0, 0, 0]
    assert shares(LOGITS, top_p=1.0) == pytest.approx(shares(LOGITS), abs=2e-4)


def test_top_p_counts_what_top_k_left():
    assert shares(LOGITS, top_k=3, top_p=0.5) == pytest.approx([0, 40 / 70, 0, 30 / 70, 0], abs=2e-4)


def test_temperature_near_zero_is_greedy_without_overflow():
    for temperature in (0.0, 1e-45, 1e-30, 1e-3):
        assert shares([-3e38, 5.0, 4.9, 3.0], temperature) == [0, 1, 0, 0]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 40), st.one_of(st.none(), st.integers(1, 50)), st.floats(0.01, 1.0))
def test_an_id_of_probability_zero_is_never_drawn(seed, V, top_k, top_p):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(V, generator=g)
    logits[torch.rand(V, generator=g) < 0.5] = -torch.inf
    logits[seed % V] = 0.0
    u = torch.tensor([0.0, 1 - 2**-24, *torch.rand(50, generator=g).tolist()])
    for p in (None, top_p):
        picked = sample(logits.expand(len(u), -1), u, 1.0, top_k, p)
        assert torch.isfinite(logits[picked]).all()


def test_seeds_repeat_and_differ_by_row_and_by_seed():
    logits = torch.zeros(4, 1000)

    def ids(n_row, seed, steps=150):
        sampler = Sampler(n_row, 1.0, None, None, seed)
        return [sampler(logits[:n_row], list(range(n_row))) for _ in range(steps)]

    a = list(zip(*ids(4, seed=7), strict=True))
    assert a == list(zip(*ids(4, seed=7), strict=True))
    assert a[:2] == list(zip(*ids(2, seed=7), strict=True))
    assert len({*a, *zip(*ids(4, seed=8), strict=True)}) == 8


def test_a_row_draws_the_same_numbers_when_others_have_left():
    whole, fewer = Sampler(3, 1.0, None, None, 0), Sampler(3, 1.0, None, None, 0)
    logits = torch.zeros(3, 1000)
    assert whole(logits, [0, 1, 2]) == fewer(logits, [0, 1, 2])
    for _ in range(100):
        assert whole(logits, [0, 1, 2])[2] == fewer(logits[:1], [2])[0]


def test_nan_in_one_row_is_reported():
    logits = torch.zeros(2, 5)
    logits[1, 3] = torch.nan
    for temperature, top_k, top_p in [(0, None, None), (1, None, None), (1, 3, None), (1, None, 0.5)]:
        with pytest.raises(UserError, match="NaN"):
            Sampler(2, temperature, top_k, top_p, 0)(logits, [0, 1])
