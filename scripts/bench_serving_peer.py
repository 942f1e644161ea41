"""Static batches without a server: `transformers`' generate() with a Llama of the same size, and our engine.

The batch is what its clients have asked by the time it begins; it ends with its longest answer. All prompts have one
length, so nothing is padded. The Llama's weights are random: speed does not depend on them.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.sampling import ENDED
from nanochat.tokenizer import Tokenizer
from scripts.bench_serving_load import RAMP, Answer, Bodies, Level


def same_size(config: GPTConfig, n_params: int) -> LlamaConfig:
    """Depth, width, heads and vocabulary of ours, with an MLP that brings the whole to our number of parameters."""
    n, d = config.n_layer, config.d_model
    layer = (n_params - 2 * config.vocab_size * d) / n
    return LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=d, num_hidden_layers=n, num_attention_heads=config.n_head,
        num_key_value_heads=config.n_head, intermediate_size=max(8, round((layer - 4 * d * d) / (3 * d * 8)) * 8),
        max_position_embeddings=config.seq_len, tie_word_embeddings=False, bos_token_id=0, eos_token_id=None,
    )  # fmt: skip


class Clock(BaseStreamer):
    """When each id of the batch came; the first call is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Peer:
    def __init__(self, config: GPTConfig, n_params: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(same_size(config, n_params))
        self.model = model.to(dtype).eval()
        self.model.generation_config.eos_token_id = None
        self.n_params = sum(p.numel() for p in self.model.parameters())

    @torch.inference_mode()
    def batch(self, bodies: list[dict[str, Any]]) -> list[Answer]:
        """Greedy answers of the lengths asked for, each ending when its own last id came."""
        clock, start = Clock(), time.perf_counter()
        ids = torch.tensor([body["prompt"] for body in bodies])  # (B, T)
        longest = max(body["max_tokens"] for body in bodies)
        self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=longest, min_new_tokens=longest, do_sample=False,
            pad_token_id=0, streamer=clock,
        )  # fmt: skip
        assert len(clock.times) == longest + 1
        return answers(start, clock.times[1:], [body["max_tokens"] for body in bodies])


class Offline:
    """Our engine in this process."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, dtype: torch.dtype) -> None:
        model.eval().set_compute(dtype)
        self.engine = Engine(model, tokenizer, tools=())

    @torch.inference_mode()
    def batch(self, bodies: list[dict[str, Any]]) -> list[Answer]:
        """As Peer.batch; an answer may end by itself."""
        start, came = time.perf_counter(), list[float]()
        lengths = [body["max_tokens"] for body in bodies]
        written = [0] * len(bodies)
        for column, _ in self.engine.generate([b["prompt"] for b in bodies], max_tokens=max(lengths), temperature=0.0):
            came.append(time.perf_counter())
            written = [n + (token != ENDED) for n, token in zip(written, column, strict=True)]
        return answers(start, came, [max(1, min(n, most)) for n, most in zip(written, lengths, strict=True)])


def answers(start: float, came: list[float], lengths: list[int]) -> list[Answer]:
    """came: when each id of the batch did; lengths: ids of each answer."""
    return [Answer(start, 200, first=came[0], last=came[n - 1], n_tokens=n, whole=True) for n in lengths]


def closed_loop(
    batch: Callable[[list[dict[str, Any]]], list[Answer]], bodies: Bodies, clients: int, seconds: float
) -> Level:
    """As bench_serving_load.closed_loop, in batches of all clients."""
    start = time.perf_counter()
    level = Level(start + RAMP * seconds, start + seconds)
    while time.perf_counter() < level.end:
        level.answers += batch([next(bodies) for _ in range(clients)])
    return level
