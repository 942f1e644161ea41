"""Files that are cut or have a flipped bit, clocks that jump, bytes that are no UTF-8."""

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

from nanochat.common import read_json
from tasks.customjson import CustomJSON
from tasks.rag import load_rows
from tests.faults.children import Command, Done, Prelude
from tests.faults.tally import Tally, judge
from tests.faults.victims import TAG, Lab, add, ask_base, measure, metrics, prepare, search, train

YEAR = 365 * 86400
BAD = b"\xff\xfe\x80 caf\xe9 \xed\xa0\x80"  # no UTF-8: a stray byte, Latin-1, half of a surrogate pair


def spoilt(data: bytes, flips: int, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """A file's content cut at three places, then with one bit flipped at `flips` places; and what was done."""
    for length in sorted({0, len(data) // 2, len(data) - 1} - {len(data), -1}):
        yield f"cut to {length} of {len(data)} bytes", data[:length]
    for _ in range(flips if data else 0):
        at, bit = rng.randrange(len(data)), rng.randrange(8)
        yield f"bit {bit} of byte {at} of {len(data)}", data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


def corrupt(lab: Lab, tally: Tally, flips: int, most: int = 0) -> None:
    """Every file of every artefact in turn (most: so many of each, 0 = all), read by the commands that read it."""
    data, tokenizer, step, kb = (
        "base_data/*",
        "tokenizer/*",
        f"base_checkpoints/{TAG}/step_000006/*",
        "rag/knowledge_base",
    )
    fresh = train(2, "fresh", "--eval_every=-1")
    base = lab.copy()
    runs: list[tuple[str, str, Command, str]] = [
        ("training data", data, fresh, "manifest.json has no hash of its own"),
        ("tokenizer", tokenizer, fresh, ""),
        ("checkpoint, --resume", step, train(10), ""),
        ("checkpoint, newest", step, measure(), ""),
        ("checkpoint, --step", step, measure("--step=6"), ""),
        ("metrics of a run", f"base_checkpoints/{TAG}/metrics.jsonl", train(10), "no hash"),
        ("knowledge base, verify", f"{kb}/**/[!.]*", ask_base(base, "verify"), ""),
        ("knowledge base, search", f"{kb}/**/[!.]*", search(base), "opening checks sizes; hashes are verify's"),
        ("questions", "rag/*.json*", Command(lambda argv: read_questions(base)), "no hash"),
        ("report", "report/*.json", Command("nanochat.report", ["generate"]), "no hash"),
    ]
    for where, pattern, command, remark in runs:
        base = lab.copy()
        healthy = _result(lab.run(command, base), base)
        lab.copy()
        names = sorted(p.relative_to(lab.victim) for p in lab.victim.glob(pattern) if p.is_file())
        for name in lab.rng.sample(names, min(most, len(names))) if most else names:
            for case, content in spoilt((lab.victim / name).read_bytes(), flips, lab.rng):
                if command.run == "scripts.base_train":  # the others leave all as it is
                    lab.copy()
                (base / name).write_bytes(content)
                done = lab.run(command, base)
                same = healthy == _result(done, base) or remark == "no hash" or _announced(done)
                if where == "knowledge base, verify":
                    same = _same_json(base / name, lab.victim / name)
                verdict = judge(done, [name.name, name.parent.name, str(base)], same)
                if where == "knowledge base, search" and verdict.wrong:
                    tally.count("bit flips unseen", where, remark="found by verify", case=case)
                    continue
                tally.count("damaged file", where, verdict, case=f"{name} {case}", remark=remark)
            lab.copy()


def _announced(done: Done) -> bool:
    """Whether an older checkpoint was taken, and that said."""
    return "passing over checkpoint" in done.err and "step 4" in done.out


def _result(done: Done, base: Path) -> object:
    """What was measured, of a training; what was printed, of another command."""
    return (metrics(base), metrics(base, "fresh")) if "training: " in done.out else done.out


def _same_json(path: Path, original: Path) -> bool:
    """Whether the damage left the value as it was: the last byte of a manifest is a line end."""
    return path.suffix == ".json" and path.read_bytes().strip() == original.read_bytes().strip()


def read_questions(base: Path) -> None:
    for split in ("train", "val"):
        load_rows(base / "rag" / f"{split}.jsonl")
    read_json(base / "rag" / "dataset.json")


# ---- clocks ----


def jumping(seed: int) -> Prelude:
    """time.time() leaps by up to a year, forward and back, at every tenth reading."""

    def prelude() -> None:
        rng, real, state = random.Random(seed), time.time, {"offset": 0.0, "calls": 0}

        def leaping() -> float:
            state["calls"] += 1
            if state["calls"] % 10 == 1:
                state["offset"] = rng.uniform(-YEAR, YEAR)
            return real() + state["offset"]

        time.time = leaping

    return prelude


def clocks(lab: Lab, tally: Tally, rounds: int) -> None:
    """A clock that leaps while a command runs, and files of the past and of the future."""
    for i in range(rounds):
        for stamp in (None, 0.0, time.time() - YEAR, time.time() + 100 * YEAR):
            base = lab.copy()
            work = {
                "base_loss": measure("--step=6"), "training": train(10), "search": search(base),
                "verify": ask_base(base, "verify"), "add": add(base, 1), "prepare_rag_dataset": prepare(base),
            }  # fmt: skip
            for where, command in work.items():
                if stamp is not None:
                    for path in base.rglob("*"):
                        os.utime(path, (stamp, stamp + lab.rng.randrange(100)))
                done = lab.run(command, base, jumping(lab.rng.randrange(10**6)) if stamp is None else None)
                verdict = judge(done, [], same=where != "training" or metrics(base) == lab.trained)
                fault = "clock leaps" if stamp is None else "files of another time"
                lost = lab.lost(base) or ("" if done.code == 0 else done.err[-200:])
                tally.count(fault, where, verdict, lost=lost, case=f"round {i}, {stamp}")


# ---- broken text ----


def utf8(lab: Lab, tally: Tally) -> None:
    """Bytes that are no UTF-8 in every kind of text that a command reads."""
    base = lab.copy()
    texts = base / "texts"
    rows, lines = (base / "rows.jsonl").read_bytes(), (base / "rag" / "train.jsonl").read_bytes()
    (texts / "bad.txt").write_bytes(b"good text\n\n" + BAD)
    (base / "bad.jsonl").write_bytes(b'{"text": "good"}\n{"text": "' + BAD + b'"}\n')
    (base / "half.jsonl").write_bytes(b'{"text": "good"}\n{"text": "\\ud800 half"}\n')
    (base / "rows.jsonl").write_bytes(rows + b'{"question": "' + BAD + b'", "answers": ["x"]}\n' * 11)
    (base / "one.jsonl").write_bytes(rows + b'{"question": "' + BAD + b'", "answers": ["x"]}\n')
    (base / "chat.jsonl").write_bytes(b'[{"role": "user", "content": "' + BAD + b'"}]\n')
    (base / "bad_config.py").write_bytes(b"model_tag = '" + BAD + b"'")
    (base / "rag" / "train.jsonl").write_bytes(lines + BAD)

    def dataset(source: str, *more: str) -> Command:
        return Command("nanochat.dataset", [f"--source={base / source}", f"--out={base / f'out{source}'}", *more])

    def reader(read) -> Command:
        return Command(lambda argv: print(len(read())))

    one = ["--mode=jsonl", f"--input={base / 'one.jsonl'}", f"--output={base / 'rag1'}"]
    files = ["--mode=files", f"--input={texts}", f"--output={base / 'rag2'}"]
    cases = [  # where, command, file it must name, exit code
        ("dataset, .txt", dataset("texts"), "bad.txt", 2),
        ("dataset, .txt, --errors=skip", dataset("texts", "--errors=skip"), "", 0),
        ("dataset, .txt, --errors=replace", dataset("texts", "--errors=replace", "--overwrite"), "", 0),
        ("dataset, .jsonl", dataset("bad.jsonl"), "bad.jsonl", 2),
        ("dataset, half a surrogate", dataset("half.jsonl"), "half.jsonl", 2),
        ("prepare_rag_dataset, many rows", prepare(base), "rows.jsonl", 2),
        ("prepare_rag_dataset, one row", Command("scripts.prepare_rag_dataset", one), "", 0),
        ("prepare_rag_dataset, files", Command("scripts.prepare_rag_dataset", files), "", 0),
        ("conversations", reader(lambda: CustomJSON(base / "chat.jsonl")), "chat.jsonl", 2),
        ("questions", reader(lambda: load_rows(base / "rag" / "train.jsonl")), "train.jsonl", 2),
        ("a config file", Command("scripts.base_train", [str(base / "bad_config.py")]), "bad_config.py", 2),
        ("an argument", Command("nanochat.dataset", [f"--source={os.fsdecode(BAD)}"]), "--source", 2),
        ("a query", ask_base(base, "search", os.fsdecode(b"house " + BAD)), "", 0),
    ]
    for where, command, name, code in cases:
        done = lab.run(command, base)
        verdict = judge(done, [name], same=code == 0)
        tally.count(
            "broken UTF-8", where, verdict, lost="" if done.code in (code, 2) else f"exit {done.code}: {done.err}"
        )
