"""Sparse against dense decoders at equal active FLOPs, and what keeps their experts in use.

    python bench/router_balance.py                              # all arms, about 20 minutes
    python bench/router_balance.py --seeds 2 --steps 100 --dry  # a look; writes no file

Two-layer decoders over the characters of Shakespeare's plays, as in small_decoders.py: 8 experts of
which a token uses 2, against a dense layer as wide as 2 experts (equal active FLOPs, but for the
router) and one as wide as 8 (equal parameters, 4 times the FLOPs). For each seed all arms see the
same batches; differences to the first arm are compared seed by seed: mean and a 95% t-interval.
The load of an expert is the share of the tokens that use it, over that of a balanced router: 1 is
balanced, E / k the most. Writes bench/results/router_balance.json, which lessons 00 and 01 of
chapter 02 plot.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from common import record
from small_decoders import LR, decoder, held_out_bits, plays, windows_of

from skylar.layers.gqa import GQAConfig
from skylar.layers.mlp import SwiGLUConfig
from skylar.layers.moe import MoEConfig
from skylar.layers.router import RouterLossConfig, TopKConfig, expert_counts
from skylar.models.decoder import CausalLM, count_parameters, forward_flops
from skylar.utils.lesson import mean_interval

WIDTH, D_FF, E, K, BATCH = 64, 64, 8, 2, 32


def moe(**options) -> MoEConfig:
    return MoEConfig(router=TopKConfig(n_experts=E, top_k=K), d_ff=D_FF, **options)


ARMS = {  # name -> feed-forward layer, auxiliary losses, whether the router is trained
    "dense": (SwiGLUConfig(d_ff=K * D_FF), None, True),
    "wide dense": (SwiGLUConfig(d_ff=E * D_FF), None, True),
    "no balancing": (moe(), RouterLossConfig(balance=0.0), True),
    "frozen router": (moe(), RouterLossConfig(balance=0.0), False),
    "balance 0.001": (moe(), RouterLossConfig(balance=0.001), True),
    "balance 0.01": (moe(), RouterLossConfig(balance=0.01), True),
    "balance 0.1": (moe(), RouterLossConfig(balance=0.1), True),
    "balance 0.01, z 0.001": (moe(), RouterLossConfig(balance=0.01, z=0.001), True),
    "capacity 1.25": (moe(capacity_factor=1.25), RouterLossConfig(balance=0.01), True),
    "capacity 1": (moe(capacity_factor=1.0), RouterLossConfig(balance=0.01), True),
}


def loads(extras) -> torch.Tensor:
    """(L, E) tokens of each expert over the mean of all."""
    counts = torch.stack([expert_counts(routed) for routed in extras])
    return counts / counts.mean(-1, keepdim=True)


def train(name: str, seed: int, steps: int) -> dict:
    """Held-out bits per byte of a run, and the experts' load 50 times on the way."""
    ids, _, vocab_size, _ = plays()
    ffn, auxiliary, routers = ARMS[name]
    torch.manual_seed(seed)
    model = CausalLM(decoder(vocab_size, WIDTH, GQAConfig(n_heads=4, n_kv_heads=2), ffn)).train()
    for parameter, p in model.named_parameters():
        p.requires_grad_(routers or "mlp.gate" not in parameter)
    generator, history = torch.Generator().manual_seed(seed), []
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, LR, betas=(0.9, 0.95), fused=True)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LR * min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))
        starts = torch.randint(len(ids) - 65, (BATCH,), generator=generator)
        windows = windows_of(ids, starts)
        hidden, extras = model.model(windows[:, :-1], return_extras=True)
        loss = F.cross_entropy(model.lm_head(hidden).flatten(0, 1), windows[:, 1:].flatten())
        if auxiliary is not None:
            loss = loss + auxiliary(extras, {}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if extras and step % max(1, steps // 50) == 0:
            history.append((step, loads(extras).tolist()))
    largest = max((abs(r.logits).max().item() for r in extras), default=0.0)
    return {"bits": held_out_bits(model.eval()), "loads": history, "largest_logit": largest}


def row(name: str, runs: list[dict], first: list[dict]) -> dict:
    ffn, _, _ = ARMS[name]
    config = decoder(plays()[2], WIDTH, GQAConfig(n_heads=4, n_kv_heads=2), ffn)
    bits, base = ([round(r["bits"], 4) for r in rs] for rs in (runs, first))
    found = {"arm": name, "parameters": count_parameters(config),
             "flops_per_token": forward_flops(config, 64), "bits_per_byte": bits}
    if runs is not first:
        change, interval = mean_interval([a - b for a, b in zip(bits, base)])
        found |= {"change": round(change, 4), "interval": round(interval, 4)}
    if runs[0]["loads"]:
        last = [torch.tensor([load for _, load in r["loads"][-5:]]).mean(0) for r in runs]
        found |= {
            "max_load": [round(x.amax(-1).mean().item(), 3) for x in last],
            "min_load": [round(x.amin(-1).mean().item(), 3) for x in last],
            "largest_logit": [round(r["largest_logit"], 2) for r in runs],
            "steps": [step for step, _ in runs[0]["loads"]],
            "loads": [[[round(x, 2) for x in layer] for layer in load]
                      for _, load in runs[0]["loads"]]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--dry", action="store_true", help="print the rows, write no file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs, rows, start = {}, [], time.perf_counter()
    for name in args.arms:
        runs[name] = [train(name, seed, args.steps) for seed in range(args.seeds)]
        rows.append(row(name, runs[name], runs[args.arms[0]]))
        print({k: v for k, v in rows[-1].items() if k != "loads"},
              f"{time.perf_counter() - start:.0f} s", flush=True)
    if not args.dry:
        record("router_balance", rows, baseline=args.arms[0], seeds=args.seeds, steps=args.steps,
               batch=f"{BATCH} x 64 characters", experts=E, top_k=K, lr=LR,
               change="bits per byte against the baseline, paired by seed",
               interval="half width of the 95% t-interval of the change",
               load="tokens of an expert over the mean of all experts; seed 0 over training")


if __name__ == "__main__":
    main()
