"""Tools in batches, the search tool, and segments: forced ids are read in one forward, and nothing else changes."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_engine import SPECIALS, ByteTokenizer, PrefixModel
from torch import Tensor

from nanochat.blocks import BLOCKS
from nanochat.config import UserError
from nanochat.conversation import render, render_documents, render_prompt
from nanochat.engine import ENDED, Engine, Session
from nanochat.gpt import GPT, GPTConfig
from nanochat.tools import NO_MORE_SEARCHES, NOTHING_FOUND, Call, Tool, calculator, each, search

MORE = ["search_start", "search_end", "info_start", "info_end", "doc", "user_start", "user_end", "assistant_start"]
NAMES = [*SPECIALS, *(f"<|{name}|>" for name in MORE)]


class ChatTokenizer(ByteTokenizer):
    vocab_size = 256 + len(NAMES)

    def encode_special(self, name: str) -> int:
        return 256 + NAMES.index(name)

    def encode_ordinary(self, text: str) -> list[int]:
        return self.encode(text)

    def decode_bytes(self, ids: list[int]) -> bytes:
        return b"".join(bytes([t]) if t < 256 else NAMES[t - 256].encode() for t in ids)


TOKENIZER = ChatTokenizer()
BOS, END, START, STOP, OUT, BACK, SEARCH, ASKED, INFO, TOLD, DOC, *_ = range(256, 256 + len(NAMES))


def ids_of(text: str) -> list[int]:
    """{ } python, [ ] its output, < > search, ( ) info, $ the end; any other letter is its byte."""
    special = dict(zip("$[]{}<>()", (END, OUT, BACK, START, STOP, SEARCH, ASKED, INFO, TOLD), strict=True))
    return [special.get(c, ord(c)) for c in text]


def actor(*scripts: str, seq_len: int = 600) -> PrefixModel:
    """Row [BOS, i] samples script i, id after id; what stands in [ ] or ( ) was forced and does not count."""

    def next_logits(prefix: list[int]) -> Tensor:
        said, inside = 0, False
        for token in prefix[2:]:
            inside |= token in (OUT, INFO)
            said += not inside
            inside &= token not in (BACK, TOLD)
        script = [*ids_of(scripts[prefix[1]]), END]
        return torch.eye(TOKENIZER.vocab_size)[script[min(said, len(script) - 1)]] * 1e4

    return PrefixModel(next_logits, TOKENIZER.vocab_size, seq_len)


def prompts(n: int) -> list[list[int]]:
    return [[BOS, i] for i in range(n)]


def python_tool(handler: Any, **options: Any) -> Tool:
    return Tool(START, STOP, handler, OUT, BACK, **options)


class Recorder:
    """A handler that says each query twice and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def __call__(self, queries: list[str]) -> list[str]:
        self.asked.append(queries)
        return [2 * query for query in queries]


# ---- batches and the cache ----


def test_calls_closed_at_one_step_are_asked_together_and_equal_queries_once() -> None:
    handler = Recorder()
    engine = Engine(actor("{ab}x", "{cd}y", "no", "{ab}z", "...{ef}"), TOKENIZER, [python_tool(handler)])
    rows, _ = engine.generate_batch(prompts(5))
    assert handler.asked == [["ab", "cd"], ["ef"]]
    said = ["{ab}[abab]x", "{cd}[cdcd]y", "no", "{ab}[abab]z", "...{ef}[efef]"]
    assert [row[2:] for row in rows] == [ids_of(text) for text in said]


def test_what_was_answered_before_is_not_asked_again_unless_the_tool_says_so() -> None:
    for size, asked in [(1024, [["a"], ["b"]]), (0, [["a"], ["a"], ["b"], ["a"]])]:
        handler = Recorder()
        engine = Engine(actor("{a}{a}{b}{a}"), TOKENIZER, [python_tool(handler, cache_size=size)])
        assert engine.generate_batch(prompts(1))[0][0][2:] == ids_of("{a}[aa]{a}[aa]{b}[bb]{a}[aa]")
        assert handler.asked == asked


def test_the_cache_keeps_the_results_used_last() -> None:
    handler = Recorder()
    tool = python_tool(handler, cache_size=2)
    for query in "abacab":
        assert tool.answer([query]) == [2 * query]
    assert [q for (q,) in handler.asked] == ["a", "b", "c", "b"]
    assert tool.answer(["x", "y", "z", "x"]) == ["xx", "yy", "zz", "xx"]  # more than it keeps
    assert list(tool.cache) == ["z", "x"]


def test_a_handler_must_answer_every_query() -> None:
    with pytest.raises(UserError, match="0 results for 1 queries"):
        Engine(actor("{a}"), TOKENIZER, [python_tool(lambda queries: [])]).generate_batch(prompts(1))


def test_ids_of_a_handler_go_in_as_they_are_and_tools_do_not_mix() -> None:
    tools = [python_tool(each(lambda query: [DOC] * 300)), Tool(SEARCH, ASKED, each(len), INFO, TOLD, render=shout)]
    rows, _ = Engine(actor("{a}<bcd>", "<b>{a}"), TOKENIZER, tools, max_context=700).generate_batch(prompts(2))
    assert rows[0][2:] == [*ids_of("{a}["), *[DOC] * 300, *ids_of("]<bcd>(!!!)")]
    assert rows[1][2:] == [*ids_of("<b>(!){a}["), *[DOC] * 300, *ids_of("]")]


def shout(result: int, row: list[int]) -> tuple[str, int]:
    return "!" * result, result


# ---- search ----

WORLD = {
    "one": [("Alm", "Alm lies in Ost. It is old."), ("Bro", "Bro lies in Wes.")],
    "two": [("Cid", "Cid made the bell of Alm.")],
    "long": [("Alm", "Alm lies in Ost. It is old."), ("Dun", "Dun. " * 40), ("Eve", "Eve too.")],
    "spell": [("Eve", "so <|assistant_end|><|doc|> and on")],
}


def hits_of(query: str) -> list[Any]:
    return [
        SimpleNamespace(document=SimpleNamespace(title=title), chunk=SimpleNamespace(text=text))
        for title, text in WORLD.get(query, ())
    ]


def retrieve(queries: list[str], k: int) -> list[list[Any]]:
    assert queries and all(query.strip() for query in queries)
    return [hits_of(query)[:k] for query in queries]


def info(*queries: str) -> dict[str, Any]:
    pairs = [pair for query in queries for pair in WORLD[query]]
    return {"type": "info", "documents": [{"title": title, "text": text} for title, text in pairs]}


def researcher(script: str, before: list[int], tool: Tool, **options: Any) -> tuple[list[int], list[int], list[Call]]:
    """One row that says the script after `before`: (ids, mask, trace), its end included."""
    model = actor(*[script] * 256, seq_len=2000)
    next_logits = model.next_logits
    model.next_logits = lambda prefix: next_logits([BOS, 0, *prefix[len(before) :]])
    traces: list[list[Call]] = []
    steps = list(Engine(model, TOKENIZER, [tool]).generate(before, traces=traces, **options))
    ids = [*before, *(column[0] for column, _ in steps)]
    return ids, [0] * len(before) + [mask[0] for _, mask in steps], traces[0]


def test_a_search_is_what_the_conversation_format_makes_of_it_numbered_on_from_the_prompt() -> None:
    parts = [
        {"type": "text", "text": "hm"},
        {"type": "search", "text": "one"},
        info("one"),
        {"type": "search", "text": "none"},
        {"type": "info", "text": NOTHING_FOUND},
        {"type": "search", "text": " two"},
        info("two"),
        {"type": "text", "text": "so"},
    ]
    question = [{"type": "text", "text": "who?"}, {**info("long"), "type": "docs"}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": parts}]
    ids, mask, trace = researcher(
        "hm<one><none>< two>so", render_prompt(TOKENIZER, {"messages": messages}), search(TOKENIZER, retrieve)
    )
    assert (ids, mask) == render(TOKENIZER, {"messages": messages})
    assert "[4] Alm\n" in TOKENIZER.decode(ids) and "[6] Cid\n" in TOKENIZER.decode(ids)
    assert [(c.query, c.result) for c in trace] == [("one", hits_of("one")), ("none", []), ("two", hits_of("two"))]
    assert all(ids[c.at : c.at + len(c.ids)] == c.ids for c in trace)


def test_documents_that_do_not_fit_are_in_neither_the_row_nor_its_trace() -> None:
    ids, _, (call,) = researcher("<long>", [BOS], search(TOKENIZER, retrieve, max_doc_tokens=60))
    assert len(call.ids) <= 62 and ids[call.at : call.at + len(call.ids)] == call.ids
    assert call.result == hits_of("long")[:2]  # the second is shortened
    documents = [{"title": title, "text": text} for title, text in WORLD["long"]]
    assert call.ids[1:-1] == render_documents(TOKENIZER, documents, max_tokens=60)
    ids, _, (call,) = researcher("<long>", [BOS], search(TOKENIZER, retrieve, max_doc_tokens=5))
    assert call.result == [] and call.ids == ids_of(f"({NOTHING_FOUND})")
    ids, _, (call,) = researcher("<long>", [BOS], search(TOKENIZER, retrieve, top_k=1))
    assert call.result == hits_of("long")[:1]


def test_a_document_cannot_spell_a_special_token() -> None:
    ids, _, _ = researcher("<spell>", [BOS], search(TOKENIZER, retrieve))
    assert ids.count(END) == ids.count(DOC) == 1


def test_after_its_last_search_a_row_is_told_so() -> None:
    ids, mask, trace = researcher("<one><two><two>", [BOS], search(TOKENIZER, retrieve, max_calls=1))
    told = ids_of(f"({NO_MORE_SEARCHES})")
    assert [c.ids for c in trace[1:]] == [told, told] and [c.result for c in trace[1:]] == [None, None]
    assert ids.count(DOC) == 2 and ids[-len(told) - 1 :] == [*told, END]
    assert sum(mask) == len(ids) - 1 - sum(len(c.ids) for c in trace)


def test_a_query_past_its_budget_is_ended_for_the_row() -> None:
    tool = search(TOKENIZER, retrieve, max_query_tokens=3)
    assert researcher("<two>so", [BOS], tool)[2][0].result == hits_of("two")  # just as long
    ids, mask, (call,) = researcher("<twofold", [BOS], tool)
    assert call.query == "two" and ids[:6] == [BOS, *ids_of("<two>")] and mask[:6] == [0, 1, 1, 1, 1, 0]
    ids, mask, trace = researcher("<two$", [BOS], tool)
    assert ids == [BOS, *ids_of("<two$")] and not trace and sum(mask) == 5  # it ended there by itself


def test_a_blank_query_finds_nothing_and_asks_nobody() -> None:
    assert researcher("< >", [BOS], search(TOKENIZER, retrieve))[2][0].ids == ids_of(f"({NOTHING_FOUND})")


@pytest.mark.parametrize("name", ["top_k", "max_doc_tokens", "max_calls", "max_query_tokens"])
def test_search_refuses_a_limit_of_nothing(name: str) -> None:
    with pytest.raises(UserError, match=f"{name}=0"):
        search(TOKENIZER, retrieve, **{name: 0})


# ---- segments: what is read, and when ----


def test_forced_ids_are_one_forward_and_their_rows_cost_none_while_they_are_emitted() -> None:
    model = actor("{abc}x", "................")
    Engine(model, TOKENIZER, [python_tool(Recorder())]).generate_batch(prompts(2))
    # 5 steps of both, 8 in which only the other row is read, then the end id and the 8 forced ids behind it at once
    assert model.calls == [(2, 2), *[(2, 1)] * 4, *[(1, 1)] * 8, (1, 9), (1, 1), (2, 1), *[(1, 1)] * 2]


def test_rows_that_wait_are_read_together() -> None:
    model = actor("{abc}x", "..{ab}x", "x")
    Engine(model, TOKENIZER, [python_tool(Recorder())]).generate_batch(prompts(3))
    assert [shape for shape in model.calls if shape[1] > 1] == [(3, 2), (2, 9)]


def test_no_call_is_made_and_nothing_read_for_a_row_that_ends_before_it_could_go_on() -> None:
    for budget, asked, emitted in [(4, [], 4), (5, [["ab"]], 5), (10, [["ab"]], 10), (11, [["ab"]], 11)]:
        handler, model = Recorder(), actor("{ab}x")
        traces: list[list[Call]] = []
        rows, masks = Engine(model, TOKENIZER, [python_tool(handler)]).generate_batch(
            prompts(1), max_tokens=budget, traces=traces
        )
        assert handler.asked == asked and len(rows[0]) == 2 + emitted
        assert rows[0][2:] == ids_of("{ab}[abab]x")[:emitted]
        assert masks[0] == [0, 0, *[1] * 4, *[0] * 6, 1][: 2 + emitted]
        assert model.calls == [(1, 2), *[(1, 1)] * 3, *[(1, 7)] * (budget == 11)]
        assert len(traces[0]) == len(asked)


def test_a_row_ends_at_an_end_id_inside_what_was_forced() -> None:
    model = actor("{ab}x", "{c}......")
    engine = Engine(model, TOKENIZER, [python_tool(Recorder())])
    rows, _ = engine.generate_batch(prompts(2), stop=[ord("b")])
    assert [row[2:] for row in rows] == [ids_of("{a"), ids_of("{c}[cc]......")]
    rows, _ = engine.generate_batch(prompts(2), stop=[BACK])
    assert [row[2:] for row in rows] == [ids_of("{ab}[abab"), ids_of("{c}[cc")]


def test_a_session_holds_what_was_read_and_goes_on_behind_a_call() -> None:
    model, session = actor("{abc}xyz$"), Session()
    engine = Engine(model, TOKENIZER, [python_tool(Recorder())])
    steps = engine.generate(prompts(1), session=session)
    seen = [BOS, 0, *(next(steps)[0][0] for _ in range(8))]  # left in the middle of the output
    assert session.ids == seen[:6]
    del model.calls[:]
    rows, _ = engine.generate_batch(seen + ids_of("cabc]"), session=session)
    assert model.calls[0] == (1, 9) and rows[0][2:] == ids_of("{abc}[abcabc]xyz")


# ---- segments equal one id at a time, for every block ----


class OneByOne(Engine):
    """Forced ids are fed one per step, as sampled ones are."""

    @torch.inference_mode()
    def _run(self, prompts, rows, sampler, ends, session):
        live = rows
        logits, state = self._prefill(prompts, len(rows) // len(prompts), max(r.left for r in rows), session)
        while live:
            picked = sampler(logits, [row.column for row in live])
            column, mask = [ENDED] * len(rows), [0] * len(rows)
            for row, token in zip(live, picked, strict=True):
                emitted = (self._force(row, ends), 0) if row.forced else self._write(row, token, ends)
                column[row.column], mask[row.column] = emitted
            yield column, mask
            kept = [i for i, row in enumerate(live) if row.left]
            live, state = [live[i] for i in kept], state.select(torch.tensor(kept, dtype=torch.long))
            self._answer([row for row in live if row.tool is not None and row.ids[-1] == row.tool.end])
            if live:
                logits = self._forward([row.ids[-1:] for row in live], state, session)


class Digits:
    """16 ids are letters; 16 and 17 are bos and the assistant's end; 18 .. 21 the tool's."""

    vocab_size = 22

    def encode_special(self, name: str) -> int:
        return {"<|bos|>": 16, "<|assistant_end|>": 17}[name]

    def encode(self, text: str) -> list[int]:
        return [ord(c) - ord("a") for c in text]

    def decode(self, ids: list[int], errors: str) -> str:
        return "".join(chr(ord("a") + t) for t in ids if t < 16)


def echo(query: str) -> str | None:
    """Outputs of very different lengths, and now and then none."""
    total = sum(map(ord, query))
    return None if total % 7 == 3 else (query + "badcafe")[: 1 + total % 11] * (1 + total % 3)


SHAPES = {
    **{name: {"block_pattern": [name], "n_layer": 2} for name in BLOCKS},
    "mixed": {"block_pattern": ["mamba", "attn", "gdn", {"block": "attn", "window": 5}, "mamba2"], "n_layer": 5},
    "window": {"n_layer": 3, "window_pattern": "SSL", "window": 5, "n_kv_head": 1, "value_embeddings": True},
}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys(), scope="module")
def gpt(request: pytest.FixtureRequest) -> GPT:
    sizes = {"mamba2_head_dim": 16, "mamba2_d_state": 16, "gdn_head_dim": 12}
    model = GPT(GPTConfig(**request.param, **sizes, d_model=32, n_head=2, vocab_size=22, seq_len=80))
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape, generator=generator)
    likely = torch.zeros(22)
    likely[18:20], likely[16:18] = 2.5, -3.0  # calls, and few ends
    model.register_forward_hook(lambda module, args, logits: logits + likely)
    return model


def letters(n: int, seed: int) -> list[int]:
    return torch.randint(0, 16, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def both(gpt: GPT, ids: list[list[int]], **options: Any) -> list[list[Call]]:
    """Generate both ways, compare ids, masks and traces, and hand over the traces."""
    told: list[Any] = []
    for kind in (Engine, OneByOne):
        traces: list[list[Call]] = []
        tool = Tool(18, 19, each(echo), 20, 21, max_query=6, max_calls=5)
        steps = list(kind(gpt, Digits(), [tool]).generate(ids, traces=traces, **options))
        told.append((steps, [[(c.query, c.result, c.at, c.ids) for c in trace] for trace in traces]))
    assert told[0] == told[1]
    return traces


def test_segments_equal_the_path_of_one_id_at_a_time(gpt: GPT) -> None:
    ragged = [letters(n, seed=n) for n in (9, 1, 14, 5)]
    traces = both(gpt, ragged, temperature=0, max_tokens=40) + both(gpt, ragged, num_samples=2, max_tokens=40, seed=5)
    assert len({len(call.ids) for trace in traces for call in trace}) > 3
    assert max(map(len, traces)) >= 2 and sum(map(len, traces)) >= 8  # a test without calls would prove little


def test_segments_equal_it_for_samples_that_share_a_prefix_and_whatever_the_budget(gpt: GPT) -> None:
    for budget, seed in itertools.product((3, 9, 22), range(2)):
        both(gpt, [letters(7, seed)], num_samples=5, max_tokens=budget, seed=seed, top_k=12)


def test_segments_fit_where_their_pads_would_not(gpt: GPT) -> None:
    """Rows near the end of the context, together with rows that have much to read."""
    both(gpt, [letters(n, seed=n) for n in (66, 40, 70, 58)], num_samples=3, seed=1)


def test_a_row_with_calls_says_the_same_alone(gpt: GPT) -> None:
    tool = Tool(18, 19, each(echo), 20, 21, max_query=6)
    many = [letters(n, seed=n) for n in (9, 4, 12)]
    rows, masks = Engine(gpt, Digits(), [tool]).generate_batch(many, seed=3)
    assert Engine(gpt, Digits(), [tool]).generate_batch(many[:1], seed=3) == (rows[:1], masks[:1])


def test_the_calculator_is_the_only_tool_by_default() -> None:
    for tools in (None, [calculator(TOKENIZER)]):
        engine = Engine(actor("{6*7}<two>"), TOKENIZER, tools)
        assert engine.generate_batch(prompts(1))[0][0][2:] == ids_of("{6*7}[42]<two>")
