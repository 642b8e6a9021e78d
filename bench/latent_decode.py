"""Latent attention decoding a token: absorbed, naive, and transformers; one layer, whole models.

    python bench/decode.py --family deepseek_v3            # all cases, about 7 minutes
    python bench/decode.py --family deepseek_v3 --quick    # short contexts, writes no file

Rows of one layer: widths of DeepSeek-V2-Lite and DeepSeek-V3, random weights, the same on all
sides; a cache filled with S tokens, then single tokens in turns. transformers gets eager attention
and SDPA, and the faster one counts. Outputs must be equal, and the cache must have the bytes of
the formula.

Rows of a whole model: a small DeepSeek-V3 with random weights, opened by both sides from one
folder; each reads a prompt of S tokens into its cache, then they continue it greedily in turns,
one token a call, `NEW` tokens a round. In float32 the tokens must be equal. transformers gets the
fastest of its attention and experts implementations.
"""

import copy
import itertools
import statistics
import tempfile
import time
from functools import partial

import torch
from common import record, show
from transformers import AutoModelForCausalLM, DeepseekV3Config, DynamicCache
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RotaryEmbedding,
)

from skylar.inference.generate import Session
from skylar.layers.attention_backends import Positions
from skylar.layers.mla import MLAConfig, expanded_attention
from skylar.models.decoder import CausalLM, cache_bytes, count_parameters
from skylar.models.hub import from_pretrained, save_pretrained
from skylar.models.presets import get_config

WIDTHS = dict(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
LAYERS = {  # name: d_model, config
    "v2-lite": (2048, MLAConfig(n_heads=16, **WIDTHS)),
    "v3": (7168, MLAConfig(n_heads=128, q_lora_rank=1536, **WIDTHS)),
}
CONTEXTS = (512, 1024, 4096)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TARGETS = {512: 1.0, 1024: 5.0, 4096: 20.0}  # over transformers, but 512: over naive
MODEL = dict(  # overrides of `deepseek-test`: widths of a head as in V2-Lite, a quarter of D and R
    vocab_size=8192, d_model=512, n_layers=6, n_heads=8, d_ff=1536, d_expert=256, q_lora_rank=None,
    kv_lora_rank=128, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
    max_seq_len=8192)
MODEL_CONTEXTS = (512, 1024, 2048, 4096)
MODEL_TARGETS = {512: 1.0, 1024: 1.0, 2048: 1.0, 4096: 3.0}
NEW = 8  # tokens of a round
QUICK = (("v2-lite", "fp32"), ("model", "fp32"))


def their_layer(config: MLAConfig, d_model: int, dtype: torch.dtype):
    """transformers' layer and its rotary tables."""
    description = DeepseekV3Config(
        hidden_size=d_model, num_attention_heads=config.n_heads, q_lora_rank=config.q_lora_rank,
        num_key_value_heads=config.n_heads, max_position_embeddings=2 * max(CONTEXTS), **WIDTHS)
    layer = DeepseekV3Attention(description, layer_idx=0).to(dtype).eval()
    return layer, DeepseekV3RotaryEmbedding(description)


class OurStep:
    """Decodes one token after S; the cache is as it was afterwards, so that it can be repeated."""

    def __init__(self, layer, latents, k_rope, S: int):
        B, D, device = len(latents), layer.o_proj.out_features, latents.device
        self.layer, self.S = layer, S
        self.cache = layer.config.cache(D, B, S + 1, latents.dtype, device)
        self.cache.keys[:, :, :S], self.cache.values[:, :, :S] = latents, k_rope
        steps = torch.arange(S + 1, device=device)
        self.keys = Positions(cache_position=steps, position_ids=steps)

    def __call__(self, x):
        S, keys = self.S, self.keys
        slots = self.cache.locate(keys[S:], keys, slice(S, S + 1))
        return self.layer(x, self.layer.prepare(x, keys[S:], keys, slots=slots), self.cache)


class TheirStep:
    def __init__(self, layer, rotary, latents, k_rope, S: int, kind: str):
        self.layer, self.rotary, self.S, self.kind = layer, rotary, S, kind
        self.cache = DynamicCache()
        self.cache.update(latents.clone(), k_rope.clone(), 0)

    def __call__(self, x):
        self.layer.config._attn_implementation = self.kind
        tables = self.rotary(x, torch.tensor([[self.S]], device=x.device))
        out = self.layer(x, tables, None, past_key_values=self.cache)[0]
        self.cache.crop(-1)  # a view: the next step copies the cache, as every step does
        return out


def seconds(f) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


@torch.inference_mode()
def measure(name: str, dtype: str, S: int, sides: tuple, rounds: int) -> dict:
    """Medians of paired rounds, all sides in turns."""
    (D, config), (ours, naive, theirs, rotary) = LAYERS[name], sides
    torch.manual_seed(S)
    kind = DTYPES[dtype]
    latents, k_rope = torch.randn(1, 1, S, 512).to(kind), torch.randn(1, 1, S, 64).to(kind)
    steps = {"absorbed": OurStep(ours, latents, k_rope, S),
             "naive": OurStep(naive, latents, k_rope, S),
             "sdpa": TheirStep(theirs, rotary, latents, k_rope, S, "sdpa"),
             "eager": TheirStep(theirs, rotary, latents, k_rope, S, "eager")}
    x = torch.randn(1, 1, D).to(kind)
    outs = {side: step(x).float() for side, step in steps.items()}  # a first call each
    size = outs["eager"].abs().max()
    error = max(float((out - outs["eager"]).abs().max() / size) for out in outs.values())
    assert error < (1e-5 if dtype == "fp32" else 5e-2), error
    cache, formula = steps["absorbed"].cache, config.cache_bytes(D, S + 1, kind.itemsize)
    assert cache.nbytes == formula, (cache.nbytes, formula)
    times = {side: [] for side in steps}
    for _ in range(rounds):
        for side, step in steps.items():
            times[side].append(seconds(partial(step, x)))
    ms = {side: 1e3 * statistics.median(t) for side, t in times.items()}
    best = min(("sdpa", "eager"), key=ms.get)
    ratio = statistics.median(a / b for a, b in zip(times[best], times["absorbed"]))
    over_naive = statistics.median(a / b for a, b in zip(times["naive"], times["absorbed"]))
    return {"case": f"{name}-{dtype}-{S}", "part": "one layer", "context": S,
            "ours_ms": round(ms["absorbed"], 3), "naive_ms": round(ms["naive"], 3),
            "theirs_ms": round(ms[best], 3), "theirs": best, "ratio": round(ratio, 2),
            "over_naive": round(over_naive, 2), "target": TARGETS[S],
            "met": (over_naive if S == 512 else ratio) >= TARGETS[S],
            "largest_error": float(f"{error:.1e}"), "cache_bytes": formula}


class OurDecoding:
    """Continues a prompt greedily, again and again from its end."""

    def __init__(self, model, ids):
        self.length, self.session = ids.shape[1], Session(model, 1, ids.shape[1] + NEW)
        self.first = self.session(ids).argmax(-1, keepdim=True)  # (1, 1)

    def __call__(self) -> torch.Tensor:
        tokens = [self.first]
        for _ in range(NEW):
            tokens.append(self.session(tokens[-1]).argmax(-1, keepdim=True))
        self.session.cache.crop(self.length)
        return torch.cat(tokens, 1)


class TheirDecoding:
    """The step of transformers' `generate` without what it does around it."""

    def __init__(self, model, ids):
        self.model, self.cache = model, DynamicCache(config=model.config)
        self.first = self.step(ids)

    def step(self, ids):
        out = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].float().argmax(-1, keepdim=True)

    def __call__(self, n: int = NEW) -> torch.Tensor:
        tokens = [self.first]
        for _ in range(n):
            tokens.append(self.step(tokens[-1]))
        self.cache.crop(-n)
        return torch.cat(tokens, 1)


def models(name: str, dtype: str) -> tuple:
    """Our model, the same without absorption, and transformers', from one folder."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(CausalLM(get_config("deepseek-test", **MODEL)), folder + "/model")
        ours = from_pretrained(folder + "/model", dtype=DTYPES[dtype])
        theirs = AutoModelForCausalLM.from_pretrained(folder + "/model", dtype=DTYPES[dtype])
    naive = copy.deepcopy(ours)
    for block in naive.model.layers:
        block.self_attn.attention_form = partial(expanded_attention, block.self_attn)
    return ours.eval(), naive.eval(), theirs.eval()


def fastest_kind(theirs, run) -> str:
    """Set transformers' model to its fastest attention and experts for decoding."""
    took = {}
    for kind in itertools.product(("sdpa", "eager"), ("eager", "grouped_mm", "batched_mm")):
        theirs.set_attn_implementation(kind[0])
        theirs.set_experts_implementation(kind[1])
        run(1)
        took[kind] = seconds(partial(run, 3))
    best = min(took, key=took.get)
    theirs.set_attn_implementation(best[0])
    theirs.set_experts_implementation(best[1])
    return ", ".join(best)


@torch.inference_mode()
def measure_model(name: str, dtype: str, S: int, sides: tuple, rounds: int) -> dict:
    """Medians of paired rounds of greedy decoding after a prompt of S tokens."""
    ours, naive, theirs = sides
    ids = torch.randint(
        ours.config.vocab_size, (1, S), generator=torch.Generator().manual_seed(S))
    theirs.set_attn_implementation("sdpa")
    theirs.set_experts_implementation("grouped_mm")
    runs = {"absorbed": OurDecoding(ours, ids), "naive": OurDecoding(naive, ids),
            "theirs": TheirDecoding(theirs, ids)}
    kind = fastest_kind(theirs, runs["theirs"])
    outs = {side: run() for side, run in runs.items()}
    same = {side: float((out == outs["absorbed"]).float().mean()) for side, out in outs.items()}
    assert dtype != "fp32" or set(same.values()) == {1.0}, same
    held = runs["absorbed"].session.cache.nbytes
    formula = cache_bytes(ours.config, S + NEW, DTYPES[dtype])
    assert held == formula, (held, formula)
    times = {side: [] for side in runs}
    for _ in range(min(rounds, 5)):
        for side, run in runs.items():
            times[side].append(seconds(run) / NEW)
    rate = {side: round(1 / statistics.median(t), 1) for side, t in times.items()}
    ratio, over_naive = (statistics.median(a / b for a, b in zip(times[side], times["absorbed"]))
                         for side in ("theirs", "naive"))
    return {"case": f"{name}-{dtype}-{S}", "part": "whole model", "context": S,
            "parameters": count_parameters(ours.config), "skylar_tokens_per_s": rate["absorbed"],
            "naive_tokens_per_s": rate["naive"], "transformers_tokens_per_s": rate["theirs"],
            "theirs": kind, "ratio": round(ratio, 2), "over_naive": round(over_naive, 2),
            "target": MODEL_TARGETS[S], "met": min(ratio / MODEL_TARGETS[S], over_naive) >= 1,
            "same_tokens": round(same["theirs"], 3), "cache_bytes": formula}


def built(name: str, dtype: str) -> tuple:
    """Our layer, the same without absorption, transformers' and its tables; one set of weights."""
    D, config = LAYERS[name]
    torch.manual_seed(0)
    theirs, rotary = their_layer(config, D, DTYPES[dtype])
    layers = []
    for _ in range(2):
        with torch.device("meta"):
            layer = config.build(D).eval()
        layer.load_state_dict(theirs.state_dict(), assign=True)
        layer.rotary = config.rope.build(config.qk_rope_head_dim)  # a buffer, not in the file
        layers.append(layer)
    layers[1].attention_form = partial(expanded_attention, layers[1])
    return *layers, theirs, rotary


def main(rounds: int = 7, quick: bool = False, dry: bool = False, only: str = "") -> None:
    """Print all rows, and write them unless `quick`, `dry` or `only` some were asked for."""
    rows, rounds = [], 3 if quick else rounds
    parts = [(name, built, measure, CONTEXTS) for name in LAYERS]
    parts.append(("model", models, measure_model, MODEL_CONTEXTS))
    for (name, build, run, contexts), dtype in itertools.product(parts, DTYPES):
        cases = [S for S in contexts if f"{name}-{dtype}-{S}".startswith(only)]
        if quick:
            cases = cases[:2] if (name, dtype) in QUICK else []
        if cases:
            sides = build(name, dtype)
            rows += [shown(run(name, dtype, S, sides, rounds)) for S in cases]
    if not (quick or dry or only):
        record("decode_deepseek_v3", rows, rounds=rounds, new_tokens_a_round=NEW,
               torch_threads=torch.get_num_threads())


def shown(row: dict) -> dict:
    show(row)
    return row
