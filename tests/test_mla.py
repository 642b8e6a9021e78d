"""Multi-head latent attention: against transformers, one query at a time, cached in any chunks."""

import json
import math
import random
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from attention_cases import in_chunks, placed, random_chunks, random_documents
from parity import close
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from skylar.inference.cpu_fused import can_fuse, why_not_fused
from skylar.inference.generate import generate
from skylar.layers.attention_backends import restarting_positions
from skylar.layers.block import BlockConfig
from skylar.layers.cache import DynamicLayerCache, KVCache, StaticLayerCache
from skylar.layers.mla import (
    MLAConfig,
    MultiHeadLatentAttention,
    absorbed_attention,
    absorption_pays,
    expanded_attention,
    rotate_pairs,
    yarn_factor,
)
from skylar.layers.mlp import SwiGLUConfig
from skylar.layers.norm import RMSNormConfig
from skylar.layers.rope import RoPEConfig, YaRNScaling, apply_rope, to_interleaved, write_scaling
from skylar.models.decoder import CausalLM, DecoderConfig, cache_bytes
from skylar.models.families.granite import ScaledConfig
from skylar.models.hub import from_pretrained, save_pretrained
from skylar.models.presets import config_from_dict, config_to_dict
from skylar.training.mup import MupConfig, coordinate_check, fold, growth
from skylar.training.optim import AdamWConfig

YARN = YaRNScaling(factor=4.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=1.0)
SCALINGS = [
    None,
    YARN,
    YaRNScaling(factor=2.5, original_max_position_embeddings=24, mscale=0.7, mscale_all_dim=1.3),
    YaRNScaling(factor=8.0, original_max_position_embeddings=16),  # without DeepSeek's part
]


def random_config(rng: random.Random, **changes) -> MLAConfig:
    "Sizes that do not divide each other, and corners."
    sizes = dict(
        n_heads=rng.randint(1, 5), kv_lora_rank=rng.choice([1, 3, 7, 12, 40]),
        q_lora_rank=rng.choice([None, 1, 5, 11]), qk_nope_head_dim=rng.choice([1, 4, 9, 16]),
        qk_rope_head_dim=2 * rng.randint(1, 4), v_head_dim=rng.choice([1, 5, 8, 24]),
        rope=RoPEConfig(theta=rng.choice([50.0, 1e4]), scaling=rng.choice(SCALINGS)),
        interleaved=rng.random() < 0.7, bias=rng.random() < 0.3)
    return MLAConfig(**sizes | changes)


def scrambled(module, seed: int):
    "No weight at 0 or 1."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.1 + 0.4 * torch.randn(p.shape, generator=generator))
    return module


def their_config(config: MLAConfig, d_model: int, n_layers: int = 1, **more) -> DeepseekV3Config:
    "transformers' description; the feed-forward layers are dense."
    rope = {"rope_type": "default"} | (write_scaling(config.rope.scaling) or {})
    widths = {name: getattr(config, name) for name in (
        "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")}
    return DeepseekV3Config(
        hidden_size=d_model, num_attention_heads=config.n_heads, vocab_size=61,
        num_key_value_heads=config.n_heads, num_hidden_layers=n_layers, intermediate_size=20,
        first_k_dense_replace=n_layers, max_position_embeddings=64, num_mtp_layers=0,
        rope_parameters=rope | {"rope_theta": config.rope.theta}, attention_bias=config.bias,
        rope_interleave=config.interleaved, **widths | more)


def decoder_of(config: MLAConfig, d_model: int, n_layers: int = 2) -> DecoderConfig:
    norm = RMSNormConfig(eps=1e-6)
    block = BlockConfig(attention=config, ffn=SwiGLUConfig(d_ff=20), norm=norm)
    return DecoderConfig(vocab_size=61, d_model=d_model, blocks=(block,) * n_layers, norm=norm,
                         max_seq_len=64, tie_embeddings=False)


def both_models(config: MLAConfig, d_model: int = 20, seed: int = 0):
    theirs = scrambled(DeepseekV3ForCausalLM(their_config(config, d_model, 2)), seed).eval()
    ours = CausalLM(decoder_of(config, d_model)).eval()
    ours.load_state_dict(theirs.state_dict())  # strict: every name is theirs
    return ours, theirs


# --- equal to transformers ----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(24))
def test_random_configs_equal_transformers(seed):
    rng = random.Random(seed)
    config = random_config(rng, rope=RoPEConfig(theta=100.0, scaling=SCALINGS[seed % 4]))
    ours, theirs = both_models(config, rng.choice([13, 24, 31]), seed)
    ids = torch.randint(61, (2, 33), generator=torch.Generator().manual_seed(seed))
    logits, expected = ours(ids), theirs(ids).logits
    close(logits, expected, "logits")
    for out in (logits, expected):
        F.cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    mine, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert mine.keys() == other.keys()
    for name in other:
        close(mine[name].grad, other[name].grad, name, 1e-4)


def test_the_random_configs_reach_every_corner():
    drawn = [random_config(random.Random(seed)) for seed in range(24)]
    assert {c.q_lora_rank is None for c in drawn} == {True, False}
    assert {c.interleaved for c in drawn} == {c.bias for c in drawn} == {True, False}
    assert {(c.qk_head_dim > c.v_head_dim) - (c.qk_head_dim < c.v_head_dim)
            for c in drawn} >= {1, -1}
    assert any(2 * c.kv_lora_rank < c.qk_nope_head_dim + c.v_head_dim for c in drawn)
    assert any(2 * c.kv_lora_rank > c.qk_nope_head_dim + c.v_head_dim for c in drawn)


@pytest.mark.parametrize("q_lora_rank", [None, 9])
def test_generation_equals_transformers_and_no_cache(q_lora_rank):
    config = MLAConfig(n_heads=4, kv_lora_rank=12, q_lora_rank=q_lora_rank, qk_nope_head_dim=10,
                       qk_rope_head_dim=6, v_head_dim=8, rope=RoPEConfig(scaling=YARN))
    ours, theirs = both_models(config)
    ids = torch.randint(61, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :5], mask[1, :1] = 0, 0
    expected = theirs.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False,
                               pad_token_id=0, eos_token_id=None)
    for cache in (True, False):
        found = generate(ours, ids, 20, temperature=0, attention_mask=mask, cache=cache)
        assert torch.equal(found, expected), f"cache={cache}"


@pytest.mark.parametrize("scaling", SCALINGS)
def test_the_scale_of_the_scores_is_theirs(scaling):
    config = MLAConfig(n_heads=2, kv_lora_rank=4, qk_nope_head_dim=6, qk_rope_head_dim=4,
                       v_head_dim=4, rope=RoPEConfig(scaling=scaling))
    theirs = DeepseekV3ForCausalLM(their_config(config, 16))
    scaling_of = theirs.model.layers[0].self_attn.scaling
    assert config.build(16).softmax_scale == pytest.approx(scaling_of, rel=1e-12)
    doubled = MLAConfig(**vars(config) | {"scale": 2 * 10**-0.5}).build(16)
    assert doubled.softmax_scale == pytest.approx(2 * scaling_of, rel=1e-12)
    assert doubled.q_scale == pytest.approx(2)
    assert yarn_factor(RoPEConfig(scaling=YARN)) == pytest.approx((0.1 * math.log(4) + 1) ** 2)


def test_pairs_are_those_of_reordered_weights():
    torch.manual_seed(0)
    W, x = torch.randn(3 * 8, 10), torch.randn(2, 5, 10)
    tables = RoPEConfig().build(8)(torch.arange(5))

    def heads(weight):
        return (x @ weight.T).unflatten(-1, (3, 8)).transpose(1, 2)

    assert_close(rotate_pairs(heads(to_interleaved(W, 3)), *tables), apply_rope(heads(W), *tables))
    assert torch.equal(rotate_pairs(heads(W), *tables, interleaved=False),
                       apply_rope(heads(W), *tables))


# --- one query at a time ------------------------------------------------------------------------


def one_at_a_time(layer, x, documents):
    "One sequence in plain loops: every head of every query, and its own keys and values."
    c, T = layer.config, len(x)
    Dn, Dr, R = c.qk_nope_head_dim, c.qk_rope_head_dim, c.kv_lora_rank
    at = restarting_positions(torch.tensor([documents]))[0]
    cos, sin = layer.rotary(at, torch.double)
    down = layer.kv_a_proj_with_mqa(x)

    def turned(y, t):
        return rotate_pairs(y[None, None, None], cos[:, :, t:t + 1], sin[:, :, t:t + 1],
                            c.interleaved)[0, 0, 0]

    def query(t):
        y = x[t]
        y = layer.q_proj(y) if c.q_lora_rank is None else layer.q_b_proj(
            layer.q_a_layernorm(layer.q_a_proj(y)))
        return y.view(c.n_heads, -1)

    latents = layer.kv_a_layernorm(down[:, :R])
    kv = layer.kv_b_proj(latents).view(T, c.n_heads, -1)
    rows = []
    for t in range(T):
        seen = [s for s in range(t + 1) if documents[s] == documents[t]]
        heads = []
        for h in range(c.n_heads):
            q = query(t)[h]
            scores = torch.stack([
                kv[s, h, :Dn] @ q[:Dn] + turned(down[s, R:], s) @ turned(q[Dn:], t)
                for s in seen])
            weights = (scores * layer.softmax_scale).softmax(0)
            heads.append(weights @ kv[seen, h, Dn:])
        rows.append(layer.o_proj(torch.cat(heads)))
    assert Dr == down.shape[1] - R
    return torch.stack(rows)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(16))
def test_equals_one_query_at_a_time(seed):
    rng = random.Random(seed)
    layer = scrambled(random_config(rng).build(10), seed).double()
    B, T = 2, rng.randint(2, 12)
    x = torch.randn(B, T, 10, dtype=torch.double)
    documents = random_documents(rng, B, T) if seed % 2 else [[0] * T] * B
    found = layer(x, layer.prepare(x, placed(x, documents if seed % 2 else None)))
    expected = torch.stack([one_at_a_time(layer, x[b], documents[b]) for b in range(B)])
    assert_close(found, expected, rtol=1e-6, atol=1e-6)  # rotary tables are float32


@torch.no_grad()
@pytest.mark.parametrize("seed", range(40))
def test_cached_in_any_chunks_equals_uncached(seed):
    rng = random.Random(1000 + seed)
    config = random_config(rng)
    layer = scrambled(config.build(10), seed).double()
    B, T = rng.randint(1, 3), rng.randint(2, 40)
    x = torch.randn(B, T, 10, dtype=torch.double)
    whole = placed(x, random_documents(rng, B, T) if rng.random() < 0.7 else None)
    cache = config.cache(10, B, rng.choice([None, T]), torch.double)
    found = in_chunks(layer, cache, x, whole, random_chunks(rng, T))
    assert_close(found, layer(x, layer.prepare(x, whole)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(16))
def test_both_ways_are_equal_with_their_gradients(seed):
    rng = random.Random(seed)
    layer = scrambled(random_config(rng).build(10), seed).double()
    c, (B, T, S) = layer.config, (2, rng.choice([1, 4]), 9)
    args = [torch.randn(*shape, dtype=torch.double, requires_grad=True) for shape in (
        (B, c.n_heads, T, c.qk_nope_head_dim), (B, c.n_heads, T, c.qk_rope_head_dim),
        (B, 1, S, c.kv_lora_rank), (B, 1, S, c.qk_rope_head_dim))]
    keys = placed(torch.zeros(B, S), random_documents(rng, B, S) if seed % 2 else None)
    for backend in ("auto", "sdpa", "reference"):
        x = torch.zeros(B, T, 10, dtype=torch.double)
        mask = layer.prepare(x, keys[S - T:], keys, backend).mask
        outs = [way(layer, *args, mask) for way in (expanded_attention, absorbed_attention)]
        assert_close(outs[1], outs[0], rtol=1e-9, atol=1e-9)
        g = torch.randn_like(outs[0])
        inputs = [*args, layer.kv_b_proj.weight]
        for a, b in zip(*(torch.autograd.grad(out, inputs, g) for out in outs)):
            assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("seed", range(6))
@torch.no_grad()
def test_absorbed_in_bf16_equals_fp32_on_the_same_numbers(seed):
    "There the whole of kv_b_proj is multiplied, with zeros for queries, instead of parts."
    rng = random.Random(seed)
    layer = scrambled(random_config(rng).build(10), seed).bfloat16()
    c, (B, T, S) = layer.config, (2, rng.choice([1, 4]), 9)
    args = [torch.randn(*shape).bfloat16() for shape in (
        (B, c.n_heads, T, c.qk_nope_head_dim), (B, c.n_heads, T, c.qk_rope_head_dim),
        (B, 1, S, c.kv_lora_rank), (B, 1, S, c.qk_rope_head_dim))]
    mask = layer.prepare(torch.zeros(B, T, 10), placed(torch.zeros(B, S))[S - T:],
                         placed(torch.zeros(B, S))).mask
    found = absorbed_attention(layer, *args, mask).float()
    exact = absorbed_attention(layer.float(), *(x.float() for x in args), mask)
    assert found.shape == exact.shape
    assert 0 < (found - exact).norm() < 0.03 * exact.norm()


# --- a decoding step ----------------------------------------------------------------------------

WIDE = MLAConfig(n_heads=4, kv_lora_rank=32, q_lora_rank=24, qk_nope_head_dim=16,
                 qk_rope_head_dim=8, v_head_dim=12)


@torch.no_grad()
def test_decoding_never_expands_the_cache():
    model = CausalLM(decoder_of(WIDE, 20)).eval()
    cache, calls = KVCache(model.config, 2), []
    for block in model.model.layers:
        block.self_attn.kv_b_proj.register_forward_hook(lambda m, i, o: calls.append(o.shape[1]))
    model(torch.randint(61, (2, 30)), cache=cache)
    assert calls == [30, 30]  # the prompt
    for _ in range(3):
        model(torch.randint(61, (2, 1)), cache=cache)
    model(torch.randint(61, (2, 3)), cache=cache)
    assert calls == [30, 30]


@torch.no_grad()
def test_work_of_a_decoding_step_by_formula():
    D, S, c, layer = 20, 50, WIDE, WIDE.build(20)
    H, R, Dn, Dr, Dv = 4, 32, 16, 8, 12
    cache = c.cache(D, 1, S)
    x, whole = torch.randn(1, S, D), placed(torch.zeros(1, S))
    in_chunks(layer, cache, x[:, :-1], whole[:-1], [S - 1])
    slots = cache.locate(whole[S - 1:], whole, slice(S - 1, S))
    inputs = layer.prepare(x[:, -1:], whole[S - 1:], whole, slots=slots)
    with FlopCounterMode(display=False) as counter:
        layer(x[:, -1:], inputs, cache)
    weights = D * 24 + 24 * H * (Dn + Dr) + D * (R + Dr) + R * H * (Dn + Dv) + H * Dv * D
    assert counter.get_total_flops() == 2 * weights + 2 * S * H * (2 * R + Dr)


def test_flops_and_bytes_by_formula():
    D, T, config = 20, 16, WIDE
    layer = config.build(D)
    with torch.device("meta"):
        small = sum(p.numel() for p in config.build(D).parameters() if p.ndim == 2)
    assert small == sum(p.numel() for p in layer.parameters()) - 32 - 24  # two norms
    assert config.flops(D, T) == 2 * small + 2 * T * 4 * (16 + 8 + 12)
    x = torch.randn(1, T, D)
    with FlopCounterMode(display=False) as counter:
        layer(x, layer.prepare(x, backend="reference"))
    assert counter.get_total_flops() == T * config.flops(D, T)
    assert config.cache_bytes(D, 100, 2) == (32 + 8) * 100 * 2


def test_when_absorption_pays():
    v3 = MLAConfig(n_heads=128, kv_lora_rank=512, q_lora_rank=1536, qk_nope_head_dim=128,
                   qk_rope_head_dim=64, v_head_dim=128)
    assert not absorption_pays(v3, 100, 100) and not absorption_pays(v3, 1, 1)
    assert absorption_pays(v3, 1, 2) and absorption_pays(v3, 1, 10**6)
    assert absorption_pays(v3, 170, 10**6) and not absorption_pays(v3, 171, 10**6)
    for T, S in ((3, 5), (60, 100), (150, 2000), (200, 300), (171, 10**5)):
        up = 512 * 256
        expanded = S * up + T * S * (128 + 64 + 128)
        absorbed = T * up + T * S * (512 + 64 + 512)
        assert absorption_pays(v3, T, S) == (absorbed < expanded), (T, S)
    tiny = MLAConfig(n_heads=1, kv_lora_rank=50, qk_nope_head_dim=1, qk_rope_head_dim=2,
                     v_head_dim=1)
    assert absorption_pays(tiny, 1, 1000)  # one token never expands the cache


# --- the cache ----------------------------------------------------------------------------------


def test_cache_bytes_and_kinds():
    decoder = decoder_of(WIDE, 20, 3)
    cache = KVCache(decoder, 2, 50)
    assert cache.nbytes == cache_bytes(decoder, 50, torch.float32, 2) == 3 * 40 * 50 * 2 * 4
    half = KVCache(decoder, 2, 50, torch.bfloat16)
    assert half.nbytes == cache_bytes(decoder, 50, torch.bfloat16, 2)
    assert type(WIDE.cache(20, 1)) is DynamicLayerCache
    assert type(WIDE.cache(20, 1, 10)) is StaticLayerCache
    one = WIDE.cache(20, 3, 10)
    assert one.keys.shape == (3, 1, 10, 32) and one.values.shape == (3, 1, 10, 8)


@torch.no_grad()
@pytest.mark.parametrize("capacity", [None, 60])
def test_crop_reorder_and_growth(capacity):
    model = scrambled(CausalLM(decoder_of(WIDE, 20)), 0).eval()
    ids = torch.randint(61, (3, 60))
    cache = KVCache(model.config, 3, capacity)
    model(ids[:, :40], cache=cache)
    cache.crop(torch.tensor([30, 25, 40]))  # sequences of unlike length
    more = torch.randint(61, (3, 4))
    found = model(more, cache=cache)
    for i, n in enumerate((30, 25, 40)):
        alone = model(torch.cat([ids[i, :n], more[i]])[None])
        assert_close(found[i], alone[0, -4:], rtol=1e-4, atol=1e-4)
    cache.reorder(torch.tensor([2, 2, 0]))
    last = torch.randint(61, (3, 1))
    found = model(last, cache=cache)
    for i, (of, n) in enumerate(((2, 40), (2, 40), (0, 30))):
        alone = model(torch.cat([ids[of, :n], more[of], last[i]])[None])
        assert_close(found[i], alone[0, -1:], rtol=1e-4, atol=1e-4)
    cache.reset()
    assert_close(model(ids, cache=cache), model(ids), rtol=1e-4, atol=1e-4)
    if capacity:
        with pytest.raises(ValueError, match="capacity=60"):
            model(ids[:, :1], cache=cache)


@torch.no_grad()
def test_left_padding_and_packed_documents_equal_separate_ones():
    model = scrambled(CausalLM(decoder_of(WIDE, 20)), 0).eval()
    ids = torch.randint(61, (2, 30))
    documents = torch.tensor([[0] * 11 + [1] * 19, [0] * 4 + [1] * 20 + [2] * 6])
    for cache in (None, KVCache(model.config, 2)):
        found = model(ids, document_ids=documents, cache=cache)
        for row, (cuts) in enumerate(([0, 11, 30], [0, 4, 24, 30])):
            for a, b in zip(cuts, cuts[1:]):
                assert_close(found[row, a:b], model(ids[row:row + 1, a:b])[0],
                             rtol=1e-4, atol=1e-4)


def test_a_cache_holds_no_gradients():
    model = CausalLM(decoder_of(WIDE, 20))
    with pytest.raises(ValueError, match="no gradients"):
        model(torch.randint(61, (1, 4)), cache=KVCache(model.config, 1))


# --- kernels, precisions, compilers -------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("backend", ["auto", "reference", "sdpa", "flex", "cpu_tiled"])
@pytest.mark.parametrize("packed", [False, True])
def test_backends_agree_on_unlike_widths(backend, packed):
    layer = scrambled(WIDE.build(20), 0).eval()
    x, rng = torch.randn(2, 40, 20), random.Random(0)
    whole = placed(x, random_documents(rng, 2, 40) if packed else None)
    expected = layer(x, layer.prepare(x, whole, backend="reference"))
    assert_close(layer(x, layer.prepare(x, whole, backend=backend)), expected,
                 rtol=1e-4, atol=1e-4)
    found = in_chunks(layer, WIDE.cache(20, 2), x, whole, [20, 1, 1, 3, 15], backend)
    assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["sdpa", "cpu_tiled"])
def test_gradients_of_the_fast_kernels(backend):
    layer = scrambled(WIDE.build(20), 0)
    x, found = torch.randn(2, 40, 20), []
    for name in ("reference", backend):
        layer.zero_grad()
        layer(x, layer.prepare(x.requires_grad_(), backend=name)).square().sum().backward()
        found.append([p.grad.clone() for p in layer.parameters()])
    for a, b in zip(*found):
        assert_close(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("autocast", [False, True])
@torch.no_grad()
def test_half_precision_and_autocast(autocast):
    torch.manual_seed(0)
    layer, x = WIDE.build(64).eval(), torch.randn(2, 30, 64)
    exact = layer(x)
    cache, whole = WIDE.cache(64, 2, None, torch.bfloat16), placed(x)
    if not autocast:
        layer, x = layer.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = in_chunks(layer, cache, x, whole, [10, 1, 1, 1, 17])
    assert found.dtype == torch.bfloat16
    assert_close(found.float(), exact, rtol=0.05, atol=0.02)


def test_dropout_acts_in_training_only():
    config = MLAConfig(**vars(WIDE) | {"dropout": 0.5})
    layer, x = config.build(20), torch.randn(2, 9, 20)
    torch.manual_seed(0)
    assert not torch.allclose(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_compiles_as_one_graph():
    torch.compiler.reset()
    layer = WIDE.build(16)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = torch.randn(2, 7, 16)
    assert_close(compiled(x), layer(x))
    inputs = layer.prepare(x, placed(x, [[0, 0, 1, 1, 1, 1, 1], [4, 4, 4, 4, 4, 5, 5]]))
    assert_close(compiled(x, inputs), layer(x, inputs))


def test_builds_and_runs_on_meta():
    with torch.device("meta"):
        layer = WIDE.build(20)
        assert layer(torch.randn(2, 7, 20)).shape == (2, 7, 20)


# --- beginnings, files, and what it is not for --------------------------------------------------


@pytest.mark.parametrize("q_lora_rank", [None, 300])
def test_init_weights(q_lora_rank):
    config = MLAConfig(n_heads=8, kv_lora_rank=200, q_lora_rank=q_lora_rank, bias=True,
                       qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32)
    layer = config.build(256)
    with torch.no_grad():
        for p in (*layer.parameters(), *layer.buffers()):
            p.fill_(7.0)
        layer.init_weights(0.02, 0.005)
    assert torch.equal(layer.rotary.inv_freq, config.build(256).rotary.inv_freq)
    names = dict(layer.named_parameters())
    assert ("q_a_layernorm.weight" in names) == (q_lora_rank is not None)
    for name, p in names.items():
        if name.endswith("bias"):
            assert not p.any()
        elif "norm" in name:
            assert (p == 1).all()
        else:
            assert p.std().item() == pytest.approx(0.005 if "o_proj" in name else 0.02, rel=0.05)


def test_a_decoder_with_latent_attention_comes_back_from_its_folder(tmp_path):
    decoder = decoder_of(MLAConfig(**vars(WIDE) | {"rope": RoPEConfig(scaling=YARN)}), 20)
    assert config_from_dict(json.loads(json.dumps(config_to_dict(decoder)))) == decoder
    model = scrambled(CausalLM(decoder), 0).eval()
    again = from_pretrained(save_pretrained(model, tmp_path / "m"))
    ids = torch.randint(61, (2, 9))
    assert again.config == decoder and torch.equal(again(ids), model(ids))


@pytest.mark.parametrize(("changes", "words"), [
    ({"n_heads": 0}, "n_heads=0"),
    ({"kv_lora_rank": 0}, "kv_lora_rank=0"),
    ({"q_lora_rank": 0}, "q_lora_rank=0"),
    ({"qk_rope_head_dim": 5}, "qk_rope_head_dim=5 is odd.*even width"),
    ({"v_head_dim": -1}, "v_head_dim=-1"),
    ({"dropout": 1.0}, "dropout=1.0"),
    ({"norm_eps": 0.0}, "norm_eps=0"),
    ({"scale": -1.0}, "scale=-1.0"),
])
def test_refusals(changes, words):
    with pytest.raises(ValueError, match=words) as refused:
        MLAConfig(**vars(WIDE) | changes)
    assert "\n" not in str(refused.value)


def test_the_fused_decoder_leaves_it_alone():
    model = CausalLM(decoder_of(WIDE, 20)).eval()
    assert not can_fuse(model)
    assert why_not_fused(model) == "MultiHeadLatentAttention has no fused form"
    out = generate(model, torch.randint(61, (1, 5)), 30, temperature=0)  # long enough to fuse
    assert out.shape == (1, 35)


def test_tensor_parallelism_is_refused():
    from skylar.training.distributed import share_matrices

    class Mesh:
        def size(self):
            return 2

    model = CausalLM(decoder_of(WIDE, 20))
    with pytest.raises(ValueError, match="tensor=2.*latent.*tensor=1") as refused:
        share_matrices(model.model, Mesh())
    assert "\n" not in str(refused.value)


def test_equal_configs_share_what_is_prepared():
    assert MLAConfig(**vars(WIDE)) == WIDE and hash(MLAConfig(**vars(WIDE))) == hash(WIDE)
    model = CausalLM(decoder_of(WIDE, 20, 3))
    assert model.model.kind_of == [0, 0, 0]
    assert isinstance(model.model.layers[0].self_attn, MultiHeadLatentAttention)


# --- muP ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LatentFamily:
    "Heads, latents and feed-forward layer grow with the width; heads are as wide everywhere."

    d_model: int
    init_std: float = 0.1
    q_latent: bool = True
    vocab_size: int = 64
    max_seq_len: int = 32
    name: ClassVar[str] = "latent"

    def decoder(self) -> DecoderConfig:
        D, norm = self.d_model, RMSNormConfig()
        attention = MLAConfig(
            n_heads=D // 8, kv_lora_rank=D // 2, q_lora_rank=D // 2 if self.q_latent else None,
            qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)
        block = BlockConfig(attention=attention, ffn=SwiGLUConfig(d_ff=2 * D), norm=norm)
        return DecoderConfig(
            vocab_size=self.vocab_size, d_model=D, blocks=(block,) * 2, norm=norm,
            max_seq_len=self.max_seq_len, init_std=self.init_std)


def change_of_outputs(width: int, mup: MupConfig) -> dict[str, float]:
    "After four steps on random tokens with a pattern, as in test_mup.py."
    torch.manual_seed(0)
    std = 0.1 if mup.on else 0.1 * math.sqrt(32 / width)
    model = CausalLM(mup.model(LatentFamily(d_model=width, init_std=std)))
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(8, (4, 33), generator=generator).cumsum(1) % 64 for _ in range(5)]
    optimizer = mup.optimizer(AdamWConfig(lr=0.015)).build(model)
    return coordinate_check(
        model, optimizer, ids[1:], lambda model, ids: F.cross_entropy(
            model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()), ids[0][:, :-1])


def test_the_coordinate_check_of_mup():
    widths, slopes = (32, 64, 128, 256), {}
    for name, mup in (("muP", MupConfig(base_d_model=32)), ("standard", MupConfig())):
        rows = [change_of_outputs(width, mup) for width in widths]
        slopes[name] = {part: growth(widths, [row[part] for row in rows]) for part in rows[0]}
    for part in ("embedding", "attention", "residual stream"):
        assert abs(slopes["muP"][part]) < 0.25, (part, slopes)
    assert min(slopes["standard"][part] for part in ("residual stream", "logits")) > 0.2, slopes


@pytest.mark.parametrize("q_latent", [True, False])
@torch.no_grad()
def test_folded_multipliers_keep_the_logits(q_latent):
    scaled = ScaledConfig(
        family=LatentFamily(d_model=32, q_latent=q_latent), attention_multiplier=0.7,
        embedding_multiplier=3.0, residual_multiplier=0.4, logits_scaling=5.0)
    model = scrambled(CausalLM(scaled), 0).eval()
    folded, ids = fold(model), torch.randint(64, (2, 20))
    assert folded.config is scaled.family
    assert_close(folded(ids), model(ids), atol=1e-4, rtol=1e-4)


def test_transformers_generates_with_its_own_cache(tmp_path):
    "A decoder that only Skylar builds, opened by AutoModelForCausalLM."
    import skylar.models.auto  # noqa: F401

    model = scrambled(CausalLM(decoder_of(WIDE, 20)), 0).eval()
    folder = save_pretrained(model, tmp_path / "m")
    theirs, ids = AutoModelForCausalLM.from_pretrained(folder), torch.randint(61, (2, 9))
    found = theirs.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None,
                            attention_mask=torch.ones_like(ids), pad_token_id=0)
    assert torch.equal(found, generate(model, ids, 12, temperature=0))
