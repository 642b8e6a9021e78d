"""Balancing experts by a bias, by a loss, or not at all; and what a bias in the weights does.

    python bench/bias_balance.py                              # all arms, about 15 minutes
    python bench/bias_balance.py --seeds 2 --steps 50 --dry   # a look; writes no file

Two-layer decoders over the characters of Shakespeare's plays, as in small_decoders.py, with
DeepSeekMoE layers: 16 fine-grained experts of which a token uses 4, from 2 of 4 groups, and a
shared one. All arms have the same sigmoid router; for each seed they start alike and see the same
batches: differences to the first arm are compared seed by seed, mean and a 95% t-interval. MaxVio
is the load of the most used expert over the mean load, minus 1; over all of the held-out windows,
mean of the layers. Writes bench/results/bias_balance.json, which lesson 03 of chapter 02 plots.
"""

import argparse
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from common import record
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


PLAIN, ABLATED = GroupedSigmoidConfig(**ROUTER), BiasedWeightsConfig(**ROUTER)
ARMS = {  # name -> router, what is made of its choices
    "none": (PLAIN, None),
    "loss 0.001": (PLAIN, RouterLossConfig(balance=0.001)),
    "loss 0.01": (PLAIN, RouterLossConfig(balance=0.01)),
    "loss 0.1": (PLAIN, RouterLossConfig(balance=0.1)),
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


def row(name: str, runs: list[dict], first: list[dict]) -> dict:
    bits, base = ([round(r["bits"], 4) for r in rs] for rs in (runs, first))
    found = {"arm": name, "bits_per_byte": bits,
             "max_violation": [round(r["violation"], 3) for r in runs],
             "largest_bias": [round(r["largest_bias"], 3) for r in runs],
             "history": [[round(v, 3) for v in r["history"]] for r in runs]}
    if runs is not first:
        change, interval = mean_interval([a - b for a, b in zip(bits, base)])
        found |= {"change": round(change, 4), "interval": round(interval, 4)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--dry", action="store_true", help="print the rows, write no file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs, rows, start = {}, [], time.perf_counter()
    for name in args.arms:
        runs[name] = [train(name, seed, args.steps) for seed in range(args.seeds)]
        rows.append(row(name, runs[name], runs[args.arms[0]]))
        print({k: v for k, v in rows[-1].items() if k != "history"},
              f"{time.perf_counter() - start:.0f} s", flush=True)
    if not args.dry:
        record("bias_balance", rows, seeds=args.seeds, steps=args.steps, tokens_a_step=1024)


if __name__ == "__main__":
    main()
