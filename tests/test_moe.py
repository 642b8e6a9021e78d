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

D, D_FF, E, K, N = 12, 8, 5, 2, 37


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


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_grouped_mm_gives_the_same(kind, bias, monkeypatch):
    "The path for GPUs, here on the CPU."
    layer = experts_of(bias=bias)
    wanted, calls, plain = run(lambda m, *a: m(*a), layer, kind), [], F.grouped_mm
    monkeypatch.setattr(moe, "prefers_grouped_mm", lambda *a: True)
    monkeypatch.setattr(F, "grouped_mm", lambda *a, **k: calls.append(1) or plain(*a, **k))
    for a, b in zip(run(lambda m, *a: m(*a), layer, kind), wanted):
        assert_close(a, b)
    assert len(calls) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_filled_up_rows_change_nothing(kind, monkeypatch):
    layer = experts_of()
    wanted = run(lambda m, *a: m(*a), layer, kind)
    plain = moe.sort_by_expert
    for multiple in (4, 32):
        with monkeypatch.context() as patch:
            patch.setattr(moe, "sort_by_expert", lambda *a: moe.align(plain(*a), multiple))  # noqa: B023
            found = run(lambda m, *a: m(*a), layer, kind)
        for a, b in zip(found, wanted):
            assert_close(a, b)


def test_few_shapes():
    "What `align` is for: counts that change give few sizes, and little is added."
    generator = torch.Generator().manual_seed(0)
    sizes, rows = set(), 0
    for _ in range(200):
        experts = torch.rand(2048, 8, generator=generator).argsort(-1)[:, :2]
        counts = moe.align(moe.sort_by_expert(experts, 8)).counts
        sizes |= set(counts)
        rows += sum(counts)
    assert len(sizes) < 12 and rows < 1.05 * 200 * 4096
    assert all(n % 32 == 0 for n in sizes)


# --- capacity ---


def dropped(experts: torch.Tensor, capacity: int) -> torch.Tensor:
    "(N, k) True where an expert had its rows already; tokens in order, then their choices."
    seen, found = {}, []
    for token in experts.tolist():
        found.append([])
        for e in token:
            found[-1].append(seen.get(e, 0) >= capacity)
            seen[e] = seen.get(e, 0) + 1
    return torch.tensor(found)


@pytest.mark.parametrize("capacity", [1, 3, 100])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
def test_over_capacity_a_choice_counts_for_nothing(kind, capacity, bias):
    def reference(m, x, weights, experts):
        return one_at_a_time(m, x, weights * ~dropped(experts, capacity), experts)

    layer = experts_of(bias=bias)
    found = run(lambda m, *a: m(*a, capacity=capacity), layer, kind)
    for a, b in zip(found, run(reference, layer, kind)):
        assert_close(a, b)


def test_capacity_is_for_training_only():
    config = MoEConfig(router=TopKConfig(n_experts=E, top_k=K), d_ff=D_FF, capacity_factor=0.5)
    layer, x = config.build(D), torch.randn(2, N, D)
    layer.init_weights(0.3, 0.3)
    assert layer.capacity(100) == 20 and layer.eval().capacity(100) is None
    whole = layer(x)[0]
    assert_close(whole[:, :5], layer(x[:, :5])[0])  # whatever else is in the batch
    assert not torch.allclose(layer.train()(x)[0], whole)
    with pytest.raises(ValueError, match="capacity_factor"):
        MoEConfig(router=TopKConfig(n_experts=E, top_k=K), d_ff=D_FF, capacity_factor=0)


def test_no_tokens():
    layer = experts_of()
    x = torch.empty(0, D, requires_grad=True)
    y = layer(x, torch.empty(0, K), torch.empty(0, K, dtype=torch.long))
    y.sum().backward()
    assert y.shape == (0, D) and not layer.down_proj.grad.any()


# --- where no number may leave the device ---


@pytest.mark.parametrize("factor", [None, 1.5])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_meta_and_fake_tensors(bias, dtype, factor):
    """The planner runs the layer so: shapes must not depend on numbers."""
    config = MoEConfig(
        router=TopKConfig(n_experts=E, top_k=K), d_ff=16, capacity_factor=factor)
    layer = config.build(16)
    if bias:
        layer.experts.gate_up_proj_bias = nn.Parameter(torch.randn(E, 32))
        layer.experts.down_proj_bias = nn.Parameter(torch.randn(E, 16))
    layer = layer.to(dtype)
    y, routed = layer.to("meta")(torch.empty(2, N, 16, device="meta", dtype=dtype))
    assert y.shape == (2, N, 16) and y.dtype == dtype and routed.weights.shape == (2 * N, K)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = config.build(16)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y, _ = fake(torch.empty(2, N, 16, requires_grad=True))
        y.sum().backward()
        assert fake.experts.down_proj.grad.shape == (E, 16, 16)
