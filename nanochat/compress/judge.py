"""rag_eval --mode compress: accuracy against compression of a trained reader, for each policy.

    compress_eval_main(load_config(CompressEvalConfig, argv), open_contexts)        # of tasks/compress.py

Every question comes with its documents among others, as many as fit the context as tokens. Which questions were right,
and which chunks stayed tokens, goes to <base dir>/rag_eval/refrag_<model_tag>_<step>/compress.jsonl.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from nanochat.common import atomic_write, base_dir
from nanochat.compress.evaluate import judge_policies
from nanochat.compress.reader import build_cache, load_reader
from nanochat.compress.train import CompressConfig, Opener
from nanochat.device import describe_device, single_device
from nanochat.report import log_stage


@dataclass(frozen=True)
class CompressEvalConfig:
    """Evaluate what refrag_finetune --mode compress has trained. What is not given is as it was trained."""

    SHORT: ClassVar = {"g": "model_tag", "s": "step", "x": "max_problems", "d": "dtype"}

    model_tag: Annotated[str, "-g: folder in refrag_checkpoints"]
    mode: Annotated[Literal["compress"], "this one"] = "compress"
    step: Annotated[int | None, "-s: step; none = the newest"] = None
    knowledge_base: Annotated[str, "folder made by prepare_rag_dataset; empty = the one it was trained on"] = ""
    max_problems: Annotated[int, "-x: validation questions"] = 500
    expand: Annotated[list | None, "shares of chunks that stay tokens, as 0.05,0.1"] = None
    cache: Annotated[bool, "write the vectors of the knowledge base beside it, and use them"] = True
    device: Annotated[str, "cpu, cuda, mps; empty = the best there is"] = ""
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], "-d: multiplication dtype"] = "auto"
    kernels: Annotated[Literal["auto", "fast", "reference"], "which implementations run"] = "auto"
    seed: Annotated[int, "of the random policy"] = 0

    def __post_init__(self) -> None:
        if self.max_problems < 1:
            raise ValueError(f"max_problems={self.max_problems}: expected at least 1")


def compress_eval_main(cfg: CompressEvalConfig, open_contexts: Opener) -> None:
    device = single_device(cfg.device, "compress")
    reader, meta = load_reader(cfg.model_tag, device, cfg.step, cfg.dtype, cfg.kernels)
    print(describe_device(device, reader.model.compute_dtype))
    given: dict[str, Any] = {"knowledge_base": cfg.knowledge_base, "expand": cfg.expand}
    trained = CompressConfig(**{**meta["train_config"], **{k: v for k, v in given.items() if v}})
    data = open_contexts(trained, reader.tokenizer, reader.model.config.seq_len + 1)
    if cfg.cache and data.kb is not None:
        cache = build_cache(reader, data.kb)
        print(f"{len(cache.keys)} chunk vectors in {cache.folder}")
    prompts = [reader.prompt(data.val[i]) for i in range(min(cfg.max_problems, len(data.val)))]
    rows, metrics, text, plot = judge_policies(reader, prompts, data.judge, trained.shares, cfg.model_tag, cfg.seed)
    print(text)
    path = base_dir() / "rag_eval" / f"refrag_{cfg.model_tag}_{meta['step']:06d}" / "compress.jsonl"
    with atomic_write(path, "w") as f:
        f.writelines(json.dumps({**row, "questions": [p.question for p in prompts]}) + "\n" for row in rows)
    print(f"answers are in {path}")
    log_stage("refrag_compress_evaluation", {"questions": len(prompts), **metrics,
              "config": str(dataclasses.asdict(cfg))}, text=text, plots=[plot])  # fmt: skip
