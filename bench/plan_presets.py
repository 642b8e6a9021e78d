"""The planner's row for every recipe in configs/ that names a mesh. Nothing is run on a GPU.

    python bench/plan_presets.py             # minutes
    python bench/plan_presets.py --sparse    # models with experts instead of the dense ones
    python bench/plan_presets.py --dry       # the smallest recipe, prints, writes no file

A recipe says `# mesh: 80 x h100`. Writes bench/results/plan_presets.json for the planning lesson,
plan_sparse.json for that of expert parallelism.
"""

import argparse
import re

import yaml
from common import ROOT, record

from skylar.models.presets import DENSE
from skylar.training.planner import Plan, plan_row, predict, verdict
from skylar.training.run import RunConfig, build_config


def recipes(sparse: bool) -> list[tuple[str, RunConfig, int, str]]:
    """(file name, config, how many, of which accelerator), the fewest first."""
    found = []
    for path in (ROOT / "configs").glob("*.yaml"):
        text = path.read_text()
        if mesh := re.search(r"^# mesh: (\d+) x (\S+)$", text, re.MULTILINE):
            config = build_config(RunConfig, yaml.safe_load(text))
            if (config.preset not in DENSE) == sparse:
                found.append((path.name, config, int(mesh[1]), mesh[2]))
    return sorted(found, key=lambda recipe: (recipe[2], recipe[1].preset))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry", action="store_true", help="one recipe, no file")
    parser.add_argument("--sparse", action="store_true", help="models with experts")
    options = parser.parse_args()
    dry, chosen, rows = options.dry, recipes(options.sparse), []
    chosen = chosen[:1] if dry else chosen
    memories = predict([(config, gpus) for _, config, gpus, _ in chosen])
    for (name, config, gpus, gpu), memory in zip(chosen, memories):
        plan = Plan(config=config, gpus=gpus, gpu=gpu, memory=memory)
        tokens = (config.loader.batch_size * config.loader.seq_len
                  * config.train.grad_accum_steps * config.train.steps)
        rows.append({"recipe": name, **plan_row(plan, tokens=tokens), "verdict": verdict(plan),
                     "at_peak_gib": {phase: {k: round(v / 2**30, 3) for k, v in kinds.items()}
                                     for phase, kinds in plan.memory["phases"].items()}})
        print({k: rows[-1][k] for k in ("recipe", "need_gib", "fits", "days")}, flush=True)
    if not dry:
        name = "plan_sparse" if options.sparse else "plan_presets"
        print(record(name, rows, unit="GiB of each GPU; plans, never run"))


if __name__ == "__main__":
    main()
