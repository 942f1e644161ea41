import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nanochat.blocks import BLOCKS, BlockState
from nanochat.config import UserError
from nanochat.engine import ENDED, Engine, Session, StreamDecoder, Tool, python
from nanochat.gpt import GPT, GPTConfig, ModelState
from nanochat.tools import each

# A small vocabulary: bytes, then the special tokens the engine asks for.
SPECIALS = ["<|bos|>", "<|assistant_end|>", "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"]


class ByteTokenizer:
    vocab_size = 256 + len(SPECIALS)

    def encode_special(self, name: str) -> int:
        return 256 + SPECIALS.index(name)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode_bytes(self, ids: list[int]) -> bytes:
        return b"".join(bytes([t]) if t < 256 else SPECIALS[t - 256].encode() for t in ids)

    def decode(self, ids: list[int], errors: str = "replace") -> str:
        return self.decode_bytes(ids).decode("utf-8", errors)


BOS, ASSISTANT_END, PYTHON_START, PYTHON_END, OUTPUT_START, OUTPUT_END = range(256, 262)


class PrefixState(BlockState):
    """What each row has read so far: the simplest state there can be."""

    def __init__(self, rows: list[list[int]]):
        self.rows = rows

    def select(self, rows: Tensor) -> "PrefixState":
        return PrefixState([list(self.rows[i]) for i in rows.tolist()])

    def join(self, other: "PrefixState") -> "PrefixState":
        return PrefixState(self.rows + other.rows)


class PrefixModel:
    """Logits are any function of the whole prefix, exact to the bit whatever the batch; `calls` logs (B, T) fed."""

    device = torch.device("cpu")

    def __init__(self, next_logits, vocab_size=ByteTokenizer.vocab_size, seq_len=64):
        self.next_logits, self.calls = next_logits, []
        self.config = type("Config", (), {"vocab_size": vocab_size, "seq_len": seq_len})

    def init_state(self, B: int, max_len: int) -> ModelState:
        return ModelState([PrefixState([[] for _ in range(B)])], torch.zeros(B, dtype=torch.long), max_len)

    def __call__(self, ids, state, lengths=None, last_only=False):
        rows = state.layers[0].rows
        assert last_only and len(rows) == len(state.pos) == len(ids)
        self.calls.append(tuple(ids.shape))
        for r, row in enumerate(ids.tolist()):
            rows[r] += row if lengths is None else row[: lengths[r]]
            assert len(rows[r]) <= state.max_len, "state too short"
        state.pos = torch.tensor([len(row) for row in rows])
        return torch.stack([self.next_logits(row) for row in rows])[:, None]


def noisy(prefix: list[int], vocab_size: int = ByteTokenizer.vocab_size) -> Tensor:
    """Pseudo-random logits that depend on every id of the prefix. Special tokens are out of reach."""
    seed = 0
    for t in prefix:
        seed = (seed * 1000003 + t + 1) % 2**61
    logits = 2 * torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed))
    logits[256:] = -torch.inf
    return logits


def says(script: list[int], prompt_len: int):
    """A model that samples `script` after a prompt of that length, whatever else is in between."""

    def next_logits(prefix: list[int]) -> Tensor:
        return torch.eye(ByteTokenizer.vocab_size)[script[len(prefix) - prompt_len]] * 1e4

    return next_logits


def columns(engine: Engine, *args, **options) -> list[list[int]]:
    return [column for column, _ in engine.generate(*args, **options)]


# --- the loop -------------------------------------------------------------------------------------------------------


def test_prefill_is_one_call_at_batch_one_and_the_last_token_costs_no_forward():
    model = PrefixModel(noisy)
    out = columns(Engine(model, ByteTokenizer()), [BOS, 1, 2], num_samples=5, max_tokens=4)
    assert [len(c) for c in out] == [5] * 4
    assert model.calls == [(1, 3), (5, 1), (5, 1), (5, 1)]


def test_samples_differ_from_the_first_token_on():
    out = columns(Engine(PrefixModel(noisy), ByteTokenizer()), [BOS], num_samples=16, max_tokens=2)
    assert len(set(out[0])) > 4


def test_row_of_a_batch_equals_the_row_alone():
    engine = Engine(PrefixModel(noisy), ByteTokenizer())
    prompts = [[BOS, 5], [BOS, 7, 8, 9], [BOS]]
    rows, _ = engine.generate_batch(prompts, num_samples=2, max_tokens=9, seed=3)
    fewer, _ = engine.generate_batch(prompts[:2], num_samples=2, max_tokens=9, seed=3)
    first, _ = engine.generate_batch(prompts[0], max_tokens=9, seed=3)
    assert rows[:4] == fewer and rows[:1] == first


def test_ended_rows_leave_the_batch_and_do_not_disturb_the_others():
    def next_logits(prefix):
        logits = noisy(prefix)
        logits[100:] = -torch.inf  # 0..99 and nothing else, so that 0..29 as stop ids end rows at different steps
        return logits

    stop, options = range(30), {"num_samples": 12, "max_tokens": 20, "seed": 1}
    model = PrefixModel(next_logits)
    out = columns(Engine(model, ByteTokenizer()), [BOS], stop=stop, **options)
    free = columns(Engine(PrefixModel(next_logits), ByteTokenizer()), [BOS], **options)
    assert [b for b, _ in model.calls[1:]] == [sum(t not in stop and t != ENDED for t in c) for c in out[:-1]]
    for row, other in zip(zip(*out, strict=True), zip(*free, strict=True), strict=True):
        said = [t for t in row if t != ENDED]
        assert tuple(said) == other[: len(said)]
        assert all(t not in stop for t in said[:-1]) and (said[-1] in stop or len(said) == 20)
        assert row == (*said, *[ENDED] * (len(row) - len(said)))


@pytest.mark.parametrize("end", [BOS, ASSISTANT_END])
def test_terminators_end_a_row_and_stay_out_of_the_batch_result(end):
    engine = Engine(PrefixModel(says([65, 66, end, 67], 2)), ByteTokenizer())
    assert columns(engine, [BOS, 1]) == [[65], [66], [end]]
    assert engine.generate_batch([BOS, 1]) == ([[BOS, 1, 65, 66]], [[0, 0, 1, 1]])


def test_generation_stops_at_the_context_and_max_context_moves_it():
    assert len(columns(Engine(PrefixModel(noisy), ByteTokenizer()), [BOS] * 60)) == 4
    assert len(columns(Engine(PrefixModel(noisy), ByteTokenizer(), max_context=70), [BOS] * 60)) == 10
    rows, _ = Engine(PrefixModel(noisy), ByteTokenizer()).generate_batch([[BOS] * 60, [BOS] * 63, [BOS]])
    assert [len(r) for r in rows] == [64, 64, 64]


def test_bad_prompts_are_refused_before_any_work():
    model = PrefixModel(noisy)
    engine = Engine(model, ByteTokenizer())
    for ids, told in [([], "empty"), ([[BOS], []], "prompt 1 is empty"), ([BOS, 999], "999"), ([BOS, -1], "-1")]:
        with pytest.raises(UserError, match=told):
            engine.generate(ids)
    with pytest.raises(UserError, match=r"64 tokens and the context holds 64.*63"):
        engine.generate([BOS] * 64)
    assert model.calls == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0),
        ("top_p", 1.1),
        ("seed", -1),
        ("num_samples", 0),
        ("max_tokens", -1),
    ],
)
def test_bad_options_are_refused_by_name(name, value):
    with pytest.raises(UserError, match=f"{name}={value}"):
        Engine(PrefixModel(noisy), ByteTokenizer()).generate([BOS], **{name: value})


def test_prompt_may_be_a_tensor():
    engine = Engine(PrefixModel(noisy), ByteTokenizer())
    expected = engine.generate_batch([BOS, 3], max_tokens=3)
    assert engine.generate_batch(torch.tensor([BOS, 3]), max_tokens=3) == expected
    assert engine.generate_batch(torch.tensor([[BOS, 3]]), max_tokens=3) == expected


def test_max_tokens_zero_yields_nothing():
    model = PrefixModel(noisy)
    assert columns(Engine(model, ByteTokenizer()), [BOS], max_tokens=0) == [] and model.calls == []


def test_nan_logits_are_an_error_not_a_token():
    for temperature in (0, 1):
        engine = Engine(PrefixModel(lambda prefix: torch.full((262,), torch.nan)), ByteTokenizer())
        with pytest.raises(UserError, match="NaN"):
            columns(engine, [BOS], temperature=temperature)


def test_global_random_state_is_neither_read_nor_moved():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a = columns(Engine(PrefixModel(lambda p: torch.zeros(262))), [BOS], max_tokens=5)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(1)
    assert a == columns(Engine(PrefixModel(lambda p: torch.zeros(262))), [BOS], max_tokens=5)


# --- a conversation's state -----------------------------------------------------------------------------------------


def test_session_prefills_only_what_is_new():
    model = PrefixModel(noisy)
    engine, session = Engine(model, ByteTokenizer()), Session()
    ids = [BOS, 1, 2, 3]
    rows, _ = engine.generate_batch(ids, max_tokens=5, session=session)
    assert session.ids == rows[0][:-1]  # the last id was sampled and never fed
    longer = [*rows[0], 7, 8]
    del model.calls[:]
    again, _ = engine.generate_batch(longer, max_tokens=3, session=session)
    assert model.calls == [(1, 3), (1, 1), (1, 1)]
    assert again == Engine(PrefixModel(noisy), ByteTokenizer()).generate_batch(longer, max_tokens=3)[0]


def test_session_of_another_conversation_or_an_interrupted_one_starts_afresh():
    model = PrefixModel(noisy)
    engine, session = Engine(model, ByteTokenizer()), Session()
    engine.generate_batch([BOS, 1, 2], max_tokens=2, session=session)
    other, _ = engine.generate_batch([BOS, 9, 9, 9, 9, 9], max_tokens=2, session=session)
    assert other == engine.generate_batch([BOS, 9, 9, 9, 9, 9], max_tokens=2)[0]

    def broken(prefix):
        raise KeyboardInterrupt

    model.next_logits = broken
    with pytest.raises(KeyboardInterrupt):
        engine.generate_batch([*other[0], 1, 2], max_tokens=2, session=session)
    assert session.state is None
    with pytest.raises(UserError, match="session"):
        engine.generate([BOS], num_samples=2, session=session)


# --- tools ----------------------------------------------------------------------------------------------------------


def script_of(text: str) -> list[int]:
    """'a{1+1}b' -> ids, with { and } the python tokens and [ ] the output tokens."""
    special = {"{": PYTHON_START, "}": PYTHON_END, "[": OUTPUT_START, "]": OUTPUT_END, "$": ASSISTANT_END}
    return [special.get(c, ord(c)) for c in text]


def test_calculator_output_is_forced_into_the_row():
    said = script_of("a{12*12}[144]b$")
    sampled_there = [65 if i in range(8, 13) else t for i, t in enumerate(said)]  # under the forced ids: noise
    rows, masks = Engine(PrefixModel(says(sampled_there, 1)), ByteTokenizer()).generate_batch([BOS])
    assert rows == [[BOS, *said[:-1]]]
    assert masks == [[0, *[1] * 8, *[0] * 5, 1]]


def test_the_python_tool_runs_code_in_the_sandbox_and_says_why_it_failed():
    tool = python(ByteTokenizer())
    told = ["45", "error: ZeroDivisionError: division by zero"]
    assert tool.answer(["print(sum(range(10)))", "1 / 0"]) == told


def test_tool_without_an_answer_forces_nothing():
    said = script_of("{import os}b$")
    rows, masks = Engine(PrefixModel(says(said, 1)), ByteTokenizer()).generate_batch([BOS])
    assert rows == [[BOS, *said[:-1]]] and masks == [[0, *[1] * (len(said) - 1)]]


def test_tools_of_one_row_do_not_touch_the_others():
    scripts = {1: script_of("{1+1}_____x$"), 2: script_of("abcdefghij$"), 3: script_of("{2*3}{9-1}____y$")}

    def next_logits(prefix):
        return torch.eye(262)[scripts[prefix[1]][len(prefix) - 2]] * 1e4

    rows, _ = Engine(PrefixModel(next_logits), ByteTokenizer()).generate_batch([[BOS, 1], [BOS, 2], [BOS, 3]])
    assert rows[0][2:] == script_of("{1+1}[2]__x")
    assert rows[1][2:] == script_of("abcdefghij")
    assert rows[2][2:] == script_of("{2*3}[6]1}____y")  # the forced ids fell on the second call's start: no call


def test_budget_cuts_the_output_and_max_calls_ends_the_calling():
    def tool(**limits):
        return Tool(PYTHON_START, PYTHON_END, each(lambda query: query * 50), OUTPUT_START, OUTPUT_END, **limits)

    engine = Engine(PrefixModel(says(script_of("{ab}" + "_" * 50), 1)), ByteTokenizer(), [tool(budget=5)])
    assert engine.generate_batch([BOS], max_tokens=12)[0][0][1:] == script_of("{ab}[ababa]_")
    engine = Engine(PrefixModel(says(script_of("{a}___{b}__$"), 1)), ByteTokenizer(), [tool(budget=1, max_calls=1)])
    assert engine.generate_batch([BOS])[0][0][1:] == script_of("{a}[a]{b}__")


def test_tool_output_cannot_spell_a_special_token_nor_overrun_the_context():
    spell = Tool(PYTHON_START, PYTHON_END, each(lambda query: "<|assistant_end|>" * 9), OUTPUT_START, OUTPUT_END)
    engine = Engine(PrefixModel(says(script_of("{a}" + "_" * 90), 1)), ByteTokenizer(), [spell])
    rows, masks = engine.generate_batch([BOS])
    assert len(rows[0]) == 64 and rows[0][5:22] == list(b"<|assistant_end|>") and sum(masks[0]) == 3


def test_handler_that_fails_is_not_hushed_up():
    def handler(queries):
        raise ZeroDivisionError("from the handler")

    tool = Tool(PYTHON_START, PYTHON_END, handler, OUTPUT_START, OUTPUT_END)
    with pytest.raises(ZeroDivisionError, match="from the handler"):
        Engine(PrefixModel(says(script_of("{a}"), 1)), ByteTokenizer(), [tool]).generate_batch([BOS])


def test_no_tools_means_no_call():
    said = script_of("{1+1}b$")
    rows, _ = Engine(PrefixModel(says(said, 1)), ByteTokenizer(), tools=()).generate_batch([BOS])
    assert rows == [[BOS, *said[:-1]]]


# --- the real model: every registered block alone, and all of them in one stack ---------------------------------------

SHAPES = {
    **{name: {"block_pattern": [name], "n_layer": 2} for name in BLOCKS},
    "all": {"block_pattern": list(BLOCKS), "n_layer": 2 * len(BLOCKS)},
    "sandwich": {"block_pattern": ["mamba", "attn", "gdn", "attn", "mamba2"], "n_layer": 5},
    "window": {"n_layer": 3, "window_pattern": "SSL", "window": 5, "n_kv_head": 1, "value_embeddings": True},
}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys(), scope="module")
def gpt(request):
    sizes = {"mamba2_head_dim": 16, "mamba2_d_state": 16, "gdn_head_dim": 12}
    config = GPTConfig(**request.param, **sizes, d_model=32, n_head=2, vocab_size=ByteTokenizer.vocab_size, seq_len=48)
    model = GPT(config)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():  # fresh output projections are zero: give every block something to say
            p += 0.2 * torch.randn(p.shape, generator=generator)
    return model


def prompt(n: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def greedy_without_state(model: GPT, ids: list[int], n: int) -> list[int]:
    ids = list(ids)
    for _ in range(n):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids


@pytest.mark.parametrize("length", [1, 2, 17])
def test_greedy_with_state_equals_greedy_without(gpt, length):
    rows, _ = Engine(gpt).generate_batch(prompt(length), max_tokens=20, temperature=0)
    assert rows[0] == greedy_without_state(gpt, prompt(length), 20)
    assert len(set(rows[0][length:])) > 3  # a model that repeats one id would prove little


def test_ragged_prompts_equal_each_prompt_alone(gpt):
    prompts = [prompt(n, seed=n) for n in (9, 1, 14, 5)]
    for temperature in (0, 1.0):
        rows, _ = Engine(gpt).generate_batch(prompts, max_tokens=15, temperature=temperature, top_k=20)
        alone, _ = Engine(gpt).generate_batch(prompts[0], max_tokens=15, temperature=temperature, top_k=20)
        assert rows[0] == alone[0]
        if temperature == 0:
            assert rows == [greedy_without_state(gpt, p, 15) for p in prompts]


def test_samples_of_one_prefill_equal_samples_of_a_prefill_each(gpt):
    shared, _ = Engine(gpt).generate_batch(prompt(7), num_samples=5, max_tokens=15, seed=9)
    apart, _ = Engine(gpt).generate_batch([prompt(7)] * 5, max_tokens=15, seed=9)
    assert shared == apart and len(set(map(tuple, shared))) == 5


def test_rows_that_leave_do_not_change_the_rest(gpt):
    free, _ = Engine(gpt).generate_batch([prompt(n) for n in (3, 8, 5, 6)], max_tokens=20, seed=2)
    stop = {free[0][6], free[2][9]}
    cut, _ = Engine(gpt).generate_batch([prompt(n) for n in (3, 8, 5, 6)], max_tokens=20, seed=2, stop=stop)
    for n, row, whole in zip((3, 8, 5, 6), cut, free, strict=True):
        end = next((i for i in range(n, len(whole)) if whole[i] in stop), len(whole))
        assert row == whole[:end]
    assert len(cut[0]) <= 6 and len(cut[2]) <= 9


def test_session_of_several_turns_equals_whole_prefills(gpt):
    engine, session, ids = Engine(gpt), Session(), []
    for turn in range(3):
        ids = ids + prompt(4 + turn, seed=turn)
        rows, _ = engine.generate_batch(ids, max_tokens=6, temperature=0, session=session)
        assert rows[0] == greedy_without_state(gpt, ids, 6)
        ids = rows[0]
    assert session.state.pos.tolist() == [len(ids) - 1]


def test_generation_goes_past_the_trained_length_only_when_asked(gpt):
    assert len(Engine(gpt).generate_batch(prompt(40))[0][0]) == 48
    longer, _ = Engine(gpt, max_context=60).generate_batch(prompt(40), temperature=0)
    assert longer[0] == greedy_without_state(gpt, prompt(40), 20)


def test_training_goes_on_after_generation(gpt):
    """Sampling inside a training loop (RL) must leave nothing behind that autograd cannot use."""
    Engine(gpt).generate_batch(prompt(5), num_samples=2, max_tokens=4)
    x = torch.tensor([prompt(9)])
    gpt(x[:, :-1], x[:, 1:]).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in gpt.parameters())
    gpt.zero_grad(set_to_none=True)


# --- streaming text -------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=20), st.lists(st.integers(1, 5), min_size=1))
def test_stream_decoder_prints_whole_characters_however_the_bytes_are_split(text, sizes):
    data, pieces, at = text.encode("utf-8", "replace"), [], 0
    for size in itertools.cycle(sizes):
        if at >= len(data):
            break
        pieces.append(data[at : at + size])
        at += size
    tokenizer = type("Pieces", (), {"decode_bytes": staticmethod(lambda ids: pieces[ids[0]])})
    decoder = StreamDecoder(tokenizer)
    printed = [decoder.push(i) for i in range(len(pieces))]
    assert "".join(printed) == data.decode() and decoder.flush() == ""
    seen = b""
    for piece, now in zip(pieces, itertools.accumulate(printed), strict=True):
        seen += piece
        assert seen.startswith(now.encode()) and len(seen) - len(now.encode()) < 4  # at most 3 bytes wait


def test_stream_decoder_replaces_what_can_never_be_text():
    decoder = StreamDecoder(ByteTokenizer())
    assert [decoder.push(t) for t in (0xC3, 0xA9, 0xFF, 0xE2, 0x82)] == ["", "é", "\N{REPLACEMENT CHARACTER}", "", ""]
    assert decoder.flush() == "\N{REPLACEMENT CHARACTER}"
