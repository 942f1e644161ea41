"""The loader: every document once, exact resume, equal over ranks and threads, broken shards stop the run."""

import gc
import json
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nanochat.config import UserError
from nanochat.dataloader import PackedLoader, document_index, val_windows
from nanochat.textstream import Position, TextStream
from nanochat.tokenizer import Tokenizer

BOS = 256


class ByteTokenizer:
    """Ids are the bytes of the text; enough of nanochat.tokenizer.Tokenizer for a loader."""

    bos_id = BOS
    vocab_size = 257

    def __init__(self, hash="bytes"):
        self.hash = hash

    def encode_array(self, texts, threads=1):
        data = [t.encode() for t in texts]
        offsets = np.cumsum([0, *map(len, data)], dtype=np.int64)
        return np.frombuffer(b"".join(data), np.uint8).astype(np.uint16), offsets


def texts_of(seed, n, longest=900):
    """Documents of numbered words: no two windows of 20 bytes are alike."""
    rng = np.random.default_rng(seed)
    return [" ".join(f"{seed}.{i}.{j}" for j in range(200))[: int(rng.integers(1, longest))] for i in range(n)]


def write_shards(folder, n_shards=3, n_documents=40, row_group_size=8):
    paths = []
    for s in range(n_shards):
        paths.append(folder / f"shard_{s:05d}.parquet")
        pq.write_table(pa.table({"text": texts_of(s, n_documents)}), paths[-1], row_group_size=row_group_size)
    return paths


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


def all_texts(shards):
    return [t for path in shards for t in pq.read_table(path)["text"].to_pylist()]


def loader(shards, B=4, T=64, **options):
    options = {"buffer_tokens": 8192, "prefetch": 0} | options
    return PackedLoader(shards, options.pop("tokenizer", ByteTokenizer()), B, T, **options)


def same(a, b):
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("x", "y", "doc")) and a.tokens == b.tokens


def read_epoch(stream):
    """Bytes of each document of the epoch the stream is in."""
    found = []
    while True:
        found += [bytes(ids.tolist()) for ids in stream.read()]
        if stream.at_end:
            return found


def test_batches_have_the_promised_shapes_and_types(shards):
    batch = next(loader(shards))
    assert batch.x.shape == batch.y.shape == batch.doc.shape == (4, 64)
    assert (batch.x.dtype, batch.y.dtype, batch.doc.dtype) == (torch.int64, torch.int64, torch.int32)
    assert (batch.x[:, 0] == BOS).all()
    assert batch.tokens == int((batch.y != -1).sum())
    inner = batch.doc[:, 1:] == batch.doc[:, :-1]
    shifted = batch.y[:, :-1] == batch.x[:, 1:]
    assert torch.equal(shifted, inner & (batch.y[:, :-1] != -1)), "y is the next token of the same document"
    assert (batch.y[:, :-1][~inner] == -1).all()


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("chunk_chars", [50, 2**20])
def test_every_epoch_has_every_document_once_over_all_ranks(shards, world_size, chunk_chars, monkeypatch):
    monkeypatch.setattr("nanochat.textstream.CHUNK_CHARS", chunk_chars)
    everything = [t.encode() for t in all_texts(shards)]
    streams = [TextStream(shards, ByteTokenizer(), r, world_size) for r in range(world_size)]
    epochs = [[read_epoch(s) for s in streams] for _ in range(3)]
    for ranks in epochs:
        assert sorted(d for rank in ranks for d in rank) == sorted(everything)
    for rank, documents in enumerate(epochs[0]):
        assert documents == everything[rank::world_size], "the first epoch keeps the order of the files"
    assert epochs[1] != epochs[0] and epochs[2] != epochs[1]


def test_targets_and_queue_together_are_the_text_read_so_far(shards):
    batches, stream = loader(shards), TextStream(shards, ByteTokenizer())
    seen, read, checked = np.zeros(256, np.int64), np.zeros(256, np.int64), 0
    for _ in range(500):
        batch = next(batches)
        seen += np.bincount(batch.y[batch.y >= 0], minlength=256)
        cursor = batch.cursor()
        while stream.position != Position(**cursor["position"]):
            read += np.bincount(np.concatenate(stream.read()), minlength=256)
        if cursor["skip_rows"] == 0:  # otherwise the queue is as it was that many rows before
            np.testing.assert_array_equal(seen + np.bincount(cursor["queue"]["ids"], minlength=256), read)
            checked += 1
    assert batch.epoch >= 2 and checked > 100


@pytest.mark.parametrize("options", [{"prefetch": 0}, {"prefetch": 3}, {"rank": 1, "world_size": 2}])
def test_resume_continues_bit_for_bit_from_any_batch(shards, options, monkeypatch):
    monkeypatch.setattr("nanochat.textstream.CHUNK_CHARS", 1500)  # so that it also stops within a row group
    n, rng = 400, np.random.default_rng(0)
    with loader(shards, **options) as batches:
        whole = [next(batches) for _ in range(n)]
    cursors = [b.cursor() for b in whole]
    assert whole[-1].epoch >= 1 and len({c["skip_rows"] for c in cursors}) > 3
    assert any(c["position"]["row"] for c in cursors)
    for at in [0, 1, *rng.integers(2, n - 6, 20).tolist()]:
        with loader(shards, cursor=cursors[at], **options) as batches:
            for expected in whole[at + 1 : at + 6]:
                assert same(next(batches), expected), f"after batch {at}"


def test_resume_from_a_resumed_loader_continues_too(shards):
    whole = loader(shards)
    expected = [next(whole) for _ in range(12)]
    cursor = None
    for batch in expected:
        resumed = next(loader(shards, cursor=cursor))
        assert same(resumed, batch)
        cursor = resumed.cursor()


def test_a_cursor_survives_json_and_tensors(shards):
    batches = loader(shards)
    for _ in range(7):
        cursor = next(batches).cursor()
    following = next(batches)
    arrays = {k: torch.from_numpy(v) for k, v in cursor["queue"].items()}
    rest = json.loads(json.dumps({k: v for k, v in cursor.items() if k != "queue"}))
    assert same(next(loader(shards, cursor={**rest, "queue": arrays})), following)
    lists = json.loads(json.dumps({**rest, "queue": {k: v.tolist() for k, v in cursor["queue"].items()}}))
    assert same(next(loader(shards, cursor=lists)), following)


def test_rows_do_not_depend_on_batch_size_prefetch_or_when_it_was_resumed(shards):
    four, eight = loader(shards, B=4), loader(shards, B=8, prefetch=2)
    for _ in range(10):
        halves, whole = [next(four), next(four)], next(eight)
        assert torch.equal(torch.cat([h.x for h in halves]), whole.x)
    eight.close()
    resumed = loader(shards, B=2, cursor=whole.cursor())
    assert torch.equal(torch.cat([next(resumed).x, next(resumed).x]), next(four).x)


def test_the_queue_of_a_small_data_set_holds_no_document_several_times(shards):
    total = sum(map(len, all_texts(shards)))
    batches = loader(shards, buffer_tokens=100 * total)
    for _ in range(100):
        batch = next(batches)
        cursor = batch.cursor()
        assert len(cursor["queue"]["ids"]) < 1.4 * total


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"T": 32}, "T was 64 and is 32; set max_seq_len"),
        ({"tokenizer": ByteTokenizer("other")}, "tokenizer was 'bytes' and is 'other'"),
        ({"world_size": 2}, "world_size was 1 and is 2; start as many processes"),
        ({"buffer_tokens": 4096}, "buffer_tokens was 8192"),
    ],
)
def test_a_cursor_of_another_run_is_refused(shards, change, message):
    cursor = next(loader(shards)).cursor()
    with pytest.raises(UserError, match=message):
        loader(shards, cursor=cursor, **change)


def test_a_cursor_is_refused_where_the_shards_changed(shards):
    cursor = next(loader(shards)).cursor()
    with pytest.raises(UserError, match=r"shards was '3 shards.*is '2 shards.*bring back"):
        loader(shards[:2], cursor=cursor)


def test_a_rank_without_documents_stops_instead_of_spinning(tmp_path):
    shards = write_shards(tmp_path, n_shards=1, n_documents=2)
    with pytest.raises(UserError, match=r"rank 3 of 4 got no text.*2 documents; use fewer processes"):
        next(loader(shards, rank=3, world_size=4))


def test_no_shards_and_impossible_sizes_are_refused(shards):
    with pytest.raises(UserError, match="no text shards"):
        loader([])
    with pytest.raises(UserError, match="device_batch_size=0"):
        loader(shards, B=0)
    with pytest.raises(UserError, match="T=0"):
        loader(shards, T=0)


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_truncated_shard_stops_the_run_naming_the_file(tmp_path, keep, prefetch):
    shards = write_shards(tmp_path)
    data = shards[1].read_bytes()
    shards[1].write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(UserError, match=r"shard_00001.parquet"), loader(shards, prefetch=prefetch) as batches:
        for _ in range(200):
            next(batches)


def test_a_corrupt_shard_stops_the_run_naming_the_file(tmp_path):
    shards = write_shards(tmp_path)
    data = bytearray(shards[1].read_bytes())
    data[40:400] = b"\xff" * 360
    shards[1].write_bytes(data)
    with pytest.raises(UserError, match=r"shard_00001.parquet"), loader(shards) as batches:
        for _ in range(200):
            next(batches)


def test_an_error_in_the_thread_is_raised_every_time_it_is_asked(tmp_path):
    shards = write_shards(tmp_path, n_shards=1)
    shards[0].write_bytes(b"nothing")
    batches = loader(shards, prefetch=2)
    for _ in range(3):
        with pytest.raises(UserError, match=r"shard_00000.parquet"):
            next(batches)


def alive(before):
    """Whether a thread started since `before` still runs (waiting for it a while)."""
    for _ in range(200):
        if not set(threading.enumerate()) - before:
            return False
        time.sleep(0.05)
    return True


def test_the_thread_ends_when_the_loader_is_closed_or_dropped(shards):
    before = set(threading.enumerate())
    batches = loader(shards, prefetch=2)
    next(batches)
    batches.close()
    assert not alive(before)
    assert list(batches) == []
    batches = loader(shards, prefetch=2)
    next(batches)
    del batches
    gc.collect()
    assert not alive(before)


def test_stream_windows_are_the_joined_text_from_end_to_end(shards):
    T, text = 50, [i for t in all_texts(shards[:1]) for i in (BOS, *t.encode())]
    x, y = val_windows(shards[:1], ByteTokenizer(), T, n_tokens=(len(text) - 1) // T * T)
    np.testing.assert_array_equal(x.flatten(), text[: x.numel()])
    expected = np.array(text[1 : x.numel() + 1])
    np.testing.assert_array_equal(y.flatten(), np.where(expected == BOS, -1, expected))


def test_fewer_windows_are_spread_over_the_whole_text(shards):
    every, _ = val_windows(shards[:1], ByteTokenizer(), 50, n_tokens=50 * 300)
    some, _ = val_windows(shards[:1], ByteTokenizer(), 50, n_tokens=50 * 10)
    assert some.shape == (10, 50)
    at = [next(i for i, w in enumerate(every) if torch.equal(w, s)) for s in some]
    gaps = np.diff([*at, len(every)])
    assert at[0] == 0 and gaps.max() - gaps.min() <= 1


def test_head_windows_are_beginnings_of_documents_that_are_long_enough(shards):
    T = 300
    heads = {bytes(t.encode()[:T]) for t in all_texts(shards[:1]) if len(t) >= T}
    x, y = val_windows(shards[:1], ByteTokenizer(), T, n_tokens=T * 5, kind="head")
    assert x.shape == (5, T) and (x[:, 0] == BOS).all() and (y >= 0).all()
    assert {bytes(row.tolist()) for row in y} <= heads
    assert torch.equal(x[:, 1:], y[:, :-1])


def test_too_few_windows_are_announced_and_none_is_an_error(shards, capsys):
    val_windows(shards[:1], ByteTokenizer(), 64, n_tokens=10**9)
    assert "were asked for" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"no validation window.*set a shorter max_seq_len"):
        val_windows(shards[:1], ByteTokenizer(), 5000, n_tokens=5000, kind="head")


def test_document_index_counts_the_starts_after_the_first_column():
    x = torch.tensor([[5, 6, BOS, 7], [BOS, 5, BOS, BOS]])
    assert document_index(x, BOS).tolist() == [[0, 0, 1, 1], [0, 0, 1, 2]]


@pytest.mark.data
@pytest.mark.parametrize("T", [512, 2048])
def test_real_text_is_packed_with_less_than_one_percent_without_a_target(T, data):
    shards = sorted((data / "text").glob("*.parquet"))[:2]
    batches = loader(shards, B=8, T=T, buffer_tokens=2**19)
    found = [next(batches) for _ in range(2**20 // (8 * T))]
    assert sum(b.tokens for b in found) / sum(b.y.numel() for b in found) > 0.99


def test_the_real_tokenizer_feeds_the_loader_and_the_text_comes_back(shards):
    tokenizer = Tokenizer.train(all_texts(shards), 400)
    documents = set()
    with PackedLoader(shards, tokenizer, 4, 2048, buffer_tokens=8192, rank=1, world_size=2) as batches:
        for _ in range(6):
            batch = next(batches)
            for y, doc in zip(batch.y, batch.doc, strict=True):
                documents |= {tokenizer.decode(y[(doc == k) & (y >= 0)]) for k in doc.unique()}
    whole = set(all_texts(shards)[1::2])
    assert len(documents & whole) > 30
    assert all(any(d in t for t in whole) for d in documents)


@pytest.mark.gpu
def test_batches_on_a_gpu_are_those_of_the_cpu(shards):
    with loader(shards, device="cuda", prefetch=2) as there:
        for here, batch in zip(loader(shards), there, strict=False):
            assert batch.x.is_cuda and batch.y.is_cuda and batch.doc.is_cuda
            assert torch.equal(batch.x.cpu(), here.x) and torch.equal(batch.y.cpu(), here.y)
            if here.epoch:
                break
