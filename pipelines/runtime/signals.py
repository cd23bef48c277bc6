"""Handling of SIGTERM, which `ray job stop` and most schedulers send before SIGKILL."""

import os
import signal
import threading
from collections.abc import Callable


def interrupt_on_sigterm() -> None:
    """Make SIGTERM raise KeyboardInterrupt, as Ctrl-C does. Call it again after `ray.init`, which sets its own handler.

    The call has no effect outside the main thread, where Python installs no signal handlers.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def announce_sigterm(announce: Callable[[], None]) -> None:
    """Call `announce` in a thread as soon as SIGTERM arrives. Must be called in the main thread.

    Python raises KeyboardInterrupt only once the main thread returns from C++. If every process of a job gets the
    signal, as from systemd, it may never return: Ray's core worker (Ray 2.60) exits the driver as soon as the raylet
    is gone.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)  # required by `set_wakeup_fd`
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def wait() -> None:
        while os.read(reading, 1)[0] != signal.SIGTERM:
            pass
        announce()

    threading.Thread(target=wait, daemon=True).start()
