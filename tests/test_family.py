"""Llama 3 and Qwen3: random valid configs give what transformers gives, forward and backward."""

import json
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from skylar.layers.attention import fused_attention
from skylar.layers.block import LayerNormConfig
from skylar.layers.cache import KVCache
from skylar.models.decoder import CausalLM, count_parameters, gpt2
from skylar.models.presets import (
    FAMILIES,
    PRESETS,
    describe,
    from_args,
    get_config,
    kv_bytes,
    kv_bytes_per_token,
    llama3,
    qwen3,
    resolve,
    skylar,
    weight_bytes,
)
from skylar.training.loss import NextTokenObjective

PEERS = {"llama3": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
SCALINGS = [
    None,
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {
        "rope_type": "yarn",
        "factor": 2.5,
        "original_max_position_embeddings": 24,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "attention_factor": 0.9,
    },
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
]


def random_args(family: str, seed: int) -> dict:
    """Valid arguments: sizes that do not divide each other, and corners.

    The peer refuses a Llama whose width is not a multiple of its heads; ours need not be.
    """
    draw = random.Random(seed)
    n_kv_heads = draw.choice([1, 1, 2, 3])
    n_heads = n_kv_heads * draw.randint(1, 4)
    width = draw.choice([13, 24, 37, 50, 61])
    return dict(
        vocab_size=draw.randint(11, 97),
        d_model=width if family == "qwen3" else n_heads * (width // 10),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_head=draw.choice([2, 6, 8, 14, 20]),
        n_layers=draw.randint(1, 3),
        d_ff=draw.choice([1, 17, 40, 71]),
        max_seq_len=64,
        rope_theta=draw.choice([100.0, 10_000.0, 5e5, 1e6]),
        rope_scaling=SCALINGS[seed % len(SCALINGS)],
        norm_eps=draw.choice([1e-6, 1e-5, 1e-2]),
        tie_embeddings=draw.random() < 0.5,
        bias=draw.random() < 0.3,
    )


def peer(family: str, args: dict):
    "The same model in transformers."
    config_class, model_class = PEERS[family]
    config = config_class(
        vocab_size=args["vocab_size"],
        hidden_size=args["d_model"],
        num_attention_heads=args["n_heads"],
        num_key_value_heads=args["n_kv_heads"],
        head_dim=args["d_head"],
        num_hidden_layers=args["n_layers"],
        intermediate_size=args["d_ff"],
        max_position_embeddings=args["max_seq_len"],
        rope_parameters={"rope_type": "default", "rope_theta": args["rope_theta"]}
        | (args["rope_scaling"] or {}),
        rms_norm_eps=args["norm_eps"],
        tie_word_embeddings=args["tie_embeddings"],
        attention_bias=args["bias"],
    )
    return model_class(config)


def close(ours, theirs, what):
    error, size = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    assert error <= 2e-5 * size + 1e-7, f"{what}: {error:.1e} apart, of {size:.1e}"


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("family", PEERS)
def test_random_configs_equal_transformers(family, seed):
    args = random_args(family, seed)
    torch.manual_seed(seed)
    theirs = peer(family, args)
    with torch.no_grad():
        for parameter in theirs.parameters():  # norms and biases too, and away from 0 and 1
            parameter.normal_(0.1, 0.3)
    ours = CausalLM(from_args({"family": family, "args": args}))
    ours.load_state_dict(theirs.state_dict())  # strict: every name is theirs
    ids = torch.randint(args["vocab_size"], (2, 33))
    logits, expected = ours(ids), theirs(ids).logits
    close(logits, expected, "logits")
    for out in (logits, expected):
        F.cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    mine, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert mine.keys() == other.keys()
    for name in other:
        close(mine[name].grad, other[name].grad, name)


@pytest.mark.parametrize("family", PEERS)
def test_the_random_configs_reach_every_corner(family):
    drawn = [random_args(family, seed) for seed in range(40)]
    for scaling in SCALINGS:
        assert sum(a["rope_scaling"] == scaling for a in drawn) == 8
    assert any(a["n_kv_heads"] == 1 < a["n_heads"] for a in drawn)
    assert any(a["n_kv_heads"] == a["n_heads"] > 1 for a in drawn)
    assert any(1 < a["n_kv_heads"] < a["n_heads"] for a in drawn)
    for flag in ("tie_embeddings", "bias"):
        assert {a[flag] for a in drawn} == {True, False}
    assert sum(a["d_head"] * a["n_heads"] != a["d_model"] for a in drawn) > 30


@pytest.mark.parametrize("family", PEERS)
@pytest.mark.parametrize("seed", range(10))
def test_describe_inverts_random_configs(family, seed):
    resolved = {"family": family, "args": random_args(family, seed)}
    found = json.loads(json.dumps(describe(from_args(resolved))))
    assert found["family"] == family
    assert from_args(found) == from_args(resolved)
    assert {k: v for k, v in found["args"].items() if k in resolved["args"]} == {
        k: found["args"][k] if k == "rope_scaling" else v for k, v in resolved["args"].items()
    }


OWN = [
    dict(),
    dict(ffn="swiglu"),
    dict(qk_norm=False),
    dict(window=None),
    dict(window=16, sinks=0, full_every=0),
    dict(window=16, sinks=2, full_every=3, n_layers=7, dropout=0.1),
]


@pytest.mark.parametrize("args", OWN, ids=str)
def test_describe_inverts_skylar(args):
    config = skylar(**args)
    found = json.loads(json.dumps(describe(config)))
    assert found["family"] == "skylar" and from_args(found) == config


@pytest.mark.parametrize("family", FAMILIES)
def test_describe_inverts_defaults(family):
    assert describe(FAMILIES[family]())["family"] == family
    assert from_args(describe(FAMILIES[family]())) == FAMILIES[family]()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", PRESETS)
def test_describe_inverts_presets(name, family):
    config = get_config(name, family=family)
    found = describe(config)
    assert found["family"] == family and from_args(found) == config
    assert name == "test" or found == resolve(name, family=family) or family == "gpt2"


def test_describe_names_the_simplest_family():
    "Skylar without its own parts is Qwen3 or Llama 3, and is stored as that."
    plain = dict(ffn="swiglu", window=None)
    assert describe(skylar(**plain))["family"] == "qwen3"
    assert describe(skylar(**plain, qk_norm=False))["family"] == "llama3"
    assert describe(skylar(**plain | dict(window=8, full_every=1)))["family"] == "qwen3"


def test_describe_refuses_what_no_family_builds():
    config = qwen3(n_layers=2)
    odd = [
        replace(config, norm=LayerNormConfig()),
        replace(config, attend=fused_attention),
        replace(config, blocks=(config.blocks[0], gpt2().blocks[0])),
        replace(config, blocks=(llama3(n_layers=1).blocks[0], config.blocks[0])),
    ]
    for config in odd:
        with pytest.raises(ValueError, match="no family .* builds this config") as error:
            describe(config)
        assert "\n" not in str(error.value)


def test_n_kv_heads_and_d_head_left_out():
    assert qwen3(n_kv_heads=None) == qwen3(n_kv_heads=16)
    assert qwen3(d_model=512, d_head=None) == qwen3(d_model=512, d_head=32)


def test_windows_lie_where_they_should():
    config = skylar(n_layers=8, window=16, sinks=2, full_every=4)
    windows = [block.attention.window for block in config.blocks]
    assert [w is None for w in windows] == [False, False, False, True] * 2
    assert (windows[0].size, windows[0].sinks) == (16, 2)


MISTAKES = [
    (qwen3, dict(n_layers=0), "n_layers=0 is not a size"),
    (qwen3, dict(n_kv_heads=0), "n_kv_heads=0"),
    (qwen3, dict(d_head=0), "d_head=0"),
    (qwen3, dict(init_std=0.0), "init_std=0.0"),
    (qwen3, dict(rope_scaling={"rope_type": "linear", "factor": "2"}), "factor='2'"),
    (qwen3, dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}), "lacks the field"),
    (qwen3, dict(d_model=1000, n_heads=16, d_head=None), "d_model=1000 is not divisible"),
    (llama3, dict(n_heads=6, n_kv_heads=4), "n_heads=6"),
    (llama3, dict(d_head=7), "7"),
    (llama3, dict(rope_theta=0.0), "theta=0.0"),
    (llama3, dict(norm_eps=0.0), "eps=0.0"),
    (llama3, dict(dropout=1.0), "dropout=1.0"),
    (llama3, dict(rope_scaling={"rope_type": "dynamic", "factor": 2.0}), "dynamic"),
    (llama3, dict(rope_scaling={"rope_type": "linaer", "factor": 2.0}), "linaer"),
    (skylar, dict(ffn="relu"), "unknown ffn 'relu'; did you mean relu2"),
    (skylar, dict(window=0), "0"),
    (skylar, dict(sinks=-1), "-1"),
    (skylar, dict(full_every=-1), "full_every=-1"),
]


def short(x) -> str:
    return getattr(x, "__name__", str(x))[:40]


@pytest.mark.parametrize("family, args, message", MISTAKES, ids=short)
def test_mistakes_are_refused_in_one_line(family, args, message):
    with pytest.raises(ValueError, match=message) as error:
        family(**args)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", PRESETS)
def test_counts_on_the_meta_device(name):
    "Formulas against the built module, without the memory that it would need."
    config = get_config(name)
    with torch.device("meta"):
        parameters = {id(p): p for p in CausalLM(config).parameters()}.values()
    assert sum(p.numel() for p in parameters) == count_parameters(config)
    assert sum(p.numel() * 2 for p in parameters) == weight_bytes(config)
    assert 4 * count_parameters(config) == weight_bytes(config, torch.float32)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("family", ["qwen3", "skylar"])
def test_cache_bytes_on_the_meta_device(name, family):
    config = get_config(name, family=family)
    for batch_size, n_tokens, dtype in ((1, 100, torch.bfloat16), (3, 4000, torch.float32)):
        cache = KVCache(config, batch_size, n_tokens, dtype=dtype, device="meta")
        assert cache.nbytes == kv_bytes(config, n_tokens, dtype, batch_size)
    assert kv_bytes_per_token(config) * 100 == kv_bytes(config, 100)


def test_cache_bytes_of_gpt2():
    config = gpt2(d_model=64, n_heads=4, n_layers=3)
    cache = KVCache(config, 2, 10, dtype=torch.float32, device="meta")
    assert cache.nbytes == kv_bytes(config, 10, torch.float32, 2) == 2 * 2 * 64 * 10 * 3 * 4


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_one_batch(family):
    torch.manual_seed(0)
    extra = dict(window=8, sinks=1, full_every=2) if family == "skylar" else {}
    small = dict(vocab_size=32, d_model=32, d_head=8, d_ff=64, n_layers=2, max_seq_len=32)
    model = CausalLM(get_config("test", family=family, **small, **extra))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.randint(32, (2, 33))
    for _ in range(60):
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5


@pytest.mark.parametrize("family", ["gpt2", "llama3", "qwen3", "skylar"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_compiled_training_step_has_the_same_gradients(family, packed):
    """Of the whole objective: a compiler that mistakes one hand-written gradient fails here."""
    torch.manual_seed(0)
    model = CausalLM(get_config("test", family, vocab_size=64, d_model=24, n_heads=2,
                                n_kv_heads=2, d_head=12, n_layers=2, d_ff=40, max_seq_len=32))
    ids = torch.randint(64, (3, 20))
    batch = {"input_ids": ids, "labels": ids.roll(-1, 1)}
    if packed:
        batch["document_ids"] = (torch.arange(20) > 7).long().repeat(3, 1)

    def gradients(objective):
        loss, n, _ = objective(batch)
        return loss, *torch.autograd.grad(loss / n, list(model.parameters()))

    eager = NextTokenObjective(model)
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        gradients(compiled), gradients(eager), rtol=1e-4, atol=1e-6)
