"""Faults: background saving, the best kept, kills, full disks, damage, restarts by torchrun."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from faults_worker import (
    DOCUMENTS,
    TOGETHER,
    Cut,
    Killed,
    Recorded,
    Workers,
    build,
    digest,
    stop_after,
)
from ranks import launch
from test_distributed import numbers, pretrain, pretrain_words

from skylar.cli import main
from skylar.training import checkpoint
from skylar.training.async_checkpoint import BackgroundSaver, copy_to_host
from skylar.training.checkpoint import (
    BestCheckpoints,
    find_checkpoint,
    load_state,
    load_weights,
    save_checkpoint,
    write_checkpoint,
)
from skylar.training.run import load_run
from skylar.training.trainer import TrainConfig, Trainer
from skylar.utils.processes import restart_count

HERE = Path(__file__).parent
WORKER = HERE / "faults_worker.py"

# --- the same hash ---


STEPS = 12
KINDS = {  # an epoch: 48 documents, in batches of 3: 16
    "plain": {},
    "three micro-batches": {"accumulate": 3},  # an epoch ends inside a step
    "background": {"async_save": True, "save_every": 1},
    "muon": {"muon": True, "async_save": True},
    "idle parameter": {"idle": True},
    "several workers": {"workers": True},
}
WHERE = {"mid-epoch": 3, "before the step in which the epoch ends": 5,
         "exact end of the epoch": 8, "second epoch": 10}


def make(out, workers=False, **options):
    trainer = build(out, STEPS, batch_size=3, **options)
    if workers:
        trainer.loader = Workers(trainer.loader.loader)
    return trainer


@pytest.fixture(scope="module")
def straight():
    """Hashes of the runs that nobody disturbed."""
    found = {}
    for kind, options in KINDS.items():
        trainer = make(None, **options)
        trainer.train()
        found[kind] = digest(trainer)
    assert found["plain"] == found["background"]
    assert len(set(found.values())) == len(found) - 2  # workers read what the loader reads
    return found


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("kind", KINDS)
def test_k_and_the_rest_give_the_hash_of_the_whole(straight, tmp_path, kind, where):
    first = make(tmp_path, **KINDS[kind])
    first.metrics.callbacks = (stop_after(WHERE[where]),)
    first.train()
    assert find_checkpoint(tmp_path).name == f"step-{WHERE[where]:06d}"
    assert digest(first) != straight[kind]
    second = make(tmp_path, **KINDS[kind])
    second.train(resume=True)
    assert digest(second) == straight[kind]


@pytest.mark.parametrize("batch", [7, 8, 9, 16, 17, 18, 25])
def test_cut_off_within_a_step_the_partial_accumulation_is_done_again(straight, tmp_path, batch):
    first = make(tmp_path, accumulate=3, save_every=1)
    class Ending(Recorded):
        def __iter__(self):
            for i, item in enumerate(super().__iter__(), 1):
                if i == batch:
                    raise Killed
                yield item
    first.loader = Ending(first.loader.loader)
    with pytest.raises(Killed):
        first.train()
    assert find_checkpoint(tmp_path).name == f"step-{(batch - 1) // 3:06d}"
    second = make(tmp_path, accumulate=3)
    second.train(resume=True)
    assert digest(second) == straight["three micro-batches"]


# --- all of it together: Muon, muP, packed sequences, dropout, worker processes, idle matrices ---

CUTS = {  # (micro-batches a step, of which so many are read when the run ends); 16 an epoch
    "mid-epoch": (2, 6), "mid-accumulation": (2, 7), "mid-accumulation of three": (3, 8),
    "exact end of the epoch": (2, 16), "end of the epoch inside a step": (3, 16),
    "second epoch": (2, 20), "second epoch, mid-accumulation": (2, 21)}


@pytest.fixture(scope="module")
def together():
    "Accumulation -> hash of the whole run."
    found = {}
    for accumulate in (2, 3):
        trainer = make(None, accumulate=accumulate, **TOGETHER)
        trainer.train()
        found[accumulate] = digest(trainer)
    return found


@pytest.mark.parametrize("where", CUTS)
def test_all_of_it_together_resumes_to_the_hash_of_the_whole(together, tmp_path, where):
    accumulate, batch = CUTS[where]
    first = make(tmp_path, accumulate=accumulate, save_every=1, **TOGETHER)
    first.loader = Cut(first.loader, batch)
    with pytest.raises(Killed):
        first.train()
    step = batch // accumulate
    assert find_checkpoint(tmp_path).name == f"step-{step:06d}"
    second = make(tmp_path, accumulate=accumulate, **TOGETHER)
    second.train(resume=True)
    assert second.loader.count == STEPS * accumulate
    assert digest(second) == together[accumulate]


def test_each_part_of_it_changes_the_hash(together):
    """Else it would not be tested by it."""
    for name in ("muon", "mup", "packed", "dropout"):
        trainer = make(None, **{**TOGETHER, name: 0.0 if name == "dropout" else False,
                                "workers": False})
        trainer.train()
        assert digest(trainer) != together[2], name
    trainer = make(None, **TOGETHER | {"workers": False})
    trainer.train()
    assert digest(trainer) == together[2]  # worker processes read what the loader reads
    objective, state = trainer.objective, trainer.train_step.optimizer.state
    kinds = {next(iter(values)) for values in state.values()}
    assert kinds == {"momentum_buffer", "step"}  # Muon's and AdamW's
    idle = [objective.idle.weight, objective.model.model.layers[0].idle.weight]
    assert all(p.requires_grad and p not in state for p in idle)
    batch = next(iter(trainer.loader))
    assert any(len(set(row.tolist())) > 1 for row in batch["document_ids"])


def test_an_idle_parameter_has_no_moments_and_stays_what_it_is(tmp_path):
    trainer = make(tmp_path, idle=True)
    before = trainer.objective.idle.weight.detach().clone()
    trainer.train()
    assert torch.equal(trainer.objective.idle.weight, before)
    assert trainer.objective.idle.weight not in trainer.train_step.optimizer.state


# --- in the background ---


def test_later_updates_do_not_leak_into_what_is_being_written(tmp_path):
    """The write of step 3 is held up until step 6 has been made."""
    trainer = build(tmp_path, 6, save_every=3, async_save=True)
    wait, at_step_3 = threading.Event(), {}

    def late(tensors, *args, group=None):
        if "step-000003" in str(args[0]):
            wait.wait(60)
        write_checkpoint(tensors, *args, group=group)

    def look(row):
        if row["step"] == 3:  # called before the save of this step
            at_step_3.update(hash=digest(trainer))
        if row["step"] == 6:
            assert not list((tmp_path / "checkpoints").glob("step-*"))
            assert digest(trainer) != at_step_3["hash"]
            wait.set()

    trainer.saver = trainer.checkpoints.saver
    trainer.saver.write, trainer.metrics.callbacks = late, (look,)
    trainer.train()
    plain = build(tmp_path / "plain", 6, save_every=3, keep_last=0)
    plain.train()
    states = []
    for out in (tmp_path, tmp_path / "plain"):
        folder = out / "checkpoints" / "step-000003"
        again = build(None, 6)
        checkpoint.load_checkpoint(folder, again.model, again.train_step.optimizer, again.loader,
                                   objective=again.objective)
        assert digest(again) == at_step_3["hash"]
        states.append(load_state(folder))
        states[-1]["extra"]["progress"].pop("seconds")
    assert states[0] == states[1]  # loader, random numbers and counters, too


def test_a_copy_is_no_view_and_its_memory_is_used_again():
    tensors = {"a": torch.arange(6.0).view(2, 3).t(), "b": torch.tensor(3)}
    buffers = {}
    copies = copy_to_host(tensors, buffers)
    tensors["a"].add_(1)
    assert copies["a"][0, 0] == 0 and copies["b"] == 3 and copies["a"].shape == (3, 2)
    again = copy_to_host(tensors, buffers)
    assert again["a"].data_ptr() == copies["a"].data_ptr() and torch.equal(again["a"], tensors["a"])
    grown = copy_to_host({"a": torch.ones(5)}, buffers)
    assert grown["a"].shape == (5,) and grown.keys() == {"a"}


def test_never_more_than_one_save_at_a_time():
    running, most, lock, seen = 0, 0, threading.Lock(), []

    def write(tensors, number, group=None):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        seen.append((number, tensors["x"].item()))
        with lock:
            running -= 1

    saver, x = BackgroundSaver(write), torch.zeros(())
    for i in range(5):
        saver.start({"x": x}, i)
        x += 1
    saver.wait()
    assert most == 1 and seen == [(i, float(i)) for i in range(5)]


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_failed_background_save_ends_the_run_after_a_step_in_one_line(tmp_path, monkeypatch):
    trainer = build(tmp_path, 500, save_every=2, async_save=True)
    monkeypatch.setattr(checkpoint, "write_named_tensors", full)
    with pytest.raises(OSError, match="step-000002: No space left on device; older ones are whole"):
        trainer.train()
    assert trainer.progress.step < 500  # it did not go on to the end
    monkeypatch.undo()
    again = build(tmp_path, 4, save_every=2, async_save=True)
    again.train(resume=True)  # nothing was saved, so it begins again
    assert find_checkpoint(tmp_path).name == "step-000004"


def test_a_failure_of_the_last_save_is_not_swallowed(tmp_path, monkeypatch):
    trainer = build(tmp_path, 4, async_save=True)
    monkeypatch.setattr(checkpoint, "write_manifest", full)
    with pytest.raises(OSError, match="No space left on device"):
        trainer.train()


def test_another_error_waits_for_the_save_and_is_the_one_that_is_raised(tmp_path, monkeypatch):
    trainer = build(tmp_path, 4, save_every=1, async_save=True)

    def write(*args, **kwargs):
        time.sleep(0.3)
        write_checkpoint(*args, **kwargs)

    def broken(row):
        if row["step"] == 2:
            raise RuntimeError("a callback is broken")

    trainer.checkpoints.saver.write, trainer.metrics.callbacks = write, (broken,)
    with pytest.raises(RuntimeError, match="a callback is broken"):
        trainer.train()
    assert find_checkpoint(tmp_path).name == "step-000001"
    assert not list((tmp_path / "checkpoints").glob(".tmp*"))


CHILD = """
import sys, time
sys.path.insert(0, {here!r})
from pathlib import Path
from faults_worker import build
import skylar.training.checkpoint as checkpoint
write = checkpoint.write_named_tensors
def slow(*args, **kwargs):
    end = time.monotonic() + 30
    while trainer.progress.step <= 50 and time.monotonic() < end:
        time.sleep(0.01)  # the run goes on while this save has not ended
    print("writing", flush=True)
    time.sleep(2)
    write(*args, **kwargs)
checkpoint.write_named_tensors = slow
trainer = build(Path(sys.argv[1]), 100_000, save_every=50, async_save=True)
trainer.train()
print(trainer.progress.step)
sys.exit(128 + trainer.interrupted)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_a_background_save_saves_that_step_within_30_s(tmp_path, number):
    child = subprocess.Popen([sys.executable, "-c", CHILD.format(here=str(HERE)), str(tmp_path)],
                             stdout=subprocess.PIPE, text=True,
                             env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert child.stdout.readline() == "writing\n"  # step 50
    child.send_signal(number)
    start = time.monotonic()
    assert child.wait(timeout=60) == 128 + number
    assert time.monotonic() - start < 30
    stopped_at = int(child.stdout.read().split()[-1])
    found = find_checkpoint(tmp_path)
    assert stopped_at > 50 and found.name == f"step-{stopped_at:06d}"
    load_weights(found, build(None, 4).model)


def test_killed_during_the_first_save_the_run_begins_again(tmp_path):
    """Metrics are ahead of the first save then; beyond the second one something is lost."""
    trainer = build(tmp_path, 20, save_every=4, async_save=True)
    trainer.metrics.callbacks = (stop_after(8),)
    trainer.train()
    shutil.rmtree(tmp_path / "checkpoints")
    build(tmp_path, 20, save_every=4, async_save=True).checkpoints.begin(True, False, print)
    trainer = build(tmp_path / "more", 20, save_every=4, async_save=True)
    trainer.metrics.callbacks = (stop_after(9),)
    trainer.train()
    shutil.rmtree(tmp_path / "more" / "checkpoints")
    with pytest.raises(ValueError, match="goes to step 9, but its checkpoints are gone"):
        build(tmp_path / "more", 20, save_every=4, async_save=True).train(resume=True)


# --- the best ---


def evaluated(out, losses, **options):
    """A run whose evaluations give `losses`, one after the other."""
    trainer = build(out, len(losses), log_every=1, eval_every=1, **options)
    trainer.evaluate = lambda: {"val_loss": losses[trainer.progress.step - 1],
                                "val_right": -losses[trainer.progress.step - 1]}
    return trainer


LOSSES = [5.0, 3.0, 4.0, 2.0, float("nan"), 2.5, 6.0, 7.0]


@pytest.fixture
def with_eval(monkeypatch):
    init = Trainer.__init__
    monkeypatch.setattr(Trainer, "__init__", lambda self, *args, **kw: init(
        self, *args, eval_loader=[{}], **kw))


@pytest.mark.parametrize("options", [{}, {"async_save": True},
                                     {"best_metric": "val_right", "best_mode": "max"}])
def test_the_best_are_kept_besides_the_newest(with_eval, tmp_path, options):
    trainer = evaluated(tmp_path, LOSSES, keep_best=2, keep_last=1, **options)
    trainer.train()
    names = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert names == {"latest", "best", "step-000004", "step-000006", "step-000008"}
    assert find_checkpoint(tmp_path / "checkpoints" / "best").name == "step-000004"
    assert find_checkpoint(tmp_path).name == "step-000008"


@pytest.mark.parametrize("at", [3, 4, 5, 7])
def test_a_resumed_run_keeps_what_the_whole_one_keeps(with_eval, tmp_path, at):
    first = evaluated(tmp_path, LOSSES, keep_best=2, keep_last=1, async_save=True)
    first.metrics.callbacks = (stop_after(at),)
    first.train()
    evaluated(tmp_path, LOSSES, keep_best=2, keep_last=1).train(resume=True)
    names = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert names == {"latest", "best", "step-000004", "step-000006", "step-000008"}


def test_without_keep_best_there_is_no_pointer(with_eval, tmp_path):
    evaluated(tmp_path, LOSSES, save_every=1).train()
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {
        "latest", "step-000007", "step-000008"}


def test_what_cannot_decide_the_best_is_refused(with_eval, tmp_path):
    with pytest.raises(ValueError, match="best_metric='val_acc' is not in the rows.*val_right"):
        evaluated(tmp_path, LOSSES, keep_best=1, best_metric="val_acc").train()
    with pytest.raises(ValueError, match="unknown best_mode 'low'"):
        TrainConfig(best_mode="low")
    with pytest.raises(ValueError, match="keep_best=-1"):
        TrainConfig(keep_best=-1)


def test_the_best_without_evaluation_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep_best=2: nothing is evaluated"):
        build(tmp_path, 4, keep_best=2)


def test_the_first_of_equals_is_best_and_nothing_that_is_not_finite():
    best = BestCheckpoints(2)
    rows = [(1, float("inf")), (2, 1.0), (3, 1.0), (4, 1.0), (5, float("nan"))]
    assert [best.add({"step": s, "val_loss": x}) for s, x in rows] == [0, 1, 1, 0, 0]
    again = BestCheckpoints(2)
    again.load_state_dict(json.loads(json.dumps(best.state_dict())))
    assert again.names == best.names == ["step-000002", "step-000003"]


def test_a_checkpoint_of_before_knows_no_best_and_resumes(with_eval, tmp_path, monkeypatch):
    first = evaluated(tmp_path, LOSSES)
    del first.checkpoints.parts["best"]
    first.metrics.callbacks = (stop_after(4),)
    first.train()
    assert "best" not in load_state(tmp_path)["extra"]
    evaluated(tmp_path, LOSSES, keep_best=1).train(resume=True)
    assert find_checkpoint(tmp_path / "checkpoints" / "best").name == "step-000006"


@pytest.mark.parametrize("content", [b"", b"../x", b"step-00\xff"])
def test_a_damaged_best_is_one_line(tmp_path, content):
    save_checkpoint(tmp_path, 1, torch.nn.Linear(2, 2), best=["step-000001"])
    (tmp_path / "best").write_bytes(content)
    with pytest.raises(ValueError, match="best is damaged: it holds no checkpoint's name"):
        find_checkpoint(tmp_path / "best")


# --- disks ---

LIMITED = """
import resource, signal, sys
sys.path.insert(0, {here!r})
from pathlib import Path
from faults_worker import build
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def limit(row):
    if row["step"] == 5:
        if trainer.checkpoints.saver:
            trainer.checkpoints.saver.wait()  # step 4 is whole before the limit comes
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
trainer = build(Path(sys.argv[1]), 5000, save_every=2, async_save={background})
trainer.metrics.callbacks = (limit,)
try:
    trainer.train()
except OSError as error:
    sys.exit(f"skylar: {{error}}")
"""


@pytest.mark.slow
@pytest.mark.parametrize("background", [False, True])
def test_a_file_that_cannot_grow_ends_the_run_and_the_older_checkpoint_resumes(
        tmp_path, background):
    code = LIMITED.format(here=str(HERE), background=background)
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], text=True,
                          capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 1 and done.stderr.strip().count("\n") == 0
    assert "step-000006: File too large; older ones are whole" in done.stderr
    assert find_checkpoint(tmp_path).name == "step-000004"
    assert not list((tmp_path / "checkpoints").glob(".tmp*"))
    build(tmp_path, 5000).checkpoints.begin(True, False, print)


@pytest.mark.slow
@pytest.mark.parametrize("background", ["false", "true"])
def test_a_disk_that_fills_up_during_the_run(tmp_path, background):
    """A real full disk, where mounting is allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", disk],
                      capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        code = (f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
                "import skylar.training.metrics as m, skylar.cli\n"
                "append = m.append_metrics\n"
                "def fill(path, row):\n"
                "    append(path, row)\n"
                "    if row.get('step') == 6:\n"
                "        latest = path.parent / 'checkpoints' / 'latest'\n"
                "        while not latest.exists() or 'step-000004' not in latest.read_text():\n"
                "            pass  # until the save of step 4 is whole\n"
                "        try:\n"
                "            with open(path.parent / 'of others', 'wb', buffering=0) as file:\n"
                "                while True:\n"
                "                    file.write(bytes(1 << 16))\n"
                "        except OSError:\n"
                "            pass\n"
                "m.append_metrics = fill\n"
                "sys.exit(skylar.cli.main(sys.argv[1:]))\n")
        words = pretrain_words(disk / "run", tmp_path)
        done = subprocess.run([sys.executable, "-c", code, *words, "--train.log_every", "1",
                               "--train.save_every", "4", "--train.async_save", background],
                              text=True, capture_output=True)
        assert done.returncode == 2, done.stderr
        last = done.stderr.splitlines()[-1]  # of the save, or of the next row of metrics
        assert "No space left on device" in last
        assert "older ones are whole" in last or background == "true"
        (disk / "run" / "of others").unlink()
        assert find_checkpoint(disk / "run").name == "step-000004"
        assert main([*words, "--train.log_every", "1", "--train.save_every", "4",
                     "--resume"]) == 0
    finally:
        subprocess.run(["umount", disk])


# --- kills and damages ---


@pytest.mark.slow
def test_a_sample_of_kills_and_damages(tmp_path):
    """`python bench/faults.py` does 100 and 1,000; its log is bench/results/faults.log."""
    bench = HERE.parent / "bench" / "faults.py"
    done = subprocess.run([sys.executable, bench, "--kills", "10", "--damages", "100", "--seed",
                           "7", "--folder", tmp_path], text=True, capture_output=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "faults.json").read_text())["summary"]
    assert summary["kills"] >= 10 and summary["resumed_the_same"] == summary["trials"]
    assert summary["damages"] == 100 and set(summary["damage_outcomes"]) <= {"named",
                                                                            "the same run"}


def test_the_committed_log_is_of_all_kills_and_damages():
    found = json.loads((HERE.parent / "bench/results/faults.json").read_text())["summary"]
    assert found["kills"] >= 100 and found["resumed_the_same"] == found["trials"]
    assert found["damages"] == 1000 and set(found["damage_outcomes"]) == {"named", "the same run"}
    writing = {"writing tensors", "hashing, sealing", "between rename and latest"}
    assert sum(n for phase, n in found["while"].items() if phase in writing) >= 10


@pytest.mark.slow
def test_two_processes_one_folder_the_second_is_refused(tmp_path):
    words = pretrain_words(tmp_path / "run", tmp_path)
    assert main(["data", "tokenize", str(tmp_path / "text.txt"), "--out", str(tmp_path / "data"),
                 "--vocab_size", "270"]) == 0
    command = [sys.executable, "-m", "skylar", *words, "--train.steps", "100000"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             env=os.environ | {"OMP_NUM_THREADS": "1"}) for _ in range(2)]
    while all(p.poll() is None for p in both):
        time.sleep(0.05)
    refused = next(p for p in both if p.returncode is not None)
    other = next(p for p in both if p is not refused)
    _, error = refused.communicate()
    assert refused.returncode == 2 and error.strip().count("\n") == 0
    assert "a run is going on there" in error or "already holds a run" in error
    rows = tmp_path / "run" / "metrics.jsonl"
    while other.poll() is None and not (rows.exists() and rows.stat().st_size):
        time.sleep(0.05)
    other.send_signal(signal.SIGTERM)
    assert other.wait(timeout=60) == 130
    steps = [row["step"] for row in numbers(tmp_path / "run")]
    assert steps and len(steps) == len(set(steps))


# --- several processes ---


@pytest.mark.slow
def test_no_document_is_lost_or_read_twice_on_1_2_3_and_1_processes(tmp_path):
    for stage, n in enumerate((1, 2, 3, 1)):
        os.environ["STAGE"] = str(stage)
        launch(n, WORKER, "resize", tmp_path)
    del os.environ["STAGE"]
    alone = build(tmp_path / "alone", 12, accumulate=1)
    alone.train()
    read = []
    for stage, n in enumerate((1, 2, 3, 1)):
        ranks = [json.loads((tmp_path / f"read-{stage}-{r}.json").read_text()) for r in range(n)]
        assert all(len(rank) == 3 for rank in ranks)  # three steps, one batch each
        read += [sum(parts, []) for parts in zip(*ranks)]
    assert read == alone.loader.read  # in the very order
    flat = sum(read, [])
    assert sorted(flat[:DOCUMENTS]) == list(range(DOCUMENTS))  # an epoch: no gap, no repeat
    assert len(set(flat[DOCUMENTS:])) == len(flat) - DOCUMENTS == 24
    for name, weight in torch.load(tmp_path / "weights.pt").items():
        one = dict(alone.model.named_parameters())[name]
        torch.testing.assert_close(weight, one.detach(), atol=2e-5, rtol=0)


@pytest.mark.slow
def test_all_of_it_together_on_two_ranks_resumes_to_the_hash_of_the_whole(tmp_path):
    """Ended in a step, at the exact end of an epoch (batch 8), and in a step of the second one."""
    hashes = []
    for out, batch in (("whole", 24), ("cut", 5), ("cut", 8), ("cut", 11), ("cut", 24)):
        launch(2, WORKER, "together", tmp_path / out, batch)
        hashes.append((tmp_path / out / "digest").read_text())
        assert find_checkpoint(tmp_path / out).name == f"step-{batch // 2:06d}"
    assert hashes[0] == hashes[-1] and len(set(hashes)) == 4


@pytest.mark.slow
def test_two_ranks_save_in_the_background_what_they_save_at_once(tmp_path):
    flags = ["--train.keep_best", "1", "--train.keep_last", "0"]
    for name, background in (("plain", "false"), ("background", "true")):
        pretrain(2, tmp_path / name, *flags, "--train.async_save", background)
    for step in ("step-000006", "step-000012"):
        one, two = (load_run(tmp_path / name / "checkpoints" / step)[0].state_dict()
                    for name in ("plain", "background"))
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert (tmp_path / "background/checkpoints/best").read_text() == "step-000012\n"
    load_run(tmp_path / "background" / "checkpoints" / "best")


@pytest.mark.slow
def test_one_of_two_ranks_is_killed_and_torchrun_brings_the_run_back(tmp_path):
    pretrain(2, tmp_path / "whole")
    done = pretrain(2, tmp_path / "killed", "--train.save_every", "3",
                    start=(WORKER, "elastic"), options=["--max-restarts=1"])
    resumed = re.search(r"resumed at step (\d+)", done.stdout)
    assert resumed and resumed[1] in ("3", "6")  # that of 6 may not have been finished
    whole, killed = numbers(tmp_path / "whole"), numbers(tmp_path / "killed")
    assert whole == killed
    one, two = (load_run(tmp_path / name)[0].state_dict() for name in ("whole", "killed"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_only_a_restart_by_torchrun_resumes_by_itself(tmp_path, monkeypatch):
    assert not restart_count()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert not restart_count()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert restart_count() == 2
