"""The loss where the head's weight is a shard: two FSDP2 processes against one without."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loss_worker import ROWS, T, batch

from skylar.training.loss import LOSSES, cross_entropy

WORKER = Path(__file__).with_name("loss_worker.py")


def run(n: int, out: Path) -> dict:
    start = [] if n == 1 else ["-m", "torch.distributed.run", f"--nproc-per-node={n}",
                               "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    done = subprocess.run([sys.executable, *start, str(WORKER), str(out)], text=True,
                          capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[dict, dict]:
    folder = tmp_path_factory.mktemp("sharded")
    return run(1, folder / "alone.pt"), run(2, folder / "two.pt")


CASES = list(itertools.product((True, False), LOSSES, ("sum", "none")))


@pytest.mark.parametrize(("tied", "loss", "reduction"), CASES)
def test_sharded_head_with_different_upstream_gradients(runs, tied, loss, reduction):
    alone = runs[0][tied, "plain", reduction]["grads"]
    found = runs[1][tied, loss, reduction]["grads"]
    assert set(found) == set(alone) and sum("lm_head" in key for key in alone) == (not tied)
    for key, grad in alone.items():
        assert grad.abs().max() > 1e-3, key
        torch.testing.assert_close(found[key], grad, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("tied", "loss", "reduction"), CASES[::2])
def test_outside_of_the_forward_a_shard_is_refused_or_gathered(runs, tied, loss, reduction):
    found = runs[1][tied, loss, reduction]
    assert "shard of 2 processes" in found["refused"] and "\n" not in found["refused"]
    hidden = torch.randn(ROWS * T, found["weight"].shape[1],
                         generator=torch.Generator().manual_seed(2))
    expected = cross_entropy(hidden, found["weight"], batch()[0]["labels"].flatten())[0]
    torch.testing.assert_close(found["evaluated"], expected)
