"""What a checkpoint costs a run: the pause of the training loop, and all of its extra time.

One model trains in this process, window after window of equal steps. In turns a window saves
nothing, saves once as `save_checkpoint` does (the loop waits), or saves once in the background
(`BackgroundSaver`: the loop waits for the copy only). `pause` is the time that the call takes.
`extra` is the window's wall-clock beyond the windows beside it that saved nothing: it also holds
what writing takes from the training thread. `share` is `extra` at one save a minute.

    python bench/checkpoints.py            # presets test and small, about 5 minutes
    python bench/checkpoints.py --quick    # preset test, two rounds, writes no file
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import record, show

from skylar.models.decoder import CausalLM
from skylar.models.presets import get_config
from skylar.training.async_checkpoint import BackgroundSaver
from skylar.training.checkpoint import save_checkpoint, write_checkpoint
from skylar.training.loss import NextTokenObjective
from skylar.training.optim import AdamWConfig, ScheduleConfig
from skylar.training.trainer import TrainConfig, TrainStep

TARGET = 0.02  # of the wall-clock, at one save a minute
PRESETS = {"test": (2, 128, 2.5), "small": (1, 64, 6.0)}  # batch, length, seconds a window


class Measurement:
    "The same number of steps, timed, with or without a save at its begin."

    def __init__(self, preset: str, folder: str):
        batch, length, seconds = PRESETS[preset]
        config = TrainConfig(steps=10**6, device="cpu")
        self.model = CausalLM(get_config(preset))
        self.step = TrainStep(NextTokenObjective(self.model), config, AdamWConfig(),
                              ScheduleConfig(kind="constant"))
        ids = torch.randint(0, self.model.config.vocab_size, (batch, length + 1))
        self.batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
        self.folder, self.number = folder, 0
        self.saver = BackgroundSaver(write_checkpoint)
        once = min(self.steps(1) for _ in range(4))
        self.size = max(3, round(seconds / once))
        self.seconds_per_step = once

    def steps(self, n: int) -> float:
        start = time.perf_counter()
        for _ in range(n):
            self.step(iter([self.batch]), 1)
        return time.perf_counter() - start

    def run(self, kind: str) -> dict:
        "`kind`: none, sync or async."
        start, cpu, self.number = time.perf_counter(), time.process_time(), self.number + 1
        if kind != "none":
            save_checkpoint(self.folder, self.number, self.model, self.step.optimizer,
                            saver=self.saver if kind == "async" else None)
        pause = time.perf_counter() - start
        n_done = 0
        while n_done < self.size:
            self.steps(1)
            n_done += 1
        in_time = self.saver.pending is None or self.saver.pending.done()
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        self.saver.wait()
        return {"pause": pause, "seconds": seconds, "cpu": cpu, "in_time": in_time}


def measure(preset: str, rounds: int) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        window = Measurement(preset, folder)
        window.run("sync"), window.run("async")  # files and buffers exist from here on
        found: dict[str, list] = {"sync": [], "async": []}
        for _ in range(rounds):
            before = window.run("none")
            for kind, have in found.items():
                row, after = window.run(kind), window.run("none")
                for key in ("seconds", "cpu"):
                    row[f"extra_{key}"] = row[key] - (before[key] + after[key]) / 2
                have.append(row)
                before = after
        newest = max(Path(folder).glob("step-*"))
        size = sum(p.stat().st_size for p in newest.rglob("*") if p.is_file())
    rows = []
    for kind, have in found.items():
        middle = {key: statistics.median(row[key] for row in have)
                  for key in ("pause", "extra_seconds", "extra_cpu")}
        rows.append({
            "preset": preset, "saving": kind, "megabytes": size / 1e6,
            "step_s": window.seconds_per_step, "pause_s": middle["pause"],
            "extra_s": middle["extra_seconds"], "extra_cpu_s": middle["extra_cpu"],
            "extra_s_each": [round(row["extra_seconds"], 3) for row in have],
            "pause_s_each": [round(row["pause"], 3) for row in have],
            "pause_share": middle["pause"] / 60, "share": middle["extra_seconds"] / 60,
            "target": TARGET, "written_within_the_window": all(r["in_time"] for r in have)})
        show({k: v for k, v in rows[-1].items() if not k.endswith("_each")})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.quick:
        measure("test", 2)
        return
    rows = [row for preset in PRESETS for row in measure(preset, args.rounds)]
    record("checkpoints", rows, target=f"share below {TARGET}",
           note="share: extra wall-clock of one save, at one save a minute")


if __name__ == "__main__":
    main()
