"""Answer questions from the documents of a knowledge base: retrieve, put what fits into the prompt, write, read.

    reply = answer(model, tokenizer, kb, "Where was Ada born?", top_k=5)
    print(reply.text, [(hit.rank, hit.document.title) for hit in reply.cited])

The one place that says how a question with documents looks, for training as for answering: the user turn is the
question, the documents, numbered from 1, and the question again; the answer is its text, then its citations, or the one
token that abstains. A question before the documents tells a recurrent layer what to keep of them (JRT, arXiv
2407.05483); one behind them is read as further questions about them are, and learnt from those too. A model that is to
cite first can learn to read whatever document its number names and to guess the number: then nothing in its answers
teaches it to choose a document (LOG 2026-11-22).

Room is given to the question, then to documents by rank, then to earlier turns. A document is shortened to
max_doc_length ids, whole sentences first.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nanochat.config import UserError
from nanochat.conversation import WRAPPED, plain_text, render_documents, shown_text
from nanochat.engine import Engine
from nanochat.retrieval import KnowledgeBase
from nanochat.retrieval.document import Hit
from nanochat.tools import Call

MIN_DOC_LENGTH = 16
MAX_DOC_LENGTH = 128  # ids of one document; five of them and a question fit a context of 1,024
MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Answer:
    """What a model made of a question. text is empty where it abstained.

    hits: what it was shown; hits[n - 1] is document [n], those of its own searches after those of the prompt. n_found:
    documents there were for the prompt, whether they fitted or not.
    citations: the numbers it named, in order, also of documents that do not exist. trace: its calls of tools.
    logprob: mean log-probability of the ids it wrote, where asked for. well_formed: as in `parse`.
    """

    text: str
    citations: tuple[int, ...]
    hits: list[Hit]
    abstained: bool
    trace: list[Call] = field(default_factory=list)
    prompt_tokens: int = 0
    logprob: float | None = None
    well_formed: bool = True
    n_found: int = 0

    @property
    def cited(self) -> list[Hit]:
        """The documents cited, each once, in the order of citation."""
        return [self.hits[n - 1] for n in dict.fromkeys(self.citations) if n <= len(self.hits)]


# ---- conversations ----


def question_conversation(
    question: str, documents: Sequence[dict[str, str]], history: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """The question as the last message. Of `history`, earlier messages, the plain texts are kept: old documents would
    take the room of new ones, and their numbers."""
    asked = [{"type": "text", "text": question}]
    content = around(asked, documents) if documents else question
    return {"messages": [*map(_plain, history), {"role": "user", "content": content}]}


def around(asked: list[dict[str, Any]], documents: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    """The parts of a user turn that asks `asked` about documents."""
    return [*asked, {"type": "docs", "documents": list(documents)}, *asked]


def answer_parts(answer: str, citations: Iterable[int] = (), abstain: bool = False) -> list[dict[str, Any]]:
    """The content of the assistant's message that is trained on.

    The answer begins with a space, so that its ids are those it has within a document: to read is then to copy them,
    where "Vitrex pie" without it is other ids (V|it|rex) than in a sentence ( Vit|rex) and every name's first syllable
    has to be learnt apart (LOG 2026-11-21).
    """
    if abstain:
        return [{"type": "abstain"}]
    return [{"type": "text", "text": f" {answer.lstrip()}"}, *({"type": "cite", "n": n} for n in citations)]


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "content": plain_text(message["content"])}


# ---- what fits ----


def shorten(tokenizer: Any, title: str, text: str, max_doc_length: int) -> dict[str, str]:
    """-> {"title", "text"} that are at most max_doc_length ids in a prompt: whole sentences, or, where the first alone
    is longer, as many words of it as fit. A title takes a quarter at most."""
    if max_doc_length < MIN_DOC_LENGTH:
        raise UserError(f"max_doc_length={max_doc_length}: expected at least {MIN_DOC_LENGTH} ids")
    longest = max_doc_length * int(tokenizer.token_bytes.max())  # no text of more bytes can fit: spares reading 1 MB
    title = _words(tokenizer, " ".join(title[:longest].split()), max_doc_length // 4)
    document = {"title": title, "text": text[:longest].strip()}
    number = 99  # the longest there is in practice
    ids = render_documents(tokenizer, [document], number, max_doc_length)
    if ids:
        return {"title": title, "text": shown_text(tokenizer.decode(ids[1:]), number, title).rstrip()}
    head_ids = len(render_documents(tokenizer, [{**document, "text": ""}], number))
    return {"title": title, "text": _words(tokenizer, document["text"], max_doc_length - head_ids)}


def _words(tokenizer: Any, text: str, limit: int) -> str:
    """The start of a text that has at most `limit` ids, up to the end of a word where there is one."""
    ids = tokenizer.encode_ordinary(text)
    if len(ids) <= limit:
        return text
    kept = text[: len(tokenizer.decode(ids[:limit], errors="ignore"))]
    kept = kept if text[len(kept)].isspace() else (kept.rsplit(None, 1)[0] if len(kept.split()) > 1 else kept)
    while len(tokenizer.encode_ordinary(kept)) > limit:  # a cut text may be split into ids otherwise
        kept = kept[:-1]
    return kept.rstrip()


def shortened(tokenizer: Any, hits: Iterable[Hit], max_doc_length: int) -> list[dict[str, str]]:
    """Hits as the documents of a prompt."""
    return [shorten(tokenizer, hit.document.title, hit.chunk.text, max_doc_length) for hit in hits]


def fit(
    tokenizer: Any, question: str, hits: Sequence[Hit], budget: int, max_doc_length: int = MAX_DOC_LENGTH
) -> list[Hit]:
    """The first hits that fit a prompt of at most `budget` ids with the question. UserError where the question alone
    does not."""
    return list(hits[: n_fitting(tokenizer, question, shortened(tokenizer, hits, max_doc_length), budget)])


def n_around(tokenizer: Any, question: str) -> int:
    """The ids that documents add to a question beside their own: two around them, and it is asked again."""
    return 2 + len(tokenizer.encode_ordinary(question))


def n_fitting(tokenizer: Any, question: str, documents: Sequence[dict[str, str]], budget: int, system: str = "") -> int:
    """How many of the documents, counted from the first, fit a prompt of `budget` ids with question and system text."""
    told = f"{system}\n\n{question}" if system else question
    used = len(tokenizer.render_for_completion(question_conversation(told, [])))
    if used > budget:
        raise UserError(
            f"the question needs {used} ids and there is room for {budget}: shorten it, or lower max_new_tokens"
        )
    used += n_around(tokenizer, question)
    for n, document in enumerate(documents):
        used += len(render_documents(tokenizer, [document], n + 1))
        if used > budget:
            return n
    return len(documents)


def prompt_ids(
    tokenizer: Any,
    question: str,
    documents: Sequence[dict[str, str]],
    budget: int,
    history: Sequence[dict[str, Any]] = (),
) -> list[int]:
    """Ids up to and with <|assistant_start|>: of the history (user and assistant in turn) the last exchanges that fit
    beside question and documents."""
    assert len(history) % 2 == 0, "whole exchanges"
    ids: list[int] = []
    for start in range(0, len(history) + 1, 2):
        ids = tokenizer.render_for_completion(question_conversation(question, documents, history[start:]))
        if len(ids) <= budget:
            break
    return ids


# ---- what a model wrote ----


def parse(ids: Sequence[int], tokenizer: Any) -> tuple[str, tuple[int, ...], bool, bool]:
    """The ids after <|assistant_start|>, without the one that ended them -> (text, citations, abstained, well_formed).

    Searches, calls of tools and what came back are no part of the text. Well-formed: every special token is closed and
    where it may be, each citation is a number, and there is either a text or the one token that abstains.
    """
    names = {i: name for name, i in tokenizer.special_ids.items()}
    closing = {opening: close for opening, close, _ in WRAPPED.values()}
    text, citations, abstained, sound = list[int](), list[int](), False, True
    rest = iter(ids)
    for token in rest:
        name = names.get(token)
        if name is None:
            text.append(token)
        elif name == "<|abstain|>":
            abstained = True
        elif name in closing:
            inside, closed = _until(rest, tokenizer.encode_special(closing[name]))
            sound = sound and closed
            if name == "<|cite_start|>":
                said = tokenizer.decode(inside, errors="replace").strip()
                number = int(said) if said.isascii() and said.isdecimal() and len(said) < 6 else 0
                citations += [number] * (number > 0)
                sound = sound and number > 0
        else:
            sound = False
    said = tokenizer.decode(text, errors="replace").strip()
    sound = sound and abstained != bool(said) and not (abstained and citations)
    return ("" if abstained else said), tuple(citations), abstained, sound


def _until(rest: Iterable[int], end: int) -> tuple[list[int], bool]:
    """Take ids up to `end` -> (those before it, whether it came)."""
    inside = []
    for token in rest:
        if token == end:
            return inside, True
        inside.append(token)
    return inside, False


# ---- answering ----


def open_base(given: str | Path) -> KnowledgeBase:
    """The knowledge base itself, by folder or opensearch:// address, or that of a folder by prepare_rag_dataset."""
    if str(given).startswith("opensearch://"):
        return KnowledgeBase.open(given)
    folder = Path(given).expanduser()
    return KnowledgeBase.open(folder / "knowledge_base" if (folder / "knowledge_base").is_dir() else folder)


def answer(
    model: Any,
    tokenizer: Any,
    kb: Any,
    question: str,
    top_k: int = 5,
    retriever: str | None = None,
    max_doc_length: int = MAX_DOC_LENGTH,
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float = 0.0,
    where: dict[str, Any] | None = None,
    history: Sequence[dict[str, Any]] = (),
) -> Answer:
    """Answer one question from the documents of a knowledge base (nanochat.retrieval.KnowledgeBase)."""
    engine = Engine(model, tokenizer)
    [reply] = answer_batch(
        engine, kb, [question], top_k, retriever, max_doc_length, max_new_tokens, temperature, where, [history]
    )
    return reply


def answer_batch(
    engine: Engine,
    kb: Any,
    questions: Sequence[str],
    top_k: int = 5,
    retriever: str | None = None,
    max_doc_length: int = MAX_DOC_LENGTH,
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float = 0.0,
    where: dict[str, Any] | None = None,
    histories: Sequence[Sequence[dict[str, Any]]] | None = None,
    score: bool = False,
) -> list[Answer]:
    """One search for all questions, then one batch of answers; `answer_from` says the rest. Where nothing is found the
    model is not asked: it has nothing to answer from, so that is an abstention."""
    hits = kb.search(list(questions), k=top_k, retriever=retriever, where=where) if questions else []
    replies = [Answer("", (), [], abstained=True) for _ in questions]
    rows = [i for i, own in enumerate(hits) if own]
    asked, found = [questions[i] for i in rows], [hits[i] for i in rows]
    earlier = None if histories is None else [histories[i] for i in rows]
    made = answer_from(engine, asked, found, max_doc_length, max_new_tokens, temperature, earlier, score)
    for i, reply in zip(rows, made, strict=True):
        replies[i] = reply
    return replies


def answer_from(
    engine: Engine,
    questions: Sequence[str],
    hits: Sequence[Sequence[Hit]],
    max_doc_length: int = MAX_DOC_LENGTH,
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float = 0.0,
    histories: Sequence[Sequence[dict[str, Any]]] | None = None,
    score: bool = False,
) -> list[Answer]:
    """Answer each question from the hits given for it; none is the plain question. Hits that do not fit the engine's
    context beside max_new_tokens are left out from the last, and out of Answer.hits. score: fill in logprob, for one
    forward more. UserError where a question alone is too long."""
    budget, tokenizer = engine.max_context - max_new_tokens, engine.tokenizer
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens}: expected at least 1")
    if not questions:
        return []
    shown: list[list[Hit]] = []
    prompts = []
    for question, found, history in zip(questions, hits, histories or [()] * len(questions), strict=True):
        documents = shortened(tokenizer, found, max_doc_length)
        n = n_fitting(tokenizer, question, documents, budget)
        shown.append(list(found[:n]))
        prompts.append(prompt_ids(tokenizer, question, documents[:n], budget, history))
    traces: list[list[Call]] = []
    rows, masks = engine.generate_batch(prompts, max_tokens=max_new_tokens, temperature=temperature, traces=traces)
    logprobs = mean_logprobs(engine.model, rows, masks) if score else [None] * len(rows)
    return [
        _answer(tokenizer, row, len(prompt), [*own, *_searched(tokenizer, trace)], trace, logprob, len(found))
        for row, prompt, own, found, trace, logprob in zip(rows, prompts, shown, hits, traces, logprobs, strict=True)
    ]


def _answer(
    tokenizer: Any,
    row: list[int],
    n_prompt: int,
    hits: list[Hit],
    trace: list[Call],
    logprob: float | None,
    n_found: int,
) -> Answer:
    text, citations, abstained, well_formed = parse(row[n_prompt:], tokenizer)
    return Answer(text, citations, hits, abstained, trace, n_prompt, logprob, well_formed, n_found)


def _searched(tokenizer: Any, trace: list[Call]) -> list[Hit]:
    """What the model's own searches showed it, in the order of their numbers."""
    start = tokenizer.encode_special("<|search_start|>")
    return [hit for call in trace if call.tool.start == start for hit in call.result or ()]


@torch.inference_mode()
def mean_logprobs(model: Any, rows: list[list[int]], masks: list[list[int]]) -> list[float | None]:
    """Mean log-probability of each row's ids with mask 1, at temperature 1; None for a row that has none."""
    T = max(map(len, rows))
    x = torch.zeros(len(rows), T, dtype=torch.long)
    y = torch.full((len(rows), T), -1)
    for r, (row, mask) in enumerate(zip(rows, masks, strict=True)):
        x[r, : len(row)] = torch.tensor(row)
        y[r, : len(row) - 1] = torch.tensor([i if m else -1 for i, m in zip(row[1:], mask[1:], strict=True)])
    nats = model(x.to(model.device), y.to(model.device), loss_reduction="none").double().cpu()  # (B, T)
    return [-float(n[t >= 0].mean()) if bool((t >= 0).any()) else None for n, t in zip(nats, y, strict=True)]
