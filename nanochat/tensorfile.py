"""The bytes of one checkpoint file: safetensors for tensors, JSON for the rest. Nothing here knows folders or ranks.

write_file(path, safetensors_bytes(tensors)) -> {"size", "sha256"}        read_tensors(path, "cpu") -> tensors
value, tensors = pack(state)                                              unpack(value, tensors) -> state
"""

import hashlib
import json
import os
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

DTYPES = {  # as the safetensors format spells them
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write and fsync a new file -> {"size", "sha256"}, the hash taken from the bytes before they reach the disk."""
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as f:
        for chunk in chunks:
            f.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        f.flush()
        os.fsync(f.fileno())
    return {"size": size, "sha256": digest.hexdigest()}


def safetensors_bytes(tensors: dict[str, Tensor]) -> Iterator[bytes | memoryview]:
    """A safetensors file, tensor by tensor: 8 bytes of header length, JSON header, data. Strides become contiguous.

    Written here and not by the library so that a full disk is an OSError, the hash needs no second reading and only one
    tensor of a GPU is on the host at a time. Tied tensors (same memory, shape and strides) are stored once; the header
    lists their other names and read_tensors ties them again. Other overlaps of memory become separate copies.
    ValueError for what has no such form: sharded, sparse, meta or other special tensors.
    """
    kept, aliases = _tied(tensors)
    header: dict[str, Any] = {"__metadata__": {"aliases": json.dumps(aliases)}}
    end = 0
    for name in kept:
        start, end = end, end + nbytes(tensors[name])
        header[name] = {
            "dtype": DTYPES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data starts at a multiple of 8
    yield len(text).to_bytes(8, "little") + text
    for name in kept:
        yield tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _tied(tensors: dict[str, Tensor]) -> tuple[list[str], dict[str, str]]:
    """(names to store in order of storing, {other name: stored name})."""
    kept: list[str] = []
    aliases: dict[str, str] = {}
    seen: dict[Any, str] = {}
    for name in sorted(tensors, key=lambda k: (-tensors[k].element_size(), k)):  # widest first keeps all data aligned
        t = tensors[name]
        plain = type(t) in (Tensor, torch.nn.Parameter) and t.layout == torch.strided and not t.is_meta
        if not plain or t.dtype not in DTYPES:
            raise ValueError(
                f"{name} is a {type(t).__name__} of {t.dtype} on {t.device}: expected a whole, dense tensor"
            )
        first = seen.setdefault((t.device, t.data_ptr(), t.dtype, t.shape, t.stride()), name) if t.numel() else name
        if first == name:
            kept.append(name)
        else:
            aliases[name] = first
    return kept, aliases


def read_tensors(path: Path, device: str) -> dict[str, Tensor]:
    """name -> tensor; on the CPU the pages of the file are mapped copy-on-write and read when first touched."""
    with safe_open(path, framework="pt", device=device) as f:
        tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (not a dict)
        aliases = json.loads((f.metadata() or {}).get("aliases", "{}"))
    return tensors | {name: tensors[stored] for name, stored in aliases.items()}


def nbytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


def json_text(value: Any, what: str) -> str:
    """ValueError naming `what` where the value has no JSON form."""
    try:
        return json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    except (TypeError, ValueError) as e:
        raise ValueError(f"{what} must hold JSON values only: {e}") from e


def pack(state: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """Nested dicts, lists and tuples of JSON values, numpy arrays and tensors -> (JSON value, tensors it refers to)."""
    tensors: dict[str, Tensor] = {}
    return _pack(state, tensors, "state"), tensors


def _pack(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    if isinstance(value, dict):
        if bad := [k for k in value if not isinstance(k, str) or k.startswith("__")]:
            raise ValueError(f"{where} has the key {bad[0]!r}: keys must be strings that do not start with __")
        return {k: _pack(v, tensors, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        items = [_pack(v, tensors, f"{where}.{i}") for i, v in enumerate(value)]
        return items if isinstance(value, list) else {"__tuple__": items}
    if isinstance(value, Tensor | np.ndarray):
        key = f"{len(tensors)} {where}"
        tensors[key] = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value, order="C"))
        return {"__tensor__" if isinstance(value, Tensor) else "__array__": key}
    if isinstance(value, np.bool_ | np.integer | np.floating):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"{where} is a {type(value).__name__}: a checkpoint holds JSON values, numpy arrays and tensors")


def unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of pack, except that numpy scalars come back as plain numbers."""
    if isinstance(value, list):
        return [unpack(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if "__tuple__" in value:
        return tuple(unpack(v, tensors) for v in value["__tuple__"])
    if "__tensor__" in value:
        return tensors[value["__tensor__"]]
    if "__array__" in value:
        return tensors[value["__array__"]].numpy()
    return {k: unpack(v, tensors) for k, v in value.items()}


def rng_state() -> dict[str, Any]:
    """The state of every global random generator of this process, in a form that pack takes."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_rng(state: dict[str, Any]) -> None:
    """Set what rng_state() returned. The CUDA part is left out where this or the saving machine has no GPU."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
