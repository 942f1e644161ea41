"""Muon and AdamW: one process, and sharded over gloo ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW, lr_schedule, muon_momentum, orthogonalize

CONFIG = GPTConfig(n_layer=2, d_model=32, n_head=2, vocab_size=50, seq_len=16, residual_scalars=True)
LRS = {"matrix": 0.02, "embedding": 0.3, "unembedding": 0.01, "scalar": 0.05}


def test_orthogonalize_brings_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((3, 16, 16), (2, 16, 64), (2, 64, 16)):
        s = torch.linalg.svdvals(orthogonalize(torch.randn(shape), torch.float32))
        assert s.min() > 0.3 and s.max() < 1.3


def test_orthogonalize_keeps_the_singular_vectors() -> None:
    torch.manual_seed(0)
    g = torch.randn(1, 12, 20)
    u, _, vh = torch.linalg.svd(g[0], full_matrices=False)
    diagonal = (u.T @ orthogonalize(g, torch.float32)[0] @ vh.T).abs()
    assert (diagonal - diagonal.diag().diag()).max() < 0.05


def test_adamw_part_equals_torch_and_muon_part_equals_its_definition() -> None:
    torch.manual_seed(0)
    model = GPT(CONFIG)
    model.init_weights(0)
    reference = {n: p.detach().clone() for n, p in model.named_parameters()}
    embed = torch.nn.Parameter(reference["embed.weight"].clone())
    adamw = torch.optim.AdamW([embed], lr=0.3, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0)
    name = "blocks.0.mlp.c_fc.weight"
    weight, momentum = reference[name].clone(), torch.zeros_like(reference[name])
    optimizer = MuonAdamW(model, model.param_groups(), LRS)
    for step in range(3):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        embed.grad = model.embed.weight.grad.clone()  # pyrefly: ignore
        grad = model.blocks[0].mlp.c_fc.weight.grad.clone()  # pyrefly: ignore
        optimizer.gather()
        optimizer.step(0.5, muon_momentum(step))
        adamw.param_groups[0]["lr"] = 0.15
        adamw.step()
        momentum = muon_momentum(step) * momentum + (1 - muon_momentum(step)) * grad
        nesterov = muon_momentum(step) * momentum + (1 - muon_momentum(step)) * grad
        weight -= 0.5 * 0.02 * 2.0 * orthogonalize(nesterov[None], torch.float32)[0]  # 128 x 32: sqrt(4) = 2
    torch.testing.assert_close(model.embed.weight.data, embed.data)
    torch.testing.assert_close(model.blocks[0].mlp.c_fc.weight.data, weight, rtol=1e-4, atol=1e-6)  # pyrefly: ignore


def test_state_tensors_resume_exactly() -> None:
    def run(steps: range, model: GPT, optimizer: MuonAdamW) -> None:
        for step in steps:
            torch.manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.gather()
            optimizer.step()

    one = GPT(CONFIG)
    one.init_weights(0)
    a = MuonAdamW(one, one.param_groups(), LRS)
    run(range(3), one, a)
    two = GPT(CONFIG)
    two.load_state_dict(one.state_dict())
    b = MuonAdamW(two, two.param_groups(), LRS)
    b.load_state_tensors({k: v.clone() for k, v in a.state_tensors().items()})
    run(range(3, 6), one, a)
    run(range(3, 6), two, b)
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_step_without_gradients_is_refused() -> None:
    model = GPT(CONFIG)
    model.init_weights(0)
    optimizer = MuonAdamW(model, model.param_groups(), LRS)
    ids = torch.randint(0, 50, (2, 8))
    for _ in range(2):
        model(ids, ids).backward()
        with pytest.raises(AssertionError, match="without gather"):
            optimizer.step()
        optimizer.gather()
        optimizer.step()
        optimizer.zero_grad()


def test_a_foreign_state_is_refused() -> None:
    model = GPT(CONFIG)
    model.init_weights(0)
    optimizer = MuonAdamW(model, model.param_groups(), LRS)
    with pytest.raises(ValueError, match="does not fit this model or number of ranks"):
        optimizer.load_state_tensors({"nothing": torch.zeros(1)})


WORKER = """
import sys, torch
from nanochat.device import init_ranks, leave_ranks
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW
from tests.test_optim import CONFIG, LRS
ranks, _ = init_ranks(torch.device("cpu"))
model = GPT(CONFIG); model.init_weights(0)
generator = torch.Generator().manual_seed(0)
for p in model.parameters():  # at zero some gradients are pure rounding, which AdamW would magnify
    p.data.add_(0.1 * torch.randn(p.shape, generator=generator))
optimizer = MuonAdamW(model, model.param_groups(), LRS, ranks=ranks)
ids = torch.randint(0, 50, (4, 16), generator=torch.Generator().manual_seed(1))
own, norms = ids[ranks.rank :: ranks.world_size], []
for _ in range(4):
    model(own, own.roll(-1, 1), loss_reduction="sum").backward()
    norms.append(optimizer.gather(64, clip=0.05))
    optimizer.step(); optimizer.zero_grad()
for slow in ("torch._dynamo", "triton"):  # they make every start slower, by 1.5 and 0.3 seconds
    assert slow not in sys.modules, slow
if ranks.main:
    torch.save({"norms": torch.tensor(norms), **model.state_dict()}, sys.argv[1])
moments = sum(t.numel() for t in optimizer.state_tensors().values())
print("moments", moments)
leave_ranks()
"""


@pytest.mark.parametrize("world", [2, 3])
def test_sharded_over_ranks_equals_one_process(tmp_path: Path, world: int) -> None:
    states, moments = [], []
    for n in (1, world):
        out = tmp_path / f"{n}.pt"
        script = tmp_path / "worker.py"
        script.write_text(WORKER)
        launch = [sys.executable, str(script)]
        if n > 1:
            launch = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc_per_node={n}",
                str(script),
            ]
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
        done = subprocess.run([*launch, str(out)], capture_output=True, text=True, env=env, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        states.append(torch.load(out, weights_only=True))
        moments.append(max(int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("moments")))
    assert states[0]["norms"].min() > 0.05  # clipped, by the norm of all ranks' gradients
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert moments[1] < 0.75 * moments[0]  # each rank keeps a share of the moments


def test_schedule_is_a_trapezoid() -> None:
    scales = [lr_schedule(p, 0.1, 0.2, 0.1) for p in (0.0, 0.05, 0.1, 0.5, 0.8, 0.9, 1.0)]
    assert scales == pytest.approx([1e-3, 0.5, 1.0, 1.0, 1.0, 0.55, 0.1])
    assert lr_schedule(0.3, 0.0, 0.0, 0.0) == 1.0
