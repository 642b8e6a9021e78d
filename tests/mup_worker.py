"""One process of a small muP run, started by test_mup.py with torchrun.

`python mup_worker.py OUT SETTINGS`: trains as distributed_worker.py does, with muP; the first rank
writes losses, whole weights and the parameter groups, by names. SETTINGS are ParallelConfig's;
`muon`: Muon, not AdamW.
"""

import json
import sys

import torch
from distributed_worker import ACCUMULATE, STEPS, RowsOfRank, V
from faulty import whole

from skylar.models.decoder import CausalLM
from skylar.models.presets import get_config
from skylar.training.distributed import ParallelConfig
from skylar.training.loss import NextTokenObjective
from skylar.training.muon import MuonConfig
from skylar.training.mup import MupConfig
from skylar.training.optim import AdamWConfig, ScheduleConfig
from skylar.training.trainer import TrainConfig, Trainer
from skylar.utils.processes import is_main_process, join_processes, leave_processes, rank_and_size

MUP = MupConfig(base_d_model=32, base_n_layers=1, base_d_head=16)


def main(out: str, settings: dict) -> None:
    join_processes(torch.device("cpu"))
    optimizer = MuonConfig(lr=3e-3) if settings.pop("muon", False) else AdamWConfig(lr=3e-3)
    parallel = ParallelConfig(**settings)
    torch.manual_seed(0)
    model = CausalLM(MUP.model(get_config("test", vocab_size=V, n_layers=2, dropout=0.0)))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = TrainConfig(steps=STEPS, dtype="float32", log_every=1, device="cpu",
                         grad_accum_steps=ACCUMULATE)
    rows_of_rank = RowsOfRank(*parallel.data_ranks(*rank_and_size()))
    trainer = Trainer(NextTokenObjective(model), rows_of_rank, config, quiet=True,
                      optimizer=MUP.optimizer(optimizer), parallel=parallel,
                      schedule=ScheduleConfig(kind="constant", warmup_steps=0))
    rows = trainer.train()
    names = {p: name for name, p in model.named_parameters()}
    groups = [({k: g[k] for k in ("lr", "weight_decay", "eps") if k in g},
               sorted(names[p] for p in g["params"]))
              for g in trainer.train_step.optimizer.param_groups]
    weights = {name: whole(p) for name, p in model.named_parameters()}
    if is_main_process():
        torch.save({"losses": [row["loss"] for row in rows], "weights": weights,
                    "start": start, "groups": groups}, out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], json.loads(sys.argv[2]))
    leave_processes()
