"""The package is exactly what the lessons say, and a difference would be noticed."""

import shutil
import sys
from pathlib import Path

import pytest

pytest.importorskip("nbdev", reason="needs nbdev: pip install -e '.[dev]'")

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tools"))

from check_export import differences  # noqa: E402

LESSON = "nbs/00_transformer/03_attention.ipynb"
MODULE = "skylar/layers/attention.py"


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
    replace(small_tree / LESSON, "def attention(", "def renamed_attention(")
    assert differences(small_tree) == [f"{MODULE}: differs from its lesson"]


def test_module_edited_by_hand_is_noticed(small_tree):
    replace(small_tree / MODULE, "def attention(", "def renamed_attention(")
    assert differences(small_tree) == [f"{MODULE}: differs from its lesson"]


def test_module_without_a_lesson_is_noticed(small_tree):
    shutil.copy(small_tree / MODULE, small_tree / "skylar/layers/old.py")
    assert [line.split(":")[0] for line in differences(small_tree)] == ["skylar/layers/old.py"]


def test_lesson_never_exported_is_noticed(small_tree):
    (small_tree / MODULE).unlink()
    assert differences(small_tree) == [f"{MODULE}: not exported yet"]
