"""Rotary positions against transformers, to the last bit: every scaling, random parameters.

The lesson shows single cases; here are many, the boundaries, and what must be refused.
"""

import random

import pytest
import torch
from einops import rearrange

from skylar.layers.norm import RMSNorm
from skylar.layers.rope import (
    LinearScaling,
    Llama3Scaling,
    NTKScaling,
    RoPEConfig,
    YaRNScaling,
    apply_rope,
    compute_inv_freq,
    from_interleaved,
    read_scaling,
    to_interleaved,
    write_scaling,
)

llama = pytest.importorskip("transformers.models.llama.modeling_llama")
FARTHEST = 131_071


def draw(kind: str, rng: random.Random) -> dict:
    """Random `rope_parameters` of a kind, as they stand in config.json."""
    parameters = {"rope_type": kind}
    if kind != "default":
        parameters["factor"] = rng.choice([1, 1.5, 4, 8.0, 32.0, 40])
    if kind in ("yarn", "llama3"):
        parameters["original_max_position_embeddings"] = rng.choice([64, 4096, 8192, 32768])
    if kind == "llama3":
        low = rng.choice([0.5, 1, 2.0])
        parameters |= {"low_freq_factor": low, "high_freq_factor": low + rng.choice([0.5, 3])}
    if kind == "yarn":
        optional = {
            "beta_fast": rng.choice([32, 16, 8.0]),
            "beta_slow": rng.choice([1, 0.5]),
            "attention_factor": rng.uniform(0.5, 2),
            "mscale": rng.choice([0.707, 1.0]),
            "mscale_all_dim": rng.choice([0, 0.707, 1.2]),
            "truncate": rng.choice([True, False]),
        }
        parameters |= {name: v for name, v in optional.items() if rng.random() < 0.5}
    return parameters


def theirs(parameters: dict, theta: float, d_head: int, max_len: int = 262_144):
    config = llama.LlamaConfig(
        hidden_size=2 * d_head,
        num_attention_heads=2,
        head_dim=d_head,
        max_position_embeddings=max_len,
        rope_parameters=parameters | {"rope_theta": theta},
    )
    return llama.LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("kind", ["default", "linear", "yarn", "llama3"])
def test_tables_equal_transformers(kind):
    rng = random.Random(kind)
    torch.manual_seed(0)
    for _ in range(40):
        parameters = draw(kind, rng)
        theta = rng.choice([10_000, 10_000.0, 500_000.0, 1e6, 123.4])
        d_head = rng.choice([2, 4, 6, 16, 48, 64, 80, 128, 256])
        reference = theirs(parameters, theta, d_head)
        ours = RoPEConfig(theta=theta, scaling=read_scaling(parameters)).build(d_head)
        case = (parameters, theta, d_head)
        assert torch.equal(ours.inv_freq, reference.inv_freq), case
        assert ours.attention_scaling == reference.attention_scaling, case
        positions = torch.randint(FARTHEST + 1, (2, 9))
        for dtype in (torch.float32, torch.bfloat16):
            expected = reference(torch.empty(0, dtype=dtype), positions)
            for table, other in zip(ours(positions, dtype), expected):
                assert table.dtype == dtype
                assert torch.equal(table[:, 0], other), case


@pytest.mark.parametrize("factor", [1.5, 4.0, 8])
@pytest.mark.parametrize("d_head", [4, 32, 96])
def test_ntk_equals_transformers_dynamic_at_a_fixed_length(factor, d_head):
    """Their dynamic kind with factor 1, asked for `factor` times the length, is static NTK."""
    reference = theirs({"rope_type": "dynamic", "factor": 1.0}, 10_000.0, d_head, max_len=64)
    inv_freq, attention_factor = llama.ROPE_INIT_FUNCTIONS["dynamic"](
        reference.config, seq_len=int(64 * factor)
    )
    scaling = NTKScaling(factor=factor)
    torch.testing.assert_close(
        scaling.inv_freq(10_000.0, d_head), inv_freq, rtol=1e-7, atol=0
    )
    assert scaling.attention_scaling == attention_factor


def test_ntk_is_a_plain_model_with_another_theta():
    """The family writes such a model for others with `effective_theta` and no scaling."""
    scaling = NTKScaling(factor=4.0)
    theta = scaling.effective_theta(10_000.0, 64)
    ours = RoPEConfig(scaling=scaling).build(64)
    assert torch.equal(ours.inv_freq, theirs({"rope_type": "default"}, theta, 64).inv_freq)


@pytest.mark.parametrize("kind", ["default", "linear", "ntk", "yarn", "llama3"])
def test_scaling_survives_the_disk(kind):
    rng = random.Random(kind)
    for _ in range(20):
        scaling = read_scaling(draw(kind, rng))
        written = write_scaling(scaling)
        assert read_scaling(written) == scaling
        assert written is None if kind == "default" else written["rope_type"] == kind
        assert None not in (written or {}).values()


def test_old_key_and_null_fields_are_read():
    assert read_scaling({"type": "linear", "factor": 2.0}) == LinearScaling(factor=2.0)
    both = {"rope_type": "linear", "type": "linear", "factor": 2.0, "attention_factor": None}
    assert read_scaling(both) == LinearScaling(factor=2.0)
    assert read_scaling(None) is read_scaling({}) is read_scaling({"rope_type": "default"}) is None


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
REFUSED = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "longrope": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]},
    "nonsense": {"rope_type": "nonsense"},
    "lacks the field 'factor'": {"rope_type": "linear"},
    "lacks the field 'original": {"rope_type": "llama3", "factor": 8.0},
    "no field 'rope_theta'": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    "no field 'factor'": {"factor": 2.0},  # of no kind
    "factor=0.5": {"rope_type": "linear", "factor": 0.5},
    "factor='2'": {"rope_type": "linear", "factor": "2"},
    "factor=True": {"rope_type": "linear", "factor": True},
    "factor=nan": {"rope_type": "linear", "factor": float("nan")},
    "factor=inf": {"rope_type": "ntk", "factor": float("inf")},
    "beta_fast=1": YARN | {"beta_fast": 1, "beta_slow": 2},
    "attention_factor=0": YARN | {"attention_factor": 0},
    "embeddings=0": YARN | {"original_max_position_embeddings": 0},
    "high_freq_factor=1": {
        "rope_type": "llama3",
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "low_freq_factor": 1,
        "high_freq_factor": 1,
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused_in_one_line(message):
    with pytest.raises(ValueError) as error:
        read_scaling(REFUSED[message])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("d_head", [1, 33, 0, -2])
def test_head_without_pairs_is_refused(d_head):
    with pytest.raises(ValueError, match=f"d_head={d_head}"):
        RoPEConfig().build(d_head)


@pytest.mark.parametrize("theta", [0, 1, -5.0, float("nan"), "10000"])
def test_theta_without_meaning_is_refused(theta):
    with pytest.raises(ValueError, match="theta="):
        RoPEConfig(theta=theta)


def test_other_refusals():
    with pytest.raises(ValueError, match="read_scaling"):
        RoPEConfig(scaling={"rope_type": "linear", "factor": 2.0})
    with pytest.raises(ValueError, match="d_head=2"):
        RoPEConfig(scaling=NTKScaling(factor=2.0)).build(2)
    with pytest.raises(ValueError, match="n_heads=3"):
        to_interleaved(torch.zeros(8, 4), 3)
    with pytest.raises(ValueError, match="even width"):
        from_interleaved(torch.zeros(6, 4), 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 3, 17, 64), (3, 5, 2, 96)])
def test_rotation_and_gradients_equal_transformers(dtype, shape):
    torch.manual_seed(0)
    positions = torch.randint(FARTHEST + 1, (shape[0], shape[2]))
    q, g = torch.randn(2, *shape).to(dtype)
    q.requires_grad_()
    cos, sin = theirs({"rope_type": "default"}, 10_000.0, shape[-1])(q, positions)
    expected, _ = llama.apply_rotary_pos_emb(q, q.detach(), cos, sin)
    rotary = RoPEConfig().build(shape[-1])
    for tables in (rotary(positions), rotary(positions, dtype)):
        found = apply_rope(q, *tables)
        assert found.dtype == dtype
        assert torch.equal(found, expected)
        gradients = (torch.autograd.grad(y, q, g, retain_graph=True)[0] for y in (found, expected))
        assert torch.equal(*gradients)


def test_half_precision_stays_near_float32():
    torch.manual_seed(0)
    x, positions = torch.randn(1, 2, 200, 64), torch.arange(FARTHEST - 199, FARTHEST + 1)
    tables = RoPEConfig().build(64)(positions)
    exact = apply_rope(x, *tables)
    error = (apply_rope(x.bfloat16(), *tables).float() - exact).abs()
    assert error.max() < 2**-5 and error.square().mean().sqrt() < 2**-8  # as near as at position 0


def neighbors(x, cos, sin):
    """The other convention, with Python's own complex product: (2i, 2i+1) is a pair."""
    half = x.shape[-1] // 2
    z = torch.view_as_complex(rearrange(x, "... (i pair) -> ... i pair", pair=2).contiguous())
    return torch.view_as_real(z * torch.complex(cos, sin)[..., :half]).flatten(-2)


@pytest.mark.parametrize(
    "n_heads,n_kv_heads,d_head", [(4, 4, 8), (6, 2, 16), (5, 1, 2), (1, 1, 64)]
)
def test_conventions_give_equal_scores(n_heads, n_kv_heads, d_head):
    """With biases and QK-norm, whose rows move along."""
    torch.manual_seed(0)
    x, tables = torch.randn(2, 30, 24), RoPEConfig().build(d_head)(torch.arange(30))
    weights = {}
    for name, heads in (("q", n_heads), ("k", n_kv_heads)):
        norm = RMSNorm(d_head, eps=1e-6)
        torch.nn.init.normal_(norm.weight)
        weights[name] = (torch.randn(heads * d_head, 24), torch.randn(heads * d_head), norm, heads)

    def scores(rotate, reorder):
        rotated = []
        for weight, bias, norm, heads in weights.values():
            out = x @ reorder(weight, heads).T + reorder(bias, heads)
            out = rearrange(out, "b t (h d) -> b h t d", h=heads)
            out = out * out.square().mean(-1, keepdim=True).add(norm.eps).rsqrt()
            rotated.append(rotate(out * reorder(norm.weight.detach(), 1), *tables))
        q, k = rotated
        return q @ k.repeat_interleave(n_heads // n_kv_heads, dim=1).mT

    ours = scores(apply_rope, lambda w, heads: w)
    theirs = scores(neighbors, to_interleaved)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    if d_head > 2:  # a single pair has only one order
        unordered = scores(neighbors, lambda w, heads: w)
        assert not torch.allclose(unordered, ours, atol=0.5)


def test_reordering_is_undone():
    weight = torch.randn(3 * 10, 7)
    assert torch.equal(from_interleaved(to_interleaved(weight, 3), 3), weight)
    assert torch.equal(to_interleaved(from_interleaved(weight, 3), 3), weight)


def test_reordering_equals_the_permutation_of_llama_conversion():
    """transformers' convert_llama_weights_to_hf.py: from Meta's rows to Hugging Face's."""

    def permute(w, n_heads, dim1, dim2):
        w = w.view(n_heads, dim1 // n_heads // 2, 2, dim2)
        return w.transpose(1, 2).reshape(dim1, dim2)

    meta = torch.randn(4 * 16, 24)
    assert torch.equal(from_interleaved(meta, 4), permute(meta, 4, 64, 24))


@pytest.mark.parametrize(
    "scaling", [None, YaRNScaling(factor=4, original_max_position_embeddings=64)]
)
def test_only_distance_counts(scaling):
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 2, 20, 32, dtype=torch.double)
    rotary = RoPEConfig(scaling=scaling).build(32)

    def scores(start):
        tables = rotary(torch.arange(start, start + 20))
        return apply_rope(q, *tables) @ apply_rope(k, *tables).mT

    for start in (1, 1000, FARTHEST - 19):  # float32 angles: off by at most 0.01 radians
        torch.testing.assert_close(scores(start), scores(0), rtol=0, atol=0.2)
    torch.testing.assert_close(scores(64), scores(0), rtol=0, atol=1e-3)


def test_attention_scaling_multiplies_queries_and_keys():
    scaling = YaRNScaling(factor=1, original_max_position_embeddings=64, attention_factor=1.5)
    x = torch.randn(1, 1, 10, 16)
    plain, scaled = (RoPEConfig(scaling=s).build(16)(torch.arange(10)) for s in (None, scaling))
    torch.testing.assert_close(apply_rope(x, *scaled), 1.5 * apply_rope(x, *plain))


def test_far_positions_in_float32():
    exact = (
        torch.tensor([float(FARTHEST)]).double() * 10_000 ** -(torch.arange(0, 64, 2) / 64).double()
    )
    cos, _ = RoPEConfig().build(64)(torch.tensor([FARTHEST]))
    assert (cos[0, 0, 0, :32].double() - exact.cos()).abs().max() < 0.02
    halves = cos.chunk(2, dim=-1)
    assert torch.equal(*halves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_frequencies_survive_half_precision(dtype):
    rotary = RoPEConfig(theta=500_000.0).build(64)
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), rotary).to(dtype)
    assert module[0].weight.dtype == dtype
    assert torch.equal(rotary.inv_freq, compute_inv_freq(500_000.0, 64))
    assert rotary(torch.arange(3))[0].dtype == torch.float32


def test_built_on_meta_and_filled_later():
    config = RoPEConfig(scaling=Llama3Scaling(factor=8, original_max_position_embeddings=64))
    with torch.device("meta"):
        rotary = config.build(32)
    assert rotary.inv_freq.is_meta
    rotary.to_empty(device="cpu").reset_parameters()
    assert torch.equal(rotary.inv_freq, config.build(32).inv_freq)
    assert not rotary.state_dict()


def test_autocast_leaves_angles_alone():
    rotary, positions = RoPEConfig().build(64), torch.arange(FARTHEST - 9, FARTHEST + 1)
    with torch.autocast("cpu", torch.bfloat16):
        inside = rotary(positions)
    assert all(torch.equal(a, b) for a, b in zip(inside, rotary(positions)))


def test_batch_of_positions_equals_each_alone():
    rotary, positions = RoPEConfig().build(16), torch.randint(1000, (3, 7))
    cos, sin = rotary(positions)
    assert cos.shape == sin.shape == (3, 1, 7, 16)
    for row, expected in zip(positions, cos):
        assert torch.equal(rotary(row)[0][0], expected)
    assert rotary(positions[0])[0].shape == (1, 1, 7, 16)


def test_compiles_into_one_graph():
    rotary = RoPEConfig().build(16)

    def rotate(x, positions):
        return apply_rope(x, *rotary(positions, x.dtype))

    compiled = torch.compile(rotate, fullgraph=True, backend="aot_eager")
    x, g, positions = *torch.randn(2, 2, 2, 9, 16), torch.arange(9)
    x.requires_grad_()
    for f in (rotate, compiled):
        assert torch.equal(f(x, positions), rotate(x, positions))
        (found,) = torch.autograd.grad(f(x, positions), x, g)
        assert torch.equal(found, torch.autograd.grad(rotate(x, positions), x, g)[0])


@pytest.mark.parametrize("positions", [torch.arange(9), torch.arange(9).expand(2, 9)])
def test_no_axis_is_added_to_x(positions):
    """(B, T, D), heads not yet split, would silently become (1, B, T, D) or (B, B, T, D)."""
    tables = RoPEConfig().build(16)(positions)
    for shape in ((2, 9, 16), (9, 16)):
        with pytest.raises(ValueError, match="split the heads first") as error:
            apply_rope(torch.randn(shape), *tables)
        assert "\n" not in str(error.value) and str(shape) in str(error.value)
    assert apply_rope(torch.randn(2, 3, 9, 16), *tables).shape == (2, 3, 9, 16)
    cos, sin = (table[0, 0] for table in tables)  # (T, Dh): serves any leading axes
    assert apply_rope(torch.randn(3, 9, 16), cos, sin).shape == (3, 9, 16)
