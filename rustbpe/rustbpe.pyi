"""Byte-level BPE in Rust: train a vocabulary, encode with it. Any number of threads gives the same result."""

from collections.abc import Iterable
from typing import Literal, final

import numpy as np

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
