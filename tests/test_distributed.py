"""Several processes train the model that one process trains: losses, norms and weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from skylar.training.distributed import ParallelConfig

WORKER = Path(__file__).with_name("distributed_worker.py")


def torchrun(n: int, *command, check: bool = True) -> subprocess.CompletedProcess:
    "`command` in `n` processes that know each other; alone without torchrun."
    start = [] if n == 1 else ["-m", "torch.distributed.run", f"--nproc-per-node={n}",
                               "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    done = subprocess.run([sys.executable, *start, *map(str, command)], text=True,
                          capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def train(folder: Path, n: int, **settings) -> dict:
    out = folder / "result.pt"
    torchrun(n, WORKER, out, json.dumps(settings))
    return torch.load(out)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    return train(tmp_path_factory.mktemp("alone"), 1)


@pytest.mark.parametrize(("n", "settings"), [
    (1, {"recompute": True}),
    (2, {"strategy": "ddp"}),
    (2, {"strategy": "fsdp"}),
    (2, {"strategy": "fsdp", "reshard": False, "recompute": True}),
    (2, {"tensor": 2}),
    (4, {"replicas": 2}),
    (4, {"tensor": 2}),
], ids=lambda v: "-".join(f"{k}={x}" for k, x in v.items()) if isinstance(v, dict) else str(v))
def test_the_same_run_as_alone_at_unequal_target_counts(alone, tmp_path, n, settings):
    found = train(tmp_path, n, **settings)
    for ours, theirs in zip(found["rows"], alone["rows"], strict=True):
        assert ours["tokens"] == theirs["tokens"]
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=5e-6)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], abs=2e-5)
    moved = max(row["loss"] for row in alone["rows"]) - alone["rows"][-1]["loss"]
    assert moved >= 0  # losses are compared while weights move
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, atol=2e-4, rtol=0)


def test_what_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="3 processes do not divide by replicas=1 times tensor=2"):
        ParallelConfig(tensor=2).data_ranks(0, 3)
    with pytest.raises(ValueError, match="strategy='ddp' copies the model"):
        ParallelConfig(strategy="ddp", tensor=2)
