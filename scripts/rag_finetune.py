"""Teach a chat model to answer from documents, to cite them, and to abstain where they hold no answer.

    python -m scripts.prepare_rag_dataset --mode world --output rag_data --max_facts 2
    python -m scripts.rag_finetune --knowledge_base rag_data
    torchrun --standalone --nproc_per_node=8 -m scripts.rag_finetune configs/rag_hybrid_d20.py --knowledge_base rag_data

Continues a model of any backbone. --knowledge_base is the folder made by prepare_rag_dataset: train.jsonl is trained
on, val.jsonl judges. tasks/rag.py says how documents are chosen; a share of plain conversations is mixed in, so that
what was learnt before stays. The model, rates and sizes are inherited as in chat_sft.

On validation the model also answers eval_questions, greedily, always the same: half of them with their gold document,
half where the documents shown hold no answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch

from nanochat.common import read_json, run_script
from nanochat.config import UserError, load_config
from nanochat.conversation import plain_text
from nanochat.device import all_reduce_sum
from nanochat.engine import Engine
from nanochat.finetune import FinetuneConfig, Start, finish, make_loop, open_batches, start_from, val_rows, validate
from nanochat.rag import MAX_DOC_LENGTH, parse
from nanochat.report import log_stage, report_dir
from nanochat.retrieval import KnowledgeBase
from nanochat.train import Loop, compile_model, memory_advice
from tasks.common import Task
from tasks.mixtures import DEFAULT, MIXTURES, with_chat
from tasks.rag import RAG, Row, Shares, dataset_folder, exchangeable, is_right, load_rows

SECTION = "rag_finetuning"
ANSWER_TOKENS = 32  # of an answer in validation
BATCH = 16  # questions answered together
SHOWN = 6  # answers printed at the end


@dataclass(frozen=True)
class RagFinetuneConfig(FinetuneConfig):
    """Fine-tune on questions with documents. Sizes are counts, lengths tokens; none = as the checkpoint was trained."""

    SHORT: ClassVar = {**FinetuneConfig.SHORT, "chat_tasks": "tasks"}

    knowledge_base: Annotated[str, "folder made by prepare_rag_dataset"] = ""
    retriever_type: Annotated[str | None, "simple, bm25, dense, hybrid, ...; none = the knowledge base's own"] = None
    top_k: Annotated[int, "documents of a question at most; 1 .. top_k are shown"] = 5
    max_doc_length: Annotated[int, "tokens of a document, title and number included"] = MAX_DOC_LENGTH
    absent_share: Annotated[float, "of answerable questions: those whose gold documents are left out"] = 0.2
    retrieved_share: Annotated[float, "of answerable questions: those shown what was retrieved, as it is"] = 0.2
    variants: Annotated[int, "times an epoch asks each question, with other documents"] = 4
    follow_ups: Annotated[int, "further questions about the documents of a conversation, at most"] = 6
    rename: Annotated[bool, "exchange the invented names of a world for each other in every conversation"] = True
    tasks: Annotated[list | None, "--chat_tasks: the plain conversations (tasks/mixtures.py); none = embedded"] = None
    chat_share: Annotated[float, "of all conversations: plain ones"] = 0.15
    eval_questions: Annotated[int, "questions answered at each validation; 0 = none"] = 128
    source: Annotated[str, "stage to start from: sft, mid, rl or base"] = "sft"
    init_lr_frac: Annotated[float, "all rates are multiplied by it"] = 1.0
    warmdown_ratio: Annotated[float, "share of the run over which rates fall"] = 0.5
    eval_every: Annotated[int, "steps between validations; 0 = only at start and end, -1 = never"] = 100
    seed: Annotated[int, "of the order of the conversations and of their documents"] = 44

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.follow_ups < 0:
            raise ValueError(f"follow_ups={self.follow_ups}: expected 0 or more")
        if not 0 <= self.chat_share < 1:
            raise ValueError(f"chat_share={self.chat_share}: expected 0 or more and less than 1")
        assert self.shares

    @property
    def shares(self) -> Shares:
        """UserError where they are none."""
        return Shares(round(1 - self.absent_share - self.retrieved_share, 9), self.absent_share, self.retrieved_share)


@dataclass(frozen=True)
class Data:
    """What is trained on, what the loss is measured on, and what is asked at each validation."""

    train: Task
    val: Task
    asked: list[dict[str, Any]]
    recall: float
    told: str


def load_data(cfg: RagFinetuneConfig, start: Start, kb: KnowledgeBase, rows: dict[str, list[Row]]) -> Data:
    def task(split: str, rows: Sequence[Row], shares: Shares, **more: Any) -> RAG:
        return RAG(
            rows, kb, split, cfg.top_k, cfg.retriever_type, shares, cfg.seed, tokenizer=start.tokenizer,
            max_doc_length=cfg.max_doc_length, max_tokens=start.T + 1, **more,
        )  # fmt: skip

    invented = exchangeable(dataset_folder(cfg.knowledge_base)) if cfg.rename else ()
    train = task(
        "train", rows["train"], cfg.shares, variants=cfg.variants, follow_ups=cfg.follow_ups, invented=invented
    )
    val = task("val", rows["val"], cfg.shares)
    names = cfg.names(MIXTURES, DEFAULT)
    n = cfg.eval_questions // 2
    answerable = [row for row in rows["val"] if row["answerable"]][:n]
    gold, absent = task("val", answerable, Shares(1, 0, 0)), task("val", rows["val"][:n], Shares(0, 1, 0))
    asked = [c for c in (*gold, *absent) if len(start.tokenizer.render_for_completion(c)) < start.T]
    recall = val.recall()
    cut = len(gold) - sum(conversation["answerable"] for conversation in gold)
    told = (
        f"questions: {len(rows['train'])} x {cfg.variants} to train on, {len(rows['val'])} to validate, of which "
        f"{len(asked)} are answered at each validation, {len(gold) - cut} of them with gold documents ({cut} had their "
        f"answer cut off by max_doc_length={cfg.max_doc_length}); retrieval recall@{cfg.top_k} {recall:.3f}"
    )
    train, val_mix = (with_chat(t, split, names, cfg.chat_share) for split, t in (("train", train), ("val", val)))
    return Data(train, val_mix, asked, recall, told)


# ---- reading, measured while training ----


def read(start: Start, asked: Sequence[dict[str, Any]]) -> tuple[dict[str, float], list[str]]:
    """Greedy answers to the questions asked, dealt to the ranks -> figures, and this rank's answers.

    reading_accuracy: exact match where gold documents are shown; citation_accuracy: of these, cites just them;
    abstains_absent: of questions whose documents hold no answer; abstains_gold: of those whose documents do, wrongly.
    """
    ranks, tokenizer = start.run.ranks, start.tokenizer
    own = asked[ranks.rank :: ranks.world_size]
    sums = torch.zeros(6, dtype=torch.float64)  # as `judged` counts
    engine, texts = Engine(start.model, tokenizer, tools=()), list[str]()
    start.model.eval()
    for first in range(0, len(own), BATCH):
        batch = own[first : first + BATCH]
        prompts = [tokenizer.render_for_completion(conversation) for conversation in batch]
        rows, _ = engine.generate_batch(prompts, max_tokens=ANSWER_TOKENS, temperature=0.0)
        for conversation, prompt, row in zip(batch, prompts, rows, strict=True):
            sums += judged(conversation, row[len(prompt) :], tokenizer)
            texts.append(tokenizer.decode(row[len(prompt) :], errors="replace"))
    start.model.train()
    sums = all_reduce_sum(sums.to(start.run.device)) if ranks.world_size > 1 else sums
    gold, right, cited, silent, absent, abstained = sums.tolist()
    found = {"reading_accuracy": (right, gold), "citation_accuracy": (cited, gold), "abstains_gold": (silent, gold),
             "abstains_absent": (abstained, absent)}  # fmt: skip
    return {name: part / whole for name, (part, whole) in found.items() if whole}, texts


def judged(conversation: dict[str, Any], ids: list[int], tokenizer: Any) -> torch.Tensor:
    """(6,) of zeros and ones: with gold documents asked, right, cited, abstained; without them asked, abstained."""
    _, citations, abstained, _ = parse(ids, tokenizer)
    if not conversation["answerable"]:
        return torch.tensor([0, 0, 0, 0, 1, abstained], dtype=torch.float64)
    right = is_right(conversation, tokenizer.decode(ids, errors="replace"))
    cited = sorted(set(citations)) == sorted(conversation["gold"])
    return torch.tensor([1, right, cited, abstained, 0, 0], dtype=torch.float64)


def validate_reading(start: Start, loop: Loop, data: Data) -> None:
    """Ask, log, and keep first and last figures in the checkpoint's meta; at the end print some answers."""
    if not data.asked:
        return
    found, texts = read(start, data.asked)
    found["retrieval_recall"] = data.recall
    loop.log(**found)
    loop.meta |= {"reading": found}
    loop.meta.setdefault("reading_before", found)
    if loop.step == loop.num_iterations:
        for i in range(0, len(texts), max(1, len(texts) // SHOWN)):
            asked = data.asked[i * start.run.ranks.world_size]
            expected = f"[{asked['gold'][0]}] {asked['answers'][0]}" if asked["answerable"] else "abstention"
            start.run.print(f"sample: {_question(asked)!r}, expected {expected}: {texts[i]!r}")


def _question(conversation: dict[str, Any]) -> str:
    return plain_text(conversation["messages"][-2]["content"])


def report(start: Start, loop: Loop, data: Data) -> None:
    """Add the figures of reading to the section that `finish` has written."""
    found, before = loop.meta.get("reading", {}), loop.meta.get("reading_before", {})
    metrics: dict[str, Any] = {"questions": data.told.removeprefix("questions: ")}
    for name, value in found.items():
        metrics |= {name: value, f"{name} before": before[name]}
    section = read_json(report_dir() / f"{SECTION}.json")
    plots = [report_dir() / name for name in section["plots"]]
    log_stage(SECTION, metrics, section["text"], plots, duration_s=section["duration_s"], merge=True,
              summary=[name for name in ("reading_accuracy", "abstains_absent") if name in found])  # fmt: skip


def open_data(cfg: RagFinetuneConfig) -> tuple[KnowledgeBase, dict[str, list[Row]]]:
    if not cfg.knowledge_base:
        raise UserError("missing --knowledge_base=DIR: make one by `python -m scripts.prepare_rag_dataset`")
    folder = dataset_folder(cfg.knowledge_base)
    rows = {split: load_rows(folder / f"{split}.jsonl") for split in ("train", "val")}
    for split, of_split in rows.items():
        if not any(row["answerable"] for row in of_split):
            raise UserError(f"{folder / split}.jsonl has no answerable question: make the set with more questions")
    return KnowledgeBase.open(folder / "knowledge_base"), rows


def main(argv: list[str]) -> None:
    cfg = load_config(RagFinetuneConfig, argv)
    kb, questions = open_data(cfg)
    start = start_from(cfg, "rag")
    data = load_data(cfg, start, kb, questions)
    start.run.print(data.told)
    loop, rows = make_loop(start, data.train), val_rows(start, data.val)
    cursor = loop.begin(cfg.resume)  # where to go on in the conversations
    forward = compile_model(start.model) if cfg.compile else start.model
    with open_batches(start, data.train, cursor) as batches, memory_advice(start.B, start.T):
        for step in loop:
            if step.due(cfg.eval_every) or (step.number == 0 and cfg.eval_every >= 0):
                validate(start, loop, rows)
                validate_reading(start, loop, data)
            if step.due(cfg.save_every) and not step.first and not cfg.dry_run:
                loop.save(batches.place())
            if step.last:
                break
            for _ in loop.forwards():
                batch = next(batches)
                loss = forward(batch.x, batch.y, doc=batch.doc, loss_reduction="sum")
                loop.backward(loss, batch.tokens)
            loop.update()
    finish(start, loop, SECTION, ["RAG", *cfg.names(MIXTURES, DEFAULT)], batches.place())
    if start.run.ranks.main and not cfg.dry_run:
        report(start, loop, data)


if __name__ == "__main__":
    run_script(main)
