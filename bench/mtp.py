"""Does multi-token prediction help the next token, and how many of its drafts are accepted?

    python bench/mtp.py                              # all arms
    python bench/mtp.py --arms "weight 0.3"          # one of them; the file keeps the others
    python bench/mtp.py --seeds 2 --steps 50 --dry   # a look; writes no file

Two-layer decoders over the characters of Shakespeare's plays, as in small_decoders.py: trained on
the next token, for as many steps and for as many FLOPs as with a module; and with a module. For
each seed all arms start with the same weights of the model and see the same batches: differences
to the first arm are compared seed by seed, mean and a 95% t-interval.
Acceptance is teacher forced, on equally spaced held-out windows. Writes bench/results/mtp.json.
"""

import argparse
import json

import torch
from common import ROOT, record
from small_decoders import LENGTH, LR, decoder, held_out_bits, plays, windows_of

from skylar.layers.gqa import GQAConfig
from skylar.layers.mlp import SwiGLUConfig
from skylar.models.decoder import CausalLM, flops_per_token
from skylar.models.mtp import MTPConfig, acceptance
from skylar.training.loss import MTPObjective, NextTokenObjective
from skylar.utils.lesson import mean_interval

WIDTH, D_FF, BATCH = 64, 192, 16
EQUAL = "next token, equal FLOPs"  # as many as one module takes
ARMS: dict[str, MTPConfig | None] = {
    "next token": None,
    EQUAL: None,
    "weight 0.3": MTPConfig(weight=0.3),
}


def steps_of(name: str, steps: int, config) -> int:
    if name != EQUAL:
        return steps
    more = 3 * MTPConfig().flops(config, LENGTH) / flops_per_token(config, LENGTH)
    return round(steps * (1 + more))


def batch_of(windows: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": windows[:, :-1], "labels": windows[:, 1:]}


def accepted(objective: MTPObjective, n_windows: int = 512) -> list[float]:
    """Share of accepted drafts, for each depth."""
    held_out = plays()[1]
    starts, totals = torch.linspace(0, len(held_out) - LENGTH - 1, n_windows).long(), 0
    for part in starts.split(128):
        batch = batch_of(windows_of(held_out, part))
        found = acceptance(objective.model, objective.mtp, batch)
        totals = totals + torch.tensor([[int(a), int(n)] for a, n in found])
    return (totals[:, 0] / totals[:, 1]).tolist()


def train(name: str, seed: int, steps: int) -> dict:
    """Held-out bits per byte of the model alone, and acceptance."""
    ids, _, vocab_size, _ = plays()
    torch.manual_seed(seed)
    config = decoder(vocab_size, WIDTH, GQAConfig(n_heads=4, n_kv_heads=2),
                     SwiGLUConfig(d_ff=D_FF))
    model, mtp, steps = CausalLM(config), ARMS[name], steps_of(name, steps, config)
    objective = NextTokenObjective(model) if mtp is None else MTPObjective(model, mtp)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(objective.parameters(), LR, betas=(0.9, 0.95), fused=True)
    objective.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LR * min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))
        first = torch.randint(len(ids) - LENGTH - 1, (BATCH,), generator=generator)
        out = objective(batch_of(windows_of(ids, first)))
        (out.loss_sum / out.n_valid).backward()
        optimizer.step()
        optimizer.zero_grad()
    objective.eval()
    return {"bits": held_out_bits(model), "steps": steps,
            "accepted": accepted(objective) if mtp else []}


def row(name: str, runs: list[dict]) -> dict:
    return {"arm": name, "steps": runs[0]["steps"],
            "bits_per_byte": [round(r["bits"], 4) for r in runs],
            "accepted": [[round(a, 4) for a in r["accepted"]] for r in runs]}


def compared(rows: list[dict]) -> list[dict]:
    """The rows in the order of ARMS, each with its difference to the first, seed by seed."""
    rows = sorted(rows, key=lambda r: list(ARMS).index(r["arm"]))
    for found in rows[1:]:
        pairs = zip(found["bits_per_byte"], rows[0]["bits_per_byte"])
        change, interval = mean_interval([a - b for a, b in pairs])
        found |= {"change": round(change, 4), "interval": round(interval, 4)}
    return rows


def rows_of_others(args) -> list[dict]:
    """What the file holds of other arms, if they ran for as many steps and seeds."""
    path = ROOT / "bench" / "results" / "mtp.json"
    old = json.loads(path.read_text()) if path.exists() else {"rows": []}
    same = (old.get("steps"), old.get("seeds")) == (args.steps, args.seeds)
    return [r for r in old["rows"] if same and r["arm"] not in args.arms]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--dry", action="store_true", help="print the rows, write no file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row(name, [train(name, seed, args.steps) for seed in range(args.seeds)])
            for name in args.arms]
    if args.dry:
        return print(*rows, sep="\n")
    record("mtp", compared(rows + rows_of_others(args)), seeds=args.seeds, steps=args.steps,
           tokens_a_step=BATCH * LENGTH)


if __name__ == "__main__":
    main()
