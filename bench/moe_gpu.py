"""Training a sparse model on a GPU: share of the matmul ceiling, against a dense one of equal cost.

Mixtral with 8 experts of which a token uses two, and Llama with a feed-forward layer as wide as
two experts: equal active parameters, equal model FLOPs but for the router. Both in bf16 autocast,
eagerly and with each block compiled. The ceiling is that of `train_gpu.py`.

    python bench/moe_gpu.py          # on a machine with CUDA, about a minute
    python bench/moe_gpu.py --dry    # tries it out on a CPU
"""

from collections.abc import Iterator

import torch
from gpu_common import build_model, matmul_flops, measure, parse, peak_flops, random_batch, seconds
from train_gpu import training_step

from skylar.models.decoder import active_parameters, count_parameters, flops_per_token

SIZES = dict(d_model=1024, n_heads=16, n_kv_heads=4, d_head=64, n_layers=12, max_seq_len=2048)
D_EXPERT, TOP_K, LENGTH, TOKENS = 1408, 2, 2048, 8 * 2048
TARGET = 1.25  # time of a sparse step over that of a dense one


def run(args, family: str, d_ff: int, what: str, top: float) -> dict:
    """Tokens per second, and the share of the ceiling that the model's FLOPs are."""
    length, tokens = (128, 256) if args.dry else (LENGTH, TOKENS)
    torch.compiler.reset()
    model = build_model("medium", args.dry, args.device, family=family, **SIZES, d_ff=d_ff)
    batch = random_batch(
        model.model.embed_tokens.num_embeddings, tokens // length, length, False, args.device)
    took = seconds(training_step(model, batch, what), args.device, 2 if args.dry else 8)
    flops, peak = tokens / took * flops_per_token(model.config, length), peak_flops(args.device)
    return {
        "family": family, "compiled": what, "length": length, "tokens_a_step": tokens,
        "parameters_m": round(count_parameters(model.config) / 1e6, 1),
        "active_m": round(active_parameters(model.config) / 1e6, 1),
        "tokens_per_s": round(tokens / took), "share_of_ceiling": round(flops / top, 3),
        "mfu": round(flops / peak, 3) if peak else None, "step_ms": round(1e3 * took, 2)}


def rows(args, top: float) -> Iterator[dict]:
    for what in ("nothing", "blocks"):
        dense = run(args, "llama3", TOP_K * D_EXPERT, what, top)
        sparse = run(args, "mixtral", D_EXPERT, what, top)
        assert abs(sparse["active_m"] / dense["active_m"] - 1) < 0.01 or args.dry
        ratio = sparse["step_ms"] / dense["step_ms"]
        yield dense
        yield sparse | {"over_dense": round(ratio, 3), "target": TARGET, "met": ratio <= TARGET}


def main():
    args = parse(__doc__)
    usable = args.dry or torch.cuda.is_available()
    top = matmul_flops(args.device, 512 if args.dry else 8192) if usable else 0.0
    measure("gpu_moe", args, rows(args, top), ceiling_tflops=round(top / 1e12, 1),
            dtype="bfloat16 autocast, fp32 weights, AdamW")


if __name__ == "__main__":
    main()
