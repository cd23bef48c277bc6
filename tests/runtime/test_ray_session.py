"""Local Ray: its folder, and its cleanup when a request is refused during the start."""

import os
import stat
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from cluster.local.processes import processes_with_variable
from pipelines.errors import RequestError, RunError
from pipelines.runtime import ray_session as ray_session_module
from pipelines.runtime.ray_compat import LONGEST_SOCKET_SUFFIX
from pipelines.runtime.ray_session import (
    MAX_BASE_LENGTH,
    MAX_SOCKET_PATH,
    _session_folder,
    refuse_if_ray_cannot_start,
)
from tests.support.infer import REPOSITORY


def long_folder(tmp_path: Path) -> Path:
    folder = tmp_path / ("x" * MAX_BASE_LENGTH)
    folder.mkdir()
    return folder


def test_session_folder_is_private_and_removed_after_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TMPDIR", raising=False)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    with _session_folder() as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert len(f"{folder}{LONGEST_SOCKET_SUFFIX}") <= MAX_SOCKET_PATH
        (folder / "session").mkdir()
    assert not folder.exists()


def test_logs_of_a_failed_run_are_kept_and_their_folder_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with pytest.raises(RunError), _session_folder() as folder:
        raise RunError("a worker died")
    assert caplog.messages == [f"Ray's logs are in {folder}"]
    folder.rmdir()
    with pytest.raises(RequestError), _session_folder() as folder:
        raise RequestError("no such input")
    assert not folder.exists()


def test_tmpdir_too_long_for_sockets_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(long_folder(tmp_path)))
    with _session_folder() as folder:
        assert folder.parent == Path("/tmp")
    monkeypatch.setenv("TMPDIR", "/dev/shm")
    with _session_folder() as folder:
        assert folder.parent == Path("/dev/shm")


@pytest.mark.parametrize("variable", ["RAY_TMPDIR", "TMPDIR"])
def test_folders_that_cannot_hold_sockets_are_refused(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_session_module, "DEFAULT_FOLDER", "/proc")
    for folder, reason in (
        (long_folder(tmp_path), "is longer than 28 bytes"),
        (Path("/proc/absent"), "/proc/absent: "),
    ):
        monkeypatch.setenv(variable, str(folder))
        with pytest.raises(RequestError, match="set RAY_TMPDIR to a folder with a short path") as caught:
            refuse_if_ray_cannot_start()
        assert reason in str(caught.value)


REFUSED = """
import os, threading, time
from pipelines.config.verify import VerifyConfig
from pipelines.errors import RequestError
from pipelines.runtime.job import main
from pipelines.runtime.ray_session import ray_session_in_background

def run(config):
    with ray_session_in_background(start_now=True):
        time.sleep(float(os.environ["REFUSED_AFTER_S"]))
        while os.environ.get("REFUSED_WITH") not in {None, *(thread.name for thread in threading.enumerate())}:
            time.sleep(0.001)
        raise RequestError("refused")

def run_and_linger(config):
    try:
        run(config)
    finally:
        time.sleep(float(os.environ.get("LINGER_S", "0")))

main("a job", VerifyConfig, run_and_linger)
"""


def refuse_after(delay_s: float, **more: str) -> "tuple[subprocess.Popen[str], str]":
    """Start a job that is refused `delay_s` seconds after Ray began to start.

    Returns:
        The job, and the name of an environment variable that marks all of its processes.
    """
    mark = f"MARK_{uuid.uuid4().hex}"
    command = [sys.executable, "-c", REFUSED, "--output.uri", "/absent"]
    variables = os.environ | {mark: "1", "REFUSED_AFTER_S": str(delay_s)} | more
    return subprocess.Popen(command, cwd=REPOSITORY, env=variables, stderr=subprocess.PIPE, text=True), mark


SLOW = [pytest.param(delay_s, marks=pytest.mark.slow) for delay_s in (0.5, 1.0, 4.0, 8.0)]


@pytest.mark.integration
@pytest.mark.parametrize("delay_s", [0.0, 2.0, *SLOW])
def test_refusal_while_ray_starts_leaves_no_processes(own_home: Path, delay_s: float) -> None:
    process, mark = refuse_after(delay_s)
    seen: set[str] = set()
    while process.poll() is None:
        seen |= set(processes_with_variable(mark).values())
    assert process.stderr is not None
    assert (process.returncode, process.stderr.read()) == (2, "a job: error: refused\n")
    assert processes_with_variable(mark) == {}
    process.stderr.close()
    if delay_s >= 2:
        assert any("gcs_server" in command for command in seen)  # Ray was starting


@pytest.mark.integration
def test_refusal_while_ray_starts_prints_only_the_refusal(own_home: Path) -> None:
    process, _ = refuse_after(0, REFUSED_WITH="ray_print_logs", LINGER_S="2")
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (2, "a job: error: refused\n")


ENDED = """
import os, time, ray
from cluster.local.processes import descendants
from pipelines.runtime.ray_session import ray_session

def count():
    return sum("/ray/autoscaler/" in command for command in descendants(os.getpid()).values())

def shut_down(whole=ray.shutdown):
    deadline = time.monotonic() + 10
    while count() and time.monotonic() < deadline:
        time.sleep(0.01)
    print("then", count())
    whole()

with ray_session():
    print("first", count())
    ray.shutdown = shut_down
"""


@pytest.mark.integration
def test_ray_is_shut_down_without_waiting_for_its_autoscaler(own_home: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", ENDED], cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=True
    )
    assert ended.stdout.split() == ["first", "1", "then", "0"]


STARTED = """
import ray
from pipelines.runtime.ray_session import ray_session

with ray_session():
    print(ray.get(ray.remote(lambda: "done").remote()))
"""


@pytest.mark.integration
def test_home_need_not_be_writable(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("not a folder, so nothing can be written below it, even by root")
    started = subprocess.run(
        [sys.executable, "-c", STARTED],
        cwd=REPOSITORY,
        env=os.environ | {"HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (started.returncode, started.stdout) == (0, "done\n"), started.stderr
