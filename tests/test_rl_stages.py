"""The commands grpo and ppo: a run from a file of questions, resumed, refused, opened again."""

import json

import pytest
import torch
from chats import save_base

from skylar.cli import main
from skylar.posttrain.rollout import FileTask
from skylar.training.run import open_model

QUESTIONS = [{"prompt": f"What is {a}+1?", "answer": str(a + 1)} for a in range(8)]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    save_base(home / "base")
    (home / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    return home


def words(command, home, out, steps=4, **more):
    flags = {"model": home / "base", "data": home / "questions.jsonl", "out": out,
             "rollout.prompts": 2, "rollout.n": 2, "rollout.max_new_tokens": 5,
             "rollout.iterations": 2, "train.steps": steps, "train.save_every": 2,
             "train.log_every": 1, "train.device": "cpu", "train.dtype": "float32",
             "optimizer.lr": 1e-3} | more
    return [command, *(str(x) for k, v in flags.items() for x in (f"--{k}", v))]


def weights(run):
    return dict(open_model(str(run))[0].named_parameters())


@pytest.mark.parametrize("command", ["grpo", "ppo"])
def test_a_run_is_extended_and_opens_as_a_model(home, tmp_path, command, monkeypatch):
    # an untrained model is never right: with rewards of 0 nothing would move
    monkeypatch.setattr(FileTask, "score", lambda self, text, example: float(len(text) % 3))
    more = {"grpo.beta": 0.1} if command == "grpo" else {"ppo.kl_target": 1.0}
    constant = {"schedule.kind": "constant", "schedule.warmup_steps": 0} | more
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(words(command, home, whole, **constant)) == 0
    assert main(words(command, home, parts, steps=2, **constant)) == 0
    again = [command, "--config", str(parts / "config.yaml"), "--resume", "--extend_to", "4"]
    assert main(again) == 0
    ours, theirs, base = weights(parts), weights(whole), weights(home / "base")
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, atol=0, rtol=0)
    assert not any(base[name].equal(weight) for name, weight in theirs.items())


@pytest.mark.parametrize(("change", "message"), [
    ({"rollout.max_new_tokens": 100_000}, "context"), ({"grpo.loss": "grp"}, "grpo"),
    ({"train.save_every": 3}, "multiple"), ({"rollout.n": 1}, "two completions"),
    ({"data": "reasoning-gym:no_such_task"}, "no_such_task")])  # installed or not
def test_mistakes_are_one_line(home, tmp_path, capsys, change, message):
    assert main(words("grpo", home, tmp_path / "run", **change)) == 2
    assert message in capsys.readouterr().err


def test_a_bad_row_is_named_or_skipped(home, tmp_path, capsys):
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join([*map(json.dumps, QUESTIONS[:2]), '{"prompt": "x"}']))
    assert main(words("grpo", home, tmp_path / "run", data=path)) == 2
    assert "questions.jsonl:3" in capsys.readouterr().err
    assert main(words("grpo", home, tmp_path / "run", data=path, bad_rows="skip")) == 0
