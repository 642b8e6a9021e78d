"""Preference optimization: equal to TRL's stored values and to plain code, whatever the batch."""

import math

import pytest
import torch
import torch.nn.functional as F
from golden_cases import golden
from test_pairs import random_pairs
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from skylar.data.pairs import ExampleLoader, Pair, graded_answers, graded_batch, pair_batch
from skylar.posttrain.preference import (
    LOSSES,
    PreferenceConfig,
    PreferenceObjective,
    best_and_worst,
    every_target,
    implicit_rewards,
    joined,
    kto_losses,
    log1mexp,
    mean_over_ranks,
    pair_losses,
    rows_of,
    sample_answers,
    sequence_logprobs,
    target_logprobs,
    token_logprobs,
    with_reference,
)
from skylar.training.objective import check_contract
from skylar.training.optim import AdamWConfig
from skylar.training.trainer import TrainConfig, Trainer
from skylar.utils.lesson import Workers, train_steps

PAIRED = LOSSES[:4]


def close(found, expected, **tolerance):
    torch.testing.assert_close(
        found, expected, check_dtype=False, **{"atol": 1e-6, "rtol": 1e-5} | tolerance)


# --- golden values ---


@pytest.fixture(scope="module")
def cases():
    return golden("preference")


@pytest.mark.parametrize(("name", "loss"), [
    ("dpo_sigmoid", "dpo"), ("dpo_ipo", "ipo"), ("simpo", "simpo"), ("orpo", "orpo")])
def test_losses_of_sums_equal_trl(cases, name, loss):
    given = cases[name].leaves()
    extra = {"gamma": given["gamma"]} if "gamma" in given else {}
    config = PreferenceConfig(loss=loss, beta=given["beta"], **extra)
    rewards = implicit_rewards(config, given["logps"], given["lengths"], given.get("reference"))
    cases[name].check(given, pair_losses(config, rewards).mean(), rtol=1e-5, atol=1e-6)


class Stub(nn.Module):
    """A model whose logits are given: hidden states and a head that is the identity."""

    def __init__(self, *logits_by_ids):  # (ids, logits)
        super().__init__()
        self.known = logits_by_ids
        V = logits_by_ids[0][1].shape[-1]
        self.lm_head = nn.Linear(V, V, bias=False, dtype=torch.float64)
        self.lm_head.weight.data = torch.eye(V, dtype=torch.float64)

    def model(self, input_ids, position_ids=None, document_ids=None):
        return next(logits for ids, logits in self.known if torch.equal(ids, input_ids))


def labels_of(ids, mask):
    shifted = ids.roll(-1, 1).masked_fill(mask.roll(-1, 1) == 0, -100)
    shifted[:, -1] = -100
    return shifted


def pair_batch_of(given):
    ids, labels = given["input_ids"], labels_of(given["input_ids"], given["completion_mask"])
    half = len(ids) // 2
    batch = {}
    for n, (side, part) in enumerate((("chosen", slice(half)), ("rejected", slice(half, None)))):
        batch |= {f"{side}_input_ids": ids[part], f"{side}_labels": labels[part]}
        if "reference" in given:
            batch[f"{side}_reference"] = given["reference"][n]
    return batch


@pytest.mark.parametrize(("name", "settings"), [
    ("dpo_sigmoid_logits", {}), ("dpo_ipo_logits", {"loss": "ipo"}),
    ("simpo_logits", {"loss": "simpo"}), ("orpo_logits", {"loss": "orpo", "orpo_nll": "batch"})])
def test_objectives_on_logits_equal_trl(cases, name, settings):
    given = cases[name].inputs
    logits = given["logits"].clone().requires_grad_()
    extra = {"gamma": given["gamma"]} if "gamma" in given else {}
    config = PreferenceConfig(beta=given["beta"], **settings, **extra)
    objective = PreferenceObjective(Stub((given["input_ids"], logits)), None, config)
    output = objective(pair_batch_of(given))
    mean = output.loss_sum / output.n_valid
    close(mean, cases[name].outputs["loss"])
    mean.backward()
    close(logits.grad, cases[name].gradients["logits"])


@pytest.mark.parametrize("name", ["kto", "kto_baseline_zero"])
def test_kto_on_logits_equals_trl(cases, name):
    given = cases[name].inputs
    logits, ids, others = given["logits"].clone(), given["input_ids"], given["mismatched_ids"]
    logits.requires_grad_()
    batch = {
        "input_ids": ids, "labels": labels_of(ids, given["completion_mask"]),
        "mismatched_input_ids": others,
        "mismatched_labels": labels_of(others, given["mismatched_mask"]),
        "reference": given["reference"], "mismatched_reference": given["mismatched_reference"],
        "desirable": given["desirable"]}
    config = PreferenceConfig(
        loss="kto", beta=given["beta"], desirable_weight=given["desirable_weight"],
        undesirable_weight=given["undesirable_weight"])
    model = Stub((ids, logits), (others, given["mismatched_logits"]))
    output = PreferenceObjective(model, None, config)(batch)
    mean = output.loss_sum / output.n_valid
    close(mean, cases[name].outputs["loss"])
    mean.backward()
    close(logits.grad, cases[name].gradients["logits"])
    total, n = output.metrics["baseline"]
    assert (float(total) / n == 0) == (name == "kto_baseline_zero")


# --- log-probabilities ---


def plain_logprobs(model, rows):
    logps = model(rows["input_ids"], rows.get("position_ids"), rows.get("document_ids"))
    logps, labels = logps.log_softmax(-1), rows["labels"]
    found = logps.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    return found.where(labels != -100, 0)


@pytest.mark.parametrize("family", ["gpt2", "llama3", "qwen3"])
def test_log_probabilities_and_gradients_equal_plain_code(tiny_model, family):
    model, rows = tiny_model(family), joined(pair_batch(random_pairs(5)))
    weights = torch.linspace(-1, 2, rows["labels"].numel()).view(rows["labels"].shape)
    found = []
    for f in (token_logprobs, plain_logprobs):
        model.zero_grad()
        value = f(model, rows)
        (value * weights).sum().backward()  # every token has another factor
        found.append((value.detach(), [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


def test_a_temperature_divides_the_logits(tiny_model):
    model, rows = tiny_model(), joined(pair_batch(random_pairs(3)))
    labels, logits = rows["labels"], model(rows["input_ids"]) / 0.7
    found = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    close(token_logprobs(model, rows, 0.7), found.where(labels != -100, 0), atol=1e-5)


def test_padding_on_either_side_and_batch_mates_change_nothing(tiny_model):
    model, pairs = tiny_model(), random_pairs(6)
    together = sequence_logprobs(model, rows_of(pair_batch(pairs), "chosen_"))
    for pair, expected in zip(pairs, together):
        alone = rows_of(pair_batch([pair]), "chosen_")
        n = alone["labels"].shape[1]
        left = {"input_ids": F.pad(alone["input_ids"], (5, 0)),
                "labels": F.pad(alone["labels"], (5, 0), value=-100),
                "position_ids": F.pad(torch.arange(n)[None], (5, 0)),
                "document_ids": F.pad(torch.ones(1, n, dtype=torch.long), (5, 0))}
        for rows in (alone, left):
            close(sequence_logprobs(model, rows)[0], expected, atol=1e-5)


class Largest(TorchDispatchMode):
    """The most numbers in one result."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(t):
                self.numel = max(self.numel, t.numel())
        return out


def test_all_logits_never_exist_at_once(tiny_model):
    model = tiny_model(vocab_size=5000)
    hidden = torch.randn(8, 256, 32, requires_grad=True)
    labels = torch.randint(0, 5000, (8, 256))
    with Largest() as seen:
        target_logprobs(model, hidden, labels).sum().backward()
    assert seen.numel <= 512 * 5000 < labels.numel() * 5000


# --- the pieces ---


def test_log1mexp_is_exact_near_zero_and_far_from_it():
    x = -torch.logspace(-6, 1.5, 200)
    y = x.double()
    exact = torch.where(y > -1, torch.log(-torch.expm1(y)), torch.log1p(-torch.exp(y)))
    close(log1mexp(x), exact, atol=0, rtol=2e-5)
    x = torch.tensor([-1e-30, -0.6931, -0.6932, -90.0], requires_grad=True)
    log1mexp(x).sum().backward()
    assert not x.grad.isnan().any()


def test_dpo_starts_at_log_two_and_simpo_at_its_margin(tiny_model):
    model, pairs = tiny_model(), random_pairs(4)
    stored = with_reference(pairs, model, pair_batch)
    output = PreferenceObjective(model)(pair_batch(stored))
    close(output.loss_sum / 4, torch.tensor(math.log(2)))
    zero = torch.zeros(2, 1)
    found = pair_losses(PreferenceConfig(loss="simpo", gamma=1.5), zero)
    close(found, torch.tensor([math.log1p(math.exp(1.5))]))


def test_ipo_has_its_minimum_at_the_target_and_hinges_on_length():
    config = PreferenceConfig(loss="ipo", beta=0.25)
    assert pair_losses(config, torch.tensor([[2.0], [0.0]])).item() == 0
    logps, lengths = torch.tensor([[-2.0], [-2.0]]), torch.tensor([[2], [4]])
    rewards = implicit_rewards(config, logps, lengths, torch.zeros(2, 1))
    assert rewards.flatten().tolist() == [-1.0, -0.5]


def test_kto_weights_and_signs():
    config = PreferenceConfig(loss="kto", beta=1.0, desirable_weight=2.0, undesirable_weight=3.0)
    ratio, good = torch.tensor([1.0, 1.0]), torch.tensor([True, False])
    found = kto_losses(config, ratio, torch.tensor(0.25), good)
    close(found, torch.tensor([2 / (1 + math.exp(0.75)), 3 / (1 + math.exp(-0.75))]))


def test_targets_of_orpo_are_prompt_and_answer():
    for pair in random_pairs(20):
        rows = rows_of(pair_batch([pair]), "chosen_")
        whole = [*pair.prompt, *pair.chosen]
        found = every_target(rows)[0]
        assert found[found != -100].tolist() == whole[1:]
        left = {"input_ids": F.pad(rows["input_ids"], (3, 0), value=7),
                "labels": F.pad(rows["labels"], (3, 0), value=-100)}
        n = rows["labels"].shape[1]
        left["document_ids"] = F.pad(torch.ones(1, n, dtype=torch.long), (3, 0))
        found = every_target(left)[0]
        assert found[found != -100].tolist() == whole[1:]
        cut = {"input_ids": torch.tensor([whole[:-1]])}  # the last target is no input
        cut["labels"] = torch.full_like(cut["input_ids"], -100)
        cut["labels"][0, len(pair.prompt) - 1:] = torch.tensor(pair.chosen)
        assert every_target(cut)[0].tolist() == whole[1:]


@pytest.mark.parametrize("kwargs", [
    {"loss": "ppo"}, {"beta": 0}, {"beta": -1.0}, {"gamma": -0.1}, {"desirable_weight": 0},
    {"orpo_nll": "token"}])
def test_settings_out_of_range_are_refused(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs)) if "loss" not in kwargs else "ppo"):
        PreferenceConfig(**kwargs)


# --- the objective ---


def batch_of(loss, pairs, reference):
    """A batch that has all that the loss needs."""
    examples, collate = pairs, pair_batch
    if loss == "kto":
        examples, collate = graded_answers(pairs), graded_batch
    return collate(with_reference(examples, reference, collate))


@pytest.mark.parametrize("loss", LOSSES)
def test_the_contract_of_objectives_is_kept(tiny_model, loss):
    reference, model = tiny_model("llama3"), tiny_model("qwen3")
    objective = PreferenceObjective(model, None, PreferenceConfig(loss=loss))
    batch = batch_of(loss, random_pairs(4), reference)
    check_contract(objective, batch)
    output = objective(batch)
    assert output.n_valid == (8 if loss == "kto" else 4) and output.loss_sum.ndim == 0


@pytest.mark.parametrize("loss", PAIRED)
def test_micro_batches_add_up(tiny_model, loss):
    reference, model, pairs = tiny_model("llama3"), tiny_model("qwen3"), random_pairs(6)
    objective = PreferenceObjective(model, None, PreferenceConfig(loss=loss))
    totals = []
    for parts in ([pairs], [pairs[:1], pairs[1:4], pairs[4:]]):
        model.zero_grad()
        losses = [objective(batch_of(loss, part, reference)).loss_sum for part in parts]
        sum(losses).backward()
        totals.append((sum(losses).detach(), [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(*totals, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("loss", ["dpo", "ipo", "kto"])
def test_a_reference_model_and_its_stored_numbers_agree(tiny_model, loss):
    reference, model, pairs = tiny_model("llama3"), tiny_model("qwen3"), random_pairs(5)
    config = PreferenceConfig(loss=loss)
    stored = PreferenceObjective(model, None, config)(batch_of(loss, pairs, reference))
    examples, collate = ((graded_answers(pairs), graded_batch) if loss == "kto"
                         else (pairs, pair_batch))
    live = PreferenceObjective(model, reference, config)(collate(examples))
    close(live.loss_sum, stored.loss_sum)


def test_the_reference_is_frozen_without_dropout_and_not_saved(tiny_model):
    reference = tiny_model("qwen3", dropout=0.5)
    model = tiny_model("qwen3")
    objective = PreferenceObjective(model, reference).train()
    batch = pair_batch(random_pairs(3))
    assert objective(batch).loss_sum.item() == objective(batch).loss_sum.item()
    assert not any("reference" in name for name, _ in objective.named_parameters())
    assert not any("reference" in name for name in objective.state_dict())
    objective(batch).loss_sum.backward()
    assert all(p.grad is None for p in reference.parameters())
    with pytest.raises(ValueError, match="give a copy"):
        PreferenceObjective(model, model)


def test_what_a_batch_lacks_is_named(tiny_model):
    model, pairs = tiny_model(), random_pairs(3)
    dpo = PreferenceObjective(model)
    with pytest.raises(ValueError, match="needs a reference"):
        dpo.check_batch(pair_batch(pairs))
    PreferenceObjective(model, None, PreferenceConfig(loss="simpo")).check_batch(pair_batch(pairs))
    with pytest.raises(ValueError, match="graded_batch makes"):
        PreferenceObjective(model, None, PreferenceConfig(loss="kto")).check_batch(
            pair_batch(pairs))
    with pytest.raises(ValueError, match="pair_batch makes"):
        dpo.check_batch({"input_ids": torch.zeros(1, 2)})
    batch = pair_batch(pairs)
    batch["rejected_labels"] = batch["rejected_labels"][:, 1:]
    with pytest.raises(ValueError, match="one shape"):
        dpo.check_batch(batch)


@pytest.mark.parametrize("loss", LOSSES)
def test_ten_pairs_are_learned(tiny_model, loss):
    model, reference = tiny_model(), tiny_model()
    settings = {"simpo": {"beta": 2.0}, "ipo": {"beta": 0.5}, "orpo": {"beta": 1.0}}
    config = PreferenceConfig(loss=loss, **settings.get(loss, {"beta": 0.5}))
    objective = PreferenceObjective(model, None, config)
    pairs = random_pairs(10, seed=4)
    batch = batch_of(loss, pairs, reference)

    def step(_, batch):
        output = objective(batch)
        return output.loss_sum / output.n_valid

    losses = train_steps(model, step, [batch], 80, lr=5e-3)
    assert losses[-1] < 0.6 * losses[0]
    both = joined(pair_batch(pairs))
    with torch.no_grad():
        gained = (sequence_logprobs(model, both) - sequence_logprobs(reference, both)).view(2, -1)
    if loss in ("dpo", "kto"):
        assert (gained[0] > gained[1]).all()


def test_a_sparse_model_keeps_its_auxiliary_loss(tiny_model):
    objective = PreferenceObjective(tiny_model("mixtral"), tiny_model("mixtral"))
    batch = pair_batch(random_pairs(4))
    assert objective.auxiliary is not None
    trained = objective.train()(batch)
    assert trained.loss_sum > objective.eval()(batch).loss_sum
    assert "reward_accuracy" in trained.metrics


def make_trainer(model, reference, out, **options):
    pairs = with_reference(random_pairs(12), reference, pair_batch)
    config = TrainConfig(steps=6, log_every=1, save_every=2, eval_every=0, device="cpu",
                         dtype="float32")
    return Trainer(PreferenceObjective(model), ExampleLoader(pairs, pair_batch, 4, seed=2),
                   config, optimizer=AdamWConfig(lr=1e-3), out_dir=out, quiet=True, **options)


def test_resumed_is_as_if_nothing_had_happened(tiny_model, tmp_path):
    reference, models = tiny_model(), [tiny_model() for _ in range(3)]
    make_trainer(models[0], reference, tmp_path / "whole").train()
    stopped = make_trainer(models[1], reference, tmp_path / "parts",
                           callbacks=[lambda row: row["step"] == 3])
    stopped.train()
    assert stopped.progress.step == 3
    make_trainer(models[2], reference, tmp_path / "parts").train(resume=True)
    for a, b in zip(models[0].parameters(), models[2].parameters()):
        assert torch.equal(a, b)


def _baseline(values):
    import os

    import torch
    import torch.distributed as dist

    from skylar.posttrain.preference import mean_over_ranks

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return float(mean_over_ranks(torch.tensor(values[int(os.environ["RANK"])])))


def test_ktos_baseline_is_the_mean_of_all_ranks():
    workers = Workers(2)
    try:
        assert workers.run(_baseline, [[1.0, 2.0, 3.0], [6.0]]) == [3.0, 3.0]
    finally:
        workers.close()
    assert float(mean_over_ranks(torch.tensor([1.0, 2.0]))) == 1.5
    assert float(mean_over_ranks(torch.tensor([]))) == 0


# --- pairs from samples ---


def test_best_and_worst():
    answers = [[1, 2], [3], [4, 4], [5]]
    pair = best_and_worst([9], answers, [0.5, 1.0, 0.0, 1.0])
    assert pair == Pair((9,), (3,), (4, 4), 1.0)
    assert best_and_worst([9], answers, [1.0] * 4) is None
    assert best_and_worst([9], answers, [0.5, 0.6, 0.5, 0.5], min_gap=0.2) is None
    assert best_and_worst([9], [[1], [1]], [0.0, 1.0]) is None


def test_samples_end_with_their_first_end_token(tiny_model):
    model, generator = tiny_model(), torch.Generator().manual_seed(0)
    ends = list(range(0, 97, 7))
    answers = sample_answers(model, [5, 6], 12, 10, ends, generator=generator)
    assert len(answers) == 12
    for a in answers:
        assert 1 <= len(a) <= 10 and not set(a[:-1]) & set(ends)
        assert len(a) == 10 or a[-1] in ends
