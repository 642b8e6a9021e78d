"""What a run was made from is written down, and the same start gives the same bits."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import launch
from test_distributed import torchrun

from skylar.cli import main
from skylar.cli.commands import say_once
from skylar.training.checkpoint_files import find_checkpoint, load_metadata
from skylar.training.metrics import CLOCK_FIELDS, read_metrics
from skylar.training.record import git_commit
from skylar.training.run import load_run

TINY = ["--corpus.vocab_size", "270", "--model.n_layers", "1", "--model.d_model", "32",
        "--model.d_ff", "64", "--model.dropout", "0.1", "--loader.seq_len", "16",
        "--loader.batch_size", "8", "--train.log_every", "4", "--train.eval_every", "8",
        "--train.device", "cpu", "--optimizer.lr", "1e-3", "--train.steps", "12"]


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    words = ["the", "king", "queen", "of", "night", "and", "day", "who", "comes", "here"]
    texts = (" ".join(words[i * j % 10] for j in range(1, 60)) for i in range(120))
    Path("text.txt").write_text("\n\n".join(texts))
    return tmp_path


def flags(out, *more) -> list[str]:
    return ["pretrain", "--data", "data", "--corpus.source", "text.txt", "--out", str(out), *TINY,
            *more]


def weights(out) -> str:
    digest = hashlib.sha256()
    for name, p in sorted(load_run(out)[0].state_dict().items()):
        digest.update(name.encode() + p.numpy().tobytes())
    return digest.hexdigest()


def numbers(out) -> list[dict]:
    rows = read_metrics(Path(out, "metrics.jsonl"))
    return [{k: v for k, v in row.items() if k not in CLOCK_FIELDS} for row in rows]


# --- bit-equal ---


@pytest.mark.parametrize(("n", "more"), [
    (1, []), (2, ["--parallel.strategy", "ddp"]), (2, ["--parallel.strategy", "fsdp"])])
def test_the_same_seed_gives_the_same_bits(home, n, more):
    """In processes of their own, so that nothing is left from the first run."""
    for out in ("one", "two"):
        launch(n, "-m", "skylar", *flags(out, *more))
    assert weights("one") == weights("two")
    assert numbers("one") == numbers("two") and len(numbers("one")) == 3


def test_another_seed_gives_other_bits(home):
    """Else the test above could not fail."""
    for seed in ("1", "2"):
        assert main(flags(f"seed{seed}", "--train.seed", seed)) == 0
    assert weights("seed1") != weights("seed2")


# --- text samples ---


def test_samples_do_not_change_the_run(home, capsys):
    assert main(flags("plain")) == 0
    assert main(flags("sampled", "--sample.every", "4", "--sample.prompt", "the king")) == 0
    assert "step      4  sample: the king" in capsys.readouterr().out
    assert numbers("plain") == numbers("sampled") and weights("plain") == weights("sampled")
    rows = read_metrics("sampled/samples.jsonl")
    assert [row["step"] for row in rows] == [4, 8, 12]
    # a run that goes on has the samples of one that was never stopped
    more = ["--sample.every", "4", "--sample.prompt", "the king", "--resume", "--extend_to", "20"]
    assert main(flags("sampled", *more)) == 0
    assert [row["step"] for row in read_metrics("sampled/samples.jsonl")] == [4, 8, 12, 16, 20]
    assert read_metrics("sampled/samples.jsonl")[:3] == rows


def test_a_sample_cannot_speak_to_the_terminal(home):
    from types import SimpleNamespace

    from skylar.cli.samples import TextSamples
    from skylar.training.run import SampleConfig

    said = []
    samples = TextSamples(SampleConfig(every=1), None, Path("samples.jsonl"), said.append)
    samples.attach(SimpleNamespace(metrics=SimpleNamespace(rows=[{"step": 1}])))
    samples.text = lambda: " \x1b[2J king\x04\n"
    samples({"step": 1})
    assert said[0].isprintable() and "king" in said[0]
    assert read_metrics("samples.jsonl")[0]["text"] == " \x1b[2J king\x04\n"  # as it was


def test_samples_of_a_sharded_model_are_refused_before_any_work(home):
    failed = torchrun(2, "-m", "skylar", *flags("run", "--sample.every", "4"), check=False)
    assert failed.stderr.count("skylar: error: sample.every=4 needs the whole model") == 1
    assert not Path("run").exists() and not Path("data").exists()


# --- the record ---


def test_every_start_and_every_checkpoint_says_what_it_was_made_from(home):
    for words in ("init -q", "-c user.name=a -c user.email=a@b commit -q --allow-empty -m x"):
        subprocess.run(["git", *words.split()], check=True)
    commit = git_commit()["commit"]
    assert main(flags("run", "--train.seed", "7")) == 0
    assert main(flags("run", "--train.seed", "7", "--resume", "--extend_to", "16")) == 0
    starts = [json.loads(line) for line in Path("run/starts.jsonl").read_text().splitlines()]
    assert len(starts) == 2
    kept = load_metadata(find_checkpoint("run"))["record"]
    for record in (*starts, kept):
        assert record["git"] == {"commit": commit, "changed": False}
        assert record["seed"] == 7 and record["ranks"] == 1 and record["device"] == "cpu"
        assert record["versions"]["python"] == sys.version.split()[0]
        assert {"torch", "numpy", "tokenizers", "skylar"} <= record["versions"].keys()
        assert record["data"]["train"] == load_metadata(find_checkpoint("run"))["data_fingerprint"]
    assert {k: v for k, v in starts[-1].items() if k != "time"} == kept


# --- several processes report as one ---


def test_one_error_line_and_no_warning_of_ddp(home):
    done = torchrun(2, "-m", "skylar", *flags("run", "--parallel.strategy", "ddp"))
    assert "find_unused" not in done.stderr
    failed = torchrun(2, "-m", "skylar", *flags("other", "--loader.batch_size", "7"), check=False)
    assert failed.stderr.count("skylar: error:") == 1
    again = torchrun(2, "-m", "skylar", *flags("run"), check=False)
    assert again.stderr.count("skylar: error: run already holds a run") == 1
    assert again.stderr.count("skylar: error:") == 1


def test_the_same_line_is_said_by_the_first_process_only(tmp_path, monkeypatch, capsys):
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / str(rank) / "error.json"))
        say_once("same")
        say_once(f"rank {rank}")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/nowhere/at/all")
    say_once("same")
    assert capsys.readouterr().err == "same\nrank 0\nrank 1\nsame\n"


# --- the range test ---


def test_lr_range_writes_its_result_and_nothing_else(home, capsys):
    settings = [w for w in flags("unused") if w != "pretrain"]
    settings[settings.index("unused")] = "run"
    assert main(["lr-range", *settings, "--steps", "30", "--min_lr", "1e-5"]) == 0
    assert sorted(p.name for p in Path("run").iterdir()) == ["lr_range.json", "lr_range.png"]
    found = json.loads(Path("run/lr_range.json").read_text())
    rates = found["lr"]
    assert rates[0] == pytest.approx(1e-5) and len(rates) == len(found["loss"])
    assert all(b / a == pytest.approx((1 / 1e-5) ** (1 / 29)) for a, b in zip(rates, rates[1:]))
    assert found["lowest_loss_at"] in rates
    assert f"--optimizer.lr {found['suggested_lr']:.2g}" in capsys.readouterr().out
    assert main(flags("run")) == 0  # the folder is still free for the run
    assert main(["lr-range", "--config", "run/config.yaml", "--steps", "12"]) == 0
    assert main(["lr-range", *settings, "--max_lr", "1e-7"]) == 2
    assert "give 0 < min_lr < max_lr" in capsys.readouterr().err
