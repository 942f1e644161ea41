"""Our tokenizer as transformers reads it: tokenizer.json of the tokenizers library, and a chat template.

Ids equal Tokenizer.encode's, with two differences that lie in transformers. A text that spells a special token becomes
that token (unless split_special_tokens=True is passed), and a text with surrogates is refused. Called on plain text the
tokenizer puts <|bos|> first, as in training; the chat template writes its own.
"""

import json
import re
from itertools import pairwise
from typing import Any

from nanochat.config import UserError
from nanochat.conversation import WRAPPED
from nanochat.tokenizer import Tokenizer

BOS, EOS = "<|bos|>", "<|assistant_end|>"
POSSESSIVE = re.compile(r"(\\p\{\w+\}|\\?\w|\[[^\]]*\])(\{\d+(?:,\d*)?\})\+")  # a token of a regex, {1,3}+

# conversation.render in Jinja: add_generation_prompt=True gives render_for_completion, False render_conversation.
CHAT_TEMPLATE = """
{%- set wrapped = WRAPPED -%}
{%- set ns = namespace(head='', n=1, user=true) -%}
{{- bos_token -}}
{%- for message in messages -%}
  {%- set text = message.content is string -%}
  {%- set parts = [{'type': 'text', 'text': message.content}] if text else message.content -%}
  {%- if message.role == 'system' and loop.first -%}
    {%- set ns.head = parts | map(attribute='text') | join -%}
    {%- if ns.head -%}{%- set ns.head = ns.head ~ '\\n\\n' -%}{%- endif -%}
  {%- elif message.role != ('user' if ns.user else 'assistant') -%}
    {{- raise_exception('expected user and assistant in turn, after an optional system message') -}}
  {%- else -%}
    {{- '<|' ~ message.role ~ '_start|>' ~ ns.head -}}
    {%- set ns.head = '' -%}
    {%- set ns.user = not ns.user -%}
    {%- for part in parts -%}
      {%- if part.type == 'text' -%}
        {{- part.text -}}
      {%- elif part.type == 'abstain' -%}
        {{- '<|abstain|>' -}}
      {%- elif part.type in wrapped -%}
        {{- wrapped[part.type][0] -}}
        {%- if part.text is defined or part.type == 'cite' -%}
          {{- part.n if part.type == 'cite' else part.text -}}
        {%- else -%}
          {%- for d in part.documents -%}
            {%- set title = '' if d is string else d.title or '' -%}
            {{- '<|doc|>' ~ ('[' ~ ns.n ~ '] ' ~ title).rstrip() ~ '\\n' -}}
            {{- (d if d is string else d.text) ~ ' [' ~ ns.n ~ ']' -}}
            {%- set ns.n = ns.n + 1 -%}
          {%- endfor -%}
        {%- endif -%}
        {{- wrapped[part.type][1] -}}
      {%- else -%}
        {{- raise_exception('unknown part type ' ~ part.type) -}}
      {%- endif -%}
    {%- endfor -%}
    {{- '<|' ~ message.role ~ '_end|>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant_start|>' -}}{%- endif -%}
""".strip().replace("WRAPPED", json.dumps({kind: marks[:2] for kind, marks in WRAPPED.items()}))


def tokenizer_files(tokenizer: Tokenizer, max_len: int) -> dict[str, Any]:
    """File name -> JSON value of what AutoTokenizer.from_pretrained reads; max_len: tokens of the model's context."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_len,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
    }
    return {"tokenizer.json": fast_tokenizer(tokenizer), "tokenizer_config.json": config}


def fast_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer.json: split by our pattern, bytes spelled as letters, BPE, special tokens after the merges."""
    letters = byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[b] for b in token)

    split = {
        "type": "Split",
        "pattern": {"Regex": oniguruma(tokenizer.pattern)},
        "behavior": "Isolated",
        "invert": False,
    }
    as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": name, **flags} for name, i in tokenizer.special_ids.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, as_bytes]},
        "post_processor": bos_first(tokenizer.bos_id),
        "decoder": as_bytes,
        "model": {
            "type": "BPE",
            "ignore_merges": True,  # a piece that is a token is that token, as in tiktoken
            "vocab": {spell(t): i for i, t in enumerate(tokenizer.tokens)},
            "merges": [[spell(a), spell(b)] for a, b in merges(tokenizer.tokens)],
        },
    }


def oniguruma(pattern: str) -> str:
    """Our pattern in the dialect of the tokenizers library, which reads X{1,3}+ as (X{1,3})+: it becomes (?>X{1,3})."""
    changed = POSSESSIVE.sub(r"(?>\1\2)", pattern)
    if re.search(r"(?<!p)\{[\d,]+\}\+", changed):
        raise UserError(
            f"split pattern {pattern!r}: transformers has no possessive {{m,n}}+: write it as (?>...{{m,n}})"
        )
    return changed


def bos_first(bos_id: int) -> dict[str, Any]:
    """The post-processor that puts <|bos|> before a text, or before the first of a pair."""
    bos, a, b = {"SpecialToken": {"id": BOS, "type_id": 0}}, *({"Sequence": {"id": x, "type_id": 0}} for x in "AB")
    special = {BOS: {"id": BOS, "ids": [bos_id], "tokens": [BOS]}}
    return {"type": "TemplateProcessing", "single": [bos, a], "pair": [bos, a, b], "special_tokens": special}


def byte_letters() -> list[str]:
    """The printable character that stands for each byte in byte-level BPE files, as GPT-2 chose them: (256,)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (chr(256 + n) for n in range(256))
    return [chr(b) if b in printable else next(others) for b in range(256)]


def merges(tokens: list[bytes]) -> list[tuple[bytes, bytes]]:
    """The pair each token of two bytes and more is merged from, in order of rank; tokens: bytes by rank.

    A token that merging its parts by rank never reaches has no pair (tiktoken gives it for whole pieces alone).
    """
    ranks = {t: i for i, t in enumerate(tokens)}
    pairs = []
    for rank, token in enumerate(tokens):
        parts = merge_below(token, ranks, rank)
        if len(parts) == 2:
            pairs.append((parts[0], parts[1]))
    return pairs


def merge_below(token: bytes, ranks: dict[bytes, int], limit: int) -> list[bytes]:
    """BPE of one token with the merges of rank < limit alone -> its parts."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 1:
        joined = [ranks.get(a + b, limit) for a, b in pairwise(parts)]
        best = min(joined)
        if best >= limit:
            break
        at = joined.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts
