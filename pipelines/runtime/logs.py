"""Log output of jobs: plain lines on stderr, with control characters escaped."""

import contextlib
import faulthandler
import io
import logging
import os
import re
import select
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TextIO, cast

from pipelines.config.text import escape_controls
from pipelines.runtime.ray_compat import hide_harmless_warnings

# Lines of Ray's own processes that would bury ours. Ray Train queries the dashboard, which is not always running, and
# repeats each report in full. Ray Data announces the end of each execution.
RAY_NOISE = (
    "Failed to query Ray Train Controller actor state",
    "Reporting training result",
    "has constructor arguments in the object store",
    "Progress bars disabled",
    r"Dataset \S+ execution finished",
)
# Lines that Ray's C++ code prints on the driver's stderr although nothing is wrong: the first for every pool of
# restartable actors, the second for every interrupted job, the third if the interrupt also ended Ray itself.
RAY_CPP_NOISE = re.compile(
    "has constructor arguments in the object store|Attempting to recover [0-9]+ lost objects"
    "|Failed to push error to driver for task"
)
# Ray prefixes lines of workers with `(RayTrainWorker pid=123, ip=10.0.0.7) `, and marks deduplicated lines.
WORKER_PREFIX = re.compile(r"^\((?:[\w.<>() ]+ )?pid=\d+(?:, ip=[\w.:]+)?\) ")
REPEATED = re.compile(r"\x1b\[32m( \[repeated \d+x across cluster\][^\x1b]*)\x1b\[0m")
# Start of a progress line, which replaces the previous line on a terminal.
CLEAR_LINE = "\x1b[2K\r"
STDERR = 2


def log_to_stderr() -> None:
    """Log the package's messages to stderr from level INFO, without a prefix, and silence Ray's noise.

    Call this before Ray is imported, because Ray reads its environment variables at import.
    """
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "|".join(RAY_NOISE))
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    logging.getLogger("pipelines").setLevel(logging.INFO)
    for name in ("aiobotocore", "botocore"):  # every process would log where it found credentials
        logging.getLogger(name).setLevel(logging.WARNING)
    hide_harmless_warnings()


class SafeStream(io.TextIOBase):
    """Text stream that escapes control characters, and ignores write errors such as a closed pipe."""

    def __init__(self, stream: TextIO) -> None:
        """Wrap a stream.

        Args:
            stream: Underlying stream. After its first error, all further text is dropped.
        """
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        self._stream, self._has_failed = stream, False

    def write(self, text: str) -> int:
        """Write text with its control characters escaped."""
        self._attempt(lambda: self._stream.write(self._clean(text)))
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        self._attempt(self._stream.flush)

    def isatty(self) -> bool:
        """Return True if the stream is a terminal and has not failed."""
        return not self._has_failed and self._stream.isatty()

    def fileno(self) -> int:
        """Return the file descriptor of the stream."""
        return self._stream.fileno()

    def _attempt(self, action: Callable[[], object]) -> None:
        if not self._has_failed:
            try:
                action()
            except (OSError, ValueError):  # OSError: no reader, or a full disk; ValueError: closed stream
                self._has_failed = True

    def _clean(self, text: str) -> str:
        is_terminal = self._stream.isatty()
        clear = CLEAR_LINE if is_terminal and text.startswith(CLEAR_LINE) else ""
        text = REPEATED.sub(r"\1", text[len(clear) :])
        body = text.rstrip("\r\n")
        end = text[len(body) :]
        return clear + escape_controls(body if is_terminal else WORKER_PREFIX.sub("", body), keep="\n\t") + end


@contextlib.contextmanager
def safe_streams() -> Iterator[None]:
    """Wrap stdout and stderr of this process in `SafeStream`, and filter the noise of C++ code on stderr.

    Use this once, for the whole life of the process. Python writes to the original descriptors. Output of C and C++
    code on file descriptor 2 passes through a thread, which drops `RAY_CPP_NOISE`.
    """
    _open_closed_descriptors()
    stderr = os.dup(STDERR)
    sys.stdout = _safe(1)
    sys.stderr = _safe(stderr)
    faulthandler.enable(stderr)  # bypasses the thread, which does not survive a crash
    reading, writing = os.pipe()
    os.dup2(writing, STDERR)
    os.close(writing)
    is_over = threading.Event()
    thread = threading.Thread(target=_forward, args=(reading, is_over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        os.dup2(stderr, STDERR)
        is_over.set()
        thread.join(timeout=1)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()


def _safe(descriptor: int) -> TextIO:
    stream = os.fdopen(descriptor, "w", buffering=1, encoding="utf-8", closefd=False)
    return cast("TextIO", SafeStream(stream))


def _open_closed_descriptors() -> None:
    """Open descriptors that `>&-` has closed on /dev/null.

    Otherwise the next file or socket would get the number, and receive the printed output.
    """
    for descriptor in (0, 1, STDERR):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)


def _forward(reading: int, is_over: threading.Event) -> None:
    """Print the lines of the pipe `reading` until `is_over` is set and the pipe is empty."""
    rest = b""
    while True:
        has_ended = is_over.is_set()
        if not select.select([reading], [], [], 0 if has_ended else 0.1)[0]:
            if has_ended:
                break
            continue
        chunk = os.read(reading, 65536)
        if not chunk:
            break
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            _print_cpp(line.decode(errors="backslashreplace"))
    if rest:
        _print_cpp(rest.decode(errors="backslashreplace"))


def _print_cpp(line: str) -> None:
    if not RAY_CPP_NOISE.search(line):
        print(line, file=sys.stderr, flush=True)
