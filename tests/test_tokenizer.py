"""The tokenizer where it could break: ties, borders, forged tokens, odd Unicode, damaged files."""

import hashlib
import itertools
import json
import os
import pickle
import random
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from skylar.data import tokenizer as module
from skylar.data.tokenizer import (
    CHAR_TO_BYTE,
    SPECIAL_TOKENS,
    BPETokenizer,
    encode_bpe,
    pre_tokenize,
    train_bpe,
)

ROOT = Path(__file__).parents[1]
ENGLISH = " ".join(
    f"Chapter {i}: the {a} {b} didn't see {i * i} other {b}s; \"{a.title()}!\" they'd say.\n"
    for i, (a, b) in enumerate(
        itertools.product(
            "quick slow brown lazy naïve happy angry silent".split(),
            "fox dog journey step word letter café mountain river".split(),
        )
    )
)
CODE = "\n".join(p.read_text() for p in sorted((ROOT / "skylar").rglob("*.py")))[:60_000]
NASTY = [
    "", " ", "  ", "\n", " \n\n\t \r\n", "\0", "a\0b\0\0", "\x1c\x1d\x85\u2028\u3000\ufeff",
    "'", "'s's'LL'", "👩‍👩‍👧‍👦", "🇮🇹🇯🇵", "e\u0301\u0323", "ZA̡͊͠L̷G̕O", "ſ K'ſ 'ſ ﬁ ß",
    "日本語。中文，한국어", "हिन्दी العربية ไทย", "½ Ⅷ ٣٤٥ 12345678",
    "\U0010ffff\U000e0001\U0001f9d1",
    "a" * 1000, " " * 3000, "?!" * 500, "<bos>", "<|im_start|>",
]  # fmt: skip
COMMON = [
    "a", "the", " ", "  ", "\n", "\r", "\t", "'", "'ll", "1", "23", ".", "!?", "é", "e\u0301",
    "日", "😀", "\x1c", "\x85",
]  # fmt: skip


def random_text(rng: random.Random, length: int) -> str:
    "Characters of all planes, and runs of what the pattern treats specially."

    def char() -> str:
        kind = rng.random()
        if kind < 0.7:
            return rng.choice(COMMON)
        point = rng.randrange(0x3000) if kind < 0.9 else rng.randrange(0x110000)
        return "\ufffd" if 0xD800 <= point < 0xE000 else chr(point)

    return "".join(char() for _ in range(length))


def rust_merges(rust: Tokenizer) -> list[tuple[bytes, bytes]]:
    pairs = json.loads(rust.to_str())["model"]["merges"]
    return [tuple(bytes(CHAR_TO_BYTE[c] for c in token) for token in pair) for pair in pairs]


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    return BPETokenizer.train([ENGLISH, CODE], 1500)


# The trainer and the encoder from scratch are the Rust ones


@pytest.mark.parametrize(
    "text",
    [
        ENGLISH,
        CODE,
        ENGLISH.swapcase() + CODE[::-1],
        "日本語を勉強します。" * 30 + "한국어 " * 9,
        "".join(NASTY) * 3,
    ],
    ids=["english", "code", "mixed", "asian", "nasty"],
)
def test_scratch_equals_rust(text):
    rust = module._train_rust([text], 256 + 700, ())
    merges = train_bpe(text, 700)
    assert merges == rust_merges(rust)
    for sample in [*NASTY, ENGLISH[:5000], CODE[:5000]]:
        assert encode_bpe(sample, merges) == rust.encode(sample).ids


@pytest.mark.parametrize("seed", range(60))
def test_scratch_equals_rust_when_ties_abound(seed):
    "Tiny alphabets: hundreds of ties, overlapping pairs such as `aaa`, and training that runs dry."
    rng = random.Random(seed)
    alphabet = "abcd"[: rng.choice([1, 2, 2, 3, 4])] + rng.choice(["", " ", " '1"])
    text = "".join(rng.choices(alphabet, k=rng.choice([1, 30, 300, 1500])))
    n_merges = rng.choice([1, 20, 400])
    rust = module._train_rust([text], 256 + n_merges, ())
    merges = train_bpe(text, n_merges)
    assert merges == rust_merges(rust)
    sample = "".join(rng.choices(alphabet, k=200))
    assert encode_bpe(sample, merges) == rust.encode(sample).ids


@pytest.mark.parametrize("seed", range(10))
def test_scratch_equals_rust_on_random_unicode(seed):
    rng = random.Random(seed)
    text = random_text(rng, 4000)
    rust = module._train_rust([text], 256 + 300, ())
    merges = train_bpe(text, 300)
    assert merges == rust_merges(rust)
    sample = random_text(rng, 2000)
    assert encode_bpe(sample, merges) == rust.encode(sample).ids


def test_no_string_is_learned_twice():
    merges = train_bpe(CODE, 2000)
    assert len({left + right for left, right in merges}) == len(merges)


def test_training_is_the_same_every_time_and_on_any_number_of_cores():
    code = (
        "import sys; from skylar.data.tokenizer import BPETokenizer as T;"
        "print(T.train([l for l in sys.stdin], 600).fingerprint)"
    )
    prints = {
        subprocess.run(
            [sys.executable, "-c", code], input=CODE, text=True, capture_output=True, check=True,
            env={**os.environ, "RAYON_NUM_THREADS": threads}, cwd=ROOT,
        ).stdout
        for threads in ("1", "2", "4")
    }  # fmt: skip
    assert len(prints) == 1


def test_order_of_documents_does_not_matter(tokenizer):
    assert BPETokenizer.train([CODE, ENGLISH], 1500).fingerprint == tokenizer.fingerprint


# Round trips


@pytest.mark.parametrize("text", NASTY)
def test_round_trip_nasty(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert "".join(tokenizer.decode_iterable(ids)) == text
    assert tokenizer.encode_batch([text, "x"])[0] == ids


def test_round_trip_every_fifth_code_point(tokenizer):
    "The lesson does all of them."
    text = "".join(chr(c) for c in range(0, sys.maxunicode + 1, 5) if not 0xD800 <= c < 0xE000)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("seed", range(20))
def test_round_trip_random(tokenizer, seed):
    rng = random.Random(seed)
    texts = [random_text(rng, rng.randrange(200)) for _ in range(50)]
    for text, ids in zip(texts, tokenizer.encode_batch(texts)):
        assert ids == tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert "".join(pre_tokenize(text)) == text


def test_decode_equals_rust_on_any_ids(tokenizer):
    "Ids in an order that no encoder makes: broken UTF-8 becomes U+FFFD exactly where Rust puts it."
    rng = random.Random(0)
    for _ in range(300):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(20))]
        assert tokenizer.decode(ids) == tokenizer._rust.decode(ids, skip_special_tokens=False)
        assert tokenizer.decode(ids, skip_special=True) == tokenizer._rust.decode(ids)


def test_decode_as_ids_come(tokenizer):
    ids = tokenizer.encode("a😀é")
    shown = list(tokenizer.decode_iterable(ids))
    assert len(shown) == len(ids) + 1 and "".join(shown) == "a😀é"
    assert all("\ufffd" not in piece for piece in shown)
    assert tokenizer.decode(ids[:2]).endswith("\ufffd")


def test_decode_takes_arrays_and_tensors(tokenizer):
    import numpy as np
    import torch

    ids = tokenizer.encode("Chapter 1")
    for kind in (tuple, iter, np.array, lambda x: np.array(x, np.uint16), torch.tensor):
        assert tokenizer.decode(kind(ids)) == "Chapter 1"


@pytest.mark.parametrize("bad", [-1, 1500, 10**12])
def test_decode_unknown_id(tokenizer, bad):
    with pytest.raises(ValueError, match=f"token id {bad} is not in 0..{tokenizer.vocab_size - 1}"):
        tokenizer.decode([5, bad])


# Chunks


@pytest.mark.parametrize("size", [1, 7, 64, 1 << 16])
def test_encode_iterable_equals_encode(tokenizer, size, monkeypatch):
    monkeypatch.setattr(module._cut_safely, "__defaults__", (size,))
    rng = random.Random(size)
    for text in [*NASTY, CODE[:20_000], *(random_text(rng, 300) for _ in range(60))]:
        cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(30)))
        chunks = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
        assert list(tokenizer.encode_iterable(chunks)) == tokenizer.encode(text)


def test_every_border_is_safe():
    "Cutting at the border never changes a piece, whatever text follows."
    rng = random.Random(0)
    for _ in range(5000):
        text, more = random_text(rng, rng.randrange(1, 25)), random_text(rng, rng.randrange(6))
        if border := module._LAST_BORDER.match(text):
            left, right = text[: border.end()], text[border.end() :] + more
            assert pre_tokenize(left) + pre_tokenize(right) == pre_tokenize(text + more)


def test_space_means_the_same_to_python_and_to_the_pattern():
    "_LAST_BORDER relies on it: what Python calls visible is visible to PATTERN."
    points = (chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)
    visible = "".join(c for c in points if not c.isspace())
    at_spaces = pre_tokenizers.Split(Regex(r"\s"), "isolated")
    assert len(at_spaces.pre_tokenize_str(visible)) == 1
    assert len(at_spaces.pre_tokenize_str("a b\tc\rd\ne")) == 9


def test_encode_iterable_memory_is_constant():
    "Resident memory of a whole process: 12 million characters in about that of 1.5 million."
    code = (
        "import resource, sys; from skylar.data.tokenizer import BPETokenizer as T;"
        "t = T.train(['to be or not to be, that is the question ' * 9], 300);"
        "chunks = ('To be, or not to be: the question is.\\n' for _ in range(int(sys.argv[1])));"
        "n = sum(1 for _ in t.encode_iterable(chunks));"
        "print(n, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )

    def peak(lines: int) -> tuple[int, float]:
        done = subprocess.run(
            [sys.executable, "-c", code, str(lines)], capture_output=True, text=True, check=True,
            env={**os.environ, "RAYON_NUM_THREADS": "1"}, cwd=ROOT,
        )  # fmt: skip
        n, kilobytes = map(int, done.stdout.split())
        return n, kilobytes / 1024

    pytest.importorskip("resource")
    (few, small), (many, large) = peak(35_000), peak(280_000)
    assert many == 8 * few
    assert large < small + 15  # MB; the ids alone would be 8 times as many


# Special tokens


def test_special_tokens_come_first(tokenizer):
    assert [tokenizer._rust.token_to_id(t) for t in SPECIAL_TOKENS] == list(
        range(len(SPECIAL_TOKENS))
    )
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.special_ids == set(range(len(SPECIAL_TOKENS)))


def test_text_cannot_inject_special_tokens(tokenizer):
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(
            rng.choice([*SPECIAL_TOKENS, "<", "|", "im", ">", " ", "x", "\n"]) for _ in range(8)
        )
        for ids in (
            tokenizer.encode(text),
            *tokenizer.encode_batch([text]),
            tokenizer.encode_iterable([text]),
        ):
            ids = list(ids)
            assert not tokenizer.special_ids & set(ids)
            assert tokenizer.decode(ids) == text
        parsed = tokenizer.encode(text, allowed_special=True)
        assert tokenizer.decode(parsed) == text
        assert bool(tokenizer.special_ids & set(parsed)) == any(t in text for t in SPECIAL_TOKENS)


def test_training_text_full_of_special_tokens_learns_no_way_to_write_them():
    text = " ".join(SPECIAL_TOKENS) * 500
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained = BPETokenizer.train([text], 2000)
    assert not trained.special_ids & set(trained.encode(text))
    assert [t in SPECIAL_TOKENS for t in map(bytes.decode, trained.token_bytes[:11])] == [True] * 11


def test_pickle_keeps_the_guard(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("<eos>") == tokenizer.encode("<eos>") != [tokenizer.eos_id]


def test_skip_special(tokenizer):
    ids = [tokenizer.bos_id, *tokenizer.encode("hello"), tokenizer.eos_id]
    assert tokenizer.decode(ids) == "<bos>hello<eos>"
    assert tokenizer.decode(ids, skip_special=True) == "hello"


@pytest.mark.parametrize(
    "specials, complaint",
    [
        (("<pad>", "<bos>"), "lacks '<eos>'"),
        ((*SPECIAL_TOKENS, "<bos>"), "twice"),
        ((*SPECIAL_TOKENS, "###"), "'###' could also be learned"),
        ((*SPECIAL_TOKENS, "word"), "'word' could also be learned"),
        ((*SPECIAL_TOKENS, ""), "'' could also be learned"),
    ],
)
def test_special_tokens_refused(specials, complaint):
    with pytest.raises(ValueError, match=complaint):
        BPETokenizer.train(["a"], 400, specials)


# Wrong input


def test_lone_surrogate_is_refused_with_its_position(tokenizer):
    for wrong in ("ab\ud800c", "ab\udfff"):
        with pytest.raises(ValueError, match=r"text has a lone surrogate U\+D[8F].. at position 2"):
            tokenizer.encode(wrong)
    with pytest.raises(ValueError, match="text 1 has a lone surrogate"):
        tokenizer.encode_batch(["fine", "\ud800"])
    with pytest.raises(ValueError, match="text 1 has a lone surrogate"):
        BPETokenizer.train(["fine", "\ud800"], 300)
    with pytest.raises(ValueError, match="lone surrogate"):
        train_bpe("\ud800", 1)


def test_both_halves_of_a_pair_joined_are_fine(tokenizer):
    assert tokenizer.encode(json.loads('"\\ud83d\\ude00"')) == tokenizer.encode("😀")


@pytest.mark.parametrize("wrong", [None, 3, b"bytes", ["a"]])
def test_not_a_string(tokenizer, wrong):
    with pytest.raises(ValueError, match="must be a str, got"):
        tokenizer.encode(wrong)


def test_one_string_is_not_many_texts(tokenizer):
    for call in (
        tokenizer.encode_batch,
        BPETokenizer.train,
        lambda t: list(tokenizer.encode_iterable(t)),
    ):
        with pytest.raises(ValueError, match="put it in a list"):
            call("text")


def test_vocabulary_too_small():
    with pytest.raises(ValueError, match="vocab_size 266 is too small.*at least 267"):
        BPETokenizer.train(["text"], 266)
    assert BPETokenizer.train(["text"], 267).vocab_size == 267


@pytest.mark.parametrize("texts", [[], [""], ["abc abc"]])
def test_corpus_too_small_warns_and_works(texts):
    with pytest.warns(UserWarning, match="vocabulary is 2.., not 5000"):
        trained = BPETokenizer.train(texts, 5000)
    assert trained.decode(trained.encode("日 ok")) == "日 ok"


def test_error_inside_the_texts_comes_through():
    def texts():
        yield "fine"
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        BPETokenizer.train(texts(), 300)


# Files


def test_save_and_load(tokenizer, tmp_path):
    folder = tokenizer.save(tmp_path / "new" / "folder")
    assert sorted(p.name for p in folder.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    loaded = BPETokenizer.load(str(folder))
    assert loaded.encode(ENGLISH) == tokenizer.encode(ENGLISH)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert (
        loaded.fingerprint == hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    )
    loaded.save(folder)
    assert BPETokenizer.load(folder).fingerprint == tokenizer.fingerprint


def test_auto_tokenizer_opens_it(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer.save(tmp_path))
    assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id) == (0, 1, 2)
    assert set(theirs.all_special_tokens) == set(SPECIAL_TOKENS)
    assert len(theirs) == theirs.vocab_size == tokenizer.vocab_size
    rng = random.Random(0)
    for text in [*NASTY, ENGLISH, *(random_text(rng, 200) for _ in range(50))]:
        assert theirs(text, split_special_tokens=True)["input_ids"] == tokenizer.encode(text)
        assert theirs(text)["input_ids"] == tokenizer.encode(text, allowed_special=True)
        assert theirs.decode(tokenizer.encode(text)) == text
    padded = theirs(["a", "the fox"], padding=True)
    assert 0 in padded["input_ids"][0] + padded["input_ids"][1]
    theirs.save_pretrained(tmp_path / "again")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again(ENGLISH)["input_ids"] == tokenizer.encode(ENGLISH)


def test_load_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer at .*nowhere"):
        BPETokenizer.load(tmp_path / "nowhere")


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message and "tokenizer.json" in message
    return message


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"null", b"not json", b"\xff\xfe\x00", b'{"version": "1.0"}'],
    ids=repr,
)
def test_load_corrupt(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError) as error:
        BPETokenizer.load(tmp_path)
    assert "no readable tokenizer.json" in one_line(error)


def test_load_cut_off(tokenizer, tmp_path):
    path = tokenizer.save(tmp_path) / "tokenizer.json"
    content = path.read_bytes()
    for keep in (1, len(content) // 2, len(content) - 3):
        path.write_bytes(content[:keep])
        with pytest.raises(ValueError) as error:
            BPETokenizer.load(tmp_path)
        one_line(error)


def test_load_foreign(tokenizer, tmp_path):
    foreign = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    other_pattern = json.loads(tokenizer._content)
    other_pattern["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\s+"
    no_bos = tokenizer._content.replace('"<bos>"', '"<start>"')
    no_byte = json.loads(tokenizer._content)
    no_byte["model"]["merges"] = []
    no_byte["model"]["vocab"] = {t: i for t, i in no_byte["model"]["vocab"].items() if t != "Ċ"}
    for content in (foreign.to_str(), json.dumps(other_pattern), no_bos, json.dumps(no_byte)):
        (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
        with pytest.raises(ValueError) as error:
            BPETokenizer.load(tmp_path)
        assert "was not made by BPETokenizer.save" in one_line(error)


def test_a_failed_save_leaves_the_old_file(tokenizer, tmp_path, monkeypatch):
    tokenizer.save(tmp_path)
    other = BPETokenizer.train([ENGLISH], 400)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        other.save(tmp_path)
    monkeypatch.undo()
    assert BPETokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint
