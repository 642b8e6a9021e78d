"""The README keeps its word: its tables are made from results, and its commands run as typed."""

import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from skylar.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
sys.path.insert(0, str(ROOT / "tools"))


def blocks(language: str, containing: str) -> str:
    "The code block in `language` that holds `containing`."
    found = re.findall(rf"```{language}\n(.*?)\n *```", README, flags=re.DOTALL)
    return next(block for block in found if containing in block)


def test_tables_are_made_from_results():
    import readme_table

    assert readme_table.filled(README) == README, "run `python tools/readme_table.py`"


def test_a_stale_table_would_be_noticed():
    import readme_table

    stale = README.replace("<!-- table bench -->\n", "<!-- table bench -->\n| old |\n")
    assert readme_table.filled(stale) != stale


def test_results_of_another_format_are_not_measured(tmp_path, monkeypatch):
    "Neither a missing file nor one from an older script stops the tables."
    import readme_table

    monkeypatch.setattr(readme_table, "RESULTS", tmp_path)
    for name, content in {
        "train_step_qwen3": '{"rows": [{"shape": "test", "mode": "eager"}]}', "decode": "[]",
        "attention": '{"rows": []}', "gpu_train": "{}", "loader": '{"rows": null}',
        "tokenize": "{", "lessons": '{"rows": [{"seconds": 3}]}',
    }.items():
        (tmp_path / f"{name}.json").write_text(content)
    lines = readme_table.bench().splitlines()[2:]
    assert len(lines) == len(readme_table.SOURCES)
    assert all("| not measured |" in line for line in lines)
    assert "| not measured |" in readme_table.lessons()
    assert readme_table.machine() == "Not measured."


def step_row(case: str, ratio: float, **more) -> dict:
    return {"case": case, "mode": "eager", "batch": "1 x 1024", "ratio": ratio, "target": 1.3,
            "skylar_tokens_per_s": 3000, "transformers_tokens_per_s": 2000} | more


def test_a_grid_shows_its_worst_row_and_its_median(tmp_path, monkeypatch):
    import readme_table

    monkeypatch.setattr(readme_table, "RESULTS", tmp_path)
    rows = [step_row("grid-256-8192-1024", 1.2), step_row("grid-128-8192-256", 1.9),
            step_row("test-packed", 1.05, mode="packed", unpacked_tokens_per_s=2900)]
    found = {"rows": rows, "dtype": "bfloat16 autocast, float32 weights", "layers_of_grid": 6,
             "grid": {"rows": 2, "median": 1.55, "target": 1.5,
                      "worst": {"case": "grid-256-8192-1024"}}}
    (tmp_path / "train_step_qwen3.json").write_text(json.dumps(found))
    worst, packed, median = readme_table.training_rows("qwen3")
    assert "6 layers, width 256, vocabulary 8,192" in worst[0] and worst[3:] == ["1.20x", "1.3x"]
    assert packed[2] == "2,900 tokens/s (ours, one document a sequence)"
    assert median[3:] == ["1.55x", "1.5x"]


def test_pictures_and_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    missing = [t for t in targets if "://" not in t and not (ROOT / t).exists()]
    assert not missing


def named_files() -> list[tuple[str, list[str]]]:
    "(file, notebooks) of each line in the table of what is where."
    section = README.split("## Where to find what")[1].split("\n## ")[0]
    lines = [re.findall(r"\]\((.+?)\)", x) for x in section.splitlines() if x.startswith("| ")]
    return [(links[0], links[1:]) for links in lines if links]


@pytest.mark.parametrize("file, notebooks", named_files())
def test_what_is_where_is_true(file, notebooks):
    "Each notebook named beside a file exports to it."
    assert notebooks
    for notebook in notebooks:
        cells = json.loads((ROOT / notebook).read_text(encoding="utf-8"))["cells"]
        code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
        found = re.findall(r"^#\| *(?:default_exp|exporti?) +([\w.]+)", code, re.M)
        modules = [f"skylar/{name.replace('.', '/')}.py" for name in found]
        assert any(name == file or name.startswith(file) for name in modules), modules


def test_every_room_can_be_found():
    "Every public module of the floors that are listed file by file is in the table."
    listed = [file for file, _ in named_files()]
    missing = [
        path for floor in ("data", "layers", "models", "training", "inference")
        for path in (p.relative_to(ROOT).as_posix() for p in ROOT.glob(f"skylar/{floor}/*.py"))
        if not path.endswith("__init__.py") and path not in listed]
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


def test_gguf_block_runs_as_typed(workspace, monkeypatch):
    pytest.importorskip("gguf")
    folder, _ = workspace
    monkeypatch.chdir(folder)
    exec(compile(textwrap.dedent(blocks("python", "gguf")), "README.md", "exec"), {})
    assert (folder / "runs/model.gguf").read_bytes()[:4] == b"GGUF"
