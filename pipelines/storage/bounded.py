"""Reads with bounded memory: a size limit per object, and a byte budget for all objects of one task.

Sizes come from response headers and open files, never from listings, which may be stale. An object of unknown size (a
chunked or compressed HTTP response) is counted as it streams. Anything that is not a regular file is refused.
"""

import os
import stat
import threading
from collections.abc import Callable

from pipelines.errors import ItemError
from pipelines.storage import uris
from pipelines.storage.filesystem import etag_of_entry, etag_of_file, open_filesystem

CHUNK_BYTES, MIN_CHUNK_BYTES = 1 << 20, 1 << 16
FILE_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


class NoRoomError(Exception):
    """Error raised when an object does not fit into what is left of a byte budget.

    Attributes:
        num_bytes: Number of bytes that the object needs.
    """

    def __init__(self, num_bytes: int) -> None:
        super().__init__(num_bytes)
        self.num_bytes = num_bytes


class ByteBudget:
    """Limit on the total bytes that the objects of one task hold in memory.

    An object that is larger than the whole budget is admitted once nothing else is held.

    Args:
        max_bytes: Size of the budget.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._held_bytes = 0
        self._is_closed = False
        self._changed = threading.Condition()

    def try_acquire(self, num_bytes: int, own_bytes: int = 0) -> bool:
        """Acquire `num_bytes` more for an object that already holds `own_bytes`, or return False if they do not fit."""
        with self._changed:
            has_room = self._has_room(num_bytes, own_bytes)
            self._held_bytes += num_bytes if has_room else 0
            return has_room

    def acquire(self, num_bytes: int) -> None:
        """Block until `num_bytes` fit, then acquire them.

        Raises:
            NoRoomError: The budget was closed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._has_room(num_bytes, 0))
            if self._is_closed:
                raise NoRoomError(num_bytes)
            self._held_bytes += num_bytes

    def release(self, num_bytes: int) -> None:
        """Return `num_bytes` to the budget."""
        with self._changed:
            self._held_bytes -= num_bytes
            self._changed.notify_all()

    def close(self) -> None:
        """Wake all waiting threads; their `acquire` raises."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _has_room(self, num_bytes: int, own_bytes: int) -> bool:
        return self._held_bytes == own_bytes or self._held_bytes + num_bytes <= self._max_bytes


class Reservation:
    """Part of a byte budget that one object holds.

    Attributes:
        num_bytes: Number of bytes held.
    """

    def __init__(self, budget: ByteBudget) -> None:
        self._budget = budget
        self.num_bytes = 0

    def grow(self, num_bytes: int, at_most: int | None = None) -> None:
        """Grow the reservation to `num_bytes` in total.

        Args:
            num_bytes: New size of the reservation.
            at_most: Largest size that the object may reach, if that is not known yet.

        Raises:
            NoRoomError: The budget has no room. Its `num_bytes` is `at_most` if given.
        """
        more = num_bytes - self.num_bytes
        if more > 0:
            if not self._budget.try_acquire(more, self.num_bytes):
                raise NoRoomError(at_most or num_bytes)
            self.num_bytes = num_bytes

    def wait_for(self, num_bytes: int) -> None:
        """Release everything, then block until `num_bytes` can be held."""
        self.shrink(0)
        self._budget.acquire(num_bytes)
        self.num_bytes = num_bytes

    def shrink(self, num_bytes: int) -> None:
        """Release all but `num_bytes`."""
        self._budget.release(self.num_bytes - num_bytes)
        self.num_bytes = num_bytes


def refuse_large(num_bytes: int, max_bytes: int) -> None:
    """Raise ItemError if an object is larger than `max_bytes`."""
    if num_bytes > max_bytes:
        raise ItemError("too_many_bytes", f"{num_bytes} bytes, more than input.max_bytes = {max_bytes}")


def refuse_changed(etag: str, listed_etag: str) -> None:
    """Raise ItemError if an object's etag differs from the listed one. An empty etag is unknown and matches any."""
    if etag and listed_etag and etag != listed_etag:
        raise ItemError("changed", "the object changed after the inputs were listed")


def read_local(path: str, max_bytes: int, held: Reservation, listed_etag: str = "") -> bytes:
    """Read a regular file.

    Raises:
        ItemError: The file is too large, changed since it was listed, or is not a regular file, so that reading it
            might never end.
    """
    _refuse_special(os.stat(path).st_mode)
    # O_NONBLOCK keeps the open from hanging if a FIFO has replaced the file since the check above.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        _refuse_special(status.st_mode)
        refuse_changed(etag_of_file(status), listed_etag)
        refuse_large(status.st_size, max_bytes)
        held.grow(status.st_size)
        # One read is enough for most files. The loop covers files of /proc, whose size is 0, and files that have grown.
        chunk_bytes = max(status.st_size + 1, MIN_CHUNK_BYTES)
        content = read_up_to(lambda num_bytes: file.read(num_bytes) or b"", max_bytes, held, chunk_bytes=chunk_bytes)
        refuse_changed(etag_of_file(os.fstat(file.fileno())), listed_etag)
        return content


def _refuse_special(mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = FILE_KINDS.get(stat.S_IFMT(mode), "a special file")
        raise ItemError("not_an_image", f"{kind}, not a regular file")


def read_with_fsspec(uri: str, max_bytes: int, held: Reservation, listed_etag: str = "") -> bytes:
    """Read an object from any store that fsspec supports.

    Raises:
        ItemError: The object is too large, changed since it was listed, or is not a file.
    """
    filesystem, path = open_filesystem(uri)
    if uris.protocol_of(uri) in ("http", "https"):
        # Stream a single GET. By default, fsspec sends HEAD before GET and decompresses a whole response in memory
        # before its size is known.
        with filesystem.open(path, "rb", block_size=0, size=max_bytes) as response:
            is_encoded = response.r.headers.get("Content-Encoding", "identity") != "identity"
            if response.r.content_length is not None:
                refuse_large(response.r.content_length, max_bytes)
                held.grow(0 if is_encoded else response.r.content_length)
            return read_up_to(response.read, max_bytes, held)
    info = filesystem.info(path)
    if info.get("type", "file") != "file":
        raise ItemError("not_an_image", f"a {info['type']}, not a file")
    refuse_changed(etag_of_entry(info), listed_etag)
    if info.get("size") is None:
        with filesystem.open(path, "rb") as file:
            return read_up_to(file.read, max_bytes, held)
    refuse_large(int(info["size"]), max_bytes)
    held.grow(int(info["size"]))
    content: bytes = filesystem.cat_file(path)
    refuse_large(len(content), max_bytes)
    return content


def read_up_to(
    read: Callable[[int], bytes], max_bytes: int, held: Reservation, chunk_bytes: int = CHUNK_BYTES
) -> bytes:
    """Read a stream to its end.

    Args:
        read: Callable that returns up to the requested number of bytes, and `b""` at the end.
        max_bytes: Largest object accepted.
        held: Reservation that grows with the bytes read.
        chunk_bytes: Number of bytes requested at a time.

    Raises:
        ItemError: The stream holds more than `max_bytes`.
    """
    parts: list[bytes] = []
    num_read = 0
    while part := read(chunk_bytes):
        num_read += len(part)
        if num_read > max_bytes:
            raise ItemError("too_many_bytes", f"more than input.max_bytes = {max_bytes}")
        held.grow(num_read, at_most=max_bytes)
        parts.append(part)
    return b"".join(parts)
