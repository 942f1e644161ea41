"""The configuration of a stage that goes on with a checkpoint: mid_train, chat_sft.

The architecture is the checkpoint's, and so is every rate and size of INHERITED that is not given. A config file made
for base_train may be passed along: what it says of the architecture must agree with the checkpoint.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from nanochat.blocks import GPTConfig, resolve_pattern
from nanochat.config import UserError
from nanochat.optim import RATES, check_training

SCRIPTS = {"base": "scripts.base_train", "mid": "scripts.mid_train", "sft": "scripts.chat_sft"}
INHERITED = (*RATES, "weight_decay", "grad_clip", "device_batch_size", "total_batch_size", "max_seq_len")


@dataclass(frozen=True)
class Architecture:
    """Keys of base_train that a config file may bring along; where given, they must be the checkpoint's."""

    depth: Annotated[int | None, "layers, as in the checkpoint; without model_tag it names the folder, d<depth>"] = None
    d_model: Annotated[int | None, "as in the checkpoint, like the keys down to gdn_expand_v"] = None
    block_pattern: list | str | None = None
    n_head: int | None = None
    n_kv_head: int | None = None
    mlp_ratio: int | None = None
    softcap: float | None = None
    rope_base: float | None = None
    window_pattern: str | None = None
    window: int | None = None
    attn_conv: int | None = None
    value_embeddings: bool | None = None
    residual_scalars: bool | None = None
    head_tie: float | None = None
    mlp: bool | None = None
    mamba_d_state: int | None = None
    mamba_d_conv: int | None = None
    mamba_expand: int | None = None
    mamba_use_mlp: bool | None = None
    mamba2_d_state: int | None = None
    mamba2_head_dim: int | None = None
    mamba2_n_group: int | None = None
    gdn_head_dim: int | None = None
    gdn_expand: float | None = None
    gdn_expand_v: int | None = None

    def check(self, config: GPTConfig, name: str) -> None:
        """UserError for the first key that is not the checkpoint's. 0 leaves d_model and n_head to base_train."""
        saved: dict[str, Any] = {**dataclasses.asdict(config), "depth": config.n_layer}
        for f in dataclasses.fields(Architecture):
            given, has = getattr(self, f.name), saved[f.name]
            if given is None or (given == 0 and f.name in ("d_model", "n_head")):
                continue
            if f.name == "block_pattern":
                given, has = resolve_pattern(given, config.n_layer), resolve_pattern(has, config.n_layer)
            if given != has:
                raise UserError(
                    f"{f.name} is {_short(given)}, but {name} has {_short(has)}: train a base model with these keys by "
                    f"`python -m {SCRIPTS['base']}`, or give the --model_tag of one (architectures come from it)"
                )


@dataclass(frozen=True)
class FinetuneConfig(Architecture):
    """Train on conversations. Sizes are counts, lengths are tokens; none = as the checkpoint was trained."""

    SHORT: ClassVar = {"g": "model_tag", "device_type": "device"}

    # the model
    source: Annotated[str, "stage to start from"] = "base"
    model_tag: Annotated[str, "folder of the checkpoint to start from; empty = d<depth>, or the only one"] = ""
    out_tag: Annotated[str, "folder of this run; empty = model_tag"] = ""
    step: Annotated[int | None, "step of the checkpoint; none = the newest"] = None
    # the conversations
    tasks: Annotated[list | None, "names and .jsonl files, as a,b:1000 (tasks/mixtures.py); none = embedded"] = None
    identity: Annotated[str, "a .jsonl of conversations about who the model is, in place of the embedded ones"] = ""
    max_seq_len: Annotated[int | None, "tokens of a row; more than the checkpoint's make its context longer"] = None
    # how long
    num_iterations: Annotated[int, "optimizer steps; -1 = from num_epochs"] = -1
    num_epochs: Annotated[float, "times every conversation is seen, about"] = 1.0
    # the batch
    device_batch_size: Annotated[int | None, "rows per device and forward"] = None
    total_batch_size: Annotated[int | None, "tokens per step, reached by accumulation; 0 = one forward per device"] = (
        None
    )
    target_examples_per_step: Annotated[int | None, "conversations per step, about, in place of total_batch_size"] = (
        None
    )
    # the optimizer
    warm_start: Annotated[bool, "go on with the optimizer's moments of the checkpoint, where they fit"] = True
    embedding_lr: Annotated[float | None, "AdamW, embeddings; scaled by (d_model / 768)^-0.5"] = None
    unembedding_lr: Annotated[float | None, "AdamW, head; scaled alike"] = None
    scalar_lr: Annotated[float | None, "AdamW, scalars and gates"] = None
    ssm_lr: Annotated[float | None, "AdamW, what steers a recurrence"] = None
    matrix_lr: Annotated[float | None, "Muon, matrices"] = None
    init_lr_frac: Annotated[float, "all of these rates are multiplied by it"] = 1.0
    weight_decay: Annotated[float | None, "decoupled, matrices only"] = None
    grad_clip: Annotated[float | None, "largest gradient norm; 0 = no clipping"] = None
    warmup_ratio: Annotated[float, "share of the run over which rates rise"] = 0.0
    warmdown_ratio: Annotated[float, "share of the run over which rates fall"] = 0.2
    final_lr_frac: Annotated[float, "rate at the end / rate at the top"] = 0.0
    # evaluation and output
    eval_every: Annotated[int, "steps between validations; 0 = only at start and end, -1 = never"] = 150
    eval_tokens: Annotated[int, "tokens of validation rows, always the same"] = 524288
    save_every: Annotated[int, "steps between checkpoints; 0 = only at the end, -1 = never"] = 500
    keep_last: Annotated[int, "checkpoints kept"] = 2
    log_every: Annotated[int, "steps between printed lines where there is no terminal"] = 10
    resume: Annotated[bool, "go on from the newest whole checkpoint of this model_tag"] = False
    dry_run: Annotated[bool, "write no checkpoint and no report"] = False
    run: Annotated[str, "name of the run for the tracker; dummy = no tracking"] = "dummy"
    track: Annotated[Literal["none", "wandb", "trackio"], "tracker"] = "none"
    # the machine
    device: Annotated[str, "cpu, cuda, mps; empty = the best there is"] = ""
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], "multiplication dtype; auto = bfloat16 where native"] = (
        "auto"
    )
    kernels: Annotated[Literal["auto", "fast", "reference"], "which implementations run"] = "auto"
    compile: Annotated[bool, "torch.compile the model (pays on GPUs)"] = False
    seed: Annotated[int, "of the order of the conversations"] = 42

    def __post_init__(self) -> None:
        if self.num_iterations <= 0 and not self.num_epochs > 0:
            raise ValueError("nothing says how long to train: set --num_iterations or --num_epochs > 0")
        if self.init_lr_frac <= 0:
            raise ValueError(f"init_lr_frac={self.init_lr_frac}: expected more than 0, 1 = the rates as they are")
        check_training(self)
        if self.target_examples_per_step is not None and self.target_examples_per_step < 1:
            raise ValueError(f"target_examples_per_step={self.target_examples_per_step}: expected 1 or more")
        if self.total_batch_size is not None and self.target_examples_per_step is not None:
            raise ValueError("total_batch_size and target_examples_per_step both say how large a step is: give one")

    def names(self, mixtures: dict[str, list[str]], default: Sequence[str]) -> list[str]:
        """The tasks to train on; a file of --identity takes the place of the embedded identity."""
        names = [part for name in self.tasks or default for part in mixtures.get(name, [name])]
        if self.identity:
            names = [name for name in names if name.partition(":")[0] != "Identity"] + [self.identity]
        return names


def inherit(
    cfg: Any, trained: dict[str, Any], keys: Sequence[str] = RATES, name: str = "the checkpoint"
) -> dict[str, Any]:
    """Those of the keys that cfg leaves open, from the configuration a checkpoint was trained with; name: of it.

    UserError for a key that is not there either."""
    missing = [key for key in keys if getattr(cfg, key) is None]
    for key in missing:
        if key not in trained:
            raise UserError(f"{name} does not say with which {key} it was trained: give --{key}")
    return {key: trained[key] for key in missing}


def _short(value: Any) -> str:
    """A value on one line; a pattern as runs, 12 attn + 8 mamba."""
    if not isinstance(value, list):
        return repr(value)
    runs: list[list[Any]] = []
    for entry in map(str, value):
        if runs and runs[-1][1] == entry:
            runs[-1][0] += 1
        else:
            runs.append([1, entry])
    text = " + ".join(f"{n} {entry}" for n, entry in runs)
    return text if len(text) <= 80 else f"{text[:77]}..."
