"""`skylar posttrain`: a file of stages, checked before the first one, resumed, on two ranks."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from chats import save_base
from ranks import launch

from skylar.cli import main
from skylar.cli.posttrain import read_recipe
from skylar.cli.stages import MAKERS
from skylar.data.pairs import read_pairs
from skylar.training.run import open_model

ROOT = Path(__file__).parents[1]
TRAIN = {"steps": 4, "log_every": 1, "eval_every": 0, "save_every": 2, "device": "cpu",
         "dtype": "float32"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    save_base(home / "base")
    rows = [{"prompt": f"{i}?", "answer": "12"[i % 2]} for i in range(40)]
    (home / "tasks.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return home


def recipe(home, out="run") -> dict:
    """From a tiny base by way of its own answers; it learns by heart what it answers at all."""
    train = TRAIN | {"steps": 30, "save_every": 15}
    return {"out": str(out), "model": str(home / "base"), "stages": [
        {"stage": "sft", "data": str(home / "tasks.jsonl"), "train": train,
         "loader": {"batch_size": 4, "seq_len": 64}, "optimizer": {"lr": 1e-2}},
        {"stage": "pairs", "data": str(home / "tasks.jsonl"), "max_prompts": 16,
         "device": "cpu", "rollout": {"n": 4, "prompts": 8, "max_new_tokens": 4}},
        {"stage": "preference", "data": "pairs", "train": TRAIN,
         "loader": {"batch_size": 2, "seq_len": 64}, "optimizer": {"lr": 1e-3}}]}


def write(settings: dict) -> list[str]:
    Path("recipe.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    return ["posttrain", "--config", "recipe.yaml"]


@pytest.fixture(scope="module")
def whole(home, tmp_path_factory):
    """A recipe that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(write(recipe(home))) == 0
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def weights(run) -> list:
    return list(open_model(run)[0].state_dict().values())


def same(a, b) -> bool:
    return all(map(torch.equal, weights(a), weights(b)))


# --- from base to chat ---


def test_each_stage_goes_on_from_the_one_before(home, whole, capsys):
    run = whole / "run"
    assert not same(run / "sft", home / "base") and not same(run / "preference", run / "sft")
    settings = yaml.safe_load((run / "preference/config.yaml").read_text())
    assert (settings["model"], settings["data"]) == ("run/sft", "run/pairs")
    pairs = list(read_pairs(run / "pairs"))
    counts = yaml.safe_load((run / "pairs/counts.yaml").read_text())
    assert counts["pairs"] == len(pairs) >= 4 and counts["answers"] == 64
    assert {p.margin for p in pairs} == {1.0} and {p.chosen for p in pairs} <= {"1", "2"}
    assert main(["generate", "--model", str(run / "preference"), "--chat", "--prompt", "3?",
                 "--max_new_tokens", "4", "--device", "cpu"]) == 0


def test_what_is_finished_is_not_done_again(home, whole, here, capsys):
    shutil.copytree(whole / "run", "run")
    before = {p: p.stat().st_mtime_ns for p in Path("run").rglob("*") if p.is_file()}
    assert main(write(recipe(home))) == 0
    assert capsys.readouterr().out.count("is done") == 3
    assert before == {p: p.stat().st_mtime_ns for p in Path("run").rglob("*") if p.is_file()}


@pytest.mark.parametrize("stage", ["sft", "preference"])
def test_a_stopped_recipe_goes_on_as_if_nothing_had_happened(home, whole, here, stage):
    shutil.copytree(whole / "run", "run")
    for name in ("preference",) if stage == "preference" else ("pairs", "preference"):
        if name != stage:
            shutil.rmtree(Path("run") / name)
    steps = sorted(Path("run", stage, "checkpoints").glob("step-*"))
    shutil.rmtree(steps[-1])
    Path("run", stage, "checkpoints/latest").write_text(steps[-2].name + "\n")
    assert main(write(recipe(home))) == 0
    assert Path("run/pairs/pairs.jsonl").read_text() == (
        whole / "run/pairs/pairs.jsonl").read_text()
    assert same("run/preference", whole / "run/preference")


def test_a_signal_saves_and_stops(home, here, monkeypatch, capsys):
    from skylar.posttrain import stages

    train_stage, seen = stages.train_stage, []

    def stopped(stage):
        def interrupt(row):
            seen.append(stage.config.stage)
            if row["step"] == 3:
                os.kill(os.getpid(), signal.SIGINT)

        return train_stage(stage, (interrupt,), quiet=True)

    monkeypatch.setattr(stages, "train_stage", stopped)
    assert main(write(recipe(home))) == 130
    assert set(seen) == {"sft"} and "the same command goes on" in capsys.readouterr().err
    assert Path("run/sft/checkpoints/latest").read_text() == "step-000003\n"
    assert not Path("run/pairs").exists()


# --- checked before the first stage ---


def changed(number: int, **settings):
    def change(found):
        found["stages"][number] |= settings
    return change


@pytest.mark.parametrize(("change", "words"), [
    (changed(2, stage="preferense"), ["stage 3", "did you mean preference?"]),
    (changed(2, preference={"bta": 1}), ["stage 3 (preference)", "bta"]),
    (changed(2, preference={"beta": 0}), ["stage 3 (preference)", "beta=0"]),
    (changed(2, loader={"batch_size": "two"}), ["stage 3 (preference)", "batch_size"]),
    (changed(2, data="nowhere.jsonl"), ["stage 3 (preference)", "no data at nowhere.jsonl"]),
    (changed(2, out="sft"), ["stage 3 (preference)", "out='sft'"]),
    (changed(2, data="pairs/other.jsonl"), ["stage 3 (preference)", "give run/pairs/pairs"]),
    (changed(2, data="sft"), ["stage 3 (preference)", "it is for model"]),
    (changed(2, out="../elsewhere"), ["stage 3 (preference)", "elsewhere"]),
    (changed(2, out=".."), ["stage 3 (preference)", "out='..'"]),
    (changed(2, resume=False), ["stage 3 (preference)", "resume"]),
    (changed(2, train={"device": "tpu"}), ["stage 3 (preference)", "train.device='tpu'"]),
    (changed(1, rollout={"n": 1}), ["stage 2 (pairs)", "n=1"]),
    (changed(1, device="tpu"), ["stage 2 (pairs)", "device='tpu'"]),
    (changed(0, data="nowhere.jsonl"), ["stage 1 (sft)", "no data at nowhere.jsonl"]),
])
def test_a_mistake_in_any_stage_is_one_line_before_the_first(home, here, capsys, change, words):
    settings = recipe(home)
    change(settings)
    assert main(write(settings)) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words) and error.count("\n") == 1
    assert not Path("run").exists()


def test_other_settings_and_folders_of_an_earlier_run_are_refused(home, whole, here, capsys):
    shutil.copytree(whole / "run", "run")
    settings = recipe(home)
    settings["stages"][1]["max_prompts"] = 8
    assert main(write(settings)) == 2
    assert "max_prompts is 16" in capsys.readouterr().err
    shutil.rmtree("run/sft")
    assert main(write(recipe(home))) == 2
    assert "run/pairs is of an earlier run" in capsys.readouterr().err


# --- data ---


def test_tasks_of_own_articles(here, capsys):
    texts = [f"Thing {i} is of {1900 + i}." if i % 2 else f"Thing {i} is." for i in range(60)]
    rows = [{"title": f"Thing {i}", "topic": "ABC"[i % 3], "extract": text}
            for i, text in enumerate(texts)]
    Path("articles.json").write_text(json.dumps(rows))
    words = ["tasks", "--out", "tasks", "--articles", "articles.json", "--each", "5"]
    assert main(words) == 0 and "train answer" in capsys.readouterr().out
    train, held_out = ([json.loads(line) for line in Path("tasks", name).open()]
                       for name in ("train.jsonl", "held_out.jsonl"))
    assert len(train) == 20 and {r["kind"] for r in train} == {
        "answer", "refuse", "extract", "classify"}
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in held_out}
    assert main(words) == 0 and "is made already" in capsys.readouterr().out
    assert main([*words, "--seed", "1"]) == 2 and "seed is 0" in capsys.readouterr().err


def test_own_articles_of_one_topic_and_files_of_something_else(here, capsys):
    Path("bad.json").write_text("{")
    Path("few.json").write_text('[{"title": "A", "extract": "A is.", "topic": "B"}]')
    words = ["tasks", "--out", "tasks", "--articles"]
    assert main([*words, "bad.json"]) == 2 and "bad.json is no JSON" in capsys.readouterr().err
    assert main([*words, "nowhere.json"]) == 2 and "nowhere" in capsys.readouterr().err
    assert not Path("tasks").exists()
    assert main([*words, "few.json"]) == 0  # no other topic to choose from
    kinds = [json.loads(line)["kind"] for line in Path("tasks/train.jsonl").open()]
    assert sorted(kinds) == ["classify", "refuse"]


def test_pairs_that_cannot_be(home, here, capsys):
    words = ["pairs", "--model", str(home / "base"), "--data", str(home / "tasks.jsonl"),
             "--max_prompts", "2", "--rollout.max_new_tokens", "2", "--device", "cpu"]
    assert main([*words, "--out", "pairs"]) == 2
    assert "no prompt of" in capsys.readouterr().err and not Path("pairs").exists()


def test_the_recipe_of_configs_is_one(here):
    settings = yaml.safe_load((ROOT / "configs/chat.yaml").read_text())
    configs = read_recipe(settings["stages"], settings["out"], settings.get("model"))
    assert [c.stage for c in configs] == ["tasks", "sft", "pairs", "preference"]
    assert configs[1].model == "smollm2" and configs[3].model == configs[1].out
    assert set(MAKERS) == {"tasks", "pairs"}


def test_two_ranks_train_what_one_trains(home, whole, here):
    launch(2, "-m", "skylar", *write(recipe(home)))
    assert Path("run/pairs/pairs.jsonl").exists()
    for name in ("sft", "preference"):
        for a, b in zip(weights(f"run/{name}"), weights(whole / "run" / name)):
            assert (a - b).abs().mean() < 2e-3  # AdamW moves what has no gradient by its sign
