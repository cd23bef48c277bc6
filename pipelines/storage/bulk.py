"""Whole objects for the stages that run in Ray's workers: many fetched at once, one stored at a time.

obstore (the Rust crate object_store) does this on S3: one request an object where Arrow's client makes two, and about a
tenth of the CPU time of s3fs. Keys that its path type cannot hold, and all other stores, go through fsspec.
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
from pipelines.storage.retry import MAX_IN_FLIGHT, Retries, in_words
from pipelines.storage.s3 import s3_store as s3_store

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

# Objects of one call that are in flight or in memory.
MAX_AHEAD = 2 * MAX_IN_FLIGHT
# Bytes of one call that are in flight or in memory: 64 objects of 2 MiB, or six photographs of 20 MiB, of which one is
# decoded. A larger object is held alone, so a call holds at most max(MAX_HELD_BYTES, max_bytes), and once more what is
# being copied from obstore's memory to Python's, which is one object at a time.
MAX_HELD_BYTES = 128 << 20
DENIED = (PermissionError, PermissionDeniedError, UnauthenticatedError)


class Fetched(NamedTuple):
    """Result of fetching one object of many.

    Attributes:
        position: of its URI.
        content: its bytes, or why there are none.
        num_retries: attempts before the last one.
    """

    position: int
    content: bytes | ItemError
    num_retries: int


def fetch_many(object_uris: list[str], max_bytes: int, etags: list[str] | None = None) -> Iterator[Fetched]:
    """Fetch whole objects, with many requests in flight and at most `MAX_HELD_BYTES` in memory.

    Args:
        object_uris: what to read.
        max_bytes: largest object read.
        etags: of the objects when they were listed, `""` where it is not known or does not matter. An object with
            another one is `changed`.

    Yields:
        One for each URI, as they arrive. Its bytes count as held until the next one is asked for.
    """
    budget = ByteBudget(MAX_HELD_BYTES)
    pool = ThreadPoolExecutor(min(MAX_IN_FLIGHT, max(1, len(object_uris))))
    waiting = enumerate(zip(object_uris, etags or itertools.repeat("")))
    # `concurrent.futures.wait` would look at all that are in flight for each that arrives.
    arrived: SimpleQueue[Future[Fetched]] = SimpleQueue()

    def submit(count: int) -> None:
        for position, (uri, etag) in itertools.islice(waiting, count):
            pool.submit(_fetch, position, uri, etag, max_bytes, budget).add_done_callback(arrived.put)

    try:
        submit(MAX_AHEAD)  # no more: what has arrived lies in memory until it is taken
        for _ in object_uris:
            fetched = arrived.get().result()
            submit(1)
            yield fetched
            if isinstance(fetched.content, bytes):
                budget.give_back(len(fetched.content))
    finally:
        budget.close()
        pool.shutdown(cancel_futures=True)


def read_object(uri: str) -> bytes:
    """Return a whole object. Raises FileNotFoundError if there is none."""
    bucket, key = uris.split_bucket(uri)
    if uris.protocol_of(uri) == "s3" and is_obstore_path(key):
        return Retries().send(lambda: bytes(obstore.get(s3_store(bucket), key).bytes()))
    return read_bytes(uri)


def store_object(uri: str, content: bytes, check: Callable[[], None] | None = None) -> int:
    """Write a whole object, so that no reader ever sees a part of it; return the number of retries.

    Args:
        uri: of the object.
        content: its bytes.
        check: raises where the object must not be written any more; called right before each attempt.
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
    """Return the names of the objects directly below a folder; none where it does not exist."""
    bucket, key = uris.split_bucket(folder_uri)
    if uris.protocol_of(folder_uri) == "s3" and is_obstore_path(key):
        found = Retries().send(lambda: obstore.list_with_delimiter(s3_store(bucket), key))
        return [entry["path"].rpartition("/")[2] for entry in found["objects"]]
    return list_names(folder_uri)


def read_columns(uri: str, columns: list[str] | None) -> pa.Table:
    """Return columns of one Parquet file, all of them for None; of a large object, little else is read."""
    with _open_seekable(uri) as file:
        return pq.read_table(file, columns=columns, partitioning=None)


def read_schema(uri: str) -> pa.Schema:
    """Return the schema of one Parquet file."""
    with _open_seekable(uri) as file:
        return pq.read_schema(file)


@contextlib.contextmanager
def _open_seekable(uri: str) -> Iterator[Any]:
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
    """File-like view of an object; each read is one request."""

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
    except Exception as error:  # whatever a client raises costs one image, never the run
        held.shrink(0)
        return Fetched(position, _item_error(error, uri), retries.num)
    return Fetched(position, content or ItemError("empty", "the object holds no bytes"), retries.num)


def _read_within(uri: str, etag: str, max_bytes: int, retries: Retries, held: Reservation) -> bytes:
    """Read an object; if the budget has no room for it, drop the answer, wait without a connection, and ask again."""

    def read() -> bytes | NoRoomError:
        try:
            return _read_once(uri, etag, max_bytes, held)
        except NoRoomError as full:
            held.shrink(0)
            return full.with_traceback(None)
        except BaseException:
            held.shrink(0)  # nothing is held while a retry waits
            raise

    while not isinstance(content := retries.send(read), bytes):
        held.wait_for(content.num_bytes)
    return content


def _read_once(uri: str, etag: str, max_bytes: int, held: Reservation) -> bytes:
    if uris.is_local(uri):
        return read_local(uri, max_bytes, held, etag)
    bucket, key = uris.split_bucket(uri)
    if uris.protocol_of(uri) == "s3" and is_obstore_path(key):
        answer = obstore.get(s3_store(bucket), key)
        refuse_changed((answer.meta["e_tag"] or "").strip('"'), etag)
        refuse_large(answer.meta["size"], max_bytes)
        held.grow(answer.meta["size"])
        return bytes(answer.bytes())
    return read_with_fsspec(uri, max_bytes, held, etag)


def _item_error(error: BaseException, uri: str) -> ItemError:
    if isinstance(error, ItemError):
        return error
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        if uris.is_local(uri) and uris.is_escaped(uri):
            return ItemError("not_found", "its name is not UTF-8: rename the file")
        return ItemError("not_found", "it was listed, but is gone")
    if isinstance(error, DENIED) or getattr(error, "status", None) in (401, 403):
        is_unsigned = uris.protocol_of(uri) == "s3" and not s3.has_credentials()
        return ItemError(
            "access_denied",
            "the store refuses to hand it out" + (", and no AWS credentials are set" if is_unsigned else ""),
        )
    message = in_words(error)
    is_timeout = isinstance(error, TimeoutError) or "no answer in time" in message or "timed out" in message.lower()
    return ItemError("timeout" if is_timeout else "storage_error", message[:500])


def is_obstore_path(key: str) -> bool:
    """Return whether obstore finds an object by its key.

    object_store's Path holds no empty and no relative segments, and encodes what is not printable.
    """
    segments = key.split("/")
    return key.isprintable() and "%" not in key and not any(segment in ("", ".", "..") for segment in segments)
