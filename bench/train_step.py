"""Tokens per second of a training step: Skylar against transformers, both on a plain eager model.

One folder of random weights is opened by both sides in this process; they train on the same batch
in turns, with bf16 autocast where the processor computes in it and in float32 elsewhere, gradients
clipped to 1 and fused AdamW. Skylar's side is the Trainer's own `TrainStep` around
`NextTokenObjective(model)`; transformers' side is its model with `labels=`, with whichever of its
attention implementations is faster here. Ratios are medians over paired rounds, of wall clock and
of CPU time. The `packed` row compares ours with ours: sequences of several documents, which do not
see one another, against sequences of one. The rows of Mixtral and DeepSeek-V3 are against the
fastest of transformers' experts implementations here, Mixtral's balance loss on both sides, and
(`dense`) against our own dense model of equal active parameters. DeepSeek's biases are balanced on
our side only: transformers does not do it.

    python bench/train_step.py                     # all families, about 14 minutes
    python bench/train_step.py --family mixtral    # one of them
    python bench/train_step.py --quick             # four rows, three rounds, writes no file
    python bench/train_step.py --only grid-256     # rows whose name begins so; writes no file
    python bench/train_step.py --profile grid-256-8192-256    # where the time of a step goes
"""

import argparse
import itertools
import statistics
import tempfile
import time

import torch
from common import record, show
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from skylar.models.decoder import CausalLM, active_parameters, count_parameters
from skylar.models.hub import save_pretrained
from skylar.models.presets import get_config
from skylar.training.loss import NextTokenObjective
from skylar.training.optim import AdamWConfig, ScheduleConfig
from skylar.training.trainer import TrainConfig, TrainStep
from skylar.utils.devices import autocast, pick_dtype

CPU = torch.device("cpu")
DTYPE = pick_dtype("auto", CPU)
LAYERS, TOKENS = 6, 1024  # of every model of the grid; tokens a step
GRID = list(itertools.product((128, 256, 512), (8192, 40_960), (256, 1024)))
GRID_WORST, GRID_MEDIAN = 1.3, 1.5  # targets
WIDE = dict(d_model=512, n_heads=8, n_kv_heads=4, d_head=64, n_layers=6, vocab_size=8192)
WIDE_LATENT = dict(
    d_model=512, n_heads=8, n_layers=6, vocab_size=8192, d_ff=1536, d_expert=256, q_lora_rank=256,
    kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64)
NAMED = {  # row: family, overrides of its test preset, mode, batch size, length, target
    "test": ("qwen3", {}, "eager", 8, 256, 1.3),
    "test-compiled": ("qwen3", {}, "compiled", 8, 256, 1.0),
    "test-packed": ("qwen3", {}, "packed", 2, 1024, 0.9),
    "gpt2-test": ("gpt2", {}, "eager", 8, 256, 1.2),
    "gpt2-test-compiled": ("gpt2", {}, "compiled", 8, 256, 1.1),
    "mixtral-test": ("mixtral", dict(d_ff=128), "eager", 8, 256, 1.5),
    "mixtral-test-dense": ("mixtral", dict(d_ff=128), "dense", 8, 256, 0.8),
    "mixtral-wide": ("mixtral", dict(d_ff=768, **WIDE), "eager", 8, 256, 1.5),
    "mixtral-wide-dense": ("mixtral", dict(d_ff=768, **WIDE), "dense", 8, 256, 0.8),
    "deepseek-test": ("deepseek_v3", {}, "eager", 8, 256, 1.5),
    "deepseek-wide": ("deepseek_v3", WIDE_LATENT, "eager", 8, 256, 1.5),
}
CASES = NAMED | {
    f"grid-{width}-{vocabulary}-{length}": (
        "qwen3",
        dict(d_model=width, d_head=64, n_heads=width // 64, n_kv_heads=width // 128,
             d_ff=3 * width, n_layers=LAYERS, vocab_size=vocabulary),
        "eager", TOKENS // length, length, GRID_WORST)
    for width, vocabulary, length in GRID}
BENCHED = ("qwen3", "gpt2", "mixtral", "deepseek_v3")  # families with rows of their own
QUICK = ("grid-128-8192-256", "grid-256-40960-1024", "test-packed", "gpt2-test")
STEPS = 10_000  # of a run that the steps measured here are the first of
OPTIMIZER = AdamWConfig()


def seconds(f) -> tuple[float, float]:
    """Of the wall clock, and of this process on all its threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    f()
    return time.perf_counter() - wall, time.process_time() - cpu


def batch_of(ids, documents=None) -> dict:
    """Inputs, and as labels the next tokens, but for the last one of each document."""
    labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], dim=1)
    if documents is None:
        return {"input_ids": ids, "labels": labels}
    last = documents[:, :-1] != documents[:, 1:]  # (B, T-1)
    labels[:, :-1] = labels[:, :-1].masked_fill(last, -100)
    return {"input_ids": ids, "labels": labels, "document_ids": documents}


def our_step(model: CausalLM, batch: dict, compiled: bool = False):
    """A function that trains `model` one step, as the Trainer does, and returns the mean loss."""
    config = TrainConfig(steps=STEPS, device="cpu", compile=compiled)
    step = TrainStep(NextTokenObjective(model.train()), config, OPTIMIZER,
                     ScheduleConfig(kind="constant", warmup_steps=0))
    batches = itertools.repeat(batch)

    def run() -> float:
        total, count = step(batches, 0).loss
        return float(total / count)

    return run


def their_step(model, ids, compiled: bool = False):
    """The same for transformers' model, with its own loss and one group for all weights."""
    optimizer = torch.optim.AdamW(
        model.train().parameters(), lr=OPTIMIZER.lr, betas=OPTIMIZER.betas,
        weight_decay=OPTIMIZER.weight_decay, fused=True)
    forward = torch.compile(model) if compiled else model

    def run() -> float:
        with autocast(CPU, DTYPE):
            loss = forward(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return run


def config_of(case: str):
    family, sizes, *_ = CASES[case]
    preset = "deepseek-test" if family == "deepseek_v3" else "test"
    return get_config(preset, family, **sizes)


def both(case: str):
    """The model as Skylar has it and as transformers opens it, and a batch of random tokens."""
    torch.manual_seed(0)
    torch.compiler.reset()
    ours = CausalLM(config_of(case))
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(ours, folder + "/model")
        theirs = AutoModelForCausalLM.from_pretrained(folder + "/model", dtype=torch.float32)
    theirs.config.use_cache = False
    *_, size, length, _ = CASES[case]
    return ours, theirs, torch.randint(ours.config.vocab_size, (size, length))


def faster_attention(theirs, run) -> str:
    """Set transformers' model to its faster attention, after a warm-up of each."""
    took = {}
    for name in ("sdpa", "eager"):
        theirs.set_attn_implementation(name)
        run()
        took[name] = min(seconds(run)[1] for _ in range(3))
    best = min(took, key=took.get)
    theirs.set_attn_implementation(best)
    return best


def turns(one, other, rounds: int, limit: float, warm: float) -> dict:
    """Median seconds of both, and ratios of paired rounds; the side that begins alternates.

    As many of `rounds` as fit into `limit` seconds, at least three; steps shorter than a tenth
    of a second are taken several at a time."""
    steps = max(1, round(0.1 / warm))
    sides, pairs, start = (one, other), [], time.perf_counter()
    while len(pairs) < rounds and (len(pairs) < 3 or time.perf_counter() - start < limit):
        order = (0, 1) if len(pairs) % 2 == 0 else (1, 0)
        took = {i: seconds(lambda: [sides[i]() for _ in range(steps)]) for i in order}  # noqa: B023
        pairs.append((took[0], took[1]))
    ratios = [b[0] / a[0] for a, b in pairs]
    return {
        "seconds": [round(statistics.median(p[i][0] for p in pairs) / steps, 4) for i in (0, 1)],
        "ratio": round(statistics.median(ratios), 3),
        "ratio_quartiles": [round(q, 3) for q in statistics.quantiles(ratios, n=4)],
        "cpu_ratio": round(statistics.median(b[1] / a[1] for a, b in pairs), 3),
        "rounds": len(pairs), "steps_per_round": steps}


def documents_of(size: int, length: int) -> torch.Tensor:
    """Document numbers of packed sequences: lengths of 20 to 500 tokens, always the same."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 500, (size, length), generator=generator)
    ends = lengths.cumsum(1)  # (B, T): far more documents than fit
    return (torch.arange(length)[None, :, None] >= ends[:, None, :]).sum(-1)


def fastest_experts(theirs, run, tokens: int) -> str | None:
    """Set transformers' sparse model to its fastest experts, after a warm-up of each.

    batched_mm copies the weights of a token's experts for each token: tried up to 2 GB of them."""
    config = theirs.config
    if not hasattr(config, "num_experts_per_tok"):
        return None
    width = getattr(config, "moe_intermediate_size", config.intermediate_size)
    copies = 3 * 4 * tokens * config.num_experts_per_tok * config.hidden_size * width
    took = {}
    for name in ("eager", "grouped_mm", *(("batched_mm",) if copies < 2e9 else ())):
        theirs.set_experts_implementation(name)
        run()
        took[name] = min(seconds(run)[1] for _ in range(3))
    print("transformers, CPU seconds a step:", {k: round(v, 3) for k, v in took.items()})
    best = min(took, key=took.get)
    theirs.set_experts_implementation(best)
    return best


def against_transformers(case: str, mode: str) -> tuple:
    """A step of each side, proved to do the same work, and transformers' kernels."""
    ours, theirs, ids = both(case)
    if hasattr(theirs.config, "router_aux_loss_coef"):  # with the balance loss, as ours
        theirs.config.output_router_logits = True
    compiled = mode == "compiled"
    mine, other = our_step(ours, batch_of(ids), compiled), their_step(theirs, ids, compiled)
    before = mine()
    first = other()
    assert abs(before - first) < 0.02, f"{case}: the losses differ: {before} and {first}"
    if compiled:
        return mine, other, {"transformers_attention": "sdpa"}
    chosen = {"transformers_attention": faster_attention(theirs, other)}
    if experts := fastest_experts(theirs, other, ids.numel()):
        chosen["transformers_experts"] = experts
    return mine, other, chosen


def packed_and_not(case: str) -> tuple:
    """A step with document borders and one without, both ours."""
    _, _, _, size, length, _ = CASES[case]
    torch.manual_seed(0)
    ids = torch.randint(config_of(case).vocab_size, (size, length))
    mine, other = (our_step(CausalLM(config_of(case)), batch_of(ids, d))
                   for d in (documents_of(size, length), None))
    return mine, other, {"transformers_attention": None}


def sparse_and_dense(case: str) -> tuple:
    """A step of a sparse model and one of the dense model of equal active parameters."""
    _, sizes, _, size, length, _ = CASES[case]
    sparse = config_of(case)
    dense = get_config("test", "llama3", **sizes | {"d_ff": sparse.top_k * sparse.d_ff})
    counts = {"parameters": count_parameters(sparse), "active": active_parameters(sparse),
              "dense_parameters": count_parameters(dense)}
    assert abs(counts["active"] / counts["dense_parameters"] - 1) < 0.01
    torch.manual_seed(0)
    ids = torch.randint(sparse.vocab_size, (size, length))
    mine, other = (our_step(CausalLM(config), batch_of(ids)) for config in (sparse, dense))
    return mine, other, counts


def measure(case: str, rounds: int, limit: float) -> dict:
    """One row."""
    family, _, mode, size, length, target = CASES[case]
    prepare = {"packed": packed_and_not, "dense": sparse_and_dense}.get(
        mode, lambda case: against_transformers(case, mode))
    mine, other, notes = prepare(case)
    for _ in range(2):
        warm = seconds(mine)[0], seconds(other)[0]
    took = turns(mine, other, rounds, limit, min(warm))
    ours, theirs = (round(size * length / s) for s in took.pop("seconds"))
    rival = {"packed": "unpacked", "dense": "dense"}.get(mode, "transformers") + "_tokens_per_s"
    row = {
        "case": case, "family": family, "mode": mode, "batch": f"{size} x {length}",
        "skylar_tokens_per_s": ours, rival: theirs, **took, "target": target,
        "met": took["ratio"] >= target, **notes}
    show(row)
    return row


def grid_summary(rows: list[dict]) -> dict:
    """Worst, median and best row of the grid."""
    grid = sorted((r for r in rows if r["case"].startswith("grid")), key=lambda r: r["ratio"])
    median = round(statistics.median(r["ratio"] for r in grid), 3)
    worst, best = ({k: r[k] for k in ("case", "ratio")} for r in (grid[0], grid[-1]))
    return {"rows": len(grid), "median": median, "target": GRID_MEDIAN,
            "met": median >= GRID_MEDIAN and worst["ratio"] >= GRID_WORST,
            "worst": worst | {"target": GRID_WORST}, "best": best}


def show_profile(case: str) -> None:
    """The operators that take most of a step, on both sides."""
    mine, other, chosen = against_transformers(case, "eager")
    for name, step in (("Skylar", mine), (f"transformers, {', '.join(chosen.values())}", other)):
        step()
        plain = statistics.median(seconds(step)[1] for _ in range(5))
        with profile(activities=[ProfilerActivity.CPU]) as watched:
            for _ in range(3):
                step()
        print(f"{case}, {name}: {1e3 * plain:.0f} ms of CPU time a step; under the profiler")
        events = sorted(watched.key_averages(), key=lambda e: -e.self_cpu_time_total)
        for event in events[:16]:
            print(f"  {event.key[:60]:60} {event.self_cpu_time_total / 3e3:8.1f} ms "
                  f"{event.count / 3:7.0f} calls")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=BENCHED, help="default: all")
    parser.add_argument("--only", default="", help="rows whose name begins so; writes no file")
    parser.add_argument("--rounds", type=int, default=11, help="at most, of each row")
    parser.add_argument("--limit", type=float, default=28, help="seconds of rounds a row")
    parser.add_argument("--quick", action="store_true", help="four rows, three rounds, no file")
    parser.add_argument("--dry", action="store_true", help="print the rows, write no file")
    parser.add_argument("--profile", metavar="CASE", help="where the time of a step goes")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.profile:
        return show_profile(args.profile)
    rounds = 3 if args.quick else args.rounds
    cases = [c for c in (QUICK if args.quick else CASES)
             if c.startswith(args.only) and args.family in (None, CASES[c][0])]
    rows = [measure(case, rounds, args.limit) for case in cases]
    summary = None
    if any(r["case"].startswith("grid") for r in rows):
        summary = grid_summary(rows)
        print(summary)
    if args.dry or args.quick or args.only:
        return
    for family in BENCHED if args.family is None else (args.family,):
        record(
            f"train_step_{family}", [r for r in rows if r["family"] == family],
            **({"grid": summary} if family == "qwen3" else {}),
            dtype=str(DTYPE).removeprefix("torch.") + " autocast, float32 weights",
            optimizer="fused AdamW, gradients clipped to 1, on both sides",
            layers_of_grid=LAYERS, threads=torch.get_num_threads(),
            cuda="not run: no GPU on the measuring machine")


if __name__ == "__main__":
    main()
