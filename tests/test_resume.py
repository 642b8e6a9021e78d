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
    load_state,
    load_weights,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from skylar.training.metrics import CLOCK_FIELDS, read_metrics
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
    one, two = ([{k: v for k, v in row.items() if k not in CLOCK_FIELDS} for row in rows]
                for rows in (one, two))
    return one == two


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
    old, new = straight.train_step.optimizer.state_dict(), resumed.train_step.optimizer.state_dict()
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
    again = build(straight.checkpoints.folder.parent)
    assert same_rows(again.train(resume=True), straight.metrics.rows)


def test_resume_where_nothing_is_starts_at_the_beginning(straight, tmp_path):
    assert_equal_to(straight, tmp_path / "new")


def test_a_second_run_does_not_write_over_the_first(straight):
    with pytest.raises(ValueError, match="exists: resume it or choose another out_dir"):
        build(straight.checkpoints.folder.parent).train()


def test_torn_last_line_of_metrics_is_dropped(straight, tmp_path):
    build(tmp_path, lambda at: at == 9 and signal.raise_signal(signal.SIGINT)).train()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    assert_equal_to(straight, tmp_path)


def test_keeps_the_newest(straight):
    names = sorted(p.name for p in (straight.checkpoints.folder.parent / "checkpoints").iterdir())
    assert names == ["latest", "step-000018", "step-000020"]


def test_random_numbers_go_on():
    state = json.loads(json.dumps(rng_state()))
    draw = lambda: (random.random(), random.gauss(0, 1), np.random.randn(), torch.randn(3).tolist())  # noqa: E731
    first = draw()
    set_rng_state(state)
    assert draw() == first


def test_load_weights_keeps_the_tie(straight):
    model = Tiny()
    load_weights(straight.checkpoints.folder.parent, model)
    assert torch.equal(model.lm_head.weight, straight.model.lm_head.weight)
    assert model.lm_head.weight is model.embed_tokens.weight
    assert load_metadata(straight.checkpoints.folder.parent) == {"model": {"width": 8}}


def test_the_config_decides_the_learning_rate_not_the_checkpoint(straight):
    model = Tiny()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    load_checkpoint(straight.checkpoints.folder.parent, model, optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.5


# --- damage ---


@pytest.fixture
def run(straight, tmp_path):
    """A copy to be damaged; the newest checkpoint's folder."""
    shutil.copytree(straight.checkpoints.folder.parent, tmp_path / "run")
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


def test_a_step_is_saved_again_after_crashes_between_rename_and_removal(tmp_path, monkeypatch):
    def crash(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "remove_old", crash)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, 1, Tiny())
    monkeypatch.undo()
    save_checkpoint(tmp_path, 1, Tiny())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-000001"]


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


# --- borders ---


class TwoHeads(nn.Module):
    """Tied, with an expert that no token chooses and a head that is idle until `late`."""

    def __init__(self, late=99):
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens, self.idle = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.second, self.late = nn.Linear(8, 11), late
        self.lm_head = nn.Linear(8, 11, bias=False)
        self.lm_head.weight = self.embed_tokens.weight
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, ids):
        if self.training:
            self.calls += 1
        hidden = self.embed_tokens(ids)
        return self.lm_head(hidden) + (self.second(hidden) if self.calls > self.late else 0)


@pytest.mark.parametrize("late", [0, 13, 99])
def test_a_parameter_without_gradient_resumes_exactly(tmp_path, late):
    whole = build(tmp_path / "a", model=TwoHeads(late))
    whole.train()
    stop = lambda row: row["step"] == 6  # noqa: E731
    half = build(tmp_path / "b", model=TwoHeads(late))
    half.metrics.callbacks = (stop,)
    half.train()
    again = build(tmp_path / "b", model=TwoHeads(late))
    assert again.train(resume=True)[-1]["step"] == 20
    for (name, p), q in zip(whole.model.named_parameters(), again.model.parameters()):
        assert torch.equal(p, q), name
        one = whole.train_step.optimizer.state.get(p, {})
        two = again.train_step.optimizer.state.get(q, {})
        assert one.keys() == two.keys(), name
        assert all(torch.equal(v, two[k]) for k, v in one.items()), name
    assert not again.train_step.optimizer.state.get(again.model.idle.weight)


class WithHead(Noisy):
    """An objective with a trainable tensor of its own."""

    def __init__(self, model):
        super().__init__(model)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, batch):
        output = super().forward(batch)
        return output._replace(loss_sum=output.loss_sum * self.scale.exp())


def test_tensors_of_the_objective_itself_are_saved_and_load_weights_ignores_them(tmp_path):
    def make():
        return Trainer(WithHead(Tiny()), Loader(), TrainConfig(steps=4, device="cpu"),
                       out_dir=tmp_path, quiet=True)

    first, again = make(), make()
    first.train()
    again.train(resume=True)
    assert torch.equal(again.objective.scale, first.objective.scale) and again.objective.scale != 1
    load_weights(tmp_path, model := Tiny())
    assert torch.equal(model.lm_head.weight, first.model.lm_head.weight)


def test_loading_into_a_model_that_still_has_gradients(straight):
    model = Tiny()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.tensor([[1, 2]])).sum().backward()
    load_checkpoint(straight.checkpoints.folder.parent, model, optimizer)
    assert torch.equal(model.lm_head.weight, straight.model.lm_head.weight)
    state = straight.train_step.optimizer.state[straight.model.lm_head.weight]
    assert torch.equal(optimizer.state[model.lm_head.weight]["exp_avg"], state["exp_avg"])


@pytest.mark.parametrize("keep_last", [1, 2])
def test_newest_is_by_time_of_saving_and_strangers_are_left_alone(tmp_path, keep_last):
    model = nn.Linear(2, 2)
    for step in (100, 200, 300):
        save_checkpoint(tmp_path, step, model, keep_last=0)
    (tmp_path / "step-000050").mkdir()  # empty: none of ours
    (tmp_path / "step-old").write_text("a note")
    shutil.copytree(tmp_path / "step-000300", tmp_path / "step-000300-mine")
    (tmp_path / "latest").write_text("step-000100\n")
    made = save_checkpoint(tmp_path, 150, model, keep_last=keep_last)
    assert find_checkpoint(tmp_path) == made
    left = {p.name for p in tmp_path.iterdir()}
    ours = {"step-000150"} | ({"step-000300"} if keep_last == 2 else set())
    assert left == ours | {"latest", "step-000050", "step-old", "step-000300-mine"}


def test_a_strange_folder_in_the_way_is_not_overwritten(tmp_path):
    (tmp_path / "step-000007").mkdir()
    (tmp_path / "step-000007" / "mine.txt").write_text("keep")
    with pytest.raises(OSError, match="something else has this name"):
        save_checkpoint(tmp_path, 7, nn.Linear(2, 2))
    assert (tmp_path / "step-000007" / "mine.txt").read_text() == "keep"


def test_saving_a_step_again_replaces_it(tmp_path):
    model = nn.Linear(2, 2)
    save_checkpoint(tmp_path, 1, nn.Linear(2, 2))
    save_checkpoint(tmp_path, 1, model)
    load_weights(tmp_path, again := nn.Linear(2, 2))
    assert torch.equal(again.weight, model.weight)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-000001"]


def test_lost_latest_goes_on_from_the_newest(straight, run):
    (run.parent / "latest").unlink()
    assert find_checkpoint(run.parents[1]) == run
    shutil.rmtree(run)
    assert find_checkpoint(run.parents[1]).name == "step-000018"
    with pytest.raises(ValueError, match="exists: resume it"):
        build(run.parents[1]).train()
    assert_equal_to(straight, run.parents[1])


def test_lost_checkpoints_do_not_start_over(run):
    shutil.rmtree(run.parent)
    before = (run.parents[1] / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="goes to step 20, but its checkpoints are gone"):
        build(run.parents[1]).train(resume=True)
    with pytest.raises(ValueError, match="exists: resume it"):
        build(run.parents[1]).train()
    assert (run.parents[1] / "metrics.jsonl").read_bytes() == before


def test_checkpoints_without_manifest_do_not_start_over(run):
    for folder in run.parent.glob("step-*"):
        (folder / "manifest.json").unlink()
    (run.parent / "latest").unlink()
    with pytest.raises(ValueError, match="step-000020 is no checkpoint that can be read"):
        build(run.parents[1]).train(resume=True)


@pytest.mark.parametrize("content", [b"", b"step-00\xb0020\n", b"../other", b"step-20", b"[1]"])
def test_a_damaged_latest_is_one_line(run, content):
    (run.parent / "latest").write_bytes(content)
    with pytest.raises(ValueError, match="latest is damaged: it holds no checkpoint's name"):
        build(run.parents[1]).train(resume=True)


@pytest.mark.parametrize("content", [b"{}", b"[]", b"\xff", b'{"state.json": 3}', b"[" * 100_000])
def test_a_manifest_that_lists_too_little_is_one_line(run, content):
    (run / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match="manifest.json|state.json|metadata.json") as error:
        build(run.parents[1]).train(resume=True)
    assert "\n" not in str(error.value)


def test_seeded_damage_is_noticed_or_harmless(straight, tmp_path):
    """A byte of a file of the run is changed: one line, or exactly the same run."""
    chance = random.Random(0)
    expected = [p.detach().clone() for p in straight.model.parameters()]
    source = straight.checkpoints.folder.parent
    files = sorted(p.relative_to(source) for p in source.rglob("*")
                   if p.is_file() and "step-000018" not in p.parts and p.suffix != ".jsonl")
    for trial in range(40):
        out = tmp_path / str(trial)
        shutil.copytree(straight.checkpoints.folder.parent, out)
        path = out / chance.choice(files)
        data = bytearray(path.read_bytes())
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        trainer = build(out)
        try:
            trainer.train(resume=True)
        except (ValueError, OSError) as error:
            assert "\n" not in str(error), (path, error)
            continue
        assert all(map(torch.equal, trainer.model.parameters(), expected)), path
        shutil.rmtree(out)


def test_a_damaged_line_of_metrics_is_said_and_skipped(straight, run):
    path = run.parents[1] / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b'{"step": 6, "lo\xff\n', *lines[3:]]))
    with pytest.warns(UserWarning, match="line 3 is damaged and left out"):
        rows = read_metrics(path)
    assert rows == [json.loads(line) for i, line in enumerate(lines) if i != 2]


def test_a_tied_matrix_is_stored_once_and_bytes_are_reckoned(tmp_path):
    for width in (8, 256):
        model = Tiny(width)
        optimizer = torch.optim.AdamW(model.parameters())
        before = checkpoint.checkpoint_bytes(model, optimizer)
        model(torch.tensor([[1, 2]])).sum().backward()
        optimizer.step()
        made = save_checkpoint(tmp_path / str(width), 1, model, optimizer)
        size = sum(p.stat().st_size for p in made.rglob("*") if p.is_file())
        assert before == checkpoint.checkpoint_bytes(model, optimizer) >= size
        tensors = 12 * sum(p.numel() for p in model.parameters())
        assert size < tensors + 80_000  # the rest: headers, random numbers, manifest
        names = SafeReader(made / "tensors").read_metadata().state_dict_metadata
        assert "model.lm_head.weight" not in names and "model.embed_tokens.weight" in names


def test_existing_checkpoints_are_space_that_a_resume_has(straight):
    folder = straight.checkpoints.folder.parent / "checkpoints"
    files = [p for p in folder.glob("step-*/**/*") if p.is_file()]
    assert checkpoint.stored_bytes(folder) == sum(p.stat().st_size for p in files) > 0
    assert checkpoint.stored_bytes(folder / "nothing") == 0


# --- settings, length, time ---


def test_a_changed_setting_is_refused_by_name(straight):
    for change, name in ((dict(grad_accum_steps=3), "grad_accum_steps 2, now it is 3"),
                         (dict(max_grad_norm=0.5), "max_grad_norm 1.0, now it is 0.5"),
                         (dict(seed=1), "seed 42, now it is 1")):
        with pytest.raises(ValueError, match=name):
            build(straight.checkpoints.folder.parent, **change).train(resume=True)
    other = build(straight.checkpoints.folder.parent)
    other.checkpoints.settings["optimizer"]["lr"] = 1.0
    with pytest.raises(ValueError, match="optimizer.lr 0.0003, now it is 1.0"):
        other.train(resume=True)


def test_only_extend_makes_a_run_longer_and_nothing_makes_it_shorter(run):
    out = run.parents[1]
    with pytest.raises(ValueError, match="steps 20, now it is 24: give extend=True"):
        build(out, steps=24).train(resume=True)
    with pytest.raises(ValueError, match="steps 20, now it is 10: it cannot become shorter"):
        build(out, steps=10).train(resume=True, extend=True)
    longer = build(out, steps=24)
    assert longer.train(resume=True, extend=True)[-1]["step"] == 24
    with pytest.raises(ValueError, match="steps 24, now it is 20"):
        build(out).train(resume=True)


class Clock:
    """Time goes on by a second with each training batch."""

    now = 1000.0

    def __call__(self):
        return self.now

    def tick(self, count):
        self.now += 1.0


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("time.monotonic", clock)
    return clock


def test_minutes_end_a_run_by_the_clock_and_a_resume_counts_on(tmp_path, clock):
    def make(**changes):
        return build(tmp_path, clock.tick, steps=10_000, minutes=1.0, grad_accum_steps=1,
                     save_every=20, **changes)

    first = make()
    first.metrics.callbacks = (lambda row: row["step"] == 40,)
    first.train()
    assert first.progress.step == 40
    assert not load_state(tmp_path)["extra"]["progress"]["finished"]
    clock.now += 5000  # nobody trains while the machine is off
    again = make()
    rows = again.train(resume=True)
    assert 59 <= again.progress.step <= 61
    assert rows[-1]["step"] == again.progress.step and "val_loss" in rows[-1]
    assert load_state(tmp_path)["extra"]["progress"]["finished"]
    lrs = [row["lr"] for row in rows]
    assert max(lrs) > 0.9 * 3e-4 and lrs[-1] < 0.15 * 3e-4  # the schedule ends with the time
    assert make().train(resume=True)[-1]["step"] == again.progress.step  # finished: nothing to do


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGINT"])
def test_every_signal_that_ends_a_job_saves(straight, tmp_path, name):
    number = getattr(signal, name)
    assert killed(tmp_path, name, 17) == 128 + number
    assert find_checkpoint(tmp_path).name == "step-000009"
    assert_equal_to(straight, tmp_path)


def test_a_process_group_of_two_needs_a_parallel_config(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes, and nothing says how they share the run"):
        build(tmp_path)
