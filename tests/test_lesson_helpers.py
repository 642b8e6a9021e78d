"""What lessons share: timers, intervals, a training loop, checks of checks, the course's files."""

import json
import random
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from skylar.utils.lesson import (
    asset,
    bench_results,
    mean_interval,
    milliseconds,
    rejects,
    train_steps,
)


def check_double(f):
    assert f(3) == 6, "not yet: f(3) is not 6"


def test_a_check_that_rejects_a_wrong_answer():
    assert rejects(check_double, lambda x: x + 2) is None


def test_a_check_that_accepts_everything_is_noticed():
    with pytest.raises(RuntimeError, match="check_double accepted a wrong answer"):
        rejects(check_double, lambda x: 2 * x)


def test_a_wrong_answer_that_crashes_was_not_rejected():
    "Only an assertion is a verdict; any other error would hide a broken check."
    with pytest.raises(TypeError):
        rejects(check_double, lambda: None)


def test_milliseconds():
    assert 9 < milliseconds(time.sleep, 0.01, min_run_time=0.05) < 30
    calls = []
    milliseconds(calls.append, "x", min_run_time=0.001)
    assert len(calls) > 1  # repeated, with its argument


def test_milliseconds_leaves_the_threads_as_they_were():
    before = torch.get_num_threads()
    assert milliseconds(torch.get_num_threads, min_run_time=0.001) > 0
    assert torch.get_num_threads() == before


def test_interval_of_two_values():
    "By hand: mean 2, standard deviation sqrt(2), divided by sqrt(2), times 12.706."
    assert mean_interval([1.0, 3.0]) == pytest.approx((2.0, 12.706))


@pytest.mark.parametrize("n, t", [(5, 2.776), (10, 2.262), (11, 2.228), (12, 2.201), (31, 2.042),
                                  (1001, 1.962)])
def test_interval_agrees_with_tables_of_t(n, t):
    values = [random.Random(n).random() + i % 3 for i in range(n)]
    mean, half_width = mean_interval(iter(values))
    assert mean == pytest.approx(statistics.fmean(values))
    assert half_width == pytest.approx(t * statistics.stdev(values) / n**0.5, rel=5e-4)


def test_interval_takes_tensors_and_refuses_one_value():
    assert mean_interval(torch.tensor([1.0, 3.0])) == pytest.approx((2.0, 12.706))
    with pytest.raises(ValueError, match="at least two values, not 1"):
        mean_interval([2.5])


class Drops(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.drop = nn.Linear(4, 1), nn.Dropout(0.5)

    def forward(self, x):
        return self.linear(self.drop(x))


def loss_fn(model, batch):
    x, y = batch
    return (model(x) - y).square().mean()


def data(n=3):
    generator = torch.Generator().manual_seed(0)
    return [tuple(torch.randn(2, 8, 4, generator=generator)[..., :4].unbind()) for _ in range(n)]


def fresh():
    torch.manual_seed(1)
    return Drops().eval()


def pairs():
    return [(x, y[:, :1]) for x, y in data()]


def test_training_steps_are_adams():
    model, twin = fresh(), fresh()
    losses = train_steps(model, loss_fn, pairs(), steps=7, lr=0.01, seed=5)
    optimizer, expected = torch.optim.Adam(twin.parameters(), 0.01), []
    torch.manual_seed(5)
    twin.train()
    for step in range(7):
        loss = loss_fn(twin, pairs()[step % 3])  # three batches, begun again
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert losses == expected and model.training
    for ours, theirs in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_same_seed_same_losses_whatever_was_drawn_before():
    def losses(seed):
        model = fresh()
        torch.rand(random.randint(1, 9))
        return train_steps(model, loss_fn, pairs(), 5, seed=seed)

    assert losses(0) == losses(0) != losses(1)


def test_batches_from_a_function_or_a_generator():
    batches = iter(pairs() * 2)
    from_function = train_steps(fresh(), loss_fn, lambda: next(batches), 4)
    from_list = train_steps(fresh(), loss_fn, pairs(), 4)
    from_generator = train_steps(fresh(), loss_fn, (b for b in pairs() * 2), 4)
    assert from_function == from_list == from_generator
    assert next(batches) is not None  # two are left: no more were taken than steps


def test_too_few_batches_are_noticed():
    with pytest.raises(ValueError, match="too few"):
        train_steps(fresh(), loss_fn, (b for b in pairs()), 4)
    with pytest.raises(ValueError, match="no batches"):
        train_steps(fresh(), loss_fn, [], 1)
    assert train_steps(fresh(), loss_fn, [], 0) == []


def test_assets_are_found_from_any_folder_of_the_tree(tmp_path, monkeypatch):
    (tmp_path / "assets" / "model").mkdir(parents=True)
    (tmp_path / "nbs" / "00_chapter").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "nbs", tmp_path / "nbs" / "00_chapter"):
        monkeypatch.chdir(folder)
        assert asset("model") == tmp_path / "assets" / "model"


def test_a_copied_lesson_finds_the_assets_of_the_installed_clone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert asset("ngram.json").is_file()
    assert bench_results("lessons")["rows"]


def test_lessons_find_results_from_any_folder_and_not_by_a_path_of_their_own():
    for path in sorted((Path(__file__).parents[1] / "nbs").glob("[0-9]*/*.ipynb")):
        code = ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"]
                if cell["cell_type"] == "code"]
        assert not re.search(r"bench/results/|\"bench\" /", "\n".join(code)), path.name


def test_a_missing_asset_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no assets/nothing_like_it in") as error:
        asset("nothing_like_it")
    assert "\n" not in str(error.value) and "clone" in str(error.value)


def test_it_stands_on_the_lowest_floor():
    "Importing it loads nothing of skylar above utils, and no plotting."
    code = "import sys, skylar.utils.lesson; print('\\n'.join(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                            check=True, cwd=Path(__file__).parents[1]).stdout.split()
    ours = {name for name in loaded if name.startswith("skylar")}
    assert ours == {"skylar", "skylar.utils", "skylar.utils.lesson"}
    assert "matplotlib" not in loaded
