"""Golden values: what other libraries computed, written by tools/golden_trl.py."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Case:
    """One call of another library's code: what it was given, what it gave, its gradients."""

    name: str
    inputs: dict
    outputs: dict
    gradients: dict

    def leaves(self, dtype: torch.dtype = torch.float64) -> dict:
        """The inputs, floating tensors as new leaves that collect gradients."""
        return {
            key: value.detach().to(dtype, copy=True).requires_grad_()
            if torch.is_tensor(value) and value.is_floating_point() else value
            for key, value in self.inputs.items()
        }

    def check(self, leaves: dict, loss: Tensor, rtol: float = 1e-6, atol: float = 1e-8) -> None:
        """Our loss and, after backward of its sum, our gradients equal theirs."""
        torch.testing.assert_close(
            loss, self.outputs["loss"].to(loss.dtype), rtol=rtol, atol=atol)
        loss.sum().backward()
        for key, theirs in self.gradients.items():
            ours = leaves[key].grad
            assert ours is not None, f"{self.name}: {key} got no gradient"
            torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=rtol, atol=atol,
                                       msg=lambda text, key=key: f"{self.name}, {key}: {text}")


def _read(value):
    """A tensor that `stored` of tools/golden_trl.py has written; else the value itself."""
    if isinstance(value, dict) and value.keys() == {"dtype", "shape", "values"}:
        dtype = getattr(torch, value["dtype"])
        return torch.tensor(value["values"], dtype=dtype).reshape(value["shape"])
    return value


def golden(name: str) -> dict[str, Case]:
    """The cases of tests/golden/NAME.json, by name."""
    path = FOLDER / f"{name}.json"
    assert path.is_file(), f"no {path}: tools/golden_trl.py writes it"
    return {
        found["name"]: Case(
            found["name"],
            *({k: _read(v) for k, v in found[part].items()}
              for part in ("inputs", "outputs", "gradients")))
        for found in json.loads(path.read_text())["cases"]
    }
