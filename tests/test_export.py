"""Exports: transformers computes our logits, ids and prompts; the harness' adapter agrees with direct computation."""

import dataclasses
import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nanochat.checkpoint import checkpoint_dir, save_checkpoint
from nanochat.config import UserError
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.hf_tokenizer import merges, oniguruma, tokenizer_files
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer
from scripts import base_eval, export

TEXT = (
    "The quick brown fox jumps over the lazy dog. Überraschung: 12345 Äpfel, 你好 🌍 naïve café.\r\n\tIt's 7 o'clock. "
)
NASTY = ["", " ", "\0", "a" * 999, "\r\n\r", "e\u0301", "\ufeffa", "  two  spaces ", "I'LL don't", "1234567", "\x85x ǅ"]
CHAT = {
    "messages": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "What is 6 * 7?\n"},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "It is "},
                {"type": "python", "text": "6*7"},
                {"type": "python_output", "text": "42"},
                {"type": "cite", "n": 2},
                {"type": "abstain"},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "docs", "documents": ["plain", {"title": "T", "text": "titled"}]},
                {"type": "text", "text": " and now? "},
            ],
        },
        {"role": "assistant", "content": [{"type": "info", "text": "none"}, {"type": "text", "text": "Done."}]},
    ]
}


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return Tokenizer.train([TEXT * 20, Path(json.__file__).read_text()], vocab_size=400, threads=1)


def save(base: Path, tok: Tokenizer, **options: Any) -> GPT:
    """A checkpoint "sft" / "t" of a small model with weights large enough that every part shows in the logits."""
    config = {
        "n_layer": 2,
        "d_model": 32,
        "n_head": 4,
        "vocab_size": tok.vocab_size,
        "seq_len": 48,
        "gdn_head_dim": 16,
        "mamba2_head_dim": 16,
        **options,
    }
    model = GPT(GPTConfig(**config))
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=generator)
    tok.save(base / "tokenizer")
    meta = {"model_config": dataclasses.asdict(model.config), "train_config": {}, "tokenizer_hash": tok.hash}
    save_checkpoint(
        checkpoint_dir("sft", "t"), 3, model=model.state_dict(), optim=None, state={}, meta={**meta, "git": {}}
    )
    return model.eval()


def load(folder: Path) -> tuple[Any, Any]:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    return (
        transformers.AutoModelForCausalLM.from_pretrained(folder),
        transformers.AutoTokenizer.from_pretrained(folder),
    )


# transformers


@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 15.0, "head_tie": 0.05},
        {"n_kv_head": 2, "mlp_ratio": 3, "rope_base": 500.0, "window_pattern": "SL", "window": 48},
    ],
)
@torch.no_grad()
def test_transformers_computes_our_logits_and_greedy_text(base: Path, tok: Tokenizer, options: dict) -> None:
    ours = save(base, tok, **options)
    export.main(["--format=transformers", f"--output={base}/out", "--model_tag=t"])
    theirs, _ = load(base / "out")
    ids = torch.randint(0, tok.vocab_size, (3, 48), generator=torch.Generator().manual_seed(0))
    assert ours(ids).std() > 0.5
    torch.testing.assert_close(theirs(ids).logits, ours(ids), rtol=0, atol=1e-4)
    prompt = ids[0, :7].tolist()
    [row], _ = Engine(ours, tok, tools=()).generate_batch(prompt, max_tokens=20, temperature=0)
    written = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0].tolist()
    ends = [i for i in written[7:] if i in Engine(ours, tok).terminators]
    assert written[: len(written) - len(ends)] == row and len(row) > 10


def test_base_eval_takes_the_folder(base: Path, tok: Tokenizer) -> None:
    pytest.importorskip("transformers", minversion="5.0")
    save(base, tok)
    export.main([f"--output={base}/out", "--dtype=bfloat16"])
    scorer = base_eval.HFScorer(f"{base}/out", torch.device("cpu"), torch.float32)
    assert scorer.max_len == 48
    assert scorer.encode([TEXT, "a <b>"]) == tok.encode([TEXT, "a <b>"], prepend="<|bos|>")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_pattern": ["attn", "mamba"]}, r"a MambaBlock \(layer 1\): use --format=safetensors"),
        ({"value_embeddings": True}, "value_embeddings"),
        ({"residual_scalars": True}, "residual_scalars"),
        ({"attn_conv": 4}, "attn_conv"),
        ({"window_pattern": "SL", "window": 8}, "a window of 8 tokens in layer 0"),
        ({"mlp": False}, "without an MLP"),
        ({"block_pattern": ["attn", {"block": "attn", "n_kv_head": 2}]}, "layers that differ"),
    ],
)
def test_what_transformers_lacks_is_refused_in_one_line(
    base: Path, tok: Tokenizer, options: dict, message: str
) -> None:
    save(base, tok, **options)
    with pytest.raises(UserError, match=message) as e:
        export.main([f"--output={base}/out"])
    assert "\n" not in str(e.value) and not (base / "out").exists()


# the tokenizer


def load_tokenizer(folder: Path, tokenizer: Tokenizer) -> Any:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    for name, value in tokenizer_files(tokenizer, 10**9).items():
        (folder / name).write_text(json.dumps(value))
    (folder / "config.json").write_text('{"model_type": "nanochat"}')
    return transformers.AutoTokenizer.from_pretrained(folder)


def check_ids(theirs: Any, tokenizer: Tokenizer, texts: list[str]) -> None:
    expected = tokenizer.encode(texts)
    assert theirs(texts, add_special_tokens=False, split_special_tokens=True).input_ids == expected
    assert [theirs.decode(ids) for ids in expected] == texts


def test_their_ids_are_ours(tmp_path: Path, tok: Tokenizer) -> None:
    theirs = load_tokenizer(tmp_path, tok)
    letters = [chr(c) for c in range(0, 0x30000, 97) if not 0xD800 <= c < 0xE000]
    check_ids(theirs, tok, [TEXT, *NASTY, *SPECIAL_TOKENS, *(f"a{c}b 1{c} {c}\n{c}{c}'{c}" for c in letters)])
    assert theirs("hi").input_ids == tok.encode("hi", prepend="<|bos|>")
    assert theirs.convert_tokens_to_ids(SPECIAL_TOKENS) == [tok.encode_special(s) for s in SPECIAL_TOKENS]
    assert (theirs.bos_token, theirs.eos_token) == ("<|bos|>", "<|assistant_end|>")


@pytest.mark.data
@pytest.mark.parametrize("name", ["r50k_base", "cl100k_base"])
def test_their_ids_are_the_published_ones(tmp_path: Path, name: str) -> None:
    cases = importlib.import_module("tests.test_tokenizer")
    texts = [r["text"] for r in cases.cases("oracle_encodings_dev.jsonl.gz")]
    check_ids(load_tokenizer(tmp_path, cases.published(name)), cases.published(name), texts)


def test_every_learned_token_has_its_pair(tok: Tokenizer) -> None:
    pairs = merges(tok.tokens)
    assert [a + b for a, b in pairs] == [t for t in tok.tokens if len(t) > 1]


def test_possessive_counts_are_rewritten_or_refused() -> None:
    assert oniguruma(r"\p{N}{1,3}+|[a-c]{2}+|x++") == r"(?>\p{N}{1,3})|(?>[a-c]{2})|x++"
    with pytest.raises(UserError, match="possessive"):
        oniguruma("(ab){1,2}+")


def test_chat_template_renders_as_we_do(tmp_path: Path, tok: Tokenizer) -> None:
    theirs = load_tokenizer(tmp_path, tok)
    for n in (2, 3, 4, 5):
        messages = CHAT["messages"][:n]
        if messages[-1]["role"] == "user":
            got = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            assert got == tok.render_for_completion({"messages": messages})
        got = theirs.apply_chat_template(messages, return_dict=False)
        assert got == tok.render_conversation({"messages": messages})[0]
    with pytest.raises(Exception, match="user and assistant in turn"):
        theirs.apply_chat_template(CHAT["messages"][2:])


# safetensors


@torch.no_grad()
def test_safetensors_load_by_the_printed_lines(base: Path, tok: Tokenizer, capsys: pytest.CaptureFixture) -> None:
    ours = save(base, tok, block_pattern=["mamba", "attn"])
    export.main(["--format=safetensors"])
    assert (base / "export/sft_d2_000003_safetensors/config.json").is_file()
    names: dict[str, Any] = {}
    exec(capsys.readouterr().out.partition("To load it:\n")[2], names)
    ids = torch.arange(40)[None]
    torch.testing.assert_close(names["model"](ids), ours(ids))
    assert names["tokenizer"].hash == tok.hash
    with pytest.raises(UserError, match="exists"):
        export.main(["--format=safetensors"])


# lm-evaluation-harness


class StandInLM:
    pass


@pytest.fixture
def lm_harness(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """nanochat.lm_harness over lm-eval, or where that is missing over a stand-in with the two names it imports."""
    try:
        importlib.import_module("lm_eval.api.model")
    except ImportError:
        for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.registry"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setattr(sys.modules["lm_eval.api.model"], "LM", StandInLM, raising=False)
        monkeypatch.setattr(
            sys.modules["lm_eval.api.registry"], "register_model", lambda name: lambda cls: cls, raising=False
        )
        monkeypatch.delitem(sys.modules, "nanochat.lm_harness", raising=False)
    return importlib.import_module("nanochat.lm_harness")


def requests(*args: tuple) -> list[Any]:
    return [types.SimpleNamespace(args=a) for a in args]


def log_probs(model: GPT, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(T - 1,) log probability of each id after the first, and whether it was the likeliest; one row, no state."""
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]]))[0]
    y = torch.tensor(ids[1:])
    return -F.cross_entropy(logits, y, reduction="none"), logits.argmax(-1) == y


@pytest.mark.parametrize("pattern", [["attn"], ["mamba", "attn"], ["gdn", "mamba2"]])
def test_harness_scores_equal_direct_computation(
    base: Path, tok: Tokenizer, lm_harness: types.ModuleType, pattern: list, capsys: pytest.CaptureFixture
) -> None:
    model = save(base, tok, block_pattern=pattern)
    lm = lm_harness.NanochatLM(source="sft", device="cpu", dtype="float32", batch_tokens=64)
    pairs = [("The quick ", "fox"), ("", "brown dog"), ("It's", " 7 o'clock."), ("x", ""), (TEXT + "x", " lazy")]
    bos, long = tok.bos_id, tok.encode(TEXT + "x lazy")
    rows = [([bos, *tok.encode(a + b)], 1 + len(tok.encode(a.rstrip()))) for a, b in pairs[:4]]
    rows.append(([bos, *long[-48:]], 49 - len(tok.encode(" lazy"))))
    assert len(long) > 60
    for (value, greedy), (ids, start) in zip(lm.loglikelihood(requests(*pairs)), rows, strict=True):
        direct, hit = log_probs(model, ids)
        assert value == pytest.approx(direct[start - 1 :].sum().item(), abs=1e-3)
        assert greedy == bool(hit[start - 1 :].all())
    assert "1 of 5 texts are longer" in capsys.readouterr().err
    with pytest.raises(UserError, match="does not fit"):
        lm.loglikelihood(requests(("a", TEXT)))


def test_rolling_likelihood_predicts_each_token_once(base: Path, tok: Tokenizer, lm_harness: types.ModuleType) -> None:
    model = save(base, tok)
    text = TEXT * 2
    ids = tok.encode(text, prepend="<|bos|>")
    assert len(ids) > 97 and list(lm_harness.windows(list(range(8)), 5)) == [([0, 1, 2, 3, 4], 1), ([3, 4, 5, 6, 7], 2)]
    assert list(lm_harness.windows(list(range(3)), 5)) == [([0, 1, 2], 1)] and not list(lm_harness.windows([0], 5))
    expected = sum(log_probs(model, row)[0][start - 1 :].sum().item() for row, start in lm_harness.windows(ids, 49))
    lm = lm_harness.NanochatLM(source="sft", device="cpu", dtype="float32")
    assert lm.loglikelihood_rolling(requests((text,), ("",))) == [pytest.approx(expected, abs=1e-3), 0.0]


def test_generation_stops_at_the_text_and_equals_the_engine(
    base: Path, tok: Tokenizer, lm_harness: types.ModuleType
) -> None:
    model = save(base, tok)
    lm = lm_harness.NanochatLM(source="sft", device="cpu", dtype="float32")
    contexts = ["The quick", "It's 7", TEXT]
    options = {"until": [], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}
    plain = lm.generate_until(requests(*((c, options) for c in contexts)))
    for context, text in zip(contexts, plain, strict=True):
        prompt = lm_harness.fit(tok.encode(context, prepend="<|bos|>"), 36)
        [row], _ = Engine(model, tok, tools=()).generate_batch(prompt, max_tokens=12, temperature=0)
        new = [i for i in row[len(prompt) :] if i not in tok.special_ids.values()]
        assert text == tok.decode(new, errors="replace") and len(text) > 3
    stop = plain[0][3]
    short = lm.generate_until(requests((contexts[0], {**options, "until": ["\0\0", stop]})))
    assert short == [plain[0][: plain[0].index(stop)]]
    with pytest.raises(UserError, match="num_beams=2: known are until"):
        lm.generate_until(requests(("a", {"num_beams": 2})))


def test_chat_prompts_become_the_ids_we_train_on(base: Path, tok: Tokenizer, lm_harness: types.ModuleType) -> None:
    save(base, tok)
    lm = lm_harness.NanochatLM(source="sft", device="cpu", dtype="float32")
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi!"}]
    prompt = tok.render_for_completion({"messages": messages})
    assert lm_harness.encode(tok, lm.apply_chat_template(messages)) == prompt
    begun = lm.apply_chat_template([*messages, {"role": "assistant", "content": "We"}], add_generation_prompt=False)
    assert lm_harness.encode(tok, begun) == [*prompt, *tok.encode("We")]
    assert lm_harness.encode(tok, "a <|bos|>") == tok.encode("a <|bos|>", prepend="<|bos|>")


def test_without_the_harness_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "nanochat.lm_harness", raising=False)
    with pytest.raises(UserError, match="uv pip install lm-eval"):
        importlib.import_module("nanochat.lm_harness")
