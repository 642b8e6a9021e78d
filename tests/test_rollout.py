"""Rollouts: what is sampled, how probable it was, and a loader that the Trainer can resume."""

import json

import pytest
import torch

from skylar.data.chat_rows import BadRows
from skylar.inference.generate import generate
from skylar.posttrain.preference import token_logprobs
from skylar.posttrain.rollout import (
    FileTask,
    ReasoningGymTask,
    RolloutConfig,
    RolloutLoader,
    by_uniform,
    final_answer,
    reading,
    rollout,
)
from skylar.posttrain.sums import (
    END,
    SumTask,
    SumTokenizer,
    expected_reward,
    right_probabilities,
    sum_batch,
    sums_model,
)

PROMPTS = [[5, 6, 7, 8], [9], [10, 11]]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def sample(model, prompts=PROMPTS, n=4, tokens=10, **settings):
    settings = {"eos_token_id": 1, "generator": seeded()} | settings
    return rollout(model, prompts, n, tokens, **settings)


@pytest.fixture
def model(tiny_model):
    return tiny_model().eval()


# --- sampling ---


@pytest.mark.parametrize("fuse", [False, None])
def test_greedy_completions_are_those_of_generate(model, fuse):
    found = sample(model, n=1, temperature=0, generator=None, fuse=fuse).completions()
    for prompt, completion in zip(PROMPTS, found):
        alone = generate(model, torch.tensor([prompt]), 10, 0, eos_token_id=1)[0]
        alone = alone[len(prompt):].tolist()
        assert completion == alone[:alone.index(1) if 1 in alone else None]


@pytest.mark.parametrize("settings", [
    {}, {"temperature": 0.7}, {"temperature": 1.5, "eos_token_id": [1, 2, 3]}])
def test_log_probabilities_are_the_trainers(model, settings):
    found = sample(model, **settings)
    batch = found.batch()
    with torch.no_grad():
        ours = token_logprobs(model, batch, settings.get("temperature", 1.0))
    torch.testing.assert_close(ours, batch["sampler_logprobs"], atol=1e-4, rtol=1e-4)
    assert (batch["labels"] != -100).sum() == found.mask.sum()
    assert not batch["sampler_logprobs"][batch["labels"] == -100].any()


def test_filtered_samples_have_the_filtered_distributions_log_probabilities(model):
    found = sample(model, top_k=1)
    assert not found.logprobs.abs().max() > 1e-6  # the only token left has probability 1


def test_rows_begin_with_their_prompts_and_end_with_an_end_token(model):
    found = sample(model, tokens=50)
    batch, rows = found.batch(), found.completions()
    for i, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"])):
        prompt = PROMPTS[i // 4]
        assert ids[:len(prompt)].tolist() == prompt
        wanted = rows[i] + [1] * bool(found.finished[i])
        assert labels[labels != -100].tolist() == wanted
        first = len(prompt) - 1
        assert (labels[first:first + len(wanted)] != -100).all()
    assert found.finished.any(), "no completion ended: the test shows nothing"


def test_no_column_is_kept_that_no_row_uses(model):
    labels = sample(model).batch()["labels"]
    assert (labels[:, -1] != -100).any()


def test_batch_mates_and_padding_change_nothing(model):
    together = sample(model, n=1, temperature=0, generator=None)
    whole = together.batch()
    for i, prompt in enumerate(PROMPTS):
        alone = sample(model, [prompt], n=1, temperature=0, generator=None)
        assert alone.completions()[0] == together.completions()[i]
        with torch.no_grad():
            here, there = (token_logprobs(model, b) for b in (alone.batch(), whole))
        kept = whole["labels"][i] != -100
        torch.testing.assert_close(here[here != 0], there[i][kept], atol=1e-5, rtol=1e-5)


def test_a_completion_depends_on_its_own_numbers_alone(model):
    uniforms = torch.rand(12, 10, generator=seeded())
    together = sample(model, uniforms=uniforms).completions()
    for i, prompt in enumerate(PROMPTS):
        own = uniforms[4 * i:4 * i + 4]
        assert sample(model, [prompt], uniforms=own).completions() == together[4 * i:4 * i + 4]
    with pytest.raises(ValueError, match="uniforms"):
        sample(model, uniforms=uniforms[:, :3])


def test_tokens_are_drawn_with_their_probabilities():
    logits = torch.tensor([0.5, 0.3, 0.0, 0.2]).log().expand(100_000, 4)
    found = by_uniform(logits, torch.rand(100_000, generator=seeded()))
    shares = torch.bincount(found, minlength=4) / 100_000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.0, 0.2]), atol=0.01, rtol=0)
    assert shares[2] == 0
    edges = by_uniform(logits[:2], torch.tensor([0.0, 1.0]))
    assert edges.tolist() == [0, 3]


def test_the_same_seed_gives_the_same_completions_and_another_others(model):
    first, again = sample(model), sample(model)
    other = sample(model, generator=seeded(1))
    assert first.ids.equal(again.ids) and first.logprobs.equal(again.logprobs)
    assert first.completions() != other.completions()


def test_what_is_sampled_may_enter_a_graph(model):
    batch = sample(model).batch()
    logprobs = token_logprobs(model, batch)
    ((logprobs - batch["sampler_logprobs"]).exp() * logprobs).sum().backward()
    assert model.lm_head.weight.grad.isfinite().all()


def test_mode_and_weights_stay(model):
    model.train()
    before = [p.clone() for p in model.parameters()]
    sample(model)
    with reading(model):
        assert not model.training and not torch.is_grad_enabled()
    assert model.training
    assert all(a.equal(b) for a, b in zip(before, model.parameters()))


@pytest.mark.parametrize(("change", "message"), [
    ({"prompts": []}, "empty prompt"), ({"prompts": [[3], []]}, "empty prompt"),
    ({"n": 0}, "n=0"), ({"tokens": 0}, "max_new_tokens=0"), ({"tokens": 61}, "context of 64"),
    ({"temperature": -1.0}, "temperature"), ({"top_p": 0.0}, "top_p")])
def test_impossible_settings_are_refused(model, change, message):
    with pytest.raises(ValueError, match=message):
        sample(model, **change)


# --- tasks ---


def test_a_file_names_its_bad_rows_or_skips_and_counts_them(tmp_path):
    path = tmp_path / "task.jsonl"
    good = json.dumps({"prompt": "2 + 2", "answer": "4"})
    bad = ["{", "[]", json.dumps({"prompt": "x"}), json.dumps({"prompt": " ", "answer": "1"}),
           json.dumps({"prompt": "x", "answer": 4})]
    for row in bad:
        path.write_text(f"{good}\n\n{row}\n")
        with pytest.raises(ValueError, match=f"{path.name}:3"):
            FileTask(path)
    path.write_text("\n".join([good, *bad]))
    with pytest.warns(UserWarning, match=rf"{len(bad)} of 6 rows cannot be used: .*task.jsonl:2"):
        task = FileTask(path, BadRows("skip"))
    assert len(task) == 1
    assert task.score("so\nAnswer: 4", task[0]) == 1 and task.score("5", task[0]) == 0
    path.write_text("\n")
    with pytest.raises(ValueError, match="no example"):
        FileTask(path)


@pytest.mark.parametrize(("text", "answer"), [
    ("Answer: 7", "7"), ("Answer: 1\nAnswer: 7\nmore", "7"), ("so\n7\n\n", "7"), ("", ""),
    ("Answer:", ""), ("  7  ", "7")])
def test_final_answer(text, answer):
    assert final_answer(text) == answer


def test_a_generated_task_scores_its_own_answers():
    pytest.importorskip("reasoning_gym")
    task = ReasoningGymTask("chain_sum", size=20, max_terms=2, max_digits=1)
    for i in range(20):
        example = task[i]
        assert task.score(f"Answer: {example.entry['answer']}", example) == 1
        assert task.score("Answer: no", example) < 1


# --- the loader ---


def loader(model, **settings):
    names = ("rank", "world_size", "grad_accum_steps", "prepare")
    others = {k: settings.pop(k) for k in names if k in settings}
    config = RolloutConfig(**dict(prompts=4, n=2, max_new_tokens=3, chat=False) | settings)
    return RolloutLoader(model, SumTokenizer(), SumTask(), config, **others)


@pytest.fixture(scope="module")
def sums():
    return sums_model(steps=0)


def take(batches, n):
    found = iter(batches)
    return [next(found) for _ in range(n)]


def equal(a, b):
    return a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


def test_a_loader_goes_on_where_it_stopped(sums):
    whole = take(loader(sums), 5)
    first = loader(sums)
    take(first, 2)
    second = loader(sums)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert all(equal(a, b) for a, b in zip(whole[2:], take(second, 3)))
    assert not equal(whole[0], whole[1])


@pytest.mark.parametrize("change", [{"seed": 1}])
def test_a_state_of_another_run_is_refused(sums, change):
    with pytest.raises(ValueError, match="seed"):
        loader(sums, **change).load_state_dict(loader(sums).state_dict())


def test_every_prompt_comes_once_an_epoch(sums):
    found = loader(sums, prompts=10)
    prompts = [e.prompt for i in range(0, 200, 10) for e in found.examples(i)]
    assert len(set(prompts[:100])) == len(set(prompts[100:])) == 100
    assert prompts[:100] != prompts[100:]


def test_ranks_share_the_prompts(sums):
    alone = [e.prompt for e in loader(sums).examples(8)]
    parts = [loader(sums, rank=r, world_size=2).examples(8) for r in range(2)]
    assert [e.prompt for part in parts for e in part] == alone
    whole = next(iter(loader(sums)))
    shares = [next(iter(loader(sums, rank=r, world_size=2))) for r in range(2)]
    for key in ("rewards", "finished"):
        assert torch.cat([share[key] for share in shares]).equal(whole[key])
    written = [[row[row != -100].tolist() for row in b["labels"]] for b in (whole, *shares)]
    assert written[0] == written[1] + written[2]
    with pytest.raises(ValueError, match="prompts=3"):
        loader(sums, prompts=3, world_size=2)


def test_iterations_repeat_the_micro_batches_of_a_step_in_order(sums):
    found = take(loader(sums, iterations=3, grad_accum_steps=2), 8)
    for i in range(2):
        assert found[i] is found[i + 2] is found[i + 4]
    assert not equal(found[0], found[1]) and not equal(found[0], found[6])
    assert "old_logprobs" in found[0]
    torch.testing.assert_close(found[0]["old_logprobs"], found[0]["sampler_logprobs"],
                               atol=1e-5, rtol=1e-5)


def test_every_value_has_a_row_for_each_completion(sums):
    batch = take(loader(sums, prepare=lambda b, n: {"advantages": b["rewards"]}), 1)[0]
    assert {len(v) for v in batch.values()} == {8}


# --- sums ---


def test_the_expected_reward_is_the_mean_of_samples(sums):
    torch.manual_seed(0)
    prompts = [SumTokenizer().encode(SumTask()[i].prompt) for i in range(100)]
    found = rollout(sums, prompts, 200, 3, eos_token_id=END, generator=seeded())
    texts = [SumTokenizer().decode(ids) for ids in found.completions()]
    task = SumTask()
    mean = sum(task.score(t, task[i // 200]) for i, t in enumerate(texts)) / len(texts)
    assert abs(mean - expected_reward(sums)) < 0.002


def test_sums_as_a_batch():
    batch = sum_batch(torch.tensor([3, 9]), torch.tensor([4, 9]), torch.tensor([7, 18]))
    assert batch["input_ids"].tolist() == [[3, 10, 4, 11, 7, END], [9, 10, 9, 11, 1, 8]]
    assert batch["labels"].tolist() == [[-100] * 3 + [7, END, -100], [-100] * 3 + [1, 8, END]]


def test_an_untrained_model_is_sometimes_right(sums):
    found = right_probabilities(sums)
    assert found.shape == (100,) and 0 < found.mean() < 0.05
