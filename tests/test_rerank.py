"""Reranking with a scorer whose judgement is known, and with a cross-encoder of two layers and random weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanochat.config import UserError
from nanochat.retrieval.contract import NO_HIT
from nanochat.retrieval.rerank import CrossEncoderScorer, RerankRetriever
from nanochat.retrieval.simple import SimpleRetriever

TEXTS = [f"river stone {'moss ' * (i % 3)}{'pebble ' * i}" for i in range(12)] + ["another story"]


class Length:
    """Longer is better; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def score(self, query: str, texts: Sequence[str]) -> list[float]:
        self.asked.append((query, len(texts)))
        return [float(len(text.split())) for text in texts]


class Says:
    def __init__(self, scores: Any) -> None:
        self.scores = scores

    def score(self, query: str, texts: Sequence[str]) -> Any:
        return self.scores


class TextBase:
    n_chunks = len(TEXTS)

    def texts(self, ids: Sequence[int]) -> list[str]:
        return [TEXTS[i] for i in ids]

    def retriever(self, name: str) -> Any:
        return SimpleRetriever(self)  # pyrefly: ignore[bad-argument-type]


def rerank(**options: Any) -> RerankRetriever:
    return RerankRetriever(TextBase(), options)  # pyrefly: ignore[bad-argument-type]


def test_hits_come_in_the_order_of_the_scorer() -> None:
    ranking = rerank(scorer=Length()).search(["river stone", "story", ""], 15)
    lengths = [len(text.split()) for text in TEXTS[:12]]
    assert ranking.ids[0, :12].tolist() == sorted(range(12), key=lambda i: (-lengths[i], i))
    assert ranking.scores[0, :12].tolist() == sorted(lengths, reverse=True)
    assert (ranking.ids[0, 12:] == NO_HIT).all()
    assert ranking.ids[1].tolist() == [12] + [NO_HIT] * 14
    assert (ranking.ids[2] == NO_HIT).all()
    assert (ranking.scores[2] == -np.inf).all()


def test_only_the_first_hits_are_read_and_only_allowed_ones() -> None:
    scorer = Length()
    ranking = rerank(scorer=scorer, depth=4).search(["river stone"], 2)
    assert ranking.ids.tolist() == [[2, 3]]  # of the first four, which "simple" finds equal
    assert rerank(scorer=scorer, depth=4).search(["river stone"], 6).ids.shape == (1, 6)
    allowed = np.arange(len(TEXTS)) % 2 == 0
    assert rerank(scorer=scorer).search(["river stone"], 2, allowed).ids.tolist() == [[10, 8]]
    assert scorer.asked == [("river stone", 4), ("river stone", 6), ("river stone", 6)]


def test_equal_scores_come_in_the_order_of_chunks() -> None:
    ranking = rerank(scorer=Says(np.zeros(12))).search(["river stone moss"], 12)
    assert ranking.ids[0].tolist() == list(range(12))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "has no scorer"),
        ({"scorer": 3}, "scorer is int"),
        ({"scorer": Length(), "dept": 5}, "no option 'dept'"),
        ({"scorer": Length(), "depth": 0}, "depth=0"),
        ({"scorer": Length(), "first": "rerank"}, "never ends"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rerank(**options)


@pytest.mark.parametrize(("scores", "message"), [([1.0], r"shape \(1,\) for 12"), ([np.nan] * 12, "not finite")])
def test_scores_that_cannot_be_ranked_are_refused(scores: list[float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rerank(scorer=Says(scores)).search(["river stone"], 3)


@pytest.mark.slow
def test_a_cross_encoder_from_a_folder_scores_as_transformers_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("sentence_transformers")
    words = sorted({word for text in TEXTS for word in text.split()})
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    tokenizer = transformers.BertTokenizerFast(str(tmp_path / "vocab.txt"))
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(tokenizer), num_labels=1, initializer_range=0.5, **sizes)
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with torch.no_grad():
        batch = tokenizer(["river stone"] * len(TEXTS), TEXTS, padding=True, return_tensors="pt")
        logits = model(**batch).logits[:, 0]  # (C,)
    scorer = CrossEncoderScorer(str(tmp_path))
    np.testing.assert_allclose(scorer.score("river stone", TEXTS), torch.sigmoid(logits).numpy(), atol=1e-5)
    ranking = rerank(scorer=str(tmp_path)).search(["river stone"], 12)
    assert ranking.ids[0].tolist() == torch.argsort(-logits[:12], stable=True).tolist()
    with pytest.raises(UserError, match="no cross-encoder"):
        CrossEncoderScorer(str(tmp_path / "missing"))
