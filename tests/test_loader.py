"""The loader at its boundaries: epoch ends, ranks, resuming, evaluation, tiny corpora."""

import json
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from byte_corpus import corpus, stream, write

from skylar.data.loader import PackedLoader, draw_offsets, permute
from skylar.data.shards import ShardDataset


@pytest.fixture
def dataset(tmp_path):
    write(corpus(), tmp_path / "d", shard_bytes=700)
    return ShardDataset(tmp_path / "d")


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
    for window, batch in zip(range((len(tokens) - 1) // T), loader):
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


@pytest.mark.parametrize("wrong", [dict(batch_size=0), dict(seq_len=0), dict(rank=2),
                                   dict(rank=-1), dict(prefetch=-1), dict(batch_size=1.5)])
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
    assert {loader.sample_index for loader in ranks} == {one.sample_index}
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
    assert state["sample_index"] == steps and first.epoch == steps // one.n_windows
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
    assert loader.state_dict()["sample_index"] == 3


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
    code = (f"from skylar.data.loader import PackedLoader\n"
            f"from skylar.data.shards import ShardDataset\n"
            f"it = iter(PackedLoader(ShardDataset({str(dataset.folder)!r}), batch_size=2, "
            f"seq_len=8))\nnext(it)\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# --- other data ---------------------------------------------------------------------------


@pytest.mark.parametrize("change", [
    lambda texts: texts[1:] + texts[:1],
    lambda texts: [*texts[:7], "y", *texts[8:]],  # was "x"
])
def test_a_state_of_other_data_of_equal_size_is_refused(dataset, tmp_path, change):
    write(change(corpus()), tmp_path / "other")
    other = ShardDataset(tmp_path / "other")
    assert other.n_tokens == dataset.n_tokens
    loader = make(other)
    with pytest.raises(ValueError, match="saved loader has data="):
        loader.load_state_dict(make(dataset).state_dict())
    assert loader.sample_index == 0


def test_a_state_survives_the_data_s_being_cut_into_other_shards(dataset, tmp_path):
    write(corpus(), tmp_path / "other", shard_bytes=300)
    again, loader = make(ShardDataset(tmp_path / "other")), make(dataset)
    take(loader, 5)
    again.load_state_dict(loader.state_dict())
    assert take(again, 20) == take(loader, 20)


@pytest.mark.parametrize("index", [None, -1, 1.5, "7", True])
def test_a_state_without_a_sample_index_is_refused(dataset, index):
    state = make(dataset).state_dict() | {"sample_index": index}
    with pytest.raises(ValueError, match="sample_index"):
        make(dataset).load_state_dict(state)


def test_a_loader_of_ids_in_memory_resumes_and_knows_its_data():
    ids = np.random.default_rng(0).integers(0, 50, 500)
    loader = make(ShardDataset.from_ids(ids))
    take(loader, 3)
    again = make(ShardDataset.from_ids(ids.astype(np.uint16)))
    again.load_state_dict(loader.state_dict())
    assert take(again, 20) == take(loader, 20)
    with pytest.raises(ValueError, match="data="):
        make(ShardDataset.from_ids(ids[::-1])).load_state_dict(loader.state_dict())


# --- evaluation: one pass, in order ---------------------------------------------------------


def one_pass(dataset, **kwargs):
    loader = PackedLoader(dataset, shuffle=False, **kwargs)
    it = iter(loader)
    batches = [next(it) for _ in range(len(loader))]
    it.close()
    return loader, batches


def labels(batches):
    return [x for b in batches for x in b["labels"].flatten().tolist() if x != -100]


@pytest.mark.parametrize("seq_len", [1, 2, 7, 16, 50, 1000, 5000])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 7, 16, 4000])
def test_a_pass_holds_every_target_once_whatever_the_batch_size(dataset, batch_size, seq_len):
    tokens = stream(corpus())
    loader, batches = one_pass(dataset, batch_size=batch_size, seq_len=seq_len)
    assert labels(batches) == [t for t in tokens if t != 256]  # in order; <bos> is no target
    sizes = [len(b["labels"]) for b in batches]
    assert set(sizes[:-1]) <= {batch_size} and 0 < sizes[-1] <= batch_size
    assert sum(sizes) == loader.n_windows and loader.epoch == 1


def test_padding_has_no_label_and_shares_no_document(tmp_path):
    write(["abcd", "e"], tmp_path)  # 6 + 3 tokens
    loader, (batch,) = one_pass(ShardDataset(tmp_path), batch_size=4, seq_len=7)
    assert batch["input_ids"].tolist() == [[256, 97, 98, 99, 100, 257, 256], [101, 257] + [0] * 5]
    assert batch["labels"].tolist() == [[97, 98, 99, 100, 257, -100, 101], [257] + [-100] * 6]
    last = batch["document_ids"][1].tolist()
    assert last[0] == last[1] and len(set(last)) == 6  # every padding token is alone
    assert batch["position_ids"][1].tolist() == [0, 1, 0, 0, 0, 0, 0]


def test_data_shorter_than_a_window_can_be_evaluated(tmp_path):
    write(["abc"], tmp_path)
    _, (batch,) = one_pass(ShardDataset(tmp_path), batch_size=2, seq_len=64)
    assert labels([batch]) == [97, 98, 99, 257]


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_share_a_pass(dataset, world_size):
    whole = labels(one_pass(dataset, batch_size=1, seq_len=16)[1])
    parts = [one_pass(dataset, batch_size=3, seq_len=16, rank=r, world_size=world_size)
             for r in range(world_size)]
    assert sorted(t for _, batches in parts for t in labels(batches)) == sorted(whole)
    assert {len(batches) for _, batches in parts} == {len(parts[0][0])}
    assert {loader.sample_index for loader, _ in parts} == {parts[0][0].n_windows}
    for _, batches in parts:
        assert all(b["input_ids"].shape[1] == 16 for b in batches)  # also where it has no rows


def test_a_second_pass_is_the_first(dataset):
    loader = PackedLoader(dataset, batch_size=7, seq_len=16, shuffle=False)
    assert loader.n_windows % 7
    rows = take(loader, 2 * len(loader))
    assert rows[: len(loader)] == rows[len(loader) :]


def test_a_pass_is_resumed_at_another_batch_size(dataset):
    loader = PackedLoader(dataset, batch_size=7, seq_len=16, shuffle=False)
    seen = flat(take(loader, 3))
    again = PackedLoader(dataset, batch_size=5, seq_len=16, shuffle=False)
    again.load_state_dict(loader.state_dict())
    while again.epoch == 0:
        seen += flat(take(again, 1))
    assert seen == flat(take(PackedLoader(dataset, batch_size=1, seq_len=16, shuffle=False),
                             loader.n_windows))


def test_bits_per_byte_of_a_pass_by_counting(dataset):
    """A model for which every token costs ln V nats: bits per byte are a matter of counting."""
    n_targets = len(labels(one_pass(dataset, batch_size=3, seq_len=16)[1]))
    text_bytes = sum(len(text.encode()) for text in corpus())
    right = sum(len(t.encode()) + 1 for t in corpus()) * np.log2(258) / text_bytes
    mean_nats = n_targets * np.log(258) / n_targets
    assert mean_nats / np.log(2) / dataset.bytes_per_token == pytest.approx(right, rel=1e-12)


# --- windows that start anywhere ------------------------------------------------------------


def test_random_offsets_are_windows_of_the_text_with_their_labels(dataset):
    tokens = stream(corpus())
    pairs = [(t, d) for d, text in enumerate(corpus()) for t in (256, *text.encode(), 257)]
    loader, seen = make(dataset, batch_size=1, random_offsets=True), set()
    it = iter(loader)
    for sample in range(200):
        batch = next(it)
        start = int(draw_offsets(np.array([sample]), len(tokens) - 16, 5)[0])
        expected = reference(pairs, start, 16)
        keys = ("input_ids", "labels", "document_ids", "position_ids")
        assert [batch[k][0].tolist() for k in keys] == list(expected)
        seen.add(start % 16)
    assert len(seen) == 16  # not only multiples of T


def test_random_offsets_resume_at_another_batch_size_and_differ_by_seed(dataset):
    expected = flat(take(make(dataset, batch_size=1, random_offsets=True), 60))
    loader = make(dataset, batch_size=4, random_offsets=True)
    first = flat(take(loader, 5))
    again = make(dataset, batch_size=2, random_offsets=True, prefetch=0)
    again.load_state_dict(loader.state_dict())
    assert first + flat(take(again, 20)) == expected
    assert flat(take(make(dataset, batch_size=1, seed=6, random_offsets=True), 60)) != expected
    with pytest.raises(ValueError, match="random_offsets"):
        make(dataset).load_state_dict(loader.state_dict())
    with pytest.raises(ValueError, match="random_offsets"):
        make(dataset, shuffle=False, random_offsets=True)


def test_random_offsets_are_uniform():
    counts = np.bincount(draw_offsets(np.arange(20_000), 20, 1), minlength=20)
    assert ((counts - 1000) ** 2 / 1000).sum() < 44  # chi-square, 19 degrees: 0.1% beyond
