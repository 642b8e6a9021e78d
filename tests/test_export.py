"""The package is exactly what the lessons say, and a difference would be noticed."""

import shutil
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

pytest.importorskip("nbdev", reason="needs nbdev: pip install -e '.[dev]'")

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tools" / "nbdev_commands")]

from check_export import differences  # noqa: E402
from nbdev_commands import export, misplaced, notebooks  # noqa: E402

LESSON = "nbs/00_transformer/10_positions.ipynb"
MODULE = "skylar/layers/positions.py"


@pytest.fixture
def small_tree(tmp_path) -> Path:
    """A tree of one lesson and its module, to be changed by a test."""
    for name in ("pyproject.toml", "settings.ini", "skylar/__init__.py", LESSON, MODULE):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text, "the fixture has changed: this would change nothing"
    path.write_text(text.replace(old, new))


def test_export_changes_nothing():
    assert not differences(ROOT)


def test_unchanged_small_tree_is_clean(small_tree):
    assert not differences(small_tree)


def test_edited_lesson_is_noticed(small_tree):
    replace(small_tree / LESSON, "def sinusoids(", "def renamed_sinusoids(")
    assert differences(small_tree) == [f"{MODULE}: differs from its lesson"]


def test_module_edited_by_hand_is_noticed(small_tree):
    replace(small_tree / MODULE, "def sinusoids(", "def renamed_sinusoids(")
    assert differences(small_tree) == [f"{MODULE}: differs from its lesson"]


def test_module_without_a_lesson_is_noticed(small_tree):
    shutil.copy(small_tree / MODULE, small_tree / "skylar/layers/old.py")
    assert [line.split(":")[0] for line in differences(small_tree)] == ["skylar/layers/old.py"]


def test_lesson_never_exported_is_noticed(small_tree):
    (small_tree / MODULE).unlink()
    assert differences(small_tree) == [f"{MODULE}: not exported yet"]


# --- a lesson that adds to the module of another ---


def notebook(path: Path, *cells: str) -> None:
    """Write a notebook with a title and code cells."""
    title = new_markdown_cell(f"# {path.stem}\n\n> One line")
    nb = new_notebook(cells=[title, *map(new_code_cell, cells)])
    for i, cell in enumerate(nb.cells):
        cell.id = f"{path.stem}-{i}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(nbformat.writes(nb))


@pytest.fixture
def two_lessons(tmp_path) -> Path:
    """The later lesson adds to the module of the earlier; by bare file name it comes first."""
    for name in ("pyproject.toml", "settings.ini", "skylar/__init__.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    owner = "#| default_exp layers.norm", "#| export\ndef layer_norm(): ..."
    adds = "#| default_exp layers.rms", "#| export\nx = 1", "#| export layers.norm\ny = 2"
    notebook(tmp_path / "nbs/00_a/05_norms.ipynb", *owner)
    notebook(tmp_path / "nbs/01_b/00_more.ipynb", *adds)
    return tmp_path


def test_cells_added_to_an_earlier_module_are_exported(two_lessons):
    export(two_lessons)
    text = (two_lessons / "skylar/layers/norm.py").read_text()
    assert "__all__ = ['layer_norm', 'y']" in text
    assert text.index("def layer_norm") < text.index("y = 2")
    assert "y = 2" not in (two_lessons / "skylar/layers/rms.py").read_text()


def test_added_cells_are_exported_identically_again(two_lessons):
    export(two_lessons)
    first = {p: p.read_text() for p in (two_lessons / "skylar").rglob("*.py")}
    export(two_lessons)
    assert first == {p: p.read_text() for p in (two_lessons / "skylar").rglob("*.py")}
    assert not differences(two_lessons)


def test_an_edit_of_an_added_cell_is_noticed(two_lessons):
    export(two_lessons)
    replace(two_lessons / "nbs/01_b/00_more.ipynb", "y = 2", "y = 3")
    assert differences(two_lessons) == ["skylar/layers/norm.py: differs from its lesson"]


def test_cells_added_to_a_later_module_are_refused(two_lessons):
    (two_lessons / "nbs/00_a/05_norms.ipynb").rename(two_lessons / "nbs/01_b/05_norms.ipynb")
    expected = "01_b/00_more.ipynb: adds to layers.norm, which no earlier notebook exports"
    assert differences(two_lessons) == [expected]
    with pytest.raises(ValueError, match="adds to layers.norm"):
        export(two_lessons)
    assert not (two_lessons / "skylar/layers").exists(), "refused before anything is written"


def test_exporting_to_ones_own_module_by_name_is_no_addition():
    cells = ["#| default_exp layers.norm", "#| export layers.norm\nx = 1", "#| export\nimport os"]
    assert misplaced([("a.ipynb", cells)]) == []


def test_reading_order_is_chapters_library_rest(tmp_path):
    for name in ("viz", "library/files", "01_b/00_x", "00_a/07_y", "00_a/.hidden/z"):
        notebook(tmp_path / f"{name}.ipynb")
    order = [p.relative_to(tmp_path).as_posix() for p in notebooks(tmp_path)]
    assert order == ["00_a/07_y.ipynb", "01_b/00_x.ipynb", "library/files.ipynb", "viz.ipynb"]
