"""A small random model that tests of serving share, in memory and as a checkpoint."""

import dataclasses
from pathlib import Path

import torch

from nanochat.checkpoint import checkpoint_dir, save_checkpoint
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import Tokenizer

TEXTS = ["the river runs to the sea and the sea runs to the sky. ça va, 日本語, naïve café 🙂 " * 30]


def make(blocks: list[str], seq_len: int = 256) -> tuple[GPT, Tokenizer]:
    """A model whose blocks all say something, and whose special tokens are rare, so that answers have a length."""
    tokenizer = Tokenizer.train(TEXTS, 320)
    config = GPTConfig(
        n_layer=2, block_pattern=blocks, d_model=32, n_head=2, vocab_size=tokenizer.vocab_size, seq_len=seq_len,
        mamba2_d_state=16, mamba2_head_dim=16, gdn_head_dim=16,
    )  # fmt: skip
    model = GPT(config)
    model.init_weights(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
        model.head.weight[-18:] *= 0.2
    return model.eval(), tokenizer


def save(model: GPT, tokenizer: Tokenizer, path: Path) -> None:
    """As an sft and a rag checkpoint under `path`, which must be NANOCHAT_BASE_DIR now."""
    tokenizer.save(path / "tokenizer")
    meta = {"model_config": dataclasses.asdict(model.config), "tokenizer_hash": tokenizer.hash}
    for source in ("sft", "rag"):
        save_checkpoint(checkpoint_dir(source, "d2"), 7, model=model.state_dict(), optim=None, state={}, meta=meta)
