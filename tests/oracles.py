"""Other libraries as oracles: the plain-torch references that mamba-ssm, causal-conv1d and transformers ship.

mamba-ssm and causal-conv1d import their CUDA extension before anything else, so on a machine without it the extensions
are replaced by empty modules while the references load. scripts/setup.sh (setup_oracles) installs both without CUDA.
"""

import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace

import pytest

EXTENSIONS = ("selective_scan_cuda", "causal_conv1d_cuda")
PACKAGES = ("mamba_ssm", "causal_conv1d")


def _ours(name: str) -> bool:
    return name in EXTENSIONS or name.split(".")[0] in PACKAGES


@contextmanager
def _without_cuda() -> Iterator[None]:
    """Make the packages' submodules importable, then forget them: no other test may take the stubs for kernels.

    mamba_ssm becomes a package whose __init__ never runs: it would load every model it has (10 s, and transformers).
    """
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if _ours(name)}
    for name in EXTENSIONS:
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = types.ModuleType(name)
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is not None:
            sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        yield
    finally:
        for name in [n for n in sys.modules if _ours(n)]:
            del sys.modules[name]
        sys.modules.update(before)


def need(*packages: str) -> None:
    """Skip the test where a package is not installed."""
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    if missing:
        pytest.skip(f"oracle not installed: {', '.join(missing)} (tests/oracles.py says how)")


@cache
def mamba_ssm_ref() -> SimpleNamespace:
    """mamba_ssm's references: selective_scan_ref, selective_state_update_ref, ssd_minimal_discrete,
    ssd_chunk_scan_combined_ref. Skips the test where mamba-ssm is not installed."""
    need("mamba_ssm", "einops", "triton")
    with _without_cuda():
        scan = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
        step = importlib.import_module("mamba_ssm.ops.triton.selective_state_update")
        minimal = importlib.import_module("mamba_ssm.modules.ssd_minimal")
        ssd = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
    return SimpleNamespace(
        selective_scan_ref=scan.selective_scan_ref,
        selective_state_update_ref=step.selective_state_update_ref,
        ssd_minimal_discrete=minimal.ssd_minimal_discrete,
        ssd_chunk_scan_combined_ref=ssd.ssd_chunk_scan_combined_ref,
    )


@cache
def causal_conv1d_refs() -> SimpleNamespace:
    """causal_conv1d_ref and causal_conv1d_update_ref of causal-conv1d. Skips the test where it is not installed."""
    need("causal_conv1d")
    with _without_cuda():
        module = importlib.import_module("causal_conv1d.causal_conv1d_interface")
    return SimpleNamespace(
        causal_conv1d_ref=module.causal_conv1d_ref, causal_conv1d_update_ref=module.causal_conv1d_update_ref
    )


@cache
def gated_delta_rule_refs() -> SimpleNamespace:
    """torch_chunk_gated_delta_rule and torch_recurrent_gated_delta_rule of transformers' Qwen3-Next (the recurrence of
    arXiv 2412.06464). Skips the test where transformers is not installed."""
    need("transformers")
    module = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
    return SimpleNamespace(
        torch_chunk_gated_delta_rule=module.torch_chunk_gated_delta_rule,
        torch_recurrent_gated_delta_rule=module.torch_recurrent_gated_delta_rule,
    )
