"""What turns texts into vectors: the static encoder trained on the base itself, a sentence-transformers model, or any
object with the three members of Encoder (nanochat/model_encoder.py makes one of our own checkpoints).
"""

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from nanochat.common import sha256_file
from nanochat.config import UserError
from nanochat.retrieval.static import StaticEncoder

Kind = Literal["query", "passage"]
WEIGHTS_AND_CONFIG = (".safetensors", ".bin", ".json", ".txt")  # files that decide what a model's vectors are


@runtime_checkable
class Encoder(Protocol):
    """Two encoders with the same fingerprint give the same vectors."""

    fingerprint: str
    dim: int

    def encode(self, texts: Sequence[str], kind: Kind = "passage") -> np.ndarray:
        """-> (n, dim) float32, rows of length 1, all 0 for a text without words.

        A query's row is bit for bit the same alone and among others.
        """
        ...


class SentenceTransformerEncoder:
    """A model of the sentence-transformers library, by folder or by name on the Hugging Face hub."""

    def __init__(self, name: str) -> None:
        self.model, folder = _load(name)
        self.dim: int = self.model.encode_query("length", show_progress_bar=False).shape[-1]
        self.fingerprint = _fingerprint(folder)

    def encode(self, texts: Sequence[str], kind: Kind = "passage") -> np.ndarray:
        """Queries one by one: in a batch, padding would change the last bits of their vectors."""
        out = np.zeros((len(texts), self.dim), np.float32)
        filled = [i for i, text in enumerate(texts) if text.strip()]
        if not filled:
            return out
        given = [texts[i] for i in filled]
        encode = self.model.encode_query if kind == "query" else self.model.encode_document
        batch = 1 if kind == "query" else 32
        out[filled] = encode(given, batch_size=batch, normalize_embeddings=True, show_progress_bar=False)
        return out


@cache
def _load(name: str) -> tuple[Any, Path]:
    """-> (the model, the folder of its files). A base asks for its encoder once per segment; it is loaded once."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise UserError(
            f"encoder {name!r} needs sentence-transformers: `uv pip install sentence-transformers`, or use "
            "encoder='static'"
        ) from None
    try:
        model = SentenceTransformer(name)
        if Path(name).is_dir():
            return model, Path(name)
        from huggingface_hub import snapshot_download

        return model, Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError) as e:  # neither a folder with a model nor a name the hub or its cache knows
        first = str(e).strip().splitlines()[0]
        raise UserError(f"encoder {name!r} cannot be loaded ({first}): give a model's folder, or 'static'") from e


def _fingerprint(folder: Path) -> str:
    """sha256 over the weight and configuration files."""
    files = sorted(p for p in folder.rglob("*") if p.suffix in WEIGHTS_AND_CONFIG and p.is_file())
    lines = [f"{p.relative_to(folder).as_posix()} {sha256_file(p)}\n" for p in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def load_encoder(encoder: object, shared: Path, fingerprint: str = "") -> Encoder:
    """encoder: "static" (its files lie in `shared`), a model's folder or name, or an Encoder.

    UserError where `fingerprint`, what the vectors at hand were made with, is another.
    """
    if encoder == "given":
        raise UserError(
            f"the vectors come from an encoder that was passed in ({fingerprint[:12]}): open the base with encoder=..."
        )
    if encoder == "static":
        found: Encoder = StaticEncoder.load(shared)
    elif isinstance(encoder, str):
        found = SentenceTransformerEncoder(encoder)
    elif isinstance(encoder, Encoder):
        found = encoder
    else:
        raise UserError(f"encoder={encoder!r}: expected 'static', a model's folder or name, or an Encoder")
    if fingerprint and found.fingerprint != fingerprint:
        raise UserError(
            f"the vectors come from encoder {fingerprint[:12]}, this one is {found.fingerprint[:12]}: "
            "use the encoder they were made with, or build the base again"
        )
    return found
