"""Reward models: the loss of TRL, the token that is read, and files that transformers opens."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from golden_cases import golden
from test_pairs import random_pairs

from skylar.data.chat import PretrainedTokenizer, with_chat
from skylar.data.pairs import ExampleLoader, Pair, pair_batch
from skylar.data.tokenizer import BPETokenizer
from skylar.models.hub import save_pretrained
from skylar.posttrain.preference import joined, rows_of
from skylar.posttrain.reward import (
    RewardConfig,
    RewardModel,
    RewardObjective,
    bradley_terry_losses,
    calibration,
    calibration_error,
    last_token,
)
from skylar.posttrain.reward_files import (
    load_reward_model,
    save_reward_model,
    with_own_padding,
)
from skylar.training.objective import check_contract
from skylar.training.optim import AdamWConfig
from skylar.training.trainer import TrainConfig, Trainer
from skylar.utils.lesson import train_steps


@pytest.mark.parametrize("name", ["plain", "margin", "centering", "both"])
def test_loss_and_gradient_equal_trl(name):
    case = golden("reward")[name]
    given = case.leaves()
    loss = bradley_terry_losses(
        *given["rewards"], given.get("margin", 0.0), given.get("centering", 0.0)).mean()
    case.check(given, loss)


@pytest.fixture
def make(tiny_model):
    def reward_model(family="qwen3", **overrides):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return RewardModel(tiny_model(family, **overrides))

    return reward_model


def alone(model, pair, side):
    """The reference: a row without padding, its last position."""
    ids = torch.tensor([[*pair.prompt, *getattr(pair, side)]])
    return model.score(model.model(ids)[0, -1])


@pytest.mark.parametrize("family", ["gpt2", "llama3", "qwen3"])
def test_rewards_and_gradients_equal_rows_read_alone(make, family):
    model, pairs = make(family), random_pairs(5)
    found = []
    for f in (lambda: model(joined(pair_batch(pairs))),
              lambda: torch.cat([alone(model, p, side) for side in ("chosen", "rejected")
                                 for p in pairs])):
        model.zero_grad()
        rewards = f()
        (rewards * torch.linspace(-1, 2, 10)).sum().backward()
        found.append((rewards.detach(), [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


def test_the_last_token_on_either_side():
    for pair in random_pairs(30):
        rows = rows_of(pair_batch([pair]), "chosen_")
        end = len(pair.prompt) + len(pair.chosen) - 1
        assert last_token(rows["labels"]).tolist() == [end]
        assert last_token(F.pad(rows["labels"], (4, 0), value=-100)).tolist() == [end + 4]


def test_objective_is_a_sum_and_keeps_the_contract(make):
    model, pairs = make(), random_pairs(6)
    objective = RewardObjective(model, RewardConfig(use_margin=True, centering=0.1))
    whole = objective(pair_batch(pairs))
    parts = [objective(pair_batch(pairs[i:i + 2])).loss_sum for i in (0, 2, 4)]
    torch.testing.assert_close(sum(parts), whole.loss_sum)
    assert whole.n_valid == 6
    check_contract(objective, pair_batch(pairs))
    rewards = model(joined(pair_batch(pairs))).view(2, -1)
    margin = torch.tensor([p.margin for p in pairs])
    expected = -F.logsigmoid(rewards[0] - rewards[1] - margin) + 0.1 * rewards.sum(0) ** 2
    torch.testing.assert_close(whole.loss_sum, expected.sum())
    with pytest.raises(ValueError, match="no 'margin'"):
        objective.check_batch({k: v for k, v in pair_batch(pairs).items() if k != "margin"})
    with pytest.raises(ValueError, match="centering"):
        RewardConfig(centering=-1)


def test_swapped_sides_swap_their_rewards(make):
    model, pairs = make(), random_pairs(5)
    swapped = [Pair(p.prompt, p.rejected, p.chosen) for p in pairs]
    one, two = (model(joined(pair_batch(p))).view(2, -1) for p in (pairs, swapped))
    torch.testing.assert_close(one, two.flip(0))


def test_ten_pairs_are_learned(make):
    model = make()
    objective = RewardObjective(model)

    def step(_, batch):
        output = objective(batch)
        return output.loss_sum / output.n_valid

    batch = pair_batch(random_pairs(10, seed=3))
    losses = train_steps(model, step, [batch], 80, lr=5e-3)
    assert losses[-1] < 0.05
    total, n = objective(batch).metrics["accuracy"]
    assert float(total) == n == 10


def test_trained_by_the_trainer_and_resumed(make, tmp_path):
    models = [make() for _ in range(3)]

    def trainer(model, out, **options):
        config = TrainConfig(steps=4, log_every=1, save_every=2, eval_every=0, device="cpu",
                             dtype="float32")
        loader = ExampleLoader(random_pairs(9), pair_batch, 3)
        return Trainer(RewardObjective(model), loader, config, optimizer=AdamWConfig(lr=1e-3),
                       out_dir=tmp_path / out, quiet=True, **options)

    trainer(models[0], "whole").train()
    trainer(models[1], "parts", callbacks=[lambda row: row["step"] == 2]).train()
    trainer(models[2], "parts").train(resume=True)
    for a, b in zip(models[0].parameters(), models[2].parameters()):
        assert torch.equal(a, b)


# --- calibration ---


def test_a_calibrated_model_has_no_calibration_error_and_a_scaled_one_has():
    generator = torch.Generator().manual_seed(0)
    difference = 2 * torch.randn(40_000, generator=generator)
    wins = torch.rand(40_000, generator=generator) < difference.sigmoid()
    chosen = torch.where(wins, difference, -difference)
    assert calibration_error(chosen, torch.zeros(40_000)) < 0.02
    assert calibration_error(4 * chosen, torch.zeros(40_000)) > 0.1
    confidence, right, n = calibration(chosen, torch.zeros(40_000), bins=4)
    assert n.sum() == 40_000 and (confidence.diff() > 0).all() and (right.diff() > 0).all()


def test_scores_are_those_of_the_decisions():
    chosen = torch.zeros(2, requires_grad=True)  # two answers, 3 decisions to 1
    optimizer = torch.optim.LBFGS([chosen], max_iter=50, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        a, b = chosen
        value = 3 * bradley_terry_losses(a[None], b[None]) + bradley_terry_losses(b[None], a[None])
        value.sum().backward()
        return value.sum()

    optimizer.step(loss)
    assert math.isclose(float((chosen[0] - chosen[1]).detach()), math.log(3), rel_tol=1e-3)


# --- files ---


@pytest.fixture(scope="module")
def chat():
    return with_chat(BPETokenizer.train(["the king said that love is short "] * 20, vocab_size=280))


@pytest.mark.parametrize(("family", "tied"), [
    ("gpt2", True), ("llama3", False), ("llama3", True), ("qwen3", True)])
def test_transformers_opens_it_and_gives_the_same_rewards(make, chat, tmp_path, family, tied):
    more = {"d_head": 8} if family == "gpt2" else {"tie_embeddings": tied}
    model = make(family, vocab_size=chat.vocab_size, **more).eval()
    folder = save_reward_model(model, tmp_path / "reward", chat)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert theirs.config.num_labels == 1 and "SequenceClassification" in type(theirs).__name__
    rows = joined(pair_batch(random_pairs(4), pad_id=chat.pad_id))
    mask = (rows["input_ids"] != chat.pad_id).long()
    with torch.no_grad():
        ours = model(rows)
        right = theirs(rows["input_ids"], attention_mask=mask).logits.squeeze(-1)
        again = load_reward_model(folder)(rows)
    torch.testing.assert_close(ours, right, atol=5e-5, rtol=1e-4)
    assert torch.equal(ours, again)


def test_padding_that_ends_answers_is_replaced(chat):
    config = json.loads(chat.files["tokenizer_config.json"]) | {"pad_token": "<|im_end|>"}
    spoiled = PretrainedTokenizer(chat.files | {"tokenizer_config.json": json.dumps(config)})
    mended = with_own_padding(spoiled)
    assert spoiled.pad_id in spoiled.eos_token_ids and mended.pad_id not in mended.eos_token_ids
    assert mended.eos_token_ids == spoiled.eos_token_ids
    assert with_own_padding(chat) is chat


def test_what_is_no_reward_model_is_refused(tiny_model, make, chat, tmp_path):
    lm = tiny_model(vocab_size=chat.vocab_size)
    save_pretrained(lm, tmp_path / "lm", chat)
    with pytest.raises(ValueError, match="Qwen3ForCausalLM"):
        load_reward_model(tmp_path / "lm")
    folder = save_reward_model(make(vocab_size=chat.vocab_size), tmp_path / "reward", chat)
    hf = json.loads((folder / "config.json").read_text())
    (folder / "skylar_manifest.json").unlink()
    (folder / "config.json").write_text(json.dumps(hf | {"id2label": {"0": "a", "1": "b"}}))
    with pytest.raises(ValueError, match="2 labels"):
        load_reward_model(folder)
    with pytest.raises(ValueError, match="not empty"):
        save_reward_model(make(vocab_size=chat.vocab_size), folder, chat)


def test_a_changed_byte_is_noticed(make, chat, tmp_path):
    folder = save_reward_model(make(vocab_size=chat.vocab_size), tmp_path / "reward", chat)
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        load_reward_model(folder)
