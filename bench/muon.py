"""What Muon costs in a training step, and what it gains over AdamW on real text.

`cost`: a model of 100M parameters; seconds of forward and backward passes for one micro-batch, and
of one optimizer step, with both optimizers. A step of n tokens takes n / micro-batch of the former
and one of the latter; FLOPs say the same by formula. `race`: a small Qwen3 that reads bytes, from
the training plays of Shakespeare, each optimizer at every learning rate of one grid, with every
seed, evaluated on the held-out plays. `ablate`: at Muon's best rate whole matrices in place of
heads, and the classic coefficients in place of Polar Express; and, at its own best rate, Muon
without orthogonalization (momentum scaled to the same length, AdamW's part at Muon's best rate).
`merge`: one file of all of them.

    python bench/muon.py cost                 # about 2 minutes, 6 GB
    python bench/muon.py race                 # about 45 minutes on one core
    python bench/muon.py race --share 0 2     # the first of two halves
    python bench/muon.py ablate               # about 20 minutes on one core
    python bench/muon.py merge                # muon_race.json from the parts
"""

import argparse
import itertools
import json
import statistics
import time

import torch
from common import ROOT, record, show, write
from torch.nn import functional as F

from skylar.data.held_out import bits_per_byte, ngram_baseline, train_text, val_text
from skylar.models.decoder import CausalLM, count_parameters, flops_per_token
from skylar.models.presets import get_config
from skylar.training import muon
from skylar.training.loss import NextTokenObjective
from skylar.training.muon import (
    MuonConfig,
    block_matrices,
    orthogonalize,
    orthogonalize_flops,
)
from skylar.training.optim import AdamWConfig, ScheduleConfig
from skylar.training.trainer import TrainConfig, TrainStep
from skylar.utils.devices import autocast, pick_dtype

RATES, SEEDS = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2), (0, 1, 2)
PLAIN_RATES = (1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3)  # its few directions need shorter steps
STEPS, BATCH, LENGTH, EVAL_EVERY = 400, 16, 128, 50
MODEL = dict(vocab_size=256, d_model=128, n_layers=3, n_heads=4, n_kv_heads=2, d_head=32, d_ff=352,
             dropout=0.0)
LARGE = dict(vocab_size=32_000, d_model=768, n_layers=12, n_heads=12, n_kv_heads=4, d_head=64,
             d_ff=2048, dropout=0.0)  # 100M parameters
RESULTS = ROOT / "bench" / "results"
PLAIN = "no orthogonalization"
MAKERS = {
    "AdamW": lambda lr: AdamWConfig(lr=lr),
    "Muon": lambda lr: MuonConfig(lr=lr, adamw_lr=lr),
    "Muon, whole q k v": lambda lr: MuonConfig(lr=lr, adamw_lr=lr, per_head=False),
    "Muon, classic": lambda lr: MuonConfig(lr=lr, adamw_lr=lr, coefficients="classic"),
    PLAIN: lambda lr: MuonConfig(lr=lr, adamw_lr=4e-3),  # see `only_scaled`
}


def as_bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def batches(data: torch.Tensor, seed: int):
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(data) - LENGTH - 1, (BATCH, 1), generator=generator)
        window = data[starts + torch.arange(LENGTH + 1)]
        yield {"input_ids": window[:, :-1], "labels": window[:, 1:]}


@torch.no_grad()
def evaluate(model, data: torch.Tensor) -> float:
    """Bits per byte of non-overlapping windows."""
    n = (len(data) - 1) // LENGTH * LENGTH
    x, y = data[:n].view(-1, LENGTH), data[1:n + 1].view(-1, LENGTH)
    model.eval()
    total = sum(F.cross_entropy(model(a).flatten(0, 1), b.flatten(), reduction="sum").item()
                for a, b in zip(x.split(64), y.split(64)))
    model.train()
    return bits_per_byte(total / n)


def only_scaled(matrix, *args):
    """In place of `orthogonalize`: the same root mean square, the same singular directions."""
    norm = torch.linalg.matrix_norm(matrix, keepdim=True).clamp(min=1e-7)
    return matrix / norm * min(matrix.shape[-2:]) ** 0.5


def one_run(name: str, lr: float, seed: int, train, val) -> dict:
    muon.orthogonalize = only_scaled if name == PLAIN else orthogonalize
    model, step = make_step(name, lr, seed)
    data, curve = batches(train, seed), []
    for i in range(STEPS):
        step(data, i)
        if (i + 1) % EVAL_EVERY == 0 and i + 1 < STEPS:
            curve.append([i + 1, evaluate(model, val[:40_000])])
    final = evaluate(model, val[:400_000])
    return dict(optimizer=name, lr=lr, seed=seed, bits_per_byte=final, curve=curve)


def make_step(name: str, lr: float, seed: int):
    torch.manual_seed(seed)
    model = CausalLM(get_config("test", family="qwen3", **MODEL)).train()
    config = TrainConfig(steps=STEPS, dtype="float32", device="cpu")
    return model, TrainStep(NextTokenObjective(model), config, MAKERS[name](lr), ScheduleConfig())


def step_seconds(train, n: int = 30) -> dict[str, float]:
    """Medians, measured in turns on the same batches."""
    muon.orthogonalize = orthogonalize
    steps = {name: make_step(name, 2e-3, 0)[1] for name in ("AdamW", "Muon")}
    data, took = batches(train, 0), {name: [] for name in steps}
    for i in range(n):
        batch = next(data)
        for name, step in steps.items():
            start = time.perf_counter()
            step(iter([batch]), i)
            took[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in took.items()}


def best_rate(rows: list[dict], name: str) -> float:
    """Of the rates that every seed has, the one with the lowest mean; else of all."""
    mine = [row for row in rows if row["optimizer"] == name]
    by_rate: dict = {}
    for row in mine:
        by_rate.setdefault(row["lr"], []).append(row["bits_per_byte"])
    most = max(map(len, by_rate.values()))
    whole = {lr: values for lr, values in by_rate.items() if len(values) == most}
    return min(whole, key=lambda lr: statistics.fmean(whole[lr]))


def race(share: tuple[int, int]) -> None:
    """The grid."""
    todo = [(name, lr, seed) for seed, lr, name in itertools.product(SEEDS, RATES, MAKERS)
            if name in ("AdamW", "Muon")]
    runs(todo[share[0]::share[1]], f"muon_race_{share[0]}")


def ablate(share: tuple[int, int]) -> None:
    """At Muon's best rate the other variants; without orthogonalization at its own."""
    lr, part = best_rate(stored(), "Muon"), f"muon_race_ablation_{share[0]}"
    if share[0] == 0:
        runs([(name, lr, seed) for name in list(MAKERS)[2:4] for seed in SEEDS], part)
    if share in ((0, 1), (1, 2)):
        rows = runs([(PLAIN, lr, SEEDS[0]) for lr in PLAIN_RATES], part)
        runs([(PLAIN, best_rate(rows, PLAIN), seed) for seed in SEEDS], part)


def stored() -> list[dict]:
    return [row for path in sorted(RESULTS.glob("muon_race_*.json"))
            for row in json.loads(path.read_text())["rows"]]


def runs(todo, part: str) -> list[dict]:
    """The rows of a part, those included that it has already; each is written when it is there."""
    path = RESULTS / f"{part}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    train, val = as_bytes(train_text()), as_bytes(val_text())
    have = {(row["optimizer"], row["lr"], row["seed"]) for row in rows}
    for name, lr, seed in todo:
        if (name, lr, seed) not in have:
            rows.append(one_run(name, lr, seed, train, val))
            write(part, rows)
            show({k: v for k, v in rows[-1].items() if k != "curve"})
    return rows


def merge() -> None:
    """One file of all parts, with seconds a step."""
    rows = stored()
    best = {name: best_rate(rows, name) for name in ("AdamW", "Muon", PLAIN)}
    write("muon_race", rows, model=MODEL, steps=STEPS, batch=BATCH, length=LENGTH, best=best,
          ngram=ngram_baseline()["bits_per_byte"],
          step_seconds=step_seconds(as_bytes(train_text())))
    for path in RESULTS.glob("muon_race_*.json"):
        path.unlink()


def optimizer_flops(model, per_head: bool) -> int:
    """Of the polynomials of one step, for all matrices."""
    total = 0
    for p, d_head in block_matrices(model, per_head).items():
        total += orthogonalize_flops(p.unflatten(0, (-1, d_head)).shape if d_head else p.shape)
    return total


def cost(tokens: int = 1024, rounds: int = 5) -> None:
    """Micro-batch and optimizer step in turns; medians."""
    dtype = pick_dtype("auto", torch.device("cpu"))
    model = CausalLM(get_config("test", family="qwen3", **LARGE)).train()
    objective, rows = NextTokenObjective(model), []
    ids = torch.randint(LARGE["vocab_size"], (tokens // 512, 513))
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
    optimizers = {"AdamW": AdamWConfig().build(model)} | {
        f"Muon, {name}": MuonConfig(dtype=name).build(model) for name in ("float32", "bfloat16")}
    took = {name: [] for name in ("micro-batch", *optimizers)}

    def timed(name, f):
        start = time.perf_counter()
        f()
        took[name].append(time.perf_counter() - start)

    def micro_batch():
        with autocast(torch.device("cpu"), dtype):
            objective(batch).loss_sum.backward()

    for _ in range(rounds + 1):
        model.zero_grad()
        timed("micro-batch", micro_batch)
        for name, optimizer in optimizers.items():
            timed(name, optimizer.step)
    seconds = {name: statistics.median(values[1:]) for name, values in took.items()}
    training = flops_per_token(model.config, 512)
    for name in optimizers:
        row = dict(optimizer=name, seconds=seconds[name])
        for n in (16_384, 65_536, 262_144, 524_288):
            row[f"share_of_step_{n}"] = seconds[name] / (
                seconds[name] + seconds["micro-batch"] * n / tokens)
        rows.append(row)
    flops = {name: optimizer_flops(model, per_head)
             for name, per_head in (("per head", True), ("whole", False))}
    record("muon", rows, parameters=count_parameters(model.config), model=LARGE,
           micro_batch=dict(tokens=tokens, seconds=seconds["micro-batch"], dtype=str(dtype)),
           training_flops_per_token=training, optimizer_flops=flops,
           flops_share_65536=flops["per head"] / (training * 65_536))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=("cost", "race", "ablate", "merge"))
    parser.add_argument("--share", nargs=2, type=int, metavar=("I", "N"), default=(0, 1))
    args = parser.parse_args()
    if args.command in ("race", "ablate"):
        {"race": race, "ablate": ablate}[args.command](tuple(args.share))
    else:
        {"cost": cost, "merge": merge}[args.command]()


if __name__ == "__main__":
    main()
