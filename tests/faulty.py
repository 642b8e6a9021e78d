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


class NotFinite(NextTokenObjective):
    "In training, the loss of call number `bad` is NaN."

    calls, bad = 0, None

    def forward(self, batch):
        output = super().forward(batch)
        self.calls += self.training
        factor = float("nan") if self.training and self.calls == self.bad else 1.0
        return output._replace(loss_sum=output.loss_sum * factor)


def whole(p: torch.Tensor) -> torch.Tensor:
    "A copy of all of a tensor, gathered if it is sharded."
    return (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
