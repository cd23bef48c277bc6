"""Inspection and control of processes that need not be our children."""

import contextlib
import os
import signal
import time
from pathlib import Path


def is_running(pid: int) -> bool:
    """Return True if the process exists and is not a zombie."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def wait_until_gone(pid: int, timeout_s: float = 30) -> None:
    """Wait until a process has ended, and fail after `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    while is_running(pid):
        assert time.monotonic() < deadline, f"process {pid} is still running"
        time.sleep(0.2)


def descendants(pid: int) -> dict[int, str]:
    """Return the command lines of all descendants of a process, by process ID."""
    parents: dict[int, int] = {}
    names: dict[int, str] = {}
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if folder.name.isdigit():
                found = int(folder.name)
                parents[found] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                names[found] = (folder / "cmdline").read_text().replace("\0", " ").strip()
    below: dict[int, str] = {}
    level = {pid}
    while level:
        level = {child for child, parent in parents.items() if parent in level}
        below |= {child: names[child] for child in level}
    return below


def memory_bytes(pid: int) -> int:
    """Return the proportional set size (PSS) of a process in bytes, or 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def kill_tree(pid: int) -> None:
    """Send SIGKILL to a process and its descendants, and wait until the descendants have ended."""
    pids = [pid, *descendants(pid)]
    for found in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(found, signal.SIGKILL)
    for found in pids[1:]:
        wait_until_gone(found)


def processes_with_variable(name: str) -> dict[int, str]:
    """Return the command lines of processes with `name` in their environment, by process ID."""
    found: dict[int, str] = {}
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, NotADirectoryError, PermissionError):
            if folder.name.isdigit() and f"{name}=".encode() in (folder / "environ").read_bytes():
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ").strip()
    return found
