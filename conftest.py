"""Every lesson is a pytest item: `pytest` runs unit tests and notebooks, one PASSED a lesson.

A lesson's kernel gets the thread count of settings.ini, no display and no model hub. A rewritten
lesson runs twice in that kernel, as it does when a reader runs all cells again (one of over
TWICE_UP_TO seconds only with `--nb-twice`: CI would take ten minutes more); at the end the check of
each exercise must refuse the skeleton that nobody has filled in.
"""

import configparser
import json
import os
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent
INI = configparser.ConfigParser()
INI.read(ROOT / "settings.ini")
sys.path.insert(0, str(ROOT / "tools"))  # the runner of lessons
sys.path.append(str(ROOT / "tests"))  # the list of lessons that are not rewritten
THREADS = INI["lessons"]["threads"]
TWICE_UP_TO = 25  # seconds of one run, as bench/results/lessons.json has them

# set before any test imports torch: two workers with two threads each are many times slower
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, THREADS)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_addoption(parser):
    group = parser.getgroup("notebooks")
    group.addoption("--nb-flags", default="", help='also run cells marked so, e.g. "slow gpu"')
    group.addoption("--nb-twice", action="store_true", help="run long lessons twice, too")


def pytest_collect_file(file_path, parent):
    relative = file_path.relative_to(parent.config.rootpath).parts
    if file_path.suffix == ".ipynb" and not any(part[0] in "._" for part in relative):
        return NotebookFile.from_parent(parent, path=file_path)


class NotebookFile(pytest.File):
    def collect(self):
        yield NotebookItem.from_parent(self, name=self.path.stem)


class NotebookError(Exception):
    "A cell failed; the message is the cell and its traceback."


class NotebookItem(pytest.Item):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.add_marker("notebook")

    def runtest(self):
        import nbformat
        from lessons import LessonClient, refuse_errors
        from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

        nb = nbformat.read(self.path, as_version=4)
        prepare(nb, self.path, set(self.config.getoption("--nb-flags").split()),
                self.config.getoption("--nb-twice") or seconds(self.path) <= TWICE_UP_TO)
        client = LessonClient(
            nb,
            timeout=INI["lessons"].getint("cell_timeout"),
            kernel_name="python3",
            resources={"metadata": {"path": str(self.path.parent)}},
        )
        try:
            client.execute()
            refuse_errors(nb)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            raise NotebookError(re.sub(r"\x1b\[[0-9;]*m", "", str(error))) from None

    def repr_failure(self, excinfo, style=None):
        if isinstance(excinfo.value, NotebookError):
            return f"{self.path.relative_to(self.config.rootpath)}\n{excinfo.value}"
        return super().repr_failure(excinfo, style)

    def reportinfo(self):
        return self.path, 0, str(self.path.relative_to(self.config.rootpath))


def seconds(path: Path) -> float:
    "What a lesson took when it was last measured; one that was not is taken for a short one."
    rows = json.loads((ROOT / "bench/results/lessons.json").read_text(encoding="utf-8"))["rows"]
    return next((row["seconds"] for row in rows if ROOT / row["lesson"] == path), 0)


def prepare(nb, path: Path, wanted_flags: set[str], again: bool = True) -> None:
    "What runs of a notebook: wanted cells, in a rewritten lesson twice, then probes of its checks."
    from lessons import probes, twice
    from test_lessons import NOT_YET_REWRITTEN

    blank_skipped_cells(nb, wanted_flags)
    asked = probes(nb)
    lesson = re.match(r"\d\d_", path.name) or path.parent.name == "template"
    if again and lesson and f"{path.parent.name}/{path.stem}" not in NOT_YET_REWRITTEN:
        twice(nb)
    nb.cells += asked


def blank_skipped_cells(nb, wanted_flags: set[str]) -> None:
    "Empty the cells that nbdev would not run: `#| eval: false` and flags not asked for."
    from fastcore.nbio import dict2nb, does_cell_eval

    skipped_flags = set(INI["DEFAULT"]["tst_flags"].split()) - wanted_flags
    for cell, parsed in zip(nb.cells, dict2nb(nb).cells):
        if cell.cell_type != "code":
            continue
        if not does_cell_eval(parsed, True) or skipped_flags & parsed.directives.keys():
            cell.source = ""
