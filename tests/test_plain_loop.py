"""The Trainer against a loop of plain PyTorch, step by step, over more than two epochs.

The plain loop has its own cross-entropy, schedule, clipping and accumulation; it shares only the
model and the batches. Measured largest differences in 40 steps, of loss (nats), gradient norm
(relative) and weights: 6e-7, 1e-5, 8e-6 in float32 and 1e-3, 4e-2, 1e-2 in bf16 autocast. They are
not 0, for the Trainer sums the loss and divides at the end, and fuses LM head and loss."""

import math

import pytest
import torch
from byte_corpus import corpus, write

from skylar.data.loader import PackedLoader
from skylar.data.shards import ShardDataset
from skylar.models.decoder import CausalLM
from skylar.models.presets import get_config
from skylar.training.loss import NextTokenObjective
from skylar.training.optim import AdamWConfig, ScheduleConfig
from skylar.training.trainer import TrainConfig, Trainer
from skylar.utils.devices import has_bfloat16

STEPS, ACCUMULATE, WARMUP, LR = 40, 2, 4, 3e-3
BETAS, DECAY, CLIP = (0.9, 0.95), 0.1, 1.0


def plain_loop(model, batches, dtype) -> tuple[list, list]:
    params = list(model.parameters())
    groups = [{"params": [p for p in params if p.ndim > 1], "weight_decay": DECAY},
              {"params": [p for p in params if p.ndim == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=1e-8)

    def factor(step):
        x = max(0, step - WARMUP) / (STEPS - WARMUP)
        return min(1, (step + 1) / (WARMUP + 1)) * (0.1 + 0.45 * (1 + math.cos(math.pi * x)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    losses, norms = [], []
    for _ in range(STEPS):
        group = [next(batches) for _ in range(ACCUMULATE)]
        n = sum((batch["labels"] != -100).sum() for batch in group)
        total = 0.0
        for batch in group:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                logits = model(batch["input_ids"], batch["position_ids"], batch["document_ids"])
            logits, labels = logits.float(), batch["labels"]
            target = logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
            loss = ((logits.logsumexp(-1) - target) * (labels != -100)).sum() / n
            loss.backward()
            total += loss.item()
        norms.append(torch.nn.utils.clip_grad_norm_(params, CLIP).item())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, norms


@pytest.mark.parametrize(("dtype", "bounds"), [
    ("float32", (3e-6, 5e-5, 5e-5)),
    pytest.param("bfloat16", (5e-3, 1e-1, 4e-2), marks=pytest.mark.skipif(
        not has_bfloat16(torch.device("cpu")), reason="bf16 is emulated here")),
])
@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_the_trainer_is_a_plain_loop(tmp_path, family, dtype, bounds):
    write(corpus(), tmp_path / "data")

    def new():
        torch.manual_seed(0)
        config = get_config("test", family=family, vocab_size=258, d_model=32, n_heads=4,
                            n_layers=2, d_ff=64, max_seq_len=32, dropout=0.0)
        loader = PackedLoader(ShardDataset(tmp_path / "data"), batch_size=4, seq_len=16)
        return CausalLM(config), loader

    model, loader = new()
    losses, norms = plain_loop(model, iter(loader), dtype)
    assert loader.epoch >= 2
    ours, loader = new()
    config = TrainConfig(steps=STEPS, grad_accum_steps=ACCUMULATE, max_grad_norm=CLIP,
                         dtype=dtype, device="cpu", log_every=1, eval_every=0)
    rows = Trainer(
        NextTokenObjective(ours), loader, config, quiet=True,
        optimizer=AdamWConfig(lr=LR, betas=BETAS, weight_decay=DECAY),
        schedule=ScheduleConfig(kind="cosine", warmup_steps=WARMUP)).train()

    def largest(found, wanted):
        return max(abs(a - b) for a, b in zip(found, wanted, strict=True))

    pairs = zip(model.parameters(), ours.parameters())
    apart = max((p - q).detach().abs().max().item() for p, q in pairs)
    differences = (largest([r["loss"] for r in rows], losses),
                   largest([r["grad_norm"] / n for r, n in zip(rows, norms)], [1.0] * STEPS),
                   apart)
    assert losses[-1] < losses[0] - 1  # it has learned: there was something to differ in
    assert min(norms) < CLIP < max(norms)  # some steps were clipped, and some were not
    for difference, bound in zip(differences, bounds):
        assert difference < bound
