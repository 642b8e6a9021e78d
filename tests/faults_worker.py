"""Training that test_faults.py and bench/faults.py start, kill and resume.

`python faults_worker.py resize OUT`: one stage of a run on several numbers of processes, under
torchrun; the documents that each rank reads go to OUT/read-STAGE-RANK.json.

`python faults_worker.py together OUT BATCH`: all that must resume bit for bit, in one run that ends
after so many micro-batches; OUT/digest is the hash of weights and moments.

`python faults_worker.py elastic WORDS`: `skylar WORDS` with a rank that gets killed once.
"""

import hashlib
import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import torch
from faulty import whole
from torch import nn

from skylar.cli import main as skylar
from skylar.data.loader import PackedLoader
from skylar.data.shards import ShardDataset
from skylar.models.decoder import CausalLM
from skylar.models.presets import get_config
from skylar.training.checkpoint_files import checkpoint_tensors
from skylar.training.distributed import ParallelConfig
from skylar.training.loss import NextTokenObjective
from skylar.training.muon import MuonConfig
from skylar.training.mup import MupConfig
from skylar.training.optim import AdamWConfig, ScheduleConfig
from skylar.training.trainer import TrainConfig, Trainer, TrainStep
from skylar.utils.processes import (
    is_main_process,
    join_processes,
    leave_processes,
    rank_and_size,
    restart_count,
)

V, T, DOCUMENTS = 64, 8, 48
MUP = MupConfig(base_d_model=8, base_n_layers=1, base_d_head=4)


def dataset(packed: bool = False) -> ShardDataset:
    """Documents of T tokens, each of which says in its first two tokens which one it is.

    `packed`: as many tokens, of documents of 2 to 10 of them, so that windows hold several."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(1, V, (DOCUMENTS, T), generator=generator)
    rows[:, 0], rows[:, 1] = torch.arange(DOCUMENTS) // 40 + 1, torch.arange(DOCUMENTS) % 40 + 1
    starts = range(0, DOCUMENTS * T, T)
    if packed:
        lengths = torch.randint(2, 11, (DOCUMENTS * T,), generator=generator)
        starts = [0, *(n for n in lengths.cumsum(0).tolist() if n < DOCUMENTS * T)]
    return ShardDataset.from_ids(rows.flatten(), starts=starts, vocab_size=V)


def documents_of(batch: dict) -> list[int]:
    "Which documents are in a batch of windows that begin with a document."
    first = batch["input_ids"][:, :2].tolist()
    return [40 * (a - 1) + b - 1 for a, b in first]


class Recorded:
    "A loader that remembers which documents it has handed out."

    def __init__(self, loader: PackedLoader):
        self.loader, self.read = loader, []
        self.rank, self.world_size = loader.rank, loader.world_size
        self.state_dict, self.load_state_dict = loader.state_dict, loader.load_state_dict

    def __iter__(self):
        for batch in self.loader:
            self.read.append(documents_of(batch))
            yield batch


class Workers:
    "Batches of a DataLoader with worker processes that run ahead; counts what it handed out."

    def __init__(self, loader: PackedLoader):
        self.loader, self.count = loader, 0

    def __len__(self):
        return 1000

    def __getitem__(self, i):
        return self.loader._batch(i * self.loader.batch_size * self.loader.world_size)

    def __iter__(self):
        ahead = torch.utils.data.DataLoader(  # without a generator, it draws from the global one
            self, batch_size=None, num_workers=2, sampler=range(self.count, 1000),
            generator=torch.Generator())
        for batch in ahead:
            self.count += 1
            yield batch

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


class Killed(BaseException):
    "Nothing after it runs."


class Cut:
    "Ends as by SIGKILL when the micro-batch after number `last` is asked for."

    def __init__(self, loader: Workers, last: int):
        self.loader, self.last = loader, last
        self.state_dict, self.load_state_dict = loader.state_dict, loader.load_state_dict

    def __iter__(self):
        for item in self.loader:
            if self.loader.count > self.last:
                raise Killed
            yield item


class Idle(nn.Module):
    "The next token, with a trainable second head that nothing uses."

    def __init__(self, model):
        super().__init__()
        self.model, self.idle = model, nn.Linear(4, 4)
        self.inner = [NextTokenObjective(model)]  # in a list: no child of this module

    def forward(self, batch):
        return self.inner[0](batch)


def build(out: Path | None, steps: int, *, batch_size: int = 6, muon: bool = False,
          idle: bool = False, mup: bool = False, packed: bool = False, dropout: float = 0.0,
          parallel=None, accumulate: int = 2, prefetch: int = 2, **config):
    "A Trainer of a tiny Qwen3 on `dataset()`; the batch is divided among the ranks."
    rank, size = (parallel or ParallelConfig()).data_ranks(*rank_and_size())
    loader = Recorded(PackedLoader(
        dataset(packed), batch_size=batch_size // size, seq_len=T, seed=5, rank=rank,
        world_size=size, prefetch=prefetch))
    torch.manual_seed(0)
    sizes = dict(d_model=16, n_heads=2, n_kv_heads=1, d_head=8, d_ff=32, n_layers=2)
    mup = MUP if mup else MupConfig()
    model = CausalLM(mup.model(get_config("test", vocab_size=V, max_seq_len=32, dropout=dropout,
                                          **sizes)))
    if idle:  # Muon's, while the second head is AdamW's
        model.model.layers[0].idle = nn.Linear(8, 8, bias=False)
    train = {"steps": steps, "grad_accum_steps": accumulate, "log_every": 1, "dtype": "float32",
             "device": "cpu", "save_every": 0, **config}
    return Trainer((Idle if idle else NextTokenObjective)(model), loader, TrainConfig(**train),
                   optimizer=mup.optimizer(MuonConfig() if muon else AdamWConfig(lr=3e-3)),
                   schedule=ScheduleConfig(warmup_steps=2), parallel=parallel, quiet=True,
                   out_dir=out)


def digest(trainer: Trainer) -> str:
    "SHA-256 of every weight, buffer and moment, by name."
    tensors = checkpoint_tensors(trainer.model, trainer.train_step.optimizer, trainer.objective)
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode())
        found.update(whole(tensor).contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def stop_after(step: int):
    return lambda row: row["step"] == step


def resize(out: Path) -> None:
    "Go on for three steps in as many processes as there are."
    join_processes(torch.device("cpu"))
    trainer = build(out, steps=12, parallel=ParallelConfig(), accumulate=1, async_save=True)
    stage = int(os.environ["STAGE"])
    trainer.metrics.callbacks = (stop_after(3 * stage + 3),)
    trainer.train(resume=True)
    rank, _ = rank_and_size()
    (out / f"read-{stage}-{rank}.json").write_text(json.dumps(trainer.loader.read))
    weights = {name: whole(p) for name, p in trainer.model.named_parameters()}
    if rank == 0:
        torch.save(weights, out / "weights.pt")
    leave_processes()


TOGETHER = dict(muon=True, mup=True, packed=True, dropout=0.1, workers=True, idle=True)


def together(out: Path, last: int) -> None:
    "Go on to micro-batch `last`, in as many processes as there are."
    join_processes(torch.device("cpu"))
    settings = {k: v for k, v in TOGETHER.items() if k != "workers"}
    trainer = build(out, steps=12, parallel=ParallelConfig(), save_every=1, **settings)
    trainer.loader = Cut(Workers(trainer.loader.loader), last)
    with suppress(Killed):
        trainer.train(resume=True)
    found = digest(trainer)
    if is_main_process():
        (out / "digest").write_text(found)
    leave_processes()


def elastic(words: list[str]) -> int:
    "`skylar WORDS`; at the first start, rank 1 kills itself before its ninth step."
    step_of = TrainStep.__call__

    def killing(self, batches, step, time_done=0.0):
        if step == 8 and rank_and_size()[0] == 1 and not restart_count():
            os.kill(os.getpid(), signal.SIGKILL)
        return step_of(self, batches, step, time_done)

    TrainStep.__call__ = killing
    return skylar(words)


if __name__ == "__main__":
    torch.set_num_threads(1)
    command, *words = sys.argv[1:]
    if command == "elastic":
        sys.exit(elastic(words))
    resize(Path(words[0])) if command == "resize" else together(Path(words[0]), int(words[1]))
