"""Packed documents and left padding: for every family, what each text gives alone, forward and
backward; and for latent attention in both of its forms."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from skylar.inference.generate import generate
from skylar.layers.cache import KVCache
from skylar.layers.mla import (
    MultiHeadLatentAttention,
    absorbed_attention,
    expanded_attention,
)
from skylar.layers.router import RouterOutput, expert_counts
from skylar.models.decoder import CausalLM
from skylar.models.presets import FAMILIES, find_family
from skylar.models.weight_map import state_tensors
from skylar.training.loss import NextTokenObjective

SIZES = dict(vocab_size=41, d_model=24, n_heads=4, n_layers=3, max_seq_len=64, init_std=0.3)
HEADS = dict(n_kv_heads=2, d_head=6, d_ff=20)
EXPERTS = dict(n_experts=5, top_k=2)
OWN = {
    "gpt2": dict(), "granite": dict(n_kv_heads=2, d_ff=20), "skylar": HEADS | dict(
        window=5, num_sink_tokens=1, full_every=2),
    "mixtral": HEADS | EXPERTS, "qwen3_moe": HEADS | EXPERTS | dict(mlp_only_layers=(0,)),
    "gpt_oss": HEADS | EXPERTS | dict(window=5, rope_scaling=None),
    "deepseek_v3": dict(
        d_ff=20, d_expert=10, n_experts=8, top_k=3, n_groups=4, topk_groups=2, first_dense=1,
        q_lora_rank=12, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5,
        rope_scaling=None)}
NAMES = [family.name for family in FAMILIES]
SPARSE = ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"]


def make(family: str, **more) -> CausalLM:
    "Norms, biases, sinks and the routers' biases away from 0 and 1."
    torch.manual_seed(0)
    sizes = SIZES | OWN.get(family, HEADS)
    if family.startswith("kimi"):
        sizes = SIZES | OWN["deepseek_v3"]
    model = CausalLM(find_family(family)(**sizes, **more)).eval()
    with torch.no_grad():
        for tensor in state_tensors(model).values():
            if tensor.ndim == 1:
                tensor += 0.3 * torch.randn(tensor.shape)
    return model


def texts_of(lengths) -> list[torch.Tensor]:
    return [torch.randint(41, (1, n), generator=torch.Generator().manual_seed(n)) for n in lengths]


LENGTHS = (9, 1, 17, 4)


def packed(texts) -> tuple[torch.Tensor, torch.Tensor]:
    documents = [torch.full(text.shape, i) for i, text in enumerate(texts)]
    return torch.cat(texts, 1), torch.cat(documents, 1)


def gradients(model, run) -> list:
    "Logits, and the gradients of a weighted sum of them."
    model.zero_grad()
    logits = run()
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (logits * weight).sum().backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters())]


def assert_same(found, expected, names) -> None:
    for name, a, b in zip(names, found, expected, strict=True):
        error, size = (a - b).abs().max(), b.abs().max()
        assert error <= 1e-4 * size + 1e-5, f"{name}: {error:.1e} apart, of {size:.1e}"


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", NAMES)
def test_packed_documents_are_separate_ones_forward_and_backward(family, training):
    "In training, too: no expert has a capacity, so that no token depends on its neighbors."
    model, texts = make(family).train(training), texts_of(LENGTHS)
    ids, documents = packed(texts)
    together = gradients(model, lambda: model(ids, document_ids=documents))
    alone = gradients(model, lambda: torch.cat([model(text) for text in texts], 1))
    assert_same(together, alone, ["logits", *dict(model.named_parameters())])
    leaky = model(ids)  # as one document it would be another function
    assert (leaky[:, 9:] - together[0][:, 9:]).abs().max() > 1e-3


@pytest.mark.parametrize("family", NAMES)
def test_left_padding_then_a_cache(family):
    "A padded prompt and its continuation, token by token: all logits are those of each text."
    model, lengths = make(family), (12, 5, 1)
    rows, more = texts_of(lengths), torch.randint(41, (3, 6))
    ids = torch.cat([F.pad(row, (12 - row.shape[1], 0)) for row in rows])
    mask = torch.stack([torch.arange(12) >= 12 - n for n in lengths]).long()
    cache = KVCache(model.config, 3)
    with torch.no_grad():
        found = [model(ids, document_ids=mask, cache=cache)]
        found = torch.cat(found + [model(t, cache=cache) for t in more.split(1, 1)], 1)
        for i, (row, n) in enumerate(zip(rows, lengths)):
            alone = model(torch.cat([row, more[i:i + 1]], 1))[0]
            assert_close(found[i, 12 - n:], alone, atol=5e-5, rtol=1e-4)
    mask = torch.cat([mask, torch.ones(3, 6, dtype=torch.long)], 1)
    ids = torch.cat([ids, more], 1)
    together = generate(model, ids, 8, temperature=0, attention_mask=mask)
    for i, (row, n) in enumerate(zip(rows, lengths)):
        alone = generate(model, torch.cat([row, more[i:i + 1]], 1), 8, temperature=0)
        assert torch.equal(alone[0], together[i, 12 - n:])


@pytest.mark.parametrize("family", SPARSE)
def test_routers_decide_for_a_token_as_they_do_alone(family):
    model, texts = make(family), texts_of(LENGTHS)
    ids, documents = packed(texts)
    with torch.no_grad():
        _, extras = model.model(ids, document_ids=documents, return_extras=True)
        apart = [model.model(text, return_extras=True)[1] for text in texts]
    assert extras and all(type(routed) is RouterOutput for routed in extras)
    for routed, *alone in zip(extras, *apart, strict=True):
        assert torch.equal(routed.experts, torch.cat([other.experts for other in alone]))
        assert_close(expert_counts(routed), sum(expert_counts(other) for other in alone))


@pytest.mark.parametrize("family", SPARSE)
def test_a_padded_batch_has_the_balance_of_its_tokens(family):
    "Loss, metrics and counts of a batch with padding are those of the text without."
    more = dict(sequence_loss=0.1) if family == "deepseek_v3" else dict(balance_loss=0.1)
    model, (text,) = make(family, **more), texts_of([11])
    padded = F.pad(text, (6, 0))
    mask = F.pad(torch.ones_like(text), (6, 0))
    batch = {"input_ids": padded[:, :-1], "attention_mask": mask[:, :-1],
             "document_ids": mask[:, :-1],
             "labels": padded[:, 1:].masked_fill(mask[:, :-1] == 0, -100)}
    objective = NextTokenObjective(model)
    found = objective.train()(batch)
    without = objective(dict(batch, attention_mask=torch.ones_like(mask[:, :-1])))
    assert (found.loss_sum - without.loss_sum).abs() > 1e-4  # the mask decides
    alone = objective({"input_ids": text[:, :-1], "labels": text[:, 1:]})
    assert_close(found.loss_sum, alone.loss_sum, rtol=1e-5, atol=1e-4)
    assert found.metrics.keys() == alone.metrics.keys() and found.metrics
    for name, (total, count) in found.metrics.items():
        assert_close(torch.as_tensor(total / count), torch.as_tensor(
            alone.metrics[name][0] / alone.metrics[name][1]))
    for name, value in found.sums.items():
        assert_close(value, alone.sums[name])


# --- both forms of latent attention ---


@pytest.mark.parametrize("form", [expanded_attention, absorbed_attention])
@pytest.mark.parametrize("backend", ["auto", "reference", "sdpa"])
def test_both_forms_keep_documents_apart(monkeypatch, form, backend):
    monkeypatch.setattr(MultiHeadLatentAttention, "attention_form", form)
    model, texts = make("deepseek_v3"), texts_of(LENGTHS)
    model.set_attention_backend(backend)
    ids, documents = packed(texts)
    together = gradients(model, lambda: model(ids, document_ids=documents))
    alone = gradients(model, lambda: torch.cat([model(text) for text in texts], 1))
    assert_same(together, alone, ["logits", *dict(model.named_parameters())])


@pytest.mark.parametrize("form", [expanded_attention, absorbed_attention])
@pytest.mark.parametrize("chunks", [(12, 1, 1, 1, 1, 1, 1), (7, 5, 6), (1,) * 18])
@torch.no_grad()
def test_both_forms_continue_padded_prompts_from_the_cache(monkeypatch, form, chunks):
    monkeypatch.setattr(MultiHeadLatentAttention, "attention_form", form)
    model, lengths = make("deepseek_v3"), (18, 8, 13)
    rows = texts_of(lengths)
    ids = torch.cat([F.pad(row, (18 - row.shape[1], 0)) for row in rows])
    mask = torch.stack([torch.arange(18) >= 18 - n for n in lengths]).long()
    cache, parts = KVCache(model.config, 3), []
    for part, seen in zip(ids.split(chunks, 1), mask.split(chunks, 1)):
        parts.append(model(part, document_ids=seen, cache=cache))
    found = torch.cat(parts, 1)
    for i, (row, n) in enumerate(zip(rows, lengths)):
        assert_close(found[i, 18 - n:], model(row)[0], atol=5e-5, rtol=1e-4)
