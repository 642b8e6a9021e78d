"""Balancing experts by a bias, by a loss, or not at all; and what a bias in the weights does.

    python bench/bias_balance.py                              # all arms, about 20 minutes
    python bench/bias_balance.py --arms "layer loss 0.01" --keep    # rows of other arms stay
    python bench/bias_balance.py --seeds 2 --steps 50 --dry   # a look; writes no file

Two-layer decoders over the characters of Shakespeare's plays, as in small_decoders.py, with
DeepSeekMoE layers: 16 fine-grained experts of which a token uses 4, from 2 of 4 groups, and a
shared one. All arms have the same sigmoid router; for each seed they start alike and see the same
batches: differences to "none" are compared seed by seed, mean and a 95% t-interval. "loss" is the
balance loss pooled over layers, as in transformers; "layer loss" is that of each layer by itself,
the fairer baseline, since the biases of each layer move by themselves, too. MaxVio is the load of
the most used expert over the mean load, minus 1; over all of the held-out windows, mean of the
layers. Writes bench/results/bias_balance.json, which lesson 03 of chapter 02 plots.
"""

import argparse
import json
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from common import ROOT, commit, record
from small_decoders import LENGTH, LR, decoder, held_out_bits, plays, windows_of

from skylar.layers.auxiliary import AuxiliaryOutput
from skylar.layers.deepseek_moe import (
    BiasBalancingConfig,
    DeepSeekMoEConfig,
    GroupedSigmoidConfig,
    GroupedSigmoidRouter,
    max_violation,
)
from skylar.layers.gqa import GQAConfig
from skylar.layers.router import RouterLossConfig, expert_counts
from skylar.models.decoder import CausalLM
from skylar.utils.lesson import mean_interval

WIDTH, D_FF, BATCH = 64, 32, 16
RESULT = ROOT / "bench" / "results" / "bias_balance.json"
ROUTER = dict(n_experts=16, top_k=4, n_groups=4, topk_groups=2, scale=2.0)


class BiasedWeights(GroupedSigmoidRouter):
    """The ablation: score + bias selects and weights."""

    def forward(self, x):
        routed = super().forward(x)
        biased = routed.logits.sigmoid() + self.e_score_correction_bias
        weights = biased.gather(-1, routed.experts)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return routed._replace(weights=self.config.scale * weights)


@dataclass(frozen=True, kw_only=True)
class BiasedWeightsConfig(GroupedSigmoidConfig):
    def build(self, d_model):
        return BiasedWeights(self, d_model)


@dataclass(frozen=True)
class LayerLoss:
    """The balance loss of each layer by itself, of the router's own scores; top_k if balanced."""

    balance: float  # coefficient

    def __call__(self, extras, batch):
        loss = 0.0
        for routed in extras:
            scores = routed.logits.sigmoid()
            mean = (scores / scores.sum(-1, keepdim=True)).mean(0)  # (E,)
            loss = loss + len(mean) * (expert_counts(routed) * mean).sum() / len(scores)
        return AuxiliaryOutput(loss=self.balance * loss / len(extras))


PLAIN, ABLATED = GroupedSigmoidConfig(**ROUTER), BiasedWeightsConfig(**ROUTER)
ARMS = {  # name -> router, what is made of its choices
    "none": (PLAIN, None),
    "loss 0.001": (PLAIN, RouterLossConfig(balance=0.001)),
    "loss 0.01": (PLAIN, RouterLossConfig(balance=0.01)),
    "loss 0.1": (PLAIN, RouterLossConfig(balance=0.1)),
    "layer loss 0.01": (PLAIN, LayerLoss(0.01)),
    "layer loss 0.1": (PLAIN, LayerLoss(0.1)),
    "bias 0.001": (PLAIN, BiasBalancingConfig(rate=0.001)),
    "bias 0.01": (PLAIN, BiasBalancingConfig(rate=0.01)),
    "bias 0.01 in weights": (ABLATED, BiasBalancingConfig(rate=0.01)),
}


@torch.no_grad()
def held_out_violation(model: CausalLM, n_windows: int = 1024) -> float:
    """MaxVio over equally spaced held-out windows, mean of the layers."""
    held_out, counts = plays()[1], 0
    starts = torch.linspace(0, len(held_out) - LENGTH - 1, n_windows).long()
    for part in starts.split(256):
        _, extras = model.model(windows_of(held_out, part)[:, :-1], return_extras=True)
        counts = counts + torch.stack([expert_counts(routed) for routed in extras])
    return max_violation(counts).mean().item()


def train(name: str, seed: int, steps: int) -> dict:
    """Held-out bits per byte, MaxVio there and on the way, the biases at the end."""
    ids, _, vocab_size, _ = plays()
    router, auxiliary = ARMS[name]
    torch.manual_seed(seed)
    model = CausalLM(decoder(vocab_size, WIDTH, GQAConfig(n_heads=4, n_kv_heads=2),
                             DeepSeekMoEConfig(router=router, d_ff=D_FF))).train()
    generator, keep, history = torch.Generator().manual_seed(seed), torch.tensor(True), []
    optimizer = torch.optim.AdamW(model.parameters(), LR, betas=(0.9, 0.95), fused=True)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LR * min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))
        windows = windows_of(ids, torch.randint(len(ids) - 65, (BATCH,), generator=generator))
        hidden, extras = model.model(windows[:, :-1], return_extras=True)
        loss = F.cross_entropy(model.lm_head(hidden).flatten(0, 1), windows[:, 1:].flatten())
        more = auxiliary(extras, {"input_ids": windows}) if auxiliary else AuxiliaryOutput()
        (loss + more.loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        if more.sums:
            auxiliary.after_step(model, more.sums, keep)
        counts = torch.stack([expert_counts(routed) for routed in extras])
        history.append(max_violation(counts).mean().item())
    biases = [layer.mlp.gate.e_score_correction_bias for layer in model.model.layers]
    last = torch.tensor(history).split(steps // 40)  # means of a fortieth of the run
    return {"bits": held_out_bits(model.eval()), "violation": held_out_violation(model),
            "history": [part.mean().item() for part in last],
            "largest_bias": max(b.abs().max().item() for b in biases)}


def row(name: str, runs: list[dict], base: list[float] | None) -> dict:
    """A row of the file; `base`: bits per byte of the arm that it is compared with."""
    bits = [round(r["bits"], 4) for r in runs]
    found = {"arm": name, "commit": commit(), "bits_per_byte": bits,
             "max_violation": [round(r["violation"], 3) for r in runs],
             "largest_bias": [round(r["largest_bias"], 3) for r in runs],
             "history": [[round(v, 3) for v in r["history"]] for r in runs]}
    if base:
        change, interval = mean_interval([a - b for a, b in zip(bits, base)])
        found |= {"change": round(change, 4), "interval": round(interval, 4)}
    return found


def kept_rows(seeds: int, steps: int) -> dict[str, dict]:
    """Rows of the file by arm; SystemExit if they are of other runs."""
    stored = json.loads(RESULT.read_text())
    if (stored["seeds"], stored["steps"]) != (seeds, steps):
        raise SystemExit(f"{RESULT.name} has {stored['seeds']} seeds and {stored['steps']} steps: "
                         "--keep needs the same --seeds and --steps")
    return {found["arm"]: found for found in stored["rows"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--keep", action="store_true", help="rows of other arms stay")
    parser.add_argument("--dry", action="store_true", help="print the rows, write no file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = kept_rows(args.seeds, args.steps) if args.keep else {}
    start, base = time.perf_counter(), "none" if args.keep else args.arms[0]
    for name in args.arms:
        runs = [train(name, seed, args.steps) for seed in range(args.seeds)]
        rows[name] = row(name, runs, rows[base]["bits_per_byte"] if name != base else None)
        print({k: v for k, v in rows[name].items() if k != "history"},
              f"{time.perf_counter() - start:.0f} s", flush=True)
    if not args.dry:
        record("bias_balance", [rows[name] for name in ARMS if name in rows],
               seeds=args.seeds, steps=args.steps, tokens_a_step=1024)


if __name__ == "__main__":
    main()
