"""How much data does a reward model need to agree with a judge as often as is possible?

    python bench/reward.py                                # about half an hour
    python bench/reward.py --seeds 1 --sizes 200 --dry    # a look; writes no file

The judge of lesson 04_posttrain/04_reward: of two speeches it prefers the one with fewer misspelled
words, with probability σ(1.2 k) for k fewer. The decoder is assets/shakespeare. Every size of data
is seen `EPOCHS` times, 16 pairs a step. Agreement and calibration error on 1,000 pairs of held-out
plays, with and without centering; plain means neither margin nor centering. Writes
bench/results/reward.json.
"""

import argparse
import math
import random
import re
from functools import cache

import torch
from common import record

from skylar.data.held_out import train_text, val_text
from skylar.data.pairs import ExampleLoader, Pair, pair_batch
from skylar.models.hub import from_pretrained, load_tokenizer
from skylar.posttrain.preference import joined
from skylar.posttrain.reward import RewardConfig, RewardModel, RewardObjective, calibration_error
from skylar.utils.lesson import asset, mean_interval

JUDGE, EPOCHS, LR, BATCH = 1.2, 2, 3e-4, 16
LONG = re.compile(r"[A-Za-z]{5,}")
ARMS = {"plain": RewardConfig(), "centered": RewardConfig(centering=0.01)}


@cache
def speeches(part: str) -> tuple[tuple[str, str], ...]:
    text = train_text() if part == "train" else val_text()
    found = re.findall(r"\n\n([A-Z][A-Z ]{2,12}):\n(.+?)(?=\n\n)", text, re.S)
    return tuple((name, body) for name, body in found
                 if 8 <= len(body.split()) <= 18 and len(LONG.findall(body)) >= 3)


@cache
def tokenizer():
    return load_tokenizer(asset("shakespeare"))


def misspell(body: str, n: int, rng: random.Random) -> str:
    """Two neighboring letters swapped in n of its long words."""
    letters = list(body)
    for word in rng.sample(list(LONG.finditer(body)), n):
        inside = range(word.start() + 1, word.end() - 1)
        at = rng.choice([i for i in inside if body[i] != body[i + 1]])
        letters[at], letters[at + 1] = letters[at + 1], letters[at]
    return "".join(letters)


def judged(part: str, n: int, seed: int) -> list[Pair]:
    """Pairs in the judge's order; the margin is by how many words the rejected one is worse."""
    rng, pairs, encode = random.Random(seed), [], tokenizer().encode
    while len(pairs) < n:
        (speaker, first), (_, second) = rng.sample(speeches(part), 2)
        errors = rng.randrange(4), rng.randrange(4)
        sides = [tuple(encode(misspell(b, e, rng)) + [tokenizer().eos_id])
                 for b, e in zip((first, second), errors)]
        gap = errors[1] - errors[0]
        if rng.random() > 1 / (1 + math.exp(-JUDGE * gap)):
            sides, gap = sides[::-1], -gap
        prompt = (tokenizer().bos_id, *encode(f"{speaker}:\n"))
        pairs.append(Pair(prompt, *sides, float(gap)))
    return pairs


def run(arm: str, n: int, seed: int, val: list[Pair]) -> dict:
    """Train on n pairs; what the model reaches on `val`."""
    torch.manual_seed(seed)
    model = RewardModel(from_pretrained(asset("shakespeare")).float()).train()
    objective = RewardObjective(model, ARMS[arm])
    loader = ExampleLoader(judged("train", n, seed + 100), pair_batch, BATCH, seed=seed)
    steps = EPOCHS * n // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), LR, betas=(0.9, 0.95), weight_decay=0.0)
    for step, batch in zip(range(steps), loader):
        for group in optimizer.param_groups:
            group["lr"] = LR * min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))
        output = objective(batch)
        optimizer.zero_grad()
        (output.loss_sum / output.n_valid).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        model.eval()
        found = torch.cat([model(joined(pair_batch(val[i:i + 50]))).view(2, -1)
                           for i in range(0, len(val), 50)], 1)
    return {"arm": arm, "pairs": n, "seed": seed,
            "accuracy": (found[0] > found[1]).float().mean().item(),
            "error": calibration_error(*found), "mean_reward": found.mean().item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=[200, 600, 2000, 6000])
    parser.add_argument("--dry", action="store_true", help="print the rows, write no file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    val, rows = judged("val", 1000, seed=7), []
    best = sum(1 / (1 + math.exp(-JUDGE * abs(p.margin))) for p in val) / len(val)
    for arm in ARMS:
        for n in args.sizes:
            for seed in range(args.seeds):
                rows.append(run(arm, n, seed, val))
                print(rows[-1], flush=True)
    summary = {}
    for arm in ARMS:
        cells = [[r for r in rows if r["arm"] == arm and r["pairs"] == n] for n in args.sizes]
        summary[arm] = {key: [list(mean_interval([r[key] for r in cell])) if len(cell) > 1
                              else [cell[0][key], 0.0] for cell in cells]
                        for key in ("accuracy", "error", "mean_reward")}
    if args.dry:
        return print(summary)
    record("reward", rows, pairs=args.sizes, best_possible=best, seeds=args.seeds, **summary)


if __name__ == "__main__":
    main()
