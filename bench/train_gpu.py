"""Training on a GPU: share of the matmul ceiling that is reached, and what packing costs.

The ceiling is this device's own bf16 product of two large matrices, measured here, and the data
sheet's where the device is known; model FLOPs are `flops_per_token`'s. Packed rows train on
sequences of several documents (FlexAttention's block mask), the others on sequences of one.

    python bench/train_gpu.py          # on a machine with CUDA, about three minutes
    python bench/train_gpu.py --dry    # tries it out on a CPU
"""

from collections.abc import Iterator

import torch
from gpu_common import (
    build_model,
    matmul_flops,
    mean_loss,
    measure,
    parse,
    peak_flops,
    random_batch,
    seconds,
)

from skylar.models.decoder import count_parameters, flops_per_token
from skylar.training.loss import NextTokenObjective
from skylar.training.optim import AdamWConfig

TARGET = 0.45  # of the ceiling, at 2,048 tokens, unpacked
DEPTH_125M = 15  # `medium` has 12 layers and 107M parameters
RUNS = [  # preset, overrides, sequence length, packed, tokens a step, what is compiled
    ("medium", dict(n_layers=DEPTH_125M), 2048, False, 16 * 2048, "blocks"),
    ("medium", dict(n_layers=DEPTH_125M), 2048, True, 16 * 2048, "blocks"),
    ("medium", dict(n_layers=DEPTH_125M), 8192, False, 4 * 8192, "blocks"),
    ("medium", dict(n_layers=DEPTH_125M), 8192, True, 4 * 8192, "blocks"),
    ("1b", {}, 2048, False, 4 * 2048, "blocks"),
    ("medium", dict(n_layers=DEPTH_125M), 2048, False, 16 * 2048, "whole"),
]


def compiled_objective(model, what: str, device: str):
    """Nothing; each block by itself, so that equal blocks share a graph; or all in one graph."""
    backend = "inductor" if device == "cuda" else "aot_eager"
    if what == "nothing":
        return NextTokenObjective(model)
    if what == "blocks":
        for block in model.model.layers:
            block.compile(backend=backend)
        return NextTokenObjective(model)
    return torch.compile(NextTokenObjective(model), backend=backend)


def training_step(model, batch: dict, what: str):
    """A function that trains one step in bf16 autocast with float32 weights."""
    optimizer = AdamWConfig().build(model)
    device = batch["input_ids"].device.type
    objective = compiled_objective(model.train(), what, device)

    def step():
        with torch.autocast(device, torch.bfloat16):
            loss = mean_loss(objective(batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def row(args, run: tuple, top: float, tokens: int) -> dict:
    """Tokens per second of one setting, and the share of the ceiling that its FLOPs are."""
    preset, overrides, seq_len, packed, _, what = run
    if args.dry:
        seq_len, tokens = 128, 256
    torch.compiler.reset()
    model = build_model(preset, args.dry, args.device, **overrides, max_seq_len=seq_len)
    batch = random_batch(
        model.model.embed_tokens.num_embeddings, tokens // seq_len, seq_len, packed, args.device)
    took = seconds(training_step(model, batch, what), args.device, 2 if args.dry else 8)
    rate = tokens / took
    flops = rate * flops_per_token(model.config, seq_len)
    peak = peak_flops(args.device)
    return {
        "preset": preset, "parameters_m": round(count_parameters(model.config) / 1e6, 1),
        "length": seq_len, "packed": packed, "tokens_a_step": tokens, "compiled": what,
        "tokens_per_s": round(rate), "share_of_ceiling": round(flops / top, 3),
        "mfu": round(flops / peak, 3) if peak else None,
        "target": TARGET if seq_len == 2048 and not packed else None,
        "memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1)
        if args.device == "cuda" else None}


def fitting_row(args, run: tuple, top: float) -> dict:
    """The row, with fewer tokens a step where memory does not suffice."""
    for tokens in (run[4], run[4] // 2, run[4] // 4):
        if args.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            return row(args, run, top, tokens)
        except torch.OutOfMemoryError:
            pass
    return {"preset": run[0], "length": run[2], "packed": run[3], "error": "out of memory"}


def rows(args, top: float) -> Iterator[dict]:
    for run in RUNS:
        yield fitting_row(args, run, top)


def main():
    args = parse(__doc__)
    usable = args.dry or torch.cuda.is_available()
    top = matmul_flops(args.device, 512 if args.dry else 8192) if usable else 0.0
    measure("gpu_train", args, rows(args, top), ceiling_tflops=round(top / 1e12, 1),
            dtype="bfloat16 autocast, fp32 weights, compiled, AdamW")


if __name__ == "__main__":
    main()
