"""Listening sockets of processes, and their responses to clients without credentials."""

import contextlib
import http.client
import os
import socket
import ssl
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

import grpc

from cluster.local.processes import descendants

LISTEN = "0A"  # TCP_LISTEN of the kernel's net/tcp_states.h
# The list excludes pages that show only that a service is running (`/healthz`, weed's `/status`), and `/` of Ray's
# dashboard, a static file that shows no data without the token.
PAGES = (
    "/metrics",
    "/dir/assign",
    "/dir/status",
    "/cluster/status",
    "/col/delete?collection=images",
    "/ui/index.html",
    "/buckets/images/",
    "/api/jobs/",
    "/api/job_agent/jobs/",
    "/nodes?view=summary",
    "/logs",
    "/debug/pprof/",
)

# One request of each gRPC service of Ray 2.60; all fields are optional.
REQUESTS = (
    "ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "ray.rpc.InternalKVGcsService/InternalKVKeys",
    "ray.rpc.NodeManagerService/GetNodeStats",
    "ray.rpc.CoreWorkerService/GetCoreWorkerStats",
    "ray.rpc.ObjectManagerService/Pull",
    "ray.rpc.ReporterService/ReportOCMetrics",
    "ray.rpc.RayletDriver/ClusterInfo",
)
REFUSED = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNIMPLEMENTED)


class Listener(NamedTuple):
    """Listening socket."""

    host: str
    port: int
    process: str


def listeners_of(pid: int) -> list[Listener]:
    """Return the TCP listeners of a process and its descendants."""
    owners: dict[str, str] = {}
    for found, command in {pid: "", **descendants(pid)}.items():
        with contextlib.suppress(OSError):
            for link in Path(f"/proc/{found}/fd").iterdir():
                with contextlib.suppress(OSError):
                    owners[os.readlink(link)] = command
    listeners = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == LISTEN and f"socket:[{rest[5]}]" in owners:
                host, _, port = local.partition(":")
                listeners.append(Listener(_decode(host), int(port, 16), owners[f"socket:[{rest[5]}]"]))
    return listeners


def _decode(host: str) -> str:
    """Decode an address of /proc/net/tcp, which consists of four-byte words in native byte order."""
    words = [bytes.fromhex(host[start : start + 8])[::-1] for start in range(0, len(host), 8)]
    return str(ip_address(b"".join(words)))


def other_address() -> str:
    """Return an IP address of this machine other than loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing
        host: str = probe.getsockname()[0]
    return host


def is_loopback(host: str) -> bool:
    address = ip_address(host)
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def reachable_at(address: str, listeners: list[Listener]) -> list[Listener]:
    """Return the listeners that accept a connection at another address of this machine."""
    found = []
    for listener in listeners:
        with contextlib.suppress(OSError), socket.create_connection((address, listener.port), timeout=1):
            found.append(listener)
    return found


def open_pages(listener: Listener) -> list[str]:
    """Return the `PAGES` that a listener serves by HTTP or HTTPS without credentials."""
    return [page for page in PAGES for is_tls in (False, True) if _status(listener, page, is_tls) < 400]


def _status(listener: Listener, page: str, is_tls: bool) -> int:
    """Return the HTTP status of a page, or 999 if the listener does not speak HTTP or closes the connection."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    address = ("127.0.0.1", listener.port)
    plain = http.client.HTTPConnection(*address, timeout=1)
    connection = http.client.HTTPSConnection(*address, timeout=1, context=context) if is_tls else plain
    try:
        connection.request("GET", page)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 999
    finally:
        connection.close()


def open_services(listener: Listener) -> list[str]:
    """Return the gRPC `REQUESTS` that a listener does not reject for lack of credentials."""
    found = []
    with grpc.insecure_channel(f"127.0.0.1:{listener.port}") as channel:
        for request in REQUESTS:
            try:
                channel.unary_unary(f"/{request}")(b"", timeout=1)
                found.append(request)
            except grpc.RpcError as error:
                if error.code() not in REFUSED:
                    found.append(f"{request}: {error.code()}")
    return found
