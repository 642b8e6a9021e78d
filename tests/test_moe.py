"""Routers and experts: every dispatch path against one token and one expert at a time."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from skylar.layers import moe
from skylar.layers.block import BlockConfig
from skylar.layers.gqa import GQAConfig
from skylar.layers.moe import Experts, MoEConfig
from skylar.layers.norm import RMSNormConfig
from skylar.layers.router import (
    RouterLossConfig,
    RouterOutput,
    TopKConfig,
    TopKRouter,
    expert_counts,
    load_balancing_loss,
    max_load,
    router_logits,
    router_z_loss,
)
from skylar.models.decoder import CausalLM, DecoderConfig
from skylar.training.checkpoint import checkpoint_tensors
from skylar.training.loss import NextTokenObjective
from skylar.training.mup import MupConfig, coordinate_check, growth
from skylar.training.optim import AdamWConfig, ScheduleConfig
from skylar.training.trainer import TrainConfig, Trainer
from skylar.utils.recompute import recompute

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
    for found, expected in zip(run(lambda m, *a: m(*a), layer, kind), wanted):
        assert_close(found, expected)
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


@pytest.mark.parametrize("factor", [None, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled(dtype, factor):
    """To one graph where no number decides a shape: in bf16, or with a capacity."""
    torch.compiler.reset()
    layer = MoEConfig(
        router=TopKConfig(n_experts=4, top_k=2), d_ff=32, capacity_factor=factor).build(16)
    torch.manual_seed(0)
    layer.init_weights(0.2, 0.2)

    def outcome(f):
        x = torch.randn(3, 20, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y, _ = f(x)
        y.square().sum().backward()
        return [y.detach(), x.grad, *[p.grad.clone() for p in layer.parameters()]]

    one_graph = dtype == torch.bfloat16 or factor is not None
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=one_graph)
    for a, b in zip(outcome(compiled), outcome(layer)):
        assert (a - b).norm() <= (0.01 if dtype == torch.bfloat16 else 1e-5) * b.norm()
    torch.compiler.reset()


# --- the router ---


def routed_by(k: int, normalize: bool = True, n: int = E) -> tuple[TopKRouter, torch.Tensor]:
    torch.manual_seed(0)
    router = TopKConfig(n_experts=n, top_k=k, normalize=normalize).build(D)
    router.init_weights(0.5, 0.5)
    return router, torch.randn(N, D)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (E, 1), (E, 2), (E, E)])
def test_router_equals_one_token_at_a_time(n, k, normalize):
    router, x = routed_by(k, normalize, n)
    routed = router(x)
    for token, weights, experts in zip(x, routed.weights.tolist(), routed.experts.tolist()):
        p = [math.exp(row @ token) for row in router.weight.detach()]
        best = sorted(range(n), key=lambda e: -p[e])[:k]
        assert experts == best
        total = sum(p[e] for e in best) if normalize else sum(p)
        assert weights == pytest.approx([p[e] / total for e in best], rel=1e-5)


def test_router_is_fp32_under_autocast_and_in_bf16_models():
    router, x = routed_by(2)
    with torch.autocast("cpu", torch.bfloat16):
        routed = router(x)
        assert F.linear(x, router.weight).dtype == torch.bfloat16
    assert routed.logits.dtype == routed.weights.dtype == torch.float32
    assert torch.equal(routed.logits, router(x).logits)
    half = router.bfloat16()(x.bfloat16())
    assert half.logits.dtype == torch.float32
    assert_close(half.logits, x.bfloat16().float() @ router.weight.float().T)


def test_router_bias():
    router, x = routed_by(2)
    bias = torch.randn(E)
    assert_close(router_logits(x, router.weight, bias), x @ router.weight.T + bias)


def test_more_choices_than_experts():
    with pytest.raises(ValueError, match="top_k=3 of n_experts=2"):
        TopKConfig(n_experts=2, top_k=3)
    for wrong in (dict(balance=-0.1), dict(z=math.inf)):
        with pytest.raises(ValueError, match=f"{[*wrong][0]}="):
            RouterLossConfig(**wrong)


def test_normalized_top_1_gives_the_router_no_gradient():
    for normalize, moves in ((True, False), (False, True)):
        router, x = routed_by(1, normalize)
        (router(x).weights * torch.randn(N, 1)).sum().backward()
        assert (router.weight.grad.abs().max() > 1e-6) == moves


# --- the losses ---

MASK = torch.ones(2, N, dtype=torch.long)
MASK[0, 20:] = 0  # padding on the right,
MASK[1, :9] = 0  # and on the left


def extras_of(layers: int = 3) -> list[RouterOutput]:
    found = []
    for i in range(layers):
        torch.manual_seed(i)
        router = TopKConfig(n_experts=E, top_k=K).build(D)
        router.init_weights(0.5, 0.5)
        found.append(router(torch.randn(2 * N, D)))
    return found


@pytest.mark.parametrize("mask", [None, MASK, torch.zeros_like(MASK)], ids=["all", "some", "none"])
def test_balance_loss_equals_transformers(mask):
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits = [routed.logits.detach().requires_grad_() for routed in extras_of()]
    extras = [RouterOutput(x, *x.softmax(-1).topk(K)) for x in logits]
    found = load_balancing_loss(extras, mask)
    if mask is not None and not mask.any():
        assert found == 0  # theirs is NaN
        return
    theirs = mixtral.load_balancing_loss_func(tuple(logits), E, K, mask)
    assert_close(found, theirs)
    for a, b in zip(torch.autograd.grad(found, logits), torch.autograd.grad(theirs, logits)):
        assert_close(a, b)


def test_padding_counts_for_nothing():
    extras, kept = extras_of(), MASK.flatten().bool()
    cut = [RouterOutput(*(x[kept] for x in routed)) for routed in extras]
    for f in (load_balancing_loss, router_z_loss, max_load):
        assert_close(f(extras, MASK), f(cut))
        assert not torch.allclose(f(extras, MASK), f(extras))
    assert_close(expert_counts(extras[0], MASK), expert_counts(cut[0]))
    loss = RouterLossConfig(balance=0.1, z=0.01)
    assert_close(loss(extras, {"attention_mask": MASK}).loss, loss(cut, {}).loss)


def test_losses_of_balanced_and_collapsed_routers():
    balanced = RouterOutput(torch.zeros(E, E), torch.ones(E, 1), torch.arange(E)[:, None])
    assert load_balancing_loss([balanced]) == pytest.approx(1)  # top_k
    assert max_load([balanced]) == 1
    assert router_z_loss([balanced]) == pytest.approx(math.log(E) ** 2)
    sharp = torch.zeros(E, E)
    sharp[:, 2] = 50.0
    collapsed = RouterOutput(sharp, torch.ones(E, 1), torch.full((E, 1), 2))
    assert load_balancing_loss([collapsed]) == pytest.approx(E) and max_load([collapsed]) == E


def test_losses_of_a_model_without_routers():
    assert RouterLossConfig()([], {}).loss == 0


# --- runs ---

NORM = RMSNormConfig()
V, T = 31, 16


def config_with(ffn, auxiliary=None) -> DecoderConfig:
    block = BlockConfig(attention=GQAConfig(n_heads=2), ffn=ffn, norm=NORM)
    return DecoderConfig(vocab_size=V, d_model=16, blocks=(block,) * 2, norm=NORM, max_seq_len=T,
                         init_std=0.3, auxiliary=auxiliary)


@dataclass(frozen=True, kw_only=True)
class UnusedConfig(TopKConfig):
    "No token chooses expert 1."

    def build(self, d_model):
        return UnusedRouter(self, d_model)


class UnusedRouter(TopKRouter):
    def forward(self, x):
        logits = router_logits(x, self.weight)
        logits = logits.masked_fill(torch.arange(logits.shape[-1]) == 1, -torch.inf)
        weights, experts = logits.softmax(-1).topk(self.config.top_k)
        return RouterOutput(logits, weights, experts)


class Batches:
    "A loader that goes on where it was."

    def __init__(self):
        self.at = 0

    def __iter__(self):
        while True:
            self.at += 1
            ids = torch.randint(V, (2, T + 1), generator=torch.Generator().manual_seed(self.at))
            yield {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def trainer_of(out, dtype="float32", callbacks=(), accumulate=2) -> Trainer:
    torch.manual_seed(0)
    ffn = MoEConfig(router=UnusedConfig(n_experts=4, top_k=2), d_ff=8)
    model = CausalLM(config_with(ffn, RouterLossConfig(balance=0.1, z=0.01)))
    settings = TrainConfig(steps=6, grad_accum_steps=accumulate, dtype=dtype, device="cpu",
                           log_every=1, save_every=0, async_save=False)
    return Trainer(NextTokenObjective(model), Batches(), settings, optimizer=AdamWConfig(lr=0.01),
                   schedule=ScheduleConfig(warmup_steps=1), out_dir=out, callbacks=callbacks,
                   quiet=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_expert_without_tokens_is_saved_and_the_run_resumes_bit_for_bit(tmp_path, dtype):
    straight = trainer_of(tmp_path / "one", dtype)
    before = straight.model.model.layers[0].mlp.experts.down_proj.detach().clone()
    rows = straight.train()
    trainer_of(tmp_path / "two", dtype, [lambda row: row["step"] == 3]).train()
    resumed = trainer_of(tmp_path / "two", dtype)
    resumed.train(resume=True)
    tensors = [checkpoint_tensors(t.model, t.train_step.optimizer, t.objective)
               for t in (straight, resumed)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    experts = straight.model.model.layers[0].mlp.experts
    moved = experts.down_proj.detach() / before
    decay = moved[1]  # weight decay alone
    assert decay.std() < 1e-4 < 1 - decay.mean() and moved[0].std() > 0.01
    moments = straight.train_step.optimizer.state[experts.down_proj]
    assert not moments["exp_avg"][1].any() and moments["exp_avg"][0].any()
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert {"balance_loss", "router_z_loss", "max_load"} <= set(rows[-1])


def test_auxiliary_losses_are_for_training_and_count_once_when_recomputed():
    torch.manual_seed(0)
    loss = RouterLossConfig(balance=0.5, z=0.1)
    ffn = MoEConfig(router=TopKConfig(n_experts=4, top_k=2), d_ff=8)
    plain = CausalLM(config_with(ffn))
    model = CausalLM(config_with(ffn, loss))
    model.load_state_dict(plain.state_dict())
    batch = next(iter(Batches()))
    objective = NextTokenObjective(model).train()
    output, base = objective(batch), NextTokenObjective(plain).train()(batch)
    extras = model.model(batch["input_ids"], return_extras=True)[1]
    assert len(extras) == 2
    wanted = base.loss_sum + loss(extras, batch).loss * base.n_valid
    assert_close(output.loss_sum, wanted)
    assert_close(objective.eval()(batch).loss_sum, base.loss_sum)
    output.loss_sum.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for block in model.model.layers:
        recompute(block)
    again = objective.train()(batch)
    again.loss_sum.backward()
    assert torch.equal(again.loss_sum, output.loss_sum)
    assert all(map(torch.equal, gradients, [p.grad for p in model.parameters()]))


def test_parameters_and_flops_by_formula():
    from torch.utils.flop_counter import FlopCounterMode

    config = MoEConfig(router=TopKConfig(n_experts=E, top_k=K), d_ff=D_FF)
    layer = config.build(D)
    total = sum(p.numel() for p in layer.parameters())
    assert total == E * D + 3 * E * D * D_FF
    dense = replace(config, router=TopKConfig(n_experts=K, top_k=K)).build(D)
    active = sum(p.numel() for p in dense.experts.parameters()) + E * D
    assert total - config.idle_parameters(D) == active
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(1, N, D))
    assert counter.get_total_flops() == N * config.flops(D, 99)


# --- muP ---


@dataclass(frozen=True, kw_only=True)
class Tiny:
    "A sparse family with the multipliers of muP; heads of width 8."

    d_model: int
    init_std: float = 0.1
    embed_std: float | None = None
    residual_std: float | None = None
    logits_scaling: float = 1.0
    residual_multiplier: float = 1.0

    def decoder(self) -> DecoderConfig:
        ffn = MoEConfig(router=TopKConfig(n_experts=4, top_k=2), d_ff=2 * self.d_model)
        block = BlockConfig(attention=GQAConfig(n_heads=self.d_model // 8), ffn=ffn, norm=NORM,
                            residual_multiplier=self.residual_multiplier)
        names = ("d_model", "init_std", "embed_std", "residual_std", "logits_scaling")
        return DecoderConfig(vocab_size=64, blocks=(block,) * 2, norm=NORM, max_seq_len=32,
                             **{name: getattr(self, name) for name in names})


def changes_at(width: int, mup: MupConfig) -> dict[str, float]:
    "How far four steps move the outputs of each part."
    torch.manual_seed(0)
    std = 0.1 if mup.on else 0.1 * math.sqrt(32 / width)
    model = CausalLM(mup.model(Tiny(d_model=width, init_std=std)))
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(8, (4, 33), generator=generator).cumsum(1) % 64 for _ in range(5)]
    return coordinate_check(
        model, mup.optimizer(AdamWConfig(lr=0.015)).build(model), ids[1:],
        lambda model, ids: F.cross_entropy(
            model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()), ids[0][:, :-1])


def test_the_coordinate_check_passes_for_mup_and_fails_for_standard():
    widths, slopes = (32, 64, 128, 256), {}
    for name, mup in (("muP", MupConfig(base_d_model=32)), ("standard", MupConfig())):
        rows = [changes_at(width, mup) for width in widths]
        slopes[name] = {part: growth(widths, [r[part] for r in rows]) for part in rows[0]}
    for part in ("embedding", "attention", "feed-forward", "residual stream"):
        assert abs(slopes["muP"][part]) < 0.3, (part, slopes)
    assert slopes["standard"]["residual stream"] > 0.2, slopes


def test_stacked_experts_get_the_rate_of_matrices():
    mup = MupConfig(base_d_model=16)
    model = CausalLM(mup.model(Tiny(d_model=64)))
    groups = mup.optimizer(AdamWConfig(lr=1.0, weight_decay=0.1)).build(model).param_groups
    rates = {p: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    layer = model.model.layers[0].mlp
    for p in (layer.gate.weight, layer.experts.gate_up_proj, layer.experts.down_proj):
        assert rates[p] == pytest.approx((1 / 4, 0.4))
    torch.manual_seed(0)
    wide = CausalLM(mup.model(Tiny(d_model=64))).model.layers[0].mlp.experts
    assert wide.gate_up_proj.std().item() == pytest.approx(0.1 / 2, rel=0.05)
    assert wide.down_proj.std().item() == pytest.approx(0.1 / 2 / math.sqrt(2 * 2), rel=0.05)
