"""Distillation: divergences against autograd, PyTorch and TRL; memory; objectives; the stage."""

import json

import pytest
import torch
import torch.nn.functional as F
from golden_cases import golden
from ranks import check_two_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from skylar.models.decoder import CausalLM
from skylar.models.hub import from_pretrained, load_tokenizer, save_pretrained
from skylar.models.presets import get_config
from skylar.posttrain.distill import (
    CoDistillObjective,
    DistillConfig,
    DistillObjective,
    check_same_tokens,
    divergence_gradient,
    linear_divergence,
)
from skylar.posttrain.distill_stage import (
    ConversationPrompts,
    DistillStage,
    MixedLoader,
    WrittenLoader,
    right_padded,
)
from skylar.posttrain.rollout import RolloutConfig
from skylar.posttrain.stages import open_stage, train_stage
from skylar.training.muon import OptimizerConfig
from skylar.training.run import LoaderConfig, load_run
from skylar.training.trainer import TrainConfig
from skylar.utils.lesson import asset

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)


def plain(hidden, weight, theirs, their_weight, labels, beta=0.0, temperature=1.0):
    "All logits at once, by `F.kl_div`."
    q = (hidden @ weight.T / temperature).log_softmax(-1)
    p = (theirs @ their_weight.T / temperature).log_softmax(-1)

    def kl(a, b):
        return F.kl_div(b, a, reduction="none", log_target=True).sum(-1)

    if beta in (0, 1):
        found = kl(p, q) if beta == 0 else kl(q, p)
    else:
        m = (beta * p.exp() + (1 - beta) * q.exp()).log()
        found = beta * kl(p, m) + (1 - beta) * kl(q, m)
    valid = labels != -100
    return (found * valid).sum(), valid.sum()


def example(n=13, d=6, d2=4, v=17, dtype=torch.float64, ignored=(0, 5, 12)):
    generator = torch.Generator().manual_seed(0)
    shapes = (n, d), (v, d), (n, d2), (v, d2)
    found = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    labels = torch.zeros(n, dtype=torch.long)
    labels[list(ignored)] = -100
    return *(x.requires_grad_() for x in found[:2]), *found[2:], labels


def gradients(loss_fn, inputs, upstream=1.0, **options):
    loss, n = loss_fn(*inputs, **options)
    return loss.detach(), n, torch.autograd.grad(loss * upstream, inputs[:2])


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("chunk", [1, 4, 13, 100])
def test_equals_plain_in_value_and_gradient(beta, temperature, chunk):
    options = dict(beta=beta, temperature=temperature)
    ours = gradients(linear_divergence, example(), chunk=chunk, **options)
    torch.testing.assert_close(ours, gradients(plain, example(), **options))


@pytest.mark.parametrize("beta", BETAS)
def test_fp32_more_rows_than_a_block_and_more_tokens_than_a_tile(beta):
    inputs = example(n=70, v=2500, dtype=torch.float32)
    ours = gradients(linear_divergence, inputs, beta=beta, chunk=33)
    torch.testing.assert_close(ours, gradients(plain, inputs, beta=beta), atol=2e-5, rtol=2e-4)


@pytest.mark.parametrize("beta", BETAS)
def test_gradcheck(beta):
    hidden, weight, *rest = example(n=5, d=3, d2=2, v=4, ignored=(1,))

    def f(h, w):
        return linear_divergence(h, w, *rest, beta=beta, temperature=1.7, chunk=2)[0]

    assert torch.autograd.gradcheck(f, (hidden, weight))


@pytest.mark.parametrize("upstream", [0.0, 1 / 7, -3.0])
def test_any_upstream_gradient(upstream):
    ours = gradients(linear_divergence, example(), upstream, beta=0.3)
    torch.testing.assert_close(ours, gradients(plain, example(), upstream, beta=0.3))


@pytest.mark.parametrize("name", [
    f"{kind}{more}" for kind in ("forward_kl", "jsd_low", "jsd", "jsd_high", "reverse_kl")
    for more in ("", "_warm", "_far")] + ["no_valid_token"])
def test_equals_trl(name):
    case = golden("distill")[name]
    leaves = case.leaves()
    rows = leaves["student_logits"].flatten(0, 1)
    eye = torch.eye(rows.shape[1], dtype=rows.dtype)  # logits are hidden states times 1
    loss, n = linear_divergence(
        rows, eye, leaves["teacher_logits"].flatten(0, 1), eye, leaves["labels"].flatten(),
        beta=leaves["beta"], temperature=leaves["temperature"], chunk=3)
    case.check(leaves, loss / n.clamp(min=1))


def test_the_live_function_of_trl_if_it_is_there():
    gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer")
    hidden, weight, theirs, their_weight, labels = example()
    loss, n = linear_divergence(hidden, weight, theirs, their_weight, labels, beta=0.3)
    expected = gkd.GKDTrainer.generalized_jsd_loss(
        (hidden @ weight.T)[None], (theirs @ their_weight.T)[None], labels[None], beta=0.3)
    torch.testing.assert_close(loss / n, expected)


def test_jsd_is_bounded_and_symmetric_at_one_half():
    student, teacher = 30 * torch.randn(2, 50, 20, generator=torch.Generator().manual_seed(0))
    one, other = (divergence_gradient(a, b, 0.5)[0]
                  for a, b in ((student, teacher), (teacher, student)))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert (one <= 0.6932).all() and (one >= -1e-6).all()


@pytest.mark.parametrize("beta", BETAS)
def test_equal_models_have_no_divergence_and_no_gradient(beta):
    logits = 5 * torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    losses, slope = divergence_gradient(logits, logits.clone(), beta)
    assert losses.abs().max() < 1e-5 and slope.abs().max() < 1e-6


@pytest.mark.parametrize("rows", [13, 0])
def test_nothing_to_learn_is_zero_not_nan(rows):
    loss, n, grads = gradients(linear_divergence, example(n=rows, ignored=range(rows)), beta=0.5)
    assert loss == 0 and n == 0 and not any(g.any() for g in grads)


def test_a_frozen_head_gets_no_gradient():
    hidden, weight, *rest = example()
    loss, _ = linear_divergence(hidden, weight.detach(), *rest)
    (grad,) = torch.autograd.grad(loss, hidden)
    torch.testing.assert_close(grad, gradients(plain, (hidden, weight, *rest))[2][0])


class Largest(TorchDispatchMode):
    "Numbers in the largest tensor that is made."
    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if torch.is_tensor(t):
                self.numbers = max(self.numbers, t.numel())
        return out


def test_no_tensor_has_all_logits():
    inputs = example(n=400, d=8, d2=8, v=3000, dtype=torch.float32)
    with Largest() as largest:
        gradients(linear_divergence, inputs, beta=0.5, chunk=32)
    assert largest.numbers <= 32 * 3000 < 400 * 3000 / 10


def test_bf16_autocast_is_near():
    inputs = example(n=64, d=32, d2=32, v=200, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, n, grads = gradients(linear_divergence, inputs, beta=0.5)
    expected = gradients(plain, inputs, beta=0.5)
    assert loss.dtype == torch.float32 and grads[0].dtype == torch.float32
    assert abs(loss / expected[0] - 1) < 0.05
    for ours, theirs in zip(grads, expected[2]):
        assert F.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.98


# --- objectives ---


def batch_of(rows=4, length=12, vocab_size=97, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab_size, (rows, length + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[:, :3] = -100
    return {"input_ids": tokens[:, :-1], "labels": labels}


def grads_of(objective, batch):
    objective.zero_grad()
    out = objective(batch)
    out.loss_sum.backward()
    return out, {n: p.grad.clone() for n, p in objective.named_parameters()}


def test_only_the_student_is_trained_and_saved(tiny_model):
    student, teacher = tiny_model("qwen3"), tiny_model("llama3", d_model=48, d_head=12)
    objective = DistillObjective(student, teacher.train())
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert objective.state_dict().keys() == {f"model.{n}" for n in student.state_dict()}
    objective.train()
    assert not teacher.training  # dropout stays off
    out, grads = grads_of(objective, batch_of())
    assert int(out.n_valid) == 36 and all(g.isfinite().all() for g in grads.values())


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_objective_equals_logits_by_hand(tiny_model, kind):
    student, teacher = tiny_model("qwen3"), tiny_model("llama3")
    objective = DistillObjective(student, teacher, DistillConfig(divergence=kind, ce_weight=0.3))
    batch = batch_of()
    out, grads = grads_of(objective, batch)
    student.zero_grad()
    logits = student(batch["input_ids"]).flatten(0, 1)
    eye, labels = torch.eye(97), batch["labels"].flatten()
    beta = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}[kind]
    loss = plain(logits, eye, teacher(batch["input_ids"]).flatten(0, 1).detach(), eye, labels,
                 beta)[0] + 0.3 * F.cross_entropy(logits, labels, reduction="sum")
    loss.backward()
    torch.testing.assert_close(out.loss_sum, loss, atol=1e-4, rtol=1e-4)
    for name, p in student.named_parameters():
        torch.testing.assert_close(grads[f"model.{name}"], p.grad, atol=1e-4, rtol=1e-3)


def test_micro_batches_add_up(tiny_model):
    objective = DistillObjective(tiny_model("qwen3"), tiny_model("llama3"))
    batch = batch_of()
    whole, expected = grads_of(objective, batch)
    parts = [grads_of(objective, {k: v[i:i + 2] for k, v in batch.items()}) for i in (0, 2)]
    torch.testing.assert_close(sum(p[0].loss_sum for p in parts), whole.loss_sum)
    for name, grad in expected.items():
        torch.testing.assert_close(sum(p[1][name] for p in parts), grad, atol=1e-5, rtol=1e-4)


def test_padding_and_the_rest_of_the_batch_change_nothing(tiny_model):
    objective = DistillObjective(tiny_model("qwen3"), tiny_model("llama3"))
    batch = batch_of(rows=1)
    alone, expected = grads_of(objective, batch)
    padded = {"input_ids": F.pad(batch["input_ids"], (0, 5)),
              "labels": F.pad(batch["labels"], (0, 5), value=-100)}
    other = {"input_ids": batch_of(1, 17, seed=3)["input_ids"],
             "labels": torch.full((1, 17), -100)}
    both = {key: torch.cat([padded[key], other[key]]) for key in padded}
    found, grads = grads_of(objective, both)
    torch.testing.assert_close(found.loss_sum, alone.loss_sum, atol=1e-4, rtol=1e-5)
    for name, grad in expected.items():
        torch.testing.assert_close(grads[name], grad, atol=1e-5, rtol=1e-4)


def test_packed_documents_equal_single_ones(tiny_model):
    objective = DistillObjective(tiny_model("qwen3"), tiny_model("llama3"))
    a, b = batch_of(1, 7, seed=1), batch_of(1, 9, seed=2)
    packed = {key: torch.cat([a[key], b[key]], 1) for key in a}
    packed["document_ids"] = torch.tensor([[0] * 7 + [1] * 9])
    packed["position_ids"] = torch.tensor([[*range(7), *range(9)]])
    expected = sum(objective(x).loss_sum for x in (a, b))
    torch.testing.assert_close(objective(packed).loss_sum, expected, atol=1e-4, rtol=1e-5)


def test_evaluation_tells_the_cross_entropy_too(tiny_model):
    objective = DistillObjective(tiny_model("qwen3"), tiny_model("llama3"))
    assert objective(batch_of()).metrics.keys() == {"divergence"}
    out = objective.eval()(batch_of())
    assert out.metrics.keys() == {"divergence", "cross_entropy"}
    torch.testing.assert_close(out.loss_sum, out.metrics["divergence"][0])


def test_ten_examples_are_learned(tiny_model):
    student, teacher = tiny_model("qwen3"), tiny_model("llama3")
    with torch.no_grad():
        teacher.lm_head.weight.mul_(20)  # something to learn
    objective, batch = DistillObjective(student, teacher), batch_of(10, 8)
    adam = torch.optim.Adam(student.parameters(), 1e-2)
    losses = []
    for _ in range(150):
        out, _ = objective(batch), adam.zero_grad()
        (out.loss_sum / out.n_valid).backward()
        adam.step()
        losses.append((out.loss_sum / out.n_valid).item())
    assert losses[-1] < 0.2 * losses[0]


def test_two_students(tiny_model):
    first, second = tiny_model("qwen3"), tiny_model("llama3")
    pair, batch = CoDistillObjective(first, second, weight=0.5), batch_of()
    out, grads = grads_of(pair, batch)
    alone = []
    for student, teacher in ((first, second), (second, first)):
        student.requires_grad_(True)
        config = DistillConfig(ce_weight=2.0)
        alone.append(grads_of(DistillObjective(student, teacher, config), batch)[1])
    assert out.metrics.keys() == {"cross_entropy", "peer", "divergence"}
    for name, grad in grads.items():
        part, rest = name.split(".", 1)
        theirs = alone[part == "peer"][f"model.{rest}"]  # (divergence + 2 ce) / 2
        torch.testing.assert_close(grad, 0.5 * theirs, atol=1e-4, rtol=1e-3)
    pair.requires_grad_(True).eval()
    assert pair(batch).loss_sum == pair(batch).metrics["cross_entropy"][0]


def test_other_tokens_are_refused(tiny_model):
    student, teacher = tiny_model("qwen3"), tiny_model("qwen3", vocab_size=98)
    with pytest.raises(ValueError, match="97 tokens, the teacher for 98; .*--writer teacher"):
        DistillObjective(student, teacher)
    DistillObjective(student, teacher, DistillConfig(divergence="none", ce_weight=1.0))
    from skylar.data.tokenizer import BPETokenizer
    one, two = (BPETokenizer.train([text * 50], vocab_size=270) for text in ("abc ab ", "xyz yz "))
    check_same_tokens(student, student, (one, one))
    with pytest.raises(ValueError, match="97 tokens each, but different tokenizers"):
        check_same_tokens(student, student, (one, two))


@pytest.mark.parametrize(("wrong", "message"), [
    ({"divergence": "kl"}, "unknown divergence 'kl'"),
    ({"divergence": "none"}, "no other loss"),
    ({"divergence": "jsd", "beta": 0.0}, "above 0"),
    ({"temperature": 0.0}, "temperature=0.0"),
    ({"ce_weight": -1.0}, "ce_weight=-1.0"),
    ({"chunk": 0}, "chunk=0"),
])
def test_config_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        DistillConfig(**wrong)


# --- loaders and the stage ---


class Numbers:
    def __init__(self):
        self.n = 0

    def __iter__(self):
        while True:
            self.n += 1
            yield self.n

    def state_dict(self):
        return {"n": self.n}

    def load_state_dict(self, state):
        self.n = state["n"]


@pytest.mark.parametrize("stop", range(8))
def test_a_mixed_loader_goes_on_where_it_was(stop):
    def mixed():
        return MixedLoader(Numbers(), Numbers(), 0.4, seed=3)

    whole, begun, resumed = iter(mixed()), mixed(), mixed()
    wanted, batches = [next(whole) for _ in range(12)], iter(begun)
    early = [next(batches) for _ in range(stop)]
    resumed.load_state_dict(begun.state_dict())
    batches = iter(resumed)
    assert early + [next(batches) for _ in range(12 - stop)] == wanted


def test_a_mixed_loader_refuses_another_mixture():
    state = MixedLoader(Numbers(), Numbers(), 0.4).state_dict()
    with pytest.raises(ValueError, match="part=0.4, not 0.5"):
        MixedLoader(Numbers(), Numbers(), 0.5).load_state_dict(state)


def test_the_share_of_own_texts():
    mixed = MixedLoader(Numbers(), Numbers(), 0.25, seed=1)
    batches = iter(mixed)
    assert len([next(batches) for _ in range(400)]) == mixed.index == 400
    assert 70 < mixed.written.n < 130 and mixed.data.n == 400 - mixed.written.n
    extremes = [MixedLoader(Numbers(), Numbers(), part) for part in (0.0, 1.0)]
    for found in extremes:
        [next(iter(found)) for _ in range(5)]
    assert extremes[0].written.n == 0 and extremes[1].data.n == 0


def test_rows_are_padded_on_the_right():
    found = right_padded([([1, 2, 3], [-100, 3, 4]), ([5], [6])])
    assert found["input_ids"].tolist() == [[1, 2, 3], [5, 0, 0]]
    assert found["labels"].tolist() == [[-100, 3, 4], [6, -100, -100]]


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    rows = [{"messages": [{"role": "user", "content": f"Who speaks in scene {i}?"},
                          {"role": "assistant", "content": f"The king, {i} times."}]}
            for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    "A student with the tokenizer of the course's Shakespeare model."
    tokenizer = load_tokenizer(asset("shakespeare"))
    torch.manual_seed(0)
    model = CausalLM(get_config(
        "test", family="qwen3", vocab_size=2048, d_model=32, n_heads=4, n_kv_heads=2, d_head=8,
        d_ff=64, n_layers=2, max_seq_len=256))
    folder = tmp_path_factory.mktemp("student") / "model"
    save_pretrained(model, folder, tokenizer)
    return folder


def stage_of(chats, out, model=None, **changes):
    teacher = str(asset("shakespeare"))
    settings = dict(
        model=str(model or teacher), teacher=teacher, data=str(chats), out=str(out),
        val_fraction=0.2, optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.0),
        loader=LoaderConfig(batch_size=2, seq_len=128),
        train=TrainConfig(steps=4, eval_every=2, save_every=2, log_every=1, dtype="float32"))
    return DistillStage(**settings | changes)


OWN = dict(on_policy=1.0, rollout=RolloutConfig(prompts=2, n=2, max_new_tokens=8))


@pytest.mark.parametrize("changes", [{}, OWN, {"on_policy": 0.5, "rollout": OWN["rollout"]},
                                     {"writer": "teacher", "rollout": OWN["rollout"]}],
                         ids=["data", "own", "mixed", "teacher"])
def test_a_stopped_stage_goes_on_as_if_nothing_had_happened(chats, small, tmp_path, changes):
    changes = changes | {"model": small}
    whole = open_stage(stage_of(chats, tmp_path / "whole", **changes))
    assert train_stage(whole, quiet=True).finished
    part = open_stage(stage_of(chats, tmp_path / "part", **changes))
    stopped = train_stage(part, (lambda row: row["step"] == 2,), quiet=True)
    assert stopped.step == 2 and not stopped.finished
    again = open_stage(stage_of(chats, tmp_path / "part", resume=True, **changes))
    assert train_stage(again, quiet=True).finished
    ours, theirs = (load_run(tmp_path / name)[0].state_dict() for name in ("whole", "part"))
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, atol=1e-6, rtol=1e-5)
    begun = from_pretrained(small).state_dict()
    assert any(not torch.equal(begun[name], tensor) for name, tensor in ours.items())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_train_what_one_trains(chats, small, tmp_path, strategy):
    teacher = from_pretrained(asset("shakespeare")).float()  # stored in bfloat16, whose products
    save_pretrained(teacher, tmp_path / "teacher",  # depend on a batch's shape
                    load_tokenizer(asset("shakespeare")))
    words = ["distill", "--model", small, "--teacher", tmp_path / "teacher", "--data", chats,
             "--parallel.strategy", strategy, "--loader.batch_size", 2, "--loader.seq_len", 128,
             "--train.steps", 3, "--train.log_every", 1, "--train.eval_every", 0,
             "--train.dtype", "float32", "--optimizer.lr", "1e-3"]
    check_two_ranks(words, tmp_path)


def test_a_student_that_is_its_teacher_begins_with_a_loss_of_zero(chats, tmp_path):
    result = train_stage(open_stage(stage_of(chats, tmp_path / "same")), quiet=True)
    assert abs(result.rows[0]["loss"]) < 1e-3  # then Adam makes full steps of rounding errors


def test_a_teachers_text_goes_through_the_students_tokenizer():
    tokenizer = load_tokenizer(asset("shakespeare"))
    loader = WrittenLoader.__new__(WrittenLoader)
    loader.reader, loader.max_len = tokenizer, 40
    prompt = [{"role": "user", "content": "Who?"}]
    found = loader.read([(prompt, "The king."), (prompt, "word " * 100)])
    assert loader.skipped == 1 and len(found["input_ids"]) == 1
    answer = [i for i in found["labels"][0].tolist() if i != -100]
    assert tokenizer.decode(answer).startswith("The king.")
    with pytest.raises(ValueError, match="none of the teacher's 1 answers"):
        loader.read([(prompt, "word " * 100)])


def test_prompts_are_conversations_without_their_last_answer():
    class Row:
        def __init__(self, *roles):
            self.messages = [{"role": role, "content": "x"} for role in roles]

    task = ConversationPrompts([Row("user", "assistant"), Row("user"), Row("assistant"),
                       Row("system", "user", "assistant", "user", "assistant")])
    assert [len(m) for m in task.prompts] == [1, 4] and task[1].entry is None
    with pytest.raises(ValueError, match="nothing to sample answers to"):
        ConversationPrompts([Row("user")])


def test_stage_refuses(chats, tmp_path):
    for changes, message in (
        ({"on_policy": 1.5}, "on_policy=1.5"), ({"writer": "student"}, "unknown writer"),
        ({"on_policy": 1.0, "distill": DistillConfig(divergence="none", ce_weight=1.0)},
         "give a divergence")):
        with pytest.raises(ValueError, match=message):
            stage_of(chats, tmp_path / "x", **changes)


def test_the_command_has_a_flag_for_each_setting():
    from skylar.cli.commands import command_parser
    from skylar.cli.stages import stage_config

    words = ["--model", "a", "--teacher", "b", "--data", "c.jsonl", "--out", "d",
             "--distill.divergence", "jsd", "--distill.beta", "0.3", "--on_policy", "0.5",
             "--rollout.n", "4"]
    settings = command_parser("distill").parse_words(words)
    assert settings.pop("config") is None
    config = stage_config("distill", settings)
    assert config == DistillStage(
        model="a", teacher="b", data="c.jsonl", out="d", on_policy=0.5,
        distill=DistillConfig(divergence="jsd", beta=0.3), rollout=RolloutConfig(n=4))
