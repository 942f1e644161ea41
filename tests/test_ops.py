"""ops against torch's own operations."""

import pytest
import torch
import torch.nn.functional as F

from nanochat import ops
from nanochat.ops import attention_blocks, attention_mask, block_attention, linear_cross_entropy


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("n", [1, 511, 1030])
def test_linear_cross_entropy_equals_torch(n: int, softcap: float) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(n, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    y = torch.randint(-1, 50, (n,))
    loss = linear_cross_entropy(x, w, y, softcap)
    got = torch.autograd.grad(3 * loss, (x, w))
    ref = F.cross_entropy(ops.cap_logits(x @ w.t(), softcap), y, ignore_index=-1, reduction="sum")
    want = torch.autograd.grad(3 * ref, (x, w))
    torch.testing.assert_close(loss, ref, rtol=1e-5, atol=1e-4)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_cross_entropy_without_any_target_is_zero_with_zero_gradient() -> None:
    x, w = torch.randn(8, 4, requires_grad=True), torch.randn(10, 4, requires_grad=True)
    loss = linear_cross_entropy(x, w, torch.full((8,), -1))
    gx, gw = torch.autograd.grad(loss, (x, w))
    assert loss == 0 and not gx.any() and not gw.any()


def test_a_compiled_cross_entropy_is_one_node_however_many_its_chunks() -> None:
    from torch._dynamo.testing import CompileCounter  # the compiler, which takes seconds to import

    torch.manual_seed(0)
    x, w = torch.randn(1300, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    y, counter = torch.randint(-1, 50, (1300,)), CompileCounter()
    compiled = torch.compile(linear_cross_entropy, backend=counter, fullgraph=True, dynamic=False)
    losses = compiled(x, w, y, 5.0), linear_cross_entropy(x, w, y, 5.0)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, (x, w)) for loss in losses))
    assert (counter.frame_count, counter.op_count) == (1, 2)  # the autograd function, and what unpacks its output


def test_cross_entropy_does_not_wait_for_the_device() -> None:
    x, w = (torch.randn(*shape, device="meta", requires_grad=True) for shape in ((8, 4), (10, 4)))
    linear_cross_entropy(x, w, torch.zeros(8, dtype=torch.long, device="meta"), 5.0).backward()  # no value can be asked
    assert w.grad is not None and w.grad.shape == w.shape


def test_cross_entropy_rows_equal_torch() -> None:
    torch.manual_seed(0)
    x, w, y = torch.randn(700, 16), torch.randn(50, 16), torch.randint(-1, 50, (700,))
    want = F.cross_entropy(x @ w.t(), y, ignore_index=-1, reduction="none")
    torch.testing.assert_close(ops.linear_cross_entropy_rows(x, w, y), want)


@pytest.mark.parametrize("window", [0, 5, 300])
@pytest.mark.parametrize("packed", [False, True])
def test_block_attention_equals_masked_sdpa(window: int, packed: bool) -> None:
    torch.manual_seed(0)
    B, H, T, K = 2, 3, 600, 8
    q, k, v = (torch.randn(B, H, T, K, requires_grad=True) for _ in range(3))
    doc = torch.randint(0, 5, (B, T)).sort(1).values if packed else None
    out = block_attention(q, k, v, attention_blocks(T, window, doc, q))
    pos = torch.arange(T)[None]
    mask = attention_mask(pos, pos, window, doc, doc)
    ref = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(out, ref, rtol=1e-5, atol=1e-5)
    g = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, (q, k, v), g), torch.autograd.grad(ref, (q, k, v), g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_attention_mask_shows_what_the_definition_says() -> None:
    doc = torch.tensor([[0, 0, 1, 1, 1]])
    mask = attention_mask(torch.arange(5)[None], torch.tensor([[0, 1, 2, 3, -1]]), 2, doc, doc)[0, 0]
    want = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 0]]
    assert mask.int().tolist() == want


def test_relu_squared_equals_torch_and_its_gradient() -> None:
    torch.manual_seed(0)
    x, g = torch.randn(3, 7, requires_grad=True), torch.randn(3, 7)
    got, want = ops.relu_squared(x), F.relu(x).square()
    assert torch.equal(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, x, g), torch.autograd.grad(want, x, g))


@pytest.mark.parametrize("rotated", [False, True])
def test_rms_norm_equals_torch_and_its_gradient(rotated: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 8, dtype=torch.float32, requires_grad=True)
    angle = torch.randn(1, 5, 1, 4)
    tables = (angle.cos(), angle.sin()) if rotated else ()
    got = ops.rms_norm(x, torch.float32, *tables)
    want = F.rms_norm(ops.rotate(x, *tables) if rotated else x, (8,), eps=ops.dense.NORM_EPS)
    torch.testing.assert_close(got, want)
    g = torch.randn_like(got)
    torch.testing.assert_close(torch.autograd.grad(got, x, g), torch.autograd.grad(want, x, g))


def test_rotate_depends_on_relative_position_only() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8).unbind(0)
    freq = 10000.0 ** (-torch.arange(0, 8, 2) / 8)

    def at(x: torch.Tensor, pos: int) -> torch.Tensor:
        return ops.rotate(x, (pos * freq).cos(), (pos * freq).sin())

    near, far = (at(q, 3) * at(k, 1)).sum(), (at(q, 103) * at(k, 101)).sum()
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-4)
