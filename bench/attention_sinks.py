"""What attention sinks take, and whether a small model predicts better with them.

Two models that read Shakespeare's plays, equal but for the sinks: grouped-query attention, windows
of 32 tokens in every second layer as in gpt-oss, dense feed-forward layers. Every sequence begins
with <bos>, on which a head without a sink may put weight that it has no use for. For each seed the
bits per byte of the held-out plays, the mean weight of each head's later queries on its sink and on
the first token, and, of the model with sinks, the bits per byte after its sinks are taken away.

    python bench/attention_sinks.py             # about 15 minutes on one core
"""

import argparse
import math

import torch
from common import record, show
from torch.nn import functional as F

from skylar.data.held_out import text_bits_per_byte, train_text, val_text
from skylar.layers.attention_sinks import SinkAttentionConfig
from skylar.layers.block import BlockConfig
from skylar.layers.gqa import GQAConfig
from skylar.layers.mlp import SwiGLUConfig
from skylar.layers.norm import RMSNormConfig
from skylar.layers.sliding_window import SlidingWindow
from skylar.models.decoder import CausalLM, DecoderConfig
from skylar.models.hub import load_tokenizer
from skylar.training.optim import AdamWConfig, ScheduleConfig
from skylar.utils.lesson import asset

KINDS = {"no sinks": GQAConfig, "sinks": SinkAttentionConfig}
STEPS, BATCH, LENGTH, WINDOW, LAYERS, RATE = 600, 16, 128, 32, 4, 3e-3
GONE = -1e4  # a sink this low takes no weight


def build(kind: str, seed: int) -> CausalLM:
    torch.manual_seed(seed)

    def block(window):
        attention = KINDS[kind](n_heads=4, n_kv_heads=2, d_head=32, window=window)
        return BlockConfig(attention=attention, ffn=SwiGLUConfig(d_ff=352), norm=RMSNormConfig())

    kinds = block(SlidingWindow(size=WINDOW)), block(None)
    return CausalLM(DecoderConfig(
        vocab_size=2048, d_model=128, blocks=[kinds[i % 2] for i in range(LAYERS)],
        max_seq_len=256, norm=RMSNormConfig()))


def windows(ids: torch.Tensor, starts: torch.Tensor, bos: int) -> torch.Tensor:  # (B, T + 1)
    return F.pad(ids[starts[:, None] + torch.arange(LENGTH)], (1, 0), value=bos)


def train(model: CausalLM, ids: torch.Tensor, bos: int, seed: int, steps: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = AdamWConfig(lr=RATE).build(model)
    schedule = ScheduleConfig()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * schedule.multiplier(step, steps)
        starts = torch.randint(len(ids) - LENGTH, (BATCH,), generator=generator)
        batch = windows(ids, starts, bos)
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def weights(model: CausalLM, ids: torch.Tensor) -> list[torch.Tensor]:
    "Of each layer (B, H, T, 1 + T): on the sink, then on the keys."
    found, layers = [], [block.self_attn for block in model.model.layers]

    def spy(layer):
        def call(q, k, v, mask):
            keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
            scores = q @ keys.mT / math.sqrt(q.shape[-1])
            scores = scores.masked_fill(~mask.dense, -math.inf)
            sinks = getattr(layer, "sinks", torch.full((q.shape[1],), -math.inf))
            column = sinks.view(-1, 1, 1).expand(*scores.shape[:3], 1)
            found.append(torch.cat([column, scores], -1).softmax(-1))
            return type(layer).dot_product_attention(layer, q, k, v, mask)

        return call

    for layer in layers:
        layer.dot_product_attention = spy(layer)
    model.set_attention_backend("reference")
    model(ids)
    model.set_attention_backend("auto")
    for layer in layers:
        del layer.dot_product_attention
    return found


def measure(kind: str, seed: int, steps: int) -> dict:
    tokenizer = load_tokenizer(asset("shakespeare"))
    ids, held_out = (torch.tensor(tokenizer.encode(f())) for f in (train_text, val_text))
    model = build(kind, seed)
    train(model, ids, tokenizer.bos_id, seed, steps)
    model.eval()
    text = val_text()[:200_000]
    row = {"kind": kind, "seed": seed,
           "bits_per_byte": text_bits_per_byte(model, tokenizer, text, context=LENGTH)}
    sample = windows(held_out, torch.arange(64) * LENGTH, tokenizer.bos_id)[:, :-1]
    late = [w[:, :, WINDOW:] for w in weights(model, sample)]  # (B, H, T', 1 + T)
    for name, column in (("sink", 0), ("first", 1)):
        row[name] = [[round(x, 4) for x in w[..., column].mean((0, 2)).tolist()] for w in late]
    if kind == "sinks":
        row["learned"] = [[round(x, 3) for x in block.self_attn.sinks.tolist()]
                          for block in model.model.layers]
        for block in model.model.layers:
            torch.nn.init.constant_(block.self_attn.sinks, GONE)
        row["without"] = text_bits_per_byte(model, tokenizer, text, context=LENGTH)
    return row


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for seed in range(options.seeds):
        for kind in KINDS:
            rows.append(measure(kind, seed, options.steps))
            show(rows[-1])
    if options.steps == STEPS:
        record("attention_sinks", rows, steps=STEPS, batch=BATCH, length=LENGTH, window=WINDOW)
