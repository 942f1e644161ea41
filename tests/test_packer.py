"""The packer: nothing lost, nothing twice, no row without a target, no piece that waits for ever."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.config import UserError
from nanochat.packer import Packer, Piece, assemble, flatten, unflatten

BOS = 10**6


def documents(lengths):
    """Documents of the given lengths whose tokens are 0, 1, 2 ... through all of them: every token is its own name."""
    ends = np.cumsum(lengths)
    return np.split(np.arange(ends[-1], dtype=np.uint32), ends[:-1])


def drain(packer):
    rows = []
    while (row := packer.row()) is not None:
        rows.append(row)
    return rows


def lengths_of(seed, n=400, longest=3000):
    """A mixture of short and long documents, like web text."""
    rng = np.random.default_rng(seed)
    return np.clip(rng.lognormal(5.5, 1.3, n).astype(int), 0, longest)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 90), min_size=1, max_size=40), st.integers(1, 40), st.sampled_from([None, (0, 7)]))
def test_every_token_is_a_target_exactly_once_and_follows_its_own_predecessor(lengths, T, seed):
    packer = Packer(T)
    packer.extend(documents(lengths), seed)
    rows = drain(packer)
    assert packer.tokens == 0 and len(packer) == 0
    if not rows:
        assert sum(lengths) == 0
        return
    x, y, _ = assemble(rows, T, BOS)
    targets = y[y >= 0]
    np.testing.assert_array_equal(np.sort(targets), np.arange(sum(lengths)))
    before = x[y >= 0]
    assert ((before == BOS) | (before == targets - 1)).all()
    starts = (np.cumsum(lengths) - lengths)[np.array(lengths) > 0]
    assert set(starts) <= set(targets[before == BOS]), "a document begins after <|bos|>, never after another's end"
    assert (x[:, 0] == BOS).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=40), st.integers(1, 40))
def test_doc_rises_by_one_at_each_bos_and_rows_are_never_without_a_target(lengths, T):
    packer = Packer(T)
    packer.extend(documents(lengths))
    x, y, doc = assemble(drain(packer), T, BOS)
    assert (doc[:, 0] == 0).all()
    step = np.diff(doc, axis=1)
    assert ((step == 0) | (step == 1)).all()
    assert (x[:, 1:][step == 1] == BOS).all()
    assert ((y >= 0).sum(1) > 0).all()


@pytest.mark.parametrize("T", [64, 512, 2048])
@pytest.mark.parametrize("seed", [0, 1])
def test_padding_is_under_two_parts_in_a_thousand_while_the_queue_is_full(T, seed):
    packer = Packer(T)
    packer.extend(documents(lengths_of(seed)))
    rows = [packer.row() for _ in range(sum(lengths_of(seed)) // (2 * T))]
    filled = sum(len(p.ids) + 1 for row in rows for p in row)
    assert filled / (len(rows) * (T + 1)) > 0.998


def test_a_cut_leaves_no_crumbs_where_rows_are_long_enough():
    packer = Packer(512)
    packer.extend(documents([n for n in lengths_of(3) if n >= 15]))
    assert min(len(p.ids) + 1 for row in drain(packer) for p in row) >= 16


def test_a_cut_that_would_leave_a_crumb_is_made_earlier_and_the_gap_filled_from_another():
    packer = Packer(99)  # rows of 100, no part under 12
    packer.extend(documents([59, 44, 44]))
    assert [len(p.ids) + 1 for p in packer.row()] == [60, 28, 12]
    assert sorted(len(p.ids) + 1 for p in packer.pieces()) == [45 - 28 + 1, 45 - 12 + 1]


def test_the_oldest_piece_starts_the_row_so_none_waits_for_ever():
    packer = Packer(100)
    packer.extend(documents([50, 49] * 50))
    packer.extend([np.arange(10_000, 10_039)])  # best fit alone would put 51 + 50 tokens into every row of 101
    for _ in range(60):
        if any(p.ids[0] == 10_000 for p in packer.row()):
            return
        packer.extend(documents([50, 49]))
    raise AssertionError("a piece has waited longer than all that came before it")


def test_with_a_seed_the_parts_of_a_long_document_are_spread_over_what_was_queued_with_it():
    packer = Packer(100)
    packer.extend(documents([2000] + [100] * 180), seed=(1, 2))
    rows = [(r, p.ids[0]) for r, row in enumerate(drain(packer)) for p in row if p.ids[0] < 2000]
    assert len(rows) == 20
    assert np.diff([r for r, _ in rows]).mean() > 5
    assert np.corrcoef(rows, rowvar=False)[0, 1] < 0.5, "training must not begin with the beginnings"


def test_best_fit_takes_the_largest_piece_that_fits():
    packer = Packer(99)
    packer.extend(documents([49, 20, 29, 49, 30]))  # 50 + 50 tokens fill a row of 100
    assert [len(p.ids) for p in packer.row()] == [49, 49]


def test_a_packer_restored_from_its_flat_pieces_goes_on_with_the_same_rows():
    packer = Packer(128)
    packer.extend(documents(lengths_of(5)))
    for _ in range(100):
        packer.row()
    twin = Packer(128)
    twin.restore(unflatten({k: v.tolist() for k, v in flatten(packer.pieces()).items()}))
    assert twin.tokens == packer.tokens
    for _ in range(200):
        for a, b in zip(packer.row() or [], twin.row() or [], strict=True):
            np.testing.assert_array_equal(a.ids, b.ids)


def test_flatten_keeps_masks_and_the_empty_queue():
    pieces = [Piece(np.array([1, 2]), np.array([0, 1])), Piece(np.array([3]))]
    again = unflatten(flatten(pieces))
    assert [p.ids.tolist() for p in again] == [[1, 2], [3]]
    assert [p.mask.tolist() for p in again] == [[0, 1], [1]]
    assert unflatten(flatten([])) == []


def conversations(seed, n=300, T=64):
    """Conversations of 2 to 4 rows' length, half of whose tokens are targets."""
    rng = np.random.default_rng(seed)
    for i in range(n):
        size = int(rng.integers(2, 4 * T))
        mask = (rng.random(size) < 0.5).astype(int)
        mask[0] = 0
        yield [BOS, *range(1000 * i, 1000 * i + size - 1)], mask.tolist()


def test_overlong_conversations_neither_stall_the_queue_nor_empty_a_row():
    T, packer, refused, kept, rows = 64, Packer(64, cut=False), 0, [], []
    for ids, mask in conversations(0):
        try:
            packer.add(ids, mask)
            kept.append((ids, mask))
        except UserError:
            refused += 1
            assert len(ids) > T + 1 or not any(mask)
        if packer.tokens > 8 * T:
            rows.append(packer.row())
    rows += drain(packer)
    assert refused > 100 and len(kept) > 50
    x, y, doc = assemble(rows, T, BOS)
    assert ((y >= 0).sum(1) > 0).all(), "a row without a target gives a mean loss of 0 / 0"
    expected = sorted(t for ids, mask in kept for t, m in zip(ids, mask, strict=True) if m)
    assert sorted(y[y >= 0].tolist()) == expected
    contents = {tuple(ids[1:]) for ids, _ in kept}
    placed = [tuple(r[d == k].tolist()) for r, d in zip(x, doc, strict=True) for k in range(d.max() + 1)]
    whole = [p for p in placed if p[1:] in contents]
    cut_by_x = [p for p in placed if p[1:] not in contents and set(p) != {BOS}]  # x has no last token of a full row
    assert len(whole) + len(cut_by_x) == len(kept)
    assert all(len(r) for r in cut_by_x) and all(any(c[: len(p) - 1] == p[1:] for c in contents) for p in cut_by_x)


def test_a_conversation_that_fits_exactly_is_taken_and_one_token_more_is_refused():
    packer = Packer(8, cut=False)
    packer.add([BOS, *range(8)], [0] * 8 + [1])
    with pytest.raises(UserError, match=r"10 tokens does not fit a row of 9.*max_tokens=9"):
        packer.add([BOS, *range(9)], [0] * 9 + [1])
    assert [len(p.ids) for p in packer.row()] == [8]
    assert packer.row() is None


@pytest.mark.parametrize(("ids", "mask"), [([BOS], [0]), ([BOS, 1, 2], [0, 0, 0]), ([BOS, 1], [1, 0])])
def test_a_conversation_without_a_target_is_refused(ids, mask):
    packer = Packer(8, cut=False)
    with pytest.raises(UserError, match="without a token to train on"):
        packer.add(ids, mask)
    assert packer.row() is None


def test_masked_tokens_and_padding_are_no_targets():
    packer = Packer(6, cut=False)
    packer.add([BOS, 1, 2, 3], [0, 0, 1, 1])
    x, y, doc = assemble([packer.row()], 6, BOS)
    assert x.tolist() == [[BOS, 1, 2, 3, BOS, BOS]]
    assert y.tolist() == [[-1, 2, 3, -1, -1, -1]]
    assert doc.tolist() == [[0, 0, 0, 0, 1, 1]]
