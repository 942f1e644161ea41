"""Mid-training: a base model learns the chat format, multiple choice, tool calls and who it is, at the base's rates.

    python -m scripts.mid_train configs/tiny_transformer.py --num_iterations=300
    torchrun --standalone --nproc_per_node=8 -m scripts.mid_train configs/mamba_d20.py --tasks=nanochat-mid

A config file is the one base_train was given: it names the checkpoint, whose architecture is kept. One epoch is about
one pass over the conversations (told from a sample of them).
"""

from dataclasses import dataclass
from typing import Annotated

from nanochat.common import run_script
from nanochat.config import load_config
from nanochat.finetune import FinetuneConfig, finish, make_loop, open_batches, start_from, val_rows, validate
from nanochat.train import compile_model, memory_advice
from tasks.mixtures import DEFAULT, MIXTURES, mid_mixture


@dataclass(frozen=True)
class MidTrainConfig(FinetuneConfig):
    """Mid-train a model. Sizes are counts, lengths are tokens; none = as the checkpoint was trained."""

    source: Annotated[str, "stage to start from"] = "base"


def main(argv: list[str]) -> None:
    cfg = load_config(MidTrainConfig, argv)
    tasks = cfg.names(MIXTURES, DEFAULT)
    train, val = mid_mixture("train", tasks), mid_mixture("val", tasks)
    start = start_from(cfg, "mid")
    loop, rows = make_loop(start, train), val_rows(start, val)
    cursor = loop.begin(cfg.resume)  # where to go on in the conversations
    forward = compile_model(start.model) if cfg.compile else start.model
    with open_batches(start, train, cursor) as batches, memory_advice(start.B, start.T):
        for step in loop:
            if step.due(cfg.eval_every) or (step.number == 0 and cfg.eval_every >= 0):
                validate(start, loop, rows)
            if step.due(cfg.save_every) and not step.first and not cfg.dry_run:
                loop.save(batches.place())
            if step.last:
                break
            for _ in loop.forwards():
                batch = next(batches)
                loss = forward(batch.x, batch.y, doc=batch.doc, loss_reduction="sum")
                loop.backward(loss, batch.tokens)
            loop.update()
    finish(start, loop, "mid_training", tasks, batches.place())


if __name__ == "__main__":
    run_script(main)
