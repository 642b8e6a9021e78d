"""Random configs of every family, through files on disk, both ways, beside transformers."""

import os
import random
import subprocess
import sys

import pytest
import torch

from skylar.data.sources import cache_dir
from skylar.data.tokenizer import BPETokenizer
from skylar.layers.rope import from_interleaved
from skylar.models.decoder import CausalLM
from skylar.models.families.gpt2 import GPT2Config
from skylar.models.hub import eos_token_ids, from_pretrained, load_tokenizer, save_pretrained
from skylar.models.presets import FAMILIES, config_to_dict, find_family, get_config

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
        return GPT2Config(
            d_model=width, n_heads=n_heads, max_seq_len=32,
            norm_eps=rng.choice([1e-5, 1e-3, 9.999999747e-06]), **sizes)
    width = n_heads * rng.randrange(3, 12)
    if family == "qwen3":  # the only one whose width need not be a multiple of the heads
        width = rng.randrange(17, 60)
    more = {}
    if family == "smollm3":
        more = dict(no_rope_layers=rng.choice([None, (0, 1, 0)]),
                    no_rope_layer_interval=rng.choice([1, 2, 3]))
    if family == "granite":
        more = dict(embedding_multiplier=rng.choice([0.5, 12.0]),
                    attention_multiplier=rng.choice([0.02, 0.3]),
                    residual_multiplier=rng.choice([0.22, 1.5]),
                    logits_scaling=rng.choice([0.5, 8.0]))
    if family in ("mixtral", "qwen3_moe"):  # more of them: test_moe_families
        n_experts = rng.randrange(1, 6)
        more = dict(n_experts=n_experts, top_k=rng.randrange(1, n_experts + 1))
    if family != "mixtral":
        more["bias"] = rng.random() < 0.5
    return find_family(family)(
        d_model=width, n_heads=n_heads, n_kv_heads=n_kv_heads, d_head=2 * rng.randrange(2, 9),
        max_seq_len=64, rope_theta=rng.choice([100.0, 1e4, 5e5]),
        rope_scaling=SCALINGS[seed % len(SCALINGS)], norm_eps=rng.choice([1e-6, 1e-5]),
        **more, **sizes)


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
    ids = torch.randint(ours.decoder_config.vocab_size, (2, 20))
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


OWN_TESTS = ("skylar", "deepseek_v3", "kimi_k2")  # the latter: test_deepseek_v3, test_kimi_k2
OTHERS = [family.name for family in FAMILIES if family.name not in OWN_TESTS]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("family", OTHERS)
def test_theirs_opens_ours_and_ours_opens_theirs(tmp_path, family, seed):
    torch.manual_seed(seed)
    model = CausalLM(draw(family, seed))
    rough(model, seed)
    save_pretrained(model, tmp_path / "ours", max_shard_size=20_000 if seed % 2 else 10**9)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True,
        experts_implementation="eager")  # their grouped_mm does not take odd widths
    assert not any(report.values()), report
    assert type(theirs).__module__.startswith("transformers.")
    assert_same_model(model, theirs, seed)
    theirs.save_pretrained(tmp_path / "theirs")
    back = from_pretrained(tmp_path / "theirs")
    assert_same_model(back, theirs, seed)
    if SCALINGS[seed % len(SCALINGS)] != {"rope_type": "ntk", "factor": 3.0} or family == "gpt2":
        assert back.decoder_config == model.decoder_config  # ntk comes back as a theta
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), back.parameters()))
    assert all(b.device.type == "cpu" for b in back.buffers())


@pytest.mark.parametrize("bias, tied, dtype", [(True, True, "float32"), (False, False, "bfloat16")])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_a_model_that_transformers_made(tmp_path, family, bias, tied, dtype):
    "Never saved by us: their config classes with their defaults, sharded by them."
    torch.manual_seed(1)
    sizes = dict(vocab_size=61, tie_word_embeddings=tied)
    modern = dict(
        hidden_size=24, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
        intermediate_size=31, initializer_range=0.3, attention_bias=bias,
        max_position_embeddings=64)
    config = {
        "gpt2": lambda: transformers.GPT2Config(
            n_embd=24, n_head=4, n_layer=2, n_positions=64, initializer_range=0.3, **sizes),
        "llama": lambda: transformers.LlamaConfig(**modern, **sizes),
        "qwen3": lambda: transformers.Qwen3Config(**modern, **sizes, head_dim=10),
    }[family]()
    theirs = transformers.AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype))
    rough(theirs, 1)
    theirs.save_pretrained(tmp_path / "m", max_shard_size="10KB")
    stored = {str(p.dtype) for p in from_pretrained(tmp_path / "m").parameters()}
    assert stored == {f"torch.{dtype}"}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", dtype=torch.float32)
    assert_same_model(from_pretrained(tmp_path / "m", torch.float32), theirs, 1)


ALONE = """
import sys

class NoSkylar:  # however it is installed
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "skylar":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoSkylar())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
chat = tokenizer.apply_chat_template(
    [{"role": "user", "content": "Ciao"}], add_generation_prompt=True, return_tensors="pt",
    return_dict=True)
out = model.generate(**chat, max_new_tokens=20, min_new_tokens=20, do_sample=False)
assert "skylar" not in sys.modules
print(type(model).__name__, out[0].tolist())
"""


def test_the_test_preset_opens_where_skylar_is_not_installed(tmp_path):
    torch.manual_seed(0)
    tokenizer = BPETokenizer.train(["Ciao, come va? Bene, grazie. " * 30], vocab_size=290)
    model = CausalLM(get_config("test", vocab_size=512, init_std=0.1)).eval()
    save_pretrained(model, tmp_path / "m", tokenizer)
    ids = load_tokenizer(tmp_path / "m").chat([{"role": "user", "content": "Ciao"}])
    ends = torch.tensor(eos_token_ids(tmp_path / "m"))

    def logits_without_ends(ids):  # `min_new_tokens` forbids them
        return model(ids).index_fill(-1, ends, -torch.inf)

    with torch.no_grad():
        expected = greedy(logits_without_ends, torch.tensor([ids]), 20)[0].tolist()
    run = subprocess.run(
        [sys.executable, "-c", ALONE, tmp_path / "m"], capture_output=True, text=True,
        cwd=tmp_path, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
    assert run.returncode == 0, run.stderr
    assert run.stdout.split(maxsplit=1) == ["Qwen3ForCausalLM", f"{expected}\n"]


# --- what has no equal, through the Auto classes ----------------------------------------


@pytest.mark.parametrize("config", [
    dict(window=5, num_sink_tokens=2, full_every=2),
    dict(window=5, num_sink_tokens=0, full_every=0, tie_embeddings=False),
    dict(window=None, rope_scaling=SCALINGS[3]),
])
def test_skylar_for_causal_lm(tmp_path, config):
    from skylar.models.auto import SkylarForCausalLM

    torch.manual_seed(0)
    model = CausalLM(get_config(
        "test", family="skylar", vocab_size=97, n_layers=2, init_std=0.1, **config))
    rough(model, 0)
    save_pretrained(model, tmp_path / "ours")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True)
    assert type(theirs) is SkylarForCausalLM and not any(report.values())
    assert_same_model(model, theirs, 0)
    ids = torch.randint(97, (2, 9))
    expected = greedy(lambda ids: model(ids), ids, 12)
    options = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)
    out = theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(out, expected)
    padded = torch.cat([torch.zeros(2, 4, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(13) >= 4).long().expand(2, 13)
    out = theirs.generate(padded, attention_mask=mask, **options)
    assert torch.equal(out[:, 4:], expected), "left padding changes nothing"
    theirs.save_pretrained(tmp_path / "theirs")
    back = from_pretrained(tmp_path / "theirs")
    assert back.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), back.parameters()))
    loss = theirs(ids, labels=ids).loss
    logits = model(ids)[:, :-1].flatten(0, 1)
    assert loss.item() == pytest.approx(
        torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).item(), rel=1e-5)


def test_a_new_skylar_model_from_its_config():
    from skylar.models.auto import SkylarPretrainedConfig

    own = get_config("test", "skylar", vocab_size=50, d_model=32, n_heads=4, n_kv_heads=2,
                     n_layers=3, d_ff=40)
    config = SkylarPretrainedConfig(config_to_dict(own), vocab_size=999)
    assert config.vocab_size == 50 and config.num_hidden_layers == 3, "it has the last word"
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert model.get_input_embeddings() is model.model.embed_tokens
    assert model.lm_head.weight is model.model.embed_tokens.weight
    std = model.model.layers[0].self_attn.o_proj.weight.std().item()
    assert std == pytest.approx(0.02 / 6**0.5, rel=0.1), "initial values are ours"
    with pytest.raises(ValueError, match="d_modl"):
        SkylarPretrainedConfig(config_to_dict(own) | {"d_modl": 32})


# --- real weights -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2():
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    try:
        return from_pretrained("smollm2")
    except OSError as error:
        pytest.skip(f"SmolLM2 is not in reach: {error}")


def test_smollm2_equals_transformers(smollm2):
    folder = cache_dir() / "smollm2" / "SmolLM2-135M-Instruct.Q4_1"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = load_tokenizer("smollm2")
    chat = tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}])
    ids = torch.tensor([chat])
    with torch.no_grad():
        torch.testing.assert_close(
            smollm2(ids), theirs(ids, use_cache=False).logits, atol=1e-4, rtol=1e-4)
        text = tokenizer.decode(greedy(smollm2, ids, 8)[0, ids.shape[1]:])
    assert "Paris" in text and eos_token_ids("smollm2") == [tokenizer.eos_id]


def test_smollm2_the_rows_that_llama_cpp_permuted(smollm2):
    "The file's own numbers, de-quantised here and put in Hugging Face's order."
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(cache_dir() / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf")
    tensors = {t.name: t for t in reader.tensors}
    for letter, n_heads in (("q", 9), ("k", 3)):
        packed = tensors[f"blk.7.attn_{letter}.weight"]
        rows = torch.tensor(gguf.quants.dequantize(packed.data, packed.tensor_type))
        ours = getattr(smollm2.model.layers[7].self_attn, f"{letter}_proj").weight
        assert torch.equal(from_interleaved(rows, n_heads), ours) and not torch.equal(rows, ours)
