"""`nbdev_export` for a course: notebooks in reading order, appending only to earlier modules.

nbdev's own command goes by bare file name over all folders. `#| export layers.norm` in
01_b/00_x.ipynb would then be written before 00_a/05_y.ipynb makes `layers.norm` anew, and be lost
without a message. Here a notebook follows all that a reader has read before it.
"""

import argparse
import os
import re
import sys
from contextlib import chdir
from pathlib import Path

DEFAULT_EXP = re.compile(r"^#\|\s*default_exp[ \t]+(\S+)", re.M)
APPEND = re.compile(r"^#\|\s*export[is]?[ \t]+(\S+)", re.M)


def notebooks(nbs: Path) -> list[Path]:
    "Every notebook below `nbs` in reading order: chapters, library, then what lies beside them."
    found = (p for p in nbs.rglob("*.ipynb") if not any(s[0] in "._" for s in parts(p, nbs)))
    return sorted(found, key=lambda p: (p.parent == nbs, p.relative_to(nbs).as_posix()))


def parts(path: Path, nbs: Path) -> tuple[str, ...]:
    "Folders and file of a notebook, as seen from `nbs`."
    return path.relative_to(nbs).parts


def own_module(sources: list[str]) -> str | None:
    "`layers.norm` for `#| default_exp layers.norm`."
    return next((m[1] for source in sources if (m := DEFAULT_EXP.search(source))), None)


def appended_modules(sources: list[str]) -> list[str]:
    "Modules of other notebooks that these cells are added to, each once."
    found = (m for source in sources for m in APPEND.findall(source))
    return [module for module in dict.fromkeys(found) if module != own_module(sources)]


def misplaced(course: list[tuple[str, list[str]]]) -> list[str]:
    "One line for each cell added to a module that no earlier notebook exports."
    modules, lines = set(), []
    for name, sources in course:
        later = [m for m in appended_modules(sources) if m not in modules]
        lines += [f"{name}: adds to {m}, which no earlier notebook exports" for m in later]
        modules.add(own_module(sources))
    return lines


def code_cells(path: Path) -> list[str]:
    from fastcore.nbio import read_nb

    return [cell.source for cell in read_nb(path).cells if cell.cell_type == "code"]


def export(root: Path) -> None:
    "Write the package of the tree `root` from its notebooks; ValueError for a misplaced cell."
    from nbdev.config import add_init, get_config
    from nbdev.doclinks import _build_modidx
    from nbdev.export import nb_export

    with chdir(root):
        config = get_config()
        paths = notebooks(Path(config.nbs_path).resolve())
        names = [path.relative_to(config.nbs_path).as_posix() for path in paths]
        course = list(zip(names, map(code_cells, paths)))
        if lines := misplaced(course):
            raise ValueError("\n".join(lines))
        for path in paths:
            nb_export(path)
        add_init(config.lib_path)
        _build_modidx()


def project(start: Path) -> Path:
    "The folder of the tree that `start` lies in, as git finds its own."
    for folder in (start, *start.parents):
        if (folder / "pyproject.toml").exists() and (folder / "nbs").is_dir():
            return folder
    raise ValueError(f"{start} is not inside a tree with pyproject.toml and nbs/")


def main() -> int:
    argparse.ArgumentParser(prog="nbdev_export", description=__doc__).parse_args()
    if os.environ.get("IN_TEST"):  # a lesson that runs as a test must not rewrite the package
        return 0
    try:
        export(project(Path.cwd()))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
