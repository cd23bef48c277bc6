"""Ray cluster on separate hosts: a head without CPUs, workers, and an external client that submits jobs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.runtime.ray_compat import SYSTEM_CONFIG
from tests.multinode.hosts import Host
from tests.support.infer import REPOSITORY, summary_of

PORT, JOB_SERVER_PORT, METRICS_PORT = 6379, 8265, 8090
START_TIMEOUT_S = 60.0
JOB_TIMEOUT_S = 600.0
TOKEN_FILE = Path(".ray", "auth_token")
# Anyone who can reach a port of Ray can run code on its nodes, so each node and client must present the token.
TUNING = SYSTEM_CONFIG | {"enable_metrics_collection": True, "metrics_report_interval_ms": 2_000}
SETTINGS = {"RAY_AUTH_MODE": "token"} | {f"RAY_{name}": str(value) for name, value in TUNING.items()}
RAY = str(Path(sys.executable).with_name("ray"))


@dataclass
class RayCluster:
    """Running Ray cluster.

    Attributes:
        head: Host that runs the job server and the drivers, and offers no CPUs.
        client_home: HOME of the external client, which holds the token.
        logs: Folder of the logs of the nodes.
        nodes: Process of `ray start` by host name.
    """

    head: Host
    client_home: Path
    logs: Path
    nodes: "dict[str, subprocess.Popen[bytes]]" = field(default_factory=dict)

    @property
    def job_server(self) -> str:
        """URL of the job server, for `--address` of `ray job`."""
        return f"http://{self.head.address}:{JOB_SERVER_PORT}"

    def add_worker(self, host: Host, num_cpus: int, resources: Mapping[str, float] | None = None) -> None:
        """Start a node on a host, with the cluster's token in its HOME. It joins within a few seconds."""
        _copy_token(self.head.home, host.home)
        command = [RAY, "start", "--block", f"--address={self.head.address}:{PORT}", f"--num-cpus={num_cpus}"]
        command += [f"--metrics-export-port={METRICS_PORT}", f"--resources={json.dumps(dict(resources or {}))}"]
        self.nodes[host.name] = host.start(*command, log=self.logs / f"{host.name}.log")

    def remove_worker(self, host: Host) -> None:
        """End a node with SIGTERM, as Kubernetes does."""
        (node,) = [pid for pid, command in host.processes().items() if f"{RAY} start" in command]
        os.kill(node, signal.SIGTERM)
        self.nodes[host.name].wait(START_TIMEOUT_S)

    def list_state(self, kind: str, *words: str) -> list[dict[str, Any]]:
        """Return the `nodes`, `tasks`, `actors` or `jobs` from Ray's state API."""
        command = [RAY, "list", kind, "--format=json", "--detail", "--limit=10000", f"--address={self.job_server}"]
        printed = self.head.run(*command, *words)
        found: list[dict[str, Any]] = json.loads(printed) if printed.lstrip().startswith("[") else []
        return found  # Ray prints a sentence instead of an empty list

    def alive_addresses(self) -> set[str]:
        """Return the IP addresses of the nodes that Ray considers alive."""
        return {node["node_ip"] for node in self.list_state("nodes") if node["state"] == "ALIVE"}

    def wait_for(self, *hosts: Host) -> None:
        """Wait until Ray considers exactly the head and these hosts alive."""
        wanted = {self.head.address, *(host.address for host in hosts)}
        deadline = time.monotonic() + START_TIMEOUT_S
        while (alive := self.alive_addresses()) != wanted:
            assert time.monotonic() < deadline, f"alive: {alive}, wanted: {wanted}"
            time.sleep(1)

    def client(self, *words: str, timeout_s: float = JOB_TIMEOUT_S) -> "subprocess.CompletedProcess[str]":
        """Run `ray job` as an external client."""
        return subprocess.run(
            [RAY, "job", *words],
            cwd=REPOSITORY,
            env=self.client_variables(),
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    def client_variables(self) -> dict[str, str]:
        """Return the environment of a client, which has the token but no credentials of the store."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_"))}
        return kept | {"HOME": str(self.client_home), "RAY_ADDRESS": self.job_server, "RAY_AUTH_MODE": "token"}

    def submit(self, *words: str, submission_id: str) -> "subprocess.Popen[str]":
        """Submit a job as described in the README, and follow its log."""
        command = [RAY, "job", "submit", "--submission-id", submission_id, "--working-dir", "."]
        command += ["--runtime-env", "cluster/runtime_env.yaml", "--", "python", "-m", *words]
        return subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=self.client_variables(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run_job(self, *words: str, submission_id: str) -> dict[str, Any]:
        """Submit a job, wait for its end, and return its summary, which is the last line of its log."""
        with self.submit(*words, submission_id=submission_id) as process:
            printed, _ = process.communicate(timeout=JOB_TIMEOUT_S)
        assert process.returncode == 0, printed[-4000:]
        return summary_of(self.client("logs", submission_id).stdout)


def start_cluster(head: Host, client_home: Path, logs: Path) -> RayCluster:
    """Start a head without CPUs, and copy its token to the client.

    Raises:
        RuntimeError: The job server does not respond. The message contains the end of the head's log.
    """
    head.run(RAY, "get-auth-token", "--generate")
    _copy_token(head.home, client_home)
    command = [RAY, "start", "--head", "--block", "--num-cpus=0", f"--port={PORT}"]
    command += [f"--node-ip-address={head.address}", "--dashboard-host=0.0.0.0", f"--dashboard-port={JOB_SERVER_PORT}"]
    cluster = RayCluster(head, client_home, logs)
    log = logs / "head.log"
    cluster.nodes[head.name] = head.start(*command, log=log)
    deadline = time.monotonic() + START_TIMEOUT_S
    while cluster.client("list").returncode:
        if time.monotonic() > deadline or cluster.nodes[head.name].poll() is not None:
            raise RuntimeError(f"the Ray head did not start:\n{log.read_text(errors='replace')[-2000:]}")
        time.sleep(0.5)
    return cluster


def _copy_token(source: Path, target: Path) -> None:
    (target / TOKEN_FILE).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source / TOKEN_FILE, target / TOKEN_FILE)  # keeps the mode, which lets only the owner read it
