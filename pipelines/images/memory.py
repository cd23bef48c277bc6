"""Memory for decoding, shared by all processes of a node.

Decoders take 5 to 25 bytes a pixel, so a few dozen images of `preprocess.max_pixels`, each in a task of its own, would
fill any node. Large images therefore reserve what their decoder will take before they are decoded, and wait while the
node's share for decoding is taken. Ordinary photographs never wait.

The share is a file of one byte for each `SLOT_BYTES`. A reservation holds an open-file-description lock (fcntl(2)) on a
range of them, which the kernel releases when its process ends, however it ends.
"""

import ctypes
import errno
import fcntl
import functools
import os
import stat
import struct
import tempfile
import time
from dataclasses import dataclass
from types import TracebackType

from pipelines.errors import RunError

DECODING_SHARE = 0.25
"""Part of a node's memory (Ray's object store left out) that decoding may take; the plan leaves it free."""
SLOT_BYTES = 2**26
"""Bytes that each decoding task may take without asking: a photograph of 6 megapixels."""
BYTES_PER_PIXEL = {"JPEG2000": 25, "WEBP": 24, "AVIF": 19, "HEIF": 16}
"""Peak of the resident memory while an image of 3,000 x 3,000 pixels is decoded, converted and resized, by Pillow's
name of the format: the most of its variants (alpha, lossless, animated, full chroma) and of `exact` and `fast`."""
OTHER_BYTES_PER_PIXEL = 15
# JPEGs that libjpeg-turbo decodes to RGB: in `exact`; in `fast`, which scales them down as it decodes; and for the
# coefficients of several scans.
JPEG_BYTES_PER_PIXEL, SCALED_JPEG_BYTES_PER_PIXEL, COEFFICIENT_BYTES_PER_PIXEL = 9, 4, 6
POLL_S = 0.01
# struct flock of Linux: type, whence, start, length, process id.
FLOCK = "hhqqi"
GATE = 0


class Reservation:
    """Memory that one image holds until the end of a `with` block."""

    def __init__(self) -> None:
        self._descriptor: int | None = None

    def take(self, num_bytes: float) -> None:
        """Wait until the node has `num_bytes` for decoding.

        A decoder that gives up hands an image on to another one, which takes its own memory in place of the first's.
        What is held is released before: holders that wait for more could deadlock.

        Raises:
            RunError: The lock file of this node cannot be used.
        """
        self._release()
        if num_bytes > SLOT_BYTES:
            self._descriptor = node_budget().acquire(num_bytes)

    def __enter__(self) -> "Reservation":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._release()

    def _release(self) -> None:
        if self._descriptor is not None:
            _return_freed_memory()
            os.close(self._descriptor)
            self._descriptor = None


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes that the processes which share a file may hold together.

    Attributes:
        path: The file, which stays empty.
        num_bytes: Their sum.
    """

    path: str
    num_bytes: float

    def acquire(self, num_bytes: float) -> int:
        """Wait for `num_bytes`, or for all of the budget if that is less.

        Returns:
            A descriptor that holds them until it is closed.

        Raises:
            RunError: The file cannot be opened, or belongs to another user.
        """
        num_slots = max(1, int(self.num_bytes / SLOT_BYTES))
        num_wanted = min(num_slots, -(-int(num_bytes) // SLOT_BYTES))
        descriptor = self._open()
        try:
            # Only one process at a time looks for a free range. Otherwise smaller images could always overtake it.
            _control(descriptor, fcntl.F_OFD_SETLKW, fcntl.F_WRLCK, GATE, 1)
            while not _lock_free_range(descriptor, num_wanted, num_slots):
                time.sleep(POLL_S)
            _control(descriptor, fcntl.F_OFD_SETLK, fcntl.F_UNLCK, GATE, 1)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _open(self) -> int:
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise RunError(f"cannot open {self.path}, by which decoding tasks share memory: {error.strerror}") from None
        found = os.fstat(descriptor)
        if found.st_uid != os.getuid() or not stat.S_ISREG(found.st_mode):
            os.close(descriptor)
            raise RunError(f"{self.path} belongs to another user or is no file; remove it or set TMPDIR")
        return descriptor


@functools.cache
def node_budget() -> MemoryBudget:
    """Return the budget of this node, which all runs of a user share."""
    from pipelines.runtime.nodes import this_machine  # late: Ray

    path = os.path.join(tempfile.gettempdir(), f"ecaray-decoding-{os.getuid()}.lock")
    return MemoryBudget(path, this_machine().memory_bytes * DECODING_SHARE)


def _return_freed_memory() -> None:
    """Have glibc hand the blocks that a decoder freed back to the system; it keeps up to 64 MB for each thread."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # other C libraries keep none
        trim(0)


def _lock_free_range(descriptor: int, num_wanted: int, num_slots: int) -> bool:
    """Lock the first `num_wanted` free slots in a row, if there are as many."""
    start = GATE + 1
    while start + num_wanted <= GATE + 1 + num_slots:
        try:
            _control(descriptor, fcntl.F_OFD_SETLK, fcntl.F_WRLCK, start, num_wanted)
            return True
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
        kind, _, held_from, num_held, _ = _control(descriptor, fcntl.F_OFD_GETLK, fcntl.F_WRLCK, start, num_wanted)
        if kind != fcntl.F_UNLCK:  # otherwise it was released meanwhile
            start = held_from + num_held
    return False


def _control(descriptor: int, command: int, kind: int, start: int, length: int) -> tuple[int, ...]:
    lock = struct.pack(FLOCK, kind, os.SEEK_SET, start, length, 0)
    return struct.unpack(FLOCK, fcntl.fcntl(descriptor, command, lock))
