r"""Recall of pairs that lie outside the window: which memories solve it, and with which loss.

    python bench/memory_recall.py                        # all layers, three seeds
    python bench/memory_recall.py --losses "far only" --layers "full attention" "kNN memory" \
        "neural memory"
    python bench/memory_recall.py --layers window --seeds 1 --steps 100 --dry    # a look; no file

Multi-query associative recall (Arora et al. 2023) with a gap: four pairs of a key and a value,
the same pairs once more (near: inside a window of 16 tokens), 40 tokens of filler, and the keys
again (far). Two blocks of width 64, the first with a window, the second with the layer in
question; trained with Adam on new sequences at every step (50 steps of warmup, then a linear
decay to 0), judged on 512 that nobody trained on.
The loss counts near and far values, or far ones only. Writes bench/results/memory_recall.json,
where rows of layers that were not asked for stay if their settings were the same.
"""

import argparse
import json
import time

import torch
import torch.nn.functional as F
from common import ROOT, show, write

from skylar.layers.block import BlockConfig
from skylar.layers.gqa import GQAConfig
from skylar.layers.memory import (
    KNNMemoryConfig,
    MemoryAsContextConfig,
    MemoryAsGateConfig,
    MemoryAsLayerConfig,
    NeuralMemoryConfig,
)
from skylar.layers.mlp import SwiGLUConfig
from skylar.layers.norm import RMSNormConfig
from skylar.layers.sliding_window import SlidingWindow
from skylar.models.decoder import CausalLM, DecoderConfig, count_parameters

KEYS, VALUES, FILLER, PAIRS, GAP, WINDOW = 16, 16, 8, 4, 40, 16
BATCH, LR, STEPS, WARMUP, D_MODEL = 32, 3e-3, 600, 50, 64
NAME = "memory_recall"
LOSSES = {"near and far": (1, 2), "far only": (2,)}


def layers() -> dict:
    """The second block's attention; the first two are the baselines."""
    window = GQAConfig(n_heads=2, window=SlidingWindow(size=WINDOW))
    full, memory = GQAConfig(n_heads=2), NeuralMemoryConfig(n_heads=2, chunk=16)
    deep = NeuralMemoryConfig(n_heads=2, chunk=16, depth=2)
    plain = NeuralMemoryConfig(n_heads=2, chunk=16, momentum=False, forgetting=False)
    return {
        "window": window, "full attention": full,
        "kNN memory": KNNMemoryConfig(n_heads=2, window=WINDOW, top_k=4),
        "kNN, 2 of 8 lists": KNNMemoryConfig(n_heads=2, window=WINDOW, top_k=4, n_lists=8,
                                             n_probe=2),
        "neural memory": memory, "neural, 2 matrices": deep,
        "neural, no momentum, no forgetting": plain,
        "as gate": MemoryAsGateConfig(attention=window, memory=memory),
        "as layer": MemoryAsLayerConfig(attention=window, memory=memory),
        "as context": MemoryAsContextConfig(attention=full, memory=memory)}


def sequences(n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (n, 64), and where a value is to be predicted: 1 near, 2 far, 0 nowhere."""
    def order(size: int) -> torch.Tensor:
        return torch.rand(n, size, generator=generator).argsort(-1)

    keys = order(KEYS)[:, :PAIRS]
    values = KEYS + torch.randint(VALUES, (n, PAIRS), generator=generator)
    pairs = torch.stack([keys, values], -1)
    near, far = (pairs.gather(1, order(PAIRS)[..., None].expand(-1, -1, 2)) for _ in range(2))
    filler = torch.randint(FILLER, (n, GAP), generator=generator) + KEYS + VALUES
    ids = torch.cat([pairs.flatten(1), near.flatten(1), filler, far.flatten(1)], 1)
    kind = torch.zeros_like(ids)
    kind[:, 2 * PAIRS + 1:4 * PAIRS:2], kind[:, 1 - 2 * PAIRS::2] = 1, 2
    return ids, kind


def model_of(attention, seed: int) -> CausalLM:
    first = GQAConfig(n_heads=2, window=SlidingWindow(size=WINDOW))
    norm, ffn = RMSNormConfig(), SwiGLUConfig(d_ff=64)
    blocks = tuple(BlockConfig(attention=a, ffn=ffn, norm=norm) for a in (first, attention))
    torch.manual_seed(seed)
    return CausalLM(DecoderConfig(
        vocab_size=KEYS + VALUES + FILLER, d_model=D_MODEL, blocks=blocks, norm=norm,
        max_seq_len=4096, tie_embeddings=False, init_std=0.06))


@torch.no_grad()
def accuracy(model: CausalLM, which: int, seed: int = 10_000) -> float:
    ids, kind = sequences(512, torch.Generator().manual_seed(seed))
    hits = model.eval()(ids[:, :-1]).argmax(-1) == ids[:, 1:]
    return round(float(hits[kind[:, 1:] == which].float().mean()), 4)


def train(attention, kinds: tuple, seed: int, steps: int) -> tuple[float, float, float]:
    """(near, far, milliseconds a step)."""
    model, generator = model_of(attention, seed).train(), torch.Generator().manual_seed(seed)
    optimizer, start = torch.optim.Adam(model.parameters(), LR), time.perf_counter()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = LR * min(1, (step + 1) / WARMUP) * (1 - step / steps)
        ids, kind = sequences(BATCH, generator)
        counted = torch.stack([kind[:, 1:] == k for k in kinds]).any(0)
        loss = F.cross_entropy(model(ids[:, :-1])[counted], ids[:, 1:][counted])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    ms = 1e3 * (time.perf_counter() - start) / steps
    return accuracy(model, 1), accuracy(model, 2), ms


def measured(notes: dict) -> dict:
    """Rows that the file has, made with the same settings: {(layer, loss): row}."""
    path = ROOT / "bench" / "results" / f"{NAME}.json"
    held = json.loads(path.read_text()) if path.exists() else {"rows": []}
    same = all(held.get(key) == value for key, value in notes.items())
    return {(row["layer"], row["loss"]): row for row in held["rows"] if same}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", nargs="+", choices=layers(), default=list(layers()))
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=["near and far"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--dry", action="store_true", help="write no file")
    args = parser.parse_args()
    notes = dict(steps=args.steps, lr=LR, warmup=WARMUP,
                 batch=f"{BATCH} x 64 tokens", chance=1 / VALUES)
    for loss in args.losses:
        for name in args.layers:
            found = []
            for seed in range(args.seeds):
                found.append(train(layers()[name], LOSSES[loss], seed, args.steps))
                near, far, ms = zip(*found)
                row = {"layer": name, "loss": loss, "near": near, "far": far,
                       "step_ms": round(min(ms), 1),
                       "parameters": count_parameters(model_of(layers()[name], 0).config)}
                if not args.dry:
                    rows = measured(notes) | {(name, loss): row}
                    order = [(n, x) for x in LOSSES for n in layers() if (n, x) in rows]
                    write(NAME, [rows[key] for key in order], **notes)
            show(row)


if __name__ == "__main__":
    main()
