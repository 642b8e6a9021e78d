"""The built wheel in an environment of its own, which holds what the wheel asks for and no more.

The packages it asks for are linked from the running environment, so that nothing is fetched; a
package that skylar uses and does not ask for is missing there, and so is the tree itself.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

pytest.importorskip("pip", reason="builds and installs a wheel: needs pip")
packaging = pytest.importorskip("packaging.requirements", reason="needs packaging")


def can_build() -> bool:
    """Its version without importing it: it minds what has been imported before it."""
    found = list(metadata.distributions(name="setuptools"))
    return bool(found) and int(found[0].version.split(".")[0]) >= 77


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not can_build(), reason="needs setuptools: pip install -e '.[dev]'"),
    pytest.mark.skipif(os.name != "posix", reason="links packages into an environment"),
]
ROOT = Path(__file__).parents[1]
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
BESIDE_THE_LIBRARY = ("nbdev", "jupyterlab", "IPython", "ipywidgets", "matplotlib", "pytest")


def run(*command, **options) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: what a build leaves in the tree can neither help nor hurt."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        shutil.copy(ROOT / name, tree)
    ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    shutil.copytree(ROOT / "skylar", tree / "skylar", ignore=ignore)
    run(*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", out, tree)
    (built,) = out.glob("skylar-*.whl")
    return built


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def asked_for(requirements: list[str], extra: str = "") -> set[str]:
    """Names of the distributions that are asked for, and of all that those ask for."""
    found, queue = set(), [(text, extra) for text in requirements]
    while queue:
        text, wanted = queue.pop()
        requirement = packaging.Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": wanted}):
            continue
        for inner in ("", *requirement.extras):
            if (key := (normal(requirement.name), inner)) in found:
                continue
            found.add(key)
            if key[0] != "skylar":
                needs = metadata.distribution(requirement.name).requires or []
                queue += [(need, inner) for need in needs]
    return {name for name, _ in found}


def wheel_requirements(wheel: Path, extra: str) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        fields = archive.read(name).decode().split("\n\n")[0]
    lines = re.findall(r"^Requires-Dist: (.*)$", fields, flags=re.MULTILINE)
    own = [line for line in map(packaging.Requirement, lines) if normal(line.name) != "skylar"]
    return [str(r) for r in own if not r.marker or r.marker.evaluate({"extra": extra})]


def link(distribution: str, site: Path) -> None:
    """Make an installed distribution importable from the folder `site` as well."""
    found = metadata.distribution(distribution)
    for top in {file.parts[0] for file in found.files if file.parts[0] != ".."}:
        if not (site / top).exists() and top not in ("__pycache__",) and "editable" not in top:
            (site / top).symlink_to(found.locate_file(top))


def environment(folder: Path, wheel: Path, extra: str = "") -> Path:
    """A fresh environment with `skylar[extra]` from the wheel; returns its bin folder."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    (site,) = folder.glob("lib/python3*/site-packages")
    requirements = [r.split(";")[0] for r in wheel_requirements(wheel, extra)]
    for name in sorted(asked_for(requirements)):
        link(name, site)
    run(*PIP, "--python", folder / "bin" / "python", "install", "--no-deps", "--no-index", wheel)
    return folder / "bin"


@pytest.fixture(scope="module")
def plain(wheel, tmp_path_factory) -> Path:
    return environment(tmp_path_factory.mktemp("env") / "plain", wheel)


@pytest.fixture(scope="module")
def with_transformers(wheel, tmp_path_factory) -> Path:
    return environment(tmp_path_factory.mktemp("env") / "transformers", wheel, "transformers")


def clean_variables(bin: Path) -> dict[str, str]:
    """The test's environment variables, without those that lead to the tree."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return kept | {"PATH": f"{bin}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}


def python(bin: Path, code: str, cwd: Path) -> str:
    return run(bin / "python", "-c", code, cwd=cwd, env=clean_variables(bin), timeout=120)


def test_wheel_holds_the_library_and_nothing_for_notebooks(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "skylar/py.typed" in names and "skylar/layers/attention.py" in names
    assert not [n for n in names if "_modidx" in n or not n.startswith("skylar")]
    (entry_points,) = (n for n in names if n.endswith("entry_points.txt"))
    text = zipfile.ZipFile(wheel).read(entry_points).decode()
    assert text.split() == ["[console_scripts]", "skylar", "=", "skylar.cli:main"]


def test_no_command_of_nbdev_is_installed(plain):
    commands = {path.name for path in plain.iterdir()}
    assert "skylar" in commands and not [c for c in commands if "nbdev" in c]


@pytest.mark.parametrize("env", ["plain", "with_transformers"])
def test_only_what_was_asked_for_is_there(env, request, tmp_path):
    """Neither JupyterLab nor this tree: what runs below runs from the wheel."""
    bin = request.getfixturevalue(env)
    code = (
        "import importlib.util, skylar; print(skylar.__file__);"
        f"print([n for n in {BESIDE_THE_LIBRARY} if importlib.util.find_spec(n)])"
    )
    where, found = python(bin, code, tmp_path).splitlines()
    assert Path(where).is_relative_to(bin.parent) and found == "[]"


def readme_commands() -> list[str]:
    """The README's shell block, on a text file of one's own and with two steps of training."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    block = next(block for block in blocks if "skylar pretrain" in block)
    small = "--train.steps 2 --train.device cpu --loader.batch_size 2 --loader.seq_len 32"
    for old, new in (
        (r"--train\.steps \d+", small),
        (r"--vocab_size \d+", "--vocab_size 300"),
        (r"\bshakespeare\b", "plays"),
    ):
        block, n = re.subn(old, new, block)
        assert n, f"the README's commands do not say {old} any more"
    lines = [line.split("#")[0].strip() for line in block.splitlines()]
    return [line for line in lines if line and "data fetch" not in line]


@pytest.fixture(scope="module")
def trained(plain, tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """The folder in which the wheel's commands have run, and what each of them printed."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "plays").mkdir()
    for i in range(24):
        text = f"JULIET:\nO Romeo, Romeo! {i} times wherefore art thou Romeo?\n\n" * 20
        (folder / "plays" / f"{i:02}.txt").write_text(text)
    printed = {}
    for line in readme_commands():
        env = clean_variables(plain)
        printed[line] = run(*shlex.split(line), cwd=folder, env=env, timeout=120)
    return folder, printed


def test_trains_exports_and_generates(trained):
    folder, printed = trained
    assert (folder / "runs/gpt/metrics.jsonl").exists()
    assert list((folder / "runs/exported").glob("*.safetensors"))
    generated = [out for line, out in printed.items() if "skylar generate" in line]
    assert len(generated) == 2 and all("JULIET:" in out for out in generated)


def test_the_export_opens_in_transformers(trained, with_transformers):
    folder, _ = trained
    code = """
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("runs/exported")
model = AutoModelForCausalLM.from_pretrained("runs/exported")
ids = model.generate(**tokenizer("JULIET:", return_tensors="pt"), max_new_tokens=4)
print(tokenizer.decode(ids[0]))
"""
    assert "JULIET:" in python(with_transformers, code, folder)


def test_auto_classes_need_the_extra_alone(with_transformers, tmp_path):
    code = "import skylar.models.auto as auto; print(auto.SkylarForCausalLM.__name__)"
    assert python(with_transformers, code, tmp_path).split() == ["SkylarForCausalLM"]
