"""Talk to a trained model in the terminal, or let a base model continue text.

    python -m scripts.chat_cli                       # a conversation with the sft model
    python -m scripts.chat_cli -p "Why is the sky blue?"
    python -m scripts.chat_cli -i base -p "The"      # plain continuation, no chat template
    python -m scripts.chat_cli --knowledge_base notes -p "Who runs the mill?"   # the rag model, from documents

In a conversation: `clear` starts a new one, `quit` or `exit` (or Ctrl-D) leaves, Ctrl-C stops an answer.
Answers go to stdout, everything else to stderr.

--knowledge_base is a folder made by prepare_rag_dataset, a knowledge base, or opensearch://host:port/name. Each message
is searched for as it stands. An answer is the likeliest one, with [n] for what it cites; below it stand the documents
shown, the cited ones with a star. Earlier messages are shown again, their documents are not (nanochat/rag.py).
"""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from nanochat.checkpoint import SOURCES, load_model
from nanochat.common import base_dir, run_script
from nanochat.config import UserError, load_config
from nanochat.device import describe_device, pick_device, pick_dtype
from nanochat.engine import Engine, Session, StreamDecoder, calculator, python
from nanochat.rag import MAX_DOC_LENGTH, MAX_NEW_TOKENS, Answer, answer_batch, answer_parts, open_base
from nanochat.retrieval.document import Hit

with contextlib.suppress(ImportError):  # arrow keys and history in input(), where the platform has them
    import readline  # noqa: F401

DOCUMENTS, SAMPLED = 5, 50  # top_k with a knowledge base, and without
TEMPERATURE, MAX_TOKENS = 0.6, 256  # without one
FIRST_CHARS = 80  # of a document
ABSTENTION = "I don't know (not in the documents)."


@dataclass(frozen=True)
class ChatConfig:
    """Talk to a trained model."""

    SHORT: ClassVar = {
        "i": "source",
        "g": "model_tag",
        "s": "step",
        "p": "prompt",
        "t": "temperature",
        "k": "top_k",
        "d": "dtype",
        "device_type": "device",
    }

    source: Annotated[
        Literal["base", "mid", "sft", "rl", "rag", "refrag"] | None, "-i: stage; None = sft, with a knowledge base rag"
    ] = None
    model_tag: Annotated[str | None, "-g: folder of the model; None = the one saved last"] = None
    step: Annotated[int | None, "-s: checkpoint step; None = the newest"] = None
    prompt: Annotated[str | None, "-p: answer this and leave; None = a conversation"] = None
    temperature: Annotated[float | None, "-t: 0 = greedy; None = 0.6, with a knowledge base 0"] = None
    top_k: Annotated[
        int | None, "-k: sample among the k best ids, 0 = all, None = 50; with a knowledge base documents, None = 5"
    ] = None
    top_p: Annotated[float | None, "sample among the fewest ids of this total probability; None = off"] = None
    max_tokens: Annotated[int | None, "longest answer; None = 256, with a knowledge base 64"] = None
    seed: Annotated[int, "same seed, same answers"] = 42
    tool: Annotated[Literal["calculator", "python"], "what answers the model's calls; python runs in the sandbox"] = (
        "calculator"
    )
    knowledge_base: Annotated[str | None, "answer from these documents"] = None
    retriever_type: Annotated[str | None, "what finds them; None = the knowledge base's own"] = None
    max_doc_length: Annotated[int | None, f"tokens shown of a document; None = {MAX_DOC_LENGTH}"] = None
    device: Annotated[str, "cpu, cuda, cuda:1, mps; '' = the best there is"] = ""
    dtype: Annotated[str, "-d: auto, float32 or bfloat16"] = "auto"

    def __post_init__(self) -> None:
        if self.knowledge_base is None:
            if self.retriever_type is not None or self.max_doc_length is not None:
                raise ValueError("retriever_type and max_doc_length are about documents: add --knowledge_base=DIR")
        elif self.temperature or self.top_p is not None:
            raise ValueError("answers from documents are not sampled: leave temperature and top_p out")
        elif self.source == "base":
            raise ValueError("-i base goes on from a text and answers nothing: use -i rag, or another chat model")
        elif self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k}: expected at least 1 document")

    @property
    def stage(self) -> str:
        return self.source or ("sft" if self.knowledge_base is None else "rag")


def load_engine(cfg: ChatConfig) -> Engine:
    """The engine of the asked-for stage. UserError naming the stages that exist where that one does not."""
    exist = [s for s in SOURCES if any((base_dir() / f"{s}_checkpoints").glob("*/step_*"))]
    if cfg.stage not in exist:
        cure = f"trained so far: {', '.join(exist)} (-i {exist[-1]})" if exist else "nothing is trained yet: see README"
        raise UserError(f"no {cfg.stage} checkpoint under {base_dir()}; {cure}")
    device = pick_device(cfg.device)
    dtype = pick_dtype(cfg.dtype, device)
    model, tokenizer, meta = load_model(cfg.stage, device, cfg.model_tag, cfg.step)
    model.set_compute(dtype)
    size = model.n_params()["total"] / 1e6
    note(f"{cfg.stage}, step {meta.get('step')}, {size:.1f}M parameters; {describe_device(device, dtype)}")
    tools = {"calculator": calculator, "python": python}
    return Engine(model, tokenizer, [tools[cfg.tool](tokenizer)])


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Continuation:
    """A base model: each text is continued on its own."""

    def __init__(self, engine: Engine, cfg: ChatConfig):
        self.engine, self.cfg = engine, cfg

    def clear(self) -> None:
        """Nothing is remembered."""

    def say(self, text: str) -> Iterator[str]:
        """The text, then what the model makes of it, as it comes."""
        ids = self.engine.tokenizer.encode(text, prepend="<|bos|>")
        steps = self.engine.generate(ids, **sampling(self.cfg), seed=self.cfg.seed)
        yield text
        decoder = StreamDecoder(self.engine.tokenizer)
        for [token], _ in steps:
            if token not in self.engine.terminators:
                yield decoder.push(token)
        yield decoder.flush()


class Conversation:
    """A chat model: one conversation as ids, its state kept, so that each turn reads only what is new."""

    def __init__(self, engine: Engine, cfg: ChatConfig):
        self.engine, self.cfg = engine, cfg
        self.clear()

    def clear(self) -> None:
        self.ids: list[int] = []
        self.session, self.turn = Session(), 0

    def say(self, text: str) -> Iterator[str]:
        """The answer to the next user message, as it comes. A refused message leaves the conversation as it was."""
        tokenizer = self.engine.tokenizer
        rendered = tokenizer.render_for_completion({"messages": [{"role": "user", "content": text}]})
        ids = [*self.ids, *(rendered[1:] if self.ids else rendered)]  # one <|bos|>, at the start
        if self.ids and len(ids) >= self.engine.max_context:
            raise UserError(
                f"the conversation would be {len(ids)} tokens and this model's context holds "
                f"{self.engine.max_context}, answer included: type clear to start a new one, or say it shorter"
            )
        steps = self.engine.generate(ids, **sampling(self.cfg), seed=self.cfg.seed + self.turn, session=self.session)
        self.ids, self.turn = ids, self.turn + 1
        decoder = StreamDecoder(tokenizer)
        try:
            for [token], _ in steps:
                if token in self.engine.terminators:
                    break
                self.ids.append(token)
                yield decoder.push(token)
            yield decoder.flush()
        finally:  # also when the answer was cut short: the next turn must start in order
            self.ids.append(tokenizer.encode_special("<|assistant_end|>"))


def sampling(cfg: ChatConfig) -> dict:
    """The options of generate that stay the same for a whole run."""
    return {
        "max_tokens": MAX_TOKENS if cfg.max_tokens is None else cfg.max_tokens,
        "temperature": TEMPERATURE if cfg.temperature is None else cfg.temperature,
        "top_k": SAMPLED if cfg.top_k is None else cfg.top_k,
        "top_p": cfg.top_p,
    }


class Sourced:
    """A chat model and a knowledge base: each message is answered from what is found for it."""

    def __init__(self, engine: Engine, cfg: ChatConfig):
        assert cfg.knowledge_base is not None
        self.engine, self.cfg, self.kb = engine, cfg, open_base(cfg.knowledge_base)
        self.kb.search("a", k=1, retriever=cfg.retriever_type)  # opens the index: what is wrong with it is said now
        note(f"{len(self.kb)} documents in {cfg.knowledge_base}")
        self.clear()

    def clear(self) -> None:
        self.history: list[dict] = []

    def say(self, text: str) -> Iterator[str]:
        """The answer, then its sources. Questions that were not answered are not shown again."""
        cfg, max_tokens = self.cfg, self.cfg.max_tokens
        [reply] = answer_batch(
            self.engine, self.kb, [text], cfg.top_k or DOCUMENTS, cfg.retriever_type,
            MAX_DOC_LENGTH if cfg.max_doc_length is None else cfg.max_doc_length,
            MAX_NEW_TOKENS if max_tokens is None else max_tokens, histories=[self.history],
        )  # fmt: skip
        if len(reply.hits) < reply.n_found:
            context = self.engine.max_context
            note(f"of {reply.n_found} documents found, {len(reply.hits)} fit the context of {context} tokens")
        yield said(reply)
        yield sources(reply)
        if reply.text:
            answer = answer_parts(reply.text, reply.citations)
            self.history += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]


def said(reply: Answer) -> str:
    """The answer with its citations after it; an abstention in words."""
    if reply.abstained:
        return ABSTENTION
    marks = [f"[{n}]" if n <= len(reply.hits) else f"[{n}: no such document]" for n in dict.fromkeys(reply.citations)]
    return " ".join([printable(reply.text) or "(an empty answer)", "".join(marks)]).rstrip()


def sources(reply: Answer) -> str:
    """A line for each document shown: its number, title and first words. A star marks the cited ones."""
    lines = [f"{'*' if n in reply.citations else ' '} [{n}] {first_words(hit)}" for n, hit in enumerate(reply.hits, 1)]
    return "\n\n" + "\n".join(lines or ["  no document was found"])


def printable(text: str) -> str:
    """On one line, and without characters that a terminal would obey: documents are written by others."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def first_words(hit: Hit) -> str:
    title, text = (printable(part[: 9 * FIRST_CHARS]) for part in (hit.document.title, hit.chunk.text))
    start = text if len(text) <= FIRST_CHARS else text[:FIRST_CHARS].rpartition(" ")[0] or text[:FIRST_CHARS]
    start += "" if start == text else " ..."
    return f"{title[:FIRST_CHARS]}: {start}" if title else start


def show(pieces: Iterable[str]) -> None:
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)


def interact(talk: Continuation | Conversation | Sourced, ask: Callable[[], str]) -> None:
    """Read messages from `ask` until quit, exit or the end of input. What goes wrong in one message ends that one."""
    while True:
        try:
            text = ask().strip()
        except EOFError:
            return
        if text.lower() in ("quit", "exit"):
            return
        if text.lower() == "clear":
            talk.clear()
            note("new conversation")
        elif text:
            try:
                show(talk.say(text))
            except UserError as e:
                note(f"error: {e}")
            except KeyboardInterrupt:
                print(flush=True)
                note("stopped")


def ask_terminal() -> str:
    """One line from stdin, with a prompt if a person is typing."""
    if sys.stdin.isatty():
        sys.stderr.write("\n")
        return input("> ")
    return input()


def main(argv: list[str]) -> None:
    cfg = load_config(ChatConfig, argv)
    for stream in (sys.stdin, sys.stdout):  # no text a model writes or a user pipes in may end the program
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if cfg.prompt is not None and not cfg.prompt.strip() and cfg.stage != "base":
        raise UserError("--prompt is empty: write a message, or leave -p out for a conversation")
    engine = load_engine(cfg)
    kind = Continuation if cfg.stage == "base" else Conversation if cfg.knowledge_base is None else Sourced
    talk = kind(engine, cfg)
    try:
        if cfg.prompt is not None:
            show(talk.say(cfg.prompt))
        else:
            note("type a message; clear, quit and exit are commands")
            interact(talk, ask_terminal)
    except BrokenPipeError:  # the reader (head, less) has left: nothing to say, and nothing to flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


if __name__ == "__main__":
    run_script(main)
