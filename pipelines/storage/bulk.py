"""Whole objects for the stages that run in Ray's workers: many fetched at once, one stored at a time.

obstore (the Rust crate object_store) does this on S3: one request an object where Arrow's client makes two, about a
tenth of the CPU time of s3fs, and none of the seconds that s3fs takes in each new worker to make its client. Keys that
its path type cannot hold, and all other stores, go through fsspec.
"""

import functools
import io
import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

import obstore
import pyarrow as pa
import pyarrow.parquet as pq
from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

from pipelines.errors import ItemError
from pipelines.storage import uris
from pipelines.storage.filesystem import list_names, open_filesystem, read_bytes, write_bytes
from pipelines.storage.retry import MAX_IN_FLIGHT, Retries, in_words

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer
    from obstore.store import S3Credential, S3Store

# Of the whole request, and of the next bytes: stores answer within a second, or stall.
REQUEST_TIMEOUT, READ_TIMEOUT = timedelta(seconds=120), timedelta(seconds=10)
# Objects of one call that are in flight or in memory.
MAX_AHEAD = 2 * MAX_IN_FLIGHT
CONNECT_TIMEOUT = timedelta(seconds=5)
# How often temporary credentials are asked for again when their source does not say when they end.
CREDENTIALS_LIFETIME = timedelta(minutes=10)


class Fetched(NamedTuple):
    """What became of one object of many.

    Attributes:
        position: of its URI.
        content: its bytes, or why there are none.
        num_retries: attempts before the last one.
    """

    position: int
    content: bytes | ItemError
    num_retries: int


def fetch_many(object_uris: list[str], max_bytes: int) -> Iterator[Fetched]:
    """Read whole objects, many requests in flight.

    Args:
        object_uris: what to read.
        max_bytes: largest object read.

    Yields:
        One for each URI, as they arrive.
    """
    with ThreadPoolExecutor(min(MAX_IN_FLIGHT, max(1, len(object_uris)))) as pool:
        waiting = enumerate(object_uris)
        # `concurrent.futures.wait` would look at all that are in flight for each that arrives.
        arrived: SimpleQueue[Future[Fetched]] = SimpleQueue()

        def submit(count: int) -> None:
            for position, uri in itertools.islice(waiting, count):
                pool.submit(_fetch, position, uri, max_bytes).add_done_callback(arrived.put)

        submit(MAX_AHEAD)  # no more: what has arrived lies in memory until it is taken
        for _ in object_uris:
            fetched = arrived.get().result()
            submit(1)
            yield fetched


def read_object(uri: str) -> bytes:
    """The whole object. Raises FileNotFoundError where there is none."""
    bucket, key = uris.split_bucket(uri)
    if uris.protocol_of(uri) == "s3" and is_obstore_path(key):
        return Retries().send(lambda: bytes(obstore.get(s3_store(bucket), key).bytes()))
    return read_bytes(uri)


def store_object(uri: str, content: bytes, check: Callable[[], None] | None = None) -> int:
    """Write the whole object, so that no reader ever sees a part of it; returns the attempts before the last one.

    Args:
        uri: of the object.
        content: its bytes.
        check: raises where the object must not be written any more; called right before each attempt.
    """
    if uris.protocol_of(uri) == "s3":
        bucket, key = uris.split_bucket(uri)
        if is_obstore_path(key):
            retries = Retries()
            retries.send(functools.partial(_put, s3_store(bucket, is_written=True), key, content, check))
            return retries.num
    write_bytes(uri, content, check)
    return 0


def _put(store: "S3Store", key: str, content: bytes, check: Callable[[], None] | None) -> None:
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


def read_columns(uri: str, columns: list[str]) -> pa.Table:
    """Columns of one Parquet file; of a large object, little else is read."""
    if uris.is_local(uri):
        return pq.read_table(uri, columns=columns, partitioning=None)
    bucket, key = uris.split_bucket(uri)
    if uris.protocol_of(uri) == "s3" and is_obstore_path(key):
        return pq.read_table(_S3File(s3_store(bucket), key), columns=columns)
    filesystem, path = open_filesystem(uri)
    with filesystem.open(path, "rb") as file:
        return pq.read_table(file, columns=columns)


class _S3File(io.RawIOBase):
    """An object as a file, each read of which is one request."""

    def __init__(self, store: "S3Store", key: str) -> None:
        self._store, self._key, self._position = store, key, 0
        self._size = Retries().send(lambda: obstore.head(store, key))["size"]

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
        found = Retries().send(lambda: obstore.get_range(self._store, self._key, start=start, end=stop))
        target[: len(found)] = bytes(found)
        self._position += len(found)
        return len(found)


def _fetch(position: int, uri: str, max_bytes: int) -> Fetched:
    read = _fetch_s3 if uris.protocol_of(uri) == "s3" else _fetch_fsspec
    retries = Retries()
    try:
        content = retries.send(lambda: read(uri, max_bytes))
    except Exception as error:  # whatever a client raises costs one image, never the run
        return Fetched(position, _item_error(error), retries.num)
    return Fetched(position, content or ItemError("empty", "the object holds no bytes"), retries.num)


def _item_error(error: BaseException) -> ItemError:
    if isinstance(error, ItemError):
        return error
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return ItemError("not_found", "it was listed, but is gone")
    if isinstance(error, PermissionError | PermissionDeniedError | UnauthenticatedError):
        return ItemError("access_denied", "the store refuses to hand it out")
    message = in_words(error)
    is_timeout = isinstance(error, TimeoutError) or "no answer in time" in message or "timed out" in message.lower()
    return ItemError("timeout" if is_timeout else "storage_error", message[:500])


def _refuse_large(size_bytes: int, max_bytes: int) -> None:
    if size_bytes > max_bytes:
        raise ItemError("too_many_bytes", f"{size_bytes} bytes, more than input.max_bytes = {max_bytes}")


def _fetch_s3(uri: str, max_bytes: int) -> bytes:
    bucket, key = uris.split_bucket(uri)
    if not is_obstore_path(key):
        return _fetch_fsspec(uri, max_bytes)
    result = obstore.get(s3_store(bucket), key)
    _refuse_large(result.meta["size"], max_bytes)
    return bytes(result.bytes())


def is_obstore_path(key: str) -> bool:
    """Whether obstore finds an object by its key.

    object_store's Path holds no empty and no relative segments, and encodes what is not printable.
    """
    segments = key.split("/")
    return key.isprintable() and "%" not in key and not any(segment in ("", ".", "..") for segment in segments)


def _fetch_fsspec(uri: str, max_bytes: int) -> bytes:
    if uris.is_local(uri):
        with open(uri, "rb") as file:
            _refuse_large(os.fstat(file.fileno()).st_size, max_bytes)
            return file.read()
    filesystem, path = open_filesystem(uri)
    _refuse_large(int(filesystem.info(path).get("size") or 0), max_bytes)
    content: bytes = filesystem.cat_file(path)
    return content


@functools.lru_cache(maxsize=64)
def s3_store(bucket: str, is_written: bool = False, num_retries: int = 0) -> "S3Store":
    """Obstore's client of a bucket, with the credentials that botocore finds.

    Args:
        bucket: its name.
        is_written: for uploads, which no answer may interrupt.
        num_retries: of its own. None for whole objects: ours are counted, and ask again when an answer broke off too.
    """
    from obstore.store import S3Store

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    session = _aws_session()
    options: dict[str, Any] = {"region": session.get_config_variable("region") or "us-east-1"}
    if endpoint:
        options["endpoint"] = endpoint
    return S3Store(
        bucket,
        credential_provider=_credentials,
        retry_config={"max_retries": num_retries},
        client_options={
            "allow_http": bool(endpoint and endpoint.startswith("http://")),
            "timeout": REQUEST_TIMEOUT,
            "connect_timeout": CONNECT_TIMEOUT,
            # No answer comes while a request is still being sent.
            **({} if is_written else {"read_timeout": READ_TIMEOUT}),
        },
        **options,
    )


@functools.lru_cache(maxsize=1)
def _aws_session() -> Any:
    # The session of botocore knows variables, profiles, containers and instance roles; obstore knows no profiles.
    from botocore.session import Session

    return Session()


def _credentials() -> "S3Credential":
    found = _aws_session().get_credentials()
    if found is None:
        raise PermissionError("no AWS credentials are set: give them by the standard variables, a profile or a role")
    frozen = found.get_frozen_credentials()
    return {
        "access_key_id": frozen.access_key,
        "secret_access_key": frozen.secret_key,
        "token": frozen.token,
        "expires_at": datetime.now(UTC) + CREDENTIALS_LIFETIME,
    }
