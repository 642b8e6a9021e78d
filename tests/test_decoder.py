"""Decoder and CausalLM: built from configs, counted by formula, strict about input."""

import math
import random
import re
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from skylar.layers.attention import AttentionConfig
from skylar.layers.attention_backends import restarting_positions
from skylar.layers.block import BlockConfig
from skylar.layers.mlp import MLPConfig
from skylar.layers.norm import LayerNormConfig
from skylar.layers.positions import LearnedPositionsConfig, SinusoidalPositionsConfig
from skylar.models.decoder import (
    CausalLM,
    Decoder,
    DecoderConfig,
    count_parameters,
    flops_per_token,
    matmul_parameters,
)
from skylar.models.families.gpt2 import GPT2Config


def gpt2(**sizes) -> DecoderConfig:
    return GPT2Config(**sizes).decoder()


SMALL = dict(vocab_size=61, d_model=24, n_heads=3, n_layers=2, max_seq_len=32)


def small(seed: int = 0, **changes) -> CausalLM:
    torch.manual_seed(seed)
    return CausalLM(gpt2(**SMALL | changes))


def scramble(model: nn.Module) -> None:
    "Weights large enough that every path shows in the output."
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))


# --- the counts ---------------------------------------------------------------------------------


def random_config(seed: int) -> DecoderConfig:
    "Any decoder that this chapter's parts can make, blocks unlike each other included."
    rng = random.Random(seed)
    D = 2 * rng.randint(1, 20)

    def block():
        return BlockConfig(
            attention=AttentionConfig(
                n_heads=rng.randint(1, 5), d_head=rng.randint(1, 9), bias=rng.random() < 0.5
            ),
            ffn=MLPConfig(d_ff=rng.randint(1, 50), bias=rng.random() < 0.5),
            norm=LayerNormConfig(bias=rng.random() < 0.5),
            pre_norm=rng.random() < 0.5,
        )

    kinds = [block() for _ in range(rng.randint(1, 3))]
    T = rng.randint(1, 30)
    positions = [None, LearnedPositionsConfig(max_len=T + 1), SinusoidalPositionsConfig(max_len=T)]
    return DecoderConfig(
        vocab_size=rng.randint(1, 99),
        d_model=D,
        blocks=tuple(rng.choices(kinds, k=rng.randint(1, 6))),
        max_seq_len=T,
        positions=rng.choice(positions),
        tie_embeddings=rng.random() < 0.5,
    )


@pytest.mark.parametrize("seed", range(30))
def test_formulas_equal_the_built_module_and_the_flop_counter(seed):
    config = random_config(seed)
    model = CausalLM(config)
    assert count_parameters(config) == sum(p.numel() for p in model.parameters())
    linear = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)}
    assert matmul_parameters(config) == sum(linear.values())

    T = config.max_seq_len
    model.to("meta")  # shapes only: the counter sees both attention products
    with FlopCounterMode(display=False) as forward:
        logits = model(torch.zeros(2, T, dtype=torch.long, device="meta"))
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    whole = 2 * T * flops_per_token(config, T)
    assert 3 * forward.get_total_flops() == whole
    assert forward.get_total_flops() + backward.get_total_flops() == whole


def test_published_sizes():
    "Radford et al. 2019 by today's names: 124M, 355M, 774M, 1.56B."
    sizes = {(768, 12, 12): 124_439_808, (1024, 16, 24): 354_823_168,
             (1280, 20, 36): 774_030_080, (1600, 25, 48): 1_557_611_200}  # fmt: skip
    for (d_model, n_heads, n_layers), expected in sizes.items():
        config = gpt2(d_model=d_model, n_heads=n_heads, n_layers=n_layers)
        assert count_parameters(config) == expected


# --- the start ----------------------------------------------------------------------------------


def test_init_is_gpt2s():
    model = small(d_model=192, vocab_size=500, n_layers=8)
    L = len(model.config.blocks)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif p.ndim == 1:
            assert (p == 1).all(), name
        else:
            into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
            expected = 0.02 / math.sqrt(2 * L) if into_stream else 0.02
            assert p.std().item() == pytest.approx(expected, rel=0.03), name
            assert abs(p.mean().item()) < expected / 20, name


def test_loss_at_the_start_is_log_v():
    model = small(vocab_size=1000, d_model=48)
    ids = torch.randint(1000, (4, 32))
    loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), torch.randint(1000, (128,)))
    assert loss.item() == pytest.approx(math.log(1000), abs=0.05)


def test_same_seed_same_weights_other_seed_others():
    a, b, c = small(1), small(1), small(2)
    for (_, x), (_, y) in zip(a.named_parameters(), b.named_parameters()):
        assert torch.equal(x, y)
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)


@pytest.mark.parametrize("tie", [True, False])
def test_a_model_made_on_meta_is_tied_and_started_by_init_weights(tie):
    with torch.device("meta"):
        model = CausalLM(gpt2(**SMALL, tie_embeddings=tie))
    model.to_empty(device="cpu")
    torch.manual_seed(7)
    model.init_weights()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    other = small(tie_embeddings=tie)
    torch.manual_seed(7)
    other.init_weights()
    ids = torch.arange(32)[None]
    assert torch.equal(model(ids), other(ids))


def test_a_model_made_on_meta_gets_its_computed_tables():
    config = replace(gpt2(**SMALL), positions=SinusoidalPositionsConfig(max_len=32))
    with torch.device("meta"):
        model = CausalLM(config)
    model.to_empty(device="cpu")
    model.model.embed_positions.table.fill_(torch.nan)  # what memory may hold
    model.init_weights()
    expected = CausalLM(config).model.embed_positions.table
    assert torch.equal(model.model.embed_positions.table, expected)


def test_tied_matrix_gathers_gradient_from_both_ends():
    model = small()
    model(torch.tensor([[3, 3, 3]]))[..., 5].sum().backward()
    gradient = model.lm_head.weight.grad
    assert gradient[3].any() and gradient[5].any()  # looked up; scored
    assert len(list(model.parameters())) == len(set(model.parameters()))


def test_state_dict_round_trip():
    a, b = small(1), small(2)
    b.load_state_dict(a.state_dict())
    ids = torch.arange(32)[None]
    assert torch.equal(a(ids), b(ids))


# --- what forward promises ----------------------------------------------------------------------


def test_shapes_and_hidden_states():
    model = small()
    ids = torch.randint(61, (2, 7))
    hidden = model.model(ids)
    assert hidden.shape == (2, 7, 24) and model(ids).shape == (2, 7, 61)
    assert_close(model(ids), hidden @ model.lm_head.weight.T)
    assert model(ids[:0]).shape == (0, 7, 61) and model(ids[:, :1]).shape == (2, 1, 61)


def test_no_token_sees_its_future():
    model = small()
    scramble(model)
    ids = torch.randint(61, (2, 12))
    changed = ids.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 61
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert ((before - after).abs().amax((0, 2)) > 0)[7:].all()


def test_restarting_positions():
    documents = torch.tensor([[0, 0, 0, 1, 1, 2], [4, 4, 5, 6, 6, 6], [0, 0, 0, 0, 0, 0]])
    expected = [[0, 1, 2, 0, 1, 0], [0, 1, 0, 0, 1, 2], [0, 1, 2, 3, 4, 5]]
    assert restarting_positions(documents).tolist() == expected
    assert restarting_positions(torch.tensor([[9]])).tolist() == [[0]]


POSITIONS = {
    "learned": LearnedPositionsConfig(max_len=32),
    "sinusoidal": SinusoidalPositionsConfig(max_len=32),
    "none": None,
}


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("lengths", [[1, 1, 1], [16, 16], [1, 30, 1], [5, 9, 2, 11], [32]])
def test_packed_equals_separate_with_gradients(positions, lengths):
    config = replace(gpt2(**SMALL), positions=POSITIONS[positions])
    torch.manual_seed(3)
    packed_model, separate_model = CausalLM(config), CausalLM(config)
    scramble(packed_model)
    separate_model.load_state_dict(packed_model.state_dict())
    ids = torch.randint(61, (1, sum(lengths)))
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]

    packed = packed_model(ids, document_ids=documents)
    separate = torch.cat([separate_model(part) for part in ids.split(lengths, dim=1)], dim=1)
    assert_close(packed, separate)
    packed.pow(2).mean().backward()
    separate.pow(2).mean().backward()
    for p, q in zip(packed_model.parameters(), separate_model.parameters()):
        assert_close(p.grad, q.grad)


def test_given_positions_win_over_those_of_the_documents():
    model = small()
    ids, documents = torch.randint(61, (1, 8)), torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    restarting = restarting_positions(documents)
    assert torch.equal(
        model(ids, document_ids=documents),
        model(ids, position_ids=restarting, document_ids=documents),
    )
    running = torch.arange(8)[None]
    assert not torch.equal(
        model(ids, document_ids=documents),
        model(ids, position_ids=running, document_ids=documents),
    )


@dataclass(frozen=True)
class RunningMeanConfig:
    "A mixer without heads: the mean of the tokens so far, projected."

    def build(self, d_model: int) -> nn.Module:
        return RunningMean(d_model)


class RunningMean(nn.Module):
    def __init__(self, d_model: int):
        super().__init__()
        self.o_proj = nn.Linear(d_model, d_model)
        self.prepared, self.seen = 0, []

    def prepare(self, x, queries, keys, backend, slots):
        self.prepared += 1
        return queries

    def init_weights(self, init_std, residual_std):
        nn.init.normal_(self.o_proj.weight, std=residual_std)

    def forward(self, x, inputs, cache):
        self.seen.append(inputs)
        return self.o_proj(x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None])


def test_a_decoder_of_a_layer_it_never_heard_of():
    block = BlockConfig(attention=RunningMeanConfig(), ffn=MLPConfig(d_ff=8))
    config = DecoderConfig(vocab_size=9, d_model=6, blocks=(block,) * 3, max_seq_len=8)
    model = CausalLM(config)
    assert count_parameters(config) == sum(p.numel() for p in model.parameters())
    model(torch.zeros(1, 5, dtype=torch.long), document_ids=torch.zeros(1, 5))
    layers = [layer.self_attn for layer in model.model.layers]
    assert [layer.prepared for layer in layers] == [1, 0, 0]  # once for equal layers
    first = layers[0].seen[0]
    assert first.document_ids.shape == (1, 5)
    assert all(layer.seen[0] is first for layer in layers)


@pytest.mark.parametrize("packed", [False, True])
def test_forward_is_one_graph(packed):
    model = small()
    ids = torch.randint(61, (2, 16))
    documents = torch.arange(16).div(5, rounding_mode="floor").expand(2, -1) if packed else None
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(compiled(ids, document_ids=documents), model(ids, document_ids=documents))


def test_dropout_only_while_training():
    model = small(dropout=0.5)
    ids = torch.randint(61, (1, 16))
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


# --- what it refuses ----------------------------------------------------------------------------

BAD_ARGS = [
    (dict(d_model=25), "d_model=25 is not divisible by n_heads=3.*give d_head"),
    (dict(d_model=-24), "d_model=-24: give a whole number"),
    (dict(n_layers=0), "n_layers=0: give a whole number"),
    (dict(n_heads=0), "n_heads=0: give a whole number"),
    (dict(d_ff=0), "d_ff=0: give a whole number"),
    (dict(d_head=0), "d_head=0"),
    (dict(vocab_size=0), "vocab_size=0: give a whole number"),
    (dict(max_seq_len=-1), "max_seq_len=-1: give a whole number"),
    (dict(d_model=24.0), "d_model=24.0 is a float"),
    (dict(vocab_size=True), "vocab_size=True is a bool"),
    (dict(dropout=1.0), r"dropout=1.0"),
]


@pytest.mark.parametrize("bad, message", BAD_ARGS, ids=lambda x: str(x)[:40])
def test_family_refuses(bad, message):
    with pytest.raises(ValueError, match=message):
        gpt2(**SMALL | bad)


BAD_CONFIGS = [
    (dict(blocks=()), "blocks is empty; give at least one"),
    (dict(max_seq_len=33), "positions.max_len=32 is shorter than max_seq_len=33"),
    (dict(init_std=0.0), "init_std=0.0: give a number above 0"),
    (dict(vocab_size=-5), "vocab_size=-5: give a whole number"),
    (dict(dropout=-0.1), "dropout=-0.1"),
]


@pytest.mark.parametrize("bad, message", BAD_CONFIGS, ids=lambda x: str(x)[:40])
def test_config_refuses(bad, message):
    with pytest.raises(ValueError, match=message):
        replace(gpt2(**SMALL), **bad)


def test_d_head_frees_the_width():
    assert CausalLM(gpt2(**SMALL | dict(d_model=25, d_head=7)))(torch.zeros(1, 2).long()).any()


IDS = torch.zeros(2, 8, dtype=torch.long)
BAD_INPUTS = [
    (dict(input_ids=IDS[0]), r"input_ids has shape (8,); give (batch, length)"),
    (dict(input_ids=IDS.repeat(1, 5)), "sequence of 40 tokens is longer than max_seq_len=32"),
    (dict(input_ids=IDS + 61), "token id 61 is outside the vocabulary of 61 (0 to 60)"),
    (dict(input_ids=IDS - 2), "token id -2 is outside the vocabulary"),
    (dict(input_ids=IDS, position_ids=IDS[:, :7]), "position_ids has shape (2, 7)"),
    (dict(input_ids=IDS, document_ids=IDS[:, :7]), "document_ids has shape (2, 7)"),
    (dict(input_ids=IDS, document_ids=IDS[:1]), "document_ids has shape (1, 8)"),
    (dict(input_ids=IDS, position_ids=IDS + 32), "position 32 is outside max_len=32"),
]


@pytest.mark.parametrize("inputs, message", BAD_INPUTS, ids=lambda x: str(x)[:40])
def test_forward_refuses(inputs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        small()(**inputs)


def test_the_longest_sequence_is_accepted():
    assert small()(IDS.repeat(1, 4)).shape == (2, 32, 61)


def test_decoder_alone_can_be_started():
    decoder = Decoder(gpt2(**SMALL))
    decoder.init_weights()
    assert decoder.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.1)
