"""A sparse model against a dense one of its cost: at equal active FLOPs, and at equal time.

    python bench/moe_twins.py                          # about 15 minutes on one core
    python bench/moe_twins.py --steps 4000 --keep      # 50 minutes; rows of other lengths stay
    python bench/moe_twins.py --steps 1000 --only wide --keep    # and of other variants
    python bench/moe_twins.py --seeds 2 --steps 50 --dry    # a look; writes no file

Two-layer models over the characters of Shakespeare's plays, as in `small_decoders.py`, judged by
bits per byte on the four plays that nobody trained on:

- dense: Llama with a SwiGLU of width 256;
- sparse: Mixtral with 8 experts of width 128, of which a token uses two: the same active FLOPs;
- sparse, per layer: its balance loss computed for each layer by itself, not pooled over layers;
- dense, equal time: dense, trained for as many more steps as fit into the time of sparse;
- wide: Llama with a SwiGLU of width 1,024: all the parameters of sparse, all of them active.

The time of a step is the median of turns, sparse and dense in one process on one thread (CPU time,
which is wall-clock time where nothing else runs); with `--keep` it is the stored one, so that all
rows count time alike. For each seed all variants see the same batches:
differences are those of pairs, with a 95% t-interval. Writes bench/results/moe_twins.json, which
the lesson on Mixtral plots.
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass, replace

import torch
from common import ROOT, commit, record
from small_decoders import BATCH, LENGTH, LR, held_out_bits, plays, windows_of

from skylar.layers.auxiliary import AuxiliaryOutput
from skylar.layers.router import RouterOutput, expert_counts, load_balancing_loss
from skylar.models.decoder import CausalLM, active_parameters, count_parameters, flops_per_token
from skylar.models.families.llama3 import Llama3Config
from skylar.models.families.mixtral import MixtralConfig
from skylar.training.loss import NextTokenObjective
from skylar.utils.lesson import mean_interval

RESULT = ROOT / "bench" / "results" / "moe_twins.json"
STEPS = (300, 1000)  # lengths of a run, each with a schedule of its own


@dataclass(frozen=True)
class LayerBalance:
    """The balance loss of each layer by itself, mean over layers."""

    balance: float  # coefficient

    def __call__(self, extras, batch):
        losses = [load_balancing_loss([r]) for r in extras if isinstance(r, RouterOutput)]
        return AuxiliaryOutput(loss=self.balance * sum(losses) / len(losses))


def variants() -> dict:
    """Configs by name; the first is the baseline."""
    sizes = dict(vocab_size=plays()[2], d_model=64, n_heads=4, n_kv_heads=2, d_head=16, n_layers=2,
                 max_seq_len=LENGTH, rope_theta=1e4, tie_embeddings=True, init_std=0.04)
    sparse = MixtralConfig(d_ff=128, n_experts=8, top_k=2, balance_loss=0.01, **sizes)
    return {"dense": Llama3Config(d_ff=256, **sizes), "sparse": sparse,
            "sparse, per layer": replace(sparse.decoder(), auxiliary=LayerBalance(0.01)),
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


def plans(steps: int, ratio: float) -> dict[str, tuple[str, int]]:
    """Variant -> config and steps; `ratio`: time of a sparse step over that of a dense one."""
    return {"dense": ("dense", steps), "sparse": ("sparse", steps),
            "sparse, per layer": ("sparse, per layer", steps),
            "dense, equal time": ("dense", round(steps * ratio)), "wide": ("wide", steps)}


def run_seeds(config, n_seeds: int, steps: int) -> dict:
    """Held-out bits per byte of each seed; if the model is sparse, the load of its experts, too."""
    models = [train(config, seed, steps).model for seed in range(n_seeds)]
    found = {"bits_per_byte": [round(held_out_bits(model), 4) for model in models]}
    if active_parameters(config) < count_parameters(config):
        found["load"] = [shares(model) for model in models]
    return found


def write(rows: dict, seconds: dict, ratio: float) -> None:
    """Rows by (steps, variant), in order, into the file."""
    names = list(plans(1, ratio))
    order = sorted(rows, key=lambda key: (key[0], names.index(key[1])))
    record("moe_twins", [rows[key] for key in order], baseline="dense",
           batch=f"{BATCH} x {LENGTH} characters", lr=LR,
           step_ms={name: round(1e3 * s, 2) for name, s in seconds.items()},
           step_ratio=round(ratio, 3), change="bits per byte against dense, paired by seed",
           interval="half width of the 95% t-interval of the change",
           load="of a sparse variant: share of each expert of a layer, held-out text, by seed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--only", nargs="+", choices=plans(1, 1.0), help="variants to run")
    parser.add_argument("--keep", action="store_true", help="rows that are not run again stay")
    parser.add_argument("--dry", action="store_true", help="print the rows, write no file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    configs, start, rows = variants(), time.perf_counter(), {}
    if args.keep:
        before = json.loads(RESULT.read_text())
        rows = {(row["steps"], row["variant"]): row for row in before["rows"]}
        seconds = {name: ms / 1e3 for name, ms in before["step_ms"].items()}
    else:
        seconds = step_seconds({name: configs[name] for name in ("dense", "sparse", "wide")})
    ratio = seconds["sparse"] / seconds["dense"]
    print({name: f"{1e3 * s:.1f} ms" for name, s in seconds.items()}, f"ratio {ratio:.2f}")
    for steps in args.steps:
        chosen = plans(steps, ratio)
        for name in args.only or chosen:
            config, n = configs[chosen[name][0]], chosen[name][1]
            row = run_seeds(config, args.seeds, n)
            base = row if name == "dense" else rows[steps, "dense"]
            pairs = zip(row["bits_per_byte"], base["bits_per_byte"], strict=True)
            change, interval = mean_interval([one - other for one, other in pairs])
            rows[steps, name] = {
                "steps": steps, "variant": name, "steps_taken": n, "commit": commit(),
                "parameters": count_parameters(config), "active": active_parameters(config),
                "seeds": args.seeds, "flops": n * BATCH * LENGTH * flops_per_token(config, LENGTH),
                "seconds": round(n * seconds[chosen[name][0].split(",")[0]], 2), **row,
                "change": round(change, 4), "interval": round(interval, 4)}
            print(rows[steps, name], f"{time.perf_counter() - start:.0f} s", flush=True)
    if not args.dry:
        write(rows, seconds, ratio)


if __name__ == "__main__":
    main()
