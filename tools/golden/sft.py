"""The loss of supervised fine-tuning: negative log-likelihoods over all micro-batches.

TRL's SFTTrainer gives the model `num_items_in_batch`, the number of labels of all micro-batches
and ranks; the model's loss is the sum of this micro-batch divided by it.
"""

import torch
from golden_trl import case, integers, numbers
from transformers.loss.loss_utils import ForCausalLMLoss

WHEELS = {"transformers": "5.23.0"}


def their_loss(logits, labels, num_items_in_batch):
    # given as a tensor: transformers moves it to the loss's device
    n = None if num_items_in_batch is None else torch.tensor(num_items_in_batch)
    return ForCausalLMLoss(logits, labels, logits.shape[-1], num_items_in_batch=n)


def cases():
    logits = numbers(2, 6, 11, seed=0)
    labels = integers(2, 6, seed=1, high=11)
    labels[0, :3] = labels[1, 0] = labels[1, 4] = -100
    case("mean_of_one_batch", {"logits": logits, "labels": labels,
                               "num_items_in_batch": None}, their_loss)
    case("share_of_20_tokens", {"logits": logits, "labels": labels,
                                "num_items_in_batch": 20}, their_loss)
