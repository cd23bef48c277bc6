"""Leases: mutual exclusion, heartbeats, takeover and fencing."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.local.object_store import ObjectStore
from pipelines.errors import RequestError, RunError
from pipelines.outputs import lease as lease_module
from pipelines.outputs.lease import OLD_LOCK_FILE, Fence, Holder, Lease, LeaseLostError, current_epoch, lock_uri
from pipelines.storage import uris
from pipelines.storage.bulk import list_keys, read_object, store_object
from pipelines.storage.documents import to_json
from pipelines.storage.filesystem import list_names, write_bytes
from tests.support.infer import REPOSITORY
from tests.support.other_users import let_others_enter

ELSEWHERE = {"host": "elsewhere", "machine": "another"}


@pytest.fixture(params=["local", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(lease_module, "HEARTBEAT_INTERVAL_S", 0.2)
    monkeypatch.setattr(lease_module, "HEARTBEAT_TIMEOUT_S", 0.8)
    if request.param == "local":
        return str(tmp_path)
    store = request.getfixturevalue("store")
    assert isinstance(store, ObjectStore)
    return f"s3://scratch/{tmp_path.name}"


def epoch_uri(output: str, epoch: int) -> str:
    return lock_uri(output, f"epoch-{epoch:06d}.json")


def holder_of(output: str, epoch: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(read_object(epoch_uri(output, epoch)))
    return found


def leave_behind(output: str, **changes: Any) -> Holder:
    """Write, as the next epoch, the lease of a run that did not release it."""
    with Lease(output) as lease:
        lease.acquire()
        content = holder_of(output, lease.fence.epoch)
    holder = Holder.model_validate(content | {"owner": "another"} | changes)
    write_bytes(epoch_uri(output, lease.fence.epoch), to_json(holder))
    return holder


@contextlib.contextmanager
def another_process(code: str, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """Run Python code in a separate process, which is killed at the end."""
    command = [sys.executable, "-c", code, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_second_run_is_refused_until_the_first_one_ends(output: str) -> None:
    with Lease(output) as first:
        first.acquire()
        with Lease(output) as second, pytest.raises(RequestError, match=f"another run is using .*{os.getpid()}"):
            second.acquire()
        first.check()
        first.fence.check()
    with Lease(output) as third:
        third.acquire()
        assert not third.is_takeover


def test_epochs_grow_and_only_the_last_epoch_file_stays(output: str) -> None:
    for epoch in (1, 2, 3):
        with Lease(output) as lease:
            lease.acquire()
            assert lease.fence == Fence(output, epoch)
        assert list_keys(uris.join(output, "_lock")) == [f"epoch-{epoch:06d}.json"]
        assert holder_of(output, epoch)["released"]


@pytest.mark.parametrize("num_processes", [12, pytest.param(100, marks=pytest.mark.slow)])
def test_exactly_one_of_simultaneous_starts_gets_the_lease(output: str, num_processes: int) -> None:
    command = [sys.executable, "-m", "tests.support.simultaneous_acquires", output, str(num_processes)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    outcomes = json.loads(done.stdout)
    assert len(outcomes) == num_processes, done.stderr
    assert outcomes.count(None) == 1
    assert all(f"another run is using {output}" in refusal for refusal in outcomes if refusal)


def test_slow_contender_does_not_recreate_an_old_epoch(output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        with Lease(output) as lease:
            lease.acquire()
    list_epochs = lease_module._list_epochs
    stale_listings = iter([[0]])  # its first listing is from before epoch 1
    monkeypatch.setattr(lease_module, "_list_epochs", lambda uri: next(stale_listings, None) or list_epochs(uri))
    with Lease(output) as slow, pytest.raises(RequestError, match="another run is using"):
        slow.acquire()
    assert current_epoch(output) == 2
    assert list_keys(uris.join(output, "_lock")) == ["epoch-000002.json"]


def test_lease_of_a_dead_process_is_taken_over_at_once(output: str) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for changes in ({"pid": gone.pid}, {"started": "1"}):  # in the second case, the process id was reused
        leave_behind(output, **changes)
        with Lease(output) as lease:
            started = time.monotonic()
            lease.acquire()
            assert lease.is_takeover
            assert time.monotonic() - started < lease_module.HEARTBEAT_TIMEOUT_S


def test_zombie_process_counts_as_dead(output: str) -> None:
    with another_process("import time; time.sleep(60)") as process:
        holder = leave_behind(output, pid=process.pid, started=lease_module._process_start(process.pid).ticks)
        with Lease(output) as lease, pytest.raises(RequestError, match=f"process {process.pid}"):
            lease.acquire()
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # leaves it a zombie
        with Lease(output) as lease:
            lease.acquire()
    assert holder.pid == process.pid


def test_stopped_process_is_judged_by_its_heartbeats(output: str) -> None:
    with another_process("import time; time.sleep(60)") as process:
        leave_behind(output, pid=process.pid, started=lease_module._process_start(process.pid).ticks)
        process.send_signal(signal.SIGSTOP)
        while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.01)
        with Lease(output) as lease:
            started = time.monotonic()
            lease.acquire()
            assert time.monotonic() - started >= lease_module.HEARTBEAT_TIMEOUT_S


HIDDEN_RUN = """
import os, sys
import pipelines.outputs.lease as lease_module
lease_module.HEARTBEAT_INTERVAL_S, lease_module.HEARTBEAT_TIMEOUT_S = 0.2, 2.0
ready, end = os.pipe(), os.pipe()
child = os.fork()
with lease_module.Lease(sys.argv[1]) as lease:
    if child == 0:
        lease.acquire()
        os.close(end[1])
        os.write(ready[1], b"1")
        os.read(end[0], 1)
    else:
        os.read(ready[0], 1)
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        assert not os.path.exists(f"/proc/{child}"), "/proc does not hide it"
        try:
            lease.acquire()
        except lease_module.RequestError as error:
            print(error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="must be root to mount /proc and to become another user")
def test_run_hidden_by_proc_is_judged_by_its_heartbeats(tmp_path: Path) -> None:
    let_others_enter(tmp_path)
    tmp_path.chmod(0o777)
    mount = 'mount -t proc -o hidepid=2 proc /proc; exec "$0" -c "$1" "$2"'
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", mount, sys.executable, HIDDEN_RUN, str(tmp_path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "another run is using" in done.stdout, done.stderr


def test_run_on_another_host_is_judged_by_its_heartbeats(output: str) -> None:
    leave_behind(output, **ELSEWHERE)
    with Lease(output) as lease:
        lease.acquire()  # succeeds, because no heartbeat arrives
    holder = leave_behind(output, **ELSEWHERE)
    uri, is_over = epoch_uri(output, current_epoch(output)), threading.Event()

    def beat() -> None:
        for number in range(100):
            if is_over.wait(0.1):
                return
            store_object(uri, to_json(holder.model_copy(update={"beat": number})))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with Lease(output) as lease, pytest.raises(RequestError, match="on elsewhere"):
            lease.acquire()
    finally:
        is_over.set()
        thread.join()


def test_run_that_lost_its_lease_is_interrupted_and_cannot_write(output: str) -> None:
    def wait_for_ray() -> None:
        with Lease(output) as lease:
            lease.acquire()
            fence = lease.fence
            store_object(epoch_uri(output, 2), to_json(Holder.model_validate(holder_of(output, 1) | ELSEWHERE)))
            with pytest.raises(LeaseLostError, match=r"another run \(epoch 2\) has taken over"):
                fence.check(max_age_s=0)
            time.sleep(30)

    started = time.monotonic()
    with pytest.raises(LeaseLostError, match=r"another run \(epoch 2\) has taken over"):
        wait_for_ray()
    assert time.monotonic() - started < 10
    assert holder_of(output, 2)["host"] == "elsewhere"


def test_run_whose_heartbeats_fail_stops_before_others_may_take_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT_INTERVAL_S", 0.1)
    monkeypatch.setattr(lease_module, "GIVE_UP_S", 0.6)

    def work() -> None:
        with Lease(str(tmp_path)) as lease:
            lease.acquire()
            monkeypatch.setattr(lease_module, "store_object", lambda *args, **kwargs: time.sleep(60))
            time.sleep(30)

    started = time.monotonic()
    with pytest.raises(LeaseLostError, match="no heartbeat of this run has reached"):
        work()
    assert time.monotonic() - started < 10
    assert lease_module.GIVE_UP_S < lease_module.HEARTBEAT_TIMEOUT_S


FROZEN_RUN = """
import signal, sys, time
import pipelines.outputs.lease as lease_module
lease_module.HEARTBEAT_INTERVAL_S, lease_module.HEARTBEAT_TIMEOUT_S, lease_module.GIVE_UP_S = 0.2, 0.8, 0.6
signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a background job of a shell script
with lease_module.Lease(sys.argv[1]) as lease:
    lease.acquire()
    try:
        print("acquired", flush=True)
        time.sleep(float(sys.argv[2]))
        print("continued", flush=True)
    except KeyboardInterrupt:
        print("stopped", flush=True)
        raise
"""


@pytest.mark.parametrize("is_taken_over", [True, False])
def test_frozen_driver_stops_on_resume_only_if_it_was_taken_over(tmp_path: Path, is_taken_over: bool) -> None:
    with another_process(FROZEN_RUN, str(tmp_path), "3" if not is_taken_over else "60") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "acquired\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(1)
        if is_taken_over:
            write_bytes(epoch_uri(str(tmp_path), 2), read_object(epoch_uri(str(tmp_path), 1)))
        process.send_signal(signal.SIGCONT)
        assert process.stdout.readline() == ("stopped\n" if is_taken_over else "continued\n")


def test_fence_asks_the_store_at_most_once_per_second(output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    num_listings = 0
    list_epochs = lease_module._list_epochs

    def count_listings(uri: str) -> list[int]:
        nonlocal num_listings
        num_listings += 1
        return list_epochs(uri)

    with Lease(output) as lease:
        lease.acquire()
        monkeypatch.setattr(lease_module, "_list_epochs", count_listings)
        monkeypatch.setattr(lease_module, "HEARTBEAT_INTERVAL_S", 60.0)
        fence = lease.fence
        for _ in range(50):
            fence.check()
        assert num_listings <= 2
        fence.check(max_age_s=0)
        assert num_listings <= 3


def test_heartbeats_are_sent(output: str) -> None:
    with Lease(output) as lease:
        lease.acquire()
        first = holder_of(output, 1)["beat"]
        deadline = time.monotonic() + 10
        while holder_of(output, 1)["beat"] <= first + 1:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_failed_run_releases_its_lease(output: str) -> None:
    def fail() -> None:
        with Lease(output) as lease:
            lease.acquire()
            raise RunError("too many failures")

    with pytest.raises(RunError, match="too many"):
        fail()
    assert holder_of(output, 1)["released"]


def test_unreachable_store_does_not_delay_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "RELEASE_TIMEOUT_S", 0.2)
    with Lease(str(tmp_path)) as lease:
        lease.acquire()
        monkeypatch.setattr(lease_module, "current_epoch", lambda *args: time.sleep(60))
        started = time.monotonic()
    assert time.monotonic() - started < 5


def test_lease_that_is_never_acquired_writes_nothing(output: str) -> None:
    with Lease(output):
        pass
    assert list_names(output) == []


def test_lock_of_an_older_version_is_respected_and_removed(output: str) -> None:
    uri = uris.join(output, OLD_LOCK_FILE)
    with Lease(output) as lease:
        lease.acquire()
        old = {name: value for name, value in holder_of(output, 1).items() if name not in ("format", "released")}
    write_bytes(uri, json.dumps(old).encode())
    with Lease(output) as lease, pytest.raises(RequestError, match=f"another run is using .*{os.getpid()}"):
        lease.acquire()
    write_bytes(uri, json.dumps(old | {"started": "1"}).encode())
    with Lease(output) as lease:
        lease.acquire()
    assert OLD_LOCK_FILE not in list_names(output)


@pytest.mark.parametrize("name", [OLD_LOCK_FILE, "_lock/epoch-000001.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b"5", b'{"owner": "a', b"[" * 100_000, b"\xff\xfe", b'{"a": 1}'])
def test_damaged_lock_is_refused_by_name_and_left_alone(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with Lease(str(tmp_path)) as lease, pytest.raises(RequestError, match=f"{path} is damaged .*: check that no other"):
        lease.acquire()
    assert path.read_bytes() == content


def test_lock_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "_lock" / "epoch-000001.json"
    path.parent.mkdir()
    path.write_text('{"format": 2, "owner": ["a list"]}')
    with Lease(str(tmp_path)) as lease, pytest.raises(RequestError, match=r"has format 2, but this version .* up to 1"):
        lease.acquire()
