"""Killed runs that go on as if nothing had happened; checkpoints that are not what they seem."""

import errno
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from skylar.training import checkpoint
from skylar.training.checkpoint import (
    SafeReader,
    find_checkpoint,
    load_checkpoint,
    load_metadata,
    load_weights,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from skylar.training.metrics import read_metrics
from skylar.training.objective import LossOutput
from skylar.training.trainer import TrainConfig, Trainer
from skylar.utils.files import write_manifest

EPOCH = 7  # batches; no multiple of the accumulation, so that steps straddle its end


class Loader:
    """Shuffled epochs of EPOCH batches; knows how many it has handed out."""

    def __init__(self, hook=lambda count: None):
        self.count, self.hook = 0, hook

    def __iter__(self):
        while True:
            epoch, i = divmod(self.count, EPOCH)
            order = torch.randperm(EPOCH, generator=torch.Generator().manual_seed(epoch))
            g = torch.Generator().manual_seed(int(order[i]))
            window = torch.randint(11, (3, 6), generator=g)
            self.count += 1
            self.hook(self.count)
            yield {"input_ids": window[:, :-1], "labels": window[:, 1:]}

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


class Tiny(nn.Module):
    """Tied like a GPT, with dropout so that random numbers matter."""

    def __init__(self, width=8):
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(11, width)
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, 11, bias=False)
        self.lm_head.weight = self.embed_tokens.weight

    def forward(self, ids):
        return self.lm_head(self.norm(F.dropout(self.embed_tokens(ids), 0.2, self.training)))


class Noisy(nn.Module):
    """The next token, with noise from the two generators that are not torch's."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        logits = self.model(batch["input_ids"])
        loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
        noise = random.random() + np.random.rand()
        return LossOutput(loss * (1 + 0.01 * noise), batch["labels"].numel(), {})


def build(out, hook=lambda count: None, model=None, **changes):
    config = TrainConfig(**{"steps": 20, "grad_accum_steps": 2, "save_every": 3, "log_every": 2,
                            "eval_every": 5, "eval_batches": 2, "dtype": "float32",
                            "device": "cpu", **changes})
    return Trainer(Noisy(model or Tiny()), Loader(hook), config, out_dir=out,
                   eval_loader=Loader(), metadata={"model": {"width": 8}}, quiet=True)


def same_rows(one, two):
    drop = ("tokens_per_s",)
    return [{k: v for k, v in r.items() if k not in drop} for r in one] == [
        {k: v for k, v in r.items() if k not in drop} for r in two]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The run that nobody disturbed."""
    trainer = build(tmp_path_factory.mktemp("straight"))
    trainer.train()
    return trainer


def assert_equal_to(straight, out):
    resumed = build(out)
    rows = resumed.train(resume=True)
    for (name, a), b in zip(straight.model.named_parameters(), resumed.model.parameters()):
        assert torch.equal(a, b), name
    assert same_rows(rows, straight.metrics.rows)
    assert read_metrics(out / "metrics.jsonl") == rows
    old, new = straight.optimizer.state_dict(), resumed.optimizer.state_dict()
    assert old["param_groups"] == new["param_groups"]
    for key, moments in old["state"].items():
        assert all(torch.equal(v, new["state"][key][k]) for k, v in moments.items())


CHILD = """
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    from pathlib import Path
    from test_resume import build
    def hook(count):
        if count == {count}:
            os.kill(os.getpid(), signal.{signal})
    trainer = build(Path(sys.argv[1]), hook)
    trainer.train()
    sys.exit(128 + trainer.interrupted if trainer.interrupted else 0)
"""


def killed(out, name, count):
    code = textwrap.dedent(CHILD.format(tests=str(Path(__file__).parent), count=count, signal=name))
    return subprocess.run([sys.executable, "-c", code, str(out)], timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode


# 2 micro-batches a step, 7 an epoch, saved every 3 steps
WHERE = {"mid-accumulation": 17, "last micro-batch of the epoch": 21, "first of the next": 15}


@pytest.mark.parametrize("where", WHERE)
def test_sigkill_then_resume_is_bit_for_bit(straight, tmp_path, where):
    assert killed(tmp_path, "SIGKILL", WHERE[where]) == -signal.SIGKILL
    assert_equal_to(straight, tmp_path)


@pytest.mark.parametrize("where", WHERE)
def test_sigterm_saves_the_finished_step_then_resume_is_bit_for_bit(straight, tmp_path, where):
    assert killed(tmp_path, "SIGTERM", WHERE[where]) == 128 + signal.SIGTERM
    step = -(-WHERE[where] // 2)  # the step in which the signal came is finished
    assert find_checkpoint(tmp_path).name == f"step-{step:06d}"
    assert_equal_to(straight, tmp_path)


def test_resume_exactly_at_an_epoch_boundary(straight, tmp_path):
    build(tmp_path, save_every=7).train()  # step 7 = 14 batches = two whole epochs
    for name in ("step-000020",):
        shutil.rmtree(tmp_path / "checkpoints" / name)
    (tmp_path / "checkpoints" / "latest").write_text("step-000014\n")
    assert_equal_to(straight, tmp_path)


def test_stopped_twice(straight, tmp_path):
    for count in (9, 24):
        def hook(at, count=count):
            if at == count:
                signal.raise_signal(signal.SIGINT)
        build(tmp_path, hook).train(resume=True)
    assert_equal_to(straight, tmp_path)


def test_fit_called_again_after_ctrl_c_goes_on_in_memory(straight, tmp_path):
    trainer = build(tmp_path, lambda at: at == 9 and signal.raise_signal(signal.SIGINT))
    trainer.train()
    rows = trainer.train()
    assert same_rows(rows, straight.metrics.rows)
    assert torch.equal(trainer.model.lm_head.weight, straight.model.lm_head.weight)


def test_a_finished_run_resumes_to_itself(straight):
    again = build(straight.out_dir)
    assert same_rows(again.train(resume=True), straight.metrics.rows)


def test_resume_where_nothing_is_starts_at_the_beginning(straight, tmp_path):
    assert_equal_to(straight, tmp_path / "new")


def test_a_second_run_does_not_write_over_the_first(straight):
    with pytest.raises(ValueError, match="exists: resume it or choose another out_dir"):
        build(straight.out_dir).train()


def test_torn_last_line_of_metrics_is_dropped(straight, tmp_path):
    build(tmp_path, lambda at: at == 9 and signal.raise_signal(signal.SIGINT)).train()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    assert_equal_to(straight, tmp_path)


def test_keeps_the_newest(straight):
    names = sorted(p.name for p in (straight.out_dir / "checkpoints").iterdir())
    assert names == ["latest", "step-000018", "step-000020"]


def test_random_numbers_go_on():
    state = json.loads(json.dumps(rng_state()))
    draw = lambda: (random.random(), random.gauss(0, 1), np.random.randn(), torch.randn(3).tolist())  # noqa: E731
    first = draw()
    set_rng_state(state)
    assert draw() == first


def test_load_weights_keeps_the_tie(straight):
    model = Tiny()
    load_weights(straight.out_dir, model)
    assert torch.equal(model.lm_head.weight, straight.model.lm_head.weight)
    assert model.lm_head.weight is model.embed_tokens.weight
    assert load_metadata(straight.out_dir) == {"model": {"width": 8}}


def test_the_config_decides_the_learning_rate_not_the_checkpoint(straight):
    model = Tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    load_checkpoint(straight.out_dir, model, optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.5


# --- damage ---


@pytest.fixture
def run(straight, tmp_path):
    """A copy to be damaged; the newest checkpoint's folder."""
    shutil.copytree(straight.out_dir, tmp_path / "run")
    return tmp_path / "run" / "checkpoints" / "step-000020"


FILES = ("state.json", "metadata.json", "tensors/.metadata", "tensors/__0_0.distcp")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["flip", "truncate", "delete"])
def test_a_damaged_file_is_named(run, name, how):
    path = run / name
    data = path.read_bytes()
    if how == "delete":
        path.unlink()
    else:
        half = len(data) // 2
        rest = bytes([data[half] ^ 1]) + data[half + 1:] if how == "flip" else b""
        path.write_bytes(data[:half] + rest)
    with pytest.raises(ValueError) as error:
        build(run.parents[1]).train(resume=True)
    assert path.name in str(error.value) and "\n" not in str(error.value)


def test_a_damaged_manifest_is_named(run):
    (run / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="manifest.json"):
        load_weights(run, Tiny())


def test_a_pointer_to_nothing_is_named(run):
    shutil.rmtree(run)
    with pytest.raises(ValueError, match="latest names .*step-000020, which is missing"):
        load_weights(run.parents[1], Tiny())


def test_no_checkpoint_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        load_weights(tmp_path, Tiny())


def test_another_model_is_refused_before_anything_changes(run):
    model = Tiny(width=16)
    before = model.lm_head.weight.detach().clone()
    with pytest.raises(ValueError, match=r"another model: .* \(11, 8\) there and \(11, 16\) here"):
        load_weights(run, model)
    assert torch.equal(model.lm_head.weight, before)


def test_a_model_with_fewer_layers_is_refused(run):
    class Fewer(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed_tokens = nn.Embedding(11, 8)
            self.lm_head = nn.Linear(8, 11, bias=False)
            self.lm_head.weight = self.embed_tokens.weight

    with pytest.raises(ValueError, match="model.norm.* is only there"):
        load_weights(run, Fewer())


def test_other_metadata_is_refused(run):
    trainer = build(run.parents[1])
    trainer.checkpoints.metadata = {"model": {"width": 9}}
    with pytest.raises(ValueError, match="has model.width 8, now it is 9"):
        trainer.train(resume=True)


# --- a checkpoint from somebody else ---


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def rehash(run):
    (run / "manifest.json").unlink()
    write_manifest(run)  # a hash proves nothing about its author


def test_an_index_that_asks_for_code_is_refused(run, tmp_path):
    (run / "tensors" / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "owned")))
    rehash(run)
    with pytest.raises(ValueError, match="asks for pathlib.Path.touch, which is not data"):
        load_weights(run, Tiny())
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("asks", [os.system, eval, torch.load, pickle.loads, SafeReader])
def test_only_names_and_shapes_may_be_asked_for(run, asks):
    (run / "tensors" / ".metadata").write_bytes(pickle.dumps(asks))
    with pytest.raises(ValueError, match="is not data"):
        SafeReader(run / "tensors").read_metadata()


def test_an_entry_that_is_no_tensor_is_never_unpickled(tmp_path):
    import torch.distributed.checkpoint as dcp

    model = Tiny()
    folder = save_checkpoint(tmp_path, 1, model)
    shutil.rmtree(folder / "tensors")
    state = {f"model.{k}": v for k, v in model.state_dict().items()}
    state["model.norm.bias"] = Evil(tmp_path / "owned")
    with checkpoint.unwrap_dcp_errors():
        dcp.save(state, storage_writer=dcp.FileSystemWriter(folder / "tensors"), no_dist=True)
    (tmp_path / "owned").unlink(missing_ok=True)
    rehash(folder)
    with pytest.raises(ValueError, match="BytesStorageMetadata, which is not data"):
        load_weights(folder, Tiny())
    assert not (tmp_path / "owned").exists()


# --- disks ---


@pytest.mark.parametrize("at", ["tensors", "state.json", "manifest.json", "rename", "latest"])
def test_a_full_disk_leaves_the_older_checkpoint_whole(tmp_path, monkeypatch, at):
    model = Tiny()
    old = save_checkpoint(tmp_path, 1, model, metadata={"a": 1})

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    atomic_write = checkpoint.atomic_write
    if at == "tensors":
        import torch.distributed.checkpoint.filesystem as filesystem
        monkeypatch.setattr(filesystem.FileSystemWriter, "write_data", full)
    elif at == "rename":
        monkeypatch.setattr(checkpoint.os, "rename", full)
    elif at == "manifest.json":
        monkeypatch.setattr(checkpoint, "write_manifest", full)
    else:
        monkeypatch.setattr(checkpoint, "atomic_write", lambda path, text: (
            full() if path.name == at else atomic_write(path, text)))
    with pytest.raises(OSError, match="step-000002: No space left on device; older ones are whole"):
        save_checkpoint(tmp_path, 2, model)
    monkeypatch.undo()
    assert find_checkpoint(tmp_path) == old
    assert load_metadata(tmp_path) == {"a": 1}
    load_weights(tmp_path, Tiny())
    assert not list(tmp_path.glob(".tmp*"))
    save_checkpoint(tmp_path, 2, model)  # and the next attempt succeeds
    assert find_checkpoint(tmp_path).name == "step-000002"


def test_what_a_crash_left_half_written_is_swept_up(tmp_path):
    (tmp_path / ".tmp-step-000001" / "tensors").mkdir(parents=True)
    save_checkpoint(tmp_path, 2, Tiny())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-000002"]


def test_an_unwritable_folder_is_one_clear_line(tmp_path):
    (tmp_path / "checkpoints").write_text("a file where a folder should be")
    with pytest.raises(OSError, match="cannot save .*step-000001"):
        save_checkpoint(tmp_path / "checkpoints", 1, Tiny())


def test_sigkill_at_any_moment_of_saving_leaves_a_whole_checkpoint(tmp_path):
    """Save over and over in a child, kill it at odd moments: `latest` always loads."""
    code = textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_resume import Tiny, save_checkpoint
        model = Tiny()
        for step in range(1, 100_000):
            save_checkpoint(sys.argv[1], step, model)
    """)
    for attempt in range(3):
        child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
        start = time.monotonic()
        while not (tmp_path / "latest").exists() and time.monotonic() - start < 120:
            time.sleep(0.05)
        time.sleep(0.3 + 0.13 * attempt)
        child.kill()
        child.wait()
        load_weights(tmp_path, Tiny())
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
