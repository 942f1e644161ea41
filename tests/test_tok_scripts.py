import gzip
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.config import UserError
from nanochat.tokenizer import Tokenizer
from scripts import tok_eval, tok_train

WORDS = [*(tok_eval.__doc__ or "").split(), "naïve", "日本語", "2024", "\n"]


@pytest.fixture
def shards(base, tmp_path, monkeypatch):
    """A base dir with two training shards and one for validation; the data folder holds no vocabularies."""
    monkeypatch.setenv("NANOCHAT_DATA", str(tmp_path))
    folder = base / "base_data"
    folder.mkdir()
    for i in range(3):
        texts = [" ".join(WORDS[(i + j) % len(WORDS) :]) for j in range(20)]
        pq.write_table(pa.table({"text": texts}), folder / f"shard_{i:05d}.parquet")
    return folder


def test_train_then_eval(shards, capsys):
    tok_train.main(["--vocab_size=400", "--max-chars=5000", "--doc_cap=300", "--threads=1"])
    tokenizer = Tokenizer.load()
    assert tokenizer.vocab_size == 400
    assert "trained 400 ids on 5000 characters" in capsys.readouterr().out
    tok_eval.main(["--max_chars=20000"])
    out = capsys.readouterr().out
    rows = {row[0]: row for row in re.findall(r"^\| (\w+) +\| (\d+) +\| ([\d.]+) +\|$", out, re.MULTILINE)}
    assert {"train", "val", "english", "math", "multilingual", "code", "numbers"} <= set(rows)
    for name in ("GPT-2", "cl100k", "o200k"):
        assert f"{name} is not compared: put" in out
    _, n_bytes, ratio = rows["english"]
    text = tok_eval.EMBEDDED["english"]
    assert int(n_bytes) == len(text.encode())
    assert float(ratio) == pytest.approx(len(text.encode()) / len(tokenizer.encode(text)), abs=1e-3)


def test_eval_compares_the_vocabularies_it_finds(shards, tmp_path, capsys):
    tok_train.main(["--vocab_size=300"])
    folder = tmp_path / "tok" / "vocab"
    folder.mkdir(parents=True)
    tokens = Tokenizer.load().tokens
    with gzip.open(folder / "cl100k_base.tiktoken.gz", "wt") as f:
        f.writelines(f"{tok_eval.base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(tokens))
    (folder / "pattern_strings.json").write_text(json.dumps({"cl100k_base": Tokenizer.load().pattern}))
    capsys.readouterr()
    tok_eval.main(["--max_chars=1000"])
    out = capsys.readouterr().out
    assert out.count("(+0.0%)") == 7  # the same vocabulary compresses the same
    assert "GPT-2 is not compared" in out
    assert "cl100k is not compared" not in out
    (folder / "cl100k_base.tiktoken.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match="damaged"):
        tok_eval.main([])


def test_sample_stops_at_its_limits():
    sample = tok_train.Sample(["abcdef", "ghi", "jklm", "never"], doc_cap=4, max_chars=9)
    assert list(sample) == ["abcd", "ghi", "jk"]
    assert (sample.n_documents, sample.n_chars) == (3, 9)


def test_small_text_says_that_pairs_ran_out(shards, capsys):
    tok_train.main(["--max_chars=3", "--vocab_size=65536"])
    assert "ran out of pairs" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--vocab_size=273", "--max_chars=0", "--doc_cap=-1", "--threads=0", "--vocab=9"])
def test_bad_flags_stop_before_any_work(flag, monkeypatch):
    monkeypatch.setattr(tok_train, "iter_documents", lambda split: pytest.fail("work began"))
    with pytest.raises(UserError, match=flag.lstrip("-").split("=")[0]):
        tok_train.main([flag])


def test_eval_without_tokenizer_names_the_cure(base):
    with pytest.raises(UserError, match=r"python -m scripts\.tok_train"):
        tok_eval.main([])


def test_train_without_shards_names_the_cure(base):
    with pytest.raises(UserError, match=r"python -m nanochat\.dataset"):
        tok_train.main([])
