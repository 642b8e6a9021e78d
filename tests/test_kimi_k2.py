"""Kimi K2: DeepSeek-V3 in other sizes. Its config.json, its parameters, its files.

What the layers compute is held against transformers in test_deepseek_v3.py; here, that they are
the same layers, in the shapes that only Kimi K2 has: one group, few heads, YaRN without a ramp.
"""

import json
from dataclasses import fields, replace

import pytest
import torch
from parity import close, forced, forward, rough
from test_deepseek_v3 import weights_of

from skylar.inference.generate import generate
from skylar.layers.deepseek_moe import DeepSeekMoEConfig
from skylar.layers.mlp import SwiGLUConfig
from skylar.models.decoder import (
    CausalLM,
    active_parameters,
    cache_bytes,
    count_parameters,
    flops_per_token,
)
from skylar.models.families.deepseek_v3 import DeepSeekV3Config
from skylar.models.families.kimi_k2 import KimiK2Config
from skylar.models.hub import from_pretrained, save_pretrained
from skylar.models.presets import (
    PRESETS,
    config_from_dict,
    config_from_hf,
    config_to_dict,
    config_to_hf,
    get_config,
)
from skylar.models.weight_map import check_weight_map, state_tensors
from skylar.training.qk_clip import QKClipConfig

transformers = pytest.importorskip("transformers")

PUBLISHED = {  # what moonshotai/Kimi-K2-Instruct says of its architecture
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001, "ep_size": 1, "first_k_dense_replace": 1, "hidden_act": "silu",
    "hidden_size": 7168, "initializer_range": 0.02, "intermediate_size": 18_432,
    "kv_lora_rank": 512, "max_position_embeddings": 131_072, "model_type": "kimi_k2",
    "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 384,
    "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 64,
    "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-6,
    "rope_scaling": {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0, "mscale": 1.0,
                     "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096,
                     "type": "yarn"},
    "rope_theta": 50_000.0, "routed_scaling_factor": 2.827, "scoring_func": "sigmoid",
    "seq_aux": True, "tie_word_embeddings": False, "topk_group": 1, "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16", "use_cache": True, "v_head_dim": 128, "vocab_size": 163_840}
SMALL = KimiK2Config(
    vocab_size=61, d_model=24, n_heads=2, n_layers=3, d_ff=40, first_dense=1, d_expert=12,
    n_experts=12, top_k=3, q_lora_rank=10, kv_lora_rank=12, qk_nope_head_dim=6,
    qk_rope_head_dim=8, v_head_dim=5, max_seq_len=64, init_std=0.3, rope_scaling={
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
        "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0})
CHANGED = {"vocab_size", "n_heads", "first_dense", "n_experts", "n_groups", "topk_groups",
           "routed_scale", "max_seq_len", "rope_theta", "rope_scaling"}


def test_the_published_config_is_the_default():
    assert config_from_hf(PUBLISHED) == KimiK2Config() == PRESETS["kimi-k2"]
    later = PUBLISHED | {"max_position_embeddings": 262_144, "rope_scaling": {
        **PUBLISHED["rope_scaling"], "factor": 64.0}}  # Kimi-K2-Instruct-0905
    assert config_from_hf(later).max_seq_len == 262_144


def test_what_differs_from_deepseek_v3():
    a, b = DeepSeekV3Config(), KimiK2Config()
    assert {f.name for f in fields(a) if getattr(a, f.name) != getattr(b, f.name)} == CHANGED
    assert [f.name for f in fields(a)] == [f.name for f in fields(b)]


def test_the_published_sizes():
    config = KimiK2Config()
    with torch.device("meta"):
        built = sum(p.numel() for p in CausalLM(config).parameters())
    assert built == count_parameters(config) == 1_026_408_209_408  # the report has 1.04e12
    active = active_parameters(config)
    assert active == built - 60 * (384 - 8) * 3 * 7168 * 2048 and round(active / 1e8) == 329
    assert flops_per_token(config, 0) / 6e9 == pytest.approx(31.7, abs=0.1)  # no lookup
    assert cache_bytes(config, 1) == cache_bytes(DeepSeekV3Config(), 1) == 61 * (512 + 64) * 2
    blocks = config.decoder().blocks
    assert [type(b.ffn) for b in blocks] == [SwiGLUConfig] + [DeepSeekMoEConfig] * 60
    assert config.n_experts / config.top_k == 48


def test_written_as_deepseek_v3_which_it_is():
    hf = json.loads(json.dumps(config_to_hf(SMALL)))
    assert hf["model_type"] == "deepseek_v3"
    assert hf["architectures"] == ["DeepseekV3ForCausalLM"]
    back = config_from_hf(hf)
    assert type(back) is DeepSeekV3Config
    assert back.decoder().blocks == SMALL.decoder().blocks
    assert config_from_hf(hf | {"model_type": "kimi_k2"}) == replace(
        SMALL, bias_rate=KimiK2Config().bias_rate)
    assert replace(SMALL, n_shared=0).to_hf() is None
    assert config_from_dict(json.loads(json.dumps(config_to_dict(SMALL)))) == SMALL


@pytest.mark.parametrize("changes", [
    {}, {"q_lora_rank": None}, {"top_k": 12}, {"tie_embeddings": True, "rope_scaling": None},
    {"first_dense": 0, "n_heads": 1}], ids=str)
def test_through_files_both_ways(tmp_path, changes):
    torch.manual_seed(0)
    model = rough(CausalLM(replace(SMALL, **changes)))
    check_weight_map(model.config.weight_map(), state_tensors(model))
    save_pretrained(model, tmp_path / "ours")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, experts_implementation="eager")
    assert not any(report.values()), report
    theirs.eval().save_pretrained(tmp_path / "theirs")
    back = from_pretrained(tmp_path / "theirs")
    assert all(torch.equal(a, state_tensors(back)[n]) for n, a in state_tensors(model).items())
    ids = torch.randint(61, (2, 20))
    logits, extras = forward(back, ids)
    with forced(theirs, extras, weights_of(model.config)):
        expected = theirs(ids, use_cache=False).logits
    close(logits, expected, "logits")
    for out in (logits, expected):
        torch.nn.functional.cross_entropy(
            out[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    mine = dict(back.named_parameters())
    for name, p in theirs.named_parameters():
        close(mine[name].grad, p.grad, name)
    with torch.no_grad():
        greedy = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                                 max_new_tokens=8, min_new_tokens=8, pad_token_id=0,
                                 eos_token_id=None)
    assert torch.equal(generate(back, ids, 8, temperature=0), greedy)


def test_presets():
    test, other = get_config("kimi-test"), get_config("deepseek-test")
    assert 5e6 < active_parameters(test) < count_parameters(test) < 9e6
    assert test.n_heads * 2 == other.n_heads and test.n_groups == 1
    assert test.n_experts * 2 == other.n_experts * 3  # as 384 to 256
    assert set(KimiK2Config.presets()) == {"kimi-test", "kimi-k2"}
    QKClipConfig(tau=100.0).check(CausalLM(replace(test, vocab_size=64)))
