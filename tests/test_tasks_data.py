"""Tasks over files: real sets where the data folder is, sets that are missing, and files of one's own."""

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import execution
from nanochat.config import UserError
from tasks.common import plain
from tasks.conversations import SETS
from tasks.customjson import CustomJSON
from tasks.data import read_jsonl
from tasks.gsm8k import GSM8K, extract_answer, solution_parts
from tasks.humaneval import HumanEval, program
from tasks.mixtures import TASKS, eval_task, make_task

LOCAL_TRAIN = ["ARC-Easy", "ARC-Challenge", "GSM8K", "MC-Train", *SETS]
LOCAL_TEST = {"ARC-Easy": 2376, "ARC-Challenge": 1172, "MMLU": 6987, "GSM8K": 646, "HumanEval": 164}
CHAT = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "Me."}]


@pytest.fixture
def nothing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data folder, and no download."""
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setenv("NANOCHAT_DATA", str(folder))
    monkeypatch.setattr("tasks.data._download", lambda source: "no network")
    return folder


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def first_question(conversation: dict[str, Any]) -> str:
    return plain(conversation["messages"][0]["content"])


@pytest.mark.data
@pytest.mark.parametrize(("name", "rows"), LOCAL_TEST.items())
def test_every_row_of_a_real_test_set_is_a_question_with_an_answer(data: Path, name: str, rows: int) -> None:
    task = eval_task(name)
    assert len(task) == rows
    assert task.name == name
    for conversation in task:
        if task.kind == "categorical":
            assert conversation["messages"][-1]["content"] in conversation["letters"]


@pytest.mark.data
@pytest.mark.parametrize("name", ["ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K"])
def test_reference_solutions_are_right_and_empty_ones_wrong(data: Path, name: str) -> None:
    task = eval_task(name)
    right = [task.evaluate(c, plain(c["messages"][-1]["content"])) for c in task]
    empty = [task.evaluate(c, "") for c in task]
    assert (sum(right), sum(empty)) == (len(task), 0)


@pytest.mark.data
@pytest.mark.parametrize("name", LOCAL_TRAIN)
def test_real_training_rows_are_conversations_and_held_out_ones_are_others(data: Path, name: str) -> None:
    train, val = make_task(name, "train"), make_task(name, "val")
    assert len(train) > len(val) > 0
    assert all(c["messages"][-1]["role"] == "assistant" for c in train)
    if name in ("GSM8K", "MC-Train"):
        assert not {first_question(c) for c in train} & {first_question(c) for c in val}


@pytest.mark.data
@pytest.mark.parametrize(("name", "both"), [("ARC-Easy", 2), ("ARC-Challenge", 0), ("GSM8K", 0)])
def test_no_test_question_is_trained_on_but_two_of_arc(data: Path, name: str, both: int) -> None:
    """ARC-Easy itself, as published, has two questions in train and test."""
    train, test = ({first_question(c) for c in task} for task in (make_task(name, "train"), eval_task(name)))
    assert len(train & test) <= both


@pytest.mark.data
def test_gsm8k_calls_give_the_results_the_solutions_state(data: Path) -> None:
    """The calculator agrees with the set's own results (rounding and slips of the set aside)."""
    agree, calls = 0, 0
    for conversation in GSM8K("train", stop=1000):
        parts = conversation["messages"][-1]["content"]
        for call, output in itertools.pairwise(parts):
            if call["type"] == "python":
                assert output["type"] == "python_output"
                value = execution.calculate(call["text"])
                agree += value is not None and abs(float(value) - float(output["text"].replace(",", ""))) < 0.01
                calls += 1
    assert calls > 2500
    assert agree / calls > 0.98


@pytest.mark.data
def test_identity_rows_name_this_model(data: Path) -> None:
    spoken = " ".join(plain(m["content"]) for c in make_task("FastChatIdentity", "train") for m in c["messages"])
    assert "nanochat" in spoken
    assert "Vicuna" not in spoken
    assert "LMSYS" not in spoken


@pytest.mark.data
@pytest.mark.skipif(not hasattr(execution, "run_python"), reason="needs the sandbox")
def test_humaneval_runs_reference_solutions_right_and_empty_ones_wrong(data: Path) -> None:
    task = HumanEval(stop=12)
    for conversation in task:
        assert task.evaluate(conversation, conversation["messages"][-1]["content"]), conversation["task_id"]
        assert not task.evaluate(conversation, "")


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.skipif(not hasattr(execution, "run_python"), reason="needs the sandbox")
def test_humaneval_agrees_with_all_164_reference_solutions(data: Path) -> None:
    task = HumanEval()
    assert all(task.evaluate(c, c["messages"][-1]["content"]) for c in task)


@pytest.mark.data
@pytest.mark.slow
def test_english_words_keep_to_their_split(data: Path) -> None:
    train, test = make_task("SpellingBeeEnglish:50", "train"), eval_task("SpellingBeeEnglish:50")
    assert len(train) == len(test) == 50


def test_humaneval_takes_a_body_a_definition_or_a_fenced_block(tmp_path: Path) -> None:
    conversation = {
        "prompt": 'def one():\n    """Return one."""\n',
        "entry_point": "one",
        "test": "def check(f):\n    assert f() == 1\n",
    }
    bodies = (
        "    return 1\n",
        "def one():\n    return 1\n",
        "Here it is:\n```python\ndef one():\n    return 1\n```\n?",
    )
    for completion in bodies:
        exec(program(conversation, completion), {})
    with pytest.raises(AssertionError):
        exec(program(conversation, "    return 2\n"), {})


def test_gsm8k_calls_become_parts() -> None:
    assert solution_parts("4/2=<<4/2=2>>2 left\n#### 2") == [
        {"type": "text", "text": "4/2="},
        {"type": "python", "text": "4/2"},
        {"type": "python_output", "text": "2"},
        {"type": "text", "text": "2 left\n#### 2"},
    ]


@pytest.mark.parametrize(
    ("text", "number"),
    [("#### 72", "72"), ("so\n#### -1,234.5 of them", "-1234.5"), ("#### 1\n#### 2", "1"), ("72", None), ("", None)],
)
def test_gsm8k_answers_are_extracted_as_nanochat_does(text: str, number: str | None) -> None:
    assert extract_answer(text) == number


@pytest.mark.parametrize("name", [*LOCAL_TRAIN, "SmolTalk", "MMLU"])
def test_a_missing_set_says_where_to_put_it(nothing: Path, base: Path, name: str) -> None:
    with pytest.raises(UserError) as e:
        make_task(name, "train")
    message = str(e.value)
    assert "\n" not in message
    assert str(nothing) in message or str(base / "task_data") in message
    if name in ("SmolTalk", "MMLU", "GSM8K"):
        assert ".parquet of the hub dataset" in message


def test_the_download_is_not_tried_where_the_hub_is_switched_off(
    nothing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.undo()
    monkeypatch.setenv("NANOCHAT_DATA", str(nothing))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(nothing))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        make_task("SmolTalk", "val")


def test_files_put_where_the_error_says_are_read(nothing: Path, base: Path) -> None:
    arc = base / "task_data" / "allenai--ai2_arc" / "ARC-Easy" / "test-00000-of-00001.parquet"
    smol = base / "task_data" / "HuggingFaceTB--smol-smoltalk" / "data"
    for path in (arc, smol / "x"):
        path.parent.mkdir(parents=True, exist_ok=True)
    choices = {"text": ["no", "yes"], "label": ["1", "2"]}
    pq.write_table(pa.Table.from_pylist([{"question": "Is it?", "choices": choices, "answerKey": "2"}]), arc)
    for i in range(4):
        rows = pa.Table.from_pylist([{"messages": CHAT, "source": str(i)}])
        pq.write_table(rows, smol / f"train-{i:05d}-of-00004.parquet")
    assert make_task("ARC-Easy", "test")[0]["messages"][1]["content"] == "B"
    train = make_task("SmolTalk", "train")
    assert len(train) == 4
    assert train[3]["messages"] == CHAT


def test_own_conversations_are_read_in_both_forms(tmp_path: Path) -> None:
    odd = [{"role": "user", "content": "line\u2028break\u0085"}, CHAT[1]]
    path = write_jsonl(tmp_path / "mine.jsonl", [{"messages": CHAT}, CHAT, {"messages": odd}])
    packed = tmp_path / "mine.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    for file in (path, packed):
        task = CustomJSON(file)
        assert len(task) == 3
        assert odd in [c["messages"] for c in task]


def test_own_conversations_have_held_out_ones(tmp_path: Path) -> None:
    rows = [[{"role": "user", "content": f"question {i}"}, CHAT[1]] for i in range(300)]
    path = write_jsonl(tmp_path / "mine.jsonl", rows)
    train, val = make_task(str(path), "train"), make_task(str(path), "val")
    assert len(train) + len(val) == 300
    assert 5 < len(val) < 30
    assert not {first_question(c) for c in train} & {first_question(c) for c in val}


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ('{"messages": [', "not a line of JSON"),
        ('{"text": "hello"}', 'expected {"messages": [...]} or a list of messages'),
        ('[{"role": "assistant", "content": "Hi"}]', "expected 'user' first"),
        ('[{"role": "user", "content": "Hi"}]', "must end in one"),
        ('[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}]', "must end in one"),
        ('[{"role": "user", "content": "Hi"}, {"role": "bot", "content": "Ho"}]', "role 'bot'"),
    ],
)
def test_a_bad_conversation_is_named_by_file_and_line(tmp_path: Path, line: str, cause: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(f"{json.dumps(CHAT)}\n\n{line}\n")
    with pytest.raises(UserError) as e:
        CustomJSON(path)
    assert f"{path}:3" in str(e.value)
    assert cause in str(e.value)


def test_a_broken_archive_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n' * 1000)[:-9])
    with pytest.raises(UserError, match="cannot be read"):
        read_jsonl(path)
    with pytest.raises(UserError, match="does not exist"):
        CustomJSON(tmp_path / "none.jsonl")


def test_every_name_of_the_table_can_be_asked_for(nothing: Path) -> None:
    """A constructor that takes (split, start, stop, step) or a UserError: nothing else."""
    for name, make in TASKS.items():
        try:
            assert len(make("test", stop=1)) <= 1
        except UserError as e:
            assert name in str(e) or "English words" in str(e)
