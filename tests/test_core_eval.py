"""CORE against an independent reading of the bundle, one question at a time; published scores; crops; the script."""

import csv
import functools
import gzip
import http.server
import json
import random
import re
import threading
import zipfile
from pathlib import Path

import pytest
import torch

from nanochat import core_bundle, core_eval
from nanochat.checkpoint import checkpoint_dir, save_checkpoint
from nanochat.config import UserError
from nanochat.core_bundle import CORE_TASKS, core_folder, read_items, task_file
from nanochat.core_eval import GPTScorer, TaskScore, batches, core, evaluate_task, make_question, prompts
from nanochat.device import Ranks
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import Tokenizer
from scripts import base_eval

TASKS = {t.label: t for t in CORE_TASKS}
THREE = ("arc_easy", "winograd", "bigbench_cs_algorithms")  # one of each kind
WORDS = "river town stone bridge north water harbour king salt grain tower field".split()  # noqa: SIM905


def write_lines(path: Path, items: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as f:
        f.writelines(json.dumps(x) + "\n" for x in items)


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder whose bundle has three tasks, 40 questions each."""
    rng, root = random.Random(0), tmp_path_factory.mktemp("data")
    pick = lambda n: " ".join(rng.choices(WORDS, k=n))  # noqa: E731
    mc = [
        {"query": f"Question: {pick(4)}?", "choices": [pick(rng.randint(1, 4)) for _ in range(4)], "gold": i % 4}
        for i in range(40)
    ]
    schema = [
        {"context_options": [pick(5), pick(3)], "continuation": f"was {pick(3)}.", "gold": i % 2} for i in range(40)
    ]
    lm = [{"context": f"{pick(5)}:  ", "continuation": rng.choice(["Valid", "12"])} for _ in range(40)]
    for label, items in zip(THREE, (mc, schema, lm), strict=True):
        write_lines(root / "eval_core" / f"{TASKS[label].file}.gz", items)
    return root


def whole_texts(folder: Path) -> list[str]:
    """Every tenth question of the three tasks with its examples, as a model would be trained on it."""
    texts = []
    for label in THREE:
        items = read_items(task_file(folder, TASKS[label]), TASKS[label])
        texts += [prompts(TASKS[label], items, i)[-1] for i in range(0, min(len(items), 200), 10)]
    return texts


def tiny(vocab_size: int, pattern: list[str], seq_len: int = 2048) -> GPT:
    """A random model in which every layer does something."""
    model = GPT(GPTConfig(2, pattern, 64, 2, vocab_size=vocab_size, seq_len=seq_len, gdn_head_dim=16))
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2 and not p.any():
                p.normal_(0, 0.1, generator=generator)
        model.head.weight.normal_(0, 0.3, generator=generator)
    model.set_compute(torch.float32)
    return model.eval()


def trained(folder: Path) -> GPTScorer:
    """A model that has seen some questions for a few steps, so that it is neither always right nor always wrong."""
    texts = whole_texts(folder)
    tokenizer = Tokenizer.train(iter(texts), 1200)
    model = tiny(tokenizer.vocab_size, ["attn"])
    rng, ids = random.Random(0), tokenizer.encode(texts, prepend="<|bos|>")
    for _ in range(30):
        rows = [r[s : s + 65] for r in rng.choices(ids, k=16) if (s := rng.randrange(max(1, len(r) - 64))) >= 0]
        x = torch.tensor([r + [0] * (65 - len(r)) for r in rows])
        model(x[:, :-1], x[:, 1:]).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 3e-3 * p.grad.sign()
                p.grad = None
    return GPTScorer(model, tokenizer)


@pytest.fixture(scope="module")
def made_up_scorer(made_up: Path) -> GPTScorer:
    return trained(made_up / "eval_core")


# ---- an independent reading of the bundle: no code of ours but the model and the tokenizer ----


@torch.no_grad()
def plain_accuracy(model: GPT, tok: Tokenizer, path: Path, kind: str, shots: int, delimiter: str, n: int) -> float:
    items = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().split("\n") if line]
    random.Random(1337).shuffle(items)
    correct = 0
    for i in range(n):
        item = items[i]
        others = items[:i] + items[i + 1 :]
        text = ""
        for e in random.Random(1234 + i).sample(others, shots):
            if kind == "mc":
                text += f"{e['query']}{delimiter}{e['choices'][e['gold']]}\n\n"
            else:
                text += f"{e['context'].strip()}{delimiter}{e['continuation']}\n\n"
        if kind == "mc":
            options = [text + item["query"] + delimiter + c for c in item["choices"]]
        elif kind == "schema":
            options = [text + c + delimiter + item["continuation"] for c in item["context_options"]]
        else:
            context = (text + item["context"].strip() + delimiter).rstrip()
            options = [text + item["context"].strip() + delimiter + item["continuation"]]
        ids = [[tok.bos_id, *tok.encode(o)] for o in options]
        first = 0  # of the continuation, counted from the left (mc) or from the right (schema)
        if kind == "lm":
            first = 1 + len(tok.encode(context))
            logits = model(torch.tensor(ids))[0]
            correct += all(int(logits[t - 1].argmax()) == ids[0][t] for t in range(first, len(ids[0])))
            continue
        step = -1 if kind == "schema" else 1
        while len({row[::step][first] for row in ids}) == 1:
            first += 1
        losses = []
        for row in ids:
            logp = torch.log_softmax(model(torch.tensor([row]))[0], -1)
            start = first if kind == "mc" else len(row) - first
            losses.append(-sum(float(logp[t - 1, row[t]]) for t in range(start, len(row))) / (len(row) - start))
        correct += losses[item["gold"]] == min(losses)
    return correct / n


def check_against_plain(folder: Path, scorer: GPTScorer, n: int) -> None:
    found = {}
    for label, kind in zip(THREE, ("mc", "schema", "lm"), strict=True):
        task = TASKS[label]
        path = folder / f"{task.file}.gz"
        score = evaluate_task(scorer, task, read_items(path, task), n, batch_tokens=4096)
        plain = plain_accuracy(scorer.model, scorer.tokenizer, path, kind, task.shots, task.delimiter, n)
        assert score.n == n and score.cropped == 0
        assert score.accuracy == plain, f"{label}: {score.accuracy}, one at a time {plain}"
        found[label] = plain
    assert all(0 < a < 1 for a in found.values()), f"a test that proves little: {found}"


def test_accuracies_are_those_of_an_independent_reading(made_up: Path, made_up_scorer: GPTScorer) -> None:
    check_against_plain(made_up / "eval_core", made_up_scorer, 40)


@pytest.mark.data
def test_accuracies_on_real_tasks_are_those_of_an_independent_reading(data: Path) -> None:
    check_against_plain(data / "eval_core", trained(data / "eval_core"), 16)


@pytest.mark.parametrize("pattern", [["attn"], ["mamba"], ["mamba2"], ["gdn"], ["attn", "mamba"]], ids="-".join)
def test_batches_with_a_shared_prefix_give_what_single_rows_give(
    made_up: Path, made_up_scorer: GPTScorer, pattern: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = made_up_scorer.tokenizer
    scorer = GPTScorer(tiny(tokenizer.vocab_size, pattern), tokenizer)
    seen: list[float] = []
    plain = core_eval.score_rows

    def spy(*args):
        losses, hits = plain(*args)
        seen.extend(losses)
        return losses, hits

    monkeypatch.setattr(core_eval, "score_rows", spy)
    for label in THREE:
        task = TASKS[label]
        items = read_items(task_file(made_up / "eval_core", task), task)
        results = []
        for shares, budget in ((False, 1), (False, 3000), (True, 3000)):
            monkeypatch.setattr(scorer, "shares", shares, raising=False)
            seen.clear()
            score = evaluate_task(scorer, task, items, 9, budget)
            results.append((score.correct, sorted(seen)))
        for correct, losses in results[1:]:
            assert correct == results[0][0]
            assert losses == pytest.approx(results[0][1], abs=2e-5)


def test_ranks_share_the_questions(made_up: Path, made_up_scorer: GPTScorer) -> None:
    task = TASKS["arc_easy"]
    items = read_items(task_file(made_up / "eval_core", task), task)
    whole = evaluate_task(made_up_scorer, task, items, 21)
    parts = [evaluate_task(made_up_scorer, task, items, 21, ranks=Ranks(r, r, 3)) for r in range(3)]
    assert sum(p.correct for p in parts) == whole.correct and {p.n for p in parts} == {21}


def test_batches_stay_within_the_budget_and_lose_no_question() -> None:
    rng = random.Random(0)
    questions = [core_eval.Question([[0] * rng.randint(2, 90)] * rng.randint(1, 4), [1], 0) for _ in range(200)]
    made = list(batches(questions, 300))
    assert sorted(map(id, (q for b in made for q in b))) == sorted(map(id, questions))
    for batch in made:
        assert len(batch) == 1 or sum(len(q.rows) for q in batch) * max(q.longest for q in batch) <= 300


def test_examples_never_hold_the_question_and_a_limit_does_not_change_them(made_up: Path) -> None:
    task = TASKS["arc_easy"]
    items = [{"query": f"<{i}>", "choices": ["a", "b"], "gold": 0} for i in range(12)]
    for i in range(12):
        head, _, own = prompts(task, items, i)[0].rpartition("\n\n")
        assert own == f"<{i}>\nAnswer: a" and f"<{i}>" not in head and head.count("\nAnswer: a") == 10
    path = made_up / "eval_core" / f"{task.file}.gz"
    with pytest.raises(UserError, match="needs more than its 10 examples"):
        write_lines(made_up / "few.jsonl.gz", items[:10])
        read_items(made_up / "few.jsonl.gz", task)
    with pytest.raises(UserError, match="question 1 has no 'context_options': a schema task needs it"):
        read_items(path, TASKS["winograd"])


def test_every_continuation_has_a_token() -> None:
    mc, item = TASKS["copa"], {"gold": 0}
    q = make_question(mc, item, [[9, 1, 2], [9, 1, 2, 3]], 100)  # one option begins the other
    assert q.starts == [2, 2] and q.shared == 1
    schema = make_question(TASKS["winograd"], item, [[9, 1, 5, 6], [9, 1, 5, 6]], 100)
    assert schema.starts == [1, 1]
    lm = make_question(TASKS["lambada_openai"], {}, [[9, 1, 2], [9, 1, 3, 4]], 100)  # the tokens merge at the border
    assert lm.rows == [[9, 1, 3, 4]] and lm.starts == [2] and lm.gold == -1


def test_long_prompts_lose_tokens_from_the_left_and_are_counted(made_up: Path, made_up_scorer: GPTScorer) -> None:
    rows = [[9, *range(20), 30, 31], [9, *range(20), 40]]
    q = make_question(TASKS["copa"], {"gold": 0}, rows, 10)
    assert q.cropped and q.rows == [[9, *range(13, 20), 30, 31], [9, *range(13, 20), 40]] and q.starts == [8, 8]
    with pytest.raises(UserError, match="copa: an answer of 2 tokens does not fit a context of 2"):
        make_question(TASKS["copa"], {"gold": 0}, rows, 2)
    scorer = GPTScorer(made_up_scorer.model, made_up_scorer.tokenizer)
    scorer.max_len = 64
    task = TASKS["arc_easy"]
    score = evaluate_task(scorer, task, read_items(task_file(made_up / "eval_core", task), task), 12)
    assert score.cropped == 12


# ---- the metric ----


def test_core_is_the_mean_of_centred_accuracies() -> None:
    scores = [TaskScore(TASKS["boolq"], 81, 100), TaskScore(TASKS["squad"], 5, 20), TaskScore(TASKS["copa"], 40, 100)]
    value, stderr = core(scores)
    assert value == pytest.approx(((0.81 - 0.62) / 0.38 + 0.25 + (0.4 - 0.5) / 0.5) / 3)
    errors = [(0.81 * 0.19 / 100) ** 0.5 / 0.38, (0.25 * 0.75 / 20) ** 0.5, (0.4 * 0.6 / 100) ** 0.5 / 0.5]
    assert stderr == pytest.approx(sum(e * e for e in errors) ** 0.5 / 3)
    twice = [TaskScore(TASKS["hellaswag"], 50, 100), TaskScore(TASKS["hellaswag_zeroshot"], 50, 100)]
    assert core(twice)[1] == pytest.approx(twice[0].centered_stderr)  # the same questions: no gain


@pytest.mark.data
def test_published_scores_come_out_of_their_own_accuracies(data: Path) -> None:
    folder = data / "eval_core"
    models = core_eval.published_scores(folder, [t.label for t in CORE_TASKS])
    assert len(models) == 156
    assert all(mean == pytest.approx(published, abs=1e-5) for _, published, mean in models)


@pytest.mark.data
def test_the_tasks_are_those_of_the_bundle(data: Path) -> None:
    listed = json.loads((data / "eval_core" / "core_tasks.json").read_text())["core"]
    theirs = {
        t["label"]: (
            t["dataset_uri"], t["icl_task_type"], t["num_fewshot"], t["continuation_delimiter"],
            pytest.approx(t["random_baseline"] / 100),
        )
        for t in listed
    }  # fmt: skip
    assert {t.label: (f"{t.file}.gz", t.kind, t.shots, t.delimiter, t.baseline) for t in CORE_TASKS} == theirs
    with open(data / "eval_core" / "eval_meta_data.csv", encoding="utf-8") as f:
        baselines = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in csv.DictReader(f)}
    assert all(t.baseline == pytest.approx(baselines[t.label]) for t in CORE_TASKS)
    assert [t.label for t in CORE_TASKS if task_file(data / "eval_core", t) is None] == ["coqa"]


# ---- the bundle ----


@pytest.fixture
def no_data(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No data folder with a bundle, an empty base folder, and downloads that do not wait between attempts."""
    (tmp_path / "nothing").mkdir()
    monkeypatch.setenv("NANOCHAT_DATA", str(tmp_path / "nothing"))
    monkeypatch.setattr(core_bundle, "Fetcher", functools.partial(core_bundle.Fetcher, pause=0.01))
    return base


def test_without_network_the_error_says_where_the_bundle_goes(no_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_bundle, "BUNDLE_URL", "http://127.0.0.1:9/eval_bundle.zip")
    with pytest.raises(UserError, match=r"gave up after 3 attempts.*put the unpacked bundle at .*base/eval_bundle"):
        core_folder()
    (no_data / "eval_bundle").mkdir()
    with pytest.raises(UserError, match="has no file of copa: put the CORE bundle there"):
        core_eval.evaluate_core(GPTScorer(tiny(300, ["attn"]), None), core_folder(), [TASKS["copa"]])


def test_the_bundle_is_downloaded_and_unpacked(no_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "www").mkdir()
    with zipfile.ZipFile(tmp_path / "www" / "eval_bundle.zip", "w") as z:
        z.writestr("eval_bundle/eval_data/" + TASKS["copa"].file, '{"query": "a", "choices": ["b", "c"], "gold": 1}\n')
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "www")
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *a: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(core_bundle, "BUNDLE_URL", f"http://127.0.0.1:{server.server_port}/eval_bundle.zip")
        folder = core_folder()
        server.shutdown()
    assert folder == no_data / "eval_bundle" and sorted(p.name for p in no_data.iterdir()) == ["eval_bundle"]
    assert read_items(task_file(folder, TASKS["copa"]), TASKS["copa"])[0]["gold"] == 1


# ---- the script ----


@pytest.fixture
def checkpoint(base: Path, made_up: Path, made_up_scorer: GPTScorer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base folder with a tokenizer and the trained model as base, tag t, and the made-up bundle as data."""
    monkeypatch.setenv("NANOCHAT_DATA", str(made_up))
    made_up_scorer.tokenizer.save(base / "tokenizer")
    model, meta = made_up_scorer.model, {"tokenizer_hash": made_up_scorer.tokenizer.hash, "train_config": {}}
    meta["model_config"] = vars(model.config)
    save_checkpoint(checkpoint_dir("base", "t"), 7, model=model.state_dict(), optim=None, state={}, meta=meta)
    return base


def test_the_script_writes_table_files_and_report(checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    base_eval.main(["-g", "t", "--device=cpu", "--dtype=float32", "--device_batch_tokens=2048"])
    out = capsys.readouterr().out
    assert "**CORE-3**" in out and "No file for coqa: put reading_comprehension/coqa.jsonl.gz in" in out
    result = json.loads((checkpoint / "base_eval" / "base_t_000007_core_3.json").read_text())
    rows = list(csv.DictReader((checkpoint / "base_eval" / "base_t_000007_core_3.csv").read_text().splitlines()))
    assert [r["task"] for r in rows] == [*(t.label for t in CORE_TASKS if t.label in THREE), "CORE-3"]
    assert float(rows[-1]["centered"]) == pytest.approx(sum(result["centered"].values()) / 3, abs=1e-6)
    assert result["aggregate"]["stderr"] > 0 and result["aggregate"]["n"] == 120
    section = json.loads((checkpoint / "report" / "base_eval.json").read_text())
    assert section["summary"] == ["CORE-3"] and section["metrics"] == {"CORE-3": result["aggregate"]}
    assert "| arc_easy " in section["text"]


def test_a_limited_run_says_so_in_its_name(checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    base_eval.main(["-x", "5", "--device=cpu", "--tasks=winograd,arc_easy"])
    assert "mean of 2 tasks (5 per task): " in capsys.readouterr().out
    assert (checkpoint / "base_eval" / "base_d2_000007_mean_of_2_tasks_5_per_task.csv").is_file()
    for arguments, message in (
        (["--tasks=arc_esy"], "CORE has no task 'arc_esy': did you mean 'arc_easy'"),
        (["--tasks=copa"], "has no file of copa"),
        (["--hf_path=x", "-g", "t"], "hf_path names a model of its own"),
        (["--hf_path=x"], "hf_path=x is not a folder"),
    ):
        with pytest.raises(UserError, match=message):
            base_eval.main([*arguments, "--device=cpu"])


def test_published_models_stand_beside_ours(tmp_path: Path) -> None:
    labels = [t.label for t in CORE_TASKS]
    models = [
        {"name": f"m{i}", "model": "x", "core": i / 10, "icl": dict.fromkeys(labels, 0.3 + i / 20)} for i in range(12)
    ]
    write_lines(tmp_path / core_bundle.PUBLISHED, models)
    text = base_eval.published_table(tmp_path, ["squad", "copa"], "CORE-2", 0.4, 0.01)
    first = (0.85 + (0.85 - 0.5) / 0.5) / 2
    assert f"| {first:.4f}" in text.splitlines()[2] and "m11" in text.splitlines()[2]
    assert (
        "m0" in text
        and "**ours**" in text
        and "the same 2 tasks" in text
        and len(re.findall(r"^\| m\d", text, re.M)) == 7
    )


@pytest.mark.slow
def test_a_transformers_model_scores_as_its_own_logits_say(
    made_up: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    monkeypatch.setenv("NANOCHAT_DATA", str(made_up))
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(whole_texts(made_up / "eval_core"), 300, special_tokens=["<|endoftext|>"])
    tok = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>")
    tok.save_pretrained(tmp_path / "hf")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=len(tok), n_positions=512, n_embd=32, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "hf")
    base_eval.main([f"--hf_path={tmp_path / 'hf'}", "--device=cpu", "--dtype=float32", "--tasks=arc_easy,winograd"])
    result = json.loads((base / "base_eval" / "hf_hf_mean_of_2_tasks.json").read_text())

    class Same:  # what plain_accuracy asks of a tokenizer
        bos_id = tok.eos_token_id
        encode = staticmethod(lambda text: tok(text, add_special_tokens=False)["input_ids"])

    for label, kind in (("arc_easy", "mc"), ("winograd", "schema")):
        task = TASKS[label]
        path = made_up / "eval_core" / f"{task.file}.gz"
        logits = lambda ids: model(input_ids=ids).logits  # noqa: E731
        plain = plain_accuracy(logits, Same(), path, kind, task.shots, task.delimiter, 40)
        assert result["accuracy"][label]["value"] == pytest.approx(plain)
    assert not (base / "report").exists()
