"""GRPO and PPO on two processes are the run of one, and go on at another number of them."""

import json
from pathlib import Path

import pytest
import torch
from test_distributed import torchrun

WORKER = Path(__file__).with_name("rl_worker.py")
KINDS = [("grpo", {"loss": "dapo"}), ("grpo", {"loss": "dr_grpo"}),
         ("grpo", {"loss": "gspo", "scale_rewards": "none"}), ("ppo", {})]


def run(folder: Path, n: int, kind: str, **settings) -> dict:
    out = folder / f"{n}.pt"
    torchrun(n, WORKER, out, kind, json.dumps(settings))
    return torch.load(out)


def equal_weights(ours: dict, theirs: dict) -> None:
    "On average: AdamW moves a weight with hardly any gradient by its sign, which may differ."
    assert ours["weights"].keys() == theirs["weights"].keys()
    for name, weight in theirs["weights"].items():
        assert (ours["weights"][name] - weight).abs().mean() < 5e-5, name


def same(ours: dict, theirs: dict) -> None:
    for a, b in zip(ours["rows"], theirs["rows"], strict=True):
        for name in ("loss", "reward", "entropy", "length", "kl"):
            assert a[name] == pytest.approx(b[name], abs=1e-4), name
    equal_weights(ours, theirs)


@pytest.mark.parametrize(("kind", "settings"), KINDS, ids=lambda v: str(v))
def test_two_ranks_are_the_run_of_one(tmp_path, kind, settings):
    same(run(tmp_path, 2, kind, **settings), run(tmp_path, 1, kind, **settings))


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_a_run_goes_on_at_another_number_of_ranks(tmp_path, kind):
    whole = run(tmp_path, 1, kind, steps=4)
    out = str(tmp_path / "run")
    run(tmp_path, 2, kind, steps=2, out_dir=out)
    found = run(tmp_path, 1, kind, steps=4, out_dir=out, resume=True)
    equal_weights(found, whole)
