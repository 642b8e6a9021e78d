"""Packed weights: the same scores and tokens as the model they were packed from."""

import copy

import pytest
import torch
from torch.testing import assert_close

from skylar.inference.generate import generate
from skylar.inference.packing import PackedLinear, packed
from skylar.models.decoder import CausalLM
from skylar.models.presets import get_config

SMALL = dict(vocab_size=96, d_model=64, n_heads=4, n_kv_heads=2, d_head=16, n_layers=2)


def model(family: str = "qwen3", **changes) -> CausalLM:
    torch.manual_seed(0)
    config = get_config("test", family, **{**SMALL, "max_seq_len": 64, **changes})
    return CausalLM(config).bfloat16().eval()


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("family, changes", [
    ("qwen3", {}), ("llama3", {"bias": True}), ("gpt2", {"n_kv_heads": None}), ("skylar", {}),
    ("qwen3", {"tie_embeddings": False}),
])
def test_packed_scores_are_the_models(family, changes, rows):
    lm = model(family, **changes)
    before = copy.deepcopy(lm.state_dict())
    ids = torch.randint(96, (rows, 9))
    twin = packed(lm, rows)
    with torch.no_grad():
        assert_close(twin(ids), lm(ids), rtol=0.02, atol=0.02)
    assert not any(isinstance(m, torch.nn.Linear) for m in twin.modules())
    assert any(isinstance(m, torch.nn.Linear) for m in lm.modules())  # the model is untouched
    assert all(torch.equal(before[name], tensor) for name, tensor in lm.state_dict().items())


def test_packed_continues_batches_with_another_number_of_rows():
    lm = model()
    twin, ids = packed(lm, 8), torch.randint(96, (5, 7))
    out = generate(twin, ids, 12, temperature=0)
    assert out.shape == (5, 19) and torch.equal(out[:, :7], ids)
    mask = torch.ones_like(ids)
    mask[2, :3] = 0
    assert generate(twin, ids, 6, temperature=0, attention_mask=mask).shape == (5, 13)


def test_one_layer_with_a_bias():
    linear = torch.nn.Linear(24, 40).bfloat16()
    x = torch.randn(2, 3, 24).bfloat16()
    with torch.no_grad():
        assert_close(PackedLinear(linear, 6)(x), linear(x), rtol=0.02, atol=0.02)


def test_in_float32_the_head_is_packed_and_the_tokens_are_the_same():
    lm = model(vocab_size=20_000).float()
    twin, ids = packed(lm, 8), torch.randint(20_000, (8, 7))
    assert isinstance(twin.lm_head, PackedLinear)
    assert isinstance(twin.model.layers[0].mlp.up_proj, torch.nn.Linear)
    out = generate(twin, ids, 12, temperature=0)
    assert torch.equal(out, generate(lm, ids, 12, temperature=0))


def test_another_precision_is_refused():
    with pytest.raises(ValueError, match="weights are torch.float64 on cpu; packing is for"):
        packed(model().double(), 8)
