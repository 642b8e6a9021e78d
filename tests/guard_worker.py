"""A small model on marked batches, alone or in the processes that torchrun starts; see test_guard.

`python guard_worker.py OUT SETTINGS`: the last process meets bad batches, and the first one writes
what each saw: its decisions and a hash of the whole weights after every step. SETTINGS are
ParallelConfig's; `kind`: what is bad, of KINDS."""

import hashlib
import json
import sys
from pathlib import Path

import torch
from byte_corpus import corpus, write
from faulty import Faulty, whole

from skylar.data.loader import PackedLoader
from skylar.data.shards import ShardDataset
from skylar.models.decoder import CausalLM
from skylar.models.presets import get_config
from skylar.training.distributed import ParallelConfig
from skylar.training.guard import GuardConfig
from skylar.training.optim import AdamWConfig, ScheduleConfig
from skylar.training.trainer import TrainConfig, Trainer
from skylar.utils.processes import (
    gather_objects,
    is_main_process,
    join_processes,
    leave_processes,
    on_main,
    rank_and_size,
)

NAN = float("nan")


class Marked(PackedLoader):
    "Batches that carry a factor for the loss: `factor` for samples in [first, last), else 1."

    first, last, factor, bad_rank = 0, 0, NAN, None

    def _batch(self, sample):
        here = self.first <= sample < self.last and self.bad_rank in (None, self.rank)
        batch = super()._batch(sample)
        return batch | {"factor": torch.full((len(batch["labels"]),), self.factor if here else 1.0)}


class FaultyGradient(Faulty):
    """The loss is what it should be; where the batch is marked, the gradient of the last norm is
    infinite. Unlike a hook, this works when the parameter has been replaced by a shard."""

    def forward(self, batch):
        factor, weight = batch["factor"], self.model.model.norm.weight
        out = super().forward(batch | {"factor": torch.ones_like(factor)})
        if factor.isfinite().all():
            return out
        zero = (weight - weight.detach()).sum().sqrt()
        return out._replace(loss_sum=out.loss_sum + zero)


def make_trainer(data: Path, out: Path | None = None, *, bad=(0, 0), factor=NAN,
                 bad_rank=None, objective=Faulty, guard=None, callbacks=(), parallel=None,
                 rank=0, size=1, rows=4, n_layers=1, dropout=0.0, lr=3e-3, **train) -> Trainer:
    loader = Marked(ShardDataset(data), batch_size=rows // size, seq_len=16, rank=rank,
                    world_size=size, seed=1)
    loader.first, loader.last, loader.factor, loader.bad_rank = *bad, factor, bad_rank
    torch.manual_seed(0)
    model = CausalLM(get_config(
        "test", family="qwen3", vocab_size=258, d_model=16, n_heads=2, n_kv_heads=2, d_head=8,
        d_ff=32, n_layers=n_layers, max_seq_len=32, dropout=dropout))
    config = TrainConfig(**{"steps": 20, "dtype": "float32", "device": "cpu", "log_every": 1,
                            "save_every": 4, "eval_every": 0, **train})
    return Trainer(objective(model), loader, config, optimizer=AdamWConfig(lr=lr), quiet=True,
                   schedule=ScheduleConfig(kind="constant", warmup_steps=0), out_dir=out,
                   guard=guard, callbacks=callbacks, parallel=parallel)


def weights_hash(model) -> str:
    "SHA-256 of all weights, gathered if they are sharded."
    digest = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        digest.update(name.encode() + whole(p).cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


BACK = GuardConfig(rollback=1, max_nonfinite_steps=3)
KINDS = {  # of which the last process alone knows
    "loss": dict(bad=(32, 44), guard=BACK),
    "gradient": dict(bad=(32, 44), guard=BACK, objective=FaultyGradient),
    "spike": dict(bad=(48, 52), factor=16.0, guard=GuardConfig(spike_factor=2.0, spike_window=8)),
}


def main(out: Path, settings: dict) -> None:
    join_processes(torch.device("cpu"))
    kind, process, n = KINDS[settings.pop("kind", "loss")], *rank_and_size()
    parallel = ParallelConfig(**settings)
    rank, size = parallel.data_ranks(process, n)
    data = out / "data"
    on_main(write, corpus(), data)
    kept, hashes = [], []
    trainer = make_trainer(
        data, out / "run", bad_rank=rank if process == n - 1 else -1, rank=rank, size=size,
        n_layers=2, parallel=parallel, **kind,
        callbacks=[lambda row: hashes.append(weights_hash(trainer.model))])
    guard = trainer.train_step.guard
    decide = guard.decide

    def noted(*args):
        kept.append(bool(keep := decide(*args)))
        return keep

    guard.decide = noted
    trainer.train()
    found = gather_objects({"hash": hashes, "step": trainer.progress.step, "kept": kept,
                            "rollbacks": guard.rollbacks, "spikes": int(guard.spikes.count)})
    if is_main_process():
        (out / "result.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    leave_processes()
