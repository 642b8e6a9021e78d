"""What the decoder shares between equal layers lets them compile and be checkpointed alike."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from skylar.layers.attention import AttentionConfig
from skylar.layers.block import BlockConfig
from skylar.layers.gqa import GQAConfig
from skylar.layers.mlp import MLPConfig, SwiGLUConfig
from skylar.layers.norm import RMSNormConfig
from skylar.layers.positions import LearnedPositionsConfig
from skylar.layers.sliding_window import SlidingWindow
from skylar.models.decoder import CausalLM, DecoderConfig

D, V, T = 32, 53, 48
NORM = RMSNormConfig()
GQA = GQAConfig(n_heads=4, n_kv_heads=2, qk_norm=NORM)
NEAR = replace(GQA, window=SlidingWindow(size=5, num_sink_tokens=2))


def build(*attentions) -> CausalLM:
    torch.manual_seed(0)
    blocks = tuple(BlockConfig(attention=a, ffn=SwiGLUConfig(d_ff=48), norm=NORM)
                   for a in attentions)
    return CausalLM(DecoderConfig(
        vocab_size=V, d_model=D, blocks=blocks, max_seq_len=T, norm=NORM, init_std=0.1))


def build_gpt(n_layers: int) -> CausalLM:
    torch.manual_seed(0)
    block = BlockConfig(attention=AttentionConfig(n_heads=4), ffn=MLPConfig(d_ff=64))
    return CausalLM(DecoderConfig(
        vocab_size=V, d_model=D, blocks=(block,) * n_layers, max_seq_len=T,
        positions=LearnedPositionsConfig(max_len=T)))


MODELS = {
    "gqa": lambda: build(*[GQA] * 6),
    "window": lambda: build(*[NEAR] * 6),
    "gpt": lambda: build_gpt(6),
}
IDS = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(0))
DOCUMENTS = torch.zeros(2, T, dtype=torch.long)
DOCUMENTS[0, 20:] = 1
DOCUMENTS[1, 7:] = 1


def loss_and_gradients(model, documents=None):
    model.zero_grad()
    loss = model(IDS, document_ids=documents).logsumexp(-1).square().sum()
    loss.backward()
    return loss.item(), [p.grad.clone() for p in model.parameters()]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", MODELS)
def test_identical_blocks_compile_to_one_graph(name):
    """Six blocks, one compilation; another when documents come, and then no more."""
    model = MODELS[name]()
    expected = [loss_and_gradients(model, d) for d in (None, DOCUMENTS)]
    counter = CompileCounter()
    for layer in model.model.layers:
        layer.compile(backend=counter, fullgraph=True)
    for n, (documents, (loss, gradients)) in enumerate(zip((None, DOCUMENTS), expected)):
        for _ in range(2):
            found_loss, found = loss_and_gradients(model, documents)
            assert counter.frame_count == n + 1
        assert found_loss == pytest.approx(loss, rel=1e-5)
        for a, b in zip(found, gradients):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

def test_two_kinds_of_blocks_compile_to_two_graphs():
    model, counter = build(*[GQA, NEAR] * 3), CompileCounter()
    for layer in model.model.layers:
        layer.compile(backend=counter, fullgraph=True)
    loss_and_gradients(model)
    assert counter.frame_count == 2


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["plain", "packed"])
def test_whole_model_compiles_to_one_graph(name, documents):
    model, counter = MODELS[name](), CompileCounter()
    loss, _ = loss_and_gradients(model, documents)
    model.compile(backend=counter, fullgraph=True)
    assert loss_and_gradients(model, documents)[0] == pytest.approx(loss, rel=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", [*MODELS, "mixed"])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["plain", "packed"])
def test_activation_checkpointing_gives_bit_equal_gradients(name, documents):
    model = build(*[GQA, NEAR] * 3) if name == "mixed" else MODELS[name]()
    loss, gradients = loss_and_gradients(model, documents)
    for layer in model.model.layers:
        layer.forward = checkpointed(layer.forward)
    found_loss, found = loss_and_gradients(model, documents)
    assert found_loss == loss
    assert all(torch.equal(a, b) for a, b in zip(found, gradients))


def checkpointed(forward):
    def recomputed(x, inputs=None, cache=None):
        return checkpoint(forward, x, inputs, cache, use_reentrant=False)

    return recomputed
