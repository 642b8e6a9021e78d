"""Every loss of TRL's GRPOTrainer, from its own `_compute_loss`, without a model.

The method takes log-probabilities from `self._get_per_token_logps_and_entropies`; here they are
inputs. Nothing else of a trainer is needed but its settings.
"""

from collections import defaultdict
from types import SimpleNamespace

import torch
from golden_trl import case, numbers
from trl.trainer.grpo_trainer import GRPOTrainer

WHEELS = {"trl": "1.16.0"}

SETTINGS = dict(  # loss -> what differs from the defaults below
    grpo={}, bnpo={}, dr_grpo={}, dapo={}, cispo={"epsilon_high": 5.0}, sapo={}, vespo={},
    luspo={"level": "sequence"},
    gspo={"loss_type": "grpo", "level": "sequence", "epsilon": 3e-2, "epsilon_high": 4e-2},
    grpo_two_sided={"loss_type": "grpo", "delta": 1.5},
    dapo_clip_higher={"loss_type": "dapo", "epsilon_high": 0.28},
    grpo_kl={"loss_type": "grpo", "beta": 0.1},
    dapo_kl_unbiased={"loss_type": "dapo", "beta": 0.1, "unbiased_kl": True},
    gspo_kl={"loss_type": "grpo", "level": "sequence", "beta": 0.1},
    dapo_sampler={"loss_type": "dapo", "sampler": True},
)


def trainer(loss_type, level, epsilon, epsilon_high, delta, beta, unbiased_kl, sampler):
    """A GRPOTrainer that has nothing but what `_compute_loss` reads."""
    found = GRPOTrainer.__new__(GRPOTrainer)
    settings = dict(
        loss_type=loss_type, importance_sampling_level=level, beta=beta, epsilon_low=epsilon,
        epsilon_high=epsilon if epsilon_high is None else epsilon_high,
        max_completion_length=8, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        use_vllm=sampler, vllm_importance_sampling_correction=sampler, aux_loss_enabled=False,
        _entropy_bonus_enabled=False, current_gradient_accumulation_steps=1,
        model=SimpleNamespace(training=True),
        _metrics=defaultdict(lambda: defaultdict(list)),
        args=SimpleNamespace(
            delta=delta, use_bias_correction_kl=unbiased_kl, steps_per_generation=1,
            sapo_temperature_neg=1.05, sapo_temperature_pos=1.0, vespo_k_pos=2.0,
            vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0),
        accelerator=SimpleNamespace(
            num_processes=1, reduce=lambda x, reduction: x, gather=lambda x: x,
            gather_for_metrics=lambda x: x))
    for name, value in settings.items():
        object.__setattr__(found, name, value)
    return found


def their_loss(logprobs, old_logprobs, ref_logprobs, sampler_logprobs, advantages, mask,
               loss_type, level="token", epsilon=0.2, epsilon_high=None, delta=None, beta=0.0,
               unbiased_kl=False, sampler=False):
    found = trainer(loss_type, level, epsilon, epsilon_high, delta, beta, unbiased_kl, sampler)
    logps = lambda *args, **kwargs: (logprobs, torch.zeros_like(logprobs), None)  # noqa: E731
    object.__setattr__(found, "_get_per_token_logps_and_entropies", logps)
    prompt = torch.ones(len(mask), 2, dtype=torch.long)
    inputs = {
        "prompt_ids": prompt, "prompt_mask": prompt, "completion_ids": mask,
        "completion_mask": mask, "advantages": advantages, "old_per_token_logps": old_logprobs,
        "ref_per_token_logps": ref_logprobs, "num_items_in_batch": mask.sum()}
    if sampler:  # truncated importance sampling, mode token_truncate
        ratio = (old_logprobs - sampler_logprobs).detach().exp().clamp(max=2.0)
        inputs["importance_sampling_ratio"] = ratio
    return found._compute_loss(None, inputs)


def cases():
    lengths = torch.tensor([6, 1, 4, 2, 5, 3])
    mask = (torch.arange(6) < lengths[:, None]).long()
    logprobs = -numbers(6, 6, seed=0).abs() - 0.1
    inputs = {
        "logprobs": logprobs, "old_logprobs": logprobs + numbers(6, 6, seed=1, scale=0.3),
        "ref_logprobs": logprobs + numbers(6, 6, seed=2, scale=0.3),
        "sampler_logprobs": logprobs + numbers(6, 6, seed=3, scale=0.5),
        "advantages": torch.tensor([1.0, -1.0, 0.5, -0.5, 0.0, 2.0], dtype=torch.float64),
        "mask": mask}
    for name, changes in SETTINGS.items():
        case(name, inputs | {"loss_type": name} | changes, their_loss)
