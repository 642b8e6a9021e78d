"""One process of a small Muon run, started by test_muon.py with torchrun.

`python muon_worker.py OUT SETTINGS`: trains as distributed_worker.py does, with Muon; the first
rank writes losses, weights, the optimizer's state, and the numbers that each rank orthogonalized.
SETTINGS are ParallelConfig's; `muon`: MuonConfig's; `local`: a wrong Muon, of each rank's own part;
`steps`, `out_dir` and `resume` as in the Trainer.
"""

import json
import sys

import torch
from distributed_worker import ACCUMULATE, STEPS, RowsOfRank, V
from faulty import whole

from skylar.models.decoder import CausalLM
from skylar.models.presets import get_config
from skylar.training import muon
from skylar.training.distributed import ParallelConfig
from skylar.training.loss import NextTokenObjective
from skylar.training.muon import MuonConfig
from skylar.training.optim import ScheduleConfig
from skylar.training.trainer import TrainConfig, Trainer
from skylar.utils.processes import (
    gather_objects,
    is_main_process,
    join_processes,
    leave_processes,
    rank_and_size,
)


class ResumableRows(RowsOfRank):
    "The same; it knows how many batches it has given."

    count = 0

    def __iter__(self):
        for batch in list(super().__iter__())[self.count:]:
            self.count += 1
            yield batch

    def state_dict(self) -> dict:
        return {"count": self.count}

    def load_state_dict(self, state: dict) -> None:
        self.count = state["count"]


def main(out: str, settings: dict) -> None:
    join_processes(torch.device("cpu"))
    optimizer, worked = MuonConfig(lr=3e-3, **settings.pop("muon", {})), [0]
    run = {"steps": STEPS, "resume": False, "out_dir": None}
    run = {key: settings.pop(key, value) for key, value in run.items()}
    if settings.pop("local", False):
        muon.sharded_levels = lambda *args: []
    right = muon.orthogonalize

    def counted(matrix, *args):
        worked[0] += matrix.numel()
        return right(matrix, *args)

    muon.orthogonalize = counted
    parallel = ParallelConfig(**settings)
    torch.manual_seed(0)
    # 2 ranks hold whole heads, 3 cut them; 250 hidden units do not divide evenly
    model = CausalLM(get_config("test", family="qwen3", vocab_size=V, d_model=96, n_heads=4,
                                n_kv_heads=2, d_head=24, d_ff=250, n_layers=3, dropout=0.0))
    config = TrainConfig(steps=run["steps"], dtype="float32", log_every=1, device="cpu",
                         grad_accum_steps=ACCUMULATE)
    rows = ResumableRows(*parallel.data_ranks(*rank_and_size()))
    trainer = Trainer(NextTokenObjective(model), rows, config, quiet=True, optimizer=optimizer,
                      parallel=parallel, schedule=ScheduleConfig(kind="constant", warmup_steps=0),
                      out_dir=run["out_dir"])
    rows = trainer.train(resume=run["resume"], extend=run["resume"])
    state = trainer.train_step.optimizer.state
    weights = {name: whole(p) for name, p in model.named_parameters()}
    state = {f"{name} {key}": whole(t) for name, p in model.named_parameters()
             for key, t in state[p].items()}
    worked = gather_objects(worked[0])
    if is_main_process():
        torch.save({"rows": rows, "weights": weights, "state": state, "worked": worked}, out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], json.loads(sys.argv[2]))
    leave_processes()
