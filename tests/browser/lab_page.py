"""A lesson in a real JupyterLab in Chromium, and what a reader's eye would find wrong there.

`lab_server` serves a throw-away copy of a folder of notebooks with fresh settings, `open_lesson` opens one of
them in a page, `findings` lists what is clipped, broken or not rendered.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import nbformat

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync --force-color-profile=srgb"
).split()
SETTINGS = {
    "apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false}',  # no pop-up
    "notebook-extension/tracker": '{"windowingMode": "none"}',  # every cell is in the page, nothing jumps
}
PANEL = "window.jupyterapp.shell.currentWidget"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def private_settings(home: Path) -> dict[str, str]:
    """Environment of a JupyterLab that neither reads nor writes the user's own settings."""
    for name, text in SETTINGS.items():
        path = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    places = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "IPYTHONDIR": "ipython",
    }
    paths = {key: str(home / name) for key, name in places.items()}
    return dict(os.environ, **paths, IN_TEST="1", OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1"))


def wait_for_server(url: str, process: subprocess.Popen, log: Path, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        with suppress(OSError):
            urllib.request.urlopen(f"{url}/api/status", timeout=5).close()
            return
        time.sleep(0.3)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()[-3000:]}")


@contextmanager
def lab_server(notebooks: Path):
    """Serve a copy of the folder `notebooks`; yields the server's address."""
    home = Path(tempfile.mkdtemp(prefix="lab-"))
    shutil.copytree(notebooks, home / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints", "runs"))
    port, log = free_port(), home / "lab.log"
    options = [
        "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0",
        f"--ServerApp.root_dir={home / 'nbs'}", "--IdentityProvider.token=",
        "--LabApp.expose_app_in_browser=True",
    ]  # fmt: skip
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options], env=private_settings(home), stdout=out, stderr=out
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for_server(url, process, log)
        yield url
    finally:
        process.terminate()  # the server ends its kernels on the way out
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        shutil.rmtree(home, ignore_errors=True)


@contextmanager
def chromium(**options):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS, **options)
        try:
            yield browser
        finally:
            browser.close()


def open_lesson(browser, url: str, path: str, width: int = 1170, height: int = 1000, seconds: float = 120):
    """A page with the notebook `path` open, side bars collapsed, kernel idle, everything rendered."""
    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(seconds * 1000)
    page.goto(f"{url}/lab/tree/{path}?reset")
    page.wait_for_function(f"{PANEL}?.context?.sessionContext?.session?.kernel?.status == 'idle'")
    page.evaluate("window.jupyterapp.shell.collapseLeft(); window.jupyterapp.shell.collapseRight()")
    settle(page)
    return page


def settle(page, seconds: float = 30) -> None:
    """Wait until the page has stopped growing: maths, diagrams and images come one by one."""
    size = """() => { const p = document.querySelector('.jp-NotebookPanel:not(.lm-mod-hidden)')
        return [p.querySelectorAll('*').length, p.querySelector('.jp-WindowedPanel-outer')?.scrollHeight].join() }"""
    last, same, end = "", 0, time.monotonic() + seconds
    while same < 4 and time.monotonic() < end:
        time.sleep(0.3)
        now = page.evaluate(size)
        last, same = now, same + 1 if now == last else 0


def run_all(page, seconds: float = 600) -> None:
    """Execute every cell, as the menu's "Run All Cells" does, and wait for the last one."""
    page.set_default_timeout(seconds * 1000)
    page.evaluate("async () => { await window.jupyterapp.commands.execute('notebook:run-all-cells') }")
    settle(page)


def code_cells(page) -> list[dict]:
    """Of each code cell that has a source: index, execution count, source and error messages."""
    return page.evaluate(
        f"""() => [...{PANEL}.content.model.cells].map((c, i) => [c, i]).filter(([c]) => c.type == 'code')
        .map(([c, i]) => ({{index: i, count: c.executionCount, source: c.sharedModel.source,
            errors: c.outputs.toJSON().filter(o => o.output_type == 'error').map(o => o.ename + ': ' + o.evalue)}}))
        .filter(c => c.source.trim())"""
    )


# What the eye finds, for each cell [index, complaint].
LOOK = """() => {
  const found = [], cells = document.querySelectorAll('.jp-NotebookPanel:not(.lm-mod-hidden) .jp-Cell')
  const wide = e => e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 0
  cells.forEach((cell, i) => {
    const say = what => found.push([i, what])
    cell.querySelectorAll('.jp-InputArea-editor .cm-scroller').forEach(
      e => wide(e) && say(`code scrolls sideways (${e.scrollWidth} px in ${e.clientWidth} px)`))
    cell.querySelectorAll('.jp-OutputArea-output').forEach(
      e => wide(e) && say(`output scrolls sideways (${e.scrollWidth} px in ${e.clientWidth} px)`))
    cell.querySelectorAll('.jp-MarkdownOutput.jp-MarkdownCell, .jp-MarkdownOutput').forEach(
      e => wide(e) && say(`text is clipped or scrolls sideways (${e.scrollWidth} px in ${e.clientWidth} px)`))
    if (cell.querySelector('.jp-mod-outputsScrolled')) say('output scrolls inside its own box')
    cell.querySelectorAll('img').forEach(e => { if (!(e.complete && e.naturalWidth)) say(
      `image is broken: ${(e.getAttribute('alt') || e.getAttribute('src') || '').slice(0, 60)}`)
      else if (e.getBoundingClientRect().width > cell.getBoundingClientRect().width) say('image is wider than the cell') })
    cell.querySelectorAll('.jp-RenderedMarkdown').forEach(e => {
      const text = e.cloneNode(true)
      text.querySelectorAll('code, pre, mjx-container, svg, style').forEach(x => x.remove())
      const left = text.textContent.match(/\\$[^$\\n]{1,80}\\$|\\$\\$|\\\\(frac|sqrt|sum|begin|mathbf|in)\\b/)
      if (left) say(`maths is not rendered: ${left[0]}`)
      const shape = text.textContent.match(/\\n\\s*\\|.*\\|.*\\|\\s*\\n/)
      if (shape) say(`table is not rendered: ${shape[0].trim().slice(0, 60)}`) })
    cell.querySelectorAll('mjx-merror, [data-mjx-error]').forEach(
      e => say(`maths has an error: ${e.getAttribute('data-mjx-error') || e.textContent}`))
    cell.querySelectorAll('.jp-RenderedMermaid').forEach(
      e => { if (e.classList.contains('jp-mod-warning') || !e.querySelector('img, svg')) say('mermaid has an error') })
    cell.querySelectorAll('code.language-mermaid, pre.language-mermaid').forEach(
      e => { if (!e.closest('.jp-RenderedMermaid')) say('mermaid is not rendered') })
    cell.querySelectorAll('[data-mime-type="application/vnd.jupyter.error"]').forEach(
      e => say(`error output: ${e.textContent.trim().split('\\n').pop().slice(0, 100)}`))
    cell.querySelectorAll('[data-mime-type="application/vnd.jupyter.stderr"]').forEach(
      e => say(`stderr output: ${e.textContent.trim().slice(0, 100)}`))
    if (/Error displaying widget|Loading widget|Could not render/.test(cell.querySelector('.jp-OutputArea')?.textContent || ''))
      say('widget is not displayed')
  })
  return found
}"""

LINK = re.compile(r"\]\((?![a-z]+:|#|attachment:)([^)#\s]+)")


def broken_links(path: Path) -> list[tuple[int, str]]:
    """[cell index, complaint] for relative links in the notebook's text that lead to no file."""
    cells = nbformat.read(path, as_version=4).cells
    targets = [(i, t) for i, c in enumerate(cells) if c.cell_type == "markdown" for t in LINK.findall(c.source)]
    return [(i, f"link leads nowhere: {t}") for i, t in targets if not (path.parent / t).exists()]


def findings(page) -> list[tuple[int, str]]:
    """[cell index, complaint] for each thing that is clipped, broken, not rendered or in error."""
    return [tuple(row) for row in page.evaluate(LOOK)]
