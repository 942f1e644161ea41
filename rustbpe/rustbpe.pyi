"""What Python is too slow for: byte-level BPE, BM25, and on a CPU the selective scan and the steps of decoding.

Any number of threads gives the same result.
"""

from collections.abc import Iterable, Sequence
from os import PathLike
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

def terms(texts: list[str], stem: bool, stop_words: bool) -> list[list[str]]:
    """Search terms: lower-cased runs of at least two alphanumeric characters (Unicode) and underscores.

    stop_words: without Lucene's 33 English ones. stem: by Snowball's English stemmer.
    ValueError: a text with a lone surrogate.
    """

def bm25_build(
    texts: Iterable[str], path: str | PathLike[str], stem: bool, stop_words: bool, threads: int = 1
) -> tuple[int, int, int, int]:
    """Write a BM25 index -> (texts, different terms, length of all texts in terms, pairs of text and term).

    The file is written under another name, flushed and renamed; where something fails nothing is left.
    OSError: the disk; ValueError: a text with a lone surrogate.
    """

@final
class Bm25:
    """BM25 indexes (segments) opened as one, memory-mapped. Texts are numbered through them."""

    def __new__(
        cls,
        paths: Sequence[str | PathLike[str]],
        variant: Literal["lucene", "robertson", "atire", "okapi"] = "lucene",
        k1: float = 1.5,
        b: float = 0.75,
    ) -> Bm25:
        """ValueError: a file that is missing, damaged or cut short (it is named); k1 < 0, b outside 0 to 1."""

    def __len__(self) -> int: ...
    @property
    def rules(self) -> tuple[bool, bool] | None:
        """(stem, stop_words) as it was built; None without segments."""

    def search(
        self, queries: list[str], k: int, allowed: npt.NDArray[np.bool_] | None = None, threads: int = 1
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """The best texts and their scores, (M, min(k, len(self))), best first, of equal ones the smaller number first.

        Only scores above 0; what is left of a row is -1 and -inf. allowed: (len(self),), False = passed over.
        """

    def scores(self, query: str) -> npt.NDArray[np.float32]:
        """(len(self),): the score of every text, without the shortcuts of `search`; the same to the last bit."""

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

@final
class PackedLinear:
    """A weight (N, K), laid out so that the few rows of a decoding step are multiplied as fast as it can be read.

    Sums are float32. The bits of a row do not depend on the rows beside it, nor on the number of threads.
    """

    def __new__(cls, weight: Floats | npt.NDArray[np.uint16]) -> PackedLinear:
        """weight: C-contiguous, copied; uint16 holds bits of bfloat16. ValueError: another type or shape."""

    @property
    def shape(self) -> tuple[int, int]: ...
    def __call__(self, x: Floats, *, threads: int = 1, simd: Simd | None = None) -> Floats:
        """x (M, K), C-contiguous -> x W^T, (M, N). ValueError as for the scan."""

def rms_norm(x: Floats, cos: Floats | None = None, sin: Floats | None = None, *, simd: Simd | None = None) -> Floats:
    """x (tokens, heads, K), C-contiguous -> each vector over its root mean square, then turned by its token's row.

    cos, sin: (rows, K / 2), token t takes row t % rows; halves layout. A vector's bits depend on no other vector.
    ValueError as for the scan.
    """

def attend_one(
    q: Floats,
    k: Floats | npt.NDArray[np.uint16],
    v: Floats | npt.NDArray[np.uint16],
    lengths: npt.NDArray[np.int64],
    *,
    threads: int = 1,
    simd: Simd | None = None,
) -> Floats:
    """softmax(q k^T / sqrt(K)) v of one query a row: q (B, H, K), k, v: (B, G, capacity, K), C-contiguous -> (B, H, K).

    uint16 holds bits of bfloat16.
    lengths: (B,), how many places of each row, from the first, hold a key: 1 to capacity. A row's bits depend on no
    other row. ValueError as for the scan.
    """
