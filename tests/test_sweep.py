"""Sweeps: a table that goes on where it was stopped, a search that does, too, the command."""

import json
import math
import sqlite3
import subprocess
import sys

import pytest

from skylar.data.prepare import prepare_data
from skylar.training.sweep import (
    METRIC,
    Trial,
    ablate,
    ablation_table,
    changed,
    paired_difference,
    read_range,
    read_trials,
    run_value,
    search,
    seeded,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "t.txt").write_text("To be, or not to be, that is the question. " * 300)
    prepare_data(str(folder / "t.txt"), out=str(folder / "data"), vocab_size=270,
                 val_fraction=0.2)
    return {
        "data": str(folder / "data"), "family": "qwen3",
        "model": {"n_layers": 1, "d_model": 32, "n_heads": 2, "n_kv_heads": 1, "d_head": 16,
                  "d_ff": 32, "max_seq_len": 16},
        "loader": {"batch_size": 2, "seq_len": 16},
        "train": {"steps": 6, "dtype": "float32", "device": "cpu", "log_every": 2,
                  "eval_every": 2, "eval_batches": 2},
        "optimizer": {"lr": 1e-2}, "schedule": {"warmup_steps": 1}}


def quiet(_):
    pass


def test_changed_leaves_the_original_alone():
    settings = {"a": {"b": 1, "c": {"d": 2}}}
    assert changed(settings, {"a.c.d": 3, "e.f": 4}) == {
        "a": {"b": 1, "c": {"d": 3}}, "e": {"f": 4}}
    assert settings == {"a": {"b": 1, "c": {"d": 2}}}
    assert seeded({}, 3) == {"train": {"seed": 3}, "loader": {"seed": 3}}


def test_paired_difference_is_the_t_interval_of_the_pairs():
    mean, half = paired_difference({0: 1.0, 1: 2.0, 2: 4.0, 9: 7.0}, {0: 1.5, 1: 2.1, 2: 4.6})
    differences = [-0.5, -0.1, -0.6]  # seed 9 has no partner
    assert math.isclose(mean, sum(differences) / 3)
    deviation = math.sqrt(sum((d - mean) ** 2 for d in differences) / 2)
    assert math.isclose(half, 4.303 * deviation / math.sqrt(3), rel_tol=1e-3)
    with pytest.raises(ValueError, match="1 seeds in common"):
        paired_difference({0: 1.0}, {0: 2.0})


def test_a_table_goes_on_where_it_was_stopped(base, tmp_path):
    rows, lines = {"fast": {"optimizer.lr": 3e-2}}, []
    whole = ablate(base, rows, out=tmp_path / "whole", seeds=2, report=lines.append)
    assert [(t.name, t.seed) for t in whole] == [
        ("base", 0), ("base", 1), ("fast", 0), ("fast", 1)] and len(lines) == 4
    assert len({t.value for t in whole}) == 4
    assert whole[0].value == run_value(seeded(base, 0), tmp_path / "alone")

    def stop(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ablate(base, rows, out=tmp_path / "parts", seeds=2, report=stop)
    assert len(read_trials(tmp_path / "parts")) == 1
    lines.clear()
    assert ablate(base, rows, out=tmp_path / "parts", seeds=2, report=lines.append) == whole
    assert len(lines) == 3
    more = ablate(base, {**rows, "slow": {"optimizer.lr": 1e-4}}, out=tmp_path / "parts",
                  seeds=2, report=quiet)
    assert more[:4] == whole and len(more) == 6
    assert not list(tmp_path.glob("whole/*/checkpoints"))  # only values are needed
    with pytest.raises(ValueError, match="trials of another base"):
        ablate(changed(base, {"train.steps": 4}), rows, out=tmp_path / "parts", report=quiet)
    for name, changes in (("fast", {"optimizer.lr": 2e-2}), ("slow", {"optimizer.lr": 2e-4}),
                          ("base", {"optimizer.lr": 2e-2})):  # names that are known
        with pytest.raises(ValueError, match=f"trials of another '{name}'"):
            ablate(base, {name: changes}, out=tmp_path / "parts", seeds=2, report=quiet)
    assert ablate(base, rows, out=tmp_path / "parts", seeds=2, report=pytest.fail) == whole
    assert len(read_trials(tmp_path / "parts")) == 6


def test_a_table_from_before_rows_were_kept_goes_on(base, tmp_path):
    (tmp_path / "table.json").write_text(json.dumps({"base": base, "metric": METRIC}))
    rows = {"fast": {"optimizer.lr": 3e-2}}
    ablate(base, rows, out=tmp_path, seeds=2, report=quiet)
    kept = json.loads((tmp_path / "table.json").read_text())
    assert kept == {"base": base, "metric": METRIC, "rows": {"base": {}, **rows}}


def test_wrong_rows_are_refused_before_the_first_run(base, tmp_path):
    for changes, said in (({"optimizer.lrr": 1}, "optimizer.lrr"),
                          ({"optimizer.lr": -1.0}, "lr=-1.0")):
        with pytest.raises(ValueError, match=said):
            ablate(base, {"good": {"train.steps": 4}, "bad": changes}, out=tmp_path / "x",
                   report=quiet)
        assert not (tmp_path / "x").exists()


def test_a_metric_that_no_row_has_is_named(base, tmp_path):
    with pytest.raises(ValueError, match="metric='val_los': no row has it; there are val_"):
        run_value(base, tmp_path / "x", metric="val_los")


def test_the_table_says_what_is_clear():
    values = {"base": [2.0, 2.1, 2.2], "better": [1.9, 2.0, 2.11], "noise": [2.1, 2.0, 2.2],
              "worse": [2.1, 2.2, 2.31], "broken": [2.0, math.inf, 2.0]}
    trials = [Trial(n, seed, v) for n, row in values.items() for seed, v in enumerate(row)]
    lines = {line.split("|")[1].strip(): line for line in ablation_table(trials).splitlines()
             if line.startswith("| ")}
    assert "-0.0967 ± 0.0143 | better" in lines["better"]
    assert "not clear" in lines["noise"] and "| worse |" in lines["worse"]
    assert "diverged" in lines["broken"] and "±" not in lines["base"]
    assert "at least one of 4 rows would look clear with a probability of up to 19%." in (
        ablation_table(trials))


def test_the_stored_table_is_that_of_its_trials():
    from skylar.utils.lesson import asset

    results = asset("shakespeare").parents[1] / "bench/results/ablations.json"
    stored = json.loads(results.read_text())
    assert stored["table"] == ablation_table([Trial(**t) for t in stored["trials"]])


class Draws:
    "What a trial is asked for."

    def suggest_float(self, name, low, high, log):
        return "float", low, high, log

    def suggest_int(self, name, low, high):
        return "int", low, high

    def suggest_categorical(self, name, values):
        return values


@pytest.mark.parametrize("text, drawn", [
    ("log 1e-4 1e-2", ("float", 1e-4, 1e-2, True)), ("uniform 0 0.3", ("float", 0.0, 0.3, False)),
    ("int 2 8", ("int", 2, 8)), ([2, 4], [2, 4])])
def test_ranges(text, drawn):
    assert read_range("x", text)(Draws()) == drawn


@pytest.mark.parametrize("text", ["log 0 1", "uniform 1 0", "int 1 2.5", "log 1", "normal 0 1",
                                  "", [], 3, "uniform a b"])
def test_ranges_that_cannot_be(text):
    with pytest.raises(ValueError, match="x: .* is no range; give `log LOW HIGH`"):
        read_range("x", text)


def test_a_search_goes_on_and_counts_what_was_done(base, tmp_path):
    pytest.importorskip("optuna", reason="the sweep extra")
    space = {"optimizer.lr": "log 1e-4 1e-1"}
    search(base, space, out=tmp_path / "s", trials=2, report=quiet)
    lines = []
    study = search(base, space, out=tmp_path / "s", trials=5, report=lines.append)
    assert len(lines) == 3 and len(study.trials) == 5
    search(base, space, out=tmp_path / "s", trials=5, report=lines.append)
    assert len(lines) == 3  # nothing was left to do
    assert study.best_value == min(t.value for t in study.trials if t.state.name == "COMPLETE")
    again = run_value(changed(base, study.best_params), tmp_path / "best")
    assert again == study.best_value
    rows = sqlite3.connect(tmp_path / "s/study.db").execute("select count(*) from trials")
    assert rows.fetchone() == (5,)


def drawn(study) -> list[float]:
    return [trial.params["optimizer.lr"] for trial in study.trials]


def test_later_calls_draw_other_points(base, tmp_path):
    pytest.importorskip("optuna", reason="the sweep extra")
    space = {"optimizer.lr": "log 1e-4 1e-1"}
    first = drawn(search(base, space, out=tmp_path / "s", trials=2, report=quiet))
    both = drawn(search(base, space, out=tmp_path / "s", trials=4, report=quiet))
    assert both[:2] == first and len(set(both)) == 4
    again = search(base, space, out=tmp_path / "again", trials=2, report=quiet)
    assert drawn(again) == first  # the seed still decides
    shared = [drawn(search(base, space, out=tmp_path / str(i), trials=1, report=quiet,
                           storage=f"sqlite:///{tmp_path}/{i}.db")) for i in range(2)]
    assert shared[0] != shared[1]  # two that start at the same moment differ


def test_no_trial_is_pruned_in_the_first_third(base, tmp_path):
    pytest.importorskip("optuna", reason="the sweep extra")
    settings = changed(base, {"train.steps": 12})
    del settings["data"]  # is drawn
    study = search(settings, {"optimizer.lr": "log 1e-9 1e-1", "data": [base["data"]]},
                   out=tmp_path / "s", trials=12, report=quiet)
    assert study.pruner._n_warmup_steps == 4
    stops = [max(t.intermediate_values) for t in study.trials if t.state.name == "PRUNED"]
    assert stops and min(stops) >= 4


def test_bad_trials_are_pruned(base, tmp_path):
    pytest.importorskip("optuna", reason="the sweep extra")
    steps = changed(base, {"train.steps": 12})
    study = search(steps, {"optimizer.lr": [3e-2, 1e-2, 5e-3, 1e-9]}, out=tmp_path / "s",
                   trials=14, report=quiet)
    states = {t.state.name for t in study.trials}
    assert states == {"COMPLETE", "PRUNED"}
    pruned = [t for t in study.trials if t.state.name == "PRUNED"]
    assert any(t.params["optimizer.lr"] == 1e-9 for t in pruned)
    assert all(max(t.intermediate_values) < 12 for t in pruned)


def test_optuna_missing_is_said(base, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ValueError, match=r"optuna is missing; pip install 'skylar\[sweep\]'"):
        search(base, {"optimizer.lr": "log 1e-4 1e-1"}, out=tmp_path / "s", report=quiet)


def sweep(*words):
    return subprocess.run([sys.executable, "-m", "skylar", "sweep", *map(str, words)],
                          capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_command_writes_table_plot_and_results(base, tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(json.dumps({"base": base, "seeds": 2,
                                "rows": {"cosine for WSD": {"schedule.kind": "wsd"}}}))
    done = sweep(file, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "| cosine for WSD |" in done.stdout
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert len(results["trials"]) == 4 and results["table"] in done.stdout
    assert (tmp_path / "out/differences.png").stat().st_size > 1000
    refused = sweep(file, "--out", tmp_path / "out", "--trials", 3)
    assert refused.returncode == 2 and "--trials and --storage are for a search" in refused.stderr


@pytest.mark.parametrize("text, said", [
    ("base: {data: d}", "give either rows"),
    ("base: {data: d}\nrows: {a: {x: 1}}\nsearch: {b: [1]}", "give either rows"),
    ("base: {data: d}\nrow: {}", "unknown key row"),
    ("base: {data: d}\nrows: {a: 3}", "row 'a': give what it changes"),
    ("base: {data: d}\nrows: {}", "rows is empty"),
    ("base: 3\nrows: {a: {x: 1}}", "base is no mapping"),
    ("[1, 2]", "give a mapping"),
    ("a: [", "is not YAML"),
])
def test_files_that_cannot_be(text, said, tmp_path):
    from skylar.cli.sweep import read_sweep

    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_sweep(tmp_path / "s.yaml")
