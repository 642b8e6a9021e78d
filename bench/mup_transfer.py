"""Does the best learning rate of a narrow model stay the best on wider, and on deeper, ones?

    python bench/mup_transfer.py adamw     # widths 32 to 256: standard and muP
    python bench/mup_transfer.py muon      # widths 32 to 256: the same, and Muon's other scale
    python bench/mup_transfer.py depth     # 2 to 32 blocks: standard and CompleteP
    python bench/mup_transfer.py adamw --family mixtral      # a router and 8 experts, 2 a token
    python bench/mup_transfer.py adamw --family deepseek_v3  # latents, shared and routed experts
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

Other families have the same heads and the loss that they are trained with, balancing included; all
of their widths (of experts, of latents) grow with that of the model, the number of experts does
not. Their files are mup_transfer_NAME_FAMILY.json.
"""

import argparse
import json
import math
import statistics
import time

import torch
from common import ROOT, write
from small_decoders import held_out_bits, plays, windows_of

from skylar.models.decoder import CausalLM
from skylar.models.families.deepseek_v3 import DeepSeekV3Config
from skylar.models.families.llama3 import Llama3Config
from skylar.models.families.mixtral import MixtralConfig
from skylar.training.loss import NextTokenObjective
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
    "depth": ((2, 4, 8, 16, 32), {
        "standard": (adamw, MupConfig()), "CompleteP": (adamw, BOTH)}),
}


def llama3(width: int) -> dict:
    return dict(d_ff=2 * width, n_kv_heads=width // D_HEAD)


def mixtral(width: int) -> dict:
    """As many active parameters as the dense model's."""
    return dict(d_ff=width, n_experts=8, top_k=2, n_kv_heads=width // D_HEAD, d_head=D_HEAD,
                balance_loss=0.01)


def deepseek_v3(width: int) -> dict:
    """A dense layer, then a sparse one; heads of 16 + 8 numbers."""
    return dict(d_ff=2 * width, first_dense=1, d_expert=width // 2, n_experts=8, top_k=2,
                n_groups=2, topk_groups=1, routed_scale=1.0, q_lora_rank=3 * width // 4,
                kv_lora_rank=width // 2, qk_nope_head_dim=D_HEAD, qk_rope_head_dim=D_HEAD // 2,
                v_head_dim=D_HEAD, rope_scaling=None, bias_rate=0.01)


FAMILIES = {"llama3": (Llama3Config, llama3), "mixtral": (MixtralConfig, mixtral),
            "deepseek_v3": (DeepSeekV3Config, deepseek_v3)}


def config(vocab_size: int, width: int, depth: int, mup: MupConfig, family: str = "llama3"):
    """The model of one size; all matrices start at STD times sqrt(WIDTH / width), or by muP."""
    std, (kind, sizes) = STD, FAMILIES[family]
    if mup == MupConfig():
        std = STD * math.sqrt(WIDTH / width)
    return mup.model(kind(
        vocab_size=vocab_size, d_model=width, n_heads=width // D_HEAD, n_layers=depth,
        max_seq_len=LENGTH, tie_embeddings=True, init_std=std, **sizes(width)))


def train(config, optimizer, seed: int, steps: int) -> float:
    """Held-out bits per byte after a run: warm-up over a tenth, then a straight line to zero."""
    ids, *_ = plays()
    torch.manual_seed(seed)
    model, generator = CausalLM(config).train(), torch.Generator().manual_seed(seed)
    objective, built = NextTokenObjective(model), optimizer.build(model)
    peaks = [group["lr"] for group in built.param_groups]
    for step in range(steps):
        factor = min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps), 1)
        for group, peak in zip(built.param_groups, peaks):
            group["lr"] = peak * factor
        starts = torch.randint(len(ids) - LENGTH - 1, (BATCH,), generator=generator)
        windows = windows_of(ids, starts)
        with torch.autocast("cpu", torch.bfloat16):
            out = objective({"input_ids": windows[:, :-1], "labels": windows[:, 1:]})
        (out.loss_sum / out.n_valid).backward()
        built.step()
        built.zero_grad()
        if out.sums:  # expert counts, by which the routers' biases move
            objective.after_step(out.sums, torch.tensor(True))
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
    cfg = config(plays()[2], width, depth, mup, args.family)

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
    parser.add_argument("--family", choices=FAMILIES, default="llama3")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--sizes", type=int, nargs="+")
    parser.add_argument("--arms", nargs="+")
    parser.add_argument("--dry", action="store_true", help="print the rows, write no file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sizes, arms = ARMS[args.name]
    family = "" if args.family == "llama3" else f"_{args.family}"
    name, command = f"mup_transfer_{args.name}{family}", f"python bench/mup_transfer.py {args.name}"
    sizes, file = args.sizes or sizes, ROOT / "bench" / "results" / f"{name}.json"
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
                write(name, rows, seeds=args.seeds, steps=args.steps,
                      base_width=WIDTH, base_depth=DEPTH, batch=f"{BATCH} x {LENGTH} characters",
                      command=command + (f" --family {args.family}" if family else ""))


if __name__ == "__main__":
    main()
