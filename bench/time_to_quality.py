"""Seconds of training until a character model of Shakespeare is as good as the classic recipe's.

Baseline: the small CPU recipe of nanoGPT's README. Ours: the same model, trained with what the
course has so far: Muon for the matrices, another schedule, another start. Then ours again, for as
many seconds as the baseline took: the best loss in the baseline's own time. All see the same text,
are judged on the same windows, and take turns in one process.

    python bench/time_to_quality.py           # 3 seeds, about 9 minutes on two quiet cores
    python bench/time_to_quality.py --quick   # one seed, a tenth of the steps, writes no file
    python bench/time_to_quality.py --search  # short runs that chose FAST, about 3 minutes
"""

import argparse
import statistics

import torch
from common import record, write

from skylar.data.sources import documents
from skylar.models.decoder import CausalLM, count_parameters
from skylar.models.families.gpt2 import GPT2Config
from skylar.training.loss import NextTokenObjective
from skylar.training.muon import OptimizerConfig
from skylar.training.optim import ScheduleConfig
from skylar.training.trainer import TrainConfig, Trainer

BLOCK = 64  # context of the evaluation, for both
EVAL_WINDOWS = 1500

CLASSIC = dict(
    steps=2000, batch=12, dtype="float32", init_std=0.02,
    optimizer=OptimizerConfig(lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1),
    schedule=ScheduleConfig(kind="cosine", warmup_steps=100, min_ratio=0.1))
# Larger steps on fewer tokens; weights that start at about 1 / sqrt(d_model) (0.02 is made for
# models ten times as wide); bf16 where the processor has it. Muon's polynomials cost the same
# whatever the batch is, so they are few and in bf16.
FAST = dict(
    steps=400, batch=16, dtype="auto", init_std=0.05,
    optimizer=OptimizerConfig(kind="muon", lr=8e-3, muon_steps=3, muon_dtype="bfloat16"),
    schedule=ScheduleConfig(kind="cosine", warmup_steps=20, min_ratio=0.0))
LONG = FAST  # its steps: as many as the baseline's seconds allow
MARGIN = 0.95  # of these seconds are planned, as speed varies
SEARCH = [  # (steps, batch, kind, lr, Muon's settings)
    (500, 8, "adamw", 4e-3, {}),
    (500, 8, "muon", 4e-3, {"muon_steps": 4}),
    (500, 8, "muon", 8e-3, {"muon_steps": 4}),
    (500, 8, "muon", 4e-3, {"muon_steps": 4, "muon_lr": 1.2e-2}),
    (500, 8, "muon", 8e-3, {"muon_steps": 3}),
    (500, 12, "muon", 8e-3, {"muon_steps": 4}),
    (500, 16, "muon", 8e-3, {"muon_steps": 4}),
    (380, 16, "muon", 8e-3, {"muon_steps": 3}),
]


def corpus() -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Character ids of the first 90 % and the last 10 % of the text, and the characters."""
    text = "\n".join(documents("shakespeare"))
    characters = sorted(set(text))
    number = {c: i for i, c in enumerate(characters)}
    ids = torch.tensor([number[c] for c in text])
    cut = len(ids) * 9 // 10
    return ids[:cut], ids[cut:], characters


class Windows:
    """Random windows of the text, for ever."""

    def __init__(self, ids: torch.Tensor, batch: int, block: int, seed: int):
        self.ids, self.batch, self.block = ids, batch, block
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self):
        offsets = torch.arange(self.block + 1)
        while True:
            starts = torch.randint(len(self.ids) - self.block - 1, (self.batch, 1),
                                   generator=self.generator)
            window = self.ids[starts + offsets]  # (B, T + 1)
            yield {"input_ids": window[:, :-1], "labels": window[:, 1:]}


def judge(ids: torch.Tensor) -> list[dict]:
    """The same windows of validation text for both."""
    step = (len(ids) - 1) // EVAL_WINDOWS
    starts = torch.arange(EVAL_WINDOWS)[:, None] * step
    window = ids[starts + torch.arange(BLOCK + 1)]
    return [{"input_ids": w[:, :-1], "labels": w[:, 1:]} for w in window.split(125)]


def run(recipe: dict, data, seed: int, target: float | None = None, every: int = 50,
        seconds: float | None = None) -> dict:
    """Train; stop at the first evaluation at or below `target`. Seconds are of training only.

    With `seconds` the last evaluation that was made within them counts."""
    train, held_out, characters = data
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=len(characters), d_model=128, n_heads=4, n_layers=4,
                        max_seq_len=BLOCK, bias=False, init_std=recipe["init_std"])
    curve = []

    def watch(row) -> bool:
        """Note an evaluation; True stops the run."""
        before = curve[-1] if curve else {"tokens": 0, "seconds": 0.0}
        took = (row["tokens"] - before["tokens"]) / row["tokens_per_s"]
        curve.append({k: row[k] for k in ("step", "tokens", "val_loss")}
                     | {"seconds": before["seconds"] + took})
        return target is not None and row["val_loss"] <= target

    Trainer(
        NextTokenObjective(CausalLM(config), loss="plain"),
        Windows(train, recipe["batch"], BLOCK, seed),
        TrainConfig(steps=recipe["steps"], dtype=recipe["dtype"], device="cpu", log_every=every,
                    eval_every=every, eval_batches=EVAL_WINDOWS, seed=seed),
        optimizer=recipe["optimizer"], schedule=recipe["schedule"], eval_loader=judge(held_out),
        callbacks=[watch], quiet=True,
    ).train()
    in_time = [row for row in curve if seconds is None or row["seconds"] <= seconds]
    return in_time[-1] | {"parameters": count_parameters(config)}


def search() -> None:
    """One seed of each candidate."""
    data, rows = corpus(), []
    for steps, batch, kind, lr, more in SEARCH:
        bf16 = {"muon_dtype": "bfloat16"} if kind == "muon" else {}
        recipe = FAST | {"steps": steps, "batch": batch,
                         "optimizer": OptimizerConfig(kind=kind, lr=lr, **bf16, **more)}
        result = run(recipe, data, 0, every=steps)
        rows.append({"steps": steps, "batch": batch, "kind": kind, "lr": lr} | more
                    | {key: result[key] for key in ("tokens", "val_loss")})
        write("time_to_quality_search", rows)
        print(rows[-1], flush=True)


def main(seeds: int, scale: float, dry: bool) -> None:
    data, rows, speedups = corpus(), [], []
    classic, fast = (r | {"steps": round(r["steps"] * scale)} for r in (CLASSIC, FAST))
    for seed in range(seeds):
        base = run(classic, data, seed, every=classic["steps"])
        ours = run(fast, data, seed, target=base["val_loss"], every=20)
        reached = ours["val_loss"] <= base["val_loss"]
        assert dry or reached, f"seed {seed} did not reach the target"
        steps = int(MARGIN * base["seconds"] / ours["seconds"] * ours["step"])
        long = run(LONG | {"steps": steps}, data, seed, every=max(1, steps // 20),
                   seconds=base["seconds"])
        found = {"classic": base, "fast": ours, "same seconds": long}
        for name, result in found.items():
            rows.append({"recipe": name, "seed": seed} | result)
            print(rows[-1], flush=True)
        speedups.append(base["seconds"] / ours["seconds"])
    if dry:
        return
    losses = {name: statistics.median(r["val_loss"] for r in rows if r["recipe"] == name)
              for name in ("classic", "same seconds")}
    record("time_to_quality", rows, median_speedup=statistics.median(speedups), speedups=speedups,
           median_losses=losses, target="seconds of training to the classic recipe's final loss",
           evaluation=f"{EVAL_WINDOWS} windows of {BLOCK} characters of the last tenth")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0,
                        help="of both numbers of steps; at least 0.1")
    parser.add_argument("--dry", action="store_true", help="print the rows, write no file")
    parser.add_argument("--quick", action="store_true", help="--seeds 1 --scale 0.1 --dry")
    parser.add_argument("--search", action="store_true", help="short runs of candidates")
    args = parser.parse_args()
    if args.search:
        raise SystemExit(search())
    main(*((1, 0.1, True) if args.quick else (args.seeds, args.scale, args.dry)))
