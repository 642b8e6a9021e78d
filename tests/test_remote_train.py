"""scripts/remote_train.sh against an sshd that the test starts."""

import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts/remote_train.sh"
SSHD = shutil.which("sshd", path=os.environ["PATH"] + ":/usr/sbin:/sbin")
needs_sshd = pytest.mark.skipif(
    not (SSHD and shutil.which("flock")), reason="needs sshd and flock: apt install openssh-server")


def call(*words, timeout=300):
    return subprocess.run([str(SCRIPT), *words], capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def ssh(tmp_path_factory):
    "Options that reach an own sshd on this machine."
    place = tmp_path_factory.mktemp("ssh")
    for name in ("host", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", place / name],
                       check=True)
    shutil.copy(place / "key.pub", place / "authorized")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (place / "config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {place}/host\nPidFile none\n"
        f"AuthorizedKeysFile {place}/authorized\nStrictModes no\nUsePAM no\n"
        "PasswordAuthentication no\nKbdInteractiveAuthentication no\n")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where sshd, started by root, locks itself in
    server = subprocess.Popen([SSHD, "-D", "-e", "-f", place / "config"],
                              stderr=open(place / "log", "w"))
    for _ in range(100):
        with socket.socket() as probe:
            if not probe.connect_ex(("127.0.0.1", port)):
                break
        assert server.poll() is None, (place / "log").read_text()
        time.sleep(0.1)
    # a config of its own for the client, so that the user's known hosts stay as they are
    (place / "client").write_text(
        f"Host box\n  HostName 127.0.0.1\n  Port {port}\n  User {getpass.getuser()}\n"
        f"  IdentityFile {place}/key\n  IdentitiesOnly yes\n"
        f"  StrictHostKeyChecking no\n  UserKnownHostsFile {place}/known\n  LogLevel ERROR\n")
    wrapper = place / "bin/ssh"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {place}/client "$@"\n')
    wrapper.chmod(0o755)
    before = os.environ["PATH"]
    os.environ["PATH"] = f"{wrapper.parent}:{before}"
    yield "box"
    os.environ["PATH"] = before
    server.terminate()
    server.wait()


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


@needs_sshd
@pytest.mark.slow
def test_a_run_starts_lives_on_stops_and_goes_on(ssh, tmp_path):
    from skylar.data.prepare import prepare_data

    (tmp_path / "a b.txt").write_text("To be, or not to be, that is the question.\n" * 400)
    prepare_data(str(tmp_path / "a b.txt"), out=str(tmp_path / "data"), vocab_size=280,
                 val_fraction=0.2)
    there, out = tmp_path / "machine", tmp_path / "out dir"  # a name with a space
    words = ["--cpu", "--python", sys.executable, "--folder", str(there), "--data",
             str(tmp_path / "data"), ssh, "--", "--out", str(out), "--model.n_layers", "1",
             "--loader.batch_size", "2", "--loader.seq_len", "16", "--train.steps", "100000",
             "--train.save_every", "0", "--train.eval_every", "0", "--train.log_every", "1"]
    done = call(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (there / "data/train/manifest.json").is_file()
    assert not (there / "nbs").exists() and not (there / ".git").exists()
    metrics = out / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") > 2)

    again = call(*words)
    assert again.returncode == 0 and "left alone" in again.stdout
    stop = next(line for line in done.stdout.splitlines() if line.strip().startswith("stop"))
    command = stop.split("stop", 1)[1].split("   (")[0].strip()
    subprocess.run(command, shell=True, check=True)  # as a user would paste it
    wait_for(lambda: (out / "checkpoints/latest").exists())
    pid = int((there / "remote_train.pid").read_text())
    wait_for(lambda: not Path(f"/proc/{pid}").exists(), 60)

    first = metrics.read_bytes().count(b"\n")
    resumed = call(*words)
    assert resumed.returncode == 0 and "left alone" not in resumed.stdout
    wait_for(lambda: metrics.read_bytes().count(b"\n") > first)
    subprocess.run(command, shell=True, check=True)
    pid = int((there / "remote_train.pid").read_text())
    wait_for(lambda: not Path(f"/proc/{pid}").exists(), 60)
    assert "resumed at step" in (there / "remote_train.log").read_text()


@needs_sshd
def test_no_gpu_and_wrong_settings_are_said(ssh, tmp_path):
    done = call("--folder", str(tmp_path / "m"), ssh, "--", "--data", "x")
    if not shutil.which("nvidia-smi"):
        assert done.returncode == 2 and "has no NVIDIA GPU that works" in done.stderr
    assert not (tmp_path / "m").exists()
    done = call("--cpu", "--python", sys.executable, "--folder", str(tmp_path / "m"), ssh, "--",
                "--data", "x", "--out", "y", "--train.stepps", "3")
    assert done.returncode == 2 and "the settings are refused" in done.stderr
    assert "stepps" in done.stderr and not (tmp_path / "m/remote_train.log").exists()


@needs_sshd
def test_strings_are_words_not_commands(ssh, tmp_path):
    nasty = f"$(touch {tmp_path}/a); touch {tmp_path}/b; `touch {tmp_path}/c` ' \" &"
    done = call("--cpu", "--python", sys.executable, "--folder", str(tmp_path / "m"), ssh, "--",
                "--data", nasty, "--out", nasty, "--train.stepps", "3")
    assert done.returncode == 2 and not {"a", "b", "c"} & set(os.listdir(tmp_path))


@pytest.mark.parametrize("words, said", [
    ([], "no host; give one"),
    (["box"], "no flags of the run"),
    (["box", "--"], "no flags of the run"),
    (["box", "other", "--", "x"], "two hosts, box and other"),
    (["--gpu", "box", "--", "x"], "unknown option --gpu"),
    (["--folder", "a;b", "box", "--", "x"], "folder=a;b: use letters"),
    (["--processes", "0", "box", "--", "x"], "processes=0 is not a whole number"),
    (["--data", "/nowhere", "box", "--", "x"], "/nowhere/train/manifest.json is missing"),
    (["box", "--", "--resume"], "leave --resume out"),
])
def test_bad_words_are_refused_before_anything(words, said):
    done = call(*words)
    assert done.returncode == 2 and said in done.stderr and done.stdout == ""


@needs_sshd
def test_a_host_that_is_not_there(ssh):
    done = call("--port", "1", "box", "--", "--data", "x")
    assert done.returncode == 2 and "box cannot be reached by ssh without a password" in done.stderr
