"""Does the best learning rate of a narrow model stay the best on wider, and on deeper, ones?

    python bench/mup_transfer.py adamw     # widths 32 to 256: standard and muP
    python bench/mup_transfer.py muon      # widths 32 to 256: the same, and Muon's other scale
    python bench/mup_transfer.py depth     # 2 to 16 blocks: standard, muP and CompleteP
    python bench/mup_transfer.py adamw --seeds 2 --steps 20 --sizes 32 64 --dry   # a look

Llama-shaped decoders over the characters of Shakespeare's plays: heads of width 16, tied
embeddings, trained for 100 steps of 8 windows of 64 characters (matrix products in bfloat16) with a
warm-up and a linear decay, judged by bits per byte on the four plays that nobody trained on. The
learning rates are powers of two; for each size the grid is extended until it has two rates on
either side of the best one. The standard parameterization is a strong one: all matrices start at
1 / sqrt(width), as PyTorch's and GPT-2's do, so that only learning rates and multipliers differ.

The optimum of a seed is the vertex of the parabola through the three rates around the best mean.
Its shift against the smallest size is compared seed by seed: mean and a 95% t-interval, in
doublings. Writes bench/results/mup_transfer_NAME.json after every row; a run that is stopped goes
on. Lesson 14 of chapter 01 plots the files.
"""

import argparse
import json
import math
import statistics
import time

import torch
from common import ROOT, write
from small_decoders import held_out_bits, nats, plays, windows_of

from skylar.models.decoder import CausalLM
from skylar.models.families.llama3 import Llama3Config
from skylar.training.muon import MuonConfig
from skylar.training.mup import MupConfig
from skylar.training.optim import AdamWConfig
from skylar.utils.lesson import mean_interval

WIDTH, DEPTH, D_HEAD, STD = 32, 2, 16, 0.1  # of the smallest model
LENGTH, BATCH = 64, 8


def adamw(k):
    return AdamWConfig(lr=2.0**k)


def muon(k):
    return MuonConfig(lr=2.0**k, adamw_lr=2.0**k)


def muon_original(k):
    return MuonConfig(lr=2.0**k, adamw_lr=2.0**k, adjust_lr="original")


WIDE, BOTH = MupConfig(base_d_model=WIDTH), MupConfig(base_d_model=WIDTH, base_n_layers=DEPTH)
ARMS = {  # name -> sizes, arms: optimizer and parameterization
    "adamw": ((32, 64, 128, 256), {"standard": (adamw, MupConfig()), "muP": (adamw, WIDE)}),
    "muon": ((32, 64, 128, 256), {
        "standard": (muon, MupConfig()), "muP": (muon, WIDE),
        "standard, original scale": (muon_original, MupConfig())}),
    "depth": ((2, 4, 8, 16), {
        "standard": (adamw, MupConfig()), "CompleteP": (adamw, BOTH)}),
}


def config(vocab_size: int, width: int, depth: int, mup: MupConfig):
    """The model of one size; all matrices start at STD times sqrt(WIDTH / width), or by muP."""
    std = STD if mup != MupConfig() else STD * math.sqrt(WIDTH / width)
    heads = width // D_HEAD
    return mup.model(Llama3Config(
        vocab_size=vocab_size, d_model=width, n_heads=heads, n_kv_heads=heads, n_layers=depth,
        d_ff=2 * width, max_seq_len=LENGTH, tie_embeddings=True, init_std=std))


def train(config, optimizer, seed: int, steps: int) -> float:
    """Held-out bits per byte after a run: warm-up over a tenth, then a straight line to zero."""
    ids, *_ = plays()
    torch.manual_seed(seed)
    model, generator = CausalLM(config).train(), torch.Generator().manual_seed(seed)
    built = optimizer.build(model)
    peaks = [group["lr"] for group in built.param_groups]
    for step in range(steps):
        factor = min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps), 1)
        for group, peak in zip(built.param_groups, peaks):
            group["lr"] = peak * factor
        starts = torch.randint(len(ids) - LENGTH - 1, (BATCH,), generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            loss = nats(model, windows_of(ids, starts))
        loss.backward()
        built.step()
        built.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        bits = held_out_bits(model.eval(), 512)
    return bits if math.isfinite(bits) else 99.0


def optimum(bits: dict[int, float], best: int) -> float:
    """Vertex of the parabola through `best` and its neighbors, log2 of the learning rate."""
    left, middle, right = (bits[best + i] for i in (-1, 0, 1))
    curvature = left - 2 * middle + right
    if curvature <= 0:
        return float(best)
    return best + max(-1.0, min(1.0, (left - right) / (2 * curvature)))


def search(run, start: int, seeds: int) -> tuple[int, dict[int, list[float]]]:
    """Best k, and the bits of every k tried: two at least on either side of the best."""
    found: dict[int, list[float]] = {}
    best, wanted = start, {start - 2, start - 1, start, start + 1, start + 2}
    while wanted:
        for k in sorted(wanted):
            found[k] = [run(k, seed) for seed in range(seeds)]
        best = min(found, key=lambda k: statistics.fmean(found[k]))
        wanted = set(range(best - 2, best + 3)) - set(found)
    return best, dict(sorted(found.items()))


def one_size(name, arm, size, start, args) -> dict:
    """A row: all rates and seeds of one size."""
    optimizer, mup = ARMS[name][1][arm]
    width, depth = (size, DEPTH) if name != "depth" else (WIDTH, size)
    cfg = config(plays()[2], width, depth, mup)

    def run(k, seed):
        return train(cfg, mup.optimizer(optimizer(k)), seed, args.steps)

    best, bits = search(run, start, args.seeds)
    optima = [optimum({k: v[seed] for k, v in bits.items()}, best) for seed in range(args.seeds)]
    return {"arm": arm, "size": size, "best": best,
            "bits_per_byte": {str(k): [round(b, 4) for b in v] for k, v in bits.items()},
            "log2_optimum": [round(o, 3) for o in optima]}


def add_shifts(rows: list[dict]) -> None:
    """How far each optimum is from that of its arm's smallest size."""
    for row in rows:
        first = next(r for r in rows if r["arm"] == row["arm"])
        if row is not first:
            pairs = [a - b for a, b in zip(row["log2_optimum"], first["log2_optimum"])]
            row["shift"], row["interval"] = (round(x, 3) for x in mean_interval(pairs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=ARMS)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--sizes", type=int, nargs="+")
    parser.add_argument("--arms", nargs="+")
    parser.add_argument("--dry", action="store_true", help="print the rows, write no file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sizes, arms = ARMS[args.name]
    sizes, file = args.sizes or sizes, ROOT / "bench" / "results" / f"mup_transfer_{args.name}.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() and not args.dry else []
    begin = time.perf_counter()
    for size in sizes:
        for arm in args.arms or arms:
            if any((r["arm"], r["size"]) == (arm, size) for r in rows):
                continue
            start = next((r["best"] for r in reversed(rows) if r["arm"] == arm), -6)
            rows.append(one_size(args.name, arm, size, start, args))
            add_shifts(rows)
            print(rows[-1], f"{time.perf_counter() - begin:.0f} s", flush=True)
            if not args.dry:
                write(f"mup_transfer_{args.name}", rows, seeds=args.seeds, steps=args.steps,
                      base_width=WIDTH, base_depth=DEPTH, batch=f"{BATCH} x {LENGTH} characters",
                      command=f"python bench/mup_transfer.py {args.name}")


if __name__ == "__main__":
    main()
