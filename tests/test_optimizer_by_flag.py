"""`--optimizer.kind`: which config it chooses, what it refuses, runs with it from the command line,
resumed bit for bit, resumed from folders older than the choice, and shared by two processes."""

import json
import re
import shutil
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
import yaml
from ranks import launch
from test_distributed import numbers

from skylar.cli import main
from skylar.models.decoder import CausalLM
from skylar.models.presets import get_config
from skylar.training import run as runs
from skylar.training.checkpoint import find_checkpoint, load_state
from skylar.training.metrics import read_metrics
from skylar.training.muon import MuonAdamW, MuonConfig, OptimizerConfig
from skylar.training.optim import AdamWConfig
from skylar.training.run import RunConfig, build_config, load_run

SMALL = """--model.d_model 16 --model.d_head 4 --model.d_ff 32 --model.n_layers 2 --preset test
    --loader.batch_size 2 --loader.seq_len 32 --train.log_every 1 --train.eval_batches 2
    --train.save_every 3 --train.device cpu --train.dtype float32 --train.steps 6
    --optimizer.lr 1e-2""".split()
MUON = ["--optimizer.kind", "muon"]


# --- which optimizer ---


def test_the_default_is_the_adamw_that_was_there_before():
    assert OptimizerConfig().chosen == AdamWConfig()
    changed = dict(lr=1e-2, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3)
    assert OptimizerConfig(**changed).chosen == AdamWConfig(**changed)
    assert isinstance(OptimizerConfig().build(small()), torch.optim.AdamW)


def test_all_settings_of_adamw_and_of_muon_are_there():
    """A field that either config gets later must be added here, with its default."""
    ours = {f.name: f.default for f in fields(OptimizerConfig)}
    shared = ("lr", "weight_decay")
    for f in fields(AdamWConfig):
        assert ours[f.name] == f.default
    for f in fields(MuonConfig):
        if not f.name.startswith("adamw_"):
            assert ours[f"muon_{f.name}"] == (None if f.name in shared else f.default), f.name
    rest = {f.name.removeprefix("adamw_") for f in fields(MuonConfig) if "adamw_" in f.name}
    assert rest == {f.name for f in fields(AdamWConfig)}


def test_muon_shares_lr_and_weight_decay_unless_it_has_its_own():
    both = OptimizerConfig(kind="muon", lr=2e-3, weight_decay=0.3, betas=(0.8, 0.9), eps=1e-6)
    assert both.chosen == MuonConfig(lr=2e-3, weight_decay=0.3, adamw_lr=2e-3, adamw_eps=1e-6,
                                     adamw_betas=(0.8, 0.9), adamw_weight_decay=0.3)
    own = dict(lr=5e-3, weight_decay=0.0, momentum=0.9, nesterov=False, adjust_lr="original",
               steps=7, coefficients="classic", per_head=False, dtype="bfloat16")
    chosen = OptimizerConfig(kind="muon", lr=2e-3,
                             **{f"muon_{name}": value for name, value in own.items()}).chosen
    assert chosen == MuonConfig(**own, adamw_lr=2e-3)


def small():
    return CausalLM(get_config("test", family="qwen3", vocab_size=32, d_model=16, d_head=4,
                               n_heads=4, n_kv_heads=2, d_ff=32, n_layers=2))


def test_build_is_the_build_of_the_chosen_config():
    optimizer = OptimizerConfig(kind="muon", lr=2e-3, muon_lr=5e-3).build(small())
    assert isinstance(optimizer, MuonAdamW)
    assert {("momentum" in g, g["lr"]) for g in optimizer.param_groups} == {
        (True, 5e-3), (False, 2e-3)}


# --- refused in one line, under the name that was given ---


@pytest.mark.parametrize(("changes", "message"), [
    ({"kind": "lion"}, "kind='lion' must be adamw or muon"),
    ({"lr": -1.0}, "lr=-1.0 must be a positive number"),
    ({"kind": "muon", "lr": -1.0}, "lr=-1.0 must be a positive number"),
    ({"kind": "muon", "betas": (0.9, 1.0)}, "betas=(0.9, 1.0) must be"),
    ({"kind": "muon", "muon_lr": 0.0}, "muon_lr=0.0: give a number above 0"),
    ({"kind": "muon", "muon_weight_decay": -0.1}, "muon_weight_decay=-0.1 must be 0"),
    ({"kind": "muon", "muon_momentum": 1.0}, "muon_momentum=1.0: give"),
    ({"kind": "muon", "muon_steps": 0}, "muon_steps=0: give"),
    ({"kind": "muon", "muon_adjust_lr": "best"}, "unknown muon_adjust_lr 'best'; choose from"),
    ({"kind": "muon", "muon_coefficients": "clasic"}, "unknown muon_coefficients 'clasic'"),
    ({"kind": "muon", "muon_dtype": "float16"}, "unknown muon_dtype 'float16'"),
    ({"muon_steps": 6}, "muon_steps=6 is Muon's, and kind is 'adamw'; leave it out, or give"),
    ({"muon_lr": 3e-4}, "muon_lr=0.0003 is Muon's"),
    ({"muon_per_head": False}, "muon_per_head=False is Muon's"),
])
def test_bad_settings_are_refused_by_their_name(changes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as error:
        OptimizerConfig(**changes)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=re.escape("optimizer." + message.split()[0])):
        build_config(RunConfig, {"data": "x", "optimizer": changes})


def test_muons_settings_at_their_defaults_may_be_written_out():
    """As --print_config does, and config.yaml."""
    plain = json.loads(json.dumps(asdict(OptimizerConfig())))
    assert build_config(OptimizerConfig, plain).chosen.build(small())


def test_another_config_in_a_run_is_refused():
    with pytest.raises(ValueError, match="optimizer is a AdamWConfig; give an OptimizerConfig"):
        RunConfig(data="x", optimizer=AdamWConfig())


# --- from the command line ---


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    words = "the king said that a summer day is long and love is short".split()
    texts = (" ".join(words[i * j % len(words)] for j in range(120)) for i in range(24))
    (home / "text.txt").write_text("\n\n".join(texts))
    assert main(["data", "tokenize", str(home / "text.txt"), "--out", str(home / "data"),
                 "--vocab_size", "300"]) == 0
    assert main(pretrain(home, home / "run", *MUON)) == 0
    return home


@pytest.fixture
def cut(home, tmp_path):
    """The folder of the finished run, as a crash after step 3 leaves it."""
    shutil.copytree(home / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-000006")
    (tmp_path / "run/checkpoints/latest").write_text("step-000003\n")
    return tmp_path / "run"


def pretrain(home, out, *words):
    return ["pretrain", "--data", str(home / "data"), "--out", str(out), *SMALL, *words]


def bits(folder):
    model = load_run(folder)[0]
    return {name: p.detach().view(torch.int32) for name, p in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def test_kind_muon_trains_with_muon(home, tmp_path):
    rows = read_metrics(home / "run/metrics.jsonl")
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3
    settings = load_state(home / "run")["extra"]["settings"]["optimizer"]
    assert settings == json.loads(json.dumps(asdict(MuonConfig(lr=1e-2, adamw_lr=1e-2))))
    written = yaml.safe_load((home / "run/config.yaml").read_text())["optimizer"]
    assert written["kind"] == "muon" and written["muon_lr"] is None
    assert main(pretrain(home, tmp_path / "adamw")) == 0
    assert not same(bits(tmp_path / "adamw"), bits(home / "run"))


def test_yaml_says_the_same_as_flags(home, tmp_path):
    (tmp_path / "muon.yaml").write_text("optimizer:\n  kind: muon\n")
    assert main(pretrain(home, tmp_path / "run", "--config", str(tmp_path / "muon.yaml"))) == 0
    assert same(bits(tmp_path / "run"), bits(home / "run"))


def test_resumed_bit_for_bit(home, cut):
    assert not same(bits(cut), bits(home / "run"))
    assert main(["pretrain", "--config", str(cut / "config.yaml"), "--resume"]) == 0
    assert same(bits(cut), bits(home / "run"))
    one, two = (find_checkpoint(folder) / "tensors" for folder in (cut, home / "run"))
    names = sorted(p.name for p in one.glob("*.distcp"))
    assert names and all((one / n).read_bytes() == (two / n).read_bytes() for n in names)


@pytest.mark.parametrize(("words", "message"), [
    (["--optimizer.kind", "adamw"], "optimizer.kind is muon in .*, but adamw now"),
    (["--optimizer.muon_steps", "6"], "optimizer.muon_steps is 5 in .*, but 6 now"),
    (["--optimizer.muon_lr", "1e-3"], "optimizer.muon_lr is None in .*, but 0.001 now"),
])
def test_resumed_with_another_optimizer_is_refused_by_name(cut, capsys, words, message):
    assert main(["pretrain", "--config", str(cut / "config.yaml"), "--resume", *words]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1


def test_a_setting_of_muon_without_muon_is_refused_by_its_flag(home, tmp_path, capsys):
    assert main(pretrain(home, tmp_path / "x", "--optimizer.muon_steps", "6")) == 2
    assert "error: optimizer.muon_steps=6 is Muon's" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_run_from_before_the_choice_goes_on(home, tmp_path, monkeypatch, capsys):
    """Its settings have AdamW's four fields only."""
    right = runs.stored

    def old(config):
        plain = right(config)
        return plain | {"optimizer": {f.name: plain["optimizer"][f.name]
                                      for f in fields(AdamWConfig)}}

    with monkeypatch.context() as patch:
        patch.setattr(runs, "stored", old)
        assert main(pretrain(home, tmp_path / "straight")) == 0
        assert main(pretrain(home, tmp_path / "old", "--train.steps", "3")) == 0
    config = str(tmp_path / "old/config.yaml")
    assert "kind" not in yaml.safe_load(Path(config).read_text())["optimizer"]
    saved = load_state(tmp_path / "old")["extra"]["settings"]["optimizer"]
    assert saved.keys() == {f.name for f in fields(AdamWConfig)}  # as the Trainer kept it then
    resume = ["pretrain", "--config", config, "--resume", "--extend_to", "6"]
    assert main([*resume, *MUON]) == 2
    assert "optimizer.kind is adamw" in capsys.readouterr().err
    assert main(resume) == 0
    assert load_run(tmp_path / "old")[2]["steps"] == 6


# --- several processes ---


def test_two_processes_of_fsdp_train_as_one(home, tmp_path):
    words = pretrain(home, tmp_path / "two", *MUON, "--parallel.strategy", "fsdp")
    launch(2, "-m", "skylar", *words)
    assert main(pretrain(home, tmp_path / "adamw")) == 0
    assert numbers(tmp_path / "two") == [
        pytest.approx(row, rel=1e-5) for row in numbers(home / "run")]
    one, two, adamw = (dict(load_run(folder)[0].named_parameters())
                       for folder in (home / "run", tmp_path / "two", tmp_path / "adamw"))

    def distance(a, b):
        return max((a[name] - b[name]).abs().max().item() for name in a)

    assert distance(one, two) < 2e-5 < 1e-2 < distance(one, adamw)
