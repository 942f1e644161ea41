"""Text to ids and back: byte-level BPE trained by rustbpe, with nanochat's special tokens and ours after the merges.

    tokenizer = Tokenizer.load()                    # <base dir>/tokenizer/tokenizer.json, made by scripts.tok_train
    ids = tokenizer.encode("Hello", prepend="<|bos|>")

Short texts are encoded by tiktoken, lists and long texts by rustbpe.Encoder; both give the same ids (tested). tiktoken
takes 5 s for 10 MB of one letter and its regex overflows on a million spaces, so it never sees long text.

Round trip: decode(encode(s)) == s for every str. A surrogate (half a UTF-16 pair, as broken JSON brings them) is kept
as its three bytes of "surrogatepass" UTF-8, each a single-byte id; tiktoken by itself would turn it into U+FFFD.
"""

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

import numpy as np
import rustbpe
import tiktoken

from nanochat import conversation as chat
from nanochat.common import base_dir, read_json, write_json
from nanochat.config import UserError

if not hasattr(rustbpe, "Encoder"):  # the source folder ./rustbpe imports as an empty namespace package
    raise ImportError("the Rust extension rustbpe is not built: run `uv pip install ./rustbpe`")

# nanochat's nine in its order, then ours: a model's special ids are vocab_size - 18 + position in this list.
SPECIAL_TOKENS = [
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
    "<|search_start|>",
    "<|search_end|>",
    "<|info_start|>",
    "<|info_end|>",
    "<|doc|>",
    "<|chunk|>",
    "<|cite_start|>",
    "<|cite_end|>",
    "<|abstain|>",
]
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
MAX_VOCAB_SIZE = 2**32 - 1  # ids are uint32
LONG_TEXT = 100_000  # characters from which rustbpe encodes a single text
FORMAT = 1
FILE_NAME = "tokenizer.json"
SURROGATES = re.compile("([\ud800-\udfff]+)")
CURE = "make one with `python -m scripts.tok_train`"


class Tokenizer:
    """ids 0..n-1 are the tokens of `ranks` (bytes -> rank), the special tokens follow in their order."""

    def __init__(self, ranks: Mapping[bytes, int], pattern: str, special_tokens: Sequence[str] = SPECIAL_TOKENS):
        """ValueError where the ranks are not 0..n-1, a single byte is missing or the pattern is no regex."""
        self.tokens = sorted(ranks, key=ranks.__getitem__)  # list of bytes by id
        if [ranks[t] for t in self.tokens] != list(range(len(ranks))):
            raise ValueError("ranks must be 0..n-1, each once")
        if any(bytes([b]) not in ranks for b in range(256)):
            raise ValueError("ranks must hold all 256 single bytes, or some text could not be encoded")
        if len(set(special_tokens)) != len(special_tokens):
            raise ValueError("special_tokens must differ from each other")
        self.pattern = pattern
        self.special_tokens = list(special_tokens)
        self.special_ids = {name: len(ranks) + i for i, name in enumerate(special_tokens)}
        self.vocab_size = len(ranks) + len(special_tokens)
        self._byte_ids = [ranks[bytes([b])] for b in range(256)]
        self._tiktoken = tiktoken.Encoding(
            "nanochat", pat_str=pattern, mergeable_ranks=dict(ranks), special_tokens=self.special_ids
        )

    @classmethod
    def from_ranks(
        cls, ranks: Mapping[bytes, int], pattern: str, special_tokens: Sequence[str] = SPECIAL_TOKENS
    ) -> "Tokenizer":
        """A tokenizer of someone else's vocabulary and pattern, our special tokens after its last rank."""
        return cls(ranks, pattern, special_tokens)

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        pattern: str = rustbpe.DEFAULT_PATTERN,
        threads: int | None = None,
    ) -> "Tokenizer":
        """Learn merges from texts. vocab_size counts the special tokens, as in nanochat.

        A small corpus may run out of pairs to merge: the result's `vocab_size` is then smaller than asked for.
        """
        check_vocab_size(vocab_size)
        if isinstance(texts, str):
            raise TypeError("train takes an iterable of texts, not one str: pass [text]")
        ranks = rustbpe.train(
            _without_surrogates(texts), vocab_size - len(SPECIAL_TOKENS), pattern=pattern, threads=threads
        )
        return cls(dict(ranks), pattern)

    @classmethod
    def load(cls, dir: Path | str | None = None) -> "Tokenizer":
        """Read <dir>/tokenizer.json (default <base dir>/tokenizer), check its hash. UserError where it is not whole."""
        path = Path(dir or base_dir() / "tokenizer") / FILE_NAME
        if not path.is_file():
            raise UserError(f"tokenizer {path} does not exist: {CURE}, or set NANOCHAT_BASE_DIR to where it is")
        data = read_json(path, "tokenizer")
        if isinstance(data, dict) and data.get("format", FORMAT) != FORMAT:
            raise UserError(f"tokenizer {path} has format {data['format']!r}, this version reads {FORMAT}: {CURE}")
        try:
            tokens = [base64.b64decode(t, validate=True) for t in data["tokens"]]
            tokenizer = cls({t: i for i, t in enumerate(tokens)}, data["pattern"], data["special_tokens"])
            whole = tokenizer.hash == data["sha256"]
        except (KeyError, TypeError, AttributeError, binascii.Error, ValueError) as e:
            raise UserError(f"tokenizer {path} is damaged ({type(e).__name__}: {e}): restore it, or {CURE}") from e
        if not whole:
            raise UserError(f"tokenizer {path} is damaged (its sha256 does not match): restore it, or {CURE}")
        return tokenizer

    def save(self, dir: Path | str) -> Path:
        """Write <dir>/tokenizer.json, atomically; returns its path."""
        path = Path(dir) / FILE_NAME
        write_json(path, {"format": FORMAT, **self._content(), "sha256": self.hash})
        return path

    def _content(self) -> dict[str, Any]:
        tokens = [base64.b64encode(t).decode("ascii") for t in self.tokens]
        return {"pattern": self.pattern, "special_tokens": self.special_tokens, "tokens": tokens}

    @cached_property
    def hash(self) -> str:
        """sha256 of vocabulary, pattern and special tokens: two tokenizers with the same hash give the same ids."""
        return hashlib.sha256(json.dumps(self._content()).encode()).hexdigest()

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """(V,) int32: UTF-8 bytes of each id, 0 for special tokens. Bits per byte divides by this."""
        return np.array([len(t) for t in self.tokens] + [0] * len(self.special_tokens), dtype=np.int32)

    @cached_property
    def _encoder(self) -> Any:
        return rustbpe.Encoder([(t, i) for i, t in enumerate(self.tokens)], self.pattern)

    @property
    def bos_id(self) -> int:
        return self.encode_special("<|bos|>")

    def encode_special(self, name: str) -> int:
        """The id of a special token by its spelling; ValueError for a name that is none."""
        if name not in self.special_ids:
            raise ValueError(f"{name!r} is not a special token of this tokenizer: {' '.join(self.special_tokens)}")
        return self.special_ids[name]

    @overload
    def encode(
        self, text: str, prepend: int | str | None = None, append: int | str | None = None, threads: int = 1
    ) -> list[int]: ...

    @overload
    def encode(
        self, text: Sequence[str], prepend: int | str | None = None, append: int | str | None = None, threads: int = 1
    ) -> list[list[int]]: ...

    def encode(self, text, prepend=None, append=None, threads=1):
        """Ids of a text, or of each text of a list. Text that spells a special token is plain text.

        prepend, append: an id or the spelling of a special token, put before and after each text's ids.
        """
        head = [] if prepend is None else [self._id(prepend)]
        tail = [] if append is None else [self._id(append)]
        if isinstance(text, str):
            return [*head, *self.encode_ordinary(text), *tail]
        flat, offsets = self.encode_array(list(text), threads)
        ids, ends = flat.tolist(), offsets.tolist()
        return [[*head, *ids[a:b], *tail] for a, b in pairwise(ends)]

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of one text."""
        if _has_surrogate(text):
            return self._encode_surrogates(text)
        if len(text) < LONG_TEXT:
            return self._tiktoken.encode_ordinary(text)
        return self._encoder.encode_batch([text])[0].tolist()

    def encode_array(self, texts: list[str], threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """-> (ids of all texts in a row, uint16 or uint32; offsets (len(texts) + 1,) int64), without Python lists."""
        broken = {i: self._encode_surrogates(t) for i, t in enumerate(texts) if _has_surrogate(t)}
        if not broken:
            return self._encoder.encode_batch(texts, threads)
        flat, offsets = self._encoder.encode_batch(["" if i in broken else t for i, t in enumerate(texts)], threads)
        at = np.repeat([offsets[i] for i in broken], [len(ids) for ids in broken.values()])
        flat = np.insert(flat, at, np.concatenate([np.array(ids, flat.dtype) for ids in broken.values()]))
        added = np.zeros(len(texts) + 1, np.int64)
        for i, ids in broken.items():
            added[i + 1] = len(ids)
        return flat, offsets + added.cumsum()

    def _encode_surrogates(self, text: str) -> list[int]:
        """Surrogates become single bytes, the text between them is encoded as ever."""
        ids: list[int] = []
        for i, run in enumerate(SURROGATES.split(text)):
            if i % 2:
                ids += [self._byte_ids[b] for b in run.encode("utf-8", "surrogatepass")]
            else:
                ids += self.encode_ordinary(run)
        return ids

    def _id(self, token: int | str) -> int:
        return self.encode_special(token) if isinstance(token, str) else token

    def decode_bytes(self, ids: Any) -> bytes:
        """ids (list, array, 1-d tensor) -> bytes; special tokens come out as spelled. ValueError for an unknown id."""
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        try:
            return self._tiktoken.decode_bytes(ids)
        except (KeyError, OverflowError):
            bad = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise ValueError(f"id {bad} is outside the vocabulary (0..{self.vocab_size - 1})") from None

    def decode(self, ids: Any, errors: str | None = None) -> str:
        """ids -> text. By default exactly what was encoded, surrogates included; bytes that are no UTF-8 become U+FFFD.

        errors="replace" turns surrogates into U+FFFD too: for text a model made, on its way to a terminal or a file.
        """
        data = self.decode_bytes(ids)
        if errors is not None:
            return data.decode("utf-8", errors)
        try:
            return data.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return data.decode("utf-8", "replace")

    def render_conversation(self, conversation: Any, max_tokens: int | None = None) -> tuple[list[int], list[int]]:
        """-> (ids, mask), of equal length; mask 1 = trained on. Format and shortening: nanochat/conversation.py."""
        return chat.render(self, conversation, max_tokens)

    def render_for_completion(self, conversation: Any, max_tokens: int | None = None) -> list[int]:
        """-> ids up to and with <|assistant_start|>; a last assistant message is left out."""
        return chat.render_prompt(self, conversation, max_tokens)

    def render_documents(self, documents: list[Any], first: int = 1, max_tokens: int | None = None) -> list[int]:
        """-> ids of retrieved documents numbered from `first`, to stand between <|info_start|> and <|info_end|>."""
        return chat.render_documents(self, documents, first, max_tokens)

    def visualize(self, ids: Any, mask: Sequence[int]) -> str:
        """The tokens with | between them, green where trained on and red where not (ANSI colours)."""
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        shown = []
        for i, trained in zip(ids, mask, strict=True):
            text = self.decode([i], errors="backslashreplace")
            text = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
            shown.append(f"\033[{32 if trained else 31}m{text}\033[0m")
        return "|".join(shown)


def check_vocab_size(vocab_size: int) -> None:
    """UserError where vocab_size, which counts the special tokens, is out of range."""
    if not MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
        raise UserError(
            f"vocab_size={vocab_size}: at least {MIN_VOCAB_SIZE} (256 bytes and {len(SPECIAL_TOKENS)} special tokens), "
            f"at most {MAX_VOCAB_SIZE}; 65536 is usual"
        )


def _has_surrogate(text: str) -> bool:
    if not isinstance(text, str):
        raise TypeError(f"expected str, got {type(text).__name__}")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            return True
    return False


def _without_surrogates(texts: Iterable[str]) -> Iterator[str]:
    """Training text with U+FFFD for surrogates: they have no UTF-8, and nothing is to be learnt from them."""
    for text in texts:
        yield SURROGATES.sub("\ufffd", text) if _has_surrogate(text) else text
