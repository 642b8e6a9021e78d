"""A script in several processes that know each other, without the price of starting them.

torchrun starts itself and every rank anew, and each of them imports PyTorch: seconds, where a small
model trains for a fraction of one. `launch` forks its processes from one that has imported it once.
What is about torchrun itself (restarts, what it prints) is tested with `torchrun` instead.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["skylar.training.run", "skylar.training.distributed",
                              "skylar.training.monitor", "torch.distributed.fsdp"])


def as_rank(command: list[str], folder: str, told: dict[str, str], said: str) -> None:
    "Become `python COMMAND` of a rank, in `folder`; it says to the files `said`.out and .err."
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(f"{said}.{name}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
    os.environ.clear()
    os.environ.update(told)
    os.chdir(folder)
    sys.argv = command[1:] if command[0] == "-m" else command
    if command[0] == "-m":
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(command[0]).parent))
        runpy.run_path(command[0], run_name="__main__")


def launch(n: int, *command, check: bool = True) -> subprocess.CompletedProcess:
    "`python COMMAND` in `n` processes; when one has failed, the others are ended, as by torchrun."
    from torch import distributed

    command, told = [*map(str, command)], os.environ | {"OMP_NUM_THREADS": "1"}
    if n > 1:
        store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        told |= {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
                 "TORCHELASTIC_USE_AGENT_STORE": "True"}  # the store is here
    with tempfile.TemporaryDirectory() as folder:
        ranks = [FORKS.Process(target=as_rank, args=(
            command, os.getcwd(), told | {"RANK": str(i), "LOCAL_RANK": str(i)}, f"{folder}/{i}"))
            for i in range(n)]
        with ended_at_last(ranks):
            for rank in ranks:
                rank.start()
            going = {rank.sentinel: rank for rank in ranks}
            while going and not any(rank.exitcode for rank in ranks):
                for ended in multiprocessing.connection.wait(going):
                    going.pop(ended).join()
        out, err = ("".join(Path(f"{folder}/{i}.{name}").read_text() for i in range(n))
                    for name in ("out", "err"))
    code = next((rank.exitcode for rank in ranks if rank.exitcode), 0)
    assert not check or code == 0, err[-3000:]
    return subprocess.CompletedProcess(command, code, out, err)


def check_two_ranks(words: list, folder: Path) -> None:
    "`skylar WORDS` trains on two ranks what it trains on one; its runs are in `folder`."
    import pytest
    import torch
    from test_distributed import numbers

    from skylar.training.run import open_model

    for n, name in ((1, "alone"), (2, "two")):
        launch(n, "-m", "skylar", *words, "--out", folder / name)
    alone, two = folder / "alone", folder / "two"
    assert numbers(two) == [pytest.approx(row, abs=2e-4) for row in numbers(alone)]
    models = (open_model(path)[0].parameters() for path in (alone, two))
    for p, q in zip(*models, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-3)


@contextlib.contextmanager
def ended_at_last(processes):
    "None of them is left behind, whatever happens."
    try:
        yield
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
