"""Small decoders of several sizes trained on several amounts of text: data for a scaling law.

    python bench/scaling_law.py                # all runs; about ten minutes of one core
    python bench/scaling_law.py --dry          # two short runs, prints, writes no file

Qwen3-shaped decoders over the bytes of Shakespeare's plays, each pair of size and amount a run of
its own with its own schedule (warm-up, then linear decay to zero), judged by bits per byte on the
four plays that nobody trained on. One seed. Writes bench/results/scaling_law.json: the planning
lesson fits a law to the smaller sizes and predicts the largest.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from common import record

from skylar.data.held_out import train_text, val_text
from skylar.models.decoder import CausalLM, matmul_parameters
from skylar.models.presets import get_config

LENGTH, BATCH, EVALUATED = 128, 8, 512  # bytes of a window, windows of a batch, eval windows
SIZES = {24: 2, 40: 2, 64: 2, 88: 3, 128: 3}  # width: blocks
TOKENS = (200_000, 400_000, 800_000, 1_600_000)


def as_bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def windows(data: torch.Tensor, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    window = data[starts[:, None] + torch.arange(LENGTH + 1)]
    return window[:, :-1], window[:, 1:]


def decoder(width: int, blocks: int, seed: int = 0) -> CausalLM:
    torch.manual_seed(seed)
    return CausalLM(get_config(
        "test", vocab_size=256, d_model=width, n_layers=blocks, n_heads=4, n_kv_heads=4,
        d_head=2 * (width // 8), d_ff=8 * round(width / 3), max_seq_len=LENGTH, init_std=0.04))


@torch.no_grad()
def bits_per_byte(model: CausalLM, data: torch.Tensor) -> float:
    starts = torch.linspace(0, len(data) - LENGTH - 2, EVALUATED).long()
    losses = [F.cross_entropy(model(x).flatten(0, 1), y.flatten())
              for x, y in (windows(data, part) for part in starts.split(64))]
    return (torch.stack(losses).mean() / torch.log(torch.tensor(2.0))).item()


def run(width: int, blocks: int, tokens: int, train: torch.Tensor, val: torch.Tensor) -> dict:
    """Train one model on `tokens` bytes; the peak rate falls with the root of the width."""
    model, start = decoder(width, blocks), time.perf_counter()
    steps = tokens // (LENGTH * BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3 * (64 / width) ** 0.5,
                                  betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / (steps // 10), 1) * (1 - i / steps))
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x, y = windows(train, torch.randint(len(train) - LENGTH - 1, (BATCH,), generator=generator))
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return {"width": width, "blocks": blocks, "parameters": matmul_parameters(model.config),
            "tokens": steps * LENGTH * BATCH, "bits_per_byte": round(bits_per_byte(model, val), 4),
            "seconds": round(time.perf_counter() - start, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry", action="store_true", help="two short runs, no file")
    dry = parser.parse_args().dry
    torch.set_num_threads(1)
    train, val = as_bytes(train_text()), as_bytes(val_text())
    jobs = [(width, SIZES[width], tokens) for width in SIZES for tokens in TOKENS]
    if dry:
        jobs = [(width, SIZES[width], 40_960) for width in (24, 128)]
    rows = []
    for job in jobs:
        rows.append(run(*job, train, val))
        print(rows[-1], flush=True)
    if not dry:
        print(record("scaling_law", rows, length=LENGTH, batch=BATCH, unit="bits per byte"))


if __name__ == "__main__":
    main()
