"""The device, the compute dtype and the ranks of a run: the only place that asks torch what this machine can do."""

import atexit
import datetime
import gc
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from nanochat.common import cpu_flags, cpu_has_bf16
from nanochat.config import UserError

# Dense bf16 peak of one device in FLOP/s, from the vendors' data sheets (without sparsity), for MFU.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12, "3090": 71e12}


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
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
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
        atexit.register(_abandon_ranks)
    return ranks, device


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
