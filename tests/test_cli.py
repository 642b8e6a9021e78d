"""The command line from outside: what it writes, prints, and answers to every mistake."""

import errno
import functools
import io
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from skylar.cli import commands, main
from skylar.cli.commands import COMMANDS, DEMO, command_parser
from skylar.cli.flags import UsageError
from skylar.cli.stages import CONFIGS
from skylar.data.sources import SOURCES
from skylar.models.presets import PRESETS, get_config
from skylar.training import run as runs
from skylar.training.metrics import read_metrics

ROOT = Path(__file__).parents[1]
SKYLAR = [sys.executable, "-m", "skylar"]
SMALL = """--model.d_model 16 --model.d_head 4 --model.d_ff 32 --model.n_layers 1
    --loader.batch_size 2 --loader.seq_len 32 --train.log_every 2 --train.eval_batches 2
    --train.device cpu --train.dtype float32 --optimizer.lr 1e-2 --preset test""".split()


def write_texts(folder: Path, n: int = 24) -> Path:
    folder.mkdir()
    words = "the king said that a summer day is long and love is short".split()
    for i in range(n):
        text = " ".join(words[(i * j) % len(words)] for j in range(120))
        (folder / f"{i:02}.txt").write_text(text + "\n")
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A data folder and a finished run, made by the commands themselves."""
    home = tmp_path_factory.mktemp("home")
    write_texts(home / "texts")
    data, run = str(home / "data"), str(home / "run")
    assert main(["data", "tokenize", str(home / "texts"), "--out", data,
                 "--vocab_size", "300"]) == 0
    assert main(["pretrain", "--data", data, "--out", run, "--train.steps", "6", *SMALL]) == 0
    return home


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Each test starts in a new empty folder, so that it can tell what was written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SKYLAR_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "120")


def written() -> list[str]:
    return sorted(str(p.relative_to(Path.cwd())) for p in Path.cwd().rglob("*"))


def one_line(capsys, words) -> str:
    """Exit code 2, one line on stderr that says so, nothing on stdout: the line."""
    capsys.readouterr()
    assert main([str(w) for w in words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("skylar: error: ") and err.count("\n") == 1, err
    assert "Traceback" not in err
    return err


def pretrain(home, *more) -> list[str]:
    return ["pretrain", "--data", str(home / "data"), "--out", "new", *SMALL, *more]


# --- what the commands do ---


def test_data_folder(home):
    parts = {p.name for p in (home / "data").iterdir()}
    assert parts - {".lock"} == {"corpus.json", "tokenizer", "train", "val"}
    assert (home / "data" / "val" / "manifest.json").exists()


def test_run_folder(home):
    run = home / "run"
    assert {p.name for p in run.iterdir()} == {
        ".run.lock", "metrics.jsonl", "config.yaml", "starts.jsonl", "tokenizer", "checkpoints"}
    assert (run / "checkpoints" / "latest").read_text().strip() == "step-000006"
    metadata = json.loads((run / "checkpoints" / "step-000006" / "metadata.json").read_text())
    assert runs.load_run(run)[0].config.vocab_size == 300  # the tokenizer's, not the preset's
    assert metadata["data"] == str(home / "data")


def test_the_same_tokenize_again_does_nothing(home, capsys):
    before = {p: p.stat().st_mtime_ns for p in (home / "data").rglob("*") if p.is_file()}
    assert main(["data", "tokenize", str(home / "texts"), "--out", str(home / "data"),
                 "--vocab_size", "300"]) == 0
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_tokenizer_train_then_tokenize_with_it(home):
    texts = str(home / "texts")
    assert main(["tokenizer", "train", texts, "--out", "bpe", "--vocab_size", "290"]) == 0
    assert main(["data", "tokenize", texts, "--out", "data", "--tokenizer", "bpe"]) == 0
    ours, theirs = Path("data/tokenizer/tokenizer.json"), Path("bpe/tokenizer.json")
    assert ours.read_bytes() == theirs.read_bytes()


def test_verify_names_the_damaged_shard(home, capsys):
    assert main(["data", "verify", str(home / "data")]) == 0
    shutil.copytree(home / "data", "data")
    shard = Path("data/train/shard-00000.bin")
    damaged = bytearray(shard.read_bytes())
    damaged[100] ^= 1
    shard.write_bytes(damaged)
    capsys.readouterr()
    assert main(["data", "verify", "data"]) == 1
    err = capsys.readouterr().err
    assert "shard-00000.bin" in err and err.count("\n") == 1
    shard.unlink()
    assert main(["data", "verify", "data"]) == 1
    assert "shard-00000.bin is missing" in capsys.readouterr().err


def test_verify_notices_another_tokenizer(home, capsys):
    shutil.copytree(home / "data", "data")
    path = Path("data/tokenizer/tokenizer.json")
    path.write_text(path.read_text().replace('"ignore_merges":false', '"ignore_merges":true')
                    .replace('"ignore_merges": false', '"ignore_merges": true'))
    assert path.read_bytes() != (home / "data/tokenizer/tokenizer.json").read_bytes()
    assert main(["data", "verify", "data"]) == 1
    assert "tokenizer" in capsys.readouterr().err


def test_presets_are_counted(capsys):
    assert main(["presets", "--json"]) == 0
    rows = {row["preset"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["test"]["parameters"] == 5_899_648
    assert main(["presets"]) == 0
    assert "5,899,648" in capsys.readouterr().out


def test_all_presets_are_listed(capsys):
    assert main(["presets", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    names = [row["preset"] for row in rows]
    assert names == list(PRESETS) and names[0] == "test" and names[14] == "128b"
    dense = [row["active"] == row["parameters"] for row in rows]
    assert all(dense[:15]) and not dense[names.index("mixtral-8x7b")]
    assert main(["presets"]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in names) and "\u2026" not in table  # nothing is cut off


@pytest.mark.parametrize("family", ["gpt2", "llama3", "skylar"])
def test_another_family_of_the_same_size(home, family, capsys):
    few = ["--train.steps", "2", "--train.save_every", "0", "--train.eval_every", "0"]
    more = ["--model.full_every", "2"] if family == "skylar" else []
    assert main(pretrain(home, "--family", family, *few, *more)) == 0
    assert f"test, {family}, " in capsys.readouterr().out
    assert runs.load_run("new")[0].config.d_model == 16
    assert yaml.safe_load(Path("new/config.yaml").read_text())["family"] == family


def test_export_opens_in_transformers_and_here(home, capsys):
    "The run folder, the exported folder and transformers continue a text alike."
    transformers = pytest.importorskip("transformers", reason="comes with skylar[lab]")
    assert main(["export", "--model", str(home / "run"), "--out", "exported"]) == 0
    assert "model.safetensors" in capsys.readouterr().out
    texts = []
    for folder in (home / "run", "exported"):
        words = ["generate", "--model", str(folder), "--prompt", "the", "--temperature", "0"]
        assert main([*words, "--max_new_tokens", "12"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    theirs = transformers.AutoModelForCausalLM.from_pretrained("exported")
    tokenizer = transformers.AutoTokenizer.from_pretrained("exported")
    ids = tokenizer("<bos>the", return_tensors="pt", add_special_tokens=False).input_ids
    out = theirs.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert tokenizer.decode(out[0], skip_special_tokens=True) == texts[0].rstrip("\n")


def test_chat_answers_without_repeating_the_message(home, capsys):
    words = ["generate", "--model", str(home / "run"), "--chat", "--prompt", "Who is there?"]
    assert main([*words, "--max_new_tokens", "5", "--seed", "1"]) == 0
    assert "Who is there?" not in capsys.readouterr().out


def test_export_refuses_a_folder_in_use(home, capsys):
    Path("exported").mkdir()
    Path("exported/mine.txt").write_text("keep")
    assert "exported" in one_line(
        capsys, ["export", "--model", str(home / "run"), "--out", "exported"])
    assert [p.name for p in Path("exported").iterdir()] == ["mine.txt"]


def test_generate_is_reproducible(home, capsys):
    words = ["generate", "--model", str(home / "run"), "--prompt", "the", "--max_new_tokens", "12"]
    texts = []
    for seed in ("1", "1", "2"):
        assert main([*words, "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("the") for text in texts)


def test_eval_as_json_and_table(home, capsys):
    assert main(["eval", "--model", str(home / "run"), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert 0 < row["val_loss"] < 7
    assert row["val_perplexity"] == pytest.approx(2.718281828**row["val_loss"], rel=1e-6)
    assert main(["eval", "--model", str(home / "run")]) == 0
    assert f"{row['val_loss']:.4g}" in capsys.readouterr().out


def test_minutes_limits_the_time_and_the_run_goes_on_from_there(home, capsys):
    words = ["--train.steps", "100000", "--train.save_every", "0", "--train.eval_every", "0"]
    start = time.monotonic()
    assert main(pretrain(home, "--minutes", "0.01", *words)) == 0
    assert time.monotonic() - start < 30
    step = read_metrics(Path("new/metrics.jsonl"))[-1]["step"]
    out = capsys.readouterr().out
    assert 1 <= step < 100_000 and "time limit reached" in out
    again = ["pretrain", "--config", "new/config.yaml", "--resume", "--minutes", "0.03"]
    assert "train.minutes is 0.01" in one_line(capsys, again)
    assert main([*again, "--extend_to", "200000"]) == 0
    assert read_metrics(Path("new/metrics.jsonl"))[-1]["step"] > step


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(home, kind):
    words = ["--data", str(home / "data"), *SMALL, "--train.steps", "60",
             "--train.log_every", "1", "--train.save_every", "0", "--train.eval_every", "0",
             "--model.dropout", "0.1"]
    assert main(["pretrain", "--out", "whole", *words]) == 0
    child = subprocess.Popen(
        [*SKYLAR, "pretrain", "--out", "ha'l ves", *words, "--train.log_every", "1"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ,
                                                                      "OMP_NUM_THREADS": "1"})
    metrics, deadline = Path("ha'l ves/metrics.jsonl"), time.time() + 120
    while not (metrics.exists() and metrics.read_text()) and time.time() < deadline:
        time.sleep(0.01)
    child.send_signal(kind)
    out, err = child.communicate(timeout=120)
    if child.returncode == 0:
        pytest.skip("the run was over before the signal came")
    assert child.returncode == 130, err
    assert "Traceback" not in err and "--resume" in err
    assert 0 < read_metrics(metrics)[-1]["step"] < 60
    line = err.split("`")[1]  # as printed
    assert main(shlex.split(line)[1:]) == 0
    whole, halves = read_metrics(Path("whole/metrics.jsonl")), read_metrics(metrics)
    assert [row["step"] for row in whole] == [row["step"] for row in halves]
    for a, b in zip(whole, halves):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-6)


# --- settings ---


@pytest.mark.parametrize("name", COMMANDS)
def test_help_teaches(name, capsys):
    assert main([*name.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert f"skylar {name}" in text and "Example" in text
    lines = [line for line in text.splitlines() if line.startswith("  --")]
    explained = [line for line in lines if len(line.split("  ")) > 2 or len(line) < 80]
    assert lines == explained


def test_every_flag_is_explained():
    for name in COMMANDS:
        for action in command_parser(name)._actions:
            assert action.help, f"{name} {action.dest}"


@pytest.mark.parametrize("words", [
    *([*name.split(), "--help"] for name in COMMANDS), ["--help"],
    ["pretrain", "--trian.steps", "3"], ["generate", "--modle", "x"]], ids=" ".join)
def test_help_and_mistyped_flags_answer_within_a_second_of_cpu_time(words):
    code = ("import sys, skylar.cli as c; c.main(sys.argv[1:]); "
            "sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'tokenizers')))")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, "help imported what only the work needs"
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_print_config_round_trip(home, capsys):
    more = ["--train.steps", "7", "--optimizer.betas", "[0.8,0.9]", "--minutes", "1.5"]
    assert main(pretrain(home, *more, "--print_config")) == 0
    first = capsys.readouterr().out
    Path("x.yaml").write_text(first)
    assert main(["pretrain", "--config", "x.yaml", "--print_config"]) == 0
    assert capsys.readouterr().out == first
    assert yaml.safe_load(first)["optimizer"]["betas"] == [0.8, 0.9]


def test_a_flag_after_config_wins(home, capsys):
    Path("x.yaml").write_text("train:\n  steps: 5\n")
    assert main(pretrain(home, "--config", "x.yaml", "--train.steps", "9", "--print_config")) == 0
    assert yaml.safe_load(capsys.readouterr().out)["train"]["steps"] == 9


PRETRAIN = [path for path in sorted((ROOT / "configs").glob("*.yaml"))
            if "stages" not in yaml.safe_load(path.read_text())]  # tests/test_recipe.py has those


@pytest.mark.parametrize("path", PRETRAIN, ids=lambda p: p.name)
def test_configs_are_complete(path, capsys):
    """Each names its data and where to get it, so it runs as it stands."""
    assert main(["pretrain", "--config", str(path), "--print_config"]) == 0
    settings = yaml.safe_load(capsys.readouterr().out)
    assert settings["corpus"]["source"] in SOURCES
    context = settings["model"]["max_seq_len"] or get_config(settings["preset"]).max_seq_len
    assert settings["loader"]["seq_len"] <= context


def test_demo_and_its_config_are_the_same():
    wanted = {"data": "demo/data", "out": "demo/run", **DEMO}
    assert yaml.safe_load((ROOT / "configs" / "shakespeare.yaml").read_text()) == wanted


# --- texts that are typed reach the function unchanged ---

ODD = ["### User", "# x", "#", "null", "None", "yes", "1e3", "7", "a: b", "[x]", "{x", "- x",
       "---", "-x", "--nothing", "@file", "'", '"', "100%", "è 好", " ", "x=y", "${HOME}", "*"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_text_flag_takes_any_text(name):
    parser = command_parser(name)
    flags = [a for a in parser._actions if a.option_strings and a.metavar == "str"]
    needed = [w for a in parser._actions if a.required and a.option_strings
              for w in (a.option_strings[0], "given")]
    needed += ["given" for a in parser._actions if a.required and not a.option_strings]
    for shift in range(len(ODD) if flags else 0):  # every flag gets every text, all in one line
        texts = {a: ODD[(i + shift) % len(ODD)] for i, a in enumerate(flags)}
        for joined in (False, True):
            pairs = ([a.option_strings[0], text] for a, text in texts.items())
            words = (w for pair in pairs for w in (["=".join(pair)] if joined else pair))
            found = parser.parse_words([*needed, *words])
            for action, text in texts.items():
                value = functools.reduce(lambda part, key: part[key], action.dest.split("."), found)
                several = name == "generate" and action.option_strings[0] == "--stop"
                assert value == ([text] if several else text), action.dest


@pytest.mark.parametrize("name", ["data verify", "data fetch", "data tokenize"])
@pytest.mark.parametrize("typed", [["-x"], ["--", "--x"]])
def test_positional_words_may_begin_with_a_dash(name, typed):
    out = ["--out", "y"] if name == "data tokenize" else []
    found = command_parser(name).parse_words([*out, *typed])
    assert found["data" if name == "data verify" else "source"] == typed[-1]


def test_stop_is_given_as_often_as_needed_and_survives_yaml(home, capsys):
    words = ["generate", "--model", "m", "--prompt", "# p", "--stop", "### User", "--stop", "7"]
    assert main([*words, "--print_config"]) == 0
    Path("x.yaml").write_text(capsys.readouterr().out)
    found = command_parser("generate").parse_words(["--config", "x.yaml"])
    assert found["stop"] == ["### User", "7"] and found["prompt"] == "# p"


def test_a_flag_is_not_taken_for_the_value_of_the_flag_before_it():
    with pytest.raises(UsageError, match="expected one argument"):
        command_parser("pretrain").parse_words(["--data", "--resume"])


def test_flags_are_those_of_the_imported_objects_and_of_fastcore():
    """What is read from the source is what Python and fastcore's docments see."""
    import dataclasses
    import inspect
    import typing

    from fastcore.docments import docments

    from skylar.cli.flags import REQUIRED, read_parameters

    kinds = typing.get_type_hints(runs.RunConfig).values()
    groups = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
    assert len(groups) >= 8
    for kind in groups:
        ours = read_parameters("skylar.training.run", kind.__name__)
        types = typing.get_type_hints(kind)
        assert [(p.name, p.kind, p.default) for p in ours] == [
            (f.name, types[f.name], f.default) for f in dataclasses.fields(kind)]
        assert {p.name: p.help for p in ours} == docments(kind, returns=False)
    for command in COMMANDS.keys() - {"pretrain", *CONFIGS}:  # they have a config's
        function = COMMANDS[command]
        ours = {p.name: p for p in read_parameters("skylar.cli.commands", function.__name__)}
        for name, p in inspect.signature(function).parameters.items():
            if p.kind is not p.VAR_KEYWORD:
                default = REQUIRED if p.default is p.empty else p.default
                assert (ours[name].kind, ours[name].default) == (p.annotation, default)
                assert ours[name].help == docments(function)[name]


def test_corpus_flags_are_the_arguments_of_prepare_data():
    import inspect
    from dataclasses import fields

    wanted = {n: p.default for n, p in inspect.signature(runs.prepare_data).parameters.items()}
    given = {f.name: f.default for f in fields(runs.CorpusConfig)}
    assert {**given, "source": inspect.Parameter.empty} == {
        n: d for n, d in wanted.items() if n != "out"}


def test_loader_flags_are_arguments_of_the_loader():
    import inspect
    from dataclasses import fields

    wanted = inspect.signature(runs.PackedLoader.__init__).parameters
    assert {f.name for f in fields(runs.LoaderConfig)} <= wanted.keys()


def test_every_argument_of_every_family_is_a_flag():
    from skylar.models.presets import FAMILIES

    found = commands.family_parameters()
    assert list(found) == [family.name for family in FAMILIES]
    flags = {a.dest for a in command_parser("pretrain")._actions}
    wanted = {f"model.{p.name}" for parameters in found.values() for p in parameters}
    assert {"model.d_model", "model.rope_theta", "model.init_std"} <= wanted <= flags


# --- text in and out ---


def standard_input(monkeypatch, content: bytes):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


@pytest.mark.parametrize("words", [["--prompt", "-"], []])
def test_prompt_from_standard_input(home, monkeypatch, capsys, words):
    start = ["generate", "--model", str(home / "run"), "--max_new_tokens", "3", "--seed", "1"]
    assert main([*start, "--prompt", "the # king: è"]) == 0
    wanted = capsys.readouterr().out
    standard_input(monkeypatch, "the # king: è\n".encode())
    assert main([*start, *words]) == 0
    assert capsys.readouterr().out == wanted


def test_prompt_that_is_not_utf8(home, monkeypatch, capsys):
    standard_input(monkeypatch, b"caff\xe8")
    assert "not UTF-8" in one_line(capsys, ["generate", "--model", home / "run"])


def test_no_prompt_at_a_terminal(home, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", Terminal())
    assert "--prompt" in one_line(capsys, ["generate", "--model", home / "run"])


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_output_in_any_encoding_goes_on_to_its_end(home, monkeypatch, encoding):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    words = ["generate", "--model", str(home / "run"), "--prompt", "è ☕ 好 king"]
    assert main([*words, "--max_new_tokens", "2", "--temperature", "0"]) == 0
    sys.stdout.flush()
    assert b" king" in raw.getvalue()
    assert main(["presets"]) == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_device_and_dtype(home, capsys, dtype):
    words = ["--model", str(home / "run"), "--device", "cpu", "--dtype", dtype]
    assert main(["generate", "--prompt", "the", "--max_new_tokens", "3", *words]) == 0
    assert main(["eval", *words]) == 0
    assert "abacus" in one_line(
        capsys, ["eval", "--model", home / "run", "--device", "abacus"])
    assert "int7" in one_line(capsys, ["eval", "--model", home / "run", "--dtype", "int7"])


# --- what a command prints or leaves behind works in the next one ---


def printed_line(capsys) -> list[str]:
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("now try: "))
    return [w for w in shlex.split(line.removeprefix("now try: "))][1:]


@pytest.mark.parametrize("odd", ["my run's", "perché 好", "-dash", "# [x]: {y}", 'a "b" $HOME'])
def test_chain_of_all_commands_in_folders_with_odd_names(home, capsys, odd):
    Path(odd).mkdir()
    texts, bpe, data, run, exported = (f"{odd}/{x}" for x in ("t", "b", "d", "r", "e"))
    if odd == "-dash":  # a name of its own begins with a dash, too
        bpe, data, run, exported = "-b", "-d", "-r", "-e"
    write_texts(Path(texts))
    assert main(["tokenizer", "train", texts, "--out", bpe, "--vocab_size", "290"]) == 0
    assert main(["data", "tokenize", texts, "--out", data, "--tokenizer", bpe]) == 0
    assert main(["data", "verify", data]) == 0
    short = ["--train.steps", "2", "--train.save_every", "1"]
    assert main(["pretrain", "--data", data, "--out", run, *SMALL, *short]) == 0
    less = ["--max_new_tokens", "2"]
    assert main([*printed_line(capsys), *less]) == 0
    assert main(["pretrain", "--config", f"{run}/config.yaml", "--resume"]) == 0
    assert main(["eval", "--model", run]) == 0
    assert main(["eval", "--model", f"{run}/checkpoints/step-000001"]) == 0
    assert main(["export", "--model", run, "--out", exported]) == 0
    assert main([*printed_line(capsys), *less]) == 0
    assert main(["eval", "--model", exported, "--data", data]) == 0
    assert main(["export", "--model", exported, "--out", exported + "2"]) == 0
    assert capsys.readouterr().err == ""


def test_export_and_run_evaluate_to_the_same_loss(home, capsys):
    assert main(["export", "--model", str(home / "run"), "--out", "e"]) == 0
    capsys.readouterr()
    rows = []
    for words in (["--model", str(home / "run")], ["--model", "e", "--data", str(home / "data")]):
        more = ["--seq_len", "32", "--batch_size", "2", "--json"]
        assert main(["eval", *words, *more]) == 0
        rows += json.loads(capsys.readouterr().out)
    assert rows[0] == rows[1]
    assert "give a data folder" in one_line(capsys, ["eval", "--model", "e"])


def test_export_of_family_skylar_says_that_it_needs_skylar(home, capsys):
    assert main(pretrain(home, "--family", "skylar", "--train.steps", "1")) == 0
    assert main(["export", "--model", "new", "--out", "e"]) == 0
    assert "import skylar.models.auto" in capsys.readouterr().out
    assert main(["export", "--model", str(home / "run"), "--out", "e2"]) == 0
    assert "skylar.models.auto" not in capsys.readouterr().out


def test_a_checkpoint_of_the_trainer_alone_says_what_it_lacks(home, capsys):
    import torch

    from skylar.training.checkpoint import save_checkpoint

    save_checkpoint(Path("python/checkpoints"), 1, torch.nn.Linear(2, 2))
    assert "save_run" in one_line(capsys, ["eval", "--model", "python"])


def test_completion_covers_every_command_and_flag(capsys):
    pytest.importorskip("shtab", reason="completion scripts are written by shtab")
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    offered = set(re.findall(r"(?<=[ (])[^ ()]+(?=[ )])", script))
    for name in COMMANDS:
        shown = (a for a in command_parser(name)._actions if a.help != "==SUPPRESS==")
        wanted = {*name.split(), *(flag for a in shown for flag in a.option_strings)}
        assert wanted <= offered, name
    code = script + '\nCOMP_WORDS=(skylar pretrain --train.st); COMP_CWORD=2\n' \
        '_shtab_skylar; echo "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["--train.steps"], done.stderr


def test_completion_without_shtab(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert "pip install" in one_line(capsys, ["completion", "bash"])


# --- mistakes ---

WRONG = {  # name -> (what is typed after a good `pretrain`, what the answer must name)
    "unknown key": (["--trian.steps", "3"], "did you mean --train.steps"),
    "unknown nested key": (["--train.stepps", "3"], "did you mean --train.steps"),
    "wrong type": (["--train.steps", "many"], "'many'"),
    "wrong type in a union": (["--minutes", "soon"], "'soon' is not a number"),
    "half a number": (["--train.steps", "1.5"], "'1.5' is not a whole number"),
    "wrong choice": (["--schedule.kind", "cosin"], "cosin"),
    "impossible value": (["--train.steps", "0"], "train.steps=0"),
    "impossible lr": (["--optimizer.lr", "-1"], "optimizer.lr=-1.0"),
    "impossible shape": (["--model.n_heads", "3", "--model.d_head", "null"], "n_heads=3"),
    "warm-up too long": (["--schedule.warmup_steps", "5000"], "5000"),
    "context too long": (["--loader.seq_len", "9999"], "loader.seq_len=9999"),
    "vocabulary mismatch": (["--model.vocab_size", "777"], "777"),
    "unknown preset": (["--preset", "tset"], "did you mean test"),
    "unknown device": (["--train.device", "abacus"], "abacus"),
    "missing data": (["--data", "nowhere"], "nowhere"),
    "extend nothing": (["--extend_to", "9"], "--resume"),
    "corpus without source": (["--corpus.vocab_size", "300"], "corpus.source"),
    "unknown family": (["--family", "qwen"], "qwen3"),
    "missing config": (["--config", "nowhere.yaml"], "nowhere.yaml"),
    "windows longer than the data": (
        ["--model.max_seq_len", "100000", "--loader.seq_len", "90000"], "90000"),
    "stray word": (["fast"], "fast"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings(home, capsys, name):
    words, answer = WRONG[name]
    assert answer in one_line(capsys, pretrain(home, *words))
    assert written() == []


BAD_YAML = {
    "not YAML": ("a: [1", "line"),
    "unknown key": ("modle:\n  dropout: 0.1\n", "'modle.dropout' is not accepted"),
    "a list": ("- 1\n", "Unexpected config"),
    "wrong type": ("train:\n  steps: soon\n", "'soon' is not a whole number"),
    "a number for a text": ("preset: 2024\n", "2024 is not text"),
    "a number for a group": ("train: 5\n", "train=5"),
    "empty": ("", "Unexpected config"),
}


@pytest.mark.parametrize("name", BAD_YAML)
def test_bad_yaml(home, capsys, name):
    text, answer = BAD_YAML[name]
    Path("x.yaml").write_text(text)
    assert answer in one_line(capsys, pretrain(home, "--config", "x.yaml"))
    assert written() == ["x.yaml"]


def test_help_of_a_group_lists_its_commands(capsys):
    assert main(["data", "--help"]) == 0
    out = capsys.readouterr().out
    assert "data fetch" in out and "data verify" in out and "pretrain" not in out


@pytest.mark.parametrize("words, answer", [
    (["pretrian"], "did you mean 'pretrain'"),
    (["data"], "'data fetch'"),
    (["data", "tokenise"], "'data tokenize'"),
    (["brew", "coffee"], "skylar --help"),
    (["data", "fetch", "shakespear"], "shakespeare"),
    (["data", "tokenize", "nowhere", "--out", "x"], "nowhere"),
    (["data", "tokenize", "nowhere"], "out"),
    (["data", "fetch"], "source"),
    (["pretrain", "--data", "nowhere"], "--out"),
    (["completion", "fish"], "fish"),
    (["data", "verify", "nowhere"], "nowhere"),
    (["tokenizer", "train", "nowhere", "--out", "x"], "nowhere"),
    (["generate", "--model", "nowhere", "--prompt", "a"], "nowhere"),
    (["generate", "--model", "no/body/here", "--prompt", "a"], "no/body/here"),
    (["export", "--model", "nowhere", "--out", "x"], "nowhere"),
    (["eval", "--model", "nowhere"], "nowhere"),
])
def test_wrong_commands(capsys, words, answer):
    assert answer in one_line(capsys, words)
    assert written() == []


@pytest.mark.parametrize("words, answer", [
    (["--val_fraction", "1.5"], "val_fraction=1.5"),
    (["--shard_mb", "0"], "shard_mb=0"),
    (["--vocab_size", "12"], "12"),
    (["--tokenizer", "nowhere"], "nowhere"),
])
def test_wrong_tokenize(home, capsys, words, answer):
    start = ["data", "tokenize", str(home / "texts"), "--out", "x"]
    main([*start, *words])
    assert answer in capsys.readouterr().err
    assert written() == []


@pytest.mark.parametrize("words, answer", [
    (["--temperature", "-1"], "temperature=-1"),
    (["--top_p", "0"], "top_p=0"),
    (["--prompt", ""], "empty prompt"),
    (["--top_k", "few"], "'few'"),
])
def test_wrong_sampling(home, capsys, words, answer):
    good = ["generate", "--model", str(home / "run"), "--prompt", "a"]
    assert answer in one_line(capsys, [*good, *words])


def test_other_settings_for_a_data_folder(home, capsys):
    words = ["data", "tokenize", home / "texts", "--out", home / "data", "--vocab_size", "280"]
    assert "vocab_size 300, not 280" in one_line(capsys, words)


def test_out_holds_another_run(home, capsys):
    words = pretrain(home, "--out", str(home / "run"))
    assert "already holds a run" in one_line(capsys, words)
    assert "train.steps is 6" in one_line(capsys, [*words, "--resume", "--train.steps", "8"])


def test_out_holds_something_else(home, capsys):
    Path("new").mkdir()
    Path("new/thesis.txt").write_text("dear reader")
    assert "not empty" in one_line(capsys, pretrain(home))
    assert written() == ["new", "new/thesis.txt"]


def test_out_is_a_file(home, capsys):
    Path("new").write_text("dear reader")
    assert "new" in one_line(capsys, pretrain(home))
    assert Path("new").read_text() == "dear reader"


def test_out_is_below_a_file(home, capsys):
    Path("thesis").write_text("dear reader")
    assert "thesis" in one_line(capsys, pretrain(home, "--out", "thesis/run"))
    assert written() == ["thesis"]


def test_corrupt_shard(home, capsys):
    shutil.copytree(home / "data", "data")
    shard = Path("data/train/shard-00000.bin")
    shard.write_bytes(shard.read_bytes()[:-2])
    assert "shard-00000.bin" in one_line(capsys, pretrain(home, "--data", "data"))
    assert not Path("new").exists()


def test_corrupt_manifest(home, capsys):
    shutil.copytree(home / "data", "data")
    Path("data/train/manifest.json").write_text("{")
    assert "manifest.json" in one_line(capsys, pretrain(home, "--data", "data"))


def test_another_tokenizer_than_the_shards(home, capsys):
    assert main(["tokenizer", "train", str(home / "texts"), "--out", "b", "--vocab_size",
                 "280"]) == 0
    shutil.copytree(home / "data", "data")
    shutil.copytree("b", "data/tokenizer", dirs_exist_ok=True)
    assert "tokenizer" in one_line(capsys, pretrain(home, "--data", "data"))


def test_eval_on_data_of_another_tokenizer(home, capsys):
    assert main(["data", "tokenize", str(home / "texts"), "--out", "d", "--vocab_size",
                 "280"]) == 0
    words = ["eval", "--model", home / "run", "--data", "d"]
    assert "another tokenizer" in one_line(capsys, words)


@pytest.mark.parametrize("name", ["metadata.json", "tensors/__0_0.distcp", "tensors/.metadata"])
def test_corrupt_checkpoint(home, capsys, name):
    shutil.copytree(home / "run", "run")
    path = Path("run/checkpoints/step-000006") / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    words = ["generate", "--model", "run", "--prompt", "a"]
    assert path.name in one_line(capsys, words)


def test_corrupt_tokenizer_of_a_run(home, capsys):
    shutil.copytree(home / "run", "run")
    Path("run/tokenizer/tokenizer.json").write_text("{}")
    assert "tokenizer.json" in one_line(capsys, ["eval", "--model", "run"])


def test_a_full_disk_is_seen_before_any_work(home, capsys, monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "MB free" in one_line(capsys, pretrain(home))
    assert written() == []


@pytest.mark.parametrize("number, remedy", [
    (errno.ENOSPC, "free some space"), (errno.EACCES, "may read and write"),
    (errno.EROFS, "not read-only")])
def test_the_system_refuses_to_write(home, monkeypatch, capsys, number, remedy):
    def refuse(self, *args, **kwargs):
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert main(pretrain(home)) == 2
    err = capsys.readouterr().err
    assert remedy in err and "new" in err and err.count("\n") == 1
    assert written() == []


@pytest.fixture
def tiny_disk(tmp_path):
    """A disk of 2.5 MB, where the system allows to make one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2500k", "tmpfs", str(disk)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"cannot mount a small disk: {error}")
    if done.returncode:
        pytest.skip(f"cannot mount a small disk: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_up_while_training(home, tiny_disk, monkeypatch, capsys):
    """The last good checkpoint stays, nothing half-written beside it."""
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)  # the check cannot know
    words = pretrain(home, "--out", str(tiny_disk / "run"), "--train.steps", "40",
                     "--train.save_every", "2", "--train.keep_last", "0")
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "No space left" in err, err
    checkpoints = tiny_disk / "run" / "checkpoints"
    assert not list(checkpoints.glob(".tmp*"))
    words = ["generate", "--model", str(tiny_disk / "run"), "--prompt", "a",
             "--max_new_tokens", "2"]
    assert main(words) == 0


def test_a_disk_that_fills_up_while_tokenising(home, tiny_disk, capsys):
    (tiny_disk / "ballast").write_bytes(bytes(2_540_000))
    words = ["data", "tokenize", str(home / "texts"), "--out", str(tiny_disk / "data"),
             "--vocab_size", "300"]
    assert main(words) == 2
    err = capsys.readouterr().err
    assert "No space left" in err and "Traceback" not in err
    left = {p.name for p in tiny_disk.rglob("*")}
    assert not left & {"tokenizer", "tokenizer.part", "manifest.json"}
    (tiny_disk / "ballast").unlink()
    assert main(words) == 0  # the same command goes on
    assert main(["data", "verify", str(tiny_disk / "data")]) == 0


# --- processes ---


def run_process(*words, **options):
    return subprocess.run([*SKYLAR, *map(str, words)], capture_output=True, text=True,
                          timeout=120, **options)


def test_process_exit_codes(home):
    assert run_process("--version").returncode == 0
    wrong = run_process("generate", "--model", "nowhere", "--prompt", "a")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.count("\n") == 1 and "Traceback" not in wrong.stderr


def test_debug_shows_the_traceback():
    wrong = run_process("data", "fetch", "nothing", env={**os.environ, "SKYLAR_DEBUG": "1"})
    assert "Traceback" in wrong.stderr and wrong.returncode == 1


def test_a_bug_keeps_its_traceback(monkeypatch):
    import torch

    monkeypatch.setattr(commands, "preset_row", lambda name: torch.optim.AdamW([]))
    with pytest.raises(ValueError, match="empty parameter list"):
        main(["presets"])


def test_a_reader_that_goes_away():
    command = " ".join(SKYLAR) + " presets | true"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr


def test_interrupted_before_training(monkeypatch, capsys):
    def stop(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "preset_row", stop)
    assert main(["presets"]) == 130
    assert capsys.readouterr().err == "skylar: interrupted\n"


# --- the package itself ---


def test_top_level_names_are_imported_when_they_are_used():
    code = ("import sys, skylar; assert 'torch' not in sys.modules; "
            "assert {'generate', 'from_pretrained'} <= set(dir(skylar)); "
            "from skylar import from_pretrained, generate, load_tokenizer, stream; "
            "assert generate is sys.modules['skylar.inference.generate'].generate")
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
    import skylar

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = skylar.nothing
