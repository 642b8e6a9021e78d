"""Data and checkpoints in a bucket: an S3-speaking server behind a proxy that injects faults."""

import hashlib
import http.client
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from skylar.data.loader import PackedLoader
from skylar.data.shards import ShardDataset, write_shards
from skylar.data.streaming import StreamedDataset, StreamOrder, open_remote_data
from skylar.data.tokenizer import BPETokenizer
from skylar.training.upload import Uploader, download_run
from skylar.utils.remote import RemoteFolder, retry

pytest.importorskip("moto", reason="the S3 server of the dev extra")
TEXTS = [f"Document {i}: " + f"number {i % 7} and so on, " * 20 for i in range(160)]


# --- a server, and a proxy that breaks things -----------------------------------------------


class Faulty(BaseHTTPRequestHandler):
    "Forwards to the S3 server; every so often it answers 500, nothing at all, or half."

    protocol_version = "HTTP/1.1"

    def forward(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.next_fault(self.command, self.path)
        if fault == "500":
            return self.answer(503, b"<Error><Code>SlowDown</Code></Error>", {})
        if fault == "timeout":
            time.sleep(self.server.silence)
            self.close_connection = True
            return None
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=30)
        upstream.request(self.command, self.path, body, dict(self.headers))
        response = upstream.getresponse()
        data = response.read()
        keep = {k: v for k, v in response.getheaders()
                if k.lower() not in ("transfer-encoding", "connection", "content-length")}
        if self.command == "HEAD":
            keep["Content-Length"] = response.getheader("Content-Length", "0")
        half = fault == "truncate" and self.command == "GET" and len(data) > 1
        return self.answer(response.status, data, keep, len(data) // 2 if half else None)

    def answer(self, status, data, headers, cut=None):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data if cut is None else data[:cut])
        if cut is not None:
            self.close_connection = True

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = forward

    def log_message(self, *_):
        pass


class Proxy(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, upstream: int):
        super().__init__(("127.0.0.1", 0), Faulty)
        self.upstream, self.silence = upstream, 3.0
        self.lock, self.counts = threading.Lock(), {}
        self.set_faults(0.0)

    def set_faults(self, rate: float, kinds=("500", "timeout", "truncate"), seed=0, all_of=""):
        self.rate, self.kinds, self.random, self.all_of = rate, kinds, random.Random(seed), all_of

    def next_fault(self, command: str, path: str) -> str | None:
        with self.lock:
            fault = self.random.choice(self.kinds) if self.random.random() < self.rate else None
            if self.all_of and self.all_of in path:
                fault = "500"
            self.counts[fault] = self.counts.get(fault, 0) + 1
            return fault

    def handle_error(self, *_):
        pass  # the client went away, as it should


@pytest.fixture(scope="module")
def proxy(tmp_path_factory):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = open(tmp_path_factory.mktemp("moto") / "log", "w")
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p",
                               str(port)], stdout=log, stderr=log)
    for _ in range(200):
        with socket.socket() as probe:
            if not probe.connect_ex(("127.0.0.1", port)):
                break
        assert server.poll() is None
        time.sleep(0.1)
    proxy = Proxy(port)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    environment = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
                   "AWS_DEFAULT_REGION": "us-east-1",
                   "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.server_address[1]}"}
    before = dict(os.environ)
    os.environ.update(environment)
    yield proxy
    os.environ.clear()
    os.environ.update(before)
    proxy.shutdown()
    server.terminate()
    server.wait()
    log.close()


@pytest.fixture
def bucket(proxy, request):
    "An own bucket, and a proxy without faults."
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    proxy.set_faults(0.0)
    proxy.counts.clear()
    name = "b" + hashlib.sha256(request.node.name.encode()).hexdigest()[:16]
    s3fs.S3FileSystem().mkdir(name)
    return f"s3://{name}"


def remote(url: str, lines=None, attempts=10, **options) -> RemoteFolder:
    report = (lines if lines is not None else []).append
    return RemoteFolder(url, attempts=attempts, first_wait=0.02, timeout=1.0, report=report,
                        **options)


def upload_folder(folder: Path, url: str) -> None:
    target = RemoteFolder(url)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        target.upload(path, path.relative_to(folder).as_posix())


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    "A data folder whose training part has many small shards."
    folder = tmp_path_factory.mktemp("data")
    tokenizer = BPETokenizer.train(TEXTS, vocab_size=300)
    tokenizer.save(folder / "tokenizer")
    write_shards(TEXTS[:150], tokenizer, folder / "train", shard_bytes=4000, progress=False)
    write_shards(TEXTS[150:], tokenizer, folder / "val", progress=False)
    return folder


def limit_of(folder: Path, shards: int) -> int:
    rows = json.loads((folder / "train/manifest.json").read_text())["shards"]
    sizes = sorted(r["tokens"] * 2 + 8 * (r["documents"] + 1) for r in rows)
    return sum(sizes[-shards:])


# --- files ----------------------------------------------------------------------------------


def test_files_arrive_whole_through_faults(proxy, bucket, tmp_path):
    lines, folder = [], remote(bucket)
    contents = {f"f{i}": random.Random(i).randbytes(5000 + i) for i in range(25)}
    proxy.set_faults(0.3, seed=1)
    proxy.silence = 1.5
    folder = remote(bucket, lines)
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        folder.upload(tmp_path / name, f"x/{name}")
    for name, content in contents.items():
        target = tmp_path / "back" / name
        folder.download(f"x/{name}", target, len(content), hashlib.sha256(content).hexdigest())
        assert target.read_bytes() == content
    assert set(proxy.counts) == {"500", "timeout", "truncate", None}
    assert len(list((tmp_path / "back").iterdir())) == 25  # nothing half left
    assert lines and all("attempt" in line for line in lines)


def test_a_file_that_is_another_one_is_refused(bucket, tmp_path):
    folder = remote(bucket, attempts=2)
    folder.write("a", b"one")
    with pytest.raises(OSError, match="gave up after 2 attempts.*SHA-256"):
        folder.download("a", tmp_path / "a", 3, hashlib.sha256(b"two").hexdigest())
    with pytest.raises(OSError, match="3 bytes came, not 4"):
        folder.download("a", tmp_path / "a", 4)
    assert list(tmp_path.iterdir()) == []


def test_missing_is_known_at_once(bucket, tmp_path):
    lines = []
    with pytest.raises(FileNotFoundError):
        remote(bucket, lines).download("nothing", tmp_path / "a")
    assert lines == [] and remote(bucket).names("no/such") == []


def test_pauses_double():
    pauses = []

    def fail():
        raise OSError("503")

    def report(line):
        pauses.append(float(line.rsplit(" in ", 1)[1].split()[0]))

    with pytest.raises(OSError, match="what: gave up after 5 attempts: OSError: 503"):
        retry("what", fail, attempts=5, first_wait=0.1, report=report)
    assert len(pauses) == 4
    assert all(0.1 * 2**i - 0.05 <= p <= 0.1 * 2**i + 0.15 for i, p in enumerate(pauses))


@pytest.mark.parametrize("url, said", [("nope://x/y", "nope"), ("s4://x", "s4")])
def test_unknown_protocols_are_named(url, said):
    with pytest.raises(ValueError, match=said):
        RemoteFolder(url)


# --- order ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_stream_order_gives_every_window_once(seed):
    sizes = np.random.default_rng(seed).integers(1, 400, size=17)
    order = StreamOrder(n_tokens=int(sizes.sum()), seq_len=16, seed=seed, group=3,
                        shard_tokens=sizes)
    n = order.n_windows
    assert n == sum((s - 1) // 16 for s in sizes)
    first, second = order.offsets(np.arange(n)), order.offsets(np.arange(n, 2 * n))
    assert len(set(first)) == n and set(first) == set(second) and list(first) != list(second)
    ends = np.cumsum(sizes)  # no window, with the token after it, leaves its shard
    assert (np.searchsorted(ends, first, side="right")
            == np.searchsorted(ends, first + 16, side="right")).all()


def test_stream_order_needs_windows():
    with pytest.raises(ValueError, match="seq_len=16 tokens; lower seq_len"):
        StreamOrder(n_tokens=30, seq_len=16, shard_tokens=[10, 20 - 4])


# --- data -----------------------------------------------------------------------------------


def test_stream_is_the_corpus_in_a_bounded_cache(proxy, bucket, data, tmp_path):
    upload_folder(data, bucket)
    limit = limit_of(data, 5)
    proxy.set_faults(0.15, seed=2)
    proxy.silence = 1.5
    streamed = StreamedDataset(remote(f"{bucket}/train"), tmp_path / "train", limit=limit,
                               group=2)
    local = ShardDataset(data / "train")
    assert streamed.fingerprint == local.fingerprint
    loader = PackedLoader(streamed, batch_size=4, seq_len=24)
    order = streamed.order(seq_len=24, seed=0, shuffle=True).order
    offsets, most = order.offsets(np.arange(loader.n_windows)), 0
    for step, batch in enumerate(loader):
        for row, start in zip(batch["input_ids"], offsets[4 * step : 4 * step + 4]):
            assert (row.numpy() == local[start : start + 24]).all()
        with streamed.cache.files.lock:  # under which files are dropped, in other threads
            files = [p for p in (tmp_path / "train").glob("shard-*.*")
                     if p.suffix in (".bin", ".idx")]
            most = max(most, sum(p.stat().st_size for p in files))
        if loader.epoch:
            break
    assert 0 < most <= limit < limit_of(data, 10**6) / 2
    assert proxy.counts["500"] and proxy.counts["truncate"]


def test_ranks_read_what_one_reads(bucket, data, tmp_path):
    upload_folder(data, bucket)

    def rows(world_size):
        loaders = [iter(PackedLoader(
            StreamedDataset(remote(f"{bucket}/train"), tmp_path / "train",
                            limit=limit_of(data, 8), group=2),
            batch_size=4 // world_size, seq_len=24, rank=r, world_size=world_size))
            for r in range(world_size)]
        return [row.tolist() for _ in range(30) for it in loaders
                for row in next(it)["input_ids"]]

    assert rows(1) == rows(2)


def test_damage_in_the_cache_is_found_and_fetched_again(bucket, data, tmp_path):
    upload_folder(data, bucket)
    cache = tmp_path / "train"

    def first_rows():
        lines = []
        dataset = StreamedDataset(remote(f"{bucket}/train"), cache, limit=limit_of(data, 8),
                                  group=2, report=lines.append)
        found = [b["input_ids"].tolist() for b, _ in
                 zip(PackedLoader(dataset, batch_size=4, seq_len=24), range(20))]
        return found, lines

    good, lines = first_rows()
    assert lines == []
    for path in cache.glob("shard-*.bin"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    again, lines = first_rows()
    assert again == good and lines and "is damaged: fetched again" in lines[0]


def test_a_dead_bucket_does_not_stop_a_run_that_has_its_data(proxy, bucket, data, tmp_path):
    upload_folder(data, bucket)

    def take(n, lines, **options):
        _, parts = open_remote_data(bucket, tmp_path, limit=10**9, group=2,
                                    report=lines.append)
        loader = PackedLoader(parts["train"], batch_size=4, seq_len=24)
        return [b["input_ids"].tolist() for b, _ in zip(loader, range(n))]

    n = 2 * len(PackedLoader(ShardDataset(data / "train"), batch_size=4, seq_len=24))
    good = take(n, [])
    proxy.set_faults(1.0, kinds=("500",))
    lines = []
    import skylar.data.streaming as streaming

    whole = streaming.RemoteFolder
    streaming.RemoteFolder = lambda url, report: whole(url, attempts=2, first_wait=0.01,
                                                       timeout=1.0, report=report)
    try:
        assert take(n, lines) == good
    finally:
        streaming.RemoteFolder = whole
    assert any("going on with the copy in" in line for line in lines)


def test_a_shard_that_cannot_be_had_is_named(proxy, bucket, data, tmp_path):
    upload_folder(data, bucket)
    proxy.set_faults(0.0, all_of="shard-")
    dataset = StreamedDataset(remote(f"{bucket}/train", attempts=2), tmp_path / "train",
                              limit=limit_of(data, 8), group=2)
    with pytest.raises(OSError, match=r"train/shard-\d+\.idx: gave up after 2 attempts"):
        next(iter(PackedLoader(dataset, batch_size=4, seq_len=24)))


def test_small_caches_are_refused(bucket, data, tmp_path):
    upload_folder(data, bucket)
    with pytest.raises(ValueError, match="does not hold two groups of 2 shards"):
        StreamedDataset(remote(f"{bucket}/train"), tmp_path, limit=limit_of(data, 3), group=2)
    with pytest.raises(FileNotFoundError, match="no manifest.json"):
        StreamedDataset(remote(f"{bucket}/nothing"), tmp_path / "b", limit=10**9)


# --- checkpoints ----------------------------------------------------------------------------


def test_upload_through_faults_and_back(proxy, bucket, tmp_path):
    import torch

    from skylar.training.checkpoint import load_checkpoint, save_checkpoint

    proxy.set_faults(0.2, seed=3)
    proxy.silence = 1.5
    model, folder = torch.nn.Linear(50, 20), remote(f"{bucket}/run")
    with Uploader(tmp_path / "run", folder, every=0.02) as uploader:
        for step in range(1, 6):
            model.weight.data.add_(1)
            save_checkpoint(tmp_path / "run/checkpoints", step, model)
    assert uploader.uploaded[-1] == "step-000005"
    whole = [n for n in folder.names("checkpoints") if n.startswith("step-")
             and folder.exists(f"checkpoints/{n}/manifest.json")]
    assert whole[-1] == "step-000005" and len(whole) <= 2
    other = torch.nn.Linear(50, 20)
    assert download_run(folder, tmp_path / "new").name == "step-000005"
    load_checkpoint(tmp_path / "new", other)
    assert torch.equal(model.weight, other.weight)


def test_a_checkpoint_without_manifest_is_not_opened(bucket, tmp_path):
    import torch

    from skylar.training.checkpoint import save_checkpoint

    folder = remote(f"{bucket}/run")
    with Uploader(tmp_path / "run", folder, keep_last=3):
        save_checkpoint(tmp_path / "run/checkpoints", 1, torch.nn.Linear(2, 2))
    folder.write("checkpoints/step-000002/state.json", b"{}")  # an upload that was cut off
    folder.write("checkpoints/latest", b"step-000002\n")
    assert download_run(folder, tmp_path / "new").name == "step-000001"
    assert download_run(remote(f"{bucket}/nothing"), tmp_path / "none") is None


def run_skylar(*words, **environment):
    return subprocess.run([sys.executable, "-m", "skylar", "pretrain", *words],
                          capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


@pytest.mark.slow
def test_a_run_in_the_bucket_moves_to_another_machine(proxy, bucket, data, tmp_path):
    upload_folder(data, f"{bucket}/data")
    words = ["--data", f"{bucket}/data", "--stream.shards", "2", "--stream.cache_gb", "0.01",
             "--model.n_layers", "1", "--model.d_model", "32", "--model.n_heads", "2",
             "--model.n_kv_heads", "2", "--schedule.kind", "constant",
             "--schedule.warmup_steps", "0",
             "--loader.batch_size", "2", "--loader.seq_len", "24", "--train.dtype", "float32",
             "--train.save_every", "3", "--train.eval_every", "0", "--train.log_every", "1"]
    here = str(tmp_path / "cache")
    straight = run_skylar(*words, "--out", str(tmp_path / "a"), "--train.steps", "9",
                          SKYLAR_CACHE=here)
    assert straight.returncode == 0, straight.stderr

    proxy.set_faults(0.1, seed=4, kinds=("500", "truncate"))
    first = run_skylar(*words, "--out", str(tmp_path / "b"), "--upload", f"{bucket}/run",
                       "--train.steps", "6", SKYLAR_CACHE=here)
    assert first.returncode == 0, first.stderr
    refused = run_skylar(*words, "--out", str(tmp_path / "d"), "--upload", f"{bucket}/run",
                         SKYLAR_CACHE=here)
    assert refused.returncode == 2 and "already holds a run; go on with --resume" in refused.stderr
    assert not (tmp_path / "d").exists()
    shutil.rmtree(tmp_path / "b")  # the machine is gone

    proxy.set_faults(0.1, seed=5, kinds=("500", "truncate"))
    second = run_skylar(*words, "--out", str(tmp_path / "c"), "--upload", f"{bucket}/run",
                        "--train.steps", "6", "--resume", "--extend_to", "9",
                        SKYLAR_CACHE=str(tmp_path / "new_cache"))
    assert second.returncode == 0, second.stderr

    def losses(name):
        rows = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return {row["step"]: row["loss"] for row in map(json.loads, rows)}

    assert list(losses("c")) == list(range(1, 10)) and losses("c") == losses("a")


@pytest.mark.parametrize("settings, said", [
    ({"out": "s3://b/x"}, "out='s3://b/x' must be a folder of this machine"),
    ({"init": "s3://b/x"}, "init='s3://b/x' must be a folder of this machine"),
    ({"upload": "runs/x"}, "upload='runs/x' is no URL"),
    ({"data": "s3://b/x", "corpus": {"source": "a"}}, "data='s3://b/x' is not made here"),
])
def test_what_must_be_local_says_so(settings, said, tmp_path):
    from skylar.training.run import RunConfig, build_config, prepare_run

    values = {"data": str(tmp_path), "out": str(tmp_path / "x"), **settings}
    with pytest.raises(ValueError, match=said):
        prepare_run(build_config(RunConfig, values))
    assert not (tmp_path / "x").exists()
