"""What layers count over a step: sums and maxima over micro-batches and ranks, once an update.

The model, its auxiliary and what each process runs are in step_worker.py.
"""

import math
from pathlib import Path

import pytest
import torch
from faulty import Faulty
from step_worker import (
    BAD,
    MICRO,
    ROWS,
    STEPS,
    Balance,
    MicroBatches,
    T,
    sparse_model,
    train,
)

from skylar.training.evaluate import evaluate
from skylar.training.guard import everyone
from skylar.utils.lesson import Workers
from skylar.utils.processes import Ranks

SETUP = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
import torch.distributed as dist
from step_worker import agreements, reductions, train
dist.init_process_group("gloo")
"""


def start(n: int):
    workers = Workers(n, SETUP)
    yield workers
    workers.close()


@pytest.fixture(scope="module")
def two():
    yield from start(2)


@pytest.fixture(scope="module")
def four():
    yield from start(4)


@pytest.fixture(scope="module")
def alone() -> dict:
    return train({})


def run_train(settings, bad):
    return train(settings, bad)


def run_reductions(settings):
    return reductions(settings)  # noqa: F821


def run_agreements(settings, opinions):
    return agreements(settings, opinions)  # noqa: F821


# --- over the ranks ---

SHARED = [  # processes, settings, data ranks
    (2, {"strategy": "ddp"}, 2), (2, {"strategy": "fsdp"}, 2), (2, {"tensor": 2}, 1),
    (4, {"strategy": "ddp"}, 4), (4, {"replicas": 2}, 4), (4, {"tensor": 2}, 2),
    (4, {"replicas": 2, "tensor": 2}, 2)]
LAYOUTS = pytest.mark.parametrize(("n", "settings", "size"), SHARED, ids=lambda v: (
    "-".join(f"{k}={x}" for k, x in v.items()) if isinstance(v, dict) else str(v)))


@LAYOUTS
def test_vectors_are_summed_and_maximized_over_the_data_ranks(request, n, settings, size):
    "Ranks that share matrices have read the same batch: they must not count twice."
    total = size * (size + 1) // 2  # data rank d gives d + 1 times the values
    one, two, third = 1.0, -2.0, torch.tensor(1e-3).item()
    expected = {
        "floats": ([one * total, two * total, third * total], [size, two, size * third]),
        "doubles": ([one * total, two * total, third * total], [size, two, size * third]),
        "large": ([size * 2**40 + total, -total], [2**40 + size, -1]),
        "half": ([total, total / 128], [size, size / 128]),
        "number": (total, size),
        "any": (None, [True, size > 1, False]),
        "negative": ([-total, -math.inf], [-1.0, -math.inf]),
    }
    for answer in request.getfixturevalue({2: "two", 4: "four"}[n]).run(run_reductions, settings):
        assert (answer["size"], answer["untouched"]) == (size, True)
        assert answer["processes"] in (0, n)
        for name, (summed, highest) in expected.items():
            found_sum, found_max = answer["found"][name]
            if summed is not None:
                assert found_sum.tolist() == pytest.approx(summed, rel=1e-6), name
            assert found_max.tolist() == pytest.approx(highest, rel=1e-6), name
        matrix, highest = answer["found"]["matrix"]
        assert torch.equal(matrix, torch.arange(6.0).view(2, 3).t() * total)
        assert torch.equal(highest, torch.arange(6.0).view(2, 3).t() * size)


@LAYOUTS
def test_a_rank_that_disagrees_about_a_step_stops_it_for_all(request, n, settings, size):
    """Only ranks that share matrices are asked: the others decide by the same sums already."""
    opinions = [[True] * n, [False] + [True] * (n - 1), [True] * (n - 1) + [False], [False] * n]
    answers = request.getfixturevalue({2: "two", 4: "four"}[n]).run(
        run_agreements, settings, opinions)
    for rank, answer in enumerate(answers):
        own = [case[rank] for case in opinions]
        assert answer == ([True, False, False, False] if "tensor" in settings else own)


def test_one_process_asks_nobody():
    keep, value = torch.tensor(True), torch.tensor([1, 2])
    assert everyone(keep, Ranks()) is keep
    assert Ranks().reduce(value) is value and Ranks().reduce(value, "max") is value


# --- over a step ---


def test_counts_are_those_of_all_micro_batches_and_of_nothing_else(alone):
    """Neither the batches that check the contract nor another step are in them."""
    assert alone["counts"].shape == (STEPS, 2, 4)
    assert (alone["counts"].sum(-1) == ROWS * T).all()
    assert alone["keep"] == [True] * STEPS  # once an update, not once a micro-batch
    assert len({tuple(c.flatten().tolist()) for c in alone["counts"]}) == STEPS
    assert alone["n_runs"] == STEPS * MICRO + 2
    for before, after, counts in zip(alone["biases"], alone["biases"][1:], alone["counts"][1:]):
        moved = 0.05 * (counts.float().mean(-1, keepdim=True) - counts).sign()
        torch.testing.assert_close(after - before, moved)


def same(found: dict, alone: dict) -> None:
    assert torch.equal(found["counts"], alone["counts"])  # of every step, to the last token
    assert torch.equal(found["biases"], alone["biases"])
    assert found["keep"] == alone["keep"]
    torch.testing.assert_close(found["highest"], alone["highest"], atol=1e-4, rtol=0)
    assert found["losses"] == pytest.approx(alone["losses"], abs=1e-5, nan_ok=True)
    assert found["spread"] == pytest.approx(alone["spread"], abs=1e-5)
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, atol=1e-3, rtol=0, msg=name)


def test_recomputed_blocks_are_counted_once(alone):
    found = train({"recompute": True})
    assert found["n_runs"] == 2 * STEPS * MICRO + 2  # they did run twice
    same(found, alone)


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@LAYOUTS
def test_the_counts_of_one_process_on_several(request, alone, n, settings, size, recompute):
    """One process with four micro-batches, or as many ranks as there are with the same four."""
    answers = request.getfixturevalue({2: "two", 4: "four"}[n]).run(
        run_train, settings | {"recompute": recompute}, False)
    for found in answers:
        assert found["n_runs"] == (1 + recompute) * STEPS * MICRO // size + 2
        same(found, alone)


@pytest.mark.parametrize(("n", "settings"), [
    (1, {}), (1, {"recompute": True}), (2, {"strategy": "ddp"}), (2, {"strategy": "fsdp"}),
    (2, {"tensor": 2}), (4, {"replicas": 2}), (4, {"tensor": 2})], ids=str)
def test_a_step_that_was_left_out_is_told_and_moves_nothing(request, alone, n, settings):
    "The last rank's last micro-batch is NaN: nobody moves weights or bias."
    if n == 1:
        answers = [train(settings, True)]
    else:
        answers = request.getfixturevalue({2: "two", 4: "four"}[n]).run(run_train, settings, True)
    for found in answers:
        assert found["keep"] == [step != BAD for step in range(1, STEPS + 1)]
        biases, counts = found["biases"], found["counts"]
        assert torch.equal(biases[BAD - 2], biases[BAD - 1])
        assert not torch.equal(biases[BAD - 1], biases[BAD])
        assert (counts.sum(-1) == ROWS * T).all()
        assert torch.equal(counts[:BAD], alone["counts"][:BAD])
        assert not torch.equal(counts[BAD:], alone["counts"][BAD:])  # the weights did not move
        assert torch.equal(biases, answers[0]["biases"])
        for name, weight in found["weights"].items():
            assert torch.equal(weight, answers[0]["weights"][name])


def test_evaluation_has_no_auxiliary_loss_and_tells_nothing():
    model = sparse_model()
    objective, batches = Faulty(model), list(MicroBatches(0, 1, False))[:3]
    balance = model.decoder_config.auxiliary
    row = evaluate(objective, batches, dtype="float32")
    assert balance.given == [] and row["val_spread"] > 0
    plain = sum(objective.eval()(dict(b)).loss_sum.item() for b in batches)
    trained = sum(objective.train()(dict(b)).loss_sum.item() for b in batches)
    n = sum(int((b["labels"] >= 0).sum()) for b in batches)
    assert row["val_loss"] == pytest.approx(plain / n)
    extra = [0.1 * objective(dict(b)).metrics["spread"][0].item() * int((b["labels"] >= 0).sum())
             for b in batches]
    assert trained - plain == pytest.approx(sum(extra), rel=1e-3) and sum(extra) > 1


def test_an_objective_that_counts_nothing_is_not_called(monkeypatch):
    "A dense model's objective needs no `after_step`."
    model = sparse_model()
    objective = Faulty(model)
    objective.auxiliary = None
    called = []
    monkeypatch.setattr(Balance, "after_step", lambda *args: called.append(1))
    from skylar.training.trainer import TrainConfig, Trainer

    config = TrainConfig(steps=2, dtype="float32", device="cpu", eval_every=0)
    Trainer(objective, MicroBatches(0, 1, False), config, quiet=True).train()
    assert not called
