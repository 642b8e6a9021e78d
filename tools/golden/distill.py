"""The generalized Jensen-Shannon divergence of TRL's GKDTrainer, and the student's gradients.

`batchmean` divides by the tokens whose label is not -100, and there is no factor for the
temperature.
"""

import torch
from golden_trl import case, integers, numbers
from trl.experimental.gkd.gkd_trainer import GKDTrainer

WHEELS = {"trl": "1.16.0"}


def their_loss(student_logits, teacher_logits, labels, beta, temperature):
    return GKDTrainer.generalized_jsd_loss(
        student_logits, teacher_logits.detach(), labels=labels, beta=beta,
        temperature=temperature)


def cases():
    inputs = {
        "student_logits": numbers(2, 5, 7, seed=0), "teacher_logits": numbers(2, 5, 7, seed=1),
        "labels": integers(2, 5, seed=2, high=7)}
    inputs["labels"][0, :2] = inputs["labels"][1, 4] = -100
    far = inputs | {"teacher_logits": numbers(2, 5, 7, seed=3, scale=8.0)}
    settings = {"forward_kl": 0.0, "jsd_low": 0.1, "jsd": 0.5, "jsd_high": 0.9, "reverse_kl": 1.0}
    for name, beta in settings.items():
        case(name, inputs | {"beta": beta, "temperature": 1.0}, their_loss)
        case(f"{name}_warm", inputs | {"beta": beta, "temperature": 2.5}, their_loss)
        case(f"{name}_far", far | {"beta": beta, "temperature": 1.0}, their_loss)
    nothing = inputs | {"labels": torch.full((2, 5), -100)}
    case("no_valid_token", nothing | {"beta": 0.5, "temperature": 1.0}, their_loss)
