"""Processes that are not our children."""

import os
import time
from pathlib import Path


def is_running(pid: int) -> bool:
    """Whether there is such a process, zombies left out."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def wait_until_gone(pid: int, timeout_s: float = 30) -> None:
    """Wait for its end; fails where it does not come."""
    deadline = time.monotonic() + timeout_s
    while is_running(pid):
        assert time.monotonic() < deadline, f"process {pid} still runs"
        time.sleep(0.2)
