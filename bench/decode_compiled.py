"""Decoding on a CPU: fused weights against `torch.compile` with a static cache, on one model.

One set of random weights, opened by Skylar and by transformers in this process. Each way reads
the same prompt and then decodes greedily, one token a step; only those steps are timed, the ways
take turns, and a row holds the median of each. In float32 all ways must give the same tokens.

    growing         our model, a cache that doubles its memory when full
    static          our model, a cache preallocated for all tokens
    compiled        `torch.compile(mode="default")` of that step; the cache's length is a symbol,
                    so that one graph serves every step
    frozen          the same with Inductor's `freezing`: weights are constants of the graph, and
                    oneDNN's blocked order is made once
    hf_static       transformers with its `StaticCache`
    hf_compiled     `torch.compile` of its forward, all shapes fixed
    fused           `fuse_for_cpu`: what `generate` does by itself

Compilation is not part of the timings. `--compile` measures it in CPU seconds of this process and
of the compilers it starts, with an empty cache on disk, and that needs no quiet machine.

    python bench/decode_compiled.py                       # all cases; every row is written at once
    python bench/decode_compiled.py --only test-fp32-1    # some of them
    python bench/decode_compiled.py --compile             # seconds that compilation takes
    python bench/decode_compiled.py --orders              # supports the constants for products
    python bench/decode_compiled.py --break-even          # supports FUSE_MIN_TOKENS
"""

import argparse
import contextlib
import itertools
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial

import torch
import torch._inductor.config as inductor
import torch.nn.functional as F
from common import ROOT, show, write
from transformers import AutoModelForCausalLM, StaticCache
from transformers.utils import logging

from skylar.inference.cpu_fused import (
    can_prepack,
    fuse_for_cpu,
    prepacked_linear,
    transposed_linear,
)
from skylar.inference.generate import Session, next_logits
from skylar.layers.cache import KVCache
from skylar.models.decoder import CausalLM
from skylar.models.hub import from_pretrained, save_pretrained
from skylar.models.presets import get_config

NAME = "decode_compiled"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MODELS = ("test", "wide")  # `wide`: SmolLM2-135M's width and vocabulary, a fifth of its layers
BATCHES = (1, 4, 16)
CASES = ["-".join(map(str, case)) for case in itertools.product(MODELS, DTYPES, BATCHES)]
WIDE = dict(
    vocab_size=49_152, d_model=576, n_heads=9, n_kv_heads=3, d_head=64, n_layers=6, d_ff=1536)
COMPILED = ("compiled", "frozen", "hf_compiled")
PROMPT, NEW = 32, 32  # tokens read before decoding, tokens decoded
CAPACITY = PROMPT + NEW


# --- the ways ---


class Ours:
    "Our model with a `KVCache`; the step may be compiled."

    def __init__(self, model: CausalLM, batch: int, capacity: int | None, step=next_logits):
        self.session = Session(model, batch, CAPACITY)
        if capacity is None:
            dtype = model.lm_head.weight.dtype
            self.session.cache = KVCache(model.config, batch, None, dtype)
        self.model, self.compiled = model, step

    def read(self, ids):
        self.session.reset()
        return self.session(ids)

    def step(self, ids):
        return self.compiled(self.model, ids, None, self.session.cache)


class Fused:
    "The fused form of our model."

    def __init__(self, model: CausalLM, batch: int):
        self.session = fuse_for_cpu(model, batch).session(batch, CAPACITY)

    def read(self, ids):
        self.session.reset()
        return self.session(ids)

    def step(self, ids):
        return self.session(ids)


class Theirs:
    "transformers' model with its static cache; the forward pass of a step may be compiled."

    def __init__(self, model, batch: int, compiled: bool):
        self.model, self.forward = model, model.forward
        if compiled:
            self.forward = torch.compile(model.forward, dynamic=False)
        self.cache = StaticCache(config=model.config, max_cache_len=CAPACITY)
        self.at = torch.arange(CAPACITY)

    def _call(self, forward, ids, start: int):
        at = self.at[start:start + ids.shape[1]]
        out = forward(ids, past_key_values=self.cache, position_ids=at[None], use_cache=True,
                      logits_to_keep=1)
        self.length = start + ids.shape[1]
        return out.logits[:, -1].float()

    def read(self, ids):
        self.cache.reset()
        return self._call(self.model.forward, ids, 0)

    def step(self, ids):
        return self._call(self.forward, ids, self.length)


def frozen_step(model, ids, mask, cache):
    "A function of its own, so that its graphs are not those of `next_logits`."
    return next_logits(model, ids, mask, cache)


def open_ways(ours: CausalLM, theirs, batch: int, names=()) -> dict:
    "The ways by name (none: all), not yet compiled."
    makers = {
        "growing": partial(Ours, ours, batch, None),
        "static": partial(Ours, ours, batch, CAPACITY),
        "compiled": lambda: Ours(ours, batch, CAPACITY, torch.compile(next_logits)),
        "frozen": lambda: Ours(ours, batch, CAPACITY, torch.compile(
            frozen_step, options={"freezing": True})),
        "hf_static": partial(Theirs, theirs, batch, False),
        "hf_compiled": partial(Theirs, theirs, batch, True),
        "fused": partial(Fused, ours, batch)}
    return {name: makers[name]() for name in names or makers}


def decode(way, ids, n: int = NEW) -> tuple[torch.Tensor, float]:
    "Greedy tokens (B, n) after the prompt, and the seconds of the steps."
    token = way.read(ids).argmax(-1, keepdim=True)
    tokens = []
    begin = time.perf_counter()
    for _ in range(n):
        tokens.append(token)
        token = way.step(token).argmax(-1, keepdim=True)
    return torch.cat(tokens, 1), time.perf_counter() - begin


def freezing(name: str):
    "Inductor's setting while a way is called for the first times."
    return inductor.patch(freezing=True) if name == "frozen" else contextlib.nullcontext()


@torch.no_grad()
def warm_up(ways: dict, ids) -> dict:
    "Compile what is to be compiled; the tokens of each way."
    tokens = {}
    for name, way in ways.items():
        with freezing(name):
            decode(way, ids, 4)  # the first step, and the one in which lengths become a symbol
            tokens[name], _ = decode(way, ids)
    return tokens


# --- rows ---


def models(case: str):
    "Ours, theirs, dtype and batch size."
    name, dtype, batch = case.split("-")
    torch.manual_seed(0)
    config = get_config("test") if name == "test" else get_config("test", "llama3", **WIDE)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(CausalLM(config), folder)
        ours = from_pretrained(folder, dtype=DTYPES[dtype])
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).eval()
    return ours, theirs, DTYPES[dtype], int(batch)


@torch.no_grad()
def prepare(case: str) -> tuple[dict, torch.Tensor, dict]:
    "Ways, compiled and warm; the prompt; the share of tokens that each has as `static` does."
    ours, theirs, dtype, batch = models(case)
    torch._dynamo.reset()
    ways = open_ways(ours, theirs, batch)
    ids = torch.randint(ours.config.vocab_size, (batch, PROMPT))
    tokens = warm_up(ways, ids)
    same = {name: float((t == tokens["static"]).float().mean()) for name, t in tokens.items()}
    if dtype == torch.float32:
        assert min(same.values()) == 1, f"{case}: other tokens, {same}"
    return ways, ids, same


@torch.no_grad()
def measure(case: str, ways: dict, ids, same: dict, rounds: int) -> dict:
    "One row: tokens a second of every way, in turns."
    took = {name: [] for name in ways}
    for _, (name, way) in itertools.product(range(rounds), ways.items()):
        took[name].append(decode(way, ids)[1])
    fused, new = took["fused"], len(ids) * NEW
    ratios = {name: statistics.median(t / f for t, f in zip(took[name], fused)) for name in took}
    return {
        "what": "decode", "case": case, "batch": len(ids), "new_tokens": NEW, "rounds": rounds,
        "torch_threads": torch.get_num_threads(),
        "tokens_per_s": {n: round(new / statistics.median(t), 1) for n, t in took.items()},
        "fused_over": {n: round(x, 3) for n, x in ratios.items() if n != "fused"},
        "same_tokens": {n: round(x, 3) for n, x in same.items() if n != "static"}}


def cpu_seconds() -> float:
    "Of this process and of those it has waited for: compilers."
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


@torch.no_grad()
def compilation(case: str) -> dict:
    "One row: CPU seconds until each compiled way has run a text for the first time."
    ours, theirs, _, batch = models(case)
    ids = torch.randint(ours.config.vocab_size, (batch, PROMPT))
    took = {}
    with inductor.patch(compile_threads=1, force_disable_caches=True):
        for name in COMPILED:
            torch._dynamo.reset()
            way = open_ways(ours, theirs, batch, [name])[name]
            begin = cpu_seconds()
            with freezing(name):
                decode(way, ids, 4)
            took[name] = round(cpu_seconds() - begin, 1)
    begin = cpu_seconds()
    fuse_for_cpu(ours, batch)
    return {"what": "compile", "case": case, "cpu_seconds": took,
            "fuse_cpu_seconds": round(cpu_seconds() - begin, 3)}


# --- what supports the constants of skylar/inference/cpu_fused.py ---

ROWS = (1, 2, 4, 16)
SHAPES = ((128, 128), (256, 128), (256, 256), (512, 256), (512, 512), (1024, 512), (1536, 576),
          (1536, 1024), (3072, 576))  # 2**14 to about 2**21 weights


def order(dtype: torch.dtype, n: int, shape: tuple, threads: int, rounds: int) -> dict:
    "Microseconds of a product of n rows in each order of the weights, cold in the cache."
    copies = min(100, max(4, int(4e7 // (shape[0] * shape[1] * dtype.itemsize))))
    weights, x = [torch.randn(shape).to(dtype) for _ in range(copies)], torch.randn(n, shape[1])
    makers = {"plain": lambda w: partial(F.linear, x.to(dtype), w),
              "prepacked": lambda w: partial(prepacked_linear(w, None, n), x)}
    if dtype == torch.float32:
        makers["transposed"] = lambda w: partial(transposed_linear(w, None), x)
    ways = {name: [make(w) for w in weights] for name, make in makers.items()}
    took = {name: [] for name in ways}
    with torch.inference_mode():
        for _, (name, calls) in itertools.product(range(rounds + 1), ways.items()):
            took[name].append(timed(calls) / copies)
    return {"what": "order", "dtype": str(dtype)[6:], "rows": n, "shape": list(shape),
            "torch_threads": threads,
            "us": {name: round(1e6 * statistics.median(t[1:]), 1) for name, t in took.items()}}


def timed(calls: list[Callable]) -> float:
    "Seconds of the wall clock."
    begin = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - begin


def orders(rounds: int) -> list[dict]:
    "All products, with one thread and with all."
    found, every = [], torch.get_num_threads()
    for threads in sorted({1, every}):
        torch.set_num_threads(threads)
        for dtype, n, shape in itertools.product(DTYPES.values(), ROWS, SHAPES):
            if dtype == torch.float32 or can_prepack(dtype):
                found.append(order(dtype, n, shape, threads, rounds))
    torch.set_num_threads(every)
    return found


@torch.no_grad()
def break_even(case: str, rounds: int) -> dict:
    "One row: after how many tokens the copy of the weights has paid for itself."
    ours, _, _, batch = models(case)
    ids = torch.randint(ours.config.vocab_size, (batch, PROMPT))
    took = {"copy": [], "static": [], "fused": []}
    static = Ours(ours, batch, CAPACITY)
    for _ in range(rounds + 1):
        took["copy"].append(timed([partial(fuse_for_cpu, ours, batch)]))
        for name, way in (("static", static), ("fused", Fused(ours, batch))):
            took[name].append(decode(way, ids)[1] / NEW)
    copy, plain, fused = (statistics.median(took[n][1:]) for n in ("copy", "static", "fused"))
    return {
        "what": "break_even", "case": case, "batch": batch,
        "torch_threads": torch.get_num_threads(), "copy_ms": round(1e3 * copy, 2),
        "static_ms": round(1e3 * plain, 3), "fused_ms": round(1e3 * fused, 3),
        "tokens": round(copy / (plain - fused), 1)}


# --- the file ---


def key(row: dict) -> list:
    "What makes a row the same measurement as an older one."
    names = ("what", "case", "dtype", "rows", "shape", "torch_threads")
    return [str(row.get(name)) for name in names]


def save(rows: list[dict]) -> None:
    "Put rows into the file, in place of older ones of the same measurement."
    path = ROOT / "bench" / "results" / f"{NAME}.json"
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    new = {json.dumps(key(row)): row for row in old + rows}
    write(NAME, sorted(new.values(), key=key), prompt=PROMPT, capacity=CAPACITY,
          compile_mode="default", wide=WIDE)
    for row in rows:
        show(row)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=CASES, help="some of the cases")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compile", action="store_true", help="seconds of compilation")
    parser.add_argument("--orders", action="store_true", help="orders of weights in memory")
    parser.add_argument("--break-even", action="store_true", help="when the copy has paid")
    parser.add_argument("--dry", action="store_true", help="print the rows, write no file")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    keep = (lambda rows: [show(row) for row in rows]) if args.dry else save
    if args.orders:
        return keep(orders(args.rounds))
    for case in args.only:
        if args.compile:
            keep([compilation(case)])
        elif args.break_even:
            keep([break_even(case, args.rounds)])
        else:
            keep([measure(case, *prepare(case), args.rounds)])


if __name__ == "__main__":
    main()
