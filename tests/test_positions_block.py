"""Positions and the block where a lesson does not go: compilers, dtypes, meta, dropout."""

import pytest
import torch
from torch import nn

from skylar.layers.attention import AttentionConfig
from skylar.layers.attention_backends import Positions
from skylar.layers.block import BlockConfig
from skylar.layers.mlp import MLPConfig
from skylar.layers.norm import LayerNormConfig
from skylar.layers.positions import (
    LearnedPositionsConfig,
    SinusoidalPositionsConfig,
    sinusoids,
)

KINDS = [LearnedPositionsConfig, SinusoidalPositionsConfig]


@pytest.mark.parametrize("config", KINDS)
@pytest.mark.parametrize("bad", [[8], [-1], [0, 3, 9], [[0, 1], [7, 8]]])
def test_position_outside_is_named(config, bad):
    with pytest.raises(ValueError, match=r"position (8|-1|9) is outside max_len=8"):
        config(max_len=8).build(4)(torch.tensor(bad))


@pytest.mark.parametrize("config", KINDS)
def test_first_last_empty_and_batched_positions(config):
    layer = config(max_len=8).build(4)
    table = layer(torch.arange(8))
    assert torch.equal(layer(torch.tensor([[0], [7]]))[:, 0], table[[0, 7]])
    assert layer(torch.empty(0, dtype=torch.long)).shape == (0, 4)
    assert torch.equal(layer(torch.arange(8).expand(3, 8)), table.expand(3, 8, 4))


@pytest.mark.parametrize("config", KINDS)
def test_positions_trace_as_one_graph(config):
    layer = config(max_len=8).build(4)
    one_graph = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(one_graph(torch.arange(8)), layer(torch.arange(8)))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: LearnedPositionsConfig(max_len=0), "max_len=0"),
        (lambda: SinusoidalPositionsConfig(max_len=-1), "max_len=-1"),
        (lambda: SinusoidalPositionsConfig(max_len=8, base=1.0), "base=1.0"),
        (lambda: SinusoidalPositionsConfig(max_len=8).build(5), "d_model=5 is odd"),
        (lambda: LearnedPositionsConfig(max_len=8).build(0), "d_model=0"),
        (lambda: LayerNormConfig(eps=0.0), "eps=0.0"),
        (lambda: MLPConfig(d_ff=0), "d_ff=0"),
        (lambda: MLPConfig(d_ff=8, dropout=1.0), "dropout=1.0"),
        (lambda: BlockConfig(attention=None, ffn=None, dropout=-0.1), "dropout=-0.1"),
    ],
)
def test_impossible_configs_name_the_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_sinusoids_keep_their_digits_far_out():
    far = 1_000_000
    exact = torch.tensor([far], dtype=torch.float64).sin().float()
    assert torch.equal(sinusoids(torch.tensor([far]), 2)[:, 0], exact)


def test_sinusoids_follow_the_model_and_stay_out_of_the_checkpoint():
    model = nn.ModuleDict({"positions": SinusoidalPositionsConfig(max_len=8).build(4)})
    assert model.to(torch.bfloat16)["positions"](torch.arange(8)).dtype == torch.bfloat16
    assert not model.state_dict() and not list(model.parameters())


def block_config(**changes):
    parts = {"attention": AttentionConfig(n_heads=2), "ffn": MLPConfig(d_ff=32)}
    return BlockConfig(**parts | changes)


@pytest.mark.parametrize("pre_norm", [True, False])
def test_block_hands_its_inputs_to_attention(pre_norm):
    torch.manual_seed(0)
    block, x = block_config(pre_norm=pre_norm).build(16), torch.randn(2, 6, 16)
    prepare, steps = block.self_attn.prepare, torch.arange(6)
    torch.testing.assert_close(block(x, prepare(x)), block(x))
    alone = prepare(x, Positions(  # each token a document of its own
        cache_position=steps, position_ids=steps, document_ids=steps.expand(2, -1)))
    torch.testing.assert_close(block(x, alone)[:, 3], block(x[:, 3:4])[:, 0])


@pytest.mark.parametrize("pre_norm", [True, False])
def test_block_dropout_only_while_training(pre_norm):
    torch.manual_seed(0)
    x = torch.randn(2, 6, 16)
    block = block_config(pre_norm=pre_norm, dropout=0.5, ffn=MLPConfig(d_ff=32, dropout=0.5))
    block = block.build(16)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))


def test_dropout_of_a_branch_never_touches_the_stream():
    block, x = block_config(dropout=0.999999).build(16), torch.randn(2, 6, 16)
    torch.manual_seed(0)
    assert torch.equal(block(x), x)  # both branches dropped: the stream passes unchanged


def test_block_without_biases_has_none():
    config = block_config(
        attention=AttentionConfig(n_heads=2, bias=False),
        ffn=MLPConfig(d_ff=32, bias=False),
        norm=LayerNormConfig(bias=False),
    )
    block = config.build(16)
    assert not [name for name, _ in block.named_parameters() if "bias" in name]
    assert sum(p.numel() for p in block.parameters()) == 4 * 16**2 + 2 * 16 * 32 + 2 * 16


def test_block_on_meta_takes_no_memory():
    with torch.device("meta"):
        block = block_config().build(16)
    assert block(torch.empty(2, 6, 16, device="meta")).shape == (2, 6, 16)


def test_configs_are_values():
    assert block_config() == block_config() and hash(block_config()) == hash(block_config())
    assert block_config() != block_config(pre_norm=False)
