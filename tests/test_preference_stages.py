"""`skylar preference` and `skylar reward`: data in, a folder out that the next stage opens."""

import json
from dataclasses import replace

import pytest
import torch
from ranks import launch
from test_distributed import numbers

from skylar.cli import main
from skylar.models.hub import save_pretrained
from skylar.posttrain.preference import PreferenceConfig
from skylar.posttrain.preference_stages import PreferenceStage, RewardStage
from skylar.posttrain.reward import RewardConfig
from skylar.posttrain.reward_files import load_reward_model, save_reward_model
from skylar.posttrain.stages import open_stage, train_stage
from skylar.training.checkpoint import find_checkpoint
from skylar.training.run import LoaderConfig, open_model
from skylar.training.trainer import TrainConfig
from skylar.utils.lesson import asset

ROWS = [{"prompt": [{"role": "user", "content": f"Who is number {n}?"}],
         "chosen": f"Number {n} is the king.", "rejected": f"Mubner {n} si hte ikng."}
        for n in range(16)]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


def settings(data, out, **more):
    return dict(
        model=str(asset("shakespeare")), data=str(data), out=str(out), val_fraction=0.25,
        loader=LoaderConfig(batch_size=4, seq_len=96),
        train=TrainConfig(steps=4, log_every=1, save_every=2, eval_every=0, device="cpu",
                          dtype="float32")) | more


def run(config, **options):
    return train_stage(open_stage(config), quiet=True, **options)


def last(result):
    return {k: v for k, v in result.rows[-1].items() if k.startswith("val_")}


@pytest.mark.parametrize("loss", ["dpo", "ipo", "simpo", "orpo", "kto"])
def test_every_loss_trains_and_its_folder_is_a_model(data, tmp_path, loss):
    config = PreferenceStage(**settings(data, tmp_path / "run"),
                             preference=PreferenceConfig(loss=loss))
    result = run(config)
    assert result.finished and torch.tensor(last(result)["val_loss"]).isfinite()
    model, tokenizer, _ = open_model(tmp_path / "run")
    assert tokenizer.chat([{"role": "user", "content": "Ciao"}])
    assert not any("reference" in p.name for p in find_checkpoint(tmp_path / "run").rglob("*"))


def test_stored_and_live_references_train_alike(data, tmp_path):
    found = [last(run(PreferenceStage(**settings(data, tmp_path / str(on)), precompute=on)))
             for on in (True, False)]
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        assert value == pytest.approx(found[1][key], rel=1e-3, abs=1e-4), key


def test_stopped_and_resumed_is_as_if_nothing_had_happened(data, tmp_path):
    whole = PreferenceStage(**settings(data, tmp_path / "whole"))
    run(whole)
    parts = replace(whole, out=str(tmp_path / "parts"))
    run(parts, callbacks=(lambda row: row["step"] == 2,))
    run(replace(parts, resume=True))
    one, two = (open_model(tmp_path / name)[0] for name in ("whole", "parts"))
    assert all(map(torch.equal, one.parameters(), two.parameters()))


def test_bad_rows_are_refused_or_skipped_and_named(data, tmp_path):
    equal = {"prompt": "Hi", "chosen": "a", "rejected": "a"}
    long = {"prompt": "Hi", "chosen": "a " * 400, "rejected": "b"}
    with data.open("a") as file:
        file.write("\n" + "\n".join(map(json.dumps, (equal, long))))
    config = PreferenceStage(**settings(data, tmp_path / "run"))
    with pytest.raises(ValueError, match=r"pairs\.jsonl:17: chosen and rejected are equal"):
        open_stage(config)
    with pytest.warns(UserWarning, match=r"2 of 18 rows cannot be used.*are left out"):
        stage = open_stage(replace(config, bad_rows="skip"))
    assert sum(len(loader.rows) for loader in stage.parts[1:]) == 16
    assert not (tmp_path / "run").exists()


def test_too_few_pairs_are_refused(data, tmp_path):
    data.write_text("\n".join(map(json.dumps, ROWS[:3])))
    with pytest.raises(ValueError, match="3 usable pairs"):
        open_stage(PreferenceStage(**settings(data, tmp_path / "run")))


def test_a_reference_with_another_tokenizer_is_refused(data, tmp_path, tiny_model):
    from skylar.data.tokenizer import BPETokenizer

    bpe = BPETokenizer.train(["another tokenizer "] * 20, vocab_size=275)
    save_pretrained(tiny_model(vocab_size=bpe.vocab_size), tmp_path / "other", bpe)
    config = PreferenceStage(**settings(data, tmp_path / "run"), reference=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="another tokenizer"):
        open_stage(config)


def test_a_reward_model_from_a_preference_run_to_a_folder_of_hugging_face(data, tmp_path):
    run(PreferenceStage(**settings(data, tmp_path / "dpo")))
    config = RewardStage(**settings(data, tmp_path / "reward", model=str(tmp_path / "dpo")),
                         reward=RewardConfig(centering=0.01))
    result = run(config)
    assert "val_accuracy" in last(result)
    model = load_reward_model(tmp_path / "reward")
    _, tokenizer, _ = open_model(tmp_path / "dpo")
    again = load_reward_model(save_reward_model(model, tmp_path / "hf", tokenizer))
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    with pytest.raises(ValueError, match="not of `skylar reward`"):
        load_reward_model(tmp_path / "dpo")


def test_the_score_head_depends_on_the_seed_alone(data, tmp_path):
    heads = []
    for n in range(2):
        torch.manual_seed(n)
        stage = open_stage(RewardStage(**settings(data, tmp_path / "run")))
        heads.append(stage.parts[0].model.score.weight)
    assert torch.equal(*heads)


def test_a_reward_run_is_no_language_model(data, tmp_path, capsys):
    run(RewardStage(**settings(data, tmp_path / "reward")))
    _, tokenizer, _ = open_model(asset("shakespeare"))
    folder = save_reward_model(load_reward_model(tmp_path / "reward"), tmp_path / "hf", tokenizer)
    for command in (["generate", "--prompt", "Hi"], ["eval"], ["export", "--out", "there"]):
        assert main([*command, "--model", str(tmp_path / "reward")]) != 0
        said = capsys.readouterr().err
        assert "holds a reward model" in said and len(said.strip().splitlines()) == 1
    with pytest.raises(ValueError, match=r"score\.weight|lm_head\.weight"):
        open_model(folder)
    with pytest.raises(ValueError, match="holds a reward model"):
        open_stage(PreferenceStage(**settings(data, tmp_path / "run"),
                                   reference=str(tmp_path / "reward")))


def test_the_commands_end_with_what_comes_next(data, tmp_path, capsys):
    common = ["--model", str(asset("shakespeare")), "--data", str(data), "--loader.seq_len", "96",
              "--loader.batch_size", "4", "--train.steps", "2", "--train.device", "cpu"]
    for command, wanted in (("preference", "skylar generate --chat"), ("reward", "skylar ppo")):
        assert main([command, *common, "--out", str(tmp_path / command)]) == 0
        said = capsys.readouterr().out.splitlines()[-1]
        assert said.startswith(f"now try: {wanted}") and str(tmp_path / command) in said


@pytest.mark.parametrize(("command", "flags"), [
    ("preference", ["--preference.loss", "kto"]), ("reward", ["--parallel.strategy", "fsdp"])])
def test_two_ranks_train_what_one_trains(data, tmp_path, command, flags):
    for n, name in ((1, "alone"), (2, "two")):
        launch(n, "-m", "skylar", command, "--model", asset("shakespeare"), "--data", data,
               "--out", tmp_path / name, "--loader.seq_len", "96", "--loader.batch_size", "4",
               "--val_fraction", "0.25", "--train.steps", "4", "--train.log_every", "1",
               "--train.eval_every", "2", "--train.dtype", "float32", "--train.device", "cpu",
               "--optimizer.lr", "1e-3", *flags)
    alone, two = ([{k: -1.0 if v is None else v for k, v in row.items()}  # no desirable answer
                   for row in numbers(tmp_path / name)] for name in ("alone", "two"))
    assert two == [pytest.approx(row, abs=5e-4, rel=1e-3) for row in alone]
