"""SIGTERM, which `ray job stop` and most schedulers send before they kill: it ends a job as Ctrl-C does."""

import signal
import threading


def end_as_interrupted() -> None:
    """Answer SIGTERM with KeyboardInterrupt from now on. To be called again after `ray.init`, which sets its own."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
