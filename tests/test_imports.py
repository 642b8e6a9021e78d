"""`import skylar` needs little, is quick, and goes down the floors only."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPTIONAL = ("transformers", "datasets", "matplotlib", "pyarrow", "IPython", "ipywidgets", "nbdev")
PLOTS = ("viz.py", "schematic.py", "model_drawings.py")  # need matplotlib, which is an extra
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "skylar").rglob("*.py")
    if path.name not in ("__init__.py", "__main__.py", "_modidx.py", "auto.py", *PLOTS)
)
BLOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
"""


def python(code: str, *args: str) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, *args, "-c", code]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)


def without_optional(code: str) -> subprocess.CompletedProcess:
    return python(BLOCK.format(blocked=set(OPTIONAL)) + code)


def test_modules_import_without_the_optional_packages():
    """One process for all of them: importing torch is the slow part. Plots are an extra."""
    assert "skylar.layers.attention" in MODULES
    result = without_optional(
        "import importlib\n" + f"for m in {MODULES}: importlib.import_module(m)"
    )
    assert result.returncode == 0, result.stderr


def test_classes_of_transformers_say_what_they_need():
    result = without_optional("import skylar.models.auto")
    assert 'needs transformers: pip install "skylar[transformers]"' in result.stderr


@pytest.mark.parametrize("name", OPTIONAL)
def test_the_block_works(name):
    """The check above would notice a module that imports an optional package."""
    result = without_optional(f"import {name}")
    assert result.returncode != 0 and "No module named" in result.stderr


def test_import_skylar_alone_is_quick():
    """`skylar --version` and tools that only look at the package do not wait for torch."""
    result = python("import sys, skylar; print(skylar.__version__, 'torch' in sys.modules)")
    assert result.stdout.split()[1:] == ["False"], result.stdout + result.stderr


def lint_imports(config: Path, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
    env = os.environ | {"PYTHONPATH": str(cwd)}
    options = ["--config", str(config), "--no-cache"]
    return subprocess.run([*command, *options], env=env, cwd=cwd, capture_output=True, text=True)


def test_imports_go_down_the_floors_only():
    pytest.importorskip("importlinter", reason="needs import-linter: pip install -e '.[dev]'")
    result = lint_imports(ROOT / "pyproject.toml", ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("utils/files", "layers.attention"),
        ("layers/attention", "models.decoder"),
        ("layers/attention", "data.tokenizer"),  # one floor, and they do not know each other
        ("data/tokenizer", "layers.attention"),
        ("models/decoder", "training.loss"),
        ("training/loss", "inference.sampling"),
        ("inference/sampling", "training.loss"),
        ("training/loss", "cli"),
    ],
)
def test_an_import_up_the_floors_is_noticed(tmp_path, module, imported):
    pytest.importorskip("importlinter", reason="needs import-linter: pip install -e '.[dev]'")
    shutil.copytree(ROOT / "skylar", tmp_path / "skylar")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "skylar" / f"{module}.py").open("a") as f:
        f.write(f"\nimport skylar.{imported}\n")
    result = lint_imports(tmp_path / "pyproject.toml", tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert f"skylar.{module.replace('/', '.')} -> skylar.{imported}" in result.stdout
