"""Peak memory and seconds of a distillation step beside TRL's, at a vocabulary of 49,152.

    python bench/distill_memory.py --theirs /tmp/trl/bin/python      # both libraries
    python bench/distill_memory.py --rounds 1                        # ours alone

Student and teacher have the shape of SmolLM2-135M with two and four blocks and random weights;
8 sequences of 512 tokens, float32, JSD with beta 0.5. Ours: `DistillObjective`. Theirs:
`GKDTrainer.generalized_jsd_loss` on the logits of both models (TRL's experimental trainer), and
the chunked loss of `DistillationTrainer`. Every measurement is a process of its own that this one
starts: a forward and backward pass three times, the median of the last two and the most memory
that the process ever had, less what it had with both models in memory. `--theirs` is a Python that
has trl 1.16.0 and transformers. Writes bench/results/distill_memory.json.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

V, B, T = 49_152, 8, 512
SHAPE = dict(hidden_size=576, intermediate_size=1536, num_attention_heads=9,
             num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True)
SIDES = ("ours", "trl gkd", "trl chunked")


def peak_mb() -> float:
    """Most memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def our_step():
    import torch

    from skylar.models.decoder import CausalLM
    from skylar.models.families.llama3 import Llama3Config
    from skylar.posttrain.distill import DistillConfig, DistillObjective

    def model(n_layers: int):
        return CausalLM(Llama3Config(
            vocab_size=V, d_model=576, n_heads=9, n_kv_heads=3, n_layers=n_layers, d_ff=1536,
            max_seq_len=2048, tie_embeddings=True))

    objective = DistillObjective(model(2), model(4), DistillConfig(divergence="jsd"))
    ids = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}

    def step():
        out = objective(batch)
        (out.loss_sum / out.n_valid).backward()
        objective.zero_grad()

    return step


def their_step(chunked: bool):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    student, teacher = (LlamaForCausalLM(LlamaConfig(
        vocab_size=V, num_hidden_layers=n, **SHAPE)) for n in (2, 4))
    teacher.requires_grad_(False).eval()
    ids = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(0))

    def plain():
        from trl.experimental.gkd.gkd_trainer import GKDTrainer

        ours = student(input_ids=ids[:, :-1]).logits
        with torch.no_grad():
            theirs = teacher(input_ids=ids[:, :-1]).logits
        return GKDTrainer.generalized_jsd_loss(ours, theirs, labels=ids[:, 1:], beta=0.5)

    def in_chunks():
        from trl.trainer.distillation_trainer import _chunked_divergence_loss

        ours = student.model(input_ids=ids[:, :-1]).last_hidden_state
        with torch.no_grad():
            theirs = teacher.model(input_ids=ids[:, :-1]).last_hidden_state
        return _chunked_divergence_loss(
            ours, theirs, student.lm_head.weight, teacher.lm_head.weight,
            torch.ones_like(ids[:, 1:]), 0.5)[0]

    def step():
        (in_chunks if chunked else plain)().backward()
        student.zero_grad()

    return step


def measure(side: str) -> dict:
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    torch.manual_seed(0)
    step = our_step() if side == "ours" else their_step(side == "trl chunked")
    before, seconds = peak_mb(), []
    for _ in range(3):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds[1:]), "peak_mb": peak_mb() - before}


def child(python: str, side: str) -> dict:
    tree = str(Path(__file__).resolve().parents[1]) if side == "ours" else ""
    environment = os.environ | {"PYTHONPATH": tree}
    done = subprocess.run([python, __file__, "--side", side], env=environment,
                          capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{side}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--theirs", help="a Python with trl")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return print(json.dumps(measure(args.side)))
    sides = SIDES if args.theirs else SIDES[:1]
    runs: dict[str, list[dict]] = {side: [] for side in sides}
    for _ in range(args.rounds):
        for side in sides:
            runs[side].append(child(sys.executable if side == "ours" else args.theirs, side))
    rows = [{"side": side, **{key: round(statistics.median(r[key] for r in found), 2)
                              for key in ("seconds", "peak_mb")}} for side, found in runs.items()]
    for row in rows[1:]:
        row["ours_over_theirs_mb"] = round(rows[0]["peak_mb"] / row["peak_mb"], 3)
        row["theirs_over_ours_s"] = round(row["seconds"] / rows[0]["seconds"], 2)
    if not args.theirs:
        return print(*rows, sep="\n")
    from common import record

    record("distill_memory", rows, vocabulary=V, tokens=B * T)


if __name__ == "__main__":
    main()
