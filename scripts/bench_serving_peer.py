"""`transformers` serving a Llama of the same size on the same CPU: static batches through its generate().

The batch is what its clients have asked by the time it begins; it ends with its longest answer. All prompts have one
length, so nothing is padded. Random weights: speed does not depend on them.
"""

import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

from nanochat.gpt import GPTConfig
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
        came = clock.times[1:]
        assert len(came) == longest
        return [
            Answer(start, 200, first=came[0], last=came[n - 1], n_tokens=n, whole=True)
            for n in (body["max_tokens"] for body in bodies)
        ]

    def closed_loop(self, bodies: Bodies, clients: int, seconds: float) -> Level:
        """As bench_serving_load.closed_loop, in batches of all clients."""
        start = time.perf_counter()
        level = Level(start + RAMP * seconds, start + seconds)
        while time.perf_counter() < level.end:
            level.answers += self.batch([next(bodies) for _ in range(clients)])
        return level
