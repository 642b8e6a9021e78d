"""How near do adapters, prompts, prefixes and a side network come to training all weights?

    python bench/adapters.py                                  # all methods
    python bench/adapters.py --arms "LoRA 8" "all weights"    # some; the file keeps the others
    python bench/adapters.py --seeds 2 --steps 20 --dry       # a look; writes no file

The course's Shakespeare model is fine-tuned on the plays in capital letters. For each method the
best of three learning rates is taken on the last training play, with one seed; then three seeds
are judged by bits per byte of the beginnings (10,000 characters each) of the four held-out plays
in capitals. Writes bench/results/adapters.json.
"""

import argparse
import json
import math
from collections.abc import Callable

import torch
from common import ROOT, record
from torch import nn

from skylar.data.held_out import train_plays, val_plays
from skylar.models.hub import from_pretrained, load_tokenizer
from skylar.posttrain.peft import LoRAConfig, PrefixObjective, PromptObjective, SideObjective
from skylar.training.loss import NextTokenObjective
from skylar.utils.lesson import asset

LENGTH, BATCH, HELD_OUT = 64, 8, 10_000  # tokens, windows, characters of a play
RATES = (3e-3, 1e-2, 3e-2)


def base():
    return from_pretrained(asset("shakespeare")).float()


def lora(**options) -> Callable:
    return lambda ids: NextTokenObjective(LoRAConfig(**options).attach(base()))


ARMS: dict[str, tuple[Callable, float]] = {  # what is trained, factor of RATES
    "no training": (lambda ids: NextTokenObjective(base()), 0.0),
    "all weights": (lambda ids: NextTokenObjective(base()), 0.3),
    "LoRA 8": (lora(rank=8), 1.0),
    "LoRA 64": (lora(rank=64), 1.0),
    "rsLoRA 64": (lora(rank=64, rslora=True), 1.0),
    "DoRA 8": (lora(rank=8, kind="dora"), 1.0),
    "QLoRA 8": (lora(rank=8, kind="qlora"), 1.0),
    "prompt 16": (lambda ids: PromptObjective(base(), ids[:16]), 30.0),
    "prefix 16": (lambda ids: PrefixObjective(base(), 16), 30.0),
    "side": (lambda ids: SideObjective(base()), 3.0),
}


def encode(plays: list[str]) -> torch.Tensor:
    tokenizer = load_tokenizer(asset("shakespeare"))
    return torch.tensor([i for play in plays for i in tokenizer.encode(play.upper())])


def windows(ids: torch.Tensor, starts: torch.Tensor) -> dict[str, torch.Tensor]:
    found = ids[starts[:, None] + torch.arange(LENGTH + 1)]
    return {"input_ids": found[:, :-1], "labels": found[:, 1:]}


@torch.no_grad()
def nats(objective: nn.Module, ids: torch.Tensor) -> float:
    """Sum over all tokens but the first, in windows."""
    objective.eval()
    n = (len(ids) - 1) // LENGTH
    total = sum(objective(windows(ids, part)).loss_sum.item()
                for part in (LENGTH * torch.arange(n)).split(16))
    rest = {"input_ids": ids[n * LENGTH:-1][None], "labels": ids[n * LENGTH + 1:][None]}
    return total + (objective(rest).loss_sum.item() if rest["labels"].numel() else 0.0)


def train(arm: str, ids: torch.Tensor, lr: float, seed: int, steps: int) -> nn.Module:
    torch.manual_seed(seed)
    objective = ARMS[arm][0](ids)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr,
                                  weight_decay=0.0, fused=True)
    objective.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))
        starts = torch.randint(len(ids) - LENGTH - 1, (BATCH,), generator=generator)
        out = objective(windows(ids, starts))
        (out.loss_sum / out.n_valid).backward()
        optimizer.step()
        optimizer.zero_grad()
    return objective


def run(arm: str, seeds: int, steps: int) -> dict:
    *plays, chosen_on = train_plays()
    beginnings = [play[:HELD_OUT] for play in val_plays()]
    ids, chosen_ids, held_out = encode(plays), encode([chosen_on])[:5_000], encode(beginnings)
    n_bytes = sum(len(play.upper().encode()) for play in beginnings)
    rates = [factor * ARMS[arm][1] for factor in RATES]
    steps = steps if any(rates) else 0
    scores = [nats(train(arm, ids, lr, 99, steps), chosen_ids) for lr in rates]
    lr = rates[scores.index(min(scores))]
    found = [train(arm, ids, lr, seed, steps) for seed in range(seeds)]
    trained = sum(p.numel() for p in found[0].parameters() if p.requires_grad) if steps else 0
    bits = [nats(o, held_out) / math.log(2) / n_bytes for o in found]
    return {"arm": arm, "trained": trained, "lr": lr, "steps": steps,
            "bits_per_byte": [round(b, 4) for b in bits]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--dry", action="store_true", help="print the rows, write no file")
    args = parser.parse_args()
    path = ROOT / "bench" / "results" / "adapters.json"
    for arm in args.arms:
        row = run(arm, args.seeds, args.steps)
        print(row, flush=True)
        if not args.dry:  # at once, so that several processes can share the arms
            old = json.loads(path.read_text())["rows"] if path.exists() else []
            rows = [row, *(r for r in old if r["arm"] != arm)]
            record("adapters", sorted(rows, key=lambda r: list(ARMS).index(r["arm"])),
                   tokens_a_step=BATCH * LENGTH, held_out_bytes=4 * HELD_OUT)


if __name__ == "__main__":
    main()
