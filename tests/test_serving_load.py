"""The server under many clients, and what scripts.bench_serving makes of it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nanochat.config import UserError
from scripts import bench_serving
from scripts.bench_serving import BenchServingConfig, Served, Server, bodies, random_model, served
from scripts.bench_serving_load import Answer, Level, figures
from scripts.bench_serving_peer import Peer, same_size
from scripts.bench_serving_report import ratios, table

TINY = {
    "random_model": True, "depth": 2, "d_model": 32, "n_head": 2, "vocab_size": 320, "prompt_tokens": 12,
    "max_tokens": 6, "threads": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Iterator[Served]:
    with served(BenchServingConfig(**TINY, block_pattern=["attn", "mamba2"])) as model:
        yield model


@pytest.fixture(scope="module")
def server(model: Served) -> Iterator[Server]:
    with Server(model, 1, "--dtype=float32", "--max_rows=16", "--max_queue=6") as server:
        yield server


def test_many_clients_at_once_all_get_their_own_offline_answer(model: Served, server: Server):
    found = bench_serving.check_clients(BenchServingConfig(**TINY, clients=48, client_seconds=4), model, server)
    assert (found["wrong"], found["lost"], found["unruly"]) == (0, 0, 0)
    assert found["answers"] >= 20 and found["refused"] > 0 and found["questions"] > 20
    assert 0 < found["memory_start_mb"] <= found["memory_max_mb"] < 4000


def test_clients_that_leave_mid_stream_leave_no_row(model: Served, server: Server):
    found = bench_serving.check_disconnects(BenchServingConfig(**TINY, disconnects=20), model, server)
    assert found["in_the_middle"] > 10 and (found["rows_left"], found["waiting_left"]) == (0, 0)


def test_a_sweep_measures_every_level_of_both_servers(base: Path, capsys: pytest.CaptureFixture):
    flags = [f"--{key}={value}" for key, value in TINY.items()]
    options = ["--clients_at_once=1,3", "--rates=8", "--lengths=spread", "--seconds=0.5", "--repeats=1"]
    bench_serving.main([*flags, *options, "--parts=sweep,peer,engine", "--dtype=float32"])
    found = json.loads((base / "bench" / "serving.json").read_text())
    assert (base / "bench" / "serving.png").stat().st_size > 5000
    levels = [(r["server"], r["clients"], r["rate"]) for r in found["rows"]]
    closed = [(name, clients, None) for name in ("ours", "transformers", "engine") for clients in (1, 3)]
    assert sorted(levels, key=str) == sorted([*closed, ("ours", None, 8.0)], key=str)
    assert all(r["lost"] == r["refused"] == 0 and r["answered"] > 0 for r in found["rows"])
    out = capsys.readouterr().out
    assert (
        "3 clients get" in out
        and "times transformers' batched generate at 3" in out
        and "times that without server" in out
        and "8 a second" in out
    )


def test_wrong_answers_are_seen(model: Served, server: Server, monkeypatch: pytest.MonkeyPatch):
    known = bench_serving.known_answers(model.model, model.tokenizer, 16, 48)
    lies = [(question, ["no", *answers[:-1]]) for question, answers in known]
    monkeypatch.setattr(bench_serving, "known_answers", lambda *_: lies)
    found = bench_serving.check_clients(BenchServingConfig(**TINY, clients=2, client_seconds=0.5), model, server)
    assert found["wrong"] > 0


def answer(first: float, last: float, n: int, start: float = 0.0) -> Answer:
    return Answer(start, 200, first=first, last=last, n_tokens=n, whole=True)


def test_throughput_counts_the_tokens_that_came_in_time():
    assert answer(1, 3, 20).within(0, 10) == pytest.approx(20) and answer(1, 3, 20).within(2, 10) == pytest.approx(10)
    assert answer(1, 3, 20).within(4, 10) == 0 and answer(5, 5, 7).within(0, 10) == pytest.approx(7)
    levels = [Level(0, 10, [answer(1, 3, 21), answer(2, 4, 11, start=1)]), Level(0, 10, [Answer(0), Answer(0, 429)])]
    found = figures(levels)
    assert (found["tok_per_s"], found["answered"], found["refused"], found["lost"]) == (pytest.approx(1.6), 2, 1, 1)
    assert found["ttft_ms"] == [1000] * 3 and found["tpot_ms"][0] == 150


def test_the_table_has_a_line_a_level_and_the_ratios_are_those_of_16_clients():
    rows = []
    for server, speeds in (("ours", {1: 10.0, 16: 50.0, 32: 70.0}), ("transformers", {1: 9.0, 16: 20.0, 32: 21.0})):
        for clients, speed in speeds.items():
            level = {"lengths": "even", "clients": clients, "rate": None, "server": server, "tok_per_s": speed}
            counts = {"answered": 5, "refused": 0, "lost": 0}
            rows.append({**level, **counts, "ttft_ms": [1.0, 2.0, 300.0], "tpot_ms": None})
    lines = table(rows).splitlines()
    assert len(lines) == 2 + 6 and "1 / 2 / 300" in lines[2] and "16 clients" in lines[3]
    assert ratios(rows) == [
        "even: 16 clients get 5.00 times the tokens/s of one",
        "even: 2.50 times transformers' batched generate at 16",
    ]


@pytest.mark.parametrize("pattern", [None, ["mamba", "mamba", "attn"]])
def test_the_peer_is_a_model_of_our_size_and_counts_only_what_was_asked_for(pattern: list[str] | None):
    model, _ = random_model(BenchServingConfig(**{**TINY, "depth": 3, "d_model": 64, "block_pattern": pattern}))
    n = model.n_params()["total"]
    peer = Peer(model.config, n, torch.float32)
    assert peer.n_params == pytest.approx(n, rel=0.1)
    shape = same_size(model.config, n)
    assert (shape.num_hidden_layers, shape.hidden_size, shape.vocab_size) == (3, 64, model.config.vocab_size)
    short, long = peer.batch([{"prompt": [1, 2, 3], "max_tokens": k} for k in (2, 9)])
    assert (short.n_tokens, long.n_tokens) == (2, 9) and short.first == long.first < short.last < long.last


def test_lengths_are_even_or_spread_about_the_same_mean():
    cfg = BenchServingConfig(**{**TINY, "max_tokens": 50})
    for lengths, low, high in (("even", 50, 50), ("spread", 45, 55)):
        asked = bodies(cfg, lengths, 300, 4096, seed=1)
        n = [next(asked)["max_tokens"] for _ in range(3000)]
        assert low <= sum(n) / len(n) <= high and (len(set(n)) > 50) == (lengths == "spread")
    one, two = (next(bodies(cfg, "even", 300, 4096, seed)) for seed in (1, 2))
    assert one["prompt"] != two["prompt"] and len(one["prompt"]) == 12


def test_what_cannot_work_is_refused_before_a_server_starts():
    for options in ({"parts": ["peer"]}, {"parts": ["speed"]}, {"lengths": ["long"]}, {"clients_at_once": [0]}):
        with pytest.raises(ValueError):
            BenchServingConfig(**options)
    with pytest.raises(UserError, match="prompt_tokens"):
        next(bodies(BenchServingConfig(**TINY), "even", 300, 12, 0))
