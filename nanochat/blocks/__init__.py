"""The registry of blocks. Adding one is one file plus one line here; pattern.py reads the notations of a stack."""

import dataclasses
import difflib
import importlib

from nanochat.blocks.attn import AttentionBlock
from nanochat.blocks.contract import Block, BlockState, Context, GPTConfig, RecurrentState
from nanochat.blocks.gdn import GatedDeltaNetBlock
from nanochat.blocks.mamba import MambaBlock
from nanochat.blocks.mamba2 import Mamba2Block
from nanochat.blocks.mlp import MLPBlock
from nanochat.blocks.pattern import SHORT_NAMES, Entry, entry_name, entry_names, resolve_pattern
from nanochat.config import UserError, check_types

BLOCKS: dict[str, type[Block]] = {
    "attn": AttentionBlock,
    "mamba": MambaBlock,
    "mamba2": Mamba2Block,
    "gdn": GatedDeltaNetBlock,
    "mlp": MLPBlock,
}
# fields that all layers share, so that an entry of the pattern cannot set them
SHARED_FIELDS = {"n_layer", "block_pattern", "window_pattern", "d_model", "n_head", "vocab_size", "seq_len"}
SHARED_FIELDS |= {"rope_base", "softcap", "residual_scalars", "head_tie"}

__all__ = [
    "BLOCKS",
    "Block",
    "BlockState",
    "Context",
    "GPTConfig",
    "RecurrentState",
    "build",
    "entry_name",
    "entry_names",
    "resolve_pattern",
]


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


def build(entry: Entry, config: GPTConfig, layer_idx: int) -> Block:
    """The block of one layer; an entry's other keys replace fields of the configuration for this layer alone."""
    cls = block_class(entry_name(entry))
    overrides = {k: v for k, v in entry.items() if k != "block"} if isinstance(entry, dict) else {}
    fields = {f.name for f in dataclasses.fields(GPTConfig)} - SHARED_FIELDS
    for key in overrides:
        if key not in fields and key not in cls.OPTIONS:
            near = difflib.get_close_matches(key, fields | set(cls.OPTIONS), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"a layer can set {', '.join(sorted(fields))}"
            raise UserError(f"block_pattern, layer {layer_idx}: {entry} has an unknown key {key!r}: {hint}")
    changed = {k: v for k, v in overrides.items() if k in fields}
    check_types(GPTConfig, changed, where=f"block_pattern, layer {layer_idx}")
    return cls(dataclasses.replace(config, **changed), layer_idx)
