"""Execute lessons from a clean kernel and store their outputs.

    python tools/lessons.py run [NB ...]     # all lessons, or the ones named; stores outputs
    python tools/lessons.py time [NB ...]    # the same, and writes bench/results/lessons.json,
                                             # where lessons not named keep their seconds
    python tools/lessons.py tidy [NB ...]    # tidies stored outputs without running anything

The first two obey nbdev's `#| eval: false`. Widgets keep their code and lose their stored view:
without a kernel a stored view is an error message, and the static picture beside it stays.
"""

import argparse
import base64
import configparser
import io
import json
import os
import sys
import time
from copy import deepcopy
from pathlib import Path

import nbformat
from fastcore.nbio import dict2nb, does_cell_eval
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools" / "nbdev_commands"))

from nbdev_commands import notebooks  # noqa: E402

WIDGET = "application/vnd.jupyter.widget-view+json"


def settings() -> configparser.SectionProxy:
    "The `[lessons]` section of settings.ini."
    ini = configparser.ConfigParser()
    ini.read(ROOT / "settings.ini")
    return ini["lessons"]


def lessons() -> list[Path]:
    "Every notebook of the course, in reading order."
    return notebooks(ROOT / "nbs")


class LessonClient(NotebookClient):
    """Runs a notebook's cells; what a widget draws is output of its cell, like any other.

    nbclient would answer a widget's Output over the channel on which it waits for the cell's
    own reply; that run hung once, its reply unnoticed (LOG.md). Here errors inside a
    widget's callback are errors of the cell, too, instead of vanishing in the widget.
    """

    def handle_comm_msg(self, outs, msg, cell_index):
        "Widgets talk to a page; there is none."


def skipped_cells(nb) -> set[int]:
    "Indices of cells that nbdev would not evaluate."
    cells = dict2nb(nb).cells
    return {i for i, c in enumerate(cells) if c.cell_type == "code" and not does_cell_eval(c, True)}


def execute(path: Path):
    "Run `path` in a fresh kernel and return the executed notebook."
    nb = nbformat.read(path, as_version=4)
    skip = skipped_cells(nb)
    sources = {i: nb.cells[i].source for i in skip}
    for i in skip:
        nb.cells[i].source = ""
    client = LessonClient(
        nb,
        timeout=settings().getint("cell_timeout"),
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()
    refuse_errors(nb)
    for i, source in sources.items():
        nb.cells[i].source = source
    return nb


def smaller(png: str) -> str:
    "A plot with 256 colors instead of 16 million: looks the same, a third of the bytes."
    image = Image.open(io.BytesIO(base64.b64decode(png)))
    if image.mode == "P":  # it has been here before
        return png
    out = io.BytesIO()
    image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return min(base64.b64encode(out.getvalue()).decode(), png, key=len)


def refuse_errors(nb) -> None:
    "An error shown by a widget's callback does not stop a cell; it must not pass."
    for cell in nb.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                text = "\n".join(output.traceback)
                raise CellExecutionError(text, output.ename, output.evalue)


def merge_streams(outputs: list) -> list:
    "Text printed piece by piece, such as a chat's tokens, as one output; else a page breaks lines."
    merged = []
    for output in outputs:
        last = merged[-1] if merged else None
        if last and output.output_type == last.output_type == "stream" and (
            output.name == last.name
        ):
            last.text += output.text
        else:
            merged.append(output)
    return merged


def twice(nb):
    "The notebook with all cells a second time: what a reader does who runs all cells again."
    again = deepcopy(nb.cells)
    for cell in again:
        cell.id = f"{cell.id}-2"
        if cell.cell_type == "code" and cell.source.strip():
            cell.source += "\n# (this cell's second run in one kernel)"  # seen in an error
    nb.cells += again
    return nb


def probes(nb) -> list:
    "A cell for each exercise, which fails if the check accepts the skeleton as it came."
    from nbformat.v4 import new_code_cell

    from skylar.cli.lesson import exercises

    code = "try:\n    {}\nexcept Exception:\n    pass\nelse:\n    raise RuntimeError({!r})"
    found = ((e.call, f"{e.check} accepts the skeleton as it came") for e in exercises(nb))
    return [new_code_cell(code.format(*pair)) for pair in found]


def tidy(nb):
    "Drop what differs between two identical runs, and widget views that need a kernel."
    count = 0
    for cell in nb.cells:
        cell.metadata = {k: v for k, v in cell.metadata.items() if k in ("tags", "jupyter")}
        if cell.cell_type != "code":
            continue
        if any(WIDGET in o.get("data", {}) for o in cell.outputs):
            cell.outputs = []  # the static picture beside it stays
        cell.outputs = merge_streams(cell.outputs)
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = smaller(output.data["image/png"])
        if cell.execution_count:
            count += 1
            cell.execution_count = count
            for output in cell.outputs:
                if "execution_count" in output:
                    output["execution_count"] = count
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    nb.metadata = {"kernelspec": kernel}
    return nb


def run(paths: list[Path]) -> dict[str, float]:
    "Execute and store each lesson; returns the seconds each took."
    seconds = {}
    for path in paths:
        start = time.perf_counter()
        nb = tidy(execute(path))
        seconds[path.relative_to(ROOT).as_posix()] = round(time.perf_counter() - start, 1)
        nbformat.write(nb, path)
        print(f"{list(seconds)[-1]}: {list(seconds.values())[-1]} s", flush=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=["run", "time", "tidy"])
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: every lesson")
    args = parser.parse_args()
    paths = [p.resolve() for p in args.notebooks] or lessons()
    if args.action == "tidy":
        for path in paths:
            nbformat.write(tidy(nbformat.read(path, as_version=4)), path)
        return
    seconds = run(paths)
    if args.action == "time":
        sys.path.insert(0, str(ROOT / "bench"))
        from common import record

        seconds = measured() | seconds
        rows = [{"lesson": name, "seconds": seconds[name]} for name in names() & seconds.keys()]
        rows.sort(key=lambda row: row["lesson"])
        record("lessons", rows, threads=os.environ.get("OMP_NUM_THREADS", "default"))


def names() -> set[str]:
    "Every lesson there is, as the results call it."
    return {path.relative_to(ROOT).as_posix() for path in lessons()}


def measured() -> dict[str, float]:
    "Seconds of each lesson as they were last measured."
    path = ROOT / "bench" / "results" / "lessons.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return {row["lesson"]: row["seconds"] for row in rows}


if __name__ == "__main__":
    main()
