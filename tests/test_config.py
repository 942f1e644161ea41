import importlib
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.common import REPO_DIR, run_script
from nanochat.compress.train import CompressConfig
from nanochat.config import STAGE_KEYS, UserError, load_config


@dataclass(frozen=True)
class Toy:
    """A toy run."""

    SHORT: ClassVar = {"n": "depth"}

    depth: Annotated[int, "layers of the model"] = 20
    matrix_lr: Annotated[float, "learning rate of the matrices"] = 0.02
    run: Annotated[str, "name of the run"] = "dummy"
    compile: Annotated[bool, "use torch.compile"] = False
    dtype: Annotated[Literal["auto", "bfloat16", "float32"], "of activations"] = "auto"
    model_tag: Annotated[str | None, "folder of the checkpoints"] = None
    block_pattern: Annotated[list[str] | None, "mixers, tiled to depth"] = field(default=None)

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ValueError(f"depth={self.depth}: a model has at least one layer")


def refused(argv: list[str], cls: type = Toy) -> str:
    """The message of the UserError that argv gives."""
    with pytest.raises(UserError) as e:
        load_config(cls, argv)
    message = str(e.value)
    assert "\n" not in message
    return message


def config_file(folder: Path, text: str, name: str = "toy.py") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def test_no_arguments_give_the_defaults():
    assert load_config(Toy, []) == Toy()


@pytest.mark.parametrize(
    "argv",
    [
        ["--matrix_lr=0.5", "--model_tag=x"],
        ["--matrix_lr", "0.5", "--model_tag", "x"],
        ["--matrix-lr=0.5", "--model-tag", "x"],
        ["--", "--matrix-lr", "0.5", "--model_tag=x"],
        ["--matrix_lr=0.1", "--matrix_lr=0.5", "--", "--model_tag=x"],
    ],
)
def test_every_way_of_writing_an_override_is_read(argv: list[str]):
    assert load_config(Toy, argv) == Toy(matrix_lr=0.5, model_tag="x")


def test_a_value_may_hold_an_equals_sign_or_begin_with_a_dash():
    assert load_config(Toy, ["--run=a=b"]).run == "a=b"
    assert load_config(Toy, ["--matrix_lr", "-1.5"]).matrix_lr == -1.5


def test_a_short_letter_stands_for_its_key():
    assert load_config(Toy, ["-n", "3"]).depth == 3


@pytest.mark.parametrize("text", ["true", "True", "yes", "1", "on"])
def test_booleans_are_read_in_every_usual_spelling(text: str):
    assert load_config(Toy, [f"--compile={text}"]).compile is True
    assert load_config(Toy, ["--compile", text]).compile is True


def test_a_bare_boolean_flag_is_true_and_takes_nothing_after_it(tmp_path: Path):
    file = config_file(tmp_path, "depth = 4")
    assert load_config(Toy, ["--compile", file]) == Toy(compile=True, depth=4)
    assert load_config(Toy, ["--compile", "--depth=4"]) == Toy(compile=True, depth=4)
    assert load_config(Toy, ["--compile", "false"]).compile is False


@pytest.mark.parametrize("text", ["attn,mamba", "['attn', 'mamba']", '("attn", "mamba")'])
def test_lists_are_read_with_commas_or_as_python(text: str):
    assert list(load_config(Toy, [f"--block_pattern={text}"]).block_pattern or []) == ["attn", "mamba"]


def test_a_key_that_is_a_list_or_a_string_becomes_a_list_only_in_brackets():
    @dataclass(frozen=True)
    class Pattern:
        block_pattern: Annotated[list | str | None, "mixers"] = None

    assert load_config(Pattern, ["--block_pattern=TTM"]).block_pattern == "TTM"
    assert load_config(Pattern, ["--block_pattern=T,M"]).block_pattern == "T,M"
    assert load_config(Pattern, ["--block_pattern=['T', 'M']"]).block_pattern == ["T", "M"]


def test_none_is_a_value_of_an_optional_key():
    assert load_config(Toy, ["--model_tag=none"]).model_tag is None
    assert load_config(Toy, ["--block_pattern=None"]).block_pattern is None


@pytest.mark.parametrize(("text", "value"), [("1e3", 1000), ("1_000", 1000), ("1000", 1000)])
def test_whole_numbers_may_be_written_the_way_token_counts_are(text: str, value: int):
    depth = load_config(Toy, [f"--depth={text}"]).depth
    assert depth == value and type(depth) is int


@given(
    depth=st.integers(1, 10**12),
    matrix_lr=st.floats(allow_nan=False, allow_infinity=False),
    compile=st.booleans(),
    run=st.text(st.characters(blacklist_categories=["Cs"])),
    dtype=st.sampled_from(["auto", "bfloat16", "float32"]),
)
def test_any_config_comes_back_from_its_command_line(**values):
    config = Toy(**values)
    assert load_config(Toy, [f"--{k}={v}" for k, v in values.items()]) == config


def test_files_are_read_in_order_and_the_command_line_wins(tmp_path: Path):
    first = config_file(tmp_path, "depth = 4\nrun = 'first'\nmatrix_lr = 1", "first.py")
    second = config_file(tmp_path, "depth = 6\nrun = 'second'", "second.py")
    config = load_config(Toy, [first, second, "--depth=8"])
    assert (config.depth, config.run, config.matrix_lr) == (8, "second", 1.0)
    assert type(config.matrix_lr) is float


def test_a_config_file_may_compute_its_values(tmp_path: Path):
    file = config_file(tmp_path, '"""What it is."""\nimport math\n_half = 4\ndepth = 2 * _half\n')
    assert load_config(Toy, [file]).depth == 8


def test_a_config_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        load_config(Toy).depth = 3  # pyrefly: ignore


@pytest.mark.parametrize(("given", "nearest"), [("--dept=3", "depth"), ("--matrix_rl=3", "matrix_lr")])
def test_an_unknown_flag_names_the_nearest_key(given: str, nearest: str):
    message = refused([given])
    assert given.partition("=")[0] in message and f"'{nearest}'" in message


def test_a_flag_like_no_key_points_to_help():
    assert "--help" in refused(["--zzzzzz=1"])


def test_an_unknown_key_in_a_file_names_the_file_and_the_nearest_key(tmp_path: Path):
    message = refused([config_file(tmp_path, "dpeth = 4")])
    assert "toy.py" in message and "'dpeth'" in message and "'depth'" in message


def test_a_key_of_another_stage_is_left_alone_in_a_file_and_refused_as_a_flag(tmp_path: Path):
    assert "knowledge_base" in STAGE_KEYS
    file = config_file(tmp_path, "depth = 4\nknowledge_base = 'kb'")
    assert load_config(Toy, [file]) == Toy(depth=4)
    assert "--knowledge_base" in refused(["--knowledge_base=kb"])


@pytest.mark.parametrize(
    "line", ["depth = 'four'", "depth = 4.5", "depth = True", "compile = 1", "run = 3", "dtype = 'int8'"]
)
def test_a_wrong_type_in_a_file_names_file_key_value_and_the_type_expected(tmp_path: Path, line: str):
    key, _, value = line.partition(" = ")
    message = refused([config_file(tmp_path, line)])
    expected = {"depth": "int", "compile": "bool", "run": "str", "dtype": "auto|bfloat16|float32"}[key]
    assert all(word in message for word in ("toy.py", key, value, f"expected {expected}"))


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--depth=four", "int"),
        ("--depth=4.5", "int"),
        ("--depth=nan", "int"),
        ("--matrix_lr=fast", "float"),
        ("--compile=maybe", "bool"),
        ("--dtype=int8", "auto|bfloat16|float32"),
        ("--depth=", "int"),
        ("--block_pattern=[attn", "list"),
        ("--block_pattern={'a': 1}", "list"),
        ("--matrix_lr=nan", "a finite number"),
        ("--matrix_lr=-inf", "a finite number"),
    ],
)
def test_a_wrong_type_on_the_command_line_names_flag_and_type(flag: str, expected: str):
    message = refused([flag])
    assert flag in message and expected in message


def test_a_rate_in_a_file_is_finite_too(tmp_path: Path):
    assert "toy.py: matrix_lr=inf: expected a finite number" in refused([config_file(tmp_path, "matrix_lr = 1e999")])


def test_a_flag_without_its_value_is_refused():
    assert "--depth=VALUE" in refused(["--depth"])


def test_a_word_that_is_neither_file_nor_flag_is_refused():
    assert "'transformer_d20'" in refused(["transformer_d20"])


def test_an_absent_file_is_named_with_its_nearest_neighbour(tmp_path: Path):
    config_file(tmp_path, "depth = 4", "hybrid_d20.py")
    message = refused([str(tmp_path / "hybird_d20.py")])
    assert "hybird_d20.py does not exist" in message and "hybrid_d20.py?" in message


def test_bad_syntax_is_reported_with_file_and_line(tmp_path: Path):
    message = refused([config_file(tmp_path, "depth = 4\nrun = = 3\n")])
    assert "toy.py:2" in message and "SyntaxError" in message


def test_an_error_raised_by_a_file_is_reported_with_the_file(tmp_path: Path):
    message = refused([config_file(tmp_path, "depth = 1 // 0\n")])
    assert "toy.py" in message and "ZeroDivisionError" in message


def test_a_combination_the_dataclass_refuses_is_a_user_error():
    assert refused(["--depth=0"]) == "depth=0: a model has at least one layer"


def test_a_required_key_is_asked_for():
    @dataclass(frozen=True)
    class Rag:
        knowledge_base: Annotated[str, "folder"]

    assert "--knowledge_base=VALUE" in refused([], Rag)
    assert load_config(Rag, ["--knowledge_base=kb"]).knowledge_base == "kb"


def test_help_lists_every_key_with_type_default_and_meaning(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as e:
        load_config(Toy, ["--help"])
    assert e.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "A toy run."
    rows = {line.split()[0]: line for line in lines if line.startswith("--")}
    assert list(rows) == [f"--{f.name}" for f in fields(Toy)]
    assert rows["--depth"].split(maxsplit=3) == ["--depth", "int", "20", "layers of the model"]
    assert "auto|bfloat16|float32" in rows["--dtype"]


# The keys an old nanochat-turbo file for REFRAG sets: architecture, training and retrieval in one file.
OLD_FILE = """
depth = 20
block_pattern = ["T"] * 8 + ["M"] * 12
mamba_d_state = 16
mamba_d_conv = 4
mamba_expand = 2
mamba_use_mlp = False
max_seq_len = 6144
device_batch_size = 2
total_batch_size = 262144
target_param_data_ratio = 20
embedding_lr = 0.2
unembedding_lr = 0.004
matrix_lr = 0.02
weight_decay = 0.0
grad_clip = 1.0
init_lr_frac = 0.01
knowledge_base = "data/kb"
retriever_type = "dense"
top_k = 5
max_doc_length = 500
max_hops = 3
top_k_per_hop = 3
use_rewards = True
max_iterations = 500
"""


def test_an_old_file_of_all_stages_loads_unchanged(tmp_path: Path):
    config = load_config(Toy, [config_file(tmp_path, OLD_FILE)])
    assert config == Toy(block_pattern=["T"] * 8 + ["M"] * 12)


def test_the_base_training_script_takes_an_old_file(tmp_path: Path):
    script = pytest.importorskip("scripts.base_train", exc_type=ModuleNotFoundError)
    config = load_config(only_config(script), [config_file(tmp_path, OLD_FILE)])
    assert (config.depth, config.max_seq_len, config.total_batch_size) == (20, 6144, 262144)


def only_config(module) -> type:
    configs = [c for c in vars(module).values() if is_dataclass(c) and c.__module__ == module.__name__]
    return next(c for c in configs if isinstance(c, type) and c.__name__.endswith("Config"))


STAGES = sorted(
    p.stem
    for p in (REPO_DIR / "scripts").glob("*.py")
    if re.fullmatch(r"(base|mid)_train|chat_(sft|rl)|.*_finetune", p.stem)
)


@pytest.mark.parametrize("name", STAGES)
def test_every_key_of_a_stage_may_stand_in_a_file_meant_for_another_stage(name: str):
    config = only_config(importlib.import_module(f"scripts.{name}"))
    assert {f.name for f in fields(config)} - STAGE_KEYS == set()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (NotADirectoryError(20, "Not a directory"), "Not a directory: mend that, or name another path"),
        (OSError(28, "No space left on device"), "free space, or write elsewhere"),
        (PermissionError(13, "Permission denied"), "make it writable, or write elsewhere"),
    ],
)
def test_what_the_system_refuses_is_one_line_that_names_the_path(
    capsys: pytest.CaptureFixture[str], error: OSError, said: str
):
    def refused(_: list[str]) -> None:
        error.filename = "some/where"
        raise error

    with pytest.raises(SystemExit) as e:
        run_script(refused)
    [line] = capsys.readouterr().err.splitlines()
    assert e.value.code == 2 and line.startswith("error: ") and "some/where" in line and said in line


def test_a_reader_that_has_gone_is_no_traceback():
    code = "from nanochat.common import run_script; run_script(lambda _: [print('x' * 99) for _ in range(10**5)])"
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPO_DIR, stdout=pipe, stderr=pipe)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    said = process.stderr.read()
    assert (process.wait(60), said) == (1, b"error: nobody reads the output any more\n")


@pytest.mark.parametrize("name", STAGES)
def test_a_number_that_cannot_train_is_refused_by_every_stage_before_any_work(name: str):
    config = only_config(importlib.import_module(f"scripts.{name}"))
    known = {f.name for f in fields(config)}
    wrong = {"keep_last": 0, "log_every": 0, "seed": -1, "matrix_lr": -1, "grad_clip": -1, "weight_decay": -1}
    wrong |= {"rl_lr_frac": -1, "rl_grad_clip": -1, "num_epochs": "nan", "target_examples_per_step": 0}
    wrong |= {"max_iterations": 0, "chat_share": 1.5}
    for key in wrong.keys() & known:
        assert key in refused([f"--{key}={wrong[key]}"], config)
    off = [f"--{key}=0" for key in ("grad_clip", "weight_decay", "matrix_lr") if key in known]
    assert load_config(config, off)


def test_compression_refuses_numbers_that_cannot_train():
    for flag in ("--reconstruction_chunks=0", "--largest_chunks=0", "--gold_share=2", "--policy_lr=-1"):
        assert flag[2:] in refused([flag], CompressConfig)
