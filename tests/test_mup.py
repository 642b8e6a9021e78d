"""muP: its rules beside published ones, what it leaves alone, transfer, folding, resume, shards."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ranks import launch
from test_runs import config, home, losses, stop_at  # noqa: F401  (fixtures)

from skylar.cli import main
from skylar.inference.cpu_fused import fuse_for_cpu, why_not_fused
from skylar.inference.generate import generate
from skylar.models.decoder import CausalLM, as_decoder
from skylar.models.families.granite import GraniteConfig, ScaledConfig
from skylar.models.families.llama3 import Llama3Config
from skylar.models.families.qwen3 import Qwen3Config
from skylar.models.hub import from_pretrained, save_pretrained
from skylar.models.presets import (
    DENSE,
    FAMILIES,
    config_from_dict,
    config_to_dict,
    find_family,
    get_config,
)
from skylar.training.loss import NextTokenObjective
from skylar.training.muon import MuonConfig
from skylar.training.mup import MupConfig, coordinate_check, fold, growth
from skylar.training.optim import AdamWConfig
from skylar.training.run import is_finished, load_run, prepare_run, train

WORKER = Path(__file__).with_name("mup_worker.py")
RESULTS = Path(__file__).parents[1] / "bench" / "results"
SIZES = dict(vocab_size=64, n_layers=2, max_seq_len=32)


def llama(width: int, depth: int = 2, **more) -> Llama3Config:
    "Heads of width 8, tied embeddings; start at 1 / sqrt(width)."
    return Llama3Config(**dict(
        vocab_size=64, d_model=width, n_heads=width // 8, n_kv_heads=width // 8, n_layers=depth,
        d_ff=2 * width, max_seq_len=32, tie_embeddings=True, init_std=0.1) | more)


def rough(model: CausalLM, seed: int = 0) -> CausalLM:
    "No weight at 0 or 1."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape, generator=generator)
    return model


def settings(model: CausalLM, optimizer) -> dict[str, dict]:
    "Parameter name -> its group's settings."
    names = {p: name for name, p in model.named_parameters()}
    groups = optimizer.build(model).param_groups
    assert sorted(names[p] for g in groups for p in g["params"]) == sorted(names.values())
    return {names[p]: g for g in groups for p in g["params"]}


# --- the rules ---

# mup 1.0.0 (Microsoft): MuAdamW(lr=1, weight_decay=1) of an embedding, linear layers with a bias,
# a LayerNorm and a MuReadout, base width 32, delta 64; (lr, weight decay) and the readout's divisor
GOLDEN = {
    32: {"matrix": (1.0, 1.0), "embedding": (1.0, 1.0), "vector": (1.0, 1.0), "head": (1.0, 1.0),
         "divisor": 1.0},
    128: {"matrix": (0.25, 4.0), "embedding": (1.0, 1.0), "vector": (1.0, 1.0),
          "head": (1.0, 1.0), "divisor": 4.0},
    384: {"matrix": (0.08333333333333333, 12.0), "embedding": (1.0, 1.0), "vector": (1.0, 1.0),
          "head": (1.0, 1.0), "divisor": 12.0},
}


@pytest.mark.parametrize("width", GOLDEN)
def test_rates_and_readout_equal_microsofts_mup(width):
    mup = MupConfig(base_d_model=32)
    model = CausalLM(mup.model(llama(width, tie_embeddings=False, bias=True)))
    assert model.decoder_config.logits_scaling == GOLDEN[width]["divisor"]
    for name, group in settings(model, mup.optimizer(AdamWConfig(lr=1, weight_decay=1))).items():
        kind = {"model.embed_tokens.weight": "embedding", "lm_head.weight": "head"}.get(name)
        matrix = name.endswith("proj.weight")
        lr, decay = GOLDEN[width][kind or ("matrix" if matrix else "vector")]
        assert group["lr"] == pytest.approx(lr), name
        decayed = 0 if name.endswith("bias") or "norm" in name else decay  # ours: none on vectors
        assert group["weight_decay"] == pytest.approx(decayed), name


@pytest.mark.parametrize(("m", "l"), [(1, 1), (4, 1), (1, 8), (4, 8)])
def test_completep_table_1(m, l):  # noqa: E741
    "Dey et al. 2025, table 1 with alpha = 1: m_N = m, m_L = l."
    mup = MupConfig(base_d_model=16, base_n_layers=2)
    model = CausalLM(mup.model(llama(16 * m, 2 * l, bias=True)))
    decoder = model.decoder_config
    assert decoder.blocks[0].residual_multiplier == pytest.approx(1 / l)
    assert decoder.embed_std == 0.1 and decoder.init_std == pytest.approx(0.1 / math.sqrt(m))
    assert decoder.logits_scaling == m
    inner = AdamWConfig(lr=0.3, weight_decay=0.2, eps=1e-6)
    for name, group in settings(model, mup.optimizer(inner)).items():
        hidden = name.endswith("proj.weight")
        assert group["lr"] == pytest.approx(0.3 / m if hidden else 0.3), name
        assert group["eps"] == pytest.approx(1e-6 / (m * l if "layers" in name else m)), name
        decay = 0.2 * m if hidden else 0.2 if "embed" in name else 0
        assert group["weight_decay"] == pytest.approx(decay), name
    # the start of the blocks depends on the base's depth only
    torch.manual_seed(0)
    weight = CausalLM(mup.model(llama(64, 2 * l))).model.layers[0].mlp.down_proj.weight
    assert weight.std().item() == pytest.approx(0.1 / 2 / math.sqrt(2 * 2), rel=0.05)


@pytest.mark.parametrize(("scale", "per_head", "factor"), [
    ("original", False, 1.0), ("match_rms_adamw", False, 1 / 2),
    ("original", True, 1 / 2), ("match_rms_adamw", True, 1 / 4)])
def test_muon_keeps_the_spectral_norm(scale, per_head, factor):
    "Four times the width; heads stay as wide: norm ~ sqrt(out / in) over Muon's own scale."
    mup = MupConfig(base_d_model=16)
    model = CausalLM(mup.model(llama(64)))
    muon = MuonConfig(lr=1.0, adamw_lr=1.0, adjust_lr=scale, per_head=per_head)
    found = settings(model, mup.optimizer(muon))
    whole = {"original": 1.0, "match_rms_adamw": 1 / 2}[scale]
    for name, group in found.items():
        heads = name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
        wanted = factor if heads else whole if name.endswith("proj.weight") else 1.0
        assert group["lr"] == pytest.approx(wanted), name
        if group["weight_decay"]:
            assert group["lr"] * group["weight_decay"] == pytest.approx(0.1), name


def test_wider_heads_get_one_over_d_head():
    mup = MupConfig(base_d_head=8)
    assert mup.model(llama(64, n_heads=2, n_kv_heads=2)).attention_multiplier == pytest.approx(
        math.sqrt(8) / 32)
    assert mup.model(llama(64)).attention_multiplier is None  # 8 wide: the usual scale
    granite = GraniteConfig(d_model=64, n_heads=2, n_kv_heads=2, attention_multiplier=0.1, **SIZES)
    assert mup.model(granite).attention_multiplier == pytest.approx(0.1 / 4)


# --- what it leaves alone ---


def test_off_by_default():
    plain, inner = llama(16), AdamWConfig()
    assert MupConfig().model(plain) is plain and MupConfig().optimizer(inner) is inner


@pytest.mark.parametrize("inner", [AdamWConfig(lr=0.01), MuonConfig(lr=0.01, adamw_lr=0.01)])
def test_at_the_base_size_no_number_changes(inner):
    mup = MupConfig(base_d_model=32, base_n_layers=2, base_d_head=8)
    trained = []
    for one in (mup, MupConfig()):
        torch.manual_seed(0)
        model = CausalLM(one.model(llama(32)))
        optimizer = one.optimizer(inner).build(model)
        for _ in range(3):
            ids = torch.randint(64, (2, 16))
            F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.append(list(model.parameters()))
    assert all(map(torch.equal, *trained))


def test_models_without_multipliers_do_no_more_work():
    model = CausalLM(llama(16))
    with torch.profiler.profile() as profile, torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.long))
    counts = {e.key: e.count for e in profile.key_averages()}
    assert counts["aten::add"] >= 4  # one for each half of a block
    scaled = CausalLM(ScaledConfig(family=llama(16), residual_multiplier=0.5))
    with torch.profiler.profile() as profile, torch.no_grad():
        scaled(torch.zeros(1, 4, dtype=torch.long))
    assert {e.key: e.count for e in profile.key_averages()} == counts


# --- the multipliers in the model ---

MULTIPLIERS = dict(embedding_multiplier=3.0, attention_multiplier=0.7, residual_multiplier=0.4,
                   logits_scaling=5.0)


@pytest.mark.parametrize("name", MULTIPLIERS)
def test_generation_with_a_multiplier_is_right(name):
    model = rough(CausalLM(ScaledConfig(family=llama(16), **{name: MULTIPLIERS[name]}))).eval()
    assert "multipliers" in why_not_fused(model)
    with pytest.raises(ValueError, match="fold"):
        fuse_for_cpu(model)
    prompt = torch.randint(64, (1, 4))
    ids = prompt
    with torch.no_grad():
        for _ in range(24):
            ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
    found = generate(model, prompt, max_new_tokens=24, temperature=0)
    assert torch.equal(torch.as_tensor(found).reshape(1, -1)[:, -24:], ids[:, -24:])
    assert why_not_fused(fold(model)) is None


def test_the_fused_loss_sees_the_divided_logits():
    model = rough(CausalLM(ScaledConfig(family=llama(16), **MULTIPLIERS)))
    ids = torch.randint(64, (2, 9))
    out = NextTokenObjective(model)({"input_ids": ids[:, :-1], "labels": ids[:, 1:]})
    plain = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(),
                            reduction="sum")
    torch.testing.assert_close(out.loss_sum, plain)


def test_a_scaled_config_comes_back_from_json_and_from_its_folder(tmp_path):
    scaled = ScaledConfig(family=Qwen3Config(d_model=16, n_heads=2, n_kv_heads=1, d_head=8, d_ff=24,
                                             **SIZES), **MULTIPLIERS)
    assert config_from_dict(json.loads(json.dumps(config_to_dict(scaled)))) == scaled
    model = rough(CausalLM(scaled)).eval()
    again = from_pretrained(save_pretrained(model, tmp_path / "m"))
    ids = torch.randint(64, (2, 9))
    assert again.config == scaled and torch.equal(again(ids), model(ids))


# --- folding ---


def small(family: str, tied: bool, bias: bool):
    more = dict(d_model=16, n_heads=4, tie_embeddings=tied, **SIZES)
    if family != "gpt2":
        more |= dict(n_kv_heads=2, d_head=8, d_ff=24)
    if family not in ("gpt2", "mixtral"):
        more["bias"] = bias
    if family in ("mixtral", "qwen3_moe"):
        more |= dict(n_experts=4, top_k=2)
    if family in ("deepseek_v3", "kimi_k2"):
        del more["n_kv_heads"], more["d_head"]
        more |= dict(n_experts=4, top_k=2, n_groups=2, topk_groups=1, d_expert=12, first_dense=1,
                     q_lora_rank=12, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4,
                     v_head_dim=8)
    return find_family(family)(**more)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", [f.name for f in FAMILIES if f.name != "granite"])
def test_a_folded_model_is_the_plain_family_with_equal_logits(family, tied, bias):
    plain = small(family, tied, bias)
    multipliers = dict(MULTIPLIERS)
    if family == "gpt2":
        multipliers.pop("attention_multiplier")
    model = rough(CausalLM(ScaledConfig(family=plain, **multipliers))).eval()
    before, state = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    folded = fold(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert folded.config is plain and not folded.training
    assert (folded.lm_head.weight is folded.model.embed_tokens.weight) == tied
    ids = torch.randint(64, (2, 20))
    torch.testing.assert_close(folded(ids), model(ids), atol=2e-5, rtol=2e-5)
    assert fold(folded) is folded


def test_folded_granite_is_llama_and_folded_qwen3_opens_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    granite = GraniteConfig(d_model=16, n_heads=2, n_kv_heads=1, d_ff=24, **SIZES, **MULTIPLIERS)
    assert type(fold(CausalLM(granite)).config) is Llama3Config
    qwen3 = Qwen3Config(d_model=16, n_heads=2, n_kv_heads=1, d_head=8, d_ff=24, **SIZES)
    ids = torch.randint(64, (2, 20))
    for source, name in ((granite, "Llama"), (ScaledConfig(family=qwen3, **MULTIPLIERS), "Qwen3")):
        model = rough(CausalLM(source)).eval()
        folder = save_pretrained(fold(model), tmp_path / name)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert type(theirs).__name__ == f"{name}ForCausalLM"
        torch.testing.assert_close(theirs(ids).logits, model(ids), atol=5e-5, rtol=5e-5)


# --- what it is for ---


def changes(width: int, mup: MupConfig, inner) -> dict[str, float]:
    "Change of each part's output after four steps on random tokens with a pattern."
    torch.manual_seed(0)
    std = 0.1 if mup.on else 0.1 * math.sqrt(32 / width)
    model = CausalLM(mup.model(llama(width, init_std=std)))
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(8, (4, 33), generator=generator).cumsum(1) % 64 for _ in range(5)]
    return coordinate_check(
        model, mup.optimizer(inner).build(model), ids[1:], lambda model, ids: F.cross_entropy(
            model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()), ids[0][:, :-1])


@pytest.mark.parametrize("inner", [AdamWConfig(lr=0.015), MuonConfig(lr=0.03, adamw_lr=0.03)])
def test_the_coordinate_check_passes_for_mup_and_fails_for_standard(inner):
    widths, slopes = (32, 64, 128, 256), {}
    for name, mup in (("muP", MupConfig(base_d_model=32)), ("standard", MupConfig())):
        rows = [changes(width, mup, inner) for width in widths]
        slopes[name] = {part: growth(widths, [r[part] for r in rows]) for part in rows[0]}
    for part in ("embedding", "attention", "residual stream"):
        assert abs(slopes["muP"][part]) < 0.25, (part, slopes)
    # what the head's random start makes of the change falls as 1 / sqrt(width)
    assert -0.4 < slopes["muP"]["logits"] < 0.1, slopes
    assert min(slopes["standard"][part] for part in ("residual stream", "logits")) > 0.2, slopes


def test_depth_keeps_the_residual_stream():
    inner, depths, slopes = AdamWConfig(lr=0.015), (2, 4, 8, 16), {}
    for name, mup in (("CompleteP", MupConfig(base_n_layers=2)), ("standard", MupConfig())):
        found = []
        for depth in depths:
            torch.manual_seed(0)
            model = CausalLM(mup.model(llama(32, depth)))
            ids = [torch.randint(8, (4, 33)).cumsum(1) % 64 for _ in range(5)]
            found.append(coordinate_check(
                model, mup.optimizer(inner).build(model), ids[1:],
                lambda model, ids: F.cross_entropy(
                    model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()),
                ids[0][:, :-1])["residual stream"])
        slopes[name] = growth(depths, found)
    assert abs(slopes["CompleteP"]) < 0.3 and slopes["standard"] > 0.5, slopes


@pytest.mark.parametrize(("name", "n_wider"), [("adamw", 3), ("muon", 3)])
def test_the_stored_sweeps_show_what_the_lesson_says(name, n_wider):
    rows = json.loads((RESULTS / f"mup_transfer_{name}.json").read_text())["rows"]
    base, *wider = [r for r in rows if r["arm"] == "muP"]
    assert len(wider) >= n_wider and all(r["best"] == base["best"] for r in wider)
    assert all(abs(r["shift"]) < 0.7 for r in wider)
    widest = [r for r in rows if r["arm"] == "standard"][-1]
    assert widest["shift"] + widest["interval"] < -1
    for row in rows:  # two rates on either side of every optimum
        ks = [int(k) for k in row["bits_per_byte"]]
        assert min(ks) <= row["best"] - 2 and max(ks) >= row["best"] + 2


def test_the_stored_sweep_over_depth_shows_what_the_lesson_says():
    rows = json.loads((RESULTS / "mup_transfer_depth.json").read_text())["rows"]
    standard, complete = ([r for r in rows if r["arm"] == arm] for arm in ("standard", "CompleteP"))
    assert [r["size"] for r in standard] == [r["size"] for r in complete] == [2, 4, 8, 16, 32]
    assert {r["best"] for r in complete} == {complete[0]["best"]}
    assert standard[-1]["shift"] + standard[-1]["interval"] < 0
    best = [sum(r["bits_per_byte"][str(r["best"])]) / 4 for r in (standard[-1], complete[-1])]
    assert best[1] < best[0] - 0.1


@pytest.mark.parametrize(("family", "bound"), [("mixtral", 0.05), ("deepseek_v3", 0.1)])
def test_the_best_rate_of_sparse_families_transfers(family, bound):
    """What the smallest model's rate costs the widest, in bits: little under muP, and only there.

    DeepSeek-V3's optimum moves a little under muP, too, by 0.65 +- 0.47 doublings at 8 times the
    width; under the standard parameterization it moves by 3."""
    rows = json.loads((RESULTS / f"mup_transfer_adamw_{family}.json").read_text())["rows"]
    regret = {}
    for arm in ("standard", "muP"):
        base, *wider = sorted((r for r in rows if r["arm"] == arm), key=lambda r: r["size"])
        widest, own = wider[-1], str(base["best"])
        means = {k: sum(bits) / len(bits) for k, bits in widest["bits_per_byte"].items()}
        regret[arm] = means.get(own, math.inf) - min(means.values())
        if arm == "standard":
            assert widest["shift"] + widest["interval"] < -1
        else:
            assert len(wider) >= 2 and all(abs(r["shift"]) < 0.7 for r in wider)
    assert regret["muP"] < bound < regret["standard"], regret


# --- runs ---

BASE = MupConfig(base_d_model=8, base_n_layers=1)


@pytest.fixture
def mup_run(config):  # noqa: F811
    return replace(config, mup=BASE)


@pytest.mark.parametrize("family", [None, "granite"])
def test_a_run_its_resume_bit_for_bit_and_its_export(mup_run, tmp_path, family, capsys):
    transformers = pytest.importorskip("transformers")
    model = dict(mup_run.model)
    if family:
        model.pop("d_head")
        model["n_heads"] = model["n_kv_heads"] = 4
    mup_run = replace(mup_run, family=family, model=model)
    train(prepare_run(replace(mup_run, out="straight")))
    run = prepare_run(mup_run)
    assert run.model.logits_scaling == 2
    train(run, callbacks=(stop_at(3),))
    assert not is_finished(Path("run"))
    train(prepare_run(replace(mup_run, resume=True)))
    assert losses("run") == losses("straight")
    one, two = (load_run(where)[0] for where in ("run", "straight"))
    assert all(map(torch.equal, one.parameters(), two.parameters()))
    with pytest.raises(ValueError, match="mup.base_d_model is 8"):
        prepare_run(replace(mup_run, resume=True, mup=MupConfig(base_d_model=4)))
    assert main(["export", "--model", "run", "--out", "exported"]) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained("exported")
    assert theirs.config.model_type == (family or "qwen3")
    ids = torch.randint(300, (2, 20))
    torch.testing.assert_close(theirs(ids).logits, one(ids), atol=5e-5, rtol=5e-5)


def test_a_plain_model_is_no_start_for_mup(mup_run):
    train(prepare_run(replace(mup_run, mup=MupConfig())))
    go_on = replace(mup_run, init="run", out="second", model={})
    with pytest.raises(ValueError, match="init='run' has no multipliers"):
        prepare_run(go_on)
    train(prepare_run(replace(mup_run, out="third")))
    assert prepare_run(replace(go_on, init="third")).model.logits_scaling == 2


def test_bad_settings_are_named(capsys):
    for name in ("base_d_model", "base_n_layers", "base_d_head"):
        with pytest.raises(ValueError, match=f"{name}=0"):
            MupConfig(**{name: 0})
    with pytest.raises(ValueError, match="gpt2 always has"):
        MupConfig(base_d_head=2).model(small("gpt2", True, True))
    with pytest.raises(ValueError, match="family=3 is no config"):
        ScaledConfig(family=3)
    with pytest.raises(ValueError, match="residual_multiplier"):
        GraniteConfig(residual_multiplier=-1.0)


def test_every_preset_gets_multipliers():
    for name in DENSE:
        wide = MupConfig(base_d_model=128, base_n_layers=4).model(get_config(name))
        decoder = as_decoder(wide)
        assert decoder.logits_scaling == decoder.d_model / 128
        assert wide.plain() == DENSE[name]


# --- several processes ---


def run_worker(folder, n: int, **settings) -> dict:
    launch(n, WORKER, folder / f"{n}.pt", json.dumps(settings))
    return torch.load(folder / f"{n}.pt")


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    "Of AdamW and of Muon."
    return {muon: run_worker(tmp_path_factory.mktemp("alone"), 1, muon=muon)
            for muon in (False, True)}


@pytest.mark.parametrize(("n", "settings"), [
    (2, {"strategy": "fsdp"}), (4, {"replicas": 2}), (2, {"tensor": 2})], ids=str)
@pytest.mark.parametrize("muon", [False, True], ids=["adamw", "muon"])
def test_groups_and_weights_survive_sharding(alone, tmp_path, muon, n, settings):
    """Rates depend on whole shapes, not on those of a rank's part."""
    alone, shared = alone[muon], run_worker(tmp_path, n, muon=muon, **settings)
    assert shared["groups"] == alone["groups"] and len(alone["groups"]) > 3
    assert shared["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(shared["weights"][name], weight, atol=2e-4, rtol=0)
        assert (weight - alone["start"][name]).abs().max() > 2e-3, name  # more than the bound
