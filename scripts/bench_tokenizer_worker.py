"""One measurement of one tokenizer library: the process that scripts.bench_tokenizer starts for each figure.

    python -m scripts.bench_tokenizer_worker '{"kind": "train", "library": "ours", ...}'    # prints its figures as JSON

Imports stand inside functions because a process must hold only the library it measures.
"""

import base64
import json
import pickle
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np


def main(job: dict[str, Any]) -> None:
    """Do one job and print its figures as JSON; tokens or ids go to the file job["result"]."""
    if job["peers"]:
        sys.path.insert(0, job["peers"])  # before ours, which has the name of a peer
    with open(job["texts"], "rb") as f:
        texts = pickle.load(f)
    print(json.dumps((train_job if job["kind"] == "train" else encode_job)(job, texts)))


def train_job(job: dict[str, Any], texts: list[str]) -> dict[str, float]:
    run = trainer(job["library"], texts, job["vocab_size"], job["pattern"], job["threads"])
    before = reset_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    tokens = run()
    figures = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    figures["mb_above_text"] = (peak() - before) / 1e6
    with open(job["result"], "wb") as f:
        pickle.dump(list(tokens), f)
    return figures


def trainer(name: str, texts: list[str], vocab_size: int, pattern: str, threads: int) -> Callable[[], Iterable[bytes]]:
    """A function that trains and returns the tokens; preparing what a library wants as input is not timed."""
    if name == "ours":
        import rustbpe

        return lambda: [token for token, _ in rustbpe.train(iter(texts), vocab_size, pattern, threads=threads)]
    if name == "rustbpe":
        import rustbpe

        model: Any = rustbpe.Tokenizer()  # pyrefly: ignore
        return lambda: (
            model.train_from_iterator(iter(texts), vocab_size, pattern=pattern)
            or [bytes(token) for token, _ in model.get_mergeable_ranks()]
        )
    if name == "tokenizers":
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

        hf = Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        hf.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        options = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
        bytes_of = {character: bytes([b]) for b, character in spelling().items()}
        return lambda: (
            hf.train_from_iterator(iter(texts), options)
            or [b"".join(bytes_of[c] for c in token) for token in hf.get_vocab()]
        )
    if name == "bpeasy":
        import bpeasy  # pyrefly: ignore

        return lambda: bpeasy.train_bpe(iter(texts), pattern, 128, vocab_size)
    import gigatoken  # pyrefly: ignore

    data = "\0\0\0".join(texts).encode()
    texts.clear()
    return lambda: gigatoken.train_bpe(data, vocab_size, [], separator=b"\0\0\0")[0].values()


def encode_job(job: dict[str, Any], texts: list[str]) -> dict[str, float]:
    with open(job["ranks"], "rb") as f:
        ranks = pickle.load(f)
    run, flat = encoder(job["library"], ranks, job["pattern"], job["threads"])
    seconds, cpu_seconds = [], []
    for _ in range(4):
        texts = pickle.loads(
            pickle.dumps(texts)
        )  # new objects: a str may keep the UTF-8 that an earlier pass made of it
        wall, cpu = time.perf_counter(), time.process_time()
        ids = run(texts)
        seconds.append(time.perf_counter() - wall)
        cpu_seconds.append(time.process_time() - cpu)
    np.save(job["result"], flat(ids))
    mb = sum(len(text.encode()) for text in texts) / 1e6
    return {"cold": mb / seconds[0], "warm": mb / min(seconds[1:]), "warm_cpu": mb / min(cpu_seconds[1:])}


def encoder(name: str, ranks: dict[bytes, int], pattern: str, threads: int) -> tuple[Callable, Callable]:
    """(encode the texts, turn the result into one array of ids; only the first is timed)."""
    if name == "ours":
        import rustbpe

        ours = rustbpe.Encoder(list(ranks.items()), pattern)
        return lambda texts: ours.encode_batch(texts, threads), lambda result: result[0]
    if name == "tiktoken":
        import tiktoken

        tik = tiktoken.Encoding("bench", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        one = lambda texts: [tik.encode_ordinary(text) for text in texts]  # noqa: E731
        many = lambda texts: tik.encode_ordinary_batch(texts, num_threads=threads)  # noqa: E731
        return one if threads == 1 else many, lambda result: np.concatenate(result)
    if name == "tokenizers":
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers

        spelled = {token: "".join(spelling()[b] for b in token) for token in ranks}
        merges = [tuple(spelled[part] for part in parts(token, ranks)) for token in ranks if len(token) > 1]
        hf = Tokenizer(models.BPE({spelled[t]: i for t, i in ranks.items()}, merges, ignore_merges=True))  # pyrefly: ignore
        # The same in the dialect of its engine, in which {1,3}+ is a repeated repeat and $ the end of a line.
        dialect = pattern.replace("{1,3}+", "{1,3}").replace("$", r"\z")
        split = pre_tokenizers.Split(Regex(dialect), "isolated")
        hf.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
        return hf.encode_batch_fast, lambda result: np.concatenate([encoding.ids for encoding in result])
    import gigatoken  # pyrefly: ignore

    with tempfile.NamedTemporaryFile("w", suffix=".tiktoken") as f:
        f.writelines(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
        f.flush()
        giga = gigatoken.Tokenizer.from_tiktoken(f.name, "cl100k")
    return lambda texts: giga.encode_batch(texts, parallel=threads > 1), lambda result: np.concatenate(list(result))


def spelling() -> dict[int, str]:
    """GPT-2's letters for bytes: printable Latin-1 stands for itself, other bytes for U+0100 onwards."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}


def parts(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens whose merge made this one: what BPE leaves of it with the lower ranks alone."""
    cut = [token[i : i + 1] for i in range(len(token))]
    while len(cut) > 2:
        best = min(range(len(cut) - 1), key=lambda i: ranks.get(cut[i] + cut[i + 1], len(ranks)))
        cut[best : best + 2] = [cut[best] + cut[best + 1]]
    return cut


def reset_peak() -> int:
    """Set the peak of resident memory back to what is held now, and return that in bytes (Linux)."""
    if platform.system() != "Linux":
        return peak()
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak() -> int:
    return status("VmHWM") if platform.system() == "Linux" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
