"""Talk to a trained model in the terminal, or let a base model continue text.

    python -m scripts.chat_cli                       # a conversation with the sft model
    python -m scripts.chat_cli -p "Why is the sky blue?"
    python -m scripts.chat_cli -i base -p "The"      # plain continuation, no chat template

In a conversation: `clear` starts a new one, `quit` or `exit` (or Ctrl-D) leaves, Ctrl-C stops an answer.
Answers go to stdout, everything else to stderr.
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

with contextlib.suppress(ImportError):  # arrow keys and history in input(), where the platform has them
    import readline  # noqa: F401


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

    source: Annotated[Literal["base", "mid", "sft", "rl", "rag", "refrag"], "-i: the stage to load"] = "sft"
    model_tag: Annotated[str | None, "-g: folder of the model; None = the one saved last"] = None
    step: Annotated[int | None, "-s: checkpoint step; None = the newest"] = None
    prompt: Annotated[str | None, "-p: answer this and leave; None = a conversation"] = None
    temperature: Annotated[float, "-t: 0 = greedy"] = 0.6
    top_k: Annotated[int, "-k: sample among the k best ids; 0 = all"] = 50
    top_p: Annotated[float | None, "sample among the fewest ids of this total probability; None = off"] = None
    max_tokens: Annotated[int, "longest answer"] = 256
    seed: Annotated[int, "same seed, same answers"] = 42
    tool: Annotated[Literal["calculator", "python"], "what answers the model's calls; python runs in the sandbox"] = (
        "calculator"
    )
    device: Annotated[str, "cpu, cuda, cuda:1, mps; '' = the best there is"] = ""
    dtype: Annotated[str, "-d: auto, float32 or bfloat16"] = "auto"


def load_engine(cfg: ChatConfig) -> Engine:
    """The engine of the asked-for stage. UserError naming the stages that exist where that one does not."""
    exist = [s for s in SOURCES if any((base_dir() / f"{s}_checkpoints").glob("*/step_*"))]
    if cfg.source not in exist:
        cure = f"trained so far: {', '.join(exist)} (-i {exist[-1]})" if exist else "nothing is trained yet: see README"
        raise UserError(f"no {cfg.source} checkpoint under {base_dir()}; {cure}")
    device = pick_device(cfg.device)
    dtype = pick_dtype(cfg.dtype, device)
    model, tokenizer, meta = load_model(cfg.source, device, cfg.model_tag, cfg.step)
    model.set_compute(dtype)
    size = model.n_params()["total"] / 1e6
    note(f"{cfg.source}, step {meta.get('step')}, {size:.1f}M parameters; {describe_device(device, dtype)}")
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
        "max_tokens": cfg.max_tokens,
        "temperature": cfg.temperature,
        "top_k": cfg.top_k,
        "top_p": cfg.top_p,
    }


def show(pieces: Iterable[str]) -> None:
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)


def interact(talk: Continuation | Conversation, ask: Callable[[], str]) -> None:
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
    if cfg.prompt is not None and not cfg.prompt.strip() and cfg.source != "base":
        raise UserError("--prompt is empty: write a message, or leave -p out for a conversation")
    engine = load_engine(cfg)
    talk = (Continuation if cfg.source == "base" else Conversation)(engine, cfg)
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
