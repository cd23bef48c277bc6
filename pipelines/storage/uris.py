"""URIs as users write them: a local path, `file://`, `s3://bucket/key`, or any protocol of fsspec.

Keys are taken as they are, never percent-encoded, as s3fs and the AWS command line do.
"""

import os


def protocol_of(uri: str) -> str:
    """`s3` of `s3://bucket/key`; `file` for local paths."""
    scheme, separator, _ = uri.partition("://")
    return scheme.lower() if separator else "file"


def is_local(uri: str) -> bool:
    """Whether the URI names a path of this machine."""
    return protocol_of(uri) == "file"


def normalize(uri: str) -> str:
    """One spelling for one place: local paths absolute and without `file://`, no slash at the end."""
    if is_local(uri):
        return os.path.abspath(uri.removeprefix("file://"))
    scheme, _, rest = uri.partition("://")
    return f"{scheme.lower()}://{rest.rstrip('/')}"


def join(uri: str, name: str) -> str:
    """The place called `name` below `uri`."""
    return f"{uri.rstrip('/')}/{name}"


def split_bucket(uri: str) -> tuple[str, str]:
    """`("bucket", "a/b.jpg")` of `s3://bucket/a/b.jpg`; the key is empty for a whole bucket."""
    bucket, _, key = uri.partition("://")[2].partition("/")
    return bucket, key


def contains(outer: str, inner: str) -> bool:
    """Whether `inner` is `outer` or lies below it."""
    outer, inner = normalize(outer), normalize(inner)
    return inner == outer or inner.startswith(outer.rstrip("/") + "/")
