"""Local service processes: finding programs and ports, waiting for the service, stopping it."""

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
# weed listens on each of its ports and on that port + 10,000 (gRPC). Both must be below 32,768, where Linux's ephemeral
# ports start, and above 20,000, where the ports of Ray's workers end.
GRPC_OFFSET = 10_000
PORT_RANGE = (20_000, 22_700)
PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def find_program(name: str) -> str:
    """Return the path of a program, from this Python environment if it is there, else from PATH."""
    in_environment = Path(sys.executable).with_name(name)
    found = str(in_environment) if in_environment.exists() else shutil.which(name)
    if found is None:
        raise RuntimeError(f"the program {name} is not installed; run `make setup`")
    return found


def wait_until(attempt: Callable[[], bool], process: "subprocess.Popen[bytes]", log: Path, name: str) -> None:
    """Call `attempt` until it returns True.

    Args:
        attempt: Function that returns True once the service responds. Its last exception becomes part of the error.
        process: Process of the service.
        log: Path of the service's log.
        name: Name of the service for the error.

    Raises:
        RuntimeError: The service did not respond within `START_TIMEOUT_S`, or has ended. The message contains the end
            of its log.
    """
    deadline = time.monotonic() + START_TIMEOUT_S
    reason: Exception | None = None
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if attempt():
                return
        except Exception as error:  # a client may raise anything while the server is starting
            reason = error
        time.sleep(0.3)
    tail = log.read_text(errors="replace")[-2000:]
    raise RuntimeError(f"{name} did not start within {START_TIMEOUT_S:.0f} s ({reason}):\n{tail}")


def free_ports(count: int) -> list[int]:
    """Return ports for which the port itself and the port + 10,000 are currently free."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(*PORT_RANGE)
        if port not in found and _is_free(port) and _is_free(port + GRPC_OFFSET):
            found.append(port)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def terminate_with_parent() -> None:
    """Make the kernel send SIGTERM to this process when its parent ends. For use as `preexec_fn`."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def kill_with_parent() -> None:
    """Make the kernel send SIGKILL to this process when its parent ends. For use as `preexec_fn`."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def stop(process: "subprocess.Popen[bytes]", signals: Sequence[signal.Signals]) -> None:
    """Send signals to the process group in turn, and wait `STOP_TIMEOUT_S` after each for the process to end."""
    for signal_number in signals:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal_number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
