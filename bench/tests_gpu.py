"""The tests marked `gpu`, their outcomes written as they come.

Only files that have the mark are collected: others may need packages that are not here.

    python bench/tests_gpu.py          # on a machine with CUDA
    python bench/tests_gpu.py --dry    # tests/test_gpu.py on the CPU
"""

import os
import sys

import pytest
from common import ROOT, write
from gpu_common import device_name, parse


class Outcomes:
    """A pytest plugin that keeps the JSON up to date."""

    def __init__(self, args):
        self.args, self.rows = args, []

    def write(self, status: str) -> None:
        if self.args.out or not self.args.dry:
            write("gpu_tests", self.rows, self.args.out, status=status,
                  device=device_name(self.args.device))

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            row = {"test": report.nodeid, "outcome": report.outcome,
                   "seconds": round(report.duration, 2)}
            if report.failed:
                row["error"] = str(report.longrepr)[-2000:]
            self.rows.append(row)
            self.write("cut off by its time limit")


def main() -> int:
    args = parse(__doc__)
    files = sorted((ROOT / "tests").glob("test_*.py"))
    marked = [str(f) for f in files if "mark.gpu" in f.read_text(encoding="utf-8")]
    if args.dry:
        os.environ["SKYLAR_GPU_TESTS"] = "cpu"
    outcomes = Outcomes(args)
    options = ["-m", "gpu", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    code = pytest.main([*options, *marked], plugins=[outcomes])
    outcomes.write("dry run" if args.dry else "run")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
