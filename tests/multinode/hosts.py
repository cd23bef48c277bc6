"""Several hosts on one machine: Linux namespaces with their own addresses, connected by a bridge.

Each host has its own network, host name, processes, HOME, shared memory and Ray temp folder, and shares the file system
of the machine. All hosts depend on one process, which the kernel kills when ours ends for any reason. Their processes,
addresses and mounts end with it.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.local.processes import descendants, wait_until_gone

START_TIMEOUT_S = 20.0
# 198.18.0.0/15 is reserved for benchmarks of network devices (RFC 2544), so no real host uses it.
SUBNET = "198.18.{}.{}"
OUTSIDE = 254  # address of this process on the bridge
# The process that keeps a namespace alive. It sleeps, and the kernel reaps its orphaned children.
WAIT = "exec env --ignore-signal=CHLD sleep infinity"
NAMESPACES = ["--net", "--mount", "--uts", "--pid", "--mount-proc", "--fork", "--kill-child"]


def can_create_hosts() -> bool:
    """Return True if we are root, and iproute2 and util-linux are installed."""
    path = os.environ.get("PATH", "").split(os.pathsep)
    tools = ("ip", "unshare", "nsenter", "setpriv")
    return os.geteuid() == 0 and all(any(Path(folder, tool).exists() for folder in path) for tool in tools)


@dataclass(frozen=True)
class Host:
    """Running host.

    Attributes:
        name: Host name.
        address: IP address on the bridge.
        home: HOME of its processes.
        pid: Process ID of the process that keeps the host's namespaces alive.
        network_pid: Process ID of the process that keeps the bridge alive.
        variables: Complete environment of its processes.
    """

    name: str
    address: str
    home: Path
    pid: int
    network_pid: int
    variables: Mapping[str, str]

    def command(self, *words: str) -> list[str]:
        """Return the command line that runs a program on the host."""
        return ["nsenter", f"--target={self.pid}", "--all", f"--wd={Path.cwd()}", "--", *words]

    def start(self, *words: str, log: Path) -> "subprocess.Popen[bytes]":
        """Start a program on the host. Its output is appended to `log`."""
        with log.open("ab") as output:
            return subprocess.Popen(self.command(*words), env=dict(self.variables), stdout=output, stderr=output)

    def run(self, *words: str, timeout_s: float = 60) -> str:
        """Run a program on the host to its end, and return its stdout."""
        command = self.command(*words)
        done = subprocess.run(command, env=dict(self.variables), capture_output=True, text=True, timeout=timeout_s)
        if done.returncode:
            raise RuntimeError(
                f"{self.name}: {' '.join(words)} exited with status {done.returncode}:\n{done.stderr[-2000:]}"
            )
        return done.stdout

    def processes(self) -> dict[int, str]:
        """Return the command lines of the host's processes by process ID."""
        namespace = os.readlink(f"/proc/{self.pid}/ns/pid")
        found: dict[int, str] = {}
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                if folder.name.isdigit() and os.readlink(folder / "ns" / "pid") == namespace:
                    found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ").strip()
        return found

    def kill(self) -> None:
        """Kill all processes and the network of the host, as in a power failure."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        wait_until_gone(self.pid)

    def set_link(self, is_up: bool) -> None:
        """Disconnect the host from the network, or connect it again."""
        _in_network(self.network_pid, "ip", "link", "set", f"to-{self.name}", "up" if is_up else "down")


class Network:
    """Bridge with its hosts, created by `network`.

    Attributes:
        outside: IP address of this process on the bridge.
    """

    def __init__(self, pid: int, third_octet: int, folder: Path) -> None:
        self._pid, self._octet, self._folder = pid, third_octet, folder
        self._num_hosts = 0
        self.outside = SUBNET.format(third_octet, OUTSIDE)

    def add_host(self, name: str, environment: Mapping[str, str]) -> Host:
        """Create a host.

        Args:
            name: Host name of at most 12 letters.
            environment: Environment variables of its processes, besides PATH and HOME.
        """
        self._num_hosts += 1
        address, folder = SUBNET.format(self._octet, self._num_hosts), self._folder / name
        (folder / "home").mkdir(parents=True)
        (folder / "ray").mkdir()
        Path("/tmp/ray").mkdir(exist_ok=True)  # Ray's default folder, over which each host mounts its own
        names = folder / "names"
        names.write_text(f"127.0.0.1 localhost\n{address} {name}\n")
        mounts = f"mount -t tmpfs tmpfs /dev/shm; mount --bind {folder}/ray /tmp/ray; mount --bind {names} /etc/hosts"
        script = f"set -e; hostname {name}; {mounts}; {WAIT}"
        enter = ["nsenter", f"--target={self._pid}", "--all", "--"]
        entered = subprocess.Popen([*enter, "unshare", *NAMESPACES, "sh", "-c", script])
        pid = _wait_for_sleep(entered)
        link = f"to-{name}"
        _in_network(self._pid, "ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
        _in_network(self._pid, "ip", "link", "set", link, "master", "bridge", "up")
        _in_network(pid, "ip", "address", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _in_network(pid, "ip", "link", "set", device, "up")
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        variables = {"PATH": path, "HOME": str(folder / "home"), "LANG": "C.UTF-8", **environment}
        return Host(name, address, folder / "home", pid, self._pid, variables)


@contextlib.contextmanager
def network(folder: Path) -> Iterator[Network]:
    """Create a network without hosts within the block. This process is connected to it like a host.

    Args:
        folder: Folder for the homes and Ray files of the hosts.

    Raises:
        RuntimeError: We lack the permission, or a tool is missing.
    """
    octet = os.getpid() % 256
    script = f"set -e; ip link add bridge type bridge; ip link set bridge up; ip link set lo up; {WAIT}"
    command = ["setpriv", "--pdeathsig=KILL", "unshare", *NAMESPACES, "sh", "-c", script]
    process = subprocess.Popen(command)
    try:
        pid = _wait_for_sleep(process)
        created, own_link = Network(pid, octet, folder), f"ecaray{octet}"
        _run("ip", "link", "add", own_link, "type", "veth", "peer", "name", "to-outside", "netns", str(pid))
        _in_network(pid, "ip", "link", "set", "to-outside", "master", "bridge", "up")
        _run("ip", "address", "add", f"{created.outside}/24", "dev", own_link)
        _run("ip", "link", "set", own_link, "up")
        yield created
    finally:
        process.kill()  # this also kills its child, which ends the namespaces
        process.wait()


def _wait_for_sleep(process: "subprocess.Popen[bytes]") -> int:
    """Wait for the final `sleep` of a script, when its namespaces are ready, and return its process ID."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        for pid, command in descendants(process.pid).items():
            if command == "sleep infinity":
                return pid
        time.sleep(0.02)
    raise RuntimeError("cannot create the namespaces of a host; this requires root, iproute2 and util-linux")


def _in_network(pid: int, *command: str) -> None:
    _run("nsenter", f"--target={pid}", "--net", "--", *command)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=START_TIMEOUT_S)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
