"""Train the tokenizer on the training shards and save it to <base dir>/tokenizer/tokenizer.json.

python -m scripts.tok_train --max_chars=2e9 --vocab_size=65536
"""

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated

from tqdm import tqdm

from nanochat.common import base_dir, run_script
from nanochat.config import UserError, load_config
from nanochat.dataset import iter_documents
from nanochat.report import log_stage
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer, check_vocab_size

# What a tokenizer must give back unchanged before it is saved.
PROBE = "Hello world! It's 12:30, naïve café — 你好，世界 🌍\n\tdef f(x): return x\r\n   <|bos|> is text here. \u0000"


@dataclass(frozen=True)
class TokTrainConfig:
    """Train the BPE tokenizer on the text of the training shards."""

    vocab_size: Annotated[int, f"ids in all, the {len(SPECIAL_TOKENS)} special tokens included"] = 65536
    max_chars: Annotated[int, "stop reading after this many characters"] = 10_000_000_000
    doc_cap: Annotated[int, "characters read from the head of each document"] = 10_000
    threads: Annotated[int | None, "CPU threads, none = all cores"] = None

    def __post_init__(self) -> None:
        check_vocab_size(self.vocab_size)
        for key in ("max_chars", "doc_cap"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)}: give a positive number of characters")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads={self.threads}: give a positive number, or none for all cores")


class Sample:
    """Documents cut to doc_cap characters until max_chars are read; counts what it gave."""

    def __init__(self, documents: Iterable[str], doc_cap: int, max_chars: int):
        self.documents, self.doc_cap, self.max_chars = documents, doc_cap, max_chars
        self.n_documents = self.n_chars = 0

    def __iter__(self) -> Iterator[str]:
        bar = tqdm(desc="reading", unit="char", unit_scale=True, disable=not sys.stderr.isatty())
        with bar:
            for document in self.documents:
                text = document[: min(self.doc_cap, self.max_chars - self.n_chars)]
                self.n_documents += 1
                self.n_chars += len(text)
                bar.update(len(text))
                yield text
                if self.n_chars >= self.max_chars:
                    return


def main(argv: list[str]) -> None:
    cfg = load_config(TokTrainConfig, argv)
    sample = Sample(iter_documents("train"), cfg.doc_cap, cfg.max_chars)
    start = time.perf_counter()
    tokenizer = Tokenizer.train(sample, cfg.vocab_size, threads=cfg.threads)
    seconds = time.perf_counter() - start
    if sample.n_chars == 0:
        raise UserError("the training shards hold no text: make them with `python -m nanochat.dataset`")
    if tokenizer.decode(tokenizer.encode(PROBE)) != PROBE:
        raise RuntimeError("the trained tokenizer does not give its probe text back: it is not saved")
    path = tokenizer.save(base_dir() / "tokenizer")
    print(f"trained {tokenizer.vocab_size} ids on {sample.n_chars} characters in {seconds:.1f} s, saved {path}")
    if tokenizer.vocab_size < cfg.vocab_size:
        print(f"the text ran out of pairs to merge: {tokenizer.vocab_size} ids, not {cfg.vocab_size}; give more text")
    log_stage("tokenizer_training", metrics(cfg, sample, tokenizer, seconds))


def metrics(cfg: TokTrainConfig, sample: Sample, tokenizer: Tokenizer, seconds: float) -> dict[str, int | float | str]:
    merged = tokenizer.token_bytes[256 : len(tokenizer.tokens)]
    return {
        "vocab_size": tokenizer.vocab_size,
        "special_tokens": len(tokenizer.special_tokens),
        "max_chars": cfg.max_chars,
        "doc_cap": cfg.doc_cap,
        "documents": sample.n_documents,
        "characters": sample.n_chars,
        "seconds": round(seconds, 2),
        "merged_token_bytes_mean": round(float(merged.mean()), 3) if merged.size else 0.0,
        "merged_token_bytes_max": int(merged.max()) if merged.size else 0,
        "sha256": tokenizer.hash,
    }


if __name__ == "__main__":
    run_script(main)
