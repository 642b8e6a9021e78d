"""Tokens per second of cached decoding: Skylar against transformers, on the same weights.

One folder of weights is opened by both sides, in this process: random ones for the `test`
preset, SmolLM2-135M-Instruct's own (fetched once, 93 MB). They continue the same prompts
greedily, in turns; in float32 they must say the same tokens, in bfloat16 two best tokens can be
closer than its rounding, and the share of equal ones is reported, beside the share in which
transformers agrees with itself when it uses its other cache. Skylar's side is `packed(model)`;
the seconds of packing, once for all, are reported and not counted. transformers gets each of its
caches, and the faster one counts. Also how fast a prompt is read, and what share of this
machine's memory bandwidth decoding reaches: each token reads every weight once.

    python bench/decode.py                              # all cases, under 8 minutes
    python bench/decode.py --only test-fp32 --rounds 3 --dry
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import record
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from skylar.data.model_files import MODELS, fetch_model
from skylar.data.sources import documents
from skylar.inference.generate import generate, next_logits
from skylar.inference.packing import packed
from skylar.inference.sampling import inference
from skylar.layers.cache import KVCache
from skylar.models.decoder import CausalLM
from skylar.models.hub import from_pretrained, load_tokenizer, save_pretrained
from skylar.models.presets import get_config

CASES = {  # model, dtype, batch size, new tokens, target: ours over theirs
    "test-fp32-1": ("test", torch.float32, 1, 128, 2.5),
    "test-fp32-8": ("test", torch.float32, 8, 64, 2.5),
    "test-bf16-1": ("test", torch.bfloat16, 1, 128, 2.5),
    "test-bf16-8": ("test", torch.bfloat16, 8, 64, 2.5),
    "smollm2-bf16-1": ("smollm2", torch.bfloat16, 1, 24, 1.5),
    "smollm2-bf16-8": ("smollm2", torch.bfloat16, 8, 24, 1.3),
}
PROMPT, PREFILL = 32, 512  # tokens read before decoding; tokens of the prompt that is timed
CACHES = {  # of transformers; its static one without torch.compile, which takes minutes here
    "dynamic": dict(cache_implementation="dynamic"),
    "static": dict(cache_implementation="static", disable_compile=True),
}


def seconds(f) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def bandwidth(gigabytes: float = 1.0) -> float:
    """Bytes a second that all threads together read from memory: the best of five sums."""
    x = torch.ones(int(gigabytes * 2**30) // 4)
    x.sum()
    return x.nbytes / min(seconds(x.sum) for _ in range(5))


def both(name: str, dtype: torch.dtype):
    """The model as Skylar and as transformers open it, from one folder."""
    torch.manual_seed(0)
    if name in MODELS:
        ours = from_pretrained(name, dtype=dtype)  # fetches and converts it the first time
        return ours, their_model(fetch_model(name).with_suffix(""), dtype)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(CausalLM(get_config(name)), Path(folder) / name)
        return from_pretrained(Path(folder) / name, dtype=dtype), their_model(
            Path(folder) / name, dtype)


def their_model(folder: Path, dtype: torch.dtype):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def prompts(name: str, vocab_size: int, batch: int, length: int) -> torch.Tensor:
    """Passages of Shakespeare for a model that can read, random tokens for another."""
    if name not in MODELS:
        return torch.randint(vocab_size, (batch, length))
    text = next(documents("shakespeare"))
    ids = load_tokenizer(name).encode(text[: 40 * batch * length])
    return torch.tensor(ids[: batch * length]).view(batch, length)


def their_generate(theirs, ids, n: int, **cache):
    """Greedy, no early end, no warnings."""
    return theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False,
        eos_token_id=None, pad_token_id=0, **cache)


def fastest_cache(theirs, ids, n: int) -> str:
    """The name of transformers' cache that takes least time, after a warm-up of each."""
    took = {}
    for name, cache in CACHES.items():
        their_generate(theirs, ids, 4, **cache)
        took[name] = min(seconds(lambda: their_generate(theirs, ids, n, **cache))  # noqa: B023
                         for _ in range(2))
    return min(took, key=took.get)


def agreement(a: torch.Tensor, b: torch.Tensor) -> float:
    """Share of new tokens up to which all rows are equal: 1 = the same text."""
    same = (a == b).all(0)
    return float(same.cumprod(0)[PROMPT:].float().mean())


def turns(ours, theirs, rounds: int) -> tuple[float, float, list[float]]:
    """Median seconds of each side, and quartiles of the ratio, over interleaved rounds."""
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
    a, b = (statistics.median(side) for side in zip(*pairs))
    quartiles = statistics.quantiles([y / x for x, y in pairs], n=4)
    return a, b, [round(q, 3) for q in quartiles]


def row(case: str, what: str, tokens: int, a: float, b: float, quartiles, target, **more) -> dict:
    return {
        "case": case, "what": what, "skylar_tokens_per_s": round(tokens / a, 1),
        "transformers_tokens_per_s": round(tokens / b, 1), "ratio": quartiles[1],
        "ratio_quartiles": quartiles, "target": target, "met": quartiles[1] >= target, **more,
    }


def pack(ours, batch: int) -> tuple[CausalLM, dict]:
    """The twin that decodes, and what to report of the model it was made from."""
    start = time.perf_counter()
    twin = packed(ours, batch)
    return twin, {"pack_seconds": round(time.perf_counter() - start, 2),
                  "weights_mb": round(sum(p.nbytes for p in ours.parameters()) / 1e6, 1)}


def decode(case: str, ours, theirs, rounds: int, bytes_per_s: float, facts: dict) -> dict:
    """One row: a whole greedy continuation on both sides."""
    name, dtype, batch, n, target = CASES[case]
    ids = prompts(name, ours.config.vocab_size, batch, PROMPT)
    cache = fastest_cache(theirs, ids, n)
    mine = generate(ours, ids, n, temperature=0)
    kinds = (cache, *(CACHES.keys() - {cache}))
    hers = [their_generate(theirs, ids, n, **CACHES[kind]) for kind in kinds]
    same, other = agreement(mine, hers[0]), agreement(*hers)  # theirs with its other cache
    assert dtype != torch.float32 or same == 1, f"{case}: the two sides say different tokens"
    a, b, quartiles = turns(
        lambda: generate(ours, ids, n, temperature=0),
        lambda: their_generate(theirs, ids, n, **CACHES[cache]), rounds)
    read = 1e6 * facts["weights_mb"] * n / a  # bytes a second
    return row(case, "decode", batch * n, a, b, quartiles, target, batch=batch,
               transformers_cache=cache, same_tokens=round(same, 3),
               caches_agree=round(other, 3), **facts, weights_gb_per_s=round(read / 1e9, 2),
               share_of_bandwidth=round(read / bytes_per_s, 3))


def prefill(case: str, ours, theirs, rounds: int) -> dict:
    """One row: a prompt read into an empty cache, to the scores of the next token."""
    name, dtype, batch, _, _ = CASES[case]
    ids = prompts(name, ours.config.vocab_size, batch, PREFILL)

    def mine():
        with inference(ours):
            next_logits(ours, ids, None, KVCache(ours.config, batch, PREFILL, dtype))

    @torch.no_grad()
    def other():
        theirs(ids, use_cache=True, logits_to_keep=1)

    for _ in range(2):
        mine(), other()
    return row(case, "prefill", batch * PREFILL, *turns(mine, other, rounds), 1.0, batch=batch)


def summary(rows: list[dict]) -> list[list[str]]:
    """What, ours, theirs, ratio, target: lines of a README table."""
    lines = []
    for row in rows:
        model, dtype, batch = row["case"].split("-")
        kind = {"decode": "greedy decoding with a cache", "prefill": "reading a prompt"}
        ours, theirs = (row[f"{who}_tokens_per_s"] for who in ("skylar", "transformers"))
        lines.append([
            f"{kind[row['what']]}, `{model}`, {dtype}, batch {batch}", f"{ours:,.0f} tokens/s",
            f"{theirs:,.0f} tokens/s (transformers)", f"{row['ratio']:.2f}x",
            f"{row['target']}x"])
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name begins so")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dry", action="store_true", help="print the rows, write no file")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    speed, rows = bandwidth(), []
    print(f"memory is read at {speed / 1e9:.1f} GB/s by {torch.get_num_threads()} threads")
    for case, (name, dtype, batch, *_) in CASES.items():
        if case.startswith(args.only):
            ours, theirs = both(name, dtype)
            ours, facts = pack(ours, batch)
            rows.append(decode(case, ours, theirs, args.rounds, speed, facts))
            print(rows[-1], flush=True)
            rows.append(prefill(case, ours, theirs, args.rounds))
            print(rows[-1], flush=True)
    if not args.dry:
        record("decode", rows, summary=summary(rows), prompt=PROMPT, rounds=args.rounds,
               memory_gb_per_s=round(speed / 1e9, 2), threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
