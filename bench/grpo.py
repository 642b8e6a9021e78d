"""GRPO's family at equal budgets, and one of them on a real chat model.

`losses`: the nine losses on sums of two digits, from the same half-trained model, three seeds, the
same number of samples and updates, each at the best of three learning rates; the expected reward
is exact. Two iterations a batch, so that the ratio is not 1 in every second update. `smollm2`:
SmolLM2-135M-Instruct on `chain_sum` of reasoning-gym, one-digit numbers, 40 updates in bf16; the
mean reward of sampled answers to newly drawn problems before and after. `merge`: one file of both.

    python bench/grpo.py losses               # about 5 minutes on one core
    python bench/grpo.py smollm2              # about 8 minutes on one core
    python bench/grpo.py merge
"""

import argparse
import copy
import itertools
import json
import time

import torch
from common import ROOT, record, write

from skylar.posttrain.grpo import LOSSES, GRPOConfig, GRPOObjective, grpo_preparer
from skylar.posttrain.rollout import (
    ReasoningGymTask,
    RolloutConfig,
    RolloutLoader,
    scored_rollouts,
)
from skylar.posttrain.sums import SumTask, SumTokenizer, expected_reward, sums_model
from skylar.training.optim import AdamWConfig, ScheduleConfig
from skylar.training.run import open_model
from skylar.training.trainer import TrainConfig, Trainer
from skylar.utils.lesson import mean_interval

RATES, SEEDS, UPDATES = (5e-4, 1e-3, 2e-3), range(3), 60
RESULTS = ROOT / "bench" / "results"
PROBLEMS = dict(min_terms=2, max_terms=2, min_digits=1, max_digits=1)
SYSTEM = "Answer with a number only."
SMOLLM2 = RolloutConfig(prompts=4, n=8, max_new_tokens=8, system=SYSTEM)


def trained(model, tokenizer, task, rollouts, config, steps, lr, seed=0, dtype="float32"):
    """Rows of metrics of a run with the Trainer; changes `model`."""
    objective = GRPOObjective(model, config, rollouts.temperature)
    loader = RolloutLoader(model, tokenizer, task, rollouts, prepare=grpo_preparer(config))
    trainer = Trainer(
        objective, loader, TrainConfig(steps=steps, log_every=1, eval_every=0, save_every=0,
                                       device="cpu", dtype=dtype, seed=seed),
        optimizer=AdamWConfig(lr=lr, weight_decay=0.0),
        schedule=ScheduleConfig(kind="wsd", warmup_steps=0), quiet=True)
    return trainer.train()


def losses() -> None:
    """Each loss at each rate, with every seed."""
    base, rows = sums_model(), []
    for name, lr in itertools.product(LOSSES, RATES):
        found = []
        for seed in SEEDS:
            model = copy.deepcopy(base)
            rollouts = RolloutConfig(prompts=50, n=8, max_new_tokens=3, chat=False, seed=seed,
                                     iterations=2)
            trained(model, SumTokenizer(), SumTask(), rollouts,
                    GRPOConfig(loss=name, longest=3), UPDATES, lr, seed)
            found.append(expected_reward(model))
        mean, half = mean_interval(found)
        rows.append({"loss": name, "lr": lr, "reward": mean, "half_width": half,
                     "rewards": found})
    record("grpo_losses", rows, before=expected_reward(base))


def sampled_rewards(model, tokenizer, task, n_problems: int) -> torch.Tensor:
    """Of one sampled answer to each of the first problems."""
    examples = [task[i] for i in range(n_problems)]
    batches = [examples[i:i + 32] for i in range(0, n_problems, 32)]
    config = RolloutConfig(n=1, max_new_tokens=SMOLLM2.max_new_tokens, system=SYSTEM)
    torch.manual_seed(0)
    return torch.cat([scored_rollouts(model, tokenizer, task, part, config,
                                      tokenizer.eos_token_ids)["rewards"] for part in batches])


def smollm2() -> None:
    """SmolLM2-135M-Instruct: new problems, drawn with another seed than training's."""
    model, tokenizer, _ = open_model("smollm2", dtype=torch.float32)
    task = ReasoningGymTask("chain_sum", seed=0, **PROBLEMS)
    new = ReasoningGymTask("chain_sum", seed=1_000_000, **PROBLEMS)
    before, start = sampled_rewards(model, tokenizer, new, 192), time.perf_counter()
    config = GRPOConfig(loss="dapo", longest=SMOLLM2.max_new_tokens)
    rows = trained(model, tokenizer, task, SMOLLM2, config, 40, 1e-5, dtype="bfloat16")
    after = sampled_rewards(model, tokenizer, new, 192)
    rewards = {"before": mean_interval(before.tolist()), "after": mean_interval(after.tolist())}
    right = {"right_before": (before == 1).sum().item(), "right_after": (after == 1).sum().item()}
    record("grpo_smollm2", rows, **rewards, **right, answers=192,
           seconds=time.perf_counter() - start)


def merge() -> None:
    """grpo.json: each loss at its best rate, and SmolLM2."""
    family, real = (json.loads((RESULTS / f"grpo_{name}.json").read_text())
                    for name in ("losses", "smollm2"))
    best = {}
    for row in family["rows"]:
        if row["reward"] > best.get(row["loss"], {"reward": -1})["reward"]:
            best[row["loss"]] = row
    write("grpo", list(best.values()), before=family["before"], smollm2={
        **{name: real[name] for name in ("before", "after", "right_before", "right_after",
                                         "answers")},
        **{name: [row[name] for row in real["rows"]] for name in ("reward", "entropy")}})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=("losses", "smollm2", "merge"))
    {"losses": losses, "smollm2": smollm2, "merge": merge}[parser.parse_args().command]()


if __name__ == "__main__":
    main()
