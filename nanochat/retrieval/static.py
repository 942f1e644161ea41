"""Word vectors trained on the documents they will search: the dense default where no model is at hand.

A text is the sum of its terms' vectors, each times idf and a saturated count, scaled to length 1. The vectors start
random, so that already before training equal words make texts similar (random indexing); then one sentence of a
document must find the rest of it among 255 others (inverse cloze task, arXiv 1906.00300; InfoNCE in both directions,
arXiv 1807.03748), which draws together the words that stand together. numpy alone; the gradient touches only the rows
of the words in a batch.

A word that training never saw gets one of BUCKETS random vectors by its hash: two texts that share it are similar.

    encoder = StaticEncoder.train(texts, dim=256, seed=0); encoder.save(folder)
    vectors = StaticEncoder.load(folder).encode(["a text"])
"""

import hashlib
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import rustbpe

from nanochat.common import atomic_write, read_json, sha256_file, write_json
from nanochat.config import UserError

FORMAT = 1
FILES = ("encoder.json", "terms.txt", "idf.npy", "matrix.npy")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
SAMPLE = 20_000  # texts trained on; of more, a random choice
BUCKETS = 4096
BATCH = 256
MIN_STEPS, MAX_STEPS = 100, 800  # batches: a small base takes more epochs, 20 are 800 of 10,000 texts
TEMPERATURE = 0.1
RATE = 0.2  # of Adam, in units of 1 / sqrt(dim), falling to 0
ENCODE_BATCH = 512


class StaticEncoder:
    """vocabulary: V terms; idf: (V + BUCKETS,); matrix: (V + BUCKETS, dim) float16, the last rows for unseen words."""

    def __init__(self, vocabulary: Sequence[str], idf: np.ndarray, matrix: np.ndarray, fingerprint: str = "") -> None:
        self.ids = {term: i for i, term in enumerate(vocabulary)}
        self.idf, self.matrix, self.fingerprint = idf, matrix, fingerprint
        self.dim: int = matrix.shape[1]

    @classmethod
    def train(cls, texts: Iterable[str], dim: int = 256, seed: int = 0, epochs: int = 20) -> "StaticEncoder":
        """Deterministic: the same texts, numbers and numpy give the same encoder. Bounded memory: SAMPLE texts."""
        rng = np.random.default_rng(seed)
        documents = [sentence_terms(text) for text in sample(texts, SAMPLE, rng)]
        documents = [d for d in documents if d]
        found = Counter(term for d in documents for term in set().union(*d))
        vocabulary = sorted(found)
        df = np.array([found[t] for t in vocabulary], np.float64)
        idf = np.log1p((len(documents) - df + 0.5) / (df + 0.5))
        unseen = np.log1p((len(documents) + 0.5) / 0.5)
        idf = np.concatenate([idf, np.full(BUCKETS, unseen)]).astype(np.float32)
        matrix = rng.standard_normal((len(idf), dim), np.float32) / np.float32(np.sqrt(dim))
        encoder = cls(vocabulary, idf, matrix)
        train_matrix(encoder, [[encoder.numbers(s) for s in d] for d in documents], epochs, rng)
        encoder.matrix = matrix.astype(np.float16)
        return encoder

    def numbers(self, terms: Sequence[str]) -> np.ndarray:
        """The row of each term."""
        V = len(self.ids)
        known = self.ids.get
        return np.array(
            [i if (i := known(t)) is not None else V + zlib.crc32(t.encode()) % BUCKETS for t in terms], int
        )

    def encode(self, texts: Sequence[str], kind: str = "passage") -> np.ndarray:
        """-> (n, dim) float32, rows of length 1, 0 for a text without words; queries and passages alike."""
        parts = [self._encode(list(texts[i : i + ENCODE_BATCH])) for i in range(0, len(texts), ENCODE_BATCH)]
        return np.concatenate(parts) if parts else np.zeros((0, self.dim), np.float32)

    def _encode(self, texts: list[str]) -> np.ndarray:
        words = rustbpe.terms(texts, True, True)
        rows = np.repeat(np.arange(len(texts)), [len(w) for w in words])
        out = np.zeros((len(texts), self.dim), np.float32)
        if not len(rows):
            return out
        flat = self.numbers([t for w in words for t in w])
        pairs, counts = np.unique(rows * len(self.idf) + flat, return_counts=True)
        rows, columns = np.divmod(pairs, len(self.idf))
        vectors = self.matrix[columns].astype(np.float32) * weights(counts, self.idf[columns])[:, None]
        filled, starts = np.unique(rows, return_index=True)
        out[filled] = np.add.reduceat(vectors, starts, axis=0)
        return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-12)

    def save(self, folder: Path) -> None:
        """Write FILES into the folder and set the fingerprint."""
        write_json(folder / "encoder.json", {"format": FORMAT, "kind": "static", "dim": self.dim, "buckets": BUCKETS})
        with atomic_write(folder / "terms.txt") as f:
            f.write("\n".join(self.ids).encode())
        for name, array in (("idf.npy", self.idf), ("matrix.npy", self.matrix)):
            with atomic_write(folder / name) as f:
                np.save(f, array, allow_pickle=False)
        self.fingerprint = fingerprint(folder)

    @classmethod
    def load(cls, folder: Path) -> "StaticEncoder":
        """UserError where a file is missing or the parts do not fit each other."""
        if missing := [name for name in FILES if not (folder / name).is_file()]:
            raise UserError(f"static encoder {folder} has no {missing[0]}: restore it, or build the base again")
        about = read_json(folder / "encoder.json", "static encoder")
        if about.get("format") != FORMAT:
            raise UserError(f"{folder} has format {about.get('format')!r}, this version reads {FORMAT}: build it again")
        try:
            text = (folder / "terms.txt").read_text(encoding="utf-8")
        except UnicodeDecodeError as e:
            raise UserError(f"{folder / 'terms.txt'} is damaged ({e}): restore it, or build the base again") from e
        vocabulary = text.split("\n") if text else []
        try:
            idf = np.load(folder / "idf.npy", allow_pickle=False)
            matrix = np.load(folder / "matrix.npy", mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as e:
            raise UserError(f"static encoder {folder} is damaged ({e}): restore it, or build the base again") from e
        if matrix.shape != (len(vocabulary) + about["buckets"], about["dim"]) or len(idf) != len(matrix):
            raise UserError(f"static encoder {folder} is damaged (its parts differ in size): restore it")
        return cls(vocabulary, idf, matrix, fingerprint(folder))


def fingerprint(folder: Path) -> str:
    """sha256 over the sha256 of each of FILES."""
    return hashlib.sha256("".join(sha256_file(folder / name) for name in FILES).encode()).hexdigest()


def weights(counts: np.ndarray, idf: np.ndarray) -> np.ndarray:
    """BM25's with k1 = 1 and b = 0: a second occurrence adds a third, never more than doubling."""
    counts = counts.astype(np.float32)
    return 2 * counts / (counts + 1) * idf


def sample(texts: Iterable[str], n: int, rng: np.random.Generator) -> list[str]:
    """n of the texts, each as likely (Vitter's algorithm R); all of them, in order, where there are no more."""
    kept: list[str] = []
    for i, text in enumerate(texts):
        if i < n:
            kept.append(text)
        elif (place := int(rng.integers(i + 1))) < n:
            kept[place] = text
    return kept


def sentence_terms(text: str) -> list[list[str]]:
    """Terms of each sentence that has any. A title stands on a line of its own, so it counts as a sentence."""
    sentences = rustbpe.terms([s for s in SENTENCE_END.split(text) if s], True, True)
    return [s for s in sentences if s]


# ---- training ----


def train_matrix(encoder: StaticEncoder, documents: list[list[np.ndarray]], epochs: int, rng: np.random.Generator):
    """Train encoder.matrix in place. documents: for each its sentences, arrays of rows of the matrix."""
    documents = [d for d in documents if sum(map(len, d)) > 1]  # a single word has no rest
    batch = min(BATCH, len(documents))
    if batch < 2:
        return
    n_steps = min(MAX_STEPS, max(MIN_STEPS, epochs * len(documents) // batch)) if epochs else 0
    adam, order = Adam(encoder.matrix), []
    for step in range(n_steps):
        if len(order) < batch:
            order = rng.permutation(len(documents)).tolist()
        pairs = [split(documents[order.pop()], rng) for _ in range(batch)]
        rows, X = bags([a for a, _ in pairs] + [b for _, b in pairs], encoder.idf)
        gradient = X.T @ contrast(X @ encoder.matrix[rows])  # (U, dim)
        adam.update(encoder.matrix, rows, gradient, RATE / encoder.dim**0.5 * (1 - step / n_steps))


def split(sentences: list[np.ndarray], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One sentence and all others; of a single sentence some words, ten at most, and the others."""
    if len(sentences) == 1:
        shuffled = rng.permutation(sentences[0])
        n = int(rng.integers(1, min(10, len(shuffled) - 1) + 1))
        return shuffled[:n], shuffled[n:]
    i = int(rng.integers(len(sentences)))
    return sentences[i], np.concatenate(sentences[:i] + sentences[i + 1 :])


def bags(texts: list[np.ndarray], idf: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """-> the matrix rows that occur (U,) and each text's weights of them (len(texts), U)."""
    rows, column = np.unique(np.concatenate(texts), return_inverse=True)
    line = np.repeat(np.arange(len(texts)), [len(t) for t in texts])
    counts = np.bincount(line * len(rows) + column, minlength=len(texts) * len(rows)).reshape(len(texts), len(rows))
    return rows, weights(counts, idf[rows])


def contrast(Y: np.ndarray) -> np.ndarray:
    """Y: (2 n, dim), row i and row n + i belong together -> gradient of the loss by Y, InfoNCE in both directions."""
    n = len(Y) // 2
    length = np.maximum(np.linalg.norm(Y, axis=1, keepdims=True), 1e-12)
    Z = Y / length
    a, b = Z[:n], Z[n:]
    logits = a @ b.T / TEMPERATURE
    G = (softmax(logits) + softmax(logits.T).T) / 2 - np.eye(n, dtype=np.float32)
    G /= TEMPERATURE * n
    dZ = np.concatenate([G @ b, G.T @ a])
    return (dZ - (dZ * Z).sum(1, keepdims=True) * Z) / length


def softmax(logits: np.ndarray) -> np.ndarray:
    exp = np.exp(logits - logits.max(1, keepdims=True))
    return exp / exp.sum(1, keepdims=True)


class Adam:
    """Adam (arXiv 1412.6980) on the rows that occur: others keep their moments. One second moment per row."""

    def __init__(self, matrix: np.ndarray) -> None:
        self.first = np.zeros_like(matrix)
        self.second = np.zeros((len(matrix), 1), np.float32)
        self.steps = np.zeros((len(matrix), 1), np.float32)

    def update(self, matrix: np.ndarray, rows: np.ndarray, gradient: np.ndarray, rate: float) -> None:
        """rows: (U,) without repetition, gradient: (U, dim)."""
        self.steps[rows] += 1
        first = self.first[rows] = 0.9 * self.first[rows] + 0.1 * gradient
        second = self.second[rows] = 0.99 * self.second[rows] + 0.01 * (gradient**2).mean(1, keepdims=True)
        steps = self.steps[rows]
        matrix[rows] -= rate * (first / (1 - 0.9**steps)) / (np.sqrt(second / (1 - 0.99**steps)) + 1e-12)
