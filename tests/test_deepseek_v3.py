"""DeepSeek-V3: random valid configs give what transformers gives, through files too."""

import json
import os
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from parity import close, forced, forward, rough
from safetensors.torch import load_file

from skylar.inference.generate import generate
from skylar.layers.deepseek_moe import BiasBalancingConfig, DeepSeekMoEConfig
from skylar.layers.mlp import SwiGLUConfig
from skylar.models.decoder import (
    CausalLM,
    active_parameters,
    cache_bytes,
    count_parameters,
    flops_per_token,
)
from skylar.models.families.deepseek_v3 import DeepSeekV3Config
from skylar.models.hub import from_pretrained, save_pretrained
from skylar.models.presets import PRESETS, config_from_hf, config_to_hf, get_config
from skylar.models.weight_map import check_weight_map, state_tensors
from skylar.training.loss import NextTokenObjective

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

BIAS = "e_score_correction_bias"
SCALINGS = [
    None,
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
     "mscale": 1.0, "mscale_all_dim": 1.0},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8,
     "mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 16.0, "beta_slow": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}]
SEEDS = range(16)


def draw(seed: int) -> DeepSeekV3Config:
    "Odd sizes and corners: no query latent, one group, all experts, all or no layers dense."
    rng = random.Random(seed)
    groups, size = rng.choice([1, 1, 2, 4]), rng.choice([2, 3, 4])
    allowed = rng.randint(1, groups)
    top_k = rng.choice([1, 2, allowed * size])
    return DeepSeekV3Config(
        vocab_size=rng.randint(20, 97), d_model=rng.choice([16, 24, 40]), d_ff=rng.choice([8, 36]),
        n_heads=rng.randint(1, 4), n_layers=rng.randint(1, 4), first_dense=rng.choice([0, 1, 1, 4]),
        d_expert=rng.choice([4, 12]), n_experts=groups * size, top_k=min(top_k, allowed * size),
        n_shared=rng.randint(1, 2), n_groups=groups, topk_groups=allowed,
        routed_scale=rng.choice([1.0, 2.5]), normalize=rng.random() < 0.8,
        q_lora_rank=rng.choice([None, 8, 12]), kv_lora_rank=rng.choice([4, 10]),
        qk_nope_head_dim=rng.choice([2, 6]), qk_rope_head_dim=rng.choice([2, 4, 8]),
        v_head_dim=rng.choice([2, 5, 8]), max_seq_len=64, rope_theta=rng.choice([100.0, 1e4]),
        rope_scaling=SCALINGS[seed % len(SCALINGS)], interleaved=rng.random() < 0.7,
        norm_eps=rng.choice([1e-6, 1e-3]), tie_embeddings=rng.random() < 0.5,
        bias=rng.random() < 0.3, init_std=0.3)


def peer(c: DeepSeekV3Config):
    "The same model in transformers, from names written down here, not by `to_hf`."
    return transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(
        vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=c.d_ff,
        moe_intermediate_size=c.d_expert, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, num_key_value_heads=c.n_heads, n_shared_experts=c.n_shared,
        n_routed_experts=c.n_experts, routed_scaling_factor=c.routed_scale,
        kv_lora_rank=c.kv_lora_rank, q_lora_rank=c.q_lora_rank,
        qk_rope_head_dim=c.qk_rope_head_dim, v_head_dim=c.v_head_dim,
        qk_nope_head_dim=c.qk_nope_head_dim, n_group=c.n_groups, topk_group=c.topk_groups,
        num_experts_per_tok=c.top_k, first_k_dense_replace=c.first_dense,
        norm_topk_prob=c.normalize, max_position_embeddings=64, rms_norm_eps=c.norm_eps,
        tie_word_embeddings=c.tie_embeddings, rope_interleave=c.interleaved,
        attention_bias=c.bias, rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}
        | (c.rope_scaling or {})))


def pair(seed: int):
    torch.manual_seed(seed)
    config = draw(seed)
    ours, theirs = rough(CausalLM(config), seed), peer(config).eval()
    theirs.set_experts_implementation("eager")
    found = theirs.load_state_dict(ours.state_dict())  # strict: names in memory are equal
    assert not found.missing_keys and not found.unexpected_keys
    return ours, theirs, torch.randint(config.vocab_size, (2, 24))


def weights_of(c: DeepSeekV3Config):
    "Their weights of the experts that ours chose."
    def weights(logits, experts):
        found = logits.sigmoid().gather(-1, experts)
        total = found.sum(-1, keepdim=True) + 1e-20 if c.normalize else 1.0
        return c.routed_scale * found / total
    return weights


@pytest.mark.parametrize("seed", SEEDS)
def test_logits_and_gradients_equal_transformers(seed):
    ours, theirs, ids = pair(seed)
    logits, extras = forward(ours, ids)
    with forced(theirs, extras, weights_of(ours.config)):
        expected = theirs(ids, use_cache=False).logits
    close(logits, expected, "logits")
    for out in (logits, expected):
        F.cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    mine, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert mine.keys() == other.keys()
    for name in other:
        close(mine[name].grad, other[name].grad, name)


def test_the_random_configs_reach_every_corner():
    drawn = [draw(seed) for seed in SEEDS]
    for found in ({c.q_lora_rank is None for c in drawn}, {c.n_groups == 1 for c in drawn},
                  {c.top_k == c.n_experts for c in drawn}, {c.tie_embeddings for c in drawn},
                  {c.first_dense == 0 for c in drawn}, {c.first_dense >= c.n_layers for c in drawn},
                  {c.interleaved for c in drawn}, {c.bias for c in drawn}):
        assert found == {True, False}


@pytest.mark.parametrize("seed", SEEDS)
def test_theirs_opens_ours_and_ours_opens_theirs(tmp_path, seed):
    torch.manual_seed(seed)
    model = rough(CausalLM(draw(seed)), seed)
    check_weight_map(model.config.weight_map(), state_tensors(model))
    save_pretrained(model, tmp_path / "ours", max_shard_size=20_000 if seed % 2 else 10**9)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, experts_implementation="eager")
    assert not any(report.values()), report
    assert type(theirs).__name__ == model.config.hf_architecture
    theirs.eval().save_pretrained(tmp_path / "theirs")
    back = from_pretrained(tmp_path / "theirs")
    assert back.decoder_config.blocks == model.decoder_config.blocks
    ours, again = state_tensors(model), state_tensors(back)
    assert ours.keys() == again.keys()
    assert all(torch.equal(ours[name], again[name]) for name in ours)
    ids = torch.randint(model.config.vocab_size, (2, 20))
    with torch.no_grad():
        logits, extras = forward(back, ids)
        with forced(theirs, extras, weights_of(model.config)):
            close(logits, theirs(ids, use_cache=False).logits, "logits")
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                                   max_new_tokens=12, min_new_tokens=12, pad_token_id=0,
                                   eos_token_id=None)
    assert torch.equal(generate(back, ids, 12, temperature=0), expected)


def small(**changes) -> DeepSeekV3Config:
    return replace(draw(1), first_dense=1, n_layers=3, n_experts=8, top_k=3, n_groups=4,
                   topk_groups=2, n_shared=1, **changes)


def test_names_and_dtypes_on_disk_are_those_of_the_published_files(tmp_path):
    torch.manual_seed(0)
    save_pretrained(rough(CausalLM(small())).to(torch.bfloat16), tmp_path / "m")
    stored = load_file(tmp_path / "m" / "model.safetensors")
    layer = {n.removeprefix("model.layers.1.mlp."): t for n, t in stored.items() if "s.1.mlp" in n}
    matrices = [f"{m}_proj.weight" for m in ("gate", "up", "down")]
    assert layer.keys() == {"gate.weight", f"gate.{BIAS}"} | {
        f"{part}.{m}" for m in matrices
        for part in ("shared_experts", *(f"experts.{e}" for e in range(8)))}
    kinds = {n: t.dtype for n, t in layer.items()}
    assert kinds.pop(f"gate.{BIAS}") == torch.float32 and set(kinds.values()) == {torch.bfloat16}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    theirs.save_pretrained(tmp_path / "t")
    again = load_file(tmp_path / "t" / "model.safetensors")
    assert again.keys() == stored.keys()
    for n, t in stored.items():  # transformers 5.24 keeps a router's weight in float32
        assert torch.equal(again[n].to(t.dtype), t), n
        assert again[n].dtype == t.dtype or n.endswith("mlp.gate.weight"), n


def test_left_padding_and_packed_documents_equal_separate_ones():
    torch.manual_seed(0)
    model = rough(CausalLM(small()))
    a, b = torch.randint(model.config.vocab_size, (2, 14)).unbind()
    a = a[:9]
    with torch.no_grad():
        alone = [model(x[None])[0] for x in (a, b)]
        documents = torch.tensor([[0] * 9 + [1] * 14])
        packed = model(torch.cat([a, b])[None], document_ids=documents)[0]
    torch.testing.assert_close(packed, torch.cat(alone), atol=2e-5, rtol=1e-4)
    continued = [generate(model, x[None], 8, temperature=0)[0, -8:] for x in (a, b)]
    ids = torch.stack([F.pad(a, (5, 0)), b])
    mask = torch.stack([F.pad(torch.ones_like(a), (5, 0)), torch.ones_like(b)])
    found = generate(model, ids, 8, temperature=0, attention_mask=mask)[:, -8:]
    assert torch.equal(found, torch.stack(continued))


def test_the_published_sizes():
    config = DeepSeekV3Config()
    with torch.device("meta"):
        built = sum(p.numel() for p in CausalLM(config).parameters())
    assert built == count_parameters(config) == 671_026_404_352
    assert round(built / 1e9) == 671 and int(active_parameters(config) / 1e9) == 37
    assert flops_per_token(config, 0) / 6e9 == pytest.approx(36.6, abs=0.3)  # no lookup
    assert cache_bytes(config, 1) == 61 * (512 + 64) * 2
    blocks = config.decoder().blocks
    assert [type(b.ffn) for b in blocks] == [SwiGLUConfig] * 3 + [DeepSeekMoEConfig] * 58
    yarn = blocks[0].attention.rope.scaling
    assert yarn.attention_scaling == 1.0 and yarn.mscale_all_dim == 1.0
    theirs = transformers.DeepseekV3Config(**config_to_hf(config))
    assert config_from_hf(json.loads(json.dumps(theirs.to_dict()))) == config


def test_presets():
    assert PRESETS["deepseek-v3"] == DeepSeekV3Config()
    test = get_config("deepseek-test")
    assert 5e6 < active_parameters(test) < count_parameters(test) < 9e6
    assert test.decoder().auxiliary == BiasBalancingConfig(rate=0.01, sequence=1e-4)


def test_all_layers_dense_have_no_auxiliary_and_no_extras():
    config = replace(small(), first_dense=3)
    assert config.decoder().auxiliary is None
    assert forward(CausalLM(config), torch.zeros(1, 4, dtype=torch.long))[1] == []


def test_what_transformers_has_no_class_for_is_saved_as_skylar(tmp_path):
    config = replace(small(), n_shared=0)
    assert config.to_hf() is None
    model = rough(CausalLM(config))
    save_pretrained(model, tmp_path / "m")
    back = from_pretrained(tmp_path / "m")
    assert back.config == config
    ids = torch.randint(config.vocab_size, (1, 8))
    assert torch.equal(back(ids), model(ids))


@pytest.mark.parametrize(("setting", "said"), [
    ({"scoring_func": "softmax"}, "scoring_func='softmax' has no equal in Skylar"),
    ({"topk_method": "group_limited_greedy"}, "topk_method"),
    ({"num_key_value_heads": 1}, "num_key_value_heads=1"),
    ({"moe_layer_freq": 2}, "moe_layer_freq=2"),
    ({"n_group": 3}, "n_groups=3 does not divide"),
    ({"hidden_act": "gelu"}, "hidden_act")])
def test_what_has_no_equal_is_refused(setting, said):
    with pytest.raises(ValueError, match=said):
        DeepSeekV3Config.from_hf(small().to_hf() | setting)


def test_it_learns_one_batch_and_balances():
    torch.manual_seed(0)
    config = small(bias_rate=0.01)
    objective = NextTokenObjective(CausalLM(replace(config, init_std=0.02)).train())
    ids = torch.randint(config.vocab_size, (4, 17))
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
    optimizer, losses = torch.optim.AdamW(objective.parameters(), 1e-2), []
    for _ in range(60):
        output = objective(batch)
        (output.loss_sum / output.n_valid).backward()
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step(output.sums, torch.tensor(True))
        losses.append(output.loss_sum.item() / 64)
    assert losses[-1] < 0.2 * losses[0]
    biases = [b for n, b in objective.named_buffers() if n.endswith(BIAS)]
    assert len(biases) == 2 and all(b.abs().max() > 0.02 for b in biases)
