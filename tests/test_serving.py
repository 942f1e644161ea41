"""The scheduler against the offline engine: whatever comes and goes beside it, a request gets its own answer."""

import random
from typing import Any

import pytest
import torch
from serving_model import make

from nanochat.config import UserError
from nanochat.engine import Engine
from nanochat.serving.functions import Function, FunctionCall, Functions, parse_call, written
from nanochat.serving.reply import Reply, Stops, reply_text
from nanochat.serving.request import Busy, End, Failed, Piece, Request, Sampling
from nanochat.serving.scheduler import Limits, Scheduler
from nanochat.tools import PYTHON_TOKENS, Tool, each

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(*make(["attn", "mamba2"]))


class Heard:
    """What a request was answered."""

    def __init__(self, prompt: list[int], max_tokens: int = 20, **options: Any) -> None:
        self.text: dict[int, str] = {}
        self.ends: dict[int, End] = {}
        self.failed: list[Failed] = []
        self.pieces: list[Piece] = []
        self.request = Request(prompt, max_tokens, self.take, **{"sampling": GREEDY, **options})

    def take(self, event: Any) -> None:
        if isinstance(event, Failed):
            self.failed.append(event)
            return
        self.text[event.choice] = self.text.get(event.choice, "") + event.text
        if isinstance(event, End):
            assert event.choice not in self.ends
            self.ends[event.choice] = event
        else:
            self.pieces.append(event)


def run(scheduler: Scheduler) -> None:
    while scheduler.step():
        pass


def ask(engine: Engine, *args: Any, **options: Any) -> Heard:
    heard, scheduler = Heard(*args, **options), Scheduler(engine)
    scheduler.submit(heard.request)
    run(scheduler)
    return heard


def ids(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(300) for _ in range(n)]


def offline(engine: Engine, heard: Heard) -> list[str]:
    r, s = heard.request, heard.request.sampling
    options = {"temperature": s.temperature, "top_k": s.top_k, "top_p": s.top_p, "seed": s.seed}
    rows, _ = engine.generate_batch(r.prompt, num_samples=r.n, max_tokens=r.max_tokens, **options)
    return [reply_text(engine.tokenizer, row[len(r.prompt) :], r.stop) for row in rows]


def idle(scheduler: Scheduler) -> bool:
    under_way = (scheduler.open, scheduler.reading, scheduler.writing, scheduler.asking, scheduler.waiting)
    return not any(under_way) and scheduler.answering is None and scheduler.counts.rows == 0


@pytest.mark.parametrize("blocks", [["attn"], ["attn", "mamba2"], ["gdn", "mamba"]])
def test_every_request_gets_the_offline_engines_text_under_random_admission(blocks: list[str]):
    engine, rng = Engine(*make(blocks)), random.Random(0)
    bos = engine.tokenizer.bos_id
    shared = [bos, *ids(rng, 40)]
    asked = []
    for i in range(24):
        prompt = [*(shared if i % 2 else [bos]), *ids(rng, rng.randrange(1, 70))]
        sampled = Sampling(1.0, rng.choice([None, 5]), rng.choice([None, 0.9]), seed=i)
        sampling = sampled if i % 4 == 0 else GREEDY
        asked.append(Heard(prompt, rng.randrange(1, 50), n=1 + (i % 5 == 0), sampling=sampling))
    scheduler, coming = Scheduler(engine, Limits(max_rows=5, prefill_tokens=24)), list(asked)
    while coming or scheduler.open or scheduler.waiting:
        while coming and rng.random() < 0.3:
            scheduler.submit(coming.pop(0).request)
        scheduler.step()
        assert scheduler.counts.rows <= 5
    for heard in asked:
        assert [heard.text[i] for i in range(heard.request.n)] == offline(engine, heard)
    assert scheduler.counts.cached_tokens > 0 and idle(scheduler)


def test_an_answer_that_is_not_streamed_is_told_twice_and_says_the_same(engine: Engine):
    prompt = [engine.tokenizer.bos_id, *ids(random.Random(8), 9)]
    streamed, whole = (Heard(prompt, n=2, logprobs=1, stream=stream) for stream in (True, False))
    rounds = []
    for heard in (streamed, whole):
        deliveries: list[int] = []

        def deliver(events: Any, deliveries: list[int] = deliveries) -> None:
            deliveries.append(len(events))
            for listener, event in events:
                listener(event)

        scheduler = Scheduler(engine, deliver=deliver)
        scheduler.submit(heard.request)
        run(scheduler)
        rounds.append(len(deliveries))
    assert whole.text == streamed.text and whole.ends == streamed.ends
    for i in range(2):
        assert [p for p in whole.pieces if p.choice == i] == [p for p in streamed.pieces if p.choice == i]
    assert rounds[1] <= 4 < rounds[0]


def test_a_shared_prefix_is_read_once_it_was_seen_twice(engine: Engine):
    rng, scheduler = random.Random(1), Scheduler(engine)
    shared = [engine.tokenizer.bos_id, *ids(rng, 30)]
    for _ in range(3):
        heard = Heard([*shared, *ids(rng, 5)])
        scheduler.submit(heard.request)
        run(scheduler)
        assert heard.text[0] == offline(engine, heard)[0]
    assert heard.request.cached == len(shared)


def test_the_next_turn_goes_on_from_the_last_ones_state(engine: Engine):
    scheduler, prompt = Scheduler(engine), [engine.tokenizer.bos_id, *ids(random.Random(2), 30)]
    scheduler.submit(Heard(prompt, 10).request)
    run(scheduler)
    [said], _ = engine.generate_batch(prompt, max_tokens=10, temperature=0)
    nxt = Heard([*said, 5, 6, 7], 20)
    scheduler.submit(nxt.request)
    run(scheduler)
    assert nxt.request.cached >= len(prompt) and nxt.text[0] == offline(engine, nxt)[0]


def test_states_kept_stay_within_their_bytes(engine: Engine):
    rng, scheduler = random.Random(3), Scheduler(engine, Limits(cache_bytes=300_000))
    for _ in range(12):
        scheduler.submit(Heard([engine.tokenizer.bos_id, *ids(rng, 30)], 5).request)
    run(scheduler)
    assert 0 < scheduler.prefixes.bytes <= 300_000
    assert scheduler.prefixes.bytes == sum(s.bytes() for s in scheduler.prefixes.states.values())


def test_cancelled_requests_leave_no_row_and_others_unmoved(engine: Engine):
    rng, scheduler = random.Random(4), Scheduler(engine, Limits(max_rows=4))
    asked = [Heard([engine.tokenizer.bos_id, *ids(rng, 9)], 30, n=1 + i % 2) for i in range(10)]
    for heard in asked:
        scheduler.submit(heard.request)
    for i in range(6):
        scheduler.step()
        scheduler.cancel(asked[i].request)
    run(scheduler)
    assert not any(heard.ends and heard.failed for heard in asked) and idle(scheduler)
    for heard in asked[6:]:
        assert [heard.text[i] for i in range(heard.request.n)] == offline(engine, heard)


def test_a_full_queue_is_busy_and_a_late_request_fails(engine: Engine):
    scheduler = Scheduler(engine, Limits(max_rows=1, max_queue=2))
    asked = [Heard([1, 2, 3], seconds=-1.0 if i == 1 else 60.0) for i in range(4)]
    for heard in asked[:3]:  # one to begin, two to wait
        scheduler.submit(heard.request)
    with pytest.raises(Busy, match="3 requests wait"):
        scheduler.submit(asked[3].request)
    run(scheduler)
    assert asked[0].ends and asked[2].ends and not asked[0].failed
    assert [f.kind for f in asked[1].failed] == ["timeout"] and not asked[1].ends
    assert idle(scheduler)


def test_what_cannot_work_is_refused(engine: Engine):
    scheduler = Scheduler(engine)
    for prompt, options in (([], {}), ([999], {}), ([1] * 256, {}), ([1], {"n": 99}), ([1], {"max_tokens": 0})):
        with pytest.raises(UserError):
            scheduler.submit(Heard(prompt, **{"max_tokens": 5, **options}).request)
    for name, value in (("temperature", -1), ("temperature", float("nan")), ("top_p", 0), ("min_p", 2), ("top_k", -1)):
        with pytest.raises(UserError, match=name):
            Sampling(**{name: value})


def test_a_row_ends_at_max_tokens_and_at_the_context(engine: Engine):
    prompt = [engine.tokenizer.bos_id, *ids(random.Random(5), 250)]
    assert ask(engine, prompt[:10], 7).ends[0].n_tokens == 7
    end = ask(engine, prompt, 200).ends[0]
    assert end.reason == "length" and end.n_tokens == 256 - len(prompt)


def test_a_stop_string_ends_the_text_before_itself_however_ids_cut_it(engine: Engine):
    prompt = [engine.tokenizer.bos_id, 5, 6, 7]
    whole = ask(engine, prompt, 40).text[0]
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    heard = ask(engine, prompt, 40, stop=("never said", stop))
    assert heard.text[0] == whole[: whole.index(stop)] and heard.ends[0].reason == "stop"


@pytest.mark.parametrize("cut", range(1, 6))
def test_stops_hold_back_only_what_may_be_a_stop(cut: int):
    text, stops = "abababac and more", Stops(["abac", "zz"])
    shown = [stops.push(text[i : i + cut]) for i in range(0, len(text), cut)]
    assert "".join(shown) + stops.flush() == "abab" and stops.hit
    other = Stops(["abac"])
    assert other.push("xaba") == "x" and other.push("b") == "ab" and other.flush() == "ab"


def test_log_probabilities_are_those_of_the_model(engine: Engine):
    prompt = [engine.tokenizer.bos_id, 5, 6, 7]
    heard = ask(engine, prompt, 12, logprobs=3)
    chosen = [p.chosen for p in heard.pieces if p.chosen]
    said = [c.id for c in chosen]
    with torch.inference_mode():
        nats = torch.log_softmax(engine.model(torch.tensor([[*prompt, *said]]))[0], -1)
    for place, c in enumerate(chosen, len(prompt) - 1):
        assert c.logprob == pytest.approx(float(nats[place, c.id]), abs=1e-4)
        assert c.top[0] == (c.id, pytest.approx(c.logprob)) and len(c.top) == 3
    assert len(said) == 12


def test_options_move_what_is_sampled_the_way_they_should(engine: Engine):
    prompt = [engine.tokenizer.bos_id, 5, 6, 7]
    greedy = ask(engine, prompt, 40).text[0]
    assert ask(engine, prompt, 40, sampling=Sampling(1.0, min_p=1.0, seed=3)).text[0] == greedy
    assert ask(engine, prompt, 40, sampling=Sampling(1.0, seed=3)).text[0] != greedy
    heard = ask(engine, prompt, 40, sampling=Sampling(0, repetition_penalty=100.0), logprobs=0)
    said = [p.chosen.id for p in heard.pieces if p.chosen]
    assert len(set(said)) > 30  # almost nothing twice


# ---- tools: a model that says a script ----


class Scripted:
    """Greedy ids are those of the script, by place; each row's own state is what it has read."""

    def __init__(self, engine: Engine, script: list[int], start: int) -> None:
        self.model, self.script, self.start = engine.model, script, start
        self.config, self.device, self.init_state = engine.model.config, engine.model.device, engine.model.init_state

    def __call__(self, x: Any, state: Any, lengths: Any = None, last_only: bool = False) -> Any:
        self.model(x, state=state, lengths=lengths, last_only=last_only)
        places = (state.pos - self.start).clamp(0, len(self.script) - 1).tolist()
        return torch.eye(self.config.vocab_size)[[self.script[p] for p in places]][:, None] * 1e4


def scripted(engine: Engine, text: list[str | int], start: int, handler: Any = None) -> Engine:
    tokenizer = engine.tokenizer
    script = [t for part in text for t in ([part] if isinstance(part, int) else tokenizer.encode_ordinary(part))]
    special = [tokenizer.encode_special(name) for name in PYTHON_TOKENS]
    tools = None if handler is None else [Tool(special[0], special[1], each(handler), special[2], special[3])]
    model: Any = Scripted(engine, [*script, tokenizer.encode_special("<|assistant_end|>")], start)
    return Engine(model, tokenizer, tools)


def test_the_servers_tool_answers_out_of_sight_and_the_row_goes_on(engine: Engine):
    start, end, out, back = (engine.tokenizer.encode_special(name) for name in PYTHON_TOKENS)
    text = ["it is ", start, "6*7", end, out, "42", back, "42."]
    heard = ask(scripted(engine, text, 4), [1, 2, 3, 4], 60)
    assert heard.text[0] == "it is 42." and heard.ends[0].reason == "stop"
    [call] = heard.ends[0].trace
    assert (call.query, call.result) == ("6*7", "42")


def test_a_tool_that_fails_fails_its_request_alone(engine: Engine):
    def handler(query: str) -> str:
        raise UserError(f"no {query}")

    start, end, _, _ = (engine.tokenizer.encode_special(name) for name in PYTHON_TOKENS)
    scheduler = Scheduler(scripted(engine, [start, "x", end, "y"], 4, handler))
    heard = Heard([1, 2, 3, 4], 60)
    scheduler.submit(heard.request)
    run(scheduler)
    assert heard.failed == [Failed("internal", "no x")] and idle(scheduler)


def test_a_call_of_the_clients_function_ends_the_row(engine: Engine):
    start, end, _, _ = (engine.tokenizer.encode_special(name) for name in PYTHON_TOKENS)
    given = {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
    functions = Functions([Function.of(given)], engine.tokenizer)
    talks = scripted(engine, ["Let me look. ", start, "get_weather('Oslo')", end, "no more"], 4)
    heard = ask(talks, [1, 2, 3, 4], 60, functions=functions)
    assert heard.text[0] == "Let me look. " and heard.ends[0].reason == "tool_calls"
    assert heard.ends[0].call == FunctionCall("get_weather", {"city": "Oslo"})
    forced = [start, *engine.tokenizer.encode_ordinary("get_weather(")]
    talks = scripted(engine, ["city='Rome')", end], 4 + len(forced))
    heard = ask(talks, [1, 2, 3, 4], 60, functions=functions, begin=forced)
    assert heard.ends[0].call == FunctionCall("get_weather", {"city": "Rome"})


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("f(1, 'x')", {"a": 1, "b": "x"}),
        (" f(b=[1, {'c': None}]) ", {"b": [1, {"c": None}]}),
        ("f()", {}),
        ("f(1, a=2)", None),
        ("f(1, 2, 3)", None),
        ("f(__import__('os'))", None),
        ("f(**{'a': 1})", None),
        ("f(1e999)", None),
        ("f({1, 2})", None),
        ("g(1)", None),
        ("f(1); f(2)", None),
        ("f" + "(" * 5000, None),
        ("f(" + "[" * 4000 + ")", None),
    ],
)
def test_only_a_call_with_literals_is_a_call(text: str, arguments: dict | None):
    call = parse_call(text, {"f": Function("f", "", ("a", "b"), ("any", "any"))})
    assert call == (None if arguments is None else FunctionCall("f", arguments))
    if call is not None:
        assert parse_call(written(call), {"f": Function("f", "", ("a", "b"), ("any", "any"))}) == call


def test_citations_stand_behind_the_text_and_an_abstention_is_words(engine: Engine):
    tokenizer = engine.tokenizer
    cite = [
        tokenizer.encode_special("<|cite_start|>"),
        *tokenizer.encode("2"),
        tokenizer.encode_special("<|cite_end|>"),
    ]
    reply = Reply(tokenizer)
    said = "".join(reply.push(t) for t in [*cite, *cite, *tokenizer.encode("Oslo")])
    assert said + reply.finish() == "Oslo [2]" and reply.citations == [2, 2]
    assert reply_text(tokenizer, [tokenizer.encode_special("<|abstain|>")]) == "I don't know (not in the documents)."
