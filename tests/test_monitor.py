"""Watching a run: nothing changes in it, numbers are true, trackers and watchers never harm it."""

import contextlib
import importlib.util
import json
import math
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from skylar.cli import main
from skylar.models.decoder import CausalLM, flops_per_token
from skylar.models.presets import get_config
from skylar.training import trackers as tracking
from skylar.training.loss import NextTokenObjective
from skylar.training.monitor import (
    GroupNorms,
    Monitor,
    MonitorConfig,
    StepClock,
    TimedLoader,
    datasheet_flops,
    group_of,
    measured_peak,
    training_flops,
)
from skylar.training.muon import MuonConfig
from skylar.training.optim import AdamWConfig
from skylar.training.trackers import check_trackers
from skylar.training.trainer import TrainConfig, Trainer, cycle
from skylar.utils import devices
from skylar.utils.processes import Ranks
from skylar.utils.run_view import RowReader, read_run, symptoms

ROOT = Path(__file__).parents[1]
QUICK = MonitorConfig(measure_peak=False)
SIZES = dict(vocab_size=64, d_model=32, n_heads=4, n_kv_heads=2, d_head=8, d_ff=64, n_layers=2,
             dropout=0.0)
T = 16


class Batches:
    "Resumable: batch i is a function of i."

    def __init__(self, delay: float = 0.0):
        self.delay, self.i = delay, 0

    def __iter__(self):
        while True:
            time.sleep(self.delay)
            window = torch.randint(64, (2, T + 1), generator=torch.Generator().manual_seed(self.i))
            self.i += 1
            yield {"input_ids": window[:, :-1], "labels": window[:, 1:]}

    def state_dict(self):
        return {"i": self.i}

    def load_state_dict(self, state):
        self.i = state["i"]


def trainer_of(steps=4, loader=None, optimizer=None, family="qwen3", loss="plain", **options):
    torch.manual_seed(0)
    model = CausalLM(get_config("test", family=family, **SIZES))
    settings = {name: options.pop(name) for name in
                ("log_every", "grad_accum_steps", "save_every", "max_grad_norm", "eval_every")
                if name in options}
    config = TrainConfig(steps=steps, dtype="float32", device="cpu",
                         **{"log_every": 1} | settings)
    return Trainer(NextTokenObjective(model, loss), loader or Batches(), config, quiet=True,
                   optimizer=optimizer or AdamWConfig(lr=1e-3), **options)


def state_of(trainer):
    return {k: v.clone() for k, v in trainer.model.state_dict().items()}


class Reads(TorchDispatchMode):
    "Operations for which the host of a GPU waits."

    WAITS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default,
             torch.ops.aten.masked_select.default}

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        by_mask = operation is torch.ops.aten.index.Tensor and any(
            i is not None and i.dtype == torch.bool for i in args[1])
        if operation in self.WAITS or by_mask:
            self.found[str(operation)] += 1
        return operation(*args, **(kwargs or {}))


# the run itself


@pytest.mark.parametrize("optimizer", [AdamWConfig(lr=1e-3), MuonConfig()])
def test_a_watched_run_has_the_same_weights_to_the_last_bit(optimizer):
    plain = trainer_of(optimizer=optimizer)
    plain.train()
    watched = trainer_of(optimizer=optimizer)
    with Monitor(watched):  # with the ceiling, which must draw no random numbers
        rows = watched.train()
    for name, value in state_of(plain).items():
        assert torch.equal(value, state_of(watched)[name]), name
    assert [r["loss"] for r in plain.metrics.rows] == [r["loss"] for r in rows]


def test_measuring_the_ceiling_draws_no_random_numbers():
    before = torch.get_rng_state()
    assert measured_peak(torch.float32, torch.device("cpu")) > 1e6
    assert torch.equal(before, torch.get_rng_state())


def test_the_trainer_gets_back_what_it_had():
    trainer = trainer_of()
    loader, callbacks = trainer.loader, trainer.metrics.callbacks
    with Monitor(trainer, QUICK), contextlib.suppress(ZeroDivisionError):
        assert isinstance(trainer.loader, TimedLoader)
        raise ZeroDivisionError
    assert trainer.loader is loader and trainer.metrics.callbacks == callbacks
    rows = trainer.train()
    assert not any(name.startswith("grad_norm/") for name in rows[-1])


@pytest.mark.parametrize("optimizer", [AdamWConfig(), MuonConfig()])
def test_a_step_never_makes_the_host_wait(optimizer):
    trainer = trainer_of(optimizer=optimizer, grad_accum_steps=2)
    with Monitor(trainer, QUICK):
        batches = cycle(trainer.loader)
        trainer.train_step(batches, 0)  # the optimizer makes its state
        with Reads() as reads:
            output = trainer.train_step(batches, 1)
            trainer.metrics.add(output, 0.1)
        assert not reads.found
        with Reads() as reads:
            trainer.metrics.row(2)
        assert reads.found  # here it may, so the test can see it


# numbers


def test_utilization_is_the_formula_and_counts_all_micro_batches():
    trainer = trainer_of(grad_accum_steps=3, log_every=2)
    with Monitor(trainer, MonitorConfig(peak_flops=1e10, measure_peak=False)):
        row = trainer.train()[-1]
    tokens = 2 * 3 * 2 * T
    seconds = tokens / row["tokens_per_s"]  # every token has a target
    expected = tokens * flops_per_token(trainer.model.config, T) / seconds / 1e10
    assert row["mfu"] == pytest.approx(expected, rel=1e-6)


def test_recomputation_raises_hfu_and_not_the_flops_of_mfu():
    from skylar.training.distributed import ParallelConfig

    trainer = trainer_of(parallel=ParallelConfig(recompute=True))
    with Monitor(trainer, MonitorConfig(peak_flops=1e10, measure_peak=False)):
        row = trainer.train()[-1]
    config = trainer.model.config
    ratio = training_flops(config, T, recompute=True) / training_flops(config, T)
    assert row["hfu"] / row["mfu"] == pytest.approx(ratio) and 1.2 < ratio < 4 / 3


@pytest.mark.parametrize("family, tied", [("gpt2", True), ("llama3", False), ("qwen3", True)])
def test_group_norms_together_are_the_norm(family, tied):
    names = SIZES if family != "gpt2" else {
        k: v for k, v in SIZES.items() if k not in ("n_kv_heads", "d_head")}
    torch.manual_seed(0)
    model = CausalLM(get_config("test", family=family, **names, tie_embeddings=tied))
    groups = {group_of(name) for name, _ in model.named_parameters()}
    assert groups == {"embedding", "attention", "mlp", "norm"} | (set() if tied else {"head"})
    trainer = Trainer(NextTokenObjective(model), Batches(), TrainConfig(
        steps=3, log_every=1, dtype="float32", device="cpu", max_grad_norm=0.01), quiet=True)
    with Monitor(trainer, QUICK):
        rows = trainer.train()
    for row in rows:  # as before clipping
        parts = [v for name, v in row.items() if name.startswith("grad_norm/")]
        assert len(parts) == len(groups)
        assert math.sqrt(sum(v * v for v in parts)) == pytest.approx(row["grad_norm"], rel=1e-5)
        assert row["grad_norm"] > 0.01


def test_a_step_without_a_row_computes_no_group_norms():
    trainer = trainer_of(steps=7, log_every=3)
    looked = []
    with Monitor(trainer, QUICK) as monitor:
        due = monitor.norms.due
        monitor.norms.due = lambda: looked.append(due()) or looked[-1]
        rows = trainer.train()
    assert looked == [False, False, True, False, False, True, True]
    assert [row["step"] for row in rows] == [3, 6, 7]
    assert all("grad_norm/mlp" in row for row in rows)


def test_group_norms_of_a_step_that_is_not_finite_are_null():
    class Poisoned(Batches):
        def __iter__(self):
            for i, batch in enumerate(super().__iter__()):
                if i == 1:
                    trainer.model.lm_head.weight.register_hook(lambda grad: grad * math.nan)
                yield batch

    trainer = trainer_of(steps=2, loader=Poisoned())
    with Monitor(trainer, QUICK):
        first, second = trainer.train()
    assert first["grad_norm/mlp"] > 0 and first["skipped"] == 0
    assert second["skipped"] == 1 and second["grad_norm"] is None
    groups = {name: v for name, v in second.items() if name.startswith("grad_norm/")}
    assert groups and all(value is None for value in groups.values())
    json.dumps(second, allow_nan=False)


def test_an_optimizer_without_hooks_is_watched_without_group_norms():
    class Plain:
        def __init__(self, model):
            self.inner = torch.optim.SGD(model.parameters(), lr=0.1)
            self.param_groups, self.step = self.inner.param_groups, self.inner.step
            self.zero_grad, self.state = self.inner.zero_grad, self.inner.state

    class Config:
        build = Plain

    trainer = trainer_of(optimizer=Config())
    with Monitor(trainer, QUICK):
        rows = trainer.train()
    assert "data_wait" in rows[-1] and "grad_norm/mlp" not in rows[-1]


def test_a_model_of_others_is_watched_without_utilization():
    class Tiny(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = torch.nn.Linear(4, 1)

        def forward(self, batch):
            from skylar.training.objective import LossOutput

            loss = self.model(batch["x"]).square().sum()
            return LossOutput(loss, len(batch["x"]), {})

    trainer = Trainer(Tiny(), [{"x": torch.ones(2, 4)}], TrainConfig(
        steps=2, log_every=1, device="cpu", dtype="float32"), quiet=True)
    with Monitor(trainer, MonitorConfig(peak_flops=1e12, measure_peak=False)):
        row = trainer.train()[-1]
    assert "mfu" not in row and row["grad_norm/other"] == pytest.approx(row["grad_norm"])


def test_data_wait_sees_a_slow_loader_and_not_the_start():
    slow = trainer_of(loader=Batches(delay=0.3), steps=3)
    with Monitor(slow, QUICK):
        rows = slow.train()
    assert rows[0]["data_wait"] == 0 < 0.1 < rows[1]["data_wait"] <= 1  # the first only fills
    assert min(row["step_ms"] for row in rows[1:]) >= 300 * 0.5


def test_a_timed_loader_is_its_loader_in_all_else():
    loader = Batches()
    timed = TimedLoader(loader)
    assert timed.state_dict() == {"i": 0}
    next(iter(timed))
    timed.load_state_dict({"i": 7})
    assert loader.i == 7
    assert getattr(timed, "rank", 5) == 5 and not hasattr(timed, "world_size")
    assert list(TimedLoader([{"x": torch.ones(1)}])) == [{"x": torch.ones(1)}]


def test_memory_peaks_are_seen_and_forgotten():
    """In a process of its own: in one that has freed memory, 200 MB may be there already."""
    code = ("import torch; from skylar.utils.devices import peak_memory, reset_peak_memory\n"
            "cpu = torch.device('cpu'); reset_peak_memory(cpu); before = peak_memory(cpu)\n"
            "kept = torch.ones(50_000_000); assert peak_memory(cpu) > before + 150e6")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_clock_of_a_gpu_reads_events_only_at_rows(monkeypatch):
    made = []

    class Event:
        def __init__(self, enable_timing):
            self.at, self.waited = None, False
            made.append(self)

        def record(self):
            self.at = 10.0 * len(made)

        def synchronize(self):
            self.waited = True

        def elapsed_time(self, other):
            assert other.waited or made[-1].waited
            return other.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = StepClock(torch.device("cuda"))
    for _ in range(4):
        clock.add(0.001)  # the host was long ready
    assert not any(event.waited for event in made)
    assert clock.median_ms(0.04) == 10.0
    clock.add(0.001)
    assert clock.median_ms(0.01) == 10.0  # from the last event of the row before


@pytest.mark.parametrize("name, tflops", [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835),
    ("NVIDIA H200", 989), ("NVIDIA GH200 480GB", 989), ("NVIDIA B200", 2250),
    ("NVIDIA A100-SXM4-40GB", 312), ("NVIDIA A10", 125), ("NVIDIA A10G", None),
    ("NVIDIA L4", 121), ("NVIDIA L40S", 362), ("NVIDIA L40", None),
    ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA GeForce RTX 4090 D", None),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("Tesla V100-SXM2-16GB", None)])
def test_datasheet(name, tflops):
    assert datasheet_flops(name) == (None if tflops is None else tflops * 1e12)


def test_peak_flops_must_be_positive():
    with pytest.raises(ValueError, match="peak_flops=0: give a number above 0"):
        MonitorConfig(peak_flops=0)


# the Trainer's way to a GPU


def test_tf32_on_cuda_unless_float32_was_asked_for():
    before = torch.get_float32_matmul_precision()
    try:
        for where, dtype, expected in (("cpu", "auto", "highest"), ("cuda", "float32", "highest"),
                                       ("cuda", "auto", "high")):
            torch.set_float32_matmul_precision("highest")
            devices.allow_tf32(torch.device(where), dtype)
            assert torch.get_float32_matmul_precision() == expected
    finally:
        torch.set_float32_matmul_precision(before)


def test_batches_go_to_a_gpu_through_pinned_memory(monkeypatch):
    log = []
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: log.append("pin") or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, non_blocking=False:
                        log.append(non_blocking) or self)
    devices.to_device({"x": torch.ones(2)}, torch.device("cuda"))
    assert log == ["pin", True]
    log.clear()
    devices.to_device({"x": torch.ones(2)}, torch.device("cpu"))
    assert log == [True]


def test_counts_that_are_plain_numbers_are_made_on_the_device(monkeypatch):
    """`torch.as_tensor(3, device="cuda")` copies from the host and waits; `full` does not."""
    monkeypatch.setattr(torch, "as_tensor", None)
    monkeypatch.setattr(torch, "tensor", None)
    values = Ranks().sum([3, 2.5, torch.ones(())], torch.device("cpu"))
    assert [v.item() for v in values] == [3, 2.5, 1.0] and values[0].dtype == torch.int64


# trackers


def test_a_missing_tracker_is_one_line_before_any_work(monkeypatch, tmp_path, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name, *a: None if name == "wandb" else real(name, *a))
    with pytest.raises(ImportError, match=r'pip install "skylar\[wandb\]"'):
        check_trackers(["wandb"])
    monkeypatch.chdir(tmp_path)
    code = main(["pretrain", "--data", "none", "--out", "run", "--monitor.trackers", "[wandb]"])
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and "wandb is not installed" in error
    assert not list(tmp_path.iterdir())


def test_trackers_without_a_folder_are_refused(monkeypatch):
    monkeypatch.setattr("skylar.training.monitor.check_trackers", lambda names: None)
    with pytest.raises(ValueError, match="out_dir"):
        Monitor(trainer_of(), MonitorConfig(trackers=("tensorboard",)))


@pytest.mark.parametrize("when", ["open", "log", "close"])
def test_a_failing_tracker_never_stops_a_run(monkeypatch, tmp_path, when, capsys):
    class Broken:
        def __init__(self, **how):
            self.fail("open")

        def log(self, numbers, step):
            self.fail("log")

        def close(self):
            self.fail("close")

        def fail(self, now):
            if now == when:
                raise ConnectionError("no route to host")

    monkeypatch.setitem(tracking.OPEN, "tensorboard", Broken)
    monkeypatch.setitem(tracking.PACKAGES, "tensorboard", "json")
    trainer = trainer_of(out_dir=tmp_path / "run")
    with Monitor(trainer, MonitorConfig(trackers=("tensorboard",), measure_peak=False)):
        rows = trainer.train()
    assert len(rows) == 4
    assert capsys.readouterr().err.count("tracker tensorboard failed") == 1


def watched_in_two_parts(folder, names):
    "Four steps, of which the third is made twice, as after a crash before it was saved."
    for stop in (3, None):
        callbacks = [] if stop is None else [lambda row: row["step"] == stop]  # noqa: B023
        trainer = trainer_of(out_dir=folder, save_every=2, callbacks=callbacks)
        with Monitor(trainer, MonitorConfig(trackers=names, measure_peak=False, project="test"),
                     settings={"lr": 1e-3}):
            trainer.train(resume=stop is None)
        if stop == 3:
            shutil.rmtree(folder / "checkpoints/step-000003")
            (folder / "checkpoints/latest").write_text("step-000002")
    return trainer.metrics.rows


def test_tensorboard_has_every_row_once_after_a_resumption(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = watched_in_two_parts(tmp_path / "run", ("tensorboard",))
    events = EventAccumulator(str(tmp_path / "run/tracking/tensorboard")).Reload()
    for name in ("loss", "grad_norm/mlp", "data_wait"):
        found = [(e.step, e.value) for e in events.Scalars(name)]
        assert [step for step, _ in found] == [1, 2, 3, 4]
        assert found == [(r["step"], pytest.approx(r[name], rel=1e-6)) for r in rows]


def records_of(path):
    "The records of a .wandb file: LevelDB's log format behind a header of seven bytes."
    content, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # the rest of a block that holds no header
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(content[at + 4:at + 6], "little"), content[at + 6]
        record += content[at + 7:at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


@pytest.mark.slow
def test_wandb_offline_goes_on_in_the_same_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    for name, value in dict(WANDB_MODE="offline", WANDB_SILENT="true", WANDB_CONSOLE="off").items():
        monkeypatch.setenv(name, value)
    watched_in_two_parts(tmp_path / "run", ("wandb",))
    files = sorted((tmp_path / "run/tracking/wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2 and len({file.name for file in files}) == 1  # one id
    steps, end = set(), time.monotonic() + 60
    while steps != {1, 2, 3, 4} and time.monotonic() < end:  # W&B's service writes behind us
        time.sleep(0.2)
        for data in (data for file in files for data in records_of(file)):
            record = Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = {"/".join(i.nested_key) or i.key: i.value_json
                         for i in record.history.item}
                assert float(items["loss"]) > 0
                steps.add(record.history.step.num)
    assert steps == {1, 2, 3, 4}


@pytest.mark.slow
def test_trackio_goes_on_in_the_same_run(tmp_path):
    """In a process of its own: trackio reads TRACKIO_DIR when it is imported."""
    pytest.importorskip("trackio")
    code = ("import sys; sys.path.insert(0, 'tests')\n"
            "from pathlib import Path; import test_monitor as t\n"
            f"t.watched_in_two_parts(Path({str(tmp_path / 'run')!r}), ('trackio',))\n"
            "from trackio.sqlite_storage import SQLiteStorage as S\n"
            "runs = S.get_runs('test'); assert len(runs) == 1, runs\n"
            "steps = [log['step'] for log in S.get_logs('test', runs[0])]\n"
            "assert steps == [1, 2, 3, 4], steps\n")
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


# reading a run from outside


def rows_of(n, **more):
    return [{"step": i, "loss": 3.0, "seconds": 2.0 * i, **more} for i in range(1, n + 1)]


def write(folder, rows, steps=100):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(f"train: {{steps: {steps}, minutes: null}}\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_reader_reads_only_what_is_new(tmp_path, monkeypatch):
    folder = write(tmp_path, rows_of(1000))
    reader = RowReader(folder / "metrics.jsonl")
    assert len(reader.read()) == 1000
    size = (folder / "metrics.jsonl").stat().st_size
    assert reader.offset == size
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 1001}\n{"step": 10')
    assert len(reader.read()) == 1001 and reader.read()[-1] == {"step": 1001}
    write(folder, rows_of(3))
    assert len(reader.read()) == 3


def test_a_resumed_runs_file_is_read_from_the_start(tmp_path):
    """`cut_metrics` puts another file in its place, which may have grown beyond the old one."""
    folder = write(tmp_path, rows_of(4))
    reader = RowReader(folder / "metrics.jsonl")
    reader.read()
    other = write(tmp_path / "other", rows_of(2) + rows_of(40)[2:])
    os.replace(other / "metrics.jsonl", folder / "metrics.jsonl")
    assert [row["step"] for row in reader.read()] == list(range(1, 41))


def test_a_stalled_run_is_told_from_a_slow_and_a_finished_one(tmp_path):
    folder = write(tmp_path, rows_of(20))
    for age, silent in ((5, False), (50, False), (70, True)):
        os.utime(folder / "metrics.jsonl", (time.time() - age,) * 2)
        assert read_run(folder).silent is silent
    assert "stalled or stopped: no row for 70 s" in read_run(folder).warnings[0]
    slow = write(tmp_path / "slow", [row | {"seconds": 50.0 * row["step"]} for row in rows_of(20)])
    os.utime(slow / "metrics.jsonl", (time.time() - 200,) * 2)
    assert not read_run(slow).silent  # a row every 50 s: 200 s are usual
    assert read_run(slow).seconds_left == pytest.approx(80 * 50)


def test_damaged_values_are_left_out(tmp_path):
    odd = [{"step": 1, "loss": "high"}, {"step": 2, "loss": True}, {"step": 3, "loss": [1]},
           {"step": 4, "loss": 1e400}, {"step": 5, "seconds": "x", "peak_memory": {}}]
    folder = write(tmp_path, odd * 8)
    view = read_run(folder)
    assert view.seconds_left is None and view.interval is None and symptoms(view.rows) == []


def test_watch_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")
    folder = write(tmp_path / "run", rows_of(25, data_wait=0.5, mfu=0.31, peak_memory=3e9))
    assert main(["watch", str(folder), "--once"]) == 0
    text = capsys.readouterr().out
    for part in ("step 25 of 100 (25%)", "2:30 left", "31.0%", "3.00 GB", "none yet",
                 "data wait: 50%"):
        assert part in text, part


@pytest.mark.parametrize("content", [b"", b"\x00" * 300, b'{"step": 1, "lo', b"[1]\n{}\n\xff\n"])
def test_watch_an_empty_or_damaged_run(tmp_path, capsys, content):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    (tmp_path / "config.yaml").write_bytes(content)
    assert main(["watch", str(tmp_path), "--once"]) == 0
    assert "no row of metrics yet" in capsys.readouterr().out


def test_watch_of_nothing_is_one_line(tmp_path, capsys):
    assert main(["watch", str(tmp_path / "none"), "--once"]) == 2
    assert capsys.readouterr().err.startswith("skylar: error: no run folder")
    assert main(["watch", str(tmp_path), "--every", "0"]) == 2


def test_watch_a_real_run_that_is_finished(tmp_path, capsys):
    trainer = trainer_of(steps=6, out_dir=tmp_path / "run")  # no config.yaml: made in Python
    with Monitor(trainer, QUICK):
        trainer.train()
    view = read_run(tmp_path / "run")
    assert view.finished and (view.steps, view.step, view.checkpoint) == (6, 6, "step-000006")
    assert main(["watch", str(tmp_path / "run")]) == 0
    assert "step 6 of 6 (100%), finished" in capsys.readouterr().out


def in_terminal(words):
    "A process whose terminal we read: (process, file descriptor)."
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, *words], stdin=theirs, stdout=theirs,
                               stderr=theirs, close_fds=True, start_new_session=True,
                               env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "90",
                                                 "LINES": "40", "TERM": "xterm"})
    os.close(theirs)
    return process, ours


def read_until(descriptor, text, seconds=60):
    seen, end = "", time.monotonic() + seconds
    while text not in seen and time.monotonic() < end:
        if select.select([descriptor], [], [], 0.2)[0]:
            try:
                seen += os.read(descriptor, 65536).decode(errors="replace")
            except OSError:  # the process has ended
                break
    assert text in seen, seen[-2000:]


def test_watch_follows_a_run_that_is_written_and_ends_by_ctrl_c(tmp_path):
    folder = write(tmp_path, rows_of(5))
    process, terminal = in_terminal(["-m", "skylar", "watch", str(folder), "--every", "0.2"])
    try:
        read_until(terminal, "step 5 of 100")
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": 42, "loss": 2.0, "seconds": 84.0}) + "\n")
        read_until(terminal, "step 42 of 100")
        os.killpg(process.pid, signal.SIGINT)
        read_until(terminal, "")
        assert process.wait(20) == 0
        rest = b""
        with contextlib.suppress(OSError):
            while chunk := os.read(terminal, 65536):
                rest += chunk
        assert b"Traceback" not in rest
    finally:
        process.kill()
        os.close(terminal)


def test_watching_needs_no_torch(tmp_path):
    folder = write(tmp_path, rows_of(5))
    code = ("import sys; from skylar.cli import main; "
            f"assert main(['watch', {str(folder)!r}, '--once']) == 0; "
            "assert 'torch' not in sys.modules and 'numpy' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True,
                   env=os.environ | {"PYTHONPATH": str(ROOT)})


# several processes


WORKER = """
import json, sys, time, torch
sys.path.insert(0, "tests")
from test_monitor import Batches, MonitorConfig, Monitor, SIZES, T
from skylar.models.decoder import CausalLM
from skylar.models.presets import get_config
from skylar.training.distributed import ParallelConfig
from skylar.training.loss import NextTokenObjective
from skylar.training.trainer import TrainConfig, Trainer
from skylar.utils.processes import join_processes, leave_processes, rank_and_size

join_processes(torch.device("cpu"))
rank, size = rank_and_size()
torch.manual_seed(0)
trainer = Trainer(NextTokenObjective(CausalLM(get_config("test", family="qwen3", **SIZES))),
                  Batches(delay=0.4 * rank), TrainConfig(steps=3, log_every=1, dtype="float32",
                  device="cpu"), quiet=True, parallel=ParallelConfig(strategy=sys.argv[2]))
with Monitor(trainer, MonitorConfig(peak_flops=1e10, measure_peak=False)):
    rows = trainer.train()
if rank == 0:
    json.dump(rows, open(sys.argv[1], "w"))
del trainer
leave_processes()
"""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_sum_flops_and_report_the_slowest(tmp_path, strategy):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    out = tmp_path / "rows.json"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
         "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(script), str(out),
         strategy], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    for row in json.loads(out.read_text())[1:]:
        assert row["data_wait"] > 0.1  # of the other rank: this one does not wait for batches
        assert row["step_ms"] > 195  # at least the median of 0 and what the other rank slept
        parts = [v for name, v in row.items() if name.startswith("grad_norm/")]
        assert math.sqrt(sum(v * v for v in parts)) == pytest.approx(row["grad_norm"], rel=1e-4)
        config = get_config("test", family="qwen3", **SIZES)
        flops = 2 * 2 * T * flops_per_token(config, T)  # both ranks' rows
        seconds = 2 * 2 * T / row["tokens_per_s"]
        assert row["mfu"] == pytest.approx(flops / seconds / 2e10, rel=0.1)


def test_group_norms_hook_is_removed():
    trainer = trainer_of()
    norms = GroupNorms(trainer.objective, trainer.train_step.optimizer, lambda: True)
    norms.handle.remove()
    trainer.train()
    assert norms.squares is None
