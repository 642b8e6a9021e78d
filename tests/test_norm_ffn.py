"""RMSNorm and the feed-forward layers where a lesson does not go: dtypes, extremes, devices."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, NemotronConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.nemotron.modeling_nemotron import NemotronMLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

from skylar.layers.mlp import MLPConfig, ReLU2Config, SwiGLUConfig
from skylar.layers.norm import RMSNorm, RMSNormConfig

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
WIDTHS = [1, 2, 7, 33, 128, 577]


def norm_pair(theirs, d, x_type=F32, w_type=F32, scale=3.0):
    """Our norm and theirs with one random gain, and vectors for them."""
    torch.manual_seed(d)
    ours, theirs = RMSNormConfig().build(d).to(w_type), theirs(d, eps=1e-6).to(w_type)
    with torch.no_grad():
        ours.weight.normal_(1.0, 0.5)
        theirs.weight.copy_(ours.weight)
    return ours, theirs, (scale * torch.randn(3, 5, d)).to(x_type)


def gradients(module, x, direction):
    x = x.detach().requires_grad_()
    return torch.autograd.grad((module(x) * direction).sum(), (x, *module.parameters()))


# --- RMSNorm ---


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("w_type", [F32, BF16, F16])
@pytest.mark.parametrize("x_type", [F32, BF16, F16])
@pytest.mark.parametrize("theirs", [LlamaRMSNorm, Qwen3RMSNorm])
def test_norm_has_the_bits_of_hugging_face(theirs, x_type, w_type, d):
    ours, theirs, x = norm_pair(theirs, d, x_type, w_type)
    expected = theirs(x).to(x_type)
    assert torch.equal(ours(x), expected), "with gradients"
    with torch.no_grad():
        assert torch.equal(ours(x), expected), "without"
    with torch.inference_mode():
        assert torch.equal(ours(x), expected), "in inference mode"


@pytest.mark.parametrize("x_type", [F32, BF16])
def test_norm_under_autocast_is_the_norm_without(x_type):
    ours, theirs, x = norm_pair(Qwen3RMSNorm, 64, x_type)
    with torch.autocast("cpu", BF16):
        y, expected = ours(x), theirs(x)
    assert y.dtype == x_type
    assert torch.equal(y, expected.to(x_type)) and torch.equal(y, ours(x))


def test_norm_backward_inside_autocast_stays_float32():
    ours, _, x = norm_pair(Qwen3RMSNorm, 64)
    direction = torch.randn_like(x)
    with torch.autocast("cpu", BF16):
        inside = gradients(ours, x, direction)
    assert all(torch.equal(a, b) for a, b in zip(inside, gradients(ours, x, direction)))


@pytest.mark.parametrize("d", WIDTHS)
def test_norm_gradients_are_those_of_the_references(d):
    ours, theirs, x = norm_pair(Qwen3RMSNorm, d)
    direction = torch.randn_like(x)
    found, expected = gradients(ours, x, direction), gradients(theirs, x, direction)
    leaf, gain = x.clone().requires_grad_(), ours.weight
    core = (F.rms_norm(leaf, (d,), gain, 1e-6) * direction).sum()
    for a, b, c in zip(found, expected, torch.autograd.grad(core, (leaf, gain))):
        # with one number per vector the gradient of x is a difference of equals: 0 but for eps
        torch.testing.assert_close(a, b, atol=1e-5, rtol=2e-5)
        torch.testing.assert_close(a, c, atol=1e-5, rtol=2e-5)


def test_norm_gradients_by_finite_differences():
    norm = RMSNormConfig(eps=1e-2).build(5).double()  # an eps that counts
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 3, 5, dtype=torch.double, requires_grad=True)

    def f(x, weight):
        return torch.func.functional_call(norm, {"weight": weight}, x)

    assert torch.autograd.gradcheck(f, (x, norm.weight))


@pytest.mark.parametrize("w_type", [F32, BF16])
def test_norm_gradients_in_bfloat16_are_at_least_as_exact(w_type):
    ours, theirs, x = norm_pair(Qwen3RMSNorm, 128, BF16, w_type)
    direction = torch.randn_like(x)
    exact = RMSNorm(128).double()
    exact.load_state_dict(ours.state_dict())
    truth = gradients(exact, x.double(), direction.double())

    def off(module):
        return [
            ((g.double() - t).norm() / t.norm()).item()
            for g, t in zip(gradients(module, x, direction), truth)
        ]

    assert all(a <= 1.05 * b for a, b in zip(off(ours), off(theirs)))


@pytest.mark.parametrize("x_type", [F32, BF16])
@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-12, 1e12, 1e18, 1e25])
def test_norm_of_extreme_vectors_is_finite_and_the_references(value, x_type):
    ours, theirs, _ = norm_pair(Qwen3RMSNorm, 7)
    x = (value * torch.tensor([1.0, -1, 1, 1, 1, -1, 1])).to(x_type).expand(2, 7)
    assert torch.equal(ours(x), theirs(x).to(x_type))
    grad_x, grad_gain = gradients(ours, x, torch.ones(2, 7))
    assert grad_x.isfinite().all() and grad_gain.isfinite().all()
    if value == 0:
        assert not ours(x).any()
        torch.testing.assert_close(grad_x, (1e3 * ours.weight).expand(2, 7).to(x_type))


def test_norm_reads_float16_beyond_its_square_root():
    x = torch.full((1, 4), 6e4, dtype=F16)
    assert torch.equal(RMSNorm(4)(x), torch.ones(1, 4, dtype=F16))


@pytest.mark.parametrize("shape", [(7,), (0, 7), (3, 7), (2, 3, 4, 7)])
def test_norm_takes_any_leading_shape(shape):
    norm, x = RMSNorm(7), torch.randn(shape, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad.shape == shape and norm.weight.grad.shape == (7,)


def test_norm_takes_a_transposed_view():
    norm, x = RMSNorm(8), torch.randn(2, 5, 3, 8).transpose(1, 2)  # as heads are
    assert torch.equal(norm(x), norm(x.contiguous()))
    direction = torch.randn(2, 3, 5, 8)
    views, copies = (gradients(norm, v, direction) for v in (x, x.contiguous()))
    assert all(torch.allclose(a, b) for a, b in zip(views, copies))


def test_norm_changes_neither_input_nor_upstream_gradient():
    norm = RMSNorm(6)
    x, upstream = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6)
    before = x.detach().clone(), upstream.clone()
    norm(x).backward(upstream)
    with torch.no_grad():
        norm(x)
    assert torch.equal(x, before[0]) and torch.equal(upstream, before[1])
    assert torch.equal(norm.weight, torch.ones(6))


def test_norm_with_a_frozen_gain_or_input():
    norm, x = RMSNorm(6), torch.randn(4, 6, requires_grad=True)
    norm.weight.requires_grad_(False)
    norm(x).sum().backward()
    assert x.grad is not None and norm.weight.grad is None
    norm.weight.requires_grad_(True)
    norm(x.detach()).sum().backward()
    assert norm.weight.grad is not None


def test_norm_on_meta_and_as_one_graph():
    norm = RMSNorm(6)
    with torch.device("meta"):
        there = RMSNorm(6)(torch.randn(2, 6))
    assert there.shape == (2, 6) and there.device.type == "meta"
    one_graph = torch.compile(norm, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 6)
    found, expected = (gradients(f, x, torch.ones(4, 6)) for f in (one_graph, norm))
    assert all(torch.allclose(a, b) for a, b in zip(found, expected))
    with torch.no_grad():
        assert torch.allclose(one_graph(x), norm(x))


def test_norm_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        norm = RMSNorm(8)
        with torch.autocast("cpu", BF16):
            norm(torch.randn(2, 8).bfloat16()).sum().backward()
            with torch.no_grad():
                norm(torch.randn(2, 8).bfloat16())


@pytest.mark.parametrize("shape", [(2, 5), (2, 1), (4,), ()])
def test_norm_refuses_another_width(shape):
    with pytest.raises(ValueError, match="built for"):
        RMSNorm(1 if shape == (2, 5) else 3)(torch.randn(shape))


@pytest.mark.parametrize("eps", [0.0, -1e-6, float("nan"), float("inf")])
def test_norm_refuses_eps(eps):
    with pytest.raises(ValueError, match="eps="):
        RMSNormConfig(eps=eps)


# --- feed-forward layers ---

KINDS = [SwiGLUConfig, ReLU2Config]


def randomise(module):
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return module


def reference(kind, d, d_ff, bias):
    if kind == "llama":
        config = LlamaConfig(
            hidden_size=d, intermediate_size=d_ff, num_attention_heads=1, head_dim=2, mlp_bias=bias
        )
        return LlamaMLP(config), SwiGLUConfig
    if kind == "qwen3":
        return Qwen3MLP(Qwen3Config(hidden_size=d, intermediate_size=d_ff)), SwiGLUConfig
    config = NemotronConfig(hidden_size=d, intermediate_size=d_ff, mlp_bias=bias)
    return NemotronMLP(config), ReLU2Config


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("d, d_ff", [(1, 1), (7, 13), (32, 96)])
@pytest.mark.parametrize(
    "kind, bias", [("llama", False), ("llama", True), ("qwen3", False), ("nemotron", True)]
)
def test_ffn_has_the_numbers_of_hugging_face(kind, bias, d, d_ff, dtype, autocast):
    torch.manual_seed(0)
    theirs, config = reference(kind, d, d_ff, bias)
    theirs = randomise(theirs).to(dtype)
    ours = config(d_ff=d_ff, bias=bias).build(d).to(dtype)
    ours.load_state_dict(theirs.state_dict())  # the same names: strict
    x, direction = torch.randn(2, 5, d).to(dtype), torch.randn(2, 5, d)
    with torch.autocast("cpu", BF16, enabled=autocast):
        assert torch.equal(ours(x), theirs(x))
        pairs = zip(gradients(ours, x, direction), gradients(theirs, x, direction))
    for a, b in pairs:
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_ffn_gradients_by_finite_differences(kind):
    torch.manual_seed(0)
    layer = randomise(kind(d_ff=6, bias=True).build(4)).double()
    x = torch.randn(3, 4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)


@pytest.mark.parametrize("d, d_ff", [(1, 1), (72, 288), (5, 11)])
def test_ffn_parameter_counts(d, d_ff):
    def count(config):
        return sum(p.numel() for p in config.build(d).parameters())

    assert count(SwiGLUConfig(d_ff=d_ff)) == 3 * d * d_ff
    assert count(ReLU2Config(d_ff=d_ff)) == 2 * d * d_ff
    assert count(SwiGLUConfig(d_ff=d_ff, bias=True)) == 3 * d * d_ff + 2 * d_ff + d
    assert count(ReLU2Config(d_ff=d_ff, bias=True)) == 2 * d * d_ff + d_ff + d
    if d_ff % 3 == 0:
        plain = MLPConfig(d_ff=d_ff, bias=False)
        assert count(SwiGLUConfig(d_ff=2 * d_ff // 3)) == count(plain)


@pytest.mark.parametrize("kind", KINDS)
def test_ffn_of_zeros_is_zero_and_of_huge_vectors_finite(kind):
    torch.manual_seed(0)
    layer = kind(d_ff=9).build(4)
    assert not layer(torch.zeros(2, 4)).any()
    assert layer(torch.full((2, 4), 1e15)).isfinite().all()
    assert layer.bfloat16()(torch.full((2, 4), 1e15, dtype=BF16)).isfinite().all()


def test_relu2_skips_nothing_but_zeros():
    torch.manual_seed(0)
    layer, x = ReLU2Config(d_ff=50).build(8), torch.randn(8)
    h = F.relu(layer.up_proj(x)).square()
    awake = h.nonzero()[:, 0]
    assert 0 < len(awake) < 50
    torch.testing.assert_close(layer.down_proj.weight[:, awake] @ h[awake], layer(x))


@pytest.mark.parametrize("kind", KINDS)
def test_ffn_dropout_only_while_training(kind):
    torch.manual_seed(0)
    layer, x = kind(d_ff=64, dropout=0.5).build(8), torch.randn(4, 8)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(d_ff=0), "d_ff=0"),
        (dict(d_ff=-8), "d_ff=-8"),
        (dict(d_ff=8, dropout=1.0), "dropout=1.0"),
        (dict(d_ff=8, dropout=-0.1), "dropout=-0.1"),
    ],
)
def test_ffn_refuses_by_name(kind, wrong, message):
    with pytest.raises(ValueError, match=message):
        kind(**wrong)


def test_ffn_configs_compare_by_value():
    assert SwiGLUConfig(d_ff=8) == SwiGLUConfig(d_ff=8) != SwiGLUConfig(d_ff=9)
    assert SwiGLUConfig(d_ff=8) != ReLU2Config(d_ff=8)
    assert len({SwiGLUConfig(d_ff=8), SwiGLUConfig(d_ff=8), ReLU2Config(d_ff=8)}) == 2
