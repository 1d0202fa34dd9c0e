"""Fetching CIFAR-10 from a local web server that misbehaves in every way a real one does."""

import contextlib
import hashlib
import http.server
import io
import socket
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest

from alrc_lab.data import DataError, cifar10, fetch_cifar10, load_cifar10

BATCHES = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]
PART, ARCHIVE = "cifar-10-binary.tar.gz.part", "cifar-10-binary.tar.gz"


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """An empty user cache, no ALRC_DATA, and no proxy between the tests and their server."""
    folder = tmp_path / "cache"
    monkeypatch.delenv("ALRC_DATA", raising=False)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(cifar10, "user_cache_dir", lambda name: str(folder / name))
    return folder / "alrc"


def record(seed):
    """One record of random pixels, its label the seed."""
    return bytes([seed]) + np.random.default_rng(seed).bytes(3072)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def archive_bytes(extra=None, leave_out=()):
    """A small archive in the official layout; `extra` is one more (TarInfo, bytes)."""
    buffer = io.BytesIO()
    members = [(f"cifar-10-batches-bin/{name}", record(seed)) for seed, name in enumerate(BATCHES)]
    members += [("cifar-10-batches-bin/other", b"not wanted")]
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in members:
            if Path(name).name not in leave_out:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        if extra is not None:
            tar.addfile(extra[0], io.BytesIO(extra[1]))
    return buffer.getvalue()


class Server(http.server.ThreadingHTTPServer):
    """Serve `content`; `has_ranges`, `cut_after` and `shift` say how badly. Remembers the ranges asked for."""

    def __init__(self, content):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.has_ranges, self.cut_after, self.shift = content, True, None, 0
        self.asked = []
        self.url = f"http://127.0.0.1:{self.server_port}/archive"
        self.md5 = hashlib.md5(content).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.asked.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and server.has_ranges else None
        size = len(server.content)
        if self.path != "/archive":
            self.send_error(404)
            return
        if start is not None and start >= size:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{size}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = server.content[start or 0 :]
        self.send_response(200 if start is None else 206)
        if start is not None:
            self.send_header("Content-Range", f"bytes {start + server.shift}-{size - 1}/{size}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body[: server.cut_after])

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(content):
    with Server(content) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(cifar10, "OFFICIAL_IMAGES", {"train": 5, "test": 1})
    with serving(archive_bytes()) as one:
        yield one


def fetch(server, **arguments):
    """Fetch from the local server; return the folder and the sentences said on the way."""
    said = []
    return fetch_cifar10(url=server.url, md5=server.md5, on_message=said.append, **arguments), said


def test_fetches_the_whole_and_then_says_it_is_there(server, cache):
    steps = []
    folder, _ = fetch(server, on_progress=lambda done, total: steps.append((done, total)))
    assert folder == cache / "cifar-10-batches-bin"
    assert steps[0] == (0, len(server.content))
    assert steps[-1] == (len(server.content), len(server.content))
    assert names_in(folder) == BATCHES
    assert names_in(cache) == ["cifar-10-batches-bin"]
    assert (load_cifar10().source, load_cifar10().note) == ("cache", "all 5 of CIFAR-10's 5 training images")
    again, said = fetch(server)
    assert again == folder
    assert "already there" in said[0]
    assert server.asked == [None]


def test_goes_on_after_a_cut(server, tmp_path):
    server.cut_after = 5000
    with pytest.raises(DataError, match=r"ended after 5,000 of .* repeat the command"):
        fetch(server, destination=tmp_path)
    assert (tmp_path / PART).read_bytes() == server.content[:5000]
    server.cut_after = None
    folder, said = fetch(server, destination=tmp_path)
    assert "going on from 5,000 bytes" in said
    assert server.asked == [None, "bytes=5000-"]
    assert len(load_cifar10(folder).images) == 5


@pytest.mark.parametrize("part", ["too long", "exactly long", "other bytes", "ranges ignored", "wrong range"])
def test_a_part_that_does_not_fit_starts_again(server, tmp_path, part):
    beginning = {"too long": server.content + b"x", "exactly long": b"x" * len(server.content)}
    file = tmp_path / PART
    file.write_bytes(beginning.get(part, b"x" * 5000))
    server.has_ranges = part != "ranges ignored"
    server.shift = -1 if part == "wrong range" else 0
    folder, said = fetch(server, destination=tmp_path)
    assert len(load_cifar10(folder).images) == 5
    assert any("start" in sentence for sentence in said)
    assert len(server.asked) == (1 if part == "ranges ignored" else 2)


def test_a_complete_part_is_not_downloaded_again(server, tmp_path):
    (tmp_path / PART).write_bytes(server.content)
    fetch(server, destination=tmp_path)
    assert server.asked == [f"bytes={len(server.content)}-"]


def test_a_wrong_checksum_unpacks_nothing_and_leaves_a_clean_start(server, tmp_path):
    server.md5 = "0" * 32
    with pytest.raises(DataError, match=hashlib.md5(server.content).hexdigest()):
        fetch(server, destination=tmp_path)
    assert names_in(tmp_path) == [ARCHIVE + ".bad"]
    server.md5 = hashlib.md5(server.content).hexdigest()
    assert fetch(server, destination=tmp_path)[0].is_dir()


def test_an_archive_placed_by_hand_needs_no_network(server, tmp_path):
    archive = tmp_path / ARCHIVE
    archive.write_bytes(server.content)
    fetch(server, destination=tmp_path)
    assert server.asked == []
    assert archive.exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / archive.name).write_bytes(b"not it")
    with pytest.raises(DataError, match=r"moved to .*\.bad"):
        fetch(server, destination=other)
    assert (other / (ARCHIVE + ".bad")).read_bytes() == b"not it"


def member(name, kind=tarfile.REGTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, "/etc/passwd", 4 if kind == tarfile.REGTYPE else 0
    return info, b"evil"


@pytest.mark.parametrize(
    "extra",
    [
        member("../evil"),
        member("/tmp/evil"),
        member("cifar-10-batches-bin/../../evil"),
        member("cifar-10-batches-bin/data_batch_1.bin", tarfile.SYMTYPE),
        member("cifar-10-batches-bin/link", tarfile.LNKTYPE),
    ],
    ids=["above", "absolute", "inside-out", "symlink", "hardlink"],
)
def test_an_archive_that_reaches_out_is_refused(server, tmp_path, extra):
    destination = tmp_path / "data"
    server.content = archive_bytes(extra)
    server.md5 = hashlib.md5(server.content).hexdigest()
    with pytest.raises(DataError, match="unsafe member"):
        fetch(server, destination=destination)
    assert names_in(destination) == [ARCHIVE]
    assert not list(tmp_path.rglob("*evil*"))


def test_an_archive_with_other_content_is_not_installed(server, tmp_path):
    for content, expected in [
        (archive_bytes(leave_out={"data_batch_2.bin"}), r"holds no data_batch_2\.bin"),
        (archive_bytes()[:-2000], "could not be unpacked"),
        (b"<html>sign in</html>", "could not be unpacked"),
    ]:
        destination = tmp_path / str(len(content))
        server.content, server.md5 = content, hashlib.md5(content).hexdigest()
        with pytest.raises(DataError, match=expected):
            fetch(server, destination=destination)
        assert names_in(destination) == [ARCHIVE]


def test_failures_are_one_line_with_the_address_the_reason_and_the_way_out(server, tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        refused = f"http://127.0.0.1:{unused.getsockname()[1]}/archive"
    for url, why in [
        (refused, "refused"),
        (server.url + "x", "404"),
        ("file:///etc/passwd", "not an http"),
        ("http://[", "could not be downloaded"),
    ]:
        with pytest.raises(DataError) as caught:
            fetch_cifar10(tmp_path, url=url)
        message = str(caught.value)
        assert "\n" not in message
        for part in (url, why, "By hand", str(tmp_path / "cifar-10-batches-bin" / "data_batch_1.bin")):
            assert part in message


def test_never_overwrites_an_incomplete_or_damaged_copy(server, tmp_path):
    batches = tmp_path / "cifar-10-batches-bin"
    batches.mkdir()
    for name in BATCHES:
        (batches / name).write_bytes(record(1) * 2)
    with pytest.raises(DataError, match="10 train images where the official set has 5"):
        fetch(server, destination=tmp_path)
    (batches / "data_batch_1.bin").write_bytes(b"x")
    with pytest.raises(DataError, match="1 bytes"):
        fetch(server, destination=tmp_path)
    assert (batches / "data_batch_1.bin").read_bytes() == b"x"
    assert server.asked == []
