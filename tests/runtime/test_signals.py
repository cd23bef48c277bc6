"""SIGTERM in a process whose main thread is blocked in C code."""

import subprocess
import sys

import pytest

from tests.support.infer import REPOSITORY

# The main thread never handles the signal, and another thread exits the process, as Ray does when the raylet is gone.
BLOCKED = """
import ctypes, os, signal, sys, threading
from pipelines.runtime.signals import announce_sigterm, interrupt_on_sigterm

interrupt_on_sigterm()
announce_sigterm(lambda: print("stopping", flush=True))
for number in map(int, sys.argv[1:]):
    threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
threading.Timer(1.0, os._exit, (1,)).start()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
ctypes.CDLL(None).sleep(30)
"""


@pytest.mark.parametrize(
    ("numbers", "stdout"),
    [(["15"], "stopping\n"), (["15", "15"], "stopping\n"), (["2", "15"], "stopping\n"), (["2"], ""), ([], "")],
    ids=["SIGTERM", "twice", "after SIGINT", "SIGINT", "none"],
)
def test_sigterm_is_announced_while_the_main_thread_is_blocked(numbers: list[str], stdout: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, *numbers], cwd=REPOSITORY, capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, stdout, "")
