"""PPO of TRL 0.11.4, the last wheel whose trainer has rewards, advantages and loss as methods.

That wheel does not import beside a current transformers, and its methods need nothing of it:
their source is taken out of the installed file and compiled alone.
"""

import ast
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Optional  # noqa: F401  (names that the taken source reads)

import torch
import torch.nn.functional as F  # noqa: F401
from golden_trl import case, numbers

WHEELS = {"trl": "0.11.4"}

METHODS = ("compute_rewards", "_kl_penalty", "compute_advantages", "loss")
FUNCTIONS = ("masked_mean", "masked_var", "masked_whiten", "clip_by_value",
             "entropy_from_logits")
# no case with whitened rewards: that version whitens what lies behind the end, too, and lets it
# into the advantages; later ones set it to zero, as we do
SETTINGS = {"plain": {}, "short_horizon": {"gamma": 0.9, "lam": 0.5},
            "reward_to_go": {"gamma": 1.0, "lam": 1.0}}


def taken(path: Path, names: tuple, namespace: dict) -> dict:
    """Functions or methods of a file by name, compiled without the rest of it."""
    tree = ast.parse(path.read_text())
    found = [node for node in ast.walk(tree)
             if isinstance(node, ast.FunctionDef) and node.name in names]
    if {node.name for node in found} != set(names):
        raise ValueError(f"{path} lacks one of {names}")
    for node in found:
        node.decorator_list = []
    exec(compile(ast.Module(found, []), str(path), "exec"), namespace)
    return {name: namespace[name] for name in names}


def trainer(gamma=1.0, lam=0.95):
    """An object with TRL's methods and settings."""
    package = Path(importlib.util.find_spec("trl").origin).parent
    namespace = dict(globals()) | {"flatten_dict": lambda stats: stats}
    taken(package / "core.py", FUNCTIONS, namespace)
    methods = taken(package / "trainer" / "ppo_trainer.py", METHODS, namespace)
    kind = type("Trainer", (), methods)
    found = kind()
    found.kl_ctl = SimpleNamespace(value=0.05)
    found.config = SimpleNamespace(
        kl_penalty="kl", whiten_rewards=False, gamma=gamma, lam=lam, cliprange=0.2,
        cliprange_value=0.2, vf_coef=0.1, ratio_threshold=10.0)
    return found


def their_loss(logprobs, values, scores, old_logprobs, ref_logprobs, old_values, mask,
               **settings):
    found = trainer(**settings)
    with torch.no_grad():
        rewards, _, _ = found.compute_rewards(scores, old_logprobs, ref_logprobs, mask)
        kept, advantages, returns = found.compute_advantages(old_values, rewards, mask)
    logits = torch.zeros(*mask.shape, 3, dtype=logprobs.dtype)  # only of its statistics
    policy, value, _ = found.loss(old_logprobs.detach(), kept, logits, values, logprobs, mask,
                                  advantages, returns)
    return {"loss": policy + value, "policy_loss": policy, "value_loss": value,
            "rewards": rewards * mask, "advantages": advantages * mask,
            "returns": returns * mask}


def cases():
    lengths = torch.tensor([7, 3, 5, 2])
    steps = torch.arange(7)
    mask = ((steps >= 1) & (steps < lengths[:, None])).long()  # one column is of the prompt
    old = -numbers(4, 7, seed=0).abs() - 0.1
    inputs = {
        "logprobs": old + numbers(4, 7, seed=1, scale=0.3), "values": numbers(4, 7, seed=2),
        "scores": numbers(4, seed=3), "old_logprobs": old,
        "ref_logprobs": old + numbers(4, 7, seed=4, scale=0.3),
        "old_values": numbers(4, 7, seed=5), "mask": mask}
    for name, settings in SETTINGS.items():
        case(name, inputs | settings, their_loss)
