"""Preference losses: DPO with its variants, ORPO, CPO and SimPO, KTO; from TRL's own trainers.

Trainers are not built: their methods are called on a stand-in that has the attributes which the
method reads. Where a method calls a model, it gets one that returns stored log-probabilities.
Cases on sums of log-probabilities hold the loss functions alone; those on logits hold masks,
shifts and averages, too.
"""

import types
from collections import defaultdict
from types import SimpleNamespace

import torch
from golden_trl import case, integers, numbers
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

WHEELS = {"trl": "1.16.0"}

CPU = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x,
                      gather_for_metrics=lambda x: x)


def trainer(**attributes) -> SimpleNamespace:
    """What the methods read of a trainer."""
    common = dict(
        model=SimpleNamespace(training=True), accelerator=CPU, aux_loss_enabled=False,
        ld_alpha=None, precompute_ref_logps=True, use_weighting=False, label_smoothing=0.0,
        f_divergence_type="reverse_kl", loss_weights=[1.0], _total_train_tokens=0, _tp_size=1,
        _metrics=defaultdict(lambda: defaultdict(list)), calculate_KL=True,
        desirable_weight=1.0, undesirable_weight=1.0, alpha=0.0,
        args=SimpleNamespace(discopop_tau=0.05, gradient_checkpointing_kwargs=None))
    return SimpleNamespace(**common | attributes)


def outputs(log_probs: torch.Tensor) -> SimpleNamespace:
    """Of a model with a fused head; what is only logged is zero."""
    nothing = torch.zeros_like(log_probs).detach()
    return SimpleNamespace(log_probs=log_probs, entropy=nothing, mean_logits=nothing,
                           is_top1=nothing.bool(), log_sum_sq_probs=nothing)


def label_logprobs(logits, labels):
    """(B, T - 1) log-probabilities of `labels[:, 1:]`, 0 where they are -100."""
    labels = labels[:, 1:]
    found = logits[:, :-1].log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    return found.masked_fill(labels == -100, 0.0)


def dpo_loss(log_probs, completion_mask, reference, beta, kind, label_smoothing):
    """`_compute_loss` of a batch [chosen, rejected]."""
    self = trainer(beta=beta, loss_types=[kind], label_smoothing=label_smoothing)
    batch = {"input_ids": torch.zeros_like(completion_mask), "completion_mask": completion_mask,
             "attention_mask": torch.ones_like(completion_mask),
             "ref_chosen_logps": reference[0], "ref_rejected_logps": reference[1]}
    return DPOTrainer._compute_loss(self, lambda **inputs: outputs(log_probs), batch, False)


def dpo_of_sums(logps, lengths, reference, beta, kind, label_smoothing=0.0):
    """On (2, B) sums: each is written as the log-probability of the first answer token."""
    width = int(lengths.max()) + 1
    mask = (torch.arange(width) >= 1) & (torch.arange(width) <= lengths.view(-1, 1))
    first = torch.zeros(width - 1, dtype=logps.dtype)
    first[0] = 1.0
    return dpo_loss(logps.view(-1, 1) * first, mask.long(), reference, beta, kind, label_smoothing)


def dpo_of_logits(logits, input_ids, completion_mask, reference, beta, kind):
    labels = input_ids.masked_fill(completion_mask == 0, -100)
    return dpo_loss(label_logprobs(logits, labels), completion_mask, reference, beta, kind, 0.0)


def orpo_of_sums(logps, lengths, beta):
    """The odds-ratio term alone."""
    self = trainer(beta=beta)
    losses = ORPOTrainer.odds_ratio_loss(self, *(logps / lengths))[0]
    return -losses.mean()


def answer_batch(input_ids, completion_mask, attention_mask):
    labels = input_ids.masked_fill(completion_mask == 0, -100)
    half = len(labels) // 2
    batch = {}
    for name, part in (("chosen", slice(None, half)), ("rejected", slice(half, None))):
        batch |= {f"{name}_input_ids": input_ids[part], f"{name}_labels": labels[part],
                  f"{name}_attention_mask": attention_mask[part]}
    return batch


def with_methods(cls, *names, **attributes):
    """A stand-in with some of the trainer's own methods."""
    self = trainer(is_encoder_decoder=False, padding_value=0, pad_token_id=0, **attributes)
    for name in names:
        found = cls.__dict__[name]
        static = isinstance(found, staticmethod)
        setattr(self, name, found.__func__ if static else types.MethodType(found, self))
    return self


PAIRED = ("concatenated_inputs", "concatenated_forward", "get_batch_logps")


def orpo_of_logits(logits, input_ids, completion_mask, attention_mask, beta):
    """The whole loss, with the cross-entropy of prompt and chosen answer."""
    self = with_methods(ORPOTrainer, *PAIRED, "odds_ratio_loss", beta=beta)
    batch = answer_batch(input_ids, completion_mask, attention_mask)

    def model(*args, **kwargs):
        return SimpleNamespace(logits=logits)

    return ORPOTrainer.get_batch_loss_metrics(self, model, batch)[0]


def cpo_of_sums(logps, lengths, beta, gamma, kind):
    self = trainer(beta=beta, loss_type=kind, simpo_gamma=gamma)
    given = logps / lengths if kind in ("simpo", "ipo") else logps
    return CPOTrainer.cpo_loss(self, *given)[0].mean()


def simpo_of_logits(logits, input_ids, completion_mask, attention_mask, beta, gamma):
    self = with_methods(CPOTrainer, *PAIRED, "cpo_loss", beta=beta, loss_type="simpo",
                        simpo_gamma=gamma, cpo_alpha=0.0)
    batch = answer_batch(input_ids, completion_mask, attention_mask)

    def model(*args, **kwargs):
        return SimpleNamespace(logits=logits)

    return CPOTrainer.get_batch_loss_metrics(self, model, batch)[0]


def kto_of_logits(logits, mismatched_logits, input_ids, mismatched_ids, completion_mask,
                  mismatched_mask, reference, mismatched_reference, desirable, beta,
                  desirable_weight, undesirable_weight):
    self = trainer(beta=beta, loss_type="kto", desirable_weight=desirable_weight,
                   undesirable_weight=undesirable_weight)
    self._compute_kl_logps = types.MethodType(KTOTrainer._compute_kl_logps, self)
    assert not torch.equal(input_ids, mismatched_ids)
    batch = {"input_ids": input_ids, "completion_mask": completion_mask,
             "attention_mask": torch.ones_like(input_ids), "KL_input_ids": mismatched_ids,
             "KL_completion_mask": mismatched_mask,
             "KL_attention_mask": torch.ones_like(mismatched_ids), "label": desirable,
             "ref_logps": reference, "ref_KL_logps": mismatched_reference}

    def model(input_ids, labels, **kwargs):
        chosen = mismatched_logits if input_ids is mismatched_ids else logits
        return outputs(label_logprobs(chosen, labels))

    return KTOTrainer._compute_loss(self, model, batch, False)


DPO = {  # our name of the case -> TRL's loss_type
    "dpo_sigmoid": "sigmoid", "dpo_ipo": "ipo", "dpo_hinge": "hinge", "dpo_exo": "exo_pair",
    "dpo_nca": "nca_pair", "dpo_robust": "robust", "dpo_bco": "bco_pair",
    "dpo_sppo": "sppo_hard", "dpo_aot": "aot", "dpo_aot_unpaired": "aot_unpaired",
    "dpo_apo_zero": "apo_zero", "dpo_apo_down": "apo_down", "dpo_discopop": "discopop",
    "dpo_sigmoid_norm": "sigmoid_norm",
}


def cases():
    B, T, V = 3, 8, 13
    logps = -numbers(2, B, seed=0).abs() * 3 - 1
    reference = -numbers(2, B, seed=1).abs() * 3 - 1
    lengths = torch.tensor([[3, 5, 2], [4, 2, 6]])
    sums = {"logps": logps, "lengths": lengths}
    for name, kind in DPO.items():
        smoothing = {"label_smoothing": 0.1} if kind in ("robust", "exo_pair") else {}
        case(name, {**sums, "reference": reference, "beta": 0.5, "kind": kind, **smoothing},
             dpo_of_sums)
    case("orpo", {**sums, "beta": 0.1}, orpo_of_sums)
    for kind in ("simpo", "sigmoid", "hinge"):
        name = kind if kind == "simpo" else f"cpo_{kind}"
        case(name, {**sums, "beta": 2.0, "gamma": 0.5, "kind": kind}, cpo_of_sums)

    logits, ids = numbers(2 * B, T, V, seed=2), integers(2 * B, T, seed=3, low=1, high=V)
    ids[B:, :2] = ids[:B, :2]  # one prompt for both
    ends = torch.tensor([8, 5, 6, 7, 8, 4])  # tokens of each row
    place = torch.arange(T)
    attention = (place < ends[:, None]).long()
    completion = attention * (place >= 2)
    ids = ids * attention
    rows = {"logits": logits, "input_ids": ids, "completion_mask": completion}
    flat = reference.flatten()
    for name in ("dpo_sigmoid", "dpo_ipo"):
        case(f"{name}_logits", {**rows, "reference": reference, "beta": 0.5, "kind": DPO[name]},
             dpo_of_logits)
    case("orpo_logits", {**rows, "attention_mask": attention, "beta": 0.1}, orpo_of_logits)
    case("simpo_logits", {**rows, "attention_mask": attention, "beta": 2.0, "gamma": 0.5},
         simpo_of_logits)
    mismatched = ids.roll(1, 0)
    mismatched[:, :2] = ids[:, :2]
    for name, low in (("kto", 0.0), ("kto_baseline_zero", 100.0)):
        case(name, {
            "logits": logits, "mismatched_logits": numbers(2 * B, T, V, seed=4),
            "input_ids": ids, "mismatched_ids": mismatched, "completion_mask": completion,
            "mismatched_mask": completion.roll(1, 0), "reference": flat,
            "mismatched_reference": -40.0 - flat.flip(0).abs() + low,
            "desirable": torch.tensor([True] * B + [False] * B), "beta": 0.1,
            "desirable_weight": 1.0, "undesirable_weight": 1.33}, kto_of_logits)
