"Optimisers, schedules and clipping against PyTorch and transformers, and every bad setting."
import copy
import math

import pytest
import torch
from torch import nn

from skylar.training.optim import (
    AdamW,
    AdamWConfig,
    ScheduleConfig,
    clip_grad_norm,
    cosine,
    decay_groups,
    wsd,
)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))


def train(model, optimizer, steps=50, set_lr=None):
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        if set_lr:
            for group in optimizer.param_groups:
                group["lr"] = set_lr(step)
        x = torch.randn(16, 5, generator=generator)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model


def state(optimizer):
    return [v for _, s in sorted(optimizer.state_dict()["state"].items()) for v in s.values()]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("fused", [False, True])
def test_adamw_equals_torch_in_parameters_and_state(weight_decay, fused):
    settings = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay)
    a, b = net(), net()
    ours, theirs = AdamW(a.parameters(), **settings), torch.optim.AdamW(
        b.parameters(), **settings, fused=fused)
    lr = lambda step: 1e-2 * cosine(step, 50, 5)  # noqa: E731
    train(a, ours, set_lr=lr)
    train(b, theirs, set_lr=lr)
    torch.testing.assert_close(dict(a.named_parameters()), dict(b.named_parameters()))
    torch.testing.assert_close(state(ours), state(theirs))


def test_our_state_continues_in_torch():
    ours = AdamW((straight := net()).parameters(), lr=1e-2)
    train(straight, ours, steps=10)
    other = copy.deepcopy(straight)
    theirs = torch.optim.AdamW(other.parameters(), lr=1e-2)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    train(straight, ours, steps=10)
    train(other, theirs, steps=10)
    torch.testing.assert_close(list(straight.parameters()), list(other.parameters()))


def test_adamw_skips_parameters_without_gradient_and_returns_the_closure():
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = AdamW([a, b], weight_decay=0.5)
    loss = optimizer.step(lambda: a.sum().backward() or 7.0)
    assert loss == 7.0 and torch.equal(b, torch.ones(2)) and not torch.equal(a, b)


def test_build_is_torch_fused_and_equals_ours():
    config = AdamWConfig(lr=3e-3)
    a, b = net(), net()
    built = config.build(a)
    assert isinstance(built, torch.optim.AdamW) and built.defaults["fused"]
    ours = AdamW(decay_groups(b, 0.1), lr=3e-3, betas=config.betas, eps=config.eps)
    train(a, built)
    train(b, ours)
    torch.testing.assert_close(list(a.parameters()), list(b.parameters()))


def test_only_matrices_decay_each_once_and_frozen_ones_stay_out():
    model = nn.ModuleDict(dict(a=nn.Embedding(7, 4), b=nn.Linear(4, 7), c=nn.LayerNorm(4)))
    model["b"].weight = model["a"].weight  # tied
    model["c"].bias.requires_grad_(False)
    decayed, free = decay_groups(model, 0.1)
    assert [p.shape for p in decayed["params"]] == [(7, 4)] and decayed["weight_decay"] == 0.1
    assert [p.shape for p in free["params"]] == [(7,), (4,)] and free["weight_decay"] == 0


def test_adamw_builds_on_meta_without_fused():
    assert not AdamWConfig().build(nn.Linear(2, 2, device="meta")).defaults["fused"]


@pytest.mark.parametrize("bad", [
    dict(lr=0), dict(lr=-1), dict(lr=math.nan), dict(lr=math.inf), dict(betas=(0.9, 1.0)),
    dict(betas=(0.9,)), dict(eps=0), dict(weight_decay=-0.1), dict(weight_decay=math.nan),
])
def test_bad_adamw_settings_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        AdamWConfig(**bad)


def reference(make, steps, lr=1.0):
    "Multipliers that a torch/transformers scheduler gives for each step."
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler, seen = make(optimizer), []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


@pytest.mark.parametrize("warmup", [1, 7, 30])
def test_cosine_equals_torch_schedulers(warmup):
    S = torch.optim.lr_scheduler

    def make(o):
        climb = S.LinearLR(o, 1 / (warmup + 1), 1.0, warmup)
        fall = S.CosineAnnealingLR(o, 100 - warmup, eta_min=0.1)
        return S.SequentialLR(o, [climb, fall], [warmup])

    ours = [cosine(s, 100, warmup, 0.1) for s in range(100)]
    assert ours == pytest.approx(reference(make, 100), abs=1e-6)


def test_schedules_equal_transformers_after_the_warmup():
    tr = pytest.importorskip("transformers.optimization")
    theirs = reference(
        lambda o: tr.get_cosine_with_min_lr_schedule_with_warmup(o, 10, 100, min_lr_rate=0.1), 100)
    assert [cosine(s, 100, 10, 0.1) for s in range(10, 100)] == pytest.approx(theirs[10:])
    theirs = reference(
        lambda o: tr.get_wsd_schedule(o, 10, 20, num_training_steps=100, decay_type="1-sqrt"), 100)
    assert [wsd(s, 100, 10) for s in range(10, 100)] == pytest.approx(theirs[10:])


@pytest.mark.parametrize("kind,floor", [("cosine", 0.1), ("wsd", 0.0), ("constant", 1.0)])
def test_boundaries_of_a_run(kind, floor):
    at = lambda s: ScheduleConfig(kind=kind, warmup_steps=10).multiplier(s, 100)  # noqa: E731
    assert at(0) == pytest.approx(1 / 11) and at(9) == pytest.approx(10 / 11) and at(10) == 1
    assert all(at(s) > 0 for s in range(100)), "a step at rate 0 is a step wasted"
    assert at(100) == pytest.approx(floor) and at(10_000) == at(100)
    assert at(99) >= at(100)


def test_wsd_holds_then_falls():
    assert all(wsd(s, 100, 10) == 1 for s in range(10, 81)) and wsd(81, 100, 10) < 1
    assert wsd(100, 100, 10, decay_fraction=1.0) == 0  # never starts before the warm-up ends
    assert wsd(10, 100, 10, decay_fraction=1.0) == 1


def test_default_warmup_fits_any_run():
    assert [ScheduleConfig().multiplier(0, n) for n in (1, 10, 40)] == pytest.approx([1, 1, 1 / 3])
    assert ScheduleConfig().multiplier(0, 10**6) == pytest.approx(1 / 1001)


@pytest.mark.parametrize("bad", [
    dict(kind="linear"), dict(warmup_steps=-1), dict(min_ratio=1.5), dict(min_ratio=-0.1),
    dict(decay_fraction=0), dict(decay_fraction=1.1),
])
def test_bad_schedules_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        ScheduleConfig(**bad)


def test_warmup_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match="warmup_steps=50 must be less than the run's 50"):
        ScheduleConfig(warmup_steps=50).multiplier(0, 50)


def gradients(*values):
    params = [nn.Parameter(torch.zeros(len(v))) for v in values]
    for p, v in zip(params, values):
        p.grad = torch.tensor(v)
    return params


@pytest.mark.parametrize("max_norm", [0.5, 5.0, 13.0, math.inf])
@pytest.mark.parametrize("values", [
    ([3.0, 4.0], [12.0]), ([0.0], [0.0]), ([math.inf], [1.0]), ([math.nan], [1.0])])
def test_clipping_equals_torch(values, max_norm):
    a, b = gradients(*values), gradients(*values)
    ours, theirs = clip_grad_norm(a, max_norm), nn.utils.clip_grad_norm_(b, max_norm)
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    torch.testing.assert_close([p.grad for p in a], [p.grad for p in b], equal_nan=True)


def test_clipping_takes_a_generator_and_parameters_without_gradients():
    params = gradients([3.0, 4.0]) + [nn.Parameter(torch.zeros(1))]
    assert clip_grad_norm((p for p in params), 1.0) == 5.0
    assert params[0].grad.norm() == pytest.approx(1.0, abs=1e-5) and params[1].grad is None
    assert clip_grad_norm([], 1.0) == 0.0
