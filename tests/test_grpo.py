"""GRPO's family: equal to TRL's losses, right as sums, and it learns."""

import copy
import itertools
import math

import pytest
import torch
from golden_cases import golden
from rl_worker import train

from skylar.posttrain.grpo import (
    LOSSES,
    GRPOConfig,
    GRPOObjective,
    group_advantages,
    grpo_loss,
    grpo_preparer,
)
from skylar.posttrain.rollout import RolloutConfig, RolloutLoader
from skylar.posttrain.sums import SumTask, SumTokenizer, expected_reward, sums_model
from skylar.training.objective import returns_mean

CASES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo", "gspo",
         "grpo_two_sided", "dapo_clip_higher", "grpo_kl", "dapo_kl_unbiased", "gspo_kl",
         "dapo_sampler")


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed),
                       dtype=torch.double)


def random_batch(N=5, T=7, seed=0):
    lengths = torch.randint(1, T + 1, (N, 1), generator=torch.Generator().manual_seed(seed))
    logprobs = -numbers(N, T, seed=seed).abs()
    labels = torch.where(torch.arange(T) < lengths, 1, -100)
    noise = [0.3 * numbers(N, T, seed=seed + i) for i in (1, 2, 3)]
    return logprobs, {
        "labels": labels, "advantages": numbers(N, seed=seed + 4),
        **{f"{name}_logprobs": logprobs + x for name, x in zip(("old", "ref", "sampler"), noise)}}


# --- TRL ---


def test_all_golden_cases_are_used():
    assert set(golden("grpo")) == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_trls(name):
    case = golden("grpo")[name]
    x, leaves = case.inputs, case.leaves()
    gspo = x["loss_type"] == "grpo" and x.get("level") == "sequence"
    epsilon = x.get("epsilon", 0.2)
    config = GRPOConfig(
        loss="gspo" if gspo else x["loss_type"], epsilon=epsilon, longest=8,
        epsilon_high=x.get("epsilon_high", epsilon), delta=x.get("delta"),
        beta=x.get("beta", 0.0), unbiased_kl=x.get("unbiased_kl", False),
        sampler_cap=2.0 if x.get("sampler") else None)
    batch = leaves | {"labels": torch.where(x["mask"] == 1, 1, -100)}
    total, count = grpo_loss(leaves["logprobs"], batch, config)
    case.check(leaves, total / count)


# --- advantages ---


def test_advantages_by_hand():
    found = group_advantages(torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 1]), 4)
    std = [math.sqrt(1 / 3), 0.5]
    expected = [0.5 / (std[0] + 1e-4) * s for s in (1, -1, -1, 1)]
    expected += [-0.25 / (std[1] + 1e-4)] * 3 + [0.75 / (std[1] + 1e-4)]
    torch.testing.assert_close(found, torch.tensor(expected))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_give_zero_and_groups_are_centered(scale):
    assert not group_advantages(torch.full((8,), 0.75), 4, scale).any()
    found = group_advantages(torch.rand(12), 4, scale).view(3, 4)
    torch.testing.assert_close(found.mean(1), torch.zeros(3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("n", [2, 3])
def test_the_mean_gradient_is_a_known_part_of_the_exact_one(n):
    logits = numbers(3).requires_grad_()
    R = torch.tensor([1.0, 0.0, 0.3], dtype=torch.double)
    exact = torch.autograd.grad((logits.softmax(0) * R).sum(), logits)[0]
    total = torch.zeros(3, dtype=torch.double)
    for group in map(torch.tensor, itertools.product(range(3), repeat=n)):
        logp = logits.log_softmax(0)[group]
        weight = logp.sum().exp().detach()
        loss = (group_advantages(R[group], n, "none") * logp).mean()
        total += weight * torch.autograd.grad(loss, logits)[0]
    torch.testing.assert_close(total, (n - 1) / n * exact)


# --- the losses ---


@pytest.mark.parametrize("name", LOSSES)
def test_on_policy_all_are_policy_gradients(name):
    logprobs, batch = random_batch()
    del batch["old_logprobs"]
    logp = logprobs.requires_grad_()
    total, count = grpo_loss(logp, batch, GRPOConfig(loss=name, longest=7))
    found = torch.autograd.grad(total / count, logp)[0]
    mask = batch["labels"] != -100
    assert not found[~mask].any()
    sign = -batch["advantages"][:, None].sign().expand_as(found)
    assert (found.sign() == sign)[mask].all()


@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_add_up(name):
    logprobs, batch = random_batch(6)
    config = GRPOConfig(loss=name, longest=7, beta=0.1)
    total, count = grpo_loss(logprobs, batch, config)
    parts = [grpo_loss(logprobs[i:i + 2], {k: v[i:i + 2] for k, v in batch.items()}, config)
             for i in (0, 2, 4)]
    split = sum(p[0] for p in parts) / sum(p[1] for p in parts)
    assert torch.isclose(split, total / count) != (name == "bnpo")


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_outside_the_mask_changes_nothing(name):
    logprobs, batch = random_batch()
    mask = batch["labels"] != -100
    config = GRPOConfig(loss=name, longest=7, beta=0.1,
                        sampler_cap=None if name == "vespo" else 2.0)
    spoiled = {k: v.where(mask, -3.0) if k.endswith("logprobs") else v
               for k, v in batch.items()}
    for ours, theirs in zip(grpo_loss(logprobs, batch, config),
                            grpo_loss(logprobs.where(mask, -1.0), spoiled, config)):
        assert float(ours) == pytest.approx(float(theirs))


def test_the_length_bias_of_grpo_and_its_absence():
    mask = torch.arange(6) < torch.tensor([[2], [6]])
    batch = {"labels": torch.where(mask, 1, -100), "advantages": torch.tensor([-1.0, -1.0])}
    for name in LOSSES:
        logp = torch.zeros(2, 6, requires_grad=True)
        total, count = grpo_loss(logp, batch, GRPOConfig(loss=name, longest=6))
        grad = torch.autograd.grad(total / count, logp)[0]
        biased = name in ("grpo", "gspo", "sapo")
        assert (grad[0, 0] / grad[1, 0]).item() == pytest.approx(3 if biased else 1), name


@pytest.mark.parametrize(("change", "message"), [
    ({"loss": "grp"}, "grpo"), ({"epsilon": 0.0}, "epsilon"), ({"beta": -1.0}, "beta"),
    ({"scale_rewards": "std"}, "scale_rewards"), ({"longest": 0}, "longest"),
    ({"loss": "vespo", "sampler_cap": 2.0}, "vespo"), ({"delta": math.inf}, "delta")])
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        GRPOConfig(**change)


def test_names_of_losses_in_any_case():
    assert GRPOConfig(loss="DAPO").loss == "dapo" and GRPOConfig(loss="Dr_GRPO").scale == "none"


def test_a_penalty_needs_a_reference_and_a_group_two():
    with pytest.raises(ValueError, match="reference"):
        grpo_preparer(GRPOConfig(beta=0.1))
    with pytest.raises(ValueError, match="n=1"):
        grpo_preparer(GRPOConfig())({"rewards": torch.ones(2)}, 1)


# --- the objective ---


@pytest.fixture(scope="module")
def base():
    return sums_model()


def loader(model, config, seed=0, reference=None, **settings):
    rollouts = RolloutConfig(**dict(prompts=16, n=8, max_new_tokens=3, chat=False,
                                    seed=seed) | settings)
    return RolloutLoader(model, SumTokenizer(), SumTask(), rollouts,
                         prepare=grpo_preparer(config, reference))


@pytest.mark.parametrize("name", LOSSES)
def test_the_objective_keeps_the_contract(base, name):
    config = GRPOConfig(loss=name, longest=3, beta=0.05)
    batch = next(iter(loader(base, config, reference=base, prompts=2)))
    objective = GRPOObjective(base, config)
    output = objective(batch)
    assert not returns_mean(objective, batch)
    assert set(output.metrics) >= {"reward", "entropy", "length", "finished", "kl",
                                   "no_advantage", "sampler_gap"}
    gap, n = output.metrics["sampler_gap"]
    assert gap / n < 1e-4 and abs(output.metrics["kl"][0]) < 1e-4


def test_numbers_do_not_depend_on_batch_mates(base):
    config = GRPOConfig(loss="dapo")
    batch = next(iter(loader(base, config, prompts=3)))
    objective = GRPOObjective(base, config)
    whole = objective(batch)
    rows = [objective({k: v[i:i + 1] for k, v in batch.items()}) for i in range(24)]
    torch.testing.assert_close(sum(r.loss_sum for r in rows), whole.loss_sum,
                               atol=1e-4, rtol=1e-4)
    assert sum(int(r.n_valid) for r in rows) == int(whole.n_valid)


def trained(base, steps, tmp_path=None, resume=False, **settings):
    config = GRPOConfig(loss=settings.pop("loss", "dapo"), longest=3)
    model = copy.deepcopy(base)
    return train(GRPOObjective(model, config), loader(model, config, **settings), steps,
                 tmp_path, resume)


def test_the_toy_is_solved_within_thirty_steps(base):
    assert 0.4 < expected_reward(base) < 0.7
    assert expected_reward(trained(base, 30, prompts=100).model) > 0.9


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_learns(base, name):
    before = expected_reward(base)
    assert expected_reward(trained(base, 15, loss=name, prompts=50).model) > before + 0.05


def test_a_resumed_run_is_the_uninterrupted_one(base, tmp_path):
    whole = trained(base, 4, tmp_path / "whole", prompts=2).model
    trained(base, 2, tmp_path / "parts", prompts=2)
    parts = trained(base, 4, tmp_path / "parts", resume=True, prompts=2).model
    for a, b in zip(whole.parameters(), parts.parameters()):
        torch.testing.assert_close(a, b, atol=0, rtol=0)
