"""On a GPU the same numbers as on the CPU: logits, gradients, packing, compiling, decoding.

Only public names, and nothing that needs jsonargparse: `bench/gpu.sh` runs these where no package
can be installed. `SKYLAR_GPU_TESTS=cpu` runs them on the CPU, to try them out.
"""

import copy
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from gpu_common import mean_loss, random_batch  # noqa: E402

from skylar.inference.generate import generate  # noqa: E402
from skylar.training.loss import NextTokenObjective  # noqa: E402
from skylar.training.optim import AdamWConfig  # noqa: E402

DEVICE = os.environ.get("SKYLAR_GPU_TESTS", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a GPU"),
]
FAMILIES = ("gpt2", "llama3", "qwen3")
B, T, V = 2, 64, 97


@pytest.fixture(autouse=True)
def full_precision():
    """float32 as on the CPU, without TF32's ten bits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(params=FAMILIES)
def pair(request, tiny_model):
    """The same model on the CPU and on the device."""
    model = tiny_model(request.param, vocab_size=V, max_seq_len=256)
    return model, copy.deepcopy(model).to(DEVICE)


def loss_and_gradients(model, batch, compiled=False, dtype=None):
    objective = NextTokenObjective(model)
    if compiled:  # a C++ compiler would take minutes on the CPU
        backend = "inductor" if DEVICE == "cuda" else "aot_eager"
        objective = torch.compile(objective, backend=backend)
    with torch.autocast(batch["input_ids"].device.type, dtype, enabled=dtype is not None):
        loss = mean_loss(objective(batch))
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return loss.detach().cpu(), [g.cpu() for g in gradients]


def on_device(batch):
    return {name: tensor.to(DEVICE) for name, tensor in batch.items()}


@pytest.mark.parametrize("packed", [False, True], ids=["causal", "packed"])
def test_logits_are_those_of_the_cpu(pair, packed):
    here, there = pair
    batch = random_batch(V, B, T, packed, "cpu")
    batch.pop("labels")
    with torch.no_grad():
        found, expected = there(**on_device(batch)).cpu(), here(**batch)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def assert_same_gradients(here, there, packed: bool, compiled: bool):
    batch = random_batch(V, B, 256 if packed else T, packed, "cpu")
    loss, gradients = loss_and_gradients(here, batch)
    found_loss, found = loss_and_gradients(there, on_device(batch), compiled)
    torch.testing.assert_close(found_loss, loss, atol=1e-4, rtol=1e-4)
    for a, b in zip(found, gradients):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("packed", [False, True], ids=["causal", "packed"])
def test_loss_and_gradients_are_those_of_the_cpu(pair, packed):
    assert_same_gradients(*pair, packed, compiled=False)


@pytest.mark.parametrize(("family", "packed"), [("gpt2", False), ("qwen3", True)])
def test_compiled_gradients_are_those_of_the_cpu(tiny_model, family, packed):
    """Two cases only: compiling takes most of the time that there is."""
    torch.compiler.reset()
    here = tiny_model(family, vocab_size=V, max_seq_len=256)
    assert_same_gradients(here, copy.deepcopy(here).to(DEVICE), packed, compiled=True)


def test_bfloat16_autocast_is_near_float32(pair):
    _, there = pair
    batch = on_device(random_batch(V, B, T, True, "cpu"))
    loss, gradients = loss_and_gradients(there, batch)
    found_loss, found = loss_and_gradients(there, batch, dtype=torch.bfloat16)
    torch.testing.assert_close(found_loss, loss, atol=0.02, rtol=0.02)
    together = [torch.cat([g.flatten() for g in side]) for side in (found, gradients)]
    assert torch.nn.functional.cosine_similarity(*together, dim=0) > 0.99


def test_decoding_with_a_cache_is_decoding_without(pair):
    _, there = pair
    there.eval()
    ids = torch.randint(V, (B, 9), device=DEVICE)
    found = generate(there, ids, 16, temperature=0)
    with torch.no_grad():
        logits = there(found[:, :-1])[:, 8:]  # (B, 16, V) what each new token was chosen from
    chosen = logits.gather(-1, found[:, 9:, None]).squeeze(-1)
    torch.testing.assert_close(chosen, logits.amax(-1), atol=1e-3, rtol=0)


def test_a_small_model_learns(tiny_model):
    model = tiny_model("qwen3", vocab_size=V).to(DEVICE).train()
    optimizer = AdamWConfig(lr=1e-2).build(model)
    batch = random_batch(V, B, T, False, DEVICE)
    objective, losses = NextTokenObjective(model), []
    for _ in range(30):
        with torch.autocast(torch.device(DEVICE).type, torch.bfloat16):
            loss = mean_loss(objective(batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
