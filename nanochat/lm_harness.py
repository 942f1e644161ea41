"""lm-evaluation-harness over our checkpoints, any backbone (github.com/EleutherAI/lm-evaluation-harness).

    python -m nanochat.lm_harness --model nanochat --model_args source=sft,model_tag=d20 --tasks arc_easy,hellaswag

takes what `lm_eval` takes, with the model "nanochat" registered. From Python:

    from lm_eval import simple_evaluate
    from nanochat.lm_harness import NanochatLM
    results = simple_evaluate(model=NanochatLM(source="base", model_tag="d20"), tasks=["arc_easy"])

Every text starts with <|bos|>. One that is too long loses what comes after it, so that <|bos|> and the end stay; how
many did is printed. Nothing is sampled with tools: scripts.chat_eval does that. One process, one device.
"""

import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from nanochat.checkpoint import load_model
from nanochat.common import run_script
from nanochat.config import UserError
from nanochat.core_eval import GPTScorer, score_rows
from nanochat.device import pick_device
from nanochat.engine import Engine, StreamDecoder
from nanochat.sampling import ENDED
from nanochat.tokenizer import Tokenizer

try:
    from lm_eval.api.model import LM  # pyrefly: ignore
    from lm_eval.api.registry import register_model  # pyrefly: ignore
except ImportError as e:
    MISSING = f"nanochat.lm_harness needs lm-evaluation-harness ({e}): uv pip install lm-eval"
    if __name__ == "__main__":
        raise SystemExit(f"error: {MISSING}") from None
    raise UserError(MISSING) from e

GENERATION = ("until", "max_gen_toks", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p")
MAX_NEW_TOKENS = 256  # where a task does not say, as in the harness's own models


@register_model("nanochat")
class NanochatLM(LM):
    def __init__(
        self,
        source: str = "sft",
        model_tag: str | None = None,
        step: int | None = None,
        device: str | None = None,
        dtype: str = "auto",
        batch_tokens: int = 32768,
        batch_size: Any = None,
        max_batch_size: Any = None,
    ) -> None:
        """batch_tokens: tokens per forward, padding included. The harness always passes batch_size: it is not used."""
        super().__init__()
        self.model, self.tokenizer, _ = load_model(source, pick_device(device or ""), model_tag, step, dtype=dtype)
        self.scorer = GPTScorer(self.model, self.tokenizer)
        self.engine = Engine(self.model, self.tokenizer, tools=())
        self.batch_tokens = batch_tokens
        self.max_len = self.model.config.seq_len + 1  # the last id is predicted, not read

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """requests' args: (context, continuation) -> (log probability in nats, whether it is the greedy answer)."""
        rows = [split_pair(self.tokenizer, *r.args) for r in requests]
        longest = max((len(ids) - start for ids, start in rows), default=0)
        if longest >= self.max_len:
            raise UserError(f"a continuation of {longest} tokens does not fit a context of {self.max_len - 1}")
        fitting = [(fit(ids, self.max_len), start - max(0, len(ids) - self.max_len)) for ids, start in rows]
        tell_cropped(sum(len(ids) > self.max_len for ids, _ in rows), len(rows))
        return self._score(fitting)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """requests' args: (text,) -> log probability of all its tokens in nats, each with as much before it as fits."""
        texts = [encode(self.tokenizer, r.args[0]) for r in requests]
        parts = [(i, row) for i, ids in enumerate(texts) for row in windows(ids, self.max_len)]
        totals = [0.0] * len(requests)
        for (i, _), (value, _) in zip(parts, self._score([row for _, row in parts]), strict=True):
            totals[i] += value
        return totals

    @torch.inference_mode()
    def _score(self, rows: list[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        scores = [(0.0, True)] * len(rows)  # of an empty continuation
        filled = [i for i, (ids, start) in enumerate(rows) if start < len(ids)]
        for batch in batches(filled, [len(ids) for ids, _ in rows], self.batch_tokens):
            nats, greedy = score_rows(self.scorer, [rows[i] for i in batch])
            for i, mean, hit in zip(batch, nats, greedy, strict=True):
                scores[i] = (-mean * (len(rows[i][0]) - rows[i][1]), hit)
        return scores

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """requests' args: (context, options) -> the answer, up to the first of options["until"]; greedy by default."""
        answers, groups = [""] * len(requests), defaultdict(list)
        for i, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True)].append(i)
        for group in groups.values():
            until, options = generation(requests[group[0]].args[1])
            room = self.engine.max_context - options["max_tokens"]
            if room < 2:
                raise UserError(f"max_gen_toks={options['max_tokens']}: the context holds {self.engine.max_context}")
            prompts = {i: encode(self.tokenizer, requests[i].args[0]) for i in group}
            tell_cropped(sum(len(p) > room for p in prompts.values()), len(prompts))
            lengths = {i: min(len(p), room) + options["max_tokens"] for i, p in prompts.items()}
            for seed, batch in enumerate(batches(group, lengths, self.batch_tokens)):
                texts = write(self.engine, [fit(prompts[i], room) for i in batch], until, seed=seed, **options)
                for i, text in zip(batch, texts, strict=True):
                    answers[i] = text
        return answers

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages -> the prompt with its special tokens spelled, <|bos|> first; `encode` makes them ids again."""
        if add_generation_prompt:
            return self.tokenizer.decode(self.tokenizer.render_for_completion({"messages": chat_history}))
        ids, _ = self.tokenizer.render_conversation({"messages": chat_history})
        return self.tokenizer.decode(ids).removesuffix("<|assistant_end|>")  # an answer that is to be continued

    @property
    def tokenizer_name(self) -> str:
        return f"nanochat-{self.tokenizer.hash[:12]}"

    def chat_template(self, chat_template: bool | str = False) -> str:
        """A name for the harness's caches and logs; the format is nanochat/conversation.py's."""
        return "nanochat" if chat_template else ""


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids, <|bos|> first. Special tokens that a text spells count as such where apply_chat_template made it."""
    if not text.startswith("<|bos|>"):
        return tokenizer.encode(text, prepend=tokenizer.bos_id)
    parts = re.split(f"({'|'.join(map(re.escape, tokenizer.special_tokens))})", text)
    return [
        i for n, part in enumerate(parts) for i in ([tokenizer.special_ids[part]] if n % 2 else tokenizer.encode(part))
    ]


def split_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], int]:
    """-> (ids of both, where the continuation starts, >= 1); spaces that end the context belong to the continuation.

    Where the texts' border lies within a token, ids are the context's own, then what the whole has after as many: so do
    the harness' own models, and results compare.
    """
    bare = context.rstrip()
    head, whole = encode(tokenizer, bare), encode(tokenizer, context + continuation)
    tail = whole[len(head) :] or (whole[-1:] if bare != context + continuation else [])
    return [*head, *tail], len(head)


def fit(ids: list[int], max_len: int) -> list[int]:
    """<|bos|> and the last ids."""
    return ids if len(ids) <= max_len else [ids[0], *ids[len(ids) - max_len + 1 :]]


def windows(ids: list[int], max_len: int) -> Iterator[tuple[list[int], int]]:
    """Rows (ids, start) that predict every id but the first once; the last row is as long as the others."""
    done = 1
    while done < len(ids):
        end = min(max(max_len, done + max_len - 1), len(ids))
        begin = max(0, end - max_len)
        yield ids[begin:end], done - begin
        done = end


def batches(which: Sequence[int], lengths: Any, budget: int) -> Iterator[list[int]]:
    """The items of like length together, the longest first, up to `budget` tokens with padding, or one item."""
    order = sorted(which, key=lambda i: -lengths[i])
    while order:
        n = max(1, budget // lengths[order[0]])
        yield order[:n]
        order = order[n:]


def generation(options: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """The harness's generation options -> (stop texts, Engine.generate's). UserError for one we do not know."""
    if unknown := sorted(set(options) - set(GENERATION)):
        raise UserError(f"generation option {unknown[0]}={options[unknown[0]]!r}: known are {', '.join(GENERATION)}")
    until = options.get("until") or []
    temperature = options.get("temperature", 1.0 if options.get("do_sample") else 0.0)
    return [until] if isinstance(until, str) else [u for u in until if u], {
        "max_tokens": int(options.get("max_gen_toks", options.get("max_new_tokens", MAX_NEW_TOKENS))),
        "temperature": float(temperature) if options.get("do_sample", True) else 0.0,
        "top_k": options.get("top_k"),
        "top_p": options.get("top_p"),
    }


def write(engine: Engine, prompts: list[list[int]], until: list[str], **options: Any) -> list[str]:
    """The text after each prompt, before the first of the stop texts; special tokens are left out."""
    texts, live = [""] * len(prompts), set(range(len(prompts)))
    special = set(engine.tokenizer.special_ids.values())
    decoders = [StreamDecoder(engine.tokenizer) for _ in prompts]
    for column, _ in engine.generate(prompts, **options):
        for r in sorted(live):
            if column[r] == ENDED or column[r] in engine.terminators:
                live.discard(r)
            elif column[r] not in special:
                texts[r] += decoders[r].push(column[r])
                if any(u in texts[r] for u in until):
                    live.discard(r)
        if not live:
            break
    texts = [text + decoder.flush() for text, decoder in zip(texts, decoders, strict=True)]
    return [text[: min([text.index(u) for u in until if u in text], default=len(text))] for text in texts]


def tell_cropped(n: int, of: int) -> None:
    if n:
        print(f"{n} of {of} texts are longer than the context and lost what follows <|bos|>", file=sys.stderr)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate  # pyrefly: ignore

    run_script(lambda argv: cli_evaluate())
