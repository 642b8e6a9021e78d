"""What tests against transformers share: weights that no lost tensor can hide behind, routers that
are made to choose alike, and how near two results must be."""

from collections.abc import Callable
from contextlib import contextmanager

import torch

from skylar.models.weight_map import state_tensors


def rough(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    "Norms and biases, the routers' too, away from 1 and 0, so that a lost one shows."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in state_tensors(model).values():
            if tensor.ndim == 1:
                tensor += 0.3 * torch.randn(tensor.shape, generator=generator)
    return model.eval()


def forward(ours, ids, **options):
    "Logits, and what the layers say besides."
    hidden, extras = ours.model(ids, return_extras=True, **options)
    return ours.lm_head(hidden), extras


def close(ours, theirs, what: str, tolerance: float = 3e-5, floor: float = 1e-6) -> None:
    error, size = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    assert error <= tolerance * size + floor, f"{what}: {error:.1e} apart, of {size:.1e}"


def gates(theirs) -> list[torch.nn.Module]:
    return [m for n, m in theirs.named_modules() if n.endswith("mlp.gate")]


@contextmanager
def forced(theirs, routed: list, weights: Callable):
    """Inside, transformers' routers choose the experts that ours chose.

    `weights(logits, experts)` of their own logits: near-tied experts flip under any rounding."""
    def choose(mine):
        def hook(module, inputs, output):
            found = weights(output[0], mine.experts)
            return output[0], found.to(output[1].dtype), mine.experts
        return hook

    hooks = [g.register_forward_hook(choose(r))
             for g, r in zip(gates(theirs), routed, strict=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
