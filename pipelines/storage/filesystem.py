"""One object at a time: file systems by URI, whole-object reads and writes, and errors in plain words.

Endpoint and credentials come from the standard variables, profiles or instance roles, in each process anew: a file
system is opened where it is used and never pickled.
"""

import contextlib
import os
import posixpath
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import fsspec

from pipelines.errors import RequestError, RunError
from pipelines.storage import uris
from pipelines.storage.retry import in_words

# Seconds. botocore's own retries would multiply with those of s3fs.
S3_CONFIG = {"connect_timeout": 5, "read_timeout": 30, "retries": {"max_attempts": 0}}
# With the waits of s3fs between them, an endpoint may be gone for 45 s.
S3_ATTEMPTS = 11
S3_RETRIED_STATUS = (408, 429, 500, 502, 503, 504)
# Modules whose errors are a store's.
CLIENTS = ("botocore", "aiobotocore", "aiohttp", "obstore", "azure", "google", "gcsfs", "httpx", "requests")
# When a job starts, an endpoint counts as unreachable that takes longer than this to answer, so many times.
PROBE_TIMEOUT_S, PROBE_ATTEMPTS = 2, 3


def open_filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URI, and the URI's path on it.

    Raises:
        RequestError: no file system is known for the protocol.
    """
    protocol = uris.protocol_of(uri)
    options: dict[str, Any] = {}
    if protocol == "s3":
        options = {"config_kwargs": S3_CONFIG, "use_listings_cache": False}
    try:
        filesystem = fsspec.filesystem(protocol, **options)
    except Exception as error:  # each file system raises its own kind for what a URI does not tell it
        raise RequestError(f"no file system for {uri}: {' '.join(str(error).split())}") from None
    if protocol == "s3":
        _try_again(filesystem, S3_ATTEMPTS)
    return filesystem, uri if protocol == "file" else filesystem._strip_protocol(uri)


def _try_again(s3: fsspec.AbstractFileSystem, num_attempts: int) -> None:
    """Have s3fs repeat what may do better another time, which by itself it does for few errors."""
    from s3fs.core import set_custom_error_handler

    s3.retries = num_attempts
    set_custom_error_handler(_is_transient)


def _is_transient(error: BaseException) -> bool:
    from botocore.exceptions import ClientError, ConnectionError

    if isinstance(error, ClientError):
        return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") in S3_RETRIED_STATUS
    return isinstance(error, ConnectionError)


def read_bytes(uri: str) -> bytes:
    """The whole object. Raises FileNotFoundError where there is none."""
    filesystem, path = open_filesystem(uri)
    content: bytes = filesystem.cat_file(path)
    return content


def write_bytes(uri: str, content: bytes, check: Callable[[], None] | None = None) -> None:
    """Write the whole object, so that no reader ever sees a part of it.

    An upload to an object store appears whole; a local file is written aside, then renamed.

    Args:
        uri: of the object.
        content: its bytes.
        check: raises where the object must not be written any more; called right before it appears.
    """
    filesystem, path = open_filesystem(uri)
    if not uris.is_local(uri):
        if check is not None:
            check()
        filesystem.pipe_file(path, content)
        return
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    aside = os.path.join(folder, f".{name}.{uuid.uuid4().hex}")
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if check is not None:
            check()
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(aside)
        raise


def remove(uri: str) -> None:
    """Remove one object; where there is none, nothing happens."""
    filesystem, path = open_filesystem(uri)
    with contextlib.suppress(FileNotFoundError):
        filesystem.rm_file(path)


def remove_folder(uri: str) -> None:
    """Remove a folder and all that is below it; where there is none, nothing happens."""
    filesystem, path = open_filesystem(uri)
    with contextlib.suppress(FileNotFoundError):
        filesystem.rm(path, recursive=True)


def list_names(uri: str) -> list[str]:
    """Names of what lies directly below `uri`, folders included, in order; none where nothing does."""
    return sorted(list_with_sizes(uri))


def list_with_sizes(uri: str) -> dict[str, int]:
    """The same names, each with its bytes; 0 for folders."""
    filesystem, path = open_filesystem(uri)
    try:
        found = filesystem.ls(path, detail=True)
    except FileNotFoundError:
        return {}
    return {posixpath.basename(info["name"].rstrip("/")): int(info.get("size") or 0) for info in found}


def download(uri: str, folder: str) -> str:
    """A local path with the object's content: the path itself where `uri` is local, else a copy in `folder`.

    Raises:
        FileNotFoundError: there is no such object.
    """
    if uris.is_local(uri):
        os.stat(uri)
        return uri
    filesystem, path = open_filesystem(uri)
    target = os.path.join(folder, posixpath.basename(path))
    filesystem.get_file(path, target)
    return target


@contextlib.contextmanager
def in_plain_words(what: str, uri: str, kind: type[RequestError | RunError] = RequestError) -> Iterator[None]:
    """Turn the storage errors of a `with` block into one line: `what` failed on `uri`, because.

    Raises:
        RequestError: or what `kind` says, in place of any error of the operating system or of a store's client.
    """
    try:
        yield
    except (RequestError, RunError):
        raise
    except FileNotFoundError:
        raise kind(f"cannot {what} {uri}: it does not exist") from None
    except (PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError) as error:
        raise kind(f"cannot {what} {uri}: {error.strerror or error}") from None
    except Exception as error:
        if isinstance(error, OSError) or type(error).__module__.startswith(CLIENTS):
            is_obstores = type(error).__module__.startswith("obstore")
            reason = in_words(error) if is_obstores else " ".join(str(error).split())
            raise kind(f"cannot {what} {uri}: {reason}") from None
        raise


def is_there(uri: str) -> bool:
    """Whether there is an object, folder or prefix of that name, found within a few seconds.

    Raises:
        RequestError: the store does not answer, or refuses our credentials.
    """
    if uris.is_local(uri):
        return os.path.exists(uri)
    if uris.protocol_of(uri) != "s3":
        filesystem, path = open_filesystem(uri)
        with in_plain_words("reach", uri):
            return bool(filesystem.exists(path))
    import s3fs

    quick = s3fs.S3FileSystem(
        config_kwargs={
            "connect_timeout": PROBE_TIMEOUT_S,
            "read_timeout": PROBE_TIMEOUT_S,
            "retries": {"max_attempts": 0},
        },
        skip_instance_cache=True,
    )
    _try_again(quick, PROBE_ATTEMPTS)
    bucket, key = uris.split_bucket(uri)
    if not bucket:
        raise RequestError(f"{uri} names no bucket")
    with in_plain_words("reach", uri):
        return bool(quick.call_s3("list_objects_v2", Bucket=bucket, Prefix=key, MaxKeys=1).get("KeyCount"))
