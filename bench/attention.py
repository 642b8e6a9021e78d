"""What the tiled CPU kernel buys: a training step with it against one with PyTorch's SDPA.

The same model and batch, forward and backward, in turns; a row for each precision, width and
length, unpacked and packed (documents of 128 tokens, which do not see one another).
`select_backend` takes the kernel where these rows show a gain.

    python bench/attention.py                  # every row
    python bench/attention.py --rounds 3 --widths 128
"""

import argparse
import statistics
import time

import torch
from common import record

from skylar.models.decoder import CausalLM
from skylar.models.presets import get_config

TOKENS = 2048  # a step, whatever the length


def step(model: CausalLM, ids, documents, dtype: torch.dtype) -> None:
    """Forward and backward of the body: the head and the loss know no attention."""
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        hidden = model.model(ids, document_ids=documents)
    hidden.float().square().mean().backward()
    model.zero_grad(set_to_none=True)


def compare(width: int, length: int, dtype: torch.dtype, packed: bool, rounds: int) -> dict:
    """Median milliseconds by each backend, and the median of the paired ratios."""
    torch.manual_seed(0)
    config = get_config(
        "test", vocab_size=512, d_model=width, n_heads=width // 32, n_kv_heads=width // 32,
        d_ff=2 * width, max_seq_len=length)
    model = CausalLM(config)
    ids = torch.randint(512, (TOKENS // length, length))
    documents = (torch.arange(length) // 128).expand_as(ids) if packed else None
    times = {"sdpa": [], "cpu_tiled": []}
    for _ in range(rounds + 1):  # the first one warms up
        for backend, seconds in times.items():
            model.set_attention_backend(backend)
            start = time.perf_counter()
            step(model, ids, documents, dtype)
            seconds.append(time.perf_counter() - start)
    sdpa, tiled = times["sdpa"][1:], times["cpu_tiled"][1:]
    return {
        "dtype": str(dtype).removeprefix("torch."), "width": width, "length": length,
        "packed": packed, "sdpa_ms": round(1e3 * statistics.median(sdpa), 2),
        "tiled_ms": round(1e3 * statistics.median(tiled), 2),
        "speedup": round(statistics.median(a / b for a, b in zip(sdpa, tiled)), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--widths", type=int, nargs="*", default=[128, 512])
    parser.add_argument("--lengths", type=int, nargs="*", default=[64, 256, 1024])
    args = parser.parse_args()
    rows = [
        compare(width, length, dtype, packed, args.rounds)
        for dtype in (torch.float32, torch.bfloat16)
        for width in args.widths
        for length in args.lengths
        for packed in (False, True)
    ]
    record("attention", rows, rounds=args.rounds, tokens_per_step=TOKENS)


if __name__ == "__main__":
    main()
