"""Tokens per second of generation: Skylar's plain call against transformers, on the same weights.

One folder of weights is opened by both sides, in this process: random ones for a grid of Qwen3
models (width, layers, vocabulary, batch) and for the `test` preset, SmolLM2-135M-Instruct's own
(fetched once, 93 MB). They continue the same prompts greedily, in turns; in float32 they must
give the same tokens, in bfloat16 two best tokens can be closer than its rounding, and the share
of equal ones is reported, beside the share in which transformers agrees with itself when it uses
its other cache. Skylar's side is what users call, `generate(model, ids, ...)`; its first call,
which also copies the weights into the order that decoding reads, is reported by itself
(`first_call_ratio`, `prepare_ms`, `fused_mb`). transformers gets each of its caches, and the
faster one counts. Ratios are medians over paired rounds, of wall clock and of CPU time.

    python bench/decode.py                       # grid and named cases, under 10 minutes
    python bench/decode.py --quick               # four rows, three rounds, writes no file
    python bench/decode.py --only grid-256-6     # rows whose name begins so; writes no file
    python bench/decode.py --kernels             # orders of weights in memory: its own file
    python bench/decode.py --profile grid-512-12-40960-fp32-4   # where the time of a token goes
    python bench/decode.py --family deepseek_v3  # latent attention: see latent_decode.py
"""

import argparse
import itertools
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import latent_decode
import torch
import torch.nn.functional as F
from common import record
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from skylar.data.model_files import MODELS, fetch_model
from skylar.data.sources import documents
from skylar.inference.cpu_fused import (
    cached_fused,
    can_prepack,
    fused_nbytes,
    prepacked_linear,
    prepacking_pays,
    release_fused,
    transposed_linear,
)
from skylar.inference.generate import generate
from skylar.models.decoder import CausalLM
from skylar.models.hub import from_pretrained, load_tokenizer, save_pretrained
from skylar.models.presets import get_config

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GRID = list(itertools.product((128, 256, 512), (4, 6, 12), (8192, 40960), ("fp32",), (1, 4)))
NAMED = {  # case: new tokens, target: ours over theirs
    "test-fp32-1": (128, 2.5), "test-fp32-8": (64, 2.5),
    "test-bf16-1": (128, 2.5), "test-bf16-8": (64, 2.5),
    "smollm2-bf16-1": (24, 1.5), "smollm2-bf16-8": (24, 1.3),
}
CASES = {"grid-" + "-".join(map(str, row)): (48, 1.5) for row in GRID} | NAMED
QUICK = ("grid-128-4-8192-fp32-1", "grid-256-6-8192-fp32-1", "grid-256-6-8192-fp32-4",
         "test-fp32-1")
GRID_MEDIAN = 2.0  # target for the grid
PROMPT, PREFILL = 32, 512  # tokens read before decoding; tokens of the prompt that is timed
CACHES = {  # of transformers; its static one without torch.compile, which takes minutes here
    "dynamic": dict(cache_implementation="dynamic"),
    "static": dict(cache_implementation="static", disable_compile=True),
}


def seconds(f) -> tuple[float, float]:
    """Of the wall clock, and of this process on all its threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    f()
    return time.perf_counter() - wall, time.process_time() - cpu


def bandwidth(gigabytes: float = 1.0) -> float:
    """Bytes a second that all threads together read from memory: the best of five sums."""
    x = torch.ones(int(gigabytes * 2**30) // 4)
    x.sum()
    return x.nbytes / min(seconds(x.sum)[0] for _ in range(5))


def parts(case: str) -> tuple[str, torch.dtype, int]:
    """Name of the model, dtype and batch size."""
    name, dtype, batch = case.rsplit("-", 2)
    return name, DTYPES[dtype], int(batch)


def config_of(name: str):
    """Of a model with random weights."""
    if not name.startswith("grid-"):
        return get_config(name)
    width, layers, vocabulary = map(int, name.split("-")[1:])
    return get_config(
        "test", "qwen3", vocab_size=vocabulary, d_model=width, n_layers=layers, d_head=64,
        n_heads=width // 64, n_kv_heads=width // 128, d_ff=3 * width)


def both(name: str, dtype: torch.dtype):
    """The model as Skylar and as transformers open it, from one folder."""
    torch.manual_seed(0)
    if name in MODELS:
        ours = from_pretrained(name, dtype=dtype)  # fetches and converts it the first time
        return ours, their_model(fetch_model(name).with_suffix(""), dtype)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder) / "model"
        save_pretrained(CausalLM(config_of(name)), folder)
        return from_pretrained(folder, dtype=dtype), their_model(folder, dtype)


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
        run = partial(their_generate, theirs, ids, **cache)
        run(n=4)
        took[name] = min(seconds(partial(run, n=n))[1] for _ in range(2))
    return min(took, key=took.get)


def agreement(a: torch.Tensor, b: torch.Tensor) -> float:
    """Share of new tokens up to which all sequences are equal: 1 = the same text."""
    same = (a == b).all(0)
    return float(same.cumprod(0)[PROMPT:].float().mean())


def turns(ours, theirs, rounds: int) -> dict:
    """Median seconds of each side, and ratios of paired rounds, interleaved."""
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
    ratios = [b[0] / a[0] for a, b in pairs]
    return {
        "ours": statistics.median(a[0] for a, _ in pairs),
        "theirs": statistics.median(b[0] for _, b in pairs),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_quartiles": [round(q, 3) for q in statistics.quantiles(ratios, n=4)],
        "cpu_ratio": round(statistics.median(b[1] / a[1] for a, b in pairs), 3)}


def row(case: str, what: str, tokens: int, took: dict, target: float, **more) -> dict:
    a, b = took.pop("ours"), took.pop("theirs")
    return {
        "case": case, "what": what, "skylar_tokens_per_s": round(tokens / a, 1),
        "transformers_tokens_per_s": round(tokens / b, 1), **took, "target": target,
        "met": took["ratio"] >= target, **more}


def decode(case: str, ours, theirs, rounds: int, bytes_per_s: float) -> dict:
    """One row: whole greedy continuations on both sides."""
    (name, dtype, batch), (n, target) = parts(case), CASES[case]
    ids = prompts(name, ours.config.vocab_size, batch, PROMPT)
    cache = fastest_cache(theirs, ids, n)
    mine = partial(generate, ours, ids, n, temperature=0)  # what users call
    release_fused(ours)
    first, _ = seconds(mine)
    kinds = (cache, *(CACHES.keys() - {cache}))
    hers = [their_generate(theirs, ids, n, **CACHES[kind]) for kind in kinds]
    same, other = agreement(mine(), hers[0]), agreement(*hers)  # theirs with its other cache
    assert dtype != torch.float32 or same == 1, f"{case}: the two sides give different tokens"
    took = turns(mine, lambda: their_generate(theirs, ids, n, **CACHES[cache]), rounds)
    read = fused_nbytes(ours) * n / took["ours"]  # bytes a second
    first_ratio = took["theirs"] / first
    return row(
        case, "decode", batch * n, took, target, first_call_ratio=round(first_ratio, 3),
        prepare_ms=round(1e3 * seconds(partial(renew, ours, batch))[0], 1),
        fused_mb=round(fused_nbytes(ours) / 1e6, 1), batch=batch, new_tokens=n,
        transformers_cache=cache, same_tokens=round(same, 3), caches_agree=round(other, 3),
        weights_gb_per_s=round(read / 1e9, 2), share_of_bandwidth=round(read / bytes_per_s, 3))


def renew(ours, batch: int) -> None:
    """Copy the weights again."""
    release_fused(ours)
    cached_fused(ours, batch)


def prefill(case: str, ours, theirs, rounds: int) -> dict:
    """One row: a prompt read into an empty cache, to the logits of the next token."""
    name, _, batch = parts(case)
    ids = prompts(name, ours.config.vocab_size, batch, PREFILL)
    mine = partial(generate, ours, ids, 1, temperature=0)

    @torch.no_grad()
    def other():
        theirs(ids, use_cache=True, logits_to_keep=1)

    for _ in range(2):
        mine(), other()
    return row(case, "prefill", batch * PREFILL, turns(mine, other, rounds), 1.0, batch=batch)


def measure(case: str, rounds: int, bytes_per_s: float) -> list[dict]:
    """Rows of a case: decoding, and for named cases reading a prompt."""
    name, dtype, _ = parts(case)
    ours, theirs = both(name, dtype)
    rows = [decode(case, ours, theirs, rounds, bytes_per_s)]
    if case in NAMED:
        rows.append(prefill(case, ours, theirs, rounds))
    for each in rows:
        print(each, flush=True)
    return rows


def grid_summary(rows: list[dict]) -> dict:
    """Median, worst and best row of the grid."""
    grid = sorted((r for r in rows if r["case"].startswith("grid")), key=lambda r: r["ratio"])
    median = round(statistics.median(r["ratio"] for r in grid), 3)
    return {"rows": len(grid), "median": median, "target": GRID_MEDIAN,
            "met": median >= GRID_MEDIAN,
            "worst": {k: grid[0][k] for k in ("case", "ratio", "share_of_bandwidth")},
            "best": {k: grid[-1][k] for k in ("case", "ratio", "share_of_bandwidth")}}


def describe(case: str) -> str:
    name, dtype, batch = case.rsplit("-", 2)
    if name.startswith("grid-"):
        width, layers, vocabulary = name.split("-")[1:]
        name = f"Qwen3 of {layers} layers, width {width}, vocabulary {int(vocabulary):,}"
    else:
        name = f"`{name}`"
    return f"{name}, {dtype}, batch {batch}"


def summary(rows: list[dict]) -> list[list[str]]:
    """What, ours, theirs, ratio, target: lines of a README table."""
    kind = {"decode": "`generate(model, ids, ...)`", "prefill": "reading a prompt"}
    grid = grid_summary(rows)
    shown = [r for r in rows if r["case"] in NAMED or r["case"] == grid["worst"]["case"]
             or r["case"].startswith("grid-256-6-8192")]
    lines = []
    for each in shown:
        worst = " (worst of the grid)" if each["case"] == grid["worst"]["case"] else ""
        ours, theirs = (each[f"{who}_tokens_per_s"] for who in ("skylar", "transformers"))
        lines.append([
            f"{kind[each['what']]}, {describe(each['case'])}{worst}", f"{ours:,.0f} tokens/s",
            f"{theirs:,.0f} tokens/s (transformers)", f"{each['ratio']:.2f}x",
            f"{each['target']}x"])
    lines.append([
        f"`generate(model, ids, ...)`, median of {grid['rows']} models of widths 128 to 512",
        "", "", f"{grid['median']:.2f}x", f"{GRID_MEDIAN}x"])
    return lines


# --- orders of weights in memory ---

SHAPES = ((128, 128), (256, 128), (128, 384), (256, 256), (512, 256), (1536, 256), (256, 768),
          (3072, 576), (576, 1536), (8192, 256),
          (40960, 128))
HEADS = ((4, 2, 64), (9, 3, 64), (8, 8, 64))  # H, K, Dh


def kernels(rounds: int) -> list[dict]:
    """What `fused_linear` and the sessions choose against the alternatives."""
    rows = []
    for dtype, n, shape in itertools.product(DTYPES.values(), (1, 2, 4, 8), SHAPES):
        if dtype == torch.float32 or can_prepack(dtype):
            rows.append(product(dtype, n, shape, rounds))
    for heads, batch, length in itertools.product(HEADS, (1, 8), (64, 512, 2048)):
        rows.append(cached_attention(*heads, batch, length, rounds))
    return rows


def product(dtype: torch.dtype, n: int, shape: tuple[int, int], rounds: int) -> dict:
    """One product of n rows by matrices that are cold in the processor's cache."""
    copies = min(200, max(2, int(6e7 // (shape[0] * shape[1] * dtype.itemsize))))
    weights, x = [torch.randn(shape).to(dtype) for _ in range(copies)], torch.randn(n, shape[1])
    ways = {"plain": [partial(F.linear, x.to(dtype), w) for w in weights],
            "prepacked": [partial(prepacked_linear(w, None, n), x) for w in weights]}
    if dtype == torch.float32:
        ways["transposed"] = [partial(transposed_linear(w, None), x) for w in weights]
    pays = prepacking_pays(shape[0] * shape[1], n, torch.get_num_threads())
    chosen = "prepacked" if pays or dtype == torch.bfloat16 else "transposed"
    return {"what": "product", "dtype": str(dtype)[6:], "rows": n, "shape": list(shape),
            **contest(ways, chosen, rounds)}


def cached_attention(H: int, K: int, Dh: int, B: int, S: int, rounds: int) -> dict:
    """One query a sequence over S keys: our products in float32, and PyTorch's kernel."""
    q, kv = torch.randn(B, K, H // K, Dh), torch.randn(2, B, K, S, Dh)
    flat, keys, values = q.view(B * K, -1, Dh), kv[0].view(B * K, S, Dh).mT, kv[1].view(
        B * K, S, Dh)
    sdpa = F.scaled_dot_product_attention

    def products():
        return torch.bmm(torch.softmax(torch.bmm(flat, keys), -1), values)

    ways = {"products": [products] * 20, "sdpa": [partial(sdpa, q, *kv)] * 20,
            "sdpa bfloat16": [partial(sdpa, q.bfloat16(), *kv.bfloat16())] * 20}
    return {"what": "attention", "dtype": "float32", "rows": B, "shape": [H, K, Dh, S],
            **contest(ways, "products", rounds)}


def contest(ways: dict[str, list], chosen: str, rounds: int) -> dict:
    """Median microseconds of the chosen way and of the best other, taking turns.

    With several threads by the wall clock, which needs a quiet machine.
    """
    clock = 1 if torch.get_num_threads() == 1 else 0
    took = {name: [] for name in ways}
    with torch.inference_mode():
        for _, (name, calls) in itertools.product(range(rounds + 1), ways.items()):
            spent = seconds(lambda: [f() for f in calls])[clock]  # noqa: B023
            took[name].append(spent / len(calls))
    us = {name: round(1e6 * statistics.median(t[1:]), 1) for name, t in took.items()}
    rival = min((name for name in us if name != chosen), key=us.get)
    return {"chosen": chosen, "chosen_us": us[chosen], "rival": rival, "rival_us": us[rival]}


# --- where the time goes ---

KINDS = {"aten::mm": "products with weights", "aten::addmm": "products with weights",
         "mkldnn::_linear_pointwise": "products with weights", "aten::bmm": "attention",
         "aten::baddbmm": "attention", "aten::_softmax": "attention"}


def show_profile(case: str) -> None:
    """Shares of a decoding step's operators, and of the memory's bandwidth."""
    name, dtype, batch = parts(case)
    ours, _ = both(name, dtype)
    session = cached_fused(ours, batch).session(batch, 256)
    ids = torch.randint(ours.config.vocab_size, (batch, 64))
    session(ids)
    steps = [partial(session, ids[:, i:i + 1]) for i in range(40)]
    plain = statistics.median(seconds(step)[1] for step in steps)
    session.length = 64
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        for step in steps:
            step()
    spent = {}
    for event in watched.key_averages():
        kind = KINDS.get(event.key, "other operators")
        spent[kind] = spent.get(kind, 0) + event.self_cpu_time_total / len(steps)
    floor = 1e3 * fused_nbytes(ours) / bandwidth()
    print(f"{case}: {1e3 * plain:.2f} ms of CPU time a step; reading the weights once takes "
          f"{floor:.2f} ms at this machine's bandwidth")
    for kind, us in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"  {kind}: {us / 1e3:.2f} ms (under the profiler)")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name begins so")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="four rows, three rounds")
    parser.add_argument("--dry", action="store_true", help="print the rows, write no file")
    parser.add_argument("--kernels", action="store_true", help="orders of weights in memory")
    parser.add_argument("--profile", metavar="CASE", help="where the time of a step goes")
    parser.add_argument("--family", choices=["deepseek_v3"], help="its cases only")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    threads = torch.get_num_threads()
    if args.family:
        return latent_decode.main(args.rounds, args.quick, args.dry, args.only)
    if args.profile:
        return show_profile(args.profile)
    if args.kernels:
        rows = kernels(args.rounds)
        record("decode_kernels", rows, rounds=args.rounds, torch_threads=threads)
        return
    rounds = 3 if args.quick else args.rounds
    speed, rows = bandwidth(), []
    print(f"memory is read at {speed / 1e9:.1f} GB/s by {threads} threads")
    for case in QUICK if args.quick else CASES:
        if case.startswith(args.only):
            rows += measure(case, rounds, speed)
    if any(r["case"].startswith("grid") for r in rows):
        print(grid_summary(rows))
    if not (args.dry or args.quick or args.only):
        record("decode", rows, summary=summary(rows), grid=grid_summary(rows), prompt=PROMPT,
               rounds=rounds, memory_gb_per_s=round(speed / 1e9, 2), torch_threads=threads)


if __name__ == "__main__":
    main()
