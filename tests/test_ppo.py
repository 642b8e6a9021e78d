"""PPO: advantages, penalties and losses by hand and as TRL's; it finds a known optimum."""

import copy
import itertools

import pytest
import torch
from golden_cases import golden
from rl_worker import train

from skylar.posttrain.ppo import (
    PPOConfig,
    PPOObjective,
    clipped_loss,
    gae,
    kl_estimate,
    ppo_losses,
    ppo_preparer,
    token_rewards,
    value_loss,
    whiten,
)
from skylar.posttrain.rollout import RolloutConfig, RolloutLoader
from skylar.posttrain.sums import SumTask, SumTokenizer, expected_reward, sums_model
from skylar.training.objective import returns_mean

CASES = ("plain", "short_horizon", "reward_to_go")


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed),
                       dtype=torch.double)


# --- TRL ---


def test_all_golden_cases_are_used():
    assert set(golden("ppo")) == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_rewards_advantages_losses_and_gradients_are_trls(name):
    case = golden("ppo")[name]
    x, leaves = case.inputs, case.leaves()
    config = PPOConfig(**{k: x[k] for k in ("gamma", "lam") if k in x})
    mask, old_values = x["mask"], x["old_values"] * x["mask"]
    rewards, _ = token_rewards(x["scores"], x["old_logprobs"], x["ref_logprobs"], mask, 0.05)
    advantages, returns = gae(rewards, old_values, mask, config.gamma, config.lam)
    advantages = whiten(advantages, mask)
    for ours, key in ((rewards, "rewards"), (advantages, "advantages"), (returns, "returns")):
        torch.testing.assert_close(ours * mask, case.outputs[key])
    batch = {"old_logprobs": x["old_logprobs"], "old_values": old_values,
             "advantages": advantages, "returns": returns}
    policy, value = ((losses * mask).sum() / mask.sum() for losses in ppo_losses(
        leaves["logprobs"], leaves["values"], batch, config))
    torch.testing.assert_close(policy, case.outputs["policy_loss"])
    case.check(leaves, policy + config.value_coef * value)


# --- advantages ---


def test_gae_by_hand():
    rewards = torch.tensor([[0.0, 0, 0, 0, 1]])
    values = torch.tensor([[0.2, 0.4, 0.3, 0.6, 0.8]])
    delta = [0.2, -0.1, 0.3, 0.2, 0.2]
    expected = [sum(0.95 ** (k - t) * delta[k] for k in range(t, 5)) for t in range(5)]
    found, returns = gae(rewards, values, torch.ones(1, 5))
    torch.testing.assert_close(found[0], torch.tensor(expected))
    torch.testing.assert_close(returns, found + values)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_lambda_one_is_the_return_and_zero_one_step(gamma):
    rewards, values = numbers(3, 6), numbers(3, 6, seed=1)
    mask = torch.ones(3, 6)
    to_go = [sum(gamma ** (k - t) * rewards[:, k] for k in range(t, 6)) for t in range(6)]
    _, returns = gae(rewards, values, mask, gamma, 1.0)
    torch.testing.assert_close(returns, torch.stack(to_go, 1))
    following = torch.cat([values[:, 1:], torch.zeros(3, 1)], 1)
    found, _ = gae(rewards, values, mask, gamma, 0.0)
    torch.testing.assert_close(found, rewards + gamma * following - values)


def test_prompts_and_padding_change_no_advantage():
    rewards, values = numbers(1, 3), numbers(1, 3, seed=1)
    alone, _ = gae(rewards, values, torch.ones(1, 3))
    wide = [torch.cat([numbers(1, 2, seed=5), x, numbers(1, 4, seed=6)], 1)
            for x in (rewards, values)]
    mask = torch.tensor([[0, 0, 1, 1, 1, 0, 0, 0, 0]])
    found, _ = gae(*wide, mask)
    torch.testing.assert_close(found[:, 2:5], alone)


def test_whitened():
    values, mask = numbers(4, 5), torch.ones(4, 5)
    mask[2, 3:] = 0
    kept = whiten(values, mask)[mask.bool()]
    assert abs(kept.mean()) < 1e-7 and abs(kept.var() - 1) < 1e-6
    moved = whiten(values, mask, center=False)[mask.bool()]
    torch.testing.assert_close(moved.mean(), values[mask.bool()].mean())


# --- penalties and losses ---


def test_estimators_are_right_on_average():
    p, q = numbers(6).softmax(0), numbers(6, seed=1).softmax(0)
    exact = (p * (p / q).log()).sum()
    for kind in ("k1", "k3"):
        torch.testing.assert_close((p * kl_estimate(p.log(), q.log(), kind)).sum(), exact)
    assert (kl_estimate(p.log(), q.log(), "k3") >= 0).all()


def test_the_score_is_added_at_the_last_token():
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 1, 0, 0]]).bool()
    rewards, kl = token_rewards(torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3, 4),
                                torch.full((3, 4), -0.5), mask, 0.1)
    expected = -0.05 * mask.float()
    expected[0, 2] += 1
    expected[1, 3] += 2
    expected[2, 1] += 3
    torch.testing.assert_close(rewards, expected)
    assert kl.sum() == 0.5 * mask.sum()


@pytest.mark.parametrize(("ratio", "advantage", "loss", "slope"), [
    (1.5, 1.0, -1.2, 0.0), (0.5, 1.0, -0.5, -1.0), (1.5, -1.0, 1.5, 1.0),
    (0.5, -1.0, 0.8, 0.0), (1.1, 2.0, -2.2, -2.0)])
def test_clipping_by_hand(ratio, advantage, loss, slope):
    x = torch.tensor(ratio, requires_grad=True)
    found = clipped_loss(x, torch.tensor(advantage))
    found.backward()
    assert found.item() == pytest.approx(loss) and x.grad.item() == pytest.approx(slope)


def test_two_sided_clipping_bounds_a_bad_token():
    x = torch.tensor(9.0, requires_grad=True)
    found = clipped_loss(x, torch.tensor(-1.0), delta=3.0)
    found.backward()
    assert found.item() == 3 and x.grad.item() == 0


def test_the_value_loss_is_the_worse_of_two():
    old, returns = torch.tensor([0.0]), torch.tensor([1.0])
    assert value_loss(torch.tensor([0.9]), old, returns, 0.2).item() == pytest.approx(0.32)
    assert value_loss(torch.tensor([0.9]), old, returns, None).item() == pytest.approx(0.005)
    assert value_loss(torch.tensor([-1.0]), old, returns, 0.2).item() == pytest.approx(2.0)


@pytest.mark.parametrize("change", [
    {"kl_estimator": "k2"}, {"clip": 0.0}, {"gamma": 1.1}, {"lam": -0.1}, {"kl_coef": -1.0}])
def test_impossible_settings_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        PPOConfig(**change)


# --- the objective ---


@pytest.fixture(scope="module")
def base():
    return sums_model()


def loader(objective, reference=None, task=None, **settings):
    rollouts = RolloutConfig(**dict(prompts=16, n=1, max_new_tokens=3, chat=False) | settings)
    return RolloutLoader(objective.model, SumTokenizer(), task or SumTask(), rollouts,
                         prepare=ppo_preparer(objective, reference))


def test_the_objective_keeps_the_contract(base):
    objective = PPOObjective(copy.deepcopy(base))
    batch = next(iter(loader(objective, base)))
    output = objective(batch)
    assert not returns_mean(objective, batch)
    assert output.n_valid == (batch["labels"] != -100).sum()
    for name in ("reward", "kl", "entropy", "policy_loss", "value_loss", "outside"):
        assert name in output.metrics
    assert output.metrics["outside"][0] == 0 and abs(output.metrics["kl"][0]) < 1e-4
    output.loss_sum.backward()
    assert objective.value_head.weight.grad.abs().sum() > 0
    assert all(p.grad is not None for p in objective.parameters())


def test_micro_batches_add_up(base):
    objective = PPOObjective(copy.deepcopy(base))
    batch = next(iter(loader(objective, base)))
    whole = objective(batch)
    halves = [objective({k: v[i:i + 8] for k, v in batch.items()}) for i in (0, 8)]
    torch.testing.assert_close(sum(h.loss_sum for h in halves), whole.loss_sum)
    assert sum(h.n_valid for h in halves) == whole.n_valid


def test_the_value_head_learns_the_mean_reward(base):
    objective = PPOObjective(copy.deepcopy(base).requires_grad_(False),
                             PPOConfig(kl_coef=0.0, value_clip=None, value_coef=1.0))
    objective.value_head.requires_grad_(True)
    optimizer, found = torch.optim.Adam(objective.value_head.parameters(), 0.05), []
    for batch in itertools.islice(loader(objective, prompts=64), 60):
        optimizer.zero_grad()
        output = objective(batch)
        (output.loss_sum / output.n_valid).backward()
        optimizer.step()
        found.append(output.metrics["value_loss"][0].item() / int(output.n_valid))
    assert sum(found[-10:]) < 0.8 * sum(found[:10])


def test_the_price_follows_the_target(base):
    objective = PPOObjective(copy.deepcopy(base), PPOConfig(kl_target=1.0, kl_horizon=10))
    keep, start = torch.tensor(True), objective.kl_coef.item()
    objective.after_step({"kl": torch.tensor([20.0, 10.0])}, keep)  # 2 nats: too far
    assert objective.kl_coef.item() == pytest.approx(start * 1.2)
    objective.after_step({"kl": torch.tensor([20.0, 10.0])}, ~keep)
    assert objective.kl_coef.item() == pytest.approx(start * 1.2)
    objective.after_step({"kl": torch.tensor([9.0, 10.0])}, keep)
    assert objective.kl_coef.item() == pytest.approx(start * 1.2 * 0.9)
    assert "kl_coef" in objective.state_dict()


def trained(base, steps, tmp_path=None, resume=False, config=None, **settings):
    objective = PPOObjective(copy.deepcopy(base), config or PPOConfig(kl_coef=0.0))
    settings = dict(prompts=128, iterations=2) | settings
    return train(objective, loader(objective, base, **settings), steps, tmp_path, resume)


def test_the_toy_is_learned(base):
    assert expected_reward(trained(base, 60).model) > 0.85 > 0.7 > expected_reward(base)


def test_a_resumed_run_is_the_uninterrupted_one(base, tmp_path):
    config = PPOConfig(kl_target=0.1, kl_horizon=100)
    settings = {"config": config, "prompts": 8}
    whole = trained(base, 4, tmp_path / "whole", **settings).objective
    trained(base, 2, tmp_path / "parts", **settings)
    parts = trained(base, 4, tmp_path / "parts", resume=True, **settings).objective
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(value, parts.state_dict()[name], atol=0, rtol=0)


def test_a_flawed_reward_is_exploited_and_a_price_prevents_it(base):
    class Flawed(SumTask):
        def score(self, text, example):
            return 1.5 if text == "7" else super().score(text, example)

    ends = {}
    for coef in (0.0, 0.5):
        config = PPOConfig(kl_coef=coef)
        ends[coef] = expected_reward(trained(base, 80, config=config, task=Flawed()).model)
    assert ends[0.0] < 0.3 < ends[0.5]


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_the_optimum_of_the_penalized_reward_is_found(beta):
    R = torch.tensor([0.0, 0.3, 1.0, 0.5, 0.9])
    ref = torch.tensor([0.35, 0.3, 0.05, 0.2, 0.1])
    best = ref * (R / beta).exp()
    best = best / best.sum()
    torch.manual_seed(0)
    logits, value = ref.log().requires_grad_(), torch.zeros((), requires_grad=True)
    optimizer, seen = torch.optim.Adam([logits, value], 0.01), []
    for _ in range(600):
        with torch.no_grad():
            drawn = torch.multinomial(logits.softmax(0), 512, replacement=True)[:, None]
            old, mask = logits.log_softmax(0)[drawn], torch.ones(512, 1).bool()
            rewards, _ = token_rewards(R[drawn][:, 0], old, ref.log()[drawn], mask, beta)
            advantages, returns = gae(rewards, value.expand(512, 1), mask)
            batch = {"old_logprobs": old, "old_values": value.expand(512, 1).clone(),
                     "advantages": advantages, "returns": returns}
        optimizer.zero_grad()
        losses = ppo_losses(logits.log_softmax(0)[drawn], value.expand(512, 1), batch,
                            PPOConfig())
        sum(x.mean() for x in losses).backward()
        optimizer.step()
        seen.append(logits.detach().softmax(0))
    assert (torch.stack(seen[-200:]).mean(0) - best).abs().max() < 0.03
