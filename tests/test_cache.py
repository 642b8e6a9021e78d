"""A model with a cache computes what it computes when it reads everything again.

The reference throughout: the same model, without a cache, on the whole sequence.
"""

import random

import pytest
import torch

from skylar.layers.attention import AttentionConfig
from skylar.layers.attention_backends import Positions
from skylar.layers.block import BlockConfig
from skylar.layers.cache import DynamicLayerCache, KVCache, StaticLayerCache, layer_cache
from skylar.layers.gqa import GQAConfig
from skylar.layers.mlp import MLPConfig
from skylar.layers.norm import LayerNormConfig, RMSNormConfig
from skylar.layers.positions import LearnedPositionsConfig, SinusoidalPositionsConfig
from skylar.layers.sliding_window import SlidingWindow
from skylar.models.decoder import CausalLM, DecoderConfig, cache_bytes, flops_per_token

D, MAX_LEN = 48, 96
MHA = AttentionConfig(n_heads=4)
LAYERS = {
    "mha": MHA,
    "mha, wide heads": AttentionConfig(n_heads=3, d_head=20, bias=False),
    "gqa": GQAConfig(n_heads=4, n_kv_heads=2),
    "mqa": GQAConfig(n_heads=4, n_kv_heads=1, d_head=16),
    "gqa, no rope": GQAConfig(n_heads=4, n_kv_heads=2, rope=None, bias=True),
    "gqa, qk-norm": GQAConfig(n_heads=6, n_kv_heads=3, d_head=10, qk_norm=RMSNormConfig()),
    "window": GQAConfig(n_heads=4, n_kv_heads=2, window=SlidingWindow(size=7)),
    "window, sinks": GQAConfig(
        n_heads=4, n_kv_heads=2, window=SlidingWindow(size=5, num_sink_tokens=2)),
}
FULL = [name for name in LAYERS if "window" not in name]
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
    prompt = (length + 1) // 2
    return [[length], [1] * length, [prompt] + [1] * (length - prompt), parts]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("capacity", [None, 40], ids=["dynamic", "static"])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("layer", LAYERS)
def test_cached_is_uncached(layer, positions, capacity):
    model = build(LAYERS[layer], POSITIONS[positions])
    ids = ids_of(model, 2, 40)
    expected = model(ids)
    for chunks in chunkings(40, seed=len(layer)):
        logits = read(model, ids, cache_of(model, 2, capacity), chunks)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("seed", range(12))
def test_random_decoders(seed):
    """Layers of several kinds in one decoder, any widths, any pieces: float32 to 1e-5."""
    pick = random.Random(seed)
    blocks = tuple(
        BlockConfig(attention=pick.choice(list(LAYERS.values())), ffn=MLPConfig(d_ff=D),
                    norm=LayerNormConfig())
        for _ in range(pick.randint(1, 4)))
    model = build(blocks, pick.choice(list(POSITIONS.values())), dtype=torch.float32, seed=seed)
    batch, length = pick.randint(1, 3), pick.randint(1, MAX_LEN)
    ids = ids_of(model, batch, length, seed=seed)
    expected = model(ids)
    for chunks in chunkings(length, seed):
        cache = cache_of(model, batch, pick.choice([None, length, MAX_LEN]))
        logits = read(model, ids, cache, chunks)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
        assert torch.equal(logits.argmax(-1), expected.argmax(-1))
        assert cache.length == length


def greedy(model, ids, n, cache=None, **first):
    """`n` more tokens: everything read again each time, or with a cache only what is new."""
    out, logits = ids, model(ids, cache=cache, **first)
    for _ in range(n):
        token = logits[:, -1:].argmax(-1)
        out = torch.cat([out, token], dim=1)
        logits = model(out if cache is None else token, cache=cache)
    return out


@pytest.mark.parametrize("layer", LAYERS)
def test_same_greedy_tokens(layer):
    model = build(LAYERS[layer], LearnedPositionsConfig(max_len=MAX_LEN), dtype=torch.float32)
    ids = ids_of(model, 3, 10)
    assert torch.equal(greedy(model, ids, 60, cache_of(model, 3)), greedy(model, ids, 60))


@pytest.mark.parametrize("layer", LAYERS)
def test_bfloat16(layer):
    model = build(LAYERS[layer], dtype=torch.bfloat16)
    ids = ids_of(model, 2, 30)
    logits = read(model, ids, cache_of(model, 2, 30), [10] + [1] * 20)
    assert logits.dtype == torch.bfloat16
    exact = build(LAYERS[layer]).double()(ids)
    error = (logits.double() - exact).abs().mean()
    assert error < 1.5 * (model(ids).double() - exact).abs().mean()  # no worse than uncached


# --- batches ---


def padded(rows, side):
    """Sequences of unlike length as one batch (B, T), and its mask: 1 = a token, 0 = padding."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), 7)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(len(row))
        ids[i, place], mask[i, place] = row, 1
    return ids, mask


def rows_of(model, *lengths):
    return [ids_of(model, n, seed=n) for n in lengths]


@pytest.mark.parametrize("capacity", [None, 60])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("layer", LAYERS)
def test_left_padded_batch_is_each_sequence_alone(layer, positions, capacity):
    model = build(LAYERS[layer], POSITIONS[positions])
    rows = rows_of(model, 3, 17, 40, 1)
    ids, mask = padded(rows, "left")
    out = greedy(model, ids, 20, cache_of(model, 4, capacity), document_ids=mask)
    for row, found in zip(rows, out):
        assert torch.equal(found[40 - len(row):], greedy(model, row[None], 20)[0])


@pytest.mark.parametrize("layer", FULL)
def test_right_padded_documents_are_each_sequence_alone(layer):
    """Without `crop`, a token behind right padding needs its position and its document."""
    model = build(LAYERS[layer], LearnedPositionsConfig(max_len=MAX_LEN))
    rows = rows_of(model, 3, 17, 40, 1)
    ids, mask = padded(rows, "right")
    cache, lengths = cache_of(model, 4, 60), mask.sum(1, keepdim=True)  # (B, 1)
    logits = model(ids, document_ids=mask, cache=cache)[torch.arange(4), lengths[:, 0] - 1]
    new = []
    for step in range(20):
        new.append(logits.argmax(-1, keepdim=True))  # (B, 1)
        logits = model(
            new[-1], position_ids=lengths + step, document_ids=torch.ones_like(lengths),
            cache=cache)[:, -1]
    for row, found in zip(rows, torch.cat(new, dim=1)):
        assert torch.equal(found, greedy(model, row[None], 20)[0, len(row):])


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("seed", range(3))
def test_packed_documents_go_on(layer, seed):
    model = build(LAYERS[layer], LearnedPositionsConfig(max_len=MAX_LEN))
    ids = ids_of(model, 2, 70, seed=seed)
    starts = torch.rand(2, 70, generator=torch.Generator().manual_seed(seed)) < 0.1
    documents = starts.long().cumsum(1)
    expected = model(ids, document_ids=documents)
    for chunks in chunkings(70, seed):
        logits = read(model, ids, cache_of(model, 2), chunks, document_ids=documents)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-11)


def test_the_last_document_goes_on_by_itself():
    model = build(MHA, LearnedPositionsConfig(max_len=MAX_LEN))
    ids, documents = ids_of(model, 2, 30), torch.tensor([[4] * 12 + [5] * 18, [1] * 30])
    cache = cache_of(model, 2)
    first = model(ids[:, :20], document_ids=documents[:, :20], cache=cache)
    rest = read(model, ids[:, 20:], cache, [1, 5, 4])
    expected = model(ids, document_ids=documents)
    torch.testing.assert_close(torch.cat([first, rest], 1), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("layer", LAYERS)
def test_an_earlier_document_goes_on(layer):
    """Right padding is a document between two parts of another; sinks belong to the first."""
    model = build(LAYERS[layer])
    ids = ids_of(model, 2, 50)
    documents = torch.tensor([[1] * 12 + [0] * 8 + [1] * 30, [1] * 20 + [0] * 0 + [1] * 30])
    positions = torch.stack([
        torch.tensor([*range(12), *range(8), *range(12, 42)]), torch.arange(50)])
    how = dict(position_ids=positions, document_ids=documents)
    expected = model(ids, **how)
    for chunks in ([20] + [1] * 30, [20, 7, 1, 22]):
        logits = read(model, ids, cache_of(model, 2), chunks, **how)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("positions", [
    [range(80), range(79, -1, -1)],
    [[*range(10)] * 8, [*range(20)] * 4],  # packed as transformers does, without documents
])
def test_given_positions_are_kept(positions):
    """Sinks are chosen by the position of old keys: the cache must have kept it."""
    model = build(LAYERS["window, sinks"])
    ids, positions = ids_of(model, 2, 80), torch.tensor([list(row) for row in positions])
    logits = read(model, ids, cache_of(model, 2), [7] + [1] * 73, position_ids=positions)
    expected = model(ids, position_ids=positions)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.uint8])
@pytest.mark.parametrize("layer", ["mha", "window, sinks"])
def test_documents_and_positions_of_any_dtype(layer, dtype):
    model = build(LAYERS[layer])
    ids, mask = padded(rows_of(model, 9, 20), "left")
    expected = model(ids, document_ids=mask)
    logits = read(model, ids, cache_of(model, 2), [12, 1, 7], document_ids=mask.to(dtype))
    torch.testing.assert_close(logits[1], expected[1], rtol=0, atol=1e-11)
    torch.testing.assert_close(logits[0, 11:], expected[0, 11:], rtol=0, atol=1e-11)
    if dtype == torch.int32:
        steps = torch.arange(20, dtype=dtype).expand(2, -1)
        logits = read(model, ids, cache_of(model, 2), [12, 1, 7], position_ids=steps)
        torch.testing.assert_close(logits, model(ids), rtol=0, atol=1e-11)


# --- a length for each sequence ---


def lengths_for(layer):
    """Of four prompts: within the window, else going back is refused."""
    return (3, 6, 1, 5) if "window" in layer else (3, 17, 40, 1)


def ragged(model, rows, capacity=None):
    """A cache that has read `rows`, right-padded and cropped; the last logits of each."""
    ids, mask = padded(rows, "right")
    cache, lengths = cache_of(model, len(rows), capacity), mask.sum(1)
    logits = model(ids, cache=cache)[torch.arange(len(rows)), lengths - 1]
    cache.crop(lengths)
    assert torch.equal(cache.lengths, lengths) and cache.max_length == max(lengths)
    return cache, logits


@pytest.mark.parametrize("capacity", [None, 60], ids=["dynamic", "static"])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("layer", LAYERS)
def test_ragged_batch_is_each_sequence_alone(layer, positions, capacity):
    model = build(LAYERS[layer], POSITIONS[positions])
    rows = rows_of(model, *lengths_for(layer))
    cache, logits = ragged(model, rows, capacity)
    new = []
    for _ in range(20):
        new.append(logits.argmax(-1, keepdim=True))  # (B, 1)
        logits = model(new[-1], cache=cache)[:, -1]
    for row, found in zip(rows, torch.cat(new, dim=1)):
        assert torch.equal(found, greedy(model, row[None], 20)[0, len(row):])
    assert cache.lengths.tolist() == [len(row) + 20 for row in rows]
    with pytest.raises(ValueError, match="differ in length"):
        _ = cache.length


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("seed", range(3))
def test_ragged_batch_in_chunks(layer, seed):
    """Several tokens at a time, and logits at every position."""
    model = build(LAYERS[layer], LearnedPositionsConfig(max_len=MAX_LEN))
    rows = rows_of(model, *lengths_for(layer))
    cache, _ = ragged(model, rows)
    new = ids_of(model, len(rows), 30, seed=seed)
    logits = read(model, new, cache, chunkings(30, seed)[-1])
    for row, more, found in zip(rows, new, logits):
        expected = model(torch.cat([row, more])[None])[0, len(row):]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("layer", FULL)
def test_ragged_batch_goes_back_and_is_reordered(layer):
    """As speculative decoding does: every sequence keeps another number of new tokens."""
    model = build(LAYERS[layer], LearnedPositionsConfig(max_len=MAX_LEN))
    rows = rows_of(model, 3, 17, 40, 1)
    cache, _ = ragged(model, rows)
    guess = ids_of(model, 4, 8, seed=1)
    model(guess, cache=cache)
    keep = torch.tensor([0, 8, 3, 5])
    cache.crop(torch.tensor([3, 17, 40, 1]) + keep)
    texts = [torch.cat([row, more[:n]]) for row, more, n in zip(rows, guess, keep.tolist())]
    order = [2, 0, 0, 3, 1]
    cache.reorder(torch.tensor(order))
    assert cache.lengths.tolist() == [len(texts[i]) for i in order]
    new = ids_of(model, 5, 20, seed=2)
    logits = read(model, new, cache, [1, 4, 15])
    for i, more, found in zip(order, new, logits):
        expected = model(torch.cat([texts[i], more])[None])[0, len(texts[i]):]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_sequence_may_be_emptied(layer):
    """A finished sequence of the batch makes room for another text."""
    model = build(LAYERS[layer], LearnedPositionsConfig(max_len=MAX_LEN))
    ids = ids_of(model, 2, 5)
    for documents in (None, torch.ones_like(ids)):
        cache = cache_of(model, 2)
        model(ids, document_ids=documents, cache=cache)
        cache.crop(torch.tensor([0, 5]))
        new = ids_of(model, 2, 30, seed=4)
        logits = read(model, new, cache, [10] + [1] * 20)
        torch.testing.assert_close(logits[:1], model(new[:1]), rtol=0, atol=1e-11)
        expected = model(torch.cat([ids[1:], new[1:]], 1))[:, 5:]
        torch.testing.assert_close(logits[1:], expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("capacity", [None, 60])
def test_unwritten_memory_is_never_attended_to(capacity):
    """Slots that no token was written to have weight 0, and 0 times nan is nan."""
    model = build(MHA, dtype=torch.float32)
    rows = rows_of(model, 2, 30)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with nan
    try:
        cache, _ = ragged(model, rows, capacity)
        logits = read(model, ids_of(model, 2, 20, seed=1), cache, [1] * 20)
    finally:
        torch.use_deterministic_algorithms(False)
    assert logits.isfinite().all()


def test_lengths_that_were_handed_out_stay():
    model = build(MHA)
    cache = cache_of(model, 2)
    model(ids_of(model, 2, 5), cache=cache)
    before = cache.lengths
    model(ids_of(model, 2, 3), cache=cache)
    assert before.tolist() == [5, 5] and cache.lengths.tolist() == [8, 8]
    cache.crop(before)
    assert cache.length == 5


# --- going back, reordering ---


@pytest.mark.parametrize("capacity", [None, 50])
def test_crop_goes_back(capacity):
    model = build(MHA, LearnedPositionsConfig(max_len=MAX_LEN))
    ids = ids_of(model, 2, 50)
    cache = cache_of(model, 2, capacity)
    read(model, ids_of(model, 2, 50, seed=1)[:, :40].index_copy(
        1, torch.arange(15), ids[:, :15]), cache, [40])
    cache.crop(15)
    assert cache.length == 15
    logits = read(model, ids[:, 15:], cache, [20, 15])
    torch.testing.assert_close(logits, model(ids)[:, 15:], rtol=0, atol=1e-11)


@pytest.mark.parametrize("layer", LAYERS)
def test_reset_forgets_everything(layer):
    """Padded batch, then plain text, then a padded batch again in the same memory."""
    model = build(LAYERS[layer], LearnedPositionsConfig(max_len=MAX_LEN))
    cache = cache_of(model, 2, 40)
    memory = cache.nbytes
    ids, mask = padded(rows_of(model, 20, 9), "left")
    padded_answer = greedy(model, ids, 20, document_ids=mask, cache=cache_of(model, 2, 40))
    for _ in range(2):
        cache.reset()
        assert torch.equal(
            greedy(model, ids, 20, cache, document_ids=mask), padded_answer)
        cache.reset()
        assert torch.equal(greedy(model, ids, 20, cache), greedy(model, ids, 20))
    assert cache.nbytes == memory or "window" in layer


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("rows", [[1, 0, 2], [2, 2, 2], [0], [1, 1, 0, 2, 0]])
def test_reorder_moves_sequences(layer, rows):
    model = build(LAYERS[layer], LearnedPositionsConfig(max_len=MAX_LEN))
    ids, mask = padded(rows_of(model, 20, 9, 14), "left")
    cache = cache_of(model, 3, 40)
    greedy(model, ids, 0, cache, document_ids=mask)
    cache.reorder(torch.tensor(rows))
    new = ids_of(model, len(rows), 20, seed=5)
    logits = read(model, new, cache, [1, 4, 15])
    whole = model(
        torch.cat([ids[rows], new], 1),
        document_ids=torch.cat([mask[rows], torch.ones_like(new)], 1))
    torch.testing.assert_close(logits, whole[:, 20:], rtol=0, atol=1e-11)


def test_one_prompt_many_answers():
    """The prompt is read once, its keys and values copied for each continuation."""
    model = build(MHA)
    prompt, answers = ids_of(model, 1, 20), ids_of(model, 5, 12, seed=2)
    cache = cache_of(model, 1)
    model(prompt, cache=cache)
    cache.reorder(torch.zeros(5, dtype=torch.long))
    logits = read(model, answers, cache, [12])
    expected = model(torch.cat([prompt.expand(5, -1), answers], 1))[:, 20:]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("part", ["self_attn", "mlp"])
@pytest.mark.parametrize("first", [True, False], ids=["prefill", "decode"])
@pytest.mark.parametrize("layer", LAYERS)
def test_an_interrupted_call_leaves_nothing(layer, first, part, monkeypatch):
    """Raised in the middle of a pass, when some layers have written and others have not."""
    model = build(LAYERS[layer], LearnedPositionsConfig(max_len=MAX_LEN), n_layers=3)
    ids = ids_of(model, 2, 40)
    cache = cache_of(model, 2, 40)
    done = [] if first else [model(ids[:, :10], cache=cache)]
    with monkeypatch.context() as patch:
        patch.setattr(getattr(model.model.layers[1], part), "forward", interrupt)
        for n in (8, 1):
            with pytest.raises(KeyboardInterrupt):
                model(ids_of(model, 2, n, seed=3), cache=cache)
    assert cache.length == (0 if first else 10)
    done.append(read(model, ids[:, cache.length:], cache, [5] + [1] * (35 - cache.length)))
    torch.testing.assert_close(torch.cat(done, 1), model(ids), rtol=0, atol=1e-11)


@pytest.mark.parametrize("layer", LAYERS)
def test_an_interrupted_ragged_call_leaves_nothing(layer, monkeypatch):
    model = build(LAYERS[layer], LearnedPositionsConfig(max_len=MAX_LEN))
    rows = rows_of(model, *lengths_for(layer))
    cache, _ = ragged(model, rows)
    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[1], "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(ids_of(model, 4, 6, seed=3), cache=cache)
    new = ids_of(model, 4, 12)
    logits = read(model, new, cache, [2, 1, 9])
    for row, more, found in zip(rows, new, logits):
        expected = model(torch.cat([row, more])[None])[0, len(row):]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


class Texts:
    """What a cache should hold: for each sequence its ids and documents, as plain lists."""

    def __init__(self, model, seed):
        self.model, self.pick = model, random.Random(seed)
        self.cache = cache_of(model, 3, self.pick.choice([None, MAX_LEN]))
        self.ids, self.documents = [[] for _ in range(3)], [[] for _ in range(3)]
        self.with_documents = False

    def read(self):
        longest = max(map(len, self.ids))
        n = min(self.pick.choice([1, 1, 2, 7, 20]), MAX_LEN - longest)
        if n < 1:
            return
        if longest == 0:
            self.with_documents = self.pick.random() < 0.5
        new = torch.randint(61, (len(self.ids), n))
        documents = None
        if self.with_documents and (longest == 0 or self.pick.random() < 0.7):
            documents = torch.randint(4, (len(self.ids), 1)).expand(-1, n).clone()
            documents[:, n // 2:] += torch.randint(2, (len(self.ids), 1))
        logits = self.model(new, document_ids=documents, cache=self.cache)
        for b, found in enumerate(logits):
            last = (self.documents[b] or [0])[-1]
            self.documents[b] += [last] * n if documents is None else documents[b].tolist()
            self.ids[b] += new[b].tolist()
            ids, ds = (torch.tensor([x[b]]) for x in (self.ids, self.documents))
            ds = ds if self.with_documents else None
            expected = self.model(ids, document_ids=ds)[0, -n:]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)

    def crop(self):
        lengths = [self.pick.randint(max(0, len(text) - 6), len(text)) for text in self.ids]
        try:
            self.cache.crop(torch.tensor(lengths))
        except ValueError as error:
            assert "has dropped" in str(error)
            return
        self.keep(range(len(self.ids)), lengths)

    def reset(self):
        self.cache.reset()
        self.keep(range(len(self.ids)), [0] * len(self.ids))

    def reorder(self):
        order = self.pick.choices(range(len(self.ids)), k=self.pick.randint(1, 4))
        self.cache.reorder(torch.tensor(order))
        self.keep(order, [len(self.ids[i]) for i in order])

    def keep(self, order, lengths):
        for name in ("ids", "documents"):
            held = getattr(self, name)
            setattr(self, name, [held[i][:n] for i, n in zip(order, lengths)])

    def interrupt(self):
        if max(map(len, self.ids)) + 3 > MAX_LEN:
            return
        layer = self.model.model.layers[1]
        layer.forward = interrupt
        with pytest.raises(KeyboardInterrupt):
            self.model(torch.randint(61, (len(self.ids), 3)), cache=self.cache)
        del layer.forward


@pytest.mark.parametrize("layers", [["mha", "gqa"], ["window, sinks", "gqa", "window"]])
@pytest.mark.parametrize("seed", range(12))
def test_any_order_of_operations(layers, seed):
    """Read, crop each sequence, reorder, reset, interrupt: as every sequence alone."""
    torch.manual_seed(seed)
    blocks = tuple(BlockConfig(attention=LAYERS[name], ffn=MLPConfig(d_ff=D)) for name in layers)
    texts = Texts(build(blocks, LearnedPositionsConfig(max_len=MAX_LEN)), seed)
    for _ in range(30):
        kinds = ["read"] * 6 + ["crop"] * 3 + ["reorder", "interrupt", "interrupt", "reset"]
        getattr(texts, texts.pick.choice(kinds))()
        assert texts.cache.lengths.tolist() == [len(text) for text in texts.ids]


# --- refusals: one clear line, and nothing has changed ---


def wrong_batch(model, cache):
    model(ids_of(model, 3, 2), cache=cache)


def broadcastable_batch(model, cache):
    """One sequence would silently be copied to both."""
    model(ids_of(model, 1, 2), cache=cache)


def too_many(model, cache):
    model(ids_of(model, 2, 31), cache=cache)


def too_many_with_documents(model, cache):
    model(ids_of(model, 2, 31), document_ids=torch.ones(2, 31).long(), cache=cache)


def late_documents(model, cache):
    model(ids_of(model, 2, 3), document_ids=torch.ones(2, 3).long(), cache=cache)


def wrong_batch_of_positions(model, cache):
    ids = ids_of(model, 3, 2)
    model(ids, position_ids=torch.full_like(ids, 3), cache=cache)


def wrong_dtype(model, cache):
    build(MHA, dtype=torch.bfloat16)(ids_of(model, 2, 2), cache=cache)


def another_model(model, cache):
    build(AttentionConfig(n_heads=3, d_head=12))(ids_of(model, 2, 2), cache=cache)


def with_gradients(model, cache):
    with torch.enable_grad():
        model(ids_of(model, 2, 2), cache=cache)


def crop_forward(model, cache):
    cache.crop(11)


def crop_below_nothing(model, cache):
    cache.crop(-1)


def crop_one_too_far(model, cache):
    cache.crop(torch.tensor([3, 11]))


def crop_of_another_batch(model, cache):
    cache.crop(torch.tensor([3, 3, 3]))


def reorder_by_none(model, cache):
    cache.reorder(torch.tensor([], dtype=torch.long))


def reorder_by_a_stranger(model, cache):
    cache.reorder(torch.tensor([0, 2]))


REFUSALS = {
    wrong_batch: "batch",
    broadcastable_batch: "batch",
    too_many: "capacity=40",
    too_many_with_documents: "capacity=40|from the first call",
    late_documents: "from the first call",
    wrong_batch_of_positions: "batch_size=2",
    wrong_dtype: "bfloat16.*float64",
    another_model: "config",
    with_gradients: "no_grad",
    crop_forward: "holds .10, 10",
    crop_below_nothing: "holds .10, 10",
    crop_one_too_far: "holds .10, 10",
    crop_of_another_batch: "3 lengths for a cache of 2 sequences",
    reorder_by_none: "cannot reorder 2 sequences",
    reorder_by_a_stranger: r"cannot reorder 2 sequences by .0, 2",
}


@pytest.mark.parametrize("mistake", REFUSALS, ids=lambda f: f.__name__)
def test_refusal(mistake):
    model = build(MHA)
    ids = ids_of(model, 2, 40)
    cache = cache_of(model, 2, 40)
    first = model(ids[:, :10], cache=cache)
    with pytest.raises(ValueError, match=REFUSALS[mistake]) as error:
        mistake(model, cache)
    assert "\n" not in str(error.value)
    assert cache.length == 10
    rest = read(model, ids[:, 10:], cache, [30])
    torch.testing.assert_close(torch.cat([first, rest], 1), model(ids), rtol=0, atol=1e-11)


def test_wrong_batch_with_documents_is_refused():
    model = build(MHA)
    ids = ids_of(model, 3, 5)
    for cache in (cache_of(model, 2), cache_of(model, 2, 40)):
        with pytest.raises(ValueError, match="batch_size=2"):
            model(ids, document_ids=torch.ones_like(ids), cache=cache)
        model(ids[:2], cache=cache)


def test_no_room_is_said_before_anything_is_written():
    """In a ragged batch, too, and with documents; then the rest is read exactly."""
    model = build(MHA, LearnedPositionsConfig(max_len=MAX_LEN))
    rows = rows_of(model, 3, 17)
    cache, _ = ragged(model, rows, capacity=20)
    memory = [layer.keys.clone() for layer in cache]
    with pytest.raises(ValueError, match="17 cached and 4 new.*capacity=20"):
        model(ids_of(model, 2, 4), cache=cache)
    assert all(torch.equal(layer.keys, old) for layer, old in zip(cache, memory))
    assert cache.lengths.tolist() == [3, 17]
    new = ids_of(model, 2, 3)
    logits = model(new, cache=cache)
    for row, more, found in zip(rows, new, logits):
        expected = model(torch.cat([row, more])[None])[0, len(row):]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("sizes", [{"batch_size": 0}, {"batch_size": 1, "capacity": 0}])
def test_impossible_sizes(sizes):
    name, value = list(sizes.items())[-1]
    with pytest.raises(ValueError, match=f"{name}={value}"):
        KVCache(build(MHA).config, **sizes)


def test_longer_than_the_model_is_refused():
    model = build(MHA)
    cache = cache_of(model)
    read(model, ids_of(model, 1, MAX_LEN), cache, [MAX_LEN - 1, 1])
    with pytest.raises(ValueError, match=f"max_seq_len={MAX_LEN}"):
        model(ids_of(model, 1, 1), cache=cache)


# --- memory and speed ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads, kv_heads, d_head", [(4, 4, 12), (4, 2, 8), (6, 1, 20)])
def test_bytes_by_formula(heads, kv_heads, d_head, dtype):
    L, S, B = 3, 33, 5
    attention = GQAConfig(n_heads=heads, n_kv_heads=kv_heads, d_head=d_head)
    config = build(attention, n_layers=L).config
    formula = 2 * L * kv_heads * d_head * S * B * dtype.itemsize
    assert KVCache(config, B, S, dtype).nbytes == formula
    assert KVCache(config, B, S, dtype, "meta").nbytes == formula  # without the memory


@pytest.mark.parametrize("layer", LAYERS)
def test_cache_bytes_are_what_caches_hold(layer):
    """By the layers' own account, with windows that keep what a later token attends to."""
    model = build((BlockConfig(attention=LAYERS[layer], ffn=MLPConfig(d_ff=D)),
                   BlockConfig(attention=MHA, ffn=MLPConfig(d_ff=D))), dtype=torch.float32)
    for n_tokens in (4, 50):
        cache = cache_of(model, 3, capacity=n_tokens)
        model(ids_of(model, 3, n_tokens), cache=cache)
        assert cache.nbytes == cache_bytes(model.config, n_tokens, torch.float32, batch_size=3)


def test_a_window_costs_less():
    full, near = (build(LAYERS[name]).config for name in ("gqa", "window"))
    assert flops_per_token(near, 50) < flops_per_token(full, 50)
    assert flops_per_token(near, 7) == flops_per_token(full, 7)  # the window is not yet full
    L, H, Dh = 2, 4, 12
    saved = flops_per_token(full, 50) - flops_per_token(near, 50)
    assert saved == 3 * L * 4 * H * Dh * (50 - 7)  # forward and backward: 3 times
    assert cache_bytes(near, 50) < cache_bytes(full, 50)


def test_dynamic_cache_holds_at_most_twice_what_it_needs():
    cache, steps = DynamicLayerCache(1, 2, 4, capacity=1), Positions.of(torch.empty(1, 300, 1))
    k, moves, where = torch.zeros(1, 2, 1, 4), 0, cache.keys.data_ptr()
    for n in range(1, 300):
        new = slice(n - 1, n)
        slots = cache.locate(steps[new], steps[:n], new)
        keys, values = cache.write(k + n, k - n, slots)
        moves, where = moves + (cache.keys.data_ptr() != where), cache.keys.data_ptr()
        keys, values = cache.keys[:, :, :n], cache.values[:, :, :n]
        assert keys[0, 1, :, 2].tolist() == list(range(1, n + 1))
        assert values[0, 1, :, 2].tolist() == list(range(-1, -n - 1, -1))
        assert cache.keys.shape[2] <= max(2 * n, 1)
    assert moves <= 9  # 2, 4, ..., 512


class Ops(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts what PyTorch is asked to do."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


def test_a_plain_token_copies_nothing_but_itself():
    model = build(MHA)
    cache = cache_of(model, 2, 40)
    model(ids_of(model, 2, 10), cache=cache)
    with Ops() as ops:
        queries, keys, new = cache.begin(1)
        slots = cache[0].locate(queries, keys, new)
    assert not {"copy_", "clone", "cat", "scatter_", "arange", "pad"} & set(ops.names)
    assert keys.cache_position.tolist() == list(range(11)) and keys.document_ids is None
    assert queries.position_ids.tolist() == [10] and new == slice(10, 11)
    k = torch.zeros(2, 4, 1, 12, dtype=torch.float64)
    with Ops() as ops:
        cache[0].write(k, k, slots)
    assert set(ops.names) <= {"slice", "copy_"} and ops.names.count("copy_") == 2


def test_the_prompt_is_read_as_without_a_cache():
    """First call: the same tensors, so that the causal kernel without a mask can run."""
    model = build(MHA)
    cache = cache_of(model, 2, 40)
    queries, keys, new = cache.begin(10)
    slots = cache[0].locate(queries, keys, new)
    k = torch.zeros(2, 4, 10, 12, dtype=torch.float64)
    found, _ = cache[0].write(k, k, slots)
    assert found is k
    inputs = model.model.layers[0].self_attn.prepare(
        torch.zeros(2, 10, D, dtype=torch.float64), queries, slots.keys, slots=slots)
    assert inputs.mask.dense is None


def test_compiled_without_a_cache():
    model = build(LAYERS["gqa, qk-norm"])
    ids = ids_of(model, 2, 12)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids), model(ids), rtol=0, atol=1e-11)


def test_inference_mode():
    model = build(MHA)
    ids, cache = ids_of(model, 1, 20), cache_of(model, 1, 20)
    with torch.inference_mode():
        logits = read(model, ids, cache, [10, 1, 9])
    torch.testing.assert_close(logits, model(ids), rtol=0, atol=1e-11)


def test_a_decoder_without_a_head():
    model = build(MHA)
    ids, cache = ids_of(model, 1, 20), cache_of(model)
    hidden = torch.cat([model.model(ids[:, :13], cache=cache),
                        model.model(ids[:, 13:], cache=cache)], 1)
    torch.testing.assert_close(hidden, model.model(ids), rtol=0, atol=1e-11)


def test_an_attention_config_may_bring_its_own_cache():
    class Own(AttentionConfig):
        def cache(self, d_model, batch_size, capacity, dtype, device):
            made.append((d_model, batch_size, capacity, dtype, device))
            return layer_cache(self, d_model, batch_size, capacity, dtype, device)

    made = []
    model = build(Own(n_heads=4))
    cache = KVCache(model.config, 2, 40, torch.float64)
    assert made == [(D, 2, 40, torch.float64, None)] * 2
    assert len(cache) == 2 and isinstance(cache[1], StaticLayerCache)


def test_all_layers_go_back_or_none():
    """A window that has already dropped what it would need keeps the others as they were."""
    blocks = tuple(
        BlockConfig(attention=a, ffn=MLPConfig(d_ff=D), norm=LayerNormConfig())
        for a in (MHA, LAYERS["window"], MHA))
    model = build(blocks)
    ids, cache = ids_of(model, 1, 40), cache_of(model, 1, 40)
    first = read(model, ids[:, :30], cache, [20] + [1] * 10)
    with pytest.raises(ValueError):
        cache.crop(12)
    assert cache.length == 30
    rest = read(model, ids[:, 30:], cache, [10])
    torch.testing.assert_close(torch.cat([first, rest], 1), model(ids), rtol=0, atol=1e-11)


@pytest.mark.parametrize("layer", LAYERS)
def test_made_under_autocast(layer):
    """Keys are then bfloat16, whatever the weights are."""
    model = build(LAYERS[layer], dtype=torch.float32)
    ids = ids_of(model, 2, 12)
    with torch.autocast("cpu", torch.bfloat16):
        cache = cache_of(model, 2, 12)
        logits = read(model, ids, cache, [6, 1, 5])
    assert cache[0].keys.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), model(ids), rtol=0, atol=0.2)
    assert cache_of(model)[0].keys.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):  # float64 is never cast
        assert cache_of(build(LAYERS[layer]))[0].keys.dtype == torch.float64


def test_a_cache_of_another_depth_is_refused():
    shallow, deep = (build(MHA, n_layers=n) for n in (1, 2))
    for model, other in ((shallow, deep), (deep, shallow)):
        with pytest.raises(ValueError, match=r"cache is for \d layers, the model has \d"):
            model(torch.zeros(1, 3, dtype=torch.long), cache=cache_of(other))
