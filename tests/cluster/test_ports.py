"""Local services accept no requests from other addresses or without credentials."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.local.processes import descendants
from cluster.local.ray_head import RayHead
from tests.support.infer import REPOSITORY
from tests.support.ports import is_loopback, listeners_of, open_pages, open_services, other_address, reachable_at


def assert_closed(pid: int, *services: str) -> None:
    deadline = time.monotonic() + 30
    while not all(any(service in found.process for found in listeners_of(pid)) for service in services):
        assert time.monotonic() < deadline, services
        time.sleep(0.5)
    listeners = listeners_of(pid)
    assert [listener for listener in listeners if not is_loopback(listener.host)] == []
    assert reachable_at(other_address(), listeners) == []
    assert {listener: pages for listener in listeners if (pages := open_pages(listener))} == {}
    assert {listener: requests for listener in listeners if (requests := open_services(listener))} == {}


def test_store_and_ray_head_reject_requests_without_credentials(ray_server: RayHead) -> None:
    assert_closed(os.getpid(), "weed server", "gcs_server", "raylet", "dashboard")


@pytest.mark.slow
def test_ray_head_rejects_clients_without_the_token(ray_server: RayHead, tmp_path: Path) -> None:
    variables = ray_server.environment() | {"HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled"}
    code = "import ray; ray.init(); print('it ran', ray.get(ray.remote(lambda: 1).remote()))"
    for variable, command in (
        (ray_server.address, [sys.executable, "-c", code]),
        (
            ray_server.job_server,
            [str(Path(sys.executable).with_name("ray")), "job", "submit", "--", "echo", "it", "ran"],
        ),
    ):
        done = subprocess.run(
            command, env=os.environ | variables | {"RAY_ADDRESS": variable}, capture_output=True, text=True, timeout=60
        )
        assert done.returncode != 0
        assert "it ran" not in done.stdout + done.stderr
        assert "uthentication" in done.stdout + done.stderr


JOB = """
import time, ray
from pipelines.runtime.ray_session import ray_session

with ray_session():
    ray.get(ray.remote(lambda: None).remote())
    print("up", flush=True)
    input()
"""


@pytest.mark.slow
def test_local_ray_of_a_job_rejects_requests_without_credentials(own_home: Path) -> None:
    job = subprocess.Popen(
        [sys.executable, "-c", JOB], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert job.stdin is not None
    assert job.stdout is not None
    try:
        assert "up" in job.stdout.readline()
        assert any("gcs_server" in command for command in descendants(job.pid).values())
        assert_closed(job.pid, "gcs_server", "raylet")
    finally:
        job.communicate("\n", timeout=60)
    assert job.returncode == 0
