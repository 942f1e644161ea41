"""Serve a trained model: OpenAI's API, and a page to chat on.

    python -m scripts.chat_web                                # the sft model at http://127.0.0.1:8000
    python -m scripts.chat_web -i rag --knowledge_base notes  # answers from documents, with their sources
    NANOCHAT_API_KEY=... python -m scripts.chat_web --host 0.0.0.0

Any client of OpenAI's API works with base_url http://127.0.0.1:8000/v1. Routes: nanochat/serving/app.py. It listens on
loopback unless told otherwise, and then only to requests that name a loopback host. SIGTERM: nothing new is taken, and
what is under way has --drain_seconds to end.
"""

import os
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanochat.checkpoint import SOURCES, load_model
from nanochat.common import base_dir, run_script
from nanochat.config import UserError, load_config
from nanochat.device import describe_device, pick_device, pick_dtype
from nanochat.engine import Engine, calculator, python
from nanochat.rag import MAX_DOC_LENGTH, MIN_DOC_LENGTH, open_base
from nanochat.retrieval import KnowledgeBase
from nanochat.serving.app import make_app
from nanochat.serving.request import Sampling
from nanochat.serving.scheduler import Limits, Scheduler
from nanochat.serving.service import MAX_HITS, Service, Settings
from nanochat.tools import Tool, search
from nanochat.web import address, is_loopback, listen, own_names, run


@dataclass(frozen=True)
class WebConfig:
    """Serve a trained model over HTTP."""

    SHORT: ClassVar = {"i": "source", "g": "model_tag", "s": "step", "p": "port", "t": "temperature", "k": "top_k",
                       "d": "dtype", "m": "default_tokens", "device_type": "device"}  # fmt: skip

    source: Annotated[
        Literal["base", "mid", "sft", "rl", "rag", "refrag"] | None, "-i: stage; None = sft, with a knowledge base rag"
    ] = None
    model_tag: Annotated[str | None, "-g: folder of the model; None = the one saved last"] = None
    step: Annotated[int | None, "-s: checkpoint step; None = the newest"] = None
    host: Annotated[str, "address to listen on"] = "127.0.0.1"
    port: Annotated[int, "-p: 0 = any that is free"] = 8000
    api_key: Annotated[str | None, "clients must send it; None = $NANOCHAT_API_KEY, or no key"] = None
    cors_origins: Annotated[list[str] | None, "web pages of other origins that may ask, a,b; None = none"] = None
    temperature: Annotated[float, "-t: where a request has none; 0 = greedy"] = 0.6
    top_k: Annotated[int, "-k: sample among the k best ids where a request does not say, 0 = all"] = 50
    default_tokens: Annotated[int, "-m: longest answer where a request does not say"] = 256
    max_tokens: Annotated[int | None, "longest answer a request may ask for; None = what the context holds"] = None
    max_context: Annotated[int | None, "tokens of prompt and answer; None = as trained"] = None
    max_rows: Annotated[int, "answers written at once, on each device"] = 32
    max_queue: Annotated[int, "requests that wait for their turn; more are answered 429"] = 64
    prefill_tokens: Annotated[int, "of prompts read between two steps of the answers"] = 256
    cache_mib: Annotated[int, "MiB for states of prompts read before"] = 256
    max_body_bytes: Annotated[int, "size of a request"] = 1_000_000
    request_seconds: Annotated[float, "for an answer, waiting included; then it is dropped"] = 120.0
    body_seconds: Annotated[float, "for a client to send its headers, and its body"] = 10.0
    drain_seconds: Annotated[int, "for what is under way when the server is told to end"] = 10
    tool: Annotated[Literal["calculator", "python"], "what answers the model's calls; python runs in the sandbox"] = (
        "calculator"
    )
    knowledge_base: Annotated[str | None, "answer from these documents: folder, or opensearch://host:9200/name"] = None
    retriever_type: Annotated[str | None, "what finds them; None = the knowledge base's own"] = None
    documents: Annotated[int, "shown for a question"] = 5
    max_doc_length: Annotated[int, "tokens shown of a document"] = MAX_DOC_LENGTH
    device: Annotated[str, "cpu, cuda, mps, or several: cuda:0,cuda:1; '' = the best there is"] = ""
    dtype: Annotated[str, "-d: auto, float32 or bfloat16"] = "auto"

    def __post_init__(self) -> None:
        least = {
            "default_tokens": 1, "max_tokens": 1, "max_context": 1, "max_body_bytes": 1, "request_seconds": 1,
            "body_seconds": 1, "drain_seconds": 1, "documents": 1, "max_doc_length": MIN_DOC_LENGTH,
        }  # fmt: skip
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and not value >= low:  # so that nan is refused, too
                raise ValueError(f"{name}={value}: expected at least {low}")
        if self.documents > MAX_HITS:
            raise ValueError(f"documents={self.documents}: expected 1 to {MAX_HITS}")
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port={self.port}: expected 0 to 65535")
        Sampling(self.temperature, self.top_k)  # says what is wrong with them
        if self.retriever_type is not None and self.knowledge_base is None:
            raise ValueError("retriever_type is about documents: add --knowledge_base=DIR")

    @property
    def stage(self) -> str:
        return self.source or ("sft" if self.knowledge_base is None else "rag")

    @property
    def loopback(self) -> bool:
        return is_loopback(self.host)


def load_schedulers(cfg: WebConfig, kb: KnowledgeBase | None) -> tuple[list[Scheduler], str]:
    """One for each device, and the name the model is served under."""
    exist = [s for s in SOURCES if any((base_dir() / f"{s}_checkpoints").glob("*/step_*"))]
    if cfg.stage not in exist:
        cure = f"trained so far: {', '.join(exist)} (-i {exist[-1]})" if exist else "nothing is trained yet: see README"
        raise UserError(f"no {cfg.stage} checkpoint under {base_dir()}; {cure}")
    limits = Limits(cfg.max_rows, cfg.max_queue, cfg.prefill_tokens, cfg.cache_mib << 20)
    schedulers, name = [], ""
    for device_name in cfg.device.split(","):
        device = pick_device(device_name.strip())
        dtype = pick_dtype(cfg.dtype, device)
        model, tokenizer, meta = load_model(cfg.stage, device, cfg.model_tag, cfg.step)
        model.set_compute(dtype)
        name = f"nanochat-{cfg.stage}" + (f"-{cfg.model_tag}" if cfg.model_tag else "")
        size = model.n_params()["total"] / 1e6
        print(f"{name}: step {meta.get('step')}, {size:.1f}M parameters; {describe_device(device, dtype)}", flush=True)
        engine = Engine(model, tokenizer, tools(cfg, tokenizer, kb), cfg.max_context)
        check_context(engine)
        schedulers.append(Scheduler(engine, limits))
    return schedulers, name


def check_context(engine: Engine) -> None:
    """UserError where not even the shortest message and one id of an answer fit."""
    least = len(engine.tokenizer.render_for_completion({"messages": [{"role": "user", "content": "a"}]})) + 1
    if engine.max_context < least:
        raise UserError(f"max_context={engine.max_context} holds no chat: expected at least {least}, or leave it out")


def tools(cfg: WebConfig, tokenizer: Any, kb: KnowledgeBase | None) -> list[Tool]:
    """What the model may call by itself; searches are in the knowledge base."""
    own = [{"calculator": calculator, "python": python}[cfg.tool](tokenizer)]
    if kb is not None:
        own.append(search(tokenizer, lambda queries, k: kb.search(queries, k=k, retriever=cfg.retriever_type)))
    return own


def checked_base(cfg: WebConfig) -> KnowledgeBase | None:
    if cfg.knowledge_base is None:
        return None
    kb = open_base(cfg.knowledge_base)
    kb.search("a", k=1, retriever=cfg.retriever_type)  # opens the index: what is wrong with it is said now
    return kb


def make_service(cfg: WebConfig) -> Service:
    kb = checked_base(cfg)
    schedulers, name = load_schedulers(cfg, kb)
    settings = Settings(
        model=name, default_tokens=cfg.default_tokens, max_tokens=cfg.max_tokens, temperature=cfg.temperature,
        top_k=cfg.top_k, request_seconds=cfg.request_seconds, body_seconds=cfg.body_seconds,
        max_body_bytes=cfg.max_body_bytes, api_key=cfg.api_key or os.environ.get("NANOCHAT_API_KEY") or None,
        hosts=own_names(cfg.host), cors_origins=tuple(cfg.cors_origins or ()),
        retriever=cfg.retriever_type, documents=cfg.documents, max_doc_length=cfg.max_doc_length,
    )  # fmt: skip
    return Service(schedulers, settings, kb)


def protocol(seconds: float) -> type[H11Protocol]:
    """HTTP/1.1 that closes a connection which has sent no whole request head within `seconds`."""

    class Timed(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.loop.call_later(seconds, self.close_if_silent)

        def close_if_silent(self) -> None:
            if self.cycle is None and not self.transport.is_closing():
                self.transport.close()

    return Timed


def main(argv: list[str]) -> None:
    cfg = load_config(WebConfig, argv)
    service = make_service(cfg)
    listener = listen(cfg.host, cfg.port)
    if not cfg.loopback and service.settings.api_key is None:
        print("warning: not a loopback address and no API key; whoever reaches it may ask", flush=True)
    print(f"{service.settings.model} at {address(cfg.host, listener)}", flush=True)
    settings = uvicorn.Config(
        make_app(service), log_level="warning", http=protocol(cfg.body_seconds), loop="asyncio",
        timeout_graceful_shutdown=cfg.drain_seconds, timeout_keep_alive=5,
    )  # fmt: skip
    run(settings, listener)


if __name__ == "__main__":
    run_script(main)
