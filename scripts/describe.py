"""The stack a config file describes, as a table: parameters, FLOPs and state bytes of each layer.

python -m scripts.describe configs/hybrid_alternating_d20.py
python -m scripts.describe configs/mamba_d20.py --match=params --reference=configs/transformer_d20.py
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch

from nanochat.blocks import entry_name, resolve_pattern
from nanochat.common import run_script
from nanochat.config import UserError, load_config
from nanochat.gpt import GPT
from nanochat.tokenizer import Tokenizer
from scripts.base_train import BaseTrainConfig

WIDTH_STEP = 64  # matched widths are multiples of this, or of head_dim where that is larger
DEFAULT_VOCAB = 65536


@dataclass(frozen=True)
class DescribeConfig(BaseTrainConfig):
    """Describe the model of a config file: any key of base_train, and these."""

    vocab_size: Annotated[int, "ids; 0 = the tokenizer's where one is trained, else 65536"] = 0
    context_len: Annotated[int, "tokens that FLOPs and state are counted at; 0 = max_seq_len"] = 0
    match: Annotated[
        Literal["none", "params", "flops"], "find the depth and width with the reference's parameters or FLOPs/token"
    ] = "none"
    reference: Annotated[str, "config file to match"] = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.match == "none") != (not self.reference):
            raise ValueError(
                "--match and --reference go together: --match=params --reference=configs/transformer_d20.py"
            )


def main(argv: list[str]) -> None:
    cfg = load_config(DescribeConfig, argv)
    vocab_size, why = cfg.vocab_size, "as asked"
    if not vocab_size:
        try:
            vocab_size, why = Tokenizer.load().vocab_size, "the trained tokenizer's"
        except UserError:
            vocab_size, why = DEFAULT_VOCAB, "no tokenizer is trained yet"
    print(f"vocabulary: {vocab_size} ({why})")
    if cfg.match != "none":
        cfg = matched(cfg, vocab_size)
    print(table(meta_model(cfg, vocab_size), cfg.context_len or cfg.max_seq_len))


def meta_model(cfg: BaseTrainConfig, vocab_size: int) -> GPT:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return GPT(cfg.gpt_config(vocab_size))


def table(model: GPT, context_len: int) -> str:
    """One line per layer, then the sums. FLOPs are forward + backward per token, state is of one sequence."""
    config = model.config
    rows = [("layer", "block", "options", "parameters", "MFLOP/token", "state bytes")]
    for i, (entry, block) in enumerate(zip(config.block_pattern or [], model.layers, strict=True)):
        options = ", ".join(f"{k}={v}" for k, v in entry.items() if k != "block") if isinstance(entry, dict) else ""
        if block.mlp is not None and entry_name(entry) != "mlp":
            options = f"{options}, +mlp".lstrip(", ")
        size = sum(p.numel() for p in block.parameters())
        cost = (block.flops_per_token(context_len) / 1e6, block.state_bytes(context_len))
        rows.append((str(i), entry_name(entry), options, f"{size:,}", f"{cost[0]:.2f}", f"{cost[1]:,}"))
    n, flops = model.n_params(), model.flops_per_token(context_len) / 1e6
    rows.append(("", "embedding, head", "", f"{n['embedding'] + n['head']:,}", f"{6 * n['head'] / 1e6:.2f}", ""))
    rows.append(("", "all", "", f"{n['total']:,}", f"{flops:.2f}", f"{model.state_bytes(context_len):,}"))
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True)))
        for r in rows
    ]
    shape = f"{config.n_layer} layers, d_model {config.d_model}, {config.n_head} heads of {config.head_dim}"
    return "\n".join(
        [f"{shape}; at {context_len} tokens of context, forward + backward:", *(s.rstrip() for s in lines)]
    )


def size(model: GPT, by: str) -> float:
    """What is matched: total parameters, or FLOPs per token at the training length."""
    return model.n_params()["total"] if by == "params" else model.flops_per_token()


def matched(cfg: DescribeConfig, vocab_size: int) -> DescribeConfig:
    """The configuration with the depth and width that come nearest to the reference, in its proportions if possible."""
    if not Path(cfg.reference).is_file():
        raise UserError(f"--reference={cfg.reference} does not exist: name a config file")
    target = size(meta_model(load_config(BaseTrainConfig, [cfg.reference]), vocab_size), cfg.match)
    depth, width = cfg.depth, cfg.d_model or cfg.depth * cfg.aspect_ratio
    period = shortest_period(resolve_pattern(cfg.block_pattern, cfg.depth))
    step = max(WIDTH_STEP, cfg.head_dim)
    depths = [d for d in range(len(period), 3 * depth + 1, len(period)) if d >= depth / 2]
    candidates = [(d, width) for d in depths] + [(depth, w) for w in range(step, 3 * width, step) if w >= width / 2]

    def scaled(depth_: int, width_: int) -> DescribeConfig:
        return dataclasses.replace(cfg, depth=depth_, d_model=width_, block_pattern=period)

    def distance(candidate: tuple[int, int]) -> float:  # within 2 % of the target, the smaller change decides
        miss = abs(math.log(size(meta_model(scaled(*candidate), vocab_size), cfg.match) / target))
        return max(miss, 0.02) + 0.05 * sum(
            abs(math.log(x / y)) for x, y in zip(candidate, (depth, width), strict=True)
        )

    best = scaled(*min(candidates, key=distance))
    ratio = size(meta_model(best, vocab_size), cfg.match) / target
    print(
        f"matched: --depth={best.depth} --d_model={best.d_model} --block_pattern={compact(period)} has {ratio:.3f} of "
        f"{cfg.reference}'s {cfg.match}"
    )
    return best


def shortest_period(entries: list) -> list:
    """The shortest pattern that, repeated, is this stack."""
    n = len(entries)
    return next(entries[:p] for p in range(1, n + 1) if n % p == 0 and entries == entries[:p] * (n // p))


def compact(entries: list) -> str:
    """The pattern as a command line takes it."""
    return repr(entries) if any(isinstance(e, dict) for e in entries) else ",".join(entries)


if __name__ == "__main__":
    run_script(main)
