"""The search tool of nanochat/tools.py with what it finds compressed: retrieved blocks enter as vectors and tokens.

    engine = Engine(model, tokenizer, tools=[compressed_search(reader, kb.search, p=0.1)])

A policy chooses by the query the model wrote. Titles and numbers stay tokens, so citations work as ever.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from nanochat.compress.chunks import Prompt, cut, mix
from nanochat.compress.reader import Reader
from nanochat.tools import Tool, search


def compressed_search(
    reader: Reader,
    retrieve: Callable[[list[str], int], Sequence[Sequence[Any]]],
    p: float,
    policy: str = "rl",
    **options: Any,
) -> Tool:
    """A share p of the chunks found stays tokens. options: those of nanochat.tools.search; its max_doc_tokens counts
    tokens before compression."""
    tool = search(reader.tokenizer, retrieve, **options)
    assert tool.render is not None
    render_tokens = tool.render

    def render(hits: Sequence[Any], row: list[int]) -> tuple[Any, Any]:
        ids, shown = render_tokens(hits, row)
        if isinstance(ids, str):  # nothing found
            return ids, shown
        asked = row[len(row) - 1 - row[::-1].index(tool.start) + 1 : -1]
        query = reader.tokenizer.decode(asked, errors="replace")
        prompt = Prompt(ids, [0] * len(ids), cut(reader.tokenizer, ids, reader.k), query)
        mixed, _, slots = mix(prompt, reader.choose(policy, [prompt], p)[0], reader.chunk_id)
        if not slots:
            return mixed, shown
        with torch.inference_mode():
            return (mixed, reader.vectors([prompt.chunk_ids(i) for i in slots])), shown

    return dataclasses.replace(tool, render=render)
