"""Log lines of the jobs: plain lines on stderr, without control characters, whoever reads them."""

import contextlib
import faulthandler
import io
import logging
import os
import re
import select
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator
from typing import TextIO, cast

from pipelines.runtime.ray_compat import hide_harmless_warnings

# Lines of Ray's own processes that would bury ours: Ray Train asks a dashboard for its state, which is not always
# there, and repeats each report in full; Ray Data announces the end of each pass.
RAYS_NOISE = (
    "Failed to query Ray Train Controller actor state",
    "Reporting training result",
    "has constructor arguments in the object store",
    "Progress bars disabled",
    r"Dataset \S+ execution finished",
)
# Lines that Ray's C++ code prints on the driver's stderr although nothing is wrong: every pool of actors that can be
# restarted brings the first, every job that is interrupted the second.
RAYS_CPP_NOISE = re.compile("has constructor arguments in the object store|Attempting to recover [0-9]+ lost objects")
# How Ray marks the lines of workers: `(RayTrainWorker pid=123, ip=10.0.0.7) `; and that it left out equal ones.
WORKER_PREFIX = re.compile(r"^\((?:[\w.<>() ]+ )?pid=\d+(?:, ip=[\w.:]+)?\) ")
REPEATED = re.compile(r"\x1b\[32m( \[repeated \d+x across cluster\][^\x1b]*)\x1b\[0m")
# Begins a line of progress that takes the place of the last one on a terminal.
CLEAR_LINE = "\x1b[2K\r"
STDERR = 2


def log_to_stderr() -> None:
    """Print the package's messages as they are, from INFO up, and keep Ray from printing what nobody reads.

    To be called before Ray is imported, which reads its variables then.
    """
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "|".join(RAYS_NOISE))
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    logging.getLogger("pipelines").setLevel(logging.INFO)
    for name in ("aiobotocore", "botocore"):  # say where they found credentials and endpoint, in each process
        logging.getLogger(name).setLevel(logging.WARNING)
    hide_harmless_warnings()


def escape_controls(text: str) -> str:
    """Replace control characters, such as those of a file's name, by Python's escapes; newlines and tabs stay.

    Terminals obey escape sequences, and Unicode's format characters, such as U+202E, reorder what is read.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character
        if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Cs")
        else _escape(character)
        for character in text
    )


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


class SafeStream(io.TextIOBase):
    """A stream for people and logs: control characters are escaped, and a reader that has gone stops nothing."""

    def __init__(self, stream: TextIO) -> None:
        """Wrap a stream.

        Args:
            stream: what is written to. Once it refuses, all further text is dropped.
        """
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        self._stream, self._is_gone = stream, False

    def write(self, text: str) -> int:
        """Write text, with its control characters escaped."""
        self._attempt(lambda: self._stream.write(self._clean(text)))
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        self._attempt(self._stream.flush)

    def isatty(self) -> bool:
        """Return whether people read along."""
        return not self._is_gone and self._stream.isatty()

    def fileno(self) -> int:
        """Return the stream's descriptor."""
        return self._stream.fileno()

    def _attempt(self, action: Callable[[], object]) -> None:
        if not self._is_gone:
            try:
                action()
            except (OSError, ValueError):  # a pipe without reader or a full disk; a stream that was closed
                self._is_gone = True

    def _clean(self, text: str) -> str:
        is_terminal = self._stream.isatty()
        clear = CLEAR_LINE if is_terminal and text.startswith(CLEAR_LINE) else ""
        text = REPEATED.sub(r"\1", text[len(clear) :])
        body = text.rstrip("\r\n")
        end = text[len(body) :]
        return clear + escape_controls(body if is_terminal else WORKER_PREFIX.sub("", body)) + end


@contextlib.contextmanager
def safe_streams() -> Iterator[None]:
    """Put stdout and stderr of this process behind `SafeStream`, and keep C++ code from printing noise on stderr.

    For the whole life of a process. Python's own lines go where they went; what C and C++ write on the second file
    descriptor passes a thread, which drops `RAYS_CPP_NOISE`.
    """
    _open_closed_descriptors()
    stderr = os.dup(STDERR)
    sys.stdout = _safe(1)
    sys.stderr = _safe(stderr)
    faulthandler.enable(stderr)  # past the thread, which a crash takes along
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
    """Open what `>&-` closed on /dev/null. The next file or socket would take its number, and what is printed there."""
    for descriptor in (0, 1, STDERR):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)


def _forward(reading: int, is_over: threading.Event) -> None:
    """Hand on the lines of a pipe until all are read after the end."""
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
    if not RAYS_CPP_NOISE.search(line):
        print(line, file=sys.stderr, flush=True)
