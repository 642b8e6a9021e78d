"""The reward model's loss: `compute_loss` of TRL's RewardTrainer, with margin and centering."""

from collections import defaultdict
from types import SimpleNamespace

import torch
from golden_trl import case, numbers
from trl.trainer.reward_trainer import RewardTrainer

WHEELS = {"trl": "1.16.0"}


def their_loss(rewards, margin=None, centering=None):
    """On (2, B) rewards of chosen and rejected answers."""
    accelerator = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    self = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=accelerator, _total_train_tokens=0,
        _tp_size=1, _metrics=defaultdict(lambda: defaultdict(list)),
        args=SimpleNamespace(center_rewards_coefficient=centering))
    batch = {"attention_mask": torch.ones(2, 3)}
    if margin is not None:
        batch["margin"] = margin

    def model(**inputs):
        return SimpleNamespace(logits=rewards.reshape(-1, 1))

    return RewardTrainer.compute_loss(self, model, batch)


def cases():
    rewards = numbers(2, 5, seed=0, scale=2.0)
    margin = numbers(5, seed=1).abs()
    case("plain", {"rewards": rewards}, their_loss)
    case("margin", {"rewards": rewards, "margin": margin}, their_loss)
    case("centering", {"rewards": rewards, "centering": 0.01}, their_loss)
    case("both", {"rewards": rewards, "margin": margin, "centering": 0.1}, their_loss)
