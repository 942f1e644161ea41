"""What a run asks of its device, on stand-ins for GPUs."""

from types import SimpleNamespace

import pytest
import torch

from nanochat import device


@pytest.mark.parametrize(("major", "dtype"), [(7, torch.float32), (8, torch.bfloat16), (9, torch.bfloat16)])
def test_auto_takes_bfloat16_of_gpus_that_multiply_it_themselves(
    monkeypatch: pytest.MonkeyPatch, major: int, dtype: torch.dtype
) -> None:
    """A card before Ampere holds bfloat16 tensors, too, but computes in float32 and rounds."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=major))
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda _: True)
    assert device.pick_dtype("auto", torch.device("cuda")) == dtype
