"""Load a run's configuration: config files first, then `--key=value` overrides, into one frozen dataclass.

    python -m scripts.base_train configs/hybrid_d20.py --device_batch_size=16 --run my-run

A config file is plain Python assignments, run in a namespace of its own. Fields are declared once, as
`depth: Annotated[int, "layers of the model"] = 20`; `--help` prints that table. `--key value`, `--key=value`, dashes,
underscores, bare `--flag` for booleans and a bare `--` (torchrun habit) are all accepted.
"""

import ast
import difflib
import math
import runpy
import types
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

# One config file may serve several stages (an architecture for base_train, a knowledge base for rag_finetune). A key in
# a *file* that this script does not know, but another stage does, is left to that stage. On the command line it is an
# error. tests/test_config.py checks that the fields of every script are in this list.
STAGE_KEYS = frozenset(
    """
    depth aspect_ratio d_model n_head n_kv_head head_dim vocab_size max_seq_len block_pattern window_pattern window
    mlp_ratio attn_conv value_embeddings residual_scalars head_tie softcap rope_base
    mlp mamba_d_state mamba_d_conv mamba_expand mamba_use_mlp mamba2_d_state mamba2_head_dim mamba2_n_group
    gdn_head_dim gdn_expand gdn_expand_v ssm_lr doc_mask
    num_iterations target_flops target_param_data_ratio device_batch_size total_batch_size grad_clip weight_decay
    embedding_lr unembedding_lr matrix_lr scalar_lr init_lr_frac warmup_ratio warmdown_ratio final_lr_frac
    momentum run model_tag step source resume save_every keep_last eval_every eval_tokens sample_every log_every
    core_metric_every core_metric_max_per_task compile parallel dtype device device_type kernels seed track base_dir
    knowledge_base retriever_type top_k max_doc_length max_hops top_k_per_hop use_rewards max_iterations
    insert_position base_tasks task_samples num_epochs target_examples_per_step eval_steps grad_accum_steps
    reward_weight_answer reward_weight_relevance reward_weight_efficiency dry_run resume_from_step
    hf_path tasks max_per_task device_batch_tokens
    task examples_per_step resample sample_batch_size truncated normalize_std kl_coef correct_weight guard eval_examples
    max_problems num_samples temperature max_new_tokens batch_size show
    identity warm_start
    absent_share retrieved_share variants follow_ups rename chat_share eval_questions
    mode out_tag max_searches cold_start algorithm updates_per_rollout reward search_cost curriculum advance_at
    rl_lr_frac rl_grad_clip unanswerable_share
    cache chunk_tokens continuation_steps encoder_layers encoder_lr_frac entropy_weight expand gold_share kd_weight
    largest_chunks policy_labels policy_lr policy_questions question_steps questions_per_step reconstruction_chunks
    reconstruction_steps reinforce_steps supervise_steps
    """.split()  # noqa: SIM905
)


class UserError(ValueError):
    """Something the user can mend. The message is one line: what was given, what was expected, what to type."""


def load_config(cls: type[T], argv: Sequence[str] = ()) -> T:
    """Build `cls` (a frozen dataclass) from config files and overrides in argv.

    Raises UserError for an unknown key, a wrong type, an unreadable file or a combination `cls.__post_init__` refuses.
    `--help` prints every key and exits 0.
    """
    assert is_dataclass(cls), f"{cls} is not a dataclass"
    types_by_name = {f.name: _plain_type(t) for f, t in _fields(cls)}
    files, overrides = _split_argv(argv, types_by_name, cls)
    values: dict[str, Any] = {}
    for file in files:
        for key, value in _read_file(file).items():
            if key in types_by_name:
                values[key] = _check(key, value, types_by_name[key], where=str(file))
            elif key not in STAGE_KEYS:
                raise UserError(f"{file}: unknown key {key!r}{_nearest(key, set(types_by_name) | STAGE_KEYS)}")
    for key, text in overrides.items():
        values[key] = _parse(key, text, types_by_name[key])
    missing = [f.name for f, _ in _fields(cls) if _required(f) and f.name not in values]
    if missing:
        raise UserError(f"missing required key --{missing[0]}: pass --{missing[0]}=VALUE (see --help)")
    try:
        return cls(**values)  # pyrefly: ignore[bad-return]
    except ValueError as e:
        raise UserError(str(e)) from e


def check_types(cls: type, values: dict[str, Any], where: str) -> None:
    """UserError where a value has not the type of the field it is meant for."""
    hints = {f.name: _plain_type(t) for f, t in _fields(cls)}
    for key, value in values.items():
        _check(key, value, hints[key], where)


def describe_keys(cls: type) -> str:
    """The text of --help: every key with its type, default and meaning."""
    rows = []
    for f, hint in _fields(cls):
        default = "required" if _required(f) else _default(f)
        meaning = hint.__metadata__[0] if get_origin(hint) is Annotated else ""
        rows.append((f"--{f.name}", _type_name(_plain_type(hint)), str(default), meaning))
    widths = [max((len(r[i]) for r in rows), default=0) for i in range(3)]
    lines = ["  ".join([*(c.ljust(w) for c, w in zip(r, widths, strict=False)), r[3]]).rstrip() for r in rows]
    intro = (cls.__doc__ or "").strip()
    return "\n".join([intro, "", "usage: [CONFIG.py ...] [--key=value ...]", "", *lines])


def changed_keys(cfg: Any) -> str:
    """The keys of a configuration that differ from their defaults, on one line, for a report."""
    values = ((f.name, getattr(cfg, f.name), _default(f)) for f in fields(cfg))
    return ", ".join(f"{name}={value}" for name, value, default in values if value != default) or "defaults"


def _fields(cls: type) -> list[tuple[Any, Any]]:
    hints = get_type_hints(cls, include_extras=True)
    return [(f, hints[f.name]) for f in fields(cls) if f.init]


def _required(f: Any) -> bool:
    return f.default is MISSING and f.default_factory is MISSING


def _default(f: Any) -> Any:
    return f.default if f.default is not MISSING else f.default_factory()


def _plain_type(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _type_name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "|".join(str(a) for a in get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        return "|".join(_type_name(t) for t in get_args(hint))
    return "None" if hint is type(None) else getattr(hint, "__name__", str(hint))


def _nearest(key: str, known: set[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f": did you mean {close[0]!r}?" if close else " (--help lists every key)"


def _split_argv(argv: Sequence[str], known: dict[str, Any], cls: type) -> tuple[list[Path], dict[str, str]]:
    """argv -> (config files, {key: text}). A later override wins over an earlier one."""
    files: list[Path] = []
    overrides: dict[str, str] = {}
    rest = [a for a in argv if a != "--"]
    while rest:
        arg = rest.pop(0)
        if arg in ("-h", "--help"):
            print(describe_keys(cls))
            raise SystemExit(0)
        if arg.startswith("-"):
            name, has_value, text = arg.lstrip("-").partition("=")
            key = name.replace("-", "_")
            key = _short_keys(cls).get(key, key)
            if key not in known:
                raise UserError(f"unknown key --{name}{_nearest(key, set(known))}")
            if not has_value:
                if bool in _options(known[key]) and not (rest and rest[0].lower() in _BOOLS):
                    text = "true"
                elif rest:
                    text = rest.pop(0)
                else:
                    raise UserError(f"--{name} needs a value: --{name}=VALUE")
            overrides[key] = text
        elif arg.endswith(".py"):
            files.append(Path(arg))
        else:
            raise UserError(f"cannot read argument {arg!r}: config files end in .py, everything else is --key=value")
    return files, overrides


def _short_keys(cls: type) -> dict[str, str]:
    """One-letter names, declared as a class attribute `SHORT = {"p": "prompt"}` (annotated ClassVar)."""
    return getattr(cls, "SHORT", {})


def _read_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], n=1)
        raise UserError(
            f"config file {path} does not exist" + (f": did you mean {path.parent / near[0]}?" if near else "")
        )
    try:
        names = runpy.run_path(str(path))
    except (Exception, SystemExit) as e:
        line = getattr(e, "lineno", None)
        raise UserError(f"{path}{f':{line}' if line else ''}: {type(e).__name__}: {e}; mend the file") from e
    return {k: v for k, v in names.items() if not k.startswith("_") and not isinstance(v, types.ModuleType)}


_BOOLS = {"true": True, "yes": True, "1": True, "on": True, "false": False, "no": False, "0": False, "off": False}


def _parse(key: str, text: str, hint: Any) -> Any:
    """Command-line text -> value of the field's type."""
    options = sorted(_options(hint), key=lambda t: t is not type(None))  # "none" is None before it is a string
    if str in options and list in [get_origin(t) or t for t in options]:  # brackets make a list, all else is a string
        other = str if text.startswith("[") else list
        options = [t for t in options if (get_origin(t) or t) is not other]
    for t in options:
        value = _parse_one(text, t)
        if value is not _NO:
            return _finite(f"--{key}", value)
    raise UserError(f"--{key}={text}: expected {_type_name(hint)}")


_NO = object()


def _parse_one(text: str, t: Any) -> Any:
    if t is type(None):
        return None if text.lower() in ("none", "null") else _NO
    if get_origin(t) is Literal:
        return next((a for a in get_args(t) if str(a) == text), _NO)
    if t is bool:
        return _BOOLS.get(text.lower(), _NO)
    if t in (int, float):
        try:
            return t(text.replace("_", "")) if t is int else t(text)
        except ValueError:
            return _int_like(text) if t is int else _NO
    if t is str:
        return text
    if (get_origin(t) or t) in (list, tuple, dict):
        if not text.startswith(("[", "(", "{")):
            return _NO if (get_origin(t) or t) is dict else text.split(",")
        try:
            value, kind = ast.literal_eval(text), get_origin(t) or t
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return _NO
        if kind is dict:
            return value if isinstance(value, dict) and all(isinstance(k, str) for k in value) else _NO
        return kind(value) if isinstance(value, list | tuple) else _NO
    return _NO


def _finite(what: str, value: Any) -> Any:
    """No rate, share or limit is nan or infinite: with one, a training runs to its end and saves nothing but nan."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{what}={value}: expected a finite number")
    return value


def _int_like(text: str) -> Any:
    """1e6 -> 1000000, the way people type token counts."""
    try:
        value = float(text)
    except ValueError:
        return _NO
    return int(value) if value.is_integer() else _NO


def _check(key: str, value: Any, hint: Any, where: str) -> Any:
    """A value from a config file must already have the field's type (an int is fine for a float)."""
    for t in _options(hint):
        if get_origin(t) is Literal:
            if value in get_args(t):
                return value
        elif t is float and type(value) in (int, float):
            return _finite(f"{where}: {key}", float(value))
        elif t is int and type(value) is float and value.is_integer():
            return int(value)
        elif isinstance(value, get_origin(t) or t) and not (isinstance(value, bool) and t is not bool):
            return value
    raise UserError(f"{where}: {key} = {value!r} is a {type(value).__name__}, expected {_type_name(hint)}")
