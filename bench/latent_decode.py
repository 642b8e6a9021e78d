"""One layer of latent attention decoding a token: absorbed, naive, and transformers' layer.

    python bench/decode.py --family deepseek_v3            # all cases, about 5 minutes
    python bench/decode.py --family deepseek_v3 --quick    # one layer, short contexts, no file

Widths of DeepSeek-V2-Lite and DeepSeek-V3, random weights, the same on all sides; a cache filled
with S tokens, then single tokens in turns. transformers gets eager attention and SDPA, and the
faster one counts. Outputs must be equal, and the cache must have the bytes of the formula.
"""

import statistics
import time
from functools import partial

import torch
from common import record
from transformers import DeepseekV3Config, DynamicCache
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RotaryEmbedding,
)

from skylar.layers.attention_backends import Positions
from skylar.layers.mla import MLAConfig, expanded_attention

WIDTHS = dict(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
LAYERS = {  # name: d_model, config
    "v2-lite": (2048, MLAConfig(n_heads=16, **WIDTHS)),
    "v3": (7168, MLAConfig(n_heads=128, q_lora_rank=1536, **WIDTHS)),
}
CONTEXTS = (512, 1024, 4096)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TARGETS = {512: 1.0, 1024: 5.0, 4096: 20.0}  # over transformers, but 512: over naive


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
        B, D = len(latents), layer.o_proj.out_features
        self.layer, self.S = layer, S
        self.cache = layer.config.cache(D, B, S + 1, latents.dtype)
        self.cache.keys[:, :, :S], self.cache.values[:, :, :S] = latents, k_rope
        steps = torch.arange(S + 1)
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
        tables = self.rotary(x, torch.tensor([[self.S]]))
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
    return {"case": f"{name}-{dtype}-{S}", "context": S, "ours_ms": round(ms["absorbed"], 3),
            "naive_ms": round(ms["naive"], 3), "theirs_ms": round(ms[best], 3),
            "theirs": best, "ratio": round(ratio, 2), "over_naive": round(over_naive, 2),
            "target": TARGETS[S], "met": (over_naive if S == 512 else ratio) >= TARGETS[S],
            "largest_error": float(f"{error:.1e}"), "cache_bytes": formula}


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
    layers[1].attend = partial(expanded_attention, layers[1])
    return *layers, theirs, rotary


def main(rounds: int = 7, quick: bool = False, dry: bool = False) -> None:
    """Print all rows, and write them unless `quick` or `dry`."""
    rows = []
    for name in ("v2-lite",) if quick else LAYERS:
        for dtype in ("fp32",) if quick else DTYPES:
            sides = built(name, dtype)
            for S in CONTEXTS[:2] if quick else CONTEXTS:
                rows.append(measure(name, dtype, S, sides, 3 if quick else rounds))
                print(rows[-1], flush=True)
    if not (quick or dry):
        record("decode_deepseek_v3", rows, rounds=rounds, part="one attention layer",
               torch_threads=torch.get_num_threads())
