"""Checkpoints that survive kill -9, a full disk and damaged files: written whole or not at all, hashed, last K kept.

    <base dir>/base_checkpoints/d20/step_000100/model.safetensors               weights
                                               /optim_rank0.safetensors         optimizer tensors of each rank
                                               /state_rank0.{json,safetensors}  loader cursor and RNG of each rank
                                               /meta.json                       configs, tokenizer hash, kernels, git
                                               /manifest.json                   size and sha256 of every file above

How a step folder appears, and what a kill may leave, is in stepfolder.py; what a file holds in tensorfile.py.
"""

import contextlib
import difflib
import errno
import os
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.common import base_dir, fsync_dir, git_state, raise_disk_error, read_json
from nanochat.config import UserError
from nanochat.device import pick_dtype
from nanochat.gpt import GPT, GPTConfig
from nanochat.stepfolder import (
    Files,
    clear_leftovers,
    drop_older,
    folder_of,
    folders,
    good_step_hint,
    list_steps,
    locked,
    manifest_text,
    newest,
    newest_whole,
    read_manifest,
    step_name,
    swap_in,
    verify,
)
from nanochat.tensorfile import (
    json_text,
    nbytes,
    pack,
    read_tensors,
    restore_rng,
    rng_state,
    safetensors_bytes,
    unpack,
    write_file,
)
from nanochat.tokenizer import Tokenizer

__all__ = [
    "SOURCES",
    "Checkpoint",
    "checkpoint_dir",
    "checkpoint_meta",
    "list_steps",
    "load_checkpoint",
    "load_model",
    "newest_whole",
    "restore_rng",
    "rng_state",
    "save_checkpoint",
    "tag_of",
    "verify",
]

SOURCES = ("base", "mid", "sft", "rag", "refrag", "rl")
OLD_NAMES = {"chatsft": "sft", "chatrl": "rl"}  # as nanochat spells them
MODEL_FILES = ("meta.json", "model.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """What load_checkpoint read. A part that was not wanted, or that this rank never saved, is None.

    Of a checkpoint saved by another number of ranks, `optim` holds the tensors of all of them.
    """

    step: int
    model: dict[str, Tensor] | None
    optim: dict[str, Tensor] | None
    states: list[dict[str, Any]]  # this rank's, or, saved by another number of ranks, that of each of them
    meta: dict[str, Any]

    @property
    def state(self) -> dict[str, Any] | None:
        """This rank's, or that of rank 0 where another number of ranks saved."""
        return self.states[0] if self.states else None


def checkpoint_dir(source: str, model_tag: str) -> Path:
    """<base dir>/<source>_checkpoints/<model_tag>. UserError for an unknown source, or a tag that is a path."""
    if not model_tag or model_tag.startswith(".") or Path(model_tag).name != model_tag:
        raise UserError(f"model_tag={model_tag!r}: expected a plain folder name such as d20")
    return _source_dir(source) / model_tag


def _source_dir(source: str) -> Path:
    source = OLD_NAMES.get(source, source)
    if source not in SOURCES:
        raise UserError(f"source={source!r}: expected one of {', '.join(SOURCES)}{_nearest(source, SOURCES)}")
    return base_dir() / f"{source}_checkpoints"


def _nearest(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


# ---- what meta.json holds ----


def checkpoint_meta(
    model: GPT, tokenizer: Tokenizer, cfg: Any, start: tuple[str, str, int] | None = None
) -> dict[str, Any]:
    """The meta of a stage's checkpoints. start: (stage, model_tag, step) of the checkpoint it went on from."""
    meta = {
        "model_config": asdict(model.config),
        "train_config": asdict(cfg),
        "tokenizer_hash": tokenizer.hash,
        "kernels": model.kernels.reason,
        "git": git_state(),
    }
    return meta if start is None else meta | {"source": dict(zip(("stage", "model_tag", "step"), start, strict=True))}


def tag_of(meta: dict[str, Any]) -> str:
    """The model_tag of the run that saved it; where none was given, as base_train names it."""
    return meta.get("train_config", {}).get("model_tag") or f"d{meta['model_config']['n_layer']}"


# ---- saving ----


def save_checkpoint(
    directory: Path,
    step: int,
    *,
    model: dict[str, Tensor],
    optim: dict[str, Tensor] | None,
    state: dict[str, Any],
    meta: dict[str, Any],
    rank: int = 0,
    world_size: int = 1,
    keep_last: int = 2,
) -> Path:
    """Write <directory>/step_NNNNNN and return it. Of the steps up to this one, the newest `keep_last` remain.

    Every rank calls it together. `model` and `meta` (JSON values) are taken from rank 0; `optim` and `state` (nested
    dicts, lists and tuples of JSON values, numpy arrays and tensors) are this rank's own. When one rank cannot write,
    every rank gets a UserError; the failed save leaves nothing behind and earlier checkpoints are as they were.
    """
    if keep_last < 1:
        raise UserError(f"keep_last={keep_last}: at least 1 checkpoint must remain")
    if world_size > 1 and not dist.is_initialized():
        raise ValueError(f"world_size={world_size}, but torch.distributed is not initialised: call init_ranks first")
    directory, target = Path(directory), Path(directory) / step_name(step)
    tmp = directory / f".tmp-{target.name}"
    meta_text = json_text({**meta, "step": step, "world_size": world_size}, "meta")
    packed, state_tensors = pack(state)
    texts = {f"state_rank{rank}.json": json_text(packed, "state")}
    tensors = {f"state_rank{rank}.safetensors": state_tensors}
    tensors |= {"model.safetensors": model} if rank == 0 else {}
    tensors |= {f"optim_rank{rank}.safetensors": optim} if optim is not None else {}
    need = sum(nbytes(t) for group in tensors.values() for t in group.values())

    with contextlib.ExitStack() as held, contextlib.ExitStack() as on_error:

        def prepare() -> None:
            directory.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(directory))
            clear_leftovers(directory)
            tmp.mkdir()
            on_error.callback(shutil.rmtree, tmp, ignore_errors=True)

        def write_own() -> Files:
            if not tmp.is_dir():
                raise UserError(f"{tmp}, made by rank 0, is not here: all hosts must share the disk of {directory}")
            if need > shutil.disk_usage(tmp).free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            made = {name: write_file(tmp / name, safetensors_bytes(group)) for name, group in tensors.items()}
            return made | {name: write_file(tmp / name, [text.encode()]) for name, text in texts.items()}

        def commit() -> None:
            files["meta.json"] = write_file(tmp / "meta.json", [meta_text.encode()])
            write_file(tmp / "manifest.json", [manifest_text(step, time.time(), files).encode()])
            fsync_dir(tmp)
            swap_in(tmp, target)
            drop_older(directory, step, keep_last)

        def everywhere(work: Callable[[], Any]) -> list[Any]:
            return _all_ranks(world_size, work, _disk_errors(directory, need))

        everywhere(prepare if rank == 0 else _nothing)
        files: Files = {name: made for own in everywhere(write_own) for name, made in own.items()}
        everywhere(commit if rank == 0 else _nothing)
        on_error.pop_all()
    return target


def _nothing() -> None:
    """What the other ranks do while rank 0 works."""


def _all_ranks(world_size: int, work: Callable[[], Any], context: contextlib.AbstractContextManager) -> list[Any]:
    """Run work() within context, wait for every rank, return all results in order. One failure is raised everywhere."""
    result, error = None, None
    try:
        with context:
            result = work()
    except Exception as e:
        error = e  # raised below, after the other ranks have been told
    own = (result, None if error is None else str(error))
    results: list[Any] = [own] * world_size
    if world_size > 1:
        dist.all_gather_object(results, own)
    if error is not None:
        raise error
    for rank, (_, message) in enumerate(results):
        if message is not None:
            raise UserError(f"rank {rank}: {message}")
    return [result for result, _ in results]


@contextlib.contextmanager
def _disk_errors(directory: Path, need: int) -> Iterator[None]:
    """A full or read-only disk becomes a UserError with folder, bytes needed and the newest good step."""
    try:
        yield
    except OSError as e:
        try:
            raise_disk_error(e, directory)
        except UserError as plain:
            there = next(p for p in (directory, *directory.parents) if p.exists())
            room = f"this part of the checkpoint needs {need:,} bytes, {shutil.disk_usage(there).free:,} are free"
            raise UserError(f"{plain}; {room}; {good_step_hint(directory)}") from e


# ---- loading ----


def load_checkpoint(
    directory: Path,
    step: int | None = None,
    *,
    rank: int = 0,
    world_size: int | None = None,
    any_ranks: bool = False,
    device: str | torch.device = "cpu",
    want: Collection[str] = ("model", "optim", "state"),
) -> Checkpoint:
    """Read a step (default: the newest whole one) after checking its hashes. `state` always lies on the CPU.

    world_size: when given, the checkpoint must have been saved by as many ranks, unless any_ranks; with more than one,
    all ranks call together and rank 0 picks the step. UserError for a step that is absent or damaged, with the newest
    good one.
    """
    directory = Path(directory)
    if unknown := set(want) - {"model", "optim", "state"}:
        raise ValueError(f"want={sorted(unknown)}: expected some of model, optim, state")
    if step is None:
        step = _agreed_newest(directory, rank, world_size or 1)  # every file hashed
    else:
        verify(directory, step, None if any_ranks else ["meta.json", *(n for p in want for n in _files_of(p, rank))])
    folder = folder_of(directory, step)
    meta, saved = read_json(folder / "meta.json"), read_manifest(folder)["files"]
    ranks = [rank]
    if world_size is not None and world_size != meta["world_size"]:
        if not any_ranks:
            raise UserError(
                f"{folder} was saved by {meta['world_size']} processes, this run has {world_size}: "
                f"start it with torchrun --nproc_per_node={meta['world_size']}"
            )
        ranks = list(range(meta["world_size"]))

    def tensors(part: str, rank: int, device: str) -> dict[str, Tensor] | None:
        name = _files_of(part, rank)[-1]
        return read_tensors(folder / name, device) if part in want and name in saved else None

    optims = [t for r in ranks if (t := tensors("optim", r, str(device))) is not None]
    packed = [(_files_of("state", r)[0], t) for r in ranks if (t := tensors("state", r, "cpu")) is not None]
    return Checkpoint(
        step,
        tensors("model", rank, str(device)),
        {name: t for optim in optims for name, t in optim.items()} if optims else None,
        [unpack(read_json(folder / name), t) for name, t in packed],
        meta,
    )


def _files_of(part: str, rank: int) -> list[str]:
    """The files of a part of a checkpoint, the one with its tensors last."""
    if part == "model":
        return ["model.safetensors"]
    return [f"state_rank{rank}.json"] * (part == "state") + [f"{part}_rank{rank}.safetensors"]


def _agreed_newest(directory: Path, rank: int, world_size: int) -> int:
    chosen = [newest_whole(directory) if rank == 0 or world_size == 1 else None]
    if world_size > 1:
        dist.broadcast_object_list(chosen, src=0)
    if chosen[0] is None:
        found = "no whole checkpoint" if list_steps(directory) else "no checkpoint"
        raise UserError(f"{found} in {directory}: train without --resume, or check --source and --model_tag")
    return chosen[0]


def load_model(
    source: str,
    device: str | torch.device,
    model_tag: str | None = None,
    step: int | None = None,
    *,
    dtype: str = "auto",
    kernels: str = "auto",
) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """The model of a stage in eval mode, its tokenizer and its meta. Default: the tag saved last, its newest step.

    UserError where the tokenizer is not the one the model was trained with, or the config or weights do not fit.
    """
    folder = _pick(source, model_tag, step)
    meta = read_json(folder / "meta.json")
    tokenizer = Tokenizer.load()
    if meta.get("tokenizer_hash") != tokenizer.hash:
        raise UserError(
            f"{folder} was trained with tokenizer {str(meta.get('tokenizer_hash'))[:12]}, but "
            f"{base_dir() / 'tokenizer'} is {tokenizer.hash[:12]}: restore that tokenizer, or train again with this one"
        )
    model = _build(meta, folder, str(device))
    model.set_compute(pick_dtype(dtype, torch.device(device)), kernels)
    return model, tokenizer, meta


def _pick(source: str, model_tag: str | None, step: int | None) -> Path:
    """The step folder to load a model from, its files checked. The choice is printed where there were several tags."""
    root = _source_dir(source)
    tags = sorted((p for p in root.glob("*/") if folders(p)), key=_saved_at, reverse=True)
    names = [p.name for p in tags]
    if model_tag is not None:
        tags = [checkpoint_dir(source, model_tag)]
    for directory in tags:
        if not folders(directory):
            hint = f"{', '.join(names) or 'nothing yet'}{_nearest(model_tag or '', names)}"
            raise UserError(f"no checkpoint in {directory}: trained tags of {source}: {hint}")
        if step is not None:
            verify(directory, step, MODEL_FILES)
        found = newest(directory, MODEL_FILES, tell=True) if step is None else step
        if found is None:
            continue
        if len(tags) > 1:
            print(f"{source}: model_tag {directory.name}, saved last of {', '.join(sorted(names))}", file=sys.stderr)
        return folder_of(directory, found)
    raise UserError(f"no whole checkpoint in {tags[0] if tags else root}: train that stage, or check --source")


def _saved_at(directory: Path) -> float:
    """When the newest step was saved; 0 where its manifest cannot be read."""
    try:
        return read_manifest(list(folders(directory).values())[-1])["saved_at"]
    except UserError:
        return 0.0


def _build(meta: dict[str, Any], folder: Path, device: str) -> GPT:
    """A GPT in eval mode around the stored weights, without a second copy of them."""
    config, known = meta.get("model_config"), {f.name for f in fields(GPTConfig)}
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'meta.json'} has no model_config: no training script saved it")
    if unknown := sorted(set(config) - known):
        raise UserError(
            f"{folder} has the model_config key {unknown[0]!r}, which this version does not know"
            f"{_nearest(unknown[0], known)}: load it with the version that saved it (git: {meta.get('git')})"
        )
    with torch.device("meta"):
        model = GPT(GPTConfig(**config))
    try:
        model.load_state_dict(read_tensors(folder / "model.safetensors", device), strict=True, assign=True)
    except RuntimeError as e:
        raise UserError(f"{folder}: weights and model_config do not fit: {' '.join(str(e).split())[:400]}") from e
    if left := [name for name, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]:
        raise UserError(f"{folder} holds no value for {left[0]}: a block must keep its buffers in its state_dict")
    return model.eval()
