"""The fused loss on a GPU against the plain path, PyTorch's fused loss and Liger: time and memory.

Forward and backward pass of the vocabulary projection and the loss, float32 weight under bf16
autocast as in our training. Memory is `torch.cuda.max_memory_allocated` above what was there
before. PyTorch's fused loss needs 2.13; Liger is measured if liger_kernel is installed. Each row
says how far its loss and its gradient of the weight are from the plain path's (relative).

    python bench/loss_gpu.py          # on a machine with CUDA, half a minute
    python bench/loss_gpu.py --dry    # tiny sizes on a CPU
"""

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec

import torch
from gpu_common import measure, parse, seconds
from torch.nn import functional as F

from skylar.training.loss import linear_cross_entropy

SIZES = [(8192, 512, 40_960), (8192, 2048, 128_256)]  # positions, width, vocabulary


def sides() -> dict[str, Callable]:
    found = {
        "plain": lambda h, w, y: F.cross_entropy(F.linear(h, w), y, reduction="sum"),
        "ours": lambda h, w, y: linear_cross_entropy(h, w, y)[0],
        "ours, rows": lambda h, w, y: linear_cross_entropy(h, w, y, reduction="none")[0].sum(),
    }
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        found["PyTorch fused"] = lambda h, w, y: F.linear_cross_entropy(
            h.bfloat16(), w.bfloat16(), y, reduction="sum",
            options=torch.nn.LinearCrossEntropyOptions())
    if find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        found["Liger"] = lambda h, w, y: liger(w.bfloat16(), h.bfloat16(), y)
    return found


def step(loss_fn, inputs, device: str) -> tuple[float, torch.Tensor]:
    """Summed loss and gradient of the weight."""
    with torch.autocast(device, torch.bfloat16):
        loss = loss_fn(*inputs)
    _, grad = torch.autograd.grad(loss, inputs[:2])
    return loss.item(), grad


def added_mb(work, device: str) -> float | None:
    """MB allocated at the peak of `work()`, above what is allocated now."""
    if device != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def rows(args) -> Iterator[dict]:
    for n, width, vocabulary in [(600, 32, 512)] if args.dry else SIZES:
        torch.manual_seed(0)
        hidden = torch.randn(n, width, device=args.device, requires_grad=True)
        weight = (torch.randn(vocabulary, width, device=args.device) / width**0.5)
        labels = torch.randint(vocabulary, (n,), device=args.device)
        labels[:: 7] = -100
        inputs = hidden, weight.requires_grad_(), labels
        expected, expected_grad = step(sides()["plain"], inputs, args.device)
        for name, loss_fn in sides().items():
            work = partial(step, loss_fn, inputs, args.device)
            loss, grad = work()
            error = float((grad - expected_grad).norm() / expected_grad.norm())
            yield {
                "side": name, "positions": n, "d_model": width, "vocab_size": vocabulary,
                "ms": 1000 * seconds(work, args.device, 2 if args.dry else 7),
                "added_mb": added_mb(work, args.device),
                "loss_error": abs(loss / expected - 1), "gradient_error": error}


if __name__ == "__main__":
    args = parse(__doc__)
    measure("gpu_loss", args, rows(args))
