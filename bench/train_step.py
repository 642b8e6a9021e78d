"""Tokens per second of one training step: Skylar's GPT against Hugging Face's GPT-2.

Same shape, same weights at the start, same batch, same bf16 autocast, same fused AdamW, both
in this process and in turns. Each side uses its own loss: ours the fused one, theirs `labels=`.

    python bench/train_step.py                    # both shapes, eager and compiled
    python bench/train_step.py --shapes test --modes eager --rounds 5
"""

import argparse
import statistics
import time

import torch
from common import record
from transformers import GPT2Config, GPT2LMHeadModel

from skylar.models.decoder import CausalLM
from skylar.models.presets import get_config
from skylar.training.loss import next_token_loss
from skylar.training.optim import AdamWConfig

SHAPES = {  # overrides of the `test` preset (vocabulary 40,960), batch size, sequence length
    "test": (dict(), 8, 256),
    "larger": (dict(d_model=256, n_heads=8, n_kv_heads=8, n_layers=6, d_ff=1024), 4, 512),
}
TARGETS = {"eager": 1.2, "compiled": 1.1}  # tokens/s, ours over theirs


def theirs_like(config, n_heads: int, d_ff: int) -> GPT2LMHeadModel:
    """Hugging Face's GPT-2 of the same shape, without dropout, with its fastest attention."""
    hf = GPT2Config(
        vocab_size=config.vocab_size, n_positions=config.max_seq_len, n_embd=config.d_model,
        n_layer=len(config.blocks), n_head=n_heads, n_inner=d_ff, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, attn_implementation="sdpa",
        bos_token_id=0, eos_token_id=0,
    )
    return GPT2LMHeadModel(hf)


@torch.no_grad()
def copy_weights(ours: CausalLM, theirs: GPT2LMHeadModel) -> None:
    """Give ours the same start; their linear layers are stored transposed, q k v in one."""
    ours.model.embed_tokens.weight.copy_(theirs.transformer.wte.weight)
    ours.model.embed_positions.weight.copy_(theirs.transformer.wpe.weight)
    pairs = [(ours.model.norm, theirs.transformer.ln_f)]
    for a, b in zip(ours.model.layers, theirs.transformer.h):
        pairs += [(a.input_layernorm, b.ln_1), (a.post_attention_layernorm, b.ln_2)]
        qkv = (a.self_attn.q_proj, a.self_attn.k_proj, a.self_attn.v_proj)
        w, bias = b.attn.c_attn.weight.T.chunk(3), b.attn.c_attn.bias.chunk(3)
        linears = [*zip(qkv, w, bias)] + [
            (a.self_attn.o_proj, b.attn.c_proj.weight.T, b.attn.c_proj.bias),
            (a.mlp.up_proj, b.mlp.c_fc.weight.T, b.mlp.c_fc.bias),
            (a.mlp.down_proj, b.mlp.c_proj.weight.T, b.mlp.c_proj.bias),
        ]
        for layer, weight, b_ in linears:
            layer.weight.copy_(weight)
            layer.bias.copy_(b_)
    for a, b in pairs:
        a.weight.copy_(b.weight)
        a.bias.copy_(b.bias)


def our_step(model, ids, compiled: bool):
    """A function that trains `model` one step and returns the mean loss."""
    optimizer = AdamWConfig().build(model)
    objective = torch.compile(next_token_loss) if compiled else next_token_loss
    labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], dim=1)
    batch = {"input_ids": ids, "labels": labels}

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            loss_sum, n_valid, _ = objective(model, batch)
        loss = loss_sum / n_valid
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def their_step(model, ids, compiled: bool):
    """The same for Hugging Face's model, with its own loss and the same optimizer."""
    optimizer = AdamWConfig().build(model)
    forward = torch.compile(model) if compiled else model

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            loss = forward(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def seconds(step, steps: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - start) / steps


def compare(shape: str, mode: str, rounds: int, steps: int) -> dict:
    """One row: both sides in turns, medians over rounds, ratio with its quartiles."""
    overrides, batch, length = SHAPES[shape]
    torch.manual_seed(0)
    torch.compiler.reset()
    config = get_config("test", **overrides)
    mine = CausalLM(config).train()
    theirs = theirs_like(config, overrides.get("n_heads", 4), overrides.get("d_ff", 256)).train()
    copy_weights(mine, theirs)
    ids = torch.randint(config.vocab_size, (batch, length))
    ours_run = our_step(mine, ids, mode == "compiled")
    theirs_run = their_step(theirs, ids, mode == "compiled")
    for _ in range(3):  # warm-up, and proof that both do the same work
        a, b = ours_run(), theirs_run()
        assert abs(a - b) < 0.02, f"the two sides train differently: {a} and {b}"
    times = [(seconds(ours_run, steps), seconds(theirs_run, steps)) for _ in range(rounds)]
    ratios = [b / a for a, b in times]
    low, _, high = statistics.quantiles(ratios, n=4)
    ratio, tokens = statistics.median(ratios), batch * length
    return {
        "shape": shape, "mode": mode, "batch": f"{batch} x {length}",
        "skylar_tokens_per_s": round(tokens / statistics.median(a for a, _ in times)),
        "transformers_tokens_per_s": round(tokens / statistics.median(b for _, b in times)),
        "ratio": round(ratio, 3), "ratio_quartiles": [round(low, 3), round(high, 3)],
        "target": TARGETS[mode], "met": ratio >= TARGETS[mode],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--modes", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=2, help="steps a side takes in each round")
    parser.add_argument("--dry", action="store_true", help="print the rows, write no file")
    args = parser.parse_args()
    rows = [compare(s, m, args.rounds, args.steps) for s in args.shapes for m in args.modes]
    if args.dry:
        print(*rows, sep="\n")
        return
    record(
        "train_step", rows, dtype="bfloat16 autocast, fp32 weights",
        optimizer="fused AdamW on both sides", rounds=args.rounds, steps_per_round=args.steps,
        threads=torch.get_num_threads(), cuda="not run: no GPU on the measuring machine",
    )


if __name__ == "__main__":
    main()
