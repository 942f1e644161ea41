"""Compressed contexts: chunks, vectors in place of tokens in the model and the engine, the stages, a whole run."""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanochat import device, engine
from nanochat.checkpoint import load_model, save_checkpoint
from nanochat.common import REPO_DIR
from nanochat.compress import evaluate as evaluation
from nanochat.compress import judge, train
from nanochat.compress.chunks import Prompt, cut, effective_rate, make_prompt, mix
from nanochat.compress.curriculum import FIRST, TOTALS, size_shares, table
from nanochat.compress.encoder import ChunkEncoder, VectorCache
from nanochat.compress.evaluate import compression
from nanochat.compress.judge import CompressEvalConfig, compress_eval_main
from nanochat.compress.reader import Reader, build_cache, load_reader
from nanochat.compress.search import compressed_search
from nanochat.compress.stages import Stream, distil, reconstruct
from nanochat.compress.train import CompressConfig, Contexts, compress_main
from nanochat.config import UserError, load_config
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.plots import read_metrics
from nanochat.rag import answer_parts, question_conversation
from nanochat.retrieval import Document, Hit, KnowledgeBase
from nanochat.retrieval.document import Chunk
from nanochat.tokenizer import Tokenizer
from scripts import bench_compress, prepare_rag_dataset
from tasks.compress import open_contexts
from tasks.rag import is_right

PATTERNS = ["T", "M", "M2", "G", "M,T"]
NAMES = ["Bram", "Cleo", "Dara", "Emil", "Fay", "Gus", "Hanne", "Ivo"]
TOWNS = ["Oslo", "Rome", "Bath", "Kyiv", "Lima", "Cork"]


def conversation(seed: int, n: int = 4) -> dict[str, Any]:
    """A question whose answer is in one of n documents of two sentences or three."""
    rng = random.Random(seed)
    names, gold = rng.sample(NAMES, n), rng.randrange(n)
    towns = [rng.choice(TOWNS) for _ in names]
    documents = [
        {"title": a, "text": f"{a} is a person. {a} was born in {b}." + " He likes soup." * rng.randrange(2)}
        for a, b in zip(names, towns, strict=True)
    ]
    asked = question_conversation(f"Where was {names[gold]} born?", documents)["messages"]
    said = {"role": "assistant", "content": answer_parts(towns[gold], [gold + 1])}
    return {"messages": [*asked, said], "answers": [towns[gold]], "gold": [gold + 1], "answerable": True}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    rng = random.Random(1)
    texts = [f"{rng.choice(NAMES)} was born in {rng.choice(TOWNS)}. Where was he born? likes soup" for _ in range(200)]
    return Tokenizer.train(iter(texts), 380)


def model_of(pattern: str, vocab_size: int, seed: int = 0, **more: Any) -> GPT:
    config = GPTConfig(n_layer=2, block_pattern=pattern, d_model=32, n_head=2, vocab_size=vocab_size, seq_len=256,
                       mamba_d_state=4, mamba2_d_state=8, mamba2_head_dim=16, gdn_head_dim=16, **more)  # fmt: skip
    model = GPT(config)
    model.init_weights(seed)
    with torch.no_grad():  # fresh blocks add nothing, fresh logits are equal: neither would show a difference
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)) * 0.05)
    model.set_compute(torch.float32)
    return model.eval()


def reader_of(pattern: str, tokenizer: Tokenizer, k: int = 8, **more: Any) -> Reader:
    reader = Reader.new(model_of(pattern, tokenizer.vocab_size, **more), tokenizer, k, 1)
    with torch.no_grad():
        reader.encoder.out.weight.normal_(0, 0.1)
        reader.encoder.mark.normal_(0, 0.1)
    return reader


# ---- chunks ----


def test_chunks_are_whole_sentences_of_one_document_and_cover_its_text(tokenizer: Tokenizer) -> None:
    for seed in range(20):
        talk = conversation(seed)
        ids, _ = tokenizer.render_conversation(talk)
        for k in (3, 8, 16, 100):
            chunks = cut(tokenizer, ids, k)
            assert all(0 < c.end - c.start <= k for c in chunks)
            for number, document in enumerate(talk["messages"][0]["content"][1]["documents"], 1):
                own = [c for c in chunks if c.document == number]
                assert tokenizer.decode([i for c in own for i in ids[c.start : c.end]]) == document["text"]
                assert tokenizer.decode(ids[own[0].title : own[0].body]) == f"[{number}] {document['title']}\n"
                if k == 16:
                    ends = {tokenizer.decode(ids[c.start : c.end]).rstrip()[-1] for c in own}
                    assert ends == {"."}, "a sentence fits 16 tokens, so every chunk ends with one"
                if k == 100:
                    assert len(own) == 1


def test_chunks_survive_texts_without_sentences_titles_and_letters(tokenizer: Tokenizer) -> None:
    for text in ("", "x" * 300, "\n\n", "дом 家。是的。 ok", "a.\n\nb.\n", "\ud800 lone"):
        ids, _ = tokenizer.render_conversation(
            {"messages": [{"role": "user", "content": [{"type": "docs", "documents": [{"text": text}, {"text": "b"}]}]},
                          {"role": "assistant", "content": "c"}]}
        )  # fmt: skip
        chunks = cut(tokenizer, ids, 8)
        inside = [i for c in chunks if c.document == 1 for i in ids[c.start : c.end]]
        said = tokenizer.decode_bytes(tokenizer.encode_ordinary(text))
        assert said.endswith(tokenizer.decode_bytes(inside))  # newlines may be one id with that behind the title
        assert len(inside) >= len(text.split())
        assert all(c.end - c.start <= 8 for c in chunks)


def test_all_chunks_expanded_are_the_ids_of_plain_rag(tokenizer: Tokenizer) -> None:
    prompt = make_prompt(tokenizer, conversation(3), 8)
    everything = range(len(prompt.chunks))
    assert mix(prompt, everything, 0) == (prompt.ids, prompt.mask, [])
    ids, mask, slots = mix(prompt, [0, 2], tokenizer.encode_special("<|chunk|>"))
    assert slots == [i for i in everything if i not in (0, 2)] and sum(mask) == sum(prompt.mask)
    whole, places, n_prompt, n_mixed = compression(prompt, [0, 2])
    assert len(prompt.ids) - len(ids) == whole - places == n_prompt - n_mixed


def test_gold_chunks_hold_the_answer(tokenizer: Tokenizer) -> None:
    for seed in range(10):
        talk = conversation(seed)
        prompt = make_prompt(tokenizer, talk, 8)
        assert prompt.gold and all(talk["answers"][0] in tokenizer.decode(prompt.chunk_ids(i)) or
                                   prompt.chunks[i].document in talk["gold"] for i in prompt.gold)  # fmt: skip


def test_effective_rate_is_that_of_equal_chunks() -> None:
    for k, n, chosen in ((16, 64, 4), (32, 40, 4), (8, 10, 0), (8, 10, 10)):
        places = (n - chosen) + chosen * k
        assert effective_rate(k, chosen / n) == pytest.approx(n * k / places)


# ---- the model and the engine with vectors ----


@pytest.mark.parametrize("pattern", PATTERNS)
def test_without_slots_logits_are_those_of_plain_rag_bit_for_bit(pattern: str, tokenizer: Tokenizer) -> None:
    reader = reader_of(pattern, tokenizer)
    prompts = [reader.prompt(conversation(s)) for s in range(3)]
    batch = reader.batch(prompts, [range(len(p.chunks)) for p in prompts])
    with torch.no_grad():
        plain = reader.model(batch.x)
        assert reader.inject(batch) is None
        assert torch.equal(reader.model(batch.x, inject=(batch.slots, torch.zeros(0, 32))), plain)
        one = reader.batch(prompts[:1], [range(len(prompts[0].chunks))])
        ids, _ = tokenizer.render_conversation(conversation(0))
        assert torch.equal(reader.model(one.x), reader.model(torch.tensor([ids[:-1]])))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_vectors_enter_a_state_as_they_enter_a_whole_pass(pattern: str, tokenizer: Tokenizer) -> None:
    reader = reader_of(pattern, tokenizer)
    prompts = [reader.prompt(conversation(s)) for s in (1, 2)]
    batch = reader.batch(prompts, [[0], [1, 2]])
    with torch.no_grad():
        places, vectors = reader.inject(batch) or (None, None)
        assert places is not None and vectors is not None
        whole = reader.model(batch.x, inject=(places, vectors))
        B, T = batch.x.shape
        state = reader.model.init_state(B, T)
        spread = torch.zeros(B, T, 32)
        spread[places] = vectors
        for t in range(T):  # a token, or a vector, at a time
            at = places[:, t : t + 1]
            logits = reader.model(batch.x[:, t : t + 1], state=state, inject=(at, spread[:, t : t + 1][at]))
            torch.testing.assert_close(logits[:, 0], whole[:, t], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_engine_answers_from_slots_as_the_training_forward_says(pattern: str, tokenizer: Tokenizer) -> None:
    reader = reader_of(pattern, tokenizer)
    prompts = [reader.prompt(conversation(s)) for s in (1, 2, 5)]
    expanded = [[0], [], list(range(len(prompts[2].chunks)))]
    answers = reader.answers(prompts, expanded, max_tokens=3)
    for prompt, chosen, answer in zip(prompts, expanded, answers, strict=True):
        asked, mask, _ = mix(prompt, chosen, reader.chunk_id)
        asked = asked[: mask.index(1)]
        for n, token in enumerate(answer):  # the whole pass again for each id
            whole = Prompt(prompt.ids[: prompt.n_prompt] + answer[:n] + [0], [0] * (prompt.n_prompt + n) + [1],
                           prompt.chunks)  # fmt: skip
            batch = reader.batch([whole], [chosen])
            with torch.no_grad():
                logits = reader.model(batch.x, inject=reader.inject(batch))[0, -1]
            assert logits[token] >= logits.max() - 1e-3


def test_engine_refuses_vectors_that_do_not_fit(tokenizer: Tokenizer) -> None:
    reader = reader_of("T", tokenizer)
    with pytest.raises(UserError, match=r"vectors for 2 chunks: the prompts have \[1\]"):
        Engine(reader.model, tokenizer).generate([tokenizer.bos_id, reader.chunk_id], vectors=[torch.zeros(2, 32)])


@pytest.mark.parametrize("pattern", ["T", "M,T"])
def test_retrieved_blocks_enter_compressed_as_a_whole_pass_reads_them(
    pattern: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = reader_of(pattern, tokenizer)
    documents = [Document("a", "Ada was born in Rome. Ada likes soup.", "Ada"), Document("b", "Ben likes soup.", "Ben")]
    found = [Hit(d, Chunk(0, len(d.text), d.text), 1.0, 1, "t") for d in documents]
    start, end = map(tokenizer.encode_special, ("<|search_start|>", "<|search_end|>"))
    script = [[start, *tokenizer.encode("soup"), end, 70, 71], [72] * 99]  # row 0 searches, row 1 only writes
    seen: list[list[torch.Tensor]] = [[], []]

    class Scripted:
        def __init__(self, *_: Any) -> None: ...

        def __call__(self, logits: torch.Tensor, rows: list[int]) -> list[int]:
            for row, logit in zip(rows, logits, strict=True):
                seen[row].append(logit)
            return [script[row][len(seen[row]) - 1] for row in rows]

    monkeypatch.setattr(engine, "Sampler", Scripted)
    tool = compressed_search(reader, lambda queries, k: [found for _ in queries], p=0.3, policy="bm25")
    rows, masks = Engine(reader.model, tokenizer, tools=[tool]).generate_batch(
        [[tokenizer.bos_id, 80], [tokenizer.bos_id, 81, 82]], max_tokens=60, stop=[71], temperature=1.0
    )
    whole = rows[0]
    slots = [i for i, token in enumerate(whole) if token == reader.chunk_id]
    assert slots and not any(masks[0][i] for i in slots)
    plain = tokenizer.render_documents([{"title": h.document.title, "text": h.chunk.text} for h in found])
    chunks = [plain[c.start : c.end] for c in cut(tokenizer, plain, reader.k)]
    compressed = [c for c in chunks if not any(whole[i : i + len(c)] == c for i in range(len(whole)))]
    assert len(compressed) == len(slots) < len(chunks)
    places = torch.zeros(1, len(whole), dtype=torch.bool)
    places[0, slots] = True
    with torch.no_grad():
        logits = reader.model(torch.tensor([whole]), inject=(places, reader.vectors(compressed)))[0]
    torch.testing.assert_close(seen[0][-1], logits[-1], atol=2e-4, rtol=1e-3)  # what 71 was sampled from
    torch.testing.assert_close(seen[0][-2], logits[-2], atol=2e-4, rtol=1e-3)  # and 70, right behind the documents


def test_padding_and_company_change_no_vector(tokenizer: Tokenizer) -> None:
    for pattern in PATTERNS:
        encoder = reader_of(pattern, tokenizer).encoder
        chunks = [[5, 6, 7], [8], [9] * 12]
        with torch.no_grad():
            torch.testing.assert_close(
                encoder.encode(chunks), torch.cat([encoder.encode([c]) for c in chunks]), atol=1e-5, rtol=1e-4
            )


def test_a_fresh_encoder_is_the_mean_of_the_models_bottom_blocks(tokenizer: Tokenizer) -> None:
    model = model_of("M,T", tokenizer.vocab_size, residual_scalars=True)
    encoder, ids = ChunkEncoder.of(model, 2), torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        mean = model.hidden(ids).mean(1)
        torch.testing.assert_close(encoder.encode(ids.tolist()), mean / mean.pow(2).mean(-1, keepdim=True).sqrt())


def test_cached_vectors_are_those_computed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    reader = reader_of("M,T", tokenizer)
    documents = [Document(str(i), f"{a} was born in Rome. {a} likes soup.", a) for i, a in enumerate(NAMES)]
    kb = KnowledgeBase.build(documents, tmp_path / "kb", retriever="simple")
    with torch.no_grad():
        prompts = [reader.prompt(conversation(0))]
        outside = [prompts[0].chunk_ids(i) for i in range(3)]
        fresh = VectorCache(tmp_path / "none", reader.encoder).vectors(outside)
        cache = build_cache(reader, kb)
        assert len(cache.keys) == 16 and reader.cache is cache
        talk = question_conversation("?", [{"title": d.title, "text": d.text} for d in documents[2:4]])
        inside = make_prompt(tokenizer, {**talk, "messages": [*talk["messages"], {"role": "assistant", "content": "x"}],
                                         "answers": []}, reader.k)  # fmt: skip
        rows = [inside.chunk_ids(i) for i in range(len(inside.chunks))]
        cache.table = np.zeros_like(cache.table) + np.float16(3)  # so that one sees what was looked up
        assert bool((cache.vectors(rows) == 3).all())
        reopened = VectorCache(cache.folder.parent, reader.encoder)
        computed = reader.encoder.encode(rows)
        assert torch.equal(reopened.vectors(rows), computed.half().float()) or torch.allclose(
            reopened.vectors(rows), computed, atol=2e-3
        )
        torch.testing.assert_close(reopened.vectors(outside), fresh, atol=1e-3, rtol=0)
        (cache.folder / "vectors.npy").write_bytes((cache.folder / "vectors.npy").read_bytes()[:-1])
        with pytest.raises(UserError, match=r"is damaged .*: remove the folder"):
            VectorCache(cache.folder.parent, reader.encoder)
        reader.encoder.mark.add_(1)
        assert len(VectorCache(cache.folder.parent, reader.encoder).keys) == 0, "another encoder, another folder"


# ---- the stages ----


def test_curriculum_is_the_papers_table_8() -> None:
    paper = """1333 445 148 49 16 6 2 1 0
               333 298 267 238 213 191 171 153 137
               83 102 126 156 193 238 293 362 447
               20 35 61 106 185 324 565 985 1719
               5 11 23 48 103 220 468 997 2125
               1 3 7 19 50 133 353 939 2496
               1 3 9 25 73 212 618 1802 5259
               1 3 9 25 73 212 618 1802 5259
               1 3 9 25 73 212 618 1802 5259"""
    expected = np.array([[int(n) for n in line.split()] for line in paper.splitlines()])
    assert np.abs(table() - expected).max() <= 0.51
    np.testing.assert_allclose(table().sum(1), TOTALS)
    assert expected[0, 0] == FIRST
    assert size_shares(0.0, 8).argmax() == 0 and size_shares(0.99, 8).argmax() == 3
    assert size_shares(0.5, 1).tolist() == [1.0]


def stream(tokenizer: Tokenizer) -> Stream:
    chunks = [tokenizer.encode(f"{a} was born in {b}.") for a in NAMES[:3] for b in TOWNS[:2]]
    return Stream(chunks, tokenizer.bos_id, tokenizer.encode_special("<|doc|>"))


def test_reconstruction_trains_the_encoder_and_not_the_decoder(tokenizer: Tokenizer) -> None:
    for pattern in PATTERNS:
        reader, rng = reader_of(pattern, tokenizer, k=16), np.random.default_rng(0)
        reader.model.train().requires_grad_(False)
        prompts = [stream(tokenizer).reconstruction(rng, 2)]
        loss, n = reconstruct(reader, prompts)
        loss.backward()
        assert n == sum(prompts[0].mask)
        assert all(p.grad is None for p in reader.model.parameters())
        for name in ("out.weight", "mark", "body.head.weight", "body.embed.weight", "body.blocks.0"):
            grads = [p.grad for key, p in reader.encoder.named_parameters() if key.startswith(name)]
            assert any(g is not None and g.abs().sum() > 0 for g in grads), (pattern, name)


def test_reconstruction_of_a_few_contexts_is_learnt(tokenizer: Tokenizer) -> None:
    torch.manual_seed(0)
    reader = reader_of("M,T", tokenizer, k=16)
    texts, rng = stream(tokenizer), np.random.default_rng(0)
    both = [*reader.encoder.parameters(), *reader.model.parameters()]  # the tiny decoder has learnt nothing yet
    optimizer, losses = torch.optim.AdamW(both, lr=5e-3), []
    for _ in range(80):
        prompts = [texts.reconstruction(rng, 1) for _ in range(8)]
        loss, n = reconstruct(reader, prompts)
        optimizer.zero_grad()
        (loss / n).backward()
        optimizer.step()
        losses.append(loss.item() / n)
    assert np.mean(losses[-5:]) < 0.15 * losses[0], losses[::10]
    shuffled = Stream(texts.chunks[::-1], texts.bos, texts.doc).reconstruction(rng, 1)
    other = texts.reconstruction(rng, 1)
    foreign = Prompt(other.ids[: other.n_prompt] + shuffled.ids[shuffled.n_prompt :], [0] * other.n_prompt +
                     [1] * (len(shuffled.ids) - shuffled.n_prompt), other.chunks)  # fmt: skip
    if foreign.chunk_ids(0) != shuffled.chunk_ids(0):  # what it says comes from the vector
        assert reconstruct(reader, [foreign])[0].item() > 5 * reconstruct(reader, [shuffled])[0].item()


def test_distillation_from_itself_over_all_tokens_is_plain_cross_entropy(tokenizer: Tokenizer) -> None:
    reader = reader_of("M,T", tokenizer)
    prompts = [reader.prompt(conversation(s)) for s in range(3)]
    whole = [range(len(p.chunks)) for p in prompts]
    plain, n = distil(reader, None, prompts, whole, 1.0)
    taught, m = distil(reader, reader.model, prompts, whole, 1.0)
    assert n == m == sum(sum(p.mask) for p in prompts)
    torch.testing.assert_close(taught, plain, atol=1e-3, rtol=1e-4)
    mixed, _ = distil(reader, reader.model, prompts, [[]] * 3, 1.0)
    assert mixed > distil(reader, reader.model, prompts, [[]] * 3, 0.0)[0]


# ---- a run ----

TINY = ["--device=cpu", "--dtype=float32", "--model_tag=t", "--source=sft", "--chunk_tokens=8", "--log_every=100",
        "--reconstruction_steps=2", "--continuation_steps=1", "--question_steps=2", "--supervise_steps=2",
        "--reinforce_steps=2", "--reconstruction_chunks=6", "--questions_per_step=2", "--policy_questions=2",
        "--num_samples=2", "--largest_chunks=2", "--expand=0.25", "--eval_questions=4", "--matrix_lr=0.01",
        "--embedding_lr=0.1", "--unembedding_lr=0.01", "--scalar_lr=0.01", "--ssm_lr=0.001"]  # fmt: skip


def config(*more: str) -> CompressConfig:
    return load_config(CompressConfig, [*TINY, *more])


def contexts(*_: Any) -> Contexts:
    texts = [(a, f"{a} was born in {b}. He likes soup.") for a in NAMES for b in TOWNS]
    return Contexts([conversation(s) for s in range(30)], [conversation(s) for s in range(90, 96)], texts, is_right)


@pytest.fixture
def trained(base: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(device, "peak_flops", lambda *_: 0.0)
    monkeypatch.setattr(train, "plot_metrics", lambda _: [])
    monkeypatch.setattr(evaluation, "plot", lambda *_: base / "none.png")
    for module in (train, judge):
        monkeypatch.setattr(module, "log_stage", lambda name, metrics, **more: None)
    tokenizer.save(base / "tokenizer")
    model = model_of("M,T", tokenizer.vocab_size)
    meta = {"model_config": dataclasses.asdict(model.config), "train_config": {"model_tag": "t"},
            "tokenizer_hash": tokenizer.hash}  # fmt: skip
    save_checkpoint(base / "sft_checkpoints" / "t", 1, model=model.state_dict(), optim=None, state={}, meta=meta)
    return base


def test_a_killed_run_goes_on_to_the_same_weights_and_all_loads(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compress_main(config("--eval_questions=0"), contexts)
    folder = trained / "refrag_checkpoints" / "t_compress"
    whole, _ = load_reader("t_compress", "cpu")
    rows = read_metrics(folder / "metrics.jsonl")
    assert [r["stage"] for r in rows] == [0, 0, 1, 2, 2, 3, 3, 4, 4]
    assert "policy_finds_best" in rows[5] and "reward" in rows[8]
    real = train.Trainer.loss
    for stop in (2, 4, 7):  # on the border of two stages, and within one
        (folder / "metrics.jsonl").unlink()
        for step in folder.glob("step_*"):
            for file in step.iterdir():
                file.unlink()
            step.rmdir()

        def killed(self: train.Trainer, stage: str, step: int, progress: float, stop: int = stop) -> Any:
            if step == stop:
                raise KeyboardInterrupt
            return real(self, stage, step, progress)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(train.Trainer, "loss", killed)
            compress_main(config("--eval_questions=0", "--save_every=1"), contexts)
        compress_main(config("--eval_questions=0", "--save_every=1", "--resume"), contexts)
        again, meta = load_reader("t_compress", "cpu")
        assert meta["step"] == 9
        for a, b in ((whole.model, again.model), (whole.encoder, again.encoder),
                     *((whole.policies[n], again.policies[n]) for n in whole.policies)):  # fmt: skip
            for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
                assert torch.equal(x, y), (stop, name)
    plain, _, _ = load_model("refrag", "cpu", "t_compress")
    assert torch.equal(plain.head.weight, whole.model.head.weight)


def test_evaluation_compares_all_policies_on_the_same_questions(trained: Path, capsys: Any) -> None:
    compress_main(config("--reconstruction_steps=0", "--continuation_steps=0", "--question_steps=1"), contexts)
    said = capsys.readouterr().out
    for name in ("none", "all", "random", "first", "bm25", "cosine", "oracle", "supervised", "rl"):
        assert f"\n| {name} " in said
    assert "rl is " in said
    cfg = load_config(CompressEvalConfig, ["-g=t_compress", "--device=cpu", "--dtype=float32", "-x=4", "--seed=45"])
    compress_eval_main(cfg, contexts)
    again = capsys.readouterr().out
    rows = [json.loads(line) for line in next((trained / "rag_eval").glob("*/compress.jsonl")).open()]
    assert {len(r["right"]) for r in rows} == {4} and len(rows) == 9
    assert [s for s in said.splitlines() if s.startswith("| ")] == [s for s in again.splitlines() if s.startswith("| ")]


def test_open_contexts_fills_them_and_keeps_validation_documents_apart(
    tokenizer: Tokenizer, tmp_path: Path, base: Path
) -> None:
    made = f"--output={tmp_path / 'w'}"
    prepare_rag_dataset.main(["--mode=world", made, "--world_size=nano", "--questions=40", "--kinds=1hop",
                              "--max_facts=2", "--val_share=0.5"])  # fmt: skip
    cfg = config(f"--knowledge_base={tmp_path / 'w'}", "--top_k=6", "--max_doc_length=256")
    data = open_contexts(cfg, tokenizer, 4000)
    texts = {text for _, text in data.texts}
    assert texts
    for i in range(len(data.val)):
        talk = data.val[i]
        documents = talk["messages"][0]["content"][1]["documents"]
        assert len(documents) == 6 and talk["gold"] and not texts & {d["text"] for d in documents}
        holding = [n for n, d in enumerate(documents, 1) if talk["answers"][0] in d["title"] + d["text"]]
        assert set(holding) <= set(talk["gold"])
    with pytest.raises(UserError, match="knowledge_base"):
        open_contexts(config(), tokenizer, 4000)


def test_what_cannot_work_is_refused() -> None:
    for flag, word in (("--num_samples=1", "at least 2"), ("--expand=1.5", "between 0 and 1"),
                       ("--chunk_tokens=1", "at least 2")):  # fmt: skip
        with pytest.raises(UserError, match=word):
            config(flag)


def test_a_shipped_config_file_serves_this_mode_too() -> None:
    cfg = load_config(CompressConfig, [str(REPO_DIR / "configs" / "refrag_hybrid_d20.py"), "--mode=compress"])
    assert cfg.retriever_type == "dense" and cfg.plan[0][0] == "reconstruction"


def test_bench_reads_fewer_places_and_keeps_less_state(base: Path, capsys: Any) -> None:
    bench_compress.main(["--depth=2", "--d_model=32", "--vocab_size=600", "--block_pattern=mamba,attn", "--lengths=512",
                         "--doc_length=128", "--repeats=1", "--device=cpu", "--dtype=float32"])  # fmt: skip
    rows = {r["variant"]: r for r in json.loads((base / "bench" / "compress.json").read_text())["rows"]}
    assert set(rows) == set(bench_compress.VARIANTS) and (base / "bench" / "compress.png").stat().st_size > 0
    whole, cached = rows["tokens"], rows["cached"]
    assert cached["places"] == rows["encoded"]["places"] == rows["all in"]["places"] < 0.5 * whole["places"]
    assert cached["state_bytes"] < whole["state_bytes"] and whole["times_faster"] == 1
