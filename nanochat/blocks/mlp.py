"""MLP block ("mlp", "-" in Nemotron's notation): no mixing of tokens, for stacks that alternate mixers and MLPs."""

from torch import Tensor

from nanochat.blocks.contract import Block, BlockState, Context, GPTConfig
from nanochat.config import UserError


class MLPBlock(Block):
    """x + mlp(norm(x))."""

    def __init__(self, config: GPTConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx, mlp=True)
        if self.mlp is None:
            raise UserError(f"layer {layer_idx} is an mlp block with mlp=False: take the layer out of block_pattern")

    def forward(self, x: Tensor, ctx: Context, state: BlockState | None = None) -> Tensor:
        assert self.mlp is not None
        return x + self.mlp(ctx.kernels.norm(x, ctx.dtype))
