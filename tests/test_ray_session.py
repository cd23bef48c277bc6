"""A Ray of one's own: that a request refused while it starts ends at once, and leaves nothing running."""

import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from cluster.processes import with_variable
from tests.support.infer import REPOSITORY

REFUSED = """
import os, threading, time
from pipelines.config.verify import VerifyConfig
from pipelines.errors import RequestError
from pipelines.job import main
from pipelines.ray_session import ray_session_beside

def run(config):
    with ray_session_beside(at_once=True):
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
    """A job that is refused so long after Ray began to start, and the mark that all of its processes carry."""
    mark = f"MARK_{uuid.uuid4().hex}"
    command = [sys.executable, "-c", REFUSED, "--output.uri", "/absent"]
    variables = os.environ | {mark: "1", "REFUSED_AFTER_S": str(delay_s)} | more
    return subprocess.Popen(command, cwd=REPOSITORY, env=variables, stderr=subprocess.PIPE, text=True), mark


SLOW = [pytest.param(delay_s, marks=pytest.mark.slow) for delay_s in (0.5, 1.0, 4.0, 8.0)]


@pytest.mark.parametrize("delay_s", [0.0, 2.0, *SLOW])
def test_a_refusal_while_ray_starts_leaves_nothing_behind(own_home: Path, delay_s: float) -> None:
    process, mark = refuse_after(delay_s)
    seen: set[str] = set()
    while process.poll() is None:
        seen |= set(with_variable(mark).values())
    assert process.stderr is not None
    assert (process.returncode, process.stderr.read()) == (2, "a job: error: refused\n")
    assert with_variable(mark) == {}
    process.stderr.close()
    if delay_s >= 2:
        assert any("gcs_server" in command for command in seen)  # Ray was starting


def test_threads_that_lose_a_ray_killed_half_started_say_nothing(own_home: Path) -> None:
    process, _ = refuse_after(0, REFUSED_WITH="ray_print_logs", LINGER_S="2")
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (2, "a job: error: refused\n")


ENDED = """
import os, time, ray
from cluster.processes import descendants
from pipelines.ray_session import ray_session

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


def test_ray_is_shut_down_without_waiting_for_its_autoscaler(own_home: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", ENDED], cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=True
    )
    assert ended.stdout.split() == ["first", "1", "then", "0"]
