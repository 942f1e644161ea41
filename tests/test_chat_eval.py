"""chat_eval: known answers give the known score, batches change nothing, pass@k by counting, the report's table."""

import dataclasses
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nanochat import report
from nanochat.chat_eval import (
    CHATCORE_TASKS,
    Score,
    chat_core,
    chat_core_name,
    choose_letters,
    evaluate,
    judge,
    letter_id,
    mean_and_stderr,
    pass_at_k,
)
from nanochat.checkpoint import checkpoint_dir, save_checkpoint
from nanochat.config import UserError, load_config
from nanochat.gpt import GPT, GPTConfig
from nanochat.report import generate, log_stage, report_dir, significance
from nanochat.tokenizer import Tokenizer
from nanochat.world import World
from scripts import chat_eval
from scripts.chat_eval import ChatEvalConfig, task_names
from tasks import data
from tasks.common import LETTERS, Task, choice_conversation, exchange
from tasks.embedded import Arithmetic
from tasks.spellingbee import SimpleSpelling, SpellingBee
from tasks.world_questions import WorldChoice

TEXTS = [f"the river number {i} flows north of the town {i * 7} and has {i % 5} bridges. " * 2 for i in range(60)]
TOKENIZER = Tokenizer.train(TEXTS, 330)


class Prefixes:
    """What each row of a Parrot has read so far."""

    def __init__(self, rows: list[list[int]]):
        self.rows = rows

    def select(self, rows: Tensor) -> "Prefixes":
        return Prefixes([list(self.rows[i]) for i in rows.tolist()])

    def repeat(self, n: int) -> "Prefixes":
        return Prefixes([list(r) for r in self.rows for _ in range(n)])

    def join(self, other: "Prefixes") -> "Prefixes":
        return Prefixes(self.rows + other.rows)


class Parrot:
    """Goes on from each prompt as its conversation does, to the bit; `says` may put another text in place of it."""

    device = torch.device("cpu")

    def __init__(self, task: Task, says: dict[int, str] | None = None, seq_len: int = 512):
        self.config = GPTConfig(vocab_size=TOKENIZER.vocab_size, seq_len=seq_len)
        self.scripts = {}
        for i in range(len(task)):
            conversation = dict(task[i])
            if says and i in says:
                *before, _ = conversation["messages"]
                conversation["messages"] = [*before, {"role": "assistant", "content": says[i]}]
            prompt = TOKENIZER.render_for_completion(conversation)
            self.scripts[tuple(prompt)] = TOKENIZER.render_conversation(conversation)[0]

    def init_state(self, B: int, max_len: int) -> Prefixes:
        return Prefixes([[] for _ in range(B)])

    def __call__(self, ids, state=None, lengths=None, last_only=False) -> Tensor:
        assert last_only
        state = state or self.init_state(len(ids), 0)
        for r, row in enumerate(ids.tolist()):
            state.rows[r] += row if lengths is None else row[: lengths[r]]
        return torch.stack([self.next_logits(tuple(row)) for row in state.rows])[:, None]

    def next_logits(self, prefix: tuple[int, ...]) -> Tensor:
        script = next(full for n in range(len(prefix), 0, -1) if (full := self.scripts.get(prefix[:n])))
        return torch.nn.functional.one_hot(torch.tensor(script[len(prefix)]), TOKENIZER.vocab_size).float()


class Choices(Task):
    """20 questions of 3 or 4 choices and of different lengths."""

    name, kind, baseline = "Choices", "categorical", 0.25

    def size(self) -> int:
        return 20

    def example(self, i: int) -> dict:
        n = 3 + i % 2
        return choice_conversation(f"number {i}{' of the town' * (i % 6)}?", ["north", "town", "1", "x"][:n], i % n)

    def evaluate(self, conversation: dict, completion: str) -> bool:
        return completion == conversation["messages"][-1]["content"]


class Words(Task):
    """20 questions whose answer is free text."""

    name, kind = "Words", "generative"

    def size(self) -> int:
        return 20

    def example(self, i: int) -> dict:
        return exchange(f"say {i}{' river' * (i % 5)}", f"town {i}")

    def evaluate(self, conversation: dict, completion: str) -> bool:
        return completion == conversation["messages"][-1]["content"]


def tiny(pattern: list[str], vocab_size: int = TOKENIZER.vocab_size) -> GPT:
    """A random model in which every layer does something."""
    model = GPT(GPTConfig(2, pattern, 32, 2, vocab_size=vocab_size, seq_len=256))
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.4 * torch.randn(p.shape, generator=generator)
        model.head.weight.normal_(0, 0.3, generator=generator)
        model.head.weight[-18:] = 0  # special tokens: rare, so that answers are long enough to differ
    model.set_compute(torch.float32)
    return model.eval()


# ---- scores ----


@pytest.mark.parametrize(("task", "wrong"), [(Choices(), "C"), (Words(), "stone")], ids=["categorical", "generative"])
def test_known_answers_give_the_known_accuracy_and_standard_error(task: Task, wrong: str) -> None:
    says = dict.fromkeys((0, 3, 7, 9, 12, 13), wrong)
    missed = sum(task[i]["messages"][-1]["content"] != wrong for i in says)
    score = evaluate(Parrot(task, says), TOKENIZER, task, batch_size=6)
    p = 1 - missed / 20
    assert (score.name, score.n, score.value) == (task.name, 20, pytest.approx(p))
    assert score.stderr == pytest.approx(math.sqrt(p * (1 - p) / 20))
    assert score.centred == pytest.approx((p - task.baseline) / (1 - task.baseline))
    assert [a.index for a in score.answers] == list(range(20))
    assert [a.completions[0] for a in score.answers if a.index in says] == [wrong] * 6


@pytest.mark.parametrize(
    "task",
    [
        Arithmetic("test", stop=12),
        SimpleSpelling("test", stop=12),
        SpellingBee("test", stop=12),
        WorldChoice("test", world=World(0, 300), stop=12),
    ],
    ids=lambda t: t.name,
)
def test_a_model_that_writes_the_reference_is_all_right_and_one_that_is_silent_all_wrong(task: Task) -> None:
    assert evaluate(Parrot(task), TOKENIZER, task).value == 1
    if task.kind == "generative":
        assert evaluate(Parrot(task, dict.fromkeys(range(12), "")), TOKENIZER, task).value == 0


@pytest.mark.parametrize("pattern", [["attn"], ["mamba"]], ids="-".join)
def test_batches_give_what_questions_one_by_one_give(pattern: list[str]) -> None:
    model = tiny(pattern)
    seen: dict[tuple, list[Tensor]] = {}  # prompt -> its logits, from every forward of the multiple choice

    def listen(module, args, kwargs, logits: Tensor) -> None:
        for row, n, own in zip(args[0].tolist(), kwargs["lengths"].tolist(), logits[:, 0], strict=True):
            seen.setdefault(tuple(row[:n]), []).append(own)

    hook = model.register_forward_hook(listen, with_kwargs=True)
    one, many = (evaluate(model, TOKENIZER, Choices(), batch_size=b) for b in (1, 7))
    hook.remove()
    assert one == many and len(seen) == 20
    for alone, together in seen.values():
        torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-4)
    assert len({float(logits[0][0]) for logits in seen.values()}) > 10, "a test that proves little"
    one, many = (evaluate(model, TOKENIZER, Words(), batch_size=b, max_new_tokens=12) for b in (1, 7))
    assert one == many
    assert len({a.completions[0] for a in one.answers}) > 2, "a test that proves little"


def test_the_limit_takes_the_first_questions() -> None:
    task = Words()
    answers = evaluate(Parrot(task, {2: "x"}), TOKENIZER, task, max_problems=7, batch_size=3).answers
    assert [(a.index, a.correct) for a in answers] == [(i, [i != 2]) for i in range(7)]
    with pytest.raises(UserError, match="Words: 0 questions"):
        evaluate(Parrot(task), TOKENIZER, Words(stop=0))


def test_what_does_not_fit_the_context_is_wrong_and_counted() -> None:
    task = Words()
    prompts = [TOKENIZER.render_for_completion(task[i]) for i in range(20)]
    longest = max(map(len, prompts))
    score = evaluate(Parrot(task, seq_len=longest), TOKENIZER, task)
    cut = {i for i in range(20) if len(prompts[i]) == longest}
    assert score.too_long == len(cut) > 0
    assert {a.index for a in score.answers if not a.completions} == cut and score.value < 1


def test_several_samples_differ_repeat_with_the_seed_and_give_pass_at_k() -> None:
    task, model = Words(stop=6), tiny(["attn"])
    model_says = lambda seed: evaluate(  # noqa: E731
        model, TOKENIZER, task, num_samples=5, temperature=1.0, max_new_tokens=6, seed=seed, batch_size=4
    )
    score = model_says(1)
    texts = [text for a in score.answers for text in a.completions]
    assert len(texts) == 30 and len(set(texts)) > 20
    assert score == model_says(1) != model_says(2)
    assert list(score.pass_at) == [2, 4, 5]


def test_only_the_questions_own_letters_can_be_chosen() -> None:
    class Fixed:
        device = torch.device("cpu")

        def __call__(self, x: Tensor, lengths=None, last_only=False) -> Tensor:
            logits = torch.zeros(len(x), 1, TOKENIZER.vocab_size)
            logits[:, :, letter_id(TOKENIZER, "D")] = 3
            logits[:, :, letter_id(TOKENIZER, "B")] = 2
            logits[:, :, TOKENIZER.bos_id] = 9
            return logits

    questions = [{"letters": ["A", "B", "C"]}, {"letters": ["A", "B", "C", "D"]}, {"letters": ["A", "C"]}]
    assert choose_letters(Fixed(), TOKENIZER, questions, [[1], [1, 2], [3]]) == ["B", "D", "A"]


def test_logits_that_are_no_numbers_are_an_error() -> None:
    model = tiny(["attn"])
    with torch.no_grad():
        model.head.weight.fill_(math.nan)
    for task in (Choices(), Words()):
        with pytest.raises(UserError, match="logits are"):
            evaluate(model, TOKENIZER, task, max_problems=2)


def test_letters_are_single_tokens_the_same_in_question_and_answer() -> None:
    for n in (2, len(LETTERS)):
        ids, mask = TOKENIZER.render_conversation(choice_conversation("town?", ["north"] * n, n - 1))
        own = [letter_id(TOKENIZER, letter) for letter in LETTERS[:n]]
        [answer] = [t for t, trained in zip(ids, mask, strict=True) if trained][:-1]  # <|assistant_end|> is trained too
        assert answer == own[-1] and ids.count(answer) == 2 and len(set(own)) == n


def test_texts_are_judged_in_their_order() -> None:
    texts = [["town 0", "no"], [], ["no", "town 2", "town 2"]]
    assert judge(Words(), [Words()[i] for i in range(3)], texts) == [[True, False], [], [False, True, True]]


def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_answer() -> None:
    for n in range(1, 7):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            draws = list(itertools.combinations([1] * c + [0] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))
    assert mean_and_stderr([1, 1, 0, 0]) == (0.5, 0.25)


def test_chatcore_is_the_mean_of_centred_scores_and_says_of_which() -> None:
    scores = [Score("a", 0.5, 0.03, 100, baseline=0.25), Score("b", 0.2, 0.04, 100)]
    value, stderr = chat_core(scores)
    assert value == pytest.approx((1 / 3 + 0.2) / 2) and stderr == pytest.approx(math.hypot(0.04, 0.04) / 2)
    assert chat_core_name(list(reversed(CHATCORE_TASKS))) == "ChatCORE"
    assert chat_core_name(["a", "b"]) == "ChatCORE (a, b)"


def test_chatcore_is_that_of_nanochat_as_soon_as_its_six_tasks_are_there() -> None:
    metrics = {name: {"value": 0.5, "stderr": 0.1, "n": 10, "baseline": 0.25} for name in task_names(["all"])}
    named = f"ChatCORE ({', '.join(task_names(None))})"
    made = chat_eval.with_chat_core({**metrics, "ChatCORE (old)": {"value": 1}, "checkpoint": "x"})
    assert list(made)[-2:] == ["ChatCORE", named] and len(made) == 14 and made["ChatCORE"]["n"] == 60
    del metrics["MMLU"], metrics["WorldQA"]
    assert [name for name in chat_eval.with_chat_core(metrics) if name.startswith("ChatCORE")] == [
        f"ChatCORE ({', '.join(metrics)})"
    ]


def test_samples_hold_no_line_or_control_character_of_the_model() -> None:
    task = Words(stop=1)
    score = evaluate(Parrot(task, {0: "a\nb\x1b[2J"}), TOKENIZER, task)
    lines = chat_eval.samples(task, score, 3).splitlines()
    assert lines[-2:] == ["      given     a", "                b\ufffd[2J"] and all(
        x.startswith("    ") for x in lines
    )


# ---- the script ----


@pytest.fixture
def home(base: Path) -> Path:
    """A base folder with an sft checkpoint."""
    TOKENIZER.save(base / "tokenizer")
    save(tag="t", step=7)
    return base


def save(tag: str, step: int) -> None:
    model = tiny(["attn", "mamba"])
    meta = {"model_config": dataclasses.asdict(model.config), "tokenizer_hash": TOKENIZER.hash}
    meta["train_config"] = {"model_tag": tag}
    save_checkpoint(checkpoint_dir("sft", tag), step, model=model.state_dict(), optim=None, state={}, meta=meta)


def run(*argv: str) -> dict:
    chat_eval.main([*argv, "-i", "sft", "-m", "6", "-b", "4", "--device=cpu", "-d", "float32"])
    return json.loads((report_dir() / "chat_evaluation_sft.json").read_text())


def test_the_script_prints_and_keeps_every_answer_and_reports(home: Path, capsys: pytest.CaptureFixture) -> None:
    section = run("-a", "Arithmetic|Spelling", "-x", "6", "--show=1")
    out = capsys.readouterr().out
    assert "Arithmetic: 0.0000 ± 0.0000 (n=6)" in out and out.count("  question  ") == 2 and "| Spelling " in out
    assert section["metrics"]["Spelling"] == {"value": 0, "stderr": 0, "n": 6, "baseline": 0}
    name = "ChatCORE (Arithmetic, Spelling)"
    assert section["metrics"][name]["n"] == 12 and section["summary"] == ["Arithmetic", "Spelling", name]
    lines = (home / "chat_eval" / "sft_t_000007" / "Spelling.jsonl").read_text().splitlines()
    first, task = json.loads(lines[0]), SimpleSpelling("test")
    assert len(lines) == 6 and first["expected"] == task[0]["messages"][-1]["content"]
    assert first["correct"] == [False] and len(first["completions"]) == 1


def test_tasks_evaluated_one_by_one_meet_in_the_report_but_not_those_of_another_checkpoint(home: Path) -> None:
    run("-a", "Arithmetic", "-x", "3")
    metrics = run("-a", "Spelling", "-x", "3", "-n", "2", "-t", "1")["metrics"]
    assert list(metrics) == [
        "checkpoint",
        "Arithmetic",
        "Spelling",
        "Spelling pass@2",
        "ChatCORE (Arithmetic, Spelling)",
    ]
    metrics = run("-a", "Arithmetic", "-x", "5")["metrics"]
    assert metrics["Arithmetic"]["n"] == 5 and metrics["Spelling"]["n"] == 3
    save(tag="t", step=8)
    assert list(run("-a", "Spelling", "-x", "2")["metrics"]) == ["checkpoint", "Spelling"]


def test_missing_data_and_wrong_names_are_all_named(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_DATA", str(tmp_path))
    monkeypatch.setattr(data, "_download", lambda source: "no network")
    with pytest.raises(UserError) as e:
        run("-a", "chatcore")
    assert all(name in str(e.value) for name in ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "words"))
    with pytest.raises(UserError, match="did you mean 'Arithmetic'"):
        run("-a", "Aritmetic")
    with pytest.raises(UserError, match="no right answers"):
        run("-a", "Identity")


def test_flags_and_names_of_tasks() -> None:
    cfg = load_config(ChatEvalConfig, ["-i", "rl", "-a", "GSM8K", "-n", "4", "-t", "0.5", "-x", "9", "-s", "3"])
    assert (cfg.source, cfg.tasks, cfg.num_samples, cfg.temperature) == ("rl", ["GSM8K"], 4, 0.5)
    assert task_names(None) == ["Arithmetic", "Spelling", "SpellingBee", "WorldChoice", "WorldQA"]
    assert task_names(["chatcore", "GSM8K", "Spelling"]) == [*CHATCORE_TASKS, "Spelling"]
    assert len(task_names(["all"])) == 11
    for wrong in (["-n", "4"], ["-x", "0"], ["-b", "0"]):
        with pytest.raises(UserError):
            load_config(ChatEvalConfig, wrong)


# ---- the report's table ----


def test_the_table_marks_what_changed_by_more_than_two_standard_errors(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    figure = lambda value, n=400: {"value": value, "stderr": math.sqrt(value * (1 - value) / n), "n": n}  # noqa: E731
    log_stage("chat_evaluation_mid", {"Arithmetic": figure(0.5), "Spelling": figure(0.5)}, summary=["Arithmetic"])
    log_stage("chat_evaluation_sft", {"Arithmetic": figure(0.6), "Spelling": figure(0.5)}, summary=["Arithmetic"])
    log_stage("chat_evaluation_rag", {"Arithmetic": figure(0.62)}, summary=["Arithmetic"])
    log_stage("chat_evaluation_rl", {"Arithmetic": figure(0.4)}, summary=["Arithmetic"])
    text = generate().read_text()
    cells = ["- ", "0.5000 ± 0.0250 (n=400)", "0.6000 ± 0.0245 (n=400) ↑", "0.6200 ± 0.0243 (n=400)"]
    assert f"| Arithmetic | {cells[0]}| {cells[1]} | {cells[2]} | {cells[3]} | 0.4000 ± 0.0245 (n=400) ↓ |" in text
    assert "more than 2 standard errors" in text and "| Spelling | -" not in text.split("## Time")[0]


def test_significance_needs_standard_errors_and_some_questions() -> None:
    assert significance(0.1, {"value": 0.2, "stderr": 0.01, "n": 9}) is None
    one = [{"value": v, "stderr": 0.0, "n": 1} for v in (0.0, 1.0)]
    assert abs(significance(*one) or 9) < 2
    a, b = ({"value": v, "stderr": 0.03, "n": 100} for v in (0.3, 0.2))
    assert significance(a, b) == pytest.approx(-0.1 / math.hypot(0.03, 0.03))


def test_cost_is_the_price_of_all_gpus_for_the_whole_time(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "_torch_info", lambda: {"torch": "2", "gpus": ["8 x H100, 80 GiB"]})
    times = iter(["2026-01-01T10:00:00+00:00", "2026-01-01T14:00:00+00:00"])
    monkeypatch.setattr(report, "_now", lambda: next(times))
    report.main(["reset"])
    log_stage("base_training", {})
    monkeypatch.setenv("GPU_PRICE_PER_HOUR", "3")
    report.main(["generate"])
    assert "Total wall clock time: 4h00m, cost: $96.00 (8 GPUs at $3.00 per GPU hour)" in Path("report.md").read_text()
    report.main(["generate", "--gpu_price=1.5"])
    assert "cost: $48.00" in Path("report.md").read_text()
    monkeypatch.delenv("GPU_PRICE_PER_HOUR")
    report.main(["generate"])
    assert "cost" not in Path("report.md").read_text().split("## Time")[1].split("##")[0]
    for wrong in ("--gpu_price=much", "--price=3"):
        with pytest.raises(UserError, match="expected --gpu_price=USD"):
            report.main(["generate", wrong])
