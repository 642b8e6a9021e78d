"""The fused form for decoding: the model's logits and tokens, and never of old weights."""

import copy
import gc
import json
import random
import statistics
import threading
import weakref
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from skylar.inference import cpu_fused
from skylar.inference.cpu_fused import (
    FUSE_MIN_TOKENS,
    PREPACK_MIN_MULTIPLIES,
    PREPACK_MIN_NUMEL,
    apply_rope_fused,
    cached_fused,
    can_fuse,
    can_prepack,
    fuse_for_cpu,
    fused_linear,
    fused_nbytes,
    fused_rms_norm,
    fusing_pays,
    release_fused,
    to_pairs,
    why_not_fused,
)
from skylar.inference.generate import generate, next_logits, stream
from skylar.layers.block import BlockConfig
from skylar.layers.cache import KVCache
from skylar.layers.gqa import GQAConfig
from skylar.layers.mlp import MLPConfig
from skylar.layers.norm import RMSNorm, RMSNormConfig
from skylar.layers.rope import RoPEConfig, apply_rope
from skylar.models.decoder import CausalLM, DecoderConfig
from skylar.models.presets import get_config

SMALL = dict(vocab_size=96, d_model=64, n_heads=4, n_kv_heads=2, d_head=16, n_layers=2)
needs_bf16 = pytest.mark.skipif(
    not can_prepack(torch.bfloat16), reason="no fast bfloat16 on this processor")
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16)]


def scrambled(config: DecoderConfig) -> CausalLM:
    """Every parameter random, so that no norm's gain is 1 and no bias 0."""
    torch.manual_seed(0)
    lm = CausalLM(config).eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return lm


def model(family: str = "qwen3", **changes) -> CausalLM:
    sizes = {**SMALL, "max_seq_len": 64, **changes}
    if family == "gpt2":
        del sizes["n_kv_heads"]
    return scrambled(get_config("test", family, **sizes))


def random_changes(seed: int) -> tuple[str, dict]:
    """A family and sizes: grouped heads, odd widths, windows, biases."""
    draw = random.Random(seed)
    kv = draw.choice([1, 2, 3])
    changes = dict(
        vocab_size=draw.choice([96, 301]), d_model=draw.choice([24, 40, 72]), n_kv_heads=kv,
        n_heads=kv * draw.choice([1, 2, 4]), d_head=draw.choice([2, 8, 26]), d_ff=56,
        n_layers=draw.choice([1, 3]), rope_theta=draw.choice([100.0, 1e6]),
        tie_embeddings=draw.random() < 0.5, bias=draw.random() < 0.5, max_seq_len=48)
    family = draw.choice(["llama3", "qwen3", "skylar", "gpt2"])
    if family == "skylar":
        changes |= dict(window=draw.choice([None, 3, 9]), num_sink_tokens=draw.choice([0, 2]),
                        full_every=draw.choice([0, 2]))
    if family == "gpt2":
        del changes["rope_theta"], changes["n_kv_heads"]
    return family, changes


@pytest.mark.parametrize("seed", range(32))
def test_random_models_read_and_decode_alike(seed):
    """A prompt in two chunks, single tokens, padding; then the greedy text."""
    family, changes = random_changes(seed)
    lm, B = scrambled(get_config("test", family, **changes)), 1 + seed % 3
    ids = torch.randint(96, (B, 13))
    mask = torch.ones_like(ids)
    mask[0, :seed % 5] = 0  # padding, on the left
    cache, session = KVCache(lm.config, B, 20), fuse_for_cpu(lm, B).session(B, 20)
    with torch.no_grad():
        for cut in (slice(0, 7), slice(7, 10), slice(10, 11), slice(11, 12), slice(12, 13)):
            want = next_logits(lm, ids[:, cut], mask[:, cut], cache)
            assert_close(session(ids[:, cut], mask[:, cut]), want, rtol=1e-4, atol=1e-4)
    texts = [generate(lm, ids, 20, temperature=0, attention_mask=mask, fuse=fuse)
             for fuse in (True, False)]
    assert torch.equal(*texts)


@needs_bf16
@pytest.mark.parametrize("family", ["qwen3", "llama3", "gpt2"])
@pytest.mark.parametrize("rows", [1, 3])
def test_bf16_is_as_close_to_float32_as_the_model(family, rows):
    lm, ids = model(family), torch.randint(96, (rows, 24))
    half = copy.deepcopy(lm).bfloat16()
    session = fuse_for_cpu(half, rows).session(rows)
    exact, ours, theirs = [], [], []
    with torch.no_grad():
        for t in range(24):
            exact.append(next_logits(lm, ids[:, :t + 1]))
            theirs.append(next_logits(half, ids[:, :t + 1]))
            ours.append(session(ids[:, t:t + 1]))
    exact, ours, theirs = (torch.stack(x) for x in (exact, ours, theirs))
    assert (ours - exact).std() < 1.1 * (theirs - exact).std()


def test_rope_scaling_is_kept():
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    lm = model("llama3", rope_scaling=scaling)
    ids = torch.randint(96, (2, 30))
    with torch.no_grad():
        assert_close(fuse_for_cpu(lm, 2).session(2)(ids), next_logits(lm, ids), rtol=1e-4,
                     atol=1e-4)


# --- parts ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("made_for", [1, 8])
@pytest.mark.parametrize("shape", [(40, 24), (1031, 256)])
def test_fused_linear_is_the_layers_side_by_side(shape, made_for, bias, dtype):
    out, width = shape
    linears = [torch.nn.Linear(width, n, bias=bias, dtype=dtype) for n in (out, 7)]
    weights, biases = zip(*((linear.weight, linear.bias) for linear in linears))
    multiply = fused_linear(weights, biases, made_for)
    for rows in (1, 8, 33):  # also what it was not made for: a prompt
        x = torch.randn(rows, width)
        with torch.no_grad():
            expected = torch.cat([linear(x.to(dtype)) for linear in linears], dim=-1)
            found = multiply(x)
        assert not found.requires_grad
        tolerance = 1e-5 if dtype == torch.float32 else 0.03
        assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_which_order_is_chosen(monkeypatch):
    """As `bench/results/decode_kernels.json` says; no weight is made for it."""
    monkeypatch.setattr(cpu_fused, "prepacked_linear", lambda *_: "prepacked")
    monkeypatch.setattr(cpu_fused, "transposed_linear", lambda *_: "transposed")
    bf16, fp32 = torch.bfloat16, torch.float32

    def chosen(dtype, shape, rows):
        return fused_linear([torch.empty(shape, dtype=dtype)], [None], rows)

    large = (PREPACK_MIN_NUMEL // 512, 512)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert [chosen(fp32, large, rows) for rows in (1, 2, 8)] == ["transposed"] + ["prepacked"] * 2
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # one row is shared by oneDNN only
    assert [chosen(fp32, large, rows) for rows in (1, 2, 8)] == ["prepacked"] * 3
    assert [chosen(fp32, (64, 64), rows) for rows in (1, 8)] == ["transposed"] * 2
    assert [chosen(bf16, (64, 64), rows) for rows in (1, 8)] == ["prepacked"] * 2
    monkeypatch.setattr(cpu_fused, "can_prepack", lambda dtype: False)
    assert chosen(fp32, large, 8) == "transposed"


def test_the_stored_measurement_supports_the_choice():
    stored = Path(__file__).parents[1] / "bench/results/decode_kernels.json"
    ratios = {}
    for row in json.loads(stored.read_text())["rows"]:
        key = row["what"], row["dtype"], row["rows"]
        ratios.setdefault(key, []).append(row["rival_us"] / row["chosen_us"])
    assert {key: r for key, r in ratios.items() if statistics.median(r) < 0.95} == {}


def compiled_rows(what: str) -> list[dict]:
    """Of `bench/decode_compiled.py`, which measured them on a quiet machine."""
    stored = Path(__file__).parents[1] / "bench/results/decode_compiled.json"
    return [row for row in json.loads(stored.read_text())["rows"] if row["what"] == what]


def gain(row: dict) -> float:
    """How many times faster the prepacked order is than the best plain one."""
    us = row["us"]
    return us.get("transposed", us["plain"]) / us["prepacked"]


def test_stored_products_support_the_constants():
    """Each constant lies between sizes at which one order is faster and then the other."""
    several, single = {}, {1: {}, 2: {}}
    for row in compiled_rows("order"):
        numel = row["shape"][0] * row["shape"][1]
        if row["dtype"] == "bfloat16":
            assert numel < 2**15 or gain(row) > 1  # always prepacked
        elif row["rows"] == 1:
            single[row["torch_threads"]][numel] = gain(row)
        else:
            several.setdefault(numel * row["rows"], []).append(gain(row))
    assert max(single[1].values()) < 1.1  # with one thread it never pays
    assert {n for n, g in single[2].items() if g > 1.1} == {
        n for n in single[2] if n >= PREPACK_MIN_NUMEL}
    assert {n for n, g in several.items() if statistics.median(g) > 1} == {
        n for n in several if n > PREPACK_MIN_MULTIPLIES}


def test_the_copy_has_paid_for_itself_when_it_is_made():
    rows = compiled_rows("break_even")
    assert len(rows) == 12 and max(row["tokens"] for row in rows) < FUSE_MIN_TOKENS


def test_fused_is_faster_than_compiled_with_a_static_cache():
    """Or the module should go: the stored medians of `torch.compile`, frozen and not, and HF's."""
    rows = compiled_rows("decode")
    assert {row["case"].rsplit("-", 1)[0] for row in rows} == {
        f"{name}-{dtype}" for name in ("test", "wide") for dtype in ("fp32", "bf16")}
    for row in rows:
        rates = row["tokens_per_s"]
        assert {"growing", "static", "compiled", "frozen", "hf_compiled"} < rates.keys()
        assert min(row["fused_over"].values()) > 1.1, row["case"]
        assert row["case"].split("-")[1] == "bf16" or min(row["same_tokens"].values()) == 1


def test_fused_linear_with_the_gain_of_a_norm():
    linear, norm, x = torch.nn.Linear(24, 40), RMSNorm(24), torch.randn(3, 24)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        normalize, gain = fused_rms_norm(norm.eps, norm.weight, fold=True)
        found = fused_linear([linear.weight], [linear.bias], 3, gain)(normalize(x))
        assert_close(found, linear(norm(x)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("x", [torch.randn(5, 24), torch.zeros(2, 24), 1e-3 * torch.randn(5, 24),
                               1e15 * torch.randn(5, 24)])
def test_fused_rms_norm(x):
    norm = RMSNorm(24)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        assert_close(fused_rms_norm(norm.eps, norm.weight)[0](x), norm(x), rtol=1e-5, atol=1e-6)


def test_apply_rope_fused_rotates_the_same_pairs():
    x = torch.randn(2, 4, 7, 32)  # (B, H, T, Dh)
    cos, sin = RoPEConfig().build(32)(torch.arange(7))
    expected = to_pairs(apply_rope(x, cos, sin).movedim(-1, 0), 1).movedim(0, -1)
    pairs = to_pairs(x.movedim(-1, 0), 1).movedim(0, -1).contiguous()
    found = apply_rope_fused(pairs, torch.complex(cos, sin)[..., :16])
    assert_close(found, expected, rtol=1e-5, atol=1e-5)


# --- what cannot be fused ---


def with_block(**changes) -> CausalLM:
    block = BlockConfig(**{"attention": GQAConfig(n_heads=2), "norm": RMSNormConfig(),
                           "ffn": MLPConfig(d_ff=32), **changes})
    return scrambled(DecoderConfig(vocab_size=50, d_model=16, blocks=(block,), max_seq_len=32))


class Wrapped(torch.nn.Linear):
    pass


def hooked(lm):
    lm.model.layers[0].register_forward_hook(lambda *_: None)


def subclassed(lm):
    lm.model.layers[1].self_attn.q_proj.__class__ = Wrapped


@pytest.mark.parametrize("change, reason", [
    (lambda lm: lm.double(), "weights are torch.float64"),
    (lambda lm: lm.to("meta"), "not all weights are on a CPU"),
    (lambda lm: lm.model.norm.double(), "in one precision"),
    (hooked, "model.layers.0 has forward hooks"),
    (subclassed, "model.layers.1.self_attn.q_proj is a Wrapped")])
def test_what_cannot_be_fused_says_why_and_decodes_as_it_is(change, reason):
    lm = model()
    change(lm)
    assert reason in why_not_fused(lm) and not can_fuse(lm) and not fusing_pays(lm, 100)
    with pytest.raises(ValueError, match=f"cannot fuse this model: .*{reason}"):
        fuse_for_cpu(lm)


def test_blocks_of_another_kind_keep_their_code():
    assert can_fuse(with_block())
    lm = with_block(pre_norm=False)
    assert not can_fuse(lm)
    ids = torch.randint(50, (2, 5))
    assert torch.equal(generate(lm, ids, 20, temperature=0),
                       generate(lm, ids, 20, temperature=0, fuse=False))
    with pytest.raises(ValueError, match="cannot fuse this model: a block is not a pre-norm"):
        generate(lm, ids, 20, fuse=True)
    with pytest.raises(ValueError, match="fuse=True is for models on a CPU, with cache=True"):
        generate(lm, ids, 20, fuse=True, cache=False)


# --- the plain call ---


@pytest.fixture
def made(monkeypatch):
    """How many fused forms have been made."""
    made, original = [], cpu_fused.fuse_for_cpu

    def count(*args):
        made.append(args)
        return original(*args)

    monkeypatch.setattr(cpu_fused, "fuse_for_cpu", count)
    return made


def test_the_plain_call_fuses_once(made):
    lm, ids = model(), torch.randint(96, (1, 5))
    generate(lm, ids, FUSE_MIN_TOKENS - 1)
    assert not made and fused_nbytes(lm) == 0  # too few tokens to pay
    for _ in range(3):
        generate(lm, ids, FUSE_MIN_TOKENS)
    generate(lm, ids, 2)  # free, as it is there
    assert len(made) == 1
    linear = sum(m.weight.nbytes for m in lm.modules() if isinstance(m, torch.nn.Linear))
    assert fused_nbytes(lm) == linear
    generate(lm, ids.expand(4, -1), FUSE_MIN_TOKENS)  # another order for several rows
    assert len(made) == 2 and fused_nbytes(lm) == 2 * linear
    release_fused(lm)
    assert fused_nbytes(lm) == 0


def test_it_stays_off_where_asked_or_not_worth_it(made, monkeypatch):
    lm, ids = model(), torch.randint(96, (1, 5))
    generate(lm, ids, 20, fuse=False)
    generate(lm, ids, 20, cache=False)
    with torch.autocast("cpu", torch.bfloat16):
        generate(lm, ids, 20)
    monkeypatch.setattr(cpu_fused, "FUSE_MAX_BYTES", 1000)
    generate(lm, ids, 20)
    assert not made
    generate(lm, ids, 20, fuse=True)
    assert made


def test_the_copy_does_not_keep_the_model_alive(made):
    lm = model()
    generate(lm, torch.randint(96, (1, 5)), 20)
    alive = weakref.ref(lm)
    assert made and lm in cpu_fused._FUSED
    made.clear()  # the arguments of the calls
    del lm
    gc.collect()
    assert alive() is None


def optimizer_step(lm):
    for p in lm.parameters():
        p.grad = torch.randn_like(p)
    torch.optim.AdamW(lm.parameters(), lr=0.1, foreach=True).step()


def fused_optimizer_step(lm):
    for p in lm.parameters():
        p.grad = torch.randn_like(p)
    torch.optim.AdamW(lm.parameters(), lr=0.1, fused=True).step()


def load(lm):
    other = {k: v + torch.randn_like(v) for k, v in lm.state_dict().items()}
    lm.load_state_dict(other)


def load_assign(lm):
    other = {k: v + torch.randn_like(v) for k, v in lm.state_dict().items()}
    lm.load_state_dict(other, assign=True)
    lm.tie_weights()


def data_copy(lm):  # escapes the version counter
    for p in lm.parameters():
        p.data.copy_(p.data + torch.randn_like(p))


def data_swap(lm):  # as an exponential moving average is swapped in
    for p in lm.parameters():
        p.data = p.data + torch.randn_like(p)
    lm.tie_weights()


def one_norm(lm):
    with torch.no_grad():
        lm.model.layers[1].self_attn.k_norm.weight.mul_(-3)


def one_layer(lm):
    lm.model.layers[0], lm.model.layers[1] = lm.model.layers[1], lm.model.layers[0]


@pytest.mark.parametrize("change", [
    optimizer_step, fused_optimizer_step, load, load_assign, data_copy, data_swap, one_norm,
    one_layer])
@pytest.mark.parametrize("batch", [1, 2])
def test_changed_weights_are_noticed(change, batch):
    lm, ids = model(), torch.randint(96, (batch, 5))
    before = generate(lm, ids, 30, temperature=0)
    change(lm)
    after = generate(lm, ids, 30, temperature=0)
    assert torch.equal(after, generate(lm, ids, 30, temperature=0, fuse=False))
    assert not torch.equal(after, before)


@needs_bf16
def test_another_precision_is_noticed():
    lm, ids = model(), torch.randint(96, (1, 5))
    generate(lm, ids, 20)
    lm.bfloat16()
    session = cached_fused(lm, 1).session(1)
    with torch.no_grad():
        assert_close(session(ids), next_logits(lm, ids), rtol=0.03, atol=0.1)
    generate(lm.float(), ids, 20)
    assert fused_nbytes(lm) == sum(
        m.weight.nbytes for m in lm.modules() if isinstance(m, torch.nn.Linear))


def test_the_model_is_untouched_and_can_go_on_training():
    lm, ids = model(), torch.randint(96, (2, 9))
    before = copy.deepcopy(lm.state_dict())
    generate(lm, ids, 20)
    assert all(torch.equal(before[name], tensor) for name, tensor in lm.state_dict().items())
    lm(ids).sum().backward()
    assert all(p.grad is not None for p in lm.parameters())
    lm.zero_grad()
    copy.deepcopy(lm)


def test_dropout_is_off_and_the_mode_is_put_back():
    lm = CausalLM(get_config("test", "qwen3", **SMALL, max_seq_len=64, dropout=0.5)).train()
    ids = torch.randint(96, (2, 9))
    one, two = (generate(lm, ids, 20, temperature=0, fuse=fuse) for fuse in (True, False))
    assert torch.equal(one, two) and lm.training


def test_threads_share_the_weights_and_nothing_else():
    lm = model()
    prompts = [torch.randint(96, (1, 4 + n)) for n in range(6)]
    alone = [generate(lm, ids, 30, temperature=0) for ids in prompts]
    found = [None] * 6

    def run(n):
        found[n] = generate(lm, prompts[n], 30, temperature=0)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(found, alone))


def test_streams_may_take_turns():
    """Two sessions of one fused form do not write into each other's memory."""
    decoder, lm = fuse_for_cpu(model(), 1), model()
    one, two = decoder.session(1, 20), decoder.session(1, 20)
    a, b = torch.randint(96, (1, 8)), torch.randint(96, (1, 8))
    with torch.no_grad():
        for t in range(8):
            assert_close(one(a[:, t:t + 1]), next_logits(lm, a[:, :t + 1]), rtol=1e-4, atol=1e-4)
            assert_close(two(b[:, t:t + 1]), next_logits(lm, b[:, :t + 1]), rtol=1e-4, atol=1e-4)


def test_stream_is_the_fast_path_too(made):
    from skylar.data.tokenizer import BPETokenizer

    tokenizer = BPETokenizer.train(["to be or not to be " * 20], vocab_size=270)
    lm = model(vocab_size=tokenizer.vocab_size)
    settings = dict(temperature=0, eos_token_id=[])
    text = "".join(stream(lm, tokenizer, "to be", 30, **settings))
    assert made
    assert text == "".join(stream(lm, tokenizer, "to be", 30, **settings, fuse=False))


def test_a_long_prompt_with_little_to_write_is_read_by_the_model(made):
    lm = model()
    generate(lm, torch.randint(96, (1, 50)), 3)
    assert not made
