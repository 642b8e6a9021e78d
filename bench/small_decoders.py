"""Questions about small decoders for which a lesson is too short: more seeds, longer runs.

    python bench/small_decoders.py ffn         # GELU, SwiGLU, ReLU^2 at equal parameters
    python bench/small_decoders.py kv_heads    # 8, 4, 2 and 1 key-value heads
    python bench/small_decoders.py latent --steps 400    # shared heads and latents of equal cache
    python bench/small_decoders.py ffn --seeds 2 --steps 100 --dry    # a look; writes no file

Two-layer decoders over the characters of Shakespeare's plays, trained with AdamW on random windows
of 64 characters and judged by bits per byte on the four plays that nobody trained on. For each
seed all variants start from that seed and see the same batches, so that differences are compared
seed by seed: mean of the pairs and a 95% t-interval. Writes bench/results/small_decoders_NAME.json,
which the lessons plot.
"""

import argparse
import math
import time
from functools import cache

import torch
import torch.nn.functional as F
from common import record

from skylar.data.held_out import train_plays, val_plays
from skylar.layers.block import BlockConfig
from skylar.layers.gqa import GQAConfig
from skylar.layers.mla import MLAConfig
from skylar.layers.mlp import MLPConfig, ReLU2Config, SwiGLUConfig
from skylar.layers.norm import RMSNormConfig
from skylar.models.decoder import CausalLM, DecoderConfig, count_parameters
from skylar.utils.lesson import mean_interval

LENGTH, BATCH, LR = 64, 16, 3e-3  # characters of a window, windows of a batch, peak rate
STEPS = (100, 400, 1600)  # lengths of a run, each with a schedule of its own


def decoder(vocab_size: int, d_model: int, attention, ffn) -> DecoderConfig:
    """Two blocks with RMSNorm and RoPE."""
    norm = RMSNormConfig()
    block = BlockConfig(attention=attention, ffn=ffn, norm=norm)
    return DecoderConfig(vocab_size=vocab_size, d_model=d_model, blocks=(block,) * 2, norm=norm,
                         max_seq_len=LENGTH, init_std=0.04)


def ffn_variants(vocab_size: int) -> dict[str, DecoderConfig]:
    """Feed-forward layers of equal parameter count."""
    attention = GQAConfig(n_heads=4, n_kv_heads=2)
    layers = {"GELU": MLPConfig(d_ff=288, bias=False), "SwiGLU": SwiGLUConfig(d_ff=192),
              "ReLU²": ReLU2Config(d_ff=288)}
    return {name: decoder(vocab_size, 72, attention, ffn) for name, ffn in layers.items()}


def kv_head_variants(vocab_size: int) -> dict[str, DecoderConfig]:
    """Eight query heads; what fewer key-value heads save is spent on the feed-forward layer.

    A key-value head fewer frees 2 * 64 * 8 weights, which 5 1/3 hidden units of SwiGLU take up:
    the counts differ by less than 0.2%."""
    return {
        str(heads): decoder(vocab_size, 64, GQAConfig(n_heads=8, n_kv_heads=heads),
                            SwiGLUConfig(d_ff=128 + round((8 - heads) * 2 * 64 * 8 / (3 * 64))))
        for heads in (8, 4, 2, 1)}


def latent_variants(vocab_size: int) -> dict[str, DecoderConfig]:
    """Eight heads: 128 numbers in the cache of a token, a quarter and an eighth of that.

    The feed-forward layer takes up the difference in weights, to within a hidden unit."""
    layers = {f"{n} KV head" + "s" * (n > 1): GQAConfig(n_heads=8, n_kv_heads=n) for n in (8, 2, 1)} | {
        f"latent {rank} + {rotary}": MLAConfig(
            n_heads=8, kv_lora_rank=rank, qk_nope_head_dim=8, qk_rope_head_dim=rotary,
            v_head_dim=8)
        for rank, rotary in ((24, 8), (12, 4))}
    sizes = {name: sum(p.numel() for p in layer.build(64).parameters())
             for name, layer in layers.items()}
    full = sizes["8 KV heads"]
    order = ("8 KV heads", "2 KV heads", "latent 24 + 8", "1 KV head", "latent 12 + 4")
    return {name: decoder(vocab_size, 64, layers[name],
                          SwiGLUConfig(d_ff=128 + round((full - sizes[name]) / (3 * 64))))
            for name in order}


# the first of each is the baseline
VARIANTS = {"ffn": ffn_variants, "kv_heads": kv_head_variants, "latent": latent_variants}


@cache
def plays() -> tuple[torch.Tensor, torch.Tensor, int, float]:
    """Training and held-out characters as ids, the number of ids, held-out characters per byte."""
    train, held_out = "".join(train_plays()), "".join(val_plays())
    chars = {c: i for i, c in enumerate(sorted(set(train + held_out)))}
    ids = (torch.tensor([chars[c] for c in text]) for text in (train, held_out))
    return *ids, len(chars), len(held_out) / len(held_out.encode())


def nats(model: CausalLM, windows: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


def windows_of(ids: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    return ids[starts[:, None] + torch.arange(LENGTH + 1)]  # (B, LENGTH + 1)


def held_out_bits(model: CausalLM, n_windows: int = 2048) -> float:
    """Bits per byte over equally spaced windows of the held-out plays."""
    _, held_out, _, chars_per_byte = plays()
    starts = torch.linspace(0, len(held_out) - LENGTH - 1, n_windows).long()
    with torch.no_grad():
        losses = [nats(model, windows_of(held_out, part)).item() for part in starts.split(256)]
    return sum(losses) / len(losses) / math.log(2) * chars_per_byte


def train(config: DecoderConfig, seed: int, steps: int) -> float:
    """Held-out bits per byte after a run: warm-up over a tenth, then a straight line to zero."""
    ids, *_ = plays()
    torch.manual_seed(seed)
    model, generator = CausalLM(config).train(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), LR, betas=(0.9, 0.95), fused=True)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LR * min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))
        starts = torch.randint(len(ids) - LENGTH - 1, (BATCH,), generator=generator)
        nats(model, windows_of(ids, starts)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return held_out_bits(model.eval())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=VARIANTS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--dry", action="store_true", help="print the rows, write no file")
    args = parser.parse_args()
    variants = VARIANTS[args.name](plays()[2])
    baseline, rows, start = next(iter(variants)), [], time.perf_counter()
    for steps in args.steps:
        bits = {name: [train(config, seed, steps) for seed in range(args.seeds)]
                for name, config in variants.items()}
        for name, config in variants.items():
            pairs = [one - other for one, other in zip(bits[name], bits[baseline])]
            change, interval = mean_interval(pairs) if name != baseline else (0.0, 0.0)
            rows.append({
                "steps": steps, "variant": name, "parameters": count_parameters(config),
                "bits_per_byte": [round(b, 4) for b in bits[name]],
                "change": round(change, 4), "interval": round(interval, 4)})
            print(rows[-1], f"{time.perf_counter() - start:.0f} s", flush=True)
    if not args.dry:
        record(f"small_decoders_{args.name}", rows, baseline=baseline, seeds=args.seeds,
               batch=f"{BATCH} x {LENGTH} characters", lr=LR,
               change="bits per byte against the baseline, paired by seed",
               interval="half width of the 95% t-interval of the change")


if __name__ == "__main__":
    main()
