"""File systems by URI, single-object reads and writes, and one-line storage errors.

A file system is opened where it is used and never pickled. See `pipelines.storage.s3` for endpoints and credentials.
"""

import contextlib
import os
import posixpath
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import fsspec
from pyarrow.fs import FSSpecHandler

from pipelines.errors import RequestError, RunError
from pipelines.storage import s3, uris
from pipelines.storage.retry import describe_error, is_transient

# Packages whose exceptions count as storage errors.
CLIENTS = ("botocore", "aiobotocore", "aiohttp", "obstore", "azure", "google", "gcsfs", "httpx", "requests")
# `write_bytes` gives a local file such a name until its content is complete.
ASIDE_NAME = re.compile(r"\..+\.[0-9a-f]{32}")


def open_filesystem(uri: str, is_written: bool = False) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of a URI and the URI's path on it.

    Args:
        uri: URI in any spelling.
        is_written: True for writing and removing, for which S3 requests are signed whenever there are credentials.

    Raises:
        RequestError: No file system is known for the protocol, or the S3 settings are invalid.
    """
    protocol = uris.protocol_of(uri)
    if protocol == "s3":
        filesystem = s3.s3_filesystem(uris.split_bucket(uri)[0], is_written)
        _retry_transient_errors(filesystem)
    else:
        try:
            filesystem = fsspec.filesystem(protocol)
        except Exception as error:  # file systems raise unrelated types for missing dependencies and options
            raise RequestError(f"no file system for {uri}: {' '.join(str(error).split())}") from None
    return filesystem, uri if protocol == "file" else filesystem._strip_protocol(uri)


def _retry_transient_errors(filesystem: fsspec.AbstractFileSystem) -> None:
    """Make s3fs retry all transient errors. By default it retries only a few of them."""
    from s3fs.core import set_custom_error_handler

    filesystem.retries = s3.S3FS_ATTEMPTS
    set_custom_error_handler(is_transient)


class ArrowHandler(FSSpecHandler):  # type: ignore[misc] # pyarrow has no types
    """Handler for Arrow's `PyFileSystem` that writes to a store.

    It pickles only the URI. A process that unpickles it opens the store with its own credentials.

    Args:
        uri: Any URI of the store.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        super().__init__(open_filesystem(uri, is_written=True)[0])

    def __reduce__(self) -> tuple[type["ArrowHandler"], tuple[str]]:
        return ArrowHandler, (self._uri,)


def etag_of_file(status: os.stat_result) -> str:
    """Return an etag for a local file, made of its modification time and its size."""
    return f"{status.st_mtime_ns:x}-{status.st_size:x}"


def etag_of_entry(info: Mapping[str, Any]) -> str:
    """Return the etag in fsspec's info on an object, else its modification time, else an empty string."""
    return str(info.get("etag") or info.get("ETag") or info.get("mtime") or "").strip('"')


def read_bytes(uri: str) -> bytes:
    """Return the content of an object.

    Raises:
        FileNotFoundError: The object does not exist.
    """
    filesystem, path = open_filesystem(uri)
    content: bytes = filesystem.cat_file(path)
    return content


def write_bytes(uri: str, content: bytes, check: Callable[[], None] | None = None) -> None:
    """Write an object atomically, so that no reader sees part of it.

    Uploads to object stores are atomic. A local file is written under a temporary name, then renamed.

    Args:
        uri: URI of the object.
        content: Bytes of the object.
        check: Callable that raises if the object may no longer be written. Called right before the object appears.
    """
    filesystem, path = open_filesystem(uri, is_written=True)
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
    """Remove an object. Do nothing if it does not exist."""
    filesystem, path = open_filesystem(uri, is_written=True)
    with contextlib.suppress(FileNotFoundError):
        filesystem.rm_file(path)


def remove_folder(uri: str) -> None:
    """Remove a folder and everything below it. Do nothing if it does not exist."""
    filesystem, path = open_filesystem(uri, is_written=True)
    with contextlib.suppress(FileNotFoundError):
        filesystem.rm(path, recursive=True)


def list_names(uri: str) -> list[str]:
    """Return the sorted names of the objects and folders directly below `uri`, or an empty list if there are none."""
    return sorted(list_with_sizes(uri))


def list_with_sizes(uri: str) -> dict[str, int]:
    """Return the size in bytes of each object directly below `uri`, by name. Folders have size 0."""
    filesystem, path = open_filesystem(uri)
    try:
        found = filesystem.ls(path, detail=True)
    except FileNotFoundError:
        return {}
    return {posixpath.basename(info["name"].rstrip("/")): int(info.get("size") or 0) for info in found}


def download(uri: str, folder: str) -> str:
    """Return a local path with an object's content: the path itself if `uri` is local, else a copy in `folder`.

    Raises:
        FileNotFoundError: The object does not exist.
    """
    if uris.is_local(uri):
        os.stat(uri)
        return uri
    filesystem, path = open_filesystem(uri)
    target = os.path.join(folder, posixpath.basename(path))
    filesystem.get_file(path, target)
    return target


@contextlib.contextmanager
def translate_storage_errors(what: str, uri: str, kind: type[RequestError | RunError] = RequestError) -> Iterator[None]:
    """Translate storage errors raised in a `with` block into one line: "cannot `what` `uri`: reason".

    Args:
        what: Verb phrase for the message, such as "write to".
        uri: URI that the block works on.
        kind: Exception class to raise.

    Raises:
        RequestError: The operating system or a storage client raised an error. `RunError` if `kind` says so.
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
            raise kind(f"cannot {what} {uri}: {_reason(error)}{_advice(uri, str(error))}") from None
        raise


def _reason(error: Exception) -> str:
    if not type(error).__module__.startswith("obstore"):
        return " ".join(str(error).split())
    host = re.search(r"https?://[^\s/?]+", str(error))
    return f"{describe_error(error)} ({host.group()})" if host else describe_error(error)


def _advice(uri: str, error: str) -> str:
    is_denied = re.search(r"AccessDenied|Forbidden|Access Denied|\b40[13]\b", error)
    if not is_denied or uris.protocol_of(uri) != "s3" or s3.has_credentials():
        return ""
    return "; no AWS credentials were found: set the standard variables, a profile or a role"


def exists(uri: str) -> bool:
    """Return whether an object, folder or prefix exists. Takes a few seconds at most.

    Raises:
        RequestError: The store does not respond or rejects the credentials.
    """
    if uris.is_local(uri):
        return os.path.exists(uri)
    with translate_storage_errors("reach", uri):
        if uris.protocol_of(uri) != "s3":
            filesystem, path = open_filesystem(uri)
            return bool(filesystem.exists(path))
        bucket, key = uris.split_bucket(uri)
        if not bucket:
            raise RequestError(f"{uri} does not name a bucket: write s3://BUCKET/PREFIX")
        return s3.has_any(bucket, key)
