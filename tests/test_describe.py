"""scripts.describe, over every config that ships."""

import re
from pathlib import Path

import pytest

from nanochat.config import UserError, load_config
from scripts.base_train import BaseTrainConfig
from scripts.describe import main, meta_model

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_builds_and_its_table_adds_up(path: Path, capsys: pytest.CaptureFixture) -> None:
    main([str(path), "--vocab_size=1000"])
    rows = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    sums = next([int(c.replace(",", "")) for c in row if re.fullmatch(r"\s*[\d,]+", c)] for row in rows[-1:])
    cfg = load_config(BaseTrainConfig, [str(path)])
    model = meta_model(cfg, 1000)
    assert sums == [model.n_params()["total"], model.state_bytes(cfg.max_seq_len)]
    assert len([row for row in rows if row[0].strip().isdigit()]) == cfg.depth


@pytest.mark.parametrize("by", ["params", "flops"])
@pytest.mark.parametrize("name", ["mamba_d20", "hybrid_alternating_d20", "hybrid_early_t_late_m_d20"])
def test_a_match_comes_near_and_its_keys_reproduce_it(by: str, name: str, capsys: pytest.CaptureFixture) -> None:
    main([f"configs/{name}.py", f"--match={by}", "--reference=configs/transformer_d20.py", "--vocab_size=1000"])
    found = re.search(r"matched: (--\S+ --\S+ --\S+) has ([\d.]+) of", capsys.readouterr().out)
    assert found is not None and abs(float(found[2]) - 1) < 0.08
    cfg = load_config(BaseTrainConfig, [f"configs/{name}.py", *found[1].split()])
    reference = meta_model(load_config(BaseTrainConfig, ["configs/transformer_d20.py"]), 1000)
    sizes = [
        m.n_params()["total"] if by == "params" else m.flops_per_token() for m in (meta_model(cfg, 1000), reference)
    ]
    assert abs(sizes[0] / sizes[1] - float(found[2])) < 0.001


def test_match_and_reference_go_together() -> None:
    with pytest.raises(UserError, match="go together"):
        main(["--match=params"])
    with pytest.raises(UserError, match="does not exist"):
        main(["--match=params", "--reference=configs/none.py"])
