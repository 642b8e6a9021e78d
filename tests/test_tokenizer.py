"""The tokenizer where it could break: ties, borders, forged tokens, odd Unicode, damaged files."""

import hashlib
import itertools
import json
import os
import pickle
import random
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from skylar.data import tokenizer as module
from skylar.data.tokenizer import (
    CHAR_TO_BYTE,
    PATTERNS,
    SPECIAL_TOKENS,
    BPETokenizer,
    decode_bpe,
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
SOURCES = sorted(p for p in (ROOT / "skylar").rglob("*.py") if p.name != "_modidx.py")
CODE = "\n".join(p.read_text(encoding="utf-8") for p in SOURCES)[:60_000]
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


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=list(PATTERNS))
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
def test_scratch_equals_rust(text, pattern):
    rust = module._train_rust([text], 256 + 700, (), pattern)
    merges = train_bpe(text, 700, pattern=pattern)
    assert merges == rust_merges(rust)
    for sample in [*NASTY, ENGLISH[:5000], CODE[:5000]]:
        ids = encode_bpe(sample, merges, pattern)
        assert ids == rust.encode(sample).ids
        assert decode_bpe(ids, merges) == sample
        assert decode_bpe(ids[1::2], merges) == rust.decode(ids[1::2])


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
        rust = tokenizer._vocabulary._rust
        assert tokenizer.decode(ids) == rust.decode(ids, skip_special_tokens=False)
        assert tokenizer.decode(ids, skip_special=True) == tokenizer._vocabulary._rust.decode(ids)


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


@pytest.mark.parametrize("bad", [-1, 2**32, 10**12])
def test_decode_what_is_no_id(tokenizer, bad):
    with pytest.raises(ValueError, match=f"{bad} is no token id"):
        tokenizer.decode([5, bad])
    with pytest.raises(ValueError, match=f"{bad} is no token id"):
        list(tokenizer.decode_iterable([5, bad]))


def test_rows_of_a_padded_vocabulary_decode_to_nothing(tokenizer):
    one, two = tokenizer.encode("the"), tokenizer.encode(" word")
    for row in (tokenizer.vocab_size, 10**9):
        assert tokenizer.decode([*one, row, *two]) == "the word"
        assert "".join(tokenizer.decode_iterable([*one, row, *two])) == "the word"


def test_decode_after_a_context(tokenizer):
    "The prompt may end in the middle of a character."
    ids = tokenizer.encode("the 🧑 word")
    text = tokenizer.decode(ids)
    for cut in range(len(ids) + 1):
        rest = "".join(tokenizer.decode_iterable(iter(ids[cut:]), context=ids[:cut]))
        assert tokenizer.decode(ids[:cut]).rstrip("\ufffd") + rest == text


def test_decoding_is_fast(tokenizer):
    "Against one table look-up a token in Python; it was 10 times slower when it went id by id."
    ids = tokenizer.encode(CODE) * 10
    table = tokenizer.token_bytes
    tokenizer.decode(ids)

    def seconds(work):
        def once():
            start = time.perf_counter()
            work()
            return time.perf_counter() - start

        return min(once() for _ in range(7))

    plain = seconds(lambda: b"".join([table[i] for i in ids]).decode("utf-8", "replace"))
    assert seconds(lambda: tokenizer.decode(ids)) < 3 * plain


# Chunks


@pytest.mark.parametrize("size", [1, 7, 64, 1 << 16])
def test_encode_iterable_equals_encode(tokenizer, size, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", size)
    rng = random.Random(size)
    for text in [*NASTY, CODE[:20_000], *(random_text(rng, 300) for _ in range(60))]:
        cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(30)))
        chunks = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
        assert list(tokenizer.encode_iterable(chunks)) == tokenizer.encode(text)


@pytest.mark.parametrize("name", PATTERNS)
def test_every_border_is_safe(name):
    "Cutting at the border never changes a piece, whatever text follows."
    rng = random.Random(0)
    pattern, found = PATTERNS[name], 0
    for _ in range(5000):
        text, more = random_text(rng, rng.randrange(1, 25)), random_text(rng, rng.randrange(6))
        if border := module.BORDERS[pattern].match(text):
            found += 1
            left, right = text[: border.end()], text[border.end() :] + more
            cut = pre_tokenize(left, pattern) + pre_tokenize(right, pattern)
            assert cut == pre_tokenize(text + more, pattern)
    assert found > 1000


@pytest.mark.parametrize("pattern", [*PATTERNS, r"\w+|\s", r"[^\n]+\n?"])
@pytest.mark.parametrize("size", [5, 64])
def test_long_texts_in_parts_equal_whole(pattern, size, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", size)
    trained = BPETokenizer.train([ENGLISH], 400, pattern=pattern)
    rng = random.Random(size)
    texts = [CODE[:3000], *(random_text(rng, 300) for _ in range(40))]
    for text, ids in zip(texts, trained.encode_batch(texts)):
        whole = trained._vocabulary._literal.encode(text, add_special_tokens=False).ids
        assert ids == trained.encode(text) == whole
        assert list(trained.encode_iterable([text[:70], text[70:]])) == whole


@pytest.mark.parametrize("special", ["<|end|>", "<| end |>", "<end>\n"])
def test_encode_iterable_with_special_tokens(special, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 6)
    trained = BPETokenizer.train([ENGLISH], 400, [special])
    text = f"{special}one two {special}\n\nthree {special} {special}{special}four five\n{special}"
    whole = trained._vocabulary._rust.encode(text, add_special_tokens=False).ids
    for step in (1, 3, 100):
        chunks = [text[i : i + step] for i in range(0, len(text), step)]
        assert list(trained.encode_iterable(chunks, allowed_special=True)) == whole
        assert trained.special_ids.isdisjoint(trained.encode_iterable(chunks))
    assert trained.encode_batch([text], allowed_special=True) == [whole]
    assert whole.count(0) == 6


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
    assert [tokenizer._vocabulary._rust.token_to_id(t) for t in SPECIAL_TOKENS] == list(
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
    names = [trained.token_bytes[i].decode() for i in range(11)]
    assert names == list(SPECIAL_TOKENS)


def test_training_text_is_split_at_special_tokens():
    "No merge crosses one; the longest one wins; what is declared can always be told from text."
    specials = ("###", "####", "word", "<x>")
    text = "### a #### b word<x>words ##### <x><x> swords"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained = BPETokenizer.train([text] * 50, 600, specials)
        parts = ["", " a ", " b ", "", "s ", "# ", "", " s", "s"]
        assert trained.merges == BPETokenizer.train(parts * 50, 600, specials).merges
    assert not trained.special_ids & set(trained.encode(text * 3))
    assert trained.decode(trained.encode(text, allowed_special=True)) == text
    assert trained.encode("####", allowed_special=True) == [1]


def test_roles_are_optional_and_configurable(tmp_path):
    bare = BPETokenizer.train([ENGLISH], 300, ())
    assert (bare.pad_id, bare.bos_id, bare.eos_id) == (None, None, None)
    assert bare.prefix_ids == [] and bare.eos_token_ids == () and bare.special_ids == set()
    assert bare.decode(bare.encode(ENGLISH)) == ENGLISH
    end = ["<|endoftext|>", "<bos>"]
    named = BPETokenizer.train([ENGLISH], 300, end, roles={"eos": end[0], "pad": end[0]})
    loaded = BPETokenizer.load(named.save(tmp_path))
    for same in (named, loaded, pickle.loads(pickle.dumps(loaded))):
        assert (same.pad_id, same.bos_id, same.eos_id) == (0, None, 0)
        assert same.eos_token_ids == (0,) and same.prefix_ids == []
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.eos_token_id, theirs.bos_token_id) == (0, None)
    with pytest.raises(ValueError, match="eos token '<end>' is not one of the special"):
        BPETokenizer.train([ENGLISH], 300, end, roles={"eos": "<end>"})
    with pytest.raises(ValueError, match="unknown role 'bso'; did you mean bos"):
        BPETokenizer.train([ENGLISH], 300, end, roles={"bso": "<bos>"})


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
        ((*SPECIAL_TOKENS, "<bos>"), "twice"),
        ((*SPECIAL_TOKENS, "a"), "'a' is plain text"),
        ((*SPECIAL_TOKENS, "Ġ"), "'Ġ' is plain text"),
        ((*SPECIAL_TOKENS, " "), "' ' is plain text"),
        ((*SPECIAL_TOKENS, ""), "'' is plain text"),
        ((*SPECIAL_TOKENS, "\ud800<"), "lone surrogate"),
        ((*SPECIAL_TOKENS, 3), "must be a str, got int"),
    ],
)
def test_special_tokens_refused(specials, complaint):
    with pytest.raises(ValueError, match=complaint):
        BPETokenizer.train(["a"], 400, specials)


def test_special_token_that_a_merge_would_spell():
    "In the file, bytes are written as characters: `Ġthe` there is the text ` the`."
    with pytest.raises(ValueError, match="'Ġthe' is also made by a merge"):
        BPETokenizer.train([" the the the the"] * 9, 300, ["Ġthe"])


# Patterns


def test_patterns_cut_as_their_models_do():
    text = "aBigStep's\n\n  IT'S 12345!/\n/x"
    cut = {name: pre_tokenize(text, pattern) for name, pattern in PATTERNS.items()}
    assert cut == {
        "cl100k": ["aBigStep", "'s", "\n\n", " ", " IT", "'S", " ", "123", "45", "!/\n", "/x"],
        "gpt2": ["aBigStep", "'s", "\n\n ", " IT", "'", "S", " 12345", "!/", "\n", "/", "x"],
        "qwen2": ["aBigStep", "'s", "\n\n", " ", " IT", "'S", " ", *"12345", "!/\n", "/x"],
        "o200k": ["a", "Big", "Step's", "\n\n", " ", " IT'S", " ", "123", "45", "!/\n/", "x"],
    }


@pytest.mark.parametrize("pattern", [*PATTERNS, r"\w+|\s+|[^\w\s]+", r"[a-z]+", r"a*"])
def test_any_pattern_trains_saves_and_opens(pattern, tmp_path):
    trained = BPETokenizer.train([ENGLISH, CODE], 600, pattern=pattern)
    loaded = BPETokenizer.load(trained.save(tmp_path))
    assert loaded.pattern == trained.pattern == PATTERNS.get(pattern, pattern)
    merges = trained.merges
    ids = [i + len(SPECIAL_TOKENS) for i in encode_bpe(CODE, merges, trained.pattern)]
    assert loaded.encode(CODE) == trained.encode(CODE) == ids
    for text in NASTY:
        assert loaded.decode(loaded.encode(text)) == text


@pytest.mark.parametrize("pattern, message", [
    ("cl200k", "unknown pattern 'cl200k'; did you mean"), ("GPT3", "unknown pattern 'GPT3'"),
    ("(a", "pattern '.a': "), ("", "empty pattern; choose from cl100k"),
])  # fmt: skip
def test_wrong_patterns_are_one_line(pattern, message):
    with pytest.raises(ValueError, match=message) as error:
        BPETokenizer.train([ENGLISH], 300, pattern=pattern)
    assert "\n" not in str(error.value)


# Built from a vocabulary made elsewhere


def vocabulary(merges):
    tokens = [bytes([b]) for b in range(256)] + [left + right for left, right in merges]
    return dict(enumerate(tokens))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_from_vocab(pattern, tmp_path):
    "Bytes in their natural order, special tokens last: the layout of GPT-2's teachers."
    merges = train_bpe(ENGLISH + CODE, 400, pattern=PATTERNS[pattern])
    vocab = vocabulary(merges)
    built = BPETokenizer.from_vocab(vocab, merges, ["<|endoftext|>"], pattern)
    natural = {i: module.BYTE_ORDER[i] if i < 256 else i for i in range(256 + len(merges))}
    for text in [*NASTY, ENGLISH, CODE[:5000]]:
        want = [natural[i] for i in encode_bpe(text, merges, PATTERNS[pattern])]
        assert built.encode(text) == want and built.decode(want) == text
    assert built.merges == merges and built.vocab_size == len(vocab) + 1
    assert built.encode("a<|endoftext|>b", allowed_special=True) == [97, len(vocab), 98]
    loaded = BPETokenizer.load(built.save(tmp_path))
    assert loaded.encode(CODE) == built.encode(CODE)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(CODE + "<|endoftext|>")["input_ids"] == [*built.encode(CODE), len(vocab)]


def test_from_vocab_with_special_tokens_inside_and_gaps():
    merges = [(b"a", b"b"), (b"ab", b"c")]
    vocab = {10 + i: bytes([i]) for i in range(256)} | {300: b"ab", 3: b"abc", 0: b"<|end|>"}
    built = BPETokenizer.from_vocab(vocab, merges, ["<|end|>", "<|x|>"], roles={"eos": "<|end|>"})
    assert built.encode("abcab") == [3, 300] and built.eos_id == 0
    assert built.encode("<|x|><|end|>abc", allowed_special=True) == [301, 0, 3]
    assert built.decode([0, 3, 5, 300, 301]) == "<|end|>abcab<|x|>"
    assert built.vocab_size == 302


@pytest.mark.parametrize("change, message", [
    (lambda v: v.pop(65), "lacks the byte 65"),
    (lambda v: v.pop(256), r"merge b'a' \+ b'b' needs b'ab'"),
    (lambda v: v.update({900: b"ab"}), "two ids for the same bytes"),
])  # fmt: skip
def test_from_vocab_refuses_what_does_not_fit(change, message):
    vocab = vocabulary([(b"a", b"b")])
    change(vocab)
    with pytest.raises(ValueError, match=message):
        BPETokenizer.from_vocab(vocab, [(b"a", b"b")])


def test_progress_of_the_training():
    calls = []
    documents = [CODE[i : i + 1000] for i in range(10_000, 20_000, 1000)]
    trained = BPETokenizer.train(documents, 400, progress=lambda *call: calls.append(call))
    assert calls == [("reading", 1000 * i) for i in range(1, 11)] + [("merging", 0)]
    assert trained.fingerprint == BPETokenizer.train(documents, 400).fingerprint


def peak_megabytes(code: str, *args) -> float:
    pytest.importorskip("resource")
    code += "; import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, check=True,
        env={**os.environ, "RAYON_NUM_THREADS": "2"}, cwd=ROOT,
    )  # fmt: skip
    return float(done.stdout.split()[-1])


def test_one_giant_document_costs_little_memory():
    "32 MB in one string took 128 bytes of memory a byte."
    code = (
        "import sys; from skylar.data.tokenizer import BPETokenizer as T;"
        "text = 'To be, or not to be: that is the question 1234.\\n' * int(sys.argv[1]);"
        "t = T.train([text], 300); print(len(t.encode(text)))"
    )
    small, large = peak_megabytes(code, 20_000), peak_megabytes(code, 320_000)
    assert large - small < 350  # MB; the text is 15, its ids 60 to 120


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
    other_cut = json.loads(tokenizer.files["tokenizer.json"])
    other_cut["pre_tokenizer"]["pretokenizers"][0]["behavior"] = "Removed"
    random_merges = json.loads(tokenizer.files["tokenizer.json"])
    random_merges["model"]["dropout"] = 0.1
    lower = json.loads(tokenizer.files["tokenizer.json"]) | {"normalizer": {"type": "Lowercase"}}
    no_byte = json.loads(tokenizer.files["tokenizer.json"])
    no_byte["model"]["merges"] = []
    no_byte["model"]["vocab"] = {t: i for t, i in no_byte["model"]["vocab"].items() if t != "Ċ"}
    for spec in (json.loads(foreign.to_str()), other_cut, random_merges, lower, no_byte):
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
        with pytest.raises(ValueError) as error:
            BPETokenizer.load(tmp_path)
        assert "was not made by BPETokenizer.save" in one_line(error)


TRUNCATION = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 16}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
    "pad_type_id": 0, "pad_token": "<pad>",
}  # fmt: skip


@pytest.mark.parametrize(
    "more", [{"truncation": TRUNCATION}, {"padding": PADDING},
             {"truncation": TRUNCATION, "padding": PADDING}],
    ids=["cut", "pad", "both"])
def test_truncation_and_padding_are_not_obeyed(tokenizer, tmp_path, more):
    path = tokenizer.save(tmp_path) / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | more), encoding="utf-8")
    loaded = BPETokenizer.load(tmp_path)
    for allowed in (True, False):
        ids = tokenizer.encode(ENGLISH, allowed)
        assert loaded.encode(ENGLISH, allowed) == ids
        assert loaded.encode_batch([ENGLISH, "a"], allowed) == [ids, tokenizer.encode("a")]
        assert list(loaded.encode_iterable([ENGLISH], allowed)) == ids


def test_a_link_out_of_the_folder_is_not_followed(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "a")
    (tmp_path / "b").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "b" / name).symlink_to(tmp_path / "a" / name)
        with pytest.raises(ValueError, match="is a link out of its folder"):
            BPETokenizer.load(tmp_path / "b")
        (tmp_path / "b" / name).unlink()
        (tmp_path / "b" / name).write_bytes((tmp_path / "a" / name).read_bytes())
    assert BPETokenizer.load(tmp_path / "b").fingerprint == tokenizer.fingerprint


def test_damage_is_one_line_or_changes_nothing_but_what_it_says(tmp_path):
    "300 seeded damages: a tokenizer or a ValueError of one line, never anything else."
    trained = BPETokenizer.train([ENGLISH], 400)
    trained.save(tmp_path)
    rng = random.Random(0)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = (tmp_path / name).read_bytes()
        for _ in range(150):
            damaged = bytearray(content)
            at = rng.randrange(len(damaged))
            if rng.random() < 0.5:
                damaged[at] ^= 1 << rng.randrange(8)
            else:
                del damaged[at : at + rng.choice([1, 10, 1000])]
            (tmp_path / name).write_bytes(damaged)
            try:
                opened = BPETokenizer.load(tmp_path)
                opened.decode(opened.encode(ENGLISH[:500]))
                if name == "tokenizer.json":
                    assert opened.fingerprint != trained.fingerprint
            except ValueError as error:
                assert len(str(error).splitlines()) == 1 and name in str(error)
        (tmp_path / name).write_bytes(content)


def test_a_failed_save_leaves_the_old_file(tokenizer, tmp_path, monkeypatch):
    tokenizer.save(tmp_path)
    other = BPETokenizer.train([ENGLISH], 400)

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        other.save(tmp_path)
    monkeypatch.undo()
    assert BPETokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint
