"""Any input at all, to the tokenizer, the readers of JSON Lines, the config loader and the API, is taken or is refused
in the way that is meant for it; never another exception."""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving_model import make

from nanochat.config import UserError, load_config
from nanochat.engine import Engine
from nanochat.retrieval.document import Document
from nanochat.retrieval.readers import READERS, Question, Reading
from nanochat.serving.app import make_app
from nanochat.serving.scheduler import Limits, Scheduler
from nanochat.serving.service import Service, Settings
from nanochat.sources import Reader
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer
from scripts.base_train import BaseTrainConfig
from tasks.customjson import CustomJSON
from tasks.rag import load_rows

FIXTURES = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
FEW = settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=FIXTURES)
MANY = settings(FEW, max_examples=250)

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=60)  # half surrogate pairs too
SPECIAL = st.sampled_from(SPECIAL_TOKENS)
TEXT = st.lists(st.one_of(ANY_TEXT, SPECIAL, st.sampled_from([t[:-1] for t in SPECIAL_TOKENS])), max_size=6).map(
    "".join
)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), ANY_TEXT)
JSON = st.recursive(SCALARS, lambda v: st.lists(v, max_size=4) | st.dictionaries(ANY_TEXT, v, max_size=4), max_leaves=8)


def objects(*keys: str) -> st.SearchStrategy[Any]:
    """JSON values, most of them objects with some of these keys."""
    known = st.dictionaries(st.sampled_from(keys), st.one_of(JSON, st.lists(JSON, max_size=3), ANY_TEXT), max_size=6)
    return st.one_of(JSON, known, known)


# ---- the tokenizer ----


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the river runs to the sea. ça va, 日本語 <|bos|> " * 20], 330)


@MANY
@given(text=TEXT)
def test_any_text_comes_back_and_spells_no_special_token(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode_ordinary(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size - len(SPECIAL_TOKENS) for i in ids)
    flat, offsets = tokenizer.encode_array([text, "", text])
    assert flat.tolist() == ids + ids and offsets.tolist() == [0, len(ids), len(ids), 2 * len(ids)]


@MANY
@given(ids=st.lists(st.integers(-3, 340) | st.integers(), max_size=20))
def test_any_ids_decode_or_are_refused(tokenizer: Tokenizer, ids: list[int]) -> None:
    if all(0 <= i < tokenizer.vocab_size for i in ids):
        assert isinstance(tokenizer.decode(ids), str)
        tokenizer.decode(ids, errors="replace").encode("utf-8")
    else:
        with pytest.raises(ValueError, match="outside the vocabulary"):
            tokenizer.decode(ids)


@FEW
@given(value=objects("format", "tokens", "pattern", "special_tokens", "sha256"))
def test_any_json_as_a_tokenizer_file_is_refused(tmp_path: Path, value: Any) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match="tokenizer"):
        Tokenizer.load(tmp_path)


# ---- JSON Lines ----

ROW_KEYS = ("question", "answers", "answer", "gold_ids", "answerable", "documents", "hops", "kind", "id", "_id", "text",
            "title", "metadata", "messages", "context", "qas", "article", "paragraphs", "supporting_facts")  # fmt: skip
CHAT = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system"]) | SCALARS, "content": ANY_TEXT | JSON}
    ),
    max_size=4,
)
LINES = st.one_of(
    objects(*ROW_KEYS).map(lambda v: json.dumps(v).encode()),
    CHAT.map(lambda v: json.dumps(v).encode()),
    st.binary(max_size=40),
    st.sampled_from(
        [b"", b"\xef\xbb\xbf{}", b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000, b"\x00", b"\xff\xfe[\x00]\x00"]
    ),
)
FILES = st.lists(LINES, max_size=5).map(b"\n".join)


def rows_or_user_error(read: Any) -> list[Any]:
    try:
        return list(read())
    except UserError as e:
        assert str(e)
        return []


@MANY
@given(data=FILES)
def test_any_bytes_as_conversations_are_read_or_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    for conversation in rows_or_user_error(lambda: CustomJSON(path)):
        assert conversation["messages"][-1]["role"] == "assistant"


@MANY
@given(data=FILES)
def test_any_bytes_as_rag_rows_are_read_or_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    for row in rows_or_user_error(lambda: load_rows(path)):
        assert row["question"].strip() and isinstance(row["answerable"], bool)


@MANY
@given(data=FILES, mode=st.sampled_from(["jsonl", "squad", "hotpotqa"]), suffix=st.sampled_from([".jsonl", ".json"]))
def test_any_bytes_as_an_input_of_prepare_are_read_or_listed(
    tmp_path: Path, data: bytes, mode: str, suffix: str
) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(data)
    reading = Reading(io.StringIO())
    for item in rows_or_user_error(lambda: READERS[mode](path, reading)):
        assert isinstance(item, (Document, Question))
    assert reading.bad == len(reading.listing.getvalue().splitlines())  # pyrefly: ignore[missing-attribute]


@FEW
@given(
    data=FILES,
    errors=st.sampled_from(["strict", "replace", "skip"]),
    suffix=st.sampled_from([".jsonl", ".txt", ".jsonl.gz", ".parquet"]),
)
def test_any_bytes_as_training_text_are_read_or_refused(tmp_path: Path, data: bytes, errors: Any, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(data)
    for text in rows_or_user_error(lambda: Reader(errors).documents([path], split_small=True)):
        text.encode("utf-8")


# ---- the config loader ----


@dataclass(frozen=True)
class Config:
    """One field of each kind."""

    depth: Annotated[int, "layers"] = 4
    rate: Annotated[float, "rate"] = 0.1
    tag: Annotated[str, "name"] = ""
    pattern: Annotated[list | str | None, "blocks"] = None
    options: Annotated[dict | None, "options"] = None
    resume: Annotated[bool, "go on"] = False
    dtype: Annotated[Literal["auto", "float32"], "dtype"] = "auto"


KEYS = st.sampled_from(["depth", "rate", "tag", "pattern", "options", "resume", "dtype", "device-batch-size", "dpeth"])
VALUES = st.one_of(
    ANY_TEXT, st.integers().map(str), st.floats().map(str), JSON.map(repr), st.just("[" * 3000), st.just("1e999")
)
WORDS = st.one_of(
    ANY_TEXT, st.builds("--{}={}".format, KEYS, VALUES), KEYS.map("--{}".format), st.just("--"), st.just("nowhere.py")
).filter(lambda word: word.lstrip("-").partition("=")[0] not in ("h", "help"))


@MANY
@given(argv=st.lists(WORDS, max_size=5))
@pytest.mark.parametrize("cls", [Config, BaseTrainConfig])
def test_any_arguments_make_a_config_or_are_refused(cls: type, argv: list[str]) -> None:
    try:
        config: Any = load_config(cls, argv)
    except UserError as e:
        assert str(e)
        return
    assert isinstance(config, cls) and type(config.depth) is int


STATEMENTS = st.one_of(
    st.builds("{} = {}".format, KEYS.map(lambda k: k.replace("-", "_")), JSON.map(repr)),
    st.sampled_from(
        ["import os", "depth = 1 / 0", "raise SystemExit(3)", "exit()", "depth =", "(" * 300, "depth = 10 ** 400",
         "def f(): return f()\nf()", "depth = float('nan')", "rate = float('inf')"]
    ),
    ANY_TEXT,
)  # fmt: skip


@FEW
@given(lines=st.lists(STATEMENTS, max_size=3))
def test_any_python_as_a_config_file_makes_a_config_or_is_refused(tmp_path: Path, lines: list[str]) -> None:
    path = tmp_path / "c.py"
    path.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    try:
        assert isinstance(load_config(Config, [str(path)]), Config)
    except UserError as e:
        assert str(path) in str(e)


# ---- the API ----

CHAT_KEYS = ("messages", "max_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "n", "stop", "stream",
             "stream_options", "tools", "tool_choice", "response_format", "retrieval", "logprobs", "top_logprobs",
             "repetition_penalty", "logit_bias", "model", "prompt", "echo", "input", "encoding_format",
             "dimensions")  # fmt: skip
MESSAGES = st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "tool_calls", "name"]),
                    st.sampled_from(["user", "assistant", "system", "tool", "hi"]) | JSON, max_size=4), max_size=3,
)  # fmt: skip
TOOLS = st.lists(
    st.dictionaries(st.sampled_from(["type", "function"]), objects("name", "description", "parameters"), max_size=2),
    max_size=2,
)
GOOD = st.just([{"role": "user", "content": "hi"}])
SMALL = st.integers(-1, 4) | st.floats() | JSON
NUMBERS = ("temperature", "top_k", "top_p", "min_p", "seed", "n", "repetition_penalty", "top_logprobs")
VALUED = ("stop", "stream_options", "tool_choice", "response_format", "retrieval", "logit_bias")
CHAT_BODY = st.fixed_dictionaries(
    {"messages": GOOD | MESSAGES, "max_tokens": st.integers(-1, 3)},
    optional={
        **dict.fromkeys(NUMBERS, SMALL),
        **dict.fromkeys(VALUED, JSON),
        "tools": TOOLS,
    },
)
PROMPT = ANY_TEXT | st.lists(st.integers(-2, 330), max_size=4) | JSON
BODIES = {
    "/v1/chat/completions": CHAT_BODY | objects(*CHAT_KEYS),
    "/v1/completions": st.fixed_dictionaries({"prompt": PROMPT, "max_tokens": st.integers(1, 3)}) | objects(*CHAT_KEYS),
    "/v1/embeddings": st.fixed_dictionaries({"input": PROMPT}, optional={"dimensions": SMALL}) | objects(*CHAT_KEYS),
    "/chat/completions": CHAT_BODY | objects(*CHAT_KEYS),
}


@pytest.fixture(scope="module")
def client() -> Any:
    scheduler = Scheduler(Engine(*make(["attn"])), Limits())
    with TestClient(make_app(Service([scheduler], Settings("m", default_tokens=2, max_tokens=4)))) as client:
        yield client
        assert scheduler.error is None


@settings(FEW, max_examples=40)
@given(data=st.data())
@pytest.mark.parametrize("route", BODIES)
def test_any_json_is_answered_or_is_the_clients_error(client: TestClient, route: str, data: st.DataObject) -> None:
    body = json.dumps(data.draw(BODIES[route]))
    answer = client.post(route, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 200 or 400 <= answer.status_code < 500, (answer.status_code, body)
    if answer.status_code != 200:
        assert answer.json()["error"]["message"]


@FEW
@given(body=st.one_of(st.binary(max_size=60), st.sampled_from([b"[" * 9000, b'{"messages":' * 2000, b"1" * 5000])))
def test_any_bytes_are_the_clients_error(client: TestClient, body: bytes) -> None:
    answer = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert 400 <= answer.status_code < 500, (answer.status_code, body)
