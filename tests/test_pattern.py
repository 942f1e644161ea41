"""Every notation of a stack, per-layer overrides, and what a wrong one is told."""

import pytest

from nanochat.blocks import BLOCKS, GPTConfig, build, resolve_pattern
from nanochat.config import UserError
from nanochat.gpt import GPT

CONFIG = GPTConfig(n_layer=4, d_model=32, n_head=2, vocab_size=50, seq_len=16, mamba2_head_dim=16, gdn_head_dim=8)
M, A = {"block": "mamba2", "mlp": False}, {"block": "attn", "mlp": False}


@pytest.mark.parametrize(
    ("pattern", "n_layer", "want"),
    [
        (None, 3, ["attn"] * 3),
        ("T", 2, ["attn"] * 2),
        (["transformer"], 2, ["attn"] * 2),
        ("T,T", 2, ["attn"] * 2),
        (["T"] * 2 + ["M"] * 2, 8, ["attn", "attn", "mamba", "mamba"] * 2),
        ("TTM", 3, ["attn", "attn", "mamba"]),
        ("M2M2T", 3, ["mamba2", "mamba2", "attn"]),
        ("mamba, gdn", 2, ["mamba", "gdn"]),
        ("3*mamba2+attn", 8, (["mamba2"] * 3 + ["attn"]) * 2),
        ("2*M+T", 3, ["mamba", "mamba", "attn"]),
        ("gdn", 2, ["gdn", "gdn"]),
        ("M-M*-", 5, [M, "mlp", M, A, "mlp"]),
        ("MM*", 3, [M, M, A]),
        ("my.blocks:Decay,attn", 2, ["my.blocks:Decay", "attn"]),
        ([{"block": "T", "window": 4}, "M"], 2, [{"block": "attn", "window": 4}, "mamba"]),
    ],
)
def test_notations(pattern, n_layer: int, want: list) -> None:
    assert resolve_pattern(pattern, n_layer) == want
    assert resolve_pattern(want, n_layer) == want  # what a checkpoint stores


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("TTT", "does not divide n_layer=4"),
        ("X", r"unknown block 'X'.*attn.*mamba2"),
        ("E*M-", "E is a mixture of experts"),
        ("3*", "cannot read"),
        ("00*attn", "cannot read"),
        ("99999999999999999999*attn", "cannot read"),
        ([], "names no block"),
        ([{"block": "attn", "window": -5}], "window=-5"),
        ([{"block": "attn", "mlp_ratio": -1}], "mlp_ratio=-1"),
        ([{"window": 3}], "names no block"),
        ([{"block": "attn", "windw": 3}], "did you mean 'window'"),
        ([{"block": "attn", "n_kv_head": "two"}], "n_kv_head = 'two' is a str, expected int"),
        ([{"block": "attn", "d_model": 64}], "unknown key 'd_model'"),
        ([{"block": "mlp", "mlp": False}], "take the layer out"),
        ("no.such.module:Block", "cannot be loaded"),
        ("nanochat.gpt:GPT", "no subclass"),
    ],
)
def test_wrong_patterns_are_told_the_cure(pattern, message: str) -> None:
    with pytest.raises(UserError, match=message):
        GPT(GPTConfig(**{**vars(CONFIG), "block_pattern": pattern}))


def test_an_entry_overrides_fields_for_its_layer_alone() -> None:
    pattern = ["attn", {"block": "attn", "n_kv_head": 1, "window": 4}, {"block": "mamba", "mamba_d_state": 4}, "mamba"]
    layers = GPT(GPTConfig(**{**vars(CONFIG), "block_pattern": pattern})).layers
    assert [b.attn.n_kv_head for b in layers[:2]] == [2, 1] and [b.attn.window for b in layers[:2]] == [0, 4]
    assert [b.d_state for b in layers[2:]] == [4, 16]


def test_head_sizes_that_do_not_fit_are_told_the_cure() -> None:
    for name, message in (("mamba2", "do not make heads of mamba2_head_dim=24"), ("gdn", "--gdn_head_dim=24")):
        with pytest.raises(UserError, match=message):
            build({"block": name, "mamba2_head_dim": 24, "gdn_head_dim": 64}, CONFIG, 0)


def test_every_registered_name_builds() -> None:
    for name in BLOCKS:
        assert isinstance(build(name, CONFIG, 0), BLOCKS[name])
