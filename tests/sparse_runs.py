"""Small runs of the sparse families, for processes that test_sparse_runs.py starts and for itself.

Rows of very different numbers of targets are cut into micro-batches of a fixed size, so that one
process with two micro-batches and two ranks with one do the same sums: a balance loss is a product
of means over a micro-batch.
"""

import torch
from faulty import whole
from uneven import Rows

from skylar.layers.router import TopKRouter
from skylar.models.decoder import CausalLM
from skylar.models.presets import get_config
from skylar.training.checkpoint import checkpoint_tensors
from skylar.training.distributed import ParallelConfig
from skylar.training.loss import NextTokenObjective
from skylar.training.muon import MuonConfig
from skylar.training.optim import AdamWConfig, ScheduleConfig
from skylar.training.trainer import TrainConfig, Trainer

V, MICRO, STEPS = 64, 2, 6
OPTIMIZERS = {"adamw": AdamWConfig(lr=3e-3), "muon": MuonConfig(lr=3e-3)}
SMALL = dict(vocab_size=V, d_model=32, n_heads=4, n_layers=2, d_ff=24, max_seq_len=32,
             init_std=0.1)
OWN = {  # what each preset has of its own
    "mixtral-test": dict(d_head=8, n_experts=4),
    "qwen3-moe-test": dict(d_head=8, n_experts=4, mlp_only_layers=(0,), dense_d_ff=24),
    "gpt-oss-test": dict(d_head=8, n_experts=4, window=4),
    "deepseek-test": dict(n_experts=4, d_expert=24, n_groups=2, topk_groups=1, top_k=2,
                          q_lora_rank=16, kv_lora_rank=12, qk_nope_head_dim=8,
                          qk_rope_head_dim=4, v_head_dim=8, sequence_loss=0.01)}


def small(preset: str):
    return get_config(preset, **SMALL, **OWN[preset])


def avoid_last_expert(model: CausalLM) -> None:
    "No token is ever sent to it."
    for router in (m for m in model.modules() if isinstance(m, TopKRouter)):
        def without_last(module, inputs, output):
            logits = output.logits.clone()
            logits[:, -1] = -torch.inf
            weights, experts = logits.softmax(-1).topk(module.config.top_k)
            return output._replace(weights=weights, experts=experts)
        router.register_forward_hook(without_last)


def train(preset: str, optimizer: str, parallel=None, rank=0, size=1, steps=STEPS, out_dir=None,
          resume=False, idle=False) -> dict:
    "Losses, and all that a checkpoint of the last step would hold, whole."
    torch.manual_seed(0)
    model = CausalLM(small(preset))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    if idle:
        avoid_last_expert(model)
    objective = NextTokenObjective(model)
    settings = TrainConfig(steps=steps, dtype="float32", log_every=1, device="cpu", save_every=0,
                           async_save=False, grad_accum_steps=MICRO // size)
    trainer = Trainer(
        objective, Rows(MICRO // size, rank, size), settings, quiet=True,
        optimizer=OPTIMIZERS[optimizer],
        out_dir=out_dir, parallel=None if parallel is None else ParallelConfig(**parallel),
        schedule=ScheduleConfig(kind="constant", warmup_steps=0))
    rows = trainer.train(resume=resume, extend=resume)
    tensors = checkpoint_tensors(trainer.model, trainer.train_step.optimizer, objective)
    return {"losses": [row["loss"] for row in rows], "start": start,
            "weights": {name: whole(p) for name, p in model.named_parameters()},
            "tensors": {name: whole(t) for name, t in tensors.items() if torch.is_tensor(t)}}
