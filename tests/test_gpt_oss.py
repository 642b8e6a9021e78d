"""gpt-oss: sinks, windows, experts and files, beside transformers' own implementation."""

import math
import os
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from skylar.inference.generate import generate
from skylar.layers.attention_backends import CHOICES, Positions
from skylar.layers.attention_sinks import SinkAttentionConfig, sink_attention, with_sink_key
from skylar.layers.cache import KVCache
from skylar.layers.gqa import GQAConfig
from skylar.layers.moe import ClampedMoEConfig, clamped_swiglu
from skylar.layers.router import RouterLossConfig, RouterOutput, TopKConfig, TopKLogitsConfig
from skylar.layers.sliding_window import SlidingWindow
from skylar.models.decoder import CausalLM, count_parameters
from skylar.models.families.gpt_oss import GptOssConfig
from skylar.models.hub import from_pretrained, save_pretrained
from skylar.models.presets import (
    PRESETS,
    config_from_dict,
    config_from_hf,
    config_to_dict,
    get_config,
)
from skylar.training.muon import MuonConfig
from skylar.training.optim import AdamWConfig
from skylar.utils.mxfp4 import decode_mxfp4, encode_mxfp4

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

# its grouped product wants rows of a multiple of 16 bytes
EAGER = dict(attn_implementation="eager", experts_implementation="eager")
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
        "truncate": False}
SCALINGS = [None, YARN, YARN | {"factor": 5.0, "truncate": True}]


def tiny(**changes) -> GptOssConfig:
    sizes = dict(vocab_size=61, d_model=24, n_heads=4, n_kv_heads=2, d_head=8, n_layers=3,
                 d_ff=14, n_experts=5, top_k=2, window=6, max_seq_len=96, rope_scaling=YARN,
                 init_std=0.3)
    return GptOssConfig(**sizes | changes)


def rough(model: torch.nn.Module, seed: int = 0):
    "Norms, biases and sinks away from 1 and 0, so that a lost one shows."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1 or name.endswith("bias"):
                p += 0.5 * torch.randn(p.shape, generator=generator)
    return model


def make(seed: int = 0, **changes) -> CausalLM:
    torch.manual_seed(seed)
    return rough(CausalLM(tiny(**changes)), seed).eval()


def tokens(*shape: int, seed: int = 0):
    return torch.randint(61, shape, generator=torch.Generator().manual_seed(seed))


def draw(seed: int) -> GptOssConfig:
    "Odd sizes and corners: one expert, all experts, all windows, no window, tied, no bias."
    rng = random.Random(seed)
    n_kv_heads, n_layers = rng.choice([1, 2, 3]), rng.randrange(1, 4)
    n_experts = rng.choice([1, 2, 5, 8])
    kinds = rng.choice([None, ("full_attention",), ("sliding_attention",)])
    return tiny(
        d_model=rng.randrange(9, 40), n_kv_heads=n_kv_heads,
        n_heads=n_kv_heads * rng.choice([1, 2, 3]), d_head=2 * rng.randrange(2, 9),
        n_layers=n_layers, d_ff=rng.randrange(3, 40), n_experts=n_experts,
        top_k=rng.choice([1, n_experts]) if seed % 3 else rng.randrange(1, n_experts + 1),
        window=rng.choice([1, 2, 7, 40]), layer_types=kinds and kinds * n_layers,
        rope_scaling=SCALINGS[seed % 3], rope_theta=rng.choice([1e3, 150_000.0]),
        norm_eps=rng.choice([1e-6, 1e-5]), tie_embeddings=rng.random() < 0.5,
        bias=rng.random() < 0.7, swiglu_limit=rng.choice([0.5, 7.0]),
        swiglu_alpha=rng.choice([1.0, 1.702]), init_std=0.3)


# --- the sink ---


def formula(q, k, v, sinks, mask):
    "One head and one query at a time."
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for t in range(q.shape[2]):
                seen = mask.expand(q.shape[0], 1, *mask.shape[2:])[b, 0, t]
                s = k[b, h // group, seen] @ q[b, h, t] / math.sqrt(q.shape[-1])
                e = s.exp()
                out[b, h, t] = (e / (e.sum() + sinks[h].exp())) @ v[b, h // group, seen]
    return out


@pytest.mark.parametrize("H, K, T, S", [(4, 4, 5, 5), (4, 2, 5, 9), (6, 1, 1, 7), (1, 1, 3, 3)])
def test_both_forms_are_the_formula_forward_and_backward(H, K, T, S):
    torch.manual_seed(0)
    mask = torch.ones(1, 1, T, S, dtype=torch.bool).tril(S - T)
    leaves = [torch.randn(2, n, length, 8, dtype=torch.float64, requires_grad=True)
              for n, length in ((H, T), (K, S), (K, S))]
    leaves.append(torch.randn(H, dtype=torch.float64, requires_grad=True))
    weight = torch.randn(2, H, T, 8, dtype=torch.float64)

    def by_key(q, k, v, sinks, mask):
        q, k, v = with_sink_key(q, k, v, sinks)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=F.pad(mask, (1, 0), value=True), enable_gqa=True)[..., :8]

    results = []
    for f in (formula, sink_attention, by_key):
        out = f(*leaves, mask)
        results.append([out, *torch.autograd.grad((out * weight).sum(), leaves)])
    for other in results[1:]:
        for a, b in zip(results[0], other):
            torch.testing.assert_close(a, b)


def test_a_sink_of_minus_infinity_is_no_sink_and_a_large_one_leaves_nothing():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 6, 8).unbind()
    mask = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    out = sink_attention(q, k, v, torch.full((4,), -torch.inf), mask)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, is_causal=True))
    out = sink_attention(q, k, v, torch.full((4,), 100.0), mask)
    assert out.abs().max() < 1e-30


def layer_of(window, dropout=0.0):
    torch.manual_seed(0)
    layer = SinkAttentionConfig(n_heads=4, n_kv_heads=2, d_head=8, window=window, bias=True,
                                dropout=dropout).build(24)
    layer.init_weights(0.3, 0.3)
    return rough(layer)


def positions(T: int, kind: str) -> Positions:
    steps = torch.arange(T)
    if kind == "plain":
        return Positions(cache_position=steps, position_ids=steps)
    ids = torch.stack([steps // 5, (steps > 8).long()])
    return Positions(cache_position=steps, position_ids=steps % 5, document_ids=ids)


@pytest.mark.parametrize("T", [2, 17, 300])
@pytest.mark.parametrize("documents", ["plain", "packed"])
@pytest.mark.parametrize("window", [None, SlidingWindow(size=4),
                                    SlidingWindow(size=3, num_sink_tokens=1)])
def test_backends_agree_forward_and_backward(T, documents, window):
    layer, x = layer_of(window), torch.randn(2, T, 24)
    weight, found = torch.randn(2, T, 24), {}
    for backend in CHOICES:
        x_in = x.clone().requires_grad_(backend != "flex")  # on a CPU it has no gradient
        with torch.set_grad_enabled(backend != "flex"):
            inputs = layer.prepare(x_in, positions(T, documents), backend=backend)
            out = layer(x_in, inputs)
        found[backend] = [out.detach()]
        if backend != "flex":
            layer.zero_grad()
            (out * weight).sum().backward()
            found[backend] += [x_in.grad, *(p.grad.clone() for p in layer.parameters())]
    assert len({len(v) for name, v in found.items() if name != "flex"}) == 1
    for name, values in found.items():
        for a, b in zip(found["reference"], values):
            error, size = (a - b).abs().max(), a.abs().max()
            assert error <= 2e-5 * size + 1e-6, f"{name}: {error:.1e} apart, of {size:.1e}"


def test_dropout_of_attention_weights_never_brings_the_sink_back():
    "Expectation over many masks is the output without dropout."
    layer, x = layer_of(None, dropout=0.5), torch.randn(1, 6, 24)
    layer.train()
    torch.manual_seed(1)
    with torch.no_grad():
        mean = layer(x.expand(20_000, -1, -1)).mean(0)
        exact = layer.eval()(x)[0]
    torch.testing.assert_close(mean, exact, atol=0.03, rtol=0.03)


def test_costs_are_those_of_grouped_query_attention():
    a = SinkAttentionConfig(n_heads=4, n_kv_heads=2, d_head=8, window=SlidingWindow(size=4))
    b = GQAConfig(n_heads=4, n_kv_heads=2, d_head=8, window=SlidingWindow(size=4))
    assert a != b
    assert a.flops(24, 100) == b.flops(24, 100)
    assert a.cache_bytes(24, 100, 2) == b.cache_bytes(24, 100, 2)


# --- router and experts ---


def test_softmax_of_the_chosen_is_the_renormalized_softmax_of_all():
    torch.manual_seed(0)
    ours = TopKLogitsConfig(n_experts=9, top_k=4).build(12)
    ours.init_weights(1.0, 1.0)
    other = TopKConfig(n_experts=9, top_k=4).build(12)
    other.weight = ours.weight
    x = torch.randn(50, 12)
    for a, b in zip(ours(x), other(x)):
        torch.testing.assert_close(a, b)
    torch.nn.init.normal_(ours.bias, std=3.0)
    assert not torch.equal(ours(x).experts, other(x).experts)


def test_clamped_swiglu_has_the_limits_where_they_belong():
    gate, up = torch.tensor([9.0, 7.0, -9.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 1.0, 9.0, -9.0])
    out = clamped_swiglu(torch.stack([gate, up], -1).flatten())

    def one(g, u):
        return (u + 1) * g / (1 + math.exp(-1.702 * g))

    expected = [one(7, 1), one(7, 1), one(-9, 1), one(1, 7), one(1, -7)]
    torch.testing.assert_close(out, torch.tensor(expected))


@pytest.mark.parametrize("k, n", [(1, 5), (5, 5), (2, 5), (1, 1)])
def test_experts_are_those_of_transformers(k, n):
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        hidden_size=12, intermediate_size=7, num_local_experts=n, num_experts_per_tok=k,
        num_hidden_layers=1)
    theirs = transformers.models.gpt_oss.modeling_gpt_oss.GptOssMLP(config)
    ours = ClampedMoEConfig(router=TopKLogitsConfig(n_experts=n, top_k=k), d_ff=7).build(12)
    turned = ("gate_up_proj", "down_proj")
    with torch.no_grad():
        other = dict(theirs.named_parameters())
        for name, p in ours.named_parameters():
            p.normal_()
            there = other.pop(name.replace("gate.", "router."))
            there.copy_(p.mT if name.endswith(turned) else p)
        assert not other
    x = torch.randn(2, 9, 12)
    y, routed = ours(x)
    torch.testing.assert_close(y, theirs(x)[0], atol=1e-4, rtol=1e-4)
    assert routed.logits.shape == (18, n) and routed.experts.shape == (18, k)
    (g,), (h,) = (torch.autograd.grad(f(z).square().sum(), z) for f, z in (
        (lambda z: ours(z)[0], x.clone().requires_grad_()),
        (lambda z: theirs(z)[0], x.clone().requires_grad_())))
    torch.testing.assert_close(g, h, atol=1e-4, rtol=1e-4)


def test_biases_of_experts_are_no_matrices():
    "Neither decayed nor orthogonalized, though they are stacked to two dimensions."
    model = make()
    biases = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    assert any("experts" in name for name in biases)
    names = {p: name for name, p in model.named_parameters()}
    for config in (AdamWConfig(), MuonConfig()):
        for group in config.build(model).param_groups:
            found = {names[p] for p in group["params"]}
            if group["weight_decay"] or "adjust_lr" in group:
                assert not found & biases


# --- the model, beside transformers, through files ---


def logits_and_gradients(model, ids, logits_of):
    model.zero_grad()
    logits = logits_of(ids)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return logits, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: CausalLM, theirs, ids):
    a, mine = logits_and_gradients(ours, ids, ours)
    b, other = logits_and_gradients(theirs, ids, lambda ids: theirs(ids, use_cache=False).logits)
    torch.testing.assert_close(a, b, atol=5e-5, rtol=5e-5)
    mine = {name.replace(".gate.", ".router."): grad for name, grad in mine.items()}
    for name, grad in mine.items():
        there = other[name]
        there = there.mT if name.endswith(("experts.gate_up_proj", "experts.down_proj")) else there
        torch.testing.assert_close(grad, there, atol=1e-4, rtol=1e-3)
    assert mine.keys() == other.keys()


@pytest.mark.parametrize("seed", range(18))
def test_files_both_ways(tmp_path, seed):
    torch.manual_seed(seed)
    config = draw(seed)
    model = rough(CausalLM(config), seed).eval()
    save_pretrained(model, tmp_path / "ours", max_shard_size=20_000 if seed % 2 else 10**9)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, **EAGER)
    assert not any(report.values()), report
    assert type(theirs) is transformers.GptOssForCausalLM
    ids = tokens(2, 30, seed=seed)
    assert_same(model, theirs.eval(), ids)
    theirs.save_pretrained(tmp_path / "theirs")
    back = from_pretrained(tmp_path / "theirs")
    assert back.decoder_config == model.decoder_config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), back.parameters()))
    assert_same(back, theirs, ids)
    with torch.no_grad():
        ours = generate(model, ids[:1, :7], max_new_tokens=12, temperature=0.0)
        other = theirs.generate(  # its cache is wrong for a window of 1
            ids[:1, :7], attention_mask=torch.ones(1, 7, dtype=torch.long), max_new_tokens=12,
            do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=config.window > 1)
    assert ours.tolist() == other.tolist()


def test_the_random_configs_reach_every_corner():
    drawn = [draw(seed) for seed in range(18)]
    for found in ({c.top_k == c.n_experts > 1 for c in drawn}, {c.n_experts == 1 for c in drawn},
                  {c.top_k == 1 < c.n_experts for c in drawn}, {c.tie_embeddings for c in drawn},
                  {c.bias for c in drawn}, {c.layer_types is None for c in drawn},
                  {c.n_kv_heads == 1 for c in drawn}, {c.rope_scaling is None for c in drawn}):
        assert found == {True, False}


@pytest.mark.parametrize("k, n", [(1, 5), (5, 5), (2, 5), (1, 1)])
def test_the_router_alone(k, n):
    "The same numbers in: the same logits, weights and experts out, bit for bit."
    torch.manual_seed(0)
    theirs = transformers.models.gpt_oss.modeling_gpt_oss.GptOssTopKRouter(
        transformers.GptOssConfig(hidden_size=12, num_local_experts=n, num_experts_per_tok=k))
    ours = TopKLogitsConfig(n_experts=n, top_k=k).build(12)
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(40, 12)
    assert all(map(torch.equal, ours(x), theirs(x)))


def test_a_model_that_transformers_made_with_its_own_defaults(tmp_path):
    torch.manual_seed(0)
    theirs = transformers.GptOssForCausalLM(transformers.GptOssConfig(
        vocab_size=61, hidden_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_hidden_layers=3, intermediate_size=9, num_local_experts=4, num_experts_per_tok=2,
        initializer_range=0.3, **EAGER))
    rough(theirs).save_pretrained(tmp_path / "m", max_shard_size="20KB")
    ours = from_pretrained(tmp_path / "m")
    assert ours.config.rope_scaling["truncate"] is False and ours.config.window == 128
    assert_same(ours, theirs.eval(), tokens(2, 40))


def test_what_is_silent_in_config_json_is_what_transformers_assumes():
    bare = config_from_hf({"model_type": "gpt_oss"})
    full = config_from_hf(transformers.GptOssConfig().to_dict())
    assert bare == full == replace(get_config("gpt-oss-120b"))


def test_the_published_config_json_is_the_20b_preset():
    "The fields of openai/gpt-oss-20b, without its quantization."
    published = {
        "architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0,
        "eos_token_id": 200002, "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu",
        "hidden_size": 2880, "initial_context_length": 4096, "initializer_range": 0.02,
        "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "max_position_embeddings": 131072, "model_type": "gpt_oss", "num_attention_heads": 64,
        "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8,
        "num_local_experts": 32, "output_router_logits": False, "pad_token_id": 199999,
        "rms_norm_eps": 1e-05, "rope_scaling": {
            "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
            "original_max_position_embeddings": 4096, "rope_type": "yarn", "truncate": False},
        "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128,
        "swiglu_limit": 7.0, "tie_word_embeddings": False, "use_cache": True,
        "vocab_size": 201088}
    assert config_from_hf(published) == get_config("gpt-oss-20b", balance_loss=0.9)


PUBLISHED = {  # billions; OpenAI 2025, table 1: all, active, experts and router, attention
    "gpt-oss-20b": (20.91, 3.61, 19.12, 0.64),
    "gpt-oss-120b": (116.83, 5.13, 114.71, 0.96)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name):
    config = get_config(name)
    with torch.device("meta"):
        model = CausalLM(config)
    counts = {"mlp": 0, "self_attn": 0, "embed_tokens": 0}
    for path, p in model.named_parameters():
        for part in counts:
            counts[part] += p.numel() * (f".{part}." in path)
    total = sum(p.numel() for p in model.parameters())
    assert total == count_parameters(config)
    idle = sum(b.ffn.idle_parameters(config.d_model) for b in config.decoder().blocks)
    active = total - idle - counts["embed_tokens"]
    found = (total, active, counts["mlp"], counts["self_attn"])
    assert tuple(round(n / 1e9, 2) for n in found) == PUBLISHED[name]


def test_idle_parameters_are_the_experts_that_are_left_out():
    config = tiny(n_experts=7, top_k=3)
    with torch.device("meta"):
        experts = CausalLM(config).model.layers[0].mlp.experts
    one = sum(p[0].numel() for p in experts.parameters())
    assert config.block("full_attention").ffn.idle_parameters(24) == one * 4


def test_configs_survive_json_and_bad_ones_are_refused():
    for config in (tiny(), PRESETS["gpt-oss-test"], get_config("gpt-oss-120b")):
        assert config_from_dict(config_to_dict(config)) == config
        assert config_from_dict(config_to_dict(config.decoder())) == config.decoder()
    for changes, said in [
        (dict(layer_types=("full_attention",)), "for each of the 3 layers"),
        (dict(layer_types=("full_attention", "full", "full_attention")), "layer_types"),
        (dict(top_k=6), "lower top_k"), (dict(window=0), "window"),
        (dict(swiglu_limit=-1.0), "swiglu_limit"), (dict(n_kv_heads=3), "n_kv_heads=3"),
    ]:
        with pytest.raises(ValueError, match=said):
            tiny(**changes)


# --- cache, documents, padding ---


@pytest.mark.parametrize("chunks", [[1] * 40, [17] + [1] * 23, [9, 1, 20, 1, 9]])
@pytest.mark.parametrize("capacity", [None, 64])
def test_decoding_with_a_cache_is_decoding_without(chunks, capacity):
    model, ids = make(), tokens(2, 40)
    cache = KVCache(model.config, 2, capacity)
    with torch.no_grad():
        parts = [model(part, cache=cache) for part in ids.split(chunks, dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(ids), atol=2e-5, rtol=2e-5)


def test_the_cache_of_a_window_holds_the_window():
    model = make()
    cache = KVCache(model.config, 1)
    with torch.no_grad():
        model(tokens(1, 40), cache=cache)
    assert [layer.keys.shape[2] for layer in cache.layers[:3:2]] == [5, 5]


@pytest.mark.parametrize("backend", ["auto", "reference", "sdpa", "cpu_tiled"])
def test_packed_documents_are_separate_documents_forward_and_backward(backend):
    model, lengths = make(), [13, 1, 22, 4]
    model.set_attention_backend(backend)
    ids = tokens(1, sum(lengths))
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    weight = torch.randn(1, sum(lengths), 61, generator=torch.Generator().manual_seed(1))
    together = model(ids, document_ids=documents)
    (together * weight).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for part, w in zip(ids.split(lengths, 1), weight.split(lengths, 1)):
        (model(part) * w).sum().backward()
    with torch.no_grad():
        alone = torch.cat([model(part) for part in ids.split(lengths, 1)], 1)
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=2e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], atol=1e-4, rtol=1e-3)


def test_transformers_itself_leaks_between_packed_documents():
    "Why documents are compared with documents run alone, and not with theirs."
    model = make()
    theirs = transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**model.config.to_hf(), **EAGER)).eval()
    ids = tokens(1, 20)
    restarting = torch.cat([torch.arange(12), torch.arange(8)])[None]
    with torch.no_grad():
        packed = theirs(ids, position_ids=restarting, use_cache=False).logits[:, 12:]
        alone = theirs(ids[:, 12:], use_cache=False).logits
    assert (packed - alone).abs().max() > 1e-3


@pytest.mark.parametrize("backend", ["auto", "reference", "sdpa"])
def test_left_padding_changes_nothing_with_and_without_a_cache(backend):
    model, lengths = make(), [19, 7, 30]
    model.set_attention_backend(backend)
    rows = [tokens(1, n, seed=n) for n in lengths]
    width = max(lengths)
    ids = torch.cat([F.pad(row, (width - row.shape[1], 0)) for row in rows])
    mask = torch.stack([torch.arange(width) >= width - n for n in lengths]).long()
    more = tokens(3, 9, seed=5)
    cache = KVCache(model.config, 3)
    with torch.no_grad():
        found = [model(ids, document_ids=mask, cache=cache)]
        found += [model(token, cache=cache) for token in more.split(1, dim=1)]
        found = torch.cat(found, 1)
        for i, row in enumerate(rows):
            alone = model(torch.cat([row, more[i:i + 1]], 1))[0]
            torch.testing.assert_close(found[i, width - lengths[i]:], alone, atol=2e-5, rtol=2e-5)


def test_crop_and_reorder_of_the_cache():
    model, ids = make(window=50), tokens(2, 20)
    cache = KVCache(model.config, 2)
    with torch.no_grad():
        model(ids, cache=cache)
        cache.crop(11)
        cache.reorder(torch.tensor([1, 0, 1]))
        again = model(ids[[1, 0, 1], 11:], cache=cache)
        torch.testing.assert_close(again, model(ids)[[1, 0, 1], 11:], atol=2e-5, rtol=2e-5)


def test_generate_continues_a_padded_batch_as_each_text_alone():
    model = make()
    rows = [tokens(1, n, seed=n) for n in (5, 12)]
    ids = torch.cat([F.pad(row, (12 - row.shape[1], 0)) for row in rows])
    mask = torch.tensor([[0] * 7 + [1] * 5, [1] * 12])
    both = generate(model, ids, max_new_tokens=15, temperature=0.0, attention_mask=mask)
    for row, out in zip(rows, both):
        alone = generate(model, row, max_new_tokens=15, temperature=0.0)
        assert out[-15:].tolist() == alone[0, -15:].tolist()


# --- training ---


def test_extras_come_in_order_and_the_loss_is_transformers():
    model, ids = make(), tokens(2, 20)
    _, extras = model.model(ids, return_extras=True)
    assert [type(e) for e in extras] == [RouterOutput] * 3
    theirs = transformers.models.gpt_oss.modeling_gpt_oss.load_balancing_loss_func(
        tuple(e.logits for e in extras), 5, 2)
    ours = RouterLossConfig(balance=0.5)(extras, {}).loss
    torch.testing.assert_close(ours, 0.5 * theirs)
    assert model.decoder_config.auxiliary == RouterLossConfig(balance=0.001)


def test_a_step_can_be_planned_where_tensors_have_no_numbers():
    from torch._subclasses.fake_tensor import FakeTensorMode

    for mode in (torch.device("meta"), FakeTensorMode()):
        with mode:
            model, ids = CausalLM(tiny()), torch.zeros(2, 30, dtype=torch.long)
            logits, extras = model.model(ids, return_extras=True)
            loss = logits.sum() + model.decoder_config.auxiliary(extras, {}).loss
            loss.backward()
        assert all(p.grad.shape == p.shape for name, p in model.named_parameters()
                   if name != "lm_head.weight")


def test_recomputing_activations_gives_the_same_gradients():
    from torch.utils.checkpoint import checkpoint

    model, ids, found = make().train(), tokens(2, 20), []
    for again in (False, True):
        model.zero_grad()
        plain = [block.forward for block in model.model.layers]
        for block, forward in zip(model.model.layers, plain):
            if again:
                block.forward = lambda *a, f=forward: checkpoint(f, *a, use_reentrant=False)
        model(ids).square().mean().backward()
        for block in model.model.layers:
            block.__dict__.pop("forward", None)
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(map(torch.equal, *found))


def test_bfloat16_is_close_to_float32():
    model, ids = make(), tokens(2, 40)
    with torch.no_grad():
        exact, half = model(ids), make().bfloat16()(ids)
        sample = make().bfloat16()
        cache = KVCache(model.config, 2, dtype=torch.bfloat16)
        steps = torch.cat([sample(t, cache=cache) for t in ids.split(1, 1)], 1)
    for other in (half, steps):  # not max: a token near a tie may get another expert
        error = (other.float() - exact).square().mean().sqrt() / exact.std()
        assert error < 0.2


# --- MXFP4 ---


def test_decoding_is_transformers():
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (3, 10, 4, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(100, 140, (3, 10, 4), dtype=torch.uint8, generator=generator)
    for dtype in (torch.float32, torch.bfloat16):
        theirs = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=dtype)
        assert torch.equal(decode_mxfp4(blocks, scales, dtype).mT, theirs)  # (in, out)


def test_what_was_rounded_comes_back_unchanged():
    x = torch.randn(5, 7, 96, generator=torch.Generator().manual_seed(0)) * 3
    blocks, scales = encode_mxfp4(x)
    y = decode_mxfp4(blocks, scales, torch.float32)
    again = encode_mxfp4(y)
    assert torch.equal(decode_mxfp4(*again, torch.float32), y)
    error = (x - y).abs().unflatten(-1, (-1, 32))
    largest = x.abs().unflatten(-1, (-1, 32)).amax(-1, keepdim=True)
    assert (error <= largest / 4).all()  # half of the widest step, or what was cut off
    assert torch.equal(encode_mxfp4(torch.zeros(1, 32))[0], torch.zeros(1, 1, 16).byte())


@pytest.mark.parametrize("power", [-100, -3, 0, 60])
def test_a_power_of_two_moves_the_scale_alone(power):
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    (a, s), (b, t) = encode_mxfp4(x), encode_mxfp4(x * 2.0**power)
    assert torch.equal(a, b) and torch.equal(s.int() + power, t.int())
