"""How many pairs does a reward model need to agree with a judge as often as is possible?

    python bench/reward.py                                # about three minutes on one core
    python bench/reward.py --seeds 1 --sizes 160 --dry    # a look; writes no file

Two judges compare two different speeches of lesson 04_posttrain/04_reward. One counts pronouns,
thou minus you; the other counts misspelled words, of which each speech has been given zero to
three by swapping neighboring letters. A speech that is k better is preferred with probability
σ(1.2 k). The decoder is assets/shakespeare, trained for one pass over the pairs, 16 a step, under
bfloat16 autocast. Agreement and calibration error in float32 on 1,000 pairs of held-out plays;
beside them the base model's average log-probability and the best that is possible. Writes
bench/results/reward.json.
"""

import argparse
import math
import random
import re
import time
from functools import cache

import torch
from common import record

from skylar.data.held_out import train_text, val_text
from skylar.data.pairs import ExampleLoader, Pair, pair_batch
from skylar.models.hub import from_pretrained, load_tokenizer
from skylar.posttrain.preference import joined, sequence_logprobs
from skylar.posttrain.reward import RewardConfig, RewardModel, RewardObjective, calibration_error
from skylar.utils.lesson import asset, mean_interval

JUDGE, LR, BATCH, CENTERING = 1.2, 1e-3, 16, 0.01
THOU = re.compile(r"\b(thou|thee|thy|thine)\b", re.I)
YOU = re.compile(r"\b(you|your|yours|ye)\b", re.I)
LONG = re.compile(r"[A-Za-z]{5,}")


def taste(body: str) -> int:
    """Of the first judge."""
    return len(THOU.findall(body)) - len(YOU.findall(body))


@cache
def speeches(part: str, judge: str) -> tuple[tuple[str, str], ...]:
    text = train_text() if part == "train" else val_text()
    found = re.findall(r"\n\n([A-Z][A-Z ]{2,12}):\n(.+?)(?=\n\n)", text, re.S)
    found = [(name, body) for name, body in found if 8 <= len(body.split()) <= 18]
    if judge == "pronouns":
        return tuple(x for x in found if THOU.search(x[1]) or YOU.search(x[1]))
    return tuple(x for x in found if len(LONG.findall(x[1])) >= 3)


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


def judged(judge: str, part: str, n: int, seed: int) -> list[Pair]:
    """Pairs in the judge's order; the margin is by how much the chosen one is better."""
    rng, pairs = random.Random(seed), []
    for _ in range(n):
        (speaker, first), (_, second) = rng.sample(speeches(part, judge), 2)
        if judge == "pronouns":
            texts, gap = (first, second), taste(first) - taste(second)
        else:
            errors = rng.randrange(4), rng.randrange(4)
            texts = [misspell(b, e, rng) for b, e in zip((first, second), errors)]
            gap = errors[1] - errors[0]
        sides = [tuple(tokenizer().encode(t) + [tokenizer().eos_id]) for t in texts]
        if rng.random() > 1 / (1 + math.exp(-JUDGE * gap)):
            sides, gap = sides[::-1], -gap
        prompt = (tokenizer().bos_id, *tokenizer().encode(f"{speaker}:\n"))
        pairs.append(Pair(prompt, *sides, float(gap)))
    return pairs


@torch.no_grad()
def scores(f, pairs: list[Pair]) -> torch.Tensor:
    """(2, pairs) what `f` gives to chosen and rejected answers."""
    parts = [joined(pair_batch(pairs[i:i + 50])) for i in range(0, len(pairs), 50)]
    return torch.cat([f(rows).view(2, -1) for rows in parts], 1)


def agreement(found: torch.Tensor) -> float:
    return (found[0] > found[1]).float().mean().item()


def average_logprobs(rows: dict) -> torch.Tensor:
    """Of the base model, per token."""
    base = from_pretrained(asset("shakespeare")).float()
    return sequence_logprobs(base, rows) / (rows["labels"] != -100).sum(-1)


def run(judge: str, n: int, seed: int, val: list[Pair]) -> dict:
    """Train on n pairs; what the model reaches on `val`."""
    torch.manual_seed(seed)
    model = RewardModel(from_pretrained(asset("shakespeare")).float()).train()
    objective = RewardObjective(model, RewardConfig(centering=CENTERING))
    pairs = judged(judge, "train", n, seed + 100)
    loader, steps = ExampleLoader(pairs, pair_batch, BATCH, seed=seed), n // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), LR, betas=(0.9, 0.95), weight_decay=0.0)
    begun = time.process_time()
    for step, batch in zip(range(steps), loader):
        for group in optimizer.param_groups:
            group["lr"] = LR * min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))
        with torch.autocast("cpu", torch.bfloat16):
            output = objective(batch)
        optimizer.zero_grad()
        (output.loss_sum / output.n_valid).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    seconds = (time.process_time() - begun) / steps
    found = scores(model.eval(), val)
    return {"judge": judge, "pairs": n, "seed": seed, "accuracy": agreement(found),
            "error": calibration_error(*found), "mean_reward": found.mean().item(),
            "step_seconds": seconds}


def interval(values: list[float]) -> list[float]:
    return list(mean_interval(values)) if len(values) > 1 else [values[0], 0.0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=[160, 640, 2560])
    parser.add_argument("--dry", action="store_true", help="print the rows, write no file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, judges = [], {}
    for judge in ("pronouns", "misspellings"):
        val = judged(judge, "val", 1000, seed=7)
        best = sum(1 / (1 + math.exp(-JUDGE * abs(p.margin))) for p in val) / len(val)
        judges[judge] = {"best possible": best, "accuracy": [], "error": [],
                         "average log-probability": agreement(scores(average_logprobs, val))}
        for n in args.sizes:
            cell = [run(judge, n, seed, val) for seed in range(args.seeds)]
            print(*cell, sep="\n", flush=True)
            for key in ("accuracy", "error"):
                judges[judge][key].append(interval([row[key] for row in cell]))
            rows += cell
    if args.dry:
        return print(judges)
    record("reward", rows, pairs=args.sizes, seeds=args.seeds, judges=judges)


if __name__ == "__main__":
    main()
