"""Seconds of training until a character model of Shakespeare is as good as the classic recipe's.

Baseline: the small CPU recipe of nanoGPT's README. Ours: the same model size, trained with what
chapter 00 has. Both see the same text, are judged on the same windows, and take turns.
"""

import argparse
import statistics

import torch
from common import record

from skylar.data.sources import documents
from skylar.models.decoder import CausalLM, count_parameters
from skylar.models.families.gpt2 import GPT2Config
from skylar.training.loss import NextTokenObjective
from skylar.training.optim import AdamWConfig, ScheduleConfig
from skylar.training.trainer import TrainConfig, Trainer

BLOCK = 64  # context of the evaluation, for both
EVAL_WINDOWS = 1500

CLASSIC = dict(
    steps=2000, batch=12, block=64, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1,
    schedule=ScheduleConfig(kind="cosine", warmup_steps=100, min_ratio=0.1),
    dtype="float32", init_std=0.02)
# Larger steps on fewer tokens in smaller batches; weights that start at about 1 / sqrt(d_model)
# (0.02 is made for models ten times as wide); bf16 where the processor has it.
FAST = dict(
    steps=1450, batch=8, block=64, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.1,
    schedule=ScheduleConfig(kind="cosine", warmup_steps=20, min_ratio=0.0),
    dtype="auto", init_std=0.05)


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


def run(recipe: dict, data, seed: int, target: float | None = None, every: int = 50) -> dict:
    """Train; stop at the first evaluation at or below `target`. Seconds are of training only."""
    train, held_out, characters = data
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(characters), d_model=128, n_heads=4, n_layers=4,
        max_seq_len=recipe["block"], bias=False, init_std=recipe["init_std"])
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
        Windows(train, recipe["batch"], recipe["block"], seed),
        TrainConfig(steps=recipe["steps"], dtype=recipe["dtype"], device="cpu", log_every=every,
                    eval_every=every, eval_batches=EVAL_WINDOWS, seed=seed),
        optimizer=AdamWConfig(lr=recipe["lr"], betas=recipe["betas"],
                              weight_decay=recipe["weight_decay"]),
        schedule=recipe["schedule"], eval_loader=judge(held_out), callbacks=[watch], quiet=True,
    ).train()
    return curve[-1] | {"parameters": count_parameters(config)}


def main(seeds: int, scale: float, dry: bool) -> None:
    data = corpus()
    rows, speedups = [], []
    recipes = [r | {"steps": round(r["steps"] * scale)} for r in (CLASSIC, FAST)]
    for seed in range(seeds):
        classic = run(recipes[0], data, seed, every=recipes[0]["steps"])
        fast = run(recipes[1], data, seed, target=classic["val_loss"])
        reached = fast["val_loss"] <= classic["val_loss"]
        assert dry or reached, f"seed {seed} did not reach the target"
        rows += [{"recipe": name, "seed": seed} | result
                 for name, result in (("classic", classic), ("fast", fast))]
        speedups.append(classic["seconds"] / fast["seconds"])
    if dry:
        return print(*rows, sep="\n")
    record("time_to_quality", rows, median_speedup=statistics.median(speedups), speedups=speedups,
           target="seconds of training to the classic recipe's final loss",
           evaluation=f"{EVAL_WINDOWS} windows of {BLOCK} characters of the last tenth")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0,
                        help="of both numbers of steps; at least 0.1")
    parser.add_argument("--dry", action="store_true", help="print the rows, write no file")
    args = parser.parse_args()
    main(args.seeds, args.scale, args.dry)
