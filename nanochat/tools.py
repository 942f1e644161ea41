"""Tools a model calls while it writes: a query between two special ids, and what comes back behind it.

    engine = Engine(model, tokenizer, tools=[calculator(tokenizer), search(tokenizer, kb.search)])

A handler gets the queries of all rows that closed a call at the same step and answers them together.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from nanochat.config import UserError
from nanochat.conversation import render_documents
from nanochat.execution import calculate, run_many

PYTHON_TOKENS = ("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>")
SEARCH_TOKENS = ("<|search_start|>", "<|search_end|>", "<|info_start|>", "<|info_end|>")
NOTHING_FOUND = "nothing found"
NO_MORE_SEARCHES = "no more searches"

Handler = Callable[[list[str]], Sequence[Any]]  # queries -> one result each
Render = Callable[[Any, list[int]], tuple[str | list[int], Any]]  # result, ids of the row -> output, what was shown


@dataclass(frozen=True)
class Tool:
    """Ids sampled between `start` and `end` are decoded and given to `handler`; its result comes back into the row.

    A result is text, ids or None, unless `render` makes text or ids of it. Text is encoded as ordinary text (it cannot
    spell a special token) and cut to `budget` ids; ids go in as they are; both between `output_start` and
    `output_end`. None forces nothing.
    """

    start: int
    end: int
    handler: Handler
    output_start: int
    output_end: int
    budget: int = 256
    max_calls: int = 64  # of one row; after that comes `over`, or, where that is None, the start id is an ordinary id
    over: str | None = None
    max_query: int | None = None  # ids; the end of a longer query is forced
    render: Render | None = None
    cache_size: int = 1024  # results kept, those used last; 0 where the same query may have another answer
    cache: OrderedDict[str, Any] = field(default_factory=OrderedDict, init=False, repr=False, compare=False)

    def answer(self, queries: Sequence[str]) -> list[Any]:
        """One result per query; the handler sees each different query once, and none that the cache holds."""
        results = {query: self.cache[query] for query in queries if query in self.cache}
        new = [query for query in dict.fromkeys(queries) if query not in results]
        if new:
            found = self.handler(new)
            if len(found) != len(new):
                raise UserError(f"a tool's handler gave {len(found)} results for {len(new)} queries: expected one each")
            results.update(zip(new, found, strict=True))
        if self.cache_size:
            for query in queries:
                self.cache[query] = results[query]
                self.cache.move_to_end(query)
            while len(self.cache) > self.cache_size:
                self.cache.popitem(last=False)
        return [results[query] for query in queries]


@dataclass(frozen=True)
class Call:
    """One answered call of a row, as a trace keeps it."""

    tool: Tool
    query: str
    result: Any  # what the row was shown: the handler's text, a search's hits; None past max_calls
    at: int  # place in the row, prompt included, of the first of `ids`
    ids: list[int]  # what was forced; the row may have ended inside them


def each(function: Callable[[str], Any]) -> Handler:
    """A handler that asks the function query by query."""
    return lambda queries: [function(query) for query in queries]


def calculator(tokenizer: Any) -> Tool:
    """The calculator, between nanochat's python and output tokens."""
    start, end, output_start, output_end = map(tokenizer.encode_special, PYTHON_TOKENS)
    return Tool(start, end, each(calculate), output_start, output_end)


def python(tokenizer: Any, timeout_s: float = 5.0) -> Tool:
    """Python in the sandbox, between the same tokens: what the code prints comes back, or why it failed."""

    def handler(codes: list[str]) -> list[str]:
        results = run_many(codes, timeout_s=timeout_s)
        return [r.stdout.rstrip("\n") if r.ok else f"error: {r.error}" for r in results]

    start, end, output_start, output_end = map(tokenizer.encode_special, PYTHON_TOKENS)
    return Tool(start, end, handler, output_start, output_end, max_calls=8, cache_size=0)


def search(
    tokenizer: Any,
    retrieve: Callable[[list[str], int], Sequence[Sequence[Any]]],
    top_k: int = 3,
    max_doc_tokens: int = 256,
    max_calls: int = 4,
    max_query_tokens: int = 32,
) -> Tool:
    """Documents for a query, between the info tokens, numbered on from those the row holds (its <|doc|> ids).

    retrieve(queries, k) gives each query's hits, best first, with .document.title and .chunk.text; what it gave is
    kept, so make a new tool when the knowledge base has changed. The documents of one call hold max_doc_tokens ids at
    most: the last are shortened at whole sentences, then left out, of the row and of its trace. Where no document is
    left, and for a blank query, the row is told "nothing found"; after max_calls, "no more searches".
    """
    if min(top_k, max_doc_tokens, max_calls, max_query_tokens) < 1:
        raise UserError(
            f"search: top_k={top_k}, max_doc_tokens={max_doc_tokens}, max_calls={max_calls}, "
            f"max_query_tokens={max_query_tokens}: expected at least 1 of each"
        )
    doc = tokenizer.encode_special("<|doc|>")

    def handler(queries: list[str]) -> list[Sequence[Any]]:
        asked = [query for query in queries if query.strip()]
        hits = retrieve([query.strip() for query in asked], top_k) if asked else []
        found = dict(zip(asked, hits, strict=True))
        return [found.get(query, []) for query in queries]

    def render(hits: Sequence[Any], row: list[int]) -> tuple[str | list[int], Sequence[Any]]:
        documents = [{"title": hit.document.title, "text": hit.chunk.text} for hit in hits]
        ids = render_documents(tokenizer, documents, row.count(doc) + 1, max_doc_tokens)
        return ids or NOTHING_FOUND, hits[: ids.count(doc)]

    start, end, output_start, output_end = map(tokenizer.encode_special, SEARCH_TOKENS)
    return Tool(
        start, end, handler, output_start, output_end, max_calls=max_calls, over=NO_MORE_SEARCHES,
        max_query=max_query_tokens, render=render,
    )  # fmt: skip
