"""Memory budget for decoding, shared by all processes of a node.

Decoders take 5 to 25 bytes per pixel, so a few dozen images of `preprocess.max_pixels`, each in its own task, would
fill any node. Large images therefore reserve their decoder's memory before they are decoded, and wait while the node's
budget for decoding is used up. Ordinary photographs never wait.

The budget is a file in which one byte stands for `SLOT_BYTES`. A reservation holds an open-file-description lock
(fcntl(2)) on a range of bytes, which the kernel releases when the process ends for any reason.
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
"""Fraction of a node's memory, without Ray's object store, for decoding. The plan leaves it free."""
SLOT_BYTES = 2**26
"""Bytes that each decoding task may take without a reservation: a photograph of 6 megapixels."""
BYTES_PER_PIXEL = {"JPEG2000": 25, "WEBP": 24, "AVIF": 19, "HEIF": 16}
"""Bytes per pixel by Pillow's name of the format: the peak resident memory while an image of 3,000 x 3,000 pixels is
decoded, converted and resized. Each is the maximum over the format's variants (alpha, lossless, animated, full chroma)
and over the modes `exact` and `fast`."""
OTHER_BYTES_PER_PIXEL = 15
# Bytes per pixel of JPEGs that libjpeg-turbo decodes to RGB: in mode `exact`, in mode `fast`, which scales them down
# while decoding, and for the DCT coefficients of files of several scans.
JPEG_BYTES_PER_PIXEL, SCALED_JPEG_BYTES_PER_PIXEL, COEFFICIENT_BYTES_PER_PIXEL = 9, 4, 6
POLL_S = 0.01
# Linux's `struct flock`: type, whence, start, length, process id.
FLOCK = "hhqqi"
# Byte of the lock file that a process locks while it looks for free slots.
GATE = 0


class Reservation:
    """Memory reserved for one image until the end of a `with` block."""

    def __init__(self) -> None:
        self._descriptor: int | None = None

    def acquire(self, num_bytes: float) -> None:
        """Wait until the node has `num_bytes` free for decoding, and reserve them.

        If a decoder gives up on an image, the next decoder acquires its own memory instead. The memory held so far is
        released first, because processes that hold some memory while waiting for more could deadlock.

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
    """Limit on the bytes that processes with the same lock file hold together.

    Attributes:
        path: Path of the lock file, which stays empty.
        num_bytes: Size of the budget, in bytes.
    """

    path: str
    num_bytes: float

    def acquire(self, num_bytes: float) -> int:
        """Wait for `num_bytes`, or for the whole budget if it is smaller.

        Returns:
            File descriptor that holds the bytes until it is closed.

        Raises:
            RunError: The lock file cannot be opened, or belongs to another user.
        """
        num_slots = max(1, int(self.num_bytes / SLOT_BYTES))
        num_wanted = min(num_slots, -(-int(num_bytes) // SLOT_BYTES))
        descriptor = self._open()
        try:
            # Only one process at a time looks for a free range. Otherwise smaller images could starve a large one.
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
            raise RunError(
                f"cannot open {self.path}, the lock file of the memory budget for decoding: {error.strerror}; "
                f"set TMPDIR to a writable folder"
            ) from None
        found = os.fstat(descriptor)
        if found.st_uid != os.getuid() or not stat.S_ISREG(found.st_mode):
            os.close(descriptor)
            raise RunError(f"{self.path} belongs to another user or is not a regular file: remove it or set TMPDIR")
        return descriptor


@functools.cache
def node_budget() -> MemoryBudget:
    """Return the budget of this node, shared by all runs of a user."""
    from pipelines.runtime.nodes import this_machine  # late: Ray

    path = os.path.join(tempfile.gettempdir(), f"ecaray-decoding-{os.getuid()}.lock")
    return MemoryBudget(path, this_machine().memory_bytes * DECODING_SHARE)


def _return_freed_memory() -> None:
    """Make glibc return freed memory to the system. By default it keeps up to 64 MB per thread."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # other C libraries do not keep freed memory
        trim(0)


def _lock_free_range(descriptor: int, num_wanted: int, num_slots: int) -> bool:
    """Lock the first `num_wanted` consecutive free slots. Return False if there are none."""
    start = GATE + 1
    while start + num_wanted <= GATE + 1 + num_slots:
        try:
            _control(descriptor, fcntl.F_OFD_SETLK, fcntl.F_WRLCK, start, num_wanted)
            return True
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
        kind, _, held_from, num_held, _ = _control(descriptor, fcntl.F_OFD_GETLK, fcntl.F_WRLCK, start, num_wanted)
        if kind != fcntl.F_UNLCK:  # otherwise the range has been released in the meantime
            start = held_from + num_held
    return False


def _control(descriptor: int, command: int, kind: int, start: int, length: int) -> tuple[int, ...]:
    lock = struct.pack(FLOCK, kind, os.SEEK_SET, start, length, 0)
    return struct.unpack(FLOCK, fcntl.fcntl(descriptor, command, lock))
