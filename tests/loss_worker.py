"""One of two processes of a sharded model; writes the first rank's findings. See test_loss_sharded.

`python loss_worker.py OUT`: for tied and untied heads and both losses, all gradients of a loss that
each process (or each position) multiplies by a number of its own; and the head outside of forward.
"""

import itertools
import sys

import torch

from skylar.models.decoder import CausalLM
from skylar.models.presets import get_config
from skylar.training.distributed import ParallelConfig
from skylar.training.loss import LOSSES, NextTokenObjective
from skylar.utils.processes import is_main_process, join_processes, leave_processes, rank_and_size

V, T, ROWS = 64, 12, 4


def batch() -> tuple[dict, torch.Tensor]:
    "Ids and labels, with very different numbers of targets, and a number for each position."
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(V, (ROWS, T + 1), generator=generator)
    labels = ids[:, 1:].clone()
    share = torch.linspace(0.1, 1, ROWS)[:, None]
    labels[torch.rand(ROWS, T, generator=generator) >= share] = -100
    return {"input_ids": ids[:, :-1], "labels": labels}, torch.randn(ROWS, T, generator=generator)


def weighted(objective, reduction: str, rows: slice, factor: float) -> torch.Tensor:
    "The loss of `rows` with one upstream gradient, or with one for each position."
    data, u = batch()
    part = {name: value[rows] for name, value in data.items()}
    loss = objective(part).loss_sum
    return (loss * u[rows].flatten()).sum() if reduction == "none" else factor * loss


def outside(model, name: str) -> dict:
    "The loss with the head's weight as it lies outside of the forward: a shard."
    data, weight = batch()[0], model.lm_head.weight
    hidden = torch.randn(ROWS * T, weight.shape[1], generator=torch.Generator().manual_seed(2))
    arguments = hidden, weight, data["labels"].flatten()
    with torch.no_grad():
        evaluated = LOSSES[name](*arguments)[0]
    try:
        LOSSES[name](*arguments)
        refused = None
    except ValueError as error:
        refused = str(error)
    return {"evaluated": evaluated, "refused": refused}


def case(tied: bool, name: str, reduction: str) -> dict:
    "Gradients by name of parameter; what the sharded head does outside of the forward."
    rank, size = rank_and_size()
    torch.manual_seed(0)
    model = CausalLM(get_config("test", vocab_size=V, n_layers=2, dropout=0.0,
                                tie_embeddings=tied))
    weight = model.lm_head.weight.detach().clone()
    objective = NextTokenObjective(model, name, reduction=reduction)
    shared, found = ParallelConfig().apply(objective, torch.device("cpu"), 0), {}
    half, factors = ROWS // 2, (1 / 7, -3.0)
    if size > 1:
        found = outside(model, name)
        rows = slice(rank * half, rank * half + half)
        loss = weighted(shared.forward, reduction, rows, factors[rank])
    else:  # the same sum: both halves, each with its factor
        loss = sum(weighted(objective, reduction, slice(half * i, half * i + half), f)
                   for i, f in enumerate(factors))
    loss.backward()
    grads = {key: p.grad.full_tensor() if size > 1 else p.grad
             for key, p in model.named_parameters()}
    grads = {key: size * grad for key, grad in grads.items()}  # FSDP averages over processes
    return found | {"grads": grads, "weight": weight}


def main(out: str) -> None:
    join_processes(torch.device("cpu"))
    found = {key: case(*key) for key in itertools.product(
        (True, False), LOSSES, ("sum", "none"))}
    if is_main_process():
        torch.save(found, out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
    leave_processes()
