"""Plans: simulated steps against real ones, meshes, remedies, recipes, the command."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml

from skylar.cli import main
from skylar.models.decoder import active_parameters, count_parameters, flops_per_token
from skylar.models.presets import DENSE, get_config
from skylar.training.distributed import ParallelConfig
from skylar.training.plan import MemoryLedger, ScalingLaw, fit_scaling_law, training_hours
from skylar.training.planner import (
    GIB,
    at_depth,
    find_plan,
    make_plan,
    measure,
    mesh_of,
    model_config,
    plain_run,
    plan_row,
    predict,
    simulate,
    simulate_any_depth,
    verdict,
)
from skylar.training.run import LoaderConfig, RunConfig, TrainConfig, build_config
from skylar.utils.accelerators import ACCELERATORS, find_accelerator

ROOT = Path(__file__).parents[1]
RECIPES = sorted(p for p in (ROOT / "configs").glob("*.yaml") if "# mesh:" in p.read_text())
SPARSE = {"mixtral-8x7b", "qwen3-30b-a3b", "qwen3-235b-a22b", "gpt-oss-20b", "gpt-oss-120b",
          "deepseek-v3"}
linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")


def run(B=4, T=64, blocks=2, model=(), train=(), **parallel) -> RunConfig:
    sizes = {"vocab_size": 500, "n_layers": blocks, "d_model": 64, "d_head": 16, "d_ff": 128}
    return RunConfig(
        data="-", preset="test", model=sizes | dict(model),
        loader=LoaderConfig(batch_size=B, seq_len=T), parallel=ParallelConfig(**parallel),
        train=TrainConfig(**{"dtype": "float32", "device": "cpu"} | dict(train)))


def peak(memory: dict) -> float:
    return max(sum(kinds.values()) for kinds in memory["phases"].values())


def fake(config: RunConfig, n: int = 1) -> dict:
    return simulate(plain_run(config, True), n, True)


def weights(config: RunConfig) -> int:
    return 4 * count_parameters(model_config(config))


def test_the_ledger_counts_storages_once_and_notes_when_they_go():
    ledger = MemoryLedger()
    with ledger:
        a = torch.zeros(100)
        b = (a + 1).view(10, 10)
        del a
        c = b[0] * 2
        ledger.label("parameters", [b])
        c.untyped_storage().resize_(0)
        ledger.resized(c.untyped_storage())
    totals = [sum(t.values()) for _, t in ledger.history()]
    assert totals == [400, 800, 400, 440, 400]
    assert ledger.summary()["sizes"] == {"buffers": 400, "parameters": 400, "gathered": 40}


def test_one_process_holds_four_numbers_for_each_parameter():
    config = run()
    sizes = fake(config)["sizes"]
    assert sizes["parameters"] == sizes["gradients"] == weights(config)
    assert sizes["optimizer"] == pytest.approx(2 * weights(config), rel=1e-3)  # and step counts


@pytest.mark.parametrize(("settings", "n", "share"), [
    ({}, 4, 4), ({"replicas": 2}, 4, 2), ({"strategy": "ddp"}, 4, 1)],
    ids=["fsdp", "hsdp", "ddp"])
def test_what_a_mesh_divides(settings, n, share):
    config = run(**settings)
    sizes = fake(config, n)["sizes"]
    assert sizes["parameters"] == pytest.approx(weights(config) / share, rel=0.01)
    assert sizes["gradients"] == pytest.approx(weights(config) / share, rel=0.01)
    assert not dist.is_initialized()
    alone = fake(run())["sizes"]["activations"]
    assert sizes["activations"] < 0.6 * alone  # the batch is divided


def test_tensor_parallelism_divides_matrices_and_their_activations():
    sizes, alone = fake(run(T=256, tensor=2), 2)["sizes"], fake(run(T=256))["sizes"]
    assert 0.5 < sizes["parameters"] / alone["parameters"] < 0.8  # not embeddings and norms
    assert 0.5 < sizes["activations"] / alone["activations"] < 0.85  # not the residual stream


def test_recomputation_keeps_one_block_and_the_inputs_of_all():
    growth = {}
    for on in (False, True):
        low, high = (fake(run(T=256, blocks=n, recompute=on))["sizes"]["activations"]
                     for n in (2, 4))
        growth[on] = (high - low) / 2
    assert growth[True] == pytest.approx(4 * 256 * 64 * 4, rel=0.01)  # B T D fp32 numbers
    assert growth[False] > 5 * growth[True]


def test_no_copy_of_all_weights_is_kept_under_bf16_when_blocks_are_recomputed():
    low, high = (fake(run(blocks=n, recompute=True, train={"dtype": "bfloat16"}), 4)["sizes"]
                 for n in (2, 4))
    inputs = 1 * 64 * 64 * 4  # of one sequence
    assert (high["activations"] - low["activations"]) / 2 == pytest.approx(inputs, rel=0.05)


def test_any_depth_from_two():
    for config, n in ((run(blocks=8), 1), (run(blocks=8, recompute=True), 4)):
        line = simulate_any_depth(config, n, True)
        whole = fake(config, n)
        assert peak(line) == pytest.approx(peak(whole), rel=1e-3)
        for kind in ("parameters", "gradients", "optimizer", "activations"):
            assert line["sizes"][kind] == pytest.approx(whole["sizes"][kind], rel=1e-3)


def test_accumulation_keeps_gradients_while_the_next_micro_batch_runs():
    once = peak(fake(run(T=256)))
    assert peak(fake(run(T=256, train={"grad_accum_steps": 4}))) - once == pytest.approx(
        weights(run()), rel=0.35)


@linux
@pytest.mark.parametrize("config", [
    run(B=16, T=256, blocks=4, model={"d_model": 192, "d_head": 48}),
    run(B=12, T=256, blocks=4, recompute=True, train={"grad_accum_steps": 2},
        model={"d_model": 256, "d_head": 64, "d_ff": 768, "vocab_size": 4000})],
    ids=["plain", "recomputed, accumulated"])
def test_within_ten_percent_of_measured_memory(config):
    memory, = predict([(config, 1)], gpu=False)
    assert peak(memory) == pytest.approx(measure(config)[0], rel=0.1)


@linux
@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"strategy": "ddp"}], ids=["fsdp", "ddp"])
def test_within_ten_percent_of_measured_memory_on_two_processes(settings):
    config = run(B=8, T=256, blocks=6, model={"d_model": 384, "d_head": 96, "d_ff": 1024},
                 **settings)
    memory, = predict([(config, 2)], gpu=False)
    for found in measure(config, 2):
        assert peak(memory) == pytest.approx(found, rel=0.1)


def test_the_stored_measurements_are_within_ten_percent():
    rows = json.loads((ROOT / "bench/results/plan_memory.json").read_text())["rows"]
    assert len(rows) >= 10 and {row["processes"] for row in rows} == {1, 2}
    for row in rows:
        assert row["predicted_mb"] == pytest.approx(row["measured_mb"], rel=0.1), row


def test_a_plan_that_does_not_fit_says_why_and_what_was_seen_to_help():
    config = run(B=2, T=4096, blocks=6, model={"d_model": 3072, "d_head": 768, "d_ff": 12_288})
    plan = make_plan(config, 1, "rtx4090")
    assert not plan.fits
    said = re.fullmatch(r"does not fit: needs \d+\.\d of 23\.5 GiB on each rtx4090, most of it "
                        r"(\w+) \(.*\); (.*) fits \(\d+\.\d GiB\)", verdict(plan))
    assert said and ("--parallel.recompute true" in said[2] or "--gpus" in said[2])


def test_the_smallest_mesh_that_fits_is_proposed():
    plan = find_plan(run(), "h100")
    assert plan.gpus == 1 and plan.fits and mesh_of(plan) == "1"
    assert verdict(plan).startswith("fits: needs 2.0 of 79.0 GiB on each h100")
    fixed = find_plan(run(B=6), "l40s", 3, None)
    assert (fixed.gpus, fixed.config.loader.batch_size) == (3, 6)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="unknown gpu 'z9'; choose from h100, h200, a100-80"):
        find_plan(run(), "z9")
    with pytest.raises(ValueError, match="loader.batch_size=4 does not divide among 3"):
        find_plan(run(), "h100", 3, None)
    with pytest.raises(ValueError, match="gpus=0: give a whole number"):
        find_plan(run(), "h100", 0)
    with pytest.raises(ValueError, match="8 does not divide the 4 key-value heads"):
        make_plan(run(tensor=8), 8, "h100")
    with pytest.raises(ValueError, match="init='x': a plan is for a preset"):
        model_config(replace(run(), init="x"))
    with pytest.raises(ValueError, match="mfu=1.5"):
        training_hours(get_config("test"), 64, 1e6, 1, 100, 1.5)


def test_time_and_cost_follow_from_flops():
    plan = find_plan(run(), "h100", 1)
    row = plan_row(plan, mfu=0.5, tokens=1e9, usd_per_gpu_hour=2.0)
    flops = flops_per_token(model_config(plan.config), 64) * 1e9
    assert row["gpu_hours"] == pytest.approx(flops / (989e12 * 0.5) / 3600)
    assert row["usd"] == pytest.approx(2 * row["gpu_hours"])
    assert plan_row(plan)["tokens"] == 20 * count_parameters(model_config(plan.config))
    assert "usd" not in plan_row(plan) and plan_row(plan)["status"] == "plan, never run"


def test_accelerators_hold_dense_rates_below_what_is_on_the_box():
    assert find_accelerator("H100").bf16_tflops == 989
    for a in ACCELERATORS.values():
        assert a.source and (a.name == "cpu" or a.memory_gib * GIB > 20e9)


def test_the_command(capsys):
    flags = ["plan", "--preset", "test", "--model.vocab_size", "500", "--gpus", "2"]
    assert main([*flags, "--json", "--usd_per_gpu_hour", "2"]) == 0
    row, = json.loads(capsys.readouterr().out)
    assert row["fits"] and row["gpus"] == 2 and row["seq_len"] == 4096 and row["usd"] > 0
    assert main([*flags, "--gpu", "h900"]) == 2
    assert "unknown gpu 'h900'" in capsys.readouterr().err


def test_the_command_says_that_it_does_not_fit(capsys):
    assert main(["plan", "--preset", "4b", "--gpu", "rtx4090", "--gpus", "1",
                 "--model.n_layers", "12", "--model.vocab_size", "100000"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "does not fit: needs" in said and "NO" in said and "never run" in said


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_pretrain_takes_every_recipe(path, capsys):
    assert main(["pretrain", "--config", str(path), "--print_config"]) == 0
    assert f"preset: {yaml.safe_load(path.read_text())['preset']}" in capsys.readouterr().out


def test_there_is_a_recipe_for_every_preset_and_the_stored_plans_are_of_it():
    presets = {yaml.safe_load(p.read_text())["preset"]: p for p in RECIPES}
    assert {*presets, "test"} == {*DENSE, *SPARSE}
    dense, sparse = (json.loads((ROOT / f"bench/results/{name}.json").read_text())["rows"]
                     for name in ("plan_presets", "plan_sparse"))
    assert {row["preset"] for row in sparse} == SPARSE
    assert {row["preset"] for row in dense} == set(presets) - SPARSE
    rows = dense + sparse
    for row in rows:
        config = build_config(RunConfig, yaml.safe_load(presets[row["preset"]].read_text()))
        assert row["fits"] and row["batch"] == config.loader.batch_size
        assert min(size for kinds in row["at_peak_gib"].values() for size in kinds.values()) >= 0
        assert f"# mesh: {row['gpus']} x {row['gpu']}" in presets[row["preset"]].read_text()
        assert row["tokens"] >= 20 * row["parameters"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_says_what_it_is(path):
    """Its first line: parameters, those that a token uses, tokens a step."""
    line, config = path.read_text().splitlines()[0], build_config(
        RunConfig, yaml.safe_load(path.read_text()))
    model = model_config(config)
    counts = [count_parameters(model), active_parameters(model)]
    said = [float(n.replace(",", "")) * {"M": 1e6, "B": 1e9}[unit]
            for n, unit in re.findall(r"([\d,.]+)([MB])\b", line)]
    assert said and said == pytest.approx(counts[:len(said)], rel=0.01), counts
    step = config.loader.batch_size * config.loader.seq_len * config.train.grad_accum_steps
    assert f"{step:,} tokens a step" in line


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_the_planner_accepts_every_recipe(path, capsys):
    mesh = re.search(r"^# mesh: (\d+) x (\S+)$", path.read_text(), re.MULTILINE)
    assert main(["plan", "--config", str(path), "--gpus", mesh[1], "--gpu", mesh[2]]) == 0
    assert "fits: needs" in capsys.readouterr().out


def test_a_known_scaling_law_is_found_again():
    law = ScalingLaw(E=1.7, A=20, alpha=0.4, B=60, beta=0.3)
    N, D = np.repeat([2e4, 5e4, 1e5, 3e5], 4), np.tile([2e5, 4e5, 8e5, 1.6e6], 4)
    found = fit_scaling_law(N, D, law.loss(N, D))
    assert found.loss(1e6, 3e6) == pytest.approx(law.loss(1e6, 3e6), rel=5e-3)
    assert found.alpha == pytest.approx(0.4, abs=0.03)
    N0, D0 = law.optimal(1e15)
    assert 6 * N0 * D0 == pytest.approx(1e15)
    assert all(law.loss(N0 * f, D0 / f) > law.loss(N0, D0) for f in (0.9, 1.1))
    with pytest.raises(ValueError, match="no law of this form fits"):
        fit_scaling_law(N, D, N / 1e4)


def test_at_depth_changes_the_depth_alone():
    deep = at_depth(run(blocks=2), 7)
    assert len(model_config(deep).decoder().blocks) == 7
    assert replace(deep, model=run().model) == run()
