"""Kill training runs at random moments and damage their files: what is lost, what is noticed?

`kills`: `skylar pretrain` runs in a child process that gets SIGKILL after a seeded random time,
between its start and its end (four of five after its first third: it trains then); checkpoints are
written every second step, in half of the trials in the background. Then `latest` is verified, and
the same command with --resume runs to the end. Weights, moments, random states, loader position
and metrics must be those of the run that nobody disturbed. Some resumed runs are killed as well.

`damages`: one file of a run folder or of its data is cut short, deleted, or gets one flipped bit.
Opening it must fail with one line that names the file; what opens anyway must be the very same
run (a lost `latest`, say, which is found again).

    python bench/faults.py                           # 100 kills, 1,000 damages, about 6 minutes
    python bench/faults.py --kills 10 --damages 100 --seed 1 --folder OUT     # a sample

Children are forked from a process that has imported everything and computed nothing, so that a
trial costs its training only. POSIX only. Exit code 1 if a trial failed.
"""

import argparse
import collections
import contextlib
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from common import write

from skylar.cli import main as skylar
from skylar.data.prepare import open_data
from skylar.data.shard_files import verify_shards
from skylar.training.checkpoint_files import (
    SafeReader,
    find_checkpoint,
    load_metadata,
    load_state,
    unwrap_dcp_errors,
    verify_checkpoint,
)
from skylar.training.metrics import CLOCK_FIELDS, read_metrics

WORDS_OF_CHILD = Path(tempfile.mkstemp(prefix="skylar-child-")[1])
WORDS = "the king said that a summer day is long and love is short but night comes soon".split()
SMALL = {"model.d_model": 64, "model.d_head": 16, "model.n_layers": 2, "model.d_ff": 128,
         "model.max_seq_len": 64, "loader.seq_len": 32, "loader.batch_size": 4,
         "train.steps": 20, "train.save_every": 2, "train.log_every": 1, "train.eval_every": 5,
         "train.eval_batches": 2, "train.keep_best": 1, "train.device": "cpu",
         "train.grad_accum_steps": 2, "train.dtype": "float32", "optimizer.lr": 0.003}


def forked(function, *args) -> int:
    """The process id of a child that runs `function(*args)` and leaves with what it returns.

    What it prints goes to a file; `last_words` reads it."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 99
    try:
        words = os.open(WORDS_OF_CHILD, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(words, 1), os.dup2(words, 2)
        torch.set_num_threads(1)
        code = function(*args) or 0
    except BaseException:  # a child must never go on as its parent
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def last_words() -> str:
    "The end of what the last child has printed."
    return WORDS_OF_CHILD.read_text(errors="replace")[-1500:]


def result(pid: int) -> int:
    "Exit code of a child; minus the signal that ended it."
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def preload(names: Path) -> None:
    "Import what a training run imports on its way: then each child starts in no time."
    for name in names.read_text().split():
        with contextlib.suppress(Exception):  # some names cannot be imported alone
            importlib.import_module(name)


def make_data(home: Path) -> int:
    (home / "texts").mkdir(parents=True)
    for i in range(24):
        text = " ".join(WORDS[(i + 3 * j + j // 7) % len(WORDS)] for j in range(120))
        (home / "texts" / f"{i:02}.txt").write_text(text + "\n")
    return skylar(["data", "tokenize", str(home / "texts"), "--out", str(home / "data"),
                   "--vocab_size", "300", "--workers", "1"])


def pretrain(home: Path, out: Path, background: bool, *more: str) -> int:
    flags = [word for key, value in SMALL.items() for word in (f"--{key}", str(value))]
    code = skylar(["pretrain", "--data", str(home / "data"), "--out", str(out), *flags,
                   "--train.async_save", str(background).lower(), *more])
    if not (home / "modules").exists():
        (home / "modules").write_text("\n".join(sys.modules))
    return code


def content(out: Path) -> str:
    "SHA-256 of all that a finished run is: tensors, random states, position, counters, metrics."
    folder = find_checkpoint(out)
    verify_checkpoint(folder)
    saved = SafeReader(folder / "tensors").read_metadata().state_dict_metadata
    tensors = {k: torch.empty(v.size, dtype=v.properties.dtype) for k, v in saved.items()}
    with unwrap_dcp_errors():
        dcp.load(tensors, storage_reader=SafeReader(folder / "tensors"), no_dist=True)
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        raw = tensor.contiguous().view(-1).view(torch.uint8)
        found.update(name.encode() + raw.numpy().tobytes())
    state = load_state(folder)
    state["extra"]["progress"].pop("seconds")
    rows = [{k: v for k, v in row.items() if k not in CLOCK_FIELDS}
            for row in read_metrics(out / "metrics.jsonl")]
    del state["save_number"]  # counts saves: a run that was killed made some twice
    found.update(json.dumps([state, rows, load_metadata(folder)["model"]], sort_keys=True).encode())
    return f"{state['step']} {found.hexdigest()}"


def write_content(out: Path) -> int:
    (out / "content").write_text(content(out))


def content_in_child(out: Path) -> str:
    assert result(forked(write_content, out)) == 0, last_words()
    text = (out / "content").read_text()
    (out / "content").unlink()
    return text


def phase(out: Path) -> str:
    "What the run was doing when it was killed, as its files tell."
    folder = out / "checkpoints"
    if not (out / "config.yaml").exists():
        return "before config.yaml"
    steps = [p for p in folder.glob("step-*") if (p / "manifest.json").exists()]
    temporary = list(folder.glob(".tmp-step-*"))
    if temporary:
        tensors = any((t / "tensors" / ".metadata").exists() for t in temporary)
        return "hashing, sealing" if tensors else "writing tensors"
    if not steps:
        return "before the first save"
    newest = max(p.name for p in steps)
    pointer = folder / "latest"
    if not pointer.exists() or pointer.read_text().strip() != newest:
        return "between rename and latest"
    return "removing old ones" if len(steps) > 3 else "training"


def killed_once(home: Path, out: Path, background: bool, delay: float, resume: bool) -> bool:
    "Start or resume, kill after `delay` seconds; False if it had ended by then."
    pid = forked(pretrain, home, out, background, *(["--resume"] if resume else []))
    time.sleep(delay)
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    return result(pid) == -signal.SIGKILL


def opened_whole(out: Path) -> int:
    "The step of the checkpoint that `latest` means, all of whose bytes are verified; -1: none."
    try:
        folder = find_checkpoint(out)
    except FileNotFoundError:
        return -1
    verify_checkpoint(folder)
    return load_state(folder)["step"]


def kill_trial(home: Path, number: int, chance: random.Random, seconds: dict, whole: dict) -> dict:
    out, background = home / f"run-{number}", bool(number % 2)
    row = {"trial": number, "background": background, "kills": []}
    for again in range(1 + (chance.random() < 0.25)):
        early = 0.0 if chance.random() < 0.2 else 0.3  # most of them once it trains
        delay = seconds[background] * chance.uniform(early, 1.0)
        hit = killed_once(home, out, background, delay, resume=bool(again))
        try:
            step = opened_whole(out)
        except ValueError as error:  # a half checkpoint: the worst that can be found
            return row | {"ok": False, "error": str(error)}
        row["kills"].append({"after_s": round(delay, 3), "killed": hit, "while": phase(out)
                             if hit else "after its end", "whole_at_step": step})
    code = result(forked(pretrain, home, out, background, "--resume"))
    row |= {"exit": code, "same": code == 0 and content_in_child(out) == whole[background]}
    row["ok"] = bool(row["same"])
    if row["ok"]:
        shutil.rmtree(out)
    else:
        row["error"] = last_words()
    return row


def kills(home: Path, n: int, seed: int) -> list[dict]:
    chance, whole, seconds, rows = random.Random(seed), {}, {}, []
    for background in (False, True):
        times = []
        for attempt in range(3):
            out, start = home / f"whole-{background}-{attempt}", time.monotonic()
            assert result(forked(pretrain, home, out, background)) == 0, last_words()
            times.append(time.monotonic() - start)
            preload(home / "modules")
        whole[background], seconds[background] = content_in_child(out), min(times)
    assert whole[False] == whole[True], "background saving changes the run"
    print(f"undisturbed: {seconds[False]:.2f} s, in the background {seconds[True]:.2f} s; "
          f"content {whole[True][:20]}", flush=True)
    done = 0  # kills that met a living process
    while done < n:
        row = kill_trial(home, len(rows), chance, seconds, whole)
        rows.append(row)
        done += sum(k["killed"] for k in row["kills"])
        met = ", ".join(f"{k['after_s']:.3f} s: {k['while']}, whole at step {k['whole_at_step']}"
                        for k in row["kills"])
        print(f"{'ok  ' if row['ok'] else 'FAIL'} trial {row['trial']:3} "
              f"{'background' if row['background'] else 'plain     '} {met}", flush=True)
        if not row["ok"]:
            print(json.dumps(row), flush=True)
    return rows


# --- damages ---


def damage(path: Path, how: str, chance: random.Random) -> None:
    data = path.read_bytes()
    if how == "delete":
        path.unlink()
    elif how == "cut":
        path.write_bytes(data[:chance.randrange(len(data))])
    else:
        at, bit = chance.randrange(len(data)), chance.randrange(8)
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1:])


def open_all(home: Path, out: Path) -> str:
    "Open data and run as a resume does, every byte verified; what the checkpoint is."
    open_data(home / "data")
    for part in ("train", "val"):
        verify_shards(home / "data" / part)
    found = find_checkpoint(out)
    verify_checkpoint(found)
    load_state(found), load_metadata(found)
    best = find_checkpoint(out / "checkpoints" / "best")
    verify_checkpoint(best)
    return f"{found.name} {best.name}"


def damage_trial(home: Path, out: Path, files: list, chance: random.Random, whole: str) -> dict:
    path, how = chance.choice(files), chance.choice(["cut", "delete", "flip"])
    data = path.read_bytes()
    row = {"file": path.relative_to(home).as_posix(), "how": how}
    damage(path, how, chance)
    try:
        opened = open_all(home, out)
        row["outcome"] = "the same run" if opened == whole else f"UNDETECTED: {opened}"
    except (ValueError, OSError) as error:
        text = str(error)
        named = path.name in text or path.stem in text and path.suffix in (".idx", ".sha256")
        row["outcome"] = "named" if named and "\n" not in text else f"NOT NAMED: {text}"
    path.write_bytes(data)
    return row


def damages(home: Path, n: int, seed: int) -> list[dict]:
    out, chance = home / "damaged", random.Random(seed)
    assert result(forked(pretrain, home, out, True)) == 0
    data = [p for part in ("train", "val") for p in (home / "data" / part).iterdir()]
    ours = [p for p in (out / "checkpoints").rglob("*") if p.is_file()]
    used = {find_checkpoint(out).name, find_checkpoint(out / "checkpoints" / "best").name}
    files = sorted(data + [p for p in ours if p.parent == out / "checkpoints"
                           or used & set(p.parts)])
    whole, rows = open_all(home, out), []
    for number in range(n):
        rows.append(damage_trial(home, out, files, chance, whole))
        if rows[-1]["outcome"] not in ("named", "the same run"):
            print(f"FAIL damage {number} {rows[-1]}", flush=True)
    assert open_all(home, out) == whole
    table = collections.Counter((r["file"].replace("damaged/checkpoints/", ""), r["how"],
                                 r["outcome"][:60]) for r in rows)
    for (file, how, outcome), count in sorted(table.items()):
        print(f"{count:4}  {file:44} {how:7} {outcome}")
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--damages", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="where faults.json goes; left out: bench/results")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="skylar-faults-") as name:
        home = Path(name).resolve()
        assert result(forked(make_data, home)) == 0
        killed = kills(home, args.kills, args.seed)
        damaged = damages(home, args.damages, args.seed)
    WORDS_OF_CHILD.unlink()
    hits = [k for row in killed for k in row["kills"] if k["killed"]]
    outcomes = collections.Counter(row["outcome"].split(":")[0] for row in damaged)
    summary = {"kills": len(hits), "resumed_the_same": sum(row["ok"] for row in killed),
               "trials": len(killed), "in_the_background": sum(r["background"] for r in killed),
               "while": collections.Counter(k["while"] for k in hits),
               "damages": len(damaged), "damage_outcomes": outcomes}
    print(json.dumps(summary))
    write("faults", killed, args.folder, summary=summary, damages=collections.Counter(
        f"{row['file']} {row['how']}: {row['outcome']}" for row in damaged))
    good = all(row["ok"] for row in killed) and set(outcomes) <= {"named", "the same run"}
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
