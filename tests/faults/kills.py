"""kill -9 at random moments: while training, saving, indexing and serving. What was committed before must be there."""

import json
import os
import re
import shutil
import socket
import time
from pathlib import Path

import httpx

from nanochat.checkpoint import load_checkpoint
from nanochat.retrieval import KnowledgeBase
from tests.faults.children import Child, Command, dies_at
from tests.faults.tally import Tally
from tests.faults.victims import Lab, ask_base, batch_of, metrics, prepare, search, train, whole_steps

STEPS = 40  # of a training run that is killed
OPERATIONS = 70  # file system operations of six steps with their saves


def kill_training(lab: Lab, tally: Tally, n: int) -> None:
    """At random times of a run that goes on each time; the run that got through has the losses of one never killed."""
    base = lab.copy()
    started = time.monotonic()
    done = lab.run(train(STEPS, "whole"), base)
    assert done.code == 0, done
    seconds, runs, kills = time.monotonic() - started, 0, 0
    while kills < n:
        tag, before = f"killed{runs}", max(whole_steps(base, f"killed{runs}"), default=0)
        killed = Child(train(STEPS, tag), base, lab.logs).kill(lab.rng.uniform(0.1, seconds))
        kills += killed
        after = max(whole_steps(base, tag), default=0)
        if killed:
            tally.count("kill -9", "training", lost="" if after >= before else f"step {before}, now {after}")
        if not killed or kills == n:
            lost = _finished(lab, base, tag)
            tally.count("kill -9", "training, then finished", lost=lost, case=tag, remark="losses as if never killed")
            runs += 1


def _finished(lab: Lab, base: Path, tag: str) -> str:
    done = lab.run(train(STEPS, tag), base)
    if done.code != 0:
        return f"--resume: exit {done.code}: {done.err[-300:]}"
    same = metrics(base, tag) == metrics(base, "whole") and _weights(base, tag) == _weights(base, "whole")
    return "" if same else "other losses or weights than without kills"


def _weights(base: Path, tag: str) -> dict[str, list]:
    found = load_checkpoint(base / "base_checkpoints" / tag, want=("model",)).model or {}
    return {name: tensor.tolist() for name, tensor in found.items()}


def kill_saving(lab: Lab, tally: Tally, n: int) -> None:
    """At a random flush, rename or removal of six steps with three saves; --resume then goes on to the same losses."""
    base = lab.copy()
    assert lab.run(train(12), base).code == 0
    whole = metrics(base)
    for _ in range(n):
        base, at = lab.copy(), lab.rng.randrange(OPERATIONS)
        Child(train(12), base, lab.logs, dies_at(at)).wait()
        lost = lab.lost(base)
        done = lab.run(train(12), base)
        if not lost and (done.code != 0 or metrics(base) != whole):
            lost = f"--resume: exit {done.code}, {done.err[-300:] or 'other losses'}"
        tally.count("kill -9", "saving a checkpoint", lost=lost, case=f"operation {at}")


def kill_preparing(lab: Lab, tally: Tally, n: int) -> None:
    """A set of questions and its base made anew over the old one: one of them must stand there."""
    base = lab.copy()
    started = time.monotonic()
    assert lab.run(prepare(base, "rag", "--chunk_tokens=24"), base).code == 0
    seconds, renewed = time.monotonic() - started, lab.run(search(base), base).out
    for i in range(n):
        base, at = lab.copy(), lab.rng.randrange(40)
        prelude = dies_at(at) if i % 2 else None
        Child(prepare(base, "rag", "--chunk_tokens=24"), base, lab.logs, prelude).kill(
            lab.rng.uniform(0, 1.2 * seconds)
        )
        remark = ""
        if not (base / "rag").exists():  # between two renames: the next run puts it back
            os.replace(base / ".rag.old", base / "rag")
            remark = "once moved aside, put back by the next run"
        verified = lab.run(ask_base(base, "verify"), base)
        same = lab.run(search(base), base).out in (lab.found[0], renewed) and verified.code == 0
        tally.count("kill -9", "prepare_rag_dataset", lost="" if same else verified.err, case=f"{at}", remark=remark)
        if lab.run(prepare(base), base).code != 0:
            tally.count("kill -9", "prepare_rag_dataset", lost="the next run does not get through")


def change(path: Path, start: int) -> Command:
    """Change a base for ever, saying what was done: operation i adds batch i + 1, deletes half of it, or compacts."""

    def act(argv: list[str]) -> None:
        kb = KnowledgeBase.open(path)
        for i in range(start, 10_000):
            if i % 3 == 0:
                kb.add(batch_of(i + 1))
            elif i % 3 == 1:
                kb.delete([d.id for d in batch_of(i)[:20]])
            else:
                kb.compact()
            print(i, flush=True)

    return Command(act)


def ids_after(n: int) -> set[str]:
    """Of the documents after n operations on a base of batch 0."""
    ids = {d.id for d in batch_of(0)}
    for i in range(n):
        if i % 3 == 0:
            ids |= {d.id for d in batch_of(i + 1)}
        elif i % 3 == 1:
            ids -= {d.id for d in batch_of(i)[:20]}
    return ids


def kill_changing(lab: Lab, tally: Tally, n: int) -> None:
    """add, delete and compact, without an end: every change that was reported is there, another one may be."""
    path, done = lab.folder / "kb", 0
    shutil.rmtree(path, ignore_errors=True)
    KnowledgeBase.build(batch_of(0), path).close()
    for i in range(n):
        at = lab.rng.randrange(60)
        child = Child(change(path, done), lab.folder, lab.logs, dies_at(at) if i % 2 else None)
        child.kill(lab.rng.uniform(0, 0.4))
        done += len(child.out.read_text().split())
        kb = KnowledgeBase.open(path)
        ids = {d.id for d in kb.documents()}
        done += ids != ids_after(done)
        found = {hit.document.id for hit in kb.search("house", k=100_000)}
        lost = "" if ids == ids_after(done) == found else f"after {done} operations {len(ids)} documents"
        kb.verify()
        kb.close()
        tally.count("kill -9", "add, delete, compact", lost=lost, case=f"operation {at}")


def kill_serving(lab: Lab, tally: Tally, n: int) -> None:
    """While an answer is written: started again, the server answers as before, over the same checkpoint and base."""
    base, expected = lab.copy(), ""
    for _ in range(n + 1):
        server = Child(serve(base), base, lab.logs)
        lost = ""
        try:
            address = wait_for_address(server)
            answer = ask(address)
            expected = expected or answer
            lost = "" if answer == expected else f"answered {answer!r}, before {expected!r}"
            with socket.create_connection((address.host, address.port)) as s:
                s.sendall(REQUEST)
                server.kill(lab.rng.uniform(0, 0.08))
        except (OSError, httpx.HTTPError, RuntimeError) as e:
            lost = f"{type(e).__name__}: {e}"
            server.kill(0)
        tally.count("kill -9", "serving", lost=lost or lab.lost(base))


def serve(base: Path) -> Command:
    flags = ["--port=0", "--device=cpu", "--dtype=float32", "--source=rag", "-m", "48", "--documents=2"]
    return Command("scripts.chat_web", [*flags, f"--knowledge_base={base / 'rag' / 'knowledge_base'}", "-t", "0"])


def wait_for_address(server: Child) -> httpx.URL:
    """RuntimeError where the server ends instead of listening."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if found := re.search(r"http://\S+", server.out.read_text()):
            return httpx.URL(found[0])
        if (code := server.poll()) is not None:
            raise RuntimeError(f"exit {code}: {server.err.read_text()[-300:]}")
        time.sleep(0.01)
    raise RuntimeError("it does not listen")


BODY = {"messages": [{"role": "user", "content": "house?"}], "temperature": 0, "max_tokens": 32, "seed": 1}
REQUEST = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\n\r\n%s" % (len(json.dumps(BODY)), json.dumps(BODY).encode())
)


def ask(address: httpx.URL) -> str:
    """Text and sources of a greedy answer."""
    answer = httpx.post(address.join("/v1/chat/completions"), json=BODY, timeout=60)
    answer.raise_for_status()
    value = answer.json()
    return json.dumps([value["choices"][0]["message"]["content"], [s["id"] for s in value.get("sources", ())]])


def kill_all(lab: Lab, tally: Tally, kills: int) -> None:
    shares = (
        (kill_training, 0.3),
        (kill_saving, 0.2),
        (kill_preparing, 0.1),
        (kill_changing, 0.25),
        (kill_serving, 0.15),
    )
    for work, share in shares:
        work(lab, tally, max(1, round(share * kills)))
