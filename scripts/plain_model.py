"""The baseline of our benchmarks: a decoder-only Transformer as a competent user writes it in an afternoon.

Eager float32, torch's own layers, scaled_dot_product_attention, cross_entropy and a KV cache grown with torch.cat. The
architecture is that of our default (RoPE, pre-norm RMSNorm, ReLU^2 MLP of 4x, untied head), so that equal depth and
width mean equal work. Nothing here is tuned, and nothing is made slow on purpose.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

Cache = list[tuple[Tensor, Tensor]]  # per layer: keys and values (B, H, S, K)


def rotate(x: Tensor, start: int) -> Tensor:
    """RoPE (arXiv 2104.09864) on x (B, H, T, K) at positions start, start + 1, ..."""
    freq = 10000.0 ** (-torch.arange(0, x.size(-1), 2, device=x.device) / x.size(-1))
    angle = torch.arange(start, start + x.size(2), device=x.device)[:, None] * freq  # (T, K/2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1)


class PlainBlock(nn.Module):
    def __init__(self, d_model: int, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.norm_attn, self.norm_mlp = nn.RMSNorm(d_model), nn.RMSNorm(d_model)
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.proj = nn.Linear(d_model, d_model, bias=False)
        self.fc = nn.Linear(d_model, 4 * d_model, bias=False)
        self.fc_out = nn.Linear(4 * d_model, d_model, bias=False)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x: (B, T, D) continuing `past` -> (B, T, D), and keys and values up to here."""
        B, T, D = x.shape
        heads = self.qkv(self.norm_attn(x)).view(B, T, 3, self.n_head, D // self.n_head)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each (B, H, T, K)
        start = 0 if past is None else past[0].size(2)
        q, k = rotate(q, start), rotate(k, start)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)  # (B, H, S, K)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        x = x + self.proj(y.transpose(1, 2).reshape(B, T, D))
        return x + self.fc_out(F.relu(self.fc(self.norm_mlp(x))).square()), (k, v)


class PlainGPT(nn.Module):
    def __init__(self, vocab: int, n_layer: int, n_head: int, d_model: int, seq_len: int) -> None:
        super().__init__()
        self.seq_len = seq_len
        self.embed = nn.Embedding(vocab, d_model)
        self.blocks = nn.ModuleList(PlainBlock(d_model, n_head) for _ in range(n_layer))
        self.norm = nn.RMSNorm(d_model)
        self.head = nn.Linear(d_model, vocab, bias=False)

    def forward(self, ids: Tensor, targets: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """ids (B, T) -> logits (B, T, V), or the mean loss over targets (B, T) that are not -1.

        A cache (start with an empty list) is filled with the prompt, then takes one id a row at a time, T = 1.
        """
        assert not cache or ids.size(1) == 1, "a filled cache takes one id at a time"
        x = self.embed(ids)  # (B, T, D)
        present: Cache = []
        for i, block in enumerate(self.blocks):
            x, kv = block(x, cache[i] if cache else None)
            present.append(kv)
        if cache is not None:
            cache[:] = present
        logits = self.head(self.norm(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
