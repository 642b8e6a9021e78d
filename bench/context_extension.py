"""Does scaling RoPE's frequencies let a small model read four times its trained length?

    python bench/context_extension.py

A byte-level model of Shakespeare is trained on 64 bytes and evaluated on windows of 256 from the
held-out plays, for each scaling of the frequencies: as it is, and after 10 to 160 steps of
fine-tuning on 256 bytes. Two baselines: plain RoPE, and plain RoPE that never sees more than the
last 32 to 64 bytes ("cropped"; its fine-tuning goes on with 64). Same seed, same batches for all;
about 12 minutes on one idle core. Lesson 01/02 plots the result.
"""

import argparse
import copy
import math
import time

import torch
import torch.nn.functional as F
from common import record
from torch import Tensor

from skylar.data.held_out import train_text, val_text
from skylar.layers.block import BlockConfig
from skylar.layers.gqa import GQAConfig
from skylar.layers.mlp import SwiGLUConfig
from skylar.layers.norm import RMSNormConfig
from skylar.layers.rope import (
    LinearScaling,
    Llama3Scaling,
    NTKScaling,
    RoPEScaling,
    YaRNScaling,
    compute_inv_freq,
)
from skylar.models.decoder import CausalLM, DecoderConfig, count_parameters

TRAINED, FACTOR = 64, 4
LONG = TRAINED * FACTOR  # 256
THETA, D_MODEL, D_HEAD = 10_000.0, 128, 32
STEPS, BATCH, LR = 1500, 32, 3e-3
TUNE_BATCH, TUNE_LR = BATCH // FACTOR, 1e-3  # as many bytes a step
TUNE_STEPS = (10, 40, 160)  # each a run of its own
WINDOWS = 128  # of the held-out plays
BITS_PER_NAT = 1 / math.log(2)


class HardSplit:
    """For the ablation: divide only wavelengths above the trained length, or only the others."""

    attention_scaling = 1.0

    def __init__(self, long: bool):
        self.long = long

    def inv_freq(self, theta: float, d_head: int) -> Tensor:
        plain = compute_inv_freq(theta, d_head)
        long = 2 * math.pi / plain > TRAINED
        return torch.where(long == self.long, plain / FACTOR, plain)


SCALINGS = {
    "plain": None,
    "linear": LinearScaling(factor=FACTOR),
    "NTK": NTKScaling(factor=FACTOR),
    "Llama 3": Llama3Scaling(factor=FACTOR, original_max_position_embeddings=TRAINED),
    "YaRN": YaRNScaling(factor=FACTOR, original_max_position_embeddings=TRAINED),
}
ABLATIONS = {
    "long wavelengths only": HardSplit(long=True),
    "short wavelengths only": HardSplit(long=False),
    "YaRN, scores not scaled": YaRNScaling(
        factor=FACTOR, original_max_position_embeddings=TRAINED, attention_factor=1.0),
}


def byte_ids(text: str) -> Tensor:
    """The UTF-8 bytes of `text`."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def new_model() -> CausalLM:
    """Two layers of a Llama."""
    block = BlockConfig(attention=GQAConfig(n_heads=D_MODEL // D_HEAD),
                        ffn=SwiGLUConfig(d_ff=352), norm=RMSNormConfig())
    return CausalLM(DecoderConfig(vocab_size=256, d_model=D_MODEL, blocks=(block,) * 2,
                                  max_seq_len=LONG, norm=RMSNormConfig(), init_std=0.05))


def scaled(model: CausalLM, scaling: RoPEScaling | HardSplit | None) -> CausalLM:
    """A copy with the same weights and the frequencies of `scaling`."""
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        rotary = layer.self_attn.rotary
        if scaling is not None:
            rotary.inv_freq = scaling.inv_freq(THETA, D_HEAD)
            rotary.attention_scaling = scaling.attention_scaling
    return model


def batches(ids: Tensor, size: int, length: int, seed: int):
    """Random windows for ever: (size, length + 1)."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(ids) - length - 1, (size, 1), generator=generator)
        yield ids[starts + torch.arange(length + 1)]


def train(model: CausalLM, source, steps: int, lr: float) -> CausalLM:
    """AdamW, a tenth of the steps as warmup, cosine decay to 0; returns the same model."""
    adam = torch.optim.AdamW(model.parameters(), lr, (0.9, 0.98), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: min(
        (step + 1) / max(1, steps // 10), 0.5 * (1 + math.cos(math.pi * step / steps))))
    for _ in range(steps):
        window = next(source)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(window[:, :-1])
        adam.zero_grad()
        F.cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten()).backward()
        adam.step()
        schedule.step()
    return model


@torch.no_grad()
def bits(model: CausalLM, windows: Tensor) -> Tensor:  # (length,) bits a byte at each position
    """Mean over windows (N, length + 1)."""
    losses = [F.cross_entropy(model(w[:, :-1]).mT, w[:, 1:], reduction="none")
              for w in windows.split(64)]
    return torch.cat(losses).double().mean(0) * BITS_PER_NAT


def cropped(model: CausalLM, windows: Tensor) -> Tensor:
    """As `bits`, from pieces of the trained length that overlap by half."""
    half = TRAINED // 2
    pieces = windows.unfold(1, TRAINED + 1, half).unbind(1)  # each (N, TRAINED + 1)
    curves = [bits(model, piece) for piece in pieces]
    return torch.cat([curves[0]] + [curve[half:] for curve in curves[1:]])


def row(seed: int, name: str, steps: int, curve: Tensor) -> dict:
    """Bits a byte within the trained length, to twice it, beyond; and in steps of 16 bytes."""
    near, middle, far = curve.split([TRAINED, TRAINED, LONG - 2 * TRAINED])
    return {"seed": seed, "scaling": name, "tuned_steps": steps,
            "near": round(near.mean().item(), 4), "middle": round(middle.mean().item(), 4),
            "far": round(far.mean().item(), 4),
            "curve": [round(x, 3) for x in curve.unflatten(0, (-1, 16)).mean(1).tolist()]}


def run(seed: int, text: Tensor, windows: Tensor, steps: int, tune_steps) -> list[dict]:
    """All methods from one trained model."""
    torch.manual_seed(seed)
    model = train(new_model(), batches(text, BATCH, TRAINED, seed), steps, LR)
    rows = [row(seed, "cropped", 0, cropped(model, windows))]
    for name, scaling in (SCALINGS | ABLATIONS).items():
        rows.append(row(seed, name, 0, bits(scaled(model, scaling), windows)))
    for name, scaling in ({"cropped": None} | SCALINGS).items():
        shape = (BATCH, TRAINED) if name == "cropped" else (TUNE_BATCH, LONG)
        evaluate = cropped if name == "cropped" else bits
        for n in tune_steps:
            source = batches(text, *shape, seed + 1000)
            tuned = train(scaled(model, scaling), source, n, TUNE_LR)
            rows.append(row(seed, name, n, evaluate(tuned, windows)))
    return rows


def main(seeds: int, scale: float, dry: bool) -> None:
    text, held_out = byte_ids(train_text()), byte_ids(val_text())
    starts = torch.linspace(0, len(held_out) - LONG - 1, WINDOWS).long()
    windows = held_out[starts[:, None] + torch.arange(LONG + 1)]
    tune_steps = [max(2, round(n * scale)) for n in TUNE_STEPS]
    rows, started = [], time.perf_counter()
    for seed in range(seeds):
        rows += run(seed, text, windows, max(10, round(STEPS * scale)), tune_steps)
        print(f"seed {seed}: {time.perf_counter() - started:.0f} s", flush=True)
    if dry:
        return print(*rows, sep="\n")
    record("context_extension", rows, unit="bits per byte, held-out plays",
           trained_length=TRAINED, factor=FACTOR, theta=THETA, d_head=D_HEAD,
           parameters=count_parameters(new_model().config), steps=STEPS,
           tune_steps=tune_steps, windows=WINDOWS,
           seconds=round(time.perf_counter() - started))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="of all numbers of steps")
    parser.add_argument("--dry", action="store_true", help="print the rows, write no file")
    args = parser.parse_args()
    main(args.seeds, args.scale, args.dry)
