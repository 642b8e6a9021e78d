"""A model that remembers says what it says when it reads everything again.

The oracle throughout: the same model, without a cache, on the whole sequence.
"""

import random

import pytest
import torch

from skylar.layers.attention import AttentionConfig
from skylar.layers.block import BlockConfig, LayerNormConfig, MLPConfig
from skylar.layers.cache import GrowingCache, KVCache, LayerCache, layer_cache
from skylar.layers.gqa import GQAConfig, Window
from skylar.layers.norm import RMSNormConfig
from skylar.layers.positions import LearnedPositionsConfig, SinusoidalPositionsConfig
from skylar.models.decoder import CausalLM, Decoder, DecoderConfig, gpt2

D, MAX_LEN = 48, 96
MHA = AttentionConfig(n_heads=4)
LAYERS = {
    "mha": MHA,
    "mha, wide heads": AttentionConfig(n_heads=3, d_head=20, bias=False),
    "gqa": GQAConfig(n_heads=4, n_kv_heads=2),
    "mqa": GQAConfig(n_heads=4, n_kv_heads=1, d_head=16),
    "gqa, no rope": GQAConfig(n_heads=4, n_kv_heads=2, rope=None, bias=True),
    "gqa, qk-norm": GQAConfig(n_heads=6, n_kv_heads=3, d_head=10, qk_norm=RMSNormConfig()),
    "window": GQAConfig(n_heads=4, n_kv_heads=2, window=Window(size=7)),
    "window, sinks": GQAConfig(n_heads=4, n_kv_heads=2, window=Window(size=5, sinks=2)),
}
POSITIONS = {
    "none": None,
    "learned": LearnedPositionsConfig(max_len=MAX_LEN),
    "sinusoidal": SinusoidalPositionsConfig(max_len=MAX_LEN),
}


def build(attention, positions=None, n_layers=2, dtype=torch.float64, seed=0):
    """A small model with weights large enough that every token matters."""
    torch.manual_seed(seed)
    block = BlockConfig(attention=attention, ffn=MLPConfig(d_ff=2 * D), norm=LayerNormConfig())
    blocks = attention if isinstance(attention, tuple) else (block,) * n_layers
    config = DecoderConfig(
        vocab_size=61, d_model=D, blocks=blocks, max_seq_len=MAX_LEN, positions=positions,
        init_std=0.15)
    return CausalLM(config).to(dtype).eval()


def ids_of(model, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, shape, generator=generator)


def cache_of(model, batch_size=1, capacity=None):
    return KVCache(model.config, batch_size, capacity, model.lm_head.weight.dtype)


def read(model, ids, cache, chunks, **others):
    """Logits of `ids` (B, T), handed over in pieces of the given sizes."""
    parts, start = [], 0
    for size in chunks:
        cut = slice(start, start + size)
        extra = {k: v[:, cut] for k, v in others.items()}
        parts.append(model(ids[:, cut], cache=cache, **extra))
        start += size
    return torch.cat(parts, dim=1)


def chunkings(length, seed):
    """Whole; one at a time; a prompt, then one at a time; at random."""
    pick, rest, parts = random.Random(seed), length, []
    while rest:
        parts.append(pick.randint(1, rest))
        rest -= parts[-1]
    return [[length], [1] * length, [length // 2] + [1] * (length - length // 2), parts]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("capacity", [None, 40], ids=["growing", "static"])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("layer", LAYERS)
def test_cached_is_uncached(layer, positions, capacity):
    model = build(LAYERS[layer], POSITIONS[positions])
    ids = ids_of(model, 2, 40)
    expected = model(ids)
    for chunks in chunkings(40, seed=len(layer)):
        logits = read(model, ids, cache_of(model, 2, capacity), chunks)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-11)
