"""Shards at their boundaries: kill, damage, full disks, tiny and large documents."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from byte_corpus import Bytes, corpus, damaged, stream, write

from skylar.data import shard_files, shards
from skylar.data.shard_files import token_dtype, verify_shards
from skylar.data.shards import (
    ShardDataset,
    write_shards,
)


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
from byte_corpus import Bytes, corpus
from skylar.data import shard_files, shards
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
    monkeypatch.setattr(shard_files, "BLOCK", 100)
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
    ("manifest.json", lambda d: b"[]", r"manifest\.json is damaged: it holds a list"),
    ("manifest.json", lambda d: b"[" * 100_000, r"manifest\.json is damaged"),
    ("manifest.json", lambda d: b"\xff" + d, r"manifest\.json is damaged"),
    ("manifest.json", lambda d: d.replace(b'"blocks_sha256"', b'"blockS_sha256"'),
     r"does not match its checksum"),
    ("manifest.json", lambda d: d.replace(b'"n_tokens": ', b'"n_tokens": 1'),
     r"does not match its checksum"),
    ("manifest.json", lambda d: d.replace(b'"vocab_size": 258', b'"vocab_size": "258"'),
     r"does not match its checksum"),
    ("manifest.json", lambda d: d.replace(b'shards 2', b'shards 9'), r"unknown format"),
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


def test_seeded_damage_is_noticed_in_one_line_or_changes_nothing(dataset):
    """Flip, cut, drop or repeat bytes anywhere in any file of a folder of shards."""
    folder, before, tokens = dataset.folder, files(dataset.folder), dataset[:].tolist()
    rng, noticed = np.random.default_rng(0), 0
    for _ in range(400):
        name = rng.choice(sorted(before))
        (folder / name).write_bytes(damaged(before[name], rng))
        try:
            totals, again = verify_shards(folder), ShardDataset(folder)
            assert totals["n_tokens"] == len(tokens) and again[:].tolist() == tokens
            assert again.text_bytes == dataset.text_bytes and again.vocab_size == 258
            assert again.fingerprint == dataset.fingerprint
        except (ValueError, OSError) as error:
            assert "\n" not in str(error) and (name in str(error) or "shard-" in str(error))
            noticed += 1
        (folder / name).write_bytes(before[name])
    assert noticed > 350


@pytest.mark.parametrize("name", ["progress.json", "manifest.json"])
@pytest.mark.parametrize("damage", [lambda d: d[:40], lambda d: b"[]", lambda d: b"{}",
                                    lambda d: d.replace(b'"tokens": ', b'"tokens": 1')])
def test_a_damaged_note_of_progress_stops_the_writer_in_one_line(tmp_path, name, damage):
    write(corpus(), tmp_path, shard_bytes=700)
    (tmp_path / "manifest.json").rename(tmp_path / name)
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    with pytest.raises(ValueError, match=rf"{name}.*(damaged|unknown format)"):
        write(corpus(), tmp_path, shard_bytes=700)


def test_a_finished_shard_that_has_gone_is_noticed_when_going_on(tmp_path):
    write(corpus(), tmp_path, shard_bytes=700)
    (tmp_path / "shard-00001.bin").unlink()
    with pytest.raises(ValueError, match="shard-00001.bin is missing"):
        write(corpus(), tmp_path, shard_bytes=700)


def test_a_shard_that_lies_outside_the_folder_is_not_read(dataset, tmp_path):
    outside = tmp_path / "outside.bin"
    outside.write_bytes((dataset.folder / "shard-00000.bin").read_bytes())
    (dataset.folder / "shard-00000.bin").unlink()
    (dataset.folder / "shard-00000.bin").symlink_to(outside)
    with pytest.raises(ValueError, match="link out of its folder"):
        ShardDataset(dataset.folder)


# --- documents of any length --------------------------------------------------------------


def test_a_long_document_has_the_ids_that_it_has_in_one_piece(tmp_path, monkeypatch):
    from skylar.data.tokenizer import BPETokenizer

    text = "To be, or not to be: that is the question.\n" * 5000  # cut at 65,536
    tokenizer = BPETokenizer.train([text[:5000]], 290)
    monkeypatch.setattr(shards, "LONG_TEXT", 1000)
    write_shards(["short", text, "", text[::-1]], tokenizer, tmp_path, progress=False)
    expected = [tokenizer.encode(t) for t in ("short", text, "", text[::-1])]
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    assert ShardDataset(tmp_path)[:].tolist() == [i for x in expected for i in (bos, *x, eos)]


def test_documents_are_told_apart_where_their_bytes_are_the_same(tmp_path):
    write(["ab", "c"], tmp_path)
    for other in (["a", "bc"], ["a\0b", "c"], ["abc", ""]):
        with pytest.raises(ValueError, match="other documents"):
            write(other, tmp_path)


# --- bytes of text, and data in memory -----------------------------------------------------


def test_bytes_per_target_token_by_counting(dataset):
    targets = sum(len(text.encode()) + 1 for text in corpus())  # each byte, and <eos>
    assert dataset.bytes_per_token == sum(len(t.encode()) for t in corpus()) / targets


def test_the_fingerprint_is_of_the_data_and_not_of_how_it_is_cut(tmp_path, dataset):
    write(corpus(), tmp_path / "b", shard_bytes=300)
    assert ShardDataset(tmp_path / "b").fingerprint == dataset.fingerprint
    for n, texts in enumerate((corpus()[1:] + corpus()[:1], [*corpus()[:-1], corpus()[-1] + "x"])):
        write(texts, tmp_path / f"other{n}")
        assert ShardDataset(tmp_path / f"other{n}").fingerprint != dataset.fingerprint


@pytest.mark.parametrize("kind", ["list", "uint16", "int64", "memmap", "tensor"])
def test_a_dataset_from_ids_is_the_one_from_shards(tmp_path, dataset, kind):
    ids = stream(corpus())
    starts = np.flatnonzero(np.array(ids) == 256)
    if kind == "memmap":
        np.array(ids, np.uint16).tofile(tmp_path / "train.bin")
        given = np.memmap(tmp_path / "train.bin", np.uint16, "r")
    elif kind == "tensor":
        import torch
        given = torch.tensor(ids)
    else:
        given = ids if kind == "list" else np.array(ids, kind)
    made = ShardDataset.from_ids(given, starts=starts, text_bytes=dataset.text_bytes)
    assert made.n_tokens == dataset.n_tokens and made.n_documents == dataset.n_documents
    assert made.bytes_per_token == dataset.bytes_per_token and made.vocab_size == 258
    assert made[5:99].tolist() == ids[5:99] and made[5:99].dtype == np.int64
    for i, j in ((0, 5), (3, 300), (17, 18), (0, len(ids))):
        (a, b), (c, d) = made.boundaries(i, j), dataset.boundaries(i, j)
        assert a == c and b.tolist() == d.tolist()


def test_the_fingerprint_of_ids_does_not_depend_on_their_type():
    prints = {ShardDataset.from_ids(x).fingerprint
              for x in ([1, 2, 3], np.array([1, 2, 3], np.uint16), np.array([1, 2, 3]))}
    assert len(prints) == 1
    assert ShardDataset.from_ids([1, 2, 4]).fingerprint not in prints
    assert ShardDataset.from_ids([1, 2, 3], starts=[0, 1]).fingerprint not in prints


@pytest.mark.parametrize("ids, options, message", [
    ([], {}, "at least one integer"), ([[1, 2]], {}, "one dimension"), ([1.5], {}, "float64"),
    ([1, -1], {}, "not negative"), ([1, 2], {"starts": [1]}, "starts must increase from 0"),
    ([1, 2], {"starts": [0, 0]}, "starts must"), ([1, 2], {"starts": [0, 2]}, "starts must"),
    ([1, 2], {"starts": [0.0, 1.0]}, "starts must"),
])
def test_what_is_no_data_is_refused(ids, options, message):
    with pytest.raises(ValueError, match=message):
        ShardDataset.from_ids(ids, **options)


def test_a_full_disk_is_named_and_leaves_nothing_half_written(tmp_path):
    pytest.importorskip("resource")  # a limit on file sizes plays the full disk
    code = (f"import sys, resource; sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
            f"from byte_corpus import write\n"
            f"resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
            f"try:\n    write(['x' * 500] * 400, {str(tmp_path / 'd')!r})\n"
            f"except OSError as error:\n    print(error)\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "cannot write" in done.stdout and "run the same command again" in done.stdout
    assert not done.stderr and not list((tmp_path / "d").iterdir())
