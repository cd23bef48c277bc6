"""Several hosts on one machine: Linux namespaces with addresses of their own, joined by a bridge.

Each host has its own network, host name, processes, HOME, shared memory and Ray temp folder; the file system is the
machine's. All of it hangs on one process, which the kernel kills when ours ends, however that comes: processes,
addresses and mounts go with it.
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
# 198.18.0.0/15 is set aside for tests of network devices (RFC 2544): no real host answers there.
SUBNET = "198.18.{}.{}"
OUTSIDE = 254  # our own end of the network, outside of all hosts
# The process that a namespace lives on: it waits, and the kernel reaps what is left to it.
WAIT = "exec env --ignore-signal=CHLD sleep infinity"
NAMESPACES = ["--net", "--mount", "--uts", "--pid", "--mount-proc", "--fork", "--kill-child"]


def can_make_hosts() -> bool:
    """Whether we are root, and iproute2 and util-linux are installed."""
    path = os.environ.get("PATH", "").split(os.pathsep)
    tools = ("ip", "unshare", "nsenter", "setpriv")
    return os.geteuid() == 0 and all(any(Path(folder, tool).exists() for folder in path) for tool in tools)


@dataclass(frozen=True)
class Host:
    """A host that runs.

    Attributes:
        name: its host name.
        address: on the bridge.
        home: HOME of all that runs on it.
        pid: of the process that it lives on.
        network_pid: of the process that the bridge lives on.
        variables: the whole environment of what runs on it.
    """

    name: str
    address: str
    home: Path
    pid: int
    network_pid: int
    variables: Mapping[str, str]

    def command(self, *words: str) -> list[str]:
        """The command line that runs these words on the host."""
        return ["nsenter", f"--target={self.pid}", "--all", f"--wd={Path.cwd()}", "--", *words]

    def start(self, *words: str, log: Path) -> "subprocess.Popen[bytes]":
        """Start a program on the host, which writes to `log`."""
        with log.open("ab") as output:
            return subprocess.Popen(self.command(*words), env=dict(self.variables), stdout=output, stderr=output)

    def run(self, *words: str, timeout_s: float = 60) -> str:
        """Run a program on the host to its end; returns what it printed."""
        command = self.command(*words)
        done = subprocess.run(command, env=dict(self.variables), capture_output=True, text=True, timeout=timeout_s)
        if done.returncode:
            raise RuntimeError(f"{self.name}: {' '.join(words)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        return done.stdout

    def processes(self) -> dict[int, str]:
        """Process id to command line of all that runs on it."""
        space = os.readlink(f"/proc/{self.pid}/ns/pid")
        found: dict[int, str] = {}
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                if folder.name.isdigit() and os.readlink(folder / "ns" / "pid") == space:
                    found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ").strip()
        return found

    def kill(self) -> None:
        """As if its power was cut: all of its processes and its network are gone."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        wait_until_gone(self.pid)

    def set_link(self, is_up: bool) -> None:
        """Pull its network cable, or put it back."""
        _in_network(self.network_pid, "ip", "link", "set", f"to-{self.name}", "up" if is_up else "down")


class Network:
    """A bridge, and the hosts on it. Made by `network`.

    Attributes:
        outside: our own address on it.
    """

    def __init__(self, pid: int, third_octet: int, folder: Path) -> None:
        self._pid, self._octet, self._folder = pid, third_octet, folder
        self._num_hosts = 0
        self.outside = SUBNET.format(third_octet, OUTSIDE)

    def add_host(self, name: str, environment: Mapping[str, str]) -> Host:
        """Make a host.

        Args:
            name: its host name, at most 12 letters.
            environment: variables of all that runs on it, beside PATH and HOME.
        """
        self._num_hosts += 1
        address, folder = SUBNET.format(self._octet, self._num_hosts), self._folder / name
        (folder / "home").mkdir(parents=True)
        (folder / "ray").mkdir()
        Path("/tmp/ray").mkdir(exist_ok=True)  # Ray's default, over which each host lays its own
        names = folder / "names"
        names.write_text(f"127.0.0.1 localhost\n{address} {name}\n")
        mounts = f"mount -t tmpfs tmpfs /dev/shm; mount --bind {folder}/ray /tmp/ray; mount --bind {names} /etc/hosts"
        script = f"set -e; hostname {name}; {mounts}; {WAIT}"
        enter = ["nsenter", f"--target={self._pid}", "--all", "--"]
        entered = subprocess.Popen([*enter, "unshare", *NAMESPACES, "sh", "-c", script])
        pid = _wait_for_sleep(entered)
        cable = f"to-{name}"
        _in_network(self._pid, "ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
        _in_network(self._pid, "ip", "link", "set", cable, "master", "bridge", "up")
        _in_network(pid, "ip", "address", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _in_network(pid, "ip", "link", "set", device, "up")
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        variables = {"PATH": path, "HOME": str(folder / "home"), "LANG": "C.UTF-8", **environment}
        return Host(name, address, folder / "home", pid, self._pid, variables)


@contextlib.contextmanager
def network(folder: Path) -> Iterator[Network]:
    """A network without hosts, for the length of a `with` block; this process reaches it as one more host.

    Args:
        folder: where the hosts' homes and Ray's files are laid.

    Raises:
        RuntimeError: we may not, or a tool is missing.
    """
    octet = os.getpid() % 256
    script = f"set -e; ip link add bridge type bridge; ip link set bridge up; ip link set lo up; {WAIT}"
    command = ["setpriv", "--pdeathsig=KILL", "unshare", *NAMESPACES, "sh", "-c", script]
    process = subprocess.Popen(command)
    try:
        pid = _wait_for_sleep(process)
        made, ours = Network(pid, octet, folder), f"ecaray{octet}"
        _run("ip", "link", "add", ours, "type", "veth", "peer", "name", "to-outside", "netns", str(pid))
        _in_network(pid, "ip", "link", "set", "to-outside", "master", "bridge", "up")
        _run("ip", "address", "add", f"{made.outside}/24", "dev", ours)
        _run("ip", "link", "set", ours, "up")
        yield made
    finally:
        process.kill()  # its child is killed with it, and that one's namespaces go
        process.wait()


def _wait_for_sleep(process: "subprocess.Popen[bytes]") -> int:
    """The process id of the `sleep` that a script ends in: its namespaces are ready."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        for pid, command in descendants(process.pid).items():
            if command == "sleep infinity":
                return pid
        time.sleep(0.02)
    raise RuntimeError("the namespaces of a host could not be made: this needs root, iproute2 and util-linux")


def _in_network(pid: int, *command: str) -> None:
    _run("nsenter", f"--target={pid}", "--net", "--", *command)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=START_TIMEOUT_S)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
