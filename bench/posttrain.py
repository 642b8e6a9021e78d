"""Steps of post-training beside TRL's: seconds and peak memory, same model, data and processor.

    python bench/posttrain.py --theirs /tmp/trl/bin/python              # all stages
    python bench/posttrain.py --theirs ... --stages sft dpo --rounds 3
    python bench/posttrain.py --stages sft --steps 2 --dry              # ours alone, a look

`--theirs` is a Python that has trl 1.16.0. For every stage the two sides run in turn, each in a
process of its own that this one starts, `--rounds` times; a side gets the same rows of a step, the
same precision and as many threads. A step's time is the median without the first two. Reported is
the median over rounds, and the ratio of the two. Peak memory is the process's maximum. Their
gradient checkpointing is off, for it trades time for memory; their defaults are kept otherwise.
Both pack in "sft packed" (best fit decreasing), and both compute the reference's log-probabilities
before the first step in "dpo precomputed", which is our default and an option of theirs.
GRPO's steps hold rollouts and the update. Writes bench/results/posttrain.json.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROWS, LENGTH, ANSWERS, NEW_TOKENS = 8, 256, 4, 32  # rows a step; tokens; GRPO's group, its length
STAGES = ("sft", "sft packed", "dpo", "dpo precomputed", "orpo", "grpo")


# --- what both sides read ---


def write_data(folder: Path, model: str, n: int) -> None:
    """The model as a Hugging Face folder, conversations, pairs and prompts."""
    import torch

    from skylar.data.dialogues import play_dialogues
    from skylar.data.held_out import train_plays
    from skylar.models.hub import save_pretrained
    from skylar.training.run import open_model

    lm, tokenizer, _ = open_model(model, dtype=torch.float32)
    save_pretrained(lm, folder / "model", tokenizer)
    chats = [c.messages for c in play_dialogues(train_plays(), max_turns=2)
             if 40 <= len(tokenizer.chat(c.messages)) < LENGTH][:n]
    others = chats[1:] + chats[:1]
    rows = {
        "sft": [{"prompt": c[:-1], "completion": c[-1:]} for c in chats],
        "pairs": [{"prompt": c[:-1], "chosen": c[-1:], "rejected": o[-1:]}
                  for c, o in zip(chats, others) if c[-1] != o[-1]],
        "prompts": [{"prompt": c[-2]["content"], "answer": "x"} for c in chats]}
    for name, found in rows.items():
        lines = "".join(json.dumps(row) + "\n" for row in found)
        (folder / f"{name}.jsonl").write_text(lines)


# --- one side, in a process of its own ---


def times_of(stamps: list[float]) -> list[float]:
    return [b - a for a, b in zip(stamps, stamps[1:])]


def ours(stage: str, folder: Path, steps: int) -> list[float]:
    """Seconds of each step of `skylar sft`, `preference` or `grpo`."""
    from importlib import import_module

    from skylar.posttrain.stages import open_stage, train_stage
    from skylar.training.run import build_config

    name = {"sft packed": "sft", "grpo": "grpo", "sft": "sft"}.get(stage, "preference")
    module, kind, data = {
        "sft": ("skylar.posttrain.sft", "SFTStage", "sft"),
        "preference": ("skylar.posttrain.preference_stages", "PreferenceStage", "pairs"),
        "grpo": ("skylar.posttrain.rl_stages", "GRPOStage", "prompts")}[name]
    settings = {
        "model": str(folder / "model"), "data": str(folder / f"{data}.jsonl"),
        "out": str(folder / f"run-{time.time_ns()}"), "bad_rows": "skip", "val_fraction": 0.0,
        "train": {"steps": steps, "log_every": 1, "eval_every": 0, "save_every": 0,
                  "dtype": "bfloat16", "device": "cpu", "async_save": False},
        "optimizer": {"lr": 1e-6, "weight_decay": 0.0}}
    settings["loader"] = {"batch_size": ROWS, "seq_len": LENGTH}
    if name == "sft":
        settings["sft"] = {"pack": stage == "sft packed"}
    if name == "preference":
        settings |= {"preference": {"loss": stage.split()[0]},
                     "precompute": stage == "dpo precomputed"}
    if name == "grpo":
        settings["rollout"] = {"prompts": ROWS // ANSWERS, "n": ANSWERS,
                               "max_new_tokens": NEW_TOKENS}
    config = build_config(getattr(import_module(module), kind), settings)
    stamps = []
    train_stage(open_stage(config), (lambda row: stamps.append(time.perf_counter()),), quiet=True)
    return times_of(stamps)


def theirs(stage: str, folder: Path, steps: int) -> list[float]:
    """Seconds of each step of TRL's trainers."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    stamps = []

    class Stamps(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            stamps.append(time.perf_counter())

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    name = {"sft": "sft", "sft packed": "sft", "grpo": "prompts"}.get(stage, "pairs")
    rows = [json.loads(x) for x in (folder / f"{name}.jsonl").read_text().splitlines()]
    if stage == "grpo":  # ours makes a message of a prompt
        rows = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    common = dict(
        output_dir=str(folder / "theirs"), max_steps=steps, per_device_train_batch_size=ROWS,
        learning_rate=1e-6, bf16=True, use_cpu=True, report_to=[], save_strategy="no",
        logging_strategy="no", gradient_checkpointing=False, optim="adamw_torch_fused",
        dataloader_pin_memory=False)
    trainer = trainer_of(stage, common)(
        model=model, processing_class=tokenizer, train_dataset=Dataset.from_list(rows),
        callbacks=[Stamps()])
    trainer.train()
    return times_of(stamps)


def trainer_of(stage: str, common: dict):
    """A TRL trainer that lacks model, tokenizer and data."""
    from functools import partial

    if stage.startswith("sft"):
        from trl import SFTConfig, SFTTrainer

        return partial(SFTTrainer, args=SFTConfig(
            max_length=LENGTH, packing=stage == "sft packed", **common))
    if stage.startswith("dpo"):
        from trl import DPOConfig, DPOTrainer

        return partial(DPOTrainer, args=DPOConfig(
            beta=0.1, max_length=LENGTH, precompute_ref_log_probs=stage == "dpo precomputed",
            **common))
    if stage == "orpo":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        return partial(ORPOTrainer, args=ORPOConfig(beta=0.1, max_length=LENGTH, **common))
    from trl import GRPOConfig, GRPOTrainer

    return partial(GRPOTrainer, args=GRPOConfig(
        num_generations=ANSWERS, max_completion_length=NEW_TOKENS, **common),
        reward_funcs=lambda completions, **kw: [float(len(str(c))) for c in completions])


def child(side: str, stage: str, folder: Path, steps: int) -> None:
    sys.path.remove(str(ROOT / "bench"))  # whose peft.py is not the library of this name
    seconds = {"ours": ours, "theirs": theirs}[side](stage, folder, steps)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3  # kB on Linux
    print("RESULT " + json.dumps({"seconds": seconds, "peak_mb": peak}))


# --- the comparison ---


def run(python: str, side: str, stage: str, folder: Path, args) -> dict:
    command = [python, __file__, "--child", side, "--stages", stage, "--folder", str(folder),
               "--steps", str(args.steps)]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "TOKENIZERS_PARALLELISM":
                                "false", "HF_HUB_OFFLINE": "1"}
    if side == "ours":
        environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
    if done.returncode or not lines:
        raise RuntimeError(f"{side}, {stage}: {done.stderr.strip()[-2000:]}")
    found = json.loads(lines[-1].removeprefix("RESULT "))
    return {"seconds": statistics.median(found["seconds"][1:] or found["seconds"]),
            "peak_mb": found["peak_mb"]}


def compare(stage: str, folder: Path, args) -> dict:
    sides = {"ours": sys.executable} | ({"theirs": args.theirs} if args.theirs else {})
    rounds = {side: [] for side in sides}
    for _ in range(args.rounds):
        for side, python in sides.items():
            rounds[side].append(run(python, side, stage, folder, args))
    row = {"stage": stage, "rows": ROWS, "steps": args.steps, "threads": args.threads}
    for side, found in rounds.items():
        for key in ("seconds", "peak_mb"):
            row[f"{side}_{key}"] = statistics.median(r[key] for r in found)
    if args.theirs:
        row["times_faster"] = row["theirs_seconds"] / row["ours_seconds"]
        row["share_of_memory"] = row["ours_peak_mb"] / row["theirs_peak_mb"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--theirs", help="a Python with trl")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--stages", nargs="*", default=list(STAGES), choices=STAGES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--child", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child, args.stages[0], args.folder, args.steps)
    from common import show, write

    rows = []
    with tempfile.TemporaryDirectory() as name:
        write_data(Path(name), args.model, ROWS * (args.steps + 2))
        for stage in args.stages:
            rows.append(compare(stage, Path(name), args))
            show(rows[-1])
    if not args.dry:
        print(write("posttrain", rows, model=args.model, theirs="trl 1.16.0"))


if __name__ == "__main__":
    main()
