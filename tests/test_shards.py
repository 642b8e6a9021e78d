"""Shards and loader at their boundaries: kill, damage, epoch ends, ranks, tiny corpora."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
import torch

from skylar.data import shards
from skylar.data.shards import (
    PackedLoader,
    ShardDataset,
    permute,
    token_dtype,
    verify_shards,
    write_shards,
)


class Bytes:
    """The smallest tokenizer: a token is a byte; two more begin and end a document."""

    vocab_size, bos_id, eos_id = 258, 256, 257
    fingerprint = hashlib.sha256(b"bytes").hexdigest()

    def encode_batch(self, texts):
        return [list(text.encode()) for text in texts]


def corpus(n=40, seed=0):
    """Documents of many lengths, among them an empty one and a one-letter one."""
    rng = np.random.default_rng(seed)
    texts = ["".join(rng.choice(list("abcdé \n"), size=rng.integers(2, 90))) for _ in range(n)]
    texts[3], texts[7] = "", "x"
    return texts


def write(texts, out, **kwargs):
    return write_shards(texts, Bytes(), out, progress=False, **kwargs)


def stream(texts):
    """What the shards must hold, by the definition."""
    return [t for text in texts for t in (256, *text.encode(), 257)]


@pytest.fixture
def dataset(tmp_path):
    write(corpus(), tmp_path / "d", shard_bytes=700)
    return ShardDataset(tmp_path / "d")


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


# --- writing ----------------------------------------------------------------------------


def test_shards_hold_exactly_the_documents(tmp_path):
    texts = corpus()
    manifest = write(texts, tmp_path, shard_bytes=700)
    data, expected = ShardDataset(tmp_path), stream(texts)
    assert len(manifest["shards"]) > 3 and manifest["dtype"] == "uint16"
    assert data[:].tolist() == expected and data.n_tokens == len(data) == len(expected)
    assert data.n_documents == len(texts) == manifest["n_documents"]
    assert manifest["text_bytes"] == sum(len(t.encode()) for t in texts)
    assert all(s["tokens"] * 2 <= 700 for s in manifest["shards"])
    rng = np.random.default_rng(0)
    for i, j in rng.integers(0, len(expected), (50, 2)):
        assert data[i:j].tolist() == expected[i:j] and data[i:j].dtype == np.int64


def test_sizes_follow_the_vocabulary():
    assert [token_dtype(n) for n in (65_536, 65_537)] == ["uint16", "uint32"]


def test_a_big_vocabulary_uses_uint32(tmp_path):
    class Big(Bytes):
        vocab_size = 70_000

        def encode_batch(self, texts):
            return [[69_999] * len(t) for t in texts]

    write_shards(["ab", "c"], Big(), tmp_path, progress=False)
    assert ShardDataset(tmp_path)[:].tolist() == [256, 69_999, 69_999, 257, 256, 69_999, 257]


def test_empty_documents_are_kept(tmp_path):
    write(["", "", "a"], tmp_path)
    assert ShardDataset(tmp_path)[:].tolist() == [256, 257, 256, 257, 256, 97, 257]


def test_a_document_longer_than_a_shard_gets_its_own(tmp_path):
    manifest = write(["ab", "x" * 500, "cd"], tmp_path, shard_bytes=64)
    assert [s["tokens"] for s in manifest["shards"]] == [4, 502, 4]
    assert ShardDataset(tmp_path)[:].tolist() == stream(["ab", "x" * 500, "cd"])


def test_shards_do_not_depend_on_batches_or_workers(tmp_path, monkeypatch):
    write(corpus(), tmp_path / "a", shard_bytes=700)
    monkeypatch.setattr(shards._batched, "__defaults__", (13,))
    write(corpus(), tmp_path / "b", shard_bytes=700, workers=5)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_no_documents_and_bad_sizes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no documents"):
        write([], tmp_path)
    with pytest.raises(ValueError, match="shard_bytes=1"):
        write(["a"], tmp_path, shard_bytes=1)


def test_the_real_tokenizer_round_trips(tmp_path):
    from skylar.data.tokenizer import BPETokenizer

    texts = ["To be, or not to be \U0001f642", "", "<eos> is only text here"]
    tokenizer = BPETokenizer.train(texts * 5, 290)
    write_shards(texts, tokenizer, tmp_path, progress=False)
    ids = ShardDataset(tmp_path, tokenizer)[:].tolist()
    ends = [i for i, t in enumerate(ids) if t == tokenizer.eos_id]
    begins = [0] + [e + 1 for e in ends[:-1]]
    assert [tokenizer.decode(ids[b + 1 : e]) for b, e in zip(begins, ends)] == texts


# --- killed, resumed, refused -----------------------------------------------------------


SLOW_WRITER = """
import sys, time
sys.path.insert(0, {tests!r})
from test_shards import Bytes, corpus
from skylar.data import shards
shards._batched.__defaults__ = (50,)

class Slow(Bytes):
    def encode_batch(self, texts):
        time.sleep(0.02)
        return super().encode_batch(texts)

shards.write_shards(corpus(400), Slow(), {out!r}, shard_bytes=700, progress=False)
"""


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(tmp_path):
    tests, out = os.path.dirname(__file__), tmp_path / "killed"
    code = SLOW_WRITER.format(tests=tests, out=str(out))
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    deadline = time.monotonic() + 60
    while not (out / "shard-00003.bin").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "manifest.json").exists()
    with pytest.raises(FileNotFoundError, match="run the same command again"):
        ShardDataset(out)
    before = (out / "shard-00001.bin").stat().st_mtime_ns
    write(corpus(400), out, shard_bytes=700)
    assert (out / "shard-00001.bin").stat().st_mtime_ns == before  # not written again
    write(corpus(400), tmp_path / "whole", shard_bytes=700)
    assert files(out) == files(tmp_path / "whole")


def test_a_failing_document_leaves_finished_shards_only(tmp_path):
    def broken():
        yield from corpus(400)
        raise OSError("disk on fire")

    with pytest.raises(OSError, match="on fire"):
        write(broken(), tmp_path, shard_bytes=700)
    assert not list(tmp_path.glob("*.part")) and not (tmp_path / "manifest.json").exists()
    write(corpus(400), tmp_path, shard_bytes=700)
    assert verify_shards(tmp_path)["n_documents"] == 400


def test_writing_again_changes_nothing(tmp_path):
    manifest = write(corpus(), tmp_path)
    before = files(tmp_path)
    assert write(corpus(), tmp_path) == manifest and files(tmp_path) == before


@pytest.mark.parametrize("texts, message", [
    (["other"] + corpus()[1:], "other documents"),
    (corpus()[:-1], "other documents"),
    (corpus() + ["more"], "more than it holds"),
])
def test_a_folder_of_other_documents_is_refused(tmp_path, texts, message):
    write(corpus(), tmp_path)
    before = files(tmp_path)
    with pytest.raises(ValueError, match=message):
        write(texts, tmp_path)
    assert files(tmp_path) == before


def test_a_folder_of_other_settings_is_refused(tmp_path):
    write(corpus(), tmp_path)
    with pytest.raises(ValueError, match="shard_bytes"):
        write(corpus(), tmp_path, shard_bytes=64)


# --- verifying --------------------------------------------------------------------------


def test_verify_counts(dataset):
    totals = verify_shards(dataset.folder)
    assert totals["n_tokens"] == dataset.n_tokens and totals["n_documents"] == 40


def test_verify_names_shard_and_offset_of_one_flipped_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "BLOCK", 100)
    write(corpus(), tmp_path, shard_bytes=700)
    path = tmp_path / "shard-00002.bin"
    data = bytearray(path.read_bytes())
    data[345] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"shard-00002\.bin .*between byte 300 and byte 400"):
        verify_shards(tmp_path)


@pytest.mark.parametrize("name, damage, message", [
    ("shard-00001.bin", lambda d: d[:-5], r"shard-00001\.bin is cut short: it ends at byte"),
    ("shard-00001.bin", lambda d: d + b"!", r"shard-00001\.bin is too long"),
    ("shard-00001.bin", None, r"shard-00001\.bin is missing"),
    ("shard-00000.idx", lambda d: d[:-1] + b"!", r"shard-00000\.idx is damaged"),
    ("shard-00000.sha256", lambda d: b"0" + d[1:], r"shard-00000\.sha256 is damaged"),
    ("manifest.json", lambda d: d[:50], r"manifest\.json is damaged"),
    ("manifest.json", lambda d: b"{}", r"unknown format"),
])
def test_verify_says_what_is_wrong(dataset, name, damage, message):
    path = dataset.folder / name
    data = path.read_bytes()
    path.write_bytes(damage(data)) if damage else path.unlink()
    with pytest.raises(ValueError, match=message):
        verify_shards(dataset.folder)


def test_opening_refuses_what_would_crash_later(dataset, tmp_path):
    path = dataset.folder / "shard-00001.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match="cut short"):
        ShardDataset(dataset.folder)
    with pytest.raises(FileNotFoundError, match="not a folder of shards"):
        ShardDataset(tmp_path)


def test_another_tokenizer_is_refused(dataset):
    other = Bytes()
    other.fingerprint = "0" * 64
    with pytest.raises(ValueError, match="another tokenizer"):
        ShardDataset(dataset.folder, other)
    ShardDataset(dataset.folder, Bytes())


# --- the permutation --------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 16, 17, 100, 1023, 1025, 5000])
def test_permute_is_a_permutation(n):
    for epoch in range(3):
        assert sorted(permute(np.arange(n), n, 1, epoch).tolist()) == list(range(n))


def test_permute_differs_by_seed_and_epoch_and_needs_no_table():
    i = np.arange(1000)
    a, b, c = permute(i, 1000, 0), permute(i, 1000, 1), permute(i, 1000, 0, 1)
    assert (a != b).mean() > 0.99 and (a != c).mean() > 0.99
    assert (a == permute(i, 1000, 0)).all()
    huge = permute(np.array([0, 1, 10**15]), 10**15 + 1, 0)
    assert ((0 <= huge) & (huge <= 10**15)).all() and len(set(huge.tolist())) == 3


# --- batches ----------------------------------------------------------------------------


def reference(tokens, start, T):
    """One window by the definition, token by token, of (token, document) pairs."""
    ids, labels, documents, positions = [], [], [], []
    for at in range(start, start + T):
        token, doc = tokens[at]
        same = at + 1 < len(tokens) and tokens[at + 1][1] == doc
        labels.append(tokens[at + 1][0] if same else -100)
        new = at == start or tokens[at - 1][1] != doc
        positions.append(0 if new else positions[-1] + 1)
        ids.append(token)
        documents.append(doc)
    return ids, labels, documents, positions


@pytest.mark.parametrize("T", [1, 2, 3, 16, 50, 333])
def test_every_window_is_as_defined(dataset, T):
    tokens = [(t, d) for d, text in enumerate(corpus()) for t in (256, *text.encode(), 257)]
    loader = PackedLoader(dataset, batch_size=1, seq_len=T, shuffle=False, prefetch=0)
    for window, batch in zip(range(loader.n_windows), loader):
        expected = reference(tokens, window * T, T)
        keys = ("input_ids", "labels", "document_ids", "position_ids")
        for key, row in zip(keys, expected):
            assert batch[key].shape == (1, T) and batch[key].dtype == torch.int64
            assert batch[key][0].tolist() == row, (window, key)


def test_a_corpus_that_ends_with_its_last_window(tmp_path):
    write(["abcd", "ef"], tmp_path)  # 6 + 4 tokens
    loader = PackedLoader(ShardDataset(tmp_path), batch_size=2, seq_len=5, shuffle=False)
    batch = next(iter(loader))
    assert batch["input_ids"].tolist() == [[256, 97, 98, 99, 100], [257, 256, 101, 102, 257]]
    assert batch["labels"].tolist() == [[97, 98, 99, 100, 257], [-100, 101, 102, 257, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 0, 1, 2, 3]]


def test_a_corpus_of_one_window(tmp_path):
    write(["abc"], tmp_path)
    loader = PackedLoader(ShardDataset(tmp_path), batch_size=3, seq_len=5)
    batch = next(iter(loader))
    assert loader.n_windows == len(loader) == 1
    assert batch["input_ids"].tolist() == [[256, 97, 98, 99, 257]] * 3


def test_a_corpus_shorter_than_a_window_is_refused(tmp_path):
    write(["abc"], tmp_path)
    with pytest.raises(ValueError, match="5 tokens, fewer than one window of seq_len=6"):
        PackedLoader(ShardDataset(tmp_path), batch_size=1, seq_len=6)


@pytest.mark.parametrize("wrong", [dict(batch_size=0), dict(seq_len=0), dict(rank=2)])
def test_impossible_settings_are_refused(dataset, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PackedLoader(dataset, **{"batch_size": 1, "seq_len": 8, "world_size": 2, **wrong})


# --- order, ranks, resuming -------------------------------------------------------------


def take(loader, n):
    """n batches as a list of rows (each row one window's tokens, as a tuple)."""
    it, rows = iter(loader), []
    for _ in range(n):
        rows.append([tuple(r) for r in next(it)["input_ids"].tolist()])
    it.close()
    return rows


def make(dataset, **kwargs):
    return PackedLoader(dataset, **{"batch_size": 3, "seq_len": 16, "seed": 5, **kwargs})


def flat(rows):
    return [row for batch in rows for row in batch]


def test_an_epoch_sees_every_window_once_in_a_new_order(dataset):
    loader = make(dataset, batch_size=1)
    n = loader.n_windows
    rows = flat(take(loader, 2 * n))
    plain = flat(take(make(dataset, batch_size=1, shuffle=False), n))
    assert sorted(rows[:n]) == sorted(rows[n:]) == sorted(plain)
    assert rows[:n] != rows[n:] and rows[:n] != plain


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_are_disjoint_and_cover_the_epoch_also_when_sizes_do_not_divide(
        dataset, world_size):
    one = make(dataset, batch_size=2 * world_size)
    ranks = [make(dataset, batch_size=2, rank=r, world_size=world_size)
             for r in range(world_size)]
    steps = 3 * len(one)  # across two epoch ends
    assert one.n_windows % (2 * world_size)  # the sizes do not divide
    whole, parts = take(one, steps), [take(loader, steps) for loader in ranks]
    assert whole == [[row for p in parts for row in p[s]] for s in range(steps)]
    assert {loader.position for loader in ranks} == {one.position}
    assert sorted(set(flat(whole[: len(one)]))) == sorted(set(flat(take(
        make(dataset, batch_size=1, shuffle=False), one.n_windows))))


@pytest.mark.parametrize("prefetch", [0, 1, 4])
@pytest.mark.parametrize("when", ["start", "mid-epoch", "epoch boundary", "second epoch"])
def test_resume_is_exact(dataset, when, prefetch):
    one = make(dataset, batch_size=1)
    steps = {"start": 0, "mid-epoch": 7, "epoch boundary": one.n_windows,
             "second epoch": one.n_windows + 9}[when]
    first = make(dataset, batch_size=1, prefetch=prefetch)
    take(first, steps)
    state = json.loads(json.dumps(first.state_dict()))
    assert state["position"] == steps and first.epoch == steps // one.n_windows
    second = make(dataset, batch_size=1, prefetch=prefetch)
    second.load_state_dict(state)
    expected = take(one, steps + 2 * one.n_windows)[steps:]
    assert take(second, 2 * one.n_windows) == expected
    assert take(first, 2 * one.n_windows) == expected  # and going on is the same


def test_state_counts_batches_handed_out_not_batches_prepared(dataset):
    loader = make(dataset, prefetch=8)
    it = iter(loader)
    next(it)
    time.sleep(0.2)  # the thread is far ahead now
    assert loader.state_dict()["position"] == 3


def test_resume_with_another_number_of_ranks_goes_on_with_the_next_window(dataset):
    expected = flat(take(make(dataset, batch_size=1), 200))
    two = [make(dataset, rank=r, world_size=2) for r in range(2)]
    seen = [take(loader, 5) for loader in two]
    order = [row for s in range(5) for r in range(2) for row in seen[r][s]]
    four = [make(dataset, batch_size=2, rank=r, world_size=4) for r in range(4)]
    for loader in four:
        loader.load_state_dict(two[1].state_dict())
    seen = [take(loader, 6) for loader in four]
    order += [row for s in range(6) for r in range(4) for row in seen[r][s]]
    assert order == expected[: len(order)]


def test_load_state_moves_an_iterator_that_is_running(dataset):
    loader = make(dataset)
    it = iter(loader)
    first = next(it)
    state = loader.state_dict()
    second = next(it)
    loader.load_state_dict(state)
    assert torch.equal(next(it)["input_ids"], second["input_ids"])
    assert not torch.equal(first["input_ids"], second["input_ids"])


@pytest.mark.parametrize("change", [dict(seed=6), dict(seq_len=8), dict(shuffle=False)])
def test_a_state_of_other_settings_is_refused(dataset, change):
    with pytest.raises(ValueError, match=next(iter(change))):
        make(dataset, **change).load_state_dict(make(dataset).state_dict())


def test_threads_end_with_their_iterator(dataset):
    def running():
        return [t for t in threading.enumerate() if t.name.startswith("prefetch")]

    it = iter(make(dataset))
    next(it)
    assert running()
    it.close()
    assert not running()
    for _ in make(dataset):
        break
    assert not running()


def test_an_error_in_the_thread_reaches_the_reader(dataset, monkeypatch):
    def broken(self, position):
        raise OSError("the disk is gone")

    monkeypatch.setattr(PackedLoader, "_batch", broken)
    with pytest.raises(OSError, match="the disk is gone"):
        next(iter(make(dataset)))


def test_the_interpreter_ends_quietly_with_an_open_iterator(dataset):
    code = (f"from skylar.data.shards import *\n"
            f"it = iter(PackedLoader(ShardDataset({str(dataset.folder)!r}), batch_size=2, "
            f"seq_len=8))\nnext(it)\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_full_disk_is_named_and_leaves_nothing_half_written(tmp_path):
    pytest.importorskip("resource")  # a limit on file sizes plays the full disk
    code = (f"import sys, resource; sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
            f"from test_shards import *\n"
            f"resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
            f"try:\n    write(['x' * 500] * 400, {str(tmp_path / 'd')!r})\n"
            f"except OSError as error:\n    print(error)\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "cannot write" in done.stdout and "run the same command again" in done.stdout
    assert not done.stderr and not list((tmp_path / "d").iterdir())
