"""Tokens per second of one training step: Skylar against Hugging Face on the same model.

Same shape, same weights at the start, same batch, same bf16 autocast, same fused AdamW, gradients
clipped to norm 1, both in this process and in turns. Each side uses its own loss and loop: ours
`TrainStep` with the fused loss, theirs `labels=` and `clip_grad_norm_`.
The `packed` rows compare ours with ours: windows of several documents, which do not see one
another, against windows of one.

    python bench/train_step.py --family qwen3             # every shape, eager and compiled
    python bench/train_step.py --family gpt2 --shapes test --modes eager --rounds 5
    python bench/train_step.py --grid                     # vocabularies, widths, lengths
"""

import argparse
import itertools
import statistics
import time

import torch
from common import record
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

from skylar.models.decoder import CausalLM
from skylar.models.presets import from_args, resolve
from skylar.training.loss import NextTokenObjective
from skylar.training.optim import AdamWConfig, ScheduleConfig
from skylar.training.trainer import TrainConfig, TrainStep

SHAPES = {  # family -> name -> overrides of the `test` preset, batch size, sequence length
    "gpt2": {
        "test": (dict(), 8, 256),
        "larger": (dict(d_model=256, n_heads=8, n_kv_heads=8, n_layers=6, d_ff=1024), 4, 512),
    },
    "qwen3": {
        "test": (dict(), 8, 256),
        "25M": (
            dict(d_model=384, n_heads=6, n_kv_heads=3, d_head=64, n_layers=6, d_ff=1024), 4, 512
        ),
    },
}
GRID = {  # qwen3 of 6 layers: vocabulary, width, sequence length -> shape and batch
    f"{v // 1024}k {d} {t}": (
        dict(vocab_size=v, d_model=d, n_heads=d // 64, n_kv_heads=d // 128 or 1, d_head=64,
             n_layers=6, d_ff=3 * d, max_seq_len=1024), 1024 // t, t)
    for v, d, t in itertools.product((8192, 40_960), (128, 256, 512), (256, 1024))
}
TARGETS = {  # tokens/s, ours over theirs; for packed: ours over our own unpacked
    "gpt2": {"eager": 1.2, "compiled": 1.1},
    "qwen3": {"eager": 1.3, "compiled": 1.0, "packed": 0.9},
}
PACKED = 2, 1024  # batch size and sequence length of the packed rows


def their_gpt2(args: dict) -> GPT2LMHeadModel:
    """Hugging Face's GPT-2 of the same shape, without dropout, with its fastest attention."""
    hf = GPT2Config(
        vocab_size=args["vocab_size"], n_positions=args["max_seq_len"], n_embd=args["d_model"],
        n_layer=args["n_layers"], n_head=args["n_heads"], n_inner=args["d_ff"], resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, attn_implementation="sdpa",
        bos_token_id=0, eos_token_id=0,
    )
    return GPT2LMHeadModel(hf)


def their_qwen3(args: dict) -> Qwen3ForCausalLM:
    """Hugging Face's Qwen3 of the same shape, with its fastest attention."""
    hf = Qwen3Config(
        vocab_size=args["vocab_size"], max_position_embeddings=args["max_seq_len"],
        hidden_size=args["d_model"], num_hidden_layers=args["n_layers"],
        num_attention_heads=args["n_heads"], num_key_value_heads=args["n_kv_heads"],
        head_dim=args["d_head"], intermediate_size=args["d_ff"], use_cache=False,
        tie_word_embeddings=args["tie_embeddings"], rms_norm_eps=args["norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": args["rope_theta"]},
        attn_implementation="sdpa",
    )
    return Qwen3ForCausalLM(hf)


THEIRS = {"gpt2": their_gpt2, "qwen3": their_qwen3}


@torch.no_grad()
def copy_gpt2(ours: CausalLM, theirs: GPT2LMHeadModel) -> None:
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


def copy_weights(family: str, ours: CausalLM, theirs) -> None:
    """The same numbers in both; Qwen3's names are ours."""
    if family == "gpt2":
        copy_gpt2(ours, theirs)
    else:
        ours.load_state_dict(theirs.state_dict())


def batch_of(ids, documents=None) -> dict:
    """Inputs, and as labels the next tokens, but for the last one of each document."""
    labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], dim=1)
    if documents is None:
        return {"input_ids": ids, "labels": labels}
    last = documents[:, :-1] != documents[:, 1:]  # (B, T-1)
    labels[:, :-1] = labels[:, :-1].masked_fill(last, -100)
    return {"input_ids": ids, "labels": labels, "document_ids": documents}


def our_step(model, batch: dict, compiled: bool):
    """A function that trains `model` one step, as the Trainer does; returns the mean loss."""
    config = TrainConfig(dtype="bfloat16", device="cpu", compile=compiled)
    constant = ScheduleConfig(kind="constant", warmup_steps=0)
    train_step = TrainStep(NextTokenObjective(model), config, AdamWConfig(), constant)
    batches = itertools.repeat(batch)

    def step():
        loss_sum, n_valid = train_step(batches, 0).loss
        return float(loss_sum / n_valid)

    return step


def their_step(model, ids, compiled: bool):
    """The same for Hugging Face's model, with its own loss and the same optimizer."""
    optimizer = AdamWConfig().build(model)
    forward = torch.compile(model) if compiled else model

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            loss = forward(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def seconds(step, steps: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - start) / steps


def in_turns(one, other, rounds: int, steps: int, tokens: int) -> tuple[int, int, dict]:
    """Tokens/s of both, medians over rounds, and the ratio one over other with quartiles."""
    times = [(seconds(one, steps), seconds(other, steps)) for _ in range(rounds)]
    ratios = [b / a for a, b in times]
    low, middle, high = statistics.quantiles(ratios, n=4)
    speeds = (round(tokens / statistics.median(column)) for column in zip(*times))
    ratio = {"ratio": round(middle, 3), "ratio_quartiles": [round(low, 3), round(high, 3)]}
    return *speeds, ratio


def compare(family: str, shape: str, mode: str, rounds: int, steps: int) -> dict:
    """One row against Hugging Face."""
    overrides, size, length = (SHAPES[family] | GRID)[shape]
    torch.manual_seed(0)
    torch.compiler.reset()
    args = resolve("test", family=family, **overrides)
    mine = CausalLM(from_args(args)).train()
    theirs = THEIRS[family](args["args"]).train()
    copy_weights(family, mine, theirs)
    ids = torch.randint(mine.config.vocab_size, (size, length))
    ours_run = our_step(mine, batch_of(ids), mode == "compiled")
    theirs_run = their_step(theirs, ids, mode == "compiled")
    for _ in range(3):  # warm-up, and proof that both do the same work
        a, b = ours_run(), theirs_run()
        assert abs(a - b) < 0.02, f"the two sides train differently: {a} and {b}"
    ours, other, ratio = in_turns(ours_run, theirs_run, rounds, steps, size * length)
    target = TARGETS[family][mode]
    return {
        "family": family, "shape": shape, "mode": mode, "batch": f"{size} x {length}",
        "skylar_tokens_per_s": ours, "transformers_tokens_per_s": other, **ratio,
        "target": target, "met": ratio["ratio"] >= target,
    }


def documents_of(size: int, length: int) -> torch.Tensor:
    """Document numbers of packed windows: lengths of 20 to 500 tokens, the same every time."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 500, (size, length), generator=generator)
    ends = lengths.cumsum(1)  # (B, T): far more documents than fit
    return (torch.arange(length)[None, :, None] >= ends[:, None, :]).sum(-1)


def packed(family: str, shape: str, rounds: int, steps: int) -> dict:
    """One row: packed documents against undivided windows, both ours, eager."""
    size, length = PACKED
    torch.manual_seed(0)
    args = resolve("test", family=family, **SHAPES[family][shape][0])
    ids = torch.randint(40_960, (size, length))
    documents = documents_of(size, length)
    runs = [our_step(CausalLM(from_args(args)).train(), batch_of(ids, d), False)
            for d in (documents, None)]
    for run in runs * 2:
        run()
    with_mask, without, ratio = in_turns(*runs, rounds, steps, size * length)
    target = TARGETS[family]["packed"]
    return {
        "family": family, "shape": shape, "mode": "packed", "batch": f"{size} x {length}",
        "documents": int((documents[:, -1] + 1).sum()), "skylar_tokens_per_s": with_mask,
        "unpacked_tokens_per_s": without, **ratio, "target": target,
        "met": ratio["ratio"] >= target,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=SHAPES, default="qwen3")
    parser.add_argument("--shapes", nargs="+", help="default: all of the family")
    parser.add_argument("--modes", nargs="+", help="default: all of the family")
    parser.add_argument("--grid", action="store_true", help="the grid of qwen3, eager")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=2, help="steps a side takes in each round")
    parser.add_argument("--dry", action="store_true", help="print the rows, write no file")
    args = parser.parse_args()
    if args.grid:
        args.family, args.shapes, args.modes = "qwen3", list(GRID), ["eager"]
    rows = [
        packed(args.family, shape, args.rounds, args.steps) if mode == "packed"
        else compare(args.family, shape, mode, args.rounds, args.steps)
        for shape in args.shapes or SHAPES[args.family]
        for mode in args.modes or TARGETS[args.family]
    ]
    if args.dry:
        print(*rows, sep="\n")
        return
    ratios = [row["ratio"] for row in rows]
    record(
        f"train_step_{'grid' if args.grid else args.family}", rows,
        worst_ratio=min(ratios), median_ratio=statistics.median(ratios),
        dtype="bfloat16 autocast, fp32 weights",
        optimizer="fused AdamW on both sides", rounds=args.rounds, steps_per_round=args.steps,
        threads=torch.get_num_threads(), cuda="not run: no GPU on the measuring machine",
    )


if __name__ == "__main__":
    main()
