"""Presets: names of complete, typed, JSON-able configs; mistakes name the remedy."""

import json
from dataclasses import FrozenInstanceError, fields

import pytest

from skylar.models.decoder import CausalLM, count_parameters
from skylar.models.families.gpt2 import GPT2Config
from skylar.models.families.qwen3 import Qwen3Config
from skylar.models.presets import (
    ALIASES,
    DENSE,
    FAMILIES,
    PRESETS,
    config_from_dict,
    config_to_dict,
    find_family,
    get_config,
)

# D, H, K, Dh, L, F, context in K, theta, tied, true count in millions
TABLE = {
    "test": (128, 4, 4, 32, 4, 256, 4, 1e5, True, 5.9),
    "small": (512, 8, 4, 64, 8, 1024, 8, 5e5, True, 39.9),
    "small+": (640, 10, 5, 64, 10, 1792, 16, 1e6, True, 72.9),
    "medium": (768, 12, 4, 64, 12, 2048, 16, 1e6, True, 107.0),
    "medium+": (1024, 16, 4, 64, 18, 2816, 16, 1e6, True, 244.9),
    "large": (1024, 16, 4, 64, 28, 2816, 16, 5e6, True, 357.6),
    "gold": (1280, 10, 2, 128, 20, 3456, 16, 1e6, True, 396.6),
    "1b": (1536, 16, 4, 96, 32, 5120, 32, 5e6, True, 1006.7),
    "4b": (2560, 32, 8, 128, 36, 9728, 32, 1e6, True, 3738.4),
    "8b": (4096, 32, 8, 128, 36, 12288, 32, 1e6, False, 7281.6),
    "14b": (5120, 40, 8, 128, 40, 17408, 32, 1e6, False, 13631.9),
    "32b": (5120, 64, 8, 128, 64, 25600, 128, 1e6, False, 31625.7),
    "64b": (8192, 64, 8, 128, 72, 28672, 128, 1e6, False, 62278.2),
    "96b": (10240, 80, 8, 128, 80, 32768, 128, 1e6, False, 99826.1),
    "128b": (11264, 88, 8, 128, 92, 32768, 128, 1e6, False, 128263.9),
}


def test_the_fifteen_presets():
    assert list(DENSE) == list(TABLE) and len(DENSE) == 15
    assert {type(config) for config in DENSE.values()} == {Qwen3Config}
    assert DENSE.items() <= PRESETS.items()


def test_other_presets_come_after_the_dense_ones_and_are_of_their_own_family():
    assert list(PRESETS)[:15] == list(DENSE)
    brought = [name for family in FAMILIES for name in getattr(family, "presets", dict)()]
    assert brought == list(PRESETS)[15:] and len(set(brought)) == len(brought)
    for name in brought:
        assert type(PRESETS[name]) in FAMILIES and through_json(PRESETS[name]) == PRESETS[name]


@pytest.mark.parametrize("name", TABLE)
def test_every_preset_is_what_the_table_says(name):
    D, H, K, Dh, L, F, context, theta, tied, millions = TABLE[name]
    config = get_config(name).decoder()
    assert get_config(name) is not None and get_config(name) == PRESETS[name]
    block = config.blocks[0]
    heads = block.attention
    assert (config.d_model, heads.n_heads, heads.n_kv_heads, heads.d_head) == (D, H, K, Dh)
    assert (len(config.blocks), block.ffn.d_ff) == (L, F)
    assert (config.max_seq_len, heads.rope.theta) == (context * 1024, theta)
    assert config.tie_embeddings is tied and config.vocab_size == 40_960
    assert heads.qk_norm is not None and heads.rope.scaling is None
    assert count_parameters(config) / 1e6 == pytest.approx(millions, abs=0.06)


def through_json(config):
    return config_from_dict(json.loads(json.dumps(config_to_dict(config))))


def test_names_in_any_case_and_overrides():
    assert get_config("TEST", D_Model=64, d_head=16) == get_config("test", d_model=64, d_head=16)
    config = get_config("Test", vocab_size=100, dropout=0)
    assert config.vocab_size == 100 and config.dropout == 0.0
    assert type(config.dropout) is float
    assert PRESETS["test"].vocab_size == 40_960  # untouched
    assert get_config("4B") == get_config("4b")


def test_aliases():
    assert ALIASES == {"small_plus": "small+", "medium_plus": "medium+"}
    assert get_config("small_plus") == get_config("small+") == get_config("Small_Plus")
    assert get_config("MEDIUM_PLUS") == get_config("medium+")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", DENSE)
def test_every_preset_in_every_family(name, family):
    "What a family does not have is left out, what it has is kept; and all survives JSON."
    config = get_config(name, family=family.name.upper())
    assert type(config) is family
    known = {field.name for field in fields(family)}
    for key in ("vocab_size", "d_model", "n_heads", "n_kv_heads", "d_head", "n_layers", "d_ff",
                "max_seq_len", "rope_theta", "tie_embeddings"):
        assert key not in known or getattr(config, key) == getattr(PRESETS[name], key)
    assert through_json(config) == config
    assert family is Qwen3Config or config.init_std == family().init_std


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stored_config_is_complete(family):
    "A default that changes later does not change a model stored today."
    stored = config_to_dict(family())
    assert stored.keys() == {"type"} | {field.name for field in fields(family)}
    assert stored["type"] == family.__name__


def test_a_config_shares_nothing_with_what_was_given():
    stretch = {"rope_type": "linear", "factor": 2.0}
    config = get_config("test", rope_scaling=stretch)
    stretch["factor"] = 99.0
    assert config.rope_scaling["factor"] == 2.0
    with pytest.raises(FrozenInstanceError):
        config.d_model = 1


def test_a_stored_config_builds_the_same_shapes():
    small = dict(vocab_size=50, d_model=16, d_head=4, n_layers=1, max_seq_len=8)
    again = CausalLM(through_json(get_config("test", **small)))
    assert {n: p.shape for n, p in again.named_parameters()} == {
        n: p.shape for n, p in CausalLM(get_config("test", **small)).named_parameters()
    }


MISTAKES = [
    (dict(n_layer=3), "unknown qwen3 argument 'n_layer'; did you mean n_layers"),
    (dict(vocabsize=3), "did you mean vocab_size"),
    (dict(rope_thete=3.0), "did you mean rope_theta"),
    (dict(colour="red"), "unknown qwen3 argument 'colour'; choose from vocab_size, d_model"),
    (dict(window=4), "unknown qwen3 argument 'window'; choose from"),
    (dict(family="gpt2", rope_theta=1e4), "unknown gpt2 argument 'rope_theta'; choose from"),
    (dict(family="gpt2", n_kv_heads=2), "unknown gpt2 argument 'n_kv_heads'"),
    (dict(family="lama3"), "unknown family 'lama3'; did you mean llama3"),
    (dict(d_model="128"), "d_model='128' is a str; d_model must be int"),
    (dict(D_MODEL="128"), "d_model='128' is a str; d_model must be int"),
    (dict(n_layers=4.0), "n_layers=4.0 is a float; n_layers must be int"),
    (dict(n_layers=True), "n_layers=True is a bool; n_layers must be int"),
    (dict(n_layers=None), "n_layers=None is a NoneType; n_layers must be int"),
    (dict(d_head="x"), "d_head must be int . None"),
    (dict(bias=1), "bias=1 is a int; bias must be bool"),
    (dict(dropout="0.1"), "dropout must be float"),
    (dict(rope_scaling="yarn"), "rope_scaling='yarn' is a str; rope_scaling must be dict . None"),
    (dict(rope_scaling={"rope_type": "yarm", "factor": 2.0}), "yarm"),
    (dict(family="smollm3", no_rope_layers=[1]), "give 0 or 1 for each of the 4 layers"),
    (dict(family="smollm3", no_rope_layers=(0, 1)), "give 0 or 1 for each of the 4 layers"),
    (dict(family="skylar", full_every=-1), "full_every=-1: give a whole number of at least 0"),
    (dict(dropout=float("nan")), "dropout=nan"),
    (dict(init_std=float("inf")), "init_std=inf: give a number above 0"),
    (dict(n_layers=-1), "n_layers=-1: give a whole number of at least 1"),
    (dict(d_model=130, d_head=None), "d_model=130 is not divisible by n_heads=4"),
    (dict(n_kv_heads=3), "n_kv_heads=3"),
    (dict(d_model=64, D_model=32), "d_model is given twice"),
]


@pytest.mark.parametrize("overrides, message", MISTAKES, ids=lambda x: str(x)[:40])
def test_mistakes_are_refused_in_one_line(overrides, message):
    with pytest.raises(ValueError, match=message) as error:
        get_config("test", **overrides)
    assert "\n" not in str(error.value)


def test_unknown_names():
    with pytest.raises(ValueError, match="unknown preset 'tset'; did you mean test"):
        get_config("tset")
    with pytest.raises(ValueError, match="unknown preset 'zzz'; choose from test, small"):
        get_config("zzz")
    with pytest.raises(ValueError, match="unknown preset None"):
        get_config(None)
    with pytest.raises(ValueError, match="unknown family 'gtp2'; did you mean gpt2"):
        find_family("gtp2")
    for broken in ({}, {"type": "GPT3Config"}, [], None, {"type": 3}):
        with pytest.raises(ValueError, match="is no config"):
            config_from_dict(broken)


def test_every_family_is_a_frozen_dataclass_with_defaults_and_four_methods():
    for family in FAMILIES:
        assert family.__dataclass_params__.frozen and hash(family()) == hash(family())
        assert {type(family()), family.name, family.hf_model_type}
        for method in ("decoder", "to_hf", "weight_map"):
            assert callable(getattr(family, method))
        assert family.name == "skylar" or callable(family.from_hf)


def test_gpt2_has_dropouts_of_its_own():
    config = GPT2Config(dropout=0.1, attention_dropout=0.2, embedding_dropout=0.0)
    decoder = config.decoder()
    assert (decoder.dropout, decoder.blocks[0].dropout) == (0.0, 0.1)
    assert decoder.blocks[0].attention.dropout == 0.2
    assert GPT2Config.from_hf(config.to_hf()) == config
