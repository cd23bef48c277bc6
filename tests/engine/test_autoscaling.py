"""Node discovery and autoscaling on real clusters."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager

from cluster.local.ray_head import RayHead
from cluster.local.services import free_ports
from pipelines.runtime.nodes import this_machine
from tests.conftest import NUM_PHOTOGRAPHS
from tests.support.infer import REPOSITORY, run_command, summary_of

CPUS = "[(node.num_cpus, node.num_gpus) for node in list_nodes()]"


def ask(address: str, home: Path, question: str) -> str:
    """Evaluate an expression in a separate process that is connected to the cluster."""
    code = (
        "from pipelines.config.sections import ComputeConfig\n"
        "from pipelines.engine.autoscaling import plan_for_cluster\n"
        "from pipelines.runtime.nodes import can_grow, list_nodes\n"
        "from pipelines.runtime.ray_session import ray_session\n"
        f"with ray_session(): print('answer:', {question})"
    )
    environment = os.environ | {"RAY_ADDRESS": address, "HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    # The autoscaler also writes to stdout.
    (answer,) = [line for line in done.stdout.splitlines() if line.startswith("answer: ")]
    return answer.removeprefix("answer: ")


def test_this_machine_reports_its_cores() -> None:
    assert this_machine().num_cpus >= 1


@pytest.mark.parametrize(("visible", "num_gpus"), [(None, 8), ("3", 1), ("0,5", 2), ("", 0)])
def test_this_machine_reports_the_visible_gpus(
    visible: str | None, num_gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NvidiaGPUAcceleratorManager, "get_current_node_num_accelerators", staticmethod(lambda: 8))
    monkeypatch.setattr(
        "ray._private.accelerators.get_accelerator_manager_for_resource", lambda _: NvidiaGPUAcceleratorManager
    )
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert this_machine().num_gpus == num_gpus


def test_cluster_without_autoscaler_cannot_grow(ray_server: RayHead) -> None:
    assert ask(ray_server.address, ray_server.home, "can_grow()") == "False"
    assert ask(ray_server.address, ray_server.home, CPUS) == "[(2.0, 0)]"


@pytest.fixture
def growing_head() -> Iterator[tuple[str, Path]]:
    """Address and home of a head node without CPUs, whose autoscaler may add one node with two CPUs."""
    folder = Path(tempfile.mkdtemp(prefix="ecaray-"))  # Ray's socket paths below it have to be short
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "tests.support.autoscaling_head", str(folder), str(port)]
    head = subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert head.stdout is not None
        assert head.stdout.readline() == "up\n"
        yield f"127.0.0.1:{port}", folder
    finally:
        head.communicate(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def test_plan_waits_for_the_nodes_of_the_autoscaler(growing_head: tuple[str, Path]) -> None:
    address, home = growing_head
    # The cluster reports its autoscaler only a few seconds after the head is up.
    assert any(ask(address, home, f"(can_grow(), {CPUS})") == "(True, [])" for _ in range(10))
    plan = "plan_for_cluster(ComputeConfig(num_workers=1)).num_workers"
    assert ask(address, home, f"({plan}, {CPUS})") == "(1, [(2.0, 0)])"


@pytest.mark.slow
def test_job_scales_an_empty_cluster_up_and_it_scales_down_afterwards(
    growing_head: tuple[str, Path], photographs: Path, tmp_path: Path
) -> None:
    address, home = growing_head
    assert ask(address, home, CPUS) == "[]"
    keys = {"input.uri": photographs, "output.uri": tmp_path / "out", "model.name": "ecaresnet26t"}
    keys |= {"model.weights": "random", "preprocess.image_size": 64}
    arguments = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    done = run_command("jobs.infer", *arguments, timeout_s=200, RAY_ADDRESS=address, HOME=str(home))
    assert done.returncode == 0, done.stderr
    assert summary_of(done.stdout)["num_ok"] == NUM_PHOTOGRAPHS
    deadline = time.monotonic() + 120
    while ask(address, home, CPUS) != "[]":
        assert time.monotonic() < deadline
        time.sleep(2)
