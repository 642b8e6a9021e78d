"""A small model whose layers return extras, and an auxiliary that counts them; see
test_step_statistics.py, whose processes import everything from here.

Each layer sends a token to one of four maps. A bias, a buffer that no gradient moves, decides too,
and `Balance` moves it after each update, as far as the whole step's counts say. So a count that is
of one rank only, or twice, or of another step, changes all that comes later.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from faulty import Faulty, whole
from torch import Tensor, nn
from torch.nn import functional as F

from skylar.layers.auxiliary import AuxiliaryOutput
from skylar.layers.block import BlockConfig
from skylar.layers.gqa import GQAConfig
from skylar.layers.norm import RMSNormConfig
from skylar.models.decoder import CausalLM, DecoderConfig
from skylar.training.distributed import ParallelConfig
from skylar.training.guard import everyone
from skylar.training.optim import AdamWConfig, ScheduleConfig
from skylar.training.trainer import TrainConfig, Trainer

V, T, D, E, ROWS, MICRO, STEPS, BAD = 64, 12, 32, 4, 8, 4, 6, 3  # step BAD is not finite


class Choice(NamedTuple):
    "What a layer says of its N tokens."

    scores: Tensor  # (N, E)
    chosen: Tensor  # (N,)


@dataclass(frozen=True)
class SwitchConfig:
    def build(self, d_model: int) -> nn.Module:
        return Switch(d_model)

    def flops(self, d_model: int, seq_len: int) -> int:
        return 2 * d_model * (E + d_model)


class Switch(nn.Module):
    "A feed-forward layer that returns extras."

    def __init__(self, d_model: int):
        super().__init__()
        self.scores = nn.Linear(d_model, E, bias=False)
        self.maps = nn.Linear(d_model, E * d_model, bias=False)
        self.register_buffer("bias", torch.zeros(E))
        self.n_runs = 0

    def forward(self, x: Tensor):
        self.n_runs += 1
        flat = x.flatten(0, -2)
        scores = self.scores(flat).float()
        chosen = (scores + self.bias).argmax(-1)
        y = self.maps(flat).view(len(flat), E, -1)[torch.arange(len(flat)), chosen]
        weight = scores.softmax(-1)[torch.arange(len(flat)), chosen]
        return (F.silu(y) * weight[:, None]).view(x.shape), Choice(scores, chosen)

    def init_weights(self, init_std: float, residual_std: float) -> None:
        nn.init.normal_(self.scores.weight, std=0.3)
        nn.init.normal_(self.maps.weight, std=0.3)


class Balance:
    "Counts the tokens of each map in each layer; keeps what `after_step` is given."

    def __init__(self):
        self.given = []

    def __call__(self, extras: list, batch: dict) -> AuxiliaryOutput:
        assert len(extras) == 2 and all(isinstance(extra, Choice) for extra in extras)
        counts = torch.stack([F.one_hot(extra.chosen, E).sum(0) for extra in extras])
        highest = torch.stack([extra.scores.amax(0) for extra in extras])
        spread = sum(extra.scores.softmax(-1).mean(0).square().sum() for extra in extras)
        return AuxiliaryOutput(0.1 * spread, {"spread": (spread.detach(), 1)},
                               {"counts": counts}, {"highest": highest})

    def after_step(self, model: nn.Module, statistics: dict, keep: Tensor) -> None:
        self.given.append((statistics, keep))
        for layer, counts in zip(model.model.layers, statistics["counts"]):
            wanted = (counts.float().mean() - counts).sign()
            layer.mlp.bias += torch.where(keep, 0.05 * wanted, 0.0)


def sparse_model() -> CausalLM:
    torch.manual_seed(0)
    norm = RMSNormConfig()
    block = BlockConfig(attention=GQAConfig(n_heads=4, n_kv_heads=2, d_head=8, qk_norm=norm),
                        ffn=SwitchConfig(), norm=norm)
    return CausalLM(DecoderConfig(vocab_size=V, d_model=D, blocks=(block,) * 2, max_seq_len=T,
                                  norm=norm, auxiliary=Balance()))


class MicroBatches:
    "Each step's ROWS rows as MICRO micro-batches; a rank reads its part of these."

    def __init__(self, rank: int, size: int, bad: bool):
        self.rank, self.world_size, self.bad = rank, size, bad

    def __iter__(self):
        generator, rows = torch.Generator().manual_seed(2), ROWS // MICRO
        for step in range(1, STEPS + 1):
            ids = torch.randint(0, V, (ROWS, T + 1), generator=generator)
            dropped = torch.rand(ROWS, T, generator=generator)
            share = torch.linspace(0.1, 1, ROWS)[:, None]  # of tokens with a target, by row
            labels = ids[:, 1:].masked_fill(dropped >= share, -100)
            per_rank = MICRO // self.world_size
            for i in range(self.rank * per_rank, (self.rank + 1) * per_rank):
                part = slice(i * rows, (i + 1) * rows)
                nan = self.bad and step == BAD and i == MICRO - 1
                yield {"input_ids": ids[part, :-1].contiguous(), "labels": labels[part],
                       "factor": torch.full((rows,), float("nan") if nan else 1.0)}


def train(settings: dict, bad: bool = False) -> dict:
    "What became of a run whose processes share it as `settings` say."
    parallel, here = ParallelConfig(**settings), dist.is_initialized()
    rank, size = (dist.get_rank(), dist.get_world_size()) if here else (0, 1)
    rank, size = parallel.data_ranks(rank, size)
    model = sparse_model()
    config = TrainConfig(steps=STEPS, dtype="float32", device="cpu", log_every=1, eval_every=0,
                         grad_accum_steps=MICRO // size)
    balance, biases = model.decoder_config.auxiliary, []

    def look(row):
        biases.append(torch.stack([layer.mlp.bias.clone() for layer in model.model.layers]))

    trainer = Trainer(Faulty(model), MicroBatches(rank, size, bad), config, quiet=True,
                      parallel=parallel, optimizer=AdamWConfig(lr=1e-2), callbacks=[look],
                      schedule=ScheduleConfig(kind="constant", warmup_steps=0))
    rows = trainer.train()
    return {
        "counts": torch.stack([given["counts"] for given, _ in balance.given]),
        "highest": torch.stack([given["highest"] for given, _ in balance.given]),
        "keep": [bool(keep) for _, keep in balance.given],
        "biases": torch.stack(biases), "n_runs": model.model.layers[0].mlp.n_runs,
        "losses": [row["loss"] for row in rows], "spread": [row["spread"] for row in rows],
        "weights": {name: whole(p) for name, p in model.named_parameters()}}


def ranks_of(settings: dict):
    objective = Faulty(sparse_model())
    return ParallelConfig(**settings).apply(objective, torch.device("cpu"), 0).ranks


def reductions(settings: dict) -> dict:
    "Sums and maxima of what depends on the data rank, as counts of a batch do."
    ranks = ranks_of(settings)
    n = ranks.rank + 1
    values = {
        "floats": torch.tensor([1.0, -2.0, 1e-3]) * n,
        "doubles": torch.tensor([1.0, -2.0, 1e-3]).double() * n,
        "large": torch.tensor([2**40 + n, -n]),  # more than float32 holds
        "half": torch.tensor([1.0, 1 / 128]).bfloat16() * n,
        "matrix": torch.arange(6.0).view(2, 3).t() * n,  # not contiguous
        "number": torch.tensor(float(n)),
        "any": torch.tensor([n == 1, n > 1, False]),
        "negative": torch.tensor([-1.0, -math.inf]) * n,
    }
    before = {name: value.clone() for name, value in values.items()}
    found = {name: (ranks.reduce(value), ranks.reduce(value, "max"))
             for name, value in values.items()}
    untouched = all(torch.equal(value, before[name]) for name, value in values.items())
    return {"found": found, "untouched": untouched, "size": ranks.size,
            "processes": ranks.processes}


def agreements(settings: dict, opinions: list[list[bool]]) -> list[bool]:
    "What `everyone` makes of what this process says in each case."
    ranks = ranks_of(settings)
    return [bool(everyone(torch.tensor(case[dist.get_rank()]), ranks)) for case in opinions]
