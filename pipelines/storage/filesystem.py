"""One object at a time: file systems by URI, whole-object reads and writes, and errors in plain words.

A file system is opened where it is used and never pickled: see `pipelines.storage.s3` for endpoint and credentials.
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
from pipelines.storage.retry import in_words, is_transient

# Modules whose errors are a store's.
CLIENTS = ("botocore", "aiobotocore", "aiohttp", "obstore", "azure", "google", "gcsfs", "httpx", "requests")


def open_filesystem(uri: str, is_written: bool = False) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of a URI, and the URI's path on it.

    Args:
        uri: URI in any spelling.
        is_written: for writing and removing, which S3 never allows without credentials.

    Raises:
        RequestError: no file system is known for the protocol, or the settings of S3 cannot be right.
    """
    protocol = uris.protocol_of(uri)
    if protocol == "s3":
        filesystem = s3.s3_filesystem(uris.split_bucket(uri)[0], is_written)
        _retry_transient_errors(filesystem)
    else:
        try:
            filesystem = fsspec.filesystem(protocol)
        except Exception as error:  # each file system raises its own kind for what a URI does not tell it
            raise RequestError(f"no file system for {uri}: {' '.join(str(error).split())}") from None
    return filesystem, uri if protocol == "file" else filesystem._strip_protocol(uri)


def _retry_transient_errors(filesystem: fsspec.AbstractFileSystem) -> None:
    """Have s3fs retry all transient errors; by itself it retries few."""
    from s3fs.core import set_custom_error_handler

    filesystem.retries = s3.S3FS_ATTEMPTS
    set_custom_error_handler(is_transient)


class ArrowHandler(FSSpecHandler):  # type: ignore[misc] # pyarrow has no types
    """Handler for Arrow's `PyFileSystem` that writes to a store; a process that unpickles it opens the store itself.

    Args:
        uri: any URI of the store.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        super().__init__(open_filesystem(uri, is_written=True)[0])

    def __reduce__(self) -> tuple[type["ArrowHandler"], tuple[str]]:
        return ArrowHandler, (self._uri,)


def etag_of_file(status: os.stat_result) -> str:
    """Return what tells two states of a local file apart: the time of its last change, and its size."""
    return f"{status.st_mtime_ns:x}-{status.st_size:x}"


def etag_of_entry(info: Mapping[str, Any]) -> str:
    """Return the etag, or the time of the last change, in what fsspec says of an object; empty if it says neither."""
    return str(info.get("etag") or info.get("ETag") or info.get("mtime") or "").strip('"')


def read_bytes(uri: str) -> bytes:
    """Return a whole object. Raises FileNotFoundError if there is none."""
    filesystem, path = open_filesystem(uri)
    content: bytes = filesystem.cat_file(path)
    return content


def write_bytes(uri: str, content: bytes, check: Callable[[], None] | None = None) -> None:
    """Write a whole object, so that no reader ever sees a part of it.

    An upload to an object store appears whole; a local file is written aside, then renamed.

    Args:
        uri: of the object.
        content: its bytes.
        check: raises where the object must not be written any more; called right before it appears.
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
    """Remove one object; if there is none, nothing happens."""
    filesystem, path = open_filesystem(uri, is_written=True)
    with contextlib.suppress(FileNotFoundError):
        filesystem.rm_file(path)


def remove_folder(uri: str) -> None:
    """Remove a folder and all that is below it; where there is none, nothing happens."""
    filesystem, path = open_filesystem(uri, is_written=True)
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
def translate_storage_errors(what: str, uri: str, kind: type[RequestError | RunError] = RequestError) -> Iterator[None]:
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
            raise kind(f"cannot {what} {uri}: {_reason(error)}{_advice(uri, str(error))}") from None
        raise


def _reason(error: Exception) -> str:
    if not type(error).__module__.startswith("obstore"):
        return " ".join(str(error).split())
    host = re.search(r"https?://[^\s/?]+", str(error))
    return f"{in_words(error)} ({host.group()})" if host else in_words(error)


def _advice(uri: str, error: str) -> str:
    is_denied = re.search(r"AccessDenied|Forbidden|Access Denied|\b40[13]\b", error)
    if not is_denied or uris.protocol_of(uri) != "s3" or s3.has_credentials():
        return ""
    return "; no AWS credentials were found: set the standard variables, a profile or a role"


def exists(uri: str) -> bool:
    """Return whether there is an object, folder or prefix of that name, found within a few seconds.

    Raises:
        RequestError: the store does not answer, or refuses our credentials.
    """
    if uris.is_local(uri):
        return os.path.exists(uri)
    with translate_storage_errors("reach", uri):
        if uris.protocol_of(uri) != "s3":
            filesystem, path = open_filesystem(uri)
            return bool(filesystem.exists(path))
        bucket, key = uris.split_bucket(uri)
        if not bucket:
            raise RequestError(f"{uri} names no bucket")
        return s3.has_any(bucket, key)
