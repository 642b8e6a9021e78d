"""The website's pages: what a lesson loses and keeps on its way there, and what API pages say."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("nbformat", reason="needs nbformat: pip install -e '.[dev]'")
pytest.importorskip("fastcore", reason="needs nbdev: pip install -e '.[dev]'")

from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))  # before an installed `build`

import api  # noqa: E402
import build  # noqa: E402

LESSON = build.NBS / "00_transformer" / "03_attention.ipynb"


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


@pytest.mark.parametrize(
    "source", ["slider(draw, n=(0, 9))", "@interact\ndef f(n=1): ...", "interact(f)"]
)
def test_controls_are_explained(source):
    assert [cell.source for cell in on_the_web(new_code_cell(source))] == [source, build.NOTE]


def test_ordinary_calls_are_no_controls():
    assert len(on_the_web(new_code_cell("page.slider(1)\nmy_interact(2)"))) == 1


def test_links_lead_to_pages_of_the_site():
    text = (
        "[next](03_attention.ipynb) [site](https://example.com) [guide](../../README.md) [top](#x)"
    )
    (cell,) = on_the_web(new_markdown_cell(text))
    assert cell.source == "[next](03_attention.ipynb) [site](https://example.com) guide [top](#x)"


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

    text = api.page(attention, "00_transformer/03_attention.ipynb")
    assert text.startswith("# skylar.layers.attention")
    assert all(f"## {name}\n" in text for name in attention.__all__)


def test_site_builds(tmp_path):
    pytest.importorskip("myst_nb", reason="needs Sphinx: pip install -e '.[docs]'")
    if not (ROOT / "docs" / "node_modules" / "mermaid").exists():
        pytest.skip("needs MathJax and mermaid: npm install --prefix docs")
    command = [sys.executable, ROOT / "docs" / "build.py", "--out", tmp_path / "site"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    home = (tmp_path / "site" / "index.html").read_text()
    assert "00_transformer/03_attention.html" in home and "mermaid" in home
    lesson = (tmp_path / "site" / "00_transformer" / "03_attention.html").read_text()
    assert "vendor/mathjax" in lesson and "#| export" not in lesson
