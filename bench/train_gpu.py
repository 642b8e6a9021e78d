"""Training on a GPU: share of the matmul ceiling that is reached, and what packing costs.

The ceiling is this device's own bf16 product of two large matrices, measured here; model
FLOPs are `flops_per_token`'s (6 N + 12 T D per layer, causal half not deducted). The packed
rows train on windows of several documents (FlexAttention's block mask) and on windows of one.

    python bench/train_gpu.py                        # on a machine with CUDA
    python bench/train_gpu.py --device cpu --preset test --lengths 128 --dry   # tries it out
"""

import argparse
import statistics
import time

import torch
from common import record
from train_step import batch_of, documents_of

from skylar.models.decoder import CausalLM, flops_per_token
from skylar.models.presets import get_config
from skylar.training.loss import NextTokenObjective
from skylar.training.optim import AdamWConfig

TOKENS = 16 * 2048  # in a step, whatever the length of its windows
TARGET = 0.45  # of the ceiling


def synchronize(device: str) -> None:
    """Wait until the device has done all that it was asked."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(work, device: str, rounds: int) -> float:
    """Median of `rounds` timed calls, after three that are not."""
    times = []
    for _ in range(3 + rounds):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:])


def ceiling(device: str, size: int) -> float:
    """FLOP/s of a bf16 product of two (size, size) matrices."""
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    return 2 * size**3 / seconds(lambda: a @ b, device, 9)


def training(preset: str, length: int, packed: bool, device: str, tokens: int):
    """A compiled bf16 training step of `tokens` tokens in windows of `length`."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = CausalLM(get_config(preset, max_seq_len=length)).to(device).train()
    optimizer = AdamWConfig().build(model)
    objective = torch.compile(NextTokenObjective(model))
    size = max(1, tokens // length)
    ids = torch.randint(model.config.vocab_size, (size, length), device=device)
    documents = documents_of(size, length).to(device) if packed else None
    batch = batch_of(ids, documents)

    def step():
        with torch.autocast(device, torch.bfloat16):
            loss_sum, n_valid, _ = objective(batch)
        (loss_sum / n_valid).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, size * length, flops_per_token(model.config, length)


def measure(args, length: int, top: float) -> list[dict]:
    """Unpacked and packed at one length."""
    rows = []
    for packed in (False, True):
        step, tokens, flops = training(args.preset, length, packed, args.device, args.tokens)
        took = seconds(step, args.device, args.rounds)
        share = flops * tokens / took / top
        rows.append({
            "preset": args.preset, "length": length, "packed": packed,
            "tokens_per_s": round(tokens / took), "share_of_ceiling": round(share, 3),
            "target": TARGET if length == 2048 and not packed else None})
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--preset", default="medium")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--tokens", type=int, default=TOKENS, help="in a step")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dry", action="store_true", help="print the rows, write no file")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        return record("train_gpu", [], status="not run: no GPU on the measuring machine")
    size = 8192 if args.device == "cuda" else 1024
    top = ceiling(args.device, size)
    rows = [row for length in args.lengths for row in measure(args, length, top)]
    if args.dry:
        return print(f"ceiling {top / 1e12:.2f} TFLOP/s", *rows, sep="\n")
    name = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    record("train_gpu", rows, status="run", device=name, ceiling_tflops=round(top / 1e12, 1),
           dtype="bfloat16 autocast, fp32 weights, compiled")


if __name__ == "__main__":
    main()
