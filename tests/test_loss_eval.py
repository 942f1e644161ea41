"""Bits per byte against closed forms, and the same for every batch size and number of ranks."""

import math
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nanochat.config import UserError
from nanochat.loss_eval import evaluate_bpb, sum_nats_and_bytes

V = 40


class Uniform(torch.nn.Module):
    """Every id is equally likely: log(V) nats a token."""

    def forward(self, x, targets, loss_reduction, doc=None):
        assert loss_reduction == "none"
        return torch.where(targets >= 0, math.log(V), 0.0)


class Table(torch.nn.Module):
    """A bigram table: the loss of a token depends on the token before it."""

    def __init__(self):
        super().__init__()
        self.logits = torch.randn(V, V, generator=torch.Generator().manual_seed(0))
        self.shapes = []

    def forward(self, x, targets, loss_reduction, doc=None):
        self.shapes.append((tuple(x.shape), None if doc is None else tuple(doc.shape)))
        flat = F.cross_entropy(
            self.logits[x].flatten(0, 1), targets.flatten(), ignore_index=-1, reduction=loss_reduction
        )
        return flat.view_as(targets)


def windows(n=13, T=9):
    """x, y (n, T) with a few targets missing; the last ten ids are special and have no bytes."""
    ids = torch.randint(V, (n, T + 1), generator=torch.Generator().manual_seed(1))
    x, y = ids[:, :-1], ids[:, 1:].clone()
    y[::3, 4] = -1
    return x, y, np.array([1 + i % 4 for i in range(V - 10)] + [0] * 10, np.int32)


def test_a_uniform_model_costs_log2_of_the_vocabulary_per_target_with_bytes():
    x, y, token_bytes = windows()
    ids = y[y >= 0].numpy()
    counted = ids[token_bytes[ids] > 0]
    expected = len(counted) * math.log2(V) / token_bytes[counted].sum()
    assert evaluate_bpb(Uniform(), x, y, token_bytes, batch_size=4) == pytest.approx(expected, rel=1e-6)


def test_bpb_is_the_sum_over_targets_whatever_the_batch_size():
    x, y, token_bytes = windows()
    nats = F.cross_entropy(Table().logits[x].transpose(1, 2), y, ignore_index=-1, reduction="none")
    n_bytes = torch.from_numpy(token_bytes)[y.clamp(min=0)] * (y >= 0)
    expected = float(nats[n_bytes > 0].double().sum() / (math.log(2) * n_bytes.sum()))
    for batch_size in (1, 4, 13, 100):
        assert evaluate_bpb(Table(), x, y, token_bytes, batch_size) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("world_size", [2, 3, 5, 20])
def test_ranks_share_the_windows_and_their_sums_add_up(world_size):
    x, y, token_bytes = windows()
    whole = sum_nats_and_bytes(Table(), x, y, token_bytes, 4)
    models = [Table() for _ in range(world_size)]
    parts = [sum_nats_and_bytes(m, x, y, token_bytes, 4, None, r, world_size) for r, m in enumerate(models)]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-7, atol=0)
    assert len({str(m.shapes) for m in models}) == 1, "sharded models must run the same batches on every rank"
    assert len(set(models[0].shapes)) == 1


def test_the_document_index_reaches_the_model():
    x, y, token_bytes = windows()
    model = Table()
    evaluate_bpb(model, x, y, token_bytes, 5, doc=torch.zeros_like(x))
    assert set(model.shapes) == {((5, 9), (5, 9))}


def test_targets_without_bytes_do_not_count_even_where_their_loss_is_infinite():
    x, y, token_bytes = windows()
    model = Table()
    model.logits[:, V - 10 :] = -math.inf  # special tokens
    assert math.isfinite(evaluate_bpb(model, x, y, token_bytes, 4))


def test_a_nan_of_the_model_is_not_hidden():
    x, y, token_bytes = windows()
    model = Table()
    model.logits[x[1, 1]] = math.nan
    assert math.isnan(evaluate_bpb(model, x, y, token_bytes, 4))


def test_text_without_bytes_is_an_error_not_a_nan():
    x, y, token_bytes = windows()
    for targets in (torch.full_like(y, -1), torch.full_like(y, V - 3)):
        with pytest.raises(UserError, match="no target among 117 tokens of validation has bytes"):
            evaluate_bpb(Uniform(), x, targets, token_bytes, 4)
    with pytest.raises(UserError, match="no target among 0 tokens"):
        evaluate_bpb(Uniform(), x[:0], y[:0], token_bytes, 4)


def test_no_gradients_are_kept():
    x, y, token_bytes = windows()
    model = Table()
    model.logits.requires_grad_()
    assert not sum_nats_and_bytes(model, x, y, token_bytes, 4).requires_grad


@pytest.mark.slow
def test_two_processes_get_the_number_of_one(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys
        sys.path[:0] = {sys.path!r}
        import torch.distributed as dist
        from test_loss_eval import Table, windows
        from nanochat.loss_eval import evaluate_bpb
        rank = int(sys.argv[1])
        dist.init_process_group("gloo", init_method="file://{tmp_path}/meet", rank=rank, world_size=2)
        print(repr(evaluate_bpb(Table(), *windows(), 4)))
        dist.destroy_process_group()
        """)
    )
    ranks = [
        subprocess.Popen([sys.executable, script, str(r)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for r in (0, 1)
    ]
    done = [p.communicate(timeout=120) for p in ranks]
    assert all(p.returncode == 0 for p in ranks), done
    found = [float(out.split()[-1]) for out, _ in done]
    assert found[0] == found[1] == pytest.approx(evaluate_bpb(Table(), *windows(), 4), rel=1e-12)
