"""What a cluster has and whether it can grow, on real clusters."""

import os
import subprocess
import sys
from pathlib import Path

from cluster.local import RayHead
from pipelines.inference.cluster import this_machine
from tests.support.infer import REPOSITORY


def ask(address: str, home: Path, question: str) -> str:
    """Evaluate a question about the cluster in a process of its own, connected to it."""
    code = (
        "import ray; from pipelines.inference.cluster import can_grow, list_nodes; "
        f"ray.init(logging_level='error'); print({question})"
    )
    environment = os.environ | {"RAY_ADDRESS": address, "HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_this_machine_has_its_cores() -> None:
    assert this_machine().num_cpus >= 1


def test_a_cluster_without_an_autoscaler_cannot_grow(ray_server: RayHead) -> None:
    assert ask(ray_server.address, ray_server.home, "can_grow()") == "False"
    assert ask(ray_server.address, ray_server.home, "list_nodes()") == "[Node(num_cpus=2.0, num_gpus=0)]"
