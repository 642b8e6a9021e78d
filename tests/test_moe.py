"""Routers and experts: every dispatch path against one token and one expert at a time."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from skylar.layers import moe
from skylar.layers.moe import Experts, MoEConfig
from skylar.layers.router import TopKConfig

D, D_FF, E, K, N = 12, 10, 5, 2, 37


def experts_of(dtype=torch.float32, bias: bool = False, n: int = E) -> Experts:
    torch.manual_seed(0)
    layer = Experts(n, D, D_FF)
    layer.init_weights(0.3, 0.3)
    if bias:
        layer.gate_up_proj_bias = nn.Parameter(torch.randn(n, 2 * D_FF))
        layer.down_proj_bias = nn.Parameter(torch.randn(n, D))
    return layer.to(dtype)


def routing(kind: str, n: int = N, k: int = K) -> torch.Tensor:
    "(n, k) experts, those of a token distinct."
    if kind == "one expert":
        return torch.full((n, 1), 3)
    if kind == "one token":
        n = 1
    allowed = torch.tensor([0, 3, 4]) if kind == "empty experts" else torch.arange(E)
    picks = torch.rand(n, len(allowed), generator=torch.Generator().manual_seed(1))
    return allowed[picks.argsort(-1)[:, :k]]


KINDS = ["spread", "empty experts", "one expert", "one token"]


def one_at_a_time(layer: Experts, x, weights, experts):
    "The slow reference: each token, each of its experts."
    rows = []
    for token, ws, es in zip(x, weights, experts.tolist()):
        total = torch.zeros_like(token, dtype=weights.dtype)
        for w, e in zip(ws, es):
            h = layer.gate_up_proj[e] @ token
            h = h if layer.gate_up_proj_bias is None else h + layer.gate_up_proj_bias[e]
            gate, up = h.chunk(2)
            out = layer.down_proj[e] @ (F.silu(gate) * up)
            out = out if layer.down_proj_bias is None else out + layer.down_proj_bias[e]
            total = total + w * out
        rows.append(total)
    return torch.stack(rows).to(x.dtype)


def run(f, layer, kind, dtype=torch.float32):
    "Output, then gradients of x, of the weights of the sum and of all parameters."
    experts = routing(kind)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(len(experts), D, generator=generator).to(dtype).requires_grad_()
    wide = torch.promote_types(dtype, torch.float32)
    weights = torch.rand(experts.shape, generator=generator).to(wide).requires_grad_()
    layer.zero_grad()
    y = f(layer, x, weights, experts)
    (y * torch.randn(y.shape, generator=generator).to(y.dtype)).sum().backward()
    parameters = [torch.zeros_like(p) if p.grad is None else p.grad.clone()
                  for p in layer.parameters()]
    return [y.detach(), x.grad, weights.grad, *parameters]


def grouped(monkeypatch):
    "The path for GPUs, meta tensors and compiled code, here on the CPU."
    def linear(x, weight, counts, bias=None):
        y = F.grouped_mm(x.contiguous(), weight.to(x.dtype).transpose(1, 2),
                         offs=counts.cumsum(0).int())
        return y if bias is None else y + bias.to(x.dtype).repeat_interleave(
            counts, 0, output_size=len(x))
    monkeypatch.setattr(moe, "grouped_linear", linear)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_experts_equal_one_token_at_a_time(kind, bias, dtype):
    layer = experts_of(dtype, bias)
    for found, wanted in zip(run(lambda m, *a: m(*a), layer, kind, dtype),
                             run(one_at_a_time, layer, kind, dtype)):
        assert_close(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_in_bf16(kind):
    layer = experts_of(torch.bfloat16)
    found = run(lambda m, *a: m(*a), layer, kind, torch.bfloat16)
    wanted = run(one_at_a_time, experts_of(torch.bfloat16).double(), kind, torch.float64)
    for a, b in zip(found, wanted):
        assert a.dtype in (torch.bfloat16, torch.float32)
        assert (a.double() - b).norm() < 0.02 * b.norm() + 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_computes_in_bf16_and_gives_fp32_gradients(kind):
    layer = experts_of()

    def mixed(m, *args):
        with torch.autocast("cpu", torch.bfloat16):
            return m(*args)

    found, wanted = run(mixed, layer, kind), run(one_at_a_time, layer, kind)
    for a, b in zip(found, wanted):
        assert a.dtype == torch.float32
        assert 0 < (a - b).norm() < 0.02 * b.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_by_finite_differences(kind):
    layer, experts = experts_of(torch.float64, bias=True), routing(kind, n=4)
    x = torch.randn(len(experts), D, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(experts.shape, dtype=torch.float64, requires_grad=True)
    parameters = [*layer.parameters()]
    assert len(parameters) == 4
    assert torch.autograd.gradcheck(
        lambda *args: layer(args[0], args[1], experts), (x, weights, *parameters))


def test_no_tokens():
    layer = experts_of()
    x = torch.empty(0, D, requires_grad=True)
    y = layer(x, torch.empty(0, K), torch.empty(0, K, dtype=torch.long))
    y.sum().backward()
    assert y.shape == (0, D) and not layer.down_proj.grad.any()


# --- where no number may leave the device ---


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_meta_and_fake_tensors(bias, dtype):
    """The planner runs the layer so: shapes must not depend on numbers."""
    layer = MoEConfig(router=TopKConfig(n_experts=E, top_k=K), d_ff=16).build(16)
    if bias:
        layer.experts.gate_up_proj_bias = nn.Parameter(torch.randn(E, 32))
        layer.experts.down_proj_bias = nn.Parameter(torch.randn(E, 16))
    layer = layer.to(dtype)
    y, routed = layer.to("meta")(torch.empty(2, N, 16, device="meta", dtype=dtype))
    assert y.shape == (2, N, 16) and y.dtype == dtype and routed.weights.shape == (2 * N, K)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = MoEConfig(router=TopKConfig(n_experts=E, top_k=K), d_ff=16).build(16)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y, _ = fake(torch.empty(2, N, 16, requires_grad=True))
        y.sum().backward()
        assert fake.experts.down_proj.grad.shape == (E, 16, 16)
