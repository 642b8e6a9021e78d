"""Random configs of every family, through files on disk, in both directions, beside transformers."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from skylar.data.sources import cache_dir
from skylar.data.tokenizer import BPETokenizer
from skylar.models.decoder import CausalLM
from skylar.models.hub import from_pretrained, load_tokenizer, save_pretrained
from skylar.models.presets import get_config, gpt2, llama3, qwen3

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SCALINGS = [
    None,
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "ntk", "factor": 3.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32,
     "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.25},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 16},
]


def draw(family: str, seed: int):
    "A config with odd sizes; `seed` also chooses the RoPE scaling in turn."
    rng = random.Random(f"{family} {seed}")
    n_kv_heads = rng.choice([1, 1, 2, 3])
    n_heads = n_kv_heads * rng.choice([1, 2, 3])
    sizes = dict(
        vocab_size=rng.randrange(30, 90), n_layers=rng.randrange(1, 4),
        d_ff=rng.randrange(9, 70), tie_embeddings=rng.random() < 0.5, init_std=0.3)
    if family == "gpt2":
        width = n_heads * rng.randrange(3, 12)
        return gpt2(d_model=width, n_heads=n_heads, max_seq_len=32, **sizes)
    width = n_heads * rng.randrange(3, 12) if family == "llama3" else rng.randrange(17, 60)
    return {"llama3": llama3, "qwen3": qwen3}[family](
        d_model=width, n_heads=n_heads, n_kv_heads=n_kv_heads, d_head=2 * rng.randrange(2, 9),
        max_seq_len=64, rope_theta=rng.choice([100.0, 1e4, 5e5]),
        rope_scaling=SCALINGS[seed % len(SCALINGS)], norm_eps=rng.choice([1e-6, 1e-5]),
        bias=rng.random() < 0.5, **sizes)


def rough(model: torch.nn.Module, seed: int) -> None:
    "Norms and biases away from 1 and 0, so that a lost one shows."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p += 0.3 * torch.randn(p.shape, generator=generator)


def gradients(model, ids, logits_of) -> dict[str, torch.Tensor]:
    model.zero_grad()
    logits = logits_of(ids)[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def greedy(logits_of, ids, n: int = 8):
    for _ in range(n):
        ids = torch.cat([ids, logits_of(ids)[:, -1:].argmax(-1)], dim=1)
    return ids


def assert_same_model(ours: CausalLM, theirs, seed: int):
    "Logits, gradients (as one number for each theirs) and greedy tokens."
    torch.manual_seed(seed)
    ids = torch.randint(ours.config.vocab_size, (2, 20))
    theirs.eval()
    ours.eval()
    their_logits = lambda ids: theirs(ids, use_cache=False).logits  # noqa: E731
    torch.testing.assert_close(ours(ids), their_logits(ids), atol=5e-5, rtol=5e-5)
    mine, other = gradients(ours, ids, ours), gradients(theirs, ids, their_logits)
    squares = [sum(float(g.square().sum()) for g in grads.values()) for grads in (mine, other)]
    assert squares[0] == pytest.approx(squares[1], rel=1e-3)
    if set(mine) == set(other):  # the same names: one by one
        for name, grad in mine.items():
            torch.testing.assert_close(grad, other[name], atol=1e-4, rtol=1e-3)
    with torch.no_grad():
        assert torch.equal(greedy(ours, ids[:, :5]), greedy(their_logits, ids[:, :5]))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("family", ["gpt2", "llama3", "qwen3"])
def test_theirs_opens_ours_and_ours_opens_theirs(tmp_path, family, seed):
    torch.manual_seed(seed)
    model = CausalLM(draw(family, seed))
    rough(model, seed)
    save_pretrained(model, tmp_path / "ours", max_shard_size=20_000 if seed % 2 else 10**9)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    assert type(theirs).__module__.startswith("transformers.")
    assert_same_model(model, theirs, seed)
    theirs.save_pretrained(tmp_path / "theirs")
    back = from_pretrained(tmp_path / "theirs")
    assert_same_model(back, theirs, seed)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), back.parameters()))
    assert all(b.device.type == "cpu" for b in back.buffers())
