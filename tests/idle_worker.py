"""Two ranks of DDP with a head that is used by one rank, at some steps; see test_guard.

`python idle_worker.py OUT`: the first rank writes what became of the head's weights, per step."""

import json
import sys
from pathlib import Path

import torch
from byte_corpus import corpus, write
from faulty import Faulty
from guard_worker import make_trainer, weights_hash

from skylar.training.distributed import ParallelConfig
from skylar.utils.processes import (
    gather_objects,
    is_main_process,
    join_processes,
    leave_processes,
    on_main,
    rank_and_size,
)


class TwoHeads(Faulty):
    "A second head, used by rank 0 in every second step."

    def __init__(self, model):
        super().__init__(model)
        self.head = torch.nn.Linear(16, 1)
        self.step = 0

    def forward(self, batch):
        out = super().forward(batch)
        self.step += self.training
        if rank_and_size()[0] or not self.training or self.step % 2:
            return out
        hidden = self.model.model.norm.weight[None]
        return out._replace(loss_sum=out.loss_sum + self.head(hidden).sum())


def main(out: Path) -> None:
    join_processes(torch.device("cpu"))
    rank, size = rank_and_size()
    on_main(write, corpus(), out / "data")
    seen = []
    trainer = make_trainer(
        out / "data", rank=rank, size=size, objective=TwoHeads, steps=4, save_every=0,
        parallel=ParallelConfig(strategy="ddp"),
        callbacks=[lambda row: seen.append(trainer.objective.head.weight.sum().item())])
    trainer.train()
    found = gather_objects({"head": seen, "hash": weights_hash(trainer.objective)})
    if is_main_process():
        (out / "idle.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
    leave_processes()
