"""Does QK-clip bound attention logits that explode, what does it cost in loss, and in time?

    python bench/qk_clip.py            # 3 learning rates, 3 thresholds, QK-norm, 5 seeds
    python bench/qk_clip.py --time     # only the time of a step, tracked and not

A byte-level model of Shakespeare without QK-norm, trained by Muon. The same seed has the same
weights and batches. For each run: bits per byte on held-out plays, the largest attention logit of
the last tenth of the steps, and the part of all (head, step) pairs that were clipped.
"""

import argparse
import math
import time

import torch
import torch.nn.functional as F
from common import record
from torch import Tensor

from skylar.data.held_out import train_text, val_text
from skylar.models.decoder import CausalLM
from skylar.models.presets import get_config
from skylar.training.loss import NextTokenObjective
from skylar.training.muon import MuonConfig
from skylar.training.qk_clip import QKClipConfig

LENGTH, BATCH, FREE = 128, 16, 1e30  # a threshold that is never reached: logits are measured
SIZES = dict(vocab_size=256, d_model=128, n_heads=4, n_kv_heads=2, d_head=32, d_ff=256,
             n_layers=3, max_seq_len=LENGTH)


def byte_ids(text: str) -> Tensor:
    """The UTF-8 bytes of `text`."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def new_objective(family: str, tau: float | None, seed: int) -> NextTokenObjective:
    """llama3: without QK-norm; qwen3: with it."""
    torch.manual_seed(seed)
    objective = NextTokenObjective(CausalLM(get_config("test", family, **SIZES)).train())
    QKClipConfig(tau=tau).attach(objective)
    return objective


def batch_of(ids: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Random windows of LENGTH bytes."""
    starts = torch.randint(len(ids) - LENGTH - 1, (BATCH, 1), generator=generator)
    window = ids[starts + torch.arange(LENGTH + 1)]
    return {"input_ids": window[:, :-1], "labels": window[:, 1:]}


@torch.no_grad()
def bits(model: CausalLM, ids: Tensor) -> float:
    """Bits per byte on 256 windows that cover the held-out plays evenly."""
    starts = torch.linspace(0, len(ids) - LENGTH - 2, 256).long()
    windows = ids[starts[:, None] + torch.arange(LENGTH + 1)]
    losses = [F.cross_entropy(model.eval()(w[:, :-1]).mT, w[:, 1:]).item()
              for w in windows.split(64)]
    return sum(losses) / len(losses) / math.log(2)


def run(seed, family, tau, lr, steps, text, held_out) -> dict:
    """One training run; `tau` None: logits are measured and not clipped."""
    objective = new_objective(family, (tau or FREE) if family == "llama3" else None, seed)
    optimizer = MuonConfig(lr=lr, adamw_lr=3e-3).build(objective.model)
    generator, maxima = torch.Generator().manual_seed(seed), []
    for step in range(steps):
        for group in optimizer.param_groups:  # linear decay over the last half
            group.setdefault("peak", group["lr"])
            group["lr"] = group["peak"] * min(1.0, 2 * (1 - step / steps))
        output = objective(batch_of(text, generator))
        (output.loss_sum / output.n_valid).backward()
        optimizer.step()
        optimizer.zero_grad()
        if output.maxima:
            maxima.append(output.maxima["attention_logits"])
            objective.after_step(output.maxima, torch.tensor(True))
    found = torch.stack(maxima) if maxima else None
    late = None if found is None else found[-max(1, steps // 10):].max().item()
    part = None if found is None or tau is None else (found > tau).float().mean().item()
    return {"seed": seed, "family": family, "tau": tau, "lr": lr, "steps": steps,
            "bits_per_byte": bits(objective.model, held_out), "largest_logit": late,
            "largest_logit_ever": None if found is None else found.max().item(), "clipped": part}


def step_times(text: Tensor, repeats: int = 15) -> list[dict]:
    """Medians of forward, backward and QK-clip, in turns, so that both see the same machine."""
    objectives = {tau: new_objective("llama3", tau, 0) for tau in (None, 100.0)}
    seconds, batch = {tau: [] for tau in objectives}, batch_of(text, torch.Generator())
    for _ in range(repeats):
        for tau, objective in objectives.items():
            start = time.perf_counter()
            output = objective(batch)
            output.loss_sum.backward()
            if output.maxima:
                objective.after_step(output.maxima, torch.tensor(True))
            seconds[tau].append(time.perf_counter() - start)
            objective.zero_grad()
    return [{"tau": tau, "milliseconds": 1e3 * sorted(s)[len(s) // 2]}
            for tau, s in seconds.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--time", action="store_true", help="only the time of a step")
    args = parser.parse_args()
    text, held_out = byte_ids(train_text()), byte_ids(val_text())
    times = step_times(text)
    if args.time:
        record("qk_clip_time", times, length=LENGTH, batch=BATCH)
        return
    kinds = [("llama3", tau) for tau in (None, 10.0, 30.0, 100.0)] + [("qwen3", None)]
    rows = [run(seed, family, tau, lr, args.steps, text, held_out)
            for lr in (0.005, 0.02, 0.08) for family, tau in kinds for seed in range(args.seeds)]
    record("qk_clip", rows, length=LENGTH, batch=BATCH, times=times)


if __name__ == "__main__":
    main()
