"""Layers of other libraries for scripts.bench_ops, in the sizes that a GPTConfig gives our block of the same kind.

All run in plain torch on a CPU. Packages are imported when a layer is made: none is needed by anything else here.
"""

import contextlib
import importlib
import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from nanochat.blocks import GPTConfig
from nanochat.blocks.mamba import init_dt_bias
from nanochat.blocks.mamba2 import init_decay
from nanochat.common import find_uv

PACKAGES = {"mambapy": "1.2.0", "transformers": "5.23.0", "mamba-ssm": "2.3.2.post1"}


class Mamba2Minimal(nn.Module):
    """Mamba-2 (arXiv 2405.21060) around the listing 1 of its paper, with packed projections. (B, T, D) -> (B, T, D)."""

    def __init__(self, c: GPTConfig, scan: Callable[..., Any]) -> None:
        super().__init__()
        E, N, W = c.mamba_expand * c.d_model, c.mamba2_d_state, c.mamba_d_conv
        H, self.head_dim, self.scan = E // c.mamba2_head_dim, c.mamba2_head_dim, scan
        self.sizes = (E, N, N)
        self.in_proj = nn.Linear(c.d_model, 2 * E + 2 * N + H, bias=False)
        self.conv = nn.Conv1d(E + 2 * N, E + 2 * N, W, groups=E + 2 * N, padding=W - 1)
        self.dt_bias, self.A_log, self.D_skip = (nn.Parameter(torch.ones(H)) for _ in range(3))
        init_dt_bias(self.dt_bias, torch.Generator().manual_seed(0))
        init_decay(self.A_log, torch.Generator().manual_seed(0))
        self.norm, self.out_proj = nn.RMSNorm(E), nn.Linear(E, c.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        T, (E, N, _) = x.size(1), self.sizes
        z, xbc, dt = self.in_proj(x).split((E, E + 2 * N, len(self.dt_bias)), -1)
        xbc = F.silu(self.conv(xbc.transpose(1, 2))[..., :T].transpose(1, 2)).float()
        u, B_t, C_t = xbc.split(self.sizes, -1)
        u = u.unflatten(-1, (-1, self.head_dim))  # (B, T, H, P)
        dt = F.softplus(dt.float() + self.dt_bias)
        y, _ = self.scan(u * dt[..., None], -self.A_log.exp() * dt, B_t[:, :, None], C_t[:, :, None], min(64, T))
        y = (y + self.D_skip[:, None] * u).flatten(2)  # (B, T, E)
        return self.out_proj(self.norm(y * F.silu(z)))


def mambapy(c: GPTConfig) -> nn.Module:
    m = importlib.import_module("mambapy.mamba")
    sizes = {"d_state": c.mamba_d_state, "expand_factor": c.mamba_expand, "d_conv": c.mamba_d_conv}
    return m.MambaBlock(m.MambaConfig(d_model=c.d_model, n_layers=1, **sizes, pscan=True, use_cuda=False))


def transformers_mamba(c: GPTConfig, use_mambapy: bool = False) -> nn.Module:
    m = transformers_module("mamba")
    sizes = {"state_size": c.mamba_d_state, "expand": c.mamba_expand, "conv_kernel": c.mamba_d_conv}
    config = m.MambaConfig(hidden_size=c.d_model, num_hidden_layers=1, **sizes, use_mambapy=use_mambapy)
    return m.MambaMixer(config, 0)


def transformers_mamba2(c: GPTConfig, chunk_size: int = 256) -> nn.Module:
    m = transformers_module("mamba2")
    sizes = {"state_size": c.mamba2_d_state, "expand": c.mamba_expand, "conv_kernel": c.mamba_d_conv}
    heads = {"head_dim": c.mamba2_head_dim, "num_heads": c.mamba_expand * c.d_model // c.mamba2_head_dim}
    heads["n_groups"] = c.mamba2_n_group
    config = m.Mamba2Config(hidden_size=c.d_model, num_hidden_layers=1, **sizes, **heads, chunk_size=chunk_size)
    return m.Mamba2Mixer(config, 0)


def transformers_gdn(c: GPTConfig) -> nn.Module:
    m = transformers_module("qwen3_next")
    n_head, value_dim = int(c.gdn_expand * c.d_model / c.gdn_head_dim), c.gdn_expand_v * c.gdn_head_dim
    heads = {"linear_num_key_heads": n_head, "linear_num_value_heads": n_head}
    heads |= {"linear_key_head_dim": c.gdn_head_dim, "linear_value_head_dim": value_dim}
    config = m.Qwen3NextConfig(
        hidden_size=c.d_model,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_conv_kernel_dim=c.mamba_d_conv,
        **heads,
    )
    return m.Qwen3NextGatedDeltaNet(config, 0)


def mamba2_minimal(c: GPTConfig) -> nn.Module:
    """mamba-ssm imports its CUDA extension and Triton kernels first; neither is needed here, so both are left out."""
    spec = importlib.util.find_spec("mamba_ssm")
    assert spec is not None
    kernel: Any = ModuleType("mamba_ssm.ops.triton.ssd_combined")
    kernel.mamba_chunk_scan_combined = None  # for the package's own test on a GPU
    with stand_ins({"mamba_ssm": importlib.util.module_from_spec(spec), kernel.__name__: kernel}):
        scan = importlib.import_module("mamba_ssm.modules.ssd_minimal").ssd_minimal_discrete
    return Mamba2Minimal(c, scan)


@dataclass(frozen=True)
class Peer:
    kind: str
    packages: tuple[str, ...]
    make: Callable[[GPTConfig], nn.Module]
    max_len: float = math.inf


PEERS = {
    "mambapy": Peer("mamba", ("mambapy",), mambapy),
    "transformers + mambapy": Peer("mamba", ("transformers", "mambapy"), lambda c: transformers_mamba(c, True)),
    "transformers mamba": Peer("mamba", ("transformers",), transformers_mamba, 512),
    "transformers mamba2": Peer("mamba2", ("transformers",), transformers_mamba2),
    "transformers mamba2 Q=64": Peer("mamba2", ("transformers",), lambda c: transformers_mamba2(c, 64)),
    "mamba2-minimal": Peer("mamba2", ("mamba-ssm",), mamba2_minimal),
    "transformers gdn": Peer("gdn", ("transformers",), transformers_gdn),
}


@contextlib.contextmanager
def stand_ins(modules: dict[str, ModuleType | None]) -> Iterator[None]:
    """Imports find these modules (None: nothing at all) in place of packages of that name; afterwards they are gone."""
    roots = {name.split(".")[0] for name in modules}
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in roots}
    sys.modules.update(modules)  # pyrefly: ignore
    try:
        yield
    finally:
        for name in [n for n in sys.modules if n.split(".")[0] in roots]:
            del sys.modules[name]
        sys.modules.update(before)


def transformers_module(name: str) -> Any:
    """A modeling module of transformers on its torch path: it takes kernels that need a GPU where it finds them."""
    with stand_ins({"mamba_ssm": None, "causal_conv1d": None, "fla": None}):
        module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    importlib.import_module("transformers").logging.set_verbosity_error()  # it would say that torch is slow
    return module


def install_peers(folder: Path) -> None:
    """Into a folder of their own; mamba-ssm is built without its CUDA extension, and torch stays ours."""
    uv = [find_uv(), "pip", "install", "--python", sys.executable, "--target", str(folder)]
    wanted = {name: f"{name}=={number}" for name, number in PACKAGES.items()}
    tools = ["einops", "setuptools", "wheel", "packaging", "ninja"]
    subprocess.run([*uv, wanted.pop("transformers"), *tools], check=True)
    env = {"PYTHONPATH": str(folder), "MAMBA_FORCE_BUILD": "TRUE", "MAMBA_SKIP_CUDA_BUILD": "TRUE"}
    options = ["--no-deps", "--no-build-isolation"]
    subprocess.run([*uv, *options, *wanted.values()], env={**os.environ, **env}, check=True)
