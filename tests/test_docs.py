"""The website's pages: what a lesson loses and keeps on its way there, and what API pages say."""

import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("nbformat", reason="needs nbformat: pip install -e '.[dev]'")
pytest.importorskip("fastcore", reason="needs nbdev: pip install -e '.[dev]'")

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))  # before an installed `build`

import api  # noqa: E402
import build  # noqa: E402

LESSON = build.NBS / "00_transformer" / "05_attention.ipynb"


def on_the_web(*cells):
    return build.for_the_web(new_notebook(cells=list(cells)), LESSON).cells


def test_directives_and_housekeeping_cells_are_left_out():
    cells = on_the_web(
        new_code_cell("#| default_exp layers.attention"),
        new_code_cell("#| hide\nprint('nbdev only')"),
        new_code_cell("#| export\nx = 1"),
    )
    assert [cell.source for cell in cells] == ["x = 1"]


def test_collapsed_cells_stay_collapsed():
    hidden = new_code_cell("solution = 1", metadata={"jupyter": {"source_hidden": True}})
    (cell,) = on_the_web(hidden)
    assert cell.metadata["tags"] == ["hide-input"]


EXERCISE = [
    new_markdown_cell("### 1. A window (easy, 5 minutes)"),
    new_code_cell("def check_window(f): ..."),
    new_code_cell("def window(): ...\n# check_window(window)"),
]


@pytest.mark.parametrize("source", ["# Solution", "# Solution: check_window"])
def test_solutions_are_closed_with_their_output(source):
    """Code and what it prints, in old lessons and in the section Solutions of new ones."""
    hidden = {"jupyter": {"source_hidden": True}}
    solution = new_code_cell(f"{source}\ncheck_window(len)", metadata=hidden)
    *_, cell = on_the_web(*EXERCISE, new_markdown_cell("## Solutions"), solution)
    assert cell.metadata["tags"] == ["hide-cell", "solution"]
    prompt = "Show the solution of: A window"
    assert cell.metadata["mystnb"]["code_prompt_show"] == prompt


def test_text_of_a_solution_is_closed():
    cell = new_markdown_cell("Because.", metadata={"tags": ["solution"]})
    (cell,) = on_the_web(cell)
    assert cell.source.startswith("<details>") and "Because." in cell.source


@pytest.mark.parametrize(
    "source", ["slider(draw, n=(0, 9))", "@interact\ndef f(n=1): ...", "interact(f)"]
)
def test_controls_are_explained(source):
    assert [cell.source for cell in on_the_web(new_code_cell(source))] == [source, build.NOTE]


def test_ordinary_calls_are_no_controls():
    assert len(on_the_web(new_code_cell("page.slider(1)\nmy_interact(2)"))) == 1


def test_a_chat_is_no_token_a_line():
    outputs = [new_output("stream", text=piece) for piece in ("Ju", "liet", "!")]
    (cell,) = on_the_web(new_code_cell("chat()", outputs=outputs))
    assert [output.text for output in cell.outputs] == ["Juliet!"]


def test_links_lead_to_pages_of_the_site():
    text = (
        "[next](05_attention.ipynb) [site](https://example.com) [guide](../../README.md) [top](#x)"
    )
    (cell,) = on_the_web(new_markdown_cell(text))
    assert cell.source == "[next](05_attention.ipynb) [site](https://example.com) guide [top](#x)"


def test_modules_lead_to_their_pages():
    (cell,) = on_the_web(new_markdown_cell("`skylar/layers/attention.py` `skylar/no/such.py`"))
    page = "[`skylar/layers/attention.py`](../api/layers.attention.md)"
    assert cell.source == f"{page} `skylar/no/such.py`"


def test_one_line_of_advice_without_npm(tmp_path):
    with pytest.raises(SystemExit, match="run `npm install --prefix docs` first"):
        build.copy_vendor(tmp_path, tmp_path / "out")


class Sample:
    "A sample."

    def __init__(
        self,
        size: int,  # how many
        *,
        name: str | None = None,  # what a | b is called
        **options: float,  # passed on
    ): ...

    def forward(self, x: int) -> int:  # twice as many
        return 2 * x

    def _private(self): ...


def test_api_page_has_signature_docstring_and_parameters():
    text = "\n\n".join(api.entry("Sample", Sample))
    assert "Sample(size, *, name=None, **options)" in text
    assert "A sample." in text
    assert "| `size` | `int` |  | how many |" in text
    assert "| `name` | `str \\| None` | `None` | what a \\| b is called |" in text
    assert "| `options` | `float` |  | passed on |" in text
    assert "### forward" in text and "| returns | `int` | twice as many |" in text
    assert "_private" not in text


def test_api_page_of_a_real_module():
    from skylar.layers import attention

    text = api.page(attention, ["00_transformer/05_attention.ipynb", "01_b/00_more.ipynb"])
    assert text.startswith("# skylar.layers.attention")
    first = "[05_attention](../00_transformer/05_attention.ipynb)"
    assert f"measured in {first}, [00_more](../01_b/00_more.ipynb)." in text
    assert all(f"## {name}\n" in text for name in attention.__all__)


@pytest.mark.parametrize(
    ("page", "entry"),
    [
        ("00_transformer/05_attention", "05 Attention <00_transformer/05_attention>"),
        ("library/files", "Attention <library/files>"),
        ("cli", "Attention <cli>"),
    ],
)
def test_menu_entries(page, entry):
    nb = new_notebook(cells=[new_markdown_cell("# Attention\n\n> One line")])
    assert build.menu_entry(page, nb) == entry


def test_folders_have_titles():
    titles = [build.chapter_title(name) for name in ("00_transformer", "01_gqa_rope", "library")]
    assert titles == ["00 transformer", "01 gqa rope", "Library"]


def test_every_notebook_and_every_module_has_a_page(site):
    """`site` builds the whole with warnings as errors."""
    pages = [path.relative_to(build.NBS) for path in build.lessons.lessons()]
    assert not [page for page in pages if not (site / page).with_suffix(".html").exists()]
    modules = {path.stem for path in (site / "api").glob("*.html")}
    exported = {
        ".".join(path.relative_to(ROOT / "skylar").with_suffix("").parts)
        for path in (ROOT / "skylar").rglob("*.py")
        if "AUTOGENERATED" in path.read_text()
    }
    assert modules == {name.removesuffix(".__init__") for name in exported}


def test_pages_of_the_site(site):
    home = (site / "index.html").read_text()
    assert "00_transformer/05_attention.html" in home and "mermaid" in home
    lesson = (site / "00_transformer" / "05_attention.html").read_text()
    assert "vendor/mathjax" in lesson and "#| export" not in lesson


def test_solutions_are_closed_on_the_site(site):
    """Every solution of every lesson lies in a box that is not open."""
    n_solutions = 0
    for path in build.lessons.lessons():
        nb = nbformat.read(path, as_version=4)
        solutions = [c for c in nb.cells if c.cell_type == "code" and build.is_solution(c)]
        page = (site / path.relative_to(build.NBS)).with_suffix(".html").read_text()
        boxes = re.findall(r'class="[^"]*\btag_solution\b[^"]*">\s*<(details[^>]*)>', page)
        assert len(boxes) == len(solutions), path.name
        assert not [box for box in boxes if " open" in box]
        n_solutions += len(boxes)
    assert n_solutions > 50
