"""Grouped-query attention, its window, its sinks and its ring, against one query at a time."""

import math
import random
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from skylar.layers.attention import Tokens, fused_attention, visible
from skylar.layers.block import BlockConfig
from skylar.layers.cache import KVCache, LayerCache
from skylar.layers.mlp import SwiGLUConfig
from skylar.layers.gqa import GQAConfig, GroupedQueryAttention, RingCache, Window
from skylar.layers.masks import attend
from skylar.layers.norm import RMSNormConfig
from skylar.layers.rope import LinearScaling, RoPEConfig
from skylar.models.decoder import CausalLM, DecoderConfig, restarting_positions

NORM = RMSNormConfig(eps=1e-5)


# --- the slow reference -------------------------------------------------------------------------


def turned(x, position, theta, factor):
    "x (Dh,), pair (i, i + Dh/2) turned by its angle, one pair at a time."
    half, out = len(x) // 2, x.clone()
    for i in range(half):
        angle = position / factor * theta ** (-2 * i / len(x))
        c, s = math.cos(angle), math.sin(angle)
        out[i], out[i + half] = x[i] * c - x[i + half] * s, x[i + half] * c + x[i] * s
    return out


def normed(x, norm):
    return x / (x.square().mean() + norm.eps).sqrt() * norm.weight


def in_sight(window, index, positions, documents, t, s):
    if s > t or documents[s] != documents[t]:
        return False
    return window is None or t - s < window.size or positions[s] < window.sinks


def one_at_a_time(layer, x, documents):
    "One row: x (T, D), documents a list of T. Each head of each query, in a loop."
    config, T, Dh = layer.config, len(x), layer.d_head
    positions = restarting_positions(torch.tensor([documents]))[0].tolist()
    H, K = config.n_heads, config.n_kv_heads or config.n_heads
    factor = config.rope.scaling.factor if config.rope and config.rope.scaling else 1

    def head(project, norm, t, h, turn):
        y = project(x[t])[h * Dh:(h + 1) * Dh]
        y = normed(y, norm) if norm is not None else y
        return turned(y, positions[t], config.rope.theta, factor) if turn and config.rope else y

    rows = []
    for t in range(T):
        heads = []
        for h in range(H):
            kv = h // (H // K)
            seen = [s for s in range(t + 1)
                    if in_sight(config.window, None, positions, documents, t, s)]
            q = head(layer.q_proj, layer.q_norm, t, h, True)
            k = torch.stack([head(layer.k_proj, layer.k_norm, s, kv, True) for s in seen])
            v = torch.stack([head(layer.v_proj, None, s, kv, False) for s in seen])
            heads.append((k @ q / math.sqrt(Dh)).softmax(0) @ v)
        rows.append(layer.o_proj(torch.cat(heads)))
    return torch.stack(rows)


def random_config(rng: random.Random, **changes) -> GQAConfig:
    K = rng.choice([1, 2, 3])
    sizes = dict(
        n_heads=K * rng.choice([1, 2, 4]), n_kv_heads=K, d_head=2 * rng.randint(1, 5),
        bias=rng.random() < 0.5, qk_norm=rng.choice([None, NORM]),
        rope=rng.choice([None, RoPEConfig(theta=50.0),
                         RoPEConfig(theta=90.0, scaling=LinearScaling(factor=2.0))]),
        window=rng.choice([None, Window(size=rng.randint(1, 6), sinks=rng.randint(0, 3))]))
    return GQAConfig(**sizes | changes)


def random_documents(rng: random.Random, B: int, T: int) -> list[list[int]]:
    "Each row its own cuts: packed documents, padding left or right, or nothing of it."
    rows = []
    for _ in range(B):
        cuts = sorted(rng.sample(range(1, T), rng.randint(0, min(3, T - 1))))
        rows.append([sum(t >= c for c in cuts) for t in range(T)])
    return rows


def scrambled(layer, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.5 * torch.randn_like(p))
    return layer


def placed(x, documents):
    "Tokens of a whole batch, as a decoder makes them."
    if documents is None:
        return Tokens.of(x)
    documents = torch.tensor(documents)
    return Tokens(index=torch.arange(x.shape[1]), documents=documents,
                  positions=restarting_positions(documents))


def piece(whole: Tokens, start: int, end: int) -> Tokens:
    "What a decoder says about tokens start..end when it has read those before."
    def cut(x, a):
        return None if x is None else x[..., a:end]

    def some(a):
        return Tokens(index=cut(whole.index, a), positions=cut(whole.positions, a),
                      documents=cut(whole.documents, a))

    tokens = some(start)
    tokens.past = some(0)
    return tokens


def in_chunks(layer, cache, x, whole, sizes):
    out, start = [], 0
    for n in sizes:
        tokens = piece(whole, start, start + n)
        out.append(layer(x[:, start:start + n], tokens, cache))
        start += n
    assert start == x.shape[1] == cache.length
    return torch.cat(out, dim=1)


def random_chunks(rng: random.Random, T: int) -> list[int]:
    sizes = []
    while sum(sizes) < T:
        sizes.append(min(rng.choice([1, 1, 2, 5, 11]), T - sum(sizes)))
    return sizes


# --- the layer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(24))
def test_equals_one_query_at_a_time(seed):
    rng = random.Random(seed)
    layer = scrambled(random_config(rng).build(10), seed)
    B, T = 2, rng.randint(2, 12)
    x = torch.randn(B, T, 10)
    documents = random_documents(rng, B, T) if seed % 2 else None
    found = layer(x, placed(x, documents))
    rows = documents or [[0] * T] * B
    expected = torch.stack([one_at_a_time(layer, x[b], rows[b]) for b in range(B)])
    assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(60))
def test_cached_in_any_chunks_equals_uncached(seed):
    rng = random.Random(1000 + seed)
    window = Window(size=rng.randint(1, 6), sinks=rng.randint(0, 3))
    config = random_config(rng, window=window)
    layer = scrambled(config.build(10), seed).double()
    B, T = rng.randint(1, 3), rng.randint(2, 40)
    x = torch.randn(B, T, 10, dtype=torch.double)
    whole = placed(x, random_documents(rng, B, T) if rng.random() < 0.7 else None)
    cache = config.cache(10, B, rng.choice([None, T + window.size]), torch.double)
    if window.sinks + window.size < T + window.size:
        assert isinstance(cache, RingCache)
    found = in_chunks(layer, cache, x, whole, random_chunks(rng, T))
    assert_close(found, layer(x, whole), rtol=1e-9, atol=1e-9)


def test_sinks_are_the_first_tokens_of_each_rows_document():
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [7] * 9])
    tokens = Tokens(index=torch.arange(9), positions=restarting_positions(documents),
                    documents=documents)
    mask = visible(tokens, tokens, Window(size=2, sinks=1))[:, 0]
    assert mask[0, 8].nonzero().flatten().tolist() == [3, 7, 8]  # padded: starts at 3
    assert mask[1, 8].nonzero().flatten().tolist() == [0, 7, 8]


def test_window_as_long_as_the_text_is_no_window():
    torch.manual_seed(0)
    free = GQAConfig(n_heads=4, n_kv_heads=2).build(16)
    bound = GQAConfig(n_heads=4, n_kv_heads=2, window=Window(size=9)).build(16)
    bound.load_state_dict(free.state_dict())
    x = torch.randn(2, 9, 16)
    assert_close(bound(x), free(x))


def test_layers_share_angles_only_if_they_turn_alike():
    x = torch.randn(1, 5, 16)
    tokens = Tokens.of(x)
    configs = [
        GQAConfig(n_heads=2, d_head=4), GQAConfig(n_heads=2, d_head=6),
        GQAConfig(n_heads=2, d_head=4, rope=RoPEConfig(theta=50.0)),
        GQAConfig(n_heads=2, d_head=4, rope=RoPEConfig(scaling=LinearScaling(factor=3.0))),
        GQAConfig(n_heads=4, d_head=4),  # turns as the first does
    ]
    for config in configs:
        layer = scrambled(config.build(16), 0)
        assert_close(layer(x, tokens), layer(x))
    assert len(tokens.shared) == 4
    layer.bfloat16()(x.bfloat16(), tokens)  # tables of its own type
    assert len(tokens.shared) == 5


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
    config = GQAConfig(n_heads=4, n_kv_heads=2, qk_norm=NORM, window=Window(size=3, sinks=1))
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


@pytest.mark.parametrize("window", [None, Window(size=3), Window(size=3, sinks=2)])
def test_compiles_as_one_graph(window):
    torch.manual_seed(0)
    torch.compiler.reset()
    layer = GQAConfig(n_heads=4, n_kv_heads=2, qk_norm=NORM, window=window).build(16)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = torch.randn(2, 7, 16)
    documents = [[0, 0, 1, 1, 1, 1, 1], [4, 4, 4, 4, 4, 5, 5]]
    assert_close(compiled(x), layer(x))
    assert_close(compiled(x, placed(x, documents)), layer(x, placed(x, documents)))


@torch.no_grad()
def test_ring_compiles_as_one_graph():
    torch.manual_seed(0)
    torch.compiler.reset()
    config = GQAConfig(n_heads=4, n_kv_heads=2, window=Window(size=3, sinks=1))
    layer, x = config.build(16), torch.randn(2, 9, 16)
    expected, whole = layer(x), placed(x, None)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    found = in_chunks(compiled, config.cache(16, 2), x, whole, [4, 1, 1, 3])
    assert_close(found, expected)


# --- the ring -----------------------------------------------------------------------------------


def small_model(**changes) -> CausalLM:
    torch.manual_seed(0)
    attention = GQAConfig(n_heads=4, n_kv_heads=2, qk_norm=NORM,
                          window=Window(size=4, sinks=2))
    full = replace(attention, window=None)
    blocks = tuple(BlockConfig(attention=a, ffn=SwiGLUConfig(d_ff=24), norm=NORM)
                   for a in (attention, full, replace(attention, **changes), attention))
    return CausalLM(DecoderConfig(
        vocab_size=31, d_model=16, blocks=blocks, max_seq_len=200, norm=NORM, init_std=0.3)).eval()


@torch.no_grad()
@pytest.mark.parametrize("capacity", [None, 60])
def test_decoder_with_rings_equals_uncached(capacity):
    model = small_model(window=Window(size=7))
    ids = torch.randint(31, (3, 50))
    padding = torch.tensor([0, 5, 11])
    real = (torch.arange(50) >= padding[:, None]).long()
    expected = model(ids, document_ids=real)
    cache = KVCache(model.config, 3, capacity)
    logits = [model(ids[:, :20], document_ids=real[:, :20], cache=cache)]
    logits += [model(ids[:, t:t + 1], cache=cache) for t in range(20, 40)]
    logits += [model(ids[:, 40:], cache=cache)]
    assert_close(torch.cat(logits, 1), expected, rtol=1e-4, atol=1e-4)
    for i in range(3):  # and each row alone, without its padding
        alone = model(ids[i:i + 1, padding[i]:])
        assert_close(expected[i:i + 1, padding[i]:], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_every_kernel_reads_seats_in_any_order():
    model = small_model(window=Window(size=150, sinks=3))
    config = replace(model.config, attend=attend, max_seq_len=900)
    ids = torch.randint(31, (2, 700))
    real = (torch.arange(700) >= torch.tensor([[0], [13]])).long()
    other = CausalLM(config).eval()
    other.load_state_dict(model.state_dict())
    plain = CausalLM(replace(config, attend=fused_attention)).eval()
    plain.load_state_dict(model.state_dict())
    cache, logits = KVCache(config, 2), []
    for start, end in ((0, 300), (300, 301), (301, 660), (660, 661), (661, 700)):
        chunk = slice(start, end)
        logits.append(other(ids[:, chunk], document_ids=real[:, chunk], cache=cache))
    expected = plain(ids, document_ids=real)
    assert_close(torch.cat(logits, 1), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_like_rings_seat_their_tokens_together():
    model, ids = small_model(), torch.randint(31, (2, 30))
    cache = KVCache(model.config, 2)
    for start, end in ((0, 9), (9, 10), (10, 11), (11, 20)):
        model(ids[:, start:end], cache=cache)
        first, last = cache[0].seated, cache[3].seated
        assert first is last is cache[2].seated
    cache.reorder(torch.tensor([1, 0, 1]))
    assert cache[0].seated is cache[3].seated


@torch.no_grad()
def test_memory_stays_the_same_however_long_the_text():
    window = Window(size=8, sinks=4)
    config = GQAConfig(n_heads=4, n_kv_heads=2, d_head=6, window=window)
    layer, cache = config.build(16), config.cache(16, 3)
    expected = 2 * 3 * 2 * 6 * (8 + 4) * 4  # k and v, B, K, Dh, seats, bytes
    whole = placed(torch.empty(3, 500, 1), None)
    start = 0
    for n in [1, 100, 1, 1, 250, 1, 40]:
        layer(torch.randn(3, n, 16), piece(whole, start, start + n), cache)
        start += n
        assert cache.nbytes == expected == cache.keys.nbytes + cache.values.nbytes
        assert cache.keys.is_contiguous() and cache.keys.untyped_storage().nbytes() * 2 == expected


def test_cache_is_a_ring_only_where_it_saves():
    config = GQAConfig(n_heads=2, window=Window(size=8, sinks=2))
    assert isinstance(config.cache(8, 1, None), RingCache)
    assert isinstance(config.cache(8, 1, 11), RingCache)
    assert type(config.cache(8, 1, 10)) is LayerCache
    assert type(replace(config, window=None).cache(8, 1, 99)) is LayerCache


@torch.no_grad()
def test_empty_seats_are_never_seen():
    config = GQAConfig(n_heads=2, d_head=2, window=Window(size=5, sinks=3))
    layer, cache = config.build(4), config.cache(4, 1)
    x = torch.randn(1, 2, 4)
    out = layer(x[:, :1], piece(placed(x, None), 0, 1), cache)
    assert_close(out, layer(x[:, :1]))
    _, _, keys = cache.update(torch.randn(1, 2, 1, 2), torch.randn(1, 2, 1, 2),
                              piece(placed(x, None), 1, 2))
    seen = visible(piece(placed(x, None), 1, 2), keys, config.window)
    assert seen.sum() == 2 and not cache.keys.isnan().any()


@torch.no_grad()
def test_ring_goes_back_where_it_can():
    model, ids = small_model(), torch.randint(31, (2, 30))
    expected = model(ids)
    cache = KVCache(model.config, 2)
    model(ids[:, :4], cache=cache)
    cache.crop(2)  # nothing was overwritten yet
    model(ids[:, 2:20], cache=cache)
    model(ids[:, 20:21], cache=cache)
    cache.crop(20)  # one token
    assert_close(model(ids[:, 20:], cache=cache), expected[:, 20:], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="window of 4 has overwritten.*reset"):
        cache.crop(25)
    cache.reset()
    assert_close(model(ids, cache=cache), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_ring_refuses_to_go_back_into_an_earlier_document():
    config = GQAConfig(n_heads=2, window=Window(size=9, sinks=1))
    layer, cache = config.build(8), config.cache(8, 1)
    x = torch.randn(1, 5, 8)
    whole = placed(x, [[0, 0, 0, 1, 1]])
    layer(x[:, :4], piece(whole, 0, 4), cache)
    with pytest.raises(ValueError, match="overwritten"):
        cache.crop(3)


@torch.no_grad()
def test_rows_can_be_reordered_and_repeated():
    model, ids = small_model(), torch.randint(31, (2, 12))
    start = torch.tensor([[0] * 3 + [1] * 9, [1] * 12])
    cache = KVCache(model.config, 2)
    model(ids[:, :9], document_ids=start[:, :9], cache=cache)
    cache.reorder(torch.tensor([1, 0, 0]))
    found = model(ids[[1, 0, 0], 9:], cache=cache)
    assert_close(found, model(ids, document_ids=start)[[1, 0, 0], 9:], rtol=1e-4, atol=1e-4)


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "words"), [
    (lambda: GQAConfig(n_heads=0), "n_heads=0: .* at least one head"),
    (lambda: GQAConfig(n_heads=6, n_kv_heads=4), "n_kv_heads=4 does not divide n_heads=6.*choose"),
    (lambda: GQAConfig(n_heads=2, n_kv_heads=0), "n_kv_heads=0"),
    (lambda: GQAConfig(n_heads=2, n_kv_heads=4), "n_kv_heads=4"),
    (lambda: GQAConfig(n_heads=2, d_head=0), "d_head=0"),
    (lambda: GQAConfig(n_heads=2, d_head=5), "d_head=5 is odd.*even width, or rope=None"),
    (lambda: GQAConfig(n_heads=2, dropout=1.0), "dropout=1.0"),
    (lambda: GQAConfig(n_heads=3).build(16), "d_model=16 is not divisible by n_heads=3.*d_head"),
    (lambda: GQAConfig(n_heads=2).build(6), "d_head=3 is odd"),
    (lambda: Window(size=0), "window size=0.*at least 1.*window=None"),
    (lambda: Window(size=2.5), "window size=2.5"),
    (lambda: Window(size=True), "window size=True"),
    (lambda: Window(size=2, sinks=-1), "window sinks=-1.*at least 0"),
])
def test_refusals(make, words):
    with pytest.raises(ValueError, match=words) as refused:
        make()
    assert "\n" not in str(refused.value)


def test_odd_width_without_rope_is_fine():
    layer = GQAConfig(n_heads=2, d_head=5, rope=None).build(6)
    assert layer(torch.randn(1, 3, 6)).shape == (1, 3, 6)


def test_ring_refuses_what_does_not_fit():
    cache = GQAConfig(n_heads=2, window=Window(size=2)).cache(8, 1)
    k, tokens = torch.zeros(2, 2, 1, 4), Tokens.of(torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"\(2, 2, 4\).*\(1, 2, 4\)"):
        cache.update(k, k, tokens)
    with pytest.raises(ValueError, match="float64.*float32"):
        cache.update(k[:1].double(), k[:1].double(), tokens)
    assert cache.length == 0 and cache.seated is None


def test_d_head_may_differ_from_d_model_over_heads():
    layer: GroupedQueryAttention = GQAConfig(n_heads=3, n_kv_heads=1, d_head=8).build(10)
    assert layer.q_proj.weight.shape == (24, 10) and layer.o_proj.weight.shape == (10, 24)
    assert layer.k_proj.weight.shape == layer.v_proj.weight.shape == (8, 10)
