"""Progress reports on stderr: images done, rate and remaining time.

A log file gets one line every few seconds. On a terminal, a single line is updated in place.
"""

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from pipelines.runtime.logs import CLEAR_LINE

REPORT_INTERVAL_S = 5.0


class Progress:
    """Counter of processed images. A separate thread reports it, so that reports continue while no results arrive."""

    def __init__(
        self, num_total: int, num_resumed: int = 0, publish: Callable[[dict[str, Any]], None] | None = None
    ) -> None:
        """Create a counter that starts at zero.

        Args:
            num_total: Number of images of the run.
            num_resumed: Number of images that an earlier attempt has processed.
            publish: Function that receives the result of `figures` every few seconds.
        """
        self.num_total = num_total
        self.num_resumed = num_resumed
        self.num_ok = 0
        self.num_failed = 0
        self.num_files = 0
        self.num_retries = 0
        self.num_clipped = 0
        self._started = time.monotonic()
        self._publish = publish
        self._is_terminal = sys.stderr.isatty()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._report, daemon=True)

    def __enter__(self) -> "Progress":
        self._started = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._print(end="\n")
        if self._publish:
            self._publish(self.figures() | {"is_running": False})

    def add(self, num_ok: int, num_failed: int, num_files: int = 0, num_retries: int = 0, num_clipped: int = 0) -> None:
        """Add the counts of one task."""
        self.num_ok += num_ok
        self.num_failed += num_failed
        self.num_files += num_files
        self.num_retries += num_retries
        self.num_clipped += num_clipped

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    def figures(self) -> dict[str, Any]:
        """Return the current figures for programs. `images_per_s` and `left_s` are None before the first image."""
        num_new = self.num_ok + self.num_failed
        rate = num_new / self.elapsed_s if num_new else None
        return {
            "is_running": True,
            "num_inputs": self.num_total,
            "num_resumed": self.num_resumed,
            "num_ok": self.num_ok,
            "num_failed": self.num_failed,
            "num_files": self.num_files,
            "num_retries": self.num_retries,
            "images_per_s": rate and round(rate, 3),
            "left_s": rate and round((self.num_total - self.num_resumed - num_new) / rate, 1),
        }

    def line(self) -> str:
        """Return the current report, such as `1,000 of 5,000 images, 80.0 images/s, 50 s left`."""
        num_new = self.num_ok + self.num_failed
        num_done = self.num_resumed + num_new
        text = f"{num_done:,} of {self.num_total:,} images"
        if self.num_failed:
            text += f", {self.num_failed:,} failed"
        if not num_new:
            return f"{text}, starting, {self.elapsed_s:.0f} s"
        rate = num_new / self.elapsed_s
        left_s = (self.num_total - num_done) / rate
        counts = {"files": self.num_files, "retries": self.num_retries}
        extra = "".join(f", {count:,} {what}" for what, count in counts.items() if count)
        return f"{text}, {rate:.1f} images/s, {_duration(left_s)} left{extra}"

    def _report(self) -> None:
        interval_s = 0.5 if self._is_terminal else REPORT_INTERVAL_S
        published = time.monotonic()
        while not self._stop.wait(interval_s):
            self._print(end="\r" if self._is_terminal else "\n")
            if self._publish and time.monotonic() - published >= REPORT_INTERVAL_S - interval_s / 2:
                self._publish(self.figures())
                published = time.monotonic()

    def _print(self, end: str) -> None:
        clear = CLEAR_LINE if self._is_terminal else ""
        print(f"{clear}{self.line()}", end=end, file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
