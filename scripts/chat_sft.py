"""Supervised fine-tuning: the last pass over conversations, at falling rates.

    python -m scripts.chat_sft --model_tag=tiny_transformer --num_iterations=150
    python -m scripts.chat_sft --model_tag=tiny_transformer --source=base        # without mid-training
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_sft --model_tag=d20 --tasks=nanochat-sft

Packed rows, loss on the assistant's tokens alone, each token weighing the same. Rates start at init_lr_frac of the
checkpoint's and fall to nothing. The last step is what is kept; the report says where the validation loss was lowest.
"""

from dataclasses import dataclass
from typing import Annotated

from nanochat.common import run_script
from nanochat.config import load_config
from nanochat.finetune import FinetuneConfig, finish, make_loop, open_batches, start_from, val_rows, validate
from nanochat.train import compile_model, memory_advice
from tasks.mixtures import DEFAULT, MIXTURES, sft_mixture


@dataclass(frozen=True)
class ChatSFTConfig(FinetuneConfig):
    """Fine-tune on conversations. Sizes are counts, lengths are tokens; none = as the checkpoint was trained."""

    source: Annotated[str, "stage to start from: mid or base"] = "mid"
    # 2026-11-21, 1.1M parameters, 150 steps of mid_train, 60 of SFT on the embedded tasks, one seed: val_loss 0.0998 ->
    # 0.0922, 0.0791, 0.0667, 0.0611 with 0.02 (nanochat's), 0.1, 0.3, 1; a cold optimizer at 0.3: 0.0704
    init_lr_frac: Annotated[float, "all rates are multiplied by it"] = 0.3
    warmdown_ratio: Annotated[float, "share of the run over which rates fall"] = 1.0
    eval_every: Annotated[int, "steps between validations; 0 = only at start and end, -1 = never"] = 100
    seed: Annotated[int, "of the order of the conversations; another than mid_train's, so others come first"] = 43


def main(argv: list[str]) -> None:
    cfg = load_config(ChatSFTConfig, argv)
    tasks = cfg.names(MIXTURES, DEFAULT)
    train, val = sft_mixture("train", tasks), sft_mixture("val", tasks)
    start = start_from(cfg, "sft")
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
    finish(start, loop, "chat_sft", tasks, batches.place())


if __name__ == "__main__":
    run_script(main)
