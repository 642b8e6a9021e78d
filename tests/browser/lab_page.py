"""A lesson in a real JupyterLab in Chromium, and what a reader's eye would find wrong there.

`lab_server` serves a throw-away copy of a folder of notebooks with fresh settings, `open_lab` opens
it in a page, `open_lesson` one of its notebooks; `findings` lists what is clipped, broken or not
rendered.
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

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync --force-color-profile=srgb"
).split()
SETTINGS = {
    "apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false}',
    "notebook-extension/tracker": '{"windowingMode": "none"}',  # every cell is in the page
}
PANEL = "window.jupyterapp?.shell?.currentWidget"


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
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    return dict(os.environ, **paths, IN_TEST="1", OMP_NUM_THREADS=threads)


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
    ignore = shutil.ignore_patterns(".ipynb_checkpoints", "runs")
    shutil.copytree(notebooks, home / "nbs", ignore=ignore)
    port, log = free_port(), home / "lab.log"
    options = [
        *"--no-browser --allow-root --ip=127.0.0.1 --ServerApp.port_retries=0".split(),
        *"--IdentityProvider.token= --LabApp.expose_app_in_browser=True".split(),
        f"--port={port}",
        f"--ServerApp.root_dir={home / 'nbs'}",
    ]
    command = [sys.executable, "-m", "jupyterlab", *options]
    with log.open("w") as out:
        process = subprocess.Popen(command, env=private_settings(home), stdout=out, stderr=out)
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


def open_lab(browser, url: str, width=1170, height=1000, seconds: float = 120):
    """A page with an empty JupyterLab, side bars collapsed."""
    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(seconds * 1000)
    page.goto(f"{url}/lab?reset")
    page.wait_for_function("window.jupyterapp?.started.then(() => true)")
    page.evaluate("window.jupyterapp.shell.collapseLeft(); window.jupyterapp.shell.collapseRight()")
    return page


def open_lesson(page, path: str, kernel: bool = True) -> None:
    """Show the notebook `path` and nothing else, all rendered; with `kernel`, one is idle."""
    page.evaluate("[...window.jupyterapp.shell.widgets('main')].forEach(open => open.dispose())")
    factory = "window.jupyterapp.docRegistry.getWidgetFactory('Notebook')"
    page.evaluate(f"{factory}._preferKernel = {str(kernel).lower()}")  # JupyterLab has no setting
    opened = "window.jupyterapp.commands.execute('docmanager:open', {path}).then(() => {})"
    page.evaluate(f"path => {opened}", path)
    page.wait_for_function(f"{PANEL}?.context?.isReady && {PANEL}.context.path == {path!r}")
    if kernel:
        page.wait_for_function(
            f"{PANEL}.context.sessionContext.session?.kernel?.status == 'idle'")
    settle(page)


def settle(page, seconds: float = 30) -> None:
    """Wait until the page has stopped growing: maths, diagrams and images come one by one."""
    size = """() => {
        const panel = document.querySelector('.jp-NotebookPanel:not(.lm-mod-hidden)')
        const scroller = panel.querySelector('.jp-WindowedPanel-outer')
        return [panel.querySelectorAll('*').length, scroller?.scrollHeight].join() }"""
    last, same, end = "", 0, time.monotonic() + seconds
    while same < 4 and time.monotonic() < end:
        time.sleep(0.3)
        now = page.evaluate(size)
        last, same = now, same + 1 if now == last else 0


def run_all(page, seconds: float = 600) -> None:
    """Execute every cell, as the menu's "Run All Cells" does, and wait for the last one."""
    page.set_default_timeout(seconds * 1000)
    page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells').then(() => {})")
    settle(page)


def code_cells(page) -> list[dict]:
    """Of each code cell that has a source: index, execution count, source and error messages."""
    return page.evaluate(
        f"""() => [...{PANEL}.content.model.cells].map((cell, index) => [cell, index])
        .filter(([cell]) => cell.type == 'code' && cell.sharedModel.source.trim())
        .map(([cell, index]) => ({{
            index, count: cell.executionCount, source: cell.sharedModel.source,
            errors: cell.outputs.toJSON().filter(o => o.output_type == 'error')
                .map(o => o.ename + ': ' + o.evalue)}}))"""
    )


# Runs in the page; returns [cell index, complaint] for all that a reader would stumble over.
LOOK = (Path(__file__).parent / "look.js").read_text()

LINK = re.compile(r"\]\((?![a-z]+:|#|attachment:)([^)#\s]+)")


def broken_links(path: Path) -> list[tuple[int, str]]:
    """[cell index, complaint] for relative links in the notebook's text that lead to no file."""
    cells = nbformat.read(path, as_version=4).cells
    text = ((i, c.source) for i, c in enumerate(cells) if c.cell_type == "markdown")
    targets = ((i, target) for i, source in text for target in LINK.findall(source))
    return [(i, f"link leads nowhere: {t}") for i, t in targets if not (path.parent / t).exists()]


def findings(page) -> list[tuple[int, str]]:
    """[cell index, complaint] for each thing that is clipped, broken, not rendered or in error."""
    return [tuple(row) for row in page.evaluate(LOOK)]
