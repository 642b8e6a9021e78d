"""Lessons in a real JupyterLab in Chromium: as stored, and one of them run and played with."""

from pathlib import Path

import pytest

pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[browser]'")
pytest.importorskip("jupyterlab", reason="needs JupyterLab: pip install -e '.[lab]'")

import lab_page  # noqa: E402  (after the skips, so that they are the reason one reads)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not lab_page.CHROMIUM, reason="needs Chromium, for example Debian's"),
]
NBS = Path(__file__).parents[2] / "nbs"
NAMES = sorted(
    p.relative_to(NBS).as_posix()
    for p in NBS.rglob("*.ipynb")
    if ".ipynb_checkpoints" not in p.parts
)
LESSON = "00_transformer/05_attention.ipynb"


@pytest.fixture(scope="module")
def lab():
    with lab_page.lab_server(NBS) as url:
        yield url


@pytest.fixture(scope="module")
def browser():
    with lab_page.chromium() as chromium:
        yield chromium


@pytest.fixture(scope="module")
def page(lab, browser):
    """One for all lessons: to load JupyterLab takes longer than to open a notebook in it."""
    return lab_page.open_lab(browser, lab)


@pytest.mark.parametrize("name", NAMES)
def test_stored_lesson_looks_right(page, name):
    """Nothing scrolls sideways; maths, diagrams, pictures and links work; no error is stored."""
    lab_page.open_lesson(page, name, kernel=False)
    found = lab_page.findings(page) + lab_page.broken_links(NBS / name)
    assert not found, "\n".join(f"cell {index}: {what}" for index, what in found)


def press_slider(page):
    """Move the first slider by keyboard; returns its cell's pictures before and after."""
    handle = page.locator(".widget-slider .noUi-handle").first
    handle.scroll_into_view_if_needed()
    pictures = """() => [...document.querySelector('.widget-slider').closest('.jp-Cell')
        .querySelectorAll('.jp-OutputArea img')].map(image => image.src).join()"""
    before = page.evaluate(pictures)
    handle.focus()
    for key in ("ArrowRight", "ArrowLeft", "ArrowLeft"):  # wherever it starts, one of them moves it
        handle.press(key)
    page.wait_for_function(f"before => ({pictures})() != before", arg=before, timeout=30_000)
    return before, page.evaluate(pictures)


def test_lesson_runs_and_its_slider_redraws(lab, browser):
    page = lab_page.open_lab(browser, lab)
    lab_page.open_lesson(page, LESSON)
    lab_page.run_all(page)
    cells = lab_page.code_cells(page)
    assert cells, "the lesson has no code"
    assert not [error for cell in cells for error in cell["errors"]]
    assert [cell["count"] for cell in cells] == list(range(1, len(cells) + 1))
    before, after = press_slider(page)
    assert before and after, "the widget has no picture"
    assert page.locator(".jp-RenderedMarkdown mjx-container").count(), "no maths"
    assert page.locator(".jp-RenderedImage img").count(), "no drawing"
    assert not lab_page.findings(page)


KERNEL = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
BROKEN = """# Broken

Maths $\\frac{1}{2$ and an image ![gone](gone.png) and a [link](gone.ipynb)."""


def test_what_is_wrong_is_found(browser, tmp_path):
    """The looks above are able to fail."""
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output, writes

    error = new_output("error", ename="ValueError", evalue="no", traceback=["ValueError: no"])
    table = "<div style='width: 3000px'>wide</div>"
    cells = [
        new_markdown_cell(BROKEN),
        new_code_cell("x = '" + "a" * 200 + "'", execution_count=1),
        new_code_cell("1", execution_count=2, outputs=[error]),
        new_code_cell("2", outputs=[new_output("display_data", data={"text/html": table})]),
        new_markdown_cell("```mermaid\nflowchart LR\n  a -->\n```"),
    ]
    path = tmp_path / "broken.ipynb"
    path.write_text(writes(new_notebook(cells=cells, metadata=KERNEL)))
    with lab_page.lab_server(tmp_path) as url:
        page = lab_page.open_lab(browser, url)
        lab_page.open_lesson(page, path.name, kernel=False)
        found = lab_page.findings(page) + lab_page.broken_links(path)
    for index, what in [
        (0, "maths is not rendered"),
        (0, "image is broken"),
        (0, "link leads nowhere: gone.ipynb"),
        (1, "code scrolls sideways"),
        (2, "ValueError: no"),
        (3, "output scrolls sideways"),
        (4, "mermaid"),
    ]:
        assert any(i == index and what in text for i, text in found), (what, found)
