"""Llama 3 and Qwen3: random valid configs give what transformers gives, forward and backward."""

import random

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3ForCausalLM
from transformers import Qwen3Config as TheirQwen3Config

from skylar.layers.cache import KVCache
from skylar.models.decoder import CausalLM, cache_bytes, count_parameters, weight_bytes
from skylar.models.families.gpt2 import GPT2Config
from skylar.models.families.llama3 import Llama3Config
from skylar.models.families.qwen3 import Qwen3Config
from skylar.models.families.skylar import SkylarConfig
from skylar.models.presets import FAMILIES, PRESETS, find_family, get_config
from skylar.training.loss import NextTokenObjective

PEERS = {"llama3": (LlamaConfig, LlamaForCausalLM), "qwen3": (TheirQwen3Config, Qwen3ForCausalLM)}
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
    ours = CausalLM(find_family(family)(**args))
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


def test_n_kv_heads_and_d_head_left_out():
    assert Qwen3Config(n_kv_heads=None).decoder() == Qwen3Config(n_kv_heads=16).decoder()
    split = Qwen3Config(d_model=512, d_head=None)
    assert split.decoder() == Qwen3Config(d_model=512, d_head=32).decoder()


def test_windows_are_where_they_should_be():
    config = SkylarConfig(n_layers=8, window=16, num_sink_tokens=2, full_every=4)
    windows = [block.attention.window for block in config.decoder().blocks]
    assert [w is None for w in windows] == [False, False, False, True] * 2
    assert windows[0] == windows[6]
    none = SkylarConfig(window=None).decoder().blocks
    assert {block.attention.window for block in none} == {None}


@pytest.mark.parametrize("fields, expected", [
    (dict(), [1, 1, 1, 0, 1, 1]),
    (dict(no_rope_layer_interval=2), [1, 0, 1, 0, 1, 0]),
    (dict(no_rope_layers=(0, 0, 1, 1, 0, 1)), [0, 0, 1, 1, 0, 1]),
    (dict(no_rope_layers=(1, 1, 1, 1, 1, 1, 0, 0)), [1, 1, 1, 1, 1, 1]),
])
def test_layers_without_positions_are_where_they_should_be(fields, expected):
    config = find_family("smollm3")(n_layers=6, **fields)
    blocks = config.decoder().blocks
    assert [int(block.attention.rope is not None) for block in blocks] == expected


MISTAKES = [
    (Qwen3Config, dict(n_layers=0), "n_layers=0: give a whole number"),
    (Qwen3Config, dict(n_kv_heads=0), "n_kv_heads=0"),
    (Qwen3Config, dict(d_head=0), "d_head=0"),
    (Qwen3Config, dict(init_std=0.0), "init_std=0.0"),
    (Qwen3Config, dict(rope_scaling={"rope_type": "linear", "factor": "2"}), "factor='2'"),
    (Qwen3Config, dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}), "lacks the field"),
    (Qwen3Config, dict(d_model=1000, n_heads=16, d_head=None), "d_model=1000 is not divisible"),
    (Llama3Config, dict(n_heads=6, n_kv_heads=4), "n_heads=6"),
    (Llama3Config, dict(d_head=7), "7"),
    (Llama3Config, dict(rope_theta=0.0), "rope_theta=0.0"),
    (Llama3Config, dict(norm_eps=0.0), "norm_eps=0.0"),
    (Llama3Config, dict(dropout=1.0), "dropout=1.0"),
    (Llama3Config, dict(rope_scaling={"rope_type": "dynamic", "factor": 2.0}), "dynamic"),
    (Llama3Config, dict(rope_scaling={"rope_type": "linaer", "factor": 2.0}), "linaer"),
    (SkylarConfig, dict(window=0), "0"),
    (SkylarConfig, dict(num_sink_tokens=-1), "-1"),
    (SkylarConfig, dict(full_every=-1), "full_every=-1"),
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


def reserves(config) -> bool:
    "Whether all of a static cache is allocated at once; a windowed layer's grows to its window."
    return not any(getattr(b.attention, "window", None) for b in config.decoder().blocks)


@pytest.mark.parametrize("name", [name for name, config in PRESETS.items() if reserves(config)])
def test_cache_bytes_on_the_meta_device(name):
    config = get_config(name)
    for batch_size, n_tokens, dtype in ((1, 100, torch.bfloat16), (3, 4000, torch.float32)):
        cache = KVCache(config, batch_size, n_tokens, dtype=dtype, device="meta")
        assert cache.nbytes == cache_bytes(config, n_tokens, dtype, batch_size)
    assert cache_bytes(config, 1) * 100 == cache_bytes(config, 100)


def test_cache_bytes_of_gpt2():
    config = GPT2Config(d_model=64, n_heads=4, n_layers=3)
    cache = KVCache(config, 2, 10, dtype=torch.float32, device="meta")
    assert cache.nbytes == cache_bytes(config, 10, torch.float32, 2) == 2 * 2 * 64 * 10 * 3 * 4


@pytest.mark.parametrize("family", [family.name for family in FAMILIES])
def test_every_family_learns_one_batch(family):
    torch.manual_seed(0)
    extra = {"skylar": dict(window=8, num_sink_tokens=1, full_every=2),
             "qwen3_moe": dict(n_experts=4, top_k=2),
             "deepseek_v3": dict(n_experts=8, d_expert=16, top_k=2, n_groups=2, topk_groups=1,
                                 q_lora_rank=None, kv_lora_rank=8, first_dense=1,
                                 qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
             }.get(family, {})
    small = dict(vocab_size=32, d_model=32, d_head=8, d_ff=64, n_layers=2, max_seq_len=32)
    if family == "deepseek_v3":  # its heads have three widths of their own
        del small["d_head"]
    model = CausalLM(get_config("test", family=family, **small, **extra))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.randint(32, (2, 33))
    for _ in range(60):
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5


@pytest.mark.parametrize("family", ["gpt2", "smollm3", "qwen3", "skylar"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_compiled_training_step_has_the_same_gradients(family, packed):
    """Of the whole objective: a compiler that mistakes one hand-written gradient fails here."""
    torch.manual_seed(0)
    heads = {} if family == "gpt2" else {"n_kv_heads": 2}
    model = CausalLM(get_config("test", family, vocab_size=64, d_model=24, n_heads=2, **heads,
                                d_head=12, n_layers=2, d_ff=40, max_seq_len=32))
    ids = torch.randint(64, (3, 20))
    batch = {"input_ids": ids, "labels": ids.roll(-1, 1)}
    if packed:
        batch["document_ids"] = (torch.arange(20) > 7).long().repeat(3, 1)

    def gradients(objective):
        loss, n, *_ = objective(batch)
        return loss, *torch.autograd.grad(loss / n, list(model.parameters()))

    eager = NextTokenObjective(model)
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        gradients(compiled), gradients(eager), rtol=1e-4, atol=1e-6)
