"""Mixtral and Qwen3-MoE: random valid configs give what transformers gives, through files too."""

import json
import os
import random
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from parity import close, forced, forward, gates, rough
from safetensors.torch import load_file, save_file

from skylar.inference.generate import generate
from skylar.layers.router import load_balancing_loss
from skylar.models.decoder import CausalLM, active_parameters, count_parameters
from skylar.models.families.mixtral import MixtralConfig
from skylar.models.families.qwen3_moe import Qwen3MoEConfig
from skylar.models.hub import from_pretrained, save_pretrained
from skylar.models.presets import DENSE, PRESETS, config_from_hf, config_to_hf, get_config
from skylar.models.weight_map import check_weight_map, split_experts, state_tensors
from skylar.training.loss import NextTokenObjective

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

FAMILIES = {"mixtral": MixtralConfig, "qwen3_moe": Qwen3MoEConfig}
SCALINGS = [None, {"rope_type": "linear", "factor": 4.0},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}]
SEEDS = range(24)


def draw(family: str, seed: int):
    "A config with odd sizes and corners: one expert, all of them, dense layers, tied weights."
    rng = random.Random(f"{family} {seed}")
    n_kv_heads, n_experts = rng.choice([1, 1, 2, 3]), rng.choice([1, 2, 3, 5, 8])
    sizes = dict(
        vocab_size=rng.randint(11, 97), d_model=rng.choice([13, 24, 32, 50]),
        n_heads=n_kv_heads * rng.randint(1, 3), n_kv_heads=n_kv_heads,
        d_head=rng.choice([2, 6, 8, 14]), n_layers=rng.randint(1, 4), d_ff=rng.choice([1, 9, 20]),
        n_experts=n_experts, top_k=rng.choice([1, n_experts, rng.randint(1, n_experts)]),
        max_seq_len=64, rope_theta=rng.choice([100.0, 1e4, 1e6]),
        rope_scaling=SCALINGS[seed % 3], norm_eps=rng.choice([1e-6, 1e-5, 1e-2]),
        tie_embeddings=rng.random() < 0.5, balance_loss=rng.choice([0.0, 0.01, 1.0]), init_std=0.3)
    if family == "mixtral":
        return MixtralConfig(**sizes)
    dense = tuple(i for i in range(sizes["n_layers"]) if rng.random() < 0.2)
    return Qwen3MoEConfig(
        **sizes, bias=rng.random() < 0.3, norm_topk_prob=rng.random() < 0.5,
        dense_d_ff=rng.choice([None, 7, 30]), mlp_only_layers=dense,
        decoder_sparse_step=rng.choice([1, 1, 1, 2, 3]))


def peer(config):
    "The same model in transformers, from names written down here, not by `to_hf`."
    hf = dict(
        vocab_size=config.vocab_size, hidden_size=config.d_model, head_dim=config.d_head,
        num_attention_heads=config.n_heads, num_key_value_heads=config.n_kv_heads,
        num_hidden_layers=config.n_layers, max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta}
        | (config.rope_scaling or {}), rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tie_embeddings, num_experts_per_tok=config.top_k,
        router_aux_loss_coef=config.balance_loss)
    if type(config) is MixtralConfig:
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(
            **hf, intermediate_size=config.d_ff, num_local_experts=config.n_experts))
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(
        **hf, intermediate_size=config.dense_d_ff or config.top_k * config.d_ff,
        moe_intermediate_size=config.d_ff, num_experts=config.n_experts,
        attention_bias=config.bias, norm_topk_prob=config.norm_topk_prob,
        mlp_only_layers=list(config.mlp_only_layers),
        decoder_sparse_step=config.decoder_sparse_step))


def experts_of(config) -> str:
    "transformers' grouped_mm refuses widths that are no multiples of 16 bytes."
    return "eager" if config.d_model % 4 or config.d_ff % 4 else "grouped_mm"


def pair(family: str, seed: int, **changes):
    "Ours and theirs with equal weights, and token ids."
    torch.manual_seed(seed)
    config = draw(family, seed)
    ours = rough(CausalLM(config), seed).eval()
    theirs = peer(config).eval()
    theirs.set_experts_implementation(experts_of(config))
    found = theirs.load_state_dict(ours.state_dict())  # strict: names in memory are equal
    assert not found.missing_keys and not found.unexpected_keys
    return ours, theirs, torch.randint(config.vocab_size, (2, 24))


def weights_of(config):
    "Their weights of the experts that ours chose."
    def weights(logits, experts):
        found = logits.float().softmax(-1).gather(-1, experts)
        return found / found.sum(-1, keepdim=True) if normalized(config) else found
    return weights


def normalized(config) -> bool:
    return getattr(config, "norm_topk_prob", True)


# --- against transformers, in memory ---


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_equal_transformers(family, seed):
    ours, theirs, ids = pair(family, seed)
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


@pytest.mark.parametrize("family", FAMILIES)
def test_the_random_configs_reach_every_corner(family):
    drawn = [draw(family, seed) for seed in SEEDS]
    assert any(c.n_experts == 1 for c in drawn) and any(1 == c.top_k < c.n_experts for c in drawn)
    assert any(c.top_k == c.n_experts > 1 for c in drawn)
    assert any(1 < c.top_k < c.n_experts for c in drawn)
    assert {c.tie_embeddings for c in drawn} == {True, False}
    if family == "qwen3_moe":
        assert {c.bias for c in drawn} == {c.norm_topk_prob for c in drawn} == {True, False}
        kinds = Counter((any(c.sparse_layers()), all(c.sparse_layers())) for c in drawn)
        assert min(kinds[True, True], kinds[True, False], kinds[False, False]) >= 1


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("family", FAMILIES)
def test_the_router_alone(family, seed):
    "The same numbers in: the same logits, weights and experts out, bit for bit."
    ours, theirs, _ = pair(family, seed)
    mine = [layer.mlp.gate for layer in ours.model.layers if hasattr(layer.mlp, "gate")]
    for one, other in zip(mine, gates(theirs), strict=True):
        x = torch.randn(40, ours.config.d_model)
        routed, (logits, weights, experts) = one(x), other(x)
        assert torch.equal(routed.logits, logits) and torch.equal(routed.experts, experts)
        assert torch.equal(routed.weights, weights)
        low, (rounded, *_) = one.bfloat16()(x.bfloat16()), other.bfloat16()(x.bfloat16())
        assert low.logits.dtype == torch.float32  # ours is exact, theirs rounded
        torch.testing.assert_close(low.logits.bfloat16(), rounded, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("family", FAMILIES)
def test_near_ties_flip_in_bfloat16_and_forcing_brings_both_together(family):
    """Rounding alone sends some tokens elsewhere; with the choice forced logits are near."""
    torch.manual_seed(3)
    config = FAMILIES[family](
        vocab_size=61, d_model=64, n_heads=4, n_kv_heads=2, d_head=16, n_layers=4, d_ff=32,
        n_experts=16, top_k=4, max_seq_len=64, init_std=0.2)
    ours, ids = rough(CausalLM(config)).eval(), torch.randint(61, (8, 60))
    theirs = peer(config).eval()
    theirs.load_state_dict(ours.state_dict())
    theirs = theirs.bfloat16()  # ours stays in float32
    with torch.no_grad():
        logits, extras = forward(ours, ids)
        free = theirs(ids, use_cache=False, output_router_logits=True)
        with forced(theirs, extras, weights_of(config)):
            held = theirs(ids, use_cache=False).logits

    def nats(other):  # of our distribution from the other
        a, b = logits.log_softmax(-1), other.float().log_softmax(-1)
        return (a.exp() * (a - b)).sum(-1)

    chosen = [r.softmax(-1).topk(4).indices.sort(-1).values for r in free.router_logits]
    flipped = [(c != e.experts.sort(-1).values).any(-1) for c, e in zip(chosen, extras)]
    assert 0 < torch.stack(flipped).float().mean() < 0.5
    assert nats(held).mean() < 0.5 * nats(free.logits).mean()


# --- balance ---


@pytest.mark.parametrize("L, E, k, N", [(1, 4, 1, 9), (3, 8, 2, 50), (2, 5, 5, 7), (4, 6, 3, 1)])
def test_the_balance_loss_and_its_gradient_are_transformers(L, E, k, N):
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    from skylar.layers.router import RouterOutput

    torch.manual_seed(0)
    logits = [(3 * torch.randn(N, E)).requires_grad_() for _ in range(L)]
    routed = [RouterOutput(x, *x.softmax(-1).topk(k)) for x in logits]
    mine, other = load_balancing_loss(routed), load_balancing_loss_func(tuple(logits), E, k)
    torch.testing.assert_close(mine, other)
    for a, b in zip(torch.autograd.grad(mine, logits), torch.autograd.grad(other, logits)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 4, 7])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_training_loss_is_theirs_with_router_logits(family, seed):
    "Cross-entropy plus the weighted balance loss, and all gradients of the sum."
    ours, theirs, ids = pair(family, seed)
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
    output = NextTokenObjective(ours.train())(batch)
    mine = output.loss_sum / output.n_valid
    if not gates(theirs):
        assert ours.decoder_config.auxiliary is None
        return
    other = theirs(ids[:, :-1], output_router_logits=True, use_cache=False)
    theirs_loss = F.cross_entropy(other.logits.flatten(0, 1), ids[:, 1:].flatten()) + (
        ours.config.balance_loss * other.aux_loss)
    assert mine.item() == pytest.approx(theirs_loss.item(), rel=2e-5)
    total, count = output.metrics["balance_loss"]
    assert float(total / count) == pytest.approx(other.aux_loss.item(), rel=1e-5)
    mine.backward()
    theirs_loss.backward()
    others = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        close(p.grad, others[name].grad, name)


# --- through files ---


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_theirs_opens_ours_and_ours_opens_theirs(tmp_path, family, seed):
    torch.manual_seed(seed)
    model = rough(CausalLM(draw(family, seed)), seed).eval()
    save_pretrained(model, tmp_path / "ours", max_shard_size=20_000 if seed % 2 else 10**9)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True,
        experts_implementation=experts_of(model.config))
    assert not any(report.values()), report
    assert type(theirs).__name__ == model.config.hf_architecture
    theirs.eval().save_pretrained(tmp_path / "theirs")
    back = from_pretrained(tmp_path / "theirs")
    assert back.decoder_config == model.decoder_config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), back.parameters()))
    ids = torch.randint(model.config.vocab_size, (2, 20))
    with torch.no_grad():
        logits, extras = forward(back, ids)
        with forced(theirs, extras, weights_of(model.config)):
            close(logits, theirs(ids, use_cache=False).logits, "logits")
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                                   max_new_tokens=12, min_new_tokens=12, pad_token_id=0,
                                   eos_token_id=None)
    assert torch.equal(generate(back, ids, 12, temperature=0), expected)


DISK = {
    "mixtral": {"block_sparse_moe.gate.weight": (3, 16),
                "block_sparse_moe.experts.{e}.w1.weight": (12, 16),
                "block_sparse_moe.experts.{e}.w2.weight": (16, 12),
                "block_sparse_moe.experts.{e}.w3.weight": (12, 16)},
    "qwen3_moe": {"mlp.gate.weight": (3, 16),
                  "mlp.experts.{e}.gate_proj.weight": (12, 16),
                  "mlp.experts.{e}.up_proj.weight": (12, 16),
                  "mlp.experts.{e}.down_proj.weight": (16, 12)},
}
TINY = dict(vocab_size=40, d_model=16, n_heads=2, n_kv_heads=1, d_head=8, n_layers=2, d_ff=12,
            n_experts=3, top_k=2, max_seq_len=32, init_std=0.3)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_on_disk_are_those_of_the_published_files(tmp_path, family):
    "What we write, what transformers 5 writes, and what its classes of old had are one."
    model = CausalLM(FAMILIES[family](**TINY)).eval()
    save_pretrained(model, tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    files = [load_file(tmp_path / side / "model.safetensors") for side in ("ours", "theirs")]
    expected = {f"model.layers.{i}.{name.format(e=e)}": shape
                for i in range(2) for e in range(3) for name, shape in DISK[family].items()}
    for file in files:
        found = {name: tuple(t.shape) for name, t in file.items() if "gate" in name
                 or "experts" in name}
        assert found == expected
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[0].items())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_that_transformers_wrote(tmp_path, family):
    "Their class, their spelling (num_local_experts), never seen by us."
    theirs = peer(FAMILIES[family](**TINY))
    theirs.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written.get("num_local_experts", written.get("num_experts")) == 3
    config = config_from_hf(written)
    assert (config.n_experts, config.top_k, config.d_ff) == (3, 2, 12)
    ids = torch.randint(40, (2, 12))
    with torch.no_grad():
        torch.testing.assert_close(from_pretrained(tmp_path)(ids), theirs.eval()(ids).logits,
                                   atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_either_spelling_of_the_number_of_experts(family):
    hf = config_to_hf(FAMILIES[family](**TINY))
    for key in ("num_experts", "num_local_experts"):
        rest = {k: v for k, v in hf.items() if k not in ("num_experts", "num_local_experts")}
        assert config_from_hf(rest | {key: 3}) == config_from_hf(hf)


@pytest.mark.parametrize("family, first, second", [
    ("mixtral", "w1", "w3"), ("qwen3_moe", "gate_proj", "up_proj")])
def test_gate_and_up_exchanged_load_everywhere_and_are_another_model(
        tmp_path, family, first, second):
    "Names and shapes fit; only outputs tell: why these tests compare logits."
    model = CausalLM(FAMILIES[family](**TINY)).eval()
    save_pretrained(model, tmp_path / "good")
    save_pretrained(model, tmp_path / "bad")
    file = tmp_path / "bad" / "model.safetensors"
    tensors = load_file(file)
    wrong = {n: tensors[n.replace(first, "?").replace(second, first).replace("?", second)]
             for n in tensors}
    save_file(wrong, file, metadata={"format": "pt"})
    ids = torch.randint(40, (2, 12))
    with torch.no_grad():
        assert torch.equal(from_pretrained(tmp_path / "good")(ids), model(ids))
        assert (from_pretrained(tmp_path / "bad")(ids) - model(ids)).abs().max() > 1e-3


REFUSED = [
    ("mixtral", {"sliding_window": 4096}, "sliding_window=4096 has no equal"),
    ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1 has no equal"),
    ("mixtral", {"attention_bias": True}, "attention_bias=True has no equal"),
    ("mixtral", {"hidden_act": "gelu"}, "hidden_act='gelu' has no equal"),
    ("mixtral", {"num_local_experts": 0}, "n_experts=0: give a whole number of at least 1"),
    ("mixtral", {"num_experts_per_tok": 4}, "top_k=4 of n_experts=3"),
    ("mixtral", {"router_aux_loss_coef": -1.0}, "balance_loss=-1.0: give a number above 0"),
    ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window=True has no equal"),
    ("qwen3_moe", {"mlp_only_layers": [-1]}, "mlp_only_layers=-1: give a whole number"),
    ("qwen3_moe", {"mlp_only_layers": 3}, "mlp_only_layers=3 is a int"),
    ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step=0"),
    ("qwen3_moe", {"num_local_experts": 1, "num_experts": 1}, "top_k=2 of n_experts=1"),
]


@pytest.mark.parametrize("family, setting, message", REFUSED, ids=str)
def test_what_cannot_be_built_is_refused_in_one_line(family, setting, message):
    hf = config_to_hf(FAMILIES[family](**TINY))
    assert config_from_hf(hf) is not None
    with pytest.raises(ValueError, match=message) as error:
        config_from_hf(hf | setting)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(6))
def test_every_number_comes_from_one_tensor(family, seed):
    model = CausalLM(draw(family, seed))
    check_weight_map(model.config.weight_map(), state_tensors(model))
    check_weight_map(split_experts(model.decoder_config), state_tensors(model))


# --- packed, padded, cached ---


def pairs_of(family: str):
    torch.manual_seed(0)
    more = {} if family == "mixtral" else dict(mlp_only_layers=(0,), norm_topk_prob=False)
    return rough(CausalLM(FAMILIES[family](**TINY, **more))).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_equal_separate_ones(family):
    model, lengths = pairs_of(family), (5, 11, 1, 8)
    texts = [torch.randint(40, (1, n)) for n in lengths]
    documents = torch.cat([torch.full((1, n), i) for i, n in enumerate(lengths)], dim=1)
    with torch.no_grad():
        packed, extras = forward(model, torch.cat(texts, dim=1), document_ids=documents)
        apart = [forward(model, text) for text in texts]
    torch.testing.assert_close(packed, torch.cat([a[0] for a in apart], dim=1))
    for layer, routed in enumerate(extras):
        alone = torch.cat([a[1][layer].experts for a in apart])
        assert torch.equal(routed.experts, alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padded_sequences_continue_as_they_do_alone(family):
    model, lengths = pairs_of(family), (4, 9, 7)
    rows = [torch.randint(40, (1, n)) for n in lengths]
    ids = torch.cat([F.pad(row, (9 - row.shape[1], 0)) for row in rows])
    mask = torch.stack([(torch.arange(9) >= 9 - n).long() for n in lengths])
    together = generate(model, ids, 10, temperature=0, attention_mask=mask)
    for row, found, n in zip(rows, together, lengths):
        assert torch.equal(generate(model, row, 10, temperature=0)[0], found[9 - n:])


# --- sizes ---


PUBLISHED = {  # billions: total, active; and how exactly the makers give them
    "mixtral-8x7b": (46.7, 12.9, 0.05), "qwen3-30b-a3b": (30.5, 3.3, 0.06),
    "qwen3-235b-a22b": (235, 22, 0.5)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_models_have_their_published_sizes(name):
    config, (total, active, exact) = get_config(name), PUBLISHED[name]
    with torch.device("meta"):
        model = CausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == count_parameters(config)
    assert count_parameters(config) / 1e9 == pytest.approx(total, abs=exact)
    assert active_parameters(config) / 1e9 == pytest.approx(active, abs=exact)


def test_published_sizes_by_hand():
    D, F_, L, V = 4096, 14_336, 32, 32_000
    attention = 2 * D * D + 2 * D * 1024
    rest = 2 * V * D + L * (attention + 8 * D + 2 * D) + D
    assert count_parameters(MixtralConfig()) == rest + L * 8 * 3 * D * F_
    assert active_parameters(MixtralConfig()) == rest + L * 2 * 3 * D * F_
    half = Qwen3MoEConfig(decoder_sparse_step=2)
    assert active_parameters(half) + 24 * 128 * 2048 == active_parameters(Qwen3MoEConfig())


@pytest.mark.parametrize("name", DENSE)
def test_a_dense_model_uses_all_of_it(name):
    assert active_parameters(DENSE[name]) == count_parameters(DENSE[name])


def test_small_presets_are_as_active_as_the_dense_one():
    for name in ("mixtral-test", "qwen3-moe-test"):
        config = get_config(name)
        assert (config.n_experts, config.top_k) == (8, 2)
        ratio = active_parameters(config) / count_parameters(get_config("test"))
        assert 1 < ratio < 1.001 or 0.999 < ratio <= 1
        assert count_parameters(config) > 1.19 * count_parameters(get_config("test"))
    assert set(PRESETS) >= {*DENSE, "mixtral-test", "qwen3-moe-test", *PUBLISHED}


# --- the command line ---


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    from skylar.cli import main

    home = tmp_path_factory.mktemp("home")
    (home / "texts").mkdir()
    words = "the king said that a summer day is long and love is short".split()
    for i in range(24):
        text = " ".join(words[(i * j) % len(words)] for j in range(120))
        (home / "texts" / f"{i:02}.txt").write_text(text + "\n")
    assert main(["data", "tokenize", str(home / "texts"), "--out", str(home / "data"),
                 "--vocab_size", "300"]) == 0
    return home / "data"


@pytest.mark.parametrize("preset", ["mixtral-test", "qwen3-moe-test"])
def test_the_commands_know_the_small_presets(data, tmp_path, monkeypatch, capsys, preset):
    """Trained, resumed, generated from, exported, opened by transformers."""
    from skylar.cli import main

    monkeypatch.chdir(tmp_path)
    flags = ["--model.d_model", "32", "--model.d_head", "8", "--model.d_ff", "16",
             "--model.n_layers", "2", "--loader.batch_size", "2", "--loader.seq_len", "32",
             "--train.device", "cpu", "--train.dtype", "float32"]
    command = ["pretrain", "--data", str(data), "--preset", preset, "--out", "run",
               "--train.save_every", "2", "--train.log_every", "1", *flags]
    assert main([*command, "--train.steps", "4"]) == 0
    assert main(["pretrain", "--config", "run/config.yaml", "--resume", "--extend_to", "6"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert any("balance_loss" in key for row in rows for key in row)
    assert main(["generate", "--model", "run", "--prompt", "the king", "--temperature", "0",
                 "--max_new_tokens", "5"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("the king")
    assert main(["export", "--model", "run", "--out", "exported"]) == 0
    ours = from_pretrained(tmp_path / "exported")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    ids = torch.randint(300, (2, 12))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=5e-5, rtol=5e-5)
    assert type(ours.config) is type(get_config(preset))
