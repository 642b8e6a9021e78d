"""Student mode: what a working copy holds, and what the check of it says."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from skylar.cli import main
from skylar.cli.lesson import (
    exercises,
    find_course,
    find_lesson,
    lesson_name,
    lesson_paths,
    source,
    without_solutions,
    working_copy,
)

ROOT = Path(__file__).parents[1]
REAL = [pytest.param(path, id=lesson_name(path)) for path in lesson_paths(ROOT / "nbs")]
KERNEL = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
HIDDEN = {"jupyter": {"source_hidden": True}}
FIRST = """# Sums

> Adding up

| **Runs in** | about 3 s |

[next](01_more.ipynb) [top](#sums) [site](https://example.com)"""
CHECK = """def check_{0}(f):
    assert f([1, 2]) is not None, "not yet: returns None: fill in the body"
    assert f([1, 2]) == {1}
    print("correct")"""
SKELETON = """def {0}(x):
    ...  # your code here


# check_{0}({0})"""
SOLUTION = """# Solution{2}
def {0}_solution(x):
    return double({1}(x)) // 2


check_{0}({0}_solution)
rejects(check_{0}, len)"""
TASKS = {"total": ("sum", 3), "largest": ("max", 2), "smallest": ("min", 1)}


def cell(text: str, kind: str = "code", **metadata) -> dict:
    more = {"outputs": [{"output_type": "stream", "name": "stdout", "text": "1\n"}],
            "execution_count": 1} if kind == "code" else {}
    name = "-".join(re.findall(r"\w+", text))[:40]
    return {"cell_type": kind, "id": name, "metadata": metadata, "source": text, **more}


def lesson(new_style: bool) -> dict:
    """A lesson of three exercises whose solutions stand beside them, or in one last section."""
    cells = [
        cell(FIRST, "markdown"),
        cell("#| default_exp x\ndef double(x):\n    return 2 * x"),
        cell("#| eval: false\nraise SystemError"),
        cell("def rejects(check, wrong): ..."),
        cell("## Exercises", "markdown"),
    ]
    solutions = []
    for number, (name, (builtin, value)) in enumerate(TASKS.items(), start=1):
        cells += [cell(f"### {number}. The {name} (easy, 1 minute)", "markdown"),
                  cell(CHECK.format(name, value)), cell(SKELETON.format(name))]
        title = f": check_{name}" if new_style else ""
        tags = {"tags": ["solution"]} if new_style else {}
        answer = cell(SOLUTION.format(name, builtin, title), **HIDDEN, **tags)
        (solutions if new_style else cells).append(answer)
    cells.append(cell("## You can now explain\n\n1. sums", "markdown"))
    if new_style:
        cells += [cell("## Solutions", "markdown"), cell("The answer: `sum`", "markdown"),
                  *solutions]
    return {"cells": cells, "metadata": KERNEL, "nbformat": 4, "nbformat_minor": 5}


@pytest.fixture
def course(tmp_path, monkeypatch) -> Path:
    """An old and a new lesson, one more with a number that two chapters have; we are in it."""
    for path, nb in {"00_a/00_sums": lesson(False), "00_a/01_more": lesson(True),
                     "01_b/00_other": lesson(True)}.items():
        target = tmp_path / "nbs" / f"{path}.ipynb"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(nb))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SKYLAR_DEBUG", raising=False)
    return tmp_path


def started(name: str) -> Path:
    assert main(["lesson", "start", name]) == 0
    return next(Path("my_lessons").rglob(f"*{name}.ipynb"))


def cells_of(path: Path) -> list[dict]:
    return json.loads(path.read_text())["cells"]


def write(copy: Path, **answers: str) -> None:
    """Put answers in the place of skeletons; an empty one deletes the cell."""
    nb = json.loads(copy.read_text())
    for name, text in answers.items():
        (at,) = (i for i, c in enumerate(nb["cells"]) if c["id"] == f"def-{name}-x-your-code-here-"
                 f"check_{name}-{name}"[:40])
        nb["cells"][at]["source"] = text
        if not text:
            del nb["cells"][at]
    copy.write_text(json.dumps(nb))


def checked(capsys, *words: str) -> tuple[int, list[str]]:
    """Exit code and printed lines of `skylar lesson check`, without the first line."""
    capsys.readouterr()
    code = main(["lesson", "check", *words])
    out, err = capsys.readouterr()
    assert not err, err
    return code, out.splitlines()[1:]


def refused(capsys, *words: str) -> str:
    """One line on stderr, exit code 2: the line."""
    capsys.readouterr()
    assert main(["lesson", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("skylar: error: ") and err.count("\n") == 1, err
    return err


# --- start ---


@pytest.mark.parametrize("name", ["sums", "more"])
def test_a_copy_has_no_solutions_and_no_outputs(course, name):
    text = started(name).read_text()
    cells = json.loads(text)["cells"]
    assert "olution" not in text.replace("no solutions", "") and "The answer" not in text
    code = [c for c in cells if c["cell_type"] == "code"]
    assert all(c["outputs"] == [] and c["execution_count"] is None for c in code)
    kept = "\n".join(source(c) for c in cells)
    for task in TASKS:
        assert f"def check_{task}(f)" in kept and f"# check_{task}({task})" in kept
    assert f"skylar lesson check {name}" in kept and "You can now explain" in kept


def test_links_of_a_copy_lead_where_they_led(course):
    first = source(cells_of(started("sums"))[0])
    assert "[next](../../nbs/00_a/01_more.ipynb) [top](#sums) [site](https://example.com)" in first


def test_the_original_is_not_touched(course):
    before = {path: path.read_bytes() for path in lesson_paths(course / "nbs")}
    started("more")
    assert before == {path: path.read_bytes() for path in before}


def test_work_is_not_overwritten(course, capsys):
    copy = started("sums")
    copy.write_text("mine")
    assert "--force" in refused(capsys, "start", "sums")
    assert copy.read_text() == "mine"
    assert main(["lesson", "start", "sums", "--force"]) == 0
    assert copy.read_text() != "mine"


@pytest.mark.parametrize("name", ["more", "01_more", "01", "1", "00/01", "a/more", "00_a/01_more",
                                  "nbs/00_a/01_more.ipynb", "More", "mine/01_more.ipynb"])
def test_a_lesson_has_many_names(course, name):
    assert find_lesson(name, course / "nbs") == course / "nbs/00_a/01_more.ipynb"


def test_a_number_means_the_first_chapter_that_has_it(course, capsys):
    assert main(["lesson", "start", "00"]) == 0
    out = capsys.readouterr().out
    assert "00_a/00_sums" in out and "01_b/00_other" in out
    assert main(["lesson", "start", "01/00", "--out", "elsewhere"]) == 0
    assert Path("elsewhere/01_b/00_other.ipynb").exists()
    assert "skylar lesson check other --out elsewhere" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "answer"), [
    ("sum", "did you mean sums?"), ("01_mroe", "did you mean 01_more?"),
    ("zzz", "skylar lesson list"), ("02/sums", "unknown lesson '02/sums'")])
def test_unknown_lessons(course, capsys, name, answer):
    for command in ("start", "check"):
        assert answer in refused(capsys, command, name)
    assert not Path("my_lessons").exists() or name == "02/sums"


def test_no_copies_among_the_lessons(course, capsys, monkeypatch):
    monkeypatch.chdir(course / "nbs")
    assert "outside of nbs/" in refused(capsys, "start", "sums")


def test_the_course_is_found_upward_and_beside_the_package(course, tmp_path_factory, monkeypatch):
    assert find_course(course / "nbs" / "00_a") == find_course() == course / "nbs"
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert find_course() == ROOT / "nbs"


def test_no_course_at_all(tmp_path, capsys, monkeypatch):
    import skylar

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(skylar, "__file__", str(tmp_path / "site-packages/skylar/__init__.py"))
    assert "clone of the course" in refused(capsys, "list")


def test_list(course, capsys):
    assert main(["lesson", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[0].split(maxsplit=3)[:3] == ["00_a/00_sums", "3", "s"]
    assert lines[0].endswith("The total; The largest; The smallest")


# --- check ---


@pytest.mark.parametrize("name", ["sums", "more"])
def test_a_copy_as_it_came_is_not_yet_correct(course, capsys, name):
    started(name)
    code, lines = checked(capsys, name)
    assert code == 1
    assert lines == [
        "1. The total     not yet: returns None: fill in the body",
        "2. The largest   not yet: returns None: fill in the body",
        "3. The smallest  not yet: returns None: fill in the body",
        "0 of 3 correct"]


@pytest.mark.parametrize("name", ["sums", "more"])
def test_the_solutions_are_correct(course, capsys, name):
    """Pasted as they are, whole cells, and as the body of the skeleton's function."""
    copy = started(name)
    original = {c["id"]: source(c) for c in lesson(name == "more")["cells"]}
    pasted = {task: next(text for text in original.values() if f"def {task}_solution" in text)
              for task in ("total", "largest")}
    write(copy, **pasted, smallest="smallest = min")
    code, lines = checked(capsys, str(copy))
    assert code == 0 and lines[-1] == "3 of 3 correct", lines


def test_wrong_and_failing_answers_are_told_apart(course, capsys):
    copy = started("sums")
    write(copy, total="def total(x):\n    return 4\n\ncheck_total(total)",
          largest="def largest(x):\n    return x.max()", smallest="def smallest(x)\n    return 1")
    code, lines = checked(capsys, "sums")
    assert code == 1 and lines == [
        "1. The total     not yet: `assert f([1, 2]) == 3` does not hold",
        "2. The largest   error: cell [6] `def largest(x):`: AttributeError: 'list' object has no "
        "attribute 'max'",
        f"3. The smallest  error: cell [8] `def smallest(x)`: {lines[2].split('`: ')[1]}",
        "0 of 3 correct"]
    assert lines[2].split("`: ")[1].startswith("SyntaxError: expected ':'")


def test_an_edited_check_is_not_fooled_and_a_deleted_answer_is_missing(course, capsys):
    copy = started("more")
    nb = json.loads(copy.read_text())
    for c in nb["cells"]:
        if "def check_total" in source(c):
            c["source"] = "def check_total(f):\n    print('correct')"
    copy.write_text(json.dumps(nb))
    write(copy, total="def total(x):\n    return 4\n\ncheck_total(total)", largest="")
    code, lines = checked(capsys, "more")
    assert code == 1 and lines[0].endswith("`assert f([1, 2]) == 3` does not hold")
    assert lines[1] == "2. The largest   not yet: `largest` is not defined"


def test_cells_that_fail_elsewhere_are_named(course, capsys):
    copy = started("sums")
    nb = json.loads(copy.read_text())
    at = next(i for i, c in enumerate(nb["cells"]) if "def double" in source(c))
    nb["cells"].insert(at, cell("raise ValueError('mine')"))
    nb["cells"][at + 2]["source"] = nb["cells"][at + 3]["source"] = "1 / 0"
    copy.write_text(json.dumps(nb))
    original = course / "nbs/00_a/00_sums.ipynb"
    nb = json.loads(original.read_text())
    nb["cells"].append(cell("1 / 0"))  # so that this is a cell of the lesson
    original.write_text(json.dumps(nb))
    write(copy, total="total = sum", largest="largest = max", smallest="smallest = min")
    code, lines = checked(capsys, "sums")
    assert code == 1 and lines[3:] == [
        "a cell of yours fails, [1] `raise ValueError('mine')`: ValueError: mine",
        "a cell of the lesson fails, [3] `1 / 0`: ZeroDivisionError: division by zero",
        "a cell of the lesson fails, [4] `1 / 0`: ZeroDivisionError: division by zero",
        "3 of 3 correct"]


def test_no_copy_and_a_damaged_copy(course, capsys):
    assert "skylar lesson start sums" in refused(capsys, "check", "sums")
    copy = started("sums")
    copy.write_text("{")
    main(["lesson", "check", "sums"])
    assert "is damaged" in capsys.readouterr().err


def test_without_jupyter(course, capsys, monkeypatch):
    copy = started("sums")
    monkeypatch.setitem(sys.modules, "nbclient", None)
    assert copy.exists()
    main(["lesson", "check", "sums"])
    assert 'pip install "skylar[lab]"' in capsys.readouterr().err


def test_only_check_imports_jupyter(course):
    code = ("import sys, skylar.cli as c; assert c.main(sys.argv[1:]) == 0; "
            "sys.exit(any(m in sys.modules for m in ('torch', 'nbformat', 'nbclient', 'IPython')))")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    for words in (["start", "sums"], ["list"], ["check", "--help"]):
        done = subprocess.run([sys.executable, "-c", code, "lesson", *words], env=env,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


# --- the real lessons ---


def names(text: str) -> tuple[set[str], set[str]]:
    """(names that a cell sets, names that it reads)."""
    tree = ast.parse(re.sub(r"(?m)^(\s*)[%!].*$", r"\1pass", text))
    bound, read = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {(a.asname or a.name).partition(".")[0] for a in node.names}
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
    return bound, read


def all_names(cells: list[dict]) -> tuple[set[str], set[str]]:
    pairs = [names(source(c)) for c in cells if c["cell_type"] == "code"]
    return set().union(*(p[0] for p in pairs)), set().union(*(p[1] for p in pairs))


@pytest.mark.parametrize("path", REAL)
def test_a_real_lesson_can_be_copied(path):
    """Its exercises are found, every solution goes, and nothing that is left needs one."""
    nb = json.loads(path.read_text(encoding="utf-8"))
    assert len(exercises(nb)) >= 2
    kept = list(without_solutions(nb["cells"]))
    dropped = [c for c in nb["cells"] if not any(c is k for k in kept)]
    (bound, read), (gone, _) = all_names(kept), all_names(dropped)
    assert not (read - bound) & gone
    copy = working_copy(nb, path, ROOT / "my_lessons" / path.parent.name / path.name)
    text = "\n".join(source(c) for c in copy["cells"])
    solved = re.findall(r"^check_\w+\((\w+_solution)\)", "\n".join(map(source, dropped)), re.M)
    assert not [name for name in solved if re.search(rf"\b{name}\b", text)]
    assert exercises(copy) == exercises(json.loads(json.dumps(copy)))
    assert [e.call for e in exercises(copy)] == [e.call for e in exercises(nb)]


def solved(task, nb: dict) -> str:
    """The solution of an exercise, whole."""
    cells = [c for c in nb["cells"] if not any(c is k for k in without_solutions(nb["cells"]))]
    return next(source(c) for c in cells if re.search(rf"^{task.check}\(", source(c), re.M))


def wrong(task, nb: dict) -> str:
    """The wrong answer with which a lesson shows that its check refuses one."""
    (given,) = re.findall(rf"^rejects\({task.check}, *(.+)\)$", solved(task, nb), re.M)
    return f"{task.names[0]} = {given}\n# {task.call}"


def test_a_real_lesson_from_start_to_finish(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    original = find_lesson("layernorm", find_course())
    nb = json.loads(original.read_text(encoding="utf-8"))
    tasks = exercises(nb)
    copy = started("layernorm")
    code, lines = checked(capsys, "layernorm")
    assert code == 1 and len(lines) == len(tasks) + 1, lines
    assert all(" not yet: " in line for line in lines[:-1])

    def answer(task, text):
        mine = json.loads(copy.read_text(encoding="utf-8"))
        (at,) = (c for c in mine["cells"] if c["id"] == task.skeleton["id"])
        at["source"] = text
        copy.write_text(json.dumps(mine), encoding="utf-8")

    for task in tasks:
        answer(task, solved(task, nb))
    answer(tasks[0], wrong(tasks[0], nb))
    code, lines = checked(capsys, "layernorm")
    assert code == 1 and " not yet: " in lines[0]
    assert all(line.endswith("  correct") for line in lines[1:-1]), lines
    answer(tasks[0], solved(tasks[0], nb))
    code, lines = checked(capsys, "layernorm")
    assert code == 0 and lines[-1] == f"{len(tasks)} of {len(tasks)} correct"
