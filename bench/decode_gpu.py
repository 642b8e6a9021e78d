"""Greedy decoding with a cache on a GPU in bf16, against transformers where it has the model.

    python bench/decode_gpu.py          # on a machine with CUDA, about a minute
    python bench/decode_gpu.py --dry    # tries it out on a CPU
"""

import tempfile
from collections.abc import Iterator

import torch
from gpu_common import build_model, measure, parse, seconds

from skylar.inference.generate import generate
from skylar.models.hub import save_pretrained


def transformers_model(model, device: str):
    """The same weights in transformers' class, through a folder of files."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return theirs.to(device).eval()


def transformers_generate(theirs, ids, n: int):
    options = dict(max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0)
    return theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)


def rate(decode, ids, n: int, args) -> int:
    """New tokens per second, all sequences together."""
    with torch.no_grad():
        took = seconds(lambda: decode(ids), args.device, 1 if args.dry else 3, warmup=1)
    return round(len(ids) * n / took)


def rows(args) -> Iterator[dict]:
    prompt, n = (16, 8) if args.dry else (512, 128)
    model = build_model("medium", args.dry, args.device, max_seq_len=1024).eval()
    theirs = transformers_model(model, args.device)
    model = model.to(torch.bfloat16)
    for batch_size in (1, 32):
        ids = torch.randint(500, (batch_size, prompt), device=args.device)
        ours = rate(lambda ids: generate(model, ids, n, temperature=0), ids, n, args)
        other = rate(lambda ids: transformers_generate(theirs, ids, n), ids, n, args)
        yield {
            "preset": "medium", "dtype": "bfloat16", "batch_size": batch_size, "prompt": prompt,
            "new_tokens": n, "skylar_tokens_per_s": ours, "transformers_tokens_per_s": other,
            "ratio": round(ours / other, 2)}


if __name__ == "__main__":
    arguments = parse(__doc__)
    measure("gpu_decode", arguments, rows(arguments), decoding="greedy, prompt included")
