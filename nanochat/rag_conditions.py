"""What a question is shown under each condition of the RAG evaluation, and a model's predictions from it.

    evidence = gather(questions, kb, top_k=5)
    predictions = predict(model, tokenizer, questions, evidence.documents("rag"))

Every condition asks the same questions. All are searched once; what is "retrieved" is the same for every model. A
question without gold documents has what was retrieved for it in their place.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nanochat.config import UserError
from nanochat.device import shared_out
from nanochat.engine import Engine
from nanochat.rag import MAX_DOC_LENGTH, answer_from, shorten
from nanochat.rag_eval import VERDICTS, Prediction, Question, passage_text, prediction_from
from nanochat.retrieval.chunking import chunk_spans
from nanochat.retrieval.document import Chunk, Document, Hit
from nanochat.retrieval.metrics import cover_match, normalize

Hits = list[Hit]
# condition -> (whose model answers, what it is shown)
CONDITIONS = {
    "closed_book": ("baseline", "nothing"),
    "documents_untrained": ("baseline", "retrieved"),
    "rag": ("model", "retrieved"),
    "oracle": ("model", "gold"),
    "oracle_distractors": ("model", "gold and random"),
    "shuffled": ("model", "retrieved for another"),
}
TRIES = 20  # draws of a random passage for each one wanted


@dataclass(frozen=True)
class Evidence:
    """retrieved: the first top_k of each question. near: further hits, for distractors. gold: its gold passages."""

    questions: list[Question]
    top_k: int
    retrieved: list[Hits]
    near: list[Hits]
    gold: list[Hits]
    seed: int = 0

    def documents(self, condition: str) -> list[Hits]:
        """What each question is shown, best or first document first."""
        what = CONDITIONS[condition][1]
        if what == "nothing":
            return [[] for _ in self.questions]
        if what == "retrieved":
            return self.retrieved
        if what == "retrieved for another":
            return [self.of_another(i) for i in range(len(self.questions))]
        if what == "gold":
            return [gold or found for gold, found in zip(self.gold, self.retrieved, strict=True)]
        return [
            self.among(i, max(self.top_k, len(gold)), hard=False) if gold else found
            for i, (gold, found) in enumerate(zip(self.gold, self.retrieved, strict=True))
        ]

    def among(self, i: int, n: int, hard: bool = True) -> Hits:
        """The gold passages of question i among n, the first gold one at place i % n; fewer where distractors run out.

        hard: distractors are the best hits that are neither gold nor state an answer, then passages found for other
        questions; else only the latter.
        """
        question, gold, dice = self.questions[i], self.gold[i], random.Random(f"{self.seed} {i} {n}")
        assert len(gold) <= n, (i, n)
        chosen = {hit.document.id: hit for hit in self.near[i] if hard and may_distract(question, hit)}
        chosen = dict(list(chosen.items())[: n - len(gold)])
        judged: dict[tuple[str, int], bool] = {}  # of many draws most are of the same passages
        for _ in range(TRIES * n):
            pool = dice.choice(self.near)
            if len(chosen) == n - len(gold):
                break
            if not pool:
                continue
            hit = dice.choice(pool)
            key = hit.document.id, hit.chunk.start
            if key not in judged:
                judged[key] = may_distract(question, hit)
            if judged[key]:
                chosen[hit.document.id] = hit
        rest = [*gold[1:], *chosen.values()]
        dice.shuffle(rest)
        rest.insert(i % (len(rest) + 1), gold[0])
        return rest

    def of_another(self, i: int) -> Hits:
        """What was retrieved for a question that found no gold document of question i; where all of few questions found
        some, the most that one found without them."""
        n, gold = len(self.questions), self.questions[i].gold_ids
        most: Hits = []
        for j in ((i + step) % n for step in range(n // 2, n // 2 + n)):
            found = self.retrieved[j]
            other = [hit for hit in found if hit.document.id not in gold]
            if j != i and found and len(other) == len(found):
                return found
            most = max(most, other, key=len)
        return most


def may_distract(question: Question, hit: Hit) -> bool:
    """Whether a passage is neither gold nor one of the question's own, and states none of its answers."""
    known = question.gold_ids | {d.id for d in question.own}
    stated = [answer for answer in question.answers if normalize(answer) not in VERDICTS]  # "no" stands anywhere
    return hit.document.id not in known and not (stated and cover_match(passage_text(hit), stated))


def gather(
    questions: Sequence[Question], kb: Any, top_k: int = 5, retriever: str | None = None, far: int = 0, seed: int = 0
) -> Evidence:
    """Search all questions in one batch, once for what is shown and once, deeper, for `far` distractors."""
    texts = [q.text for q in questions]
    top_k = min(top_k, max(1, len(kb) + max((len(q.own) for q in questions), default=0)))  # all there is to show
    found = kb.search(texts, k=top_k, retriever=retriever)
    deep = top_k + max(far, top_k)
    near = kb.search(texts, k=deep, retriever=retriever)
    retrieved = [with_own(q, hits, kb, top_k) for q, hits in zip(questions, found, strict=True)]
    gold = [gold_passages(q, hits, kb) for q, hits in zip(questions, near, strict=True)]
    return Evidence(list(questions), top_k, retrieved, near, gold, seed)


def with_own(question: Question, hits: Hits, kb: Any, top_k: int) -> Hits:
    """The hits with the question's own documents, all together, where the first of them was found; top_k in all.

    None of those in the base was found: the hits as they are, for the search missed them. None is in the base: first.
    """
    own = {document.id: document for document in question.own}
    if not own:
        return hits
    places = [i for i, hit in enumerate(hits) if hit.document.id in own]
    if not places and any(kb.get(id) is not None for id in own):
        return hits
    rest = [hit for hit in hits if hit.document.id not in own]
    at = min(places[0] if places else 0, max(0, top_k - len(own)))  # all, also where the last hit is one of them
    mine = [whole(document, "own") for document in own.values()]
    return [replace(hit, rank=rank) for rank, hit in enumerate([*rest[:at], *mine, *rest[at:]][:top_k], 1)]


def gold_passages(question: Question, near: Hits, kb: Any) -> Hits:
    """One passage for each piece of evidence, each document once. UserError for a document that is nowhere."""
    own = {document.id: document for document in question.own}
    found = {hit.document.id: hit for hit in reversed(near)}
    passages: dict[str, Hit] = {}
    for group in question.gold:
        id = next((id for id in group if id in own or id in found), group[0])
        document = own.get(id) or (found[id].document if id in found else kb.get(id))
        if document is None:
            raise UserError(f"question {question.id}: its gold document {id!r} is not in {kb.path}")
        passages.setdefault(id, whole(document, "gold") if id in own else passage_of(question, document, kb))
    return list(passages.values())


def passage_of(question: Question, document: Document, kb: Any) -> Hit:
    """Of the document the chunk that states an answer (of the question, or of a hop), else its first."""
    chunking = kb.manifest["chunking"]
    spans = chunk_spans(document.text, chunking["chunk_tokens"], chunking["chunk_overlap"]) or [(0, 0)]
    chunks = [Chunk(start, end, document.text[start:end]) for start, end in spans]
    stating = (c for clue in question.clues for c in chunks if cover_match(c.text, [clue]))
    return Hit(document, next(stating, chunks[0]), 0.0, 1, "gold")


def whole(document: Document, source: str) -> Hit:
    return Hit(document, Chunk(0, len(document.text), document.text), 0.0, 1, source)


# ---- predictions ----


def predict(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    documents: Sequence[Hits],
    max_doc_length: int = MAX_DOC_LENGTH,
    max_new_tokens: int = 32,
    batch_size: int = 32,
    score: bool = True,
    tell: Callable[[int, int], None] = lambda done, n: None,
) -> list[Prediction]:
    """Greedy answers, those of like length together, in the order of the questions; ranks share them. Documents that do
    not fit the model's context are dropped from the last (Prediction.offered against .shown). score: with
    log-probabilities."""
    engine = Engine(model, tokenizer, tools=())
    short = Shortened(tokenizer, max_doc_length)
    shown = [[short(hit) for hit in hits] for hits in documents]
    lengths = [len(q.text) + sum(len(hit.chunk.text) for hit in s) for q, s in zip(questions, shown, strict=True)]

    def work(own: list[int]) -> list[Prediction]:
        order = sorted(own, key=lambda i: -lengths[i])
        made: dict[int, Prediction] = {}
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            texts, hits = [questions[i].text for i in batch], [shown[i] for i in batch]
            replies = answer_from(engine, texts, hits, max_doc_length, max_new_tokens, score=score)
            for i, reply in zip(batch, replies, strict=True):
                made[i] = prediction_from(questions[i], reply, [hit.document.id for hit in documents[i]])
            tell(len(made), len(order))
        return [made[i] for i in own]

    return shared_out(range(len(questions)), work)


class Shortened:
    """A hit with its passage as it stands in a prompt; each passage is cut once."""

    def __init__(self, tokenizer: Any, max_doc_length: int):
        self.tokenizer, self.max_doc_length = tokenizer, max_doc_length
        self.made: dict[tuple[str, str], Chunk] = {}

    def __call__(self, hit: Hit) -> Hit:
        key = hit.document.title, hit.chunk.text
        if key not in self.made:
            text = shorten(self.tokenizer, *key, self.max_doc_length)["text"]
            self.made[key] = Chunk(hit.chunk.start, hit.chunk.start + len(text), text)
        return replace(hit, chunk=self.made[key])
