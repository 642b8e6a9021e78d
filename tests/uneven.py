"""Batches whose rows have very different numbers of targets, as runs with micro-batches and ranks
must share them without a difference."""

import torch


class Rows:
    """Batches of `n` rows, cut for micro-batches and then for ranks; resumable.

    Row 0 has a share `least` of its targets, the last one all of them. With `alone`, row 0 has its
    first target or none: as a micro-batch it has none one token later."""

    def __init__(self, micro=1, rank=0, size=1, *, n=8, length=16, vocabulary=64, least=0.1,
                 alone=False):
        self.micro, self.rank, self.world_size, self.count = micro, rank, size, 0
        self.shape, self.vocabulary, self.alone = (n, length), vocabulary, alone
        self.share = torch.linspace(least, 1, n)[:, None]

    def __iter__(self):
        n, length = self.shape
        while True:
            step, part = divmod(self.count, self.micro)
            g = torch.Generator().manual_seed(step)
            ids = torch.randint(0, self.vocabulary, (n, length + 1), generator=g)
            masked = torch.rand(n, length, generator=g) >= self.share
            if self.alone:
                masked[0, 1:] = True
            batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:].masked_fill(masked, -100)}
            self.count += 1
            yield {k: v.chunk(self.micro)[part].chunk(self.world_size)[self.rank].contiguous()
                   for k, v in batch.items()}

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]
