"""Data folders: the split, what is made, resumed, refused and verified; memory of large texts."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from byte_corpus import damaged

from skylar.data import prepare
from skylar.data.loader import PackedLoader
from skylar.data.prepare import bytes_per_token, open_data, prepare_data, split, verify_data
from skylar.data.shards import ShardDataset, write_shards
from skylar.data.tokenizer import BPETokenizer

# --- the split ----------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.001, 0.05, 0.1, 0.25, 0.3, 1 / 3, 0.35, 0.4, 0.45, 0.5,
                                   0.6, 0.75, 0.9, 0.999, 1 / 49])
@pytest.mark.parametrize("n", [1, 2, 10, 49, 600, 5000])
def test_the_share_that_is_asked_for_is_kept(share, n):
    texts = [f"text {i}" for i in range(n)]
    train, val = (list(split(texts, share, part)) for part in ("train", "val"))
    assert sorted(train + val) == sorted(texts)
    assert abs(len(val) - share * n) < 1.001
    if prepare.has_val_document(texts, share):
        assert train and val
    assert train == [t for t in texts if t in set(train)]  # in order


def test_the_split_is_a_stream_and_the_first_documents_do_not_move():
    def endless():
        n = 0
        while True:
            yield str(n)
            n += 1

    it = split(endless(), 0.4, "val")
    assert [next(it) for _ in range(4)] == list(split(map(str, range(10)), 0.4, "val"))
    assert [next(it) for _ in range(2)] == ["12", "14"]


def test_too_few_documents_are_divided_each():
    texts = ["abcdefghij", "klmnopqrst"]
    assert not prepare.has_val_document(texts, 0.2)
    assert list(split(texts, 0.2, "train", by_document=False)) == ["abcdefgh", "klmnopqr"]
    assert list(split(texts, 0.2, "val", by_document=False)) == ["ij", "st"]


@pytest.mark.parametrize("text", ["", "x" * 300, "line\n" * 100, "word " * 100, "è\n" * 200])
def test_pieces_for_the_tokenizer_lose_nothing(text):
    found = list(prepare._pieces([text, "short"], 64))
    assert "".join(found) == text + "short" and all(len(p) <= 64 for p in found)


# --- making a folder ------------------------------------------------------------------------


@pytest.fixture
def lines(tmp_path):
    rows = [{"text": f"number {i} of the lines " * (i % 5 + 1)} for i in range(60)]
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def data(tmp_path, lines):
    prepare_data(lines, out=tmp_path / "data", vocab_size=280, val_fraction=0.4)
    return tmp_path / "data"


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_is_made_once(tmp_path, lines, data, capsys):
    tokenizer, datasets = open_data(data)
    assert (tokenizer.vocab_size, datasets["val"].n_documents) == (280, 24)
    before = files(data)
    prepare_data(lines, out=data, vocab_size=280, val_fraction=0.4)
    assert files(data) == before
    assert "lines.jsonl: 1 file read" in capsys.readouterr().out


@pytest.mark.parametrize("change", [dict(vocab_size=281), dict(val_fraction=0.3),
                                    dict(text_field="body"), dict(tokenizer="other")])
def test_another_recipe_is_refused_and_changes_nothing(lines, data, change):
    before = files(data)
    with pytest.raises(ValueError, match=f"was made with {next(iter(change))}"):
        prepare_data(lines, **{"out": data, "vocab_size": 280, "val_fraction": 0.4, **change})
    assert files(data) == before


def test_last_documents_for_validation_and_a_tokenizer_that_has_not_seen_them(tmp_path):
    (tmp_path / "x").mkdir()
    for i in range(6):
        (tmp_path / "x" / f"{i}.txt").write_text("abcabd" * 9 if i < 4 else "xyzxyz" * 9)
    prepare_data(tmp_path / "x", out=tmp_path / "d", vocab_size=270, val_last=2)
    tokenizer, parts = open_data(tmp_path / "d")
    assert [part.n_documents for part in parts.values()] == [4, 2]
    assert "xyz" in tokenizer.decode(parts["val"][:20].tolist())
    assert len(tokenizer.encode("xyzxyz")) == 6 > len(tokenizer.encode("abcabd"))
    with pytest.raises(ValueError, match="was made with val_last 2"):
        prepare_data(tmp_path / "x", out=tmp_path / "d", vocab_size=270)


def test_too_few_documents_for_val_last_are_split_by_share(tmp_path):
    (tmp_path / "x.txt").write_text("abcabd" * 99)
    prepare_data(tmp_path / "x.txt", out=tmp_path / "d", vocab_size=270, val_last=4)
    assert [part.n_documents for part in open_data(tmp_path / "d")[1].values()] == [1, 1]


@pytest.mark.parametrize("wrong, message", [
    (dict(val_last=0), "val_last"),
    (dict(val_fraction=0.0), "val_fraction"), (dict(val_fraction=1.0), "val_fraction"),
    (dict(shard_mb=0), "shard_mb"), (dict(workers=0), "workers"),
])
def test_impossible_settings_leave_nothing(tmp_path, lines, wrong, message):
    with pytest.raises(ValueError, match=message):
        prepare_data(lines, out=tmp_path / "d", **wrong)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        prepare_data(tmp_path / "nowhere", out=tmp_path / "d")
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        prepare_data(lines, out=tmp_path / "d", tokenizer=tmp_path / "none")
    with pytest.raises(ValueError, match="vocab_size 12"):
        prepare_data(lines, out=tmp_path / "d", vocab_size=12)
    assert not (tmp_path / "d").exists()


def test_a_folder_with_something_else_is_refused(tmp_path, lines):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        prepare_data(lines, out=tmp_path / "d")


@pytest.mark.parametrize("step", ["corpus.json", "tokenizer", "train", "val"])
def test_stopped_anywhere_the_same_call_goes_on(tmp_path, lines, data, monkeypatch, step):
    """Killed right before `step` is made."""
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    real, name = prepare.write_shards, {"corpus.json": "atomic_write"}.get(step, "write_shards")
    if step in ("train", "val"):
        def write(texts, bpe, out, **options):
            return stop() if out.name == step else real(texts, bpe, out, **options)
        monkeypatch.setattr(prepare, "write_shards", write)
    else:
        monkeypatch.setattr(prepare, name if step == "corpus.json" else "atomic_directory", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare_data(lines, out=tmp_path / "cut", vocab_size=280, val_fraction=0.4)
    monkeypatch.undo()
    prepare_data(lines, out=tmp_path / "cut", vocab_size=280, val_fraction=0.4)
    assert files(tmp_path / "cut") == files(data)


def test_two_processes_do_not_work_in_one_folder(tmp_path, lines):
    from skylar.utils.files import directory_lock
    with directory_lock(tmp_path / "d"):
        with pytest.raises(ValueError, match="another process is making data there"):
            prepare_data(lines, out=tmp_path / "d", vocab_size=280)
        assert (tmp_path / "d" / ".lock").exists()  # the other one's


# --- verifying ------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [lambda d: d[:2000], lambda d: d + b" ", lambda d: b"",
                                    lambda d: d.replace(b"<eos>", b"<end>"), lambda d: b"\xff"])
def test_a_changed_tokenizer_is_noticed(data, damage):
    path = data / "tokenizer" / "tokenizer.json"
    path.write_bytes(damage(path.read_bytes()))
    for function in (verify_data, open_data):
        with pytest.raises(ValueError, match="tokenizer.json is damaged or not the one") as error:
            function(data)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("gone, message", [
    ("tokenizer/tokenizer.json", "tokenizer.json is missing"), ("train/manifest.json", "manifest"),
    ("val/shard-00000.bin", "shard-00000.bin is missing")])
def test_what_is_missing_is_named(data, gone, message):
    (data / gone).unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        verify_data(data)


def test_no_data_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no data in .*train; make it with"):
        open_data(tmp_path)


def test_seeded_damage_of_a_data_folder_is_noticed_or_changes_nothing(data, lines):
    before = files(data)
    names = [n for n in before if before[n] and n.name not in ("tokenizer_config.json", ".lock")]
    rng, right = np.random.default_rng(1), {p: d[:].tolist() for p, d in open_data(data)[1].items()}
    for _ in range(150):
        name = names[rng.integers(len(names))]
        (data / name).write_bytes(damaged(before[name], rng))
        for call in (lambda: open_data(data)[1],
                     lambda: prepare_data(lines, out=data, vocab_size=280, val_fraction=0.4)):
            try:
                if found := call():
                    assert {p: d[:].tolist() for p, d in found.items()} == right
            except (ValueError, OSError) as error:
                assert "\n" not in str(error) and str(error)
        (data / name).write_bytes(before[name])
    assert files(data) == before


# --- bits per byte --------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size, seq_len", [(1, 8), (3, 5), (64, 100), (1, 10_000)])
def test_bits_per_byte_of_short_documents(tmp_path, batch_size, seq_len):
    """`sum of nats of all targets / ln 2 / bytes of the text`, token by token."""
    texts = ["yes", "no", "maybe", "no no", "\u00e8 s\u00ec", "yes yes maybe"] * 8
    bpe = BPETokenizer.train(["yes no maybe " * 20] * 4, vocab_size=275)
    write_shards(texts, bpe, tmp_path, progress=False)
    nats = np.random.default_rng(0).random(bpe.vocab_size)  # what each token costs
    targets = [i for text in texts for i in (*bpe.encode(text), bpe.eos_id)]
    right = nats[targets].sum() / np.log(2) / sum(len(t.encode()) for t in texts)
    dataset = ShardDataset(tmp_path)
    loader = PackedLoader(dataset, batch_size=batch_size, seq_len=seq_len, shuffle=False)
    it = iter(loader)
    labels = np.concatenate([next(it)["labels"].numpy().ravel() for _ in range(len(loader))])
    mean_loss = nats[labels[labels != -100]].mean()
    assert mean_loss / np.log(2) / bytes_per_token(dataset) == pytest.approx(right, rel=1e-12)


def test_data_that_does_not_know_its_text_has_no_bits_per_byte():
    with pytest.raises(ValueError, match="does not know its text"):
        bytes_per_token(ShardDataset.from_ids([1, 2, 3]))
    assert bytes_per_token(ShardDataset.from_ids([1, 2, 3], text_bytes=8)) == 4.0


# --- memory ---------------------------------------------------------------------------------


MEMORY = """
import re, resource, sys
from skylar.data.prepare import prepare_data
prepare_data(sys.argv[1], out=sys.argv[2], vocab_size=600)
status = open("/proc/self/status").read()
print("PEAK", int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's peak memory")
def test_a_plain_text_of_20_mb_takes_little_memory(tmp_path):
    """Tokenizer training and tokenizing; as one document it took 128 bytes a byte: 2.5 GB."""
    rng = np.random.default_rng(0)
    words = ["nel", "principio", "mare", "luce", "acque", "sotto", "giorno", "notte", "terra"]
    line = "\n".join(" ".join(rng.choice(words, 12)) for _ in range(2000)) + "\n"
    with open(tmp_path / "big.txt", "w") as file:
        while file.tell() < 20_000_000:
            file.write(line)
    done = subprocess.run([sys.executable, "-c", MEMORY, tmp_path / "big.txt", tmp_path / "d"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(re.search(r"PEAK (\d+)", done.stdout)[1]) < 500
