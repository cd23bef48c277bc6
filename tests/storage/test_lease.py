"""One run at a time on an output."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.local import ObjectStore
from pipelines.errors import RequestError, RunError
from pipelines.storage import lease as module
from pipelines.storage import uris
from pipelines.storage.filesystem import list_names, read_bytes, write_bytes
from pipelines.storage.lease import LOCK_FILE, Lease


@pytest.fixture(params=["local", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(module, "BEAT_EVERY_S", 0.2)
    monkeypatch.setattr(module, "WATCH_S", 0.8)
    if request.param == "local":
        return str(tmp_path)
    store = request.getfixturevalue("store")
    assert isinstance(store, ObjectStore)
    return f"s3://scratch/{tmp_path.name}"


def held(output: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(read_bytes(uris.join(output, LOCK_FILE)))
    return found


def leave(output: str, **changes: Any) -> dict[str, Any]:
    """A lock as another run left it."""
    with Lease(output) as lease:
        lease.take()
        lock = held(output) | {"owner": "another"} | changes
    write_bytes(uris.join(output, LOCK_FILE), json.dumps(lock).encode())
    return lock


def test_a_second_run_is_refused_until_the_first_one_ends(output: str) -> None:
    with Lease(output) as first:
        first.take()
        with Lease(output) as second, pytest.raises(RequestError, match=f"another run is at work on .*{os.getpid()}"):
            second.take()
        first.check()
        assert held(output)["owner"] == first._owner
    assert LOCK_FILE not in list_names(output)
    with Lease(output) as third:
        third.take()


def test_the_lock_of_a_dead_process_is_taken_at_once(output: str) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for changes in ({"pid": gone.pid}, {"started": "1"}):  # the second: its id came again
        leave(output, **changes)
        with Lease(output) as lease:
            lease.take()
            assert held(output)["pid"] == os.getpid()


def test_another_host_is_watched(output: str) -> None:
    lock = leave(output, host="elsewhere", machine="another")
    with Lease(output) as lease:
        lease.take()  # no sign of life came
    leave(output, host="elsewhere", machine="another")
    beats = threading.Event()

    def beat() -> None:
        for number in range(100):
            if beats.wait(0.1):
                return
            write_bytes(uris.join(output, LOCK_FILE), json.dumps(lock | {"beat": number}).encode())

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with Lease(output) as lease, pytest.raises(RequestError, match="on elsewhere"):
            lease.take()
    finally:
        beats.set()
        thread.join()


def test_who_was_cut_off_finds_out_and_leaves_the_lock_alone(output: str) -> None:
    with Lease(output) as lease:
        lease.take()
        write_bytes(uris.join(output, LOCK_FILE), json.dumps(held(output) | {"owner": "another"}).encode())
        lease._thread.join(10)  # type: ignore[union-attr]
        with pytest.raises(RunError, match="another run has taken over"):
            lease.check()
    assert held(output)["owner"] == "another"


def test_it_shows_that_it_is_alive(output: str) -> None:
    with Lease(output) as lease:
        lease.take()
        first = held(output)["beat"]
        for _ in range(100):
            if held(output)["beat"] > first + 1:
                break
            threading.Event().wait(0.1)
        assert held(output)["beat"] > first + 1


def test_a_run_that_fails_gives_it_back(output: str) -> None:
    def fail() -> None:
        with Lease(output) as lease:
            lease.take()
            raise RunError("too many failures")

    with pytest.raises(RunError, match="too many"):
        fail()
    assert LOCK_FILE not in list_names(output)


def test_a_store_that_is_gone_does_not_hold_the_end_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RELEASE_S", 0.2)
    with Lease(str(tmp_path)) as lease:
        lease.take()
        monkeypatch.setattr(module, "read_object", lambda uri: time.sleep(60))
        started = time.monotonic()
    assert time.monotonic() - started < 5


def test_without_being_taken_it_leaves_nothing(output: str) -> None:
    with Lease(output):
        pass
    assert LOCK_FILE not in list_names(output)
