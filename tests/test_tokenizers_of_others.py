"""Whatever tokenizer transformers opens, opens here with the same ids, or is refused in one line.

No list of cases: tokenizers are put together at random out of the parts that published ones
have, with the flags, configurations and leftovers (truncation, padding) that their files carry.
"""

import json
import random

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from skylar.data.chat import CHATML, PretrainedTokenizer
from skylar.data.tokenizer import PATTERNS

transformers = pytest.importorskip("transformers")

TRAINING = ["to be, or not to be: that is the question\nnaïve 🙂 12345 Straße " * 20,
            "Whether 'tis nobler in the mind to suffer <the slings> | and arrows im_end " * 20]
SPECIALS = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "[MASK]"]
PLAIN_ADDED = ["<think>", "</think>", "    ", "Hamlet"]
PIECES = [*SPECIALS, *PLAIN_ADDED, *"abtoe  \n'.,<|>é🙂中9", "to be", " that is", "\n\n", "  ",
          "question", "e\u0301", "HAMLET", "hamlet", "\u200d", "ﬁ"]
SAMPLES = ["", " ", "to be", " to be ", "x" * 50, *TRAINING,
           "Ciao 🙂 naïve e\u0301 中文\n\n  two\t."]


def byte_level(rng) -> Tokenizer:
    "GPT-2, Llama 3, Qwen."
    tokenizer = Tokenizer(models.BPE())
    if rng.random() < 0.4:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=rng.random() < 0.5)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(rng.choice([*PATTERNS.values()])), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    if rng.random() < 0.3:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    learn(tokenizer, trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIALS[: rng.choice([0, 4])], show_progress=False))
    return tokenizer


def sentencepiece_bpe(rng) -> Tokenizer:
    "Llama 2, Mistral, Gemma."
    learned = Tokenizer(models.BPE(unk_token="<unk>"))
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    learn(learned, trainers.BpeTrainer(
        vocab_size=150, special_tokens=SPECIALS[:3], show_progress=False))
    spec = json.loads(learned.to_str())["model"]
    pieces = SPECIALS[:3] + [f"<0x{i:02X}>" for i in range(256)]
    pieces += [t for t in spec["vocab"] if t not in SPECIALS[:3]]
    tokenizer = Tokenizer(models.BPE(
        vocab={t: i for i, t in enumerate(pieces)}, merges=[tuple(m) for m in spec["merges"]],
        unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    metaspace(tokenizer, rng)
    return tokenizer


def unigram(rng) -> Tokenizer:
    "T5, XLM-R, ALBERT."
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    learn(tokenizer, trainers.UnigramTrainer(
        vocab_size=200, special_tokens=SPECIALS[: rng.choice([1, 3, 4])], unk_token="<unk>",
        show_progress=False))
    if rng.random() < 0.5:
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def word_piece(rng) -> Tokenizer:
    "BERT."
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    lower = rng.random() < 0.5
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    learn(tokenizer, trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=SPECIALS[:4], show_progress=False))
    tokenizer.decoder = decoders.WordPiece(cleanup=rng.random() < 0.5)
    return tokenizer


def words(rng) -> Tokenizer:
    "Word by word, special tokens among them."
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    learn(tokenizer, trainers.WordLevelTrainer(special_tokens=SPECIALS[:4], show_progress=False))
    return tokenizer


def learn(tokenizer, trainer) -> None:
    tokenizer.train_from_iterator(TRAINING, trainer)


def metaspace(tokenizer, rng) -> None:
    if rng.random() < 0.5:
        tokenizer.normalizer = normalizers.Sequence([
            normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        scheme = rng.choice(["first", "always", "never"])
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            prepend_scheme=scheme, split=rng.random() < 0.5)
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0)])


def dress(tokenizer: Tokenizer, rng) -> dict:
    "Added tokens, a post-processor, truncation, padding; returns tokenizer_config.json."
    flags = lambda: {k: rng.random() < 0.15 for k in ("lstrip", "rstrip", "single_word")}  # noqa: E731
    tokenizer.add_special_tokens([AddedToken(t, special=True, **flags()) for t in SPECIALS])
    some = rng.sample(PLAIN_ADDED, rng.randrange(len(PLAIN_ADDED) + 1))
    tokenizer.add_tokens([AddedToken(t, normalized=rng.random() < 0.5, **flags()) for t in some])
    bos, eos = (("<s>", tokenizer.token_to_id("<s>")), ("</s>", tokenizer.token_to_id("</s>")))
    tokenizer.post_processor = rng.choice([
        processors.TemplateProcessing(single="$A"),
        processors.TemplateProcessing(single="<s> $A", special_tokens=[bos]),
        processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[bos, eos]),
        processors.BertProcessing(eos, bos), processors.ByteLevel(trim_offsets=True)])
    if rng.random() < 0.5:
        tokenizer.enable_truncation(rng.choice([4, 16]))
    if rng.random() < 0.5:
        tokenizer.enable_padding(length=rng.choice([None, 64]), pad_token="<pad>",
                                 pad_id=tokenizer.token_to_id("<pad>"))
    return configuration(tokenizer, rng)


def configuration(tokenizer, rng) -> dict:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>",
              "clean_up_tokenization_spaces": False, "unk_token": "<unk>"}
    full = {"__type": "AddedToken", "content": "</s>", "lstrip": rng.random() < 0.3,
            "normalized": False, "rstrip": False, "single_word": False}
    config["eos_token"] = rng.choice(["</s>", full])
    if rng.random() < 0.3:
        config["add_bos_token"], config["add_eos_token"] = rng.random() < 0.5, rng.random() < 0.5
    if rng.random() < 0.3:
        config["additional_special_tokens"] = ["<|im_start|>", "<think>"][: rng.choice([1, 2])]
    if rng.random() < 0.3:
        added = json.loads(tokenizer.to_str())["added_tokens"]
        for token in added:
            token["lstrip"] ^= rng.random() < 0.1
        config["added_tokens_decoder"] = {str(t.pop("id")): t for t in added}
    if rng.random() < 0.2:
        config["pad_token"] = "<pad>"
    return config


FAMILIES = {f.__name__: f for f in (byte_level, sentencepiece_bpe, unigram, word_piece, words)}


def build(family: str, seed: int, folder, **more):
    "A folder with a tokenizer; ours, and theirs."
    rng = random.Random(f"{family} {seed}")
    tokenizer = FAMILIES[family](rng)
    config = dress(tokenizer, rng) | more
    if "<think>" in config.get("additional_special_tokens", ()):
        tokenizer.add_tokens(["<think>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    return PretrainedTokenizer.load(folder), theirs, rng


def texts(rng, n=25) -> list[str]:
    return SAMPLES + ["".join(rng.choices(PIECES, k=rng.randrange(1, 15))) for _ in range(n)]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("family", FAMILIES)
def test_same_ids_and_text_as_transformers(family, seed, tmp_path):
    ours, theirs, rng = build(family, seed, tmp_path)
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.pad_id in (None, theirs.pad_token_id)
    start = theirs("to be")["input_ids"]
    assert ours.prefix_ids == start[: len(ours.prefix_ids)]
    assert (ours.bos_id in start) == (ours.bos_id in ours.prefix_ids)
    for text in texts(rng):
        want = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, allowed_special=True) == want, text
        assert ours.decode(want) == theirs.decode(want)
        assert ours.decode(want, True) == theirs.decode(want, skip_special_tokens=True)
        # texts that hold no added token are encoded the same, guarded or not
        if not any(t in text.casefold() for t in map(str.casefold, theirs.get_added_vocab())):
            assert ours.encode(text) == want


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("family", FAMILIES)
def test_no_text_makes_a_control_token(family, seed, tmp_path):
    "Guarded, a text never gives a special id; it is cut as transformers cuts it when told so."
    ours, theirs, rng = build(family, seed, tmp_path)
    unknown = theirs.unk_token_id
    control = set(ours.control_tokens.values()) - {unknown}
    for text in texts(rng):
        try:
            ids = ours.encode(text)
        except ValueError as error:
            assert "spells" in str(error) and len(str(error).splitlines()) == 1
            continue
        assert not control & set(ids)
        split = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ids == split or control & set(split)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("family", FAMILIES)
def test_streams_and_chunks_equal_whole(family, seed, tmp_path, monkeypatch):
    from skylar.data import tokenizer as module

    ours, _, rng = build(family, seed, tmp_path)
    monkeypatch.setattr(module, "CHUNK", 7)
    for text in texts(rng, 12):
        chunks = [text[i : i + 5] for i in range(0, len(text), 5)]
        whole = ours._vocabulary.rust.encode(text, add_special_tokens=False).ids
        assert list(ours.encode_iterable(chunks, allowed_special=True)) == whole
        assert ours.encode_batch([text, "a"], allowed_special=True)[0] == whole
        if family != "word_piece":  # its clean-up looks at what comes next
            assert "".join(ours.decode_iterable(iter(whole))) == ours.decode(whole)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("family", ["byte_level", "sentencepiece_bpe", "unigram"])
def test_chat_equals_transformers_and_cannot_be_forged(family, seed, tmp_path):
    ours, theirs, rng = build(family, seed, tmp_path, chat_template=CHATML)
    talk = [{"role": "user", "content": "to be 🙂"}, {"role": "assistant", "content": "or not?"}]
    want = theirs.apply_chat_template(talk, add_generation_prompt=True)["input_ids"]
    assert ours.chat(talk) == want
    control = [i for i in want if i in ours.control_tokens.values()]
    if any(t["single_word"] for t in ours._vocabulary.spec["added_tokens"]):
        return  # whether the template's own token counts then depends on the letter beside it
    for _ in range(30):
        role, content = ("".join(rng.choices(PIECES, k=rng.randrange(1, 5))) for _ in "ab")
        try:
            ids = ours.chat([{"role": role, "content": content}, talk[1]])
        except ValueError as error:
            assert "spells" in str(error)
            continue
        unknown = theirs.unk_token_id
        assert [i for i in ids if i in ours.control_tokens.values() and i != unknown] == [
            i for i in control if i != unknown]


def test_damaged_files_are_one_line_or_open_as_in_transformers(tmp_path):
    "400 seeded damages of the two files; nothing but a ValueError of one line may come out."
    for family in ("byte_level", "unigram"):
        folder = tmp_path / family
        folder.mkdir()
        ours, _, rng = build(family, 1, folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            content = (folder / name).read_bytes()
            for _ in range(100):
                damaged = bytearray(content)
                at = rng.randrange(len(damaged))
                if rng.random() < 0.5:
                    damaged[at] ^= 1 << rng.randrange(8)
                else:
                    del damaged[at : at + rng.choice([1, 10, 1000])]
                (folder / name).write_bytes(damaged)
                try:
                    opened = PretrainedTokenizer.load(folder)
                    opened.decode(opened.encode("to be 🙂"))
                    opened.encode("to be </s>", allowed_special=True), opened.eos_token_ids
                except ValueError as error:
                    assert len(str(error).splitlines()) == 1, error
            (folder / name).write_bytes(content)
        assert PretrainedTokenizer.load(folder).fingerprint == ours.fingerprint
