"""Predicted against measured peak memory of training steps that this machine can run.

    python bench/plan_memory.py          # all shapes; minutes
    python bench/plan_memory.py --dry    # the first shape, prints, writes no file

Predicted: the most bytes of tensors at one time in a simulated step (`skylar.training.planner`).
Measured: the resident high-water mark of a process that takes two real steps, above what it held
before it built the model; glibc returns freed memory (see `measure`). With several processes the
largest of them. `default_malloc` is the same with glibc's own thresholds, for two shapes. Linux
and CPU only. Writes bench/results/plan_memory.json.
"""

import argparse
from dataclasses import fields, replace
from unittest import mock

from common import record

from skylar.training import planner
from skylar.training.planner import measure, predict
from skylar.training.run import LoaderConfig, RunConfig, build_config


def shape(name: str, preset: str = "small", n: int = 1, B: int = 4, T: int = 256, **parts) -> tuple:
    """A run to predict and to measure, on `n` processes."""
    model = {"vocab_size": 8192, "n_layers": 4, **parts.pop("model", {})}
    train = {"dtype": "float32", **parts.pop("train", {})}
    settings = {"data": "-", "preset": preset, "model": model, "train": train, **parts}
    run = build_config(RunConfig, settings)
    return name, replace(run, loader=LoaderConfig(batch_size=B, seq_len=T)), n


SHAPES = [
    shape("base"),
    shape("wider", model={"d_model": 768, "d_ff": 2048}),
    shape("deeper", model={"n_layers": 12}),
    shape("longer", T=1024, B=1),
    shape("larger batch", B=12),
    shape("accumulation", train={"grad_accum_steps": 3}),
    shape("deeper, recomputed", model={"n_layers": 12}, parallel={"recompute": True}),
    shape("narrow, long batch", "test", B=32, model={"vocab_size": 1024}),
    shape("bf16 products", train={"dtype": "bfloat16"}),
    shape("fsdp x2", n=2, model={"vocab_size": 4096}),
    shape("fsdp x2, recomputed", n=2, B=8, model={"n_layers": 8},
          parallel={"recompute": True}),
    shape("ddp x2", n=2, model={"vocab_size": 4096}, parallel={"strategy": "ddp"}),
]
OPTIMIZER = type(next(f for f in fields(RunConfig) if f.name == "optimizer").default)
if "kind" in (f.name for f in fields(OPTIMIZER)):
    SHAPES.append(shape("muon", optimizer={"kind": "muon"}))


def row(name: str, run: RunConfig, n: int, unhelped: bool) -> dict:
    """Both numbers, in MB."""
    memory, = predict([(run, n)], gpu=False)
    peak = max(sum(kinds.values()) for kinds in memory["phases"].values())
    found = max(measure(run, n))
    both = {"shape": name, "processes": n, "predicted_mb": round(peak / 1e6, 1),
            "measured_mb": round(found / 1e6, 1), "ratio": round(peak / found, 3)}
    if unhelped:
        with mock.patch.object(planner, "_RETURN_MEMORY", {}):
            both["default_malloc_mb"] = round(max(measure(run, n)) / 1e6, 1)
    return both


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry", action="store_true", help="one shape, no file")
    dry = parser.parse_args().dry
    rows = []
    for name, run, n in SHAPES[:1] if dry else SHAPES:
        rows.append(row(name, run, n, name in ("base", "narrow, long batch")))
        print(rows[-1], flush=True)
    if not dry:
        print(record("plan_memory", rows, unit="MB of resident memory"))


if __name__ == "__main__":
    main()
