"""Tokens per second and memory of a training step, alone and shared by two processes.

Two processes of one thread each, joined by gloo, stay alive for a whole row. In turns they take
steps in each of these ways, all with the Trainer's own `TrainStep` on batches of `batch` sequences
*a process*:

    alone       process 0 trains on one batch, process 1 waits: one process, one thread
    beside      both train a model of their own and exchange nothing: what the machine itself loses
                when both of its cores work (shared memory, caches, clock)
    ddp, fsdp   both share one run and twice the batch (`ParallelConfig`)

`ratio` is seconds(ddp or fsdp, twice the batch on two processes) / seconds(alone, one batch on
one process): 1.0 means that sharing is free. `ratio_beside` compares with two runs that exchange
nothing, `cpu_ratio` compares CPU time with that of `alone`. Ratios are medians over paired
rounds. Memory is the growth of a process's peak resident set over training steps, measured in
fresh processes; `state_mb` is what weights, gradients and moments need on paper.

    python bench/scaling.py            # about 6 minutes; writes bench/results/scaling.json
    python bench/scaling.py --quick    # two rows, three rounds, writes no file; about 1 minute
    python bench/scaling.py --profile  # where an fsdp step of the middle row spends its time
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from common import record, show
from torch.profiler import ProfilerActivity, profile

from skylar.models.decoder import CausalLM, count_parameters
from skylar.models.presets import get_config
from skylar.training.distributed import ParallelConfig
from skylar.training.loss import NextTokenObjective
from skylar.training.optim import AdamWConfig, ScheduleConfig
from skylar.training.trainer import TrainConfig, TrainStep
from skylar.utils.processes import SingleProcess, barrier, join_processes, leave_processes

TARGET = 1.25  # fsdp on two processes against the same work of each, alone
VOCABULARY = 4096
BASE = {"d_model": 256, "n_layers": 6, "seq_len": 256, "batch": 4}
CASES = [BASE, *(BASE | change for change in (
    {"d_model": 128}, {"d_model": 512}, {"n_layers": 3}, {"n_layers": 12},
    {"seq_len": 128, "batch": 8}, {"seq_len": 1024, "batch": 1}))]
TINY = {"d_model": 128, "n_layers": 1, "seq_len": 8, "batch": 1}
WAYS = ("alone", "beside", "ddp", "fsdp")
CPU = torch.device("cpu")


class Alone:
    """What a `ParallelConfig` would be for a process that shares nothing."""

    def apply(self, objective, device, seed):
        return SingleProcess(objective, device, seed)


def config_of(case: dict):
    width = case["d_model"]
    return get_config("test", d_model=width, d_head=64, n_heads=width // 64,
                      n_kv_heads=width // 128, d_ff=3 * width, n_layers=case["n_layers"],
                      vocab_size=VOCABULARY, dropout=0.0)


def step_of(case: dict, way: str, dtype: str):
    """A function that takes one training step in this process."""
    with torch.device("meta"):  # as a run does: no process ever holds more than its part
        objective = NextTokenObjective(CausalLM(config_of(case)).train())
    parallel = ParallelConfig(strategy=way) if way in ("ddp", "fsdp") else Alone()
    config = TrainConfig(steps=10_000, device="cpu", dtype=dtype)
    step = TrainStep(objective, config, AdamWConfig(),
                     ScheduleConfig(kind="constant", warmup_steps=0), parallel)
    ids = torch.randint(VOCABULARY, (case["batch"], case["seq_len"] + 1))
    batches = itertools.repeat({"input_ids": ids[:, :-1], "labels": ids[:, 1:]})
    return lambda: step(batches, 0)


def peak_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def seconds_of(step, way: str, steps: int) -> tuple[float, float]:
    """A step's mean over `steps`, wall clock and CPU; the slower process counts."""
    barrier()
    start = time.perf_counter(), time.process_time()
    for _ in range(steps if way != "alone" or dist.get_rank() == 0 else 0):
        step()
    end = time.perf_counter(), time.process_time()
    took = torch.tensor([(b - a) / steps for a, b in zip(start, end)], dtype=torch.float64)
    dist.all_reduce(took, op=dist.ReduceOp.MAX)
    return tuple(took.tolist())


def time_worker(case: dict, rounds: int, limit: float, dtype: str) -> dict:
    """Rounds of all ways in turn, the order reversed every other round.

    As many of `rounds` as fit into `limit` seconds, at least three."""
    steps = {way: step_of(case, way, dtype) for way in WAYS}
    warm = {}
    for way, step in steps.items():
        seconds_of(step, way, 2)
        warm[way], _ = seconds_of(step, way, 2)
    n = max(1, round(0.3 / max(warm.values())))
    found: dict = {way: [] for way in WAYS}
    a_round = n * sum(warm.values())  # the same on both ranks: times are those of the slower one
    for i in range(max(3, min(rounds, int(limit / a_round)))):
        for way in WAYS if i % 2 == 0 else WAYS[::-1]:
            found[way].append(seconds_of(steps[way], way, n))
    return found


def memory_worker(case: dict, way: str, dtype: str) -> list[float]:
    """How far each process's peak memory grows over three steps, in MB."""
    step_of(TINY, way, dtype)()  # what PyTorch itself loads for a first step
    before = peak_mb()
    step = step_of(case, way, dtype)
    for _ in range(3):
        if way != "alone" or dist.get_rank() == 0:
            step()
    grown = [None] * dist.get_world_size()
    dist.all_gather_object(grown, peak_mb() - before)
    return grown


def profile_worker(case: dict, dtype: str) -> None:
    for way in ("alone", "ddp", "fsdp"):
        step = step_of(case, way, dtype)
        seconds_of(step, "", 2)
        took, _ = seconds_of(step, "", 5)
        with profile(activities=[ProfilerActivity.CPU]) as watched:
            seconds_of(step, "", 3)
        if dist.get_rank() == 0:
            print(f"{way}: {1e3 * took:.0f} ms a step; under the profiler")
            for event in sorted(watched.key_averages(), key=lambda e: -e.self_cpu_time_total)[:14]:
                print(f"  {event.key[:60]:60} {event.self_cpu_time_total / 3e3:8.1f} ms "
                      f"{event.count / 3:7.0f} calls")


def two_processes(task: str, *args):
    """Run this file's `task` in two processes; what rank 0 wrote."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.json")
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
                   "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", __file__, "--worker",
                   json.dumps([str(out), task, *args])]
        env = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        subprocess.run(command, check=True, env=env)
        return json.loads(out.read_text())


def work(out: str, task: str, *args) -> None:
    torch.set_num_threads(1)
    join_processes(CPU)
    found = globals()[task](*args)
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(found))
    leave_processes()


def ratio(times: dict, way: str, base: str, clock: int = 0) -> dict:
    """Median and quartiles of paired rounds, of the wall clock (0) or of CPU time (1)."""
    ratios = [a[clock] / b[clock] for a, b in zip(times[way], times[base], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    return {"median": round(quartiles[1], 3), "quartiles": [round(q, 3) for q in quartiles]}


def measure(case: dict, rounds: int, limit: float, dtype: str) -> list[dict]:
    """A row for each way of one model."""
    times = two_processes("time_worker", case, rounds, limit, dtype)
    tokens, size = case["batch"] * case["seq_len"], count_parameters(config_of(case))
    rows = []
    for way in WAYS:
        seconds = statistics.median(wall for wall, _ in times[way])
        row = {**case, "parameters": size, "way": way, "ranks": 1 if way == "alone" else 2,
               "seconds": round(seconds, 4),
               "tokens_per_s": round(tokens * (1 if way == "alone" else 2) / seconds)}
        if way != "beside":
            row["peak_mb"] = round(max(two_processes("memory_worker", case, way, dtype)), 1)
            row["state_mb"] = round(16 * size / 2**20 / (2 if way == "fsdp" else 1), 1)
        if way != "alone":
            row["ratio"] = ratio(times, way, "alone")
            row["cpu_ratio"] = ratio(times, way, "alone", clock=1)["median"]
        if way in ("ddp", "fsdp"):
            row["ratio_beside"] = ratio(times, way, "beside")
        show(row)
        rows.append(row)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="at most, of each model")
    parser.add_argument("--limit", type=float, default=25, help="seconds of rounds a model")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16, auto")
    parser.add_argument("--models", type=int, default=len(CASES), help="only the first so many")
    parser.add_argument("--quick", action="store_true", help="two rows, three rounds, no file")
    parser.add_argument("--dry", action="store_true", help="print the rows, write no file")
    parser.add_argument("--profile", action="store_true", help="where the time of a step goes")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(*json.loads(args.worker))
    if args.profile:
        return two_processes("profile_worker", BASE, args.dtype)
    cases, rounds = (CASES[:2], 3) if args.quick else (CASES[:args.models], args.rounds)
    start = time.perf_counter()
    rows = [row for case in cases for row in measure(case, rounds, args.limit, args.dtype)]
    worst = max((r for r in rows if r["way"] == "fsdp"), key=lambda r: r["ratio"]["median"])
    summary = {"worst_fsdp_ratio": worst["ratio"]["median"], "target": TARGET,
               "met": worst["ratio"]["median"] <= TARGET,
               "at": {name: worst[name] for name in BASE}}
    print(summary, f"{time.perf_counter() - start:.0f} s")
    if not (args.quick or args.dry):
        record("scaling", rows, summary=summary, vocabulary=VOCABULARY, dtype=args.dtype,
               backend="gloo, two processes of one machine, one thread each")


if __name__ == "__main__":
    main()
