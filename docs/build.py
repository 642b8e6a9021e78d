"""Build the website from the same notebooks that JupyterLab opens.

    python docs/build.py              # from the stored outputs: under a minute
    python docs/build.py --execute    # runs every lesson again first
    python docs/build.py --out DIR    # default: _docs

Works without a network once `npm install --prefix docs` has fetched MathJax and mermaid.
"""

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
from fastcore.nbio import dict2nb
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
NBS, SRC = ROOT / "nbs", DOCS / "_src"
sys.path[:0] = [str(DOCS), str(ROOT / "tools"), str(ROOT / "tools" / "nbdev_commands")]

import api  # noqa: E402
import lessons  # noqa: E402
from nbdev_commands import appended_modules, own_module  # noqa: E402

from skylar.cli.lesson import exercises, is_solution  # noqa: E402

VENDOR = {  # in node_modules -> in _static/vendor
    "mathjax/es5/tex-mml-chtml.js": "mathjax/tex-mml-chtml.js",
    "mathjax/es5/output/chtml/fonts": "mathjax/output/chtml/fonts",
    "mermaid/dist/mermaid.esm.min.mjs": "mermaid/mermaid.esm.min.mjs",
    "mermaid/dist/chunks/mermaid.esm.min": "mermaid/chunks/mermaid.esm.min",
}
LEFT_OUT = {"hide", "default_exp", "exporti"}  # nbdev directives of cells that readers do not need
DIRECTIVE = re.compile(r"^[ \t]*#\|.*\n?", re.M)
WIDGET = re.compile(r"(?:^|[^.\w])(?:interact|interactive_output|slider)\(|@interact\b")
NOTE = "*In JupyterLab this cell shows a control to move; a web page has no kernel to answer it.*"
LINK = re.compile(r"\[([^\]]+)\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)")
CLOSED = "<details><summary>Show the explanation</summary>\n\n{}\n\n</details>"
MODULE = re.compile(r"`skylar/([\w/]+)\.py`")


def copy_vendor(modules: Path, out: Path) -> None:
    """Copy what the pages load; one line of advice where npm has not been run."""
    missing = [name for name in VENDOR if not (modules / name).exists()]
    if missing:
        sys.exit(f"docs/node_modules lacks {missing[0]}: run `npm install --prefix docs` first")
    for source, target in VENDOR.items():
        (out / target).parent.mkdir(parents=True, exist_ok=True)
        if (modules / source).is_dir():
            ignore = shutil.ignore_patterns("*.map")
            shutil.copytree(modules / source, out / target, ignore=ignore)
        else:
            shutil.copy(modules / source, out / target)


def web_links(text: str, path: Path) -> str:
    """Links to pages of the site stay; links to other files of the repository become plain text."""

    def replace(match: re.Match) -> str:
        target = (path.parent / match[2]).resolve()
        on_site = target.suffix == ".ipynb" and target.is_relative_to(NBS) and target.exists()
        return match[0] if on_site else match[1]

    return LINK.sub(replace, text)


def module_links(text: str, depth: int) -> str:
    """`skylar/layers/attention.py` leads to the page of that module."""

    def replace(match: re.Match) -> str:
        page = match[1].replace("/", ".").removesuffix(".__init__")
        known = (ROOT / "skylar" / f"{match[1]}.py").exists()
        return f"[{match[0]}]({'../' * depth}api/{page}.md)" if known else match[0]

    return MODULE.sub(replace, text)


def tidy_code(cell: NotebookNode, exercises: dict[str, str]) -> list[NotebookNode]:
    """A code cell for the web: no directive lines, collapsed where JupyterLab collapses it."""
    cell.source = DIRECTIVE.sub("", cell.source).strip("\n")
    cell.outputs = lessons.merge_streams(cell.outputs)
    if is_solution(cell):
        close_solution(cell, exercises)
    elif cell.metadata.get("jupyter", {}).get("source_hidden"):
        cell.metadata["tags"] = [*cell.metadata.get("tags", []), "hide-input"]
    note = [new_markdown_cell(NOTE)] if WIDGET.search(cell.source) else []
    return [cell, *note] if cell.source or cell.outputs else []


def close_solution(cell: NotebookNode, exercises: dict[str, str]) -> None:
    """Code and output of a solution in one closed box that says whose solution it is."""
    checks = re.findall(r"^(check_\w+)\(", cell.source, re.M)
    of = next((f" of: {exercises[check]}" for check in checks if check in exercises), "")
    cell.metadata["tags"] = sorted({*cell.metadata.get("tags", []), "solution", "hide-cell"})
    cell.metadata["mystnb"] = {
        f"code_prompt_{do}": f"{do.capitalize()} the solution{of}" for do in ("show", "hide")
    }


def for_the_web(nb: NotebookNode, path: Path) -> NotebookNode:
    """The notebook without what only nbdev needs, its links leading to pages of the site."""
    depth = len(path.relative_to(NBS).parts) - 1
    titles = {exercise.check: exercise.title for exercise in exercises(nb)}
    cells = []
    for cell, parsed in zip(nb.cells, dict2nb(nbformat.from_dict(nb)).cells):
        if cell.cell_type == "code":
            if not LEFT_OUT & parsed.directives.keys():
                cells += tidy_code(cell, titles)
        else:
            cell.source = module_links(web_links(cell.source, path), depth)
            if is_solution(cell):
                cell.source = CLOSED.format(cell.source)
            cells.append(cell)
    nb.cells = cells
    nb.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}  # `!command`
    return nb


def toctree(caption: str, pages: list[str]) -> NotebookNode:
    lines = ["```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```"]
    return new_markdown_cell("\n".join(lines))


def chapter_title(folder: str) -> str:
    """`00 transformer` for 00_transformer, `Library` for library."""
    number, _, name = folder.partition("_")
    return f"{number} {name.replace('_', ' ')}" if number.isdigit() else folder.capitalize()


def menu_entry(page: str, nb: NotebookNode) -> str:
    """`05 Attention <00_transformer/05_attention>`: a lesson's number and its title."""
    title = re.match(r"# (?:\d+\W+)?(.*)", nb.cells[0].source)[1]
    number = re.match(r"\d*", Path(page).name)[0]
    return f"{number} {title} <{page}>".strip()


def navigation(notebooks: dict[str, NotebookNode], modules: list[str]) -> list[NotebookNode]:
    """Hidden tables of contents on the home page: a chapter each, the rest, the modules."""
    groups: dict[str, list[str]] = {}
    for page, nb in notebooks.items():
        if page != "index":
            folder = page.rpartition("/")[0]
            caption = chapter_title(folder) if folder else "Beside the lessons"
            groups.setdefault(caption, []).append(menu_entry(page, nb))
    trees = [toctree(caption, entries) for caption, entries in groups.items()]
    return [*trees, toctree("Modules", [f"api/{name}" for name in modules])]


def write_sources(execute: bool) -> None:
    """Everything Sphinx reads, into docs/_src."""
    modules: dict[str, list[str]] = {}  # module -> its notebook, then those that add to it
    notebooks: dict[str, NotebookNode] = {}
    for path in lessons.lessons():
        nb = lessons.tidy(lessons.execute(path)) if execute else nbformat.read(path, as_version=4)
        name = path.relative_to(NBS).as_posix()
        sources = [cell.source for cell in nb.cells if cell.cell_type == "code"]
        for module in filter(None, [own_module(sources), *appended_modules(sources)]):
            modules.setdefault(module.removesuffix(".__init__"), []).append(name)
        notebooks[name.removesuffix(".ipynb")] = for_the_web(nb, path)
    modules = dict(sorted(modules.items()))
    api.write_pages(modules, SRC / "api")
    notebooks["index"].cells += navigation(notebooks, list(modules))
    for name, nb in notebooks.items():
        target = SRC / f"{name}.ipynb"
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nb, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "_docs")
    parser.add_argument("--execute", action="store_true", help="run every lesson first")
    args = parser.parse_args()
    shutil.rmtree(SRC, ignore_errors=True)
    copy_vendor(DOCS / "node_modules", SRC / "_static" / "vendor")
    for name in ("skylar.css", "favicon.svg"):
        shutil.copy(DOCS / name, SRC / "_static")
    shutil.copy(DOCS / "conf.py", SRC)
    write_sources(args.execute)
    html = SRC / "_build" / "html"
    sphinx = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html"]
    if subprocess.run([*sphinx, "-d", SRC / "_build" / "doctrees", SRC, html]).returncode:
        sys.exit("the site has mistakes, named above")
    shutil.rmtree(args.out, ignore_errors=True)
    shutil.move(html, args.out)
    print(f"open {args.out / 'index.html'}")


if __name__ == "__main__":
    main()
