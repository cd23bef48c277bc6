"""Whole-object reads and writes for the stages that run in Ray workers: parallel fetches, single stores.

On S3 this uses obstore (the Rust crate object_store): one request per object where Arrow's client makes two, and about
a tenth of the CPU time of s3fs. Keys that obstore's path type cannot represent, and all other stores, go through
fsspec.
"""

import contextlib
import io
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

import obstore
import pyarrow as pa
import pyarrow.parquet as pq
from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

from pipelines.errors import ItemError
from pipelines.storage import s3, uris
from pipelines.storage.bounded import (
    ByteBudget,
    NoRoomError,
    Reservation,
    read_local,
    read_with_fsspec,
    refuse_changed,
    refuse_large,
)
from pipelines.storage.filesystem import list_names, open_filesystem, read_bytes, write_bytes
from pipelines.storage.retry import MAX_IN_FLIGHT, Retries, describe_error
from pipelines.storage.s3 import s3_store as s3_store

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

# Maximum number of objects of one call that are in flight or in memory.
MAX_AHEAD = 2 * MAX_IN_FLIGHT
# Maximum number of bytes of one call that are in flight or in memory: 64 objects of 2 MiB, or six photographs of
# 20 MiB. A larger object is held alone, so a call holds at most max(MAX_HELD_BYTES, max_bytes), plus a second copy of
# the one object that is being copied from obstore's memory to Python's.
MAX_HELD_BYTES = 128 << 20
DENIED = (PermissionError, PermissionDeniedError, UnauthenticatedError)


class Fetched(NamedTuple):
    """Result of fetching one of many objects.

    Attributes:
        position: Index of the object's URI in the request.
        content: Bytes of the object, or the error that explains why there are none.
        num_retries: Number of attempts before the last one.
    """

    position: int
    content: bytes | ItemError
    num_retries: int


def fetch_many(object_uris: list[str], max_bytes: int, etags: list[str] | None = None) -> Iterator[Fetched]:
    """Fetch whole objects, with many requests in flight and at most `MAX_HELD_BYTES` in memory.

    Args:
        object_uris: URIs of the objects.
        max_bytes: Largest object read.
        etags: Etag of each object when it was listed, `""` if it is unknown or should not be checked. An object with a
            different etag fails as `changed`.

    Yields:
        One result per URI, in order of arrival. Its bytes count against the budget until the next result is requested.
    """
    budget = ByteBudget(MAX_HELD_BYTES)
    pool = ThreadPoolExecutor(min(MAX_IN_FLIGHT, max(1, len(object_uris))))
    waiting = enumerate(zip(object_uris, etags or itertools.repeat("")))
    # A queue costs O(1) per arrival; `concurrent.futures.wait` would scan every future in flight.
    arrived: SimpleQueue[Future[Fetched]] = SimpleQueue()

    def submit(count: int) -> None:
        for position, (uri, etag) in itertools.islice(waiting, count):
            pool.submit(_fetch, position, uri, etag, max_bytes, budget).add_done_callback(arrived.put)

    try:
        submit(MAX_AHEAD)  # bounded, because results that have arrived stay in memory until they are consumed
        for _ in object_uris:
            fetched = arrived.get().result()
            submit(1)
            yield fetched
            if isinstance(fetched.content, bytes):
                budget.release(len(fetched.content))
    finally:
        budget.close()
        pool.shutdown(cancel_futures=True)


def read_object(uri: str) -> bytes:
    """Return the content of an object.

    Raises:
        FileNotFoundError: The object does not exist.
    """
    bucket, key = uris.split_bucket(uri)
    if uris.protocol_of(uri) == "s3" and is_obstore_path(key):
        return Retries().send(lambda: bytes(obstore.get(s3_store(bucket), key).bytes()))
    return read_bytes(uri)


def store_object(uri: str, content: bytes, check: Callable[[], None] | None = None) -> int:
    """Write an object atomically, so that no reader sees part of it.

    Args:
        uri: URI of the object.
        content: Bytes of the object.
        check: Callable that raises if the object may no longer be written. Called right before each attempt.

    Returns:
        Number of retries.
    """
    if uris.protocol_of(uri) == "s3":
        bucket, key = uris.split_bucket(uri)
        if is_obstore_path(key):
            retries = Retries()
            retries.send(lambda: _put(bucket, key, content, check))
            return retries.num
    write_bytes(uri, content, check)
    return 0


def _put(bucket: str, key: str, content: bytes, check: Callable[[], None] | None) -> None:
    store = s3_store(bucket, is_written=True)
    if check is not None:
        check()
    obstore.put(store, key, content)


def list_keys(folder_uri: str) -> list[str]:
    """Return the names of the objects directly below a folder, or an empty list if the folder does not exist."""
    bucket, key = uris.split_bucket(folder_uri)
    if uris.protocol_of(folder_uri) == "s3" and is_obstore_path(key):
        found = Retries().send(lambda: obstore.list_with_delimiter(s3_store(bucket), key))
        return [entry["path"].rpartition("/")[2] for entry in found["objects"]]
    return list_names(folder_uri)


def read_columns(uri: str, columns: list[str] | None) -> pa.Table:
    """Read columns of a Parquet file, or all of them if `columns` is None.

    Only the byte ranges of those columns are fetched from an object store.
    """
    with open_seekable(uri) as file:
        return pq.read_table(file, columns=columns, partitioning=None)


def read_schema(uri: str) -> pa.Schema:
    """Read the schema of a Parquet file."""
    with open_seekable(uri) as file:
        return pq.read_schema(file)


@contextlib.contextmanager
def open_seekable(uri: str) -> Iterator[Any]:
    """Open an object for reads at any position, each of which requests only its own bytes from a store.

    Yields:
        A binary file, or the path of a local file.
    """
    bucket, key = uris.split_bucket(uri)
    if uris.is_local(uri):
        yield uri
    elif uris.protocol_of(uri) == "s3" and is_obstore_path(key):
        yield _S3File(bucket, key)
    else:
        filesystem, path = open_filesystem(uri)
        with filesystem.open(path, "rb") as file:
            yield file


class _S3File(io.RawIOBase):
    """Seekable file-like view of an S3 object. Each read is one range request."""

    def __init__(self, bucket: str, key: str) -> None:
        self._bucket, self._key, self._position = bucket, key, 0
        self._size = Retries().send(lambda: obstore.head(s3_store(bucket), key))["size"]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer: "WriteableBuffer") -> int:
        target = memoryview(buffer)
        stop = min(self._position + len(target), self._size)
        if stop <= self._position:
            return 0
        start = self._position
        found = Retries().send(lambda: obstore.get_range(s3_store(self._bucket), self._key, start=start, end=stop))
        target[: len(found)] = bytes(found)
        self._position += len(found)
        return len(found)


def _fetch(position: int, uri: str, etag: str, max_bytes: int, budget: ByteBudget) -> Fetched:
    retries, held = Retries(), Reservation(budget)
    try:
        content = _read_within(uri, etag, max_bytes, retries, held)
        held.shrink(len(content))
    except Exception as error:  # any client error fails one image, never the run
        held.shrink(0)
        return Fetched(position, item_error(error, uri), retries.num)
    return Fetched(position, content or ItemError("empty", "the object holds no bytes"), retries.num)


def _read_within(uri: str, etag: str, max_bytes: int, retries: Retries, held: Reservation) -> bytes:
    """Read an object. If the budget has no room, drop the connection, wait for room, then send the request again."""

    def read() -> bytes | NoRoomError:
        try:
            return _read_once(uri, etag, max_bytes, held)
        except NoRoomError as full:
            held.shrink(0)
            return full.with_traceback(None)
        except BaseException:
            held.shrink(0)  # hold nothing during the backoff before a retry
            raise

    while not isinstance(content := retries.send(read), bytes):
        held.wait_for(content.num_bytes)
    return content


def _read_once(uri: str, etag: str, max_bytes: int, held: Reservation) -> bytes:
    if uris.is_local(uri):
        return read_local(uri, max_bytes, held, etag)
    bucket, key = uris.split_bucket(uri)
    if uris.protocol_of(uri) == "s3" and is_obstore_path(key):
        response = obstore.get(s3_store(bucket), key)
        refuse_changed((response.meta["e_tag"] or "").strip('"'), etag)
        refuse_large(response.meta["size"], max_bytes)
        held.grow(response.meta["size"])
        return bytes(response.bytes())
    return read_with_fsspec(uri, max_bytes, held, etag)


def item_error(error: BaseException, uri: str) -> ItemError:
    """Return the error of a row whose object could not be read."""
    if isinstance(error, ItemError):
        return error
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        if uris.is_local(uri) and uris.is_escaped(uri):
            return ItemError("not_found", "the file name is not UTF-8: rename the file")
        return ItemError("not_found", "the object was listed but no longer exists")
    if isinstance(error, DENIED) or getattr(error, "status", None) in (401, 403):
        is_unsigned = uris.protocol_of(uri) == "s3" and not s3.has_credentials()
        return ItemError(
            "access_denied", "the store denied access" + ("; no AWS credentials were found" if is_unsigned else "")
        )
    message = describe_error(error)
    is_timeout = isinstance(error, TimeoutError) or "timed out" in message.lower()
    return ItemError("timeout" if is_timeout else "storage_error", message[:500])


def is_obstore_path(key: str) -> bool:
    """Return whether obstore can address an object by this key.

    object_store's Path has no empty or relative segments and percent-encodes characters that are not printable.
    """
    segments = key.split("/")
    return key.isprintable() and "%" not in key and not any(segment in ("", ".", "..") for segment in segments)
