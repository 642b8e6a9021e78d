"""One process of a small training run, started by test_distributed.py with torchrun.

`python distributed_worker.py OUT FAMILY SETTINGS`: trains six steps of a small model on rows with
very different numbers of targets, and the first rank writes losses, norms and whole weights.
"""

import json
import sys

import torch
from faulty import whole

from skylar.models.decoder import CausalLM
from skylar.models.presets import get_config
from skylar.training.distributed import ParallelConfig
from skylar.training.loss import NextTokenObjective
from skylar.training.optim import AdamWConfig, ScheduleConfig
from skylar.training.trainer import TrainConfig, Trainer
from skylar.utils.processes import is_main_process, join_processes, leave_processes, rank_and_size

V, T, GLOBAL_BATCH, ACCUMULATE, STEPS = 300, 24, 8, 2, 6


def batches() -> list[dict]:
    "Row 0 has almost no targets, row 7 all: ranks that split the rows have unequal counts."
    generator, made = torch.Generator().manual_seed(1), []
    share = torch.linspace(0.05, 1, GLOBAL_BATCH)[:, None]
    for _ in range(STEPS * ACCUMULATE):
        ids = torch.randint(0, V, (GLOBAL_BATCH, T + 1), generator=generator)
        labels = ids[:, 1:].clone()
        labels[torch.rand(GLOBAL_BATCH, T, generator=generator) >= share] = -100
        made.append({"input_ids": ids[:, :-1], "labels": labels})
    return made


class RowsOfRank:
    "The rows of each batch that a rank reads."

    def __init__(self, rank: int, size: int):
        self.rows = slice(rank * GLOBAL_BATCH // size, (rank + 1) * GLOBAL_BATCH // size)

    def __iter__(self):
        for batch in batches():
            yield {name: value[self.rows].contiguous() for name, value in batch.items()}


def main(out: str, family: str, settings: dict) -> None:
    join_processes(torch.device("cpu"))
    parallel = ParallelConfig(**settings)
    rank, size = parallel.data_ranks(*rank_and_size())
    torch.manual_seed(0)
    model = CausalLM(get_config("test", family=family, vocab_size=V, n_layers=2, dropout=0.0))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = TrainConfig(steps=STEPS, dtype="float32", log_every=1, device="cpu",
                         grad_accum_steps=ACCUMULATE)
    trainer = Trainer(NextTokenObjective(model), RowsOfRank(rank, size), config, quiet=True,
                      optimizer=AdamWConfig(lr=3e-3), parallel=parallel,
                      schedule=ScheduleConfig(kind="constant", warmup_steps=0))
    rows = trainer.train()
    weights = {name: whole(p) for name, p in model.named_parameters()}
    if is_main_process():
        torch.save({"rows": rows, "start": start, "weights": weights}, out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
    leave_processes()
