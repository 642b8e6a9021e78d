"""Freeze what other libraries compute: losses and gradients of their own code, as JSON.

    python -m venv /tmp/golden
    /tmp/golden/bin/pip install -c tools/golden/constraints.txt trl
    /tmp/golden/bin/python tools/golden_trl.py              # all of tools/golden/*.py
    /tmp/golden/bin/python tools/golden_trl.py preference   # one of them

Each `tools/golden/NAME.py` names the packages that it calls, with their exact versions, and
calls `case` for every input; what comes out is `tests/golden/NAME.json`. The test-suite reads
these files and needs none of the packages. A module whose packages are not installed in just
these versions is left out with a word, so that one environment for each version fills them all:
what a library has removed is called from the last wheel that had it.

    WHEELS = {"trl": "1.16.0"}

    def cases():
        logits = numbers(2, 5, 7, seed=0)
        case("two_sequences", {"logits": logits, "beta": 0.1}, their_loss)

`f(**inputs)` returns a tensor, or a dict of them whose `loss` is differentiated. Floating
tensors of the inputs are given gradients, and the gradients of `loss.sum()` are stored.
"""

import importlib.util
import json
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
FOUND: list[dict] = []  # cases of the module that runs now


def numbers(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    """Normal numbers in float64 with three decimals: short in JSON, exact when read back."""
    generator = torch.Generator().manual_seed(seed)
    drawn = scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
    return (drawn * 1000).round() / 1000


def integers(*shape: int, seed: int, high: int, low: int = 0) -> torch.Tensor:
    """Token ids and the like."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator)


def stored(value):
    """A tensor as JSON can hold it; what is none, as it is."""
    if not torch.is_tensor(value):
        return value
    kind = str(value.dtype).removeprefix("torch.")
    return {"dtype": kind, "shape": list(value.shape), "values": value.detach().tolist()}


def case(name: str, inputs: dict, f: Callable) -> None:
    """Call `f(**inputs)` and keep inputs, outputs and the gradients of the summed loss."""
    if any(found["name"] == name for found in FOUND):
        raise ValueError(f"two cases are called {name}")
    leaves = {
        key: value.clone().requires_grad_(value.is_floating_point())
        if torch.is_tensor(value) else value
        for key, value in inputs.items()
    }
    outputs = f(**leaves)
    outputs = outputs if isinstance(outputs, dict) else {"loss": outputs}
    loss = outputs.get("loss")
    gradients = {}
    if torch.is_tensor(loss) and loss.requires_grad:
        loss.sum().backward()
        gradients = {
            key: stored(value.grad) for key, value in leaves.items()
            if torch.is_tensor(value) and value.grad is not None
        }
    FOUND.append({
        "name": name,
        "inputs": {key: stored(value) for key, value in inputs.items()},
        "outputs": {key: stored(value) for key, value in outputs.items()},
        "gradients": gradients,
    })


def missing(wheels: dict[str, str]) -> str:
    """Why a module cannot run here; empty if it can."""
    for package, wanted in wheels.items():
        try:
            found = version(package)
        except PackageNotFoundError:
            return f"needs {package}=={wanted}, which is not installed"
        if found.partition("+")[0] != wanted:
            return f"needs {package}=={wanted}, here is {found}"
    return ""


def write(path: Path) -> str:
    """Run one module of cases; a line that says what came of it."""
    spec = importlib.util.spec_from_file_location(f"golden_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if reason := missing(module.WHEELS):
        return f"{path.stem}: left out, {reason}"
    FOUND.clear()
    torch.manual_seed(0)
    module.cases()
    versions = {name: version(name) for name in (*module.WHEELS, "torch")}
    made = {"made_by": path.relative_to(ROOT).as_posix(), "versions": versions, "cases": FOUND}
    out = ROOT / "tests" / "golden" / f"{path.stem}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(made) + "\n")
    return f"{path.stem}: {len(FOUND)} cases in {out.relative_to(ROOT)}"


def main(names: list[str]) -> None:
    folder = ROOT / "tools" / "golden"
    paths = [folder / f"{name}.py" for name in names] or sorted(folder.glob("*.py"))
    for path in paths:
        print(write(path))


if __name__ == "__main__":
    sys.modules["golden_trl"] = sys.modules["__main__"]  # what the modules import `case` from
    main(sys.argv[1:])
