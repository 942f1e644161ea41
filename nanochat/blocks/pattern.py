"""From what a user writes as block_pattern to the entry of every layer. An entry is a name or {"block": name, ...}.

    ["T"] * 8 + ["M"] * 12              a list of names, short names, or entries with overrides of GPTConfig's fields
    "TTM", "T,T,M", "M2M2T"             letters, or names between commas
    "3*mamba2+attn"                     repetition
    "M-M*-"                             Nemotron-H's letters (arXiv 2504.03624): M mamba2, * attention, G gdn, - MLP,
                                        one per sublayer, so that no mixer has an MLP of its own

A pattern shorter than the stack is tiled. {"block": "attn", "window": 512} overrides fields for that layer alone.
"""

import re

from nanochat.config import UserError

SHORT_NAMES = {"T": "attn", "transformer": "attn", "attention": "attn", "M": "mamba", "M2": "mamba2", "G": "gdn"}
NEMOTRON = {"M": "mamba2", "*": "attn", "G": "gdn", "-": "mlp"}
_LETTERS = re.compile(r"(?:M2|[TMG])+")
_REPEATED = re.compile(r"(?:([1-9]\d{0,3})\*)?([^*]+)")

Entry = str | dict


def resolve_pattern(pattern: list | str | None, n_layer: int) -> list[Entry]:
    """The entry of each of n_layer layers, names in full. The pattern's length must divide n_layer; None = attn."""
    if pattern == []:
        raise UserError("block_pattern=[] names no block: write names, as attn,mamba, or none for attn alone")
    entries = [_full(e) for e in (_split(pattern) if isinstance(pattern, str) else pattern or ["attn"])]
    if n_layer % len(entries):
        raise UserError(
            f"block_pattern names {len(entries)} blocks, which does not divide n_layer={n_layer}: "
            f"make it {n_layer} long, or a length that divides {n_layer}"
        )
    return entries * (n_layer // len(entries))


def entry_name(entry: Entry) -> str:
    return entry["block"] if isinstance(entry, dict) else entry


def entry_names(pattern: list | str | None, n_layer: int) -> list[str]:
    """The block name of each layer."""
    return [entry_name(e) for e in resolve_pattern(pattern, n_layer)]


def _full(entry: Entry) -> Entry:
    if isinstance(entry, dict):
        if not isinstance(entry.get("block"), str):
            raise UserError(f'block_pattern entry {entry} names no block: write {{"block": "attn", ...}}')
        return {**entry, "block": SHORT_NAMES.get(entry["block"], entry["block"])}
    return SHORT_NAMES.get(str(entry), str(entry))


def _split(text: str) -> list[Entry]:
    """One of the notations above -> entries."""
    text = text.strip()
    if set(text) & set("*-") and not set(text) - set(NEMOTRON) - set("E|"):
        return [_nemotron(letter) for letter in text]
    if ":" not in text and _LETTERS.fullmatch(text):
        return list(re.findall(r"M2|[TMG]", text))
    entries: list[Entry] = []
    for part in re.split(r"[,+]", text):
        match = _REPEATED.fullmatch(part.strip())
        if match is None:
            raise UserError(f"block_pattern {text!r}: cannot read {part!r}: write a name, or 3*name")
        entries += [match[2].strip()] * int(match[1] or 1)
    return entries


def _nemotron(letter: str) -> Entry:
    if letter not in NEMOTRON:
        what = {"E": "E is a mixture of experts", "|": "| cuts a pipeline"}[letter]
        raise UserError(f"block_pattern: {what}, which is not here: known letters are {' '.join(NEMOTRON)}")
    name = NEMOTRON[letter]
    return name if name == "mlp" else {"block": name, "mlp": False}
