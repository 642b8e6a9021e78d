"""settings.ini, pyproject.toml and constraints.txt say the same."""

import configparser
import re
import runpy
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXACT = re.compile(r"^([A-Za-z0-9._-]+)(\[[\w,-]+\])?==([A-Za-z0-9.+!]+)(\s*;.*)?$")


def normal(name: str) -> str:
    """A distribution's name as pip compares it: PyTorch_Lightning is pytorch-lightning."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirement_names(lines: list[str]) -> set[str]:
    return {normal(re.match(r"[A-Za-z0-9._-]+", line)[0]) for line in lines}


def pins(text: str) -> dict[str, str]:
    """{name: version} of a constraints file; ValueError for a line that is not exact."""
    found = {}
    for line in text.splitlines():
        line = line.split("#")[0].strip()
        if not line:
            continue
        if not (match := EXACT.match(line)):
            raise ValueError(f"not an exact pin: {line!r}")
        found[normal(match[1])] = match[3]
    return found


@pytest.fixture(scope="module")
def ini() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    assert parser.read(ROOT / "settings.ini")
    return parser


@pytest.fixture(scope="module")
def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def pinned() -> dict[str, str]:
    return pins((ROOT / "constraints.txt").read_text())


@pytest.mark.parametrize("key", ["lib_path", "nbs_path", "doc_path", "tst_flags"])
def test_nbdev_paths_agree(ini, pyproject, key):
    assert ini["DEFAULT"][key] == pyproject["tool"]["nbdev"][key]


def test_nbdev_does_not_rewrite_pyproject(ini, pyproject):
    assert ini.getboolean("DEFAULT", "update_pyproject") is False
    assert pyproject["tool"]["nbdev"]["update_pyproject"] is False


def test_names_agree(ini, pyproject):
    project = pyproject["project"]
    assert ini["DEFAULT"]["lib_name"] == project["name"] == ini["DEFAULT"]["lib_path"]
    assert ini["DEFAULT"]["description"] == project["description"]
    assert ini["DEFAULT"]["git_url"] == project["urls"]["Repository"]
    assert project["requires-python"].startswith(f">={ini['DEFAULT']['min_python']}")


def test_version_is_the_package_version(ini):
    import skylar

    assert ini["DEFAULT"]["version"] == skylar.__version__


def test_lessons_fit_into_their_chapter(ini):
    lessons = ini["lessons"]
    assert lessons.getint("lesson_seconds") <= lessons.getint("chapter_seconds")
    assert lessons.getint("lesson_seconds") <= lessons.getint("cell_timeout")


def test_old_command_names_work_in_the_tree_and_come_with_no_wheel(pyproject):
    commands = tomllib.loads((ROOT / "tools/nbdev_commands/pyproject.toml").read_text())
    scripts = commands["project"]["scripts"]
    assert scripts.keys() == {"nbdev_export", "nbdev_test", "nbdev_clean", "nbdev_update"}
    assert pyproject["project"]["scripts"].keys() == {"skylar"}
    assert "./tools/nbdev_commands" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("extra", ["", "transformers"])
def test_the_library_asks_for_nothing_of_jupyter(pyproject, extra):
    project = pyproject["project"]
    asked = project["dependencies"] + project["optional-dependencies"].get(extra, [])
    assert not [line for line in asked if re.search("jupyter|ipy|nbdev|skylar", line)]


def test_every_pin_is_in_the_range_that_is_promised(pyproject, pinned):
    requirements = pytest.importorskip("packaging.requirements")
    project = pyproject["project"]
    for line in [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]:
        asked = requirements.Requirement(line)
        assert asked.name == "skylar" or asked.specifier.contains(pinned[normal(asked.name)]), line


def test_every_requirement_is_pinned(pyproject, pinned):
    """An unpinned tool is the one that breaks a fresh environment next month."""
    project = pyproject["project"]
    extras = project["optional-dependencies"]
    asked = requirement_names([*project["dependencies"], *sum(extras.values(), [])])
    assert not asked - {"skylar"} - pinned.keys()


@pytest.mark.parametrize("name", ["nbdev", "fastcore", "execnb", "ghapi"])
def test_nbdev_and_what_has_broken_it_are_pinned(pinned, name):
    assert name in pinned


@pytest.mark.parametrize(
    "line", ["torch>=2.13", "torch", "torch==2.*", "torch @ https://example.com/x.whl"]
)
def test_loose_pins_are_noticed(line):
    with pytest.raises(ValueError, match="not an exact pin"):
        pins(f"numpy==2.0.0\n{line}\n")


def test_pins_are_read():
    text = "# a comment\nnumpy==2.0.0  # why\n\nPyYAML==6.0; python_version > '3'\n"
    assert pins(text) == {"numpy": "2.0.0", "pyyaml": "6.0"}


def test_every_test_listed_as_slow_exists():
    """A renamed test must not slip back into `make quick` unnoticed."""
    slow = runpy.run_path(ROOT / "tests" / "conftest.py")["SLOW"]
    for file, names in slow.items():
        text = (ROOT / "tests" / f"{file}.py").read_text()
        assert not [name for name in names if f"def {name}(" not in text], file
