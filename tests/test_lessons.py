"""What every lesson keeps to, and that each of these rules can fail.

A rule takes a lesson and yields complaints. `test_rule` holds every lesson to every rule, and to
the rules for rewritten lessons unless it is on `NOT_YET_REWRITTEN`, which may only become shorter;
`test_rule_can_fail` breaks a good little course in one place and expects the rule to say so.

That a lesson runs, and a rewritten one twice in one kernel, is seen where lessons are executed
(`conftest.py` of the root, `pytest nbs`).
"""

import ast
import configparser
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import nbformat
import pytest
from fastcore.nbio import dict2nb, does_cell_eval
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tools" / "nbdev_commands")]

import lessons as runner  # noqa: E402
from nbdev_commands import appended_modules, misplaced, notebooks, own_module  # noqa: E402
from test_names import retired_in_lesson, retired_in_text  # noqa: E402

# Lessons that do not keep all rules for rewritten ones yet. This list may only become shorter:
# a lesson that keeps them must be taken off (`test_lessons_on_the_list_still_need_it`).
NOT_YET_REWRITTEN = {
    "00_transformer/00_text",
    "00_transformer/01_bpe",
    "00_transformer/02_shards",
    "00_transformer/03_shards_loader",
    "00_transformer/07_masks",
    "00_transformer/08_layernorm",
    "00_transformer/09_mlp",
    "00_transformer/15_training_loop",
    "00_transformer/16_generation",
    "01_gqa_rope/00_rmsnorm",
    "01_gqa_rope/03_kv_cache",
    "01_gqa_rope/04_sliding_window",
    "01_gqa_rope/05_gqa",
    "01_gqa_rope/06_attention_backends",
    "01_gqa_rope/07_ffn",
    "01_gqa_rope/08_family",
    "01_gqa_rope/09_chat_format",
    "01_gqa_rope/10_decoding",
    "01_gqa_rope/11_weights",
}

WIDGET = "application/vnd.jupyter.widget-view+json"
PICTURES = {"image/png", "image/svg+xml"}
MAX_CELL_LINES = 60  # of any notebook; the rest is for lessons that are rewritten
LESSON_CELL_LINES, LESSON_CELLS, LESSON_WORDS = 30, 90, 2_100  # aim at 25, 80 and 1,800
LESSON_COLUMNS, LESSON_KB = 88, 300
MIN_SCHEMATICS, MIN_TURNS, EXERCISES = 4, 2, range(2, 5)
SCHEMATIC = re.compile(r"(?<!\w)(?:Schematic|architectures?)\(")
TURN = re.compile(r"(?:\A|\n\n)(?:#+ )?\*\*(?:Your turn|Predict)\b")
SECTION = re.compile(r"^##? ", re.M)
FENCE = re.compile(r"```.*?```", re.S)
SOLUTIONS = re.compile(r"## Solutions[ \t]*(?:\n|\Z)")
NO_PROSE = re.compile(r"\$\$.*?\$\$|\$[^$\n]+\$|^\|.*$|</?\w+[^>\n]*>|\]\([^)\n]*\)", re.S | re.M)
MACHINE_PATH = re.compile(r"(?<![A-Za-z0-9_.:/-])/(?:tmp|work|root|farm|Users)/\S*")
RUNS_IN = re.compile(r"\*\*Runs in\*\*\s*\|[^|\n]*?about (\d+) s\b")


@dataclass(frozen=True)
class Limits:
    """The `[lessons]` section of settings.ini."""

    lesson_seconds: int
    chapter_seconds: int
    notebook_kb: int
    code_columns: int

    @classmethod
    def read(cls, path: Path) -> "Limits":
        ini = configparser.ConfigParser()
        ini.read(path)
        return cls(**{name: ini.getint("lessons", name) for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class Lesson:
    """One notebook; `course` is the tree it belongs to."""

    path: Path
    course: "Course"

    @cached_property
    def name(self) -> str:
        return self.path.relative_to(self.course.root).as_posix()

    @cached_property
    def nb(self) -> NotebookNode:
        return nbformat.read(self.path, as_version=4)

    @cached_property
    def code(self) -> list[NotebookNode]:
        return [c for c in self.nb.cells if c.cell_type == "code" and c.source.strip()]

    @cached_property
    def evaluated(self) -> list[NotebookNode]:
        """Code cells that run: not `#| eval: false`, and holding something to run."""
        parsed = dict2nb(nbformat.from_dict(self.nb)).cells
        pairs = zip(self.nb.cells, parsed)
        code = ((c, p) for c, p in pairs if c.cell_type == "code" and c.source.strip())
        return [c for c, p in code if does_cell_eval(p, True)]

    @cached_property
    def first(self) -> str:
        cell = self.nb.cells[0] if self.nb.cells else None
        return cell.source if cell is not None and cell.cell_type == "markdown" else ""

    @cached_property
    def module(self) -> str | None:
        """`layers.attention` for `#| default_exp layers.attention`."""
        return own_module([c.source for c in self.code])

    @property
    def numbered(self) -> bool:
        """A lesson of a chapter, in contrast to the map and the library's notebooks."""
        return bool(re.match(r"\d\d_", self.path.name))

    @property
    def rewritten(self) -> bool:
        """A lesson that keeps to the rules of the second edition."""
        short = self.path.relative_to(self.course.root / "nbs").with_suffix("").as_posix()
        return self.numbered and short not in NOT_YET_REWRITTEN

    @property
    def floor(self) -> int:
        """How far up its module stands; a notebook that exports nothing may use everything."""
        package = f"skylar.{self.module}".split(".")[:2] if self.module else []
        return self.course.floors.get(".".join(package), len(self.course.floors))

    @cached_property
    def imports(self) -> list[tuple[str, str]]:
        """[(module, name)] of everything imported anywhere in the lesson."""
        return [pair for cell in self.code for pair in imported(cell.source)]


@dataclass(frozen=True)
class Course:
    """The notebooks of a tree in reading order, and what was measured about them."""

    root: Path

    @cached_property
    def limits(self) -> Limits:
        return Limits.read(self.root / "settings.ini")

    @cached_property
    def floors(self) -> dict[str, int]:
        """{"skylar.utils": 0, ...}: what import-linter holds the package to."""
        settings = tomllib.loads((self.root / "pyproject.toml").read_text())
        contracts = settings["tool"]["importlinter"]["contracts"]
        (layers,) = (c["layers"] for c in contracts if c["type"] == "layers")
        rooms = (re.findall(r"[\w.]+", line) for line in reversed(layers))
        return {room: floor for floor, found in enumerate(rooms) for room in found}

    @cached_property
    def notebooks(self) -> list[Lesson]:
        return [Lesson(path, self) for path in notebooks(self.root / "nbs")]

    @cached_property
    def lessons(self) -> list[Lesson]:
        return [lesson for lesson in self.notebooks if lesson.numbered]

    @property
    def rewritten(self) -> list[Lesson]:
        return [lesson for lesson in self.lessons if lesson.rewritten]

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Measured seconds for each notebook; empty before the first measurement."""
        path = self.root / "bench" / "results" / "lessons.json"
        rows = json.loads(path.read_text())["rows"] if path.exists() else []
        return {row["lesson"]: row["seconds"] for row in rows}


def imported(source: str) -> Iterator[tuple[str, str]]:
    """(module, name) pairs of the imports in a cell; IPython's magics are not Python."""
    python = re.sub(r"(?m)^(\s*)[%!].*$", r"\1pass", source)
    for node in ast.walk(ast.parse(python)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (
                ("." * node.level + (node.module or ""), alias.name) for alias in node.names
            )


def where(lesson: Lesson, cell: NotebookNode) -> str:
    return f"{lesson.name} cell {lesson.nb.cells.index(cell)}"


# --- rules about the course as a whole ---


def names_are_unique(course: Course) -> Iterator[str]:
    """nbdev sorts and reports by bare file name; a topic is said once in the whole course."""
    topics = Counter(re.sub(r"^\d\d_", "", lesson.path.stem) for lesson in course.notebooks)
    yield from (f"two notebooks are called {topic}" for topic, n in topics.items() if n > 1)


def numbers_are_unique(course: Course) -> Iterator[str]:
    """A chapter is read by its numbers, and `skylar lesson start 05` goes by them."""
    numbers = Counter((lesson.path.parent.name, lesson.path.name[:2]) for lesson in course.lessons)
    yield from (f"{chapter} has {n} lessons {number}" for (chapter, number), n in numbers.items()
                if n > 1)


def modules_are_unique(course: Course) -> Iterator[str]:
    """Of two notebooks with one `default_exp` the later silently overwrites the earlier."""
    modules = Counter(lesson.module for lesson in course.notebooks if lesson.module)
    yield from (f"two notebooks export {module}" for module, n in modules.items() if n > 1)


def additions_go_to_earlier_modules(course: Course) -> Iterator[str]:
    """`#| export layers.norm` in a notebook before the one that makes layers.norm is lost."""
    cells = [(lesson.name, [c.source for c in lesson.code]) for lesson in course.notebooks]
    yield from misplaced(cells)


def modules_shadow_nothing(course: Course) -> Iterator[str]:
    """`moe` beside `moe.router`: a module with a package's name hides the package."""
    modules = {lesson.module for lesson in course.notebooks if lesson.module}
    pairs = ((m, o) for m in modules for o in modules if o.startswith(m + "."))
    yield from (f"{module} has the name of the package of {other}" for module, other in pairs)


def modules_are_fresh(course: Course) -> Iterator[str]:
    """A deleted or renamed notebook leaves its module behind; one never exported has none."""
    package = course.root / "skylar"
    want = {lesson.module.replace(".", "/") + ".py" for lesson in course.notebooks if lesson.module}
    by_hand = {"__init__.py", "__main__.py", "_modidx.py"}
    have = {
        p.relative_to(package).as_posix()
        for p in package.rglob("*.py")
        if p.name not in by_hand or "AUTOGENERATED" in p.read_text()
    }
    yield from (f"skylar/{name} belongs to no lesson" for name in sorted(have - want))
    yield from (f"skylar/{name} is not exported" for name in sorted(want - have))


def chapter_fits_its_budget(course: Course) -> Iterator[str]:
    """All lessons of a chapter together stay within the seconds of settings.ini."""
    chapters: Counter[str] = Counter()
    for lesson in course.lessons:
        chapters[lesson.path.parent.name] += course.seconds.get(lesson.name, 0)
    limit = course.limits.chapter_seconds
    yield from (
        f"{name} takes {s:.0f} s, more than {limit} s" for name, s in chapters.items() if s > limit
    )


# --- rules about each notebook ---


def module_names_lesson(lesson: Lesson) -> Iterator[str]:
    """The first comment of the module leads to the lesson where it is edited."""
    if not lesson.module:
        return
    path = lesson.course.root / "skylar" / (lesson.module.replace(".", "/") + ".py")
    lines = path.read_text().splitlines() if path.exists() else []
    comment = next((line for line in lines if line.startswith("#")), "")
    if lesson.name not in comment:
        yield f"{lesson.name}: the first comment of its module does not name it: {comment!r}"


def first_cell_names_module(lesson: Lesson) -> Iterator[str]:
    module = lesson.module and f"skylar/{lesson.module.replace('.', '/')}.py"
    if module and module not in lesson.first:
        yield f"{lesson.name}: its first cell does not name {module}"


def is_introduced(lesson: Lesson) -> Iterator[str]:
    """A title, a one-line subtitle (the module's docstring), and for lessons the box."""
    if not re.match(r"# \S.*\n+> \S", lesson.first):
        yield f"{lesson.name}: the first cell does not open with '# Title' and '> subtitle'"
    box = ("You will build", "You need", "Runs in", "Exports") if lesson.numbered else ()
    missing = [row for row in box if f"**{row}**" not in lesson.first]
    if missing:
        yield f"{lesson.name}: the first cell lacks {', '.join(missing)}"


def states_its_time(lesson: Lesson) -> Iterator[str]:
    """The stated seconds are at least the measured ones, and within the budget."""
    if not lesson.numbered:
        return
    stated = RUNS_IN.search(lesson.first)
    if not stated:
        yield f"{lesson.name}: the first cell has no '**Runs in** | about N s'"
        return
    limit, measured = lesson.course.limits.lesson_seconds, lesson.course.seconds.get(lesson.name, 0)
    if int(stated[1]) > limit:
        yield f"{lesson.name}: states {stated[1]} s, the limit is {limit} s"
    if int(stated[1]) < measured:
        yield f"{lesson.name}: states {stated[1]} s and took {measured} s"


def ran_in_order(lesson: Lesson) -> Iterator[str]:
    """Stored as a clean kernel left it: cell after cell, from the first to the last."""
    for n, cell in enumerate(lesson.evaluated, start=1):
        if cell.execution_count != n:
            yield f"{where(lesson, cell)}: execution count is {cell.execution_count}, not {n}"
            return


def has_no_errors(lesson: Lesson) -> Iterator[str]:
    for cell in lesson.code:
        for output in cell.outputs:
            if output.output_type == "error":
                yield f"{where(lesson, cell)}: stored {output.ename}: {output.evalue}"
            if output.get("name") == "stderr":
                yield f"{where(lesson, cell)}: stored a warning: {output.text[:80]!r}"


def stores_no_widgets(lesson: Lesson) -> Iterator[str]:
    """Without its kernel a stored widget is an error message."""
    if "widgets" in lesson.nb.metadata:
        yield f"{lesson.name}: stores widget state"
    for cell in lesson.code:
        if any(WIDGET in output.get("data", {}) for output in cell.outputs):
            yield f"{where(lesson, cell)}: stores a widget"


def merges_streams(lesson: Lesson) -> Iterator[str]:
    """What is printed token by token is stored as one output; a page breaks lines between two."""
    for cell in lesson.code:
        kinds = [(o.output_type, o.get("name")) for o in cell.outputs]
        if any(a == b and a[0] == "stream" for a, b in zip(kinds, kinds[1:])):
            yield f"{where(lesson, cell)}: {len(kinds)} outputs: run `tools/lessons.py tidy`"


def cells_are_short(lesson: Lesson) -> Iterator[str]:
    for cell in lesson.code:
        if (n := len(cell.source.splitlines())) > MAX_CELL_LINES:
            yield f"{where(lesson, cell)}: {n} lines"


def code_fits_the_page(lesson: Lesson) -> Iterator[str]:
    for cell in lesson.code:
        longest = max(map(len, cell.source.splitlines()))
        if longest > lesson.course.limits.code_columns:
            yield f"{where(lesson, cell)}: a line of {longest} columns"


def is_small(lesson: Lesson) -> Iterator[str]:
    kb = lesson.path.stat().st_size / 1000
    if kb > lesson.course.limits.notebook_kb:
        yield f"{lesson.name}: {kb:.0f} kB"


def written(cell: NotebookNode) -> Iterator[str]:
    """The texts among a cell's outputs, pictures left out."""
    for output in cell.get("outputs", []):
        yield str(output.get("text", ""))
        data = output.get("data", {})
        yield from (str(value) for kind, value in data.items() if not kind.startswith("image/"))


def names_no_machine(lesson: Lesson) -> Iterator[str]:
    """No path of the machine on which it ran, in text, code or stored outputs."""
    for cell in lesson.nb.cells:
        if found := MACHINE_PATH.search("\n".join([cell.source, *written(cell)])):
            yield f"{where(lesson, cell)}: {found[0]}"


def imports_only_earlier_lessons(lesson: Lesson) -> Iterator[str]:
    """A reader who goes from lesson to lesson never meets a part that is not yet built.

    The library's notebooks are no lessons and have no turn; a lesson may use those of its own
    floor and below.
    """
    if not lesson.numbered:
        return
    course = lesson.course
    before = course.lessons[: course.lessons.index(lesson)]
    library = [nb for nb in course.notebooks if not nb.numbered and nb.floor <= lesson.floor]
    known = {f"skylar.{nb.module}" for nb in before + library} | {"skylar.viz", "skylar"}
    added = [c.source for c in lesson.code if appended_modules([c.source])]
    own = {pair for source in added for pair in imported(source)
           if pair[0] == f"skylar.{lesson.module}"}  # what it adds elsewhere may use its module
    for module, name in [pair for pair in lesson.imports if pair not in own]:
        if not re.match(r"skylar\b|\.", module):
            continue
        if module not in known and f"{module}.{name}" not in known:
            yield (
                f"{lesson.name}: imports {module}, which neither an earlier lesson nor a library"
                " notebook of its floor exports"
            )


def has_no_star_imports(lesson: Lesson) -> Iterator[str]:
    yield from (
        f"{lesson.name}: from {module} import *" for module, name in lesson.imports if name == "*"
    )


def is_hidden(cell: NotebookNode) -> bool:
    return bool(cell.metadata.get("jupyter", {}).get("source_hidden"))


def has_exercises(lesson: Lesson) -> Iterator[str]:
    """At least two exercises, each with a hidden solution that runs the reader's own check."""
    if not lesson.numbered:
        return
    checks = {m for c in lesson.code for m in re.findall(r"^def (check_\w+)\(", c.source, re.M)}
    solved = {
        m
        for c in lesson.code
        if is_hidden(c)
        for m in re.findall(r"^(check_\w+)\(", c.source, re.M)
    }
    offered = {m for c in lesson.code for m in re.findall(r"^# ?(check_\w+)\(", c.source, re.M)}
    complete = checks & solved & offered
    if len(complete) < 2:
        yield (
            f"{lesson.name}: {len(complete)} exercises (of at least 2) have a `def check_x`, a"
            " skeleton that offers `# check_x(...)`, and a hidden solution that calls check_x"
        )


# --- rules about lessons that are rewritten: everyone that is not on the list ---


def is_solution(cell: NotebookNode) -> bool:
    return "solution" in cell.metadata.get("tags", []) or cell.source.startswith("# Solution")


def prose(markdown: str) -> str:
    """What is read as sentences: no code, maths, tables, tags and addresses of links."""
    return NO_PROSE.sub(" ", FENCE.sub(" ", markdown))


def is_short(lesson: Lesson) -> Iterator[str]:
    """Cells, lines of a cell, words, columns and kB. Two topics are two lessons."""
    cells = [cell for cell in lesson.nb.cells if cell.source.strip()]
    words = sum(len(prose(c.source).split()) for c in cells if c.cell_type == "markdown")
    kb = lesson.path.stat().st_size / 1000
    for n, limit, what in (
        (len(cells), LESSON_CELLS, "cells"),
        (words, LESSON_WORDS, "words of prose"),
        (round(kb), LESSON_KB, "kB"),
    ):
        if n > limit:
            yield f"{lesson.name}: {n} {what}, the limit is {limit}"
    for cell in lesson.code:
        lines = cell.source.splitlines()
        if len(lines) > LESSON_CELL_LINES:
            yield f"{where(lesson, cell)}: {len(lines)} lines, the limit is {LESSON_CELL_LINES}"
        if (longest := max(map(len, lines))) > LESSON_COLUMNS:
            yield f"{where(lesson, cell)}: a line of {longest} columns"


def has_schematics(lesson: Lesson) -> Iterator[str]:
    """Cells that draw with skylar.viz's Schematic or architecture, and store what they drew."""
    drawn = [
        cell
        for cell in lesson.code
        if SCHEMATIC.search(cell.source)
        and any(PICTURES & output.get("data", {}).keys() for output in cell.outputs)
    ]
    if len(drawn) < MIN_SCHEMATICS:
        yield f"{lesson.name}: {len(drawn)} schematics, {MIN_SCHEMATICS} are wanted"


def asks_the_reader(lesson: Lesson) -> Iterator[str]:
    """**Your turn** or **Predict**, then the reader's code cell, before the exercises."""
    cells = lesson.nb.cells
    end = next((i for i, c in enumerate(cells) if c.source.startswith("## Exercises")), len(cells))
    turns = [i for i, c in enumerate(cells[:end])
             if c.cell_type == "markdown" and TURN.search(c.source)]
    if len(turns) < MIN_TURNS:
        yield f"{lesson.name}: {len(turns)} cells with **Your turn** or **Predict** in the text"
    for i in turns:
        if i + 1 == len(cells) or cells[i + 1].cell_type != "code":
            yield f"{where(lesson, cells[i])}: no code cell for the reader's part follows"


def solutions_come_last(lesson: Lesson) -> Iterator[str]:
    """One closed section, so that no answer is seen beside its question."""
    cells = lesson.nb.cells
    starts = [i for i, c in enumerate(cells)
              if c.cell_type == "markdown" and SOLUTIONS.match(c.source)]
    if len(starts) != 1:
        yield f"{lesson.name}: {len(starts)} cells begin with '## Solutions', one is wanted"
        return
    after = cells[starts[0] + 1 :]
    if any(c.cell_type == "markdown" and SECTION.search(FENCE.sub("", c.source)) for c in after):
        yield f"{lesson.name}: a section follows '## Solutions'"
    for cell in filter(is_solution, cells[: starts[0]]):
        yield f"{where(lesson, cell)}: a solution before the section '## Solutions'"
    solved = "\n".join(c.source for c in after if c.cell_type == "code")
    for check in sorted({m for c in lesson.code
                         for m in re.findall(r"^# ?(check_\w+)\(", c.source, re.M)}):
        for call in (f"{check}(", f"rejects({check},"):
            if not re.search(f"^{re.escape(call)}", solved, re.M):
                yield f"{lesson.name}: no solution calls {call}...)"
    for cell in after:
        if cell.cell_type == "code" and not (
            is_hidden(cell) and "solution" in cell.metadata.get("tags", [])
            and re.match(r"# Solution: check_\w+", cell.source)
        ):
            yield (f"{where(lesson, cell)}: a solution begins with '# Solution: check_x', has the"
                   ' tag "solution" and {"jupyter": {"source_hidden": true}}')


def has_few_exercises(lesson: Lesson) -> Iterator[str]:
    offered = {m for c in lesson.code for m in re.findall(r"^# ?(check_\w+)\(", c.source, re.M)}
    if len(offered) not in EXERCISES:
        yield f"{lesson.name}: {len(offered)} exercises, 2 to 4 are wanted"


def uses_standard_terms(lesson: Lesson) -> Iterator[str]:
    """No retired word in text, headings, labels and code (the lists are in test_names.py)."""
    for cell in lesson.nb.cells:
        look = retired_in_lesson if cell.cell_type == "code" else retired_in_text
        for line, old, new in dict.fromkeys(look(cell.source)):
            yield f"{where(lesson, cell)} line {line}: {old!r} -> {new}"


def prose_is_typed(lesson: Lesson) -> Iterator[str]:
    """`Markdown(f"...")` is text that no reader of the source can read; assert what it says."""
    for cell in lesson.code:
        python = re.sub(r"(?m)^(\s*)[%!].*$", r"\1pass", cell.source)
        calls = (n for n in ast.walk(ast.parse(python)) if isinstance(n, ast.Call))
        names = ((getattr(n.func, "id", getattr(n.func, "attr", "")), n.args) for n in calls)
        for name, args in names:
            sums = [arg.left if isinstance(arg, ast.BinOp) else arg for arg in args]
            if name == "Markdown" and any(isinstance(arg, ast.JoinedStr) for arg in args + sums):
                yield f"{where(lesson, cell)}: prose from an f-string"


COURSE_RULES: list[Callable] = [
    names_are_unique,
    numbers_are_unique,
    modules_are_unique,
    additions_go_to_earlier_modules,
    modules_shadow_nothing,
    modules_are_fresh,
    chapter_fits_its_budget,
]
LESSON_RULES: list[Callable] = [
    module_names_lesson,
    first_cell_names_module,
    is_introduced,
    states_its_time,
    ran_in_order,
    has_no_errors,
    stores_no_widgets,
    merges_streams,
    cells_are_short,
    code_fits_the_page,
    is_small,
    names_no_machine,
    imports_only_earlier_lessons,
    has_no_star_imports,
    has_exercises,
]
REWRITTEN_RULES: list[Callable] = [
    is_short,
    has_schematics,
    asks_the_reader,
    solutions_come_last,
    has_few_exercises,
    uses_standard_terms,
    prose_is_typed,
]
ALL_RULES = COURSE_RULES + LESSON_RULES + REWRITTEN_RULES


def complaints(course: Course, rule: Callable) -> list[str]:
    if rule in COURSE_RULES:
        return list(rule(course))
    held = course.notebooks if rule in LESSON_RULES else course.rewritten
    return [text for lesson in held for text in rule(lesson)]


def no_longer_needed(course: Course, listed: set[str]) -> list[str]:
    """Names on the list of lessons to rewrite that are gone, or keep all rules."""
    lessons = {lesson.path.relative_to(course.root / "nbs").with_suffix("").as_posix(): lesson
               for lesson in course.lessons}
    gone = [f"{name} is no lesson" for name in sorted(listed - lessons.keys())]
    return gone + [
        f"{name} keeps all rules" for name in sorted(listed & lessons.keys())
        if not any(text for rule in REWRITTEN_RULES for text in rule(lessons[name]))
    ]


@pytest.fixture(scope="module")
def course() -> Course:
    return Course(ROOT)


@pytest.mark.parametrize("rule", ALL_RULES, ids=lambda rule: rule.__name__)
def test_rule(course, rule):
    assert course.lessons and course.rewritten, "no lesson found"
    found = complaints(course, rule)
    assert not found, "\n".join(found)


def test_lessons_on_the_list_still_need_it(course):
    found = no_longer_needed(course, NOT_YET_REWRITTEN)
    assert not found, "take off NOT_YET_REWRITTEN:\n" + "\n".join(found)


# --- each rule is able to fail ---

SETTINGS = (
    "[lessons]\nlesson_seconds = 60\nchapter_seconds = 100\nnotebook_kb = 20\ncode_columns = 88\n"
)
FIRST = """# {title}

> One line

| | |
|---|---|
| **You will build** | it |
| **You need** | nothing |
| **Runs in** | about 20 s on two CPU cores |
| **Exports** | `skylar/{path}.py` |"""
EXERCISE = """%% def check_{n}(f):
    assert f() == {n}
%% def mine(): ...
# check_{n}(mine)"""
SOLUTION = """# Solution: check_{n}
check_{n}(lambda: {n})
rejects(check_{n}, lambda: 0)"""
TURNS = ("**Your turn**: what is one and one?", "**Predict** the sum.")


def small_lesson(title: str, module: str, *extra: str) -> NotebookNode:
    """A notebook that keeps every rule; `extra` are more code cells.

    In order: the box, code cells, two turns with their cells, four drawings, two exercises, what
    was learned, the solutions.
    """
    cells = [new_markdown_cell(FIRST.format(title=title, path=module.replace(".", "/")))]
    cells += map(new_code_cell, (f"#| default_exp {module}", "#| export\nx = 1", *extra))
    for turn in TURNS:
        cells += [new_markdown_cell(turn), new_code_cell("answer = ...")]
    for n in range(4):
        cells.append(new_code_cell(f"s = Schematic({n}, 1)\ns"))
        cells[-1].outputs = [new_output("execute_result", data={"image/png": "="})]
    cells.append(new_markdown_cell("## Exercises"))
    for n in (1, 2):
        sources = EXERCISE.format(n=n).split("%%")
        cells += [new_code_cell(s.strip()) for s in sources if s.strip()]
    cells += [new_markdown_cell("## You can now explain"), new_markdown_cell("## Solutions")]
    hidden = {"jupyter": {"source_hidden": True}, "tags": ["solution"]}
    cells += [new_code_cell(SOLUTION.format(n=n), metadata=dict(hidden)) for n in (1, 2)]
    for count, cell in enumerate((c for c in cells if c.cell_type == "code"), start=1):
        cell.execution_count = count
        for output in cell.outputs:
            output.execution_count = count
    return new_notebook(cells=cells)


class Sandbox:
    """A good course of two lessons and two library notebooks, to be broken in one place."""

    def __init__(self, root: Path):
        self.root = root
        self.write("settings.ini", SETTINGS)
        shutil.copy(ROOT / "pyproject.toml", root)
        self.one, self.two = "nbs/00_a/00_one.ipynb", "nbs/00_a/01_two.ipynb"
        self.save(self.one, small_lesson("One", "layers.one"))
        self.files, self.runs = "nbs/library/files.ipynb", "nbs/library/runs.ipynb"
        two = (
            "from skylar.layers.one import x",
            "from skylar.utils.files import x as y",
            "#| export layers.one\nz = 1",
        )
        self.save(self.two, small_lesson("Two", "layers.two", *two))
        self.save(self.files, small_lesson("Files", "utils.files"))
        self.save(self.runs, small_lesson("Runs", "training.runs"))
        for module, name in (
            ("layers.one", self.one),
            ("layers.two", self.two),
            ("utils.files", self.files),
            ("training.runs", self.runs),
        ):
            self.module(module, name)
        self.measure({self.one: 10.0, self.two: 19.5})

    def write(self, name: str, text: str) -> None:
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text(text)

    def save(self, name: str, nb: NotebookNode) -> None:
        self.write(name, nbformat.writes(nb))

    def module(self, module: str, lesson: str) -> None:
        head = f"# AUTOGENERATED! DO NOT EDIT! File to edit: ../../{lesson}.\n"
        self.write(f"skylar/{module.replace('.', '/')}.py", head)

    def measure(self, seconds: dict[str, float]) -> None:
        rows = [{"lesson": name, "seconds": s} for name, s in seconds.items()]
        self.write("bench/results/lessons.json", json.dumps({"rows": rows}))

    def edit(self, change: Callable[[NotebookNode], None], name: str | None = None) -> None:
        name = name or self.two
        nb = nbformat.read(self.root / name, as_version=4)
        change(nb)
        self.save(name, nb)

    def replace(self, cell: int, old: str, new: str) -> None:
        def change(nb):
            assert old in nb.cells[cell].source, "the fixture has changed: this would break nothing"
            nb.cells[cell].source = nb.cells[cell].source.replace(old, new)

        self.edit(change)

    def output(self, cell: int, *args, **kwargs) -> None:
        self.edit(lambda nb: nb.cells[cell].outputs.append(new_output(*args, **kwargs)))


@pytest.fixture
def sandbox(tmp_path) -> Sandbox:
    return Sandbox(tmp_path)


def drop_solution(nb: NotebookNode) -> None:
    nb.cells[-1].metadata = {}


def at(nb: NotebookNode, start: str) -> int:
    """Index of the first cell that begins so."""
    return next(i for i, cell in enumerate(nb.cells) if cell.source.startswith(start))


def change(start: str, **parts) -> Callable[[Sandbox], None]:
    """Breaks the first cell that begins so: `source`, `outputs`, `metadata`."""
    return lambda s: s.edit(lambda nb: nb.cells[at(nb, start)].update(parts))


def insert(cell: NotebookNode, before: str | None = None) -> Callable[[Sandbox], None]:
    """One cell more, before the one that begins so, or at the end."""
    return lambda s: s.edit(
        lambda nb: nb.cells.insert(at(nb, before) if before else len(nb.cells), cell))


def large(kb: int) -> Callable[[Sandbox], None]:
    return lambda s: s.output(2, "stream", text="a" * 1000 * kb)


BREAK: list[tuple[Callable, Callable[[Sandbox], None]]] = [
    (names_are_unique, lambda s: s.save("nbs/01_b/07_two.ipynb", new_notebook())),
    (numbers_are_unique, lambda s: s.save("nbs/00_a/01_x.ipynb", small_lesson("X", "layers.x"))),
    (modules_are_unique, lambda s: s.save("nbs/00_a/02_x.ipynb", small_lesson("X", "layers.two"))),
    (additions_go_to_earlier_modules, lambda s: s.replace(5, "layers.one", "training.runs")),
    (additions_go_to_earlier_modules, lambda s: s.replace(5, "layers.one", "layers.nowhere")),
    (modules_shadow_nothing, lambda s: s.save("nbs/00_a/02_x.ipynb", small_lesson("X", "layers"))),
    (modules_are_fresh, lambda s: s.module("layers.gone", s.two)),
    (modules_are_fresh, lambda s: s.save("nbs/00_a/02_x.ipynb", small_lesson("X", "layers.x"))),
    (chapter_fits_its_budget, lambda s: s.measure({s.one: 60.0, s.two: 50.0})),
    (module_names_lesson, lambda s: s.module("layers.two", s.one)),
    (first_cell_names_module, lambda s: s.replace(0, "skylar/layers/two.py", "nothing")),
    (is_introduced, lambda s: s.replace(0, "> One line", "One line")),
    (is_introduced, lambda s: s.replace(0, "**You need**", "**Needs**")),
    (states_its_time, lambda s: s.replace(0, "about 20 s", "a while")),
    (states_its_time, lambda s: s.replace(0, "about 20 s", "about 61 s")),
    (states_its_time, lambda s: s.measure({s.two: 20.5})),
    (ran_in_order, lambda s: s.edit(lambda nb: nb.cells[2].update(execution_count=3))),
    (ran_in_order, lambda s: s.edit(lambda nb: nb.cells[-1].update(execution_count=None))),
    (has_no_errors, lambda s: s.output(2, "error", ename="ValueError", evalue="no", traceback=[])),
    (has_no_errors, lambda s: s.output(2, "stream", name="stderr", text="UserWarning: slow")),
    (stores_no_widgets, lambda s: s.output(2, "display_data", data={WIDGET: {"model_id": "1"}})),
    (stores_no_widgets, lambda s: s.edit(lambda nb: nb.metadata.update(widgets={}))),
    (merges_streams, lambda s: [s.output(2, "stream", text=t) for t in ("Ju", "liet")]),
    (cells_are_short, lambda s: s.replace(2, "x = 1", "x = 1\n" * 60)),
    (code_fits_the_page, lambda s: s.replace(2, "x = 1", f"x = '{'a' * 84}'")),
    (is_small, lambda s: s.output(2, "stream", text="a" * 20_000)),
    (names_no_machine, lambda s: s.output(2, "stream", text="saved in /tmp/abc/model.pt")),
    (
        names_no_machine,
        lambda s: s.output(2, "display_data", data={"text/html": "<a href='/root/x'>x</a>"}),
    ),
    (names_no_machine, lambda s: s.replace(2, "x = 1", "x = open('/work/x')")),
    (
        imports_only_earlier_lessons,
        lambda s: s.replace(3, "skylar.layers.one", "skylar.layers.two"),
    ),
    (imports_only_earlier_lessons, lambda s: s.replace(3, "from skylar.layers.one", "from .one")),
    (
        imports_only_earlier_lessons,
        lambda s: s.replace(3, "skylar.layers.one import x", "skylar.models import y"),
    ),
    (
        imports_only_earlier_lessons,
        lambda s: s.replace(4, "skylar.utils.files", "skylar.training.runs"),
    ),
    (has_no_star_imports, lambda s: s.replace(3, "import x", "import *")),
    (has_exercises, lambda s: s.edit(drop_solution)),
    (has_exercises, lambda s: s.replace(-1, "check_2(lambda", "print(lambda")),
    (is_short, lambda s: s.replace(2, "x = 1", "x = 1\n" * 30)),
    (is_short, lambda s: s.replace(2, "x = 1", f"x = '{'a' * 84}'")),
    (is_short, lambda s: s.edit(lambda nb: nb.cells.extend(map(new_code_cell, ["x"] * 70)))),
    (is_short, insert(new_markdown_cell("word " * 2_100))),
    (is_short, large(300)),
    (has_schematics, change("s = Schematic(2", outputs=[])),
    (has_schematics, change("s = Schematic(2", source="s = draw(2)")),
    (asks_the_reader, change("**Predict**", source="Predict it.")),
    (asks_the_reader, insert(new_markdown_cell("**Your turn**"), "## Exercises")),
    (solutions_come_last, change("## Solutions", source="## Answers")),
    (solutions_come_last, insert(new_markdown_cell("## Solutions"))),
    (solutions_come_last, insert(new_markdown_cell("## More"))),
    (solutions_come_last, insert(new_code_cell("# Solution: check_1"), "## You can")),
    (solutions_come_last, insert(new_code_cell("print(1)"))),
    (solutions_come_last, change("# Solution: check_2", metadata={"tags": ["solution"]})),
    (solutions_come_last, lambda s: s.replace(-1, "rejects(check_2", "print(check_2")),
    (has_few_exercises, change("def mine(): ...\n# check_2", source="def mine(): ...")),
    (uses_standard_terms, change("**Predict**", source="**Predict** who is heard.")),
    (uses_standard_terms, lambda s: s.replace(2, "x = 1", "x = 1  # the oracle")),
    (uses_standard_terms, lambda s: s.replace(2, "x = 1", "x = 'share of attention'")),
    (prose_is_typed, lambda s: s.replace(2, "x = 1", "display(Markdown(f'it is {x}'))")),
    (prose_is_typed, lambda s: s.replace(2, "x = 1", "Markdown(\n    'a' f'{x}'\n)")),
]


def test_good_course_keeps_every_rule(sandbox):
    course = Course(sandbox.root)
    assert not [text for rule in ALL_RULES for text in complaints(course, rule)]


def test_a_name_on_the_list_that_needs_no_place_there_is_noticed(sandbox):
    course, names = Course(sandbox.root), {"00_a/00_one", "00_a/99_gone"}
    wanted = ["00_a/99_gone is no lesson", "00_a/00_one keeps all rules"]
    assert no_longer_needed(course, names) == wanted
    sandbox.edit(lambda nb: nb.cells.pop(-1))
    assert no_longer_needed(Course(sandbox.root), {"00_a/01_two"}) == []


def test_lessons_on_the_list_may_break_the_new_rules(sandbox, monkeypatch):
    sandbox.replace(2, "x = 1", "x = 1\n" * 30)
    monkeypatch.setattr(sys.modules[__name__], "NOT_YET_REWRITTEN", {"00_a/01_two"})
    assert not complaints(Course(sandbox.root), is_short)


def test_the_template_keeps_every_rule(sandbox):
    """As a lesson of the small course, which has what it imports."""
    sandbox.write("settings.ini", SETTINGS.replace("notebook_kb = 20", "notebook_kb = 300"))
    template = nbformat.read(ROOT / "docs" / "template" / "lesson.ipynb", as_version=4)
    for name, module in (("held_out", "data.held_out"), ("lesson", "utils.lesson")):
        sandbox.save(f"nbs/library/{name}.ipynb", small_lesson(name, module))
        sandbox.module(module, f"nbs/library/{name}.ipynb")
    sandbox.save("nbs/00_a/02_topic.ipynb", template)
    sandbox.module("layers.topic", "nbs/00_a/02_topic.ipynb")
    course = Course(sandbox.root)
    assert course.lessons[-1].rewritten
    found = [text for rule in ALL_RULES for text in complaints(course, rule)]
    assert not found, "\n".join(found)


def test_what_counts_as_prose():
    text = "one [two](a/b.ipynb) $x$ <details>three</details>\n\n| four |\n\n```python\nfive\n```"
    assert prose(text).replace("[", "").split() == ["one", "two", "three"]


@pytest.mark.parametrize(("rule", "damage"), BREAK, ids=[rule.__name__ for rule, _ in BREAK])
def test_rule_can_fail(sandbox, rule, damage):
    damage(sandbox)
    assert complaints(Course(sandbox.root), rule)


def test_every_rule_is_shown_to_fail():
    assert {rule for rule, _ in BREAK} == set(ALL_RULES)


# --- how lessons are executed and stored ---


def test_streams_are_merged():
    pieces = [("stdout", "Ju"), ("stdout", "liet"), ("stderr", "!"), ("stdout", "a"), (None, "x")]
    outputs = [new_output("stream", name=name, text=text) if name
               else new_output("display_data", data={"text/plain": text}) for name, text in pieces]
    cell = new_code_cell("print()", outputs=[*outputs, new_output("stream", text="b")])
    (cell,) = runner.tidy(new_notebook(cells=[cell])).cells
    assert [o.get("text") for o in cell.outputs] == ["Juliet", "!", "a", None, "b"]


COUNTS = "runs = globals().get('runs', 0) + 1\nassert runs == 1, f'run {runs}'"
CHECKS = ["def check_one(f):\n    assert {}", "def one(): ...\n# check_one(one)"]
RUNS = {  # name of a lesson -> (its cells, what must be said about it)
    "00_transformer/00_text": ([COUNTS], None),  # on the list: runs once
    "00_a/00_counts": ([COUNTS], "this cell's second run in one kernel"),
    "00_a/01_weak": ([CHECKS[0].format("f() is None"), CHECKS[1]], "accepts the skeleton"),
    "00_a/02_good": ([CHECKS[0].format("f() == 1"), CHECKS[1], "import math"], None),
    "library/counts": ([COUNTS], None),
}


def test_rewritten_lessons_run_twice_and_checks_refuse_skeletons(tmp_path):
    for name, (sources, _) in RUNS.items():
        path = tmp_path / f"{name}.ipynb"
        path.parent.mkdir(exist_ok=True)
        nbformat.write(new_notebook(cells=list(map(new_code_cell, sources))), path)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "--noconftest",
               f"--rootdir={tmp_path}", tmp_path]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    summary = re.findall(r"^FAILED \S*?(\w+/\w+)\.ipynb::", done.stdout, re.M)
    assert sorted(summary) == sorted(name for name, (_, said) in RUNS.items() if said), done.stdout
    assert all(said in done.stdout for _, said in RUNS.values() if said)
    assert "run 2" in done.stdout and "3 passed" in done.stdout


def test_long_lessons_run_once_unless_asked():
    spec = importlib.util.spec_from_file_location("root_conftest", ROOT / "conftest.py")
    root = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(root)
    rows = json.loads((ROOT / "bench/results/lessons.json").read_text(encoding="utf-8"))["rows"]
    written = [row for row in rows if re.search(r"/\d\d_", row["lesson"])
               and row["lesson"][4:-6] not in NOT_YET_REWRITTEN]
    longest = max(written, key=lambda row: row["seconds"])
    path = ROOT / longest["lesson"]
    assert root.seconds(path) == longest["seconds"] > root.TWICE_UP_TO
    assert root.seconds(ROOT / "nbs/00_transformer/nowhere.ipynb") == 0
    for again, n_runs in ((False, 1), (True, 2)):
        nb = new_notebook(cells=[new_code_cell("1")])
        root.prepare(nb, path, set(), again)
        assert len(nb.cells) == n_runs
