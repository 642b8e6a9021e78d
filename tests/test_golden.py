"""The frame for golden values: what is written can be read, and is compared with gradients."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from golden_cases import FOLDER, Case, _read, golden

ROOT = Path(__file__).parents[1]


@pytest.fixture
def frame(monkeypatch):
    spec = importlib.util.spec_from_file_location("golden_trl", ROOT / "tools" / "golden_trl.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "golden_trl", module)
    spec.loader.exec_module(module)
    return module


def read_back(frame) -> Case:
    found = json.loads(json.dumps(frame.FOUND[-1]))
    parts = [{k: _read(v) for k, v in found[p].items()}
             for p in ("inputs", "outputs", "gradients")]
    return Case(found["name"], *parts)


def test_a_case_is_read_back_exactly_and_checked_with_gradients(frame):
    x, mask = frame.numbers(2, 3, seed=0), frame.integers(2, 3, seed=1, high=2).bool()
    frame.case("square", {"x": x, "mask": mask, "beta": 0.5},
               lambda x, mask, beta: {"loss": beta * (x * mask).square().sum(), "n": mask.sum()})
    case = read_back(frame)
    assert case.inputs["x"].equal(x) and case.inputs["mask"].equal(mask)
    leaves = case.leaves()
    assert leaves["beta"] == 0.5 and leaves["mask"].dtype == torch.bool
    case.check(leaves, 0.5 * (leaves["x"] * leaves["mask"]).square().sum())
    for wrong in (lambda x: 0.51 * (x * mask).square().sum(),  # the loss
                  lambda x: 0.5 * (x * mask).square().sum().detach() + 0 * x.sum()):  # gradients
        leaves = case.leaves()
        with pytest.raises(AssertionError):
            case.check(leaves, wrong(leaves["x"]))


def test_one_name_for_one_case(frame):
    for name, raises in (("a", False), ("b", False), ("a", True)):
        if raises:
            with pytest.raises(ValueError, match="two cases are called a"):
                frame.case(name, {"x": torch.ones(1)}, torch.sum)
        else:
            frame.case(name, {"input": torch.ones(1)}, torch.sum)


def test_wheels_must_be_the_named_ones(frame):
    assert frame.missing({"torch": torch.__version__.partition("+")[0]}) == ""
    assert "here is" in frame.missing({"torch": "0.0.1"})
    assert "not installed" in frame.missing({"no-such-package": "1"})


@pytest.mark.parametrize("path", sorted((ROOT / "tools" / "golden").glob("*.py")),
                         ids=lambda p: p.stem)
def test_every_module_of_cases_has_its_file(path):
    """Values are committed beside the code that made them."""
    cases = golden(path.stem)
    made = json.loads((FOLDER / f"{path.stem}.json").read_text())
    assert cases and made["made_by"] == f"tools/golden/{path.stem}.py"
    assert all(case.outputs for case in cases.values())


def test_a_missing_file_is_said():
    with pytest.raises(AssertionError, match="tools/golden_trl.py writes it"):
        golden("no_such_name")
