"""Pages of the built website in Chromium: maths, pictures, diagrams, links, and no script error."""

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[browser]'")

import lab_page  # noqa: E402  (after the skip, so that it is the reason one reads)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not lab_page.CHROMIUM, reason="needs Chromium, for example Debian's"),
]
NBS = Path(__file__).parents[2] / "nbs"
PAGES = [
    *sorted(
        p.relative_to(NBS).with_suffix(".html").as_posix()
        for p in NBS.rglob("*.ipynb")
        if ".ipynb_checkpoints" not in p.parts
    ),
    "api/layers.attention.html",
    "api/models.decoder.html",
]
LOOK = (Path(__file__).parent / "site.js").read_text()
RENDERED = """() => document.readyState == 'complete'
    && [...document.querySelectorAll('.math')].every(e => e.querySelector('mjx-container'))
    && [...document.querySelectorAll('pre.mermaid')].every(e => e.querySelector('svg'))"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): ...


@pytest.fixture(scope="module")
def address(site):
    """Where the built site is served, as a web server would."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    with lab_page.chromium() as chromium:
        yield chromium


def complaints(browser, url: str, width: int = 1280) -> list[str]:
    """What is wrong with the page at `url`: in the console, on the network, to the eye."""
    from playwright.sync_api import TimeoutError

    page = browser.new_page(viewport={"width": width, "height": 900})
    found = []
    page.on("console", lambda m: m.type == "error" and found.append(f"console: {m.text}"))
    page.on("pageerror", lambda error: found.append(f"script: {error}"))
    page.on("response", lambda r: r.status >= 400 and found.append(f"{r.status}: {r.url}"))
    try:
        page.goto(url, wait_until="load")
        try:
            page.wait_for_function(RENDERED, timeout=15_000)
        except TimeoutError:
            pass  # LOOK says what is not rendered
        return found + page.evaluate(LOOK)
    finally:
        page.close()


@pytest.mark.parametrize("page", PAGES)
def test_page_looks_right(browser, address, page):
    found = complaints(browser, f"{address}/{page}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("page", ["index.html", "00_transformer/05_attention.html"])
def test_page_fits_a_telephone(browser, address, page):
    found = complaints(browser, f"{address}/{page}", width=390)
    assert not found, "\n".join(found)


BAD = """<html><div role=main><img src="nowhere.png"><p>$x$</p><span class="math">\\(x\\)</span>
<a href="lesson.ipynb">next</a><div style="width: 3000px">wide</div></div>
<script>undefinedFunction()</script></html>"""


def test_a_bad_page_is_noticed(browser, tmp_path):
    (tmp_path / "bad.html").write_text(BAD)
    text = "\n".join(complaints(browser, (tmp_path / "bad.html").as_uri()))
    expected = ("image is broken", "maths is not rendered", "link leads", "sideways", "script:")
    assert not [what for what in expected if what not in text], text
