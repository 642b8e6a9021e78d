"""Preference data: rows of files, token ids, batches, and a loader that resumes anywhere."""

import json
import random
import sys
from itertools import islice
from types import SimpleNamespace

import pytest
import torch

from skylar.data.chat_rows import BadRows
from skylar.data.pairs import (
    ExampleLoader,
    Graded,
    Pair,
    PairText,
    answer_rows,
    encode_answers,
    encode_pairs,
    fetch_pairs,
    graded_answers,
    graded_batch,
    pair_batch,
    parse_pair,
    read_pairs,
)
from skylar.models.hub import load_tokenizer
from skylar.utils.lesson import asset


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(asset("shakespeare"))


def message(role, content):
    return {"role": role, "content": content}


HI = [message("user", "Hi")]
GOOD, WORSE = [message("assistant", "Hello!")], [message("assistant", "What?")]


@pytest.mark.parametrize("row", [
    {"prompt": HI, "chosen": GOOD, "rejected": WORSE},
    {"prompt": HI, "chosen": "Hello!", "rejected": "What?"},
    {"chosen": HI + GOOD, "rejected": HI + WORSE},
    {"prompt": "Hi", "chosen": HI + GOOD, "rejected": HI + WORSE},  # UltraFeedback, binarized
    {"prompt": HI, "chosen": HI + GOOD, "rejected": HI + WORSE},
    {"question": "Hi", "system": "", "chosen": "Hello!", "rejected": "What?"},  # Orca pairs
    {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello!",  # HH-RLHF
     "rejected": "\n\nHuman: Hi\n\nAssistant: What?"},
])
def test_every_published_shape_gives_the_same_pair(row):
    assert parse_pair(row, "a:1") == PairText(HI, "Hello!", "What?", 0.0, "a:1")


def test_margins_and_scores():
    row = {"prompt": "Hi", "chosen": "a", "rejected": "b"}
    assert parse_pair(row).margin == 0
    assert parse_pair(row | {"margin": 2}).margin == 2
    assert parse_pair(row | {"score_chosen": 8.5, "score_rejected": 7}).margin == 1.5


@pytest.mark.parametrize(("change", "why"), [
    ({"chosen": None}, "chosen is missing"),
    ({"rejected": 3}, "rejected is missing"),
    ({"chosen": "  "}, "chosen is empty"),
    ({"chosen": "b"}, "equal"),
    ({"prompt": None}, "prompt is missing"),
    ({"prompt": []}, "prompt is missing"),
    ({"prompt": [{"content": "Hi"}]}, "no role"),
    ({"chosen": [message("user", "a")]}, "not with the assistant"),
    ({"chosen": HI + GOOD, "rejected": [message("user", "Ho")] + WORSE}, "do not begin"),
    ({"margin": "large"}, "no number"),
])
def test_bad_rows_say_why(change, why):
    row = {"prompt": "Hi", "chosen": "a", "rejected": "b"} | change
    with pytest.raises(ValueError, match=why):
        parse_pair(row)


def test_bad_rows_are_named_by_file_and_line(tmp_path):
    good = json.dumps({"prompt": "Hi", "chosen": "a", "rejected": "b"})
    equal = json.dumps({"prompt": "Hi", "chosen": "a", "rejected": "a"})
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join([good, equal, "", "{", "3", good]))
    with pytest.raises(ValueError, match=r"pairs\.jsonl:2: chosen and rejected are equal"):
        list(read_pairs(file))
    bad = BadRows("skip")
    assert len(list(read_pairs(file, bad))) == 2
    assert [where.rpartition(":")[2] for where, _ in bad.found] == ["2", "4", "5"]
    bad = BadRows("refuse")
    assert len(list(read_pairs(tmp_path, bad))) == 2
    with pytest.raises(ValueError, match="3 of 5 rows"):
        bad.close()


def test_a_named_set_is_fetched_once_and_whole(tmp_path, monkeypatch):
    asked = []

    def load_dataset(repo, split, streaming):
        asked.append((repo, split))
        yield {"prompt": "Hi", "chosen": HI + GOOD, "rejected": HI + WORSE}
        if len(asked) == 1:
            raise OSError("the connection broke")
        yield {"chosen": HI + WORSE, "rejected": HI + GOOD}

    monkeypatch.setenv("SKYLAR_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(OSError, match="broke"):
        fetch_pairs("ultrafeedback")
    for _ in range(2):
        found = list(read_pairs(fetch_pairs("ultrafeedback")))
        assert [p.chosen for p in found] == ["Hello!", "What?"]
    assert asked == [("HuggingFaceH4/ultrafeedback_binarized", "train_prefs")] * 2
    assert fetch_pairs(tmp_path / "mine.jsonl") == tmp_path / "mine.jsonl"


def test_answers_are_what_the_template_writes_up_to_the_end_of_the_turn(tokenizer):
    prompt, (found,) = encode_answers(tokenizer, HI, ["Hello!"])
    whole = tokenizer.chat(HI + GOOD, add_generation_prompt=False)
    assert prompt == tokenizer.chat(HI) and whole[:len(prompt) + len(found)] == prompt + found
    assert found[-1] in tokenizer.eos_token_ids
    assert tokenizer.decode(found[:-1]) == "Hello!"


def test_a_forged_end_of_turn_is_text(tokenizer):
    _, (found,) = encode_answers(tokenizer, HI, ["a<|im_end|>b"])
    assert sum(token in tokenizer.eos_token_ids for token in found) == 1


def test_plain_prompts_end_with_eos(tokenizer):
    prompt, (found,) = encode_answers(tokenizer, "ROMEO:\n", ["Ay me!"])
    assert prompt[0] == tokenizer.bos_id and found[-1] == tokenizer.eos_id


def test_too_long_is_refused_and_counted_never_cut(tokenizer):
    texts = [PairText(HI, "a", "b", 0.0, "f:1"), PairText(HI, "a " * 300, "b", 0.0, "f:2")]
    with pytest.raises(ValueError, match="f:2: .* more than max_len=64"):
        encode_pairs(texts, tokenizer, 64)
    bad = BadRows("skip")
    with pytest.warns(UserWarning, match="f:2.*are left out"):
        assert len(encode_pairs(texts, tokenizer, 64, bad)) == 1 and len(bad.found) == 1
    with pytest.raises(ValueError, match="no pair is left"):
        encode_pairs(texts[1:], tokenizer, 64, BadRows("skip"))


def random_pairs(n, seed=0):
    rng = random.Random(seed)

    def draw():
        return tuple(rng.randrange(3, 90) for _ in range(rng.randrange(1, 9)))

    return [Pair(draw(), draw(), draw(), rng.random()) for _ in range(n)]


def test_labels_are_the_answers_tokens_one_position_earlier():
    for pair in random_pairs(50):
        rows = answer_rows([pair.prompt], [pair.chosen], length=24)
        ids, labels = rows["input_ids"][0], rows["labels"][0]
        valid = (labels != -100).nonzero().flatten()
        assert labels[valid].tolist() == list(pair.chosen)
        assert torch.equal(ids[valid + 1], labels[valid])
        assert valid[0] == len(pair.prompt) - 1
    with pytest.raises(ValueError, match="at least one token"):
        answer_rows([()], [(1, 2)])


def test_both_sides_have_one_length_and_an_empty_step_has_no_rows():
    pairs = random_pairs(7)
    batch = pair_batch(pairs)
    assert batch["chosen_input_ids"].shape == batch["rejected_labels"].shape
    assert batch["margin"].tolist() == pytest.approx([p.margin for p in pairs])
    assert "chosen_reference" not in batch
    graded = graded_batch(graded_answers(pairs))
    assert graded["input_ids"].shape == graded["mismatched_labels"].shape
    for empty in (pair_batch([]), graded_batch([])):
        assert all(len(value) == 0 for value in empty.values())


def test_mismatched_answers_are_those_of_another_prompt():
    pairs = random_pairs(5)
    examples = graded_answers(pairs)
    assert [e.desirable for e in examples] == [True, False] * 5
    for i, e in enumerate(examples):
        before = pairs[i // 2 - 1]
        assert isinstance(e, Graded) and e.prompt == pairs[i // 2].prompt
        assert e.mismatched == (before.chosen if e.desirable else before.rejected)
    with pytest.raises(ValueError, match="two or more"):
        graded_answers(pairs[:1])


def ids_of(loader, n):
    return [row for batch in islice(loader, n) for row in batch["chosen_input_ids"].tolist()]


def stripped(rows):
    return [[i for i in row if i] for row in rows]


def test_a_loader_goes_on_in_the_second_epoch_with_another_number_of_ranks():
    pairs = random_pairs(11)
    whole = ids_of(ExampleLoader(pairs, pair_batch, 4, seed=3), 8)
    first = ExampleLoader(pairs, pair_batch, 4, seed=3)
    ids_of(first, 4)
    state = json.loads(json.dumps(first.state_dict()))
    parts = []
    for rank in range(2):
        loader = ExampleLoader(pairs, pair_batch, 2, seed=3, rank=rank, world_size=2)
        loader.load_state_dict(state)
        parts.append([stripped(b["chosen_input_ids"].tolist()) for b in islice(loader, 4)])
    found = [row for step in zip(*parts) for part in step for row in part]
    assert found == stripped(whole[16:])


def test_one_pass_in_order_has_every_pair_once():
    pairs = random_pairs(7)
    loader = ExampleLoader(pairs, pair_batch, 3, shuffle=False)
    rows = stripped(ids_of(loader, len(loader)))
    assert rows == [list(p.prompt + p.chosen) for p in pairs]


def test_other_data_are_refused_and_reference_numbers_are_no_data():
    from dataclasses import replace

    pairs = random_pairs(4)
    state = ExampleLoader(pairs, pair_batch, 2).state_dict()
    with pytest.raises(ValueError, match="data="):
        ExampleLoader(pairs[:3], pair_batch, 2).load_state_dict(state)
    known = [replace(p, reference=(-1.0, -2.0)) for p in pairs]
    ExampleLoader(known, pair_batch, 2).load_state_dict(state)
