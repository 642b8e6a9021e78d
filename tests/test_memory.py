"""Longer memory: kNN memory against full attention, chunks against single steps, no future."""

import dataclasses
import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from skylar.inference.generate import generate
from skylar.layers.attention import attention, causal_mask
from skylar.layers.attention_backends import Positions, restarting_positions
from skylar.layers.block import BlockConfig
from skylar.layers.cache import DynamicLayerCache, KVCache, StaticLayerCache
from skylar.layers.gqa import GQAConfig
from skylar.layers.memory import (
    IVFIndex,
    KNNMemoryConfig,
    MemoryAsContextConfig,
    MemoryAsGateConfig,
    MemoryAsLayerConfig,
    MemoryGates,
    MemoryState,
    NeuralMemoryConfig,
    attend_to_found,
    chunk_slices,
    chunk_step,
    clip_scale,
    context_mask,
    decay_products,
    exact_search,
    fit_centroids,
    memory_gradients,
    memory_read,
    probed,
    spherical_kmeans,
)
from skylar.layers.memory_state import MemoryCache, PairCache
from skylar.layers.mlp import SwiGLUConfig
from skylar.layers.norm import RMSNormConfig
from skylar.layers.rope import apply_rope
from skylar.layers.sliding_window import SlidingWindow
from skylar.models.decoder import CausalLM, DecoderConfig, cache_bytes, count_parameters
from skylar.models.presets import config_from_dict, config_to_dict

D, VOCAB = 24, 31
NEURAL = NeuralMemoryConfig(n_heads=3, chunk=4)
WINDOW = GQAConfig(n_heads=4, n_kv_heads=2, d_head=6, window=SlidingWindow(size=5))
FULL = GQAConfig(n_heads=4, n_kv_heads=2, d_head=6, qk_norm=RMSNormConfig())
LAYERS = {
    "knn": KNNMemoryConfig(n_heads=4, n_kv_heads=2, d_head=6, window=5, top_k=3),
    "knn_lists": KNNMemoryConfig(n_heads=4, d_head=6, window=3, top_k=2, n_lists=6, n_probe=2),
    "neural": NEURAL,
    "neural_online": NeuralMemoryConfig(n_heads=2, d_head=5, chunk=1),
    "neural_deep": NeuralMemoryConfig(n_heads=2, depth=2, expansion=3, chunk=7),
    "neural_plain": NeuralMemoryConfig(n_heads=2, momentum=False, forgetting=False),
    "gate": MemoryAsGateConfig(attention=WINDOW, memory=NEURAL),
    "layer": MemoryAsLayerConfig(attention=WINDOW, memory=NEURAL),
    "context": MemoryAsContextConfig(attention=FULL, memory=NEURAL),
}
STATEFUL = [name for name in LAYERS if not name.startswith("knn")]
all_layers = pytest.mark.parametrize("name", LAYERS)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def scrambled(module, seed: int = 0):
    "No weight at 0 or 1; an empty memory that is not empty."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.05 + 0.3 * torch.randn(p.shape, generator=generator))
    return module


def decoder_of(attention_config, n_layers: int = 2) -> DecoderConfig:
    norm = RMSNormConfig()
    block = BlockConfig(attention=attention_config, ffn=SwiGLUConfig(d_ff=20), norm=norm)
    return DecoderConfig(vocab_size=VOCAB, d_model=D, blocks=(block,) * n_layers, norm=norm,
                         max_seq_len=128)


def model_of(name: str):
    return scrambled(CausalLM(decoder_of(LAYERS[name]))).double().eval()


def placed(x, documents=None) -> Positions:
    if documents is None:
        return Positions.of(x)
    return Positions(cache_position=torch.arange(x.shape[1]), document_ids=documents,
                     position_ids=restarting_positions(documents))


def random_ids(B: int, T: int, seed: int = 0):
    return torch.randint(VOCAB, (B, T), generator=torch.Generator().manual_seed(seed))


# --- every layer --------------------------------------------------------------------------------


@all_layers
@torch.no_grad()
def test_the_past_does_not_notice_the_future(name):
    model, ids = model_of(name), random_ids(2, 40)
    before = model(ids)
    for t in (1, 5, 17, 39):
        changed = ids.clone()
        changed[:, t:] = (changed[:, t:] + 1) % VOCAB
        after = model(changed)
        assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-12)
        assert not torch.allclose(after[:, t], before[:, t])


@all_layers
def test_no_gradient_from_the_past_to_the_future(name):
    layer = scrambled(LAYERS[name].build(D)).double()
    x = torch.randn(1, 30, D, dtype=torch.double, requires_grad=True)
    for t in (0, 7, 8, 21):
        (grad,) = torch.autograd.grad(layer(x)[:, t].sum(), x)
        assert grad[:, t].any() and not grad[:, t + 1:].any()


@all_layers
@torch.no_grad()
def test_old_tokens_reach_far_beyond_the_window(name):
    layer = scrambled(LAYERS[name].build(D)).double()
    x = torch.randn(1, 60, D, dtype=torch.double)
    moved = x.clone()
    moved[:, :10] = torch.randn(10, D, dtype=torch.double)
    assert not torch.equal(layer(moved)[:, 40:], layer(x)[:, 40:])


@all_layers
@torch.no_grad()
@pytest.mark.parametrize("seed", range(6))
def test_cached_in_any_chunks_equals_uncached(name, seed):
    rng, model = random.Random(seed), model_of(name)
    B, T = rng.randint(1, 3), rng.randint(2, 45)
    ids, documents = random_ids(B, T, seed), None
    if seed % 2:
        cuts = [sorted(rng.sample(range(1, T), min(2, T - 1))) for _ in range(B)]
        documents = torch.tensor([[sum(t >= c for c in row) for t in range(T)] for row in cuts])
    cache, parts, start = KVCache(model.config, B, dtype=torch.double), [], 0
    while start < T:
        stop = min(start + rng.choice([1, 1, 2, 5, 11]), T)
        more = None if documents is None else documents[:, start:stop]
        parts.append(model(ids[:, start:stop], document_ids=more, cache=cache))
        start = stop
    whole = model(ids, document_ids=documents)
    assert_close(torch.cat(parts, 1), whole, rtol=1e-6, atol=1e-6)


@all_layers
@torch.no_grad()
def test_packed_and_padded_documents_equal_separate_ones(name):
    model, ids = model_of(name), random_ids(2, 30)
    documents = torch.tensor([[0] * 11 + [1] * 19, [0] * 4 + [1] * 20 + [2] * 6])
    for cache in (None, KVCache(model.config, 2, dtype=torch.double)):
        found = model(ids, document_ids=documents, cache=cache)
        for row, cuts in enumerate(([0, 11, 30], [0, 4, 24, 30])):
            for a, b in zip(cuts, cuts[1:]):
                assert_close(found[row, a:b], model(ids[row:row + 1, a:b])[0],
                             rtol=1e-6, atol=1e-6)


@all_layers
def test_gradients_of_packed_documents_equal_those_of_separate_ones(name):
    model, ids = model_of(name), random_ids(1, 20)
    documents = torch.tensor([[0] * 9 + [1] * 11])
    parameters = list(model.parameters())
    whole = torch.autograd.grad(model(ids, document_ids=documents).square().sum(), parameters)
    alone = torch.autograd.grad(
        sum(model(ids[:, a:b]).square().sum() for a, b in ((0, 9), (9, 20))), parameters)
    for a, b in zip(whole, alone):
        assert_close(a, b, rtol=1e-6, atol=1e-8)


@all_layers
@torch.no_grad()
def test_generation_with_left_padding_equals_without_cache(name):
    model, ids = model_of(name).float(), random_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    found = [generate(model, ids, 12, temperature=0, attention_mask=mask, cache=cache)
             for cache in (True, False)]
    assert torch.equal(*found)


@all_layers
@torch.no_grad()
def test_reorder_and_reset(name):
    model, ids = model_of(name), random_ids(3, 26)
    cache = KVCache(model.config, 3, dtype=torch.double)
    model(ids[:, :20], cache=cache)
    cache.reorder(torch.tensor([2, 2, 0]))
    expected = model(ids[torch.tensor([2, 2, 0])])[:, 20:]
    assert_close(model(ids[[2, 2, 0], 20:], cache=cache), expected, rtol=1e-6, atol=1e-6)
    cache.reset()
    assert_close(model(ids, cache=cache), model(ids), rtol=1e-6, atol=1e-6)


@all_layers
@torch.no_grad()
@pytest.mark.parametrize("T", [3, 16, 45])
def test_bytes_by_formula(name, T):
    config = decoder_of(LAYERS[name])
    model, cache = CausalLM(config).eval(), KVCache(config, 2, capacity=T)
    model(random_ids(2, T), cache=cache)
    assert cache.nbytes == cache_bytes(config, T, torch.float32, 2)


@all_layers
def test_a_cache_holds_no_gradients(name):
    model = CausalLM(decoder_of(LAYERS[name]))
    with pytest.raises(ValueError, match="no gradients"):
        model(random_ids(1, 4), cache=KVCache(model.config, 1))


@all_layers
def test_a_failed_pass_leaves_the_cache_as_it_was(name):
    model, ids = model_of(name), random_ids(1, 12)
    cache = KVCache(model.config, 1, dtype=torch.double)
    with torch.no_grad():
        model(ids[:, :8], cache=cache)
        hook = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ids[:, 8:], cache=cache)
        hook.remove()
        found = model(ids[:, 8:], cache=cache)
        assert_close(found, model(ids)[:, 8:], rtol=1e-6, atol=1e-6)


@all_layers
def test_every_parameter_has_a_gradient_and_a_start(name):
    model = CausalLM(decoder_of(LAYERS[name]))
    F.cross_entropy(model(random_ids(2, 30))[:, :-1].flatten(0, 1),
                    random_ids(2, 29, 1).flatten()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.device("meta"):
        empty = CausalLM(decoder_of(LAYERS[name]))
    empty.to_empty(device="cpu")
    torch.manual_seed(0)
    empty.init_weights()
    torch.manual_seed(0)
    model.init_weights()
    assert all(torch.equal(a, b) for a, b in zip(empty.state_dict().values(),
                                                model.state_dict().values()))


@all_layers
def test_counts_and_configs_survive_json(name):
    config = decoder_of(LAYERS[name])
    assert config_from_dict(config_to_dict(config)) == config
    assert count_parameters(config) == sum(p.numel() for p in CausalLM(config).parameters())


@all_layers
def test_bf16_and_autocast(name):
    model, ids = CausalLM(decoder_of(LAYERS[name])).eval(), random_ids(2, 20)
    with torch.no_grad():
        exact = model(ids)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(ids)
        rounded = model.to(torch.bfloat16)(ids)
    if not name.startswith("knn"):  # another neighbor is another result
        for found in (mixed, rounded):
            assert (found.float() - exact).norm() < 0.1 * exact.norm()
    assert mixed.isfinite().all() and rounded.isfinite().all()


@pytest.mark.parametrize("change", [
    dict(top_k=0), dict(window=0), dict(n_lists=4, n_probe=5), dict(n_kv_heads=3)])
def test_impossible_knn_configs(change):
    with pytest.raises(ValueError):
        KNNMemoryConfig(**dict(n_heads=4, window=5, top_k=3) | change)


def test_impossible_neural_configs():
    for change in (dict(chunk=0), dict(depth=0), dict(max_step=0.0), dict(max_grad_norm=0.0)):
        with pytest.raises(ValueError):
            NeuralMemoryConfig(n_heads=2, **change)
    with pytest.raises(ValueError, match="window"):
        MemoryAsContextConfig(attention=WINDOW, memory=NEURAL)


# --- kNN memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
def test_all_neighbors_are_full_attention(heads):
    H, K = heads
    torch.manual_seed(0)
    q = torch.randn(2, H, 9, 5, dtype=torch.double, requires_grad=True)
    k, v = torch.randn(2, 2, K, 12, 5, dtype=torch.double)
    allowed = torch.rand(2, 1, 9, 12) < 0.6
    allowed[..., 0] = True
    out = attend_to_found(q, k, v, *exact_search(q, k, allowed, 99))
    wide = (x.repeat_interleave(H // K, 1) for x in (k, v))
    full = attention(q, *wide, allowed)
    assert_close(out, full)
    g = torch.randn_like(out)
    assert_close(*(torch.autograd.grad(y, q, g)[0] for y in (out, full)))


def test_neighbors_by_a_loop():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 7, 4), torch.randn(1, 1, 11, 4), torch.randn(1, 1, 11, 4)
    allowed = torch.rand(1, 1, 7, 11) < 0.4
    allowed[0, 0, 3] = False
    out = attend_to_found(q, k, v, *exact_search(q, k, allowed, 3))
    for h in range(2):
        for t in range(7):
            scores = [(float(q[0, h, t] @ k[0, 0, s]), s) for s in range(11)
                      if allowed[0, 0, t, s]]
            best = sorted(scores, reverse=True)[:3]
            if not best:
                assert not out[0, h, t].any()
                continue
            weights = (torch.tensor([score for score, _ in best]) / 2).softmax(0)
            assert_close(out[0, h, t], weights @ v[0, 0, [s for _, s in best]])


def test_found_keys_and_values_get_no_gradients():
    q, k, v = (torch.randn(1, 2, 5, 4, requires_grad=True) for _ in range(3))
    slots, found = exact_search(q, k, torch.ones(1, 1, 5, 5, dtype=torch.bool), 2)
    assert not slots.requires_grad
    attend_to_found(q, k, v, slots, found).sum().backward()
    assert q.grad.any() and k.grad is v.grad is None


@pytest.mark.parametrize("top_k", [2, 99])
def test_the_layer_by_its_formula(top_k):
    config = KNNMemoryConfig(n_heads=4, n_kv_heads=2, d_head=6, window=5, top_k=top_k)
    layer, T = scrambled(config.build(D)).double(), 20
    x = torch.randn(2, T, D, dtype=torch.double)
    q, k, v = layer.heads(x)
    tables, far = layer.rotary(torch.arange(T), torch.double), causal_mask(T).tril(-5)
    k, v = (y.repeat_interleave(2, 1) for y in (k, v))
    near = attention(apply_rope(q, *tables), apply_rope(k, *tables), v, causal_mask(T) & ~far)
    scores = (q @ k.mT).masked_fill(~far, -math.inf)
    kept = scores >= scores.topk(min(top_k, T), -1).values[..., -1:]
    old = attention(q, k, v, kept & far).nan_to_num()
    g = layer.memory_gate.sigmoid()[:, None, None] * far.any(-1)[:, None]
    expected = layer.o_proj(((1 - g) * near + g * old).transpose(1, 2).flatten(2))
    assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)  # rotary tables are float32


def test_a_window_for_everything_never_searches():
    config = KNNMemoryConfig(n_heads=4, n_kv_heads=2, d_head=6, window=20, top_k=3)
    layer, x = scrambled(config.build(D)), torch.randn(2, 20, D)
    plain = GQAConfig(n_heads=4, n_kv_heads=2, d_head=6, qk_norm=RMSNormConfig()).build(D)
    plain.load_state_dict(layer.state_dict(), strict=False)
    assert_close(layer(x), plain(x))


def test_the_memory_trains_queries_and_gate_only():
    layer, x = scrambled(LAYERS["knn"].build(D)), torch.randn(1, 20, D)
    q, k, v = layer.heads(x)
    far = causal_mask(20).tril(-5)[None, None]
    part = attend_to_found(q, k, v, *layer.search(q, k, far))
    layer.o_proj(part.transpose(1, 2).flatten(2)).sum().backward()
    reached = {name.split(".")[0] for name, p in layer.named_parameters() if p.grad is not None}
    assert reached == {"q_proj", "q_norm", "o_proj"}  # the gate multiplies afterwards


def test_caches_of_knn_memory():
    config = LAYERS["knn"]
    assert type(config.cache(D, 1)) is DynamicLayerCache
    assert type(config.cache(D, 1, 10)) is StaticLayerCache


@torch.no_grad()
def test_knn_memory_can_be_cropped_to_unlike_lengths():
    model, ids = model_of("knn"), random_ids(2, 30)
    cache = KVCache(model.config, 2, dtype=torch.double)
    model(ids, cache=cache)
    cache.crop(torch.tensor([17, 25]))
    more = random_ids(2, 3, 1)
    found = model(more, cache=cache)
    for i, n in enumerate((17, 25)):
        alone = model(torch.cat([ids[i, :n], more[i]])[None])
        assert_close(found[i], alone[0, -3:], rtol=1e-6, atol=1e-6)


# --- approximate search -------------------------------------------------------------------------


def clustered(n: int, width: int = 8, groups: int = 10, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    centers = F.normalize(torch.randn(groups, width, generator=generator), dim=-1)
    noise = 0.2 * torch.randn(n, width, generator=generator)
    return F.normalize(centers[torch.arange(n) % groups] + noise, dim=-1)


def recall(keys, queries, index, top_k, n_probe) -> float:
    truth = (queries @ keys.mT).topk(top_k).indices.tolist()
    found = [index.search(q, top_k, n_probe)[0].tolist() for q in queries]
    return sum(len({*a} & {*b}) for a, b in zip(truth, found)) / (top_k * len(queries))


def test_recall_grows_with_the_lists_probed_and_ends_at_1():
    keys, queries = clustered(400), clustered(30, seed=0) + 0.01
    centroids = spherical_kmeans(keys, 16, generator=torch.Generator().manual_seed(0))
    index = IVFIndex(keys, centroids)
    found = [recall(keys, queries, index, 5, n) for n in (1, 2, 4, 8, 16)]
    assert found == sorted(found) and found[-1] == 1.0
    assert found[1] > 0.8  # clustered keys
    read = sum(index.search(q, 5, 2)[1] for q in queries) / len(queries)
    assert read < 0.4 * len(keys)


def test_kmeans_finds_clusters_and_keeps_empty_lists():
    keys = clustered(200, groups=4)
    centroids = spherical_kmeans(keys, 4, 20, torch.Generator().manual_seed(3))
    assert_close(centroids.norm(dim=-1), torch.ones(4))
    same = torch.ones(5, 3)
    assert spherical_kmeans(same, 3).isfinite().all()  # two lists stay empty


def test_the_index_keeps_every_key_once():
    keys = clustered(57)
    index = IVFIndex(keys, spherical_kmeans(keys, 9, generator=torch.Generator().manual_seed(0)))
    assert sorted(index.slots.tolist()) == list(range(57)) and int(index.ends[-1]) == 57
    slots, read = index.search(keys[5], 57, 9)
    assert read == 57 and len(slots) == 57 and int(slots[0]) == 5


@torch.no_grad()
@pytest.mark.parametrize("n_probe", [1, 3, 8])
def test_masked_lists_equal_the_index(n_probe):
    config = KNNMemoryConfig(n_heads=4, n_kv_heads=2, d_head=6, window=5, top_k=4, n_lists=8,
                             n_probe=n_probe)
    layer, x = scrambled(config.build(D)), torch.randn(2, 90, D)
    fit_centroids(layer, x)
    q, k, _ = layer.heads(x)
    slots, found = layer.search(q, k, causal_mask(90).tril(-5)[None, None])
    for b, h, t in ((0, 0, 89), (1, 3, 60), (1, 1, 40), (0, 2, 7)):
        index = IVFIndex(k[b, h // 2, :t - 4], layer.centroids[h // 2])
        expected, _ = index.search(q[b, h, t], 4, n_probe)
        mine = slots[b, h, t][found[b, h, t]]
        assert sorted(mine.tolist()) == sorted(expected.tolist())


def test_all_lists_are_exact_search():
    torch.manual_seed(0)
    q, k, centroids = torch.randn(2, 4, 6, 5), torch.randn(2, 2, 9, 5), torch.randn(2, 7, 5)
    assert probed(q, k, centroids, 7).all()
    one = probed(q, k, centroids, 1)
    assert one.shape == (2, 4, 6, 9) and 0 < one.float().mean() < 0.6


def test_centroids_are_saved_and_are_no_parameters():
    layer = LAYERS["knn_lists"].build(D)
    assert "centroids" in layer.state_dict()
    assert "centroids" not in dict(layer.named_parameters())
    assert_close(layer.centroids.norm(dim=-1), torch.ones(4, 6))
    assert "centroids" not in LAYERS["knn"].build(D).state_dict()


# --- Titans: chunks equal single steps ----------------------------------------------------------


def reconstruction(weights, k, v):
    return 0.5 * (memory_read(weights, k[None]) - v).square().sum()


def one_by_one(weights, q, k, v, step, eta, keep, chunk, max_grad_norm=None):
    "One head of one sequence, with autograd's gradients: q, k, v (T, Dh), gates (T,)."
    weights, outs = tuple(weights), []
    momentum = tuple(torch.zeros_like(W) for W in weights)
    for t in range(len(q)):
        if t % chunk == 0:
            anchor = weights
        grads = torch.func.grad(reconstruction)(anchor, k[t], v[t])
        if max_grad_norm is not None:
            grads = tuple(g * (max_grad_norm / g.norm()).clamp(max=1) for g in grads)
        momentum = tuple(eta[t] * S - step[t] * g for S, g in zip(momentum, grads))
        weights = tuple(keep[t] * W + S for W, S in zip(weights, momentum))
        outs.append(memory_read(weights, q[t][None])[0])
    return torch.stack(outs), weights, momentum


def by_chunks(state, q, k, v, gates, chunk, pieces, max_grad_norm=None):
    outs, count = [], 0
    for n in pieces:
        for part, full in chunk_slices(count, n, chunk):
            now = slice(count + part.start, count + part.stop)
            out, state = chunk_step(state, q[:, :, now], k[:, :, now], v[:, :, now],
                                    MemoryGates(*(g[:, :, now] for g in gates)), max_grad_norm)
            outs.append(out)
            state = state._replace(anchor=state.weights) if full else state
        count += n
    return torch.cat(outs, 2), state


def random_memory(depth, B=2, H=2, T=11, Dh=4, width=5, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        x = 0.6 * torch.randn(*shape, generator=generator, dtype=torch.double)
        return x.requires_grad_()

    widths = [Dh] + [width] * (depth - 1) + [Dh]
    weights = tuple(normal(B, H, o, i) for i, o in zip(widths, widths[1:]))
    return weights, [normal(B, H, T, Dh) for _ in range(3)], [normal(B, H, T) for _ in range(3)]


def opened(logits) -> MemoryGates:
    return MemoryGates(logits[0].sigmoid(), F.logsigmoid(logits[1]), F.logsigmoid(-logits[2]))


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("chunk", [1, 3, 4, 16])
@pytest.mark.parametrize("pieces", [(11,), (3, 1, 7), (1,) * 11])
@pytest.mark.parametrize("limit", [None, 0.9])
def test_chunks_equal_single_steps_with_all_gradients(depth, chunk, pieces, limit):
    weights, qkv, logits = random_memory(depth)
    gates, zeros = opened(logits), tuple(torch.zeros_like(W) for W in weights)
    start = MemoryState(weights, zeros, weights)
    found, state = by_chunks(start, *qkv, gates, chunk, pieces, limit)
    expected = torch.empty_like(found)
    rows = []
    for b in range(2):
        for h in range(2):
            out, last, momentum = one_by_one(
                [W[b, h] for W in weights], *(x[b, h] for x in qkv), gates.step[b, h],
                gates.log_momentum[b, h].exp(), gates.log_keep[b, h].exp(), chunk, limit)
            rows.append(out)
            for mine, other in zip((*state.weights, *state.momentum), (*last, *momentum)):
                assert_close(mine[b, h], other)
    expected = torch.stack(rows).view_as(found)
    assert_close(found, expected)
    inputs, g = [*weights, *qkv, *logits], torch.randn_like(found)
    ours = torch.autograd.grad(found, inputs, g, retain_graph=True)
    theirs = torch.autograd.grad(expected, inputs, g)
    for a, b in zip(ours, theirs):
        assert_close(a, b)


@pytest.mark.parametrize("depth", [1, 2])
def test_gradcheck(depth):
    weights, qkv, logits = random_memory(depth, B=1, H=1, T=5, Dh=2, width=3)

    def run(*args):
        n = len(weights)
        start = MemoryState(args[:n], tuple(torch.zeros_like(W) for W in weights), args[:n])
        return by_chunks(start, *args[n:n + 3], opened(args[n + 3:]), 2, (5,))[0]

    assert torch.autograd.gradcheck(run, [*weights, *qkv, *logits])


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_token_gradients_equal_autograds(depth):
    weights, (_, k, v), _ = random_memory(depth)
    pairs = memory_gradients(weights, k, v)
    for b, h, t in ((0, 0, 0), (1, 0, 4), (1, 1, 10)):
        mine = tuple(W[b, h].detach() for W in weights)
        grads = torch.func.grad(reconstruction)(mine, k[b, h, t].detach(), v[b, h, t].detach())
        for (delta, a), grad in zip(pairs, grads):
            assert_close(torch.outer(delta[b, h, t], a[b, h, t]), grad)


def test_decay_products_by_a_loop():
    gate = torch.rand(2, 3, 6, dtype=torch.double)
    found = decay_products(gate.log())
    for t in range(6):
        for i in range(6):
            expected = gate[..., i + 1:t + 1].prod(-1) if i <= t else torch.zeros(2, 3).double()
            assert_close(found[..., t, i], expected)
    assert decay_products(torch.full((4, 64), -1e4)).isfinite().all()  # no momentum


def test_one_step_of_1_writes_a_fact_exactly():
    key = F.normalize(torch.randn(1, 1, 1, 6).double(), dim=-1)
    value, M = torch.randn(1, 1, 1, 6).double(), torch.randn(1, 1, 6, 6).double()
    zero, one = torch.zeros(1, 1, 1).double(), torch.ones(1, 1, 1).double()
    out, _ = chunk_step(MemoryState((M,), (0 * M,), (M,)), key, key, value,
                        MemoryGates(one, zero - 1e4, zero))
    assert_close(out, value)


def test_a_fact_that_is_known_changes_nothing():
    k, M = torch.randn(1, 1, 3, 4).double(), torch.randn(1, 1, 4, 4).double()
    gates = MemoryGates(torch.ones(1, 1, 3).double(), *torch.zeros(2, 1, 1, 3).double())
    _, state = chunk_step(MemoryState((M,), (0 * M,), (M,)), k, k, k @ M.mT, gates)
    assert_close(state.weights[0], M)


@torch.no_grad()
@pytest.mark.parametrize("depth", [1, 2])
def test_one_token_again_and_again_stays_bounded(depth):
    "Steps at the same weights add up: without a bound, each chunk's error is a multiple."
    config = NeuralMemoryConfig(n_heads=2, chunk=16, depth=depth)
    x = torch.randn(1, 1, D, generator=torch.Generator().manual_seed(1)).expand(1, 400, D)
    peaks = []
    for limit in (config.max_grad_norm, 1e15):
        torch.manual_seed(0)
        layer = dataclasses.replace(config, max_grad_norm=limit).build(D)
        layer.init_weights(0.2, 0.2)
        peaks.append(float(layer(x).abs().max()))
    assert peaks[0] < 1e5 and peaks[1] > 1e10


def test_gradients_within_the_bound_are_not_touched():
    delta, a = torch.randn(2, 1, 1, 9, 4).double()
    norms = (delta.norm(dim=-1) * a.norm(dim=-1))[0, 0]
    limit = float(norms.median())
    scale = clip_scale(delta, a, limit)[0, 0]
    assert_close(scale, (limit / norms).clamp(max=1))


def test_chunks_are_cut_where_they_end():
    assert list(chunk_slices(0, 5, 4)) == [(slice(0, 4), True), (slice(4, 5), False)]
    assert list(chunk_slices(3, 6, 4)) == [
        (slice(0, 1), True), (slice(1, 5), True), (slice(5, 6), False)]
    assert list(chunk_slices(7, 1, 1)) == [(slice(0, 1), True)]


@pytest.mark.parametrize("name", ["neural", "neural_deep", "neural_plain", "neural_online"])
def test_flops_by_formula(name):
    config = LAYERS[name]
    layer, T = config.build(D), 4 * config.chunk
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(torch.randn(1, T, D))
    assert counter.get_total_flops() == T * config.flops(D, T)


def test_inner_steps_are_float32_under_autocast():
    layer, x = scrambled(NEURAL.build(D)), torch.randn(1, 9, D)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        _, state = layer.scan(x, layer.start(x), 0)
    assert {W.dtype for W in (*state.weights, *state.momentum)} == {torch.float32}


@torch.no_grad()
@pytest.mark.parametrize("name", STATEFUL)
def test_a_memory_cannot_be_rewound(name):
    model, ids = model_of(name), random_ids(2, 12)
    cache = KVCache(model.config, 2, dtype=torch.double)
    model(ids, cache=cache)
    with pytest.raises(ValueError, match="cannot"):
        cache.crop(5)
    cache.crop(12)  # nothing is dropped
    more = random_ids(2, 2, 1)
    expected = model(torch.cat([ids, more], 1))[:, 12:]
    assert_close(model(more, cache=cache), expected, rtol=1e-6, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", ["neural", "neural_deep"])
def test_the_state_does_not_grow(name):
    model, sizes = model_of(name), []
    cache = KVCache(model.config, 1, dtype=torch.double)
    for _ in range(4):
        model(random_ids(1, 25), cache=cache)
        sizes.append(cache.nbytes)
    assert len(set(sizes)) == 1


def test_kinds_of_caches():
    assert type(NEURAL.cache(D, 2)) is MemoryCache
    assert type(LAYERS["gate"].cache(D, 2)) is PairCache
    assert type(LAYERS["context"].cache(D, 2)) is MemoryCache


# --- as context ---------------------------------------------------------------------------------


def test_reading_for_later_tokens_would_show_the_future():
    "Why the mask of memory as context is causal twice."
    layer = scrambled(LAYERS["context"].build(D)).double()
    x = torch.randn(1, 12, D, dtype=torch.double)
    changed = x.clone()
    changed[:, 10:] += 1  # of the segment 8 .. 11

    def past_changes():
        with torch.no_grad():
            return float((layer(x) - layer(changed))[:, :10].abs().max())

    assert past_changes() < 1e-12
    layer.mask = lambda T, S, device=None: torch.cat(
        [torch.ones(T, S, dtype=torch.bool), context_mask(T, S)[:, S:]], -1)
    assert past_changes() > 1e-6


@torch.no_grad()
def test_segments_by_hand():
    "One head, one segment after the other, in plain attention."
    config = MemoryAsContextConfig(attention=GQAConfig(n_heads=1, d_head=6), memory=NEURAL)
    layer = scrambled(config.build(D)).double()
    a, x = layer.attention, torch.randn(1, 10, D, dtype=torch.double)
    state, rows = layer.memory.start(x), []
    for start in (0, 4, 8):
        part = x[:, start:start + 4]
        steps = torch.arange(start, start + part.shape[1])
        tables = a.rotary(steps, torch.double)
        past = layer.memory.retrieve(part, state.weights)
        q = apply_rope(a.q_proj(part)[:, None], *tables)
        k = torch.cat([apply_rope(a.k_proj(y)[:, None], *tables) for y in (past, part)], 2)
        v = torch.cat([a.v_proj(y)[:, None] for y in (past, part)], 2)
        mask = causal_mask(part.shape[1]).repeat(1, 2)
        y = a.o_proj(attention(q, k, v, mask)[:, 0])
        old, state = layer.memory.scan(y, state, start)
        rows.append(y * layer.norm(old).sigmoid())
    assert_close(layer(x), torch.cat(rows, 1), rtol=1e-6, atol=1e-6)
