"""The GPT core: embedding -> blocks by pattern -> head. It assembles, carries the position, and knows no block by name.

After nanochat (Karpathy, 2025): parameter-free RMSNorm, untied embeddings, no biases. Weights are float32 masters;
matrices multiply in `compute_dtype`, the residual stream is float32 on a CPU and compute_dtype elsewhere.
"""

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

from nanochat.blocks import Block, BlockState, Context, GPTConfig, build, resolve_pattern
from nanochat.config import UserError
from nanochat.kernels import FEW_ROWS, Kernels, choose
from nanochat.layers import Embedding, Head, Linear, Rotary, init_normal, set_compute_dtype
from nanochat.ops import cap_logits, linear_cross_entropy, linear_cross_entropy_rows

ROLES = ("matrix", "embedding", "unembedding", "scalar", "ssm")  # matrix goes to Muon, the others to AdamW

__all__ = ["GPT", "GPTConfig", "ModelState"]


@dataclass
class ModelState:
    """What decoding remembers: one state per block and the position of each row, advanced once per forward."""

    layers: list[BlockState]
    pos: Tensor  # (B,) long, on the CPU: tokens seen by each row
    max_len: int

    def select(self, rows: Tensor) -> "ModelState":
        """The given rows, in that order; rows may repeat. (n,) long -> state of n rows."""
        rows = rows.cpu()
        return ModelState([s.select(rows) for s in self.layers], self.pos[rows], self.max_len)

    def repeat(self, n: int) -> "ModelState":
        """Row i becomes rows i*n .. i*n + n-1: many samples from one prefill."""
        layers = [s.repeat(n, self.pos) for s in self.layers]
        return ModelState(layers, self.pos.repeat_interleave(n), self.max_len)

    def join(self, other: "ModelState") -> "ModelState":
        """The rows of this state, then those of `other`; both were selected from one."""
        layers = [a.join(b) for a, b in zip(self.layers, other.layers, strict=True)]
        return ModelState(layers, torch.cat((self.pos, other.pos)), self.max_len)

    def bytes(self) -> int:
        """Memory of all rows together."""
        return sum(s.bytes() for s in self.layers)


class GPT(nn.Module):
    """A language model over any stack of registered blocks.

    May be built under torch.device("meta"), moved with to_empty(), then initialised with init_weights().
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        pattern = resolve_pattern(config.block_pattern, config.n_layer)
        self.config = config = dataclasses.replace(config, block_pattern=pattern)
        self.embed = Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(build(entry, config, i) for i, entry in enumerate(pattern))
        self.head: Linear = Head(self.embed, config.head_tie)
        if config.residual_scalars:
            self.x_scale = nn.Parameter(torch.empty(config.n_layer))
            self.x0_scale = nn.Parameter(torch.empty(config.n_layer))
        self.rotary = Rotary(config.head_dim, config.rope_base)
        self.kernels = Kernels()

    def init_weights(self, seed: int = 0) -> None:
        """Set every parameter; the same seed gives the same weights on every device.

        Embedding N(0, 1), head N(0, 0.001): logits start near zero and the loss near log(vocab_size).
        """
        generator = torch.Generator().manual_seed(seed)
        init_normal(self.embed.weight, generator, std=1.0)
        init_normal(self.head.weight, generator, std=0.001)
        if self.config.residual_scalars:
            nn.init.ones_(self.x_scale)
            nn.init.zeros_(self.x0_scale)
        for block in self.layers:
            block.init_weights(generator)

    def set_compute(self, dtype: torch.dtype, kernels: str = "auto") -> str:
        """Choose the multiplication dtype and the kernels for the device the weights are on. Returns the reason."""
        set_compute_dtype(self, dtype)
        self.kernels = choose(kernels, self.device, [*(op for b in self.layers for op in b.KERNELS), "decode"], dtype)
        return self.kernels.reason

    def pack(self) -> None:
        """In eval mode, have weights laid out for decoding where the kernels chosen can: each a copy, made at the first
        product of a few rows outside autograd, and kept until train(). Weights changed by other means are not seen."""
        pack = None if self.training else self.kernels.pack
        if self.head._pack is not pack:
            for m in self.modules():
                if isinstance(m, Linear):
                    m.pack(pack)

    def extend(self, seq_len: int) -> None:
        """Take rows longer than the model was trained on, positions counted as before. Windows stay what they are."""
        config = self.config
        window = config.short_window if "S" in config.window_pattern else config.window
        self.config = dataclasses.replace(config, seq_len=seq_len, window=window)

    @property
    def layers(self) -> list[Block]:
        return list(self.blocks)  # pyrefly: ignore

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.head.compute_dtype

    def init_state(self, batch: int, max_len: int) -> ModelState:
        """An empty state for `batch` sequences of up to max_len tokens: to decode, for which the model is packed."""
        self.pack()
        layers = [b.init_state(batch, max_len, self.device, self.residual_dtype) for b in self.layers]
        return ModelState(layers, torch.zeros(batch, dtype=torch.long), max_len)

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        *,
        loss_reduction: str = "mean",
        doc: Tensor | None = None,
        state: ModelState | None = None,
        lengths: Tensor | None = None,
        last_only: bool = False,
        inject: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """ids (B, T) -> logits (B, T, V) float32; with targets (B, T), -1 = none, the cross-entropy in nats.

        loss_reduction: "mean" over targets (0 when there is none), "sum", or "none" for (B, T).
        doc: (B, T) document index of packed rows; no block lets documents see each other.
        state: continue its sequences and advance it by T, or by lengths (B,) when rows are right-padded.
        last_only: logits of the last (valid) token of each row only, (B, 1, V).
        inject: (places (B, T) bool, vectors (n, D)): these take the places of embedded and normed tokens, row by row.
        """
        x = self.hidden(ids, doc=doc, state=state, lengths=lengths, inject=inject)  # (B, T, D)
        if targets is not None:
            return self.loss(x, targets, loss_reduction)
        if last_only:
            x = x[:, -1:] if lengths is None else x[torch.arange(len(lengths)), lengths.to(x.device) - 1][:, None]
        return cap_logits(self.head(x).float(), self.config.softcap)

    def hidden(
        self,
        ids: Tensor,
        *,
        doc: Tensor | None = None,
        state: ModelState | None = None,
        lengths: Tensor | None = None,
        inject: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The normed output of the last block, ids (B, T) -> (B, T, D); the rest as in forward."""
        if doc is not None and state is not None:
            raise ValueError("doc marks packed rows of training; with a state every row is one document")
        ctx = self.context(ids, doc, state, lengths)
        x = self.kernels.norm(self.embed(ids).to(self.residual_dtype), self.residual_dtype)
        if inject is not None:
            x = x.index_put((inject[0],), inject[1].to(x.dtype))
        x0 = x
        for i, block in enumerate(self.blocks):
            if self.config.residual_scalars:
                x = self.x_scale[i] * x + self.x0_scale[i] * x0
            x = block(x, ctx, None if state is None else state.layers[i])
        if state is not None:
            state.pos = state.pos + (ids.size(1) if lengths is None else lengths.cpu())
        return self.kernels.norm(x, ctx.dtype)

    @property
    def residual_dtype(self) -> torch.dtype:
        """Of the residual stream and of decoding states (keys and values may be narrower): float32 on a CPU, where
        bfloat16 helps nothing but matrices (torch's norm is 6x and its one-query attention 5-7x slower, LOG
        2026-11-21), else compute_dtype."""
        return torch.float32 if self.device.type == "cpu" else self.compute_dtype

    def context(self, ids: Tensor, doc: Tensor | None, state: ModelState | None, lengths: Tensor | None) -> Context:
        """Positions, rotary tables and masks of one forward."""
        T = ids.size(1)
        pos = None if state is None else state.pos
        longest = T if pos is None else int(pos.max()) + T
        if state is not None and longest > state.max_len:  # pads may stand beyond the end
            full = longest if lengths is None else int((state.pos + lengths.cpu()).max())
            if full > state.max_len:
                raise UserError(f"{full} tokens do not fit a state made for {state.max_len}: ask init_state for more")
        cos, sin = self.rotary.tables(longest, ids)
        if pos is None:
            cos, sin = cos[None, :T, None], sin[None, :T, None]  # (1, T, 1, K/2)
        elif bool((pos == pos[0]).all()):
            first = int(pos[0])
            cos, sin = cos[None, first : first + T, None], sin[None, first : first + T, None]
        else:
            index = (pos[:, None] + torch.arange(T)).to(ids.device)
            cos, sin = cos[index][:, :, None], sin[index][:, :, None]  # (B, T, 1, K/2)
        cpu_lengths = None if lengths is None else lengths.cpu()
        few = self.head.packs and not torch.is_grad_enabled() and ids.numel() <= FEW_ROWS
        dtype = torch.float32 if few else self.compute_dtype  # packed weights alone are then narrower
        return Context(ids, cos, sin, self.kernels, dtype, doc, pos, cpu_lengths)

    def loss(self, x: Tensor, targets: Tensor, reduction: str) -> Tensor:
        """x: (B, T, D), targets: (B, T) -> cross-entropy in nats."""
        flat, y = x.flatten(0, 1).to(self.compute_dtype), targets.flatten()
        softcap, n = self.config.softcap, None
        if self.device.type == "cpu":  # elsewhere, to ask how many targets there are is to wait for the device
            n = (y >= 0).nonzero()[:, 0]
            flat, y = (flat, y) if len(n) == len(y) else (flat[n], y[n])
        if reduction == "none" or not torch.is_grad_enabled():
            rows = linear_cross_entropy_rows(flat, self.head.cast_weight(), y, softcap)
            if reduction == "none":
                rows = rows if n is None else rows.new_zeros(targets.numel()).index_copy(0, n, rows)
                return rows.view_as(targets)
            total = rows.sum()
        else:
            total = linear_cross_entropy(flat, self.head.master(), y, softcap)
        if reduction == "sum":
            return total
        if reduction == "mean":
            return total / (y >= 0).sum().clamp_min(1)
        raise ValueError(f"loss_reduction={reduction!r}: expected mean, sum or none")

    def param_groups(self) -> dict[str, list[nn.Parameter]]:
        """Role -> parameters, each parameter in exactly one role."""
        groups: dict[str, list[nn.Parameter]] = {role: [] for role in ROLES}
        groups["embedding"] += [self.embed.weight]  # pyrefly: ignore
        groups["unembedding"] += [self.head.weight]  # pyrefly: ignore
        if self.config.residual_scalars:
            groups["scalar"] += [self.x_scale, self.x0_scale]
        for block in self.layers:
            for role, params in block.param_groups().items():
                groups[role] += params
        assigned = [id(p) for params in groups.values() for p in params]
        assert len(assigned) == len(set(assigned)) == len(list(self.parameters())), (
            "a parameter is in no group or in two"
        )
        return groups

    def flops_per_token(self, seq_len: int | None = None) -> int:
        """Forward + backward FLOPs per token (PaLM, arXiv 2204.02311, appendix B)."""
        seq_len = seq_len or self.config.seq_len
        return 6 * self.head.weight.numel() + sum(b.flops_per_token(seq_len) for b in self.layers)

    def state_bytes(self, context_len: int) -> int:
        """Bytes one sequence of this length keeps for decoding on a GPU (keys and values bfloat16)."""
        return sum(b.state_bytes(context_len) for b in self.layers)

    def n_params(self) -> dict[str, int]:
        """Parameter counts: embedding tables, head, the rest (what multiplies), total."""
        tables = sum(p.numel() for m in self.modules() if isinstance(m, nn.Embedding) for p in m.parameters())
        head, total = self.head.weight.numel(), sum(p.numel() for p in self.parameters())
        return {"embedding": tables, "head": head, "blocks": total - tables - head, "total": total}
