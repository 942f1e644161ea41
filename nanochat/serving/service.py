"""What the routes share: the schedulers, the knowledge base, the encoder, and how a body becomes requests."""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from nanochat.config import UserError
from nanochat.model_encoder import ModelEncoder, by_length
from nanochat.retrieval import RETRIEVERS
from nanochat.retrieval.document import Hit
from nanochat.retrieval.manifest import MissingFile
from nanochat.serving import openai_api as api
from nanochat.serving import prompts
from nanochat.serving.exchange import Exchange, Refusal, unknown
from nanochat.serving.metrics import Metrics
from nanochat.serving.prompts import Prompt
from nanochat.serving.request import Request
from nanochat.serving.scheduler import Scheduler

MAX_HITS = 50


@dataclass(frozen=True)
class Settings:
    """What a server is told at its start; scripts/chat_web.py says what each means."""

    model: str
    default_tokens: int = 256
    max_tokens: int | None = None
    temperature: float = 0.6
    top_k: int | None = 50
    request_seconds: float = 120.0
    body_seconds: float = 10.0
    max_body_bytes: int = 1_000_000
    max_inputs: int = 256
    api_key: str | None = None
    hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    retriever: str | None = None
    documents: int = 5
    max_doc_length: int = 128


class Service:
    def __init__(self, schedulers: Sequence[Scheduler], settings: Settings, kb: Any = None) -> None:
        """One scheduler a device; all serve the same model."""
        self.schedulers, self.settings, self.kb = list(schedulers), settings, kb
        self.engine, self.metrics, self.created = self.schedulers[0].engine, Metrics(), api.now()
        self.tokenizer, self.context = self.engine.tokenizer, self.engine.max_context
        self.encoding, self.refreshing = threading.Lock(), threading.Lock()

    @property
    def model_card(self) -> dict[str, Any]:
        card = {"id": self.settings.model, "object": "model", "created": self.created, "owned_by": "nanochat"}
        return {**card, "max_model_len": self.context, "retrieval": self.kb is not None}

    def exchange(self) -> Exchange:
        """With the scheduler that has least to do."""
        scheduler = min(self.schedulers, key=lambda s: s.counts.rows + len(s.waiting))
        return Exchange(scheduler, self.metrics)

    def check_model(self, model: str | None) -> None:
        if model is not None and model != self.settings.model:
            raise unknown(model)

    # ---- chat ----

    def chat(self, body: api.ChatBody, exchange: Exchange) -> tuple[Request, Prompt]:
        """May search, so not for the event loop."""
        self.check_model(body.model)
        body.unsupported()
        functions = body.functions(self.tokenizer)
        turns = prompts.conversation(body.messages, functions)
        n_tokens = self.n_tokens(body.max_completion_tokens or body.max_tokens)
        prompt = self.sourced(body, turns, n_tokens) or prompts.chat_prompt(self.tokenizer, turns)
        begin = body.begin(functions, self.tokenizer)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        return self.request(body, prompt.ids, n_tokens, exchange.listener(0), logprobs, functions, begin), prompt

    def sourced(self, body: api.ChatBody, turns: list[dict[str, Any]], n_tokens: int) -> Prompt | None:
        """The prompt with documents, or None where none are asked for or the last message is no question."""
        if self.kb is None and body.retrieval:
            raise UserError("retrieval: this server has no knowledge base (it is started with --knowledge_base)")
        if self.kb is None or body.retrieval is False or not prompts.question_of(turns).strip():
            return None
        options = body.retrieval if isinstance(body.retrieval, dict) else {}
        if options.get("enabled") is False:
            return None
        hits = self.search(prompts.question_of(turns), options)
        budget = self.context - min(n_tokens, self.context // 2)  # a long answer is clipped before its documents are
        return prompts.sourced_prompt(self.tokenizer, turns, hits, budget, self.settings.max_doc_length)

    def search(self, question: str, options: dict[str, Any]) -> list[Hit]:
        """options: "top_k" documents by "retriever". Retrievers go by name: "package.module:Class" would import."""
        k, retriever = options.get("top_k", self.settings.documents), options.get("retriever", self.settings.retriever)
        if type(k) is not int or not 1 <= k <= MAX_HITS:
            raise UserError(f"retrieval.top_k: expected 1 to {MAX_HITS}")
        if retriever not in (None, self.settings.retriever, *RETRIEVERS):  # a list or object has no hash
            raise UserError(f"retrieval.retriever: choose from {', '.join(RETRIEVERS)}")
        own = retriever in (None, self.settings.retriever)
        with self.base_at_fault(UserError), self.refreshing:
            self.kb.refresh()
        with self.base_at_fault(UserError if own else MissingFile):  # another may need an index that the base has not
            return self.kb.search(question, k=k, retriever=retriever)

    @contextlib.contextmanager
    def base_at_fault(self, error: type[Exception]) -> Iterator[None]:
        """What goes wrong with the knowledge base itself is no mistake of the client's."""
        try:
            yield
        except (error, OSError) as e:
            raise Refusal(503, f"the knowledge base cannot be searched: {e}", "knowledge_base") from e

    def n_tokens(self, asked: int | None) -> int:
        limit = self.settings.max_tokens or self.context
        if asked is not None and asked > limit and self.settings.max_tokens is not None:
            raise UserError(f"max_tokens={asked}: this server writes at most {limit}")
        return min(self.settings.default_tokens, limit) if asked is None else min(asked, limit)

    def request(
        self, body: api.SamplingBody, ids: list[int], n_tokens: int, listener: Any, logprobs: int | None = None,
        functions: Any = None, begin: Sequence[int] = (),
    ) -> Request:  # fmt: skip
        if len(ids) + len(begin) >= self.context:
            message = f"the prompt is {len(ids)} tokens and the context holds {self.context}, answer included"
            raise Refusal(400, f"{message}: shorten it", "context_length_exceeded", "messages")
        s = self.settings
        return Request(
            ids, n_tokens, listener, body.n or 1, body.sampling(s.temperature, s.top_k), body.stops, logprobs,
            functions, list(begin), s.request_seconds, bool(body.stream),
        )  # fmt: skip

    # ---- completions ----

    def complete(self, body: api.CompletionBody, exchange: Exchange) -> list[Request]:
        self.check_model(body.model)
        body.unsupported()
        rows = body.prompts(self.tokenizer)
        most = min(self.settings.max_inputs, exchange.scheduler.limits.most(body.n or 1))
        if not 1 <= len(rows) <= most:
            raise UserError(f"{len(rows)} prompts, each answered {body.n or 1} times: expected 1 to {most} prompts")
        n = self.n_tokens(body.max_tokens)
        return [self.request(body, ids, n, exchange.listener(i), body.logprobs) for i, ids in enumerate(rows)]

    # ---- embeddings ----

    @cached_property
    def encoder(self) -> ModelEncoder:
        return ModelEncoder(self.engine.model, self.tokenizer)

    @torch.inference_mode()
    def embed(self, body: api.EmbeddingBody) -> tuple[np.ndarray, int]:
        """-> (n, D) float32 of length 1, and ids read. One call at a time; decoding goes on beside it."""
        self.check_model(body.model)
        rows = api.token_rows(body.input, self.tokenizer)
        rows = [row if row[:1] == [self.tokenizer.bos_id] else [self.tokenizer.bos_id, *row] for row in rows]
        width, vocab_size, dim = (
            self.engine.model.config.seq_len,
            self.tokenizer.vocab_size,
            self.engine.model.config.d_model,
        )
        if not 1 <= len(rows) <= self.settings.max_inputs:
            raise UserError(f"{len(rows)} inputs: expected 1 to {self.settings.max_inputs}")
        if body.dimensions not in (None, dim):
            raise UserError(f"dimensions={body.dimensions}: this model has {dim}")
        for i, row in enumerate(rows):
            if not 2 <= len(row) <= width or not all(0 <= t < vocab_size for t in row):
                raise UserError(f"input {i} is {len(row) - 1} tokens: expected 1 to {width - 1}, of the vocabulary")
        with self.encoding:
            out = np.zeros((len(rows), dim), np.float32)
            for group in by_length(dict(enumerate(rows)), self.encoder.batch_tokens):
                out[group] = self.encoder.pool([rows[i] for i in group]).cpu().numpy()
        return out, sum(map(len, rows))

    # ---- state ----

    @property
    def broken(self) -> bool:
        return any(s.error is not None for s in self.schedulers)

    def health(self) -> dict[str, Any]:
        rows, waiting = sum(s.counts.rows for s in self.schedulers), sum(len(s.waiting) for s in self.schedulers)
        state = {"status": "error" if self.broken else "ok", "model": self.settings.model, "running": rows}
        kb = {} if self.kb is None else {"documents": len(self.kb)}
        return {**state, "waiting": waiting, "workers": len(self.schedulers), "ready": not self.broken, **kb}

    def metrics_text(self) -> str:
        counts = [s.counts for s in self.schedulers]
        gauges: dict[str, float] = {
            "rows_running": sum(c.rows for c in counts),
            "requests_waiting": sum(len(s.waiting) for s in self.schedulers),
            "prefix_cache_bytes": sum(s.prefixes.bytes for s in self.schedulers),
        }
        names = ("prompt_tokens", "cached_tokens", "generated_tokens", "steps")
        counters: dict[str, float] = {f"{name}_total": sum(getattr(c, name) for c in counts) for name in names}
        reasons = {reason for c in counts for reason in c.ended}
        ended = {reason: sum(c.ended.get(reason, 0) for c in counts) for reason in reasons}
        return self.metrics.text(gauges, counters, ended)
