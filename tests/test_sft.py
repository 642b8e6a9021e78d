"""Supervised fine-tuning: plain formulas, TRL's divisor, and every way to one number."""

import pytest
import torch
import torch.nn.functional as F
from chats import random_messages, small_tokenizer, sums, tiny_chat_model
from golden_cases import golden

from skylar.data.chatml import ConversationLoader, collate, encode_conversation
from skylar.posttrain.battery import (
    Reply,
    battery,
    equals,
    equals_json,
    refuses,
    replies,
    score,
)
from skylar.posttrain.sft import SFTConfig, SFTObjective, weighted_sum
from skylar.training.loss import LOSSES
from skylar.training.optim import AdamWConfig, ScheduleConfig
from skylar.training.trainer import TrainConfig, Trainer


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.fixture
def model(tokenizer):
    return tiny_chat_model(tokenizer)


def encoded(tokenizer, n=6, end_weight=1.0):
    return [encode_conversation(tokenizer, c, end_weight=end_weight) for c in sums(n)]


def plain(model, batch, weighted=True):
    logits = model(batch["input_ids"], batch["position_ids"], batch["document_ids"])
    losses = F.cross_entropy(logits.flatten(0, 1).double(), batch["labels"].flatten(),
                             reduction="none")
    weights = batch["weights"].flatten() if weighted else 1.0
    return (weights * losses).sum(), int((batch["labels"] != -100).sum())


def outcome(model, f):
    model.zero_grad()
    total, n = f()[:2]
    total.backward()
    return total.detach().double(), int(n), [p.grad.clone() for p in model.parameters()]


def assert_same(a, b):
    assert a[1] == b[1]
    torch.testing.assert_close(a[0], b[0], rtol=1e-5, atol=1e-5)
    for x, y in zip(a[2], b[2], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("end_weight", [1.0, 3.0, 0.5])
def test_loss_and_gradients_equal_the_plain_formula(tokenizer, model, loss, end_weight):
    batch = collate([encoded(tokenizer, end_weight=end_weight)], 256)
    objective = SFTObjective(model, loss=loss).train()
    assert_same(outcome(model, lambda: objective(batch)),
                outcome(model, lambda: plain(model, batch)))


def test_any_weights_any_upstream_gradient():
    """Random weights, zeros among them, and a loss that is scaled afterwards."""
    torch.manual_seed(0)
    hidden = torch.randn(40, 8, dtype=torch.float64, requires_grad=True)
    head = torch.randn(30, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(30, (40,))
    labels[::5] = -100
    weights = torch.rand(40, dtype=torch.float64) * 3 * (torch.rand(40) > 0.2)
    losses = F.cross_entropy(hidden @ head.T, labels, reduction="none")
    wanted = torch.autograd.grad(0.37 * (weights * losses).sum(), (hidden, head))
    for loss in LOSSES.values():
        total, n = weighted_sum(loss, hidden, head, labels, weights)
        assert int(n) == 32
        found = torch.autograd.grad(0.37 * total, (hidden, head))
        for a, b in zip(found, wanted):  # the plain loss computes in float64, too
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_evaluation_counts_every_target_once(tokenizer, model):
    batch = collate([encoded(tokenizer, end_weight=3.0)], 256)
    objective = SFTObjective(model, z_loss=1e-2).eval()
    total, n = plain(model, batch, weighted=False)
    output = objective(batch)
    assert int(output.n_valid) == n
    torch.testing.assert_close(output.loss_sum.double(), total, rtol=1e-5, atol=1e-5)


def test_z_loss_is_added_in_training(tokenizer, model):
    batch = collate([encoded(tokenizer)], 256)
    logits = model(batch["input_ids"], batch["position_ids"], batch["document_ids"])
    valid = batch["labels"] != -100
    z = 1e-2 * logits.logsumexp(-1)[valid].square().sum()
    objective = SFTObjective(model, z_loss=1e-2).train()
    torch.testing.assert_close(objective(batch).loss_sum.double(),
                               plain(model, batch)[0] + z, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["mean_of_one_batch", "share_of_20_tokens"])
def test_the_number_that_trl_divides_by(name):
    """Their labels are not shifted: the last position predicts nothing."""
    case = golden("sft")[name]
    leaves = case.leaves()
    logits, labels = leaves["logits"][:, :-1], leaves["labels"][:, 1:]
    V = logits.shape[-1]
    total, n = weighted_sum(
        LOSSES["fused"], logits.reshape(-1, V), torch.eye(V, dtype=torch.float64),
        labels.reshape(-1), torch.ones(labels.numel(), dtype=torch.float64))
    n = leaves["num_items_in_batch"] or n
    case.check(leaves, total / n, rtol=1e-5, atol=1e-6)  # theirs computes in float32


def test_accumulation_packing_and_padding_give_one_number(tokenizer, model):
    rows = encoded(tokenizer, 6, end_weight=2.0)
    objective = SFTObjective(model).train()
    whole = collate([rows[:2], rows[2:4], rows[4:]], 256)

    def accumulated(batches):
        outputs = [objective(b) for b in batches]
        return sum(o.loss_sum for o in outputs), sum(o.n_valid for o in outputs)

    micro = [{k: v[i:i + 1] for k, v in whole.items()} for i in range(3)]
    reference = outcome(model, lambda: objective(whole))
    for batches in (micro, [collate([[e] for e in rows], 256)],  # one conversation a row
                    [collate([[e]], 256) for e in rows], [collate([rows[:2]], 256),
                                                          collate([rows[2:4], rows[4:]], 256)]):
        assert_same(outcome(model, lambda b=batches: accumulated(b)), reference)


def test_batch_mates_change_nothing(tokenizer, model):
    first, *others = encoded(tokenizer, 5)
    with torch.no_grad():
        alone, _ = plain(model, collate([[first]], 256))
        for mates in ([others], [others[:1], others[1:]]):
            rows = [[first, *mates[0]], *mates[1:]]
            together = [plain(model, collate([[e]], 256))[0] for row in rows for e in row]
            batch, _ = plain(model, collate(rows, 256))
            torch.testing.assert_close(batch, sum(together), rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(together[0], alone)


def test_what_comes_later_changes_nothing(tokenizer, model):
    """The logits of an answer do not depend on the next conversation in the row."""
    a, b, c = encoded(tokenizer, 3)
    def run(row):
        x = collate([row], 256)
        return model(x["input_ids"], x["position_ids"], x["document_ids"])[0, :len(a.ids)]
    with torch.no_grad():
        torch.testing.assert_close(run([a, b]), run([a, c]), rtol=1e-5, atol=1e-5)


def test_ten_examples_are_learned_by_heart(tokenizer, model):
    chats = sums(10)
    loader = ConversationLoader(chats, tokenizer, 4, 128, end_weight=2.0)
    trainer = Trainer(
        SFTObjective(model), loader,
        TrainConfig(steps=300, log_every=50, eval_every=0, device="cpu", dtype="float32"),
        optimizer=AdamWConfig(lr=1e-2, weight_decay=0.0),
        schedule=ScheduleConfig(kind="constant"), quiet=True)
    rows = trainer.train()
    assert rows[-1]["loss"] < 0.05
    found = replies(model.eval(), tokenizer, [c[:-1] for c in chats], 24)
    assert [r.text for r in found] == [c[-1]["content"] for c in chats]
    assert all(r.stopped for r in found)


def test_the_trainer_checks_the_labels(tokenizer, model):
    batch = collate([encoded(tokenizer)], 256)
    unshifted = batch | {"labels": batch["input_ids"].clone()}
    trainer = Trainer(SFTObjective(model), [unshifted], TrainConfig(steps=1), quiet=True)
    with pytest.raises(ValueError, match="labels equal input_ids"):
        trainer.train()


@pytest.mark.parametrize("wrong", [{"end_weight": 0}, {"z_loss": -1.0}])
def test_settings_that_cannot_be(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SFTConfig(**wrong)


# --- the battery ---


def test_right_and_wrong_answers():
    tasks = battery()
    assert len(tasks) == 13 and sum(t.check is not None for t in tasks) == 6
    for task in tasks:
        if task.check:
            assert task.check(task.expected) and not task.check("") and not task.check("yes")
    assert equals("Clara Voss")("It was Clara Voss.") and not equals("noon")("afternoon")
    assert not equals("noon")("noon " * 13)
    assert equals_json({"a": 1})('```json\n{"a": 1}\n```')
    for wrong in ("{}", '{"a": 1, "b": 2}', '{"a": "1"}', 'The answer is {"a": 1}', "[1]"):
        assert not equals_json({"a": 1})(wrong)
    assert refuses("the text does not say.") and not refuses("It costs two.")


def test_a_score_of_known_answers():
    tasks = battery()
    perfect = score(tasks, [Reply(t.expected, True) for t in tasks])
    assert perfect["clean stop"] == (13, 13)
    assert all(right == of for right, of in perfect.values())
    refusing = score(tasks, [Reply("The text does not say.", False) for _ in tasks])
    assert refusing["refuse"] == (2, 2) and refusing["answer"] == (0, 2)
    assert refusing["clean stop"] == (0, 13)


@pytest.mark.parametrize("seed", range(3))
def test_padding_and_batch_mates_change_no_answer(tokenizer, model, seed):
    import random

    rng = random.Random(seed)
    chats = [random_messages(rng, plain=True)[:-1] for _ in range(5)]
    chats = [c for c in chats if len(tokenizer.chat(c)) < 100]
    together = replies(model.eval(), tokenizer, chats, 12)
    assert together == [replies(model, tokenizer, [c], 12)[0] for c in chats]
