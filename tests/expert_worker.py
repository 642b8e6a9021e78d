"""One process of a small sparse run, started by test_expert_parallel.py with torchrun.

`python expert_worker.py OUT SETTINGS`: trains a model of eight experts a layer on rows with very
different numbers of targets; the first rank writes losses, norms, whole weights and moments, and
what the experts of each rank got. SETTINGS has what `MODEL`, `RUN` and ParallelConfig take.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from faulty import whole
from uneven import Rows

from skylar.layers.block import BlockConfig
from skylar.layers.deepseek_moe import BiasBalancingConfig, DeepSeekMoEConfig, GroupedSigmoidConfig
from skylar.layers.gqa import GQAConfig
from skylar.layers.moe import ClampedMoEConfig, Experts, MoEConfig
from skylar.layers.norm import RMSNormConfig
from skylar.layers.router import TopKConfig, TopKLogitsConfig
from skylar.models.decoder import CausalLM, DecoderConfig
from skylar.training.distributed import ParallelConfig
from skylar.training.loss import NextTokenObjective
from skylar.training.muon import MuonConfig
from skylar.training.optim import AdamWConfig, ScheduleConfig
from skylar.training.trainer import TrainConfig, Trainer
from skylar.utils.processes import is_main_process, join_processes, leave_processes, rank_and_size

V, T, STEPS, E, K = 64, 12, 6, 8, 2
MODEL = {"kind": "moe", "n_experts": E, "unused": None,  # unused: an expert that nobody chooses
         "meta": False}
RUN = {"steps": STEPS, "micro": 2, "optimizer": "adamw", "out_dir": None, "resume": False,
       "dtype": "float32"}


def decoder_config(kind: str, n_experts: int) -> DecoderConfig:
    norm = RMSNormConfig()
    auxiliary = None  # a loss of each rank's own tokens would not be that of one process
    if kind == "moe":
        ffn = MoEConfig(router=TopKConfig(n_experts=n_experts, top_k=K), d_ff=12)
    elif kind == "clamped":  # with biases, one of them of the router
        router = TopKLogitsConfig(n_experts=n_experts, top_k=K)
        ffn = ClampedMoEConfig(router=router, d_ff=12)
    else:
        router = GroupedSigmoidConfig(n_experts=n_experts, top_k=K, n_groups=4, topk_groups=2)
        ffn = DeepSeekMoEConfig(router=router, d_ff=12)
        auxiliary = BiasBalancingConfig(rate=0.02)
    block = BlockConfig(attention=GQAConfig(n_heads=2, qk_norm=norm), norm=norm, ffn=ffn)
    return DecoderConfig(vocab_size=V, d_model=16, blocks=(block,) * 2, max_seq_len=32, norm=norm,
                         init_std=0.3, residual_std=0.2, auxiliary=auxiliary)


def without(model: CausalLM, unused: int) -> None:
    "No token of any rank chooses expert `unused` of the first layer: its score is never best."
    gate = model.model.layers[0].mlp.gate

    def forward(x, plain=gate.forward):
        weights = gate.weight
        logits = torch.nn.functional.linear(x, weights).float()
        logits = logits.index_fill(-1, torch.tensor([unused]), -1e9)
        chosen, experts = logits.softmax(-1).topk(K, dim=-1)
        return plain(x)._replace(weights=chosen / chosen.sum(-1, keepdim=True), experts=experts)

    gate.forward = forward


def build(kind: str, n_experts: int, unused, meta: bool) -> CausalLM:
    torch.manual_seed(0)
    with torch.device("meta" if meta else "cpu"):
        model = CausalLM(decoder_config(kind, n_experts))
    if unused is not None:
        without(model, unused)
    return model


def counting(model: CausalLM) -> list[int]:
    "Rows that this rank's experts compute, call by call, and how many experts they are."
    seen = []
    for module in model.modules():
        if isinstance(module, Experts):
            def note(*_, module=module):
                local = module.down_proj
                seen.append(len(local.to_local() if hasattr(local, "to_local") else local))
            module.register_forward_pre_hook(note)
    return seen


def main(out: str, settings: dict) -> None:
    model_settings = MODEL | {k: settings.pop(k) for k in MODEL if k in settings}
    run = RUN | {k: settings.pop(k) for k in RUN if k in settings}
    join_processes(torch.device("cpu"))
    parallel = ParallelConfig(**settings)
    rank, size = parallel.data_ranks(*rank_and_size())
    model = build(**model_settings)
    optimizer = MuonConfig(lr=3e-3) if run["optimizer"] == "muon" else AdamWConfig(lr=3e-3)
    config = TrainConfig(steps=run["steps"], dtype=run["dtype"], log_every=1, device="cpu",
                         grad_accum_steps=run["micro"], save_every=0)
    batches = Rows(run["micro"], rank, size, length=T, vocabulary=V, least=0.05)
    trainer = Trainer(NextTokenObjective(model), batches, config, quiet=True,
                      optimizer=optimizer, parallel=parallel,
                      out_dir=run["out_dir"] and Path(run["out_dir"]),
                      schedule=ScheduleConfig(kind="constant", warmup_steps=0))
    start = {n: whole(p) for n, p in model.named_parameters()}
    local_experts = counting(model)
    rows = trainer.train(resume=run["resume"], extend=run["resume"])
    state = trainer.train_step.optimizer.state
    found = {
        "rows": rows, "start": start, "local_experts": local_experts[-1],
        "weights": {n: whole(p) for n, p in model.named_parameters()},
        "moments": {f"{n} {key}": whole(v) for n, p in model.named_parameters()
                    for key, v in state.get(p, {}).items()},
        "biases": [whole(b) for n, b in model.named_buffers() if n.endswith("correction_bias")]}
    if is_main_process():
        torch.save(found, out)
    if dist.is_initialized():
        dist.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], json.loads(sys.argv[2]))
    leave_processes()
