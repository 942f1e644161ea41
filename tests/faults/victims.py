"""What the campaign attacks, made small: data, tokenizer, checkpoints, a knowledge base with its questions."""

import json
import random
import shutil
from pathlib import Path

from nanochat.config import UserError
from nanochat.retrieval import Document, KnowledgeBase
from nanochat.shards import Manifest, write_shard
from nanochat.stepfolder import check, folders
from nanochat.tokenizer import Tokenizer
from tests.faults.children import Command, Done, Prelude, run

TAG = "victim"
SMALL = [
    "--depth=2", "--d_model=32", "--head_dim=16", "--max_seq_len=128", "--device_batch_size=1", "--softcap=0",
    "--total_batch_size=128", "--eval_tokens=512", "--eval_every=4", "--device=cpu", "--log_every=100",
    "--sample_every=-1", "--dtype=float32", "--warmdown_ratio=0",
]  # fmt: skip
WORDS = "river town stone bridge north of the a 1987 founded is was house lake".split()  # noqa: SIM905
QUERY = "house by the lake"


def train(steps: int, tag: str = TAG, *more: str) -> Command:
    """base_train, saving every second step."""
    own = [f"--num_iterations={steps}", f"--model_tag={tag}", "--save_every=2", "--resume"]
    return Command("scripts.base_train", [*SMALL, *own, *more])


def measure(*more: str) -> Command:
    """base_loss of the victim's newest checkpoint."""
    sizes = ["--split_tokens=256", "--device_batch_size=4", "--device=cpu", "--dtype=float32"]
    return Command("scripts.base_loss", [*sizes, f"--model_tag={TAG}", *more])


def prepare(base: Path, output: str = "rag", *more: str) -> Command:
    argv = ["--mode=jsonl", f"--input={base / 'rows.jsonl'}", f"--output={base / output}", "--overwrite"]
    return Command("scripts.prepare_rag_dataset", [*argv, "--chunk_tokens=16", *more])


def ask_base(base: Path, *what: str) -> Command:
    return Command("nanochat.retrieval", [str(base / "rag" / "knowledge_base"), *what])


def search(base: Path) -> Command:
    return ask_base(base, "search", *QUERY.split())


def add(base: Path, batch: int) -> Command:
    return Command(lambda argv: print(KnowledgeBase.open(base / "rag" / "knowledge_base").add(batch_of(batch))))


def batch_of(n: int, size: int = 40) -> list[Document]:
    """Documents that only this batch has; a query for their id finds each."""
    rng = random.Random(n)
    return [Document(f"b{n}d{i}", f"only{n}x{i} " + " ".join(rng.choices(WORDS, k=30)), "house") for i in range(size)]


def make_victim(base: Path, logs: Path) -> None:
    """Everything under `base`, which becomes a NANOCHAT_BASE_DIR."""
    rng = random.Random(0)
    docs = [" ".join(rng.choices(WORDS, k=rng.randint(5, 120))) for _ in range(300)]
    shards = [
        write_shard(base / "base_data" / f"shard_{i:05d}.parquet", docs[100 * i : 100 * i + 100], "t") for i in range(3)
    ]
    Manifest("complete", {"kind": "test"}, "python -m nanochat.dataset", 3, shards).save(base / "base_data")
    (base / "rows.jsonl").write_text("".join(_row(i, docs) for i in range(60)))
    (base / "texts").mkdir()
    for i in range(4):
        (base / "texts" / f"{i}.txt").write_text("\n\n".join(docs[20 * i : 20 * i + 20]))
    for command in (Command("scripts.tok_train", ["--vocab_size=320"]), train(6), prepare(base)):
        done = run(command, base, logs)
        assert done.code == 0, done
    for source in ("sft", "rag"):  # the server's, the same weights
        shutil.copytree(_steps(base, "base"), _steps(base, source))


def _row(i: int, docs: list[str]) -> str:
    document = {"id": f"d{i}", "title": f"place {i}", "text": docs[i], "gold": True}
    row = {"id": f"q{i}", "question": f"What of place {i}?", "answers": [docs[i].split()[0]], "documents": [document]}
    return json.dumps(row) + "\n"


def _steps(base: Path, source: str) -> Path:
    return base / f"{source}_checkpoints" / TAG


def metrics(base: Path, tag: str = TAG) -> dict[int, dict]:
    """What a run measured, by step; a line that a kill has cut is not counted. A resumed run validates once more at
    the step it goes on from."""
    rows: dict[int, dict] = {}
    path = base / "base_checkpoints" / tag / "metrics.jsonl"
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        own = {key: row[key] for key in ("loss", "grad_norm", "val_bpb", "tokens") if key in row}
        rows[row["step"]] = rows.get(row["step"], {}) | own
    return rows


def vocabulary(base: Path) -> str:
    return Tokenizer.load(base / "tokenizer").hash


def whole_steps(base: Path, tag: str = TAG) -> list[int]:
    """Saved steps whose every file is as it was saved, rising."""
    good = []
    for step, folder in folders(base / "base_checkpoints" / tag).items():
        try:
            check(folder)
            good.append(step)
        except UserError:
            continue
    return good


class Lab:
    """The victim, copies of it to hurt, and what its commands say while all is well."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng = folder, random.Random(seed)
        self.victim, self.logs = folder / "victim", folder / "logs"
        self.victim.mkdir()
        make_victim(self.victim, self.logs)
        self.vocabulary = vocabulary(self.victim)
        base = self.copy()
        self.found = [self.run(search(base), base).out]
        self.verified = self.run(ask_base(base, "verify"), base).out
        for command in (add(base, 1), train(10)):
            done = self.run(command, base)
            assert done.code == 0, done
        self.found.append(self.run(search(base), base).out)
        self.trained = metrics(base)

    def copy(self, to: Path | None = None) -> Path:
        """A fresh copy of the victim, always at the same place: its path stands in what commands print."""
        base = to or self.folder / "base"
        shutil.rmtree(base, ignore_errors=True)
        shutil.copytree(self.victim, base)
        text = (base / "rag" / "dataset.json").read_text()
        (base / "rag" / "dataset.json").write_text(text.replace(str(self.victim), str(base)))
        return base

    def run(self, command: Command, base: Path, prelude: Prelude | None = None) -> Done:
        return run(command, base, self.logs, prelude)

    def lost(self, base: Path) -> str:
        """What of the victim's committed work is gone or changed at `base`; empty where nothing is."""
        if max(whole_steps(base), default=0) < 6:
            return f"checkpoint: whole steps are {whole_steps(base)}"
        if vocabulary(base) != self.vocabulary:
            return "tokenizer: another vocabulary"
        verified, found = self.run(ask_base(base, "verify"), base), self.run(search(base), base)
        if verified.code != 0:
            return f"knowledge base: {verified.err}"
        if found.out not in self.found:
            return "knowledge base: other answers"
        return ""
