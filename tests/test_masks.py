"""Every path of `attend` against the written-out attention, forward and backward."""

import itertools
from dataclasses import replace

import pytest
import torch
from einops import rearrange

from skylar.layers import masks
from skylar.layers.attention import Tokens, attention, fused_attention, visible
from skylar.layers.block import BlockConfig
from skylar.layers.cache import KVCache
from skylar.layers.ffn import SwiGLUConfig
from skylar.layers.gqa import GQAConfig, Window
from skylar.layers.masks import (
    CHUNK,
    additive,
    attend,
    block_attention,
    causal_attention,
    choose,
    chunked_attention,
    decode_attention,
    dense_attention,
    plan_chunks,
)
from skylar.layers.norm import RMSNormConfig
from skylar.models.decoder import CausalLM, DecoderConfig

LIMIT = {torch.float64: 1e-10, torch.float32: 3e-6, torch.bfloat16: 1.5e-2}  # relative, in norm


class Case:
    """Random q, k, v as projections give them, tokens to match, and the oracle."""

    def __init__(self, seed, B=2, H=4, K=2, D=16, T=200, past=0, documents=None, rule=None,
                 dtype=torch.float32):
        self.generator = torch.Generator().manual_seed(seed)
        self.rule, self.width, self.group = rule, D, H // K
        S = past + T
        sizes = ((T, H), (S, K), (S, K))
        self.inputs = [self.normal(B, n, h * D).to(dtype).requires_grad_() for n, h in sizes]
        ids = self.documents(documents, B, S)
        steps = torch.arange(S)
        everything = Tokens(index=steps, positions=steps, documents=ids)
        self.keys = self.queries = everything
        if past:
            self.queries = Tokens(
                index=steps[past:], positions=steps[past:], past=everything,
                documents=None if ids is None else ids[:, past:],
            )

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

    def oracle(self):
        q, k, v = self.heads(torch.float64)
        k, v = (x.repeat_interleave(self.group, dim=1) for x in (k, v))
        return attention(q, k, v, visible(self.queries, self.keys, self.rule))

    def check(self, f, **others):
        """Output and gradients of `f` are those of the oracle."""
        want = self.oracle()
        direction = self.normal(*want.shape).double()
        got = f(*self.heads(), self.queries, self.keys, rule=self.rule, **others)
        assert got.dtype == self.inputs[0].dtype and got.shape == want.shape
        theirs = torch.autograd.grad(want, self.inputs, direction)
        ours = torch.autograd.grad(got, self.inputs, direction.to(got.dtype))
        for name, a, b in zip("out dq dk dv".split(), (got, *ours), (want, *theirs), strict=True):
            assert distance(a, b) < LIMIT[got.dtype], f"{name}: {distance(a, b)}"


def distance(a, b):
    """Relative, in norm; absolute where `b` is next to nothing."""
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(0.1)).item()


def causal(q, k, v, queries, keys, rule=None):
    assert rule is None
    return causal_attention(q, k, v)


RULES = [None, Window(size=20), Window(size=150, sinks=3)]
DOCUMENTS = [None, "packed", "left", "interrupted"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_paths_agree_forward_and_backward(documents, rule, dtype):
    for seed, f in enumerate((dense_attention, chunked_attention, attend)):
        Case(seed, documents=documents, rule=rule, dtype=dtype, T=2 * CHUNK + 13).check(f)
    if documents is None and rule is None:
        Case(5, dtype=dtype).check(causal)


SHAPES = [  # B, H, K, D, T: below, at and above the borders of chunks; all groupings
    (1, 1, 1, 8, 1), (2, 3, 3, 8, 2), (1, 4, 1, 16, CHUNK - 1), (3, 4, 4, 8, CHUNK),
    (2, 6, 2, 16, CHUNK + 1), (1, 5, 1, 24, 2 * CHUNK), (2, 8, 4, 32, 3 * CHUNK - 1),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape):
    sizes = dict(zip("BHKDT", shape, strict=True))
    for f, documents in itertools.product((chunked_attention, attend), (None, "packed")):
        Case(1, **sizes, documents=documents).check(f)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("documents", [None, "packed", "left"])
@pytest.mark.parametrize("new", [1, 2, 70, CHUNK + 5])
def test_after_a_cache(new, documents, rule):
    """Fewer queries than keys: the queries are the last ones."""
    for f in (dense_attention, chunked_attention, attend):
        Case(2, T=new, past=190, documents=documents, rule=rule).check(f)


@pytest.mark.parametrize("H, K", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("past", [30, 300])
def test_decode_reads_keys_once_for_a_group(H, K, dtype, past):
    case = Case(3, H=H, K=K, T=1, past=past, dtype=dtype)
    assert chosen(case) == "decode"
    case.check(attend)


def test_keys_in_any_order():
    """As a ring cache keeps them: seats are not in order of time, some are empty."""
    case = Case(4, T=40, past=100, rule=Window(size=25))
    order = torch.randperm(140, generator=case.generator)
    index = order.masked_fill(order < 10, torch.iinfo(torch.int64).max)  # later than all
    case.keys = Tokens(index=index, positions=order)
    case.check(attend)
    case.check(chunked_attention)


def test_documents_of_each_row_with_rows_of_their_own_index():
    case = Case(5, B=3, T=160, documents="packed")
    index = torch.arange(160).expand(3, -1) + torch.tensor([[0], [5], [9]])
    case.queries = case.keys = replace(case.keys, index=index, positions=index, shared={})
    case.check(chunked_attention)
    case.check(attend)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_forward(documents, rule):
    """On a CPU FlexAttention has no backward; its mask comes from the same rule."""
    case = Case(6, documents=documents, rule=rule, T=CHUNK + 30)
    with torch.no_grad():
        q, k, v = (x.detach() for x in case.heads())
        got = block_attention(q, k, v, case.queries, case.keys, rule=rule)
        assert distance(got, case.oracle()) < 3e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("documents", [None, "packed"])
def test_flex_on_a_gpu(documents, rule):
    case = Case(6, documents=documents, rule=rule, T=300, D=32)
    q, k, v = (x.detach().cuda().requires_grad_() for x in case.heads())

    def there(tokens):
        ids = tokens.documents
        return Tokens(index=tokens.index.cuda(), positions=tokens.positions.cuda(),
                      documents=None if ids is None else ids.cuda())

    tokens = there(case.keys)
    got = block_attention(q, k, v, tokens, tokens, rule=rule)
    want = dense_attention(q, k, v, tokens, tokens, rule=rule)
    torch.testing.assert_close(got, want, atol=2e-3, rtol=2e-3)
    direction = torch.randn_like(want)
    ours, theirs = (torch.autograd.grad(x, (q, k, v), direction) for x in (got, want))
    torch.testing.assert_close(ours, theirs, atol=5e-3, rtol=5e-3)


def test_gradcheck():
    tokens = Case(7, B=2, T=9, documents="packed").keys
    q, k, v = (torch.randn(2, h, 9, 4, dtype=torch.double, requires_grad=True) for h in (4, 2, 2))
    assert torch.autograd.gradcheck(lambda *x: chunked_attention(*x, tokens, tokens), (q, k, v))


def test_only_some_inputs_need_gradients():
    case = Case(8, T=150)
    q, k, v = (x.detach() for x in case.heads())
    v.requires_grad_()
    out = chunked_attention(q, k, v, case.queries, case.keys)
    (grad,) = torch.autograd.grad(out.sum(), v)
    assert grad.shape == v.shape and grad.isfinite().all()


def test_operator_is_well_made():
    """PyTorch's own checks: fake shapes, strides, autograd, and compiled with both."""
    case = Case(9, T=CHUNK + 20, documents="packed")
    masks_, spans = plan_chunks(case.queries, case.keys, None, torch.float32)
    q, k, v = (x.detach().requires_grad_() for x in case.heads())
    torch.library.opcheck(masks._chunked, (q, k, v, masks_, spans.expand(-1, 2, -1)))


def chosen(case, dropout=0.0):
    q, k, _ = case.heads()
    return choose(q, k, case.queries, case.keys, rule=case.rule, dropout=dropout)


@pytest.mark.parametrize("training, dtype, T, past, documents, dropout, path", [
    (True, torch.float32, 200, 0, None, 0.0, "causal"),
    (True, torch.float32, 1000, 0, None, 0.0, "causal"),
    (True, torch.float32, 200, 0, "packed", 0.0, "dense"),
    (True, torch.float32, 256, 0, "packed", 0.0, "chunks"),
    (True, torch.bfloat16, 64, 0, None, 0.0, "chunks"),
    (True, torch.bfloat16, 1000, 0, "packed", 0.0, "chunks"),
    (True, torch.bfloat16, 1000, 0, "packed", 0.1, "dense"),
    (True, torch.bfloat16, 1000, 0, None, 0.1, "causal"),
    (False, torch.bfloat16, 64, 0, None, 0.0, "causal"),
    (False, torch.bfloat16, 256, 0, None, 0.0, "causal"),
    (False, torch.bfloat16, 16_384, 0, None, 0.0, "chunks"),
    (False, torch.bfloat16, 256, 0, "packed", 0.0, "chunks"),
    (False, torch.float32, 1000, 0, None, 0.0, "causal"),
    (False, torch.float32, 64, 0, "left", 0.0, "dense"),
    (False, torch.float32, 300, 100, None, 0.0, "chunks"),
    (False, torch.float32, 10, 100, None, 0.0, "dense"),
    (False, torch.float32, 1, 100, None, 0.0, "decode"),
    (False, torch.bfloat16, 1, 100, "left", 0.0, "decode"),
])
def test_choice(training, dtype, T, past, documents, dropout, path):
    case = Case(0, B=1, D=8, T=T, past=past, documents=documents, dtype=dtype)
    with torch.set_grad_enabled(training):
        assert chosen(case, dropout) == path


def test_choice_on_a_gpu():
    """By the device alone: nothing is computed."""
    tokens = Case(0, T=300).keys
    packed = Case(0, T=300, documents="packed").keys

    class Far:  # a tensor on a GPU, as far as `choose` looks
        shape, dtype, requires_grad = (1, 4, 300, 16), torch.bfloat16, True
        device = torch.device("cuda")

    assert choose(Far, Far, tokens, tokens) == "causal"
    assert choose(Far, Far, packed, packed) == "blocks"
    assert choose(Far, Far, tokens, tokens, rule=Window(size=9)) == "blocks"
    assert choose(Far, Far, packed, packed, dropout=0.1) == "dense"


@pytest.mark.parametrize("documents", [None, "packed"])
def test_layers_share_one_mask(documents, monkeypatch):
    made = []
    real = masks.plan_chunks
    monkeypatch.setattr(masks, "plan_chunks", lambda *a: made.append(a) or real(*a))
    case = Case(10, T=300, documents=documents, dtype=torch.bfloat16)
    for _ in range(3):
        attend(*case.heads(), case.queries, case.keys)
        attend(*case.heads(), case.queries, case.keys, rule=Window(size=9))
    assert len(made) == 2  # one for each rule


def test_keys_that_nobody_sees_are_skipped():
    ids = torch.arange(1024)[None] // 256
    tokens = Tokens(index=torch.arange(1024), positions=torch.arange(1024), documents=ids)
    _, spans = plan_chunks(tokens, tokens, None, torch.float32)
    starts = [first for first, _ in spans[:, 0].tolist()]
    assert starts == [0, 0, 256, 256, 512, 512, 768, 768]


def test_autocast_makes_one_precision_of_several():
    case = Case(11, T=300, documents="packed")
    q, k, v = case.heads()
    with torch.autocast("cpu", torch.bfloat16):
        for T in (300, 1):  # chunks, decode
            tokens = case.keys if T == 300 else Case(0, T=1, past=299).queries
            keys = case.keys if T == 300 else tokens.past
            out = attend(q[:, :, :T], k, v.bfloat16(), tokens, keys)
            assert out.dtype == torch.bfloat16


def test_dropout_drops():
    case = Case(12, dtype=torch.float32)
    torch.manual_seed(0)
    a, b = (attend(*case.heads(), case.queries, case.keys, dropout=0.5) for _ in range(2))
    assert not torch.equal(a, b)


def test_refusals():
    case = Case(13, H=4, K=2, T=10)
    q, k, v = case.heads()
    with pytest.raises(ValueError, match="3 query heads cannot share 2 key heads"):
        attend(q[:, :3], k, v, case.queries, case.keys)
    with pytest.raises(ValueError, match="9 queries with places for 10"):
        attend(q[:, :, :9], k, v, case.queries, case.keys)
    with pytest.raises(ValueError, match="9 keys with places for 10"):
        attend(q, k[:, :, :9], v[:, :, :9], case.queries, case.keys)


# --- whole models ---


def model(window=None, attend=attend, seed=0):
    attention = GQAConfig(n_heads=4, n_kv_heads=2, d_head=8, window=window)
    block = BlockConfig(attention=attention, ffn=SwiGLUConfig(d_ff=32), norm=RMSNormConfig())
    torch.manual_seed(seed)
    return CausalLM(DecoderConfig(
        vocab_size=50, d_model=16, blocks=(block,) * 2, max_seq_len=512, attend=attend,
        norm=RMSNormConfig(), init_std=0.3,
    ))


@pytest.mark.parametrize("window", [None, Window(size=30, sinks=2)], ids=str)
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


@pytest.mark.parametrize("window", [None, Window(size=30)], ids=str)
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
    window = Window(size=50, sinks=1)

    def f(q, k, v, ids):
        steps = torch.arange(300)
        tokens = Tokens(index=steps, positions=steps, documents=ids)
        out = attend(q, k, v, tokens, tokens)
        return out + attend(out, k, v, tokens, tokens, rule=window)

    inputs = case.heads()
    args = (*inputs, case.keys.documents)
    want = f(*args)
    got = torch.compile(f, backend="aot_eager", fullgraph=True)(*args)
    assert distance(got, want) < 1e-2
    direction = torch.randn_like(want)
    a, b = (torch.autograd.grad(x, case.inputs, direction) for x in (got, want))
    for x, y in zip(a, b, strict=True):
        assert distance(x, y) < 1e-2


def test_model_trains_alike_with_either_attend():
    ids = torch.randint(50, (2, 300), generator=torch.Generator().manual_seed(0))
    documents = torch.arange(300)[None].expand(2, -1) // 77
    grads = []
    for how in (attend, fused_attention):
        m = model(Window(size=100), how)
        m(ids, document_ids=documents).square().mean().backward()
        grads.append([p.grad for p in m.parameters()])
    for a, b in zip(*grads, strict=True):
        assert distance(a, b) < 1e-4


@pytest.mark.parametrize("keys", [20, 300, 4200])  # as it is, in float32, the row twice
@pytest.mark.parametrize("masked", [False, True])
def test_a_lone_bfloat16_row_is_as_exact_as_the_kernel(keys, masked):
    torch.manual_seed(0)
    q = torch.randn(2, 4, 1, 32, dtype=torch.bfloat16)
    k, v = (torch.randn(2, 4, keys, 32, dtype=torch.bfloat16) for _ in range(2))
    seen = torch.rand(2, 1, 1, keys) < 0.5
    mask = additive(seen, torch.bfloat16) if masked else None
    exact = attention(q.double(), k.double(), v.double(), seen if masked else None)
    got = decode_attention(q, k, v, mask)
    assert got.dtype == torch.bfloat16 and got.shape == q.shape
    torch.testing.assert_close(got.double(), exact, atol=5e-3, rtol=0.02)
