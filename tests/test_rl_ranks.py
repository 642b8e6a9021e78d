"""GRPO and PPO on two processes are the run of one, and go on at another number of them."""

import json
from pathlib import Path

import pytest
import torch
from ranks import launch

from skylar.posttrain.sums import sums_model

WORKER = Path(__file__).with_name("rl_worker.py")
KINDS = [("grpo", {}), ("grpo", {"loss": "gspo", "scale_rewards": "batch"}), ("ppo", {})]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    torch.save(sums_model(steps=100).state_dict(), folder / "start.pt")

    made = {}

    def run(n: int, kind: str, **settings) -> dict:
        key = n, kind, json.dumps(settings)
        if key not in made:
            launch(n, WORKER, folder / "out.pt", kind, folder / "start.pt", key[2])
            made[key] = torch.load(folder / "out.pt")
        return made[key]

    return run


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
def test_two_ranks_are_the_run_of_one(run, kind, settings):
    same(run(2, kind, **settings), run(1, kind, **settings))


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_a_run_goes_on_at_another_number_of_ranks(run, tmp_path, kind):
    whole = run(1, kind)
    out = str(tmp_path / "run")
    run(2, kind, steps=2, out_dir=out)
    found = run(1, kind, steps=4, out_dir=out, resume=True)
    equal_weights(found, whole)
