"""What each layer asks of the host: on a GPU a copy from it, or to it, makes both wait. Shown without one, on torch's
meta device, whose tensors hold nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanochat.blocks import GPTConfig
from nanochat.gpt import GPT


class Copies(TorchDispatchMode):
    """Counts tensors that go from the CPU to the device, asked for or by an operation that is given both."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        devices = [t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.ndim]
        if isinstance(out, Tensor) and out.device.type == "meta":
            self.n += devices.count("cpu")
        return out


def on_meta(name: str, n_layer: int) -> GPT:
    sizes = {"gdn_head_dim": 16, "mamba2_d_state": 16, "mamba2_head_dim": 16, "attn_conv": 4}
    with torch.device("meta"):
        model = GPT(GPTConfig(n_layer, name, 64, 2, vocab_size=50, seq_len=64, **sizes))
    model.set_compute(torch.float32, "reference")
    return model


def copies(name: str, n_layer: int) -> list[int]:
    """Of a prompt of ragged rows, a token of each, three of each, and ragged rows behind them."""
    model, counted = on_meta(name, n_layer).eval(), []
    with torch.no_grad():
        state = model.init_state(2, 64)
        for T, lengths in ((9, torch.tensor([9, 5])), (1, None), (3, None), (4, torch.tensor([4, 2]))):
            with Copies() as seen:
                model(torch.ones(2, T, dtype=torch.long, device="meta"), state=state, lengths=lengths)
            counted.append(seen.n)
    return counted


@pytest.mark.parametrize("name", ["attn", "mamba", "mamba2", "gdn"])
def test_rows_of_different_lengths_cost_one_copy_from_the_host_however_many_layers(name: str) -> None:
    assert copies(name, 4) == copies(name, 2)
    assert name != "attn" or max(copies(name, 2)) > 0


@pytest.mark.parametrize("name", ["attn", "mamba", "mamba2", "gdn"])
def test_blocks_that_train_on_packed_rows_read_nothing_from_the_device(name: str) -> None:
    """On the meta device a read is an error."""
    model = on_meta(name, 2)
    ids, doc = (torch.zeros(2, 32, dtype=dtype, device="meta") for dtype in (torch.long, torch.int32))
    with Copies() as seen:
        model.hidden(ids, doc=doc).sum().backward()
    assert seen.n == 0
