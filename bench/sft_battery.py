"""SmolLM2-135M before and after fine-tuning on grounded tasks: read, extract, classify, refuse.

    python bench/sft_battery.py                           # about six minutes of one core
    python bench/sft_battery.py --steps 4 --held-out 8 --dry   # a look; writes no file
    python bench/sft_battery.py --articles mine.json      # [{"title", "extract", "topic"}, ...]

Articles of an offline encyclopaedia become tasks whose answers a program can check
(skylar.posttrain.tasks); one article in ten is held out. The run is `skylar sft` with
configs/posttrain/sft_smollm2.yaml. Measured before and after: the thirteen fixed prompts of the
battery, tasks of held-out articles, and clean stops. Answers are greedy, at most 64 tokens.
Writes bench/results/sft_battery.json.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
import yaml
from common import ROOT, show, write

from skylar.posttrain.battery import Task, as_conversation, battery, replies, score
from skylar.posttrain.sft import SFTStage
from skylar.posttrain.stages import open_stage, train_stage
from skylar.posttrain.tasks import read_articles, split_tasks
from skylar.training.run import build_config, open_model

CONFIG = ROOT / "configs" / "posttrain" / "sft_smollm2.yaml"


def measured(where: str, held_out: list[Task]) -> dict:
    """Right answers and clean stops of a model, on both sets of tasks."""
    model, tokenizer, ends = open_model(where, dtype=torch.float32)
    found = {}
    for name, tasks in (("battery", battery()), ("held_out", held_out)):
        answers = replies(model, tokenizer, [t.messages for t in tasks], 64, eos_token_id=ends)
        found[name] = score(tasks, answers)
        found[f"{name}_answers"] = [a.text for a in answers][:13]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--articles")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--train", type=int, default=300, help="tasks of each kind")
    parser.add_argument("--held-out", type=int, default=12, help="tasks of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    train, held_out = split_tasks(
        read_articles(args.articles), args.train, args.held_out, args.seed)
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder, "tasks.jsonl"), Path(folder, "run")
        data.write_text("".join(json.dumps({"messages": as_conversation(t)}) + "\n"
                                for t in train))
        settings = yaml.safe_load(CONFIG.read_text())
        settings |= {"model": args.model, "data": str(data), "out": str(out)}
        if args.steps:
            settings["train"]["steps"] = args.steps
        before = measured(args.model, held_out)
        result = train_stage(open_stage(build_config(SFTStage, settings)))
        after = measured(str(out), held_out)
        last = next(r for r in reversed(result.rows) if "val_loss" in r)
    found = [{"model": "SmolLM2-135M-Instruct", **before},
             {"model": "fine-tuned", "steps": result.step, "val_loss": last["val_loss"], **after}]
    for row in found:
        show({k: v for k, v in row.items() if not k.endswith("_answers")})
    if not args.dry:
        print(write("sft_battery", found, tasks=len(train), held_out=len(held_out),
                    seed=args.seed))


if __name__ == "__main__":
    main()
