"""How fast the loader hands out batches, against what training the `test` preset consumes.

    python bench/loader.py

Same process, in turns, medians; both at the same window length and tokens per step.
Target: the loader gives at least 100 times the tokens per second that training takes."""

import argparse
import statistics
import tempfile
import time

import torch
from common import record

from skylar.data.loader import PackedLoader
from skylar.data.shards import ShardDataset, write_shards
from skylar.data.sources import documents
from skylar.data.tokenizer import BPETokenizer
from skylar.models.decoder import CausalLM
from skylar.models.presets import get_config
from skylar.training.loss import NextTokenObjective
from skylar.training.optim import AdamWConfig, ScheduleConfig
from skylar.training.trainer import TrainConfig, TrainStep

TOKENS = 2048  # per batch


def loader_rate(loader: PackedLoader, batches: int) -> float:
    """Tokens per second of `batches` batches, the first one not counted."""
    it = iter(loader)
    next(it)
    start = time.perf_counter()
    for _ in range(batches):
        next(it)
    took = time.perf_counter() - start
    it.close()
    return batches * loader.batch_size * loader.seq_len / took


def training_step(vocab_size: int):
    """One step of the Trainer on the `test` preset, as a function of a batch."""
    torch.manual_seed(0)
    model = CausalLM(get_config("test", vocab_size=vocab_size))
    train_step = TrainStep(NextTokenObjective(model), TrainConfig(device="cpu"),
                           AdamWConfig(lr=1e-3), ScheduleConfig())
    return lambda batch: train_step(iter([batch]), 0)


def training_rate(step, batch, steps: int = 1) -> float:
    """Tokens per second of training steps."""
    start = time.perf_counter()
    for _ in range(steps):
        step(batch)
    return steps * batch["input_ids"].numel() / (time.perf_counter() - start)


def measure(dataset: ShardDataset, seq_len: int, prefetch: int, step, runs: int,
            batches: int) -> dict:
    """One row: medians of both rates, taken in turns."""
    loader = PackedLoader(dataset, batch_size=TOKENS // seq_len, seq_len=seq_len,
                          prefetch=prefetch)
    batch = next(iter(loader))
    training_rate(step, batch, 1)
    pairs = [(loader_rate(loader, batches), training_rate(step, batch)) for _ in range(runs)]
    ours, training = (statistics.median(side) for side in zip(*pairs))
    return {"seq_len": seq_len, "prefetch": prefetch, "loader_tokens_per_s": round(ours),
            "training_tokens_per_s": round(training), "ratio": round(ours / training)}


def main(runs: int, batches: int, dry: bool) -> None:
    texts = list(documents("shakespeare"))
    tokenizer = BPETokenizer.train(texts, 8192)
    step = training_step(tokenizer.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        write_shards(texts, tokenizer, folder, progress=False)
        dataset = ShardDataset(folder)
        rows = [measure(dataset, T, p, step, runs, batches) for T in (128, 512) for p in (0, 2)]
    if dry:
        return print(*rows, sep="\n")
    record("loader", rows, target="ratio >= 100", runs=runs, model="test preset, eager, "
           f"vocabulary {tokenizer.vocab_size}", tokens_per_batch=TOKENS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--batches", type=int, default=200, help="of each run")
    parser.add_argument("--dry", action="store_true", help="print the rows, write no file")
    args = parser.parse_args()
    main(args.runs, args.batches, args.dry)
