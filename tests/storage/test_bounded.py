"""Memory limits of a fetch: `input.max_bytes` for one object, a byte budget for the objects of a task."""

import contextlib
import gc
import gzip
import os
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest

from cluster.local.object_store import ObjectStore
from pipelines.errors import ItemError
from pipelines.inputs.listing import list_objects
from pipelines.storage import bulk, uris
from pipelines.storage.bounded import ByteBudget, NoRoomError, Reservation
from pipelines.storage.bulk import fetch_many
from pipelines.storage.filesystem import write_bytes

MAX_BYTES = 1000
MIB = 1 << 20
BODIES = {
    "small": b"x" * MAX_BYTES,
    "large": b"x" * 50 * MIB,
    "short.gz": gzip.compress(b"y" * MAX_BYTES),
    "bomb": gzip.compress(b"x" * 200 * MIB, 1),
}


def fetch_one(uri: str, max_bytes: int = MAX_BYTES) -> bytes | ItemError:
    (fetched,) = bulk.fetch_many([uri], max_bytes)
    return fetched.content


def kind_of(content: bytes | ItemError) -> str:
    return content.kind if isinstance(content, ItemError) else "ok"


class _Server(BaseHTTPRequestHandler):
    """HTTP server that responds by path: with or without a length, compressed, endless, or with a status."""

    protocol_version = "HTTP/1.1"
    num_sent = 0
    methods: list[str] = []

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""

    def do_GET(self) -> None:
        self.methods.append(self.command)
        name = self.path.partition("?")[0].strip("/")
        if name.isdecimal():
            self.send_response(int(name))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        if name in ("bomb", "short.gz"):
            self.send_header("Content-Encoding", "gzip")
        if name in BODIES:
            self.send_header("Content-Length", str(len(BODIES[name])))
        else:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self._send(BODIES.get(name, b""), is_endless=name == "endless")

    do_HEAD = do_GET

    def _send(self, body: bytes, is_endless: bool) -> None:
        for start in range(0, len(body), 1 << 16):
            self.wfile.write(body[start : start + (1 << 16)])
            type(self).num_sent += 1 << 16
        while is_endless:
            self.wfile.write(b"400\r\n" + b"x" * 1024 + b"\r\n")


@pytest.fixture
def server() -> Iterator[str]:
    """Start a web server and return its URL."""
    _Server.num_sent, _Server.methods = 0, []
    web = ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    thread = threading.Thread(target=web.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{web.server_port}"
    web.shutdown()
    thread.join()
    web.server_close()


@pytest.mark.parametrize("kind", ["fifo", "link to /dev/zero", "folder", "socket", "link to a fifo"])
@pytest.mark.timeout(20)
def test_special_file_becomes_a_failed_row(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    with contextlib.ExitStack() as stack:
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "link to a fifo":
            os.mkfifo(tmp_path / "fifo")
            path.symlink_to(tmp_path / "fifo")
        elif kind == "link to /dev/zero":
            path.symlink_to("/dev/zero")
        elif kind == "folder":
            path.mkdir()
        else:
            stack.enter_context(socket.socket(socket.AF_UNIX)).bind(str(path))
        assert kind_of(fetch_one(str(path), 1 << 40)) == "not_an_image"


def test_local_files_are_bounded_by_content_not_by_reported_size(tmp_path: Path) -> None:
    (tmp_path / "exact").write_bytes(b"x" * MAX_BYTES)
    (tmp_path / "large").write_bytes(b"x" * (MAX_BYTES + 1))
    assert fetch_one(str(tmp_path / "exact")) == b"x" * MAX_BYTES
    assert kind_of(fetch_one(str(tmp_path / "large"))) == "too_many_bytes"
    assert os.stat("/proc/self/maps").st_size == 0
    assert kind_of(fetch_one("/proc/self/maps", 10)) == "too_many_bytes"
    assert kind_of(fetch_one("/proc/self/maps", MIB)) == "ok"


@pytest.mark.timeout(30)
def test_http_responses_are_bounded_in_decoded_bytes(server: str) -> None:
    assert fetch_one(f"{server}/small") == b"x" * MAX_BYTES
    assert fetch_one(f"{server}/short.gz") == b"y" * MAX_BYTES
    assert _Server.methods == ["GET", "GET"]
    for name in ("large", "endless"):
        assert kind_of(fetch_one(f"{server}/{name}")) == "too_many_bytes"
    assert _Server.num_sent < 20 * MIB
    before = _resident_bytes()
    assert kind_of(fetch_one(f"{server}/bomb", 20 * MIB)) == "too_many_bytes"
    assert _resident_bytes() - before < 100 * MIB


def test_http_statuses_map_to_error_kinds(server: str) -> None:
    kinds = [kind_of(fetch_one(f"{server}/{status}")) for status in (404, 403, 401, 418)]
    assert kinds == ["not_found", "access_denied", "access_denied", "storage_error"]
    equal = [fetch_one(f"{server}/418?{index}") for index in range(2)]
    assert str(equal[0]) == str(equal[1])


def test_reads_from_other_fsspec_stores_are_bounded() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/bounded/large", b"x" * (MAX_BYTES + 1))
    assert kind_of(fetch_one("memory://bounded/large")) == "too_many_bytes"
    assert kind_of(fetch_one("memory://bounded/large", MAX_BYTES + 1)) == "ok"
    assert kind_of(fetch_one("memory://bounded")) == "not_an_image"


def test_reads_from_stores_without_sizes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/bounded/large", b"x" * (MAX_BYTES + 1))
    monkeypatch.setattr(type(memory), "info", lambda self, path, **_: {"name": path, "type": "file", "size": None})
    assert kind_of(fetch_one("memory://bounded/large")) == "too_many_bytes"
    assert fetch_one("memory://bounded/large", MAX_BYTES + 1) == b"x" * (MAX_BYTES + 1)


def test_fetch_stays_within_its_memory_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "MAX_HELD_BYTES", 100 * MIB)
    # Objects this large are returned to the operating system by glibc when they are freed.
    names = [str(tmp_path / f"{index}") for index in range(16)]
    for name in names:
        with open(name, "wb") as file:
            file.truncate(40 * MIB)
    gc.collect()
    gc.disable()  # released objects must not have to wait for the garbage collector
    before = most = _resident_bytes()
    try:
        for fetched in bulk.fetch_many(names, max_bytes=1 << 30):
            assert isinstance(fetched.content, bytes)
            time.sleep(0.01)  # lets the fetch run as far ahead as the budget allows
            most = max(most, _resident_bytes())
    finally:
        gc.enable()
    assert most - before < (100 + 2 * 40) * MIB


def test_s3_objects_wait_for_room_in_the_budget(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = [bytes([index]) * 300_000 for index in range(12)]
    names = [f"s3://scratch/room/{index}" for index in range(12)]
    for name, content in zip(names, contents):
        bulk.store_object(name, content)
    held: list[int] = []
    original_try_acquire, original_acquire = ByteBudget.try_acquire, ByteBudget.acquire

    def try_acquire(budget: ByteBudget, num_bytes: int, own_bytes: int = 0) -> bool:
        is_acquired = original_try_acquire(budget, num_bytes, own_bytes)
        held.append(budget._held_bytes)
        return is_acquired

    def acquire(budget: ByteBudget, num_bytes: int) -> None:
        original_acquire(budget, num_bytes)
        held.append(budget._held_bytes)

    monkeypatch.setattr(ByteBudget, "try_acquire", try_acquire)
    monkeypatch.setattr(ByteBudget, "acquire", acquire)
    monkeypatch.setattr(bulk, "MAX_HELD_BYTES", 700_000)
    assert [one.content for one in sorted(bulk.fetch_many(names, MIB))] == contents
    assert max(held) == 600_000
    monkeypatch.setattr(bulk, "MAX_HELD_BYTES", 100)
    assert [one.content for one in sorted(bulk.fetch_many(names, MIB))] == contents


@pytest.mark.timeout(20)
def test_closing_a_fetch_early_does_not_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "MAX_HELD_BYTES", 1500)
    names = [str(tmp_path / f"{index}") for index in range(100)]
    for name in names:
        Path(name).write_bytes(b"x" * 1000)
    fetching = bulk.fetch_many(names, MAX_BYTES)
    next(fetching)
    fetching.close()  # type: ignore[attr-defined]


def test_budget_admits_an_oversized_object_once_nothing_else_is_held() -> None:
    budget = ByteBudget(100)
    small, large = Reservation(budget), Reservation(budget)
    small.grow(60)
    with pytest.raises(NoRoomError):
        large.grow(50)
    waiting = threading.Thread(target=large.wait_for, args=(500,))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    small.shrink(0)
    waiting.join(5)
    assert (large.num_bytes, budget.try_acquire(1)) == (500, False)
    large.grow(600)
    budget.close()
    with pytest.raises(NoRoomError):
        budget.acquire(1)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("location", ["local", "s3", "s3 through s3fs"])
def test_object_that_changed_since_listing_fails_as_changed(
    location: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    if location != "local":
        request.getfixturevalue("store")
    folder = str(tmp_path) if location == "local" else f"s3://scratch/{tmp_path.name}"
    names = ["a%41.jpg" if location == "s3 through s3fs" else "a.jpg", "b.jpg"]  # obstore paths cannot hold "%"
    for name in names:
        write_bytes(uris.join(folder, name), b"before")
    listed = list_objects(folder, []).table
    object_uris, etags = listed["uri"].to_pylist(), listed["etag"].to_pylist()
    assert all(etags)
    assert [found.content for found in fetch_many(object_uris, 100, etags)] == [b"before"] * 2
    write_bytes(object_uris[0], b"later!")
    contents = {found.position: found.content for found in fetch_many(object_uris, 100, etags)}
    assert isinstance(contents[0], ItemError)
    assert (contents[0].kind, contents[1]) == ("changed", b"before")
    unpinned = {found.position: found.content for found in fetch_many(object_uris, 100, ["", etags[1]])}
    assert unpinned == {0: b"later!", 1: b"before"}
