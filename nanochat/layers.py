"""Layers shared by blocks: a Linear with an explicit dtype, the norm, the MLP, rotary tables."""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from nanochat.kernels import FEW_ROWS, Multiply, Pack
from nanochat.ops import relu_squared, rms_norm


class Linear(nn.Linear):
    """y = x W^T without bias, multiplied in `compute_dtype`; the weight itself stays float32 (the master copy).

    Without autocast: whoever reads a model sees where precision changes. In eval mode and outside autograd the cast
    weight is kept, so decoding does not cast again at every token; train() drops it, because the weights will change.
    So it does with what `pack` asks for: products of up to FEW_ROWS rows outside autograd go through a copy of the
    weight that is laid out for them, and are given in float32.
    """

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__(d_in, d_out, bias=False)
        self.compute_dtype = torch.float32
        self._cast: Tensor | None = None
        self._together: Tensor | None = None  # with others, see linear_together
        self._pack: Pack | None = None
        self._packed: dict[int, Multiply] = {}  # by the number of Linears it is of, 1 or those of linear_together

    def reset_parameters(self) -> None:
        """Nothing: init_weights() of the owner sets every weight."""

    def master(self) -> Tensor:
        """What is multiplied, before it is cast: (d_out, d_in) float32."""
        return self.weight

    def cast_weight(self) -> Tensor:
        """The weight in compute_dtype, (d_out, d_in)."""
        weight = self.weight
        if self.training or torch.is_grad_enabled():
            return self.master().to(self.compute_dtype)
        if self._cast is None or self._cast.dtype != self.compute_dtype or self._cast.device != weight.device:
            master = self.master()
            if master is weight and weight.dtype == self.compute_dtype:
                return weight
            self._cast = master.detach().to(self.compute_dtype)
        return self._cast

    def train(self, mode: bool = True) -> "Linear":
        self._cast = self._together = None
        self.pack(None)
        return super().train(mode)

    def pack(self, pack: Pack | None) -> None:
        """From now on have `pack` lay the weight out, where few rows are multiplied; None drops what it has."""
        if pack is not self._pack:
            self._pack, self._packed = pack, {}

    @property
    def packs(self) -> bool:
        """Whether products of a few rows go through a copy laid out for them."""
        return self._pack is not None

    def packed(self, x: Tensor, *linears: "Linear") -> Multiply | None:
        """What multiplies x (..., d_in) by the weights of these Linears, this one first; None = F.linear is to."""
        if self._pack is None or torch.is_grad_enabled() or x.numel() > FEW_ROWS * self.in_features:
            return None
        multiply = self._packed.get(len(linears))
        if multiply is None:
            weight = torch.cat([m.master() for m in linears]) if len(linears) > 1 else self.master()
            multiply = self._packed[len(linears)] = self._pack(weight.to(self.compute_dtype))
        return multiply

    def __getstate__(self) -> dict[str, Any]:
        """Copies and files are without what is kept: it is made again where it is needed."""
        return {**self.__dict__, "_cast": None, "_together": None, "_pack": None, "_packed": {}}

    def forward(self, input: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out) in compute_dtype, or float32 of a few rows when packed."""
        multiply = self.packed(input, self)
        if multiply is not None:
            return multiply(input)
        return F.linear(input.to(self.compute_dtype), self.cast_weight())


def linear_together(x: Tensor, *linears: Linear) -> Tensor:
    """Several Linears of one input as one product: x (..., d_in) -> (..., sum of d_out), in their order."""
    first = linears[0]
    multiply = first.packed(x, *linears)
    if multiply is not None:
        return multiply(x)
    if first.training or torch.is_grad_enabled():
        weight = torch.cat([m.weight for m in linears]).to(first.compute_dtype)
    else:
        if first._together is None or first._together.dtype != first.compute_dtype:
            first._together = torch.cat([m.cast_weight() for m in linears])
        weight = first._together
    return F.linear(x.to(first.compute_dtype), weight)


class Head(Linear):
    """Linear to logits whose weight is the sum of its own and `tie` times the normed embedding of each token.

    An attention layer that copies then says the token it copied with one matrix for the whole vocabulary, also a token
    it has never been asked to say; with tie = 0 (nanochat's untied head) that is learnt token by token, and reading
    names from documents takes several times the training (LOG 2026-11-21). No gradient goes to the embedding this way:
    the head's own weight learns what differs.
    """

    def __init__(self, embed: "Embedding", tie: float) -> None:
        super().__init__(embed.embedding_dim, embed.num_embeddings)
        self.tie = tie
        self._embed = (embed,)  # in a tuple: not a module of this one, its owner has it

    def master(self) -> Tensor:
        if not self.tie:
            return self.weight
        return self.weight.add(norm(self._embed[0].weight.detach().float()), alpha=self.tie)


class Embedding(nn.Embedding):
    """A table of vectors, (n, d), float32; its owner's init_weights() fills it."""

    def reset_parameters(self) -> None:
        """Nothing, as in Linear."""


def set_compute_dtype(module: nn.Module, dtype: torch.dtype) -> None:
    """Every Linear below `module` multiplies in `dtype` from now on."""
    for m in module.modules():
        if isinstance(m, Linear):
            m.compute_dtype = dtype
            m.pack(None)


def norm(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Parameter-free RMSNorm over the last axis, given in dtype (default: x's own)."""
    return rms_norm(x, dtype or x.dtype)


class MLP(nn.Module):
    """x W_fc -> ReLU^2 -> W_proj. (B, T, D) -> (B, T, D)."""

    def __init__(self, d_model: int, d_hidden: int) -> None:
        super().__init__()
        self.c_fc = Linear(d_model, d_hidden)
        self.c_proj = Linear(d_hidden, d_model)

    def init_weights(self, generator: torch.Generator) -> None:
        """Uniform with variance 1 / d_model in, zero out: a fresh block adds nothing to the residual stream."""
        init_uniform(self.c_fc.weight, generator)
        nn.init.zeros_(self.c_proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(relu_squared(self.c_fc(x)))


@torch.no_grad()
def init_uniform(weight: Tensor, generator: torch.Generator, std: float | None = None) -> None:
    """Uniform with the given standard deviation, default d_in^-0.5 (no outliers, unlike a normal of that deviation)."""
    bound = 3**0.5 * (weight.size(-1) ** -0.5 if std is None else std)
    weight.copy_(torch.rand(weight.shape, generator=generator).mul_(2 * bound).sub_(bound))


@torch.no_grad()
def init_normal(weight: Tensor, generator: torch.Generator, std: float) -> None:
    """Normal(0, std), drawn on the CPU so that every device starts from the same weights."""
    weight.copy_(torch.randn(weight.shape, generator=generator).mul_(std))


class Rotary:
    """Tables of cos and sin by absolute position, grown on demand. Not a module: nothing here is learned or stored."""

    def __init__(self, head_dim: int, base: float) -> None:
        self.head_dim, self.base = head_dim, base
        self._tables: tuple[Tensor, Tensor] | None = None

    def tables(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin for positions 0..length-1: each (length, K/2) float32 on the device of `like`."""
        tables = self._tables
        if tables is None or tables[0].size(0) < length or tables[0].device != like.device:
            length = max(length, 256)
            length = 1 << (length - 1).bit_length()
            freq = self.base ** (-torch.arange(0, self.head_dim, 2, device=like.device) / self.head_dim)
            with torch.inference_mode(False):  # made while sampling, used again while training
                angle = torch.arange(length, device=like.device)[:, None] * freq  # (length, K/2)
                tables = self._tables = (angle.cos(), angle.sin())
        return tables
