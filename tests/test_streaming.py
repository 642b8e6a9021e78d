"""The cache of streamed shards under races: files that are dropped just before they are mapped.

The bucket is fsspec's memory; tests with an S3 server are in test_remote.py.
"""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from byte_corpus import corpus, write

from skylar.data import streaming
from skylar.data.loader import PackedLoader
from skylar.data.shards import ShardDataset
from skylar.data.streaming import StreamedDataset
from skylar.utils.remote import RemoteFolder

fsspec = pytest.importorskip("fsspec")
pytest.importorskip("tenacity")
GROUP = 2


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> ShardDataset:
    "About 40 small shards, here and in the bucket."
    folder = tmp_path_factory.mktemp("data") / "train"
    write(corpus(n=300), folder, shard_bytes=600)
    fsspec.filesystem("memory").put(str(folder), "/streaming/train", recursive=True)
    return ShardDataset(folder)


def remote(lines=None, attempts=2) -> RemoteFolder:
    return RemoteFolder("memory://streaming/train", attempts=attempts, first_wait=0.01,
                        report=(lines if lines is not None else []).append)


def streamed(local, folder: Path, shards=2 * GROUP, lines=None) -> StreamedDataset:
    "With room for so many shards of the largest size."
    rows = local.manifest["shards"]
    largest = max(2 * row["tokens"] + 8 * (row["documents"] + 1) for row in rows)
    return StreamedDataset(remote(lines), folder, limit=shards * largest, group=GROUP)


def drop(folder: Path, name: str) -> None:
    "What another process does that wants room."
    for suffix in (".bin", ".idx"):
        (folder / name).with_suffix(suffix).unlink(missing_ok=True)


@pytest.mark.parametrize("times", [1, 3])
def test_a_shard_dropped_before_it_is_mapped_is_fetched_again(local, tmp_path, monkeypatch, times):
    dataset, right, calls = streamed(local, tmp_path / "train"), streaming.map_file, []

    def late(folder, name, *args):
        calls.append(name)
        if len(calls) <= times:
            drop(folder, name)
        return right(folder, name, *args)

    monkeypatch.setattr(streaming, "map_file", late)
    assert (dataset[5:40] == local[5:40]).all()
    assert len(calls) == times + 1 and len(set(calls)) == 1


def test_only_the_index_is_gone(local, tmp_path):
    dataset = streamed(local, tmp_path / "train")
    dataset[:10]
    (tmp_path / "train/shard-00000.idx").unlink()
    first, starts = dataset.boundaries(0, 200)
    assert (first, starts.tolist()) == (0, local.boundaries(0, 200)[1].tolist()) and len(starts)


def test_a_shard_cut_short_after_it_was_checked_is_fetched_again(local, tmp_path):
    dataset = streamed(local, tmp_path / "train")
    dataset.cache.get(0, lambda: None)
    os.truncate(tmp_path / "train/shard-00000.bin", 6)
    assert (dataset[:40] == local[:40]).all()


def test_dropped_as_often_as_it_is_fetched_it_ends_in_one_line(local, tmp_path, monkeypatch):
    dataset, right = streamed(local, tmp_path / "train"), streaming.map_file
    monkeypatch.setattr(streaming, "map_file", lambda folder, name, *args: (
        drop(folder, name), right(folder, name, *args))[1])
    with pytest.raises(OSError, match=r"shard-00000.bin was fetched 10 times.*more room") as error:
        dataset[:10]
    assert "\n" not in str(error.value)


def test_a_file_that_goes_while_it_is_looked_at_is_not_whole(local, tmp_path, monkeypatch):
    "Another process drops it between the look at its size and the reading for its hash."
    streamed(local, tmp_path / "train")[:10]
    dataset, right, dropped = streamed(local, tmp_path / "train"), streaming.sha256_file, []

    def late(path):
        if not dropped:
            dropped.append(path)
            drop(path.parent, path.name)
        return right(path)

    monkeypatch.setattr(streaming, "sha256_file", late)
    assert (dataset[:10] == local[:10]).all() and dropped


def test_a_failed_fetch_is_no_longer_on_its_way(local, tmp_path, monkeypatch):
    "Its bytes would be counted as used for ever, and other shards dropped for them."
    dataset = streamed(local, tmp_path / "train")
    files, right = dataset.cache.files, RemoteFolder.download

    def fail(self, name, *args):
        if name == "shard-00003.bin":
            raise OSError("503")
        return right(self, name, *args)

    monkeypatch.setattr(RemoteFolder, "download", fail)
    with pytest.raises(OSError, match="503"):
        dataset.cache.get(3, lambda: None)
    assert not files.loading
    monkeypatch.setattr(files, "_make_room", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        files.bring(4)
    assert not files.loading
    monkeypatch.undo()
    start = int(dataset._arrays.first_token[3])
    assert (dataset[start:start + 5] == local[start:start + 5]).all() and not files.loading


def test_many_threads_read_anywhere_in_a_cache_that_is_full(local, tmp_path):
    """Two loaders want two groups each, six threads read single shards: files come and go all the
    time, and what is read is the corpus."""
    dataset = streamed(local, tmp_path / "train")
    loaders = [PackedLoader(dataset, batch_size=2, seq_len=16, seed=seed) for seed in (1, 2)]

    def by_order(loader):
        offsets = loader.order.order.offsets(np.arange(200))
        for step, batch in zip(range(100), loader):
            for row, at in zip(batch["input_ids"], offsets[2 * step:]):
                assert (row.numpy() == local[at:at + 16]).all()

    def anywhere(seed):
        rng = np.random.default_rng(seed)
        for _ in range(150):
            at = int(rng.integers(local.n_tokens - 50))
            assert (dataset[at:at + 50] == local[at:at + 50]).all()
            assert dataset.boundaries(at, at + 50)[0] == local.boundaries(at, at + 50)[0]

    with ThreadPoolExecutor(8) as pool:
        done = [pool.submit(by_order, loader) for loader in loaders]
        done += [pool.submit(anywhere, seed) for seed in range(6)]
    for future in done:
        future.result()


def test_another_thread_that_keeps_other_maps_takes_nothing_away(local, tmp_path):
    "Every thread that maps a shard replaces `maps`; here one is always faster than we are."
    class Replaced(streaming.MappedShards):
        maps = property(lambda self: {}, lambda self, value: None)

    dataset = streamed(local, tmp_path / "train")
    dataset._arrays.tokens.__class__ = Replaced
    assert (dataset[5:40] == local[5:40]).all()


def test_two_processes_that_share_a_folder_want_different_shards(local, tmp_path):
    "Each drops what the other one has just fetched, and both read the corpus."
    found = torch.multiprocessing.get_context("spawn").Queue()
    workers = [torch.multiprocessing.get_context("spawn").Process(
        target=read_everything, args=(str(local.folder), str(tmp_path / "train"), seed, found))
        for seed in (1, 2)]
    for worker in workers:
        worker.start()
    answers = [found.get(timeout=200) for _ in workers]
    for worker in workers:
        worker.join()
    assert answers == ["the corpus"] * 2


def read_everything(source: str, folder: str, seed: int, found) -> None:
    try:
        local = ShardDataset(source)
        fsspec.filesystem("memory").put(source, "/streaming/train", recursive=True)
        dataset = streamed(local, Path(folder))
        loader = PackedLoader(dataset, batch_size=2, seq_len=16, seed=seed)
        n = loader.n_windows
        offsets = loader.order.order.offsets(np.arange(n))
        for step, batch in zip(range(n // 2), loader):
            for row, at in zip(batch["input_ids"], offsets[2 * step:]):
                assert (row.numpy() == local[at:at + 16]).all()
        found.put("the corpus")
    except BaseException as error:
        found.put(repr(error))


class Windows(torch.utils.data.Dataset):
    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return self.dataset[10 * i:10 * i + 10]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_in_a_forked_process_it_says_so_and_does_not_wait_for_ever(local, tmp_path):
    """Its threads are not there. What has been mapped before can be read."""
    dataset = streamed(local, tmp_path / "train")
    workers = torch.utils.data.DataLoader(Windows(dataset), batch_size=None, num_workers=1,
                                          multiprocessing_context="fork", timeout=60)
    with pytest.raises(RuntimeError, match="a forked process has no threads that fetch shards"):
        list(workers)
    assert (dataset[:40] == local[:40]).all()
    assert len(list(workers)) == 4


def test_threads_end_when_the_cache_is_closed(local, tmp_path):
    before = {*threading.enumerate()}
    dataset = streamed(local, tmp_path / "train")
    started = {*threading.enumerate()} - before
    assert len(started) == 2
    dataset.cache.close()
    for thread in started:
        thread.join(10)
        assert not thread.is_alive()
