"""Sliding windows and sinks: the mask, and a cache that keeps what is still visible."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from transformers.masking_utils import sliding_window_causal_mask_function

from skylar.layers.attention_backends import (
    CHOICES,
    Positions,
    dense_mask,
    make_mask_mod,
    restarting_positions,
)
from skylar.layers.block import BlockConfig
from skylar.layers.cache import KVCache
from skylar.layers.gqa import GQAConfig
from skylar.layers.mlp import SwiGLUConfig
from skylar.layers.norm import RMSNormConfig
from skylar.layers.sliding_window import EMPTY_SLOT, SlidingWindow, still_visible, take_slots
from skylar.models.decoder import CausalLM, DecoderConfig

NORM = RMSNormConfig(eps=1e-5)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def mask_of(tokens, window):
    return dense_mask(make_mask_mod(tokens, tokens, window), tokens, tokens)[:, 0]


@pytest.mark.parametrize("size", [1, 2, 7, 40])
def test_mask_equals_transformers(size):
    tokens, index = Positions.of(torch.empty(1, 30, 1)), torch.arange(30)
    expected = sliding_window_causal_mask_function(size)(0, 0, index[:, None], index)
    assert torch.equal(mask_of(tokens, SlidingWindow(size=size))[0], expected)


def test_sinks_are_the_first_tokens_of_each_sequences_document():
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [7] * 9])
    tokens = Positions(cache_position=torch.arange(9), document_ids=documents,
                       position_ids=restarting_positions(documents))
    mask = mask_of(tokens, SlidingWindow(size=2, num_sink_tokens=1))
    assert mask[0, 8].nonzero().flatten().tolist() == [3, 7, 8]  # padded: starts at 3
    assert mask[1, 8].nonzero().flatten().tolist() == [0, 7, 8]


@pytest.mark.parametrize(("make", "words"), [
    (lambda: SlidingWindow(size=0), "window size=0.*at least 1"),
    (lambda: SlidingWindow(size=2.5), "window size=2.5"),
    (lambda: SlidingWindow(size=True), "window size=True"),
    (lambda: SlidingWindow(size=2, num_sink_tokens=-1), "num_sink_tokens=-1.*at least 0"),
])
def test_refusals(make, words):
    with pytest.raises(ValueError, match=words) as refused:
        make()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("sinks", [0, 1, 4])
@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("n_tokens", [1, 4, 5, 9, 20])
def test_what_is_kept_is_what_the_next_token_attends_to(size, sinks, n_tokens):
    """By the mask's own definition; the ragged way and the fast way agree."""
    window = SlidingWindow(size=size, num_sink_tokens=sinks)
    tokens, after = (Positions.of(torch.empty(1, n, 1)) for n in (n_tokens, n_tokens + 1))
    expected = mask_of(after, window)[0, -1, :-1].nonzero().flatten().tolist()
    _, held = still_visible(window, tokens)
    assert held.cache_position.tolist() == expected
    steps = torch.arange(n_tokens)
    rows = Positions(cache_position=steps, position_ids=steps.repeat(2, 1))
    _, held = still_visible(window, rows)
    for slots in held.cache_position.expand(2, -1):
        assert [s for s in slots.tolist() if s != EMPTY_SLOT] == expected


def small_model(*windows) -> CausalLM:
    torch.manual_seed(0)
    full = GQAConfig(n_heads=4, n_kv_heads=2, qk_norm=NORM)
    blocks = tuple(BlockConfig(attention=replace(full, window=w), ffn=SwiGLUConfig(d_ff=24),
                               norm=NORM) for w in windows)
    return CausalLM(DecoderConfig(
        vocab_size=31, d_model=16, blocks=blocks, max_seq_len=900, norm=NORM, init_std=0.3)).eval()


NEAR = SlidingWindow(size=4, num_sink_tokens=2)


@pytest.mark.parametrize("capacity", [None, 60])
def test_mixed_decoder_equals_uncached(capacity):
    model = small_model(NEAR, None, SlidingWindow(size=7), NEAR)
    ids = torch.randint(31, (3, 50))
    padding = torch.tensor([0, 5, 11])
    real = (torch.arange(50) >= padding[:, None]).long()
    expected = model(ids, document_ids=real)
    cache = KVCache(model.config, 3, capacity)
    logits = [model(ids[:, :20], document_ids=real[:, :20], cache=cache)]
    logits += [model(ids[:, t:t + 1], cache=cache) for t in range(20, 40)]
    logits += [model(ids[:, 40:], cache=cache)]
    assert_close(torch.cat(logits, 1), expected, rtol=1e-4, atol=1e-4)
    for i in range(3):  # and each sequence alone, without its padding
        alone = model(ids[i:i + 1, padding[i]:])
        assert_close(expected[i:i + 1, padding[i]:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", CHOICES)
def test_every_backend_reads_a_window_cache(backend):
    model = small_model(SlidingWindow(size=150, num_sink_tokens=3), None)
    ids = torch.randint(31, (2, 700))
    real = (torch.arange(700) >= torch.tensor([[0], [13]])).long()
    model.set_attention_backend("reference")
    expected = model(ids, document_ids=real)
    model.set_attention_backend(backend)
    cache, logits = KVCache(model.config, 2), []
    for start, end in ((0, 300), (300, 301), (301, 660), (660, 661), (661, 700)):
        chunk = slice(start, end)
        logits.append(model(ids[:, chunk], document_ids=real[:, chunk], cache=cache))
    assert_close(torch.cat(logits, 1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("documents", [False, True])
def test_memory_stays_the_same_however_long_the_text(documents, sinks):
    """Counted in memory that is really held: a view of a long prompt would hold all of it."""
    window = SlidingWindow(size=8, num_sink_tokens=sinks)
    model = small_model(window, window)
    cache, expected = KVCache(model.config, 3), 2 * 2 * 3 * 2 * 4 * (8 - 1 + sinks) * 4
    for n in [100, 1, 1, 250, 1, 40, 1, 300]:  # k and v, L, B, K, Dh, slots, bytes
        document_ids = torch.full((3, n), 5) if documents else None
        model(torch.zeros(3, n, dtype=torch.long), document_ids=document_ids, cache=cache)
        assert cache.nbytes == expected
        storages = [t.untyped_storage().nbytes() for c in cache.layers for t in (c.keys, c.values)]
        assert sum(storages) <= 2 * expected


def test_window_goes_back_only_while_nothing_is_dropped():
    model, ids = small_model(NEAR, None), torch.randint(31, (2, 30))
    expected = model(ids)
    cache = KVCache(model.config, 2)
    model(ids[:, :5], cache=cache)
    cache.crop(2)  # 4 - 1 + 2 tokens are held, so all five were still there
    assert_close(model(ids[:, 2:20], cache=cache), expected[:, 2:20], rtol=1e-4, atol=1e-4)
    for length in (19, 3, torch.tensor([20, 19])):
        with pytest.raises(ValueError, match="window of 4 has dropped.*reset"):
            cache.crop(length)
        assert cache.length == 20
    cache.crop(20)  # nothing to forget
    assert_close(model(ids[:, 20:], cache=cache), expected[:, 20:], rtol=1e-4, atol=1e-4)
    cache.reset()
    assert_close(model(ids, cache=cache), expected, rtol=1e-4, atol=1e-4)


def test_going_back_to_an_earlier_document_is_refused_once_it_was_dropped():
    model, ids = small_model(SlidingWindow(size=3, num_sink_tokens=1)), torch.zeros(1, 6).long()
    cache = KVCache(model.config, 1)
    model(ids, document_ids=torch.tensor([[0, 0, 0, 1, 1, 1]]), cache=cache)
    with pytest.raises(ValueError, match="dropped"):
        cache.crop(2)


def test_sequences_can_be_reordered_and_repeated():
    model, ids = small_model(NEAR, None), torch.randint(31, (2, 24))
    start = torch.tensor([[0] * 3 + [1] * 21, [1] * 24])
    cache = KVCache(model.config, 2)
    model(ids[:, :18], document_ids=start[:, :18], cache=cache)
    cache.reorder(torch.tensor([1, 0, 0]))
    found = model(ids[[1, 0, 0], 18:], cache=cache)
    expected = model(ids, document_ids=start)[[1, 0, 0], 18:]
    assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused():
    cache = GQAConfig(n_heads=2, window=SlidingWindow(size=2)).cache(8, 1)
    k, tokens = torch.zeros(2, 2, 1, 4), Positions.of(torch.zeros(2, 1))
    slots = cache.locate(tokens, tokens, slice(0, 1))
    with pytest.raises(ValueError, match=r"\(2, 2, 4\).*\(1, 2, 4\)"):
        cache.write(k, k, slots)
    with pytest.raises(ValueError, match="float64.*float32"):
        cache.write(k[:1].double(), k[:1].double(), slots)
    cache.commit()
    assert cache.held is None and not cache.nbytes


@pytest.mark.parametrize("keep", [slice(95, 100), torch.tensor([0, 98, 99])])
def test_kept_slots_do_not_hold_the_prompt(keep):
    prompt = torch.randn(1, 2, 100, 4)
    kept = take_slots(prompt, keep)
    assert torch.equal(kept, prompt[:, :, keep])
    assert kept.untyped_storage().nbytes() == kept.nbytes
