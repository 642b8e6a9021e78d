"""The README keeps its word: its tables are made from results, and its commands run as typed."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from skylar.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
sys.path.insert(0, str(ROOT / "tools"))


def blocks(language: str, containing: str) -> str:
    "The code block in `language` that holds `containing`."
    found = re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)
    return next(block for block in found if containing in block)


def test_tables_are_made_from_results():
    import readme_table

    assert readme_table.filled(README) == README, "run `python tools/readme_table.py`"


def test_a_stale_table_would_be_noticed():
    import readme_table

    stale = README.replace("<!-- table bench -->\n", "<!-- table bench -->\n| old |\n")
    assert readme_table.filled(stale) != stale


def test_pictures_and_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    missing = [t for t in targets if "://" not in t and not (ROOT / t).exists()]
    assert not missing


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    "Where the README's shell block has run, with only the number of steps made small."
    folder = tmp_path_factory.mktemp("readme")
    script = re.sub(r"--train\.steps \d+", "--train.steps 3", blocks("sh", "skylar pretrain"))
    env = dict(os.environ, PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    outputs = {}
    for line in script.splitlines():
        command = shlex.split(line, comments=True)
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        outputs[" ".join(command[:2])] = done.stdout
    return folder, outputs


def test_shell_block_runs_as_typed(workspace):
    folder, outputs = workspace
    assert (folder / "runs/gpt/metrics.jsonl").exists()
    assert "JULIET:" in outputs["skylar generate"]
    assert "bits" in outputs["skylar eval"].lower()


def test_python_block_runs_as_typed(workspace, monkeypatch):
    folder, _ = workspace
    monkeypatch.chdir(folder)
    code = blocks("python", "Trainer(").replace("steps=500", "steps=2")
    exec(compile(code, "README.md", "exec"), {})
    assert (folder / "runs/python/metrics.jsonl").exists()
    model = ["--model", "runs/python"]  # what it leaves opens in every command
    assert main(["generate", *model, "--prompt", "JULIET:", "--max_new_tokens", "2"]) == 0
    assert main(["eval", *model, "--batches", "1"]) == 0
    assert main(["export", *model, "--out", "runs/python-exported"]) == 0


def test_second_python_block_runs_as_typed(workspace, monkeypatch, capsys):
    folder, _ = workspace
    monkeypatch.chdir(folder)
    code = blocks("python", "skylar.stream").replace("max_new_tokens=60", "max_new_tokens=2")
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("JULIET:")
