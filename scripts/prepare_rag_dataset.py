"""Make a knowledge base and questions about it: what rag_finetune and rag_eval read.

    python -m scripts.prepare_rag_dataset --mode example --output rag_data
    python -m scripts.prepare_rag_dataset --mode files --input my_notes --output notes --retriever_type hybrid
    python -m scripts.prepare_rag_dataset --mode squad --input train-v2.0.json,dev-v2.0.json --output squad

Modes: example (a small invented world and Python's own documentation), world (tasks/world.py), files (.txt .md .html
.pdf), jsonl (your own rows), squad, hotpotqa (2Wiki and MuSiQue too), beir; nanochat/retrieval/readers has the layouts.
openqa: questions with answers alone ({"question", "answer"}, as NQ-Open has them) and --texts to find evidence in.

OUTPUT/knowledge_base is opened with KnowledgeBase.open. OUTPUT/train.jsonl and val.jsonl hold a question a line:
{"id", "question", "answers", "gold_ids", "answerable", "kind"?, "hops"?, "documents"?}; they share no question id, and
in mode world no name. OUTPUT/bad_rows.jsonl lists what could not be used, dataset.json says how all this was made.
OUTPUT appears when everything in it is whole.
"""

import contextlib
import fcntl
import glob
import json
import os
import shutil
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from tqdm import tqdm

from nanochat.common import atomic_write, fsync_dir, raise_disk_error, run_script, write_json
from nanochat.config import UserError, load_config
from nanochat.retrieval import Document, KnowledgeBase
from nanochat.retrieval.chunking import chunk_spans
from nanochat.retrieval.metrics import cover_match
from nanochat.retrieval.readers import READERS, Question, Reading
from nanochat.retrieval.readers.python_docs import python_items
from nanochat.sources import Reader as TextReader
from nanochat.sources import find_files
from nanochat.world import World
from tasks.world import SIZES, invented_words, world_documents, world_rows

KINDS = ["1hop", "2hop", "missing"]
FOUND = 20  # passages of a question in which an answer is looked for
FEW = 10  # bad rows that are always allowed, unless max_bad is 0


@dataclass(frozen=True)
class PrepareConfig:
    """Make a knowledge base, and questions about it for training and validation."""

    SHORT: ClassVar = {"i": "input", "o": "output"}

    mode: Annotated[
        Literal["example", "world", "files", "jsonl", "squad", "hotpotqa", "beir", "openqa"], "kind of the input"
    ]
    output: Annotated[str, "-o: folder to make"]
    input: Annotated[list | None, "-i: files or folders, as a,b; none for example and world"] = None
    texts: Annotated[str | None, "openqa: what to search, a .txt, .md, .jsonl or .parquet file, or a folder"] = None
    overwrite: Annotated[bool, "replace an output that is there"] = False
    retriever_type: Annotated[str, "what the knowledge base searches with: bm25, dense, hybrid, multihop, ..."] = "bm25"
    chunk_tokens: Annotated[int, "size of a chunk in words and marks; 0 = whole documents"] = 256
    chunk_overlap: Annotated[int | None, "of these, shared with the chunk before; none = an eighth, of openqa 0"] = None
    bm25: Annotated[dict | None, "options of the BM25 index, as {'k1': 0.9}"] = None
    dense: Annotated[dict | None, "options of the vector index, as {'encoder': 'PATH'}"] = None
    val_share: Annotated[float, "share of the questions for validation, by checksum of their ids"] = 0.1
    max_bad: Annotated[float, "share of bad rows from which on to stop; up to 10 always pass, unless it is 0"] = 0.01
    world_size: Annotated[str | None, f"training world: {', '.join(SIZES)}; none = small (example: nano)"] = None
    questions: Annotated[int | None, "training questions about the world; none = two for each entity"] = None
    kinds: Annotated[list, "of these questions (tasks/world.py), as 1hop,1hop,missing"] = field(
        default_factory=lambda: KINDS
    )
    wordings: Annotated[
        Literal["few", "many"], "to tell and to ask for a relation of the world: 3 and 2, or 10 and 9"
    ] = "few"
    val_world: Annotated[Literal["val", "test"], "of val.jsonl: val is worded as in training, test is not"] = "val"
    max_facts: Annotated[int | None, "facts in a document of the world at most; none = one article an entity"] = None
    seed: Annotated[int, "of the world"] = 0

    def __post_init__(self) -> None:
        made = self.mode in ("example", "world")
        if made == bool(self.input):
            raise ValueError(f"--mode {self.mode} " + ("takes no --input" if made else "needs --input=PATH"))
        if not self.output.strip() or not all(str(path).strip() for path in self.input or ()):
            raise ValueError(f"output={self.output!r}, input={self.input}: one is blank (an unset variable?): name it")
        if (self.mode == "openqa") != bool(self.texts):
            raise ValueError("--mode openqa needs --texts=PATH, and no other mode takes it")
        if self.mode == "openqa" and self.chunk_tokens < 1:
            raise ValueError(f"chunk_tokens={self.chunk_tokens}: a passage of --mode openqa needs a size")
        if not 0 <= self.val_share < 1 or not 0 <= self.max_bad <= 1:
            raise ValueError(f"val_share={self.val_share}, max_bad={self.max_bad}: expected shares from 0 to below 1")
        if (self.val_world, self.wordings) != ("val", "few") and not made:
            raise ValueError(
                f"--mode {self.mode} has no invented world: val_world and wordings are of example and world"
            )
        if self.world_size not in (None, *SIZES):
            raise ValueError(f"world_size={self.world_size}: expected {', '.join(SIZES)}")


def read_items(cfg: PrepareConfig, reading: Reading) -> Iterator[Document | Question]:
    """Everything the input holds, in its order."""
    if cfg.mode in ("example", "world"):
        yield from world_items(cfg, reading)
    if cfg.mode == "example":
        yield from python_items(reading)
    if cfg.mode == "openqa":
        yield from passages(cfg, reading)
    for path in cfg.input or ():
        yield from READERS[cfg.mode](Path(path).expanduser(), reading)


def passages(cfg: PrepareConfig, reading: Reading) -> Iterator[Document]:
    """The texts cut into passages, each a document of its own. A first line "# ..." is the title of all of a text."""
    assert cfg.texts is not None
    reader = TextReader("skip")
    for number, text in enumerate(reader.documents(find_files(cfg.texts, keep_split=False, flag="--texts").train)):
        first, _, rest = text.partition("\n")
        title, body = (first[2:].strip(), rest) if first.startswith("# ") and rest.strip() else ("", text)
        for i, (start, end) in enumerate(chunk_spans(body, cfg.chunk_tokens, cfg.chunk_overlap or 0)):
            yield from reading.document(Document(f"{number}-{i}", body[start:end], title))
    reading.notes["texts that cannot be read"] += reader.skipped


def supported(questions: Sequence[Question], kb: KnowledgeBase, reading: Reading) -> Iterator[Question]:
    """Questions with their evidence: any of the passages among the first FOUND that states an answer, as DPR takes them
    (arXiv 2004.04906). Those that have none are passed over."""
    hits = kb.search([question.row["question"] for question in questions], k=FOUND)
    for question, found in zip(questions, hits, strict=True):
        row = question.row
        gold = [hit.document.id for hit in found if cover_match(hit.document.text, row["answers"])]
        if gold:
            hop = {"query": row["question"], "answer": row["answers"][0], "gold_ids": gold}
            yield replace(question, row={**row, "gold_ids": gold, "hops": [hop]})
        else:
            reading.notes[f"questions that no passage of the first {FOUND} answers"] += 1


def world_items(cfg: PrepareConfig, reading: Reading) -> Iterator[Document | Question]:
    """A world for training and a smaller one, with other names (and, where it is test, told and asked in other words),
    for validation; both in one knowledge base."""
    size = n_entities_of(cfg)
    questions = 2 * size if cfg.questions is None else cfg.questions
    val_size = max(SIZES["nano"], round(cfg.val_share * size))
    val_questions = round(cfg.val_share * questions)
    for split, n_entities, n in (("train", size, questions), ("val", val_size, val_questions)):
        which = split if split == "train" else cfg.val_world
        world = World(cfg.seed, n_entities, which, "many" if cfg.wordings == "many" and which != "test" else None)
        for document in world_documents(world, max_facts=cfg.max_facts):
            yield from reading.document(document)
        for row in world_rows(world, n, kinds=cfg.kinds, seed=cfg.seed, max_facts=cfg.max_facts) if n else []:
            yield from reading.question(Question(row, f"{split} world", 0, split))


def n_entities_of(cfg: PrepareConfig) -> int:
    """Of the training world."""
    return SIZES[cfg.world_size or ("nano" if cfg.mode == "example" else "small")]


def names_to_exchange(cfg: PrepareConfig) -> list[str]:
    """The names of the training world and of a larger one, none of the validation's: training may put any in the place
    of any, so that no fact is worth remembering and no name is always the same tokens."""
    worlds = World(cfg.seed, n_entities_of(cfg), "train"), World(cfg.seed + 1, SIZES["base"], "train")
    return sorted({word for world in worlds for word in invented_words(world)})


def split_of(question: Question, val_share: float) -> Literal["train", "val"]:
    """What the source says; else by the checksum of the id, so that neither order nor other rows matter."""
    checksum = zlib.crc32(question.row["id"].encode())
    return question.split or ("val" if checksum < val_share * 2**32 else "train")


def with_gold(questions: Iterable[Question], reading: Reading) -> Iterator[Question]:
    """The questions whose gold documents were all read, or are their own; the others are listed."""
    for question in questions:
        own = {d["id"] for d in question.row.get("documents", [])}
        steps = [question.row, *question.row.get("hops", [])]
        gold = [id for step in steps for id in step.get("gold_ids", [])]
        missing = next((id for id in gold if not reading.has(id) and id not in own), None)
        if missing is None:
            yield question
        else:
            reading.drop(question, f"the gold document {missing!r} is not in the input")


def check_bad(reading: Reading, max_bad: float) -> None:
    """UserError for too many bad rows, quoting the first."""
    allowed = max(FEW, int(max_bad * reading.rows)) if max_bad else 0
    if reading.bad > allowed:
        raise UserError(
            f"{reading.bad} of {reading.rows} rows are bad, --max_bad={max_bad} allows {allowed}{said(reading)}"
        )


def said(reading: Reading) -> str:
    """The first bad rows, to end a message with."""
    return "".join(f"; {row}" for row in reading.first)


@contextlib.contextmanager
def new_folder(path: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place at the end. On an error it goes, and `path` stays.

    Between two renames at the end `path` is missing for a moment where it is replaced; a run killed right there has
    left the old one as .NAME.old, which the next run puts back. Of runs at once without `overwrite` the first stays.
    """
    if os.path.ismount(path):
        raise UserError(f"--output={path} is a mount point, which no folder can replace: name a folder in it")
    old, tmp = path.with_name(f".{path.name}.old"), path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.parent):
            if old.exists() and not path.exists():
                os.replace(old, path)
            check_output(path, overwrite)
            shutil.rmtree(old, ignore_errors=True)
        for stale in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
            if not _runs(stale.name.split(".")[-2]):
                shutil.rmtree(stale, ignore_errors=True)
        tmp.mkdir()
        yield tmp
        fsync_dir(tmp)
        with locked(path.parent):
            check_output(path, overwrite)  # another run may have made it meanwhile
            if path.exists():
                os.replace(path, old)
            os.replace(tmp, path)
            fsync_dir(path.parent)
            shutil.rmtree(old, ignore_errors=True)
    except OSError as e:
        raise_disk_error(e, path)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One run at a time looks at what lies in `folder` and renames it."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            print(f"note: {folder} is on a disk without locks: let only one run make --output there", file=sys.stderr)
        yield
    finally:
        os.close(lock)


def check_output(path: Path, overwrite: bool) -> None:
    """UserError for a path that must not be replaced."""
    if path.exists() and not path.is_dir():
        raise UserError(f"--output={path} is a file: name a folder")
    if path.exists() and any(path.iterdir()):
        if not (path / "dataset.json").is_file():
            raise UserError(f"--output={path} holds other files than this script's: name a new folder")
        if not overwrite:
            raise UserError(f"--output={path} is there already: add --overwrite to replace it, or name another")


def _runs(pid: str) -> bool:
    """Whether a process still runs, one that a temporary folder is named after."""
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with atomic_write(path, "w") as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def prepare(cfg: PrepareConfig, folder: Path, reading: Reading) -> dict[str, Any]:
    """Read everything, build the knowledge base, write the questions -> what dataset.json says."""
    questions: list[Question] = []

    def documents() -> Iterator[Document]:
        for item in read_items(cfg, reading):
            if isinstance(item, Document):
                yield item
            else:
                questions.append(item)
        if not reading.documents:
            raise UserError(f"no documents in the input of --mode {cfg.mode}{said(reading)}")

    overlap = cfg.chunk_tokens // 8 if cfg.chunk_overlap is None else cfg.chunk_overlap
    size, overlap = (0, 0) if cfg.mode == "openqa" else (cfg.chunk_tokens, overlap)  # passages are documents already
    kb = KnowledgeBase.build(
        tqdm(documents(), desc="documents", unit="", disable=not sys.stderr.isatty()),
        folder / "knowledge_base",
        retriever=cfg.retriever_type,
        chunk_tokens=size,
        chunk_overlap=overlap,
        bm25=cfg.bm25,
        dense=cfg.dense,
        progress=sys.stderr.isatty(),
    )
    n_chunks = kb.n_chunks
    if cfg.mode == "openqa":
        questions = list(supported(questions, kb, reading))
    kb.close()
    good = list(with_gold(questions, reading))
    check_bad(reading, cfg.max_bad)
    splits = {s: [q.row for q in good if split_of(q, cfg.val_share) == s] for s in ("train", "val")}
    for split, rows in splits.items():
        write_rows(folder / f"{split}.jsonl", rows)
    of_world = cfg.mode in ("example", "world")
    return {
        "format": 1,
        "config": asdict(cfg),
        "documents": reading.documents,
        "chunks": n_chunks,
        "questions": {split: len(rows) for split, rows in splits.items()},
        "unanswerable": sum(not q.row["answerable"] for q in good),
        "bad_rows": reading.bad,
        "passed_over": dict(reading.notes),
        "python": sys.version.split()[0],
        "invented_words": names_to_exchange(cfg) if of_world else [],
    }


def summary(made: dict[str, Any], reading: Reading, output: Path) -> str:
    questions = made["questions"]
    lines = [
        f"{made['documents']} documents in {made['chunks']} chunks; {questions['train']} training questions and "
        f"{questions['val']} for validation, {made['unanswerable']} of them without an answer"
    ]
    lines += [f"passed over: {n} {what}" for what, n in reading.notes.items() if n]
    if reading.bad:
        lines.append(f"{reading.bad} bad rows are listed in {output / 'bad_rows.jsonl'}{said(reading)}")
    return "\n".join([*lines, f"made {output}"])


def main(argv: list[str]) -> None:
    cfg = load_config(PrepareConfig, argv)
    output = Path(cfg.output).expanduser().resolve()  # what a link names is replaced, not the link
    with new_folder(output, cfg.overwrite) as folder:
        with open(folder / "bad_rows.jsonl", "w", encoding="utf-8") as listing:
            reading = Reading(listing)
            try:
                made = prepare(cfg, folder, reading)
            except UserError as e:
                if not reading.bad:
                    raise
                kept = output.with_name(f"{output.name}.bad_rows.jsonl")
                listing.flush()
                shutil.copyfile(listing.name, kept)
                raise UserError(f"{e}; all are listed in {kept}") from e
            listing.flush()
            os.fsync(listing.fileno())
        write_json(folder / "dataset.json", made)
    print(summary(made, reading, output))


if __name__ == "__main__":
    run_script(main)
