"""The registry of blocks and the pattern that names a stack of them. Adding a block is one file plus one line here."""

import importlib

from nanochat.blocks.attn import AttentionBlock
from nanochat.blocks.contract import Block, BlockState, Context, GPTConfig
from nanochat.config import UserError

BLOCKS: dict[str, type[Block]] = {"attn": AttentionBlock}
SHORT_NAMES = {"T": "attn", "transformer": "attn", "attention": "attn", "M": "mamba", "M2": "mamba2"}

__all__ = ["BLOCKS", "Block", "BlockState", "Context", "GPTConfig", "build", "resolve_pattern"]


def resolve_pattern(pattern: list | str | None, n_layer: int) -> list[str]:
    """The block name of each of n_layer layers. A shorter pattern is tiled; its length must divide n_layer.

    pattern: a list of names, a comma-separated string ("T,T,M"), a string of letters ("TTM"), or None for attention.
    """
    names = _split(pattern) if pattern else ["attn"]
    if n_layer % len(names):
        raise UserError(
            f"block_pattern names {len(names)} blocks, which does not divide n_layer={n_layer}: "
            f"make it {n_layer} long, or a length that divides {n_layer}"
        )
    return [SHORT_NAMES.get(n, n) for n in names] * (n_layer // len(names))


def _split(pattern: list | str) -> list[str]:
    if not isinstance(pattern, str):
        return [str(n) for n in pattern]
    if "," in pattern or pattern in BLOCKS or pattern in SHORT_NAMES or ":" in pattern:
        return [n.strip() for n in pattern.split(",")]
    return list(pattern)


def block_class(name: str) -> type[Block]:
    """A registered name, or "pkg.mod:Class" for a block outside this repo."""
    if name in BLOCKS:
        return BLOCKS[name]
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as e:
            raise UserError(f"block {name!r} cannot be loaded: {e}") from e
        if not (isinstance(found, type) and issubclass(found, Block)):
            raise UserError(f"block {name!r} is no subclass of nanochat.blocks.Block")
        return found
    known = sorted(BLOCKS) + sorted(s for s, full in SHORT_NAMES.items() if full in BLOCKS)
    raise UserError(f"unknown block {name!r} in block_pattern: known are {', '.join(known)}, or pkg.mod:Class")


def build(name: str, config: GPTConfig, layer_idx: int) -> Block:
    """The block of one layer. Raises UserError for an unknown name."""
    return block_class(name)(config, layer_idx)
