"""Grouped-query attention, with its window and its cache, against one query at a time."""

import math
import random

import pytest
import torch
from attention_cases import in_chunks, placed, random_chunks, random_documents
from torch.testing import assert_close

from skylar.layers.attention_backends import restarting_positions
from skylar.layers.cache import DynamicLayerCache, StaticLayerCache
from skylar.layers.gqa import GQAConfig, GroupedQueryAttention
from skylar.layers.norm import RMSNormConfig
from skylar.layers.rope import LinearScaling, RoPEConfig
from skylar.layers.sliding_window import SlidingWindow, SlidingWindowCache

NORM = RMSNormConfig(eps=1e-5)


# --- the slow reference -------------------------------------------------------------------------


def rotated(x, position, theta, factor):
    "x (Dh,), pair (i, i + Dh/2) rotated by its angle, one pair at a time."
    half, out = len(x) // 2, x.clone()
    for i in range(half):
        angle = position / factor * theta ** (-2 * i / len(x))
        c, s = math.cos(angle), math.sin(angle)
        out[i], out[i + half] = x[i] * c - x[i + half] * s, x[i + half] * c + x[i] * s
    return out


def normed(x, norm):
    return x / (x.square().mean() + norm.eps).sqrt() * norm.weight


def is_visible(window, positions, documents, t, s):
    if s > t or documents[s] != documents[t]:
        return False
    return window is None or t - s < window.size or positions[s] < window.num_sink_tokens


def one_at_a_time(layer, x, documents):
    "One sequence: x (T, D), documents a list of T. Each head of each query, in a loop."
    config, T, Dh = layer.config, len(x), layer.d_head
    positions = restarting_positions(torch.tensor([documents]))[0].tolist()
    H, K = config.n_heads, config.n_kv_heads or config.n_heads
    factor = config.rope.scaling.factor if config.rope and config.rope.scaling else 1

    def head(project, norm, t, h, rotate):
        y = project(x[t])[h * Dh:(h + 1) * Dh]
        y = normed(y, norm) if norm is not None else y
        return rotated(y, positions[t], config.rope.theta, factor) if rotate and config.rope else y

    rows = []
    for t in range(T):
        heads = []
        for h in range(H):
            kv = h // (H // K)
            seen = [s for s in range(t + 1)
                    if is_visible(config.window, positions, documents, t, s)]
            q = head(layer.q_proj, layer.q_norm, t, h, True)
            k = torch.stack([head(layer.k_proj, layer.k_norm, s, kv, True) for s in seen])
            v = torch.stack([head(layer.v_proj, None, s, kv, False) for s in seen])
            heads.append((k @ q / math.sqrt(Dh)).softmax(0) @ v)
        rows.append(layer.o_proj(torch.cat(heads)))
    return torch.stack(rows)


def random_window(rng: random.Random) -> SlidingWindow:
    return SlidingWindow(size=rng.randint(1, 6), num_sink_tokens=rng.randint(0, 3))


def random_config(rng: random.Random, **changes) -> GQAConfig:
    K = rng.choice([1, 2, 3])
    sizes = dict(
        n_heads=K * rng.choice([1, 2, 4]), n_kv_heads=K, d_head=2 * rng.randint(1, 5),
        bias=rng.random() < 0.5, qk_norm=rng.choice([None, NORM]),
        rope=rng.choice([None, RoPEConfig(theta=50.0),
                         RoPEConfig(theta=90.0, scaling=LinearScaling(factor=2.0))]),
        window=rng.choice([None, random_window(rng)]))
    return GQAConfig(**sizes | changes)


def scrambled(layer, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.5 * torch.randn_like(p))
    return layer


# --- the layer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(24))
def test_equals_one_query_at_a_time(seed):
    rng = random.Random(seed)
    layer = scrambled(random_config(rng).build(10), seed)
    B, T = 2, rng.randint(2, 12)
    x = torch.randn(B, T, 10)
    documents = random_documents(rng, B, T) if seed % 2 else None
    found = layer(x, layer.prepare(x, placed(x, documents)))
    rows = documents or [[0] * T] * B
    expected = torch.stack([one_at_a_time(layer, x[b], rows[b]) for b in range(B)])
    assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(60))
def test_cached_in_any_chunks_equals_uncached(seed):
    rng = random.Random(1000 + seed)
    config = random_config(rng, window=random_window(rng) if seed % 4 else None)
    layer = scrambled(config.build(10), seed).double()
    B, T = rng.randint(1, 3), rng.randint(2, 40)
    x = torch.randn(B, T, 10, dtype=torch.double)
    whole = placed(x, random_documents(rng, B, T) if rng.random() < 0.7 else None)
    cache = config.cache(10, B, rng.choice([None, T]), torch.double)
    found = in_chunks(layer, cache, x, whole, random_chunks(rng, T))
    assert_close(found, layer(x, layer.prepare(x, whole)), rtol=1e-9, atol=1e-9)


def test_window_as_long_as_the_text_is_no_window():
    torch.manual_seed(0)
    free = GQAConfig(n_heads=4, n_kv_heads=2).build(16)
    bound = GQAConfig(n_heads=4, n_kv_heads=2, window=SlidingWindow(size=9)).build(16)
    bound.load_state_dict(free.state_dict())
    x = torch.randn(2, 9, 16)
    assert_close(bound(x), free(x))


def test_each_config_prepares_its_own_angles():
    x = torch.randn(1, 5, 16)
    configs = [
        GQAConfig(n_heads=2, d_head=4), GQAConfig(n_heads=2, d_head=6),
        GQAConfig(n_heads=2, d_head=4, rope=RoPEConfig(theta=50.0)),
        GQAConfig(n_heads=2, d_head=4, rope=RoPEConfig(scaling=LinearScaling(factor=3.0))),
    ]
    tables = [config.build(16).prepare(x).cos_sin for config in configs]
    assert len({tuple(cos.flatten().tolist()) for cos, _ in tables}) == len(configs)
    assert GQAConfig(n_heads=2, d_head=4) == configs[0] != configs[2]  # who shares, and who not
    half = configs[0].build(16).bfloat16().prepare(x.bfloat16()).cos_sin
    assert all(table.dtype == torch.bfloat16 for table in half)
    assert GQAConfig(n_heads=2, d_head=4, rope=None).build(16).prepare(x).cos_sin is None


def test_norms_are_there_only_when_asked_for():
    plain = GQAConfig(n_heads=2).build(8).state_dict()
    assert sorted(plain) == [f"{p}_proj.weight" for p in "koqv"]
    normed = GQAConfig(n_heads=2, bias=True, qk_norm=NORM).build(8)
    assert {"q_norm.weight", "k_norm.weight"} < set(normed.state_dict())
    assert normed.q_norm.eps == normed.k_norm.eps == 1e-5
    assert normed.q_norm.weight.shape == (4,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.no_grad()
def test_half_precision_and_autocast(dtype):
    torch.manual_seed(0)
    config = GQAConfig(
        n_heads=4, n_kv_heads=2, qk_norm=NORM, window=SlidingWindow(size=3, num_sink_tokens=1))
    layer, x = config.build(32), torch.randn(2, 9, 32)
    exact = layer(x)
    cache = config.cache(32, 2, None, torch.bfloat16)
    whole = placed(x, None)
    if dtype == torch.bfloat16:
        found = in_chunks(layer.bfloat16(), cache, x.bfloat16(), whole, [4, 1, 4])
    else:
        with torch.autocast("cpu", torch.bfloat16):
            found = in_chunks(layer, cache, x, whole, [4, 1, 4])
    assert found.dtype == torch.bfloat16
    assert_close(found.float(), exact, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("window", [
    None, SlidingWindow(size=3), SlidingWindow(size=3, num_sink_tokens=2)])
def test_compiles_as_one_graph(window):
    torch.manual_seed(0)
    torch.compiler.reset()
    layer = GQAConfig(n_heads=4, n_kv_heads=2, qk_norm=NORM, window=window).build(16)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = torch.randn(2, 7, 16)
    assert_close(compiled(x), layer(x))
    whole = placed(x, [[0, 0, 1, 1, 1, 1, 1], [4, 4, 4, 4, 4, 5, 5]])
    inputs = layer.prepare(x, whole)
    assert_close(compiled(x, inputs), layer(x, inputs))


# --- costs --------------------------------------------------------------------------------------


def test_flops_and_bytes_by_formula():
    D, H, K, Dh, S = 40, 6, 2, 10, 100
    full = GQAConfig(n_heads=H, n_kv_heads=K, d_head=Dh)
    assert full.flops(D, S) == 2 * (2 * D * H * Dh + 2 * D * K * Dh) + 4 * S * H * Dh
    assert full.cache_bytes(D, S, 2) == 2 * K * Dh * S * 2
    near = GQAConfig(n_heads=H, n_kv_heads=K, d_head=Dh,
                     window=SlidingWindow(size=8, num_sink_tokens=3))
    assert full.flops(D, S) - near.flops(D, S) == 4 * (S - 11) * H * Dh
    assert near.flops(D, 11) == full.flops(D, 11)
    assert near.cache_bytes(D, S, 2) == 2 * K * Dh * (8 - 1 + 3) * 2
    assert near.cache_bytes(D, 5, 2) == full.cache_bytes(D, 5, 2)


def test_which_cache_a_layer_needs():
    full = GQAConfig(n_heads=4, n_kv_heads=2)
    near = GQAConfig(n_heads=4, n_kv_heads=2, window=SlidingWindow(size=8))
    assert type(full.cache(8, 1)) is DynamicLayerCache
    assert type(full.cache(8, 1, 10)) is StaticLayerCache
    assert type(near.cache(8, 1)) is type(near.cache(8, 1, 10)) is SlidingWindowCache


@pytest.mark.parametrize("qk_norm", [None, NORM])
@pytest.mark.parametrize("bias", [False, True])
def test_init_weights(bias, qk_norm):
    layer = GQAConfig(n_heads=16, n_kv_heads=8, bias=bias, qk_norm=qk_norm).build(512)
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(7.0)
        layer.init_weights(0.02, 0.005)
    for name, p in layer.named_parameters():
        if name.endswith("bias"):
            assert not p.any()
        elif "norm" in name:
            assert (p == 1).all()
        else:
            assert p.std().item() == pytest.approx(0.005 if "o_proj" in name else 0.02, rel=0.05)


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "words"), [
    (lambda: GQAConfig(n_heads=0), "n_heads=0: give a whole number of at least 1"),
    (lambda: GQAConfig(n_heads=6, n_kv_heads=4), "n_kv_heads=4 does not divide n_heads=6.*choose"),
    (lambda: GQAConfig(n_heads=2, n_kv_heads=0), "n_kv_heads=0"),
    (lambda: GQAConfig(n_heads=2, n_kv_heads=4), "n_kv_heads=4"),
    (lambda: GQAConfig(n_heads=2, d_head=0), "d_head=0"),
    (lambda: GQAConfig(n_heads=2, d_head=5), "d_head=5 is odd.*even width, or rope=None"),
    (lambda: GQAConfig(n_heads=2, dropout=1.0), "dropout=1.0"),
    (lambda: GQAConfig(n_heads=3).build(16), "d_model=16 is not divisible by n_heads=3.*d_head"),
    (lambda: GQAConfig(n_heads=2).build(6), "d_head=3 is odd"),
])
def test_refusals(make, words):
    with pytest.raises(ValueError, match=words) as refused:
        make()
    assert "\n" not in str(refused.value)


def test_odd_width_without_rope_is_fine():
    layer = GQAConfig(n_heads=2, d_head=5, rope=None).build(6)
    assert layer(torch.randn(1, 3, 6)).shape == (1, 3, 6)


def test_d_head_may_differ_from_d_model_over_heads():
    layer: GroupedQueryAttention = GQAConfig(n_heads=3, n_kv_heads=1, d_head=8).build(10)
    assert layer.q_proj.weight.shape == (24, 10) and layer.o_proj.weight.shape == (10, 24)
    assert layer.k_proj.weight.shape == layer.v_proj.weight.shape == (8, 10)
