"""Conditional writes: create an object only if it does not exist yet, as leases need."""

import contextlib
import errno
import os
import uuid

import obstore
from obstore.exceptions import AlreadyExistsError

from pipelines.storage import uris
from pipelines.storage.bulk import is_obstore_path, s3_store
from pipelines.storage.filesystem import open_filesystem, write_bytes
from pipelines.storage.retry import Retries

# Error numbers returned by file systems without hard links, such as SMB and some FUSE mounts.
NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK)


def create_object(uri: str, content: bytes) -> bool:
    """Write an object atomically unless it exists. If several processes try at once, exactly one succeeds.

    On S3 this is a PUT with `If-None-Match: *`; locally, a hard link to a complete file. A retry after a lost response
    may find the object that the first attempt created and returns False, so callers compare the content.

    Returns:
        True if this call created the object.
    """
    if uris.is_local(uri):
        return _create_file(uri, content)
    bucket, key = uris.split_bucket(uri)
    if uris.protocol_of(uri) == "s3" and is_obstore_path(key):
        try:
            Retries().send(lambda: obstore.put(s3_store(bucket, is_written=True), key, content, mode="create"))
        except AlreadyExistsError:
            return False
        return True
    filesystem, path = open_filesystem(uri, is_written=True)
    try:
        filesystem.pipe_file(path, content, mode="create")
    except FileExistsError:
        return False
    return True


def _create_file(path: str, content: bytes) -> bool:
    folder, name = os.path.split(path)
    finished = os.path.join(folder, f".{name}.{uuid.uuid4().hex}")
    write_bytes(finished, content)
    try:
        os.link(finished, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        return _create_without_link(path, content)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(finished)
    return True


def _create_without_link(path: str, content: bytes) -> bool:
    # A reader may see the file before its content is written. Readers of leases tolerate that: they wait for the
    # content.
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return True
