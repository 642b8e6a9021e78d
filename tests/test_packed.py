"""The twin for decoding: the same scores and tokens as the model it was made from."""

import copy
import random

import pytest
import torch
from torch.testing import assert_close

from skylar.inference.generate import generate, next_logits
from skylar.inference.packing import LARGE, PackedBlock, PackedLinear, packed, packing_pays, product
from skylar.layers.block import BlockConfig, MLPConfig
from skylar.layers.cache import KVCache
from skylar.layers.gqa import GQAConfig
from skylar.layers.norm import RMSNormConfig
from skylar.models.decoder import CausalLM, DecoderConfig
from skylar.models.presets import get_config

SMALL = dict(vocab_size=96, d_model=64, n_heads=4, n_kv_heads=2, d_head=16, n_layers=2)


def scrambled(config: DecoderConfig) -> CausalLM:
    """Every parameter random, so that no norm's gain is 1 and no bias 0."""
    torch.manual_seed(0)
    lm = CausalLM(config).eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return lm


def model(family: str = "qwen3", **changes) -> CausalLM:
    config = get_config("test", family, **{**SMALL, "max_seq_len": 64, **changes})
    return scrambled(config).bfloat16()


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
        assert_close(twin(ids), lm(ids), rtol=0.03, atol=0.1)  # scores of about 4
    assert not any(isinstance(m, torch.nn.Linear) for m in twin.modules())
    assert any(isinstance(m, torch.nn.Linear) for m in lm.modules())  # the model is untouched
    assert all(torch.equal(before[name], tensor) for name, tensor in lm.state_dict().items())


def random_changes(seed: int) -> tuple[str, dict]:
    """A family and sizes that a twin must get right: grouped heads, odd widths, windows."""
    draw = random.Random(seed)
    kv = draw.choice([1, 2, 3])
    changes = dict(
        vocab_size=draw.choice([96, 301]), d_model=draw.choice([24, 40, 72]), n_kv_heads=kv,
        n_heads=kv * draw.choice([1, 2, 4]), d_head=draw.choice([2, 8, 26]), d_ff=56,
        n_layers=draw.choice([1, 3]), rope_theta=draw.choice([100.0, 1e6]),
        tie_embeddings=draw.random() < 0.5, bias=draw.random() < 0.5, max_seq_len=48)
    family = draw.choice(["llama3", "qwen3", "skylar"])
    if family == "skylar":
        changes |= dict(ffn=draw.choice(["swiglu", "relu2"]), qk_norm=draw.random() < 0.5,
                        window=draw.choice([None, 3, 9]), sinks=draw.choice([0, 2]),
                        full_every=draw.choice([0, 2]))
    return family, changes


@pytest.mark.parametrize("seed", range(24))
def test_random_models_read_and_speak_alike(seed):
    family, changes = random_changes(seed)
    lm, B = scrambled(get_config("test", family, **changes)), 1 + seed % 3
    twin, ids = packed(lm, B), torch.randint(96, (B, 11))
    mask = torch.ones_like(ids)
    mask[0, :seed % 5] = 0  # padding, on the left
    assert all(isinstance(block, PackedBlock) for block in twin.model.layers)
    caches = [KVCache(lm.config, B, 20) for _ in range(2)]
    with torch.no_grad():
        for cut in (slice(0, 7), slice(7, 10), slice(10, 11)):  # two chunks, then one token
            a, b = (next_logits(m, ids[:, cut], mask[:, cut], cache)
                    for m, cache in zip((lm, twin), caches))
            assert_close(b, a, rtol=1e-4, atol=1e-4)
    texts = [generate(m, ids, 20, temperature=0, attention_mask=mask) for m in (lm, twin)]
    assert torch.equal(*texts)


def test_blocks_of_another_kind_keep_their_code():
    def config(**changes):
        block = BlockConfig(**{"attention": GQAConfig(n_heads=2), "norm": RMSNormConfig(),
                               "ffn": MLPConfig(d_ff=32), **changes})
        return DecoderConfig(vocab_size=50, d_model=16, blocks=(block,), max_seq_len=16)

    ids = torch.randint(50, (2, 9))
    for made, fits in ((config(), True), (config(pre_norm=False), False)):
        lm = scrambled(made)
        twin = packed(lm, 2)
        assert isinstance(twin.model.layers[0], PackedBlock) == fits
        with torch.no_grad():
            assert_close(twin(ids), lm(ids), rtol=1e-4, atol=1e-4)


def test_packed_continues_batches_with_another_number_of_rows():
    lm = model()
    twin, ids = packed(lm, 8), torch.randint(96, (5, 7))
    out = generate(twin, ids, 12, temperature=0)
    assert out.shape == (5, 19) and torch.equal(out[:, :7], ids)
    mask = torch.ones_like(ids)
    mask[2, :3] = 0
    assert generate(twin, ids, 6, temperature=0, attention_mask=mask).shape == (5, 13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("made_for", [1, 8])
@pytest.mark.parametrize("shape", [(40, 24), (1031, 256), (513, 600)])
def test_product_is_the_layers_side_by_side(shape, made_for, bias, dtype):
    out, width = shape  # small; large with short rows; large with long rows
    linears = [torch.nn.Linear(width, n, bias=bias, dtype=dtype) for n in (out, 7)]
    multiply = product(linears, made_for)
    for rows in ((1, 1), (2, 3), (8, 1)):  # also what it was not made for: a prompt
        x = torch.randn(*rows, width, dtype=dtype)
        with torch.no_grad():
            expected = torch.cat([linear(x) for linear in linears], dim=-1)
            found = multiply(x)
        assert found.is_contiguous() and not found.requires_grad
        tolerance = 1e-5 if dtype == torch.float32 else 0.03
        assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_when_packing_pays():
    def pays(dtype, shape, rows):
        return packing_pays(torch.empty(shape, dtype=dtype, device="meta"), rows)

    small, long, short = (128, 128), (LARGE // 512, 512), (LARGE // 128, 128)
    bf16, fp32 = torch.bfloat16, torch.float32
    assert [pays(fp32, shape, 1) for shape in (small, long, short)] == [False] * 3
    assert [pays(fp32, shape, 8) for shape in (small, long, short)] == [False, True, True]
    assert [pays(bf16, shape, 1) for shape in (small, long, short)] == [False, False, True]
    assert [pays(bf16, shape, 8) for shape in (small, long, short)] == [True] * 3


def test_in_float32_the_tokens_are_the_same():
    lm = model(vocab_size=20_000).float()
    for rows in (1, 8):
        twin, ids = packed(lm, rows), torch.randint(20_000, (rows, 7))
        assert isinstance(twin.lm_head, PackedLinear)
        out = generate(twin, ids, 12, temperature=0)
        assert torch.equal(out, generate(lm, ids, 12, temperature=0))


def test_another_precision_is_refused():
    with pytest.raises(ValueError, match="weights are torch.float64 on cpu; packing is for"):
        packed(model().double(), 8)
