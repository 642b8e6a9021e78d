"""What runs with bad batches, and runs of several processes, share."""

import torch

from skylar.training.loss import NextTokenObjective


class Faulty(NextTokenObjective):
    "Multiplies the loss by the factor that a batch carries."

    def forward(self, batch):
        batch = dict(batch)
        factor = batch.pop("factor")[0]
        output = super().forward(batch)
        return output._replace(loss_sum=output.loss_sum * factor)


def whole(p: torch.Tensor) -> torch.Tensor:
    "A copy of all of a tensor, gathered if it is sharded."
    return (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
