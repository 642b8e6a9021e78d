"""Run folders: started once, killed at any point, moved, extended, opened by whoever finds them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from skylar.cli import main
from skylar.data.tokenizer import BPETokenizer
from skylar.models.decoder import CausalLM
from skylar.models.hub import save_pretrained
from skylar.models.presets import get_config
from skylar.training import run as runs
from skylar.training.metrics import read_metrics
from skylar.training.muon import OptimizerConfig
from skylar.training.run import (
    LOCK,
    LoaderConfig,
    RunConfig,
    TrainConfig,
    build_config,
    check_space,
    evaluate_run,
    is_finished,
    load_run,
    open_model,
    prepare_data,
    prepare_run,
    save_run,
    train,
)
from skylar.utils.files import directory_lock


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two data folders of different text, of equal size."""
    home = tmp_path_factory.mktemp("home")
    words = "the king said that a summer day is long and love is short".split()
    for name, step in (("data", 3), ("other", 5)):
        (home / f"{name}.texts").mkdir()
        for i in range(24):
            text = " ".join(words[(i + step * j) % len(words)] for j in range(120))
            (home / f"{name}.texts" / f"{i:02}.txt").write_text(text + "\n")
        tokenizer = str(home / "data/tokenizer") if name == "other" else None
        prepare_data(str(home / f"{name}.texts"), out=str(home / name), vocab_size=300,
                     tokenizer=tokenizer)
    return home


@pytest.fixture
def config(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return RunConfig(
        data=str(home / "data"), out="run", loader=LoaderConfig(batch_size=2, seq_len=32),
        model={"d_model": 16, "d_head": 4, "d_ff": 32, "n_layers": 1, "max_seq_len": 64},
        optimizer=OptimizerConfig(lr=1e-2),
        train=TrainConfig(steps=6, log_every=1, eval_every=3, eval_batches=2, save_every=2,
                          device="cpu", dtype="float32"))


@pytest.fixture
def finished(config):
    train(prepare_run(config))
    return replace(config, resume=True)


def losses(folder) -> list[float]:
    return [row["loss"] for row in read_metrics(Path(folder, "metrics.jsonl"))]


def stop_at(step):
    """A callback that stops the run as Ctrl-C does."""
    import signal

    def callback(row):
        if row["step"] == step:
            signal.raise_signal(signal.SIGINT)
    return callback


# --- starting ---


class Killed(BaseException):
    """SIGKILL, as far as files are concerned: nothing after it runs, locks are freed."""


@pytest.mark.parametrize(
    "point", ["atomic_write", "save_tokenizer", "NextTokenObjective", "Trainer"])
@pytest.mark.parametrize("resume", [True, False])
def test_killed_while_starting_the_same_folder_can_be_used(config, monkeypatch, point, resume):
    def killed(*args, **kwargs):
        if point == "save_tokenizer":
            (Path(args[0]) / "tokenizer.part").mkdir()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(runs, point, killed)
        with pytest.raises(Killed):
            train(prepare_run(config))
    assert Path("run").exists()
    result = train(prepare_run(replace(config, resume=resume)))
    assert result.finished and load_run("run")[2]["steps"] == 6


def test_killed_before_the_first_checkpoint_starts_again_with_resume(config, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(runs.Trainer, "train", lambda *args, **kw: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            train(prepare_run(config))
    with pytest.raises(ValueError, match="start it with --resume"):
        prepare_run(config)
    assert train(prepare_run(replace(config, resume=True))).finished


def test_a_start_after_a_killed_one_may_use_other_data(home, config, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(runs, "atomic_write", lambda *args: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            train(prepare_run(config))
    prepare_data(str(home / "data.texts"), out="small", vocab_size=290)
    train(prepare_run(replace(config, data="small")))
    assert load_run("run")[1].vocab_size == 290


def test_resume_where_nothing_was_started_starts(config):
    assert train(prepare_run(replace(config, resume=True))).finished


def test_a_folder_with_other_things_is_left_alone(config):
    Path("run/tokenizer").mkdir(parents=True)
    Path("run/tokenizer/mine.json").write_text("{}")
    for resume in (True, False):
        with pytest.raises(ValueError, match="not empty"):
            prepare_run(replace(config, resume=resume))
    assert Path("run/tokenizer/mine.json").exists()


def test_a_second_run_into_a_folder_in_use_is_refused(config):
    run = prepare_run(config)
    with directory_lock("run", LOCK):
        with pytest.raises(ValueError, match="a run is going on there"):
            train(run)
    assert not Path("run/metrics.jsonl").exists()
    train(run)
    with pytest.raises(ValueError, match="already holds a run"):
        train(run)  # prepared before the other one came and went
    assert len(losses("run")) == 6


# --- resuming ---


def test_resumed_equals_straight(config):
    train(prepare_run(replace(config, out="straight")))
    stopped = train(prepare_run(config), callbacks=(stop_at(3),))
    assert stopped.signal and not stopped.finished and not is_finished("run")
    assert train(prepare_run(replace(config, resume=True))).finished
    assert losses("run") == losses("straight") and is_finished("run")


def test_a_run_and_its_data_that_were_moved(home, config):
    train(prepare_run(config), callbacks=(stop_at(3),))
    Path("elsewhere").mkdir()
    Path("run").rename("elsewhere/renamed")
    shutil.copytree(home / "data", "copy")
    words = ["pretrain", "--config", "elsewhere/renamed/config.yaml", "--data", "copy"]
    assert main([*words, "--resume"]) == 0
    assert is_finished("elsewhere/renamed") and not Path("run").exists()


def test_other_data_of_the_same_size_is_refused(home, config):
    train(prepare_run(config), callbacks=(stop_at(3),))
    with pytest.raises(ValueError, match="does not hold the data"):
        prepare_run(replace(config, data=str(home / "other"), resume=True))


CHANGES = {
    "optimizer.lr": {"optimizer": {"lr": 0.5}}, "train.steps": {"train": {"steps": 9}},
    "train.grad_accum_steps": {"train": {"grad_accum_steps": 2}},
    "train.dtype": {"train": {"dtype": "bfloat16"}}, "train.seed": {"train": {"seed": 1}},
    "model.dropout": {"model": {"dropout": 0.1}}, "preset": {"preset": "small"},
    "train.minutes": {"train": {"minutes": 5.0}},
    "loader.batch_size": {"loader": {"batch_size": 4}},
    "schedule.kind": {"schedule": {"kind": "wsd"}}, "family": {"family": "llama3"},
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_edited_config_is_refused_by_name(finished, name, capsys):
    path = Path("run/config.yaml")
    content = yaml.safe_load(path.read_text())
    for key, value in CHANGES[name].items():
        content[key] = {**content[key], **value} if isinstance(value, dict) else value
    path.write_text(yaml.safe_dump(content))
    assert main(["pretrain", "--config", str(path), "--resume"]) == 2
    assert f"error: {name} is" in capsys.readouterr().err


def test_what_holds_for_one_session_may_change(finished):
    changed = replace(finished, train=replace(finished.train, device="auto"),
                      loader=replace(finished.loader, prefetch=0))
    assert train(prepare_run(changed)).finished


def test_extending_a_run(finished, capsys):
    first = losses("run")
    words = ["pretrain", "--config", "run/config.yaml", "--resume", "--extend_to", "10"]
    assert main(words) == 0
    assert losses("run")[:6] == first and len(losses("run")) == 10
    assert main(words) == 0  # a job that is queued again asks for the same
    assert main(words[:-2]) == 0  # config.yaml knows the new number
    assert len(losses("run")) == 10 and is_finished("run")
    assert main([*words[:-1], "8"]) == 2
    assert "extend_to=8" in capsys.readouterr().err


def test_space_counts_the_checkpoints_that_are_there_once(config, monkeypatch):
    usage = shutil.disk_usage(".")
    free = 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
    out, size = Path("run"), 1000
    with pytest.raises(ValueError, match="MB free"):
        check_space(out, size, config.train)
    free = 3 * size  # two are kept, and a new one is written before the oldest goes
    check_space(out, size, config.train)
    for step in (2, 4):
        (out / f"checkpoints/step-{step:06}").mkdir(parents=True)
        (out / f"checkpoints/step-{step:06}/data").write_bytes(bytes(size))
    free = size
    check_space(out, size, config.train)
    free = size - 1
    with pytest.raises(ValueError, match="MB free"):
        check_space(out, size, config.train)


# --- opening ---


def test_every_way_to_name_a_run(finished):
    step = "run/checkpoints/step-000006"
    models = [open_model(where)[0] for where in ("run", "run/checkpoints", step)]
    assert all(torch.equal(models[0].lm_head.weight, m.lm_head.weight) for m in models)
    shutil.copytree(step, "lone")
    with pytest.raises(FileNotFoundError, match="tokenizer"):
        open_model("lone")
    shutil.copytree("run/tokenizer", "lone/tokenizer")
    assert torch.equal(open_model("lone")[0].lm_head.weight, models[0].lm_head.weight)


def test_what_the_python_api_leaves(home, config):
    from skylar.training.loss import NextTokenObjective
    from skylar.training.trainer import Trainer

    tokenizer, datasets = runs.open_data(home / "data")
    model = CausalLM(get_config("test", vocab_size=tokenizer.vocab_size, **config.model))
    loader = runs.PackedLoader(datasets["train"], batch_size=2, seq_len=32)
    metadata = save_run("python", model, tokenizer, data=home / "data", loader=loader)
    Trainer(NextTokenObjective(model), loader, TrainConfig(steps=2, device="cpu"),
            out_dir="python", metadata=metadata, quiet=True).train()
    opened, bpe, _ = load_run("python")
    assert torch.equal(opened.lm_head.weight, model.lm_head.weight)
    assert bpe.fingerprint == tokenizer.fingerprint
    assert evaluate_run("python")["val_loss"] > 0
    assert main(["export", "--model", "python", "--out", "exported"]) == 0
    assert main(["generate", "--model", "python", "--prompt", "the", "--max_new_tokens", "2"]) == 0
    with pytest.raises(ValueError, match="another tokenizer"):
        save_run("python", model, BPETokenizer.train(["up and down"] * 9, vocab_size=270))


def test_an_answer_ends_with_the_token_of_the_template(tmp_path):
    """Many generation_config.json list only <eos>, which the template never writes."""
    from skylar.models.hub import save_pretrained

    bpe = BPETokenizer.train(["up and down " * 30] * 4, vocab_size=275)
    small = {"d_model": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "d_head": 8, "d_ff": 16}
    model = CausalLM(get_config("test", vocab_size=bpe.vocab_size, max_seq_len=64, **small))
    folder = save_pretrained(model, tmp_path / "model", bpe)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": bpe.eos_id}))
    _, tokenizer, eos_ids = open_model(folder)
    assert set(eos_ids) == {bpe.eos_id, *tokenizer.encode("<|im_end|>", allowed_special=True)}


def test_settings_by_name_become_the_config_and_back(config):
    plain = json.loads(json.dumps(runs.stored(config)))
    assert build_config(RunConfig, {**plain, "out": "run"}) == replace(
        config, optimizer=replace(config.optimizer, betas=[0.9, 0.95]),
        monitor=replace(config.monitor, trackers=[]))
    assert runs.stored(build_config(RunConfig, plain)) == plain


# --- starting from a trained model ---


@pytest.mark.parametrize("exported", [False, True], ids=["a run", "Hugging Face"])
def test_init_starts_from_trained_weights(config, exported):
    train(prepare_run(config))
    trained, tokenizer, _ = load_run("run")
    where = "run"
    if exported:
        save_pretrained(trained, "exported", tokenizer)
        where = "exported"
    later = replace(config, out="later", init=where, model={},
                    optimizer=replace(config.optimizer, lr=1e-12))
    train(prepare_run(later))
    for ours, theirs in zip(load_run("later")[0].parameters(), trained.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    resumed = train(prepare_run(replace(later, resume=True, extend_to=8)))
    assert resumed.finished and resumed.step == 8


def test_init_brings_its_own_sizes(config):
    with pytest.raises(ValueError, match="init='run' brings its own sizes; leave model"):
        prepare_run(replace(config, init="run", model={"n_layers": 3}))
