"""Bits per byte of a base model on fixed windows of the training and the validation text.

python -m scripts.base_loss --model_tag=tiny
torchrun --standalone --nproc_per_node=8 -m scripts.base_loss
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from nanochat.checkpoint import load_model
from nanochat.common import run_script
from nanochat.config import load_config
from nanochat.dataloader import document_index, val_windows
from nanochat.dataset import shard_paths
from nanochat.device import describe_device, init_ranks, leave_ranks, pick_device
from nanochat.loss_eval import evaluate_bpb
from nanochat.report import log_stage


@dataclass(frozen=True)
class BaseLossConfig:
    """Evaluate a base model in bits per byte."""

    split_tokens: Annotated[int, "tokens of each kind of window"] = 20 * 524288
    device_batch_size: Annotated[int, "rows per forward"] = 32
    source: Annotated[str, "stage of the checkpoint"] = "base"
    model_tag: Annotated[str | None, "checkpoint folder; none = the one saved last"] = None
    step: Annotated[int | None, "step; none = the newest"] = None
    doc_mask: Annotated[bool, "documents in a window do not see each other, as in training"] = True
    device: Annotated[str, "cpu, cuda, mps; empty = the best there is"] = ""
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], "multiplication dtype"] = "auto"


def main(argv: list[str]) -> None:
    cfg = load_config(BaseLossConfig, argv)
    ranks, device = init_ranks(pick_device(cfg.device))
    model, tokenizer, meta = load_model(cfg.source, device, cfg.model_tag, cfg.step, dtype=cfg.dtype)
    if ranks.main:
        print(f"device: {describe_device(device, model.compute_dtype)}, step {meta['step']}")
    results: dict[str, float | int] = {"step": meta["step"]}
    # the first training shard and the validation shard: as fixed windows of one text, comparable between models
    for split, shards, kind in (
        ("train", shard_paths("train")[:1], "stream"),
        ("val", shard_paths("val"), "stream"),
        ("val", shard_paths("val"), "head"),
    ):
        name = f"{split}_bpb" if kind == "stream" else f"{split}_{kind}_bpb"
        x, y = (t.to(device) for t in val_windows(shards, tokenizer, model.config.seq_len, cfg.split_tokens, kind))
        doc = document_index(x, tokenizer.bos_id) if cfg.doc_mask else None
        results[name] = evaluate_bpb(model, x, y, tokenizer.token_bytes, cfg.device_batch_size, doc)
        if ranks.main:
            print(f"{name}: {results[name]:.4f} ({len(x)} windows of {x.size(1)} tokens)")
    if ranks.main:
        log_stage("base_loss", results)
    leave_ranks()


if __name__ == "__main__":
    run_script(main)
