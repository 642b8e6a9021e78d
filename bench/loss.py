"""The fused loss against the plain path and PyTorch's own fused loss: time, and added memory.

Forward and backward pass of the vocabulary projection and the loss: V = 40,960, D = 512, float32
hidden states and weight, under bf16 autocast or in float32. The sides:

    plain           F.cross_entropy(F.linear(hidden, weight), labels)
    PyTorch fused   F.linear_cross_entropy (2.13 or newer) on inputs cast to bf16, which autocast
                    does not do for it; the fastest policy here, and the same chunk as ours
    PyTorch default the same with its default options (once: it is slow on CPUs)
    ours            skylar.training.loss.linear_cross_entropy

Time: the sides take turns in one process; medians, and the median of each round's ratios. Memory:
one new process a side; how far the resident set (VmHWM of /proc/self/status, reset before) grows
above what the inputs and a tiny first call took: gradients, scratch space of the kernels included.
Errors: of the loss, relative to plain; of the weight's gradient for 1,024 positions, relative to
plain in float32.

    python bench/loss.py           # about 4 minutes, 6 GB; bench/results/loss.json
    python bench/loss.py --dry     # tiny sizes, no JSON
"""

import argparse
import gc
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import ROOT, record, show
from torch.nn import functional as F

from skylar.training.loss import linear_cross_entropy

CHUNK = 512
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CASES = [  # dtype, positions, threads, rounds
    ("bf16", 4096, 2, 5), ("bf16", 8192, 2, 3), ("bf16", 4096, 1, 3), ("bf16", 8192, 1, 2),
    ("fp32", 4096, 2, 2), ("fp32", 8192, 2, 1), ("fp32", 4096, 1, 1),
]
SLOW = "PyTorch default"


def torch_fused(hidden, weight, labels, **options):
    options = torch.nn.LinearCrossEntropyOptions(**options)
    if torch.is_autocast_enabled("cpu"):
        hidden, weight = hidden.bfloat16(), weight.bfloat16()
    return F.linear_cross_entropy(hidden, weight, labels, reduction="sum", options=options)


def sides() -> dict:
    """Each way of computing the summed loss, by name."""
    core = {
        "PyTorch fused": lambda *a: torch_fused(
            *a, acc_policy="balanced", batch_chunk_size=CHUNK, chunking_method=None),
        SLOW: torch_fused,
    }
    return {
        "plain": lambda h, w, y: F.cross_entropy(F.linear(h, w), y, reduction="sum"),
        "ours": lambda *a: linear_cross_entropy(*a, chunk=CHUNK)[0],
    } | (core if hasattr(torch.nn, "LinearCrossEntropyOptions") else {})


def problem(n: int, d_model: int, vocab_size: int) -> tuple:
    torch.manual_seed(0)
    hidden = torch.randn(n, d_model, requires_grad=True)
    weight = (torch.randn(vocab_size, d_model) / d_model**0.5).requires_grad_()
    return hidden, weight, torch.randint(vocab_size, (n,))


def step(loss_fn, inputs, dtype) -> float:
    """Forward and backward; the summed loss."""
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = loss_fn(*inputs)
    loss.backward()
    inputs[0].grad = inputs[1].grad = None
    return loss.item()


def gradient_errors(dtype: torch.dtype, n: int, d_model: int, vocab_size: int) -> dict:
    """Of each side: the weight's gradient against plain float32's (relative norm)."""
    inputs, grads = problem(n, d_model, vocab_size), {}
    for name, loss_fn in ({"exact": sides()["plain"]} | sides()).items():
        exact = name == "exact"
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16 and not exact):
            loss = loss_fn(*inputs)
        grads[name] = torch.autograd.grad(loss, inputs[1])[0]
    exact = grads.pop("exact")
    return {name: float((g - exact).norm() / exact.norm()) for name, g in grads.items()}


def resident(key: str) -> float:
    """MB of VmRSS (now) or VmHWM (its highest value)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{key}:")[1].split()[0]) * 1024 / 1e6


def added_memory(side: str, dtype: torch.dtype, n: int, d_model: int, vocab_size: int) -> float:
    """MB that one step adds at its peak to this process."""
    inputs = problem(n, d_model, vocab_size)
    step(sides()[side], problem(64, 32, 128), dtype)  # threads, libraries
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    step(sides()[side], inputs, dtype)
    return resident("VmHWM") - before


def measured_alone(*arguments) -> float | None:
    """`added_memory` in a new process; None where the system has no /proc/self/status."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    command = [sys.executable, __file__, "--memory", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout.splitlines()[-1])


def timed(names, inputs, dtype, rounds: int) -> tuple[dict, dict]:
    """Seconds of each round, and the loss, of each side; the sides take turns."""
    seconds, losses, functions = {name: [] for name in names}, {}, sides()
    for name in names:  # a short first call
        step(functions[name], (inputs[0][:64].detach().requires_grad_(), *inputs[1:2],
                               inputs[2][:64]), dtype)
    for i in range(rounds):
        for name in names:
            if name == SLOW and i:
                continue
            start = time.perf_counter()
            losses[name] = step(functions[name], inputs, dtype)
            seconds[name].append(time.perf_counter() - start)
    return seconds, losses


def case(
    dtype: str, n: int, threads: int, rounds: int, sizes: tuple, memory: dict, errors: dict
) -> list[dict]:
    """One row a side."""
    torch.set_num_threads(threads)
    names = [s for s in sides() if s != SLOW or (dtype, n, threads) == ("bf16", 4096, 2)]
    for name in names:
        if (name, dtype, n) not in memory:
            memory[name, dtype, n] = measured_alone(name, dtype, n, *sizes)
    if dtype not in errors:
        errors[dtype] = gradient_errors(DTYPES[dtype], 2 * CHUNK, *sizes)
    seconds, losses = timed(names, problem(n, *sizes), DTYPES[dtype], rounds)
    rows = []
    for name in names:
        added, plain = memory[name, dtype, n], memory["plain", dtype, n]
        ratios = [t / p for t, p in zip(seconds[name], seconds["plain"])]
        rows.append({
            "side": name, "dtype": dtype, "positions": n, "threads": threads,
            "seconds": statistics.median(seconds[name]), "rounds": len(seconds[name]),
            "time_ratio": statistics.median(ratios), "added_mb": added,
            "memory_ratio": added and added / plain,
            "loss_error": abs(losses[name] / losses["plain"] - 1),
            "gradient_error": errors[dtype][name]})
        show(rows[-1])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="tiny sizes, no JSON")
    parser.add_argument("--memory", nargs=5, metavar=("SIDE", "DTYPE", "N", "D", "V"),
                        help="only the added memory of one side, in MB")
    args = parser.parse_args()
    if args.memory:
        side, dtype, *sizes = args.memory
        return print(added_memory(side, DTYPES[dtype], *map(int, sizes)))
    if args.dry:
        for dtype in DTYPES:
            case(dtype, 600, 1, 1, (32, 512), {}, {})
        return None
    rows, memory, errors, sizes = [], {}, {}, (512, 40_960)
    for arguments in CASES:
        rows += case(*arguments, sizes, memory, errors)
    record("loss", rows, d_model=sizes[0], vocab_size=sizes[1], chunk=CHUNK,
           bf16_amx=torch.cpu._is_amx_tile_supported())
    return None


if __name__ == "__main__":
    main()
