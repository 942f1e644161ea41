"""What Python is too slow for: byte-level BPE, and the selective scan on a CPU.

Any number of threads gives the same result.
"""

from collections.abc import Iterable
from typing import Literal, final

import numpy as np
import numpy.typing as npt

DEFAULT_PATTERN: str
"""GPT-4's pattern with numbers cut into at most two digits."""

def train(
    texts: Iterable[str],
    vocab_size: int,
    pattern: str = ...,
    threads: int | None = None,
    tie: Literal["smaller_ids", "greater_bytes"] = "smaller_ids",
    buffer: int = 4194304,
) -> list[tuple[bytes, int]]:
    """Tokens and their ranks: the 256 bytes (rank = value), then the merges in order. `vocab_size` counts both.

    No piece crosses the end of a text. Texts are read `buffer` bytes at a time and only the counts of different pieces
    are kept. `threads=None` takes all cores; one text is counted by one thread, so pass documents rather than one long
    string. Fewer than `vocab_size` tokens come back when no pair is left to merge. Of equally frequent pairs the one
    with the smaller ids (left, then right) is merged first; with "greater_bytes" the one with the greater bytes.
    ValueError: vocab_size below 256, a bad pattern, a text with a lone surrogate.
    """

def splitter(pattern: str) -> Literal["native", "regex"]:
    """How `pattern` will run: scanned by hand, or on the regex engine (correct, but several times slower)."""

def split(text: str, pattern: str = ...) -> list[str]:
    """The pieces of `text` that BPE works on, as training and encoding cut them."""

@final
class Encoder:
    """Encodes as tiktoken's `encode_ordinary` does: special tokens are ordinary text here."""

    def __new__(cls, mergeable_ranks: list[tuple[bytes, int]], pattern: str = ...) -> Encoder:
        """`mergeable_ranks`: what `train` returns, or `list(tiktoken_ranks.items())`."""

    def encode(self, text: str) -> list[int]: ...
    def encode_batch(self, texts: list[str], threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """(ids, offsets): text i is `ids[offsets[i]:offsets[i + 1]]`.

        ids: uint16 if every id of the vocabulary is below 65536, else uint32; flat. offsets: int64, len(texts) + 1.
        """

Floats = npt.NDArray[np.float32]
Simd = Literal["avx512", "avx2", "baseline"]

def simd_level() -> Simd:
    """The widest vectors this machine has. "baseline": what the build assumes (SSE2 on x86-64, NEON on aarch64)."""

def selective_scan_forward(
    u: Floats,
    delta: Floats,
    a: Floats,
    b: Floats,
    c: Floats,
    d: Floats | None = None,
    z: Floats | None = None,
    delta_bias: Floats | None = None,
    delta_softplus: bool = False,
    *,
    initial_state: Floats | None = None,
    resets: npt.NDArray[np.uint8] | None = None,
    lengths: npt.NDArray[np.int64] | None = None,
    keep: bool = False,
    threads: int = 1,
    simd: Simd | None = None,
) -> tuple[Floats, Floats, Floats | None]:
    """The scan of Mamba-1 (arXiv 2312.00752): out (B, T, E), the last state (B, E, N), and if `keep`, for backward.

    dt = softplus(delta + delta_bias), h = exp(dt a) h + dt u b, y = c h + d u, out = y silu(z), from h = initial_state.
    u, delta, z: (B, T, E), a: (E, N), b, c: (B, T, N), d, delta_bias: (E,), initial_state: (B, E, N), C-contiguous.
    resets: (B, T), not 0 where a document begins, which sees nothing of what came before; lengths: (B,), from this step
    on the state stays as it is. simd: None = the best of this machine.
    ValueError: an array of another type, shape or layout (it is named), or a `simd` this machine does not have.
    """

def selective_scan_backward(
    grad_out: Floats,
    grad_last: Floats | None,
    borders: Floats,
    u: Floats,
    delta: Floats,
    a: Floats,
    b: Floats,
    c: Floats,
    d: Floats | None = None,
    z: Floats | None = None,
    delta_bias: Floats | None = None,
    delta_softplus: bool = False,
    *,
    initial_state: Floats | None = None,
    resets: npt.NDArray[np.uint8] | None = None,
    lengths: npt.NDArray[np.int64] | None = None,
    threads: int = 1,
    simd: Simd | None = None,
) -> list[Floats | None]:
    """Gradients of u, delta, a, b, c, d, z, delta_bias, initial_state, in their shapes; None for what was None.

    grad_out: (B, T, E); grad_last: (B, E, N), None = 0; borders: the third of selective_scan_forward(..., keep=True)
    with the same other arguments.
    """

def selective_state_update(
    state: Floats,
    x: Floats,
    dt: Floats,
    a: Floats,
    b: Floats,
    c: Floats,
    d: Floats | None = None,
    z: Floats | None = None,
    dt_bias: Floats | None = None,
    dt_softplus: bool = False,
    *,
    threads: int = 1,
    simd: Simd | None = None,
) -> Floats:
    """One step of the scan: `state` (B, E, N) is changed in place; x, dt, z: (B, E), b, c: (B, N) -> y (B, E)."""
