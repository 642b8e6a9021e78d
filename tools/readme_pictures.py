"""Make the README's pictures: a lesson in JupyterLab, the demo's loss curve and its sample.

    python tools/readme_pictures.py lesson          # docs/images/lesson.png (needs chromium)
    python tools/readme_pictures.py demo [FOLDER]   # loss.png and sample.png from a finished demo
"""

import html
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
sys.path.insert(0, str(ROOT / "tests" / "browser"))

PAGE = """<body style="margin:0;background:#fbfaf7"><pre style="margin:0;padding:18px 26px;
font:15px/1.45 'DejaVu Sans Mono',monospace;color:#222;white-space:pre-wrap">{}</pre></body>"""
# from here, this much of the attention lesson (pixels)
LESSON, HEADING, HEIGHT = "00_transformer/05_attention.ipynb", "The causal mask", 1130


def lesson() -> None:
    "A screenful of the attention lesson, as a reader sees it."
    import lab_page

    with lab_page.lab_server(ROOT / "nbs") as url, lab_page.chromium() as browser:
        page = lab_page.open_lesson(browser, url, LESSON, width=920, height=HEIGHT)
        lab_page.settle(page)
        page.evaluate(
            """text => [...document.querySelectorAll('.jp-RenderedMarkdown h2')]
                .find(h => h.textContent.startsWith(text)).scrollIntoView()""",
            HEADING,
        )
        page.wait_for_timeout(500)
        panel = page.locator(".jp-NotebookPanel-notebook").first
        panel.screenshot(path=IMAGES / "lesson.png")


def demo(folder: Path) -> None:
    "The loss curve as `skylar demo` drew it, and its sample as a picture."
    import lab_page

    shutil.copy(folder / "loss.png", IMAGES)
    command = [sys.executable, "-m", "skylar", "generate", "--model", str(folder / "run"),
               "--prompt", "ROMEO:\n", "--seed", "1"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    text = html.escape(said.strip())
    with lab_page.chromium() as browser:
        page = browser.new_page(viewport={"width": 760, "height": 200})
        page.set_content(PAGE.format(text))
        page.screenshot(path=IMAGES / "sample.png", full_page=True)


if __name__ == "__main__":
    IMAGES.mkdir(parents=True, exist_ok=True)
    if sys.argv[1:2] == ["lesson"]:
        lesson()
    elif sys.argv[1:2] == ["demo"]:
        demo(Path(sys.argv[2] if len(sys.argv) > 2 else ROOT / "demo"))
    else:
        sys.exit(__doc__)
