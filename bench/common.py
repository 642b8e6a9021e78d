"""What every benchmark writes beside its numbers: processor, versions, commit, date."""

import datetime
import importlib.metadata as metadata
import json
import os
import platform
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("skylar", "torch", "numpy", "tokenizers", "transformers")


def cpu_name() -> str:
    """The processor's model name, or the architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def machine() -> dict:
    """What the numbers were measured on: no host name, no paths."""
    return {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
    }


def version(package: str) -> str:
    """Installed version of `package`, or "not installed"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def commit() -> str:
    """Short git commit of the tree, with `+` when tracked files differ from it."""

    def git(*args):
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True).stdout

    head = git("rev-parse", "--short", "HEAD").strip()
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "skylar", "bench/*.py")
    return head + ("+" if changed.strip() else "") if head else "unknown"


def write(name: str, rows: list[dict], folder: Path | str | None = None, **notes) -> Path:
    """Write `NAME.json` (header, rows, notes) into bench/results or `folder`; returns the path."""
    result = {
        "name": name,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": machine(),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
        "rows": rows,
        **notes,
    }
    path = Path(folder or ROOT / "bench" / "results") / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path


def show(row: dict) -> None:
    """Print a row on one line."""
    pairs = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items())
    print("  ".join(pairs), flush=True)


def record(name: str, rows: list[dict], **notes) -> Path:
    """`write`, and print the rows."""
    path = write(name, rows, **notes)
    for row in rows:
        show(row)
    return path
