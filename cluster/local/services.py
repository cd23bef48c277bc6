"""Processes of services on this machine: find, start, wait for and stop them; free ports."""

import contextlib
import ctypes
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 5.0
# weed listens at each of its ports and at that port + 10,000 (gRPC). Both stay below 32,768, where Linux begins to hand
# out ports to any program that connects to another, and above 20,000, where those of Ray's workers end.
GRPC_OFFSET = 10_000
PORT_RANGE = (20_000, 22_700)
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def find_program(name: str) -> str:
    """Return the path of a program: of this environment, else of the PATH."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise RuntimeError(f"{name} is not installed: run `make setup`")
    return found


def wait_until(attempt: Callable[[], bool], process: "subprocess.Popen[bytes]", log: Path, what: str) -> None:
    """Repeat an attempt until it succeeds.

    Args:
        attempt: returns True once the service answers. What it raises is remembered as the reason.
        process: of the service.
        log: file that the service prints to.
        what: name of the service, for the error.

    Raises:
        RuntimeError: the service does not answer within `START_TIMEOUT_S`, or has ended. Holds the end of its log.
    """
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
    """Return ports that are free now, as is each port + 10,000."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(*PORT_RANGE)
        if port not in found and _is_free(port) and _is_free(port + GRPC_OFFSET):
            found.append(port)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def end_with_parent() -> None:
    """In the child, before it becomes the server: ask the kernel to end it when we end, however we end."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def be_killed_with_parent() -> None:
    """The same without a last word: a store whose data goes with it has nothing to put in order."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def stop(process: "subprocess.Popen[bytes]", signals: Sequence[signal.Signals]) -> None:
    """End the process and all that it started."""
    for how in signals:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
