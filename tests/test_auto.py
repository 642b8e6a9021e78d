"""A Skylar model behind transformers' interface: its generation, with transformers' own caches."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from skylar.inference.generate import generate
from skylar.models.auto import SkylarForCausalLM, SkylarPretrainedConfig
from skylar.models.decoder import CausalLM
from skylar.models.families.gpt2 import GPT2Config
from skylar.models.families.qwen3 import Qwen3Config
from skylar.models.families.skylar import SkylarConfig
from skylar.models.hub import from_pretrained
from skylar.models.presets import config_to_dict

SIZES = dict(vocab_size=60, d_model=32, n_heads=4, n_layers=3, d_ff=48, max_seq_len=64,
             init_std=0.3)
HEADS = dict(d_head=8, n_kv_heads=2)
KINDS = {
    "windows, sinks": SkylarConfig(
        **SIZES, **HEADS, window=5, num_sink_tokens=2, full_every=2),
    "one KV head": Qwen3Config(**SIZES, **HEADS | {"n_kv_heads": 1}),
    "learned positions": GPT2Config(**SIZES),
}


def wrapped(kind: str) -> SkylarForCausalLM:
    torch.manual_seed(1)
    config = SkylarPretrainedConfig(config_to_dict(KINDS[kind]))
    return SkylarForCausalLM(config).eval()


def inner(model: SkylarForCausalLM) -> CausalLM:
    lm = CausalLM(model.config.own_config()).eval()
    lm.load_state_dict(model.state_dict())
    return lm


def batch(padded: bool = True) -> dict:
    ids = torch.randint(1, 60, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :4], mask[2, :9] = 0, 0
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [False, True])
def test_generation_with_their_cache_is_ours(kind, padded):
    model, given = wrapped(kind), batch(padded)
    options = dict(**given, max_new_tokens=30, do_sample=False, pad_token_id=0)
    want = generate(inner(model), given["input_ids"], 30, temperature=0,
                    attention_mask=given["attention_mask"])
    reads = []
    hook = model.model.embed_tokens.register_forward_pre_hook(
        lambda module, args: reads.append(args[0].shape[1]))
    assert torch.equal(model.generate(**options), want)
    hook.remove()
    assert reads == [12] + 29 * [1]  # every token is read once
    for cache in (dict(use_cache=False),
                  dict(cache_implementation="static", disable_compile=True)):
        assert torch.equal(model.generate(**options, **cache), want), cache


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [
    dict(num_beams=3, do_sample=False), dict(do_sample=True, top_k=20, num_return_sequences=2)])
def test_beams_and_samples_do_not_depend_on_the_cache(kind, options):
    model, texts = wrapped(kind), []
    for use_cache in (True, False):
        torch.manual_seed(0)
        texts.append(model.generate(**batch(), max_new_tokens=20, pad_token_id=0,
                                    use_cache=use_cache, **options))
    assert torch.equal(*texts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [
    lambda model: DynamicCache(), lambda model: None,
    lambda model: StaticCache(config=model.config, max_cache_len=20)],
    ids=["dynamic", "made by the model", "static"])
def test_parts_of_a_text_read_one_after_the_other(kind, make):
    model, given = wrapped(kind), batch()
    ids, mask = given["input_ids"], given["attention_mask"]
    memory, logits = make(model), []
    with torch.no_grad():
        whole = model(ids, attention_mask=mask)
        assert whole.past_key_values is None  # nobody asked for one
        for start, end in ((0, 7), (7, 8), (8, 12)):
            out = model(ids[:, start:end], attention_mask=mask[:, :end],
                        past_key_values=memory, use_cache=True)
            memory = out.past_key_values
            logits.append(out.logits)
    real = mask.bool()
    assert_close(torch.cat(logits, dim=1)[real], whole.logits[real], rtol=1e-4, atol=1e-4)
    assert memory.get_seq_length() == 12


def test_a_cache_is_taken_under_either_name_and_no_third():
    """transformers 5.24 renamed it; one that is ignored would give wrong text without a word."""
    model, given = wrapped("one KV head"), batch()
    ids, mask = given["input_ids"], given["attention_mask"]
    with torch.no_grad():
        whole = model(ids, attention_mask=mask).logits[:, 7:]
        for name in ("cache", "past_key_values"):
            memory = DynamicCache()
            model(ids[:, :7], attention_mask=mask[:, :7], **{name: memory})
            rest = model(ids[:, 7:], attention_mask=mask, **{name: memory}).logits
            assert_close(rest, whole, rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match="cache_params: give one cache"):
            model(ids, cache_params=DynamicCache())
        with pytest.raises(ValueError, match="cache and past_key_values: give one cache"):
            model(ids, cache=DynamicCache(), past_key_values=DynamicCache())


def test_a_mask_must_tell_of_the_remembered_tokens_too():
    model, given = wrapped("one KV head"), batch()
    with torch.no_grad():
        memory = model(**given, use_cache=True).past_key_values
        with pytest.raises(ValueError, match=r"attention_mask is \(3, 1\).* 3 rows of 13 tokens"):
            model(torch.ones(3, 1, dtype=torch.long), past_key_values=memory,
                  attention_mask=torch.ones(3, 1, dtype=torch.long))


@pytest.mark.parametrize("tied", [True, False])
def test_a_resized_vocabulary_is_saved_and_opened(tmp_path, tied):
    torch.manual_seed(0)
    config = SkylarConfig(**SIZES, **HEADS, tie_embeddings=tied)
    model = SkylarForCausalLM(SkylarPretrainedConfig(config_to_dict(config))).eval()
    model.resize_token_embeddings(67, mean_resizing=False)
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[1, 59, 66]])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    ours = from_pretrained(tmp_path)
    assert ours.config == replace(config, vocab_size=67)
    assert torch.equal(theirs(ids).logits, model(ids).logits)
    assert_close(ours(ids), model(ids).logits)
