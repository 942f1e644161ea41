"""The device, the compute dtype and the ranks of a run: the only place that asks torch what this machine can do."""

import atexit
import contextlib
import ctypes
import datetime
import gc
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from nanochat.common import cpu_flags, cpu_has_bf16, error_exits
from nanochat.config import UserError

# Dense bf16 peak of one device in FLOP/s, from the vendors' data sheets (without sparsity), for MFU.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12, "3090": 71e12}


LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "imed out waiting")  # gloo's words
GO_ON = "start the job again with --resume to go on from its newest checkpoint"

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """This process among the torchrun processes."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @property
    def main(self) -> bool:
        return self.rank == 0


def pick_device(name: str = "") -> torch.device:
    """'' = cuda where there is one, else mps, else cpu. An explicit device that is absent is an error."""
    if not name:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name!r} is no torch device: use cpu, cuda, cuda:1 or mps") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {name!r} was asked for, but torch sees no CUDA device: use --device=cpu")
    return device


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """'auto' = bfloat16 where the device multiplies it natively (GPUs, CPUs with AVX-512 BF16 or AMX), else float32."""
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise UserError(f"dtype={name!r}: expected auto, {' or '.join(DTYPES)}")
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if device.type == "cpu" and cpu_has_bf16() else torch.float32


def describe_device(device: torch.device, dtype: torch.dtype) -> str:
    """One line for the start of a run: device, dtype and why."""
    short = str(dtype).removeprefix("torch.")
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {short}"
    if device.type != "cpu":
        return f"{device.type}, {short}"
    found = sorted({"avx2", "avx512f", "avx512_bf16", "amx_bf16"} & cpu_flags())
    return f"cpu, {torch.get_num_threads()} threads, {short} ({', '.join(found) or 'no vector extensions known'})"


def init_ranks(device: torch.device) -> tuple[Ranks, torch.device]:
    """Join the torchrun job if there is one: nccl on GPUs, gloo elsewhere. Returns this rank and its own device."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return Ranks(), device
    ranks = Ranks(int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0")), world_size)
    if device.type == "cuda":
        device = torch.device("cuda", ranks.local_rank)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=10))
        _prepare_end(ranks, backend)
    return ranks, device


def _prepare_end(ranks: Ranks, backend: str) -> None:
    """What becomes of this rank when it fails, when it is told to stop, and when torchrun is no more.

    With NCCL, destroy_process_group waits for ranks that wait in a collective for this one (pytorch #122358), and
    torchrun learns of the failure when NCCL's watchdog has lost its patience, after ten minutes; so the process just
    ends. And what waits for a GPU runs no signal handler of Python's.
    """
    nccl = backend == "nccl"
    if nccl:
        error_exits.append(_end_at_once)
    atexit.register(_abandon_ranks)
    signal.signal(signal.SIGTERM, lambda *_: _told_to_stop(ranks))
    if sys.platform == "linux":  # a torchrun that is killed cannot end its ranks: PR_SET_PDEATHSIG of prctl(2) does
        ctypes.CDLL(None).prctl(1, signal.SIGKILL if nccl else signal.SIGTERM)


def _end_at_once(code: int) -> None:
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _told_to_stop(ranks: Ranks) -> None:
    """torchrun ends the ranks that are left with SIGTERM when one of them fails: say so, then end as before."""
    text = f"error: rank {ranks.rank} was told to stop, as when another rank has failed: {GO_ON}\n"
    os.write(2, text.encode())  # print() may be what was interrupted
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)


def single_device(name: str, what: str) -> torch.device:
    """The device of what runs in one process; UserError where torchrun has started several."""
    ranks, device = init_ranks(pick_device(name))
    if ranks.world_size > 1:
        raise UserError(f"{what} runs in one process, not {ranks.world_size}: start it without torchrun")
    return device


@contextlib.contextmanager
def lost_ranks(ranks: Ranks) -> Iterator[None]:
    """Turn what torch raises where another rank has gone or is silent into one line."""
    try:
        yield
    except RuntimeError as e:
        if ranks.world_size == 1 or not (isinstance(e, dist.DistError) or any(text in str(e) for text in LOST)):
            raise
        said = re.sub(r"^\[\S+\] ", "", str(e)).splitlines()[0].split(". ")[0]  # without the place in torch's source
        raise UserError(f"rank {ranks.rank} has lost another rank ({said}): {GO_ON}") from e


def leave_ranks() -> None:
    """End the torchrun job together: a rank that goes while others still talk to it aborts them."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        gc.collect()  # a finished gloo work left to the interpreter's exit aborts about one exit in four


def _abandon_ranks() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def all_reduce_sum(value: torch.Tensor) -> torch.Tensor:
    """Sum over ranks in place; a no-op in a single process."""
    if dist.is_initialized():
        dist.all_reduce(value, op=dist.ReduceOp.SUM)
    return value


def shared_out(items: Sequence[Item], work: Callable[[list[Item]], list[Result]]) -> list[Result]:
    """work(items), a result for each, by all ranks together: each does every world_size-th item, all get the whole."""
    if not dist.is_initialized():
        return work(list(items))
    ranks, rank = dist.get_world_size(), dist.get_rank()
    parts: list[Any] = [None] * ranks
    dist.all_gather_object(parts, work(list(items[rank::ranks])))
    return [parts[i % ranks][i // ranks] for i in range(len(items))]


# ---- sharded models (FSDP2) ----
# torch.distributed.tensor is imported where it is used: it costs half a second, and most runs shard nothing.


def shard_model(model: nn.Module, blocks: Iterable[nn.Module], device: torch.device) -> None:
    """From here on each rank holds its rows of every parameter (rows_of), as DTensor, and gets its rows of the summed
    gradient.

    A block is put together for its own forward and backward, what is outside the blocks for the whole of them. FSDP2
    of torch.distributed.fsdp, whose idea is that of arXiv 2304.11277.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for part in (*blocks, model):
        sharded = fully_shard(part, mesh=mesh)
        sharded.set_gradient_divide_factor(1.0)  # a sum, as all_reduce_sum makes it; the average is not gloo's to make
        sharded.set_force_sum_reduction_for_comms(True)
        if device.type == "cpu":  # what the native kernels have seen as numpy cannot be freed
            sharded.set_keep_unsharded_storage(True, recurse=False)


def rows_of(rows: int, rank: int, world_size: int) -> tuple[int, int]:
    """(first, end) of a parameter's rows on a rank: equal shares rounded up, as torch cuts them, the last ones less."""
    size = -(-rows // world_size)
    return min(rank * size, rows), min((rank + 1) * size, rows)


def is_sharded(t: Tensor) -> bool:
    """Whether this is a DTensor."""
    return hasattr(t, "full_tensor")


def local(t: Tensor) -> Tensor:
    """The rows of a sharded tensor that are here, as a view; a plain tensor itself."""
    return t.detach().to_local() if is_sharded(t) else t  # pyrefly: ignore


def whole_tensors(tensors: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Sharded tensors put together on the CPU, one by one, plain ones as they are; {} on ranks that do not keep them.

    All ranks call it together."""
    whole = {}
    for name, t in tensors.items():
        full = t.full_tensor() if is_sharded(t) else t  # pyrefly: ignore
        if keep:
            whole[name] = full.cpu() if is_sharded(t) else full
    return whole


def load_weights(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """load_state_dict of whole tensors, of which a sharded model takes its rows."""
    own = model.state_dict()
    if any(is_sharded(t) for t in own.values()):
        tensors = {name: _rows_like(t, own[name]) if name in own else t for name, t in tensors.items()}
    model.load_state_dict(tensors)


def _rows_like(whole: Tensor, own: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(own, DTensor):
        return whole
    return distribute_tensor(whole.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Within, a sharded model is whole on every rank, so that each may use it alone. All ranks enter together."""
    parts = [m for m in model.modules() if hasattr(m, "unshard")]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)  # pyrefly: ignore
        part.unshard()  # pyrefly: ignore
    yield
    for part in parts:
        part.set_reshard_after_forward(part is not model, recurse=False)  # pyrefly: ignore
        part.reshard()  # pyrefly: ignore


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one device for MFU: the data sheet's figure on known GPUs, a measured square matmul elsewhere."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((peak for key, peak in PEAK_FLOPS.items() if key in name), 0.0)
    n = 1024
    a = torch.ones(n, n, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(20):
        start = datetime.datetime.now()
        a @ a
        best = min(best, (datetime.datetime.now() - start).total_seconds())
    return 2 * n**3 / best


def synchronize(device: torch.device) -> None:
    """Wait for queued work, so that a clock read next measures it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
