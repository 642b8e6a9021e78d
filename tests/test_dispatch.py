"""Every way from tokens to experts and back gives one result, forward and backward: for all kinds
of experts, whatever the routing, in float32, bfloat16 and under autocast."""

import pytest
import torch
import torch.nn.functional as F
from test_moe import KINDS, dropped, routing
from torch import nn

from skylar.layers import moe
from skylar.layers.deepseek_moe import DeepSeekMoEConfig, GroupedSigmoidConfig
from skylar.layers.moe import ClampedExperts, ClampedMoEConfig, Experts, MoEConfig
from skylar.layers.router import RouterOutput, TopKConfig, TopKLogitsConfig

D, D_FF, E = 16, 8, 5  # rows of a multiple of 16 bytes, in bfloat16 too: F.grouped_mm wants them
PATHS = ["loop", "filled up", "grouped_mm", "capacity", "overflow"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "autocast": torch.float32}


def experts_of(kind: str, limit: float) -> Experts:
    torch.manual_seed(0)
    layer = ClampedExperts(E, D, D_FF, 1.3, limit) if kind == "clamped" else Experts(E, D, D_FF)
    if kind == "biases":
        layer.gate_up_proj_bias = nn.Parameter(torch.empty(E, 2 * D_FF))
        layer.down_proj_bias = nn.Parameter(torch.empty(E, D))
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(std=0.4)
    return layer


def one_expert(layer: Experts, e: int, x):  # (D,) -> (D,)
    "Written down here once more, one token at a time."
    h = layer.gate_up_proj[e] @ x
    if layer.gate_up_proj_bias is not None:
        h = h + layer.gate_up_proj_bias[e]
    if isinstance(layer, ClampedExperts):
        gate, up = h[0::2].clamp(max=layer.limit), h[1::2].clamp(-layer.limit, layer.limit)
        h = (up + 1) * gate / (1 + (-layer.alpha * gate).exp())
    else:
        gate, up = h.chunk(2)
        h = F.silu(gate) * up
    y = layer.down_proj[e] @ h
    return y if layer.down_proj_bias is None else y + layer.down_proj_bias[e]


def reference(layer, x, weights, experts):
    return torch.stack([
        sum(w * one_expert(layer, e, token) for w, e in zip(ws, es.tolist()))
        for token, ws, es in zip(x, weights, experts)])


def results(layer, f, kind: str, dtype: torch.dtype):
    "Output; gradients of tokens, of weights, of parameters; those of idle experts are zeros."
    experts, generator = routing(kind), torch.Generator().manual_seed(2)
    x = torch.randn(len(experts), D, generator=generator).to(dtype).requires_grad_()
    wide = torch.promote_types(dtype, torch.float32)
    weights = torch.rand(experts.shape, generator=generator).to(wide).requires_grad_()
    y = f(layer, x, weights, experts)
    leaves = [x, weights, *layer.parameters()]
    upstream = torch.randn(y.shape, generator=generator).to(y.dtype)
    grads = torch.autograd.grad(y, leaves, upstream, allow_unused=True)
    return [y.detach(), *(torch.zeros_like(p) if g is None else g for p, g in zip(leaves, grads))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("experts", ["plain", "biases", "clamped"])
def test_every_path_is_the_reference(experts, kind, path, dtype, monkeypatch):
    capacity = {"capacity": 100, "overflow": 4}.get(path)
    plain = moe.sort_by_expert
    if path == "filled up" and dtype == "float32":  # in half precision this is what a CPU does
        monkeypatch.setattr(moe, "sort_by_expert", lambda *a: moe.align(plain(*a), 4))
    if path in ("loop", "grouped_mm"):
        monkeypatch.setattr(moe, "align", lambda to: to)
    if path == "grouped_mm":
        monkeypatch.setattr(moe, "prefers_grouped_mm", lambda *a: True)

    def run(layer, *args):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
            return layer(*args, capacity=capacity)

    def expected(layer, x, weights, chosen):
        keep = ~dropped(chosen, capacity) if path == "overflow" else 1
        return reference(layer, x, weights * keep, chosen)

    # rounded, a number near the limit may have another gradient: there, none is clamped
    limit = 0.8 if dtype == "float32" else 100.0
    layer, exact = experts_of(experts, limit).to(DTYPES[dtype]), experts_of(experts, limit)
    if dtype == "bfloat16":  # the same rounded numbers
        exact.load_state_dict(layer.state_dict())
    exact = exact.double()
    found = results(layer, run, kind, DTYPES[dtype])
    wanted = results(exact, expected, kind, torch.float64)
    bound = 1e-5 if dtype == "float32" else 0.03
    for a, b in zip(found, wanted, strict=True):
        assert a.isfinite().all()
        assert (a.double() - b).norm() <= bound * b.norm() + 1e-6
    idle = sorted(set(range(E)) - set(routing(kind).flatten().tolist()))
    for grad in found[3:]:
        assert not grad[idle].any()


# --- whole layers, whose router is made to choose ---


def force(layer, experts) -> None:
    "The router says what its scores are, and these experts."
    def hook(module, inputs, output):
        scores = output.logits.gather(-1, experts).sigmoid()
        return RouterOutput(output.logits, scores, experts)
    layer.gate.register_forward_hook(hook)


LAYERS = {
    "moe": MoEConfig(router=TopKConfig(n_experts=E, top_k=2), d_ff=D_FF),
    "clamped": ClampedMoEConfig(router=TopKLogitsConfig(n_experts=E, top_k=2), d_ff=D_FF),
    "deepseek": DeepSeekMoEConfig(router=GroupedSigmoidConfig(n_experts=E, top_k=2), d_ff=D_FF),
    "no shared expert": DeepSeekMoEConfig(
        router=GroupedSigmoidConfig(n_experts=E, top_k=2), d_ff=D_FF, n_shared=0)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_under_any_routing(name, kind):
    "Output, and gradients of all parameters, the router's too; an idle expert's are zeros."
    torch.manual_seed(0)
    layer, experts = LAYERS[name].build(D), routing(kind)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(std=0.4)
    force(layer, experts)
    x = torch.randn(1, len(experts), D)
    y, routed = layer(x)
    alone = reference(layer.experts, x[0], routed.weights, experts)
    if shared := getattr(layer, "shared_experts", None):
        alone = alone + shared(x[0])
    torch.testing.assert_close(y[0], alone, atol=1e-5, rtol=1e-5)
    found, wanted = (torch.autograd.grad(out.square().sum(), list(layer.parameters()),
                                         retain_graph=True) for out in (y, alone))
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
