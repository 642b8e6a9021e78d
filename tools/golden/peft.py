"""LoRA, rsLoRA and DoRA layers of `peft`: outputs and gradients.

`loss` is the sum of the output times `upstream`, so that every gradient depends on all outputs.
"""

import torch
from golden_trl import case, numbers
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.func import functional_call

WHEELS = {"peft": "0.21.2"}


def their_layer(x, weight, bias, lora_A, lora_B, upstream, rank, alpha, rslora, dora,
                magnitude=None):
    model = nn.Sequential()
    model.add_module("lin", nn.Linear(*weight.T.shape, dtype=weight.dtype))
    config = LoraConfig(r=rank, lora_alpha=alpha, use_rslora=rslora, use_dora=dora,
                        target_modules=["lin"])
    model = inject_adapter_in_model(config, model).double()
    given = {"base_layer.weight": weight, "base_layer.bias": bias,
             "lora_A.default.weight": lora_A, "lora_B.default.weight": lora_B}
    if dora:
        given["lora_magnitude_vector.default.weight"] = magnitude
    assert {f"lin.{name}" for name in given} == set(dict(model.named_parameters()))
    y = functional_call(model, {f"lin.{name}": value for name, value in given.items()}, (x,))
    return {"loss": (y * upstream).sum(), "y": y}


def cases():
    inputs = {
        "x": numbers(2, 3, 6, seed=0), "weight": numbers(5, 6, seed=1), "bias": numbers(5, seed=2),
        "lora_A": numbers(2, 6, seed=3), "lora_B": numbers(5, 2, seed=4),
        "upstream": numbers(2, 3, 5, seed=5), "rank": 2, "alpha": 8, "rslora": False,
        "dora": False}
    case("lora", inputs, their_layer)
    case("rslora", inputs | {"rslora": True}, their_layer)
    dora = inputs | {"dora": True, "magnitude": torch.tensor([2.0, 1.5, 3.0, 0.5, 1.0]).double()}
    case("dora", dora, their_layer)
    case("dora_rslora", dora | {"rslora": True}, their_layer)
