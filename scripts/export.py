"""A checkpoint as a folder that other programs read.

    python -m scripts.export --source=sft --model_tag=d20                          # for transformers, and all it feeds
    python -m scripts.export --source=sft --model_tag=d20 --format=safetensors     # any backbone, for this code

transformers: its model type "nanochat" (written for karpathy/nanochat; in 5.x) computes what our attention stacks do,
so the folder needs no trust_remote_code, and its logits equal ours (tests/test_export.py). It rotates, then norms q
and k; we norm, then rotate, which is the same, since a rotation keeps the length and our norm has no weight. It has no
windows, value embeddings, residual scalars or recurrent blocks.
safetensors: the weights under our own names, config.json and our tokenizer. The script prints how to load either.
lm-evaluation-harness takes the first as `--model hf`, and any checkpoint through nanochat/lm_harness.py.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from nanochat.blocks import Block
from nanochat.blocks.attn import AttentionBlock
from nanochat.checkpoint import load_model, tag_of
from nanochat.common import base_dir, raise_disk_error, run_script, write_json
from nanochat.config import UserError, load_config
from nanochat.gpt import GPT
from nanochat.hf_tokenizer import BOS, EOS, tokenizer_files
from nanochat.ops.dense import NORM_EPS
from nanochat.tokenizer import Tokenizer

RENAMED = {  # ours -> transformers'; blocks.0 is model.layers.0
    "embed": "model.embed_tokens",
    "head": "lm_head",
    "attn.c_q": "self_attn.q_proj",
    "attn.c_k": "self_attn.k_proj",
    "attn.c_v": "self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
LOAD = {
    "transformers": """from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("{dir}")
tokenizer = AutoTokenizer.from_pretrained("{dir}")""",
    "safetensors": """import json; from safetensors.torch import load_file
from nanochat.gpt import GPT, GPTConfig; from nanochat.tokenizer import Tokenizer
model = GPT(GPTConfig(**json.load(open("{dir}/config.json"))["model_config"])).eval()
model.load_state_dict(load_file("{dir}/model.safetensors"))
tokenizer = Tokenizer.load("{dir}")""",
}


@dataclass(frozen=True)
class ExportConfig:
    """Write a checkpoint for other programs."""

    source: Annotated[Literal["base", "mid", "sft", "rl", "rag", "refrag"], "stage of the checkpoint"] = "sft"
    model_tag: Annotated[str | None, "checkpoint folder; none = the one saved last"] = None
    step: Annotated[int | None, "step; none = the newest"] = None
    format: Annotated[Literal["transformers", "safetensors"], "who is to read it"] = "transformers"
    output: Annotated[str, "folder to make; empty = <base dir>/export/<stage>_<tag>_<step>_<format>"] = ""
    dtype: Annotated[Literal["float32", "bfloat16"], "of the weights; float32 is what was trained"] = "float32"


def obstacle(config: Any, blocks: Sequence[Block]) -> str | None:
    """What of this model transformers' nanochat has no place for; None where it has all."""
    if config.residual_scalars:
        return "residual_scalars"
    shapes = set()
    for i, block in enumerate(blocks):
        if not isinstance(block, AttentionBlock):
            return f"a {type(block).__name__} (layer {i})"
        if block.attn.value_embed is not None:
            return "value_embeddings"
        if block.attn.conv_weight is not None:
            return "attn_conv"
        if 0 < block.attn.window < config.seq_len:
            return f"a window of {block.attn.window} tokens in layer {i}"
        shapes.add((block.attn.n_kv_head, 0 if block.mlp is None else block.mlp.c_fc.out_features))
    return f"layers that differ: (kv heads, MLP width) {sorted(shapes)}" if len(shapes) > 1 else None


def transformers_config(model: GPT, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """config.json of NanoChatForCausalLM. UserError where it does not compute what this model does."""
    config, first = model.config, model.layers[0]
    found = obstacle(config, model.layers)
    if found is None and first.mlp is None:
        found = "attention without an MLP"
    if found is not None:
        raise UserError(
            f"transformers has no model with {found}: use --format=safetensors, or nanochat.lm_harness to evaluate it"
        )
    assert isinstance(first, AttentionBlock) and first.mlp is not None
    return {
        "architectures": ["NanoChatForCausalLM"],
        "model_type": "nanochat",
        "dtype": dtype,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": first.mlp.c_fc.out_features,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": first.attn.n_kv_head,
        "max_position_embeddings": config.seq_len,
        "hidden_act": "relu2",
        "rms_norm_eps": NORM_EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "final_logit_softcapping": config.softcap or None,
        "attention_bias": False,
        "tie_word_embeddings": False,
        **special_ids(tokenizer),
    }


def special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """Where generation starts and ends, as in nanochat.engine: at <|assistant_end|> or <|bos|>."""
    bos, eos = tokenizer.encode_special(BOS), tokenizer.encode_special(EOS)
    return {"bos_token_id": bos, "eos_token_id": [eos, bos], "pad_token_id": eos}


def transformers_name(name: str) -> str:
    """blocks.3.attn.c_q.weight -> model.layers.3.self_attn.q_proj.weight"""
    module = name.removesuffix(".weight")
    if not module.startswith("blocks."):
        return f"{RENAMED[module]}.weight"
    _, layer, part = module.split(".", 2)
    return f"model.layers.{layer}.{RENAMED[part]}.weight"


def contents(
    cfg: ExportConfig, model: GPT, tokenizer: Tokenizer, meta: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """-> (file name -> JSON value, tensors) of the folder."""
    tensors = {name: t.to(getattr(torch, cfg.dtype)) for name, t in model.state_dict().items()}
    origin = {key: meta.get(key) for key in ("step", "git", "tokenizer_hash")}
    if cfg.format == "safetensors":
        return {"config.json": {"model_config": asdict(model.config), "source": cfg.source, **origin}}, tensors
    config = transformers_config(model, tokenizer, cfg.dtype)
    # transformers ties a head to the embedding wholly or not at all, so it gets the sum
    tensors["head.weight"] = model.head.master().detach().to(tensors["head.weight"].dtype)
    files = {
        "config.json": {**config, "nanochat_turbo": {"source": cfg.source, **origin}},
        "generation_config.json": special_ids(tokenizer),
        **tokenizer_files(tokenizer, model.config.seq_len),
    }
    return files, {transformers_name(name): t for name, t in tensors.items()}


def write_folder(output: Path, files: dict[str, Any], tensors: dict[str, Tensor], tokenizer: Tokenizer | None) -> None:
    """Make the folder whole or not at all. With a tokenizer, our own tokenizer.json is written too."""
    tmp = output.with_name(f".tmp-{output.name}-{os.getpid()}")
    try:
        tmp.mkdir(parents=True)
        for name, value in files.items():
            write_json(tmp / name, value)
        save_file({k: t.contiguous() for k, t in tensors.items()}, tmp / "model.safetensors", {"format": "pt"})
        if tokenizer is not None:
            tokenizer.save(tmp)
        tmp.rename(output)
    except OSError as e:
        raise_disk_error(e, output)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def main(argv: list[str]) -> None:
    cfg = load_config(ExportConfig, argv)
    model, tokenizer, meta = load_model(cfg.source, "cpu", cfg.model_tag, cfg.step)
    tag = cfg.model_tag or tag_of(meta)
    default = base_dir() / "export" / f"{cfg.source}_{tag}_{meta['step']:06d}_{cfg.format}"
    output = Path(cfg.output) if cfg.output else default
    if output.exists():
        raise UserError(f"output={output} exists: name another folder, or remove it")
    files, tensors = contents(cfg, model, tokenizer, meta)
    write_folder(output, files, tensors, tokenizer if cfg.format == "safetensors" else None)
    size = sum(f.stat().st_size for f in output.iterdir())
    print(f"{output}: {size / 1e6:.1f} MB, {cfg.dtype}. To load it:\n{LOAD[cfg.format].format(dir=output)}")


if __name__ == "__main__":
    run_script(main)
