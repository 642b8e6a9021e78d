"""Presets: names resolve to complete, typed, JSON-able arguments; mistakes name the remedy."""

import json

import pytest

from skylar.models.decoder import CausalLM, count_parameters, gpt2
from skylar.models.presets import FAMILIES, PRESETS, from_args, get_config, resolve


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_resolves_and_survives_json(name):
    resolved = resolve(name)
    assert from_args(json.loads(json.dumps(resolved))) == get_config(name)


def test_the_test_preset():
    config = get_config("test")
    assert 6_000_000 < count_parameters(config) < 6_500_000
    assert config.vocab_size == 40_960 and config.max_seq_len == 4096
    assert config.d_model == 128 and len(config.blocks) == 4
    block = config.blocks[0]
    assert (block.attention.n_heads, block.attention.d_head, block.ffn.d_ff) == (4, 32, 256)


def test_names_in_any_case_and_overrides():
    assert resolve("TEST", D_Model=64, d_head=16) == resolve("test", d_model=64, d_head=16)
    config = get_config("Test", vocab_size=100, dropout=0)
    assert config.vocab_size == 100 and config.dropout == 0.0
    assert PRESETS["test"][1]["vocab_size"] == 40_960  # untouched


def test_resolved_arguments_are_complete():
    "A default that changes later does not change a model stored today."
    resolved = resolve("test")
    assert resolved["args"].keys() == gpt2.__kwdefaults__.keys()
    assert type(resolve("test", dropout=0)["args"]["dropout"]) is float


def test_a_stored_description_builds_the_same_shapes():
    small = dict(vocab_size=50, d_model=16, d_head=4, n_layers=1, max_seq_len=8)
    again = CausalLM(from_args(json.loads(json.dumps(resolve("test", **small)))))
    assert {n: p.shape for n, p in again.named_parameters()} == {
        n: p.shape for n, p in CausalLM(get_config("test", **small)).named_parameters()
    }


MISTAKES = [
    (dict(n_layer=3), "unknown gpt2 argument 'n_layer'; did you mean n_layers"),
    (dict(vocabsize=3), "did you mean vocab_size"),
    (dict(colour="red"), "unknown gpt2 argument 'colour'; choose from vocab_size, d_model"),
    (dict(d_model="128"), "d_model='128' is a str; d_model must be int"),
    (dict(D_MODEL="128"), "d_model='128' is a str; d_model must be int"),
    (dict(n_layers=4.0), "n_layers=4.0 is a float; n_layers must be int"),
    (dict(n_layers=True), "n_layers=True is a bool; n_layers must be int"),
    (dict(n_layers=None), "n_layers=None is a NoneType; n_layers must be int"),
    (dict(d_head="x"), "d_head must be int or None"),
    (dict(bias=1), "bias=1 is a int; bias must be bool"),
    (dict(dropout="0.1"), "dropout must be float"),
    (dict(n_layers=-1), "n_layers=-1 is not a size"),
    (dict(d_model=130, d_head=None), "d_model=130 is not divisible by n_heads=4"),
    (dict(d_model=64, D_model=32), "d_model is given twice"),
]


@pytest.mark.parametrize("overrides, message", MISTAKES, ids=lambda x: str(x)[:40])
def test_mistakes_are_refused_in_one_line(overrides, message):
    with pytest.raises(ValueError, match=message) as error:
        resolve("test", **overrides)
    assert "\n" not in str(error.value)


def test_unknown_names():
    with pytest.raises(ValueError, match="unknown preset 'tset'; did you mean test"):
        get_config("tset")
    with pytest.raises(ValueError, match="unknown preset 'zzz'; choose from test"):
        get_config("zzz")
    with pytest.raises(ValueError, match="unknown preset None"):
        get_config(None)
    with pytest.raises(ValueError, match="unknown family 'gtp2'; did you mean gpt2"):
        from_args({"family": "gtp2", "args": {}})
    for broken in ({}, {"family": "gpt2"}, [], {"family": "gpt2", "args": 3}):
        with pytest.raises(ValueError, match="does not describe a model"):
            from_args(broken)


def test_every_family_has_typed_keyword_arguments_with_defaults():
    for family in FAMILIES.values():
        assert family.__kwdefaults__ and not family.__defaults__
        assert family.__kwdefaults__.keys() == family.__annotations__.keys() - {"return"}
