"""Reads that are bounded in bytes: one object by a limit, the objects of one task by a budget.

Sizes come from response headers and from open files, never from listings, which may be old. What has no size (a
chunked or compressed HTTP answer) is counted while it streams; what is no regular file is refused.
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
    """The budget has no room for an object while others are held.

    Attributes:
        num_bytes: what the object needs.
    """

    def __init__(self, num_bytes: int) -> None:
        super().__init__(num_bytes)
        self.num_bytes = num_bytes


class ByteBudget:
    """Limit on the bytes that the objects of one task hold; an object that is larger than all of it is held alone.

    Args:
        most_bytes: the limit.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._held_bytes = 0
        self._is_closed = False
        self._changed = threading.Condition()

    def try_take(self, num_bytes: int, own_bytes: int = 0) -> bool:
        """Take `num_bytes` more for an object that holds `own_bytes`; return False if there is no room."""
        with self._changed:
            is_room = self._has_room(num_bytes, own_bytes)
            self._held_bytes += num_bytes if is_room else 0
            return is_room

    def take(self, num_bytes: int) -> None:
        """Wait for room, and take it.

        Raises:
            NoRoomError: the budget was closed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._has_room(num_bytes, 0))
            if self._is_closed:
                raise NoRoomError(num_bytes)
            self._held_bytes += num_bytes

    def give_back(self, num_bytes: int) -> None:
        """Return bytes that are no longer held."""
        with self._changed:
            self._held_bytes -= num_bytes
            self._changed.notify_all()

    def close(self) -> None:
        """End all waits."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _has_room(self, num_bytes: int, own_bytes: int) -> bool:
        return self._held_bytes == own_bytes or self._held_bytes + num_bytes <= self._most_bytes


class Reservation:
    """Bytes of a budget that one object holds.

    Attributes:
        num_bytes: how many.
    """

    def __init__(self, budget: ByteBudget) -> None:
        self._budget = budget
        self.num_bytes = 0

    def grow(self, num_bytes: int, at_most: int | None = None) -> None:
        """Hold `num_bytes` in all.

        Raises:
            NoRoomError: others hold too much; it names `at_most` bytes, where the object may grow further.
        """
        more = num_bytes - self.num_bytes
        if more > 0:
            if not self._budget.try_take(more, self.num_bytes):
                raise NoRoomError(at_most or num_bytes)
            self.num_bytes = num_bytes

    def wait_for(self, num_bytes: int) -> None:
        """Give back what is held, and wait until `num_bytes` can be held."""
        self.shrink(0)
        self._budget.take(num_bytes)
        self.num_bytes = num_bytes

    def shrink(self, num_bytes: int) -> None:
        """Give back all but `num_bytes`."""
        self._budget.give_back(self.num_bytes - num_bytes)
        self.num_bytes = num_bytes


def refuse_large(num_bytes: int, max_bytes: int) -> None:
    """Raise ItemError for an object of more than `max_bytes`."""
    if num_bytes > max_bytes:
        raise ItemError("too_many_bytes", f"{num_bytes} bytes, more than input.max_bytes = {max_bytes}")


def refuse_changed(etag: str, listed_etag: str) -> None:
    """Raise ItemError for an object whose etag is not the listed one; where one of them is unknown, it passes."""
    if etag and listed_etag and etag != listed_etag:
        raise ItemError("changed", "it changed after the inputs were listed")


def read_local(path: str, max_bytes: int, held: Reservation, listed_etag: str = "") -> bytes:
    """Read a regular file.

    Raises:
        ItemError: it is too large, it changed since it was listed, or it is no regular file: reading one of those may
            never end.
    """
    _refuse_special(os.stat(path).st_mode)
    # Were the file replaced by a FIFO now, opening it would not block.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        _refuse_special(status.st_mode)
        refuse_changed(etag_of_file(status), listed_etag)
        refuse_large(status.st_size, max_bytes)
        held.grow(status.st_size)
        # In one piece; but files of /proc have no size, and others may have grown.
        chunk_bytes = max(status.st_size + 1, MIN_CHUNK_BYTES)
        content = read_up_to(lambda num_bytes: file.read(num_bytes) or b"", max_bytes, held, chunk_bytes=chunk_bytes)
        refuse_changed(etag_of_file(os.fstat(file.fileno())), listed_etag)
        return content


def _refuse_special(mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = FILE_KINDS.get(stat.S_IFMT(mode), "no regular file")
        raise ItemError("not_an_image", f"{kind} in place of a file")


def read_with_fsspec(uri: str, max_bytes: int, held: Reservation, listed_etag: str = "") -> bytes:
    """Read an object of a store that fsspec knows.

    Raises:
        ItemError: it is too large, it changed since it was listed, or it is no file.
    """
    filesystem, path = open_filesystem(uri)
    if uris.protocol_of(uri) in ("http", "https"):
        # One request, whose answer is streamed: by fsspec's own way HEAD would come before GET, and what is compressed
        # would be in memory before its size is known.
        with filesystem.open(path, "rb", block_size=0, size=max_bytes) as answer:
            is_encoded = answer.r.headers.get("Content-Encoding", "identity") != "identity"
            if answer.r.content_length is not None:
                refuse_large(answer.r.content_length, max_bytes)
                held.grow(0 if is_encoded else answer.r.content_length)
            return read_up_to(answer.read, max_bytes, held)
    info = filesystem.info(path)
    if info.get("type", "file") != "file":
        raise ItemError("not_an_image", f"no file, but of type {info['type']}")
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
        read: returns at most as many bytes as it is asked for, none at the end.
        max_bytes: largest object.
        held: grows with what is read.
        chunk_bytes: how many bytes are asked for at a time.

    Raises:
        ItemError: there are more than `max_bytes`.
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
