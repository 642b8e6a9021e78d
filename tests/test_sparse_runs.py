"""Training of the sparse families: two ranks equal one process, and every run resumes bit for bit,
with experts that never get a token, too. The runs are in sparse_runs.py."""

from pathlib import Path

import pytest
import torch
from sparse_runs import OPTIMIZERS, OWN, STEPS, small, train

from skylar.models.presets import get_config
from skylar.utils.lesson import Workers

SETUP = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch.distributed as dist
from sparse_runs import train
dist.init_process_group("gloo")
"""
DDP, FSDP = {"strategy": "ddp"}, {}


def on_rank(preset, optimizer, parallel, options):
    return train(preset, optimizer, parallel, dist.get_rank(), 2, **options)  # noqa: F821


@pytest.fixture(scope="module")
def two():
    workers = Workers(2, SETUP)
    yield workers
    workers.close()


@pytest.fixture(scope="module")
def alone():
    runs = {}

    def run(*args, **options):
        key = args, tuple(options.items())
        if key not in runs:
            runs[key] = train(*args, **options)
        return runs[key]

    return run


def assert_bits(found: dict, expected: dict) -> None:
    "Weights, biases of routers, and all moments of the optimizer."
    assert found["tensors"].keys() == expected["tensors"].keys()
    for name, tensor in expected["tensors"].items():
        assert torch.equal(found["tensors"][name], tensor), name


EACH = pytest.mark.parametrize(("preset", "optimizer"), [
    (preset, optimizer) for preset in OWN for optimizer in OPTIMIZERS])


@EACH
def test_a_run_resumes_bit_for_bit(alone, tmp_path, preset, optimizer):
    straight = alone(preset, optimizer)
    train(preset, optimizer, steps=3, out_dir=tmp_path / "run")
    found = train(preset, optimizer, out_dir=tmp_path / "run", resume=True)
    assert found["losses"] == straight["losses"]
    assert_bits(found, straight)
    moved = [not torch.equal(p, straight["start"][name]) for name, p in found["weights"].items()]
    assert all(moved)


@EACH
@pytest.mark.parametrize("parallel", [DDP, FSDP], ids=["ddp", "fsdp"])
def test_two_ranks_are_one_process_and_resume_bit_for_bit(
        two, alone, tmp_path, preset, optimizer, parallel):
    one = alone(preset, optimizer)
    straight = two.run(on_rank, preset, optimizer, parallel, {})
    options = {"out_dir": tmp_path / "run"}
    two.run(on_rank, preset, optimizer, parallel, options | {"steps": 3})
    resumed = two.run(on_rank, preset, optimizer, parallel, options | {"resume": True})
    for found, expected in zip(resumed, straight):
        assert expected["losses"] == pytest.approx(one["losses"], rel=2e-5)
        assert found["losses"] == expected["losses"]
        assert_bits(found, expected)
        for name, weight in one["weights"].items():
            torch.testing.assert_close(expected["weights"][name], weight, atol=1e-4, rtol=1e-3)
            assert (weight - one["start"][name]).abs().max() > 3e-3, name  # more than the bound


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("preset", ["qwen3-moe-test", "gpt-oss-test"])
def test_an_expert_without_tokens_on_two_ranks(two, alone, tmp_path, preset, optimizer):
    """Sharded by experts, the second rank holds the idle one: saved and resumed all the same."""
    one = alone(preset, optimizer, idle=True)
    options = {"out_dir": tmp_path / "run", "idle": True}
    two.run(on_rank, preset, optimizer, FSDP, options | {"steps": 3})
    resumed = two.run(on_rank, preset, optimizer, FSDP, options | {"resume": True})
    name = next(name for name in one["weights"] if name.endswith("layers.1.mlp.experts.down_proj"))
    last = {n: t[-1] for n, t in one["tensors"].items()
            if name in n and t.ndim == 3 and n != f"model.{name}"}
    idle = [n for n, t in last.items() if not t.any()]
    assert idle, list(last)  # its moments are zero: no gradient ever came
    shrunk = one["weights"][name][-1] / one["start"][name][-1]
    assert shrunk.std() < 1e-4 < 1 - shrunk.mean()  # weight decay alone
    for found in resumed:
        for key, weight in one["weights"].items():
            torch.testing.assert_close(found["weights"][key], weight, atol=1e-4, rtol=1e-3)


def test_the_small_runs_are_of_the_presets():
    for preset in OWN:
        assert type(small(preset)) is type(get_config(preset))
    assert STEPS > 3
