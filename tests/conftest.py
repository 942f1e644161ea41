"""Fixtures every test may ask for: `base` (an empty NANOCHAT_BASE_DIR), `data` (the folder of real data, or a skip)."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from nanochat.common import data_dir


def pytest_configure(config: pytest.Config) -> None:
    """No test reads or writes the user's own ~/.cache/nanochat: what asks for no `base` shares one temporary folder."""
    folder = tempfile.mkdtemp(prefix="nanochat-tests-")
    os.environ["NANOCHAT_BASE_DIR"] = folder
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
    if item.get_closest_marker("data") and data_dir() is None:
        pytest.skip("needs real data: point NANOCHAT_DATA at it")


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty NANOCHAT_BASE_DIR of this test's own."""
    folder = tmp_path / "base"
    folder.mkdir()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder))
    return folder


@pytest.fixture
def data() -> Path:
    """The folder of real data ($NANOCHAT_DATA, or ../shared/data); the test is skipped where there is none."""
    folder = data_dir()
    if folder is None:
        pytest.skip("needs real data: point NANOCHAT_DATA at it")
    return folder
