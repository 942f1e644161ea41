"""Questions with long contexts of short documents, for chunks to be compressed in: tasks/rag.py's, filled up.

data = open_contexts(cfg, tokenizer, max_tokens)     # what nanochat/compress/train.py trains and is judged on
"""

from collections.abc import Sequence

from nanochat.compress.train import CompressConfig, Contexts
from nanochat.config import UserError
from nanochat.retrieval import KnowledgeBase
from nanochat.tokenizer import Tokenizer
from nanochat.world_names import Dice
from tasks.rag import RAG, Passage, Row, Shares, dataset_folder, exchangeable, hops, is_right, load_rows


class FullContexts(RAG):
    """RAG with top_k documents for every question that has an answer in the knowledge base, as far as they fit."""

    name = "FullContexts"

    def _documents(
        self, dice: Dice, row: Row, found: list[Passage], own: dict[str, Passage], case: str
    ) -> tuple[list[Passage], list[Passage]]:
        documents, evidence = super()._documents(dice, row, found, own, case)
        known = {id for ids in hops(row) for id in ids} | own.keys() | {p.id for p in documents}
        others = [p for p in found if p.id not in known and not p.holds(row["answers"])]
        more = self._distractors(dice, self.top_k - len(documents), row, others, known, row["answers"])
        return dice.shuffled([*documents, *more]), evidence


def open_contexts(cfg: CompressConfig, tokenizer: Tokenizer, max_tokens: int) -> Contexts:
    """Training questions, a share of them without evidence; validation questions, all with theirs.

    texts: what was found for training questions, of it what no validation question can be shown.
    """
    if not cfg.knowledge_base:
        raise UserError("missing --knowledge_base=DIR: make one by `python -m scripts.prepare_rag_dataset`")
    folder = dataset_folder(cfg.knowledge_base)
    kb = KnowledgeBase.open(folder / "knowledge_base")

    def task(split: str, shares: Shares, answerable: bool, invented: Sequence[str] = ()) -> FullContexts:
        rows = [row for row in load_rows(folder / f"{split}.jsonl") if row["answerable"] or not answerable]
        if not rows:
            raise UserError(f"{folder / split}.jsonl has no answerable question: make the set with more questions")
        return FullContexts(
            rows, kb, split, cfg.top_k, cfg.retriever_type, shares, cfg.seed, tokenizer=tokenizer,
            max_doc_length=cfg.max_doc_length, max_tokens=max_tokens, invented=invented,
        )  # fmt: skip

    invented = exchangeable(folder) if cfg.rename else ()
    train = task("train", Shares(1 - cfg.absent_share, cfg.absent_share, 0), answerable=False, invented=invented)
    val = task("val", Shares(1, 0, 0), answerable=True)
    shown = {id for id, _ in val.passages} | {id for row in val.rows for ids in hops(row) for id in ids}
    texts = [(p.title, p.text) for p in train.passages.values() if p.id not in shown]
    return Contexts(train, val, texts, is_right, kb)
