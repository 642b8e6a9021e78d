"""One layer of latent attention decoding a token on a GPU: absorbed, naive, and transformers'.

Widths of DeepSeek-V3, bf16, one sequence, contexts of 8K to 64K; as `latent_decode.py` on a CPU.

    python bench/latent_gpu.py          # on a machine with CUDA, under a minute
    python bench/latent_gpu.py --dry    # tries it out on a CPU
"""

from collections.abc import Iterator
from functools import partial

import torch
from gpu_common import measure, parse, seconds
from latent_decode import LAYERS, OurStep, TheirStep, built

CONTEXTS = (8192, 16_384, 32_768, 65_536)


def row(args, S: int, D: int, config, sides: tuple) -> dict:
    """Milliseconds of a token on each side; outputs must be equal."""
    ours, naive, theirs, rotary = sides
    torch.manual_seed(S)
    widths = config.kv_lora_rank, config.qk_rope_head_dim
    made = [torch.randn(1, 1, S, n, device=args.device).bfloat16() for n in widths]
    steps = {"absorbed": OurStep(ours, *made, S), "naive": OurStep(naive, *made, S),
             "transformers": TheirStep(theirs, rotary, *made, S, "sdpa")}
    x = torch.randn(1, 1, D, device=args.device).bfloat16()
    outs = {side: step(x).float() for side, step in steps.items()}
    error = max(float((out - outs["naive"]).norm() / outs["naive"].norm()) for out in outs.values())
    assert error < 5e-2, error
    rounds = 2 if args.dry else 20
    ms = {side: 1e3 * seconds(partial(step, x), args.device, rounds)
          for side, step in steps.items()}
    nbytes, read = steps["absorbed"].cache.nbytes, S * sum(widths) * 2
    assert nbytes == config.cache_bytes(D, S + 1, 2), nbytes
    return {"context": S, **{f"{side}_ms": round(t, 3) for side, t in ms.items()},
            "over_naive": round(ms["naive"] / ms["absorbed"], 2),
            "over_transformers": round(ms["transformers"] / ms["absorbed"], 2),
            "cache_bytes": nbytes, "cache_gb_per_s": round(read / ms["absorbed"] / 1e6, 1)}


@torch.inference_mode()
def rows(args) -> Iterator[dict]:
    name = "v2-lite" if args.dry else "v3"
    D, config = LAYERS[name]
    sides = [side.to(args.device) for side in built(name, "bf16")]
    for S in (128, 256) if args.dry else CONTEXTS:
        yield row(args, S, D, config, sides)


if __name__ == "__main__":
    arguments = parse(__doc__)
    measure("gpu_latent_decode", arguments, rows(arguments), part="one layer", dtype="bfloat16")
