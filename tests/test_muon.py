"""Muon: the polynomials, equality with PyTorch's, heads and stacks, what it refuses, steps that are
not finite, resuming bit for bit, and runs of several processes equal to one."""

import copy
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import launch
from torch import nn
from torch.nn import functional as F

from skylar.models.decoder import CausalLM
from skylar.models.presets import get_config
from skylar.training import muon
from skylar.training.loss import NextTokenObjective
from skylar.training.muon import (
    CLASSIC,
    POLAR_EXPRESS,
    Muon,
    MuonConfig,
    buckets,
    orthogonalize,
    update_scale,
)
from skylar.training.optim import AdamWConfig, ScheduleConfig
from skylar.training.trainer import TrainConfig, Trainer, update
from skylar.utils.sharded_matrices import chunk_lengths

WORKER = Path(__file__).with_name("muon_worker.py")
SHAPES = [(8, 8), (6, 20), (20, 6), (3, 5, 9), (2, 3, 7, 4)]


def after(coefficients, steps, low=1e-3):
    """Smallest and largest of what becomes of singular values from `low` to 1."""
    s = torch.logspace(math.log10(low), 0, 20_001, dtype=torch.double)
    for step in range(steps):
        a, b, c = coefficients[min(step, len(coefficients) - 1)]
        s = a * s + b * s**3 + c * s**5
    return s.min().item(), s.max().item()


# --- the polynomials ---


@pytest.mark.parametrize(("coefficients", "steps", "low", "expected"), [
    (CLASSIC, 5, 1e-3, (0.471, 1.202)), (CLASSIC, 5, 1e-2, (0.682, 1.134)),
    (CLASSIC, 20, 1e-3, (0.682, 1.134)),  # more steps do not converge
    (POLAR_EXPRESS, 5, 1e-3, (0.846, 1.124)), (POLAR_EXPRESS, 6, 1e-3, (0.994, 1.001)),
    (POLAR_EXPRESS, 8, 1e-3, (1, 1))])
def test_where_singular_values_end(coefficients, steps, low, expected):
    assert after(coefficients, steps, low) == pytest.approx(expected, abs=1e-3)


def test_polar_express_is_tighter_than_the_classic_coefficients_at_every_number_of_steps():
    for steps in range(2, 9):
        ours, classic = (max(1 - low, high - 1) for low, high in
                         (after(POLAR_EXPRESS, steps), after(CLASSIC, steps)))
        assert ours < classic, steps


@pytest.mark.parametrize("shape", SHAPES)
def test_converges_to_the_svd_for_every_matrix_of_a_stack(shape):
    matrix = torch.randn(shape, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    assert s.min() > 1e-2
    torch.testing.assert_close(orthogonalize(matrix, 12), u @ vh, atol=1e-9, rtol=0)


@pytest.mark.parametrize("shape", [s for s in SHAPES if len(s) > 2])
def test_a_stack_is_each_matrix_alone(shape):
    stack = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    alone = torch.stack([orthogonalize(m) for m in stack.flatten(0, -3)]).view(shape)
    torch.testing.assert_close(orthogonalize(stack), alone, atol=2e-5, rtol=0)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6])
def test_magnitude_does_not_matter(scale):
    m = torch.randn(6, 9, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    expected = orthogonalize(m)
    if scale < 1e-7:  # below the smallest norm that is divided by: small, but no NaN
        assert orthogonalize(m * scale).abs().max() < 1e-10
    else:
        torch.testing.assert_close(orthogonalize(m * scale), expected)


def test_a_matrix_of_zeros_and_an_empty_stack_stay_what_they_are():
    assert orthogonalize(torch.zeros(4, 3)).count_nonzero() == 0
    assert orthogonalize(torch.zeros(0, 4, 3)).shape == (0, 4, 3)


def test_bfloat16_is_near_float32_and_gives_back_the_format_it_got():
    m = torch.randn(4, 32, 48, generator=torch.Generator().manual_seed(0))
    rough = orthogonalize(m, dtype=torch.bfloat16)
    assert rough.dtype == torch.float32
    error = (rough - orthogonalize(m)).norm() / rough.norm()
    assert 1e-4 < error < 0.05


# --- the optimizer from scratch ---


def steps_of(optimizer, params, n=8):
    generator = torch.Generator().manual_seed(1)
    for _ in range(n):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return [p.detach() for p in params]


def matrices(shapes=((16, 16), (8, 40), (40, 8))):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]


needs_torch_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9")


@needs_torch_muon
@pytest.mark.parametrize("adjust_lr", ["original", "match_rms_adamw"])
@pytest.mark.parametrize(("nesterov", "weight_decay"), [(True, 0.1), (False, 0.0)])
def test_equals_torch_muon_with_products_in_bfloat16(adjust_lr, nesterov, weight_decay):
    settings = dict(lr=0.02, weight_decay=weight_decay, momentum=0.9, nesterov=nesterov)
    a, b = matrices(), matrices()
    ours = steps_of(Muon(a, adjust_lr=adjust_lr, dtype=torch.bfloat16, **settings), a)
    theirs = steps_of(torch.optim.Muon(b, adjust_lr_fn=adjust_lr, **settings), b)
    moved = max((x - y).abs().max() for x, y in zip(theirs, matrices()))
    assert moved > 0.05
    for x, y in zip(ours, theirs):  # 2% of one step: an odd rounding of bf16
        torch.testing.assert_close(x, y, atol=0.02 * 0.02 * 2, rtol=0)


@needs_torch_muon
def test_in_float32_it_is_as_near_to_torch_muon_as_bfloat16_allows():
    a, b = matrices(), matrices()
    ours, theirs = steps_of(Muon(a, lr=0.02), a), steps_of(torch.optim.Muon(b, lr=0.02), b)
    for x, y, start in zip(ours, theirs, matrices()):
        assert (x - y).norm() < 0.03 * (x - start).norm()


def test_scale_of_the_update():
    assert update_scale((8, 2), "original") == 2 and update_scale((2, 8), "original") == 1
    m = torch.randn(7, 30, 50, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    rms = orthogonalize(m, 12).square().mean().sqrt() * update_scale(m.shape, "match_rms_adamw")
    assert rms == pytest.approx(0.2)  # that of AdamW, Liu et al. 2025


# --- Muon and AdamW as one optimizer ---


def small(seed=0, **changes):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=50, d_model=32, n_heads=4, n_kv_heads=2, d_head=8, d_ff=40, n_layers=2)
    return CausalLM(get_config("test", family="qwen3", dropout=0.0, **(sizes | changes)))


def batches(n=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(50, (n, 3, 13), generator=generator)
    return [{"input_ids": x[:, :-1], "labels": x[:, 1:]} for x in ids]


def take(model, optimizer, n=6):
    for batch in batches(n):
        optimizer.zero_grad()
        F.cross_entropy(model(batch["input_ids"]).flatten(0, 1),
                        batch["labels"].flatten()).backward()
        optimizer.step()


def kinds(model, optimizer):
    names = {p: name for name, p in model.named_parameters()}
    return {names[p]: group for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "llama3"])
def test_matrices_of_blocks_are_muons_and_all_else_is_adamws(family):
    torch.manual_seed(0)
    model = CausalLM(get_config("test", family=family, vocab_size=50, n_layers=2))
    groups = kinds(model, MuonConfig(lr=1e-2, adamw_lr=2e-3).build(model))
    assert set(groups) == {name for name, _ in model.named_parameters()}
    for name, group in groups.items():
        matrix = ".layers." in name and name.endswith("proj.weight")
        assert ("momentum" in group) == matrix, name
        assert group["lr"] == (1e-2 if matrix else 2e-3)
        if matrix:
            by_head = name.split(".")[-2] in ("q_proj", "k_proj", "v_proj")
            assert group["d_head"] == (32 if by_head else None), name
        else:
            assert group["weight_decay"] == (0.1 if "embed" in name else 0.0), name


def test_frozen_parameters_and_embeddings_inside_a_block_are_left_to_others():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.linear = nn.Embedding(5, 4), nn.Linear(4, 4)
            self.frozen = nn.Linear(4, 4).requires_grad_(False)
            self.experts = nn.Parameter(torch.randn(3, 4, 6))
            self.conv = nn.Conv1d(4, 4, 3, groups=4)  # (4, 1, 3): no matrices

    model = nn.ModuleDict({"layers": nn.ModuleList([Block()]), "head": nn.Linear(4, 5)})
    groups = kinds(model, MuonConfig().build(model))
    assert {name for name, g in groups.items() if "momentum" in g} == {
        "layers.0.linear.weight", "layers.0.experts"}
    assert not any("frozen" in name for name in groups) and "head.weight" in groups


def test_equals_the_plain_muon_and_torch_adamw_side_by_side():
    one, two = small(), small()
    settings = dict(lr=1e-2, momentum=0.9, weight_decay=0.1, adjust_lr="match_rms_adamw")
    take(one, MuonConfig(per_head=False, adamw_lr=3e-3, coefficients="classic",
                         **settings).build(one))
    mine = muon.block_matrices(two, per_head=False)
    others = [p for p in two.parameters() if p not in mine]
    plain = Muon(list(mine), **settings)
    adamw = torch.optim.AdamW([
        {"params": [p for p in others if p.ndim == d], "weight_decay": wd}
        for d, wd in ((2, 0.1), (1, 0.0))], lr=3e-3, betas=(0.9, 0.95), fused=True)

    class Both:
        zero_grad = two.zero_grad

        def step(self):
            plain.step()
            adamw.step()

    take(two, Both())
    for (name, a), b in zip(one.named_parameters(), two.parameters()):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0, msg=name)


def test_per_head_is_each_head_alone_and_experts_each_expert():
    heads = torch.randn(4 * 8, 32, generator=torch.Generator().manual_seed(0))
    group = MuonConfig().build(small()).param_groups[0] | {"d_head": 8}
    found = muon.orthogonalize_heads(heads, group)
    for head, expected in zip(found.split(8), heads.split(8)):
        torch.testing.assert_close(head, orthogonalize(expected), atol=2e-5, rtol=0)
    assert (found - muon.orthogonalize_heads(heads, group | {"d_head": None})).abs().max() > 0.05


def test_limit_of_a_stack_changes_nothing_but_memory(monkeypatch):
    one, two = small(), small()
    take(one, MuonConfig().build(one))
    calls, bound = [], 32 * 40

    def limited(params):
        found = buckets(params, bound)
        calls.extend(map(len, found))
        return found

    monkeypatch.setattr(muon, "buckets", limited)
    take(two, MuonConfig().build(two))
    assert set(calls) == {1, 2}  # of 1280 numbers one at a time, of 512 two
    for (name, a), b in zip(one.named_parameters(), two.parameters()):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0, msg=name)


def test_a_parameter_without_gradient_has_no_state_and_stays():
    model = small()
    idle = model.model.layers[0].mlp.up_proj.weight
    before = idle.detach().clone()
    optimizer = MuonConfig().build(model)
    model(batches()[0]["input_ids"]).sum().backward()
    idle.grad = None
    optimizer.step()
    assert idle not in optimizer.state and torch.equal(idle, before)


def test_closure_is_called_with_gradients_and_its_loss_returned():
    model = small()
    optimizer = MuonConfig().build(model)

    def closure():
        loss = model(batches()[0]["input_ids"]).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad


# --- refused ---


@pytest.mark.parametrize(("changes", "message"), [
    ({"lr": 0}, "lr=0: give a number above 0"),
    ({"adamw_lr": math.inf}, "adamw_lr=inf"),
    ({"momentum": 1.0}, r"momentum=1.0: give a probability in \[0, 1\)"),
    ({"steps": 0}, "steps=0"),
    ({"adjust_lr": "best"}, "unknown adjust_lr 'best'; choose from match_rms_adamw, original"),
    ({"coefficients": "clasic"}, "did you mean classic"),
    ({"dtype": "float16"}, "unknown dtype 'float16'"),
    ({"weight_decay": -1}, "weight_decay=-1 must be 0"),
    ({"adamw_betas": (0.9, 1.0)}, r"adamw_betas=\(0.9, 1.0\)"),
])
def test_bad_settings_are_refused_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        MuonConfig(**changes)
    assert "\n" not in str(error.value)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="give AdamWConfig"):
        MuonConfig().build(nn.Sequential(nn.Linear(3, 4)))


@pytest.fixture
def group_of_one(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0,
                            world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_flat_shards_of_fsdp1_are_refused_in_one_line(group_of_one, use_orig_params):
    from torch.distributed.fsdp import FullyShardedDataParallel
    model = nn.ModuleList([nn.Linear(4, 4)])
    model[0] = FullyShardedDataParallel(model[0], use_orig_params=use_orig_params,
                                        device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"^0: FSDP1 keeps .* use fully_shard \(FSDP2\)") as error:
        MuonConfig().build(model)
    assert "\n" not in str(error.value)


def test_a_linear_layer_whose_weight_is_flat_is_refused():
    model = nn.ModuleList([nn.Linear(4, 4)])
    model[0].weight = nn.Parameter(torch.zeros(16))
    with pytest.raises(ValueError, match="1-D shards"):
        MuonConfig().build(model)


# --- in the Trainer ---


def trainer(model, data, steps=6, optimizer=None, **settings):
    config = TrainConfig(steps=steps, dtype="float32", device="cpu", log_every=1, save_every=0,
                         eval_every=0, **settings.pop("config", {}))
    return Trainer(NextTokenObjective(model), data, config, quiet=True,
                   optimizer=optimizer or MuonConfig(), schedule=settings.pop(
                       "schedule", ScheduleConfig(kind="constant", warmup_steps=0)), **settings)


def everything(t):
    """Bits of all weights and of all state."""
    state = t.train_step.optimizer.state
    tensors = {n: p.detach() for n, p in t.objective.named_parameters()}
    tensors |= {f"{n} {k}": v for n, p in t.objective.named_parameters() if p in state
                for k, v in state[p].items()}
    return {n: v.clone().view(torch.int32) for n, v in tensors.items()}


def same_bits(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(v, b[name]) for name, v in a.items())


def test_the_trainers_step_equals_dividing_and_clipping_by_hand():
    model, twin = small(), small()
    data = batches()
    t = trainer(model, data, config={"max_grad_norm": 0.5})
    assert t.train_step.optimizer._step_supports_amp_scaling
    t.train()
    optimizer = MuonConfig().build(twin)
    for batch in data[:6]:
        optimizer.zero_grad()
        F.cross_entropy(twin(batch["input_ids"]).flatten(0, 1),
                        batch["labels"].flatten()).backward()
        assert nn.utils.clip_grad_norm_(twin.parameters(), 0.5) > 0.5
        optimizer.step()
    for (name, a), b in zip(model.named_parameters(), twin.named_parameters()):
        torch.testing.assert_close(a, b[1], atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("first", [0, 3], ids=["first step", "later"])
def test_a_step_that_is_not_finite_leaves_weights_and_state_bit_for_bit(bad, first):
    model = small()
    t = trainer(model, batches(), steps=first or 1)
    if first:
        t.train()
    before = everything(t)
    target = model.model.layers[0].mlp.down_proj.weight
    hook = target.register_hook(lambda grad: torch.full_like(grad, bad))
    t.train_step(iter(batches()), first)
    after = everything(t)
    hook.remove()
    assert int(t.train_step.nonfinite.skipped) == 1
    if first:
        assert same_bits(before, after)
    else:  # state was made, and is zero
        assert same_bits(before, {n: after[n] for n in before})
        assert not any(v.any() for n, v in after.items() if n not in before)
    t.train_step(iter(batches()), first)
    assert not same_bits(after, everything(t))


def test_the_host_never_waits_for_the_device(monkeypatch):
    """No number is read from a tensor: on a GPU each would be a synchronization."""
    t = trainer(small(), batches(), steps=2)
    t.train()
    step = t.train_step
    for p in step.params:
        p.grad = torch.ones_like(p)

    def read(self, *args):
        raise AssertionError("a number was read from a tensor")

    for name in ("item", "__bool__", "__float__", "__int__", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, read)
    grads = [p.grad for p in step.params]
    update(step.optimizer, grads, torch.tensor(2.0), torch.tensor(True))


def test_rates_follow_the_schedule_each_from_its_own(monkeypatch):
    t = trainer(small(), batches(), optimizer=MuonConfig(lr=4e-3, adamw_lr=1e-3),
                schedule=ScheduleConfig(kind="constant", warmup_steps=3))
    t.train_step(iter(batches()), 0)
    assert {("momentum" in g, g["lr"]) for g in t.train_step.optimizer.param_groups} == {
        (True, 1e-3), (False, 0.25e-3)}


class Resumable:
    def __init__(self):
        self.count = 0

    def __iter__(self):
        for batch in itertools.cycle(batches(5)):
            if self.skip:
                self.skip -= 1
                continue
            self.count += 1
            yield batch

    skip = 0

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = self.skip = state["count"]


@pytest.mark.parametrize("stop", [1, 4, 5, 7])
def test_resumed_bit_for_bit_with_an_idle_matrix(tmp_path, stop):
    def run(steps, out, resume=False):
        model = small()
        model.model.layers.append(nn.Linear(32, 32))  # never called: no gradient, no state
        model.model.layers[-1].forward = lambda x, *args, **kwargs: x
        t = trainer(model, Resumable(), steps, out_dir=out, config={"grad_accum_steps": 2})
        t.train(resume=resume, extend=resume)
        return everything(t)

    whole = run(8, tmp_path / "straight")
    run(stop, tmp_path / "cut")
    assert same_bits(whole, run(8, tmp_path / "cut", resume=True))
    assert any("momentum_buffer" in name for name in whole)
    assert not any(name.startswith("model.model.layers.2") and " " in name for name in whole)


def test_a_checkpoint_of_adamw_is_refused(tmp_path):
    trainer(small(), batches(), 2, out_dir=tmp_path, optimizer=AdamWConfig()).train()
    with pytest.raises(ValueError, match="optimizer"):
        trainer(small(), batches(), 4, out_dir=tmp_path).train(resume=True, extend=True)


def test_state_dict_goes_into_a_copy_that_trains_on_alike():
    model = small()
    optimizer = MuonConfig().build(model)
    take(model, optimizer)
    twin = copy.deepcopy(model)
    other = MuonConfig().build(twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    take(model, optimizer)
    take(twin, other)
    for a, b in zip(model.parameters(), twin.parameters()):
        assert torch.equal(a, b)


# --- several processes ---


@pytest.mark.parametrize(("length", "parts"), [(10, 3), (250, 4), (2, 4), (9, 3), (1, 1), (5, 4)])
def test_chunks_are_torchs(length, parts):
    chunks = [len(c) for c in torch.arange(length).chunk(parts)]
    assert chunk_lengths(length, parts) == chunks + [0] * (parts - len(chunks))


def run(folder: Path, n: int, **settings) -> dict:
    out = folder / "result.pt"
    launch(n, WORKER, out, json.dumps(settings))
    return torch.load(out)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    return run(tmp_path_factory.mktemp("alone"), 1)


def distance(found, alone) -> float:
    return max((found["weights"][name] - weight).abs().max().item()
               for name, weight in alone["weights"].items())


@pytest.mark.parametrize(("n", "settings"), [
    (2, {"strategy": "ddp"}),
    (2, {"strategy": "fsdp"}),
    (3, {"strategy": "fsdp"}),  # heads are cut, shards differ
    (2, {"tensor": 2}),
    (4, {"replicas": 2}),
    (4, {"tensor": 2}),
], ids=lambda v: "-".join(f"{k}={x}" for k, x in v.items()) if isinstance(v, dict) else str(v))
def test_the_same_run_as_alone(alone, tmp_path, n, settings):
    found = run(tmp_path, n, **settings)
    for ours, theirs in zip(found["rows"], alone["rows"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=5e-6)
    assert found["state"].keys() == alone["state"].keys()
    assert distance(found, alone) < 2e-4  # six steps move a weight by up to 0.05
    for name, value in alone["state"].items():
        torch.testing.assert_close(found["state"][name], value, atol=1e-5, rtol=0, msg=name)
    if n == 2 and settings.get("strategy") == "fsdp":  # the ranks share the work
        assert sum(found["worked"]) == alone["worked"][0]
        assert max(found["worked"]) < 0.7 * alone["worked"][0]


def test_two_ranks_save_and_one_goes_on(alone, tmp_path):
    checkpoints = {"out_dir": str(tmp_path / "run")}
    half = run(tmp_path, 2, strategy="fsdp", steps=3, **checkpoints)
    found = run(tmp_path, 1, resume=True, **checkpoints)
    assert len(half["rows"]) == 3 and len(found["rows"]) == 6
    assert distance(half, alone) > 5e-3 and distance(found, alone) < 2e-4
    for name, value in alone["state"].items():
        torch.testing.assert_close(found["state"][name], value, atol=1e-5, rtol=0, msg=name)


def test_muon_of_each_ranks_own_part_is_another_optimizer(alone, tmp_path):
    assert distance(run(tmp_path, 2, strategy="fsdp", local=True), alone) > 5e-3


def test_owners_make_bfloat16_as_exact_as_its_gradients(tmp_path):
    bf16 = {"muon": {"dtype": "bfloat16"}}
    one = run(tmp_path, 1, **bf16)
    assert distance(run(tmp_path, 2, strategy="fsdp", **bf16), one) < 2e-3
