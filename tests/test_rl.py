"""Reinforcement learning: the gradient, what is masked, what is skipped, the guard, the script from start to end."""

import itertools
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine import ASSISTANT_END, BOS, PYTHON_END, PYTHON_START, ByteTokenizer, PrefixModel, says
from torch import Tensor, nn

from nanochat import plots
from nanochat.config import UserError
from nanochat.device import Ranks
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW
from nanochat.rl import (
    Actor,
    Batch,
    Group,
    Order,
    Sampling,
    Trajectory,
    Verdict,
    advantages,
    collect,
    evaluate,
    mix_seed,
    pass_at_k,
    policy_loss,
    rollouts,
    score,
    task_judge,
    well_formed,
)
from nanochat.rl_health import FALLS, Guard, Health, plot_health
from nanochat.run import Run
from nanochat.shards import write_shard
from nanochat.tokenizer import Tokenizer
from nanochat.train import Loop
from scripts import base_train, chat_rl, chat_sft, mid_train
from tasks import mixtures
from tasks.common import Task, exchange

PATTERNS = ["attn", "mamba", "mamba2", "gdn", "mamba+attn"]


def written(ids: list[int], n_prompt: int = 1, ended: bool = True, mask: list[int] | None = None) -> Trajectory:
    return Trajectory(0, ids, mask or [0] * n_prompt + [1] * (len(ids) - n_prompt), n_prompt, ended)


def group(*pairs: tuple[list[int], float], masked: tuple[int, ...] = ()) -> Group:
    """Trajectories with a prompt of one id and their rewards; 1 is correct."""
    verdicts = [Verdict(r, r == 1, masked=i in masked) for i, (_, r) in enumerate(pairs)]
    return Group([written(ids) for ids, _ in pairs], verdicts)


def small(pattern: str = "attn") -> GPT:
    config = GPTConfig(
        n_layer=2, d_model=32, n_head=2, vocab_size=12, seq_len=16, block_pattern=pattern,
        mamba2_head_dim=16, mamba2_d_state=16, gdn_head_dim=16,
    )  # fmt: skip
    model = GPT(config)
    model.init_weights(0)
    return model


# ---- the gradient ----


class Table(nn.Module):
    """log p(next | last) = log softmax of a row of w: a policy whose gradient one can write down."""

    def __init__(self, w: Tensor):
        super().__init__()
        self.w = nn.Parameter(w.clone())

    def forward(self, x: Tensor, y: Tensor, loss_reduction: str) -> Tensor:
        assert loss_reduction == "none"
        nll = -self.w[x].log_softmax(-1).gather(-1, y.clamp_min(0)[..., None])[..., 0]
        return nll.masked_fill(y < 0, 0)


def test_the_gradient_is_reinforce_by_hand_on_two_tokens() -> None:
    w = torch.tensor([[0.3, -0.2], [0.1, 0.5]])
    model = Table(w)
    samples = [([0, 1, 0], 1.0), ([0, 0], 0.0), ([0, 1], 0.0), ([0, 0, 1, 1], 0.0)]
    batch = Batch.of([group(*samples)])
    loss, _ = policy_loss(model, batch)  # pyrefly: ignore
    (loss / batch.tokens).backward()
    p = w.softmax(-1)
    expected, n = torch.zeros(2, 2), 0
    for ids, reward in samples:
        for a, b in itertools.pairwise(ids):  # d -log p(b | a) = p(. | a) - onehot(b)
            expected[a] += (reward - 0.25) * (p[a] - torch.eye(2)[b])
            n += 1
    assert batch.tokens == n == 7
    torch.testing.assert_close(model.w.grad, expected / n)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_gradient_in_parts_is_that_of_plain_log_softmax(pattern: str, tmp_path: Path) -> None:
    model, groups = small(pattern), [group(([1, 4, 5, 6], 1.0), ([1, 7], 0.0)), group(([2, 3, 3], 0.5), ([2, 9, 1], 0))]
    loop = make_loop(model, tmp_path)
    for part in Batch.of(groups).parts(2):
        loop.backward(policy_loss(model, part, correct_weight=0.1)[0], part.tokens)
    loop._gather()
    matrices, slices = loop.optimizer.matrices, loop.optimizer.slices
    got = {name: grad for m in matrices for name, grad in zip(m.names, m.grads.clone(), strict=True)}
    got |= {s.name.partition("[")[0]: s.grad.clone() for s in slices}
    model.zero_grad()
    total = torch.zeros(())
    for ids, weight in (([1, 4, 5, 6], 0.6), ([1, 7], -0.5), ([2, 3, 3], 0.25), ([2, 9, 1], -0.25)):
        logp = model(torch.tensor([ids[:-1]])).log_softmax(-1)[0]
        total = total - weight * logp[range(len(ids) - 1), ids[1:]].sum()
    (total / 8).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_the_divergence_is_zero_at_the_reference_and_pulls_back_to_it() -> None:
    batch = Batch.of([group(([0, 1], 1.0), ([0, 0], 1.0))])  # no advantage
    model, reference = Table(torch.zeros(2, 2)), Table(torch.zeros(2, 2))
    assert policy_loss(model, batch, 0.0, reference, 1.0)[0] == 0  # pyrefly: ignore
    model.w.data[0, 1] = 1.0
    loss, _ = policy_loss(model, batch, 0.0, reference, 1.0)  # pyrefly: ignore
    loss.backward()
    assert loss > 0 and model.w.grad[0, 1] > 0


def test_rewards_become_advantages() -> None:
    assert advantages([1, 0, 0, 0]) == [0.75, -0.25, -0.25, -0.25]
    assert advantages([1, 0, 0, 0], by_std=True) == pytest.approx([1.732, -0.577, -0.577, -0.577], rel=1e-3)
    batch = Batch.of([group(([0, 1], 1.0), ([0, 1, 1], 0.0)), group(([0, 1, 1, 1], 0.2), ([0] * 5, 0.6))])
    assert batch.advantages.tolist() == pytest.approx([0.5, -0.5, -0.2, 0.2])


# ---- masks ----


def test_prompts_padding_and_forced_ids_are_no_targets() -> None:
    forced = Trajectory(0, [1, 2, 3, 4, 5, 6], [0, 0, 1, 0, 0, 1], 2, True)
    batch = Batch.of([Group([forced, written([1, 2, 3])], [Verdict(1.0, True), Verdict(0.0, False)])])
    assert batch.ids.tolist() == [[1, 2, 3, 0, 0, 0], [1, 2, 3, 4, 5, 6]]
    assert batch.targets.tolist() == [[2, 3, -1, -1, -1], [-1, 3, -1, -1, 6]]
    assert batch.tokens == 4 and [p.ids.shape[1] for p in batch.parts(1)] == [3, 6]


def test_a_masked_trajectory_is_in_neither_loss_nor_mean() -> None:
    g = group(([0, 1], 1.0), ([0, 2], 0.0), ([0, 3], 0.0), masked=(2,))
    batch = Batch.of([g])
    assert len(batch) == 2 and batch.advantages.tolist() == [0.5, -0.5]
    assert not group(([0, 1], 1.0), ([0, 2], 0.0), masked=(1,)).teaches


class Speaker(PrefixModel):
    training = False

    def eval(self) -> None: ...

    def train(self, mode: bool) -> None: ...


def speaker(script: list[int], judge: Any, **options: Any) -> Actor:
    engine = Engine(Speaker(says(script, 1)), ByteTokenizer())
    return Actor(engine, lambda i: [BOS], judge, Sampling(2, **options))


class Answers(Task):
    """The answer is 4."""

    name, kind = "Answers", "generative"

    def size(self) -> int:
        return 3

    def example(self, i: int) -> dict[str, Any]:
        return exchange("2+2", "4")

    def evaluate(self, conversation: dict[str, Any], completion: str) -> bool:
        return completion.endswith("4")


def test_a_calculator_call_is_sampled_and_its_output_forced() -> None:
    output = [260, *b"4", 261]
    script = [PYTHON_START, *b"2+2", PYTHON_END, 0, 0, 0, *b"=4", ASSISTANT_END]
    actor = speaker(script, None)
    judge = task_judge(Answers(), ByteTokenizer(), actor.engine.tools)
    (g,) = rollouts(Actor(actor.engine, actor.prompt, judge, Sampling(2, 32)), [0], seed=1)
    t = g.trajectories[0]
    assert t.ids == [BOS, PYTHON_START, *b"2+2", PYTHON_END, *output, *b"=4", ASSISTANT_END]
    assert t.mask == [0] + [1] * 5 + [0] * 3 + [1] * 3
    assert t.ended and t.length == 11 and t.text(ByteTokenizer()).endswith("=4")
    assert g.verdicts == [Verdict(1.0, True, True)] * 2 and not g.teaches


@pytest.mark.parametrize(("truncated", "masked"), [("zero", False), ("mask", True)])
def test_a_cut_answer_is_worth_nothing_or_left_out(truncated: str, masked: bool) -> None:
    actor = speaker([*b"4444444444"], None)
    judge = task_judge(Answers(), ByteTokenizer(), actor.engine.tools, truncated)
    (g,) = rollouts(Actor(actor.engine, actor.prompt, judge, Sampling(2, 3)), [0], seed=1)
    assert g.verdicts == [Verdict(0.0, False, False, masked)] * 2 and not g.trajectories[0].ended


def test_a_tool_output_the_policy_wrote_itself_or_an_open_call_is_malformed() -> None:
    tools = Engine(Speaker(says([], 1)), ByteTokenizer()).tools
    call = [PYTHON_START, *b"1+1", PYTHON_END]
    assert well_formed(written([BOS, *call, 65, ASSISTANT_END]), tools)
    for ids in ([260, 50, 261], [PYTHON_START, 49], [PYTHON_END]):
        assert not well_formed(written([BOS, *ids, ASSISTANT_END]), tools), ids
    assert not well_formed(written([BOS, *call], ended=False), tools)


# ---- groups, order, scores ----


def test_groups_of_equal_rewards_are_skipped_counted_and_replaced_up_to_the_limit() -> None:
    seen: list[int] = []

    def judge(t: Trajectory) -> Verdict:
        seen.append(t.example)
        return Verdict(float(t.example % 2 and len(seen) % 2), False)  # examples of even number teach nothing

    actor = speaker([65, ASSISTANT_END], judge)
    kept, sampled = collect(actor, Order(100, seed=0), 8, seed=0, rounds=2)
    assert len(sampled) > 8 >= len(kept) and all(g.trajectories[0].example % 2 for g in kept)
    assert len({g.trajectories[0].example for g in sampled}) == len(sampled)
    health = Health(torch.device("cpu"))
    health.add_groups(sampled)
    assert health.figures()["zero_variance"] == pytest.approx(1 - len(kept) / len(sampled))
    kept, sampled = collect(speaker([65, ASSISTANT_END], lambda t: Verdict(1.0, True)), Order(9, 0), 4, 0, rounds=3)
    assert not kept and len(sampled) == 16
    assert Batch.of(kept).tokens == 0 and not list(Batch.of(kept).parts(4))


def test_ranks_share_an_epoch_and_a_position_continues_it() -> None:
    orders = [Order(10, 3, Ranks(r, r, 2)) for r in range(2)]
    epoch = [next(o) for _ in range(5) for o in orders]
    assert sorted(epoch) == list(range(10))
    assert [next(orders[0]) for _ in range(5)] != epoch[::2]  # the next epoch has another order
    again = Order(10, 3, Ranks(), position=4)
    assert [next(again) for _ in range(6)] == epoch[4:]


def test_pass_at_k_is_the_chance_over_all_choices() -> None:
    assert (
        pass_at_k(4, 1, 1) == 0.25 and pass_at_k(4, 1, 2) == 0.5 and pass_at_k(4, 0, 4) == 0 and pass_at_k(4, 2, 3) == 1
    )
    assert score(3.0, 3.0, 4) == {"value": 0.75, "stderr": pytest.approx(0.25), "n": 4}
    actor = speaker([65, ASSISTANT_END], lambda t: Verdict(t.example / 2, t.example == 2))
    scores = evaluate(actor, 3, seed=0)
    assert set(scores) == {"reward", "valid", "pass@1", "pass@2"}
    assert scores["reward"]["value"] == pytest.approx(0.5) and scores["pass@2"]["value"] == pytest.approx(1 / 3)
    assert scores["pass@1"]["stderr"] == pytest.approx(1 / 3)


# ---- learning ----


def make_loop(model: GPT, tmp_path: Path, lr: float = 0.02, **options: Any) -> Loop:
    lrs = {"matrix": lr, "embedding": 0.1, "unembedding": lr, "scalar": lr, "ssm": lr}
    run = Run("rl", "t", torch.device("cpu"), torch.float32, Ranks(), tmp_path / "t")
    return Loop(run, model, MuonAdamW(model, model.param_groups(), lrs), **{"num_iterations": 30, **options})


@pytest.mark.parametrize("pattern", ["attn", "mamba"])
def test_a_policy_learns_to_emit_the_rewarded_id(pattern: str, tmp_path: Path) -> None:
    model = small(pattern)

    def judge(t: Trajectory) -> Verdict:
        share = t.ids[1:].count(7) / t.length
        return Verdict(share, share == 1)

    actor = Actor(Engine(model), lambda i: [i], judge, Sampling(8, 4))
    loop, order = make_loop(model, tmp_path), Order(4, 0)
    before = evaluate(actor, 4, seed=9)["reward"]
    for step in loop:
        if step.last:
            break
        for _ in loop.forwards():
            kept, _ = collect(actor, order, 4, mix_seed(0, step.number))
            for part in Batch.of(kept).parts(16):
                loop.backward(policy_loss(model, part)[0], part.tokens)
        loop.update()
    after = evaluate(actor, 4, seed=9)["reward"]
    assert model.training and before["value"] < 0.3 and after["value"] > 0.8, (before, after)


# ---- the guard ----


def test_the_guard_tells_a_collapse_from_noise() -> None:
    rng = random.Random(0)
    steady = Guard()
    for _ in range(300):
        noisy = {"reward": 0.5 + rng.gauss(0, 0.08), "valid": 0.9 + rng.gauss(0, 0.05), "logp_correct": -1.0}
        assert steady.update(noisy) is None
    for key, fall in FALLS.items():
        guard, told = Guard(), []
        for step in range(60):
            figures = {"reward": 0.6, "valid": 0.9, "logp_correct": -0.3}
            if step >= 30:
                figures[key] -= 2.5 * fall
            told.append(guard.update(figures))
        first = next(i for i, reason in enumerate(told) if reason)
        assert 30 <= first < 40 and told[first].startswith(f"{key} fell from"), (key, first)


def test_the_guard_knows_a_policy_that_lost_its_answers_from_one_that_is_sure() -> None:
    def scores(reward: float, widest: float) -> dict[str, dict[str, float]]:
        return {k: {"value": v, "stderr": 0.05, "n": 64} for k, v in (("reward", reward), ("pass@8", widest))}

    guard = Guard()
    assert guard.held_out(scores(0.24, 0.62)) is None
    assert guard.held_out(scores(0.35, 0.30)) is None  # surer, and right more often
    assert guard.held_out(scores(0.30, 0.25)) is None  # noise
    guard.forget()
    assert "held-out reward fell from 0.350 to 0.100" in (guard.held_out(scores(0.10, 0.30)) or "")
    assert "held-out pass@8 fell from 0.300 to 0.050" in (guard.held_out(scores(0.30, 0.05)) or "")


def test_health_has_its_figures_and_a_picture(base: Path, tmp_path: Path) -> None:
    health, model = Health(torch.device("cpu")), Table(torch.zeros(2, 2))
    g = group(([0, 1, 0], 1.0), ([0, 1], 0.0))
    health.add_groups([g])
    batch = Batch.of([g])
    health.add_logp(batch, policy_loss(model, batch)[1])  # pyrefly: ignore
    figures = health.figures()
    assert figures["entropy"] == pytest.approx(0.6931, abs=1e-4) == -figures["logp_correct"]
    assert figures["reward"] == 0.5 and figures["length"] == 1.5 and figures["zero_variance"] == 0
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps({"step": i, **figures, "grad_norm": 1.0}) + "\n" for i in range(3)))
    assert plot_health(metrics, "rl_t").read_bytes()[:4] == b"\x89PNG"


# ---- the script ----

TINY = [
    "--d_model=32", "--head_dim=16", "--max_seq_len=96", "--device_batch_size=2", "--total_batch_size=0",
    "--num_iterations=3", "--eval_every=-1", "--softcap=0", "--device=cpu", "--mamba2_head_dim=16", "--gdn_head_dim=16",
]  # fmt: skip
RL = [
    "--device=cpu", "--task=Brief", "--examples_per_step=2", "--num_samples=4", "--device_batch_size=4",
    "--max_new_tokens=8", "--eval_examples=4", "--log_every=100", "--model_tag=t",
]  # fmt: skip


class Brief(Answers):
    """Any answer that ends in time is right: a policy with fresh weights earns it now and then."""

    name = "Brief"

    def __init__(self, split: str, **span: Any):
        super().__init__(**span)

    def size(self) -> int:
        return 16

    def example(self, i: int) -> dict[str, Any]:
        return exchange("a" * (i + 1), "b")

    def evaluate(self, conversation: dict[str, Any], completion: str) -> bool:
        return len(completion) < 20


@pytest.fixture
def trained(base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base folder with text, a tokenizer and the task Brief."""
    monkeypatch.setitem(mixtures.TASKS, "Brief", Brief)
    monkeypatch.setattr(plots, "png_bytes", lambda figure: b"")  # half the time of these tests would be drawing
    rng = random.Random(0)
    docs = [" ".join(rng.choices(["river", "town", "is", "a", "1987", "."], k=rng.randint(5, 60))) for _ in range(100)]
    for i in range(2):
        write_shard(base / "base_data" / f"shard_{i:05d}.parquet", docs[i * 50 : (i + 1) * 50], "test")
    Tokenizer.train(iter(docs), 290).save(base / "tokenizer")
    return base


def steps_of(folder: Path) -> dict[int, dict[str, Any]]:
    rows: dict[int, dict[str, Any]] = {}
    for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        rows[row["step"]] = {**rows.get(row["step"], {}), **row}
    return rows


@pytest.mark.parametrize("pattern", ["attn", "mamba", "mamba2", "mamba+attn"])
def test_base_then_mid_then_sft_then_rl_for_every_backbone(trained: Path, pattern: str) -> None:
    base_train.main([*TINY, f"--depth={1 + pattern.count('+')}", f"--block_pattern={pattern}", "--model_tag=t"])
    brief = ["--model_tag=t", "--num_iterations=3", "--eval_every=-1", "--tasks=Arithmetic:64"]
    mid_train.main(brief)
    chat_sft.main(brief)
    chat_rl.main([*RL, "--num_iterations=3", "--kl_coef=0.01"])
    folder = trained / "rl_checkpoints" / "t"
    meta = json.loads((folder / "step_000003" / "meta.json").read_text())
    base_meta = json.loads(next((trained / "base_checkpoints/t").glob("step_*/meta.json")).read_text())
    assert meta["model_config"] == base_meta["model_config"]
    assert meta["train_config"]["matrix_lr"] == base_meta["train_config"]["matrix_lr"]
    rows = steps_of(folder)
    assert sorted(rows) == [0, 1, 2, 3] and "held_out_pass@4" in rows[0] and "reward" in rows[2]
    section = json.loads((trained / "report" / "chat_rl.json").read_text())
    assert set(section["metrics"]["held-out reward after"]) == {"value", "stderr", "n"}
    assert "pass@4" in section["text"] and any("health" in p for p in section["plots"])


@pytest.fixture
def base_model(trained: Path) -> Path:
    base_train.main([*TINY, "--depth=1", "--model_tag=t"])
    return trained


def test_resume_continues_bit_identically(base_model: Path) -> None:
    options = [*RL, "--source=base", "--num_iterations=6", "--eval_every=2", "--save_every=2", "--init_lr_frac=0.5"]
    chat_rl.main(options)
    folder = base_model / "rl_checkpoints" / "t"
    whole, weights = steps_of(folder), (folder / "step_000006" / "model.safetensors").read_bytes()
    assert any(row.get("grad_norm", 0) > 0 for row in whole.values())
    shutil.rmtree(folder / "step_000006")
    with pytest.raises(UserError, match="holds a run at step 4: add --resume"):
        chat_rl.main(options)
    chat_rl.main([*options, "--resume"])
    again = steps_of(folder)
    assert sorted(again) == sorted(whole)
    for step, row in whole.items():
        for key in set(row) - {"dt", "seconds", "tokens_per_s", "mfu"}:
            assert again[step].get(key) == row[key], (step, key)
    assert (folder / "step_000006" / "model.safetensors").read_bytes() == weights


def scripted(values: list[float], stderr: float) -> Any:
    """Evaluations at steps 0, 2, 4, ... as they are told."""
    told = iter(values)
    return lambda *_: {"reward": {"value": next(told), "stderr": stderr, "n": 4}}


@pytest.mark.parametrize("where", ["training", "held out"])
@pytest.mark.parametrize("guard", ["rollback", "stop"])
def test_a_collapse_brings_the_best_weights_back(
    base_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, guard: str, where: str
) -> None:
    calls: list[int] = []

    def collapse_at_5(self: Guard, figures: dict[str, float]) -> str | None:
        calls.append(1)
        return "reward fell (scripted)" if len(calls) == 5 and where == "training" else None

    monkeypatch.setattr(Guard, "update", collapse_at_5)
    values, stderr = [0.1, 0.5, 0.2, *[0.5] * 9], 0.01 if where == "held out" else 0.1
    monkeypatch.setattr(chat_rl, "evaluate", scripted(values, stderr))
    options = [*RL, "--source=base", "--eval_every=2", "--save_every=2", "--num_iterations=6", f"--guard={guard}"]
    chat_rl.main([*options, "--keep_last=9"])
    out = capsys.readouterr().out
    folder = base_model / "rl_checkpoints" / "t"
    at = 5 if where == "training" else 4
    assert f"step {at}: {'reward' if at == 5 else 'held-out reward'} fell" in out
    assert "back to the weights of step 2" in out
    steps = sorted(int(p.name[5:]) for p in folder.glob("step_*"))
    if guard == "stop":
        assert "the run ends" in out and steps == sorted({2, 4, at})
        names = [folder / f"step_{s:06d}" / "model.safetensors" for s in (2, at)]
        assert names[0].read_bytes() == names[1].read_bytes()
        with pytest.raises(UserError, match="the guard ended this run"):
            chat_rl.main([*options, "--resume"])
    else:
        assert "half the rates" in out and steps == [2, 4, 6]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_samples=1"], "at least 2 samples"),
        (["--temperature=0"], "greedy samples are all alike"),
        (["--task=Identity"], "it needs a generative task"),
        (["--task=Arithmetik"], "did you mean 'Arithmetic'?"),
        (["--num_sample=4"], "did you mean 'num_samples'?"),
        (["--source=sft"], "no whole checkpoint"),
    ],
)
def test_what_cannot_work_is_one_line(base: Path, arguments: list[str], message: str) -> None:
    Tokenizer.train(iter(["some text"]), 290).save(base / "tokenizer")
    with pytest.raises(UserError) as e:
        chat_rl.main(["--device=cpu", *arguments])
    assert message in str(e.value) and "\n" not in str(e.value)
