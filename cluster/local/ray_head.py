"""Ray head and further Ray nodes on this machine.

They use free ports and temporary folders, and stop when their `with` block or the process that started them ends.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.local.services import find_program, free_ports, stop, terminate_with_parent, wait_until
from pipelines.runtime.ray_compat import LOOPBACK_VARIABLES, SYSTEM_CONFIG

ANSWER_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class RayHead:
    """Running Ray head.

    Attributes:
        address: Value of `RAY_ADDRESS` for drivers.
        job_server: Value of `RAY_ADDRESS` for `ray job submit`.
        home: HOME of the head and its clients, which holds the access token in `.ray/auth_token`.
    """

    address: str
    job_server: str
    home: Path

    def environment(self) -> dict[str, str]:
        """Return the variables with which `ray job` and drivers reach this head."""
        return {"HOME": str(self.home), "RAY_ADDRESS": self.job_server, "RAY_AUTH_MODE": "token", **LOOPBACK_VARIABLES}


@contextlib.contextmanager
def ray_head(
    num_cpus: int | None = None, environment: Mapping[str, str] | None = None, num_gpus: int | None = None
) -> Iterator[RayHead]:
    """Run `ray start --head` with its job server within the block.

    All services listen on loopback only, and accept only clients that have the token in HOME.

    Args:
        num_cpus: Number of CPUs that the head offers. Defaults to the machine's.
        environment: Environment variables for the head and its workers, such as those of the object store.
        num_gpus: Number of GPUs that the head offers, whether they exist or not. Defaults to the machine's.

    Raises:
        RuntimeError: The job server does not respond within `START_TIMEOUT_S`. The message contains the end of the log.
    """
    home = Path(tempfile.mkdtemp(prefix="ecaray-ray-"))
    ports = dict(
        zip(("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port"), free_ports(4))
    )
    command = [find_program("ray"), "start", "--head", "--block", "--include-dashboard=true", f"--temp-dir={home}/ray"]
    command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"]
    command += [f"--{name}={port}" for name, port in ports.items()]
    command += [] if num_cpus is None else [f"--num-cpus={num_cpus}"]
    command += [] if num_gpus is None else [f"--num-gpus={num_gpus}"]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # Entrypoints of jobs start with `python`, which must be the interpreter that has this package installed.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    tuning = {f"RAY_{name}": str(value) for name, value in SYSTEM_CONFIG.items()}
    variables = inherited | tuning | {"PATH": path, "HOME": str(home), "RAY_AUTH_MODE": "token", **LOOPBACK_VARIABLES}
    variables |= dict(environment or {})
    try:
        _write_token(home / ".ray" / "auth_token")
        with open(home / "ray.log", "wb") as log:
            process = subprocess.Popen(
                command, env=variables, stdout=log, stderr=log, start_new_session=True, preexec_fn=terminate_with_parent
            )
        head = RayHead(f"127.0.0.1:{ports['port']}", f"http://127.0.0.1:{ports['dashboard-port']}", home)
        try:
            _wait_for_job_server(variables | head.environment(), process, home / "ray.log")
            yield head
        finally:
            stop(process, [signal.SIGTERM, signal.SIGKILL])
    finally:
        shutil.rmtree(home, ignore_errors=True)


@contextlib.contextmanager
def ray_node(head: RayHead, num_cpus: int, environment: Mapping[str, str]) -> Iterator[int]:
    """Run another node of a head's cluster on this machine within the block.

    Args:
        head: Head that the node joins.
        num_cpus: Number of CPUs that the node offers.
        environment: Environment variables for its workers.

    Yields:
        Process ID of `ray start`, the ancestor of all processes of the node.
    """
    command = [find_program("ray"), "start", "--block", f"--num-cpus={num_cpus}"]
    # Ray replaces 127.0.0.1 with this machine's external address, where the head does not listen, but keeps 127.1.
    command += [f"--address={head.address.replace('127.0.0.1', '127.1')}"]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # The resolver of gRPC does not accept 127.1, while that of the system does.
    variables = {"HOME": str(head.home), "RAY_AUTH_MODE": "token", "GRPC_DNS_RESOLVER": "native"}
    with open(head.home / "node.log", "wb") as log:
        process = subprocess.Popen(
            command,
            env=inherited | variables | dict(environment),
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=terminate_with_parent,
        )
    try:
        yield process.pid
    finally:
        stop(process, [signal.SIGTERM, signal.SIGKILL])


def _write_token(path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32))


def _wait_for_job_server(client: Mapping[str, str], process: "subprocess.Popen[bytes]", log: Path) -> None:
    def attempt() -> bool:
        listing = [find_program("ray"), "job", "list"]
        return subprocess.run(listing, env=dict(client), capture_output=True, timeout=ANSWER_TIMEOUT_S).returncode == 0

    wait_until(attempt, process, log, "Ray")
