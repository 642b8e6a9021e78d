"""FlexAttention against dense attention on packed sequences: same numbers, and the time of each.

A model of four layers, nearly all of it attention, with the same weights and either backend.
Errors are relative (norm of the difference over the norm of the dense result) in float32; times
are of bf16 autocast, forward alone and forward with backward.

    python bench/attention_gpu.py          # on a machine with CUDA, about a minute
    python bench/attention_gpu.py --dry    # on a CPU, where FlexAttention has no backward
"""

from collections.abc import Iterator

import torch
from gpu_common import (
    build_model,
    mean_loss,
    measure,
    parse,
    random_batch,
    seconds,
)

from skylar.training.loss import NextTokenObjective

SHAPE = dict(vocab_size=1024, n_layers=4, d_ff=64)
TOLERANCE = 2e-3


def relative_error(found, expected) -> float:
    found, expected = torch.cat([x.flatten() for x in found]), torch.cat(
        [x.flatten() for x in expected])
    return float((found - expected).norm() / expected.norm())


def gradients(model, batch) -> list[torch.Tensor]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(mean_loss(NextTokenObjective(model)(batch)), parameters))


def errors(flex, dense, batch, backward: bool) -> dict:
    """How far the two backends are from one another in float32."""
    inputs = batch["input_ids"], None, batch["document_ids"]
    with torch.no_grad():
        forward = relative_error([flex(*inputs)], [dense(*inputs)])
    found = {"forward_error": forward, "gradient_error": None}
    if backward:
        found["gradient_error"] = relative_error(gradients(flex, batch), gradients(dense, batch))
    worst = max(v for v in found.values() if v is not None)
    return found | {"equal": 0 < worst < TOLERANCE}  # 0: the same kernel ran twice


def times(model, batch, device: str, backward: bool, rounds: int) -> tuple[float, float | None]:
    """Milliseconds forward, and forward with backward."""
    objective = NextTokenObjective(model)

    def forward():
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            mean_loss(objective(batch))

    def both():
        with torch.autocast(device, torch.bfloat16):
            loss = mean_loss(objective(batch))
        loss.backward()
        model.zero_grad(set_to_none=True)

    first = 1000 * seconds(forward, device, rounds)
    return first, 1000 * seconds(both, device, rounds) if backward else None


def rows(args) -> Iterator[dict]:
    backward = args.device == "cuda"
    for batch_size, seq_len in [(2, 256)] if args.dry else [(8, 2048), (2, 8192)]:
        options = SHAPE | dict(max_seq_len=seq_len)
        flex, dense = (
            build_model("medium", args.dry, args.device, backend, **options).train()
            for backend in ("flex", "sdpa"))
        batch = random_batch(512, batch_size, seq_len, True, args.device)
        row = {"length": seq_len, "batch_size": batch_size} | errors(flex, dense, batch, backward)
        for name, model in (("flex", flex), ("dense", dense)):
            forward, both = times(model, batch, args.device, backward, 2 if args.dry else 9)
            row |= {f"{name}_forward_ms": forward, f"{name}_both_ms": both}
        yield row


if __name__ == "__main__":
    arguments = parse(__doc__)
    torch.backends.cuda.matmul.allow_tf32 = False
    measure("gpu_attention", arguments, rows(arguments), tolerance=TOLERANCE)
