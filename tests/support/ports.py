"""Listening sockets of processes, and what they answer to somebody without credentials."""

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
# Not among them: what says that a service is up and nothing else (`/healthz`, weed's `/status`), and `/` of Ray's
# dashboard, a file that shows nothing without the token.
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
    "ray.rpc.ObjectManagerService/FreeObjects",
    "ray.rpc.ReporterService/ReportOCMetrics",
)
REFUSED = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNIMPLEMENTED)


class Listener(NamedTuple):
    """A socket that accepts connections."""

    host: str
    port: int
    process: str


def listeners_of(pid: int) -> list[Listener]:
    """All TCP listeners of a process and of those below it."""
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
    """Address of /proc/net/tcp: words of four bytes in the order of the machine."""
    words = [bytes.fromhex(host[start : start + 8])[::-1] for start in range(0, len(host), 8)]
    return str(ip_address(b"".join(words)))


def other_address() -> str:
    """An address of this machine that is not loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing
        host: str = probe.getsockname()[0]
    return host


def is_loopback(host: str) -> bool:
    address = ip_address(host)
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def answers_from(address: str, listeners: list[Listener]) -> list[Listener]:
    """Those that accept a connection at another address of this machine."""
    found = []
    for listener in listeners:
        with contextlib.suppress(OSError), socket.create_connection((address, listener.port), timeout=1):
            found.append(listener)
    return found


def open_pages(listener: Listener) -> list[str]:
    """Pages that a listener hands out by HTTP or HTTPS without credentials, health checks left out."""
    return [page for page in PAGES for is_tls in (False, True) if _status(listener, page, is_tls) < 400]


def _status(listener: Listener, page: str, is_tls: bool) -> int:
    """Return the status of an answer; 999 where the listener speaks no HTTP or closes the connection."""
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
    """Requests of gRPC that a listener carries out, or looks at, without credentials."""
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
