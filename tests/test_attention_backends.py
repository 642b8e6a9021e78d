"""Every attention backend against the written-out attention, forward and backward."""

import itertools
from dataclasses import replace

import pytest
import torch
from einops import rearrange

from skylar.layers import attention_backends
from skylar.layers.attention import attention
from skylar.layers.attention_backends import (
    TILE,
    AttentionMask,
    Positions,
    block_mask,
    cpu_tiled,
    dense_mask,
    flex,
    is_plain_causal,
    make_mask_mod,
    plan_tiles,
    prepare_mask,
    scaled_dot_product_attention,
    sdpa_causal,
    sdpa_dense,
    select_backend,
    single_query_attention,
    to_additive_mask,
)
from skylar.layers.block import BlockConfig
from skylar.layers.cache import KVCache
from skylar.layers.gqa import GQAConfig
from skylar.layers.mlp import SwiGLUConfig
from skylar.layers.norm import RMSNormConfig
from skylar.layers.sliding_window import EMPTY_SLOT, SlidingWindow
from skylar.models.decoder import CausalLM, DecoderConfig

LIMIT = {torch.float64: 1e-10, torch.float32: 3e-6, torch.bfloat16: 1.5e-2}  # relative, in norm


class Case:
    """Random q, k, v as projections give them, positions to match, and the reference."""

    def __init__(self, seed, B=2, H=4, K=2, D=16, T=200, past=0, documents=None, window=None,
                 dtype=torch.float32):
        self.generator = torch.Generator().manual_seed(seed)
        self.window, self.width, self.group = window, D, H // K
        S = past + T
        sizes = ((T, H), (S, K), (S, K))
        self.inputs = [self.normal(B, n, h * D).to(dtype).requires_grad_() for n, h in sizes]
        ids = self.documents(documents, B, S)
        steps = torch.arange(S)
        self.keys = Positions(cache_position=steps, position_ids=steps, document_ids=ids)
        self.queries = self.keys[past:] if past else self.keys

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def documents(self, kind, B, S):
        if kind == "packed":
            return (torch.rand(B, S, generator=self.generator) < 0.03).cumsum(1)
        if kind == "left":  # padding on the left: document 0
            pad = torch.randint(0, S // 2, (B, 1), generator=self.generator)
            return (torch.arange(S) >= pad).long()
        if kind == "interrupted":  # a document that comes back, as padding on both sides does
            return ((torch.arange(S) // 37) % 2).expand(B, -1)
        assert kind is None
        return None

    def heads(self, dtype=None):
        q, k, v = (rearrange(x, "b t (h d) -> b h t d", d=self.width) for x in self.inputs)
        return [x.to(dtype or x.dtype) for x in (q, k, v)]

    def reference(self):
        q, k, v = self.heads(torch.float64)
        k, v = (x.repeat_interleave(self.group, dim=1) for x in (k, v))
        return attention(q, k, v, self.dense())

    def dense(self):
        return dense_mask(self.mask_mod(), self.queries, self.keys)

    def mask_mod(self):
        return make_mask_mod(self.queries, self.keys, self.window)

    def check(self, f, **others):
        """Output and gradients of `f` are those of the reference."""
        want = self.reference()
        direction = self.normal(*want.shape).double()
        got = f(self, *self.heads(), **others)
        assert got.dtype == self.inputs[0].dtype and got.shape == want.shape
        theirs = torch.autograd.grad(want, self.inputs, direction)
        ours = torch.autograd.grad(got, self.inputs, direction.to(got.dtype))
        for name, a, b in zip("out dq dk dv".split(), (got, *ours), (want, *theirs), strict=True):
            assert distance(a, b) < LIMIT[got.dtype], f"{name}: {distance(a, b)}"


def distance(a, b):
    """Relative, in norm; absolute where `b` is next to nothing."""
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(0.1)).item()


def causal(case, q, k, v):
    assert case.window is None
    return sdpa_causal(q, k, v)


def dense(case, q, k, v):
    ready = to_additive_mask(case.dense(), q.dtype)
    return sdpa_dense(q, k, v, AttentionMask(backend="", mask_mod=None, dense=ready))


def tiled(case, q, k, v):
    tiles = plan_tiles(case.mask_mod(), case.queries, case.keys, q.dtype)
    return cpu_tiled(q, k, v, AttentionMask(backend="", mask_mod=None, tiles=tiles))


def prepared(case, q, backend="auto", dropout=0.0):
    x = q.transpose(1, 2).flatten(2)  # (B, T, D): what goes into a layer, as far as is read
    return prepare_mask(x, case.queries, case.keys, case.window, backend, dropout)


def auto(case, q, k, v, backend="auto", dropout=0.0):
    mask = prepared(case, q, backend, dropout)
    return scaled_dot_product_attention(q, k, v, mask, dropout)


def reference(case, q, k, v):
    return auto(case, q, k, v, "reference")


WINDOWS = [None, SlidingWindow(size=20), SlidingWindow(size=150, num_sink_tokens=3)]
DOCUMENTS = [None, "packed", "left", "interrupted"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_paths_agree_forward_and_backward(documents, window, dtype):
    for seed, f in enumerate((dense, tiled, reference, auto)):
        Case(seed, documents=documents, window=window, dtype=dtype, T=2 * TILE + 13).check(f)
    if documents is None and window is None:
        Case(5, dtype=dtype).check(causal)


SHAPES = [  # B, H, K, D, T: below, at and above the borders of tiles; all groupings
    (1, 1, 1, 8, 1), (2, 3, 3, 8, 2), (1, 4, 1, 16, TILE - 1), (3, 4, 4, 8, TILE),
    (2, 6, 2, 16, TILE + 1), (1, 5, 1, 24, 2 * TILE), (2, 8, 4, 32, 3 * TILE - 1),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape):
    sizes = dict(zip("BHKDT", shape, strict=True))
    for f, documents in itertools.product((tiled, auto), (None, "packed")):
        Case(1, **sizes, documents=documents).check(f)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("documents", [None, "packed", "left"])
@pytest.mark.parametrize("new", [1, 2, 70, TILE + 5])
def test_after_a_cache(new, documents, window):
    """Fewer queries than keys: the queries are the last ones."""
    for f in (dense, tiled, reference, auto):
        Case(2, T=new, past=190, documents=documents, window=window).check(f)


@pytest.mark.parametrize("H, K", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("past", [30, 300])
def test_a_single_query_reads_keys_once_for_a_group(H, K, dtype, past):
    case = Case(3, H=H, K=K, T=1, past=past, dtype=dtype)
    assert chosen(case) == "single_query"
    case.check(auto)


def test_keys_in_any_order():
    """Slots of a sequence of its own need not be in order of time, and may be empty."""
    case = Case(4, T=40, past=100, window=SlidingWindow(size=25))
    order = torch.randperm(140, generator=case.generator).expand(2, -1)
    slots = order.masked_fill(order < 10, EMPTY_SLOT)
    case.keys = Positions(cache_position=slots, position_ids=order)
    steps = torch.arange(100, 140).expand(2, -1)
    case.queries = Positions(cache_position=steps, position_ids=steps)
    case.check(auto)
    case.check(tiled)


def test_documents_and_slots_that_differ_between_sequences():
    case = Case(5, B=3, T=160, documents="packed")
    slots = torch.arange(160).expand(3, -1) + torch.tensor([[0], [5], [9]])
    case.queries = case.keys = replace(case.keys, cache_position=slots, position_ids=slots)
    case.check(tiled)
    case.check(auto)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_forward(documents, window):
    """On a CPU FlexAttention has no backward; its mask comes from the same mask_mod."""
    case = Case(6, documents=documents, window=window, T=TILE + 30)
    with torch.no_grad():
        q, k, v = (x.detach() for x in case.heads())
        blocks = block_mask(case.mask_mod(), case.queries, case.keys)
        got = flex(q, k, v, AttentionMask(backend="flex", mask_mod=None, blocks=blocks))
        assert distance(got, case.reference()) < 3e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("documents", [None, "packed"])
def test_flex_on_a_gpu(documents, window):
    case = Case(6, documents=documents, window=window, T=300, D=32)
    moved = {name: None if x is None else x.cuda() for name, x in vars(case.keys).items()}
    case.keys = case.queries = Positions(**moved)
    q, k, v = (x.detach().cuda().requires_grad_() for x in case.heads())
    got, want = auto(case, q, k, v, "flex"), dense(case, q, k, v)
    torch.testing.assert_close(got, want, atol=2e-3, rtol=2e-3)
    direction = torch.randn_like(want)
    ours, theirs = (torch.autograd.grad(x, (q, k, v), direction) for x in (got, want))
    torch.testing.assert_close(ours, theirs, atol=5e-3, rtol=5e-3)


def test_gradcheck():
    case = Case(7, B=2, T=9, documents="packed")
    q, k, v = (torch.randn(2, h, 9, 4, dtype=torch.double, requires_grad=True) for h in (4, 2, 2))
    assert torch.autograd.gradcheck(lambda *x: tiled(case, *x), (q, k, v))


def test_only_some_inputs_need_gradients():
    case = Case(8, T=150)
    q, k, v = (x.detach() for x in case.heads())
    v.requires_grad_()
    out = tiled(case, q, k, v)
    (grad,) = torch.autograd.grad(out.sum(), v)
    assert grad.shape == v.shape and grad.isfinite().all()


def test_operator_is_well_made():
    """PyTorch's own checks: fake shapes, strides, autograd, and compiled with both."""
    case = Case(9, T=TILE + 20, documents="packed")
    masks, spans = plan_tiles(case.mask_mod(), case.queries, case.keys, torch.float32)
    q, k, v = (x.detach().requires_grad_() for x in case.heads())
    torch.library.opcheck(
        attention_backends._tiled, (q, k, v, masks, spans.expand(-1, 2, -1)))


def chosen(case, dropout=0.0):
    return prepared(case, case.heads()[0], dropout=dropout).backend


@pytest.mark.parametrize("training, dtype, T, past, documents, dropout, path", [
    (True, torch.float32, 200, 0, None, 0.0, "sdpa_causal"),
    (True, torch.float32, 1000, 0, None, 0.0, "sdpa_causal"),
    (True, torch.float32, 200, 0, "packed", 0.0, "sdpa_dense"),
    (True, torch.float32, 256, 0, "packed", 0.0, "cpu_tiled"),
    (True, torch.bfloat16, 64, 0, None, 0.0, "cpu_tiled"),
    (True, torch.bfloat16, 1000, 0, "packed", 0.0, "cpu_tiled"),
    (True, torch.bfloat16, 1000, 0, "packed", 0.1, "sdpa_dense"),
    (True, torch.bfloat16, 1000, 0, None, 0.1, "sdpa_causal"),
    (False, torch.bfloat16, 64, 0, None, 0.0, "sdpa_causal"),
    (False, torch.bfloat16, 256, 0, None, 0.0, "sdpa_causal"),
    (False, torch.bfloat16, 16_384, 0, None, 0.0, "cpu_tiled"),
    (False, torch.bfloat16, 256, 0, "packed", 0.0, "cpu_tiled"),
    (False, torch.float32, 1000, 0, None, 0.0, "sdpa_causal"),
    (False, torch.float32, 64, 0, "left", 0.0, "sdpa_dense"),
    (False, torch.float32, 300, 100, None, 0.0, "cpu_tiled"),
    (False, torch.float32, 10, 100, None, 0.0, "sdpa_dense"),
    (False, torch.float32, 1, 100, None, 0.0, "single_query"),
    (False, torch.bfloat16, 1, 100, "left", 0.0, "single_query"),
])
def test_choice(training, dtype, T, past, documents, dropout, path):
    case = Case(0, B=1, D=8, T=T, past=past, documents=documents, dtype=dtype)
    with torch.set_grad_enabled(training):
        assert chosen(case, dropout) == path


def test_choice_on_a_gpu():
    """By the device alone: nothing is computed."""
    class OnGPU:  # a tensor on a GPU, as far as `select_backend` looks
        shape, requires_grad, device = (1, 300, 64), True, torch.device("cuda")

    def choose(documents=None, window=None, **others):
        case = Case(0, T=300, documents=documents, window=window)
        plain = is_plain_causal(case.queries, case.keys, window)
        return select_backend(
            "auto", OnGPU, 300, plain=plain, dtype=torch.bfloat16, **others)

    assert choose() == "sdpa_causal"
    assert choose("packed") == "flex"
    assert choose(window=SlidingWindow(size=9)) == "flex"
    assert choose("packed", dropout=0.1) == "sdpa_dense"


def test_requests():
    case = Case(0, T=300)
    q = case.heads()[0]
    assert prepared(case, q, "sdpa").backend == "sdpa_causal"
    assert prepared(Case(0, T=300, documents="packed"), q, "sdpa").backend == "sdpa_dense"
    with pytest.raises(ValueError, match="no gradients on a CPU"):
        prepared(case, q, "flex")
    with pytest.raises(ValueError, match="'cpu_tiled' has no dropout"):
        prepared(case, q, "cpu_tiled", dropout=0.1)
    with pytest.raises(ValueError, match="unknown attention backend 'flash'"):
        prepared(case, q, "flash")
    m = model()
    with pytest.raises(ValueError, match="did you mean sdpa"):
        m.set_attention_backend("spda")
    m.set_attention_backend("reference")
    assert m.model.attention_backend == "reference"


def test_a_window_that_holds_everything_is_plain_causal():
    for T, backend in ((20, "sdpa_causal"), (21, "sdpa_dense")):
        assert chosen(Case(0, T=T, window=SlidingWindow(size=20))) == backend


def test_keys_out_of_sight_are_skipped():
    ids = torch.arange(1024)[None] // 256
    steps = torch.arange(1024)
    tokens = Positions(cache_position=steps, position_ids=steps, document_ids=ids)
    _, spans = plan_tiles(make_mask_mod(tokens, tokens), tokens, tokens, torch.float32)
    starts = [first for first, _ in spans[:, 0].tolist()]
    assert starts == [0, 0, 256, 256, 512, 512, 768, 768]


def test_autocast_makes_one_precision_of_several():
    with torch.autocast("cpu", torch.bfloat16):
        for case in (Case(11, T=300, documents="packed"), Case(11, T=1, past=299)):
            q, k, v = case.heads()
            assert auto(case, q, k, v.bfloat16()).dtype == torch.bfloat16


def test_dropout_drops():
    case = Case(12, dtype=torch.float32)
    torch.manual_seed(0)
    a, b = (auto(case, *case.heads(), dropout=0.5) for _ in range(2))
    assert not torch.equal(a, b)


# --- whole models ---


def model(window=None, backend="auto", seed=0):
    attention = GQAConfig(n_heads=4, n_kv_heads=2, d_head=8, window=window)
    block = BlockConfig(attention=attention, ffn=SwiGLUConfig(d_ff=32), norm=RMSNormConfig())
    torch.manual_seed(seed)
    m = CausalLM(DecoderConfig(
        vocab_size=50, d_model=16, blocks=(block,) * 2, max_seq_len=512,
        norm=RMSNormConfig(), init_std=0.3))
    m.set_attention_backend(backend)
    return m


@pytest.mark.parametrize("window", [None, SlidingWindow(size=30, num_sink_tokens=2)], ids=str)
@pytest.mark.parametrize("length", [100, 400])
def test_packed_documents_equal_separate_ones(length, window):
    ids = torch.randint(50, (1, length), generator=torch.Generator().manual_seed(0))
    cuts = [0, 1, length // 3, length // 2, length]
    documents = torch.cat([torch.full((1, b - a), i)
                           for i, (a, b) in enumerate(itertools.pairwise(cuts))], dim=1)
    m = model(window)
    packed = m(ids, document_ids=documents)
    alone = torch.cat([m(ids[:, a:b]) for a, b in itertools.pairwise(cuts)], dim=1)
    torch.testing.assert_close(packed, alone, atol=1e-4, rtol=1e-4)


def test_left_padding_is_exact():
    m, generator = model(), torch.Generator().manual_seed(0)
    ids = torch.randint(50, (3, 300), generator=generator)
    real = torch.arange(300) >= torch.tensor([[0], [17], [222]])
    with torch.no_grad():
        batch = m(ids, document_ids=real.long())
        for row, mask in enumerate(real):
            alone = m(ids[row:row + 1, mask])
            torch.testing.assert_close(batch[row:row + 1, mask], alone, atol=1e-4, rtol=1e-4)
    assert batch.isfinite().all()


@pytest.mark.parametrize("window", [None, SlidingWindow(size=30)], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_cached_equals_uncached(padded, window):
    m = model(window)
    ids = torch.randint(50, (2, 290), generator=torch.Generator().manual_seed(0))
    documents = (torch.arange(290) >= torch.tensor([[0], [9]])).long() if padded else None
    with torch.no_grad():
        want = m(ids, document_ids=documents)
        cache, got = KVCache(m.config, 2, 290), []
        for a, b in itertools.pairwise((0, 260, 261, 262, 289, 290)):
            given = documents[:, a:b] if padded and a == 0 else None
            got.append(m(ids[:, a:b], document_ids=given, cache=cache))
    torch.testing.assert_close(torch.cat(got, dim=1), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("packed", [False, True])
def test_compiles_as_one_graph(packed):
    case = Case(14, B=2, T=300, documents="packed" if packed else None, dtype=torch.bfloat16)
    window = SlidingWindow(size=50, num_sink_tokens=1)

    def f(q, k, v, ids):
        steps = torch.arange(300)
        tokens = Positions(cache_position=steps, position_ids=steps, document_ids=ids)

        def attend(q, window=None):
            x = q.transpose(1, 2).flatten(2)
            mask = prepare_mask(x, tokens, tokens, window)
            return scaled_dot_product_attention(q, k, v, mask)

        out = attend(q)
        return out + attend(out, window)

    inputs = case.heads()
    args = (*inputs, case.keys.document_ids)
    want = f(*args)
    got = torch.compile(f, backend="aot_eager", fullgraph=True)(*args)
    assert distance(got, want) < 1e-2
    direction = torch.randn_like(want)
    a, b = (torch.autograd.grad(x, case.inputs, direction) for x in (got, want))
    for x, y in zip(a, b, strict=True):
        assert distance(x, y) < 1e-2


def test_a_model_trains_alike_with_every_backend():
    ids = torch.randint(50, (2, 300), generator=torch.Generator().manual_seed(0))
    documents = torch.arange(300)[None].expand(2, -1) // 77
    grads = []
    for how in ("auto", "sdpa", "reference", "cpu_tiled"):
        m = model(SlidingWindow(size=100), how)
        m(ids, document_ids=documents).square().mean().backward()
        grads.append([p.grad for p in m.parameters()])
    for other in grads[1:]:
        for a, b in zip(grads[0], other, strict=True):
            assert distance(a, b) < 1e-4


def test_a_single_query_of_an_empty_batch():
    """In evaluation, the last step may hold nothing for a rank."""
    q, k = torch.zeros(0, 4, 1, 16), torch.zeros(0, 2, 3, 16)
    assert single_query_attention(q, k, k[..., :8]).shape == (0, 4, 1, 8)


@pytest.mark.parametrize("keys", [20, 300, 4200])  # as it is, in float32, the query twice
@pytest.mark.parametrize("masked", [False, True])
def test_a_single_bfloat16_query_is_as_exact_as_the_kernel(keys, masked):
    torch.manual_seed(0)
    q = torch.randn(2, 4, 1, 32, dtype=torch.bfloat16)
    k, v = (torch.randn(2, 4, keys, 32, dtype=torch.bfloat16) for _ in range(2))
    seen = torch.rand(2, 1, 1, keys) < 0.5
    dense = to_additive_mask(seen, torch.bfloat16) if masked else None
    mask = AttentionMask(backend="single_query", mask_mod=None, dense=dense)
    exact = attention(q.double(), k.double(), v.double(), seen if masked else None)
    got = single_query_attention(q, k, v, mask)
    assert got.dtype == torch.bfloat16 and got.shape == q.shape
    torch.testing.assert_close(got.double(), exact, atol=5e-3, rtol=0.02)
