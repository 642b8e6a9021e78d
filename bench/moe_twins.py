"""A sparse model against its dense twin: at equal active FLOPs, and at equal time.

    python bench/moe_twins.py                          # about 15 minutes on one core
    python bench/moe_twins.py --steps 1000 --seeds 3 --skip wide --keep    # rows of 300 steps stay
    python bench/moe_twins.py --seeds 2 --steps 50 --dry    # a look; writes no file

Two-layer models over the characters of Shakespeare's plays, as in `small_decoders.py`, judged by
bits per byte on the four plays that nobody trained on:

- dense: Llama with a SwiGLU of width 256;
- sparse: Mixtral with 8 experts of width 128, of which a token uses two: the same active FLOPs;
- dense, equal time: dense, trained for as many more steps as fit into the time of sparse;
- wide: Llama with a SwiGLU of width 1,024: all the parameters of sparse, all of them active.

The time of a step is the median of turns, sparse and dense in one process on one thread (CPU time,
which is wall-clock time where nothing else runs). For each seed all variants see the same batches:
differences are those of pairs, with a 95% t-interval. Writes bench/results/moe_twins.json, which
the lesson on Mixtral plots.
"""

import argparse
import json
import statistics
import time

import torch
from common import ROOT, record
from small_decoders import BATCH, LENGTH, LR, held_out_bits, plays, windows_of

from skylar.layers.router import expert_counts
from skylar.models.decoder import CausalLM, active_parameters, count_parameters, flops_per_token
from skylar.models.families.llama3 import Llama3Config
from skylar.models.families.mixtral import MixtralConfig
from skylar.training.loss import NextTokenObjective
from skylar.utils.lesson import mean_interval

RESULT = ROOT / "bench" / "results" / "moe_twins.json"
STEPS = (300, 1000)  # lengths of a run, each with a schedule of its own


def variants() -> dict:
    """Configs by name; the first is the baseline."""
    sizes = dict(vocab_size=plays()[2], d_model=64, n_heads=4, n_kv_heads=2, d_head=16, n_layers=2,
                 max_seq_len=LENGTH, rope_theta=1e4, tie_embeddings=True, init_std=0.04)
    return {"dense": Llama3Config(d_ff=256, **sizes),
            "sparse": MixtralConfig(d_ff=128, n_experts=8, top_k=2, balance_loss=0.01, **sizes),
            "wide": Llama3Config(d_ff=1024, **sizes)}


class Run:
    """A model in training: `step` takes one more batch of `BATCH` windows."""

    def __init__(self, config, seed: int, steps: int):
        torch.manual_seed(seed)
        self.model, self.steps, self.done = CausalLM(config).train(), steps, 0
        self.generator = torch.Generator().manual_seed(seed)
        self.objective = NextTokenObjective(self.model)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), LR, betas=(0.9, 0.95), fused=True)

    def step(self) -> None:
        """Warm-up over a tenth, then a straight line to zero."""
        done, steps = self.done, self.steps
        for group in self.optimizer.param_groups:
            group["lr"] = LR * min((done + 1) / (0.1 * steps), (steps - done) / (0.9 * steps))
        ids = plays()[0]
        starts = torch.randint(len(ids) - LENGTH - 1, (BATCH,), generator=self.generator)
        windows = windows_of(ids, starts)
        output = self.objective({"input_ids": windows[:, :-1], "labels": windows[:, 1:]})
        (output.loss_sum / output.n_valid).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1


def train(config, seed: int, steps: int) -> Run:
    run = Run(config, seed, steps)
    for _ in range(steps):
        run.step()
    run.model.eval()
    return run


def step_seconds(configs: dict, rounds: int = 25, steps: int = 4) -> dict[str, float]:
    """Median CPU seconds of a step of each, in turns."""
    runs = {name: Run(config, 0, 10**6) for name, config in configs.items()}
    took = {name: [] for name in runs}
    for n in range(rounds + 2):
        for name, run in runs.items():
            start = time.process_time()
            for _ in range(steps):
                run.step()
            if n >= 2:  # after a warm-up
                took[name].append((time.process_time() - start) / steps)
    return {name: statistics.median(values) for name, values in took.items()}


@torch.no_grad()
def shares(model: CausalLM) -> list[list[float]]:
    """Of the held-out characters' (token, slot) pairs, the share of each expert; a list a layer."""
    held_out = plays()[1]
    starts = torch.linspace(0, len(held_out) - LENGTH - 1, 256).long()
    _, extras = model.model(windows_of(held_out, starts)[:, :-1], return_extras=True)
    counts = [expert_counts(routed) for routed in extras]
    return [[round(float(n / c.sum()), 4) for n in c] for c in counts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--skip", nargs="*", default=(), help="variants to leave out")
    parser.add_argument("--keep", action="store_true", help="rows of other lengths stay")
    parser.add_argument("--dry", action="store_true", help="print the rows, write no file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    configs, start = variants(), time.perf_counter()
    seconds = step_seconds(configs)
    ratio = seconds["sparse"] / seconds["dense"]
    print({name: f"{1e3 * s:.1f} ms" for name, s in seconds.items()}, f"ratio {ratio:.2f}")
    before = json.loads(RESULT.read_text()) if args.keep else {"rows": [], "load": []}
    rows, load = ([row for row in before[key] if row["steps"] not in args.steps]
                  for key in ("rows", "load"))
    for steps in args.steps:
        plans = {"dense": ("dense", steps), "sparse": ("sparse", steps),
                 "dense, equal time": ("dense", round(steps * ratio)), "wide": ("wide", steps)}
        plans = {name: plan for name, plan in plans.items() if name not in args.skip}
        bits = {name: [] for name in plans}
        for seed in range(args.seeds):
            for name, (kind, n) in plans.items():
                model = train(configs[kind], seed, n).model
                bits[name].append(held_out_bits(model))
                if kind == "sparse":
                    load.append({"steps": steps, "seed": seed, "shares": shares(model)})
        for name, (kind, n) in plans.items():
            pairs = [one - other for one, other in zip(bits[name], bits["dense"])]
            change, interval = mean_interval(pairs) if name != "dense" else (0.0, 0.0)
            config = configs[kind]
            rows.append({
                "steps": steps, "variant": name, "steps_taken": n,
                "parameters": count_parameters(config), "active": active_parameters(config),
                "seeds": args.seeds, "flops": n * BATCH * LENGTH * flops_per_token(config, LENGTH),
                "seconds": round(n * seconds[kind], 2),
                "bits_per_byte": [round(b, 4) for b in bits[name]],
                "change": round(change, 4), "interval": round(interval, 4)})
            print(rows[-1], f"{time.perf_counter() - start:.0f} s", flush=True)
    if not args.dry:
        record("moe_twins", rows, baseline="dense",
               batch=f"{BATCH} x {LENGTH} characters", lr=LR,
               step_ms={name: round(1e3 * s, 2) for name, s in seconds.items()},
               step_ratio=round(ratio, 3), load=load,
               change="bits per byte against dense, paired by seed",
               interval="half width of the 95% t-interval of the change")


if __name__ == "__main__":
    main()
