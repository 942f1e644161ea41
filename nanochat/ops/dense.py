"""What every position does by itself: cross-entropy over the vocabulary, norm, rotation, ReLU^2.

`linear_cross_entropy` carries a hand-written gradient because eager autograd would keep every intermediate: the logits
of one step (B*T, V) are 67 MB in bfloat16 at 4,096 tokens and 8,192 words, and reading them from memory costs more than
multiplying them. It works in pieces that stay in cache.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CE_ROWS = 512  # rows of logits alive at once: 8 MB at V = 8,192 in bfloat16 (LOG 2026-11-21: the best of five)
CE_ROWS_GPU = 4096  # not tried on one: each chunk reads and writes float32 gradients of the head, 335 MB at d20


def _loss_and_gradients(x: Tensor, master: Tensor, targets: Tensor, softcap: float) -> tuple[Tensor, Tensor, Tensor]:
    """x: (N, D), master: (V, D) multiplied in x's dtype, targets: (N,), -1 = none -> () float32, (N, D), (V, D)."""
    weight = master.to(x.dtype)
    grad_x, grad_w = torch.empty_like(x), torch.zeros_like(master)
    total = torch.zeros((), dtype=torch.float32, device=x.device)
    rows = CE_ROWS if x.device.type == "cpu" else CE_ROWS_GPU
    for i in range(0, x.size(0), rows):
        xc, yc = x[i : i + rows], targets[i : i + rows, None]
        logits = xc @ weight.t()  # (n, V)
        capped = logits.div_(softcap).tanh_() if softcap else None
        if capped is not None:
            logits = capped * softcap
        p = torch.softmax(logits, -1)
        index, none = yc.clamp_min(0), yc < 0
        chosen = p.gather(1, index)  # (n, 1)
        total -= chosen.float().clamp_min(1e-38).log().masked_fill(none, 0).sum()
        p.scatter_(1, index, chosen - 1)  # not scatter_add_, which copies all of a bfloat16 p to float32 and back
        if capped is not None:
            p.mul_(capped.square_().neg_().add_(1))  # d tanh
        torch.mm(p, weight, out=grad_x[i : i + rows]).masked_fill_(none, 0)  # D wide, where p is V wide
        grad_w += p.t() @ xc.masked_fill(none, 0)
    return total, grad_x, grad_w


# To torch.compile it is one node: traced, every chunk of the loop would be compiled by itself, for minutes.
_node = torch.library.custom_op("nanochat::loss_and_gradients", _loss_and_gradients, mutates_args=())


@_node.register_fake
def _(x: Tensor, master: Tensor, targets: Tensor, softcap: float) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty((), dtype=torch.float32), torch.empty_like(x), torch.empty_like(master)


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of -log softmax(softcap * tanh(x W^T / softcap))[target]; the forward makes the gradients, chunk by chunk."""

    @staticmethod
    def forward(ctx, x: Tensor, master: Tensor, targets: Tensor, softcap: float) -> Tensor:
        """-> () float32, arguments as of _loss_and_gradients."""
        compute = _node if torch.compiler.is_compiling() else _loss_and_gradients  # called, a node imports the compiler
        total, grad_x, grad_w = compute(x, master, targets, softcap)
        ctx.save_for_backward(grad_x, grad_w)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyrefly: ignore[bad-override]
        grad_x, grad_w = ctx.saved_tensors
        return grad_x * grad.to(grad_x.dtype), grad_w * grad, None, None


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, softcap: float = 0.0) -> Tensor:
    """Summed cross-entropy of the logits x W^T, in nats, without ever holding all logits.

    x: (N, D), weight: (V, D), the float32 master, which is multiplied in x's dtype and gets a float32 gradient;
    targets: (N,), -1 = no target -> () float32. softcap as in Gemma 2 (arXiv 2408.00118):
    c * tanh(logits / c); 0 = none.
    """
    return _LinearCrossEntropy.apply(x, weight, targets, softcap)


def linear_cross_entropy_rows(x: Tensor, weight: Tensor, targets: Tensor, softcap: float = 0.0) -> Tensor:
    """The same per row and in float32, for evaluation and for RL, which weighs every token by itself.

    x: (N, D), weight: (V, D), targets: (N,) -> (N,) nats, 0 where the target is -1.
    """
    out = torch.empty(x.size(0), dtype=torch.float32, device=x.device)
    for i in range(0, x.size(0), CE_ROWS):
        logits = cap_logits((x[i : i + CE_ROWS] @ weight.t()).float(), softcap)  # (n, V)
        out[i : i + CE_ROWS] = F.cross_entropy(logits, targets[i : i + CE_ROWS], ignore_index=-1, reduction="none")
    return out


def cap_logits(logits: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864), halves layout. x: (B, T, H, K), cos, sin: (1 or B, T, 1, K/2)."""
    x1, x2 = x.chunk(2, -1)
    return torch.cat((torch.addcmul(x1 * cos, x2, sin), torch.addcmul(x2 * cos, x1, sin, value=-1)), -1)


NORM_EPS = 1e-6


class _ReLUSquared(torch.autograd.Function):
    """relu(x)^2 in two passes forward and three backward; autograd's own takes twice that."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        r = torch.relu(x)
        ctx.save_for_backward(r)
        return r * r

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyrefly: ignore[bad-override]
        (r,) = ctx.saved_tensors
        return (grad * r).mul_(2)


def relu_squared(x: Tensor) -> Tensor:
    """relu(x)^2 (Primer, arXiv 2109.08668), any shape."""
    if torch.is_grad_enabled():
        return _ReLUSquared.apply(x)
    x = torch.relu(x)
    return x * x


def _inverse_rms(x: Tensor) -> Tensor:
    """(..., D) -> (..., 1) float32, in one pass over x."""
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return torch.rsqrt(size.square_().div_(x.size(-1)).add_(NORM_EPS))


def _scale_and_rotate(x: Tensor, r: Tensor, dtype: torch.dtype, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    n = x * r
    return (n if cos is None or sin is None else rotate(n, cos, sin)).to(dtype)


class _RMSNorm(torch.autograd.Function):
    """scale * x / rms(x) over the last axis, then a rotation if there are tables; in float32, given in `dtype`."""

    @staticmethod
    def forward(ctx, x: Tensor, dtype: torch.dtype, cos: Tensor | None, sin: Tensor | None, scale: float) -> Tensor:
        r = _inverse_rms(x)
        ctx.save_for_backward(x, r, cos, sin)
        ctx.scale = scale
        return _scale_and_rotate(x, r * scale if scale != 1 else r, dtype, cos, sin)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyrefly: ignore[bad-override]
        x, r, cos, sin = ctx.saved_tensors
        grad = grad.float()
        if cos is not None:
            grad = rotate(grad, cos, -sin)  # the inverse rotation
        n = x * r
        dot = (grad * n).mean(-1, keepdim=True)
        return torch.addcmul(grad, n, dot, value=-1).mul_(r * ctx.scale).to(x.dtype), None, None, None, None


def rms_norm(
    x: Tensor, dtype: torch.dtype, cos: Tensor | None = None, sin: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """Parameter-free RMSNorm (arXiv 1910.07467) of (..., D) in float32, rotated by cos, sin if given, cast to dtype.

    A rotation keeps the norm, so this is QK norm and rotary embedding in either order. With scale = D^-0.5 the result
    has length 1.
    """
    if torch.is_grad_enabled():
        return _RMSNorm.apply(x, dtype, cos, sin, scale)
    return _scale_and_rotate(x, _inverse_rms(x) * scale, dtype, cos, sin)
