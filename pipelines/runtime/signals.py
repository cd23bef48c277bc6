"""Handling of SIGTERM, which `ray job stop` and most schedulers send before SIGKILL."""

import signal
import threading


def interrupt_on_sigterm() -> None:
    """Make SIGTERM raise KeyboardInterrupt, as Ctrl-C does. Call it again after `ray.init`, which sets its own handler.

    The call has no effect outside the main thread, where Python installs no signal handlers.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
