"""assets/: the model that lessons open, and the n-gram tables that it is compared with."""

import hashlib
import json
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from skylar.data.held_out import (
    bits_per_byte,
    ngram_baseline,
    text_bits_per_byte,
    train_text,
    val_plays,
    val_text,
)
from skylar.models.hub import from_pretrained, load_tokenizer
from skylar.training.evaluate import lm_metrics
from skylar.utils.files import sha256_file

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "assets" / "shakespeare"
METRICS = json.loads((MODEL / "metrics.json").read_text())
NGRAM = json.loads((ROOT / "assets" / "ngram.json").read_text())
sys.path.insert(0, str(ROOT / "tools"))

import ngram_baseline as tables  # noqa: E402


@pytest.fixture(scope="module")
def model():
    return from_pretrained(MODEL, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


def part() -> str:
    "What metrics.json has a number for: the text is ASCII, a character is a byte."
    return val_text()[slice(*METRICS["slice"]["bytes"])]


# --- the folder -----------------------------------------------------------------------------


def test_files_are_the_ones_that_were_measured():
    assert {name: sha256_file(MODEL / name) for name in METRICS["sha256"]} == METRICS["sha256"]


def test_the_folder_is_small_and_complete():
    files = {file.name: file.stat().st_size for file in MODEL.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
            "tokenizer_config.json", "README.md", "metrics.json"} <= set(files)
    assert sum(files.values()) <= 4_000_000


def test_the_recipe_is_the_committed_one():
    from train_asset import config

    from skylar.training.run import RunConfig, build_config, stored

    recipe = stored(config())
    places = {name: recipe[name] for name in recipe.keys() - METRICS["recipe"].keys()}
    # settings that came later are at their defaults
    assert stored(build_config(RunConfig, METRICS["recipe"] | places)) == recipe
    assert {"model", "loader", "train", "optimizer", "schedule"} <= METRICS["recipe"].keys()


def test_the_card_says_what_was_measured():
    from train_asset import card

    assert (MODEL / "README.md").read_text() == card(METRICS)


def test_assets_stay_out_of_the_wheel_and_whole_in_git():
    find = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert find["find"]["include"] == ["skylar*"]
    attributes = (ROOT / ".gitattributes").read_text().splitlines()
    assert "*.safetensors binary" in attributes and "assets/** -text" in attributes


# --- the model ------------------------------------------------------------------------------


def test_bits_per_byte_of_a_part_and_clearly_below_the_best_table_there(model, tokenizer):
    found = text_bits_per_byte(model, tokenizer, part())
    assert found == pytest.approx(METRICS["slice"]["bits_per_byte"], abs=2e-3)
    assert METRICS["slice"]["bytes"] == NGRAM["slice"]["bytes"]
    assert found < NGRAM["slice"]["bits_per_byte"] - 0.1


def test_clearly_below_every_table_on_the_whole_text():
    assert METRICS["bits_per_byte"] < ngram_baseline()["bits_per_byte"] - 0.1
    assert METRICS["best_ngram"] == ngram_baseline() == NGRAM["best"]


@pytest.mark.slow
def test_bits_per_byte_of_the_whole_held_out_text(model, tokenizer):
    found = text_bits_per_byte(model, tokenizer, val_plays())
    assert found == pytest.approx(METRICS["bits_per_byte"], abs=2e-3)


def test_transformers_computes_the_same_logits(model, tokenizer):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    words = transformers.AutoTokenizer.from_pretrained(MODEL)
    ids = tokenizer.encode(part()[:600])
    assert words.encode(part()[:600], add_special_tokens=False) == ids
    batch = torch.tensor([[tokenizer.bos_id, *ids]])
    with torch.no_grad():
        torch.testing.assert_close(theirs(batch).logits, model(batch), atol=2e-4, rtol=2e-4)


# --- bits per byte --------------------------------------------------------------------------


def test_bits_per_byte_is_the_one_of_evaluate():
    for nats, size in ((3.1, 2.7), (1.2, 1.0)):
        assert bits_per_byte(nats, size) == lm_metrics(nats, size)["val_bits_per_byte"]


@pytest.mark.parametrize("context, batch_size", [(256, 16), (64, 3), (50, 1)])
def test_every_token_is_a_target_once(model, tokenizer, context, batch_size):
    text = part()[:700]
    ids = [tokenizer.bos_id, *tokenizer.encode(text)]
    nats = 0.0
    with torch.no_grad():
        for i in range(1, len(ids)):
            start = (i - 1) // context * context
            nats -= float(model(torch.tensor([ids[start:i]]))[0, -1].log_softmax(-1)[ids[i]])
            if i == 70:  # the rest in the same way
                break
        short = tokenizer.decode(ids[1:71])
    found = text_bits_per_byte(model, tokenizer, short, context, batch_size)
    if tokenizer.encode(short) == ids[1:71]:
        assert found == pytest.approx(bits_per_byte(nats / 70, len(short.encode()) / 70), abs=1e-4)
    else:
        pytest.fail("choose another place to cut")


def test_several_texts_are_weighted_by_their_bytes(model, tokenizer):
    texts = [part()[:300], part()[300:1200]]
    apart = [text_bits_per_byte(model, tokenizer, text) for text in texts]
    assert text_bits_per_byte(model, tokenizer, texts) == pytest.approx(
        (300 * apart[0] + 900 * apart[1]) / 1200, rel=1e-5)


# --- n-gram tables --------------------------------------------------------------------------


def test_the_tables_were_made_from_this_text():
    for name, text in (("train", train_text()), ("held_out", val_text())):
        data = text.encode()
        assert NGRAM["text"][name] == {"bytes": len(data),
                                       "sha256": hashlib.sha256(data).hexdigest()}


@pytest.mark.parametrize("kind", tables.GRID)
def test_probabilities_of_all_bytes_add_up_to_one(kind):
    train = train_text()[:3000].encode()
    setting = tables.GRID[kind][-1]
    for context in (b"ROMEO", b"q", b"kkkkkk", b"the "):
        total = np.zeros(6)
        for byte in sorted(set(train)):
            counted = tables.count(train, context + bytes([byte]), 6)
            total += [p[-1] for p in tables.probabilities(kind, setting, counted)]
        np.testing.assert_allclose(total, 1, atol=1e-9)


def test_a_table_is_what_plain_counting_gives():
    train, test = train_text()[:20_000].encode(), train_text()[20_000:20_100].encode()
    text, size, a = train + test, len(set(train)), 0.3
    for order in (1, 2, 4):
        wanted = 0.0
        for i in range(len(train), len(text)):
            context = text[i - order + 1:i]
            spots = [j for j in range(order - 1, len(train)) if train[j - order + 1:j] == context]
            hits = sum(train[j] == text[i] for j in spots)
            wanted -= np.log2((hits + a) / (len(spots) + a * size)) / len(test)
        counted = tables.count(train, test, order)
        assert tables.scores("add-constant", a, counted)[-1] == pytest.approx(wanted, abs=1e-9)


@pytest.mark.slow
def test_the_best_table_is_made_again_on_a_part():
    found = tables.part_of_best(train_text().encode(), val_text().encode(), NGRAM["best"])
    assert found["bytes"] == NGRAM["slice"]["bytes"]
    assert found["bits_per_byte"] == pytest.approx(NGRAM["slice"]["bits_per_byte"], abs=2e-4)


def test_settings_are_chosen_on_training_text_alone_and_repeat():
    train = train_text()[:60_000].encode()
    first = tables.tune(train, 3)
    assert first == tables.tune(train, 3) and set(first) == set(tables.GRID)
    assert all(len(settings) == 3 for settings in first.values())
