"""One process of a small GRPO or PPO run, started by test_rl_ranks.py with torchrun.

`python rl_worker.py OUT KIND START SETTINGS`: KIND is grpo or ppo; START holds the weights to
start from, since training them anew in each process may round differently; SETTINGS are the
config's, and `steps`, `out_dir`, `resume` as in the Trainer. The first rank writes rows of
metrics and weights.
"""

import copy
import json
import sys

import torch

from skylar.posttrain.grpo import GRPOConfig, GRPOObjective, grpo_preparer
from skylar.posttrain.ppo import PPOConfig, PPOObjective, ppo_preparer
from skylar.posttrain.rollout import RolloutConfig, RolloutLoader
from skylar.posttrain.sums import SumTask, SumTokenizer, sums_model
from skylar.training.distributed import ParallelConfig
from skylar.training.optim import AdamWConfig, ScheduleConfig
from skylar.training.trainer import TrainConfig, Trainer
from skylar.utils.processes import (
    is_main_process,
    join_processes,
    leave_processes,
    rank_and_size,
)


def parts(kind: str, model, settings: dict):
    """Objective, and what prepares its batches; a reference is in both."""
    reference = copy.deepcopy(model)
    if kind == "grpo":
        config = GRPOConfig(longest=3, beta=0.05, **settings)
        return GRPOObjective(model, config), grpo_preparer(config, reference)
    objective = PPOObjective(model, PPOConfig(kl_target=0.1, kl_horizon=200, **settings))
    return objective, ppo_preparer(objective, reference)


def train(objective, loader, steps: int, out_dir=None, resume=False, *, lr: float = 2e-3,
          grad_accum_steps: int = 1, parallel=None) -> Trainer:
    """A Trainer that has run to its last step, at a constant rate and in float32."""
    trainer = Trainer(
        objective, loader,
        TrainConfig(steps=steps, log_every=1, eval_every=0, save_every=2, device="cpu",
                    dtype="float32", async_save=False, grad_accum_steps=grad_accum_steps),
        optimizer=AdamWConfig(lr=lr, weight_decay=0.0), out_dir=out_dir, quiet=True,
        schedule=ScheduleConfig(kind="constant", warmup_steps=0),
        **({"parallel": parallel} if parallel else {}))
    trainer.train(resume=resume, extend=resume)
    return trainer


def main(out: str, kind: str, start: str, settings: dict) -> None:
    join_processes(torch.device("cpu"))
    run = {"steps": 4, "resume": False, "out_dir": None}
    run = {key: settings.pop(key, value) for key, value in run.items()}
    model = sums_model(steps=0)
    model.load_state_dict(torch.load(start))
    objective, prepare = parts(kind, model, settings)
    parallel = ParallelConfig(strategy="ddp")
    rank, size = parallel.data_ranks(*rank_and_size())
    rollouts = RolloutConfig(prompts=4, n=4, max_new_tokens=3, chat=False, iterations=2)
    loader = RolloutLoader(objective.model, SumTokenizer(), SumTask(), rollouts,
                           prepare=prepare, rank=rank, world_size=size, grad_accum_steps=2)
    trainer = train(objective, loader, run["steps"], run["out_dir"], run["resume"], lr=1e-3,
                    grad_accum_steps=2, parallel=parallel)
    if is_main_process():
        torch.save({"rows": trainer.metrics.rows, "weights": objective.state_dict()}, out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:4], json.loads(sys.argv[4]))
    leave_processes()
