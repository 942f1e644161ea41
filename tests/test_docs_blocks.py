"""The block that docs/blocks.md shows is run as it stands there."""

import re
import sys
from pathlib import Path

import pytest
import torch

from nanochat.blocks import resolve_pattern
from nanochat.gpt import GPT, GPTConfig

PAGE = Path(__file__).parent.parent / "docs" / "blocks.md"
IDS = torch.randint(0, 50, (3, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GPT:
    code = re.search(r"```python\n(# my_blocks.py\n.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None and code[1].count("\n") <= 60
    (tmp_path / "my_blocks.py").write_text(code[1])
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("my_blocks", None)
    config = GPTConfig(
        n_layer=4, d_model=32, n_head=2, vocab_size=50, seq_len=32, block_pattern=["my_blocks:TokenShift", "attn"]
    )
    model = GPT(config)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def test_its_state_is_exact_in_chunks_and_with_pads(model: GPT) -> None:
    full, state, lengths = model(IDS), model.init_state(3, 20), torch.tensor([4, 9, 1])
    got = model(IDS[:, :9], state=state, lengths=lengths, last_only=True)[:, 0]
    torch.testing.assert_close(got, full[torch.arange(3), lengths - 1], rtol=1e-4, atol=1e-5)
    for _ in range(3):
        at = state.pos
        got = model(IDS[torch.arange(3), at][:, None], state=state)[:, 0]
        torch.testing.assert_close(got, full[torch.arange(3), at], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_its_documents_do_not_see_each_other(model: GPT) -> None:
    doc = torch.tensor([[0] * 7 + [1] * 13]).expand(3, -1)
    packed = model(IDS, doc=doc)
    torch.testing.assert_close(packed[:, 7:], model(IDS[:, 7:]), rtol=1e-4, atol=1e-5)


def test_it_trains(model: GPT) -> None:
    model.train()(IDS[:, :-1], IDS[:, 1:]).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.layers[0].parameters())


def test_the_notations_of_the_page_are_read() -> None:
    table = PAGE.read_text(encoding="utf-8").split("| notation |")[1].split("\n\n")[0]
    for row in table.splitlines()[2:]:
        for text in re.findall(r"`([^`]+)`", row.split(" | ")[0]):
            assert len(resolve_pattern(eval(text, {}), 60)) == 60
