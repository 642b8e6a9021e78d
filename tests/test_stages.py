"""Stages: a model in, a run folder out that the next one opens; resumed, refused, two ranks."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import yaml
from chats import save_base, sums, write_chats
from ranks import check_two_ranks
from test_distributed import numbers

from skylar.cli import main
from skylar.cli.stages import STAGES, stage_defaults, stage_fields
from skylar.data.chatml import ConversationLoader
from skylar.models.hub import from_pretrained, load_tokenizer
from skylar.posttrain.sft import SFTConfig, SFTObjective, SFTStage
from skylar.posttrain.stages import (
    Frozen,
    StageConfig,
    open_frozen,
    open_stage,
    run_stage,
    train_stage,
)
from skylar.training.muon import OptimizerConfig
from skylar.training.run import LoaderConfig, TrainConfig, load_run, open_model


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    save_base(home / "base")
    write_chats(home / "chats.jsonl", sums(40))
    return home


@pytest.fixture
def config(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return SFTStage(
        model=str(home / "base"), data=str(home / "chats.jsonl"), out="run",
        loader=LoaderConfig(batch_size=2, seq_len=96),
        train=TrainConfig(steps=6, log_every=1, eval_every=3, eval_batches=2, save_every=3,
                          device="cpu", dtype="float32"),
        optimizer=OptimizerConfig(lr=1e-2))


@pytest.fixture
def finished(config):
    train_stage(open_stage(config), quiet=True)
    return replace(config, resume=True)


def same_weights(a, b) -> bool:
    theirs = dict(b.named_parameters())
    return all(p.equal(theirs[name]) for name, p in a.named_parameters())


# --- from model to model ---


def test_a_run_opens_as_a_model_and_as_the_next_stage(home, finished):
    model, tokenizer, ends = open_model("run")
    base = load_tokenizer(home / "base")
    assert tokenizer.chat(sums(1)[0]) == base.chat(sums(1)[0])
    assert tokenizer.chat_template is not None and ends == tokenizer.eos_token_ids
    assert not same_weights(model, from_pretrained(home / "base", torch.float32))
    again = open_stage(replace(finished, model="run", out="second", resume=False))
    assert same_weights(again.model, model)
    assert again.tokenizer.fingerprint == tokenizer.fingerprint
    train_stage(again, quiet=True)
    assert load_run("second")[2]["stage"] == "sft"


def test_export_and_generate_open_a_stage(finished, capsys):
    assert main(["export", "--model", "run", "--out", "exported"]) == 0
    assert same_weights(from_pretrained("exported", torch.float32), open_model("run")[0])
    assert main(["generate", "--model", "run", "--chat", "--prompt", "What is 1+1?",
                 "--max_new_tokens", "4", "--device", "cpu"]) == 0
    assert main(["eval", "--model", "run"]) == 2  # its data are no tokens to evaluate on
    assert "give a data folder" in capsys.readouterr().err


def test_a_run_of_pretraining_is_a_model_to_start_from(home, tmp_path, config):
    (tmp_path / "texts").mkdir()
    for i in range(24):
        (tmp_path / "texts" / f"{i}.txt").write_text("the king said that love is short " * 40)
    words = ["pretrain", "--data", "data", "--corpus.source", "texts", "--corpus.vocab_size",
             "300", "--out", "pre", "--model.d_model", "16", "--model.d_head", "4",
             "--model.d_ff", "32", "--model.n_layers", "1", "--loader.batch_size", "2",
             "--loader.seq_len", "96", "--train.steps", "2", "--train.device", "cpu"]
    assert main(words) == 0
    stage = open_stage(replace(config, model="pre"))
    assert same_weights(stage.model, load_run("pre")[0])
    train_stage(stage, quiet=True)
    assert open_model("run")[1].chat_template == stage.tokenizer.chat_template
    with pytest.raises(ValueError, match="was made by `skylar pretrain`"):
        open_stage(replace(config, out="pre", resume=True))


def test_by_hand_an_objective_and_batches_become_a_stage(config):
    model, tokenizer, _ = open_model(config.model, dtype=torch.float32)
    loader = ConversationLoader(sums(10), tokenizer, 2, 96)
    result = run_stage(config, SFTObjective(model), loader, quiet=True)
    assert result.finished and load_run("run")[2]["base"] == config.model


# --- resumed and refused ---


def test_a_stopped_stage_goes_on_as_if_nothing_had_happened(config, finished):
    shutil.copytree("run", "whole")
    shutil.rmtree("run/checkpoints/step-000006")
    Path("run/checkpoints/latest").write_text("step-000003\n")
    result = train_stage(open_stage(finished), quiet=True)
    assert result.finished and numbers(Path("run")) == numbers(Path("whole"))
    assert same_weights(open_model("run")[0], open_model("whole")[0])


def test_a_stage_is_made_longer(finished):
    longer = open_stage(replace(finished, extend_to=9))
    assert train_stage(longer, quiet=True).step == 9
    with pytest.raises(ValueError, match="a run is not made shorter"):
        open_stage(replace(finished, extend_to=3))


@pytest.mark.parametrize(("change", "word"), [
    ({"optimizer": OptimizerConfig(lr=1e-3)}, "optimizer.lr is 0.01"),
    ({"sft": SFTConfig(end_weight=2.0)}, "sft.end_weight is 1.0"),
    ({"loader": LoaderConfig(batch_size=2, seq_len=64)}, "loader.seq_len is 96"),
    ({"val_fraction": 0.2}, "val_fraction is 0.05"),
])
def test_other_settings_are_refused_by_name(finished, change, word):
    with pytest.raises(ValueError, match=word):
        open_stage(replace(finished, **change))


def test_other_data_and_other_stages_are_refused(home, finished):
    other = write_chats(Path("other.jsonl"), sums(30))
    with pytest.raises(ValueError, match="the saved loader has data"):
        train_stage(open_stage(replace(finished, data=str(other))), quiet=True)

    @dataclass(frozen=True, kw_only=True)
    class Other(SFTStage):
        stage: ClassVar[str] = "other"

    with pytest.raises(ValueError, match="was made by `skylar sft`"):
        open_stage(Other(**vars(finished)))
    with pytest.raises(ValueError, match="already holds a run"):
        open_stage(replace(finished, resume=False))


@pytest.mark.parametrize(("change", "word"), [
    ({"model": "nowhere/at/all"}, "nowhere/at/all"),
    ({"model": "s3://bucket/run"}, "must be a folder"),
    ({"data": "nowhere.jsonl"}, "no data at nowhere.jsonl"),
    ({"loader": LoaderConfig(batch_size=2, seq_len=4096)}, "does not fit the model's context"),
    ({"out": None}, "give --out"),
])
def test_mistakes_are_found_before_anything_is_written(config, change, word):
    with pytest.raises((ValueError, OSError), match=word):
        open_stage(replace(config, **change))
    assert not Path("run").exists()


def test_bad_rows_are_refused_or_skipped_aloud(config):
    rows = [json.dumps({"messages": c}) for c in sums(20)] + ['{"messages": []}', "{"]
    Path("mixed.jsonl").write_text("\n".join(rows))
    mixed = replace(config, data="mixed.jsonl")
    with pytest.raises(ValueError, match=r"2 of 22 rows cannot be used: mixed.jsonl:21"):
        open_stage(mixed)
    assert not Path("run").exists()
    with pytest.warns(UserWarning, match="2 of 22 rows cannot be used"):
        stage = open_stage(replace(mixed, bad_rows="skip"))
    assert len(stage.parts[1].examples) + len(stage.parts[2].examples) == 20


def test_a_base_without_the_marks_is_refused(config, tmp_path):
    from skylar.data.tokenizer import BPETokenizer
    from skylar.models.decoder import CausalLM
    from skylar.models.hub import save_pretrained
    from skylar.models.presets import get_config

    bpe = BPETokenizer.train(["the king"] * 9, vocab_size=262, special_tokens=("<eos>",))
    sizes = dict(d_model=16, d_head=4, d_ff=32, n_layers=1, max_seq_len=128)
    save_pretrained(CausalLM(get_config("test", vocab_size=bpe.vocab_size, **sizes)),
                    tmp_path / "plain", bpe)
    with pytest.raises(ValueError, match="no chat template"):
        open_stage(replace(config, model=str(tmp_path / "plain")))


def test_a_frozen_model_is_nobodys_parameter(home):
    frozen, tokenizer = open_frozen(home / "base")
    assert isinstance(frozen, Frozen) and not frozen.model.training
    assert not any(p.requires_grad for p in frozen.model.parameters())

    class Objective(SFTObjective):
        def __init__(self, model, reference):
            super().__init__(model)
            self.reference = reference

    model, _, _ = open_model(home / "base", dtype=torch.float32)
    objective = Objective(model, frozen)
    assert not any("reference" in name for name in objective.state_dict())
    assert frozen.on(torch.device("cpu")) is frozen.model


# --- the command ---


def words(home, out, *more) -> list[str]:
    return ["sft", "--model", str(home / "base"), "--data", str(home / "chats.jsonl"),
            "--out", str(out), "--loader.batch_size", "4", "--loader.seq_len", "96",
            "--train.steps", "6", "--train.save_every", "3", "--train.log_every", "1",
            "--train.eval_every", "3", "--train.dtype", "float32", "--train.device", "cpu",
            "--optimizer.lr", "1e-2", *more]


def test_the_command_and_what_it_says(home, tmp_path, capsys):
    assert main(words(home, tmp_path / "run")) == 0
    said = capsys.readouterr().out
    assert "40 conversations" not in said and "38 conversations" in said
    assert "val_loss" in said and "skylar generate --chat --model" in said
    assert main(["sft", "--config", str(tmp_path / "run/config.yaml"), "--resume",
                 "--extend_to", "8"]) == 0
    assert len(numbers(tmp_path / "run")) == 8


def test_settings_survive_print_config(home, tmp_path, capsys):
    assert main(words(home, tmp_path / "run", "--sft.end_weight", "2", "--print_config")) == 0
    first = capsys.readouterr().out
    (tmp_path / "x.yaml").write_text(first)
    assert main(["sft", "--config", str(tmp_path / "x.yaml"), "--print_config"]) == 0
    assert capsys.readouterr().out == first
    assert yaml.safe_load(first)["sft"]["end_weight"] == 2.0


def test_defaults_of_the_command_are_those_of_the_class():
    for module, name in STAGES.values():
        fields = stage_fields(module, name)
        assert "stage" not in fields and {"model", "data", "out"} <= fields.keys()
    made = SFTStage(model="m", data="d")
    for part, values in stage_defaults(*STAGES["sft"]).items():
        for field, value in values.items():
            assert getattr(getattr(made, part), field) == value
    assert StageConfig.FREE == SFTStage.FREE


@pytest.mark.parametrize(("flags", "word"), [
    (["--sft.end_weight", "0"], "end_weight=0"),
    (["--bad_rows", "drop"], "bad_rows"),
    (["--sft.pak", "true"], "did you mean --sft.pack?"),
    (["--val_fraction", "0.9"], "val_fraction=0.9"),
])
def test_mistakes_are_one_line(home, tmp_path, capsys, flags, word):
    assert main(words(home, tmp_path / "run", *flags)) == 2
    error = capsys.readouterr().err
    assert word in error and error.count("\n") == 1


def test_help_imports_no_torch():
    code = ("import sys; from skylar.cli import main; main(['sft', '--help']); "
            "sys.exit('torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "--sft.end_weight" in done.stdout


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_train_what_one_trains(home, tmp_path, strategy):
    flags = ["--parallel.strategy", strategy, "--sft.end_weight", "2"]
    check_two_ranks(words(home, "", *flags), tmp_path)
