"""Seconds of training until a character model of Shakespeare is as good as the classic recipe's.

Baseline: the small CPU recipe of nanoGPT's README. Ours: the same model size, trained with what
chapter 00 has. Both see the same text, are judged on the same windows, and take turns.
"""

import argparse
import statistics
from contextlib import nullcontext
from dataclasses import replace

import torch
from common import record
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from skylar.data.sources import documents
from skylar.models.decoder import CausalLM, count_parameters, gpt2
from skylar.training.objective import LossOutput
from skylar.training.optim import AdamWConfig, ScheduleConfig
from skylar.training.trainer import TrainConfig, Trainer

BLOCK = 64  # context of the evaluation, for both
EVAL_WINDOWS = 1500

CLASSIC = dict(
    steps=2000, batch=12, block=64, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1,
    schedule=ScheduleConfig(kind="cosine", warmup_steps=100, min_ratio=0.1),
    dtype="float32", init_std=0.02, attention=None)
# Larger steps on fewer tokens in smaller batches; weights that start at about 1 / sqrt(d_model)
# (0.02 is made for models ten times as wide); bf16 where the processor has it. For windows as
# short as these, the plain products of attention beat the fused kernel's bf16 backward on a CPU.
FAST = dict(
    steps=1450, batch=8, block=64, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.1,
    schedule=ScheduleConfig(kind="cosine", warmup_steps=20, min_ratio=0.0),
    dtype="auto", init_std=0.05, attention=SDPBackend.MATH)


def corpus() -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Character ids of the first 90 % and the last 10 % of the text, and the characters."""
    text = "\n".join(documents("shakespeare"))
    letters = sorted(set(text))
    number = {c: i for i, c in enumerate(letters)}
    ids = torch.tensor([number[c] for c in text])
    cut = len(ids) * 9 // 10
    return ids[:cut], ids[cut:], letters


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
    """The same windows of validation text for everybody."""
    step = (len(ids) - 1) // EVAL_WINDOWS
    starts = torch.arange(EVAL_WINDOWS)[:, None] * step
    window = ids[starts + torch.arange(BLOCK + 1)]
    return [{"input_ids": w[:, :-1], "labels": w[:, 1:]} for w in window.split(125)]


class PlainObjective(nn.Module):
    """Cross-entropy of each next character, the same for both recipes."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch) -> LossOutput:
        logits = self.model(batch["input_ids"])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten(),
                               reduction="sum")
        return LossOutput(loss, batch["labels"].numel(), {})


def run(recipe: dict, data, seed: int, target: float | None = None, every: int = 50) -> dict:
    """Train; stop at the first evaluation at or below `target`. Seconds are of training only."""
    train, held_out, letters = data
    torch.manual_seed(seed)
    config = gpt2(vocab_size=len(letters), d_model=128, n_heads=4, n_layers=4,
                  max_seq_len=recipe["block"], bias=False)
    model = CausalLM(replace(config, init_std=recipe["init_std"]))
    seconds, curve = 0.0, []

    def watch(row):
        nonlocal seconds
        seconds += (row["tokens"] - (curve[-1]["tokens"] if curve else 0)) / row["tokens_per_s"]
        curve.append({k: row[k] for k in ("step", "tokens", "val_loss")} | {"seconds": seconds})
        return target is not None and row["val_loss"] <= target  # True stops the run

    trainer = Trainer(
        PlainObjective(model), Windows(train, recipe["batch"], recipe["block"], seed),
        TrainConfig(steps=recipe["steps"], dtype=recipe["dtype"], log_every=every,
                    eval_every=every, eval_batches=EVAL_WINDOWS, seed=seed),
        optimizer=AdamWConfig(lr=recipe["lr"], betas=recipe["betas"],
                              weight_decay=recipe["weight_decay"]),
        schedule=recipe["schedule"], eval_loader=judge(held_out), callbacks=[watch], quiet=True)
    backend = recipe["attention"]
    with sdpa_kernel(backend) if backend else nullcontext():
        trainer.train()
    return {"seconds": seconds, "val_loss": curve[-1]["val_loss"], "steps": curve[-1]["step"],
            "tokens": curve[-1]["tokens"], "parameters": count_parameters(config)}


def main(seeds: int) -> None:
    data = corpus()
    rows, speedups = [], []
    for seed in range(seeds):
        classic = run(CLASSIC, data, seed, every=CLASSIC["steps"])
        fast = run(FAST, data, seed, target=classic["val_loss"])
        assert fast["val_loss"] <= classic["val_loss"], f"seed {seed} did not reach the target"
        rows += [{"recipe": name, "seed": seed} | result
                 for name, result in (("classic", classic), ("fast", fast))]
        speedups.append(classic["seconds"] / fast["seconds"])
    speedup = statistics.median(speedups)
    record("time_to_quality", rows, median_speedup=speedup, speedups=speedups,
           target="seconds of training to the classic recipe's final loss",
           evaluation=f"{EVAL_WINDOWS} windows of {BLOCK} characters of the last tenth")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    main(parser.parse_args().seeds)
