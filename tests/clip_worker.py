"""Small models whose heads are clipped while they train; see test_qk_clip.py, whose processes
import everything from here."""

import torch
import torch.distributed as dist
from faulty import NotFinite, whole
from uneven import Rows

from skylar.layers.block import BlockConfig
from skylar.layers.gqa import GQAConfig
from skylar.layers.mla import MLAConfig
from skylar.layers.mlp import SwiGLUConfig
from skylar.layers.norm import RMSNormConfig
from skylar.models.decoder import CausalLM, DecoderConfig
from skylar.training.distributed import ParallelConfig
from skylar.training.muon import MuonConfig
from skylar.training.optim import AdamWConfig, ScheduleConfig
from skylar.training.qk_clip import QKClipConfig
from skylar.training.trainer import TrainConfig, Trainer

V, T, D, STEPS = 64, 16, 32, 5
TAU = 1.5  # below the first steps' largest logits: `test_heads_are_clipped_in_these_runs`
ATTENTION = {
    "gqa": GQAConfig(n_heads=4, n_kv_heads=2, d_head=8, bias=True),
    # 15 rows of q, 21 of keys and values: two ranks get unequal parts, which cut heads
    "mla": MLAConfig(n_heads=3, kv_lora_rank=8, qk_nope_head_dim=3, qk_rope_head_dim=2,
                     v_head_dim=4, q_lora_rank=6),
    "mla without q_lora": MLAConfig(n_heads=4, kv_lora_rank=8, qk_nope_head_dim=4,
                                    qk_rope_head_dim=4, v_head_dim=4),
}


def small_model(kind: str) -> CausalLM:
    torch.manual_seed(0)
    norm = RMSNormConfig()
    block = BlockConfig(attention=ATTENTION[kind], ffn=SwiGLUConfig(d_ff=48), norm=norm)
    return CausalLM(DecoderConfig(vocab_size=V, d_model=D, blocks=(block,) * 2, max_seq_len=64,
                                  norm=norm, init_std=0.3, residual_std=0.2))


def train(kind: str, parallel=None, micro=1, tau=TAU, steps=STEPS, bad=None, bad_rank=0,
          out_dir=None, resume=False, muon=False, **settings) -> dict:
    "What a run leaves: maxima and `keep` of its steps, weights before and after each clipping."
    rank, size = 0, 1
    if parallel is not None:
        parallel = ParallelConfig(**parallel)
        here = dist.is_initialized()
        rank, size = parallel.data_ranks(*((dist.get_rank(), dist.get_world_size()) if here
                                           else (0, 1)))
    model = small_model(kind)
    objective, maxima, kept, scaled = NotFinite(model), [], [], []
    objective.bad = bad if rank == bad_rank else None
    QKClipConfig(tau=tau).attach(objective)
    clip = objective.after_step

    def after_step(statistics, keep):
        before = {n: whole(p) for n, p in model.named_parameters()}
        clip(statistics, keep)
        after = {n: whole(p) for n, p in model.named_parameters()}
        maxima.append(statistics["attention_logits"].clone())
        kept.append(bool(keep))
        scaled.append({n: after[n] / before[n] for n in before
                       if not torch.equal(after[n], before[n])})

    objective.after_step = after_step
    config = TrainConfig(**dict(steps=steps, dtype="float32", device="cpu", log_every=1,
                                eval_every=0, save_every=0, grad_accum_steps=micro) | settings)
    optimizer = MuonConfig(lr=0.02, adamw_lr=3e-3) if muon else AdamWConfig(lr=3e-3)
    batches = Rows(micro, rank, size, length=T, vocabulary=V, least=0.2)
    trainer = Trainer(objective, batches, config, quiet=True, out_dir=out_dir,
                      optimizer=optimizer, parallel=parallel,
                      schedule=ScheduleConfig(kind="constant", warmup_steps=0))
    rows = trainer.train(resume=resume, extend=resume)
    return {"maxima": maxima, "keep": kept, "scaled": scaled, "rows": rows,
            "weights": {n: whole(p) for n, p in model.named_parameters()}}
