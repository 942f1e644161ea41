"""Request and response bodies of OpenAI's API, as far as this server has them.

Unknown fields are left alone; known ones that it cannot honour are refused (`unsupported`).
"""

import base64
import secrets
import time
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, Field, WithJsonSchema

from nanochat.config import UserError
from nanochat.serving.functions import Function, FunctionCall, Functions
from nanochat.serving.request import Chosen, End, Sampling

# What the document says of a message and a tool; nanochat/serving/prompts.py says what is wrong with one in words.
TEXT = {"type": "string"}
PART = {"type": "object", "properties": {"type": {"const": "text"}, "text": TEXT}, "required": ["type", "text"]}
MESSAGE = {
    "type": "object",
    "properties": {
        "role": {"enum": ["user", "system", "developer", "assistant", "tool"]},
        "content": {"anyOf": [TEXT, {"type": "array", "items": PART}, {"type": "null"}]},
        "tool_calls": {"type": "array", "items": {"type": "object"}},
    },
    "required": ["role"],
}
FUNCTION = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Za-z_][A-Za-z0-9_]{0,63}$"},
        "description": TEXT,
        "parameters": {"type": "object"},
    },
    "required": ["name"],
}
TOOL = {
    "type": "object",
    "properties": {"type": {"const": "function"}, "function": FUNCTION},
    "required": ["type", "function"],
}
Messages = Annotated[
    list[dict[str, Any]], Field(min_length=1), WithJsonSchema({"type": "array", "items": MESSAGE, "minItems": 1})
]
Tools = Annotated[list[dict[str, Any]], WithJsonSchema({"type": "array", "items": TOOL, "maxItems": 64})]
MAX_STOPS, MAX_STOP_CHARS, MAX_TOP_LOGPROBS, MAX_FUNCTIONS = 16, 256, 20, 64


class SamplingBody(BaseModel):
    """Fields that chat completions and completions share. Absent or null is the server's default."""

    model: str | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    n: int | None = Field(default=None, ge=1)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, Any] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(given) > MAX_STOPS or any(not 0 < len(s) <= MAX_STOP_CHARS for s in given):
            raise UserError(f"stop: at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARS} characters")
        return tuple(given)

    @property
    def include_usage(self) -> bool:
        return bool((self.stream_options or {}).get("include_usage"))

    def sampling(self, temperature: float, top_k: int | None) -> Sampling:
        """With the server's defaults. Without a seed, each request draws its own."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        values: dict[str, Any] = {"temperature": temperature, "top_k": top_k}
        values |= {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return Sampling(**values, seed=secrets.randbits(32) if self.seed is None else self.seed % 2**64)

    def unsupported(self) -> None:
        """UserError for a field that would be ignored."""
        for name in ("frequency_penalty", "presence_penalty", "logit_bias"):
            if getattr(self, name):
                raise UserError(f"{name} is not supported: leave it out (repetition_penalty is)")


class ChatBody(SamplingBody):
    messages: Messages
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: Tools | None = None
    tool_choice: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    retrieval: bool | dict[str, Any] | None = None

    def unsupported(self) -> None:
        super().unsupported()
        if (self.response_format or {}).get("type", "text") != "text":
            raise UserError("response_format: this server writes plain text only")

    def functions(self, tokenizer: Any) -> Functions | None:
        """The client's functions, unless it forbids calls."""
        if not self.tools or self.tool_choice == "none":
            return None
        if len(self.tools) > MAX_FUNCTIONS:
            raise UserError(f"{len(self.tools)} tools: at most {MAX_FUNCTIONS}")
        functions = []
        for i, tool in enumerate(self.tools):
            given = tool.get("function")
            name = given.get("name") if isinstance(given, dict) else None
            if (
                given is None
                or not isinstance(name, str)
                or not name.isidentifier()
                or not name.isascii()
                or len(name) > 64
            ):
                raise UserError(f"tools[{i}] has no function with a name of letters, digits and _")
            functions.append(Function.of(given))
        return Functions(functions, tokenizer)

    def begin(self, functions: Functions | None, tokenizer: Any) -> list[int]:
        """The ids that force a call where tool_choice asks for one."""
        choice = self.tool_choice
        if choice in (None, "auto", "none"):
            return []
        named = choice.get("function") if isinstance(choice, dict) else None
        name = named.get("name") if isinstance(named, dict) else None
        if functions is None or (choice != "required" and name not in tuple(functions.by_name)):
            raise UserError(f"tool_choice {str(choice)[:100]!r}: expected none, auto, required or one of the tools")
        if name == "search":
            return [tokenizer.encode_special("<|search_start|>")]
        call = [] if name in (None, "python", "calculator") else tokenizer.encode_ordinary(f"{name}(")
        return [tokenizer.encode_special("<|python_start|>"), *call]


class CompletionBody(SamplingBody):
    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None

    def unsupported(self) -> None:
        super().unsupported()
        if self.suffix or self.echo or self.best_of not in (None, self.n or 1):
            raise UserError("suffix, echo and best_of other than n are not supported: leave them out")

    def prompts(self, tokenizer: Any) -> list[list[int]]:
        return token_rows(self.prompt, tokenizer)


class EmbeddingBody(BaseModel):
    model: str | None = None
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every error; made by gate.error."""

    error: ErrorDetail


def token_rows(given: str | list, tokenizer: Any) -> list[list[int]]:
    """A text, texts, ids or lists of ids -> lists of ids; texts get <|bos|> before them."""
    several = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
    return [tokenizer.encode(one, prepend=tokenizer.bos_id) if isinstance(one, str) else list(one) for one in several]


# ---- answers ----


def answer_id(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(12)}"


def usage(prompt: int, completion: int, cached: int = 0) -> dict[str, Any]:
    counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return {**counts, "prompt_tokens_details": {"cached_tokens": cached}}


def tool_calls(call: FunctionCall | None, index: bool = False) -> dict[str, Any]:
    """{"tool_calls": [...]}, or nothing where there is no call; index as chunks have it."""
    if call is None:
        return {}
    function = {"name": call.name, "arguments": call.json}
    one = {"id": answer_id("call"), "type": "function", "function": function}
    return {"tool_calls": [{"index": 0, **one} if index else one]}


def chat_logprobs(tokenizer: Any, chosen: list[Chosen]) -> dict[str, Any]:
    def told(id: int, logprob: float) -> dict[str, Any]:
        raw = tokenizer.decode_bytes([id])
        return {"token": raw.decode("utf-8", "replace"), "logprob": max(logprob, -9999.0), "bytes": list(raw)}

    return {"content": [{**told(c.id, c.logprob), "top_logprobs": [told(*t) for t in c.top]} for c in chosen]}


def completion_logprobs(tokenizer: Any, chosen: list[Chosen], start: int = 0) -> dict[str, Any]:
    def word(id: int) -> str:
        return tokenizer.decode([id], errors="replace")

    tokens = [word(c.id) for c in chosen]
    offsets = [start + sum(map(len, tokens[:i])) for i in range(len(tokens))]
    return {
        "tokens": tokens,
        "token_logprobs": [max(c.logprob, -9999.0) for c in chosen],
        "top_logprobs": [{word(id): max(nats, -9999.0) for id, nats in c.top} for c in chosen],
        "text_offset": offsets,
    }


def more(end: End, prompt: Any) -> dict[str, Any]:
    """What of a knowledge base goes with an answer: its sources, and the trace of searches. Nothing without one."""
    searched = [call for call in end.trace if isinstance(call.result, (list, tuple))]
    if not prompt.query and not searched:
        return {}
    hits = [*prompt.hits, *(hit for call in searched for hit in call.result)]
    sources = [
        {
            "n": n, "id": hit.document.id, "title": hit.document.title, "text": hit.chunk.text,
            "score": float(hit.score), "cited": n in end.citations,
        }
        for n, hit in enumerate(hits, 1)
    ]  # fmt: skip
    first = [{"query": prompt.query, "titles": [hit.document.title for hit in prompt.hits]}] if prompt.query else []
    hops = [hop(line) for line in sorted({line for hit in prompt.hits for line in hit.trace})]
    own = [{"query": call.query, "titles": [hit.document.title for hit in call.result]} for call in searched]
    return {"sources": sources, "trace": [*first, *hops, *own]}


def hop(line: str) -> dict[str, Any]:
    """ "hop 2: NAME -> TITLE" of a multi-hop search, as an entry of the trace."""
    query, _, title = line.partition(": ")[2].rpartition(" -> ")
    return {"query": query, "titles": [title]}


def embedding(vector: np.ndarray, index: int, encoding: str | None) -> dict[str, Any]:
    raw = np.ascontiguousarray(vector, dtype="<f4")
    value: Any = base64.b64encode(raw.tobytes()).decode() if encoding == "base64" else raw.tolist()
    return {"object": "embedding", "index": index, "embedding": value}


def now() -> int:
    return int(time.time())
